package rootfs

import "testing"

// FuzzIndex: whatever a disk gives back for the index, it is parsed or refused.
func FuzzIndex(f *testing.F) {
	r := record{kind: dirRecord, name: []byte("d"), depth: 1, piece: piece{1, 2, 3}}
	leaf := record{kind: leafRecord, name: []byte("name")}
	f.Add(leaf.appendTo(r.appendTo([]byte{1, 'p'})))
	f.Add([]byte{0, byte(subRecord), 200})
	f.Fuzz(func(t *testing.T, data []byte) {
		path, records, err := parseChunk(data, nil)
		if err == nil && len(path)+len(records) > len(data) {
			t.Errorf("%d records of %d bytes", len(records), len(data))
		}
	})
}

// FuzzMapping: a line of /proc/PID/maps ends with a path of the container's.
func FuzzMapping(f *testing.F) {
	f.Add("7f0000000000-7f0000001000 rw-s 00000000 fe:00 1234    /path\n")
	f.Add("7f0000000000-7f0000001000 rw-p 00000000 00:00 0\n")
	f.Fuzz(func(t *testing.T, line string) {
		if _, addresses, shared, ok := parseMapping([]byte(line)); ok && !shared && addresses != [2]uint64{} {
			t.Errorf("%q is at %x and not shared", line, addresses)
		}
	})
}
