package node

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/images"
)

const (
	// ContainerdSocket is containerd's socket in the node.
	ContainerdSocket = "/run/containerd/containerd.sock"
	// PauseImage is what pod sandboxes run.
	PauseImage = "test.invalid/pause:1"
	// WorkloadImage has the command workload and a busybox shell at /bin/sh.
	WorkloadImage = "test.invalid/workload:1"

	registryAddress = "127.0.0.1:5000"
)

const containerdConfig = `version = 2
[debug]
  level = "info"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "` + PauseImage + `"
  restrict_oom_score_adj = %[1]t
  disable_cgroup = %[2]t
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
      SystemdCgroup = %[3]t
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun]
      runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.crun.options]
      BinaryName = "/usr/bin/crun"
      SystemdCgroup = %[3]t
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.native]
      runtime_type = "io.containerd.runc.v2"
      snapshotter = "native"
`

const cniConfig = `{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [
    {
      "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true,
      "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}]}
    },
    {"type": "portmap", "capabilities": {"portMappings": true}}
  ]
}
`

// registry serves the images within the node, so that pulls are real.
type registry struct {
	server *http.Server
	done   chan struct{}
}

func (r *registry) close() error {
	err := r.server.Close()
	<-r.done
	return err
}

// image is what images.Write makes an image of.
type image struct {
	Name   string
	Config images.Config
	Files  []images.File
}

// images returns the layout with the images of the tests.
func (c cache) images(ctx context.Context) (string, error) {
	root, err := c.root(ctx)
	if err != nil {
		return "", err
	}
	programs := map[string]string{}
	for _, name := range []string{"pause", "workload"} {
		sources, err := readSources(name)
		if err != nil {
			return "", err
		}
		if programs[name], err = c.program(ctx, name, sources); err != nil {
			return "", err
		}
	}
	all := []image{
		{
			Name:   "pause",
			Config: images.Config{Entrypoint: []string{"/pause"}},
			Files:  []images.File{{Name: "pause", Mode: 0o755, Source: programs["pause"]}},
		},
		workload(programs["workload"], root),
	}
	writer, err := images.Sources.ReadFile("images.go")
	if err != nil {
		return "", fmt.Errorf("read sources: %w", err)
	}
	return c.entry(ctx, "images", fmt.Sprintf("%+v\n%s", all, writer), func(temporary string) error {
		for _, image := range all {
			if err := images.Write(temporary, image.Name, image.Config, image.Files); err != nil {
				return err
			}
		}
		return nil
	})
}

func workload(program, root string) image {
	some := filepath.Join(root, "etc/debian_version")
	files := []images.File{
		{Name: "bin", Mode: fs.ModeDir | 0o755},
		{Name: "etc", Mode: fs.ModeDir | 0o755},
		{Name: "root", Mode: fs.ModeDir | 0o700},
		{Name: "tmp", Mode: fs.ModeDir | fs.ModeSticky | 0o777},
		{Name: "var", Mode: fs.ModeDir | 0o755},
		{Name: "bin/busybox", Mode: 0o755, Source: filepath.Join(root, "bin/busybox")},
		{Name: "bin/workload", Mode: 0o755, Source: program},
		// What containers change, replace and delete.
		{Name: "lower", Mode: fs.ModeDir | 0o755},
		{Name: "lower/changed", Mode: 0o644, Source: some},
		{Name: "lower/deleted", Mode: 0o644, Source: some},
		{Name: "lower/link", Mode: fs.ModeSymlink | 0o777, Source: "changed"},
		{Name: "lower/renamed", Mode: 0o644, Source: some},
		{Name: "lower/to-directory", Mode: 0o644, Source: some},
		{Name: "lower/owned", Mode: fs.ModeDir | 0o755},
		{Name: "lower/owned/file", Mode: 0o644, Source: some},
		{Name: "lower/removed", Mode: fs.ModeDir | 0o755},
		{Name: "lower/removed/file", Mode: 0o644, Source: some},
		{Name: "lower/replaced", Mode: fs.ModeDir | 0o755},
		{Name: "lower/replaced/file", Mode: 0o644, Source: some},
		{Name: "lower/to-file", Mode: fs.ModeDir | 0o755},
		{Name: "lower/to-file/file", Mode: 0o644, Source: some},
	}
	const applets = "cat chmod cp dd df echo env id kill ln ls mkdir mkfifo mount mv nc ps rm sh sleep stat sync touch true wget"
	for applet := range strings.FieldsSeq(applets) {
		files = append(files, images.File{Name: "bin/" + applet, Mode: fs.ModeSymlink | 0o777, Source: "busybox"})
	}
	return image{
		Name: "workload",
		Config: images.Config{
			Cmd: []string{"/bin/workload", "count"},
			// CRIU cannot dump a listening socket of MPTCP, which Go prefers.
			Env: []string{"PATH=/bin", "GODEBUG=multipathtcp=0"},
		},
		Files: files,
	}
}

