package relay

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// A pair is a relay between a client and a runtime that are both framers in
// the test, so that each frame can be chosen and seen.
type pair struct {
	t           testing.TB
	relay       *testRelay
	client      *http2.Framer
	clientConn  net.Conn
	runtime     *http2.Framer // nil without runtime
	runtimeConn net.Conn
	settings    string // that the client got first
	hello       string // that the runtime got first
	fields      []hpack.HeaderField
}

// newPair has exchanged and acknowledged the SETTINGS of both sides.
func newPair(t testing.TB, cfg Config, settings ...http2.Setting) *pair {
	p := newFreshPair(t, cfg, settings...)
	p.client.WriteSettingsAck()
	p.expectRuntime("SETTINGS ACK")
	p.runtime.WriteSettingsAck()
	p.expectClient("SETTINGS ACK")
	return p
}

// newFreshPair has exchanged SETTINGS that nobody has acknowledged yet.
func newFreshPair(t testing.TB, cfg Config, settings ...http2.Setting) *pair {
	p := &pair{t: t}
	socket := filepath.Join(t.TempDir(), "runtime.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	cfg.Dial = (&fakeRuntime{socket: socket}).dial
	p.relay = newTestRelay(t, cfg)
	p.connect(settings...)
	if p.runtimeConn, err = l.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.runtimeConn.Close() })
	p.runtimeConn.SetDeadline(time.Now().Add(patience))
	p.runtime = http2.NewFramer(p.runtimeConn, p.runtimeConn)
	p.runtime.AllowIllegalReads, p.runtime.AllowIllegalWrites = true, true
	preface := make([]byte, len(http2.ClientPreface))
	if _, err := io.ReadFull(p.runtimeConn, preface); err != nil || string(preface) != http2.ClientPreface {
		t.Fatalf("preface %q, %v", preface, err)
	}
	p.hello = p.next(p.runtime)
	p.runtime.WriteSettings(http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20}, http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: 250})
	p.settings = p.next(p.client)
	return p
}

// connect opens the client's connection and sends its preface.
func (p *pair) connect(settings ...http2.Setting) {
	p.connectRaw(http2.ClientPreface)
	p.client.WriteSettings(settings...)
}

func (p *pair) connectRaw(first string) {
	conn, err := net.Dial("unix", p.relay.socket)
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { conn.Close() })
	conn.SetDeadline(time.Now().Add(patience))
	p.clientConn, p.client = conn, http2.NewFramer(conn, conn)
	p.client.AllowIllegalReads, p.client.AllowIllegalWrites = true, true
	io.WriteString(conn, first)
}

// block is a HEADERS frame of name, value, name, value …
func (p *pair) block(id uint32, end bool, kv ...string) http2.HeadersFrameParam {
	return http2.HeadersFrameParam{StreamID: id, BlockFragment: compress(kv...), EndStream: end, EndHeaders: true}
}

func compress(kv ...string) []byte {
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	e.SetMaxDynamicTableSizeLimit(0)
	for i := 0; i < len(kv); i += 2 {
		e.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
	}
	return b.Bytes()
}

func requestTo(path string) []string {
	return []string{":method", "POST", ":scheme", "http", ":path", path, ":authority", "x", "content-type", "application/grpc", "te", "trailers"}
}

// open sends the HEADERS of a request whose body follows.
func (p *pair) open(id uint32, path string) {
	p.client.WriteHeaders(p.block(id, false, requestTo(path)...))
}

// ask sends a whole request of n bytes.
func (p *pair) ask(id uint32, path string, n int) {
	p.open(id, path)
	p.client.WriteData(id, true, make([]byte, n))
}

func (p *pair) expectClient(frames ...string)  { p.t.Helper(); p.expect("client", p.client, frames) }
func (p *pair) expectRuntime(frames ...string) { p.t.Helper(); p.expect("runtime", p.runtime, frames) }

