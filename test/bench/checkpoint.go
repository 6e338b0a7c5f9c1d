package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"crishim/test/node"
)

// sample is one checkpoint. Times are in seconds, sizes in bytes.
type sample struct {
	Total  float64 // until the result is durable
	Frozen float64 // as CRIU tells
	Stall  float64 // the longest that the workload has seen
	Size   int64   // of the result

	Written int64 // given to the kernel by the processes, also what was removed before it came to the disk
	Disk    int64 // that the device was given to write, until all was synced; 0 where that is not known
	Extra   int64 // most disk space taken at once

	Anon, Resident int64 // most memory taken at once, RssAnon and VmRSS of all processes but criu
}

// row is a shape with the samples of each engine, in the order of rounds.
type row struct {
	Shape   shape
	Name    string
	Samples map[string][]sample
}

// beds are the nodes in which containers are checkpointed.
type beds struct {
	containerd, podman *bed
}

// The crishim that compresses stands beside the other.
const (
	zstdName   = "crishim-zstd"
	zstdSocket = "/run/crishim-zstd/crishim.sock"
)

func makeBeds(ctx context.Context, d *disk, binary string) (_ *beds, err error) {
	b := &beds{}
	defer func() {
		if err != nil {
			err = errors.Join(err, b.close())
		}
	}()
	if b.containerd, err = makeBed(ctx, d, node.Containerd2); err != nil {
		return nil, err
	}
	if _, err = b.containerd.node.StartCrishim(ctx, binary); err != nil {
		return nil, err
	}
	if _, err = b.containerd.node.StartCrishimAt(ctx, zstdName, zstdSocket, binary, "--compression", "zstd"); err != nil {
		return nil, err
	}
	if b.podman, err = makePodmanBed(ctx, d); err != nil {
		return nil, err
	}
	return b, nil
}

func (b *beds) close() error {
	var errs []error
	for _, bed := range []*bed{b.containerd, b.podman} {
		if bed != nil {
			errs = append(errs, bed.close())
		}
	}
	return errors.Join(errs...)
}

func makePodmanBed(ctx context.Context, d *disk) (*bed, error) {
	b, err := makeBed(ctx, d, node.Podman)
	if err != nil {
		return nil, err
	}
	if err := b.node.ConfigurePodman(); err != nil {
		return nil, errors.Join(err, b.close())
	}
	return b, nil
}

// runPodman starts a container of podman's, and waits until it holds what it is to hold.
func (b *bed) runPodman(ctx context.Context, name string, s shape) (_ *container, err error) {
	args := append([]string{"run", "--detach", "--name", name, "--network", "none", "--log-driver", "k8s-file", "127.0.0.1:5000/workload:1"}, s.command()...)
	out, err := b.node.Output(ctx, "podman", args...)
	if err != nil {
		return nil, err
	}
	c := &container{
		bed: b, id: strings.TrimSpace(out),
		log: func(ctx context.Context) (string, error) { return b.node.Output(ctx, "podman", "logs", name) },
		remove: func(ctx context.Context) error {
			_, err := b.node.Output(ctx, "podman", "rm", "--force", "--time", "1", name)
			return err
		},
	}
	pid, err := b.node.Output(ctx, "podman", "inspect", "--format", "{{.State.Pid}}", name)
	if err == nil {
		c.pid, err = strconv.Atoi(strings.TrimSpace(pid))
	}
	if err == nil {
		err = c.settle(ctx)
	}
	if err != nil {
		return nil, errors.Join(err, c.remove(context.WithoutCancel(ctx)))
	}
	return c, nil
}

// checkpointShape has the engines checkpoint a container of a shape, a number of rounds, each time in another order. turns says how often each
// has its turn in a round.
func (b *beds) checkpointShape(ctx context.Context, s shape, rounds int, turns func(engine) int) (_ *row, err error) {
	var all []engine
	for n, some := 1, true; some; n++ {
		some = false
		for _, e := range engines() {
			if turns(e) >= n {
				all, some = append(all, e), true
			}
		}
	}
	of, err := b.containerd.run(ctx, "load", s)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, of.remove(context.WithoutCancel(ctx))) }()
	podmans := of
	if slices.ContainsFunc(all, func(e engine) bool { return e.podman }) {
		if podmans, err = b.podman.runPodman(ctx, "load", s); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, podmans.remove(context.WithoutCancel(ctx))) }()
	}
	r := &row{Shape: s, Name: s.String(), Samples: map[string][]sample{}}
	for round := range rounds {
		for _, i := range order(round, 0, len(all)) {
			e := all[i]
			c := of
			if e.podman {
				c = podmans
			}
			got, err := e.measure(ctx, c)
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w", e.name, s, err)
			}
			say("%s, round %d: %-22s %6.2f s, frozen %5.0f ms, stall %5.0f ms, written %.2f×", s, round+1, e.name,
				got.Total, got.Frozen*1e3, got.Stall*1e3, float64(got.Written)/float64(got.Size))
			r.Samples[e.name] = append(r.Samples[e.name], got)
		}
	}
	return r, nil
}

// order is that in which a number of things have their turn at a part of a round: another one each time, so that nobody always comes after the
// same one, whose traces in caches it would bear, and the same in each run.
func order(round, part, number int) []int {
	return rand.New(rand.NewPCG(uint64(round), uint64(part))).Perm(number)
}

// measure makes one checkpoint and removes it.
func (e engine) measure(ctx context.Context, c *container) (s sample, err error) {
	for _, dir := range []string{imagesDir, workDir} {
		if err := os.MkdirAll(filepath.Join(c.bed.out, filepath.Base(dir)), 0o700); err != nil {
			return s, err
		}
	}
	defer func() { err = errors.Join(err, os.RemoveAll(c.bed.out)) }()
	if err := os.Chmod(c.bed.out, 0o700); err != nil {
		return s, err
	}
	checkpoint, processes, err := e.prepare(ctx, c)
	if err != nil {
		return s, err
	}
	d := c.bed.disk
	if err := d.settle(ctx); err != nil {
		return s, err
	}
	if _, err := c.stall(ctx); err != nil {
		return s, err
	}
	written, err := bytesWritten(processes...)
	if err != nil {
		return s, err
	}
	disk, err := d.written()
	if err != nil {
		return s, err
	}
	meter, err := look(d, processes)
	if err != nil {
		return s, err
	}
	start := time.Now()
	err = checkpoint(ctx)
	if err == nil {
		s.Size, err = e.durable(c)
	}
	s.Total = time.Since(start).Seconds()
	most, meterErr := meter.end()
	if err := errors.Join(err, meterErr); err != nil {
		return s, err
	}
	s.Extra, s.Anon, s.Resident = most.disk, most.anon, most.resident
	stall, err := c.stall(ctx)
	if err != nil {
		return s, err
	}
	s.Stall = stall.Seconds()
	after, err := bytesWritten(processes...)
	if err != nil {
		return s, err
	}
	s.Written = after - written
	if err := d.sync(); err != nil {
		return s, err
	}
	diskAfter, err := d.written()
	if err != nil {
		return s, err
	}
	s.Disk = diskAfter - disk
	frozen, err := e.frozen(c)
	s.Frozen = frozen.Seconds()
	return s, err
}
