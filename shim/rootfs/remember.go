package rootfs

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/maphash"
	"io"
	"os"
)

// What a walk has to remember grows with what a container has: directories that wait for their turn, and files that may come again
// under another name. It is the container that decides how many. So beyond a bound it goes into a file: ten million take
// time and disk, and no memory.

const (
	maxWaiting = 256 << 10 // bytes of names of directories in memory
	maxKnown   = 1 << 20   // bytes of paths of files in memory, about

	// Where things are in the scratch file, whose size is mostly hole. The names of directories come first.
	recordsAt = 1 << 40
	tablesAt  = 1 << 41
)

// waiting are the names of directories that wait for their turn: a list for each directory on the way to the one at hand,
// in the order of the walk. A list is added to at the end, and the last one is the first to go.
type waiting struct {
	file   *os.File
	stored int64  // bytes that are in the file
	buf    []byte // what comes after that

	window   []byte // of the file
	windowAt int64
}

func (w *waiting) end() int64 { return w.stored + int64(len(w.buf)) }

// add appends a name, of its directory's batch of that number.
func (w *waiting) add(name string, batch int) error {
	w.buf = binary.AppendUvarint(w.buf, uint64(batch))
	w.buf = binary.AppendUvarint(w.buf, uint64(len(name)))
	w.buf = append(w.buf, name...)
	if len(w.buf) < maxWaiting {
		return nil
	}
	if _, err := w.file.WriteAt(w.buf, w.stored); err != nil {
		return fmt.Errorf("write down directories: %w", err)
	}
	w.stored += int64(len(w.buf))
	w.buf = w.buf[:0]
	return nil
}

// at returns the name at a position, and the position of the next one.
func (w *waiting) at(position int64) (name string, batch int, next int64, err error) {
	const most = 8 << 10 // bytes of a name, with what is before it, and more
	var b []byte
	if position >= w.stored {
		b = w.buf[position-w.stored:]
	} else {
		left := min(most, w.stored-position) // names do not go on in buf
		if position < w.windowAt || position+left > w.windowAt+int64(len(w.window)) {
			w.window = append(w.window[:0], make([]byte, min(8*most, w.stored-position))...)
			if _, err := w.file.ReadAt(w.window, position); err != nil {
				w.window = w.window[:0]
				return "", 0, 0, fmt.Errorf("read directories that were written down: %w", err)
			}
			w.windowAt = position
		}
		b = w.window[position-w.windowAt:]
	}
	number, n := binary.Uvarint(b)
	length, m := binary.Uvarint(b[max(n, 0):])
	if n <= 0 || m <= 0 || length > uint64(len(b)-n-m) {
		return "", 0, 0, errScratch
	}
	return string(b[n+m : n+m+int(length)]), int(number), position + int64(n+m) + int64(length), nil
}

// cut forgets what comes from a position on.
func (w *waiting) cut(position int64) {
	if position >= w.stored {
		w.buf = w.buf[:position-w.stored]
		return
	}
	w.stored, w.buf = position, w.buf[:0]
	w.window = w.window[:max(0, min(int64(len(w.window)), position-w.windowAt))]
}

// firstPaths are the paths under which files with several names came first. Those that came when there was still room are in memory,
// the others in the scratch file: records one after the other, and a table of where they are, by a hash. When half of that is
// taken, it moves into one four times as large. Each is as far behind tablesAt as it is long, so that none overlap.
type firstPaths struct {
	file   *os.File
	memory map[inode]string
	size   int // of what is in memory

	seed    maphash.Seed
	slots   uint64 // of the table: a power of two, 0 if there is none
	taken   uint64
	records int64  // bytes of them
	buf     []byte // of one
}

func newFirstPaths(file *os.File) *firstPaths {
	return &firstPaths{file: file, memory: make(map[inode]string), seed: maphash.MakeSeed()}
}

// slot is one of the table's: the hash of an inode, and where its record is, which is never 0 but in an empty slot.
type slot struct{ hash, record uint64 }

const (
	slotSize   = 16
	recordHead = 20 // device, inode, length of the path
	firstSlots = 1 << 14
)

// get returns the path under which a file came first, "" if it has not come.
func (f *firstPaths) get(id inode) (string, error) {
	if path, ok := f.memory[id]; ok || f.slots == 0 {
		return path, nil
	}
	_, path, err := f.find(id, f.hash(id))
	if err != nil {
		return "", fmt.Errorf("read links that were written down: %w", err)
	}
	return path, nil
}

