package checkpoint_test

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// Without a record there is no promise, and so no checkpoint. Nothing has to be restarted once the directory can be written again.
func TestAStateDirectoryThatCannotBeWritten(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	for _, test := range []struct {
		name, options string
		flags         uintptr
		code          codes.Code
		want          string
	}{
		{"read-only", "", unix.MS_RDONLY, codes.FailedPrecondition, "read-only file system: make it writable, or choose another --state-dir"},
		{"full", "size=4k", 0, codes.ResourceExhausted, "no space left on device: make room there"},
		{"without inodes", "nr_inodes=2", 0, codes.ResourceExhausted, "no space left on device: make room there"}, // one for itself, one for the lock
	} {
		t.Run(test.name, func(t *testing.T) {
			state := t.TempDir()
			if err := unix.Mount("tmpfs", state, "tmpfs", test.flags, "mode=0700,"+test.options); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := unix.Unmount(state, unix.MNT_DETACH); err != nil {
					t.Error(err)
				}
			}()
			if test.options == "size=4k" {
				if err := os.WriteFile(filepath.Join(state, "fill"), make([]byte, 4096), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			service := checkpoint.New(checkpoint.Config{
				Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: state, Log: testLog(t),
			})
			defer service.Drain(context.Background())
			path := location(t)
			request := &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}
			for range 2 {
				_, err := service.CheckpointContainer(t.Context(), request)
				if status.Code(err) != test.code || !strings.Contains(err.Error(), test.want) || !strings.Contains(err.Error(), state) {
					t.Errorf("error is %v, want %s with %q", err, test.code, test.want)
				}
				unharmed(t, c, path)
			}
			if left := helpers(t); len(left) > 0 {
				t.Errorf("helpers are left: %v", left)
			}
			if err := unix.Mount("tmpfs", state, "tmpfs", unix.MS_REMOUNT, "mode=0700,size=1m,nr_inodes=10"); err != nil {
				t.Fatal(err)
			}
			if _, err := service.CheckpointContainer(t.Context(), request); err != nil {
				t.Errorf("once it can be written: %v", err)
			}
			if left := records(t, state); left != "" {
				t.Errorf("records are left: %s", left)
			}
		})
	}
}

// records are those in a state directory, by their files.
func records(t *testing.T, state string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(state, "*.json*"))
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(files, " ")
}

// keep puts a record into a new state directory.
func keep(t *testing.T, record *crishimv1.Record) (state string) {
	t.Helper()
	state = t.TempDir()
	content, err := protojson.Marshal(record)
	if err != nil {
		t.Fatal(err)
	}
	name := strings.TrimPrefix(record.GetJob().GetStaging(), ".") + ".json"
	if err := os.WriteFile(filepath.Join(state, name), content, 0o600); err != nil {
		t.Fatal(err)
	}
	return state
}

func bootID(t *testing.T) string {
	t.Helper()
	content, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(content))
}

