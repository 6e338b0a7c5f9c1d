package rootfs

import (
	"archive/tar"
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// entry is a file system object that is held by an O_PATH descriptor: it cannot
// become another one while it is looked at.
type entry struct {
	path  string // below the root; "" is the root
	fd    int
	st    unix.Stat_t
	attrs map[string]string // extended attributes that go into the tar
	marks marks             // what overlay has noted in attributes
}

func (e *entry) is(format uint32) bool { return e.st.Mode&unix.S_IFMT == format }

// examine reads what there is to know about fd.
func (k *walk) examine(fd int, path string) (*entry, error) {
	e := &entry{path: path, fd: fd}
	if err := unix.Fstat(fd, &e.st); err != nil {
		return nil, fmt.Errorf("stat %s: %w", quote(path), err)
	}
	var err error
	if e.attrs, err = xattrs(fd); err != nil {
		return nil, fmt.Errorf("read extended attributes of %s: %w", quote(path), err)
	}
	if k.overlay {
		if e.marks, err = takeMarks(e.attrs); err != nil {
			return nil, fmt.Errorf("read layer entry %s: %w", quote(path), err)
		}
	}
	// The label is bound to the container that it confines, the signature to
	// the inode. Restored, they would lock the container out of its files.
	delete(e.attrs, "security.selinux")
	delete(e.attrs, "security.evm")
	return e, nil
}

// write writes e to the tar, unless it is a socket.
func (k *walk) write(e *entry) error {
	if k.overlay && strings.HasPrefix(baseName(e.path), whiteoutPrefix) {
		return fmt.Errorf("write %s: names beginning with %s are whiteouts in a layer: rename the file in the container", quote(e.path), whiteoutPrefix)
	}
	h := &tar.Header{
		Name:    e.path,
		Mode:    int64(e.st.Mode & 0o7777),
		Uid:     int(e.st.Uid),
		Gid:     int(e.st.Gid),
		ModTime: time.Unix(e.st.Mtim.Unix()),
		// PAX takes any bytes but NUL in a name, of any length, and keeps nanoseconds.
		// Without fractions and attributes it is plain ustar.
		Format: tar.FormatPAX,
	}
	for name, value := range e.attrs {
		if strings.Contains(name, "=") {
			return fmt.Errorf("write %s: a tar cannot hold the extended attribute %q: remove it in the container (setfattr -x)", quote(e.path), name)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords["SCHILY.xattr."+name] = value
	}

	if e.is(unix.S_IFDIR) {
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if e.path == "" {
			h.Name = "./"
		}
		if err := k.header(h); err != nil {
			return err
		}
		return k.opaque(e)
	}
	if e.is(unix.S_IFSOCK) {
		return nil // means nothing without the process that listens
	}
	if e.st.Nlink > 1 {
		id := inode{uint64(e.st.Dev), e.st.Ino}
		if first, ok := k.links[id]; ok {
			h.Typeflag, h.Linkname, h.PAXRecords = tar.TypeLink, first, nil
			return k.header(h)
		}
		k.links[id] = e.path
	}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		h.Typeflag = tar.TypeReg
		return k.file(e, h)
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		target, err := readlink(e.fd)
		if err != nil {
			return fmt.Errorf("read link %s: %w", quote(e.path), err)
		}
		h.Linkname = target
	case unix.S_IFIFO:
		h.Typeflag = tar.TypeFifo
	case unix.S_IFCHR, unix.S_IFBLK:
		h.Typeflag = tar.TypeChar
		if e.is(unix.S_IFBLK) {
			h.Typeflag = tar.TypeBlock
		}
		h.Devmajor = int64(unix.Major(uint64(e.st.Rdev)))
		h.Devminor = int64(unix.Minor(uint64(e.st.Rdev)))
	default:
		return fmt.Errorf("write %s: unknown file type %o", quote(e.path), e.st.Mode)
	}
	return k.header(h)
}

func (k *walk) header(h *tar.Header) error {
	if err := k.tar.WriteHeader(h); err != nil {
		return fmt.Errorf("write header of %s: %w", quote(h.Name), err)
	}
	return nil
}

// file writes a regular file. Its header goes first and cannot be taken back:
// the size in it is kept to, whatever happens to the file.
func (k *walk) file(e *entry, h *tar.Header) error {
	// By way of the descriptor that was examined: by now a device node could
	// have taken the name, and some devices act on being opened.
	fd, err := reopen(unix.AT_FDCWD, procPath(e.fd), 0)
	if err == unix.EAGAIN {
		return fmt.Errorf("open %s: a process holds a lease on it (fcntl F_SETLEASE) and would have to be waited for: try again without it", quote(e.path))
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", quote(e.path), err)
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return fmt.Errorf("stat %s: %w", quote(e.path), err)
	}
	if st.Dev != e.st.Dev || st.Ino != e.st.Ino || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return fmt.Errorf("open %s: got another file: is /proc mounted over?", quote(e.path))
	}
	h.Size = st.Size
	if err := k.header(h); err != nil {
		return err
	}
	for left := st.Size; left > 0; {
		if k.ctx.Err() != nil {
			return context.Cause(k.ctx)
		}
		buf := k.buf[:min(left, int64(len(k.buf)))]
		n, err := read(fd, buf)
		if err != nil {
			return fmt.Errorf("read %s: %w", quote(e.path), err)
		}
		if n == 0 { // the file shrank
			clear(buf)
			n = len(buf)
		}
		if _, err := k.tar.Write(buf[:n]); err != nil {
			return fmt.Errorf("write content of %s: %w", quote(e.path), err)
		}
		left -= int64(n)
	}
	return nil
}

