package main

// Numbers of system calls that package syscall lacks on this machine, or on another.
const (
	sysMemfdCreate = 319
	sysUserfaultfd = 323
)
