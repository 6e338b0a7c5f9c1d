package archive

import (
	"crypto/rand"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"crishim/test/disks"
)

// What an archive of 1 GiB costs until it is on the disk, on each file system, with and without digests, in one image and in four: time, the
// processor time of that, bytes written to disk, and room taken beyond that of what was staged.
func BenchmarkAssemble(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root: an archive is root's")
	}
	pages := make([]byte, 1<<30)
	rand.Read(pages)
	for _, fs := range fileSystems {
		for _, images := range []int{1, 4} {
			for _, options := range []Options{{}, {Digest: None}, {Compression: Zstd}} {
				b.Run(fmt.Sprintf("%s/images=%d/%s%s", fs.name, images, options.Compression, options.Digest), func(b *testing.B) {
					dir := disks.Mount(b, fs.mkfs, 5<<10)
					b.SetBytes(int64(len(pages)))
					var processor time.Duration
					var written, room int64
					for b.Loop() {
						b.StopTimer()
						unix.Sync()
						start := diskWrites(b, dir)
						s := benchStaging(b, dir+"/a.tar", pages, images)
						staged, most := disks.Used(b, dir), int64(0)
						before := processorTime(b)
						b.StartTimer()
						if err := s.Assemble(b.Context(), options, func(int64) { most = max(most, disks.Used(b, dir)) }); err != nil {
							b.Fatal(err)
						}
						if err := s.Publish(b.Context()); err != nil {
							b.Fatal(err)
						}
						b.StopTimer()
						processor += processorTime(b) - before
						room += most - staged
						written += diskWrites(b, dir) - start
						if err := os.Remove(dir + "/a.tar"); err != nil {
							b.Fatal(err)
						}
						b.StartTimer()
					}
					b.ReportMetric(processor.Seconds()/float64(b.N), "processor-s/op")
					b.ReportMetric(float64(written)/float64(b.N)/float64(len(pages)), "written/size")
					b.ReportMetric(float64(room)/float64(b.N)/float64(len(pages)), "room/size")
				})
			}
		}
	}
}

// diskWrites is how many bytes the loop device below a file system has been given to write; 0 for tmpfs.
func diskWrites(b *testing.B, dir string) int64 {
	out, err := exec.Command("findmnt", "--noheadings", "--output", "SOURCE", dir).Output()
	if err != nil {
		b.Fatal(err)
	}
	data, err := os.ReadFile("/sys/block/" + filepath.Base(strings.TrimSpace(string(out))) + "/stat")
	if os.IsNotExist(err) {
		return 0
	}
	if err != nil {
		b.Fatal(err)
	}
	sectors, err := strconv.ParseInt(strings.Fields(string(data))[6], 10, 64) // Documentation/block/stat.rst
	if err != nil {
		b.Fatal(err)
	}
	return sectors * 512
}

func benchStaging(b *testing.B, path string, pages []byte, images int) *Staging {
	l, err := OpenLocation(path)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { l.Close() })
	s, err := l.Stage(StagingName())
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Remove() })
	for n := range images {
		size := len(pages) / images
		if err := s.WriteFile(fmt.Sprintf("checkpoint/pages-%d.img", n+1), pages[n*size:(n+1)*size]); err != nil {
			b.Fatal(err)
		}
	}
	if err := s.WriteJSON(ManifestName, NewManifest(Origin{})); err != nil {
		b.Fatal(err)
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
