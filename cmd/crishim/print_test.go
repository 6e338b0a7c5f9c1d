package main

import (
	"bytes"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/creack/pty"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	crishimv1 "crishim/proto/crishim/v1"
)

var update = flag.Bool("update", false, "write the golden files of testdata")

// golden compares what was printed with a file of testdata.
func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("printed was\n%s\nwant\n%s", got, want)
	}
}

func TestPrintList(t *testing.T) {
	local := time.Local
	time.Local = time.UTC
	defer func() { time.Local = local }()
	begin := time.Date(2026, 11, 24, 9, 0, 0, 0, time.UTC)
	after := func(d time.Duration) *timestamppb.Timestamp { return timestamppb.New(begin.Add(d)) }
	kubelet := &crishimv1.Caller{Interface: crishimv1.Interface_INTERFACE_CRI, Pid: 812, Process: "kubelet"}
	operator := &crishimv1.Caller{Interface: crishimv1.Interface_INTERFACE_ADMIN, Pid: 4711, Process: "crishim"}
	done := &crishimv1.Checkpoint{
		Id: "mif3k2x8", Caller: kubelet, ContainerId: "3f2a", Namespace: "default", Pod: "web", Container: "app", Location: "/c/one.tar",
		Begin: after(0), End: after(1234 * time.Millisecond), Size: 300 << 20, FrozenUs: 70259,
	}
	deleted := &crishimv1.Checkpoint{
		Id: "mif3k2x9", Caller: operator, Namespace: "default", Pod: "web", Container: "app", Location: "/c/two.tar",
		Begin: after(time.Minute), End: after(61 * time.Second), Size: 1 << 20, FrozenUs: 1000, Deleted: after(time.Hour),
	}
	failed := &crishimv1.Checkpoint{
		Id: "mif3k2xa", Caller: &crishimv1.Caller{}, ContainerId: "0123456789abcdef", Location: "/c/three.tar", Begin: after(2 * time.Minute), End: after(2 * time.Minute),
		Code: int32(codes.FailedPrecondition), Message: "process 1 (we\x1b[31mb): no",
	}
	flying := &crishimv1.Checkpoint{
		Id: "mif3k2xb", Caller: operator, Namespace: "default", Pod: "db", Container: "app", Location: "/c/four.tar", Begin: after(3 * time.Minute),
	}
	var out bytes.Buffer
	err := printList(&out, []*crishimv1.Listed{
		{Checkpoint: done}, {Checkpoint: deleted}, {Checkpoint: failed},
		{Checkpoint: flying, Progress: &crishimv1.Progress{Phase: crishimv1.Phase_PHASE_DUMP, Bytes: 1 << 30, Expected: 4 << 30, FrozenUs: 800000}},
		{Checkpoint: flying},
	}, begin.Add(3*time.Minute+time.Second))
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "list.txt", out.Bytes())
}

func TestPrintFindings(t *testing.T) {
	answer := &crishimv1.CheckResponse{
		Node: []*crishimv1.Finding{
			{Name: "CRIU", State: crishimv1.State_STATE_OK, Message: "4.2 at /usr/sbin/criu"},
			{Name: "capabilities", State: crishimv1.State_STATE_WARNING, Message: "crishim lacks CAP_SYS_RESOURCE", Advice: "run it as root"},
		},
		Container: []*crishimv1.Finding{
			{Name: "io_uring", State: crishimv1.State_STATE_FAILURE, Message: "process 1 (web\x07), descriptor 5", Advice: "switch it off"},
		},
	}
	for name, colours := range map[string]bool{"check.txt": false, "check-colours.txt": true} {
		var out bytes.Buffer
		if err := printFindings(&out, answer, colours); err != nil {
			t.Fatal(err)
		}
		golden(t, name, out.Bytes())
	}
}

// Where there is no terminal: a line for each phase, and no escape sequences.
func TestProgressInLines(t *testing.T) {
	var out bytes.Buffer
	view := newView(&out)
	for _, p := range []*crishimv1.Progress{
		{Phase: crishimv1.Phase_PHASE_COPY, Expected: 300 << 20},
		{Phase: crishimv1.Phase_PHASE_DUMP, Bytes: 1 << 20, Expected: 300 << 20, FrozenUs: 1500},
		{Phase: crishimv1.Phase_PHASE_DUMP, Bytes: 200 << 20, Expected: 300 << 20, FrozenUs: 101500},
		{Phase: crishimv1.Phase_PHASE_CAPTURE, Bytes: 300 << 20, Expected: 300 << 20, FrozenUs: 201500},
		{Phase: crishimv1.Phase_PHASE_ASSEMBLE, Bytes: 10 << 20, FrozenUs: 210000},
	} {
		view.show(p)
	}
	view.finish()
	view.end()
	golden(t, "progress.txt", out.Bytes())
}

func TestBarsAreForTerminalsWithASize(t *testing.T) {
	t.Setenv("TERM", "xterm")
	terminal, other, err := pty.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer terminal.Close()
	defer other.Close()
	for size, want := range map[pty.Winsize]string{{}: "*main.lines", {Cols: 80}: "*main.lines", {Rows: 24, Cols: 80}: "*main.bars"} {
		if err := pty.Setsize(terminal, &size); err != nil {
			t.Fatal(err)
		}
		view := newView(other)
		if got := fmt.Sprintf("%T", view); got != want {
			t.Errorf("a terminal of %d columns and %d rows gets %s, want %s", size.Cols, size.Rows, got, want)
		}
		view.end()
	}
}
