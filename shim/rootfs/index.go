package rootfs

import (
	"bufio"
	"encoding/binary"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// The index says what the first pass has found: a record for each name, in the order of the walk, in a file, since
// there may be millions. A directory is a record of its own, followed by those of the names in it.

type recordKind byte

const (
	dirRecord   recordKind = iota + 1 // what follows, until the next of these, is in this directory
	leafRecord                        // a name that is not a directory's
	subRecord                         // a directory's name; the directory itself comes later
	batchRecord                       // the next batch of names begins
)

// record is one of the index.
type record struct {
	kind recordKind
	name []byte // without the directories that it is in

	// What a directory's parents are can be told from the depth: 0 is the root's. Its place among its siblings is its batch,
	// and in that its name.
	depth, batch int

	// The second pass takes the piece if it finds the same inode, unchanged. There is none if length is 0.
	piece piece
	attrs unix.Stat_t // what appendTo writes of it
	notes marks

	same bool // not in the file: whether the second pass has found the same
}

// piece is where an entry of the tar is in the first pass's spool.
type piece struct {
	offset, length int64
	head           int64 // what comes before a gap in front of the content; 0 if there is no gap
}

// Bits of a record that a whole number holds.
const (
	opaqueBit = 1 << iota
	whiteoutBit
)

func (r *record) appendTo(b []byte) []byte {
	b = append(b, byte(r.kind))
	b = binary.AppendUvarint(b, uint64(len(r.name)))
	b = append(b, r.name...)
	if r.kind != dirRecord && r.kind != leafRecord {
		return b
	}
	bits := uint64(0)
	if r.notes.opaque {
		bits |= opaqueBit
	}
	if r.notes.whiteout {
		bits |= whiteoutBit
	}
	st := &r.attrs
	for _, v := range [...]uint64{
		uint64(r.depth), uint64(r.batch), uint64(r.piece.offset), uint64(r.piece.length), uint64(r.piece.head), bits,
		uint64(st.Dev), st.Ino, uint64(st.Mode), uint64(st.Nlink), uint64(st.Uid), uint64(st.Gid), uint64(st.Rdev), uint64(st.Size),
		uint64(st.Mtim.Nsec), uint64(st.Ctim.Nsec),
	} {
		b = binary.AppendUvarint(b, v)
	}
	b = binary.AppendVarint(b, int64(st.Mtim.Sec))
	return binary.AppendVarint(b, int64(st.Ctim.Sec))
}

// parse reads the record at the start of b, and returns what is behind it. The name stays in b.
func (r *record) parse(b []byte) ([]byte, error) {
	ok := true
	next := func() uint64 {
		v, n := binary.Uvarint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return v
	}
	signed := func() int64 {
		v, n := binary.Varint(b)
		if n <= 0 {
			ok = false
			return 0
		}
		b = b[n:]
		return v
	}
	if len(b) == 0 {
		return nil, errIndex
	}
	*r = record{kind: recordKind(b[0])}
	b = b[1:]
	length := next()
	if !ok || length > uint64(len(b)) {
		return nil, errIndex
	}
	r.name, b = b[:length], b[length:]
	if r.kind != dirRecord && r.kind != leafRecord {
		return b, nil
	}
	r.depth, r.batch = int(next()), int(next())
	r.piece = piece{offset: int64(next()), length: int64(next()), head: int64(next())}
	bits := next()
	r.notes = marks{opaque: bits&opaqueBit != 0, whiteout: bits&whiteoutBit != 0}
	st := &r.attrs
	setUint(&st.Dev, next())
	st.Ino = next()
	st.Mode = uint32(next())
	setUint(&st.Nlink, next())
	st.Uid, st.Gid = uint32(next()), uint32(next())
	setUint(&st.Rdev, next())
	st.Size = int64(next())
	st.Mtim.Nsec, st.Ctim.Nsec = int64(next()), int64(next())
	st.Mtim.Sec, st.Ctim.Sec = signed(), signed()
	if !ok {
		return nil, errIndex
	}
	return b, nil
}

// setUint is for fields whose size depends on the architecture.
func setUint[T uint32 | uint64](field *T, v uint64) { *field = T(v) }

// errIndex cannot be but for a disk that gives back other bytes than it got.
var errIndex = errors.New("read index of the first pass: it is damaged")

// unchanged tells whether an inode is what it was: all that a tar has of it but content and extended attributes, whose changes
// change the time of the last change, ctime, which nobody can set.
func unchanged(a, b *unix.Stat_t) bool {
	return a.Dev == b.Dev && a.Ino == b.Ino && a.Mode == b.Mode && a.Nlink == b.Nlink && a.Uid == b.Uid && a.Gid == b.Gid &&
		a.Rdev == b.Rdev && a.Size == b.Size && a.Mtim == b.Mtim && a.Ctim == b.Ctim
}

// chunkRecords is how many records are looked at at a time.
const chunkRecords = 400

// chunk is a part of the index. It begins with the length and the bytes of the path of the directory that its first record is, or is
// about a name in.
type chunk struct{ offset, length int64 }

// index is written in order, and then read in chunks.
type index struct {
	file    *os.File
	w       *bufio.Writer
	buf     []byte
	written int64
	records int // in the last chunk
	chunks  []chunk
}

func newIndex(file *os.File) *index {
	return &index{file: file, w: bufio.NewWriterSize(file, spoolBuffer)}
}

// add appends a record about a name in the directory at path, or about that directory itself.
func (x *index) add(r *record, path string) error {
	x.buf = x.buf[:0]
	if len(x.chunks) == 0 || x.records == chunkRecords {
		x.chunks = append(x.chunks, chunk{offset: x.written})
		x.records = 0
		x.buf = append(binary.AppendUvarint(x.buf, uint64(len(path))), path...)
	}
	x.records++
	x.buf = r.appendTo(x.buf)
	n, err := x.w.Write(x.buf)
	x.written += int64(n)
	x.chunks[len(x.chunks)-1].length += int64(n)
	return err
}

// read parses a chunk, into what is there if it is enough.
func (x *index) read(c chunk, records []record, buf []byte) (path string, _ []record, _ []byte, err error) {
	if int64(cap(buf)) < c.length {
		buf = make([]byte, c.length)
	}
	buf = buf[:c.length]
	if n, err := x.file.ReadAt(buf, c.offset); err != nil && (err != io.EOF || int64(n) != c.length) {
		return "", nil, buf, err
	}
	path, records, err = parseChunk(buf, records[:0])
	return path, records, buf, err
}

// parseChunk appends the records in b to records. Their names stay in b.
func parseChunk(b []byte, records []record) (path string, _ []record, err error) {
	length, n := binary.Uvarint(b)
	if n <= 0 || length > uint64(len(b)-n) {
		return "", nil, errIndex
	}
	path, b = string(b[n:n+int(length)]), b[n+int(length):]
	for len(b) > 0 {
		records = append(records, record{})
		if b, err = records[len(records)-1].parse(b); err != nil {
			return "", nil, err
		}
	}
	return path, records, nil
}
