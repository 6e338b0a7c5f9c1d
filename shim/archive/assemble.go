package archive

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// copyChunk is how much is copied between two looks at the context.
const copyChunk = 8 << 20

// What Options can ask for.
const (
	None   = "none"
	Zstd   = "zstd"
	SHA256 = "sha256"
)

// Options says what an archive is to be like. The zero value is the default.
type Options struct {
	Compression string // None, the default, or Zstd
	Digest      string // of each member in the manifest: SHA256, the default, or None
}

// Validate tells whether there is such a form of an archive.
func (o Options) Validate() error {
	switch o.Compression {
	case "", None, Zstd:
	default:
		return fmt.Errorf("compression %q: it is %s or %s", o.Compression, None, Zstd)
	}
	switch o.Digest {
	case "", SHA256, None:
	default:
		return fmt.Errorf("digest %q: it is %s or %s", o.Digest, SHA256, None)
	}
	return nil
}

// Assemble makes the archive of what was staged: the regular files in Dir and
// Images, and nothing else may be there. Bytes that are in staged files become the
// archive's without being copied where the file system can do that, see plain. Each
// staged file is deleted once it is in the archive; after an error, then, Remove is
// all that is left to do. Where a manifest was staged, it is completed with the names, sizes
// and digests of all others.
//
// progress, if not nil, is called now and then with the archive's bytes so far, at
// last with its size, from the same goroutine.
func (s *Staging) Assemble(ctx context.Context, options Options, progress func(written int64)) error {
	if err := s.assemble(ctx, options, progress); err != nil {
		return fmt.Errorf("assemble archive: %w", s.Explain(err))
	}
	return nil
}

// Digest returns the SHA-256 of the manifest of an archive that Assemble has made, in hexadecimal. The manifest has the digests of all other members, so
// that this one is of all that is in the archive, however it is compressed: tar -xOf ARCHIVE crishim.json | sha256sum. It is empty where digests
// were not wanted.
func (s *Staging) Digest() string { return s.digest }

func (s *Staging) assemble(ctx context.Context, options Options, progress func(written int64)) error {
	if err := options.Validate(); err != nil {
		return err
	}
	heads := s.ahead.end()
	defer func() { closeHeads(heads) }()
	if s.archive != nil {
		return fmt.Errorf("%s is there already", archiveName)
	}
	members, err := s.members()
	if err != nil {
		return err
	}
	manifest, members, err := takeManifest(members)
	if err != nil {
		return err
	}
	a := &assembly{manifest: manifest, progress: progress}
	defer func() { s.digest = a.digest }()
	digests := manifest != nil && options.Digest != None
	if a.entries, a.size, err = layout(members, manifest, digests, s.blockSize(), time.Now()); err != nil {
		return err
	}

	ctx, cancel := context.WithCancel(ctx)
	var background sync.WaitGroup
	defer background.Wait()
	defer cancel()
	if digests {
		a.sums = startSums(ctx, &background, a.entries, heads)
		// Room is given back only when nobody has a file open.
		closeHeads(heads)
		heads = nil
	}
	if options.Compression == Zstd {
		return s.create(func(f *os.File) error {
			out, err := newCompressed(f, a.report)
			if err != nil {
				return err
			}
			defer out.stop()
			return a.write(ctx, out)
		})
	}
	can := s.probe()
	a.startWriteBack(ctx, &background, can)
	out := &plain{can: can, report: a.report}
	if err := out.insert(ctx, s, a); err != nil {
		return err
	}
	if out.file == nil {
		return s.create(func(f *os.File) error {
			out.file = f
			return a.writeSized(ctx, out)
		})
	}
	if err := a.writeSized(ctx, out); err != nil {
		return errors.Join(err, out.file.Close())
	}
	s.archive = out.file
	return nil
}

// blockSize is the unit in which the file system shares and shifts blocks, as far as it
// tells: a guess that does not fit costs a copy.
func (s *Staging) blockSize() int64 { return blockSizeOf(s.dir) }

