package vm

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"crishim/shim/kubelet"
	"crishim/test/node"
)

const (
	dropIn    = "/etc/systemd/system/kubelet.service.d/20-crishim.conf"
	config    = "/etc/crishim/config.toml"
	kubeadm   = "/usr/lib/systemd/system/kubelet.service.d/10-kubeadm.conf"
	extraArgs = "/etc/default/kubelet"
	// stubborn has the kubelet of these tests not start where it is told to use crishim.
	stubborn = "/run/stubborn"
)

// TestPackage goes through the life of an installed package, on a node as kubeadm lays it out: each part finds what the one before has left.
func TestPackage(t *testing.T) {
	node.RequireMachine(t)
	packages, err := filepath.Glob(filepath.Join(node.CopiesDir, "crishim_*.deb"))
	if err != nil || len(packages) != 1 {
		t.Fatalf("the machine has packages %q, %v, and one is needed: see make test-vm", packages, err)
	}
	rpms, err := filepath.Glob(filepath.Join(node.CopiesDir, "crishim-*.rpm"))
	if err != nil || len(rpms) != 1 {
		t.Fatalf("the machine has packages %q, %v, and one is needed: see make test-vm", rpms, err)
	}
	setAside(t)
	n, err := node.ByItself(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Log(output(t, "journalctl", "--no-pager", "--output=short-monotonic", "--lines=60", "-u", "crishim.service", "-u", "kubelet.service"))
		}
		systemctl(t, "stop", "kubelet.service")
		if err := n.Stop(); err != nil {
			t.Error(err)
		}
	})
	likeKubeadm(t)
	systemctl(t, "start", "containerd.service", "kubelet.service")
	k := meet(t, n)
	runPod(t, k, node.Pod{Name: "counter"})
	alone := files(t)
	// back waits until a kubelet that was restarted knows the pod again, which has run all along.
	back := func(t *testing.T) *node.Kubelet {
		t.Helper()
		k := meet(t, n)
		runPod(t, k, node.Pod{Name: "counter"})
		return k
	}

	for _, part := range []struct {
		name string
		test func(*testing.T)
	}{
		{"it is installed and started, and the kubelet not touched", func(t *testing.T) {
			pid := property(t, kubelet.Service, "MainPID")
			output(t, "dpkg", "--install", packages[0])
			systemctl(t, "is-active", "crishim.socket", "crishim.service")
			systemctl(t, "is-enabled", "crishim.socket", "crishim.service")
			if now := property(t, kubelet.Service, "MainPID"); now != pid {
				t.Errorf("the kubelet is process %s, and was %s", now, pid)
			}
			if s := kubeletStatus(t, kubelet.Disabled); s.Endpoint.Source != "--container-runtime-endpoint in /var/lib/kubelet/kubeadm-flags.env" {
				t.Errorf("status is %+v", s)
			}
		}},
		{"another runtime than the kubelet's is refused", func(t *testing.T) {
			pid := property(t, kubelet.Service, "MainPID")
			content := change(t, config, `containerd/containerd.sock`, `docker/docker.sock`)
			refused(t, "crishim relays to unix:///run/docker/docker.sock", "crishim", "kubelet", "enable")
			write(t, config, content)
			if now := property(t, kubelet.Service, "MainPID"); now != pid {
				t.Errorf("the kubelet is process %s, and was %s", now, pid)
			}
		}},
		{"a kubelet that does not come gets back what it had", func(t *testing.T) {
			write(t, stubborn, "")
			refused(t, "all is as it was", "crishim", "kubelet", "enable", "--timeout", "5s")
			if err := os.Remove(stubborn); err != nil {
				t.Fatal(err)
			}
			if s := kubeletStatus(t, kubelet.Disabled); s.DropIn != "" {
				t.Errorf("status is %+v", s)
			}
			back(t)
			if now := files(t); slices.Contains(now, dropIn) || slices.Contains(now, filepath.Dir(dropIn)) {
				t.Error("something is left of the drop-in")
			}
		}},
		{"the kubelet's checkpoint", func(t *testing.T) {
			output(t, "crishim", "kubelet", "enable")
			kubeletStatus(t, kubelet.Enabled)
			k := back(t)
			paths, err := k.Checkpoint(t.Context(), k.PodName("counter"), "counter", 0)
			if err != nil || len(paths) != 1 {
				t.Fatalf("got %q, %v, want one path", paths, err)
			}
			output(t, "crishim", "verify", paths[0])
			node.WaitMore(t, k.PodLog(t, "counter"))
		}},
		{"a first checkpoint at a terminal shows its progress", func(t *testing.T) {
			shown := output(t, "script", "--quiet", "--return", "--command", "stty columns 120 rows 24; TERM=xterm crishim checkpoint default/counter-machine/counter", "/dev/null")
			for _, words := range []string{"dump memory", "[====", "done", "/var/lib/kubelet/checkpoints/checkpoint-counter-machine_default-counter-"} {
				if !strings.Contains(shown, words) {
					t.Errorf("the terminal lacks %q: %q", words, shown)
				}
			}
		}},
		{"the commands of the documents", func(t *testing.T) { commandsInDocuments(t, back(t)) }},
		{"an upgrade", func(t *testing.T) {
			kubeletPid, pid := property(t, kubelet.Service, "MainPID"), property(t, "crishim.service", "MainPID")
			output(t, "dpkg", "--install", packages[0])
			if now := property(t, "crishim.service", "MainPID"); now == pid || now == "0" {
				t.Errorf("crishim is process %s, and was %s", now, pid)
			}
			if now := property(t, kubelet.Service, "MainPID"); now != kubeletPid {
				t.Errorf("the kubelet is process %s, and was %s", now, kubeletPid)
			}
			wait(t, "the kubelet to be connected again", func() bool { return kubeletStatus(t, kubelet.Enabled).Connected })
		}},
		{"what wins later is noticed", func(t *testing.T) {
			// Variables do not.
			was := change(t, extraArgs, "KUBELET_EXTRA_ARGS=\"", "KUBELET_EXTRA_ARGS=\"--container-runtime-endpoint=unix:///run/containerd/containerd.sock ")
			systemctl(t, "restart", kubelet.Service)
			wait(t, "the kubelet to be connected", func() bool { return kubeletStatus(t, kubelet.Enabled).Connected })
			write(t, extraArgs, was)
			// A later drop-in does.
			other := filepath.Join(filepath.Dir(dropIn), "90-other.conf")
			_, line, _ := strings.Cut(read(t, kubeadm), "ExecStart=\n")
			write(t, other, "[Service]\nExecStart=\n"+line)
			systemctl(t, "daemon-reload")
			kubeletStatus(t, kubelet.Overwritten)
			systemctl(t, "restart", kubelet.Service)
			if s := kubeletStatus(t, kubelet.Overwritten); s.Endpoint.Value != "unix:///run/containerd/containerd.sock" || len(s.Notes) == 0 {
				t.Errorf("status is %+v", s)
			}
			if err := os.Remove(other); err != nil {
				t.Fatal(err)
			}
			systemctl(t, "daemon-reload")
			output(t, "crishim", "kubelet", "enable")
			kubeletStatus(t, kubelet.Enabled)
		}},
		{"it does not go before the kubelet can do without", func(t *testing.T) {
			staysWhileNeeded(t, "dpkg", "--remove", "crishim")
		}},
		{"it is removed and purged", func(t *testing.T) {
			output(t, "dpkg", "--remove", "crishim")
			k := back(t)
			if _, err := os.Stat(config); err != nil {
				t.Errorf("the configuration: %v", err)
			}
			output(t, "dpkg", "--purge", "crishim")
			onlyThese(t, alone)
			if state := property(t, "crishim.socket", "LoadState"); state != "not-found" {
				t.Errorf("crishim.socket is %s", state)
			}
			archives, err := filepath.Glob(filepath.Join(checkpoints, "*.tar"))
			if err != nil || len(archives) == 0 {
				t.Errorf("archives are %q, %v, and those that were made are to stay", archives, err)
			}
			if err := removeArchives(); err != nil {
				t.Error(err)
			}
			n.Unharmed(t, checkpoints, k.PodLog(t, "counter"))
		}},
		{"the same by rpm", func(t *testing.T) {
			// This is Debian, whose packages rpm does not know: what it needs is not asked for.
			output(t, "rpm", "--install", "--nodeps", rpms[0])
			if state := property(t, "crishim.service", "ActiveState"); state != "inactive" {
				t.Errorf("crishim.service is %s, and was not to be started", state)
			}
			systemctl(t, "enable", "--now", "crishim.socket", "crishim.service")
			output(t, "crishim", "kubelet", "enable")
			back(t)
			pid := property(t, "crishim.service", "MainPID")
			output(t, "rpm", "--upgrade", "--nodeps", "--replacepkgs", rpms[0])
			if now := property(t, "crishim.service", "MainPID"); now == pid || now == "0" {
				t.Errorf("crishim is process %s after an upgrade, and was %s", now, pid)
			}
			staysWhileNeeded(t, "rpm", "--erase", "--nodeps", "crishim")
			output(t, "rpm", "--erase", "--nodeps", "crishim")
			k := back(t)
			// rpm knows no purge.
			output(t, "find", "/var/lib/crishim", "-mindepth", "1", "-delete")
			onlyThese(t, alone)
			n.Unharmed(t, checkpoints, k.PodLog(t, "counter"))
			if err := k.RemovePod(t.Context(), "counter"); err != nil {
				t.Error(err)
			}
		}},
	} {
		if !t.Run(part.name, part.test) {
			t.FailNow()
		}
	}
}

