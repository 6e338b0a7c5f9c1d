package rootfs

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names with a meaning in an OCI layer:
// https://github.com/opencontainers/image-spec/blob/main/layer.md#whiteouts
const (
	whiteoutPrefix = ".wh."
	opaqueMarker   = ".wh..wh..opq"
)

// marks is what overlay has noted about an entry of its upper directory:
// https://docs.kernel.org/filesystems/overlayfs.html
type marks struct {
	opaque   bool // a directory that hides the one below
	redirect bool // a directory that was renamed: it hides the one below, and shows another
	metacopy bool // a file whose content is still below
	whiteout bool // an empty file that is a whiteout (Linux 6.7)
}

// isWhiteout tells whether this, in an upper directory, stands for something deleted.
func isWhiteout(st *unix.Stat_t) bool { return st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 }

// takeMarks takes overlay's own attributes out of e.attrs and notes what they say.
func (k *walk) takeMarks(e *entry) error {
	const trusted, user = "trusted.overlay.", "user.overlay."
	own := trusted
	if k.layer.UserXattr {
		own = user
	}
	for name, value := range e.attrs {
		mark, ok := strings.CutPrefix(name, own)
		if strings.HasPrefix(name, trusted) && (!ok || e.merged) || strings.HasPrefix(mark, "overlay.") {
			// A reader that unpacks into an upper directory would make it its own overlay's.
			return unsupported(e.path, "its attribute %s belongs to an overlay mount inside the container: keep that on a volume", name)
		}
		if !ok || e.merged {
			continue
		}
		delete(e.attrs, name)
		switch mark {
		case "opaque":
			e.marks.opaque = value == "y" // x says that there are whiteouts which are files
		case "redirect":
			e.marks.redirect = e.is(unix.S_IFDIR)
		case "metacopy":
			e.marks.metacopy = e.is(unix.S_IFREG)
		case "whiteout":
			e.marks.whiteout = e.is(unix.S_IFREG) && e.st.Size == 0
		}
	}
	if e.marks.opaque {
		e.marks.redirect = false // as overlay has it
	}
	return nil
}

// merged is the place where the layers are seen as one.
func (k *walk) merged() place { return place{int(k.layer.Merged.Fd()), true} }

// below is what the layers below mean for a directory.
type below struct {
	hides   bool  // what they have is not seen in it
	lower   []int // if so: those lower directories, by index, that have a directory of its path
	renamed bool  // what is seen in it is elsewhere in them
}

// mark notes what marks say of d.
func (d *directory) mark(m marks) {
	d.hides = m.opaque || m.redirect
	d.renamed = m.redirect
	if d.parent != nil {
		d.hides = d.hides || d.parent.hides
		d.renamed = d.renamed || d.parent.renamed && !m.opaque
	}
}

// openLower gets hold of a directory in a lower directory, -1 if it has none.
func (k *walk) openLower(i int, path string) (int, error) {
	fd, err := open(int(k.layer.Lower[i].Fd()), path, unix.O_DIRECTORY)
	if vanished(err) || errors.Is(err, unix.EXDEV) {
		return -1, nil
	}
	if err != nil {
		return -1, fmt.Errorf("open %s in a lower layer: %w", quote(path), err)
	}
	return fd, nil
}

// hidden reports what lower layers have in the directory d and is not seen in it: of the uppermost of them, then of the next, each
// sorted as far as names are held at a time.
func (k *walk) hidden(d *directory, path string, in []place) error {
	var lower []int // where there may be one
	if d.parent != nil && d.parent.hides {
		lower = d.parent.lower
	} else {
		for i := range k.layer.Lower {
			lower = append(lower, i)
		}
	}
	known := in // where a name is that needs no report, or has had one
	defer func() {
		for _, p := range known[len(in):] {
			unix.Close(p.fd)
		}
	}()
	for _, i := range lower {
		fd, err := k.openLower(i, path)
		if err != nil {
			return err
		}
		if fd < 0 {
			continue
		}
		d.lower = append(d.lower, i)
		err = k.hiddenIn(fd, path, known)
		known = append(known[:len(known):len(known)], place{fd: fd})
		if err != nil {
			return err
		}
	}
	return nil
}

// hiddenIn reports what a lower layer's directory has that is not in the known ones.
func (k *walk) hiddenIn(lower int, path string, known []place) error {
	fd, err := unix.Openat(lower, ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s in a lower layer: %w", quote(path), err)
	}
	dir := os.NewFile(uintptr(fd), quote(path))
	defer dir.Close()
	for {
		names, err := dir.Readdirnames(k.batch)
		if err != nil && err != io.EOF {
			return fmt.Errorf("read %s in a lower layer: %w", quote(path), err)
		}
		if len(names) == 0 {
			return nil
		}
		slices.Sort(names)
		for _, name := range names {
			if k.ctx.Err() != nil {
				return context.Cause(k.ctx)
			}
			at := join(path, name)
			e, err := k.find(known, name, at)
			if e != nil {
				e.close()
				continue
			}
			if err == nil {
				err = k.deleted(at)
			}
			if err != nil {
				return err
			}
		}
	}
}

// whiteout writes a deletion for e, which stands for one.
func (k *walk) whiteout(e *entry) error {
	dir, name := e.path[:len(e.path)-len(baseName(e.path))], baseName(e.path)
	if strings.HasPrefix(name, whiteoutPrefix) {
		return unsupported(e.path, "it was deleted, and a layer cannot delete names beginning with %s: build the image without it", whiteoutPrefix)
	}
	if err := k.deleted(e.path); err != nil {
		return err
	}
	return k.marker(dir + whiteoutPrefix + name)
}

// opaque writes the marker of the directory e, if it hides what is below.
func (k *walk) opaque(e *entry) error {
	if !e.marks.opaque && !e.marks.redirect {
		return nil
	}
	return k.marker(join(e.path, opaqueMarker))
}

// marker writes an empty file whose name is all that counts.
func (k *walk) marker(path string) error {
	if err := k.deleted(path); err != nil {
		return err
	}
	return k.header(&tar.Header{Typeflag: tar.TypeReg, Name: path, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}
