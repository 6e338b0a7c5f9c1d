// Package disks makes file systems for tests.
package disks

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"
)

// Mount mounts a new file system of so many MiB, and returns where; the end of the test takes it away. mkfs is the program that makes it, with options
// but without the device; for nil it is a tmpfs. It needs root. Where the program is missing, the test is skipped.
func Mount(t testing.TB, mkfs []string, mib int64) string {
	t.Helper()
	dir, err := os.MkdirTemp("/var/tmp", "crishim-fs-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(dir) })
	mountPoint := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mountPoint, 0o755))
	args := []string{"-t", "tmpfs", "-o", fmt.Sprintf("size=%dm", mib), "tmpfs", mountPoint}
	if mkfs != nil {
		if _, err := exec.LookPath(mkfs[0]); err != nil {
			t.Skipf("needs %s", mkfs[0])
		}
		image, err := os.OpenFile(filepath.Join(dir, "image"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		must(t, err)
		must(t, image.Truncate(mib<<20))
		must(t, image.Close())
		run(t, mkfs[0], append(mkfs[1:], image.Name())...)
		makeLoopDevices(t)
		args = []string{"-o", "loop", image.Name(), mountPoint}
	}
	run(t, "mount", args...)
	t.Cleanup(func() { run(t, "umount", mountPoint) })
	must(t, os.Chmod(mountPoint, 0o755))
	return mountPoint
}

// Used is how many bytes of a file system are taken.
func Used(t testing.TB, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	must(t, unix.Statfs(dir, &st))
	return int64(st.Blocks-st.Bfree) * st.Bsize
}

// makeLoopDevices makes the nodes of loop devices where there are none, as in a test node.
func makeLoopDevices(t testing.TB) {
	t.Helper()
	nodes := map[string]uint64{"/dev/loop-control": unix.Mkdev(10, 237)} // Documentation/admin-guide/devices.txt
	for n := range uint32(64) {
		nodes[fmt.Sprintf("/dev/loop%d", n)] = unix.Mkdev(7, n)
	}
	if _, err := os.Stat("/dev/loop-control"); err == nil {
		return
	}
	for path, device := range nodes {
		kind := uint32(unix.S_IFBLK)
		if path == "/dev/loop-control" {
			kind = unix.S_IFCHR
		}
		must(t, unix.Mknod(path, kind|0o600, int(device)))
	}
}

func run(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("run %s %q: %v\n%s", name, args, err, out)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
