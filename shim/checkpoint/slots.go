package checkpoint

import (
	"context"
	"fmt"
	"slices"
	"sync"
)

// slots are how many checkpoints run on the node at once. The number can be changed while they do: those that run are not touched. The zero value has
// none; it is safe for concurrent use.
type slots struct {
	mu      sync.Mutex
	max     int
	taken   int
	waiting []chan struct{} // closed when it has a slot, in the order in which they came
}

// take waits for a slot. The error wraps ctx's cause.
func (s *slots) take(ctx context.Context) error {
	s.mu.Lock()
	if s.taken < s.max && len(s.waiting) == 0 {
		s.taken++
		s.mu.Unlock()
		return nil
	}
	max := s.max
	turn := make(chan struct{})
	s.waiting = append(s.waiting, turn)
	s.mu.Unlock()
	select {
	case <-turn:
		return nil
	case <-ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.waiting, turn); i >= 0 {
		s.waiting = slices.Delete(s.waiting, i, i+1)
	} else { // it has come after all
		s.taken--
		s.pass()
	}
	return fmt.Errorf("wait for one of %d checkpoints at once on this node to end: %w", max, context.Cause(ctx))
}

// give lets go of a slot.
func (s *slots) give() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.taken--
	s.pass()
}

func (s *slots) resize(max int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.max = max
	s.pass()
}

// waitingNow is how many wait.
func (s *slots) waitingNow() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.waiting)
}

// pass gives free slots to those who wait.
func (s *slots) pass() {
	for s.taken < s.max && len(s.waiting) > 0 {
		close(s.waiting[0])
		s.waiting = s.waiting[1:]
		s.taken++
	}
}
