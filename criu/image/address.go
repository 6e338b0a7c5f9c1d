package image

import (
	"net/netip"

	"golang.org/x/sys/unix"
)

// Address is a socket's address, of sk-inet entries: words whose bytes are in the network's order. What is none is the zero Addr.
func Address(family uint32, words []uint32) netip.Addr {
	if len(words) > 4 {
		return netip.Addr{}
	}
	var bytes []byte
	for _, word := range words {
		bytes = append(bytes, byte(word), byte(word>>8), byte(word>>16), byte(word>>24))
	}
	if family == unix.AF_INET {
		bytes = bytes[:min(len(bytes), 4)]
	}
	address, _ := netip.AddrFromSlice(bytes) // otherwise the zero one
	return address.Unmap()
}
