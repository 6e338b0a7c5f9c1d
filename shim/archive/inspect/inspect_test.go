package inspect

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"unicode"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	skunix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"crishim/criu/image"
)

// update writes the golden files anew. The archives beside them are real ones: TestDiffTellsWhatAContainerDid in shim/checkpoint makes them.
var update = flag.Bool("update", false, "write testdata/*.golden anew")

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, path string) *os.File {
	t.Helper()
	file, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	return file
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	path := filepath.Join("testdata", name+".golden")
	if *update {
		must(t, os.WriteFile(path, got, 0o644))
	}
	want, err := os.ReadFile(path)
	must(t, err)
	if !bytes.Equal(got, want) {
		t.Errorf("%s is not what it was; -update writes it anew. It is\n%s", path, got)
	}
	if bad := unprintable(string(got)); bad != "" {
		t.Errorf("%s has %q, which could do something to a terminal", name, bad)
	}
}

func unprintable(text string) string {
	at := strings.IndexFunc(text, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) })
	if at < 0 {
		return ""
	}
	return text[at:min(at+8, len(text))]
}

func TestRealArchive(t *testing.T) {
	d, err := Read(t.Context(), open(t, "testdata/before.tar.zst"))
	must(t, err)
	for name, write := range map[string]func(io.Writer) error{
		"summary":  func(w io.Writer) error { return d.Table(w, Sections{}) },
		"sections": func(w io.Writer) error { return d.Table(w, Sections{true, true, true, true, true, true}) },
		"tree":     d.Tree,
		"json":     func(w io.Writer) error { return WriteJSON(w, d) },
	} {
		t.Run(name, func(t *testing.T) {
			var out bytes.Buffer
			must(t, write(&out))
			golden(t, name, out.Bytes())
		})
	}
	var out bytes.Buffer
	must(t, WriteJSON(&out, d))
	var again Description
	must(t, json.Unmarshal(out.Bytes(), &again))
	if got := again.Processes[3].Name; got != "e\x1b[2Jvil" {
		t.Errorf("the name is %q in JSON", got)
	}
}

func TestRealArchivesAreCompared(t *testing.T) {
	before, after := open(t, "testdata/before.tar.zst"), open(t, "testdata/after.tar.zst")
	d, err := Compare(t.Context(), before, after)
	must(t, err)
	var table, asJSON bytes.Buffer
	must(t, d.Table(&table))
	golden(t, "diff", table.Bytes())
	must(t, WriteJSON(&asJSON, d))
	golden(t, "diff-json", asJSON.Bytes())

	same, err := Compare(t.Context(), before, before)
	must(t, err)
	table.Reset()
	must(t, same.Table(&table))
	if !same.Same() || d.Same() || !strings.Contains(table.String(), "no difference") {
		t.Errorf("the same archive twice: %s", table.String())
	}
}

// imageOf is an image of these entries.
func imageOf(t testing.TB, kind string, entries ...proto.Message) string {
	t.Helper()
	data, err := image.Write(kind, entries)
	must(t, err)
	return string(data)
}

func mapping(start, end uint64, status uint32, shmid uint64) *vma.VmaEntry {
	return &vma.VmaEntry{Start: &start, End: &end, Status: &status, Shmid: &shmid}
}

// extents is a pagemap of runs of pages: address, number, address, number…
func extents(t testing.TB, pages uint32, runs ...uint64) string {
	t.Helper()
	entries := []proto.Message{&pagemap.PagemapHead{PagesId: &pages}}
	for run := range slices.Chunk(runs, 2) {
		entries = append(entries, &pagemap.PagemapEntry{Vaddr: &run[0], NrPages: proto.Uint32(uint32(run[1])), Flags: proto.Uint32(4)})
	}
	return imageOf(t, "PAGEMAP", entries...)
}

const page = 4096

// content is pages each of which consists of one letter.
func content(letters string) string {
	var b strings.Builder
	for _, letter := range letters {
		b.WriteString(strings.Repeat(string(letter), page))
	}
	return b.String()
}

