package rootfs

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This file has the means of the tests: overlay mounts, in a mount namespace of
// their own, appliers of OCI layers, and a description of a tree by which two are
// compared.

const inNamespace = "CRISHIM_TEST_MOUNTS"

func TestMain(m *testing.M) {
	if os.Geteuid() != 0 || os.Getenv(inNamespace) != "" {
		os.Exit(m.Run())
	}
	runtime.LockOSThread() // whose end, and not only the process's, would kill what it has started
	// The same once more where mounts are nobody else's, and end with the process.
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), inNamespace+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "run the tests in a mount namespace:", err)
		os.Exit(1)
	}
	os.Exit(cmd.ProcessState.ExitCode())
}

func needRoot(t *testing.T, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: " + why)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// overlay is a mounted overlay file system.
type overlay struct {
	lower, upper, merged string
	bottom               string // a lower directory below lower
	userXattr            bool
}

func newOverlay(t *testing.T) overlay {
	t.Helper()
	needRoot(t, "mounts an overlay")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m,mode=755"); err != nil { // faster than a disk
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	o := overlay{lower: dir + "/lower", upper: dir + "/upper", merged: dir + "/merged", bottom: dir + "/bottom"}
	for _, d := range []string{o.lower, o.upper, o.merged, o.bottom, dir + "/work"} {
		must(t, os.Mkdir(d, 0o755))
	}
	return o
}

// image mounts what the overlay is without its upper directory.
func (o overlay) image(t *testing.T) string {
	t.Helper()
	dir := filepath.Dir(o.upper) + "/image"
	must(t, os.Mkdir(dir, 0o755))
	must(t, unix.Mount("overlay", dir, "overlay", 0, "lowerdir="+o.lower+":"+o.bottom))
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func (o *overlay) mount(t *testing.T, options string) {
	t.Helper()
	o.userXattr = strings.Contains(options, "userxattr")
	data := fmt.Sprintf("lowerdir=%s:%s,upperdir=%s,workdir=%s%s", o.lower, o.bottom, o.upper, filepath.Dir(o.upper)+"/work", options)
	if err := unix.Mount("overlay", o.merged, "overlay", 0, data); err != nil {
		t.Fatalf("mount an overlay with %q: %v", options, err)
	}
	t.Cleanup(func() { unix.Unmount(o.merged, unix.MNT_DETACH) })
}

func (o overlay) diff(t *testing.T) (layer []byte, deleted []string, err error) {
	t.Helper()
	var b bytes.Buffer
	err = o.diffTo(t, &b, func(path string) error {
		deleted = append(deleted, path)
		return nil
	})
	return b.Bytes(), deleted, err
}

func (o overlay) diffTo(t *testing.T, w io.Writer, deleted func(string) error) error {
	t.Helper()
	return diff(t.Context(), w, o.layer(t), deleted)
}

// diff makes a diff in one pass and one piece: what Copy's two have to come to.
func diff(ctx context.Context, w io.Writer, layer Layer, deleted func(path string) error) error {
	scratch, err := os.CreateTemp("", "")
	if err != nil {
		return err
	}
	defer scratch.Close()
	if err := os.Remove(scratch.Name()); err != nil {
		return err
	}
	k := &walk{ctx: ctx, root: layer.Upper, layer: &layer, scratch: scratch, deleted: deleted, batch: maxSorted, parts: maxExtents}
	return k.writeTo(w)
}

func readTree(t *testing.T, dir string) ([]byte, error) {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	err = Tree(t.Context(), &b, f, scratchFile(t))
	return b.Bytes(), err
}

func scratchFile(t testing.TB) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "scratch")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// entries reads a tar.
func entries(t *testing.T, layer []byte) (headers []*tar.Header, contents map[string]string) {
	t.Helper()
	contents = make(map[string]string)
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err == io.EOF {
			return headers, contents
		}
		must(t, err)
		data, err := io.ReadAll(r)
		must(t, err)
		headers = append(headers, h)
		contents[h.Name] = string(data)
	}
}

// checkOverlay compares what is seen in the mount with the image plus layer, as
// those apply it who know whiteouts, and as those do who read deleted.files.
func checkOverlay(t *testing.T, o overlay) (layer []byte, deleted []string) {
	t.Helper()
	start := time.Now()
	layer, deleted, err := o.diff(t)
	must(t, err)
	t.Logf("diff of %d bytes in %v", len(layer), time.Since(start))
	sameAsOnePass(t, o, func() {})
	image, want := o.image(t), describe(t, o.merged)
	for name, apply := range map[string]func(t *testing.T, root string){
		"by whiteouts":     func(t *testing.T, root string) { apply(t, layer, root) },
		"by deleted.files": func(t *testing.T, root string) { applyLiterally(t, layer, deleted, root) },
	} {
		t.Run(name, func(t *testing.T) {
			root := filepath.Dir(o.upper) + "/applied"
			if out, err := exec.Command("cp", "-a", image, root).CombinedOutput(); err != nil {
				t.Fatalf("cp: %s", out)
			}
			defer os.RemoveAll(root)
			apply(t, root)
			compare(t, describe(t, root), want)
		})
	}
	return layer, deleted
}

func compare(t *testing.T, got, want map[string]string) {
	t.Helper()
	bad := 0
	for path, w := range want {
		if g := got[path]; g != w {
			if bad++; bad < 20 {
				t.Errorf("%q is\n%s, want\n%s", path, g, w)
			}
		}
	}
	for path, g := range got {
		if _, ok := want[path]; !ok {
			if bad++; bad < 20 {
				t.Errorf("%q should not be there: %s", path, g)
			}
		}
	}
}

