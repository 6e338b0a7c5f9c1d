package main

import (
	"errors"
	"fmt"
	"io"
	"net"
	"syscall"
)

// outside is a TCP connection to an address, from which something has come that nobody has read yet.
func outside(address string) (func() (string, error), error) {
	fd, remote, err := connectTo(address, syscall.SOCK_STREAM)
	if err != nil {
		return nil, err
	}
	// Once there is something to be read, it is all there: the peer sends it at once.
	if _, _, err := syscall.Recvfrom(fd, make([]byte, 1), syscall.MSG_PEEK); err != nil {
		return nil, fmt.Errorf("wait for data: %w", err)
	}
	return func() (string, error) {
		data, err := peek(fd)
		if err != nil {
			return "", err
		}
		return ends(fd, remote, "with "+data)
	}, nil
}

// datagrams is a UDP socket that is connected to an address.
func datagrams(address string) (func() (string, error), error) {
	fd, remote, err := connectTo(address, syscall.SOCK_DGRAM)
	if err != nil {
		return nil, err
	}
	return func() (string, error) { return ends(fd, remote, "datagrams") }, writeAll(fd, []byte("hello"))
}

func connectTo(address string, kind int) (fd int, remote syscall.SockaddrInet4, err error) {
	resolved, err := net.ResolveTCPAddr("tcp4", address)
	if err != nil {
		return 0, remote, err
	}
	remote = syscall.SockaddrInet4{Port: resolved.Port, Addr: [4]byte(resolved.IP.To4())}
	fd, err = syscall.Socket(syscall.AF_INET, kind|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, remote, err
	}
	if err := syscall.Connect(fd, &remote); err != nil {
		return 0, remote, fmt.Errorf("connect to %s: %w", address, err)
	}
	return fd, remote, nil
}

// ends tells the two addresses of a socket, and whether it is without an error.
func ends(fd int, remote syscall.SockaddrInet4, what string) (string, error) {
	local, localErr := syscall.Getsockname(fd)
	peer, peerErr := syscall.Getpeername(fd)
	failed, failedErr := syscall.GetsockoptInt(fd, syscall.SOL_SOCKET, syscall.SO_ERROR)
	if err := errors.Join(localErr, peerErr, failedErr); err != nil {
		return "", err
	}
	if failed != 0 {
		return "", fmt.Errorf("socket: %w", syscall.Errno(failed))
	}
	is := *peer.(*syscall.SockaddrInet4)
	return fmt.Sprintf("from %v port %d to %v port %d %s", local.(*syscall.SockaddrInet4).Addr, local.(*syscall.SockaddrInet4).Port,
		is.Addr, is.Port, what), sameAddress(is, remote)
}

func sameAddress(is, was syscall.SockaddrInet4) error {
	if is.Addr != was.Addr || is.Port != was.Port {
		return fmt.Errorf("the peer was %v port %d", was.Addr, was.Port)
	}
	return nil
}

// backlog listens on a port of every address and accepts nothing.
func backlog(port string) (func() (string, error), error) {
	listener, err := net.Listen("tcp4", ":"+port)
	if err != nil {
		return nil, err
	}
	raw, err := listener.(*net.TCPListener).SyscallConn()
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		listening := 0
		var optionErr error
		err := raw.Control(func(fd uintptr) {
			listening, optionErr = syscall.GetsockoptInt(int(fd), syscall.SOL_SOCKET, syscall.SO_ACCEPTCONN)
		})
		return fmt.Sprintf("%s listening %d", listener.Addr(), listening), errors.Join(err, optionErr)
	}, nil
}

// serving is a server on a port of every address that sends back whatever comes.
func serving(port string) (func() (string, error), error) {
	listener, err := net.Listen("tcp4", ":"+port)
	if err != nil {
		return nil, err
	}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return // who asks for the state meets it
			}
			go func() {
				defer conn.Close()
				// The peer may end as it likes.
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	return func() (string, error) {
		conn, err := net.Dial("tcp4", "127.0.0.1:"+port)
		if err != nil {
			return "", err
		}
		defer conn.Close()
		if err := exchanges(conn)(); err != nil {
			return "", err
		}
		return "serves", nil
	}, nil
}
