package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"math"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// fakeRuntime stands before containerd and answers of its containers what a test wants: no real runtime can be brought to that.
type fakeRuntime struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer // which has nothing to say of images
	containerd                          *node.Client
	change                              func(ctx context.Context, answer *cri.ContainerStatusResponse) error
}

const fakeSocket = "/run/fake-runtime.sock"

// serveFake serves one until the test's end.
func serveFake(t *testing.T, n *node.Node) *fakeRuntime {
	t.Helper()
	listener, err := net.Listen("unix", n.Path(fakeSocket))
	if err != nil {
		t.Fatal(err)
	}
	f := &fakeRuntime{containerd: n.Client(t, node.ContainerdSocket)}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, f)
	cri.RegisterImageServiceServer(server, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener) // until it is stopped
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return f
}

func (f *fakeRuntime) Version(ctx context.Context, r *cri.VersionRequest) (*cri.VersionResponse, error) {
	return f.containerd.Runtime.Version(ctx, r)
}

func (f *fakeRuntime) ContainerStatus(ctx context.Context, r *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	answer, err := f.containerd.Runtime.ContainerStatus(ctx, r)
	if err == nil {
		err = f.change(ctx, answer)
	}
	return answer, err
}

func (f *fakeRuntime) ContainerStats(context.Context, *cri.ContainerStatsRequest) (*cri.ContainerStatsResponse, error) {
	return &cri.ContainerStatsResponse{Stats: &cri.ContainerStats{WritableLayer: &cri.FilesystemUsage{UsedBytes: &cri.UInt64Value{Value: math.MaxUint64}}}}, nil
}

func TestARuntimeThatAnswersNonsense(t *testing.T) {
	n, binary := start(t, node.Options{})
	fake := serveFake(t, n)
	const socket = "/run/crishim/nonsense.sock"
	if _, err := n.StartCrishimAt(t.Context(), "nonsense", socket, binary, "--runtime-endpoint", "unix://"+fakeSocket); err != nil {
		t.Fatal(err)
	}
	containerd, client := n.Client(t, node.ContainerdSocket), n.Client(t, socket)
	c, other := containerd.Run(t, node.Spec{}), containerd.Run(t, node.Spec{Name: "other"})
	node.WaitCount(t, 0, c.Log)
	otherStatus, err := containerd.Runtime.ContainerStatus(t.Context(), &cri.ContainerStatusRequest{ContainerId: other.ID, Verbose: true})
	if err != nil {
		t.Fatal(err)
	}
	// info has the runtime say something else in one place of what only a runtime knows.
	info := func(key string, value any) func(*cri.ContainerStatusResponse) {
		return func(answer *cri.ContainerStatusResponse) {
			all := map[string]any{}
			if err := json.Unmarshal([]byte(answer.Info["info"]), &all); err != nil {
				t.Error(err)
			}
			all[key] = value
			text, err := json.Marshal(all)
			if err != nil {
				t.Error(err)
			}
			answer.Info["info"] = string(text)
		}
	}
	text := func(text string) func(*cri.ContainerStatusResponse) {
		return func(answer *cri.ContainerStatusResponse) { answer.Info["info"] = text }
	}
	otherPid, err := other.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name   string
		change func(*cri.ContainerStatusResponse)
		code   codes.Code
		want   string
	}{
		{"no status", func(a *cri.ContainerStatusResponse) { a.Status = nil }, codes.Internal, `answers of ""`},
		{"no id", func(a *cri.ContainerStatusResponse) { a.Status.Id = "" }, codes.Internal, `answers of ""`},
		{"an id that is a path", func(a *cri.ContainerStatusResponse) { a.Status.Id += "/../" + other.ID }, codes.Internal, "answers of"},
		{"another container", func(a *cri.ContainerStatusResponse) { a.Status, a.Info = otherStatus.Status, otherStatus.Info }, codes.Internal, other.ID},
		{"another container's process", info("pid", otherPid), codes.FailedPrecondition, "is not the one of which"},
		{"the node's first process", info("pid", 1), codes.FailedPrecondition, "crishim must run in the node's own process namespace"},
		{"no process", info("pid", 4194303), codes.FailedPrecondition, "has ended"},
		{"a pid that cannot be", info("pid", int64(math.MaxInt64)), codes.FailedPrecondition, "has ended"},
		{"a negative pid", info("pid", -1), codes.FailedPrecondition, "gives no pid"},
		{"a pid that is a text", info("pid", "1"), codes.Internal, "parse verbose container status"},
		{"a specification that is a number", info("runtimeSpec", 7), codes.Internal, "parse verbose container status"},
		{"a state of tomorrow", func(a *cri.ContainerStatusResponse) { a.Status.State = 77 }, codes.FailedPrecondition, "in an unknown state"},
		{"nothing verbose", func(a *cri.ContainerStatusResponse) { a.Info = nil }, codes.FailedPrecondition, "upgrade the runtime"},
		{"no JSON", text("{"), codes.Internal, "parse verbose container status"},
		{"null", text("null"), codes.FailedPrecondition, "gives no pid"},
		{"deep JSON", text(strings.Repeat("[", 1<<20)), codes.Internal, "parse verbose container status"},
		{"more than a message may have", text(strings.Repeat(" ", 17<<20)), codes.ResourceExhausted, "larger than max"},
		{"nothing but the truth", func(*cri.ContainerStatusResponse) {}, codes.OK, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			fake.change = func(_ context.Context, answer *cri.ContainerStatusResponse) error { test.change(answer); return nil }
			err := take(t, client, c.ID)
			if status.Code(err) != test.code || err != nil && !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %s with %q", err, test.code, test.want)
			}
			t.Log(err)
			if err := os.RemoveAll(n.Path(archived)); err != nil {
				t.Error(err)
			}
			if complaint := n.Harm(t, "/data"); complaint != "" {
				t.Error(complaint)
			}
		})
	}
	t.Run("nothing, ever", func(t *testing.T) {
		fake.change = func(ctx context.Context, _ *cri.ContainerStatusResponse) error { <-ctx.Done(); return ctx.Err() }
		_, err := client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: archived, Timeout: 1})
		if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "ask runtime") {
			t.Errorf("error is %v, want DeadlineExceeded and who was asked", err)
		}
	})
	n.Unharmed(t, "/data", c.Log)
	node.WaitMore(t, other.Log)
}

