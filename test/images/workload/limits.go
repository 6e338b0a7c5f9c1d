package main

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"syscall"
	"unsafe"
)

// limit sets up what CRIU cannot dump, or hardly, and then counts. What it opens stays open until it ends.
//
//	mptcp               listens by MPTCP
//	vsock               has a socket of a kind that few know
//	unix NETWORK PATH   is connected to the unix socket PATH, as NETWORK (unix or unixgram) has it
//	inotify DIR         watches a directory, changes it at each step, and expects to hear of that
//	inotify-deleted     watches a file that was deleted and is open
//	io-uring            has a ring
//	sysv-shm            has a segment of System V shared memory attached
//	userfaultfd         has a descriptor for the page faults of its own
//	open PATH           has a file or device open
//	link PATH           has a file open by a name that was deleted, of which PATH is another, and expects to have the same one
//	deleted SIZE        has a deleted file of so many bytes open
//	user-namespace      has a child in a user namespace that it has made
//	vfork               has a child that has its place, and so is in uninterruptible sleep
//	page-fault          has the kernel wait for memory that never comes, and so cannot be stopped
func limit(args []string) error {
	kinds := map[string]func(args []string) (check func() error, err error){
		"mptcp": listenMPTCP, "vsock": vsock, "unix": dialUnix, "inotify": watch, "inotify-deleted": watchDeleted, "io-uring": ring,
		"userfaultfd": userfaultfd,
		"sysv-shm":    attach, "open": openDevice, "link": openLink, "deleted": openDeleted, "user-namespace": newUserNamespace,
		"vfork": vfork, "page-fault": pageFault,
	}
	if len(args) == 0 || kinds[args[0]] == nil {
		return fmt.Errorf("usage: workload limit KIND [ARGUMENT…]; kinds are %q", slices.Sorted(maps.Keys(kinds)))
	}
	check, err := kinds[args[0]](args[1:])
	if err != nil {
		return fmt.Errorf("%s: %w", args[0], err)
	}
	return count(check)
}

func nothing() error { return nil }

// argument returns the n-th argument, or an error that asks for it.
func argument(args []string, n int) (string, error) {
	if len(args) <= n {
		return "", fmt.Errorf("argument %d is missing", n+1)
	}
	return args[n], nil
}

func listenMPTCP([]string) (func() error, error) {
	var config net.ListenConfig
	config.SetMultipathTCP(true)
	listener, err := config.Listen(context.Background(), "tcp", "127.0.0.1:0")
	return func() error { _ = listener.Addr(); return nil }, err
}

func vsock([]string) (func() error, error) {
	const family = 40 // AF_VSOCK
	_, err := syscall.Socket(family, syscall.SOCK_STREAM, 0)
	return nothing, err
}

func dialUnix(args []string) (func() error, error) {
	path, err := argument(args, 1)
	if err != nil {
		return nil, err
	}
	conn, err := net.Dial(args[0], path)
	return func() error { _ = conn.LocalAddr(); return nil }, err
}

func watch(args []string) (func() error, error) {
	dir, err := argument(args, 0)
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	fd, err := syscall.InotifyInit1(syscall.IN_NONBLOCK)
	if err != nil {
		return nil, err
	}
	if _, err := syscall.InotifyAddWatch(fd, dir, syscall.IN_CREATE); err != nil {
		return nil, err
	}
	events := make([]byte, 4096)
	hear := func() error {
		name := filepath.Join(dir, "event")
		if err := os.WriteFile(name, nil, 0o600); err != nil {
			return err
		}
		_, err := syscall.Read(fd, events)
		return errors.Join(err, os.Remove(name))
	}
	return func() error {
		err := hear()
		if errors.Is(err, syscall.EAGAIN) {
			// CRIU keeps the watch, and not the events that wait to be read: one may have been lost by a dump in between.
			err = hear()
		}
		return err
	}, nil
}

func watchDeleted([]string) (func() error, error) {
	file, err := newFile("/tmp/watched")
	if err != nil {
		return nil, err
	}
	fd, err := syscall.InotifyInit()
	if err != nil {
		return nil, err
	}
	if _, err := syscall.InotifyAddWatch(fd, file.Name(), syscall.IN_MODIFY); err != nil {
		return nil, err
	}
	return use(file), os.Remove(file.Name())
}

func newFile(path string) (*os.File, error) {
	return os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
}

// use keeps a file from being closed.
func use(file *os.File) func() error {
	return func() error {
		_, err := file.Stat()
		return err
	}
}

func ring([]string) (func() error, error) {
	const setup = 425        // io_uring_setup(2), on every architecture that Go knows
	var parameters [120]byte // struct io_uring_params
	if _, _, errno := syscall.Syscall(setup, 4, uintptr(unsafe.Pointer(&parameters)), 0); errno != 0 {
		return nil, errno
	}
	return nothing, nil
}

