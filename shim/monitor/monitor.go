// Package monitor is what a node's monitoring sees of crishim: metrics in Prometheus' form, whether it is ready, and what has happened lately.
//
// It is told of events, and asks for everything else when it is asked itself. It knows nothing of how calls are relayed or checkpoints made, and
// nothing that it does, or that stands in its way, is felt by either. What it tells has no names of pods, paths of archives or messages of
// failures: where it is served on the loopback interface, any process of the node can read it.
package monitor

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"google.golang.org/grpc/codes"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/relay"
)

// Build says what runs.
type Build struct {
	Version, Commit string // of crishim
}

// Sources are whom a Monitor asks. All of them may be called at any time, by several at once, and return soon.
type Sources struct {
	Relay     func() relay.Stats
	Refused   func() int64                // connections of others than root
	InFlight  func() (all, waiting int)   // checkpoints
	Unwritten func() int                  // history: how often it could not be written
	Causes    map[string]codes.Code       // all that a checkpoint can fail of, with the code of each
	Runtime   func(context.Context) error // asks the runtime for its version, without the relay
	Ready     func(context.Context) []error
}

// Monitor is safe for concurrent use. What it is told of costs no more than an addition, or a copy of a line.
type Monitor struct {
	sources  Sources
	registry *prometheus.Registry
	events   events

	checkpoints   *prometheus.CounterVec
	seconds       *prometheus.HistogramVec
	frozen        prometheus.Histogram
	archive       prometheus.Histogram
	memory        prometheus.Counter
	repairs       *prometheus.CounterVec
	reloads       *prometheus.CounterVec
	watchdog      *prometheus.CounterVec
	retained      *prometheus.GaugeVec
	retainedBytes *prometheus.GaugeVec
	removed       prometheus.Counter
	removedBytes  prometheus.Counter
	notRemoved    prometheus.Counter

	readiness sync.Mutex // held while sources.Ready is asked
	asked     time.Time
	reasons   []error
}

// New returns a Monitor, which serves nothing before it is asked for a Handler.
func New(build Build, sources Sources) *Monitor {
	m := &Monitor{sources: sources, registry: prometheus.NewRegistry()}
	m.checkpoints = m.counters("crishim_checkpoints_total",
		"Checkpoints that have ended, by who asked (cri, admin), gRPC code and cause; cause is empty for those that were written.", "interface", "code", "cause")
	m.seconds = histograms(m, "crishim_checkpoint_duration_seconds",
		"How long checkpoints took, from the request to the answer, with the time for which they waited.",
		[]float64{.1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600}, "outcome")
	m.frozen = histogram(m, "crishim_checkpoint_frozen_seconds", "How long containers stood still, for checkpoints that were written.",
		[]float64{.01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10, 30, 60, 120})
	m.archive = histogram(m, "crishim_checkpoint_archive_bytes", "Sizes of the archives that were written.",
		prometheus.ExponentialBuckets(1<<20, 4, 9)) // to 64 GiB
	m.memory = m.counter("crishim_checkpoint_memory_bytes_total", "Memory of containers in the archives that were written.")
	m.repairs = m.counters("crishim_repairs_total",
		"Checkpoints that were in flight when a crishim died, and have been put right (done), or of which something is left (left).", "result")
	m.reloads = m.counters("crishim_reloads_total", "How often the configuration was read again, and taken over (done) or refused.", "result")
	m.watchdog = m.counters("crishim_watchdog_rounds_total",
		"Calls through crishim for systemd's watchdog that have fed it (fed) or not (hungry). None where systemd has no watchdog for crishim.", "result")
	m.retained = gauges(m, "crishim_retained_archives", "Archives in a directory of retention.directories, as of the last look.", "directory")
	m.retainedBytes = gauges(m, "crishim_retained_bytes", "Size of the archives in a directory of retention.directories, as of the last look.", "directory")
	m.removed = m.counter("crishim_retention_removed_archives_total", "Archives that retention has removed.")
	m.removedBytes = m.counter("crishim_retention_removed_bytes_total", "Size of the archives that retention has removed.")
	m.notRemoved = m.counter("crishim_retention_failures_total", "Directories that retention could not look at, and archives that it could not remove.")
	m.registry.MustRegister(
		&collector{sources}, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "crishim_build_info", Help: "Always 1: version and commit of crishim, and the Go that it was built with.",
			ConstLabels: prometheus.Labels{"version": build.Version, "commit": build.Commit, "goversion": goVersion()},
		}, func() float64 { return 1 }),
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	// What has not happened yet is 0, and not absent: otherwise the first time would be no increase to Prometheus.
	for _, at := range []crishimv1.Interface{crishimv1.Interface_INTERFACE_CRI, crishimv1.Interface_INTERFACE_ADMIN} {
		m.checkpoints.WithLabelValues(interfaceName(at), codes.OK.String(), "")
		for cause, code := range sources.Causes {
			m.checkpoints.WithLabelValues(interfaceName(at), code.String(), cause)
		}
	}
	for counters, results := range map[*prometheus.CounterVec][]string{
		m.repairs: {"done", "left"}, m.reloads: {"done", "refused"}, m.watchdog: {"fed", "hungry"},
	} {
		for _, result := range results {
			counters.WithLabelValues(result)
		}
	}
	for _, outcome := range []string{"written", "failed"} {
		m.seconds.WithLabelValues(outcome)
	}
	return m
}