// members are those of an archive with one process, which maps a file privately, and shares memory.
func members(t testing.TB) map[string]string {
	t.Helper()
	files := []proto.Message{
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1), Reg: &regfile.RegFileEntry{Name: proto.String("/bin/app"), Mode: proto.Uint32(unix.S_IFREG)}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: proto.Uint32(2), Isk: &skinet.InetSkEntry{
			Family: proto.Uint32(unix.AF_INET), Type: proto.Uint32(unix.SOCK_STREAM), Proto: proto.Uint32(unix.IPPROTO_TCP), State: proto.Uint32(1),
			SrcAddr: []uint32{0x0100007f}, SrcPort: proto.Uint32(80), DstAddr: []uint32{0x0200007f}, DstPort: proto.Uint32(4000)}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(3), Usk: &skunix.UnixSkEntry{
			Ino: proto.Uint32(70), Peer: proto.Uint32(71), Type: proto.Uint32(unix.SOCK_STREAM), State: proto.Uint32(1), Name: []byte("\x00abstract\x00")}},
		&fdinfo.FileEntry{Type: fdinfo.FdTypes_UNIXSK.Enum(), Id: proto.Uint32(4), Usk: &skunix.UnixSkEntry{
			Ino: proto.Uint32(71), Peer: proto.Uint32(70), Type: proto.Uint32(unix.SOCK_STREAM), State: proto.Uint32(1)}},
	}
	var table []proto.Message
	for fd := range uint32(4) {
		table = append(table, &fdinfo.FdinfoEntry{Id: proto.Uint32(fd + 1), Fd: proto.Uint32(9 - fd)})
	}
	return map[string]string{
		"config.dump": `{"id":"0123","name":"app"}`,
		"spec.dump":   `{}`,
		"status.dump": `{"labels":{"io.kubernetes.pod.name":"p","io.kubernetes.pod.namespace":"n"}}`,
		"checkpoint/pstree.img": imageOf(t, "PSTREE",
			&pstree.PstreeEntry{Pid: proto.Uint32(1), Ppid: proto.Uint32(0), Threads: []uint32{1, 2}}),
		"checkpoint/core-1.img": imageOf(t, "CORE", &criucore.CoreEntry{
			Tc: &criucore.TaskCoreEntry{Comm: proto.String("app"), TaskState: proto.Uint32(3)}, Ids: &criucore.TaskKobjIdsEntry{FilesId: proto.Uint32(5)}}),
		"checkpoint/fdinfo-5.img": imageOf(t, "FDINFO", table[:3]...),
		"checkpoint/files.img":    imageOf(t, "FILES", files...),
		"checkpoint/mm-1.img": imageOf(t, "MM", &mm.MmEntry{ExeFileId: proto.Uint32(1), Vmas: []*vma.VmaEntry{
			mapping(0x1000, 0x4000, filePrivate, 0), mapping(0x4000, 0x8000, 1<<9, 0), mapping(0x9000, 0xb000, anonShared, 33)}}),
		// The second run is of both mappings.
		"checkpoint/pagemap-1.img":        extents(t, 1, 0x1000, 1, 0x3000, 3),
		"checkpoint/pages-1.img":          content("abcd"),
		"checkpoint/pagemap-shmem-33.img": extents(t, 2, 0, 2),
		"checkpoint/pages-2.img":          content("st"),
		"rootfs-diff.tar":                 tarOf(t, [][2]string{{"etc/", ""}, {"etc/a", "aa"}, {"etc/.wh.b", ""}, {"etc/.wh..wh..opq", ""}}),
		"container.log":                   "one\ntwo\n",
	}
}

func tarOf(t testing.TB, files [][2]string) string {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, file := range files {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: file[0], Size: int64(len(file[1])), Mode: 0o644}
		if strings.HasSuffix(h.Name, "/") {
			h.Typeflag = tar.TypeDir
		}
		must(t, w.WriteHeader(h))
		_, err := io.WriteString(w, file[1])
		must(t, err)
	}
	must(t, w.Close())
	return b.String()
}

