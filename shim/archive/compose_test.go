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
