package rootfs

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"crishim/test/disks"
)

func (o overlay) layer(t *testing.T) Layer {
	t.Helper()
	var files []*os.File
	for _, path := range []string{o.upper, o.merged, o.lower, o.bottom} {
		f, err := os.OpenFile(path, unix.O_PATH, 0)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		files = append(files, f)
	}
	return Layer{Upper: files[0], Merged: files[1], Lower: files[2:], UserXattr: o.userXattr}
}

// newTestCopy is a Copy that takes any file system, and all that has been at rest for a tick of the clock.
func newTestCopy(t testing.TB, layer Layer) *Copy {
	t.Helper()
	return newTestCopyIn(t, t.TempDir(), layer)
}

// newTestCopyIn has its spools in a directory.
func newTestCopyIn(t testing.TB, dir string, layer Layer) *Copy {
	t.Helper()
	var spools [4]*os.File
	for i := range spools {
		f, err := os.OpenFile(fmt.Sprintf("%s/%d", dir, i), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		spools[i] = f
	}
	c := NewCopy(layer, func() ([]int, error) { return []int{os.Getpid()}, nil }, spools)
	c.settled = 0
	c.trusted = func(*os.File) (bool, error) { return true, nil }
	return c
}

// tick waits until all that has been done lies behind by the clock that Begin reads. It lags behind by a tick, and
// files may have more exact stamps (Linux 6.13).
func tick(t testing.TB) {
	t.Helper()
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		var now unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil {
			t.Fatal(err)
		}
		if time.Unix(now.Unix()).After(start) {
			return
		}
	}
}

// finish returns what c makes in the second pass, and how much of that comes from the first.
func finish(t *testing.T, c *Copy) (layer []byte, deleted []string, kept int64) {
	t.Helper()
	pieces, err := c.Finish(t.Context(), func(path string) error {
		deleted = append(deleted, path)
		return nil
	})
	must(t, err)
	var b bytes.Buffer
	for _, p := range pieces {
		n, err := io.Copy(&b, io.NewSectionReader(p.File, p.Offset, p.Length))
		must(t, err)
		if n != p.Length {
			t.Fatalf("a piece of %d bytes has %d", p.Length, n)
		}
		if p.File == c.first.file {
			kept += n
		}
	}
	return b.Bytes(), deleted, kept
}

// sameAsOnePass makes a diff in two passes, and one in three, of which the second is void, and compares them with that of one.
func sameAsOnePass(t *testing.T, o overlay, between func()) (kept int64) {
	t.Helper()
	tick(t)
	two, three := newTestCopy(t, o.layer(t)), newTestCopy(t, o.layer(t))
	must(t, two.Begin(t.Context()))
	must(t, three.Begin(t.Context()))
	finish(t, three)
	between()
	want, wantDeleted, err := o.diff(t)
	must(t, err)
	for passes, c := range map[string]*Copy{"two passes": two, "three": three} {
		got, gotDeleted, fromFirst := finish(t, c)
		kept = max(kept, fromFirst)
		if !bytes.Equal(got, want) {
			gotHeaders, gotContents := entries(t, got)
			wantHeaders, wantContents := entries(t, want)
			var names [2][]string
			for _, h := range gotHeaders {
				names[0] = append(names[0], h.Name)
				if gotContents[h.Name] != wantContents[h.Name] {
					t.Errorf("%s: content of %q differs", passes, h.Name)
				}
			}
			for _, h := range wantHeaders {
				names[1] = append(names[1], h.Name)
			}
			t.Errorf("%s make %d bytes, one makes %d:\n%.2000q\n%.2000q", passes, len(got), len(want), names[0], names[1])
		}
		if !slices.Equal(gotDeleted, wantDeleted) {
			t.Errorf("%s have deleted %q, one %q", passes, gotDeleted, wantDeleted)
		}
	}
	return kept
}