// put notes the path of a file that has not come before.
func (f *firstPaths) put(id inode, path string) error {
	if f.size < maxKnown {
		const entry = 64 // bytes in the map, about
		f.memory[id] = path
		f.size += entry + len(path)
		return nil
	}
	if err := f.store(id, path); err != nil {
		return fmt.Errorf("write down links: %w", err)
	}
	return nil
}

func (f *firstPaths) hash(id inode) uint64 { return maphash.Comparable(f.seed, id) }

func (f *firstPaths) slotAt(slots, number uint64) int64 {
	return tablesAt + int64(slots*slotSize) + int64(number*slotSize)
}

// find returns the path of a file, or where its slot would be.
func (f *firstPaths) find(id inode, hash uint64) (free uint64, path string, err error) {
	for number := hash & (f.slots - 1); ; number = (number + 1) & (f.slots - 1) {
		s, err := f.slot(number)
		if err != nil || s.record == 0 {
			return number, "", err
		}
		if s.hash != hash {
			continue
		}
		if path, err := f.record(int64(s.record-1), id); path != "" || err != nil {
			return 0, path, err
		}
	}
}

// slot reads a slot of the table.
func (f *firstPaths) slot(number uint64) (slot, error) {
	var b [slotSize]byte
	// Behind the file's end there are only empty ones.
	if n, err := f.file.ReadAt(b[:], f.slotAt(f.slots, number)); err != nil && (err != io.EOF || n != 0) {
		return slot{}, err
	}
	return parseSlot(b[:]), nil
}

func parseSlot(b []byte) slot {
	return slot{binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])}
}

// record reads a record, and returns its path, "" if it is of another file.
func (f *firstPaths) record(at int64, id inode) (string, error) {
	var head [recordHead]byte
	if _, err := f.file.ReadAt(head[:], recordsAt+at); err != nil {
		return "", err
	}
	if (inode{binary.LittleEndian.Uint64(head[:]), binary.LittleEndian.Uint64(head[8:])}) != id {
		return "", nil
	}
	length := binary.LittleEndian.Uint32(head[16:])
	if length == 0 || length > maxPath {
		return "", errScratch
	}
	path := make([]byte, length)
	if _, err := f.file.ReadAt(path, recordsAt+at+recordHead); err != nil {
		return "", err
	}
	return string(path), nil
}

// store appends a record, and puts it into the table.
func (f *firstPaths) store(id inode, path string) error {
	if 2*f.taken >= f.slots {
		if err := f.grow(); err != nil {
			return err
		}
	}
	f.buf = binary.LittleEndian.AppendUint64(f.buf[:0], id.dev)
	f.buf = binary.LittleEndian.AppendUint64(f.buf, id.ino)
	f.buf = binary.LittleEndian.AppendUint32(f.buf, uint32(len(path)))
	f.buf = append(f.buf, path...)
	if _, err := f.file.WriteAt(f.buf, recordsAt+f.records); err != nil {
		return err
	}
	err := f.insert(slot{f.hash(id), uint64(f.records) + 1})
	f.records += int64(len(f.buf))
	f.taken++
	return err
}

// insert puts a slot, which is not there yet, into the table.
func (f *firstPaths) insert(s slot) error {
	number := s.hash & (f.slots - 1)
	for {
		at, err := f.slot(number)
		if err != nil {
			return err
		}
		if at.record == 0 {
			break
		}
		number = (number + 1) & (f.slots - 1)
	}
	b := binary.LittleEndian.AppendUint64(nil, s.hash)
	_, err := f.file.WriteAt(binary.LittleEndian.AppendUint64(b, s.record), f.slotAt(f.slots, number))
	return err
}

// grow makes a larger table.
func (f *firstPaths) grow() error {
	old := f.slots
	f.slots = max(firstSlots, 4*old)
	const piece = 4096 // slots that are read at a time, of which a table always has a multiple
	buf := make([]byte, piece*slotSize)
	for first := uint64(0); first < old; first += piece {
		clear(buf)
		if _, err := f.file.ReadAt(buf, f.slotAt(old, first)); err != nil && err != io.EOF {
			return err
		}
		for b := buf; len(b) > 0; b = b[slotSize:] {
			if s := parseSlot(b); s.record != 0 {
				if err := f.insert(s); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// errScratch cannot be but for a disk that gives back other bytes than it got.
var errScratch = errors.New("read scratch file: it is damaged")
