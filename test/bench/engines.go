package main

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/stats"
	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// engine is one way to checkpoint a container that goes on.
type engine struct {
	name string
	// podman says that it needs a container of podman's; all others share one of containerd's.
	podman bool
	// prepare returns the checkpoint of a container, which is what the clock runs for, and the processes, of the host, that work for it
	// beside those that this process starts.
	prepare func(ctx context.Context, c *container) (checkpoint func(context.Context) error, processes []int, err error)
	// result is what there is in the end, a name in outDir. syncs says that it is durable when it is there; otherwise the clock goes on
	// until this process has made it so.
	result string
	syncs  bool
	// frozen tells how long CRIU says that the container was frozen, once a checkpoint is there.
	frozen func(c *container) (time.Duration, error)
}

// Their names, as tables and plots have them.
const (
	criuAlone  = "criu dump alone"
	runcAndTar = "runc checkpoint + tar"
	containerd = "containerd"
	podman     = "podman"
	crishim    = "crishim"
	crishimZst = "crishim, zstd"
)

// Where they put what they make, in a node.
const (
	imagesDir   = outDir + "/images"
	workDir     = outDir + "/work"
	archiveName = "checkpoint.tar"
	tarFile     = outDir + "/" + archiveName
)

func engines() []engine {
	return []engine{
		{name: criuAlone, prepare: prepareCriu, result: "images", frozen: frozenIn("work")},
		{name: runcAndTar, prepare: prepareRunc, result: archiveName, frozen: frozenIn("work")},
		{name: containerd, prepare: prepareContainerd, result: archiveName, frozen: frozenInTar},
		{name: podman, podman: true, prepare: preparePodman, result: archiveName, frozen: frozenInTar},
		{name: crishim, prepare: prepareCrishim("crishim", node.CrishimSocket), result: archiveName, syncs: true, frozen: frozenInLog("crishim")},
		{name: crishimZst, prepare: prepareCrishim(zstdName, zstdSocket), result: archiveName, syncs: true, frozen: frozenInLog(zstdName)},
	}
}

// prepareCriu is the floor: what runc would have criu do, and nothing else. Like crishim it locks no network where no connection is established.
func prepareCriu(ctx context.Context, c *container) (func(context.Context) error, []int, error) {
	spec, err := c.spec(ctx)
	if err != nil {
		return nil, nil, err
	}
	args := []string{
		"dump", "--tree", strconv.Itoa(c.pid), "--images-dir", imagesDir, "--work-dir", workDir, "--log-file", "dump.log", "-v4",
		"--leave-running", "--manage-cgroups=soft", "--empty-ns", "net", "--file-locks", "--link-remap",
		"--skip-in-flight", "--network-lock", "skip",
		"--root", "/run/containerd/io.containerd.runtime.v2.task/k8s.io/" + c.id + "/rootfs",
	}
	for _, ns := range spec.Linux.Namespaces {
		if ns.Type == "network" && ns.Path != "" {
			var st unix.Stat_t
			if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/net", c.host), &st); err != nil {
				return nil, nil, fmt.Errorf("look at the network namespace: %w", err)
			}
			args = append(args, "--external", fmt.Sprintf("net[%d]:extRootNetNS", st.Ino))
		}
	}
	for _, mount := range spec.Mounts {
		if mount.Type == "bind" {
			args = append(args, "--external", fmt.Sprintf("mnt[%s]:%[1]s", mount.Destination))
		}
	}
	mounts, err := c.procFile("mountinfo")
	if err != nil {
		return nil, nil, err
	}
	for line := range strings.Lines(mounts) {
		mount, fileSystem, _ := strings.Cut(line, " - ")
		fields := strings.Fields(mount)
		switch {
		case strings.HasPrefix(fileSystem, "cgroup "):
			args = append(args, "--external", fmt.Sprintf("mnt[%s]:%[1]s", fields[4]))
		case slices.Contains(spec.Linux.MaskedPaths, fields[4]) && fields[3] == "/null":
			args = append(args, "--external", fmt.Sprintf("mnt[%s]:/dev/null", fields[4]))
		}
	}
	cgroups, err := os.ReadFile(c.bed.node.Path(fmt.Sprintf("/proc/%d/cgroup", c.pid)))
	if err != nil {
		return nil, nil, err
	}
	freezer, err := freezerOf(c.bed.node, string(cgroups), spec.Linux.CgroupsPath)
	if err != nil {
		return nil, nil, err
	}
	args = append(args, "--freeze-cgroup", freezer)
	return func(ctx context.Context) error {
		return c.bed.runInNode(ctx, "criu", args...)
	}, []int{os.Getpid()}, nil
}

// freezerOf is the directory, in the node, of a container's cgroup in the hierarchy that can freeze it.
func freezerOf(n *node.Node, cgroups, path string) (string, error) {
	dir := "/sys/fs/cgroup"
	if strings.Contains(cgroups, ":freezer:") {
		dir += "/freezer"
	}
	dir += path
	if _, err := os.Stat(n.Path(dir)); err != nil {
		return "", fmt.Errorf("find freezer: %w", err)
	}
	return dir, nil
}

