package criu

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
)

// connectedTCP says whether a process of the container holds a TCP socket that CRIU can only dump under a network lock: any but a
// listening or a closed one. The container runs meanwhile, so the answer may be out of date when it is given.
func (c Container) connectedTCP() (bool, error) {
	pids, err := c.processes()
	if err != nil {
		return false, fmt.Errorf("look for TCP connections: %w", err)
	}
	byNamespace := make(map[string]map[string]bool) // inodes of sockets, by network namespace
	for _, pid := range pids {
		dir := filepath.Join("/proc", strconv.Itoa(pid))
		namespace, err := os.Readlink(dir + "/ns/net")
		if err != nil {
			continue // it has ended, as may any of them below
		}
		sockets := byNamespace[namespace]
		if sockets == nil {
			if sockets, err = connectedSockets(dir + "/net"); err != nil {
				continue
			}
			byNamespace[namespace] = sockets
		}
		if len(sockets) == 0 {
			continue
		}
		descriptors, err := os.ReadDir(dir + "/fd")
		if err != nil {
			continue
		}
		for _, d := range descriptors {
			target, err := os.Readlink(filepath.Join(dir, "fd", d.Name()))
			inode, isSocket := strings.CutPrefix(strings.TrimSuffix(target, "]"), "socket:[")
			if err == nil && isSocket && sockets[inode] {
				return true, nil
			}
		}
	}
	return false, nil
}

// processes are those of the container's cgroup and the cgroups below it; without a cgroup, init alone.
func (c Container) processes() ([]int, error) {
	if c.Freezer == "" {
		return []int{c.Pid}, nil
	}
	var pids []int
	err := filepath.WalkDir(c.Freezer, func(path string, entry fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil // a cgroup that has just been removed
		}
		if err != nil || entry.Name() != "cgroup.procs" {
			return err
		}
		content, err := os.ReadFile(path)
		if err != nil {
			return nil // likewise; or a threaded cgroup of v2, whose processes its parent lists
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

// connectedSockets returns the inodes of a network namespace's TCP sockets that are neither listening nor closed; dir is
// /proc/PID/net.
func connectedSockets(dir string) (map[string]bool, error) {
	sockets := make(map[string]bool)
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(file)
		for lines.Scan() {
			if inode, ok := parseSocket(lines.Text()); ok {
				sockets[inode] = true
			}
		}
		if err := errors.Join(lines.Err(), file.Close()); err != nil {
			return nil, err
		}
	}
	return sockets, nil
}

// parseSocket reads a line of /proc/net/tcp, and says whether it is of a connected socket that a process holds.
func parseSocket(line string) (inode string, connected bool) {
	const closed, listening = "07", "0A" // TCP_CLOSE and TCP_LISTEN
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[0] == "sl" {
		return "", false
	}
	state, inode := fields[3], fields[9]
	return inode, state != closed && state != listening && inode != "0" // 0: nobody's any more, as in TIME_WAIT
}
