package container

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

func TestParseStat(t *testing.T) {
	tests := []struct {
		name, stat string
		ended      bool
		start      uint64
		fails      bool
	}{
		{"plain", "7 (sh) S 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 424242 9 9", false, 424242, false},
		{"a name that tries to pass for fields", "7 (a) Z 1 2 3 (b) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 31 9", false, 31, false},
		{"a zombie", "7 (sh) Z 1 7 7 0 -1 4227084 1 2 3 4 5 6 7 8 20 0 1 0 31 9", true, 31, false},
		{"an init at its end that waits for others", "7 (sh) S 1 7 7 0 -1 4195596 1 2 3 4 5 6 7 8 20 0 1 0 31 9", true, 31, false},
		{"no flags", "7 (sh) S 1 7 7 0 -1 x 1 2 3 4 5 6 7 8 20 0 1 0 31 9", false, 0, true},
		{"cut off", "7 (sh) S 1 7", false, 0, true},
		{"no name", "7", false, 0, true},
		{"empty", "", false, 0, true},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ended, start, err := parseStat([]byte(test.stat))
			if (err != nil) != test.fails {
				t.Fatalf("error is %v", err)
			}
			if err == nil && (ended != test.ended || start != test.start) {
				t.Errorf("got %t %d, want %t %d", ended, start, test.ended, test.start)
			}
		})
	}
}

func FuzzParseStat(f *testing.F) {
	f.Add([]byte("7 (a) Z (b) R 1 7 7 0 -1 4194304 1 2 3 4 5 6 7 8 20 0 1 0 31 9"))
	f.Add([]byte(")"))
	f.Fuzz(func(_ *testing.T, stat []byte) { _, _, _ = parseStat(stat) })
}

func TestProcess(t *testing.T) {
	cmd := exec.Command("sleep", "1000")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	}
	defer end()
	p, err := FindProcess(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Verify(); err != nil {
		t.Errorf("verify the same process: %v", err)
	}
	for name, other := range map[string]Process{
		"start time": {Pid: p.Pid, StartTime: p.StartTime + 1, Cgroup: p.Cgroup},
		"cgroup":     {Pid: p.Pid, StartTime: p.StartTime, Cgroup: "0::/elsewhere\n"},
	} {
		if err := other.Verify(); !errors.Is(err, ErrNotRunning) {
			t.Errorf("verify with another %s: %v, want ErrNotRunning", name, err)
		}
	}
	pinned, err := p.Pin()
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	if err := pinned.Verify(); err != nil {
		t.Errorf("verify the pinned process: %v", err)
	}
	end()
	// As if its pid had been given to one that looks the same.
	self, err := FindProcess(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	pinned.process = self
	if err := pinned.Verify(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("verify a pinned process that has ended: %v, want ErrNotRunning", err)
	}
	if err := p.Verify(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("verify a process that has ended: %v, want ErrNotRunning", err)
	}
	if _, err := p.Pin(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("pin a process that has ended: %v, want ErrNotRunning", err)
	}
}

func TestVerifyZombie(t *testing.T) {
	cmd := exec.Command("true")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = cmd.Wait() }()
	// The end of its output means that it is exiting, and nobody has waited for it; it is a zombie any moment.
	_, _ = out.Read(make([]byte, 1))
	for {
		_, err := FindProcess(cmd.Process.Pid)
		if errors.Is(err, ErrNotRunning) {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestCgroupPath(t *testing.T) {
	const hybrid = "8:freezer:/kubepods/pod1/c1\n4:cpu,cpuacct:/kubepods/a:b\n1:name=systemd:/s\n0::/unified\n"
	for _, test := range []struct {
		content, controller, want string
		ok                        bool
	}{
		{hybrid, "freezer", "/kubepods/pod1/c1", true},
		{hybrid, "cpuacct", "/kubepods/a:b", true},
		{hybrid, "", "/unified", true},
		{hybrid, "memory", "", false},
		{"0::/x\n", "freezer", "", false},
		{"", "", "", false},
		{"nonsense\n", "freezer", "", false},
	} {
		if got, ok := cgroupPath(test.content, test.controller); got != test.want || ok != test.ok {
			t.Errorf("cgroupPath(%q, %q) = %q, %t; want %q, %t", test.content, test.controller, got, ok, test.want, test.ok)
		}
	}
}

func TestParseInfo(t *testing.T) {
	tests := []struct {
		name, info, want string
		is               error
	}{
		{"cri-dockerd", `{"sandboxID":"s","pid":12}`, "", nil},
		{"containerd", `{"pid":12,"sandboxID":"s","runtimeType":"io.containerd.runc.v2","runtimeOptions":null}`, "", nil},
		{"an unknown field of another type", `{"pid":12,"config":7}`, "", nil},
		{"kata", `{"pid":12,"runtimeType":"io.containerd.kata.v2"}`, "io.containerd.kata.v2", ErrUnsupported},
		{"no pid", `{}`, "no pid", ErrNotRunning},
		{"negative pid", `{"pid":-1}`, "no pid", ErrNotRunning},
		{"not JSON", `pid=12`, "parse verbose container status", nil},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			_, err := parseInfo(map[string]string{"info": test.info})
			checkError(t, err, test.want, test.is)
		})
	}
	_, err := parseInfo(nil)
	checkError(t, err, `no "info"`, ErrUnsupported)
}

func checkError(t *testing.T, err error, want string, is error) {
	t.Helper()
	switch {
	case want == "" && err != nil:
		t.Errorf("error is %v, want none", err)
	case want != "" && (err == nil || !strings.Contains(err.Error(), want)):
		t.Errorf("error is %v, want one with %q", err, want)
	case is != nil && !errors.Is(err, is):
		t.Errorf("error %v is not %v", err, is)
	}
}

func TestStates(t *testing.T) {
	got, err := runcState([]byte(`{"id":"c","init_process_pid":12,"init_process_start":34,"cgroup_paths":{"freezer":"/sys/fs/cgroup/freezer/c"},"external_descriptors":["/dev/null","pipe:[1]","pipe:[2]"]}`))
	want := state{runtime: "runc", pid: 12, startTime: 34, cgroup: map[string]string{"freezer": "/sys/fs/cgroup/freezer/c"}, descriptors: []string{"/dev/null", "pipe:[1]", "pipe:[2]"}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("runcState = %+v, %v; want %+v", got, err, want)
	}
	got, err = crunState([]byte(`{"pid":12,"process-start-time":34,"cgroup-path":"/c","external_descriptors":"[\"/dev/null\",\"pipe:[1]\",\"pipe:[2]\"]"}`))
	want = state{runtime: "crun", pid: 12, startTime: 34, cgroup: map[string]string{"freezer": "/sys/fs/cgroup/freezer/c", "": "/sys/fs/cgroup/c"}, descriptors: want.descriptors}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("crunState = %+v, %v; want %+v", got, err, want)
	}
	for name, read := range map[string]func([]byte) (state, error){"runc": runcState, "crun": crunState} {
		for _, content := range []string{"", "{", "[]"} {
			if _, err := read([]byte(content)); err == nil {
				t.Errorf("%s state %q: no error", name, content)
			}
		}
	}
}

func TestParsePPid(t *testing.T) {
	for status, want := range map[string]int{
		"Name:\ta\\nPPid:\t7\nState:\tS\nPPid:\t12\nTracerPid:\t0\n": 12,
		"PPid:\t0\n": 0,
	} {
		if got, err := parsePPid([]byte(status)); err != nil || got != want {
			t.Errorf("parsePPid(%q) = %d, %v; want %d", status, got, err, want)
		}
	}
	for _, status := range []string{"", "Name:\ta\n", "PPid:\tx\n"} {
		if _, err := parsePPid([]byte(status)); err == nil {
			t.Errorf("parsePPid(%q): no error", status)
		}
	}
}

