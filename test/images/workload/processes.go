package main

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	prSetName           = 15
	prSetChildSubreaper = 36
)

func prctl(option int, argument uintptr) error {
	if _, _, errno := syscall.Syscall(syscall.SYS_PRCTL, uintptr(option), argument, 0); errno != 0 {
		return fmt.Errorf("prctl %d: %w", option, errno)
	}
	return nil
}

// family is a tree of processes: groups, sessions, an orphan, one that is stopped, and a zombie.
func family(string) (func() (string, error), error) {
	// In a shared process namespace the orphan is ours nevertheless.
	if err := prctl(prSetChildSubreaper, 1); err != nil {
		return nil, err
	}
	var asked []*process
	for _, child := range []struct {
		shape string
		sys   syscall.SysProcAttr
	}{
		{"child", syscall.SysProcAttr{}},
		{"group", syscall.SysProcAttr{Setpgid: true}},
		{"session", syscall.SysProcAttr{Setsid: true}},
		{"orphan", syscall.SysProcAttr{}},
	} {
		p, err := start("family", child.shape, &child.sys)
		if err != nil {
			return nil, err
		}
		if child.shape == "orphan" {
			// What answers is its child.
			if err := reap(p.pid); err != nil {
				return nil, err
			}
		}
		asked = append(asked, p)
	}
	stopped, err := start("nothing", "", nil)
	if err != nil {
		return nil, err
	}
	if err := syscall.Kill(stopped.pid, syscall.SIGSTOP); err != nil {
		return nil, err
	}
	if err := waitForState(stopped.pid, "T"); err != nil {
		return nil, err
	}
	return func() (string, error) {
		var answers []string
		for _, p := range asked {
			answer, err := p.state()
			if err != nil {
				return "", err
			}
			answers = append(answers, answer)
		}
		tree, err := descendants()
		return strings.Join(answers, ", ") + ": " + strings.Join(tree, ", "), err
	}, nil
}

// familyPart is a process that has children of its own.
func familyPart(shape string) (func() (string, error), error) {
	var sys *syscall.SysProcAttr
	switch shape {
	case "session":
		sys = &syscall.SysProcAttr{Setpgid: true}
	case "orphan":
		_, err := syscall.ForkExec("/proc/self/exe", []string{"workload", "part", "nothing", ""},
			&syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
		if err != nil {
			return nil, err
		}
		os.Exit(0)
	}
	child, err := start("nothing", "", sys)
	if err != nil {
		return nil, err
	}
	zombie, err := start("nothing", "", nil)
	if err != nil {
		return nil, err
	}
	if err := syscall.Kill(zombie.pid, syscall.SIGKILL); err != nil {
		return nil, err
	}
	if err := waitForState(zombie.pid, "Z"); err != nil {
		return nil, err
	}
	return child.state, nil
}

func reap(pid int) error {
	for {
		if _, err := syscall.Wait4(pid, nil, 0, nil); !errors.Is(err, syscall.EINTR) {
			return err
		}
	}
}

// stat are the fields of /proc/PID/stat from the third on: state, parent, group, session, terminal, its foreground group.
func stat(pid int) (name string, fields []string, err error) {
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return "", nil, err
	}
	before, after, _ := strings.Cut(string(content), ") ")
	_, name, _ = strings.Cut(before, "(")
	return name, strings.Fields(after), nil
}

func waitForState(pid int, state string) error {
	for {
		_, fields, err := stat(pid)
		if err != nil || fields[0] == state {
			return err
		}
		runtime.Gosched()
	}
}

// descendants are this process's, one string each.
func descendants() ([]string, error) {
	names, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	about := map[int]string{}
	parents := map[int]int{}
	for _, path := range names {
		pid, err := strconv.Atoi(filepath.Base(path))
		if err != nil {
			return nil, err
		}
		name, fields, err := stat(pid)
		if err != nil {
			continue // it has ended meanwhile
		}
		if parents[pid], err = strconv.Atoi(fields[1]); err != nil {
			return nil, err
		}
		state := fields[0]
		if state != "Z" && state != "T" {
			state = "alive"
		}
		about[pid] = fmt.Sprintf("%d %s %s of parent %s, group %s, session %s", pid, name, state, fields[1], fields[2], fields[3])
	}
	var found []string
	for _, pid := range slices.Sorted(maps.Keys(about)) {
		for ancestor := parents[pid]; ancestor != 0; ancestor = parents[ancestor] {
			if ancestor == os.Getpid() {
				found = append(found, about[pid])
				break
			}
		}
	}
	return found, nil
}

