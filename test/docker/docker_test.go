// Package docker tests crishim in front of Docker's engine: a real dockerd with real containers, in a node that is driven from the
// host. Only what a kubelet would talk to there is not real, see standIn.
package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive"
	"crishim/test/node"
	"crishim/test/restore"
)

// checkpoints is where the tests put archives, in a node.
const checkpoints = "/data/checkpoints"

// dockerNode is a node with Docker, the stand-in, and crishim in front of it.
type dockerNode struct {
	*node.Node
	engine *http.Client
	// client talks to crishim.
	client *node.Client
}

// start starts a node with Docker on its own containerd, or on that of the node.
func start(t *testing.T, options node.Options, ownContainerd bool) dockerNode {
	t.Helper()
	binary := node.Crishim(t)
	options.Root = node.Docker
	n := node.StartFor(t, options)
	if !ownContainerd {
		if _, err := n.StartContainerd(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := n.StartDocker(t.Context()); err != nil {
		t.Fatal(err)
	}
	stop, err := serveStandIn(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(stop)
	if _, err := n.StartCrishim(t.Context(), binary, "--runtime-endpoint", "unix://"+standInSocket, "--log-level", "debug"); err != nil {
		t.Fatal(err)
	}
	client, err := n.DialCRI(node.CrishimSocket)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close() })
	if err := os.Mkdir(n.Path(checkpoints), 0o700); err != nil {
		t.Fatal(err)
	}
	return dockerNode{n, n.DockerClient(), client}
}

// run runs a container that is removed at the test's end. Its image is one that Docker can pull.
func (d dockerNode) run(t *testing.T, spec node.Spec) *node.Container {
	t.Helper()
	spec.Image = node.DockerWorkloadImage
	return d.client.Run(t, spec)
}

// log returns what a container has written. Docker's file is read itself: the link to it leads astray outside of the node.
func (d dockerNode) log(c *node.Container) func() (string, error) {
	return func() (string, error) {
		content, err := os.ReadFile(d.Path(ownLog(c.ID)))
		if err != nil {
			return "", err
		}
		var text strings.Builder
		for lines := json.NewDecoder(bytes.NewReader(content)); ; {
			var line struct{ Log string }
			err := lines.Decode(&line)
			if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) { // it is being written
				return text.String(), nil
			}
			if err != nil {
				return "", err
			}
			text.WriteString(line.Log)
		}
	}
}

func ownLog(id string) string { return "/var/lib/docker/containers/" + id + "/" + id + "-json.log" }

func (d dockerNode) checkpoint(ctx context.Context, id, location string) error {
	_, err := d.client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: id, Location: location})
	return err
}

// task has the engine do something with a container: pause or unpause.
func (d dockerNode) task(t *testing.T, id, verb string) {
	t.Helper()
	if err := (&standIn{engine: d.engine}).call(t.Context(), http.MethodPost, "/containers/"+id+"/"+verb, nil, nil); err != nil {
		t.Fatal(err)
	}
}

// members reads all but the large members of an archive.
func members(t *testing.T, path string) map[string][]byte {
	t.Helper()
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	return read(t, file)
}

func read(t *testing.T, r io.Reader) map[string][]byte {
	t.Helper()
	all := map[string][]byte{}
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(io.LimitReader(archive, 1<<20))
		if err != nil {
			t.Fatal(err)
		}
		all[header.Name] = content
	}
}

// changes is a shell script with a change of each kind to a container's files, which then counts.
const changes = `echo kept >/root/new; mkdir -m 0750 /root/dir; ln -s new /root/link; rm /bin/df; chmod 0700 /etc; echo in memory >/dev/shm/m
exec /bin/workload count`

func TestCheckpointIsRestored(t *testing.T) {
	for _, test := range []struct {
		name          string
		cgroupV2      bool
		ownContainerd bool
		runtimes      []string
	}{
		{"cgroup v1, containerd of its own", false, true, []string{"runc", "crun"}},
		// The node has no controllers there, and crun runs none of Docker's containers without that for block I/O.
		{"cgroup v2, containerd of the node", true, false, []string{"runc"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			d := start(t, node.Options{CgroupV2: test.cgroupV2}, test.ownContainerd)
			other := node.StartContainerdFor(t, node.Options{Hostname: "other", CgroupV2: test.cgroupV2})
			for _, runtime := range test.runtimes {
				t.Run(runtime, func(t *testing.T) { checkpointAndRestore(t, d, other, runtime) })
			}
		})
	}
}

