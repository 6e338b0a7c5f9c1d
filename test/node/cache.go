package node

import (
	"context"
	"crypto/sha256"
	_ "embed" // for the recipe of the root
	"encoding/hex"
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

//go:embed root.sh
var rootRecipe string

//go:embed layer.sh
var layerRecipe string

// Root is a root file system that a node can have.
type Root string

// The roots. Each holds what Containerd17 does, and more.
const (
	Containerd17 Root = ""             // containerd 1.7, runc, crun, CRIU
	Containerd2  Root = "containerd-2" // containerd 2.1 or later in its place, which has a CheckpointContainer and restores
	Podman       Root = "podman"
	Docker       Root = "docker"
)

// packages are those that a root has beyond Containerd17, after the suite that they come from.
func (r Root) packages() []string {
	return map[Root][]string{
		Containerd2: {"forky", "containerd", "runc", "crun"},
		Podman:      {"trixie", "podman"},
		Docker:      {"trixie", "docker.io"},

		programsRoot: {"trixie", "python3", "nodejs", "redis-server"},
		suiteRoot:    {"trixie", "curl", "netcat-openbsd"},
		machineRoot:  {"trixie", "systemd-sysv", "dbus", "udev", "linux-image-amd64", "zstd", "xz-utils", "rpm"},
	}[r]
}

// cache is the directory of everything that is built once: $CRISHIM_TEST_CACHE, or crishim-test in the user's cache
// directory. Its entries are immutable and named for what they were built from.
type cache string

func openCache() (cache, error) {
	dir := os.Getenv("CRISHIM_TEST_CACHE")
	if dir == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("find cache: %w; set CRISHIM_TEST_CACHE", err)
		}
		dir = filepath.Join(user, "crishim-test")
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("find cache: %w", err)
	}
	if err := os.MkdirAll(filepath.Join(dir, "nodes"), 0o755); err != nil {
		return "", fmt.Errorf("make cache: %w", err)
	}
	return cache(dir), nil
}

// Build builds the root file system, the images and the named tools, as far as the cache lacks them. Start and its like build what
// they need by themselves, one after the other; Build lets the root file system, which waits for the network, and the tools,
// which keep the processors busy, go on at once.
func Build(ctx context.Context, tools ...string) error {
	c, err := openCache()
	if err != nil {
		return err
	}
	built := make(chan error, 1)
	go func() {
		_, err := c.images(ctx)
		if err == nil {
			_, err = c.program(ctx, "pid1", map[string][]byte{"main.go": pid1Source})
		}
		built <- err
	}()
	var toolErr error
	for _, name := range tools {
		if _, err := Tool(ctx, name); err != nil {
			toolErr = err
			break
		}
	}
	return errors.Join(toolErr, <-built)
}

// BuildAll builds everything that any node of the tests has.
func BuildAll(ctx context.Context) error {
	c, err := openCache()
	if err != nil {
		return err
	}
	built := make(chan error, 1)
	go func() {
		for _, root := range []Root{Containerd2, Podman, Docker} {
			if _, err := c.lower(ctx, root); err != nil {
				built <- err
				return
			}
		}
		_, err := c.programs(ctx)
		built <- err
	}()
	err = Build(ctx, Tools()...)
	if err == nil {
		_, err = c.suiteImages(ctx)
	}
	return errors.Join(err, <-built)
}

// entry returns the path of an entry, and builds it first where it is missing. build makes its argument, which does not
// exist yet and is renamed when it is complete. Processes that need the same entry wait for each other.
func (c cache) entry(ctx context.Context, name, recipe string, build func(temporary string) error) (string, error) {
	sum := sha256.Sum256([]byte(recipe))
	path := filepath.Join(string(c), name+"-"+hex.EncodeToString(sum[:6]))
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	lock, err := lockFile(ctx, path+".lock")
	if err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	defer lock.Close()
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	temporary := path + ".tmp"
	if err := os.RemoveAll(temporary); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	if err := build(temporary); err != nil {
		return "", errors.Join(fmt.Errorf("build %s: %w", name, err), os.RemoveAll(temporary))
	}
	if err := os.Rename(temporary, path); err != nil {
		return "", fmt.Errorf("build %s: %w", name, err)
	}
	return path, nil
}

