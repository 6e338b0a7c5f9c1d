package vm

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// exposure is what systemd-analyze security says of the unit, times ten, as docs/systemd.md has it. Less is better.
const exposure = "86"

// hardening holds the unit to what docs/systemd.md says of it, and has crishim dump what a filter, or a privilege too few, would keep it from.
func hardening(t *testing.T, n *node.Node) {
	systemctl(t, "restart", "crishim.service")
	pid := property(t, "crishim.service", "MainPID")
	status, err := os.ReadFile("/proc/" + pid + "/status")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"\nSeccomp:\t0\n", "\nNoNewPrivs:\t1\n", "\nUmask:\t0077\n"} {
		if !strings.Contains(string(status), want) {
			t.Errorf("the daemon's status lacks %q:\n%s", want, status)
		}
	}
	for _, kind := range []string{"cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"} {
		own, err := os.Stat(filepath.Join("/proc", pid, "ns", kind))
		if err != nil {
			t.Fatal(err)
		}
		if host, err := os.Stat("/proc/1/ns/" + kind); err != nil || !os.SameFile(own, host) {
			t.Errorf("the daemon has another namespace of kind %s than the machine, %v: criu takes its own for the node's", kind, err)
		}
	}
	t.Log(strings.TrimSpace(output(t, "sh", "-c", "systemd-analyze security --no-pager --threshold="+exposure+" crishim.service | tail -n 1")))
	output(t, "systemd-analyze", "security", "--no-pager", "--threshold="+exposure, "crishim.service")

	t.Run("criu finds the same kernel", func(t *testing.T) { sameKernel(t) })
	t.Run("a pod with a profile is dumped", func(t *testing.T) { confinedPod(t, n) })
}

// sameKernel compares what criu has found out about the kernel under the unit with what it does without. It keeps that in a file, and so for the
// runtime, too, which restores by it.
func sameKernel(t *testing.T) {
	const cache = "/run/criu.kdat"
	// The address of the vDSO is in it, which is random otherwise.
	const random = "/proc/sys/kernel/randomize_va_space"
	before, err := os.ReadFile(random)
	if err == nil {
		err = os.WriteFile(random, []byte("0"), 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := os.WriteFile(random, before, 0); err != nil {
			t.Error(err)
		}
	}()
	read := func(find func()) []byte {
		t.Helper()
		if err := os.RemoveAll(cache); err != nil {
			t.Fatal(err)
		}
		find()
		content, err := os.ReadFile(cache)
		if err != nil {
			t.Fatal(err)
		}
		return content
	}
	without := read(func() { output(t, "criu", "check") })
	under := read(func() {
		systemctl(t, "restart", "crishim.service") // which has criu check the kernel
		wait(t, "criu to have looked", func() bool { _, err := os.Stat(cache); return err == nil })
	})
	if !bytes.Equal(without, under) {
		var differ []string
		for i := range min(len(without), len(under)) {
			if without[i] != under[i] {
				differ = append(differ, fmt.Sprintf("%d: %02x, %02x", i, without[i], under[i]))
			}
		}
		t.Errorf("criu finds another kernel under the unit (%d and %d bytes): %s", len(without), len(under), strings.Join(differ, "; "))
	}
}

// confinedPod dumps a container of another user, with the runtime's default profile, and connections.
func confinedPod(t *testing.T, n *node.Node) {
	c := runContainer(t, n, node.Spec{
		Command: []string{"/bin/workload", "hold", "identity", "denied=unshare", "tcp", "udp", "unix", "memory=16"},
		Container: func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
			c.Linux.SecurityContext.RunAsUser = &cri.Int64Value{Value: 1000}
			c.Linux.SecurityContext.NoNewPrivs = true
		},
	})
	wait(t, "the workload to hold all that", func() bool {
		log, err := c.Log()
		if state, stateErr := c.State(t.Context()); err != nil || stateErr != nil || state == cri.ContainerState_CONTAINER_EXITED {
			t.Fatalf("it has ended, %v, %v: %s", err, stateErr, log)
		}
		return strings.Contains(log, "holding")
	})
	if err := checkpoint(t, n, c); err != nil {
		t.Fatal(err)
	}
	if !settled(t, n) {
		t.Fatal("there is no archive")
	}
	info, err := os.Stat(location)
	if err != nil || info.Mode() != 0o600 {
		t.Errorf("the archive is %v, %v, want 0600", info.Mode(), err)
	}
	output(t, "crishim", "verify", location)
	if err := os.Remove(location); err != nil {
		t.Fatal(err)
	}
	if state, err := c.State(t.Context()); err != nil || state != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the container is %v, %v", state, err)
	}
}

// A runtime that hangs, or is away, is no reason to abort crishim.
func runtimeTrouble(t *testing.T, n *node.Node) {
	const watchdog = 6 * time.Second
	defer override(t, fmt.Sprintf("[Service]\nWatchdogSec=%d\n", int(watchdog.Seconds())))()
	systemctl(t, "restart", "crishim.service")
	pid := property(t, "crishim.service", "MainPID")
	for _, trouble := range []struct{ name, begin, end, said string }{
		{"it hangs", "systemctl kill --kill-whom=main --signal=STOP containerd.service",
			"systemctl kill --kill-whom=main --signal=CONT containerd.service", "the runtime does not answer"},
		{"it is away", "systemctl stop containerd.service", "systemctl start containerd.service", "the runtime is away"},
	} {
		since := cursor(t)
		output(t, "sh", "-c", trouble.begin)
		time.Sleep(2 * watchdog) // nothing is to happen
		output(t, "sh", "-c", trouble.end)
		client := n.Client(t, node.CrishimSocket)
		wait(t, "calls to be answered again", func() bool {
			_, err := client.Runtime.Version(t.Context(), &cri.VersionRequest{})
			return err == nil
		})
		if now := property(t, "crishim.service", "MainPID"); now != pid {
			t.Errorf("%s: crishim was process %s and is %s", trouble.name, pid, now)
		}
		if log := journal(t, since, "-u", "crishim.service"); !strings.Contains(log, trouble.said) {
			t.Errorf("%s: crishim's log does not say %q:\n%s", trouble.name, trouble.said, log)
		}
	}
}

// override lays a drop-in over crishim's unit, until it is called again.
func override(t *testing.T, content string) (restore func()) {
	t.Helper()
	const dropIn = "/run/systemd/system/crishim.service.d/50-test.conf"
	if err := os.MkdirAll(filepath.Dir(dropIn), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dropIn, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
	systemctl(t, "daemon-reload")
	return func() {
		t.Helper()
		if err := os.Remove(dropIn); err != nil {
			t.Error(err)
		}
		systemctl(t, "daemon-reload")
		systemctl(t, "restart", "crishim.service")
	}
}
