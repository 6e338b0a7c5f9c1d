package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// scale is how crishim behaves with more of the same.
type scale struct {
	// Sizes are single containers, with the median total time of each.
	Sizes []sizeTime
	// Seconds for each further GiB, by least squares, and how much of the variance that explains.
	SlopePerGiB, Intercept, RSquared float64
	// Containers of 64 MiB are checkpointed at once, by each engine.
	Containers int
	AtOnce     map[string][]float64 // seconds until all are durable
	Failed     map[string]int       // rounds in which somebody else's checkpoints failed
}

type sizeTime struct {
	Memory  int // MiB
	Seconds []float64
}

func (b *beds) measureScale(ctx context.Context, s settings) (*scale, error) {
	sizes, rounds, containers := []int{64, 256, 1024, 2048, 4096, 8192}, 3, 20
	if s.short {
		sizes, rounds, containers = []int{64, 128, 256}, 2, 5
	}
	result := &scale{Containers: containers}
	for _, size := range sizes {
		row, err := b.checkpointShape(ctx, shape{Memory: size, Processes: 1}, rounds, func(e engine) int {
			if e.name == crishim {
				return 1
			}
			return 0
		})
		if err != nil {
			return nil, err
		}
		of := sizeTime{Memory: size}
		for _, sample := range row.Samples[crishim] {
			of.Seconds = append(of.Seconds, sample.Total)
		}
		result.Sizes = append(result.Sizes, of)
	}
	result.SlopePerGiB, result.Intercept, result.RSquared = fitLine(result.Sizes)
	return result, b.containerd.atOnce(ctx, result, rounds)
}

// fitLine fits a line through the medians.
func fitLine(sizes []sizeTime) (slope, intercept, r2 float64) {
	n := float64(len(sizes))
	var sx, sy, sxx, sxy, syy float64
	for _, s := range sizes {
		x, y := float64(s.Memory)/1024, median(s.Seconds)
		sx, sy, sxx, sxy, syy = sx+x, sy+y, sxx+x*x, sxy+x*y, syy+y*y
	}
	slope = (n*sxy - sx*sy) / (n*sxx - sx*sx)
	r := n*sxy - sx*sy
	return slope, (sy - slope*sx) / n, r * r / ((n*sxx - sx*sx) * (n*syy - sy*sy))
}

// atOnce has crishim and containerd checkpoint a number of containers at once.
func (b *bed) atOnce(ctx context.Context, result *scale, rounds int) (err error) {
	number := result.Containers
	result.AtOnce, result.Failed = map[string][]float64{}, map[string]int{}
	var all []*container
	defer func() {
		for _, c := range all {
			err = errors.Join(err, c.remove(context.WithoutCancel(ctx)))
		}
	}()
	for i := range number {
		c, err := b.run(ctx, fmt.Sprintf("load-%d", i), shape{Memory: 64, Processes: 1})
		if err != nil {
			return err
		}
		all = append(all, c)
	}
	own, err := b.node.DialCRI(node.CrishimSocket)
	if err != nil {
		return err
	}
	defer own.Close()
	for range rounds {
		for name, client := range map[string]*node.Client{crishim: own, containerd: b.client} {
			if err := b.disk.settle(ctx); err != nil {
				return err
			}
			seconds, err := b.allAtOnce(ctx, client, all, name == crishim)
			switch {
			case err == nil:
				say("%d containers of 64 MiB at once: %-22s %6.2f s", number, name, seconds)
				result.AtOnce[name] = append(result.AtOnce[name], seconds)
			case name == crishim, ctx.Err() != nil:
				return fmt.Errorf("%s of %d containers: %w", name, number, err)
			default: // which takes nothing from the other figures
				say("%d containers of 64 MiB at once: %-22s failed: %v", number, name, err)
				result.Failed[name]++
			}
		}
	}
	return nil
}

func (b *bed) allAtOnce(ctx context.Context, client *node.Client, all []*container, syncs bool) (seconds float64, err error) {
	if err := os.MkdirAll(b.out, 0o700); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.out)) }()
	errs := make([]error, len(all))
	var calls sync.WaitGroup
	start := time.Now()
	for i, c := range all {
		calls.Go(func() {
			_, errs[i] = client.Runtime.CheckpointContainer(ctx, &cri.CheckpointContainerRequest{
				ContainerId: c.id, Location: fmt.Sprintf("%s/checkpoint-%d.tar", outDir, i),
			})
		})
	}
	calls.Wait()
	if err := errors.Join(errs...); err != nil {
		return 0, err
	}
	if !syncs {
		if _, err := syncTree(b.out); err != nil {
			return 0, err
		}
	}
	return time.Since(start).Seconds(), nil
}