func blockSizeOf(dir *os.File) int64 {
	const least, most = 4 << 10, 64 << 10 // of ext4, XFS and btrfs, on any machine
	var st unix.Statfs_t
	if unix.Fstatfs(int(dir.Fd()), &st) != nil {
		return least
	}
	for _, size := range []int64{8 << 10, 16 << 10, 32 << 10, most} {
		if int64(st.Bsize) == size {
			return size
		}
	}
	return least
}

// Write makes what is published of what write writes, in place of Assemble: for an
// archive of another form, which comes in one stream.
func (s *Staging) Write(write func(io.Writer) error) error {
	return s.Explain(s.create(func(f *os.File) error { return write(f) }))
}

func (s *Staging) create(write func(*os.File) error) error {
	f, err := openAt(s.dir, archiveName, unix.O_RDWR|unix.O_CREAT|unix.O_EXCL)
	if err != nil {
		return err
	}
	if err = makePrivate(f, 0o600); err == nil {
		err = write(f)
	}
	if err != nil {
		f.Close()
		return err
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

// assembly is an archive on its way from the staged files to an output.
type assembly struct {
	entries  []entry
	size     int64           // of all entries and the trailer, uncompressed
	manifest *Manifest       // gets the digests; nil where there is none
	sums     map[string]*sum // of big members, by their names; nil where digests are not wanted
	progress func(written int64)

	digest string // see Staging.Digest
}

// output is where the bytes of an archive go, in order.
type output interface {
	// write appends bytes.
	write(b []byte) error
	// member appends a staged member. sum is nil where nobody reads it besides.
	member(ctx context.Context, m member, sum *sum) error
	// offset is the number of bytes appended, before they are compressed.
	offset() int64
	// end is called when all is appended. It reports the archive's size.
	end() error
}

// writeSized gives the file its size first: for one that grows XFS reserves as much room again.
func (a *assembly) writeSized(ctx context.Context, out *plain) error {
	if err := out.file.Truncate(a.size); err != nil {
		return err
	}
	return a.write(ctx, out)
}

func (a *assembly) write(ctx context.Context, out output) error {
	summed := 0
	for _, e := range a.entries {
		if out.offset() != e.offset {
			return fmt.Errorf("entry %s is due at byte %d, but %d are written", e.member.name, e.offset, out.offset())
		}
		if err := out.write(e.header); err != nil {
			return err
		}
		switch {
		case e.member.name == ManifestName:
			data, err := a.manifest.encode()
			if err != nil {
				return fmt.Errorf("write %s: %w", e.member.name, err)
			}
			if a.sums != nil {
				a.digest = fmt.Sprintf("%x", sha256.Sum256(data))
			}
			if err := out.write(append(data, make([]byte, padding(e.member.size))...)); err != nil {
				return err
			}
		case e.member.dir != nil:
			digest, err := a.member(ctx, out, e.member)
			if err != nil {
				return fmt.Errorf("pack %s: %w", e.member.name, err)
			}
			if a.sums != nil {
				a.manifest.Members[summed].SHA256 = digest
				summed++
			}
		}
	}
	if err := out.write(make([]byte, trailerSize)); err != nil {
		return err
	}
	if out.offset() != a.size {
		return fmt.Errorf("archive of %d bytes has become one of %d", a.size, out.offset())
	}
	return out.end()
}

// member appends a staged member and deletes its file. It returns the member's digest
// where that is wanted.
func (a *assembly) member(ctx context.Context, out output, m member) (digest string, err error) {
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	sum := a.sums[m.name]
	if a.sums != nil && sum == nil { // a small one
		sum = newSum(m, nil)
		sum.compute(ctx, m)
	}
	if err := out.member(ctx, m, sum); err != nil {
		return "", err
	}
	if err := out.write(make([]byte, padding(m.size))); err != nil {
		return "", err
	}
	if sum != nil {
		if digest, err = sum.wait(); err != nil {
			return "", err
		}
	}
	if err := unix.Unlinkat(int(m.dir.Fd()), m.base, 0); err != nil && !errors.Is(err, unix.ENOENT) {
		return "", &os.PathError{Op: "unlink", Path: m.base, Err: err}
	}
	return digest, nil
}

func (a *assembly) report(written int64) {
	if a.progress != nil {
		a.progress(written)
	}
}
