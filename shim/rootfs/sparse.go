package rootfs

import (
	"archive/tar"
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	// maxFileSize is the longest file that is taken: ext4 has no longer ones. A longer
	// one is nearly all hole, and no restorer but GNU tar keeps holes: the others
	// write zeros until the disk is full.
	maxFileSize = 16 << 40
	// minHole is the shortest hole that is kept. Shorter ones are read faster than
	// they are told apart.
	minHole = 32 << 10
	// maxExtents bounds the list of a file's parts: with numbers up to maxFileSize it
	// stays below the 1 MiB that Go's archive/tar reads of it.
	maxExtents = 32 << 10
	// maxFilling is how much more than twice its data is read of a file whose
	// holes are too many for the list.
	maxFilling = 1 << 30
)

// extent is a part of a file that has data.
type extent struct{ offset, length int64 }

func (x extent) end() int64 { return x.offset + x.length }

// extents returns the parts of a file outside of its holes: one of its whole
// length if it has no hole worth keeping.
func (k *walk) extents(e *entry) ([]extent, error) {
	size := e.st.Size
	whole := []extent{{0, size}}
	if size < minHole || e.st.Blocks*512 >= size {
		return whole, nil
	}
	var found []extent
	var data int64
	for at := int64(0); at < size; {
		if k.ctx.Err() != nil {
			return nil, context.Cause(k.ctx)
		}
		start, err := unix.Seek(e.file, at, unix.SEEK_DATA)
		if err == unix.ENXIO || err == nil && start >= size {
			break // nothing but a hole from here on
		}
		if err == unix.EINVAL { // a file system that cannot tell
			return whole, nil
		}
		if err != nil {
			return nil, fmt.Errorf("look for holes in %s: %w", quote(e.path), err)
		}
		end, err := unix.Seek(e.file, start, unix.SEEK_HOLE)
		if err == unix.ENXIO { // the file shrank
			break
		}
		if err != nil {
			return nil, fmt.Errorf("look for holes in %s: %w", quote(e.path), err)
		}
		end = min(end, size)
		data += end - start
		switch last := len(found) - 1; {
		case last >= 0 && start-found[last].end() < minHole:
			found[last].length = end - found[last].offset
		case last < 0 && start < minHole:
			found = append(found, extent{0, end})
		default:
			found = append(found, extent{start, end - start})
		}
		if len(found) > k.parts {
			found = fillSmallest(found)
		}
		at = end
	}
	if last := len(found) - 1; last >= 0 && size-found[last].end() < minHole {
		found[last].length = size - found[last].offset
	}
	var stored int64
	for _, part := range found {
		stored += part.length
	}
	if stored > 2*data+maxFilling {
		return nil, unsupported(e.path, "it has more holes than the %d that tar readers take: make it smaller, or without holes (cp --sparse=never), in the container", k.parts)
	}
	return found, nil
}

// fillSmallest makes parts of the smallest quarter of the holes between parts.
func fillSmallest(parts []extent) []extent {
	holes := make([]int, len(parts)-1) // by the index of the part before it
	for i := range holes {
		holes[i] = i
	}
	length := func(i int) int64 { return parts[i+1].offset - parts[i].end() }
	slices.SortFunc(holes, func(i, j int) int { return cmp.Compare(length(i), length(j)) })
	fill := make([]bool, len(parts))
	for _, i := range holes[:len(holes)/4+1] {
		fill[i] = true
	}
	fewer := parts[:1:1]
	for i, part := range parts[1:] {
		if last := len(fewer) - 1; fill[i] {
			fewer[last].length = part.end() - fewer[last].offset
		} else {
			fewer = append(fewer, part)
		}
	}
	return fewer
}

