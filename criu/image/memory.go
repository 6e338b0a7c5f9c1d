package image

import (
	"errors"
	"fmt"
	"io"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"google.golang.org/protobuf/encoding/protowire"
)

// Extent is a run of pages of one process's memory, or of memory that processes share.
type Extent struct {
	Start  uint64 // address of the first byte; of shared memory, its place there
	Pages  uint64
	Stored bool // its bytes are in the image of pages, behind those of the stored extents before it; otherwise in none of this dump's
}

// Pagemap is an image that tells which pages another image holds. It is read an extent at a time, since memory may be of any size.
type Pagemap struct {
	// Pages is the number in the name of the image that has the pages.
	Pages   uint32
	entries *entries
}

// OpenPagemap begins to read pagemap-*.img, of size bytes.
func OpenPagemap(r io.Reader, size int64) (*Pagemap, error) {
	entries, err := open(r, size, "PAGEMAP")
	if err != nil {
		return nil, err
	}
	p := &Pagemap{entries: entries}
	head, err := entries.next()
	if err == io.EOF {
		err = errors.New("read image: it does not say which image has the pages")
	}
	if err != nil {
		return nil, err
	}
	return p, numbers(head, func(field protowire.Number, value uint64) {
		if field == 1 {
			p.Pages = uint32(value)
		}
	})
}

// Next returns the next extent, or io.EOF.
func (p *Pagemap) Next() (Extent, error) {
	data, err := p.entries.next()
	if err != nil {
		return Extent{}, err
	}
	const present = 1 << 2 // CRIU's PE_PRESENT
	var e Extent
	var flags uint64
	var hasFlags, inParent bool
	err = numbers(data, func(field protowire.Number, value uint64) {
		switch field {
		case 1:
			e.Start = value
		case 2: // of 32 bits; CRIU 4.2 leaves it at 0, and has field 5, which go-criu 7 does not know
			e.Pages = max(e.Pages, value)
		case 3:
			inParent = value != 0
		case 4:
			flags, hasFlags = value, true
		case 5:
			e.Pages = max(e.Pages, value)
		}
	})
	e.Stored = flags&present != 0 || !hasFlags && !inParent // CRIU had no flags once
	return e, err
}

// Mappings calls use for each mapping of a process, in mm-*.img of size bytes, and returns the id that its executable has in files.img.
// The image is one entry of all, of which use's is decoded alone: a mapping takes far more room in memory than it may in a file.
func Mappings(r io.Reader, size int64, use func(*vma.VmaEntry) error) (executable uint32, err error) {
	err = ReadRaw(r, size, "MM", func(data []byte) error {
		return fields(data, func(field protowire.Number, value uint64, bytes []byte) error {
			switch field {
			case 12:
				executable = uint32(value)
			case 14:
				var mapping vma.VmaEntry
				if err := Decode(bytes, &mapping); err != nil {
					return fmt.Errorf("read image: %w", err)
				}
				return use(&mapping)
			}
			return nil
		})
	})
	return executable, err
}

// numbers calls use for each field of a protobuf that is a number.
func numbers(data []byte, use func(field protowire.Number, value uint64)) error {
	return fields(data, func(field protowire.Number, value uint64, bytes []byte) error {
		if bytes == nil {
			use(field, value)
		}
		return nil
	})
}

// fields calls use for each field of a protobuf: a number, or bytes that are not nil. Fields of other kinds are passed over.
func fields(data []byte, use func(field protowire.Number, value uint64, bytes []byte) error) error {
	for len(data) > 0 {
		field, kind, n := protowire.ConsumeTag(data)
		if n < 0 {
			return fmt.Errorf("read image: %w", protowire.ParseError(n))
		}
		data = data[n:]
		var err error
		switch kind {
		case protowire.VarintType:
			var value uint64
			if value, n = protowire.ConsumeVarint(data); n >= 0 {
				err = use(field, value, nil)
			}
		case protowire.BytesType:
			var bytes []byte
			if bytes, n = protowire.ConsumeBytes(data); n >= 0 {
				err = use(field, 0, bytes)
			}
		default:
			n = protowire.ConsumeFieldValue(field, kind, data)
		}
		if n < 0 {
			err = fmt.Errorf("read image: %w", protowire.ParseError(n))
		}
		if err != nil {
			return err
		}
		data = data[n:]
	}
	return nil
}
