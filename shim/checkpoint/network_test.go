package checkpoint_test

import (
	"context"
	"io"
	"net"
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

// A container with an established connection can only be dumped under a lock, of its pod's network or, in the node's own, of that
// connection: by nftables or iptables, whichever there is. Nothing of it may be left.
func TestAnEstablishedConnection(t *testing.T) {
	for name, network := range map[string]runtimeapi.NamespaceMode{
		"pod": runtimeapi.NamespaceMode_POD, "hostNetwork": runtimeapi.NamespaceMode_NODE,
	} {
		t.Run(name, func(t *testing.T) { establishedConnection(t, network) })
	}
}

func establishedConnection(t *testing.T, network runtimeapi.NamespaceMode) {
	containerd := node.Containerd(t)
	spec := namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, Network: network})
	// Connections of a process are locked before its children's memory is written.
	spec.Command = []string{"/bin/sh", "-c", "workload memory 256 & exec workload tcp"}
	c := containerd.Run(t, spec)
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
		{"without nftables", criuWithoutNftables(t), []string{"nft"}, "-j DROP"},
	} {
		t.Run(test.name, func(t *testing.T) {
			service := serviceWith(t, containerd, test.criu)
			hide(t, test.hidden...)
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			held, ended := node.HoldCheckpoint(t, filepath.Dir(path), path, func() error {
				_, err := service.CheckpointContainer(ctx, request)
				return err
			})
			if during := rules(t, pid); !strings.Contains(during, test.lock) {
				t.Errorf("in the middle of the dump the network has no %q:\n%s", test.lock, during)
			}
			cancel()
			held.RollBack(t)
			if err := <-ended; status.Code(err) != codes.Canceled {
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
		service := serviceWith(t, containerd, criuWithoutNftables(t))
		hide(t, iptables...)
		path := location(t)
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "install iptables") {
			t.Errorf("error is %v, want FailedPrecondition and what to install", err)
		}
		unharmed(t, c, path)
	})
}

// The container's connections are looked at before the dump. One that comes after that look must not fail it, unless none are wanted.
func TestAConnectionThatComesLast(t *testing.T) {
	t.Run("dumped", func(t *testing.T) { connectionThatComesLast(t, false) })
	t.Run("refused", func(t *testing.T) { connectionThatComesLast(t, true) })
}

func connectionThatComesLast(t *testing.T, refuse bool) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "net", "server", "8080"}})
	node.WaitCount(t, 0, c.Log)
	pod, err := containerd.Runtime.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: c.PodID})
	if err != nil {
		t.Fatal(err)
	}
	// criu starts after the look: this one is the real one that waits until it may.
	dir := t.TempDir()
	started, may := filepath.Join(dir, "started"), filepath.Join(dir, "may")
	criu := standIn(t, "swrk*) touch "+started+"; until [ -e "+may+" ]; do sleep 0.01; done ;;")
	service := serviceWith(t, containerd, criu, func(config *checkpoint.Config) { config.RefuseTCP = refuse })
	path := location(t)
	result := make(chan error, 1)
	go func() {
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		result <- err
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(started); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("criu does not start")
		}
	}
	conn, err := net.Dial("tcp", pod.GetStatus().GetNetwork().GetIp()+":8080")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	exchange := func() {
		t.Helper()
		var answer [5]byte
		if _, err := conn.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(conn, answer[:]); err != nil || string(answer[:]) != "hello" {
			t.Fatalf("the server answers %q, %v", answer, err)
		}
	}
	exchange()
	if err := os.WriteFile(may, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	err = <-result
	if refuse {
		connectionRefused(t, err, "process 1 (workload), descriptor ", ":8080 with ", "it was connected just now")
		exchange()
		unharmed(t, c, path)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	exchange()
	if images := members(t, path); images["checkpoint/tcp-stream-"] != 1 {
		t.Errorf("the archive has %d connections, want one: %v", images["checkpoint/tcp-stream-"], images)
	}
}

func TestConnectionsThatAreRefused(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "tcp"}})
	node.WaitCount(t, 5, c.Log)
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	service := serviceWith(t, containerd, "criu", func(config *checkpoint.Config) { config.RefuseTCP = true })
	path := location(t)
	_, err = service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
	connectionRefused(t, err, "process 1 (workload), descriptor ", " (TCP connection of 127.0.0.1:", " with 127.0.0.1:")
	unlocked(t, pid)
	unharmed(t, c, path)

	// Without a connection it is all the same.
	without := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, without.Log)
	if _, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: without.ID, Location: path}); err != nil {
		t.Error(err)
	}
}

// connectionRefused fails the test unless a checkpoint was refused for a connection, with these words in the error.
func connectionRefused(t *testing.T, err error, words ...string) {
	t.Helper()
	if status.Code(err) != codes.FailedPrecondition {
		t.Fatalf("error is %v, want FailedPrecondition", err)
	}
	for _, word := range append(words, "checkpoint.tcp refuses connections; close it first, or set that to established") {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("error is %v, want one with %q", err, word)
		}
	}
}

// serviceWith is the checkpoint service with a certain criu, and what is changed of its configuration.
func serviceWith(t *testing.T, containerd *node.Client, criu string, changes ...func(*checkpoint.Config)) *checkpoint.Service {
	t.Helper()
	config := checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: criu, Version: "test", State: t.TempDir(), Log: testLog(t),
	}
	for _, change := range changes {
		change(&config)
	}
	service := checkpoint.New(config)
	t.Cleanup(func() { service.Drain(context.Background()) })
	return service
}

// iptables are the programs of that name which criu may run.
var iptables = []string{"iptables", "ip6tables", "iptables-restore", "ip6tables-restore"}

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
func criuWithoutNftables(t *testing.T) string { return standIn(t, "*nftables*) exit 1 ;;") }

// standIn is the real criu, which for some arguments, a case of the shell's, does something before.
func standIn(t *testing.T, before string) string {
	t.Helper()
	criu, err := exec.LookPath("criu")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "criu")
	script := "#!/bin/sh\ncase $* in " + before + " esac\nexec " + criu + ` "$@"` + "\n"
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
	for _, word := range []string{"criu", "-j drop", "policy drop"} {
		if strings.Contains(left, word) {
			t.Errorf("the network lock is still there:\n%s", left)
			return
		}
	}
}
