// Package restore restores an archive by hand, with the OCI runtime that the container ran on: what an operator would do on a
// machine without a restoring engine, and how tests and demo see that an archive is worth something.
//
// What an engine would provide is made here: a root file system from the image with the archive's changes applied, a network
// namespace, a pod's process namespace, the other end of a terminal, and sources for the bind mounts: what the machine has for
// them, otherwise empty ones, except /dev/shm, whose content the archive has.
package restore

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"crishim/shim/archive"
)

// Machine is where the container is restored: a node, or the machine itself. Its containerd must be able to pull the image.
type Machine struct {
	// Command prepares a command there.
	Command func(ctx context.Context, name string, args ...string) *exec.Cmd
	// Path tells where a path of the machine is found here.
	Path func(string) string
	// Volumes are paths of the machine by the mount points of the container that they are mounted at: volumes, whose content is not
	// in an archive.
	Volumes map[string]string
	// Address is what the container has in its network, besides loopback: connections go on only where it is the one that they
	// were made with. Whom they were made with is not there. Empty for none.
	Address string
}

// Local is the machine that this process runs on.
func Local() Machine {
	return Machine{Command: exec.CommandContext, Path: func(path string) string { return path }}
}

// Container is a restored container. It is not in containerd's books; Remove ends it.
type Container struct {
	ID      string
	Runtime string // "runc" or "crun"
	machine Machine
	dir     string   // of the machine
	input   *os.File // both ends of its standard input
	// terminal is nil unless the container has one.
	terminal *terminal
	// pod holds a process namespace that the container shares; nil if it has its own or the machine's.
	pod      *exec.Cmd
	podInput io.Closer
	shm      string // where its /dev/shm is mounted on the machine, empty if it is the machine's own
}

const shm = "/dev/shm"

// Archive restores an archive, whose container ran from the image, and returns when the container goes on.
func Archive(ctx context.Context, m Machine, r io.Reader, image string) (_ *Container, err error) {
	id := "restored-" + strings.ToLower(rand.Text()[:8])
	c := &Container{ID: id, machine: m, dir: "/var/lib/" + id}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Remove(context.WithoutCancel(ctx)))
		}
	}()
	if err := unpack(r, m.Path(c.dir)); err != nil {
		return nil, err
	}
	var config archive.Config
	if err := c.readJSON(archive.ConfigDump, &config); err != nil {
		return nil, err
	}
	c.Runtime = config.Runtime
	if err := c.makeRootfs(ctx, image); err != nil {
		return nil, err
	}
	spec, err := c.makeSpec(ctx)
	if err != nil {
		return nil, err
	}
	args := []string{c.Runtime, "restore", "--detach", "--file-locks", "--tcp-established",
		"--bundle", c.dir, "--image-path", c.dir + "/checkpoint", "--work-path", c.dir + "/work"}
	if spec.Process.Terminal {
		socket := c.dir + "/console"
		if c.terminal, err = listenForTerminal(m.Path(socket)); err != nil {
			return nil, err
		}
		args = append(args, "--console-socket", socket)
	}
	// Its input does not end before Remove.
	if err := unix.Mkfifo(m.Path(c.dir+"/input"), 0o600); err != nil {
		return nil, fmt.Errorf("make standard input: %w", err)
	}
	if c.input, err = os.OpenFile(m.Path(c.dir+"/input"), os.O_RDWR, 0); err != nil {
		return nil, err
	}
	// The standard streams must be the machine's own, so that the restored process has no file of another mount namespace.
	script := fmt.Sprintf(`exec "$@" <%[1]s/input >%[1]s/output 2>%[1]s/stderr`, c.dir)
	if err := c.run(ctx, "sh", append([]string{"-c", script, "sh"}, append(args, c.ID)...)...); err != nil {
		stderr, _ := os.ReadFile(m.Path(c.dir + "/stderr"))
		return nil, fmt.Errorf("%s restore: %w: %s%s", c.Runtime, err, stderr, c.restoreErrors())
	}
	return c, nil
}

