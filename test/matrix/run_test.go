package matrix

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
	"crishim/test/restore"
)

// step is how far a container got.
type step string

const (
	starting  step = "start"
	dumping   step = "dump"
	restoring step = "restore"
	finished  step = ""
)

// outcome is what became of a container: the step that failed, and why.
type outcome struct {
	failed step
	err    error
}

// instance is the container as a test meets it, the original or the restored one.
type instance struct {
	// output is all that it has written to its standard streams.
	output func() (string, error)
	// signal sends a signal, such as "USR1", to its first process.
	signal func(ctx context.Context, signal string) error
	// input writes to its standard input.
	input func(text string) error
	// exec runs a command in it.
	exec func(ctx context.Context, command ...string) (string, error)
	// machine runs a command on the container's node.
	machine func(ctx context.Context, name string, args ...string) (string, error)
}

// run takes a container all the way. What differs between the original before and after the dump fails the test; what differs in
// the restored one is an error of the restore.
func (s *site) run(t *testing.T, r row, runtime string) outcome {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	// The same directory on both nodes, as volumes are at the same place for a pod that is moved.
	dir := "/data/volumes/" + strings.NewReplacer("/", "-").Replace(t.Name())
	mounts, err := s.makeVolumes(ctx, r, dir)
	if err != nil {
		t.Fatal(err)
	}
	var ends []func() error // what is looked at after the dump
	if r.before != nil {
		end, err := r.before(ctx, t, s)
		if err != nil {
			t.Fatal(err)
		}
		ends = append(ends, end)
	}
	container, err := s.containerd.RunContainer(ctx, r.spec(runtime, mounts))
	if err != nil {
		return outcome{starting, err}
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := container.Remove(ctx); err != nil {
			t.Errorf("remove container: %v", err)
		}
	})
	original := s.original(container)
	if err := s.waitUntilReady(ctx, r, container); err != nil {
		return outcome{starting, err}
	}
	before, err := r.state(ctx, original)
	if err != nil {
		return outcome{starting, err}
	}
	if r.during != nil {
		end, err := r.during(ctx, s, container)
		if err != nil {
			return outcome{starting, err}
		}
		ends = append(ends, end)
	}

	archive, dumpErr := s.checkpoint(ctx, t, container, max(r.dumps, 1))
	undisturbed(ctx, t, r, container, original, before)
	for _, end := range ends {
		if end == nil {
			continue
		}
		if err := end(); err != nil {
			t.Error(err)
		}
	}
	if dumpErr != nil {
		if own := s.runtimeDump(ctx, runtime, container.ID); own == nil {
			t.Errorf("%s checkpoint can dump this container, and crishim cannot: %v", runtime, dumpErr)
		}
		return outcome{dumping, dumpErr}
	}

	address, err := container.Address(ctx)
	if err != nil {
		t.Fatal(err)
	}
	volumes, err := s.moveVolumes(ctx, r, dir)
	if err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	machine := restore.Machine{Command: s.second.Command, Path: s.second.Path, Volumes: volumes, Address: address}
	copied, err := restore.Archive(ctx, machine, file, r.image())
	if err != nil {
		return outcome{restoring, err}
	}
	defer func() {
		if err := copied.Remove(context.WithoutCancel(ctx)); err != nil {
			t.Errorf("remove restored container: %v", err)
		}
	}()
	restored := instance{output: copied.Output, signal: copied.Signal, input: copied.Input, exec: copied.Exec,
		machine: s.second.Output}
	after, err := r.state(ctx, restored)
	if err != nil {
		return outcome{restoring, err}
	}
	if err := compare(ctx, before, after, original, restored); err != nil {
		return outcome{restoring, err}
	}
	if r.after != nil {
		if err := r.after(ctx, restored); err != nil {
			return outcome{restoring, err}
		}
	}
	return outcome{}
}