// write makes files below a directory, by their names.
func write(t *testing.T, dir string, files map[string]string) {
	t.Helper()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestFindBundleAndState(t *testing.T) {
	process := Process{Pid: 12, StartTime: 34}
	const runc = `{"init_process_pid":12,"init_process_start":34}`
	for _, test := range []struct {
		name    string
		files   map[string]string // ROOT in their content is the directory's path
		runtime string
		want    string
		is      error
	}{
		{"Docker's", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"binary_name":"runc","root":"ROOT/runtime-runc"}`,
			"runtime-runc/moby/c/state.json": runc,
		}, "runc", "", nil},
		{"crun", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"root":"ROOT/crun"}`,
			"crun/moby/c/status": `{"pid":12,"process-start-time":34,"external_descriptors":"[]"}`,
		}, "crun", "", nil},
		{"no bundle", nil, "", `it is run by "shim" (process 7), which keeps no bundle for it at ROOT/task/moby/c`, ErrUnsupported},
		{"no state", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"root":"ROOT/none"}`,
		}, "", `it is run by "shim" (process 7), and in ROOT/none/moby/c there is neither`, ErrUnsupported},
		{"state in the default root only", map[string]string{"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{}`}, "",
			"/run/containerd/runc/moby/c", ErrUnsupported},
		{"no options", map[string]string{"task/moby/c/config.json": "{}"}, "", "/run/containerd/runc/moby/c", ErrUnsupported},
		{"options that are none", map[string]string{"task/moby/c/config.json": "{}", "task/moby/c/options.json": `[]`}, "",
			"parse options of the shim in ROOT/task/moby/c/options.json", nil},
		{"of another container", map[string]string{
			"task/moby/d/config.json": "{}", "task/moby/d/options.json": `{"root":"ROOT/r"}`, "r/moby/d/state.json": runc,
		}, "", "no bundle", ErrUnsupported},
		{"of another namespace", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"root":"ROOT/r"}`, "r/k8s.io/c/state.json": runc,
		}, "", "neither", ErrUnsupported},
		{"of another process", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"root":"ROOT/r"}`,
			"r/moby/c/state.json": `{"init_process_pid":13,"init_process_start":34}`,
		}, "", "process 12, which the runtime names, is not the one of which ROOT/r/moby/c/state.json tells", ErrNotRunning},
		{"of an earlier process with the same pid", map[string]string{
			"task/moby/c/config.json": "{}", "task/moby/c/options.json": `{"root":"ROOT/r"}`,
			"r/moby/c/state.json": `{"init_process_pid":12,"init_process_start":33}`,
		}, "", "not the one", ErrNotRunning},
	} {
		t.Run(test.name, func(t *testing.T) {
			root := t.TempDir()
			for name, content := range test.files {
				write(t, root, map[string]string{name: strings.ReplaceAll(content, "ROOT", root)})
			}
			// The shim works in the bundle of the pod, a neighbour.
			shim := parent{name: `"shim" (process 7)`, dir: filepath.Join(root, "task/moby/pod")}
			bundle, err := findBundle("c", shim)
			var o options
			if err == nil {
				o, err = readOptions(bundle)
			}
			var got state
			if err == nil {
				got, err = findState(o.Root, bundle, process, shim)
			}
			checkError(t, err, strings.ReplaceAll(test.want, "ROOT", root), test.is)
			if got.runtime != test.runtime {
				t.Errorf("runtime is %q, want %q", got.runtime, test.runtime)
			}
		})
	}
}

func TestFindParent(t *testing.T) {
	dir := t.TempDir()
	// A shim in all but its deeds: what counts of it is its name and its directory.
	cmd := exec.Command("sh", "-c", "sleep 1000 & echo $!; wait")
	cmd.Args[0], cmd.Dir = "/opt/kata/bin/containerd-shim-kata-v2", dir
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var child int
	_, err = fmt.Fscan(out, &child)
	defer func() {
		if child > 0 {
			_ = unix.Kill(child, unix.SIGKILL)
		}
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err != nil {
		t.Fatal(err)
	}
	shim, err := findParent(child)
	if err != nil {
		t.Fatal(err)
	}
	if want := fmt.Sprintf(`"containerd-shim-kata-v2" (process %d)`, cmd.Process.Pid); shim.name != want || shim.dir != dir {
		t.Errorf("got %+v, want %s in %s", shim, want, dir)
	}
	_, err = findBundle("c", shim)
	checkError(t, err, "it is run by "+shim.name, ErrUnsupported)
}

func TestFindLog(t *testing.T) {
	root := t.TempDir()
	write(t, root, map[string]string{
		"docker/containers/c/c-json.log": "{}", "docker/containers/d/d-json.log": "{}", "docker/containers/c/config.v2.json": "{}",
		"pods/regular.log": "", "shadow": "",
	})
	rootfs := filepath.Join(root, "docker/overlay2/name/merged")
	own := filepath.Join(root, "docker/containers/c/c-json.log")
	for _, test := range []struct{ name, target, want, err string }{
		{"regular", "", filepath.Join(root, "pods/regular.log"), ""},
		{"own", own, own, ""},
		{"anywhere", filepath.Join(root, "shadow"), "", "shadow"},
		{"relative", "../docker/containers/c/c-json.log", "", `a link to "../docker`},
		{"other", filepath.Join(root, "docker/containers/d/d-json.log"), "", "d-json.log"},
		{"config", filepath.Join(root, "docker/containers/c/config.v2.json"), "", "config.v2.json"},
		{"dots", filepath.Join(root, "docker/containers/c/") + "/../c/c-json.log", "", "/../c/"},
		{"newline", "a\nb", "", `"a\nb"`},
		{"long", strings.Repeat("x", 4000), "", strings.Repeat("x", 128) + `", and not`},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(root, "pods", test.name+".log")
			if test.target != "" {
				if err := os.Symlink(test.target, path); err != nil {
					t.Fatal(err)
				}
			}
			got, err := findLog(path, "c", rootfs)
			checkError(t, err, test.err, nil)
			if got != test.want {
				t.Errorf("log is %q, want %q", got, test.want)
			}
			if err != nil && (!errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), path)) {
				t.Errorf("error %v is not ErrUnsupported or does not name %s", err, path)
			}
		})
	}
	for _, path := range []string{"", filepath.Join(root, "pods/none.log")} {
		if got, err := findLog(path, "c", rootfs); got != "" || err != nil {
			t.Errorf("findLog(%q) = %q, %v", path, got, err)
		}
	}
	// As Docker has it with containerd's snapshotters.
	if got := dockerLog("c", "/var/lib/docker/rootfs/overlayfs/c"); got != "/var/lib/docker/containers/c/c-json.log" {
		t.Errorf("dockerLog gives %s", got)
	}
}

