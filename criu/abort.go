package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// aborter makes criu roll back when a context ends.
//
// criu writes all the time, images and its log. With RLIMIT_FSIZE at 0, set from outside by prlimit(2), and SIGXFSZ
// ignored, its next write to an image fails with EFBIG: criu then takes its own way out of an error, which removes the
// parasite code, thaws the cgroup, unlocks the network and lets the tasks go on. A signal would do none of that.
type aborter struct {
	pid  int
	done chan struct{} // closed when the callback has run
	off  func() bool

	once    sync.Once
	aborted bool
}

// abortOnDone watches the context for the caller's only child, which is criu. thaw is called after criu was told, for one that
// cannot write since it waits for a frozen process.
func abortOnDone(ctx context.Context, thaw func()) (*aborter, error) {
	pid, err := onlyChild()
	if err != nil {
		return nil, err
	}
	a := &aborter{pid: pid, done: make(chan struct{})}
	a.off = context.AfterFunc(ctx, func() {
		defer close(a.done)
		// The only errors possible are of a process that has exited, and then there is nothing to stop.
		_ = unix.Prlimit(a.pid, unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 0, Max: 0}, nil)
		thaw()
	})
	return a, nil
}

// stop ends the watch, and says whether criu had been told to roll back before. It may be called more than once, and returns
// only when the watch can no longer touch the process.
func (a *aborter) stop() bool {
	a.once.Do(func() {
		if !a.off() {
			<-a.done
			a.aborted = true
		}
	})
	return a.aborted
}

// onlyChild returns the pid of the one child of this process.
func onlyChild() (int, error) {
	children, err := childrenOf("self")
	if err != nil {
		return 0, fmt.Errorf("find criu's pid: %w", err)
	}
	if len(children) != 1 {
		return 0, fmt.Errorf("find criu's pid: this process has %d children, one was expected", len(children))
	}
	return children[0], nil
}

// childrenOf returns the children of a process, a pid or "self"; one that has ended has none. The kernel's list of children
// (/proc/PID/task/TID/children, Linux 3.5, CONFIG_PROC_CHILDREN) is kept for each thread that forked; CRIU needs it too.
func childrenOf(process string) ([]int, error) {
	lists, err := filepath.Glob(filepath.Join("/proc", process, "task/*/children"))
	if err != nil {
		return nil, err
	}
	var children []int
	for _, list := range lists {
		content, err := os.ReadFile(list)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return nil, fmt.Errorf("list children: %w", err)
		}
		for field := range strings.FieldsSeq(string(content)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return nil, fmt.Errorf("parse %s: %w", list, err)
			}
			children = append(children, pid)
		}
	}
	return children, nil
}
