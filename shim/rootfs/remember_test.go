package rootfs

import (
	"fmt"
	"io"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"runtime/metrics"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A container can have any number of whatever it likes. That takes no more memory for five times as many.
func TestMemoryDoesNotGrowWithTheContainer(t *testing.T) {
	const few, many = 10_000, 50_000
	each := func(n int, dir string, do func(at int, name string) error) {
		at, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
		must(t, err)
		defer unix.Close(at)
		for i := range n {
			must(t, do(at, fmt.Sprintf("%d-with-a-name-that-is-not-short", i)))
		}
	}
	for _, test := range []struct {
		name string
		// make changes what is in the container of an overlay whose lower directory has d.
		lower, upper func(t *testing.T, dir string, n int)
	}{
		{name: "files", upper: func(t *testing.T, dir string, n int) {
			each(n, dir, func(at int, name string) error { return unix.Mknodat(at, name, unix.S_IFREG|0o600, 0) })
		}},
		{name: "directories", upper: func(t *testing.T, dir string, n int) {
			each(n, dir, func(at int, name string) error { return unix.Mkdirat(at, name, 0o700) })
		}},
		{name: "links", upper: func(t *testing.T, dir string, n int) {
			must(t, os.Mkdir(dir+"/other", 0o700))
			each(n/2, dir, func(at int, name string) error {
				if err := unix.Mknodat(at, name, unix.S_IFREG|0o600, 0); err != nil {
					return err
				}
				return unix.Linkat(at, name, at, "other/"+name, 0)
			})
		}},
		{name: "names of the image that are hidden", lower: func(t *testing.T, dir string, n int) {
			each(n, dir, func(at int, name string) error { return unix.Mknodat(at, name, unix.S_IFREG|0o600, 0) })
		}, upper: func(t *testing.T, dir string, n int) {
			setxattr(t, dir, "trusted.overlay.opaque", "y")
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			var peak [2]uint64
			for i, n := range []int{few, many} {
				o := newOverlay(t)
				for dir, fill := range map[string]func(*testing.T, string, int){o.lower: test.lower, o.upper: test.upper} {
					must(t, os.Mkdir(dir+"/d", 0o755))
					if fill != nil {
						fill(t, dir+"/d", n)
					}
				}
				o.mount(t, "")
				tick(t)
				c := newTestCopy(t, o.layer(t))
				peak[i] = peakHeap(func() {
					must(t, c.Begin(t.Context()))
					_, err := c.Finish(t.Context(), func(string) error { return nil })
					must(t, err)
				})
				dir, err := os.Open(o.upper)
				must(t, err)
				defer dir.Close()
				peak[i] = max(peak[i], peakHeap(func() { must(t, Tree(t.Context(), io.Discard, dir, c.scratch)) }))
			}
			t.Logf("%d KiB with %d, %d KiB with %d", peak[0]>>10, few, peak[1]>>10, many)
			// The few fit into what is remembered in memory, the many do not.
			if most := uint64(maxKnown + maxWaiting + 3<<19); peak[1] > peak[0]+most {
				t.Errorf("takes %d KiB more for %d than for %d", (peak[1]-peak[0])>>10, many, few)
			}
		})
	}
}

// peakHeap is the most that is alive on the heap while do runs, beyond what was before.
func peakHeap(do func()) uint64 {
	alive := func() uint64 {
		// What is allocated while the collector marks counts as alive, and on a machine that has other work that is a lot: the least of three.
		least := uint64(math.MaxUint64)
		for range 3 {
			runtime.GC()
			live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
			metrics.Read(live)
			least = min(least, live[0].Value.Uint64())
		}
		return least
	}
	before := alive()
	stop, peak := make(chan struct{}), make(chan uint64)
	go func() {
		most := before
		for {
			select {
			case <-stop:
				peak <- most - before
				return
			case <-time.After(50 * time.Millisecond):
				most = max(most, alive())
			}
		}
	}()
	do()
	close(stop)
	return <-peak
}

// Many links are found again, whether they are remembered in memory or not, and others are not taken for them.
func TestFirstPaths(t *testing.T) {
	const files = 60_000 // the table grows twice
	f := newFirstPaths(scratchFile(t))
	path := func(n int) string { return fmt.Sprintf("%d/%s", n, strings.Repeat("p", n%100)) }
	id := func(n int) inode { return inode{uint64(n % 2), uint64(n / 2)} }
	for n := range files {
		if first, err := f.get(id(n)); err != nil || first != "" {
			t.Fatalf("file %d, which has not come, came first as %q, %v", n, first, err)
		}
		must(t, f.put(id(n), path(n)))
	}
	if f.slots <= firstSlots || f.size < maxKnown {
		t.Errorf("%d slots, %d bytes in memory: this is no test of the table", f.slots, f.size)
	}
	for _, n := range rand.Perm(files) {
		if first, err := f.get(id(n)); err != nil || first != path(n) {
			t.Fatalf("file %d came first as %q, %v", n, first, err)
		}
	}
	// A disk that has lost something: an error, and no wrong name.
	_, err := f.file.WriteAt(make([]byte, 1<<20), recordsAt)
	must(t, err)
	for n := range files {
		if first, err := f.get(id(n)); err == nil && first != "" && first != path(n) {
			t.Fatalf("file %d came first as %q", n, first)
		}
	}
}

// Names come back in their order, however many lists there are on one another.
func TestWaiting(t *testing.T) {
	w := &waiting{file: scratchFile(t)}
	name := func(depth, n int) string { return fmt.Sprintf("%d.%d.%s", depth, n, strings.Repeat("n", 100+n%150)) }
	const depth, names = 4, 3000 // one list is larger than what is kept in memory
	var down func(level int)
	down = func(level int) {
		first := w.end()
		for n := range names {
			must(t, w.add(name(level, n), n/1000))
		}
		end := w.end()
		at := first
		for n := range names {
			got, batch, next, err := w.at(at)
			if err != nil || got != name(level, n) || batch != n/1000 {
				t.Fatalf("name %d of level %d is %q of batch %d, %v", n, level, got, batch, err)
			}
			at = next
			if n%1000 == 999 && level < depth {
				down(level + 1)
				if w.end() != end {
					t.Fatalf("level %d ends at %d, ended at %d", level, w.end(), end)
				}
			}
		}
		if at != end {
			t.Fatalf("level %d ends at %d, was read to %d", level, end, at)
		}
		w.cut(first)
	}
	down(0)
	if w.end() != 0 || len(w.buf) > maxWaiting {
		t.Errorf("%d bytes are left", w.end())
	}
}
