package packages

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"crishim/test/node"
)

// withoutSystemd goes through the life of a package on a node that has no systemd: it is installed, what it has brought is started by hand and makes a
// checkpoint, and it is removed and purged. With systemd, test/vm does.
func withoutSystemd(t *testing.T, deb string) {
	node.RequireRoot(t, testing.Short())
	n := node.StartContainerdFor(t, node.Options{})
	run := func(name string, args ...string) string {
		t.Helper()
		out, err := n.Output(t.Context(), name, args...)
		if err != nil {
			t.Fatalf("%s %s: %v", name, strings.Join(args, " "), err)
		}
		return out
	}
	found := func() []string {
		return strings.Fields(run("find", "/etc", "/usr", "/run", "/var/lib", "-name", "*crishim*", "-not", "-path", "/var/lib/containerd/*"))
	}
	content, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	const copied = "/data/package.deb"
	if err := os.WriteFile(n.Path(copied), content, 0o600); err != nil {
		t.Fatal(err)
	}
	before := found()
	run("dpkg", "--install", copied)

	// How full the disk is of the machine that runs the tests says nothing about crishim.
	daemon, err := n.StartDaemon("crishim", "env", "CRISHIM_CHECKPOINT_RESERVE=0%", "CRISHIM_CHECKPOINT_RESERVE_INODES=0%", "crishim", "serve")
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(n.Path("/run/crishim/admin.sock")); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("crishim does not come up")
		}
	}
	c := n.Client(t, node.ContainerdSocket).Run(t, node.Spec{}) // which is there to the end
	node.WaitCount(t, 0, c.Log)
	archive := strings.TrimSpace(run("crishim", "checkpoint", c.ID, "-o", "/data/checkpoint.tar"))
	run("crishim", "verify", archive)
	node.WaitMore(t, c.Log)
	if err := daemon.Stop(t.Context()); err != nil {
		t.Error(err)
	}

	run("dpkg", "--remove", "crishim")
	if now := found(); !slices.Contains(now, "/etc/crishim") || slices.Contains(now, "/usr/bin/crishim") {
		t.Errorf("after it was removed there is %q", now)
	}
	run("dpkg", "--purge", "crishim")
	if now := found(); !slices.Equal(now, before) {
		t.Errorf("after it was purged there is %q, and before it came %q", now, before)
	}
	if _, err := os.Stat(n.Path(archive)); err != nil {
		t.Errorf("%s: %v", filepath.Base(archive), err)
	}
}
