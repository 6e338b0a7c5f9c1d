package checkpoint_test

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// unharmed fails the test unless the container goes on and nothing of a checkpoint is left, neither on it nor at the location.
func unharmed(t *testing.T, c *node.Container, location string) {
	t.Helper()
	node.WaitMore(t, c.Log)
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if traced := field(t, pid, "TracerPid:"); traced != "0" {
		t.Errorf("process %d is traced by %s", pid, traced)
	}
	if state := field(t, pid, "State:"); strings.HasPrefix(state, "T") || strings.HasPrefix(state, "t") {
		t.Errorf("process %d is stopped: %s", pid, state)
	}
	if left := listing(t, filepath.Dir(location)); left != "" {
		t.Errorf("left behind:\n%s", left)
	}
	for _, pid := range criuProcesses(t) {
		t.Errorf("criu still runs: process %d", pid)
	}
}

// field reads a field of /proc/PID/status.
func field(t *testing.T, pid int, name string) string {
	t.Helper()
	content, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, name); ok {
			return strings.TrimSpace(value)
		}
	}
	t.Fatalf("process %d has no %s", pid, name)
	return ""
}

// dumping waits until criu writes memory to the staging directory beside the location.
func dumping(t *testing.T, location string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := node.WaitDump(ctx, filepath.Dir(location)); err != nil {
		t.Fatal(err)
	}
}

func TestAStoppedCheckpointLeavesNothing(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "1024"}})
	node.WaitCount(t, 0, c.Log)
	for _, test := range []struct {
		name     string
		deadline time.Duration // of the call
		timeout  int64         // of the request, in seconds
		cancel   bool          // the call, in mid-dump
		code     codes.Code
		want     string
	}{
		{name: "deadline of 1 s", deadline: time.Second, code: codes.DeadlineExceeded},
		{name: "timeout of the request", timeout: 1, code: codes.DeadlineExceeded, want: "the container runs on"},
		{name: "cancelled while memory is written", cancel: true, code: codes.Canceled},
	} {
		t.Run(test.name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			if test.deadline > 0 {
				ctx, cancel = context.WithTimeout(ctx, test.deadline)
				defer cancel()
			}
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path, Timeout: test.timeout}
			answered, answer := context.WithCancel(t.Context())
			result := make(chan error, 1)
			go func() {
				defer answer()
				for {
					_, err := crishim.CheckpointContainer(ctx, request)
					if status.Code(err) != codes.Aborted { // the one before, whose client has answered itself
						result <- err
						return
					}
				}
			}()
			// However fast the machine is, the dump is not done before its time is up. Where it is slow, it may not have begun.
			if held, err := node.HoldDump(answered, filepath.Dir(path)); err == nil {
				defer held.Release()
				if test.cancel {
					cancel()
				}
				held.RollBack(t)
			} else if answered.Err() == nil {
				t.Fatal(err)
			}
			if err := <-result; status.Code(err) != test.code || !strings.Contains(err.Error(), test.want) {
				t.Fatalf("error is %v, want %s and %q", err, test.code, test.want)
			}
			// A client whose call has ended answers itself; the service works on for a moment.
			waitGone(t, filepath.Dir(path), 5*time.Second)
			unharmed(t, c, path)
		})
	}
	t.Run("and the next one succeeds", func(t *testing.T) {
		path := location(t)
		_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		for status.Code(err) == codes.Aborted {
			_, err = crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		}
		if err != nil {
			t.Fatal(err)
		}
		if info, err := os.Stat(path); err != nil || info.Size() < 1<<30 {
			t.Errorf("archive is %v, %v; want 1 GiB and more", info, err)
		}
	})
}

func waitGone(t *testing.T, dir string, limit time.Duration) {
	t.Helper()
	for deadline := time.Now().Add(limit); ; time.Sleep(5 * time.Millisecond) {
		entries, err := os.ReadDir(dir)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		if len(entries) == 0 {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %s there still is\n%s", limit, listing(t, dir))
		}
	}
}

