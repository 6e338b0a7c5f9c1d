package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"
)

// listen returns the listening socket for the kubelet: the one that systemd hands over, which outlives restarts, or a new one
// at endpoint.
func listen(ctx context.Context, endpoint string) (net.Listener, error) {
	handedOver, err := activation.Listeners()
	if err != nil {
		return nil, fmt.Errorf("take over sockets from systemd: %w", err)
	}
	switch len(handedOver) {
	case 0:
	case 1:
		if l, ok := handedOver[0].(*net.UnixListener); ok {
			// It is systemd's, which goes on listening on it when this process is gone.
			l.SetUnlinkOnClose(false)
			return l, nil
		}
		return nil, errors.New("take over socket from systemd: it is not a unix stream socket: see ListenStream= in crishim.socket")
	default:
		return nil, fmt.Errorf("take over sockets from systemd: got %d, one is needed: see crishim.socket", len(handedOver))
	}
	return listenAt(ctx, endpoint)
}

// listenAt returns a new listening socket: 0600, in a directory that is 0700 where it is made here.
func listenAt(ctx context.Context, endpoint string) (net.Listener, error) {
	path, err := socketPath(endpoint)
	if err != nil {
		return nil, fmt.Errorf("parse listen address: %w", err)
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("make directory of listening socket: %w", err)
	}
	if err := removeStale(ctx, path); err != nil {
		return nil, err
	}
	l, err := (&net.ListenConfig{Control: privateSocket}).Listen(ctx, "unix", path)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	return l, nil
}

// privateSocket makes the socket 0600 from its first moment: bind takes the mode of the file from the socket's own.
func privateSocket(_, _ string, conn syscall.RawConn) error {
	var err error
	controlErr := conn.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) })
	return errors.Join(controlErr, err)
}

// removeStale removes the socket of a crishim that ended without doing so, and nothing else.
func removeStale(ctx context.Context, path string) error {
	info, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look at listening socket: %w", err)
	}
	if info.Mode()&fs.ModeSocket == 0 {
		return fmt.Errorf("listen at %s: there is something that is not a socket: remove it, or listen elsewhere", path)
	}
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err == nil {
		conn.Close()
		return fmt.Errorf("listen at %s: another process listens there already: is crishim running, or is this the runtime's own socket?", path)
	}
	if !errors.Is(err, unix.ECONNREFUSED) {
		return fmt.Errorf("look at listening socket: %w", err)
	}
	if err := os.Remove(path); err != nil {
		return fmt.Errorf("remove stale socket: %w", err)
	}
	return nil
}
