package archive

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// ErrOther says that what is at a path is not the archive that was published there.
var ErrOther = errors.New("this is not the archive that crishim has made")

// Delete removes an archive, durably, which was published at a path with this inode, size and time of the last change of its content. The
// directory is opened by the rules of OpenLocation, and nothing but a regular file of root's is removed. The error wraps os.ErrNotExist
// where there is nothing.
func Delete(path string, inode uint64, size int64, modified time.Time) error {
	if reason := malformed(path); reason != "" {
		return fmt.Errorf("%w %q: %s", ErrInvalidLocation, path, reason)
	}
	dir, err := openDirectory(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("delete archive: %w", err)
	}
	defer dir.Close()
	name := filepath.Base(path)
	var st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("delete archive: %w", &os.PathError{Op: "stat", Path: path, Err: err})
	}
	// Between the look and the removal only root could put another in its place, since the directory is root's, or sticky.
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Uid != 0 || st.Ino != inode || st.Size != size || !time.Unix(st.Mtim.Unix()).Equal(modified) {
		return fmt.Errorf("%w: %s has been replaced or changed since: remove it by hand if it is to go", ErrOther, path)
	}
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil {
		return fmt.Errorf("delete archive: %w", explain(dir, &os.PathError{Op: "unlink", Path: path, Err: err}))
	}
	if err := syncDirectory(dir); err != nil {
		return fmt.Errorf("delete archive: it is gone, but a power cut may bring it back: %w", explain(dir, err))
	}
	return nil
}