func (s *site) original(c *node.Container) instance {
	return instance{
		output: func() (string, error) {
			log, err := c.Log()
			return written(log), err
		},
		signal: func(ctx context.Context, signal string) error {
			pid, err := c.Pid(ctx)
			if err != nil {
				return err
			}
			_, err = s.first.Output(ctx, "kill", "-"+signal, strconv.Itoa(pid))
			return err
		},
		exec: c.Exec, machine: s.first.Output,
	}
}

var logPrefix = regexp.MustCompile(`^\S+ (?:stdout|stderr) ([FP]) `)

// written is what a container wrote, out of its log in the CRI's format.
func written(log string) string {
	var text strings.Builder
	for line := range strings.Lines(log) {
		m := logPrefix.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		line = line[len(m[0]):]
		if m[1] == "P" { // a part of a line
			line = strings.TrimSuffix(line, "\n")
		}
		text.WriteString(line)
	}
	return text.String()
}

// waitUntilReady waits until the workload has set up what it holds, or has ended.
func (s *site) waitUntilReady(ctx context.Context, r row, c *node.Container) error {
	for {
		state, err := c.State(ctx)
		if err != nil {
			return err
		}
		log, err := c.Log()
		if err != nil {
			return err
		}
		switch {
		case strings.Contains(log, r.ready()):
			return nil
		case state != cri.ContainerState_CONTAINER_RUNNING:
			return fmt.Errorf("the container has ended: %s", written(log))
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("the container is not ready: %w: %s", err, written(log))
		}
	}
}

func pause(ctx context.Context) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(20 * time.Millisecond):
		return nil
	}
}

// ask has a workload tell its state.
func ask(ctx context.Context, i instance) (string, error) {
	text, err := i.output()
	if err != nil {
		return "", err
	}
	known := len(states(text))
	if err := i.signal(ctx, "USR1"); err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		if text, err = i.output(); err != nil {
			return "", err
		}
		if all := states(text); len(all) > known {
			return all[known], nil
		}
		if err := pause(ctx); err != nil {
			return "", fmt.Errorf("the workload does not answer: %w; its output ends in %q", err, text[max(0, len(text)-500):])
		}
	}
}

// states are the answers in a workload's output.
func states(text string) []string {
	var all []string
	for line := range strings.Lines(text) {
		state, ok := strings.CutPrefix(line, "state ")
		if ok && strings.HasSuffix(line, "\n") {
			all = append(all, strings.TrimSpace(state))
		}
	}
	return all
}

// checkpoint has crishim make an archive, a number of times one after the other, and returns the path of the last here.
func (s *site) checkpoint(ctx context.Context, t *testing.T, c *node.Container, times int) (string, error) {
	location := "/data/checkpoint-" + c.ID + ".tar"
	archive := s.first.Path(location)
	t.Cleanup(func() {
		if err := os.RemoveAll(archive); err != nil {
			t.Error(err)
		}
	})
	for range times {
		if err := os.RemoveAll(archive); err != nil {
			return "", err
		}
		_, err := s.crishim.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.ID, Location: location})
		if err != nil {
			return "", err
		}
	}
	return archive, nil
}

// undisturbed fails the test if a checkpoint, or the attempt at one, has changed the original.
func undisturbed(ctx context.Context, t *testing.T, r row, c *node.Container, original instance, before string) {
	t.Helper()
	after, err := r.state(ctx, original)
	if err == nil {
		err = compare(ctx, before, after, original, original)
	}
	if err != nil {
		t.Errorf("the original after the dump: %v", err)
	}
	if state, err := c.State(ctx); err != nil || state != cri.ContainerState_CONTAINER_RUNNING {
		t.Errorf("the original after the dump is %v, %v", state, err)
	}
}

// runtimeDump dumps a container by its own OCI runtime's command.
func (s *site) runtimeDump(ctx context.Context, runtime, id string) error {
	images := "/data/images-" + id
	defer os.RemoveAll(s.first.Path(images))
	_, err := s.first.Output(ctx, runtime, "--root", "/run/containerd/runc/k8s.io", "checkpoint", "--leave-running",
		"--file-locks", "--tcp-established", "--image-path", images, "--work-path", images, id)
	return err
}

