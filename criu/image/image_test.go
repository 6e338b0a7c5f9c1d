package image

import (
	"bytes"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"google.golang.org/protobuf/proto"
)

// FuzzRead: images come out of archives that nobody vouches for. Reading one ends, and what was read can be written.
func FuzzRead(f *testing.F) {
	data, err := Write("FILES", []*fdinfo.FileEntry{{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1)}})
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(append(bytes.Clone(data), 0xff, 0xff, 0xff, 0xff))
	f.Add(append(bytes.Clone(data), 1, 0, 0, 0, 0xff))
	f.Fuzz(func(t *testing.T, data []byte) {
		var entries []*fdinfo.FileEntry
		if err := Read(bytes.NewReader(data), int64(len(data)), "FILES", func(e *fdinfo.FileEntry) { entries = append(entries, e) }); err != nil {
			return
		}
		again, err := Write("FILES", entries)
		if err != nil {
			t.Fatal(err)
		}
		count := 0
		if err := Read(bytes.NewReader(again), int64(len(again)), "FILES", func(*fdinfo.FileEntry) { count++ }); err != nil || count != len(entries) {
			t.Errorf("%d entries were written, %d read again: %v", len(entries), count, err)
		}
	})
}
