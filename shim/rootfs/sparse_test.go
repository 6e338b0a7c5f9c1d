package rootfs

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// makeSparse makes a file of the given length with data in some parts, none of which is zeros.
func makeSparse(t *testing.T, path string, size int64, data ...extent) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	must(t, err)
	defer f.Close()
	must(t, f.Truncate(size))
	for _, part := range data {
		content := make([]byte, part.length)
		for i := range content {
			content[i] = byte(rand.IntN(255) + 1)
		}
		_, err := f.WriteAt(content, part.offset)
		must(t, err)
	}
}

// sum is a checksum of what is not zeros, and of where it is.
func sum(t *testing.T, r io.Reader, from int64) string {
	t.Helper()
	h := sha256.New()
	block, zeros := make([]byte, 1<<16), make([]byte, 1<<16)
	for at := from; ; {
		n, err := io.ReadFull(r, block)
		if !bytes.Equal(block[:n], zeros[:n]) {
			fmt.Fprintf(h, "%d %x", at, sha256.Sum256(block[:n]))
		}
		if at += int64(n); err != nil {
			if err != io.EOF && err != io.ErrUnexpectedEOF {
				t.Fatal(err)
			}
			return fmt.Sprintf("%d bytes, %x", at, h.Sum(nil))
		}
	}
}

func sumOf(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	first, err := unix.Seek(int(f.Fd()), 0, unix.SEEK_DATA)
	if err == unix.ENXIO {
		first, err = f.Seek(0, io.SeekEnd)
	}
	must(t, err)
	first &^= 1<<16 - 1
	_, err = f.Seek(first, io.SeekStart)
	must(t, err)
	return sum(t, f, first)
}

func TestSparse(t *testing.T) {
	const k, m, g = 1 << 10, 1 << 20, 1 << 30
	many := func(count, distance int64) (parts []extent) {
		for i := range count {
			parts = append(parts, extent{i * distance, 1})
		}
		return parts
	}
	for _, test := range []struct {
		name string
		size int64
		data []extent
		most int // bytes that the archive may have
	}{
		{"nothing", 100 * m, nil, 10 * k},
		{"little in much", 10 * g, []extent{{10*g - m, 4 * k}}, 12 * k},
		{"at both ends", 20 * m, []extent{{0, 10}, {20*m - 10, 10}}, 20 * k},
		{"at no block's boundary", 20*m + 17, []extent{{5*m + 3, 7001}}, 20 * k},
		{"holes on both sides", 20 * m, []extent{{7 * m, m}, {12 * m, 2 * m}}, 3*m + 10*k},
		{"small holes", 10 * m, many(500, 20*k), 11 * m},
		{"many holes", 50 * m, many(500, 100*k), 500*6*k + 20*k},
		{"dense", m, []extent{{0, m}}, m + 10*k},
		{"empty", 0, nil, 10 * k},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := t.TempDir()
			makeSparse(t, dir+"/a", test.size, test.data...)
			must(t, os.WriteFile(dir+"/b", []byte("next"), 0o600))
			start := time.Now()
			archive, err := readTree(t, dir)
			must(t, err)
			t.Logf("%d bytes in %v", len(archive), time.Since(start))
			if len(archive) > test.most {
				t.Errorf("archive has %d bytes, want at most %d", len(archive), test.most)
			}
			want := sumOf(t, dir+"/a")
			// It gives the holes as zeros, all of them.
			if test.size < g && firstFile(t, archive, "a", test.size) != want {
				t.Error("Go's archive/tar reads another content")
			}
			out := t.TempDir()
			cmd := exec.Command("tar", "-x", "-C", out)
			cmd.Stdin = bytes.NewReader(archive)
			if msg, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, msg)
			}
			if got := sumOf(t, out+"/a"); got != want {
				t.Error("GNU tar unpacks another content")
			}
			var before, after unix.Stat_t
			must(t, unix.Stat(dir+"/a", &before))
			must(t, unix.Stat(out+"/a", &after))
			if after.Blocks > before.Blocks+test.size/m+64 && test.name != "small holes" {
				t.Errorf("unpacked it takes %d blocks, before %d", after.Blocks, before.Blocks)
			}
			if after.Mtim != before.Mtim || after.Mode != before.Mode {
				t.Errorf("unpacked it has time %v and mode %o, before %v and %o", after.Mtim, after.Mode, before.Mtim, before.Mode)
			}
			if next, err := os.ReadFile(out + "/b"); err != nil || string(next) != "next" {
				t.Errorf("the next file is %q, %v", next, err)
			}
		})
	}
}

// firstFile checks that the first entry after the root has this name and size and
// that nothing follows but one file, "b", and returns the first's checksum.
func firstFile(t *testing.T, archive []byte, name string, size int64) (sha256 string) {
	t.Helper()
	r := tar.NewReader(bytes.NewReader(archive))
	_, err := r.Next()
	must(t, err)
	h, err := r.Next()
	must(t, err)
	if h.Name != name || h.Size != size || h.Typeflag != tar.TypeReg {
		t.Fatalf("entry %q has type %q and %d bytes, want a file of %d", h.Name, h.Typeflag, h.Size, size)
	}
	got := sum(t, r, 0)
	if h, err = r.Next(); err != nil || h.Name != "b" {
		t.Fatalf("next entry is %+v, %v", h, err)
	}
	if _, err = r.Next(); err != io.EOF {
		t.Errorf("at the end: %v", err)
	}
	return got
}

