// Package unixdiag asks the kernel for the unix sockets of a network namespace, and what they are connected to: sock_diag(7), of Linux 3.3.
package unixdiag

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"
)

// Socket is a unix socket. Its inode is the one in the links of /proc/PID/fd, and no other socket of the machine has it at that time.
type Socket struct {
	Inode uint32
	Type  int    // unix.SOCK_STREAM, …
	Peer  uint32 // inode of the socket that it is connected to; 0 if there is none, or one that nobody has accepted yet

	inode, device uint32 // of the file that it is bound to, or was
}

// IsAt tells whether the socket, or the listening one that it was accepted by, is bound to a file.
func (s Socket) IsAt(file *unix.Stat_t) bool {
	// The kernel's own numbers: of an inode the lower half, of a device 12 and 20 bits.
	return s.inode == uint32(file.Ino) && s.device>>20 == unix.Major(file.Dev) && s.device&(1<<20-1) == unix.Minor(file.Dev) && s.inode != 0
}

// See linux/sock_diag.h and linux/unix_diag.h, of which x/sys has but the numbers of families.
const (
	sockDiagByFamily   = 20
	showVFS, showPeer  = 2, 4
	attrVFS, attrPeer  = 1, 2
	requestLen, msgLen = 24, 16
)

// Held returns the sockets that a process has, of whatever family: one of its descriptors for each inode.
func Held(pid int) (map[uint32]int, error) {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look at sockets of a process: %w", err)
	}
	held := map[uint32]int{}
	for _, entry := range entries {
		link, err := os.Readlink(filepath.Join(dir, entry.Name())) // it may be closed by now
		number, isSocket := strings.CutPrefix(strings.TrimSuffix(link, "]"), "socket:[")
		inode, inodeErr := strconv.ParseUint(number, 10, 32)
		fd, fdErr := strconv.Atoi(entry.Name())
		if err == nil && isSocket && inodeErr == nil && fdErr == nil {
			held[uint32(inode)] = fd
		}
	}
	return held, nil
}

// List returns the sockets of the network namespace of a process. That may be another than the caller's.
func List(pid int) (all []Socket, err error) {
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for unix sockets: %w", err)
	}
	defer namespace.Close()
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, &netlink.Config{NetNS: int(namespace.Fd())})
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for unix sockets: %w", err)
	}
	defer conn.Close()
	request := make([]byte, requestLen)
	request[0] = unix.AF_UNIX
	nlenc.PutUint32(request[4:8], ^uint32(0)) // in whatever state
	nlenc.PutUint32(request[12:16], showVFS|showPeer)
	answer, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
		Data:   request,
	})
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for unix sockets: %w", err)
	}
	for _, m := range answer {
		if len(m.Data) < msgLen {
			continue
		}
		s := Socket{Type: int(m.Data[1]), Inode: nlenc.Uint32(m.Data[4:8])}
		attributes, err := netlink.NewAttributeDecoder(m.Data[msgLen:])
		if err != nil {
			return nil, fmt.Errorf("read the kernel's list of unix sockets: %w", err)
		}
		for attributes.Next() {
			switch b := attributes.Bytes(); {
			case attributes.Type() == attrVFS && len(b) == 8:
				s.inode, s.device = nlenc.Uint32(b[:4]), nlenc.Uint32(b[4:])
			case attributes.Type() == attrPeer && len(b) == 4:
				s.Peer = nlenc.Uint32(b)
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, fmt.Errorf("read the kernel's list of unix sockets: %w", err)
		}
		all = append(all, s)
	}
	return all, nil
}
