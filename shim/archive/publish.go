package archive

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"crishim/shim/failpoint"
)

// Publish makes the assembled archive appear at its location, all at once and
// synced to disk, and removes the staging directory. It returns ErrExists if
// something has come to be there meanwhile, and ErrInvalidLocation if the
// location's path leads to another directory by now.
//
// After an error there is nothing: an archive that would be lost in a power cut, since
// its directory could not be synced, is removed again. When only the staging directory cannot be deleted, Publish
// succeeds, and a further Remove tells the error.
func (s *Staging) Publish(ctx context.Context) error {
	if s.archive == nil {
		return errors.New("publish archive: it has not been assembled")
	}
	if err := s.archive.Sync(); err != nil {
		return fmt.Errorf("publish archive: %w", s.Explain(err))
	}
	if err := s.location.inPlace(); err != nil {
		return fmt.Errorf("publish archive: %w", err)
	}
	failpoint.Hit("archive synced")
	if ctx.Err() != nil {
		return fmt.Errorf("publish archive: %w", context.Cause(ctx))
	}
	if err := s.location.rename(s.dir, archiveName); err != nil {
		return fmt.Errorf("publish archive: %w", s.Explain(err))
	}
	failpoint.Hit("renamed")
	// Before the sync, which then makes both durable. If it fails, the caller's deferred Remove tells.
	removed := s.delete() == nil
	if err := syncDirectory(s.location.dir); err != nil {
		err = fmt.Errorf("publish archive: sync directory of %s: %w", s.location.path, s.Explain(err))
		if removeErr := unix.Unlinkat(int(s.location.dir.Fd()), s.location.name, 0); removeErr != nil {
			err = fmt.Errorf("%w; the archive is there nevertheless, and whole, but a power cut may take it: remove it (%w)", err, removeErr)
		}
		return err
	}
	s.removed = removed
	return nil
}

// inPlace reports ErrInvalidLocation if l's path leads to another directory by
// now: the archive would be where nobody looks for it.
func (l *Location) inPlace() error {
	now, err := openDirectory(filepath.Dir(l.path))
	if err != nil {
		return invalidLocation(l.path, err)
	}
	defer now.Close()
	was, err := l.dir.Stat()
	if err != nil {
		return err
	}
	is, err := now.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(was, is) {
		return fmt.Errorf("%w %q: its directory has been replaced meanwhile: try again", ErrInvalidLocation, l.path)
	}
	return nil
}

// rename moves the file name of dir to l without replacing anything.
func (l *Location) rename(dir *os.File, name string) error {
	err := unix.Renameat2(int(dir.Fd()), name, int(l.dir.Fd()), l.name, unix.RENAME_NOREPLACE)
	switch err {
	case nil:
		return nil
	case unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP:
		return l.link(dir, name) // NFS and some FUSE file systems know no flags
	case unix.EEXIST:
		return fmt.Errorf("%w: %s appeared while the archive was made", ErrExists, l.path)
	default:
		return &os.LinkError{Op: "rename", Old: filepath.Join(dir.Name(), name), New: l.path, Err: err}
	}
}

// link does what rename does, where that is not supported: a link fails if its
// name exists. Should the old name stay, Remove gets it: once the new one is
// there, no error may undo it.
func (l *Location) link(dir *os.File, name string) error {
	err := unix.Linkat(int(dir.Fd()), name, int(l.dir.Fd()), l.name, 0)
	switch err {
	case nil:
		_ = unix.Unlinkat(int(dir.Fd()), name, 0)
		return nil
	case unix.EEXIST:
		return fmt.Errorf("%w: %s appeared while the archive was made", ErrExists, l.path)
	default:
		return fmt.Errorf("%w: the file system of %s can neither rename without replacing nor link: choose a location on another one",
			&os.LinkError{Op: "link", Old: filepath.Join(dir.Name(), name), New: l.path, Err: err}, l.dir.Name())
	}
}
