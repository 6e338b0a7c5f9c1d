package checkpoint

import (
	"testing"

	"google.golang.org/protobuf/proto"

	"crishim/criu"
)

// A process may have any bytes for its name. They must not keep the reason of a failure from reaching the daemon.
func TestFailureOfAProcessWithAnOddName(t *testing.T) {
	f := failure(&criu.Error{Cause: "caf\xe9", Process: "pid 1 (caf\xe9)", Log: []string{"\xff", "plain"}})
	if _, err := proto.Marshal(f); err != nil {
		t.Fatal(err)
	}
	if want := "criu cannot dump the container, at pid 1 (caf?): caf?"; f.GetMessage() != want {
		t.Errorf("message is %q, want %q", f.GetMessage(), want)
	}
}
