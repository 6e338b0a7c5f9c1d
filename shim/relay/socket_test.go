package relay

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newTestSocket returns a socket and its peer.
func newTestSocket(t *testing.T) (*socket, *net.UnixConn) {
	t.Helper()
	ours, peer := socketPair(t)
	s, err := newSocket(ours)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close(); peer.Close() })
	peer.SetDeadline(time.Now().Add(patience))
	return s, peer.(*net.UnixConn)
}

// TestASocketReadsAllThatComes, in pieces of every size, with buffers of every size, while it is to gather and while it is not.
func TestASocketReadsAllThatComes(t *testing.T) {
	s, peer := newTestSocket(t)
	random := rand.New(rand.NewPCG(1, 2))
	sent := make([]byte, 4<<20)
	for i := range sent {
		sent[i] = byte(random.Uint32())
	}
	done := make(chan error)
	go func() {
		sizes := rand.New(rand.NewPCG(3, 4))
		for rest := sent; len(rest) > 0; {
			n := min(len(rest), 1+sizes.IntN(1<<(1+sizes.IntN(17))))
			if _, err := peer.Write(rest[:n]); err != nil {
				done <- err
				return
			}
			rest = rest[n:]
		}
		done <- peer.Close()
	}()
	var got []byte
	b := make([]byte, 64<<10)
	for {
		s.gather = random.IntN(4) == 0
		n, err := s.Read(b[:1+random.IntN(len(b))])
		got = append(got, b[:n]...)
		if err == io.EOF {
			break
		}
		if err != nil || n == 0 {
			t.Fatalf("%d bytes, %v", n, err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, sent) {
		t.Errorf("%d bytes were read, %d sent; they are not the same", len(got), len(sent))
	}
}

// TestASocketThatIsFull waits until the peer has read.
func TestASocketThatIsFull(t *testing.T) {
	s, peer := newTestSocket(t)
	sent := bytes.Repeat([]byte("0123456789abcdef"), 1<<18)
	done := make(chan error)
	go func() {
		for range 3 {
			if n, err := s.Write(sent); err != nil || n != len(sent) {
				done <- fmt.Errorf("%d bytes: %w", n, err)
				return
			}
		}
		done <- s.Close()
	}()
	h, want := sha256.New(), sha256.New()
	for range 3 {
		want.Write(sent)
	}
	if _, err := io.Copy(h, peer); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(h.Sum(nil), want.Sum(nil)) {
		t.Error("the peer has read something else")
	}
	if s.full {
		t.Error("the socket is still watched for room")
	}
}

// TestASocketThatIsFullAgainAndAgain has a peer that takes all at once, and then waits for more: nothing that it does later wakes a Write.
func TestASocketThatIsFullAgainAndAgain(t *testing.T) {
	s, peer := newTestSocket(t)
	const writes, size = 3000, 300 << 10
	done := make(chan error)
	go func() {
		_, err := io.CopyN(io.Discard, peer, writes*size)
		done <- err
	}()
	message := make([]byte, size)
	s.SetWriteDeadline(time.Now().Add(patience))
	for i := range writes {
		if n, err := s.Write(message); err != nil {
			t.Fatalf("write %d: %d bytes, %v", i, n, err)
		}
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

// TestTheEndOfASocket ends what waits on it, by a deadline and by Close.
func TestTheEndOfASocket(t *testing.T) {
	for _, test := range []struct {
		name string
		end  func(*socket)
		want string
	}{
		{"deadline", func(s *socket) { s.SetDeadline(time.Unix(1, 0)) }, os.ErrDeadlineExceeded.Error()},
		{"close", func(s *socket) { s.Close() }, "use of closed file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s, _ := newTestSocket(t)
			errs := make(chan error)
			go func() {
				_, err := s.Read(make([]byte, 1))
				errs <- err
			}()
			go func() {
				_, err := s.Write(make([]byte, 16<<20))
				errs <- err
			}()
			time.Sleep(10 * time.Millisecond) // both wait, or begin to: it ends either way
			test.end(s)
			for range 2 {
				if err := <-errs; err == nil || err.Error() != test.want {
					t.Errorf("ended with %v, want %s", err, test.want)
				}
			}
			if _, err := s.Read(make([]byte, 1)); err == nil || err.Error() != test.want {
				t.Errorf("a later read: %v, want %s", err, test.want)
			}
		})
	}
}

// TestASocketIsLeftWithoutAReset whatever it has not taken yet: the peer reads an end.
func TestASocketIsLeftWithoutAReset(t *testing.T) {
	s, peer := newTestSocket(t)
	if _, err := peer.Write([]byte("a message")); err != nil {
		t.Fatal(err)
	}
	if n, err := s.Read(make([]byte, 100)); n != 9 || err != nil {
		t.Fatal(n, err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if n, err := peer.Read(make([]byte, 100)); n != 0 || err != io.EOF {
		t.Errorf("the peer reads %d bytes, %v", n, err)
	}
	if err := s.Close(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("closed again: %v", err)
	}
}

// TestASmallMessageIsPassedOnFirst before it is taken off the socket, which tells its sender.
func TestASmallMessageIsPassedOnFirst(t *testing.T) {
	s, peer := newTestSocket(t)
	untaken := func() int {
		raw, err := peer.SyscallConn()
		if err != nil {
			t.Fatal(err)
		}
		var n int
		raw.Control(func(fd uintptr) { n, err = unix.IoctlGetInt(int(fd), unix.TIOCOUTQ) })
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if _, err := peer.Write([]byte("a message")); err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 100)
	if n, err := s.Read(b); err != nil || string(b[:n]) != "a message" {
		t.Fatalf("%q, %v", b[:n], err)
	}
	passedOn := 0
	s.idle = func() {
		if passedOn++; untaken() == 0 {
			t.Error("the message is taken before it is passed on")
		}
	}
	s.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
	if _, err := s.Read(b); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	if passedOn != 1 || untaken() != 0 {
		t.Errorf("the message is passed on %d times, and %d bytes are left of it", passedOn, untaken())
	}
}

// TestASocketSleepsWhileThePeerReads is what its own epoll instances are for.
func TestASocketSleepsWhileThePeerReads(t *testing.T) {
	s, peer := newTestSocket(t)
	epoll, err := unix.EpollCreate1(unix.EPOLL_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(epoll)
	for _, way := range []*transfer{&s.in, &s.out} {
		way.raw.Control(func(fd uintptr) {
			edge := unix.EpollEvent{Events: unix.EPOLLIN | unix.EPOLLOUT | unix.EPOLLRDHUP | unix.EPOLLET, Fd: int32(fd)}
			err = errors.Join(err, unix.EpollCtl(epoll, unix.EPOLL_CTL_ADD, int(fd), &edge))
		})
	}
	if err != nil {
		t.Fatal(err)
	}
	woken := func() int {
		n, err := unix.EpollWait(epoll, make([]unix.EpollEvent, 4), 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	if n := woken(); n != 0 {
		t.Fatalf("%d events before anything was sent", n)
	}
	if _, err := s.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if _, err := peer.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	if n := woken(); n != 0 {
		t.Errorf("%d events when the peer had read", n)
	}
	if _, err := peer.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	if n := woken(); n != 1 {
		t.Errorf("%d events when the peer had written", n)
	}
}
