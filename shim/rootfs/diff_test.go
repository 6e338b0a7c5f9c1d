package rootfs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// sh runs a script in dir. What it needs and is not there ends the test.
func sh(t *testing.T, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-euc", script)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func setxattr(t *testing.T, path, name, value string) {
	t.Helper()
	must(t, unix.Lsetxattr(path, name, []byte(value), 0))
}

func TestDiff(t *testing.T) {
	for _, test := range []struct {
		name    string
		lower   string // script that makes the image
		change  string // script that runs in the container
		more    func(t *testing.T, o overlay)
		deleted []string
	}{
		{name: "nothing", lower: "echo a >a"},
		{name: "create", lower: "mkdir d", change: "echo a >a; echo b >d/b; mkdir -p e/f; echo c >e/f/c; : >empty"},
		{name: "change", lower: "echo a >a; mkdir d; echo b >d/b", change: "echo more >>a; echo other >d/b; touch -d 1999-12-31 d"},
		{name: "delete", lower: "echo a >a; mkdir -p d/e; echo b >d/e/b; echo c >d/c", change: "rm a; rm -r d/e",
			deleted: []string{"a", ".wh.a", "d/e", "d/.wh.e"}},
		{name: "delete and create again", lower: "echo a >a; mkdir d; echo b >d/b", change: "rm a; echo new >a; rm d/b; ln -s a d/b"},
		{name: "root directory", lower: "echo a >a", change: "chmod 1700 .; chown 5:6 ."},
		{name: "attributes of directories", lower: "mkdir c o t; echo a >c/a", change: "chmod 2770 c; chown 1000:2000 o; touch -d 2001-01-01T00:00:00.123456789 t"},
		{name: "modes and owners", change: "for m in 0000 0400 4755 2755 1644 7777; do echo $m >$m; chmod $m $m; done; chown 4294967294:4294967294 0000; chown 100000:100001 0400"},
		{name: "directory becomes file", lower: "mkdir -p d/e; echo a >d/e/a", change: "rm -r d; echo file >d"},
		{name: "file becomes directory", lower: "echo a >f", change: "rm f; mkdir f; echo b >f/b", deleted: []string{"f/.wh..wh..opq"}},
		{name: "opaque", lower: "mkdir -p d/e/f; echo a >d/a; echo b >d/e/b; echo c >d/e/f/c; mkdir k; echo k >k/k",
			change:  "rm -r d; mkdir -p d/e; echo new >d/e/new; rm k/k",
			deleted: []string{"d/.wh..wh..opq", "k/k", "k/.wh.k"}},
		{name: "links", lower: "echo a >a; ln a b; ln -s a s; mkdir d", change: "ln -s /etc/passwd abs; ln -s nowhere dangling; ln -s .. d/up; rm s; ln -s b s; " +
			"echo h >h1; ln h1 h2; mkdir z; ln h1 z/h3; ln -s x l1; ln l1 l2; echo changed >a; ln b d/b"},
		{name: "devices and FIFOs", lower: "mknod c c 1 3", change: "mknod n c 1 3; mknod w c 10 130; mknod b b 7 0; mknod big c 4095 1048575; mkfifo p; chmod 666 n; chown 7:8 p; ln p p2; rm c"},
		{name: "attributes", lower: "echo a >a; mkdir d", change: ": >cap; mkdir e; mkfifo p; ln -s nowhere s", more: func(t *testing.T, o overlay) {
			m := o.merged
			// cap_net_raw=ep, as setcap writes it
			setxattr(t, m+"/cap", "security.capability", "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
			setxattr(t, m+"/a", "user.on.lower", "line\nbreak=\x00\xff")
			setxattr(t, m+"/a", "user.empty", "")
			setxattr(t, m+"/a", "user.big", strings.Repeat("x", 1000))
			setxattr(t, m+"/d", "user.dir", "d")
			setxattr(t, m+"/e", "trusted.other", "e")
			setxattr(t, m+"/p", "trusted.fifo", "p")
			setxattr(t, m+"/s", "trusted.link", "s")
		}},
		{name: "odd names", lower: "mkdir d", more: func(t *testing.T, o overlay) {
			for _, name := range oddNames {
				must(t, os.WriteFile(o.merged+"/d/"+name, []byte(name), 0o644))
				must(t, os.Mkdir(o.merged+"/"+name, 0o755))
				must(t, os.Symlink(name, o.merged+"/"+name+"/"+name))
				must(t, os.Link(o.merged+"/d/"+name, o.merged+"/"+name+"/l"))
			}
		}},
		{name: "odd names deleted", more: func(t *testing.T, o overlay) {
			for _, name := range oddNames {
				must(t, os.Remove(o.merged+"/"+name))
			}
		}, deleted: func() (deleted []string) {
			for _, name := range slices.Sorted(slices.Values(oddNames)) {
				deleted = append(deleted, name, ".wh."+name)
			}
			return
		}()},
		{name: "deep", more: func(t *testing.T, o overlay) {
			p := o.merged
			for range 1000 {
				p += "/d"
				must(t, os.Mkdir(p, 0o755))
			}
			must(t, os.WriteFile(p+"/leaf", []byte("leaf"), 0o600))
		}},
		{name: "many", lower: "mkdir d; cd d; seq 500 | xargs touch", more: func(t *testing.T, o overlay) {
			for i := range 1000 {
				must(t, os.WriteFile(fmt.Sprintf("%s/d/%d", o.merged, i), []byte{byte(i)}, 0o644))
			}
		}},
		{name: "large file", change: "head -c 5000001 /dev/urandom >f; truncate -s 3M sparse"},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.lower, test.lower)
			if test.name == "odd names deleted" {
				for _, name := range oddNames {
					must(t, os.WriteFile(o.lower+"/"+name, nil, 0o600))
				}
			}
			o.mount(t, "")
			sh(t, o.merged, test.change)
			if test.more != nil {
				test.more(t, o)
			}
			deleted := checkOverlay(t, o)
			if test.deleted != nil && !slices.Equal(deleted, test.deleted) {
				t.Errorf("deleted %q, want %q", deleted, test.deleted)
			}
		})
	}
}