func readSources(program string) (map[string][]byte, error) {
	sources := map[string][]byte{}
	entries, err := images.Sources.ReadDir(program)
	if err != nil {
		return nil, fmt.Errorf("read sources: %w", err)
	}
	for _, entry := range entries {
		if sources[entry.Name()], err = images.Sources.ReadFile(program + "/" + entry.Name()); err != nil {
			return nil, fmt.Errorf("read sources: %w", err)
		}
	}
	return sources, nil
}

// StartContainerd starts containerd and waits until its CRI answers; after its end, it starts it again over the same
// state. Runtime handlers are runc (the default) and crun. Images are pulled from a registry in the node.
func (n *Node) StartContainerd(ctx context.Context) (*Daemon, error) {
	if err := n.prepareContainerd(ctx); err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	daemon, err := n.StartDaemon("containerd", "containerd")
	if err != nil {
		return nil, err
	}
	client, err := n.DialCRI(ContainerdSocket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	err = n.wait(ctx, daemon, func(ctx context.Context) error {
		status, err := client.Runtime.Status(ctx, &cri.StatusRequest{})
		if err != nil {
			return err
		}
		for _, condition := range status.GetStatus().GetConditions() {
			if !condition.GetStatus() {
				return fmt.Errorf("%s is false: %s", condition.GetType(), condition.GetMessage())
			}
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("start containerd: %w", err)
	}
	return daemon, nil
}

func (n *Node) prepareContainerd(ctx context.Context) error {
	config := fmt.Sprintf(containerdConfig, !hasCapability(unix.CAP_SYS_RESOURCE), n.options.CgroupV2, n.systemd)
	for path, content := range map[string]string{
		"/etc/containerd/config.toml":                 config,
		"/etc/containerd/certs.d/_default/hosts.toml": "[host.\"http://" + registryAddress + "\"]\n  capabilities = [\"pull\", \"resolve\"]\n",
		"/etc/cni/net.d/10-pods.conflist":             cniConfig,
	} {
		if err := os.MkdirAll(n.Path(filepath.Dir(path)), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(n.Path(path), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return n.startRegistry(ctx)
}

// startRegistry starts the node's registry unless it runs already.
func (n *Node) startRegistry(ctx context.Context) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.registry != nil {
		return nil
	}
	layout, err := n.cache.images(ctx)
	if err != nil {
		return err
	}
	layouts := []string{layout}
	if n.options.Programs {
		programs, err := n.cache.programs(ctx)
		if err != nil {
			return err
		}
		layouts = append(layouts, programs)
	}
	if n.options.Suite {
		suite, err := n.cache.suiteImages(ctx)
		if err != nil {
			return err
		}
		layouts = append(layouts, suite)
	}
	listener, err := n.Listen(ctx, "tcp", registryAddress)
	if err != nil {
		return err
	}
	r := &registry{server: &http.Server{Handler: images.Registry{Layouts: layouts}}, done: make(chan struct{})}
	go func() {
		defer close(r.done)
		r.server.Serve(listener)
	}()
	n.registry = r
	return nil
}

// wait calls probe until it succeeds. It gives up when the daemon ends, if it is the node's, or when ctx is done.
func (n *Node) wait(ctx context.Context, daemon *Daemon, probe func(context.Context) error) error {
	var ended <-chan struct{}
	if daemon != nil {
		ended = daemon.done
	}
	for {
		begin := time.Now()
		err := probe(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ended:
			return fmt.Errorf("%s has ended: %w\n%s", daemon.name, err, n.Logs())
		case <-ctx.Done():
			return errors.Join(ctx.Err(), err)
		case <-time.After(Pause(begin)):
		}
	}
}

// hasCapability reports whether this process, and so a node's, has a capability.
func hasCapability(capability int) bool {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	if err := unix.Capget(&header, &sets[0]); err != nil {
		return false
	}
	return sets[capability/32].Effective&(1<<(capability%32)) != 0
}
