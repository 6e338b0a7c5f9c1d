package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// WaitDump waits until a criu writes memory to a staging directory below dir, a path of the caller's.
func WaitDump(ctx context.Context, dir string) error {
	_, err := waitDump(ctx, dir)
	return err
}

// HeldDump is a criu that is stopped by a signal while it writes memory: in mid-dump for sure, however fast disk and machine are.
type HeldDump struct{ pid int }

// HoldDump does what WaitDump does, and holds that criu until Release.
func HoldDump(ctx context.Context, dir string) (*HeldDump, error) {
	pid, err := waitDump(ctx, dir)
	if err != nil {
		return nil, err
	}
	d := &HeldDump{pid: pid}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		return nil, fmt.Errorf("hold dump: %w", err)
	}
	for {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		switch {
		case err != nil:
			return nil, fmt.Errorf("hold dump: %w", err)
		case !bytes.Contains(stat, []byte(" (criu) T ")):
			time.Sleep(time.Millisecond)
		case !writesMemory(pid):
			d.Release()
			return nil, errors.New("hold dump: criu has written all memory before it could be stopped: dump more of it")
		default:
			return d, nil
		}
	}
}

// HoldCheckpoint makes a checkpoint in the background, with its dump below dir, and holds that until the test releases it, or ends. One
// that was over before it could be held is made again, once its archive is removed. What checkpoint returns is received from ended.
func HoldCheckpoint(t testing.TB, dir, archive string, checkpoint func() error) (held *HeldDump, ended <-chan error) {
	t.Helper()
	for range 5 {
		ctx, cancel := context.WithTimeout(t.Context(), Patience)
		result := make(chan error, 1)
		go func() {
			defer cancel()
			result <- checkpoint()
		}()
		held, err := HoldDump(ctx, dir)
		if err == nil {
			t.Cleanup(held.Release)
			return held, result
		}
		if failed := <-result; failed != nil {
			t.Fatal(errors.Join(err, failed))
		}
		if err := os.RemoveAll(archive); err != nil {
			t.Fatal(err)
		}
	}
	t.Fatal("each dump was over before it could be held: dump more memory")
	return nil, nil
}

// Pid is criu's process id.
func (d *HeldDump) Pid() int { return d.pid }

// Release lets criu go on. It may be called more than once, also when criu has ended.
func (d *HeldDump) Release() { _ = unix.Kill(d.pid, unix.SIGCONT) }

// Aborted says whether criu's next write will fail, by which crishim rolls it back.
func (d *HeldDump) Aborted() bool {
	var limit unix.Rlimit
	err := unix.Prlimit(d.pid, unix.RLIMIT_FSIZE, nil, &limit)
	return err == nil && limit.Cur == 0
}

// RollBack waits until crishim has told criu to roll back, and lets it.
func (d *HeldDump) RollBack(t testing.TB) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !d.Aborted(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("criu is not told to roll back")
		}
	}
	d.Release()
}

func waitDump(ctx context.Context, dir string) (pid int, err error) {
	for {
		files, err := filepath.Glob(filepath.Join(dir, ".crishim-*/checkpoint/pages-*.img"))
		if err != nil {
			return 0, err
		}
		for _, file := range files {
			if info, err := os.Stat(file); err == nil && info.Size() > 1<<20 {
				if pid := writer(info); pid != 0 {
					return pid, nil
				}
			}
		}
		select {
		case <-ctx.Done():
			return 0, fmt.Errorf("wait for a dump below %s: %w", dir, context.Cause(ctx))
		case <-time.After(time.Millisecond):
		}
	}
}

// writer is the criu that has a file open, 0 where there is none. It looks at the youngest processes first: a dump does not wait.
func writer(file os.FileInfo) (pid int) {
	entries, _ := os.ReadDir("/proc") // what is missing is not there any more
	var pids []int
	for _, entry := range entries {
		if pid, err := strconv.Atoi(entry.Name()); err == nil {
			pids = append(pids, pid)
		}
	}
	slices.Sort(pids)
	for _, pid := range slices.Backward(pids) {
		if comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)); err != nil || string(comm) != "criu\n" {
			continue
		}
		descriptors, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is well-formed
		for _, descriptor := range descriptors {
			if info, err := os.Stat(descriptor); err == nil && os.SameFile(info, file) {
				return pid
			}
		}
	}
	return 0
}

// writesMemory says whether a criu has a file of pages open: it closes each when it is done with a process's memory.
func writesMemory(pid int) bool {
	descriptors, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	for _, descriptor := range descriptors {
		target, _ := os.Readlink(descriptor)
		if pages, _ := filepath.Match("pages-*.img", filepath.Base(target)); pages {
			return true
		}
	}
	return false
}

// Kill ends that criu, which can undo nothing then.
func (d *HeldDump) Kill() { _ = unix.Kill(d.pid, unix.SIGKILL) }
