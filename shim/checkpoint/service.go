// Package checkpoint answers CheckpointContainer.
//
// The daemon's part (service.go, job.go, process.go) checks the request, describes the container, starts a helper process and keeps a
// record of it (journal.go), by which the next daemon puts right what both leave behind when they die (repair.go).
// The helper (helper.go, steps.go) does the rest: stage, dump, capture, assemble, publish, and the undoing of each. They speak
// the protocol of proto/crishim/v1. When the daemon stops the checkpoint, or dies, the helper sees the end of their stream,
// rolls back and exits: the container runs again, and nothing is left behind.
package checkpoint

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
	"crishim/shim/history"
)

// Config is what a Service needs.
type Config struct {
	Runtime runtimeapi.RuntimeServiceClient
	Images  runtimeapi.ImageServiceClient
	Version string // of crishim
	State   string // directory for the records of checkpoints in flight, and the history of those that have ended, made if need be
	Log     logrus.FieldLogger
	Tracer  trace.Tracer // of the steps of checkpoints; may be nil

	// Ended, which may be nil, is told of each checkpoint that has ended and why it failed, which is one of Causes or empty; Repaired, of each that
	// was in flight when a crishim died, and what is left of it. They must not block.
	Ended    func(c *crishimv1.Checkpoint, cause string)
	Repaired func(left error)

	// What Reconfigure can change.
	Criu        string   // name of the binary, looked for in PATH, or its path
	Directories []string // in which archives may appear, and in none below them; empty for all that are fit for it
	RefuseTCP   bool     // whether a container with an established TCP connection is refused
	Archive     archive.Options
	Bounds      Bounds
}

// Service is the server of the one RPC of the CRI that crishim answers itself, and makes the checkpoints that are asked for otherwise. It is safe for concurrent use.
type Service struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	current atomic.Pointer[Config]
	tracer  trace.Tracer
	slots   slots
	journal *journal
	history *history.History
	opening sync.Mutex // held while the journal is opened and containers of its records are claimed

	closing context.Context // its end rolls back what is in flight
	close   context.CancelCauseFunc

	mu       sync.Mutex
	draining bool
	inFlight map[string]error // by full container id: why there can be no checkpoint now
	running  sync.WaitGroup
	features *criu.Features // of the last probe that succeeded
}

// New returns a service that is ready for requests.
func New(config Config) *Service {
	closing, cancel := context.WithCancelCause(context.Background())
	s := &Service{
		journal:  &journal{dir: config.State, log: config.Log},
		history:  history.New(config.Log),
		inFlight: make(map[string]error),
		closing:  closing, close: cancel,
	}
	if config.Tracer == nil {
		config.Tracer = noop.NewTracerProvider().Tracer("")
	}
	s.tracer = config.Tracer
	s.Reconfigure(config)
	return s
}

// Reconfigure puts another configuration in the place of the one that there is. What only New takes must be the same in it. Requests that
// have come before keep to the one that they began with, but for the number of checkpoints at once.
func (s *Service) Reconfigure(config Config) {
	config.Bounds.Parallel = cmp.Or(config.Bounds.Parallel, 2)
	s.current.Store(&config)
	s.slots.resize(config.Bounds.Parallel)
}

func (s *Service) config() *Config { return s.current.Load() }

// Waiting is how many checkpoints wait for others to end, since so many run at once already.
func (s *Service) Waiting() int { return s.slots.waitingNow() }

// Ready returns why no checkpoint can be made now, whatever the container; nil where one can.
func (s *Service) Ready(ctx context.Context) []error {
	var reasons []error
	if err := s.Repair(); err != nil {
		reasons = append(reasons, err)
	}
	if _, err := s.Probe(ctx); err != nil {
		reasons = append(reasons, err)
	}
	return reasons
}

var errDraining = errors.New("crishim is shutting down")

// History is that of this service's checkpoints.
func (s *Service) History() *history.History { return s.history }

