package checkpoint_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/container"
	"crishim/test/node"
	"crishim/test/restore"
)

// A process counts in memory and in a file as fast as it can. Whenever it is checkpointed, the two are of one moment.
func TestMemoryAndFilesAgree(t *testing.T) {
	memoryAndFilesAgree(t, "/bin/workload", "pair")
}

// The same through a mapping of the file, which does not change its ctime: it would be taken for one at rest.
func TestMemoryAndMappedFilesAgree(t *testing.T) {
	memoryAndFilesAgree(t, "/bin/workload", "pair", "mapped")
}

func memoryAndFilesAgree(t *testing.T, command ...string) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: command})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	// In memory: fifty archives are as quick as fifty dumps.
	if err := unix.Mount("tmpfs", filepath.Dir(path), "tmpfs", 0, "mode=0700"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(filepath.Dir(path), 0); err != nil {
			t.Error(err)
		}
	}()
	var last uint64
	for i := range 50 {
		request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
		if _, err := crishim.CheckpointContainer(t.Context(), request); err != nil {
			t.Fatalf("checkpoint %d: %v", i, err)
		}
		before, file, after := pair(t, path)
		if file < after || file > before || before-after > 1 {
			t.Errorf("checkpoint %d: the process was between %d and %d, its file is at %d", i, after, before, file)
		}
		if file <= last {
			t.Errorf("checkpoint %d: the file is at %d, in the one before it was at %d", i, file, last)
		}
		last = file
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("it counted to %d", last)
}

// pair finds the numbers of "workload pair" in an archive.
func pair(t *testing.T, path string) (before, file, after uint64) {
	t.Helper()
	archive, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	magic := sha256.Sum256([]byte("pair"))
	pages := 0
	for members := tar.NewReader(archive); ; {
		header, err := members.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		switch {
		case strings.HasPrefix(header.Name, "checkpoint/pages-"):
			page := make([]byte, 4096)
			for {
				if _, err := io.ReadFull(members, page); err != nil {
					break
				}
				if bytes.HasPrefix(page, magic[:]) {
					pages++
					before, after = binary.LittleEndian.Uint64(page[32:]), binary.LittleEndian.Uint64(page[40:])
				}
			}
		case header.Name == "rootfs-diff.tar":
			file = binary.LittleEndian.Uint64(find(t, tar.NewReader(members), "var/pair"))
		}
	}
	if pages != 1 {
		t.Fatalf("%d pages in the archive have the numbers", pages)
	}
	return before, file, after
}

// What overlay keeps elsewhere, or in another form, is in the archive as the container sees it, and restored.
func TestWritableLayerIsRestored(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	if _, err := c.Exec(t.Context(), "/bin/sh", "-c", "rm -r /root; mkdir /root; echo new >/root/new; "+
		"dd if=/dev/zero of=/tmp/sparse bs=1 count=1 seek=10737418239 2>/dev/null; echo end >>/tmp/sparse"); err != nil {
		t.Fatal(err)
	}
	path := location(t)
	if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
		t.Fatal(err)
	}
	diff := member(t, path, "rootfs-diff.tar")
	if len(diff) > 1<<20 {
		t.Errorf("the diff has %d bytes", len(diff))
	}
	for entries := tar.NewReader(bytes.NewReader(diff)); ; {
		header, err := entries.Next()
		if err != nil {
			t.Fatalf("look for the sparse file: %v", err)
		}
		if header.Name == "tmp/sparse" {
			if header.Size != 10<<30+4 {
				t.Errorf("the sparse file has %d bytes in the archive", header.Size)
			}
			break
		}
	}
	var deleted []string
	if err := json.Unmarshal(member(t, path, "deleted.files"), &deleted); err != nil || !slices.Contains(deleted, "root/.wh..wh..opq") {
		t.Errorf("deleted.files is %q, %v", deleted, err)
	}
	archive, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	restored, err := restore.Archive(t.Context(), restore.Local(), archive, node.WorkloadImage)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := restored.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	node.WaitMore(t, restored.Output)
	if content, err := restored.File("/root/new"); err != nil || content != "new\n" {
		t.Errorf("the new file is %q, %v", content, err)
	}
}

// Whoever has a full copy of the image for its root file system cannot be told from it.
func TestAnotherSnapshotter(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Handler: "native"})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "of the snapshotter native") || !strings.Contains(err.Error(), "overlayfs") {
		t.Errorf("error is %v, want FailedPrecondition with the snapshotter's name", err)
	}
	t.Log(err)
	unharmed(t, c, path)
}

// A file that no archive can hold is the container's affair, and no failure of crishim.
func TestFilesThatCannotBeCaptured(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	described, err := container.Describe(t.Context(), containerd.Runtime, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct{ name, make, undo, want string }{
		{"name of a whiteout", "echo a >/tmp/.wh.a", "rm /tmp/.wh.a", `"tmp/.wh.a" cannot be captured`},
		{"endless file", "dd if=/dev/zero of=/dev/shm/f bs=1 count=0 seek=9223372036854775807", "rm /dev/shm/f", `"f" cannot be captured: it is 9223372036854775807 bytes long`},
	} {
		t.Run(test.name, func(t *testing.T) {
			if _, err := c.Exec(t.Context(), "/bin/sh", "-c", test.make); err != nil {
				t.Fatal(err)
			}
			path := location(t)
			refused(t, crishim, c, path, test.want)
			if _, err := c.Exec(t.Context(), "/bin/sh", "-c", test.undo); err != nil {
				t.Fatal(err)
			}
		})
	}
	t.Run("odd attribute", func(t *testing.T) {
		if err := unix.Setxattr(described.Rootfs+"/tmp", "user.a=b", nil, 0); err != nil {
			t.Fatal(err)
		}
		refused(t, crishim, c, location(t), `"tmp" cannot be captured: a tar cannot hold the extended attribute "user.a=b"`)
		if err := unix.Removexattr(described.Rootfs+"/tmp", "user.a=b"); err != nil {
			t.Fatal(err)
		}
	})
	path := location(t)
	if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
		t.Errorf("when all is undone: %v", err)
	}
}

func refused(t *testing.T, crishim runtimeapi.RuntimeServiceClient, c *node.Container, path, want string) {
	t.Helper()
	_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), want) {
		t.Errorf("error is %v, want FailedPrecondition with %q", err, want)
	}
	t.Log(err)
	unharmed(t, c, path)
}

// A lease that the container holds on a file of its layer is overlay's, and does not keep the layer from being read; it
// outlives the checkpoint.
func TestALease(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	described, err := container.Describe(t.Context(), containerd.Runtime, c.ID)
	if err != nil {
		t.Fatal(err)
	}
	// As a process of the container would: through the mount.
	file, err := os.OpenFile(described.Rootfs+"/tmp/leased", os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if _, err := unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_WRLCK); errors.Is(err, unix.EINVAL) {
		return // no leases on overlay at all, so nobody has one
	} else if err != nil {
		t.Fatal(err)
	}
	path := location(t)
	if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
		t.Fatal(err)
	}
	if lease, err := unix.FcntlInt(file.Fd(), unix.F_GETLEASE, 0); err != nil || lease != unix.F_WRLCK {
		t.Errorf("the lease is %d, %v", lease, err)
	}
}
