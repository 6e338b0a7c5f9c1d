package checkpoint

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protodelim"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/failpoint"
)

// HelperCommand is the argument by which the binary, started again, becomes a helper.
const HelperCommand = "checkpoint-helper"

// runHelper runs one job in a helper process and returns when that has exited. The error is a failureError where the helper
// has answered, and wraps ctx's cause where ctx's end is what stopped it. What the helper says before its result is reported. The
// journal has a record of it for as long as the helper runs, and longer where something could not be removed; entry is what the history has of it.
func runHelper(ctx context.Context, journal *journal, job *crishimv1.Job, entry *crishimv1.Checkpoint, report func(*crishimv1.Event)) (*crishimv1.Result, error) {
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	}
	begin := time.Now()
	conn, theirs, err := socketpair()
	if err != nil {
		return nil, fmt.Errorf("start checkpoint helper: %w", err)
	}
	defer conn.Close()
	// The binary that runs now, even when another has been installed at its path since.
	cmd := exec.Command("/proc/self/exe", HelperCommand)
	cmd.Args[0] = os.Args[0]
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	cmd.Dir = "/"
	cmd.Stderr = os.Stderr
	cmd.ExtraFiles = []*os.File{theirs} // descriptor 3
	// A signal to our process group, as from a terminal, is not for the helper: it hears of our end from the socket.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	err = cmd.Start()
	theirs.Close()
	if err != nil {
		return nil, fmt.Errorf("start checkpoint helper: %w", err)
	}
	failpoint.Hit("helper started")
	// While the helper starts. It has nothing to undo before it gets its job, and ends without one.
	record, err := journal.begin(job, entry, cmd.Process.Pid, begin)
	if err != nil {
		conn.Close()
		_ = cmd.Wait()
		return nil, err
	}
	failpoint.Hit("recorded")
	if _, err := protodelim.MarshalTo(conn, job); err != nil {
		conn.Close()
		err = died(cmd, record, crishimv1.Phase_PHASE_UNSPECIFIED, fmt.Errorf("send job: %w", err))
		journal.end(record, errors.Is(err, errLeft))
		return nil, err
	}
	failpoint.Hit("job sent")
	// The end of the stream stops the helper; it still answers.
	stop := context.AfterFunc(ctx, func() { _ = conn.CloseWrite() })
	var phase crishimv1.Phase
	result, err := readResult(conn, func(e *crishimv1.Event) {
		if p := e.GetProgress(); p != nil {
			phase = p.GetPhase()
		}
		report(e)
	})
	stop()
	if err != nil {
		err = died(cmd, record, phase, err)
		journal.end(record, errors.Is(err, errLeft))
		return nil, err
	}
	failpoint.Hit("answered")
	// Its exit code says what its result has said.
	_ = cmd.Wait()
	failpoint.Hit("helper ended")
	journal.end(record, result.GetLeft())
	failpoint.Hit("record removed")
	f := result.GetFailure()
	switch {
	case f == nil:
		return result, nil
	case f.GetReason() == crishimv1.Reason_REASON_CANCELLED && ctx.Err() != nil:
		return nil, fmt.Errorf("%s: %w; the container runs on", f.GetMessage(), context.Cause(ctx))
	}
	return nil, failureError{f}
}

// died undoes what a helper has left that ended without an answer, as when the kernel killed it for want of memory, and says how
// matters stand. The error wraps errLeft where something is left.
func died(cmd *exec.Cmd, record *crishimv1.Record, phase crishimv1.Phase, cause error) error {
	_ = cmd.Process.Kill() // it is dead, or talks nonsense
	// The container stands still until criu has gone, whether anybody waits for the answer or not. As long as the helper has
	// not been waited for, its pid, which is its session's number, is nobody else's.
	ctx := context.Background()
	found, err := stopOrphan(ctx, record)
	done, undoErr := undo(ctx, record)
	err = errors.Join(err, undoErr)
	if waitErr := cmd.Wait(); waitErr != nil {
		cause = waitErr
	}
	runs := "the container runs on"
	if goneErr := processOf(record.GetJob().GetContainer()).Verify(); goneErr != nil {
		runs = goneErr.Error()
	}
	state := "it was not at work on the container"
	switch {
	case found && done == "":
		state = "criu was told to roll back and has ended; " + runs
	case found, phase == crishimv1.Phase_PHASE_DUMP, phase == crishimv1.Phase_PHASE_CAPTURE:
		// Nobody tells how a criu has ended that was not our child.
		state = "criu is gone, too; " + runs + mayHaveChanged
	case phase == crishimv1.Phase_PHASE_PUBLISH:
		state = runs + "; if there is an archive at the location, it is whole"
	case phase == crishimv1.Phase_PHASE_ASSEMBLE:
		state = runs
	}
	if done != "" {
		state = "crishim " + done + "; " + state
	}
	if err != nil {
		return fmt.Errorf("the checkpoint helper died (%w): %s; %w: %w", cause, state, errLeft, err)
	}
	return fmt.Errorf("the checkpoint helper died (%w): %s; nothing of the checkpoint is left: try again", cause, state)
}

// mayHaveChanged is said of a container whose criu has ended nobody knows how.
const mayHaveChanged = ", but may have been changed by criu: restart it if it misbehaves"

func readResult(conn io.Reader, report func(*crishimv1.Event)) (*crishimv1.Result, error) {
	reader := bufio.NewReader(conn)
	for {
		event := &crishimv1.Event{}
		if err := protodelim.UnmarshalFrom(reader, event); err != nil {
			return nil, err
		}
		if result := event.GetResult(); result != nil {
			return result, nil
		}
		report(event)
	}
}

// socketpair returns a connected pair: one end for this process, one to be handed to a child.
func socketpair() (*net.UnixConn, *os.File, error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	theirs := os.NewFile(uintptr(fds[1]), "helper's socket")
	conn, err := unixConn(fds[0])
	if err != nil {
		theirs.Close()
		return nil, nil, err
	}
	return conn, theirs, nil
}

// unixConn takes over a descriptor of a unix socket.
func unixConn(fd int) (*net.UnixConn, error) {
	file := os.NewFile(uintptr(fd), "socket")
	defer file.Close() // FileConn has made a copy
	conn, err := net.FileConn(file)
	if err != nil {
		return nil, fmt.Errorf("use socket: %w", err)
	}
	unixConn, ok := conn.(*net.UnixConn)
	if !ok {
		conn.Close()
		return nil, errors.New("use socket: not a unix socket")
	}
	return unixConn, nil
}