// Drain refuses further checkpoints and waits for those in flight, and for repairs. When ctx ends first they are rolled back, and repairs
// left to the next start; Drain returns when the last of their helpers has exited, in any case. The state directory is another's then.
func (s *Service) Drain(ctx context.Context) {
	s.mu.Lock()
	s.draining = true
	s.mu.Unlock()
	stop := context.AfterFunc(ctx, func() { s.close(errDraining) })
	defer stop()
	s.running.Wait()
	s.journal.close()
}

// Probe looks for CRIU. What it found is kept for as long as the same binary is there.
func (s *Service) Probe(ctx context.Context) (criu.Features, error) {
	return s.probe(ctx, s.config().Criu)
}

func (s *Service) probe(ctx context.Context, name string) (criu.Features, error) {
	s.mu.Lock()
	known := s.features
	s.mu.Unlock()
	if known != nil && known.Current(name) {
		return *known, nil
	}
	found, err := criu.Probe(ctx, name)
	if err != nil {
		return criu.Features{}, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.features = &found
	return found, nil
}

// CheckpointContainer dumps a running container into an archive at the request's location. It answers when the archive is
// durable, or when the container runs again and nothing of the attempt is left.
func (s *Service) CheckpointContainer(ctx context.Context, request *runtimeapi.CheckpointContainerRequest) (*runtimeapi.CheckpointContainerResponse, error) {
	if _, err := s.Checkpoint(ctx, request, callerFrom(ctx), func(*crishimv1.CheckpointResponse) {}); err != nil {
		return nil, err
	}
	return &runtimeapi.CheckpointContainerResponse{}, nil
}

// Checkpoint does what CheckpointContainer does, for whoever asks, and tells of its begin and progress meanwhile. For a caller of the admin API an
// empty location stands for one in the kubelet's directory. The history has it from here on, whatever becomes of it.
func (s *Service) Checkpoint(ctx context.Context, request *runtimeapi.CheckpointContainerRequest, caller *crishimv1.Caller,
	tell func(*crishimv1.CheckpointResponse)) (*crishimv1.Checkpoint, error) {
	ctx, span := begin(ctx, s.tracer)
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	flight := s.history.Begin(&crishimv1.Checkpoint{
		Caller: caller, ContainerId: bounded(request.GetContainerId()), Location: bounded(request.GetLocation()),
	}, cancel)
	tell(&crishimv1.CheckpointResponse{Event: &crishimv1.CheckpointResponse_Begun{Begun: flight.Checkpoint()}})
	result, err := s.checkpoint(ctx, request, flight, tell)
	cause := ""
	if err != nil {
		_, cause = judge(err)
		err = toStatus(err)
	}
	ended := flight.End(func(c *crishimv1.Checkpoint) { conclude(c, result, err) })
	finish(span, ended, cause)
	s.audit(ended, result, cause, span.SpanContext())
	if tell := s.config().Ended; tell != nil {
		tell(ended, cause)
	}
	return ended, err
}

func (s *Service) checkpoint(ctx context.Context, request *runtimeapi.CheckpointContainerRequest, flight *history.Flight,
	tell func(*crishimv1.CheckpointResponse)) (*crishimv1.Result, error) {
	if err := s.enter(); err != nil {
		return nil, err
	}
	defer s.running.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(s.closing, func() { cancel(errDraining) })()
	if seconds := request.GetTimeout(); seconds > 0 {
		var cancelTimeout context.CancelFunc
		// A century is for ever, and more of it would overflow.
		ctx, cancelTimeout = context.WithTimeout(ctx, time.Duration(min(seconds, 1<<32))*time.Second)
		defer cancelTimeout()
	}

	config := s.config()
	location, err := s.locate(ctx, request, flight)
	if err != nil {
		return nil, err
	}
	if err := validate(request, location, config.Directories); err != nil {
		return nil, err
	}
	features, err := s.probe(ctx, config.Criu)
	if err != nil {
		return nil, err
	}
	if err := s.Repair(); err != nil {
		return nil, err
	}
	c, err := traced(ctx, s.tracer, "describe", func(ctx context.Context) (*container.Container, error) {
		return container.Describe(ctx, config.Runtime, request.GetContainerId())
	})
	if err != nil {
		return nil, err
	}
	name := s.nameOf(ctx, c.Status.GetId(), c.Status.GetLabels(), c.Status.GetMetadata())
	flight.Update(func(entry *crishimv1.Checkpoint) {
		entry.ContainerId = c.Status.GetId()
		entry.Namespace, entry.Pod, entry.Container = name.namespace, name.pod, name.container
	})
	leave, err := s.claim(c.Status.GetId(), errInFlight)
	if err != nil {
		return nil, err
	}
	defer leave()
	if _, err := traced(ctx, s.tracer, "wait", func(ctx context.Context) (struct{}, error) { return struct{}{}, s.slots.take(ctx) }); err != nil {
		return nil, err
	}
	defer s.slots.give()
	// Not before: a checkpoint in flight freezes the container, too.
	if err := c.VerifyRunning(); err != nil {
		return nil, err
	}
	job, err := newJob(location, features, c, s.imageID(ctx, c), s.origin(ctx, features, c))
	if err != nil {
		return nil, err
	}
	job.Compression, job.Digest = config.Archive.Compression, config.Archive.Digest
	job.MaxFrozenUs, job.RefuseTcp = config.Bounds.MaxFrozen.Microseconds(), config.RefuseTCP
	if job.Reserve, err = s.reserve(ctx, location, config.Bounds); err != nil {
		return nil, err
	}
	if layer := job.GetContainer().GetLayer(); layer != nil {
		layer.Size = s.layerSize(ctx, c.Status.GetId())
	}
	log := s.config().Log.WithFields(logrus.Fields{"id": flight.Checkpoint().GetId(), "container": c.Status.GetId()})
	return traced(ctx, s.tracer, "helper", func(ctx context.Context) (*crishimv1.Result, error) {
		phases := &phases{ctx: ctx, tracer: s.tracer}
		defer phases.end()
		return runHelper(ctx, s.journal, job, flight.Checkpoint(), func(e *crishimv1.Event) {
			if p := e.GetProgress(); p != nil {
				phases.enter(p.GetPhase())
				flight.Progress(p)
				tell(&crishimv1.CheckpointResponse{Event: &crishimv1.CheckpointResponse_Progress{Progress: p}})
				log.WithFields(logrus.Fields{"phase": p.GetPhase().String(), "bytes": p.GetBytes()}).Debug("checkpoint goes on")
			}
			for line := range bytes.Lines(e.GetLog().GetLines()) {
				log.Debugf("criu's log: %s", bytes.TrimSuffix(line, []byte("\n")))
			}
		})
	})
}

// enter counts a request in, so that Drain waits for it.
func (s *Service) enter() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.draining {
		return errDraining
	}
	s.running.Add(1)
	return nil
}