// readlink returns the target of the link that fd refers to.
func readlink(fd int) (string, error) {
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(fd, "", buf)
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", unix.ENAMETOOLONG // it may be cut off
	}
	return string(buf[:n]), nil
}

// procPath is a path to just what an O_PATH descriptor refers to, even if that is
// a symbolic link. Such a descriptor can neither be read nor asked for attributes.
func procPath(fd int) string {
	return fmt.Sprintf("/proc/self/fd/%d", fd)
}

// maxAttrs bounds the attributes of one file: readers refuse a longer PAX header,
// Go's among them.
const maxAttrs = 1 << 20

// xattrs returns the extended attributes of what fd refers to.
func xattrs(fd int) (map[string]string, error) {
	path := procPath(fd)
	list, err := grow(func(buf []byte) (int, error) { return unix.Listxattr(path, buf) })
	if err == unix.EOPNOTSUPP || (err == nil && len(list) == 0) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	attrs := make(map[string]string)
	size := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list), "\x00"), "\x00") {
		value, err := grow(func(buf []byte) (int, error) { return unix.Getxattr(path, name, buf) })
		if err == unix.ENODATA {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		if size += len(name) + len(value); size > maxAttrs {
			return nil, fmt.Errorf("they are larger than the %d bytes that tar readers take: remove some in the container", maxAttrs)
		}
		attrs[name] = string(value)
	}
	return attrs, nil
}

// grow calls get with larger buffers until the answer fits.
func grow(get func([]byte) (int, error)) ([]byte, error) {
	for size := 256; ; size *= 4 {
		buf := make([]byte, size)
		n, err := get(buf)
		if err == nil {
			return buf[:n], nil
		}
		if err != unix.ERANGE || size > maxAttrs {
			return nil, err
		}
	}
}

// quote makes a path fit to be shown, in one line and of bounded length: names
// are the container's to choose, and depth knows no limit.
func quote(path string) string {
	const most = 512
	if len(path) > most {
		return fmt.Sprintf("%q...%q", path[:most/2], path[len(path)-most/2:])
	}
	return strconv.Quote(path)
}

func baseName(path string) string {
	return path[strings.LastIndexByte(path, '/')+1:]
}
