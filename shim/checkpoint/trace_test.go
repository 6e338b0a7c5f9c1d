package checkpoint_test

import (
	"context"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.opentelemetry.io/otel/codes"
	sdktrace "go.opentelemetry.io/otel/sdk/trace"
	"go.opentelemetry.io/otel/sdk/trace/tracetest"
	"google.golang.org/grpc/metadata"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// A kubelet's trace goes on in spans of the steps, in the order in which they are taken.
func TestStepsAreTraced(t *testing.T) {
	containerd := node.Containerd(t)
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	service := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", State: t.TempDir(), Log: testLog(t), Tracer: provider.Tracer("test"),
	})
	defer service.Drain(context.Background())
	container := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 3, container.Log)

	const theirs, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
	ctx := metadata.NewIncomingContext(t.Context(), metadata.Pairs("traceparent", "00-"+theirs+"-"+parent+"-01"))
	request := &runtimeapi.CheckpointContainerRequest{ContainerId: container.ID, Location: location(t)}
	if _, err := service.CheckpointContainer(ctx, request); err != nil {
		t.Fatal(err)
	}
	if _, err := service.CheckpointContainer(ctx, request); err == nil {
		t.Fatal("a second archive at the location")
	}

	spans := map[string]sdktrace.ReadOnlySpan{}
	var all []sdktrace.ReadOnlySpan
	var order []string
	for _, span := range recorder.Ended() {
		if id := span.SpanContext().TraceID().String(); id != theirs {
			t.Errorf("span %s is of the trace %s, want the kubelet's", span.Name(), id)
		}
		if spans[span.Name()] == nil {
			spans[span.Name()] = span
		}
		all = append(all, span)
		order = append(order, span.Name())
	}
	want := "describe wait copy dump capture assemble publish helper CheckpointContainer CheckpointContainer"
	if got := strings.Join(order, " "); got != want {
		t.Fatalf("spans end in the order\n%s, want\n%s", got, want)
	}
	for child, of := range map[string]string{
		"describe": "CheckpointContainer", "wait": "CheckpointContainer", "helper": "CheckpointContainer",
		"copy": "helper", "dump": "helper", "capture": "helper", "assemble": "helper", "publish": "helper",
	} {
		if spans[child].Parent().SpanID() != spans[of].SpanContext().SpanID() {
			t.Errorf("span %s is not of %s", child, of)
		}
		if spans[child].StartTime().Before(spans[of].StartTime()) || spans[child].EndTime().After(spans[of].EndTime()) {
			t.Errorf("span %s is not within %s", child, of)
		}
	}
	if got := spans["CheckpointContainer"].Parent(); got.SpanID().String() != parent || !got.IsRemote() {
		t.Errorf("the first span's parent is %v, want the kubelet's", got)
	}
	failed := all[slices.Index(order, "CheckpointContainer")+1]
	if failed.Status().Code != codes.Error || !strings.Contains(failed.Status().Description, filepath.Base(request.GetLocation())) {
		t.Errorf("the status of the one that failed is %v", failed.Status())
	}
}

// What is no traceparent is no reason to fail, and begins a trace.
func TestATraceparentThatIsNone(t *testing.T) {
	recorder := tracetest.NewSpanRecorder()
	provider := sdktrace.NewTracerProvider(sdktrace.WithSpanProcessor(recorder))
	service := checkpoint.New(checkpoint.Config{Criu: "criu", State: t.TempDir(), Log: testLog(t), Tracer: provider.Tracer("test")})
	defer service.Drain(context.Background())
	for _, md := range []metadata.MD{
		nil, metadata.Pairs("traceparent", "nonsense"), metadata.Pairs("traceparent", strings.Repeat("f", 10000)),
		metadata.Pairs("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01", "traceparent", "00-5bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
	} {
		if _, err := service.CheckpointContainer(metadata.NewIncomingContext(t.Context(), md), &runtimeapi.CheckpointContainerRequest{}); err == nil {
			t.Error("a request for no container succeeds")
		}
	}
	for _, span := range recorder.Ended() {
		if span.Parent().IsValid() || !span.SpanContext().IsValid() {
			t.Errorf("span %s has the parent %v", span.Name(), span.Parent())
		}
	}
	if n := len(recorder.Ended()); n != 4 {
		t.Errorf("there are %d spans, want 4", n)
	}
}
