package criu

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// Error is a dump that CRIU gave up by itself. The container runs again.
type Error struct {
	// Cause is what CRIU's log names as the reason, or what go-criu said where the log names none.
	Cause string
	// Process is the task that was being dumped at that moment, such as "pid 4711 (redis-server)", or empty.
	Process string
	// Advice is what helps, where the cause is a known limit of CRIU or of this machine; otherwise empty.
	Advice string
	// Log is the end of CRIU's log, at most 20 lines.
	Log []string

	err error // what is to be found by errors.Is: unix.ENOSPC, unix.EDQUOT
}

func (e *Error) Error() string {
	var b strings.Builder
	b.WriteString("criu cannot dump the container")
	if e.Process != "" {
		fmt.Fprintf(&b, ", at %s", e.Process)
	}
	fmt.Fprintf(&b, ": %s", e.Cause)
	if e.Advice != "" {
		fmt.Fprintf(&b, ": %s", e.Advice)
	}
	return b.String()
}

func (e *Error) Unwrap() error { return e.err }

// Unsupported says whether the container uses something that CRIU, or this machine, cannot dump: trying again will not help.
func (e *Error) Unsupported() bool {
	return e.Advice != "" && !errors.Is(e.err, unix.ENOSPC) && !errors.Is(e.err, unix.EDQUOT)
}

var errConnectedTCP = errors.New("connected TCP socket")

const noSpaceAdvice = "make room at the location, or choose one on another file system"

// limits are the known ones, found by CRIU's own words.
var limits = []struct {
	pattern *regexp.Regexp
	advice  string
	err     error
}{
	{regexp.MustCompile(`No space left on device`), noSpaceAdvice, unix.ENOSPC},
	{regexp.MustCompile(`Disk quota exceeded`), "raise the quota, or choose a location on another file system", unix.EDQUOT},
	{regexp.MustCompile(`Connected TCP socket`), "close the connection first", errConnectedTCP},
	{regexp.MustCompile(`Locking network failed|Iptables configuration failed|Failed to lock TCP connection`), "the container has a TCP connection, which can only be dumped while its network is locked; install iptables, or a criu with nftables", nil},
	{regexp.MustCompile(`Unsupported proto 262`), "MPTCP sockets cannot be dumped; for a Go server set GODEBUG=multipathtcp=0 in the container", nil},
	{regexp.MustCompile(`Can't get 1:16 opt`), "this criu cannot dump sockets on this kernel; install criu 4.2 or later", nil},
	{regexp.MustCompile(`External socket is used|Can't dump half of stream unix connection`), "a unix socket is connected to a process outside of the container; close that connection first", nil},
	{regexp.MustCompile(`doesn't have a proper root mount`), "the container has a mount that its specification does not know, made inside it or by a hook; unmount it first", nil},
	{regexp.MustCompile(`Can't dump ghost file`), "the container holds a large deleted file open; close it first", nil},
	{regexp.MustCompile(`Can't find .*link_remap|Can't create link remap|[Ll]ink-remap`), "the container holds a file open that was deleted under this name but has others; close it first", nil},
	{regexp.MustCompile(`fsnotify:.*(Can't|can't|Unable)|Can't dump that handle`), "the container watches a file by inotify that CRIU cannot find again on overlayfs; end the watch first", nil},
	{regexp.MustCompile(`io_uring`), "io_uring cannot be dumped; switch it off in the program", nil},
	{regexp.MustCompile(`Can't get rlimit \d+: Operation not permitted`), "CAP_SYS_RESOURCE is missing on this machine, without which only processes of root can be dumped", nil},
	{regexp.MustCompile(`Unable to (freeze|interrupt)|Freezing cgroup .* timeout|timeout.*(freez|seiz)`), "a process in the container does not stop, perhaps in uninterruptible sleep (state D); try again when it has gone on", nil},
	{regexp.MustCompile(`already (being )?traced|ptrace.*SEIZE.*(Operation not permitted|EPERM)|[Uu]nable to (attach|seize)|Unseizable`), "a process in the container is being traced, or crishim runs under a seccomp filter; detach the debugger, or use the shipped unit", nil},
}

// diagnose turns go-criu's error, which is often empty or names the first line that looks like an error, into the cause.
func diagnose(work *os.File, err error) error {
	file, openErr := os.Open(filepath.Join(descriptorPath(work), logFile))
	if openErr != nil {
		return &Error{Cause: fmt.Sprintf("%v; there is no log of it (%v)", err, openErr)}
	}
	defer file.Close()
	result := diagnoseLog(file, err)
	if result.Advice == "" && full(work) {
		// The log lies on the same disk, and may end before its own word on that.
		result.Cause += ": No space left on device"
		result.Advice, result.err = noSpaceAdvice, unix.ENOSPC
	}
	return result
}

// full says whether the file system has hardly a block or no inode left.
func full(dir *os.File) bool {
	const hardly = 64 << 10 // bytes: criu writes its log and images in pieces of up to that
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(dir.Fd()), &fs); err != nil {
		return false
	}
	return fs.Bavail*uint64(fs.Bsize) < hardly || fs.Files > 0 && fs.Ffree == 0
}

func diagnoseLog(log io.Reader, err error) *Error {
	const tailLines, causeLines, maxCause = 20, 3, 400
	result := &Error{}
	var causes []string
	process := ""
	lines := bufio.NewScanner(log)
	lines.Buffer(make([]byte, 0, 4096), 1<<20)
	for lines.Scan() {
		line := lines.Text()
		if result.Log = append(result.Log, line); len(result.Log) > tailLines {
			result.Log = result.Log[1:]
		}
		if m := dumpingTask.FindStringSubmatch(line); m != nil {
			process = fmt.Sprintf("pid %s (%s)", m[1], m[2])
		}
		m := errorLine.FindStringSubmatch(line)
		if m == nil || noise.MatchString(m[1]) {
			continue
		}
		causes = append(causes, m[1])
		if result.Advice != "" {
			continue
		}
		for _, l := range limits {
			if l.pattern.MatchString(m[1]) {
				result.Advice, result.err, result.Process = l.advice, l.err, process
				// What led to it says more than what followed from it.
				result.Cause = m[1]
				break
			}
		}
	}
	if result.Cause == "" && len(causes) > 0 {
		result.Cause = strings.Join(slices.Compact(causes[max(0, len(causes)-causeLines):]), "; ")
		result.Process = process
	}
	if result.Cause == "" {
		result.Cause = fmt.Sprintf("its log names no cause (%v)", err)
	}
	if len(result.Cause) > maxCause {
		result.Cause = strings.ToValidUTF8(result.Cause[:maxCause], "") + "…"
	}
	return result
}

var (
	dumpingTask = regexp.MustCompile(`Dumping task \(pid: (\d+) comm: (.*)\)`)
	errorLine   = regexp.MustCompile(`^(?:\([0-9.]+\) )?(?: *\d+: )?Error \([^)]*\): (.*)`)
	// noise is what CRIU prints as an error although the dump goes on, or about every dump that failed.
	noise = regexp.MustCompile(`Can't setup RLIMIT_NOFILE for self|Dumping FAILED`)
)
