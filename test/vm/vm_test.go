// Package vm tests crishim as it is installed, with the units that it ships: under systemd, which makes the cgroups, version 2, of all
// containers, on a machine with all capabilities. It runs in a virtual machine, see node.Machine.
package vm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
	"crishim/test/restore"
)

const checkpoints = "/var/lib/kubelet/checkpoints"

// TestServices goes through the life of a machine: the services are started, and each part finds what the one before has left.
func TestServices(t *testing.T) {
	node.RequireMachine(t)
	n, err := node.ByItself(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(output(t, "journalctl", "--no-pager", "--output=short-monotonic", "--lines=60", "-u", "crishim.service", "-u", "kubelet.service", "-u", "containerd.service"))
		}
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	if err := os.Mkdir(filepath.Dir(location), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, part := range []struct {
		name string
		test func(*testing.T, *node.Node)
	}{
		{"the socket starts the service", startBySocket},
		{"a reload takes the configuration over", reload},
		{"the unit takes what nobody needs", hardening},
		{"a runtime in trouble is not crishim's fault", runtimeTrouble},
		{"the daemon ends in mid-dump", unexpectedEnds},
		{"the kubelet's checkpoint is restored", checkpointAndRestore},
		{"a restart in mid-dump rolls it back", func(t *testing.T, n *node.Node) { restart(t, n, true) }},
		{"a restart in mid-dump waits for it", func(t *testing.T, n *node.Node) { restart(t, n, false) }},
		{"an upgrade while pods come and go", upgrade},
	} {
		if !t.Run(part.name, func(t *testing.T) { part.test(t, n) }) {
			t.FailNow()
		}
	}
}

// startBySocket starts containerd and crishim's socket, and has a call start crishim itself.
func startBySocket(t *testing.T, n *node.Node) {
	configuration := "/etc/crishim/config.d/metrics.toml"
	if err := errors.Join(os.MkdirAll(filepath.Dir(configuration), 0o755),
		os.WriteFile(configuration, []byte("metrics = \""+metricsAddress+"\"\n"), 0o644)); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "start", "containerd.service")
	output(t, "systemd-analyze", "verify", "crishim.service", "crishim.socket", "kubelet.service")
	systemctl(t, "enable", "--now", "crishim.socket")
	for path, want := range map[string]os.FileMode{
		node.CrishimSocket: os.ModeSocket | 0o600, filepath.Dir(node.CrishimSocket): os.ModeDir | 0o700, "/var/lib/crishim": os.ModeDir | 0o700,
	} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s is %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	if state := property(t, "crishim.service", "ActiveState"); state != "inactive" {
		t.Errorf("crishim.service is %s before the first call", state)
	}
	client, err := n.DialCRI(node.CrishimSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	version, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{}, grpc.WaitForReady(true))
	if err != nil || version.GetRuntimeName() != "containerd" {
		t.Fatalf("got %v, %v by the socket, want containerd's version", version, err)
	}
	// A service of type notify is active once it has said that it is ready.
	wait(t, "crishim.service to be active", func() bool { return property(t, "crishim.service", "ActiveState") == "active" })
	if kind := property(t, "crishim.service", "Type"); kind != "notify" {
		t.Errorf("crishim.service is of type %s, want notify", kind)
	}
	metrics(t)
	systemctl(t, "enable", "crishim.service")
	systemctl(t, "is-enabled", "crishim.service", "crishim.socket")
}

// reload has systemd tell crishim of a drop-in, then of a wrong one, and of none.
func reload(t *testing.T, _ *node.Node) {
	pid := property(t, "crishim.service", "MainPID")
	dropIn := "/etc/crishim/config.d/50-test.toml"
	if err := os.MkdirAll(filepath.Dir(dropIn), 0o755); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(dropIn)
	for _, step := range []struct{ content, want string }{
		{"log_level = \"debug\"\n", "taken over; changed: log_level"},
		{"log_levl = \"debug\"\n", "the configuration is wrong, and stays as it was: " + dropIn + ":1: there is no key log_levl"},
		{"listen = \"/run/elsewhere\"\n", "a restart of crishim is needed for what has changed of listen"},
		{"", "nothing has changed"},
	} {
		if err := os.WriteFile(dropIn, []byte(step.content), 0o644); err != nil {
			t.Fatal(err)
		}
		since := cursor(t)
		systemctl(t, "reload", "crishim.service")
		wait(t, "the log to have "+step.want, func() bool {
			return strings.Contains(journal(t, since, "--output=cat", "-u", "crishim.service"), step.want)
		})
		wait(t, "crishim.service to be active again", func() bool { return property(t, "crishim.service", "ActiveState") == "active" })
	}
	if now := property(t, "crishim.service", "MainPID"); now != pid {
		t.Errorf("crishim was process %s, and is %s after being reloaded", pid, now)
	}
}

