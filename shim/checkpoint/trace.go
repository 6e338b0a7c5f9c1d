package checkpoint

import (
	"context"
	"strings"

	"go.opentelemetry.io/otel/attribute"
	otelcodes "go.opentelemetry.io/otel/codes"
	"go.opentelemetry.io/otel/propagation"
	"go.opentelemetry.io/otel/trace"
	"google.golang.org/grpc/codes"
	grpcmetadata "google.golang.org/grpc/metadata"

	crishimv1 "crishim/proto/crishim/v1"
)

// continued returns a context in which spans go on with the trace of whoever has sent the request, if its metadata has one: a kubelet's traceparent
// (W3C Trace Context). What is none is passed over.
func continued(ctx context.Context) context.Context {
	md, _ := grpcmetadata.FromIncomingContext(ctx)
	carrier := propagation.MapCarrier{}
	for _, key := range []string{"traceparent", "tracestate"} {
		if values := md.Get(key); len(values) == 1 {
			carrier[key] = values[0]
		}
	}
	return propagation.TraceContext{}.Extract(ctx, carrier)
}

// begin makes the span of a checkpoint. Of what the checkpoint is, finish tells, when it is known.
func begin(ctx context.Context, tracer trace.Tracer) (context.Context, trace.Span) {
	return tracer.Start(continued(ctx), "CheckpointContainer", trace.WithSpanKind(trace.SpanKindServer))
}

// finish ends the span of a checkpoint that has ended.
func finish(span trace.Span, c *crishimv1.Checkpoint, cause string) {
	if !span.IsRecording() {
		return
	}
	span.SetAttributes(
		attribute.String("crishim.checkpoint.id", c.GetId()),
		attribute.String("crishim.checkpoint.location", c.GetLocation()),
		attribute.String("container.id", c.GetContainerId()),
		attribute.String("k8s.namespace.name", c.GetNamespace()),
		attribute.String("k8s.pod.name", c.GetPod()),
		attribute.String("k8s.container.name", c.GetContainer()),
		attribute.String("rpc.grpc.status_code", codes.Code(c.GetCode()).String()),
	)
	if cause != "" {
		span.SetAttributes(attribute.String("crishim.checkpoint.cause", cause))
		span.SetStatus(otelcodes.Error, c.GetMessage())
	} else {
		span.SetAttributes(
			attribute.Int64("crishim.checkpoint.archive_bytes", c.GetSize()),
			attribute.Int64("crishim.checkpoint.memory_bytes", c.GetMemory()),
			attribute.Float64("crishim.checkpoint.frozen_seconds", float64(c.GetFrozenUs())/1e6),
		)
	}
	span.End()
}

// traced does one step of a checkpoint in a span of its own.
func traced[T any](ctx context.Context, tracer trace.Tracer, name string, step func(context.Context) (T, error)) (T, error) {
	ctx, span := tracer.Start(ctx, name)
	defer span.End()
	result, err := step(ctx)
	if err != nil {
		span.SetStatus(otelcodes.Error, oneLine(err.Error(), maxMessage))
	}
	return result, err
}

// phases makes a span of each phase of a helper, by what the helper tells of its progress, in the context of the helper's own span. It is for one
// goroutine.
type phases struct {
	ctx    context.Context
	tracer trace.Tracer
	phase  crishimv1.Phase
	span   trace.Span // of the phase; nil before the first
}

// enter is told of each progress.
func (p *phases) enter(phase crishimv1.Phase) {
	if phase == p.phase {
		return
	}
	p.end()
	p.phase = phase
	_, p.span = p.tracer.Start(p.ctx, strings.ToLower(strings.TrimPrefix(phase.String(), "PHASE_")))
}

// end ends the span of the last phase.
func (p *phases) end() {
	if p.span != nil {
		p.span.End()
	}
}
