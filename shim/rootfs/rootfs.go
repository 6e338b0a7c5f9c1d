// Package rootfs captures files of a container that CRIU's images leave out: the
// changes in its writable layer, and the content of /dev/shm.
//
// What it reads is hostile, and some of it changes while it is read. It promises
// that nothing outside the directory it is given gets into the output, that
// nothing but regular files and directories is ever opened (a FIFO would wait for
// ever, a watchdog's device node reboots the machine), and that there is no
// silent gap: an entry is written, or is of a kind that Diff and Tree say they
// leave out, or is named by an error.
//
// It never resolves a path through a symbolic link, and never changes what it
// reads, not even an access time where the kernel lets it be.
package rootfs

import (
	"archive/tar"
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
)

// Diff writes the changes that the upper directory of an overlay mount holds to
// w, as an uncompressed OCI layer: deleted names become whiteouts (.wh.NAME),
// replaced directories get an opaque marker (.wh..wh..opq). upper stays open, and
// its offset is left alone.
//
// It returns what goes into deleted.files: for each whiteout the deleted path
// and the path of the whiteout itself, for each opaque marker its own path, all
// relative to the root. Restorers that read deleted.files (CRI-O, podman) unpack
// whiteouts as ordinary files and remove with this list what they should not
// have unpacked. The paths are bytes; those that are not UTF-8 do not survive JSON.
//
// The entries keep type, mode, numeric owner, modification time in nanoseconds,
// hard links within the layer, and extended attributes. Left out are sockets,
// overlay's own attributes, and those that bind a file to this machine,
// security.selinux and security.evm. What is renamed or deleted while Diff runs
// may be missing.
//
// These are errors that name the file: overlay's redirect and metacopy
// attributes, for part of such a file is in another layer; names that begin with
// .wh., which any reader would take for whiteouts; attributes that a tar cannot
// hold; a mount point below upper; whatever cannot be read.
//
// A parent comes before what is in it, and a directory's entries are sorted,
// files first; directories of more than 100,000 entries in pieces of that many.
// Memory grows with the number of directories, whiteouts and hard links, not with
// the number or size of files.
func Diff(ctx context.Context, w io.Writer, upper *os.File) (deleted []string, err error) {
	k := &walk{ctx: ctx, root: upper, overlay: true, batch: maxSorted}
	if err := k.writeTo(w); err != nil {
		return nil, fmt.Errorf("write layer diff: %w", err)
	}
	return k.deleted, nil
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
	k := &walk{ctx: ctx, root: dir, batch: maxSorted}
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
	overlay bool // root is the upper directory of an overlay mount
	batch   int  // how many names of a directory are taken at a time
	tar     *tar.Writer
	links   map[inode]string // first path of each file that has several
	deleted []string
	buf     []byte // for file content
}

// inode identifies a file.
type inode struct{ dev, ino uint64 }

func (k *walk) writeTo(w io.Writer) error {
	const bufferSize = 1 << 20
	b := bufio.NewWriterSize(w, bufferSize)
	k.tar = tar.NewWriter(b)
	k.links = make(map[inode]string)
	k.buf = make([]byte, bufferSize)
	if err := k.directories(); err != nil {
		return err
	}
	if err := k.tar.Close(); err != nil {
		return err
	}
	return b.Flush()
}
