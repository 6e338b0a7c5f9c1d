package archive

import (
	"archive/tar"
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"unicode"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Bounds of what is taken for an archive. They are far above what a container has,
// and keep a hostile one from filling the memory of whoever looks at it.
const (
	maxMembers  = 1 << 19   // an image for each of as many connections
	maxName     = 255       // bytes of a name, less the directory: what a file system takes
	maxManifest = 128 << 20 // bytes of crishim.json, of which each member takes some
	maxMetadata = 4 << 20   // bytes of other members that are read as a whole: more than Kubernetes keeps of a pod
	maxProblems = 20
)

// required are the members without which containerd does not restore.
var required = []string{
	ConfigDump, SpecDump, StatusDump, ImagesDir + "/", ImagesDir + "/inventory.img", ImagesDir + "/pstree.img", ImagesDir + "/descriptors.json",
}

// Report is what Verify has found.
type Report struct {
	Problems []string   // what is wrong, a line each; empty if the archive is sound
	Members  []Digest   // the regular files in their order, as they are
	Manifest *Manifest  // as crishim wrote it; nil where there is none, so that no digest could be compared
	Config   Config     // config.dump
	Spec     specs.Spec // spec.dump
	Status   Status     // status.dump
	Binds    []BindMount
}

// Look is shown the regular files, in the archive's order, except those that the
// report has. It reads of the content what it needs. An error is a problem of the
// archive.
type Look func(name string, size int64, content io.Reader) error

// Verify reads an archive once, from its first byte to its last, whoever has written
// it, compressed by zstd or not: its structure, and the members' sizes and digests where
// it has crishim's manifest. look, if not nil, is shown the members.
//
// What is wrong with the archive is in the report. The error says that it could not be
// read. What look has seen counts for nothing if there are problems.
func Verify(ctx context.Context, r io.Reader, look Look) (*Report, error) {
	return verify(ctx, r, look, maxMembers)
}

func verify(ctx context.Context, r io.Reader, look Look, members int) (*Report, error) {
	v := &verifier{look: look, members: members, seen: map[string]bool{}, buffer: make([]byte, 256<<10)}
	source := &source{ctx: ctx, r: r}
	plain, _, err := Decompress(source)
	if err != nil {
		return nil, fmt.Errorf("read archive: %w", err)
	}
	defer plain.Close()
	decompressed := &counter{r: plain}
	input := bufio.NewReaderSize(decompressed, 1<<20)
	v.input = input
	v.consumed = func() int64 { return decompressed.n - int64(input.Buffered()) }
	v.archive()
	if source.err != nil {
		return nil, fmt.Errorf("read archive: %w", source.err)
	}
	return &v.report, nil
}

// source tells an error of reading from one of the archive, and ends with ctx.
type source struct {
	ctx context.Context
	r   io.Reader
	err error
}

func (s *source) Read(b []byte) (int, error) {
	if s.ctx.Err() != nil {
		s.err = context.Cause(s.ctx)
		return 0, s.err
	}
	n, err := s.r.Read(b)
	if err != nil && err != io.EOF {
		s.err = err
	}
	return n, err
}

// counter counts what is read of an archive, decompressed.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(b []byte) (int, error) {
	n, err := c.r.Read(b)
	c.n += int64(n)
	return n, err
}

type verifier struct {
	input    io.Reader    // which is sought in where it can be, over what nobody looks at
	consumed func() int64 // bytes taken from input
	opened   *Archive     // where the archive is opened, not verified: what look leaves is not read
	look     Look
	members  int // at most
	seen     map[string]bool
	buffer   []byte
	report   Report
}

func (v *verifier) problem(format string, args ...any) {
	switch len(v.report.Problems) {
	case maxProblems:
	case maxProblems - 1:
		v.report.Problems = append(v.report.Problems, "and more")
	default:
		// Errors of decoders quote what they have met.
		text := strings.Map(func(r rune) rune {
			if unicode.IsPrint(r) {
				return r
			}
			return ' '
		}, fmt.Sprintf(format, args...))
		v.report.Problems = append(v.report.Problems, text)
	}
}

