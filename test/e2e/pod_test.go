package e2e

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// The containers of one pod: an init container, a sidecar that is one too, and a large one. Each can be checkpointed, and the others
// are left alone.
func TestContainersOfAPod(t *testing.T) {
	n, _ := start(t, node.Options{})
	k, err := n.StartKubelet(t.Context(), node.KubeletOptions{RuntimeEndpoint: node.CrishimSocket})
	if err != nil {
		t.Fatal(err)
	}
	const name = "trio"
	pod := k.PodName(name)
	container := func(name string, command ...string) map[string]any {
		return map[string]any{"name": name, "image": node.WorkloadImage, "command": command}
	}
	sidecar := container("sidecar", "/bin/workload", "net", "pingpong")
	sidecar["restartPolicy"] = "Always"
	running := make(chan error, 1)
	go func() {
		running <- k.RunPod(t.Context(), node.Pod{Name: name, Spec: map[string]any{
			"initContainers": []any{sidecar, container("prepare", "/bin/workload", "count")},
			"containers":     []any{container("large", "/bin/workload", "memory", "1024")},
		}})
	}()
	log := func(name string) func() (string, error) {
		return func() (string, error) {
			text, err := k.ContainerLog(t.Context(), pod, name)
			var refusal *node.HTTPError
			if errors.As(err, &refusal) {
				return "", nil // it does not run yet
			}
			return text, err
		}
	}
	checkpoint := func(t *testing.T, name string) string {
		t.Helper()
		paths, err := k.Checkpoint(t.Context(), pod, name, 0)
		if err != nil || len(paths) != 1 {
			t.Fatalf("got %q, %v, want one path", paths, err)
		}
		return paths[0]
	}

	t.Run("the init container, while the pod waits for it", func(t *testing.T) {
		node.WaitCount(t, 3, log("prepare"))
		checkpoint(t, "prepare")
		node.WaitMore(t, log("prepare"))
		if _, err := k.Exec(t.Context(), pod, "prepare", "kill 1"); err != nil {
			t.Fatal(err)
		}
		if err := <-running; err != nil {
			t.Fatal(err)
		}
	})
	if t.Failed() {
		return
	}
	node.WaitCount(t, 0, log("large"))

	t.Run("the large one, and its sidecar has its network all along", func(t *testing.T) {
		before := pingpong(t, log("sidecar"))
		held, ended := hold(t, n, checkpoints, func() error {
			_, err := k.Checkpoint(t.Context(), pod, "large", 0)
			return err
		})
		start, now := time.Now(), pingpong(t, log("sidecar"))
		for first := now.exchanges; now.exchanges < first+2000; now = pingpong(t, log("sidecar")) {
			if time.Since(start) > time.Minute {
				t.Fatalf("%d exchanges within a minute of the dump: is the network locked?", now.exchanges-first)
			}
			time.Sleep(50 * time.Millisecond)
		}
		dumped := time.Since(start)
		held.Release()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		after := pingpong(t, log("sidecar"))
		t.Logf("the longest exchange took %s before the dump, and %s until its end; it was held for %s", before.longest, after.longest, dumped)
		if after.longest >= dumped {
			t.Errorf("an exchange took %s: it has waited for the dump of another container", after.longest)
		}
		node.WaitMore(t, log("large"))
	})
	t.Run("the sidecar, which has a connection", func(t *testing.T) {
		path := checkpoint(t, "sidecar")
		if got := streams(t, n.Path(path)); got != 2 {
			t.Errorf("the archive has %d ends of connections, want both of its own", got)
		}
		first := pingpong(t, log("sidecar"))
		node.WaitCount(t, first.count+5, log("sidecar"))
		if now := pingpong(t, log("sidecar")); now.exchanges == first.exchanges {
			t.Errorf("no exchange since: %+v", now)
		}
	})
	// The kubelet resizes no static pod: this is what it asks of the runtime for others.
	t.Run("the large one again, resized in place and at its limit", func(t *testing.T) {
		client := dial(t, n)
		id := containerID(t, client, "large")
		group := memoryCgroup(t, n, "/bin/workload", "memory", "1024")
		usage := number(t, group+"/memory.usage_in_bytes")
		if usage > 1<<30+128<<20 {
			t.Errorf("it uses %d bytes: the images of its first dump are charged to it, and not to who wrote them", usage)
		}
		const room = 8 << 20
		limit := usage + room
		_, err := client.Runtime.UpdateContainerResources(t.Context(), &cri.UpdateContainerResourcesRequest{
			ContainerId: id, Linux: &cri.LinuxContainerResources{MemoryLimitInBytes: limit},
		})
		if err != nil {
			t.Fatal(err)
		}
		// The cache of what it writes fills up the rest.
		if _, err := k.Exec(t.Context(), pod, "large", "dd if=/dev/zero of=/tmp/cached bs=64k count=256"); err != nil {
			t.Fatal(err)
		}
		if usage := number(t, group+"/memory.usage_in_bytes"); limit-usage > room/8 {
			t.Errorf("the container uses %d of %d bytes: it is not at its limit", usage, limit)
		}
		path := checkpoint(t, "large")
		node.WaitMore(t, log("large"))
		killed, err := os.ReadFile(group + "/memory.oom_control")
		if err != nil || !strings.Contains(string(killed), "oom_kill 0\n") {
			t.Errorf("memory.oom_control is %q, %v: the dump has killed the container", killed, err)
		}
		var spec specs.Spec
		if err := json.Unmarshal(members(t, n.Path(path))["spec.dump"], &spec); err != nil {
			t.Fatal(err)
		}
		if memory := spec.Linux.Resources.Memory; memory == nil || memory.Limit == nil || *memory.Limit != limit {
			t.Errorf("the archive's limit of memory is %+v, want %d", memory, limit)
		}
	})
	for _, name := range []string{"sidecar", "large"} {
		text, err := log(name)()
		if err != nil {
			t.Fatal(err)
		}
		for i, number := range node.Counts(text) {
			if number != i+1 {
				t.Fatalf("number %d of %s is %d: it was restarted, or has lost one", i+1, name, number)
			}
		}
	}
}

