package relay

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A clientPump reads the client's frames, routes the streams, and passes on
// what is for the runtime. It never waits for a handler or for the client to
// read; it waits for the runtime to read, as a byte copy would.
type clientPump struct {
	l     *link
	in    *frameReader
	block block

	// The client may use a dynamic table until it has acknowledged that ours
	// has size 0. Every request runs through the decoder, which keeps that
	// table; what goes to the runtime meanwhile is encoded again.
	dec       *hpack.Decoder
	verbatim  bool
	fields    []hpack.HeaderField // of the block being decoded
	size      int
	request   request // the last one
	reencoder *hpack.Encoder
	reencoded bytes.Buffer
}

func newClientPump(l *link, in *frameReader) *clientPump {
	p := &clientPump{l: l, in: in}
	p.dec = hpack.NewDecoder(4096, p.field)
	p.dec.SetMaxStringLength(maxHeaderList)
	p.reencoder = hpack.NewEncoder(&p.reencoded)
	p.reencoder.SetMaxDynamicTableSize(0)
	return p
}

// run returns when the client is gone, has broken the protocol (a *connError),
// or the link has ended.
func (p *clientPump) run() error {
	l := p.l
	l.client.conn.idle = func() { l.flushNow(&l.runtime) }
	for {
		f, err := p.in.next()
		if err != nil {
			return err
		}
		if err := f.check(); err != nil {
			return err
		}
		var r *request
		if p.block.id != 0 || f.is(http2.FrameHeaders) || f.is(http2.FrameContinuation) {
			h, whole, err := p.block.add(f)
			if err != nil {
				return err
			}
			if !whole {
				continue
			}
			if r, err = p.decode(h); err != nil {
				return err
			}
		}
		l.mu.Lock()
		l.room(&l.runtime)
		for l.client.owed > owedLimit && !l.ended {
			l.changed.Wait()
		}
		if l.ended {
			l.mu.Unlock()
			return nil
		}
		if r != nil {
			err = p.headers(r)
		} else {
			err = p.frame(f)
		}
		l.client.conn.gather = len(l.streams) >= crowd
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// A request is a header block of the client's: a request or its trailers. It is
// valid until the next frame is read.
type request struct {
	headers
	route *route // of its path

	// Those of a request that may pass without being decoded are not known.
	fields []hpack.HeaderField
	size   int    // of the header list, as RFC 9113 counts it
	bad    string // why it is refused
	large  bool
}

func (p *clientPump) decode(h headers) (*request, error) {
	if p.verbatim {
		if r := p.l.s.routeOf(h); r != nil && r.handler == nil {
			p.request = request{headers: h, route: r}
			return &p.request, nil
		}
	}
	p.fields, p.size = p.fields[:0], 0
	p.dec.SetEmitEnabled(true)
	err := h.fragments(func(b []byte) error {
		_, err := p.dec.Write(b)
		return err
	})
	if err == nil {
		err = p.dec.Close()
	}
	if _, ok := err.(*connError); ok {
		return nil, err
	}
	if err != nil {
		return nil, &connError{http2.ErrCodeCompression, err.Error()}
	}
	p.request = request{headers: h, fields: p.fields, size: p.size, large: p.size > maxHeaderList}
	r := &p.request
	path, paths := "", 0
	for _, f := range p.fields {
		if f.Name == ":path" {
			path = f.Value
			paths++
		}
	}
	// CVE-2026-33186: a path without its slash gets past rules that name it.
	if paths != 1 || !strings.HasPrefix(path, "/") {
		r.bad = fmt.Sprintf("path %.100q", path)
	}
	r.route = p.l.s.route([]byte(path))
	return r, nil
}

// field is called by the decoder. Past the limit it goes on decoding, which
// keeps the table right, but allocates nothing more.
func (p *clientPump) field(f hpack.HeaderField) {
	if p.size += int(f.Size()); p.size > maxHeaderList {
		p.dec.SetEmitEnabled(false)
		return
	}
	p.fields = append(p.fields, f)
}

// The functions below are called with l.mu held.

func (p *clientPump) headers(r *request) error {
	l := p.l
	if st := l.streams[r.id]; st != nil {
		return p.trailers(r, st)
	}
	if r.id%2 == 0 {
		return protocolError(fmt.Sprintf("client opened stream %d", r.id))
	}
	if r.id <= l.last {
		return nil // trailers of a stream that has ended meanwhile
	}
	l.last = r.id
	if r.id > l.told {
		return nil // the client knows from our GOAWAY that nobody saw it
	}
	switch handler := l.s.handler(r.route); {
	case r.large:
		l.client.send(appendReset(nil, r.id, http2.ErrCodeEnhanceYourCalm))
	case r.bad != "":
		l.s.repeats.say(logrus.WarnLevel, "refused a stream", errors.New(r.bad))
		l.client.send(appendReset(nil, r.id, http2.ErrCodeProtocol))
	case handler != nil:
		return l.open(r, handler)
	case !l.attached:
		st := &stream{asked: r.end, counters: r.route.opened()}
		l.streams[r.id] = st
		l.finish(r.id, st, unavailable, l.cause)
	default:
		l.streams[r.id] = &stream{asked: r.end, endless: r.route.endless, counters: r.route.opened()}
		l.runtime.add(p.forward(r))
	}
	return nil
}

func (p *clientPump) trailers(r *request, st *stream) error {
	if st.asked || !r.end {
		return protocolError(fmt.Sprintf("HEADERS on stream %d, which is open", r.id))
	}
	if r.large {
		return &connError{http2.ErrCodeEnhanceYourCalm, "trailers too long"}
	}
	st.asked = true
	if st.served != nil {
		st.served.start()
		return nil
	}
	p.l.runtime.add(p.forward(r))
	p.l.forgetIfOver(r.id, st)
	return nil
}

// forward is the block as the runtime may get it.
func (p *clientPump) forward(r *request) []byte {
	if p.verbatim {
		return r.raw
	}
	p.reencoded.Reset()
	for _, f := range r.fields {
		p.reencoder.WriteField(f) // to a bytes.Buffer: cannot fail
	}
	return appendBlock(nil, r.id, p.reencoded.Bytes(), r.end)
}

func (p *clientPump) frame(f frame) error {
	l := p.l
	st := l.streams[f.id]
	if st == nil && f.id > l.last {
		switch f.typ {
		case http2.FrameData, http2.FrameRSTStream, http2.FrameWindowUpdate:
			return protocolError(fmt.Sprintf("%s on idle stream %d", f.typ, f.id))
		}
	}
	switch f.typ {
	case http2.FrameData:
		return l.clientData(f, st)
	case http2.FrameRSTStream:
		if st != nil && st.served == nil {
			l.runtime.add(f.raw)
		}
		l.forget(f.id)
	case http2.FrameWindowUpdate:
		return l.clientWindow(f, st)
	case http2.FrameSettings:
		if !f.has(http2.FlagSettingsAck) {
			return l.clientSettings(f)
		}
		if !p.verbatim { // of our first: table size 0 holds from here on
			p.verbatim = true
			p.dec.SetAllowedMaxDynamicTableSize(0)
			p.dec.SetMaxDynamicTableSize(0)
		}
		l.runtime.add(f.raw)
	case http2.FramePing:
		if !f.has(http2.FlagPingAck) {
			l.pong(&l.client, f)
		}
	}
	// GOAWAY concerns streams that the runtime opens: there are none. PRIORITY
	// is obsolete advice. Frames of unknown types are for one hop only.
	return nil
}

func (l *link) clientData(f frame, st *stream) error {
	body, err := f.data()
	if err != nil {
		return err
	}
	if st != nil && st.asked {
		return &connError{http2.ErrCodeStreamClosed, fmt.Sprintf("DATA on stream %d after its end", f.id)}
	}
	n, end := int64(len(f.payload())), f.has(http2.FlagDataEndStream)
	if st != nil {
		st.counters.requests.Add(n)
	}
	if st != nil && st.served == nil {
		st.asked = end
		l.uploaded += n
		l.runtime.add(f.raw)
		l.forgetIfOver(f.id, st)
		return nil
	}
	// The runtime does not see this DATA, so its window comes from here.
	if n > 0 {
		l.client.send(appendWindowUpdate(nil, 0, n))
	}
	if st == nil {
		return nil // the stream has ended meanwhile
	}
	if n > 0 && !end {
		l.client.send(appendWindowUpdate(nil, f.id, n))
	}
	st.asked = end
	st.served.receive(body)
	if end {
		st.served.start()
	}
	return nil
}

func (l *link) clientWindow(f frame, st *stream) error {
	n := int64(f.uint31())
	switch {
	case f.id != 0 && st == nil:
		return nil
	case st != nil && st.served == nil:
		l.runtime.add(f.raw)
		return nil
	case st != nil && n == 0:
		l.reset(f.id, http2.ErrCodeProtocol)
		return nil
	case st != nil:
		if st.served.window += n; st.served.window > maxWindow {
			l.reset(f.id, http2.ErrCodeFlowControl)
		}
		l.changed.Broadcast()
		return nil
	case n == 0:
		return protocolError("WINDOW_UPDATE of 0")
	}
	if l.account.window += n; l.account.window > maxWindow {
		return &connError{http2.ErrCodeFlowControl, "window over 2^31-1"}
	}
	l.release()
	l.settle()
	l.changed.Broadcast()
	return nil
}

// reset ends a stream that is served here, for an error of the client's.
func (l *link) reset(id uint32, code http2.ErrCode) {
	l.client.send(appendReset(nil, id, code))
	l.forget(id)
}

func (l *link) clientSettings(f frame) error {
	settings, err := toRuntime(f, false)
	if err == nil {
		err = l.applySettings(f)
	}
	if err != nil {
		return err
	}
	if l.attached { // whose acknowledgement will pass
		l.unacked++
		l.runtime.add(appendSettings(nil, settings))
	} else {
		l.client.send(appendSettingsAck(nil))
	}
	return nil
}

// applySettings takes from the client's SETTINGS what concerns answers made
// here: the first window of each stream. The frame size and table that the
// relay uses toward the client are the smallest that it can ask for.
func (l *link) applySettings(f frame) error {
	var err error
	eachSetting(f, func(s http2.Setting) {
		if s.ID != http2.SettingInitialWindowSize {
			return
		}
		change := int64(s.Val) - l.initial
		l.initial = int64(s.Val)
		for _, st := range l.streams {
			if st.served == nil {
				continue
			}
			if st.served.window += change; st.served.window > maxWindow {
				err = &connError{http2.ErrCodeFlowControl, "window over 2^31-1"}
			}
		}
	})
	l.changed.Broadcast()
	return err
}

// forgetIfOver removes a relayed stream that both sides have ended.
func (l *link) forgetIfOver(id uint32, st *stream) {
	if st.asked && st.done {
		l.forget(id)
	}
}

// encode compresses a header list without a dynamic table, for the client.
func encode(fields []hpack.HeaderField) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSize(0)
	for _, f := range fields {
		e.WriteField(f) // to a bytes.Buffer: cannot fail
	}
	return b.Bytes()
}
