package kubelet

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// running is a node of kubeadm's with a runtime, a crishim and a kubelet, which talks to the runtime.
func running(t *testing.T, more map[string]string) (n *Node, f *fakeSystemd, crishim *runtime) {
	t.Helper()
	n, f = node(t, kubeadm(more))
	serve(t, n.Runtime)
	crishim = serve(t, n.Listen)
	t.Cleanup(f.stop) // before the servers, which would wait for what it has to say
	if err := f.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.restarts = 0
	return n, f, crishim
}

// files are all of a node, by name.
func files(t *testing.T, n *Node) map[string]string {
	t.Helper()
	found := map[string]string{}
	err := filepath.WalkDir(n.Root, func(path string, entry os.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			found[path] = "a directory"
			return err
		}
		content, err := os.ReadFile(path)
		found[path] = string(content)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

func same(t *testing.T, before, after map[string]string) {
	t.Helper()
	for name, content := range after {
		if before[name] != content {
			t.Errorf("%s is not as it was: %q, and was %q", name, content, before[name])
		}
	}
	for name := range before {
		if _, ok := after[name]; !ok {
			t.Errorf("%s is gone", name)
		}
	}
}

// state waits for a state with a note that says each of notes, and no others.
func state(t *testing.T, n *Node, want string, notes ...string) {
	t.Helper()
	var s *Status
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		var err error
		if s, err = n.Status(t.Context()); err != nil {
			t.Fatal(err)
		}
		missing := slices.ContainsFunc(notes, func(note string) bool { return !strings.Contains(strings.Join(s.Notes, "\n"), note) })
		if s.State == want && len(s.Notes) == len(notes) && !missing {
			return
		}
	}
	t.Errorf("it is %s with %q, want %s with %q", s.State, s.Notes, want, notes)
}

// meets waits until the kubelet is connected to an endpoint.
func meets(t *testing.T, f *fakeSystemd, endpoint string) {
	t.Helper()
	err := errNotConnected
	for deadline := time.Now().Add(5 * time.Second); err != nil && time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		err = connected(f.unit.Pid, endpoint)
	}
	if err != nil {
		t.Errorf("the kubelet and %s: %v", endpoint, err)
	}
}

func TestEnableAndDisable(t *testing.T) {
	t.Parallel()
	for name, more := range map[string]map[string]string{
		"by flags": {extraArgs: "KUBELET_EXTRA_ARGS=\"--node-ip=10.0.0.1 --image-service-endpoint=unix:///run/images.sock\"\n"},
		"by the configuration file": {flagsEnv: "", extraArgs: "",
			configFile: "containerRuntimeEndpoint: unix://RUNTIME\n"},
		"with other drop-ins":  {units + "/kubelet.service.d/30-cpu.conf": "[Service]\nCPUWeight=100\n"},
		"over several lines":   {kubeadmDir + "/10-kubeadm.conf": strings.Replace(kubeadmDropIn, "kubelet $KUBELET_KUBE", "kubelet \\\n  $KUBELET_KUBE", 1)},
		"one flag of two wins": {extraArgs: "KUBELET_EXTRA_ARGS=--container-runtime-endpoint=RUNTIME\n", flagsEnv: "KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=/nowhere\n"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, f, _ := running(t, more)
			before := files(t, n)
			state(t, n, Disabled)
			if err := n.Enable(t.Context()); err != nil {
				t.Fatal(err)
			}
			state(t, n, Enabled)
			if last := f.unit.Args[len(f.unit.Args)-1]; last != "--container-runtime-endpoint=unix://"+n.Listen {
				t.Errorf("the kubelet's last word is %s", last)
			}
			after := files(t, n)
			delete(after, n.path(dropInPath))
			delete(after, filepath.Dir(n.path(dropInPath)))
			delete(before, filepath.Dir(n.path(dropInPath)))
			same(t, before, after)
			s, err := n.Status(t.Context())
			if err != nil || !s.Connected || s.DropIn != dropInPath {
				t.Errorf("status is %+v, %v", s, err)
			}
			if name == "by flags" && (s.Image == nil || s.Image.Value != "unix:///run/images.sock") {
				t.Errorf("the image service is %v", s.Image)
			}
			// Once more is nothing.
			if err := n.Enable(t.Context()); err != nil || f.restarts != 1 {
				t.Errorf("enabled again: %v, the kubelet was restarted %d times", err, f.restarts)
			}
			if err := n.Disable(t.Context()); err != nil {
				t.Fatal(err)
			}
			state(t, n, Disabled)
			after = files(t, n)
			delete(after, filepath.Dir(n.path(dropInPath)))
			same(t, before, after)
			if err := n.Disable(t.Context()); err != nil || f.restarts != 2 {
				t.Errorf("disabled again: %v, the kubelet was restarted %d times", err, f.restarts)
			}
		})
	}
}

