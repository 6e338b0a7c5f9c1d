package relay

import (
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket is a connection that is read and written with as little as can be of what Go's runtime and the kernel do around it. For a proxy of
// small messages that is nearly all that it costs (make bench):
//
//   - Its system calls never wait, and Go's scheduler is not told of them. One that it is told of makes it wake its monitor thread, if the
//     process was idle before, and a proxy of small messages is idle before each.
//   - Go's poller does not watch it. That would watch for writing as well, and of a Unix socket the kernel says each time that the peer has read
//     something that it can now be written (unix_write_space): it would wake a thread that has nothing to write. Each direction has an epoll
//     instance instead that watches for what is waited for, and that Go's poller watches (edge-triggered, which is sound for an epoll instance since
//     Linux 5.7). So a socket takes three descriptors.
//   - A small message is passed on before it is taken off the socket. To take it off tells the sender the same, whose thread often runs first.
//
// There may be one reader and one writer at a time. The other methods may be called at any time.
type socket struct {
	fd            int
	local, remote net.Addr
	peer          *Peer // nil where the kernel does not say
	in, out       transfer

	idle   func() // called by Read when it is time to pass on what was read before; Close waits for it
	gather bool   // that is only when there is nothing more to read; the reader's to set
	seen   int    // bytes that the last Read has returned and that are to be taken off the socket
	bulk   bool   // the last Read has returned much: to look at more before it is taken off would be to copy it twice
	full   bool   // a Write has found no room, and is told of more
}

// bulk is how much a Read returns at least where more like it is to be expected.
const bulk = 8 << 10

// transfer is one direction of a socket, with the Read or the Write in progress.
type transfer struct {
	ready *os.File        // an epoll instance, which can be read when the socket is ready
	raw   syscall.RawConn // ready's
	b     []byte          // what is left of the buffer
	n     int             // done, in bytes
	errno syscall.Errno
	step  func(epoll uintptr) bool // reports whether it is over; if not, it is to be called again when the socket is ready
}

// newSocket takes over a connection, which must be one of the kernel's. On an error it is the caller's still.
func newSocket(conn net.Conn) (*socket, error) {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("use connection: %T is no socket", conn)
	}
	s := &socket{fd: -1, local: conn.LocalAddr(), remote: conn.RemoteAddr(), idle: func() {}}
	s.in.step, s.out.step = s.receive, s.send
	if peer, err := PeerOf(conn); err == nil {
		s.peer = &peer
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("use connection: %w", err)
	}
	var dupErr error
	err = raw.Control(func(fd uintptr) { s.fd, dupErr = unix.FcntlInt(fd, unix.F_DUPFD_CLOEXEC, 0) })
	if err = errors.Join(err, dupErr); err == nil {
		err = s.in.watch(s.fd, unix.EPOLLIN|unix.EPOLLRDHUP)
	}
	if err == nil {
		err = s.out.watch(s.fd, 0)
	}
	if err != nil {
		_ = s.Close() // which has sent nothing
		return nil, fmt.Errorf("use connection: %w", err)
	}
	_ = conn.Close() // the descriptor that is left is the connection
	return s, nil
}

// watch makes t.ready, for events of fd.
func (t *transfer) watch(fd int, events uint32) error {
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		return os.NewSyscallError("epoll_create1", err)
	}
	err = unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, fd, &unix.EpollEvent{Events: events})
	if err == nil {
		err = unix.SetNonblock(epoll, true) // by which Go knows what its poller may watch
	}
	if err != nil {
		_ = unix.Close(epoll)
		return os.NewSyscallError("epoll_ctl", err)
	}
	t.ready = os.NewFile(uintptr(epoll), "epoll")
	if err := t.ready.SetReadDeadline(time.Time{}); err != nil { // by which it shows that Go's poller has not taken it
		return fmt.Errorf("watch epoll instance: %w", err)
	}
	t.raw, err = t.ready.SyscallConn()
	return err
}

