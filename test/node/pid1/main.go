// Command pid1 is the first process of a test node. It is started in fresh namespaces, mounts the node's root and makes
// it the root of the mount namespace, then reaps orphans until its owner is gone. With it the kernel ends everything in
// the node.
//
// Descriptor 3 takes its process id as the host sees it, once the node is ready; descriptor 4 is a pipe that the owner
// holds open for as long as the node shall live.
package main

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"unsafe"
)

// spec is written by package node.
type spec struct {
	Hostname string
	// Lower is the cached root, or several layers of it divided by colons, Scratch an empty directory of this node.
	Lower, Scratch string
	// Data are directories of the node that lie on the file system of Scratch instead of the overlay, which cannot be
	// the upper layer of another overlay.
	Data    []string
	Binds   []bind
	Cgroups []cgroup
}

type bind struct {
	Source, Target string
	ReadOnly       bool
}

type cgroup struct{ Type, Target, Options string }

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "start node:", err)
		os.Exit(1)
	}
}

func run() error {
	// This /proc is still the one of the host.
	pid, err := os.Readlink("/proc/self")
	if err != nil {
		return err
	}
	var s spec
	if err := json.Unmarshal([]byte(os.Args[1]), &s); err != nil {
		return fmt.Errorf("read description: %w", err)
	}
	root := filepath.Join(s.Scratch, "root")
	if err := mountRoot(root, s); err != nil {
		return err
	}
	if err := enter(root); err != nil {
		return fmt.Errorf("enter root: %w", err)
	}
	if err := syscall.Sethostname([]byte(s.Hostname)); err != nil {
		return fmt.Errorf("set hostname: %w", err)
	}
	if err := loopbackUp(); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}

	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	ready, owner := os.NewFile(3, "ready"), os.NewFile(4, "owner")
	if _, err := fmt.Fprintln(ready, pid); err != nil {
		return fmt.Errorf("report readiness: %w", err)
	}
	ready.Close()
	go func() {
		io.Copy(io.Discard, owner)
		os.Exit(0)
	}()
	for range children {
		for {
			var status syscall.WaitStatus
			if pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil); pid <= 0 && err != syscall.EINTR {
				break
			}
		}
	}
	return nil
}

func mountRoot(root string, s spec) error {
	const overlay = 0x794c7630
	var fileSystem syscall.Statfs_t
	if err := syscall.Statfs(s.Scratch, &fileSystem); err != nil {
		return err
	}
	// In a container, memory has to do for the upper directories that an overlay cannot hold.
	if fileSystem.Type == overlay {
		if err := mount("tmpfs", s.Scratch, "tmpfs", 0, "mode=755"); err != nil {
			return err
		}
	}
	upper, work := filepath.Join(s.Scratch, "upper"), filepath.Join(s.Scratch, "work")
	for _, dir := range []string{root, upper, work} {
		if err := os.Mkdir(dir, 0o755); err != nil {
			return err
		}
	}
	layers := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s", s.Lower, upper, work)
	if err := mount("overlay", root, "overlay", 0, layers); err != nil {
		return err
	}
	const safe = syscall.MS_NOSUID | syscall.MS_NODEV
	for _, m := range []struct {
		kind, target string
		flags        uintptr
		options      string
	}{
		{"proc", "/proc", safe | syscall.MS_NOEXEC, ""},
		{"sysfs", "/sys", safe | syscall.MS_NOEXEC, ""},
		{"tmpfs", "/sys/fs/cgroup", safe | syscall.MS_NOEXEC, "mode=755"},
		{"tmpfs", "/run", safe, "mode=755"},
		{"tmpfs", "/tmp", safe, "mode=1777"},
		{"tmpfs", "/dev", syscall.MS_NOSUID, "mode=755"},
		{"devpts", "/dev/pts", syscall.MS_NOSUID | syscall.MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620,gid=5"},
		{"tmpfs", "/dev/shm", safe, "mode=1777"},
		{"mqueue", "/dev/mqueue", safe | syscall.MS_NOEXEC, ""},
	} {
		target := filepath.Join(root, m.target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := mount(m.kind, target, m.kind, m.flags, m.options); err != nil {
			return err
		}
	}
	if err := fillDev(filepath.Join(root, "dev")); err != nil {
		return err
	}
	for _, c := range s.Cgroups {
		target := filepath.Join(root, c.Target)
		if err := os.MkdirAll(target, 0o755); err != nil {
			return err
		}
		if err := mount("cgroup", target, c.Type, safe|syscall.MS_NOEXEC, c.Options); err != nil {
			return err
		}
	}
	for _, dir := range s.Data {
		source := filepath.Join(s.Scratch, "data", dir)
		if err := os.MkdirAll(source, 0o755); err != nil {
			return err
		}
		s.Binds = append(s.Binds, bind{Source: source, Target: dir})
	}
	for _, b := range s.Binds {
		if err := mountBind(root, b); err != nil {
			return err
		}
	}
	hosts := fmt.Sprintf("127.0.0.1 localhost\n127.0.0.1 %s\n", s.Hostname)
	for name, content := range map[string]string{"hosts": hosts, "hostname": s.Hostname + "\n", "resolv.conf": ""} {
		if err := os.WriteFile(filepath.Join(root, "etc", name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// fillDev binds the host's devices instead of making them: the right to do so is rarer than the devices.
func fillDev(dev string) error {
	for _, name := range []string{"null", "zero", "full", "random", "urandom", "tty", "kmsg", "fuse", "net/tun"} {
		source := filepath.Join("/dev", name)
		if _, err := os.Stat(source); err != nil {
			continue
		}
		if err := mountBind(dev, bind{Source: source, Target: name}); err != nil {
			return err
		}
	}
	for name, target := range map[string]string{
		"ptmx": "pts/ptmx", "fd": "/proc/self/fd",
		"stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, filepath.Join(dev, name)); err != nil {
			return err
		}
	}
	return nil
}

func mountBind(root string, b bind) error {
	target := filepath.Join(root, b.Target)
	info, err := os.Stat(b.Source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
		return err
	}
	if info.IsDir() {
		err = os.MkdirAll(target, 0o755)
	} else {
		err = os.WriteFile(target, nil, 0o644)
	}
	if err != nil {
		return err
	}
	if err := mount(b.Source, target, "", syscall.MS_BIND|syscall.MS_REC, ""); err != nil {
		return err
	}
	if !b.ReadOnly {
		return nil
	}
	return mount("", target, "", syscall.MS_BIND|syscall.MS_REMOUNT|syscall.MS_RDONLY, "")
}

func mount(source, target, kind string, flags uintptr, options string) error {
	if err := syscall.Mount(source, target, kind, flags, options); err != nil {
		return fmt.Errorf("mount %s on %s (%s): %w", strings.TrimSpace(kind+" "+source), target, options, err)
	}
	return nil
}

// enter makes root the root mount of the namespace, which CRIU requires of the tasks that it dumps.
func enter(root string) error {
	if err := os.Chdir(root); err != nil {
		return err
	}
	if err := syscall.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := syscall.Unmount(".", syscall.MNT_DETACH); err != nil {
		return err
	}
	return os.Chdir("/")
}

func loopbackUp() error {
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer syscall.Close(fd)
	request := struct {
		name  [syscall.IFNAMSIZ]byte
		flags uint16
		_     [22]byte
	}{flags: syscall.IFF_UP | syscall.IFF_RUNNING}
	copy(request.name[:], "lo")
	_, _, errno := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), syscall.SIOCSIFFLAGS, uintptr(unsafe.Pointer(&request)))
	if errno != 0 {
		return errno
	}
	return nil
}
