package relay

import (
	"net/http"
	"reflect"
	"testing"

	"google.golang.org/grpc"
)

// Whatever a client calls, it is counted under a path that was known before.
func TestStats(t *testing.T) {
	fake := newFakeRuntime(t, echo)
	served := newServer(echo)
	defer served.Stop()
	relay := newTestRelay(t, Config{
		Dial: fake.dial, Handlers: map[string]http.Handler{"/x.Y/Served": served}, Counted: []string{"/x.Y/Relayed", "/x.Y/Served", "/x.Y/Unused"},
	})
	client := connect(t, relay.socket)
	message := make([]byte, 100)
	for range 3 {
		for _, method := range []string{"/x.Y/Relayed", "/x.Y/Served", "/x.Y/Other", "/made.Up/" + t.Name()} {
			if _, err := call(t.Context(), client, method, message); err != nil {
				t.Fatal(err)
			}
		}
	}
	// Each message has 5 bytes before it. A stream is forgotten just after its end has been passed on.
	waitFor(t, "end of all streams", func() bool { return relay.Stats().Streams == 0 })
	want := Stats{Accepted: 1, Connections: 1, Methods: []Method{
		{Path: "/x.Y/Relayed", Streams: 3, Requests: 315, Responses: 315},
		{Path: "/x.Y/Served", Streams: 3, Served: 3, Requests: 315, Responses: 315},
		{Path: "/x.Y/Unused"},
		{Path: "", Streams: 6, Requests: 630, Responses: 630},
	}}
	if got := relay.Stats(); !reflect.DeepEqual(got, want) {
		t.Errorf("stats are\n%+v, want\n%+v", got, want)
	}

	stream, err := client.NewStream(testContext(t), &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, "/x.Y/Relayed")
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, "open stream", func() bool { return relay.Stats().Streams == 1 })
	if err := stream.CloseSend(); err != nil {
		t.Fatal(err)
	}
	client.Close()
	waitFor(t, "end of the connection", func() bool { s := relay.Stats(); return s.Streams == 0 && s.Connections == 0 && s.Accepted == 1 })
}
