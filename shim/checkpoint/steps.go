package checkpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
	"crishim/shim/failpoint"
	"crishim/shim/rootfs"
)

// run does a job, step by step, in the helper process. Each step is undone by what stands beside it: the staging directory
// is removed with all that was put into it, and criu rolls back a dump by itself. log gets CRIU's log of a dump that has failed.
// The error wraps errLeft where something is left, and the result says so.
func run(ctx context.Context, job *crishimv1.Job, progress func(*crishimv1.Progress), log func(lines []byte)) (result *crishimv1.Result, err error) {
	location, err := archive.OpenLocation(job.GetLocation())
	if err != nil {
		return nil, err
	}
	defer location.Close()
	process, err := processOf(job.GetContainer()).Pin()
	if err != nil {
		return nil, err
	}
	defer process.Close()

	binds, err := bindMounts(ctx, job.GetContainer().GetBindMounts())
	if err != nil {
		return nil, err
	}

	staging, err := location.Stage(job.GetStaging())
	if err != nil {
		return nil, err
	}
	defer func() {
		// After Publish there is nothing left to remove; an archive that is there stays a success.
		removeErr := staging.Remove()
		switch {
		case removeErr != nil && err != nil:
			err = errors.Join(err, fmt.Errorf("%w: %w", errLeft, removeErr))
		case removeErr != nil:
			fmt.Fprintf(os.Stderr, "crishim %s: the archive is complete, but %v\n", HelperCommand, removeErr)
			result.Left = true
		}
	}()
	options := archive.Options{Compression: job.GetCompression(), Digest: job.GetDigest()}
	room, err := newRoom(staging, job.GetReserve())
	if err != nil {
		return nil, err
	}
	need, err := estimate(job.GetContainer())
	if err != nil {
		return nil, err
	}
	if err := room.check(staging.Extra(options, need.staged(), need.layer), need); err != nil {
		return nil, err
	}
	ctx, stop := room.watch(ctx)
	defer stop()
	// For what is taken from a living container. Who has stopped it waits until it is let go.
	alive, stopWatching := process.Alive(ctx)
	defer stopWatching()
	for _, member := range job.GetMembers() {
		if err := staging.WriteFile(member.GetName(), member.GetContent()); err != nil {
			return nil, err
		}
	}
	if err := staging.WriteJSON(archive.BindMounts, binds); err != nil {
		return nil, err
	}

	failpoint.Hit("staged")
	capture := &capture{container: job.GetContainer(), process: process, staging: staging}
	defer capture.close()
	frozen := frozen{max: time.Duration(job.GetMaxFrozenUs()) * time.Microsecond}
	meter := startMeter(progress, staging, &frozen, need.bytes())
	defer meter.stop()
	if err := capture.begin(alive); err != nil {
		return nil, capture.explain(fmt.Errorf("capture changes of the root file system: %w", staging.Explain(err)))
	}

	failpoint.Hit("copied")
	meter.enter(crishimv1.Phase_PHASE_DUMP)
	if job.GetDigest() != archive.None {
		staging.Follow(ctx)
	}
	dumping, stopDump := context.WithCancelCause(alive)
	defer stopDump(nil)
	frozen.stop = stopDump
	var captured []string
	if job.GetContainer().GetShm() {
		captured = []string{shmDir}
	}
	stats, err := criu.Dump{
		Criu:      job.GetCriu(),
		Version:   int(job.GetCriuVersion()),
		Container: criuContainer(job.GetContainer()),
		Captured:  captured,
		RefuseTCP: job.GetRefuseTcp(),
		Images:    staging.Images(),
		Work:      staging.Dir(),
		PreDump: func() {
			capture.layer.forgetSecond()
			frozen.begin()
		},
		Stopped: func() { capture.layer.startSecond(dumping) },
		PostDump: func(added bool) error {
			meter.enter(crishimv1.Phase_PHASE_CAPTURE)
			failpoint.Hit("memory written")
			err := capture.run(dumping, added)
			failpoint.Hit("captured")
			return err
		},
	}.Run(dumping)
	frozen.end()
	if err != nil {
		if criuErr := (*criu.Error)(nil); errors.As(err, &criuErr) {
			err = staging.Explain(err)
		}
		err = frozen.explain(err, staging.Used(), need.bytes())
		if logErr := copyLines(filepath.Join(staging.Dir().Name(), criu.LogFile), log); logErr != nil {
			fmt.Fprintf(os.Stderr, "crishim %s: read criu's log: %v\n", HelperCommand, logErr)
		}
		return nil, capture.explain(err)
	}

	failpoint.Hit("dumped")
	meter.stop()
	expected := int64(0)
	if options.Compression != archive.Zstd {
		expected = staging.Used()
	}
	meter.assembling(crishimv1.Phase_PHASE_ASSEMBLE, 0, expected)
	if err := capture.copyLog(); err != nil {
		return nil, err
	}
	var size int64
	err = staging.Assemble(ctx, options, func(bytes int64) {
		size = bytes
		meter.assembling(crishimv1.Phase_PHASE_ASSEMBLE, bytes, expected)
	})
	if err != nil {
		return nil, err
	}
	failpoint.Hit("assembled")
	meter.assembling(crishimv1.Phase_PHASE_PUBLISH, size, size)
	if err := staging.Publish(ctx); err != nil {
		return nil, err
	}
	failpoint.Hit("published")
	return &crishimv1.Result{
		Size:         size,
		FreezingUs:   uint32(stats.Freezing.Microseconds()),
		FrozenUs:     uint32(stats.Frozen.Microseconds()),
		MemoryDumpUs: uint32(stats.MemoryDump.Microseconds()),
		PagesWritten: stats.PagesWritten,
		Digest:       staging.Digest(),
	}, nil
}

