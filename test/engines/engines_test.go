// Package engines tests that archives are restored by engines that can: what crishim has dumped in front of containerd 1.7 goes on
// in containerd 2 and in podman, on another node.
package engines

import (
	"io"
	"os"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// image is the workload's, by a name under which it can be pulled without configuration: containerd 2.1 pulls the image of a
// checkpoint again, and takes none of the CRI's mirrors for it.
const image = "127.0.0.1:5000/workload:1"

// start starts a node with containerd, and crishim in front of it.
func start(t *testing.T, options node.Options) *node.Node {
	t.Helper()
	binary := node.Crishim(t)
	n := node.StartContainerdFor(t, options)
	if _, err := n.StartCrishim(t.Context(), binary); err != nil {
		t.Fatal(err)
	}
	return n
}

// crishim is the binary in a node.
const crishim = "/run/bin-crishim"

func dial(t *testing.T, n *node.Node) *node.Client {
	t.Helper()
	return n.Client(t, node.CrishimSocket)
}

// checkpoint is an archive, with what is known of the container that it is of.
type checkpoint struct {
	path          string // in the node
	before, after int    // the container was dumped when it had counted to a number between them
}

// dump checkpoints a container that counts.
func dump(t *testing.T, n *node.Node, c *node.Container, name string) checkpoint {
	t.Helper()
	return dumpBy(t, dial(t, n), c, name)
}

// dumpBy does so by a client of one of several crishims in a node.
func dumpBy(t *testing.T, client *node.Client, c *node.Container, name string) checkpoint {
	t.Helper()
	cp := checkpoint{path: "/data/checkpoint-" + name + ".tar"}
	cp.before = node.WaitCount(t, 5, c.Log)
	if _, err := client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: cp.path}); err != nil {
		t.Fatal(err)
	}
	cp.after = node.WaitCount(t, cp.before+5, c.Log)
	return cp
}

// send copies an archive to another node, to the same path.
func send(t *testing.T, from, to *node.Node, cp checkpoint) {
	t.Helper()
	in, err := os.Open(from.Path(cp.path))
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(to.Path(cp.path), os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	if err := out.Close(); err != nil {
		t.Fatal(err)
	}
}

// output runs a command in a node.
func output(t *testing.T, n *node.Node, name string, args ...string) string {
	t.Helper()
	out, err := n.Output(t.Context(), name, args...)
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return strings.TrimSpace(out)
}

// goesOn waits until a restored container counts past where the original was, and fails the test if its log does not have each
// number once, from 1 on: the log before the checkpoint, and the container's own going on.
func goesOn(t *testing.T, cp checkpoint, log func() (string, error)) {
	t.Helper()
	node.WaitCount(t, cp.after+5, log)
	text, err := log()
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range node.Counts(text) {
		if n != i+1 {
			t.Fatalf("number %d of the log is %d; it was checkpointed between %d and %d:\n%s", i+1, n, cp.before, cp.after, text)
		}
	}
}

// changes are made to a container's files before it is checkpointed, and state prints what has become of them.
const (
	changes = `set -e
		echo kept >/root/new; ln -s new /root/link; ln /root/new /root/hard; mkdir -m 0750 /root/dir
		rm /bin/df; rm -r /tmp; mkdir /tmp; echo in it >/tmp/f
		dd if=/dev/zero of=/root/sparse bs=1 count=0 seek=1M 2>/dev/null; echo end >>/root/sparse
		chmod 0700 /etc; chmod 4711 /bin/workload; echo in memory >/dev/shm/m`
	state = `cat /root/link; stat -c '%n %a %F %u:%g %h' /root/new; stat -c '%n %a %F %u:%g' /root/dir /tmp /tmp/f /etc /bin/workload
		ls -d /bin/df 2>&1; cat /tmp/f; stat -c '%n %s' /root/sparse; dd if=/root/sparse bs=1M skip=1 2>/dev/null`
)

func exec(t *testing.T, c *node.Container, script string) string {
	t.Helper()
	out, err := c.Exec(t.Context(), "/bin/sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// checkpointctl makes checkpointctl visible in a node, and returns its path there.
func checkpointctl(t *testing.T, n *node.Node) string {
	t.Helper()
	const target = "/run/checkpointctl"
	if _, err := os.Lstat(n.Path(target)); err == nil {
		return target
	}
	tool, err := node.Tool(t.Context(), "checkpointctl")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(n.Path(target), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.Bind(tool, target); err != nil {
		t.Fatal(err)
	}
	return target
}
