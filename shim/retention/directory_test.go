package retention

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// directory is one with archives of these names, each of which says when it was made, in hours before now, and of the container x.
func directory(t *testing.T, names ...string) (path string, dir *os.File) {
	t.Helper()
	path = t.TempDir()
	for i, name := range names {
		must(t, os.WriteFile(filepath.Join(path, name), fmt.Appendf(nil, "archive x %d", len(names)-i), 0o600))
	}
	dir, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { dir.Close() })
	return path, dir
}

// identify knows the archives of directory.
func identify(file *os.File) (container string, made time.Time, err error) {
	content, err := io.ReadAll(file)
	if err != nil {
		return "", made, err
	}
	var hours int
	if _, err := fmt.Sscanf(string(content), "archive %s %d", &container, &hours); err != nil {
		return "", made, errors.New("no archive")
	}
	return container, time.Now().Add(-time.Duration(hours) * time.Hour), nil
}

func list(t *testing.T, path string) string {
	t.Helper()
	entries, err := os.ReadDir(path)
	must(t, err)
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, " ")
}

// apply removes all but the youngest, and returns what was said of each that stayed.
func apply(t *testing.T, dir *os.File, between func()) map[string]error {
	t.Helper()
	archives, _, err := Look(dir, identify)
	must(t, err)
	removals := Policy{PerContainer: 1}.Plan(archives, 0, time.Now())
	between()
	stayed := map[string]error{}
	must(t, Apply(dir, removals, func(r Removal, err error) {
		if err != nil {
			stayed[r.Name] = err
		}
	}))
	return stayed
}

func nothing() {}

func TestApply(t *testing.T) {
	path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar", "checkpoint-3.tar")
	if stayed := apply(t, dir, nothing); len(stayed) > 0 {
		t.Error(stayed)
	}
	if got := list(t, path); got != "checkpoint-3.tar" {
		t.Errorf("there are %s", got)
	}
}

// Only regular files of our own with an archive's name and content are looked at any further.
func TestWhatIsNoArchive(t *testing.T) {
	path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar", "mine-0.tar", ".crishim-0", "checkpoint-0.tar.tmp", "checkpoint-0")
	must(t, os.WriteFile(filepath.Join(path, "checkpoint-text.tar"), []byte("precious"), 0o600))
	must(t, os.Symlink("checkpoint-1.tar", filepath.Join(path, "checkpoint-link.tar")))
	must(t, os.Mkdir(filepath.Join(path, "checkpoint-dir.tar"), 0o700))
	must(t, unix.Mkfifo(filepath.Join(path, "checkpoint-fifo.tar"), 0o600)) // to open it would wait for ever
	want := []string{"checkpoint-dir.tar", "checkpoint-fifo.tar", "checkpoint-link.tar", "checkpoint-text.tar"}
	if os.Geteuid() == 0 {
		must(t, os.WriteFile(filepath.Join(path, "checkpoint-theirs.tar"), []byte("archive x 9"), 0o600))
		must(t, os.Chown(filepath.Join(path, "checkpoint-theirs.tar"), 1234, 1234))
		must(t, unix.Mknod(filepath.Join(path, "checkpoint-device.tar"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 7))))
		want = append(want, "checkpoint-device.tar", "checkpoint-theirs.tar")
	}
	slices.Sort(want)
	before := list(t, path)
	_, foreign, err := Look(dir, identify)
	must(t, err)
	var got []string
	for _, f := range foreign {
		got = append(got, f.Name)
		if f.Reason == nil {
			t.Errorf("%s is none for no reason", f.Name)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("foreign are %q, want %q", got, want)
	}
	if stayed := apply(t, dir, nothing); len(stayed) > 0 {
		t.Error(stayed)
	}
	if got := list(t, path); got != strings.Replace(before, "checkpoint-1.tar ", "", 1) {
		t.Errorf("there are %s", got)
	}
}

func TestKeep(t *testing.T) {
	path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar", "checkpoint-3.tar", "checkpoint-4.tar")
	must(t, os.WriteFile(filepath.Join(path, "checkpoint-1.tar.keep"), nil, 0o600))
	must(t, os.Symlink("/nowhere", filepath.Join(path, "checkpoint-2.tar.keep")))
	if stayed := apply(t, dir, nothing); len(stayed) > 0 {
		t.Error(stayed)
	}
	if got := list(t, path); got != "checkpoint-1.tar checkpoint-1.tar.keep checkpoint-2.tar checkpoint-2.tar.keep checkpoint-4.tar" {
		t.Errorf("there are %s", got)
	}
}

