package soak

import (
	"cmp"
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"testing"
)

// rise says by how much a series of measurements rises, and how much it would have to rise for that to be a leak.
//
// It compares the medians of the first and the last third. One that rises steadily by x has them 2x/3 apart, and in each third half of the
// values within x/6: the spread. So a steady rise is four times the spread, whatever its size, and is found. Without one, the medians of a
// noisy series differ by a fraction of its spread, and those of one that jumps to and fro, as with each pod that comes and goes, by the
// size of a jump at most, which then is the spread, too. floor is what may be added once and for all, as by an allocator
// that takes memory in large pieces.
func rise(series []float64, floor float64) (by, limit float64) {
	third := len(series) / 3
	first, last := slices.Sorted(slices.Values(series[:third])), slices.Sorted(slices.Values(series[len(series)-third:]))
	return quantile(last, 0.5) - quantile(first, 0.5), max(floor, spread(first), spread(last))
}

// spread is the distance between the quartiles.
func spread(sorted []float64) float64 { return quantile(sorted, 0.75) - quantile(sorted, 0.25) }

func quantile[T cmp.Ordered](sorted []T, q float64) T {
	return sorted[int(q*float64(len(sorted)-1)+0.5)]
}

func TestRise(t *testing.T) {
	noise := rand.New(rand.NewPCG(1, 2))
	for _, test := range []struct {
		name  string
		value func(i int) float64
		leaks bool
	}{
		{"constant", func(int) float64 { return 7 }, false},
		{"noisy", func(int) float64 { return 1000 + 100*noise.NormFloat64() }, false},
		{"a saw", func(i int) float64 { return float64(i % 17) }, false},
		{"to and fro", func(int) float64 { return float64(6 * noise.IntN(2)) }, false},
		{"falls", func(i int) float64 { return -float64(i) }, false},
		{"rises once by less than the floor", func(i int) float64 { return float64(i / 45) }, false},
		{"approaches its level", func(i int) float64 { return 3 - 3*math.Exp(-float64(i)/10) }, false},
		{"rises", func(i int) float64 { return float64(i) }, true},
		{"rises by steps", func(i int) float64 { return float64(i / 5) }, true},
		{"rises in noise", func(i int) float64 { return float64(i) + 10*noise.NormFloat64() }, true},
		{"a saw that rises", func(i int) float64 { return float64(i%5) + float64(i/5) }, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			for try := range 100 {
				series := make([]float64, 90)
				for i := range series {
					series[i] = test.value(i)
				}
				if by, limit := rise(series, 2); by > limit != test.leaks {
					t.Fatalf("try %d: rises by %g, limit %g", try, by, limit)
				}
			}
		})
	}
}

// describe is a series in one line.
func describe(series []float64) string {
	sorted := slices.Sorted(slices.Values(series))
	return fmt.Sprintf("%g to %g, median %g", sorted[0], sorted[len(sorted)-1], quantile(sorted, 0.5))
}