// Output is what the container has written since it was restored, to its standard output or its terminal.
func (c *Container) Output() (string, error) {
	if c.terminal != nil {
		return c.terminal.output(), nil
	}
	content, err := os.ReadFile(c.machine.Path(c.dir + "/output"))
	return string(content), err
}

// Input writes to the container's standard input, if it had one, or its terminal.
func (c *Container) Input(text string) error {
	if c.terminal != nil {
		return c.terminal.input(text)
	}
	_, err := c.input.WriteString(text)
	return err
}

// Signal sends a signal, such as "USR1", to the container's first process.
func (c *Container) Signal(ctx context.Context, signal string) error {
	return c.run(ctx, c.Runtime, "kill", c.ID, signal)
}

// Exec runs a command in the container and returns its standard output.
func (c *Container) Exec(ctx context.Context, command ...string) (string, error) {
	cmd := c.machine.Command(ctx, c.Runtime, append([]string{"exec", c.ID}, command...)...)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		return string(out), fmt.Errorf("exec in %s: %w", c.ID, err)
	}
	return string(out), nil
}

// File reads a file of the container's root file system.
func (c *Container) File(path string) (string, error) {
	content, err := os.ReadFile(c.machine.Path(c.dir + "/rootfs" + path))
	return string(content), err
}

// Mode is the type and mode of a file of the container's root file system, 0 if there is none.
func (c *Container) Mode(path string) os.FileMode {
	info, err := os.Lstat(c.machine.Path(c.dir + "/rootfs" + path))
	if err != nil {
		return 0
	}
	return info.Mode()
}

// Remove ends the container and removes what was made for it. It does as much as it can.
func (c *Container) Remove(ctx context.Context) error {
	var errs []error
	if c.Runtime != "" {
		// Also of a container that was never restored.
		_ = c.run(ctx, c.Runtime, "delete", "--force", c.ID)
	}
	if c.input != nil {
		errs = append(errs, c.input.Close())
	}
	if c.terminal != nil {
		errs = append(errs, c.terminal.close())
	}
	if c.pod != nil {
		errs = append(errs, c.endPod())
	}
	rootfs := c.dir + "/rootfs"
	if c.run(ctx, "mountpoint", "-q", rootfs) == nil {
		errs = append(errs, c.run(ctx, "ctr", "-n", "k8s.io", "images", "unmount", "--rm", rootfs))
	}
	for _, mount := range []string{c.netns(), c.pidns(), c.shm} {
		if mount != "" && c.run(ctx, "mountpoint", "-q", mount) == nil {
			errs = append(errs, c.run(ctx, "umount", mount))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(c.machine.Path(c.dir)))...)
}

// makeRootfs mounts the image and applies the archive's changes, deletions first.
func (c *Container) makeRootfs(ctx context.Context, image string) error {
	rootfs := c.dir + "/rootfs"
	if err := os.MkdirAll(c.machine.Path(rootfs), 0o700); err != nil {
		return err
	}
	if err := c.run(ctx, "ctr", "-n", "k8s.io", "images", "pull", "--hosts-dir", "/etc/containerd/certs.d", image); err != nil {
		return err
	}
	if err := c.run(ctx, "ctr", "-n", "k8s.io", "images", "mount", "--rw", image, rootfs); err != nil {
		return err
	}
	if _, err := os.Stat(c.machine.Path(filepath.Join(c.dir, archive.RootfsDiff))); err != nil {
		return nil // a root file system that could not be written to
	}
	if err := c.removeReplaced(); err != nil {
		return err
	}
	return c.run(ctx, "tar", "--extract", "--same-permissions", "--xattrs", "--xattrs-include=*", "--exclude=.wh.*",
		"--directory", rootfs, "--file", filepath.Join(c.dir, archive.RootfsDiff))
}

