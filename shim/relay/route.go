package relay

import (
	"net/http"

	"golang.org/x/net/http2/hpack"
)

// A route is what is known of a :path before any stream has it.
type route struct {
	path     string
	handler  http.Handler // nil: the runtime serves it
	endless  bool
	counters *counters
}

// routesOf makes the routes of the paths that cfg names, and that of all others. Each path is there twice, as it is and Huffman-coded: a path has
// but one such code (RFC 7541, 5.2), so that it is known without being decoded. What is a path in one of the two is none in the other, since the
// slash that it begins with is coded otherwise.
func routesOf(cfg Config) (routes map[string]*route, other *route) {
	routes, other = map[string]*route{}, &route{counters: &counters{}}
	of := func(path string) *route {
		r := routes[path]
		if r == nil {
			r = &route{path: path, counters: other.counters}
			routes[path] = r
			routes[string(hpack.AppendHuffmanString(nil, path))] = r
		}
		return r
	}
	for path, handler := range cfg.Handlers {
		of(path).handler = handler
	}
	for _, path := range cfg.Endless {
		of(path).endless = true
	}
	for _, path := range cfg.Counted {
		of(path).counters = &counters{}
	}
	return routes, other
}

// opened counts a stream, and returns its counters.
func (r *route) opened() *counters {
	r.counters.streams.Add(1)
	return r.counters
}

// route returns the route of a path, in either coding.
func (s *Server) route(path []byte) *route {
	if r := s.routes[string(path)]; r != nil {
		return r
	}
	return s.other
}

// handler returns who serves the streams of a route in this process, nil where the runtime does.
func (s *Server) handler(r *route) http.Handler {
	if r.handler != nil && s.cfg.Passes != nil && s.cfg.Passes(r.path) {
		return nil
	}
	return r.handler
}

// routeOf returns the route of a request by a look at its :path alone, nil where that does not tell: then the whole header list is to be
// decoded and judged. To decode each list would be half of what the relay itself costs.
//
// The client must have acknowledged a table of size 0. Then a block means the same whatever was before it, and one that is wrong elsewhere may go to the
// runtime, which ends the connection over it as it would without a relay. A list of a single frame is within maxHeaderList, whatever is in it: the
// longest field that a byte stands for counts 60 bytes.
func (s *Server) routeOf(h headers) *route {
	if len(h.raw) != frameHeaderLen+frameLen(h.raw) {
		return nil
	}
	var path []byte
	ok := true
	err := h.fragments(func(b []byte) error {
		path, ok = findPath(b)
		return nil
	})
	if err != nil || !ok {
		return nil
	}
	return s.route(path)
}

// The static table of RFC 7541, appendix A.
const (
	staticPath    = 4 // ":path: /"
	staticIndex   = 5 // ":path: /index.html"
	staticEntries = 61
)

// findPath returns the :path of a header block as it is coded, where there is exactly one, with a leading slash, and nothing refers to a dynamic
// table.
func findPath(block []byte) (path []byte, ok bool) {
	r := blockReader{rest: block}
	for len(r.rest) > 0 && !r.bad {
		var index int
		switch first := r.rest[0]; {
		case first&0x80 != 0: // a whole field out of the table
			index = r.number(7)
			r.bad = r.bad || index == 0 || index == staticPath || index == staticIndex || index > staticEntries
			continue
		case first&0xc0 == 0x40: // a field that a table is to keep, if it can; nothing that refers to one gets by here
			index = r.number(6)
		case first&0xe0 == 0x20: // a new size of the table
			r.bad = true
			continue
		default:
			index = r.number(4)
		}
		isPath := index == staticPath || index == staticIndex
		if index == 0 {
			name, huffman := r.text()
			isPath = string(name) == ":path" && !huffman || string(name) == huffmanPath && huffman
		}
		value, huffman := r.text()
		r.bad = r.bad || index > staticEntries
		if isPath {
			r.bad = r.bad || path != nil || !hasSlash(value, huffman)
			path = value
		}
	}
	return path, path != nil && !r.bad
}

// huffmanPath is ":path" in Huffman code.
const huffmanPath = "\xb9\x58\xd3\x3f"

// hasSlash says whether a text begins with a slash, whose code is 011000.
func hasSlash(text []byte, huffman bool) bool {
	if len(text) == 0 {
		return false
	}
	if huffman {
		return text[0]>>2 == 0b011000
	}
	return text[0] == '/'
}

// A blockReader reads the parts of a header block, and is bad once one is not whole or larger than any that is meant.
type blockReader struct {
	rest []byte
	bad  bool
}

// number reads an integer with a prefix of so many bits (RFC 7541, 5.1).
func (r *blockReader) number(bits int) int {
	if len(r.rest) == 0 {
		r.bad = true
		return 0
	}
	n := int(r.rest[0]) & (1<<bits - 1)
	r.rest = r.rest[1:]
	if n < 1<<bits-1 {
		return n
	}
	for shift := 0; shift < 28 && len(r.rest) > 0; shift += 7 {
		b := r.rest[0]
		r.rest = r.rest[1:]
		n += int(b&0x7f) << shift
		if b&0x80 == 0 {
			return n
		}
	}
	r.bad = true
	return 0
}

// text reads a string as it is coded (RFC 7541, 5.2).
func (r *blockReader) text() (text []byte, huffman bool) {
	huffman = len(r.rest) > 0 && r.rest[0]&0x80 != 0
	n := r.number(7)
	if r.bad || n > len(r.rest) {
		r.bad = true
		return nil, false
	}
	text, r.rest = r.rest[:n], r.rest[n:]
	return text, huffman
}
