package criu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// StopOrphan makes the criu roll back whose process died in mid-dump, and returns when it has exited. It says whether there was
// one. binary is criu's path, freezer the container's, and session the pid that the dead process had, which led a session of its
// own: go-criu starts criu in the session of its caller.
//
// criu itself would notice the death only when all memory is written. The tasks may not run again before StopOrphan has returned.
func StopOrphan(ctx context.Context, binary, freezer string, session int) (found bool, err error) {
	// Nobody takes the number for another session as long as one process is left in this one.
	members, err := sessionMembers(session)
	if err != nil {
		return false, fmt.Errorf("look for orphaned criu: %w", err)
	}
	for _, pid := range members {
		stopped, err := stopOrphan(ctx, binary, freezer, session, pid)
		if err != nil {
			return found, fmt.Errorf("stop orphaned criu, pid %d: %w", pid, err)
		}
		found = found || stopped
	}
	return found, nil
}

func stopOrphan(ctx context.Context, binary, freezer string, session, pid int) (bool, error) {
	pidfd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	defer unix.Close(pidfd)
	// From here on the pid is looked at only as long as the pidfd says that it lives.
	if is, err := runs(pid, binary); err != nil || !is {
		return false, err
	}
	if now, err := sessionOf(pid); err != nil || now != session {
		return false, err
	}
	// As abortOnDone does, and SIGXFSZ is ignored since the dead process did so.
	if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, &unix.Rlimit{}, nil); err != nil && !errors.Is(err, unix.ESRCH) {
		return false, err
	}
	Container{Freezer: freezer}.thaw()
	for {
		const interval = 100 // ms between two looks at the context
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, interval)
		switch {
		case n > 0:
			return true, nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return true, err
		case ctx.Err() != nil:
			return true, context.Cause(ctx)
		}
	}
}

// sessionMembers returns the pids of a session.
func sessionMembers(session int) ([]int, error) {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			continue
		}
		now, err := sessionOf(pid)
		if err != nil {
			return nil, err
		}
		if now == session {
			pids = append(pids, pid)
		}
	}
	return pids, nil
}

// sessionOf returns the session of a process, 0 if it has ended.
func sessionOf(pid int) (int, error) {
	session, err := unix.Getsid(pid)
	if errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	return session, err
}

// runs says whether the process runs the binary. The file may have been replaced or deleted since.
func runs(pid int, binary string) (bool, error) {
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // it has ended, or is a kernel thread
	}
	if err != nil {
		return false, err
	}
	resolved, err := filepath.EvalSymlinks(binary)
	if err != nil {
		resolved = binary
	}
	exe = strings.TrimSuffix(exe, " (deleted)")
	return exe == binary || exe == resolved, nil
}
