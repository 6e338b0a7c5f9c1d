package relay

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	// maxBody bounds the request of a stream served here, which is kept whole
	// in memory until its handler has run, and likewise its header list.
	maxBody = 64 << 10
	// maxPartial bounds what the requests of one connection hold that are not
	// whole yet. They take no slot of maxServed: a client that finishes none
	// of its requests uses up what is its own, and nothing of others.
	maxPartial = 1 << 20
	// exchangeSize is about what a request holds besides header list and body.
	exchangeSize = 2 << 10
)

// errGone is what a handler's writes return once nobody reads them.
var errGone = errors.New("write answer: the stream has ended")

// An exchange is one stream served here: the request as it comes in, then the
// http.ResponseWriter of its handler.
type exchange struct {
	l       *link
	id      uint32
	st      *stream
	handler http.Handler
	cancel  context.CancelFunc
	req     *http.Request

	// guarded by l.mu
	body    []byte
	partial int   // what the request counts for in l.partial; 0 once it is whole
	window  int64 // bytes that the client accepts on the stream

	// the handler's
	header   http.Header
	declared []string // keys in header that are trailers
	head     []byte   // the response headers, compressed, once given
	out      []byte   // body not yet sent, at most one frame
}

// open begins to serve a stream. The caller holds l.mu.
func (l *link) open(r *request, handler http.Handler) error {
	ctx, cancel := context.WithCancel(context.WithValue(l.ctx, http.LocalAddrContextKey, l.client.conn.local))
	if peer := l.client.conn.peer; peer != nil {
		ctx = context.WithValue(ctx, peerKey{}, *peer)
	}
	x := &exchange{l: l, id: r.id, handler: handler, cancel: cancel, window: l.initial, header: http.Header{}}
	x.st = &stream{served: x, asked: r.end, counters: r.route.opened()}
	x.st.counters.served.Add(1)
	var err error
	if x.req, err = newRequest(ctx, r.fields); err != nil {
		cancel()
		l.s.repeats.say(logrus.WarnLevel, "refused a request", err)
		l.client.send(appendReset(nil, r.id, http2.ErrCodeProtocol))
		return nil
	}
	x.req.RemoteAddr = l.client.conn.remote.String()
	l.streams[r.id] = x.st
	switch {
	case r.size > maxBody:
		l.finish(r.id, x.st, resourceExhausted, fmt.Sprintf("the request's headers are larger than %d bytes", maxBody))
	case r.end:
		x.start()
	default:
		x.grow(exchangeSize + r.size)
	}
	return nil
}

// connectionHeaders concern a connection of HTTP/1, and make a request of HTTP/2 malformed (RFC 9113, 8.2.2).
var connectionHeaders = []string{"connection", "proxy-connection", "keep-alive", "transfer-encoding", "upgrade"}

// newRequest is the request without its body.
func newRequest(ctx context.Context, fields []hpack.HeaderField) (*http.Request, error) {
	req := &http.Request{Proto: "HTTP/2.0", ProtoMajor: 2, Header: http.Header{}}
	regular := false
	seen := map[string]bool{} // of the pseudo-headers
	for _, f := range fields {
		name, pseudo := strings.CutPrefix(f.Name, ":")
		if pseudo && seen[name] {
			return nil, fmt.Errorf("read request: %q twice", f.Name)
		}
		seen[name] = seen[name] || pseudo
		switch {
		case pseudo && regular:
			return nil, fmt.Errorf("read request: %q after other headers", f.Name)
		case name == "method" && pseudo:
			req.Method = f.Value
		case name == "path" && pseudo:
			req.URL, req.RequestURI = &url.URL{Path: f.Value}, f.Value
		case name == "authority" && pseudo:
			req.Host = f.Value
		case name == "scheme" && pseudo:
		case pseudo, !httpguts.ValidHeaderFieldName(name), name != strings.ToLower(name), !httpguts.ValidHeaderFieldValue(f.Value):
			return nil, fmt.Errorf("read request: invalid header %.100q", f.Name)
		case slices.Contains(connectionHeaders, name), name == "te" && f.Value != "trailers":
			return nil, fmt.Errorf("read request: header %.100q, which HTTP/2 does not have", f.Name)
		default:
			regular = true
			req.Header.Add(name, f.Value)
		}
	}
	if req.Method == "" || !seen["scheme"] {
		return nil, errors.New("read request: no method or no scheme")
	}
	if req.Host == "" {
		req.Host = req.Header.Get("Host")
	}
	req.Header.Del("Host")
	return req.WithContext(ctx), nil
}

// The next six are called with l.mu held.

// grow counts n more bytes of a request that is not whole, or refuses it.
func (x *exchange) grow(n int) bool {
	if x.l.partial+n > maxPartial {
		x.l.finish(x.id, x.st, resourceExhausted, fmt.Sprintf("unfinished requests on this connection hold %d bytes already: finish or cancel some", x.l.partial))
		return false
	}
	x.partial += n
	x.l.partial += n
	return true
}

// receive takes a piece of the request's body.
func (x *exchange) receive(p []byte) {
	switch {
	case len(x.body)+len(p) > maxBody:
		x.l.finish(x.id, x.st, resourceExhausted, fmt.Sprintf("the request is larger than %d bytes", maxBody))
	case x.grow(len(p)):
		x.body = append(x.body, p...)
	}
}

