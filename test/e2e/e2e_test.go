// Package e2e tests crishim as its users meet it: the built binary between a real kubelet and a real containerd, on nodes that
// are driven from the host.
package e2e

import (
	"context"
	"testing"
	"time"

	"crishim/test/node"
)

// start starts a node with containerd and crishim in front of it, and returns the crishim that it has built.
func start(t *testing.T, options node.Options, args ...string) (*node.Node, string) {
	t.Helper()
	binary := node.Crishim(t)
	n := node.StartContainerdFor(t, options)
	if _, err := n.StartCrishim(t.Context(), binary, append([]string{"--log-level", "debug"}, args...)...); err != nil {
		t.Fatal(err)
	}
	return n, binary
}

// startKubelet starts a kubelet in front of a socket of the node, with a pod that counts.
func startKubelet(t *testing.T, n *node.Node, version, socket string) *node.Kubelet {
	t.Helper()
	k, err := n.StartKubelet(t.Context(), node.KubeletOptions{Version: version, RuntimeEndpoint: socket})
	if err != nil {
		t.Fatal(err)
	}
	runPod(t, k, node.Pod{Name: "counter"})
	return k
}

func runPod(t *testing.T, k *node.Kubelet, pod node.Pod) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := k.RunPod(ctx, pod); err != nil {
		t.Fatal(err)
	}
}