// archiveOf is an archive of these members, in the order of their names, or backwards.
func archiveOf(t testing.TB, members map[string]string, backwards bool) *os.File {
	t.Helper()
	var list [][2]string
	for name, content := range members {
		list = append(list, [2]string{name, content})
	}
	slices.SortFunc(list, func(a, b [2]string) int {
		if backwards {
			return strings.Compare(b[0], a[0])
		}
		return strings.Compare(a[0], b[0])
	})
	path := filepath.Join(t.TempDir(), "checkpoint.tar")
	must(t, os.WriteFile(path, []byte(tarOf(t, list)), 0o600))
	return open(t, path)
}

// Members are understood in whatever order they come.
func TestDescription(t *testing.T) {
	for _, backwards := range []bool{false, true} {
		t.Run(fmt.Sprint(backwards), func(t *testing.T) {
			d, err := Read(t.Context(), archiveOf(t, members(t), backwards))
			must(t, err)
			if c := d.Container; c.Name != "app" || c.Pod != "p" || c.Namespace != "n" {
				t.Errorf("container is %+v", c)
			}
			want := Process{PID: 1, Name: "app", State: "stopped", Executable: "/bin/app", Threads: 2, Descriptors: 3, Memory: Memory{
				Mappings: 3, Virtual: 9 * page, Archived: 4 * page, Anonymous: 2 * page, File: 2 * page, PageSize: page}}
			if len(d.Processes) != 1 || d.Processes[0] != want {
				t.Errorf("processes are %+v, want %+v", d.Processes, want)
			}
			if got, want := fmt.Sprint(d.Shared), "[{33 8192 4096 [1] 36864}]"; got != want {
				t.Errorf("shared memory is %s, want %s", got, want)
			}
			if got, want := fmt.Sprint(d.Open), "[{1 9 file /bin/app r 0 false}]"; got != want {
				t.Errorf("files are %s, want %s", got, want)
			}
			// The last one has no descriptor.
			if got, want := fmt.Sprint(d.Sockets), "[{1 7 unix stream established @abstract socket:[71]} {1 8 tcp stream established 127.0.0.1:80 127.0.0.2:4000} "+
				"{0 0 unix stream established socket:[71] @abstract}]"; got != want {
				t.Errorf("sockets are %s, want %s", got, want)
			}
			if l := d.Layer; l.Files != 1 || l.Directories != 1 || l.Deleted != 1 || l.Bytes != 2 || fmt.Sprint(l.Largest) != "[{/etc/a 2}]" {
				t.Errorf("layer is %+v", l)
			}
			if *d.Log != (Log{2, 8}) {
				t.Errorf("log is %+v", d.Log)
			}
		})
	}
}

