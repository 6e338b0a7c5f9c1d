package crash

import (
	"context"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/test/node"
)

// promised is how soon after the end of its call a container that is checkpointed runs again.
const promised = time.Second

// The call ends at each step of a checkpoint. What is done by then is undone, up to the rename.
func TestACallThatEndsAtEachStep(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	for _, step := range node.Steps() {
		after := step.After
		switch step.Name {
		case "job sent", "dumped":
			after = node.Nothing // the helper lives, and hears of it
		}
		if !b.part(t, step.Name, func() { b.cancelAt(c, step, after) }) {
			return
		}
	}
}

func (b *bed) cancelAt(c subject, step node.Step, after node.Outcome) {
	b.t.Helper()
	ctx, cancel := context.WithCancel(b.t.Context())
	defer cancel()
	b.call = ctx
	defer func() { b.call = nil }()
	logged := len(b.Logs())
	ended, letGo := b.hold(c, step)
	cancel()
	if err := <-ended; status.Code(err) != codes.Canceled { // by its client, whatever crishim says
		b.t.Errorf("the call ended with %v, want Canceled", err)
	}
	if step.Name == node.MidDump {
		b.rolledBack()
	}
	since := time.Now()
	letGo()
	for !b.runs(c) {
		if time.Since(since) > promised {
			b.t.Fatalf("the container does not run again for %s", promised)
		}
		time.Sleep(time.Millisecond)
	}
	b.settled(c, since, true)
	there := b.takeArchive()
	if after == node.Nothing && there || after == node.Whole && !there {
		b.t.Errorf("is there an archive? %t", there)
	}
	said := b.Logs()[logged:]
	if want := map[bool]string{true: "checkpoint written", false: "code=Canceled"}[there]; !strings.Contains(said, want) {
		b.t.Errorf("crishim's log has no %q:\n%s", want, said)
	}
}

// runs says whether a container's first process is neither stopped nor frozen, nor traced.
func (b *bed) runs(c subject) bool {
	b.t.Helper()
	content, err := os.ReadFile(b.Path(fmt.Sprintf("/proc/%d/status", c.pid)))
	if err != nil {
		b.t.Fatal(err)
	}
	text := string(content)
	return strings.Contains(text, "\nTracerPid:\t0\n") && (strings.Contains(text, "\nState:\tS") || strings.Contains(text, "\nState:\tR"))
}

// The call ends at moments that are spread over a whole dump: also while criu freezes the container, seizes its many processes, locks its
// network and looks at them, and writes nothing. However much memory it has, it runs again within a second.
func TestACallThatEndsAtAnyMoment(t *testing.T) {
	const mib, moments = 2048, 10
	b := newBed(t)
	command := withEverything(mib)
	command[2] = "for i in " + strings.Repeat("i ", 200) + "; do sleep 100000 & done; " + command[2]
	c := b.runCommand(command)
	begin := time.Now()
	if err := <-b.checkpoint(c); err != nil {
		t.Fatal(err)
	}
	length := time.Since(begin)
	b.settled(c, time.Now(), true)
	b.takeArchive()
	t.Logf("a checkpoint that nobody disturbs takes %s", length)
	var slowest time.Duration
	at := map[string]int{}
	for n := range moments {
		ctx, cancel := context.WithCancel(t.Context())
		b.call = ctx
		moment := length * time.Duration(n) / moments / 2 // the rest is the archive's
		ended := b.checkpoint(c)
		time.Sleep(moment) // it is what is tested
		stood := !b.runs(c)
		cancel()
		since := time.Now()
		for !b.runs(c) {
			if time.Since(since) > promised {
				t.Fatalf("after %s of a checkpoint the call ended: the container does not run again for %s", moment, promised)
			}
			time.Sleep(time.Millisecond)
		}
		took := time.Since(since)
		slowest = max(slowest, took)
		at[fmt.Sprintf("stood still: %t", stood)]++
		<-ended
		b.settled(c, since, true)
		b.takeArchive() // of one that was done before
		t.Logf("after %s, when the container stood still: %t, the call ended, and it ran again %s later", moment, stood, took)
	}
	t.Logf("%v; the slowest ran again within %s", at, slowest)
	if at["stood still: true"] == 0 {
		t.Error("the container stood still at no moment: the test shows nothing")
	}
}
