// Package shim is the daemon: the socket that the kubelet is pointed at, with the relay and the checkpoint service behind it.
//
// It starts whether or not the runtime or CRIU are there, and stops in an order that never leaves the kubelet without a
// runtime while a checkpoint is being finished.
package shim

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/admin"
	"crishim/shim/archive"
	"crishim/shim/checkpoint"
	"crishim/shim/monitor"
	"crishim/shim/relay"
	"crishim/shim/tracing"
)

// Config is what the daemon is told.
type Config struct {
	Listen          string // endpoint for the kubelet: unix:///path or a path; not used where systemd hands a socket over
	RuntimeEndpoint string // of the runtime, in the same form
	Admin           string // endpoint of crishim's own API, in the same form; empty for none
	Metrics         string // where metrics and health are served: a Unix socket in the same form, or an address of the loopback interface; empty for nowhere
	Tracing         string // URL of a collector that gets spans of checkpoints, by OTLP over HTTP; empty for none
	Version         string // of crishim: archives say what has made them
	Commit          string // that it was built of
	State           string // directory for the records of checkpoints in flight and for their history; no other crishim uses it
	Log             logrus.FieldLogger

	// What can change while it runs.
	Mode        Mode     // who answers CheckpointContainer; "" for Always
	Criu        string   // path of criu, or its name in PATH
	Directories []string // in which archives may appear; empty for all that are fit for it
	RefuseTCP   bool     // whether a container with an established TCP connection is refused
	Archive     archive.Options
	Bounds      checkpoint.Bounds
	Retention   Retention
	Shutdown    Shutdown

	// Reload, if not nil, is called for each value that comes from Hangup, and returns what there is to change to, which makes sense. The error says
	// what is wrong, in lines: then all stays as it was.
	Reload func() (Config, error)
	Hangup <-chan os.Signal
}

// Shutdown is how long checkpoints in flight have to finish before they are rolled back, and how long calls in flight have to be answered after that.
type Shutdown struct{ Checkpoints, Calls time.Duration }

// Validate tells whether a daemon could be started with this, as far as can be said before.
func (c Config) Validate() error {
	if err := c.Archive.Validate(); err != nil {
		return fmt.Errorf("parse form of archives: %w", err)
	}
	if _, err := socketPath(c.RuntimeEndpoint); err != nil {
		return fmt.Errorf("parse runtime endpoint: %w", err)
	}
	if _, err := socketPath(c.Listen); err != nil {
		return fmt.Errorf("parse listen address: %w", err)
	}
	if c.Metrics != "" {
		if _, err := monitor.ParseAddress(c.Metrics); err != nil {
			return fmt.Errorf("parse metrics: %w", err)
		}
	}
	if c.Tracing != "" {
		if err := tracing.CheckEndpoint(c.Tracing); err != nil {
			return fmt.Errorf("parse tracing: %w", err)
		}
	}
	return c.Mode.validate()
}

