package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// tree describes a directory, names, types, modes, owners and contents, so that two moments compare.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			fmt.Fprintln(&b, path, err)
			return nil
		}
		info, err := d.Info()
		must(t, err)
		st := info.Sys().(*syscall.Stat_t)
		fmt.Fprintln(&b, path, info.Mode(), st.Uid, st.Gid)
		if info.Mode().IsRegular() {
			data, err := os.ReadFile(path)
			must(t, err)
			fmt.Fprintf(&b, "%.80q\n", data)
		}
		return nil
	})
	return b.String()
}

func stage(t *testing.T, path string) *Staging {
	t.Helper()
	l, err := OpenLocation(path)
	must(t, err)
	t.Cleanup(func() { l.Close() })
	s, err := l.Stage(StagingName())
	must(t, err)
	t.Cleanup(func() { must(t, s.Remove()) })
	return s
}

// fill stages a small checkpoint and returns its members.
func fill(t *testing.T, s *Staging) map[string][]byte {
	t.Helper()
	big := make([]byte, 2*bigSize+77)
	rand.Read(big)
	members := map[string][]byte{
		"container.log":                 []byte("hello\n"),
		"rootfs-diff.tar":               make([]byte, 1024),
		"checkpoint/pages-1.img":        big,
		"checkpoint/pages-2.img":        big[:bigSize],
		"checkpoint/inventory.img":      []byte("inventory"),
		"checkpoint/core-1.img":         bytes.Repeat([]byte("c"), 512),
		"checkpoint/empty.img":          {},
		"stats-dump":                    []byte("stats"),
		"dump.log":                      []byte("log"),
		"spec.dump":                     []byte("{}"),
		"deleted.files":                 []byte("[]"),
		ImagesDir + "/descriptors.json": []byte(`["/dev/null","pipe:[1]","pipe:[2]"]`),
		strings.Repeat("n", 150):        []byte("a long name"),
	}
	for name, data := range members {
		must(t, s.WriteFile(name, data))
	}
	config := Config{ID: "0123", Name: "counter", CreatedTime: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}
	must(t, s.WriteJSON(ConfigDump, config))
	members[ConfigDump] = []byte(`{"id":"0123","name":"counter","createdTime":"2026-01-02T03:04:05Z",` +
		`"checkpointedTime":"0001-01-01T00:00:00Z","restoredTime":"0001-01-01T00:00:00Z","restored":false}`)
	return members
}

var goldenListing = strings.Join([]string{
	"config.dump -rw------- 164 0/0",
	"spec.dump -rw------- 2 0/0",
	"deleted.files -rw------- 2 0/0",
	"stats-dump -rw------- 5 0/0",
	"checkpoint/ drwx------ 0 0/0",
	"checkpoint/core-1.img -rw------- 512 0/0",
	"checkpoint/descriptors.json -rw------- 35 0/0",
	"checkpoint/empty.img -rw------- 0 0/0",
	"checkpoint/inventory.img -rw------- 9 0/0",
	"container.log -rw------- 6 0/0",
	"dump.log -rw------- 3 0/0",
	strings.Repeat("n", 150) + " -rw------- 11 0/0",
	"rootfs-diff.tar -rw------- 1024 0/0",
	"checkpoint/pages-2.img -rw------- 1048576 0/0",
	"checkpoint/pages-1.img -rw------- 2097229 0/0",
}, "\n")

