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
	depth  int  // the root's is 0
	batch  int  // of its parent's names
	noted  bool // whether the first pass has noted it; known when its turn comes
	below       // the same, and then for its children
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
	type visit struct {
		of             *directory
		first, at, end int64 // of the names of its subdirectories in k.waiting
	}
	var way []visit // to where the walk is
	enter := func(d *directory) error {
		first := k.waiting.end()
		err := k.directory(d)
		way = append(way, visit{d, first, first, k.waiting.end()})
		return err
	}
	if err := enter(&directory{}); err != nil {
		return err
	}
	for len(way) > 0 {
		last := &way[len(way)-1]
		if last.at == last.end {
			k.waiting.cut(last.first)
			way = way[:len(way)-1]
			continue
		}
		name, batch, next, err := k.waiting.at(last.at)
		if err != nil {
			return err
		}
		last.at = next
		if err := enter(&directory{parent: last.of, name: name, depth: last.of.depth + 1, batch: batch}); err != nil {
			return err
		}
	}
	return nil
}

// place is an open directory in which names are looked up.
type place struct {
	fd     int
	merged bool // as the overlay mount shows it
}

// directory writes d and everything in it that is not a directory, and puts
// its subdirectories on the waiting list.
func (k *walk) directory(d *directory) error {
	if k.second != nil && k.second.known != nil {
		r, err := k.second.known.directory(d)
		if err != nil {
			return err
		}
		// What an opaque one hides is not in the index.
		if r != nil && r.same && !r.notes.opaque && (d.parent == nil || !d.parent.hides) {
			return k.same(d, r)
		}
	}
	path := d.path()
	roots := []place{k.top()}
	if d.parent != nil && d.parent.renamed {
		roots = append(roots, k.merged())
	}
	e, err := k.find(roots, path, path)
	if e == nil {
		return err
	}
	defer e.close()
	if !e.is(unix.S_IFDIR) { // another thing has taken the name since it was listed
		if k.first != nil {
			return nil
		}
		return k.leaf(e)
	}
	if err := k.examine(e); err != nil {
		return err
	}
	if k.first != nil {
		if e.marks.redirect {
			return nil // the second pass finds out what is in it
		}
		if err := k.first.directory(d, e, func() error { return k.write(e) }); err != nil {
			return err
		}
		return k.children(d, e, []place{{e.file, false}})
	}
	if err := k.write(e); err != nil {
		return err
	}

	listed := e
	in := []place{{e.file, e.merged}}
	d.mark(e.marks)
	if d.renamed && !e.merged {
		// What is seen in it comes from the upper directory and from wherever it was before.
		m, err := k.find([]place{k.merged()}, path, path)
		if err != nil {
			return err
		}
		if m != nil {
			defer m.close()
			if err := k.openToRead(m); err != nil {
				return err
			}
			listed, in = m, append(in, place{m.file, true})
		}
	}
	if d.hides {
		if err := k.hidden(d, path, in); err != nil {
			return err
		}
	}
	return k.children(d, listed, in)
}

// children writes what listed has besides directories, found in the given places,
// and puts the directories on the waiting list.
func (k *walk) children(d *directory, listed *entry, in []place) error {
	dir := listed.takeFile()
	defer dir.Close()
	for batch := 0; ; batch++ {
		names, err := dir.Readdirnames(k.batch)
		if err != nil && err != io.EOF && !vanished(err) { // a directory deleted while open reads as ENOENT
			return fmt.Errorf("read directory: %w", err)
		}
		if len(names) == 0 {
			return nil
		}
		slices.Sort(names)
		for _, name := range names {
			isDir, err := k.name(d, listed.path, name, in)
			if err == nil && isDir {
				err = k.waiting.add(name, batch)
			}
			if err != nil {
				return err
			}
		}
		switch {
		case k.first != nil:
			err = k.first.batch(listed.path)
		case d.noted:
			err = k.second.known.batch()
		}
		if err != nil {
			return err
		}
	}
}

// name writes what d, at dir, has under name, or reports that it is a directory.
func (k *walk) name(d *directory, dir, name string, in []place) (isDir bool, err error) {
	path := join(dir, name)
	if d.noted {
		r, err := k.second.known.leaf(name)
		if err != nil {
			return false, err
		}
		if r != nil {
			if done, err := k.unchanged(r, path); done || err != nil {
				return false, err
			}
		}
	}
	isDir, err = k.child(in, name, path)
	if isDir && k.first != nil {
		err = k.first.name(dir, name)
	}
	return isDir, err
}

// child writes what is at path, found in the given places under name, or reports
// that it is a directory.
func (k *walk) child(in []place, name, path string) (isDir bool, err error) {
	if k.ctx.Err() != nil {
		return false, context.Cause(k.ctx)
	}
	e, err := k.find(in, name, path)
	if e == nil {
		return false, err
	}
	defer e.close()
	if e.is(unix.S_IFDIR) {
		return true, nil
	}
	return false, k.leaf(e)
}

// same writes a directory that is as the first pass has noted it, by r, with the same names in it.
func (k *walk) same(d *directory, r *record) error {
	if err := k.second.keep(r.piece); err != nil {
		return err
	}
	d.mark(r.notes)
	path := d.path()
	batch := 0
	for known := k.second.known; ; known.next++ {
		r, err := known.record()
		if err != nil {
			return err
		}
		if r == nil || r.kind == dirRecord {
			return nil
		}
		switch r.kind {
		case subRecord:
			err = k.waiting.add(string(r.name), batch)
		case batchRecord:
			batch++
		case leafRecord:
			err = k.sameName(r, join(path, string(r.name)), batch)
		}
		if err != nil {
			return err
		}
	}
}

// sameName writes what is at path, of which the first pass has noted r, in a directory that is the same.
func (k *walk) sameName(r *record, path string, batch int) error {
	if k.ctx.Err() != nil {
		return context.Cause(k.ctx)
	}
	if done, err := k.unchanged(r, path); done || err != nil {
		return err
	}
	name := string(r.name)
	isDir, err := k.child([]place{k.top()}, path, path)
	if isDir {
		err = k.waiting.add(name, batch)
	}
	return err
}

// unchanged writes what is at path without a look at it, if it is as the first pass has noted it, by r.
func (k *walk) unchanged(r *record, path string) (done bool, err error) {
	if !r.same {
		return false, nil
	}
	e := &entry{path: path, st: r.attrs, marks: r.notes}
	if isWhiteout(&e.st) {
		return true, k.whiteout(e)
	}
	if done, err := k.link(e); done || err != nil {
		return true, err
	}
	switch {
	case e.marks.whiteout:
		return true, k.whiteout(e)
	case r.piece.length > 0:
		return true, errors.Join(k.comesFirst(e), k.second.keep(r.piece))
	}
	// It was a link to another name then, which is gone, or comes later now.
	return false, nil
}

// top is the root that is walked.
func (k *walk) top() place { return place{fd: int(k.root.Fd())} }

// leaf writes e, which is not a directory.
func (k *walk) leaf(e *entry) error {
	if k.first != nil {
		return k.first.leaf(k, e)
	}
	switch {
	case e.is(unix.S_IFSOCK):
		return nil // means nothing without the process that listens
	case k.layer != nil && !e.merged && isWhiteout(&e.st):
		return k.whiteout(e)
	}
	if done, err := k.link(e); done || err != nil {
		return err
	}
	if err := k.examine(e); err != nil {
		return err
	}
	if e.marks.whiteout {
		return k.whiteout(e)
	}
	if err := k.comesFirst(e); err != nil {
		return err
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
