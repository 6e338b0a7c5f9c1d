package checkpoint_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// A container with an established connection can only be dumped under a lock of its pod's network, by nftables or iptables,
// whichever there is. Nothing of it may be left.
func TestAnEstablishedConnection(t *testing.T) {
	containerd := node.Containerd(t)
	// Beside the connection, memory: the network is locked while that is written.
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/sh", "-c", "workload tcp & exec workload memory 256"}})
	node.WaitCount(t, 5, c.Log)
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, criu string
		hidden     []string // programs
		lock       string   // what the rules of the network say
	}{
		{"without iptables", "criu", iptables, "table inet CRIU-"},
		{"without nftables", criuWithoutNftables(t), []string{"nft"}, "-A CRIU -j DROP"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Criu: test.criu, Log: testLog(t)})
			defer service.Drain(context.Background())
			hide(t, test.hidden...)
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			result := make(chan error, 1)
			go func() {
				_, err := service.CheckpointContainer(ctx, request)
				result <- err
			}()
			wait, stop := context.WithTimeout(t.Context(), time.Minute)
			defer stop()
			held, err := node.HoldDump(wait, filepath.Dir(path))
			if err != nil {
				t.Fatal(err, <-result)
			}
			defer held.Release()
			if during := rules(t, pid); !strings.Contains(during, test.lock) {
				t.Errorf("in the middle of the dump the network has no %q:\n%s", test.lock, during)
			}
			cancel()
			held.Release()
			if err := <-result; status.Code(err) != codes.Canceled {
				t.Errorf("error is %v, want Canceled", err)
			}
			unlocked(t, pid)
			unharmed(t, c, path)

			if _, err := service.CheckpointContainer(t.Context(), request); err != nil {
				t.Fatal(err)
			}
			unlocked(t, pid)
			if images := members(t, path); images["checkpoint/tcp-stream-"] == 0 {
				t.Errorf("no TCP stream in the images: %v", images)
			}
			node.WaitMore(t, c.Log)
		})
	}
	t.Run("without either", func(t *testing.T) {
		service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Criu: criuWithoutNftables(t), Log: testLog(t)})
		defer service.Drain(context.Background())
		hide(t, iptables...)
		path := location(t)
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "install iptables") {
			t.Errorf("error is %v, want FailedPrecondition and what to install", err)
		}
		unharmed(t, c, path)
	})
}

// iptables are all programs of that name which criu may look for.
var iptables = []string{"iptables-restore", "ip6tables-restore", "iptables-legacy-restore", "ip6tables-legacy-restore",
	"iptables-nft-restore", "ip6tables-nft-restore"}

// hide takes programs away until the test's end.
func hide(t *testing.T, programs ...string) {
	t.Helper()
	for _, program := range programs {
		path := filepath.Join("/usr/sbin", program)
		if err := os.Rename(path, path+".hidden"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.Rename(path+".hidden", path); err != nil {
				t.Error(err)
			}
		})
	}
}

// criuWithoutNftables is a stand-in for a criu that was built without nftables: the real one, but for its answer to the question.
func criuWithoutNftables(t *testing.T) string {
	t.Helper()
	criu, err := exec.LookPath("criu")
	if err != nil {
		t.Skip("needs the test node: run make test")
	}
	path := filepath.Join(t.TempDir(), "criu")
	script := "#!/bin/sh\ncase $* in *nftables*) exit 1 ;; esac\nexec " + criu + ` "$@"` + "\n"
	if err := os.WriteFile(path, []byte(script), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

// rules are those of a process's network, by whatever they were made.
func rules(t *testing.T, pid int) string {
	t.Helper()
	var all strings.Builder
	for _, command := range [][]string{{"nft", "list", "ruleset"}, {"iptables-save"}, {"ip6tables-save"}} {
		program := command[0]
		if _, err := exec.LookPath(program); err != nil {
			program = filepath.Join("/usr/sbin", program+".hidden")
		}
		out, err := exec.Command("nsenter", append([]string{"-n", "-t", strconv.Itoa(pid), program}, command[1:]...)...).CombinedOutput()
		if err != nil {
			t.Fatalf("list rules: %v: %s", err, out)
		}
		all.Write(out)
	}
	return all.String()
}

// unlocked fails the test if anything of a lock is left. The empty tables that iptables makes of nftables' are not.
func unlocked(t *testing.T, pid int) {
	t.Helper()
	left := strings.ToLower(rules(t, pid))
	for _, word := range []string{"criu", "drop", "mark"} {
		if strings.Contains(left, word) {
			t.Errorf("the network lock is still there:\n%s", left)
			return
		}
	}
}
