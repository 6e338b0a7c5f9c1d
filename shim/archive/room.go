package archive

import (
	"fmt"
	"os"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// Room is how much of a file system is free and how much there is in all, counted as df and the kubelet do: what is kept for root is not free.
type Room struct {
	Free, Total             int64 // bytes
	FreeInodes, TotalInodes int64 // TotalInodes is 0 where the file system makes inodes as it needs them
}

// Room tells about the file system on which the archive is to appear.
func (l *Location) Room() (Room, error) { return roomOf(l.dir) }

// Room tells about the file system that the archive is made on.
func (s *Staging) Room() (Room, error) { return roomOf(s.location.dir) }

func roomOf(dir *os.File) (Room, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return Room{}, fmt.Errorf("look at room: %w", &os.PathError{Op: "statfs", Path: dir.Name(), Err: err})
	}
	block := st.Frsize
	if block == 0 { // Linux before 2.6
		block = int64(st.Bsize)
	}
	return Room{
		Free: int64(st.Bavail) * block, Total: int64(st.Blocks) * block,
		FreeInodes: int64(st.Ffree), TotalInodes: int64(st.Files),
	}, nil
}

// Place is the path of the directory in which the archive is to appear.
func (s *Staging) Place() string { return filepath.Dir(s.location.path) }

// Shares tells whether the file at a path is on the file system on which the archive is to appear. What cannot be looked at is not.
func (l *Location) Shares(path string) bool {
	var here, there unix.Stat_t
	return unix.Fstat(int(l.dir.Fd()), &here) == nil && unix.Stat(path, &there) == nil && here.Dev == there.Dev
}

// In tells whether the archive is to appear in the directory that a path leads to, whatever names there are for it. What cannot be looked at it is
// not in.
func (l *Location) In(dir string) bool {
	var here, there unix.Stat_t
	return unix.Fstat(int(l.dir.Fd()), &here) == nil && unix.Stat(dir, &there) == nil && here.Dev == there.Dev && here.Ino == there.Ino
}

// Directory holds a directory open in which archives are to appear, as OpenLocation does, with no name in it: to look at it, and not to stage
// anything. The caller closes it.
func Directory(path string) (*Location, error) {
	if path != "/" && malformed(path) != "" {
		return nil, fmt.Errorf("%w %q: %s", ErrInvalidLocation, path, malformed(path))
	}
	dir, err := openDirectory(path)
	if err != nil {
		return nil, invalidLocation(path, err)
	}
	return &Location{path: path, dir: dir}, nil
}

// Method is how an archive would be put together on a file system, and what that takes.
type Method struct {
	can   abilities
	known bool
}

// Method tries what the file system can do on a file that never has a name. Where it has no such files (O_TMPFILE), as on
// NFS, it cannot be told before there is something to be archived.
func (l *Location) Method() (Method, error) {
	fd, err := unix.Openat(int(l.dir.Fd()), ".", unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600)
	if err == unix.EOPNOTSUPP || err == unix.EISDIR {
		return Method{}, nil
	}
	if err != nil {
		return Method{}, fmt.Errorf("write at location: %w", explain(l.dir, &os.PathError{Op: "open", Path: l.dir.Name(), Err: err}))
	}
	f := os.NewFile(uintptr(fd), l.dir.Name())
	defer f.Close()
	return Method{tryOut(f, blockSizeOf(l.dir)), true}, nil
}

// String is for people.
func (m Method) String() string {
	switch {
	case !m.known:
		return "how archives are put together there is found out with the first one"
	case m.can.insert && m.can.clone:
		return "archives are put together in place: the largest image becomes the archive, and shares blocks with the others"
	case m.can.insert:
		return "archives are put together in place: the largest image becomes the archive, and the others are copied"
	case m.can.clone:
		return "archives are put together in place: they share blocks with the images"
	}
	return "archives are copied together: it can neither insert a hole into a file nor share blocks, as ext4, XFS and btrfs can"
}

// Fast says whether the largest image need not be copied.
func (m Method) Fast() bool { return m.can.insert || m.can.clone }

// Extra is what Staging's is.
func (m Method) Extra(options Options, staged []int64, composed int64) int64 {
	return m.can.extra(options, staged, composed)
}

// FileSystem is the type of the file system, as in mount(8); a number where this does not know the name.
func (l *Location) FileSystem() string {
	var st unix.Statfs_t
	if unix.Fstatfs(int(l.dir.Fd()), &st) != nil {
		return "unknown"
	}
	names := map[int64]string{
		unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs",
		unix.OVERLAYFS_SUPER_MAGIC: "overlay", unix.NFS_SUPER_MAGIC: "nfs", unix.F2FS_SUPER_MAGIC: "f2fs", unix.FUSE_SUPER_MAGIC: "fuse",
	}
	if name := names[int64(st.Type)]; name != "" {
		return name
	}
	return fmt.Sprintf("%#x", st.Type)
}

// Used is how much room the staged files take, in bytes, scratch files included. It may be called while others stage.
func (s *Staging) Used() int64 {
	used := int64(0)
	for _, dir := range []*os.File{s.dir, s.images} {
		again, err := openAt(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY) // has an offset of its own
		if err != nil {
			continue // removed
		}
		names, _ := again.Readdirnames(-1)
		for _, name := range names {
			var st unix.Stat_t
			if unix.Fstatat(int(again.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW) == nil {
				used += st.Blocks * 512
			}
		}
		again.Close()
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.scratch {
		if info, err := f.Stat(); err == nil { // it is still open
			used += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
	}
	return used
}

// Extra is how much room Assemble takes at most beyond that of what was staged, in bytes: of staged files, by their sizes, and of what was
// composed, whose pieces stay until it is done. See plain for why.
func (s *Staging) Extra(options Options, staged []int64, composed int64) int64 {
	return s.probe().extra(options, staged, composed)
}

func (can abilities) extra(options Options, staged []int64, composed int64) int64 {
	var largest, second int64
	for _, size := range staged {
		if size > largest {
			largest, second = size, largest
		} else {
			second = max(second, size)
		}
	}
	switch {
	case options.Compression == Zstd: // what cannot be compressed is there twice, a file at a time
		return composed + largest
	case can.clone:
		return composed
	case can.insert:
		return composed + second
	case can.punch:
		return composed + 2*copyChunk // one that is being copied, and one that is not freed yet
	}
	return composed + largest
}
