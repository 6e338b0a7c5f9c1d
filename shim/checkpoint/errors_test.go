package checkpoint

import (
	"context"
	"errors"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
)

// A process may have any bytes for its name. They must not keep the reason of a failure from reaching the daemon.
func TestFailureOfAProcessWithAnOddName(t *testing.T) {
	f := failure(&criu.Error{Cause: "caf\xe9", Place: "process 1 (caf\xe9)", Log: []string{"\xff", "plain"}})
	if _, err := proto.Marshal(f); err != nil {
		t.Fatal(err)
	}
	if want := "criu cannot dump the container: process 1 (caf?): caf?"; f.GetMessage() != want {
		t.Errorf("message is %q, want %q", f.GetMessage(), want)
	}
}

func TestAnAnswerIsALine(t *testing.T) {
	long := strings.Repeat("a line\nand \x1b[31m\xff\u2028", 1000)
	for _, err := range []error{
		errors.New(long),
		errors.Join(errors.New("first"), context.Canceled, errors.New(long)),
		failureError{&crishimv1.Failure{Message: long}},
		status.Error(codes.Unavailable, long),
	} {
		text := status.Convert(toStatus(err)).Message()
		if utf8.RuneCountInString(text) > 512 || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' || r == '\u2028' || r == utf8.RuneError }) {
			t.Errorf("answer has %d bytes: %q", len(text), text)
		}
	}
	if text, want := oneLine("one\ntwo\n", 20), "one; two"; text != want {
		t.Errorf("two lines become %q, want %q", text, want)
	}
	if text, want := oneLine("123456", 5), "1234…"; text != want {
		t.Errorf("cut off, it is %q, want %q", text, want)
	}
}

func TestCodesOfFailures(t *testing.T) {
	for kind, want := range map[criu.Kind]codes.Code{
		criu.Unknown: codes.Internal, criu.Unsupported: codes.FailedPrecondition, criu.Busy: codes.Aborted, criu.NoSpace: codes.ResourceExhausted,
	} {
		dump := &criu.Error{Limit: &criu.Limit{Kind: kind}, Cause: "cause", Log: []string{"the end"}}
		answer := status.Convert(toStatus(failureError{failure(errors.Join(dump, errors.New("another")))}))
		if answer.Code() != want {
			t.Errorf("kind %d is %s, want %s", kind, answer.Code(), want)
		}
		if details := answer.Details(); len(details) != 1 || details[0].(*errdetails.DebugInfo).GetStackEntries()[0] != "the end" {
			t.Errorf("kind %d: details are %v, want the log", kind, details)
		}
	}
}

// Whatever is counted has a code, and the code is that of the answer.
func TestCausesOfFailures(t *testing.T) {
	reason := func(r crishimv1.Reason) error { return failureError{&crishimv1.Failure{Reason: r}} }
	for want, errs := range map[string][]error{
		"deadline":        {context.DeadlineExceeded},
		"frozen_too_long": {reason(crishimv1.Reason_REASON_FROZEN_TOO_LONG)},
		"cancelled":       {context.Canceled, ErrCancelled},
		"shutdown":        {errDraining},
		"not_found":       {container.ErrNotFound},
		"no_room":         {reason(crishimv1.Reason_REASON_NO_SPACE), refusal(unix.ENOSPC)},
		"state_directory": {refusal(unix.EROFS)},
		"in_flight":       {errInFlight},
		"repairing":       {errRepairing},
		"busy":            {reason(crishimv1.Reason_REASON_BUSY)},
		"criu":            {criu.ErrUnavailable},
		"invalid":         {errInvalid, archive.ErrInvalidLocation, reason(crishimv1.Reason_REASON_INVALID_LOCATION)},
		"exists":          {archive.ErrExists, reason(crishimv1.Reason_REASON_LOCATION_EXISTS)},
		"not_running":     {container.ErrNotRunning, reason(crishimv1.Reason_REASON_NOT_RUNNING)},
		"unsupported":     {container.ErrUnsupported, reason(crishimv1.Reason_REASON_UNSUPPORTED)},
		"runtime":         {status.Error(codes.Unavailable, "away")},
		"internal":        {errors.New("whatever"), reason(crishimv1.Reason_REASON_UNSPECIFIED)},
	} {
		for _, err := range errs {
			if code, cause := judge(err); cause != want || code != Causes()[want] || status.Code(toStatus(err)) != code {
				t.Errorf("%v is %s, %s, answered with %s; want %s", err, cause, code, status.Code(toStatus(err)), want)
			}
		}
	}
	if code, cause := judge(status.Error(codes.Unimplemented, "odd")); code != codes.Unimplemented || cause != "runtime" {
		t.Errorf("the runtime's own answer is %s, %s", code, cause)
	}
}