// setAside moves away what make install has put into this machine, until the test is over.
func setAside(t *testing.T) {
	t.Helper()
	systemctl(t, "stop", "crishim.service", "crishim.socket")
	own, err := filepath.Glob("/usr/local/lib/systemd/system/crishim.*")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range append(own, "/usr/local/bin/crishim", "/etc/crishim") {
		away := path + ".aside"
		if strings.HasPrefix(path, "/usr/local/lib/systemd") {
			away = filepath.Join("/usr/local/lib", filepath.Base(path)+".aside")
		}
		output(t, "mv", path, away) // which copies where the file system cannot rename
		t.Cleanup(func() {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
			output(t, "mv", away, path)
		})
	}
	t.Cleanup(func() { systemctl(t, "daemon-reload") })
	systemctl(t, "daemon-reload")
	// What a crishim of an earlier test has left: the state's directory itself may be a mount point.
	output(t, "find", "/var/lib/crishim", "-mindepth", "1", "-delete")
	if err := os.RemoveAll("/run/crishim"); err != nil {
		t.Fatal(err)
	}
}

// likeKubeadm makes of the machine's kubelet.service one as Kubernetes' packages and kubeadm have it, with the same flags.
func likeKubeadm(t *testing.T) {
	t.Helper()
	const unit = "/etc/systemd/system/kubelet.service"
	_, line, _ := strings.Cut(read(t, unit), "ExecStart="+node.KubeletPath+" ")
	flags, _, ok := strings.Cut(line, " $KUBELET_EXTRA_ARGS")
	if !ok {
		t.Fatalf("%s is not as it was thought:\n%s", unit, read(t, unit))
	}
	if err := os.Remove(unit); err != nil {
		t.Fatal(err)
	}
	// What kubeadm's kubelet.service and 10-kubeadm.conf are, but for credentials: there is no API server.
	write(t, "/usr/lib/systemd/system/kubelet.service", `[Unit]
Description=kubelet: The Kubernetes Node Agent

[Service]
ExecStart=/usr/local/lib/kubelet/kubelet
Restart=always
StartLimitInterval=0
RestartSec=10

[Install]
WantedBy=multi-user.target
`)
	write(t, kubeadm, `# Note: This dropin only works with kubeadm and kubelet v1.11+
[Service]
Environment="KUBELET_KUBECONFIG_ARGS="
Environment="KUBELET_CONFIG_ARGS=--config=/etc/kubernetes/kubelet.json"
# This is a file that "kubeadm init" and "kubeadm join" generates at runtime, populating the KUBELET_KUBEADM_ARGS variable dynamically
EnvironmentFile=-/var/lib/kubelet/kubeadm-flags.env
# This is a file that the user can use for overrides of the kubelet args as a last resort.
EnvironmentFile=-/etc/default/kubelet
ExecStart=
ExecStart=/usr/local/lib/kubelet/kubelet $KUBELET_KUBECONFIG_ARGS $KUBELET_CONFIG_ARGS $KUBELET_KUBEADM_ARGS $KUBELET_EXTRA_ARGS
`)
	write(t, "/var/lib/kubelet/kubeadm-flags.env", `KUBELET_KUBEADM_ARGS="--container-runtime-endpoint=unix:///run/containerd/containerd.sock"`+"\n")
	write(t, extraArgs, `KUBELET_EXTRA_ARGS="`+flags+"\"\n")
	write(t, "/usr/local/lib/kubelet/kubelet", `#!/bin/sh
# Sometimes it is one that does not come.
case "$*" in *crishim.sock*) [ ! -e `+stubborn+` ] || exec sleep 600 ;; esac
exec `+node.KubeletPath+` "$@"
`)
	if err := os.Chmod("/usr/local/lib/kubelet/kubelet", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		for _, path := range []string{"/usr/lib/systemd/system/kubelet.service", kubeadm, dropIn, "/var/lib/kubelet/kubeadm-flags.env", extraArgs, "/usr/local/lib/kubelet"} {
			if err := os.RemoveAll(path); err != nil {
				t.Error(err)
			}
		}
	})
	systemctl(t, "daemon-reload")
}

