// Package soak keeps crishim busy for a long time, and looks whether it takes more and more of anything: 200 calls a second, pods that come
// and go, and a checkpoint every five seconds.
package soak

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

var minutes = flag.Float64("minutes", 3, "how long crishim is kept busy after the warm-up")

// warmUp is how long everything goes on before it is measured: until Go's heap, containerd's database and the caches have their size.
const warmUp = 15 * time.Second

func TestSoak(t *testing.T) {
	binary := node.Crishim(t)
	n := node.StartContainerdFor(t, node.Options{})
	crishim, err := n.StartCrishim(t.Context(), binary)
	if err != nil {
		t.Fatal(err)
	}
	client := n.Client(t, node.ContainerdSocket)
	target := client.Run(t, node.Spec{Name: "target"})
	l := &load{node: n, target: target}
	if err := os.Mkdir(n.Path(checkpoints), 0o700); err != nil {
		t.Fatal(err)
	}
	// What the first pod and the first checkpoint make for those to come, such as the bridge and a connection, is no leak.
	l.first(t, node.CrishimSocket)
	before := idle(t, n, crishim.Pid())

	ctx, cancel := context.WithTimeout(t.Context(), warmUp+time.Duration(*minutes*float64(time.Minute)))
	defer cancel()
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.run(ctx)
	}()
	every(ctx, warmUp)
	calls, start := l.calls.Load(), time.Now()
	series, err := sample(ctx, n, crishim.Pid())
	rate := float64(l.calls.Load()-calls) / time.Since(start).Seconds()
	cancel()
	<-done
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%.0f calls/s, %d pods, %d checkpoints, %d given up", rate, l.pods.Load(), l.archives.Load(), l.abandoned.Load())
	if l.archives.Load() == 0 || l.abandoned.Load() == 0 || l.pods.Load() == 0 {
		t.Error("there was not everything that there should have been")
	}
	if len(l.failures) > 0 {
		t.Errorf("%d failed that do not without crishim: %v", len(l.failures), errors.Join(l.failures[:min(10, len(l.failures))]...))
	}
	node.WaitMore(t, target.Log)

	for i, r := range resources {
		by, limit := rise(series[i], r.floor)
		t.Logf("%s: rises by %g, limit %g; %s", r.name, by, limit, describe(series[i]))
		if by > limit {
			t.Errorf("%s: rises by %g from the first third to the last, more than %g: %v", r.name, by, limit, series[i])
		}
	}
	// What is left of a hundred pods and a few checkpoints shows to the last piece when nothing goes on.
	t.Run("nothing is left", func(t *testing.T) {
		after := idle(t, n, crishim.Pid())
		for name, value := range before {
			if after[name] > value {
				t.Errorf("%s: %g, before %g", name, after[name], value)
			}
		}
		if left := n.Listing(t, checkpoints); left != "" {
			t.Errorf("%s holds\n%s", checkpoints, left)
		}
		fresh, err := n.StartCrishimAt(t.Context(), "fresh", "/run/crishim/fresh.sock", binary)
		if err != nil {
			t.Fatal(err)
		}
		l.first(t, "/run/crishim/fresh.sock")
		idle(t, n, fresh.Pid())
		if got, want := goroutines(t, n, crishim, "crishim"), goroutines(t, n, fresh, "fresh"); len(got) > len(want) {
			t.Errorf("%d goroutines, a fresh crishim has %d:\n%s", len(got), len(want), strings.Join(got, "\n\n"))
		}
	})
}

// idle measures what is exact when nothing goes on, once it no longer changes.
func idle(t *testing.T, n *node.Node, crishim int) map[string]float64 {
	t.Helper()
	exact := map[string]bool{"descriptors": true, "cgroups": true, "mounts": true, "processes": true}
	measure := func() map[string]float64 {
		values := map[string]float64{}
		for _, r := range resources {
			if !exact[r.name] {
				continue
			}
			value, err := r.measure(n, crishim)
			if err != nil {
				t.Fatalf("measure %s: %v", r.name, err)
			}
			values[r.name] = value
		}
		return values
	}
	// A removed pod's shim ends a moment later.
	last, same := measure(), 0
	for deadline := time.Now().Add(time.Minute); same < 10; time.Sleep(200 * time.Millisecond) {
		now := measure()
		same++
		if fmt.Sprint(now) != fmt.Sprint(last) {
			last, same = now, 0
		}
		if time.Now().After(deadline) {
			t.Fatalf("the node does not come to rest: %v", last)
		}
	}
	return last
}

// first has a pod come and go through a crishim, and makes one checkpoint.
func (l *load) first(t *testing.T, socket string) {
	t.Helper()
	client, err := l.node.DialCRI(socket)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	location := filepath.Join(checkpoints, "first.tar")
	_, err = client.Runtime.CheckpointContainer(t.Context(), &cri.CheckpointContainerRequest{ContainerId: l.target.ID, Location: location})
	if err := errors.Join(live(t.Context(), client), err, os.Remove(l.node.Path(location))); err != nil {
		t.Fatal(err)
	}
}

// goroutines ends a crishim in the way in which Go writes the stacks of all goroutines, and returns those that are not Go's own.
func goroutines(t *testing.T, n *node.Node, crishim *node.Daemon, name string) []string {
	t.Helper()
	if err := crishim.Signal(unix.SIGQUIT); err != nil {
		t.Fatal(err)
	}
	<-crishim.Done()
	_, log, _ := strings.Cut(n.Logs(), "--- "+name+".log\n")
	log, _, _ = strings.Cut(log, "\n--- ")
	var all []string
	for stack := range strings.SplitSeq(log, "\n\n") {
		// Go's own, such as those of the garbage collector, come with time.
		if strings.HasPrefix(stack, "goroutine ") && strings.Contains(stack, "\ncreated by ") && !strings.Contains(stack, "\ncreated by runtime.") {
			all = append(all, stack)
		}
	}
	if len(all) == 0 {
		t.Fatalf("%s has not written its stacks", name)
	}
	return all
}
