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

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/criu/unixdiag"
)

var errNotConnected = errors.New("it is not connected")

// connected returns nil if a process has a connection to the socket at an endpoint, by what the kernel says: /proc tells which sockets the process
// has, and sock_diag(7) which of them are connected to which file.
func connected(pid int, endpoint string) error {
	inodes, err := sockets(pid)
	if err != nil {
		return err
	}
	peers, err := peersOf(pid, socket(endpoint))
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

// peersOf returns the inodes of the sockets that are connected to the one at path: to those that accept has made, which have the path of
// the one that listens. They are those of the process's network namespace: this process may have another, as the scripts of a package have by rpm 4.20.
func peersOf(pid int, path string) (inodes []uint32, err error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	namespace, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("look at the kubelet's sockets: %w", err)
	}
	defer namespace.Close()
	all, err := unixdiag.List(int(namespace.Fd()))
	if err != nil {
		return nil, err
	}
	for _, s := range all {
		if s.IsAt(&file) && s.Peer != 0 {
			inodes = append(inodes, s.Peer)
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
