package archive

import (
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	// stagingPrefix keeps stagings out of the checkpoint-* that readers look for.
	stagingPrefix = ".crishim-"
	// archiveName is the archive's name while it is staged. No member begins with a dot.
	archiveName = ".archive"
)

// Staging is a hidden directory beside a location, on the same file system, in
// which an archive comes into being. Its methods are not for concurrent use,
// except Create, WriteFile and WriteJSON with different names, and Room and Used.
type Staging struct {
	location *Location
	name     string
	dir      *os.File
	images   *os.File
	composed map[string][]Segment // by the member's name
	archive  *os.File             // nil before Assemble has succeeded
	digest   string               // see Digest
	removed  bool
	ahead    *ahead // nil unless Follow was called

	mu      sync.Mutex
	scratch []*os.File
}

// Segment is a piece of an open file, in bytes.
type Segment struct {
	File           *os.File
	Offset, Length int64
}

// StagingName returns a name for a staging directory that no other has. Whoever
// keeps it can Discard the directory of a process that has died.
func StagingName() string { return stagingPrefix + rand.Text() }

// Stage makes a staging directory with a name from StagingName, mode 0700 and
// root's. Whatever happens next, the caller ends it with Remove, while l is open.
func (l *Location) Stage(name string) (*Staging, error) {
	if err := checkStagingName(name); err != nil {
		return nil, fmt.Errorf("make staging directory: %w", err)
	}
	s := &Staging{location: l, name: name}
	var err error
	if s.dir, err = makeDirectory(l.dir, s.name); err != nil {
		return nil, fmt.Errorf("make staging directory: %w", explain(l.dir, err))
	}
	if s.images, err = makeDirectory(s.dir, ImagesDir); err != nil {
		err = fmt.Errorf("make staging directory: %w", explain(l.dir, err))
		return nil, errors.Join(err, s.Remove())
	}
	return s, nil
}

// Discard removes the staging directory called name that a process has left which
// was to publish at location and has died. It is for when nothing writes there any
// more. That there is none is no error; what is at the location itself stays.
func Discard(location, name string) error {
	if err := checkStagingName(name); err != nil {
		return fmt.Errorf("remove staging directory: %w", err)
	}
	dir, err := openDirectory(filepath.Dir(location))
	if err != nil {
		return fmt.Errorf("remove staging directory %s: %w", name, err)
	}
	defer dir.Close()
	if err := removeTree(dir, name); err != nil {
		return fmt.Errorf("remove staging directory: %w", err)
	}
	if err := syncDirectory(dir); err != nil {
		return fmt.Errorf("remove staging directory: %w", explain(dir, err))
	}
	return nil
}

func checkStagingName(name string) error {
	if rest, ok := strings.CutPrefix(name, stagingPrefix); !ok || rest == "" || strings.Contains(rest, "/") {
		return fmt.Errorf("%q is not the name of one", name)
	}
	return nil
}

// makeDirectory makes a directory that did not exist and opens it. If it returns
// an error, it has left none.
func makeDirectory(parent *os.File, name string) (*os.File, error) {
	path := filepath.Join(parent.Name(), name)
	if err := unix.Mkdirat(int(parent.Fd()), name, 0o700); err != nil {
		return nil, &os.PathError{Op: "mkdir", Path: path, Err: err}
	}
	dir, err := openAt(parent, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err == nil {
		if err = makePrivate(dir, 0o700); err == nil {
			return dir, nil
		}
		dir.Close()
	}
	_ = unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR)
	return nil, err
}