// The directory goes if it was made, and stays if it was not.
func TestTheDirectoryOfTheDropIn(t *testing.T) {
	t.Parallel()
	n, _, _ := running(t, nil)
	before := files(t, n)
	for range 2 { // what is enabled twice still knows that it was made
		if err := n.Enable(t.Context()); err != nil {
			t.Fatal(err)
		}
		tree(t, n, map[string]string{kubeadmDir + "/10-kubeadm.conf": strings.Replace(kubeadmDropIn, "$KUBELET_EXTRA", "--v=3 $KUBELET_EXTRA", 1)})
		if err := n.Systemd.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	tree(t, n, map[string]string{kubeadmDir + "/10-kubeadm.conf": kubeadmDropIn})
	if err := n.Disable(t.Context()); err != nil {
		t.Fatal(err)
	}
	same(t, before, files(t, n))
}

func TestANodeWhoseKubeletDoesNotRun(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	f.stop()
	if err := n.Enable(t.Context()); err != nil {
		t.Fatal(err)
	}
	if f.restarts != 0 {
		t.Error("the kubelet was started")
	}
	state(t, n, Enabled, "not running")
	if err := f.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	state(t, n, Enabled)
}

func TestAKubeletThatDoesNotComeIsPutBack(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	n.Wait = time.Second
	before := files(t, n)
	f.fails = func(endpoint string) bool { return n.isCrishim(endpoint) }
	err := n.Enable(t.Context())
	for _, want := range []string{"no connection in 1s", "active (running)", "journalctl -u kubelet.service", "all is as it was"} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error is %v, want one with %q", err, want)
		}
	}
	same(t, before, files(t, n))
	state(t, n, Disabled)
	if f.restarts != 2 {
		t.Errorf("the kubelet was restarted %d times, want 2", f.restarts)
	}
	meets(t, f, n.Runtime)

	// The same the other way round.
	f.fails = nil
	n.Wait = 10 * time.Second
	if err := n.Enable(t.Context()); err != nil {
		t.Fatal(err)
	}
	before = files(t, n)
	n.Wait = time.Second
	f.fails = func(endpoint string) bool { return !n.isCrishim(endpoint) }
	if err := n.Disable(t.Context()); err == nil || !strings.Contains(err.Error(), "all is as it was") {
		t.Errorf("error is %v", err)
	}
	same(t, before, files(t, n))
	state(t, n, Enabled)
}

// Whoever interrupts it gets the kubelet as it was.
func TestAnInterruptionIsPutBack(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	before := files(t, n)
	ctx, cancel := context.WithCancelCause(t.Context())
	f.fails = func(endpoint string) bool {
		cancel(errors.New("interrupted"))
		return n.isCrishim(endpoint)
	}
	if err := n.Enable(ctx); err == nil || !strings.Contains(err.Error(), "interrupted") {
		t.Errorf("error is %v", err)
	}
	same(t, before, files(t, n))
	state(t, n, Disabled)
}

func TestASystemdThatFailsIsToldOf(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	before := files(t, n)
	f.failing = errors.New("no")
	if err := n.Enable(t.Context()); err == nil || !strings.Contains(err.Error(), "it was not put back: no") {
		t.Errorf("error is %v", err)
	}
	same(t, before, files(t, n))
}

