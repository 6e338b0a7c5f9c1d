package main

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// made returns a kind that makes something of a new directory, and whose state is the tree there.
func made(fill func(dir, argument string) error) kind {
	return func(argument string) (func() (string, error), error) {
		// Kinds and arguments do not meet.
		dir, err := os.MkdirTemp("/", "made-")
		if err != nil {
			return nil, err
		}
		if err := fill(dir, argument); err != nil {
			return nil, err
		}
		return tree(dir)
	}
}

// changes are those to the image's files: changed, deleted, renamed and replaced, each by what it was not.
func changes(string) (func() (string, error), error) {
	const dir = "/lower/"
	file, err := os.OpenFile(dir+"changed", os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return nil, err
	}
	_, err = file.WriteString("more\n")
	err = errors.Join(err, file.Close(),
		os.Remove(dir+"deleted"),
		os.Rename(dir+"renamed", dir+"has another name"),
		os.Chmod(dir+"owned", 0o700), os.Chown(dir+"owned", 12, 34),
		os.RemoveAll(dir+"removed"),
		// An opaque directory.
		os.RemoveAll(dir+"replaced"), os.Mkdir(dir+"replaced", 0o750), os.WriteFile(dir+"replaced/new", []byte("new\n"), 0o600),
		os.Remove(dir+"to-directory"), os.Mkdir(dir+"to-directory", 0o755), os.WriteFile(dir+"to-directory/file", nil, 0o644),
		os.RemoveAll(dir+"to-file"), os.WriteFile(dir+"to-file", []byte("file\n"), 0o644),
		os.Remove(dir+"link"), os.Symlink("elsewhere", dir+"link"),
		// Below what an image has, and a directory that is only there because of its attributes.
		os.Chmod("/tmp", 0o700), os.Mkdir("/etc/new", 0o711))
	if err != nil {
		return nil, err
	}
	return tree("/")
}

// special are device nodes, a FIFO and links.
func special(dir, _ string) error {
	const charDevice, blockDevice = syscall.S_IFCHR, syscall.S_IFBLK
	file := filepath.Join(dir, "file")
	return errors.Join(
		syscall.Mknod(filepath.Join(dir, "null"), charDevice|0o666, 1<<8|3),
		syscall.Mknod(filepath.Join(dir, "loop"), blockDevice|0o640, 7<<8|5),
		syscall.Mkfifo(filepath.Join(dir, "fifo"), 0o620),
		os.WriteFile(file, []byte("one file\n"), 0o600),
		os.Link(file, filepath.Join(dir, "same file")), os.Mkdir(filepath.Join(dir, "d"), 0o755), os.Link(file, filepath.Join(dir, "d", "same file")),
		os.Link(filepath.Join(dir, "fifo"), filepath.Join(dir, "same fifo")),
		os.Symlink("file", filepath.Join(dir, "link")), os.Symlink("/no\nwhere", filepath.Join(dir, "dangling")),
		os.Lchown(filepath.Join(dir, "link"), 7, 8),
	)
}

