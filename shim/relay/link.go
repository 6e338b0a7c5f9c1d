package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/http2"
)

const (
	// prefaceTimeout is what a client has to say that it speaks HTTP/2.
	prefaceTimeout = 20 * time.Second
	// redial is the pause between two tries to reach the runtime.
	redial = 20 * time.Millisecond
)

// crowd is how many calls in flight make it worth while to move more frames at once, instead of each as soon as can be: client, relay and
// runtime then share the processors, and to write each by itself takes more of them than it gains (make bench: 16 callers).
const crowd = 4

// A link is one accepted connection with its connection to the runtime, or
// without one: which of the two is settled once, before the client's first
// frame is answered. It has up to four goroutines, two pumps and two flushers,
// and one for each stream served here; run waits for all of them.
type link struct {
	s      *Server
	ctx    context.Context
	cancel context.CancelFunc
	own    sync.WaitGroup // goroutines of the link, handlers aside
	tasks  sync.WaitGroup // handlers

	mu      sync.Mutex
	changed *sync.Cond // windows opened, room in an outlet, a stream gone, the end
	started bool       // SETTINGS exchanged
	ended   bool
	client  outlet
	runtime outlet
	tick    *time.Timer // calls pongsDue; nil before the first PING
	ticking bool

	attached bool   // there is a runtime at the other end
	cause    string // why not
	unacked  int    // SETTINGS of the client that the runtime has to acknowledge
	uploaded int64  // DATA sent to the runtime that it has not granted again
	partial  int    // bytes held by requests to handlers that are not whole yet

	streams map[uint32]*stream
	last    uint32 // highest stream that the client opened
	told    uint32 // last stream in our GOAWAY: the client repeats those above
	leaving bool   // GOAWAY sent: the link ends with its last stream

	initial int64   // the client's INITIAL_WINDOW_SIZE
	account account // the client's connection window
}

// A stream is one that both sides may still send on.
type stream struct {
	served   *exchange // nil: relayed
	counters *counters // of its path
	endless  bool
	asked    bool // the client sent END_STREAM
	answered bool // response headers have passed
	done     bool // the runtime sent END_STREAM
}

func newLink(s *Server, conn *socket) *link {
	l := &link{
		s:       s,
		told:    maxStreamID,
		streams: map[uint32]*stream{},
		initial: initialWindow,
		account: newAccount(),
	}
	l.changed = sync.NewCond(&l.mu)
	l.client = outlet{conn: conn, wake: sync.NewCond(&l.mu)}
	l.runtime = outlet{wake: sync.NewCond(&l.mu), closed: true}
	l.ctx, l.cancel = context.WithCancel(s.ctx)
	return l
}

// run relays until the client is gone or has been sent away.
func (l *link) run() {
	defer l.cancel()
	defer l.client.conn.Close()
	in := newFrameReader(l.client.conn)
	settings, err := l.readPreface(in)
	if err != nil {
		l.s.cfg.Log.WithError(err).Debug("connection without HTTP/2 preface")
		return
	}
	runtime, err := l.attach(settings)
	if l.ctx.Err() != nil {
		if runtime != nil {
			runtime.conn.Close()
		}
		return
	}
	if err != nil {
		l.cause = fmt.Sprintf("the container runtime is away (%v): start it, or correct the endpoint in the configuration", err)
		if !l.s.away.Swap(true) {
			// Each of the two comes once, after the other, and not before a client was held: the log tells at any time how it is.
			l.s.cfg.Log.WithError(err).Warn("the runtime is away: answering calls with UNAVAILABLE until it is back")
			l.s.tellAway(err)
		}
	} else if l.s.away.Swap(false) {
		l.s.cfg.Log.Info("the runtime is back")
		l.s.tellAway(nil)
	}
	l.relay(in, settings, runtime)
}

// readPreface reads what every HTTP/2 client sends first, without waiting for
// anything. The SETTINGS are valid until the next frame is read.
func (l *link) readPreface(in *frameReader) (frame, error) {
	l.mu.Lock()
	if l.ended { // whose deadline must not be moved
		l.mu.Unlock()
		return frame{}, net.ErrClosed
	}
	l.client.conn.SetReadDeadline(time.Now().Add(prefaceTimeout))
	l.mu.Unlock()
	magic := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(in.br, magic); err != nil {
		return frame{}, fmt.Errorf("read preface: %w", err)
	}
	if string(magic) != http2.ClientPreface {
		return frame{}, fmt.Errorf("read preface: %q is not HTTP/2", magic)
	}
	f, err := readSettings(in)
	if err != nil {
		return f, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return f, net.ErrClosed
	}
	l.client.conn.SetReadDeadline(time.Time{})
	return f, nil
}

