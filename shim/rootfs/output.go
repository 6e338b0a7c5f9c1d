package rootfs

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const (
	tarBlock = 512
	// copyPiece is how much is copied between two looks at the context.
	copyPiece = 8 << 20
)

// output is what a walk writes its tar to.
type output interface {
	io.Writer
	// align is called between a header and the content behind it, of stored bytes.
	align(stored int64) error
	// copy writes a part of a file that is open to be read. What it no longer has is zeros.
	copy(ctx context.Context, e *entry, part extent) error
	flush() error
}

// stream is an output in one piece.
type stream struct {
	*bufio.Writer
	buf []byte // for file content
}

func newStream(w io.Writer) stream {
	const size = 1 << 20
	return stream{bufio.NewWriterSize(w, size), make([]byte, size)}
}

func (s stream) align(int64) error { return nil }

func (s stream) flush() error { return s.Flush() }

func (s stream) copy(ctx context.Context, e *entry, part extent) error {
	return readTo(ctx, s.Writer, e, part, s.buf)
}

// readTo copies a part of a file by way of buf.
func readTo(ctx context.Context, w io.Writer, e *entry, part extent, buf []byte) error {
	for at, end := part.offset, part.end(); at < end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		piece := buf[:min(end-at, int64(len(buf)))]
		n, err := unix.Pread(e.file, piece, at)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return fmt.Errorf("read %s: %w", quote(e.path), err)
		}
		if n == 0 { // the file shrank
			clear(piece)
			n = len(piece)
		}
		if _, err := w.Write(piece[:n]); err != nil {
			return fmt.Errorf("write content of %s: %w", quote(e.path), err)
		}
		at += int64(n)
	}
	return nil
}

const (
	// spoolBuffer is what a spool collects before it writes.
	spoolBuffer = 128 << 10
	// largeContent is from what size on content is copied by the kernel, from file to
	// file, without a way through this process.
	largeContent = 256 << 10
	// sharedBlock is what content must begin at a multiple of, in both files, for the file
	// systems that can share it instead of copying it (XFS, btrfs): the size of their blocks.
	sharedBlock = 4096
	// spoolReserve is how much longer than its content a spool is made: for a file that grows by writing XFS takes as much room again.
	spoolReserve = 64 << 20
)

// spool is an output in a file of our own, from which pieces are put together later.
type spool struct {
	*bufio.Writer
	file     *os.File
	buf      []byte
	position int64 // of what is written next
	size     int64 // of the file, more than was written
	started  int64 // up to where the disk has been told to begin
	hurry    bool  // the container stands still

	// skip is called, if not nil, when content does not follow its header directly.
	skip func(from, to int64)
}

func newSpool(file *os.File) *spool {
	return &spool{Writer: bufio.NewWriterSize(file, spoolBuffer), file: file, buf: make([]byte, spoolBuffer)}
}

// reset empties it.
func (s *spool) reset() error {
	if err := s.file.Truncate(0); err != nil {
		return err
	}
	_, err := s.file.Seek(0, io.SeekStart)
	s.Writer.Reset(s.file)
	s.position, s.size, s.started = 0, 0, 0
	return err
}

func (s *spool) Write(b []byte) (int, error) {
	if err := s.reserve(int64(len(b))); err != nil {
		return 0, err
	}
	n, err := s.Writer.Write(b)
	s.position += int64(n)
	return n, err
}

// reserve makes the file long enough for so many bytes more.
func (s *spool) reserve(more int64) error {
	if s.position+more <= s.size {
		return nil
	}
	size := (s.position + more + 2*spoolReserve - 1) &^ (spoolReserve - 1)
	if err := s.file.Truncate(size); err != nil {
		return err
	}
	s.size = size
	return nil
}

func (s *spool) flush() error { return s.Flush() }

// align makes room in front of large content, so that it can be shared.
func (s *spool) align(stored int64) error {
	to := aligned(s.position)
	if stored < largeContent || to == s.position {
		return nil
	}
	if err := s.Flush(); err != nil {
		return err
	}
	if _, err := s.file.Seek(to, io.SeekStart); err != nil {
		return err
	}
	s.skip(s.position, to)
	s.position = to
	return nil
}

func aligned(position int64) int64 { return (position + sharedBlock - 1) &^ (sharedBlock - 1) }

func (s *spool) copy(ctx context.Context, e *entry, part extent) error {
	if part.length < largeContent {
		return readTo(ctx, s, e, part, s.buf)
	}
	if err := s.Flush(); err != nil {
		return fmt.Errorf("write content of %s: %w", quote(e.path), err)
	}
	for from := part.offset; from < part.end(); {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		at, length := from, min(part.end()-from, copyPiece)
		if err := s.reserve(length); err != nil {
			return fmt.Errorf("write content of %s: %w", quote(e.path), err)
		}
		// It shares what it can share, before it copies.
		n, err := unix.CopyFileRange(e.file, &at, int(s.file.Fd()), nil, int(length), 0)
		switch {
		case err == unix.EINTR || err == unix.EAGAIN:
			continue
		case n == 0 && err == nil, // the file shrank
			errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM):
			return readTo(ctx, s, e, extent{from, part.end() - from}, s.buf)
		case err != nil:
			return fmt.Errorf("copy content of %s: %w", quote(e.path), err)
		}
		from += int64(n)
		s.position += int64(n)
		s.startWriting()
	}
	return nil
}

// startWriting has the disk begin with what is there. It is only a hint, and not for when it would itself make the container wait.
func (s *spool) startWriting() {
	if !s.hurry && s.position-s.started >= copyPiece {
		_ = unix.SyncFileRange(int(s.file.Fd()), s.started, s.position-s.started, unix.SYNC_FILE_RANGE_WRITE)
		s.started = s.position
	}
}

// settle waits until the disk has what is there. What waits in memory to be written would slow CRIU down when it writes, the container frozen: the
// kernel makes whoever writes to a file system wait that has much to write.
func (s *spool) settle(ctx context.Context) error {
	const wait = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	for at := int64(0); at < s.position; at += copyPiece {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := unix.SyncFileRange(int(s.file.Fd()), at, min(copyPiece, s.position-at), wait); err != nil {
			return fmt.Errorf("write what was copied to disk: %w", err)
		}
	}
	return nil
}