// sparseHeader writes the header of a regular file of which only some parts are
// stored, and returns what the size of the entry is by that. The caller writes the
// parts, and then the padding.
//
// The form is version 1.0 of GNU tar's sparse files in PAX, which Go's archive/tar
// reads but does not write:
// https://www.gnu.org/software/tar/manual/html_section/Sparse-Formats.html
// GNU tar makes holes again. containerd and podman, with Go's reader, get the same
// content and write zeros. busybox tar does not know it, and unpacks what is stored.
// The name and size of the file are in PAX records of their own; what is stored is
// a list of parts, in decimal numbers and lines, then the parts.
func (k *walk) sparseHeader(h *tar.Header, data []extent) (size int64, err error) {
	list := strconv.AppendInt(nil, int64(len(data)+1), 10)
	var stored int64
	for _, part := range append(slices.Clip(data), extent{h.Size, 0}) { // the last one is for the file's size
		list = fmt.Appendf(list, "\n%d\n%d", part.offset, part.length)
		stored += part.length
	}
	list = pad(append(list, '\n'))
	stored += int64(len(list))

	records := map[string]string{
		"GNU.sparse.major":    "1",
		"GNU.sparse.minor":    "0",
		"GNU.sparse.name":     h.Name,
		"GNU.sparse.realsize": strconv.FormatInt(h.Size, 10),
		// Also where the header's own fields would do.
		"size":  strconv.FormatInt(stored, 10),
		"uid":   strconv.Itoa(h.Uid),
		"gid":   strconv.Itoa(h.Gid),
		"mtime": paxTime(h.ModTime.Unix(), h.ModTime.Nanosecond()),
	}
	for name, value := range h.PAXRecords {
		records[name] = value
	}
	var pax []byte
	for _, name := range slices.Sorted(maps.Keys(records)) {
		pax = append(pax, paxRecord(name, records[name])...)
	}
	if len(pax) > maxAttrs {
		return 0, tar.ErrFieldTooLong
	}

	// Readers that do not know sparse files unpack them under these names.
	const name = "GNUSparseFile.0/sparse"
	for _, part := range [][]byte{
		ustar("PaxHeaders.0/sparse", 'x', 0o644, int64(len(pax))), pad(pax),
		ustar(name, tar.TypeReg, h.Mode, stored), list,
	} {
		if _, err := k.out.Write(part); err != nil {
			return 0, err
		}
	}
	return stored, nil
}

// paxRecord encodes a record of a PAX header: its length, which counts itself, the
// name and the value.
func paxRecord(name, value string) string {
	rest := len(" =\n") + len(name) + len(value)
	length := rest + len(strconv.Itoa(rest))
	if n := rest + len(strconv.Itoa(length)); n > length { // the length has made it longer
		length = n
	}
	return fmt.Sprintf("%d %s=%s\n", length, name, value)
}

// paxTime writes a time as PAX has it: seconds, with a fraction if there is one.
func paxTime(seconds int64, nanoseconds int) string {
	if nanoseconds == 0 {
		return strconv.FormatInt(seconds, 10)
	}
	sign := ""
	if seconds < 0 { // -1.25 is -2 s and 750 ms
		sign, seconds, nanoseconds = "-", -(seconds + 1), 1e9-nanoseconds
	}
	return sign + strings.TrimRight(fmt.Sprintf("%d.%09d", seconds, nanoseconds), "0")
}

// ustar makes a header block. Owner and time are 0: PAX records say what they are,
// as they do of sizes that do not fit.
func ustar(name string, typeflag byte, mode, size int64) []byte {
	if size >= 1<<33 {
		size = 0
	}
	b := make([]byte, tarBlock)
	copy(b, name)
	octal := func(at, digits int, value int64) { copy(b[at:], fmt.Sprintf("%0*o", digits, value)) }
	octal(100, 7, mode)
	octal(108, 7, 0) // uid
	octal(116, 7, 0) // gid
	octal(124, 11, size)
	octal(136, 11, 0) // time
	b[156] = typeflag
	copy(b[257:], "ustar\x0000")
	copy(b[148:], "        ") // the sum is of a block with spaces in its place
	sum := int64(0)
	for _, c := range b {
		sum += int64(c)
	}
	octal(148, 6, sum)
	b[154] = 0
	return b
}

func padded(size int64) int64 { return (size + tarBlock - 1) &^ (tarBlock - 1) }

// pad fills up to whole blocks.
func pad(b []byte) []byte { return append(b, make([]byte, padded(int64(len(b)))-int64(len(b)))...) }
