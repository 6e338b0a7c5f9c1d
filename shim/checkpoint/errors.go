package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
	"crishim/shim/rootfs"
)

var (
	errInvalid   = errors.New("invalid request")
	errInFlight  = errors.New("a checkpoint of this container is in flight already")
	errStopped   = errors.New("checkpoint was stopped")
	errRepairing = errors.New("what is left of a checkpoint of this container is being put right: try again later")
	// errLeft says that something of an attempt could not be removed, or put right.
	errLeft = errors.New("clean up by hand, or restart crishim, which tries again")
)

// failureError is a Failure that the helper reported.
type failureError struct{ *crishimv1.Failure }

func (e failureError) Error() string { return e.GetMessage() }

// failure says in the helper why a checkpoint failed.
func failure(err error) *crishimv1.Failure {
	f := &crishimv1.Failure{Message: oneLine(err.Error(), maxMessage)}
	var dump *criu.Error
	kind := criu.Unknown
	if errors.As(err, &dump) {
		kind = dump.Kind()
		for _, line := range dump.Log {
			f.Log = append(f.Log, oneLine(line, maxLogLine))
		}
	}
	switch {
	case errors.Is(err, errStopped):
		f.Reason = crishimv1.Reason_REASON_CANCELLED
	case errors.Is(err, errFrozenTooLong):
		f.Reason = crishimv1.Reason_REASON_FROZEN_TOO_LONG
	case errors.Is(err, archive.ErrInvalidLocation):
		f.Reason = crishimv1.Reason_REASON_INVALID_LOCATION
	case errors.Is(err, archive.ErrExists):
		f.Reason = crishimv1.Reason_REASON_LOCATION_EXISTS
	case errors.Is(err, container.ErrNotRunning):
		f.Reason = crishimv1.Reason_REASON_NOT_RUNNING
	case errors.Is(err, errNoRoom), errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT), kind == criu.NoSpace:
		f.Reason = crishimv1.Reason_REASON_NO_SPACE
	case kind == criu.Unsupported, errors.Is(err, rootfs.ErrUnsupported), errors.Is(err, container.ErrUnsupported), errors.Is(err, unix.EROFS):
		f.Reason = crishimv1.Reason_REASON_UNSUPPORTED
	case kind == criu.Busy:
		f.Reason = crishimv1.Reason_REASON_BUSY
	}
	return f
}

const (
	maxMessage = 512 // characters of an answer
	maxLogLine = 200 // of a line of CRIU's log that goes with it; there are at most 20, and gRPC sends them in a header
)

// oneLine makes one line of an error, which may have several when it was joined, and may hold what the container has chosen, such as the name
// of a process: any bytes.
func oneLine(text string, limit int) string {
	text = strings.Map(func(r rune) rune {
		if r == utf8.RuneError || !unicode.IsPrint(r) {
			return '?'
		}
		return r
	}, strings.Join(strings.Fields(strings.ReplaceAll(strings.TrimSpace(text), "\n", "; ")), " "))
	if runes := []rune(text); len(runes) > limit {
		text = string(runes[:limit-1]) + "…"
	}
	return text
}

// Causes are all that can be counted of why checkpoints fail, each with its gRPC code. What the runtime answers has its own codes.
func Causes() map[string]codes.Code {
	return map[string]codes.Code{
		"deadline": codes.DeadlineExceeded, "frozen_too_long": codes.DeadlineExceeded, "cancelled": codes.Canceled, "shutdown": codes.Unavailable,
		"not_found": codes.NotFound, "no_room": codes.ResourceExhausted, "state_directory": codes.FailedPrecondition,
		"in_flight": codes.Aborted, "repairing": codes.Aborted, "busy": codes.Aborted, "criu": codes.FailedPrecondition,
		"invalid": codes.InvalidArgument, "exists": codes.AlreadyExists, "not_running": codes.FailedPrecondition,
		"unsupported": codes.FailedPrecondition, "runtime": codes.Unavailable, "internal": codes.Internal,
	}
}

// judge gives an error its gRPC code, and one of Causes.
func judge(err error) (code codes.Code, cause string) {
	var fromHelper failureError
	reason := crishimv1.Reason_REASON_UNSPECIFIED
	if errors.As(err, &fromHelper) {
		reason = fromHelper.GetReason()
	}
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		cause = "deadline"
	case reason == crishimv1.Reason_REASON_FROZEN_TOO_LONG:
		cause = "frozen_too_long"
	case errors.Is(err, context.Canceled):
		cause = "cancelled"
	case errors.Is(err, errDraining):
		cause = "shutdown"
	case errors.Is(err, container.ErrNotFound):
		cause = "not_found"
	case errors.Is(err, errJournal) && (errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)), reason == crishimv1.Reason_REASON_NO_SPACE:
		cause = "no_room"
	case errors.Is(err, errInFlight):
		cause = "in_flight"
	case errors.Is(err, errRepairing):
		cause = "repairing"
	case reason == crishimv1.Reason_REASON_BUSY:
		cause = "busy"
	case errors.Is(err, criu.ErrUnavailable):
		cause = "criu"
	case errors.Is(err, errInvalid), errors.Is(err, archive.ErrInvalidLocation), reason == crishimv1.Reason_REASON_INVALID_LOCATION:
		cause = "invalid"
	case errors.Is(err, archive.ErrExists), reason == crishimv1.Reason_REASON_LOCATION_EXISTS:
		cause = "exists"
	case errors.Is(err, container.ErrNotRunning), reason == crishimv1.Reason_REASON_NOT_RUNNING:
		cause = "not_running"
	case errors.Is(err, container.ErrUnsupported), reason == crishimv1.Reason_REASON_UNSUPPORTED:
		cause = "unsupported"
	case errors.Is(err, errJournal):
		cause = "state_directory"
	default:
		// The runtime's own answer, such as that it is away.
		if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
			return s.Code(), "runtime"
		}
		cause = "internal"
	}
	return Causes()[cause], cause
}

// toStatus makes an answer of an error, at the one place where errors become answers. Messages are all that the kubelet's
// user sees, in one line: the kubelet maps no codes.
func toStatus(err error) error {
	code, cause := judge(err)
	if cause == "criu" {
		// The kubelet's end-to-end test looks for these words, and skips where it finds them.
		err = fmt.Errorf("checkpoint/restore support not available: CRIU binary not found or too old (<%d). Failed to checkpoint container: %w",
			criu.MinVersion, err)
	}
	var fromHelper failureError
	_ = errors.As(err, &fromHelper)
	answer := status.New(code, oneLine(err.Error(), maxMessage))
	if log := fromHelper.GetLog(); len(log) > 0 {
		detail := &errdetails.DebugInfo{Detail: "the end of criu's log, all of which is in crishim's own at level debug", StackEntries: log}
		if with, err := answer.WithDetails(detail); err == nil {
			answer = with
		}
	}
	return answer.Err()
}
