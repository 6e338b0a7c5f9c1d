package rootfs

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Kinds, attributes and names that mean something to overlay are plain data here.
func TestTree(t *testing.T) {
	needRoot(t, "makes devices")
	dir := t.TempDir()
	sh(t, dir, "echo a >a; ln a b; ln -s /etc/passwd s; mkdir -p d/e; echo c >d/e/c; chmod 1777 .; chown 1:2 d; : >.wh.a; mknod w c 0 0; mkfifo p")
	setxattr(t, dir+"/a", "user.overlay.opaque", "y")
	setxattr(t, dir+"/d", "user.x", "")
	l, err := net.Listen("unix", dir+"/socket")
	must(t, err)
	defer l.Close()

	data, err := readTree(t, dir)
	must(t, err)
	headers, contents := entries(t, data)
	var got []string
	for _, h := range headers {
		got = append(got, fmt.Sprintf("%s %s %s %d:%d", h.Name, h.FileInfo().Mode(), h.Linkname, h.Uid, h.Gid))
		if h.ModTime.Nanosecond() == 0 {
			t.Errorf("%s has lost the fraction of its time: %v", h.Name, h.ModTime)
		}
	}
	want := []string{
		"./ dtrwxrwxrwx  0:0", ".wh.a -rw-r--r--  0:0", "a -rw-r--r--  0:0", "b -rw-r--r-- a 0:0", "p prw-r--r--  0:0",
		"s Lrwxrwxrwx /etc/passwd 0:0", "w Dcrw-r--r--  0:0", "d/ drwxr-xr-x  1:2", "d/e/ drwxr-xr-x  0:0", "d/e/c -rw-r--r--  0:0",
	}
	if !slices.Equal(got, want) {
		t.Errorf("tree is\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
	if contents["d/e/c"] != "c\n" {
		t.Errorf("content %q", contents["d/e/c"])
	}
	for _, h := range headers {
		if v, ok := h.PAXRecords["SCHILY.xattr.user.overlay.opaque"]; h.Name == "a" && v != "y" {
			t.Errorf("a has %v", h.PAXRecords)
		} else if _, ok2 := h.PAXRecords["SCHILY.xattr.user.x"]; h.Name == "d/" && !ok2 {
			t.Errorf("d has %v, %v", h.PAXRecords, ok)
		}
	}
}

// While Tree runs, names that it has listed become links to a secret, devices and FIFOs, over and
// over. The secret stays outside, and nothing waits.
func TestSwapRace(t *testing.T) {
	needRoot(t, "makes devices")
	outside, dir := t.TempDir(), t.TempDir()
	const secret = "the host's secret"
	must(t, os.WriteFile(outside+"/secret", []byte(secret), 0o644))
	must(t, os.Mkdir(outside+"/sub", 0o755))
	must(t, os.WriteFile(outside+"/sub/f", []byte(secret), 0o644))
	for i := range 8 {
		d := fmt.Sprintf("%s/%d", dir, i)
		must(t, os.MkdirAll(d+"/dir/sub", 0o755))
		must(t, os.WriteFile(d+"/dir/sub/f", []byte("harmless"), 0o644))
		must(t, os.WriteFile(d+"/dir/secret", []byte("harmless"), 0o644))
		must(t, os.WriteFile(d+"/file", []byte("harmless"), 0o644))
		must(t, os.Symlink(outside, d+"/dir-link"))
		must(t, os.Symlink(outside+"/secret", d+"/file-link"))
		must(t, unix.Mkfifo(d+"/fifo", 0o644))
		must(t, unix.Mknod(d+"/device", unix.S_IFCHR|0o644, int(unix.Mkdev(1, 5)))) // /dev/zero
	}

	stop := make(chan struct{})
	var swapping sync.WaitGroup
	swapping.Go(func() {
		pairs := [][2]string{{"dir", "dir-link"}, {"file", "file-link"}, {"file", "fifo"}, {"device", "file"}, {"dir", "file"}}
		for n := 0; ; n++ {
			select {
			case <-stop:
				return
			default:
			}
			d := fmt.Sprintf("%s/%d/", dir, n%8)
			p := pairs[n/8%len(pairs)]
			unix.Renameat2(unix.AT_FDCWD, d+p[0], unix.AT_FDCWD, d+p[1], unix.RENAME_EXCHANGE)
		}
	})
	t.Cleanup(func() { close(stop); swapping.Wait() })

	kinds := make(map[string]map[byte]bool) // seen under each name
	rounds := 0
	for start := time.Now(); time.Since(start) < 3*time.Second; rounds++ {
		data, err := readTree(t, dir)
		must(t, err)
		if bytes.Contains(data, []byte(secret)) {
			t.Fatalf("the secret is in the output of round %d", rounds)
		}
		headers, _ := entries(t, data)
		for _, h := range headers {
			name := filepath.Base(h.Name)
			if kinds[name] == nil {
				kinds[name] = make(map[byte]bool)
			}
			kinds[name][h.Typeflag] = true
		}
	}
	if len(kinds["file"]) < 4 || len(kinds["dir"]) < 2 {
		t.Errorf("the race has not been run: in %d rounds saw %v", rounds, kinds)
	}
	t.Logf("%d rounds", rounds)
}

// A file that changes while it is read has the size of its header, and what
// follows it is in its place.
func TestSizeRace(t *testing.T) {
	dir := t.TempDir()
	for i := range 20 {
		must(t, os.WriteFile(fmt.Sprintf("%s/%02d", dir, i), bytes.Repeat([]byte{'x'}, 100_000), 0o600))
	}
	stop := make(chan struct{})
	var changing sync.WaitGroup
	changing.Go(func() {
		for n := int64(0); ; n++ {
			select {
			case <-stop:
				return
			default:
				os.Truncate(fmt.Sprintf("%s/%02d", dir, n%20), n*7919%3_000_000)
			}
		}
	})
	t.Cleanup(func() { close(stop); changing.Wait() })
	for start := time.Now(); time.Since(start) < time.Second; {
		data, err := readTree(t, dir)
		must(t, err)
		if headers, _ := entries(t, data); len(headers) != 21 {
			t.Fatalf("%d entries", len(headers))
		}
	}
}

// Deterministically: the size is taken, then the file is cut off.
func TestShrunkFile(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", bytes.Repeat([]byte{'x'}, 3<<20), 0o600))
	must(t, os.WriteFile(dir+"/g", []byte("next"), 0o600))
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	// The first bytes reach the writer when 1 MiB has been buffered.
	w := writerFunc(func(p []byte) (int, error) {
		os.Truncate(dir+"/f", 2<<20)
		return b.Write(p)
	})
	must(t, Tree(t.Context(), w, f, scratchFile(t)))
	headers, contents := entries(t, b.Bytes())
	got := contents["f"]
	if len(headers) != 3 || len(got) != 3<<20 || strings.Count(got, "x") != 2<<20 || strings.Count(got, "\x00") != 1<<20 || contents["g"] != "next" {
		t.Errorf("%d entries, f has %d bytes, %d x, %d NUL", len(headers), len(got), strings.Count(got, "x"), strings.Count(got, "\x00"))
	}
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// 1,000 levels of long names make a path of 9,000 bytes, which no system call
// takes at once. Few descriptors must do.
func TestDeepTree(t *testing.T) {
	const levels = 1000
	dir := t.TempDir()
	name := strings.Repeat("d", 8)
	fd, err := unix.Open(dir, unix.O_PATH, 0)
	must(t, err)
	for range levels {
		must(t, unix.Mkdirat(fd, name, 0o755))
		next, err := unix.Openat(fd, name, unix.O_PATH, 0)
		must(t, err)
		must(t, unix.Close(fd))
		fd = next
	}
	must(t, unix.Symlinkat("leaf", fd, "leaf"))
	must(t, unix.Close(fd))

	var old unix.Rlimit
	must(t, unix.Getrlimit(unix.RLIMIT_NOFILE, &old))
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 24, Max: old.Max}))
	data, err := readTree(t, dir)
	must(t, unix.Setrlimit(unix.RLIMIT_NOFILE, &old))
	must(t, err)
	headers, _ := entries(t, data)
	last := headers[len(headers)-1]
	if want := strings.Repeat(name+"/", levels) + "leaf"; len(headers) != levels+2 || last.Name != want {
		t.Errorf("%d entries, the last has %d bytes", len(headers), len(last.Name))
	}
}

