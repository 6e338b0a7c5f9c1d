package main

import (
	"fmt"
	"strings"
)

// bar is something that is to be reached. One that this run has not measured is not among the results.
type bar struct {
	What    string
	Got     string
	Want    string
	Reached bool
}

const (
	mebi = 1 << 20
	// slack is what a frozen time may be longer by whatever its length.
	slack      = 0.005
	stallSlack = 0.010
)

// bars compares what was measured with what is to be reached.
func (r *results) bars() []bar {
	var all []bar
	for _, row := range r.Checkpoints {
		all = append(all, row.bars(r.Machine.FileSystem)...)
	}
	if r.Relay != nil {
		all = append(all, r.Relay.bars()...)
	}
	return all
}

func atMost(what string, got, want float64, unit string) bar {
	return bar{what, fmt.Sprintf("%.2f%s", got, unit), fmt.Sprintf("≤ %.2f%s", want, unit), got <= want}
}

func atLeast(what string, got, want float64, unit string) bar {
	return bar{what, fmt.Sprintf("%.2f%s", got, unit), fmt.Sprintf("≥ %.2f%s", want, unit), got >= want}
}

func (r row) bars(fileSystem string) []bar {
	of := func(engine string, figure func(sample) float64) float64 {
		return median(column(r.Samples[engine], figure))
	}
	has := func(engine string) bool { return len(r.Samples[engine]) > 0 }
	if !has(crishim) {
		return nil
	}
	var all []bar
	name := r.Name + ": "
	layer := r.Shape.Layer > 0
	one, four := r.Shape.Processes == 1 && !layer, r.Shape.Processes == 4 && !layer
	large := r.Shape.Memory >= 1024
	shares := strings.HasPrefix(fileSystem, "xfs") || strings.HasPrefix(fileSystem, "btrfs")
	ext4 := strings.HasPrefix(fileSystem, "ext4")

	if has(criuAlone) {
		ratio := of(crishim, total) / of(criuAlone, total)
		switch {
		case one && r.Shape.Memory == 1024:
			all = append(all, atMost(name+"total, crishim / criu dump alone and fsync", ratio, 1.15, "×"))
		case four && large:
			all = append(all, atMost(name+"total, crishim / criu dump alone and fsync", ratio, 1.4, "×"))
		}
		// Nothing changes the layer meanwhile: nothing is to be copied for which the container would have to stand still.
		all = append(all, atMost(name+"frozen, crishim, against criu dump alone × 1.05 + 5 ms", of(crishim, frozen)*1e3, (of(criuAlone, frozen)*1.05+slack)*1e3, " ms"))
		if !layer {
			all = append(all, atMost(name+"longest stall, against frozen of criu dump alone × 1.1 + 10 ms", of(crishim, stall)*1e3, (of(criuAlone, frozen)*1.1+stallSlack)*1e3, " ms"))
		}
		want := 0.0
		switch {
		case shares, ext4 && one && large:
			want = 1.05
		case ext4 && four && large:
			want = 1.8
		}
		if want > 0 {
			images, what := of(criuAlone, size), "CRIU's images"
			if layer { // which is written, too
				images, what = of(crishim, size), "the archive"
			}
			all = append(all,
				atMost(name+"bytes written / bytes of "+what, of(crishim, written)/images, want, "×"),
				atMost(name+"most disk space beyond before / size of the archive", of(crishim, extra)/of(crishim, size), want, "×"))
		}
	}
	if one && r.Shape.Memory == 1024 {
		if has(containerd) {
			all = append(all, atLeast(name+"total, containerd / crishim", of(containerd, total)/of(crishim, total), 4, "×"))
		}
		if has(runcAndTar) {
			all = append(all, atLeast(name+"total, runc checkpoint + tar / crishim", of(runcAndTar, total)/of(crishim, total), 1.7, "×"))
		}
	}
	if one && r.Shape.Memory == 4096 {
		all = append(all, atMost(name+"RssAnon of daemon and helper", of(crishim, anon)/mebi, 24, " MiB"))
	}
	return all
}

func (r *relayResults) bars() []bar {
	ways := map[string]wayResult{}
	for _, w := range r.Ways {
		ways[w.Name] = w
	}
	own, straight := ways[crishim], ways[direct]
	added := func(name string) float64 { return median(ways[name].Unary) - median(straight.Unary) }
	return []bar{
		atMost("relay, 1 KiB: added median, crishim / byte copy", added(crishim)/added(byteCopy), 1.15, "×"),
		atMost("relay, 1 KiB: added median, crishim / grpc-go with a raw codec", added(crishim)/added(rawProxy), 0.5, "×"),
		atLeast("relay, 1 KiB, 16 callers: calls a second, crishim / direct", median(own.Unary16)/median(straight.Unary16), 0.85, "×"),
		atLeast("relay, 1 MiB, 4 callers: calls a second, crishim / direct", median(own.List4)/median(straight.List4), 0.9, "×"),
		atMost(fmt.Sprintf("relay: a call succeeds after the runtime's return, which was gone for %.0f s", r.Gone), own.Recovery, 3.5, " s"),
		atMost("relay: RssAnon of the daemon", float64(own.Anon)/mebi, 12, " MiB"),
	}
}
