package relay

import "golang.org/x/net/http2"

const (
	initialWindow = 65535 // of every connection, RFC 9113 section 6.9.2
	maxWindow     = 1<<31 - 1
	// maxHeld is how much of the runtime's answers waits in memory for the
	// client's connection window before the relay stops reading the runtime.
	maxHeld = 256 << 10
)

// An account keeps the client's connection window in order.
//
// Flow control of relayed streams is between client and runtime; the relay
// only passes it on. But an answer made in this process uses bytes of the
// client's connection window that the runtime counts on. They are a debt: the
// client's next WINDOW_UPDATEs repay it before the runtime gets any, and until
// then as many bytes of the runtime's are held here.
//
// Invariant: window >= 0 and window == 0 while anything is held.
type account struct {
	window int64 // bytes that the client accepts on the connection
	credit int64 // bytes that the runtime believes it may send
	held   []frame
	size   int            // bytes in held, headers and all
	data   int64          // bytes in held that cost window
	by     map[uint32]int // frames in held, by stream
}

func newAccount() account {
	return account{window: initialWindow, credit: initialWindow, by: map[uint32]int{}}
}

// charge takes n bytes of DATA that came from the runtime off its credit.
func (a *account) charge(n int) error {
	if a.credit -= int64(n); a.credit < 0 {
		return &connError{http2.ErrCodeFlowControl, "runtime sent more than its window"}
	}
	return nil
}

// pass decides on frames of one stream toward the client, one DATA frame or a
// few others: true if they may be written now, false if they are held until
// the client's window opens. Frames of one stream keep their order. stripped is
// the padding of a held frame, which the client will never see nor grant again.
func (a *account) pass(id uint32, raw []byte) (now bool, stripped int64) {
	f := parseFrame(raw)
	cost := int64(0)
	if f.is(http2.FrameData) {
		cost = int64(len(f.payload()))
	}
	if a.by[id] == 0 && (cost == 0 || a.data == 0 && cost <= a.window) {
		a.window -= cost
		return true, 0
	}
	var own []byte
	if cost > 0 { // without its padding, so that it can be split anywhere
		p, _ := f.data() // checked when it came
		own = appendData(nil, id, p, f.has(http2.FlagDataEndStream))
		a.data += int64(len(p))
		stripped = cost - int64(len(p))
	} else {
		own = append(own, raw...)
	}
	a.held = append(a.held, parseFrame(own))
	a.by[id]++
	a.size += len(own)
	return false, stripped
}

// release appends to b what the window now lets through of what is held.
func (a *account) release(b []byte) []byte {
	for len(a.held) > 0 {
		h := a.held[0]
		if h.is(http2.FrameData) {
			p := h.payload()
			if int64(len(p)) > a.window {
				if a.window > 0 { // a part of the frame
					n := int(a.window)
					b = appendData(b, h.id, p[:n], false)
					rest := appendData(nil, h.id, p[n:], h.has(http2.FlagDataEndStream))
					a.held[0] = parseFrame(rest)
					a.size -= len(h.raw) - len(rest)
					a.data -= int64(n)
					a.window = 0
				}
				return b
			}
			a.window -= int64(len(p))
			a.data -= int64(len(p))
		}
		b = append(b, h.raw...)
		a.size -= len(h.raw)
		a.held = a.held[1:]
		if a.by[h.id]--; a.by[h.id] == 0 {
			delete(a.by, h.id)
		}
	}
	a.held = nil
	return b
}

// repay returns what the runtime may be granted now: all of the client's
// window that is neither its credit nor needed for what is held.
func (a *account) repay() int64 {
	n := a.window - a.data - a.credit
	if n <= 0 {
		return 0
	}
	a.credit += n
	return n
}
