package vm

import (
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// In mid-dump the machine's clock is set, or the machine sleeps. The checkpoint goes on, within a deadline that no clock of the day moves.
func TestClocksAndSleep(t *testing.T) {
	node.RequireMachine(t)
	n, err := node.ByItself(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(output(t, "journalctl", "--no-pager", "--output=short-monotonic", "--lines=100", "-u", "crishim.service", "-k"))
		}
		// As TestServices wants to find it.
		systemctl(t, "stop", "crishim.socket", "crishim.service", "containerd.service")
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	systemctl(t, "start", "containerd.service", "crishim.socket", "crishim.service")
	client := n.Client(t, node.CrishimSocket)
	wait(t, "the runtime to answer", func() bool {
		_, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{})
		return err == nil
	})
	c := client.Run(t, node.Spec{
		Command: []string{"/bin/workload", "memory", "64"},
		Pod:     func(p *cri.PodSandboxConfig) { p.Linux.CgroupParent = "clocks.slice" }, // systemd makes it
	})
	node.WaitCount(t, 0, c.Log)
	if err := os.MkdirAll(checkpoints, 0o700); err != nil {
		t.Fatal(err)
	}
	const path = checkpoints + "/checkpoint-clock.tar"
	set := func(by time.Duration) func(*testing.T) {
		return func(t *testing.T) { setClock(t, by) }
	}
	for _, test := range []struct {
		name   string
		change func(*testing.T)
		undo   func(*testing.T)
	}{
		{"an hour on", set(time.Hour), set(-time.Hour)},
		{"an hour back", set(-time.Hour), set(time.Hour)},
		{"the machine sleeps", sleep, func(*testing.T) {}},
	} {
		t.Run(test.name, func(t *testing.T) {
			held, ended := node.HoldCheckpoint(t, checkpoints, path, func() error {
				_, err := client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: path, Timeout: 600})
				return err
			})
			test.change(t)
			held.Release()
			err := <-ended
			test.undo(t)
			if err != nil {
				t.Fatal(err)
			}
			output(t, "crishim", "verify", path)
			if err := os.Remove(path); err != nil {
				t.Error(err)
			}
			n.Unharmed(t, checkpoints, c.Log)
		})
	}
}

// setClock sets the machine's clock of the day. Only a machine of the test's own may be harmed by it.
func setClock(t *testing.T, by time.Duration) {
	t.Helper()
	node.RequireMachine(t)
	now := unix.NsecToTimespec(time.Now().Add(by).UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
		t.Fatal(err)
	}
}

// sleep has the kernel do all that it does with processes when the machine goes to sleep, and wakes up five seconds later: it freezes them, and
// lets them go on (Documentation/power/basic-pm-debugging.rst). An emulated machine has no way to be woken up from more.
func sleep(t *testing.T) {
	t.Helper()
	for _, write := range []struct{ file, text string }{{"/sys/power/pm_test", "freezer"}, {"/sys/power/state", "freeze"}, {"/sys/power/pm_test", "none"}} {
		if err := os.WriteFile(write.file, []byte(write.text), 0); err != nil {
			t.Fatal(err)
		}
	}
	if log := output(t, "dmesg"); !strings.Contains(log, "suspend debug: Waiting for") {
		t.Errorf("the machine has not slept:\n%s", log[max(0, len(log)-2000):])
	}
}
