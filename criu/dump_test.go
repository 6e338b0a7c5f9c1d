package criu_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"crishim/criu"
	"crishim/shim/container"
	"crishim/test/node"
)

func TestMain(m *testing.M) {
	// Run wants a process that is made for it.
	if len(os.Args) == 2 && os.Args[1] == "dump" {
		os.Exit(dumpMain())
	}
	os.Exit(m.Run())
}

// order is what a test tells the process that dumps.
type order struct {
	Container    criu.Container
	Dir          string
	PostDumpFail string        // fail in PostDump with this
	PostDumpHang bool          // end the context in PostDump, and return 2 s later
	Timeout      time.Duration // end the context after this
	Cancelled    bool          // end it before the start
	Version      int           // have criu for one of this version, if not 0
}

// report is what the process says.
type report struct {
	Stats     criu.Stats
	Error     string
	PostDumps int
	Early     string // state of the init process in Stopped, and how many images of pages there are
	Stopped   string // its state in PostDump
	Later     string // and at the end of one that hangs
}

func dumpMain() int {
	var o order
	if err := json.NewDecoder(os.Stdin).Decode(&o); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	r, err := dump(o)
	if err != nil {
		r.Error = err.Error()
	}
	if err := json.NewEncoder(os.Stdout).Encode(r); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func dump(o order) (r report, err error) {
	features, err := criu.Probe(context.Background(), "criu")
	if err != nil {
		return r, err
	}
	work, err := os.Open(o.Dir)
	if err != nil {
		return r, err
	}
	defer work.Close()
	images, err := os.Open(filepath.Join(o.Dir, "images"))
	if err != nil {
		return r, err
	}
	defer images.Close()
	ctx, cancel := context.WithCancel(context.Background())
	if o.Timeout > 0 {
		ctx, cancel = context.WithTimeout(ctx, o.Timeout)
	}
	defer cancel()
	if o.Cancelled {
		cancel()
	}
	if o.Version != 0 {
		features.Version = o.Version
	}
	state := func() string {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", o.Container.Pid))
		_, after, _ := strings.Cut(string(status), "State:")
		return strings.TrimSpace(after[:strings.IndexByte(after, '\n')])
	}
	r.Stats, err = criu.Dump{Criu: features.Path, Version: features.Version, Container: o.Container, Images: images, Work: work, Stopped: func() {
		pages, _ := filepath.Glob(filepath.Join(images.Name(), "pages-*.img"))
		r.Early += fmt.Sprintf("%s, %d", state(), len(pages))
	}, PostDump: func(bool) error {
		r.PostDumps++
		r.Stopped = state()
		if o.PostDumpHang {
			cancel()
			time.Sleep(2 * time.Second)
			r.Later = state()
		}
		if o.PostDumpFail != "" {
			return errors.New(o.PostDumpFail)
		}
		return nil
	}}.Run(ctx)
	return r, err
}

// run starts a workload and returns it with its description.
func run(t *testing.T, handler string, command ...string) (*node.Container, criu.Container) {
	t.Helper()
	client := node.Containerd(t)
	running := client.Run(t, node.Spec{Handler: handler, Command: command})
	node.WaitCount(t, 0, running.Log)
	c, err := container.Describe(t.Context(), client.Runtime, running.ID)
	if err != nil {
		t.Fatal(err)
	}
	description := criu.Container{
		Pid: c.Process.Pid, Runtime: criu.Runtime(c.Runtime), Rootfs: c.Rootfs, Freezer: c.Freezer,
		ExternalMounts: c.ExternalMounts, MaskedFiles: c.MaskedFiles, Descriptors: c.Descriptors,
	}
	for _, ns := range c.SharedNamespaces {
		description.SharedNamespaces = append(description.SharedNamespaces, criu.Namespace(ns))
	}
	return running, description
}

func newDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/data", "dump-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Mkdir(filepath.Join(dir, "images"), 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

func carryOut(t *testing.T, o order) report {
	t.Helper()
	input, err := json.Marshal(o)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(os.Args[0], "dump")
	cmd.Stdin, cmd.Stderr = strings.NewReader(string(input)), t.Output()
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	var r report
	if err := json.Unmarshal(out, &r); err != nil {
		t.Fatal(err)
	}
	return r
}

func TestDump(t *testing.T) {
	for _, handler := range []string{"runc", "crun"} {
		t.Run(handler, func(t *testing.T) {
			running, description := run(t, handler)
			dir := newDir(t)
			r := carryOut(t, order{Container: description, Dir: dir})
			if r.Error != "" {
				t.Fatal(r.Error)
			}
			if r.PostDumps != 1 {
				t.Errorf("PostDump was called %d times", r.PostDumps)
			}
			if state := r.Early; state != "t (tracing stop), 0" {
				t.Errorf("in Stopped the process and the number of images of its memory were %q, want it stopped, and none", state)
			}
			if state := r.Stopped; !strings.HasPrefix(state, "t") && !strings.HasPrefix(state, "D") {
				t.Errorf("in PostDump the process was %s, want stopped or frozen", state)
			}
			if r.Stats.Frozen <= 0 || r.Stats.PagesWritten == 0 {
				t.Errorf("statistics are %+v", r.Stats)
			}
			for _, file := range []string{"images/inventory.img", "images/descriptors.json", "dump.log", "stats-dump"} {
				if info, err := os.Stat(filepath.Join(dir, file)); err != nil || info.Size() == 0 {
					t.Errorf("%s: %v, %v", file, info, err)
				}
			}
			node.WaitMore(t, running.Log)
		})
	}
}

func TestAnErrorInPostDumpRollsBack(t *testing.T) {
	running, description := run(t, "runc")
	r := carryOut(t, order{Container: description, Dir: newDir(t), PostDumpFail: "no room"})
	if r.Error != "no room" || r.PostDumps != 1 {
		t.Errorf("error is %q after %d calls, want PostDump's own after one", r.Error, r.PostDumps)
	}
	node.WaitMore(t, running.Log)
}

// A disk may stall while files are captured. The container does not wait for it.
func TestACaptureThatHangsIsLeftBehind(t *testing.T) {
	running, description := run(t, "runc")
	r := carryOut(t, order{Container: description, Dir: newDir(t), PostDumpHang: true})
	if r.Error != context.Canceled.Error() {
		t.Errorf("error is %q, want that of the context", r.Error)
	}
	if !strings.HasPrefix(r.Later, "S") && !strings.HasPrefix(r.Later, "R") {
		t.Errorf("2 s after the end of the context the process is %s, want running", r.Later)
	}
	node.WaitMore(t, running.Log)
}

func TestTheEndOfTheContextRollsBack(t *testing.T) {
	running, description := run(t, "runc", "/bin/workload", "memory", "512")
	for _, timeout := range []time.Duration{20, 60, 100, 150, 200, 300, 400} {
		r := carryOut(t, order{Container: description, Dir: newDir(t), Timeout: timeout * time.Millisecond})
		if r.Error != "" && r.Error != context.DeadlineExceeded.Error() {
			t.Errorf("after %d ms: error is %q, want none or that of the deadline", timeout, r.Error)
		}
		node.WaitMore(t, running.Log)
	}
	r := carryOut(t, order{Container: description, Dir: newDir(t), Cancelled: true})
	if r.Error != context.Canceled.Error() || r.PostDumps != 0 {
		t.Errorf("cancelled before the start: error is %q", r.Error)
	}
}

// Nobody watches over the disk here: criu itself meets the end of it, and in its images or its log says so.
func TestAFullDisk(t *testing.T) {
	running, description := run(t, "runc", "/bin/workload", "memory", "128")
	for _, size := range []string{"64k", "1m", "64m"} {
		dir := t.TempDir()
		if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "mode=0700,size="+size); err != nil {
			t.Fatal(err)
		}
		if err := os.Mkdir(filepath.Join(dir, "images"), 0o700); err != nil {
			t.Fatal(err)
		}
		r := carryOut(t, order{Container: description, Dir: dir})
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
		if !strings.Contains(r.Error, "No space left on device") || !strings.Contains(r.Error, "make room at the location") {
			t.Errorf("on %s: error is %q", size, r.Error)
		}
		node.WaitMore(t, running.Log)
	}
}

// A deleted file that is still open, and over CRIU's own limit, has to be in the images.
func TestADeletedFileThatIsOpen(t *testing.T) {
	running, description := run(t, "runc", "/bin/sh", "-c",
		"exec 3<>/tmp/deleted; dd if=/dev/zero bs=1M count=4 >&3 2>/dev/null; rm /tmp/deleted; exec workload count")
	dir := newDir(t)
	if r := carryOut(t, order{Container: description, Dir: dir}); r.Error != "" {
		t.Fatal(r.Error)
	}
	ghosts, err := filepath.Glob(filepath.Join(dir, "images", "ghost-file-*.img"))
	if err != nil || len(ghosts) != 1 {
		t.Errorf("images of deleted files: %q, %v; want one", ghosts, err)
	}
	node.WaitMore(t, running.Log)
}

// On cgroup v1 a process that is stopped and frozen can't be attached to.
func TestAStoppedProcess(t *testing.T) {
	running, description := run(t, "runc", "/bin/sh", "-c", "sleep 1000 & kill -STOP $!; exec workload count")
	r := carryOut(t, order{Container: description, Dir: newDir(t), Timeout: time.Minute})
	if r.Error != "" {
		t.Fatal(r.Error)
	}
	node.WaitMore(t, running.Log)
	if out, err := running.Exec(t.Context(), "ps", "-o", "stat"); err != nil || !strings.Contains(out, "\nT") {
		t.Errorf("after the dump nothing is stopped: %v\n%s", err, out)
	}
}

// CRIU before 3.19 does not start here: the one that there is stands in for it, and is told no more than that one would know.
func TestAnOlderCRIU(t *testing.T) {
	running, description := run(t, "runc")
	dir := newDir(t)
	if r := carryOut(t, order{Container: description, Dir: dir, Version: criu.MinVersion}); r.Error != "" {
		t.Error(r.Error)
	}
	log, err := os.ReadFile(filepath.Join(dir, criu.LogFile))
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(log), "net: Lock network") || strings.Contains(string(log), "network locking is skipped") {
		t.Errorf("the network was not locked")
	}
	node.WaitMore(t, running.Log)
}

// The namespace of a mount that nobody has told CRIU of.
func TestAFailedDumpSaysWhy(t *testing.T) {
	running, description := run(t, "runc")
	description.ExternalMounts = nil
	r := carryOut(t, order{Container: description, Dir: newDir(t)})
	if !strings.HasPrefix(r.Error, "criu cannot dump the container: mount /etc/") || !strings.Contains(r.Error, "doesn't have a proper root mount") ||
		!strings.Contains(r.Error, "unmount it") {
		t.Errorf("error is %q", r.Error)
	}
	node.WaitMore(t, running.Log)
}

func TestProbe(t *testing.T) {
	node.Require(t)
	features, err := criu.Probe(t.Context(), "criu")
	if err != nil {
		t.Fatal(err)
	}
	if features.Version < criu.MinVersion || !filepath.IsAbs(features.Path) {
		t.Errorf("found %+v", features)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := criu.Probe(ended, "criu"); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}