// claim makes sure that a container is dumped, or what is left of its dump put right, once at a time. Others get this reason.
func (s *Service) claim(id string, reason error) (leave func(), err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.inFlight[id]; err != nil {
		return nil, fmt.Errorf("%w: container %s", err, id)
	}
	s.inFlight[id] = reason
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.inFlight, id)
	}, nil
}

// validate refuses what cannot succeed before anything is asked of the runtime, and a path outside of directories, if there are any. The helper
// checks the path again.
func validate(request *runtimeapi.CheckpointContainerRequest, path string, directories []string) error {
	if request.GetContainerId() == "" {
		return fmt.Errorf("%w: container_id is empty", errInvalid)
	}
	if request.GetTimeout() < 0 {
		return fmt.Errorf("%w: timeout is %d s; it must be 0, for none, or more", errInvalid, request.GetTimeout())
	}
	return validateLocation(path, directories)
}

func validateLocation(path string, directories []string) error {
	location, err := archive.OpenLocation(path)
	if err != nil {
		return err
	}
	defer location.Close()
	if len(directories) > 0 && !slices.ContainsFunc(directories, location.In) {
		return fmt.Errorf("%w: location %q: it is not directly in one of the directories that checkpoint.directories of crishim's configuration has: %s",
			errInvalid, path, strings.Join(directories, ", "))
	}
	return nil
}
