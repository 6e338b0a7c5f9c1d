package criu

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"
)

// Leftovers are what a criu leaves behind that was killed in mid-dump, beside its images: a frozen cgroup, a locked network, names
// that it has given to deleted files. Tasks that it traced go on by themselves, since the kernel lets go of them.
//
// A criu that is told to roll back (see Dump.Run and StopOrphan) leaves none.
type Leftovers struct {
	// Freezer is the container's, as in Container; empty for none.
	Freezer string
	// Network is a path of the container's network namespace, which must not be one that another has meanwhile; empty for none.
	Network string
	// Pid is that of the container's init, and Log criu's log, which may be missing. They tell what is this dump's of what is in the
	// network of the machine itself.
	Pid int
	Log string
	// Upper is the container's writable layer; empty for none.
	Upper string
	// Since is when the dump began: only what is younger can be of it.
	Since time.Time
}

// Remove undoes what there is, and says what it has done in words for people, none if it had nothing to do. It may be called more than once, and while the
// container runs; not while a criu is at work on it. What is gone, such as the cgroup of a container that has ended, needs nothing.
// It does as much as it can: an error does not keep it from the rest.
func (l Leftovers) Remove(ctx context.Context) (done string, err error) {
	var all []string
	thawed, thawErr := l.thaw() // first: the container stands still
	if thawed {
		all = append(all, "thawed its cgroup")
	}
	unlocked, unlockErr := l.unlock(ctx)
	if unlocked {
		all = append(all, "unlocked its network")
	}
	removed, removeErr := l.removeLinks(ctx)
	if removed > 0 {
		all = append(all, fmt.Sprintf("removed %d names of deleted files", removed))
	}
	return strings.Join(all, ", "), errors.Join(thawErr, unlockErr, removeErr)
}

// thaw thaws the cgroup, of either version, if it is frozen.
func (l Leftovers) thaw() (bool, error) {
	if l.Freezer == "" {
		return false, nil
	}
	v1, err := thaw(filepath.Join(l.Freezer, "freezer.state"), thawedV1)
	if v1 || err != nil {
		return v1, err
	}
	return thaw(filepath.Join(l.Freezer, "cgroup.freeze"), thawedV2)
}

// unlock removes CRIU's locks of the network, of whichever kind.
func (l Leftovers) unlock(ctx context.Context) (bool, error) {
	if l.Network == "" {
		return false, nil
	}
	network, err := os.Open(l.Network)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil // the pod has ended
	}
	if err != nil {
		return false, fmt.Errorf("unlock network: %w", err)
	}
	defer network.Close()
	byNftables, nftErr := l.unlockNftables(network)
	byIptables, iptErr := unlockIptables(ctx, network)
	if err := errors.Join(nftErr, iptErr); err != nil {
		return byNftables || byIptables, fmt.Errorf("unlock network: %w", err)
	}
	return byNftables || byIptables, nil
}

// unlockNftables deletes the tables that CRIU has made: "inet CRIU-ID", where ID is the beginning of the run's id, and up to CRIU 4.0
// was the pid of the dump's first process (criu/netfilter.c).
func (l Leftovers) unlockNftables(network *os.File) (bool, error) {
	conn, err := nftables.New(nftables.WithNetNSFd(int(network.Fd())))
	if err != nil {
		return false, err
	}
	tables, err := conn.ListTablesOfFamily(nftables.TableFamilyINet)
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EINVAL) {
		return false, nil // a kernel without nftables
	}
	if err != nil {
		return false, fmt.Errorf("list tables: %w", err)
	}
	ours := func(string) bool { return true } // a pod's network is locked for one dump at a time
	if shared, err := sameFile(l.Network, "/proc/self/ns/net"); err != nil {
		return false, err
	} else if shared {
		run := runID(l.Log)
		ours = func(id string) bool { return id == strconv.Itoa(l.Pid) || id != "" && strings.HasPrefix(run, id) }
	}
	found := false
	for _, table := range tables {
		if id, is := strings.CutPrefix(table.Name, "CRIU-"); is && ours(id) {
			conn.DelTable(table)
			found = true
		}
	}
	if !found {
		return false, nil
	}
	if err := conn.Flush(); err != nil {
		return false, fmt.Errorf("delete table: %w", err)
	}
	return true, nil
}

var runIDLine = regexp.MustCompile(`(?m)CRIU run id = ([0-9a-f-]+)$`)

