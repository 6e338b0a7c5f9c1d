package crash

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/test/node"
)

// Each step of a checkpoint is killed at: the daemon, the helper and criu, one by one and together.
func TestKillsAtEachStep(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	for _, step := range node.Steps() {
		for _, v := range anyOf {
			if v.criu && !step.Criu {
				continue
			}
			if !b.part(t, step.Name+": "+v.String(), func() { b.killAt(c, step, v) }) {
				return
			}
		}
	}
}

// part is a subtest on the same node.
func (b *bed) part(t *testing.T, name string, test func()) bool {
	return t.Run(name, func(t *testing.T) {
		defer func(t *testing.T) { b.t = t }(b.t)
		b.t = t
		test()
	})
}

// hold makes a checkpoint and holds it at a step, until letGo is called.
func (b *bed) hold(c subject, step node.Step) (ended <-chan error, letGo func()) {
	b.t.Helper()
	if step.Name == node.MidDump {
		held, ended := node.HoldCheckpoint(b.t, b.Path(checkpoints), b.Path(location), func() error { return <-b.checkpoint(c) })
		return ended, held.Release
	}
	b.Failpoint(b.t, step.Name)
	ended = b.checkpoint(c)
	pids := b.stopped(step.Daemon)
	b.Failpoint(b.t, "")
	return ended, func() {
		for _, pid := range pids {
			_ = unix.Kill(pid, unix.SIGCONT) // it may be dead
		}
	}
}

// stopped waits until the daemon, or the helper, has stopped itself. The daemon's parent is the nsenter by which it came into the node, and
// stops with it.
func (b *bed) stopped(daemon bool) (pids []int) {
	b.t.Helper()
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(2 * time.Millisecond) {
		if daemon {
			pid := b.Daemon("crishim").Pid()
			if parent := parentOf(pid); pid != 0 && node.ProcessState(pid) == "T" && node.ProcessState(parent) == "T" {
				return []int{pid, parent}
			}
			continue
		}
		helpers, _ := b.CheckpointProcesses(b.t)
		for _, pid := range helpers {
			if node.ProcessState(pid) == "T" {
				return []int{pid}
			}
		}
	}
	b.t.Fatal("nobody comes to the point")
	return nil
}

func (b *bed) killAt(c subject, step node.Step, v victims) {
	b.t.Helper()
	ended, letGo := b.hold(c, step)
	b.kill(v)
	since := time.Now()
	letGo()
	if v.daemon {
		b.start()
	}
	err := <-ended
	b.t.Logf("the answer: %v", err)
	b.settled(c, since, true)
	there := b.takeArchive()
	if step.After == node.Nothing && there || step.After == node.Whole && !there {
		b.t.Errorf("is there an archive? %t", there)
	}
	var want []string
	switch {
	case v.daemon && !step.Daemon:
		if status.Code(err) != codes.Unavailable {
			b.t.Errorf("the answer is %v, want Unavailable: the daemon is dead", err)
		}
		return
	case v.daemon, step.Daemon && step.Name != "helper started" && step.Name != "recorded" && step.Name != "job sent":
		return // it may have answered before
	case v.helper && v.criu:
		want = []string{"criu is gone, too", "may have been changed by criu", "nothing of the checkpoint is left"}
	case v.helper && step.After == node.Whole:
		want = []string{"if there is an archive at the location, it is whole"}
	case v.helper && step.Name == node.MidDump:
		want = []string{"criu was told to roll back and has ended; the container runs on; nothing of the checkpoint is left: try again"}
	case v.helper:
		want = []string{"the checkpoint helper died", "nothing of the checkpoint is left: try again"}
	case v.criu:
		want = []string{"criu was killed in mid-dump (killed)", "may have been changed by criu"}
	}
	for _, words := range want {
		if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), words) {
			b.t.Errorf("the answer is %v, want Internal with %q", err, words)
		}
	}
}

// criu may crash by itself.
func TestACRIUThatCrashes(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	for _, step := range node.Steps() {
		if !step.Criu {
			continue
		}
		if !b.part(t, step.Name, func() {
			ended, letGo := b.hold(c, step)
			_, criu := b.CheckpointProcesses(b.t)
			for _, pid := range criu {
				if err := unix.Kill(pid, unix.SIGSEGV); err != nil {
					b.t.Fatal(err)
				}
			}
			since := time.Now()
			letGo()
			err := <-ended
			if text := fmt.Sprint(err); status.Code(err) != codes.Internal || !strings.Contains(text, "criu was killed in mid-dump (segmentation fault), which is an error of its own") ||
				!strings.Contains(text, "may have been changed by criu") {
				b.t.Errorf("the answer is %v, want Internal, what was done and what may have happened", err)
			}
			b.settled(c, since, true)
			if b.takeArchive() {
				b.t.Error("there is an archive")
			}
		}) {
			return
		}
	}
}