// Whatever happens between the passes, what comes out is the same as if there had been one.
func TestTwoPasses(t *testing.T) {
	for _, test := range []struct{ name, options, lower, before, between string }{
		{name: "nothing", before: "mkdir -p a/b c; echo 1 >a/1; echo 2 >a/b/2; ln -s 1 a/s; mkfifo c/p; : >e"},
		{name: "create", before: "mkdir a c; echo 1 >a/1; echo 3 >c/3", between: "echo 0 >a/0; echo 2 >a/2; mkdir b; echo b >b/b; mkdir a/d; echo 4 >c/4"},
		{name: "delete", before: "mkdir a b c; echo 1 >a/1; echo 2 >a/2; echo 1 >b/1; echo 1 >c/1", between: "rm a/1; rm -r b"},
		{name: "modify in place", before: "mkdir d; echo 1111 >d/1; echo 2222 >d/2", between: "printf x | dd of=d/1 conv=notrunc bs=1 seek=1 status=none"},
		{name: "modify and set the time back", before: "echo 1111 >1; touch -d 2001-01-01 1", between: "printf x | dd of=1 conv=notrunc bs=1 status=none; touch -d 2001-01-01 1"},
		{name: "append", before: "echo 1 >1; echo 2 >2", between: "echo more >>1"},
		{name: "truncate", before: "head -c 100000 /dev/urandom >1; echo 2 >2", between: "truncate -s 5 1; truncate -s 5000000 2"},
		{name: "replace by rename", before: "mkdir d; echo 1 >d/1; echo 2 >d/2", between: "echo new >d/new; mv d/new d/1"},
		{name: "exchange two files", before: "echo 1 >1; echo 2 >2; echo 3 >3", between: "mv 1 t; mv 2 1; mv t 2"},
		{name: "rename", before: "mkdir a b; echo 1 >a/1; echo 2 >b/2", between: "mv a/1 b/0; mv b/2 a/2"},
		{name: "rename a directory", before: "mkdir -p a/x m z; echo 1 >a/1; echo 2 >a/x/2; echo 3 >m/3; echo 4 >z/4", between: "mv a n"},
		{name: "exchange two directories", before: "mkdir -p a/d b/d; echo 1 >a/1; echo 2 >b/1; echo 3 >a/d/f; echo 4 >b/d/f", between: "mv a t; mv b a; mv t b"},
		{name: "rename into a directory", before: "mkdir -p a/d b; echo 1 >a/d/1; echo 2 >b/2", between: "mv a/d b/d"},
		{name: "chmod", before: "echo 1 >1; mkdir d; echo 2 >d/2", between: "chmod 600 1; chmod 700 d"},
		{name: "chown", before: "echo 1 >1; mkdir d; echo 2 >d/2", between: "chown 5:6 1 d"},
		{name: "touch", before: "echo 1 >1; mkdir d; ln -s x s", between: "touch -d 2001-01-01 1 d; touch -h -d 2001-01-01 s"},
		{name: "replace a directory by a file", before: "mkdir -p a/b c; echo 1 >a/1; echo 2 >a/b/2; echo 3 >c/3", between: "rm -r a; echo file >a"},
		{name: "replace a file by a directory", before: "mkdir c; echo 1 >a; echo 3 >c/3", between: "rm a; mkdir a; echo 1 >a/1"},
		{name: "replace a file by a link", before: "echo 1 >a; echo 2 >b; ln -s a s", between: "rm b s; ln -s a b; ln -s b s"},
		{name: "replace a directory by another", before: "mkdir -p a/s; echo 1 >a/1; echo 2 >a/s/2", between: "rm -r a; mkdir -p a/s; echo 1 >a/1; echo 2 >a/s/2"},
		{name: "links stay", before: "mkdir d; echo 1 >1; ln 1 2; ln 1 d/3; echo 4 >4"},
		{name: "add a link", before: "mkdir d; echo 1 >m; echo 2 >2", between: "ln m a; ln m d/z"},
		{name: "remove a link", before: "mkdir d; echo 1 >a; ln a m; ln a d/z; echo 2 >d/2", between: "rm m"},
		{name: "remove the first of links", before: "mkdir d; echo 1 >a; ln a m; ln a d/z", between: "rm a"},
		{name: "rename the directory of the first of links", before: "mkdir a b; echo 1 >a/f; ln a/f b/f; echo 2 >b/g", between: "mv a c"},
		{name: "rename the directory of another link before", before: "mkdir b c; echo 1 >b/f; ln b/f c/f; echo 2 >b/g", between: "mv c a"},
		{name: "add a whiteout", lower: "mkdir d e; echo 1 >d/1; echo 2 >d/2; echo 3 >3; echo 4 >e/4", before: "rm d/1; echo more >>e/4", between: "rm d/2 3; rm -r e"},
		{name: "remove a whiteout", lower: "mkdir d; echo 1 >d/1; echo 2 >d/2; echo 3 >3", before: "rm d/1 3; rm d/2", between: "echo 1 >d/1; mkdir 3"},
		{name: "make opaque", lower: "mkdir -p d/e; echo 1 >d/1; echo 2 >d/e/2", before: "echo n >d/n", between: "rm -r d; mkdir d; echo m >d/m"},
		{name: "change in an opaque one", lower: "mkdir -p d/e; echo 1 >d/1; echo 2 >d/e/2", before: "rm -r d; mkdir -p d/e; echo n >d/n; echo m >d/e/m; echo k >d/k", between: "echo 1 >d/1; rm d/k"},
		{name: "an opaque one stays", lower: "mkdir -p d/e; echo 1 >d/1; echo 2 >d/e/2", before: "rm -r d; mkdir -p d/e; echo n >d/n; echo m >d/e/m"},
		{name: "copy up", lower: "mkdir d; echo 1 >d/1; echo 2 >2", before: "echo more >>2", between: "echo more >>d/1; echo again >>2"},
		{name: "renamed directories", options: ",redirect_dir=on", lower: "mkdir -p a/x b; echo 1 >a/1; echo 2 >a/x/2; echo 3 >b/3", before: "mv a c; echo 4 >c/4; echo 5 >c/x/5",
			between: "mv b d; mv c/x y; echo more >>c/1"},
		{name: "renamed in place of one that was noted", options: ",redirect_dir=on", lower: "mkdir -p a b; echo 1 >a/1; echo 3 >b/3", before: "echo 4 >a/4; mkdir n; echo 5 >n/4", between: "rm -r n; mv a n"},
		{name: "metacopy", options: ",metacopy=on,redirect_dir=on", lower: "head -c 300000 /dev/urandom >1; head -c 300000 /dev/urandom >2; echo 3 >3", before: "chmod 600 1 2 3", between: "chmod 640 2; echo more >>3"},
		{name: "sparse and large", before: "truncate -s 10M s; printf x | dd of=s bs=1 seek=5000000 conv=notrunc status=none; head -c 3000001 /dev/urandom >l; head -c 1000000 /dev/urandom >m; cp l n; echo z >z",
			between: "printf x | dd of=s bs=1 seek=7000000 conv=notrunc status=none; printf x | dd of=l bs=1 seek=7 conv=notrunc status=none; truncate -s 8M m"},
		{name: "much here and there", before: "for d in 1 2 3 4 5 6 7 8 9; do mkdir -p $d/$d/$d; for f in a b c d; do echo $f >$d/$f; echo $f >$d/$d/$f; echo $f >$d/$d/$d/$f; done; done",
			between: "rm -r 1 3/3/3; echo x >2/b; mv 4 40; mkdir 4; echo 1 >5/5/c; rm 6/a; mv 7/7 8/7; chmod 700 9/9"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.lower, test.lower)
			o.mount(t, test.options)
			sh(t, o.merged, "mkdir kept; echo kept >kept/kept")
			sh(t, o.merged, test.before)
			kept := sameAsOnePass(t, o, func() { sh(t, o.merged, test.between) })
			t.Logf("%d bytes come from the first pass", kept)
			if kept == 0 {
				t.Error("nothing comes from the first pass")
			}
		})
	}
}

