package relay

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// TestRuntimeRestarts: the kubelet's connection comes back each time, and
// nothing is left behind.
func TestRuntimeRestarts(t *testing.T) {
	holdsNothing(t)
	fake := newFakeRuntime(t, echo)
	relay := newTestRelay(t, Config{Dial: fake.dial})
	c := connect(t, relay.socket)
	working := func() error {
		_, err := call(testContext(t), c, "/x.Y/Z", nil)
		return err
	}
	if err := working(); err != nil {
		t.Fatal(err)
	}
	running := settled(t)
	for i := range 100 {
		fake.stop()
		if i%10 == 0 { // a call while it is away
			ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
			if _, err := call(ctx, c, "/x.Y/Z", nil); err == nil {
				t.Fatal("answered without a runtime")
			}
			cancel()
		}
		fake.start()
		waitBack(t, working)
	}
	running.await(t)
}

// waitBack waits until calls succeed, for as long as a kubelet may have to once
// its runtime is back. Until then they say that it is away.
func waitBack(t testing.TB, working func() error) {
	t.Helper()
	for back := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		err := working()
		if err == nil {
			return
		}
		if took := time.Since(back); status.Code(err) != codes.Unavailable || took > 3500*time.Millisecond {
			t.Fatalf("%v after the runtime's return: %v", took, err)
		}
	}
}

// holdsNothing wants this process to hold no more when all other cleanups of
// the test have run than it does now. Meanwhile no garbage is collected: that
// would close files which nobody closes.
func holdsNothing(t testing.TB) {
	percent := debug.SetGCPercent(-1)
	before := settled(t)
	t.Cleanup(func() {
		before.await(t)
		debug.SetGCPercent(percent)
	})
}

// resources are what this process holds.
type resources struct{ goroutines, files int }

func held(t testing.TB) resources {
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return resources{runtime.NumGoroutine(), len(files)}
}

// settled is what this process holds once what has ended is gone.
func settled(t testing.TB) resources {
	var last resources
	waitStill(t, "changes of what is held", func() int64 {
		last = held(t)
		return int64(last.goroutines)<<32 + int64(last.files)
	})
	return last
}

// await waits until this process holds no more than it did.
func (r resources) await(t testing.TB) {
	t.Helper()
	var now resources
	defer func() {
		if t.Failed() {
			t.Logf("%+v are held, were %+v", now, r)
		}
	}()
	waitFor(t, "end of all goroutines and files", func() bool {
		now = held(t)
		return now.goroutines <= r.goroutines && now.files <= r.files
	})
}

// TestRuntimeDiesDuringServedCall: a client repeats every stream above the last
// one in a GOAWAY. One that is being served here must not be among them.
func TestRuntimeDiesDuringServedCall(t *testing.T) {
	g := newGate(t)
	fake := newFakeRuntime(t, func(s grpc.ServerStream) error { return g.wait(s.Context()) })
	inHandler := newGate(t)
	served := newServer(func(s grpc.ServerStream) error {
		if err := inHandler.wait(s.Context()); err != nil {
			return err
		}
		return echo(s)
	})
	defer served.Stop()
	count := &counter{Handler: served}
	relay := newTestRelay(t, Config{Dial: fake.dial, Handlers: map[string]http.Handler{servedMethod: count}})
	c := connect(t, relay.socket)
	relayed, answered := make(chan error, 1), make(chan error, 1)
	go func() {
		_, err := call(testContext(t), c, "/x.Y/Z", nil)
		relayed <- err
	}()
	<-g.entered
	go func() {
		got, err := call(testContext(t), c, servedMethod, []byte("once"))
		if err == nil && string(got) != "once" {
			err = fmt.Errorf("answer %q", got)
		}
		answered <- err
	}()
	<-inHandler.entered
	fake.stop()
	if err := <-relayed; status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "runtime") {
		t.Errorf("the relayed call ended with %v", err)
	}
	fake.start() // other calls go on, over another connection
	g.release()
	waitFor(t, "call over a new connection", func() bool {
		_, err := call(testContext(t), c, "/x.Y/Z", nil)
		return err == nil || status.Code(err) != codes.Unavailable
	})
	select {
	case err := <-answered:
		t.Fatalf("the served call ended with the runtime: %v", err)
	default:
	}
	inHandler.release()
	if err := <-answered; err != nil {
		t.Errorf("the served call ended with %v", err)
	}
	if n := count.n.Load(); n != 1 {
		t.Errorf("the handler was called %d times", n)
	}
	waitFor(t, "end of the connection without runtime", func() bool { return len(relay.connections()) == 1 })
}

