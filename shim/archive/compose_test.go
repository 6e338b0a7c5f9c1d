package archive

import (
	"bytes"
	"crypto/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// A member of pieces: of an unlinked file, of one on another file system, and of the same one twice.
func TestCompose(t *testing.T) {
	data := make([]byte, 5*bigSize)
	rand.Read(data)
	open := func(dir string) *os.File {
		f, err := os.OpenFile(filepath.Join(dir, "source"), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
		must(t, err)
		t.Cleanup(func() { f.Close() })
		_, err = f.Write(data)
		must(t, err)
		return f
	}
	elsewhere := rootDir(t)
	if err := unix.Mount("tmpfs", elsewhere, "tmpfs", 0, ""); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(elsewhere, unix.MNT_DETACH) })

	dir := rootDir(t)
	near, far := open(dir), open(elsewhere)
	must(t, os.Remove(near.Name()))
	pieces := []Segment{{near, 4096, 2 * bigSize}, {far, 1, 777}, {near, 0, 0}, {far, bigSize, 2*bigSize + 5}, {near, 4096, 512}}
	var want []byte
	for _, p := range pieces {
		want = append(want, data[p.Offset:p.Offset+p.Length]...)
	}

	s := stage(t, dir+"/a.tar")
	must(t, s.Compose(RootfsDiff, pieces))
	must(t, s.Compose("checkpoint/nothing.img", nil))
	must(t, s.WriteJSON(ManifestName, NewManifest(Origin{})))
	must(t, s.Assemble(t.Context(), Options{}, nil))
	must(t, s.Publish(t.Context()))

	got := contents(t, dir+"/a.tar")
	if !bytes.Equal(got[RootfsDiff], want) {
		t.Errorf("the member has %d bytes, want %d, or they differ", len(got[RootfsDiff]), len(want))
	}
	if nothing, ok := got["checkpoint/nothing.img"]; !ok || len(nothing) > 0 {
		t.Errorf("the member of no pieces is %q, %t", nothing, ok)
	}
	f, err := os.Open(dir + "/a.tar")
	must(t, err)
	defer f.Close()
	report, err := Verify(t.Context(), f, nil)
	must(t, err)
	for _, problem := range report.Problems {
		if !strings.Contains(problem, "is missing: without it the container cannot be restored") { // it is no whole checkpoint
			t.Errorf("Verify: %s", problem)
		}
	}
}

// TestTheBytesOfAComposedMember begin where most of them can be shared with the files that they come from.
func TestTheBytesOfAComposedMember(t *testing.T) {
	const align = 4096
	for _, test := range []struct {
		name     string
		segments []Segment
		want     int64
	}{
		{"that is a file", nil, 0},
		{"of one piece", []Segment{{Offset: align, Length: bigSize}}, 0},
		{"of one piece that begins elsewhere", []Segment{{Offset: align + 1024, Length: bigSize}}, 1024},
		{"of a header and content that begins at a block", []Segment{{Length: 1536}, {Offset: align, Length: bigSize}}, align - 1536},
		{"of much behind a little", []Segment{{Length: align + 512}, {Offset: 2 * align, Length: bigSize}, {Offset: 2*align + bigSize, Length: 512}}, align - 512},
		{"of a little behind much", []Segment{{Length: bigSize + 512}, {Offset: bigSize + align, Length: bigSize / 2}}, 0},
		{"of two that go together", []Segment{{Length: 3 * align}, {Offset: 4*align + 512, Length: 2*align - 512}, {Offset: 6 * align, Length: 3 * align}}, 512},
		{"of small ones, of which no block can be shared, and one that can", []Segment{
			{Length: align - 512}, {Offset: align, Length: align - 512}, {Offset: 2 * align, Length: align}, {Offset: 3*align + 512, Length: align - 512},
		}, 1024},
		{"of bytes that no tar can have there", []Segment{{Offset: 1, Length: bigSize}}, 0},
	} {
		m := member{name: RootfsDiff, composed: test.segments != nil, segments: test.segments}
		for offset := int64(0); offset <= align; offset += blockSize {
			header, err := alignedHeader(m, offset, align)
			must(t, err)
			if got := (offset + int64(len(header))) % align; got != test.want {
				t.Errorf("a member %s, whose header is at %d, begins at %d, want %d", test.name, offset, got, test.want)
			}
		}
	}
}

func TestComposeRefuses(t *testing.T) {
	dir := rootDir(t)
	source, err := os.OpenFile(dir+"/source", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	defer source.Close()
	must(t, source.Truncate(100))
	s := stage(t, dir+"/a.tar")
	must(t, s.WriteFile("there", nil))
	for name, pieces := range map[string][]Segment{
		"there":       nil,
		"../x":        nil,
		"no file":     {{nil, 0, 1}},
		"before it":   {{source, -1, 1}},
		"backwards":   {{source, 0, -1}},
		"overflowing": {{source, 1, 1<<63 - 1}},
	} {
		if err := s.Compose(name, pieces); err == nil {
			t.Errorf("Compose(%q) made a member", name)
		}
	}
	must(t, s.Compose("short", []Segment{{source, 50, 51}}))
	err = s.Assemble(t.Context(), Options{}, nil)
	if err == nil || !strings.Contains(err.Error(), "pack short: file shrank by 1 bytes") {
		t.Errorf("Assemble = %v, want an error that names the member", err)
	}
}

// Whoever writes to a composed member by other means is told, and not left out.
func TestComposedMemberWrittenTo(t *testing.T) {
	s := stage(t, rootDir(t)+"/a.tar")
	must(t, s.Compose(RootfsDiff, nil))
	must(t, os.WriteFile(s.Dir().Name()+"/"+RootfsDiff, []byte("x"), 0o600))
	if err := s.Assemble(t.Context(), Options{}, nil); err == nil || !strings.Contains(err.Error(), "written to as well") {
		t.Errorf("Assemble = %v", err)
	}
}
