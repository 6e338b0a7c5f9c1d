package node_test

import (
	"bufio"
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

func TestSweepAfterKill(t *testing.T) {
	nodes := newNodes(t)
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestOwner$", "-test.v")
	cmd.Env = append(os.Environ(), asOwner+"=1")
	cmd.Stderr = os.Stderr
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var name string
	for lines := bufio.NewScanner(stdout); name == "" && lines.Scan(); {
		name, _ = strings.CutPrefix(lines.Text(), "node ")
		if name == lines.Text() {
			name = ""
		}
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	// Its pipe may be open in what it started.
	stdout.Close()
	_ = cmd.Wait()
	if name == "" {
		t.Fatal("the owner has not started a node")
	}
	nodes.names = append(nodes.names, name)
	if err := node.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	nodes.assertGone(t)
}

// TestOwner is the process that TestSweepAfterKill kills: it has a node with a frozen container.
func TestOwner(t *testing.T) {
	if os.Getenv(asOwner) == "" {
		t.Skip("runs as a process of TestSweepAfterKill only")
	}
	n, err := node.Start(t.Context(), node.Options{})
	if err != nil {
		t.Fatal(err)
	}
	client := startContainerd(t, n)
	if _, err := client.RunContainer(t.Context(), node.Spec{}); err != nil {
		t.Fatal(err)
	}
	if err := freeze(n.Name()); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("\nnode %s\n", n.Name())
	time.Sleep(time.Minute)
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
