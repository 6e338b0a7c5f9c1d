package relay

import (
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"maps"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// The oracle of a call through the relay is the same call made directly: a
// scenario runs once each way, against backends alike, and all that clients
// and handlers saw must be the same.

// A journal is what was seen, by each actor in order: a client's call, the
// handler of it.
type journal struct {
	mu   sync.Mutex
	seen map[string][]string
}

func (j *journal) note(actor, format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.seen[actor] = append(j.seen[actor], fmt.Sprintf(format, args...))
}

// saw reports whether an actor has noted a text.
func (j *journal) saw(actor, text string) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	return slices.ContainsFunc(j.seen[actor], func(s string) bool { return strings.Contains(s, text) })
}

// digest stands for a message in a journal.
func digest(m []byte) string {
	sum := sha256.Sum256(m)
	return fmt.Sprintf("%d bytes %x", len(m), sum[:8])
}

// plain is metadata without its way to print, which leaves the values out.
func plain(md metadata.MD) map[string][]string { return md }

// A way is one of the two to a backend.
type way struct {
	*journal
	t      *testing.T
	ctx    context.Context // of the test; without a deadline, which the handlers would see
	socket string
	conn   *grpc.ClientConn // to the socket
	relay  *testRelay       // nil if the socket is the backend's own
	served *counter         // handler of servedMethod in this process, nil likewise
}

// againstDirect runs a scenario both ways and compares. Every call with an
// actor is noted on both ends; servedMethod is served by the backend directly,
// and by the relay the other way. It returns the journal of the direct way.
func againstDirect(t *testing.T, handle func(grpc.ServerStream) error, scenario func(*way), opts ...grpc.DialOption) *journal {
	t.Helper()
	run := func(name string, relayed bool) *journal {
		j := &journal{seen: map[string][]string{}}
		// When the subtest is over its handlers have returned, and have noted how.
		if !t.Run(name, func(t *testing.T) {
			backend := newFakeRuntime(t, j.noting(handle))
			ctx, cancel := context.WithCancel(t.Context())
			defer time.AfterFunc(patience, cancel).Stop()
			w := &way{journal: j, t: t, ctx: ctx, socket: backend.socket}
			if relayed {
				served := newServer(j.noting(handle))
				t.Cleanup(served.Stop)
				w.served = &counter{Handler: served}
				w.relay = newTestRelay(t, Config{Dial: backend.dial, Handlers: map[string]http.Handler{servedMethod: w.served}})
				w.socket = w.relay.socket
			}
			w.conn = connect(t, w.socket, opts...)
			scenario(w)
		}) {
			t.FailNow()
		}
		return j
	}
	direct, relayed := run("direct", false), run("relayed", true)
	if len(direct.seen) == 0 {
		t.Error("nobody noted anything")
	}
	actors := maps.Clone(direct.seen)
	maps.Copy(actors, relayed.seen)
	differ := 0
	for _, actor := range slices.Sorted(maps.Keys(actors)) {
		want, got := direct.seen[actor], relayed.seen[actor]
		for i := 0; ; i++ {
			if i == len(want) && i == len(got) {
				break
			}
			if i == len(want) || i == len(got) || want[i] != got[i] {
				if differ++; differ <= 5 {
					t.Errorf("%s, from its note %d on:\nrelayed %.2000s\n direct %.2000s", actor, i, rest(got, i), rest(want, i))
				}
				break
			}
		}
	}
	if differ > 5 {
		t.Errorf("%d actors saw something else than directly", differ)
	}
	return direct
}

func rest(notes []string, from int) string {
	return strings.Join(notes[from:min(len(notes), from+3)], "\n\t")
}

// noting is a handler that also notes what the handler sees and does.
func (j *journal) noting(handle func(grpc.ServerStream) error) func(grpc.ServerStream) error {
	return func(s grpc.ServerStream) error {
		in, _ := metadata.FromIncomingContext(s.Context())
		// grpc-go's handler transport repeats the content type, whoever calls it.
		in.Set("content-type", in.Get("content-type")[0])
		n := &noted{ServerStream: s, j: j, ctx: metadata.NewIncomingContext(s.Context(), in)}
		if len(in.Get("actor")) == 0 {
			return handle(n)
		}
		n.actor = "handler of " + in.Get("actor")[0]
		method, _ := grpc.MethodFromServerStream(n)
		left := "none"
		if deadline, ok := s.Context().Deadline(); ok {
			left = time.Until(deadline).Round(time.Hour).String()
		}
		j.note(n.actor, "%s, deadline %s, %q", method, left, plain(in))
		err := handle(n)
		j.note(n.actor, "sent %d messages, returned %v, context %v", n.sent, err, n.ctx.Err())
		return err
	}
}

// noted is a stream whose handler is noted, if there is an actor.
type noted struct {
	grpc.ServerStream
	j     *journal
	actor string
	ctx   context.Context
	sent  int
}

func (n *noted) Context() context.Context { return n.ctx }

func (n *noted) SendMsg(m any) error {
	err := n.ServerStream.SendMsg(m)
	if err == nil {
		n.sent++
	}
	return err
}

func (n *noted) RecvMsg(m any) error {
	err := n.ServerStream.RecvMsg(m)
	if n.actor != "" && err != nil {
		n.j.note(n.actor, "received %v", err)
	} else if n.actor != "" {
		n.j.note(n.actor, "received %s", digest(*m.(*[]byte)))
	}
	return err
}

// with is a context whose calls are an actor's, with further metadata.
func with(ctx context.Context, actor string, md ...string) context.Context {
	return metadata.AppendToOutgoingContext(ctx, append([]string{"actor", actor}, md...)...)
}

// exchange sends every message, reads to the end, and notes it all.
func (w *way) exchange(ctx context.Context, c *grpc.ClientConn, actor, method string, messages ...[]byte) {
	s, err := c.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		w.note(actor, "no stream: %v", err)
		return
	}
	sent := make(chan struct{})
	go func() {
		defer close(sent)
		for _, m := range messages {
			if s.SendMsg(&m) != nil {
				return // the reader gets the reason
			}
		}
		s.CloseSend()
	}()
	w.read(actor, s)
	<-sent
}

// read reads an answer to its end and notes all that a client can see of it.
func (w *way) read(actor string, s grpc.ClientStream) {
	var err error
	for n := 0; ; n++ {
		var m []byte
		if err = s.RecvMsg(&m); err != nil {
			w.note(actor, "%d messages in all", n)
			break
		}
		w.note(actor, "got %s", digest(m))
	}
	if err == io.EOF {
		err = nil
	}
	header, _ := s.Header()
	st := status.Convert(err)
	details, _ := proto.MarshalOptions{Deterministic: true}.Marshal(st.Proto())
	w.note(actor, "header %q", plain(header))
	w.note(actor, "trailer %q", plain(s.Trailer()))
	w.note(actor, "status %v %q, in all %x", st.Code(), st.Message(), details)
}