// Ended is told of a checkpoint that has ended, and why it failed.
func (m *Monitor) Ended(c *crishimv1.Checkpoint, cause string) {
	code := codes.Code(c.GetCode())
	m.checkpoints.WithLabelValues(interfaceName(c.GetCaller().GetInterface()), code.String(), cause).Inc()
	outcome := "written"
	if code != codes.OK {
		outcome = "failed"
		m.events.add("checkpoint failed", "checkpoint "+c.GetId()+": "+code.String()+", "+cause+": see crishim list, or crishim's log")
	}
	m.seconds.WithLabelValues(outcome).Observe(c.GetEnd().AsTime().Sub(c.GetBegin().AsTime()).Seconds())
	if code == codes.OK {
		m.frozen.Observe(float64(c.GetFrozenUs()) / 1e6)
		m.archive.Observe(float64(c.GetSize()))
		m.memory.Add(float64(c.GetMemory()))
	}
}

// Repaired is told of a checkpoint that was in flight when a crishim died, and whether something of it is left.
func (m *Monitor) Repaired(left error) {
	if left != nil {
		m.repairs.WithLabelValues("left").Inc()
		m.events.add("repair", "a checkpoint was in flight when crishim died, and something of it is left: see crishim's log")
		return
	}
	m.repairs.WithLabelValues("done").Inc()
	m.events.add("repair", "a checkpoint was in flight when crishim died: nothing partial of it is left")
}

// Away is told when the runtime could not be reached, and with nil when it could be again.
func (m *Monitor) Away(cause error) {
	if cause != nil {
		m.events.add("runtime away", cause.Error())
		return
	}
	m.events.add("runtime back", "calls reach the runtime again")
}

// Reloaded is told when the configuration was read again, and why it was refused.
func (m *Monitor) Reloaded(err error) {
	if err != nil {
		m.reloads.WithLabelValues("refused").Inc()
		m.events.add("reload", "the configuration is wrong, and stays as it was: see crishim's log, or crishim config check")
		return
	}
	m.reloads.WithLabelValues("done").Inc()
	m.events.add("reload", "the configuration was read again")
}

// Watched is told of each round of the watchdog.
func (m *Monitor) Watched(fed bool) {
	result := "fed"
	if !fed {
		result = "hungry"
	}
	m.watchdog.WithLabelValues(result).Inc()
}

// Retained is told what is in a directory after each look at it.
func (m *Monitor) Retained(directory string, archives int, bytes int64) {
	m.retained.WithLabelValues(directory).Set(float64(archives))
	m.retainedBytes.WithLabelValues(directory).Set(float64(bytes))
}

// Forget is told of a directory that is not there, or is none of retention's any more.
func (m *Monitor) Forget(directory string) {
	m.retained.DeleteLabelValues(directory)
	m.retainedBytes.DeleteLabelValues(directory)
}

// Removed is told of each archive that retention has removed.
func (m *Monitor) Removed(bytes int64) {
	m.removed.Inc()
	m.removedBytes.Add(float64(bytes))
}

// NotRemoved is told of each that it could not remove, and each directory that it could not look at.
func (m *Monitor) NotRemoved() { m.notRemoved.Inc() }

// ready asks why no checkpoint can be made, or no call relayed. Answers are good for a second, so that who asks often costs little.
func (m *Monitor) ready(ctx context.Context) []error {
	const good, patience = time.Second, 5 * time.Second
	m.readiness.Lock()
	defer m.readiness.Unlock()
	if !m.asked.IsZero() && time.Since(m.asked) < good {
		return m.reasons
	}
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	reasons := m.sources.Ready(ctx)
	if errors.Is(ctx.Err(), context.Canceled) {
		return reasons // who asked has gone, and that may be all the reason
	}
	m.asked, m.reasons = time.Now(), reasons
	return reasons
}
