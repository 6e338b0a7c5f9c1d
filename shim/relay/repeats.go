package relay

import (
	"fmt"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
)

// repeatLog is how often a line is logged that others can have come again and again.
const repeatLog = time.Minute

// repeats logs what a peer, a runtime or a want of descriptors can bring about without end: each line at once when it comes for the first time,
// and then once an interval, with how often it came since the last. It is safe for concurrent use.
type repeats struct {
	log   logrus.FieldLogger
	every time.Duration

	mu    sync.Mutex
	lines map[string]*repeated // by their constant part: there are few
}

type repeated struct {
	logged time.Time
	unsaid int
}

func newRepeats(log logrus.FieldLogger) *repeats {
	return &repeats{log: log, every: repeatLog, lines: map[string]*repeated{}}
}

// say logs a line, or counts it. what is the same each time; why need not be.
func (r *repeats) say(level logrus.Level, what string, why error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	line := r.lines[what]
	if line == nil {
		line = &repeated{}
		r.lines[what] = line
	}
	now := time.Now()
	if !line.logged.IsZero() && now.Sub(line.logged) < r.every {
		line.unsaid++
		return
	}
	if line.unsaid > 0 {
		what += fmt.Sprintf(" (and %d more since %s)", line.unsaid, line.logged.Format(time.RFC3339))
	}
	r.log.WithFields(logrus.Fields{logrus.ErrorKey: why}).Log(level, what)
	line.logged, line.unsaid = now, 0
}
