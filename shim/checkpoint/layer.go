package checkpoint

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/rootfs"
)

// layer is the container's writable layer while it is captured, nil where there is none, in two passes. The second runs beside CRIU where it can: from the moment at which
// the tasks are stopped, which is before CRIU writes their memory.
type layer struct {
	dirs    rootfs.Layer // open until all is taken of it, and no longer: a runtime cannot unmount what somebody has open
	scratch []*os.File
	deleted *os.File // becomes deleted.files; one of scratch
	copy    *rootfs.Copy

	second *secondPass // nil if none has begun
}

// secondPass is one that runs in a goroutine of its own. What it has found is there after done.
type secondPass struct {
	cancel  context.CancelFunc
	done    chan struct{}
	pieces  []archive.Segment
	touched bool // by CRIU, meanwhile
	err     error
}

// begin copies what is at rest in the writable layer, while the container runs.
func (c *capture) begin(ctx context.Context) error {
	described := c.container.GetLayer()
	if described == nil {
		return nil
	}
	c.layer = &layer{}
	var err error
	if c.layer.dirs, err = openLayer(described, c.container.GetRootfs()); err != nil {
		return err
	}
	var scratch [5]*os.File
	for i := range scratch {
		if scratch[i], err = c.staging.Scratch(); err != nil {
			return err
		}
		c.layer.scratch = append(c.layer.scratch, scratch[i])
	}
	c.layer.deleted = scratch[4]
	c.layer.copy = rootfs.NewCopy(c.layer.dirs, criuContainer(c.container).Processes, [4]*os.File(scratch[:4]))
	return c.layer.copy.Begin(ctx)
}

// startSecond begins the second pass, in place of one that has begun before. The tasks are stopped.
func (l *layer) startSecond(ctx context.Context) {
	if l == nil {
		return
	}
	l.forgetSecond()
	ctx, cancel := context.WithCancel(ctx)
	second := &secondPass{cancel: cancel, done: make(chan struct{})}
	l.second = second
	go func() {
		defer close(second.done)
		before := l.whereCriuMounts()
		second.pieces, second.err = l.takeChanges(ctx)
		second.touched = l.whereCriuMounts() != before
	}()
}

// forgetSecond ends the second pass that has begun, if one has. What it has found is void once the tasks run again.
func (l *layer) forgetSecond() {
	if l != nil && l.second != nil {
		l.second.cancel()
		<-l.second.done
		l.second = nil
	}
}

// whereCriuMounts is the state of the directories in which CRIU makes others for a moment, cr-tmpfs.XXXXXX, to mount on them what is hidden by
// another mount: /tmp or, if it cannot there, the root.
func (l *layer) whereCriuMounts() (states [2]unix.Stat_t) {
	// Nothing for one that is not there.
	_ = unix.Fstatat(int(l.dirs.Merged.Fd()), "", &states[0], unix.AT_EMPTY_PATH)
	fd, err := unix.Openat2(int(l.dirs.Merged.Fd()), "tmp", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
	if err == nil {
		_ = unix.Fstat(fd, &states[1])
		unix.Close(fd)
	}
	for i := range states {
		states[i].Atim = unix.Timespec{} // which reading changes
	}
	return states
}

func (l *layer) takeChanges(ctx context.Context) ([]archive.Segment, error) {
	if err := l.deleted.Truncate(0); err != nil {
		return nil, err
	}
	if _, err := l.deleted.Seek(0, io.SeekStart); err != nil {
		return nil, err
	}
	deleted := &stringArray{w: bufio.NewWriter(l.deleted)}
	pieces, err := l.copy.Finish(ctx, deleted.add)
	if err != nil {
		return nil, err
	}
	segments := make([]archive.Segment, len(pieces))
	for i, p := range pieces {
		segments[i] = archive.Segment(p)
	}
	return segments, deleted.end()
}

// close closes what begin has opened. Members that rootfs has composed are to be read before.
func (l *layer) close() {
	if l == nil {
		return
	}
	l.forgetSecond()
	closeLayer(l.dirs)
	for _, f := range l.scratch {
		f.Close()
	}
}

// rootfs captures what the container has changed of its root file system. added says whether names have come since the tasks were stopped.
func (c *capture) rootfs(ctx context.Context, added bool) error {
	if c.layer == nil {
		return c.staging.WriteFile(archive.DeletedFiles, []byte("[]"))
	}
	if c.layer.second == nil {
		c.layer.startSecond(ctx)
	}
	<-c.layer.second.done
	if added || c.layer.second.touched {
		// By now CRIU makes and removes nothing any more.
		c.layer.startSecond(ctx)
		<-c.layer.second.done
	}
	if err := c.layer.second.err; err != nil {
		return c.staging.Explain(err)
	}
	size, err := c.layer.deleted.Seek(0, io.SeekCurrent)
	if err != nil {
		return err
	}
	if err := c.staging.Compose(archive.DeletedFiles, []archive.Segment{{File: c.layer.deleted, Length: size}}); err != nil {
		return err
	}
	if err := c.staging.Compose(archive.RootfsDiff, c.layer.second.pieces); err != nil {
		return err
	}
	closeLayer(c.layer.dirs)
	return nil
}

// openLayer opens the directories of a layer that is mounted at merged. The caller closes it, even if there is an error.
func openLayer(l *crishimv1.Layer, merged string) (layer rootfs.Layer, err error) {
	layer.UserXattr = l.GetUserXattr()
	if layer.Upper, err = os.OpenFile(l.GetUpper(), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
		return layer, err
	}
	if layer.Merged, err = os.OpenFile(merged, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return layer, err
	}
	for _, path := range l.GetLower() {
		lower, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return layer, err
		}
		layer.Lower = append(layer.Lower, lower)
	}
	return layer, nil
}

func closeLayer(l rootfs.Layer) {
	for _, f := range append(l.Lower, l.Upper, l.Merged) {
		f.Close() // which is nothing for one that was not opened, or is closed
	}
}

// stringArray writes a JSON array of strings, one by one: there may be millions.
type stringArray struct {
	w     *bufio.Writer
	count int
}

// add leaves out what is not UTF-8: JSON would make another path of it, which may be that of another file.
func (a *stringArray) add(s string) error {
	if !utf8.ValidString(s) {
		return nil
	}
	element, err := json.Marshal(s)
	if err != nil {
		return err
	}
	before := ","
	if a.count == 0 {
		before = "["
	}
	a.count++
	_, err = fmt.Fprintf(a.w, "%s%s", before, element)
	return err
}

func (a *stringArray) end() error {
	if a.count == 0 {
		a.w.WriteString("[")
	}
	a.w.WriteString("]")
	return a.w.Flush()
}
