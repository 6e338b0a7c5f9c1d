package archive

import (
	"bytes"
	"crypto/rand"
	"crypto/sha256"
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"crishim/test/disks"
)

// fileSystems are those on which archives are put together in different ways.
var fileSystems = []struct {
	name          string
	mkfs          []string // nil for tmpfs
	insert, clone bool
}{
	{"ext4", []string{"mkfs.ext4", "-q", "-F"}, true, false},
	{"ext4 without extents", []string{"mkfs.ext4", "-q", "-F", "-O", "^extents,^64bit"}, false, false},
	{"ext4 of clusters", []string{"mkfs.ext4", "-q", "-F", "-O", "bigalloc", "-C", "65536"}, false, false},
	{"ext4 of 1 KiB", []string{"mkfs.ext4", "-q", "-F", "-b", "1024"}, true, false},
	{"xfs", []string{"mkfs.xfs", "-q", "-f"}, true, true},
	{"xfs without reflink", []string{"mkfs.xfs", "-q", "-f", "-m", "reflink=0"}, true, false},
	{"btrfs", []string{"mkfs.btrfs", "-q", "-f"}, false, true},
	{"tmpfs", nil, false, false},
}

// On each file system the way is the one that is meant for it, the archive has the same bytes, and the room that it takes
// meanwhile is that of itself.
func TestFileSystems(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount file systems")
	}
	big := make([]byte, 48<<20)
	rand.Read(big)
	odd := big[:20<<20+77]
	var first [sha256.Size]byte
	for i, fs := range fileSystems {
		t.Run(fs.name, func(t *testing.T) {
			dir := disks.Mount(t, fs.mkfs, 400)
			s := stage(t, dir+"/a.tar")
			if can := s.probe(); can.insert != fs.insert || can.clone != fs.clone {
				t.Errorf("it can insert: %t, clone: %t; want %t, %t", can.insert, can.clone, fs.insert, fs.clone)
			}
			files := map[string][]byte{
				"checkpoint/pages-1.img": odd, "checkpoint/pages-2.img": big, "checkpoint/pages-3.img": big[:16<<20], "config.dump": []byte("{}"),
				"checkpoint/core-1.img": big[:3333],
			}
			modTime := time.Unix(1700000000, 0)
			for name, data := range files {
				must(t, s.WriteFile(name, data))
				must(t, os.Chtimes(s.Dir().Name()+"/"+name, modTime, modTime))
			}
			unix.Sync()
			before := disks.Used(t, dir)
			most := before
			must(t, s.Assemble(t.Context(), Options{}, func(int64) { most = max(most, disks.Used(t, dir)) }))
			must(t, s.Publish(t.Context()))
			if left := names(t, s.location.dir.Name()); len(left) != 1 && !strings.HasPrefix(fs.name, "ext4") {
				t.Errorf("left %v", left)
			}
			got := contents(t, dir+"/a.tar")
			for name, want := range files {
				if !bytes.Equal(got[name], want) {
					t.Errorf("%s has other bytes", name)
				}
			}
			info, err := os.Stat(dir + "/a.tar")
			must(t, err)
			t.Logf("%s: at most %.2f of the archive's %d bytes were taken beyond what was staged", fs.name,
				float64(most-before)/float64(info.Size()), info.Size())
			data, err := os.ReadFile(dir + "/a.tar")
			must(t, err)
			// checkpoint/ has the time of Assemble.
			for n := range data[:64<<10] {
				if bytes.HasPrefix(data[n:], []byte("checkpoint/\x00")) {
					clear(data[n : n+blockSize])
				}
			}
			if sum := sha256.Sum256(data); i == 0 {
				first = sum
			} else if sum != first {
				t.Errorf("the archive is not the one that is made on %s", fileSystems[0].name)
			}
		})
	}
}

