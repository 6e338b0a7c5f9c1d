package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// plain is an archive that is written as it is. Memory is written to disk once, in the first of these ways that
// the file system has, for each member:
//
//   - The largest staged file becomes the archive. A hole is inserted in front of its bytes, for all that comes before
//     (FALLOC_FL_INSERT_RANGE: ext4, XFS, F2FS).
//   - The archive shares the blocks of staged files (FICLONERANGE: XFS, btrfs).
//   - The bytes are copied, and the staged file is deleted before the kernel has come to write it to disk. Where none of these ways
//     is open, as on tmpfs, it is freed piece by piece, so that nothing needs its room twice.
type plain struct {
	file   *os.File
	at     int64
	can    abilities
	base   string // the member that was in the file from the beginning
	chunk  []byte // for copies that the kernel does not do
	report func(written int64)
}

// abilities are what a file system can do.
type abilities struct {
	insert bool
	clone  bool
	punch  bool
	block  int64 // unit of all of them
}

// probe tries the file system on a file without data, which costs no input or output.
func (s *Staging) probe() abilities {
	f, err := openAt(s.dir, ".probe", unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return abilities{block: s.blockSize()} // what comes next tells why
	}
	defer f.Close()
	if unix.Unlinkat(int(s.dir.Fd()), ".probe", 0) != nil {
		return abilities{block: s.blockSize()}
	}
	return tryOut(f, s.blockSize())
}

// tryOut tries what a file system can do on a file of its own, which is empty and has no name.
func tryOut(f *os.File, block int64) abilities {
	can := abilities{block: block}
	if f.Truncate(2*can.block) != nil {
		return can
	}
	can.clone = clone(f, 2*can.block, Segment{File: f, Length: can.block}) == nil
	can.insert = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_INSERT_RANGE, 0, can.block) == nil
	can.punch = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, can.block) == nil
	return can
}

// writeChunk is how much the kernel is told to write to disk between two looks at the context.
const writeChunk = 64 << 20

// startWriteBack has the kernel write those files to disk whose blocks become the archive's, beside all else that is to be done
// with them. Others must not be written before they are deleted. It is only a hint: errors show up where
// it matters.
func (a *assembly) startWriteBack(ctx context.Context, done *sync.WaitGroup, can abilities) {
	var files []member
	if base := largestStaged(a.entries); base != nil && (can.insert || can.clone) {
		files = append(files, base.member)
	}
	for _, e := range a.entries {
		if can.clone && e.member.dir != nil && e.member.size >= bigSize && !e.member.composed && e.member.name != files[0].name {
			files = append(files, e.member)
		}
	}
	done.Go(func() {
		for _, m := range files {
			f, err := openAt(m.dir, m.base, unix.O_RDONLY)
			if err != nil {
				continue // in the archive already, or insert tells
			}
			for offset := int64(0); offset < m.size && ctx.Err() == nil; offset += writeChunk {
				_ = unix.SyncFileRange(int(f.Fd()), offset, writeChunk, unix.SYNC_FILE_RANGE_WRITE)
			}
			f.Close()
		}
	})
}

// largestStaged is the entry of the largest staged file, nil if none is big.
func largestStaged(entries []entry) *entry {
	var largest *entry
	for i := range entries {
		e := &entries[i]
		if e.member.dir != nil && !e.member.composed && e.member.size >= bigSize && (largest == nil || e.member.size >= largest.member.size) {
			largest = e
		}
	}
	return largest
}

// insert makes the largest staged file the archive, where that is possible. Otherwise p.file stays nil, and the staged file as
// it was.
func (p *plain) insert(ctx context.Context, s *Staging, a *assembly) (err error) {
	base := largestStaged(a.entries)
	if base == nil || !p.can.insert {
		return nil
	}
	m := base.member
	f, err := openAt(m.dir, m.base, unix.O_RDWR)
	if err != nil {
		return err
	}
	defer func() {
		if p.file == nil {
			f.Close()
		}
		if err != nil {
			err = fmt.Errorf("insert in front of %s: %w", m.name, err)
		}
	}()
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Size != m.size {
		return shrank(nil, m.size-st.Size)
	}
	if st.Nlink != 1 {
		return nil // somebody has it under another name
	}
	if err := makePrivate(f, 0o600); err != nil {
		return err
	}
	// The kernel writes the whole file to disk before it inserts, and forgets what it has of it in memory. So both is done first, piece by piece and
	// when the digest has been read: this can be stopped, that cannot, and beside all else it takes less time.
	sum := a.sums[m.name]
	if err := settle(ctx, f, m.size, sum); err != nil {
		return err
	}
	if sum != nil {
		if _, err := sum.wait(); err != nil {
			return err
		}
	}
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	insertErr := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_INSERT_RANGE, 0, base.content())
	if insertErr != nil {
		// A kernel that has begun to move blocks has made the file longer first.
		if info, err := f.Stat(); err != nil || info.Size() != m.size {
			return errors.Join(insertErr, err)
		}
		return nil
	}
	if err := unix.Renameat(int(m.dir.Fd()), m.base, int(s.dir.Fd()), archiveName); err != nil {
		return &os.LinkError{Op: "rename", Old: f.Name(), New: archiveName, Err: err}
	}
	p.file, p.base = f, m.name
	return nil
}