func checkpointAndRestore(t *testing.T, d dockerNode, other *node.Node, runtime string) {
	volume := "/data/volume-" + runtime
	if err := os.Mkdir(d.Path(volume), 0o750); err != nil {
		t.Fatal(err)
	}
	original := d.run(t, node.Spec{
		Name: runtime, Handler: runtime, Command: []string{"/bin/sh", "-c", changes},
		Mounts: []*cri.Mount{{HostPath: volume, ContainerPath: "/volume"}},
	})
	before := node.WaitCount(t, 5, d.log(original))
	path := filepath.Join(checkpoints, "checkpoint-"+runtime+".tar")
	if err := d.checkpoint(t.Context(), original.ID, path); err != nil {
		t.Fatal(err)
	}
	after := node.WaitCount(t, before+5, d.log(original))

	got := members(t, d.Path(path))
	checkMetadata(t, got, original, runtime)
	file, err := os.Open(d.Path(path))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	machine := restore.Machine{Command: other.Command, Path: other.Path}
	restored, err := restore.Archive(t.Context(), machine, file, node.WorkloadImage)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := restored.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	})
	node.WaitCount(t, after, restored.Output)
	output, err := restored.Output()
	if err != nil {
		t.Fatal(err)
	}
	first := node.Counts(output)[0]
	if first < before || first > after+1 {
		t.Errorf("the restored container went on at %d; it was checkpointed between %d and %d", first, before, after)
	}
	count, err := strconv.Atoi(strings.TrimSpace(string(read(t, bytes.NewReader(got[archive.RootfsDiff]))["var/count"])))
	if err != nil || count != first-1 && count != first-2 {
		t.Errorf("memory goes on with %d, the archive's file says %d, %v: they are not of one moment", first, count, err)
	}
	if content, err := restored.File("/root/link"); err != nil || content != "kept\n" {
		t.Errorf("the new file, through its link, is %q, %v", content, err)
	}
	for name, want := range map[string]os.FileMode{"/root/dir": os.ModeDir | 0o750, "/etc": os.ModeDir | 0o700, "/bin/df": 0} {
		if mode := restored.Mode(name); mode != want {
			t.Errorf("%s is %v, want %v", name, mode, want)
		}
	}
	if shm := read(t, bytes.NewReader(got[archive.DevShm]))["m"]; string(shm) != "in memory\n" {
		t.Errorf("/dev/shm/m in the archive is %q", shm)
	}
	checkLog(t, string(got[archive.ContainerLog]), before, first)
	node.WaitMore(t, d.log(original))
}

// checkMetadata looks at what the archive says of its container: it is what the stand-in says, and the engine.
func checkMetadata(t *testing.T, got map[string][]byte, original *node.Container, runtime string) {
	t.Helper()
	var config archive.Config
	if err := json.Unmarshal(got[archive.ConfigDump], &config); err != nil {
		t.Fatal(err)
	}
	if config.ID != original.ID || config.Name != runtime || config.Runtime != runtime || config.RootfsImageName != node.DockerWorkloadImage ||
		!strings.HasPrefix(config.RootfsImageRef, "docker-pullable://127.0.0.1:5000/workload@sha256:") {
		t.Errorf("config.dump is %+v", config)
	}
	if !regexp.MustCompile("^[0-9a-f]{64}$").MatchString(config.RootfsImageID) {
		t.Errorf("the image's id is %q", config.RootfsImageID)
	}
	var status cri.ContainerStatus
	if err := json.Unmarshal(got[archive.StatusDump], &status); err != nil {
		t.Fatal(err)
	}
	if status.GetId() != original.ID || status.GetLogPath() != original.LogPath {
		t.Errorf("status.dump is %v", &status)
	}
	if !bytes.Contains(got[archive.SpecDump], []byte("/var/lib/docker/overlay2/")) {
		t.Errorf("spec.dump is not the bundle's: %.200s", got[archive.SpecDump])
	}
}

// checkLog looks at the log in the archive, which has the CRI's format: all numbers from 1 to one of the time of the dump.
func checkLog(t *testing.T, log string, before, first int) {
	t.Helper()
	line := regexp.MustCompile(`^(\S+) stdout F count (\d+)\n$`)
	n := 0
	for text := range strings.Lines(log) {
		n++
		match := line.FindStringSubmatch(text)
		if match == nil || match[2] != strconv.Itoa(n) {
			t.Fatalf("line %d of the log is %q", n, text)
		}
		if _, err := time.Parse(time.RFC3339Nano, match[1]); err != nil {
			t.Fatalf("line %d of the log: %v", n, err)
		}
	}
	if n < before || n > first {
		t.Errorf("the archive's log ends at %d; memory goes on with %d", n, first)
	}
}

