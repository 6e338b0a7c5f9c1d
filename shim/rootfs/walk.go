package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// directory is one that waits for its turn. It knows its parent instead of its
// path, because the paths of a deep tree add up to the square of its depth.
type directory struct {
	parent *directory // nil for the root
	name   string
	below  // known when its turn comes, and then for its children
}

func (d *directory) path() string {
	var names []string
	for ; d.parent != nil; d = d.parent {
		names = append(names, d.name)
	}
	slices.Reverse(names)
	return strings.Join(names, "/")
}

// directories walks the tree: a directory, its files, then its subdirectories,
// each sorted. Depth costs neither stack nor descriptors: at any time one
// directory is open besides the root, found anew by its path.
func (k *walk) directories() error {
	waiting := []*directory{{}}
	for len(waiting) > 0 {
		last := len(waiting) - 1
		d := waiting[last]
		waiting = waiting[:last]
		children, err := k.directory(d)
		if err != nil {
			return err
		}
		slices.Reverse(children)
		waiting = append(waiting, children...)
	}
	return nil
}

// place is an open directory in which names are looked up.
type place struct {
	fd     int
	merged bool // as the overlay mount shows it
}

// directory writes d and everything in it that is not a directory, and returns
// its subdirectories.
func (k *walk) directory(d *directory) ([]*directory, error) {
	path := d.path()
	roots := []place{{fd: int(k.root.Fd())}}
	if d.parent != nil && d.parent.renamed {
		roots = append(roots, k.merged())
	}
	e, err := k.find(roots, path, path)
	if e == nil {
		return nil, err
	}
	defer e.close()
	if !e.is(unix.S_IFDIR) { // another thing has taken the name since it was listed
		return nil, k.leaf(e)
	}
	if err := k.examine(e); err != nil {
		return nil, err
	}
	if err := k.write(e); err != nil {
		return nil, err
	}

	listed := e
	in := []place{{e.file, e.merged}}
	if k.layer != nil {
		if err := k.look(d, e); err != nil {
			return nil, err
		}
	}
	if d.renamed && !e.merged {
		// What is seen in it comes from the upper directory and from wherever it was before.
		m, err := k.find([]place{k.merged()}, path, path)
		if err != nil {
			return nil, err
		}
		if m != nil {
			defer m.close()
			if err := k.openToRead(m); err != nil {
				return nil, err
			}
			listed, in = m, append(in, place{m.file, true})
		}
	}
	if d.hides {
		if err := k.hidden(d, path, in); err != nil {
			return nil, err
		}
	}
	return k.children(d, e, listed, in)
}

// children writes what listed has besides directories, found in the given places,
// and returns the directories.
func (k *walk) children(d *directory, e, listed *entry, in []place) ([]*directory, error) {
	dir := listed.takeFile()
	defer dir.Close()
	var children []*directory
	for {
		names, err := dir.Readdirnames(k.batch)
		if err != nil && err != io.EOF && !vanished(err) { // a directory deleted while open reads as ENOENT
			return nil, fmt.Errorf("read directory: %w", err)
		}
		if len(names) == 0 {
			return children, nil
		}
		slices.Sort(names)
		for _, name := range names {
			isDir, err := k.child(e, name, in)
			if err != nil {
				return nil, err
			}
			if isDir {
				children = append(children, &directory{parent: d, name: name})
			}
		}
	}
}

// child writes what parent has under name, or reports that it is a directory.
func (k *walk) child(parent *entry, name string, in []place) (isDir bool, err error) {
	if k.ctx.Err() != nil {
		return false, context.Cause(k.ctx)
	}
	e, err := k.find(in, name, join(parent.path, name))
	if e == nil {
		return false, err
	}
	defer e.close()
	if e.is(unix.S_IFDIR) {
		return true, nil
	}
	return false, k.leaf(e)
}

// leaf writes e, which is not a directory.
func (k *walk) leaf(e *entry) error {
	switch {
	case e.is(unix.S_IFSOCK):
		return nil // means nothing without the process that listens
	case k.layer != nil && !e.merged && e.is(unix.S_IFCHR) && e.st.Rdev == 0:
		return k.whiteout(e)
	}
	if done, err := k.link(e); done {
		return err
	}
	if err := k.examine(e); err != nil {
		return err
	}
	if e.marks.whiteout {
		return k.whiteout(e)
	}
	return k.write(e)
}

// find gets hold of what is at name in the first place that has something there,
// or returns nil if none has. The entry's path is path. The caller closes it.
func (k *walk) find(in []place, name, path string) (*entry, error) {
	for _, p := range in {
		fd, err := open(p.fd, name, 0)
		switch {
		case err == nil:
			e := &entry{path: path, fd: fd, file: -1, merged: p.merged}
			if err := unix.Fstat(fd, &e.st); err != nil {
				e.close()
				return nil, fmt.Errorf("stat %s: %w", quote(path), err)
			}
			return e, nil
		case vanished(err):
			continue
		case errors.Is(err, unix.EXDEV) && k.layer == nil:
			return nil, nil
		case errors.Is(err, unix.EXDEV):
			return nil, unsupported(path, "something is mounted there, in the layer's directory on the node: unmount it")
		}
		return nil, fmt.Errorf("open %s: %w", quote(path), err)
	}
	return nil, nil
}

// open gets hold of the path below a directory, whatever it is, as O_PATH. The
// kernel takes at most PATH_MAX bytes at once, so a longer path goes piece by piece.
func open(dir int, path string, flags int) (int, error) {
	at := dir
	for {
		piece, rest, pieceFlags := path, "", flags
		if len(path) >= unix.PathMax {
			i := strings.LastIndexByte(path[:unix.PathMax-1], '/')
			piece, rest, pieceFlags = path[:i], path[i+1:], unix.O_DIRECTORY
		}
		if piece == "" {
			piece = "."
		}
		fd, err := openat2(at, piece, pieceFlags)
		if at != dir {
			unix.Close(at)
		}
		if err != nil || rest == "" {
			return fd, err
		}
		at, path = fd, rest
	}
}

// openat2 gets hold of what is at path without opening it (O_PATH), and without
// leaving dirfd: by no link, no "..", no mount point.
func openat2(dirfd int, path string, flags int) (int, error) {
	how := unix.OpenHow{
		Flags:   uint64(flags | unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC),
		Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	}
	for {
		fd, err := unix.Openat2(dirfd, path, &how)
		if err == nil {
			return fd, nil
		}
		if err != unix.EINTR && err != unix.EAGAIN { // EAGAIN: a rename got in the way
			return -1, err
		}
	}
}

// vanished tells whether err means that a path which was there has been deleted,
// or that a directory on the way has been replaced by something else.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}

func join(dir, name string) string {
	if dir == "" {
		return name
	}
	return dir + "/" + name
}

func baseName(path string) string {
	return path[strings.LastIndexByte(path, '/')+1:]
}

// takeFile makes a file of what examine has opened. The caller closes it.
func (e *entry) takeFile() *os.File {
	f := os.NewFile(uintptr(e.file), quote(e.path))
	e.file = -1
	return f
}