// kubeletStatus is what crishim kubelet status says, and fails the test unless the state is the one that is wanted.
func kubeletStatus(t *testing.T, want string) kubelet.Status {
	t.Helper()
	var s kubelet.Status
	out, err := exec.Command("crishim", "kubelet", "status", "--output", "json").Output()
	if jsonErr := json.Unmarshal(out, &s); jsonErr != nil {
		t.Fatalf("%v, %v: %s", jsonErr, err, out)
	}
	if s.State != want || (err == nil) != (want == kubelet.Enabled) {
		t.Fatalf("status is %+v, %v, want %s", s, err, want)
	}
	return s
}

// staysWhileNeeded fails the test unless a command that removes crishim does not, where the kubelet's drop-in has been changed by somebody and so cannot
// be taken away.
func staysWhileNeeded(t *testing.T, remove ...string) {
	t.Helper()
	content := change(t, dropIn, "[Service]\n", "[Service]\nCPUWeight=50\n")
	systemctl(t, "daemon-reload")
	refused(t, "crishim is not removed", remove...)
	systemctl(t, "is-active", "crishim.socket", "crishim.service")
	kubeletStatus(t, kubelet.Enabled)
	write(t, dropIn, content)
	systemctl(t, "daemon-reload")
}

// onlyThese fails the test unless there is again of crishim's and the switch's what there was before the package.
func onlyThese(t *testing.T, before []string) {
	t.Helper()
	if now := files(t); !slices.Equal(now, before) {
		t.Errorf("there is\n%s\nand before the package there was\n%s", strings.Join(now, "\n"), strings.Join(before, "\n"))
	}
}

