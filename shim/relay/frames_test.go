package relay

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const here = "/served"

// handlers serves one path.
func handlers(h http.HandlerFunc) Config {
	return Config{Handlers: map[string]http.Handler{here: h}}
}

// answer is a handler that sends n bytes and a trailer.
func answer(n int) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Trailer", "Status")
		w.Write(make([]byte, n))
		w.Header().Set("Status", "fine")
	}
}

func TestSettingsPass(t *testing.T) {
	p := newFreshPair(t, Config{},
		http2.Setting{ID: http2.SettingHeaderTableSize, Val: 8192},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: 100000},
		http2.Setting{ID: http2.SettingMaxFrameSize, Val: 1 << 20},
		http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 8192})
	if want := "SETTINGS INITIAL_WINDOW_SIZE=100000 MAX_HEADER_LIST_SIZE=8192 HEADER_TABLE_SIZE=0 ENABLE_PUSH=0"; p.hello != want {
		t.Errorf("the runtime got %s, want %s", p.hello, want)
	}
	if want := "SETTINGS HEADER_TABLE_SIZE=0 MAX_HEADER_LIST_SIZE=1048576 MAX_CONCURRENT_STREAMS=250"; p.settings != want {
		t.Errorf("the client got %s, want %s", p.settings, want)
	}
	// Each change is acknowledged once, by the far side.
	p.runtime.WriteSettingsAck()
	p.client.WriteSettingsAck()
	p.expectRuntime("SETTINGS ACK")
	p.expectClient("SETTINGS ACK")
	p.client.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 70000}, http2.Setting{ID: http2.SettingMaxFrameSize, Val: 20000})
	p.client.WriteSettings(http2.Setting{ID: http2.SettingHeaderTableSize, Val: 4096})
	p.expectRuntime("SETTINGS INITIAL_WINDOW_SIZE=70000", "SETTINGS")
	p.runtime.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 80000}, http2.Setting{ID: http2.SettingMaxHeaderListSize, Val: 1 << 30})
	p.expectClient("SETTINGS INITIAL_WINDOW_SIZE=80000 MAX_HEADER_LIST_SIZE=1048576")
	p.runtime.WriteSettingsAck()
	p.runtime.WriteSettingsAck()
	p.runtime.WriteSettingsAck() // of nothing
	p.runtime.WritePing(false, [8]byte{})
	p.expectClient("SETTINGS ACK", "SETTINGS ACK")
	p.expectRuntime("PING ACK *")
	p.client.WriteSettingsAck()
	p.expectRuntime("SETTINGS ACK")
	p.client.WritePing(false, [8]byte{'m', 'a', 'r', 'k'})
	p.expectClient("PING ACK mark*")
}

// TestPingIsPerHop: neither side sees the other's.
func TestPingIsPerHop(t *testing.T) {
	p := newPair(t, Config{})
	for i := range 50 {
		data := [8]byte{'p', byte('0' + i/10), byte('0' + i%10)}
		p.client.WritePing(false, data)
		p.runtime.WritePing(false, data)
		want := fmt.Sprintf("PING ACK %s", data)
		p.expectClient(want)
		p.expectRuntime(want)
	}
	p.client.WritePing(true, [8]byte{}) // an answer to nothing
	p.ask(1, "/a", 3)
	p.expectRuntime("HEADERS 1", "DATA 1 3 END")
}