func readSettings(in *frameReader) (frame, error) {
	f, err := in.next()
	if err == nil {
		err = f.check()
	}
	if err == nil && (!f.is(http2.FrameSettings) || f.has(http2.FlagSettingsAck)) {
		err = protocolError(fmt.Sprintf("%s instead of SETTINGS", f.typ))
	}
	if err == nil {
		_, err = hop(f)
	}
	if err != nil {
		return f, fmt.Errorf("read SETTINGS: %w", err)
	}
	return f, nil
}

// upstream is a connection to the runtime whose SETTINGS have been read.
type upstream struct {
	conn     *socket
	in       *frameReader
	settings frame
}

// attach connects to the runtime and tries again for as long as the client is
// held. A runtime counts as there when it has sent its SETTINGS: a socket with
// nobody behind it, or one that dies while it starts, does not.
func (l *link) attach(client frame) (*upstream, error) {
	settings, err := toRuntime(client, true)
	if err != nil {
		return nil, err
	}
	hello := appendSettings([]byte(http2.ClientPreface), settings)
	ctx, cancel := context.WithTimeout(l.ctx, l.s.cfg.Hold)
	defer cancel()
	var cause error
	for {
		up, err := l.greet(ctx, hello)
		if err == nil {
			return up, nil
		}
		if cause == nil || ctx.Err() == nil {
			cause = err // of the last try that had time to fail by itself
		}
		select {
		case <-ctx.Done():
			return nil, cause
		case <-time.After(redial):
		}
	}
}

func (l *link) greet(ctx context.Context, hello []byte) (*upstream, error) {
	dialed, err := l.s.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	conn, err := newSocket(dialed)
	if err != nil {
		dialed.Close()
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Unix(1, 0)) })
	in := newFrameReader(conn)
	_, err = conn.Write(hello)
	var f frame
	if err == nil {
		f, err = readSettings(in)
	}
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, fmt.Errorf("greet the runtime: %w", err)
	}
	return &upstream{conn, in, f}, nil
}

// relay exchanges the first SETTINGS, moves frames until the link ends, and
// then lets go of everything.
func (l *link) relay(in *frameReader, settings frame, runtime *upstream) {
	l.mu.Lock()
	if l.ended {
		l.mu.Unlock()
		if runtime != nil {
			runtime.conn.Close()
		}
		return
	}
	l.started = true
	l.applySettings(settings)
	if runtime != nil {
		l.attached = true
		l.runtime.conn, l.runtime.closed = runtime.conn, false
		l.unacked = 1
		s, _ := toClient(runtime.settings, true)
		l.client.send(appendSettings(nil, s))
	} else {
		l.client.send(appendSettingsAck(appendSettings(nil, ownSettings())))
	}
	l.mu.Unlock()

	l.own.Go(func() { l.flusher(&l.client) })
	if runtime != nil {
		l.own.Go(func() { l.flusher(&l.runtime) })
		l.own.Go(func() { l.pumpRuntime(runtime.in) })
	} else {
		l.own.Go(l.sendAway)
	}
	err := newClientPump(l, in).run()

	l.mu.Lock()
	var broken *connError
	if errors.As(err, &broken) {
		l.s.repeats.say(logrus.WarnLevel, "a client broke HTTP/2: closing its connection", err)
		l.client.send(appendGoAway(nil, l.last, broken.code, []byte(broken.reason)))
	}
	l.end()
	l.mu.Unlock()
	l.own.Wait()
	l.client.conn.Close()
	if runtime != nil {
		runtime.conn.Close()
	}
	l.tasks.Wait()
}

// sendAway lets a client without runtime look for it on a new connection.
func (l *link) sendAway() {
	select {
	case <-l.ctx.Done():
	case <-time.After(l.s.awayTime):
		l.mu.Lock()
		l.goAway(http2.ErrCodeNo, nil)
		l.mu.Unlock()
	}
}

// The functions below are called with l.mu held.

// end makes every goroutine of the link return, after what waits has been
// written or Server.lastWrite is over.
func (l *link) end() {
	if l.ended {
		return
	}
	l.ended = true
	l.cancel()
	if l.ticking && l.tick.Stop() {
		l.ticking = false
		l.own.Done()
	}
	for _, o := range []*outlet{&l.client, &l.runtime} {
		if o.conn != nil {
			o.conn.SetReadDeadline(time.Unix(1, 0))
			o.conn.SetWriteDeadline(time.Now().Add(l.s.lastWrite))
		}
		o.wake.Signal()
	}
	l.changed.Broadcast()
}

