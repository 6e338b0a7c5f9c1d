package relay

import (
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
)

func TestALineThatRepeatsIsLoggedOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		log, hook := test.NewNullLogger()
		r := newRepeats(log)
		for range 1000 {
			r.say(logrus.WarnLevel, "a client broke HTTP/2", errors.New("why"))
			time.Sleep(100 * time.Millisecond)
		}
		r.say(logrus.ErrorLevel, "another line", errors.New("why"))
		entries := hook.AllEntries()
		if len(entries) != 3 {
			t.Fatalf("%d lines in 100 seconds, want 2, and the other one", len(entries))
		}
		for i, want := range []string{"a client broke HTTP/2", "a client broke HTTP/2 (and 599 more since ", "another line"} {
			if got := entries[i].Message; !strings.HasPrefix(got, want) {
				t.Errorf("line %d is %q, want %q", i, got, want)
			}
		}
	})
}
