package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// peers are what this program is instead of the benchmark when it is started with one of these names, LISTEN and UPSTREAM, which are
// paths of sockets: what crishim's relay is measured beside, each a process of its own.
var peers = map[string]func(args []string) error{
	"fake-runtime":  serveFakeRuntime,
	"byte-copy":     serveByteCopy,
	"typed-proxy":   serveTypedProxy,
	"raw-proxy":     serveRawProxy,
	"reverse-proxy": serveReverseProxy,
}

// The calls that are measured, by what the fake runtime answers.
const (
	events      = 20000
	listSize    = 1 << 20
	unarySize   = 1 << 10
	maxMessage  = 1 << 30
	fakeVersion = "fake"
)

// listen takes over a socket, also one that a killed process has left.
func listen(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	return net.Listen("unix", path)
}

// untilTerminated serves until this process is told to end.
func untilTerminated(serve func() error, stop func()) error {
	ctx, cancel := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer cancel()
	defer context.AfterFunc(ctx, stop)()
	if err := serve(); ctx.Err() == nil {
		return err
	}
	return nil
}

func serveGRPC(path string, server *grpc.Server) error {
	listener, err := listen(path)
	if err != nil {
		return err
	}
	return untilTerminated(func() error { return server.Serve(listener) }, server.Stop)
}

func dial(socket string, options ...grpc.DialOption) (*grpc.ClientConn, error) {
	return grpc.NewClient("passthrough:///cri", append([]grpc.DialOption{
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", socket)
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
	}, options...)...)
}

// fakeRuntime is no runtime: it gives the same answers whatever it is asked.
type fakeRuntime struct {
	cri.UnimplementedRuntimeServiceServer
	status *cri.ContainerStatusResponse
	list   *cri.ListContainersResponse
}

func serveFakeRuntime(args []string) error {
	fake := &fakeRuntime{
		status: &cri.ContainerStatusResponse{
			Status: &cri.ContainerStatus{Id: strings.Repeat("a", 64), State: cri.ContainerState_CONTAINER_RUNNING},
			Info:   map[string]string{"info": strings.Repeat("i", unarySize-128)},
		},
		list: &cri.ListContainersResponse{},
	}
	for size := 0; size < listSize; {
		c := &cri.Container{
			Id: fmt.Sprintf("%064d", size), PodSandboxId: strings.Repeat("b", 64), Metadata: &cri.ContainerMetadata{Name: "container"},
			Image: &cri.ImageSpec{Image: "sha256:" + strings.Repeat("c", 64)}, State: cri.ContainerState_CONTAINER_RUNNING,
			Labels: map[string]string{"io.kubernetes.pod.namespace": "default", "io.kubernetes.pod.uid": strings.Repeat("d", 36)},
		}
		fake.list.Containers = append(fake.list.Containers, c)
		size += proto.Size(c) + 3 // with its tag and length
	}
	server := grpc.NewServer(grpc.MaxSendMsgSize(maxMessage))
	cri.RegisterRuntimeServiceServer(server, fake)
	return serveGRPC(args[0], server)
}

func (f *fakeRuntime) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: fakeVersion, RuntimeVersion: fakeVersion, RuntimeApiVersion: "v1"}, nil
}

func (f *fakeRuntime) ContainerStatus(context.Context, *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	return f.status, nil
}

func (f *fakeRuntime) ListContainers(context.Context, *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	return f.list, nil
}

func (f *fakeRuntime) GetContainerEvents(_ *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	event := &cri.ContainerEventResponse{ContainerId: strings.Repeat("a", 64), CreatedAt: 1}
	for range events {
		if err := stream.Send(event); err != nil {
			return err
		}
	}
	return nil
}

// serveByteCopy is the least that any proxy costs: it copies, and knows nothing of what.
func serveByteCopy(args []string) error {
	listener, err := listen(args[0])
	if err != nil {
		return err
	}
	return untilTerminated(func() error {
		for {
			client, err := listener.Accept()
			if err != nil {
				return err
			}
			runtime, err := net.Dial("unix", args[1])
			if err != nil {
				client.Close() // the client tries again
				continue
			}
			pass := func(to, from net.Conn) {
				defer to.Close()
				defer from.Close()
				// The plain loop, without what io.Copy asks of the kernel. An error ends it as the end does.
				_, _ = io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, 64<<10))
			}
			go pass(runtime, client)
			go pass(client, runtime)
		}
	}, func() { listener.Close() })
}