func TestHostileArchives(t *testing.T) {
	with := func(changes ...string) map[string]string {
		m := members(t)
		for change := range slices.Chunk(changes, 2) {
			if m[change[0]] = change[1]; change[1] == "" {
				delete(m, change[0])
			}
		}
		return m
	}
	for name, test := range map[string]struct {
		members map[string]string
		want    string
	}{
		"no processes":           {with("checkpoint/pstree.img", ""), "no checkpoint of a container"},
		"no core":                {with("checkpoint/core-1.img", ""), "core-1.img is missing"},
		"no pages":               {with("checkpoint/pages-1.img", ""), "pages-1.img is missing"},
		"pages cut off":          {with("checkpoint/pages-1.img", content("abc")), "pages-1.img has 12288 bytes, and should have 4 pages"},
		"pages of two":           {with("checkpoint/pagemap-2.img", extents(t, 1, 0, 4), "checkpoint/core-2.img", members(t)["checkpoint/core-1.img"], "checkpoint/pstree.img", imageOf(t, "PSTREE", &pstree.PstreeEntry{Pid: proto.Uint32(1)}, &pstree.PstreeEntry{Pid: proto.Uint32(2)})), "pages-1.img is of two processes"},
		"pages out of order":     {with("checkpoint/pagemap-1.img", extents(t, 1, 0x3000, 2, 0x2000, 2)), "not in the order of their addresses"},
		"an extent of nothing":   {with("checkpoint/pagemap-1.img", extents(t, 1, 0x3000, 0)), "it has 0 pages at 0x3000"},
		"another image":          {with("checkpoint/mm-1.img", extents(t, 1)), "no image of CRIU's for MM"},
		"a mapping of minus one": {with("checkpoint/mm-1.img", imageOf(t, "MM", &mm.MmEntry{Vmas: []*vma.VmaEntry{mapping(2, 1, 0, 0)}})), "ends before it begins"},
		"a layer that is none":   {with("rootfs-diff.tar", strings.Repeat("x", 1024)), "rootfs-diff.tar: read tar of files"},
		"a layer cut off":        {with("rootfs-diff.tar", members(t)["rootfs-diff.tar"][:700]), "rootfs-diff.tar: read tar of files"},
		"deleted is no list":     {with("deleted.files", "{}"), "deleted.files: it is no list"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Read(t.Context(), archiveOf(t, test.members, false)); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

// Whatever there is of anything, what is kept of it has a bound.
func TestHostileArchivesDoNotFillMemory(t *testing.T) {
	const kept, many = 1 << 20, 20000
	empty := strings.Repeat("\x00\x00\x00\x00", many) // entries of no bytes
	var runs []uint64
	for n := range uint64(many) {
		runs = append(runs, 2*n*page, 1)
	}
	for name, content := range map[string]string{
		"files.img":         imageOf(t, "FILES") + empty,
		"fdinfo-5.img":      imageOf(t, "FDINFO") + empty,
		"fdinfo-6.img":      imageOf(t, "FDINFO") + empty,
		"pstree.img":        imageOf(t, "PSTREE") + empty,
		"core-1.img":        imageOf(t, "CORE") + empty,
		"memfd.img":         imageOf(t, "MEMFD_INODE") + empty,
		"mountpoints-1.img": imageOf(t, "MNTS") + strings.Repeat("\x03\x00\x00\x00\x3a\x01/", many),
		"mm-1.img":          imageOf(t, "MM", &mm.MmEntry{Vmas: slices.Repeat([]*vma.VmaEntry{mapping(1, 2, filePrivate, 0)}, many)}),
		"mm-2.img":          imageOf(t, "MM", &mm.MmEntry{Vmas: slices.Repeat([]*vma.VmaEntry{mapping(1, 2, anonShared, 9)}, many)}),
		"pagemap-2.img":     extents(t, 1, runs...), // of mappings that are not known
	} {
		t.Run(name, func(t *testing.T) {
			m := members(t)
			m["checkpoint/"+name] = content
			if _, _, err := read(t.Context(), archiveOf(t, m, false), kept); err == nil || !strings.Contains(err.Error(), errTooMuch.Error()) {
				t.Errorf("error is %v", err)
			}
			if _, _, err := read(t.Context(), archiveOf(t, members(t), false), kept); err != nil {
				t.Errorf("without it: %v", err)
			}
		})
	}
}

// FuzzRead: whatever is given out as an archive, describing it ends, and what is told is printable.
func FuzzRead(f *testing.F) {
	for _, backwards := range []bool{false, true} {
		data, err := io.ReadAll(archiveOf(f, members(f), backwards))
		must(f, err)
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		path := filepath.Join(t.TempDir(), "checkpoint.tar")
		must(t, os.WriteFile(path, data, 0o600))
		file := open(t, path)
		d, err := Read(t.Context(), file)
		if err != nil {
			return
		}
		var out bytes.Buffer
		must(t, d.Table(&out, Sections{}))
		must(t, d.Table(&out, Sections{true, true, true, true, true, true}))
		must(t, d.Tree(&out))
		must(t, WriteJSON(&out, d))
		if bad := unprintable(out.String()); bad != "" {
			t.Errorf("%q could do something to a terminal", bad)
		}
		if same, err := Compare(t.Context(), file, file); err == nil && !same.Same() {
			t.Errorf("it is not the same as itself: %+v", same)
		}
	})
}
