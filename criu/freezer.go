package criu

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// On cgroup v1, ptrace(2) waits for a process that is stopped (SIGSTOP, a shell's Ctrl-Z) and frozen until it is thawed, and no
// signal but SIGKILL ends that wait (https://lore.kernel.org/lkml/20151117193419.GA9993@redhat.com). criu has frozen it by itself,
// and would not thaw it ever. The freezer of cgroup v2 lets such a process be attached to.

// stateFile is the freezer's on cgroup v1; v2 has none of this name.
func (c Container) stateFile() string { return filepath.Join(c.Freezer, "freezer.state") }

// freezer returns the cgroup that criu is to freeze; empty where it has to stop the tasks one by one.
func (c Container) freezer() (string, error) {
	if c.Freezer == "" {
		return "", nil
	}
	if _, err := os.Stat(c.stateFile()); os.IsNotExist(err) {
		return c.Freezer, nil
	}
	stopped, err := hasStopped(c.Freezer)
	if err != nil {
		return "", fmt.Errorf("look for stopped processes: %w", err)
	}
	if stopped {
		return "", nil
	}
	return c.Freezer, nil
}

// hasStopped says whether a process in the cgroup, or in one below it, is stopped.
func hasStopped(cgroup string) (bool, error) {
	pids, err := processesOf(cgroup)
	if err != nil {
		return false, err
	}
	return slices.ContainsFunc(pids, func(pid int) bool {
		status, err := readStatus(statusPath(pid))
		return err == nil && status.state == "T" // otherwise it has ended
	}), nil
}

// thaw gives a criu that waits for a process which was stopped after the look the chance to go on. Where criu has
// seized the tasks, they are thawed already.
func (c Container) thaw() { _, _ = thaw(c.stateFile(), thawedV1) }

// What the files say when a cgroup is thawed: freezer.state of v1, which may also say FREEZING, and cgroup.freeze of v2.
const thawedV1, thawedV2 = "THAWED", "0"

// thaw writes to a freezer's file what stands for thawed, unless it says so. It tells whether it did. That there is no such file, of a
// cgroup that has been removed or is of the other version, is no error.
func thaw(file, thawed string) (bool, error) {
	state, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || err == nil && string(bytes.TrimSpace(state)) == thawed {
		return false, nil
	}
	if err == nil {
		err = os.WriteFile(file, []byte(thawed), 0)
	}
	if err != nil {
		return false, fmt.Errorf("thaw cgroup: %w", err)
	}
	return true, nil
}
