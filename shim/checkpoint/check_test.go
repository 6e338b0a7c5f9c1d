package checkpoint_test

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// foreseen are the rows of docs/limits.md that Check finds without freezing the container. The others only the dump tells.
var foreseen = []string{
	"MPTCP socket", "socket of another kind", "mount that the specification does not know", "large deleted file that is open",
	"inotify or fanotify watch that cannot be found again", "io_uring", "open device", "open file of another kind",
	"System V shared memory of the node", "user namespace of its own", "namespace made inside", "process under a debugger",
	"process in uninterruptible sleep", "unix socket with a peer outside",
}

// failures are the names of what Check calls a failure, of the container.
func failures(t *testing.T, answer *crishimv1.CheckResponse) (names []string) {
	t.Helper()
	for _, f := range answer.GetContainer() {
		t.Logf("%s %s: %s: %s", f.GetState(), f.GetName(), f.GetMessage(), f.GetAdvice())
		if f.GetState() == crishimv1.State_STATE_FAILURE {
			names = append(names, f.GetName())
		}
	}
	return names
}

// checkForesees is called where a checkpoint is about to fail for a limit.
func checkForesees(t *testing.T, service *checkpoint.Service, limit, id string) {
	t.Helper()
	found := failures(t, service.Check(t.Context(), id, ""))
	if slices.Contains(foreseen, limit) && !slices.Contains(found, limit) {
		t.Errorf("check does not find it: it found %q", found)
	}
}

// checkAllows is called where a checkpoint is about to succeed.
func checkAllows(t *testing.T, containerd *node.Client, id, location string) {
	t.Helper()
	service := bounded(t, containerd, checkpoint.Bounds{})
	if found := failures(t, service.Check(t.Context(), id, location)); len(found) > 0 {
		t.Errorf("check says that it cannot be checkpointed: %q", found)
	}
	if entries, err := os.ReadDir(filepath.Dir(location)); err != nil || len(entries) > 0 {
		t.Errorf("check has left %v, %v", entries, err)
	}
}

func TestCheckOfANode(t *testing.T) {
	containerd := node.Containerd(t)
	service := bounded(t, containerd, checkpoint.Bounds{})
	find := func(answer *crishimv1.CheckResponse, name string) *crishimv1.Finding {
		for _, f := range answer.GetNode() {
			if f.GetName() == name {
				return f
			}
		}
		t.Errorf("it says nothing of %s", name)
		return nil
	}
	path := location(t)
	answer := service.Check(t.Context(), "", path)
	for _, f := range answer.GetNode() {
		t.Logf("%s %s: %s: %s", f.GetState(), f.GetName(), f.GetMessage(), f.GetAdvice())
		if f.GetState() == crishimv1.State_STATE_FAILURE {
			t.Errorf("%s is a failure", f.GetName())
		}
	}
	for name, words := range map[string]string{
		"CRIU": "/criu", "kernel": "Linux ", "capabilities": "", "runtime": "containerd 1.7", "cgroup": "freezer", "directory": "archives are ",
		"room": "for archives", "state": "records are kept in ",
	} {
		if f := find(answer, name); !strings.Contains(f.GetMessage(), words) {
			t.Errorf("%s: %q lacks %q", name, f.GetMessage(), words)
		}
	}

	// What fails is named, and fails a checkpoint.
	broken := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "/no/criu", Version: "test", State: "/proc/no", Log: testLog(t),
		Bounds: checkpoint.Bounds{Reserve: amount(t, "100%")},
	})
	defer broken.Drain(context.Background())
	answer = broken.Check(t.Context(), "", path)
	for name, words := range map[string]string{"CRIU": "no executable", "state": "mkdir /proc/no", "room": "make room there"} {
		if f := find(answer, name); f.GetState() != crishimv1.State_STATE_FAILURE || !strings.Contains(f.GetMessage()+f.GetAdvice(), words) {
			t.Errorf("%s is %v, want a failure with %q", name, f, words)
		}
	}
	if f := find(broken.Check(t.Context(), "", "/no/such/directory/checkpoint.tar"), "directory"); f.GetState() != crishimv1.State_STATE_FAILURE {
		t.Errorf("a directory that is not there is %v", f)
	}
}

// The estimate is of what the history has, and is none without.
func TestCheckEstimates(t *testing.T) {
	containerd := node.Containerd(t)
	service := bounded(t, containerd, checkpoint.Bounds{})
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "64"}})
	node.WaitCount(t, 0, c.Log)
	find := func(name string) string {
		for _, f := range service.Check(t.Context(), c.ID, "").GetContainer() {
			if f.GetName() == name {
				return f.GetMessage()
			}
		}
		return ""
	}
	if text := find("time"); !strings.HasPrefix(text, "unknown: ") {
		t.Errorf("without a history it says %q", text)
	}
	if text := find("size"); !strings.Contains(text, "memory 6") && !strings.Contains(text, "memory 7") {
		t.Errorf("64 MiB of memory are %q", text)
	}
	if _, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: location(t)}); err != nil {
		t.Fatal(err)
	}
	id := service.History().List()[0].GetCheckpoint().GetId()
	if text := find("time"); !strings.Contains(text, "an estimate, by checkpoint "+id) {
		t.Errorf("after a checkpoint it says %q", text)
	}
}
