package shim

import (
	"context"
	"errors"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// expectAnswer asks for a checkpoint that nobody makes, until the answer is whose it should be.
func expectAnswer(t *testing.T, socket string, crishim bool, when string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err := runtimeapi.NewRuntimeServiceClient(conn).CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{ContainerId: "nobody", Location: "relative"})
		cancel()
		if err == nil {
			t.Fatal("there is a checkpoint of nobody")
		}
		if by := strings.Contains(err.Error(), "it is not an absolute path"); by == crishim {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: the answer is %v", when, err)
		}
	}
}

func TestWhoAnswers(t *testing.T) {
	requireRoot(t)
	able := status.Error(codes.NotFound, "no such container")
	for name, test := range map[string]struct {
		mode    Mode
		answer  error
		crishim bool
	}{
		"always, and the runtime can":            {Always, able, true},
		"by default":                             {"", able, true},
		"auto, and the runtime can":              {Auto, able, false},
		"auto, and it can not":                   {Auto, status.Error(codes.Unimplemented, "unknown method"), true},
		"auto, and it can not, and has no codes": {Auto, errors.New("CheckpointContainer is not implemented"), true},
		"auto, and it fails for another reason":  {Auto, errors.New("criu is absent"), false},
		"never, and the runtime can not":         {Never, status.Error(codes.Unimplemented, "unknown method"), false},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			runtime, crishim := filepath.Join(dir, "runtime.sock"), filepath.Join(dir, "crishim.sock")
			(&fakeRuntime{checkpoint: fails(test.answer)}).serve(t, runtime)
			defer start(t, Config{Listen: crishim, RuntimeEndpoint: runtime, Criu: filepath.Join(dir, "criu"), Mode: test.mode})()
			expectAnswer(t, crishim, test.crishim, name)
		})
	}
}

// The runtime is replaced, as by an upgrade, while crishim runs.
func TestAnotherRuntime(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	runtime, crishim := filepath.Join(dir, "runtime.sock"), filepath.Join(dir, "crishim.sock")
	defer start(t, Config{Listen: crishim, RuntimeEndpoint: runtime, Criu: filepath.Join(dir, "criu"), Mode: Auto})()
	expectAnswer(t, crishim, true, "while there is no runtime")
	stop := (&fakeRuntime{checkpoint: fails(status.Error(codes.NotFound, "no such container"))}).serve(t, runtime)
	expectAnswer(t, crishim, false, "by one that can")
	stop()
	expectAnswer(t, crishim, true, "while it is away")
	stop = (&fakeRuntime{checkpoint: fails(status.Error(codes.Unimplemented, "unknown method"))}).serve(t, runtime)
	expectAnswer(t, crishim, true, "by one that can not")
	stop()
	(&fakeRuntime{checkpoint: fails(status.Error(codes.NotFound, "no such container"))}).serve(t, runtime)
	expectAnswer(t, crishim, false, "by one that can, again")
}

// What the real ones answer to the question: containerd up to 1.7 does not implement the call, and from 2.1 on does.
func TestAutoWithContainerd(t *testing.T) {
	containerd := node.Containerd(t)
	version, err := containerd.Runtime.Version(t.Context(), &runtimeapi.VersionRequest{})
	if err != nil {
		t.Fatal(err)
	}
	socket := filepath.Join(t.TempDir(), "crishim.sock")
	defer start(t, Config{Listen: socket, RuntimeEndpoint: node.ContainerdSocket, Criu: "criu", Mode: Auto})()
	expectAnswer(t, socket, strings.HasPrefix(strings.TrimPrefix(version.GetRuntimeVersion(), "v"), "1."), version.GetRuntimeVersion())
}
