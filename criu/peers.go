package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
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
		held, _ := unixdiag.Held(pid) // none of one that has ended
		for inode, fd := range held {
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
		sockets, err := unixdiag.List(pid)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			continue // it has ended
		}
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
		held, _ := unixdiag.Held(atoi(filepath.Base(dir)))
		if _, has := held[inode]; has {
			comm, _ := os.ReadFile(dir + "/comm")
			return fmt.Sprintf("process %s of the node (%s)", filepath.Base(dir), printable(strings.TrimSpace(string(comm))))
		}
	}
	return "nobody"
}