// A pid that was a helper's may be another process's by now, and the number of the helper's session that of another one, in which a
// criu is at work: neither is waited for nor touched.
func TestARepairLeavesStrangersAlone(t *testing.T) {
	containerd := node.Containerd(t)
	criu, err := exec.LookPath("criu")
	if err != nil {
		t.Fatal(err)
	}
	// A criu that waits for requests.
	stranger := exec.Command("setsid", "sh", "-c", criu+" service --address "+filepath.Join(t.TempDir(), "socket")+" & wait")
	if err := stranger.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		killAll(t, criuProcesses(t))
		_ = stranger.Wait()
	}()
	for deadline := time.Now().Add(10 * time.Second); len(criuProcesses(t)) == 0; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("criu does not start")
		}
	}
	path := location(t)
	dir := filepath.Dir(path)
	staging := archive.StagingName()
	// By its name alone a directory is nobody's.
	for _, name := range []string{staging, archive.StagingName()} {
		if err := os.MkdirAll(filepath.Join(dir, name, "checkpoint"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	state := keep(t, &crishimv1.Record{
		BootId: bootID(t), HelperPid: int32(stranger.Process.Pid), HelperStartTime: 1, BeginNs: 1,
		Job: &crishimv1.Job{Location: path, Criu: criu, Staging: staging, Container: &crishimv1.Container{Id: "gone", Pid: 1, StartTime: 1}},
	})
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: criu, State: state, Log: testLog(t)})
	if err := service.Repair(); err != nil {
		t.Fatal(err)
	}
	soon, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	service.Drain(soon)
	for _, pid := range criuProcesses(t) {
		var limit unix.Rlimit
		if err := unix.Prlimit(pid, unix.RLIMIT_FSIZE, nil, &limit); err != nil || limit.Cur == 0 {
			t.Errorf("a stranger's criu, process %d, was told to roll back (%v, %v)", pid, limit, err)
		}
	}
	if left := records(t, state); left != "" {
		t.Errorf("the record is left: %s", left)
	}
	if left := listing(t, dir); strings.Contains(left, staging) || strings.Count(left, ".crishim-") != 1 {
		t.Errorf("the directory holds\n%swant the other staging directory alone", left)
	}
}

// As long as a repair is not done, its container is not checkpointed, and others are. It waits for a helper that lives.
func TestARepairWaitsForTheHelper(t *testing.T) {
	containerd := node.Containerd(t)
	c, other := containerd.Run(t, node.Spec{}), containerd.Run(t, node.Spec{Name: "other"})
	node.WaitCount(t, 0, c.Log)
	node.WaitCount(t, 0, other.Log)
	helper := exec.Command("setsid", "sleep", "1000") // stands in for one
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	ended := false
	end := func() {
		if !ended {
			ended = true
			kill(t, helper.Process.Pid)
			_ = helper.Wait()
		}
	}
	defer end()
	path := location(t)
	state := keep(t, &crishimv1.Record{
		BootId: bootID(t), HelperPid: int32(helper.Process.Pid), HelperStartTime: startTime(t, helper.Process.Pid), BeginNs: time.Now().UnixNano(),
		Checkpoint: &crishimv1.Checkpoint{Id: "before", ContainerId: c.ID, Location: path},
		Job:        &crishimv1.Job{Location: path, Criu: "/usr/sbin/criu", Staging: archive.StagingName(), Container: &crishimv1.Container{Id: c.ID}},
	})
	service := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: state, Log: testLog(t),
	})
	if err := service.Repair(); err != nil {
		t.Fatal(err)
	}
	request := func(c *node.Container, path string) error {
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
		return err
	}
	if err := request(c, path); status.Code(err) != codes.Aborted || !strings.Contains(err.Error(), "is being put right: try again later") {
		t.Errorf("error is %v, want Aborted", err)
	}
	if err := request(other, filepath.Join(filepath.Dir(path), "checkpoint-other.tar")); err != nil {
		t.Errorf("the other container's: %v", err)
	}
	end()
	for deadline := time.Now().Add(10 * time.Second); records(t, state) != ""; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the helper has ended, and the record is still there")
		}
	}
	if c := service.History().Ended("before", ""); codes.Code(c.GetCode()) != codes.Aborted || !strings.HasPrefix(c.GetMessage(), "crishim died over it: ") || c.GetEnd() == nil {
		t.Errorf("the history has %v of it, want Aborted", c)
	}
	service.Drain(context.Background())
	again := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: state, Log: testLog(t),
	})
	service = again
	defer again.Drain(context.Background())
	if err := request(c, path); err != nil {
		t.Errorf("after the repair: %v", err)
	}
}

// startTime is field 22 of /proc/PID/stat of a process whose name has no spaces.
func startTime(t *testing.T, pid int) uint64 {
	t.Helper()
	content, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		t.Fatal(err)
	}
	start, err := strconv.ParseUint(strings.Fields(string(content))[21], 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return start
}