func TestRoundTrip(t *testing.T) {
	dir := rootDir(t)
	path := dir + "/checkpoint-pod_ns-name.tar"
	s := stage(t, path)
	members := fill(t, s)

	var last int64
	must(t, s.Assemble(t.Context(), Options{}, func(written int64) {
		if written < last {
			t.Errorf("progress went from %d to %d", last, written)
		}
		last = written
	}))
	if left, _ := filepath.Glob(dir + "/checkpoint-*"); left != nil {
		t.Errorf("%v is visible before Publish", left)
	}
	left, err := os.ReadDir(s.Dir().Name())
	must(t, err)
	if len(left) != 2 {
		t.Errorf("staged files have not been deleted: %v", left)
	}
	must(t, s.Publish(t.Context()))
	must(t, s.Remove())

	if got := names(t, dir); !slices.Equal(got, []string{filepath.Base(path)}) {
		t.Errorf("directory has %v", got)
	}
	info, err := os.Stat(path)
	must(t, err)
	if info.Size() != last {
		t.Errorf("progress ended at %d, archive has %d bytes", last, info.Size())
	}
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	var listing []string
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if err == io.EOF {
			break
		}
		must(t, err)
		listing = append(listing, fmt.Sprintf("%s %s %d %s%d/%s%d", h.Name, h.FileInfo().Mode(), h.Size, h.Uname, h.Uid, h.Gname, h.Gid))
		data, err := io.ReadAll(r)
		must(t, err)
		if h.Typeflag == tar.TypeReg && !bytes.Equal(data, members[h.Name]) {
			t.Errorf("%s has other bytes: %.200q", h.Name, data)
		}
	}
	if got := strings.Join(listing, "\n"); got != goldenListing {
		t.Errorf("listing\n%s\nwant\n%s", got, goldenListing)
	}
}

// contents reads an archive's regular files.
func contents(t *testing.T, path string) map[string][]byte {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	return read(t, f)
}

