package checkpoint_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
	"crishim/test/restore"
)

func TestMain(m *testing.M) {
	// The service starts its own binary again as the helper, and here that is the test's.
	if len(os.Args) == 2 && os.Args[1] == checkpoint.HelperCommand {
		// Not by os.Exit, at which the race detector sleeps for a second in case that a race shows up.
		syscall.Exit(checkpoint.HelperMain())
	}
	if len(os.Args) > 2 && os.Args[1] == underFilter {
		fmt.Fprintln(os.Stderr, underFilterMain(os.Args[2:]))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// serve starts the checkpoint service on a socket of its own, in front of the node's containerd.
func serve(t *testing.T) (*node.Client, runtimeapi.RuntimeServiceClient) {
	t.Helper()
	containerd := node.Containerd(t)
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Log: testLog(t)})
	t.Cleanup(func() { service.Drain(context.Background()) })
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, service)
	return containerd, runtimeapi.NewRuntimeServiceClient(node.Serve(t, server))
}

func testLog(t *testing.T) logrus.FieldLogger {
	log := logrus.New()
	log.SetLevel(logrus.DebugLevel)
	log.SetOutput(t.Output())
	log.SetFormatter(&logrus.TextFormatter{TimestampFormat: "05.000", FullTimestamp: true})
	return log
}

func location(t *testing.T) string {
	t.Helper()
	// On the node's disk, not on its overlay or in a tmpfs.
	dir := filepath.Join("/data", "checkpoints-"+strings.NewReplacer("/", "-", ",", "").Replace(t.Name()))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "checkpoint-test.tar")
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, entry := range entries {
		fmt.Fprintln(&b, entry)
	}
	return b.String()
}

func TestCheckpointIsRestoredByItsOwnRuntime(t *testing.T) {
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			containerd, crishim := serve(t)
			original := containerd.Run(t, node.Spec{Handler: runtime})
			before := node.WaitCount(t, 5, original.Log)
			// A change of each kind to its files.
			if _, err := original.Exec(t.Context(), "/bin/sh", "-c",
				"echo kept >/root/new; mkdir -m 0750 /root/dir; ln -s new /root/link; rm /bin/df; chmod 0700 /etc; echo in memory >/dev/shm/m"); err != nil {
				t.Fatal(err)
			}
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: original.ID, Location: path, Timeout: math.MaxInt64}
			if _, err := crishim.CheckpointContainer(t.Context(), request); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode() != 0o600 {
				t.Errorf("mode is %v, want 0600", info.Mode())
			}
			if got, want := listing(t, filepath.Dir(path)), "- checkpoint-test.tar\n"; got != want {
				t.Errorf("the directory holds\n%s", got)
			}
			after := node.WaitCount(t, before+5, original.Log)

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
			node.WaitCount(t, after, restored.Output)
			output, _ := restored.Output()
			first := node.Counts(output)[0]
			if first < before || first > after+1 {
				t.Errorf("restored container went on at %d; it was checkpointed between %d and %d", first, before, after)
			}
			// The workload prints a number and then writes it to its file: memory is never further than one step ahead.
			if file := fileCount(t, path); file != first-1 && file != first-2 {
				t.Errorf("memory goes on with %d, the archive's file says %d: they are not of one moment", first, file)
			}
			if content, err := restored.File("/root/link"); err != nil || content != "kept\n" {
				t.Errorf("the new file, through its link, is %q, %v", content, err)
			}
			for name, want := range map[string]os.FileMode{"/root/dir": os.ModeDir | 0o750, "/etc": os.ModeDir | 0o700, "/bin/df": 0} {
				if mode := restored.Mode(name); mode != want {
					t.Errorf("%s is %v, want %v", name, mode, want)
				}
			}
			if shm := memberOf(t, path, "devshm-checkpoint.tar", "m"); shm != "in memory\n" {
				t.Errorf("/dev/shm/m in the archive is %q", shm)
			}
			if log := string(member(t, path, "container.log")); node.LastCount(log) < before || node.LastCount(log) > first {
				t.Errorf("the archive's log ends at %d", node.LastCount(log))
			}
			node.WaitCount(t, after+5, original.Log)
		})
	}
}

// namespaces is a pod that shares namespaces as these options say.
func namespaces(o *runtimeapi.NamespaceOption) node.Spec {
	return node.Spec{
		Pod: func(p *runtimeapi.PodSandboxConfig) {
			p.Linux.SecurityContext.NamespaceOptions = o
			if o.Network == runtimeapi.NamespaceMode_NODE {
				p.Hostname = "" // it is the node's
			}
		},
		Container: func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.NamespaceOptions = o },
	}
}

func TestKindsOfPods(t *testing.T) {
	container := func(change func(*runtimeapi.ContainerConfig)) node.Spec { return node.Spec{Container: change} }
	own := runtimeapi.NamespaceMode_CONTAINER
	for name, spec := range map[string]node.Spec{
		"shared process namespace": namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_POD}),
		"hostNetwork":              namespaces(&runtimeapi.NamespaceOption{Pid: own, Network: runtimeapi.NamespaceMode_NODE}),
		"hostPID":                  namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_NODE}),
		"hostIPC":                  namespaces(&runtimeapi.NamespaceOption{Pid: own, Ipc: runtimeapi.NamespaceMode_NODE}),
		"tty":                      container(func(c *runtimeapi.ContainerConfig) { c.Tty = true }),
		"stdin":                    container(func(c *runtimeapi.ContainerConfig) { c.Stdin = true }),
		"seccomp, masked and read-only paths": container(func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
			c.Linux.SecurityContext.NoNewPrivs = true
			c.Linux.SecurityContext.MaskedPaths = []string{"/proc/keys", "/proc/acpi", "/proc/scsi"}
			c.Linux.SecurityContext.ReadonlyPaths = []string{"/proc/sys", "/proc/bus"}
		}),
		"privileged": {
			Pod:       func(p *runtimeapi.PodSandboxConfig) { p.Linux.SecurityContext.Privileged = true },
			Container: func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
		},
	} {
		t.Run(name, func(t *testing.T) {
			containerd, crishim := serve(t)
			c := containerd.Run(t, spec)
			node.WaitCount(t, 0, c.Log)
			path := location(t)
			checkAllows(t, containerd, c.ID, path)
			if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
				t.Fatal(err)
			}
			node.WaitMore(t, c.Log)
		})
	}
}

// fileCount is the number that the archive has in the workload's file.
func fileCount(t *testing.T, path string) int {
	t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(memberOf(t, path, "rootfs-diff.tar", "var/count")))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// memberOf reads a file from a tar that is a member of an archive.
func memberOf(t *testing.T, path, outer, name string) string {
	t.Helper()
	return string(find(t, tar.NewReader(bytes.NewReader(member(t, path, outer))), name))
}

// member reads a member of an archive.
func member(t *testing.T, path, name string) []byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return find(t, tar.NewReader(file), name)
}

func find(t *testing.T, archive *tar.Reader, name string) []byte {
	t.Helper()
	for {
		header, err := archive.Next()
		if err != nil {
			t.Fatalf("look for %s: %v", name, err)
		}
		if strings.TrimPrefix(header.Name, "./") != name {
			continue
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
}
