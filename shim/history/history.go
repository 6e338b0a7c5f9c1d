// Package history remembers the checkpoints of a node: those in flight, with how far they are and a way to stop them, and those that have
// ended, with what came of them, also after a restart.
//
// It knows nothing of how a checkpoint is made. What it cannot write to disk it remembers all the same, until the process ends: no
// checkpoint fails over it.
package history

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/timestamppb"

	crishimv1 "crishim/proto/crishim/v1"
)

// What is kept of ended checkpoints: so many, and so many bytes on disk.
const (
	maxEnded = 1000
	maxBytes = 1 << 20
)

// History is safe for concurrent use. What it returns is the caller's.
type History struct {
	log logrus.FieldLogger

	mu     sync.Mutex
	file   *file // nil before Open
	last   int64 // number of the last id
	flying map[string]*Flight
	ended  []*crishimv1.Checkpoint // the oldest first
}

// New returns an empty history, which is not on disk before Open.
func New(log logrus.FieldLogger) *History {
	return &History{log: log, flying: make(map[string]*Flight)}
}

// Open reads what was written in a directory, which is this process's alone, and from now on writes there what ends. Once is enough.
func (h *History) Open(dir string) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file != nil {
		return
	}
	h.file = &file{dir: dir, log: h.log}
	before := h.file.read()
	since := h.ended
	h.ended = bounded(append(before, since...))
	if n := len(h.ended); n > 0 { // also where the clock has been put back
		if id, err := strconv.ParseInt(h.ended[n-1].GetId(), 36, 64); err == nil {
			h.last = max(h.last, id)
		}
	}
	for _, c := range since {
		h.file.append(c, h.ended)
	}
}

// Flight is a checkpoint in flight. It is safe for concurrent use.
type Flight struct {
	history *History
	cancel  context.CancelCauseFunc
	ended   chan struct{}

	// guarded by history.mu
	checkpoint *crishimv1.Checkpoint
	progress   *crishimv1.Progress
}

// Begin remembers a checkpoint in flight, which has what is known of it, and gives it its id. cancel is how it is stopped. The caller calls End.
func (h *History) Begin(c *crishimv1.Checkpoint, cancel context.CancelCauseFunc) *Flight {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := time.Now()
	h.last = max(h.last+1, now.UnixMilli())
	f := &Flight{history: h, cancel: cancel, ended: make(chan struct{}), checkpoint: proto.CloneOf(c)}
	// Eight characters until 2059, which sort as the milliseconds do.
	f.checkpoint.Id = strconv.FormatInt(h.last, 36)
	f.checkpoint.Begin = timestamppb.New(now)
	h.flying[f.checkpoint.Id] = f
	return f
}

// Update changes what is known of the checkpoint.
func (f *Flight) Update(change func(*crishimv1.Checkpoint)) {
	f.history.mu.Lock()
	defer f.history.mu.Unlock()
	change(f.checkpoint)
}

// Progress remembers how far the checkpoint is.
func (f *Flight) Progress(p *crishimv1.Progress) {
	f.history.mu.Lock()
	defer f.history.mu.Unlock()
	f.progress = p
}

// Checkpoint is what is known of it now.
func (f *Flight) Checkpoint() *crishimv1.Checkpoint {
	f.history.mu.Lock()
	defer f.history.mu.Unlock()
	return proto.CloneOf(f.checkpoint)
}

// Cancel has the checkpoint stopped for this reason, and waits for its end, or for that of ctx.
func (f *Flight) Cancel(ctx context.Context, cause error) (*crishimv1.Checkpoint, error) {
	f.cancel(cause)
	select {
	case <-f.ended:
		return f.Checkpoint(), nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// End remembers how the checkpoint has ended, which change says, and returns it.
func (f *Flight) End(change func(*crishimv1.Checkpoint)) *crishimv1.Checkpoint {
	h := f.history
	h.mu.Lock()
	defer h.mu.Unlock()
	change(f.checkpoint)
	f.checkpoint.End = timestamppb.Now()
	delete(h.flying, f.checkpoint.GetId())
	h.add(proto.CloneOf(f.checkpoint))
	close(f.ended)
	return proto.CloneOf(f.checkpoint)
}

// Add remembers a checkpoint that has ended without an End, as with the crishim that had begun it, or what has become of one that had ended.
func (h *History) Add(c *crishimv1.Checkpoint) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.add(proto.CloneOf(c))
}

func (h *History) add(c *crishimv1.Checkpoint) {
	h.ended = bounded(append(h.ended, c))
	if h.file != nil {
		h.file.append(c, h.ended)
	}
}

// bounded leaves of checkpoints with the same id the last one, and the latest of all that it has room for, in the order of their ids.
func bounded(all []*crishimv1.Checkpoint) []*crishimv1.Checkpoint {
	last := make(map[string]*crishimv1.Checkpoint, len(all))
	for _, c := range all {
		last[c.GetId()] = c
	}
	all = slices.SortedFunc(maps.Values(last), func(a, b *crishimv1.Checkpoint) int { return byID(a.GetId(), b.GetId()) })
	return all[max(0, len(all)-maxEnded):]
}

func byID(a, b string) int {
	return cmp.Or(cmp.Compare(len(a), len(b)), cmp.Compare(a, b))
}

// List tells of all that is remembered, the oldest first.
func (h *History) List() []*crishimv1.Listed {
	h.mu.Lock()
	defer h.mu.Unlock()
	var all []*crishimv1.Listed
	for _, c := range h.ended {
		all = append(all, &crishimv1.Listed{Checkpoint: proto.CloneOf(c)})
	}
	for _, f := range h.flying {
		all = append(all, &crishimv1.Listed{Checkpoint: proto.CloneOf(f.checkpoint), Progress: proto.CloneOf(f.progress)})
	}
	slices.SortFunc(all, func(a, b *crishimv1.Listed) int { return byID(a.GetCheckpoint().GetId(), b.GetCheckpoint().GetId()) })
	return all
}

// InFlight is how many are in flight.
func (h *History) InFlight() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return len(h.flying)
}

// Unwritten is how often something could not be written to disk.
func (h *History) Unwritten() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.file == nil {
		return 0
	}
	return h.file.failures
}

// Flight returns the one in flight that has an id, nil if there is none.
func (h *History) Flight(id string) *Flight {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.flying[id]
}

// Ended returns the ended one that has an id, or the latest with an archive at the location, nil if there is none.
func (h *History) Ended(id, location string) *crishimv1.Checkpoint {
	h.mu.Lock()
	defer h.mu.Unlock()
	for _, c := range slices.Backward(h.ended) {
		if id != "" && c.GetId() == id || location != "" && c.GetCode() == 0 && c.GetLocation() == location {
			return proto.CloneOf(c)
		}
	}
	return nil
}
