package admin_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/admin"
	"crishim/shim/checkpoint"
	"crishim/test/node"
)

func TestMain(m *testing.M) {
	// The checkpoint service starts its own binary again as the helper, and here that is the test's.
	if len(os.Args) == 2 && os.Args[1] == checkpoint.HelperCommand {
		syscall.Exit(checkpoint.HelperMain())
	}
	os.Exit(m.Run())
}

// bed is the API in front of the node's containerd.
type bed struct {
	crishimv1.AdminServiceClient
	containerd *node.Client
	service    *checkpoint.Service
	log        *test.Hook
	dir        string // for archives
}

func newBed(t *testing.T) *bed {
	t.Helper()
	b := &bed{containerd: node.Containerd(t), dir: filepath.Join("/data", "admin-"+strings.ReplaceAll(t.Name(), "/", "-"))}
	log := logrus.New()
	log.SetOutput(t.Output())
	b.log = test.NewLocal(log)
	b.service = checkpoint.New(checkpoint.Config{
		Runtime: b.containerd.Runtime, Images: b.containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Log: log,
	})
	t.Cleanup(func() { b.service.Drain(context.Background()) })
	b.AdminServiceClient = crishimv1.NewAdminServiceClient(node.Serve(t, admin.New(b.service, log)))
	if err := os.Mkdir(b.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(b.dir) })
	return b
}

func (b *bed) location(name string) string { return filepath.Join(b.dir, "checkpoint-"+name+".tar") }