// settle waits until a file is on the disk, and sum, if not nil, has read it, and has the kernel let go of what it has of it in memory.
func settle(ctx context.Context, f *os.File, size int64, sum *sum) error {
	const writeAndWait = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	for offset := int64(0); offset < size; offset += copyChunk {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := unix.SyncFileRange(int(f.Fd()), offset, copyChunk, writeAndWait); err != nil {
			return &os.PathError{Op: "sync_file_range", Path: f.Name(), Err: err}
		}
		if sum != nil {
			sum.next()
		}
		_ = unix.Fadvise(int(f.Fd()), offset, copyChunk, unix.FADV_DONTNEED) // a hint: what it keeps, it forgets later
	}
	return nil
}

func (p *plain) offset() int64 { return p.at }

func (p *plain) write(b []byte) error {
	n, err := p.file.WriteAt(b, p.at)
	p.at += int64(n)
	return err
}

func (p *plain) member(ctx context.Context, m member, sum *sum) error {
	if m.name == p.base {
		p.at += m.size
		p.report(p.at)
		return nil
	}
	pieces, src, err := m.open()
	if err != nil {
		return err
	}
	defer src.Close()
	free := func(int64) {}
	if !m.composed && !p.can.insert && !p.can.clone {
		free = freer(src, sum)
	}
	for _, piece := range pieces {
		if err := p.copyPiece(ctx, piece, free); err != nil {
			return err
		}
	}
	return m.unchanged(src)
}

// copyPiece appends a piece of a file. free is told how much of it is in the archive.
func (p *plain) copyPiece(ctx context.Context, piece Segment, free func(done int64)) error {
	canClone := p.can.clone
	for done := int64(0); done < piece.Length; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(piece.Length-done, copyChunk)
		next := Segment{File: piece.File, Offset: piece.Offset + done, Length: n}
		if canClone && (next.Offset-p.at)&(p.can.block-1) == 0 {
			ahead := -p.at & (p.can.block - 1) // to where blocks begin
			if next.Length = n &^ (p.can.block - 1); ahead == 0 && next.Length > 0 {
				err := clone(p.file, p.at, next)
				if err == nil {
					p.at += next.Length
					done += next.Length
					p.report(p.at)
					continue
				}
				if !notPossible(err) {
					return err
				}
				canClone = false
			}
			if next.Length = n; ahead > 0 {
				next.Length = min(n, ahead)
			}
		}
		copied, err := p.copyRange(next)
		// Start writing to disk now, so that the sync at the end has less to do.
		// Only a hint: an error shows up in that sync.
		_ = unix.SyncFileRange(int(p.file.Fd()), p.at, copied, unix.SYNC_FILE_RANGE_WRITE)
		p.at += copied
		done += copied
		switch {
		case err != nil:
			return err
		case copied == 0:
			return shrank(nil, piece.Length-done)
		}
		free(done)
		p.report(p.at)
	}
	return nil
}

// clone lets a file share a piece of another, or of itself, at offset. All of it is in whole blocks.
func clone(to *os.File, offset int64, piece Segment) error {
	err := unix.IoctlFileCloneRange(int(to.Fd()), &unix.FileCloneRange{
		Src_fd: int64(piece.File.Fd()), Src_offset: uint64(piece.Offset), Src_length: uint64(piece.Length), Dest_offset: uint64(offset),
	})
	if err != nil {
		return &os.PathError{Op: "clone", Path: to.Name(), Err: err}
	}
	return nil
}

// notPossible tells that two files cannot share blocks, or the kernel cannot copy between them, from an error of the disk.
func notPossible(err error) bool {
	for _, no := range []error{unix.EXDEV, unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP, unix.ENOTTY, unix.EPERM} {
		if errors.Is(err, no) {
			return true
		}
	}
	return false
}

// copyRange copies up to piece.Length bytes to p.at, in the kernel where it can. It returns how many it has copied: 0 at
// the end of the file.
func (p *plain) copyRange(piece Segment) (int64, error) {
	source, target := piece.Offset, p.at
	n, err := unix.CopyFileRange(int(piece.File.Fd()), &source, int(p.file.Fd()), &target, int(piece.Length), 0)
	if err == nil && n > 0 {
		return int64(n), nil
	}
	if err != nil && !notPossible(err) {
		return 0, &os.PathError{Op: "copy_file_range", Path: p.file.Name(), Err: err}
	}
	// Two file systems, or one that the kernel cannot do it on, or says so by copying nothing.
	if p.chunk == nil {
		p.chunk = make([]byte, 1<<20)
	}
	return io.CopyBuffer(io.NewOffsetWriter(p.file, p.at), io.NewSectionReader(piece.File, piece.Offset, piece.Length), p.chunk)
}

// freer returns a function that gives back the room of a staged file's first bytes: of those that are in the archive and that sum,
// if not nil, has read. It waits for sum, which thus is never far behind.
func freer(f *os.File, sum *sum) func(done int64) {
	freed := int64(0)
	return func(done int64) {
		for freed+copyChunk <= done {
			if sum != nil {
				sum.next()
			}
			// A file system without holes needs the room until the file is deleted.
			_ = unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, freed, copyChunk)
			freed += copyChunk
		}
	}
}

func (p *plain) end() error {
	info, err := p.file.Stat()
	if err != nil {
		return err
	}
	if info.Size() != p.at {
		return fmt.Errorf("archive of %d bytes has %d in its file", p.at, info.Size())
	}
	p.report(p.at)
	return nil
}