func read(t *testing.T, archive io.Reader) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(archive); ; {
		h, err := r.Next()
		if err == io.EOF {
			return files
		}
		must(t, err)
		if h.Typeflag == tar.TypeReg {
			files[h.Name], err = io.ReadAll(r)
			must(t, err)
		}
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	must(t, err)
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func TestOtherReaders(t *testing.T) {
	path := rootDir(t) + "/a.tar"
	s := stage(t, path)
	members := fill(t, s)
	must(t, s.Assemble(t.Context(), Options{}, nil))
	must(t, s.Publish(t.Context()))
	for _, reader := range [][]string{
		{"tar", "tf"},
		{"busybox", "tar", "tf"},
	} {
		t.Run(reader[0], func(t *testing.T) {
			if _, err := exec.LookPath(reader[0]); err != nil {
				t.Skip("needs " + reader[0])
			}
			out, err := exec.Command(reader[0], append(reader[1:], path)...).CombinedOutput()
			if err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			got := strings.Fields(string(out))
			if len(got) != len(members)+1 || got[0] != "config.dump" || !slices.Contains(got, "checkpoint/") {
				t.Errorf("listing %q", got)
			}
		})
	}
}

// Neither the umask nor a set-group-ID directory changes who may read an archive.
func TestModes(t *testing.T) {
	for _, umask := range []int{0, 0o077, 0o777} {
		t.Run(fmt.Sprintf("umask %o", umask), func(t *testing.T) {
			dir := mkdir(t, rootDir(t)+"/d", 0o755|os.ModeSetgid, 0, 50)
			path := dir + "/a.tar"
			old := unix.Umask(umask)
			defer unix.Umask(old)
			s := stage(t, path)
			fill(t, s)
			for name, want := range map[string]os.FileMode{".": 0o700 | os.ModeDir, "checkpoint": 0o700 | os.ModeDir, "spec.dump": 0o600, "checkpoint/pages-1.img": 0o600} {
				checkPrivate(t, filepath.Join(s.Dir().Name(), name), want)
			}
			must(t, s.Assemble(t.Context(), Options{}, nil))
			checkPrivate(t, filepath.Join(s.Dir().Name(), archiveName), 0o600)
			must(t, s.Publish(t.Context()))
			checkPrivate(t, path, 0o600)
		})
	}
}

func checkPrivate(t *testing.T, path string, want os.FileMode) {
	t.Helper()
	info, err := os.Lstat(path)
	must(t, err)
	st := info.Sys().(*syscall.Stat_t)
	if info.Mode() != want || st.Uid != 0 || st.Gid != 0 {
		t.Errorf("%s has mode %v and owner %d:%d", path, info.Mode(), st.Uid, st.Gid)
	}
}

func TestCreateRefusesNames(t *testing.T) {
	s := stage(t, rootDir(t)+"/a.tar")
	must(t, os.Symlink("/etc/passwd", s.Dir().Name()+"/link"))
	for _, name := range []string{"", ".", "..", "/a", "a/b", "../a", "checkpoint", "checkpoint/", "checkpoint/..", "checkpoint/a/b", archiveName, "a\x00b", "link"} {
		if f, err := s.Create(name); err == nil {
			t.Errorf("Create(%q) made %s", name, f.Name())
		}
	}
	must(t, s.WriteFile("twice", nil))
	if err := s.WriteFile("twice", nil); !errors.Is(err, fs.ErrExist) {
		t.Errorf("second WriteFile = %v", err)
	}
}

func TestOnlyRegularFiles(t *testing.T) {
	for name, put := range map[string]func(dir string) error{
		"a link":      func(dir string) error { return os.Symlink("/etc/shadow", dir+"/x") },
		"a FIFO":      func(dir string) error { return unix.Mkfifo(dir+"/x", 0o600) },
		"a directory": func(dir string) error { return os.Mkdir(dir+"/x", 0o700) },
		"a device":    func(dir string) error { return unix.Mknod(dir+"/x", unix.S_IFCHR, 0x103) },
		"a parent":    func(dir string) error { return os.Symlink("../pre-dump", dir+"/checkpoint/parent") },
		"an image":    func(dir string) error { return os.Symlink("/etc/shadow", dir+"/checkpoint/x") },
	} {
		t.Run(name, func(t *testing.T) {
			s := stage(t, rootDir(t)+"/a.tar")
			must(t, put(s.Dir().Name()))
			err := s.Assemble(t.Context(), Options{}, nil)
			if err == nil || !strings.Contains(err.Error(), "not a regular file") && !strings.Contains(err.Error(), "make a full dump") {
				t.Errorf("Assemble = %v", err)
			}
		})
	}
}

func TestMemberChangesSize(t *testing.T) {
	for name, size := range map[string]int64{"grows": copyChunk + 1, "shrinks": 10} {
		t.Run(name, func(t *testing.T) {
			s := stage(t, rootDir(t)+"/a.tar")
			must(t, s.WriteFile("checkpoint/pages-1.img", make([]byte, copyChunk)))
			path := s.Images().Name() + "/pages-1.img"
			members, err := s.members()
			must(t, err)
			a := &assembly{}
			a.entries, a.size, err = layout(members, nil, false, 4096, time.Now())
			must(t, err)
			must(t, os.Truncate(path, size))
			f, err := openAt(s.Dir(), archiveName, unix.O_RDWR|unix.O_CREAT)
			must(t, err)
			defer f.Close()
			err = a.write(t.Context(), &plain{file: f, report: a.report})
			if err == nil || !strings.Contains(err.Error(), "checkpoint/pages-1.img") {
				t.Errorf("write = %v, want an error naming the file", err)
			}
		})
	}
}

// A file of 8 GiB has no place in an octal field: PAX. It is sparse, and only its layout is looked at.
func TestLayoutOfBigFile(t *testing.T) {
	const size = 9 << 30
	entries, total, err := layout([]member{{name: "checkpoint/pages-1.img", size: size}}, nil, false, 4096, time.Now())
	must(t, err)
	h, err := tar.NewReader(bytes.NewReader(entries[1].header)).Next()
	must(t, err)
	if h.Size != size || h.Format != tar.FormatPAX {
		t.Errorf("header %+v", h)
	}
	if want := entries[1].offset + int64(len(entries[1].header)) + size + trailerSize; total != want {
		t.Errorf("size %d, want %d", total, want)
	}
}

func TestLocationAppears(t *testing.T) {
	for name, rename := range map[string]func(s *Staging) error{
		"rename":  func(s *Staging) error { return s.Publish(context.Background()) },
		"linking": func(s *Staging) error { return s.location.link(s.dir, archiveName) },
	} {
		t.Run(name, func(t *testing.T) {
			path := rootDir(t) + "/a.tar"
			s := stage(t, path)
			fill(t, s)
			must(t, s.Assemble(t.Context(), Options{}, nil))
			must(t, os.WriteFile(path, []byte("precious"), 0o644))
			before := tree(t, path)
			if err := rename(s); !errors.Is(err, ErrExists) {
				t.Errorf("Publish = %v, want ErrExists", err)
			}
			must(t, s.Remove())
			if after := tree(t, filepath.Dir(path)); !strings.Contains(after, before) || strings.Contains(after, stagingPrefix) {
				t.Errorf("now there is\n%s", after)
			}
		})
	}
}

func TestLinkInsteadOfRename(t *testing.T) {
	path := rootDir(t) + "/a.tar"
	s := stage(t, path)
	fill(t, s)
	must(t, s.Assemble(t.Context(), Options{}, nil))
	must(t, s.location.link(s.dir, archiveName))
	must(t, s.Remove())
	checkPrivate(t, path, 0o600)
	var st unix.Stat_t
	must(t, unix.Stat(path, &st))
	if st.Nlink != 1 {
		t.Errorf("archive has %d links", st.Nlink)
	}
}

// The archive does not follow a directory that is renamed, nor appears in what took its place.
func TestDirectoryRenamed(t *testing.T) {
	root := rootDir(t)
	dir := mkdir(t, root+"/d", 0o755, 0, 0)
	s := stage(t, dir+"/a.tar")
	fill(t, s)
	must(t, os.Rename(dir, root+"/old"))
	mkdir(t, dir, 0o755, 0, 0)
	must(t, s.Assemble(t.Context(), Options{}, nil))
	if err := s.Publish(t.Context()); !errors.Is(err, ErrInvalidLocation) {
		t.Errorf("Publish = %v, want ErrInvalidLocation", err)
	}
	must(t, s.Remove())
	if n := append(names(t, dir), names(t, root+"/old")...); n != nil {
		t.Errorf("left %v", n)
	}
}

func TestRemoveFollowsNoLinks(t *testing.T) {
	dir := rootDir(t)
	outside := mkdir(t, dir+"/outside", 0o700, 0, 0)
	must(t, os.WriteFile(outside+"/f", nil, 0o600))
	before := tree(t, dir)
	s := stage(t, dir+"/a.tar")
	fill(t, s)
	must(t, os.Symlink(outside, s.Dir().Name()+"/link"))
	must(t, os.Symlink(outside, s.Images().Name()+"/link"))
	mkdir(t, s.Images().Name()+"/sub/sub", 0o700, 0, 0)
	must(t, s.Remove())
	must(t, s.Remove())
	if after := tree(t, dir); after != before {
		t.Errorf("Remove left\n%s, want\n%s", after, before)
	}
}

// Whatever fails, Remove leaves the directory as it was.
func TestFailures(t *testing.T) {
	canceled, cancel := context.WithCancelCause(context.Background())
	cancel(errors.New("deadline of the test"))

	for _, test := range []struct {
		name string
		run  func(t *testing.T, s *Staging, dir string) error
		want error
		says string
	}{
		{"full disk while staging", func(t *testing.T, s *Staging, dir string) error {
			return s.WriteFile("checkpoint/pages-1.img", make([]byte, 8<<20))
		}, unix.ENOSPC, "make room there"},
		{"full disk while assembling", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.WriteFile("checkpoint/pages-1.img", make([]byte, 3<<20)))
			return s.Assemble(t.Context(), Options{}, nil)
		}, unix.ENOSPC, "pack checkpoint/pages-1.img"},
		{"file size limit", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.WriteFile("checkpoint/pages-1.img", make([]byte, 1<<20)))
			// The kernel sends SIGXFSZ as well, which ends a Go program that does not ignore it.
			signal.Ignore(unix.SIGXFSZ)
			defer signal.Reset(unix.SIGXFSZ)
			var old unix.Rlimit
			must(t, unix.Getrlimit(unix.RLIMIT_FSIZE, &old))
			must(t, unix.Setrlimit(unix.RLIMIT_FSIZE, &unix.Rlimit{Cur: 64 << 10, Max: old.Max}))
			defer unix.Setrlimit(unix.RLIMIT_FSIZE, &old)
			return s.Assemble(t.Context(), Options{}, nil)
		}, unix.EFBIG, "LimitFSIZE="},
		{"canceled while assembling", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.WriteFile("checkpoint/pages-1.img", make([]byte, 1<<20)))
			return s.Assemble(canceled, Options{}, nil)
		}, nil, "deadline of the test"},
		{"canceled before publishing", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.Assemble(t.Context(), Options{}, nil))
			return s.Publish(canceled)
		}, nil, "deadline of the test"},
		{"never assembled", func(t *testing.T, s *Staging, dir string) error {
			return s.Publish(t.Context())
		}, nil, "not been assembled"},
		{"assembled twice", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.Assemble(t.Context(), Options{}, nil))
			return s.Assemble(t.Context(), Options{}, nil)
		}, nil, archiveName},
		{"read-only file system", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.Assemble(t.Context(), Options{}, nil))
			must(t, s.archive.Close()) // a file open for writing keeps the mount from changing
			s.archive, _ = os.Open(s.Dir().Name() + "/" + archiveName)
			must(t, unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
			defer unix.Mount("", dir, "", unix.MS_REMOUNT, "")
			return s.Publish(t.Context())
		}, unix.EROFS, "remount"},
		{"directory cannot be synced", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.Assemble(t.Context(), Options{}, nil))
			// A disk that fails just there cannot be had; a descriptor that cannot sync can.
			unsyncable, err := openComponent(nil, dir)
			must(t, err)
			old := s.location.dir
			s.location.dir = unsyncable
			defer func() { s.location.dir = old; unsyncable.Close() }()
			return s.Publish(t.Context())
		}, unix.EBADF, "sync directory"},
		{"staging deleted by somebody", func(t *testing.T, s *Staging, dir string) error {
			must(t, s.Assemble(t.Context(), Options{}, nil))
			must(t, os.RemoveAll(s.Dir().Name()))
			return s.Publish(t.Context())
		}, unix.ENOENT, "rename"},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := smallDisk(t)
			must(t, os.WriteFile(dir+"/other", []byte("kept"), 0o644))
			before := tree(t, dir)
			s := stage(t, dir+"/checkpoint-a.tar")
			err := test.run(t, s, dir)
			if err == nil || (test.want != nil && !errors.Is(err, test.want)) || !strings.Contains(err.Error(), test.says) {
				t.Errorf("error %v, want %v and %q", err, test.want, test.says)
			}
			t.Log(err)
			if left, _ := filepath.Glob(dir + "/checkpoint-*"); left != nil {
				t.Errorf("%v is visible", left)
			}
			must(t, s.Remove())
			if after := tree(t, dir); after != before {
				t.Errorf("left\n%s, want\n%s", after, before)
			}
		})
	}
}

