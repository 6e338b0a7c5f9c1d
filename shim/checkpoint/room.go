package checkpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
	"golang.org/x/sys/unix"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
)

// errNoRoom is in the error of a checkpoint that is not begun, or stopped, so that the disk does not become full.
var errNoRoom = errors.New("no room for the archive")

// room looks after the file system that an archive is made on: what is reserved of it stays free.
type room struct {
	staging *archive.Staging // nil where it is looked at only
	place   string           // the path of a directory on it
	reserve *crishimv1.Reserve
	start   archive.Room
}

func newRoom(staging *archive.Staging, reserve *crishimv1.Reserve) (*room, error) {
	start, err := staging.Room()
	return &room{staging, staging.Place(), reserve, start}, err
}

// check says whether there is room for an archive, which takes extra bytes to be put together.
func (r *room) check(extra int64, need need) error {
	bytes := need.bytes() + extra
	bytes += bytes/50 + 16<<20 // the container goes on until it is frozen, and CRIU writes of more than memory
	switch {
	case r.start.Free-r.reserve.GetBytes() < bytes:
		return fmt.Errorf("%w: it takes about %s (memory %s, writable layer %s, /dev/shm and log %s, and %s to put it together), and %s",
			errNoRoom, size(bytes), size(need.bytes()-need.layer-need.shm-need.log), size(need.layer), size(need.shm+need.log), size(extra), r.describe(r.start))
	case r.start.TotalInodes > 0 && r.start.FreeInodes-r.reserve.GetInodes() < need.inodes:
		return fmt.Errorf("%w: it takes about %d inodes, and %s", errNoRoom, need.inodes, r.describe(r.start))
	}
	return nil
}

// describe says what is free, what is reserved for whom, and what to do.
func (r *room) describe(now archive.Room) string {
	free := fmt.Sprintf("of %s %s are free, of which %s stay so (%s)", size(now.Total), size(now.Free), size(r.reserve.GetBytes()), r.reserve.GetBytesOf())
	if now.TotalInodes > 0 && (now.FreeInodes-r.reserve.GetInodes() < 1000 || now.FreeInodes-r.reserve.GetInodes() < r.start.FreeInodes/100) {
		free += fmt.Sprintf("; of %d inodes %d, of which %d stay so (%s)", now.TotalInodes, now.FreeInodes, r.reserve.GetInodes(), r.reserve.GetInodesOf())
	}
	return fmt.Sprintf("on the file system of %s %s: make room there, reserve less, or choose a location on another file system", r.place, free)
}

// size is a number of bytes for people.
func size(bytes int64) string { return humanize.IBytes(uint64(max(bytes, 0))) }

// watch returns a context that ends, with the reason as its cause, before what is reserved is used up, by the checkpoint or by others. The caller
// calls stop, which ends the watching.
func (r *room) watch(ctx context.Context) (watched context.Context, stop func()) {
	watched, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		r.look(watched, cancel)
	}()
	return watched, func() {
		cancel(nil)
		<-done
	}
}

// look looks at the file system until ctx ends, the more often, the sooner the reserve may be touched.
func (r *room) look(ctx context.Context, cancel context.CancelCauseFunc) {
	const (
		seldom = 100 * time.Millisecond
		often  = 2 * time.Millisecond
		// What criu writes before its next write fails.
		margin       = 16 << 20
		marginInodes = 16
	)
	last, lastTime := r.start, time.Now()
	for pause := often; ; {
		select {
		case <-ctx.Done():
			return
		case <-time.After(pause):
		}
		now, err := r.staging.Room()
		if err != nil {
			continue // whatever it is, it shows up where something is written
		}
		left := float64(now.Free - r.reserve.GetBytes() - margin)
		perSecond := float64(last.Free-now.Free) / time.Since(lastTime).Seconds()
		few := now.TotalInodes > 0 && now.FreeInodes < r.reserve.GetInodes()+marginInodes
		if few || left <= 0 || left < perSecond*often.Seconds() {
			cancel(r.stopped(now))
			return
		}
		if pause = seldom; perSecond > 0 {
			half := left / perSecond / 2
			pause = max(often, time.Duration(min(half, seldom.Seconds())*float64(time.Second)))
		}
		last, lastTime = now, time.Now()
	}
}

