package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

func fcntl(fd int, command, argument uintptr) (int, error) {
	value, _, errno := syscall.Syscall(syscall.SYS_FCNTL, uintptr(fd), command, argument)
	if errno != 0 {
		return 0, errno
	}
	return int(value), nil
}

func fdPath(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// fdinfo is what the kernel says of a descriptor, by key. Keys that come more than once are numbered.
func fdinfo(fd int) (map[string]string, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", fd))
	if err != nil {
		return nil, err
	}
	info := map[string]string{}
	for line := range strings.Lines(string(content)) {
		key, value, _ := strings.Cut(line, ":")
		for n := 2; info[key] != ""; n++ {
			key = fmt.Sprintf("%s %d", strings.Fields(key)[0], n)
		}
		info[key] = strings.Join(strings.Fields(value), " ")
	}
	return info, nil
}

// say picks keys out of a descriptor's fdinfo.
func say(fd int, keys ...string) (string, error) {
	info, err := fdinfo(fd)
	if err != nil {
		return "", err
	}
	var all []string
	for _, key := range slices.Sorted(maps.Keys(info)) {
		if slices.Contains(keys, strings.Fields(key)[0]) {
			all = append(all, key+" "+info[key])
		}
	}
	return strings.Join(all, ", "), nil
}

// newFd makes a descriptor by a system call.
func newFd(number, a, b, c, d uintptr) (int, error) {
	fd, _, errno := syscall.Syscall6(number, a, b, c, d, 0, 0)
	if errno != 0 {
		return 0, errno
	}
	return int(fd), nil
}

// buffered reads what is in a pipe and leaves it there.
func buffered(fd int) (string, error) {
	var copied [2]int
	if err := syscall.Pipe2(copied[:], syscall.O_CLOEXEC|syscall.O_NONBLOCK); err != nil {
		return "", err
	}
	defer syscall.Close(copied[0])
	defer syscall.Close(copied[1])
	const nonBlocking = 2
	if _, err := syscall.Tee(fd, copied[1], 64<<10, nonBlocking); err != nil {
		return "", fmt.Errorf("look into pipe: %w", err)
	}
	content := make([]byte, 64<<10)
	n, err := syscall.Read(copied[0], content)
	return sum(content[:max(n, 0)]), err
}

// pipes are one with data in it, one that is full, one that nobody reads, and a FIFO with data in it.
func pipes(string) (func() (string, error), error) {
	var some, full, broken [2]int
	for _, pipe := range []*[2]int{&some, &full, &broken} {
		if err := syscall.Pipe2(pipe[:], syscall.O_NONBLOCK|syscall.O_CLOEXEC); err != nil {
			return nil, err
		}
	}
	data := make([]byte, 10000)
	noise(data, 10)
	if _, err := syscall.Write(some[1], data); err != nil {
		return nil, err
	}
	const setSize = 1031
	if _, err := fcntl(full[1], setSize, 16<<10); err != nil {
		return nil, err
	}
	for {
		if _, err := syscall.Write(full[1], data); err == syscall.EAGAIN {
			break
		} else if err != nil {
			return nil, err
		}
	}
	if err := syscall.Close(broken[0]); err != nil {
		return nil, err
	}
	const name = "/var/fifo"
	if err := syscall.Mkfifo(name, 0o600); err != nil {
		return nil, err
	}
	fifo, err := syscall.Open(name, syscall.O_RDWR|syscall.O_NONBLOCK|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	if _, err := syscall.Write(fifo, data[:1000]); err != nil {
		return nil, err
	}
	return func() (string, error) {
		var states []string
		for _, fd := range []int{some[0], full[0], fifo} {
			content, err := buffered(fd)
			if err != nil {
				return "", err
			}
			states = append(states, content)
		}
		_, err := syscall.Write(full[1], data)
		states = append(states, fmt.Sprint("more: ", err))
		_, err = syscall.Write(broken[1], data)
		states = append(states, fmt.Sprint("unread: ", err))
		size, err := fcntl(full[1], 1032, 0)
		return strings.Join(append(states, fmt.Sprint("size ", size)), ", "), err
	}, nil
}

// eventfd has a count.
func eventfd(string) (func() (string, error), error) {
	fd, err := newFd(syscall.SYS_EVENTFD2, 40, syscall.O_NONBLOCK, 0, 0)
	return sayAll([]int{fd}, "flags", "eventfd-count"), err
}

// semaphore is an eventfd of which each reader takes one.
func semaphore(string) (func() (string, error), error) {
	const flag = 1
	fd, err := newFd(syscall.SYS_EVENTFD2, 40, flag, 0, 0)
	return sayAll([]int{fd}, "flags", "eventfd-count", "eventfd-semaphore"), err
}

func sayAll(fds []int, keys ...string) func() (string, error) {
	return func() (string, error) {
		var all []string
		for _, fd := range fds {
			state, err := say(fd, keys...)
			if err != nil {
				return "", err
			}
			all = append(all, state)
		}
		return strings.Join(all, "; "), nil
	}
}

// epoll watches an eventfd that is ready and a pipe that is not, and is itself watched.
func epoll(string) (func() (string, error), error) {
	ready, err := newFd(syscall.SYS_EVENTFD2, 1, 0, 0, 0)
	if err != nil {
		return nil, err
	}
	var pipe [2]int
	if err := syscall.Pipe2(pipe[:], syscall.O_CLOEXEC); err != nil {
		return nil, err
	}
	inner, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	outer, err := syscall.EpollCreate1(syscall.EPOLL_CLOEXEC)
	if err != nil {
		return nil, err
	}
	for _, watch := range []struct{ epoll, fd, events, data int }{
		{inner, ready, syscall.EPOLLIN, 7}, {inner, pipe[0], syscall.EPOLLIN | syscall.EPOLLONESHOT, 8}, {outer, inner, syscall.EPOLLIN, 9},
	} {
		event := syscall.EpollEvent{Events: uint32(watch.events), Fd: int32(watch.data)}
		if err := syscall.EpollCtl(watch.epoll, syscall.EPOLL_CTL_ADD, watch.fd, &event); err != nil {
			return nil, err
		}
	}
	return func() (string, error) {
		var states []string
		for _, fd := range []int{inner, outer} {
			info, err := fdinfo(fd)
			if err != nil {
				return "", err
			}
			var targets []string
			for key, value := range info {
				// Descriptor, events and data; then position and inode, which is a new one after a restore.
				if fields := strings.Fields(value); strings.HasPrefix(key, "tfd") {
					targets = append(targets, strings.Join(fields[:min(len(fields), 5)], " "))
				}
			}
			slices.Sort(targets)
			states = append(states, targets...)
			events := make([]syscall.EpollEvent, 4)
			n, err := syscall.EpollWait(fd, events, 0)
			if err != nil {
				return "", err
			}
			for _, event := range events[:n] {
				states = append(states, fmt.Sprintf("%d has %d", event.Fd, event.Events))
			}
		}
		return strings.Join(states, "; "), nil
	}, nil
}

// signalfd is for two signals.
func signalfd(string) (func() (string, error), error) {
	mask := uint64(1)<<(syscall.SIGWINCH-1) | 1<<(40-1)
	fd, err := newFd(syscall.SYS_SIGNALFD4, ^uintptr(0), uintptr(unsafe.Pointer(&mask)), 8, syscall.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		state, err := say(fd, "flags", "sigmask")
		_, readErr := syscall.Read(fd, make([]byte, 128))
		return fmt.Sprintf("%s, reading it: %v", state, readErr), err
	}, nil
}

// timerfd is one that is armed for an hour, one that ticks each second, and one that is not armed.
func timerfd(string) (func() (string, error), error) {
	hour, err := newTimerfd(1, time.Hour, 2*time.Hour)
	if err != nil {
		return nil, err
	}
	second, err := newTimerfd(7, time.Second, time.Second)
	if err != nil {
		return nil, err
	}
	off, err := newTimerfd(0, 0, 0)
	if err != nil {
		return nil, err
	}
	var ticks atomic.Int64
	go func() {
		for {
			if _, err := readTicks(second); err == nil {
				ticks.Add(1)
			}
		}
	}()
	return func() (string, error) {
		var states []string
		for _, fd := range []int{hour, second, off} {
			info, err := fdinfo(fd)
			if err != nil {
				return "", err
			}
			state := fmt.Sprintf("clock %s, interval %s", info["clockid"], info["it_interval"])
			if fd != second {
				state += ", " + armed(info["it_value"])
			}
			states = append(states, state)
		}
		before := ticks.Load()
		return strings.Join(states, "; ") + "; " + wait("it ticks", func() bool { return ticks.Load() > before }), nil
	}, nil
}

// due is a timerfd that ticks and that nobody reads.
func due(string) (func() (string, error), error) {
	fd, err := newTimerfd(1, 10*time.Millisecond, 10*time.Millisecond)
	return func() (string, error) {
		if _, err := readTicks(fd); err != nil {
			return "", err
		}
		state := "ticked, " + wait("it ticks", func() bool {
			info, err := fdinfo(fd)
			return err == nil && info["ticks"] != "0"
		})
		return state, nil
	}, err
}

func newTimerfd(clock int, value, interval time.Duration) (int, error) {
	fd, err := newFd(syscall.SYS_TIMERFD_CREATE, uintptr(clock), 0, 0, 0)
	if err != nil {
		return 0, err
	}
	spec := [2]syscall.Timespec{syscall.NsecToTimespec(int64(interval)), syscall.NsecToTimespec(int64(value))}
	_, err = newFd(syscall.SYS_TIMERFD_SETTIME, uintptr(fd), 0, uintptr(unsafe.Pointer(&spec)), 0)
	return fd, err
}

func readTicks(fd int) (uint64, error) {
	ticks := make([]byte, 8)
	_, err := syscall.Read(fd, ticks)
	return binary.NativeEndian.Uint64(ticks), err
}

// armed says how a timer stands, of which the kernel says "(SECONDS, NANOSECONDS)". An hour is never over in a test.
func armed(value string) string {
	var seconds, nanoseconds int64
	if _, err := fmt.Sscanf(value, "(%d, %d)", &seconds, &nanoseconds); err != nil {
		return value
	}
	left := time.Duration(seconds)*time.Second + time.Duration(nanoseconds)
	switch {
	case left == 0:
		return "not armed"
	case left > 30*time.Minute && left < time.Hour+time.Second: // they are counted in ticks of the kernel
		return "armed for an hour"
	}
	return "armed for " + left.String()
}

// wait gives what happens within 10 seconds as a verdict.
func wait(what string, happens func() bool) string {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		if happens() {
			return what
		}
	}
	return "not: " + what
}

// files are open ones: with a position, flags and numbers of their own, duplicates that share a position, a directory.
func files(string) (func() (string, error), error) {
	const name = "/var/open"
	content := make([]byte, 10000)
	noise(content, 11)
	if err := os.WriteFile(name, content, 0o600); err != nil {
		return nil, err
	}
	fd, err := syscall.Open(name, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	shared, err := syscall.Dup(fd)
	if err != nil {
		return nil, err
	}
	if _, err := syscall.Seek(fd, 4711, 0); err != nil {
		return nil, err
	}
	appending, err := syscall.Open(name, syscall.O_WRONLY|syscall.O_APPEND|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	const high = 1000
	if err := syscall.Dup3(appending, high, syscall.O_CLOEXEC); err != nil {
		return nil, err
	}
	// With O_DIRECTORY CRIU would open it without: a flag that means nothing afterwards.
	directory, err := syscall.Open("/lower", syscall.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	const pathOnly = 0o10000000
	path, err := syscall.Open("/lower/changed", pathOnly, 0)
	if err != nil {
		return nil, err
	}
	null, err := syscall.Open("/dev/null", syscall.O_WRONLY, 0)
	if err != nil {
		return nil, err
	}
	proc, err := syscall.Open("/proc/self/status", syscall.O_RDONLY, 0)
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		var states []string
		for _, fd := range []int{fd, shared, appending, high, directory, path, null, proc} {
			state, err := say(fd, "pos", "flags")
			if err != nil {
				return "", err
			}
			target, err := os.Readlink(fdPath(fd))
			if err != nil {
				return "", err
			}
			states = append(states, fmt.Sprintf("%d %s %s", fd, target, state))
		}
		// A duplicate's position is the same one, not one that is equal.
		if _, err := syscall.Seek(shared, 17, 1); err != nil {
			return "", err
		}
		moved, err := syscall.Seek(fd, -17, 1)
		return strings.Join(append(states, fmt.Sprint("shared at ", moved)), "; "), err
	}, nil
}

// locks are one of each kind: flock, fcntl of a process on ranges, and fcntl of an open file.
func locks(string) (func() (string, error), error) {
	const setLock, setOpenFileLock = syscall.F_SETLK, 37
	var fds []int
	for i, lock := range []func(fd int) error{
		func(fd int) error { return syscall.Flock(fd, syscall.LOCK_EX) },
		func(fd int) error { return syscall.Flock(fd, syscall.LOCK_SH) },
		func(fd int) error {
			return errors.Join(lockRange(fd, setLock, syscall.F_WRLCK, 100, 50), lockRange(fd, setLock, syscall.F_RDLCK, 400, 0))
		},
		func(fd int) error { return lockRange(fd, setOpenFileLock, syscall.F_WRLCK, 10, 20) },
	} {
		fd, err := syscall.Open(fmt.Sprintf("/var/locked-%d", i), syscall.O_RDWR|syscall.O_CREAT|syscall.O_CLOEXEC, 0o600)
		if err != nil {
			return nil, err
		}
		if err := lock(fd); err != nil {
			return nil, fmt.Errorf("lock %d: %w", i, err)
		}
		fds = append(fds, fd)
	}
	return func() (string, error) {
		var states []string
		for _, fd := range fds {
			info, err := fdinfo(fd)
			if err != nil {
				return "", err
			}
			var held []string
			for key, value := range info {
				// Number, kind, mode, type, process, device and inode, first and last byte.
				if fields := strings.Fields(value); strings.HasPrefix(key, "lock") && len(fields) == 8 {
					held = append(held, strings.Join(append(slices.Clone(fields[1:4]), fields[6:]...), " "))
				}
			}
			if held == nil {
				held = []string{"no lock"}
			}
			slices.Sort(held)
			states = append(states, strings.Join(held, ", "))
		}
		return strings.Join(states, "; "), nil
	}, nil
}

func lockRange(fd int, command uintptr, kind int16, start, length int64) error {
	lock := syscall.Flock_t{Type: kind, Start: start, Len: length}
	_, err := fcntl(fd, command, uintptr(unsafe.Pointer(&lock)))
	return err
}

// ptys are pseudoterminals: one that this process has both ends of, and one that is the terminal of a session.
func ptys(string) (func() (string, error), error) {
	master, slave, err := openPty()
	if err != nil {
		return nil, err
	}
	const setSize, getSize = syscall.TIOCSWINSZ, syscall.TIOCGWINSZ
	size := [4]uint16{33, 99}
	if _, err := newFd(syscall.SYS_IOCTL, uintptr(slave), setSize, uintptr(unsafe.Pointer(&size)), 0); err != nil {
		return nil, err
	}
	// Echoed, and read by lines.
	terminal, terminalSlave, err := openPty()
	if err != nil {
		return nil, err
	}
	session, err := syscall.ForkExec("/proc/self/exe", []string{"workload", "part", "nothing", ""}, &syscall.ProcAttr{
		Env: os.Environ(), Files: []uintptr{uintptr(terminalSlave), uintptr(terminalSlave), uintptr(terminalSlave)},
		Sys: &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0},
	})
	if err != nil {
		return nil, err
	}
	if got, err := readUntil(terminal, "ready\r\n"); err != nil {
		return nil, fmt.Errorf("start session: it says %q: %w", got, err)
	}
	return func() (string, error) {
		var size [4]uint16
		if _, err := newFd(syscall.SYS_IOCTL, uintptr(master), getSize, uintptr(unsafe.Pointer(&size)), 0); err != nil {
			return "", err
		}
		if _, err := syscall.Write(master, []byte("typed\n")); err != nil {
			return "", err
		}
		echo, err := readUntil(master, "typed\r\n")
		if err != nil {
			return "", err
		}
		line := make([]byte, 100)
		n, err := syscall.Read(slave, line)
		if err != nil {
			return "", err
		}
		if _, err := syscall.Write(terminal, []byte("state\n")); err != nil {
			return "", err
		}
		answer, err := readUntil(terminal, "here\r\n")
		if err != nil {
			return "", err
		}
		_, fields, err := stat(session)
		if err != nil {
			return "", err
		}
		return fmt.Sprintf("%d by %d, echoes %q, reads %q; session %s on terminal %s of group %s: %q",
			size[0], size[1], echo, line[:n], fields[3], fields[4], fields[5], answer), nil
	}, nil
}

func openPty() (master, slave int, err error) {
	const unlock, getNumber = syscall.TIOCSPTLCK, syscall.TIOCGPTN
	if master, err = syscall.Open("/dev/ptmx", syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0); err != nil {
		return 0, 0, err
	}
	var zero, number int32
	if _, err := newFd(syscall.SYS_IOCTL, uintptr(master), unlock, uintptr(unsafe.Pointer(&zero)), 0); err != nil {
		return 0, 0, err
	}
	if _, err := newFd(syscall.SYS_IOCTL, uintptr(master), getNumber, uintptr(unsafe.Pointer(&number)), 0); err != nil {
		return 0, 0, err
	}
	slave, err = syscall.Open(fmt.Sprintf("/dev/pts/%d", number), syscall.O_RDWR|syscall.O_NOCTTY|syscall.O_CLOEXEC, 0)
	return master, slave, err
}

// readUntil reads until what was read ends in a text.
func readUntil(fd int, end string) (string, error) {
	var all []byte
	for buffer := make([]byte, 1); !bytes.HasSuffix(all, []byte(end)); {
		n, err := syscall.Read(fd, buffer)
		if err == syscall.EINTR {
			continue
		}
		if err != nil || n == 0 {
			return string(all), fmt.Errorf("read until %q: %w", end, err)
		}
		all = append(all, buffer...)
	}
	return string(all), nil
}
