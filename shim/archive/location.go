package archive

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrInvalidLocation says that an archive must not appear where it is wanted.
	// The error around it names the path, the reason, and what would help.
	ErrInvalidLocation = errors.New("invalid location")

	// ErrExists says that something is there already. It is never replaced.
	ErrExists = errors.New("location exists already")
)

// Location is where an archive is to appear: a directory, held by its
// descriptor, and a name in it.
type Location struct {
	path string // as it was asked for
	name string // its last component
	dir  *os.File
}

// OpenLocation checks the location path and holds its directory open. The caller
// closes it, after the stagings made from it.
//
// The path must be absolute and clean, and nothing may be at it, not even a
// dangling link. Every directory on the way, the last one included, must belong
// to root and be writable by nobody else, unless it is sticky as /tmp is.
//
// A symbolic link on the way is followed if root owns it and only root can write
// the directory that it is in. So /var/lib/kubelet may be a link to another
// disk, but what a user has put into /tmp leads nowhere. What the link leads
// through is checked by the same rules.
//
// The error is ErrInvalidLocation or ErrExists where the path is at fault.
func OpenLocation(path string) (*Location, error) {
	if reason := malformed(path); reason != "" {
		return nil, fmt.Errorf("%w %q: %s", ErrInvalidLocation, path, reason)
	}
	parent, name := filepath.Split(path)
	dir, err := openDirectory(parent)
	if err != nil {
		return nil, invalidLocation(path, err)
	}
	l := &Location{path: path, name: name, dir: dir}
	if err := l.vacant(); err != nil {
		dir.Close()
		return nil, err
	}
	return l, nil
}

// OpenDirectory opens a directory in which archives are, by OpenLocation's rules. The caller closes it.
func OpenDirectory(path string) (*os.File, error) {
	l, err := Directory(path)
	if err != nil {
		return nil, err
	}
	return l.dir, nil
}

// Close lets go of the directory. Stagings made from l can then neither publish
// nor remove themselves.
func (l *Location) Close() error {
	return l.dir.Close()
}

// malformed returns what is wrong with a path as such, or "".
func malformed(path string) string {
	switch {
	case !filepath.IsAbs(path):
		return "it is not an absolute path"
	case strings.ContainsFunc(path, func(r rune) bool { return r < ' ' || r == 0x7f }):
		return "it contains a control character" // NUL ends a path early; a newline forges log lines
	case len(path) >= unix.PathMax:
		return fmt.Sprintf("it is longer than %d bytes", unix.PathMax-1)
	case path != filepath.Clean(path):
		return fmt.Sprintf("it is not clean: write it as %q", filepath.Clean(path))
	case path == "/":
		return "it names no file"
	case strings.HasPrefix(filepath.Base(path), stagingPrefix):
		return fmt.Sprintf("names beginning with %q are reserved", stagingPrefix)
	}
	return ""
}

// vacant reports ErrExists if there is something at l's name.
func (l *Location) vacant() error {
	var st unix.Stat_t
	switch err := unix.Fstatat(int(l.dir.Fd()), l.name, &st, unix.AT_SYMLINK_NOFOLLOW); err {
	case unix.ENOENT:
		return nil
	case nil:
		return fmt.Errorf("%w: %s: remove it or choose another name", ErrExists, l.path)
	default:
		return invalidLocation(l.path, err)
	}
}

// invalidLocation tells errors of the path from those of the machine.
func invalidLocation(path string, err error) error {
	if errors.Is(err, ErrInvalidLocation) {
		return err
	}
	for _, errno := range []error{unix.ENOENT, unix.ENOTDIR, unix.ELOOP, unix.ENAMETOOLONG} {
		if errors.Is(err, errno) {
			return fmt.Errorf("%w %q: %w", ErrInvalidLocation, path, err)
		}
	}
	return fmt.Errorf("check location %q: %w", path, err)
}

// maxLinks is the kernel's own limit for one path.
const maxLinks = 40

// openDirectory opens the directory at an absolute path, one component at a time,
// as OpenLocation describes. The kernel's openat2 can refuse all links or none;
// which ones to trust is decided here.
func openDirectory(path string) (*os.File, error) {
	at, err := openComponent(nil, "/")
	if err != nil {
		return nil, err
	}
	defer func() { at.Close() }()

	rest := strings.Split(path, "/")
	for links := 0; len(rest) > 0; {
		name := rest[0]
		rest = rest[1:]
		if name == "" || name == "." {
			continue
		}
		next, err := openComponent(at, name)
		if err != nil {
			return nil, err
		}
		target, err := trustedTarget(at, next)
		if err != nil {
			next.Close()
			return nil, err
		}
		if target == "" {
			at.Close()
			at = next
			continue
		}
		next.Close()
		if links++; links > maxLinks {
			return nil, &os.PathError{Op: "resolve", Path: path, Err: unix.ELOOP}
		}
		if filepath.IsAbs(target) {
			root, err := openComponent(nil, "/")
			if err != nil {
				return nil, err
			}
			at.Close()
			at = root
		}
		rest = append(strings.Split(target, "/"), rest...)
	}

	fd, err := unix.Openat(int(at.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: at.Name(), Err: err}
	}
	return os.NewFile(uintptr(fd), at.Name()), nil
}

// openComponent opens what dir has under name, without following it if it is a
// link. Its Name is the path that led to it.
func openComponent(dir *os.File, name string) (*os.File, error) {
	dirfd, path := unix.AT_FDCWD, name
	if dir != nil {
		dirfd, path = int(dir.Fd()), filepath.Join(dir.Name(), name)
	}
	const flags = unix.O_PATH | unix.O_NOFOLLOW | unix.O_CLOEXEC
	// O_DIRECTORY makes an automount happen; without it O_PATH stops in front.
	fd, err := unix.Openat(dirfd, name, flags|unix.O_DIRECTORY, 0)
	if err == unix.ENOTDIR {
		fd, err = unix.Openat(dirfd, name, flags, 0)
	}
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// trustedTarget returns the target of the link f, found in dir, or "" if f is a
// directory. Either must be one that only root could have put there.
func trustedTarget(dir, f *os.File) (string, error) {
	refuse := func(reason string) error {
		return fmt.Errorf("%w: %s %s", ErrInvalidLocation, f.Name(), reason)
	}
	var parent, st unix.Stat_t
	if err := unix.Fstat(int(dir.Fd()), &parent); err != nil {
		return "", &os.PathError{Op: "stat", Path: dir.Name(), Err: err}
	}
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return "", &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	const othersWrite = 0o022
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFDIR:
		if st.Uid != 0 {
			return "", refuse(fmt.Sprintf("belongs to uid %d: it must belong to root", st.Uid))
		}
		if st.Mode&othersWrite != 0 && st.Mode&unix.S_ISVTX == 0 {
			return "", refuse("can be written by others than root: chmod go-w it")
		}
		return "", nil
	case unix.S_IFLNK:
		// In a sticky directory anybody can hard-link root's links to where they like.
		if st.Uid != 0 || parent.Mode&othersWrite != 0 {
			return "", refuse("is a symbolic link that not only root can have made: name the directory itself")
		}
		buf := make([]byte, unix.PathMax)
		n, err := unix.Readlinkat(int(f.Fd()), "", buf)
		if err != nil {
			return "", &os.PathError{Op: "readlink", Path: f.Name(), Err: err}
		}
		if n == 0 || n == len(buf) {
			return "", &os.PathError{Op: "readlink", Path: f.Name(), Err: unix.ENAMETOOLONG}
		}
		return string(buf[:n]), nil
	}
	return "", refuse("is not a directory")
}
