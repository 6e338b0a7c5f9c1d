// Package kubelet switches a node's kubelet over to crishim, and back.
//
// It finds out as the kubelet does what the kubelet talks to, and changes that by one file of its own, a drop-in for kubelet.service. It promises to
// write no other file, to leave the kubelet with the runtime that it had where the switch does not work, and that all that is needed to undo it
// stands in the drop-in. Whatever it is interrupted by, doing it again or undoing it puts things right.
package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Service is the unit that runs the kubelet, on nodes of kubeadm and of most others.
const Service = "kubelet.service"

// units is the directory for units that the machine's administrator makes, to which the drop-in goes.
const units = "/etc/systemd/system"

const (
	// steady is how long a kubelet stays connected before that counts: one that does not like what it finds ends at once.
	steady = 2 * time.Second
	// undoTimeout bounds putting things back. That also happens when the caller's context has ended.
	undoTimeout = time.Minute
)

// Node is a machine with a kubelet, and with a crishim beside it.
type Node struct {
	// Root is where the files of the kubelet and of systemd are, "" for the machine's own. Sockets are always the machine's.
	Root string
	// Systemd has the kubelet's unit.
	Systemd Systemd
	// Listen and Runtime are crishim's endpoints, the kubelet's and the runtime's: unix:///path or a path.
	Listen, Runtime string
	// Wait is how long a kubelet that was restarted may take to connect.
	Wait time.Duration
	// Say takes what is done, a line each.
	Say func(format string, args ...any)
}

// Enable has the kubelet talk to crishim, and returns when it does. Where it is not running, it will when it starts. An error means that
// everything is as it was, unless it says otherwise.
func (n *Node) Enable(ctx context.Context) error {
	unlock, err := n.lock()
	if err != nil {
		return err
	}
	defer unlock()
	unit, err := n.load(ctx)
	if err != nil {
		return err
	}
	old, err := n.readDropIn()
	if err != nil {
		return err
	}
	command, err := n.command(unit)
	if err != nil {
		return err
	}
	before, err := n.planned(n.without(unit, old))
	if err != nil {
		return err
	}
	if n.isCrishim(before.Runtime.Value) {
		n.Say("the kubelet is pointed at crishim already, by %s", before.Runtime.Source)
		return nil
	}
	if err := n.fits(ctx, before.Runtime); err != nil {
		return err
	}
	wanted := &dropIn{command: command, endpoint: address(n.Listen), before: before.Runtime, directory: old != nil && old.directory}
	if _, err := os.Lstat(filepath.Dir(n.path(dropInPath))); errors.Is(err, fs.ErrNotExist) {
		wanted.directory = true
	}
	if old != nil && *old == *wanted {
		if s, err := n.status(unit, old); err == nil && s.State == Enabled && (s.Connected || !s.Running) {
			n.Say("the kubelet is enabled already")
			return nil
		}
	}
	n.Say("writing %s", n.path(dropInPath))
	return n.change(ctx, old, wanted, func(now *Unit) (string, error) {
		after, err := n.planned(now)
		if err != nil {
			return "", err
		}
		if !n.isCrishim(after.Runtime.Value) {
			return "", fmt.Errorf("the kubelet would still use %s, by %s", after.Runtime.Value, after.Runtime.Source)
		}
		return n.Listen, nil
	})
}

// Disable undoes what Enable has done, and returns when the kubelet talks to the runtime that it would talk to without. An error means that everything
// is as it was, unless it says otherwise. It is one if the kubelet would go on talking to crishim, because somebody else wants it to.
func (n *Node) Disable(ctx context.Context) error {
	unlock, err := n.lock()
	if err != nil {
		return err
	}
	defer unlock()
	old, err := n.readDropIn()
	if err != nil {
		return err
	}
	unit, err := n.load(ctx)
	switch {
	case errors.Is(err, errNoUnit): // only the drop-in is left, or not even that
	case err != nil:
		return err
	case old == nil:
		planned, err := n.planned(unit)
		if err != nil {
			return err
		}
		if n.isCrishim(planned.Runtime.Value) {
			return fmt.Errorf("the kubelet is pointed at crishim by %s, not by crishim kubelet enable: change it there, and restart the kubelet", planned.Runtime.Source)
		}
		running, err := n.running(unit)
		if err != nil {
			return err
		}
		if !unit.Running || !n.isCrishim(running.Runtime.Value) {
			n.Say("the kubelet is disabled already")
			return nil
		}
	}
	if old != nil {
		n.Say("removing %s", n.path(dropInPath))
	}
	return n.change(ctx, old, nil, func(now *Unit) (string, error) {
		after, err := n.planned(now)
		if err != nil {
			return "", err
		}
		if n.isCrishim(after.Runtime.Value) {
			return "", fmt.Errorf("the kubelet would stay pointed at crishim by %s: change it there first", after.Runtime.Source)
		}
		return after.Runtime.Value, nil
	})
}

// load returns the unit as its files are now: an interruption may have come between them and systemd.
func (n *Node) load(ctx context.Context) (*Unit, error) {
	unit, err := n.Systemd.Unit(ctx)
	if err != nil || !unit.Outdated {
		return unit, err
	}
	if err := n.Systemd.Reload(ctx); err != nil {
		return nil, err
	}
	return n.Systemd.Unit(ctx)
}