// removeReplaced removes from the root file system what the container had removed, and what it had replaced by something that
// tar would not put in its place: a directory by a file, or the reverse.
func (c *Container) removeReplaced() error {
	root, err := os.OpenRoot(c.machine.Path(c.dir + "/rootfs"))
	if err != nil {
		return err
	}
	defer root.Close()
	var deleted []string
	if err := c.readJSON(archive.DeletedFiles, &deleted); err != nil {
		return err
	}
	for _, path := range deleted {
		name := filepath.Base(path)
		switch {
		case name == ".wh..wh..opq": // the directory was replaced
			path = filepath.Dir(path)
		case strings.HasPrefix(name, ".wh."):
			continue
		}
		if err := root.RemoveAll(path); err != nil {
			return err
		}
	}
	diff, err := os.Open(c.machine.Path(filepath.Join(c.dir, archive.RootfsDiff)))
	if err != nil {
		return err
	}
	defer diff.Close()
	for layer := tar.NewReader(diff); ; {
		header, err := layer.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read changes of the root file system: %w", err)
		}
		was, err := root.Lstat(header.Name)
		if err == nil && was.IsDir() != (header.Typeflag == tar.TypeDir) {
			err = root.RemoveAll(header.Name)
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
}

// makeSpec makes the bundle's config.json: the archive's own, with this machine's mounts and namespaces.
func (c *Container) makeSpec(ctx context.Context) (*specs.Spec, error) {
	var spec specs.Spec
	if err := c.readJSON(archive.SpecDump, &spec); err != nil {
		return nil, err
	}
	var binds []archive.BindMount
	if err := c.readJSON(archive.BindMounts, &binds); err != nil {
		return nil, err
	}
	spec.Root.Path = c.dir + "/rootfs"
	spec.Linux.CgroupsPath = "/" + c.ID
	if err := c.keepCgroup(&spec); err != nil {
		return nil, err
	}
	for i, bind := range binds {
		source, ok := c.machine.Volumes[bind.Destination]
		if bind.Source == shm {
			source, ok = shm, true // the machine's own, of a pod with hostIPC
		}
		if !ok {
			source = fmt.Sprintf("%s/mounts/%d", c.dir, i)
			if err := c.makeSource(ctx, source, bind); err != nil {
				return nil, err
			}
		}
		for j := range spec.Mounts {
			if spec.Mounts[j].Destination == bind.Destination {
				spec.Mounts[j].Source = source
			}
		}
	}
	for i, ns := range spec.Linux.Namespaces {
		switch {
		case ns.Path == "":
		case ns.Type == specs.NetworkNamespace:
			// Not by ip netns: that mounts /run/netns anew over the namespaces that CNI has there.
			if err := os.WriteFile(c.machine.Path(c.netns()), nil, 0o600); err != nil {
				return nil, err
			}
			script := "ip link set lo up"
			if c.machine.Address != "" {
				script += fmt.Sprintf(" && ip address add %s dev lo && ip route add default dev lo", c.machine.Address)
			}
			if err := c.run(ctx, "unshare", "--net="+c.netns(), "sh", "-c", script); err != nil {
				return nil, err
			}
			spec.Linux.Namespaces[i].Path = c.netns()
		case ns.Type == specs.PIDNamespace:
			if err := c.startPod(ctx); err != nil {
				return nil, err
			}
			spec.Linux.Namespaces[i].Path = c.pidns()
		default:
			spec.Linux.Namespaces[i].Path = "" // CRIU makes it again from what was dumped
		}
	}
	content, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	return &spec, os.WriteFile(c.machine.Path(c.dir+"/config.json"), content, 0o600)
}

// keepCgroup has CRIU put the container, on cgroup v2, into the cgroup that the runtime makes for it. runc 1.1 leaves CRIU to make
// one at the path that was dumped instead, below a parent that gives it no controllers: a file that a process had open there is then
// missing, such as cpu.max, which Go programs hold open. crun and, on cgroup v1, runc pass this option themselves.
func (c *Container) keepCgroup(spec *specs.Spec) error {
	if _, err := os.Stat(c.machine.Path("/sys/fs/cgroup/cgroup.controllers")); err != nil {
		return nil // version 1
	}
	options := c.dir + "/criu.conf"
	if spec.Annotations == nil {
		spec.Annotations = map[string]string{}
	}
	spec.Annotations["org.criu.config"] = options
	return os.WriteFile(c.machine.Path(options), []byte("cgroup-root "+spec.Linux.CgroupsPath+"\n"), 0o600)
}

func (c *Container) netns() string { return c.dir + "/netns" }
func (c *Container) pidns() string { return c.dir + "/pidns" }

// startPod makes a process namespace like that of a pod: with a first process that is not the container's. It takes pid 1 alone,
// so that the container's are free.
func (c *Container) startPod(ctx context.Context) error {
	if err := os.WriteFile(c.machine.Path(c.pidns()), nil, 0o600); err != nil {
		return err
	}
	// It reads until its input ends, with Remove or with this process.
	cmd := c.machine.Command(context.WithoutCancel(ctx), "unshare", "--pid="+c.pidns(), "--fork", "cat")
	input, err := cmd.StdinPipe()
	if err != nil {
		return err
	}
	output, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("start pod: %w", err)
	}
	c.pod, c.podInput = cmd, input
	// Once it echoes, the namespace is there.
	if _, err := io.WriteString(input, "\n"); err != nil {
		return fmt.Errorf("start pod: %w", err)
	}
	if _, err := output.Read(make([]byte, 1)); err != nil {
		return fmt.Errorf("start pod: %w", err)
	}
	return nil
}