// XFS takes as much room again for a file that grows, before anything is written there.
func TestSpoolsTakeNoMoreRoomThanTheyNeed(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount file systems")
	}
	dir := disks.Mount(t, []string{"mkfs.xfs", "-q", "-f"}, 1<<10)
	upper := dir + "/upper"
	must(t, os.Mkdir(upper, 0o755))
	const large, files, size = 128 << 20, 160, 200 << 10 // the large one is shared, the others are copied
	must(t, os.WriteFile(upper+"/a", bytes.Repeat([]byte("big "), large/4), 0o644))
	must(t, os.Mkdir(upper+"/small", 0o755))
	for i := range files {
		must(t, os.WriteFile(fmt.Sprintf("%s/small/%d", upper, i), bytes.Repeat([]byte("small"), size/5), 0o644))
	}
	unix.Sync()
	tick(t)
	opened, err := os.Open(upper)
	must(t, err)
	defer opened.Close()
	c := newTestCopyIn(t, dir, Layer{Upper: opened, Merged: opened})
	before := disks.Used(t, dir)
	must(t, c.Begin(t.Context()))
	for range 2 { // as where the dump is tried again
		_, err = c.Finish(t.Context(), func(string) error { return nil })
		must(t, err)
	}
	const most = files*size + 8<<20
	if took := disks.Used(t, dir) - before; took > most {
		t.Errorf("%d MiB were taken to copy %d", took>>20, files*size>>20)
	}
}
