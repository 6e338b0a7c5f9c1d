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
	var largest, second int64
	for _, size := range staged {
		if size > largest {
			largest, second = size, largest
		} else {
			second = max(second, size)
		}
	}
	can := s.probe()
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
