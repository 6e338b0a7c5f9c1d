package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// copyChunk is how much is copied between two looks at the context.
const copyChunk = 8 << 20

// Assemble writes the archive from what was staged: the regular files in Dir and
// Images, and nothing else may be there. Each staged file is deleted once it is
// in the archive, so that only the largest member needs its room twice. After an
// error, then, Remove is all that is left to do. Where a manifest was staged, it is
// completed with the digests of all others.
//
// progress, if not nil, is called now and then with the bytes written so far,
// from the same goroutine.
func (s *Staging) Assemble(ctx context.Context, progress func(written int64)) error {
	members, err := s.members()
	if err != nil {
		return fmt.Errorf("assemble archive: %w", err)
	}
	manifest, members, err := takeManifest(members)
	if err != nil {
		return fmt.Errorf("assemble archive: %w", err)
	}
	entries, size, err := layout(members, manifest, time.Now())
	if err != nil {
		return fmt.Errorf("assemble archive: %w", err)
	}
	err = s.create(func(f *os.File) error {
		w := &writer{file: f, manifest: manifest, progress: progress}
		return w.write(ctx, entries, size)
	})
	if err != nil {
		return fmt.Errorf("assemble archive: %w", err)
	}
	return nil
}

// Write makes what is published of what write writes, in place of Assemble: for an
// archive of another form, which comes in one stream.
func (s *Staging) Write(write func(io.Writer) error) error {
	return s.create(func(f *os.File) error { return write(f) })
}

func (s *Staging) create(write func(*os.File) error) error {
	f, err := openAt(s.dir, archiveName, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return s.Explain(err)
	}
	if err = makePrivate(f, 0o600); err == nil {
		err = write(f)
	}
	if err != nil {
		f.Close()
		return s.Explain(err)
	}
	s.archive = f
	return nil
}

// members lists what was staged.
func (s *Staging) members() ([]member, error) {
	images, err := list(s.images, ImagesDir+"/", "")
	if err != nil {
		return nil, err
	}
	others, err := list(s.dir, "", ImagesDir)
	if err != nil {
		return nil, err
	}
	members := append(images, others...)
	for i := range members {
		m := &members[i]
		if m.segments, m.composed = s.composed[m.name]; !m.composed {
			continue
		}
		if m.size > 0 {
			return nil, fmt.Errorf("%s was composed of pieces of files, and has been written to as well", m.name)
		}
		for _, piece := range m.segments {
			m.size += piece.Length
		}
	}
	return members, nil
}

// list returns dir's files, except the one named skip. Anything but a regular
// file is an error: to leave it out would make an archive with a gap, and to
// follow it one with somebody else's bytes.
func list(dir *os.File, prefix, skip string) ([]member, error) {
	again, err := openAt(dir, ".", unix.O_RDONLY|unix.O_DIRECTORY) // has an offset of its own
	if err != nil {
		return nil, err
	}
	defer again.Close()
	names, err := again.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	var members []member
	for _, base := range names {
		if base == skip || strings.HasPrefix(base, ".nfs") { // or a scratch file, which NFS keeps so until it is closed
			continue
		}
		var st unix.Stat_t
		if err := unix.Fstatat(int(dir.Fd()), base, &st, unix.AT_SYMLINK_NOFOLLOW); err != nil {
			return nil, &os.PathError{Op: "stat", Path: prefix + base, Err: err}
		}
		switch {
		case prefix != "" && base == "parent":
			return nil, fmt.Errorf("%sparent: the images build on an earlier pre-dump, which an archive cannot hold: make a full dump", prefix)
		case st.Mode&unix.S_IFMT != unix.S_IFREG:
			return nil, fmt.Errorf("%s%s is not a regular file (mode %o): an archive holds nothing else; remove it before the dump is packed", prefix, base, st.Mode)
		}
		members = append(members, member{
			name:    prefix + base,
			dir:     dir,
			base:    base,
			size:    st.Size,
			modTime: time.Unix(st.Mtim.Unix()),
		})
	}
	return members, nil
}

// writer moves the bytes of a layout into a file.
type writer struct {
	file     *os.File
	manifest *Manifest // gets the digests; nil where there is none
	written  int64
	progress func(written int64)
}

