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
	"strconv"
	"strings"
	"unicode"

	"golang.org/x/sys/unix"
)

// Error is a dump that has failed, or was not begun since it would have failed. The container runs.
type Error struct {
	// Limit is the known reason, nil if it is none.
	Limit *Limit
	// Place is where it was met, such as "process 7 (redis-server), descriptor 5 (/dev/fuse)", with the pid that the process has in
	// the container; empty where that is not known.
	Place string
	// Cause is what CRIU's log says of the reason, or what go-criu said where the log says nothing.
	Cause string
	// Log is the end of CRIU's log, at most 20 lines, verbatim. It is empty where the dump was not begun.
	Log []string

	err error // errConnectedTCP, or an error of the disk that is no Limit
}

// Kind says what becomes of another try.
func (e *Error) Kind() Kind {
	if e.Limit == nil {
		return Unknown
	}
	return e.Limit.Kind
}

// Error is a line of at most 500 bytes of printable UTF-8, although the container has chosen names that are in it.
func (e *Error) Error() string {
	const maxMessage = 500
	parts := []string{"criu cannot dump the container"}
	if e.Place != "" {
		parts = append(parts, e.Place)
	}
	advice := ""
	if e.Limit != nil {
		advice = ": " + e.Limit.Advice
	}
	parts = append(parts, e.Cause)
	return shorten(printable(strings.Join(parts, ": ")), maxMessage-len(advice)) + advice
}

func (e *Error) Unwrap() error { return e.err }

// errConnectedTCP is in an Error of a dump without a network lock that has met a connection.
var errConnectedTCP = errors.New("connected TCP socket")

// diagnose turns go-criu's error, which is often empty or names the first line that looks like an error, into the cause.
func (d Dump) diagnose(err error) error {
	var result *Error
	at := place{fd: -1}
	file, openErr := os.Open(filepath.Join(descriptorPath(d.Work), LogFile))
	if openErr == nil {
		defer file.Close()
		result, at = diagnoseLog(file, err)
	} else {
		result = &Error{Cause: fmt.Sprintf("%v; there is no log of it (%v)", err, openErr)}
	}
	if result.Limit == nil {
		// The log lies on the same disk, and may end before its own word on that.
		switch errno := tryToWrite(d.Work); errno {
		case nil:
		case unix.ENOSPC:
			result.Cause += ": No space left on device"
			result.Limit = limit("full disk")
		case unix.EDQUOT:
			result.Cause += ": Disk quota exceeded"
			result.Limit = limit("full disk")
		default:
			result.Cause, result.err = fmt.Sprintf("its images and its log cannot be written: %v", errno), errno
		}
	}
	if l := result.Limit; l != nil && l.descriptor != nil && at.fd < 0 && !d.Container.findDescriptor(&at, l.descriptor) {
		result.Limit = nil
	}
	if at.socket != "" {
		d.Container.findDescriptor(&at, func(link string) bool { return link == "socket:["+at.socket+"]" })
	}
	result.Place = d.Container.describe(at)
	return result
}

