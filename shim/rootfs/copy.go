package rootfs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"golang.org/x/sys/unix"
)

// Copy makes the diff of a layer: the changes that it holds, as an uncompressed OCI
// layer. Deleted names become whiteouts (.wh.NAME), replaced directories get an opaque
// marker (.wh..wh..opq).
//
// It does so in two passes: one while the container runs, which copies all that has
// been at rest for a while, and one while it stands still, which copies the rest and
// looks whether what was copied is still the same. The result is what the second pass
// would have made by itself, byte for byte.
//
// Same means the same inode with the same ctime, size, owner and mode. The kernel
// sets ctime at each change, but for those through a mapping of the file. So what is
// mapped when either pass begins is copied in the second, and so is what changed less than settled
// before the first. File systems of which this is not known are copied in the second pass alone.
//
// The entries keep type, mode, numeric owner, modification time in nanoseconds,
// hard links within the layer, holes of 32 KiB and more, and extended attributes.
// Files whose content is still in a lower layer (metacopy) are whole in the
// output, and so are directories that were renamed (redirect), which come out as
// opaque ones with everything that is seen in them.
//
// Left out are sockets, inode flags (chattr), overlay's own attributes, and those
// that bind a file to this machine, security.selinux and security.evm. What is
// renamed or deleted during the second pass may be missing.
//
// These are errors that name the file and wrap ErrUnsupported: names that begin
// with .wh., which any reader would take for whiteouts; attributes that a tar
// cannot hold or that would mean something to another overlay; files of over
// 16 TiB, or with so many holes that readers do not take the list of them; a file
// with a lease; a mount point below Upper or Merged. Whatever cannot be read is
// an error too.
//
// A parent comes before what is in it, and a directory's entries are sorted,
// files first; directories of more than 10,000 entries in pieces of that many.
// Memory grows neither with the number of files, links and directories nor with their size.
//
// It is not for concurrent use.
type Copy struct {
	layer     Layer
	processes func() ([]int, error)
	first     *spool // what the first pass has copied; nil before there was one
	index     *index
	second    *spool
	scratch   *os.File

	settled time.Duration // see there; tests do not wait for so long
	trusted func(*os.File) (bool, error)
	batch   int
	parts   int
}

// Piece is a part of a file.
type Piece struct {
	File           *os.File
	Offset, Length int64
}

// settled is how long a file must have been at rest when the first pass begins. A
// write takes the time when it begins, and may go on; the time is that of the last tick (10 ms at most), and some file systems
// keep whole seconds only.
const settled = 2 * time.Second

// NewCopy prepares to copy a layer, whose descriptors must stay open. processes
// returns those that may have files of it mapped. The spools are empty files, open to be read and
// written, for nobody else: one for the first pass, one for its index, one for the second, and one for what is to be remembered of
// many directories and links. They stay the caller's, and open.
func NewCopy(layer Layer, processes func() ([]int, error), spools [4]*os.File) *Copy {
	return &Copy{
		layer: layer, processes: processes,
		first: newSpool(spools[0]), index: newIndex(spools[1]), second: newSpool(spools[2]), scratch: spools[3],
		settled: settled, trusted: stampsChanges, batch: maxSorted, parts: maxExtents,
	}
}

// Begin makes the first pass, which may be left out. It can take as long as it takes to copy
// the layer once and have it on the disk. What is deleted or changed meanwhile is no error.
func (c *Copy) Begin(ctx context.Context) error {
	err := c.begin(ctx)
	if err != nil {
		return fmt.Errorf("copy layer while it is in use: %w", err)
	}
	return nil
}