func TestAHelperThatIsKilledLeavesNothing(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "1024"}})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		dumping(t, path)
		kill(t, helpers(t)...)
	}()
	_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
	<-killed
	if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "signal: killed): criu was told to roll back and has ended; the container runs on") {
		t.Errorf("error is %v, want Internal and a word on the container", err)
	}
	unharmed(t, c, path)
	if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
		t.Errorf("the next checkpoint: %v", err)
	}
}

// helpers are the pids of the helpers that this process has started.
func helpers(t *testing.T) []int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, dir := range dirs {
		arguments, _ := os.ReadFile(dir + "/cmdline") // empty for one that has ended
		if !strings.HasSuffix(string(arguments), "\x00"+checkpoint.HelperCommand+"\x00") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func kill(t *testing.T, pids ...int) {
	t.Helper()
	if len(pids) == 0 {
		t.Error("there is no process to kill")
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil {
			t.Error(err)
		}
	}
}

// A volume whose server is gone must not hold up the node's checkpoints. The server is a fake: a FUSE mount that nobody answers for.
func TestAVolumeThatHangs(t *testing.T) {
	containerd, crishim := serve(t)
	volume := filepath.Join("/data", "volume-"+t.Name())
	if err := os.Mkdir(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(volume) })
	c := containerd.Run(t, node.Spec{Mounts: []*runtimeapi.Mount{{HostPath: volume, ContainerPath: "/volume"}}})

	device, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer device.Close()
	options := fmt.Sprintf("fd=%d,rootmode=40000,user_id=0,group_id=0", device.Fd())
	if err := unix.Mount("fake", volume, "fuse", 0, options); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(volume, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	}()
	path := location(t)
	request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path, Timeout: 1}
	for range 3 { // one more than may go on at once
		_, err := crishim.CheckpointContainer(t.Context(), request)
		if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "look at bind mounts") {
			t.Errorf("error is %v, want DeadlineExceeded and a word on where", err)
		}
	}
	unharmed(t, c, path)
	if left := helpers(t); len(left) > 0 {
		t.Errorf("helpers are left: %v", left)
	}
}

func TestOneCheckpointOfAContainerAtATime(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	first := make(chan error, 1)
	go func() {
		_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		first <- err
	}()
	dumping(t, path)
	second := filepath.Join(filepath.Dir(path), "checkpoint-second.tar")
	_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID[:13], Location: second})
	if status.Code(err) != codes.Aborted {
		t.Errorf("error of the second is %v, want Aborted", err)
	}
	if err := <-first; err != nil {
		t.Errorf("the first failed: %v", err)
	}
	if got, want := listing(t, filepath.Dir(path)), "- checkpoint-test.tar\n"; got != want {
		t.Errorf("the directory holds\n%s", got)
	}
}

func TestErrors(t *testing.T) {
	containerd, crishim := serve(t)
	running := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, running.Log)
	exited := containerd.Run(t, node.Spec{Name: "exited", Command: []string{"/bin/sh", "-c", "exit 3"}})
	for state := runtimeapi.ContainerState_CONTAINER_RUNNING; state != runtimeapi.ContainerState_CONTAINER_EXITED; {
		var err error
		if state, err = exited.State(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	there := location(t)
	if err := os.WriteFile(there, []byte("precious"), 0o644); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(there)
	vacant := filepath.Join(dir, "checkpoint-vacant.tar")
	open := filepath.Join(dir, "open")
	if err := os.Mkdir(open, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	before := listing(t, dir)
	for _, test := range []struct {
		name    string
		request *runtimeapi.CheckpointContainerRequest
		code    codes.Code
		want    string
	}{
		{"no id", &runtimeapi.CheckpointContainerRequest{Location: vacant}, codes.InvalidArgument, "container_id is empty"},
		{"negative timeout", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID, Location: vacant, Timeout: -1}, codes.InvalidArgument, "timeout is -1 s"},
		{"unknown container", &runtimeapi.CheckpointContainerRequest{ContainerId: "0123456789", Location: vacant}, codes.NotFound, `"0123456789"`},
		{"exited container", &runtimeapi.CheckpointContainerRequest{ContainerId: exited.ID, Location: vacant}, codes.FailedPrecondition, "is exited, with code 3; only a running container can be checkpointed"},
		{"no location", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID}, codes.InvalidArgument, "location"},
		{"relative location", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID, Location: "a.tar"}, codes.InvalidArgument, "a.tar"},
		{"no directory", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID, Location: filepath.Join(dir, "none", "a.tar")}, codes.InvalidArgument, "none"},
		{"directory open to all", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID, Location: filepath.Join(open, "a.tar")}, codes.InvalidArgument, "can be written by others than root"},
		{"location taken", &runtimeapi.CheckpointContainerRequest{ContainerId: running.ID, Location: there}, codes.AlreadyExists, there},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, err := crishim.CheckpointContainer(t.Context(), test.request)
			if status.Code(err) != test.code || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %s with %q", err, test.code, test.want)
			}
		})
	}
	if after := listing(t, dir); after != before {
		t.Errorf("the directory held\n%s\nnow\n%s", before, after)
	}
	if content, err := os.ReadFile(there); err != nil || string(content) != "precious" {
		t.Errorf("what was there is now %q, %v", content, err)
	}
}