// expect reads frames and compares them with their descriptions, of which a
// last "*" stands for any rest.
func (p *pair) expect(side string, f *http2.Framer, frames []string) {
	p.t.Helper()
	for _, want := range frames {
		got := p.next(f)
		if prefix, any := strings.CutSuffix(want, "*"); got != want && !(any && strings.HasPrefix(got, prefix)) {
			p.t.Fatalf("%s got %s, want %s", side, got, want)
		}
	}
}

// skip reads frames up to the one described and returns the last before it.
func (p *pair) skip(f *http2.Framer, want string) (before string) {
	p.t.Helper()
	for {
		got := p.next(f)
		if got == want {
			return before
		}
		if got == "EOF" || got == "nothing" {
			p.t.Fatalf("got %s after %s, want %s", got, before, want)
		}
		before = got
	}
}

// expectEnd wants the connection of one side closed, after frames.
func (p *pair) expectEnd(f *http2.Framer) {
	p.t.Helper()
	if got := p.next(f); got != "EOF" {
		p.t.Fatalf("got %s, want the end", got)
	}
}

func (p *pair) next(f *http2.Framer) string {
	fr, err := f.ReadFrame()
	if err != nil {
		if ne, ok := err.(net.Error); ok && ne.Timeout() {
			return "nothing"
		}
		return "EOF"
	}
	h := fr.Header()
	end := ""
	if (h.Type == http2.FrameData || h.Type == http2.FrameHeaders) && h.Flags.Has(http2.FlagDataEndStream) {
		end = " END"
	}
	switch fr := fr.(type) {
	case *http2.DataFrame:
		return fmt.Sprintf("DATA %d %d%s", h.StreamID, h.Length, end)
	case *http2.HeadersFrame:
		block := bytes.Clone(fr.HeaderBlockFragment())
		for ended := fr.HeadersEnded(); !ended; {
			next, err := f.ReadFrame()
			if err != nil {
				return "EOF in a header block"
			}
			c, ok := next.(*http2.ContinuationFrame)
			if !ok || c.StreamID != h.StreamID {
				return fmt.Sprintf("%v in a header block", next)
			}
			block = append(block, c.HeaderBlockFragment()...)
			ended = c.HeadersEnded()
		}
		// A decoder without memory: nothing may refer to an earlier block.
		d := hpack.NewDecoder(0, nil)
		if p.fields, err = d.DecodeFull(block); err != nil {
			return fmt.Sprintf("HEADERS that cannot be decoded: %v", err)
		}
		return fmt.Sprintf("HEADERS %d%s", h.StreamID, end)
	case *http2.WindowUpdateFrame:
		return fmt.Sprintf("WINDOW_UPDATE %d %d", h.StreamID, fr.Increment)
	case *http2.RSTStreamFrame:
		return fmt.Sprintf("RST_STREAM %d %s", h.StreamID, fr.ErrCode)
	case *http2.PingFrame:
		if fr.IsAck() {
			return fmt.Sprintf("PING ACK %s", fr.Data)
		}
		return fmt.Sprintf("PING %s", fr.Data)
	case *http2.GoAwayFrame:
		return fmt.Sprintf("GOAWAY %d %s %s", fr.LastStreamID, fr.ErrCode, fr.DebugData())
	case *http2.SettingsFrame:
		if fr.IsAck() {
			return "SETTINGS ACK"
		}
		s := "SETTINGS"
		fr.ForeachSetting(func(v http2.Setting) error {
			s += fmt.Sprintf(" %s=%d", v.ID, v.Val)
			return nil
		})
		return s
	}
	return fr.Header().String()
}

// field is a header of the block that was read last.
func (p *pair) field(name string) string {
	for _, f := range p.fields {
		if f.Name == name {
			return f.Value
		}
	}
	return ""
}

// link is the only connection of the relay.
func (p *pair) link() *link {
	var link *link
	waitFor(p.t, "connection", func() bool {
		for l := range p.relay.connections() {
			link = l
		}
		return link != nil
	})
	return link
}