func (c *Container) endPod() error {
	if err := errors.Join(c.podInput.Close(), c.pod.Wait()); err != nil {
		return fmt.Errorf("end pod: %w", err)
	}
	return nil
}

func (c *Container) makeSource(ctx context.Context, source string, bind archive.BindMount) error {
	here := c.machine.Path(source)
	mode := os.FileMode(bind.Permissions)
	if bind.FileType != "directory" {
		if err := os.MkdirAll(filepath.Dir(here), 0o700); err != nil {
			return err
		}
		return os.WriteFile(here, nil, mode)
	}
	if err := os.MkdirAll(here, 0o700); err != nil {
		return err
	}
	if err := os.Chmod(here, mode); err != nil {
		return err
	}
	if bind.Destination != shm {
		return nil
	}
	if err := c.run(ctx, "mount", "-t", "tmpfs", "-o", "nosuid,nodev,noexec", "shm", source); err != nil {
		return err
	}
	c.shm = source
	return c.run(ctx, "tar", "--extract", "--same-permissions", "--directory", source, "--file", filepath.Join(c.dir, archive.DevShm))
}

func (c *Container) run(ctx context.Context, name string, args ...string) error {
	cmd := c.machine.Command(ctx, name, args...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("run %s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}

// restoreErrors picks the errors from CRIU's log: runtimes only say that there is one.
func (c *Container) restoreErrors() string {
	content, err := os.ReadFile(c.machine.Path(c.dir + "/work/restore.log"))
	if err != nil {
		return ""
	}
	var b strings.Builder
	for line := range strings.Lines(string(content)) {
		if strings.Contains(line, "Error (") {
			b.WriteString(line)
		}
	}
	return b.String()
}

func (c *Container) readJSON(name string, v any) error {
	content, err := os.ReadFile(c.machine.Path(filepath.Join(c.dir, name)))
	if err != nil {
		return err
	}
	if err := json.Unmarshal(content, v); err != nil {
		return fmt.Errorf("parse %s: %w", name, err)
	}
	return nil
}

// unpack extracts an archive into a new directory.
func unpack(r io.Reader, dir string) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if err := root.Mkdir("work", 0o700); err != nil {
		return err
	}
	for archive := tar.NewReader(r); ; {
		header, err := archive.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read archive: %w", err)
		}
		if header.Typeflag == tar.TypeDir {
			if err := root.Mkdir(strings.TrimSuffix(header.Name, "/"), 0o700); err != nil {
				return err
			}
			continue
		}
		file, err := root.OpenFile(header.Name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		_, err = io.Copy(file, archive)
		if err := errors.Join(err, file.Close()); err != nil {
			return fmt.Errorf("extract %s: %w", header.Name, err)
		}
	}
}
