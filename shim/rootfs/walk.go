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

// directory writes d and everything in it that is not a directory, and returns
// its subdirectories.
func (k *walk) directory(d *directory) ([]*directory, error) {
	path := d.path()
	fd, err := k.open(path)
	if vanished(err) || errors.Is(err, unix.EXDEV) && !k.overlay {
		return nil, nil // as in child, had it come a moment earlier
	}
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", quote(path), err)
	}
	defer unix.Close(fd)

	e, err := k.examine(fd, path)
	if err != nil {
		return nil, err
	}
	if !e.is(unix.S_IFDIR) { // another thing has taken the name since it was listed
		return nil, k.write(e)
	}
	if err := k.write(e); err != nil {
		return nil, err
	}

	readable, err := reopen(fd, ".", unix.O_DIRECTORY)
	if err != nil {
		return nil, fmt.Errorf("open directory %s: %w", quote(path), err)
	}
	dir := os.NewFile(uintptr(readable), quote(path))
	defer dir.Close()
	var children []*directory
	for {
		names, err := dir.Readdirnames(k.batch)
		if err == io.EOF {
			return children, nil
		}
		if err != nil && !vanished(err) { // a directory deleted while open reads as ENOENT
			return nil, fmt.Errorf("read directory: %w", err)
		}
		if len(names) == 0 {
			return children, nil
		}
		slices.Sort(names)
		for _, name := range names {
			isDir, err := k.child(dir, e, name)
			if err != nil {
				return nil, err
			}
			if isDir {
				children = append(children, &directory{parent: d, name: name})
			}
		}
	}
}

// child writes what dir has under name, or reports that it is a directory.
func (k *walk) child(dir *os.File, parent *entry, name string) (isDir bool, err error) {
	if k.ctx.Err() != nil {
		return false, context.Cause(k.ctx)
	}
	path := name
	if parent.path != "" {
		path = parent.path + "/" + name
	}
	fd, err := openat2(int(dir.Fd()), name, 0)
	switch {
	case vanished(err):
		return false, nil
	case errors.Is(err, unix.EXDEV) && !k.overlay:
		return false, nil
	case errors.Is(err, unix.EXDEV):
		return false, fmt.Errorf("open %s: something is mounted there: unmount it from the layer's directory", quote(path))
	case err != nil:
		return false, fmt.Errorf("open %s: %w", quote(path), err)
	}
	defer unix.Close(fd)

	e, err := k.examine(fd, path)
	if err != nil {
		return false, err
	}
	if e.is(unix.S_IFDIR) {
		return true, nil
	}
	if k.overlay {
		done, err := k.whiteout(parent, e)
		if done || err != nil {
			return false, err
		}
	}
	return false, k.write(e)
}

// open opens the path below the root, whatever it is, as O_PATH. The kernel
// takes at most PATH_MAX bytes at once, so a longer path goes piece by piece.
func (k *walk) open(path string) (int, error) {
	at := int(k.root.Fd())
	for first := true; ; first = false {
		piece, rest := path, ""
		if len(path) >= unix.PathMax {
			i := strings.LastIndexByte(path[:unix.PathMax-1], '/')
			piece, rest = path[:i], path[i+1:]
		}
		if piece == "" {
			piece = "."
		}
		flags := 0
		if rest != "" {
			flags = unix.O_DIRECTORY
		}
		fd, err := openat2(at, piece, flags)
		if !first {
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

// reopen opens for reading what an O_PATH descriptor refers to: path is "." below
// dirfd, or from procPath. It never waits, neither for a FIFO's writer nor for a lease.
func reopen(dirfd int, path string, flags int) (int, error) {
	flags |= unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	fd, err := unix.Openat(dirfd, path, flags|unix.O_NOATIME, 0)
	if err == unix.EPERM { // O_NOATIME is for the owner and for CAP_FOWNER
		fd, err = unix.Openat(dirfd, path, flags, 0)
	}
	return fd, err
}

// read is read(2), again if a signal comes between.
func read(fd int, buf []byte) (int, error) {
	for {
		n, err := unix.Read(fd, buf)
		if err != unix.EINTR {
			return n, err
		}
	}
}

// vanished tells whether err means that a path which was there has been deleted,
// or that a directory on the way has been replaced by something else.
func vanished(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) || errors.Is(err, unix.ELOOP)
}