// TestRuntimeDiesInAnAnswer that has begun: the client gets an error, not an end.
func TestRuntimeDiesInAnAnswer(t *testing.T) {
	for _, half := range []bool{false, true} {
		g := newGate(t)
		fake := newFakeRuntime(t, func(s grpc.ServerStream) error {
			m := []byte("first")
			if half {
				m = make([]byte, 1<<20)
			}
			if err := s.SendMsg(&m); err != nil {
				return err
			}
			return g.wait(s.Context())
		})
		relay := newTestRelay(t, Config{Dial: fake.dial})
		c := connect(t, relay.socket, grpc.WithStaticStreamWindowSize(65535), grpc.WithStaticConnWindowSize(65535))
		s, err := c.NewStream(testContext(t), &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, "/x.Y/Watch")
		if err != nil {
			t.Fatal(err)
		}
		if _, err := s.Header(); err != nil {
			t.Fatal(err)
		}
		if !half {
			if err := s.RecvMsg(&[]byte{}); err != nil {
				t.Fatal(err)
			}
		}
		fake.stop()
		if err := s.RecvMsg(&[]byte{}); half && err == nil || !half && status.Code(err) != codes.Unavailable {
			t.Errorf("half a message %v: %v", half, err)
		}
	}
}

// TestRuntimeGoAway, frame by frame.
func TestRuntimeGoAway(t *testing.T) {
	release := make(chan struct{})
	p := newPair(t, handlers(func(w http.ResponseWriter, r *http.Request) {
		select {
		case <-release:
		case <-r.Context().Done():
		}
		answer(3)(w, r)
	}))
	p.ask(1, "/a", 0)
	p.open(3, "/b")
	p.ask(5, "/c", 0)
	p.ask(7, "/d", 0)
	p.ask(9, here, 0)
	p.ask(11, "/e", 0)
	for _, id := range []int{1, 3, 5, 7, 11} {
		p.expectRuntime(fmt.Sprintf("HEADERS %d", id))
		if id != 3 {
			p.expectRuntime(fmt.Sprintf("DATA %d 0 END", id))
		}
	}
	p.runtime.WriteHeaders(p.block(5, false, ":status", "200"))
	p.expectClient("HEADERS 5")
	// A first GOAWAY that only announces the next passes as it is.
	p.runtime.WriteGoAway(maxStreamID, http2.ErrCodeNo, []byte("soon"))
	p.expectClient(fmt.Sprintf("GOAWAY %d NO_ERROR soon", maxStreamID))
	// 7 was the last that the runtime saw, 11 the last that the relay saw.
	p.runtime.WriteGoAway(7, http2.ErrCodeEnhanceYourCalm, []byte("why"))
	p.expectClient("RST_STREAM 11 REFUSED_STREAM", "GOAWAY 11 ENHANCE_YOUR_CALM why")
	// 1 is answered, 13 comes too late for anybody.
	p.runtime.WriteHeaders(p.block(1, true, ":status", "200"))
	p.expectClient("HEADERS 1 END")
	p.ask(13, here, 5)
	p.expectClient("WINDOW_UPDATE 0 5")
	p.client.WriteSettings()
	p.client.WriteSettings()
	p.expectRuntime("SETTINGS", "SETTINGS")
	// Then the runtime is gone. 3, 5 and 7 may have been executed.
	p.runtimeConn.Close()
	want := map[string]string{"HEADERS 3 END": "200", "HEADERS 5 END": "", "HEADERS 7 END": "200"}
	acks, resets := 0, 0
	for len(want) > 0 || acks < 2 || resets < 1 {
		got := p.next(p.client)
		switch st, ok := want[got]; {
		case ok:
			if p.field(":status") != st || p.field("grpc-status") != "14" {
				t.Errorf("%s: %v", got, p.fields)
			}
			delete(want, got)
		case got == "SETTINGS ACK":
			acks++
		case got == "RST_STREAM 3 NO_ERROR": // its client was still sending
			resets++
		default:
			t.Fatalf("the client got %s", got)
		}
	}
	// The served stream goes on to its end on this connection, which then closes.
	p.client.WritePing(false, [8]byte{'y', 'o', 'u', '?'})
	p.expectClient("PING ACK you?*")
	close(release)
	p.expectClient("HEADERS 9", "DATA 9 3", "HEADERS 9 END")
	p.expectEnd(p.client)
}

