// Package rootfs captures files of a container that CRIU's images leave out: the
// changes in its writable layer, and the content of /dev/shm.
//
// What it reads is hostile, and some of it changes while it is read. It promises
// that nothing outside the directories it is given gets into the output, that
// nothing but regular files and directories is ever opened (a FIFO would wait for
// ever, a watchdog's device node reboots the machine), and that there is no
// silent gap: an entry is written, or is of a kind that Diff and Tree say they
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
	// Lower are the lower directories. They serve deleted.files alone, see Diff;
	// without them it is less than complete.
	Lower []*os.File
	// UserXattr says that overlay's notes are in user.overlay.* attributes, as with
	// the mount option userxattr, and not in trusted.overlay.*.
	UserXattr bool
}

// Diff writes the changes that a layer holds to w, as an uncompressed OCI layer:
// deleted names become whiteouts (.wh.NAME), replaced directories get an opaque
// marker (.wh..wh..opq).
//
// It calls deleted for each path that goes into deleted.files: for each whiteout
// the deleted path and the path of the whiteout itself; for each opaque marker its
// own path and what the lower directories have in the replaced directory and the
// layer has not. All are relative to the root. Restorers that read deleted.files
// (CRI-O, podman) unpack whiteouts as ordinary files and remove with this list
// what they should not have unpacked. The paths are bytes. What a lower layer has
// under another name, since it was renamed there, is not in the list.
//
// The entries keep type, mode, numeric owner, modification time in nanoseconds,
// hard links within the layer, holes of 32 KiB and more, and extended attributes.
// Files whose content is still in a lower layer (metacopy) are whole in the
// output, and so are directories that were renamed (redirect), which come out as
// opaque ones with everything that is seen in them.
//
// Left out are sockets, inode flags (chattr), overlay's own attributes, and those
// that bind a file to this machine, security.selinux and security.evm. What is
// renamed or deleted while Diff runs may be missing.
//
// These are errors that name the file and wrap ErrUnsupported: names that begin
// with .wh., which any reader would take for whiteouts; attributes that a tar
// cannot hold or that would mean something to another overlay; files of over
// 16 TiB, or with so many holes that readers do not take the list of them; a file
// with a lease; a mount point below Upper or Merged. Whatever cannot be read is
// an error too.
//
// A parent comes before what is in it, and a directory's entries are sorted,
// files first; directories of more than 100,000 entries in pieces of that many.
// Memory grows with the number of directories and of files with several links,
// by some 200 bytes for each, not with the number or size of files.
func Diff(ctx context.Context, w io.Writer, layer Layer, deleted func(path string) error) error {
	k := &walk{ctx: ctx, root: layer.Upper, layer: &layer, deleted: deleted, batch: maxSorted, parts: maxExtents}
	if err := k.writeTo(w); err != nil {
		return fmt.Errorf("write layer diff: %w", err)
	}
	return nil
}

// Tree writes everything below dir, and dir itself as "./", to w as an
// uncompressed tar. Other processes may change dir meanwhile: a file has the size
// in the output that it had when its turn came, cut off or filled with zeros if it
// changed since, and what is renamed or deleted may be missing.
//
// What is kept and what is an error is as for Diff, but overlay's conventions mean
// nothing here: such names, devices and attributes are kept as they are. What is
// mounted below dir is left out: it is another volume.
func Tree(ctx context.Context, w io.Writer, dir *os.File) error {
	k := &walk{ctx: ctx, root: dir, batch: maxSorted, parts: maxExtents}
	if err := k.writeTo(w); err != nil {
		return fmt.Errorf("write directory tree: %w", err)
	}
	return nil
}

// maxSorted is how many names of a directory are held and sorted at a time.
const maxSorted = 100_000

// walk is one run of Diff or Tree.
type walk struct {
	ctx     context.Context
	root    *os.File
	layer   *Layer // nil if root is a plain directory, and not the upper one of an overlay mount
	deleted func(path string) error
	batch   int // how many names of a directory are taken at a time
	parts   int // how many parts a sparse file may have

	proc  int              // /proc/self/fd
	links map[inode]string // first path of each file that has several
	out   output

	first  *firstPass  // not nil in the first pass of two
	second *secondPass // not nil in the second
}

// inode identifies a file.
type inode struct{ dev, ino uint64 }

func (k *walk) writeTo(w io.Writer) error { return k.run(newStream(w)) }

// run writes the whole tar.
func (k *walk) run(out output) (err error) {
	k.out = out
	k.links = make(map[inode]string)
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
