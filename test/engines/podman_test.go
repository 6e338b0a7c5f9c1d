package engines

import (
	"testing"

	"crishim/test/node"
)

func TestPodman(t *testing.T) {
	first := start(t, node.Options{})
	second := startPodman(t)
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			original := dial(t, first).Run(t, node.Spec{Image: image, Handler: runtime, Command: []string{"/bin/workload", "tcp"}})
			exec(t, original, changes)
			cp := dump(t, first, original, runtime)
			want := exec(t, original, state)
			send(t, first, second, cp)
			archive := "/data/" + runtime + "-podman.tar"
			output(t, second, crishim, "convert", "--to", "podman", cp.path, archive)
			sound(t, second, archive)

			id := podmanRestore(t, second, archive, "--tcp-established", "--file-locks")
			goesOn(t, cp, func() (string, error) { return second.Output(t.Context(), "podman", "logs", id) })
			if got := output(t, second, "podman", "exec", id, "/bin/sh", "-c", state) + "\n"; got != want {
				t.Errorf("files are\n%swant\n%s", got, want)
			}
			output(t, second, "podman", "rm", "--force", "--time", "1", id)
		})
	}
	t.Run("takes the OCI image, too", func(t *testing.T) {
		name := output(t, second, crishim, "convert", "--to", "oci", "--name", "localhost/test/counter:1", "/data/checkpoint-runc.tar", "/data/image.tar")
		output(t, second, "podman", "load", "--input", "/data/image.tar")
		got := output(t, second, "podman", "image", "inspect", "--format", `{{index .Annotations "io.kubernetes.cri-o.annotations.checkpoint.name"}}`, name)
		if got != "test" {
			t.Errorf("the image's annotation is %q, want the container's name", got)
		}
	})
}

// startPodman starts a node with podman, which pulls from the node's registry, and keeps its images where overlay can.
func startPodman(t *testing.T) *node.Node {
	t.Helper()
	n := start(t, node.Options{Root: node.Podman, Hostname: "second"})
	if err := n.ConfigurePodman(); err != nil {
		t.Fatal(err)
	}
	return n
}

// podmanRestore restores an archive and returns the container's ID. An error has what CRIU's log has of them.
func podmanRestore(t *testing.T, n *node.Node, archive string, options ...string) string {
	t.Helper()
	return output(t, n, "sh", append([]string{"-c", `podman container restore --import "$@" || {
		grep -h 'Error (' /data/containers/overlay-containers/*/userdata/restore.log >&2
		exit 1
	}`, "sh", archive}, options...)...)
}
