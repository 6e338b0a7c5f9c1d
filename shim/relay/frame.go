package relay

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"

	"golang.org/x/net/http2"
)

const (
	frameHeaderLen = 9
	// maxFrame is the largest payload that the relay reads or writes. It is
	// the smallest value that SETTINGS_MAX_FRAME_SIZE can have, so a frame
	// that was read can always be written.
	maxFrame = 16384
	// maxHeaderBlock bounds a header block on the wire, maxHeaderFrames the
	// frames that it comes in (CVE-2023-45288: CONTINUATION without end), and
	// maxHeaderList the decoded list. net/http has the same megabyte.
	maxHeaderBlock  = 1 << 20
	maxHeaderFrames = 256
	maxHeaderList   = 1 << 20
	// readBuffer holds several frames, so that one read and one write move
	// them all.
	readBuffer = 64 << 10

	maxStreamID = 1<<31 - 1
)

// A connError ends a connection: the peer broke the protocol or a limit.
type connError struct {
	code   http2.ErrCode
	reason string
}

func (e *connError) Error() string { return fmt.Sprintf("%s: %s", e.code, e.reason) }

func protocolError(reason string) error { return &connError{http2.ErrCodeProtocol, reason} }

// A frame is one HTTP/2 frame as it came.
type frame struct {
	typ   http2.FrameType
	flags http2.Flags
	id    uint32
	raw   []byte // header and payload
}

func (f frame) payload() []byte             { return f.raw[frameHeaderLen:] }
func (f frame) has(flag http2.Flags) bool   { return f.flags.Has(flag) }
func (f frame) uint31() uint32              { return binary.BigEndian.Uint32(f.payload()) & maxStreamID }
func (f frame) is(typ http2.FrameType) bool { return f.typ == typ }

// check refuses what no peer may send, for the frames that the relay itself
// understands. Stream frames that pass are otherwise the far side's to judge.
func (f frame) check() error {
	n := len(f.payload())
	size := func(ok bool) error {
		if !ok {
			return &connError{http2.ErrCodeFrameSize, fmt.Sprintf("%s of %d bytes", f.typ, n)}
		}
		return nil
	}
	onStream := func(want bool) error {
		if (f.id != 0) != want {
			return protocolError(fmt.Sprintf("%s on stream %d", f.typ, f.id))
		}
		return nil
	}
	var err error
	switch f.typ {
	case http2.FrameData, http2.FrameHeaders, http2.FrameContinuation:
		err = onStream(true)
	case http2.FrameRSTStream:
		if err = onStream(true); err == nil {
			err = size(n == 4)
		}
	case http2.FramePriority:
		if err = onStream(true); err == nil {
			err = size(n == 5)
		}
	case http2.FrameWindowUpdate:
		err = size(n == 4)
	case http2.FramePing:
		if err = onStream(false); err == nil {
			err = size(n == 8)
		}
	case http2.FrameGoAway:
		if err = onStream(false); err == nil {
			err = size(n >= 8)
		}
	case http2.FrameSettings:
		if err = onStream(false); err == nil {
			err = size(n%6 == 0 && (n == 0 || !f.has(http2.FlagSettingsAck)))
		}
	case http2.FramePushPromise:
		err = protocolError("PUSH_PROMISE, which the relay has switched off")
	}
	return err
}

// data is the payload of a DATA frame without its padding.
func (f frame) data() ([]byte, error) {
	return unpad(f.payload(), f.has(http2.FlagDataPadded))
}

func unpad(p []byte, padded bool) ([]byte, error) {
	if !padded {
		return p, nil
	}
	if len(p) == 0 || int(p[0]) > len(p)-1 {
		return nil, protocolError("padding longer than its frame")
	}
	return p[1 : len(p)-int(p[0])], nil
}

// A frameReader reads frames without copying them: a frame is valid until the
// next one is read.
type frameReader struct {
	br   *bufio.Reader
	used int // length of the frame handed out last
}

func newFrameReader(r io.Reader) *frameReader {
	return &frameReader{br: bufio.NewReaderSize(r, readBuffer)}
}

