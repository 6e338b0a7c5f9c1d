package criu

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"
)

// patience is how long a process may be stuck before the dump is given up. CRIU would wait for twice as long, with the container frozen.
const patience = 5 * time.Second

// obstacle looks for what would have CRIU freeze the container in vain: a process that it could not seize, for another's tracing it
// or for its sleep, and a user namespace, which no runtime can restore. What comes after the look, CRIU finds.
func (c Container) obstacle(ctx context.Context) error {
	if own, err := c.ownUserNamespace(); err != nil {
		return err
	} else if own {
		return &Error{Limit: limit(userNamespaceName), Cause: "it has a user namespace of its own"}
	}
	asleep, err := c.asleep()
	if err != nil {
		return err
	}
	for start := time.Now(); len(asleep) > 0; {
		if time.Since(start) > patience {
			for _, s := range asleep {
				return &Error{Limit: limit(stuckName), Place: s.String(), Cause: fmt.Sprintf("it has been in uninterruptible sleep (state D) for %s", patience)}
			}
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(50 * time.Millisecond):
		}
		maps.DeleteFunc(asleep, func(path string, before status) bool {
			now, err := readStatus(path)
			return err != nil || now != before // it has ended, or has gone on: it waits for a disk as everybody does
		})
	}
	return nil
}

// ownUserNamespace says whether init is in another user namespace than the caller.
func (c Container) ownUserNamespace() (bool, error) {
	ours, err := os.Readlink("/proc/self/ns/user")
	if err != nil {
		return false, fmt.Errorf("look at user namespace: %w", err)
	}
	theirs, err := os.Readlink(filepath.Join("/proc", strconv.Itoa(c.Pid), "ns/user"))
	if err != nil {
		return false, fmt.Errorf("look at user namespace: %w", err)
	}
	return theirs != ours, nil
}

// asleep returns the threads of the container that are in uninterruptible sleep, by the path of their status. A thread that is traced
// is an error.
func (c Container) asleep() (map[string]status, error) {
	pids, err := c.Processes()
	if err != nil {
		return nil, fmt.Errorf("look at processes: %w", err)
	}
	asleep := make(map[string]status)
	for _, pid := range pids {
		paths, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
		if err != nil {
			return nil, err
		}
		for _, path := range paths {
			s, err := readStatus(path)
			if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
				continue // it has ended
			}
			if err != nil {
				return nil, fmt.Errorf("look at processes: %w", err)
			}
			if s.tracer != 0 {
				return nil, &Error{Limit: limit(tracedName), Place: s.String(), Cause: "it is traced by " + tracer(s.tracer)}
			}
			if s.state == "D" {
				asleep[path] = s
			}
		}
	}
	return asleep, nil
}

// tracer names the process one of whose threads traces another.
func tracer(thread int) string {
	s, err := readStatus(statusPath(thread))
	if err != nil {
		return "another process" // one that has ended, or one outside of our pid namespace
	}
	return fmt.Sprintf("process %s of the node (%s)", s.pid, printable(s.name))
}
