package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// environment is what a process in a node starts with, unless its caller says otherwise.
var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root", "LANG=C.UTF-8", "TERM=dumb",
}

// Command returns a command that runs in all namespaces and in the cgroups of the node, as root, in its root directory,
// with a small environment. It is killed when ctx is done. Its process id and signals are those of a parent on the host:
// use Daemon where they matter. The exit code is the command's own, 125 to 127 also if it could not be started.
func (n *Node) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "/bin/sh", append([]string{"-c", n.cgroups.join("init") + `exec "$@"`, "sh",
		"nsenter", "-t", strconv.Itoa(n.pid), "-m", "-p", "-n", "-u", "-i", "-C", "-r", "-w", "--",
		// nsenter forks for the process namespace: its end is the child's.
		"setpriv", "--pdeathsig", "KILL", "--", name}, args...)...)
	cmd.Dir = "/"
	cmd.Env = environment
	// Its parent on the host waits for it; killed first, the parent would leave it to the host's init.
	cmd.Cancel = func() error {
		if Signal(cmd, unix.SIGKILL) == nil {
			return nil
		}
		return cmd.Process.Kill()
	}
	cmd.WaitDelay = 5 * time.Second
	return cmd
}

// Output runs a command in the node and returns its standard output. Its error holds standard error.
func (n *Node) Output(ctx context.Context, name string, args ...string) (string, error) {
	out, err := n.Command(ctx, name, args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return string(out), fmt.Errorf("run %s in the node: %w", name, err)
	}
	return string(out), nil
}

// Daemon is a process of the node that runs in the background. It ends with the node at the latest.
type Daemon struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
}

// StartDaemon starts a command in the background. What it writes is appended to the log of its name, see Logs.
func (n *Node) StartDaemon(name string, command string, args ...string) (*Daemon, error) {
	log, err := os.OpenFile(filepath.Join(n.scratch, "log", name+".log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	defer log.Close()
	cmd := n.Command(context.Background(), command, args...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	d := &Daemon{name: name, cmd: cmd, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		cmd.Wait()
	}()
	n.mu.Lock()
	defer n.mu.Unlock()
	n.daemons = append(n.daemons, d)
	return d, nil
}

// Daemon returns the daemon that was started last under a name, nil if there was none.
func (n *Node) Daemon(name string) *Daemon {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, d := range slices.Backward(n.daemons) {
		if d.name == name {
			return d
		}
	}
	return nil
}

// Done is closed when the daemon has ended.
func (d *Daemon) Done() <-chan struct{} { return d.done }

// Pid is the daemon's process id on the host, 0 if it has ended or does not run yet.
func (d *Daemon) Pid() int { return childOf(d.cmd.Process.Pid) }

// Signal sends a signal to the process in the node that a started Command stands for.
func Signal(cmd *exec.Cmd, signal syscall.Signal) error {
	pid := childOf(cmd.Process.Pid)
	if pid == 0 {
		return fmt.Errorf("signal %s: %w", signal, os.ErrProcessDone)
	}
	if err := unix.Kill(pid, signal); err != nil {
		return fmt.Errorf("signal %s: %w", signal, err)
	}
	return nil
}

// childOf is the only child of a process, 0 where there is none.
func childOf(pid int) int {
	parent := strconv.Itoa(pid)
	content, err := os.ReadFile(filepath.Join("/proc", parent, "task", parent, "children"))
	if err != nil {
		return 0
	}
	child, err := strconv.Atoi(strings.TrimSpace(string(content)))
	if err != nil {
		return 0
	}
	return child
}

// Signal sends a signal to the daemon itself.
func (d *Daemon) Signal(signal syscall.Signal) error {
	if err := Signal(d.cmd, signal); err != nil {
		return fmt.Errorf("signal %s: %w", d.name, err)
	}
	return nil
}

// Stop asks the daemon to end, waits until it has, and kills it when ctx is done. Stopping what has ended is no error.
func (d *Daemon) Stop(ctx context.Context) error {
	if err := d.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) && !errors.Is(err, unix.ESRCH) {
		return err
	}
	select {
	case <-d.done:
		return nil
	case <-ctx.Done():
		d.Kill()
		return fmt.Errorf("stop %s: %w", d.name, ctx.Err())
	}
}

// Kill kills the daemon and waits for its end.
func (d *Daemon) Kill() {
	_ = d.cmd.Cancel() // it may have ended
	<-d.done
}

// inNamespace runs f on a thread that has joined one namespace of the node. It does so for no goroutine that f starts.
func (n *Node) inNamespace(name string, kind int, f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		// The process's first thread cannot end, and /proc/self is what it sees: it waits while another one joins.
		if unix.Gettid() == os.Getpid() {
			defer runtime.UnlockOSThread()
			result <- n.inNamespace(name, kind, f)
			return
		}
		// The thread ends with this goroutine: it is never unlocked.
		result <- func() error {
			fd, err := unix.Open(filepath.Join("/proc", strconv.Itoa(n.pid), "ns", name), unix.O_RDONLY|unix.O_CLOEXEC, 0)
			if err != nil {
				return fmt.Errorf("open %s namespace of the node: %w", name, err)
			}
			defer unix.Close(fd)
			// A thread that shares its working directory cannot change its mounts.
			if err := unix.Unshare(unix.CLONE_FS); err != nil {
				return fmt.Errorf("join %s namespace of the node: %w", name, err)
			}
			if err := unix.Setns(fd, kind); err != nil {
				return fmt.Errorf("join %s namespace of the node: %w", name, err)
			}
			return f()
		}()
	}()
	return <-result
}
