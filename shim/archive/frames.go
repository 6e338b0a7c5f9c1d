package archive

import (
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/klauspost/compress/zstd"
)

const (
	maxFrame      = 8 << 20 // bytes of a frame, decompressed, that is kept in memory
	maxFrames     = 1 << 22 // 4 TiB, as crishim makes them
	framesInCache = 4
)

var errFrames = errors.New("the frames cannot be read one by one")

// frames reads a compressed archive at any place, one frame at a time. Not for several goroutines.
type frames struct {
	file    io.ReaderAt
	starts  []frameStart // of all, and of their end
	decoder *zstd.Decoder
	cache   []decoded // the one that was used last comes last
	packed  []byte
}

type frameStart struct{ plain, file int64 }

type decoded struct {
	frame int
	plain []byte
}

// indexFrames finds where the frames begin, by their headers and those of their blocks (RFC 8878, 3.1.1). Where frames are too large to
// be kept, or anything is not as it should be, that is an error.
func indexFrames(file io.ReaderAt, size int64) (*frames, error) {
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxMemory(maxFrame))
	if err != nil {
		return nil, err
	}
	f := &frames{file: file, decoder: decoder} // the decoder has no goroutines, and need not be closed
	return f, f.index(size)
}

func (f *frames) index(size int64) error {
	var at, plain int64
	for at < size {
		if len(f.starts) == maxFrames {
			return errFrames
		}
		var head [zstd.HeaderMaxSize]byte
		n, err := f.file.ReadAt(head[:], at)
		if err != nil && err != io.EOF {
			return err
		}
		var h zstd.Header
		if err := h.Decode(head[:n]); err != nil {
			return err
		}
		if h.Skippable { // crishim makes none
			return errFrames
		}
		end, err := f.blocks(at+int64(h.HeaderSize), h.HasCheckSum)
		if err != nil {
			return err
		}
		f.starts = append(f.starts, frameStart{plain, at})
		if !h.HasFCS { // a small one does not say its size
			content, err := f.decode(at, end)
			if err != nil {
				return err
			}
			h.FrameContentSize = uint64(len(content))
		}
		if h.FrameContentSize > maxFrame || end-at > 2*maxFrame {
			return errFrames
		}
		plain += int64(h.FrameContentSize)
		at = end
	}
	if at != size {
		return errFrames
	}
	f.starts = append(f.starts, frameStart{plain, at})
	return nil
}

// blocks returns where a frame ends whose first block is at at.
func (f *frames) blocks(at int64, checksum bool) (int64, error) {
	const sumSize, runLength, reserved = 4, 1, 3
	for {
		var head [4]byte
		if _, err := f.file.ReadAt(head[:3], at); err != nil {
			return 0, err
		}
		word := binary.LittleEndian.Uint32(head[:])
		last, kind, size := word&1 == 1, word>>1&3, int64(word>>3)
		switch kind {
		case runLength:
			size = 1
		case reserved:
			return 0, errFrames
		}
		at += 3 + size
		if last && checksum {
			at += sumSize
		}
		if last {
			return at, nil
		}
	}
}

func (f *frames) size() int64 { return f.starts[len(f.starts)-1].plain }

func (f *frames) ReadAt(b []byte, offset int64) (int, error) {
	n := 0
	for n < len(b) {
		if offset >= f.size() {
			return n, io.EOF
		}
		i, exact := slices.BinarySearchFunc(f.starts, offset, func(s frameStart, offset int64) int { return cmp.Compare(s.plain, offset) })
		if !exact {
			i--
		}
		for f.starts[i+1].plain == f.starts[i].plain { // empty ones
			i++
		}
		plain, err := f.frame(i)
		if err != nil {
			return n, err
		}
		copied := copy(b[n:], plain[offset-f.starts[i].plain:])
		n += copied
		offset += int64(copied)
	}
	return n, nil
}

// frame returns the bytes of a frame, decompressed.
func (f *frames) frame(i int) ([]byte, error) {
	if at := slices.IndexFunc(f.cache, func(d decoded) bool { return d.frame == i }); at >= 0 {
		found := f.cache[at]
		f.cache = append(slices.Delete(f.cache, at, at+1), found)
		return found.plain, nil
	}
	plain, err := f.decode(f.starts[i].file, f.starts[i+1].file)
	if err != nil {
		return nil, err
	}
	if want := f.starts[i+1].plain - f.starts[i].plain; int64(len(plain)) != want {
		return nil, fmt.Errorf("a frame at byte %d has %d bytes, and says %d", f.starts[i].file, len(plain), want)
	}
	if len(f.cache) == framesInCache {
		f.cache = slices.Delete(f.cache, 0, 1)
	}
	f.cache = append(f.cache, decoded{i, plain})
	return plain, nil
}

func (f *frames) decode(from, to int64) ([]byte, error) {
	if to-from > 2*maxFrame {
		return nil, errFrames
	}
	f.packed = slices.Grow(f.packed[:0], int(to-from))[:to-from]
	if _, err := f.file.ReadAt(f.packed, from); err != nil {
		return nil, err
	}
	return f.decoder.DecodeAll(f.packed, nil)
}
