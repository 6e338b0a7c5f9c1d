package kubelet

import (
	"context"
	"errors"
	"fmt"
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
	held, err := unixdiag.Held(pid)
	if err != nil {
		return err
	}
	peers, err := peersOf(pid, socket(endpoint))
	if err != nil {
		return err
	}
	for _, inode := range peers {
		if _, has := held[inode]; has {
			return nil
		}
	}
	return errNotConnected
}

// peersOf returns the inodes of the sockets that are connected to the one at path: to those that accept has made, which have the path of
// the one that listens. They are those of the process's network namespace: this process may have another, as the scripts of a package have by rpm 4.20.
func peersOf(pid int, path string) (inodes []uint32, err error) {
	var file unix.Stat_t
	if err := unix.Stat(path, &file); err != nil {
		return nil, fmt.Errorf("look at %s: %w", path, err)
	}
	all, err := unixdiag.List(pid)
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
