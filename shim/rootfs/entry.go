package rootfs

import (
	"archive/tar"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// entry is a file system object that is held by an O_PATH descriptor: it cannot
// become another one while it is looked at.
type entry struct {
	path   string // below the root; "" is the root
	fd     int
	st     unix.Stat_t
	merged bool // found in the overlay mount, which shows nothing of overlay's own

	// What examine finds out.
	file  int               // open for reading if it is a regular file or a directory, otherwise -1
	attrs map[string]string // extended attributes that go into the tar
	marks marks             // what overlay has noted in attributes
}

func (e *entry) is(format uint32) bool { return e.st.Mode&unix.S_IFMT == format }

func (e *entry) close() {
	unix.Close(e.fd)
	if e.file >= 0 {
		unix.Close(e.file)
	}
}

// examine opens e, if it is of a kind that is opened, and reads its attributes.
func (k *walk) examine(e *entry) error {
	if e.is(unix.S_IFREG) || e.is(unix.S_IFDIR) {
		if err := k.openToRead(e); err != nil {
			return err
		}
	}
	var err error
	if e.attrs, err = e.xattrs(); err != nil {
		return err
	}
	if k.layer != nil {
		if err := k.takeMarks(e); err != nil {
			return err
		}
	}
	// The label is bound to the container that it confines, the signature to
	// the inode. Restored, they would lock the container out of its files.
	delete(e.attrs, "security.selinux")
	delete(e.attrs, "security.evm")
	return nil
}

// write writes e to the tar.
func (k *walk) write(e *entry) error {
	h, err := k.newHeader(e)
	if err != nil {
		return err
	}
	switch e.st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		h.Typeflag = tar.TypeDir
		h.Name += "/"
		if e.path == "" {
			h.Name = "./"
		}
		if err := k.header(h); err != nil {
			return err
		}
		return k.opaque(e)
	case unix.S_IFREG:
		h.Typeflag = tar.TypeReg
		return k.file(e, h)
	case unix.S_IFLNK:
		h.Typeflag = tar.TypeSymlink
		if h.Linkname, err = readlink(e.fd); err != nil {
			return fmt.Errorf("read link %s: %w", quote(e.path), err)
		}
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

// link writes e as a hard link, if it has been written already under another name.
func (k *walk) link(e *entry) (done bool, err error) {
	first, err := k.before(e)
	if first == "" {
		return false, err
	}
	h, err := k.newHeader(e)
	if err != nil {
		return true, err
	}
	h.Typeflag, h.Linkname = tar.TypeLink, first
	return true, k.header(h)
}

// before returns the name of e that came first, "" if none has come.
func (k *walk) before(e *entry) (string, error) {
	if e.st.Nlink < 2 {
		return "", nil
	}
	return k.links.get(identity(&e.st))
}

// comesFirst notes that e has come, if it may come again.
func (k *walk) comesFirst(e *entry) error {
	if e.st.Nlink < 2 {
		return nil
	}
	return k.links.put(identity(&e.st), e.path)
}

func identity(st *unix.Stat_t) inode { return inode{uint64(st.Dev), st.Ino} }

// newHeader returns a header with what entries of every kind have.
func (k *walk) newHeader(e *entry) (*tar.Header, error) {
	if len(e.path) > maxPath {
		return nil, unsupported(e.path, "its path has %d bytes, more than the %d that are taken: move it up in the container", len(e.path), maxPath)
	}
	if k.layer != nil && strings.HasPrefix(baseName(e.path), whiteoutPrefix) {
		return nil, unsupported(e.path, "names beginning with %s are whiteouts in a layer: rename it in the container", whiteoutPrefix)
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
			return nil, unsupported(e.path, "a tar cannot hold the extended attribute %q: remove it in the container (setfattr -x)", name)
		}
		if h.PAXRecords == nil {
			h.PAXRecords = make(map[string]string)
		}
		h.PAXRecords[paxXattr+name] = value
	}
	return h, nil
}

const paxXattr = "SCHILY.xattr."

func (k *walk) header(h *tar.Header) error {
	// A writer for each: content goes past it.
	return headerError(h.Name, tar.NewWriter(k.out).WriteHeader(h))
}

func headerError(path string, err error) error {
	if errors.Is(err, tar.ErrFieldTooLong) {
		return unsupported(path, "its extended attributes and its name are larger than the %d bytes that tar readers take: remove some of the attributes in the container", maxAttrs)
	}
	if err != nil {
		return fmt.Errorf("write header of %s: %w", quote(path), err)
	}
	return nil
}

// file writes a regular file. Its header goes first and cannot be taken back:
// the size in it is kept to, whatever happens to the file.
func (k *walk) file(e *entry, h *tar.Header) error {
	content := e
	if e.marks.metacopy { // only its attributes are in this layer
		lower, err := k.find([]place{k.merged()}, e.path, e.path)
		if err != nil {
			return err
		}
		if lower == nil || !lower.is(unix.S_IFREG) {
			return fmt.Errorf("read %s: its content is in a lower layer, but %w", quote(e.path), errGone)
		}
		defer lower.close()
		if err := k.openToRead(lower); err != nil {
			return err
		}
		content = lower
	}
	h.Size = content.st.Size
	if h.Size > maxFileSize {
		return unsupported(e.path, "it is %d bytes long, more than the %d that are taken of a file: truncate it in the container", h.Size, int64(maxFileSize))
	}
	data, err := k.extents(content)
	if err != nil {
		return err
	}
	stored := h.Size
	if len(data) == 1 && data[0].length == h.Size || h.Size == 0 {
		if err := k.header(h); err != nil {
			return err
		}
	} else if stored, err = k.sparseHeader(h, data); err != nil {
		return headerError(e.path, err)
	}
	return k.content(content, data, stored)
}

var errGone = errors.New("the overlay mount shows no such file")

// content writes parts of a file behind its header, which says that they are stored as so many bytes.
func (k *walk) content(e *entry, parts []extent, stored int64) error {
	if err := k.out.align(stored); err != nil {
		return fmt.Errorf("write content of %s: %w", quote(e.path), err)
	}
	for _, part := range parts {
		if err := k.out.copy(k.ctx, e, part); err != nil {
			return err
		}
	}
	if _, err := k.out.Write(make([]byte, padded(stored)-stored)); err != nil {
		return fmt.Errorf("write content of %s: %w", quote(e.path), err)
	}
	return nil
}

// openToRead opens a regular file or a directory, so that e.file can be read. It
// never waits, neither for a FIFO's writer nor for a lease.
func (k *walk) openToRead(e *entry) error {
	// By way of the descriptor that is held: by now a device node could have
	// taken the name, and some devices act on being opened.
	dir, path := k.proc, strconv.Itoa(e.fd)
	flags := unix.O_RDONLY | unix.O_NONBLOCK | unix.O_NOCTTY | unix.O_CLOEXEC
	if e.is(unix.S_IFDIR) {
		dir, path = e.fd, "."
		flags |= unix.O_DIRECTORY
	}
	fd, err := unix.Openat(dir, path, flags|unix.O_NOATIME, 0)
	if err == unix.EPERM { // O_NOATIME is for the owner and for CAP_FOWNER
		fd, err = unix.Openat(dir, path, flags, 0)
	}
	if err == unix.EAGAIN {
		return unsupported(e.path, "a process holds a lease on it (fcntl F_SETLEASE) and would have to be waited for: try again without it")
	}
	if err != nil {
		return fmt.Errorf("open %s: %w", quote(e.path), err)
	}
	e.file = fd
	return nil
}

// openProc opens the directory of this process's descriptors. In it a number is
// a path to just what an O_PATH descriptor refers to, which can itself be neither
// read nor asked for attributes.
func openProc() (int, error) {
	fd, err := unix.Open("/proc/self/fd", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return -1, fmt.Errorf("open own descriptors: %w", err)
	}
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil || st.Type != unix.PROC_SUPER_MAGIC {
		unix.Close(fd)
		return -1, errors.New("open own descriptors: what is at /proc/self/fd is not the kernel's: is /proc mounted over?")
	}
	return fd, nil
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

// maxAttrs bounds the PAX header of an entry, most of which is attributes: readers
// refuse a longer one, Go's among them.
const maxAttrs = 1 << 20

// xattrs returns the extended attributes of e.
func (e *entry) xattrs() (map[string]string, error) {
	list := func(buf []byte) (int, error) { return unix.Flistxattr(e.file, buf) }
	get := func(name string, buf []byte) (int, error) { return unix.Fgetxattr(e.file, name, buf) }
	if e.file < 0 { // not a kind that may be opened
		path := fmt.Sprintf("/proc/self/fd/%d", e.fd)
		list = func(buf []byte) (int, error) { return unix.Listxattr(path, buf) }
		get = func(name string, buf []byte) (int, error) { return unix.Getxattr(path, name, buf) }
	}
	names, err := grow(list)
	if err == unix.EOPNOTSUPP || (err == nil && len(names) == 0) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("list extended attributes of %s: %w", quote(e.path), err)
	}
	attrs := make(map[string]string)
	size := 0
	for name := range strings.SplitSeq(strings.TrimSuffix(string(names), "\x00"), "\x00") {
		value, err := grow(func(buf []byte) (int, error) { return get(name, buf) })
		if err == unix.ENODATA {
			continue // removed meanwhile
		}
		if err != nil {
			return nil, fmt.Errorf("read extended attribute %s of %s: %w", name, quote(e.path), err)
		}
		if size += len(name) + len(value); size > maxAttrs {
			return nil, headerError(e.path, tar.ErrFieldTooLong)
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
