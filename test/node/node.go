// Package node makes a real Kubernetes node out of namespaces on one machine: its own root file system, processes,
// network and cgroups, in which containerd, runc, crun, CRIU and a kubelet run as they do in production. A node takes
// less than a second to start.
//
// It needs root on Linux, a Go toolchain, util-linux and, for the first start, the network. What is built once is kept
// in a cache outside of the source tree. Nothing else is left on the host: Stop removes mounts, cgroups and processes
// and restores the kernel parameters that a kubelet writes; what a killed owner left is removed by the next Start.
//
// The package never touches a container or a network of the host.
package node

import (
	"bufio"
	"bytes"
	"context"
	_ "embed" // for pid1's source
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Options describes a node. The zero value is a node like the host: its cgroup version, no bind mounts.
type Options struct {
	// Hostname is the name of the node, "node" if empty.
	Hostname string
	// Root is what is installed in it.
	Root Root
	// Programs says that its registry has ProgramsImage, which takes a minute to build the first time.
	Programs bool
	// Suite says that its registry has the images of Kubernetes' own node e2e suite, see node.Suite.
	Suite bool
	// Binds are mounted before anything runs in the node.
	Binds []Bind
	// CgroupV2 gives a node on a host with cgroup v1 nothing but the unified hierarchy. It has the freezer there, and no
	// resource controllers: containerd runs with disable_cgroup, and a kubelet cannot run.
	CgroupV2 bool
}

// Bind makes Source, a path of the host, visible at Target in the node. Target is created where it is missing.
type Bind struct {
	Source, Target string
	ReadOnly       bool
}

// Node is a running node. Its methods may be called concurrently, except for Stop.
type Node struct {
	cache   cache
	options Options
	// scratch is the node's directory in the cache; it is removed at the end.
	scratch  string
	lock     *os.File
	cgroups  cgroups
	hostname string

	// owner is open for as long as the node lives; the process waits for pid 1.
	owner   *os.File
	process *exec.Cmd
	pid     int
	// systemd says that it runs containerd and kubelet, and makes their cgroups.
	systemd bool

	mu       sync.Mutex
	daemons  []*Daemon
	registry *registry

	stop    sync.Once
	stopErr error
}

// data is what lies on a real file system of the node instead of an overlay: upper directories, and archives that are
// put together without copying.
var data = []string{"/var/lib/containerd", "/var/lib/docker", "/var/lib/kubelet", "/var/lib/crishim", "/var/log", "/data"}

//go:embed pid1/main.go
var pid1Source []byte

// Start starts a node, after building what the cache lacks: about two minutes the first time. ctx bounds the start
// only. The node lives until Stop, or until this process ends, however it does.
func Start(ctx context.Context, options Options) (*Node, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("start node: this needs root")
	}
	c, err := openCache()
	if err != nil {
		return nil, err
	}
	lower, err := c.lower(ctx, options.Root)
	if err != nil {
		return nil, err
	}
	pid1, err := c.program(ctx, "pid1", map[string][]byte{"main.go": pid1Source})
	if err != nil {
		return nil, err
	}
	n := &Node{cache: c, options: options, hostname: options.Hostname}
	if n.hostname == "" {
		n.hostname = "node"
	}
	if err := n.reserve(ctx); err != nil {
		return nil, fmt.Errorf("start node: %w", err)
	}
	if err := n.run(ctx, lower, pid1); err != nil {
		return nil, errors.Join(fmt.Errorf("start node: %w", err), n.Stop())
	}
	return n, nil
}