// A directory of more names than are held at a time, some of them directories.
func TestBatches(t *testing.T) {
	dir := t.TempDir()
	const count = 250
	for i := range count {
		must(t, os.MkdirAll(fmt.Sprintf("%s/d%d/d", dir, i), 0o755))
		must(t, os.Symlink("s", fmt.Sprintf("%s/s%d", dir, i)))
	}
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	k := &walk{ctx: t.Context(), root: f, scratch: scratchFile(t), batch: 10, parts: maxExtents}
	must(t, k.writeTo(&b))
	if headers, contents := entries(t, b.Bytes()); len(headers) != 3*count+1 || len(contents) != 3*count+1 {
		t.Errorf("%d entries, %d names, want %d", len(headers), len(contents), 3*count+1)
	}
}

// 20,000 files are sorted, in as many pieces as Copy says, and take no 20,000 descriptors.
func TestManyFiles(t *testing.T) {
	dir := t.TempDir()
	sh(t, dir, "seq 20000 | xargs touch")
	data, err := readTree(t, dir)
	must(t, err)
	headers, _ := entries(t, data)
	byName := func(a, b *tar.Header) int { return strings.Compare(a.Name, b.Name) }
	if files := headers[1:]; len(files) != 20_000 || !slices.IsSortedFunc(files[:10_000], byName) || !slices.IsSortedFunc(files[10_000:], byName) {
		t.Errorf("%d files, or not sorted", len(files))
	}
	slices.SortFunc(headers, byName)
	if different := slices.CompactFunc(headers, func(a, b *tar.Header) bool { return a.Name == b.Name }); len(different) != 20_001 {
		t.Errorf("%d different names", len(different))
	}
}

