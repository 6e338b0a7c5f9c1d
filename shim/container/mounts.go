package container

import (
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	securejoin "github.com/cyphar/filepath-securejoin"
	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// describeMounts fills in what the mount table of the container's init says, read with the spec at hand. snapshotter is what
// made its root file system, as far as the runtime says.
func (c *Container) describeMounts(spec *specs.Spec, snapshotter string) error {
	file, err := os.Open(fmt.Sprintf("/proc/%d/mountinfo", c.Process.Pid))
	if err != nil {
		return gone(c.Process.Pid, err)
	}
	defer file.Close()
	// Where several are mounted on one another at the same place, the last is the one that is seen.
	mounts := make(map[string]*mountinfo.Info)
	table, err := mountinfo.GetMountsFromReader(file, nil)
	if err != nil {
		return fmt.Errorf("parse mount table of process %d: %w", c.Process.Pid, err)
	}
	for _, m := range table {
		mounts[m.Mountpoint] = m
	}
	if err := c.describeLayer(table, snapshotter); err != nil {
		return err
	}
	for _, m := range spec.Mounts {
		switch {
		case m.Type == "bind" || slices.Contains(m.Options, "bind") || slices.Contains(m.Options, "rbind"):
			resolved, err := resolve(c.Rootfs, m.Destination)
			if err != nil {
				return err
			}
			c.BindMounts = append(c.BindMounts, m)
			c.ExternalMounts = append(c.ExternalMounts, resolved)
			if resolved == "/dev/shm" {
				// The node's own, of a pod with hostIPC, is not this container's to take.
				c.Shm = m.Source != "/dev/shm"
			}
		case m.Type == "cgroup":
			// On v1 without a cgroup namespace each controller below is a bind mount of the node's. With a cgroup namespace
			// they are mounts of their own, whose root is the namespace's, and CRIU restores them.
			if hasPrivateCgroup(spec.Linux.Namespaces) {
				continue
			}
			for _, below := range table {
				if below.FSType == "cgroup" && path.Dir(below.Mountpoint) == path.Clean(m.Destination) {
					c.ExternalMounts = append(c.ExternalMounts, below.Mountpoint)
				}
			}
		}
	}
	for _, device := range spec.Linux.Devices {
		if mounts[device.Path] != nil {
			c.ExternalMounts = append(c.ExternalMounts, device.Path)
		}
	}
	for _, masked := range spec.Linux.MaskedPaths {
		m := mounts[masked]
		if m == nil {
			continue
		}
		switch path.Base(m.Root) {
		case "null": // a file
			c.MaskedFiles = append(c.MaskedFiles, masked)
		case sharedEmptyDirectory:
			c.ExternalMounts = append(c.ExternalMounts, masked)
		default: // a tmpfs of its own, which CRIU dumps as such
		}
	}
	return nil
}

// sharedEmptyDirectory is what crun since 1.24 mounts over masked directories: one of this name below its --root, for all of them.
// When it restores, it finds each again by the path that was masked.
const sharedEmptyDirectory = ".empty-directory"

func hasPrivateCgroup(namespaces []specs.LinuxNamespace) bool {
	return slices.ContainsFunc(namespaces, func(ns specs.LinuxNamespace) bool { return ns.Type == specs.CgroupNamespace })
}

// resolve follows the symlinks of a mount's destination as the runtime did: inside the root file system, without what is
// mounted in it. /var/run becomes /run in most images.
func resolve(rootfs, destination string) (string, error) {
	joined, err := securejoin.SecureJoin(rootfs, destination)
	if err != nil {
		return "", fmt.Errorf("resolve mount point %s: %w", destination, err)
	}
	return "/" + strings.TrimPrefix(strings.TrimPrefix(joined, filepath.Clean(rootfs)), "/"), nil
}
