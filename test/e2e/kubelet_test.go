package e2e

import (
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"crishim/test/node"
	"crishim/test/restore"
)

const checkpoints = "/var/lib/kubelet/checkpoints"

func TestCheckpointThroughAKubelet(t *testing.T) {
	n, _ := start(t, node.Options{})
	k := startKubelet(t, n, "1.34", node.CrishimSocket)
	pod := k.PodName("counter")
	before := node.WaitCount(t, 5, k.PodLog(t, "counter"))

	paths, err := k.Checkpoint(t.Context(), pod, "counter", 0)
	if err != nil {
		t.Fatal(err)
	}
	if len(paths) != 1 {
		t.Fatalf("the kubelet answers with paths %q, want one", paths)
	}
	path := paths[0]
	if prefix := checkpoints + "/checkpoint-" + pod + "_default-counter-"; !strings.HasPrefix(path, prefix) || !strings.HasSuffix(path, ".tar") {
		t.Errorf("path is %s, want %s….tar", path, prefix)
	}
	info, err := os.Stat(n.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	if stat := info.Sys().(*syscall.Stat_t); info.Mode() != 0o600 || stat.Uid != 0 || stat.Gid != 0 {
		t.Errorf("archive is %v of %d:%d, want -rw------- of 0:0", info.Mode(), stat.Uid, stat.Gid)
	}
	if got, want := n.Listing(t, checkpoints), filepath.Base(path)+"\n"; got != want {
		t.Errorf("the directory holds\n%swant\n%s", got, want)
	}
	after := node.WaitCount(t, before+5, k.PodLog(t, "counter"))

	t.Run("checkpointctl", func(t *testing.T) { readByCheckpointctl(t, n, path, pod) })
	t.Run("tar", func(t *testing.T) {
		out, err := n.Output(t.Context(), "tar", "tvf", path)
		if err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{" spec.dump\n", " config.dump\n", " checkpoint/inventory.img\n"} {
			if !strings.Contains(out, name) {
				t.Errorf("tar tvf does not list%s", name)
			}
		}
	})
	t.Run("restore on another node", func(t *testing.T) {
		second := node.StartContainerdFor(t, node.Options{Hostname: "second"})
		archive, err := os.Open(n.Path(path))
		if err != nil {
			t.Fatal(err)
		}
		defer archive.Close()
		machine := restore.Machine{Command: second.Command, Path: second.Path}
		restored, err := restore.Archive(t.Context(), machine, archive, node.WorkloadImage)
		if err != nil {
			t.Fatal(err)
		}
		node.WentOn(t, before, after, restored.Output)
		if err := restored.Remove(t.Context()); err != nil {
			t.Error(err)
		}
	})
	// The original has gone on all along, and counted no number twice.
	node.WaitCount(t, after+5, k.PodLog(t, "counter"))
	log, err := k.PodLog(t, "counter")()
	if err != nil {
		t.Fatal(err)
	}
	for i, n := range node.Counts(log) {
		if n != i+1 {
			t.Fatalf("the original's number %d is %d", i+1, n)
		}
	}
}

func readByCheckpointctl(t *testing.T, n *node.Node, path, pod string) {
	checkpointctl, err := node.Tool(t.Context(), "checkpointctl")
	if err != nil {
		t.Fatal(err)
	}
	const target = "/run/checkpointctl"
	if err := os.WriteFile(n.Path(target), nil, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := n.Bind(checkpointctl, target); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args, want []string
	}{
		{[]string{"show", path}, []string{"counter", node.WorkloadImage, "runc", "containerd"}},
		{[]string{"inspect", "--all", path}, []string{"counter", "workload", "CRIU dump statistics", "Process tree", pod}},
		{[]string{"list", checkpoints}, []string{pod, "default", "counter"}},
	} {
		out, err := n.Output(t.Context(), target, test.args...)
		if err != nil {
			t.Errorf("checkpointctl %s: %v", test.args[0], err)
			continue
		}
		for _, want := range test.want {
			if !strings.Contains(out, want) {
				t.Errorf("checkpointctl %s does not say %q:\n%s", test.args[0], want, out)
			}
		}
	}
}

func TestWhatTheKubeletRefuses(t *testing.T) {
	n, _ := start(t, node.Options{})
	k := startKubelet(t, n, "1.34", node.CrishimSocket)
	runPod(t, k, node.Pod{Name: "ends", Command: []string{"/bin/sh", "-c", "sleep 5"}, Spec: map[string]any{"restartPolicy": "Never"}})
	pod := k.PodName("counter")
	// The kubelet asks the runtime which containers run before it asks for a checkpoint, so this answer is its own unless
	// the container ends in between.
	var ended error
	// The kubelet's names for archives have the granularity of a second.
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(1100 * time.Millisecond) {
		_, ended = k.Checkpoint(t.Context(), k.PodName("ends"), "ends", 0)
		if ended != nil {
			break
		}
	}
	_, noPod := k.Checkpoint(t.Context(), "nobody", "counter", 0)
	_, noContainer := k.Checkpoint(t.Context(), pod, "nobody", 0)
	for _, test := range []struct {
		name string
		err  error
		code int
		want string
	}{
		{"unknown pod", noPod, http.StatusNotFound, ""},
		{"unknown container", noContainer, http.StatusNotFound, ""},
		{"not running", ended, http.StatusInternalServerError, "container ends not found"},
	} {
		var refusal *node.HTTPError
		if !errors.As(test.err, &refusal) || refusal.Code != test.code || !strings.Contains(refusal.Body, test.want) {
			t.Errorf("%s: got %v, want %d with %q", test.name, test.err, test.code, test.want)
		}
	}
}
