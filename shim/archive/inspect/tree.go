package inspect

import (
	"archive/tar"
	"cmp"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"path"
	"slices"
	"strings"
)

const (
	mostLargest   = 10
	maxDeleted    = 256 << 20 // bytes of deleted.files
	maxEntries    = 1 << 22   // files of a layer that are compared
	whiteout      = ".wh."    // in front of the name of what was deleted
	opaque        = ".wh..wh..opq"
	maxDifference = 1 << 16 // names of each kind that are kept
)

// readTree counts what is in a tar of files. Only a layer has whiteouts.
func readTree(content io.Reader, layer bool) (*Tree, error) {
	t := &Tree{Largest: []TreeFile{}}
	err := eachFile(content, layer, func(f treeFile, _ io.Reader) error {
		switch {
		case f.deleted:
			t.Deleted++
		case f.header.Typeflag == tar.TypeDir:
			t.Directories++
		case f.header.Typeflag == tar.TypeSymlink, f.header.Typeflag == tar.TypeLink:
			t.Links++
		case f.header.Typeflag == tar.TypeReg:
			t.Files++
			t.Bytes += f.header.Size
			t.add(TreeFile{text(f.path), f.header.Size})
		default:
			t.Others++
		}
		return nil
	})
	return t, err
}

// add keeps the largest files, of those of the same size the ones that come first.
func (t *Tree) add(f TreeFile) {
	at, _ := slices.BinarySearchFunc(t.Largest, f, func(a, b TreeFile) int {
		return cmp.Or(cmp.Compare(b.Size, a.Size), -1)
	})
	if f.Size > 0 && at < mostLargest {
		t.Largest = slices.Insert(t.Largest, at, f)
		t.Largest = t.Largest[:min(len(t.Largest), mostLargest)]
	}
}

// treeFile is an entry of a tar of files.
type treeFile struct {
	path    string // in the container
	header  *tar.Header
	deleted bool // it is no file, but the note that there is none
}

// eachFile calls use for each entry of a tar of files. The content need not be read.
func eachFile(content io.Reader, layer bool, use func(f treeFile, content io.Reader) error) error {
	for entries := tar.NewReader(content); ; {
		h, err := entries.Next()
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar of files: %w", err)
		}
		f := treeFile{path: path.Clean("/" + h.Name), header: h}
		if base := path.Base(f.path); layer && strings.HasPrefix(base, whiteout) {
			if base == opaque {
				continue
			}
			f.deleted, f.path = true, path.Join(path.Dir(f.path), strings.TrimPrefix(base, whiteout))
		}
		if err := use(f, entries); err != nil {
			return err
		}
	}
}

func countDeleted(content io.Reader, size int64) (int, error) {
	if size > maxDeleted {
		return 0, fmt.Errorf("it has %d bytes: %d are the most that make sense", size, maxDeleted)
	}
	decoder := json.NewDecoder(content)
	if start, err := decoder.Token(); err != nil || start != json.Delim('[') {
		return 0, errors.Join(err, errors.New("it is no list of paths"))
	}
	n := 0
	for decoder.More() {
		var name string
		if err := decoder.Decode(&name); err != nil {
			return 0, err
		}
		if !strings.HasPrefix(path.Base(name), whiteout) { // crishim names them as well, for who does not know them
			n++
		}
	}
	return n, nil
}

// TreeDifference is what changed from one tree to another: in content, type, owner, mode, target of a link or extended attributes, times left out.
type TreeDifference struct {
	Added   []string `json:"added"`
	Changed []string `json:"changed"`
	Removed []string `json:"removed"` // also of the image
	Omitted int      `json:"omitted"` // further ones that are not listed
}

type sum [16]byte

// compareTrees compares two tars of files. It remembers of each file two sums, and not its name.
func compareTrees(a, b *io.SectionReader, layer bool) (*TreeDifference, error) {
	d := &TreeDifference{Added: []string{}, Changed: []string{}, Removed: []string{}}
	before, err := d.sums(a, layer)
	if err != nil {
		return nil, err
	}
	err = d.each(b, layer, func(path string, key, now sum, deleted bool) error {
		was, ok := before[key]
		delete(before, key)
		switch {
		case ok && was == now:
		case deleted:
			d.note(&d.Removed, path)
		case !ok || was == (sum{}):
			d.note(&d.Added, path)
		default:
			d.note(&d.Changed, path)
		}
		return nil
	})
	if err != nil || len(before) == 0 {
		return d, err
	}
	// What is left is not in b. Its names are in a.
	return d, eachFile(section(a), layer, func(f treeFile, _ io.Reader) error {
		key := sumOf(f.path)
		was, ok := before[key]
		delete(before, key)
		switch {
		case !ok:
		case was == (sum{}):
			d.note(&d.Added, f.path) // the image's again
		default:
			d.note(&d.Removed, f.path)
		}
		return nil
	})
}

func (d *TreeDifference) note(list *[]string, path string) {
	if len(*list) == maxDifference {
		d.Omitted++
		return
	}
	*list = append(*list, text(path))
}

func (d *TreeDifference) sums(content *io.SectionReader, layer bool) (map[sum]sum, error) {
	sums := map[sum]sum{}
	return sums, d.each(content, layer, func(_ string, key, now sum, _ bool) error {
		if len(sums) == maxEntries {
			return fmt.Errorf("it has more than %d files, which are too many to be compared", maxEntries)
		}
		sums[key] = now
		return nil
	})
}

// each calls use for each file with a sum of its path, and one of all that is compared: the zero one for what was deleted.
func (d *TreeDifference) each(content *io.SectionReader, layer bool, use func(path string, key, now sum, deleted bool) error) error {
	buffer := make([]byte, 256<<10)
	return eachFile(section(content), layer, func(f treeFile, content io.Reader) error {
		now := sum{}
		if !f.deleted {
			h := f.header
			hash := sha256.New()
			fmt.Fprintf(hash, "%d %o %d %d %d %d %d %q", h.Typeflag, h.Mode, h.Uid, h.Gid, h.Size, h.Devmajor, h.Devminor, h.Linkname)
			for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
				if strings.HasPrefix(key, "SCHILY.xattr.") {
					fmt.Fprintf(hash, " %q=%q", key, h.PAXRecords[key])
				}
			}
			if _, err := io.CopyBuffer(hash, content, buffer); err != nil {
				return fmt.Errorf("read tar of files: %w", err)
			}
			now = sum(hash.Sum(nil)[:len(sum{})])
		}
		return use(f.path, sumOf(f.path), now, f.deleted)
	})
}

func sumOf(text string) sum {
	full := sha256.Sum256([]byte(text))
	return sum(full[:len(sum{})])
}

// section is another reader of the same bytes, from the first one on. What is missing is empty.
func section(r *io.SectionReader) io.Reader {
	if r == nil {
		return strings.NewReader("")
	}
	return io.NewSectionReader(r, 0, r.Size())
}
