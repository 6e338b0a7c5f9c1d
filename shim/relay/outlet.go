package relay

import (
	"sync"
	"time"
)

const (
	// outLimit is how much may wait for a socket before whoever adds more has
	// to wait: back pressure goes on to the sender.
	outLimit = 64 << 10
	// owedLimit bounds what a peer makes the relay answer (PING, window given
	// back) without reading the answers: past it the relay stops reading it.
	owedLimit = 64 << 10
	// pongDelay is how long the answer to a PING may wait for something that it can be written with, unless there are pongLimit
	// bytes of answers. grpc-go sends a PING with nearly every call, to measure: an answer by itself would double the writes
	// of a call, and its CPU time.
	pongDelay = 5 * time.Millisecond
	pongLimit = 1 << 10
)

// An outlet is the writing half of one connection. All fields but conn are
// guarded by the mutex of the link.
//
// Appending never blocks, so that a pump which reads from one side can answer
// that side (PING, SETTINGS) however slow it is. Whoever passes data makes
// room first, and writes it with flush; that may block, which is the back
// pressure. What others append is written by the link's flusher goroutine.
type outlet struct {
	conn    *socket
	buf     []byte // whole frames, waiting
	spare   []byte // the buffer being written, or free
	writing bool
	owed    int // bytes of answers appended since the last write
	closed  bool
	nudged  bool
	wake    *sync.Cond // flusher
}

// add appends frames that need not be written at once: the caller flushes.
func (o *outlet) add(frames []byte) {
	if !o.closed {
		o.buf = append(o.buf, frames...)
	}
}

// send appends what the relay itself has to say and wakes the flusher.
func (o *outlet) send(frames []byte) {
	if o.owe(frames) {
		o.nudge()
	}
}

// owe appends what the relay itself has to say and reports whether there is anybody to say it to: then the caller sees to
// it that it is written.
func (o *outlet) owe(frames []byte) bool {
	if o.closed {
		return false
	}
	o.buf = append(o.buf, frames...)
	o.owed += len(frames)
	return true
}

// pong answers a PING. The answer goes with what is written next, or by itself when pongDelay is over.
func (l *link) pong(o *outlet, ping frame) {
	switch {
	case !o.owe(appendPong(nil, ping)):
	case o.owed > pongLimit:
		o.nudge()
	case !l.ticking && !l.ended:
		l.ticking = true
		l.own.Add(1)
		if l.tick == nil {
			l.tick = time.AfterFunc(pongDelay, l.pongsDue)
		} else {
			l.tick.Reset(pongDelay)
		}
	}
}

// pongsDue has written what is waiting.
func (l *link) pongsDue() {
	defer l.own.Done()
	l.mu.Lock()
	defer l.mu.Unlock()
	l.ticking = false
	for _, o := range []*outlet{&l.client, &l.runtime} {
		if len(o.buf) > 0 {
			o.nudge()
		}
	}
}

func (o *outlet) nudge() {
	o.nudged = true
	o.wake.Signal()
}

// flush writes what waits, unless another goroutine is doing it already. The
// caller holds l.mu, which is released while the socket is written.
func (l *link) flush(o *outlet) {
	for len(o.buf) > 0 && !o.writing {
		o.buf, o.spare = o.spare[:0], o.buf
		o.owed = 0
		o.writing = true
		l.mu.Unlock()
		_, err := o.conn.Write(o.spare)
		l.mu.Lock()
		o.writing = false
		if cap(o.spare) > 2*outLimit {
			o.spare = nil // it held a long header block
		}
		if err != nil {
			l.writeFailed(o)
		}
		if o == &l.client {
			l.endIfIdle()
		}
		l.changed.Broadcast()
	}
}

// flushNow is flush for who does not hold l.mu.
func (l *link) flushNow(o *outlet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.flush(o)
}

// room waits until o takes more, or the link ends. The caller holds l.mu.
func (l *link) room(o *outlet) {
	for len(o.buf) > outLimit && !l.ended && !o.closed {
		if o.writing {
			l.changed.Wait()
		} else {
			l.flush(o)
		}
	}
}

// flusher writes what the pump of the other direction and others append.
func (l *link) flusher(o *outlet) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for !l.ended {
		for !o.nudged && !l.ended {
			o.wake.Wait()
		}
		o.nudged = false
		l.flush(o)
	}
	l.flushAll(o)
}

// flushAll writes the last frames of a connection, which may be behind a write
// of somebody else's.
func (l *link) flushAll(o *outlet) {
	for o.writing || len(o.buf) > 0 {
		if o.writing {
			l.changed.Wait()
		} else {
			l.flush(o)
		}
	}
}
