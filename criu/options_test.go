package criu

import (
	"os"
	"path/filepath"
	"testing"

	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
)

// The expected options were written down from those that runc 1.1.15 and crun 1.21 set themselves.
func TestOptions(t *testing.T) {
	dir, err := os.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	for _, runtime := range []Runtime{Runc, Crun} {
		for mode, network := range map[string]networkMode{"": skipNetworkLock, "-tcp": lockNetwork, "-tcp-nftables": lockNetworkByNftables} {
			name := string(runtime) + mode
			t.Run(name, func(t *testing.T) {
				got := Dump{Images: dir, Work: dir, Container: Container{
					Pid:              4711,
					Runtime:          runtime,
					Rootfs:           "/run/containerd/task/rootfs",
					Freezer:          "/sys/fs/cgroup/freezer/kubepods/pod/c",
					SharedNamespaces: []Namespace{{"network", 4026532000}, {"pid", 4026532001}, {"ipc", 4026532002}},
					ExternalMounts:   []string{"/etc/hosts", "/sys/fs/cgroup/freezer"},
					MaskedFiles:      []string{"/proc/kcore"},
				}}.options(network)
				// Descriptors differ from run to run, and the administrator's file from machine to machine.
				got.ImagesDirFd, got.WorkDirFd, got.ConfigFile = proto.Int32(8), proto.Int32(9), nil
				golden, err := os.ReadFile(filepath.Join("testdata", "options-"+name+".json"))
				if err != nil {
					t.Fatal(err)
				}
				want := &rpc.CriuOpts{}
				if err := protojson.Unmarshal(golden, want); err != nil {
					t.Fatal(err)
				}
				if !proto.Equal(got, want) {
					t.Errorf("options are\n%s\nwant\n%s", protojson.Format(got), protojson.Format(want))
				}
			})
		}
	}
}
