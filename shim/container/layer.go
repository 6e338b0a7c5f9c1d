package container

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// Layer is the writable layer of an overlay mount, as its mount options have it.
type Layer struct {
	// Upper is the upper directory.
	Upper string
	// Lower are the lower directories, those for data alone left out. It is empty where the options do not tell them in a way
	// that can be followed.
	Lower []string
	// UserXattr is the option of that name: overlay's notes are in user.overlay.* attributes.
	UserXattr bool
}

// describeLayer finds the writable layer. table is the container's own mount table, in which it can put what it wants, even
// at /; so the mount is looked up at Rootfs in this process's table, and must only be somewhere in the container's.
func (c *Container) describeLayer(table []*mountinfo.Info, snapshotter string) error {
	root, isRoot, err := mountAt(c.Rootfs)
	if err != nil {
		return fmt.Errorf("find root file system: %w", err)
	}
	if root.FSType != "overlay" || root.Root != "/" || !isRoot {
		what := "a mount of " + root.FSType
		if root.Root != "/" || !isRoot {
			what = "a directory on " + root.FSType
		}
		if snapshotter != "" {
			what += ", of the snapshotter " + snapshotter
		}
		return fmt.Errorf("%w: its root file system at %s is %s, and only on an overlay mount can its changes be told from the image: "+
			"let the runtime use overlayfs, and crishim see the runtime's mounts", ErrUnsupported, c.Rootfs, what)
	}
	if !slices.ContainsFunc(table, func(m *mountinfo.Info) bool { return m.Major == root.Major && m.Minor == root.Minor }) {
		return fmt.Errorf("%w: its root file system, mounted at %s, is not mounted in the container: has it changed its root?", ErrUnsupported, c.Rootfs)
	}
	layer, err := overlayLayer(root.VFSOptions, c.Rootfs)
	if err != nil {
		return fmt.Errorf("find writable layer of %s: %w", c.Rootfs, err)
	}
	c.Layer = layer
	return nil
}

// mountAt returns the mount that path is on, as this process sees it, and whether path is its root.
func mountAt(path string) (mount *mountinfo.Info, isRoot bool, err error) {
	var stat unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_MNT_ID, &stat); err != nil {
		return nil, false, fmt.Errorf("look at %s: %w", path, err)
	}
	if stat.Mask&unix.STATX_MNT_ID == 0 {
		return nil, false, errors.New("the kernel does not tell which mount a directory is on: Linux 5.8 is needed")
	}
	found, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		found := m.ID == int(stat.Mnt_id)
		return !found, found
	})
	if err != nil {
		return nil, false, fmt.Errorf("read own mount table: %w", err)
	}
	if len(found) == 0 {
		return nil, false, fmt.Errorf("%s is on a mount that has just gone: try again", path)
	}
	return found[0], stat.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// overlayLayer reads the options of an overlay mount whose root is at merged. It returns nil if nothing can be written to it.
func overlayLayer(options, merged string) (*Layer, error) {
	layer := &Layer{}
	for option := range strings.SplitSeq(options, ",") {
		key, value, _ := strings.Cut(option, "=")
		value = unescape(value)
		switch key {
		case "upperdir":
			layer.Upper = value
		case "lowerdir":
			layer.Lower = splitLower(value)
		case "lowerdir+": // one for each (Linux 6.7)
			layer.Lower = append(layer.Lower, value)
		case "userxattr":
			layer.UserXattr = true
		}
	}
	if layer.Upper == "" {
		return nil, nil
	}
	upper := absolute([]string{layer.Upper}, merged)
	if upper == nil {
		return nil, fmt.Errorf("its upper directory %s is not seen from here: crishim must see the runtime's own directories", layer.Upper)
	}
	layer.Upper = upper[0]
	if same, err := isUpper(layer.Upper, merged); err != nil || !same {
		return nil, errors.Join(err, fmt.Errorf("what is at %s is not its upper directory: crishim must see the runtime's own directories", layer.Upper))
	}
	layer.Lower = absolute(layer.Lower, merged, layer.Upper)
	return layer, nil
}

// unescape undoes what the kernel does to characters that would break a line of a mount table: a backslash and three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+4 <= len(s) {
			if c, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(c))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// splitLower splits the value of lowerdir at colons; a backslash takes a character's meaning. Directories behind two colons
// have data alone, and no names.
func splitLower(value string) (dirs []string) {
	var dir strings.Builder
	for i := 0; i < len(value); i++ {
		switch {
		case value[i] == '\\' && i+1 < len(value):
			i++
			dir.WriteByte(value[i])
		case value[i] != ':':
			dir.WriteByte(value[i])
		case strings.HasPrefix(value[i+1:], ":"):
			return append(dirs, dir.String())
		default:
			dirs = append(dirs, dir.String())
			dir.Reset()
		}
	}
	return append(dirs, dir.String())
}

// absolute finds directories that may be relative, or returns nil. The options of a mount have to fit into a page, so runtimes
// shorten them by mounting from a directory common to all layers: one above the mount (Docker, podman), or above the upper
// directory (containerd).
func absolute(dirs []string, below ...string) []string {
	bases := []string{"/"}
	for _, path := range below {
		for ; path != "/" && path != "."; path = filepath.Dir(path) {
			bases = append(bases, filepath.Dir(path))
		}
	}
	for _, base := range bases {
		var found []string
		for _, dir := range dirs {
			if !filepath.IsAbs(dir) {
				dir = filepath.Join(base, dir)
			}
			var st unix.Stat_t
			if unix.Stat(dir, &st) != nil || st.Mode&unix.S_IFMT != unix.S_IFDIR {
				break
			}
			found = append(found, dir)
		}
		if len(found) == len(dirs) {
			return found
		}
	}
	return nil
}

// isUpper says whether upper is the upper directory of the overlay mounted at merged: the times of the mount's root are those of its
// upper directory.
func isUpper(upper, merged string) (bool, error) {
	// The container may write to its root between one look and the next.
	for range 100 {
		var a, b unix.Stat_t
		if err := errors.Join(unix.Stat(upper, &a), unix.Stat(merged, &b)); err != nil {
			return false, err
		}
		if a.Mtim == b.Mtim && a.Ctim == b.Ctim && a.Mode == b.Mode {
			return true, nil
		}
	}
	return false, nil
}
