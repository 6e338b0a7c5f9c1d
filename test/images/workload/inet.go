package main

import (
	"errors"
	"fmt"
	"syscall"
)

// tcpSockets are one that listens and two ends of a connection to it, with data that nobody has read yet, each way.
func tcpSockets(string) (func() (string, error), error) {
	address := &syscall.SockaddrInet4{Port: 7001, Addr: [4]byte{127, 0, 0, 1}}
	listener, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(syscall.SetsockoptInt(listener, syscall.SOL_SOCKET, syscall.SO_REUSEADDR, 1),
		syscall.Bind(listener, address), syscall.Listen(listener, 5)); err != nil {
		return nil, err
	}
	client, server, err := connectTCP(address, listener)
	if err != nil {
		return nil, err
	}
	data := make([]byte, 3000)
	noise(data, 13)
	if err := errors.Join(syscall.SetsockoptInt(client, syscall.IPPROTO_TCP, syscall.TCP_NODELAY, 1),
		syscall.SetsockoptInt(server, syscall.SOL_SOCKET, syscall.SO_KEEPALIVE, 1),
		writeAll(client, data[:2000]), writeAll(server, data[2000:])); err != nil {
		return nil, err
	}
	return func() (string, error) {
		there, err := peek(server)
		if err != nil {
			return "", err
		}
		back, err := peek(client)
		if err != nil {
			return "", err
		}
		noDelay, noDelayErr := syscall.GetsockoptInt(client, syscall.IPPROTO_TCP, syscall.TCP_NODELAY)
		keepAlive, keepAliveErr := syscall.GetsockoptInt(server, syscall.SOL_SOCKET, syscall.SO_KEEPALIVE)
		local, localErr := syscall.Getsockname(client)
		peer, peerErr := syscall.Getpeername(server)
		if err := errors.Join(noDelayErr, keepAliveErr, localErr, peerErr); err != nil {
			return "", err
		}
		again, accepted, err := connectTCP(address, listener)
		if err != nil {
			return "", err
		}
		if err := errors.Join(syscall.Close(again), syscall.Close(accepted)); err != nil {
			return "", err
		}
		return fmt.Sprintf("there %s, back %s, options %d %d, addresses %v and %v, listening", there, back, noDelay, keepAlive,
			*local.(*syscall.SockaddrInet4) == *peer.(*syscall.SockaddrInet4), peer.(*syscall.SockaddrInet4).Port), nil
	}, nil
}

func connectTCP(address syscall.Sockaddr, listener int) (client, server int, err error) {
	client, err = syscall.Socket(syscall.AF_INET, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err
	}
	if err := syscall.Connect(client, address); err != nil {
		return 0, 0, fmt.Errorf("connect: %w", err)
	}
	server, _, err = syscall.Accept4(listener, syscall.SOCK_CLOEXEC)
	return client, server, err
}

func writeAll(fd int, data []byte) error {
	n, err := syscall.Write(fd, data)
	if err == nil && n != len(data) {
		err = fmt.Errorf("wrote %d of %d bytes", n, len(data))
	}
	return err
}

// udpSockets are one that is bound and one that is connected to it. What they hold is not kept: a datagram may be lost.
func udpSockets(string) (func() (string, error), error) {
	var fds [2]int
	for i := range fds {
		fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		if err := syscall.Bind(fd, &syscall.SockaddrInet4{Port: 7002 + i, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
			return nil, err
		}
		fds[i] = fd
	}
	bound, connected := fds[0], fds[1]
	if err := syscall.Connect(connected, &syscall.SockaddrInet4{Port: 7002, Addr: [4]byte{127, 0, 0, 1}}); err != nil {
		return nil, err
	}
	return func() (string, error) {
		if err := writeAll(connected, []byte("hello")); err != nil {
			return "", err
		}
		var content [16]byte
		n, from, err := syscall.Recvfrom(bound, content[:], 0)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%q from port %d", content[:n], from.(*syscall.SockaddrInet4).Port), nil
	}, nil
}