// sparse are files with more gaps than data: between data, at the end, and nothing but a gap.
func sparse(dir, _ string) error {
	for name, offsets := range map[string][]int64{
		"between": {0, 5 << 20, 64<<20 - 100}, "end": {1 << 20}, "gap": nil, "odd": {12345, 10<<20 + 17},
	} {
		file, err := os.OpenFile(filepath.Join(dir, name), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		for _, offset := range offsets {
			_, writeErr := file.WriteAt([]byte(strings.Repeat("data", 25)), offset)
			err = errors.Join(err, writeErr)
		}
		if err := errors.Join(err, file.Truncate(64<<20), file.Close()); err != nil {
			return err
		}
	}
	return nil
}

// attributes are extended ones: a user's, file capabilities, an access control list.
func attributes(dir, _ string) error {
	file := filepath.Join(dir, "file")
	if err := errors.Join(os.WriteFile(file, []byte("has attributes\n"), 0o755), os.Mkdir(filepath.Join(dir, "dir"), 0o755)); err != nil {
		return err
	}
	capabilities := make([]byte, 20) // struct vfs_cap_data
	binary.LittleEndian.PutUint32(capabilities, 0x02000001)
	binary.LittleEndian.PutUint32(capabilities[4:], 1<<10) // CAP_NET_BIND_SERVICE
	var acl bytes.Buffer
	binary.Write(&acl, binary.LittleEndian, uint32(2))
	for _, entry := range [][3]uint32{{1, 7, ^uint32(0)}, {2, 4, 1234}, {4, 5, ^uint32(0)}, {16, 5, ^uint32(0)}, {32, 5, ^uint32(0)}} {
		binary.Write(&acl, binary.LittleEndian, [2]uint16{uint16(entry[0]), uint16(entry[1])})
		binary.Write(&acl, binary.LittleEndian, entry[2])
	}
	for _, attribute := range []struct {
		name, attribute string
		value           []byte
	}{
		{"file", "user.text", []byte("some text")},
		{"file", "user.binary", []byte("\x00\n=\xff")},
		{"file", "user.empty", nil},
		{"file", "user.long", bytes.Repeat([]byte("long "), 200)},
		{"file", "security.capability", capabilities},
		{"file", "system.posix_acl_access", acl.Bytes()},
		{"dir", "user.text", []byte("of a directory")},
		{"dir", "system.posix_acl_default", acl.Bytes()},
	} {
		if err := syscall.Setxattr(filepath.Join(dir, attribute.name), attribute.attribute, attribute.value, 0); err != nil {
			return fmt.Errorf("set %s: %w", attribute.attribute, err)
		}
	}
	return nil
}

// owners are modes, owners and times that files seldom have.
func owners(dir, _ string) error {
	for i, mode := range []uint32{0o4755, 0o2755, 0o6711, 0o1777, 0o000, 0o7777} {
		for _, directory := range []bool{false, true} {
			path := filepath.Join(dir, fmt.Sprintf("%o-%t", mode, directory))
			var err error
			if directory {
				err = os.Mkdir(path, 0o700)
			} else {
				err = os.WriteFile(path, []byte("x"), 0o600)
			}
			// A change of the owner takes bits away.
			if err := errors.Join(err, os.Chown(path, 100_000*i, 4_000_000_000-i), syscall.Chmod(path, mode)); err != nil {
				return err
			}
		}
	}
	old := filepath.Join(dir, "old")
	return errors.Join(os.WriteFile(old, nil, 0o600), os.Chtimes(old, time.Unix(1, 0), time.Unix(1, 234_567_890)))
}

// names are such that a program may trip over them.
func names(dir, _ string) error {
	var errs []error
	for _, name := range []string{
		"new\nline", `"quotes" and 'quotes'`, `back\slash`, " space ", "-rf", "--checkpoint-action=exec=false", "*", "$(false)", "tab\t", "\x01\x7f",
		"\xff\xfe not UTF-8", "ünï", "...", "C:", strings.Repeat("n", 255), strings.Repeat("d", 255) + "/" + strings.Repeat("f", 255), ".wh",
		"wh..wh.", "a=b", "%s%n", "@LongLink",
	} {
		path := filepath.Join(dir, name)
		errs = append(errs, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(name), 0o600))
	}
	return errors.Join(errs...)
}

// deep is a tree whose innermost file has a path of nearly 4096 bytes, the most that a system call takes.
func deep(dir, _ string) error {
	path := dir
	for i := 0; len(path) < 3900; i++ {
		path = filepath.Join(path, fmt.Sprintf("level-%d", i))
	}
	return errors.Join(os.MkdirAll(path, 0o755), os.WriteFile(filepath.Join(path, "innermost"), []byte(path), 0o600))
}

// many are ARGUMENT small files.
func many(dir, argument string) error {
	count, err := strconv.Atoi(argument)
	if err != nil {
		return err
	}
	for i := range count {
		path := filepath.Join(dir, strconv.Itoa(i/1000))
		if i%1000 == 0 {
			if err := os.Mkdir(path, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(path, strconv.Itoa(i)), []byte(argument), 0o600); err != nil {
			return err
		}
	}
	return nil
}

// content makes files in the directory ARGUMENT, in a mount for example; its state is the tree there. In a read-only one it takes
// those that there are.
func content(dir string) (func() (string, error), error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "content")
	err := os.WriteFile(file, []byte(dir), 0o640)
	if errors.Is(err, syscall.EROFS) {
		return tree(dir)
	}
	state, treeErr := tree(dir)
	return state, errors.Join(err, treeErr, os.Chown(file, 12, 34), os.MkdirAll(filepath.Join(dir, "sub"), 0o711),
		os.Symlink("content", filepath.Join(dir, "link")), syscall.Mkfifo(filepath.Join(dir, "sub", "fifo"), 0o600))
}

