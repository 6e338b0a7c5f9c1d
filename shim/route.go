package shim

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Mode says who answers CheckpointContainer.
type Mode string

const (
	Always Mode = "always" // crishim
	Auto   Mode = "auto"   // the runtime where it can, crishim otherwise
	Never  Mode = "never"  // the runtime, whether it can or not
)

func (m Mode) validate() error {
	switch m {
	case "", Always, Auto, Never:
		return nil
	}
	return fmt.Errorf("checkpoint.mode %q: it is %s, %s or %s", m, Always, Auto, Never)
}

// route decides for each CheckpointContainer whose it is. passes may be called at any time by anybody, the others by one goroutine.
type route struct {
	conn *grpc.ClientConn // to the runtime
	log  logrus.FieldLogger

	mode atomic.Value // of Mode
	able atomic.Bool  // that the runtime of this connection implements it is known

	stop     func() // of watch
	watching sync.WaitGroup
}

func newRoute(conn *grpc.ClientConn, mode Mode, log logrus.FieldLogger) *route {
	r := &route{conn: conn, log: log, stop: func() {}}
	r.mode.Store(Always)
	r.set(mode)
	return r
}

// passes tells whether a call that comes now is the runtime's.
func (r *route) passes(string) bool {
	switch r.mode.Load() {
	case Never:
		return true
	case Auto:
		return r.able.Load()
	}
	return false
}

// set changes the mode, for calls that come from now on.
func (r *route) set(mode Mode) {
	if mode == "" {
		mode = Always
	}
	if r.mode.Swap(mode) == mode {
		return
	}
	r.close()
	if mode == Auto {
		ctx, cancel := context.WithCancel(context.Background())
		r.stop = cancel
		r.watching.Go(func() { r.watch(ctx) })
	}
}

// close ends what set has started.
func (r *route) close() {
	r.stop()
	r.watching.Wait()
}

// watch asks each runtime that connects. Until it has answered, calls are crishim's, which can do what they ask for anyway.
func (r *route) watch(ctx context.Context) {
	const again = time.Second // where the runtime is there, and does not say
	for ctx.Err() == nil {
		state := r.conn.GetState()
		known := false
		switch state {
		case connectivity.Idle:
			r.conn.Connect()
		case connectivity.Ready:
			known = r.ask(ctx)
		}
		wait, cancel := ctx, context.CancelFunc(func() {})
		if state == connectivity.Ready && !known {
			wait, cancel = context.WithTimeout(ctx, again)
		}
		if r.conn.WaitForStateChange(wait, state) {
			r.able.Store(false) // it may be another one that comes next
		}
		cancel()
	}
	r.able.Store(false)
}

// ask finds out whether the runtime implements the call, by one that no runtime can carry out: it names no container. It returns whether that is
// known now.
func (r *route) ask(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	_, err := runtimeapi.NewRuntimeServiceClient(r.conn).CheckpointContainer(ctx, &runtimeapi.CheckpointContainerRequest{})
	switch code := status.Code(err); {
	case code == codes.Unavailable, code == codes.DeadlineExceeded, code == codes.Canceled:
		return false
	case code == codes.Unimplemented, code == codes.Unknown && strings.Contains(err.Error(), "not implemented"): // some have no codes, such as cri-dockerd
		r.log.Info("the runtime does not implement CheckpointContainer: crishim answers it")
		r.able.Store(false)
	default:
		r.log.Info("the runtime implements CheckpointContainer: calls are passed on to it")
		r.able.Store(true)
	}
	return true
}
