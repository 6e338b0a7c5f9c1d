package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// relayResults is what a call costs on each way to the runtime.
type relayResults struct {
	Rounds int
	Gone   float64 // seconds for which the runtime was gone
	Ways   []wayResult
}

// wayResult has one figure for each round. Times are in seconds, sizes in bytes.
type wayResult struct {
	Name string

	Unary    []float64 // median of a call of 1 KiB, one caller
	Unary99  []float64 // 99th percentile of the same
	CPU      []float64 // processor time of the proxy for such a call
	Unary16  []float64 // calls a second, 16 callers
	List     []float64 // median of a list of 1 MiB, one caller
	List4    []float64 // calls a second, 4 callers
	Events   []float64 // until 20,000 events have come
	Anon     int64     // RssAnon and VmRSS of the proxy, the most that was seen after any of these
	Resident int64
	Recovery float64 // after the runtime's return until a call succeeds
}

// way is how calls get to the runtime: directly, or through a process.
type way struct {
	name    string
	process *process // nil where there is none
	conn    *grpc.ClientConn
	runtime cri.RuntimeServiceClient
	wayResult
}

const (
	direct   = "direct"
	byteCopy = "byte copy"
	rawProxy = "grpc-go, raw codec"
)

func measureRelay(ctx context.Context, s settings) (_ *relayResults, err error) {
	rounds, gone := 40, 45*time.Second
	if s.short {
		rounds, gone = 3, 3*time.Second
	}
	dir, err := os.MkdirTemp("", "crishim-bench-")
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	fakeSocket := filepath.Join(dir, "runtime.sock")
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	fake, err := startProcess(ctx, fakeSocket, self, "fake-runtime", fakeSocket)
	if err != nil {
		return nil, err
	}
	defer func() {
		if fake != nil { // it is another one in the end
			fake.end()
		}
	}()
	ways := []*way{{name: direct}}
	defer func() {
		for _, w := range ways {
			err = errors.Join(err, w.close())
		}
	}()
	for _, peer := range [][2]string{
		{byteCopy, "byte-copy"}, {"typed proxy", "typed-proxy"}, {rawProxy, "raw-proxy"}, {"net/http ReverseProxy", "reverse-proxy"}, {crishim, ""},
	} {
		w := &way{name: peer[0]}
		socket := filepath.Join(dir, "proxy-"+peer[1]+".sock")
		command := []string{self, peer[1], socket, fakeSocket}
		if peer[1] == "" {
			command = []string{s.crishim, "serve", "--listen", "unix://" + socket, "--runtime-endpoint", "unix://" + fakeSocket,
				"--state-dir", filepath.Join(dir, "state"), "--admin-socket", ""}
		}
		if w.process, err = startProcess(ctx, socket, command...); err != nil {
			return nil, err
		}
		ways = append(ways, w)
	}
	for _, w := range ways {
		socket := fakeSocket
		if w.process != nil {
			socket = w.process.socket
		}
		if err := w.connect(ctx, socket); err != nil {
			return nil, fmt.Errorf("%s: %w", w.name, err)
		}
	}
	for round := range rounds {
		for i, test := range []func(context.Context, *way) error{unary, unary16, list, list4, eventStream} {
			for _, j := range order(round, i, len(ways)) {
				w := ways[j]
				if err := test(ctx, w); err != nil {
					return nil, fmt.Errorf("%s: %w", w.name, err)
				}
				w.look()
			}
		}
		if round%10 == 9 || round == rounds-1 {
			say("relay: round %d of %d", round+1, rounds)
		}
	}
	say("relay: the runtime is gone for %s", gone)
	fake.end()
	wait := callUntilSuccess(ctx, ways, gone+2*time.Minute)
	if err := sleep(ctx, gone); err != nil {
		return nil, errors.Join(err, wait(time.Now()))
	}
	returned := time.Now()
	fake, err = startProcess(ctx, fakeSocket, self, "fake-runtime", fakeSocket)
	if err := errors.Join(err, wait(returned)); err != nil {
		return nil, err
	}
	result := &relayResults{Rounds: rounds, Gone: gone.Seconds()}
	for _, w := range ways {
		w.Name = w.name
		say("relay: %-22s p50 %4.0f µs, back after %.1f s", w.name, median(w.Unary)*1e6, w.Recovery)
		result.Ways = append(result.Ways, w.wayResult)
	}
	return result, nil
}

// connect makes a client like the kubelet's, and makes a few calls that are not measured.
func (w *way) connect(ctx context.Context, socket string) (err error) {
	// As in k8s.io/cri-client/pkg/remote_runtime.go of Kubernetes 1.34.
	w.conn, err = dial(socket, grpc.WithConnectParams(grpc.ConnectParams{
		Backoff: backoff.Config{BaseDelay: 10 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 3 * time.Second}, MinConnectTimeout: 5 * time.Second,
	}))
	if err != nil {
		return err
	}
	w.runtime = cri.NewRuntimeServiceClient(w.conn)
	for range 200 {
		if err := w.status(ctx); err != nil {
			return err
		}
	}
	return w.list(ctx)
}

func (w *way) close() error {
	if w.process != nil {
		w.process.end()
	}
	if w.conn == nil {
		return nil
	}
	return w.conn.Close()
}

