// Package crash kills crishim: the daemon, the helper of a checkpoint and criu, one by one and together, at each step and at any moment,
// on a real node that is driven from the host. However a checkpoint ends, nothing may be left of it.
package crash

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive"
	"crishim/test/node"
)

const (
	checkpoints = "/data/checkpoints" // in the node
	location    = checkpoints + "/checkpoint-test.tar"
	// within is how soon after a kill a container must go on, and all else be put right.
	within = 5 * time.Second
)

// withEverything holds all that a criu could leave something of: so many MiB of memory, of which the workload keeps checking the content; a
// connection, for which the network is locked; and an open file that is deleted and has another name, to which CRIU adds one.
func withEverything(mib int) []string {
	return []string{"/bin/sh", "-c", "exec 3<>/root/deleted; ln /root/deleted /root/other; rm /root/deleted; workload tcp >/dev/null & " +
		"exec workload memory " + strconv.Itoa(mib)}
}

// victims are the processes that take part in a checkpoint.
type victims struct{ daemon, helper, criu bool }

func (v victims) String() string {
	var names []string
	for _, one := range []struct {
		is   bool
		name string
	}{{v.daemon, "daemon"}, {v.helper, "helper"}, {v.criu, "criu"}} {
		if one.is {
			names = append(names, one.name)
		}
	}
	return strings.Join(names, " and ")
}

// anyOf are all that can be killed together.
var anyOf = []victims{
	{daemon: true}, {helper: true}, {criu: true}, {daemon: true, helper: true}, {helper: true, criu: true}, {daemon: true, criu: true},
	{daemon: true, helper: true, criu: true},
}

// bed is a node with crishim in front of containerd, and a client of crishim that comes back to it after each restart.
type bed struct {
	*node.Node
	t      *testing.T
	binary string
	client *node.Client
	direct *node.Client // of containerd
	// call is the context of the checkpoints that are made next; nil for the test's.
	call context.Context
}

func newBed(t *testing.T, tags ...string) *bed {
	t.Helper()
	b := &bed{t: t, binary: node.Crishim(t, tags...)}
	b.Node = node.StartContainerdFor(t, node.Options{})
	b.client, b.direct = b.Client(t, node.CrishimSocket), b.Client(t, node.ContainerdSocket)
	if err := os.Mkdir(b.Path(checkpoints), 0o700); err != nil {
		t.Fatal(err)
	}
	b.start()
	return b
}

// start starts crishim, as systemd does after its death.
func (b *bed) start() {
	b.t.Helper()
	if _, err := b.StartCrishim(b.t.Context(), b.binary); err != nil {
		b.t.Fatal(err)
	}
}

// subject is a container that is checkpointed.
type subject struct {
	*node.Container
	pid, pod int // of its own first process and of its pod's, in the node
}

// run starts a container with everything.
func (b *bed) run(mib int) subject { return b.runCommand(withEverything(mib)) }

// runCommand starts a container with a workload. Not through crishim, which is away at times.
func (b *bed) runCommand(command []string) subject {
	b.t.Helper()
	c, err := b.direct.RunContainer(b.t.Context(), node.Spec{Command: command})
	if err != nil {
		b.t.Fatal(err)
	}
	node.WaitCount(b.t, 0, c.Log)
	s := subject{Container: c}
	if s.pid, err = c.Pid(b.t.Context()); err != nil {
		b.t.Fatal(err)
	}
	pod, err := b.direct.Runtime.PodSandboxStatus(b.t.Context(), &cri.PodSandboxStatusRequest{PodSandboxId: c.PodID, Verbose: true})
	if err != nil {
		b.t.Fatal(err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(pod.GetInfo()["info"]), &info); err != nil {
		b.t.Fatal(err)
	}
	s.pod = info.Pid
	return s
}

// checkpoint makes one in the background.
func (b *bed) checkpoint(c subject) (ended <-chan error) {
	result := make(chan error, 1)
	go func() {
		ctx := b.call
		if ctx == nil {
			ctx = b.t.Context()
		}
		ctx, cancel := context.WithTimeout(ctx, time.Minute)
		defer cancel()
		_, err := b.client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: location})
		result <- err
	}()
	return result
}

