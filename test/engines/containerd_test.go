package engines

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

func TestContainerd2(t *testing.T) {
	first := start(t, node.Options{})
	second := startContainerd2(t)
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			original := dial(t, first).Run(t, node.Spec{Image: image, Handler: runtime})
			exec(t, original, changes)
			cp := dump(t, first, original, runtime)
			want := exec(t, original, state)
			send(t, first, second, cp)
			sound(t, second, cp.path)

			t.Run("as an OCI image", func(t *testing.T) {
				name := output(t, second, crishim, "convert", "--to", "oci", cp.path, "/data/"+runtime+"-image.tar")
				output(t, second, "ctr", "-n", "k8s.io", "images", "import", "/data/"+runtime+"-image.tar")
				waitImage(t, second, name)
				restored := run(t, second, name, runtime)
				goesOn(t, cp, restored.Log)
				if got := exec(t, restored, state); got != want {
					t.Errorf("files are\n%swant\n%s", got, want)
				}
			})
			t.Run("as a file", func(t *testing.T) {
				restored := run(t, second, cp.path, runtime)
				goesOn(t, cp, restored.Log)
				if got := exec(t, restored, state); got != want {
					t.Errorf("files are\n%swant\n%s", got, want)
				}
				t.Run("and again", func(t *testing.T) {
					again := dump(t, second, restored, runtime+"-again")
					sound(t, second, again.path)
					restored := run(t, second, again.path, runtime)
					goesOn(t, again, restored.Log)
					if got := exec(t, restored, state); got != want {
						t.Errorf("files are\n%swant\n%s", got, want)
					}
				})
			})
			t.Run("with connections", func(t *testing.T) {
				original := dial(t, first).Run(t, node.Spec{Image: image, Handler: runtime, Command: []string{"/bin/workload", "tcp"}})
				cp := dump(t, first, original, runtime+"-connections")
				send(t, first, second, cp)
				// containerd passes no flag for them. runc has a file for that, and crun the script in its place.
				if runtime == "runc" {
					if c, err := dial(t, second).RunContainer(t.Context(), checkpointed(cp.path, runtime)); err == nil {
						t.Errorf("container %s was restored without /etc/criu/runc.conf: then docs/moving.md need not name it", c.ID)
					}
					output(t, second, "mkdir", "/etc/criu")
					if err := os.WriteFile(second.Path("/etc/criu/runc.conf"), []byte("tcp-established\n"), 0o644); err != nil {
						t.Fatal(err)
					}
				}
				goesOn(t, cp, run(t, second, cp.path, runtime).Log)
			})
		})
	}
}

// What crishim has compressed is read by checkpointctl, and by containerd as an image.
func TestCompressedArchive(t *testing.T) {
	first := start(t, node.Options{})
	const socket = "/run/crishim-zstd/crishim.sock"
	if _, err := first.StartCrishimAt(t.Context(), "crishim-zstd", socket, node.Crishim(t), "--compression", "zstd"); err != nil {
		t.Fatal(err)
	}
	original := dial(t, first).Run(t, node.Spec{Image: image})
	exec(t, original, changes)
	cp := dumpBy(t, first.Client(t, socket), original, "compressed")
	want := exec(t, original, state)
	second := startContainerd2(t)
	send(t, first, second, cp)
	if magic := output(t, second, "sh", "-c", "head -c 4 "+cp.path+" | od -An -tx1"); magic != "28 b5 2f fd" {
		t.Fatalf("the archive begins with %s, which is not zstd", magic)
	}
	sound(t, second, cp.path) // by checkpointctl, too

	t.Run("containerd, as an OCI image", func(t *testing.T) {
		name := output(t, second, crishim, "convert", "--to", "oci", cp.path, "/data/image.tar") // its layer is compressed, too
		output(t, second, "ctr", "-n", "k8s.io", "images", "import", "/data/image.tar")
		waitImage(t, second, name)
		restored := run(t, second, name, "runc")
		goesOn(t, cp, restored.Log)
		if got := exec(t, restored, state); got != want {
			t.Errorf("files are\n%swant\n%s", got, want)
		}
	})
	t.Run("containerd, as a file", func(t *testing.T) {
		if c, err := dial(t, second).RunContainer(t.Context(), checkpointed(cp.path, "runc")); err == nil {
			t.Errorf("container %s was restored of a compressed file: then docs/moving.md need not say that it cannot be", c.ID)
		}
	})
}

// startContainerd2 starts a node with containerd 2, and with a script in crun's place.
func startContainerd2(t *testing.T) *node.Node {
	t.Helper()
	n := start(t, node.Options{Root: node.Containerd2, Hostname: "second"})
	script, err := os.ReadFile("testdata/crun")
	if err != nil {
		t.Fatal(err)
	}
	output(t, n, "mv", "/usr/bin/crun", "/usr/bin/crun.real")
	if err := os.WriteFile(n.Path("/usr/bin/crun"), script, 0o755); err != nil {
		t.Fatal(err)
	}
	return n
}

// checkpointed describes a container that is made from a checkpoint: an image, or a file.
func checkpointed(from, runtime string) node.Spec {
	return node.Spec{Image: image /* this one can be pulled */, Handler: runtime, Container: func(c *cri.ContainerConfig) {
		c.Image = &cri.ImageSpec{Image: from, UserSpecifiedImage: from}
	}}
}

func run(t *testing.T, n *node.Node, from, runtime string) *node.Container {
	t.Helper()
	return dial(t, n).Run(t, checkpointed(from, runtime))
}

// waitImage waits for containerd's CRI, which hears of an imported image in its own time.
func waitImage(t *testing.T, n *node.Node, name string) {
	t.Helper()
	client := dial(t, n)
	for {
		answer, err := client.Images.ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: name}})
		if err != nil {
			t.Fatal(err)
		}
		if answer.GetImage() != nil {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// sound fails the test unless crishim and checkpointctl have nothing to say against an archive.
func sound(t *testing.T, n *node.Node, path string) {
	t.Helper()
	report := output(t, n, crishim, "verify", path)
	for _, want := range []string{"digests    right", "criu ", "kernel ", "cpu ", "mount ", "/dev/shm: a directory, whose content the archive has"} {
		if !strings.Contains(report, want) {
			t.Errorf("crishim verify does not say %q:\n%s", want, report)
		}
	}
	for _, args := range [][]string{{"show", path}, {"inspect", "--all", path}, {"list", filepath.Dir(path)}} {
		// list tells pods and containers only.
		if out := output(t, n, checkpointctl(t, n), args...); args[0] != "list" && !strings.Contains(out, image) || strings.Contains(out, "rror") {
			t.Errorf("checkpointctl %s says\n%s", args[0], out)
		}
	}
}