// makePrivate gives f to root with exactly this mode: neither the umask nor a
// set-group-ID bit or a default ACL of the parent has a say. It looks again,
// because some file systems (vfat with quiet, some FUSE) accept the change and
// ignore it.
func makePrivate(f *os.File, mode uint32) error {
	fd := int(f.Fd())
	if err := unix.Fchown(fd, 0, 0); err != nil {
		return &os.PathError{Op: "chown", Path: f.Name(), Err: err}
	}
	if err := unix.Fchmod(fd, mode); err != nil {
		return &os.PathError{Op: "chmod", Path: f.Name(), Err: err}
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return &os.PathError{Op: "stat", Path: f.Name(), Err: err}
	}
	if st.Uid != 0 || st.Gid != 0 || st.Mode&0o7777 != mode {
		return fmt.Errorf("%s has owner %d:%d and mode %o although it was given to root alone: "+
			"choose a location on a file system that keeps owners and modes", f.Name(), st.Uid, st.Gid, st.Mode&0o7777)
	}
	return nil
}

// openAt opens dir's entry name, never following a link and never waiting for
// the other end of a FIFO. New files get mode 0600, less the umask.
func openAt(dir *os.File, name string, flags int) (*os.File, error) {
	path := filepath.Join(dir.Name(), name)
	fd, err := unix.Openat(int(dir.Fd()), name, flags|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: path, Err: err}
	}
	return os.NewFile(uintptr(fd), path), nil
}

// Dir returns the staging directory. What is created in it becomes a member at
// the archive's top level. Its Name is its path. It belongs to s: do not close it.
func (s *Staging) Dir() *os.File { return s.dir }

// Images returns the directory that becomes checkpoint/ in the archive, for CRIU
// to write its images into. It belongs to s: do not close it.
func (s *Staging) Images() *os.File { return s.images }

// Create makes an empty file that becomes the member name: a plain name, or one
// directly below checkpoint/. The caller closes it before Assemble. It is an
// error if the file exists.
func (s *Staging) Create(name string) (*os.File, error) {
	dir, base := s.dir, name
	if image, ok := strings.CutPrefix(name, ImagesDir+"/"); ok {
		dir, base = s.images, image
	}
	if base == "" || base == ImagesDir || base[0] == '.' || strings.ContainsAny(base, "/\x00") {
		return nil, fmt.Errorf("create member %q: not a plain name", name)
	}
	f, err := openAt(dir, base, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create member %s: %w", name, s.Explain(err))
	}
	if err := makePrivate(f, 0o600); err != nil {
		f.Close()
		return nil, fmt.Errorf("create member %s: %w", name, s.Explain(err))
	}
	return f, nil
}

// Scratch makes an empty file without a name, to be read and written, on the same file
// system. It is no member. The caller closes it, before Remove.
func (s *Staging) Scratch() (*os.File, error) {
	const name = ".scratch"
	f, err := openAt(s.dir, name, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return nil, fmt.Errorf("create scratch file: %w", s.Explain(err))
	}
	if err := unix.Unlinkat(int(s.dir.Fd()), name, 0); err != nil {
		f.Close()
		return nil, fmt.Errorf("create scratch file: %w", &os.PathError{Op: "unlink", Path: f.Name(), Err: err})
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.scratch = append(s.scratch, f)
	return f, nil
}

// WriteFile creates the member name with the content data.
func (s *Staging) WriteFile(name string, data []byte) error {
	f, err := s.Create(name)
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return fmt.Errorf("write member %s: %w", name, s.Explain(err))
	}
	return nil
}

// WriteJSON creates the member name with v as JSON.
func (s *Staging) WriteJSON(name string, v any) error {
	data, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("write member %s: %w", name, err)
	}
	return s.WriteFile(name, data)
}

// Compose makes the member name of pieces of open files, one after the other, which
// are read only when Assemble puts them into the archive: nothing is copied before. The
// files, staged, unlinked or anybody's, stay the caller's, and open and as they are
// until Assemble has returned. Where the file system can share blocks between files,
// it does for pieces whose offset in their file and in the archive are alike modulo the
// size of a block.
func (s *Staging) Compose(name string, segments []Segment) error {
	for _, piece := range segments {
		if piece.File == nil || piece.Offset < 0 || piece.Length < 0 || piece.Offset > math.MaxInt64-piece.Length {
			return fmt.Errorf("compose member %s: there is no piece of %d bytes at offset %d", name, piece.Length, piece.Offset)
		}
	}
	// A staged file keeps the name, and shows the member to whoever looks into the directory.
	if err := s.WriteFile(name, nil); err != nil {
		return err
	}
	if s.composed == nil {
		s.composed = map[string][]Segment{}
	}
	s.composed[name] = slices.Clone(segments)
	return nil
}

