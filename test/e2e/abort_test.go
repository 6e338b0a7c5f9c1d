package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// dumping waits until criu has written some memory to a staging directory.
func dumping(t *testing.T, n *node.Node, dir string) {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		pages, err := filepath.Glob(n.Path(dir + "/.crishim-*/checkpoint/pages-*.img"))
		if err != nil {
			t.Fatal(err)
		}
		for _, file := range pages {
			if info, err := os.Stat(file); err == nil && info.Size() > 1<<20 {
				return
			}
		}
	}
	t.Fatal("no memory was dumped for 20 s")
}

// unharmed fails the test unless, within 5 s, all of a node's workloads run untraced and thawed, no criu and no helper is left, and
// the directory is empty.
func unharmed(t *testing.T, n *node.Node, dir string, output func() (string, error)) {
	t.Helper()
	complaint := ""
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if complaint = harm(t, n, dir); complaint == "" {
			node.WaitMore(t, output)
			return
		}
	}
	t.Error(complaint)
}

func harm(t *testing.T, n *node.Node, dir string) string {
	t.Helper()
	if left := listing(t, n, dir); left != "" {
		return "left behind:\n" + left
	}
	processes, err := filepath.Glob(n.Path("/proc/[0-9]*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range processes {
		status, err := os.ReadFile(dir + "/status")
		if err != nil {
			continue // it has ended
		}
		command, _ := os.ReadFile(dir + "/cmdline")
		name := strings.Split(string(command), "\x00")
		switch {
		case strings.HasSuffix(name[0], "criu"), len(name) > 1 && name[1] == "checkpoint-helper":
			return "still runs: " + strings.Join(name, " ")
		case !strings.HasSuffix(name[0], "workload"):
			continue
		case !strings.Contains(string(status), "\nTracerPid:\t0\n"):
			return "a workload is still traced"
		case strings.Contains(string(status), "\nState:\tT") || strings.Contains(string(status), "\nState:\tt"):
			return "a workload is still stopped"
		}
		cgroup, err := os.ReadFile(dir + "/cgroup")
		if err != nil {
			continue
		}
		for line := range strings.Lines(string(cgroup)) {
			fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
			if fields[1] != "freezer" {
				continue
			}
			if state, _ := os.ReadFile("/sys/fs/cgroup/freezer" + fields[2] + "/freezer.state"); strings.TrimSpace(string(state)) != "THAWED" {
				return "a workload's cgroup is " + string(state)
			}
		}
	}
	return ""
}

func TestAnEndInMidDumpLeavesNothing(t *testing.T) {
	n, binary := start(t, node.Options{})
	k, err := n.StartKubelet(t.Context(), node.KubeletOptions{RuntimeEndpoint: node.CrishimSocket})
	if err != nil {
		t.Fatal(err)
	}
	runPod(t, k, node.Pod{Name: "large", Command: []string{"/bin/workload", "memory", "1024"}})
	pod, output := k.PodName("large"), logFile(n, k.PodName("large"), "large")
	node.WaitCount(t, 0, output)
	client := dial(t, n)
	containers, err := client.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{})
	if err != nil || len(containers.GetContainers()) != 1 {
		t.Fatalf("list containers: %v, %v", containers, err)
	}
	id := containers.GetContainers()[0].GetId()

	t.Run("the kubelet's client hangs up", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		ended := make(chan error, 1)
		go func() {
			_, err := k.Checkpoint(ctx, pod, "large", 0)
			ended <- err
		}()
		dumping(t, n, checkpoints)
		cancel()
		if err := <-ended; err == nil {
			t.Error("the checkpoint succeeded, although its client had hung up")
		}
		unharmed(t, n, checkpoints, output)
	})
	t.Run("a deadline of 1 s", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		request := &cri.CheckpointContainerRequest{ContainerId: id, Location: checkpoints + "/checkpoint-deadline.tar"}
		if _, err := client.Runtime.CheckpointContainer(ctx, request); status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("error is %v, want DeadlineExceeded", err)
		}
		unharmed(t, n, checkpoints, output)
	})
	t.Run("crishim is killed", func(t *testing.T) {
		ended := make(chan error, 1)
		go func() {
			_, err := k.Checkpoint(t.Context(), pod, "large", 0)
			ended <- err
		}()
		dumping(t, n, checkpoints)
		n.Daemon("crishim").Kill()
		unharmed(t, n, checkpoints, output)
		if err := <-ended; err == nil {
			t.Error("the checkpoint succeeded, although crishim was dead")
		}
		if _, err := n.StartCrishim(t.Context(), binary); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("and the next one succeeds", func(t *testing.T) {
		// The kubelet may still be on its way back to the socket.
		var err error
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
			if _, err = k.Checkpoint(t.Context(), pod, "large", 0); err == nil {
				break
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	})
}

// dial returns a client of the node's crishim.
func dial(t *testing.T, n *node.Node) *node.Client {
	t.Helper()
	client, err := n.DialCRI(node.CrishimSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// checkpoint asks for a checkpoint in the background.
func checkpoint(t *testing.T, client *node.Client, id string) (ended <-chan error) {
	result := make(chan error, 1)
	go func() {
		_, err := client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: id, Location: "/data/checkpoint.tar"})
		result <- err
	}()
	return result
}

// calls makes a Version call every 100 ms until stop is called, which returns the longest time without an answer.
func calls(t *testing.T, n *node.Node) (stop func() time.Duration) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	longest := make(chan time.Duration, 1)
	var answered atomic.Bool
	go func() {
		var longestGap time.Duration
		last := time.Now()
		defer func() { longest <- longestGap }()
		client, err := n.DialCRI(node.CrishimSocket)
		if err != nil {
			t.Error(err)
			return
		}
		defer client.Close()
		for ctx.Err() == nil {
			call, cancel := context.WithTimeout(ctx, time.Second)
			if _, err := client.Runtime.Version(call, &cri.VersionRequest{}); err == nil {
				last = time.Now()
				answered.Store(true)
			}
			cancel()
			longestGap = max(longestGap, time.Since(last))
			time.Sleep(100 * time.Millisecond)
		}
	}()
	for !answered.Load() && t.Context().Err() == nil {
		time.Sleep(10 * time.Millisecond)
	}
	return func() time.Duration { cancel(); return <-longest }
}

// A kubelet that is cut off from its runtime for 30 s makes its node NotReady. While crishim finishes a checkpoint at shutdown,
// or rolls it back, it therefore goes on relaying.
func TestRestartDuringADumpLeavesNoGap(t *testing.T) {
	n, binary := start(t, node.Options{})
	client := dial(t, n)
	c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "4096"}})
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)
	ended := checkpoint(t, client, c.ID)
	stop := calls(t, n)
	dumping(t, n, "/data")
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if err := n.Daemon("crishim").Stop(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := n.StartCrishim(t.Context(), binary); err != nil {
		t.Fatal(err)
	}
	if gap := stop(); gap > 10*time.Second {
		t.Errorf("no answer for %s", gap)
	}
	if err := <-ended; err == nil {
		if err := os.Remove(n.Path("/data/checkpoint.tar")); err != nil {
			t.Error(err)
		}
	}
	unharmed(t, n, "/data", c.Log)
}

