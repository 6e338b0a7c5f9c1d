package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
)

// ByItself is the virtual machine that this process runs in, as a node of which systemd is the first process. containerd and kubelet are
// its services, configured for the systemd cgroup driver and not started: containerd.service is Debian's, kubelet.service is
// made here and passes KUBELET_EXTRA_ARGS on; it would talk to containerd. Stop ends the registry alone.
func ByItself(ctx context.Context) (*Node, error) {
	if os.Getenv(InMachine) == "" {
		return nil, errors.New("find virtual machine: this process does not run in one; see testnode vm")
	}
	c, err := openCache()
	if err != nil {
		return nil, err
	}
	hostname, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("find virtual machine: %w", err)
	}
	n := &Node{cache: c, pid: 1, hostname: hostname, systemd: true}
	if err := n.prepareContainerd(ctx); err != nil {
		return nil, fmt.Errorf("configure containerd: %w", err)
	}
	if err := errors.Join(n.configureKubelet(ctx, KubeletOptions{RuntimeEndpoint: ContainerdSocket}), n.writeKubeletUnit()); err != nil {
		return nil, errors.Join(fmt.Errorf("configure kubelet: %w", err), n.Stop())
	}
	return n, nil
}

func (n *Node) writeKubeletUnit() error {
	unit := `[Unit]
Description=A kubelet without an API server
After=containerd.service

[Service]
ExecStart=` + KubeletPath + " " + strings.Join(n.kubeletFlags(), " ") + ` $KUBELET_EXTRA_ARGS
Restart=always
RestartSec=1
`
	return os.WriteFile(filepath.Join("/etc/systemd/system", "kubelet.service"), []byte(unit), 0o644)
}

// Kubelet is the one that systemd has started. It waits until that answers.
func (n *Node) Kubelet(ctx context.Context) (*Kubelet, error) { return n.meetKubelet(ctx, nil) }
