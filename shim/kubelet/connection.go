package kubelet

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/mdlayher/netlink"
	"github.com/mdlayher/netlink/nlenc"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

var errNotConnected = errors.New("it is not connected")

// connected returns nil if a process has a connection to the socket at an endpoint, by what the kernel says: /proc tells which sockets the process
// has, and sock_diag(7) which of them are connected to which file.
func connected(pid int, endpoint string) error {
	inodes, err := sockets(pid)
	if err != nil {
		return err
	}
	peers, err := peersOf(socket(endpoint))
	if err != nil {
		return err
	}
	for _, inode := range peers {
		if inodes[inode] {
			return nil
		}
	}
	return errNotConnected
}

// sockets are the inodes of a process's sockets.
func sockets(pid int) (map[uint32]bool, error) {
	dir := "/proc/" + strconv.Itoa(pid) + "/fd"
	descriptors, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("look at the kubelet's sockets: %w", err)
	}
	inodes := map[uint32]bool{}
	for _, d := range descriptors {
		target, err := os.Readlink(filepath.Join(dir, d.Name()))
		number, isSocket := strings.CutPrefix(strings.TrimSuffix(target, "]"), "socket:[")
		if inode, parseErr := strconv.ParseUint(number, 10, 32); err == nil && isSocket && parseErr == nil {
			inodes[uint32(inode)] = true
		}
	}
	return inodes, nil
}

// See linux/sock_diag.h and linux/unix_diag.h, of which x/sys has but the numbers of families.
const (
	sockDiagByFamily   = 20
	tcpEstablished     = 1
	showVFS, showPeer  = 2, 4
	attrVFS, attrPeer  = 1, 2
	requestLen, msgLen = 24, 16
)

// peersOf returns the inodes of the sockets that are connected to the one at path: to those that accept has made, which have the path of
// the one that listens.
func peersOf(path string) (inodes []uint32, err error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	conn, err := netlink.Dial(unix.NETLINK_SOCK_DIAG, nil)
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for connections: %w", err)
	}
	defer conn.Close()
	request := make([]byte, requestLen)
	request[0] = unix.AF_UNIX
	nlenc.PutUint32(request[4:8], 1<<tcpEstablished)
	nlenc.PutUint32(request[12:16], showVFS|showPeer)
	answer, err := conn.Execute(netlink.Message{
		Header: netlink.Header{Type: sockDiagByFamily, Flags: netlink.Request | netlink.Dump},
		Data:   request,
	})
	if err != nil {
		return nil, fmt.Errorf("ask the kernel for connections: %w", err)
	}
	for _, m := range answer {
		if len(m.Data) < msgLen {
			continue
		}
		attributes, err := netlink.NewAttributeDecoder(m.Data[msgLen:])
		if err != nil {
			return nil, fmt.Errorf("read the kernel's list of connections: %w", err)
		}
		var here bool
		var peer uint32
		for attributes.Next() {
			switch b := attributes.Bytes(); {
			case attributes.Type() == attrVFS && len(b) == 8:
				// The kernel's own numbers: of an inode the lower half, of a device 12 and 20 bits.
				inode, device := nlenc.Uint32(b[:4]), nlenc.Uint32(b[4:])
				here = inode == uint32(file.Ino) && device>>20 == unix.Major(file.Dev) && device&(1<<20-1) == unix.Minor(file.Dev)
			case attributes.Type() == attrPeer && len(b) == 4:
				peer = nlenc.Uint32(b)
			}
		}
		if err := attributes.Err(); err != nil {
			return nil, fmt.Errorf("read the kernel's list of connections: %w", err)
		}
		if here && peer != 0 {
			inodes = append(inodes, peer)
		}
	}
	return inodes, nil
}

// version asks a runtime who it is.
func version(ctx context.Context, endpoint string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	client, err := grpc.NewClient("unix://"+socket(endpoint), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return "", err
	}
	defer client.Close()
	answer, err := runtimeapi.NewRuntimeServiceClient(client).Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		return "", err
	}
	return answer.GetRuntimeName() + " " + answer.GetRuntimeVersion(), nil
}