var oddNames = []string{
	"new\nline", "quote'\"`", "back\\slash", "-rf", " ", "trailing ", "...", "*", "%00",
	"\x01\x7f", "\xff\xfe not UTF-8", "ü", "日本語", "a=b", strings.Repeat("n", 251), strings.Repeat("é", 125), "123 path=evil\n",
}

// A socket is left out. Everything else that cannot be written as it is fails
// and is named.
func TestDiffErrors(t *testing.T) {
	for _, test := range []struct {
		name    string
		options string
		make    func(t *testing.T, o overlay)
		says    string
	}{
		{"socket", "", func(t *testing.T, o overlay) {
			l, err := net.Listen("unix", o.merged+"/s")
			must(t, err)
			t.Cleanup(func() { l.Close() })
		}, ""},
		{"name of a whiteout", "", func(t *testing.T, o overlay) { sh(t, o.merged, "mkdir d; echo a >d/.wh.a") }, `"d/.wh.a"`},
		{"directory named as a whiteout", "", func(t *testing.T, o overlay) { sh(t, o.merged, "mkdir -p d/.wh..wh..opq") }, `"d/.wh..wh..opq"`},
		{"whiteout of a whiteout's name", "", func(t *testing.T, o overlay) { sh(t, o.merged, "rm .wh.lower") }, `".wh.lower"`},
		{"renamed directory", ",redirect_dir=on", func(t *testing.T, o overlay) { must(t, os.Rename(o.merged+"/dir", o.merged+"/new")) }, `"new": trusted.overlay.redirect`},
		{"attributes only", ",metacopy=on", func(t *testing.T, o overlay) { sh(t, o.merged, "chmod 600 dir/file") }, `"dir/file": trusted.overlay.metacopy`},
		{"equals sign", "", func(t *testing.T, o overlay) {
			sh(t, o.merged, "echo a >a")
			setxattr(t, o.merged+"/a", "user.a=b", "c")
		}, `user.a=b`},
		{"overlay of a user", "", func(t *testing.T, o overlay) {
			sh(t, o.merged, "mkdir a")
			setxattr(t, o.merged+"/a", "user.overlay.opaque", "y")
		}, `"a": user.overlay.opaque`},
		{"overlay in the container", "", func(t *testing.T, o overlay) {
			sh(t, o.upper, "mkdir a")
			setxattr(t, o.upper+"/a", "trusted.overlay.overlay.opaque", "y")
		}, `"a": trusted.overlay.overlay.opaque`},
		{"stray whiteout attribute", "", func(t *testing.T, o overlay) {
			sh(t, o.upper, "mkdir a; : >a/b")
			setxattr(t, o.upper+"/a/b", "trusted.overlay.whiteout", "y")
		}, `"a/b"`},
		{"mount", "", func(t *testing.T, o overlay) {
			sh(t, o.upper, "mkdir a")
			must(t, unix.Mount("tmpfs", o.upper+"/a", "tmpfs", 0, "size=1m"))
			t.Cleanup(func() { unix.Unmount(o.upper+"/a", unix.MNT_DETACH) })
		}, `"a": something is mounted there`},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.lower, "mkdir dir; echo file >dir/file; : >.wh.lower")
			o.mount(t, test.options)
			test.make(t, o)
			layer, _, err := diff(t, o.upper)
			if test.says == "" {
				must(t, err)
				if headers, _ := entries(t, layer); len(headers) != 1 {
					t.Errorf("layer has %d entries, want the root only", len(headers))
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Diff = %v, want an error with %q", err, test.says)
			}
			t.Log(err)
		})
	}
}