// runID is the id that a criu has given itself, empty if its log does not say. It is among the first lines.
func runID(log string) string {
	file, err := os.OpenFile(log, unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return ""
	}
	defer file.Close()
	head, _ := io.ReadAll(io.LimitReader(file, 16<<10)) // what cannot be read is not there
	if m := runIDLine.FindSubmatch(head); m != nil {
		return string(m[1])
	}
	return ""
}

func sameFile(a, b string) (bool, error) {
	first, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	second, err := os.Stat(b)
	return err == nil && os.SameFile(first, second), err
}

// iptablesUnlock is what CRIU itself gives to iptables-restore. That names the chain empties it.
const iptablesUnlock = "*filter\n:CRIU - [0:0]\n-D INPUT -j CRIU\n-D OUTPUT -j CRIU\n-X CRIU\nCOMMIT\n"

// unlockIptables removes the chain of that name, by the programs that CRIU runs. Where they are not, it has made none. Only a network
// namespace of the pod's own is locked by it.
func unlockIptables(ctx context.Context, network *os.File) (bool, error) {
	found := false
	for _, program := range []string{"iptables", "ip6tables"} {
		save, err := exec.LookPath(program + "-save")
		if err != nil {
			continue
		}
		restore, err := exec.LookPath(program + "-restore")
		if err != nil {
			continue
		}
		rules, err := runIn(ctx, network, "", save, "-t", "filter")
		if err != nil {
			return found, err
		}
		if !strings.Contains(rules, "\n:CRIU ") {
			continue
		}
		if _, err := runIn(ctx, network, iptablesUnlock, restore, "--wait", "--noflush"); err != nil {
			return found, err
		}
		found = true
	}
	return found, nil
}

// runIn runs a program in a network namespace. A child is in that of the thread which starts it, and the thread goes back.
func runIn(ctx context.Context, network *os.File, input, program string, args ...string) (string, error) {
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		runtime.LockOSThread()
		own, err := os.Open("/proc/thread-self/ns/net")
		if err != nil {
			done <- result{err: err}
			return
		}
		defer own.Close()
		if err := unix.Setns(int(network.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- result{err: fmt.Errorf("enter network namespace: %w", err)}
			return
		}
		defer func() {
			// A thread that stays there must not be anybody else's: locked, it ends with this goroutine.
			if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWNET); err == nil {
				runtime.UnlockOSThread()
			}
		}()
		cmd := exec.CommandContext(ctx, program, args...)
		cmd.Stdin = strings.NewReader(input)
		out, err := cmd.Output()
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			err = fmt.Errorf("%w: %s", err, bytes.TrimSpace(exit.Stderr))
		}
		if err != nil {
			err = fmt.Errorf("run %s: %w", program, err)
		}
		done <- result{string(out), err}
	}()
	r := <-done
	return r.out, r.err
}

// removeLinks removes the names that CRIU has given to deleted files: link_remap.N, a further name of a file that has others. They
// are told from files of the container's own by their age: a further name changes a file's ctime.
func (l Leftovers) removeLinks(ctx context.Context) (removed int, err error) {
	if l.Upper == "" {
		return 0, nil
	}
	root, err := os.OpenRoot(l.Upper)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil // removed with the container
	}
	if err != nil {
		return 0, fmt.Errorf("look for names of deleted files: %w", err)
	}
	defer root.Close()
	err = fs.WalkDir(root.FS(), ".", func(path string, entry fs.DirEntry, err error) error {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil // gone meanwhile
		}
		if err != nil || !linkRemap(entry.Name()) || !entry.Type().IsRegular() {
			return err
		}
		info, err := root.Lstat(path)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err != nil {
			return err
		}
		st, ok := info.Sys().(*syscall.Stat_t)
		if !ok || st.Nlink < 2 || time.Unix(st.Ctim.Sec, st.Ctim.Nsec).Before(l.Since) {
			return nil
		}
		removed++
		return root.Remove(path)
	})
	if err != nil {
		err = fmt.Errorf("remove names of deleted files: %w", err)
	}
	return removed, err
}

// linkRemap says whether a file is named as CRIU does (criu/files-reg.c: create_link_remap).
func linkRemap(name string) bool {
	number, ok := strings.CutPrefix(name, "link_remap.")
	return ok && number != "" && strings.Trim(number, "0123456789") == ""
}
