package criu

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	remapfilepath "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"
)

// A file that is open, was deleted under the name by which it was opened and still has another, gets one more from CRIU for the length of
// the dump: link_remap.N, in the same directory or, where that is gone, in the one above. A restore opens it by that name and then
// removes it. So the name must be in what is restored: PostDump has to find it where it looks.

// checkLinks fails if CRIU has put such a name where its caller does not take it from: in a volume.
func (d Dump) checkLinks() error {
	links := make(map[uint32]uint32) // from the added name to the deleted one, by the ids that CRIU gives to files
	err := d.readImage("remap-fpath.img", func(file io.Reader) error {
		message := func() *remapfilepath.RemapFilePathEntry { return &remapfilepath.RemapFilePathEntry{} }
		return readImage(file, message, func(entry *remapfilepath.RemapFilePathEntry) {
			if entry.GetRemapType() == remapfilepath.RemapType_LINKED {
				links[entry.GetRemapId()] = entry.GetOrigId()
			}
		})
	})
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil || len(links) == 0 {
		return err
	}
	paths := make(map[uint32]string)
	err = d.readImage("files.img", func(file io.Reader) error {
		return readImage(file, func() *fdinfo.FileEntry { return &fdinfo.FileEntry{} }, func(entry *fdinfo.FileEntry) {
			if name := entry.GetReg().GetName(); name != "" {
				paths[entry.GetId()] = filepath.Join("/", name)
			}
		})
	})
	if err != nil {
		return err
	}
	for added, deleted := range links {
		volume := d.Container.mountOf(paths[added])
		if volume == "" || slices.Contains(d.Captured, volume) {
			continue
		}
		at := place{fd: -1, path: paths[deleted]}
		d.Container.findDescriptor(&at, func(link string) bool { return link == at.path+" (deleted)" })
		return &Error{
			Limit: limit(volumeLinkName), Place: d.Container.describe(at),
			Cause: "a deleted file that has another name, in the volume at " + volume,
		}
	}
	return nil
}

func (d Dump) readImage(name string, read func(io.Reader) error) error {
	file, err := os.Open(filepath.Join(descriptorPath(d.Images), name))
	if err != nil {
		return err
	}
	defer file.Close()
	if err := read(file); err != nil {
		return fmt.Errorf("read %s: %w", name, err)
	}
	return nil
}

// mountOf returns the external mount that a path of the container is in, empty if it is in none.
func (c Container) mountOf(path string) string {
	mount := ""
	for _, m := range c.ExternalMounts {
		if len(m) > len(mount) && strings.HasPrefix(path, m+"/") {
			mount = m
		}
	}
	return mount
}
