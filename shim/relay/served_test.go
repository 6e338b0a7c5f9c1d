package relay

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestServedRequests: up to their limit, and many on one connection.
func TestServedRequests(t *testing.T) {
	fake := newFakeRuntime(t, echo)
	served := newServer(echo)
	defer served.Stop()
	count := &counter{Handler: served}
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: count}})
	relayed := connect(t, relay.socket)
	t.Run("request too large", func(t *testing.T) {
		before := count.n.Load()
		_, err := call(testContext(t), relayed, servedMethod, make([]byte, maxBody))
		if status.Code(err) != codes.ResourceExhausted {
			t.Error(err)
		}
		if _, err = call(testContext(t), relayed, servedMethod, make([]byte, maxBody-5)); err != nil {
			t.Errorf("the largest request: %v", err)
		}
		if n := count.n.Load() - before; n != 1 {
			t.Errorf("%d calls of the handler, want 1", n)
		}
	})
	t.Run("100 in a row", func(t *testing.T) {
		before := relay.connections()
		for range 100 {
			if _, err := call(testContext(t), relayed, servedMethod, make([]byte, 2000)); err != nil {
				t.Fatal(err)
			}
		}
		if after := relay.connections(); !reflect.DeepEqual(before, after) {
			t.Error("the connection was replaced")
		}
	})
}

func (r *testRelay) connections() map[*link]bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	m := map[*link]bool{}
	for l := range r.links {
		m[l] = true
	}
	return m
}

// TestHandlersKnowTheirPeer: the process that has connected, which here is this one.
func TestHandlersKnowTheirPeer(t *testing.T) {
	fake := newFakeRuntime(t, echo)
	served := newServer(echo)
	defer served.Stop()
	peers := make(chan Peer, 1)
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if peer, ok := PeerFrom(r.Context()); ok {
			peers <- peer
		}
		close(peers)
		served.ServeHTTP(w, r)
	})
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: handler}})
	if _, err := call(testContext(t), connect(t, relay.socket), servedMethod, nil); err != nil {
		t.Fatal(err)
	}
	want := Peer{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid())}
	if peer := <-peers; peer != want {
		t.Errorf("the peer is %+v, want %+v", peer, want)
	}
	if _, known := PeerFrom(t.Context()); known {
		t.Error("a context without a peer has one")
	}
}

// TestResponseWriter is what net/http promises to a handler.
func TestResponseWriter(t *testing.T) {
	for _, test := range []struct {
		name    string
		handler http.HandlerFunc
		frames  []string
		headers string // of the last block
	}{
		{"nothing", func(http.ResponseWriter, *http.Request) {},
			[]string{"HEADERS 1 END"}, ":status=200"},
		{"status", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(404); w.WriteHeader(500) },
			[]string{"HEADERS 1 END"}, ":status=404"},
		{"headers", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Add("B", "1")
			w.Header().Add("A", "2")
			w.Header().Add("B", "3")
			w.Header()["bad name"] = []string{"x"}
			w.Header().Set("bad-value", "a\nb")
			w.WriteHeader(200)
			w.Header().Set("Late", "x")
		}, []string{"HEADERS 1 END"}, ":status=200 a=2 b=1 b=3"},
		{"body", func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "abc"); io.WriteString(w, "def") },
			[]string{"HEADERS 1", "DATA 1 6 END"}, ":status=200"},
		{"flush", func(w http.ResponseWriter, _ *http.Request) {
			w.(http.Flusher).Flush()
			io.WriteString(w, "abc")
			w.(http.Flusher).Flush()
		}, []string{"HEADERS 1", "DATA 1 3", "DATA 1 0 END"}, ":status=200"},
		{"trailers", func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Trailer", "Declared, unused")
			w.WriteHeader(200)
			w.Header().Set("Declared", "1")
			w.Header().Set(http.TrailerPrefix+"Other-Bin", "2")
		}, []string{"HEADERS 1", "HEADERS 1 END"}, "declared=1 other-bin=2"},
		{"long body", func(w http.ResponseWriter, _ *http.Request) { w.Write(make([]byte, 40000)) },
			[]string{"HEADERS 1", "DATA 1 16384", "DATA 1 16384", "DATA 1 7232 END"}, ":status=200"},
		{"long headers", func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Long", strings.Repeat("~", 50000)) },
			[]string{"HEADERS 1 END"}, ":status=200 long=" + strings.Repeat("~", 50000)},
		{"panic", func(http.ResponseWriter, *http.Request) { panic("on purpose") },
			[]string{"RST_STREAM 1 INTERNAL_ERROR"}, ""},
		{"abort", func(w http.ResponseWriter, _ *http.Request) {
			w.(http.Flusher).Flush()
			panic(http.ErrAbortHandler)
		}, []string{"HEADERS 1", "RST_STREAM 1 INTERNAL_ERROR"}, ":status=200"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPair(t, handlers(test.handler))
			p.client.WriteHeaders(p.block(1, true, requestTo(here)...))
			p.expectClient(test.frames...)
			var got []string
			for _, f := range p.fields {
				got = append(got, f.Name+"="+f.Value)
			}
			if got := strings.Join(got, " "); got != test.headers {
				t.Errorf("headers %s, want %s", got, test.headers)
			}
			p.ask(3, "/next", 0)
			p.expectRuntime("HEADERS 3", "DATA 3 0 END")
		})
	}
}

