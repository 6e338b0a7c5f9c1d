package archive

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func needRoot(t *testing.T, why string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: " + why)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rootDir is a directory such as a location needs: root's, mode 0755.
func rootDir(t *testing.T) string {
	t.Helper()
	needRoot(t, "a location's directory must belong to root")
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	return dir
}

func mkdir(t *testing.T, path string, mode os.FileMode, uid, gid int) string {
	t.Helper()
	must(t, os.MkdirAll(path, 0o755))
	must(t, os.Chown(path, uid, gid))
	must(t, os.Chmod(path, mode))
	return path
}

func TestMalformedLocation(t *testing.T) {
	for name, path := range map[string]string{
		"empty":          "",
		"relative":       "tmp/a.tar",
		"dot":            "./a.tar",
		"root":           "/",
		"dot dot":        "/tmp/../tmp/a.tar",
		"double slash":   "/tmp//a.tar",
		"leading double": "//tmp/a.tar",
		"trailing slash": "/tmp/a.tar/",
		"trailing dot":   "/tmp/.",
		"NUL":            "/tmp/a\x00b.tar",
		"newline":        "/tmp/a\nb.tar",
		"escape":         "/tmp/a\x1bb.tar",
		"long path":      "/tmp" + strings.Repeat("/a", unix.PathMax/2),
		"long name":      "/tmp/" + strings.Repeat("a", 256),
		"long directory": "/tmp/" + strings.Repeat("a", 256) + "/a.tar",
		"reserved":       "/tmp/" + stagingPrefix + "a",
		"no directory":   "/nonexistent-directory/a.tar",
		"below a file":   "/proc/version/a.tar",
	} {
		t.Run(name, func(t *testing.T) {
			l, err := OpenLocation(path)
			if err == nil {
				l.Close()
			}
			if !errors.Is(err, ErrInvalidLocation) {
				t.Errorf("OpenLocation(%q) = %v, want ErrInvalidLocation", path, err)
			}
		})
	}
}

func TestOpenLocation(t *testing.T) {
	for _, test := range []struct {
		name string
		want error
		make func(t *testing.T, dir string) (path string)
	}{
		{"plain", nil, func(t *testing.T, dir string) string { return dir + "/a.tar" }},
		{"odd but legal name", nil, func(t *testing.T, dir string) string { return dir + "/a b'\"\\é.tar" }},
		{"name of 255 bytes", nil, func(t *testing.T, dir string) string { return dir + "/" + strings.Repeat("a", 255) }},

		{"a file is there", ErrExists, func(t *testing.T, dir string) string {
			must(t, os.WriteFile(dir+"/a.tar", nil, 0o600))
			return dir + "/a.tar"
		}},
		{"a directory is there", ErrExists, func(t *testing.T, dir string) string { return mkdir(t, dir+"/a.tar", 0o700, 0, 0) }},
		{"a FIFO is there", ErrExists, func(t *testing.T, dir string) string {
			must(t, unix.Mkfifo(dir+"/a.tar", 0o600))
			return dir + "/a.tar"
		}},
		{"a link is there", ErrExists, func(t *testing.T, dir string) string {
			must(t, os.Symlink("/etc/passwd", dir+"/a.tar"))
			return dir + "/a.tar"
		}},
		{"a dangling link is there", ErrExists, func(t *testing.T, dir string) string {
			must(t, os.Symlink("nowhere", dir+"/a.tar"))
			return dir + "/a.tar"
		}},

		{"directory of another user", ErrInvalidLocation, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o755, 1000, 0) + "/a.tar"
		}},
		{"directory on the way of another user", ErrInvalidLocation, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/d", 0o755, 1000, 0)
			return mkdir(t, dir+"/d/e", 0o755, 0, 0) + "/a.tar"
		}},
		{"sticky directory of another user", ErrInvalidLocation, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o777|os.ModeSticky, 1000, 0) + "/a.tar"
		}},
		{"writable by group", ErrInvalidLocation, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o775, 0, 50) + "/a.tar"
		}},
		{"writable by all", ErrInvalidLocation, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o777, 0, 0) + "/a.tar"
		}},
		{"on the way writable by all", ErrInvalidLocation, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/d", 0o777, 0, 0)
			return mkdir(t, dir+"/d/e", 0o755, 0, 0) + "/a.tar"
		}},
		{"sticky", nil, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o777|os.ModeSticky, 0, 0) + "/a.tar"
		}},
		{"set-group-ID", nil, func(t *testing.T, dir string) string {
			return mkdir(t, dir+"/d", 0o755|os.ModeSetgid, 0, 50) + "/a.tar"
		}},

		{"root's link to the directory", nil, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/real", 0o755, 0, 0)
			must(t, os.Symlink("real", dir+"/d"))
			return dir + "/d/a.tar"
		}},
		{"root's absolute link on the way, with dots", nil, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/real/e", 0o755, 0, 0)
			must(t, os.Symlink(dir+"/real/../real/./e/..", dir+"/d"))
			return dir + "/d/e/a.tar"
		}},
		{"a user's link", ErrInvalidLocation, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/real", 0o755, 0, 0)
			must(t, os.Symlink("real", dir+"/d"))
			must(t, os.Lchown(dir+"/d", 1000, 0))
			return dir + "/d/a.tar"
		}},
		{"root's link in a sticky directory", ErrInvalidLocation, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/real", 0o755, 0, 0)
			mkdir(t, dir+"/tmp", 0o777|os.ModeSticky, 0, 0)
			must(t, os.Symlink("../real", dir+"/tmp/d"))
			return dir + "/tmp/d/a.tar"
		}},
		{"root's link through a user's directory", ErrInvalidLocation, func(t *testing.T, dir string) string {
			mkdir(t, dir+"/home", 0o755, 1000, 1000)
			mkdir(t, dir+"/home/real", 0o755, 0, 0)
			must(t, os.Symlink("home/real", dir+"/d"))
			return dir + "/d/a.tar"
		}},
		{"dangling link on the way", ErrInvalidLocation, func(t *testing.T, dir string) string {
			must(t, os.Symlink("nowhere", dir+"/d"))
			return dir + "/d/a.tar"
		}},
		{"link to a file", ErrInvalidLocation, func(t *testing.T, dir string) string {
			must(t, os.WriteFile(dir+"/f", nil, 0o600))
			must(t, os.Symlink("f", dir+"/d"))
			return dir + "/d/a.tar"
		}},
		{"loop of links", ErrInvalidLocation, func(t *testing.T, dir string) string {
			must(t, os.Symlink("d", dir+"/d"))
			return dir + "/d/a.tar"
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			path := test.make(t, rootDir(t))
			before := tree(t, filepath.Dir(path))
			l, err := OpenLocation(path)
			if err == nil {
				defer l.Close()
			}
			if !errors.Is(err, test.want) {
				t.Fatalf("OpenLocation = %v, want %v", err, test.want)
			}
			if err != nil && !strings.Contains(err.Error(), filepath.Dir(path)) && !strings.Contains(path, "d/") {
				t.Errorf("error names no path: %v", err)
			}
			if after := tree(t, filepath.Dir(path)); after != before {
				t.Errorf("looking changed\n%s to\n%s", before, after)
			}
		})
	}
}
