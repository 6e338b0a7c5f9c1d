package container_test

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/container"
	"crishim/test/node"
)

// masked are paths to be masked: files, directories, and what no kernel has.
var masked = []string{"/proc/kcore", "/proc/acpi", "/proc/keys", "/proc/sys/kernel", "/proc/does-not-exist"}

// filesAmong returns those of the paths that are files with this kernel.
func filesAmong(paths []string) (files []string) {
	for _, path := range paths {
		if info, err := os.Stat(path); err == nil && !info.IsDir() {
			files = append(files, path)
		}
	}
	return files
}

// kubeletLike is a container as a kubelet asks for it.
func kubeletLike(t *testing.T, handler string) node.Spec {
	t.Helper()
	volume := filepath.Join("/data", t.Name())
	if err := os.MkdirAll(volume, 0o750); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(volume) })
	return node.Spec{
		Handler: handler,
		Mounts:  []*cri.Mount{{ContainerPath: "/volume", HostPath: volume}},
		Container: func(c *cri.ContainerConfig) {
			c.Annotations = map[string]string{"example.org/a": "b"}
			c.Linux.SecurityContext.MaskedPaths = masked
			c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys"}
		},
	}
}

func TestDescribe(t *testing.T) {
	for _, handler := range []string{"runc", "crun"} {
		t.Run(handler, func(t *testing.T) {
			client := node.Containerd(t)
			running := client.Run(t, kubeletLike(t, handler))
			pid, err := running.Pid(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			c, err := container.Describe(t.Context(), client.Runtime, running.ID[:12])
			if err != nil {
				t.Fatal(err)
			}
			if c.Status.GetId() != running.ID {
				t.Errorf("id is %s, want %s", c.Status.GetId(), running.ID)
			}
			if c.Process.Pid != pid || c.Process.Verify() != nil {
				t.Errorf("process is %+v, want %d", c.Process, pid)
			}
			if c.Runtime != handler {
				t.Errorf("runtime is %s, want %s", c.Runtime, handler)
			}
			if c.Log != running.LogPath {
				t.Errorf("log is %s, want %s", c.Log, running.LogPath)
			}
			if c.Status.GetAnnotations()["example.org/a"] != "b" {
				t.Errorf("annotations are %v", c.Status.GetAnnotations())
			}
			if want := filesAmong(masked); !slices.Equal(c.MaskedFiles, want) {
				t.Errorf("masked files are %q, want %q", c.MaskedFiles, want)
			}
			if !c.Shm {
				t.Error("/dev/shm is not the pod's")
			}
			for _, mount := range []string{"/volume", "/dev/shm"} {
				if !slices.Contains(c.ExternalMounts, mount) {
					t.Errorf("external mounts %q lack %s", c.ExternalMounts, mount)
				}
			}
			if len(c.Descriptors) != 3 || !strings.HasPrefix(c.Descriptors[1], "pipe:") {
				t.Errorf("descriptors are %q, want /dev/null and two pipes", c.Descriptors)
			}
			if len(c.SharedNamespaces) != 1 || c.SharedNamespaces[0].Type != "network" || c.SharedNamespaces[0].Inode == 0 {
				t.Errorf("shared namespaces are %v, want the pod's network", c.SharedNamespaces)
			}
			// What the container writes to its root must be found in the upper directory and, mounted, in the rootfs.
			if _, err := running.Exec(t.Context(), "touch", "/written"); err != nil {
				t.Fatal(err)
			}
			for _, dir := range []string{c.Layer.Upper, c.Rootfs} {
				if _, err := os.Stat(filepath.Join(dir, "written")); err != nil {
					t.Error(err)
				}
			}
			if len(c.Layer.Lower) == 0 {
				t.Error("no lower directories")
			}
			for _, dir := range c.Layer.Lower {
				if _, err := os.Stat(filepath.Join(dir, "bin/workload")); err != nil {
					t.Error(err)
				}
			}
			procs, err := os.ReadFile(filepath.Join(c.Freezer, "cgroup.procs"))
			if err != nil || len(strings.Fields(string(procs))) == 0 {
				t.Errorf("freezer %s holds processes %q, %v", c.Freezer, procs, err)
			}
		})
	}
}

func TestDescribeSharedNamespaces(t *testing.T) {
	client := node.Containerd(t)
	shared := client.Run(t, node.Spec{
		Pod: func(p *cri.PodSandboxConfig) {
			p.Hostname = "" // it is the node's
			p.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_POD, Ipc: cri.NamespaceMode_NODE, Network: cri.NamespaceMode_NODE}
		},
		Container: func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.NamespaceOptions = &cri.NamespaceOption{Pid: cri.NamespaceMode_POD, Ipc: cri.NamespaceMode_NODE, Network: cri.NamespaceMode_NODE}
		},
	})
	c, err := container.Describe(t.Context(), client.Runtime, shared.ID)
	if err != nil {
		t.Fatal(err)
	}
	var types []string
	for _, ns := range c.SharedNamespaces {
		types = append(types, ns.Type)
	}
	slices.Sort(types)
	if !slices.Equal(types, []string{"network", "pid"}) {
		t.Errorf("shared namespaces are %q", types)
	}
	if c.Shm {
		t.Error("the node's own /dev/shm is taken for the pod's")
	}
}

