package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

// fileWith is a file with this content.
func fileWith(t testing.TB, content []byte) *os.File {
	t.Helper()
	path := filepath.Join(t.TempDir(), "checkpoint.tar")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	file, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { file.Close() })
	return file
}

// zstdOf compresses data in frames of so many bytes, in one piece if 0.
func zstdOf(t testing.TB, data []byte, frame int) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	if err != nil {
		t.Fatal(err)
	}
	if frame == 0 {
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		return b.Bytes()
	}
	var packed []byte
	for piece := range slices.Chunk(data, frame) {
		packed = w.EncodeAll(piece, packed)
	}
	return packed
}

func TestOpenTellsWhatIsWrong(t *testing.T) {
	for name, test := range brokenArchives(t) {
		switch {
		case slices.Contains(onlyVerified, name):
			test.want = ""
		case name == "other bytes":
			test.want = "was not there when crishim wrote" // the other thing that is wrong with it
		}
		for form, data := range map[string][]byte{"plain": test.data, "frames": zstdOf(t, test.data, 1000), "one piece": zstdOf(t, test.data, 0)} {
			if name == "compressed" && form != "plain" {
				continue // twice
			}
			t.Run(name+", "+form, func(t *testing.T) {
				_, err := Open(t.Context(), fileWith(t, data), nil)
				if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
					t.Errorf("error is %v, want %q", err, test.want)
				}
			})
		}
	}
}

// Members are what they were, whatever the form of the archive, and in any order.
func TestMembersAreReadInAnyOrder(t *testing.T) {
	data := written(t)
	want := map[string][]byte{}
	for entries := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := entries.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		if h.Typeflag == tar.TypeReg {
			want[h.Name], err = io.ReadAll(entries)
			must(t, err)
		}
	}
	for form, data := range map[string][]byte{
		"plain": data, "frames": zstdOf(t, data, frameSize),
		"small frames":           zstdOf(t, data, 7777),
		"tiny frames at its end": append(zstdOf(t, data[:len(data)-10000], frameSize), zstdOf(t, data[len(data)-10000:], 100)...),
	} {
		t.Run(form, func(t *testing.T) {
			looked := 0
			a, err := Open(t.Context(), fileWith(t, data), func(name string, size int64, content io.Reader) error {
				looked++
				if looked%2 == 0 {
					return nil // passed over
				}
				got, err := io.ReadAll(content)
				if !bytes.Equal(got, want[name]) {
					t.Errorf("look was shown %d other bytes of %s", len(got), name)
				}
				return err
			})
			must(t, err)
			if a.Compressed != (form != "plain") || a.Size != int64(len(data)) || a.Config.Name != "counter" || a.Manifest == nil || len(a.Members) != len(want) {
				t.Errorf("opened is %+v", a)
			}
			random := rand.New(rand.NewPCG(1, 2))
			for name, want := range want { // in the order of a map
				member, err := a.Member(name)
				must(t, err)
				got, err := io.ReadAll(member)
				if err != nil || !bytes.Equal(got, want) {
					t.Fatalf("%s is other bytes, %v", name, err)
				}
				for range 20 {
					if len(want) == 0 {
						break
					}
					from := random.IntN(len(want))
					piece := make([]byte, random.IntN(len(want)-from)+1)
					if n, err := member.ReadAt(piece, int64(from)); err != nil && err != io.EOF || !bytes.Equal(piece[:n], want[from:from+n]) {
						t.Fatalf("at %d %s has other bytes, %v", from, name, err)
					}
				}
			}
			if member, err := a.Member("checkpoint/nothing.img"); member != nil || err != nil {
				t.Errorf("a member that is not there: %v, %v", member, err)
			}
		})
	}
	t.Run("one piece", func(t *testing.T) {
		// Too much to be kept in memory; zeros may follow an archive.
		a, err := Open(t.Context(), fileWith(t, zstdOf(t, append(data, make([]byte, maxFrame)...), 0)), nil)
		must(t, err)
		if _, err := a.Member(ConfigDump); !errors.Is(err, ErrInOnePiece) {
			t.Errorf("error is %v", err)
		}
	})
}

