package relay

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// servedMethod is none of the CRI's, all of which are the runtime's in these
// tests. Only the path decides.
const servedMethod = "/x.Y/Served"

// sample fills a message with one value for each field, and with one field
// that this version of the API does not know.
func sample(d protoreflect.MessageDescriptor, depth int) []byte {
	var b []byte
	for i := range d.Fields().Len() {
		f := d.Fields().Get(i)
		switch f.Kind() {
		case protoreflect.StringKind:
			b = protowire.AppendTag(b, f.Number(), protowire.BytesType)
			b = protowire.AppendString(b, "value of "+string(f.Name()))
		case protoreflect.BytesKind:
			b = protowire.AppendTag(b, f.Number(), protowire.BytesType)
			b = protowire.AppendBytes(b, []byte{0, 1, 0xff})
		case protoreflect.MessageKind:
			if depth > 0 {
				b = protowire.AppendTag(b, f.Number(), protowire.BytesType)
				b = protowire.AppendBytes(b, sample(f.Message(), depth-1))
			}
		case protoreflect.BoolKind, protoreflect.Int32Kind, protoreflect.Int64Kind,
			protoreflect.Uint32Kind, protoreflect.Uint64Kind, protoreflect.EnumKind:
			b = protowire.AppendTag(b, f.Number(), protowire.VarintType)
			b = protowire.AppendVarint(b, 1)
		}
	}
	b = protowire.AppendTag(b, 4321, protowire.BytesType)
	return protowire.AppendString(b, "from a newer kubelet")
}

type rpc struct {
	method  string
	request []byte
}

func everyCRI(t *testing.T) []rpc {
	var rpcs []rpc
	services := cri.File_staging_src_k8s_io_cri_api_pkg_apis_runtime_v1_api_proto.Services()
	for i := range services.Len() {
		s := services.Get(i)
		for j := range s.Methods().Len() {
			m := s.Methods().Get(j)
			path := fmt.Sprintf("/%s/%s", s.FullName(), m.Name())
			rpcs = append(rpcs, rpc{path, sample(m.Input(), 2)})
		}
	}
	if len(rpcs) != 43 {
		t.Errorf("cri-api has %d calls: the 43 of 0.37 were expected", len(rpcs))
	}
	return rpcs
}