// kill kills those victims that live, and says which these are.
func (b *bed) kill(v victims) (killed victims) {
	b.t.Helper()
	helpers, criu := b.CheckpointProcesses(b.t)
	var pids []int
	// criu first: the daemon has an orphan roll back, and believes that it did so when it ends, however it ends.
	if v.criu {
		pids, killed.criu = append(pids, criu...), len(criu) > 0
	}
	// Then the daemon: between two kills this process may have to wait for a processor, and it would answer for the helper's end.
	parent := 0
	if v.daemon {
		pid := b.Daemon("crishim").Pid()
		pids, killed.daemon, parent = append(pids, pid), true, parentOf(pid)
	}
	if v.helper {
		pids, killed.helper = append(pids, helpers...), len(helpers) > 0
	}
	for _, pid := range pids {
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			b.t.Fatal(err)
		}
	}
	if v.daemon {
		_ = unix.Kill(parent, unix.SIGCONT) // see stopped
		<-b.Daemon("crishim").Done()
	}
	return killed
}

// parentOf is the parent of a process of the host, 0 if it has ended.
func parentOf(pid int) int {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	_, after, _ := strings.Cut(string(content), ") ")
	parent, err := strconv.Atoi(strings.Fields(after)[1])
	if err != nil {
		return 0
	}
	return parent
}

// settled waits until nothing is left of a checkpoint of a container but an archive, for as long as that may take, and fails the test
// otherwise. survives is false where the container may have died of it; settled says whether it has survived.
func (b *bed) settled(c subject, since time.Time, survives bool) (survived bool) {
	b.t.Helper()
	before := node.LastCount(b.log(c))
	for {
		log := b.log(c)
		if strings.Contains(log, "has changed") {
			b.t.Fatalf("the content of the container's memory is another: %s", log[max(0, len(log)-200):])
		}
		goesOn := node.LastCount(log) > before
		ended := false
		if !goesOn && !survives {
			state, err := c.State(b.t.Context())
			if err != nil {
				b.t.Fatal(err)
			}
			ended = state == cri.ContainerState_CONTAINER_EXITED
		}
		complaint := b.left(c, ended)
		switch {
		case complaint == "" && (goesOn || ended):
			return !ended
		case time.Since(since) < within:
			time.Sleep(10 * time.Millisecond)
		case complaint != "":
			b.t.Fatal(complaint)
		default:
			b.t.Fatalf("the container has not gone on for %s", within)
		}
	}
}

func (b *bed) log(c subject) string {
	b.t.Helper()
	log, err := os.ReadFile(b.Path(c.LogPath))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(log)
}

// left says what is left of a checkpoint on the node and, unless it has ended, on the container.
func (b *bed) left(c subject, ended bool) string {
	b.t.Helper()
	if complaint := b.Harm(b.t, nowhere); complaint != "" {
		return complaint
	}
	for _, name := range strings.Fields(b.Listing(b.t, checkpoints)) {
		if name != filepath.Base(location) {
			return "left beside the location: " + name
		}
	}
	for _, name := range strings.Fields(b.Listing(b.t, node.CrishimState("crishim"))) {
		if name != "lock" && name != "history.log" {
			return "left in the state directory: " + name
		}
	}
	if _, err := os.Stat(b.Path(fmt.Sprintf("/proc/%d", c.pod))); err != nil {
		return "" // and its network with it
	}
	rules, err := b.Output(b.t.Context(), "nsenter", "-n", "-t", strconv.Itoa(c.pod), "sh", "-c", "nft list ruleset && iptables-save && ip6tables-save")
	if err != nil {
		b.t.Fatal(err)
	}
	for _, word := range []string{"CRIU", "DROP", "drop"} {
		if strings.Contains(rules, word) {
			return "the network is locked:\n" + rules
		}
	}
	if ended {
		return ""
	}
	links, err := filepath.Glob(b.Path(fmt.Sprintf("/proc/%d/root/root/link_remap.*", c.pid)))
	if err != nil {
		b.t.Fatal(err)
	}
	return strings.Join(links, " ")
}

// nowhere is a directory that is not looked into.
const nowhere = "/nowhere"

// takeArchive removes the archive at the location, which must be whole, and says whether there is one.
func (b *bed) takeArchive() bool {
	b.t.Helper()
	file, err := os.Open(b.Path(location))
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		b.t.Fatal(err)
	}
	defer file.Close()
	report, err := archive.Verify(b.t.Context(), file, nil)
	if err != nil || len(report.Problems) > 0 || report.Manifest == nil {
		b.t.Fatalf("the archive is not whole: %v, %+v", err, report)
	}
	if err := os.Remove(b.Path(location)); err != nil {
		b.t.Fatal(err)
	}
	return true
}
