package checkpoint_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// withEverything holds all that a criu could leave something of: much memory, a connection, for which the network is locked, and an
// open file that is deleted and has another name, to which CRIU adds one.
const withEverything = "exec 3<>/root/deleted; ln /root/deleted /root/other; rm /root/deleted; workload tcp >/dev/null & exec workload memory 512"

// A criu that is killed can undo nothing: crishim does it, and says so.
func TestACRIUThatIsKilledLeavesNothing(t *testing.T) {
	for _, handler := range []string{"runc", "crun"} {
		t.Run(handler, func(t *testing.T) {
			containerd, crishim := serve(t)
			c := containerd.Run(t, node.Spec{Handler: handler, Command: []string{"/bin/sh", "-c", withEverything}})
			node.WaitCount(t, 0, c.Log)
			path := location(t)
			checkpoint := func() error {
				_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
				return err
			}
			held, ended := node.HoldCheckpoint(t, filepath.Dir(path), path, checkpoint)
			if left := leftovers(t, c); !strings.Contains(left, "locked") || !strings.Contains(left, "link_remap") {
				t.Errorf("in mid-dump there is only %q: the test shows nothing", left)
			}
			held.Kill()
			err := <-ended
			if status.Code(err) != codes.Internal || !strings.Contains(err.Error(), "criu was killed in mid-dump (killed)") ||
				!strings.Contains(err.Error(), "unlocked its network") || !strings.Contains(err.Error(), "removed 1 names") {
				t.Errorf("error is %v, want Internal and what was done", err)
			}
			unharmed(t, c, path)
			if left := leftovers(t, c); left != "" {
				t.Errorf("left behind: %s", left)
			}
			if err := checkpoint(); err != nil {
				t.Errorf("the next checkpoint: %v", err)
			}
		})
	}
}

// leftovers are what is left of a dump on a container, in words.
func leftovers(t *testing.T, c *node.Container) string {
	t.Helper()
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var left []string
	if found := rules(t, pid); strings.Contains(found, "CRIU") {
		left = append(left, "a locked network: "+found)
	}
	err = filepath.WalkDir(fmt.Sprintf("/proc/%d/root/", pid), func(path string, entry os.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist), err == nil && (entry.Name() == "proc" || entry.Name() == "sys") && entry.IsDir():
			return filepath.SkipDir
		case err == nil && strings.HasPrefix(entry.Name(), "link_remap"):
			left = append(left, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(left, "; ")
}

func killAll(t *testing.T, pids []int) {
	t.Helper()
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			t.Error(err)
		}
	}
}

// criuProcesses are the pids of all criu in the node.
func criuProcesses(t *testing.T) []int {
	t.Helper()
	names, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, name := range names {
		if comm, _ := os.ReadFile(name); string(comm) != "criu\n" {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(name)))
		if err != nil {
			t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}
