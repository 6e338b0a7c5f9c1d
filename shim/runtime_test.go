package shim

import (
	"context"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// fakeRuntime answers as a test says. No real runtime hangs, or errs, on demand.
type fakeRuntime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	version, list, checkpoint func(context.Context) error
	versions                  atomic.Int64 // calls
}

func (r *fakeRuntime) Version(ctx context.Context, _ *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	r.versions.Add(1)
	return &runtimeapi.VersionResponse{}, r.version(ctx)
}

func (r *fakeRuntime) ListContainers(ctx context.Context, _ *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	return &runtimeapi.ListContainersResponse{}, r.list(ctx)
}

func (r *fakeRuntime) CheckpointContainer(ctx context.Context, _ *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	return &runtimeapi.CheckpointContainerResponse{}, r.checkpoint(ctx)
}

func answers(context.Context) error { return nil }

func hangs(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

func errs(context.Context) error { return status.Error(codes.Internal, "broken inside") }

func fails(err error) func(context.Context) error {
	return func(context.Context) error { return err }
}

// serve has the fake serve at a path until stop is called, or the test ends.
func (r *fakeRuntime) serve(t *testing.T, path string) (stop func()) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, r)
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	stop = sync.OnceFunc(func() {
		server.Stop()
		if err := <-served; err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}
