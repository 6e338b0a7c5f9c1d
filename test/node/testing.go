package node

import (
	"context"
	"regexp"
	"strconv"
	"testing"
	"time"
)

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

// Crishim builds crishim for a test that drives nodes from the host, and returns the binary. It skips the test where it cannot
// run.
func Crishim(t testing.TB) string {
	t.Helper()
	RequireRoot(t, testing.Short())
	binary, err := BuildCrishim(t.Context(), t.TempDir())
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
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		text, err := output()
		if err != nil {
			t.Fatal(err)
		}
		if now := LastCount(text); now > n {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("no count over %d for 2 min; output ends in %q", n, text[max(0, len(text)-200):])
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
