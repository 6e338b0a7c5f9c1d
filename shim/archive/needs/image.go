package needs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/checkpoint-restore/go-criu/v7/magic"
	"google.golang.org/protobuf/proto"
)

// Bounds in bytes. files.img has about a hundred for each open file, and cgroup.img has one entry, with some hundred for each cgroup.
const (
	maxImage = 256 << 20
	maxEntry = 16 << 20
)

// message is a pointer to a protobuf.
type message[T any] interface {
	*T
	proto.Message
}

// readImage calls use for each entry of an image of CRIU's: two magic numbers, and then protobufs with their sizes in front, all
// in little endian. go-criu's crit does the same, but from files only, and takes any size for true.
func readImage[T any, M message[T]](size int64, r io.Reader, kind string, use func(M)) error {
	if size > maxImage {
		return fmt.Errorf("it has %d bytes: %d are the most that make sense", size, maxImage)
	}
	numbers := magic.LoadMagic().ByName
	input := bufio.NewReader(r)
	var head [2]uint32
	if err := binary.Read(input, binary.LittleEndian, &head); err != nil {
		return fmt.Errorf("this is no image of CRIU's: %w", err)
	}
	if uint64(head[0]) != numbers["IMG_COMMON"] || uint64(head[1]) != numbers[kind] {
		return fmt.Errorf("this is no image of CRIU's for %s", kind)
	}
	for {
		var size uint32
		err := binary.Read(input, binary.LittleEndian, &size)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil && size > maxEntry {
			err = fmt.Errorf("an entry of %d bytes", size)
		}
		if err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		data := make([]byte, size)
		if _, err := io.ReadFull(input, data); err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		entry := M(new(T))
		if err := proto.Unmarshal(data, entry); err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		use(entry)
	}
}