func (w *way) status(ctx context.Context) error {
	_, err := w.runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: "a"})
	return err
}

func (w *way) list(ctx context.Context) error {
	_, err := w.runtime.ListContainers(ctx, &cri.ListContainersRequest{})
	return err
}

// look keeps the most memory that was seen.
func (w *way) look() {
	if w.process == nil {
		return
	}
	s := statusOf(w.process.cmd.Process.Pid)
	w.Anon, w.Resident = max(w.Anon, kilobytes(s["RssAnon"])), max(w.Resident, kilobytes(s["VmRSS"]))
}

func unary(ctx context.Context, w *way) error {
	const calls = 400
	before, err := w.processorTime()
	if err != nil {
		return err
	}
	times, err := timeCalls(ctx, calls, w.status)
	if err != nil {
		return err
	}
	after, err := w.processorTime()
	if err != nil {
		return err
	}
	slices.Sort(times)
	w.Unary = append(w.Unary, median(times))
	w.Unary99 = append(w.Unary99, times[len(times)*99/100])
	w.CPU = append(w.CPU, (after-before).Seconds()/calls)
	return nil
}

func (w *way) processorTime() (time.Duration, error) {
	if w.process == nil {
		return 0, nil
	}
	return processorTime(w.process.cmd.Process.Pid)
}

func list(ctx context.Context, w *way) error {
	times, err := timeCalls(ctx, 15, w.list)
	w.List = append(w.List, median(times))
	return err
}

func timeCalls(ctx context.Context, number int, call func(context.Context) error) ([]float64, error) {
	var times []float64
	for range number {
		start := time.Now()
		if err := call(ctx); err != nil {
			return nil, err
		}
		times = append(times, time.Since(start).Seconds())
	}
	return times, nil
}

func unary16(ctx context.Context, w *way) error {
	rate, err := throughput(ctx, 16, 100, w.status)
	w.Unary16 = append(w.Unary16, rate)
	return err
}

func list4(ctx context.Context, w *way) error {
	rate, err := throughput(ctx, 4, 8, w.list)
	w.List4 = append(w.List4, rate)
	return err
}

// throughput is how many calls a second a number of callers get done.
func throughput(ctx context.Context, callers, each int, call func(context.Context) error) (float64, error) {
	errs := make([]error, callers)
	var running sync.WaitGroup
	start := time.Now()
	for i := range callers {
		running.Go(func() {
			for range each {
				if errs[i] = call(ctx); errs[i] != nil {
					return
				}
			}
		})
	}
	running.Wait()
	return float64(callers*each) / time.Since(start).Seconds(), errors.Join(errs...)
}

func eventStream(ctx context.Context, w *way) error {
	start := time.Now()
	stream, err := w.runtime.GetContainerEvents(ctx, &cri.GetEventsRequest{})
	if err != nil {
		return err
	}
	for n := 0; ; n++ {
		_, err := stream.Recv()
		if err == io.EOF && n == events {
			break
		}
		if err != nil {
			return fmt.Errorf("receive event %d: %w", n, err)
		}
	}
	w.Events = append(w.Events, time.Since(start).Seconds())
	return nil
}

// callUntilSuccess calls on all ways at once, as a kubelet does whether or not its runtime is there, until a call succeeds. The function
// that it returns waits for that, and notes how long it was after the runtime's return.
func callUntilSuccess(ctx context.Context, ways []*way, patience time.Duration) (wait func(returned time.Time) error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	ends, errs := make([]time.Time, len(ways)), make([]error, len(ways))
	var running sync.WaitGroup
	for i, w := range ways {
		running.Go(func() {
			for {
				call, cancel := context.WithTimeout(ctx, time.Second)
				err := w.status(call)
				cancel()
				if err == nil {
					ends[i] = time.Now()
					return
				}
				if ctx.Err() != nil {
					errs[i] = fmt.Errorf("%s: no call has succeeded for %s: %w", w.name, patience, err)
					return
				}
				_ = sleep(ctx, 20*time.Millisecond) // its end is seen above
			}
		})
	}
	return func(returned time.Time) error {
		defer cancel()
		running.Wait()
		for i, w := range ways {
			w.Recovery = ends[i].Sub(returned).Seconds()
		}
		return errors.Join(errs...)
	}
}

// process is one that listens on a socket.
type process struct {
	cmd    *exec.Cmd
	socket string
	stderr bytes.Buffer
	done   chan struct{}
}

// startProcess starts a process and waits until its socket answers.
func startProcess(ctx context.Context, socket string, command ...string) (*process, error) {
	p := &process{cmd: exec.Command(command[0], command[1:]...), socket: socket, done: make(chan struct{})}
	p.cmd.Stderr = &p.stderr
	// It does not outlive this one, nor gets its interrupts. The thread that starts it must then not end before: this program locks none.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		_ = p.cmd.Wait() // it is told to end
	}()
	for {
		conn, err := net.Dial("unix", socket)
		if err == nil {
			return p, conn.Close()
		}
		select {
		case <-p.done:
			return nil, fmt.Errorf("start %v: it has ended: %s", command, p.stderr.String())
		case <-ctx.Done():
			p.end()
			return nil, ctx.Err()
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// end ends the process. That of one that has ended is no error.
func (p *process) end() {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}
