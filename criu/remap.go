package criu

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	remapfilepath "github.com/checkpoint-restore/go-criu/v7/crit/images/remap-file-path"

	"crishim/criu/image"
)

// A file that is open, was deleted under the name by which it was opened and still has another, gets one more from CRIU for the length of
// the dump: link_remap.N, in the same directory or, where that is gone, in the one above. A restore opens it by that name and then
// removes it. So the name must be in what is restored: PostDump has to find it where it looks.

// checkLinks says whether CRIU has added such names, and fails if it has put one where its caller does not take it from: in a volume.
func (d Dump) checkLinks() (added bool, err error) {
	links := make(map[uint32]uint32) // from the added name to the deleted one, by the ids that CRIU gives to files
	err = readImage(d, "remap-fpath.img", "REMAP_FPATH", func(entry *remapfilepath.RemapFilePathEntry) {
		if entry.GetRemapType() == remapfilepath.RemapType_LINKED {
			links[entry.GetRemapId()] = entry.GetOrigId()
		}
	})
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil || len(links) == 0 {
		return false, err
	}
	paths := make(map[uint32]string)
	err = readImage(d, "files.img", "FILES", func(entry *fdinfo.FileEntry) {
		if name := entry.GetReg().GetName(); name != "" {
			paths[entry.GetId()] = filepath.Join("/", name)
		}
	})
	if err != nil {
		return false, err
	}
	for name, deleted := range links {
		volume := d.Container.mountOf(paths[name])
		if volume == "" || slices.Contains(d.Captured, volume) {
			continue
		}
		at := place{fd: -1, path: paths[deleted]}
		d.Container.findDescriptor(&at, func(link string) bool { return link == at.path+" (deleted)" })
		return false, &Error{
			Limit: limit(volumeLinkName), Place: d.Container.describe(at),
			Cause: "a deleted file that has another name, in the volume at " + volume,
		}
	}
	return true, nil
}

func readImage[T any, E image.Entry[T]](d Dump, name, kind string, use func(E)) error {
	file, err := os.Open(filepath.Join(descriptorPath(d.Images), name))
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if err := image.Read(file, info.Size(), kind, use); err != nil {
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
