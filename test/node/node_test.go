package node_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// nodes collects the nodes of a test, to see at its end what they left on the host, where other tests may run too.
type nodes struct {
	mu    sync.Mutex
	names []string
	links []string
}

func newNodes(t *testing.T) *nodes {
	t.Helper()
	node.RequireRoot(t, testing.Short())
	return &nodes{links: links(t)}
}

func (s *nodes) add(n *node.Node) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = append(s.names, n.Name())
}

// assertGone fails the test for each mount, cgroup, network link, process and directory that is left.
func (s *nodes) assertGone(t *testing.T) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range s.names {
		if strings.Contains(string(mounts), name) {
			t.Errorf("mounts of %s are left:\n%s", name, mounts)
		}
		cgroups, err := filepath.Glob("/sys/fs/cgroup/*/" + name)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat("/sys/fs/cgroup/" + name); len(cgroups) > 0 || err == nil {
			t.Errorf("cgroups of %s are left: %v", name, cgroups)
		}
		// Those whose parent was killed are reaped by the host's init.
		eventually(t, "no process of "+name+" is left", func() bool { return len(processes(t, name)) == 0 })
	}
	for _, link := range links(t) {
		if !slices.Contains(s.links, link) {
			t.Errorf("network link %s is left", link)
		}
	}
}

func links(t *testing.T) []string {
	t.Helper()
	interfaces, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, i := range interfaces {
		names = append(names, i.Name)
	}
	return names
}

// processes are those whose cgroups, mounts or arguments name the node.
func processes(t *testing.T, name string) []string {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	for _, dir := range dirs {
		for _, file := range []string{"cgroup", "mountinfo", "cmdline"} {
			content, err := os.ReadFile(filepath.Join(dir, file))
			if err == nil && strings.Contains(string(content), name) {
				found = append(found, filepath.Base(dir)+" by "+file)
				break
			}
		}
	}
	return found
}

// kernelParameters are those that a kubelet writes.
func kernelParameters(t *testing.T) string {
	t.Helper()
	var all strings.Builder
	for _, name := range []string{"kernel/panic", "kernel/panic_on_oops", "vm/overcommit_memory"} {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&all, "%s = %s", name, value)
	}
	return all.String()
}

func (s *nodes) start(t *testing.T, options node.Options) *node.Node {
	t.Helper()
	n, err := node.Start(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	s.add(n)
	t.Cleanup(func() {
		n.ShowLogs(t)
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

func startContainerd(t *testing.T, n *node.Node) *node.Client {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if _, err := n.StartContainerd(ctx); err != nil {
		t.Fatal(err)
	}
	client, err := n.DialCRI(node.ContainerdSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// eventually waits for a condition that is about to be true.
func eventually(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !condition(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
	}
}

func TestContainers(t *testing.T) {
	nodes := newNodes(t)
	t.Run("nodes", func(t *testing.T) {
		for _, options := range []node.Options{{}, {Hostname: "second"}, {CgroupV2: true}} {
			t.Run(fmt.Sprintf("%s v2=%t", options.Hostname, options.CgroupV2), func(t *testing.T) {
				t.Parallel()
				client := startContainerd(t, nodes.start(t, options))
				for _, handler := range []string{"runc", "crun"} {
					testContainer(t, client, handler)
				}
			})
		}
	})
	nodes.assertGone(t)
}

func TestKubelet(t *testing.T) {
	nodes := newNodes(t)
	before := kernelParameters(t)
	for _, version := range []string{"1.34", "1.37"} {
		t.Run(version, func(t *testing.T) { testKubelet(t, nodes, version) })
	}
	nodes.assertGone(t)
	// Another process may have a node with a kubelet now; its end restores them.
	eventually(t, "kernel parameters are restored", func() bool { return kernelParameters(t) == before })
}

func testContainer(t *testing.T, client *node.Client, handler string) {
	container, err := client.RunContainer(t.Context(), node.Spec{Handler: handler})
	if err != nil {
		t.Fatal(handler, err)
	}
	eventually(t, handler+" counts in its log and its file", func() bool {
		log, err := container.Log()
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(log, "stdout F count 3\n") {
			return false
		}
		file, err := container.Exec(t.Context(), "cat", "/var/count")
		if err != nil {
			t.Fatal(err)
		}
		n, err := strconv.Atoi(strings.TrimSpace(file))
		return err == nil && n >= 3
	})
	state, err := container.State(t.Context())
	if err != nil || state != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("%s: state %v, %v", handler, state, err)
	}
	if err := container.Remove(t.Context()); err != nil {
		t.Error(handler, err)
	}
}

func testKubelet(t *testing.T, nodes *nodes, version string) {
	n := nodes.start(t, node.Options{})
	startContainerd(t, n)
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	kubelet, err := n.StartKubelet(ctx, node.KubeletOptions{Version: version})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := kubelet.RunPod(ctx, node.Pod{Name: "count"}); err != nil {
		t.Fatal(err)
	}
	pod := kubelet.PodName("count")
	eventually(t, "pod counts", func() bool {
		log, err := kubelet.ContainerLog(ctx, pod, "count")
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(log, "count 3\n")
	})
	if out, err := kubelet.Exec(ctx, pod, "count", "cat /proc/1/comm"); err != nil || out != "workload\n" {
		t.Errorf("exec: %q, %v", out, err)
	}
	if stats, err := kubelet.Get(ctx, "/stats/summary"); err != nil || !strings.Contains(string(stats), pod) {
		t.Errorf("stats: %s, %v", stats, err)
	}
	// containerd 1.7 has no checkpoints.
	_, err = kubelet.Checkpoint(ctx, pod, "count", 0)
	if err == nil || !strings.Contains(err.Error(), "CheckpointContainer not implemented") {
		t.Errorf("checkpoint: %v", err)
	}
	if err := kubelet.RemovePod(ctx, "count"); err != nil {
		t.Error(err)
	}
	if err := kubelet.Stop(ctx); err != nil {
		t.Error(err)
	}
	if err := n.Stop(); err != nil {
		t.Error(err)
	}
	if err := n.Stop(); err != nil {
		t.Error(fmt.Errorf("second stop: %w", err))
	}
}
