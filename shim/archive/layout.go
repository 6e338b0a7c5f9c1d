package archive

import (
	"archive/tar"
	"bytes"
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
)

const (
	blockSize   = 512           // of tar
	trailerSize = 2 * blockSize // two blocks of zeros end an archive
	bigSize     = 1 << 20       // members from this size on come last
)

// member is a staged file.
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

// entry is one entry of the archive: a header, and behind it the bytes of a
// member, filled up to a whole block.
type entry struct {
	offset int64 // of the header in the archive
	header []byte
	member member // directory and manifest come from no staged file, and have no dir
}

// layout decides the archive's form before a byte is moved: which entries, in
// which order, with which headers, at which offsets. It returns the archive's
// size as well.
//
// Readers of metadata need not seek past gigabytes: known metadata comes first, then the
// directory checkpoint/ (checkpointctl wants it named) with the small images,
// then the other small members, then the big ones, the largest last, and behind
// them the manifest, if there is one. It gets the members' names and sizes here, which
// is all that its own size depends on.
func layout(members []member, manifest *Manifest, now time.Time) ([]entry, int64, error) {
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
			if m.dir != nil {
				manifest.Members = append(manifest.Members, Digest{Name: m.name, Size: m.size, SHA256: noSum})
			}
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
		header, err := tarHeader(m)
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

// tarHeader returns the blocks in front of a member's bytes: one, or more where
// PAX records are needed for a long name or a size of 8 GiB and over.
func tarHeader(m member) ([]byte, error) {
	h := tar.Header{
		Typeflag: tar.TypeReg,
		Name:     m.name,
		Size:     m.size,
		Mode:     0o600,
		ModTime:  m.modTime.Truncate(time.Second), // fractions would cost a PAX record each
		Format:   tar.FormatPAX,                   // plain ustar where that is enough, never GNU
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
