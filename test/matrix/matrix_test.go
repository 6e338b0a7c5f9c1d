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
	binary := node.Crishim(t)
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
	options.Hostname = "first"
	s.first = node.StartContainerdFor(t, options)
	options.Hostname = "second"
	s.second = node.StartContainerdFor(t, options)
	if _, err := s.first.StartCrishim(t.Context(), binary, "--log-level", "debug"); err != nil {
		t.Fatal(err)
	}
	s.containerd, s.crishim = s.first.Client(t, node.ContainerdSocket), s.first.Client(t, node.CrishimSocket)
	return s
}