// TestStreamFramesPass: what concerns one relayed stream arrives as it was sent.
func TestStreamFramesPass(t *testing.T) {
	p := newPair(t, Config{})
	// PADDED and PRIORITY.
	h := p.block(1, false, requestTo("/a")...)
	h.PadLength = 7
	h.Priority = http2.PriorityParam{StreamDep: 0, Weight: 9}
	p.client.WriteHeaders(h)
	p.client.WriteDataPadded(1, false, []byte("abc"), make([]byte, 5))
	p.client.WritePriority(1, http2.PriorityParam{Weight: 3})
	p.client.WriteRawFrame(0x77, 0, 1, []byte("of an extension"))
	p.client.WriteWindowUpdate(1, 10)
	p.client.WriteWindowUpdate(0, 11)
	p.client.WriteData(1, true, nil)
	p.expectRuntime("HEADERS 1", "DATA 1 9", "WINDOW_UPDATE 1 10")
	if p.field(":path") != "/a" {
		t.Errorf("request %v", p.fields)
	}
	// The connection's window is settled at once, perhaps before its turn.
	p.expectRuntime("WINDOW_UPDATE 0 11", "DATA 1 0 END")

	p.runtime.WriteRawFrame(0x77, 0, 1, []byte("of an extension"))
	p.runtime.WriteWindowUpdate(1, 9)
	p.runtime.WriteWindowUpdate(0, 9)
	h = p.block(1, false, ":status", "200", "a", "b")
	h.PadLength = 3
	p.runtime.WriteHeaders(h)
	p.runtime.WriteDataPadded(1, false, []byte("xyz"), make([]byte, 255))
	p.runtime.WriteHeaders(p.block(1, true, "grpc-status", "0"))
	p.runtime.WriteRSTStream(1, http2.ErrCodeNo) // late: the stream is over
	p.expectClient("WINDOW_UPDATE 1 9", "WINDOW_UPDATE 0 9", "HEADERS 1", "DATA 1 259", "HEADERS 1 END")
	if p.field("grpc-status") != "0" {
		t.Errorf("trailers %v", p.fields)
	}
	// Late frames of the client's go nowhere, but DATA is given back.
	p.client.WriteRSTStream(1, http2.ErrCodeCancel)
	p.client.WriteWindowUpdate(1, 5)
	p.client.WriteData(1, false, make([]byte, 44))
	p.expectClient("WINDOW_UPDATE 0 44")
	p.ask(3, "/b", 0)
	p.client.WriteRSTStream(3, http2.ErrCodeCancel)
	p.expectRuntime("HEADERS 3", "DATA 3 0 END", "RST_STREAM 3 CANCEL")
	// So does the runtime's answer to it: its bytes are its own again.
	p.runtime.WriteHeaders(p.block(3, false, ":status", "200"))
	p.runtime.WriteData(3, false, make([]byte, 1000))
	p.expectRuntime("WINDOW_UPDATE 0 1000")
	p.ask(5, "/c", 0)
	p.expectRuntime("HEADERS 5", "DATA 5 0 END")
	p.runtime.WriteRSTStream(5, http2.ErrCodeInternal)
	p.expectClient("RST_STREAM 5 INTERNAL_ERROR")
	// Trailers of the client's pass.
	p.open(7, "/d")
	p.client.WriteHeaders(p.block(7, true, "bye", "1"))
	p.expectRuntime("HEADERS 7", "HEADERS 7 END")
	if p.field("bye") != "1" {
		t.Errorf("trailers %v", p.fields)
	}
}

// TestHeaderBlocks: CONTINUATION, and nothing in between.
func TestHeaderBlocks(t *testing.T) {
	p := newPair(t, handlers(answer(3)))
	long := strings.Repeat("long value ", 5000)
	write := func(f *http2.Framer, id uint32, end bool, block []byte, step int) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block[:step], EndStream: end})
		for block = block[step:]; len(block) > step; block = block[step:] {
			f.WriteContinuation(id, false, block[:step])
		}
		f.WriteContinuation(id, true, block)
	}
	for i, step := range []int{1, 1000, maxFrame} {
		id := uint32(1 + 4*i)
		kv := append(requestTo("/a"), "k", long)
		if step == 1 {
			kv = requestTo("/a")
		}
		write(p.client, id, true, compress(kv...), step)
		p.ask(id+2, here, 1) // its answer must not fall into the block
		p.expectRuntime(fmt.Sprintf("HEADERS %d END", id))
		if step > 1 && p.field("k") != long {
			t.Errorf("step %d: k is %.100q", step, p.field("k"))
		}
		p.expectClient("WINDOW_UPDATE 0 1", fmt.Sprintf("HEADERS %d", id+2), fmt.Sprintf("DATA %d 3", id+2), fmt.Sprintf("HEADERS %d END", id+2))
		write(p.runtime, id, true, compress(":status", "200", "k", long), max(step, 300))
		p.expectClient(fmt.Sprintf("HEADERS %d END", id))
		if p.field("k") != long {
			t.Errorf("step %d: k is %.100q", step, p.field("k"))
		}
	}
}