func (c *Copy) begin(ctx context.Context) error {
	if ok, err := c.trusted(c.layer.Upper); err != nil || !ok {
		return err
	}
	// First the time, then the mappings: who maps a file after this and writes to it sets a later time.
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_REALTIME_COARSE, &now); err != nil { // the one that files get theirs from
		return fmt.Errorf("read clock: %w", err)
	}
	mapped, err := c.layer.mapped(c.processes)
	if err != nil {
		return err
	}
	k := c.walk(ctx)
	k.deleted = func(string) error { return nil } // the second pass says what is
	k.first = &firstPass{
		before: time.Unix(now.Unix()).Add(-c.settled),
		mapped: mapped, spool: c.first, index: c.index,
	}
	c.first.skip = k.first.skip
	if err := k.run(c.first); err != nil {
		return err
	}
	if err := c.index.w.Flush(); err != nil {
		return err
	}
	return c.first.settle(ctx)
}

// Finish makes the second pass, while nothing changes any more, and returns what the
// diff consists of, one piece behind the other.
//
// It calls deleted for each path that goes into deleted.files: for each whiteout
// the deleted path and the path of the whiteout itself; for each opaque marker its
// own path and what the lower directories have in the replaced directory and the
// layer has not. All are relative to the root. Restorers that read deleted.files
// (CRI-O, podman) unpack whiteouts as ordinary files and remove with this list
// what they should not have unpacked. The paths are bytes. What a lower layer has
// under another name, since it was renamed there, is not in the list.
func (c *Copy) Finish(ctx context.Context, deleted func(path string) error) ([]Piece, error) {
	pieces, err := c.finish(ctx, deleted)
	if err != nil {
		return nil, fmt.Errorf("write layer diff: %w", err)
	}
	return pieces, nil
}

func (c *Copy) finish(ctx context.Context, deleted func(path string) error) ([]Piece, error) {
	if err := c.second.reset(); err != nil {
		return nil, err
	}
	k := c.walk(ctx)
	k.deleted = deleted
	k.second = &secondPass{first: c.first.file, spool: c.second}
	if len(c.index.chunks) > 0 {
		mapped, err := c.layer.mapped(c.processes)
		if err != nil {
			return nil, err
		}
		look := startLook(ctx, c.layer.Upper, c.index, mapped)
		defer look.stop()
		k.second.known = look
	}
	c.second.hurry = true
	c.second.skip = k.second.skip
	if err := k.run(c.second); err != nil {
		return nil, err
	}
	k.second.take()
	return k.second.pieces, nil
}

func (c *Copy) walk(ctx context.Context) *walk {
	return &walk{ctx: ctx, root: c.layer.Upper, layer: &c.layer, scratch: c.scratch, batch: c.batch, parts: c.parts}
}

// stampsChanges says whether each change to a file of dir's file system, except
// through mappings, sets its ctime by this machine's clock, and each first change to a page through a
// mapping does so, too. A tmpfs does not do the latter. File systems that nobody has looked at are not among them.
func stampsChanges(dir *os.File) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &st); err != nil {
		return false, fmt.Errorf("look at file system of the layer: %w", err)
	}
	switch st.Type {
	case unix.EXT4_SUPER_MAGIC, unix.XFS_SUPER_MAGIC, unix.BTRFS_SUPER_MAGIC:
		return true, nil
	}
	return false, nil
}

// firstPass is what the first pass does besides walking.
type firstPass struct {
	before time.Time // what changed later is left to the second pass
	mapped *mapped
	spool  *spool
	index  *index

	gap, to int64 // in front of the content of the entry that is being written; 0 if there is none
}

func (f *firstPass) skip(from, to int64) { f.gap, f.to = from, to }

// settled tells whether a change after this would show.
func (f *firstPass) settled(st *unix.Stat_t) bool {
	return time.Unix(st.Ctim.Unix()).Before(f.before) && !f.mapped.has(st)
}

// directory writes a directory's entry, if it is at rest, and notes it.
func (f *firstPass) directory(d *directory, e *entry, write func() error) error {
	r := record{kind: dirRecord, name: []byte(d.name), depth: d.depth, batch: d.batch}
	if !f.settled(&e.st) {
		return f.index.add(&r, e.path)
	}
	return f.write(&r, e.path, e, write)
}

// name notes a directory's name in the one at dir.
func (f *firstPass) name(dir, name string) error {
	return f.index.add(&record{kind: subRecord, name: []byte(name)}, dir)
}

