// Package matrix tests crishim on one kind of container after the other: each is checkpointed through the CRI, goes on
// undisturbed, and is restored on another node by its own OCI runtime, with the same state. Each with runc and crun, on cgroup v1
// and v2. The rows are in rows_test.go; what was seen is the table in docs/compatibility.md.
package matrix

import (
	"flag"
	"testing"

	"crishim/test/node"
)

var update = flag.Bool("update", false, "write docs/compatibility.md instead of comparing it with what was seen")

// site is a pair of nodes: containers run on the first and are restored on the second.
type site struct {
	cgroup        string // "v1" or "v2"
	first, second *node.Node
	containerd    *node.Client // of the first node
	crishim       *node.Client
}

func TestMatrix(t *testing.T) {
	node.RequireRoot(t, testing.Short())
	binary, err := node.BuildCrishim(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	seen := table{}
	for _, cgroup := range []string{"v1", "v2"} {
		t.Run(cgroup, func(t *testing.T) {
			s := start(t, binary, cgroup)
			for _, runtime := range []string{"runc", "crun"} {
				t.Run(runtime, func(t *testing.T) {
					for _, section := range sections() {
						for _, row := range section.rows {
							t.Run(row.name, func(t *testing.T) {
								if !row.alone {
									t.Parallel()
								}
								c := column{runtime, cgroup}
								seen.add(row, c, row.judge(t, c, s.run(t, row, runtime)))
							})
						}
					}
				})
			}
		})
	}
	if !t.Failed() {
		seen.compare(t)
	}
}

func start(t *testing.T, binary, cgroup string) *site {
	t.Helper()
	s := &site{cgroup: cgroup}
	options := node.Options{CgroupV2: cgroup == "v2", Programs: true}
	s.first, s.second = startNode(t, options, "first"), startNode(t, options, "second")
	if _, err := s.first.StartCrishim(t.Context(), binary, "--log-level", "debug"); err != nil {
		t.Fatal(err)
	}
	s.containerd, s.crishim = dial(t, s.first, node.ContainerdSocket), dial(t, s.first, node.CrishimSocket)
	return s
}

func startNode(t *testing.T, options node.Options, hostname string) *node.Node {
	t.Helper()
	options.Hostname = hostname
	n, err := node.Start(t.Context(), options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	if _, err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n
}

func dial(t *testing.T, n *node.Node, socket string) *node.Client {
	t.Helper()
	client, err := n.DialCRI(socket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	return client
}