// run starts pid 1 in the node's cgroups and namespaces, and waits until it is ready.
func (n *Node) run(ctx context.Context, lower, pid1 string) error {
	var err error
	if n.cgroups, err = newCgroups(filepath.Base(n.scratch), n.options.CgroupV2); err != nil {
		return err
	}
	spec, err := json.Marshal(struct {
		Hostname, Lower, Scratch string
		Data                     []string
		Binds                    []Bind
		Cgroups                  []cgroupMount
	}{n.hostname, lower, n.scratch, data, n.options.Binds, n.cgroups.mounts()})
	if err != nil {
		return err
	}
	ready, readyWriter, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ready.Close()
	ownerReader, owner, err := os.Pipe()
	if err != nil {
		readyWriter.Close()
		return err
	}
	n.owner = owner

	var stderr bytes.Buffer
	// The cgroup namespace is that of the cgroup which the shell has joined.
	cmd := exec.Command("/bin/sh", "-c", n.cgroups.join("")+`exec "$@"`, "sh",
		"unshare", "-m", "-p", "-f", "-n", "-u", "-i", "-C", "--propagation", "private", "--kill-child",
		"--", pid1, string(spec))
	cmd.Dir = "/"
	cmd.Env = environment
	cmd.ExtraFiles = []*os.File{readyWriter, ownerReader}
	cmd.Stderr = &stderr
	cmd.WaitDelay = 5 * time.Second
	// An interrupt from the terminal is for the owner, who stops the node.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	readyWriter.Close()
	ownerReader.Close()
	if err != nil {
		return err
	}
	n.process = cmd
	end := context.AfterFunc(ctx, func() { cmd.Process.Kill() })
	line, err := bufio.NewReader(ready).ReadString('\n')
	if !end() || err != nil {
		// unshare may have been killed before it had tied its child's life to its own. Then pid 1 lives until its owner is gone, and
		// holds stderr open until it ends.
		n.owner.Close()
		cmd.Wait()
		n.process = nil
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("enter namespaces: %s", strings.TrimSpace(stderr.String()))
	}
	if n.pid, err = strconv.Atoi(strings.TrimSpace(line)); err != nil {
		return err
	}
	return n.cgroups.settle(cmd.Process.Pid, n.pid)
}

// Pid is the process id, on the host, of the node's first process.
func (n *Node) Pid() int { return n.pid }

// Name is unique among the nodes of the host: the name of the node's cgroups and of its directory.
func (n *Node) Name() string { return filepath.Base(n.scratch) }

// Hostname is what the node calls itself.
func (n *Node) Hostname() string { return n.hostname }

// Path returns the path on the host of a file in the node. It stays valid until Stop, also for dialling unix sockets.
// An absolute symbolic link on the way leads astray.
func (n *Node) Path(path string) string {
	return filepath.Join("/proc", strconv.Itoa(n.pid), "root", path)
}

// Logs returns what the node's daemons have written.
func (n *Node) Logs() string {
	var logs strings.Builder
	names, err := filepath.Glob(filepath.Join(n.scratch, "log", "*.log"))
	if err != nil {
		return err.Error()
	}
	for _, name := range names {
		content, err := os.ReadFile(name)
		if err != nil {
			content = []byte(err.Error())
		}
		fmt.Fprintf(&logs, "--- %s\n%s\n", filepath.Base(name), content)
	}
	return logs.String()
}

// Bind makes a directory or file of the host visible in the running node, where target must exist.
func (n *Node) Bind(source, target string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_RECURSIVE)
	if err != nil {
		return fmt.Errorf("bind %s: %w", source, err)
	}
	defer unix.Close(tree)
	return n.inNamespace("mnt", unix.CLONE_NEWNS, func() error {
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("bind %s to %s in the node: %w", source, target, err)
		}
		return nil
	})
}

// ErrStop is wrapped by the errors of a Stop, also of one by which a failed Start ends: something of the node may be left on the host.
// Sweep removes it.
var ErrStop = errors.New("stop node")

// Stop ends everything in the node and removes all of it from the host. It may be called more than once; later calls
// return what the first one returned.
func (n *Node) Stop() error {
	n.stop.Do(func() { n.stopErr = n.end() })
	return n.stopErr
}

func (n *Node) end() error {
	var errs []error
	if n.registry != nil {
		errs = append(errs, n.registry.close())
	}
	if n.owner != nil {
		n.owner.Close()
	}
	// With pid 1 the kernel ends all processes in the node. Those of the host that wait for them end next, and what is
	// left is killed only then: nothing of the node is left to the host's init.
	if n.process != nil {
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			n.process.Wait()
			for _, d := range n.daemons {
				<-d.done
			}
		}()
		if !n.cgroups.thawUntil(ended, 10*time.Second) {
			errs = append(errs, errors.New("end processes: they do not end by themselves"))
			n.process.Process.Kill()
		}
	}
	errs = append(errs, n.release())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w: %w", ErrStop, err)
	}
	return nil
}