// Explain adds to an error of the disk (full, quota, file size limit, input and
// output) which file system it was and what helps, and returns other errors as
// they are. The methods of s do it by themselves; it is for those who write into
// the staging directory by other means.
func (s *Staging) Explain(err error) error {
	return explain(s.location.dir, err)
}

func explain(dir *os.File, err error) error {
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		var st unix.Statfs_t
		room := "its free space is unknown"
		if unix.Fstatfs(int(dir.Fd()), &st) == nil {
			const mib = 1 << 20
			room = fmt.Sprintf("%d of %d MiB and %d inodes free", st.Bavail*uint64(st.Bsize)/mib, st.Blocks*uint64(st.Bsize)/mib, st.Ffree)
		}
		return fmt.Errorf("%w (file system of %s: %s): make room there, raise the quota, or choose a location on another file system", err, dir.Name(), room)
	case errors.Is(err, unix.EFBIG):
		return fmt.Errorf("%w: larger than the file system of %s or this process's file size limit allows: raise LimitFSIZE=, or choose a location on another file system", err, dir.Name())
	case errors.Is(err, unix.EIO):
		return fmt.Errorf("%w: check the disk below %s (dmesg), or choose a location on another file system", err, dir.Name())
	case errors.Is(err, unix.EROFS):
		return fmt.Errorf("%w: remount the file system of %s writable, or choose a location on another one", err, dir.Name())
	}
	return err
}

// Remove deletes the staging directory and all that is in it, and nothing else:
// an archive that was published stays, and without one the location's directory
// is as it was before Stage. After a success a power cut does not bring it back.
// It may be called again: after a success it does nothing, after a failure it
// goes on where it stopped.
func (s *Staging) Remove() error {
	if s.removed {
		return nil
	}
	if err := s.delete(); err != nil {
		return fmt.Errorf("remove staging directory: %w", err)
	}
	if err := syncDirectory(s.location.dir); err != nil {
		return fmt.Errorf("remove staging directory: %w", s.Explain(err))
	}
	s.removed = true
	return nil
}

// delete does what Remove does, but for the sync.
func (s *Staging) delete() error {
	closeHeads(s.ahead.end())
	for _, f := range []*os.File{s.archive, s.images, s.dir} {
		if f != nil {
			f.Close() // twice is harmless
		}
	}
	return removeTree(s.location.dir, s.name)
}

// syncDirectory makes durable what was made, renamed and removed in a directory.
func syncDirectory(dir *os.File) error {
	// EINVAL: a file system on which directories need no sync.
	if err := dir.Sync(); err != nil && !errors.Is(err, unix.EINVAL) {
		return err
	}
	return nil
}

// removeTree deletes what parent has under name, link or not, with everything below
// it. It need not fear deep trees: only root writes here.
func removeTree(parent *os.File, name string) error {
	path := filepath.Join(parent.Name(), name)
	switch err := unix.Unlinkat(int(parent.Fd()), name, 0); err {
	case nil, unix.ENOENT:
		return nil
	case unix.EISDIR:
	default:
		return &os.PathError{Op: "unlink", Path: path, Err: err}
	}
	dir, err := openAt(parent, name, unix.O_RDONLY|unix.O_DIRECTORY)
	if err != nil {
		return err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		if err := removeTree(dir, name); err != nil {
			return err
		}
	}
	if err := unix.Unlinkat(int(parent.Fd()), name, unix.AT_REMOVEDIR); err != nil && err != unix.ENOENT {
		return &os.PathError{Op: "rmdir", Path: path, Err: err}
	}
	return nil
}
