package relay

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// containerd is a real one of the test's own, beside the node's: it is killed
// and started by whoever started it. Configuration, network and images are the
// node's, state and socket its own.
type containerd struct {
	t   testing.TB
	dir string
	cmd *exec.Cmd
}

func newContainerd(t testing.TB) *containerd {
	dir, err := os.MkdirTemp("/data", "containerd") // overlays need a real file system
	if err != nil {
		t.Fatal(err)
	}
	c := &containerd{t: t, dir: dir}
	t.Cleanup(func() {
		if c.cmd != nil {
			c.kill()
		}
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *containerd) socket() string { return filepath.Join(c.dir, "containerd.sock") }

// start returns when the CRI answers.
func (c *containerd) start(ctx context.Context) {
	log, err := os.OpenFile(filepath.Join(c.dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		c.t.Fatal(err)
	}
	defer log.Close()
	c.cmd = exec.Command("containerd", "--config", "/etc/containerd/config.toml",
		"--root", filepath.Join(c.dir, "root"), "--state", filepath.Join(c.dir, "state"), "--address", c.socket())
	c.cmd.Stdout, c.cmd.Stderr = log, log
	if err := c.cmd.Start(); err != nil {
		c.t.Fatal(err)
	}
	client, err := node.DialLocalCRI(c.socket())
	if err != nil {
		c.t.Fatal(err)
	}
	defer client.Close()
	for {
		_, err := client.Runtime.Version(ctx, &cri.VersionRequest{})
		if err == nil {
			return
		}
		if ctx.Err() != nil {
			text, _ := os.ReadFile(filepath.Join(c.dir, "log"))
			c.t.Fatalf("containerd does not answer: %v\n%s", err, text[max(0, len(text)-2000):])
		}
		time.Sleep(10 * time.Millisecond)
	}
}

func (c *containerd) kill() {
	c.cmd.Process.Kill()
	c.cmd.Wait()
	c.cmd = nil
}

// TestContainerdRestarts: whenever containerd is killed, streams end with an
// error, calls succeed again soon after its return, its container has not
// noticed, and nothing is left behind in this process.
func TestContainerdRestarts(t *testing.T) {
	node.Require(t)
	holdsNothing(t)
	backend := newContainerd(t)
	ctx := testContext(t)
	backend.start(ctx)
	relay := newTestRelay(t, Config{Dial: func(ctx context.Context) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", backend.socket())
	}})
	client, err := node.DialLocalCRI(relay.socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	container := client.Run(t, node.Spec{Name: "restarts"})
	pid, err := container.Pid(ctx)
	if err != nil {
		t.Fatal(err)
	}
	watch := func() grpc.ServerStreamingClient[cri.ContainerEventResponse] {
		events, err := client.Runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		return events
	}
	events := watch()
	running := settled(t)
	for i := range 10 {
		backend.kill()
		var ended error
		for ended == nil {
			_, ended = events.Recv()
		}
		if status.Code(ended) != codes.Unavailable {
			t.Errorf("restart %d: the stream of events ended with %v", i, ended)
		}
		if i%2 == 0 { // a call while it is away
			short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
			if _, err := client.Runtime.Version(short, &cri.VersionRequest{}); err == nil {
				t.Error("answered without a runtime")
			}
			cancel()
		}
		backend.start(ctx)
		waitBack(t, func() error {
			_, err := client.Runtime.Version(ctx, &cri.VersionRequest{})
			return err
		})
		if now, err := container.Pid(ctx); err != nil || now != pid {
			t.Errorf("restart %d: the container has process %d, %v, had %d", i, now, err, pid)
		}
		events = watch()
	}
	running.await(t)
}
