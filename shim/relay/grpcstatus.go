package relay

import (
	"fmt"
	"strconv"
	"strings"

	"golang.org/x/net/http2/hpack"
)

// This file is all that the relay knows of gRPC: how to end a stream whose far
// side cannot, so that the client's own library reports it as an error with a
// code and a message.

// Codes of gRPC that the relay gives by itself.
const (
	resourceExhausted = 8
	unavailable       = 14
)

// statusFields are the trailers that end a stream, or, when nothing has been
// answered yet, the whole answer ("Trailers-Only").
func statusFields(answered bool, status int, message string) []hpack.HeaderField {
	var fields []hpack.HeaderField
	if !answered {
		fields = append(fields,
			hpack.HeaderField{Name: ":status", Value: "200"},
			hpack.HeaderField{Name: "content-type", Value: "application/grpc"})
	}
	return append(fields,
		hpack.HeaderField{Name: "grpc-status", Value: strconv.Itoa(status)},
		hpack.HeaderField{Name: "grpc-message", Value: percentEncode(message)})
}

// percentEncode is the encoding of grpc-message.
func percentEncode(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if c := s[i]; c >= ' ' && c <= '~' && c != '%' {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
