package node

import (
	"context"
	"fmt"
	"net"
	"net/http"
)

const (
	// DockerSocket is the socket of Docker's engine in the node, see StartDocker.
	DockerSocket = "/run/docker.sock"
	// DockerWorkloadImage is WorkloadImage by the name under which Docker can pull it: it takes a mirror for docker.io only.
	DockerWorkloadImage = registryAddress + "/workload:1"
	// DockerPauseImage is PauseImage in the same way.
	DockerPauseImage = registryAddress + "/pause:1"
)

// StartDocker starts Docker's engine, in a node whose root is Docker, and waits until it answers. Its containers run under the
// node's containerd where that was started before, otherwise under one that dockerd starts for itself. Its runtimes are runc (the
// default) and crun.
func (n *Node) StartDocker(ctx context.Context) (*Daemon, error) {
	if err := n.startRegistry(ctx); err != nil {
		return nil, fmt.Errorf("start docker: %w", err)
	}
	daemon, err := n.StartDaemon("docker", "dockerd", "--storage-driver", "overlay2", "--add-runtime", "crun=/usr/bin/crun")
	if err != nil {
		return nil, err
	}
	client := n.DockerClient()
	err = n.wait(ctx, daemon, func(ctx context.Context) error {
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://docker/_ping", nil)
		if err != nil {
			return err
		}
		response, err := client.Do(request)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("ping: %s", response.Status)
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("start docker: %w", err)
	}
	return daemon, nil
}

// DockerClient returns a client of the engine's API, for URLs of any host. It keeps no connection between requests.
func (n *Node) DockerClient() *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", n.Path(DockerSocket))
		},
		DisableKeepAlives: true,
	}}
}
