package archive

import (
	"archive/tar"
	"bytes"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
)

var checkpointed = time.Date(2026, 5, 6, 7, 8, 9, 0, time.UTC)

// identified publishes an archive as the checkpoint service makes them, and returns its path.
func identified(t testing.TB, dir string, options Options, labels map[string]string) string {
	t.Helper()
	path := filepath.Join(dir, fmt.Sprintf("checkpoint-%s-%d.tar", options.Compression, len(labels)))
	l, err := OpenLocation(path)
	must(t, err)
	defer l.Close()
	s, err := l.Stage(StagingName())
	must(t, err)
	defer func() { must(t, s.Remove()) }()
	must(t, s.WriteFile(SpecDump, []byte(`{"annotations": {}}`)))
	must(t, s.WriteJSON(ConfigDump, Config{ID: "0123", Name: "counter", CheckpointedTime: checkpointed}))
	must(t, s.WriteJSON(StatusDump, map[string]any{"labels": labels}))
	must(t, s.WriteJSON(ManifestName, NewManifest(Origin{Crishim: "test"})))
	noise := make([]byte, 3*bigSize+5)
	rand.Read(noise)
	must(t, s.WriteFile(ImagesDir+"/pages-1.img", noise))
	must(t, s.Assemble(t.Context(), options, func(int64) {}))
	must(t, s.Publish(t.Context()))
	return path
}

func identify(t testing.TB, path string) (Identity, error) {
	t.Helper()
	file, err := os.Open(path)
	must(t, err)
	defer file.Close()
	return Identify(file)
}

func TestIdentify(t *testing.T) {
	kubelets := map[string]string{
		"io.kubernetes.pod.namespace": "shop", "io.kubernetes.pod.name": "web-0", "io.kubernetes.container.name": "nginx", "app": "web",
	}
	for _, compression := range []string{None, Zstd} {
		dir := rootDir(t)
		for want, labels := range map[string]map[string]string{"shop/web-0/nginx": kubelets, "0123": nil} {
			got, err := identify(t, identified(t, dir, Options{Compression: compression}, labels))
			if err != nil || got.Container != want || !got.Made.Equal(checkpointed) {
				t.Errorf("compression %s: it is %+v, %v; want %s of %s", compression, got, err, want, checkpointed)
			}
		}
	}
}

// A manifest may be larger than a frame, and than what is looked at first.
func TestManifestsOfAnySize(t *testing.T) {
	encoder, err := zstd.NewWriter(nil)
	must(t, err)
	defer encoder.Close()
	for _, members := range []int{0, 1000, 20000} {
		manifest := NewManifest(Origin{})
		for i := range members {
			manifest.Members = append(manifest.Members, Digest{Name: fmt.Sprintf("%s/core-%d.img", ImagesDir, i), SHA256: noSum})
		}
		data, err := manifest.encode()
		must(t, err)
		var plain bytes.Buffer
		plain.Write(make([]byte, 2*frameSize)) // what there is before
		w := tar.NewWriter(&plain)
		must(t, w.WriteHeader(&tar.Header{Name: ManifestName, Size: int64(len(data)), Mode: 0o600}))
		_, err = w.Write(data)
		must(t, errors.Join(err, w.Close()))
		var packed []byte
		for frame := range slices.Chunk(plain.Bytes(), frameSize) {
			packed = encoder.EncodeAll(frame, packed)
		}
		for name, content := range map[string][]byte{"plain": plain.Bytes(), "compressed": packed} {
			if found, err := endsWithManifest(bytes.NewReader(content), int64(len(content))); err != nil || !found {
				t.Errorf("%s, %d members: found is %t, %v", name, members, found, err)
			}
		}
	}
}

// What must not be taken for crishim's own: it would be removed.
func TestForeignArchives(t *testing.T) {
	dir := rootDir(t)
	plain, err := os.ReadFile(identified(t, dir, Options{}, nil))
	must(t, err)
	packed, err := os.ReadFile(identified(t, dir, Options{Compression: Zstd}, nil))
	must(t, err)
	encoder, err := zstd.NewWriter(nil)
	must(t, err)
	defer encoder.Close()
	manifest := bytes.LastIndex(plain, append([]byte(ManifestName), 0))
	for name, content := range map[string][]byte{
		"empty":                     nil,
		"text":                      []byte("precious"),
		"zeros":                     make([]byte, 1<<20),
		"cut off":                   plain[:len(plain)-blockSize],
		"cut off at the manifest":   plain[:manifest],
		"without a manifest":        append(bytes.Clone(plain[:manifest]), make([]byte, trailerSize)...),
		"with something behind it":  append(bytes.Clone(plain), 'x'),
		"with a block behind it":    append(bytes.Clone(plain), make([]byte, blockSize)...),
		"a manifest and no more":    plain[manifest:],
		"of another version":        bytes.Replace(plain, []byte(`"version": 1`), []byte(`"version": 2`), 1),
		"without config.dump":       bytes.Replace(plain, []byte(ConfigDump+"\x00"), []byte("c0nfig.dump\x00"), 1),
		"compressed, cut off":       packed[:len(packed)-10],
		"compressed, and not by us": encoder.EncodeAll(plain[:manifest], nil),
		"compressed text":           encoder.EncodeAll([]byte("precious"), nil),
		"frames and no more":        bytes.Repeat([]byte{0x28, 0xb5, 0x2f, 0xfd}, 1<<18),
	} {
		path := filepath.Join(dir, "foreign")
		must(t, os.WriteFile(path, content, 0o600))
		if identity, err := identify(t, path); !errors.Is(err, ErrForeign) {
			t.Errorf("%s: it is %+v, %v", name, identity, err)
		}
	}
}

func FuzzIdentify(f *testing.F) {
	f.Add([]byte("precious"))
	f.Add(bytes.Repeat([]byte{0x28, 0xb5, 0x2f, 0xfd}, 8))
	f.Add(append(append([]byte(ManifestName), 0), make([]byte, 3*blockSize)...))
	f.Fuzz(func(t *testing.T, content []byte) {
		path := filepath.Join(t.TempDir(), "a")
		must(t, os.WriteFile(path, content, 0o600))
		if identity, err := identify(t, path); err == nil && (identity.Container == "" || identity.Made.IsZero()) {
			t.Errorf("it is %+v", identity)
		}
	})
}
