package main

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"crishim/test/node"
)

// meter looks every few milliseconds at how much memory and disk is taken, until it is stopped.
type meter struct {
	disk  *disk
	roots []int
	known map[int]bool // descendants that were there before
	stop  chan struct{}
	done  chan struct{}

	peak peak
	err  error
}

// peak is the most that was seen at once.
type peak struct {
	disk     int64 // bytes beyond what was taken at the start
	anon     int64 // bytes of RssAnon of the processes together
	resident int64 // bytes of VmRSS of the processes together
}

// look starts a meter. The processes are those of roots, which may have this one among them that is not counted itself, and what they
// start from now on, without criu.
func look(d *disk, roots []int) (*meter, error) {
	m := &meter{disk: d, roots: roots, known: map[int]bool{os.Getpid(): true}, stop: make(chan struct{}), done: make(chan struct{})}
	for _, root := range roots {
		for _, pid := range descendants(root)[1:] {
			m.known[pid] = true
		}
	}
	start, err := d.used()
	if err != nil {
		return nil, err
	}
	go func() {
		defer close(m.done)
		ticks := time.NewTicker(10 * time.Millisecond)
		defer ticks.Stop()
		for {
			m.sample(start)
			select {
			case <-m.stop:
				return
			case <-ticks.C:
			}
		}
	}()
	return m, nil
}

// end stops the meter.
func (m *meter) end() (peak, error) {
	close(m.stop)
	<-m.done
	return m.peak, m.err
}

func (m *meter) sample(start int64) {
	used, err := m.disk.used()
	m.err = errors.Join(m.err, err)
	m.peak.disk = max(m.peak.disk, used-start)
	var anon, resident int64
	for _, root := range m.roots {
		for _, pid := range descendants(root) {
			if m.known[pid] {
				continue
			}
			s := statusOf(pid)
			if s["Name"] == "criu" {
				continue
			}
			anon += kilobytes(s["RssAnon"])
			resident += kilobytes(s["VmRSS"])
		}
	}
	m.peak.anon, m.peak.resident = max(m.peak.anon, anon), max(m.peak.resident, resident)
}

// descendants are a process and those that it and its children have started. One that ends meanwhile is left out.
func descendants(pid int) []int {
	all := []int{pid}
	tasks := fmt.Sprintf("/proc/%d/task", pid)
	threads, _ := os.ReadDir(tasks) // none of a process that has ended
	for _, thread := range threads {
		// Not by a pattern: for one all that /proc has of the thread is listed, and the processors are for what is measured.
		content, err := os.ReadFile(filepath.Join(tasks, thread.Name(), "children"))
		if err != nil {
			continue
		}
		for field := range strings.FieldsSeq(string(content)) {
			if child, err := strconv.Atoi(field); err == nil {
				all = append(all, descendants(child)...)
			}
		}
	}
	return all
}

// statusOf is /proc/PID/status, empty if there is none.
func statusOf(pid int) map[string]string {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil
	}
	fields := map[string]string{}
	for lines := bufio.NewScanner(bytes.NewReader(content)); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		fields[name] = strings.TrimSpace(value)
	}
	return fields
}

// kilobytes reads a size as the kernel writes it, and returns bytes.
func kilobytes(value string) int64 {
	number, err := strconv.ParseInt(strings.TrimSuffix(value, " kB"), 10, 64)
	if err != nil {
		return 0
	}
	return number << 10
}

// bytesWritten is what processes have given the kernel to write to a disk so far, with those of their children that they have waited for.
// What is never written, because its file was removed in time, is in it.
func bytesWritten(pids ...int) (int64, error) {
	var sum int64
	for _, pid := range pids {
		content, err := os.ReadFile(fmt.Sprintf("/proc/%d/io", pid))
		if err != nil {
			return 0, err
		}
		_, after, found := strings.Cut(string(content), "\nwrite_bytes: ")
		value, _, _ := strings.Cut(after, "\n")
		number, err := strconv.ParseInt(value, 10, 64)
		if !found || err != nil {
			return 0, fmt.Errorf("read /proc/%d/io: %q", pid, content)
		}
		sum += number
	}
	return sum, nil
}

// hostPid finds the host's id of a process that a node knows by pid.
func hostPid(n *node.Node, pid int) (int, error) {
	namespace, err := os.Readlink(n.Path(fmt.Sprintf("/proc/%d/ns/mnt", pid)))
	if err != nil {
		return 0, err
	}
	all, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return 0, err
	}
	for _, dir := range all {
		if its, err := os.Readlink(dir + "/ns/mnt"); err != nil || its != namespace {
			continue
		}
		host, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return 0, err
		}
		// The host's, the node's, and where it has one the container's.
		if ids := strings.Fields(statusOf(host)["NSpid"]); len(ids) > 1 && ids[1] == strconv.Itoa(pid) {
			return host, nil
		}
	}
	return 0, fmt.Errorf("find process %d of the node: it is not there", pid)
}

// parentOf is the id, on the host, of the parent of a process of the host.
func parentOf(pid int) (int, error) { return strconv.Atoi(statusOf(pid)["PPid"]) }

// processorTime is what the threads that a process has now have run.
func processorTime(pid int) (time.Duration, error) {
	lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/schedstat", pid))
	if err != nil || len(lists) == 0 {
		return 0, errors.Join(fmt.Errorf("read processor time of process %d: it has ended", pid), err)
	}
	var sum time.Duration
	for _, list := range lists {
		content, err := os.ReadFile(list)
		if err != nil {
			continue // a thread that has ended
		}
		run, _, _ := strings.Cut(string(content), " ")
		nanoseconds, err := strconv.ParseInt(run, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read %s: %w", list, err)
		}
		sum += time.Duration(nanoseconds)
	}
	return sum, nil
}
