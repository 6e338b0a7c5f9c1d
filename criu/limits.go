package criu

import (
	"regexp"
	"strings"
)

// Kind says what becomes of another try.
type Kind int

const (
	Unknown     Kind = iota // no known limit: CRIU's own words are all there is
	Unsupported             // it fails as long as the container, or this machine, is as it is
	Busy                    // it fails as long as a process does what it does just now
	NoSpace                 // it fails as long as the disk is full
)

// Limit is a known reason for which a dump fails. docs/limits.md has a row for each.
type Limit struct {
	Name   string // what the container or the machine has, as docs/limits.md calls it
	Kind   Kind
	Advice string // what helps

	// pattern finds the limit in an error of CRIU's log; nil where this package looks for it itself. Its groups, by their names, say
	// where it was met: pid, fd, path, mount, and socket, which is an inode.
	pattern *regexp.Regexp
	// descriptor recognizes by its link in /proc/PID/fd the one that it is about, where CRIU does not say. It must be there.
	descriptor func(link string) bool
}

// The limits that this package finds itself.
const (
	tracedName        = "process under a debugger"
	stuckName         = "process in uninterruptible sleep"
	userNamespaceName = "user namespace of its own"
	refusedTCPName    = "TCP connection, where none are wanted"
	volumeLinkName    = "deleted file with another name, in a volume"
)

// Those that CRIU finds, and Obstacles before it.
const (
	nestedName       = "namespace made inside"
	noResourceName   = "other user's process, and no CAP_SYS_RESOURCE"
	nodeMemoryName   = "System V shared memory of the node"
	mptcpName        = "MPTCP socket"
	outsidePeerName  = "unix socket with a peer outside"
	otherSocketName  = "socket of another kind"
	deviceName       = "open device"
	otherFileName    = "open file of another kind"
	largeDeletedName = "large deleted file that is open"
	ioUringName      = "io_uring"
	watchName        = "inotify or fanotify watch that cannot be found again"
	unknownMountName = "mount that the specification does not know"
)

