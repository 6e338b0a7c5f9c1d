package rootfs

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"testing"
)

// A container is frozen for as long as this takes.
func BenchmarkSmallFiles(b *testing.B) {
	const files, directories = 20_000, 100
	dir := b.TempDir()
	for i := range directories {
		if err := os.Mkdir(fmt.Sprintf("%s/%d", dir, i), 0o755); err != nil {
			b.Fatal(err)
		}
	}
	for i := range files {
		if err := os.WriteFile(fmt.Sprintf("%s/%d/%d", dir, i%directories, i), []byte("some content"), 0o644); err != nil {
			b.Fatal(err)
		}
	}
	upper, err := os.Open(dir)
	if err != nil {
		b.Fatal(err)
	}
	defer upper.Close()
	for b.Loop() {
		if err := diff(b.Context(), io.Discard, Layer{Upper: upper, Merged: upper}, func(string) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/files, "µs/file")
}

// A container is frozen for as long as the second pass takes, here over a layer that has not changed since the first.
func BenchmarkFinish(b *testing.B) {
	for _, test := range []struct {
		name          string
		files, perDir int
		size          int64
	}{
		{"100,000 files", 100_000, 20, 12},
		{"100,000 files in one directory", 100_000, 100_000, 12},
		{"1 GiB", 16, 16, 64 << 20},
	} {
		b.Run(test.name, func(b *testing.B) {
			dir := b.TempDir()
			content := bytes.Repeat([]byte("some content"), int(test.size+11)/12)[:test.size]
			for i := range test.files {
				d := fmt.Sprintf("%s/%d", dir, i/test.perDir)
				if i%test.perDir == 0 {
					if err := os.Mkdir(d, 0o755); err != nil {
						b.Fatal(err)
					}
				}
				if err := os.WriteFile(fmt.Sprintf("%s/%d", d, i), content, 0o644); err != nil {
					b.Fatal(err)
				}
			}
			upper, err := os.Open(dir)
			if err != nil {
				b.Fatal(err)
			}
			defer upper.Close()
			layer := Layer{Upper: upper, Merged: upper}
			deleted := func(string) error { return nil }
			b.Run("one pass", func(b *testing.B) {
				for b.Loop() {
					b.StopTimer()
					c := newTestCopy(b, layer)
					b.StartTimer()
					if _, err := c.Finish(b.Context(), deleted); err != nil {
						b.Fatal(err)
					}
				}
			})
			b.Run("second of two", func(b *testing.B) {
				tick(b)
				for b.Loop() {
					b.StopTimer()
					c := newTestCopy(b, layer)
					if err := c.Begin(b.Context()); err != nil {
						b.Fatal(err)
					}
					b.StartTimer()
					if _, err := c.Finish(b.Context(), deleted); err != nil {
						b.Fatal(err)
					}
				}
				b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(test.files), "ns/file")
			})
		})
	}
}
