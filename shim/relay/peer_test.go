package relay

import (
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
)

// peerHelper is set in a copy of the test binary that runs as another user.
const peerHelper = "RELAY_TEST_PEER_SOCKET"

// tryPeer reports with its exit code how a connection fared.
func tryPeer(socket string) int {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return 3
	}
	defer c.Close()
	if _, err = c.Read(make([]byte, 1)); errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
		return 7 // closed without a word
	}
	return 0
}

func TestRootOnly(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to run as another user")
	}
	dir, err := os.MkdirTemp("", "relay") // t.TempDir is closed to others
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "relay.sock")
	inner, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	// A copy of this binary, in a place that everybody can read.
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	binary := filepath.Join(dir, "peer")
	for _, err := range []error{
		os.WriteFile(binary, self, 0o755), os.Chmod(dir, 0o755), os.Chmod(socket, 0o777),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	log, hook := test.NewNullLogger()
	l := RootOnly(inner, log)
	defer l.Close()
	accepted := make(chan error, 1)
	go func() {
		c, err := l.Accept()
		if err == nil {
			_, err = c.Write([]byte("x"))
			c.Close()
		}
		accepted <- err
	}()
	try := func(uid uint32) int {
		cmd := exec.Command(binary)
		cmd.Env = append(os.Environ(), peerHelper+"="+socket)
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
		cmd.Run()
		return cmd.ProcessState.ExitCode()
	}
	for range 3 {
		if code := try(65534); code != 7 {
			t.Errorf("another user: exit code %d, want a closed connection", code)
		}
	}
	select {
	case err := <-accepted:
		t.Fatalf("another user was accepted: %v", err)
	default:
	}
	if code := try(0); code != 0 {
		t.Errorf("root: exit code %d", code)
	}
	if err := <-accepted; err != nil {
		t.Error(err)
	}
	if n := len(hook.AllEntries()); n != 1 || hook.LastEntry().Level != logrus.WarnLevel {
		t.Errorf("%d log entries for 3 refusals, want one warning", n)
	}

	// The next entry has those that went unlogged.
	l.repeats.every = 0
	go l.Accept() // ends with the listener
	if code := try(65534); code != 7 {
		t.Errorf("another user: exit code %d, want a closed connection", code)
	}
	waitFor(t, "log entry", func() bool { return len(hook.AllEntries()) == 2 })
	for i, want := range []string{"only root may use this socket", "only root may use this socket (and 2 more since 20"} {
		if entry := hook.AllEntries()[i]; !strings.Contains(entry.Message, want) {
			t.Errorf("log entry %d is %q, want %q", i, entry.Message, want)
		}
	}
	if n := l.Refused(); n != 4 {
		t.Errorf("%d refusals were counted, want 4", n)
	}
}

func TestRootOnlyNeedsCredentials(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Skipf("no TCP here: %v", err)
	}
	log, hook := test.NewNullLogger()
	l := RootOnly(inner, log)
	done := make(chan error, 1)
	go func() {
		_, err := l.Accept()
		done <- err
	}()
	c, err := net.Dial("tcp", inner.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Read(make([]byte, 1)); err == nil {
		t.Error("a connection without credentials was kept")
	}
	l.Close()
	if err := <-done; !errors.Is(err, net.ErrClosed) {
		t.Errorf("accept: %v", err)
	}
	if len(hook.AllEntries()) != 1 {
		t.Errorf("log: %v", hook.AllEntries())
	}
}
