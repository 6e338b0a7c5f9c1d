package kubelet

import (
	"context"
	"errors"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeSystemd stands in for systemd, which few machines that run these tests have; test/vm has the real one. It reads units in a directory tree, and
// the kubelet that it starts is this very process, with a connection to what it was told to use.
type fakeSystemd struct {
	node     *Node
	unit     Unit
	conn     net.Conn
	restarts int
	fails    func(endpoint string) bool // has a kubelet that is told to use it not connect
	failing  error                      // of Reload
}

func (f *fakeSystemd) Unit(context.Context) (*Unit, error) {
	if f.unit.Fragment == "" {
		return nil, errNoUnit
	}
	unit := f.unit
	return &unit, nil
}

func (f *fakeSystemd) Reload(ctx context.Context) error {
	if err := errors.Join(f.failing, ctx.Err()); err != nil {
		return err
	}
	fresh := Unit{State: f.unit.State, Running: f.unit.Running, Pid: f.unit.Pid, Args: f.unit.Args}
	dropIns := map[string]string{} // the same name in /etc hides the other
	for _, dir := range []string{"/usr/lib/systemd/system", units} {
		if _, err := os.Stat(f.node.path(dir + "/" + Service)); err == nil {
			fresh.Fragment = dir + "/" + Service
		}
		paths, _ := filepath.Glob(f.node.path(dir + "/" + Service + ".d/*.conf"))
		for _, path := range paths {
			dropIns[filepath.Base(path)] = dir + "/" + Service + ".d/" + filepath.Base(path)
		}
	}
	if fresh.Fragment == "" {
		f.unit = fresh
		return nil
	}
	for _, name := range slices.Sorted(maps.Keys(dropIns)) {
		fresh.DropIns = append(fresh.DropIns, dropIns[name])
	}
	for _, file := range append([]string{fresh.Fragment}, fresh.DropIns...) {
		options, err := f.node.readUnit(file)
		if err != nil {
			return err
		}
		for _, o := range options {
			switch o.Name {
			case "ExecStart":
				fresh.Exec = split(strings.ReplaceAll(o.Value, "\\\n", " "))
			case "Environment":
				fresh.Environment = append(fresh.Environment, split(o.Value)...)
			case "EnvironmentFile":
				optional := o.Value[0] == '-'
				path := o.Value
				if optional {
					path = path[1:]
				}
				fresh.EnvironmentFiles = append(fresh.EnvironmentFiles, EnvironmentFile{path, optional})
			}
		}
	}
	f.unit = fresh
	return nil
}

func (f *fakeSystemd) Restart(ctx context.Context) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	f.restarts++
	f.stop()
	words, err := f.node.commandLine(&f.unit)
	if err != nil {
		return err
	}
	f.unit.Running, f.unit.Pid, f.unit.State = true, os.Getpid(), "active (running)"
	for _, w := range words {
		f.unit.Args = append(f.unit.Args, w.text)
	}
	told, err := f.node.effective(words)
	if err != nil {
		return err
	}
	if f.fails == nil || !f.fails(told.Runtime.Value) {
		f.conn, err = net.Dial("unix", socket(told.Runtime.Value))
	}
	return err
}

func (f *fakeSystemd) stop() {
	if f.conn != nil {
		f.conn.Close()
	}
	f.conn = nil
	f.unit.Running, f.unit.Pid, f.unit.Args, f.unit.State = false, 0, nil, "inactive (dead)"
}

// runtime is what the two sockets of a test answer by.
type runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	version atomic.Value
}

func (r *runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{RuntimeName: "fake", RuntimeVersion: r.version.Load().(string)}, nil
}

// serve answers for a runtime at a path, until the test ends.
func serve(t *testing.T, path string) *runtime {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	r := &runtime{}
	r.version.Store("1")
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, r)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = server.Serve(listener)
	}()
	t.Cleanup(func() { server.Stop(); <-done })
	return r
}

// node is one whose kubelet runs, by the files of a tree, in which RUNTIME and CRISHIM stand for the sockets.
func node(t *testing.T, files map[string]string) (*Node, *fakeSystemd) {
	t.Helper()
	dir, err := os.MkdirTemp("", "kubelet-") // the names of sockets must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &Node{
		Root:   filepath.Join(dir, "root"),
		Listen: filepath.Join(dir, "crishim.sock"), Runtime: filepath.Join(dir, "runtime.sock"),
		Wait: 10 * time.Second,
		Say:  t.Logf,
	}
	tree(t, n, files)
	f := &fakeSystemd{node: n}
	n.Systemd = f
	if err := f.Reload(t.Context()); err != nil {
		t.Fatal(err)
	}
	return n, f
}
