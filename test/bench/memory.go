package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory is free memory of which a virtual machine's host cannot take anything back as long as it is held.
//
// What a machine has freed its host may take (virtio-balloon's free page reporting, Linux 5.7), and has to give again when it is written to, page by page:
// CRIU's copying into the page cache then takes four times as long. Whom that meets depends on what was freed when, not on who checkpoints. The kernel
// reports free blocks of 2 MiB and more, so that there are to be none: of each block one page is held. It is held by a pipe, since pages that nobody but
// a process has are moved together sooner or later.
type memory struct {
	pipes []*os.File
}

const (
	hugePage = 2 << 20
	// spared is what nobody takes from others for the moment in which memory is touched.
	spared = 1 << 30
)

// holdMemory touches free memory, at most so many bytes, and frees it again but for one page in 512.
func holdMemory(ctx context.Context, most int) (_ *memory, err error) {
	h := &memory{}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("hold memory: %w", err), h.close())
		}
	}()
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return nil, err
	}
	size := min(most, int(info.Freeram)*int(info.Unit)-spared) &^ (hugePage - 1)
	if size <= 0 {
		return h, nil
	}
	start := time.Now()
	touched, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(touched)) }()
	// A page out of a huge one would hold all of it.
	if err := unix.Madvise(touched, unix.MADV_NOHUGEPAGE); err != nil && err != unix.EINVAL { // a kernel without huge pages
		return nil, err
	}
	for at := 0; at < size; at += hugePage {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := unix.Madvise(touched[at:at+hugePage], unix.MADV_POPULATE_WRITE); err != nil { // Linux 5.14
			return nil, err
		}
		if err := h.hold(touched[at : at+os.Getpagesize()]); err != nil {
			return nil, err
		}
	}
	say("Touched %d MiB of free memory in %.1f s", size>>20, time.Since(start).Seconds())
	return h, nil
}

// hold has a pipe keep a page.
func (h *memory) hold(page []byte) error {
	piece := []unix.Iovec{{Base: unsafe.SliceData(page), Len: uint64(len(page))}}
	for fresh := false; ; {
		if len(h.pipes) > 0 {
			n, err := unix.Vmsplice(int(h.pipes[len(h.pipes)-1].Fd()), piece, unix.SPLICE_F_NONBLOCK)
			switch {
			case err == nil && n == len(page):
				return nil
			case err != nil && err != unix.EAGAIN, fresh:
				return fmt.Errorf("splice %d of %d bytes of memory into a pipe: %w", n, len(page), err)
			}
		}
		ends := make([]int, 2)
		if err := unix.Pipe2(ends, unix.O_CLOEXEC); err != nil {
			return os.NewSyscallError("pipe2", err)
		}
		h.pipes, fresh = append(h.pipes, os.NewFile(uintptr(ends[0]), "pipe"), os.NewFile(uintptr(ends[1]), "pipe")), true
	}
}

// close gives it back.
func (h *memory) close() error {
	var errs []error
	for _, f := range h.pipes {
		errs = append(errs, f.Close())
	}
	h.pipes = nil
	return errors.Join(errs...)
}
