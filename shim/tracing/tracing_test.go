package tracing

import (
	"compress/gzip"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
	"go.opentelemetry.io/otel/trace"
	collector "go.opentelemetry.io/proto/otlp/collector/trace/v1"
	"go.uber.org/goleak"
	"google.golang.org/protobuf/proto"
)

// fakeCollector keeps the names of spans, as a service and a span.
type fakeCollector struct {
	mu    sync.Mutex
	paths []string
	spans []string
}

func (c *fakeCollector) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	body := io.Reader(r.Body)
	if r.Header.Get("Content-Encoding") == "gzip" {
		body, _ = gzip.NewReader(r.Body)
	}
	content, err := io.ReadAll(body)
	request := &collector.ExportTraceServiceRequest{}
	if err != nil || proto.Unmarshal(content, request) != nil {
		http.Error(w, "nonsense", http.StatusBadRequest)
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.paths = append(c.paths, r.URL.Path)
	for _, resource := range request.GetResourceSpans() {
		service := ""
		for _, attribute := range resource.GetResource().GetAttributes() {
			if attribute.GetKey() == "service.name" {
				service = attribute.GetValue().GetStringValue()
			}
		}
		for _, scope := range resource.GetScopeSpans() {
			for _, span := range scope.GetSpans() {
				c.spans = append(c.spans, service+" "+span.GetName())
			}
		}
	}
}

func TestSpansReachACollector(t *testing.T) {
	t.Cleanup(func() { goleak.VerifyNone(t) })
	collector := &fakeCollector{}
	server := httptest.NewServer(collector)
	defer server.Close()
	log, logged := test.NewNullLogger()
	tracer, stop, err := Start(server.URL, "1.2.3", log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, span := tracer.Start(t.Context(), "all")
	_, part := tracer.Start(ctx, "part")
	part.End()
	span.End()
	stop()
	if got, want := strings.Join(collector.spans, ", "), "crishim part, crishim all"; got != want || collector.paths[0] != "/v1/traces" {
		t.Errorf("the collector has %q, at %q; want %q", got, collector.paths, want)
	}
	if len(logged.AllEntries()) > 0 {
		t.Errorf("it logs %v", logged.AllEntries())
	}
}

// Of a trace that somebody else has begun and not sampled, nothing is sent.
func TestWhatIsNotSampledIsNotSent(t *testing.T) {
	collector := &fakeCollector{}
	server := httptest.NewServer(collector)
	defer server.Close()
	log, _ := test.NewNullLogger()
	tracer, stop, err := Start(server.URL, "", log)
	if err != nil {
		t.Fatal(err)
	}
	theirs := trace.NewSpanContext(trace.SpanContextConfig{TraceID: trace.TraceID{1}, SpanID: trace.SpanID{2}, Remote: true})
	_, span := tracer.Start(trace.ContextWithSpanContext(t.Context(), theirs), "theirs")
	span.End()
	stop()
	if len(collector.spans) > 0 {
		t.Errorf("the collector has %q", collector.spans)
	}
}

// A collector that is away, or never answers, is told of once, and holds up nobody.
func TestACollectorThatIsAway(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listener.Close()
	log, logged := test.NewNullLogger()
	tracer, stop, err := Start("http://"+listener.Addr().String(), "", log)
	if err != nil {
		t.Fatal(err)
	}
	begin := time.Now()
	for range 10 * maxQueue {
		_, span := tracer.Start(t.Context(), "lost")
		span.End()
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("%d spans took %s", 10*maxQueue, took)
	}
	stop()
	entries := logged.AllEntries()
	if len(entries) != 1 || entries[0].Level != logrus.WarnLevel || !strings.Contains(entries[0].Message, "spans cannot be sent to http://127.0.0.1:") {
		t.Errorf("it logs %v, want one warning", entries)
	}
}

func TestEndpoints(t *testing.T) {
	for endpoint, ok := range map[string]bool{
		"http://127.0.0.1:4318": true, "https://collector.example/prefix/v1/traces": true, "127.0.0.1:4318": false, "unix:///run/otel.sock": false,
		"grpc://127.0.0.1:4317": false, "http://": false, "http://user:secret@host": false, "http://host?x=y": false, "nonsense": false,
	} {
		if err := CheckEndpoint(endpoint); (err == nil) != ok {
			t.Errorf("%q gives %v", endpoint, err)
		}
	}
}

func TestWithoutEndpoint(t *testing.T) {
	tracer, stop, err := Start("", "", nil)
	if err != nil {
		t.Fatal(err)
	}
	if _, span := tracer.Start(t.Context(), "nothing"); span.IsRecording() || span.SpanContext().IsValid() {
		t.Error("without an endpoint there is a span")
	}
	stop()
}