func TestRequest(t *testing.T) {
	got := make(chan *http.Request, 1)
	body := make(chan []byte, 1)
	p := newPair(t, handlers(func(w http.ResponseWriter, r *http.Request) {
		b, _ := io.ReadAll(r.Body)
		got <- r
		body <- b
	}))
	p.client.WriteHeaders(p.block(1, false, append(requestTo(here), "x-a", "1", "x-a", "2")...))
	p.client.WriteDataPadded(1, false, []byte("hello "), make([]byte, 3))
	p.client.WriteData(1, false, []byte("world"))
	p.client.WriteHeaders(p.block(1, true, "trailer", "x"))
	// What the request took of the runtime's window is given back at once.
	p.expectClient("WINDOW_UPDATE 0 10", "WINDOW_UPDATE 1 10", "WINDOW_UPDATE 0 5", "WINDOW_UPDATE 1 5", "HEADERS 1 END")
	r := <-got
	if r.Method != "POST" || r.URL.Path != here || r.Host != "x" || r.ProtoMajor != 2 || r.ContentLength != 11 || string(<-body) != "hello world" ||
		!reflect.DeepEqual(r.Header["X-A"], []string{"1", "2"}) || r.Context().Value(http.LocalAddrContextKey) == nil {
		t.Errorf("request %+v", r)
	}
	<-r.Context().Done() // ends with the answer
}

// TestHandlerThatHangs: everything else goes on, until the client has enough.
func TestHandlerThatHangs(t *testing.T) {
	ended := make(chan struct{}, maxServed)
	var running atomic.Int64
	p := newPair(t, handlers(func(w http.ResponseWriter, r *http.Request) {
		running.Add(1)
		<-r.Context().Done()
		running.Add(-1)
		ended <- struct{}{}
	}))
	for id := uint32(1); id < 2*maxServed; id += 2 {
		p.client.WriteHeaders(p.block(id, true, requestTo(here)...))
	}
	waitFor(t, "running handlers", func() bool { return running.Load() == maxServed })
	// One more is refused, with a status.
	const more = 2*maxServed + 1
	p.client.WriteHeaders(p.block(more, true, requestTo(here)...))
	p.expectClient(fmt.Sprintf("HEADERS %d END", more))
	if p.field("grpc-status") != "8" {
		t.Errorf("answer %v", p.fields)
	}
	p.ask(more+2, "/a", 10)
	p.expectRuntime(fmt.Sprintf("HEADERS %d", more+2), fmt.Sprintf("DATA %d 10 END", more+2))
	p.runtime.WriteHeaders(p.block(more+2, true, ":status", "200"))
	p.expectClient(fmt.Sprintf("HEADERS %d END", more+2))
	// RST_STREAM cancels one and makes room for another.
	p.client.WriteRSTStream(1, http2.ErrCodeCancel)
	<-ended
	next := uint32(more + 4) // the slot is free a moment after the handler has returned
	waitFor(t, "the slot in use again", func() bool {
		p.client.WriteHeaders(p.block(next, true, requestTo(here)...))
		next += 2
		return running.Load() == maxServed
	})
	// The end of the connection cancels the others.
	p.clientConn.Close()
	for range maxServed {
		<-ended
	}
	p.expectEnd(p.runtime)
}

