package node

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"crishim/shim/failpoint"
)

// Step is a point of a checkpoint at which it can be held: by failpoint in a crishim that is built with that tag, see Crishim, or by
// HoldCheckpoint.
type Step struct {
	Name string
	// Daemon says that the daemon is held, not the helper; Criu that criu lives.
	Daemon, Criu bool
	After        Outcome
}

// Outcome is what is at the location after the daemon or the helper has died at some step.
type Outcome int

const (
	Nothing Outcome = iota
	Whole
	Either // it depends on who is faster
)

// MidDump is the step at which criu itself is held, while it writes memory, by HoldCheckpoint.
const MidDump = "memory is written"

// Steps are those of a checkpoint, in order.
func Steps() []Step {
	return []Step{
		{Name: "helper started", Daemon: true, After: Nothing},
		{Name: "recorded", Daemon: true, After: Nothing},
		{Name: "job sent", Daemon: true, After: Either},
		{Name: "job received", After: Nothing},
		{Name: "staged", After: Nothing},
		{Name: "copied", After: Nothing},
		{Name: MidDump, Criu: true, After: Nothing},
		{Name: "memory written", Criu: true, After: Nothing},
		{Name: "captured", Criu: true, After: Nothing},
		{Name: "dumped", After: Either},
		{Name: "assembled", After: Either},
		{Name: "archive synced", After: Either},
		{Name: "renamed", After: Whole},
		{Name: "published", After: Whole},
		{Name: "answered", Daemon: true, After: Whole},
		{Name: "helper ended", Daemon: true, After: Whole},
		{Name: "record removed", Daemon: true, After: Whole},
	}
}

// Failpoint names the point at which the next process of crishim is to stop, none if empty.
func (n *Node) Failpoint(t testing.TB, name string) {
	t.Helper()
	if err := os.WriteFile(n.Path(failpoint.File), []byte(name), 0o600); err != nil {
		t.Fatal(err)
	}
}

// CheckpointProcesses are the node's helpers, and those criu that dump, by their pids where the test runs.
func (n *Node) CheckpointProcesses(t testing.TB) (helpers, criu []int) {
	t.Helper()
	namespace, err := os.Stat(fmt.Sprintf("/proc/%d/ns/pid", n.pid))
	if err != nil {
		t.Fatal(err)
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		content, _ := os.ReadFile(dir + "/cmdline") // empty for one that has ended, as is the name
		arguments := strings.Split(string(content), "\x00")
		helper := len(arguments) > 1 && arguments[1] == "checkpoint-helper"
		// One that dumps writes over its command line. Others answer a question, with their arguments.
		name, _ := os.ReadFile(dir + "/comm")
		dumps := string(name) == "criu\n" && (len(arguments) < 2 || arguments[1] == "swrk" || strings.Contains(string(content), "dump"))
		if !helper && !dumps {
			continue
		}
		// Others run nodes on this machine, too.
		if own, err := os.Stat(dir + "/ns/pid"); err != nil || !os.SameFile(own, namespace) {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		switch {
		case err != nil:
			t.Fatal(err)
		case helper:
			helpers = append(helpers, pid)
		default:
			criu = append(criu, pid)
		}
	}
	return helpers, criu
}

// ProcessState is the letter by which /proc/PID/stat tells how a process is, empty if it has ended.
func ProcessState(pid int) string {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	_, after, _ := strings.Cut(string(content), ") ")
	return after[:1]
}
