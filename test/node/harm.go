package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
)

// Unharmed fails the test unless, within 5 s, all of the node's workloads run untraced and thawed, no criu and no helper is left, and
// the directory is empty. A machine that is emulated has 30 s: crishim asks criu what it can do after a restart, which is no harm.
func (n *Node) Unharmed(t testing.TB, dir string, output func() (string, error)) {
	t.Helper()
	limit := 5 * time.Second
	if n.systemd {
		limit = 30 * time.Second
	}
	complaint := ""
	for deadline := time.Now().Add(limit); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if complaint = n.Harm(t, dir); complaint == "" {
			WaitMore(t, output)
			return
		}
	}
	t.Error(complaint)
}

// Harm says what Unharmed would complain of just now, empty for nothing. That workloads go on is not looked at.
func (n *Node) Harm(t testing.TB, dir string) string {
	t.Helper()
	if left := n.Listing(t, dir); left != "" {
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
		comm, _ := os.ReadFile(dir + "/comm") // a criu that dumps has written over its command line
		switch {
		case string(comm) == "criu\n", len(name) > 1 && name[1] == "checkpoint-helper":
			return "still runs: " + strings.Join(name, " ")
		case !strings.HasSuffix(name[0], "workload"):
			continue
		case !strings.Contains(string(status), "\nTracerPid:\t0\n"):
			return "a workload is still traced"
		case strings.Contains(string(status), "\nState:\tT") || strings.Contains(string(status), "\nState:\tt"):
			return "a workload is still stopped"
		}
		if frozen := freezer(t, dir); frozen != "" {
			return "a workload's cgroup is frozen: " + frozen
		}
	}
	return ""
}

// freezer says whether a process's cgroup is frozen, and which: of version 1 by its state, of version 2 by its events, which tell
// of a parent's freezing too. The process's cgroups are named from the root of the test's own mount.
func freezer(t testing.TB, process string) (frozen string) {
	content, err := os.ReadFile(process + "/cgroup")
	if err != nil {
		return "" // it has ended
	}
	states := 0
	for line := range strings.Lines(string(content)) {
		fields := strings.SplitN(strings.TrimSpace(line), ":", 3)
		file, thawed := "", ""
		switch fields[1] {
		case "freezer":
			file, thawed = "/sys/fs/cgroup/freezer"+fields[2]+"/freezer.state", "THAWED\n"
		case "":
			file, thawed = unified(t)+fields[2]+"/cgroup.events", "frozen 0\n"
		default:
			continue
		}
		state, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended, or no controller of this version is here
		}
		if states++; !strings.Contains(string(state), thawed) {
			frozen = file + ": " + string(state)
		}
	}
	if _, err := os.Stat(process); states == 0 && err == nil {
		t.Errorf("no freezer of %s was found", process)
	}
	return frozen
}

// unified is where the host has cgroup v2.
func unified(t testing.TB) string {
	t.Helper()
	mounts, err := mountinfo.GetMounts(mountinfo.FSTypeFilter("cgroup2"))
	if err != nil {
		t.Fatal(err)
	}
	if len(mounts) == 0 {
		return "/nowhere"
	}
	return mounts[0].Mountpoint
}

// Listing is the content of a directory of the node, an entry a line.
func (n *Node) Listing(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(n.Path(dir))
	if err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, entry := range entries {
		fmt.Fprintln(&b, entry.Name())
	}
	return b.String()
}
