package main

import (
	"math"
	"slices"
	"strings"
	"testing"
)

func TestMedian(t *testing.T) {
	for _, test := range []struct {
		values []float64
		want   float64
	}{
		{nil, 0}, {[]float64{3}, 3}, {[]float64{9, 1, 2}, 2}, {[]float64{4, 1, 3, 2}, 2.5},
	} {
		if got := median(test.values); got != test.want {
			t.Errorf("median of %v is %v, want %v", test.values, got, test.want)
		}
	}
}

func TestFitLine(t *testing.T) {
	slope, intercept, r2 := fitLine([]sizeTime{{1024, []float64{3}}, {2048, []float64{5, 5, 100}}, {4096, []float64{9}}})
	for _, figure := range []struct{ got, want float64 }{{slope, 2}, {intercept, 1}, {r2, 1}} {
		if math.Abs(figure.got-figure.want) > 1e-9 {
			t.Errorf("line is %v + %v a GiB, R² %v; want 1 + 2, R² 1", intercept, slope, r2)
		}
	}
}

// A figure just on the right side of its bar reaches it, one just on the other side does not.
func TestBars(t *testing.T) {
	const gib = 1 << 30
	floor := sample{Total: 1, Frozen: 0.1, Size: gib}
	good := sample{Total: 1.14, Frozen: 0.109, Stall: 0.119, Size: gib, Written: gib * 104 / 100, Extra: gib * 104 / 100}
	bad := sample{Total: 1.16, Frozen: 0.111, Stall: 0.121, Size: gib, Written: gib * 106 / 100, Extra: gib * 106 / 100}
	for _, test := range []struct {
		own  sample
		want bool
	}{{good, true}, {bad, false}} {
		r := row{Shape: shape{Memory: 1024, Processes: 1}, Name: "1 GiB", Samples: map[string][]sample{
			criuAlone: {floor}, crishim: {test.own},
			containerd: {{Total: 4 * test.own.Total}}, runcAndTar: {{Total: 1.7 * test.own.Total}},
		}}
		if !test.want { // those that are to be slower by a factor
			r.Samples[containerd][0].Total *= 0.99
			r.Samples[runcAndTar][0].Total *= 0.99
		}
		bars := r.bars("ext4 on something")
		if len(bars) != 7 {
			t.Errorf("got %d bars, want 7: %v", len(bars), bars)
		}
		for _, b := range bars {
			if b.Reached != test.want {
				t.Errorf("%s: saw %s, bar %s, reached is %t", b.What, b.Got, b.Want, b.Reached)
			}
		}
		small := row{Shape: shape{Memory: 64, Processes: 1}, Name: "64 MiB", Samples: map[string][]sample{criuAlone: {floor}, crishim: {test.own}}}
		for fileSystem, want := range map[string]bool{"tmpfs": false, "ext4 on something": false, "xfs on something": true, "btrfs on something": true} {
			has := slices.ContainsFunc(small.bars(fileSystem), func(b bar) bool { return strings.Contains(b.What, "bytes written") })
			if has != want {
				t.Errorf("there is a bar for bytes written of a small container on %s: %t, want %t", fileSystem, has, want)
			}
		}
	}
}