// Linux 6.7 knows whiteouts as empty files with an attribute, in directories
// that are marked with opaque=x.
func TestAttributeWhiteouts(t *testing.T) {
	needRoot(t, "sets trusted attributes")
	upper := t.TempDir()
	sh(t, upper, "mkdir d; : >d/gone; echo a >d/kept; chmod 755 d")
	setxattr(t, upper+"/d", "trusted.overlay.opaque", "x")
	setxattr(t, upper+"/d/gone", "trusted.overlay.whiteout", "y")
	layer, deleted, err := diff(t, upper)
	must(t, err)
	headers, _ := entries(t, layer)
	var names []string
	for _, h := range headers {
		names = append(names, h.Name)
		if len(h.PAXRecords) > 1 {
			t.Errorf("%s has %v", h.Name, h.PAXRecords)
		}
	}
	if want := []string{"./", "d/", "d/.wh.gone", "d/kept"}; !slices.Equal(names, want) {
		t.Errorf("layer has %q, want %q", names, want)
	}
	if want := []string{"d/gone", "d/.wh.gone"}; !slices.Equal(deleted, want) {
		t.Errorf("deleted %q, want %q", deleted, want)
	}
}

// CRI-O and podman unpack whiteouts as files, then remove what deleted.files
// lists: nothing of the layer's own conventions may be left.
func TestDeletedFilesSuperset(t *testing.T) {
	o := newOverlay(t)
	sh(t, o.lower, "mkdir -p a/b k; : >a/b/c; : >a/d; : >k/l; : >f")
	o.mount(t, "")
	sh(t, o.merged, "rm -r a; mkdir a; : >a/new; rm k/l f")
	layer, deleted, err := diff(t, o.upper)
	must(t, err)
	headers, _ := entries(t, layer)
	left := make(map[string]bool)
	for _, h := range headers {
		left[strings.TrimSuffix(h.Name, "/")] = true
	}
	for _, d := range deleted {
		delete(left, d)
	}
	for name := range left {
		if strings.Contains(name, ".wh.") {
			t.Errorf("%s is left", name)
		}
	}
	if !left["a/new"] || !left["a"] || left["f"] {
		t.Errorf("left %v", left)
	}
}

func TestDiffStops(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", nil, 0o600))
	must(t, os.Truncate(dir+"/f", 1<<40)) // sparse: reading it would take minutes
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()

	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, errors.New("frozen too long"))
	defer cancel()
	start := time.Now()
	_, err = Diff(ctx, io.Discard, f)
	if err == nil || !strings.Contains(err.Error(), "frozen too long") || time.Since(start) > 5*time.Second {
		t.Errorf("Diff = %v after %v", err, time.Since(start))
	}

	if err := Tree(t.Context(), failingWriter{}, f); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Tree = %v, want the writer's error", err)
	}
}

type failingWriter struct{}

func (failingWriter) Write(b []byte) (int, error) { return 0, unix.ENOSPC }

// What other programs make of the output.
func TestGNUTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("needs tar")
	}
	needRoot(t, "unpacks owners and attributes")
	dir, out := t.TempDir()+"/d", t.TempDir()+"/d"
	must(t, os.Mkdir(dir, 0o750))
	must(t, os.Mkdir(out, 0o700))
	for _, name := range oddNames {
		must(t, os.WriteFile(dir+"/"+name, []byte(name), 0o640))
	}
	setxattr(t, dir+"/ü", "user.x", "y")
	sh(t, dir, "ln ü hard; ln -s ü soft; mkfifo p; mkdir sub; chown 70000:80000 sub")
	data, err := readTree(t, dir)
	must(t, err)
	cmd := exec.Command("tar", "-x", "--xattrs", "--xattrs-include=*", "-p", "-C", out)
	cmd.Stdin = strings.NewReader(string(data))
	if msg, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, msg)
	}
	compare(t, describe(t, out), describe(t, dir))
}
