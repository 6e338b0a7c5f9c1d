package monitor

import (
	"slices"
	"sync"
	"time"
)

// kept is how many events are remembered, the last ones.
const kept = 50

// Event is something that has happened to this crishim since it was started.
type Event struct {
	Time time.Time `json:"time"`
	Kind string    `json:"kind"` // runtime away, runtime back, checkpoint failed, repair or reload
	Text string    `json:"text"` // one line
}

// events is safe for concurrent use.
type events struct {
	mu   sync.Mutex
	last []Event // the oldest first
}

func (e *events) add(kind, text string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.last) == kept {
		e.last = slices.Delete(e.last, 0, 1)
	}
	e.last = append(e.last, Event{time.Now().UTC(), kind, text})
}

// recent returns a copy, the latest first.
func (e *events) recent() []Event {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := slices.Clone(e.last)
	slices.Reverse(all)
	return all
}
