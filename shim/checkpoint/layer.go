package checkpoint

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"unicode/utf8"

	"golang.org/x/sys/unix"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/rootfs"
)

// layer is the container's writable layer while it is captured. It is nil where there is none.
type layer struct {
	dirs    rootfs.Layer // open until all is taken of it, and no longer: a runtime cannot unmount what somebody has open
	scratch []*os.File
	copy    *rootfs.Copy
}

// begin copies what is at rest in the writable layer, while the container runs.
func (c *capture) begin(ctx context.Context) error {
	described := c.container.GetLayer()
	if described == nil {
		return nil
	}
	c.layer = &layer{}
	var err error
	if c.layer.dirs, err = openLayer(described, c.container.GetRootfs()); err != nil {
		return err
	}
	var scratch [4]*os.File
	for i := range scratch {
		if scratch[i], err = c.staging.Scratch(); err != nil {
			return err
		}
		c.layer.scratch = append(c.layer.scratch, scratch[i])
	}
	c.layer.copy = rootfs.NewCopy(c.layer.dirs, criuContainer(c.container).Processes, scratch)
	return c.layer.copy.Begin(ctx)
}

// close closes what begin has opened. Members that rootfs has composed are to be read before.
func (l *layer) close() {
	if l == nil {
		return
	}
	closeLayer(l.dirs)
	for _, f := range l.scratch {
		f.Close()
	}
}

// rootfs captures what the container has changed of its root file system.
func (c *capture) rootfs(ctx context.Context) error {
	return c.member(archive.DeletedFiles, func(w io.Writer) error {
		deleted := &stringArray{w: bufio.NewWriter(w)}
		if c.layer != nil {
			pieces, err := c.layer.copy.Finish(ctx, deleted.add)
			if err != nil {
				return err
			}
			segments := make([]archive.Segment, len(pieces))
			for i, p := range pieces {
				segments[i] = archive.Segment(p)
			}
			if err := c.staging.Compose(archive.RootfsDiff, segments); err != nil {
				return err
			}
			closeLayer(c.layer.dirs)
		}
		return deleted.end()
	})
}

// openLayer opens the directories of a layer that is mounted at merged. The caller closes it, even if there is an error.
func openLayer(l *crishimv1.Layer, merged string) (layer rootfs.Layer, err error) {
	layer.UserXattr = l.GetUserXattr()
	if layer.Upper, err = os.OpenFile(l.GetUpper(), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0); err != nil {
		return layer, err
	}
	if layer.Merged, err = os.OpenFile(merged, unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		return layer, err
	}
	for _, path := range l.GetLower() {
		lower, err := os.OpenFile(path, unix.O_PATH|unix.O_DIRECTORY, 0)
		if err != nil {
			return layer, err
		}
		layer.Lower = append(layer.Lower, lower)
	}
	return layer, nil
}

func closeLayer(l rootfs.Layer) {
	for _, f := range append(l.Lower, l.Upper, l.Merged) {
		f.Close() // which is nothing for one that was not opened, or is closed
	}
}

// stringArray writes a JSON array of strings, one by one: there may be millions.
type stringArray struct {
	w     *bufio.Writer
	count int
}

// add leaves out what is not UTF-8: JSON would make another path of it, which may be that of another file.
func (a *stringArray) add(s string) error {
	if !utf8.ValidString(s) {
		return nil
	}
	element, err := json.Marshal(s)
	if err != nil {
		return err
	}
	before := ","
	if a.count == 0 {
		before = "["
	}
	a.count++
	_, err = fmt.Fprintf(a.w, "%s%s", before, element)
	return err
}

func (a *stringArray) end() error {
	if a.count == 0 {
		a.w.WriteString("[")
	}
	a.w.WriteString("]")
	return a.w.Flush()
}
