package relay

import (
	"bytes"
	"net/http"
	"strings"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestTheRouteOfAPath looks paths up as they come: as they are, and Huffman-coded.
func TestTheRouteOfAPath(t *testing.T) {
	const served, endless, unknown = "/a.B/Served", "/a.B/Endless", "/a.B/Unknown"
	s := New(Config{
		Handlers: map[string]http.Handler{served: http.NotFoundHandler()}, Endless: []string{endless}, Counted: []string{served, endless},
	})
	for _, test := range []struct {
		path                     string
		served, endless, counted bool
	}{
		{path: served, served: true, counted: true},
		{path: endless, endless: true, counted: true},
		{path: unknown},
		{path: served[:len(served)-1]},
	} {
		for _, coded := range [][]byte{[]byte(test.path), hpack.AppendHuffmanString(nil, test.path)} {
			r := s.route(coded)
			if got := r.handler != nil; got != test.served {
				t.Errorf("%q is served here: %v", coded, got)
			}
			if r.endless != test.endless {
				t.Errorf("%q is endless: %v", coded, r.endless)
			}
			if got := r.counters != s.other.counters; got != test.counted {
				t.Errorf("%q is counted by itself: %v", coded, got)
			}
		}
	}
}

// TestFindPath has blocks in every spelling: where a path is found it is the one, and what is out of the ordinary is left to the decoder.
func TestFindPath(t *testing.T) {
	text := func(s string) string { return string(rune(len(s))) + s }
	coded := func(s string) string {
		h := hpack.AppendHuffmanString(nil, s)
		return string([]byte{0x80 | byte(len(h))}) + string(h)
	}
	const post, path = "\x83", "\x04" // an indexed field; the name of a literal one, not to be indexed
	long := "/" + strings.Repeat("x", 300)
	for _, test := range []struct {
		name, block, want string
	}{
		{"as it is", post + path + text("/a"), "/a"},
		{"Huffman-coded", post + path + coded("/a"), string(hpack.AppendHuffmanString(nil, "/a"))},
		{"to be indexed", "\x44" + text("/a"), "/a"},
		{"never to be indexed", "\x14" + text("/a"), "/a"},
		{"by the name of the table's other path", "\x05" + text("/a"), "/a"},
		{"with its name spelled out", "\x00" + text(":path") + text("/a"), "/a"},
		{"with its name Huffman-coded", "\x00" + coded(":path") + text("/a"), "/a"},
		{"among others", "\x00" + text("te") + text("x") + path + text("/a") + "\x0f\x10" + text("application/grpc"), "/a"},
		{"of more than 126 bytes", path + "\x7f" + string([]byte{0xae, 0x01}) + long, long},

		{"none", post, ""},
		{"an empty block", "", ""},
		{"two", path + text("/a") + path + text("/a"), ""},
		{"two, one with its name spelled out", path + text("/a") + "\x00" + text(":path") + text("/a"), ""},
		{"two, one with its name Huffman-coded", path + text("/a") + "\x00" + coded(":path") + text("/a"), ""},
		{"two, one out of the table", path + text("/a") + "\x84", ""},
		{"out of the table", "\x84", ""},
		{"the table's other one", "\x85", ""},
		{"without its slash", path + text("a"), ""},
		{"without its slash, Huffman-coded", path + coded("a"), ""},
		{"empty", path + text(""), ""},
		{"after a change of the table", "\x20" + path + text("/a"), ""},
		{"beside a field of a dynamic table", path + text("/a") + "\xbe", ""},
		{"beside a name of a dynamic table", path + text("/a") + "\x7e" + text("x"), ""},
		{"beside field 0", path + text("/a") + "\x80", ""},
		{"cut off in its value", path + text("/a")[:2], ""},
		{"cut off before its value", path, ""},
		{"cut off in a number", path + "\x7f\x80", ""},
		{"with a number without end", path + "\x7f" + strings.Repeat("\xff", 20), ""},
	} {
		found, ok := findPath([]byte(test.block))
		if string(found) != test.want || ok != (test.want != "") {
			if ok || test.want != "" { // what it returns beside false is nothing
				t.Errorf("%s: %q, %v; want %q", test.name, found, ok, test.want)
			}
		}
	}
	if got := string(hpack.AppendHuffmanString(nil, ":path")); got != huffmanPath {
		t.Errorf(`":path" is coded as %q, not as %q`, got, huffmanPath)
	}
}

// TestAListOfOneFrameIsWithinTheLimit is what routeOf relies on.
func TestAListOfOneFrameIsWithinTheLimit(t *testing.T) {
	for index := byte(1); index <= staticEntries; index++ {
		size := 0
		dec := hpack.NewDecoder(0, func(f hpack.HeaderField) { size += int(f.Size()) })
		if _, err := dec.Write(bytes.Repeat([]byte{0x80 | index}, maxFrame)); err != nil {
			t.Fatal(err)
		}
		if size > maxHeaderList {
			t.Errorf("%d fields %d of the static table count %d bytes, more than %d", maxFrame, index, size, maxHeaderList)
		}
	}
}

// FuzzFindPath compares with the decoder: a path that is found is the only one that the decoder finds, if it takes the block at all.
func FuzzFindPath(f *testing.F) {
	f.Add([]byte(compress(requestTo("/a.B/C")...)))
	f.Add([]byte("\x00\x05:path\x02/a"))
	f.Add([]byte("\x04\x02/a\x84"))
	f.Add([]byte("\x44\x02/a\xbe"))
	f.Fuzz(func(t *testing.T, block []byte) {
		found, ok := findPath(block)
		if !ok {
			return
		}
		var paths []string
		dec := hpack.NewDecoder(0, func(f hpack.HeaderField) {
			if f.Name == ":path" {
				paths = append(paths, f.Value)
			}
		})
		_, err := dec.Write(block)
		if err == nil {
			err = dec.Close()
		}
		if err != nil {
			return // the runtime says so
		}
		if len(paths) != 1 || !strings.HasPrefix(paths[0], "/") {
			t.Fatalf("found %q; the decoder has %q", found, paths)
		}
		if string(found) != paths[0] && !bytes.Equal(found, hpack.AppendHuffmanString(nil, paths[0])) {
			t.Fatalf("found %q, which is not %q", found, paths[0])
		}
	})
}

// TestABlockThatIsWrongBesideItsPath is the runtime's to refuse, as it is without a relay, and the client hears of it.
func TestABlockThatIsWrongBesideItsPath(t *testing.T) {
	p := newPair(t, Config{})
	block := append([]byte("\x04\x02/a"), "\x00\x01x\x81\x00"...) // the padding of its last value is not what it must be
	p.client.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block, EndHeaders: true})
	p.expectRuntime("HEADERS that cannot be decoded*")
	p.runtime.WriteGoAway(0, http2.ErrCodeCompression, []byte("what is this"))
	p.runtimeConn.Close()
	p.expectClient("RST_STREAM 1 REFUSED_STREAM", "GOAWAY 1 COMPRESSION_ERROR what is this")
	p.expectEnd(p.client)
}