// root is the file system of Containerd17.
func (c cache) root(ctx context.Context) (string, error) {
	return c.entry(ctx, "root", rootRecipe, func(temporary string) error {
		return output(isolated(ctx, rootRecipe, temporary))
	})
}

// lower returns the lower layers of a node with a root, uppermost first, in the form of overlay's option lowerdir.
func (c cache) lower(ctx context.Context, kind Root) (string, error) {
	root, err := c.root(ctx)
	if err != nil || kind == Containerd17 {
		return root, err
	}
	packages := kind.packages()
	if packages == nil {
		return "", fmt.Errorf("build root: there is none called %q", kind)
	}
	layer, err := c.entry(ctx, "root-"+string(kind), fmt.Sprint(rootRecipe, layerRecipe, packages), func(temporary string) error {
		if err := os.RemoveAll(temporary + ".work"); err != nil { // of one that was interrupted
			return err
		}
		return output(isolated(ctx, layerRecipe, append([]string{root, temporary}, packages...)...))
	})
	return layer + ":" + root, err
}

// names are those of the entries in what lower has returned: what is built of them is built anew when one of them is another.
func (c cache) names(lower string) string { return strings.ReplaceAll(lower, string(c)+"/", "") }

// isolated is a shell script in mount and process namespaces of its own.
func isolated(ctx context.Context, script string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "unshare", append([]string{"-m", "-p", "-f", "--mount-proc", "--propagation", "private",
		"--kill-child", "sh", "-c", script, "recipe"}, args...)...)
}

// program is a static executable of Go sources that need nothing but the standard library.
func (c cache) program(ctx context.Context, name string, sources map[string][]byte) (string, error) {
	var recipe strings.Builder
	recipe.WriteString(runtime.Version())
	for _, file := range slices.Sorted(maps.Keys(sources)) {
		fmt.Fprintf(&recipe, "\n%s\n%s", file, sources[file])
	}
	return c.entry(ctx, name, recipe.String(), func(temporary string) error {
		dir, err := os.MkdirTemp("", "crishim-test-*")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		sources["go.mod"] = []byte("module " + name + "\n\ngo 1.26\n")
		defer delete(sources, "go.mod")
		for file, content := range sources {
			if err := os.WriteFile(filepath.Join(dir, file), content, 0o644); err != nil {
				return err
			}
		}
		cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-ldflags", "-s -w", "-o", temporary, ".")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
		return output(cmd)
	})
}

// output runs a command whose output matters only if it fails.
func output(cmd *exec.Cmd) error {
	return dieWithUs(cmd, func(cmd *exec.Cmd) error {
		out, err := cmd.CombinedOutput()
		if err != nil {
			return fmt.Errorf("run %s: %w\n%s", filepath.Base(cmd.Path), err, out)
		}
		return nil
	})
}

// dieWithUs runs a command in such a way that it does not outlive this process, which holds a lock.
func dieWithUs(cmd *exec.Cmd, run func(*exec.Cmd) error) error {
	// The signal comes with the end of the thread that has started the command.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return run(cmd)
}

// lockFile takes an exclusive lock, which closing the file or the end of the process releases.
func lockFile(ctx context.Context, path string) (*os.File, error) {
	file, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("open lock: %w", err)
	}
	for {
		err := unix.Flock(int(file.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return file, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, err)
		}
		select {
		case <-ctx.Done():
			file.Close()
			return nil, fmt.Errorf("lock %s: %w", path, ctx.Err())
		case <-time.After(50 * time.Millisecond):
		}
	}
}