// TestLastFrames: what waits behind somebody else's write is written before the
// connection closes.
func TestLastFrames(t *testing.T) {
	p := newPair(t, handlers(answer(1<<20)), http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 24})
	p.client.WriteWindowUpdate(0, 1<<24)
	p.ask(1, here, 0)
	link := p.link()
	p.waitFull(link)
	p.open(2, "/even") // an error
	waitFor(t, "end", func() bool {
		link.mu.Lock()
		defer link.mu.Unlock()
		return link.ended
	})
	if got := p.skip(p.client, "EOF"); !strings.HasPrefix(got, "GOAWAY 1 PROTOCOL_ERROR") {
		t.Errorf("the last frame was %s", got)
	}
}

// waitFull waits until the client's socket is full, which stops a handler in a write.
func (p *pair) waitFull(l *link) {
	waitStill(p.t, "the handler's writes", func() int64 {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.account.window
	})
}

// TestUnreadLastFrames: a client that reads nothing cannot keep its connection.
func TestUnreadLastFrames(t *testing.T) {
	cfg := handlers(answer(1 << 20))
	cfg.Dial, cfg.Hold = (&fakeRuntime{socket: "/nonexistent"}).dial, time.Millisecond
	p := &pair{t: t, relay: newTestRelay(t, cfg, func(s *Server) { s.lastWrite = 10 * time.Millisecond })}
	p.connect(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 24})
	p.client.WriteWindowUpdate(0, 1<<24)
	p.ask(1, here, 0)
	p.waitFull(p.link())
	p.open(2, "/even") // an error
	waitFor(t, "end of the connection", func() bool { return len(p.relay.connections()) == 0 })
}

// TestAnsweredUpload: an answer that came before the end of its request is not
// replaced by an error when the runtime goes away.
func TestAnsweredUpload(t *testing.T) {
	p := newPair(t, Config{})
	p.open(1, "/a")
	p.expectRuntime("HEADERS 1")
	p.runtime.WriteHeaders(p.block(1, true, ":status", "200", "grpc-status", "5"))
	p.expectClient("HEADERS 1 END")
	p.runtimeConn.Close()
	p.expectClient("RST_STREAM 1 NO_ERROR", "GOAWAY 1 NO_ERROR ")
	p.expectEnd(p.client)
}

