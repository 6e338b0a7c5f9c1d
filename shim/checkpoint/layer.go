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

// rootfs captures what the container has changed of its root file system.
func (c *capture) rootfs(ctx context.Context) error {
	return c.member(archive.DeletedFiles, func(w io.Writer) error {
		deleted := &stringArray{w: bufio.NewWriter(w)}
		if l := c.container.GetLayer(); l != nil {
			layer, err := openLayer(l, c.container.GetRootfs())
			defer closeLayer(layer)
			if err != nil {
				return err
			}
			err = c.member(archive.RootfsDiff, func(w io.Writer) error { return rootfs.Diff(ctx, w, layer, deleted.add) })
			if err != nil {
				return err
			}
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
		f.Close() // which is nothing for one that was not opened
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