// deleted is an open file that has no name any more; ARGUMENT is its size in bytes or, with a comma between them, that and the
// directory that it was in.
func deleted(argument string) (func() (string, error), error) {
	bytes, parent, _ := strings.Cut(argument, ",")
	size, err := strconv.Atoi(bytes)
	if err != nil {
		return nil, err
	}
	data := make([]byte, size)
	noise(data, 14)
	return opened(parent, func(dir string) (int, error) {
		path := filepath.Join(dir, "deleted")
		if err := os.WriteFile(path, data, 0o640); err != nil {
			return 0, err
		}
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		return fd, errors.Join(err, os.Remove(path))
	})
}

// deletedName is an open file that was deleted under the name that it was opened by, and has another.
func deletedName(string) (func() (string, error), error) {
	return opened("", func(dir string) (int, error) {
		path := filepath.Join(dir, "deleted")
		err := errors.Join(os.WriteFile(path, []byte("has another name\n"), 0o640), os.Link(path, filepath.Join(dir, "other")))
		if err != nil {
			return 0, err
		}
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		return fd, errors.Join(err, os.Remove(path))
	})
}

// renamed is an open file that has another name than the one by which it was opened, under which there is another file.
func renamed(string) (func() (string, error), error) {
	return opened("", func(dir string) (int, error) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, []byte("renamed\n"), 0o640); err != nil {
			return 0, err
		}
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		return fd, errors.Join(err, os.Rename(path, filepath.Join(dir, "renamed")), os.WriteFile(path, []byte("another\n"), 0o600))
	})
}

// replaced is an open file that was deleted, where there is another of its name.
func replaced(string) (func() (string, error), error) {
	return opened("", func(dir string) (int, error) {
		path := filepath.Join(dir, "file")
		if err := os.WriteFile(path, []byte("replaced\n"), 0o640); err != nil {
			return 0, err
		}
		fd, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CLOEXEC, 0)
		return fd, errors.Join(err, os.WriteFile(path+".new", []byte("its replacement\n"), 0o600), os.Rename(path+".new", path))
	})
}

// imageFile is an open file of the image that was changed after it had been opened.
func imageFile(string) (func() (string, error), error) {
	return opened("", func(string) (int, error) {
		const path = "/lower/owned/file"
		fd, err := syscall.Open(path, syscall.O_RDONLY|syscall.O_CLOEXEC, 0)
		return fd, errors.Join(err, os.WriteFile(path, []byte("changed since the image\n"), 0o600))
	})
}

// opened is a descriptor of a file; open makes it in a new directory below parent, which is the root if it is empty.
func opened(parent string, open func(dir string) (int, error)) (func() (string, error), error) {
	dir, err := os.MkdirTemp(cmp.Or(parent, "/"), "opened-")
	if err != nil {
		return nil, err
	}
	fd, err := open(dir)
	if err != nil {
		return nil, err
	}
	if _, err := syscall.Seek(fd, 3, 0); err != nil {
		return nil, err
	}
	around, err := tree(dir)
	return func() (string, error) {
		target, err := os.Readlink(fdPath(fd))
		if err != nil {
			return "", err
		}
		position, err := say(fd, "pos", "flags")
		if err != nil {
			return "", err
		}
		var stat syscall.Stat_t
		if err := syscall.Fstat(fd, &stat); err != nil {
			return "", err
		}
		data := make([]byte, stat.Size)
		if _, err := syscall.Pread(fd, data, 0); err != nil {
			return "", err
		}
		files, err := around()
		if strings.HasSuffix(target, " (deleted)") {
			target = "deleted" // under which name is CRIU's to choose
		}
		return fmt.Sprintf("%s; mode %o; %d names; %s; %s; %s", target, stat.Mode, stat.Nlink, position, sum(data), files), err
	}, err
}

// workingDirectory is that of a process, deleted.
func workingDirectory(string) (func() (string, error), error) {
	const dir = "/gone/away"
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	old, err := os.Getwd()
	if err != nil {
		return nil, err
	}
	if err := os.Chdir(dir); err != nil {
		return nil, err
	}
	p, err := start("nothing", "", nil)
	if err := errors.Join(err, os.Chdir(old), os.RemoveAll("/gone")); err != nil {
		return nil, err
	}
	return func() (string, error) {
		answer, err := p.state()
		if err != nil {
			return "", err
		}
		target, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", p.pid))
		return answer + ", in " + target, err
	}, nil
}
