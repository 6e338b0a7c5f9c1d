package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const endless = cri.RuntimeService_GetContainerEvents_FullMethodName

// shutdown runs Shutdown with a limit.
func shutdown(r *testRelay, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return r.Shutdown(ctx)
}

// TestShutdown: unary calls finish, relayed and served; endless ones are cut at
// once; nobody new gets in.
func TestShutdown(t *testing.T) {
	var events atomic.Int64
	g := newGate(t)
	fake := newFakeRuntime(t, func(s grpc.ServerStream) error {
		if method, _ := grpc.MethodFromServerStream(s); method == endless {
			events.Add(1)
			<-s.Context().Done()
			return s.Context().Err()
		}
		if err := g.wait(s.Context()); err != nil {
			return err
		}
		return echo(s)
	})
	served := newServer(fake.handle)
	defer served.Stop()
	relay := newTestRelay(t, Config{Dial: fake.dial, Endless: []string{endless}, Handlers: map[string]http.Handler{servedMethod: served}})
	c := connect(t, relay.socket)
	idle := connect(t, relay.socket)
	idle.Connect()
	silent, err := net.Dial("unix", relay.socket) // has not even said hello
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	answers, cut := make(chan error, 2), make(chan error, 1)
	for _, method := range []string{"/x.Y/Z", servedMethod} {
		go func() {
			got, err := call(testContext(t), c, method, []byte("hi"))
			if err == nil && string(got) != "hi" {
				err = fmt.Errorf("answer %q", got)
			}
			answers <- err
		}()
		<-g.entered
	}
	go func() {
		s, err := c.NewStream(testContext(t), &grpc.StreamDesc{ServerStreams: true}, endless)
		if err == nil {
			s.SendMsg(&[]byte{})
			s.CloseSend()
			err = s.RecvMsg(&[]byte{})
		}
		cut <- err
	}()
	waitFor(t, "stream of events", func() bool { return events.Load() == 1 })
	ended := make(chan error, 1)
	go func() { ended <- shutdown(relay, patience) }()
	if err := <-cut; status.Code(err) != codes.Unavailable {
		t.Errorf("the endless call ended with %v", err)
	}
	select {
	case err := <-ended:
		t.Fatalf("Shutdown returned with calls in flight: %v", err)
	case <-answers:
		t.Fatal("a call was cut")
	default:
	}
	if _, err := net.Dial("unix", relay.socket); err == nil {
		t.Error("a new connection was accepted")
	}
	g.release()
	for range 2 {
		if err := <-answers; err != nil {
			t.Errorf("a call in flight: %v", err)
		}
	}
	if err := <-ended; err != nil {
		t.Errorf("Shutdown: %v", err)
	}
}

// TestShutdownCuts what does not end by itself.
func TestShutdownCuts(t *testing.T) {
	hang := newGate(t)
	fake := newFakeRuntime(t, func(s grpc.ServerStream) error { return hang.wait(s.Context()) })
	served := newServer(fake.handle)
	defer served.Stop()
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: served}})
	c := connect(t, relay.socket)
	errs := make(chan error, 2)
	for _, method := range []string{"/x.Y/Z", servedMethod} {
		go func() {
			_, err := call(testContext(t), c, method, nil)
			errs <- err
		}()
		<-hang.entered
	}
	err := shutdown(relay, 100*time.Millisecond)
	if !errors.Is(err, context.DeadlineExceeded) || strings.Contains(err.Error(), "handlers") {
		t.Errorf("Shutdown: %v", err)
	}
	for range 2 {
		if err := <-errs; status.Code(err) != codes.Unavailable && status.Code(err) != codes.Canceled {
			t.Errorf("a call that was cut: %v", err)
		}
	}
	if n := len(relay.connections()); n != 0 {
		t.Errorf("%d connections are left", n)
	}
}

// TestShutdownOfNothing, twice, and Serve afterwards.
func TestShutdownOfNothing(t *testing.T) {
	relay := newTestRelay(t, Config{})
	for range 2 {
		if err := shutdown(relay, patience); err != nil {
			t.Error(err)
		}
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "late.sock"))
	if err != nil {
		t.Fatal(err)
	}
	if err := relay.Serve(l); err != nil {
		t.Error(err)
	}
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("the listener is open: %v", err)
	}
}

// TestServeGoesOn when accepting fails, as it does without descriptors.
func TestServeGoesOn(t *testing.T) {
	fake := newFakeRuntime(t, echo)
	s := New(Config{Dial: fake.dial})
	inner, err := net.Listen("unix", filepath.Join(t.TempDir(), "relay.sock"))
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(&tired{Listener: inner}) }()
	c := connect(t, inner.Addr().String())
	if _, err := call(testContext(t), c, "/x.Y/Z", nil); err != nil {
		t.Error(err)
	}
	if err := shutdown(&testRelay{Server: s}, patience); err != nil {
		t.Error(err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// tired fails to accept at first.
type tired struct {
	net.Listener
	n int
}

func (l *tired) Accept() (net.Conn, error) {
	if l.n++; l.n < 3 {
		return nil, errors.New("accept4: too many open files")
	}
	return l.Listener.Accept()
}

// TestAConnectionThatComesWithTheShutdown is closed.
func TestAConnectionThatComesWithTheShutdown(t *testing.T) {
	s := New(Config{Dial: (&fakeRuntime{socket: "/nonexistent"}).dial})
	if err := s.Shutdown(t.Context()); err != nil {
		t.Fatal(err)
	}
	accepted, client := socketPair(t)
	defer client.Close()
	s.start(accepted)
	client.SetDeadline(time.Now().Add(patience))
	if n, err := client.Read(make([]byte, 1)); n != 0 || err != io.EOF {
		t.Errorf("the client reads %d bytes, %v", n, err)
	}
}