// Of a file with more holes than the list of its parts takes, the smallest are filled.
func TestTooManyHoles(t *testing.T) {
	dir := t.TempDir()
	var data []extent
	at := int64(0)
	for i := range int64(100) {
		data = append(data, extent{at, 1000})
		at += 40 << 10
		if i%20 == 10 {
			at += 5 << 20
		}
	}
	makeSparse(t, dir+"/a", at, data...)
	must(t, os.WriteFile(dir+"/b", nil, 0o600))
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	k := &walk{ctx: t.Context(), root: f, scratch: scratchFile(t), batch: maxSorted, parts: 20}
	must(t, k.writeTo(&b))
	if firstFile(t, b.Bytes(), "a", at) != sumOf(t, dir+"/a") {
		t.Error("content has changed")
	}
	if b.Len() < 2<<20 || b.Len() > 5<<20 {
		t.Errorf("the archive has %d bytes, the file %d: all holes are kept, or not the largest", b.Len(), at)
	}
}

// If those that would have to be filled are large, the file is refused.
func TestTooManyLargeHoles(t *testing.T) {
	dir := t.TempDir()
	var data []extent
	for i := range int64(8) {
		data = append(data, extent{i << 30, 1000})
	}
	makeSparse(t, dir+"/a", 8<<30, data...)
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	k := &walk{ctx: t.Context(), root: f, scratch: scratchFile(t), batch: maxSorted, parts: 4}
	if err := k.writeTo(io.Discard); !errors.Is(err, ErrUnsupported) {
		t.Errorf("writeTo = %v, want ErrUnsupported", err)
	}
}

// What a plain entry keeps, a sparse one keeps too.
func TestSparseAttributes(t *testing.T) {
	o := newOverlay(t)
	o.mount(t, "")
	for i, name := range oddNames {
		path := o.merged + "/" + name
		makeSparse(t, path, 1<<20, extent{1 << 19, 10})
		must(t, os.Chown(path, 4294967294-i, 100000))
		must(t, unix.Chmod(path, 0o6711))
		setxattr(t, path, "user.x", "line\nbreak=\x00\xff")
		setxattr(t, path, "trusted.empty", "")
		when := unix.NsecToTimespec(int64(i-8) * 1234567891011121314 / 10)
		must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{when, when}, unix.AT_SYMLINK_NOFOLLOW))
		must(t, os.Link(path, fmt.Sprintf("%s/link%d", o.merged, i)))
	}
	layer, _ := checkOverlay(t, o)
	if len(layer) > len(oddNames)*10<<10 {
		t.Errorf("the layer has %d bytes: nothing was sparse", len(layer))
	}
}

// Sizes that the fields of a header block cannot hold.
func TestSparseOfManyGigabytes(t *testing.T) {
	var b bytes.Buffer
	k := &walk{out: newStream(&b)}
	const size, data = 15 << 40, 9 << 30
	_, err := k.sparseHeader(&tar.Header{Name: "f", Size: size}, []extent{{1 << 40, data}})
	must(t, err)
	must(t, k.out.flush())
	h, err := tar.NewReader(&b).Next()
	if err != nil || h.Name != "f" || h.Size != size || h.PAXRecords["size"] != fmt.Sprint(data+512) {
		t.Errorf("read %+v, %v", h, err)
	}
	// The longest list of parts that there can be.
	parts := make([]extent, maxExtents)
	for i := range parts {
		parts[i] = extent{maxFileSize - 1<<20 + int64(i), maxFileSize - 1}
	}
	b.Reset()
	_, err = k.sparseHeader(&tar.Header{Name: "f", Size: maxFileSize}, parts)
	must(t, err)
	must(t, k.out.flush())
	if list := b.Len() - 3*512 - 512; list > 1<<20 {
		t.Errorf("the list of parts has %d bytes, more than Go's archive/tar takes", list)
	}
}

// Whatever a file's layout is, a reader gets its content back.
func FuzzSparse(f *testing.F) {
	f.Add(uint32(0), []byte(nil))
	f.Add(uint32(10<<20), []byte{1, 0, 200, 3, 90, 255, 0, 0})
	f.Add(uint32(1<<20+1), []byte{0, 255, 8, 1, 8, 1, 8, 1})
	f.Fuzz(func(t *testing.T, size uint32, layout []byte) {
		length := int64(size % (64 << 20))
		var data []extent
		for at := int64(0); len(layout) >= 2; layout = layout[2:] {
			at += int64(layout[0]) * 5003 // a hole
			part := extent{at, min(int64(layout[1])*401, length-at)}
			if part.length <= 0 {
				break
			}
			data = append(data, part)
			at = part.end()
		}
		dir := t.TempDir()
		makeSparse(t, dir+"/a", length, data...)
		must(t, os.WriteFile(dir+"/b", nil, 0o600))
		archive, err := readTree(t, dir)
		must(t, err)
		if firstFile(t, archive, "a", length) != sumOf(t, dir+"/a") {
			t.Error("content has changed")
		}
	})
}
