package relay

import (
	"context"
	"fmt"
	"net"
	"sync/atomic"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
)

// RootOnly returns a listener that hands out only connections from processes
// that ran as root when they connected, by SO_PEERCRED; others are closed and
// counted, and logged at most once a minute with how many there were since. It is for Unix sockets: a connection without
// peer credentials is refused too.
func RootOnly(l net.Listener, log logrus.FieldLogger) *RootListener {
	return &RootListener{Listener: l, repeats: newRepeats(log)}
}

// A RootListener is what RootOnly returns.
type RootListener struct {
	net.Listener
	repeats *repeats
	refused atomic.Int64
}

// Accept is as in net.Listener.
func (l *RootListener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if err = checkRoot(conn); err == nil {
			return conn, nil
		}
		conn.Close()
		l.refused.Add(1)
		l.repeats.say(logrus.WarnLevel, "refused a connection: only root may use this socket", err)
	}
}

// Refused is how many connections were refused. It may be called at any time.
func (l *RootListener) Refused() int64 { return l.refused.Load() }

func checkRoot(conn net.Conn) error {
	peer, err := PeerOf(conn)
	if err != nil {
		return fmt.Errorf("check peer: %w", err)
	}
	if peer.Uid != 0 {
		return fmt.Errorf("check peer: process %d runs as uid %d", peer.Pid, peer.Uid)
	}
	return nil
}

// Peer is the process at the other end of a Unix socket, by the credentials
// that it had when it connected. It may have ended since, and another may have
// its pid.
type Peer struct {
	Pid int32
	Uid uint32
}

// PeerOf returns the peer of a connection, by SO_PEERCRED.
func PeerOf(conn net.Conn) (Peer, error) {
	c, ok := conn.(*net.UnixConn)
	if !ok {
		return Peer{}, fmt.Errorf("%T has no credentials", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return Peer{}, err
	}
	var cred *unix.Ucred
	var credErr error
	if err = raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return Peer{}, err
	}
	if credErr != nil {
		return Peer{}, credErr
	}
	return Peer{Pid: cred.Pid, Uid: cred.Uid}, nil
}

type peerKey struct{}

// PeerFrom returns who has sent the request that a handler serves, by the
// context of that. It is not known of a connection that is not a Unix socket's.
func PeerFrom(ctx context.Context) (peer Peer, ok bool) {
	peer, ok = ctx.Value(peerKey{}).(Peer)
	return peer, ok
}
