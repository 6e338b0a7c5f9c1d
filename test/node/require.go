package node

import (
	"fmt"
	"os"
)

// Inside is the environment variable that is set where a process runs in a test node.
const Inside = "CRISHIM_TEST_NODE"

// InMachine is the environment variable that is set where a process runs in a virtual machine, see Machine.
const InMachine = "CRISHIM_TEST_MACHINE"

// RequireMachine skips a test that does not run in a virtual machine, and only then.
func RequireMachine(t interface {
	Helper()
	Skip(...any)
}) {
	t.Helper()
	if os.Getenv(InMachine) == "" {
		t.Skip("needs the virtual machine: run make test-vm")
	}
}

// Require skips a test that does not run in a test node, and only then.
func Require(t interface {
	Helper()
	Skip(...any)
}) {
	t.Helper()
	if os.Getenv(Inside) == "" {
		t.Skip("needs the test node: run make test")
	}
}

// RequireRoot skips a test that starts nodes where that is not possible or, in short mode, not wanted.
func RequireRoot(t interface {
	Helper()
	Skip(...any)
}, short bool) {
	t.Helper()
	if short {
		t.Skip("starts test nodes: not in short mode")
	}
	if os.Geteuid() != 0 {
		t.Skip("needs root to start a test node")
	}
	if os.Getenv(Inside) != "" {
		t.Skip("starts test nodes itself: does not run in one")
	}
}

// ShowLogs logs what a node's daemons have written if the test has failed. Call it before Stop.
func (n *Node) ShowLogs(t interface {
	Helper()
	Failed() bool
	Log(...any)
}) {
	t.Helper()
	if t.Failed() {
		t.Log(fmt.Sprintf("logs of node %s:\n%s", n.hostname, n.Logs()))
	}
}