// describe returns for each path all that a layer should keep.
func describe(t *testing.T, root string) map[string]string {
	t.Helper()
	found := make(map[string]string)
	first := make(map[uint64]string)
	must(t, filepath.WalkDir(root, func(p string, d os.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, _ := filepath.Rel(root, p)
		var st unix.Stat_t
		err = unix.Lstat(p, &st)
		if err == unix.ENOENT {
			return nil // overlay lists whiteouts of its upper directory that are files, and has nothing there
		}
		must(t, err)
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d device %d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			must(t, err)
			s += fmt.Sprintf(" content %.100q of %d, sum %x", data, len(data), sha256.Sum256(data))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			must(t, err)
			s += fmt.Sprintf(" target %q", target)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first[st.Ino] == "" {
				first[st.Ino] = name
			} else {
				s += fmt.Sprintf(" same as %q", first[st.Ino])
			}
		}
		list, err := grow(func(b []byte) (int, error) { return unix.Llistxattr(p, b) })
		must(t, err)
		attrs := strings.Split(string(list), "\x00")
		slices.Sort(attrs)
		for _, a := range attrs {
			if a != "" {
				value, err := grow(func(b []byte) (int, error) { return unix.Lgetxattr(p, a, b) })
				must(t, err)
				s += fmt.Sprintf(" %s=%q", a, value)
			}
		}
		found[name] = s
		return nil
	}))
	return found
}

// apply applies an OCI layer to a directory.
func apply(t *testing.T, layer []byte, root string) {
	t.Helper()
	unpacked := make(map[string]bool)
	unpack(t, layer, root, func(p string) bool {
		dir, base := path.Split(p)
		if base == opaqueMarker {
			removeOthers(t, path.Clean(dir), unpacked)
			return true
		}
		if name, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			must(t, os.RemoveAll(dir+name))
			return true
		}
		unpacked[p] = true
		return false
	})()
}

// applyLiterally does what CRI-O and podman do.
func applyLiterally(t *testing.T, layer []byte, deleted []string, root string) {
	t.Helper()
	done := unpack(t, layer, root, func(string) bool { return false })
	for _, path := range deleted {
		must(t, os.RemoveAll(filepath.Join(root, path)))
	}
	done()
}

// unpack unpacks a tar, but for the entries that special takes, over what is there.
// Done sets the times of directories.
func unpack(t *testing.T, layer []byte, root string, special func(path string) bool) (done func()) {
	t.Helper()
	var dirs []*tar.Header
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		p := filepath.Join(root, h.Name)
		if special(p) {
			continue
		}
		if info, err := os.Lstat(p); err == nil && !(info.IsDir() && h.Typeflag == tar.TypeDir) {
			must(t, os.RemoveAll(p))
		}
		switch h.Typeflag {
		case tar.TypeDir:
			must(t, os.MkdirAll(p, 0o700))
			// A directory's attributes are those of the layer, not added to.
			list, _ := grow(func(b []byte) (int, error) { return unix.Llistxattr(p, b) })
			for a := range strings.SplitSeq(string(list), "\x00") {
				if a != "" && a != "security.selinux" {
					must(t, unix.Lremovexattr(p, a))
				}
			}
			dirs = append(dirs, h)
		case tar.TypeReg:
			f, err := os.OpenFile(p, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
			must(t, err)
			_, err = io.Copy(f, r)
			must(t, err)
			must(t, f.Close())
		case tar.TypeLink:
			must(t, os.Link(filepath.Join(root, h.Linkname), p))
			continue
		case tar.TypeSymlink:
			must(t, os.Symlink(h.Linkname, p))
		case tar.TypeFifo:
			must(t, unix.Mkfifo(p, 0o600))
		case tar.TypeChar:
			must(t, unix.Mknod(p, unix.S_IFCHR, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))))
		case tar.TypeBlock:
			must(t, unix.Mknod(p, unix.S_IFBLK, int(unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)))))
		default:
			t.Fatalf("%q has type %q", h.Name, h.Typeflag)
		}
		must(t, os.Lchown(p, h.Uid, h.Gid))
		for key, value := range h.PAXRecords {
			if name, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				must(t, unix.Lsetxattr(p, name, []byte(value), 0))
			}
		}
		if h.Typeflag != tar.TypeSymlink {
			must(t, unix.Chmod(p, uint32(h.Mode)))
		}
		setTime(t, p, h.ModTime)
	}
	return func() { // now that nothing in them changes any more
		for _, h := range dirs {
			setTime(t, filepath.Join(root, h.Name), h.ModTime)
		}
	}
}

func setTime(t *testing.T, path string, mtime time.Time) {
	t.Helper()
	ts := unix.NsecToTimespec(mtime.UnixNano())
	must(t, unix.UtimesNanoAt(unix.AT_FDCWD, path, []unix.Timespec{ts, ts}, unix.AT_SYMLINK_NOFOLLOW))
}

// removeOthers removes what lower layers have in dir.
func removeOthers(t *testing.T, dir string, unpacked map[string]bool) {
	t.Helper()
	names, err := os.ReadDir(dir)
	must(t, err)
	for _, n := range names {
		if p := filepath.Join(dir, n.Name()); !unpacked[p] {
			must(t, os.RemoveAll(p))
		}
	}
}
