package inspect

import (
	"bytes"
	"errors"
	"fmt"
	"io"

	"crishim/criu/image"
	"crishim/shim/archive"
)

// pages walks what a pagemap names and an image of pages holds.
type pages struct {
	pagemap *image.Pagemap    // nil at the end
	content *io.SectionReader // of the pages
	next    int64             // where the current extent's bytes are in it
	extent  image.Extent      // what is left of the current extent
}

// openPages begins to walk. Where there is no such pagemap, it is at its end.
func openPages(a *archive.Archive, name string) (*pages, error) {
	member, err := a.Member(archive.ImagesDir + "/" + name)
	if err != nil || member == nil {
		return &pages{}, err
	}
	pagemap, err := image.OpenPagemap(member, member.Size())
	if err != nil {
		return nil, err
	}
	content, err := a.Member(fmt.Sprintf("%s/pages-%d.img", archive.ImagesDir, pagemap.Pages))
	if err != nil {
		return nil, err
	}
	if content == nil {
		content = io.NewSectionReader(bytes.NewReader(nil), 0, 0)
	}
	p := &pages{pagemap: pagemap, content: content}
	return p, p.advance()
}

// advance goes on to the next extent that is stored.
func (p *pages) advance() error {
	from := p.extent.Start
	for {
		e, err := nextExtent(p.pagemap, from)
		if err == io.EOF {
			p.pagemap = nil
			return nil
		}
		if err != nil {
			return err
		}
		if e.Stored {
			p.extent = e
			return nil
		}
		from = e.Start
	}
}

// skip passes over n pages of the current extent.
func (p *pages) skip(n, page uint64) error {
	p.next += int64(n * page)
	p.extent.Start += n * page
	p.extent.Pages -= n
	if p.extent.Pages > 0 {
		return nil
	}
	return p.advance()
}

// comparePages walks two pagemaps at once, page being the size of a page, and adds to change.
func comparePages(a, b *pages, page uint64, change *MemoryChange) error {
	if page == 0 && (a.pagemap != nil || b.pagemap != nil) {
		return errors.New("there were no pages before: something still writes to the archive")
	}
	buffer := make([]byte, 2*max(page, 256<<10))
	for a.pagemap != nil || b.pagemap != nil {
		first, other, count := a, b, &change.Removed
		if a.pagemap == nil || b.pagemap != nil && b.extent.Start < a.extent.Start {
			first, other, count = b, a, &change.Added
		}
		n := first.extent.Pages
		if other.pagemap == nil || other.extent.Start > first.extent.Start {
			if other.pagemap != nil {
				n = min(n, (other.extent.Start-first.extent.Start+page-1)/page)
			}
			*count += n
			if err := first.skip(n, page); err != nil {
				return err
			}
			continue
		}
		n = min(n, other.extent.Pages, uint64(len(buffer)/2)/page)
		one, two := buffer[:n*page], buffer[len(buffer)/2:][:n*page]
		if err := errors.Join(a.read(one), b.read(two)); err != nil {
			return err
		}
		for at := uint64(0); at < n*page; at += page {
			if bytes.Equal(one[at:at+page], two[at:at+page]) {
				change.Same++
			} else {
				change.Changed++
			}
		}
		if err := errors.Join(a.skip(n, page), b.skip(n, page)); err != nil {
			return err
		}
	}
	return nil
}

func (p *pages) read(b []byte) error {
	if _, err := p.content.ReadAt(b, p.next); err != nil {
		return fmt.Errorf("read pages: %w", err)
	}
	return nil
}
