package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/creack/pty"

	"crishim/test/documents"
	"crishim/test/node"
)

// operator is somebody at a shell of the node.
type operator struct {
	*node.Node
	t *testing.T
}

// crishim is where node.StartCrishim has the binary, in the node.
const crishim = "/run/bin-crishim"

// run runs a command of crishim's, and returns what it prints and its exit code.
func (o operator) run(args ...string) (stdout, stderr string, code int) {
	o.t.Helper()
	return o.start(o.Command(o.t.Context(), crishim, args...))
}

func (o operator) start(cmd *exec.Cmd) (stdout, stderr string, code int) {
	o.t.Helper()
	var out, errs bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errs
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		o.t.Fatal(err)
	}
	return out.String(), errs.String(), cmd.ProcessState.ExitCode()
}

// must is run for what is to succeed.
func (o operator) must(args ...string) string {
	o.t.Helper()
	stdout, stderr, code := o.run(args...)
	if code != 0 {
		o.t.Fatalf("crishim %q: exit code %d, %s%s", args, code, stdout, stderr)
	}
	return stdout
}

// listed is what the tests want to know of crishim list --output json.
type listed struct {
	Checkpoint struct {
		ID       string
		Caller   struct{ Process, Interface string }
		Pod      string
		Location string
		Code     int
		Deleted  string
	}
}

func (o operator) list() []listed {
	o.t.Helper()
	var answer struct{ Checkpoints []listed }
	if err := json.Unmarshal([]byte(o.must("list", "--output", "json")), &answer); err != nil {
		o.t.Fatal(err)
	}
	return answer.Checkpoints
}