// limits are in the order in which an error of CRIU is compared with them.
var limits = []Limit{
	{
		Name: "full disk", Kind: NoSpace,
		Advice:  "make room at the location, raise the quota, or choose a location on another file system",
		pattern: regexp.MustCompile(`No space left on device|Disk quota exceeded`),
	},
	{
		Name: "TCP connection, and no means to lock the network", Kind: Unsupported,
		Advice:  "a connection can only be dumped while its network is locked; install iptables, or a criu with nftables",
		pattern: regexp.MustCompile(`Locking network failed|Iptables configuration failed|Failed to lock TCP connection`),
	},
	{
		Name: refusedTCPName, Kind: Unsupported,
		Advice: "checkpoint.tcp refuses connections; close it first, or set that to established",
	},
	{
		Name: mptcpName, Kind: Unsupported,
		Advice:  "switch MPTCP off in the program; for one in Go set GODEBUG=multipathtcp=0 in the container",
		pattern: regexp.MustCompile(`Unsupported proto 262`),
	},
	{
		Name: otherSocketName, Kind: Unsupported,
		Advice:  "CRIU knows the sockets of TCP, UDP, unix, netlink and packets; close this one first",
		pattern: regexp.MustCompile(`Unsupported proto|Unsupported socket|Unknown socket collected|Unknown pair family`),
	},
	{
		Name: "CRIU too old for the sockets of this kernel", Kind: Unsupported,
		Advice:  "install criu 4.2 or later on the node",
		pattern: regexp.MustCompile(`Can't get 1:16 opt`),
	},
	{
		Name: outsidePeerName, Kind: Unsupported,
		Advice: "it is connected to a process outside of the container; close the connection first",
		pattern: regexp.MustCompile(`External socket is used|Can't dump half of stream unix connection|Can't dump name-less external socket|` +
			`Unix socket (?P<socket>\d+) (?:without|with unreachable) peer|Dangling connection (?P<socket>\d+)`),
	},
	{
		Name: unknownMountName, Kind: Unsupported,
		Advice: "it was made after the start, or by a hook; unmount it, or have it in the container's specification, as CDI devices do",
		pattern: regexp.MustCompile(`\d+:(?P<mount>.*) doesn't have a proper root mount|FS mnt (?P<mount>.*) dev 0x\S* root .* unsupported id|` +
			`Mount \d+ (?P<mount>.*) \(master_id: \d+ shared_id: \d+\) has unreachable sharing`),
	},
	{
		Name: largeDeletedName, Kind: Unsupported,
		Advice:  "deleted files go into the image, up to 1 GiB each; close it first",
		pattern: regexp.MustCompile(`Can't dump ghost file (?P<path>.*) of \d+ size`),
	},
	{
		Name: "link_remap file in the way", Kind: Unsupported,
		Advice:  "a criu that was killed has left link_remap.N beside the file; remove it",
		pattern: regexp.MustCompile(`Can't link remap to (?P<path>.*): File exists`),
	},
	{
		Name: "deleted file with another name, where none can be added", Kind: Unsupported,
		Advice:  "CRIU must give it a further name beside it, and cannot; close it first",
		pattern: regexp.MustCompile(`Can't (?:create link remap for|link remap to) (?P<path>.*?)(?:: |\. Use)`),
	},
	{
		Name: volumeLinkName, Kind: Unsupported,
		Advice: "its content is not in the archive, where a restore would look for it; close it first",
	},
	{
		Name: watchName, Kind: Unsupported,
		Advice:  "CRIU finds no path to what is watched; end the watch first",
		pattern: regexp.MustCompile(`Can't dump that handle|Can't find suitable path for handle|fsnotify: Unable to lookup a mount`),
	},
	{
		Name: ioUringName, Kind: Unsupported,
		Advice:     "CRIU cannot dump io_uring; switch it off in the program, or deny io_uring_setup by a seccomp profile",
		pattern:    regexp.MustCompile(`Can't dump file (?P<fd>\d+) of that type .*io_uring|Can't retrieve FDs from socket`),
		descriptor: func(link string) bool { return link == "anon_inode:[io_uring]" },
	},
	{
		Name: deviceName, Kind: Unsupported,
		Advice:  "the state of a device, such as a GPU, is not CRIU's to dump; close it first",
		pattern: regexp.MustCompile(`Can't dump file (?P<fd>\d+) of that type \[\d+\] \((?:chr|blk) `),
	},
	{
		Name: otherFileName, Kind: Unsupported,
		Advice:  "CRIU does not know this kind of file; close it first",
		pattern: regexp.MustCompile(`Can't dump file (?P<fd>\d+) of that type`),
	},
	{
		Name: nodeMemoryName, Kind: Unsupported,
		Advice:  "detach it first, or run the pod without hostIPC",
		pattern: regexp.MustCompile(`Task (?P<pid>\d+) with SysVIPC shmem map`),
	},
	{
		Name: userNamespaceName, Kind: Unsupported,
		Advice: "neither runc nor crun could restore it; run the pod with hostUsers: true",
	},
	{
		Name: nestedName, Kind: Unsupported,
		Advice:  "the process, such as a sandbox of a browser, has made namespaces of its own; end it first",
		pattern: regexp.MustCompile(`Can't dump nested \S+ namespace for (?P<pid>\d+)`),
	},
	{
		Name: noResourceName, Kind: Unsupported,
		Advice:  "without CAP_SYS_RESOURCE, which this machine lacks, only processes of root can be dumped",
		pattern: regexp.MustCompile(`Can't get rlimit \d+: Operation not permitted`),
	},
	{
		Name: "seccomp filter on crishim itself", Kind: Unsupported,
		Advice:  "use the shipped unit, or remove what filters system calls from yours, such as SystemCallFilter=",
		pattern: regexp.MustCompile(`suspending seccomp failed`),
	},
	{
		Name: tracedName, Kind: Unsupported,
		Advice: "end the debugger or the trace first",
	},
	{
		Name: stuckName, Kind: Busy,
		Advice: "it waits for a disk, a file server or a child that it has given its place to; try again when it goes on",
	},
	{
		Name: "process that ends in mid-dump", Kind: Busy,
		Advice:  "a process of the container has ended meanwhile: try again; look into the kernel's log whether memory was short",
		pattern: regexp.MustCompile(`(?:exited with|was killed by) \d+ unexpectedly`),
	},
	{
		Name: "process that does not stop", Kind: Busy,
		Advice:  "the container was thawed after 10 s; try again later",
		pattern: regexp.MustCompile(`Unable to freeze cgroup|Timeout reached|Unseizable non-zombie (?P<pid>\d+) found`),
	},
}

// limit returns one of those that this package finds itself.
func limit(name string) *Limit {
	for i := range limits {
		if limits[i].Name == name {
			return &limits[i]
		}
	}
	panic("criu: no limit is called " + name)
}

// match compares an error of CRIU with the limit, and adds to at where it was met.
func (l *Limit) match(line string, at *place) bool {
	if l.pattern == nil {
		return false
	}
	m := l.pattern.FindStringSubmatch(line)
	for i, group := range l.pattern.SubexpNames() {
		if m == nil || m[i] == "" {
			continue
		}
		switch group {
		case "pid":
			*at = place{pid: atoi(m[i]), fd: -1}
		case "fd":
			at.fd = atoi(m[i])
		case "path":
			at.path = m[i]
		case "mount":
			at.mount = strings.TrimPrefix(m[i], ".") // CRIU's paths begin at the root, as ./
		case "socket":
			at.socket = m[i]
		}
	}
	return m != nil
}
