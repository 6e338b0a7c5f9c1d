package rootfs

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// mapped are the files of a layer that processes have mapped shared. Through a mapping they can be
// written to without a new ctime, if it has been written through before.
//
// Neither inode numbers nor paths tell which file of the upper directory it is: /proc has those of the overlay or of the upper
// directory, by the kernel's version; a file that came from a lower layer has that layer's number in the
// overlay; and a mapped file may have been deleted under the name by which it was opened, and have others. But ctime and
// size are in all cases those of the inode in the upper directory. Where they are no longer, it has changed since, which shows.
// Other files with the same are copied once more than they need to be.
type mapped struct {
	files map[change]struct{}
	all   bool // it could not be found out: each file may be
}

// change is what tells two states of a file apart: its ctime and its size.
type change struct{ sec, nsec, size int64 }

// maxMapped is how many are told apart. A container of more has all its files taken for mapped.
const maxMapped = 50_000

func (m *mapped) has(st *unix.Stat_t) bool {
	if m.all {
		return true
	}
	if len(m.files) == 0 || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return false
	}
	sec, nsec := st.Ctim.Unix()
	_, ok := m.files[change{sec, nsec, st.Size}]
	return ok
}

// mapped looks at the mappings of processes.
func (l *Layer) mapped(processes func() ([]int, error)) (*mapped, error) {
	devices, err := l.devices()
	if err != nil {
		return nil, err
	}
	pids, err := processes()
	if err != nil {
		return nil, fmt.Errorf("look for mapped files: %w", err)
	}
	m := &mapped{files: make(map[change]struct{})}
	for _, pid := range pids {
		if err := m.add(pid, devices); err != nil {
			return nil, fmt.Errorf("look for mapped files of process %d: %w", pid, err)
		}
		if m.all {
			break
		}
	}
	return m, nil
}

// devices returns the numbers that the layer's files may have in /proc/PID/maps: those of the overlay, and of the file system that the
// upper directory is on. For btrfs the latter is another than stat says.
func (l *Layer) devices() (map[uint64]bool, error) {
	devices := make(map[uint64]bool)
	for _, dir := range []*os.File{l.Merged, l.Upper} {
		var st unix.Statx_t
		if err := unix.Statx(int(dir.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
			return nil, fmt.Errorf("look at %s: %w", dir.Name(), err)
		}
		devices[unix.Mkdev(st.Dev_major, st.Dev_minor)] = true
	}
	info, err := os.ReadFile(fmt.Sprintf("/proc/self/fdinfo/%d", l.Upper.Fd()))
	if err != nil {
		return nil, fmt.Errorf("look at %s: %w", l.Upper.Name(), err)
	}
	_, after, _ := bytes.Cut(info, []byte("mnt_id:"))
	id := bytes.Fields(after)
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("look at mounts: %w", err)
	}
	for line := range bytes.Lines(table) {
		if fields := bytes.Fields(line); len(id) > 0 && len(fields) > 2 && bytes.Equal(fields[0], id[0]) {
			if device, ok := parseDevice(string(fields[2]), 10); ok {
				devices[device] = true
			}
		}
	}
	return devices, nil
}

func parseDevice(s string, base int) (uint64, bool) {
	major, minor, _ := strings.Cut(s, ":")
	a, err := strconv.ParseUint(major, base, 32)
	b, err2 := strconv.ParseUint(minor, base, 32)
	return unix.Mkdev(uint32(a), uint32(b)), err == nil && err2 == nil
}

// add adds what a process has mapped. Its having ended is no error.
func (m *mapped) add(pid int, devices map[uint64]bool) error {
	const tries = 5 // mappings may be split and joined between two looks
	for range tries {
		certain, err := m.addOf(pid, devices)
		if certain || gone(err) {
			return nil
		}
		if err != nil {
			return err
		}
	}
	m.all = true
	return nil
}

func (m *mapped) addOf(pid int, devices map[uint64]bool) (certain bool, err error) {
	found, err := mappings(pid, devices)
	if err != nil {
		return false, err
	}
	for _, r := range found {
		var st unix.Statx_t
		// Not what a file server says, which may be away.
		err := unix.Statx(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/map_files/%x-%x", pid, r[0], r[1]), unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st)
		if errors.Is(err, fs.ErrNotExist) {
			return false, nil
		}
		if err != nil {
			return false, err
		}
		m.files[change{st.Ctime.Sec, int64(st.Ctime.Nsec), int64(st.Size)}] = struct{}{}
	}
	if len(m.files) > maxMapped {
		m.files, m.all = nil, true
	}
	return true, nil
}

// mappings returns the first and the last address of each shared mapping of files on these devices. That it can only be read now does
// not mean that it has not been written through, or will not be.
func mappings(pid int, devices map[uint64]bool) ([][2]uint64, error) {
	file, err := os.Open(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	var found [][2]uint64
	lines := bufio.NewReaderSize(file, 64<<10)
	for {
		line, err := lines.ReadSlice('\n')
		for long := err; errors.Is(long, bufio.ErrBufferFull); { // a path's end
			_, long = lines.ReadSlice('\n')
		}
		device, addresses, shared, ok := parseMapping(line)
		switch {
		case !ok:
			return nil, fmt.Errorf("parse %s: %.100q", file.Name(), line)
		case shared && devices[device]:
			found = append(found, addresses)
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			if err == io.EOF || gone(err) {
				return found, nil
			}
			return nil, err
		}
	}
}

// parseMapping reads a line of /proc/PID/maps, such as
// "7f0000000000-7f0000001000 rw-s 00000000 fe:00 1234    /path", and says of a shared mapping where it is and on which device its file.
func parseMapping(line []byte) (device uint64, addresses [2]uint64, shared, ok bool) {
	fields := bytes.Fields(line)
	if len(fields) < 5 || len(fields[1]) != 4 || fields[1][3] != 's' {
		return 0, addresses, false, true
	}
	device, ok = parseDevice(string(fields[3]), 16)
	from, to, _ := strings.Cut(string(fields[0]), "-")
	var errFrom, errTo error
	addresses[0], errFrom = strconv.ParseUint(from, 16, 64)
	addresses[1], errTo = strconv.ParseUint(to, 16, 64)
	return device, addresses, true, ok && errFrom == nil && errTo == nil
}

func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) }
