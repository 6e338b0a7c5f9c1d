package node_test

import (
	"bufio"
	"context"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"crishim/test/node"
)

// asOwner makes the test binary the owner of a node that is killed.
const asOwner = "CRISHIM_TEST_OWNER"

func TestMain(m *testing.M) {
	if os.Getenv(asOwner) == "" {
		os.Exit(m.Run())
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	fmt.Fprintln(os.Stderr, "own node:", own(ctx))
	os.Exit(1)
}

func TestSweepAfterKill(t *testing.T) {
	nodes := newNodes(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0])
	cmd.Env = append(os.Environ(), asOwner+"=1")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	name, found := strings.CutPrefix(strings.TrimSpace(line), "node ")
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	// Its pipe may be open in what it started.
	stdout.Close()
	_ = cmd.Wait()
	sweepErr := node.Sweep(t.Context())
	if !found {
		t.Fatalf("the owner has not started a node: %q, %v", line, err)
	}
	nodes.names = append(nodes.names, name)
	if sweepErr != nil {
		t.Error(sweepErr)
	}
	nodes.assertGone(t)
}

// own is the process that TestSweepAfterKill kills: it has a node with a frozen container.
func own(ctx context.Context) error {
	n, err := node.Start(ctx, node.Options{})
	if err != nil {
		return err
	}
	if _, err := n.StartContainerd(ctx); err != nil {
		return err
	}
	client, err := n.DialCRI(node.ContainerdSocket)
	if err != nil {
		return err
	}
	if _, err := client.RunContainer(ctx, node.Spec{}); err != nil {
		return err
	}
	if err := freeze(n.Name()); err != nil {
		return err
	}
	fmt.Printf("node %s\n", n.Name())
	<-ctx.Done()
	return ctx.Err()
}

// freeze freezes all containers of a node, by whichever version of cgroups it has.
func freeze(name string) error {
	frozen := 0
	err := filepath.WalkDir("/sys/fs/cgroup", func(path string, entry fs.DirEntry, err error) error {
		if err != nil || !entry.IsDir() || !strings.Contains(path, name+"/pods/") {
			return nil // other nodes come and go
		}
		for file, value := range map[string]string{"freezer.state": "FROZEN", "cgroup.freeze": "1"} {
			if os.WriteFile(filepath.Join(path, file), []byte(value), 0) == nil {
				frozen++
			}
		}
		return nil
	})
	if err == nil && frozen == 0 {
		return fmt.Errorf("freeze node %s: found nothing to freeze", name)
	}
	return err
}
