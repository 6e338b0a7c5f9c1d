package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

var errFrozenTooLong = errors.New("the container would have stood still for longer than max_frozen allows")

// frozen bounds how long a container stands still. Its clock begins some milliseconds before criu freezes the container, and before each attempt anew. All but
// time is for one goroutine.
type frozen struct {
	max   time.Duration // 0 for no bound
	stop  context.CancelCauseFunc
	timer *time.Timer

	mu    sync.Mutex
	since time.Time // zero while it runs
	last  time.Duration
}

func (f *frozen) begin() {
	f.end()
	f.mu.Lock()
	f.since = time.Now()
	f.mu.Unlock()
	if f.max > 0 {
		f.timer = time.AfterFunc(f.max, func() { f.stop(errFrozenTooLong) })
	}
}

func (f *frozen) end() {
	if f.timer != nil {
		f.timer.Stop()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.since.IsZero() {
		f.last, f.since = time.Since(f.since), time.Time{}
	}
}

// time is how long the container stands still by now, or stood still in the last attempt.
func (f *frozen) time() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	if !f.since.IsZero() {
		return time.Since(f.since)
	}
	return f.last
}

// explain adds to the error of a dump that was stopped for the bound what was written until then, in bytes, of how much, and what helps.
func (f *frozen) explain(err error, written, need int64) error {
	if !errors.Is(err, errFrozenTooLong) {
		return err
	}
	advice := "raise checkpoint.max_frozen"
	if enough := f.max.Seconds() * float64(need) / float64(max(written, 1)); written < need && enough < time.Hour.Seconds() {
		advice += fmt.Sprintf(", at this rate to over %.1f s", enough)
	}
	return fmt.Errorf("%w (%s): of about %s it had written %s by then, %s a second: %s, or choose a location on a faster disk; the container runs on",
		err, f.max, size(need), size(written), size(int64(float64(written)/f.max.Seconds())), advice)
}
