package main

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// unixSockets are pairs of each type with data in them, and a named and an abstract one that are connected and that listen.
func unixSockets(string) (func() (string, error), error) {
	data := make([]byte, 3000)
	noise(data, 12)
	var looks []func() (string, error)
	for _, kind := range []int{syscall.SOCK_STREAM, syscall.SOCK_DGRAM, syscall.SOCK_SEQPACKET} {
		pair, err := syscall.Socketpair(syscall.AF_UNIX, kind|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		for _, part := range [][]byte{data[:1000], data[1000:]} {
			if _, err := syscall.Write(pair[0], part); err != nil {
				return nil, err
			}
		}
		// Half closed.
		if kind == syscall.SOCK_STREAM {
			if err := syscall.Shutdown(pair[1], syscall.SHUT_WR); err != nil {
				return nil, err
			}
		}
		looks = append(looks, func() (string, error) {
			size, err := syscall.GetsockoptInt(pair[1], syscall.SOL_SOCKET, syscall.SO_TYPE)
			if err != nil {
				return "", err
			}
			waiting, err := peek(pair[1])
			if err != nil {
				return "", err
			}
			back, err := peek(pair[0])
			return fmt.Sprintf("type %d with %s, back %s", size, waiting, back), err
		})
	}
	for _, name := range []string{"/tmp/socket", "@abstract"} {
		listener, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return nil, err
		}
		address := &syscall.SockaddrUnix{Name: name}
		if err := errors.Join(syscall.Bind(listener, address), syscall.Listen(listener, 5)); err != nil {
			return nil, err
		}
		client, server, err := connectUnix(address, listener)
		if err != nil {
			return nil, err
		}
		if _, err := syscall.Write(client, data[:500]); err != nil {
			return nil, err
		}
		looks = append(looks, func() (string, error) {
			waiting, err := peek(server)
			if err != nil {
				return "", err
			}
			// It still listens at its name.
			again, accepted, err := connectUnix(address, listener)
			if err != nil {
				return "", err
			}
			if err := errors.Join(syscall.Close(again), syscall.Close(accepted)); err != nil {
				return "", err
			}
			if info, err := os.Stat(name); !strings.HasPrefix(name, "@") && (err != nil || info.Mode()&os.ModeSocket == 0) {
				return "", fmt.Errorf("its file: %v, %w", info, err)
			}
			return fmt.Sprintf("connected at %s with %s", name, waiting), nil
		})
	}
	return all(looks), nil
}

// all joins states.
func all(looks []func() (string, error)) func() (string, error) {
	return func() (string, error) {
		var states []string
		for _, look := range looks {
			state, err := look()
			if err != nil {
				return strings.Join(states, "; "), err
			}
			states = append(states, state)
		}
		return strings.Join(states, "; "), nil
	}
}

func connectUnix(address *syscall.SockaddrUnix, listener int) (client, server int, err error) {
	client, err = syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, 0, err
	}
	if err := syscall.Connect(client, address); err != nil {
		return 0, 0, fmt.Errorf("connect to %s: %w", address.Name, err)
	}
	server, _, err = syscall.Accept4(listener, syscall.SOCK_CLOEXEC)
	return client, server, err
}

// peek looks at what waits in a socket, and leaves it there: of a datagram socket only the first.
func peek(fd int) (string, error) {
	content := make([]byte, 64<<10)
	n, _, err := syscall.Recvfrom(fd, content, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
	if err == syscall.EAGAIN {
		return "nothing", nil
	}
	if err != nil {
		return "", fmt.Errorf("look into socket: %w", err)
	}
	return sum(content[:n]), nil
}

// passing is a descriptor on its way in a unix socket, sent and not received yet.
func passing(string) (func() (string, error), error) {
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	var pipe [2]int
	if err := syscall.Pipe2(pipe[:], syscall.O_CLOEXEC); err != nil {
		return nil, err
	}
	if err := syscall.Sendmsg(pair[0], []byte("x"), syscall.UnixRights(pipe[0]), nil, 0); err != nil {
		return nil, err
	}
	if err := syscall.Close(pipe[0]); err != nil {
		return nil, err
	}
	if _, err := syscall.Write(pipe[1], []byte("through the passed end")); err != nil {
		return nil, err
	}
	return func() (string, error) {
		control := make([]byte, syscall.CmsgSpace(4))
		// A look takes a duplicate.
		_, size, _, _, err := syscall.Recvmsg(pair[1], make([]byte, 1), control, syscall.MSG_PEEK|syscall.MSG_DONTWAIT)
		if err != nil {
			return "", err
		}
		messages, err := syscall.ParseSocketControlMessage(control[:size])
		if err != nil || len(messages) != 1 {
			return "", fmt.Errorf("%d control messages, %w", len(messages), err)
		}
		fds, err := syscall.ParseUnixRights(&messages[0])
		if err != nil {
			return "", err
		}
		defer syscall.Close(fds[0])
		return buffered(fds[0])
	}, nil
}

// peerName is what a client says that it is connected to.
func peerName(string) (func() (string, error), error) {
	listener, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	address := &syscall.SockaddrUnix{Name: "@peer"}
	if err := errors.Join(syscall.Bind(listener, address), syscall.Listen(listener, 5)); err != nil {
		return nil, err
	}
	client, _, err := connectUnix(address, listener)
	return func() (string, error) {
		peer, err := syscall.Getpeername(client)
		if err != nil {
			return "", err
		}
		return "peer " + strconv.Quote(peer.(*syscall.SockaddrUnix).Name), nil
	}, err
}

// waiting is a unix connection that the listener has not accepted yet, ARGUMENT what was sent over it.
func waiting(data string) (func() (string, error), error) {
	listener, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	address := &syscall.SockaddrUnix{Name: "/var/waiting"}
	if err := errors.Join(syscall.Bind(listener, address), syscall.Listen(listener, 5)); err != nil {
		return nil, err
	}
	dial := func() (int, error) {
		client, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
		if err != nil {
			return 0, err
		}
		if err := syscall.Connect(client, address); err != nil {
			return 0, err
		}
		if data != "" {
			_, err = syscall.Write(client, []byte(data))
		}
		return client, err
	}
	client, err := dial()
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		server, _, err := syscall.Accept4(listener, syscall.SOCK_CLOEXEC|syscall.SOCK_NONBLOCK)
		if err != nil {
			return "", err
		}
		state, err := peek(server)
		// As it was.
		if err := errors.Join(err, syscall.Close(server), syscall.Close(client)); err != nil {
			return "", err
		}
		client, err = dial()
		return state, err
	}, nil
}
