package rootfs

import (
	"archive/tar"
	"fmt"
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
	opaque    bool // a directory that hides the one below
	whiteouts bool // a directory that has whiteouts in attribute form (Linux 6.7)
	whiteout  bool // such a whiteout
}

// takeMarks takes overlay's own attributes out of attrs and returns what they
// say. Those that make an entry less than it seems are errors.
func takeMarks(attrs map[string]string) (m marks, err error) {
	for name, value := range attrs {
		mark, trusted := strings.CutPrefix(name, "trusted.overlay.")
		if !trusted {
			var user bool
			if mark, user = strings.CutPrefix(name, "user.overlay."); !user {
				continue
			}
		}
		delete(attrs, name)
		switch {
		case mark == "redirect":
			return m, fmt.Errorf("%s: it was renamed, and its content is in a lower layer: mount the layers with redirect_dir=off", name)
		case mark == "metacopy":
			return m, fmt.Errorf("%s: only its attributes were changed, and its content is in a lower layer: mount the layers with metacopy=off", name)
		case strings.HasPrefix(mark, "overlay."):
			return m, fmt.Errorf("%s: it belongs to an overlay mount inside the container: keep that on a volume", name)
		case !trusted && (mark == "opaque" || mark == "whiteout"):
			// Meant by overlay only with the option userxattr, and forged by any user without.
			return m, fmt.Errorf("%s: overlay mounts with userxattr are not supported: mount the layers as root, or remove the attribute in the container", name)
		case mark == "opaque":
			m.opaque = value == "y"
			m.whiteouts = value == "x"
		case mark == "whiteout":
			m.whiteout = true
		}
	}
	return m, nil
}

// whiteout writes e, found in the directory parent, if it stands for a deleted
// name, and reports whether it does.
func (k *walk) whiteout(parent, e *entry) (done bool, err error) {
	device := e.is(unix.S_IFCHR) && e.st.Rdev == 0
	if e.marks.whiteout && (!parent.marks.whiteouts || !e.is(unix.S_IFREG) || e.st.Size != 0) {
		return false, fmt.Errorf("read layer entry %s: it has the attribute of a whiteout, but is none", quote(e.path))
	}
	if !device && !e.marks.whiteout {
		return false, nil
	}
	dir, name := e.path[:len(e.path)-len(baseName(e.path))], baseName(e.path)
	if strings.HasPrefix(name, whiteoutPrefix) {
		return false, fmt.Errorf("write whiteout of %s: a layer cannot delete names beginning with %s", quote(e.path), whiteoutPrefix)
	}
	k.deleted = append(k.deleted, e.path, dir+whiteoutPrefix+name)
	return true, k.marker(dir + whiteoutPrefix + name)
}

// opaque writes the marker of the directory e, if it is opaque.
func (k *walk) opaque(e *entry) error {
	if !e.marks.opaque {
		return nil
	}
	path := opaqueMarker
	if e.path != "" {
		path = e.path + "/" + opaqueMarker
	}
	k.deleted = append(k.deleted, path)
	return k.marker(path)
}

// marker writes an empty file whose name is all that counts.
func (k *walk) marker(path string) error {
	return k.header(&tar.Header{Typeflag: tar.TypeReg, Name: path, ModTime: time.Unix(0, 0), Format: tar.FormatPAX})
}
