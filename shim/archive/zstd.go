package archive

import (
	"bufio"
	"bytes"
	"context"
	"io"
	"os"
	"runtime"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
)

const (
	// frameSize is how much is compressed at once. An archive is one frame after the other, each of which can be decompressed by
	// itself; readers take them for one stream (RFC 8878, 3). Each processor has one in work, of twice its room and some for the encoder.
	frameSize = 1 << 20
	// maxWindow is what a frame may need to be decompressed, in bytes: as much as the program zstd allows.
	maxWindow = 128 << 20
	// compressedReserve is how much longer than its content the file is made while it is written: for one that grows by writing XFS takes as
	// much room again.
	compressedReserve = 64 << 20
)

// compressed is an archive that is compressed on all processors while it is written.
type compressed struct {
	file    *os.File
	encoder *zstd.Encoder
	at      int64 // in the archive
	written int64 // in the file
	size    int64 // of the file, more than was written until the end
	frames  []frame
	filling int // frame that is being filled; the next one is the oldest
	chunk   []byte
	report  func(written int64)
}

type frame struct {
	plain, packed []byte
	done          chan struct{} // nil while it is not at work
}

// newCompressed returns an output to f. The caller ends it by stop.
func newCompressed(f *os.File, report func(written int64)) (*compressed, error) {
	workers := runtime.GOMAXPROCS(0)
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithWindowSize(frameSize),
		zstd.WithEncoderConcurrency(workers), zstd.WithLowerEncoderMem(true))
	if err != nil {
		return nil, err
	}
	return &compressed{
		file: f, encoder: encoder, frames: make([]frame, workers+1), chunk: make([]byte, 256<<10), report: report,
	}, nil
}

// stop waits for what is at work.
func (c *compressed) stop() {
	for i := range c.frames {
		if done := c.frames[i].done; done != nil {
			<-done
		}
	}
}

func (c *compressed) offset() int64 { return c.at }

func (c *compressed) write(b []byte) error {
	for len(b) > 0 {
		f := &c.frames[c.filling]
		if f.plain == nil {
			f.plain = make([]byte, 0, frameSize)
		}
		n := min(len(b), frameSize-len(f.plain))
		f.plain = append(f.plain, b[:n]...)
		b = b[n:]
		c.at += int64(n)
		if len(f.plain) < frameSize {
			continue
		}
		if err := c.next(); err != nil {
			return err
		}
	}
	return nil
}

// next puts the frame that was filled to work, and makes room for another one.
func (c *compressed) next() error {
	f := &c.frames[c.filling]
	f.done = make(chan struct{})
	go func() { // stop or flush waits for it
		defer close(f.done)
		f.packed = c.encoder.EncodeAll(f.plain, f.packed[:0])
	}()
	c.filling = (c.filling + 1) % len(c.frames)
	return c.flush(&c.frames[c.filling])
}

// flush writes a frame, if there is something in it.
func (c *compressed) flush(f *frame) error {
	if f.done == nil {
		return nil
	}
	<-f.done
	if end := c.written + int64(len(f.packed)); end > c.size {
		if err := c.truncate((end + 2*compressedReserve - 1) &^ (compressedReserve - 1)); err != nil {
			return err
		}
	}
	n, err := c.file.WriteAt(f.packed, c.written)
	_ = unix.SyncFileRange(int(c.file.Fd()), c.written, int64(n), unix.SYNC_FILE_RANGE_WRITE) // only a hint
	c.written += int64(n)
	f.done, f.plain = nil, f.plain[:0]
	if err == nil {
		c.report(c.written)
	}
	return err
}

func (c *compressed) member(ctx context.Context, m member, _ *sum) error {
	pieces, src, err := m.open()
	if err != nil {
		return err
	}
	defer src.Close()
	for _, piece := range pieces {
		for done := int64(0); done < piece.Length; {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			n, err := piece.File.ReadAt(c.chunk[:min(int64(len(c.chunk)), piece.Length-done)], piece.Offset+done)
			done += int64(n)
			if err != nil && done < piece.Length {
				return shrank(err, piece.Length-done)
			}
			if err := c.write(c.chunk[:n]); err != nil {
				return err
			}
		}
	}
	return m.unchanged(src)
}

func (c *compressed) end() error {
	if len(c.frames[c.filling].plain) > 0 {
		if err := c.next(); err != nil {
			return err
		}
	}
	for range c.frames { // from the oldest on
		if err := c.flush(&c.frames[c.filling]); err != nil {
			return err
		}
		c.filling = (c.filling + 1) % len(c.frames)
	}
	return c.truncate(c.written)
}

func (c *compressed) truncate(size int64) error {
	c.size = size
	return c.file.Truncate(size)
}

// Decompress returns what r has, decompressed where it begins as zstd does, and tells whether that was so. What it returns is
// closed before r, which stays the caller's.
func Decompress(r io.Reader) (plain io.ReadCloser, compressed bool, err error) {
	input := bufio.NewReaderSize(r, 1<<20)
	start, err := input.Peek(4)
	if err != nil && err != io.EOF {
		return nil, false, err
	}
	if !isZstd(start) {
		return io.NopCloser(input), false, nil
	}
	decoder, err := zstd.NewReader(input, zstd.WithDecoderMaxWindow(maxWindow), zstd.WithDecoderLowmem(true))
	if err != nil {
		return nil, false, err
	}
	return decoder.IOReadCloser(), true, nil
}

// isZstd tells a frame of zstd by its first four bytes, also one that is to be skipped.
func isZstd(start []byte) bool {
	return bytes.Equal(start, []byte{0x28, 0xb5, 0x2f, 0xfd}) ||
		len(start) == 4 && start[0]&0xf0 == 0x50 && bytes.Equal(start[1:], []byte{0x2a, 0x4d, 0x18})
}
