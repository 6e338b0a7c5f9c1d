package archive

import (
	"crypto/rand"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// What digests cost: the time in which an archive of 1 GiB is put together, and the processor time of that, which other
// load on the machine does not change.
func BenchmarkAssemble(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: an archive is root's")
	}
	dir, err := os.MkdirTemp("/var/tmp", "crishim-bench-") // on a disk
	if err != nil {
		b.Fatal(err)
	}
	defer os.RemoveAll(dir)
	pages := make([]byte, 1<<30)
	rand.Read(pages)
	for _, digests := range []bool{false, true} {
		b.Run(fmt.Sprintf("digests=%t", digests), func(b *testing.B) {
			b.SetBytes(int64(len(pages)))
			var processor time.Duration
			for b.Loop() {
				b.StopTimer()
				s := benchStaging(b, dir+"/a.tar", pages, digests)
				before := processorTime(b)
				b.StartTimer()
				if err := s.Assemble(b.Context(), Options{}, nil); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				processor += processorTime(b) - before
				if err := s.Remove(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			b.ReportMetric(processor.Seconds()/float64(b.N), "processor-s/op")
		})
	}
}

func benchStaging(b *testing.B, path string, pages []byte, digests bool) *Staging {
	l, err := OpenLocation(path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
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
	return s
}

func processorTime(b *testing.B) time.Duration {
	var usage unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &usage); err != nil {
		b.Fatal(err)
	}
	return time.Duration(usage.Utime.Nano() + usage.Stime.Nano())
}