const metricsAddress = "127.0.0.1:9471"

// metrics reads crishim's, to which its unit leaves the loopback interface.
func metrics(t *testing.T) {
	t.Helper()
	response, err := http.Get("http://" + metricsAddress + "/metrics")
	if err != nil {
		t.Error(err)
		return
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	for _, line := range []string{`crishim_runtime_up 1`, `crishim_watchdog_rounds_total{result="hungry"} 0`} {
		if err != nil || !strings.Contains(string(text), "\n"+line+"\n") {
			t.Errorf("the metrics have no line %s: %v\n%s", line, err, text)
		}
	}
}

// checkpointAndRestore starts the kubelet, which is to use crishim, and has it make a checkpoint that is restored beside the original.
func checkpointAndRestore(t *testing.T, n *node.Node) {
	output(t, "crishim", "kubelet", "enable")
	systemctl(t, "start", "kubelet.service")
	k := meet(t, n)
	runPod(t, k, node.Pod{Name: "counter"})
	systemctl(t, "is-active", "containerd.service", "crishim.service", "crishim.socket", "kubelet.service")
	before := node.WaitCount(t, 5, k.PodLog(t, "counter"))
	paths, err := k.Checkpoint(t.Context(), k.PodName("counter"), "counter", 0)
	if err != nil || len(paths) != 1 {
		t.Fatalf("got %q, %v, want one path", paths, err)
	}
	after := node.WaitCount(t, before+5, k.PodLog(t, "counter"))

	archive, err := os.Open(paths[0])
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	restored, err := restore.Archive(t.Context(), restore.Local(), archive, node.WorkloadImage)
	if err != nil {
		t.Fatal(err)
	}
	node.WentOn(t, before, after, restored.Output)
	if err := restored.Remove(t.Context()); err != nil {
		t.Error(err)
	}
	if err := os.Remove(paths[0]); err != nil {
		t.Fatal(err)
	}
	// The original has gone on all along, in a scope of systemd's.
	n.Unharmed(t, checkpoints, k.PodLog(t, "counter"))
	if groups, err := filepath.Glob("/sys/fs/cgroup/kubepods.slice/*.slice/*.slice/cri-containerd-*.scope"); err != nil || len(groups) == 0 {
		t.Errorf("no scope of a container, %v: who has made the cgroups?\n%s", err, output(t, "systemctl", "status", "--no-pager"))
	}
	if err := k.RemovePod(t.Context(), "counter"); err != nil {
		t.Error(err)
	}
}

// restart has systemd restart crishim while a criu is held in mid-dump, which then is rolled back, when crishim's time to wait for it is
// over, or is let go on before.
func restart(t *testing.T, n *node.Node, rolledBack bool) {
	// Shorter than the 10 s that crishim waits: it is not aborted meanwhile.
	defer override(t, "[Service]\nWatchdogSec=6\n")()
	systemctl(t, "restart", "crishim.service")
	k := meet(t, n)
	name := fmt.Sprintf("large-%t", rolledBack)
	runPod(t, k, node.Pod{Name: name, Command: []string{"/bin/workload", "memory", "64"}})
	log := n.PodLogFile(k.PodName(name), name)
	node.WaitCount(t, 0, log)
	kubeletPid, crishimPid := property(t, "kubelet.service", "MainPID"), property(t, "crishim.service", "MainPID")
	since := cursor(t)

	client, err := n.DialCRI(node.CrishimSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if _, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{}); err != nil {
		t.Fatal(err)
	}
	held, ended := node.HoldCheckpoint(t, checkpoints, "", func() error {
		// Of one that was over before it could be held.
		if err := removeArchives(); err != nil {
			return err
		}
		_, err := k.Checkpoint(t.Context(), k.PodName(name), name, 0)
		return err
	})
	restarted := make(chan error, 1)
	go func() {
		out, err := exec.Command("systemctl", "restart", "crishim.service").CombinedOutput()
		if err != nil {
			err = fmt.Errorf("%w: %s", err, out)
		}
		restarted <- err
	}()
	wait(t, "systemd to stop crishim", func() bool { return property(t, "crishim.service", "ActiveState") == "deactivating" })
	if _, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{}); err != nil {
		t.Errorf("crishim no longer relays while it shuts down: %v", err)
	}
	if signals := pending(t, held.Pid()); signals != "" {
		t.Errorf("signals are pending for criu, which is never to get any: %s", signals)
	}
	if rolledBack {
		held.RollBack(t)
	} else {
		held.Release()
	}
	err = <-ended
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	archives, globErr := filepath.Glob(filepath.Join(checkpoints, "*.tar"))
	switch {
	case globErr != nil:
		t.Fatal(globErr)
	case rolledBack && (err == nil || len(archives) > 0):
		t.Errorf("the checkpoint ended with %v and %q, want a failure and no archive", err, archives)
	// An emulated machine may not be done with it in the time that crishim has.
	case !rolledBack && err != nil && (!strings.Contains(err.Error(), "crishim is shutting down") || len(archives) > 0):
		t.Errorf("the checkpoint ended with %v and %q, want an archive, or that its time was over and none", err, archives)
	case !rolledBack && err == nil && len(archives) != 1:
		t.Errorf("the checkpoint ended with %q, want an archive", archives)
	}
	for _, path := range archives {
		output(t, "crishim", "verify", path)
	}
	if err := removeArchives(); err != nil {
		t.Fatal(err)
	}
	n.Unharmed(t, checkpoints, log)
	if now := property(t, "crishim.service", "MainPID"); now == crishimPid || now == "0" {
		t.Errorf("crishim is process %s after the restart, and was %s", now, crishimPid)
	}
	if now := property(t, "kubelet.service", "MainPID"); now != kubeletPid {
		t.Errorf("the kubelet is process %s, and was %s: it has not gone on", now, kubeletPid)
	}
	// systemd tells of each process that it signals, but for the daemon itself.
	if said := journal(t, since, "-u", "crishim.service", "_PID=1"); strings.Contains(said, "Killing process") || strings.Contains(said, "Watchdog timeout") {
		t.Errorf("systemd has killed:\n%s", said)
	}
	// It works, and the kubelet finds it.
	checkpoint := func() bool {
		_, err = k.Checkpoint(t.Context(), k.PodName(name), name, 0)
		return err == nil
	}
	wait(t, "the next checkpoint", checkpoint)
	if err := k.RemovePod(t.Context(), name); err != nil {
		t.Error(err)
	}
	if err := removeArchives(); err != nil {
		t.Fatal(err)
	}
}

