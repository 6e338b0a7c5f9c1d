package checkpoint

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
)

func TestSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s slots
		s.resize(1)
		var order []int
		var all sync.WaitGroup
		goOn := make(chan struct{})
		for i := range 4 {
			all.Go(func() {
				if err := s.take(t.Context()); err != nil {
					t.Error(err)
				}
				order = append(order, i) // no race: only where one slot is given at a time
				<-goOn
				s.give()
			})
			synctest.Wait()
		}
		expect := func(n int, when string) {
			t.Helper()
			synctest.Wait()
			if len(order) != n || order[n-1] != n-1 {
				t.Fatalf("%s: at work are %v", when, order)
			}
		}
		expect(1, "with one slot")
		s.resize(2)
		expect(2, "with another one")
		s.resize(1)
		goOn <- struct{}{}
		expect(2, "when one of two has ended, and there is one slot")
		goOn <- struct{}{}
		expect(3, "when both have ended")

		ctx, cancel := context.WithCancelCause(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- s.take(ctx) }()
		synctest.Wait()
		cancel(errors.New("no time"))
		if err := <-ended; err == nil || err.Error() != "wait for one of 1 checkpoints at once on this node to end: no time" {
			t.Errorf("the error is %v", err)
		}
		close(goOn)
		all.Wait()
		if s.taken != 0 || len(s.waiting) != 0 {
			t.Errorf("%d slots are taken, %d wait", s.taken, len(s.waiting))
		}
	})
}

// Whoever gives up in the moment in which a slot comes, passes it on.
func TestASlotThatComesTooLate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s slots
		s.resize(1)
		if err := s.take(t.Context()); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		first, second := make(chan error, 1), make(chan error, 1)
		go func() { first <- s.take(ctx) }()
		synctest.Wait()
		go func() { second <- s.take(t.Context()) }()
		synctest.Wait()
		s.mu.Lock()
		cancel()  // from here on the first one gives up
		s.taken-- // as give does it
		s.pass()
		s.mu.Unlock()
		if err := <-first; err == nil {
			t.Error("the first one has got it all the same")
		}
		if err := <-second; err != nil {
			t.Error(err)
		}
		s.give()
		if s.taken != 0 || len(s.waiting) != 0 {
			t.Errorf("%d slots are taken, %d wait", s.taken, len(s.waiting))
		}
	})
}