func (w *writer) write(ctx context.Context, entries []entry, size int64) error {
	summed := 0
	for _, e := range entries {
		if w.written != e.offset {
			return fmt.Errorf("entry %s is due at byte %d, but %d are written", e.member.name, e.offset, w.written)
		}
		if err := w.writeBytes(e.header); err != nil {
			return err
		}
		switch {
		case e.member.name == ManifestName:
			data, err := w.manifest.encode()
			if err != nil {
				return fmt.Errorf("write %s: %w", e.member.name, err)
			}
			if err := w.writeBytes(append(data, make([]byte, padding(e.member.size))...)); err != nil {
				return err
			}
		case e.member.dir != nil:
			sum, err := w.copyMember(ctx, e.member)
			if err != nil {
				return fmt.Errorf("pack %s: %w", e.member.name, err)
			}
			if w.manifest != nil {
				w.manifest.Members[summed].SHA256 = sum
				summed++
			}
		}
	}
	if err := w.writeBytes(make([]byte, trailerSize)); err != nil {
		return err
	}
	if w.written != size {
		return fmt.Errorf("archive of %d bytes has become one of %d", size, w.written)
	}
	w.report()
	return nil
}

func (w *writer) writeBytes(b []byte) error {
	n, err := w.file.WriteAt(b, w.written)
	w.written += int64(n)
	return err
}

// copyMember copies a member behind its header and deletes its staged file. It returns
// the member's digest where there is a manifest to put it into.
func (w *writer) copyMember(ctx context.Context, m member) (digest string, err error) {
	src, err := openAt(m.dir, m.base, unix.O_RDONLY)
	if err != nil {
		return "", err
	}
	defer src.Close()
	if !m.composed {
		m.segments = []Segment{{File: src, Length: m.size}}
	}

	sumCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	wait := func() (string, error) { return "", nil }
	if w.manifest != nil {
		wait = startSum(sumCtx, m.segments)
	}
	for _, piece := range m.segments {
		if err = w.copyBytes(ctx, piece); err != nil {
			cancel(err)
			break
		}
	}
	digest, sumErr := wait()
	if err != nil {
		return "", err
	}
	if sumErr != nil {
		return "", sumErr
	}
	info, err := src.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() || !m.composed && info.Size() != m.size {
		return "", fmt.Errorf("file changed from %d to %d bytes while it was packed: something still writes to it", m.size, info.Size())
	}
	if err := w.writeBytes(make([]byte, padding(m.size))); err != nil {
		return "", err
	}
	if err := unix.Unlinkat(int(m.dir.Fd()), m.base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return "", &os.PathError{Op: "unlink", Path: src.Name(), Err: err}
	}
	return digest, nil
}

// copyBytes copies a piece of a file.
func (w *writer) copyBytes(ctx context.Context, piece Segment) error {
	for done := int64(0); done < piece.Length; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n, err := copyRange(w.file, w.written, piece.File, piece.Offset+done, min(piece.Length-done, copyChunk))
		// Start writing to disk now, so that the sync at the end has less to do.
		// Only a hint: an error shows up in that sync.
		_ = unix.SyncFileRange(int(w.file.Fd()), w.written, n, unix.SYNC_FILE_RANGE_WRITE)
		w.written += n
		done += n
		switch {
		case err != nil:
			return err
		case n == 0:
			return fmt.Errorf("file shrank by %d bytes while it was packed: something still writes to it", piece.Length-done)
		}
		w.report()
	}
	return nil
}

// copyRange copies up to n bytes between two files at given offsets, in the kernel where
// it can. It returns how many it has copied: 0 at the end of the file.
func copyRange(to *os.File, toOffset int64, from *os.File, fromOffset, n int64) (int64, error) {
	source, target := fromOffset, toOffset
	copied, err := unix.CopyFileRange(int(from.Fd()), &source, int(to.Fd()), &target, int(n), 0)
	switch {
	case err == nil && copied > 0:
		return int64(copied), nil
	case err == nil, errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENOSYS),
		errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EPERM):
		// Between two file systems, or such a one that the kernel cannot do it on: files of FUSE may end early, too.
		return io.CopyBuffer(io.NewOffsetWriter(to, toOffset), io.NewSectionReader(from, fromOffset, n), make([]byte, 1<<20))
	default:
		return 0, &os.PathError{Op: "copy_file_range", Path: to.Name(), Err: err}
	}
}

func (w *writer) report() {
	if w.progress != nil {
		w.progress(w.written)
	}
}