// A mount below /dev/shm is another volume.
func TestTreeStaysOnFileSystem(t *testing.T) {
	needRoot(t, "mounts a tmpfs")
	dir := t.TempDir()
	sh(t, dir, "mkdir m d; echo a >d/a; echo f >f; echo under >m/under")
	must(t, unix.Mount("tmpfs", dir+"/m", "tmpfs", 0, "size=1m"))
	t.Cleanup(func() { unix.Unmount(dir+"/m", unix.MNT_DETACH) })
	sh(t, dir, "echo other >m/other")
	data, err := readTree(t, dir)
	must(t, err)
	headers, _ := entries(t, data)
	if len(headers) != 4 {
		t.Errorf("%d entries", len(headers))
	}
}

// A process that holds a lease on a file would make an open wait for 45 seconds.
func TestLease(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", nil, 0o600))
	f, err := os.OpenFile(dir+"/f", os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	// The breaking of a lease is told by a signal, SIGIO, which Go ignores.
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_WRLCK); err != nil {
		t.Skip("needs a file system with leases: ", err)
	}
	start := time.Now()
	_, err = readTree(t, dir)
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `"f"`) || !strings.Contains(err.Error(), "lease") || time.Since(start) > 5*time.Second {
		t.Errorf("Tree = %v after %v", err, time.Since(start))
	}
}

// The descriptor that is handed in is left as it was.
func TestTreeLeavesOffset(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", nil, 0o600))
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	for range 2 {
		var b bytes.Buffer
		must(t, Tree(t.Context(), &b, f, scratchFile(t)))
		if headers, _ := entries(t, b.Bytes()); len(headers) != 2 {
			t.Errorf("%d entries", len(headers))
		}
	}
	if names, err := f.Readdirnames(-1); err != nil || len(names) != 1 {
		t.Errorf("%v, %v", names, err)
	}
}

// What readers would refuse is an error here.
func TestTooManyAttributes(t *testing.T) {
	dir := t.TempDir()
	if os.Geteuid() != 0 || unix.Mount("tmpfs", dir, "tmpfs", 0, "") != nil {
		t.Skip("needs root: mounts a tmpfs, which takes more attributes than a disk")
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	must(t, os.WriteFile(dir+"/f", nil, 0o600))
	for i := range 17 {
		if err := unix.Setxattr(dir+"/f", fmt.Sprintf("trusted.%d", i), bytes.Repeat([]byte{'x'}, 65536), 0); err != nil {
			t.Skip("needs a tmpfs with large attributes: ", err)
		}
	}
	_, err := readTree(t, dir)
	if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), `"f"`) {
		t.Errorf("Tree = %v, want ErrUnsupported naming the file", err)
	}
	t.Log(err)
}

// Errors name paths, and paths are hostile.
func FuzzQuote(f *testing.F) {
	for _, name := range oddNames {
		f.Add(name)
	}
	f.Add(strings.Repeat("\xff", 4000))
	f.Fuzz(func(t *testing.T, path string) {
		if q := quote(path); len(q) > 6000 || strings.ContainsFunc(q, func(r rune) bool { return r < ' ' }) {
			t.Errorf("quote(%q) = %q", path, q)
		}
	})
}

// Whatever bytes a name has, a reader gets them back.
func FuzzNames(f *testing.F) {
	for _, name := range oddNames {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsAny(name, "/\x00") {
			return
		}
		dir := t.TempDir()
		must(t, os.Symlink(name, dir+"/"+name))
		data, err := readTree(t, dir)
		must(t, err)
		headers, _ := entries(t, data)
		if h := headers[1]; h.Name != name || h.Linkname != name || h.Typeflag != tar.TypeSymlink {
			t.Errorf("%q became %q with target %q", name, h.Name, h.Linkname)
		}
	})
}