func TestContainerdIsKilled(t *testing.T) {
	n, _ := start(t, node.Options{})
	client := dial(t, n)
	c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "512"}})
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)

	t.Run("during a checkpoint, which goes on", func(t *testing.T) {
		ended := checkpoint(t, client, c.ID)
		dumping(t, n, "/data")
		n.Daemon("containerd").Kill()
		if err := <-ended; err != nil {
			t.Errorf("the checkpoint failed: %v", err)
		}
		if got := listing(t, n, "/data"); got != "checkpoint.tar\n" {
			t.Errorf("the directory holds\n%s", got)
		}
		if _, err := n.StartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("ten times, and crishim is back within 3.5 s of it", func(t *testing.T) {
		crishim := n.Daemon("crishim").Pid()
		descriptors := func() int {
			entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(crishim), "fd"))
			if err != nil {
				t.Fatal(err)
			}
			return len(entries)
		}
		version := func() error {
			ctx, cancel := context.WithTimeout(t.Context(), 3500*time.Millisecond)
			defer cancel()
			for {
				_, err := client.Runtime.Version(ctx, &cri.VersionRequest{})
				if err == nil || ctx.Err() != nil {
					return err
				}
				time.Sleep(10 * time.Millisecond)
			}
		}
		if err := version(); err != nil {
			t.Fatal(err)
		}
		before := descriptors()
		for i := range 10 {
			n.Daemon("containerd").Kill()
			if _, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{}); status.Code(err) != codes.Unavailable {
				t.Errorf("without containerd Version gives %v, want Unavailable", err)
			}
			if _, err := n.StartContainerd(t.Context()); err != nil {
				t.Fatal(err)
			}
			if err := version(); err != nil {
				t.Errorf("restart %d: %v", i, err)
			}
		}
		for deadline := time.Now().Add(5 * time.Second); descriptors() > before; time.Sleep(50 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("crishim had %d descriptors, now it has %d", before, descriptors())
			}
		}
		node.WaitCount(t, 0, c.Log)
	})
}
