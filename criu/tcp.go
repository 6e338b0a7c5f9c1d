package criu

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// connectedTCP looks for a TCP socket of a process that CRIU will dump, init or a descendant of it, that can only be dumped under
// a network lock: any but a listening or a closed one. It returns where the first one is, with the addresses of both ends as its path. What an exec
// has started in the container is not among them. The container runs meanwhile, so the answer may be out of date when it is given.
func (c Container) connectedTCP(ctx context.Context) (at place, found bool, err error) {
	byNamespace := make(map[string]map[string]string) // addresses by inodes of sockets, by network namespace
	for pids := []int{c.Pid}; len(pids) > 0; pids = pids[1:] {
		if ctx.Err() != nil {
			return place{}, false, context.Cause(ctx)
		}
		process := strconv.Itoa(pids[0])
		children, err := childrenOf(process)
		if err != nil {
			return place{}, false, fmt.Errorf("look for TCP connections: %w", err)
		}
		pids = append(pids, children...)
		dir := filepath.Join("/proc", process)
		namespace, err := os.Readlink(dir + "/ns/net")
		if err != nil {
			continue // it has ended, as may any of them below
		}
		sockets := byNamespace[namespace]
		if sockets == nil {
			if sockets, err = connectedSockets(ctx, dir+"/net"); err != nil {
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
			if err == nil && isSocket && sockets[inode] != "" {
				return place{pid: atoi(process), fd: atoi(d.Name()), path: sockets[inode]}, true, nil
			}
		}
	}
	return place{}, false, nil
}

// connectedSockets returns the inodes of a network namespace's TCP sockets that are neither listening nor closed, each with its addresses; dir is
// /proc/PID/net. When ctx ends it returns early, without an error.
func connectedSockets(ctx context.Context, dir string) (map[string]string, error) {
	sockets := make(map[string]string)
	for _, name := range []string{"tcp", "tcp6"} {
		file, err := os.Open(filepath.Join(dir, name))
		if errors.Is(err, fs.ErrNotExist) {
			continue // a kernel without IPv6
		}
		if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(file)
		for ctx.Err() == nil && lines.Scan() { // a node may have a great many
			if inode, addresses, ok := parseSocket(lines.Text()); ok {
				sockets[inode] = addresses
			}
		}
		if err := errors.Join(lines.Err(), file.Close()); err != nil {
			return nil, err
		}
	}
	return sockets, nil
}

// parseSocket reads a line of /proc/net/tcp, and says whether it is of a connected socket that a process holds. The addresses are for people.
func parseSocket(line string) (inode, addresses string, connected bool) {
	const closed, listening = "07", "0A" // TCP_CLOSE and TCP_LISTEN
	fields := strings.Fields(line)
	if len(fields) < 10 || fields[0] == "sl" {
		return "", "", false
	}
	state, inode := fields[3], fields[9]
	addresses = "TCP connection of " + parseAddress(fields[1]) + " with " + parseAddress(fields[2])
	return inode, addresses, state != closed && state != listening && inode != "0" // 0: nobody's any more, as in TIME_WAIT
}

// parseAddress reads an address of /proc/net/tcp: words of 32 bits as the kernel has them in memory, printed as numbers of this machine, and the port.
func parseAddress(text string) string {
	host, port, _ := strings.Cut(text, ":")
	n, portErr := strconv.ParseUint(port, 16, 16)
	words, err := hex.DecodeString(host)
	if err != nil || portErr != nil || len(words)%4 != 0 {
		return text
	}
	for word := range slices.Chunk(words, 4) {
		binary.NativeEndian.PutUint32(word, binary.BigEndian.Uint32(word))
	}
	address, ok := netip.AddrFromSlice(words)
	if !ok {
		return text
	}
	return netip.AddrPortFrom(address.Unmap(), uint16(n)).String()
}

// lockMethod chooses how the network is locked. nftables comes first, where this criu (since 3.17) and the kernel have them: the lock is
// set and removed in one step by criu itself, and nothing of it stays. iptables needs programs, and the empty tables that
// they make remain.
func lockMethod(ctx context.Context, criu string) networkMode {
	if _, err := output(ctx, criu, "check", "--feature", "network_lock_nftables"); err != nil {
		return lockNetwork
	}
	return lockNetworkByNftables
}
