// Package image reads and writes image files of CRIU's: those that are a list of protobufs of one kind, with nothing in between.
//
// go-criu's crit does so, too, for files on disk whose sizes it takes for true, and cannot be in one program with go-criu's stats: both
// register the same protobufs. Here images come also out of archives that nobody vouches for.
package image

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/magic"
	"google.golang.org/protobuf/proto"
)

// Bounds in bytes. files.img has about a hundred for each open file.
const (
	maxImage = 256 << 20
	maxEntry = 16 << 20
)

// Entry is a pointer to a protobuf.
type Entry[T any] interface {
	*T
	proto.Message
}

// class is the first magic number of an image, and kind the second, by CRIU's name for it, such as "FILES".
func class(kind string) string {
	switch kind {
	case "IRMAP_CACHE", "STATS":
		return "IMG_SERVICE" // they are in CRIU's working directory, beside the images
	}
	return "IMG_COMMON"
}

// Read calls use for each entry of an image of size bytes. kind is what CRIU calls its magic number, such as "FILES". In the file, two
// magic numbers are followed by the entries, each with its size in front, all in little endian.
func Read[T any, E Entry[T]](r io.Reader, size int64, kind string, use func(E)) error {
	return ReadRaw(r, size, kind, func(data []byte) error {
		entry := E(new(T))
		if err := Decode(data, entry); err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		use(entry)
		return nil
	})
}

// ReadRaw is Read for who decodes the entries, whose bytes are good until use returns. An error of use ends it, and is returned as it is.
func ReadRaw(r io.Reader, size int64, kind string, use func(data []byte) error) error {
	entries, err := open(r, size, kind)
	if err != nil {
		return err
	}
	for {
		data, err := entries.next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = use(data)
		}
		if err != nil {
			return err
		}
	}
}

// Decode reads one entry. Which fields an entry must have is for CRIU to say.
func Decode(data []byte, entry proto.Message) error {
	return proto.UnmarshalOptions{AllowPartial: true}.Unmarshal(data, entry)
}

// entries are those of an image, one after the other.
type entries struct {
	input  *bufio.Reader
	buffer []byte
}

func open(r io.Reader, size int64, kind string) (*entries, error) {
	if size > maxImage {
		return nil, fmt.Errorf("it has %d bytes: %d are the most that make sense", size, maxImage)
	}
	numbers := magic.LoadMagic().ByName
	input := bufio.NewReader(r)
	var head [2]uint32
	if err := binary.Read(input, binary.LittleEndian, &head); err != nil {
		return nil, fmt.Errorf("this is no image of CRIU's: %w", err)
	}
	if uint64(head[0]) != numbers[class(kind)] || uint64(head[1]) != numbers[kind] {
		return nil, fmt.Errorf("this is no image of CRIU's for %s", kind)
	}
	return &entries{input: input}, nil
}

// next returns the bytes of the next entry, which are good until it is called again, or io.EOF.
func (e *entries) next() ([]byte, error) {
	var head [4]byte
	_, err := io.ReadFull(e.input, head[:])
	if err == io.EOF {
		return nil, err
	}
	size := int(binary.LittleEndian.Uint32(head[:]))
	if err == nil && size > maxEntry {
		err = fmt.Errorf("an entry of %d bytes", size)
	}
	if err != nil {
		return nil, fmt.Errorf("read image: %w", err)
	}
	e.buffer = slices.Grow(e.buffer[:0], size)[:size]
	if _, err := io.ReadFull(e.input, e.buffer); err != nil {
		if err == io.EOF {
			err = io.ErrUnexpectedEOF
		}
		return nil, fmt.Errorf("read image: %w", err)
	}
	return e.buffer, nil
}

// Write returns an image of these entries. What Read did not know of them, because CRIU is newer, is kept.
func Write[E proto.Message](kind string, entries []E) ([]byte, error) {
	numbers := magic.LoadMagic().ByName
	data := binary.LittleEndian.AppendUint32(nil, uint32(numbers[class(kind)]))
	data = binary.LittleEndian.AppendUint32(data, uint32(numbers[kind]))
	for _, entry := range entries {
		packed, err := proto.MarshalOptions{AllowPartial: true}.Marshal(entry)
		if err != nil {
			return nil, fmt.Errorf("write image: %w", err)
		}
		data = binary.LittleEndian.AppendUint32(data, uint32(len(packed)))
		data = append(data, packed...)
	}
	return data, nil
}
