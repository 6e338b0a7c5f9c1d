package criu

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Obstacles looks for what CRIU could not dump, while the container runs, and without freezing it: everything that can be seen from outside,
// where Run gives up at the first, or leaves it to CRIU. Each is an error as Run would return it, as of this moment. What only CRIU sees, such as
// what is on its way through a socket, is not among them.
func (c Container) Obstacles(ctx context.Context) ([]*Error, error) {
	own, err := c.ownUserNamespace()
	if err != nil {
		return nil, err
	}
	if own {
		return []*Error{{Limit: limit(userNamespaceName), Cause: "it has a user namespace of its own"}}, nil
	}
	pids, err := c.Processes()
	if err != nil {
		return nil, fmt.Errorf("look at processes: %w", err)
	}
	var found []*Error
	for _, pid := range pids {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		s, err := readStatus(statusPath(pid))
		if err != nil {
			continue // it has ended
		}
		for _, look := range []func(int) *Error{func(pid int) *Error { return c.task(ctx, pid) }, c.namespaces, c.resources, c.sysvMemory, c.descriptors} {
			if e := look(pid); e != nil {
				if e.Place == "" {
					e.Place = s.String()
				}
				found = append(found, e)
			}
		}
	}
	for _, look := range []func(context.Context) (*Error, error){c.unfoundWatch, c.mounts, c.outsidePeer} {
		e, err := look(ctx)
		if err != nil {
			return nil, err
		}
		if e != nil {
			found = append(found, e)
		}
	}
	return found, nil
}

// Connected says whether a dump would have to lock the container's network, for an established TCP connection, and whether that could be done.
func (c Container) Connected(ctx context.Context, criu string) (connected, lockable bool, err error) {
	if _, connected, err = c.connectedTCP(ctx); err != nil || !connected {
		return connected, true, err
	}
	if lockMethod(ctx, criu) == lockNetworkByNftables {
		return true, true, nil
	}
	for _, dir := range []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"} { // criu's PATH
		if unix.Access(filepath.Join(dir, "iptables-restore"), unix.X_OK) == nil {
			return true, true, nil
		}
	}
	return true, false, nil
}

// task finds a thread that another process traces, or that sleeps and cannot be woken. To see that it goes on, it is looked at for a while.
func (c Container) task(ctx context.Context, pid int) *Error {
	const patience = 500 * time.Millisecond
	paths, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid)) // the pattern is well-formed
	for _, path := range paths {
		s, err := readStatus(path)
		if err != nil {
			continue
		}
		if s.tracer != 0 {
			return &Error{Limit: limit(tracedName), Cause: "it is traced by " + tracer(s.tracer)}
		}
		stuck := s.state == "D"
		for start := time.Now(); stuck && time.Since(start) < patience; {
			select {
			case <-ctx.Done():
				return nil
			case <-time.After(patience / 10):
			}
			now, err := readStatus(path)
			stuck = err == nil && now == s
		}
		if stuck {
			return &Error{Limit: limit(stuckName), Cause: "it is in uninterruptible sleep (state D)"}
		}
	}
	return nil
}

// namespaces finds a process that has made itself namespaces of those kinds of which CRIU dumps one only.
func (c Container) namespaces(pid int) *Error {
	for _, kind := range []string{"user", "ipc", "uts"} {
		of := func(pid int) string {
			target, _ := os.Readlink(fmt.Sprintf("/proc/%d/ns/%s", pid, kind)) // gone
			return target
		}
		if init, its := of(c.Pid), of(pid); init != "" && its != "" && init != its {
			return &Error{Limit: limit(nestedName), Cause: fmt.Sprintf("it has a %s namespace of its own", kind)}
		}
	}
	return nil
}

// resources finds a process whose limits cannot be read for want of CAP_SYS_RESOURCE.
func (c Container) resources(pid int) *Error {
	var lim unix.Rlimit
	if err := unix.Prlimit(pid, unix.RLIMIT_NOFILE, nil, &lim); errors.Is(err, unix.EPERM) {
		return &Error{Limit: limit(noResourceName), Cause: "its limits cannot be read"}
	}
	return nil
}

// sysvMemory finds System V shared memory that belongs to the node.
func (c Container) sysvMemory(pid int) *Error {
	ours, err := os.Readlink("/proc/self/ns/ipc")
	if err != nil {
		return nil
	}
	theirs, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/ipc", pid))
	if err != nil || theirs != ours {
		return nil
	}
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return nil
	}
	for line := range strings.Lines(string(maps)) {
		if fields := strings.Fields(line); len(fields) >= 6 && strings.HasPrefix(fields[5], "/SYSV") {
			return &Error{Limit: limit(nodeMemoryName), Cause: "it has System V shared memory of the node"}
		}
	}
	return nil
}

// descriptors finds a descriptor of a kind that CRIU does not know. They are looked at by their links, and by the names of protocols that the
// kernel gives sockets (see lsof): no descriptor is taken from its process.
func (c Container) descriptors(pid int) *Error {
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil // it has ended
	}
	for _, entry := range entries {
		path := filepath.Join(dir, entry.Name())
		link, err := os.Readlink(path)
		if err != nil {
			continue
		}
		// What is known of it already: a file server that is gone must not hold this up.
		var st unix.Statx_t
		if unix.Statx(unix.AT_FDCWD, path, unix.AT_STATX_DONT_SYNC, unix.STATX_BASIC_STATS, &st) != nil {
			continue
		}
		if name, cause := unknown(path, link, &st); name != "" {
			return &Error{Limit: limit(name), Cause: cause, Place: c.describe(place{pid: pid, fd: atoi(entry.Name())})}
		}
	}
	return nil
}

