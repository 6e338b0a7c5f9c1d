// Package relay passes HTTP/2 frames between the connections that it accepts
// and a runtime, and hands the streams whose :path is served in this process
// to an http.Handler.
//
// It promises to be invisible: every accepted connection has one connection of
// its own to the runtime, and any call, of any size and of any future kind,
// passes with its metadata and trailers, at the cost of a byte copy and in
// constant memory. Flow control, deadlines and cancellation are those of the
// two ends. It promises to stay: while the runtime is away it goes on accepting,
// holds new connections for a few seconds, and then answers that the runtime is
// unavailable.
//
// It never interprets a message, never retries a call, never opens a stream of
// its own, and never lets a handler or a slow connection hold up another.
//
// PROTOCOL.md states the frames, the limits, and what is deliberately absent.
package relay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
)

const (
	// defaultHold is less than the 5 s that a kubelet waits for a connection.
	defaultHold = 3 * time.Second
	// maxServed bounds the handlers that run at any moment; with maxBody it
	// bounds the memory of their requests.
	maxServed = 128
)

// Config says what to relay to and what to serve here.
type Config struct {
	// Dial opens a connection to the runtime. It is called once for each
	// accepted connection, again every few milliseconds while it fails, and
	// must obey ctx. Like the accepted ones, the connection must be a socket.
	Dial func(ctx context.Context) (net.Conn, error)

	// Handlers serve the streams whose :path is exactly one of the keys, such
	// as "/runtime.v1.RuntimeService/CheckpointContainer"; grpc-go's
	// (*Server).ServeHTTP is one. A handler is called once its request is
	// there as a whole (up to 64 KiB). It must return when the context of the
	// request ends: that is when the client resets the stream or goes away.
	// PeerFrom tells by the same context who that is.
	Handlers map[string]http.Handler

	// Passes, if not nil, is asked for each stream that has a handler whether it is the runtime's after all. It must not block.
	Passes func(path string) bool

	// Endless are the :paths of calls that do not end by themselves, such as
	// "/runtime.v1.RuntimeService/GetContainerEvents": Shutdown cuts them at
	// once instead of waiting.
	Endless []string

	// Counted are the :paths of which Stats tells each by itself, such as those
	// that are known to be called. Clients choose paths: all others count as one.
	Counted []string

	// Away, if not nil, is told when the runtime could not be reached, and why,
	// and with nil when it could be again. It must not block.
	Away func(cause error)

	// Hold is how long a new connection waits for a runtime that is not there
	// before its calls are answered with "unavailable". 0 means 3 s.
	Hold time.Duration

	// Log receives what an operator can act on. nil means no log.
	Log logrus.FieldLogger
}

// A Server relays. Its methods may be called from several goroutines.
type Server struct {
	cfg     Config
	routes  map[string]*route // not changed after New; see route
	other   *route            // of every path that is not among them
	served  chan struct{}     // one slot for each handler that runs
	away    atomic.Bool       // the runtime, for the log
	repeats *repeats

	accepted atomic.Int64

	// lastWrite is how long the last frames of a connection may take, and how
	// long handlers have to return once their requests are cancelled.
	lastWrite time.Duration
	// awayTime is how long a connection without a runtime answers before its
	// client is sent to a new one, which may find the runtime back.
	awayTime time.Duration

	ctx    context.Context // of every connection; ends with Shutdown
	cancel context.CancelFunc
	wg     sync.WaitGroup // connections, until their last goroutine is gone

	mu        sync.Mutex
	closed    bool
	listeners map[net.Listener]bool
	links     map[*link]bool
}

// New returns a Server that holds no resources until Serve is called.
func New(cfg Config) *Server {
	if cfg.Hold == 0 {
		cfg.Hold = defaultHold
	}
	if cfg.Log == nil {
		silent := logrus.New()
		silent.SetOutput(io.Discard)
		cfg.Log = silent
	}
	s := &Server{
		cfg:       cfg,
		served:    make(chan struct{}, maxServed),
		repeats:   newRepeats(cfg.Log),
		lastWrite: time.Second,
		awayTime:  500 * time.Millisecond,
		listeners: map[net.Listener]bool{},
		links:     map[*link]bool{},
	}
	s.routes, s.other = routesOf(cfg)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts from l, which it closes, until Shutdown; then it returns nil.
// Running out of descriptors does not end it.
func (s *Server) Serve(l net.Listener) error {
	defer l.Close()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.listeners[l] = true
	s.mu.Unlock()
	defer func() {
		s.mu.Lock()
		delete(s.listeners, l)
		s.mu.Unlock()
	}()
	for {
		conn, err := l.Accept()
		if s.ctx.Err() != nil || s.isClosed() {
			if err == nil {
				conn.Close()
			}
			return nil
		}
		if errors.Is(err, net.ErrClosed) {
			return fmt.Errorf("accept: %w", err)
		}
		if err != nil {
			s.repeats.say(logrus.WarnLevel, "accept a connection: trying again", err)
			select {
			case <-s.ctx.Done():
			case <-time.After(100 * time.Millisecond):
			}
			continue
		}
		s.start(conn)
	}
}

func (s *Server) tellAway(cause error) {
	if s.cfg.Away != nil {
		s.cfg.Away(cause)
	}
}

func (s *Server) isClosed() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.closed
}

// start relays one accepted connection in a goroutine that Shutdown waits for.
func (s *Server) start(conn net.Conn) {
	socket, err := newSocket(conn)
	if err != nil {
		s.repeats.say(logrus.ErrorLevel, "closing a connection", err)
		conn.Close()
		return
	}
	l := newLink(s, socket)
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		socket.Close()
		return
	}
	s.links[l] = true
	s.accepted.Add(1)
	s.wg.Add(1)
	go func() {
		defer s.wg.Done()
		l.run()
		s.mu.Lock()
		delete(s.links, l)
		s.mu.Unlock()
	}()
}

// Shutdown stops accepting, tells every client to go elsewhere, cuts endless
// calls, and waits for the others and for every goroutine of the Server. When
// ctx ends first, the calls that are left are answered with "unavailable",
// served ones are cancelled, and Shutdown returns the error of ctx.
func (s *Server) Shutdown(ctx context.Context) error {
	s.mu.Lock()
	s.closed = true
	for l := range s.listeners {
		l.Close()
	}
	for l := range s.links {
		l.drain()
	}
	s.mu.Unlock()

	done := make(chan struct{})
	go func() {
		s.wg.Wait()
		close(done)
	}()
	defer s.cancel()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
	}
	// The answers before the contexts: a handler whose context has ended may return without one, and an empty answer would go out.
	s.mu.Lock()
	for l := range s.links {
		l.cut("the relay is shutting down: call again")
	}
	s.mu.Unlock()
	s.cancel()
	select {
	case <-done:
		return fmt.Errorf("wait for calls in flight: %w", ctx.Err())
	case <-time.After(3 * s.lastWrite):
		return fmt.Errorf("wait for handlers to return: %w", ctx.Err())
	}
}
