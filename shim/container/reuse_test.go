package container

import (
	"errors"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
)

// A pid that has come to mean another process is told from the one that was described, also by the kernel's own doing.
func TestAPidThatIsUsedAgain(t *testing.T) {
	const last = "/proc/sys/kernel/ns_last_pid"
	file, err := os.OpenFile(last, os.O_WRONLY, 0)
	if err != nil {
		t.Skip("needs to choose pids: ", err)
	}
	file.Close()
	start := func() *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	end := func(cmd *exec.Cmd) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	first := start()
	pid := first.Process.Pid
	described, err := FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	pinned, err := described.Pin()
	if err != nil {
		t.Fatal(err)
	}
	defer pinned.Close()
	end(first)
	for tick := false; !tick; { // of the clock that start times are in
		cmd := start()
		p, err := FindProcess(cmd.Process.Pid)
		end(cmd)
		if err != nil {
			t.Fatal(err)
		}
		tick = p.StartTime != described.StartTime
	}
	for try := range 100 { // somebody else may take it
		if err := os.WriteFile(last, []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Fatal(err)
		}
		second := start()
		if second.Process.Pid != pid {
			end(second)
			if try == 99 {
				t.Fatalf("pid %d is not to be had again", pid)
			}
			continue
		}
		defer end(second)
		break
	}
	now, err := FindProcess(pid)
	if err != nil {
		t.Fatal(err)
	}
	if err := described.Verify(); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "is another process by now") {
		t.Errorf("verify a pid that is used again: %v, want ErrNotRunning", err)
	}
	if _, err := described.Pin(); !errors.Is(err, ErrNotRunning) {
		t.Errorf("pin a pid that is used again: %v, want ErrNotRunning", err)
	}
	// A pidfd tells even within one tick, where nothing else does.
	pinned.process = now
	if err := pinned.Verify(); !errors.Is(err, ErrNotRunning) || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("verify a pinned process whose pid is used again: %v, want ErrNotRunning", err)
	}
}
