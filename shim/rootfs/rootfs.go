// Package rootfs captures files of a container that CRIU's images leave out: the
// changes in its writable layer, and the content of /dev/shm.
//
// What it reads is hostile, and some of it changes while it is read. It promises
// that nothing outside the directories it is given gets into the output, that
// nothing but regular files and directories is ever opened (a FIFO would wait for
// ever, a watchdog's device node reboots the machine), and that there is no
// silent gap: an entry is written, or is of a kind that Copy and Tree say they
// leave out, or is named by an error.
//
// It never resolves a path through a symbolic link, and never changes what it
// reads, not even an access time where the kernel lets it be.
package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ErrUnsupported is what errors.Is finds in an error about something in the
// container that no archive can hold, or that no reader of archives would take.
// The message names the file and what to do; trying again does not help.
var ErrUnsupported = errors.New("cannot be captured")

func unsupported(path, format string, args ...any) error {
	return fmt.Errorf("%s %w: %s", quote(path), ErrUnsupported, fmt.Sprintf(format, args...))
}

// Layer is the writable layer of an overlay mount. The files may be O_PATH
// descriptors; they stay the caller's and open.
type Layer struct {
	// Upper is the upper directory.
	Upper *os.File
	// Merged is the root of the mount itself, where everything is as the
	// container sees it.
	Merged *os.File
	// Lower are the lower directories. They serve deleted.files alone, see Finish;
	// without them it is less than complete.
	Lower []*os.File
	// UserXattr says that overlay's notes are in user.overlay.* attributes, as with
	// the mount option userxattr, and not in trusted.overlay.*.
	UserXattr bool
}

// Tree writes everything below dir, and dir itself as "./", to w as an
// uncompressed tar. Other processes may change dir meanwhile: a file has the size
// in the output that it had when its turn came, cut off or filled with zeros if it
// changed since, and what is renamed or deleted may be missing.
//
// What is kept and what is an error is as for Copy, but overlay's conventions mean
// nothing here: such names, devices and attributes are kept as they are. What is
// mounted below dir is left out: it is another volume.
//
// scratch is an empty file, open to be read and written, for nobody else. What must be
// remembered of many directories and links is put into it, so that memory does not
// grow with what dir has. It stays the caller's.
func Tree(ctx context.Context, w io.Writer, dir, scratch *os.File) error {
	k := &walk{ctx: ctx, root: dir, scratch: scratch, batch: maxSorted, parts: maxExtents}
	if err := k.writeTo(w); err != nil {
		return fmt.Errorf("write directory tree: %w", err)
	}
	return nil
}

const (
	// maxSorted is how many names of a directory are held and sorted at a time.
	maxSorted = 10_000
	// maxPath is how many bytes a path may have, below the root. Sixteen times as much as one has for the
	// system calls that most programs make, restorers among them. It bounds what a walk remembers of the way to where it is.
	maxPath = 64 << 10
)

// walk is one pass over a tree.
type walk struct {
	ctx     context.Context
	root    *os.File
	layer   *Layer // nil if root is a plain directory, and not the upper one of an overlay mount
	scratch *os.File
	deleted func(path string) error
	batch   int // how many names of a directory are taken at a time
	parts   int // how many parts a sparse file may have

	proc    int         // /proc/self/fd
	links   *firstPaths // of files that have several
	waiting *waiting
	out     output

	first  *firstPass  // not nil in the first pass of two
	second *secondPass // not nil in the second
}

// inode identifies a file.
type inode struct{ dev, ino uint64 }

func (k *walk) writeTo(w io.Writer) error { return k.run(newStream(w)) }

// run writes the whole tar.
func (k *walk) run(out output) (err error) {
	k.out = out
	if err := k.scratch.Truncate(0); err != nil { // what another walk has left
		return err
	}
	k.links, k.waiting = newFirstPaths(k.scratch), &waiting{file: k.scratch}
	if k.proc, err = openProc(); err != nil {
		return err
	}
	defer unix.Close(k.proc)
	if err := k.directories(); err != nil {
		return err
	}
	if _, err := k.out.Write(make([]byte, 2*tarBlock)); err != nil { // they end a tar
		return err
	}
	return k.out.flush()
}