// TestTransparent: every call of the CRI, and calls that nobody knows.
func TestTransparent(t *testing.T) {
	big := make([]byte, 300<<10)
	rand.Read(big)
	type test struct {
		name     string
		method   string
		messages [][]byte
		md       []string
	}
	var tests []test
	for _, r := range everyCRI(t) {
		tests = append(tests, test{name: r.method, method: r.method, messages: [][]byte{r.request}})
	}
	const future = "/runtime.v9.FutureService/"
	tests = append(tests,
		test{name: "unary", method: future + "Unary", messages: [][]byte{big}},
		test{name: "empty", method: future + "Empty", messages: [][]byte{{}}},
		test{name: "no message", method: future + "Nothing"},
		test{name: "server streaming", method: future + "Watch", messages: [][]byte{big[:100]}, md: []string{"repeat", "1", "repeat", "2", "repeat", "3"}},
		test{name: "client streaming", method: future + "Put", messages: [][]byte{big[:1], big[:2], big, {}}},
		test{name: "bidi", method: future + "Chat", messages: [][]byte{{1}, {2}, big, {3}}, md: []string{"repeat", "1", "repeat", "2"}},
		test{name: "headers first", method: future + "Early", messages: [][]byte{{1}}, md: []string{"early", "1"}},
		test{name: "error", method: future + "Fail", md: []string{"fail", "1"}},
		test{name: "error after messages", method: future + "FailLate", messages: [][]byte{big, big}, md: []string{"fail", "1"}},
		test{name: "metadata", method: future + "Meta", md: []string{
			"traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "k-bin", "\x00\x01\xff", "k-bin", "", "two", "a", "two", "b,c", "odd_name.x", " x  y"}},
		test{name: "long metadata", method: future + "Meta", md: []string{"long", strings.Repeat("0123456789abcdef", 4000), "after", "x"}},
		test{name: "query", method: servedMethod + "?x=1", messages: [][]byte{{1}}},
		test{name: "malformed", method: "/x", messages: [][]byte{{1}}},
	)
	direct := againstDirect(t, echo, func(w *way) {
		for _, test := range tests {
			w.exchange(with(w.ctx, test.name, test.md...), w.conn, test.name, test.method, test.messages...)
		}
		if w.served != nil && w.served.n.Load() != 0 {
			w.t.Errorf("%d calls were served here", w.served.n.Load())
		}
	})
	for _, test := range tests {
		if all := len(test.messages) * max(1, strings.Count(strings.Join(test.md, " "), "repeat")); test.name != "malformed" &&
			(!direct.saw(test.name, fmt.Sprintf("%d messages in all", all)) || !direct.saw("handler of "+test.name, fmt.Sprintf("sent %d messages", all))) {
			t.Errorf("%s was not answered with %d messages", test.name, all)
		}
	}
}

// TestServedByGRPC: a call served by grpc-go's ServeHTTP looks to client and
// handler as if it had come to a grpc-go server on a socket.
func TestServedByGRPC(t *testing.T) {
	tests := []struct {
		name    string
		message []byte
		md      []string
		timeout time.Duration
	}{
		{name: "unary", message: []byte("hello")},
		{name: "empty", message: []byte{}},
		{name: "deadline", message: []byte{1}, timeout: time.Hour},
		{name: "metadata", message: []byte{1}, md: []string{"traceparent", "00-4bf92f", "k-bin", "\x00\x01\xff", "two", "a", "two", "b,c", "odd_name.x", "x  y"}},
		{name: "status with details", message: []byte{1}, md: []string{"fail", "1"}},
		{name: "headers first", message: []byte{1}, md: []string{"early", "1"}},
		{name: "server streaming", message: make([]byte, 50000), md: []string{"repeat", "1", "repeat", "2", "repeat", "3", "repeat", "4"}},
	}
	direct := againstDirect(t, echo, func(w *way) {
		for _, test := range tests {
			ctx := with(w.ctx, test.name, test.md...)
			if test.timeout > 0 {
				var cancel context.CancelFunc
				ctx, cancel = context.WithTimeout(ctx, test.timeout)
				defer cancel()
			}
			w.exchange(ctx, w.conn, test.name, servedMethod, test.message)
		}
		if w.served != nil && w.served.n.Load() != int64(len(tests)) {
			w.t.Errorf("served %d calls, want %d", w.served.n.Load(), len(tests))
		}
	})
	if !direct.saw("handler of deadline", "deadline 1h") {
		t.Error("the handler's context had no deadline")
	}
}

// TestCompression: what a call says of its encoding reaches the other side.
func TestCompression(t *testing.T) {
	msg := bytes.Repeat([]byte("compress me "), 10000)
	direct := againstDirect(t, echo, func(w *way) {
		w.exchange(with(w.ctx, "gzip"), w.conn, "gzip", "/x.Y/Z", msg)
	}, grpc.WithDefaultCallOptions(grpc.UseCompressor("gzip")))
	if !direct.saw("gzip", digest(msg)) {
		t.Error("the message did not come back")
	}
}

// TestTypedClient is the kubelet's way to call, down to unknown fields.
func TestTypedClient(t *testing.T) {
	runtime := newFakeRuntime(t, func(s grpc.ServerStream) error {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			return err
		}
		resp, _ := proto.Marshal(&cri.VersionResponse{RuntimeName: "containerd"})
		resp = append(resp, m...)
		return s.SendMsg(&resp)
	})
	relay := newTestRelay(t, Config{Dial: runtime.dial})
	c := connect(t, relay.socket)
	req := &cri.VersionRequest{}
	req.ProtoReflect().SetUnknown(protowire.AppendString(protowire.AppendTag(nil, 99, protowire.BytesType), "new"))
	var resp cri.VersionResponse
	err := c.Invoke(testContext(t), cri.RuntimeService_Version_FullMethodName, req, &resp, grpc.ForceCodec(protoCodec{}))
	if err != nil {
		t.Fatal(err)
	}
	if resp.RuntimeName != "containerd" || !bytes.Equal(resp.ProtoReflect().GetUnknown(), req.ProtoReflect().GetUnknown()) {
		t.Errorf("answer %v, unknown fields %x", &resp, resp.ProtoReflect().GetUnknown())
	}
}

type protoCodec struct{}

func (protoCodec) Marshal(v any) ([]byte, error) { return proto.Marshal(v.(proto.Message)) }
func (protoCodec) Unmarshal(data []byte, v any) error {
	return proto.Unmarshal(data, v.(proto.Message))
}
func (protoCodec) Name() string { return "proto" }

// TestHugeMessages: the relay's memory does not depend on what passes. Client
// and runtime hold the message whole in this same process, so what is measured
// is what the relay's own buffers grow to.
func TestHugeMessages(t *testing.T) {
	const huge = 64 << 20
	msg := make([]byte, huge)
	rand.Read(msg[:1<<20])
	rand.Read(msg[huge-1<<20:])
	direct := againstDirect(t, echo, func(w *way) {
		stop, largest := make(chan struct{}), make(chan int)
		if w.relay != nil {
			go func() {
				worst := 0
				for {
					select {
					case <-stop:
						largest <- worst
						return
					case <-time.After(time.Millisecond):
						worst = max(worst, w.relay.buffered())
					}
				}
			}()
		}
		w.exchange(with(w.ctx, "huge", "fail", "1"), w.conn, "huge", "/x.Y/Huge", msg)
		close(stop)
		if w.relay != nil {
			if n := <-largest; n == 0 || n > maxBuffered {
				w.t.Errorf("buffers of the relay grew to %d bytes", n)
			}
		}
	})
	if !direct.saw("huge", digest(msg)) {
		t.Error("the message did not come back")
	}
}

// maxBuffered is what one link may hold, whatever passes: two read buffers, and on each side the frames that wait and those being
// written, each within the limits of an outlet and one frame, and by a quarter more as append grows.
const maxBuffered = 2*readBuffer + 4*(outLimit+owedLimit+maxFrame)*5/4

// buffered is the memory that the links hold for what passes.
func (r *testRelay) buffered() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	n := 0
	for l := range r.links {
		l.mu.Lock()
		n += 2*readBuffer + cap(l.client.buf) + cap(l.client.spare) + cap(l.runtime.buf) + cap(l.runtime.spare) + l.account.size
		l.mu.Unlock()
	}
	return n
}