// Whoever reads an archive, by whatever way, is not disturbed, and it goes when nobody does any more.
func TestAReader(t *testing.T) {
	for name, hold := range map[string]func(t *testing.T, path string) (let func()){
		"open": func(t *testing.T, path string) func() {
			file, err := os.Open(path)
			must(t, err)
			return func() { file.Close() }
		},
		"mapped": func(t *testing.T, path string) func() {
			file, err := os.Open(path)
			must(t, err)
			defer file.Close()
			data, err := unix.Mmap(int(file.Fd()), 0, 1, unix.PROT_READ, unix.MAP_PRIVATE)
			must(t, err)
			return func() { must(t, unix.Munmap(data)) }
		},
		"open for writing": func(t *testing.T, path string) func() {
			file, err := os.OpenFile(path, os.O_WRONLY, 0)
			must(t, err)
			return func() { file.Close() }
		},
	} {
		t.Run(name, func(t *testing.T) {
			path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar", "checkpoint-3.tar")
			let := hold(t, filepath.Join(path, "checkpoint-1.tar"))
			if stayed := apply(t, dir, nothing); len(stayed) > 0 {
				t.Error(stayed)
			}
			if got := list(t, path); got != "checkpoint-1.tar checkpoint-3.tar" {
				t.Errorf("with a reader there are %s", got)
			}
			let()
			if stayed := apply(t, dir, nothing); len(stayed) > 0 {
				t.Error(stayed)
			}
			if got := list(t, path); got != "checkpoint-3.tar" {
				t.Errorf("without a reader there are %s", got)
			}
		})
	}
}

// Between the look and the removal anything can happen.
func TestWhatHappensMeanwhile(t *testing.T) {
	for name, test := range map[string]struct {
		happens func(t *testing.T, file string) error
		want    error
	}{
		"it is removed": {func(_ *testing.T, f string) error { return os.Remove(f) }, os.ErrNotExist},
		"another takes its place": {func(_ *testing.T, f string) error {
			return errors.Join(os.WriteFile(f+"~", []byte("archive x 9"), 0o600), os.Rename(f+"~", f))
		}, errChanged},
		"it is written": {func(_ *testing.T, f string) error {
			// Whatever the clock's grain.
			return errors.Join(os.WriteFile(f, []byte("archive x 7"), 0o600), os.Chtimes(f, time.Time{}, time.Unix(1, 1)))
		}, errChanged},
		"it becomes a link": {func(_ *testing.T, f string) error {
			return errors.Join(os.Rename(f, f+"~"), os.Symlink(f+"~", f))
		}, errors.New("it is not a regular file")},
		"it is pinned": {func(_ *testing.T, f string) error { return os.WriteFile(f+".keep", nil, 0o600) }, errPinned},
		"somebody opens it": {func(t *testing.T, f string) error {
			file, err := os.Open(f)
			t.Cleanup(func() { file.Close() })
			return err
		}, errRead},
	} {
		t.Run(name, func(t *testing.T) {
			path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar")
			var after string
			stayed := apply(t, dir, func() {
				must(t, test.happens(t, filepath.Join(path, "checkpoint-1.tar")))
				after = list(t, path)
			})
			if err := stayed["checkpoint-1.tar"]; !errors.Is(err, test.want) && (err == nil || err.Error() != test.want.Error()) {
				t.Errorf("it is %v, want %v", err, test.want)
			}
			if got := list(t, path); got != after {
				t.Errorf("there are %s, and were %s", got, after)
			}
		})
	}
}

// Whoever opens an archive while it is removed waits for that, and gets the whole file or none, never an error of another kind.
func TestOpeningWhileItIsRemoved(t *testing.T) {
	for range 50 {
		path, dir := directory(t, "checkpoint-1.tar", "checkpoint-2.tar")
		archives, _, err := Look(dir, identify)
		must(t, err)
		removals := Policy{PerContainer: 1}.Plan(archives, 0, time.Now())
		read := make(chan error, 1)
		go func() {
			content, err := os.ReadFile(filepath.Join(path, "checkpoint-1.tar"))
			if err == nil && string(content) != "archive x 2" {
				err = fmt.Errorf("it is %q", content)
			}
			read <- err
		}()
		must(t, Apply(dir, removals, func(_ Removal, err error) {
			if err != nil && !errors.Is(err, errRead) {
				t.Error(err)
			}
		}))
		if err := <-read; err != nil && !errors.Is(err, os.ErrNotExist) {
			t.Error(err)
		}
	}
}
