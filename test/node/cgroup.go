package node

import (
	"bufio"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupRoot = "/sys/fs/cgroup"

// cgroups are a node's cgroups, one of the same name in each hierarchy of the host. The node sees them as roots.
type cgroups []group

type group struct {
	// dir is the node's cgroup on the host.
	dir string
	cgroupMount
}

// cgroupMount is how the node mounts a hierarchy; Target is empty if it does not.
type cgroupMount struct{ Type, Target, Options string }

// newCgroups makes the cgroups of a node. Those that exist when it fails are among its results.
func newCgroups(name string, onlyV2 bool) (cgroups, error) {
	found, err := hierarchies()
	if err != nil {
		return nil, err
	}
	hybrid := slices.ContainsFunc(found, func(g group) bool { return g.Type == "cgroup" })
	if onlyV2 && !slices.ContainsFunc(found, func(g group) bool { return g.Type == "cgroup2" }) {
		return nil, errors.New("make cgroups: the host has no unified hierarchy mounted")
	}
	for i := range found {
		g := &found[i]
		switch {
		case onlyV2 && g.Type == "cgroup":
			g.Target = ""
		case onlyV2:
			g.Target = cgroupRoot
		case hybrid && g.Type == "cgroup2":
			// crun refuses to run where it finds both versions.
			g.Target = ""
		}
		g.dir = filepath.Join(g.dir, name)
		// No process stays in the root: a cgroup v2 with processes cannot give controllers to its children.
		for _, dir := range []string{g.dir, g.leaf()} {
			if err := makeCgroup(dir); err != nil {
				return found[:i+1], fmt.Errorf("make cgroup: %w", err)
			}
		}
	}
	return found, nil
}

// findCgroups returns the cgroups that a node had.
func findCgroups(name string) (cgroups, error) {
	found, err := hierarchies()
	for i := range found {
		found[i].dir = filepath.Join(found[i].dir, name)
	}
	return found, err
}

func hierarchies() (cgroups, error) {
	file, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("find cgroups: %w", err)
	}
	defer file.Close()
	var found cgroups
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		mount, fileSystem, ok := strings.Cut(lines.Text(), " - ")
		fields, super := strings.Fields(mount), strings.Fields(fileSystem)
		if !ok || len(fields) < 5 || len(super) < 3 || !strings.HasPrefix(super[0], "cgroup") ||
			!strings.HasPrefix(fields[4], cgroupRoot) {
			continue
		}
		g := group{dir: fields[4], cgroupMount: cgroupMount{Type: super[0], Target: fields[4]}}
		if g.Type == "cgroup" {
			g.Options = controllers(super[2])
		}
		found = append(found, g)
	}
	if len(found) == 0 {
		return nil, errors.New("find cgroups: none is mounted below " + cgroupRoot)
	}
	return found, lines.Err()
}

// controllers are those mount options that say which hierarchy it is.
func controllers(options string) string {
	return strings.Join(slices.DeleteFunc(strings.Split(options, ","), func(o string) bool {
		name, _, isValue := strings.Cut(o, "=")
		return isValue && name != "name" || slices.Contains([]string{"rw", "ro", "xattr", "noprefix", "clone_children", "cpuset_v2_mode"}, o)
	}), ",")
}

func makeCgroup(dir string) error {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for _, name := range []string{"cpuset.cpus", "cpuset.mems"} {
		value, err := os.ReadFile(filepath.Join(filepath.Dir(dir), name))
		if err != nil || len(strings.TrimSpace(string(value))) == 0 {
			continue // not cpuset, or cgroup v2, where empty means the parent's
		}
		if err := os.WriteFile(filepath.Join(dir, name), value, 0); err != nil {
			return err
		}
	}
	return nil
}

func (g group) leaf() string { return filepath.Join(g.dir, "init") }

func (c cgroups) mounts() []cgroupMount {
	var mounts []cgroupMount
	for _, g := range c {
		if g.Target != "" {
			mounts = append(mounts, g.cgroupMount)
		}
	}
	return mounts
}

// join is shell code that puts the shell into the cgroups, or a child of them.
func (c cgroups) join(child string) string {
	var code strings.Builder
	for _, g := range c {
		fmt.Fprintf(&code, "echo 0 >'%s' || exit 125\n", filepath.Join(g.dir, child, "cgroup.procs"))
	}
	return code.String()
}

// settle moves the processes that started a node out of its root cgroups, and gives cgroup v2 its controllers.
func (c cgroups) settle(pids ...int) error {
	for _, g := range c {
		for _, pid := range pids {
			if err := os.WriteFile(filepath.Join(g.leaf(), "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
				return fmt.Errorf("move to cgroup: %w", err)
			}
		}
		available, err := os.ReadFile(filepath.Join(g.dir, "cgroup.controllers"))
		if err != nil {
			continue // cgroup v1
		}
		for controller := range strings.FieldsSeq(string(available)) {
			// What a kernel does not delegate is missing in the node, as it is on such a host.
			_ = os.WriteFile(filepath.Join(g.dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
	}
	return nil
}

// thaw lets frozen processes of cgroup v1 run: they do not die otherwise.
func (c cgroups) thaw() {
	for _, g := range c {
		for _, dir := range g.tree() {
			path := filepath.Join(dir, "freezer.state")
			if state, err := os.ReadFile(path); err == nil && strings.TrimSpace(string(state)) != "THAWED" {
				_ = os.WriteFile(path, []byte("THAWED"), 0)
			}
		}
	}
}

// thawUntil keeps processes thawed until they have ended, and reports whether that was in time.
func (c cgroups) thawUntil(ended <-chan struct{}, timeout time.Duration) bool {
	expired := time.After(timeout)
	for {
		c.thaw()
		select {
		case <-ended:
			return true
		case <-expired:
			return false
		case <-time.After(10 * time.Millisecond):
		}
	}
}

// kill ends all processes in the cgroups and waits for their end.
func (c cgroups) kill(timeout time.Duration) error {
	for deadline := time.Now().Add(timeout); ; time.Sleep(10 * time.Millisecond) {
		c.thaw()
		left := 0
		for _, g := range c {
			for _, dir := range g.tree() {
				content, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
				if err != nil {
					continue // gone meanwhile
				}
				for field := range strings.FieldsSeq(string(content)) {
					if pid, err := strconv.Atoi(field); err == nil && pid > 0 {
						left++
						_ = unix.Kill(pid, unix.SIGKILL)
					}
				}
			}
		}
		if left == 0 {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("kill processes: %d do not end", left)
		}
	}
}

// remove removes the cgroups with all below them.
func (c cgroups) remove() error {
	var errs []error
	for _, g := range c {
		for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
			var err error
			for _, dir := range slices.Backward(g.tree()) {
				err = os.Remove(dir)
			}
			if err == nil || errors.Is(err, os.ErrNotExist) {
				break
			}
			// A cgroup stays busy for a moment after the end of its last process.
			if time.Now().After(deadline) {
				errs = append(errs, fmt.Errorf("remove cgroup: %w", err))
				break
			}
		}
	}
	return errors.Join(errs...)
}

// tree lists the cgroup and all below it, parents first. It is empty if the cgroup is gone.
func (g group) tree() []string {
	var dirs []string
	_ = filepath.WalkDir(g.dir, func(path string, entry fs.DirEntry, err error) error {
		if err == nil && entry.IsDir() {
			dirs = append(dirs, path)
		}
		return nil
	})
	return dirs
}
