package node

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// The host's side of a node: a directory in the cache that its owner has locked for as long as it lives. What has a
// directory that nobody has locked is dead.

// parameters are those of the kernel, not of a namespace, that a kubelet writes.
var parameters = []string{
	"kernel/keys/root_maxbytes", "kernel/keys/root_maxkeys", "kernel/panic", "kernel/panic_on_oops",
	"vm/overcommit_memory", "vm/panic_on_oom",
}

// Sweep removes what nodes left whose owner was killed. Start does so, too.
func Sweep(ctx context.Context) error {
	c, err := openCache()
	if err != nil {
		return err
	}
	lock, err := c.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	_, err = c.sweep()
	return err
}

// reserve makes the node's directory.
func (n *Node) reserve(ctx context.Context) error {
	lock, err := n.cache.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	alive, err := n.cache.sweep()
	if err != nil {
		return err
	}
	if alive == 0 {
		if err := n.cache.saveParameters(); err != nil {
			return err
		}
	}
	if n.scratch, err = os.MkdirTemp(filepath.Join(string(n.cache), "nodes"), "crishim-test-"); err != nil {
		return err
	}
	if err := os.Chmod(n.scratch, 0o755); err != nil {
		return err
	}
	if err := os.Mkdir(filepath.Join(n.scratch, "log"), 0o755); err != nil {
		return err
	}
	n.lock, err = lockFile(ctx, filepath.Join(n.scratch, "lock"))
	return err
}

// release lets a sweep remove the node's cgroups and directory. The last node restores the kernel's parameters.
func (n *Node) release() error {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	lock, err := n.cache.lock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	if n.lock != nil {
		n.lock.Close()
	}
	_, err = n.cache.sweep()
	return err
}

// lock is held while nodes come and go.
func (c cache) lock(ctx context.Context) (*os.File, error) {
	return lockFile(ctx, filepath.Join(string(c), "lock"))
}

// sweep removes dead nodes and counts those alive. Without any, it restores the kernel's parameters.
func (c cache) sweep() (alive int, err error) {
	entries, err := os.ReadDir(filepath.Join(string(c), "nodes"))
	if err != nil {
		return 0, err
	}
	for _, entry := range entries {
		dir := filepath.Join(string(c), "nodes", entry.Name())
		dead, err := removeDead(dir)
		if err != nil {
			return 0, fmt.Errorf("remove dead node %s: %w", entry.Name(), err)
		}
		if !dead {
			alive++
		}
	}
	if alive == 0 {
		return 0, c.restoreParameters()
	}
	return alive, nil
}

func removeDead(dir string) (dead bool, err error) {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return false, err
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); errors.Is(err, unix.EWOULDBLOCK) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	groups, err := findCgroups(filepath.Base(dir))
	if err != nil {
		return true, err
	}
	// With the owner, its end of the pipe is gone, and so is pid 1: unless it has to wait for a frozen process.
	if err := groups.kill(10 * time.Second); err != nil {
		return true, err
	}
	if err := groups.remove(); err != nil {
		return true, err
	}
	return true, os.RemoveAll(dir)
}

func (c cache) saveParameters() error {
	values := map[string]string{}
	for _, name := range parameters {
		value, err := os.ReadFile(filepath.Join("/proc/sys", name))
		if err != nil {
			continue // not in this kernel
		}
		values[name] = string(value)
	}
	content, err := json.Marshal(values)
	if err != nil {
		return err
	}
	temporary := filepath.Join(string(c), "parameters.tmp")
	if err := os.WriteFile(temporary, content, 0o644); err != nil {
		return err
	}
	return os.Rename(temporary, filepath.Join(string(c), "parameters"))
}

func (c cache) restoreParameters() error {
	path := filepath.Join(string(c), "parameters")
	content, err := os.ReadFile(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var values map[string]string
	if err := json.Unmarshal(content, &values); err != nil {
		return fmt.Errorf("read saved kernel parameters: %w", err)
	}
	for name, value := range values {
		file := filepath.Join("/proc/sys", name)
		if now, err := os.ReadFile(file); err == nil && string(now) == value {
			continue
		}
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			return fmt.Errorf("restore kernel parameter: %w", err)
		}
	}
	return os.Remove(path)
}
