package checkpoint

import (
	"sync"
	"time"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
)

// meter tells how far a checkpoint is: at each change of phase, and at intervals until the container runs again.
type meter struct {
	send    func(*crishimv1.Progress) // safe for concurrent use
	staging *archive.Staging
	frozen  *frozen

	mu       sync.Mutex
	phase    crishimv1.Phase
	expected int64
	done     chan struct{}
	ended    sync.WaitGroup
}

// startMeter begins with the phase in which the container still runs. expected is how much there is to be staged, in bytes. The caller calls stop.
func startMeter(send func(*crishimv1.Progress), staging *archive.Staging, frozen *frozen, expected int64) *meter {
	const interval = 100 * time.Millisecond
	m := &meter{send: send, staging: staging, frozen: frozen, expected: expected, done: make(chan struct{})}
	m.enter(crishimv1.Phase_PHASE_COPY)
	m.ended.Go(func() {
		for tick := time.NewTicker(interval); ; {
			select {
			case <-m.done:
				tick.Stop()
				return
			case <-tick.C:
				m.tell()
			}
		}
	})
	return m
}

// enter tells of the next phase of staging.
func (m *meter) enter(phase crishimv1.Phase) {
	m.mu.Lock()
	m.phase = phase
	m.mu.Unlock()
	m.tell()
}

func (m *meter) tell() {
	m.mu.Lock()
	defer m.mu.Unlock() // or an event of the phase before could come after this one's
	used := m.staging.Used()
	m.send(&crishimv1.Progress{Phase: m.phase, Bytes: used, Expected: max(m.expected, used), FrozenUs: m.frozen.time().Microseconds()})
}

// stop ends the telling at intervals. It may be called again.
func (m *meter) stop() {
	m.mu.Lock()
	select {
	case <-m.done:
	default:
		close(m.done)
	}
	m.mu.Unlock()
	m.ended.Wait()
}

// assembling tells of the phases in which the container runs again: of the archive so far, and of how much it is going to be.
func (m *meter) assembling(phase crishimv1.Phase, bytes, expected int64) {
	m.send(&crishimv1.Progress{Phase: phase, Bytes: bytes, Expected: expected, FrozenUs: m.frozen.time().Microseconds()})
}
