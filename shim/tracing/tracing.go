// Package tracing sends spans to a collector, by OTLP over HTTP.
//
// Whoever makes spans never waits for it, and nothing but a line in the log comes of a collector that is away: spans are sent in batches by a
// goroutine of its own, and dropped where there are too many that have not been sent.
package tracing

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/attribute"
	"go.opentelemetry.io/otel/exporters/otlp/otlptrace/otlptracehttp"
	"go.opentelemetry.io/otel/sdk/resource"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/trace"
	"go.opentelemetry.io/otel/trace/noop"
)

// CheckEndpoint tells whether spans could be sent to an endpoint: a URL.
func CheckEndpoint(endpoint string) error {
	u, err := url.Parse(endpoint)
	if err != nil || u.Scheme != "http" && u.Scheme != "https" || u.Host == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("endpoint %q: it is the URL of a collector that takes OTLP over HTTP, such as http://127.0.0.1:4318", endpoint)
	}
	return nil
}

const (
	// path is where collectors take spans, by OTLP's specification.
	path = "/v1/traces"
	// A batch is given up after this long.
	exportTimeout = 10 * time.Second
	// Spans that wait to be sent, at most: those of a hundred checkpoints and more.
	maxQueue = 1024
)

// Start returns a tracer whose spans go to an endpoint, until stop is called, which gives what is left a moment to be sent. Without an endpoint the tracer
// makes no spans. Spans that begin a trace are sent; others, if whoever has begun theirs has it sampled.
func Start(endpoint, version string, log logrus.FieldLogger) (tracer trace.Tracer, stop func(), err error) {
	if endpoint == "" {
		return noop.NewTracerProvider().Tracer(""), func() {}, nil
	}
	if err := CheckEndpoint(endpoint); err != nil {
		return nil, nil, err
	}
	u, _ := url.Parse(endpoint) // it is one
	if u.Path == "" || u.Path == "/" {
		u.Path = path
	}
	exporter, err := otlptracehttp.New(context.Background(), otlptracehttp.WithEndpointURL(u.String()), otlptracehttp.WithTimeout(exportTimeout),
		// Not repeated: spans that come meanwhile would be dropped, and one batch is no worse to lose than another.
		otlptracehttp.WithRetry(otlptracehttp.RetryConfig{Enabled: false}))
	if err != nil {
		return nil, nil, fmt.Errorf("send spans to %s: %w", endpoint, err)
	}
	provider := sdktrace.NewTracerProvider(
		sdktrace.WithBatcher(&sayingExporter{SpanExporter: exporter, endpoint: endpoint, log: log},
			sdktrace.WithMaxQueueSize(maxQueue), sdktrace.WithExportTimeout(exportTimeout)),
		sdktrace.WithSampler(sdktrace.ParentBased(sdktrace.AlwaysSample())),
		sdktrace.WithResource(resource.NewSchemaless(
			attribute.String("service.name", "crishim"), attribute.String("service.version", version), attribute.String("host.name", hostname()))),
	)
	return provider.Tracer("crishim", trace.WithInstrumentationVersion(version)), func() {
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		_ = provider.Shutdown(ctx) // what could not be sent has been told of
	}, nil
}

// sayingExporter logs when spans cannot be sent any more, and when they can again. ExportSpans is called by one goroutine at a time.
type sayingExporter struct {
	sdktrace.SpanExporter
	endpoint string
	log      logrus.FieldLogger

	lost int // since spans could be sent
}

// ExportSpans is sdktrace.SpanExporter's. It returns no error: OpenTelemetry would write that to standard error, for each batch.
func (e *sayingExporter) ExportSpans(ctx context.Context, spans []sdktrace.ReadOnlySpan) error {
	err := e.SpanExporter.ExportSpans(ctx, spans)
	switch {
	case err != nil && e.lost == 0:
		e.log.Warnf("spans cannot be sent to %s, and are lost until they can: %v", e.endpoint, err)
		fallthrough
	case err != nil:
		e.lost += len(spans)
	case e.lost > 0:
		e.log.Infof("spans are sent to %s again; %d were lost", e.endpoint, e.lost)
		e.lost = 0
	}
	return nil
}

// hostname is empty where the kernel has none.
func hostname() string {
	name, _ := os.Hostname()
	return name
}