// writeFailed stops sending to a side that takes nothing any more. What the
// runtime has still said is read to its end; without the client nothing is left.
func (l *link) writeFailed(o *outlet) {
	o.closed, o.buf = true, nil
	if o == &l.client {
		l.end()
	} else if !l.ended {
		o.conn.SetReadDeadline(time.Now().Add(l.s.lastWrite))
	}
}

// goAway tells the client to open new streams elsewhere. The last stream named
// is the highest one received, not the runtime's: the client repeats those
// above it, and one that is being served here must not be.
func (l *link) goAway(code http2.ErrCode, debug []byte) {
	if !l.leaving {
		l.leaving = true
		l.told = l.last
		l.client.send(appendGoAway(nil, l.last, code, debug))
	}
	l.endIfIdle()
}

// endIfIdle ends a link whose client has been sent away and has read all answers.
func (l *link) endIfIdle() {
	if l.leaving && len(l.streams) == 0 && len(l.account.held) == 0 && len(l.client.buf) == 0 && !l.client.writing {
		l.end()
	}
}

// forget removes a stream: frames that still come for it are dropped.
func (l *link) forget(id uint32) {
	if st := l.streams[id]; st != nil {
		delete(l.streams, id)
		if st.served != nil {
			st.served.abandon()
		}
		l.changed.Broadcast()
		l.endIfIdle()
	}
}

// deliver passes frames of one stream to the client, in order with what may be
// held for it. The caller flushes or nudges.
func (l *link) deliver(id uint32, raw []byte) {
	now, stripped := l.account.pass(id, raw)
	if now {
		l.client.add(raw)
		return
	}
	if stripped > 0 { // the connection's window gets it back in settle
		l.runtime.send(appendWindowUpdate(nil, id, stripped))
	}
	l.release()
}

// release passes what the client's connection window lets through of what is
// held. That may exceed outLimit by maxHeld: the memory is only moved, and the
// runtime is not read before it has been written.
func (l *link) release() {
	if !l.client.closed && len(l.account.held) > 0 {
		l.client.buf = l.account.release(l.client.buf)
		l.client.nudge()
		l.endIfIdle()
	}
}

// settle gives the runtime as much of the client's connection window as is free, and reports whether that is anything. The caller
// flushes or nudges.
func (l *link) settle() bool {
	if !l.attached {
		return false
	}
	n := l.account.repay()
	return n > 0 && l.runtime.owe(appendWindowUpdate(nil, 0, n))
}

// finish ends a stream with a status of the relay's own: as its answer, or as
// the trailers of an answer that has begun.
func (l *link) finish(id uint32, st *stream, status int, message string) {
	fields := statusFields(st.answered, status, message)
	l.deliver(id, appendBlock(nil, id, encode(fields), true))
	if !st.asked {
		l.deliver(id, appendReset(nil, id, http2.ErrCodeNo))
	}
	l.client.nudge()
	l.forget(id)
}

// runtimeGone ends what the runtime has left open. It may have executed those
// calls: only the ones that it refused itself may be repeated (see goAway).
func (l *link) runtimeGone(cause string) {
	if !l.attached {
		return
	}
	l.attached, l.cause = false, cause
	l.runtime.closed, l.runtime.buf = true, nil
	for id, st := range l.streams {
		switch {
		case st.served != nil:
		case st.done: // answered; what the client still sends, nobody reads
			l.deliver(id, appendReset(nil, id, http2.ErrCodeNo))
			l.forget(id)
		default:
			l.finish(id, st, unavailable, cause)
		}
	}
	for ; l.unacked > 0; l.unacked-- {
		l.client.send(appendSettingsAck(nil))
	}
	if l.uploaded > 0 { // what is being uploaded to a handler needs the window
		l.client.send(appendWindowUpdate(nil, 0, l.uploaded))
	}
	l.client.nudge()
	l.goAway(http2.ErrCodeNo, nil)
}

// The two steps of Shutdown. They take l.mu themselves.

// drain sends the client away and cuts the calls that would never end.
func (l *link) drain() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.started {
		l.end()
		return
	}
	for id, st := range l.streams {
		if st.endless {
			l.drop(id, st, "the relay is shutting down: call again")
		}
	}
	l.goAway(http2.ErrCodeNo, nil)
}

// cut ends every call that is left.
func (l *link) cut(reason string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id, st := range l.streams {
		l.drop(id, st, reason)
	}
	l.end()
}

func (l *link) drop(id uint32, st *stream, reason string) {
	if st.served == nil {
		l.runtime.send(appendReset(nil, id, http2.ErrCodeCancel))
	}
	l.finish(id, st, unavailable, reason)
}