// What was killed at any step is put right by the same command, and by the other one.
func TestWhatWasKilledHalfway(t *testing.T) {
	t.Parallel()
	for name, halfway := range map[string]func(*testing.T, *Node, *fakeSystemd, *dropIn){
		"a file that was begun": func(t *testing.T, n *Node, _ *fakeSystemd, d *dropIn) {
			tree(t, n, map[string]string{filepath.Dir(dropInPath) + "/.20-crishim.conf.new": d.String()[:20]})
		},
		"a file that systemd has not read": func(t *testing.T, n *Node, f *fakeSystemd, d *dropIn) {
			if err := n.writeDropIn(d); err != nil {
				t.Fatal(err)
			}
			f.unit.Outdated = true
		},
		"a kubelet that was not restarted": func(t *testing.T, n *Node, f *fakeSystemd, d *dropIn) {
			if err := errors.Join(n.writeDropIn(d), f.Reload(t.Context())); err != nil {
				t.Fatal(err)
			}
		},
		"a file that is gone, of which systemd has not been told": func(t *testing.T, n *Node, f *fakeSystemd, d *dropIn) {
			if err := errors.Join(n.writeDropIn(d), f.Reload(t.Context()), f.Restart(t.Context()), n.writeDropIn(nil)); err != nil {
				t.Fatal(err)
			}
			f.unit.Outdated = true
		},
		"a kubelet that was not restarted after that": func(t *testing.T, n *Node, f *fakeSystemd, d *dropIn) {
			err := errors.Join(n.writeDropIn(d), f.Reload(t.Context()), f.Restart(t.Context()), n.writeDropIn(nil), f.Reload(t.Context()))
			if err != nil {
				t.Fatal(err)
			}
		},
	} {
		for command, want := range map[string]string{"enable": Enabled, "disable": Disabled} {
			t.Run(name+", "+command, func(t *testing.T) {
				t.Parallel()
				n, f, _ := running(t, map[string]string{units + "/kubelet.service.d/30-cpu.conf": "[Service]\nCPUWeight=100\n"})
				before := files(t, n)
				line, err := n.command(&f.unit)
				if err != nil {
					t.Fatal(err)
				}
				halfway(t, n, f, &dropIn{command: line, endpoint: address(n.Listen), before: Setting{"x", "y"}})
				run := map[string]func(context.Context) error{"enable": n.Enable, "disable": n.Disable}[command]
				if err := run(t.Context()); err != nil {
					t.Fatal(err)
				}
				state(t, n, want)
				endpoint := n.Listen
				if command == "disable" {
					same(t, before, files(t, n))
					endpoint = n.Runtime
				}
				meets(t, f, endpoint)
			})
		}
	}
}

func TestEnableRefuses(t *testing.T) {
	t.Parallel()
	for name, test := range map[string]struct {
		more   map[string]string
		change func(*testing.T, *Node, *runtime)
		want   string
	}{
		"another runtime": {map[string]string{flagsEnv: "KUBELET_KUBEADM_ARGS=--container-runtime-endpoint=unix:///run/other.sock\n"}, nil,
			"the kubelet uses unix:///run/other.sock (--container-runtime-endpoint in " + flagsEnv + "), and crishim relays to"},
		"a crishim that relays to another": {nil, func(_ *testing.T, _ *Node, crishim *runtime) { crishim.version.Store("2") }, "relays to fake 2, and fake 1 is at"},
		"no crishim":                       {nil, func(_ *testing.T, n *Node, _ *runtime) { n.Listen += ".not" }, "start crishim.socket and crishim.service"},
		"a script":                         {map[string]string{kubeadmDir + "/10-kubeadm.conf": "[Service]\nExecStart=\nExecStart=/bin/sh -c kubelet\n"}, nil, "runs /bin/sh, not a kubelet itself"},
		"a drop-in after ours": {map[string]string{units + "/kubelet.service.d/90-x.conf": strings.ReplaceAll(kubeadmDropIn, "Environment", "#")}, nil,
			"90-x.conf sets ExecStart="},
		"a drop-in by somebody else": {map[string]string{dropInPath: "[Service]\nEnvironment=KUBELET_EXTRA_ARGS=--v=3\n"}, nil, "crishim has not made it"},
		"CRI-O's statistics": {nil, func(t *testing.T, n *Node, _ *runtime) {
			link := n.path("/run/crio")
			if err := os.MkdirAll(link, 0o755); err != nil {
				t.Fatal(err)
			}
			n.Listen = filepath.Join(link, "crio.sock")
		}, "must both end so, or neither"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n, f, crishim := running(t, nil)
			tree(t, n, test.more)
			if err := f.Reload(t.Context()); err != nil {
				t.Fatal(err)
			}
			if test.change != nil {
				test.change(t, n, crishim)
			}
			before := files(t, n)
			err := n.Enable(t.Context())
			if err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want a line with %q", err, test.want)
			}
			same(t, before, files(t, n))
			if f.restarts != 0 {
				t.Error("the kubelet was restarted")
			}
		})
	}
}

