package main

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"
)

// pendingSignals is a process that has signals waiting which it blocks: ordinary ones, and queued ones with values.
func pendingSignals(string) (func() (string, error), error) {
	p, err := start("pending", "", nil)
	if err != nil {
		return nil, err
	}
	if err := syscall.Kill(p.pid, syscall.SIGUSR2); err != nil {
		return nil, err
	}
	for value := range 3 {
		var info [128]byte // siginfo_t: signal, error, code; then sender and value
		const queued = -1  // SI_QUEUE
		binary.NativeEndian.PutUint32(info[0:], queuedSignal)
		code := int32(queued)
		binary.NativeEndian.PutUint32(info[8:], uint32(code))
		binary.NativeEndian.PutUint32(info[16:], uint32(os.Getpid()))
		binary.NativeEndian.PutUint64(info[24:], uint64(70+value))
		if _, err := newFd(syscall.SYS_RT_SIGQUEUEINFO, uintptr(p.pid), queuedSignal, uintptr(unsafe.Pointer(&info)), 0); err != nil {
			return nil, fmt.Errorf("queue signal: %w", err)
		}
	}
	return p.state, nil
}

const queuedSignal = 41

// pendingPart blocks signals in all of its threads. Go's threads have the mask that the process was started with, so it starts
// once more.
func pendingPart(again string) (func() (string, error), error) {
	mask := uint64(1)<<(syscall.SIGUSR2-1) | 1<<(queuedSignal-1)
	if again == "" {
		runtime.LockOSThread()
		if err := sigprocmask(0, &mask, nil); err != nil {
			return nil, err
		}
		return nil, syscall.Exec("/proc/self/exe", []string{"workload", "part", "pending", "again"}, os.Environ())
	}
	return func() (string, error) {
		content, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return "", err
		}
		var states []string
		for line := range strings.Lines(string(content)) {
			fields := strings.Fields(line)
			if fields[0] != "SigPnd:" && fields[0] != "ShdPnd:" && fields[0] != "SigBlk:" {
				continue
			}
			set, err := strconv.ParseUint(fields[1], 16, 64)
			if err != nil {
				return "", err
			}
			// Go's scheduler sends itself SIGURG to take a thread from a goroutine, now and then also just now.
			set &^= 1 << (uint(syscall.SIGURG) - 1)
			states = append(states, fmt.Sprintf("%s %016x", fields[0], set))
		}
		values, err := requeue()
		return strings.Join(append(states, values), ", "), err
	}, nil
}

// requeue takes the queued signals and queues them again.
func requeue() (string, error) {
	mask := uint64(1) << (queuedSignal - 1)
	var taken [][128]byte
	for {
		var info [128]byte
		none := syscall.Timespec{}
		_, _, errno := syscall.Syscall6(syscall.SYS_RT_SIGTIMEDWAIT, uintptr(unsafe.Pointer(&mask)), uintptr(unsafe.Pointer(&info)),
			uintptr(unsafe.Pointer(&none)), 8, 0, 0)
		if errno == syscall.EAGAIN {
			break
		}
		if errno != 0 {
			return "", fmt.Errorf("take signal: %w", errno)
		}
		taken = append(taken, info)
	}
	values := "values"
	for _, info := range taken {
		values += fmt.Sprintf(" %d", binary.NativeEndian.Uint64(info[24:]))
		if _, err := newFd(syscall.SYS_RT_SIGQUEUEINFO, uintptr(os.Getpid()), queuedSignal, uintptr(unsafe.Pointer(&info)), 0); err != nil {
			return "", fmt.Errorf("queue signal again: %w", err)
		}
	}
	return values, nil
}

func sigprocmask(how int, mask, old *uint64) error {
	_, _, errno := syscall.Syscall6(syscall.SYS_RT_SIGPROCMASK, uintptr(how), uintptr(unsafe.Pointer(mask)), uintptr(unsafe.Pointer(old)), 8, 0, 0)
	if errno != 0 {
		return fmt.Errorf("block signals: %w", errno)
	}
	return nil
}

