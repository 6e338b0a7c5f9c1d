package inspect

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"math/bits"
	"slices"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"

	"crishim/criu/image"
)

// CRIU's kinds of mappings, from its image.h.
const (
	filePrivate = 1 << 6
	fileShared  = 1 << 7
	anonShared  = 1 << 8
	sysvIPC     = 1 << 10
)

// space is a process's address space.
type space struct {
	stored
	executable uint32
	mappings   int
	virtual    int64
	isRead     bool           // mm-*.img was
	bounds     uint64         // where mappings begin and end, all their bits
	private    []span         // mappings of files for private changes, in order
	early      []image.Extent // what the archive has, where that was read before the mappings
	fileBacked uint64         // pages of that
	next       int            // in private: what the extents to come can be in
	shares     []shares       // memory that it shares
}

type span struct{ start, end uint64 }

type shares struct{ id, address uint64 }

// stored is memory that an image of pages holds.
type stored struct {
	pagesID uint32
	known   bool // there is a pagemap
	pages   uint64
}

func (c *collector) space(pid uint32) *space {
	s := c.spaces[pid]
	if s == nil {
		s = &space{}
		c.spaces[pid] = s
	}
	return s
}

func (c *collector) mappings(pid uint32, size int64, content io.Reader) error {
	s := c.space(pid)
	if s.isRead {
		return errors.New("a process has two of it")
	}
	executable, err := image.Mappings(content, size, func(m *vma.VmaEntry) error {
		if m.GetEnd() < m.GetStart() {
			return errors.New("a mapping ends before it begins")
		}
		s.mappings++
		s.virtual += int64(m.GetEnd() - m.GetStart())
		s.bounds |= m.GetStart() | m.GetEnd()
		switch status := m.GetStatus(); {
		case status&filePrivate != 0:
			s.private = append(s.private, span{m.GetStart(), m.GetEnd()})
			return c.keep()
		case status&(anonShared|sysvIPC) != 0 && status&fileShared == 0:
			s.shares = append(s.shares, shares{m.GetShmid(), m.GetStart()})
			return c.keep()
		}
		return nil
	})
	slices.SortFunc(s.private, func(a, b span) int { return cmp.Compare(a.start, b.start) })
	s.executable, s.isRead = executable, true
	return err
}

// pagemap counts pages. Those in private mappings of files are told apart at once where the mappings are known, which is mostly so, and at
// the end otherwise.
func (c *collector) pagemap(pid uint32, size int64, content io.Reader) error {
	s := c.space(pid)
	return c.extents(&s.stored, size, content, func(e image.Extent) error {
		if s.isRead {
			s.countInFiles(e)
			return nil
		}
		s.early = append(s.early, e)
		return c.keep()
	})
}

func (c *collector) sharedPagemap(id uint64, size int64, content io.Reader) error {
	if c.shared[id] == nil {
		c.shared[id] = &stored{}
	}
	if err := c.keep(); err != nil {
		return err
	}
	return c.extents(c.shared[id], size, content, func(image.Extent) error { return nil })
}

func (c *collector) extents(s *stored, size int64, content io.Reader, use func(image.Extent) error) error {
	if s.known {
		return errors.New("there are two of it")
	}
	pagemap, err := image.OpenPagemap(content, size)
	if err != nil {
		return err
	}
	s.known, s.pagesID = true, pagemap.Pages
	for from := uint64(0); ; {
		e, err := nextExtent(pagemap, from)
		if err == io.EOF {
			return nil
		}
		if err == nil && e.Stored {
			s.pages += e.Pages
			err = use(e)
		}
		if err != nil {
			return err
		}
		from = e.Start + 1
	}
}

// maxPages is more than an address space has.
const maxPages = 1 << 44

// nextExtent returns the next extent, which begins at from or behind it.
func nextExtent(pagemap *image.Pagemap, from uint64) (image.Extent, error) {
	e, err := pagemap.Next()
	switch {
	case err != nil:
	case e.Start < from:
		err = errors.New("its pages are not in the order of their addresses")
	case e.Pages == 0 || e.Pages > maxPages || e.Start > 1<<63:
		err = fmt.Errorf("it has %d pages at %#x", e.Pages, e.Start)
	}
	return e, err
}

// countInFiles counts the pages of an extent that are in private mappings of files. Extents come in order.
func (s *space) countInFiles(e image.Extent) {
	// Mappings begin and end at pages, of which the smallest there are says how large they are.
	page := uint64(1) << min(bits.TrailingZeros64(s.bounds), 16)
	end := e.Start + e.Pages*page
	for ; s.next < len(s.private) && s.private[s.next].start < end; s.next++ {
		m := s.private[s.next]
		if from, to := max(m.start, e.Start), min(m.end, end); from < to {
			s.fileBacked += (to - from) / page
		}
		if m.end > end {
			return // the next extent may be in it, too
		}
	}
}

// memory describes what is known of a process's memory.
func (c *collector) memory(s *space) (Memory, error) {
	for _, e := range s.early {
		s.countInFiles(e)
	}
	s.early = nil
	m := Memory{Mappings: s.mappings, Virtual: s.virtual}
	var err error
	if m.PageSize, err = c.pageSize(s.stored); err != nil {
		return m, err
	}
	m.File = int64(min(s.fileBacked, s.pages)) * m.PageSize
	m.Archived = int64(s.pages) * m.PageSize
	m.Anonymous = m.Archived - m.File
	return m, nil
}

// pageSize is how large the pages in an image are. No image says it: it is the image's size by the number of pages.
func (c *collector) pageSize(s stored) (int64, error) {
	if s.pages == 0 {
		return 0, nil
	}
	size, ok := c.pages[s.pagesID]
	if !ok {
		return 0, fmt.Errorf("pages-%d.img is missing", s.pagesID)
	}
	page := size / int64(s.pages)
	if size%int64(s.pages) != 0 || page < 4<<10 || page > 64<<10 || bits.OnesCount64(uint64(page)) != 1 {
		return 0, fmt.Errorf("pages-%d.img has %d bytes, and should have %d pages", s.pagesID, size, s.pages)
	}
	return page, nil
}
