package engines

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"crishim/test/node"
)

func TestPodman(t *testing.T) {
	first := start(t, node.Options{})
	second := start(t, node.Options{Root: node.Podman, Hostname: "second"})
	preparePodman(t, second)
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			original := dial(t, first).Run(t, node.Spec{Image: image, Handler: runtime})
			exec(t, original, changes)
			cp := dump(t, first, original, runtime)
			want := exec(t, original, state)
			send(t, first, second, cp)

			archive := "/data/" + runtime + "-podman.tar"
			output(t, second, crishim, "convert", "--to", "podman", cp.path, archive)
			output(t, second, crishim, "verify", archive)
			id, err := second.Output(t.Context(), "podman", "container", "restore", "--import", archive)
			if err != nil {
				t.Log(err)
				t.Fatal(output(t, second, "sh", "-c", "cd /data/containers/overlay-containers/*/userdata; grep -E 'Error|Warn' restore.log | tail; tail -5 restore.log"))
			}
			id = strings.TrimSpace(id)
			goesOn(t, cp, func() (string, error) { return second.Output(t.Context(), "podman", "logs", id) })
			got := output(t, second, "podman", "exec", id, "/bin/sh", "-c", state) + "\n"
			if got != want {
				t.Errorf("files are\n%swant\n%s", got, want)
			}
			output(t, second, "podman", "rm", "--force", "--time", "1", id)
		})
	}
}

// preparePodman lets podman pull from the node's registry, and keep its images where overlay can.
func preparePodman(t *testing.T, n *node.Node) {
	t.Helper()
	for path, content := range map[string]string{
		"/etc/containers/registries.conf.d/node.conf": "[[registry]]\nlocation = \"127.0.0.1:5000\"\ninsecure = true\n",
		"/etc/containers/storage.conf":                "[storage]\ndriver = \"overlay\"\ngraphroot = \"/data/containers\"\nrunroot = \"/run/containers\"\n",
	} {
		os.MkdirAll(filepath.Dir(n.Path(path)), 0o755)
		if err := os.WriteFile(n.Path(path), []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
