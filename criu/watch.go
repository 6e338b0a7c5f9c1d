package criu

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fh"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"crishim/criu/image"
)

// The kernel tells of an inotify or fanotify watch the inode, and not the path. On most file systems CRIU finds the path by a handle of
// the inode. An overlay has none. There CRIU scans directories that are often watched, the tasks standing still, and gives up after
// that. What a pre-dump has found before, it takes from a file: so the paths are looked for here, while the tasks run, and put into it.

// watchCache is CRIU's name of the file, in its working directory.
const watchCache = "irmap-cache"

// maxScanned bounds how many files are looked at for those that are watched: a container can have any number.
const maxScanned = 1 << 20

// writeWatchCache tells CRIU the paths of what is watched on the root file system. Those that it does not find, CRIU reports.
func (d Dump) writeWatchCache(ctx context.Context) error {
	entries, err := d.Container.watchedPaths(ctx)
	if err != nil {
		return fmt.Errorf("look for what is watched: %w", err)
	}
	if len(entries) == 0 {
		return nil
	}
	fd, err := unix.Openat(int(d.Work.Fd()), watchCache, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create %s: %w", watchCache, err)
	}
	file := os.NewFile(uintptr(fd), watchCache)
	content, err := image.Write("IRMAP_CACHE", entries)
	if err == nil {
		_, err = file.Write(content)
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return fmt.Errorf("write %s: %w", watchCache, err)
	}
	return nil
}

func (d Dump) removeWatchCache() error {
	if err := unix.Unlinkat(int(d.Work.Fd()), watchCache, 0); err != nil && err != unix.ENOENT {
		return fmt.Errorf("remove %s: %w", watchCache, err)
	}
	return nil
}

// watchedPaths returns the inodes on the container's root file system that its processes watch, with their paths in the container.
func (c Container) watchedPaths(ctx context.Context) ([]*fh.IrmapCacheEntry, error) {
	var st unix.Stat_t
	if err := unix.Stat(c.Rootfs, &st); err != nil {
		return nil, err
	}
	device := kernelDevice(st.Dev)
	watched, err := c.watched(device)
	if err != nil || len(watched) == 0 {
		return nil, err
	}
	// The container changes its files meanwhile, and may put a link in the place of a directory: nothing outside is looked at.
	root, err := os.OpenRoot(c.Rootfs)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	var entries []*fh.IrmapCacheEntry
	scanned := 0
	err = fs.WalkDir(root.FS(), ".", func(path string, entry fs.DirEntry, err error) error {
		scanned++
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if len(watched) == 0 || scanned > maxScanned {
			return fs.SkipAll
		}
		if err != nil {
			return nil // it is gone
		}
		info, err := entry.Info()
		if err != nil {
			return nil // likewise
		}
		if inode := info.Sys().(*syscall.Stat_t).Ino; watched[inode] {
			delete(watched, inode)
			// The root itself becomes /., which is what CRIU calls it.
			entries = append(entries, &fh.IrmapCacheEntry{Dev: &device, Inode: &inode, Path: proto.String("/" + path)})
		}
		return nil
	})
	return entries, err
}

// watched returns the inodes of a device that the container's processes watch.
func (c Container) watched(device uint32) (map[uint64]bool, error) {
	pids, err := c.Processes()
	if err != nil {
		return nil, err
	}
	watched := make(map[uint64]bool)
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d", pid)
		descriptors, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue // it has ended, as may any below
		}
		for _, d := range descriptors {
			link, err := os.Readlink(filepath.Join(dir, "fd", d.Name()))
			if err != nil || link != "anon_inode:inotify" && link != "anon_inode:[fanotify]" {
				continue
			}
			info, err := os.Open(filepath.Join(dir, "fdinfo", d.Name()))
			if err != nil {
				continue
			}
			for lines := bufio.NewScanner(info); lines.Scan(); {
				if of, inode, ok := parseWatch(lines.Text()); ok && of == device {
					watched[inode] = true
				}
			}
			info.Close()
		}
	}
	return watched, nil
}

// parseWatch reads a line of /proc/PID/fdinfo/FD of an inotify or fanotify descriptor (proc(5)), such as
// "inotify wd:1 ino:2a sdev:800013 mask:fce ignored_mask:0 …".
func parseWatch(line string) (device uint32, inode uint64, ok bool) {
	if !strings.HasPrefix(line, "inotify wd:") && !strings.HasPrefix(line, "fanotify ino:") {
		return 0, 0, false
	}
	fields := make(map[string]uint64)
	for field := range strings.FieldsSeq(line) {
		name, value, _ := strings.Cut(field, ":")
		var n uint64
		if _, err := fmt.Sscanf(value, "%x", &n); err == nil {
			fields[name] = n
		}
	}
	_, ok = fields["ino"]
	return uint32(fields["sdev"]), fields["ino"], ok
}

// kernelDevice is a device number as the kernel has it in fdinfo, and CRIU in its images: 12 bits and 20.
func kernelDevice(dev uint64) uint32 { return unix.Major(dev)<<20 | unix.Minor(dev) }