// typedProxy is what most proxies of the CRI are: a server and a client of the generated code, one function for each call.
type typedProxy struct {
	cri.UnimplementedRuntimeServiceServer
	runtime cri.RuntimeServiceClient
}

func serveTypedProxy(args []string) error {
	conn, err := dial(args[1])
	if err != nil {
		return err
	}
	defer conn.Close()
	server := grpc.NewServer(grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage))
	cri.RegisterRuntimeServiceServer(server, &typedProxy{runtime: cri.NewRuntimeServiceClient(conn)})
	return serveGRPC(args[0], server)
}

func (p *typedProxy) Version(ctx context.Context, r *cri.VersionRequest) (*cri.VersionResponse, error) {
	return p.runtime.Version(ctx, r)
}

func (p *typedProxy) ContainerStatus(ctx context.Context, r *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	return p.runtime.ContainerStatus(ctx, r)
}

func (p *typedProxy) ListContainers(ctx context.Context, r *cri.ListContainersRequest) (*cri.ListContainersResponse, error) {
	return p.runtime.ListContainers(ctx, r)
}

func (p *typedProxy) GetContainerEvents(r *cri.GetEventsRequest, stream grpc.ServerStreamingServer[cri.ContainerEventResponse]) error {
	from, err := p.runtime.GetContainerEvents(stream.Context(), r)
	if err != nil {
		return err
	}
	for {
		event, err := from.Recv()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
		if err := stream.Send(event); err != nil {
			return err
		}
	}
}

// rawCodec passes messages as the bytes that they are.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error)      { return *v.(*[]byte), nil }
func (rawCodec) Unmarshal(data []byte, v any) error { *v.(*[]byte) = slices.Clone(data); return nil }
func (rawCodec) Name() string                       { return "proto" }

// serveRawProxy passes every call through grpc-go without decoding its messages.
func serveRawProxy(args []string) error {
	conn, err := dial(args[1], grpc.WithDefaultCallOptions(grpc.ForceCodec(rawCodec{})))
	if err != nil {
		return err
	}
	defer conn.Close()
	return serveGRPC(args[0], grpc.NewServer(
		grpc.MaxRecvMsgSize(maxMessage), grpc.MaxSendMsgSize(maxMessage),
		grpc.ForceServerCodec(rawCodec{}),
		grpc.UnknownServiceHandler(func(_ any, client grpc.ServerStream) error { return passRaw(conn, client) })))
}

func passRaw(conn *grpc.ClientConn, client grpc.ServerStream) error {
	method, ok := grpc.MethodFromServerStream(client)
	if !ok {
		return status.Error(codes.Internal, "no method")
	}
	ctx, cancel := context.WithCancel(client.Context())
	defer cancel()
	if md, ok := metadata.FromIncomingContext(ctx); ok {
		ctx = metadata.NewOutgoingContext(ctx, md)
	}
	runtime, err := conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, method)
	if err != nil {
		return err
	}
	// It ends with the call's context at the latest, which grpc cancels when this function returns.
	go func() {
		for {
			var message []byte
			if err := client.RecvMsg(&message); err == io.EOF {
				_ = runtime.CloseSend() // never fails
				return
			} else if err != nil {
				cancel()
				return
			}
			if runtime.SendMsg(&message) != nil {
				return // the receiver below hears why
			}
		}
	}()
	for first := true; ; first = false {
		var message []byte
		if err := runtime.RecvMsg(&message); err != nil {
			client.SetTrailer(runtime.Trailer())
			if err == io.EOF {
				return nil
			}
			return err
		}
		if first {
			if header, err := runtime.Header(); err == nil {
				_ = client.SetHeader(header) // nothing was sent before
			}
		}
		if err := client.SendMsg(&message); err != nil {
			return err
		}
	}
}

// serveReverseProxy is the standard library's, over HTTP/2 without TLS on both sides.
func serveReverseProxy(args []string) error {
	listener, err := listen(args[0])
	if err != nil {
		return err
	}
	var plain http.Protocols
	plain.SetUnencryptedHTTP2(true)
	proxy := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) { r.SetURL(&url.URL{Scheme: "http", Host: "runtime"}) },
		Transport: &http.Transport{
			Protocols: &plain,
			DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
				return new(net.Dialer).DialContext(ctx, "unix", args[1])
			},
		},
		FlushInterval: -1,
	}
	server := &http.Server{Handler: proxy, Protocols: &plain}
	return untilTerminated(func() error { return server.Serve(listener) }, func() { server.Close() })
}