// tryToWrite writes as much to the file system of dir as criu does at once to its log and images, and says what comes of it: nil, or an error
// of the kernel's. Nothing of it stays.
func tryToWrite(dir *os.File) error {
	const name = ".try"
	fd, err := unix.Openat(int(dir.Fd()), name, unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil {
		return err
	}
	for left := make([]byte, 64<<10); len(left) > 0; {
		n, err := unix.Write(fd, left)
		if err != nil {
			return err
		}
		left = left[n:]
	}
	return nil
}

// diagnoseLog finds the cause in CRIU's log, and where it was met. The container has a say in what stands there: it names its
// processes and files, and can have whole lines in their names.
func diagnoseLog(log io.Reader, err error) (*Error, place) {
	const tailLines, causeLines, maxLine = 20, 3, 1 << 20
	result := &Error{}
	now := place{fd: -1} // at which CRIU was
	var at place         // at which it met the cause
	var causes []string
	lines := bufio.NewScanner(log)
	lines.Buffer(make([]byte, 0, 4096), maxLine)
	for lines.Scan() {
		line := lines.Text()
		if result.Log = append(result.Log, line); len(result.Log) > tailLines {
			result.Log = result.Log[1:]
		}
		now.read(line)
		m := errorLine.FindStringSubmatch(line)
		if m == nil || noise.MatchString(m[1]) || result.Limit != nil {
			continue
		}
		causes = append(causes, m[1])
		at = now
		if strings.Contains(m[1], "Connected TCP socket") {
			result.err = errConnectedTCP
		}
		for i := range limits {
			if limits[i].match(m[1], &at) {
				// What led to it says more than what followed from it.
				result.Limit, result.Cause = &limits[i], m[1]
				break
			}
		}
	}
	if result.Cause == "" && len(causes) > 0 {
		result.Cause = strings.Join(slices.Compact(causes[max(0, len(causes)-causeLines):]), "; ")
	}
	if result.Cause == "" {
		result.Cause = fmt.Sprintf("its log names no cause (%v)", err)
	}
	return result, at
}

var (
	errorLine = regexp.MustCompile(`^(?:\([0-9.]+\) )?(?: *\d+: )?Error \([^)]*\): (.*)`)
	// noise is what CRIU prints as an error although the dump goes on, or about every dump that failed.
	noise = regexp.MustCompile(`Can't setup RLIMIT_NOFILE for self|Dumping FAILED`)
)

// place is where CRIU was, as its log tells. What is not known is empty, and fd -1.
type place struct {
	pid    int // in CRIU's pid namespace
	comm   string
	fd     int
	path   string // of a file
	mount  string // mount point in the container
	socket string // inode
}

var (
	taskLine       = regexp.MustCompile(`^\([0-9.]+\) Dumping task \(pid: (\d+) comm: (.*)\)$`)
	descriptorLine = regexp.MustCompile(`^\([0-9.]+\) (\d+) fdinfo (\d+): pos: `)
	pathLine       = regexp.MustCompile(`^\([0-9.]+\) Dumping path for (-?\d+) fd via self \d+ \[(.*)\]$`)
	endLine        = regexp.MustCompile(`^\([0-9.]+\) -{40}$`) // of a task's descriptors
	peerLine       = regexp.MustCompile(`^\([0-9.]+\) unix: \t(?:Runaway socket|Ext stream not supported|Ext dgram w/o name): ino \d+ peer_ino (\d+) .* name (.*)$`)
)

// read follows CRIU from line to line.
func (p *place) read(line string) {
	if m := taskLine.FindStringSubmatch(line); m != nil {
		*p = place{pid: atoi(m[1]), comm: m[2], fd: -1}
	} else if m := descriptorLine.FindStringSubmatch(line); m != nil {
		p.pid, p.fd, p.path = atoi(m[1]), atoi(m[2]), ""
	} else if m := pathLine.FindStringSubmatch(line); m != nil {
		p.fd, p.path = max(atoi(m[1]), -1), m[2]
	} else if m := peerLine.FindStringSubmatch(line); m != nil {
		p.socket, p.path = m[1], m[2] // they are looked at when all tasks are done
	} else if endLine.MatchString(line) {
		p.fd, p.path = -1, ""
	}
}

// atoi returns the number that a regular expression has found, -1 for one that is no number of ours.
func atoi(s string) int {
	n, err := strconv.Atoi(s)
	if err != nil {
		return -1
	}
	return n
}

// printable makes one line of what the container may have chosen.
func printable(s string) string {
	return strings.Map(func(r rune) rune {
		if r == unicode.ReplacementChar || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.Join(strings.Fields(s), " "))
}

// shorten cuts a text to at most size bytes.
func shorten(s string, size int) string {
	const ellipsis = "…"
	if len(s) <= size {
		return s
	}
	return strings.ToValidUTF8(s[:max(size-len(ellipsis), 0)], "") + ellipsis
}
