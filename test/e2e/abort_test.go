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

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// hold makes a checkpoint of a node and holds its dump, see node.HoldCheckpoint.
func hold(t *testing.T, n *node.Node, dir string, checkpoint func() error) (held *node.HeldDump, ended <-chan error) {
	t.Helper()
	return node.HoldCheckpoint(t, n.Path(dir), n.Path(archived), checkpoint)
}

func TestAnEndInMidDumpLeavesNothing(t *testing.T) {
	n, binary := start(t, node.Options{})
	k, err := n.StartKubelet(t.Context(), node.KubeletOptions{RuntimeEndpoint: node.CrishimSocket})
	if err != nil {
		t.Fatal(err)
	}
	runPod(t, k, node.Pod{Name: "large", Command: []string{"/bin/workload", "memory", "1024"}})
	pod, output := k.PodName("large"), n.PodLogFile(k.PodName("large"), "large")
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
		held, ended := hold(t, n, checkpoints, func() error {
			_, err := k.Checkpoint(ctx, pod, "large", 0)
			return err
		})
		cancel()
		held.RollBack(t)
		if err := <-ended; err == nil {
			t.Error("the checkpoint succeeded, although its client had hung up")
		}
		n.Unharmed(t, checkpoints, output)
	})
	t.Run("a deadline of 1 s", func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		ended := make(chan error, 1)
		go func() {
			request := &cri.CheckpointContainerRequest{ContainerId: id, Location: checkpoints + "/checkpoint-deadline.tar"}
			_, err := client.Runtime.CheckpointContainer(ctx, request)
			ended <- err
		}()
		// Nor can it be done within the second where disk and machine are fast. Where they are slow, it may not have begun.
		held, err := node.HoldDump(ctx, n.Path(checkpoints))
		if err != nil && ctx.Err() == nil {
			t.Error(err)
		}
		if err := <-ended; status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("error is %v, want DeadlineExceeded", err)
		}
		if held != nil {
			held.Release()
		}
		n.Unharmed(t, checkpoints, output)
	})
	t.Run("crishim is killed", func(t *testing.T) {
		held, ended := hold(t, n, checkpoints, func() error {
			_, err := k.Checkpoint(t.Context(), pod, "large", 0)
			return err
		})
		n.Daemon("crishim").Kill()
		held.RollBack(t)
		n.Unharmed(t, checkpoints, output)
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
	return n.Client(t, node.CrishimSocket)
}

// archived is where take puts its archive.
const archived = "/data/checkpoint.tar"

// take makes a checkpoint at archived, where nothing is yet.
func take(t *testing.T, client *node.Client, id string) error {
	_, err := client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: id, Location: archived})
	return err
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
	for _, test := range []struct {
		name    string
		options node.Options
		release func(n *node.Node, held *node.HeldDump) bool
		want    codes.Code
		left    string
	}{
		{
			"which is finished", node.Options{},
			func(n *node.Node, _ *node.HeldDump) bool { return strings.Contains(n.Logs(), "shutting down") },
			codes.OK, "checkpoint.tar\n",
		},
		{
			"which is rolled back, on cgroup v2", node.Options{CgroupV2: true},
			func(_ *node.Node, held *node.HeldDump) bool { return held.Aborted() },
			codes.Unavailable, "",
		},
	} {
		t.Run(test.name, func(t *testing.T) {
			n, binary := start(t, test.options)
			client := dial(t, n)
			c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
			if err != nil {
				t.Fatal(err)
			}
			node.WaitCount(t, 0, c.Log)
			stop := calls(t, n)
			held, ended := hold(t, n, "/data", func() error { return take(t, client, c.ID) })
			crishim := n.Daemon("crishim")
			if err := crishim.Signal(unix.SIGTERM); err != nil {
				t.Fatal(err)
			}
			for deadline := time.Now().Add(time.Minute); !test.release(n, held); time.Sleep(20 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("crishim does not shut down")
				}
				if _, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{}); err != nil {
					t.Fatalf("crishim no longer relays while it shuts down: %v", err)
				}
			}
			held.Release()
			if err := <-ended; status.Code(err) != test.want {
				t.Errorf("the checkpoint in flight gave %v, want %s", err, test.want)
			}
			select {
			case <-crishim.Done():
			case <-time.After(time.Minute):
				t.Fatal("crishim does not end")
			}
			if _, err := n.StartCrishim(t.Context(), binary); err != nil {
				t.Fatal(err)
			}
			if gap := stop(); gap > 10*time.Second {
				t.Errorf("no answer for %s", gap)
			}
			if got := n.Listing(t, "/data"); got != test.left {
				t.Errorf("the directory holds\n%s", got)
			}
			if err := os.RemoveAll(n.Path(archived)); err != nil {
				t.Error(err)
			}
			n.Unharmed(t, "/data", c.Log)
		})
	}
}

func TestContainerdIsKilled(t *testing.T) {
	n, _ := start(t, node.Options{})
	client := dial(t, n)
	c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)

	t.Run("during a checkpoint, which goes on", func(t *testing.T) {
		held, ended := hold(t, n, "/data", func() error { return take(t, client, c.ID) })
		n.Daemon("containerd").Kill()
		held.Release()
		if err := <-ended; err != nil {
			t.Errorf("the checkpoint failed: %v", err)
		}
		if got := n.Listing(t, "/data"); got != "checkpoint.tar\n" {
			t.Errorf("the directory holds\n%s", got)
		}
		if _, err := n.StartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("ten times, and crishim is back within 3.5 s of it", func(t *testing.T) {
		crishim := n.Daemon("crishim").Pid()
		count := func(what string) func() int {
			return func() int {
				entries, err := os.ReadDir(filepath.Join("/proc", strconv.Itoa(crishim), what))
				if err != nil {
					t.Fatal(err)
				}
				return len(entries)
			}
		}
		descriptors, threads := count("fd"), count("task")
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
		before, threadsBefore := descriptors(), threads()
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
		// Go starts a thread or two when it likes. One for each restart is a goroutine that hangs in a system call.
		if now := threads(); now >= threadsBefore+10 {
			t.Errorf("crishim had %d threads, now it has %d", threadsBefore, now)
		}
		node.WaitCount(t, 0, c.Log)
	})
}
