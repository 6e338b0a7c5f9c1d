package criu

import (
	"net"
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

func TestChooseNetwork(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	choose := func(version int) networkMode {
		t.Helper()
		// This process is the container, and a criu that is not there can lock by default alone.
		mode, err := Dump{Criu: "/nowhere/criu", Version: version, Container: Container{Pid: os.Getpid()}}.chooseNetwork(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return mode
	}
	for version, want := range map[int]networkMode{0: lockNetwork, 31600: lockNetwork, 31800: lockNetwork, 31900: skipNetworkLock, 40201: skipNetworkLock} {
		if got := choose(version); got != want {
			t.Errorf("without a connection, criu %s: %d, want %d", versionString(version), got, want)
		}
	}
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, version := range []int{31600, 31900, 40201} {
		if got := choose(version); got != lockNetwork {
			t.Errorf("with a connection, criu %s: %d, want %d", versionString(version), got, lockNetwork)
		}
	}
}
