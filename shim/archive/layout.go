package archive

import (
	"archive/tar"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	blockSize   = 512           // of tar
	trailerSize = 2 * blockSize // two blocks of zeros end an archive
	bigSize     = 1 << 20       // members from this size on come last
)

// member is a staged file, or one of pieces of files.
type member struct {
	name    string   // in the archive, such as checkpoint/core-1.img
	dir     *os.File // the directory in which it is staged
	base    string   // its name there
	size    int64
	modTime time.Time
	// Where it was composed, what it consists of: the staged file is empty then.
	segments []Segment
	composed bool
}

// open opens a member's staged file and returns what it consists of.
func (m member) open() (pieces []Segment, staged *os.File, err error) {
	// Writing is for those who free it.
	staged, err = openAt(m.dir, m.base, unix.O_RDWR)
	if err != nil {
		return nil, nil, err
	}
	if m.composed {
		return m.segments, staged, nil
	}
	return []Segment{{File: staged, Length: m.size}}, staged, nil
}

// unchanged tells, when a member was read, whether its file is still what was laid out.
func (m member) unchanged(staged *os.File) error {
	info, err := staged.Stat()
	if err != nil {
		return err
	}
	if !m.composed && (!info.Mode().IsRegular() || info.Size() != m.size) {
		return fmt.Errorf("file changed from %d to %d bytes while it was packed: something still writes to it", m.size, info.Size())
	}
	return nil
}

// shrank is the error of a file that ends too early, for which err, if not nil, was returned.
func shrank(err error, missing int64) error {
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	return fmt.Errorf("file shrank by %d bytes while it was packed: something still writes to it", missing)
}

// entry is one entry of the archive: a header, and behind it the bytes of a
// member, filled up to a whole block.
type entry struct {
	offset int64 // of the header in the archive
	header []byte
	member member // directory and manifest come from no staged file, and have no dir
}

// content is where the member's bytes are in the archive.
func (e *entry) content() int64 { return e.offset + int64(len(e.header)) }

// layout decides the archive's form before a byte is moved: which entries, in
// which order, with which headers, at which offsets. It returns the archive's
// size as well.
//
// Readers of metadata need not seek past gigabytes: known metadata comes first, then the
// directory checkpoint/ (checkpointctl wants it named) with the small images,
// then the other small members, then the big ones, the largest last, and behind
// them the manifest, if there is one. It gets the members' names and sizes here, which
// is all that its own size depends on, and room for their digests.
//
// The bytes of big members begin at multiples of align, or where most of a composed one can be shared, whatever becomes of
// them: so archives are the same on all file systems.
func layout(members []member, manifest *Manifest, digests bool, align int64, now time.Time) ([]entry, int64, error) {
	members = append(slices.Clone(members), member{name: ImagesDir + "/", modTime: now})
	slices.SortFunc(members, func(a, b member) int {
		return cmp.Or(
			cmp.Compare(rank(a), rank(b)),
			cmp.Compare(bigness(a), bigness(b)),
			strings.Compare(a.name, b.name),
		)
	})
	if manifest != nil {
		for _, m := range members {
			if m.dir == nil {
				continue
			}
			d := Digest{Name: m.name, Size: m.size}
			if digests {
				d.SHA256 = noSum
			}
			manifest.Members = append(manifest.Members, d)
		}
		data, err := manifest.encode()
		if err != nil {
			return nil, 0, fmt.Errorf("write %s: %w", ManifestName, err)
		}
		members = append(members, member{name: ManifestName, size: int64(len(data)), modTime: now})
	}
	entries := make([]entry, 0, len(members))
	offset := int64(0)
	for _, m := range members {
		var header []byte
		var err error
		if m.size >= bigSize && m.dir != nil {
			header, err = alignedHeader(m, offset, align)
		} else {
			header, err = tarHeader(m, 0)
		}
		if err != nil {
			return nil, 0, fmt.Errorf("write header of %s: %w", m.name, err)
		}
		entries = append(entries, entry{offset: offset, header: header, member: m})
		offset += int64(len(header)) + m.size + padding(m.size)
	}
	return entries, offset + trailerSize, nil
}

// rank is a member's place in the order, before names decide.
func rank(m member) int {
	metadata := []string{ConfigDump, SpecDump, StatusDump, BindMounts, DeletedFiles, StatsDump}
	if i := slices.Index(metadata, m.name); i >= 0 {
		return i
	}
	image := strings.HasPrefix(m.name, ImagesDir+"/")
	switch {
	case m.name == ImagesDir+"/":
		return len(metadata)
	case m.size >= bigSize:
		return len(metadata) + 3
	case image:
		return len(metadata) + 1
	default:
		return len(metadata) + 2
	}
}

// bigness is a big member's size, and 0 for all others.
func bigness(m member) int64 {
	if m.size < bigSize {
		return 0
	}
	return m.size
}

// padding is what fills size up to a whole block.
func padding(size int64) int64 {
	return -size & (blockSize - 1)
}

// phase is how far behind a multiple of align a member's bytes are to begin: so that as many of them as can be are where they can be
// shared with the files that they come from. That is possible where a piece is as far behind a multiple in its file as in the archive.
func (m member) phase(align int64) int64 {
	length := map[int64]int64{} // by the phase that serves it
	best, position := int64(0), int64(0)
	for _, piece := range m.segments {
		phase := (piece.Offset - position) & (align - 1)
		position += piece.Length
		// Whole blocks can be shared.
		length[phase] += max(0, (piece.Offset+piece.Length)&^(align-1)-(piece.Offset+align-1)&^(align-1))
		if phase%blockSize == 0 && length[phase] > length[best] {
			best = phase
		}
	}
	return best
}

// alignedHeader is tarHeader for a member whose header is at offset, and whose bytes
// begin where its phase says: a comment fills up what is missing.
func alignedHeader(m member, offset, align int64) ([]byte, error) {
	phase := m.phase(align)
	missing := func(header []byte) int64 { return (phase - offset - int64(len(header))) & (align - 1) }
	header, err := tarHeader(m, 0)
	if err != nil || missing(header) == 0 {
		return header, err
	}
	// The first byte takes an extended header. From there on a record grows with its comment, and a
	// little more, since it has its own length in front: mostly that makes no block more, and otherwise
	// fewer bytes do.
	if header, err = tarHeader(m, 1); err != nil {
		return nil, err
	}
	more := missing(header)
	for _, length := range []int64{1, 1 + more, 1 + more - 8} {
		if header, err = tarHeader(m, length); err != nil || missing(header) == 0 {
			return header, err
		}
	}
	return nil, fmt.Errorf("%d bytes are missing to a multiple of %d", missing(header), align)
}

// tarHeader returns the blocks in front of a member's bytes: one, or more where
// PAX records are needed for a long name, a size of 8 GiB and over, or a comment of
// so many bytes, which readers pass over.
func tarHeader(m member, comment int64) ([]byte, error) {
	h := tar.Header{
		Typeflag: tar.TypeReg,
		Name:     m.name,
		Size:     m.size,
		Mode:     0o600,
		ModTime:  m.modTime.Truncate(time.Second), // fractions would cost a PAX record each
		Format:   tar.FormatPAX,                   // plain ustar where that is enough, never GNU
	}
	if comment > 0 {
		h.PAXRecords = map[string]string{"comment": strings.Repeat(" ", int(comment))}
	}
	if strings.HasSuffix(m.name, "/") {
		h.Typeflag, h.Mode = tar.TypeDir, 0o700
	}
	var b bytes.Buffer
	if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}