func removeArchives() error {
	archives, err := filepath.Glob(filepath.Join(checkpoints, "*.tar"))
	for _, path := range archives {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

func meet(t *testing.T, n *node.Node) *node.Kubelet {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), node.Patience)
	defer cancel()
	k, err := n.Kubelet(ctx)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func runPod(t *testing.T, k *node.Kubelet, pod node.Pod) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), node.Patience)
	defer cancel()
	if err := k.RunPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
}

// pending are the signals that a process will get when it runs again, empty if none, as for one that has ended meanwhile: a criu that only
// answers a question to the daemon is soon done.
func pending(t *testing.T, pid int) string {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) { // ESRCH: between open and read
		return ""
	}
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for line := range strings.Lines(string(status)) {
		key, mask, _ := strings.Cut(strings.TrimSpace(line), ":\t")
		if (key == "SigPnd" || key == "ShdPnd") && strings.Trim(mask, "0") != "" {
			all = append(all, key+" "+mask)
		}
	}
	return strings.Join(all, ", ")
}

func systemctl(t *testing.T, args ...string) {
	t.Helper()
	output(t, "systemctl", args...)
}

func property(t *testing.T, unit, name string) string {
	t.Helper()
	return strings.TrimSpace(output(t, "systemctl", "show", "--property="+name, "--value", unit))
}

// cursor is the end that the journal has now, for journal. A time would not do: where the clock has been set, as TestClocksAndSleep does, journalctl finds
// entries of an hour ago since a minute.
func cursor(t *testing.T) string {
	t.Helper()
	output(t, "journalctl", "--sync")
	_, cursor, ok := strings.Cut(output(t, "journalctl", "--no-pager", "--lines=0", "--show-cursor"), "-- cursor: ")
	if !ok {
		t.Fatal("the journal has no cursor")
	}
	return strings.TrimSpace(cursor)
}

// journal is what the journal has got since, of what the arguments say.
func journal(t *testing.T, since string, args ...string) string {
	t.Helper()
	return output(t, "journalctl", append([]string{"--no-pager", "--after-cursor=" + since}, args...)...)
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			out = nil
		}
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

// wait waits for a condition.
func wait(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(node.Patience); ; {
		begin := time.Now()
		if condition() {
			return
		}
		if begin.After(deadline) {
			t.Fatalf("waited %s for %s", node.Patience, what)
		}
		time.Sleep(node.Pause(begin))
	}
}