// Close ends a Read and a Write that are in progress, and waits for them.
func (s *socket) Close() error {
	for _, t := range []*transfer{&s.in, &s.out} {
		if t.ready == nil { // of a socket that was never whole
			continue
		}
		if err := t.ready.Close(); err != nil {
			return err // it is closed
		}
	}
	if s.fd < 0 {
		return nil
	}
	if s.seen > 0 {
		// The peer would be told that the connection was reset, and not that it has ended.
		rest := transfer{b: make([]byte, s.seen)}
		_, _ = rest.call(unix.SYS_RECVFROM, uintptr(s.fd), unix.MSG_DONTWAIT)
	}
	return os.NewSyscallError("close", unix.Close(s.fd))
}

// SetReadDeadline is as in net.Conn, as are the two below.
func (s *socket) SetReadDeadline(t time.Time) error { return s.in.ready.SetReadDeadline(t) }

// SetWriteDeadline sets one for reading, too: who waits to write waits until the epoll instance can be read.
func (s *socket) SetWriteDeadline(t time.Time) error { return s.out.ready.SetReadDeadline(t) }

func (s *socket) SetDeadline(t time.Time) error {
	return errors.Join(s.SetReadDeadline(t), s.SetWriteDeadline(t))
}

func (s *socket) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	if !s.gather {
		s.idle()
	}
	n, err := s.in.run("recvfrom", b)
	if n == 0 && err == nil {
		err = io.EOF
	}
	s.bulk = n >= bulk
	return n, err
}

func (s *socket) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	return s.out.run("sendto", b)
}

func (t *transfer) run(name string, b []byte) (int, error) {
	t.b, t.n, t.errno = b, 0, 0
	err := t.raw.Read(t.step)
	t.b = nil
	if err == nil && t.errno != 0 {
		err = os.NewSyscallError(name, t.errno)
	}
	return t.n, err
}

func (s *socket) receive(uintptr) bool {
	t := &s.in
	for {
		flags := uintptr(unix.MSG_DONTWAIT)
		if s.seen == 0 && !s.gather && !s.bulk {
			flags |= unix.MSG_PEEK
		}
		n, errno := t.call(unix.SYS_RECVFROM, uintptr(s.fd), flags)
		switch errno {
		case 0:
			known := min(s.seen, n)
			s.seen -= known
			t.n = copy(t.b, t.b[known:n])
			if flags&unix.MSG_PEEK != 0 {
				s.seen = n
			}
			if t.n > 0 || known == 0 {
				return true
			}
		case unix.EAGAIN:
			if s.gather {
				s.idle()
			}
			return false
		case unix.EINTR:
		default:
			t.errno = errno
			return true
		}
	}
}

func (s *socket) send(epoll uintptr) bool {
	t := &s.out
	for len(t.b) > 0 && t.errno == 0 {
		n, errno := t.call(unix.SYS_SENDTO, uintptr(s.fd), unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			t.b = t.b[n:]
			t.n += n
		case unix.EAGAIN:
			if s.full { // it was watched before this was tried: whatever the peer reads from now on wakes
				return false
			}
			// And once more: of what the peer has read before it was watched, the kernel need not tell (ep_modify wakes nobody for what is still
			// in the list of those that are ready from an earlier time).
			if t.errno = s.watchFor(epoll, unix.EPOLLOUT); t.errno == 0 {
				s.full = true
			}
		case unix.EINTR:
		default:
			t.errno = errno
		}
	}
	if s.full {
		s.full = false
		_ = s.watchFor(epoll, 0) // without which only a thread is woken for nothing
	}
	return true
}

// watchFor says what an epoll instance that watches the socket is to watch for.
func (s *socket) watchFor(epoll uintptr, events uint32) syscall.Errno {
	err := unix.EpollCtl(int(epoll), unix.EPOLL_CTL_MOD, s.fd, &unix.EpollEvent{Events: events})
	errno, _ := err.(syscall.Errno)
	return errno
}

func (t *transfer) call(number, fd, flags uintptr) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(t.b))), uintptr(len(t.b)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
