package criu

import (
	"net"
	"os"
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
		inode, connected := parseSocket(test.line)
		if connected != test.connected || connected && inode != test.inode {
			t.Errorf("%s: got %q, %t; want %q, %t", test.name, inode, connected, test.inode, test.connected)
		}
	}
}

func TestConnectedTCP(t *testing.T) {
	self := Container{Pid: os.Getpid()}
	check := func(want bool, when string) {
		t.Helper()
		if got, err := self.connectedTCP(); err != nil || got != want {
			t.Errorf("%s: got %t, %v; want %t", when, got, err, want)
		}
	}
	check(false, "without a socket")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	check(false, "listening")
	conn, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	check(true, "connected")
	conn.Close()
}

func FuzzParseSocket(f *testing.F) {
	f.Add("   1: 0100007F:1F90 0100007F:D2F0 01 00000000:00000000 00:00000000 00000000     0        0 4242 1 0 20 4 30 10 -1")
	f.Fuzz(func(t *testing.T, line string) {
		if inode, connected := parseSocket(line); connected && inode == "" {
			t.Error("connected without an inode")
		}
	})
}
