package container

import (
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

func TestUnescape(t *testing.T) {
	for text, want := range map[string]string{
		"":                      "",
		"/plain":                "/plain",
		`/a\040b\054c\134d\012`: "/a b,c\\d\n",
		`/end\04`:               `/end\04`,
		`/not\9\777\`:           `/not\9\777\`,
	} {
		if got := unescape(text); got != want {
			t.Errorf("unescape(%q) = %q, want %q", text, got, want)
		}
	}
}

func TestSplitLower(t *testing.T) {
	for value, want := range map[string][]string{
		"/a":            {"/a"},
		"/a:/b:/c":      {"/a", "/b", "/c"},
		"1/fs:2/fs":     {"1/fs", "2/fs"},
		`/a\:b:/c\\:/d`: {"/a:b", `/c\`, "/d"},
		"/a:/b::/data":  {"/a", "/b"},
	} {
		if got := splitLower(value); !slices.Equal(got, want) {
			t.Errorf("splitLower(%q) = %q, want %q", value, got, want)
		}
	}
}

// layers is a directory with what an overlay is made from; the rest is done by scripts, in it.
func layers(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts an overlay")
	}
	dir := t.TempDir()
	mount(t, "tmpfs", dir, "size=16m")
	script(t, dir, `mkdir -p l id/diff id/work id/merged a:b 'c d' fs/1/fs fs/2/fs fs/9/fs fs/9/work merged`)
	return dir
}

func mount(t *testing.T, kind, dir, options string) {
	t.Helper()
	if err := unix.Mount(kind, dir, kind, 0, options); err != nil {
		t.Fatalf("mount %s with %q: %v", kind, options, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func script(t *testing.T, dir, text string) {
	t.Helper()
	cmd := exec.Command("sh", "-euc", text)
	cmd.Dir = dir
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v: %s", text, err, out)
	}
}

// describeLayer describes what is mounted at merged, for a container that has the same mounts as this process.
func describeLayer(t *testing.T, merged string) (*Layer, error) {
	t.Helper()
	table, err := mountinfo.GetMounts(nil)
	if err != nil {
		t.Fatal(err)
	}
	c := &Container{Rootfs: merged}
	err = c.describeLayer(table, "some")
	return c.Layer, err
}

func TestDescribeLayer(t *testing.T) {
	for _, test := range []struct {
		name, merged, mount string
		upper               string
		lower               []string
		userXattr           bool
	}{
		{"containerd", "merged", "mount -t overlay o -o lowerdir=$PWD/fs/2/fs:$PWD/fs/1/fs,upperdir=$PWD/fs/9/fs,workdir=$PWD/fs/9/work merged",
			"fs/9/fs", []string{"fs/2/fs", "fs/1/fs"}, false},
		{"containerd with many layers", "merged", "top=$PWD; cd fs; mount -t overlay o -o lowerdir=2/fs:1/fs,upperdir=$PWD/9/fs,workdir=$PWD/9/work $top/merged",
			"fs/9/fs", []string{"fs/2/fs", "fs/1/fs"}, false},
		{"docker", "id/merged", "ln -s ../fs/1/fs l/X; ln -s ../fs/2/fs l/Y; mount -t overlay o -o lowerdir=$PWD/l/X:$PWD/l/Y,upperdir=$PWD/id/diff,workdir=$PWD/id/work id/merged",
			"id/diff", []string{"l/X", "l/Y"}, false},
		{"docker with many layers", "id/merged", "ln -s ../fs/1/fs l/X; ln -s ../fs/2/fs l/Y; mount -t overlay o -o lowerdir=l/X:l/Y,upperdir=id/diff,workdir=id/work id/merged",
			"id/diff", []string{"l/X", "l/Y"}, false},
		{"odd paths", "merged", `mount -t overlay o -o 'lowerdir=a\:b:c d,upperdir=id/diff,workdir=id/work' merged`, "id/diff", []string{"a:b", "c d"}, false},
		{"lower directories that are gone", "merged", "mkdir gone; mount -t overlay o -o lowerdir=$PWD/gone:$PWD/l,upperdir=$PWD/id/diff,workdir=$PWD/id/work merged; rmdir gone",
			"id/diff", nil, false},
		{"user attributes", "merged", "mount -t overlay o -o userxattr,lowerdir=l,upperdir=id/diff,workdir=id/work merged", "id/diff", []string{"l"}, true},
		{"nothing to write to", "merged", "mount -t overlay o -o lowerdir=l:id merged", "", nil, false},
		{"mounted over something", "merged", "mount -t tmpfs t merged; mount -t overlay o -o lowerdir=l,upperdir=id/diff,workdir=id/work merged", "id/diff", []string{"l"}, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := layers(t)
			script(t, dir, test.mount)
			layer, err := describeLayer(t, filepath.Join(dir, test.merged))
			if err != nil {
				t.Fatal(err)
			}
			if test.upper == "" {
				if layer != nil {
					t.Errorf("got %+v, want none", layer)
				}
				return
			}
			var lower []string
			for _, l := range test.lower {
				lower = append(lower, filepath.Join(dir, l))
			}
			if layer.Upper != filepath.Join(dir, test.upper) || !slices.Equal(layer.Lower, lower) || layer.UserXattr != test.userXattr {
				t.Errorf("got %+v, want %s, %q, %t", layer, test.upper, lower, test.userXattr)
			}
		})
	}
}

// Linux 6.7 has an option for each lower directory, in the new mount API alone.
func TestDescribeLayerOfTheNewMountAPI(t *testing.T) {
	dir := layers(t)
	fs, err := unix.Fsopen("overlay", unix.FSOPEN_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fs)
	for _, option := range [][2]string{
		{"lowerdir+", dir + "/fs/1/fs"}, {"lowerdir+", dir + "/fs/2/fs"}, {"upperdir", dir + "/id/diff"}, {"workdir", dir + "/id/work"},
	} {
		if err := unix.FsconfigSetString(fs, option[0], option[1]); err != nil {
			t.Fatalf("%s: %v", option, err)
		}
	}
	if err := unix.FsconfigCreate(fs); err != nil {
		t.Fatal(err)
	}
	tree, err := unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(tree)
	if err := unix.MoveMount(tree, "", unix.AT_FDCWD, dir+"/merged", unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		t.Fatal(err)
	}
	layer, err := describeLayer(t, dir+"/merged")
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{dir + "/fs/1/fs", dir + "/fs/2/fs"}; !slices.Equal(layer.Lower, want) {
		t.Errorf("lower directories are %q, want %q", layer.Lower, want)
	}
}

func TestDescribeLayerErrors(t *testing.T) {
	for _, test := range []struct {
		name, mount, want string
		is                error
	}{
		{"another file system", "mount -t tmpfs t merged", "is a mount of tmpfs, of the snapshotter some", ErrUnsupported},
		{"a bind mount, as of the native snapshotter", "mount --bind fs/1/fs merged", "is a directory on tmpfs, of the snapshotter some", ErrUnsupported},
		{"no mount", "true", "is a directory on tmpfs", ErrUnsupported},
		{"a directory of an overlay", "mount -t overlay o -o lowerdir=l,upperdir=id/diff,workdir=id/work id/merged; mkdir id/merged/x; mount --bind id/merged/x merged",
			"is a directory on overlay", ErrUnsupported},
		{"upper directory is gone", "mount -t overlay o -o lowerdir=$PWD/l,upperdir=$PWD/id/diff,workdir=$PWD/id/work merged; mv id other", "is not seen from here", nil},
		{"upper directory is another", "mount -t overlay o -o lowerdir=$PWD/l,upperdir=$PWD/id/diff,workdir=$PWD/id/work merged; mount -t tmpfs t id", "is not seen from here", nil},
		{"upper directory is covered", "mount -t overlay o -o lowerdir=$PWD/l,upperdir=$PWD/id/diff,workdir=$PWD/id/work merged; mount -t tmpfs t id/diff", "is not its upper directory", nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := layers(t)
			script(t, dir, test.mount)
			layer, err := describeLayer(t, dir+"/merged")
			checkError(t, err, test.want, test.is)
			if layer != nil {
				t.Errorf("got %+v", layer)
			}
		})
	}
	_, err := describeLayer(t, "/does/not/exist")
	checkError(t, err, "/does/not/exist", nil)
}

// A container may mount what it wants over its root; it must only have the real one somewhere.
func TestDescribeLayerOfAContainerWithAnotherRoot(t *testing.T) {
	dir := layers(t)
	script(t, dir, "mount -t overlay o -o lowerdir=l,upperdir=id/diff,workdir=id/work merged")
	root, _, err := mountAt(dir + "/merged")
	if err != nil {
		t.Fatal(err)
	}
	forged := &mountinfo.Info{Mountpoint: "/", FSType: "overlay", Root: "/", Minor: root.Minor + 1, VFSOptions: "rw,lowerdir=/l,upperdir=/etc"}
	c := &Container{Rootfs: dir + "/merged"}
	if err := c.describeLayer([]*mountinfo.Info{root, forged}, ""); err != nil || c.Layer.Upper != dir+"/id/diff" {
		t.Errorf("layer is %+v, %v", c.Layer, err)
	}
	err = c.describeLayer([]*mountinfo.Info{forged}, "")
	checkError(t, err, "is not mounted in the container", ErrUnsupported)
}

// The container writes to its root all the time.
func TestIsUpperOfABusyRoot(t *testing.T) {
	dir := layers(t)
	script(t, dir, "mount -t overlay o -o lowerdir=l,upperdir=id/diff,workdir=id/work merged")
	done := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-done:
				return
			default:
				_ = os.WriteFile(dir+"/merged/f", nil, 0o600)
				_ = os.Remove(dir + "/merged/f")
			}
		}
	}()
	for range 200 {
		if same, err := isUpper(dir+"/id/diff", dir+"/merged"); err != nil || !same {
			t.Errorf("isUpper = %t, %v", same, err)
			break
		}
	}
	close(done)
	<-stopped
	// All of it may have been made within one tick of the clock that files get their times from.
	if err := os.Chtimes(dir+"/l", time.Time{}, time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	if same, err := isUpper(dir+"/l", dir+"/merged"); err != nil || same {
		t.Errorf("isUpper of a lower directory = %t, %v", same, err)
	}
}
