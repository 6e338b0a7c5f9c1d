// Command plot draws what test/bench has measured: plot DIR reads results.json there and writes the plots beside it, as SVG.
package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"image/color"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"gonum.org/v1/plot"
	"gonum.org/v1/plot/plotter"
	"gonum.org/v1/plot/vg"
)

// results is what is drawn of results.json, see test/bench/results.go.
type results struct {
	Checkpoints []struct {
		Name    string
		Samples map[string][]sample
	}
	Scale *struct {
		Sizes []struct {
			Memory  float64
			Seconds []float64
		}
		SlopePerGiB, Intercept float64
	}
	Relay *struct {
		Ways []struct {
			Name       string
			Unary, CPU []float64
		}
	}
}

// engines are the series of the plots of checkpoints, in this order.
var engines = []string{"criu dump alone", "runc checkpoint + tar", "containerd", "podman", "crishim", "crishim, zstd"}

// colors are Okabe and Ito's, which all can tell apart.
var colors = []color.Color{
	color.RGBA{0x99, 0x99, 0x99, 0xff}, color.RGBA{0xe6, 0x9f, 0x00, 0xff}, color.RGBA{0x56, 0xb4, 0xe9, 0xff},
	color.RGBA{0x00, 0x9e, 0x73, 0xff}, color.RGBA{0xd5, 0x5e, 0x00, 0xff}, color.RGBA{0xcc, 0x79, 0xa7, 0xff},
}

func main() {
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: plot DIR")
		os.Exit(2)
	}
	if err := run(os.Args[1]); err != nil {
		fmt.Fprintln(os.Stderr, "plot:", err)
		os.Exit(1)
	}
}

func run(dir string) error {
	content, err := os.ReadFile(filepath.Join(dir, "results.json"))
	if err != nil {
		return err
	}
	var r results
	if err := json.Unmarshal(content, &r); err != nil {
		return fmt.Errorf("parse results.json: %w", err)
	}
	return errors.Join(r.checkpoints(dir), r.memory(dir), r.relay(dir))
}

// sample is one checkpoint.
type sample struct{ Total, Frozen, Stall, Written, Size float64 }

// checkpoints draws each figure of an engine relative to one of CRIU alone, so that containers of all sizes fit into one plot.
func (r results) checkpoints(dir string) error {
	if len(r.Checkpoints) == 0 {
		return nil
	}
	for _, p := range []struct {
		name, title, axis string
		figure, base      func(sample) float64
	}{
		{"total", "Total time until durable", "criu dump alone = 1", func(s sample) float64 { return s.Total }, func(s sample) float64 { return s.Total }},
		{"frozen", "Longest stall that the workload saw", "frozen time of criu dump alone = 1", func(s sample) float64 { return s.Stall }, func(s sample) float64 { return s.Frozen }},
		{"written", "Bytes written", "bytes of CRIU's images = 1", func(s sample) float64 { return s.Written }, func(s sample) float64 { return s.Size }},
	} {
		var groups, series []string
		values := map[string][][]float64{}
		for _, row := range r.Checkpoints {
			groups = append(groups, strings.Replace(row.Name, ", ", ",\n", 1))
			base := median(figures(row.Samples[engines[0]], 1, p.base))
			for _, engine := range engines {
				var relative []float64
				if base > 0 {
					relative = figures(row.Samples[engine], base, p.figure)
				}
				values[engine] = append(values[engine], relative)
			}
		}
		for _, engine := range engines {
			if slices.ContainsFunc(values[engine], func(samples []float64) bool { return len(samples) > 0 }) {
				series = append(series, engine)
			}
		}
		if err := bars(filepath.Join(dir, p.name+".svg"), p.title, p.axis, groups, series, values); err != nil {
			return err
		}
	}
	return nil
}

