package relay

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	_ "google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

const servedMethod = "/runtime.v1.RuntimeService/CheckpointContainer"

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

// TestTransparent compares each call with the same call made directly.
func TestTransparent(t *testing.T) {
	runtime := newFakeRuntime(t, echo)
	relay := newTestRelay(t, Config{Dial: runtime.dial})
	direct, relayed := connect(t, runtime.socket), connect(t, relay.socket)

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
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			ctx := metadata.AppendToOutgoingContext(testContext(t), test.md...)
			want, err := exchangeAll(ctx, direct, test.method, test.messages)
			if err != nil {
				t.Fatal(err)
			}
			got, err := exchangeAll(ctx, relayed, test.method, test.messages)
			if err != nil {
				t.Fatal(err)
			}
			if len(want.messages) < len(test.messages) && test.name != "malformed" {
				t.Fatalf("the oracle answered %d messages to %d", len(want.messages), len(test.messages))
			}
			if !reflect.DeepEqual(got, want) {
				t.Errorf("relayed %s\n direct %s", brief(got), brief(want))
			}
		})
	}
}

func brief(r result) string {
	var n []int
	for _, m := range r.messages {
		n = append(n, len(m))
	}
	return fmt.Sprintf("messages %v header %.2000v trailer %v status %x", n, r.header, r.trailer, r.status)
}

// TestCompression: what a call says of its encoding reaches the other side.
func TestCompression(t *testing.T) {
	runtime := newFakeRuntime(t, echo)
	relay := newTestRelay(t, Config{Dial: runtime.dial})
	msg := bytes.Repeat([]byte("compress me "), 10000)
	for _, c := range []*grpc.ClientConn{connect(t, runtime.socket), connect(t, relay.socket)} {
		var resp []byte
		if err := c.Invoke(testContext(t), "/x.Y/Z", &msg, &resp, grpc.UseCompressor("gzip")); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(resp, msg) {
			t.Errorf("%d bytes came back, want %d", len(resp), len(msg))
		}
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
	fake := newFakeRuntime(t, echo)
	relay := newTestRelay(t, Config{Dial: fake.dial})
	c := connect(t, relay.socket)
	const huge = 64 << 20
	msg := make([]byte, huge)
	rand.Read(msg[:1<<20])
	rand.Read(msg[huge-1<<20:])
	stop, largest := make(chan struct{}), make(chan int)
	go func() {
		worst := 0
		for {
			select {
			case <-stop:
				largest <- worst
				return
			case <-time.After(time.Millisecond):
				worst = max(worst, relay.buffered())
			}
		}
	}()
	got, err := call(testContext(t), c, "/x.Y/Huge", msg)
	close(stop)
	if n := <-largest; n == 0 || n > maxBuffered {
		t.Errorf("buffers of the relay grew to %d bytes", n)
	}
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, msg) {
		t.Error("the message changed on its way")
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

// TestSlowReader: a client that does not read stalls the runtime, not the
// relay's memory nor other calls on the same connection.
func TestSlowReader(t *testing.T) {
	const events, size = 10000, 1024
	var sent sync.WaitGroup
	fake := newFakeRuntime(t, func(s grpc.ServerStream) error {
		method, _ := grpc.MethodFromServerStream(s)
		if !strings.HasSuffix(method, "/GetContainerEvents") {
			return echo(s)
		}
		sent.Add(1)
		defer sent.Done()
		for i := range events {
			m := make([]byte, size)
			m[0], m[1] = byte(i), byte(i>>8)
			if err := s.SendMsg(&m); err != nil {
				return err
			}
		}
		return nil
	})
	relay := newTestRelay(t, Config{Dial: fake.dial})
	c := connect(t, relay.socket, grpc.WithStaticStreamWindowSize(65535), grpc.WithStaticConnWindowSize(1<<20))
	s, err := c.NewStream(testContext(t), &grpc.StreamDesc{ServerStreams: true}, cri.RuntimeService_GetContainerEvents_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.SendMsg(&[]byte{}); err != nil {
		t.Fatal(err)
	}
	s.CloseSend()
	for range 50 { // meanwhile nobody reads the events
		if _, err := call(testContext(t), c, "/x.Y/Z", []byte("hello")); err != nil {
			t.Fatal(err)
		}
	}
	if n := relay.buffered(); n > maxBuffered {
		t.Errorf("%d bytes are buffered for a slow reader", n)
	}
	for i := range events {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			t.Fatalf("event %d: %v", i, err)
		}
		if m[0] != byte(i) || m[1] != byte(i>>8) || len(m) != size {
			t.Fatalf("event %d is another one", i)
		}
	}
	if err := s.RecvMsg(&[]byte{}); err != io.EOF {
		t.Errorf("end of events: %v", err)
	}
	sent.Wait()
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

// TestDeadlineAndCancel: the runtime sees the client's deadline and its cancel.
func TestDeadlineAndCancel(t *testing.T) {
	ended := make(chan error, 1)
	entered := make(chan time.Duration, 1)
	hang := func(s grpc.ServerStream) error {
		deadline, ok := s.Context().Deadline()
		if ok {
			entered <- time.Until(deadline)
		} else {
			entered <- 0
		}
		<-s.Context().Done()
		ended <- s.Context().Err()
		return status.FromContextError(s.Context().Err()).Err()
	}
	fake := newFakeRuntime(t, hang)
	served := newServer(hang)
	defer served.Stop()
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: served}})
	c := connect(t, relay.socket)
	for _, method := range []string{"/x.Y/Hang", servedMethod} {
		t.Run(method, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(context.Background(), 300*time.Millisecond)
			defer cancel()
			_, err := call(ctx, c, method, nil)
			if status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("past its deadline: %v", err)
			}
			if left := <-entered; left <= 0 || left > 300*time.Millisecond {
				t.Errorf("deadline in %v, want at most 300 ms", left)
			}
			<-ended

			ctx, cancel = context.WithCancel(context.Background())
			time.AfterFunc(50*time.Millisecond, cancel)
			_, err = call(ctx, c, method, nil)
			if status.Code(err) != codes.Canceled {
				t.Errorf("cancelled: %v", err)
			}
			if left := <-entered; left != 0 {
				t.Errorf("deadline in %v, want none", left)
			}
			if err := <-ended; err != context.Canceled {
				t.Errorf("the handler's context: %v", err)
			}
		})
	}
	// The end of the connection is the end of its calls.
	for _, method := range []string{"/x.Y/Hang", servedMethod} {
		c := connect(t, relay.socket)
		go call(context.Background(), c, method, nil)
		<-entered
		c.Close()
		if err := <-ended; err != context.Canceled {
			t.Errorf("%s after its client closed: %v", method, err)
		}
	}
}

// TestConcurrent: 512 calls at once on one connection, some served here.
func TestConcurrent(t *testing.T) {
	fake := newFakeRuntime(t, echo)
	served := newServer(echo)
	defer served.Stop()
	count := &counter{Handler: served}
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: count}})
	c := connect(t, relay.socket)
	var wg sync.WaitGroup
	for i := range 512 {
		wg.Go(func() {
			method := "/x.Y/Z"
			if i%8 == 0 {
				method = servedMethod
			}
			msg := bytes.Repeat([]byte{byte(i)}, 1+i*20)
			for range 3 {
				got, err := call(testContext(t), c, method, msg)
				if err != nil || !bytes.Equal(got, msg) {
					t.Errorf("call %d of %s: %d bytes, %v", i, method, len(got), err)
				}
			}
		})
	}
	wg.Wait()
	if n := count.n.Load(); n != 64*3 {
		t.Errorf("served %d calls, want %d", n, 64*3)
	}
}
