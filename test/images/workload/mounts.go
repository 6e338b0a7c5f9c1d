package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
)

// mounts are all that the container has: where, what of, and with which options and propagation.
func mounts(string) (func() (string, error), error) {
	return func() (string, error) {
		content, err := os.ReadFile("/proc/self/mountinfo")
		if err != nil {
			return "", err
		}
		var all []string
		for line := range strings.Lines(string(content)) {
			before, after, _ := strings.Cut(line, " - ")
			fields, of := strings.Fields(before), strings.Fields(after)
			// File systems with a disk are whatever the node has for a volume.
			kind := of[0]
			if fields[3] != "/" || slices.Contains([]string{"ext4", "xfs", "btrfs", "overlay"}, kind) {
				kind = "files"
			}
			var propagation []string
			for _, field := range fields[6:] {
				name, _, _ := strings.Cut(field, ":") // numbers of peer groups differ
				propagation = append(propagation, name)
			}
			options := strings.Split(fields[5], ",")
			slices.Sort(options)
			if fields[3] == "/null" {
				kind, options = "masked", nil // by /dev/null, the container's or the node's
			}
			all = append(all, fmt.Sprintf("%s %s %s %s", fields[4], kind, strings.Join(options, ","), strings.Join(propagation, ",")))
		}
		slices.Sort(all) // a runtime mounts them in another order than CRIU
		return strings.Join(all, "; "), nil
	}, nil
}

// tmpfs is one that is mounted in the container at ARGUMENT, with files in it.
func tmpfs(dir string) (func() (string, error), error) {
	if err := errors.Join(os.MkdirAll(dir, 0o755), syscall.Mount("held", dir, "tmpfs", syscall.MS_NOSUID, "size=8m,mode=0750")); err != nil {
		return nil, err
	}
	data := make([]byte, 3*megabyte)
	noise(data, 15)
	if err := os.WriteFile(filepath.Join(dir, "data"), data, 0o600); err != nil {
		return nil, err
	}
	return content(dir)
}

// device is an open one, at ARGUMENT, which gives zeros.
func device(path string) (func() (string, error), error) {
	fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	return func() (string, error) {
		data := make([]byte, 100)
		n, err := syscall.Read(fd, data)
		if err != nil {
			return "", err
		}
		var stat syscall.Stat_t
		if err := syscall.Fstat(fd, &stat); err != nil {
			return "", err
		}
		target, err := os.Readlink(fdPath(fd))
		return fmt.Sprintf("%s mode %o device %x: %s", target, stat.Mode, stat.Rdev, sum(data[:n])), err
	}, nil
}