// Run serves until ctx ends, then shuts down in order and returns nil. Any other error is of the start: a listening address
// that cannot be had, or an endpoint that makes no sense.
func Run(ctx context.Context, config Config) error {
	if err := config.Validate(); err != nil {
		return err
	}
	runtimePath, err := socketPath(config.RuntimeEndpoint)
	if err != nil {
		return err
	}
	listener, err := listen(ctx, config.Listen)
	if err != nil {
		return err
	}
	defer listener.Close()

	runtime, err := dialRuntime(runtimePath)
	if err != nil {
		return err
	}
	defer runtime.Close()
	tracer, stopTracing, err := tracing.Start(config.Tracing, config.Version, config.Log)
	if err != nil {
		return err
	}
	defer stopTracing()
	var seen *monitor.Monitor // made of all that follows, before any of that is started
	retainer := newRetainer(config.Retention, config.Log)
	base := checkpoint.Config{
		Runtime: runtimeapi.NewRuntimeServiceClient(runtime), Images: runtimeapi.NewImageServiceClient(runtime),
		Version: config.Version, State: config.State, Log: config.Log, Tracer: tracer,
		Ended: func(c *crishimv1.Checkpoint, cause string) {
			seen.Ended(c, cause)
			if cause == "" {
				retainer.written()
			}
		},
		Repaired: func(left error) { seen.Repaired(left) },
	}
	checkpoints := checkpoint.New(config.checkpoint(base))
	route := newRoute(runtime, config.Mode, config.Log)
	defer route.close()
	server := grpc.NewServer()
	defer server.Stop()
	runtimeapi.RegisterRuntimeServiceServer(server, checkpoints)
	kubelet := relay.New(relay.Config{
		Dial: func(ctx context.Context) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", runtimePath)
		},
		Handlers: map[string]http.Handler{runtimeapi.RuntimeService_CheckpointContainer_FullMethodName: withCaller(server)},
		Passes:   route.passes,
		Endless:  []string{runtimeapi.RuntimeService_GetContainerEvents_FullMethodName},
		Counted:  criMethods(),
		Away:     func(cause error) { seen.Away(cause) },
		Log:      config.Log,
	})
	root := relay.RootOnly(listener, config.Log)
	seen = monitor.New(monitor.Build{Version: config.Version, Commit: config.Commit}, monitor.Sources{
		Relay:     kubelet.Stats,
		Refused:   root.Refused,
		InFlight:  func() (all, waiting int) { return checkpoints.History().InFlight(), checkpoints.Waiting() },
		Unwritten: checkpoints.History().Unwritten,
		Causes:    checkpoint.Causes(),
		Runtime: func(ctx context.Context) error {
			_, err := base.Runtime.Version(ctx, &runtimeapi.VersionRequest{})
			return err
		},
		Ready: func(ctx context.Context) []error { return ready(ctx, listener.Addr().String(), checkpoints, route) },
	})
	retainer.monitor = seen

	served := make(chan error, 1)
	go func() { served <- kubelet.Serve(root) }()
	stopMonitor := serveMonitor(ctx, config.Metrics, seen, config.Log)
	stopAdmin := serveAdmin(ctx, config.Admin, checkpoints, config.Log)
	prepared := make(chan struct{})
	go func() {
		defer close(prepared)
		prepare(ctx, checkpoints, config.Mode, config.Log)
	}()
	retained := make(chan struct{})
	go func() {
		defer close(retained)
		retainer.run(ctx)
	}()
	config.Log.WithFields(logrus.Fields{"listen": listener.Addr().String(), "runtime": runtimePath}).Info("serving")
	notifySystemd(config.Log, daemon.SdNotifyReady)
	stopWatchdog := startWatchdog(listener.Addr().String(), runtimePath, seen.Watched, config.Log)

	broken := false
	for serving := true; serving; {
		select {
		case err = <-served: // the listener broke
			serving, broken = false, true
		case <-ctx.Done():
			serving = false
		case <-config.Hangup:
			notifySystemd(config.Log, reloading())
			seen.Reloaded(config.reload(func(changed Config) {
				checkpoints.Reconfigure(changed.checkpoint(base))
				route.set(changed.Mode)
				retainer.changed(changed.Retention)
				config.Shutdown = changed.Shutdown
			}))
			notifySystemd(config.Log, daemon.SdNotifyReady)
		}
	}
	// systemd's own ends when it hears of the stopping, and would begin again were it fed later. From then on TimeoutStopSec= is the bound, or what
	// crishim says if that is longer.
	stopWatchdog()
	notifySystemd(config.Log, stopping(config.Shutdown))
	config.Log.Info("shutting down: finishing checkpoints in flight, relaying goes on")
	drain, cancelDrain := context.WithTimeout(context.Background(), config.Shutdown.Checkpoints)
	defer cancelDrain()
	checkpoints.Drain(drain)
	stopAdmin()
	end, cancelEnd := context.WithTimeout(context.Background(), config.Shutdown.Calls)
	defer cancelEnd()
	if shutdownErr := kubelet.Shutdown(end); shutdownErr != nil {
		// A long pull or exec: its caller has been told, and the end was asked for.
		config.Log.Warnf("calls were cut at shutdown: %v", shutdownErr)
	}
	if !broken {
		err = <-served
	}
	stopMonitor()
	<-prepared
	<-retained
	config.Log.Info("bye")
	return err
}

// checkpoint is what the checkpoint service needs, with what it has whatever the configuration.
func (c Config) checkpoint(base checkpoint.Config) checkpoint.Config {
	base.Criu, base.Directories, base.RefuseTCP, base.Archive, base.Bounds = c.Criu, c.Directories, c.RefuseTCP, c.Archive, c.Bounds
	return base
}

// reload has what can change while the daemon runs changed to what Reload returns. The error has been logged.
func (c Config) reload(change func(Config)) error {
	if c.Reload == nil {
		return nil
	}
	changed, err := c.Reload()
	if err != nil {
		for line := range strings.Lines(err.Error()) {
			c.Log.Errorf("the configuration is wrong, and stays as it was: %s", strings.TrimSpace(line))
		}
		return err
	}
	change(changed)
	return nil
}

