package rootfs

import (
	"bytes"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// A file that goes on being written to through a mapping keeps its ctime (on a tmpfs always). However it is named, it is copied again.
func TestMappedFiles(t *testing.T) {
	for _, test := range []struct{ name, lower, after string }{
		{"new", "", ""},
		{"copied up", "echo of the image >f; truncate -s 4096 f", ""},
		{"renamed", "", "mv f g"},
		{"copied up and renamed", "truncate -s 4096 f", "mkdir d; mv f d/g"},
		{"deleted with another name left", "", "ln f a; rm f"},
		{"copied up and deleted with another name left", "truncate -s 4096 f", "ln f a; rm f"},
		{"mapped to be read by now", "", ""},
	} {
		t.Run(test.name, func(t *testing.T) {
			o := newOverlay(t)
			sh(t, o.lower, test.lower)
			o.mount(t, "")
			f, err := os.OpenFile(o.merged+"/f", os.O_RDWR|os.O_CREATE, 0o600)
			must(t, err)
			defer f.Close()
			must(t, f.Truncate(4096))
			m, err := unix.Mmap(int(f.Fd()), 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
			must(t, err)
			defer unix.Munmap(m)
			copy(m, "before")
			sh(t, o.merged, test.after)
			if test.name == "mapped to be read by now" {
				must(t, unix.Mprotect(m, unix.PROT_READ))
			}
			sameAsOnePass(t, o, func() {
				must(t, unix.Mprotect(m, unix.PROT_READ|unix.PROT_WRITE))
				copy(m, "after ")
			})
			layer, _, err := o.diff(t)
			must(t, err)
			if !bytes.Contains(layer, []byte("after ")) {
				t.Error("what was written through the mapping is not in the file")
			}
		})
	}
}