func (v *verifier) archive() {
	end := int64(0) // of what the last entry holds
	for entries := tar.NewReader(v.input); ; {
		header, err := entries.Next()
		if err == io.EOF {
			v.end(end + padding(end))
			break
		}
		if err == nil && len(v.seen) == v.members {
			err = fmt.Errorf("it has more than %d members", v.members)
		}
		if err == nil {
			end = v.consumed() + header.Size
			err = v.entry(header, entries)
		}
		if err != nil {
			v.broken(err)
			return
		}
	}
	for _, name := range required {
		if !v.seen[name] && v.opened == nil {
			v.problem("%s is missing: without it the container cannot be restored", name)
		}
	}
	v.compare()
}

// broken notes an error behind which nothing can be read.
func (v *verifier) broken(err error) {
	switch {
	case errors.Is(err, io.ErrUnexpectedEOF):
		v.problem("it ends in the middle of a member, at byte %d: it is cut off", v.consumed())
	case errors.Is(err, tar.ErrHeader):
		v.problem("there is no header of a tar archive at byte %d: it is damaged, compressed, or no archive at all", max(0, v.consumed()-blockSize))
	default:
		v.problem("it cannot be read on from byte %d: %v", v.consumed(), err)
	}
}

// entry looks at one entry. An error means that what follows cannot be read.
func (v *verifier) entry(h *tar.Header, content io.Reader) error {
	name := quote(h.Name)
	if v.seen[h.Name] {
		v.problem("%s is there twice: readers differ in which of them they take", name)
	}
	v.seen[h.Name] = true
	switch {
	case h.Typeflag == tar.TypeDir && h.Name == ImagesDir+"/":
		return nil
	case h.Typeflag == tar.TypeDir:
		v.problem("%s is a directory: %s/ is the only one that an archive has", name, ImagesDir)
		return nil
	case h.Typeflag == tar.TypeSymlink, h.Typeflag == tar.TypeLink:
		v.problem("%s is a link: it could lead out of the archive", name)
		return nil
	case h.Typeflag != tar.TypeReg:
		v.problem("%s is of type %q: an archive holds regular files and nothing else", name, h.Typeflag)
		return nil
	case sparse(h):
		// A few bytes of it can stand for any size.
		v.problem("%s is stored as a sparse file, which not all readers understand", name)
		return errors.New("sparse members are not read")
	}
	if reason := badName(h.Name); reason != "" {
		v.problem("%s: %s", name, reason)
	}
	return v.file(h, content)
}

