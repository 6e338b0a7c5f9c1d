package inspect

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"github.com/klauspost/compress/zstd"
	"google.golang.org/protobuf/proto"
)

func TestPagesAreCompared(t *testing.T) {
	for name, test := range map[string]struct {
		a, b   []uint64 // runs of pages
		ca, cb string   // their content
		want   string   // changed, added, removed, same
	}{
		"the same":                  {[]uint64{0, 3}, []uint64{0, 3}, "abc", "abc", "0 0 0 3"},
		"one changed":               {[]uint64{0, 3}, []uint64{0, 3}, "abc", "aXc", "1 0 0 2"},
		"in other runs":             {[]uint64{0, 3}, []uint64{0, 1, page, 2}, "abc", "abc", "0 0 0 3"},
		"one in the middle is gone": {[]uint64{0, 3}, []uint64{0, 1, 2 * page, 1}, "abc", "ac", "0 0 1 2"},
		"one in the middle is new":  {[]uint64{0, 1, 2 * page, 1}, []uint64{0, 3}, "ac", "abc", "0 1 0 2"},
		"all gone":                  {[]uint64{0, 3}, nil, "abc", "", "0 0 3 0"},
		"all new":                   {nil, []uint64{8 * page, 3}, "", "abc", "0 3 0 0"},
		"elsewhere":                 {[]uint64{0, 2}, []uint64{8 * page, 2}, "ab", "ab", "0 2 2 0"},
		"shifted by one":            {[]uint64{0, 3}, []uint64{page, 3}, "abc", "abc", "2 1 1 0"},
		"more than is read at once": {[]uint64{0, 200}, []uint64{0, 200}, strings.Repeat("a", 200), strings.Repeat("a", 199) + "b", "1 0 0 199"},
	} {
		t.Run(name, func(t *testing.T) {
			archive := func(runs []uint64, letters string) *os.File {
				m := members(t)
				m["checkpoint/pagemap-1.img"], m["checkpoint/pages-1.img"] = extents(t, 1, runs...), content(letters)
				return archiveOf(t, m, false)
			}
			d, err := Compare(t.Context(), archive(test.a, test.ca), archive(test.b, test.cb))
			must(t, err)
			var changed, added, removed, same uint64
			for _, m := range d.Memory {
				changed, added, removed, same = m.Changed, m.Added, m.Removed, m.Same
			}
			if name == "the same" || name == "in other runs" {
				if !d.Same() {
					t.Errorf("different is %+v", d.Memory)
				}
				return
			}
			if got := fmt.Sprint(changed, added, removed, same); got != test.want {
				t.Errorf("changed, added, removed, same are %s, want %s", got, test.want)
			}
		})
	}
}

// Numbers that the kernel gives anew, to what is shared or piped, are no difference.
func TestWhatAMoveChangesIsNoDifference(t *testing.T) {
	moved := members(t)
	moved["checkpoint/mm-1.img"] = imageOf(t, "MM", &mm.MmEntry{ExeFileId: proto.Uint32(1), Vmas: []*vma.VmaEntry{
		mapping(0x1000, 0x4000, filePrivate, 0), mapping(0x4000, 0x8000, 1<<9, 0), mapping(0x9000, 0xb000, anonShared, 44)}})
	moved["checkpoint/pagemap-shmem-44.img"] = extents(t, 9, 0, 2)
	moved["checkpoint/pages-9.img"] = moved["checkpoint/pages-2.img"]
	delete(moved, "checkpoint/pagemap-shmem-33.img")
	delete(moved, "checkpoint/pages-2.img")
	moved["config.dump"] = `{"id":"4567","name":"app"}`
	d, err := Compare(t.Context(), archiveOf(t, members(t), false), archiveOf(t, moved, false))
	must(t, err)
	if !d.Same() {
		t.Errorf("different is %+v", d)
	}
	moved["checkpoint/pages-9.img"] = content("sT")
	d, err = Compare(t.Context(), archiveOf(t, members(t), false), archiveOf(t, moved, false))
	must(t, err)
	if want := (MemoryChange{PID: 1, Name: "app", Shared: true, Address: 0x9000, PageSize: page, Changed: 1, Same: 1}); len(d.Memory) != 1 || d.Memory[0] != want {
		t.Errorf("memory is %+v, want %+v", d.Memory, want)
	}
}

