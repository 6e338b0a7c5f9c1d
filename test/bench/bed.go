package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// outDir is where results are written, in a node.
const outDir = "/data/out"

// bed is a node of which all that matters is on the disk: what containers write, the runtime's content and temporary files, and results.
type bed struct {
	node   *node.Node
	disk   *disk
	client *node.Client
	out    string // outDir, as this process finds it
}

func makeBed(ctx context.Context, d *disk, root node.Root) (_ *bed, err error) {
	n, err := node.Start(ctx, node.Options{Root: root})
	if err != nil {
		return nil, err
	}
	b := &bed{node: n, disk: d}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	own := filepath.Join(d.dir, "node-"+n.Name())
	for _, dir := range []string{"/tmp", "/var/tmp", "/var/lib/containerd", "/data"} {
		if err := os.MkdirAll(own+dir, 0o755); err != nil {
			return nil, err
		}
		if strings.HasSuffix(dir, "/tmp") {
			if err := os.Chmod(own+dir, 0o777|os.ModeSticky); err != nil {
				return nil, err
			}
		}
		if err := n.Bind(own+dir, dir); err != nil {
			return nil, err
		}
	}
	b.out = own + outDir
	if _, err := n.StartContainerd(ctx); err != nil {
		return nil, err
	}
	b.client, err = n.DialCRI(node.ContainerdSocket)
	return b, err
}

func (b *bed) close() error {
	var errs []error
	if b.client != nil {
		errs = append(errs, b.client.Close())
	}
	errs = append(errs, b.node.Stop())
	return errors.Join(append(errs, os.RemoveAll(filepath.Join(b.disk.dir, "node-"+b.node.Name())))...)
}

// shape is what a container that is checkpointed holds.
type shape struct {
	// Memory is in MiB, and Processes how many hold it together.
	Memory, Processes int
	// Files is how many there are of 1 KiB in the writable layer, and Layer the MiB of one large one.
	Files, Layer int
}

func (s shape) String() string {
	text := megabytes(s.Memory)
	if s.Processes > 1 {
		text = fmt.Sprintf("%d × %s", s.Processes, megabytes(s.Memory/s.Processes))
	}
	if s.Layer > 0 {
		text += fmt.Sprintf(", layer of %s and %d files", megabytes(s.Layer), s.Files)
	}
	return text
}

func megabytes(n int) string {
	if n >= 1024 && n%1024 == 0 {
		return fmt.Sprintf("%d GiB", n/1024)
	}
	return fmt.Sprintf("%d MiB", n)
}

func (s shape) command() []string {
	return []string{"/bin/workload", "load", strconv.Itoa(s.Memory), strconv.Itoa(s.Processes), strconv.Itoa(s.Files), strconv.Itoa(s.Layer)}
}

// container is one that holds a shape.
type container struct {
	bed    *bed
	id     string
	pid    int // of its first process, in the node
	host   int // the same on the host
	log    func(ctx context.Context) (string, error)
	remove func(ctx context.Context) error
}

// run starts a container in a pod of containerd's, and waits until it holds what it is to hold.
func (b *bed) run(ctx context.Context, name string, s shape) (_ *container, err error) {
	running, err := b.client.RunContainer(ctx, node.Spec{Name: name, Command: s.command()})
	if err != nil {
		return nil, err
	}
	c := &container{
		bed: b, id: running.ID, remove: running.Remove,
		log: func(context.Context) (string, error) { return running.Log() },
	}
	if c.pid, err = running.Pid(ctx); err == nil {
		err = c.settle(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, running.Remove(context.WithoutCancel(ctx)))
	}
	return c, nil
}

// settle waits until the container is ready.
func (c *container) settle(ctx context.Context) (err error) {
	if c.host, err = hostPid(c.bed.node, c.pid); err != nil {
		return err
	}
	_, err = c.waitLine(ctx, "ready", 1)
	return err
}

// stall asks for the longest stall since it was asked before.
func (c *container) stall(ctx context.Context) (time.Duration, error) {
	log, err := c.log(ctx)
	if err != nil {
		return 0, err
	}
	if err := unix.Kill(c.host, unix.SIGUSR1); err != nil {
		return 0, fmt.Errorf("ask container %s: %w", c.id, err)
	}
	line, err := c.waitLine(ctx, "stall ", strings.Count(log, "stall ")+1)
	if err != nil {
		return 0, err
	}
	microseconds, err := strconv.ParseInt(strings.TrimSpace(line), 10, 64)
	return time.Duration(microseconds) * time.Microsecond, err
}

// waitLine waits until the container has written a word n times, and returns what follows it the last time.
func (c *container) waitLine(ctx context.Context, word string, n int) (string, error) {
	for {
		log, err := c.log(ctx)
		if err != nil {
			return "", err
		}
		if parts := strings.Split(log, word); len(parts) > n {
			if rest, _, whole := strings.Cut(parts[n], "\n"); whole {
				return rest, nil
			}
		}
		if err := unix.Kill(c.host, 0); err != nil {
			return "", fmt.Errorf("container %s has ended: %s", c.id, log)
		}
		if err := sleep(ctx, 5*time.Millisecond); err != nil {
			return "", fmt.Errorf("wait for %q of container %s: %w", word, c.id, err)
		}
	}
}

// spec is the OCI spec that containerd tells.
func (c *container) spec(ctx context.Context) (*specs.Spec, error) {
	answer, err := c.bed.client.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.id, Verbose: true})
	if err != nil {
		return nil, err
	}
	var info struct{ RuntimeSpec *specs.Spec }
	if err := json.Unmarshal([]byte(answer.Info["info"]), &info); err != nil {
		return nil, fmt.Errorf("read container status: %w", err)
	}
	return info.RuntimeSpec, nil
}

// procFile reads a file of the container's first process in /proc.
func (c *container) procFile(name string) (string, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", c.host, name))
	return string(content), err
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