// stop stops processes by a signal until the returned function is called, and the nsenter by which a daemon has come into the node, which
// stops with it.
func stop(t *testing.T, pids ...int) (resume func()) {
	t.Helper()
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
			t.Fatal(err)
		}
	}
	resume = func() {
		for _, pid := range pids {
			content, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid)) // it may have ended, and so below
			_, after, _ := strings.Cut(string(content), ") ")
			_ = unix.Kill(pid, unix.SIGCONT)
			if fields := strings.Fields(after); len(fields) > 1 {
				if parent, err := strconv.Atoi(fields[1]); err == nil && parent > 1 {
					_ = unix.Kill(parent, unix.SIGCONT)
				}
			}
		}
	}
	t.Cleanup(resume)
	return resume
}

func TestARuntimeThatHangs(t *testing.T) {
	n, _ := start(t, node.Options{})
	client := dial(t, n)
	c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)
	held, ended := hold(t, n, "/data", func() error { return take(t, client, c.ID) })
	resume := stop(t, n.Daemon("containerd").Pid())
	held.Release()
	if err := <-ended; err != nil {
		t.Errorf("containerd hangs in mid-dump, which does not need it: %v", err)
	}
	begin := time.Now()
	_, err = client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: archived + ".2", Timeout: 1})
	if status.Code(err) != codes.DeadlineExceeded || !strings.Contains(err.Error(), "ask runtime") {
		t.Errorf("containerd hangs before the dump: error is %v, want DeadlineExceeded and who was asked", err)
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("a call of 1 s has taken %s", took)
	}
	resume()
	if err := os.Remove(n.Path(archived)); err != nil {
		t.Error(err)
	}
	n.Unharmed(t, "/data", c.Log)
	if err := take(t, client, c.ID); err != nil {
		t.Errorf("when it goes on again: %v", err)
	}
}

// What a machine that sleeps does to processes is done to those of a checkpoint here: they all stand still for a while, and time goes on.
// The clock of deadlines does so as well, which in a machine that sleeps it does not, see test/vm.
func TestAllOfACheckpointIsStopped(t *testing.T) {
	n, _ := start(t, node.Options{})
	client := dial(t, n)
	c, err := client.RunContainer(t.Context(), node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)
	for _, test := range []struct {
		name    string
		timeout int64
		code    codes.Code
		left    string
	}{
		{"for less than it may take", 0, codes.OK, filepath.Base(archived) + "\n"},
		{"for longer", 5, codes.DeadlineExceeded, ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			request := &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: archived, Timeout: test.timeout}
			held, ended := hold(t, n, "/data", func() error {
				_, err := client.Runtime.CheckpointContainer(t.Context(), request)
				return err
			})
			crishim := n.Daemon("crishim").Pid()
			helper, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", held.Pid()))
			if err != nil {
				t.Fatal(err)
			}
			_, after, _ := strings.Cut(string(helper), "PPid:\t")
			parent, err := strconv.Atoi(strings.Fields(after)[0])
			if err != nil {
				t.Fatal(err)
			}
			resume := stop(t, crishim, parent)
			time.Sleep(time.Duration(test.timeout+1) * time.Second) // it is what is tested
			resume()
			if test.code != codes.OK {
				held.RollBack(t)
			}
			held.Release()
			if err := <-ended; status.Code(err) != test.code {
				t.Errorf("error is %v, want %s", err, test.code)
			}
			if got := n.Listing(t, "/data"); got != test.left {
				t.Errorf("the directory holds\n%s", got)
			}
			if err := os.RemoveAll(n.Path(archived)); err != nil {
				t.Error(err)
			}
			n.Unharmed(t, "/data", c.Log)
		})
	}
}
