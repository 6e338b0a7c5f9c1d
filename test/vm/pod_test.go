package vm

import (
	"context"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// Containers without a kubelet, which would end what it does not know.

// location is where they are dumped to, in a directory of their own.
const location = "/var/lib/crishim-test/checkpoint.tar"

// runContainer starts a container that is removed at the test's end. It is containerd that is asked: crishim is away at times.
func runContainer(t *testing.T, n *node.Node, spec node.Spec) *node.Container {
	t.Helper()
	change := spec.Pod
	spec.Pod = func(c *cri.PodSandboxConfig) {
		// systemd makes the cgroups, and names them in its own way.
		c.Linux.CgroupParent = "crishimtest.slice"
		if change != nil {
			change(c)
		}
	}
	return n.Client(t, node.ContainerdSocket).Run(t, spec)
}

// checkpoint makes one of a container through crishim.
func checkpoint(t *testing.T, n *node.Node, c *node.Container) error {
	client, err := n.DialCRI(node.CrishimSocket)
	if err != nil {
		return err
	}
	defer client.Close()
	ctx, cancel := context.WithTimeout(t.Context(), node.Patience)
	defer cancel()
	_, err = client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: location})
	return err
}

// settled waits until nothing is left of a checkpoint but an archive, and says whether there is one.
func settled(t *testing.T, n *node.Node) (archive bool) {
	t.Helper()
	complaint := ""
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		if complaint = n.Harm(t, "/nowhere"); complaint != "" {
			continue
		}
		archive = false
		for _, name := range strings.Fields(n.Listing(t, filepath.Dir(location))) {
			if name == filepath.Base(location) {
				archive = true
			} else {
				complaint = "left beside the location: " + name
			}
		}
		for _, name := range strings.Fields(n.Listing(t, "/var/lib/crishim")) {
			if name != "lock" && name != "history.log" {
				complaint = "left in the state directory: " + name
			}
		}
		if complaint == "" {
			return archive
		}
	}
	t.Fatal(complaint)
	return false
}
