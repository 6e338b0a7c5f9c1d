package relay

import (
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"
)

// A socket is a connection that is read and written by system calls of which Go's scheduler is not told. They never wait, and so need
// none of its care; but each one that it is told of makes it wake its monitor thread, if the process was idle before. That
// thread costs a proxy of small messages, which is idle before each, a third of its processor time.
//
// There may be one reader and one writer at a time.
type socket struct {
	net.Conn
	raw     syscall.RawConn
	in, out transfer
	idle    func() // called before a Read waits
	// gather has a Read let other processes go first, so that there is more to read at once. It is the reader's to set.
	gather bool
}

// transfer is a Read or a Write in progress.
type transfer struct {
	b     []byte // what is left of the buffer
	n     int    // done, in bytes
	errno syscall.Errno
	step  func(fd uintptr) bool // reports whether it is over; if not, it is to be called again when the socket is ready
}

// newSocket takes over a connection, which must be one of the kernel's. On an error it is the caller's still.
func newSocket(conn net.Conn) (*socket, error) {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return nil, fmt.Errorf("use connection: %T is no socket", conn)
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("use connection: %w", err)
	}
	s := &socket{Conn: conn, raw: raw, idle: func() {}}
	s.in.step, s.out.step = s.receive, s.out.send
	return s, nil
}

func (s *socket) Read(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	n, err := s.in.run("recvfrom", s.raw.Read, b)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return n, err
}

func (s *socket) Write(b []byte) (int, error) {
	if len(b) == 0 {
		return 0, nil
	}
	return s.out.run("sendto", s.raw.Write, b)
}

func (t *transfer) run(name string, wait func(func(uintptr) bool) error, b []byte) (int, error) {
	t.b, t.n, t.errno = b, 0, 0
	err := wait(t.step)
	t.b = nil
	if err == nil && t.errno != 0 {
		err = os.NewSyscallError(name, t.errno)
	}
	return t.n, err
}

func (s *socket) receive(fd uintptr) bool {
	t := &s.in
	if s.gather {
		_, _, _ = unix.RawSyscall(unix.SYS_SCHED_YIELD, 0, 0, 0) // which cannot fail
	}
	for {
		n, errno := t.call(unix.SYS_RECVFROM, fd, unix.MSG_DONTWAIT)
		switch errno {
		case 0:
			t.n = n
			return true
		case unix.EAGAIN:
			s.idle()
			return false
		case unix.EINTR:
		default:
			t.errno = errno
			return true
		}
	}
}

func (t *transfer) send(fd uintptr) bool {
	for len(t.b) > 0 {
		n, errno := t.call(unix.SYS_SENDTO, fd, unix.MSG_DONTWAIT|unix.MSG_NOSIGNAL)
		switch errno {
		case 0:
			t.b = t.b[n:]
			t.n += n
		case unix.EAGAIN:
			return false
		case unix.EINTR:
		default:
			t.errno = errno
			return true
		}
	}
	return true
}

func (t *transfer) call(number, fd, flags uintptr) (int, syscall.Errno) {
	n, _, errno := unix.RawSyscall6(number, fd, uintptr(unsafe.Pointer(unsafe.SliceData(t.b))), uintptr(len(t.b)), flags, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(n), 0
}