// bindMounts looks at the sources, so that a restorer knows what kind of mount point each of them needs. A volume of a file server
// that is gone may hold it up for ever: then it returns with the end of ctx, and what hangs ends with this process, which has
// nothing to undo yet.
func bindMounts(ctx context.Context, mounts []*crishimv1.BindMount) ([]archive.BindMount, error) {
	type result struct {
		binds []archive.BindMount
		err   error
	}
	looked := make(chan result, 1)
	go func() {
		binds, err := lookAtBindMounts(mounts)
		looked <- result{binds, err}
	}()
	select {
	case r := <-looked:
		return r.binds, r.err
	case <-ctx.Done():
		return nil, fmt.Errorf("look at bind mounts: %w", context.Cause(ctx))
	}
}

func lookAtBindMounts(mounts []*crishimv1.BindMount) ([]archive.BindMount, error) {
	binds := []archive.BindMount{} // never null
	for _, m := range mounts {
		info, err := os.Stat(m.GetSource())
		if os.IsNotExist(err) {
			continue // a file that was unlinked while it was mounted
		}
		if err != nil {
			return nil, fmt.Errorf("look at bind mount: %w", err)
		}
		kind := "file"
		if info.IsDir() {
			kind = "directory"
		}
		binds = append(binds, archive.BindMount{
			Source: m.GetSource(), Destination: m.GetDestination(), FileType: kind, Permissions: uint32(info.Mode().Perm()),
		})
	}
	return binds, nil
}

func processOf(c *crishimv1.Container) container.Process {
	return container.Process{Pid: int(c.GetPid()), StartTime: c.GetStartTime(), Cgroup: c.GetCgroup()}
}

func criuContainer(c *crishimv1.Container) criu.Container {
	var shared []criu.Namespace
	for _, ns := range c.GetSharedNamespaces() {
		shared = append(shared, criu.Namespace{Type: ns.GetType(), Inode: ns.GetInode()})
	}
	return criu.Container{
		Pid:              int(c.GetPid()),
		Runtime:          criu.Runtime(c.GetRuntime()),
		Rootfs:           c.GetRootfs(),
		Freezer:          c.GetFreezer(),
		SharedNamespaces: shared,
		ExternalMounts:   c.GetExternalMounts(),
		MaskedFiles:      c.GetMaskedFiles(),
		Descriptors:      c.GetDescriptors(),
		Network:          c.GetNetwork(),
		Upper:            c.GetLayer().GetUpper(),
	}
}

// shmDir is where a container has what its pod shares as memory.
const shmDir = "/dev/shm"

// capture takes what belongs to the memory but is not in CRIU's images, while the tasks are still stopped.
type capture struct {
	container *crishimv1.Container
	process   *container.Pinned
	staging   *archive.Staging

	layer *layer // nil where there is none

	log     *os.File // held since the capture, nil where there is none
	logSize int64    // at that moment
}

