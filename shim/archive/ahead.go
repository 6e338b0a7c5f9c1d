package archive

import (
	"context"
	"crypto/sha256"
	"os"
	"path/filepath"
	"runtime"
	"time"

	"golang.org/x/sys/unix"
)

// ahead computes digests of files while they are still being written: when the last byte is there, most of the work is done. Whatever it
// could not do is left to Assemble, so that an error is no error yet.
//
// It relies on what CRIU does: images of memory are written from their beginning to their end, and not changed after.
type ahead struct {
	stop  context.CancelFunc
	done  chan struct{}
	heads []*head // after done
}

// head is the beginning of a file that has been read.
type head struct {
	hasher
	file   *os.File // holds the inode, so that no other file has its number
	read   int64
	failed bool // so that the hash is of no use
}

// Follow begins to compute the digests of what is being written into Images, behind all who want the processor: the tasks that
// are dumped stand still meanwhile. Assemble, or Remove, ends it.
func (s *Staging) Follow(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	a := &ahead{stop: cancel, done: make(chan struct{})}
	s.ahead = a
	go func() {
		defer close(a.done)
		runtime.LockOSThread()
		normal, err := standBack()
		if err != nil {
			return // locked: the thread ends, in whatever class it is
		}
		a.follow(ctx, s.images)
		if unix.SchedSetAttr(0, normal, 0) == nil {
			runtime.UnlockOSThread()
		}
	}()
}

// standBack gives the calling thread the least weight and no claim to interrupt others (SCHED_BATCH, Linux 2.6.16), and returns what it was before.
//
// SCHED_IDLE would be less, and holds up the dump: whoever wakes a thread takes a processor with nothing but such tasks for a free one, and
// then CRIU's command to a task of the container waits there for up to a tick (4 ms), since SCHED_IDLE gives way at once to tasks of its own cgroup
// only (find_matching_se in kernel/sched/fair.c, seen on Linux 6.18).
func standBack() (before *unix.SchedAttr, err error) {
	const least = 19 // nice
	if before, err = unix.SchedGetAttr(0, 0); err != nil {
		return nil, err
	}
	return before, unix.SchedSetAttr(0, &unix.SchedAttr{Size: unix.SizeofSchedAttr, Policy: unix.SCHED_BATCH, Nice: least}, 0)
}

// end ends the following and returns the heads, whose files are then the caller's. It may be called on nil, and again.
func (a *ahead) end() []*head {
	if a == nil {
		return nil
	}
	a.stop()
	<-a.done
	heads := a.heads
	a.heads = nil
	return heads
}

func (a *ahead) follow(ctx context.Context, images *os.File) {
	const pause = 5 * time.Millisecond // CRIU writes some megabytes meanwhile
	known := map[string]*head{}
	for ctx.Err() == nil {
		look(images, known)
		read := false
		for _, h := range known {
			read = h.advance(ctx) || read
		}
		if read {
			continue
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
	for _, h := range known {
		a.heads = append(a.heads, h)
	}
}

// look finds images of memory that are new, and lets go of those that are gone, as when a dump is begun anew.
func look(images *os.File, known map[string]*head) {
	again, err := openAt(images, ".", unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return
	}
	defer again.Close()
	names, err := again.Readdirnames(-1)
	if err != nil {
		return
	}
	for name, h := range known {
		var st unix.Stat_t
		if unix.Fstat(int(h.file.Fd()), &st) != nil || st.Nlink == 0 {
			h.file.Close()
			delete(known, name)
		}
	}
	for _, name := range names {
		if pages, _ := filepath.Match("pages-*.img", name); !pages || known[name] != nil {
			continue
		}
		if f, err := openAt(images, name, unix.O_RDONLY); err == nil {
			known[name] = &head{hasher: hasher{Hash: sha256.New()}, file: f}
		}
	}
}

// advance reads on, to the last whole window that the file has now or for a chunk's length, and says whether there was something.
func (h *head) advance(ctx context.Context) bool {
	info, err := h.file.Stat()
	if err != nil { // Assemble will meet it
		return false
	}
	before := h.read
	for !h.failed && h.read < before+copyChunk && h.read+hashWindow <= info.Size() && ctx.Err() == nil {
		n, err := h.add(Segment{File: h.file, Offset: h.read, Length: hashWindow})
		h.read += n
		h.failed = err != nil
	}
	return h.read > before
}

func closeHeads(heads []*head) {
	for _, h := range heads {
		h.file.Close()
	}
}

// headOf returns the head of a member's file, nil if there is none.
func headOf(heads []*head, m member) *head {
	if m.composed || len(heads) == 0 {
		return nil
	}
	var st unix.Stat_t
	if unix.Fstatat(int(m.dir.Fd()), m.base, &st, unix.AT_SYMLINK_NOFOLLOW) != nil {
		return nil
	}
	for _, h := range heads {
		var followed unix.Stat_t
		if unix.Fstat(int(h.file.Fd()), &followed) == nil && followed.Dev == st.Dev && followed.Ino == st.Ino && h.read <= m.size && !h.failed {
			return h
		}
	}
	return nil
}
