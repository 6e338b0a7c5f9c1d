package engines

import (
	"context"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"crishim/test/node"
)

// volumes are those of a pod, and what else an ordinary one has.
var ordinary = map[string]any{
	"securityContext": map[string]any{"seccompProfile": map[string]any{"type": "RuntimeDefault"}},
	"volumes": []any{
		map[string]any{"name": "scratch", "emptyDir": map[string]any{}},
		map[string]any{"name": "data", "hostPath": map[string]any{"path": "/data/shared", "type": "DirectoryOrCreate"}},
	},
}

var mounts = map[string]any{"volumeMounts": []any{
	map[string]any{"name": "scratch", "mountPath": "/scratch"},
	map[string]any{"name": "data", "mountPath": "/shared", "readOnly": true},
}}

// A pod of a kubelet's goes on in a pod of another's, and in podman.
func TestPod(t *testing.T) {
	first := start(t, node.Options{})
	kubelet := startKubelet(t, first, node.CrishimSocket)
	runPod(t, kubelet, image)
	pod := kubelet.PodName("counter")
	log := func() (string, error) { return kubelet.ContainerLog(t.Context(), pod, "counter") }
	cp := checkpoint{before: node.WaitCount(t, 5, log)}
	paths, err := kubelet.Checkpoint(t.Context(), pod, "counter", 0)
	if err != nil || len(paths) != 1 {
		t.Fatalf("checkpoint: %q, %v", paths, err)
	}
	cp.after = node.WaitCount(t, cp.before+5, log)
	cp.path = "/data/" + filepath.Base(paths[0])
	output(t, first, "cp", paths[0], cp.path)

	t.Run("with containerd 2", func(t *testing.T) {
		second := start(t, node.Options{Root: node.Containerd2, Hostname: "second"})
		kubelet := startKubelet(t, second, node.ContainerdSocket)
		send(t, first, second, cp)
		name := output(t, second, crishim, "convert", "--to", "oci", cp.path, "/data/image.tar")
		output(t, second, "ctr", "-n", "k8s.io", "images", "import", "/data/image.tar")
		runPod(t, kubelet, name)
		goesOn(t, cp, func() (string, error) {
			return kubelet.ContainerLog(t.Context(), kubelet.PodName("counter"), "counter")
		})
	})
	t.Run("with podman", func(t *testing.T) {
		second := startPodman(t)
		send(t, first, second, cp)
		output(t, second, crishim, "convert", "--to", "podman", cp.path, "/data/podman.tar")
		// What verify says is enough to know which directories and files have to be there.
		needs := output(t, second, crishim, "verify", "/data/podman.tar")
		for _, m := range regexp.MustCompile(`(?m)^mount +\S+: a (\S+), which was (\S+)$`).FindAllStringSubmatch(needs, -1) {
			if m[1] == "directory" {
				output(t, second, "mkdir", "-p", m[2])
			} else {
				output(t, second, "mkdir", "-p", filepath.Dir(m[2]))
				output(t, second, "touch", m[2])
			}
		}
		id := podmanRestore(t, second, "/data/podman.tar", "--name", "moved")
		goesOn(t, cp, func() (string, error) { return second.Output(t.Context(), "podman", "logs", id) })
	})
}

func startKubelet(t *testing.T, n *node.Node, socket string) *node.Kubelet {
	t.Helper()
	kubelet, err := n.StartKubelet(t.Context(), node.KubeletOptions{Version: "1.34", RuntimeEndpoint: socket})
	if err != nil {
		t.Fatal(err)
	}
	return kubelet
}

func runPod(t *testing.T, kubelet *node.Kubelet, image string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	if err := kubelet.RunPod(ctx, node.Pod{Name: "counter", Image: image, Spec: ordinary, Container: mounts}); err != nil {
		t.Fatal(err)
	}
}