// TestUnfinishedRequests hold up nobody, and not much memory.
func TestUnfinishedRequests(t *testing.T) {
	p := newPair(t, handlers(answer(0)))
	id := uint32(1)
	next := func(n int) uint32 { // opens a request and sends n bytes of it
		p.open(id, here)
		for ; n > 0; n -= maxFrame {
			size := min(n, maxFrame)
			p.client.WriteData(id, false, make([]byte, size))
			p.expectClient(fmt.Sprintf("WINDOW_UPDATE 0 %d", size), fmt.Sprintf("WINDOW_UPDATE %d %d", id, size))
		}
		id += 2
		return id - 2
	}
	served := func() {
		t.Helper()
		p.client.WriteHeaders(p.block(id, true, requestTo(here)...))
		p.expectClient(fmt.Sprintf("HEADERS %d", id), fmt.Sprintf("HEADERS %d END", id))
		id += 2
	}
	refused := func(id uint32) {
		t.Helper()
		p.expectClient(fmt.Sprintf("HEADERS %d END", id), fmt.Sprintf("RST_STREAM %d NO_ERROR", id))
		if p.field("grpc-status") != "8" || !strings.Contains(p.field("grpc-message"), "unfinished") {
			t.Errorf("answer %v", p.fields)
		}
	}
	// More than there are slots: they take none.
	var open []uint32
	for range 2 * maxServed {
		open = append(open, next(0))
	}
	served()
	// With their bodies they hold too much at some point; what is there is kept.
	partial := func() int {
		l := p.link()
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.partial
	}
	for partial() <= maxPartial-maxBody {
		open = append(open, next(maxBody))
	}
	last := next(maxPartial - partial() - exchangeSize - 1000)
	p.client.WriteData(last, false, make([]byte, 1000))
	p.expectClient("WINDOW_UPDATE 0 1000", fmt.Sprintf("WINDOW_UPDATE %d 1000", last))
	refused(last)
	served()
	// However they end, nothing of them is left: reset, finished, finished by trailers.
	for i, id := range open {
		switch i % 3 {
		case 0:
			p.client.WriteRSTStream(id, http2.ErrCodeCancel)
			continue
		case 1:
			p.client.WriteData(id, true, nil)
		case 2:
			p.client.WriteHeaders(p.block(id, true, "bye", "1"))
		}
		p.expectClient(fmt.Sprintf("HEADERS %d", id), fmt.Sprintf("HEADERS %d END", id))
	}
	served()
	if n := partial(); n != 0 {
		t.Errorf("%d bytes count as held when nothing is open", n)
	}
	// Header lists count too.
	long := func() uint32 {
		p.client.WriteHeaders(p.block(id, false, append(requestTo(here), "k", strings.Repeat("0", maxFrame-200))...))
		id += 2
		return id - 2
	}
	long()
	served() // by then it has been read
	for range maxPartial/partial() - 1 {
		long()
	}
	refused(long())
	served()
}

// TestLongHeaders: a request to a handler has bounded headers.
func TestLongHeaders(t *testing.T) {
	p := newPair(t, handlers(answer(0)))
	block := compress(append(requestTo(here), "k", strings.Repeat("~", maxBody))...)
	p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:maxFrame], EndStream: true})
	for block = block[maxFrame:]; len(block) > 0; {
		n := min(len(block), maxFrame)
		p.client.WriteContinuation(1, n == len(block), block[:n])
		block = block[n:]
	}
	p.expectClient("HEADERS 1 END")
	if p.field("grpc-status") != "8" || !strings.Contains(p.field("grpc-message"), "headers") {
		t.Errorf("answer %v", p.fields)
	}
}