// A repair may be killed as well, over and over: the next start does what is left to do.
func TestKillsDuringARepair(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	_, letGo := b.hold(c, node.Step{Name: node.MidDump})
	b.kill(victims{daemon: true, helper: true, criu: true})
	since := time.Now()
	letGo()
	for _, point := range []string{"repair begun", "repair done"} {
		b.Failpoint(b.t, point)
		before, started := b.Daemon("crishim"), make(chan struct{})
		go func() {
			defer close(started)
			_, _ = b.StartCrishim(b.t.Context(), b.binary) // it relays before it is stopped, or is killed before it relays
		}()
		for b.Daemon("crishim") == before {
			time.Sleep(2 * time.Millisecond)
		}
		b.stopped(true)
		b.kill(victims{daemon: true})
		<-started
	}
	b.Failpoint(b.t, "")
	b.start()
	b.settled(c, since, true)
	if b.takeArchive() {
		t.Error("there is an archive")
	}
	if err := <-b.checkpoint(c); err != nil {
		t.Errorf("the next checkpoint: %v", err)
	}
}

// After a power cut only the disk is there. It is brought about by a record that says it is of another boot.
func TestAPowerCut(t *testing.T) {
	b := newBed(t, "failpoint")
	for _, test := range []struct {
		node.Step
		there bool // an archive
	}{
		{node.Step{Name: "staged"}, false},
		{node.Step{Name: node.MidDump, Criu: true}, false},
		{node.Step{Name: "assembled"}, false},
		{node.Step{Name: "archive synced"}, false},
		{node.Step{Name: "renamed"}, true},
	} {
		if !b.part(t, test.Name, func() { b.cutPower(test.Step, test.there) }) {
			return
		}
	}
}

func (b *bed) cutPower(step node.Step, there bool) {
	b.t.Helper()
	c := b.run(64)
	upper := b.upper(c)
	_, letGo := b.hold(c, step)
	b.kill(victims{daemon: true, helper: true, criu: true})
	letGo()
	// It would not have survived.
	if _, err := b.direct.Runtime.StopPodSandbox(b.t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: c.PodID}); err != nil {
		b.t.Fatal(err)
	}
	links := func() []string {
		links, err := filepath.Glob(filepath.Join(upper, "root/link_remap.*"))
		if err != nil {
			b.t.Fatal(err)
		}
		return links
	}
	if step.Criu && len(links()) == 0 {
		b.t.Error("criu has not added a name to the deleted file: the test shows less than it should")
	}
	records, err := filepath.Glob(b.Path(node.CrishimState("crishim") + "/*.json"))
	if err != nil || len(records) != 1 {
		b.t.Fatalf("records are %q, %v, want one", records, err)
	}
	b.fromAnotherBoot(records[0])
	b.start()
	for deadline := time.Now().Add(within); ; time.Sleep(5 * time.Millisecond) {
		complaint := b.left(c, true)
		if complaint == "" {
			break
		}
		if time.Now().After(deadline) {
			b.t.Fatal(complaint)
		}
	}
	if left := links(); len(left) > 0 {
		b.t.Errorf("left in the container's layer: %q", left)
	}
	if got := b.takeArchive(); got != there {
		b.t.Errorf("is there an archive? %t", got)
	}
	if err := c.Remove(context.Background()); err != nil {
		b.t.Error(err)
	}
}

func (b *bed) fromAnotherBoot(path string) {
	b.t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	record := &crishimv1.Record{}
	if err := protojson.Unmarshal(content, record); err != nil {
		b.t.Fatal(err)
	}
	record.BootId = "another"
	if content, err = protojson.Marshal(record); err == nil {
		err = os.WriteFile(path, content, 0o600)
	}
	if err != nil {
		b.t.Fatal(err)
	}
}

// upper is the writable layer of a container, by a path of the host.
func (b *bed) upper(c subject) string {
	b.t.Helper()
	mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mounts", b.Pid()))
	if err != nil {
		b.t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if !strings.Contains(line, c.ID) {
			continue
		}
		if _, options, ok := strings.Cut(line, "upperdir="); ok {
			upper, _, _ := strings.Cut(options, ",")
			return b.Path(upper)
		}
	}
	b.t.Fatal("the container's mount is not found")
	return ""
}
