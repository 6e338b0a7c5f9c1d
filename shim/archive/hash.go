package archive

import (
	"cmp"
	"fmt"
	"hash"
	"io"
	"os"
	"runtime/debug"

	"golang.org/x/sys/unix"
)

const (
	// hashWindow is how much of a file is mapped at once.
	hashWindow = 1 << 20
	// hashBuffer is what is read at once where a file cannot be mapped, or is too short for that to be worth while.
	hashBuffer = 256 << 10
)

// A hasher feeds files to a hash. To read a file is to copy it first, which takes an eighth of what SHA-256 takes, so that it is mapped where
// that can be. It is for one goroutine.
type hasher struct {
	hash.Hash
	buffer []byte // for what is read
}

// add takes in a piece of a file, of at most hashWindow, and returns how much: less only with an error, which is io.EOF where the file is shorter.
// After that the hash is of no use.
func (h *hasher) add(piece Segment) (int64, error) {
	if piece.Length > hashBuffer {
		mapped, err := h.addMapped(piece)
		switch {
		case err != nil:
			// The kernel tells what is wrong to who reads.
			n, readErr := h.copy(io.Discard, piece)
			return n, cmp.Or(readErr, err)
		case mapped:
			return piece.Length, nil
		}
	}
	return h.copy(h.Hash, piece)
}

// addMapped says whether the file can be mapped. An access to what is not there or cannot be read is an error: SIGBUS.
func (h *hasher) addMapped(piece Segment) (mapped bool, err error) {
	before := piece.Offset % int64(os.Getpagesize())
	memory, err := unix.Mmap(int(piece.File.Fd()), piece.Offset-before, int(before+piece.Length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return false, nil
	}
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		_ = unix.Munmap(memory) // which Mmap has returned
		switch p := recover().(type) {
		case nil:
		case interface{ Addr() uintptr }: // a fault, see SetPanicOnFault
			err = fmt.Errorf("access %s at byte %d: %w", piece.File.Name(), piece.Offset, unix.EIO)
		default:
			panic(p)
		}
	}()
	h.Write(memory[before:])
	// What is behind the end in its last page is no fault, but zeros.
	if info, err := piece.File.Stat(); err != nil || info.Size() < piece.Offset+piece.Length {
		return true, cmp.Or(err, io.EOF)
	}
	return true, nil
}

// copy reads a piece, of any length, and passes on what it returns, also with an error.
func (h *hasher) copy(to io.Writer, piece Segment) (int64, error) {
	if need := min(hashBuffer, piece.Length); int64(len(h.buffer)) < need { // a checkpoint has many small files
		h.buffer = make([]byte, need)
	}
	done := int64(0)
	for done < piece.Length {
		n, err := piece.File.ReadAt(h.buffer[:min(int64(len(h.buffer)), piece.Length-done)], piece.Offset+done)
		_, _ = to.Write(h.buffer[:n]) // a hash's never fails
		done += int64(n)
		if err != nil && done < piece.Length {
			return done, err
		}
	}
	return done, nil
}