// The CRI knows no paused containers: to it they run.
func TestPaused(t *testing.T) {
	for _, handler := range []string{"runc", "crun"} {
		t.Run(handler, func(t *testing.T) {
			client := node.Containerd(t)
			running := client.Run(t, node.Spec{Handler: handler})
			c, err := container.Describe(t.Context(), client.Runtime, running.ID)
			if err != nil {
				t.Fatal(err)
			}
			if err := c.VerifyRunning(); err != nil {
				t.Errorf("a running container: %v", err)
			}
			task := func(verb string) {
				t.Helper()
				if out, err := exec.Command("ctr", "-n", "k8s.io", "task", verb, running.ID).CombinedOutput(); err != nil {
					t.Fatalf("%s: %v: %s", verb, err, out)
				}
			}
			task("pause")
			err = c.VerifyRunning()
			task("resume")
			if !errors.Is(err, container.ErrNotRunning) || !strings.Contains(err.Error(), "is paused: unpause it first") {
				t.Errorf("a paused container gives %v, want ErrNotRunning and what to do", err)
			}
			if err := c.VerifyRunning(); err != nil {
				t.Errorf("a container that goes on: %v", err)
			}
			if err := running.Remove(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := c.VerifyRunning(); !errors.Is(err, container.ErrNotRunning) {
				t.Errorf("a container that is gone gives %v, want ErrNotRunning", err)
			}
		})
	}
}

// A privileged container mounts over its own root.
func TestDescribeAMountOverTheRoot(t *testing.T) {
	client := node.Containerd(t)
	running := client.Run(t, node.Spec{
		Pod:       func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.Privileged = true },
		Container: func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
	})
	if _, err := running.Exec(t.Context(), "/bin/sh", "-c", "echo mine >/root/mine; mkdir /tmp/m; mount -t tmpfs t /tmp/m; mkdir /tmp/m/u /tmp/m/w; "+
		"mount -t overlay o -o lowerdir=/,upperdir=/tmp/m/u,workdir=/tmp/m/w /"); err != nil {
		t.Fatal(err)
	}
	c, err := container.Describe(t.Context(), client.Runtime, running.ID)
	if err != nil {
		t.Fatal(err)
	}
	if content, err := os.ReadFile(filepath.Join(c.Layer.Upper, "root/mine")); err != nil || string(content) != "mine\n" {
		t.Errorf("the layer %s is not the container's: %q, %v", c.Layer.Upper, content, err)
	}
}

func TestDescribeWhatIsNotThere(t *testing.T) {
	client := node.Containerd(t)
	if _, err := container.Describe(t.Context(), client.Runtime, "0123456789abcdef"); !errors.Is(err, container.ErrNotFound) {
		t.Errorf("an unknown id gives %v, want ErrNotFound", err)
	}
	exited := client.Run(t, node.Spec{Command: []string{"/bin/true"}})
	for state := cri.ContainerState_CONTAINER_RUNNING; state != cri.ContainerState_CONTAINER_EXITED; {
		var err error
		if state, err = exited.State(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := container.Describe(t.Context(), client.Runtime, exited.ID); !errors.Is(err, container.ErrNotRunning) {
		t.Errorf("an exited container gives %v, want ErrNotRunning", err)
	}
}
