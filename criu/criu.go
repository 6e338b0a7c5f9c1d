// Package criu drives CRIU to dump a running container so that an unmodified runc or crun can restore the images.
//
// It takes a plain description of the container, sets the options that the container's own OCI runtime would have set, and
// gives the caller the one moment at which memory and files can be captured in step: memory written, tasks still stopped.
// However a dump ends, the tasks run again. The package never kills criu in the middle of a dump: that would leave tasks
// with foreign code mapped, the cgroup frozen and the network locked.
//
// Dump belongs in a process of its own (see Dump); everything else can be called from anywhere.
package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	gocriu "github.com/checkpoint-restore/go-criu/v7"
	"golang.org/x/sys/unix"
)

// Runtime is the OCI runtime by whose conventions images are named. Images of a container with masked files cannot be
// restored by the other one.
type Runtime string

// The runtimes whose conventions are known.
const (
	Runc Runtime = "runc"
	Crun Runtime = "crun"
)

// Namespace is a namespace that existed before the container and that the restorer is to provide.
type Namespace struct {
	Type  string // as in the OCI spec: "network", "pid", …; CRIU needs to know of those two only
	Inode uint64
}

// Container describes what is dumped. Paths are those of the caller's mount namespace unless another is named.
type Container struct {
	Pid     int // of the init process, in the caller's pid namespace
	Runtime Runtime
	Rootfs  string // the container's root file system, mounted
	Freezer string // directory of a cgroup that can be frozen, v1 or v2; empty: CRIU stops the tasks one by one
	// SharedNamespaces are those that the OCI spec names by a path.
	SharedNamespaces []Namespace
	// ExternalMounts are mount points inside the container whose content is not the image's: bind mounts, devices, and
	// on cgroup v1 the controllers.
	ExternalMounts []string
	// MaskedFiles are the files inside the container that the runtime has covered with /dev/null.
	MaskedFiles []string
	// Network is a path of init's network namespace, and Upper the writable layer: where a criu that is killed leaves something.
	// They may be empty, and are not looked at otherwise.
	Network, Upper string
	// Descriptors is what descriptors 0, 1 and 2 of init were at start, as in the runtime's state. Runtimes refuse to
	// restore without it.
	Descriptors []string
}

// Dump is one dump. The directories belong to the caller, are empty at the start and private to root.
type Dump struct {
	Criu      string // absolute path of the binary
	Version   int    // of the binary, as in Features
	Container Container
	// Captured are those of the container's external mounts whose content PostDump takes. Where CRIU has to add a name to a file for
	// the length of the dump, it must be in one of them or on the root file system.
	Captured []string
	// RefuseTCP has a container that has an established TCP connection not dumped: it fails, with the connection in the error, and no network is
	// locked for it.
	RefuseTCP bool
	Images    *os.File // directory for CRIU's images
	Work      *os.File // directory for dump.log and stats-dump
	// PreDump, if not nil, is called just before criu freezes the container: some milliseconds, and before each attempt where there are two.
	PreDump func()
	// Stopped, if not nil, is called when the tasks are stopped and criu has written no memory yet, and holds criu up. It comes with the
	// notification network-lock, and so not at all for a container in the network namespace of criu; where there are two attempts, maybe in each.
	Stopped func()
	// PostDump is called once, when all images are written and the tasks are still stopped. added says whether CRIU has added names to
	// files of the container since Stopped, see Captured. It may also have made directories and removed them, cr-tmpfs.XXXXXX in /tmp or /, and
	// nothing else. An error from it fails the
	// dump. It runs in a goroutine of its own: when ctx ends before it has returned, as it may where a disk has stalled, the
	// tasks go on at once, and Run waits for it after that.
	PostDump func(added bool) error
}

// Run dumps the container and leaves it running. It returns when criu has exited.
//
// When ctx ends, the dump is stopped: criu rolls back by itself, the container runs again and Run returns ctx's cause. A
// dump whose PostDump has returned is past stopping, and goes on to its end. An error is PostDump's own, a *Error, or a failure to start criu.
//
// The calling process must be made for this: Run ignores SIGXFSZ in it and takes its only child for criu. go-criu starts
// criu with its caller's signals, and tells no pid, so a process that does anything else cannot stop a dump safely.
func (d Dump) Run(ctx context.Context) (stats Stats, err error) {
	// An ignored signal survives exec: in criu a write beyond RLIMIT_FSIZE is then an error and not its death.
	signal.Ignore(unix.SIGXFSZ)

	if err := d.Container.obstacle(ctx); err != nil {
		return Stats{}, err
	}
	if err := d.writeWatchCache(ctx); err != nil {
		return Stats{}, err
	}
	defer func() { err = errors.Join(err, d.removeWatchCache()) }()

	network, err := d.chooseNetwork(ctx)
	if err != nil {
		return Stats{}, err
	}
	err = d.run(ctx, network)
	// One that has come since makes CRIU fail before it has written any memory.
	if refused := new(Error); errors.Is(err, errConnectedTCP) && d.RefuseTCP && errors.As(err, &refused) {
		refused.Limit = limit(refusedTCPName)
		// CRIU goes on to further errors, and does not say between whom it is.
		if at, still, lookErr := d.Container.connectedTCP(ctx); lookErr == nil && still {
			refused.Place, refused.Cause = d.Container.describe(at), "it was connected just now"
		}
		return Stats{}, refused
	}
	if errors.Is(err, errConnectedTCP) && network == skipNetworkLock {
		if err := removeContent(d.Images); err != nil {
			return Stats{}, fmt.Errorf("clear images of first attempt: %w", err)
		}
		err = d.run(ctx, lockMethod(ctx, d.Criu))
	}
	if err != nil {
		return Stats{}, err
	}
	return readStats(d.Work)
}

