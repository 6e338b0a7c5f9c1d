package criu

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/checkpoint-restore/go-criu/v7/magic"
	"google.golang.org/protobuf/proto"
)

// An image of CRIU is two magic numbers, of its class and its kind, and then protobufs with their sizes in front, all in little endian.
// go-criu's crit knows that too, but cannot be in one program with go-criu's stats: both register the same protobufs.

// readImage calls use for each entry of an image that CRIU has written. message makes one of the entries' kind.
func readImage[M proto.Message](r io.Reader, message func() M, use func(M)) error {
	const maxEntry = 16 << 20 // bytes
	input := bufio.NewReader(r)
	if _, err := input.Discard(8); err != nil {
		return err
	}
	for {
		var size uint32
		err := binary.Read(input, binary.LittleEndian, &size)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if size > maxEntry {
			return fmt.Errorf("an entry of %d bytes", size)
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(input, data); err != nil {
			return err
		}
		entry := message()
		if err := proto.Unmarshal(data, entry); err != nil {
			return err
		}
		use(entry)
	}
}

// writeImage writes an image for CRIU. The names of class and kind are those of CRIU's magic.h.
func writeImage[M proto.Message](w io.Writer, class, kind string, entries []M) error {
	numbers := magic.LoadMagic().ByName
	data := binary.LittleEndian.AppendUint32(nil, uint32(numbers[class]))
	data = binary.LittleEndian.AppendUint32(data, uint32(numbers[kind]))
	for _, entry := range entries {
		content, err := proto.Marshal(entry)
		if err != nil {
			return err
		}
		data = binary.LittleEndian.AppendUint32(data, uint32(len(content)))
		data = append(data, content...)
	}
	_, err := w.Write(data)
	return err
}