// After a hole that cannot be inserted, the staged file is copied.
func TestInsertFails(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount file systems")
	}
	dir := disks.Mount(t, []string{"mkfs.ext4", "-q", "-F", "-O", "^extents,^64bit"}, 100)
	s := stage(t, dir+"/a.tar")
	members := fill(t, s)
	list, err := s.members()
	must(t, err)
	a := &assembly{}
	a.entries, a.size, err = layout(list, nil, false, 4096, time.Now())
	must(t, err)
	p := &plain{can: abilities{insert: true, block: 4096}, report: a.report}
	if err := p.insert(t.Context(), s, a); err != nil || p.file != nil {
		t.Fatalf("insert = %v, %v; want nothing done", p.file, err)
	}
	must(t, s.Assemble(t.Context(), Options{}, nil))
	must(t, s.Publish(t.Context()))
	if got := contents(t, dir+"/a.tar"); !bytes.Equal(got["checkpoint/pages-1.img"], members["checkpoint/pages-1.img"]) {
		t.Error("checkpoint/pages-1.img has other bytes")
	}
}

// Other readers pass over what fills headers up, and take what is compressed.
func TestCompressed(t *testing.T) {
	path := rootDir(t) + "/a.tar"
	s := stage(t, path)
	members := fill(t, s)
	must(t, s.WriteJSON(ManifestName, NewManifest(Origin{})))
	var size int64
	must(t, s.Assemble(t.Context(), Options{Compression: Zstd}, func(n int64) { size = n }))
	must(t, s.Publish(t.Context()))
	info, err := os.Stat(path)
	must(t, err)
	if info.Size() != size {
		t.Errorf("progress ended at %d, archive has %d bytes", size, info.Size())
	}
	data, err := os.ReadFile(path)
	must(t, err)
	verify := func(data []byte) []string {
		report, err := Verify(t.Context(), bytes.NewReader(data), nil)
		must(t, err)
		return report.Problems
	}
	for _, problem := range verify(data) {
		if !strings.Contains(problem, "is missing: without it") { // it is no whole checkpoint
			t.Errorf("Verify: %s", problem)
		}
	}
	plain, compressed, err := Decompress(bytes.NewReader(data))
	if err != nil || !compressed {
		t.Fatalf("Decompress = %t, %v", compressed, err)
	}
	defer plain.Close()
	got := read(t, plain)
	for name, want := range members {
		if !bytes.Equal(got[name], want) {
			t.Errorf("%s has other bytes", name)
		}
	}
	for what, test := range map[string]struct {
		data []byte
		want string
	}{
		"cut off":      {data[:len(data)/2], "cut off"},
		"changed":      {append(bytes.Clone(data[:len(data)/2]), append([]byte{data[len(data)/2] ^ 1}, data[len(data)/2+1:]...)...), "cannot be read"},
		"with garbage": {append(bytes.Clone(data), "garbage"...), "cannot be read on"},
	} {
		if problems := strings.Join(verify(test.data), "\n"); !strings.Contains(problems, test.want) {
			t.Errorf("%s: problems are %s", what, problems)
		}
	}
}

func TestWithoutDigests(t *testing.T) {
	path := rootDir(t) + "/a.tar"
	s := stage(t, path)
	fill(t, s)
	must(t, s.WriteJSON(ManifestName, NewManifest(Origin{Crishim: "1.2.3"})))
	must(t, s.Assemble(t.Context(), Options{Digest: None}, nil))
	must(t, s.Publish(t.Context()))
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	report, err := Verify(t.Context(), f, nil)
	must(t, err)
	if report.Manifest.Origin.Crishim != "1.2.3" || len(report.Manifest.Members) == 0 || report.Manifest.Members[0].SHA256 != "" {
		t.Errorf("manifest %+v", report.Manifest)
	}
	for _, problem := range report.Problems {
		if !strings.Contains(problem, "is missing: without it") {
			t.Errorf("Verify: %s", problem)
		}
	}
}

func TestOptions(t *testing.T) {
	for _, bad := range []Options{{Compression: "gzip"}, {Digest: "md5"}} {
		if bad.Validate() == nil {
			t.Errorf("%+v is taken", bad)
		}
		s := stage(t, rootDir(t)+"/a.tar")
		if err := s.Assemble(t.Context(), bad, nil); err == nil || errors.Is(err, os.ErrNotExist) {
			t.Errorf("Assemble = %v", err)
		}
	}
}