// start runs the handler, if a slot is free: the request is whole.
func (x *exchange) start() {
	if x.gone() { // refused with its last piece
		return
	}
	if length := x.req.Header.Get("Content-Length"); length != "" && length != strconv.Itoa(len(x.body)) {
		x.l.reset(x.id, http2.ErrCodeProtocol)
		return
	}
	select {
	case x.l.s.served <- struct{}{}:
	default:
		x.l.finish(x.id, x.st, resourceExhausted, fmt.Sprintf("%d calls are being served already: try again later", maxServed))
		return
	}
	x.whole()
	x.req.ContentLength = int64(len(x.body))
	x.req.Body = io.NopCloser(bytes.NewReader(x.body))
	x.l.tasks.Go(x.serve)
}

// abandon is called once when the stream is removed, however it ended.
func (x *exchange) abandon() {
	x.cancel()
	x.whole()
}

// whole ends the request's part in what is counted as not whole.
func (x *exchange) whole() {
	x.l.partial -= x.partial
	x.partial = 0
}

func (x *exchange) gone() bool { return x.l.ended || x.l.streams[x.id] != x.st }

// serve runs the handler in a goroutine of its own.
func (x *exchange) serve() {
	defer func() { <-x.l.s.served }()
	defer x.cancel()
	defer func() {
		if p := recover(); p != nil {
			if p != http.ErrAbortHandler {
				x.l.s.repeats.say(logrus.ErrorLevel, "a handler panicked", fmt.Errorf("serve %s: %v\n%s", x.req.URL.Path, p, debug.Stack()))
			}
			x.reset()
		}
	}()
	x.handler.ServeHTTP(x, x.req)
	if x.head == nil {
		x.WriteHeader(http.StatusOK)
	}
	x.send(true, x.trailers())
}

func (x *exchange) reset() {
	x.l.mu.Lock()
	defer x.l.mu.Unlock()
	if !x.gone() {
		x.l.client.send(appendReset(nil, x.id, http2.ErrCodeInternal))
		x.l.forget(x.id)
	}
}

// Header is as in http.ResponseWriter. Keys that "Trailer" declares, and keys
// with http.TrailerPrefix, become trailers when the handler returns.
func (x *exchange) Header() http.Header { return x.header }

// WriteHeader is as in http.ResponseWriter.
func (x *exchange) WriteHeader(status int) {
	if x.head != nil {
		return
	}
	for _, v := range x.header["Trailer"] {
		for key := range strings.SplitSeq(v, ",") {
			x.declared = append(x.declared, http.CanonicalHeaderKey(strings.TrimSpace(key)))
		}
	}
	fields := []hpack.HeaderField{{Name: ":status", Value: strconv.Itoa(status)}}
	for _, key := range slices.Sorted(maps.Keys(x.header)) {
		// "Trailer" only announces; no gRPC server sends it.
		if key != "Trailer" && !slices.Contains(x.declared, key) && !strings.HasPrefix(key, http.TrailerPrefix) {
			fields = appendFields(fields, key, x.header[key])
		}
	}
	x.head = encode(fields)
}

func (x *exchange) trailers() []hpack.HeaderField {
	var fields []hpack.HeaderField
	for _, key := range slices.Sorted(maps.Keys(x.header)) {
		if name, ok := strings.CutPrefix(key, http.TrailerPrefix); ok {
			fields = appendFields(fields, name, x.header[key])
		} else if slices.Contains(x.declared, key) {
			fields = appendFields(fields, key, x.header[key])
		}
	}
	return fields
}

func appendFields(fields []hpack.HeaderField, key string, values []string) []hpack.HeaderField {
	name := strings.ToLower(key)
	for _, v := range values {
		if httpguts.ValidHeaderFieldName(name) && httpguts.ValidHeaderFieldValue(v) {
			fields = append(fields, hpack.HeaderField{Name: name, Value: v})
		}
	}
	return fields
}

// Write is as in http.ResponseWriter. It waits for the client's windows.
func (x *exchange) Write(p []byte) (int, error) {
	if x.head == nil {
		x.WriteHeader(http.StatusOK)
	}
	written := 0
	for len(p) > 0 {
		n := min(len(p), maxFrame-len(x.out))
		x.out = append(x.out, p[:n]...)
		p = p[n:]
		if len(x.out) == maxFrame {
			if err := x.send(false, nil); err != nil {
				return written, err
			}
		}
		written += n
	}
	return written, nil
}

// Flush is as in http.Flusher.
func (x *exchange) Flush() {
	if x.head == nil {
		x.WriteHeader(http.StatusOK)
	}
	x.send(false, nil)
}

// send writes what has been collected, and at the end the trailers.
func (x *exchange) send(end bool, trailers []hpack.HeaderField) error {
	l := x.l
	l.mu.Lock()
	defer l.mu.Unlock()
	defer l.flush(&l.client)
	if x.gone() {
		return errGone
	}
	if !x.st.answered {
		x.st.answered = true
		l.client.add(appendBlock(nil, x.id, x.head, end && len(x.out) == 0 && len(trailers) == 0))
	} else if end && len(x.out) == 0 && len(trailers) == 0 {
		l.client.add(appendData(nil, x.id, nil, true))
	}
	for len(x.out) > 0 {
		n := min(int64(len(x.out)), l.account.window, x.window)
		switch {
		case x.gone():
			return errGone
		case len(l.client.buf) > outLimit:
			l.room(&l.client)
		case n > 0:
			l.account.window -= n
			x.window -= n
			x.st.counters.responses.Add(n)
			rest := x.out[n:]
			l.client.add(appendData(nil, x.id, x.out[:n], end && len(rest) == 0 && len(trailers) == 0))
			x.out = x.out[:copy(x.out, rest)]
		case len(l.client.buf) > 0 && !l.client.writing:
			l.flush(&l.client)
		default:
			l.changed.Wait()
		}
	}
	if end {
		if len(trailers) > 0 {
			l.client.add(appendBlock(nil, x.id, encode(trailers), true))
		}
		l.forget(x.id)
	}
	return nil
}
