package matrix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// gateway is the first node's own address in the network of its pods.
const gateway = "10.88.0.1"

// networkRows are those whose connections have an end outside of the pod. What is restored has the address of the original.
func networkRows() []row {
	return []row{
		{name: "TCP connection to another address", what: "with data that nobody has read yet; the peer sees no reset",
			kinds: []string{"outside=" + gateway + ":7101"}, before: tcpPeer},
		{name: "TCP connection that is not accepted yet", what: "in the backlog of a listening socket; lost for the restored container",
			kinds: []string{"backlog=7102"}, during: waitingClient},
		{name: "UDP socket connected to another address", what: "no datagram is lost meanwhile",
			kinds: []string{"datagrams=" + gateway + ":7103"}, before: udpPeer},
		{name: "server under connections", what: "200 new connections a second, dumped 50 times; it serves after the last",
			kinds: []string{"serving=7104"}, during: manyClients, dumps: 50, alone: true},
	}
}

// tcpPeer accepts a connection, greets, and finds after the dump that what it sends arrives.
func tcpPeer(ctx context.Context, t *testing.T, s *site) (func() error, error) {
	listener, err := s.first.Listen(ctx, "tcp", "0.0.0.0:7101")
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { listener.Close() })
	type result struct {
		conn net.Conn
		err  error
	}
	accepted := make(chan result, 1)
	go func() {
		conn, err := listener.Accept()
		if err == nil {
			_, err = io.WriteString(conn, "greeting\n")
		}
		accepted <- result{conn, err}
	}()
	return func() error {
		r := <-accepted
		if r.err != nil {
			return r.err
		}
		defer r.conn.Close()
		if _, err := io.WriteString(r.conn, "after the dump\n"); err != nil {
			return err
		}
		return acknowledged(ctx, r.conn.(*net.TCPConn))
	}, nil
}

// acknowledged waits until the other end's kernel has taken what was sent.
func acknowledged(ctx context.Context, conn *net.TCPConn) error {
	raw, err := conn.SyscallConn()
	if err != nil {
		return err
	}
	for {
		unsent, failed := 0, 0
		var errs error
		err := raw.Control(func(fd uintptr) {
			var queueErr, optionErr error
			unsent, queueErr = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ)
			failed, optionErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_ERROR)
			errs = errors.Join(queueErr, optionErr)
		})
		if err := errors.Join(err, errs); err != nil {
			return err
		}
		if failed != 0 {
			return fmt.Errorf("the peer's end of the connection: %w", unix.Errno(failed))
		}
		if unsent == 0 {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("%d bytes are not acknowledged: %w", unsent, err)
		}
	}
}

// waitingClient connects to a container that does not accept, and finds after the dump that nobody has ended its connection.
func waitingClient(ctx context.Context, s *site, c *node.Container) (func() error, error) {
	address, err := c.Address(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := s.first.DialContext(ctx, "tcp", net.JoinHostPort(address, "7102"))
	if err != nil {
		return nil, err
	}
	return func() error {
		defer conn.Close()
		if _, err := io.WriteString(conn, "is anybody there?\n"); err != nil {
			return err
		}
		return acknowledged(ctx, conn.(*net.TCPConn))
	}, nil
}

// udpPeer sends back datagrams, and finds after the dump that the container's are still answered.
func udpPeer(ctx context.Context, t *testing.T, s *site) (func() error, error) {
	packets, err := s.first.ListenPacket(ctx, "udp", "0.0.0.0:7103")
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() { packets.Close() })
	return func() error {
		var buffer [16]byte
		if err := packets.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			return err
		}
		n, from, err := packets.ReadFrom(buffer[:])
		if err != nil {
			return err
		}
		if string(buffer[:n]) != "hello" {
			return fmt.Errorf("received %q", buffer[:n])
		}
		_, err = packets.WriteTo([]byte("still there"), from)
		return err
	}, nil
}

// manyClients opens connections to the container from another one, which ends when an exchange fails.
func manyClients(ctx context.Context, s *site, c *node.Container) (func() error, error) {
	address, err := c.Address(ctx)
	if err != nil {
		return nil, err
	}
	clients, err := s.containerd.RunContainer(ctx, node.Spec{Name: "clients", Command: []string{
		"/bin/workload", "net", "clients", net.JoinHostPort(address, "7104"), "200"}})
	if err != nil {
		return nil, err
	}
	return func() error {
		err := moreCounts(ctx, clients)
		return errors.Join(err, clients.Remove(context.WithoutCancel(ctx)))
	}, nil
}

// moreCounts waits until a container has counted on.
func moreCounts(ctx context.Context, c *node.Container) error {
	for first := -1; ; {
		log, err := c.Log()
		if err != nil {
			return err
		}
		last := node.LastCount(log)
		if first < 0 {
			first = last
		}
		if last > first {
			return nil
		}
		if state, err := c.State(ctx); err != nil || state != cri.ContainerState_CONTAINER_RUNNING {
			return fmt.Errorf("it is %v, %w: %s", state, err, written(log))
		}
		if err := pause(ctx); err != nil {
			return err
		}
	}
}
