package crash

import (
	"context"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/test/node"
)

var (
	kills = flag.Int("kills", 100, "how often TestKillsAtAnyMoment kills")
	mib   = flag.Int("mib", 512, "how much memory its container has, in MiB")
	seed  = flag.Uint64("seed", 0, "from which its moments follow; 0 for one of the clock")
)

// Daemon, helper and criu are killed at random moments of a checkpoint, one by one and together. Each time the container goes on within
// 5 s, with the memory that it had, and nothing is left.
//
// There is one exception, which is in the nature of things: criu has the container's processes execute something, at the beginning of
// a dump and at its end. Where criu itself is killed just then, a process goes on in the middle of that, and the container may end of it. Then
// crishim must have said that criu may have changed the container, in its answer or, where the daemon was killed as well, in its log.
// That is counted, and the test goes on with a new container. A container that stands still, or has other memory, is never accepted.
func TestKillsAtAnyMoment(t *testing.T) {
	b := newBed(t)
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	t.Logf("-kills=%d -mib=%d -seed=%d", *kills, *mib, *seed)
	random := rand.New(rand.NewPCG(*seed, 0))
	c := b.run(*mib)
	begin := time.Now()
	if err := <-b.checkpoint(c); err != nil {
		t.Fatal(err)
	}
	length := time.Since(begin)
	b.settled(c, time.Now(), true)
	b.takeArchive()
	t.Logf("a checkpoint that nobody disturbs takes %s", length)

	var died, finished, late, missed int
	var slowest time.Duration
	byVictims := make(map[victims]int)
	alone := *kills * 3 / 5 // from here on the daemon lives, so that what it leaks adds up
	var before usage
	for n := 0; n < *kills; {
		v := anyOf[n%len(anyOf)]
		if n >= alone {
			v = []victims{{helper: true}, {criu: true}, {helper: true, criu: true}}[n%3]
		}
		// Not before it has all its connections.
		if n >= alone+3 && before == (usage{}) {
			before = b.usage()
		}
		moment := time.Duration(random.Int64N(int64(length)))
		logged := len(b.Logs())
		ended := b.checkpoint(c)
		time.Sleep(moment) // it is what is tested
		if len(ended) > 0 {
			length = max(moment, length/2) // they are faster by now
		}
		killed := b.kill(v)
		since := time.Now()
		if killed.daemon {
			b.start()
		}
		err := <-ended
		survived := b.settled(c, since, !killed.criu)
		slowest = max(slowest, time.Since(since))
		t.Logf("%d: of %s killed %q after %s, and settled within %s: %v", n, v, killed, moment, time.Since(since), err)
		archived := b.takeArchive()
		switch {
		case err == nil && !archived:
			t.Fatal("the answer is a success, and there is no archive")
		case err == nil:
			finished++
		case archived && !killed.daemon && !strings.Contains(err.Error(), "if there is an archive at the location, it is whole"):
			t.Fatal("the answer is a failure, and there is an archive")
		case archived:
			late++
		}
		// criu is killed first, see kill: before its own end the daemon may have answered for that one.
		answered := killed.criu && err != nil && strings.Contains(err.Error(), "criu was killed in mid-dump")
		if killed.daemon && err != nil && status.Code(err) != codes.Unavailable && !answered {
			t.Fatalf("the answer is %v, want Unavailable", err)
		}
		if killed != (victims{}) {
			byVictims[killed]++
			n++
		} else if missed++; missed > *kills+10 {
			t.Fatalf("%d times nobody was there to be killed", missed)
		}
		if survived {
			continue
		}
		died++
		said := fmt.Sprint(err) + b.Logs()[logged:]
		if !strings.Contains(said, "may have been changed by criu") {
			t.Fatalf("the container has not survived, and nobody says that criu may have changed it: %s", said)
		}
		if err := c.Remove(context.Background()); err != nil {
			t.Fatal(err)
		}
		c = b.run(*mib)
	}
	if before != (usage{}) {
		b.leaksNothing(before)
	}
	// The workload looks at 4 MiB each 100 ms: by now, or soon, it has seen all of them.
	node.WaitCount(t, node.LastCount(b.log(c))+*mib/4, c.Log)
	b.settled(c, time.Now(), true)
	for _, v := range anyOf {
		t.Logf("%s: killed %d times", v, byVictims[v])
	}
	t.Logf("%d times nobody was there any more, or yet, to be killed; %d checkpoints were finished, and %d archives there that nobody was told of",
		missed, finished, late)
	t.Logf("the container has not survived a kill of criu %d times; the slowest kill was settled within %s", died, slowest)
}

// usage is what the daemon has open.
type usage struct{ descriptors, threads int }

func (b *bed) usage() (u usage) {
	b.t.Helper()
	for what, n := range map[string]*int{"fd": &u.descriptors, "task": &u.threads} {
		entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/%s", b.Daemon("crishim").Pid(), what))
		if err != nil {
			b.t.Fatal(err)
		}
		*n = len(entries)
	}
	return u
}

// leaksNothing fails the test if the daemon has more open than before, or a goroutine is left that has to do with a checkpoint. It ends the
// daemon, by the signal at which a Go program tells its goroutines, and starts another.
func (b *bed) leaksNothing(before usage) {
	b.t.Helper()
	var now usage
	for deadline := time.Now().Add(within); ; time.Sleep(50 * time.Millisecond) {
		// Go starts a thread or two when it likes.
		if now = b.usage(); now.descriptors <= before.descriptors && now.threads <= before.threads+8 {
			break
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("the daemon has %+v, it had %+v", now, before)
		}
	}
	logged := len(b.Logs())
	crishim := b.Daemon("crishim")
	if err := crishim.Signal(unix.SIGQUIT); err != nil {
		b.t.Fatal(err)
	}
	<-crishim.Done()
	goroutines := b.Logs()[logged:]
	if !strings.Contains(goroutines, "crishim/shim.Run(") {
		b.t.Fatalf("the daemon has not told its goroutines:\n%s", goroutines)
	}
	if strings.Contains(goroutines, "crishim/shim/checkpoint.") {
		b.t.Fatalf("a goroutine of a checkpoint is left:\n%s", goroutines)
	}
	b.t.Logf("the daemon has %+v, it had %+v", now, before)
	b.start()
}