// stopped is why a checkpoint is stopped, with who has taken the room.
func (r *room) stopped(now archive.Room) error {
	used := r.staging.Used()
	others := max(r.start.Free-now.Free-used, 0)
	return fmt.Errorf("%w: it was stopped when it had written %s, and others %s meanwhile; %s",
		errNoRoom, size(used), size(others), r.describe(now))
}

// need is what an archive takes, in bytes and in inodes while it is made.
type need struct {
	memory []int64 // of each process, and what processes share
	layer  int64   // as of some seconds ago
	shm    int64
	log    int64
	inodes int64
}

// staged are the sizes of files that are staged whole.
func (n need) staged() []int64 { return append(slices.Clone(n.memory), n.shm) }

func (n need) bytes() int64 {
	sum := n.layer + n.shm + n.log
	for _, m := range n.memory {
		sum += m
	}
	return sum
}

// estimate says what an archive of a container takes. CRIU writes the pages that are a process's own, swapped out or not, and of those that
// processes have in common since a fork, once for each. What they share otherwise it writes once. The kernel counts all of it,
// so that no memory has to be looked at. What it does not count is little: deleted files that are open.
func estimate(c *crishimv1.Container) (need, error) {
	n := need{layer: c.GetLayer().GetSize(), inodes: 64} // of what there is once
	pids, err := criuContainer(c).Processes()
	if err != nil {
		return need{}, fmt.Errorf("look at processes: %w", err)
	}
	shared := int64(0)
	for _, pid := range pids {
		fields, err := countersOf(filepath.Join("/proc", strconv.Itoa(pid), "status"))
		if err != nil {
			continue // it has ended
		}
		const kib = 1 << 10
		n.memory = append(n.memory, (fields["RssAnon:"]+fields["VmSwap:"]+fields["HugetlbPages:"])*kib)
		shared += fields["RssShmem:"] * kib
		n.inodes += fields["Threads:"] + 8 // CRIU's images of a process, and of a thread
	}
	n.memory = append(n.memory, min(shared, sharedIn(c, shared)))
	if c.GetShm() {
		n.shm = usedShm(int(c.GetPid()))
	}
	if info, err := os.Stat(c.GetLog()); err == nil {
		n.log = info.Size()
	}
	return n, nil
}

// countersOf reads those lines of a file of the kernel's that are a name and a number.
func countersOf(path string) (map[string]int64, error) {
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	counters := map[string]int64{}
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) >= 2 {
			if n, err := strconv.ParseInt(fields[1], 10, 64); err == nil {
				counters[fields[0]] = n
			}
		}
	}
	return counters, lines.Err()
}

// sharedIn is how much memory a container's cgroup has that can be shared, in bytes: each page once, however many processes have it. Where the
// cgroup does not tell, it is otherwise.
func sharedIn(c *crishimv1.Container, otherwise int64) int64 {
	// On cgroup v2 the freezer's directory has all controllers.
	counters, err := countersOf(filepath.Join(c.GetFreezer(), "memory.stat"))
	for line := range strings.Lines(c.GetCgroup()) {
		if fields := strings.SplitN(strings.TrimSpace(line), ":", 3); err != nil && len(fields) == 3 && fields[1] == "memory" {
			counters, err = countersOf(filepath.Join("/sys/fs/cgroup/memory", fields[2], "memory.stat"))
		}
	}
	for _, name := range []string{"total_shmem", "shmem"} { // v1's without total_ leaves out the cgroups below
		if n, ok := counters[name]; ok {
			return n
		}
	}
	return otherwise
}

// usedShm is how much there is in a container's /dev/shm, in bytes.
func usedShm(pid int) int64 {
	dir, err := openInContainer(pid, shmDir)
	if err != nil {
		return 0 // the capture will say why
	}
	defer dir.Close()
	var st unix.Statfs_t
	if unix.Fstatfs(int(dir.Fd()), &st) != nil || st.Type != unix.TMPFS_MAGIC {
		return 0
	}
	return int64(st.Blocks-st.Bfree) * int64(st.Bsize)
}
