package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// disk is a file system that nothing but the benchmarks writes to, so that the bytes which reach it are exactly theirs.
//
// It is on a loop device, whose image has no name any more once it is mounted, in a mount namespace that is this process's own: however
// this process ends, the kernel takes all of it back.
type disk struct {
	kind string
	dir  string
	loop string // name of the device, empty for tmpfs and for a directory of somebody else's
	// cached says that the device could not do without the page cache of the file system below.
	cached bool
}

// makeDisk makes a file system of a kind ("ext4", "xfs", "btrfs" or "tmpfs") and size, in bytes, whose image is in scratch.
func makeDisk(ctx context.Context, kind, scratch string, size int64) (_ *disk, err error) {
	dir, err := os.MkdirTemp(scratch, "crishim-bench-")
	if err != nil {
		return nil, fmt.Errorf("make disk: %w", err)
	}
	d := &disk{kind: kind, dir: filepath.Join(dir, "mounted")}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("make disk: %w", err), os.RemoveAll(dir))
		}
	}()
	if err := os.Mkdir(d.dir, 0o755); err != nil {
		return nil, err
	}
	if kind == "tmpfs" {
		return d, unix.Mount("bench", d.dir, "tmpfs", 0, fmt.Sprintf("mode=755,size=%d", size))
	}
	image := filepath.Join(dir, "image")
	device, err := d.attach(ctx, image, size)
	if err != nil {
		return nil, err
	}
	// From the mount on, the device lives as long as that.
	defer func() { err = errors.Join(err, command(ctx, "losetup", "--detach", device)) }()
	if err := os.Remove(image); err != nil {
		return nil, err
	}
	mkfs := map[string][]string{
		// No thread that goes on making the file system while something is measured.
		"ext4":  {"-q", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0"},
		"xfs":   {"-q", "-K"},
		"btrfs": {"-q", "-K"},
	}
	options, known := mkfs[kind]
	if !known {
		return nil, fmt.Errorf("no file system called %q: choose ext4, xfs, btrfs or tmpfs", kind)
	}
	if _, err := exec.LookPath("mkfs." + kind); err != nil {
		return nil, fmt.Errorf("%w: install its package (e2fsprogs, xfsprogs, btrfs-progs)", err)
	}
	if err := command(ctx, "mkfs."+kind, append(options, device)...); err != nil {
		return nil, err
	}
	if err := unix.Mount(device, d.dir, kind, unix.MS_NOATIME, ""); err != nil {
		return nil, fmt.Errorf("mount %s: %w", device, err)
	}
	return d, nil
}

func (d *disk) attach(ctx context.Context, image string, size int64) (device string, err error) {
	file, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return "", err
	}
	// Room that is missing should be so now, and blocks should not be looked for while something is measured.
	err = unix.Fallocate(int(file.Fd()), 0, 0, size)
	if err := errors.Join(err, file.Close()); err != nil {
		return "", fmt.Errorf("allocate %d MiB for the file system: %w; --scratch names another place", size>>20, err)
	}
	if err := writeOnce(ctx, image, size); err != nil {
		return "", fmt.Errorf("write to each block of the file system: %w", err)
	}
	device, err = output(ctx, "losetup", "--find", "--show", "--direct-io=on", image)
	if err != nil {
		d.cached = true
		if device, err = output(ctx, "losetup", "--find", "--show", image); err != nil {
			return "", err
		}
	}
	d.loop = filepath.Base(device)
	return device, nil
}

// writeOnce fills a file with zeros. To write to a block for the first time takes longer, since the file system below notes that it was, and who of
// those that are compared comes to write where nobody has depends on where the file system puts what they write.
func writeOnce(ctx context.Context, path string, size int64) (err error) {
	file, err := os.OpenFile(path, os.O_WRONLY|unix.O_DIRECT, 0)
	if errors.Is(err, unix.EINVAL) {
		file, err = os.OpenFile(path, os.O_WRONLY, 0)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	zeros, err := unix.Mmap(-1, 0, 8<<20, unix.PROT_READ, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS) // O_DIRECT needs whole pages
	if err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	defer func() { err = errors.Join(err, unix.Munmap(zeros)) }()
	for at := int64(0); at < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := file.Write(zeros[:min(size-at, int64(len(zeros)))])
		if err != nil {
			return err
		}
		at += int64(n)
	}
	return file.Sync()
}

