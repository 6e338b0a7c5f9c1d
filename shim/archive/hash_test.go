package archive

import (
	"crypto/sha256"
	"errors"
	"io"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestAHashOfAFile takes in pieces of every kind of offset and length, of a file that can be mapped and of one that cannot.
func TestAHashOfAFile(t *testing.T) {
	data := make([]byte, 3*hashWindow+1234)
	for i := range data {
		data[i] = byte(i * i >> 7)
	}
	regular, err := os.OpenFile(t.TempDir()+"/file", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	defer regular.Close()
	_, err = regular.Write(data)
	must(t, err)
	fd, err := unix.Open(regular.Name(), unix.O_WRONLY|unix.O_CLOEXEC, 0)
	must(t, err)
	writeOnly := os.NewFile(uintptr(fd), "write-only")
	defer writeOnly.Close()

	for _, piece := range [][2]int64{{0, hashWindow}, {1, hashWindow}, {4096, hashBuffer + 1}, {4097, 2*hashWindow - 5}, {77, 100}, {77, 0}, {5, hashBuffer}} {
		h := hasher{Hash: sha256.New()}
		for done := int64(0); done < piece[1]; {
			n, err := h.add(Segment{regular, piece[0] + done, min(piece[1]-done, hashWindow)})
			must(t, err)
			done += n
		}
		if want := sha256.Sum256(data[piece[0] : piece[0]+piece[1]]); string(h.Sum(nil)) != string(want[:]) {
			t.Errorf("%d bytes at %d have another digest", piece[1], piece[0])
		}
	}
	h := hasher{Hash: sha256.New()}
	if mapped, err := h.addMapped(Segment{writeOnly, 0, hashWindow}); mapped || err != nil {
		t.Errorf("a file that cannot be mapped: %v, %v", mapped, err)
	}
	if n, err := h.add(Segment{writeOnly, 0, hashWindow}); n != 0 || !errors.Is(err, unix.EBADF) {
		t.Errorf("a file that cannot be read: %d bytes, %v", n, err)
	}
}

// TestAHashOfAFileThatIsShorter ends as a read does, though the kernel kills who accesses what is behind the end of a mapped file.
func TestAHashOfAFileThatIsShorter(t *testing.T) {
	f, err := os.OpenFile(t.TempDir()+"/file", os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	must(t, err)
	defer f.Close()
	h := hasher{Hash: sha256.New()}
	for _, size := range []int64{hashWindow / 2, hashWindow/2 + 100, hashWindow - 1} {
		must(t, f.Truncate(size))
		if n, err := h.add(Segment{f, 0, hashWindow}); n != size || err != io.EOF {
			t.Errorf("of a file of %d bytes, %d, %v", size, n, err)
		}
	}
	if n, err := h.add(Segment{f, hashWindow, hashWindow}); n != 0 || err != io.EOF {
		t.Errorf("behind the end: %d bytes, %v", n, err)
	}
}