func TestThereIsNoKubelet(t *testing.T) {
	n, _ := node(t, nil)
	if err := n.Enable(t.Context()); !errors.Is(err, errNoUnit) {
		t.Errorf("enable: %v", err)
	}
	if _, err := n.Status(t.Context()); !errors.Is(err, errNoUnit) {
		t.Errorf("status: %v", err)
	}
	// A package must be able to go where there is none.
	if err := n.Disable(t.Context()); err != nil {
		t.Errorf("disable: %v", err)
	}
}

func TestStatusNoticesWhatHasChanged(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	if err := n.Enable(t.Context()); err != nil {
		t.Fatal(err)
	}
	reload := func() {
		t.Helper()
		if err := f.Reload(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	restart := func() {
		t.Helper()
		reload()
		if err := f.Restart(t.Context()); err != nil {
			t.Fatal(err)
		}
	}

	// A file of variables cannot win.
	tree(t, n, map[string]string{extraArgs: "KUBELET_EXTRA_ARGS=--container-runtime-endpoint=RUNTIME\n"})
	restart()
	state(t, n, Enabled)

	// A drop-in can.
	later := units + "/kubelet.service.d/90-x.conf"
	tree(t, n, map[string]string{later: "[Service]\nExecStart=\nExecStart=/usr/bin/kubelet $KUBELET_EXTRA_ARGS\n"})
	reload()
	state(t, n, Overwritten, "in spite of "+dropInPath, "when it is started again", "90-x.conf sets ExecStart=")
	restart()
	state(t, n, Overwritten, "in spite of "+dropInPath, "90-x.conf sets ExecStart=")
	if err := os.Remove(n.path(later)); err != nil {
		t.Fatal(err)
	}
	reload()
	state(t, n, Overwritten, "when it is started again")
	restart()
	state(t, n, Enabled)

	// A new package has another command line.
	tree(t, n, map[string]string{kubeadmDir + "/10-kubeadm.conf": strings.Replace(kubeadmDropIn, "$KUBELET_EXTRA", "--v=3 $KUBELET_EXTRA", 1)})
	reload()
	state(t, n, Enabled, "run crishim kubelet enable again")
	if err := n.Enable(t.Context()); err != nil {
		t.Fatal(err)
	}
	state(t, n, Enabled)

	// Somebody has changed the drop-in by hand: it is not removed.
	content, err := os.ReadFile(n.path(dropInPath))
	if err != nil {
		t.Fatal(err)
	}
	tree(t, n, map[string]string{dropInPath: strings.Replace(string(content), "--v=3 $KUBELET_EXTRA_ARGS --", "--v=4 $KUBELET_EXTRA_ARGS --", 1)})
	reload()
	state(t, n, Enabled, "has been changed since")
	for name, run := range map[string]func(context.Context) error{"enable": n.Enable, "disable": n.Disable} {
		if err := run(t.Context()); err == nil || !strings.Contains(err.Error(), `+"ExecStart=/usr/bin/kubelet`) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: error is %v, want a line that shows the change", name, err)
		}
	}
}

// Who has pointed the kubelet at crishim otherwise is told of it: without crishim, the node would have no runtime.
func TestPointedAtCrishimByHand(t *testing.T) {
	t.Parallel()
	n, f, _ := running(t, nil)
	tree(t, n, map[string]string{extraArgs: "KUBELET_EXTRA_ARGS=--container-runtime-endpoint=unix://CRISHIM\n"})
	if err := f.Restart(t.Context()); err != nil {
		t.Fatal(err)
	}
	f.restarts = 0
	state(t, n, Enabled, "not by crishim kubelet enable, but by --container-runtime-endpoint in "+extraArgs)
	if err := n.Enable(t.Context()); err != nil {
		t.Error(err)
	}
	if err := n.Disable(t.Context()); err == nil || !strings.Contains(err.Error(), "change it there") {
		t.Errorf("error is %v", err)
	}
	if f.restarts != 0 {
		t.Error("the kubelet was restarted")
	}
}

func TestTwoAtOnce(t *testing.T) {
	n, _, _ := running(t, nil)
	unlock, err := n.lock()
	if err != nil {
		t.Fatal(err)
	}
	defer unlock()
	if err := n.Enable(t.Context()); err == nil || !strings.Contains(err.Error(), "another crishim kubelet is at work") {
		t.Errorf("error is %v", err)
	}
}