// Memory costs nothing that nobody looks at: an archive with 8 GiB of it is opened by reading some KiB.
func TestOpenPassesOverMemory(t *testing.T) {
	const memory = 8 << 30
	data := tarOf(t, []tar.Header{{Typeflag: tar.TypeReg, Name: ConfigDump, Linkname: "{}", Size: 2}})
	data = data[:len(data)-trailerSize]
	header, err := tarHeader(member{name: "checkpoint/pages-1.img", size: memory}, 0)
	must(t, err)
	file := fileWith(t, append(data, header...))
	size := int64(len(data)+len(header)) + memory + trailerSize
	must(t, os.Truncate(file.Name(), size))

	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	read := readSoFar(t)
	a, err := Open(t.Context(), file, nil)
	must(t, err)
	read = readSoFar(t) - read
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > 4<<20 || read > 1<<20 {
		t.Errorf("it took %d bytes of memory and read %d", took, read)
	}
	if a.Size != size || a.Members[1].Size != memory {
		t.Errorf("opened is %+v", a)
	}
	// What it says it has, and has not, is no member.
	must(t, os.Truncate(file.Name(), size/2))
	if _, err := Open(t.Context(), file, nil); err == nil || !strings.Contains(err.Error(), "in the middle of a member") {
		t.Errorf("error is %v", err)
	}
}

// readSoFar is how many bytes this process has read.
func readSoFar(t *testing.T) int64 {
	t.Helper()
	content, err := os.ReadFile("/proc/self/io")
	must(t, err)
	for line := range strings.Lines(string(content)) {
		if value, ok := strings.CutPrefix(line, "rchar: "); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
			must(t, err)
			return n
		}
	}
	t.Fatalf("the kernel does not count: %s", content)
	return 0
}

// A small file that stands for any number of bytes costs time, not memory.
func TestOpenIsNotFilledByABomb(t *testing.T) {
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b)
	must(t, err)
	header, err := tarHeader(member{name: "checkpoint/pages-1.img", size: 1 << 40}, 0)
	must(t, err)
	w.Write(header)
	zeros := make([]byte, 1<<20)
	for range 256 {
		w.Write(zeros)
	}
	must(t, w.Close())
	for form, data := range map[string][]byte{"one piece": b.Bytes(), "a frame that lies": lyingFrame(t)} {
		t.Run(form, func(t *testing.T) {
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			_, err := Open(t.Context(), fileWith(t, data), nil)
			runtime.ReadMemStats(&after)
			if err == nil {
				t.Error("it was taken for an archive")
			}
			if took := after.TotalAlloc - before.TotalAlloc; took > 64<<20 {
				t.Errorf("%d bytes of memory for %d: %v", took, len(data), err)
			}
		})
	}
}

// lyingFrame is a frame that says it has 1000 bytes, and has 100 MiB.
func lyingFrame(t *testing.T) []byte {
	t.Helper()
	big := zstdOf(t, make([]byte, 100<<20), 100<<20)
	// Magic number, and a descriptor for a size of two bytes, which is 1000; the window is in front of it.
	var h zstd.Header
	must(t, h.Decode(big))
	lying := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x40, 0x88, 0xe8, 0x02}
	if h.HasCheckSum {
		lying[4] |= 4
	}
	return append(lying, big[h.HeaderSize:]...)
}

func TestOpenStops(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	data := written(t)
	for form, data := range map[string][]byte{"plain": data, "frames": zstdOf(t, data, frameSize), "one piece": zstdOf(t, data, 0)} {
		if _, err := Open(ctx, fileWith(t, data), nil); err == nil || !strings.Contains(err.Error(), "enough") {
			t.Errorf("%s: error is %v, want the context's cause", form, err)
		}
	}
}

// FuzzOpen: whatever is given out as an archive, opening it ends, and members are within it.
func FuzzOpen(f *testing.F) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for n := range 3 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("checkpoint/core-%d.img", n), Size: int64(600 * n)}); err != nil {
			f.Fatal(err)
		}
		w.Write(make([]byte, 600*n))
	}
	w.Close()
	f.Add(b.Bytes())
	f.Add(zstdOf(f, b.Bytes(), 1000))
	f.Add(zstdOf(f, b.Bytes(), 0))
	f.Fuzz(func(t *testing.T, data []byte) {
		a, err := Open(t.Context(), fileWith(t, data), func(_ string, size int64, content io.Reader) error {
			if n, _ := io.Copy(io.Discard, content); n > size {
				return errors.New("longer than it is")
			}
			return nil
		})
		if err != nil {
			return
		}
		for _, m := range a.Members {
			member, err := a.Member(m.Name)
			if errors.Is(err, ErrInOnePiece) {
				return
			}
			if n, err := io.Copy(io.Discard, member); n != m.Size || err != nil {
				t.Errorf("%q has %d bytes of %d, %v", m.Name, n, m.Size, err)
			}
		}
	})
}
