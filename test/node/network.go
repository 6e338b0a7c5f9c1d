package node

import (
	"context"
	"fmt"
	"net"
	"net/netip"

	"golang.org/x/sys/unix"
)

// DialContext connects from within the node's network. The address is an IP address with a port; names are not resolved.
// Unix sockets are dialled at Path.
func (n *Node) DialContext(ctx context.Context, network, address string) (net.Conn, error) {
	// Dialling a single address stays on this goroutine, and so in the node.
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("dial in the node: %w", err)
	}
	var conn net.Conn
	err := n.inNamespace("net", unix.CLONE_NEWNET, func() (err error) {
		conn, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return conn, err
}

// Listen listens within the node's network, at an IP address with a port. The caller closes the listener.
func (n *Node) Listen(ctx context.Context, network, address string) (net.Listener, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("listen in the node: %w", err)
	}
	var listener net.Listener
	err := n.inNamespace("net", unix.CLONE_NEWNET, func() (err error) {
		listener, err = new(net.ListenConfig).Listen(ctx, network, address)
		return err
	})
	return listener, err
}

// ListenPacket receives packets within the node's network, at an IP address with a port. The caller closes it.
func (n *Node) ListenPacket(ctx context.Context, network, address string) (net.PacketConn, error) {
	if _, err := netip.ParseAddrPort(address); err != nil {
		return nil, fmt.Errorf("listen in the node: %w", err)
	}
	var conn net.PacketConn
	err := n.inNamespace("net", unix.CLONE_NEWNET, func() (err error) {
		conn, err = new(net.ListenConfig).ListenPacket(ctx, network, address)
		return err
	})
	return conn, err
}
