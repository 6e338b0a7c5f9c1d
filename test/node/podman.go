package node

import (
	"fmt"
	"os"
)

// ConfigurePodman has the podman of a node with the root Podman pull from the node's registry, and keep its images where overlay can.
func (n *Node) ConfigurePodman() error {
	for path, content := range map[string]string{
		"/etc/containers/registries.conf.d/node.conf": "[[registry]]\nlocation = \"" + registryAddress + "\"\ninsecure = true\n",
		"/etc/containers/storage.conf":                "[storage]\ndriver = \"overlay\"\ngraphroot = \"/data/containers\"\nrunroot = \"/run/containers\"\n",
	} {
		if err := os.WriteFile(n.Path(path), []byte(content), 0o644); err != nil {
			return fmt.Errorf("configure podman: %w", err)
		}
	}
	return nil
}
