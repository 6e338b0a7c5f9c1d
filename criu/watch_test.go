package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

func TestParseWatch(t *testing.T) {
	for line, want := range map[string]struct {
		device uint32
		inode  uint64
		ok     bool
	}{
		"inotify wd:1 ino:9e7e sdev:800013 mask:800afce ignored_mask:0 fhandle-bytes:8 fhandle-type:1 f_handle:7e9e0000640d1b6c":     {0x800013, 0x9e7e, true},
		"fanotify ino:4f969 sdev:2a mflags:0 mask:3b ignored_mask:40000000 fhandle-bytes:8 fhandle-type:1 f_handle:69f90400c275b5b4": {0x2a, 0x4f969, true},
		"fanotify mnt_id:12 mflags:40 mask:38 ignored_mask:40000003":                                                                 {0, 0, false},
		"fanotify flags:10 event-flags:0": {0, 0, false},
		"pos:	0":                          {0, 0, false},
		"":                                {0, 0, false},
	} {
		device, inode, ok := parseWatch(line)
		if ok != want.ok || ok && (device != want.device || inode != want.inode) {
			t.Errorf("parseWatch(%q) = %x, %x, %t; want %+v", line, device, inode, ok, want)
		}
	}
}

// What this process watches, in a directory that is taken for its root.
func TestWatchedPaths(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{"etc/app/conf.d", "etc/other", "var"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	// What a container could do to have a look outside.
	if err := os.Symlink("/", filepath.Join(root, "etc/outside")); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.InotifyInit()
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	for _, dir := range []string{"", "etc/app/conf.d", "var"} {
		if _, err := unix.InotifyAddWatch(fd, filepath.Join(root, dir), unix.IN_CREATE); err != nil {
			t.Fatal(err)
		}
	}
	c := Container{Pid: os.Getpid(), Rootfs: root}
	entries, err := c.watchedPaths(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var paths []string
	for _, entry := range entries {
		paths = append(paths, entry.GetPath())
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(root, entry.GetPath()), &st); err != nil || st.Ino != entry.GetInode() || kernelDevice(st.Dev) != entry.GetDev() {
			t.Errorf("%s is not inode %d of device %x: %v", entry.GetPath(), entry.GetInode(), entry.GetDev(), err)
		}
	}
	slices.Sort(paths)
	if want := []string{"/.", "/etc/app/conf.d", "/var"}; !slices.Equal(paths, want) {
		t.Errorf("watched are %q, want %q", paths, want)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.watchedPaths(ended); !errors.Is(err, context.Canceled) {
		t.Errorf("with a context that has ended: %v", err)
	}
}