func attach([]string) (func() error, error) {
	const private, create, size = 0, 0o1000, 1 << 16
	id, _, errno := syscall.Syscall(syscall.SYS_SHMGET, private, size, create|0o600)
	if errno != 0 {
		return nil, fmt.Errorf("shmget: %w", errno)
	}
	if _, _, errno := syscall.Syscall(syscall.SYS_SHMAT, id, 0, 0); errno != 0 {
		return nil, fmt.Errorf("shmat: %w", errno)
	}
	const remove = 0 // IPC_RMID, which waits for the last one to detach
	if _, _, errno := syscall.Syscall(syscall.SYS_SHMCTL, id, remove, 0); errno != 0 {
		return nil, fmt.Errorf("shmctl: %w", errno)
	}
	return nothing, nil
}

func openDevice(args []string) (func() error, error) {
	path, err := argument(args, 0)
	if err != nil {
		return nil, err
	}
	// Not by package os, which would wait for the device to be ready.
	_, err = syscall.Open(path, syscall.O_RDWR, 0)
	return nothing, err
}

func openLink(args []string) (func() error, error) {
	path, err := argument(args, 0)
	if err != nil {
		return nil, err
	}
	file, err := newFile(filepath.Join(filepath.Dir(path), "deleted"))
	if err != nil {
		return nil, err
	}
	if err := os.Link(file.Name(), path); err != nil {
		return nil, err
	}
	return func() error {
		opened, err := file.Stat()
		if err != nil {
			return err
		}
		named, err := os.Stat(path)
		if err != nil {
			return err
		}
		if links := opened.Sys().(*syscall.Stat_t).Nlink; links != 1 || !os.SameFile(opened, named) {
			return fmt.Errorf("the file that is open has %d names, and %s is not one of them", links, path)
		}
		return nil
	}, os.Remove(file.Name())
}

func openDeleted(args []string) (func() error, error) {
	text, err := argument(args, 0)
	if err != nil {
		return nil, err
	}
	var size int64
	if _, err := fmt.Sscan(text, &size); err != nil {
		return nil, err
	}
	file, err := newFile("/tmp/deleted")
	if err != nil {
		return nil, err
	}
	if err := syscall.Fallocate(int(file.Fd()), 0, 0, size); err != nil {
		return nil, fmt.Errorf("fallocate: %w", err)
	}
	return use(file), os.Remove(file.Name())
}

func newUserNamespace([]string) (func() error, error) {
	// A process of several threads, as all of Go's are, cannot do so itself.
	_, err := syscall.ForkExec("/bin/sleep", []string{"sleep", "infinity"}, &syscall.ProcAttr{
		Files: []uintptr{0, 1, 2},
		Sys: &syscall.SysProcAttr{
			Cloneflags:  syscall.CLONE_NEWUSER,
			UidMappings: []syscall.SysProcIDMap{{Size: 1}},
			GidMappings: []syscall.SysProcIDMap{{Size: 1}},
		},
	})
	return nothing, err
}

func vfork([]string) (func() error, error) {
	go func() {
		pid, _, _ := syscall.RawSyscall6(syscall.SYS_CLONE, syscall.CLONE_VFORK|uintptr(syscall.SIGCHLD), 0, 0, 0, 0, 0)
		for pid == 0 { // the child: a copy of this process with one thread, which can do nothing but system calls
			syscall.RawSyscall(syscall.SYS_PPOLL, 0, 0, 0)
		}
	}()
	return nothing, nil
}

func userfaultfd([]string) (func() error, error) {
	const userModeOnly = 1 // UFFD_USER_MODE_ONLY, which needs no privilege
	if _, _, errno := syscall.Syscall(sysUserfaultfd, userModeOnly, 0, 0); errno != 0 {
		return nil, errno
	}
	return nothing, nil
}

// pageFault uses userfaultfd(2): the kernel reads memory for which it waits for somebody to provide it.
func pageFault([]string) (func() error, error) {
	const (
		api      = 0xc018aa3f // UFFDIO_API
		register = 0xc020aa00 // UFFDIO_REGISTER
		missing  = 1          // UFFDIO_REGISTER_MODE_MISSING
	)
	fd, _, errno := syscall.Syscall(sysUserfaultfd, 0, 0, 0)
	if errno != 0 {
		return nil, fmt.Errorf("userfaultfd: %w", errno)
	}
	hello := [3]uint64{0xaa} // struct uffdio_api
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, api, uintptr(unsafe.Pointer(&hello))); errno != 0 {
		return nil, fmt.Errorf("UFFDIO_API: %w", errno)
	}
	page, err := syscall.Mmap(-1, 0, os.Getpagesize(), syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	rest := [4]uint64{uint64(uintptr(unsafe.Pointer(&page[0]))), uint64(len(page)), missing} // struct uffdio_register
	if _, _, errno := syscall.Syscall(syscall.SYS_IOCTL, fd, register, uintptr(unsafe.Pointer(&rest))); errno != 0 {
		return nil, fmt.Errorf("UFFDIO_REGISTER: %w", errno)
	}
	var pipe [2]int
	if err := syscall.Pipe(pipe[:]); err != nil {
		return nil, err
	}
	go syscall.Write(pipe[1], page)
	return nothing, nil
}
