package checkpoint_test

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// bounded is a service with bounds, called directly.
func bounded(t *testing.T, containerd *node.Client, bounds checkpoint.Bounds) *checkpoint.Service {
	t.Helper()
	service := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Bounds: bounds, Log: testLog(t),
	})
	t.Cleanup(func() { service.Drain(context.Background()) })
	return service
}

func amount(t *testing.T, text string) checkpoint.Amount {
	t.Helper()
	a, err := checkpoint.ParseAmount(text)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// onSmallDisk mounts a file system of the size where an archive is to appear.
func onSmallDisk(t *testing.T, options string) (path string) {
	t.Helper()
	path = location(t)
	if err := unix.Mount("tmpfs", filepath.Dir(path), "tmpfs", 0, "mode=0700,"+options); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(filepath.Dir(path), 0); err != nil {
			t.Error(err)
		}
	})
	return path
}

// Before the container is touched: the disk has room for an archive and for what is reserved, or the checkpoint is refused.
func TestADiskThatIsTooSmall(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "128"}})
	node.WaitCount(t, 0, c.Log)
	for _, test := range []struct {
		name, options string
		bounds        checkpoint.Bounds
		want          string // empty where there is room
	}{
		{"no room", "size=64m", checkpoint.Bounds{}, "of 64 MiB 64 MiB are free"},
		{"just enough", "size=220m", checkpoint.Bounds{}, ""},
		{"a share is reserved", "size=220m", checkpoint.Bounds{Reserve: amount(t, "50%")}, "of which 110 MiB stay so (checkpoint.reserve of the configuration)"},
		{"a number is reserved", "size=220m", checkpoint.Bounds{Reserve: amount(t, "100Mi")}, "of which 100 MiB stay so"},
		{"no inodes", "size=1g,nr_inodes=40", checkpoint.Bounds{}, "it takes about"},
		{"inodes are reserved", "size=1g,nr_inodes=1000", checkpoint.Bounds{ReserveInodes: amount(t, "95%")}, "of which 950 stay so (checkpoint.reserve_inodes"},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := onSmallDisk(t, test.options)
			_, err := bounded(t, containerd, test.bounds).CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
			if test.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no room for the archive: it takes about ") || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want ResourceExhausted and %q", err, test.want)
			}
			unharmed(t, c, path)
		})
	}
}

// In mid-dump somebody else takes the room.
func TestADiskThatBecomesFull(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "512"}})
	node.WaitCount(t, 0, c.Log)
	path := onSmallDisk(t, "size=900m")
	service := bounded(t, containerd, checkpoint.Bounds{Reserve: amount(t, "100Mi")})
	held, ended := node.HoldCheckpoint(t, filepath.Dir(path), path, func() error {
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		return err
	})
	other := filepath.Join(filepath.Dir(path), "other")
	file, err := os.OpenFile(other, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(file.Fd()), &fs); err != nil {
		t.Fatal(err)
	}
	// What is reserved is touched, and more is free: criu itself would not notice.
	if err := unix.Fallocate(int(file.Fd()), 0, 0, int64(fs.Bavail)*fs.Bsize-90<<20); err != nil {
		t.Fatal(err)
	}
	held.RollBack(t)
	err = <-ended
	if status.Code(err) != codes.ResourceExhausted || !strings.Contains(err.Error(), "no room for the archive: it was stopped when it had written ") ||
		!strings.Contains(err.Error(), ", and others ") || !strings.Contains(err.Error(), " are free, of which 100 MiB stay so") {
		t.Errorf("error is %v, want ResourceExhausted and figures", err)
	}
	if err := os.Remove(other); err != nil {
		t.Error(err)
	}
	unharmed(t, c, path)
}

// A container may stand still for so long, and no longer. That holds however fast machine and disk are, since criu is held for as long.
func TestADumpThatTakesTooLong(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "512"}})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
	service := bounded(t, containerd, checkpoint.Bounds{MaxFrozen: 300 * time.Millisecond})
	ended := make(chan error, 1)
	go func() {
		_, err := service.CheckpointContainer(t.Context(), request)
		ended <- err
	}()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if held, err := node.HoldDump(ctx, filepath.Dir(path)); err == nil {
		held.RollBack(t)
	}
	err := <-ended
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "longer than max_frozen allows (300ms): of about 5") ||
		!strings.Contains(err.Error(), "raise checkpoint.max_frozen") {
		t.Errorf("error is %v, want DeadlineExceeded and figures", err)
	}
	unharmed(t, c, path)
	if _, err := bounded(t, containerd, checkpoint.Bounds{MaxFrozen: time.Minute}).CheckpointContainer(t.Context(), request); err != nil {
		t.Errorf("with a bound that is long enough: %v", err)
	}
}
