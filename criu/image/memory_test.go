package image

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/mm"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pagemap"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/vma"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

func pagemapOf(t testing.TB, entries ...proto.Message) []byte {
	t.Helper()
	data, err := Write("PAGEMAP", append([]proto.Message{&pagemap.PagemapHead{PagesId: proto.Uint32(7)}}, entries...))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// later is an entry as CRIU 4.2 writes it, whose number of pages is in field 5.
func later(start, pages uint64, flags uint32) *pagemap.PagemapEntry {
	e := &pagemap.PagemapEntry{Vaddr: &start, NrPages: proto.Uint32(0), Flags: &flags}
	e.ProtoReflect().SetUnknown(protowire.AppendVarint(protowire.AppendTag(nil, 5, protowire.VarintType), pages))
	return e
}

func read(data []byte) (extents []Extent, err error) {
	p, err := OpenPagemap(bytes.NewReader(data), int64(len(data)))
	for err == nil {
		var e Extent
		if e, err = p.Next(); err == nil {
			extents = append(extents, e)
		}
	}
	if err == io.EOF {
		err = nil
	}
	return extents, err
}

func TestPagemap(t *testing.T) {
	start := proto.Uint64(0x1000)
	for name, test := range map[string]struct {
		entry proto.Message
		want  Extent
	}{
		"with flags":      {&pagemap.PagemapEntry{Vaddr: start, NrPages: proto.Uint32(3), Flags: proto.Uint32(4)}, Extent{0x1000, 3, true}},
		"lazy and stored": {&pagemap.PagemapEntry{Vaddr: start, NrPages: proto.Uint32(3), Flags: proto.Uint32(6)}, Extent{0x1000, 3, true}},
		"lazy":            {&pagemap.PagemapEntry{Vaddr: start, NrPages: proto.Uint32(3), Flags: proto.Uint32(2)}, Extent{0x1000, 3, false}},
		"before flags":    {&pagemap.PagemapEntry{Vaddr: start, NrPages: proto.Uint32(3)}, Extent{0x1000, 3, true}},
		"a parent's":      {&pagemap.PagemapEntry{Vaddr: start, NrPages: proto.Uint32(3), InParent: proto.Bool(true)}, Extent{0x1000, 3, false}},
		"CRIU 4.2":        {later(0x1000, 1<<33, 4), Extent{0x1000, 1 << 33, true}},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := read(pagemapOf(t, test.entry, test.entry))
			if err != nil || !slices.Equal(got, []Extent{test.want, test.want}) {
				t.Errorf("read %v, %v, want %v twice", got, err, test.want)
			}
		})
	}
}

func TestMappings(t *testing.T) {
	data, err := Write("MM", []*mm.MmEntry{{ExeFileId: proto.Uint32(9), Vmas: []*vma.VmaEntry{
		{Start: proto.Uint64(1), End: proto.Uint64(2)}, {Start: proto.Uint64(3), End: proto.Uint64(4)},
	}}})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	executable, err := Mappings(bytes.NewReader(data), int64(len(data)), func(v *vma.VmaEntry) error {
		got = append(got, fmt.Sprint(v.GetStart(), v.GetEnd()))
		return nil
	})
	if err != nil || executable != 9 || !slices.Equal(got, []string{"1 2", "3 4"}) {
		t.Errorf("mappings of %d are %q, %v", executable, got, err)
	}
	enough := errors.New("enough")
	if _, err := Mappings(bytes.NewReader(data), int64(len(data)), func(*vma.VmaEntry) error { return enough }); !errors.Is(err, enough) {
		t.Errorf("error is %v", err)
	}
}

func TestHostileMemoryImages(t *testing.T) {
	entry := func(data ...byte) []byte {
		return append(binary.LittleEndian.AppendUint32(pagemapOf(t), uint32(len(data))), data...)
	}
	for name, test := range map[string]struct {
		data []byte
		want string
	}{
		"no head":         {pagemapOf(t)[:8], "does not say which image"},
		"a broken tag":    {entry(0xff), "read image"},
		"a broken number": {entry(0x08, 0xff), "read image"},
		"bytes too long":  {entry(0x0a, 0x7f, 1), "read image"},
		"cut off":         {pagemapOf(t, later(1, 1, 4))[:20], "unexpected EOF"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := read(test.data); err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
		})
	}
}

func FuzzPagemap(f *testing.F) {
	f.Add(pagemapOf(f, later(0x1000, 3, 4), &pagemap.PagemapEntry{Vaddr: proto.Uint64(1), NrPages: proto.Uint32(3)}))
	f.Add(pagemapOf(f)[:9])
	f.Fuzz(func(t *testing.T, data []byte) {
		if extents, _ := read(data); len(extents) > len(data)/4 {
			t.Errorf("%d extents in %d bytes", len(extents), len(data))
		}
	})
}
