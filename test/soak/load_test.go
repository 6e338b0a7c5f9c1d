package soak

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// load is what crishim has to do all the time. What fails of it is kept.
type load struct {
	node *node.Node
	// target is the container that is checkpointed.
	target *node.Container

	calls, pods, archives, abandoned atomic.Int64

	mu       sync.Mutex
	failures []error
}

func (l *load) fail(err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures = append(l.failures, err)
}

// run keeps everything going until ctx is done, and returns once all of it has ended. What has begun then is brought to its end.
func (l *load) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	for _, work := range []func(context.Context) error{l.call, l.connect, l.churn, l.checkpoint} {
		all.Go(func() {
			if err := work(ctx); err != nil {
				l.fail(err)
			}
		})
	}
}

const (
	callsPerSecond    = 200
	checkpointsPeriod = 5 * time.Second
	checkpoints       = "/data/checkpoints"
)

// question is a call that the kubelet makes, or a client such as crictl.
type question struct {
	name string
	ask  func(context.Context, *node.Client) error
}

func (l *load) questions() []question {
	return []question{
		{"Version", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.Version(ctx, &cri.VersionRequest{})
			return err
		}},
		{"Status", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.Status(ctx, &cri.StatusRequest{Verbose: true})
			return err
		}},
		{"ListPodSandbox", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.ListPodSandbox(ctx, &cri.ListPodSandboxRequest{})
			return err
		}},
		{"ListContainers", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.ListContainers(ctx, &cri.ListContainersRequest{})
			return err
		}},
		{"PodSandboxStatus", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: l.target.PodID})
			return err
		}},
		{"ContainerStatus", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: l.target.ID, Verbose: true})
			return err
		}},
		{"ContainerStatus of none", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: "none"})
			return err
		}},
		{"ContainerStats", func(ctx context.Context, c *node.Client) error {
			_, err := c.Runtime.ContainerStats(ctx, &cri.ContainerStatsRequest{ContainerId: l.target.ID})
			return err
		}},
		{"ListImages", func(ctx context.Context, c *node.Client) error {
			_, err := c.Images.ListImages(ctx, &cri.ListImagesRequest{})
			return err
		}},
		{"ImageFsInfo", func(ctx context.Context, c *node.Client) error {
			_, err := c.Images.ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
			return err
		}},
	}
}

// call asks all questions in turn, at a steady rate, over two connections as the kubelet has them. Each has to be answered with the
// code with which the runtime answers it itself.
func (l *load) call(ctx context.Context) error {
	direct, err := l.node.DialCRI(node.ContainerdSocket)
	if err != nil {
		return err
	}
	defer direct.Close()
	var clients [2]*node.Client
	for i := range clients {
		if clients[i], err = l.node.DialCRI(node.CrishimSocket); err != nil {
			return err
		}
		defer clients[i].Close()
	}
	questions := l.questions()
	want := make([]codes.Code, len(questions))
	for i, q := range questions {
		want[i] = status.Code(q.ask(ctx, direct))
	}
	var asking sync.WaitGroup
	defer asking.Wait()
	slots := make(chan struct{}, 64)
	for ticks := time.NewTicker(time.Second / callsPerSecond); ; {
		select {
		case <-ctx.Done():
			ticks.Stop()
			return nil
		case <-ticks.C:
		}
		slots <- struct{}{}
		i := int(l.calls.Add(1))
		asking.Go(func() {
			defer func() { <-slots }()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			q := i % len(questions)
			if err := questions[q].ask(ctx, clients[i/len(questions)%len(clients)]); status.Code(err) != want[q] {
				l.fail(fmt.Errorf("%s: %w, want %s", questions[q].name, err, want[q]))
			}
		})
	}
}

// connect makes a connection each second, follows the runtime's events on it for a moment, and hangs up.
func (l *load) connect(ctx context.Context) error {
	for every(ctx, time.Second) {
		client, err := l.node.DialCRI(node.CrishimSocket)
		if err != nil {
			return err
		}
		moment, cancel := context.WithTimeout(context.WithoutCancel(ctx), 100*time.Millisecond)
		events, err := client.Runtime.GetContainerEvents(moment, &cri.GetEventsRequest{})
		for err == nil {
			_, err = events.Recv()
		}
		cancel()
		if status.Code(err) != codes.DeadlineExceeded {
			l.fail(fmt.Errorf("GetContainerEvents: %w", err))
		}
		if err := client.Close(); err != nil {
			return err
		}
	}
	return nil
}

// churn has pods come and go, one after the other.
func (l *load) churn(ctx context.Context) error {
	client, err := l.node.DialCRI(node.CrishimSocket)
	if err != nil {
		return err
	}
	defer client.Close()
	for ctx.Err() == nil {
		if err := live(context.WithoutCancel(ctx), client); err != nil {
			l.fail(fmt.Errorf("pod: %w", err))
		}
		l.pods.Add(1)
	}
	return nil
}

func live(ctx context.Context, client *node.Client) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	// The cgroup above a pod is the kubelet's to remove: here all pods have the same.
	container, err := client.RunContainer(ctx, node.Spec{Name: "comes-and-goes", Pod: func(pod *cri.PodSandboxConfig) {
		pod.Linux.CgroupParent = "/pods/come-and-go"
	}})
	if err != nil {
		return err
	}
	_, err = container.Exec(ctx, "true")
	return errors.Join(err, container.Remove(ctx))
}

// checkpoint makes an archive every five seconds, and removes it. In each third one its caller hangs up after a moment.
func (l *load) checkpoint(ctx context.Context) error {
	client, err := l.node.DialCRI(node.CrishimSocket)
	if err != nil {
		return err
	}
	defer client.Close()
	for i := 0; every(ctx, checkpointsPeriod); i++ {
		location := filepath.Join(checkpoints, fmt.Sprintf("checkpoint-%d.tar", i))
		patience := time.Minute
		if i%3 == 2 {
			patience = 100 * time.Millisecond
		}
		call, cancel := context.WithTimeout(context.WithoutCancel(ctx), patience)
		_, err := client.Runtime.CheckpointContainer(call, &cri.CheckpointContainerRequest{ContainerId: l.target.ID, Location: location})
		cancel()
		switch code := status.Code(err); {
		case code == codes.OK:
			l.archives.Add(1)
		case code == codes.DeadlineExceeded && patience < time.Minute:
			l.abandoned.Add(1)
		default:
			l.fail(fmt.Errorf("checkpoint: %w", err))
		}
		if gone := os.Remove(l.node.Path(location)); err == nil && gone != nil {
			l.fail(gone)
		}
	}
	return nil
}

// every waits for a time, and reports whether there is to be another round.
func every(ctx context.Context, period time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(period):
		return true
	}
}
