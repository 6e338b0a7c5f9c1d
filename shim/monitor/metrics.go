package monitor

import (
	"context"
	"runtime"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	crishimv1 "crishim/proto/crishim/v1"
)

// The following make one metric each, and register it.

func (m *Monitor) counter(name, help string) prometheus.Counter {
	c := prometheus.NewCounter(prometheus.CounterOpts{Name: name, Help: help})
	m.registry.MustRegister(c)
	return c
}

func (m *Monitor) counters(name, help string, labels ...string) *prometheus.CounterVec {
	c := prometheus.NewCounterVec(prometheus.CounterOpts{Name: name, Help: help}, labels)
	m.registry.MustRegister(c)
	return c
}

func gauges(m *Monitor, name, help string, labels ...string) *prometheus.GaugeVec {
	g := prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: name, Help: help}, labels)
	m.registry.MustRegister(g)
	return g
}

func histogram(m *Monitor, name, help string, buckets []float64) prometheus.Histogram {
	h := prometheus.NewHistogram(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets})
	m.registry.MustRegister(h)
	return h
}

func histograms(m *Monitor, name, help string, buckets []float64, labels ...string) *prometheus.HistogramVec {
	h := prometheus.NewHistogramVec(prometheus.HistogramOpts{Name: name, Help: help, Buckets: buckets}, labels)
	m.registry.MustRegister(h)
	return h
}

// collector has the metrics that are not counted here, but asked for at each scrape.
type collector struct{ sources Sources }

// description returns one of a metric of its own.
func description(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(name, help, labels, nil)
}

// Describe says nothing, which to a registry means that Collect does: its metrics are the same each time.
func (a *collector) Describe(chan<- *prometheus.Desc) {}

// Collect is prometheus.Collector's.
func (a *collector) Collect(to chan<- prometheus.Metric) {
	number := func(kind prometheus.ValueType, value float64, d *prometheus.Desc, labels ...string) {
		to <- prometheus.MustNewConstMetric(d, kind, value, labels...)
	}
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue

	relay := a.sources.Relay()
	number(counter, float64(relay.Accepted), description("crishim_relay_connections_total", "Connections that were accepted."))
	number(gauge, float64(relay.Connections), description("crishim_relay_open_connections", "Connections that are open, each with one to the runtime if that is there."))
	number(gauge, float64(relay.Streams), description("crishim_relay_open_streams", "Calls that have not ended."))
	number(counter, float64(a.sources.Refused()), description("crishim_relay_refused_connections_total", "Connections that were refused, since their peers were not root."))
	streams := description("crishim_relay_streams_total", "Calls that clients have made, whoever answers, by method of the CRI; other for all else.", "method")
	bytes := description("crishim_relay_bytes_total",
		"Bytes of messages, with what gRPC puts before each, by method, and direction: request or response.", "method", "direction")
	served := int64(0)
	for _, method := range relay.Methods {
		name := methodName(method.Path)
		number(counter, float64(method.Streams), streams, name)
		number(counter, float64(method.Requests), bytes, name, "request")
		number(counter, float64(method.Responses), bytes, name, "response")
		served += method.Served
	}
	number(counter, float64(served), description("crishim_relay_served_streams_total", "Calls that crishim has answered itself."))

	all, waiting := a.sources.InFlight()
	number(gauge, float64(all), description("crishim_checkpoints_in_flight", "Checkpoints that were asked for and have not ended, with those that wait."))
	number(gauge, float64(waiting), description("crishim_checkpoints_waiting", "Checkpoints that wait for others to end, by checkpoint.parallel."))
	number(counter, float64(a.sources.Unwritten()), description("crishim_history_write_failures_total", "How often the history of checkpoints could not be written."))

	const patience = time.Second // a scrape has ten by default
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	up := 1.0
	if a.sources.Runtime(ctx) != nil {
		up = 0
	}
	number(gauge, up, description("crishim_runtime_up", "Whether the runtime has answered Version, asked for at this scrape and not through the relay, within a second."))
}

// methodName is what a path is called in a label: RuntimeService/RunPodSandbox, without the package, which has the CRI's version.
func methodName(path string) string {
	if path == "" {
		return "other"
	}
	return path[strings.LastIndexByte(path, '.')+1:]
}

func interfaceName(at crishimv1.Interface) string {
	return strings.ToLower(strings.TrimPrefix(at.String(), "INTERFACE_"))
}

func goVersion() string { return runtime.Version() }