func TestTreesAreCompared(t *testing.T) {
	var a, b bytes.Buffer
	for buffer, files := range map[*bytes.Buffer][]tar.Header{
		&a: {{Name: "same", Linkname: "x"}, {Name: "content", Linkname: "x"}, {Name: "mode", Mode: 0o600}, {Name: "owner"}, {Name: "attribute"}, {Name: "gone"},
			{Name: "deleted"}, {Name: ".wh.back"}, {Name: ".wh.both"}, {Name: "link", Typeflag: tar.TypeSymlink, Linkname: "here"}, {Name: ".wh.image-again"}},
		&b: {{Name: "./same", Linkname: "x"}, {Name: "content", Linkname: "y"}, {Name: "mode", Mode: 0o700}, {Name: "owner", Uid: 7},
			{Name: "attribute", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "1"}}, {Name: ".wh.deleted"}, {Name: "back"}, {Name: ".wh.both"},
			{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "there"}, {Name: "new"}, {Name: ".wh.of-image"}},
	} {
		w := tar.NewWriter(buffer)
		for _, h := range files {
			content := ""
			if h.Typeflag == 0 {
				content, h.Linkname = h.Linkname, ""
				h.Typeflag, h.Size = tar.TypeReg, int64(len(content))
			}
			must(t, w.WriteHeader(&h))
			_, err := io.WriteString(w, content)
			must(t, err)
		}
		must(t, w.Close())
	}
	section := func(b *bytes.Buffer) *io.SectionReader {
		return io.NewSectionReader(bytes.NewReader(b.Bytes()), 0, int64(b.Len()))
	}
	d, err := compareTrees(section(&a), section(&b), true)
	must(t, err)
	got := fmt.Sprint(d.Added, d.Changed, d.Removed)
	if want := "[/back /new /image-again] [/content /mode /owner /attribute /link] [/deleted /of-image /gone]"; got != want {
		t.Errorf("got\n%s, want\n%s", got, want)
	}
	// Where the one has no layer at all.
	if d, err = compareTrees(nil, section(&b), true); err != nil || len(d.Added) != 8 || len(d.Removed) != 3 {
		t.Errorf("against nothing: %+v, %v", d, err)
	}
}

// Memory of any size is compared in little.
func TestCompareDoesNotFillMemory(t *testing.T) {
	const pages = 1 << 12 // 16 MiB
	var files [2]*os.File
	for i := range files {
		m := members(t)
		m["checkpoint/pagemap-1.img"] = extents(t, 1, 0x10000, pages)
		m["checkpoint/pages-1.img"] = string(make([]byte, pages*page))
		files[i] = archiveOf(t, m, true)
	}
	runtime.GC()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	d, err := Compare(t.Context(), files[0], files[1])
	runtime.ReadMemStats(&after)
	must(t, err)
	if took := after.TotalAlloc - before.TotalAlloc; took > 8<<20 || !d.Same() {
		t.Errorf("it took %d bytes of memory: %+v", took, d.Memory)
	}
}

func TestCompareNeedsToReadAtAnyPlace(t *testing.T) {
	whole, err := io.ReadAll(archiveOf(t, members(t), false))
	must(t, err)
	for _, more := range []int{0, 9 << 20} {
		path := t.TempDir() + "/one-piece.tar.zst"
		must(t, os.WriteFile(path, inOnePiece(t, append(whole, make([]byte, more)...)), 0o600))
		if _, err := Read(t.Context(), open(t, path)); err != nil {
			t.Errorf("it cannot be described: %v", err)
		}
		_, err := Compare(t.Context(), open(t, path), open(t, path))
		if (err == nil) != (more == 0) || err != nil && !strings.Contains(err.Error(), "decompress it by zstd -d first") {
			t.Errorf("with %d bytes more the error is %v", more, err)
		}
	}
}

func inOnePiece(t *testing.T, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	must(t, err)
	_, err = w.Write(data)
	must(t, err)
	must(t, w.Close())
	return b.Bytes()
}