func TestRefused(t *testing.T) {
	d := start(t, node.Options{}, true)
	counting := func(t *testing.T, annotations map[string]string) *node.Container {
		c := d.run(t, node.Spec{Container: func(c *cri.ContainerConfig) { c.Annotations = annotations }})
		node.WaitCount(t, 0, d.log(c))
		return c
	}
	location := filepath.Join(checkpoints, "checkpoint-refused.tar")
	refused := func(t *testing.T, id string, code codes.Code, want string) {
		t.Helper()
		err := d.checkpoint(t.Context(), id, location)
		if status.Code(err) != code || !strings.Contains(status.Convert(err).Message(), want) {
			t.Errorf("error is %v, want %s with %q", err, code, want)
		}
		if message := status.Convert(err).Message(); len(message) > 512 || strings.Contains(message, "\n") {
			t.Errorf("message is not one line of at most 512 characters: %s", message)
		}
		left, err := os.ReadDir(d.Path(checkpoints))
		if err != nil || len(left) > 0 {
			t.Errorf("left behind: %v, %v", left, err)
		}
	}
	t.Run("paused", func(t *testing.T) {
		c := counting(t, nil)
		d.task(t, c.ID, "pause")
		refused(t, c.ID, codes.FailedPrecondition, "test ("+c.ID[:12]+") is paused: unpause it first")
		d.task(t, c.ID, "unpause")
		node.WaitMore(t, d.log(c))
	})
	t.Run("exited", func(t *testing.T) {
		c := d.run(t, node.Spec{Command: []string{"/bin/sh", "-c", "exit 3"}})
		for state := cri.ContainerState_CONTAINER_RUNNING; state != cri.ContainerState_CONTAINER_EXITED; {
			var err error
			if state, err = c.State(t.Context()); err != nil {
				t.Fatal(err)
			}
		}
		refused(t, c.ID, codes.FailedPrecondition, "is exited, with code 3")
	})
	t.Run("none", func(t *testing.T) {
		// cri-dockerd gives its errors no code.
		refused(t, "0123456789abcdef", codes.Unknown, "No such container: 0123456789abcdef")
	})
	t.Run("another runtime", func(t *testing.T) {
		// As the process of a virtual machine: alive, but started by no shim. Docker's own containerd is one.
		pid, err := d.Output(t.Context(), "pgrep", "-x", "containerd")
		if err != nil {
			t.Fatal(err)
		}
		c := counting(t, map[string]string{annotationPid: strings.TrimSpace(pid)})
		refused(t, c.ID, codes.FailedPrecondition, `it is run by "dockerd" (process `)
		node.WaitMore(t, d.log(c))
	})
	t.Run("a process of another container", func(t *testing.T) {
		first := counting(t, nil)
		pid, err := first.Pid(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		second := d.run(t, node.Spec{Name: "second", Container: func(c *cri.ContainerConfig) {
			c.Annotations = map[string]string{annotationPid: strconv.Itoa(pid)}
		}})
		refused(t, second.ID, codes.FailedPrecondition, fmt.Sprintf("process %d, which the runtime names, is not the one", pid))
		node.WaitMore(t, d.log(first))
		node.WaitMore(t, d.log(second))
	})
	t.Run("no pid", func(t *testing.T) {
		c := counting(t, map[string]string{annotationNoInfo: "true"})
		refused(t, c.ID, codes.FailedPrecondition, `has no "info"`)
	})
	t.Run("log", func(t *testing.T) {
		c, neighbour := counting(t, nil), d.run(t, node.Spec{Name: "neighbour"})
		for _, target := range []string{"/etc/shadow", ownLog(neighbour.ID), "../../../../../var/lib/docker/containers/" + c.ID + "/config.v2.json"} {
			link(t, d.Path(c.LogPath), target)
			refused(t, c.ID, codes.FailedPrecondition, "its log "+c.LogPath+" is a link to "+fmt.Sprintf("%.128q", target))
			node.WaitMore(t, d.log(c))
		}
		// And once it is put right, it works.
		link(t, d.Path(c.LogPath), ownLog(c.ID))
		if err := d.checkpoint(t.Context(), c.ID, location); err != nil {
			t.Fatal(err)
		}
		if log := members(t, d.Path(location))[archive.ContainerLog]; !bytes.Contains(log, []byte(" stdout F count 1\n")) {
			t.Errorf("the archive's log is %.100q", log)
		}
	})
}

// link replaces a file by a link.
func link(t *testing.T, path, target string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(target, path); err != nil {
		t.Fatal(err)
	}
}
