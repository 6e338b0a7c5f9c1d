package archive

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Only what was published goes: another file at its path, or the same one changed, stays.
func TestDelete(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an archive is root's")
	}
	for name, test := range map[string]struct {
		change func(path string) error // before it is deleted
		want   error
		there  bool // afterwards
	}{
		"as it was":  {func(string) error { return nil }, nil, false},
		"gone":       {os.Remove, os.ErrNotExist, false},
		"changed":    {func(path string) error { return os.WriteFile(path, []byte("other content"), 0o600) }, ErrOther, true},
		"touched":    {func(path string) error { return os.Chtimes(path, time.Time{}, time.Unix(1, 0)) }, ErrOther, true},
		"given away": {func(path string) error { return os.Chown(path, 1000, 0) }, ErrOther, true},
		"replaced": {func(path string) error {
			return errors.Join(os.Rename(path, path+"-moved"), os.WriteFile(path, []byte("archive"), 0o600))
		}, ErrOther, true},
		"a link to it": {func(path string) error {
			return errors.Join(os.Rename(path, path+"-moved"), os.Symlink(path+"-moved", path))
		}, ErrOther, true},
		"anybody's directory": {func(path string) error { return os.Chmod(filepath.Dir(path), 0o777) }, ErrInvalidLocation, true},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.Chmod(dir, 0o700); err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(dir, "checkpoint.tar")
			if err := os.WriteFile(path, []byte("archive"), 0o600); err != nil {
				t.Fatal(err)
			}
			var st unix.Stat_t
			if err := errors.Join(unix.Lstat(path, &st), test.change(path)); err != nil {
				t.Fatal(err)
			}
			if err := Delete(path, st.Ino, st.Size, time.Unix(st.Mtim.Unix())); !errors.Is(err, test.want) {
				t.Errorf("error is %v, want %v", err, test.want)
			}
			if _, err := os.Lstat(path); (err == nil) != test.there {
				t.Errorf("afterwards: %v", err)
			}
		})
	}
}