func prepareRunc(ctx context.Context, c *container) (func(context.Context) error, []int, error) {
	mounts, err := c.procFile("mountinfo")
	if err != nil {
		return nil, nil, err
	}
	tarArgs := []string{"--create", "--file", tarFile, "--directory", imagesDir, "."}
	// Where there is a writable layer worth the name, whoever works so takes it, too.
	if spec, err := c.spec(ctx); err != nil {
		return nil, nil, err
	} else if !slices.Equal(spec.Process.Args[4:], []string{"0", "0"}) {
		_, upper, found := strings.Cut(mounts, "upperdir=")
		upper, _, _ = strings.Cut(upper, ",")
		if !found {
			return nil, nil, errors.New("find the upper directory: the root of the container is no overlay")
		}
		tarArgs = append(tarArgs, "--directory", upper, ".")
	}
	return func(ctx context.Context) error {
		err := c.bed.runInNode(ctx, "runc", "--root", "/run/containerd/runc/k8s.io", "checkpoint", "--leave-running",
			"--image-path", imagesDir, "--work-path", workDir, c.id)
		if err != nil {
			return err
		}
		return c.bed.runInNode(ctx, "tar", tarArgs...)
	}, []int{os.Getpid()}, nil
}

func prepareContainerd(_ context.Context, c *container) (func(context.Context) error, []int, error) {
	shim, err := parentOf(c.host)
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context) error {
		_, err := c.bed.client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.id, Location: tarFile})
		return err
	}, []int{c.bed.node.Daemon("containerd").Pid(), shim}, nil
}

func preparePodman(_ context.Context, c *container) (func(context.Context) error, []int, error) {
	return func(ctx context.Context) error {
		return c.bed.runInNode(ctx, "podman", "container", "checkpoint", "--leave-running", "--compress", "none", "--export", tarFile, c.id)
	}, []int{os.Getpid()}, nil
}

func prepareCrishim(name, socket string) func(context.Context, *container) (func(context.Context) error, []int, error) {
	return func(_ context.Context, c *container) (func(context.Context) error, []int, error) {
		client, err := c.bed.node.DialCRI(socket)
		if err != nil {
			return nil, nil, err
		}
		return func(ctx context.Context) error {
			defer client.Close()
			_, err := client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{ContainerId: c.id, Location: tarFile})
			return err
		}, []int{c.bed.node.Daemon(name).Pid()}, nil
	}
}

// durable makes the result so, where it is not, and returns its size.
func (e engine) durable(c *container) (int64, error) {
	path := filepath.Join(c.bed.out, e.result)
	if e.syncs {
		info, err := os.Stat(path)
		if err != nil {
			return 0, err
		}
		return info.Size(), nil
	}
	size, err := syncTree(path)
	if err != nil {
		return 0, err
	}
	dir, err := os.Open(c.bed.out)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	return size, dir.Sync()
}

func (b *bed) runInNode(ctx context.Context, name string, args ...string) error {
	_, err := b.node.Output(ctx, name, args...)
	if err == nil {
		return nil
	}
	log, _ := os.ReadFile(filepath.Join(b.out, "work/dump.log")) // where there is one, it has the reason
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, "Error (") {
			err = errors.Join(err, errors.New(strings.TrimSpace(line)))
		}
	}
	return err
}

// frozenIn reads CRIU's statistics in a directory of results.
func frozenIn(name string) func(*container) (time.Duration, error) {
	return func(c *container) (time.Duration, error) { return readFrozen(filepath.Join(c.bed.out, name)) }
}

func readFrozen(path string) (time.Duration, error) {
	dir, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	s, err := stats.CriuGetDumpStats(dir)
	if err != nil {
		return 0, fmt.Errorf("read CRIU's statistics: %w", err)
	}
	return time.Duration(s.GetFrozenTime()) * time.Microsecond, nil
}

// frozenInTar reads CRIU's statistics in an archive.
func frozenInTar(c *container) (time.Duration, error) {
	file, err := os.Open(filepath.Join(c.bed.out, archiveName))
	if err != nil {
		return 0, err
	}
	defer file.Close()
	for archive := tar.NewReader(file); ; {
		header, err := archive.Next()
		if err != nil {
			return 0, fmt.Errorf("find stats-dump in the archive: %w", err)
		}
		if filepath.Base(header.Name) != "stats-dump" {
			continue
		}
		content, err := io.ReadAll(archive)
		if err != nil {
			return 0, err
		}
		dir, err := os.MkdirTemp("", "crishim-bench-")
		if err != nil {
			return 0, err
		}
		defer os.RemoveAll(dir)
		if err := os.WriteFile(filepath.Join(dir, "stats-dump"), content, 0o600); err != nil {
			return 0, err
		}
		return readFrozen(dir)
	}
}

// frozenInLog reads what crishim logs of CRIU's statistics, so that the form of its archive does not matter.
func frozenInLog(name string) func(*container) (time.Duration, error) {
	return func(c *container) (time.Duration, error) {
		const field = "frozen_seconds="
		_, log, _ := strings.Cut(c.bed.node.Logs(), "--- "+name+".log\n")
		log, _, _ = strings.Cut(log, "\n--- ")
		at := strings.LastIndex(log, field)
		if at < 0 {
			return 0, fmt.Errorf("crishim has not logged %s", field)
		}
		value := strings.Fields(log[at+len(field):])[0]
		seconds, err := strconv.ParseFloat(value, 64)
		return time.Duration(seconds * float64(time.Second)), err
	}
}
