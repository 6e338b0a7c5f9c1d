// Package matrix tests crishim on one kind of container after the other: each is checkpointed through the CRI, goes on
// undisturbed, and is restored on another node by its own OCI runtime, with the same state. Each with runc and crun, on cgroup v1
// and v2. The rows are in rows_test.go; what was seen is the table in docs/compatibility.md.
//
// On cgroup v2, a few rows need more than many machines have, and run in a virtual machine, by the same test there: see node.Machine.
package matrix

import (
	"flag"
	"os"
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
	machine := os.Getenv(node.InMachine) != ""
	cgroups := []string{"v1", "v2"}
	if machine {
		cgroups = []string{"v2"}
	}
	seen := table{}
	for _, cgroup := range cgroups {
		t.Run(cgroup, func(t *testing.T) {
			// In the machine, nodes are like it: cgroup v2 with all controllers.
			s := start(t, binary, cgroup, node.Options{CgroupV2: cgroup == "v2" && !machine, Programs: !machine})
			for _, runtime := range []string{"runc", "crun"} {
				t.Run(runtime, func(t *testing.T) {
					for _, section := range sections() {
						for _, row := range section.rows {
							if row.inMachine(cgroup) != machine {
								continue
							}
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
	// The table is not there, and is made where most rows are.
	if !t.Failed() && !machine {
		seen.compare(t)
	}
}

func start(t *testing.T, binary, cgroup string, options node.Options) *site {
	t.Helper()
	s := &site{cgroup: cgroup}
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
