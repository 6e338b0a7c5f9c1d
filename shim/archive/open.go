package archive

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
)

// ErrInOnePiece is the error of an archive whose members cannot be read when they are asked for: it is compressed in one
// piece, and not in many as crishim does it.
var ErrInOnePiece = errors.New("the archive is compressed in one piece, so that it can only be read from its beginning: decompress it by zstd -d first")

// Archive is an archive that Open has looked through.
type Archive struct {
	Report           // without digests
	Size       int64 // of the file, in bytes
	Compressed bool

	source  io.ReaderAt // of the archive, decompressed; nil if it is in one piece
	extents map[string]extent
}

type extent struct{ offset, size int64 }

// Open looks through an archive, whoever has written it, compressed by zstd or not. look is shown the members as by
// Verify. What it leaves unread is passed over where that can be done, so that memory of any size costs nothing; no
// digest is computed, and members may be missing that a restore needs. An archive in which anything else is wrong is an error.
//
// The file stays the caller's, and open while the archive is used.
func Open(ctx context.Context, file *os.File, look Look) (*Archive, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	disk := &disk{ctx: ctx, r: file}
	a := &Archive{Size: info.Size(), extents: map[string]extent{}}
	v := &verifier{look: look, members: maxMembers, seen: map[string]bool{}, opened: a}
	var start [4]byte
	if n, _ := disk.ReadAt(start[:], 0); isZstd(start[:n]) {
		a.Compressed = true
		frames, err := indexFrames(disk, info.Size())
		switch {
		case err == nil:
			a.source = frames
			v.seekIn(frames, frames.size())
		case disk.err == nil:
			// Whether it is damaged, the decoder says when it comes to it.
			plain, _, err := Decompress(io.NewSectionReader(disk, 0, info.Size()))
			if err != nil {
				return nil, fmt.Errorf("read archive: %w", err)
			}
			defer plain.Close()
			v.readFrom(plain)
		}
	} else {
		a.source = disk
		v.seekIn(disk, info.Size())
	}
	if disk.err == nil {
		v.archive()
	}
	if disk.err != nil {
		return nil, fmt.Errorf("read archive: %w", disk.err)
	}
	if problems := v.report.Problems; len(problems) > 0 {
		return nil, fmt.Errorf("it is not sound, crishim verify tells more: %s", problems[0])
	}
	a.Report = v.report
	return a, nil
}

// Member returns a member's bytes, nil if there is none of that name. Several may be read by turns, but in one goroutine.
func (a *Archive) Member(name string) (*io.SectionReader, error) {
	extent, ok := a.extents[name]
	if !ok {
		return nil, nil
	}
	if a.source == nil {
		return nil, ErrInOnePiece
	}
	return io.NewSectionReader(a.source, extent.offset, extent.size), nil
}

// member notes where a member is, and returns its content in the form that lets most be passed over.
func (a *Archive) member(h *tar.Header, offset int64, content io.Reader) io.Reader {
	a.extents[h.Name] = extent{offset, h.Size}
	if a.source == nil {
		return content
	}
	return io.NewSectionReader(a.source, offset, h.Size)
}

// readFrom has the archive read from one end to the other.
func (v *verifier) readFrom(plain io.Reader) {
	decompressed := &counter{r: plain}
	input := bufio.NewReaderSize(decompressed, 1<<20)
	v.input = input
	v.consumed = func() int64 { return decompressed.n - int64(input.Buffered()) }
}

// seekIn has the reader of tars pass over what nobody reads.
func (v *verifier) seekIn(source io.ReaderAt, size int64) {
	input := io.NewSectionReader(source, 0, size)
	v.input = input
	v.consumed = func() int64 {
		at, _ := input.Seek(0, io.SeekCurrent) // which cannot fail
		return at
	}
}

// disk is source for reading at any place.
type disk struct {
	ctx context.Context
	r   io.ReaderAt
	err error
}

func (d *disk) ReadAt(b []byte, offset int64) (int, error) {
	if d.ctx.Err() != nil {
		d.err = context.Cause(d.ctx)
		return 0, d.err
	}
	n, err := d.r.ReadAt(b, offset)
	if err != nil && err != io.EOF {
		d.err = err
	}
	return n, err
}