func (r *frameReader) next() (frame, error) {
	r.br.Discard(r.used)
	r.used = 0
	h, err := r.br.Peek(frameHeaderLen)
	if err != nil {
		if err == io.EOF && len(h) > 0 {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	n := frameLen(h)
	if n > maxFrame {
		return frame{}, &connError{http2.ErrCodeFrameSize, fmt.Sprintf("frame of %d bytes", n)}
	}
	raw, err := r.br.Peek(frameHeaderLen + n)
	if err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return frame{}, err
	}
	r.used = len(raw)
	return parseFrame(raw), nil
}

func frameLen(header []byte) int {
	return int(header[0])<<16 | int(header[1])<<8 | int(header[2])
}

func parseFrame(raw []byte) frame {
	return frame{
		typ:   http2.FrameType(raw[3]),
		flags: http2.Flags(raw[4]),
		id:    binary.BigEndian.Uint32(raw[5:]) & maxStreamID,
		raw:   raw,
	}
}

// A block gathers one header block, HEADERS and its CONTINUATIONs, as they
// came. Between them no other frame may stand, in either direction.
type block struct {
	id     uint32 // 0: none is open
	raw    []byte
	frames int
}

// headers is one whole header block: HEADERS and its CONTINUATIONs.
type headers struct {
	id  uint32
	end bool // END_STREAM
	raw []byte
}

// add takes a frame and reports whether it completed a block. The block is
// valid until the next frame is read.
func (b *block) add(f frame) (h headers, whole bool, err error) {
	last := f.has(http2.FlagHeadersEndHeaders) // CONTINUATION has the same flag
	switch {
	case b.id == 0 && f.is(http2.FrameHeaders):
		h = headers{id: f.id, end: f.has(http2.FlagHeadersEndStream), raw: f.raw}
		if last {
			return h, true, nil
		}
		b.id, b.frames, b.raw = f.id, 1, append(b.raw[:0], f.raw...)
		return h, false, nil
	case b.id != f.id || !f.is(http2.FrameContinuation):
		return h, false, protocolError(fmt.Sprintf("%s where a header block does not allow it", f.typ))
	case b.frames == maxHeaderFrames || len(b.raw)+len(f.raw) > maxHeaderBlock:
		return h, false, &connError{http2.ErrCodeEnhanceYourCalm, "header block too long"}
	}
	b.raw = append(b.raw, f.raw...)
	b.frames++
	if !last {
		return h, false, nil
	}
	h = headers{id: b.id, end: parseFrame(b.raw).has(http2.FlagHeadersEndStream), raw: b.raw}
	*b = block{} // long blocks are rare: do not keep their memory
	return h, true, nil
}

// fragments calls yield with each piece of the compressed header list.
func (h headers) fragments(yield func([]byte) error) error {
	for rest := h.raw; len(rest) > 0; {
		n := frameHeaderLen + frameLen(rest)
		f := parseFrame(rest[:n])
		rest = rest[n:]
		p := f.payload()
		if f.is(http2.FrameHeaders) {
			var err error
			if p, err = unpad(p, f.has(http2.FlagHeadersPadded)); err != nil {
				return err
			}
			if f.has(http2.FlagHeadersPriority) {
				if len(p) < 5 {
					return &connError{http2.ErrCodeFrameSize, "HEADERS without its priority"}
				}
				p = p[5:]
			}
		}
		if err := yield(p); err != nil {
			return err
		}
	}
	return nil
}

// The append functions write one frame, or one header block, to the end of b.

func appendHeader(b []byte, n int, typ http2.FrameType, flags http2.Flags, id uint32) []byte {
	b = append(b, byte(n>>16), byte(n>>8), byte(n), byte(typ), byte(flags))
	return binary.BigEndian.AppendUint32(b, id)
}

func appendData(b []byte, id uint32, p []byte, end bool) []byte {
	var flags http2.Flags
	if end {
		flags = http2.FlagDataEndStream
	}
	return append(appendHeader(b, len(p), http2.FrameData, flags, id), p...)
}

func appendBlock(b []byte, id uint32, fragment []byte, end bool) []byte {
	typ, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for {
		p := fragment[:min(len(fragment), maxFrame)]
		fragment = fragment[len(p):]
		if len(fragment) == 0 {
			flags |= http2.FlagHeadersEndHeaders
		}
		b = append(appendHeader(b, len(p), typ, flags, id), p...)
		if len(fragment) == 0 {
			return b
		}
		typ, flags = http2.FrameContinuation, 0
	}
}

func appendWindowUpdate(b []byte, id uint32, n int64) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, 4, http2.FrameWindowUpdate, 0, id), uint32(n))
}

func appendReset(b []byte, id uint32, code http2.ErrCode) []byte {
	return binary.BigEndian.AppendUint32(appendHeader(b, 4, http2.FrameRSTStream, 0, id), uint32(code))
}

func appendPong(b []byte, ping frame) []byte {
	return append(appendHeader(b, 8, http2.FramePing, http2.FlagPingAck, 0), ping.payload()...)
}

func appendGoAway(b []byte, last uint32, code http2.ErrCode, debug []byte) []byte {
	debug = debug[:min(len(debug), maxFrame-8)]
	b = appendHeader(b, 8+len(debug), http2.FrameGoAway, 0, 0)
	b = binary.BigEndian.AppendUint32(b, last)
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	return append(b, debug...)
}

func appendSettingsAck(b []byte) []byte {
	return appendHeader(b, 0, http2.FrameSettings, http2.FlagSettingsAck, 0)
}