// reloading tells systemd, and since when by its clock (sd_notify(3), of version 253; earlier ones pass over that).
func reloading() string {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) // it has no way to fail
	return fmt.Sprintf("%s\nMONOTONIC_USEC=%d", daemon.SdNotifyReloading, now.Nano()/1000)
}

// stopping tells systemd, and how long it may take at most: a rollback of a container with much memory, and what is removed of it, come on top.
func stopping(s Shutdown) string {
	const more = 30 * time.Second
	return fmt.Sprintf("%s\nEXTEND_TIMEOUT_USEC=%d", daemon.SdNotifyStopping, (s.Checkpoints + s.Calls + more).Microseconds())
}

// dialRuntime returns a client for what crishim itself asks of the runtime. It connects when it is used, and comes back as
// fast as the kubelet's own connection does.
func dialRuntime(path string) (*grpc.ClientConn, error) {
	const maxMessage = 16 << 20 // as the kubelet's
	reconnect := backoff.DefaultConfig
	reconnect.BaseDelay, reconnect.MaxDelay = 100*time.Millisecond, 3*time.Second
	return grpc.NewClient("unix://"+path,
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessage)),
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: reconnect, MinConnectTimeout: 3 * time.Second}))
}

// withCaller tells the checkpoint service who is at the other end of the relay.
func withCaller(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if peer, ok := relay.PeerFrom(r.Context()); ok {
			caller := checkpoint.Caller(crishimv1.Interface_INTERFACE_CRI, peer.Pid, peer.Uid)
			r = r.WithContext(checkpoint.WithCaller(r.Context(), caller))
		}
		next.ServeHTTP(w, r)
	})
}

// serveAdmin serves crishim's own API until stop is called, which lets calls in flight end for a moment. What stands in its way is no reason to
// leave the kubelet without a runtime.
func serveAdmin(ctx context.Context, endpoint string, checkpoints *checkpoint.Service, log logrus.FieldLogger) (stop func()) {
	if endpoint == "" {
		return func() {}
	}
	listener, err := listenAt(ctx, endpoint)
	if err != nil {
		log.Warnf("no commands such as crishim list, everything else works: %v", err)
		return func() {}
	}
	server := admin.New(checkpoints, log)
	served := make(chan struct{})
	go func() {
		defer close(served)
		if err := server.Serve(relay.RootOnly(listener, log)); err != nil {
			log.Warnf("no more commands such as crishim list, everything else works: %v", err)
		}
	}()
	return func() {
		cut := time.AfterFunc(time.Second, server.Stop)
		defer cut.Stop()
		server.GracefulStop()
		<-served
	}
}

// prepare has put right what a crishim that died has left, and says at start what an operator would otherwise learn at the first
// checkpoint. Relaying does not wait for any of it.
func prepare(ctx context.Context, checkpoints *checkpoint.Service, mode Mode, log logrus.FieldLogger) {
	if err := checkpoints.Repair(); err != nil && ctx.Err() == nil {
		log.Warnf("no checkpoints until this is mended, everything else works: %v", err)
	}
	if mode == Never {
		return
	}
	features, err := checkpoints.Probe(ctx)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		log.Warnf("no checkpoints until this is mended, everything else works: %v", err)
	default:
		log.WithFields(logrus.Fields{"criu": features.Path, "version": features.VersionString()}).Info("found CRIU")
		for _, missing := range features.Missing {
			log.Warnf("criu check: %s", missing)
		}
	}
}

func notifySystemd(log logrus.FieldLogger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warnf("tell systemd %s: %v", state, err)
	}
}

// socketPath returns the path in an endpoint, which may be written as the kubelet does, unix:///path, or plainly.
func socketPath(endpoint string) (string, error) {
	path, isURL := strings.CutPrefix(endpoint, "unix://")
	if !isURL && strings.Contains(endpoint, "://") {
		return "", fmt.Errorf("endpoint %q: only unix sockets are possible: unix:///path", endpoint)
	}
	if !strings.HasPrefix(path, "/") {
		return "", fmt.Errorf("endpoint %q: an absolute path is needed: unix:///path", endpoint)
	}
	const max = 107 // bytes in sockaddr_un less the final NUL
	if len(path) > max {
		return "", fmt.Errorf("endpoint %q: the path is longer than the %d bytes that a socket's may have", endpoint, max)
	}
	return path, nil
}
