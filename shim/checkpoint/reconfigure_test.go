package checkpoint_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive"
	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// Which name of a directory is used does not matter, and what is below it is another.
func TestConfiguredDirectories(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	dir := filepath.Dir(location(t))
	listed, other := filepath.Join(dir, "listed"), filepath.Join(dir, "other")
	link := filepath.Join(dir, "link")
	err := errors.Join(os.MkdirAll(filepath.Join(listed, "below"), 0o700), os.Mkdir(other, 0o700), os.Symlink(listed, link))
	if err != nil {
		t.Fatal(err)
	}
	for _, directories := range [][]string{{"/nowhere", listed}, {link}} {
		service := serviceWith(t, containerd, "criu", func(config *checkpoint.Config) { config.Directories = directories })
		for path, want := range map[string]codes.Code{
			filepath.Join(listed, "a.tar"):          codes.OK,
			filepath.Join(link, "b.tar"):            codes.OK,
			filepath.Join(other, "a.tar"):           codes.InvalidArgument,
			filepath.Join(listed, "below", "a.tar"): codes.InvalidArgument,
			listed + ".tar":                         codes.InvalidArgument,
		} {
			_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
			if status.Code(err) != want || err != nil && !strings.Contains(err.Error(), strings.Join(directories, ", ")) {
				t.Errorf("%s, with %q: error is %v, want %v", path, directories, err, want)
			}
			if err := os.Remove(path); err != nil && want == codes.OK {
				t.Error(err)
			}
		}
	}
}

// While checkpoints are made, the configuration changes all the time. Each archive is of the form of one or the other, whole.
func TestReconfigureWhileCheckpointsAreMade(t *testing.T) {
	containerd := node.Containerd(t)
	config := checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Log: testLog(t),
	}
	service := checkpoint.New(config)
	defer service.Drain(context.Background())
	var all sync.WaitGroup
	defer all.Wait()
	done := make(chan struct{})
	defer close(done)
	all.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-done:
				return
			default:
			}
			other := config
			other.Bounds.Parallel = 1 + i%3
			if i%2 == 0 {
				other.Archive = archive.Options{Compression: archive.Zstd, Digest: archive.None}
				other.RefuseTCP = true
			}
			service.Reconfigure(other)
		}
	})
	dir := filepath.Dir(location(t))
	var checkpoints sync.WaitGroup
	for _, name := range []string{"a", "b", "c"} {
		c := containerd.Run(t, node.Spec{})
		node.WaitCount(t, 0, c.Log)
		checkpoints.Go(func() {
			for _, round := range []string{"1", "2"} {
				path := filepath.Join(dir, name+round)
				if _, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
					t.Error(err)
					continue
				}
				if err := soundAndOfOneForm(t, path); err != nil {
					t.Error(err)
				}
			}
		})
	}
	checkpoints.Wait()
}

// soundAndOfOneForm tells whether an archive is sound, and either compressed or with digests.
func soundAndOfOneForm(t *testing.T, path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	plain, compressed, err := archive.Decompress(file)
	if err != nil {
		return err
	}
	defer plain.Close()
	report, err := archive.Verify(t.Context(), plain, nil)
	if err != nil {
		return err
	}
	if len(report.Problems) > 0 || report.Manifest == nil {
		return errors.New("the archive is not sound: " + strings.Join(report.Problems, "; "))
	}
	if digests := report.Manifest.Members[0].SHA256 != ""; digests == compressed {
		return errors.New("the archive is neither of one form nor of the other")
	}
	return nil
}
