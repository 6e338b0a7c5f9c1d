package soak

import (
	"bytes"
	"context"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"syscall"
	"time"

	"crishim/test/node"
)

// resource is something that crishim could leak, and how it is measured on its node.
type resource struct {
	name string
	// floor is what it may rise by in the course of a run, see rise.
	floor   float64
	measure func(n *node.Node, crishim int) (float64, error)
}

// resources are crishim's own, and those of the node that a checkpoint takes.
var resources = []resource{
	// Go's heap grows by arenas of 4 MiB, and what was free once is given back slowly.
	{"resident memory in KiB", 4 << 10, func(_ *node.Node, pid int) (float64, error) { return processStatus(pid, "VmRSS") }},
	// Threads are made when system calls coincide, and stay.
	{"threads", 4, func(_ *node.Node, pid int) (float64, error) { return processStatus(pid, "Threads") }},
	{"descriptors", 1, func(_ *node.Node, pid int) (float64, error) { return entries(fmt.Sprintf("/proc/%d/fd", pid)) }},
	{"cgroups", 1, func(n *node.Node, _ int) (float64, error) {
		dirs, err := filepath.Glob("/sys/fs/cgroup/*/" + n.Name())
		if err != nil || len(dirs) == 0 {
			dirs = []string{filepath.Join("/sys/fs/cgroup", n.Name())}
		}
		total := 0.0
		for _, dir := range dirs {
			groups, _, err := tree(dir)
			if err != nil {
				return 0, err
			}
			total += groups
		}
		return total, nil
	}},
	{"mounts", 1, func(n *node.Node, _ int) (float64, error) {
		mounts, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", n.Pid()))
		return float64(bytes.Count(mounts, []byte("\n"))), err
	}},
	{"processes", 1, func(n *node.Node, _ int) (float64, error) {
		all, err := filepath.Glob(n.Path("/proc/[0-9]*"))
		return float64(len(all)), err
	}},
	// containerd's database grows by pages, as many pods as there are at once.
	{"disk in KiB", 1 << 10, func(n *node.Node, _ int) (float64, error) {
		total := 0.0
		for _, dir := range []string{"/data", "/run", "/tmp", "/var/lib/containerd", "/var/lib/crishim"} {
			_, bytes, err := tree(n.Path(dir))
			if err != nil {
				return 0, err
			}
			total += bytes
		}
		return total / 1024, nil
	}},
}

// sample measures each resource every second until ctx is done.
func sample(ctx context.Context, n *node.Node, crishim int) ([][]float64, error) {
	series := make([][]float64, len(resources))
	for every(ctx, time.Second) {
		for i, r := range resources {
			value, err := r.measure(n, crishim)
			if err != nil {
				return nil, fmt.Errorf("measure %s: %w", r.name, err)
			}
			series[i] = append(series[i], value)
		}
	}
	return series, nil
}

// processStatus is a number in /proc/PID/status.
func processStatus(pid int, field string) (float64, error) {
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, err
	}
	match := regexp.MustCompile(`(?m)^` + field + `:\s+(\d+)`).FindSubmatch(status)
	if match == nil {
		return 0, fmt.Errorf("process %d has no %s: it has ended", pid, field)
	}
	return strconv.ParseFloat(string(match[1]), 64)
}

func entries(dir string) (float64, error) {
	all, err := os.ReadDir(dir)
	return float64(len(all)), err
}

// tree counts the directories at and below one, and the bytes that their files take on its file system. What goes meanwhile is left out.
func tree(top string) (directories, bytes float64, err error) {
	info, err := os.Stat(top)
	if err != nil {
		return 0, 0, err
	}
	device := info.Sys().(*syscall.Stat_t).Dev
	err = filepath.WalkDir(top, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		info, err := entry.Info()
		if err != nil {
			return nil
		}
		stat := info.Sys().(*syscall.Stat_t)
		switch {
		case stat.Dev != device && entry.IsDir():
			return fs.SkipDir
		case stat.Dev != device:
			return nil
		case entry.IsDir():
			directories++
		}
		bytes += float64(stat.Blocks) * 512
		return nil
	})
	return directories, bytes, err
}