func TestFrozen(t *testing.T) {
	for name, test := range map[string]struct {
		files map[string]string
		want  bool
	}{
		"v1, thawed":                   {map[string]string{"freezer.state": "THAWED\n"}, false},
		"v1, frozen":                   {map[string]string{"freezer.state": "FROZEN\n"}, true},
		"v1, being frozen":             {map[string]string{"freezer.state": "FREEZING\n"}, true},
		"v2, thawed":                   {map[string]string{"cgroup.freeze": "0\n", "cgroup.events": "populated 1\nfrozen 0\n"}, false},
		"v2, frozen":                   {map[string]string{"cgroup.freeze": "1\n", "cgroup.events": "populated 1\nfrozen 1\n"}, true},
		"v2, being frozen":             {map[string]string{"cgroup.freeze": "1\n", "cgroup.events": "populated 1\nfrozen 0\n"}, true},
		"v2, frozen by a cgroup above": {map[string]string{"cgroup.freeze": "0\n", "cgroup.events": "populated 1\nfrozen 1\n"}, true},
	} {
		dir := t.TempDir()
		write(t, dir, test.files)
		if got, err := frozen(dir); err != nil || got != test.want {
			t.Errorf("%s: frozen = %t, %v; want %t", name, got, err, test.want)
		}
	}
	if _, err := frozen(t.TempDir()); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a cgroup that is gone: error is %v, want ErrNotExist", err)
	}
}

func TestResolveStaysInTheRootFileSystem(t *testing.T) {
	rootfs := t.TempDir()
	for link, target := range map[string]string{"run-link": "/run", "escape": "../../../../etc", "loop": "loop"} {
		if err := os.Symlink(target, filepath.Join(rootfs, link)); err != nil {
			t.Fatal(err)
		}
	}
	for destination, want := range map[string]string{
		"/plain/dir": "/plain/dir", "/run-link/secrets": "/run/secrets", "/escape/passwd": "/etc/passwd", "/": "/", "/a/../b": "/b",
	} {
		if got, err := resolve(rootfs, destination); err != nil || got != want {
			t.Errorf("resolve(%s) = %s, %v; want %s", destination, got, err, want)
		}
	}
	if _, err := resolve(rootfs, "/loop/x"); err == nil {
		t.Error("no error for a loop of links")
	}
}

func TestNotRunning(t *testing.T) {
	err := notRunning(&runtimeapi.ContainerStatus{
		Id: "0123456789abcdef", Metadata: &runtimeapi.ContainerMetadata{Name: "web"},
		State: runtimeapi.ContainerState_CONTAINER_EXITED, ExitCode: 3,
	})
	const want = "container is not running: web (0123456789ab) is exited, with code 3; only a running container can be checkpointed"
	if !errors.Is(err, ErrNotRunning) || err.Error() != want {
		t.Errorf("got %v, want %s", err, want)
	}
}
