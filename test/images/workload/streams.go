package main

import (
	"fmt"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// stdin is the standard input: its state is what it is and what was read from it.
func stdin(string) (func() (string, error), error) {
	var read atomic.Value
	read.Store("nothing yet")
	go func() {
		for buffer := make([]byte, 1000); ; {
			n, err := syscall.Read(0, buffer)
			if err == syscall.EINTR {
				continue
			}
			if err != nil || n == 0 {
				read.Store(fmt.Sprintf("its end, %v", err))
				return
			}
			read.Store(strings.TrimSpace(string(buffer[:n])))
		}
	}()
	return func() (string, error) {
		var stat syscall.Stat_t
		err := syscall.Fstat(0, &stat)
		return fmt.Sprintf("type %o, %s was read", stat.Mode&syscall.S_IFMT, read.Load()), err
	}, nil
}

// terminal is the standard streams' terminal.
func terminal(string) (func() (string, error), error) {
	return func() (string, error) {
		var states []string
		for fd := range 3 {
			target, err := os.Readlink(fdPath(fd))
			if err != nil {
				return "", err
			}
			var attributes syscall.Termios
			if _, err := newFd(syscall.SYS_IOCTL, uintptr(fd), syscall.TCGETS, uintptr(unsafe.Pointer(&attributes)), 0); err != nil {
				return "", fmt.Errorf("ask terminal %s: %w", target, err)
			}
			states = append(states, fmt.Sprintf("%s %x %x %x %x", target, attributes.Iflag, attributes.Oflag, attributes.Cflag, attributes.Lflag))
		}
		_, fields, err := stat(os.Getpid())
		return fmt.Sprintf("%s; session %s, terminal %s of group %s", strings.Join(states, ", "), fields[3], fields[4], fields[5]), err
	}, nil
}

// lines writes a line every 10 ms, and tells whether it goes on.
func lines(string) (func() (string, error), error) {
	var written atomic.Int64
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			fmt.Printf("line %d\n", written.Add(1))
		}
	}()
	return func() (string, error) {
		before := written.Load()
		return wait("it goes on", func() bool { return written.Load() > before }), nil
	}, nil
}