// checkpoint makes one and returns its events, of which the last is how it has ended.
func (b *bed) checkpoint(ctx context.Context, id, location string) (events []*crishimv1.CheckpointResponse, err error) {
	stream, err := b.Checkpoint(ctx, &crishimv1.CheckpointRequest{ContainerId: id, Location: location})
	for err == nil {
		var event *crishimv1.CheckpointResponse
		if event, err = stream.Recv(); err == nil {
			events = append(events, event)
		}
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return events, err
}

func (b *bed) list(t *testing.T) []*crishimv1.Listed {
	t.Helper()
	answer, err := b.List(t.Context(), &crishimv1.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return answer.GetCheckpoints()
}

// run runs a container with that many MiB of memory.
func (b *bed) run(t *testing.T, memory string) *node.Container {
	t.Helper()
	c := b.containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", memory}})
	node.WaitCount(t, 0, c.Log)
	return c
}

func TestCheckpointTellsHowFarItIs(t *testing.T) {
	b := newBed(t)
	c := b.run(t, "256")
	events, err := b.checkpoint(t.Context(), c.ID[:12], b.location("a"))
	if err != nil {
		t.Fatal(err)
	}
	begun, done := events[0].GetBegun(), events[len(events)-1].GetDone()
	if begun.GetId() == "" || done.GetId() != begun.GetId() || done.GetLocation() != b.location("a") || done.GetContainerId() != c.ID ||
		done.GetNamespace() != "default" || done.GetPod() != "test" || done.GetContainer() != "test" || done.GetFrozenUs() == 0 {
		t.Errorf("begun with %v, done with %v", begun, done)
	}
	if caller := done.GetCaller(); caller.GetPid() != int32(os.Getpid()) || caller.GetUid() != 0 || caller.GetInterface() != crishimv1.Interface_INTERFACE_ADMIN {
		t.Errorf("it was asked for by %v", caller)
	}
	info, err := os.Stat(b.location("a"))
	if err != nil || info.Size() != done.GetSize() {
		t.Errorf("the archive is %v, %v; it was said to have %d bytes", info, err, done.GetSize())
	}
	var phases []crishimv1.Phase
	var last *crishimv1.Progress
	frozen := false
	for _, event := range events[1 : len(events)-1] {
		p := event.GetProgress()
		if last == nil || last.GetPhase() != p.GetPhase() {
			phases = append(phases, p.GetPhase())
		} else if p.GetBytes() < last.GetBytes() && p.GetPhase() != crishimv1.Phase_PHASE_COPY {
			t.Errorf("after %v comes %v", last, p)
		}
		if p.GetExpected() < p.GetBytes() {
			t.Errorf("more than was expected: %v", p)
		}
		if p.GetPhase() == crishimv1.Phase_PHASE_CAPTURE {
			// All of the memory is there, and the estimate was right to a fifth.
			if p.GetBytes() < 256<<20 || p.GetExpected() > p.GetBytes()*6/5 {
				t.Errorf("when memory was written: %v", p)
			}
			frozen = p.GetFrozenUs() > 0
		}
		last = p
	}
	want := []crishimv1.Phase{
		crishimv1.Phase_PHASE_COPY, crishimv1.Phase_PHASE_DUMP, crishimv1.Phase_PHASE_CAPTURE, crishimv1.Phase_PHASE_ASSEMBLE, crishimv1.Phase_PHASE_PUBLISH,
	}
	if !slices.Equal(phases, want) {
		t.Errorf("the phases are %v, want %v", phases, want)
	}
	if last.GetBytes() != done.GetSize() || last.GetExpected() != done.GetSize() || !frozen {
		t.Errorf("the last progress is %v (frozen: %v), want all of %d bytes", last, frozen, done.GetSize())
	}
}

// Codes and messages are the same as the kubelet gets, and each has an entry and one line in the log, whoever asks.
func TestFailuresAreTheKubelets(t *testing.T) {
	b := newBed(t)
	c := b.run(t, "1")
	if err := os.WriteFile(b.location("taken"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		id, location string
		want         codes.Code
	}{
		{c.ID, b.location("taken"), codes.AlreadyExists},
		{c.ID, "relative.tar", codes.InvalidArgument},
		{"no-such-container", b.location("a"), codes.NotFound},
		{"", b.location("a"), codes.InvalidArgument},
	} {
		b.log.Reset()
		_, err := b.checkpoint(t.Context(), test.id, test.location)
		_, asKubelet := b.service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: test.id, Location: test.location})
		if status.Code(err) != test.want || status.Convert(err).Message() != status.Convert(asKubelet).Message() {
			t.Errorf("error is %v, the kubelet's %v, want %s", err, asKubelet, test.want)
		}
		lines := b.log.AllEntries()
		all := b.list(t)
		if len(lines) != 2 {
			t.Fatalf("there are %d lines in the log, want one for each", len(lines))
		}
		for i, entry := range all[len(all)-2:] {
			c := entry.GetCheckpoint()
			if codes.Code(c.GetCode()) != test.want || c.GetMessage() != status.Convert(err).Message() || c.GetEnd() == nil {
				t.Errorf("the history has %v", c)
			}
			if lines[i].Data["id"] != c.GetId() || lines[i].Data["code"] != test.want.String() || lines[i].Data["interface"] != []string{"admin", "cri"}[i] {
				t.Errorf("the log has %v", lines[i].Data)
			}
		}
	}
	if _, err := b.checkpoint(t.Context(), "no-such-container", ""); status.Code(err) != codes.NotFound {
		t.Errorf("without a location: %v, want NotFound", err)
	}
}

func TestCancelRollsBack(t *testing.T) {
	b := newBed(t)
	c := b.run(t, "256")
	held, ended := node.HoldCheckpoint(t, b.dir, b.location("a"), func() error {
		_, err := b.checkpoint(t.Context(), c.ID, b.location("a"))
		return err
	})
	all := b.list(t)
	flying := all[len(all)-1]
	if flying.GetCheckpoint().GetEnd() != nil || flying.GetProgress().GetPhase() != crishimv1.Phase_PHASE_DUMP {
		t.Fatalf("in flight is %v", flying)
	}
	id := flying.GetCheckpoint().GetId()
	// The dump is held: nothing but its clock goes on, and is told of all the same.
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		all := b.list(t)
		if now := all[len(all)-1].GetProgress(); now.GetFrozenUs() > flying.GetProgress().GetFrozenUs()+50000 && now.GetBytes() > 0 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("10 s later it is no further than %v", flying.GetProgress())
		}
	}
	if _, err := b.Delete(t.Context(), &crishimv1.DeleteRequest{Id: id}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("to delete one in flight gives %v", err)
	}
	answer := make(chan *crishimv1.CancelResponse, 1)
	go func() {
		response, err := b.Cancel(t.Context(), &crishimv1.CancelRequest{Id: id})
		if err != nil {
			t.Error(err)
		}
		answer <- response
	}()
	held.RollBack(t)
	if err := <-ended; status.Code(err) != codes.Canceled || !strings.Contains(err.Error(), "an operator has cancelled it") {
		t.Errorf("the checkpoint gives %v", err)
	}
	if c := (<-answer).GetCheckpoint(); c.GetCode() != int32(codes.Canceled) || !strings.Contains(c.GetMessage(), "the container runs on") {
		t.Errorf("cancel answers %v", c)
	}
	if entries, err := os.ReadDir(b.dir); err != nil || len(entries) > 0 {
		t.Errorf("left is %v, %v", entries, err)
	}
	node.WaitMore(t, c.Log)
	if _, err := b.Cancel(t.Context(), &crishimv1.CancelRequest{Id: id}); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("to cancel once more gives %v", err)
	}
	if _, err := b.Cancel(t.Context(), &crishimv1.CancelRequest{Id: "none"}); status.Code(err) != codes.NotFound {
		t.Errorf("to cancel another gives %v", err)
	}
}

