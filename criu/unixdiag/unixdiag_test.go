package unixdiag

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// inodeOf is the inode of a connection's socket.
func inodeOf(t *testing.T, c net.Conn) uint32 {
	t.Helper()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if controlErr := raw.Control(func(fd uintptr) { err = unix.Fstat(int(fd), &st) }); controlErr != nil || err != nil {
		t.Fatal(controlErr, err)
	}
	return uint32(st.Ino)
}

func find(t *testing.T, inode uint32) (s Socket, ok bool) {
	t.Helper()
	all, err := List(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range all {
		if s.Inode == inode {
			return s, true
		}
	}
	return Socket{}, false
}

func TestList(t *testing.T) {
	for network, kind := range map[string]int{"unix": unix.SOCK_STREAM, "unixpacket": unix.SOCK_SEQPACKET} {
		path := filepath.Join(t.TempDir(), "socket")
		listener, err := net.Listen(network, path)
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		client, err := net.Dial(network, path)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if s, ok := find(t, inodeOf(t, client)); !ok || s.Peer != 0 || s.Type != kind {
			t.Errorf("%s: one that nobody has accepted is %+v, %t", network, s, ok)
		}
		server, err := listener.Accept()
		if err != nil {
			t.Fatal(err)
		}
		defer server.Close()
		var file unix.Stat_t
		if err := unix.Stat(path, &file); err != nil {
			t.Fatal(err)
		}
		there, ok := find(t, inodeOf(t, server))
		if !ok || there.Peer != inodeOf(t, client) || !there.IsAt(&file) {
			t.Errorf("%s: the server's is %+v, %t", network, there, ok)
		}
		here, ok := find(t, inodeOf(t, client))
		if !ok || here.Peer != there.Inode || here.IsAt(&file) {
			t.Errorf("%s: the client's is %+v, %t", network, here, ok)
		}
	}
	path := filepath.Join(t.TempDir(), "datagrams")
	server, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer server.Close()
	client, err := net.Dial("unixgram", path)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if s, ok := find(t, inodeOf(t, client)); !ok || s.Peer != inodeOf(t, server) || s.Type != unix.SOCK_DGRAM {
		t.Errorf("the sender of datagrams is %+v, %t", s, ok)
	}
}

func TestHeld(t *testing.T) {
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "socket"))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	client, err := net.Dial("unix", listener.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	held, err := Held(os.Getpid())
	if fd, ok := held[inodeOf(t, client)]; err != nil || !ok || fd < 3 {
		t.Errorf("the client's socket is descriptor %d, %t, %v", fd, ok, err)
	}
	if _, err := Held(1 << 30); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

func TestListOfNoNamespace(t *testing.T) {
	if _, err := List(1 << 30); err == nil || !strings.Contains(err.Error(), "ask the kernel for unix sockets") {
		t.Errorf("got %v", err)
	}
}