func sparse(h *tar.Header) bool {
	for key := range h.PAXRecords {
		if strings.HasPrefix(key, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// badName says what is wrong with a regular file's name, or "".
func badName(name string) string {
	base := strings.TrimPrefix(name, ImagesDir+"/")
	switch {
	case base == "" || base == "." || base == "..":
		return "this names no file"
	case strings.Contains(base, "/"):
		return fmt.Sprintf("members are at the top or directly in %s/, and named without ./ in front", ImagesDir)
	case len(base) > maxName:
		return fmt.Sprintf("a name has %d bytes at most", maxName)
	case strings.ContainsFunc(base, unicode.IsControl):
		return "a name must not contain control characters"
	}
	return ""
}

// file reads a member to its end, or as far as look does.
func (v *verifier) file(h *tar.Header, content io.Reader) error {
	if v.opened != nil {
		if err := v.meaning(h.Name, h.Size, v.opened.member(h, v.consumed(), content)); err != nil {
			v.problem("%s: %v", quote(h.Name), err)
		}
		v.report.Members = append(v.report.Members, Digest{Name: h.Name, Size: h.Size})
		return nil
	}
	hash := sha256.New()
	if err := v.meaning(h.Name, h.Size, io.TeeReader(content, hash)); err != nil {
		v.problem("%s: %v", quote(h.Name), err)
	}
	if _, err := io.CopyBuffer(hash, content, v.buffer); err != nil {
		return err
	}
	v.report.Members = append(v.report.Members, Digest{Name: h.Name, Size: h.Size, SHA256: hex.EncodeToString(hash.Sum(nil))})
	return nil
}

// meaning reads of a member what is of interest.
func (v *verifier) meaning(name string, size int64, content io.Reader) error {
	switch name {
	case ManifestName:
		return readWhole(size, maxManifest, content, func(data []byte) (err error) {
			v.report.Manifest, err = parseManifest(data)
			return err
		})
	case ConfigDump:
		return readJSON(size, content, &v.report.Config)
	case SpecDump:
		return readJSON(size, content, &v.report.Spec)
	case StatusDump:
		return readJSON(size, content, &v.report.Status)
	case BindMounts:
		return readJSON(size, content, &v.report.Binds)
	}
	if v.look == nil {
		return nil
	}
	return v.look(name, size, content)
}

func readJSON(size int64, content io.Reader, value any) error {
	return readWhole(size, maxMetadata, content, func(data []byte) error { return json.Unmarshal(data, value) })
}

// readWhole reads a member into memory. One that is cut off is no error here: reading
// on meets the end again.
func readWhole(size, most int64, content io.Reader, use func(data []byte) error) error {
	if size > most {
		return fmt.Errorf("it has %d bytes: %d are the most that make sense", size, most)
	}
	data, err := io.ReadAll(content)
	if err != nil {
		return nil
	}
	return use(data)
}

// end looks at what stands behind the last member, where at least two blocks of zeros
// must be, and nothing else may.
func (v *verifier) end(members int64) {
	if v.consumed()-members < trailerSize {
		v.problem("it ends without the two blocks of zeros that end a tar archive: it is cut off")
		return
	}
	for buffer := make([]byte, 64<<10); ; {
		at := v.consumed()
		n, err := v.input.Read(buffer)
		if i := slices.IndexFunc(buffer[:n], func(b byte) bool { return b != 0 }); i >= 0 {
			v.problem("there is something behind the archive's end, at byte %d", at+int64(i))
			return
		}
		if err == io.EOF {
			return
		}
		if err != nil {
			v.broken(err)
			return
		}
	}
}

// compare holds the members against the manifest.
func (v *verifier) compare() {
	if v.report.Manifest == nil {
		return
	}
	is := map[string]Digest{}
	for _, m := range v.report.Members {
		is[m.Name] = m
	}
	for _, want := range v.report.Manifest.Members {
		found, ok := is[want.Name]
		delete(is, want.Name)
		switch {
		case !ok:
			v.problem("%s is missing", quote(want.Name))
		case found.Size != want.Size:
			v.problem("%s has %d bytes, and had %d when crishim wrote it", quote(want.Name), found.Size, want.Size)
		case want.SHA256 != "" && found.SHA256 != "" && found.SHA256 != want.SHA256:
			v.problem("%s has other bytes than crishim wrote: its digest is %s, and was %s", quote(want.Name), found.SHA256, want.SHA256)
		}
	}
	delete(is, ManifestName)
	for _, m := range v.report.Members {
		if _, added := is[m.Name]; added {
			v.problem("%s was not there when crishim wrote the archive", quote(m.Name))
		}
	}
}

// quote makes a name fit for a line of a terminal, whatever it is.
func quote(name string) string {
	if len(name) > maxName+len(ImagesDir)+1 {
		name = name[:maxName] + "…"
	}
	if name == "" || strings.ContainsFunc(name, func(r rune) bool { return !unicode.IsPrint(r) || r == '"' }) {
		return fmt.Sprintf("%q", name)
	}
	return name
}
