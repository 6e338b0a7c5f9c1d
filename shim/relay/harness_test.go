package relay

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
	spb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
)

// patience bounds every wait of a test. It is never reached unless something
// is broken, however slow the machine.
const patience = 2 * time.Minute

func TestMain(m *testing.M) {
	if socket := os.Getenv(peerHelper); socket != "" {
		os.Exit(tryPeer(socket))
	}
	goleak.VerifyTestMain(m)
}

// rawCodec passes messages as the bytes they are, so that nothing that a
// generated type does not know can get lost in the test itself.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = slices.Clone(data); return nil }
func (rawCodec) Name() string                       { return "proto" }

// fakeRuntime is a grpc-go server on a Unix socket that answers every method.
type fakeRuntime struct {
	t      testing.TB
	socket string
	handle func(grpc.ServerStream) error
	server *grpc.Server
	served chan error
}

func newFakeRuntime(t testing.TB, handle func(grpc.ServerStream) error) *fakeRuntime {
	r := &fakeRuntime{t: t, socket: filepath.Join(t.TempDir(), "runtime.sock"), handle: handle}
	r.start()
	t.Cleanup(r.stop)
	return r
}

func newServer(handle func(grpc.ServerStream) error) *grpc.Server {
	return grpc.NewServer(
		grpc.ForceServerCodec(rawCodec{}),
		grpc.MaxRecvMsgSize(1<<30), grpc.MaxSendMsgSize(1<<30),
		grpc.WaitForHandlers(true),
		grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error { return handle(s) }))
}

func (r *fakeRuntime) start() {
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		r.t.Fatal(err)
	}
	r.server = newServer(r.handle)
	r.served = make(chan error, 1)
	go func(s *grpc.Server, done chan error) { done <- s.Serve(l) }(r.server, r.served)
}

func (r *fakeRuntime) stop() {
	if r.server != nil {
		r.server.Stop()
		<-r.served
		r.server = nil
	}
}

func (r *fakeRuntime) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", r.socket)
}

// testRelay is a Server on a Unix socket.
type testRelay struct {
	*Server
	socket string
}

// newTestRelay starts a relay, of which set may change the durations. Unless
// it does, last frames have all the time that they need.
func newTestRelay(t testing.TB, cfg Config, set ...func(*Server)) *testRelay {
	r := &testRelay{New(cfg), filepath.Join(t.TempDir(), "relay.sock")}
	r.lastWrite = patience
	for _, set := range set {
		set(r.Server)
	}
	l, err := net.Listen("unix", r.socket)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- r.Serve(l) }()
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		if err := r.Shutdown(ctx); err != nil {
			t.Errorf("shutdown: %v", err)
		}
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return r
}

// connect is a client with its own connection, closed before the relay shuts
// down: cleanups run in reverse.
func connect(t testing.TB, socket string, opts ...grpc.DialOption) *grpc.ClientConn {
	opts = append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{}), grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)),
	}, opts...)
	c, err := grpc.NewClient("unix:"+socket, opts...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// call makes a unary call.
func call(ctx context.Context, c *grpc.ClientConn, method string, req []byte) ([]byte, error) {
	var resp []byte
	err := c.Invoke(ctx, method, &req, &resp)
	return resp, err
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// echo answers each message with itself, headers with what it saw, and ends
// with the status that the request's metadata ask for.
func echo(s grpc.ServerStream) error {
	in, _ := metadata.FromIncomingContext(s.Context())
	method, _ := grpc.MethodFromServerStream(s)
	out := metadata.Pairs("saw-method", method, "blob-bin", "\x00\xff header")
	for k, vv := range in {
		for _, v := range vv {
			k = strings.TrimPrefix(k, ":")
			if strings.HasSuffix(k, "-bin") {
				out.Append("saw-"+k, v)
			} else {
				out.Append("saw-"+k, "<"+v+">")
			}
		}
	}
	_, hasDeadline := s.Context().Deadline()
	out.Append("saw-deadline", fmt.Sprint(hasDeadline))
	if in.Get("early") == nil {
		if err := s.SetHeader(out); err != nil {
			return err
		}
	} else if err := s.SendHeader(out); err != nil {
		return err
	}
	s.SetTrailer(metadata.Pairs("end", "1", "end", "2", "end-bin", "\x00\x01\xfe"))
	for {
		var m []byte
		err := s.RecvMsg(&m)
		if err == io.EOF {
			break
		}
		if err != nil {
			return err
		}
		for range max(1, len(in.Get("repeat"))) {
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
	}
	if in.Get("fail") != nil {
		return failure()
	}
	return nil
}

// failure is a status with all that one can have.
func failure() error {
	detail, _ := anypb.New(durationpb.New(42 * time.Second))
	return status.FromProto(&spb.Status{
		Code:    int32(codes.FailedPrecondition),
		Message: "50 % of «Käse»\nis gone",
		Details: []*anypb.Any{detail},
	}).Err()
}

// counter counts calls of a handler and passes them on.
type counter struct {
	http.Handler
	n atomic.Int64
}

func (c *counter) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	c.n.Add(1)
	c.Handler.ServeHTTP(w, r)
}

// waitFor polls for what another goroutine is about to do.
func waitFor(t testing.TB, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s after %v", what, patience)
		}
	}
}

// waitStill waits until a count has stopped to change, and returns it. What it
// finds still may go on after all: that may hide a failure, and never makes one.
func waitStill(t testing.TB, what string, count func() int64) int64 {
	t.Helper()
	last, polls := int64(-1), 0
	waitFor(t, "end of "+what, func() bool {
		if n := count(); n != last {
			last, polls = n, 0
		}
		polls++
		return polls > 100
	})
	return last
}

// gate is a handler's way to say that it runs and to wait until it may go on.
type gate struct {
	entered chan struct{}
	open    chan struct{}
	once    sync.Once
}

func newGate(t testing.TB) *gate {
	g := &gate{entered: make(chan struct{}, 1024), open: make(chan struct{})}
	t.Cleanup(g.release)
	return g
}

func (g *gate) release() { g.once.Do(func() { close(g.open) }) }

func (g *gate) wait(ctx context.Context) error {
	g.entered <- struct{}{}
	select {
	case <-g.open:
		return nil
	case <-ctx.Done():
		return status.FromContextError(ctx.Err()).Err()
	}
}
