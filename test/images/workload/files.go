package main

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// tree is a digest of all files below the directory ARGUMENT, as list lists them.
func tree(dir string) (func() (string, error), error) {
	return func() (string, error) {
		digest := sha256.New()
		entries, err := listTree(dir, digest)
		return fmt.Sprintf("tree %s: %d entries, sha256 %x", dir, entries, digest.Sum(nil)), err
	}, nil
}

// list is the command that writes what tree makes a digest of.
func list(args []string) error {
	if len(args) != 1 {
		return fmt.Errorf("usage: workload list DIR")
	}
	out := bufio.NewWriter(os.Stdout)
	if _, err := listTree(args[0], out); err != nil {
		return err
	}
	return out.Flush()
}

// listTree writes a line for each file below a directory, without what is mounted there: all of it that a checkpoint keeps.
func listTree(dir string, w io.Writer) (entries int, err error) {
	var root syscall.Stat_t
	if err := syscall.Lstat(dir, &root); err != nil {
		return 0, err
	}
	// Which names are one file: the first of them stands for all.
	names := map[uint64]string{}
	content, buffer := sha256.New(), make([]byte, 64<<10) // one for all of what may be many files
	err = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		stat := info.Sys().(*syscall.Stat_t)
		switch {
		case stat.Dev != root.Dev && entry.IsDir():
			return fs.SkipDir
		case stat.Dev != root.Dev:
			return nil
		}
		entries++
		line := fmt.Sprintf("%q %o %d:%d", path, stat.Mode, stat.Uid, stat.Gid)
		switch info.Mode().Type() {
		case fs.ModeDir:
		case fs.ModeSymlink:
			target, err := os.Readlink(path)
			if err != nil {
				return err
			}
			line += fmt.Sprintf(" to %q", target)
		case fs.ModeDevice, fs.ModeDevice | fs.ModeCharDevice:
			line += fmt.Sprintf(" device %x", stat.Rdev)
		case 0:
			if stat.Nlink > 1 {
				if first, ok := names[stat.Ino]; ok {
					line += fmt.Sprintf(" is %q", first)
				} else {
					names[stat.Ino] = path
				}
			}
			sum, err := digest(path, content, buffer)
			if err != nil {
				return err
			}
			// Half of a file is too much to be called a gap: file systems allocate in their own units.
			line += fmt.Sprintf(" %d bytes, sparse %t, %s, at %d", stat.Size, stat.Blocks*512 < stat.Size/2, sum, stat.Mtim.Sec)
		}
		attributes, err := xattrs(path, buffer)
		if err != nil {
			return err
		}
		_, err = fmt.Fprintln(w, line+attributes)
		return err
	})
	return entries, err
}

func digest(path string, h hash.Hash, buffer []byte) (string, error) {
	file, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer file.Close()
	h.Reset()
	// Without the file's own methods, which would not use the buffer.
	if _, err := io.CopyBuffer(h, struct{ io.Reader }{file}, buffer); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)[:8]), nil
}

// xattrs are a file's extended attributes. Those of a link are nobody's: package syscall follows it.
func xattrs(path string, buffer []byte) (string, error) {
	info, err := os.Lstat(path)
	if err != nil || info.Mode()&fs.ModeSymlink != 0 {
		return "", err
	}
	size, err := syscall.Listxattr(path, buffer)
	if err == syscall.ENOTSUP {
		return "", nil
	}
	if err != nil {
		return "", &fs.PathError{Op: "listxattr", Path: path, Err: err}
	}
	names := strings.FieldsFunc(string(buffer[:size]), func(r rune) bool { return r == 0 })
	slices.Sort(names)
	var all strings.Builder
	for _, name := range names {
		size, err := syscall.Getxattr(path, name, buffer)
		if err != nil {
			return "", &fs.PathError{Op: "getxattr " + name, Path: path, Err: err}
		}
		all.WriteString(" " + name + "=" + strconv.Quote(string(buffer[:size])))
	}
	return all.String(), nil
}
