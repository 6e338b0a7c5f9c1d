package archive

import (
	"crypto/rand"
	"fmt"
	"os"
	"testing"
	"time"
)

// What digests cost: the time from staged to published of an archive of 1 GiB, with and without a manifest.
func BenchmarkAssemble(b *testing.B) {
	dir, err := os.MkdirTemp("/var/tmp", "crishim-bench-")
	if err != nil {
		b.Skip(err)
	}
	defer os.RemoveAll(dir)
	if os.Geteuid() != 0 {
		b.Skip("needs root: an archive is root's")
	}
	pages := make([]byte, 1<<30)
	rand.Read(pages)
	for _, digests := range []bool{false, true} {
		b.Run(fmt.Sprintf("digests=%t", digests), func(b *testing.B) {
			var assemble time.Duration
			for b.Loop() {
				b.StopTimer()
				path := dir + "/a.tar"
				os.Remove(path)
				l, err := OpenLocation(path)
				if err != nil {
					b.Fatal(err)
				}
				s, err := l.Stage(StagingName())
				if err != nil {
					b.Fatal(err)
				}
				if err := s.WriteFile("checkpoint/pages-1.img", pages); err != nil {
					b.Fatal(err)
				}
				if digests {
					if err := s.WriteJSON(ManifestName, NewManifest(Origin{})); err != nil {
						b.Fatal(err)
					}
				}
				b.StartTimer()
				start := time.Now()
				if err := s.Assemble(b.Context(), nil); err != nil {
					b.Fatal(err)
				}
				assemble += time.Since(start)
				if err := s.Publish(b.Context()); err != nil {
					b.Fatal(err)
				}
				l.Close()
			}
			b.ReportMetric(assemble.Seconds()/float64(b.N), "s/assemble")
		})
	}
}
