package rootfs

import (
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
		if err := Diff(b.Context(), io.Discard, Layer{Upper: upper, Merged: upper}, func(string) error { return nil }); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/files, "µs/file")
}