// TestTableSize: until the client has acknowledged table size 0 its requests
// are encoded again, so that the runtime never depends on a request that it
// has not seen.
func TestTableSize(t *testing.T) {
	p := newFreshPair(t, handlers(answer(0)))
	var b bytes.Buffer
	e := hpack.NewEncoder(&b)
	block := func(path string) []byte {
		b.Reset()
		kv := append(requestTo(path), "custom-key", "custom value of "+here)
		for i := 0; i < len(kv); i += 2 {
			e.WriteField(hpack.HeaderField{Name: kv[i], Value: kv[i+1]})
		}
		return bytes.Clone(b.Bytes())
	}
	send := func(id uint32, block []byte) {
		p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block, EndStream: true, EndHeaders: true})
	}
	first, second := block(here), block("/a") // the second refers to the first
	if len(second) > len(first)/2 {
		t.Fatalf("blocks of %d and %d bytes: no dynamic table", len(first), len(second))
	}
	send(1, first)
	send(3, second)
	p.expectClient("HEADERS 1", "HEADERS 1 END")
	p.expectRuntime("HEADERS 3 END") // decoded without any table
	if p.field("custom-key") != "custom value of "+here {
		t.Errorf("request %v", p.fields)
	}
	e.SetMaxDynamicTableSizeLimit(0)
	p.client.WriteSettingsAck()
	p.expectRuntime("SETTINGS ACK")
	send(5, block("/b"))
	p.expectRuntime("HEADERS 5 END")
	if p.field(":path") != "/b" || p.field("custom-key") == "" {
		t.Errorf("request %v", p.fields)
	}
	// From here on a reference to the table is an error, before it gets through.
	send(7, []byte{0x80 | 62})
	p.expectClient("GOAWAY 5 COMPRESSION_ERROR*")
	p.expectEnd(p.client)
	p.expectEnd(p.runtime)
}

func TestResponsesWithoutTable(t *testing.T) {
	p := newPair(t, Config{})
	p.ask(1, "/a", 0)
	p.expectRuntime("HEADERS 1", "DATA 1 0 END")
	raw := append([]byte{0x20}, compress(":status", "200", "x", "y")...) // a size update is part of it
	p.runtime.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: raw, EndHeaders: true, EndStream: true})
	f, err := p.client.ReadFrame()
	if err != nil {
		t.Fatal(err)
	}
	if got := f.(*http2.HeadersFrame).HeaderBlockFragment(); !bytes.Equal(got, raw) {
		t.Errorf("block %x became %x", raw, got)
	}
}

// TestRequestsPassVerbatim once the client has acknowledged the table size.
func TestRequestsPassVerbatim(t *testing.T) {
	p := newPair(t, Config{})
	var b bytes.Buffer
	h := p.block(1, true, requestTo("/a")...)
	h.PadLength = 11
	// A literal without Huffman coding, which no encoder of Go's would write.
	h.BlockFragment = append(h.BlockFragment, "\x00\x01k\x0caaaaaaaaaaaa"...)
	http2.NewFramer(io.MultiWriter(&b, p.clientConn), nil).WriteHeaders(h)
	got := make([]byte, b.Len())
	if _, err := io.ReadFull(p.runtimeConn, got); err != nil || !bytes.Equal(got, b.Bytes()) {
		t.Errorf("%x became %x, %v", b.Bytes(), got, err)
	}
}

