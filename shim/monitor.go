package shim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/net/netutil"
	"google.golang.org/grpc"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/shim/monitor"
	"crishim/shim/relay"
)

// criMethods are the paths of all calls that the CRI had when this crishim was built.
func criMethods() []string {
	var paths []string
	for _, service := range []grpc.ServiceDesc{runtimeapi.RuntimeService_ServiceDesc, runtimeapi.ImageService_ServiceDesc} {
		for _, method := range service.Methods {
			paths = append(paths, "/"+service.ServiceName+"/"+method.MethodName)
		}
		for _, stream := range service.Streams {
			paths = append(paths, "/"+service.ServiceName+"/"+stream.StreamName)
		}
	}
	return paths
}

// ready says why this crishim is of no use to a kubelet now: no call reaches the runtime, or, where it is crishim that makes them, no checkpoint is
// possible.
func ready(ctx context.Context, listening string, checkpoints *checkpoint.Service, route *route) []error {
	var reasons []error
	if err := callVersion(ctx, listening); err != nil {
		reasons = append(reasons, fmt.Errorf("no answer of the runtime through crishim: %w", err))
	}
	if route.mode.Load() != Never {
		for _, reason := range checkpoints.Ready(ctx) {
			reasons = append(reasons, fmt.Errorf("no checkpoints: %w", reason))
		}
	}
	return reasons
}

// serveMonitor serves metrics and health at an address until stop is called. What stands in its way is no reason to leave the kubelet without a runtime.
func serveMonitor(ctx context.Context, address string, m *monitor.Monitor, log logrus.FieldLogger) (stop func()) {
	if address == "" {
		return func() {}
	}
	listener, err := listenForMonitor(ctx, address, log)
	if err != nil {
		log.Warnf("no metrics, everything else works: %v", err)
		return func() {}
	}
	log.WithField("metrics", listener.Addr().String()).Info("serving metrics and health")
	const connections = 64 // at once; others wait
	server := m.NewServer()
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := server.Serve(netutil.LimitListener(listener, connections)); err != nil && !errors.Is(err, http.ErrServerClosed) {
			log.Warnf("no more metrics, everything else works: %v", err)
		}
	}()
	return func() {
		end, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		if err := server.Shutdown(end); err != nil {
			server.Close()
		}
		<-served
	}
}

func listenForMonitor(ctx context.Context, address string, log logrus.FieldLogger) (net.Listener, error) {
	unix, err := monitor.ParseAddress(address)
	if err != nil {
		return nil, err
	}
	if unix {
		listener, err := listenAt(ctx, address)
		if err != nil {
			return nil, err
		}
		return relay.RootOnly(listener, log), nil
	}
	return (&net.ListenConfig{}).Listen(ctx, "tcp", address)
}
