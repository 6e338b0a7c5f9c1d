package main

import (
	"fmt"
	"syscall"
)

func fcntl(fd int, command, argument uintptr) (int, error) {
	value, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), command, argument)
	if errno != 0 {
		return 0, errno
	}
	return int(value), nil
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }
