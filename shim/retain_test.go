package shim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive"
	"crishim/shim/monitor"
	"crishim/shim/retention"
	"crishim/test/node"
)

// publish makes an archive as the checkpoint service does, without a container.
func publish(t *testing.T, path, container string, made time.Time) {
	t.Helper()
	location, err := archive.OpenLocation(path)
	if err != nil {
		t.Fatal(err)
	}
	defer location.Close()
	staging, err := location.Stage(archive.StagingName())
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = staging.Remove() }()
	err = errors.Join(
		staging.WriteJSON(archive.ConfigDump, archive.Config{ID: container, CheckpointedTime: made}),
		staging.WriteJSON(archive.SpecDump, struct{}{}),
		staging.WriteJSON(archive.StatusDump, struct{}{}),
		staging.WriteJSON(archive.ManifestName, archive.NewManifest(archive.Origin{})),
	)
	if err == nil {
		err = staging.Assemble(t.Context(), archive.Options{}, func(int64) {})
	}
	if err == nil {
		err = staging.Publish(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// privateDir is a directory in which archives may be. That of the test's own may be below one of somebody else's.
func privateDir(t *testing.T) string {
	t.Helper()
	requireRoot(t)
	dir, err := os.MkdirTemp("", "crishim-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// written is what a log has got since it was last taken.
type written struct {
	mu     sync.Mutex
	buffer bytes.Buffer
}

func (w *written) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buffer.Write(p)
}

func (w *written) take() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	defer w.buffer.Reset()
	return w.buffer.String()
}

func files(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

// It looks at the start, when it is told that an archive has been written, when the rules change, and each hour. Only in directories that are listed.
func TestWhenArchivesAreRemoved(t *testing.T) {
	listed, other := privateDir(t), privateDir(t)
	synctest.Test(t, func(t *testing.T) {
		begin := time.Now()
		for _, dir := range []string{listed, other} {
			for i := range 3 {
				publish(t, filepath.Join(dir, fmt.Sprintf("checkpoint-%d.tar", i)), "x", begin.Add(time.Duration(i)*time.Minute))
			}
		}
		log := logrus.New()
		output := &written{}
		log.SetOutput(output)
		r := newRetainer(Retention{Directories: []string{"/nowhere/at/all", listed}, Policy: retention.Policy{PerContainer: 2}, DryRun: true}, log)
		r.monitor = monitor.New(monitor.Build{}, monitor.Sources{})
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.run(ctx)
		}()
		expect := func(when, log string, want ...string) {
			t.Helper()
			synctest.Wait()
			if got := files(t, listed); !slices.Equal(got, want) {
				t.Errorf("%s there are %q, want %q", when, got, want)
			}
			if got := output.take(); !strings.Contains(got, log) {
				t.Errorf("%s the log lacks %q:\n%s", when, log, got)
			}
		}
		expect("at a dry start", "retention would remove an archive, and does not", "checkpoint-0.tar", "checkpoint-1.tar", "checkpoint-2.tar")
		rules := Retention{Directories: []string{listed}, Policy: retention.Policy{PerContainer: 2}}
		r.changed(rules)
		expect("with other rules", `why="of its container at most 2 stay, and 2 are younger"`, "checkpoint-1.tar", "checkpoint-2.tar")
		publish(t, filepath.Join(listed, "checkpoint-3.tar"), "x", begin.Add(3*time.Minute))
		r.written()
		expect("after a checkpoint", "container=x directory="+listed+" file=checkpoint-1.tar", "checkpoint-2.tar", "checkpoint-3.tar")
		rules.Policy.Age = time.Hour
		r.changed(rules)
		expect("when none is too old", "", "checkpoint-2.tar", "checkpoint-3.tar")
		time.Sleep(2*time.Hour + time.Minute)
		expect("hours later", "retention has removed an archive", []string(nil)...)
		cancel()
		<-done
	})
	if got := files(t, other); len(got) != 3 {
		t.Errorf("in a directory that is not listed there are %q", got)
	}
}

// A directory in which others could put archives, or remove them, is left alone.
func TestADirectoryOfOthers(t *testing.T) {
	dir := privateDir(t)
	publish(t, filepath.Join(dir, "checkpoint-0.tar"), "x", time.Now().Add(-time.Hour))
	if err := os.Chmod(dir, 0o777); err != nil {
		t.Fatal(err)
	}
	_, err := Retention{Policy: retention.Policy{Age: time.Minute}}.Plan(dir)
	if err == nil || !strings.Contains(err.Error(), "can be written by others than root") {
		t.Errorf("the error is %v", err)
	}
}

// Real checkpoints, by the daemon: when the second one has been answered, the first goes.
func TestRetentionOfCheckpoints(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{Container: func(c *runtimeapi.ContainerConfig) {
		// As a kubelet does.
		c.Labels = map[string]string{"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "web-0", "io.kubernetes.container.name": "nginx"}
	}})
	node.WaitCount(t, 0, c.Log)
	dir, err := os.MkdirTemp("/data", "retention-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(t.TempDir(), "crishim.sock")
	rules := Retention{Directories: []string{dir}, Policy: retention.Policy{PerContainer: 1}}
	defer start(t, Config{Listen: socket, RuntimeEndpoint: node.ContainerdSocket, Criu: "criu", Retention: rules})()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, name := range []string{"checkpoint-1.tar", "checkpoint-2.tar"} {
		_, err := runtimeapi.NewRuntimeServiceClient(conn).CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: filepath.Join(dir, name)})
		if err != nil {
			t.Fatal(err)
		}
		for deadline := time.Now().Add(time.Minute); !slices.Equal(files(t, dir), []string{name}); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("there are %q", files(t, dir))
			}
		}
	}
	plan, err := rules.Plan(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer plan.Close()
	if len(plan.Archives) != 1 || plan.Archives[0].Container != "shop/web-0/nginx" || time.Since(plan.Archives[0].Made) > time.Hour {
		t.Errorf("it is %+v", plan.Archives)
	}
}
