package matrix

import (
	"context"
	"fmt"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

func podRows() []row {
	return []row{
		{name: "resized in place", what: "another limit of memory than at the start", kinds: []string{"threads=2"}, during: resize, after: resized, machine: true},
	}
}

// elsewhere is a kind of container that has a test of its own, since it needs more than two nodes with containerd 1.7.
type elsewhere struct {
	name, what string
	// file and test are where, from the tests' directory; seen is with what.
	file, test, seen string
}

func testedElsewhere() []elsewhere {
	return []elsewhere{
		{"init container", "of a kubelet's pod, which waits for it", "e2e/pod_test.go", "TestContainersOfAPod", "runc v1"},
		{"sidecar", "an init container that goes on, with connections to itself", "e2e/pod_test.go", "TestContainersOfAPod", "runc v1"},
		{"container at its memory limit", "resized in place to what it uses; the dump does not get it killed", "e2e/pod_test.go", "TestContainersOfAPod", "runc v1"},
		{"container of a kubelet's pod", "with volumes, restored by a kubelet with containerd 2.1.9, and by podman", "engines/kubelet_test.go", "TestPod", "runc v1"},
		{"container that was restored", "by containerd 2.1.9, dumped there and restored again", "engines/containerd_test.go", "TestContainerd2", "runc v1, crun v1"},
		{"restored by containerd 2.1.9", "from the archive, and from an OCI image of it", "engines/containerd_test.go", "TestContainerd2", "runc v1, crun v1"},
		{"restored by podman 5.4.2", "from the archive in podman's form", "engines/podman_test.go", "TestPodman", "runc v1, crun v1"},
		{"Docker's containers", "as cri-dockerd shows them; crun starts none where cgroup v2 has no controller for block I/O", "docker/docker_test.go", "TestCheckpointIsRestored", "runc v1, crun v1, runc v2"},
	}
}

const resizedTo = 96 << 20 // bytes

func resize(ctx context.Context, s *site, c *node.Container) (func() error, error) {
	_, err := s.containerd.Runtime.UpdateContainerResources(ctx, &cri.UpdateContainerResourcesRequest{
		ContainerId: c.ID, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: resizedTo},
	})
	if err != nil {
		return nil, fmt.Errorf("update container: %w", err)
	}
	return nil, nil
}

// resized finds the limit at the restored container's cgroup. On v1 it has to be looked for on the machine: the container sees the
// hierarchy that its pod had.
func resized(ctx context.Context, restored instance) error {
	out, err := restored.exec(ctx, "/bin/cat", "/proc/self/cgroup")
	if err != nil {
		return err
	}
	look, file := restored.exec, "/sys/fs/cgroup/memory.max"
	for line := range strings.Lines(out) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); len(fields) == 3 && fields[1] == "memory" {
			file = "/sys/fs/cgroup/memory" + fields[2] + "/memory.limit_in_bytes"
			look = func(ctx context.Context, command ...string) (string, error) {
				return restored.machine(ctx, command[0], command[1:]...)
			}
		}
	}
	limit, err := look(ctx, "/bin/cat", file)
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(limit); got != fmt.Sprint(resizedTo) {
		return fmt.Errorf("%s is %s, want %d", file, got, resizedTo)
	}
	return nil
}
