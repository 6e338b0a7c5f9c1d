package relay

import (
	"context"
	"errors"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/summerwind/h2spec/config"
	"github.com/summerwind/h2spec/generic"
	"github.com/summerwind/h2spec/hpack"
	"github.com/summerwind/h2spec/http2"
	"github.com/summerwind/h2spec/spec"
	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// exceptions are the cases of h2spec that need not pass, by section and description, and why. It is of 2020, and tests RFC 7540.
var exceptions = map[string]string{
	"generic/5: Sends a dynamic table size update":                               tableSize,
	"generic/5: Sends multiple dynamic table size update":                        tableSize,
	"http2/6.10: Sends multiple CONTINUATION frames preceded by a HEADERS frame": tableSize,

	"http2/5.1: closed: Sends a DATA frame after sending RST_STREAM frame": closedStream,
	"http2/5.1: closed: Sends a DATA frame":                                closedStream,
	"http2/5.1: closed: Sends a HEADERS frame":                             closedStream,

	// Whether the stream has ended is a race.
	"http2/5.1: half closed (remote): Sends a DATA frame":                                              closedStream,
	"http2/5.1: half closed (remote): Sends a HEADERS frame":                                           closedStream,
	`http2/6.1: Sends a DATA frame on the stream that is not in "open" or "half-closed (local)" state`: closedStream,

	"http2/5.3.1: Sends HEADERS frame that depend on itself":  priority,
	"http2/5.3.1: Sends PRIORITY frame that depend on itself": priority,
}

const (
	tableSize    = "h2spec acknowledges that our HPACK table has size 0 and uses one; RFC 7541, 4.2, makes that an error"
	closedStream = "frames of a stream that has just ended are dropped, as they must be for a while where we have ended it; no list of ended streams is kept"
	priority     = "RFC 9113, 5.3.2, has abolished priorities"
	anotherOrder = "it takes an acknowledgement to come before DATA; ours is the runtime's, and comes later"
	runtimes     = "this is the runtime's to judge, and gRPC's servers do not refuse it; they behave the same without the relay"
	noData       = "the answer has no DATA"
)

// Those with containerd as the server: the relay passes frames of streams on as they are.
var exceptionsOfContainerd = map[string]string{
	"generic/2: Sends a WINDOW_UPDATE frame on half-closed (remote) stream": noData,
	"generic/2: Sends a PRIORITY frame on half-closed (remote) stream":      noData,

	// It may have answered before the second block of headers comes.
	"http2/8.1: Sends a second HEADERS frame without the END_STREAM flag":                  closedStream,
	"http2/8.1.2.1: Sends a HEADERS frame that contains a pseudo-header field as trailers": closedStream,

	"http2/6.9: Sends a WINDOW_UPDATE frame with a flow control window increment of 0 on a stream":                    runtimes,
	"http2/6.9.1: Sends multiple WINDOW_UPDATE frames increasing the flow control window to above 2^31-1 on a stream": runtimes,

	`http2/8.1.2.2: Sends a HEADERS frame that contains the TE header field with any value other than "trailers"`:                                         runtimes,
	`http2/8.1.2.3: Sends a HEADERS frame that omits ":method" pseudo-header field`:                                                                       runtimes,
	`http2/8.1.2.3: Sends a HEADERS frame that omits ":scheme" pseudo-header field`:                                                                       runtimes,
	`http2/8.1.2.6: Sends a HEADERS frame with the "content-length" header field which does not equal the DATA frame payload length`:                      runtimes,
	`http2/8.1.2.6: Sends a HEADERS frame with the "content-length" header field which does not equal the sum of the multiple DATA frames payload length`: runtimes,
}

var exceptionsOfServed = map[string]string{
	"http2/6.9.2: Changes SETTINGS_INITIAL_WINDOW_SIZE after sending HEADERS frame": anotherOrder,
}

// TestConformance runs h2spec, a suite of tests of HTTP/2 servers, against the relay: with containerd behind it for the server, and with
// a handler of this process.
func TestConformance(t *testing.T) {
	node.Require(t)
	served := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(served, cri.UnimplementedRuntimeServiceServer{})
	defer served.Stop()
	for _, test := range []struct {
		name, path string
		exceptions map[string]string
		passes     int // at least
	}{
		{"containerd", cri.RuntimeService_Version_FullMethodName, exceptionsOfContainerd, 119},
		{"served", cri.RuntimeService_CheckpointContainer_FullMethodName, exceptionsOfServed, 133},
	} {
		t.Run(test.name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			s := New(Config{
				Dial: func(ctx context.Context) (net.Conn, error) {
					return new(net.Dialer).DialContext(ctx, "unix", "/run/containerd/containerd.sock")
				},
				Handlers: map[string]http.Handler{cri.RuntimeService_CheckpointContainer_FullMethodName: served},
			})
			done := make(chan error, 1)
			go func() { done <- s.Serve(l) }()
			address := l.Addr().(*net.TCPAddr)
			c := &conformance{t: t, exceptions: test.exceptions, config: &config.Config{
				Host: address.IP.String(), Port: address.Port, Path: test.path, Timeout: 10 * time.Second, MaxHeaderLen: 4000, Strict: true,
			}}
			for _, group := range []*spec.TestGroup{generic.Spec(), http2.Spec(), hpack.Spec()} {
				c.run(group)
			}
			t.Logf("%d cases pass, %d are exceptions, %d do not apply", c.passed, c.excepted, c.skipped)
			if c.passed < test.passes {
				t.Errorf("%d cases pass, at least %d did", c.passed, test.passes)
			}
			ctx, cancel := context.WithTimeout(context.Background(), patience)
			defer cancel()
			if err := s.Shutdown(ctx); err != nil {
				t.Error(err)
			}
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

type conformance struct {
	t                         *testing.T
	config                    *config.Config
	exceptions                map[string]string
	passed, excepted, skipped int
}

func (c *conformance) run(group *spec.TestGroup) {
	for _, test := range append(group.Tests, group.StrictTests...) {
		name := group.ID() + ": " + test.Desc
		if exceptions[name] != "" || c.exceptions[name] != "" {
			c.excepted++
			continue
		}
		conn, err := spec.Dial(c.config)
		if err != nil {
			c.t.Fatalf("%s: %v", name, err)
		}
		var failed *spec.TestError
		switch err := test.Run(c.config, conn); {
		case err == nil:
			c.passed++
		case errors.Is(err, spec.ErrSkipped):
			c.skipped++
		case errors.As(err, &failed):
			c.t.Errorf("%s: %s wants %q, got %q", name, test.Requirement, failed.Expected, failed.Actual)
		default:
			c.t.Errorf("%s: %v", name, err)
		}
		conn.Close()
	}
	for _, below := range group.Groups {
		c.run(below)
	}
}