// TestDebt is the flow control of an answer made here, frame by frame.
func TestDebt(t *testing.T) {
	p := newPair(t, handlers(answer(20000)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	p.ask(1, "/a", 0)
	p.expectRuntime("HEADERS 1", "DATA 1 0 END")
	p.runtime.WriteHeaders(p.block(1, false, ":status", "200"))
	p.expectClient("HEADERS 1")
	p.ask(3, here, 0)
	p.expectClient("HEADERS 3", "DATA 3 16384", "DATA 3 3616", "HEADERS 3 END")
	// The runtime does not know and uses all of its 65535.
	for range 3 {
		p.runtime.WriteData(1, false, make([]byte, maxFrame))
	}
	p.runtime.WriteDataPadded(1, false, make([]byte, 16283), make([]byte, 99)) // 16383 in all
	p.runtime.WriteHeaders(p.block(1, true, "grpc-status", "0"))
	p.expectClient("DATA 1 16384", "DATA 1 16384", "DATA 1 12767") // the rest is held
	// Its padding will not be sent: the stream's window gets it back at once, the connection's with the debt.
	p.expectRuntime("WINDOW_UPDATE 1 100")
	// Frames that cost no window are not held up by those that do.
	p.runtime.WriteWindowUpdate(0, 77)
	p.expectClient("WINDOW_UPDATE 0 77")
	p.ask(5, "/b", 0)
	p.expectRuntime("HEADERS 5", "DATA 5 0 END")
	p.runtime.WriteHeaders(p.block(5, true, ":status", "200"))
	p.expectClient("HEADERS 5 END")
	// The client's updates repay first: 20000, less the padding, which is not sent.
	p.client.WriteWindowUpdate(0, 3617)
	p.expectClient("DATA 1 3617")
	p.client.WriteWindowUpdate(0, 10000)
	p.expectClient("DATA 1 10000")
	p.client.WriteWindowUpdate(0, 6283+5)
	p.expectClient("DATA 1 6283", "HEADERS 1 END")
	p.client.WriteWindowUpdate(0, 1000)
	p.expectRuntime("WINDOW_UPDATE 0 5", "WINDOW_UPDATE 0 1000")
}

// TestLargeDebt: what is held for it is bounded, by not reading the runtime.
func TestLargeDebt(t *testing.T) {
	const debt, list = 1 << 20, 64 * maxFrame
	p := newPair(t, handlers(answer(debt)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 24})
	p.client.WriteWindowUpdate(0, debt)
	p.ask(1, "/list", 0)
	p.expectRuntime("WINDOW_UPDATE 0 1048576", "HEADERS 1", "DATA 1 0 END")
	p.ask(3, here, 0)
	p.skip(p.client, "HEADERS 3 END")
	written := make(chan error, 1)
	go func() {
		err := p.runtime.WriteHeaders(p.block(1, false, ":status", "200"))
		for i := range 64 {
			if err == nil {
				err = p.runtime.WriteData(1, i == 63, make([]byte, maxFrame))
			}
		}
		written <- err
	}()
	link := p.link()
	waitFor(t, "frames held", func() bool {
		link.mu.Lock()
		defer link.mu.Unlock()
		return link.account.size > maxHeld
	})
	if n := p.relay.buffered(); n > 1<<20 {
		t.Errorf("%d bytes are held", n)
	}
	p.client.WriteWindowUpdate(0, debt)
	total := 0
	for end := false; !end; {
		f, err := p.client.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if d, ok := f.(*http2.DataFrame); ok {
			total += len(d.Data())
			end = d.StreamEnded()
		}
	}
	if total != list {
		t.Errorf("%d bytes arrived, want %d", total, list)
	}
	if err := <-written; err != nil {
		t.Error(err)
	}
}

// TestDebtOfManyAnswers: the smallest window that there is, a long list from the
// runtime, and answers made here all the while.
func TestDebtOfManyAnswers(t *testing.T) {
	list := bytes.Repeat([]byte("0123456789abcdef"), 1<<16)
	fake := newFakeRuntime(t, func(s grpc.ServerStream) error {
		if err := s.RecvMsg(&[]byte{}); err != nil {
			return err
		}
		return s.SendMsg(&list)
	})
	served := newServer(echo)
	defer served.Stop()
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: served}})
	c := connect(t, relay.socket, grpc.WithStaticConnWindowSize(65535), grpc.WithStaticStreamWindowSize(65535))
	stop, done := make(chan struct{}), make(chan error, 4)
	for range 4 {
		go func() {
			msg := make([]byte, 60000)
			for {
				select {
				case <-stop:
					done <- nil
					return
				default:
				}
				if got, err := call(testContext(t), c, servedMethod, msg); err != nil || len(got) != len(msg) {
					done <- fmt.Errorf("served call: %d bytes, %w", len(got), err)
					return
				}
			}
		}()
	}
	for range 10 {
		got, err := call(testContext(t), c, "/x.Y/List", nil)
		if err != nil || !bytes.Equal(got, list) {
			t.Fatalf("list: %d bytes, %v", len(got), err)
		}
	}
	close(stop)
	for range 4 {
		if err := <-done; err != nil {
			t.Error(err)
		}
	}
}

// TestAnswerWaitsForWindows of the stream and of the connection.
func TestAnswerWaitsForWindows(t *testing.T) {
	p := newPair(t, handlers(answer(100)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 10})
	p.ask(1, here, 0)
	p.expectClient("HEADERS 1", "DATA 1 10")
	p.client.WriteWindowUpdate(1, 5)
	p.expectClient("DATA 1 5")
	p.client.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 30})
	p.expectClient("DATA 1 20")
	p.client.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 0}) // now 30 below
	p.client.WriteWindowUpdate(1, 31)
	p.expectClient("DATA 1 1")
	p.client.WriteWindowUpdate(1, 1000)
	p.expectClient("DATA 1 64", "HEADERS 1 END")
	p.client.WriteRSTStream(1, http2.ErrCodeNo)

	q := newPair(t, handlers(answer(initialWindow+1)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
	q.ask(1, here, 0)
	q.expectClient("HEADERS 1", "DATA 1 16384", "DATA 1 16384", "DATA 1 16384", "DATA 1 16383")
	q.client.WriteWindowUpdate(0, 1)
	q.expectClient("DATA 1 1", "HEADERS 1 END")
}