func TestRefusedStreams(t *testing.T) {
	for _, test := range []struct {
		name string
		kv   []string
		want string
	}{
		{"no slash", requestTo("served"), "PROTOCOL_ERROR"},
		{"empty path", requestTo(""), "PROTOCOL_ERROR"},
		{"star", requestTo("*"), "PROTOCOL_ERROR"},
		{"no path", []string{":method", "POST"}, "PROTOCOL_ERROR"},
		{"two paths", append(requestTo("/a"), ":path", here), "PROTOCOL_ERROR"},
		{"invalid header", append(requestTo(here), "A b", "c"), "PROTOCOL_ERROR"},
		{"invalid value", append(requestTo(here), "a", "b\n"), "PROTOCOL_ERROR"},
		{"late pseudo header", append(requestTo(here), ":status", "200"), "PROTOCOL_ERROR"},
		{"header list", append(requestTo("/a"), "a", strings.Repeat("0", maxHeaderList)), "ENHANCE_YOUR_CALM"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPair(t, handlers(answer(0)))
			block := compress(test.kv...)
			h := http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:min(len(block), maxFrame)], EndHeaders: len(block) <= maxFrame}
			p.client.WriteHeaders(h)
			for block = block[len(h.BlockFragment):]; len(block) > 0; {
				n := min(len(block), maxFrame)
				p.client.WriteContinuation(1, n == len(block), block[:n])
				block = block[n:]
			}
			p.client.WriteData(1, true, make([]byte, 10))
			p.expectClient("RST_STREAM 1 "+test.want, "WINDOW_UPDATE 0 10")
			p.ask(3, "/next", 0) // the connection lives, the runtime saw nothing
			p.expectRuntime("HEADERS 3", "DATA 3 0 END")
		})
	}
}