// refused fails the test unless a command fails and says something.
func refused(t *testing.T, want string, command ...string) {
	t.Helper()
	out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), want) {
		t.Fatalf("%q: %v, want a failure that says %q:\n%s", command, err, want, out)
	}
}

// files are the names of all that could be crishim's or the switch's.
func files(t *testing.T) (found []string) {
	t.Helper()
	for _, dir := range []string{"/etc", "/usr", "/var/lib", "/run"} {
		err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if path == "/run/containerd" || path == "/var/lib/containerd" || path == "/var/lib/kubelet" || path == "/usr/local" {
				return fs.SkipDir
			}
			if err == nil && (strings.Contains(path, "crishim") || strings.Contains(path, "kubelet.service")) && !strings.HasSuffix(path, ".aside") {
				found = append(found, path)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	return found
}

func read(t *testing.T, path string) string {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(content)
}

func write(t *testing.T, path, content string) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
		t.Fatal(err)
	}
}

// change replaces something in a file, and returns what the file was.
func change(t *testing.T, path, from, to string) string {
	t.Helper()
	content := read(t, path)
	if !strings.Contains(content, from) {
		t.Fatalf("%s has no %q:\n%s", path, from, content)
	}
	write(t, path, strings.Replace(content, from, to, 1))
	return content
}
