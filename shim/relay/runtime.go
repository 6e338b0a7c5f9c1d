package relay

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/http2"
)

// pumpRuntime reads the runtime's frames and passes the answers on. It waits
// for the client to read, as a byte copy would; what the relay answers to the
// runtime itself never waits.
func (l *link) pumpRuntime(in *frameReader) {
	err := l.fromRuntime(in)
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.ended {
		return
	}
	var broken *connError
	if errors.As(err, &broken) {
		l.s.repeats.say(logrus.WarnLevel, "the runtime broke HTTP/2: closing its connection", err)
		l.runtime.conn.SetWriteDeadline(time.Now().Add(l.s.lastWrite))
		l.runtime.send(appendGoAway(nil, 0, broken.code, []byte(broken.reason)))
		l.flushAll(&l.runtime)
	}
	if err == io.EOF {
		err = errors.New("it closed the connection")
	}
	l.runtimeGone(fmt.Sprintf("the container runtime has gone away (%v) and may or may not have executed the call: see whether it runs", err))
	l.runtime.conn.Close()
}

func (l *link) fromRuntime(in *frameReader) error {
	var block block
	l.runtime.conn.idle = func() { l.flushNow(&l.client) }
	for {
		f, err := in.next()
		if err != nil {
			return err
		}
		if err := f.check(); err != nil {
			return err
		}
		var h headers
		if block.id != 0 || f.is(http2.FrameHeaders) || f.is(http2.FrameContinuation) {
			var whole bool
			if h, whole, err = block.add(f); err != nil {
				return err
			}
			if !whole {
				continue
			}
		}
		l.mu.Lock()
		l.room(&l.client)
		for (l.account.size > maxHeld || l.runtime.owed > owedLimit && !l.runtime.closed) && !l.ended {
			l.changed.Wait()
		}
		if l.ended {
			l.mu.Unlock()
			return nil
		}
		if h.raw != nil {
			l.answer(h.id, h.raw, h.end, 0)
		} else {
			err = l.runtimeFrame(f)
		}
		l.runtime.conn.gather = len(l.streams) >= crowd
		l.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

// The functions below are called with l.mu held.

// answer passes DATA, of so many bytes, or headers of an answer, as they came: with a dynamic
// table of size 0 a header block means the same whatever was sent before it.
func (l *link) answer(id uint32, raw []byte, end bool, bytes int64) {
	st := l.streams[id]
	if st == nil || st.served != nil || st.done {
		return // the client has given it up
	}
	st.answered = true
	st.done = end
	st.counters.responses.Add(bytes)
	l.deliver(id, raw)
	l.forgetIfOver(id, st)
}

func (l *link) runtimeFrame(f frame) error {
	switch f.typ {
	case http2.FrameData:
		if _, err := f.data(); err != nil {
			return err
		}
		n := len(f.payload())
		if err := l.account.charge(n); err != nil {
			return err
		}
		l.answer(f.id, f.raw, f.has(http2.FlagDataEndStream), int64(n))
		if l.settle() { // it was dropped, or held without its padding
			l.runtime.nudge()
		}
	case http2.FrameRSTStream:
		if st := l.streams[f.id]; st != nil && st.served == nil {
			l.deliver(f.id, f.raw)
			l.forget(f.id)
		}
	case http2.FrameWindowUpdate:
		st := l.streams[f.id]
		if f.id == 0 {
			l.uploaded -= int64(f.uint31())
		}
		if f.id == 0 || st != nil && st.served == nil {
			l.client.add(f.raw)
		}
	case http2.FrameSettings:
		if f.has(http2.FlagSettingsAck) {
			if l.unacked > 0 {
				l.unacked--
				l.client.add(f.raw)
			}
			return nil
		}
		settings, err := toClient(f, false)
		if err != nil {
			return err
		}
		l.client.add(appendSettings(nil, settings))
	case http2.FramePing:
		if !f.has(http2.FlagPingAck) {
			l.pong(&l.runtime, f)
		}
	case http2.FrameGoAway:
		l.runtimeGoAway(f)
	}
	return nil
}

// runtimeGoAway passes the runtime's GOAWAY on, with our own last stream (see
// goAway). One that names 2^31-1 only announces the next: streams that are on
// their way may still be opened.
func (l *link) runtimeGoAway(f frame) {
	last := f.uint31()
	code := http2.ErrCode(binary.BigEndian.Uint32(f.payload()[4:]))
	if last == maxStreamID {
		if !l.leaving {
			l.client.add(f.raw)
		}
		return
	}
	for id, st := range l.streams {
		if st.served == nil && id > last {
			l.deliver(id, appendReset(nil, id, http2.ErrCodeRefusedStream))
			l.forget(id)
		}
	}
	l.goAway(code, f.payload()[8:])
}