// threads are ARGUMENT threads, each with a name and a priority.
func threads(argument string) (func() (string, error), error) {
	count, err := strconv.Atoi(argument)
	if err != nil {
		return nil, err
	}
	questions, answers := make([]chan struct{}, count), make(chan string)
	started := make(chan error)
	for i := range questions {
		questions[i] = make(chan struct{})
		go func() {
			// The thread is this goroutine's for good.
			runtime.LockOSThread()
			name, _ := syscall.BytePtrFromString(fmt.Sprintf("held-%d", i))
			started <- errors.Join(prctl(prSetName, uintptr(unsafe.Pointer(name))),
				syscall.Setpriority(syscall.PRIO_PROCESS, syscall.Gettid(), i%20))
			for range questions[i] {
				answers <- thread()
			}
		}()
	}
	for range questions {
		err = errors.Join(err, <-started)
	}
	return func() (string, error) {
		var all []string
		for _, question := range questions {
			question <- struct{}{}
			all = append(all, <-answers)
		}
		return strings.Join(all, ", "), nil
	}, err
}

// thread is what the calling thread says of itself.
func thread() string {
	tid := syscall.Gettid()
	name, err := os.ReadFile(fmt.Sprintf("/proc/self/task/%d/comm", tid))
	if err != nil {
		return err.Error()
	}
	// The system call gives 20 minus the value.
	priority, err := syscall.Getpriority(syscall.PRIO_PROCESS, tid)
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%d %s nice %d", tid, strings.TrimSpace(string(name)), 20-priority)
}

// identity is who the process is and what it may do, in all of its threads.
func identity(string) (func() (string, error), error) {
	interesting := []string{
		"Umask:", "Uid:", "Gid:", "Groups:", "SigIgn:", "CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:",
		"NoNewPrivs:", "Seccomp:", "Seccomp_filters:",
	}
	return func() (string, error) {
		files, err := filepath.Glob("/proc/self/task/*/status")
		if err != nil {
			return "", err
		}
		seen := map[string]bool{}
		for _, file := range files {
			content, err := os.ReadFile(file)
			if err != nil {
				return "", err
			}
			for line := range strings.Lines(string(content)) {
				if fields := strings.Fields(line); slices.Contains(interesting, fields[0]) {
					seen[strings.Join(fields, " ")] = true
				}
			}
		}
		for _, name := range []string{"personality", "oom_score_adj", "loginuid"} {
			content, err := os.ReadFile("/proc/self/" + name)
			if err != nil {
				return "", err
			}
			seen[name+": "+strings.TrimSpace(string(content))] = true
		}
		host, err := os.Hostname()
		seen["Hostname: "+host] = true
		return strings.Join(slices.Sorted(maps.Keys(seen)), ", "), err
	}, nil
}

// limits are resource limits, some of them lowered.
func limits(string) (func() (string, error), error) {
	for resource, limit := range map[int]syscall.Rlimit{
		syscall.RLIMIT_NOFILE: {Cur: 1500, Max: 2000}, syscall.RLIMIT_CORE: {Cur: 0, Max: 1 << 20}, syscall.RLIMIT_STACK: {Cur: 4 << 20, Max: 6 << 20},
		8 /* RLIMIT_MEMLOCK */ : {Cur: 64 << 10, Max: 1 << 20},
	} {
		var now syscall.Rlimit
		if err := syscall.Getrlimit(resource, &now); err != nil {
			return nil, err
		}
		limit.Max = min(limit.Max, now.Max)
		limit.Cur = min(limit.Cur, limit.Max)
		if err := syscall.Setrlimit(resource, &limit); err != nil {
			return nil, err
		}
	}
	return func() (string, error) {
		content, err := os.ReadFile("/proc/self/limits")
		return strings.Join(strings.Fields(string(content)), " "), err
	}, nil
}

// denied is what the process may not do: ARGUMENT is a list of actions.
func denied(argument string) (func() (string, error), error) {
	actions := map[string]func() error{
		"unshare": func() error { return inThread(func() error { return syscall.Unshare(syscall.CLONE_NEWUSER) }) },
		"write":   func() error { return os.WriteFile("/var/denied", nil, 0o600) },
		"chown":   func() error { return os.Chown("/lower", 1, 1) },
		"keys":    func() error { _, err := os.ReadFile("/proc/keys"); return err },
		"sysctl":  func() error { return os.WriteFile("/proc/sys/kernel/domainname", []byte("denied"), 0) },
		"bus":     func() error { return os.WriteFile("/proc/bus/denied", nil, 0) },
	}
	names := strings.Split(argument, ",")
	for _, name := range names {
		if actions[name] == nil {
			return nil, fmt.Errorf("unknown action %q", name)
		}
	}
	return func() (string, error) {
		var states []string
		for _, name := range names {
			states = append(states, fmt.Sprintf("%s: %v", name, actions[name]()))
		}
		return strings.Join(states, ", "), nil
	}, nil
}

// inThread calls f on a thread that ends afterwards.
func inThread(f func() error) error {
	result := make(chan error)
	go func() {
		runtime.LockOSThread()
		result <- f()
	}()
	return <-result
}
