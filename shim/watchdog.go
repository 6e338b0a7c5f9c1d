package shim

import (
	"context"
	"errors"
	"net"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// watchdog feeds systemd's, which aborts crishim and starts it again when it has not been fed for WatchdogSec=. Food is a Version call that
// has gone the kubelet's way: into the listening socket, through a connection of the relay's own, to the runtime and back.
//
// A call that fails is crishim's fault only if the runtime answers one that is made directly. One that is away, or hangs, or answers with
// the same error, is nothing that a new crishim would mend; the old one at least keeps its checkpoints and connections. Whether the relay is sound,
// nobody can tell then. It is told when the runtime is back.
type watchdog struct {
	listening, runtime string         // paths of the sockets
	timeout            time.Duration  // of each call
	watched            func(fed bool) // is told of each round
	log                logrus.FieldLogger
	said               string // what was logged last, so that nothing is logged over and over
}

// startWatchdog feeds systemd's watchdog, if there is one for this process, until stop is called, which waits until nothing feeds it any more.
func startWatchdog(listening, runtime string, watched func(fed bool), log logrus.FieldLogger) (stop func()) {
	limit, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warnf("systemd's watchdog is not fed: %v", err)
	}
	if limit == 0 {
		return func() {}
	}
	// One round that fails, as on a node that is overloaded for a moment, leaves time for two others.
	interval := limit / 3
	w := &watchdog{listening: listening, runtime: runtime, timeout: interval / 2, watched: watched, log: log}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		w.run(ctx, interval)
	}()
	return func() {
		cancel()
		<-ended
	}
}

// run looks at crishim each interval, beginning now, until ctx ends.
func (w *watchdog) run(ctx context.Context, interval time.Duration) {
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	for {
		fed := w.sound(ctx)
		if fed {
			notifySystemd(w.log, daemon.SdNotifyWatchdog)
		}
		if ctx.Err() == nil {
			w.watched(fed)
		}
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// sound makes one call, or two where that fails, and says whether to feed. It logs why not, and what else an operator can act on.
func (w *watchdog) sound(ctx context.Context) bool {
	relayed := w.call(ctx, w.listening)
	if relayed == nil {
		w.say(logrus.InfoLevel, "", nil)
		return true
	}
	if nobodyListens(relayed) {
		// The socket is open here still, without a name. Where it is systemd's, a new crishim would get the same.
		w.say(logrus.ErrorLevel, "nobody can connect to crishim any more, who is connected stays so: restart crishim.socket", relayed)
		return true
	}
	direct := w.call(ctx, w.runtime)
	if ctx.Err() != nil {
		return false
	}
	s, answered := status.FromError(direct)
	switch {
	case direct == nil:
		w.say(logrus.ErrorLevel, "the runtime answers, but not through crishim: systemd will start crishim again", relayed)
		return false
	case nobodyListens(direct):
		return true // of which the relay tells
	case timedOut(direct):
		w.say(logrus.WarnLevel, "the runtime does not answer: see what is the matter with it", direct)
		return true
	case answered && s.Code() == status.Code(relayed):
		w.say(logrus.WarnLevel, "the runtime answers Version with an error: see what is the matter with it", direct)
		return true
	}
	w.say(logrus.ErrorLevel, "neither crishim nor the runtime can be called: systemd will start crishim again", errors.Join(relayed, direct))
	return false
}

// say logs what has not been logged just before; the empty string, that all is well again.
func (w *watchdog) say(level logrus.Level, what string, err error) {
	if what == w.said {
		return
	}
	w.said = what
	if what == "" {
		what = "calls through crishim are answered again"
	}
	fields := logrus.Fields{}
	if err != nil {
		fields[logrus.ErrorKey] = err
	}
	w.log.WithFields(fields).Log(level, what)
}

func (w *watchdog) call(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, w.timeout)
	defer cancel()
	return callVersion(ctx, path)
}

// callVersion asks for the version on a new connection to a socket. The error is the kernel's where there is no connection, and otherwise gRPC's.
func callVersion(ctx context.Context, path string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	unused := make(chan net.Conn, 1)
	unused <- conn
	client, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(context.Context, string) (net.Conn, error) {
			select {
			case conn := <-unused:
				return conn, nil
			default:
				return nil, errors.New("the connection was closed")
			}
		}))
	if err != nil {
		return err
	}
	defer client.Close()
	_, err = runtimeapi.NewRuntimeServiceClient(client).Version(ctx, &runtimeapi.VersionRequest{})
	return err
}

// nobodyListens says whether an error is that no socket, or one that nobody has open, is at a path.
func nobodyListens(err error) bool {
	return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ECONNREFUSED)
}

// timedOut says whether an error is that somebody listens, and does not answer: EAGAIN is of a queue that is full of connections.
func timedOut(err error) bool {
	return status.Code(err) == codes.DeadlineExceeded || errors.Is(err, context.DeadlineExceeded) || errors.Is(err, unix.EAGAIN)
}