// A file system too full even for the staging directory.
func TestStageOnFullDisk(t *testing.T) {
	dir := smallDisk(t)
	for i := 0; ; i++ {
		if err := os.WriteFile(fmt.Sprintf("%s/%d", dir, i), nil, 0o600); errors.Is(err, unix.ENOSPC) {
			break
		}
	}
	must(t, os.Remove(dir+"/0")) // room for one more inode: the second directory fails
	before := tree(t, dir)
	l, err := OpenLocation(dir + "/a.tar")
	must(t, err)
	defer l.Close()
	if _, err := l.Stage(StagingName()); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("Stage = %v, want ENOSPC", err)
	}
	if after := tree(t, dir); after != before {
		t.Errorf("left\n%s, want\n%s", after, before)
	}
}

// smallDisk mounts a file system of 5 MiB and 32 inodes.
func smallDisk(t *testing.T) string {
	t.Helper()
	dir := rootDir(t)
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=5m,nr_inodes=32,mode=755"); err != nil {
		t.Skip("needs to mount a tmpfs: ", err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	return dir
}

func TestMetadataJSON(t *testing.T) {
	got, err := json.Marshal([]BindMount{{"/src", "/dst", "directory", 0o755}})
	must(t, err)
	if want := `[{"source":"/src","destination":"/dst","file_type":"directory","permissions":493}]`; string(got) != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// The staging directory is root's alone, so a link in it is unlikely. It would
// be refused all the same where a file is opened.
func TestOpenAtFollowsNoLinks(t *testing.T) {
	dir := t.TempDir()
	must(t, os.WriteFile(dir+"/secret", nil, 0o600))
	must(t, os.Symlink("secret", dir+"/link"))
	d, err := os.Open(dir)
	must(t, err)
	defer d.Close()
	for _, flags := range []int{unix.O_RDONLY, unix.O_WRONLY, unix.O_WRONLY | unix.O_CREAT} {
		if f, err := openAt(d, "link", flags); !errors.Is(err, unix.ELOOP) {
			f.Close()
			t.Errorf("openAt with flags %x = %v, want ELOOP", flags, err)
		}
	}
}
