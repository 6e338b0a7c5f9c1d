package rootfs

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This file has the means of the tests: overlay mounts, an applier of OCI layers,
// and a description of a tree by which two are compared.

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
type overlay struct{ lower, upper, merged string }

func newOverlay(t *testing.T) overlay {
	t.Helper()
	needRoot(t, "mounts an overlay")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=256m,mode=755"); err != nil { // faster than a disk
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	o := overlay{dir + "/lower", dir + "/upper", dir + "/merged"}
	for _, d := range []string{o.lower, o.upper, o.merged, dir + "/work"} {
		must(t, os.Mkdir(d, 0o755))
	}
	return o
}

func (o overlay) mount(t *testing.T, options string) {
	t.Helper()
	data := fmt.Sprintf("lowerdir=%s,upperdir=%s,workdir=%s%s", o.lower, o.upper, filepath.Dir(o.upper)+"/work", options)
	if err := unix.Mount("overlay", o.merged, "overlay", 0, data); err != nil {
		t.Skipf("needs to mount an overlay with %q: %v", options, err)
	}
	t.Cleanup(func() { unix.Unmount(o.merged, unix.MNT_DETACH) })
}

func diff(t *testing.T, upper string) (layer []byte, deleted []string, err error) {
	t.Helper()
	f, err := os.Open(upper)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	deleted, err = Diff(t.Context(), &b, f)
	return b.Bytes(), deleted, err
}

func readTree(t *testing.T, dir string) ([]byte, error) {
	t.Helper()
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()
	var b bytes.Buffer
	err = Tree(t.Context(), &b, f)
	return b.Bytes(), err
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

// checkOverlay compares what is seen in the mount with lower plus layer.
func checkOverlay(t *testing.T, o overlay) (deleted []string) {
	t.Helper()
	start := time.Now()
	layer, deleted, err := diff(t, o.upper)
	must(t, err)
	t.Logf("diff of %d bytes in %v", len(layer), time.Since(start))
	result := filepath.Dir(o.lower) + "/result"
	if out, err := exec.Command("cp", "-a", o.lower, result).CombinedOutput(); err != nil {
		t.Fatalf("cp: %s", out)
	}
	apply(t, layer, result)
	compare(t, describe(t, result), describe(t, o.merged))
	return deleted
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
		must(t, unix.Lstat(p, &st))
		s := fmt.Sprintf("mode %o owner %d:%d mtime %d.%09d device %d", st.Mode, st.Uid, st.Gid, st.Mtim.Sec, st.Mtim.Nsec, st.Rdev)
		switch st.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			data, err := os.ReadFile(p)
			must(t, err)
			s += fmt.Sprintf(" content %.100q of %d", data, len(data))
		case unix.S_IFLNK:
			target, err := os.Readlink(p)
			must(t, err)
			s += fmt.Sprintf(" target %q", target)
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR && st.Nlink > 1 {
			if first[st.Ino] == "" {
				first[st.Ino] = name
			}
			s += fmt.Sprintf(" same as %q", first[st.Ino])
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
	var dirs []*tar.Header
	for r := tar.NewReader(bytes.NewReader(layer)); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		p := filepath.Join(root, h.Name)
		dir, base := path.Split(p)
		if base == opaqueMarker {
			removeOthers(t, path.Clean(dir), unpacked)
			continue
		}
		if name, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
			must(t, os.RemoveAll(dir+name))
			continue
		}
		if info, err := os.Lstat(p); err == nil && !(info.IsDir() && h.Typeflag == tar.TypeDir) {
			must(t, os.RemoveAll(p))
		}
		unpacked[p] = true
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
	for _, h := range dirs { // now that nothing in them changes any more
		setTime(t, filepath.Join(root, h.Name), h.ModTime)
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