func (d Dump) run(ctx context.Context, network networkMode) error {
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := writeDescriptors(d.Images, d.Container.Descriptors); err != nil {
		return err
	}
	thaw := d.Container.thaw // of the container's freezer, whether criu is to use it or not
	var err error
	if d.Container.Freezer, err = d.Container.freezer(); err != nil {
		return err
	}
	begin := time.Now()
	criu := gocriu.MakeCriu()
	criu.SetCriuPath(d.Criu)
	if err := criu.Prepare(); err != nil {
		return fmt.Errorf("start criu: %w", err)
	}
	aborter, err := abortOnDone(ctx, thaw)
	if err != nil {
		return errors.Join(err, criu.Cleanup())
	}
	hook := &notify{ctx: ctx, aborter: aborter, preDump: d.PreDump, stopped: d.Stopped, postDump: func() error {
		added, err := d.checkLinks()
		if err != nil || d.PostDump == nil {
			return err
		}
		return d.PostDump(added)
	}}
	err = criu.Dump(d.options(network), hook)
	// The pid is criu's until Cleanup has waited for it: only then is it safe to have stopped aborting.
	aborter.stop()
	cleanupErr := criu.Cleanup()
	if err == nil {
		err = cleanupErr
	}
	killed := killedBy(cleanupErr)
	var done string
	var left error
	switch {
	case killed != 0:
		err = d.repair(ctx, killed, begin)
	case err != nil || d.Container.ended():
		// At the end of a process that it has seized, criu exits at once. And it goes into the network by way of init, and cannot unlock it
		// for the rest of the pod once that has ended. It says neither.
		done, left = d.leftovers(begin).Remove(context.WithoutCancel(ctx))
	}
	hook.running.Wait()
	switch {
	case err == nil, killed != 0:
	case hook.err != nil:
		err = hook.err
	case ctx.Err() != nil:
		err = context.Cause(ctx)
	default:
		err = d.diagnose(err)
	}
	switch {
	case left != nil:
		if err == nil {
			err = errors.New("the container has ended in mid-dump")
		}
		return fmt.Errorf("%w; %w: %w", err, ErrLeft, left)
	case err != nil && done != "":
		return fmt.Errorf("%w; criu has not rolled back: crishim %s; the container may have been changed by criu: restart it if it misbehaves", err, done)
	}
	return err
}

func (d Dump) leftovers(begin time.Time) Leftovers {
	return d.Container.Leftovers(begin, filepath.Join(d.Work.Name(), LogFile))
}

// killedBy returns the signal that has ended criu, 0 if it has ended by itself; err is go-criu's.
func killedBy(err error) syscall.Signal {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0
	}
	if status, ok := exit.Sys().(syscall.WaitStatus); ok && status.Signaled() {
		return status.Signal()
	}
	return 0
}

// repair does what a criu that was killed can do no more, at once and whatever ctx says: the container stands still. It returns the
// error of the dump.
func (d Dump) repair(ctx context.Context, killed syscall.Signal, begin time.Time) error {
	done, err := d.leftovers(begin).Remove(context.WithoutCancel(ctx))
	repaired := ""
	if done != "" {
		repaired = "crishim " + done + "; "
	}
	if err != nil {
		return fmt.Errorf("criu was killed in mid-dump (%s): %s%w: %w", killed, repaired, ErrLeft, err)
	}
	why := "which is an error of its own: crishim's log has criu's, at level debug"
	if killed == unix.SIGKILL {
		why = "maybe for want of memory (look into the kernel's log)"
	}
	return fmt.Errorf("criu was killed in mid-dump (%s), %s: %sthe container was let go, "+
		"but may have been changed by criu: restart it if it misbehaves", killed, why, repaired)
}

// ErrLeft says that a criu has left something which could not be put right. The error around it says what.
var ErrLeft = errors.New("not everything could be put right")

// Leftovers are what a criu could leave that began with the container at a certain moment, and wrote a log.
func (c Container) Leftovers(begin time.Time, log string) Leftovers {
	return Leftovers{Freezer: c.Freezer, Network: c.Network, Pid: c.Pid, Log: log, Upper: c.Upper, Since: begin}
}

// notify receives CRIU's notifications; those that it does not name need no answer of ours.
type notify struct {
	gocriu.NoNotify
	ctx      context.Context
	aborter  *aborter
	preDump  func()
	stopped  func()
	postDump func() error
	running  sync.WaitGroup // postDump
	err      error          // what a notification was answered with
}

// PreDump is the last moment at which the container has not been touched.
func (n *notify) PreDump() error {
	if n.preDump != nil {
		n.preDump()
	}
	if n.ctx.Err() != nil {
		n.err = context.Cause(n.ctx)
	}
	return n.err
}

// NetworkLock comes when criu has stopped all tasks, whether it is to lock the network or not.
func (n *notify) NetworkLock() error {
	if n.stopped != nil && n.ctx.Err() == nil {
		n.stopped()
	}
	return nil // an end of ctx is the aborter's
}

// PostDump is the last moment at which the dump can be stopped. From its return on criu only unlocks and resumes, and a
// write of it that fails then would do nothing but harm.
func (n *notify) PostDump() error {
	n.err = n.ctx.Err()
	if n.err != nil {
		n.err = context.Cause(n.ctx)
	} else {
		n.err = n.capture()
	}
	if n.err == nil && n.aborter.stop() {
		n.err = context.Cause(n.ctx)
	}
	return n.err
}

// capture runs postDump, for as long as the context lasts.
func (n *notify) capture() error {
	result := make(chan error, 1)
	n.running.Go(func() { result <- n.postDump() })
	select {
	case err := <-result:
		return err
	case <-n.ctx.Done():
		return context.Cause(n.ctx)
	}
}
