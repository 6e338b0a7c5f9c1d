package container

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Process names a process in such a way that a pid used again is noticed. It holds no resource.
type Process struct {
	Pid       int    // in this process's pid namespace
	StartTime uint64 // field 22 of /proc/PID/stat, in clock ticks since boot
	Cgroup    string // content of /proc/PID/cgroup
}

// FindProcess names the process that has the pid now.
func FindProcess(pid int) (Process, error) {
	p := Process{Pid: pid}
	var err error
	if p.StartTime, err = startTime(pid); err != nil {
		return Process{}, err
	}
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return Process{}, gone(pid, err)
	}
	p.Cgroup = string(content)
	return p, nil
}

// Verify says whether the process still is the one that was named: alive, not a zombie, and in the same cgroup.
func (p Process) Verify() error {
	now, err := FindProcess(p.Pid)
	if err != nil {
		return err
	}
	if now.StartTime != p.StartTime {
		return fmt.Errorf("%w: pid %d is another process by now", ErrNotRunning, p.Pid)
	}
	if now.Cgroup != p.Cgroup {
		return fmt.Errorf("%w: process %d has moved to another cgroup", ErrNotRunning, p.Pid)
	}
	return nil
}

// Pin verifies the process and holds on to it by a pidfd (Linux 5.3).
func (p Process) Pin() (*Pinned, error) {
	pidfd, err := unix.PidfdOpen(p.Pid, 0)
	if err != nil {
		return nil, gone(p.Pid, err)
	}
	pinned := &Pinned{process: p, pidfd: pidfd}
	if err := pinned.Verify(); err != nil {
		pinned.Close()
		return nil, err
	}
	return pinned, nil
}

// Pinned is a process that cannot be taken for another one: not even by one that got its pid within the same clock tick.
type Pinned struct {
	process Process
	pidfd   int
}

// Verify says whether the process lives and is in the same cgroup.
func (p *Pinned) Verify() error {
	// A pidfd becomes readable with the end of its process; until then the pid is this process's.
	n, err := unix.Poll([]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}, 0)
	for errors.Is(err, unix.EINTR) {
		n, err = unix.Poll([]unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}, 0)
	}
	if err != nil {
		return fmt.Errorf("poll pidfd of process %d: %w", p.process.Pid, err)
	}
	if n > 0 {
		return fmt.Errorf("%w: process %d has ended", ErrNotRunning, p.process.Pid)
	}
	return p.process.Verify()
}

// Alive returns a context that ends with the process, some 100 ms later, and then has Verify's error as its cause. The caller calls stop,
// before Close, which ends the watching.
func (p *Pinned) Alive(ctx context.Context) (alive context.Context, stop func()) {
	alive, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		// Not by waiting for the pidfd: of a process of several threads it tells the end only when a tracer has waited for each.
		ticks := time.NewTicker(100 * time.Millisecond)
		defer ticks.Stop()
		for {
			select {
			case <-alive.Done():
				return
			case <-ticks.C:
				if err := p.Verify(); errors.Is(err, ErrNotRunning) {
					cancel(err)
				}
			}
		}
	}()
	return alive, func() {
		cancel(nil)
		<-done
	}
}

// Close lets go of the process.
func (p *Pinned) Close() { unix.Close(p.pidfd) }

// parent is what a process was started by, and is waited for by.
type parent struct {
	name string // for people
	dir  string // its working directory
}

// findParent looks at the parent of a process.
func findParent(pid int) (parent, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return parent{}, gone(pid, err)
	}
	ppid, err := parsePPid(content)
	if err != nil {
		return parent{}, fmt.Errorf("parse /proc/%d/status: %w", pid, err)
	}
	if ppid == 0 {
		return parent{}, fmt.Errorf("%w: the parent of its process %d is not to be seen from here: crishim must run in the node's own process namespace",
			ErrUnsupported, pid)
	}
	dir, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", ppid))
	if err != nil {
		return parent{}, gone(ppid, err)
	}
	// Not comm, which holds 15 bytes: all shims are called containerd-shim there.
	args, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", ppid))
	if err != nil {
		return parent{}, gone(ppid, err)
	}
	name, _, _ := bytes.Cut(args, []byte{0})
	base := filepath.Base(string(name))
	return parent{name: fmt.Sprintf("%q (process %d)", base[:min(len(base), 64)], ppid), dir: dir}, nil
}

// parsePPid reads a field of /proc/PID/status. The name, which the process chooses, stands before it, with its newlines escaped.
func parsePPid(status []byte) (int, error) {
	for line := range bytes.Lines(status) {
		if value, ok := bytes.CutPrefix(line, []byte("PPid:")); ok {
			return strconv.Atoi(string(bytes.TrimSpace(value)))
		}
	}
	return 0, errors.New("no PPid")
}

func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, gone(pid, err)
	}
	ended, start, err := parseStat(stat)
	if err != nil {
		return 0, fmt.Errorf("parse /proc/%d/stat: %w", pid, err)
	}
	if ended {
		return 0, fmt.Errorf("%w: process %d has ended", ErrNotRunning, pid)
	}
	return start, nil
}

// parseStat reads fields 3, 9 and 22 of /proc/PID/stat: whether the process has ended, or is past all but its end, and when it started.
// Field 2 is the name in parentheses, which may itself hold spaces and parentheses: the process chooses it.
func parseStat(stat []byte) (ended bool, start uint64, err error) {
	// PF_EXITING of the kernel's include/linux/sched.h. An init sleeps in its end until all others in its process namespace have been
	// waited for, by criu those that it traces.
	const exiting = 0x4
	end := bytes.LastIndexByte(stat, ')')
	fields := bytes.Fields(stat[end+1:])
	if end < 0 || len(fields) < 20 {
		return false, 0, errors.New("too few fields")
	}
	state := string(fields[0])
	flags, err := strconv.ParseUint(string(fields[6]), 10, 64)
	if err != nil {
		return false, 0, err
	}
	start, err = strconv.ParseUint(string(fields[19]), 10, 64)
	return state == "Z" || state == "X" || flags&exiting != 0, start, err
}

func gone(pid int, err error) error {
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("%w: process %d has ended", ErrNotRunning, pid)
	}
	return fmt.Errorf("look at process %d: %w", pid, err)
}

func inode(info fs.FileInfo) uint64 { return info.Sys().(*syscall.Stat_t).Ino }