// unknown names the limit that a descriptor is about, and why; nothing where CRIU may know it.
func unknown(path, link string, st *unix.Statx_t) (limit, cause string) {
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFSOCK:
		buf := make([]byte, 64)
		n, err := unix.Getxattr(path, "system.sockprotoname", buf)
		if err != nil {
			return "", ""
		}
		protocol := strings.TrimRight(string(buf[:n]), "\x00")
		switch {
		case strings.HasPrefix(protocol, "MPTCP"):
			return mptcpName, "its protocol is " + protocol
		case strings.Contains(protocol, "VSOCK"), strings.HasPrefix(protocol, "SCTP"), protocol == "ALG", protocol == "XDP", protocol == "TIPC", protocol == "SMC":
			return otherSocketName, "its protocol is " + protocol
		}
	case unix.S_IFBLK:
		return deviceName, "it is a block device"
	case unix.S_IFCHR:
		switch major, minor := st.Rdev_major, st.Rdev_minor; {
		case major == 1, major == 4, major == 5, major >= 128 && major <= 143: // memory, such as /dev/null, and terminals
		case major == 10 && (minor == 200 || minor == 235): // net/tun and autofs
		default: // see dump_chrdev in CRIU's files.c
			return deviceName, fmt.Sprintf("it is the character device %d:%d", major, minor)
		}
	case unix.S_IFREG:
		if st.Nlink == 0 && strings.HasSuffix(link, " (deleted)") && st.Blocks*512 > ghostLimit {
			return largeDeletedName, fmt.Sprintf("it has %d bytes", st.Blocks*512)
		}
	}
	switch link {
	case "anon_inode:[io_uring]":
		return ioUringName, "CRIU does not know it"
	case "anon_inode:[userfaultfd]", "anon_inode:[perf_event]", "anon_inode:kvm-vm", "anon_inode:kvm-vcpu":
		return otherFileName, "CRIU does not know it"
	}
	return "", ""
}

// unfoundWatch finds a watch of inotify or fanotify on the root file system of which no path leads to what is watched. Where that file system
// is an overlay, CRIU cannot find it either.
func (c Container) unfoundWatch(ctx context.Context) (*Error, error) {
	var st unix.Stat_t
	var fs unix.Statfs_t
	if unix.Stat(c.Rootfs, &st) != nil || unix.Statfs(c.Rootfs, &fs) != nil || fs.Type != unix.OVERLAYFS_SUPER_MAGIC {
		return nil, nil
	}
	watched, err := c.watched(kernelDevice(st.Dev))
	if err != nil || len(watched) == 0 {
		return nil, err
	}
	entries, err := c.watchedPaths(ctx)
	if err != nil {
		return nil, fmt.Errorf("look for what is watched: %w", err)
	}
	for _, entry := range entries {
		delete(watched, entry.GetInode())
	}
	for inode := range watched {
		return &Error{Limit: limit(watchName), Cause: "nothing in the root file system has the inode " + strconv.FormatUint(inode, 10)}, nil
	}
	return nil, nil
}

// virtual are the file systems that CRIU mounts anew, without their content or with it.
var virtual = map[string]bool{
	"proc": true, "sysfs": true, "tmpfs": true, "devpts": true, "mqueue": true, "cgroup": true, "cgroup2": true, "devtmpfs": true, "overlay": true,
	"binfmt_misc": true, "pstore": true, "securityfs": true, "fusectl": true, "debugfs": true, "tracefs": true, "configfs": true, "autofs": true,
}

// mounts finds a mount that the container's specification does not know, since it came after the start: one of another file system, or one that
// follows a mount outside.
func (c Container) mounts(context.Context) (*Error, error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/mountinfo", c.Pid))
	if err != nil {
		return nil, fmt.Errorf("look at mounts: %w", err)
	}
	known := map[string]bool{"/": true}
	for _, path := range append(slices.Clone(c.ExternalMounts), c.MaskedFiles...) {
		known[path] = true
	}
	for line := range strings.Lines(string(content)) {
		// proc(5): 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
		before, after, ok := strings.Cut(line, " - ")
		fields, kind := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 6 || len(kind) < 1 {
			continue
		}
		path := unescape(fields[4])
		outside := slices.ContainsFunc(fields[6:], func(tag string) bool {
			peers, slave := strings.CutPrefix(tag, "master:")
			return slave && !strings.Contains(string(content), " shared:"+peers+" ")
		})
		if known[path] || virtual[kind[0]] && !outside {
			continue
		}
		cause := "it is of a file system " + printable(kind[0])
		if outside {
			cause = "it follows a mount that is not the container's"
		}
		return &Error{Limit: limit(unknownMountName), Cause: cause, Place: c.describe(place{mount: path, fd: -1})}, nil
	}
	return nil, nil
}

// unescape undoes what the kernel does to blanks and backslashes in mountinfo.
func unescape(path string) string {
	return strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`).Replace(path)
}
