package node

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
)

// Patience is how long the tests wait for what is to come: long enough for an emulated processor, on a host that has other work.
const Patience = 5 * time.Minute

// Pause is how long to wait before looking again, behind a look that began at a time. However long a look takes, as in an emulated machine, nine
// tenths of the time are left to what it waits for.
func Pause(began time.Time) time.Duration {
	return min(max(20*time.Millisecond, 9*time.Since(began)), 2*time.Second)
}

// Containerd returns a client of the containerd of the node that the test runs in, closed at the test's end. It skips the test
// outside of one.
func Containerd(t testing.TB) *Client {
	t.Helper()
	Require(t)
	client, err := DialLocalCRI(ContainerdSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// Serve serves a server's services on a socket until the test's end, and returns a connection to it.
func Serve(t testing.TB, server *grpc.Server) *grpc.ClientConn {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "server.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return conn
}

// Run runs a container that is removed at the test's end.
func (c *Client) Run(t testing.TB, spec Spec) *Container {
	t.Helper()
	container, err := c.RunContainer(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := container.Remove(context.Background()); err != nil {
			t.Errorf("remove container: %v", err)
		}
	})
	return container
}

// Crishim builds crishim for a test that drives nodes from the host, with the build tags if there are any, and returns the binary. It
// skips the test where it cannot run.
func Crishim(t testing.TB, tags ...string) string {
	t.Helper()
	RequireRoot(t, testing.Short())
	binary, err := BuildCrishim(t.Context(), t.TempDir(), tags...)
	if err != nil {
		t.Fatal(err)
	}
	return binary
}

// StartFor starts a node for a test. It ends with the test, and its logs are shown if that fails.
func StartFor(t testing.TB, options Options) *Node {
	t.Helper()
	n, err := Start(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		n.ShowLogs(t)
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// StartContainerdFor starts a node for a test as StartFor does, and its containerd.
func StartContainerdFor(t testing.TB, options Options) *Node {
	t.Helper()
	n := StartFor(t, options)
	if _, err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

// Client returns a client of a socket of the node, closed at the test's end.
func (n *Node) Client(t testing.TB, socket string) *Client {
	t.Helper()
	client, err := n.DialCRI(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}

// PodLog returns a function that asks the kubelet for what a pod has written, whose container has the pod's name.
func (k *Kubelet) PodLog(t testing.TB, name string) func() (string, error) {
	return func() (string, error) { return k.ContainerLog(t.Context(), k.PodName(name), name) }
}

// PodLogFile returns a function that reads the same from the node's disk, also while the kubelet cannot tell. pod is the pod's whole name.
func (n *Node) PodLogFile(pod, name string) func() (string, error) {
	return func() (string, error) {
		files, err := filepath.Glob(n.Path("/var/log/pods/default_" + pod + "_*/" + name + "/0.log"))
		if err != nil || len(files) != 1 {
			return "", fmt.Errorf("log of %s: found %q, %w", pod, files, err)
		}
		content, err := os.ReadFile(files[0])
		return string(content), err
	}
}

var counted = regexp.MustCompile(`count (\d+)\n`)

// Counts returns the numbers that a workload has written, in order.
func Counts(output string) []int {
	var all []int
	for _, m := range counted.FindAllStringSubmatch(output, -1) {
		n, _ := strconv.Atoi(m[1]) // digits; a number that is too large is the largest
		all = append(all, n)
	}
	return all
}

// LastCount returns the last number that a workload has written, 0 if none.
func LastCount(output string) int {
	all := Counts(output)
	if len(all) == 0 {
		return 0
	}
	return all[len(all)-1]
}

// WaitCount waits until a workload's output has a number over n, and returns the last one.
func WaitCount(t testing.TB, n int, output func() (string, error)) int {
	t.Helper()
	for deadline := time.Now().Add(Patience); ; time.Sleep(20 * time.Millisecond) {
		text, err := output()
		if err != nil {
			t.Fatal(err)
		}
		if now := LastCount(text); now > n {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("no count over %d for %s; output ends in %q", n, Patience, text[max(0, len(text)-200):])
		}
	}
}

// WentOn waits until a restored workload has counted over after, and fails the test unless it went on at a number from before to
// after, between which it was checkpointed, and left none out.
func WentOn(t testing.TB, before, after int, output func() (string, error)) {
	t.Helper()
	WaitCount(t, after, output)
	text, err := output()
	if err != nil {
		t.Fatal(err)
	}
	all := Counts(text)
	if all[0] < before || all[0] > after {
		t.Errorf("went on at %d; it was checkpointed between %d and %d", all[0], before, after)
	}
	for i := 1; i < len(all); i++ {
		if all[i] != all[i-1]+1 {
			t.Errorf("went on from %d to %d", all[i-1], all[i])
		}
	}
}

// WaitMore waits until a workload has written a further number.
func WaitMore(t testing.TB, output func() (string, error)) {
	t.Helper()
	text, err := output()
	if err != nil {
		t.Fatal(err)
	}
	WaitCount(t, LastCount(text), output)
}