// compare returns what differs between two states of a workload.
func compare(ctx context.Context, before, after string, original, restored instance) error {
	if before == after {
		return nil
	}
	var was, is map[string]string
	if err := errors.Join(json.Unmarshal([]byte(before), &was), json.Unmarshal([]byte(after), &is)); err != nil {
		return fmt.Errorf("was %q, is %q", before, after)
	}
	var errs []error
	for _, kind := range slices.Sorted(maps.Keys(was)) {
		if was[kind] == is[kind] {
			continue
		}
		err := fmt.Errorf("%s %s", kind, difference(was[kind], is[kind]))
		if m := treeState.FindStringSubmatch(was[kind]); m != nil {
			err = fmt.Errorf("%w%s", err, treeDifference(ctx, m[1], original, restored))
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

var treeState = regexp.MustCompile(`tree (\S+): `)

// difference says which parts of a state, between semicolons, are no longer as they were.
func difference(was, is string) string {
	before, after := strings.Split(was, "; "), strings.Split(is, "; ")
	lost := slices.DeleteFunc(slices.Clone(before), func(part string) bool { return slices.Contains(after, part) })
	found := slices.DeleteFunc(slices.Clone(after), func(part string) bool { return slices.Contains(before, part) })
	return fmt.Sprintf("was %q, is %q", strings.Join(lost, "; "), strings.Join(found, "; "))
}

// treeDifference lists the first files that differ.
func treeDifference(ctx context.Context, dir string, original, restored instance) string {
	var lists [2]map[string]bool
	for i, instance := range []instance{original, restored} {
		out, err := instance.exec(ctx, "/bin/workload", "list", dir)
		if err != nil {
			return "; listing it: " + err.Error()
		}
		lists[i] = map[string]bool{}
		for line := range strings.Lines(out) {
			lists[i][line] = true
		}
	}
	var b strings.Builder
	for i, sign := range []string{"-", "+"} {
		shown := 0
		for _, line := range slices.Sorted(maps.Keys(lists[i])) {
			if !lists[1-i][line] && shown < 8 {
				b.WriteString("\n" + sign + strings.TrimSuffix(line, "\n"))
				shown++
			}
		}
	}
	return b.String()
}

// makeVolumes makes the sources of a row's volumes on both nodes, and returns the container's mounts.
func (s *site) makeVolumes(ctx context.Context, r row, dir string) ([]*cri.Mount, error) {
	var mounts []*cri.Mount
	for i, v := range r.volumes {
		source := filepath.Join(dir, strconv.Itoa(i))
		for _, n := range []*node.Node{s.first, s.second} {
			if err := os.MkdirAll(n.Path(source), 0o755); err != nil {
				return nil, err
			}
			if v.prepare == nil {
				continue
			}
			if err := v.prepare(ctx, n, source); err != nil {
				return nil, fmt.Errorf("prepare volume %s: %w", v.path, err)
			}
		}
		mounts = append(mounts, &cri.Mount{
			HostPath: filepath.Join(source, v.sub), ContainerPath: v.path, Readonly: v.readOnly, Propagation: v.propagation,
		})
	}
	return mounts, nil
}

// moveVolumes copies what containers can write from the first node to the second, and returns the volumes of the second by
// mount point.
func (s *site) moveVolumes(ctx context.Context, r row, dir string) (map[string]string, error) {
	volumes := map[string]string{}
	for i, v := range r.volumes {
		source := filepath.Join(dir, strconv.Itoa(i))
		volumes[v.path] = filepath.Join(source, v.sub)
		if v.readOnly {
			continue
		}
		out, err := exec.CommandContext(ctx, "cp", "-a", s.first.Path(source)+"/.", s.second.Path(source)).CombinedOutput()
		if err != nil {
			return nil, fmt.Errorf("copy volume %s: %w: %s", v.path, err, out)
		}
	}
	return volumes, nil
}
