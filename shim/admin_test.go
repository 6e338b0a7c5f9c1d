package shim

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
)

// list asks for the history at a socket.
func list(t *testing.T, path string) (*crishimv1.ListResponse, error) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	return crishimv1.NewAdminServiceClient(conn).List(ctx, &crishimv1.ListRequest{})
}

// What the kubelet asks for is in the history, with who has asked; the API's socket is root's alone.
func TestTheKubeletsRequestsAreListed(t *testing.T) {
	requireRoot(t)
	defer goleak.VerifyNone(t)
	dir, err := os.MkdirTemp("", "crishim-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path, admin := filepath.Join(dir, "crishim.sock"), filepath.Join(dir, "admin", "admin.sock")
	defer start(t, Config{Listen: path, Admin: "unix://" + admin, RuntimeEndpoint: filepath.Join(dir, "absent.sock"), Criu: filepath.Join(dir, "criu")})()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	_, err = runtimeapi.NewRuntimeServiceClient(conn).CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: "a", Location: "relative"})
	if status.Code(err) != codes.InvalidArgument {
		t.Errorf("error is %v, want InvalidArgument", err)
	}
	answer, err := list(t, admin)
	if err != nil || len(answer.GetCheckpoints()) != 1 {
		t.Fatalf("listed is %v, %v", answer, err)
	}
	c := answer.GetCheckpoints()[0].GetCheckpoint()
	if c.GetCode() != int32(codes.InvalidArgument) || c.GetCaller().GetPid() != int32(os.Getpid()) || c.GetCaller().GetProcess() == "" ||
		c.GetCaller().GetInterface() != crishimv1.Interface_INTERFACE_CRI {
		t.Errorf("listed is %v", c)
	}
	for name, want := range map[string]os.FileMode{admin: os.ModeSocket | 0o600, filepath.Dir(admin): os.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s is %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(filepath.Dir(admin), 0o755), os.Chmod(admin, 0o666)); err != nil {
		t.Fatal(err)
	}
	if err := connectAs(65534, admin); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("somebody else's connection gives %v, want its end", err)
	}
}

// The node does not suffer from it.
func TestWithoutTheAdminSocketCrishimRelays(t *testing.T) {
	requireRoot(t)
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "precious"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, admin := range map[string]string{
		"none": "", "nonsense": "tcp://127.0.0.1:1", "a file": filepath.Join(dir, "precious"), "below a file": filepath.Join(dir, "precious", "admin.sock"),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "crishim.sock")
			stop := start(t, Config{Listen: path, Admin: admin, RuntimeEndpoint: filepath.Join(dir, "absent.sock"), Criu: filepath.Join(dir, "criu")})
			if err := version(t, path); status.Code(err) != codes.Unavailable {
				t.Errorf("Version gives %v, want Unavailable: nothing but crishim answers so", err)
			}
			stop()
		})
	}
}