// TestEvents: 10,000 of them, to a client that reads them at once and to one
// that makes calls first. That one stalls the runtime, not the relay's memory
// nor other calls on the same connection.
func TestEvents(t *testing.T) {
	const events, window = 10000, 65535
	var sent, size atomic.Int64 // of the stream that runs
	handle := func(s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		if method != cri.RuntimeService_GetContainerEvents_FullMethodName {
			return echo(s)
		}
		sent.Store(0)
		size.Store(0)
		s.SetTrailer(metadata.Pairs("end", "of events"))
		for i := range events {
			m, err := proto.Marshal(&cri.ContainerEventResponse{
				ContainerId:        fmt.Sprintf("%064d", i),
				ContainerEventType: cri.ContainerEventType(i % 4),
				CreatedAt:          int64(i),
				PodSandboxStatus:   &cri.PodSandboxStatus{Id: fmt.Sprintf("%064d", i%7), Annotations: map[string]string{"text": strings.Repeat("x", 800)}},
			})
			if err == nil {
				err = s.SendMsg(&m)
			}
			if err != nil {
				return err
			}
			sent.Add(1)
			size.Add(int64(len(m)))
		}
		return failure()
	}
	for _, slow := range []bool{false, true} {
		t.Run(fmt.Sprintf("slow %v", slow), func(t *testing.T) {
			direct := againstDirect(t, handle, func(w *way) {
				s, err := w.conn.NewStream(with(w.ctx, "events"), &grpc.StreamDesc{ServerStreams: true}, cri.RuntimeService_GetContainerEvents_FullMethodName)
				if err != nil {
					w.t.Fatal(err)
				}
				if err := s.SendMsg(&[]byte{}); err != nil {
					w.t.Fatal(err)
				}
				s.CloseSend()
				if slow {
					waitFor(w.t, "events that fill the client's window", func() bool { return size.Load() >= window-1024 })
					for i := range 50 { // meanwhile nobody reads the events
						actor := fmt.Sprintf("call %d", i)
						w.exchange(with(w.ctx, actor), w.conn, actor, "/x.Y/Z", []byte("hello"))
					}
					// What grpc-go takes beyond the window, it keeps in the runtime: at most another 64 KiB, and a message.
					w.note("events", "as much is sent as the window allows: %v", size.Load() < 3*window)
					if w.relay != nil {
						if n := w.relay.buffered(); n > maxBuffered {
							w.t.Errorf("%d bytes are buffered for a slow reader", n)
						}
					}
				}
				w.read("events", s)
			}, grpc.WithStaticStreamWindowSize(window), grpc.WithStaticConnWindowSize(1<<20))
			if !direct.saw("events", fmt.Sprintf("%d messages in all", events)) || direct.saw("events", "false") {
				t.Error("the runtime's events are not those that the test is about")
			}
		})
	}
}

