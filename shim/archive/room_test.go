package archive

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"crishim/test/disks"
)

// What Assemble takes is no more than Extra says. With less, it fails at one moment or another, in the middle of inserting as well as of copying, and
// nothing is left.
func TestRoomForAssembling(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount file systems")
	}
	noise := make([]byte, 24<<20)
	rand.Read(noise)
	staged := []int64{20 << 20, 12<<20 + 77, 4 << 20}
	const layer = 6 << 20
	for _, fs := range fileSystems {
		if fs.name == "ext4 of clusters" || fs.name == "ext4 of 1 KiB" {
			continue // as ext4
		}
		for _, options := range []Options{{}, {Compression: Zstd}} {
			if options.Compression == Zstd && fs.name != "ext4" {
				continue // the same everywhere
			}
			t.Run(fs.name+" "+options.Compression, func(t *testing.T) {
				mkfs := fs.mkfs
				if strings.HasPrefix(fs.name, "ext4") {
					mkfs = append(slices.Clone(mkfs), "-m", "0") // nothing for root, which may use more than is free
				}
				dir := disks.Mount(t, mkfs, 320)
				for _, share := range []int64{100, 60, 30, 5} { // of Extra, in per cent
					l, err := OpenLocation(dir + "/a.tar")
					must(t, err)
					s, err := l.Stage(StagingName())
					must(t, err)
					for i, size := range staged {
						must(t, s.WriteFile(fmt.Sprintf("checkpoint/pages-%d.img", i), noise[i*777:][:size]))
					}
					scratch, err := s.Scratch()
					must(t, err)
					_, err = scratch.Write(noise[:layer])
					must(t, err)
					must(t, s.Compose(RootfsDiff, []Segment{{scratch, 0, layer}}))
					if total, used := staged[0]+staged[1]+staged[2]+layer, s.Used(); used < total || used > 2*total { // XFS reserves more
						t.Errorf("%d bytes are staged, and Used says %d", total, used)
					}
					extra := s.Extra(options, staged, layer)
					method, err := l.Method()
					must(t, err)
					if same := method.Extra(options, staged, layer); same != extra && method.known {
						t.Errorf("by Method it is %d bytes more, and %d in truth", same, extra)
					}
					if method.known && (method.can.insert != fs.insert || method.can.clone != fs.clone) {
						t.Errorf("the method is %s", method)
					}
					ballast(t, s, dir, extra*share/100+3<<20)
					err = s.Assemble(t.Context(), options, nil)
					if err != nil && !errors.Is(err, unix.ENOSPC) || share == 100 && err != nil {
						t.Errorf("with %d %% of %d bytes: %v", share, extra, err)
					}
					t.Logf("with %d %% of %d MiB: %v", share, extra>>20, err)
					must(t, scratch.Close())
					must(t, s.Remove())
					must(t, l.Close())
					must(t, os.Remove(dir+"/ballast"))
					if left := names(t, dir); len(left) > 0 && !(len(left) == 1 && left[0] == "lost+found") {
						t.Errorf("left %v", left)
					}
				}
			})
		}
	}
}

// ballast takes all of a file system but so many bytes.
func ballast(t *testing.T, s *Staging, dir string, but int64) {
	t.Helper()
	f, err := os.OpenFile(dir+"/ballast", os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	defer f.Close()
	zeros := make([]byte, 1<<20)
	for {
		must(t, unix.Syncfs(int(f.Fd()))) // what is not allocated yet is estimated
		room, err := s.Room()
		must(t, err)
		more := room.Free - but
		if more < 512<<10 {
			return
		}
		for ; more > 0; more -= int64(len(zeros)) {
			_, err := f.Write(zeros[:min(more, int64(len(zeros)))])
			must(t, err)
		}
	}
}

// An end of the context is heard of while the kernel writes the file and moves its blocks, too.
func TestCancelWhileInserting(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount file systems")
	}
	noise := make([]byte, 64<<20)
	rand.Read(noise)
	for _, fs := range fileSystems {
		if fs.name != "ext4" && fs.name != "xfs" {
			continue
		}
		t.Run(fs.name, func(t *testing.T) {
			dir := disks.Mount(t, fs.mkfs, 400)
			succeeded := false
			for wait := time.Duration(0); !succeeded; wait += 10 * time.Millisecond {
				l, err := OpenLocation(dir + "/a.tar")
				must(t, err)
				s, err := l.Stage(StagingName())
				must(t, err)
				must(t, s.WriteJSON(ManifestName, NewManifest(Origin{})))
				must(t, s.WriteFile("checkpoint/pages-1.img", noise))
				must(t, s.WriteFile("checkpoint/pages-2.img", noise[:16<<20]))
				ctx, cancel := context.WithCancelCause(t.Context())
				var cancelled time.Time
				timer := time.AfterFunc(wait, func() {
					cancelled = time.Now()
					cancel(errStop)
				})
				err = s.Assemble(ctx, Options{}, nil)
				took := time.Since(cancelled)
				if timer.Stop() {
					succeeded = true
				} else if err != nil && took > time.Second {
					t.Errorf("cancelled after %s, it went on for %s", wait, took)
				}
				if err != nil && !errors.Is(err, errStop) {
					t.Errorf("cancelled after %s: %v", wait, err)
				}
				must(t, s.Remove())
				must(t, l.Close())
				if left := names(t, dir); len(left) > 0 && !(len(left) == 1 && left[0] == "lost+found") {
					t.Errorf("left %v", left)
				}
				if wait > 10*time.Second {
					t.Fatal("it does not end")
				}
			}
		})
	}
}

var errStop = errors.New("stop")