// TestClientErrors: what breaks the protocol ends the connection with its code.
func TestClientErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(p *pair)
		want string
	}{
		{"even stream", func(p *pair) { p.open(2, "/a") }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"DATA on idle stream", func(p *pair) { p.client.WriteData(5, true, nil) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"RST_STREAM on idle stream", func(p *pair) { p.client.WriteRSTStream(5, 0) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"DATA on stream 0", func(p *pair) { p.client.WriteRawFrame(http2.FrameData, 0, 0, nil) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"HEADERS on stream 0", func(p *pair) { p.client.WriteRawFrame(http2.FrameHeaders, 4, 0, nil) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"PING on a stream", func(p *pair) { p.client.WriteRawFrame(http2.FramePing, 0, 1, make([]byte, 8)) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"short PING", func(p *pair) { p.client.WriteRawFrame(http2.FramePing, 0, 0, make([]byte, 7)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"odd SETTINGS", func(p *pair) { p.client.WriteRawFrame(http2.FrameSettings, 0, 0, make([]byte, 7)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"SETTINGS ACK with settings", func(p *pair) { p.client.WriteRawFrame(http2.FrameSettings, 1, 0, make([]byte, 6)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"window too large", func(p *pair) {
			p.client.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 31})
		}, "GOAWAY 0 FLOW_CONTROL_ERROR*"},
		{"window overflow", func(p *pair) { p.client.WriteWindowUpdate(0, 1<<31-1) }, "GOAWAY 0 FLOW_CONTROL_ERROR*"},
		{"window of nothing", func(p *pair) { p.client.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4)) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"long frame", func(p *pair) { p.client.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, maxFrame+1)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"PUSH_PROMISE", func(p *pair) { p.client.WriteRawFrame(http2.FramePushPromise, 4, 1, make([]byte, 4)) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"CONTINUATION alone", func(p *pair) { p.client.WriteContinuation(1, true, nil) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"PING in a block", func(p *pair) {
			p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			p.client.WritePing(false, [8]byte{})
		}, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"CONTINUATION of another stream", func(p *pair) {
			p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			p.client.WriteContinuation(3, true, nil)
		}, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"empty CONTINUATIONs", func(p *pair) {
			p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			for range maxHeaderFrames {
				p.client.WriteContinuation(1, false, nil)
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM*"},
		{"long block", func(p *pair) {
			p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			for range maxHeaderBlock / maxFrame {
				p.client.WriteContinuation(1, false, make([]byte, maxFrame))
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM*"},
		{"block that does not decode", func(p *pair) {
			p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: []byte{0xff}, EndHeaders: true})
		}, "GOAWAY 0 COMPRESSION_ERROR*"},
		{"padding over its frame", func(p *pair) {
			p.client.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersPadded|http2.FlagHeadersEndHeaders, 1, []byte{9, 1})
		}, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"no room for priority", func(p *pair) {
			p.client.WriteRawFrame(http2.FrameHeaders, http2.FlagHeadersPriority|http2.FlagHeadersEndHeaders, 1, []byte{9, 1})
		}, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"DATA padding", func(p *pair) {
			p.open(1, here)
			p.client.WriteRawFrame(http2.FrameData, http2.FlagDataPadded, 1, []byte{9, 1})
		}, "GOAWAY 1 PROTOCOL_ERROR*"},
		{"DATA after the end", func(p *pair) {
			p.ask(1, "/a", 0)
			p.client.WriteData(1, false, []byte("more"))
		}, "GOAWAY 1 STREAM_CLOSED*"},
		{"HEADERS in the middle", func(p *pair) {
			p.open(1, "/a")
			p.open(1, "/a")
		}, "GOAWAY 1 PROTOCOL_ERROR*"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPair(t, handlers(answer(0)))
			test.do(p)
			p.expectClient(test.want)
			p.expectEnd(p.client)
			for {
				got := p.next(p.runtime)
				if got == "EOF" {
					break
				}
				if !strings.HasPrefix(got, "HEADERS 1") && got != "DATA 1 0 END" {
					t.Fatalf("the runtime got %s", got)
				}
			}
		})
	}
}

// TestNoPreface: what does not speak HTTP/2 is closed, and costs no connection
// to the runtime.
func TestNoPreface(t *testing.T) {
	p := &pair{t: t, relay: newTestRelay(t, Config{Dial: func(context.Context) (net.Conn, error) {
		t.Error("dialled")
		return nil, io.EOF
	}})}
	for _, garbage := range []string{
		"", "PRI * HT", http2.ClientPreface, http2.ClientPreface + "\x00\x00\x06\x04",
		"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
		http2.ClientPreface + "\x00\x00\x08\x06\x00\x00\x00\x00\x0012345678",
		http2.ClientPreface + "\x00\x00\x00\x04\x01\x00\x00\x00\x00",
	} {
		p.connectRaw(garbage)
		p.clientConn.(*net.UnixConn).CloseWrite()
		p.expectEnd(p.client)
	}
}

// TestRuntimeErrors: a runtime that breaks the protocol loses its connection;
// what it had in hand ends as unavailable.
func TestRuntimeErrors(t *testing.T) {
	for _, test := range []struct {
		name string
		do   func(p *pair)
		want string
	}{
		{"more than its window", func(p *pair) {
			for range 5 {
				p.runtime.WriteData(1, false, make([]byte, maxFrame))
			}
		}, "GOAWAY 0 FLOW_CONTROL_ERROR*"},
		{"PUSH_PROMISE", func(p *pair) { p.runtime.WriteRawFrame(http2.FramePushPromise, 4, 1, make([]byte, 4)) }, "GOAWAY 0 PROTOCOL_ERROR*"},
		{"long frame", func(p *pair) { p.runtime.WriteRawFrame(http2.FrameData, 0, 1, make([]byte, maxFrame+1)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"short GOAWAY", func(p *pair) { p.runtime.WriteRawFrame(http2.FrameGoAway, 0, 0, make([]byte, 7)) }, "GOAWAY 0 FRAME_SIZE_ERROR*"},
		{"long block", func(p *pair) {
			p.runtime.WriteHeaders(http2.HeadersFrameParam{StreamID: 1})
			for range maxHeaderFrames {
				p.runtime.WriteContinuation(1, false, nil)
			}
		}, "GOAWAY 0 ENHANCE_YOUR_CALM*"},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := newPair(t, Config{})
			p.ask(1, "/a", 0)
			p.expectRuntime("HEADERS 1", "DATA 1 0 END")
			test.do(p)
			p.expectRuntime(test.want)
			p.expectEnd(p.runtime)
			got := p.next(p.client)
			for strings.HasPrefix(got, "DATA") {
				got = p.next(p.client)
			}
			if got != "HEADERS 1 END" || p.field("grpc-status") != "14" {
				t.Errorf("the client got %s %v", got, p.fields)
			}
			p.expectClient("GOAWAY 1 NO_ERROR*")
			p.expectEnd(p.client)
		})
	}
}
