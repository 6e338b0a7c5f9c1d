package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// findFreezer returns the container's directory in the cgroup hierarchy that has the freezer. What the OCI runtime has in its state
// comes first: init may have moved itself into a child since.
func findFreezer(pid int, fromState map[string]string) (string, error) {
	// Which version is in use is asked of the mount. On a hybrid host /proc/PID/cgroup shows both.
	var fs unix.Statfs_t
	if err := unix.Statfs(cgroupRoot, &fs); err != nil {
		return "", fmt.Errorf("look at %s: %w", cgroupRoot, err)
	}
	controller, mount, control := "freezer", filepath.Join(cgroupRoot, "freezer"), "freezer.state"
	if fs.Type == unix.CGROUP2_SUPER_MAGIC {
		controller, mount, control = "", cgroupRoot, "cgroup.freeze"
	}
	own, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return "", gone(pid, err)
	}
	var candidates []string
	if dir := fromState[controller]; dir != "" {
		candidates = append(candidates, dir)
	}
	if path, ok := cgroupPath(string(own), controller); ok {
		candidates = append(candidates, filepath.Join(mount, path))
	}
	for _, dir := range candidates {
		if _, err := os.Stat(filepath.Join(dir, control)); err == nil {
			return dir, nil
		} else if !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("look at freezer: %w", err)
		}
	}
	return "", fmt.Errorf("%w: no cgroup of it with a freezer was found: looked for %s in %q", ErrUnsupported, control, candidates)
}

// frozen says whether all tasks of a cgroup are stopped, or are being stopped, by its freezer or by that of a cgroup above it.
func frozen(dir string) (bool, error) {
	state, err := os.ReadFile(filepath.Join(dir, "freezer.state"))
	if err == nil {
		return strings.TrimSpace(string(state)) != "THAWED", nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("read freezer: %w", err)
	}
	// cgroup v2: what is asked of this cgroup, and what has become of it and those above it.
	freeze, err := os.ReadFile(filepath.Join(dir, "cgroup.freeze"))
	if err != nil {
		return false, fmt.Errorf("read freezer: %w", err)
	}
	events, err := os.ReadFile(filepath.Join(dir, "cgroup.events"))
	if err != nil {
		return false, fmt.Errorf("read freezer: %w", err)
	}
	return strings.TrimSpace(string(freeze)) == "1" || slices.Contains(strings.Split(string(events), "\n"), "frozen 1"), nil
}

// cgroupPath picks a hierarchy's path from the content of /proc/PID/cgroup; the controller "" is the unified hierarchy's.
func cgroupPath(content, controller string) (string, bool) {
	for line := range strings.Lines(content) {
		fields := strings.SplitN(strings.TrimSuffix(line, "\n"), ":", 3)
		if len(fields) != 3 {
			continue
		}
		if controller == "" && fields[0] == "0" && fields[1] == "" {
			return fields[2], true
		}
		for name := range strings.SplitSeq(fields[1], ",") {
			if controller != "" && name == controller {
				return fields[2], true
			}
		}
	}
	return "", false
}