func TestDeleteOnlyWhatCrishimHasMade(t *testing.T) {
	b := newBed(t)
	c := b.run(t, "1")
	made := func(name string) *crishimv1.Checkpoint {
		events, err := b.checkpoint(t.Context(), c.ID, b.location(name))
		if err != nil {
			t.Fatal(err)
		}
		return events[len(events)-1].GetDone()
	}
	remove := func(id string) codes.Code {
		_, err := b.Delete(t.Context(), &crishimv1.DeleteRequest{Id: id})
		if err != nil {
			t.Log(err)
		}
		return status.Code(err)
	}
	byID, byPath, changed := made("id"), made("path"), made("changed")
	if err := os.WriteFile(b.location("changed"), []byte("something else"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.location("other"), []byte("somebody's"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		what, id string
		want     codes.Code
	}{
		{"by its id", byID.GetId(), codes.OK},
		{"by its path", byPath.GetLocation(), codes.OK},
		{"once more", byID.GetId(), codes.NotFound},
		{"a changed one", changed.GetId(), codes.FailedPrecondition},
		{"somebody else's", b.location("other"), codes.NotFound},
		{"nothing", "", codes.NotFound},
		{"a relative path", "checkpoint-other.tar", codes.NotFound},
	} {
		if got := remove(test.id); got != test.want {
			t.Errorf("%s: %s, want %s", test.what, got, test.want)
		}
	}
	var left []string
	entries, err := os.ReadDir(b.dir)
	for _, entry := range entries {
		left = append(left, entry.Name())
	}
	if want := []string{"checkpoint-changed.tar", "checkpoint-other.tar"}; err != nil || !slices.Equal(left, want) {
		t.Errorf("left is %q, %v, want %q", left, err, want)
	}
	deleted := 0
	for _, l := range b.list(t) {
		if l.GetCheckpoint().GetDeleted() != nil {
			deleted++
		}
	}
	if deleted != 2 {
		t.Errorf("%d are remembered as deleted, want 2", deleted)
	}
	if again := made("id"); remove(again.GetLocation()) != codes.OK {
		t.Error("of two at one location the later one is not deleted")
	}
}

// Several at once do not get into one another's way, and each has an id of its own.
func TestIdsAreUnique(t *testing.T) {
	b := newBed(t)
	const n = 20
	done := make(chan error, n)
	for i := range n {
		go func() {
			_, err := b.checkpoint(t.Context(), fmt.Sprint("none-", i), b.location("a"))
			done <- err
		}()
	}
	for range n {
		if err := <-done; status.Code(err) != codes.NotFound {
			t.Errorf("error is %v", err)
		}
	}
	ids := map[string]bool{}
	for _, l := range b.list(t) {
		ids[l.GetCheckpoint().GetId()] = true
	}
	if len(ids) != n {
		t.Errorf("there are %d ids, want %d", len(ids), n)
	}
}
