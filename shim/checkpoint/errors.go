package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
)

var (
	errInvalid  = errors.New("invalid request")
	errInFlight = errors.New("a checkpoint of this container is in flight already")
	errStopped  = errors.New("checkpoint was stopped")
)

// failureError is a Failure that the helper reported.
type failureError struct{ *crishimv1.Failure }

func (e failureError) Error() string { return e.GetMessage() }

// failure says in the helper why a checkpoint failed.
func failure(err error) *crishimv1.Failure {
	// A process may have any bytes for its name, and protobuf has only UTF-8 for strings.
	f := &crishimv1.Failure{Message: strings.ToValidUTF8(err.Error(), "?")}
	var dump *criu.Error
	if errors.As(err, &dump) {
		for _, line := range dump.Log {
			f.Log = append(f.Log, strings.ToValidUTF8(line, "?"))
		}
	}
	switch {
	case errors.Is(err, errStopped):
		f.Reason = crishimv1.Reason_REASON_CANCELLED
	case errors.Is(err, archive.ErrInvalidLocation):
		f.Reason = crishimv1.Reason_REASON_INVALID_LOCATION
	case errors.Is(err, archive.ErrExists):
		f.Reason = crishimv1.Reason_REASON_LOCATION_EXISTS
	case errors.Is(err, container.ErrNotRunning):
		f.Reason = crishimv1.Reason_REASON_NOT_RUNNING
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		f.Reason = crishimv1.Reason_REASON_NO_SPACE
	case dump != nil && dump.Unsupported():
		f.Reason = crishimv1.Reason_REASON_UNSUPPORTED
	}
	return f
}

// toStatus gives an error its gRPC code, at the one place where errors become answers. Messages are all that the kubelet's
// user sees: the kubelet maps no codes.
func toStatus(err error) error {
	var fromHelper failureError
	reason := crishimv1.Reason_REASON_UNSPECIFIED
	if errors.As(err, &fromHelper) {
		reason = fromHelper.GetReason()
	}
	code := codes.Internal
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		code = codes.DeadlineExceeded
	case errors.Is(err, context.Canceled):
		code = codes.Canceled
	case errors.Is(err, errDraining):
		code = codes.Unavailable
	case errors.Is(err, container.ErrNotFound):
		code = codes.NotFound
	case errors.Is(err, errInFlight):
		code = codes.Aborted
	case errors.Is(err, criu.ErrUnavailable):
		// The kubelet's end-to-end test looks for these words, and skips where it finds them.
		err = fmt.Errorf("checkpoint/restore support not available: CRIU binary not found or too old (<%d). Failed to checkpoint container: %w",
			criu.MinVersion, err)
		code = codes.FailedPrecondition
	case errors.Is(err, errInvalid), errors.Is(err, archive.ErrInvalidLocation), reason == crishimv1.Reason_REASON_INVALID_LOCATION:
		code = codes.InvalidArgument
	case errors.Is(err, archive.ErrExists), reason == crishimv1.Reason_REASON_LOCATION_EXISTS:
		code = codes.AlreadyExists
	case errors.Is(err, container.ErrNotRunning), errors.Is(err, container.ErrUnsupported),
		reason == crishimv1.Reason_REASON_NOT_RUNNING, reason == crishimv1.Reason_REASON_UNSUPPORTED:
		code = codes.FailedPrecondition
	case reason == crishimv1.Reason_REASON_NO_SPACE:
		code = codes.ResourceExhausted
	default:
		// The runtime's own answer, such as that it is away.
		if s, ok := status.FromError(err); ok && s.Code() != codes.OK {
			code = s.Code()
		}
	}
	return status.Error(code, err.Error())
}
