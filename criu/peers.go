package criu

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"crishim/criu/unixdiag"
)

// outsidePeer finds a unix socket of the container that is connected to one which none of its processes has.
func (c Container) outsidePeer(ctx context.Context) (*Error, error) {
	pids, err := c.Processes()
	if err != nil {
		return nil, fmt.Errorf("look at unix sockets: %w", err)
	}
	own := map[uint32]place{}
	namespaces := map[string]int{} // a process in each
	for _, pid := range pids {
		for inode, fd := range socketsOf(strconv.Itoa(pid)) {
			own[inode] = place{pid: pid, fd: fd}
		}
		if namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/net", pid)); err == nil {
			namespaces[namespace] = pid
		}
	}
	for _, pid := range namespaces {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
		if err != nil {
			continue // it has ended
		}
		sockets, err := unixdiag.List(int(namespace.Fd()))
		namespace.Close()
		if err != nil {
			return nil, err
		}
		for _, s := range sockets {
			at, isOwn := own[s.Inode]
			if _, inside := own[s.Peer]; !isOwn || inside || s.Peer == 0 || s.Type == unix.SOCK_DGRAM && c.takesDatagrams() {
				continue
			}
			cause := "it is connected to a socket of " + ownerOf(s.Peer)
			return &Error{Limit: limit(outsidePeerName), Place: c.describe(at), Cause: cause}, nil
		}
	}
	return nil, nil
}

// socketsOf returns the sockets of a process, by inode, each with one of its descriptors. Of a process that has ended there are none.
func socketsOf(process string) map[uint32]int {
	sockets := map[uint32]int{}
	dir := filepath.Join("/proc", process, "fd")
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil
	}
	for _, entry := range entries {
		link, err := os.Readlink(filepath.Join(dir, entry.Name()))
		number, isSocket := strings.CutPrefix(strings.TrimSuffix(link, "]"), "socket:[")
		if inode, parseErr := strconv.ParseUint(number, 10, 32); err == nil && isSocket && parseErr == nil {
			sockets[uint32(inode)] = atoi(entry.Name())
		}
	}
	return sockets
}

// takesDatagrams says whether the administrator has CRIU dump sockets for datagrams that are connected to the outside: see options.
func (c Container) takesDatagrams() bool {
	content, err := os.ReadFile(configFile(c.Runtime))
	return err == nil && bytes.Contains(content, []byte("ext-unix-sk"))
}

// ownerOf names the process of the node that has a socket.
func ownerOf(inode uint32) string {
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return "nobody"
	}
	for _, dir := range processes {
		if _, has := socketsOf(filepath.Base(dir))[inode]; has {
			comm, _ := os.ReadFile(dir + "/comm")
			return fmt.Sprintf("process %s of the node (%s)", filepath.Base(dir), printable(strings.TrimSpace(string(comm))))
		}
	}
	return "nobody"
}
