package vm

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/test/node"
)

// way is one in which the daemon ends without being asked to.
type way string

const (
	killed  way = "SIGKILL"
	panics  way = "a panic"      // by SIGABRT: a Go program ends of it as of a panic, with its goroutines and exit code 2
	aborted way = "the watchdog" // systemd's, of a daemon that stands still
)

// end is a moment of a checkpoint, and a way.
type end struct {
	node.Step
	way way
}

// ends are 20: each step of a checkpoint, in one of the ways, and those again at which criu lives. The watchdog's come last.
func ends() []end {
	ways := []way{killed, panics, killed, panics, aborted}
	var others, watchdogs []end
	for i, step := range node.Steps() {
		if way := ways[i%len(ways)]; way != aborted {
			others = append(others, end{step, way})
		} else {
			watchdogs = append(watchdogs, end{step, way})
		}
		if step.Criu {
			watchdogs = append(watchdogs, end{step, aborted})
		}
	}
	return append(others, watchdogs...)
}

// unexpectedEnds ends the daemon under systemd, which starts it again each time, and leaves helper and criu alone: they roll back by themselves.
func unexpectedEnds(t *testing.T, n *node.Node) {
	binary, err := node.BuildCrishim(t.Context(), "", "failpoint")
	if err != nil {
		t.Fatal(err)
	}
	// All else is the unit's.
	program := "[Service]\nExecStart=\nExecStart=" + binary + " serve\n"
	defer override(t, program)()
	systemctl(t, "restart", "crishim.service")
	c := runContainer(t, n, node.Spec{Command: []string{"/bin/workload", "memory", "64"}})
	node.WaitCount(t, 0, c.Log)
	begin, short := time.Now(), false
	for _, end := range ends() {
		if end.way == aborted && !short {
			// A daemon that stands still is found soon.
			override(t, program+"WatchdogSec=6\n")
			systemctl(t, "restart", "crishim.service")
			short = true
		}
		if !t.Run(end.Name+": "+string(end.way), func(t *testing.T) { unexpectedEnd(t, n, c, end.Step, end.way) }) {
			return
		}
	}
	t.Logf("%d ends in %s", len(ends()), time.Since(begin))
}

func unexpectedEnd(t *testing.T, n *node.Node, c *node.Container, step node.Step, way way) {
	since := cursor(t)
	pid, err := strconv.Atoi(property(t, "crishim.service", "MainPID"))
	if err != nil || pid == 0 {
		t.Fatalf("crishim has pid %d, %v", pid, err)
	}
	ended, letGo := hold(t, n, c, step, pid)
	switch way {
	case killed:
		err = unix.Kill(pid, unix.SIGKILL)
	case panics:
		if err = unix.Kill(pid, unix.SIGABRT); err == nil {
			err = unix.Kill(pid, unix.SIGCONT)
		}
	case aborted:
		err = unix.Kill(pid, unix.SIGSTOP)
	}
	if err != nil {
		t.Fatal(err)
	}
	wait(t, "the daemon to end", func() bool { return node.ProcessState(pid) == "" })
	// Whatever systemd does at the end of a service's process, it has done when it has started the next.
	wait(t, "systemd to start crishim again", func() bool {
		now := property(t, "crishim.service", "MainPID")
		return now != "0" && now != strconv.Itoa(pid) && property(t, "crishim.service", "ActiveState") == "active"
	})
	_, criu := n.CheckpointProcesses(t)
	if step.Criu && len(criu) == 0 {
		t.Error("criu has not outlived the daemon")
	}
	for _, pid := range criu {
		if signals := pending(t, pid); signals != "" {
			t.Errorf("signals are pending for criu, which is never to get any: %s", signals)
		}
	}
	before, err := c.Log()
	if err != nil {
		t.Fatal(err)
	}
	letGo()
	free := time.Now()
	node.WaitCount(t, node.LastCount(before), c.Log)
	if took := time.Since(free); took > 5*time.Second {
		t.Errorf("the container has gone on after %s only", took)
	}
	if err := <-ended; status.Code(err) != codes.Unavailable {
		t.Errorf("the answer is %v, want Unavailable: the daemon is dead", err)
	}
	archive := settled(t, n)
	if step.After == node.Nothing && archive || step.After == node.Whole && !archive {
		t.Errorf("is there an archive? %t", archive)
	}
	if archive {
		output(t, "crishim", "verify", location)
	}
	if err := os.RemoveAll(location); err != nil {
		t.Fatal(err)
	}
	log, err := c.Log()
	if err != nil || strings.Contains(log, "has changed") {
		t.Errorf("the content of the container's memory is another, %v: %s", err, log[max(0, len(log)-200):])
	}
	logged := journal(t, since, "-u", "crishim.service")
	if strings.Contains(logged, "may have been changed by criu") || strings.Contains(logged, "criu was killed") {
		t.Errorf("criu has not ended by itself:\n%s", logged)
	}
	if dumped := strings.Contains(logged, "crishim/shim.Run("); dumped != (way != killed) {
		t.Errorf("are the daemon's goroutines in the journal? %t:\n%s", dumped, logged)
	}
	if timeout := strings.Contains(logged, "Watchdog timeout"); timeout != (way == aborted) {
		t.Errorf("was it the watchdog? %t:\n%s", timeout, logged)
	}
	for line := range strings.Lines(logged) {
		if strings.Contains(line, "Killing process") && !strings.Contains(line, fmt.Sprintf("Killing process %d ", pid)) {
			t.Errorf("systemd has signalled another process than the daemon: %s", line)
		}
	}
}

// hold makes a checkpoint and holds it at a step, until letGo is called.
func hold(t *testing.T, n *node.Node, c *node.Container, step node.Step, daemon int) (ended <-chan error, letGo func()) {
	t.Helper()
	if step.Name == node.MidDump {
		held, ended := node.HoldCheckpoint(t, "/var/lib/crishim-test", location, func() error { return checkpoint(t, n, c) })
		return ended, held.Release
	}
	n.Failpoint(t, step.Name)
	result := make(chan error, 1)
	go func() { result <- checkpoint(t, n, c) }()
	stopped := 0
	wait(t, "the checkpoint to be held", func() bool {
		pids := []int{daemon}
		if !step.Daemon {
			pids, _ = n.CheckpointProcesses(t)
		}
		for _, pid := range pids {
			if node.ProcessState(pid) == "T" {
				stopped = pid
			}
		}
		return stopped != 0
	})
	n.Failpoint(t, "")
	return result, func() { _ = unix.Kill(stopped, unix.SIGCONT) } // it may be dead, as the daemon is
}