// exchanges is what a pingpong has written last.
type exchanges struct {
	count, exchanges int
	longest          time.Duration
}

var exchanged = regexp.MustCompile(`count (\d+)\nexchanges (\d+), longest (\d+) us\n`)

// pingpong waits until a pingpong has written something, and returns what it wrote last.
func pingpong(t *testing.T, log func() (string, error)) exchanges {
	t.Helper()
	node.WaitCount(t, 1, log)
	text, err := log()
	if err != nil {
		t.Fatal(err)
	}
	all := exchanged.FindAllStringSubmatch(text, -1)
	var fields [3]int
	for i := range fields {
		fields[i], _ = strconv.Atoi(all[len(all)-1][i+1]) // digits
	}
	return exchanges{fields[0], fields[1], time.Duration(fields[2]) * time.Microsecond}
}

// containerID finds a running container of the kubelet's by its name in the pod.
func containerID(t *testing.T, client *node.Client, name string) string {
	t.Helper()
	list, err := client.Runtime.ListContainers(t.Context(), &cri.ListContainersRequest{Filter: &cri.ContainerFilter{
		State:         &cri.ContainerStateValue{State: cri.ContainerState_CONTAINER_RUNNING},
		LabelSelector: map[string]string{"io.kubernetes.container.name": name},
	}})
	if err != nil || len(list.GetContainers()) != 1 {
		t.Fatalf("list containers named %s: %v, %v", name, list, err)
	}
	return list.GetContainers()[0].GetId()
}

// memoryCgroup is the directory of the memory controller, version 1, of the node's process that runs a command line.
func memoryCgroup(t *testing.T, n *node.Node, command ...string) string {
	t.Helper()
	processes, err := filepath.Glob(n.Path("/proc/[0-9]*/cmdline"))
	if err != nil {
		t.Fatal(err)
	}
	for _, process := range processes {
		content, err := os.ReadFile(process)
		if err != nil || strings.TrimRight(string(content), "\x00") != strings.Join(command, "\x00") {
			continue
		}
		content, err = os.ReadFile(filepath.Dir(process) + "/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(content)) {
			if _, path, ok := strings.Cut(strings.TrimSpace(line), ":memory:"); ok {
				return "/sys/fs/cgroup/memory" + path
			}
		}
	}
	t.Fatalf("no memory cgroup of %q was found", command)
	return ""
}

// number reads a file that holds one.
func number(t *testing.T, path string) int64 {
	t.Helper()
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	n, err := strconv.ParseInt(strings.TrimSpace(string(content)), 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// members reads an archive's members, those of CRIU's images by name only.
func members(t *testing.T, path string) map[string][]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	all := map[string][]byte{}
	for archive := tar.NewReader(file); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all[header.Name] = nil
		if strings.HasPrefix(header.Name, "checkpoint/") {
			continue
		}
		if all[header.Name], err = io.ReadAll(archive); err != nil {
			t.Fatal(err)
		}
	}
}

// streams counts the TCP connections in an archive.
func streams(t *testing.T, path string) (count int) {
	t.Helper()
	for name := range members(t, path) {
		if strings.HasPrefix(name, "checkpoint/tcp-stream-") {
			count++
		}
	}
	return count
}