func TestAnOperatorsCommands(t *testing.T) {
	n, binary := start(t, node.Options{})
	k := startKubelet(t, n, "", node.CrishimSocket)
	runPod(t, k, node.Pod{Name: "large", Command: []string{"/bin/workload", "memory", "512"}})
	output := n.PodLogFile(k.PodName("large"), "large")
	node.WaitCount(t, 0, output)
	counter, large := "default/"+k.PodName("counter"), "default/"+k.PodName("large")
	o := operator{n, t}

	paths, err := k.Checkpoint(t.Context(), k.PodName("counter"), "counter", 0)
	if err != nil || len(paths) != 1 {
		t.Fatalf("the kubelet's checkpoint gives %q, %v", paths, err)
	}
	t.Run("checkpoint, where the kubelet would have it", func(t *testing.T) {
		o := operator{n, t}
		stdout, stderr, code := o.run("checkpoint", counter)
		form := fmt.Sprintf(`^/var/lib/kubelet/checkpoints/checkpoint-%s_default-counter-\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S+\.tar\n$`, k.PodName("counter"))
		if code != 0 || !regexp.MustCompile(form).MatchString(stdout) {
			t.Fatalf("exit code %d, it prints %q and %q", code, stdout, stderr)
		}
		if info, err := os.Stat(n.Path(strings.TrimSpace(stdout))); err != nil || info.Mode() != 0o600 {
			t.Errorf("the archive is %v, %v", info, err)
		}
		var phases []string
		for line := range strings.Lines(stderr) {
			phase, _, _ := strings.Cut(line, ":")
			if !slices.Contains(phases, phase) {
				phases = append(phases, phase)
			}
		}
		want := []string{"copy files", "dump memory", "copy changes", "make archive", "sync to disk"}
		if !slices.Equal(phases, want) || strings.Contains(stderr, "\x1b") {
			t.Errorf("it tells of %q, want %q, without escape sequences:\n%s", phases, want, stderr)
		}
	})
	t.Run("checkpoint of a short id, at a relative path", func(t *testing.T) {
		o := operator{n, t}
		id := containerID(t, dial(t, n), "counter")
		if stdout := o.must("checkpoint", id[:13], "-o", "data/mine.tar"); stdout != "/data/mine.tar\n" {
			t.Errorf("it prints %q", stdout)
		}
		_, stderr, code := o.run("checkpoint", id, "-o", "/data/mine.tar")
		if code != 1 || strings.Count(stderr, "\n") != 1 || !strings.Contains(stderr, "remove it or choose another name (AlreadyExists)") {
			t.Errorf("once more: exit code %d with %q", code, stderr)
		}
	})
	t.Run("list, whoever has asked, also after a restart", func(t *testing.T) {
		o := operator{n, t}
		before := o.list()
		var asked []string
		for _, l := range before {
			if l.Checkpoint.Pod != k.PodName("counter") && l.Checkpoint.Code == 0 {
				t.Errorf("one is of %q", l.Checkpoint.Pod)
			}
			asked = append(asked, l.Checkpoint.Caller.Interface)
		}
		if want := []string{"INTERFACE_CRI", "INTERFACE_ADMIN", "INTERFACE_ADMIN", "INTERFACE_ADMIN"}; !slices.Equal(asked, want) {
			t.Fatalf("they were asked for at %q, want %q", asked, want)
		}
		if process := before[0].Checkpoint.Caller.Process; !strings.HasPrefix(process, "kubelet") || before[0].Checkpoint.Location != paths[0] {
			t.Errorf("the first is %+v", before[0])
		}
		n.Daemon("crishim").Kill()
		if _, err := n.StartCrishim(t.Context(), binary); err != nil {
			t.Fatal(err)
		}
		if after := o.list(); !slices.Equal(after, before) {
			t.Errorf("after a restart it has %+v, before it had %+v", after, before)
		}
		if table := o.must("list"); strings.Count(table, "\n") != 5 || !strings.Contains(table, "AlreadyExists: ") {
			t.Errorf("the table is\n%s", table)
		}
	})
	t.Run("a terminal gets bars", func(t *testing.T) {
		o := operator{n, t}
		cmd := n.Command(t.Context(), crishim, "checkpoint", large, "-o", "/data/terminal.tar")
		cmd.Env = append(slices.Clone(cmd.Env), "TERM=xterm")
		terminal, err := pty.StartWithSize(cmd, &pty.Winsize{Rows: 24, Cols: 140})
		if err != nil {
			t.Fatal(err)
		}
		defer terminal.Close()
		shown, _ := io.ReadAll(terminal) // EIO, when nobody has the other end any more
		if err := cmd.Wait(); err != nil {
			t.Errorf("%v: it shows %q", err, shown)
		}
		for _, words := range []string{"dump memory", "iB/s" /* the disk says which */, "frozen ", "[====", "done", "/data/terminal.tar\r\n", "\x1b["} {
			if !strings.Contains(string(shown), words) {
				t.Errorf("the terminal lacks %q", words)
			}
		}
		t.Logf("%s", shown)
		o.must("delete", "/data/terminal.tar")
	})
	t.Run("Ctrl-C rolls back", func(t *testing.T) {
		o := operator{n, t}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		type result struct {
			stdout, stderr string
			code           int
		}
		var cmd *exec.Cmd
		results := make(chan result, 1)
		held, ended := hold(t, n, "/data", func() error {
			cmd = n.Command(ctx, crishim, "checkpoint", large, "-o", archived)
			var r result
			r.stdout, r.stderr, r.code = o.start(cmd)
			select {
			case <-results: // one that could not be held
			default:
			}
			results <- r
			return nil
		})
		interrupt(t, n)
		held.RollBack(t)
		<-ended
		r := <-results
		if r.code != 130 || r.stdout != "" || !strings.Contains(r.stderr, "the container runs on (Canceled)") {
			t.Errorf("exit code %d, it prints %q and %q", r.code, r.stdout, r.stderr)
		}
		if err := os.Remove(n.Path("/data/mine.tar")); err != nil {
			t.Error(err)
		}
		n.Unharmed(t, "/data", output)
	})
	t.Run("cancel of the kubelet's", func(t *testing.T) {
		o := operator{n, t}
		held, ended := hold(t, n, checkpoints, func() error {
			_, err := k.Checkpoint(t.Context(), k.PodName("large"), "large", 0)
			return err
		})
		all := o.list()
		said := make(chan string, 1)
		go func() {
			stdout, err := n.Output(t.Context(), crishim, "cancel", all[len(all)-1].Checkpoint.ID)
			said <- fmt.Sprint(stdout, err)
		}()
		held.RollBack(t)
		if err := <-ended; err == nil || !strings.Contains(err.Error(), "an operator has cancelled it") {
			t.Errorf("the kubelet is told %v", err)
		}
		if words := <-said; !strings.Contains(words, "the container runs on\n<nil>") {
			t.Errorf("cancel says %q", words)
		}
		node.WaitMore(t, output)
	})
	t.Run("delete", func(t *testing.T) {
		o := operator{n, t}
		first := o.list()[0].Checkpoint
		if stdout := o.must("delete", first.ID); stdout != paths[0]+"\n" {
			t.Errorf("it prints %q", stdout)
		}
		if _, err := os.Lstat(n.Path(paths[0])); !os.IsNotExist(err) {
			t.Errorf("the archive: %v", err)
		}
		if err := os.WriteFile(n.Path("/data/other.tar"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, stderr, code := o.run("delete", "/data/other.tar"); code != 1 || !strings.Contains(stderr, "only what it has made can be deleted") {
			t.Errorf("somebody else's: exit code %d with %q", code, stderr)
		}
	})
	t.Run("check", func(t *testing.T) {
		o := operator{n, t}
		stdout := o.must("check", counter+"/counter")
		for _, words := range []string{"This node\n✓ CRIU", "\nThe container\n✓ container", "✓ size", "by checkpoint ", "✓ network"} {
			if !strings.Contains(stdout, words) {
				t.Errorf("it does not say %q", words)
			}
		}
		t.Log(stdout)
		runPod(t, k, node.Pod{Name: "multipath", Command: []string{"/bin/workload", "limit", "mptcp"}})
		node.WaitCount(t, 0, n.PodLogFile(k.PodName("multipath"), "multipath"))
		stdout, stderr, code := o.run("check", "default/"+k.PodName("multipath"))
		if code != 1 || !strings.Contains(stdout, "✗ MPTCP socket") || !strings.Contains(stderr, "a checkpoint would fail") {
			t.Errorf("of a container with an MPTCP socket: exit code %d with\n%s%s", code, stdout, stderr)
		}
		if _, _, code := o.run("checkpoint", "default/"+k.PodName("multipath")); code != 1 {
			t.Errorf("it was checkpointed, or: exit code %d", code)
		}
		var answer map[string]any
		if err := json.Unmarshal([]byte(o.must("check", "--output", "json")), &answer); err != nil || answer["node"] == nil || answer["container"] != nil {
			t.Errorf("JSON of the node is %v, %v", answer, err)
		}
	})
	t.Run("completion", func(t *testing.T) {
		o := operator{n, t}
		for _, command := range []string{"checkpoint", "check"} {
			if offered := o.must("__complete", command, ""); !strings.Contains(offered, counter+"/counter\t") || strings.Contains(offered, counter+"\t") != (command == "checkpoint") {
				t.Errorf("%s is offered %q", command, offered)
			}
		}
		all := o.list()
		if offered := o.must("__complete", "delete", ""); !strings.Contains(offered, all[1].Checkpoint.ID+"\t"+counter+"/counter") || strings.Contains(offered, all[0].Checkpoint.ID) {
			t.Errorf("delete is offered %q", offered)
		}
	})
	t.Run("others than root are refused", func(t *testing.T) {
		o := operator{n, t}
		nobody := func() (string, int) {
			_, stderr, code := o.start(n.Command(t.Context(), "setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", crishim, "list"))
			return stderr, code
		}
		if stderr, code := nobody(); code != 3 || !strings.Contains(stderr, "permission denied") {
			t.Errorf("by the modes: exit code %d with %q", code, stderr)
		}
		run := n.Path(filepath.Dir(node.CrishimSocket))
		if err := errors.Join(os.Chmod(run, 0o755), os.Chmod(filepath.Join(run, "admin.sock"), 0o666)); err != nil {
			t.Fatal(err)
		}
		if stderr, code := nobody(); code != 3 || strings.Contains(stderr, "permission denied") {
			t.Errorf("by the credentials: exit code %d with %q", code, stderr)
		}
	})
	t.Run("what the README shows", func(t *testing.T) { asInReadme(t, operator{n, t}) })
	o.must("version")
}

// interrupt sends the node's crishim checkpoint what a terminal sends at Ctrl-C.
func interrupt(t *testing.T, n *node.Node) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		files, _ := filepath.Glob(n.Path("/proc/[0-9]*/cmdline"))
		for _, file := range files {
			content, _ := os.ReadFile(file)
			if args := strings.Split(string(content), "\x00"); len(args) > 1 && args[0] == crishim && args[1] == "checkpoint" {
				pid := filepath.Base(filepath.Dir(file))
				if _, err := n.Output(t.Context(), "kill", "-INT", pid); err != nil {
					t.Error(err)
				}
				return
			}
		}
	}
	t.Error("no crishim checkpoint runs")
}