// TestSocketBackPressure: a client that does not even read its socket. The
// write that it stops is the pump's own, or another's: then the pump must wait.
func TestSocketBackPressure(t *testing.T) {
	for _, other := range []bool{false, true} {
		t.Run(fmt.Sprintf("other writer %v", other), func(t *testing.T) {
			p := newPair(t, Config{})
			p.open(1, "/x.Y/Z")
			p.client.WriteWindowUpdate(0, 1<<30)
			p.client.WriteWindowUpdate(1, 1<<30)
			p.expectRuntime("HEADERS 1", "WINDOW_UPDATE 0 1073741824", "WINDOW_UPDATE 1 1073741824")
			if other {
				waitStill(t, "the client's writes", p.pings(1<<16).Load)
			}
			const frames = 4096
			var written atomic.Int64
			p.runtime.WriteHeaders(p.block(1, false, ":status", "200"))
			go func() {
				for range frames {
					if p.runtime.WriteData(1, false, make([]byte, maxFrame)) != nil {
						return
					}
					written.Add(1)
				}
			}()
			if n := waitStill(t, "the runtime's writes", written.Load); n == frames {
				t.Error("64 MiB vanished in the relay")
			}
			if n := p.relay.buffered(); n > maxBuffered {
				t.Errorf("%d bytes are buffered for a client that does not read", n)
			}
			// One that reads after all gets everything.
			for n := 0; n < frames; {
				switch got := p.next(p.client); {
				case got == "DATA 1 16384":
					n++
				case got != "HEADERS 1" && !strings.HasPrefix(got, "PING ACK"):
					t.Fatalf("got %s after %d frames of DATA", got, n)
				}
			}
		})
	}
}

// pings sends PING n times with numbers, and counts what it could send.
func (p *pair) pings(n int) *atomic.Int64 {
	var written atomic.Int64
	go func() {
		for i := range n {
			if p.client.WritePing(false, numbered(i)) != nil {
				return
			}
			written.Add(1)
		}
	}()
	return &written
}

func numbered(i int) (data [8]byte) {
	copy(data[:], fmt.Sprintf("%08d", i))
	return data
}

// TestPingFlood: answers that nobody reads are bounded too.
func TestPingFlood(t *testing.T) {
	p := newPair(t, Config{})
	const pings = 1 << 16
	if n := waitStill(t, "the client's writes", p.pings(pings).Load); n == pings {
		t.Errorf("the answers to %d pings are kept", n)
	}
	if n := p.relay.buffered(); n > maxBuffered {
		t.Errorf("%d bytes are buffered for a client that does not read", n)
	}
	// One that reads after all gets every answer.
	for i := range pings {
		p.expectClient(fmt.Sprintf("PING ACK %s", numbered(i)))
	}
}

// expiringContext has a deadline that is far away until the test brings it
// about: what a deadline does can then be seen without waiting for one.
type expiringContext struct {
	context.Context
	deadline time.Time
	done     chan struct{}
}

func newExpiring(ctx context.Context, timeout time.Duration) (expiring context.Context, expire func()) {
	e := &expiringContext{ctx, time.Now().Add(timeout), make(chan struct{})}
	expire = sync.OnceFunc(func() { close(e.done) })
	context.AfterFunc(ctx, expire)
	return e, expire
}