// batch notes that all names of the directory at dir that come now are of its next batch.
func (f *firstPass) batch(dir string) error {
	return f.index.add(&record{kind: batchRecord}, dir)
}

// leaf writes what is not a directory, if it is at rest, and notes it.
func (f *firstPass) leaf(k *walk, e *entry) error {
	dir := e.path[:max(0, len(e.path)-len(baseName(e.path))-1)]
	r := record{kind: leafRecord, name: []byte(baseName(e.path))}
	switch {
	case e.is(unix.S_IFSOCK):
		return nil
	case isWhiteout(&e.st):
		r.attrs = e.st // the second pass writes it: all share an inode, whose ctime each of them changes
		return f.index.add(&r, dir)
	case !f.settled(&e.st):
		return f.index.add(&r, dir)
	}
	switch first, err := k.before(e); {
	case err != nil:
		return err
	case first != "":
		r.attrs = e.st // what this is linked to, only the second pass knows
		return f.index.add(&r, dir)
	}
	if err := k.comesFirst(e); err != nil {
		return err
	}
	if err := k.examine(e); err != nil {
		return err
	}
	if e.is(unix.S_IFREG) {
		// A write sets the time when it begins, and may still go on. This waits for its end: a file system
		// lets nobody look for holes meanwhile, or (XFS) nobody read.
		_, _ = unix.Seek(e.file, 0, unix.SEEK_DATA)
	}
	err := f.write(&r, dir, e, func() error {
		if e.marks.whiteout {
			return nil
		}
		return k.write(e)
	})
	if errors.Is(err, errGone) {
		return f.index.add(&record{kind: leafRecord, name: r.name}, dir)
	}
	return err
}

// write lets write write e, and notes where that is. dir is for the index.
func (f *firstPass) write(r *record, dir string, e *entry, write func() error) error {
	start := f.spool.position
	f.gap, f.to = 0, 0
	if err := write(); err != nil {
		return err
	}
	r.attrs, r.notes = e.st, e.marks
	r.piece = piece{offset: start, length: f.spool.position - start}
	if f.to > 0 {
		r.piece.head = f.gap - start
		r.piece.length -= f.to - f.gap
	}
	return f.index.add(r, dir)
}

// maxPieces is how many pieces there may be before small ones are copied instead, to bound what they take of memory.
const maxPieces, smallPiece = 32 << 10, 64 << 10

// secondPass is what the second pass does besides walking.
type secondPass struct {
	known  *look // nil if there was no first pass
	first  *os.File
	spool  *spool
	pieces []Piece
	taken  int64 // up to where the spool is in pieces
}

func (s *secondPass) skip(from, to int64) {
	s.take()
	s.taken = to
}

// take makes a piece of what the spool has got since the last one.
func (s *secondPass) take() {
	s.add(s.spool.file, s.taken, s.spool.position-s.taken)
	s.taken = s.spool.position
}

func (s *secondPass) add(file *os.File, offset, length int64) {
	if length == 0 {
		return
	}
	if last := len(s.pieces) - 1; last >= 0 && s.pieces[last].File == file && s.pieces[last].Offset+s.pieces[last].Length == offset {
		s.pieces[last].Length += length
		return
	}
	s.pieces = append(s.pieces, Piece{file, offset, length})
}

// keep takes over what the first pass has written.
func (s *secondPass) keep(p piece) error {
	if len(s.pieces) >= maxPieces && p.length < smallPiece && p.head == 0 && s.spool.position > s.taken {
		buf := make([]byte, p.length)
		if _, err := s.first.ReadAt(buf, p.offset); err != nil {
			return fmt.Errorf("read what the first pass has copied: %w", err)
		}
		_, err := s.spool.Write(buf)
		return err
	}
	s.take()
	if p.head == 0 {
		s.add(s.first, p.offset, p.length)
		return nil
	}
	s.add(s.first, p.offset, p.head)
	s.add(s.first, aligned(p.offset+p.head), p.length-p.head)
	return nil
}
