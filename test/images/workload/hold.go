package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

// A kind sets something up that a checkpoint has to keep, and returns how its state is told.
//
// The state is made anew at each question from the thing itself: what was set up is read back, not remembered. It is
// canonical: whatever may differ between two questions about the same thing (a counter, the time that a timer has left, the
// address of a mapping) is told as a verdict, such as "armed". So the state before a checkpoint, after it and in the restored
// container is the same string, or something was lost.
type kind func(argument string) (state func() (string, error), err error)

// kinds are those that hold knows, by name.
func kinds() map[string]kind {
	return map[string]kind{
		// memory.go
		"memory":         memory,
		"mapped-private": mappedPrivate,
		"mapped-shared":  mappedShared,
		"memfd":          memfd,
		"swapped":        swapped,
		"hugetlb":        hugetlb,
		"protections":    protections,
		"shared-memory":  sharedMemory,
		"sysv":           sysv,
		// processes.go
		"family":   family,
		"threads":  threads,
		"identity": identity,
		"limits":   limits,
		"denied":   denied,
		// signals.go
		"pending":      pendingSignals,
		"dispositions": dispositions,
		"timers":       timers,
		"alarm":        alarm,
		// descriptors.go
		"files":     files,
		"pipes":     pipes,
		"eventfd":   eventfd,
		"semaphore": semaphore,
		"due":       due,
		"epoll":     epoll,
		"signalfd":  signalfd,
		"timerfd":   timerfd,
		"locks":     locks,
		"ptys":      ptys,
		// sockets.go
		"unix":      unixSockets,
		"passing":   passing,
		"waiting":   waiting,
		"peer-name": peerName,
		// inet.go
		"tcp": tcpSockets,
		"udp": udpSockets,
		// outside.go
		"outside":   outside,
		"datagrams": datagrams,
		"backlog":   backlog,
		"serving":   serving,
		// streams.go
		"stdin":    stdin,
		"terminal": terminal,
		"lines":    lines,
		// mounts.go
		"mounts": mounts,
		"tmpfs":  tmpfs,
		"device": device,
		// files.go
		"tree": tree,
		// make.go
		"content":           content,
		"changes":           changes,
		"special":           made(special),
		"sparse":            made(sparse),
		"attributes":        made(attributes),
		"owners":            made(owners),
		"names":             made(names),
		"deep":              made(deep),
		"many":              made(many),
		"deleted":           deleted,
		"deleted-name":      deletedName,
		"renamed":           renamed,
		"replaced":          replaced,
		"image-file":        imageFile,
		"working-directory": workingDirectory,
	}
}

// hold sets up KIND[=ARGUMENT]…, in that order, says "holding" and then, each time it gets SIGUSR1, "state" with a JSON object
// of the states by what it was asked to hold.
func hold(args []string) error {
	questions := make(chan os.Signal, 1)
	signal.Notify(questions, syscall.SIGUSR1)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	states := make([]func() (string, error), len(args))
	for i, arg := range args {
		name, argument, _ := strings.Cut(arg, "=")
		setUp := kinds()[name]
		if setUp == nil {
			return fmt.Errorf("unknown kind %q", name)
		}
		var err error
		if states[i], err = setUp(argument); err != nil {
			return fmt.Errorf("set up %s: %w", arg, err)
		}
	}
	fmt.Println("holding")
	for {
		select {
		case <-end:
			return nil
		case <-questions:
		}
		answers := map[string]string{}
		for i, arg := range args {
			answers[arg] = tell(states[i])
		}
		content, err := json.Marshal(answers)
		if err != nil {
			return err
		}
		fmt.Printf("state %s\n", content)
	}
}

// tell gives a state, or the reason why there is none, which differs from every state.
func tell(state func() (string, error)) string {
	answer, err := state()
	if err != nil {
		return strings.TrimSpace(answer + " lost: " + err.Error())
	}
	return answer
}

// A process is a further process of the workload, which holds something by itself. It is asked over a pair of pipes.
type process struct {
	pid     int
	ask     io.Writer
	answers *bufio.Reader
}

// parts are what such processes hold, by name.
func parts() map[string]kind {
	return map[string]kind{
		"nothing": func(string) (func() (string, error), error) {
			return func() (string, error) { return "here", nil }, nil
		},
		"family":  familyPart,
		"memory":  memory,
		"pending": pendingPart,
		"shared":  sharedPart,
	}
}

// part is the command that start runs: it holds one thing, and tells its state for each line that it reads. It ends with its input.
func part(args []string) error {
	if len(args) != 2 || parts()[args[0]] == nil {
		return errors.New("usage: workload part PART ARGUMENT")
	}
	state, err := parts()[args[0]](args[1])
	if err != nil {
		return fmt.Errorf("set up part %s: %w", args[0], err)
	}
	fmt.Println("ready")
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		fmt.Println(tell(state))
	}
	return nil
}

// start starts a part with further descriptors from 3 on, and waits until it is set up.
//
// It is not for os/exec, which holds pidfds and waits: children are part of what is tested.
func start(name, argument string, sys *syscall.SysProcAttr, files ...int) (*process, error) {
	var in, out [2]int
	if err := errors.Join(syscall.Pipe2(in[:], syscall.O_CLOEXEC), syscall.Pipe2(out[:], syscall.O_CLOEXEC)); err != nil {
		return nil, err
	}
	descriptors := []uintptr{uintptr(in[0]), uintptr(out[1]), 2}
	for _, fd := range files {
		descriptors = append(descriptors, uintptr(fd))
	}
	pid, err := syscall.ForkExec("/proc/self/exe", []string{"workload", "part", name, argument},
		&syscall.ProcAttr{Env: os.Environ(), Files: descriptors, Sys: sys})
	if err := errors.Join(err, syscall.Close(in[0]), syscall.Close(out[1])); err != nil {
		return nil, fmt.Errorf("start part %s: %w", name, err)
	}
	p := &process{pid: pid, ask: os.NewFile(uintptr(in[1]), "questions"), answers: bufio.NewReader(os.NewFile(uintptr(out[0]), "answers"))}
	if line, err := p.answers.ReadString('\n'); line != "ready\n" {
		return nil, fmt.Errorf("start part %s: it says %q, %w", name, line, err)
	}
	return p, nil
}

// state asks the part.
func (p *process) state() (string, error) {
	if _, err := io.WriteString(p.ask, "state\n"); err != nil {
		return "", fmt.Errorf("ask process %d: %w", p.pid, err)
	}
	line, err := p.answers.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("hear process %d: %w", p.pid, err)
	}
	return strings.TrimSuffix(line, "\n"), nil
}