// fits tells whether the kubelet would have behind crishim what it has now. The error says what to do.
func (n *Node) fits(ctx context.Context, now Setting) error {
	if !sameSocket(now.Value, n.Runtime) {
		return fmt.Errorf("the kubelet uses %s (%s), and crishim relays to %s: set runtime_endpoint to the former in crishim's configuration, and restart crishim.service",
			now.Value, now.Source, address(n.Runtime))
	}
	// See CrioSocketSuffix in k8s.io/kubernetes/pkg/kubelet/cadvisor: by it the kubelet decides where its statistics come from.
	const crio = "run/crio/crio.sock"
	if strings.HasSuffix(now.Value, crio) != strings.HasSuffix(n.Listen, crio) {
		return fmt.Errorf("the kubelet takes statistics from elsewhere where its endpoint ends in %s: %s and %s must both end so, or neither; change where crishim listens",
			crio, now.Value, address(n.Listen))
	}
	runtime, err := version(ctx, n.Runtime)
	if err != nil {
		return fmt.Errorf("ask the runtime at %s for its version: %w", address(n.Runtime), err)
	}
	relayed, err := version(ctx, n.Listen)
	if err != nil {
		return fmt.Errorf("ask crishim at %s for the runtime's version: %w: start crishim.socket and crishim.service", address(n.Listen), err)
	}
	if relayed != runtime {
		return fmt.Errorf("crishim at %s relays to %s, and %s is at %s: restart crishim.service, so that it goes by its configuration",
			address(n.Listen), relayed, runtime, address(n.Runtime))
	}
	return nil
}

// change puts a drop-in in the place of another; nil is none. After systemd has read it, where returns the endpoint to which the kubelet will
// connect, or what is wrong. A kubelet that runs and does not talk to it already is restarted, and waited for. On an error everything is put back.
func (n *Node) change(ctx context.Context, old, wanted *dropIn, where func(*Unit) (string, error)) (err error) {
	restarted := false
	defer func() {
		if err == nil {
			return
		}
		undo, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
		defer cancel()
		undoErr := errors.Join(n.writeDropIn(old), n.Systemd.Reload(undo))
		if restarted {
			undoErr = errors.Join(undoErr, n.Systemd.Restart(undo))
		}
		if undoErr != nil {
			err = fmt.Errorf("%w; and it was not put back: %w", err, undoErr)
			return
		}
		err = fmt.Errorf("%w; all is as it was", err)
	}()
	if err := n.writeDropIn(wanted); err != nil {
		return err
	}
	if err := n.Systemd.Reload(ctx); err != nil {
		return err
	}
	unit, err := n.Systemd.Unit(ctx)
	if errors.Is(err, errNoUnit) {
		return nil
	}
	if err != nil {
		return err
	}
	endpoint, err := where(unit)
	if err != nil {
		return err
	}
	if !unit.Running {
		n.Say("%s is not running: it will use %s when it starts", Service, address(endpoint))
		return nil
	}
	if running, err := n.running(unit); err == nil && sameSocket(running.Runtime.Value, endpoint) && connected(unit.Pid, endpoint) == nil {
		n.Say("the kubelet uses %s already", address(endpoint))
		return nil
	}
	n.Say("restarting %s", Service)
	restarted = true
	if err := n.Systemd.Restart(ctx); err != nil {
		return err
	}
	if err := n.wait(ctx, endpoint); err != nil {
		return err
	}
	n.Say("the kubelet is connected to %s", address(endpoint))
	return nil
}

// wait waits until the kubelet has been connected to an endpoint for a while.
func (n *Node) wait(ctx context.Context, endpoint string) error {
	ctx, cancel := context.WithTimeoutCause(ctx, n.Wait, fmt.Errorf("no connection in %v", n.Wait))
	defer cancel()
	var since time.Time
	pid := 0
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		unit, err := n.Systemd.Unit(ctx)
		if err == nil {
			err = connected(unit.Pid, endpoint)
		}
		switch {
		case err != nil:
			since = time.Time{}
		case since.IsZero() || pid != unit.Pid:
			since, pid = time.Now(), unit.Pid
		case time.Since(since) >= steady:
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			state := "it is not known how it is"
			if unit != nil {
				state = "it is " + unit.State
			}
			return fmt.Errorf("wait for the kubelet to connect to %s: %w (%s: see journalctl -u %s)", address(endpoint), context.Cause(ctx), state, Service)
		}
	}
}

// lock keeps other crishims from changing the same at the same time, and removes what one has left that was killed.
func (n *Node) lock() (unlock func(), err error) {
	dir, err := os.Open(n.path(units))
	if err != nil {
		return nil, fmt.Errorf("lock units: %w", err)
	}
	if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		dir.Close()
		return nil, fmt.Errorf("lock %s: %w: another crishim kubelet is at work", dir.Name(), err)
	}
	if err := os.Remove(n.path(nextPath)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		dir.Close()
		return nil, fmt.Errorf("remove what an interruption has left: %w", err)
	}
	return func() { dir.Close() }, nil
}

func (n *Node) path(p string) string { return filepath.Join(n.Root, p) }

// address is an endpoint in the form that kubelets want.
func address(endpoint string) string {
	if strings.HasPrefix(endpoint, "/") {
		return "unix://" + endpoint
	}
	return endpoint
}

// socket is the path of an endpoint.
func socket(endpoint string) string { return strings.TrimPrefix(endpoint, "unix://") }

func (n *Node) isCrishim(endpoint string) bool { return sameSocket(endpoint, n.Listen) }

// sameSocket tells whether two endpoints are one, also by different paths: /var/run leads to /run.
func sameSocket(a, b string) bool {
	if filepath.Clean(socket(a)) == filepath.Clean(socket(b)) {
		return true
	}
	infoA, errA := os.Stat(socket(a))
	infoB, errB := os.Stat(socket(b))
	return errA == nil && errB == nil && os.SameFile(infoA, infoB)
}