// dispositions are signals that are ignored, and an alternate stack, which each of Go's threads has.
func dispositions(string) (func() (string, error), error) {
	signal.Ignore(syscall.SIGHUP, syscall.SIGWINCH, syscall.Signal(44))
	return func() (string, error) {
		content, err := os.ReadFile("/proc/self/status")
		if err != nil {
			return "", err
		}
		var states []string
		for line := range strings.Lines(string(content)) {
			if fields := strings.Fields(line); fields[0] == "SigIgn:" || fields[0] == "SigCgt:" {
				states = append(states, strings.Join(fields, " "))
			}
		}
		return strings.Join(states, ", "), nil
	}, nil
}

// alarm is a timer of setitimer that goes off once, in an hour.
func alarm(string) (func() (string, error), error) {
	hour := [4]int64{0, 0, 3600, 0}
	_, err := newFd(syscall.SYS_SETITIMER, 0, uintptr(unsafe.Pointer(&hour)), 0, 0)
	return func() (string, error) {
		var now [4]int64
		_, err := newFd(syscall.SYS_GETITIMER, 0, uintptr(unsafe.Pointer(&now)), 0, 0)
		return armed(fmt.Sprintf("(%d, %d)", now[2], now[3]*1000)), err
	}, err
}

// timers are those of setitimer and of timer_create: each armed for an hour, and one that ticks.
func timers(string) (func() (string, error), error) {
	for which := range 3 {
		hours := [4]int64{2 * 3600, 0, 3600, 0} // interval and value, in seconds and microseconds
		if _, err := newFd(syscall.SYS_SETITIMER, uintptr(which), uintptr(unsafe.Pointer(&hours)), 0, 0); err != nil {
			return nil, err
		}
	}
	var ticks atomic.Int64
	ticking := make(chan os.Signal, 1)
	signal.Notify(ticking, syscall.Signal(45))
	go func() {
		for range ticking {
			ticks.Add(1)
		}
	}()
	var ids []int32
	for _, timer := range []struct {
		clock           uintptr
		signal          int32
		value, interval time.Duration
	}{
		{1, 46, time.Hour, 2 * time.Hour}, {0, 45, 20 * time.Millisecond, 20 * time.Millisecond},
	} {
		event := struct {
			value          uint64
			signal, notify int32
			_              [48]byte
		}{value: 99, signal: timer.signal}
		var id int32
		if _, err := newFd(syscall.SYS_TIMER_CREATE, timer.clock, uintptr(unsafe.Pointer(&event)), uintptr(unsafe.Pointer(&id)), 0); err != nil {
			return nil, err
		}
		spec := [2]syscall.Timespec{syscall.NsecToTimespec(int64(timer.interval)), syscall.NsecToTimespec(int64(timer.value))}
		if _, err := newFd(syscall.SYS_TIMER_SETTIME, uintptr(id), 0, uintptr(unsafe.Pointer(&spec)), 0); err != nil {
			return nil, err
		}
		ids = append(ids, id)
	}
	return func() (string, error) {
		var states []string
		for which := range 3 {
			var now [4]int64
			if _, err := newFd(syscall.SYS_GETITIMER, uintptr(which), uintptr(unsafe.Pointer(&now)), 0, 0); err != nil {
				return "", err
			}
			states = append(states, fmt.Sprintf("itimer %d %s, interval %d", which, armed(fmt.Sprintf("(%d, %d)", now[2], now[3]*1000)), now[0]))
		}
		for i, id := range ids {
			var spec [2]syscall.Timespec
			if _, err := newFd(syscall.SYS_TIMER_GETTIME, uintptr(id), uintptr(unsafe.Pointer(&spec)), 0, 0); err != nil {
				return "", err
			}
			state := fmt.Sprintf("timer %d, interval %d ms", id, spec[0].Nano()/int64(time.Millisecond))
			if i == 0 {
				state += ", " + armed(fmt.Sprintf("(%d, %d)", spec[1].Sec, spec[1].Nsec))
			}
			states = append(states, state)
		}
		before := ticks.Load()
		return strings.Join(states, "; ") + "; " + wait("it ticks", func() bool { return ticks.Load() > before }), nil
	}, nil
}
