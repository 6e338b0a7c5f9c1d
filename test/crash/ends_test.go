package crash

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
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// end is a way in which a container ends.
type end struct {
	name string
	do   func(*bed, subject) error // returns when the runtime knows of it
}

var (
	killed = end{"killed", func(b *bed, c subject) error {
		_, err := b.Output(b.t.Context(), "kill", "-KILL", strconv.Itoa(c.pid))
		for err == nil && !b.exited(c) {
			time.Sleep(20 * time.Millisecond)
			err = b.t.Context().Err()
		}
		return err
	}}
	stopped = end{"stopped", func(b *bed, c subject) error {
		_, err := b.client.Runtime.StopContainer(b.t.Context(), &cri.StopContainerRequest{ContainerId: c.ID, Timeout: 1})
		return err
	}}
	removed = end{"removed", func(b *bed, c subject) error {
		_, err := b.client.Runtime.RemoveContainer(b.t.Context(), &cri.RemoveContainerRequest{ContainerId: c.ID})
		return err
	}}
)

func (b *bed) exited(c subject) bool {
	state, err := c.State(b.t.Context())
	return err == nil && state == cri.ContainerState_CONTAINER_EXITED
}

// A container may end at each step of its checkpoint: by itself, as when the kernel kills it for want of memory, or since it is stopped or
// removed. Whoever stops it waits for no more than the rest of its dump: not for the archive, which takes longer than all else. What
// was captured before becomes an archive. The pod's network is unlocked: it has other containers, and those that come next.
func TestTheContainerEnds(t *testing.T) {
	b := newBed(t, "failpoint")
	for _, test := range []struct {
		node.Step
		// held says that the step keeps the container's end from the runtime, for as long as it is held.
		held bool
		ends []end
	}{
		{node.Step{Name: "recorded", Daemon: true, After: node.Nothing}, false, []end{killed}},
		{node.Step{Name: "staged", After: node.Nothing}, false, []end{killed, stopped}},
		{node.Step{Name: "copied", After: node.Nothing}, true, []end{killed, stopped}},
		{node.Step{Name: node.MidDump, Criu: true, After: node.Nothing}, true, []end{killed, stopped, removed}},
		{node.Step{Name: "memory written", Criu: true, After: node.Nothing}, true, []end{killed, stopped}},
		{node.Step{Name: "captured", Criu: true, After: node.Either}, true, []end{killed}},
		{node.Step{Name: "dumped", After: node.Whole}, false, []end{killed, stopped, removed}},
		{node.Step{Name: "assembled", After: node.Whole}, false, []end{stopped}},
	} {
		for _, end := range test.ends {
			if !b.part(t, test.Name+": "+end.name, func() { b.endAt(test.Step, end, test.held) }) {
				return
			}
		}
	}
}

func (b *bed) endAt(step node.Step, end end, held bool) {
	b.t.Helper()
	c := b.run(64)
	checkpoint, letGo := b.hold(c, step)
	ended := make(chan error, 1)
	go func() { ended <- end.do(b, c) }()
	seen := func() {
		b.t.Helper()
		select {
		case err := <-ended:
			if err != nil {
				b.t.Error(err)
			}
		case <-time.After(within):
			b.t.Fatalf("nobody knows for %s that the container has ended", within)
		}
	}
	if held {
		b.dead(c)
	} else {
		seen()
	}
	if step.Name == node.MidDump {
		b.rolledBack() // and does not go on to write the memory of others, for minutes
	}
	letGo()
	err := <-checkpoint
	b.t.Logf("the answer: %v", err)
	if held {
		seen()
	}
	if err != nil && (status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "has ended")) {
		b.t.Errorf("the answer is %v, want FailedPrecondition and that it has ended", err)
	}
	if complaint := b.left(c, true); complaint != "" {
		b.t.Error(complaint)
	}
	there := b.takeArchive()
	if there != (err == nil) || step.After == node.Nothing && there || step.After == node.Whole && !there {
		b.t.Errorf("is there an archive? %t", there)
	}
	if err := c.Remove(b.t.Context()); err != nil {
		b.t.Error(err)
	}
}

// rolledBack waits until criu, which is held, is told to roll back.
func (b *bed) rolledBack() {
	b.t.Helper()
	_, criu := b.CheckpointProcesses(b.t)
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		for _, pid := range criu {
			var limit unix.Rlimit
			if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &limit); err == nil && limit.Cur == 0 {
				return
			}
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("of criu %d none is told to roll back", criu)
		}
	}
}

// dead waits until the container's first process does not run any more, whether anybody has heard of that or not.
func (b *bed) dead(c subject) {
	b.t.Helper()
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Readlink(b.Path(fmt.Sprintf("/proc/%d/ns/net", c.pid))); err != nil {
			return
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("process %d of the container does not end", c.pid)
		}
	}
}

// One of the container's processes is killed in mid-dump, as for want of memory. The others go on.
func TestAProcessEndsInMidDump(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	ended, letGo := b.hold(c, node.Step{Name: node.MidDump})
	b.sh("pkill -KILL -f '^workload tcp'")
	since := time.Now()
	letGo()
	err := <-ended
	t.Logf("the answer: %v", err)
	if status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "a process of the container has ended meanwhile: try again") {
		t.Errorf("the answer is %v, want Aborted and what to do", err)
	}
	b.settled(c, since, true)
	if b.takeArchive() {
		t.Error("there is an archive")
	}
	if err := <-b.checkpoint(c); err != nil {
		t.Errorf("the next checkpoint: %v", err)
	}
	b.takeArchive()
}