func (e *expiringContext) Deadline() (time.Time, bool) { return e.deadline, true }
func (e *expiringContext) Done() <-chan struct{}       { return e.done }
func (e *expiringContext) Err() error {
	select {
	case <-e.done:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

// TestDeadlineAndCancel: the runtime sees the client's deadline, the end of its
// patience, and the end of its connection.
func TestDeadlineAndCancel(t *testing.T) {
	entered, left := make(chan struct{}, 1), make(chan struct{}, 1)
	hang := func(s grpc.ServerStream) error {
		if in, _ := metadata.FromIncomingContext(s.Context()); in.Get("actor") != nil {
			entered <- struct{}{}
			defer func() { left <- struct{}{} }()
		}
		<-s.Context().Done()
		return status.FromContextError(s.Context().Err()).Err()
	}
	methods := []string{"/x.Y/Hang", servedMethod}
	direct := againstDirect(t, hang, func(w *way) {
		// hanging makes a call, and ends it once its handler runs, which must end it there.
		hanging := func(ctx context.Context, c *grpc.ClientConn, actor, method string, end func()) {
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.exchange(ctx, c, actor, method, []byte("request"))
			}()
			wait := func(c <-chan struct{}, what string) {
				select {
				case <-c:
				case <-w.ctx.Done():
					w.t.Fatalf("%s: the handler %s", actor, what)
				}
			}
			wait(entered, "was not called")
			end()
			<-done
			wait(left, "goes on")
		}
		for _, method := range methods {
			actor := "deadline of " + method
			ctx, end := newExpiring(with(w.ctx, actor), time.Hour)
			hanging(ctx, w.conn, actor, method, end)

			actor = "cancel of " + method
			ctx, end = context.WithCancel(with(w.ctx, actor))
			hanging(ctx, w.conn, actor, method, end)

			actor = "end of the connection of " + method
			c := connect(w.t, w.socket)
			hanging(with(w.ctx, actor), c, actor, method, func() { c.Close() })

			// One that really ends, by whoever sees it first.
			ctx, end = context.WithTimeout(w.ctx, 50*time.Millisecond)
			_, err := call(ctx, w.conn, method, nil)
			end()
			w.note("deadline that ends "+method, "%v", status.Code(err))
		}
	})
	for _, method := range methods {
		for actor, text := range map[string]string{
			"deadline of ":                         "DeadlineExceeded",
			"handler of deadline of ":              "deadline 1h",
			"cancel of ":                           "Canceled",
			"handler of cancel of ":                "context canceled",
			"handler of end of the connection of ": "context canceled",
			"deadline that ends ":                  "DeadlineExceeded",
		} {
			if !direct.saw(actor+method, text) {
				t.Errorf("%s%s did not see %q", actor, method, text)
			}
		}
	}
}

// TestConcurrent: 512 calls at once on one connection, some served here. No
// handler goes on before all have been called.
func TestConcurrent(t *testing.T) {
	const calls = 512
	var mu sync.Mutex
	entered, all := 0, make(chan struct{})
	together := func(s grpc.ServerStream) error {
		mu.Lock()
		open := all
		if entered++; entered == calls {
			close(all)
			entered, all = 0, make(chan struct{}) // for the other way
		}
		mu.Unlock()
		select {
		case <-open:
			return echo(s)
		case <-s.Context().Done():
			return status.FromContextError(s.Context().Err()).Err()
		}
	}
	direct := againstDirect(t, together, func(w *way) {
		var wg sync.WaitGroup
		for i := range calls {
			wg.Go(func() {
				method, md := "/x.Y/Z", []string{"number", fmt.Sprint(i)}
				if i%8 == 0 {
					method = servedMethod
				}
				for n, key := range map[int]string{3: "fail", 5: "early", 7: "repeat"} {
					if i%n == 0 {
						md = append(md, key, "1", key, "2")
					}
				}
				actor := fmt.Sprintf("call %d", i)
				w.exchange(with(w.ctx, actor, md...), w.conn, actor, method, bytes.Repeat([]byte{byte(i)}, 1+i*20))
			})
		}
		wg.Wait()
		if w.served != nil && w.served.n.Load() != calls/8 {
			w.t.Errorf("served %d calls, want %d", w.served.n.Load(), calls/8)
		}
	})
	for i := range calls {
		if actor := fmt.Sprintf("call %d", i); !direct.saw(actor, "messages in all") || direct.saw(actor, "0 messages in all") {
			t.Errorf("%s was not answered", actor)
		}
	}
}
