package rootfs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"

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
		bottom  string                           // script that makes the image's lower layer
		lower   string                           // script that makes its upper layer
		options string                           // of the mount
		upper   func(t *testing.T, upper string) // makes the upper directory before it is mounted
		change  string                           // script that runs in the container
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
			deleted: []string{"d/.wh..wh..opq", "d/a", "d/e/b", "d/e/f", "k/k", "k/.wh.k"}},
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
		{name: "opaque over several layers", bottom: "mkdir -p d/e/f g; echo 1 >d/1; echo 2 >d/e/2; echo 3 >d/e/f/3; echo 4 >g/4; echo 5 >d/5",
			lower:   "mkdir -p d/e g; echo a >d/a; echo b >d/e/b; mknod d/1 c 0 0; echo c >g/c",
			change:  "rm -r d; mkdir -p d/e/f; echo new >d/e/new; echo new >d/5; rm -r g; echo file >g",
			deleted: []string{"d/.wh..wh..opq", "d/1", "d/a", "d/e/b", "d/e/2", "d/e/f/3"}}, // one layer after the other
		{name: "renamed directory", options: ",redirect_dir=on",
			bottom: "mkdir -p d/e/deep x; echo 1 >d/1; echo 2 >d/e/2; echo 3 >d/e/deep/3; echo 4 >x/4; ln d/1 d/same",
			lower:  "mkdir -p d/e; echo a >d/a; echo b >d/e/b; mknod d/gone c 1 3; mkfifo d/p; ln -s a d/s; chmod 711 d/e",
			change: "mv d new; rm new/a new/e/2; echo c >new/c; ln new/c outside; mv new/e new/f; mkdir new/e; echo d >new/e/d; mkdir d; echo e >d/e; " +
				"mv x new/f/deep/x; touch -d 1999-12-31 new/f/deep"},
		{name: "renamed directory in place of another", options: ",redirect_dir=on", lower: "mkdir -p a b/c; echo 1 >a/1; echo 2 >b/2; echo 3 >b/c/3",
			change: "rm -r a; mv b a", deleted: []string{"b", ".wh.b", "a/.wh..wh..opq", "a/1"}},
		{name: "attributes only", options: ",metacopy=on,redirect_dir=on", bottom: "mkdir d; echo 1 >d/1; head -c 300000 /dev/urandom >d/big; echo h >h1; ln h1 h2; echo 5 >5",
			lower: "mkdir d; echo 2 >d/2; truncate -s 5M d/sparse; echo x | dd of=d/sparse seek=3000 conv=notrunc status=none",
			change: "chmod 600 d/1 d/big; chown 7:8 d/2 d/sparse; touch -d 1999-12-31 h1; mv d/big renamed; chmod 640 renamed; ln renamed linked; " +
				"chmod 711 5; echo more >>5; mkdir e; mv d/1 e/1"},
		{name: "notes in user attributes", options: ",userxattr", lower: "mkdir -p d/e k; echo 1 >d/1; echo 2 >d/e/2; echo 3 >k/3",
			change: "rm -r d; mkdir d; echo new >d/new; rm k/3", deleted: []string{"d/.wh..wh..opq", "d/1", "d/e", "k/3", "k/.wh.3"}},
		{name: "user attributes like notes", lower: "mkdir -p d/e; echo 1 >d/1", change: "echo a >a", more: func(t *testing.T, o overlay) {
			setxattr(t, o.merged+"/d", "user.overlay.opaque", "y")
			setxattr(t, o.merged+"/a", "user.overlay.metacopy", "")
			setxattr(t, o.merged+"/d/1", "user.overlay.whiteout", "y")
		}},
		// Linux 6.7 knows whiteouts as empty files with an attribute. The opaque=x of their directory is for readdir alone.
		{name: "whiteouts in attributes", lower: "mkdir d e; echo 1 >d/gone; echo 2 >d/there; echo 3 >e/there",
			upper: func(t *testing.T, upper string) {
				sh(t, upper, "mkdir d e; : >d/gone; : >e/there; echo a >d/kept; echo full >d/there")
				setxattr(t, upper+"/d", "trusted.overlay.opaque", "x")
				for _, name := range []string{"/d/gone", "/d/there", "/e/there"} {
					setxattr(t, upper+name, "trusted.overlay.whiteout", "y")
				}
			},
			deleted: []string{"d/gone", "d/.wh.gone", "e/there", "e/.wh.there"}},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.bottom, test.bottom)
			sh(t, o.lower, test.lower)
			if test.upper != nil {
				test.upper(t, o.upper)
			}
			if test.name == "odd names deleted" {
				for _, name := range oddNames {
					must(t, os.WriteFile(o.lower+"/"+name, nil, 0o600))
				}
			}
			o.mount(t, test.options)
			sh(t, o.merged, test.change)
			if test.more != nil {
				test.more(t, o)
			}
			_, deleted := checkOverlay(t, o)
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
		{"whiteout's name in a renamed directory", ",redirect_dir=on", func(t *testing.T, o overlay) {
			sh(t, o.lower, "echo a >dir/.wh.a")
			must(t, os.Rename(o.merged+"/dir", o.merged+"/new"))
		}, `"new/.wh.a"`},
		{"equals sign", "", func(t *testing.T, o overlay) {
			sh(t, o.merged, "echo a >a")
			setxattr(t, o.merged+"/a", "user.a=b", "c")
		}, `user.a=b`},
		{"overlay in the container", "", func(t *testing.T, o overlay) {
			sh(t, o.upper, "mkdir a")
			setxattr(t, o.upper+"/a", "trusted.overlay.overlay.opaque", "y")
		}, `trusted.overlay.overlay.opaque`},
		{"overlay in a directory that was renamed", ",redirect_dir=on", func(t *testing.T, o overlay) {
			setxattr(t, o.lower+"/dir/file", "trusted.overlay.overlay.redirect", "x")
			must(t, os.Rename(o.merged+"/dir", o.merged+"/new"))
		}, `"new/file" cannot be captured: its attribute trusted.overlay.redirect`},
		{"notes of another kind", ",userxattr", func(t *testing.T, o overlay) {
			sh(t, o.merged, "mkdir a")
			setxattr(t, o.merged+"/a", "trusted.overlay.opaque", "y")
		}, `"a" cannot be captured: its attribute trusted.overlay.opaque`},
		{"too long", "", func(t *testing.T, o overlay) {
			must(t, os.WriteFile(o.merged+"/f", nil, 0o600))
			must(t, os.Truncate(o.merged+"/f", math.MaxInt64))
		}, "truncate it"},
		{"mount", "", func(t *testing.T, o overlay) {
			sh(t, o.upper, "mkdir -p d/a")
			must(t, unix.Mount("tmpfs", o.upper+"/d/a", "tmpfs", 0, "size=1m"))
			t.Cleanup(func() { unix.Unmount(o.upper+"/d/a", unix.MNT_DETACH) })
		}, `"d/a" cannot be captured: something is mounted there`},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.lower, "mkdir dir; echo file >dir/file; : >.wh.lower")
			o.mount(t, test.options)
			test.make(t, o)
			layer, _, err := o.diff(t)
			if test.says == "" {
				must(t, err)
				if headers, _ := entries(t, layer); len(headers) != 1 {
					t.Errorf("layer has %d entries, want the root only", len(headers))
				}
				return
			}
			if !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("Diff = %v, want ErrUnsupported with %q", err, test.says)
			}
			t.Log(err)
		})
	}
}

func TestDiffStops(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/f", bytes.Repeat([]byte{'x'}, 8<<20), 0o600))
	f, err := os.Open(dir)
	must(t, err)
	defer f.Close()

	ctx, cancel := context.WithCancelCause(t.Context())
	written := 0
	err = Tree(ctx, writerFunc(func(b []byte) (int, error) {
		cancel(errors.New("frozen too long"))
		written += len(b)
		return len(b), nil
	}), f, scratchFile(t))
	if err == nil || !strings.Contains(err.Error(), "frozen too long") || written > 4<<20 {
		t.Errorf("Tree = %v after %d bytes", err, written)
	}

	if err := Tree(t.Context(), failingWriter{}, f, scratchFile(t)); !errors.Is(err, unix.ENOSPC) {
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