// useDir takes a directory of an existing file system. What reaches the device is not counted then: it is not ours alone.
func useDir(parent string) (*disk, error) {
	dir, err := os.MkdirTemp(parent, "crishim-bench-")
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil, err
	}
	names := map[int64]string{unix.EXT4_SUPER_MAGIC: "ext4", unix.XFS_SUPER_MAGIC: "xfs", unix.BTRFS_SUPER_MAGIC: "btrfs", unix.TMPFS_MAGIC: "tmpfs"}
	kind := names[st.Type]
	if kind == "" {
		kind = fmt.Sprintf("%#x", st.Type)
	}
	return &disk{kind: kind, dir: dir}, nil
}

// close removes the file system with all that is on it.
func (d *disk) close() error {
	if d.loop == "" && d.kind != "tmpfs" || !mounted(d.dir) {
		return os.RemoveAll(d.dir)
	}
	if err := unix.Unmount(d.dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", d.dir, err)
	}
	return os.RemoveAll(filepath.Dir(d.dir))
}

func mounted(dir string) bool {
	var inner, outer unix.Stat_t
	return unix.Stat(dir, &inner) == nil && unix.Stat(filepath.Dir(dir), &outer) == nil && inner.Dev != outer.Dev
}

// String is what a reader has to know of it.
func (d *disk) String() string {
	switch {
	case d.kind == "tmpfs":
		return "tmpfs"
	case d.loop == "":
		return d.kind + ", shared with the machine"
	case d.cached:
		return d.kind + " on a loop device, which writes through the page cache of the file system below"
	}
	return d.kind + " on a loop device with direct I/O"
}

// sync writes out all that the file system has not yet written.
func (d *disk) sync() error {
	dir, err := os.Open(d.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("sync %s: %w", d.dir, err)
	}
	return nil
}

// settle writes out what the file system has, and waits until no space is freed any more: containerd removes in its own time what it
// does not need, and ext4 frees blocks with the commit after that.
func (d *disk) settle(ctx context.Context) error {
	const quiet, patience = 300 * time.Millisecond, 30 * time.Second
	last := int64(-1)
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); {
		if err := d.sync(); err != nil {
			return err
		}
		used, err := d.used()
		if err != nil {
			return err
		}
		if used == last {
			return nil
		}
		last = used
		if err := sleep(ctx, quiet); err != nil {
			return err
		}
	}
	return nil // somebody else's file system does not come to rest
}

// used is how many bytes are taken, delayed allocations included.
func (d *disk) used() (int64, error) {
	if d.kind == "btrfs" && d.loop != "" {
		return d.btrfsUsed()
	}
	var st unix.Statfs_t
	if err := unix.Statfs(d.dir, &st); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", d.dir, err)
	}
	return int64(st.Blocks-st.Bfree) * st.Bsize, nil
}

// btrfsUsed is what btrfs has handed out of its data, and not taken back for good. Its statfs tells of that only with the next commit,
// before which a checkpoint may have come and gone.
func (d *disk) btrfsUsed() (int64, error) {
	found, err := filepath.Glob("/sys/fs/btrfs/*/devices/" + d.loop)
	if err != nil || len(found) != 1 {
		return 0, errors.Join(fmt.Errorf("look up %s in /sys/fs/btrfs: %d found", d.loop, len(found)), err)
	}
	data := filepath.Join(filepath.Dir(filepath.Dir(found[0])), "allocation/data")
	var sum int64
	for _, name := range []string{"bytes_used", "bytes_reserved", "bytes_may_use", "bytes_pinned"} {
		content, err := os.ReadFile(filepath.Join(data, name))
		if err != nil {
			return 0, err
		}
		bytes, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read %s of %s: %w", name, d.loop, err)
		}
		sum += bytes
	}
	return sum, nil
}

// written is how many bytes the device has been given to write so far, 0 if that is not known.
func (d *disk) written() (int64, error) {
	if d.loop == "" {
		return 0, nil
	}
	content, err := os.ReadFile("/sys/block/" + d.loop + "/stat")
	if err != nil {
		return 0, err
	}
	// https://docs.kernel.org/block/stat.html: the seventh is write sectors, of 512 bytes.
	fields := strings.Fields(string(content))
	if len(fields) < 7 {
		return 0, fmt.Errorf("read statistics of %s: %q", d.loop, content)
	}
	sectors, err := strconv.ParseInt(fields[6], 10, 64)
	return sectors * 512, err
}

// syncTree makes all files and directories below a path durable, and returns the size of the files.
func syncTree(path string) (size int64, err error) {
	err = filepath.WalkDir(path, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		file, err := os.Open(path)
		if err != nil {
			return err
		}
		defer file.Close()
		info, err := file.Stat()
		if err == nil && info.Mode().IsRegular() {
			size += info.Size()
		}
		return errors.Join(err, file.Sync())
	})
	return size, err
}

func command(ctx context.Context, name string, args ...string) error {
	_, err := output(ctx, name, args...)
	return err
}

func output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("run %s: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}
