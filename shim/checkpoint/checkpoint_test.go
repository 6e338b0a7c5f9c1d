package checkpoint_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
	"crishim/test/restore"
)

func TestMain(m *testing.M) {
	// The service starts its own binary again as the helper, and here that is the test's.
	if len(os.Args) == 2 && os.Args[1] == checkpoint.HelperCommand {
		os.Exit(checkpoint.HelperMain())
	}
	os.Exit(m.Run())
}

// serve starts the checkpoint service on a socket of its own, in front of the node's containerd.
func serve(t *testing.T) (*node.Client, runtimeapi.RuntimeServiceClient) {
	t.Helper()
	containerd := dialContainerd(t)
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Criu: "criu", Log: testLog(t)})
	socket := filepath.Join(t.TempDir(), "crishim.sock")
	listener, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, service)
	done := make(chan error, 1)
	go func() { done <- server.Serve(listener) }()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		server.Stop()
		if err := <-done; err != nil {
			t.Errorf("serve: %v", err)
		}
		service.Drain(context.Background())
	})
	return containerd, runtimeapi.NewRuntimeServiceClient(conn)
}

func dialContainerd(t *testing.T) *node.Client {
	t.Helper()
	node.Require(t)
	containerd, err := node.DialLocalCRI(node.ContainerdSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { containerd.Close() })
	return containerd
}

func testLog(t *testing.T) logrus.FieldLogger {
	log := logrus.New()
	log.SetLevel(logrus.DebugLevel)
	log.SetOutput(t.Output())
	log.SetFormatter(&logrus.TextFormatter{TimestampFormat: "05.000", FullTimestamp: true})
	return log
}

// run starts a container and removes it at the end of the test.
func run(t *testing.T, client *node.Client, spec node.Spec) *node.Container {
	t.Helper()
	c, err := client.RunContainer(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Remove(context.Background()); err != nil {
			t.Errorf("remove container: %v", err)
		}
	})
	return c
}

var counted = regexp.MustCompile(`count (\d+)\n`)

// lastCount returns the last number that a workload has written.
func lastCount(t *testing.T, output string) int {
	t.Helper()
	all := counted.FindAllStringSubmatch(output, -1)
	if all == nil {
		return 0
	}
	n, err := strconv.Atoi(all[len(all)-1][1])
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// waitCount waits until the output has a number over n, and returns it.
func waitCount(t *testing.T, n int, output func() (string, error)) int {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		text, err := output()
		if err != nil {
			t.Fatal(err)
		}
		if now := lastCount(t, text); now > n {
			return now
		}
		if time.Now().After(deadline) {
			t.Fatalf("no count over %d for 20 s; output ends in %q", n, text[max(0, len(text)-200):])
		}
	}
}

func location(t *testing.T) string {
	t.Helper()
	// On the node's disk, not on its overlay or in a tmpfs.
	dir := filepath.Join("/data", "checkpoints-"+strings.ReplaceAll(t.Name(), "/", "-"))
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return filepath.Join(dir, "checkpoint-test.tar")
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, entry := range entries {
		fmt.Fprintln(&b, entry)
	}
	return b.String()
}

func TestCheckpointIsRestoredByItsOwnRuntime(t *testing.T) {
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			containerd, crishim := serve(t)
			original := run(t, containerd, node.Spec{Handler: runtime})
			before := waitCount(t, 5, original.Log)
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: original.ID, Location: path}
			if _, err := crishim.CheckpointContainer(t.Context(), request); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil {
				t.Fatal(err)
			}
			if info.Mode() != 0o600 {
				t.Errorf("mode is %v, want 0600", info.Mode())
			}
			if got, want := listing(t, filepath.Dir(path)), "- checkpoint-test.tar\n"; got != want {
				t.Errorf("the directory holds\n%s", got)
			}
			after := waitCount(t, before+5, original.Log)

			archive, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer archive.Close()
			restored, err := restore.Archive(t.Context(), restore.Local(), archive, node.WorkloadImage)
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := restored.Remove(context.Background()); err != nil {
					t.Error(err)
				}
			}()
			waitCount(t, after, restored.Output)
			output, _ := restored.Output()
			first, _ := strconv.Atoi(counted.FindStringSubmatch(output)[1])
			if first < before || first > after {
				t.Errorf("restored container went on at %d; it was checkpointed between %d and %d", first, before, after)
			}
			waitCount(t, after+5, original.Log)
		})
	}
}