// memory draws how time grows with memory.
func (r results) memory(dir string) error {
	if r.Scale == nil {
		return nil
	}
	p := plot.New()
	p.Title.Text, p.X.Label.Text, p.Y.Label.Text = "crishim, one process: total time until durable", "memory, GiB", "seconds"
	var points plotter.XYs
	largest := 0.0
	for _, size := range r.Scale.Sizes {
		gib := size.Memory / 1024
		largest = max(largest, gib)
		for _, seconds := range size.Seconds {
			points = append(points, plotter.XY{X: gib, Y: seconds})
		}
	}
	line, err := plotter.NewLine(plotter.XYs{{X: 0, Y: r.Scale.Intercept}, {X: largest, Y: r.Scale.Intercept + r.Scale.SlopePerGiB*largest}})
	if err != nil {
		return err
	}
	line.Color = colors[0]
	scatter, err := plotter.NewScatter(points)
	if err != nil {
		return err
	}
	scatter.Color = colors[4]
	p.Add(plotter.NewGrid(), line, scatter)
	p.Legend.Add(fmt.Sprintf("%.2f s + %.2f s/GiB", r.Scale.Intercept, r.Scale.SlopePerGiB), line)
	p.Legend.Top, p.Legend.Left = true, true
	p.X.Min, p.Y.Min = 0, 0
	return save(p, 5, filepath.Join(dir, "memory.svg"))
}

// relay draws what the ways to the runtime add to a call.
func (r results) relay(dir string) error {
	if r.Relay == nil {
		return nil
	}
	const added, processor = "added to the median", "processor time"
	var groups []string
	values := map[string][][]float64{}
	direct := 0.0
	for _, way := range r.Relay.Ways {
		if way.Name == "direct" {
			direct = median(way.Unary)
			continue
		}
		groups = append(groups, way.Name)
		values[added] = append(values[added], figures(way.Unary, 1e-6, func(s float64) float64 { return s - direct }))
		values[processor] = append(values[processor], figures(way.CPU, 1e-6, func(s float64) float64 { return s }))
	}
	return bars(filepath.Join(dir, "relay.svg"), "A call of 1 KiB through a proxy", "µs", groups, []string{added, processor}, values)
}

// bars draws for each group a bar for each of the series: the median, and a line over the middle half of what there is.
func bars(path, title, axis string, groups, series []string, values map[string][][]float64) error {
	const width = 0.13 // of the distance of two groups
	p := plot.New()
	p.Title.Text, p.Y.Label.Text, p.Y.Min = title, axis, 0
	inches := 2.2 * float64(len(groups))
	grid := plotter.NewGrid()
	grid.Vertical.Width = 0
	p.Add(grid)
	for i, name := range series {
		offset := width * (float64(i) - float64(len(series)-1)/2)
		var medians plotter.Values
		var spread struct {
			plotter.XYs
			plotter.YErrors
		}
		for group, samples := range values[name] {
			middle := median(samples)
			medians = append(medians, middle)
			if len(samples) == 0 {
				continue
			}
			sorted := slices.Sorted(slices.Values(samples))
			low, high := sorted[len(sorted)/4], sorted[len(sorted)-1-len(sorted)/4]
			spread.XYs = append(spread.XYs, plotter.XY{X: float64(group) + offset, Y: middle})
			spread.YErrors = append(spread.YErrors, struct{ Low, High float64 }{middle - low, high - middle})
		}
		chart, err := plotter.NewBarChart(medians, vg.Length(width*inches*0.85/float64(len(groups)))*vg.Inch)
		if err != nil {
			return err
		}
		chart.Color, chart.LineStyle.Width, chart.XMin = colors[i%len(colors)], 0, offset
		lines, err := plotter.NewYErrorBars(spread)
		if err != nil {
			return err
		}
		p.Add(chart, lines)
		p.Legend.Add(name, chart)
	}
	p.Legend.Top = true
	p.NominalX(groups...)
	p.X.Min, p.X.Max = -0.5, float64(len(groups))-0.5
	p.Y.Max *= 1.4 // room for the legend
	return save(p, inches, path)
}

func save(p *plot.Plot, inches float64, path string) error {
	p.BackgroundColor = color.White
	if err := p.Save(vg.Length(max(5, inches))*vg.Inch, 3.5*vg.Inch, path); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// figures takes one figure of each sample, in a unit.
func figures[S any](samples []S, unit float64, of func(S) float64) []float64 {
	var values []float64
	for _, s := range samples {
		values = append(values, of(s)/unit)
	}
	return values
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}