// asInReadme types what README.md shows of a shell of the node, and compares what is printed line by line, but for what differs each time. A line … stands for any
// number of lines.
func asInReadme(t *testing.T, o operator) {
	pages, err := documents.Read("../..")
	if err != nil {
		t.Fatal(err)
	}
	var transcript []string
	for _, block := range pages[0].Blocks {
		if strings.HasPrefix(block.Lines[0], "# crishim check") {
			transcript = block.Lines
		}
	}
	if len(transcript) == 0 {
		t.Fatal("README.md shows no shell")
	}
	var archive string // the path that the one shown has here
	for len(transcript) > 0 {
		typed := strings.TrimPrefix(transcript[0], "# ")
		transcript = transcript[1:]
		next := slices.IndexFunc(transcript, func(line string) bool { return strings.HasPrefix(line, "# ") })
		if next < 0 {
			next = len(transcript)
		}
		shown := transcript[:next]
		transcript = transcript[next:]
		here := strings.ReplaceAll(typed, "crishim ", crishim+" ")
		here = archivePath.ReplaceAllString(here, archive)
		cmd := o.Command(t.Context(), "sh", "-c", here)
		printed, err := cmd.CombinedOutput()
		if err != nil {
			t.Errorf("%s: %v: %s", typed, err, printed)
		}
		if path := archivePath.FindString(string(printed)); path != "" {
			archive = path
		}
		t.Logf("# %s\n%s", typed, printed)
		if want, got := shape(strings.Join(shown, "\n")), shape(string(printed)); !matches(want, got) {
			t.Errorf("%s prints\n%s\nand README.md has\n%s", typed, got, want)
		}
	}
	if archive == "" {
		t.Error("README.md shows no checkpoint")
		return
	}
	o.must("delete", archive)
}

var (
	archivePath = regexp.MustCompile(`/var/lib/kubelet/checkpoints/checkpoint-[^ ]+\.tar`)
	differs     = regexp.MustCompile(`[0-9a-f]{12,}|\bm[0-9a-z]{7}\b|[0-9]+(\.[0-9]+)*( ?(ns|µs|ms|s|B|KiB|MiB|GiB|[KMG]iB/s))?`)
	blanks      = regexp.MustCompile(` +`)
)

// shape is a text without what differs each time.
func shape(text string) []string {
	text = blanks.ReplaceAllString(differs.ReplaceAllString(text, "N"), " ")
	return strings.Split(strings.TrimSpace(text), "\n")
}

// matches compares lines, of which … stands for any number.
func matches(want, got []string) bool {
	if len(want) == 0 {
		return len(got) == 0
	}
	if strings.TrimSpace(want[0]) == "…" {
		return matches(want[1:], got) || len(got) > 0 && matches(want, got[1:])
	}
	return len(got) > 0 && strings.TrimSpace(want[0]) == strings.TrimSpace(got[0]) && matches(want[1:], got[1:])
}
