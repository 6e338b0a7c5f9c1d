package checkpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protodelim"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/failpoint"
)

// HelperMain is the whole life of a helper process: one job from descriptor 3, its events back, and the exit code. The process
// belongs to the job: nothing else runs in it, since criu inherits its signals and is found as its only child.
func HelperMain() int {
	// The daemon may be dead, and its end of the socket and of stderr with it. That is no reason to die in mid-dump.
	signal.Ignore(unix.SIGPIPE)
	signals, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT, unix.SIGHUP)
	defer stop()
	unix.CloseOnExec(3)
	conn, err := unixConn(3)
	if err != nil {
		fmt.Fprintf(os.Stderr, "crishim %s: %v: this is a part of crishim that only crishim itself can start\n", HelperCommand, err)
		return 2
	}
	defer conn.Close()
	reader := bufio.NewReader(conn)
	job := &crishimv1.Job{}
	err = protodelim.UnmarshalOptions{MaxSize: 64 << 20}.UnmarshalFrom(reader, job)
	if errors.Is(err, io.EOF) {
		return 1 // the daemon has thought better of it, and tells why; or it is dead
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "crishim %s: read job: %v\n", HelperCommand, err)
		return 2
	}

	failpoint.Hit("job received")
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	defer context.AfterFunc(signals, func() { cancel(errStopped) })()
	watch := make(chan struct{})
	go func() {
		defer close(watch)
		_, _ = io.Copy(io.Discard, reader) // nothing more is sent: it returns at the end of the stream
		cancel(errStopped)
	}()

	var sending sync.Mutex
	alone := false
	send := func(event *crishimv1.Event) {
		sending.Lock()
		defer sending.Unlock()
		// An error means that the daemon is dead; the watch hears of it too.
		_, err := protodelim.MarshalTo(conn, event)
		alone = alone || err != nil
	}
	result, err := run(ctx, job, atMostEvery(100*time.Millisecond, func(p *crishimv1.Progress) {
		send(&crishimv1.Event{Event: &crishimv1.Event_Progress{Progress: p}})
	}), func(lines []byte) {
		send(&crishimv1.Event{Event: &crishimv1.Event_Log{Log: &crishimv1.Log{Lines: lines}}})
	})
	if err != nil {
		result = &crishimv1.Result{Failure: failure(err), Left: errors.Is(err, errLeft) || errors.Is(err, criu.ErrLeft)}
	}
	send(&crishimv1.Event{Event: &crishimv1.Event_Result{Result: result}})
	if alone && err != nil {
		// The operator should know all the same, as of a container that criu may have changed.
		fmt.Fprintf(os.Stderr, "crishim %s: crishim has died; the checkpoint of container %s at %s was given up: %s\n",
			HelperCommand, job.GetContainer().GetId(), job.GetLocation(), result.GetFailure().GetMessage())
	}
	conn.Close()
	<-watch
	if err != nil {
		return 1
	}
	return 0
}

// atMostEvery passes each change of phase on, and within a phase one event an interval. What it returns is safe for concurrent use.
func atMostEvery(interval time.Duration, report func(*crishimv1.Progress)) func(*crishimv1.Progress) {
	var mu sync.Mutex
	var last time.Time
	var phase crishimv1.Phase
	return func(p *crishimv1.Progress) {
		mu.Lock()
		defer mu.Unlock()
		if p.GetPhase() == phase && time.Since(last) < interval {
			return
		}
		last, phase = time.Now(), p.GetPhase()
		report(p)
	}
}
