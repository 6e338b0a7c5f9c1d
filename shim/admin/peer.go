package admin

import (
	"context"
	"errors"
	"net"

	"google.golang.org/grpc/credentials"

	"crishim/shim/relay"
)

// peerCredentials gives grpc, for each connection, who is at its other end. It lets nobody in or out: the listener does that.
type peerCredentials struct{}

type peerInfo struct {
	relay.Peer
	credentials.CommonAuthInfo
}

// AuthType is credentials.AuthInfo's.
func (peerInfo) AuthType() string { return "SO_PEERCRED" }

func (peerCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	peer, err := relay.PeerOf(conn)
	if err != nil {
		return nil, nil, err
	}
	return conn, peerInfo{peer, credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}, nil
}

func (peerCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("these are credentials of a server")
}

func (peerCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix"}
}

func (c peerCredentials) Clone() credentials.TransportCredentials { return c }

func (peerCredentials) OverrideServerName(string) error { return nil }
