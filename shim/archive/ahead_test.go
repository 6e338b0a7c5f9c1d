package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"testing"
	"time"
)

// followed follows what is in Images until all of it has been read.
func followed(t *testing.T, s *Staging, size int64) []*head {
	t.Helper()
	for wait := 100 * time.Millisecond; wait < time.Minute; wait *= 2 {
		ctx, cancel := context.WithTimeout(t.Context(), wait)
		s.Follow(ctx)
		<-s.ahead.done
		cancel()
		if heads := s.ahead.heads; len(heads) == 1 && heads[0].read == size {
			return heads
		}
		closeHeads(s.ahead.end())
	}
	t.Fatal("the file is not read")
	return nil
}

// The digest of a file that was followed is that of the file, whatever has become of it since.
func TestFollow(t *testing.T) {
	const name = "pages-1.img"
	first, second := bytes.Repeat([]byte("first "), bigSize), bytes.Repeat([]byte("second"), bigSize)
	for _, test := range []struct {
		name  string
		since func(t *testing.T, path string)
		want  []byte
		used  bool // what was read before
	}{
		{"as it was", func(*testing.T, string) {}, first, true},
		{"longer", func(t *testing.T, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
			must(t, err)
			defer f.Close()
			_, err = f.Write(second)
			must(t, err)
		}, append(bytes.Clone(first), second...), true},
		{"shorter", func(t *testing.T, path string) { must(t, os.Truncate(path, bigSize+1)) }, first[:bigSize+1], false},
		{"another file", func(t *testing.T, path string) {
			must(t, os.Remove(path))
			must(t, os.WriteFile(path, second, 0o600))
		}, second, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := rootDir(t) + "/a.tar"
			s := stage(t, path)
			must(t, s.WriteJSON(ConfigDump, Config{}))
			must(t, s.WriteFile(SpecDump, []byte("{}")))
			must(t, s.WriteJSON(ManifestName, NewManifest(Origin{})))
			must(t, s.WriteFile(ImagesDir+"/"+name, first))
			heads := followed(t, s, int64(len(first)))
			test.since(t, s.Images().Name()+"/"+name)
			members, err := s.members()
			must(t, err)
			for _, m := range members {
				if m.base == name && (headOf(heads, m) != nil) != test.used {
					t.Errorf("what was read before is used: %v", !test.used)
				}
			}
			must(t, s.Assemble(t.Context(), Options{}, nil))
			must(t, s.Publish(t.Context()))
			f, err := os.Open(path)
			must(t, err)
			defer f.Close()
			report, err := Verify(t.Context(), f, nil)
			must(t, err)
			want := fmt.Sprintf("%x", sha256.Sum256(test.want))
			if n := len(report.Manifest.Members); report.Manifest.Members[n-1].SHA256 != want || report.Members[n-1].SHA256 != want {
				t.Errorf("digest %s, of the archive's %s, want %s", report.Manifest.Members[n-1].SHA256, report.Members[n-1].SHA256, want)
			}
		})
	}
}

// What could not be read to the end of a window is in no digest.
func TestFollowFails(t *testing.T) {
	s := stage(t, rootDir(t)+"/a.tar")
	must(t, s.WriteFile(ImagesDir+"/pages-1.img", make([]byte, 2*hashWindow)))
	unreadable, err := os.OpenFile(s.Images().Name()+"/pages-1.img", os.O_WRONLY, 0)
	must(t, err)
	defer unreadable.Close()
	h := &head{hasher: hasher{Hash: sha256.New()}, file: unreadable}
	if h.advance(t.Context()) || !h.failed {
		t.Errorf("%d bytes of a file that cannot be read are taken in", h.read)
	}
	members, err := s.members()
	must(t, err)
	if headOf([]*head{h}, members[0]) != nil {
		t.Error("what was read before a failure is used")
	}
}