// A kubelet's end-to-end test looks for the phrase, and everything but checkpoints goes on without CRIU.
func TestWithoutCRIU(t *testing.T) {
	containerd := node.Containerd(t)
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: "/nowhere/criu", State: t.TempDir(), Log: testLog(t)})
	_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: "c", Location: location(t)})
	const phrase = "CRIU binary not found or too old (<31600). Failed to checkpoint container"
	if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), phrase) || !strings.Contains(err.Error(), "/nowhere/criu") {
		t.Errorf("error is %v, want FailedPrecondition with %q and the path", err, phrase)
	}
}

// CRIU may be installed, upgraded and removed while crishim runs.
func TestCRIUIsFoundAnew(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{})
	binary, err := exec.LookPath("criu")
	if err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(t.TempDir(), "criu")
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: installed, State: t.TempDir(), Log: testLog(t)})
	path := location(t)
	request := func() error {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		return err
	}
	if err := request(); status.Code(err) != codes.FailedPrecondition {
		t.Errorf("before CRIU is installed: %v", err)
	}
	if err := os.Symlink(binary, installed); err != nil {
		t.Fatal(err)
	}
	for range 2 { // found, and known
		if err := request(); err != nil {
			t.Errorf("with CRIU: %v", err)
		}
	}
	if err := os.Remove(installed); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(installed, []byte("#!/bin/sh\necho Version: 3.15\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := request(); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "criu 3.15 at") {
		t.Errorf("with a fake of an older one in its place: %v", err)
	}
	if err := os.Remove(installed); err != nil {
		t.Fatal(err)
	}
	if err := request(); status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "no executable") {
		t.Errorf("after it was removed: %v", err)
	}
}

func TestDrainRollsBackWhatDoesNotFinish(t *testing.T) {
	containerd := node.Containerd(t)
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", State: t.TempDir(), Log: testLog(t)})
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "512"}})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	inFlight := make(chan error, 1)
	request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
	go func() {
		_, err := service.CheckpointContainer(context.Background(), request)
		inFlight <- err
	}()
	dumping(t, path)
	now, cancel := context.WithCancel(t.Context())
	cancel()
	service.Drain(now)
	if err := <-inFlight; status.Code(err) != codes.Unavailable {
		t.Errorf("error of the one in flight is %v, want Unavailable", err)
	}
	unharmed(t, c, path)
	if _, err := service.CheckpointContainer(t.Context(), request); status.Code(err) != codes.Unavailable {
		t.Errorf("error after Drain is %v, want Unavailable", err)
	}
}

// members counts the members of an archive by name, numbers and extension cut off.
func members(t *testing.T, path string) map[string]int {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	names := make(map[string]int)
	for archive := tar.NewReader(file); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return names
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(header.Name, ".img")
		names[strings.TrimRight(name, "0123456789abcdef")]++
	}
}
