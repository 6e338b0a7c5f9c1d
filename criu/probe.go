package criu

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// MinVersion is the oldest CRIU whose dumps of containers are good enough, as major*10000 + minor*100 + sublevel. The
// kubelet's own test asks for it too.
const MinVersion = 31600

// Features is what this machine offers.
type Features struct {
	Path    string // absolute path of the binary
	Version int    // as MinVersion
	// Missing is what `criu check` finds wanting in the kernel or in our privileges; a dump may fail or not, as it needs
	// them. Empty where all is well.
	Missing []string

	file identity
}

// identity tells a file from what is put in its place, and from itself after a change.
type identity struct {
	device, inode uint64
	changed       unix.Timespec
}

// VersionString is the version as people write it, "4.2.1".
func (f Features) VersionString() string { return versionString(f.Version) }

func versionString(v int) string {
	s := fmt.Sprintf("%d.%d", v/10000, v/100%100)
	if v%100 != 0 {
		s += fmt.Sprintf(".%d", v%100)
	}
	return s
}

// ErrUnavailable means that no dump is possible here: CRIU is absent, does not start or is too old.
var ErrUnavailable = errors.New("CRIU is not available")

// Probe looks for CRIU at path, or in PATH where path has no slash, and asks it what it and the kernel can do. The errors
// wrap ErrUnavailable unless ctx has ended.
func Probe(ctx context.Context, path string) (Features, error) {
	f, err := find(path)
	if err != nil {
		return Features{}, err
	}
	found := f.Path
	out, err := output(ctx, found, "--version")
	if ctx.Err() != nil {
		return Features{}, context.Cause(ctx)
	}
	if err != nil {
		return Features{}, fmt.Errorf("%w: %s does not start: %s", ErrUnavailable, found, lastLine(out, err))
	}
	if f.Version, err = parseVersion(out); err != nil {
		return Features{}, fmt.Errorf("%w: %s: %w", ErrUnavailable, found, err)
	}
	if f.Version < MinVersion {
		return Features{}, fmt.Errorf("%w: criu %s at %s is too old: %s or later is needed",
			ErrUnavailable, f.VersionString(), found, versionString(MinVersion))
	}
	out, err = output(ctx, found, "check")
	if ctx.Err() != nil {
		return Features{}, context.Cause(ctx)
	}
	if err != nil {
		f.Missing = parseCheck(out)
	}
	return f, nil
}

// Current says whether path leads to the binary that was probed, and that is as it was. It is cheap.
func (f Features) Current(path string) bool {
	now, err := find(path)
	return err == nil && now.Path == f.Path && now.file == f.file
}

// find fills in what is known of the binary without starting it.
func find(path string) (Features, error) {
	found, err := exec.LookPath(path)
	if err != nil {
		return Features{}, fmt.Errorf("%w: no executable %q: install the package criu, or name the binary by --criu", ErrUnavailable, path)
	}
	if found, err = filepath.Abs(found); err != nil {
		return Features{}, err
	}
	// Before it is run as root: a program that others can replace is not one to trust.
	var st unix.Stat_t
	if err := unix.Stat(found, &st); err != nil || st.Uid != 0 || st.Mode&0o022 != 0 {
		return Features{}, fmt.Errorf("%w: %s must belong to root and be writable by nobody else", ErrUnavailable, found)
	}
	return Features{Path: found, file: identity{st.Dev, st.Ino, st.Ctim}}, nil
}

func output(ctx context.Context, path string, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.Dir = "/"
	// criu check forks a child that sleeps and holds the output open: it has to end with its parent.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return unix.Kill(-cmd.Process.Pid, unix.SIGKILL) }
	cmd.WaitDelay = time.Second
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func lastLine(out string, err error) string {
	lines := strings.Split(strings.TrimSpace(out), "\n")
	if last := lines[len(lines)-1]; last != "" {
		return fmt.Sprintf("%v: %s", err, last)
	}
	return err.Error()
}

// parseVersion reads "Version: 4.2.1"; a build from git adds "GitID: v4.2-12-gabcdef".
func parseVersion(out string) (int, error) {
	m := regexp.MustCompile(`(?m)^Version: (\d+)\.(\d+)(?:\.(\d+))?`).FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("parse version: %q has no line \"Version: X.Y\"", strings.TrimSpace(out))
	}
	version := 0
	for i, weight := range []int{10000, 100, 1} {
		if m[i+1] == "" {
			continue
		}
		n, err := strconv.Atoi(m[i+1])
		if err != nil {
			return 0, fmt.Errorf("parse version: %w", err)
		}
		version += n * weight
	}
	return version, nil
}

// parseCheck picks from the output of `criu check` what it complains of.
func parseCheck(out string) []string {
	var missing []string
	for line := range strings.Lines(out) {
		if m := errorLine.FindStringSubmatch(strings.TrimSpace(line)); m != nil && !noise.MatchString(m[1]) {
			missing = append(missing, m[1])
		}
	}
	if len(missing) == 0 {
		missing = []string{"criu check fails without saying why"}
	}
	return missing
}
