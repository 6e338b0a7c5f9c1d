package criu

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Processes are those that CRIU stops: init and its descendants, and what an exec has started in the container.
func (c Container) Processes() ([]int, error) {
	if c.Freezer != "" {
		return processesOf(c.Freezer)
	}
	pids := []int{c.Pid}
	for i := 0; i < len(pids); i++ {
		children, err := childrenOf(strconv.Itoa(pids[i]))
		if err != nil {
			return nil, err
		}
		pids = append(pids, children...)
	}
	return pids, nil
}

// ended says whether init has ended, or is about to and has let go of its namespaces.
func (c Container) ended() bool {
	_, err := os.Stat(fmt.Sprintf("/proc/%d/ns/net", c.Pid))
	return err != nil
}

// processesOf are those in the cgroup and in the cgroups below it.
func processesOf(cgroup string) ([]int, error) {
	var pids []int
	err := filepath.WalkDir(cgroup, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.Name() != "cgroup.procs" {
			return nil
		}
		var content []byte
		if err == nil {
			content, err = os.ReadFile(path)
		}
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EOPNOTSUPP) {
			return nil // a cgroup below that is gone meanwhile; or a threaded one, whose processes its parent has
		}
		if err != nil {
			return err
		}
		for field := range strings.FieldsSeq(string(content)) {
			pid, err := strconv.Atoi(field)
			if err != nil {
				return fmt.Errorf("parse %s: %w", path, err)
			}
			pids = append(pids, pid)
		}
		return nil
	})
	return pids, err
}

// status is what /proc/PID/status, or /proc/PID/task/TID/status, says of a process or thread.
type status struct {
	name     string // as the kernel escapes it
	state    string // a letter
	pid      string // of the process, not the thread
	inner    string // the same in its own pid namespace
	tracer   int    // 0 if none
	switches string // how often it has gone to sleep
}

func statusPath(pid int) string { return fmt.Sprintf("/proc/%d/status", pid) }

func readStatus(path string) (status, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return status{}, err
	}
	var s status
	lines := bufio.NewScanner(bytes.NewReader(content))
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), ":")
		value = strings.TrimSpace(value)
		switch name {
		case "Name":
			s.name = value
		case "State":
			s.state, _, _ = strings.Cut(value, " ")
		case "Tgid":
			s.pid = value
		case "NStgid":
			s.inner = value[strings.LastIndexByte(value, '\t')+1:]
		case "TracerPid":
			s.tracer, err = strconv.Atoi(value)
		case "voluntary_ctxt_switches":
			s.switches = value
		}
		if err != nil {
			return status{}, fmt.Errorf("parse %s: %w", path, err)
		}
	}
	return s, lines.Err()
}

// describe names a place as those know it who have the container before them.
func (c Container) describe(at place) string {
	const maxPath = 120
	path := shorten(printable(at.path), maxPath)
	switch {
	case at.mount != "":
		return "mount " + shorten(printable(at.mount), maxPath)
	case at.pid <= 0 && path != "":
		return path
	case at.pid <= 0:
		return ""
	}
	where := fmt.Sprintf("process %d of the node", at.pid)
	if at.comm != "" {
		where += fmt.Sprintf(" (%s)", shorten(printable(at.comm), maxPath))
	}
	// The log has been in reach of the container: a pid from it is looked at only if it is one of the container's.
	if pids, err := c.Processes(); err == nil && slices.Contains(pids, at.pid) {
		if s, err := readStatus(statusPath(at.pid)); err == nil {
			where = s.String()
		}
		if at.fd >= 0 && path == "" {
			link, _ := os.Readlink(fmt.Sprintf("/proc/%d/fd/%d", at.pid, at.fd)) // it may be closed by now
			path = shorten(printable(link), maxPath)
		}
	}
	if at.fd >= 0 {
		where += fmt.Sprintf(", descriptor %d", at.fd)
		if path != "" {
			path = " (" + path + ")"
		}
	} else if path != "" {
		path = ", " + path
	}
	return where + path
}

// String is "process 7 (redis-server)", by the pid that the container knows.
func (s status) String() string {
	return fmt.Sprintf("process %s (%s)", s.inner, printable(s.name))
}

// findDescriptor looks for a descriptor in the container by its link in /proc/PID/fd, first in the process that at names, and fills
// in whose it is. It says whether there is one.
func (c Container) findDescriptor(at *place, match func(link string) bool) bool {
	pids, err := c.Processes()
	if err != nil {
		return false
	}
	slices.SortStableFunc(pids, func(a, b int) int {
		switch at.pid {
		case a:
			return -1
		case b:
			return 1
		}
		return 0
	})
	for _, pid := range pids {
		dir := fmt.Sprintf("/proc/%d/fd", pid)
		descriptors, err := os.ReadDir(dir)
		if err != nil {
			continue // it has ended
		}
		for _, d := range descriptors {
			if link, err := os.Readlink(filepath.Join(dir, d.Name())); err == nil && match(link) {
				at.pid, at.comm, at.fd = pid, "", atoi(d.Name())
				return true
			}
		}
	}
	return false
}
