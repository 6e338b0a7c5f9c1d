package retention

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// pattern is that of the kubelet's names. A request of somebody else's may give an archive another name: it is not touched.
	pattern = "checkpoint-*.tar"
	// keepSuffix is that of a file's name beside an archive that is to stay.
	keepSuffix = ".keep"
)

// Archive is one in a directory.
type Archive struct {
	Name      string
	Container string
	Made      time.Time
	Size      int64
	Pinned    bool // there is a file NAME.keep
	Read      bool // somebody has it open, or it cannot be known whether anybody has

	file unix.Stat_t // by which it is known again
}

// Foreign is a file that has an archive's name and is none.
type Foreign struct {
	Name   string
	Reason error
}

// Look returns the archives of a directory, as of this moment, in the order of their names. identify is shown the files that may be one, open for
// reading, and says of which container each is and when it was made, or why it is none.
func Look(dir *os.File, identify func(*os.File) (container string, made time.Time, err error)) (archives []Archive, foreign []Foreign, err error) {
	names, err := names(dir)
	if err != nil {
		return nil, nil, fmt.Errorf("look for archives: %w", err)
	}
	for _, name := range names {
		a, err := look(dir, name, identify)
		if errors.Is(err, os.ErrNotExist) {
			continue // it has gone since
		}
		if err != nil {
			foreign = append(foreign, Foreign{name, err})
			continue
		}
		archives = append(archives, a)
	}
	return archives, foreign, nil
}

func names(dir *os.File) ([]string, error) {
	// What dir has been read of before does not matter.
	entries, err := os.ReadDir(fmt.Sprintf("/proc/self/fd/%d", dir.Fd()))
	if err != nil {
		return nil, err
	}
	var found []string
	for _, entry := range entries {
		if match, _ := filepath.Match(pattern, entry.Name()); match { // it is well-formed
			found = append(found, entry.Name())
		}
	}
	return found, nil
}

func look(dir *os.File, name string, identify func(*os.File) (string, time.Time, error)) (Archive, error) {
	file, st, err := open(dir, name)
	if err != nil {
		return Archive{}, err
	}
	defer file.Close()
	a := Archive{Name: name, Size: st.Size, file: st}
	if a.Pinned, err = pinned(dir, name); err != nil {
		return Archive{}, err
	}
	a.Read = lease(file) != nil
	if !a.Read {
		release(file) // whoever opens it now does not wait for us
	}
	if a.Container, a.Made, err = identify(file); err != nil {
		return Archive{}, err
	}
	return a, nil
}

// open opens a regular file that is root's, or whose we run as. A FIFO does not hold it up, and no device is opened.
func open(dir *os.File, name string) (*os.File, unix.Stat_t, error) {
	var before, st unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), name, &before, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return nil, st, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	switch {
	case before.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, st, errors.New("it is not a regular file")
	case int(before.Uid) != os.Geteuid():
		return nil, st, fmt.Errorf("it belongs to uid %d", before.Uid)
	}
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, st, &os.PathError{Op: "open", Path: name, Err: err}
	}
	file := os.NewFile(uintptr(fd), filepath.Join(dir.Name(), name))
	if err := unix.Fstat(fd, &st); err != nil {
		file.Close()
		return nil, st, &os.PathError{Op: "stat", Path: name, Err: err}
	}
	if !same(before, st) {
		file.Close()
		return nil, st, errChanged
	}
	return file, st, nil
}

var (
	errChanged = errors.New("it has been replaced or changed meanwhile")
	errPinned  = fmt.Errorf("there is a file of its name with %s behind it", keepSuffix)
	errRead    = errors.New("somebody has it open")
)

// same tells whether both are of one file that has not been written in between.
func same(a, b unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.Size == b.Size && a.Mtim == b.Mtim && a.Mode == b.Mode && a.Uid == b.Uid
}

// pinned tells whether there is anything at all with the name that keeps an archive.
func pinned(dir *os.File, name string) (bool, error) {
	var st unix.Stat_t
	switch err := unix.Fstatat(int(dir.Fd()), name+keepSuffix, &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case nil:
		return true, nil
	case unix.ENOENT, unix.ENAMETOOLONG:
		return false, nil
	default:
		return false, &os.PathError{Op: "stat", Path: name + keepSuffix, Err: err}
	}
}

// lease takes the kernel's lease for writing, which it gives where nobody else has the file open, in whatever namespace (fcntl(2)). Whoever opens it
// from then on waits until release, or the end of file. Where the file system has no leases, as NFS, there is no telling who reads it.
func lease(file *os.File) error {
	_, err := unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_WRLCK)
	switch {
	case errors.Is(err, unix.EAGAIN):
		return errRead
	case err != nil:
		return fmt.Errorf("it cannot be known whether somebody has it open: %w", err)
	}
	return nil
}

func release(file *os.File) { _, _ = unix.FcntlInt(file.Fd(), unix.F_SETLEASE, unix.F_UNLCK) }

// Apply removes what a plan says, and has it durable in the end. Each archive is looked at again: one that is pinned, read or another by now stays, with
// the error that report is told. report is called for each. The error is that the removals may not be durable.
func Apply(dir *os.File, removals []Removal, report func(Removal, error)) error {
	removed := false
	for _, r := range removals {
		err := remove(dir, r.Archive)
		removed = removed || err == nil
		report(r, err)
	}
	if !removed {
		return nil
	}
	if err := dir.Sync(); err != nil {
		return fmt.Errorf("sync directory: %w", err)
	}
	return nil
}

func remove(dir *os.File, a Archive) error {
	file, st, err := open(dir, a.Name)
	if err != nil {
		return err
	}
	defer file.Close() // ends the lease as well
	if !same(a.file, st) {
		return errChanged
	}
	if err := lease(file); err != nil {
		return err
	}
	if is, err := pinned(dir, a.Name); err != nil {
		return err
	} else if is {
		return errPinned
	}
	// Only root can have put another file in its place since it was opened. That is looked for once more, and between this and the next line nothing
	// can be done about it: the kernel removes by name.
	var now unix.Stat_t
	if err := unix.Fstatat(int(dir.Fd()), a.Name, &now, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return &os.PathError{Op: "stat", Path: a.Name, Err: err}
	}
	if !same(now, st) {
		return errChanged
	}
	if err := unix.Unlinkat(int(dir.Fd()), a.Name, 0); err != nil {
		return &os.PathError{Op: "unlink", Path: a.Name, Err: err}
	}
	return nil
}

// FileSystem is the size of the file system that a directory is on, in bytes.
func FileSystem(dir *os.File) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir.Name(), Err: err}
	}
	return int64(st.Blocks) * int64(st.Frsize), nil
}
