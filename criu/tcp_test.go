package criu

import (
	"bufio"
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
)

func TestParseSocket(t *testing.T) {
	for _, test := range []struct {
		name, line, inode string
		connected         bool
	}{
		{"header", "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode", "", false},
		{"established", "   1: 0100007F:1F90 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 20 4 30 10 -1", "4242", true},
		{"listening", "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 4241 1 0 100 0 0 10 0", "4241", false},
		{"closed", "   0: 00000000:0000 00000000:0000 07 00000000:00000000 00:00000000 00000000     0        0 4243 1 0 100 0 0 10 0", "4243", false},
		{"TIME_WAIT", "   2: 0100007F:1F90 0100007F:D2F2 06 00000000:00000000 03:00000F3E 00000000     0        0 0 3 0", "0", false},
		{"cut off", "   1: 0100007F:1F90 0100007F:D2F0 01", "", false},
	} {
		inode, _, connected := parseSocket(test.line)
		if connected != test.connected || connected && inode != test.inode {
			t.Errorf("%s: got %q, %t; want %q, %t", test.name, inode, connected, test.inode, test.connected)
		}
	}
}

func TestParseAddress(t *testing.T) {
	for text, want := range map[string]string{
		"0100007F:1F90":                         "127.0.0.1:8080",
		"B80D01200000000067452301EFCDAB89:0050": "[2001:db8::123:4567:89ab:cdef]:80",
		"0000000000000000FFFF00000100007F:0050": "127.0.0.1:80", // IPv4 in IPv6
		"0100007F:1F90F":                        "0100007F:1F90F",
		"no":                                    "no",
		"":                                      "",
	} {
		if got := parseAddress(text); got != want { // on a little-endian machine, as all are that crishim is for
			t.Errorf("%q is %q, want %q", text, got, want)
		}
	}
}

func TestConnectedTCP(t *testing.T) {
	check := func(pid int, want bool, when string) {
		t.Helper()
		at, got, err := (Container{Pid: pid}).connectedTCP(t.Context())
		if err != nil || got != want {
			t.Errorf("%s: got %t, %v; want %t", when, got, err, want)
		}
		if got && (at.fd < 3 || !strings.Contains(at.path, "TCP connection of 127.0.0.1:")) {
			t.Errorf("%s: it is at %+v", when, at)
		}
	}
	self := os.Getpid()
	check(self, false, "without a socket")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	check(self, false, "listening")
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	check(self, true, "connected")

	check(start(t, nil, "echo ready; read line"), false, "in another process, as after an exec")
	file, err := conn.(*net.TCPConn).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	check(start(t, file, "sleep 60 & exec 3>&-; echo ready; read line; kill $!"), true, "in a child")

	ended, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("no time"))
	if _, _, err := (Container{Pid: self}).connectedTCP(ended); err == nil || err.Error() != "no time" {
		t.Errorf("with a context that has ended: %v", err)
	}
}

// start starts a shell, with a file as its descriptor 3, that writes a line when it is ready, and ends when it reads one.
func start(t *testing.T, file *os.File, script string) (pid int) {
	t.Helper()
	cmd := exec.Command("sh", "-c", script)
	if file != nil {
		cmd.ExtraFiles = []*os.File{file}
	}
	stdin, err := cmd.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		if err := cmd.Wait(); err != nil && cmd.ProcessState.ExitCode() < 0 {
			t.Error(err)
		}
	})
	if _, err := bufio.NewReader(stdout).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
	return cmd.Process.Pid
}

func FuzzParseSocket(f *testing.F) {
	f.Add("   1: 0100007F:1F90 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 20 4 30 10 -1")
	f.Fuzz(func(t *testing.T, line string) {
		if inode, _, connected := parseSocket(line); connected && inode == "" {
			t.Error("connected without an inode")
		}
	})
}