// run takes the rest. added says whether names have come to the container's files since the tasks were stopped.
func (c *capture) run(ctx context.Context, added bool) error {
	// The tasks are stopped: from here on the pid cannot come to mean another process.
	if err := c.process.Verify(); err != nil {
		return err
	}
	if err := c.rootfs(ctx, added); err != nil {
		return fmt.Errorf("capture changes of the root file system: %w", err)
	}
	if err := c.shm(ctx); err != nil {
		return fmt.Errorf("capture /dev/shm: %w", err)
	}
	if err := c.holdLog(); err != nil {
		return fmt.Errorf("capture log: %w", err)
	}
	return nil
}

func (c *capture) shm(ctx context.Context) error {
	if !c.container.GetShm() {
		return nil
	}
	dir, err := openInContainer(int(c.container.GetPid()), shmDir)
	if err != nil {
		return err
	}
	defer dir.Close()
	scratch, err := c.staging.Scratch()
	if err != nil {
		return err
	}
	defer scratch.Close()
	return c.member(archive.DevShm, func(w io.Writer) error { return rootfs.Tree(ctx, w, dir, scratch) })
}

// holdLog keeps the log as it is now without reading it: it only grows, so its length is enough to copy it later, when the
// container runs again. What the process has written but the runtime has not yet, is still in their pipe.
func (c *capture) holdLog() error {
	path := c.container.GetLog()
	if path == "" {
		return nil
	}
	// It may have been replaced since it was described. A device may act on being opened: it is looked at before.
	found, err := os.OpenFile(path, unix.O_PATH|unix.O_NOFOLLOW, 0)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer found.Close()
	info, err := found.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%w: its log %s is not a regular file: find out who has put it there, and remove it", container.ErrUnsupported, path)
	}
	if c.log, err = os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", found.Fd()), unix.O_RDONLY|unix.O_NONBLOCK, 0); err != nil {
		return err
	}
	c.logSize = info.Size()
	return nil
}

func (c *capture) copyLog() error {
	if c.log == nil {
		return nil
	}
	err := c.member(archive.ContainerLog, func(w io.Writer) error {
		// Somebody may have cut it off since; what is left is what there is.
		return writeLog(w, io.LimitReader(c.log, c.logSize))
	})
	if err != nil {
		return fmt.Errorf("copy log: %w", err)
	}
	return nil
}

// explain says that the container has ended, where that is why something of it could not be taken.
func (c *capture) explain(err error) error {
	gone := c.process.Verify()
	if !errors.Is(gone, container.ErrNotRunning) || errors.Is(err, container.ErrNotRunning) {
		return err
	}
	return fmt.Errorf("%w: %w", gone, err)
}

func (c *capture) close() {
	c.layer.close()
	if c.log != nil {
		c.log.Close()
	}
}

func (c *capture) member(name string, write func(io.Writer) error) error {
	file, err := c.staging.Create(name)
	if err != nil {
		return err
	}
	return c.staging.Explain(errors.Join(write(file), file.Close()))
}

// copyLines passes a file on in pieces of whole lines. That there is no such file is no error.
func copyLines(path string, pass func(lines []byte)) error {
	const piece = 32 << 10 // bytes; a line that is longer than that is passed in several
	file, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer file.Close()
	var lines []byte
	for reader := bufio.NewReaderSize(file, piece); ; {
		line, err := reader.ReadSlice('\n')
		if len(lines)+len(line) > piece {
			pass(lines)
			lines = nil
		}
		lines = append(lines, line...)
		if err == nil || errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		pass(lines)
		if err == io.EOF {
			return nil
		}
		return err
	}
}

// openInContainer opens a directory of a container as its processes see it. The container can put a symlink anywhere in the
// path: none is followed (openat2, Linux 5.6).
func openInContainer(pid int, path string) (*os.File, error) {
	root, err := os.OpenFile(fmt.Sprintf("/proc/%d/root", pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	fd, err := unix.Openat2(int(root.Fd()), strings.TrimPrefix(path, "/"), &unix.OpenHow{
		Flags:   unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_SYMLINKS,
	})
	if err != nil {
		return nil, &os.PathError{Op: "openat2", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}