// TestRuntimeAway: calls wait for the hold time, are then told what to do, and
// the connection makes room for a better one.
func TestRuntimeAway(t *testing.T) {
	served := newServer(echo)
	defer served.Stop()
	fake := &fakeRuntime{t: t, socket: filepath.Join(t.TempDir(), "runtime.sock"), handle: echo}
	relay := newTestRelay(t, Config{Dial: fake.dial, Hold: 100 * time.Millisecond, Handlers: map[string]http.Handler{servedMethod: served}})
	c := connect(t, relay.socket)
	_, err := call(testContext(t), c, "/x.Y/Z", nil)
	if status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), fake.socket) || !strings.Contains(err.Error(), "start it") {
		t.Errorf("without a runtime: %v", err)
	}
	if got, err := call(testContext(t), c, servedMethod, []byte("hi")); err != nil || string(got) != "hi" {
		t.Errorf("a served call without a runtime: %q, %v", got, err)
	}
	first := relay.connections()
	fake.start()
	defer fake.stop()
	// The connection that has answered is never attached: a new one is.
	back := time.Now()
	for {
		if _, err = call(testContext(t), c, "/x.Y/Z", nil); err == nil {
			break
		}
		if status.Code(err) != codes.Unavailable || time.Since(back) > 3500*time.Millisecond {
			t.Fatal(err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	for l := range relay.connections() {
		l.mu.Lock()
		if first[l] && l.attached {
			t.Error("the connection without runtime was attached to one")
		}
		l.mu.Unlock()
	}
}

// TestAwayFrames is what a client sees of a connection without runtime.
func TestAwayFrames(t *testing.T) {
	cfg := Config{Dial: (&fakeRuntime{socket: "/nonexistent"}).dial, Hold: time.Millisecond}
	p := &pair{t: t, relay: newTestRelay(t, cfg, func(s *Server) { s.awayTime = patience })}
	p.connect()
	p.expectClient("SETTINGS HEADER_TABLE_SIZE=0 MAX_HEADER_LIST_SIZE=1048576", "SETTINGS ACK")
	p.client.WriteSettingsAck()
	p.ask(1, "/a", 0)
	p.expectClient("HEADERS 1 END", "RST_STREAM 1 NO_ERROR")
	if p.field(":status") != "200" || p.field("grpc-status") != "14" || !strings.Contains(p.field("grpc-message"), "/nonexistent") {
		t.Errorf("answer %v", p.fields)
	}
	p.client.WriteHeaders(p.block(3, true, requestTo("/b")...))
	p.client.WriteSettings()
	p.expectClient("HEADERS 3 END", "SETTINGS ACK")
	// Another client stays until it is sent away.
	p.relay = newTestRelay(t, cfg, func(s *Server) { s.awayTime = time.Millisecond })
	p.connect()
	p.client.WriteSettingsAck()
	p.expectClient("SETTINGS *", "SETTINGS ACK", "GOAWAY 0 NO_ERROR *")
	p.expectEnd(p.client)
}

// TestHold: a connection made while the runtime is away is attached to it when
// it comes, and its calls never fail. A socket whose connections end without
// a word is no runtime yet.
func TestHold(t *testing.T) {
	fake := &fakeRuntime{t: t, socket: filepath.Join(t.TempDir(), "runtime.sock"), handle: echo}
	var dials atomic.Int64
	relay := newTestRelay(t, Config{Hold: patience, Dial: func(ctx context.Context) (net.Conn, error) {
		dials.Add(1)
		return fake.dial(ctx)
	}})
	// A client may wait as long as the test for its connection: the relay's SETTINGS come when the runtime does.
	c := connect(t, relay.socket, grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: patience}))
	done := make(chan error, 1)
	go func() {
		_, err := call(testContext(t), c, "/x.Y/Z", nil)
		done <- err
	}()
	refused := func() {
		before := dials.Load()
		waitFor(t, "tries to reach the runtime", func() bool { return dials.Load() > before+5 })
	}
	refused()
	l, err := net.Listen("unix", fake.socket)
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		conn, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	}
	l.Close()
	refused()
	fake.start()
	defer fake.stop()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestHoldEnds: the whole hold time of the kubelet's case passes once. It is less than the 5 s that a kubelet waits.
func TestHoldEnds(t *testing.T) {
	fake := &fakeRuntime{t: t, socket: filepath.Join(t.TempDir(), "runtime.sock")}
	l, err := net.Listen("unix", fake.socket) // accepts, and never answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	relay := newTestRelay(t, Config{Dial: fake.dial})
	c := connect(t, relay.socket, grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: patience}))
	start := time.Now()
	_, err = call(testContext(t), c, "/x.Y/Z", nil)
	if took := time.Since(start); status.Code(err) != codes.Unavailable || took < defaultHold || defaultHold > 4*time.Second {
		t.Errorf("after %v: %v", took, err)
	}
}

// TestALinkBeginsWithoutATimer: one that is made to be stopped at once goes off nevertheless where the processor is busy, and then pongsDue would
// be done with what was never begun.
func TestALinkBeginsWithoutATimer(t *testing.T) {
	s := New(Config{})
	conn, peer := newTestSocket(t)
	l := newLink(s, conn)
	if l.tick != nil {
		t.Fatal("there is a timer before there was a PING")
	}
	ping := parseFrame(append(appendHeader(nil, 8, http2.FramePing, 0, 0), make([]byte, 8)...))
	l.mu.Lock()
	for range 2 { // the second finds it running
		l.pong(&l.client, ping)
	}
	l.mu.Unlock()
	l.own.Wait()
	l.flushNow(&l.client)
	answers := make([]byte, 34)
	if _, err := io.ReadFull(peer, answers); err != nil {
		t.Fatal(err)
	}
	for _, answer := range [][]byte{answers[:17], answers[17:]} {
		if f := parseFrame(answer); !f.is(http2.FramePing) || !f.has(http2.FlagPingAck) {
			t.Errorf("answered with %s, flags %x", f.typ, f.flags)
		}
	}
}
