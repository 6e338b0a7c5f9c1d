package main

import (
	"bytes"
	"strings"
	"testing"
)

// execute runs the command line and returns what it prints.
func execute(t *testing.T, args ...string) (string, error) {
	t.Helper()
	var out bytes.Buffer
	root := rootCommand()
	root.SetArgs(args)
	root.SetOut(&out)
	root.SetErr(&out)
	err := root.ExecuteContext(t.Context())
	return out.String(), err
}

func TestHelpNamesWhatIsThere(t *testing.T) {
	for _, test := range []struct {
		args []string
		want []string
	}{
		{[]string{"--help"}, []string{"serve", "version", "inspect", "diff", "every call goes through to the runtime untouched"}},
		{[]string{"serve", "--help"}, []string{"--config", "--listen", "--runtime-endpoint", "--criu", "--state-dir", "--log-level",
			"unix:///run/crishim/crishim.sock", "unix:///run/containerd/containerd.sock", "--container-runtime-endpoint"}},
	} {
		out, err := execute(t, test.args...)
		if err != nil {
			t.Errorf("%q: %v", test.args, err)
		}
		for _, want := range test.want {
			if !strings.Contains(out, want) {
				t.Errorf("%q does not say %q:\n%s", test.args, want, out)
			}
		}
		if strings.Contains(out, "checkpoint-helper") {
			t.Errorf("%q offers the helper to people", test.args)
		}
	}
}

func TestVersion(t *testing.T) {
	out, err := execute(t, "version")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"crishim " + version, "commit  " + commit, "go      go1.", "go-criu v7."} {
		if !strings.Contains(out, want) {
			t.Errorf("version does not say %q:\n%s", want, out)
		}
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"serve", "--log-level", "loud"}, "--log-level"},
		{[]string{"serve", "--listen", "tcp://127.0.0.1:1"}, "only unix sockets are possible"},
		{[]string{"serve", "--runtime-endpoint", "containerd.sock"}, "an absolute path is needed"},
		{[]string{"serve", "--compression", "gzip"}, `compression "gzip": it is none or zstd`},
		{[]string{"serve", "--digest", "md5"}, `digest "md5": it is sha256 or none`},
		{[]string{"serve", "now"}, "now"},
		{[]string{"no-such-command"}, "no-such-command"},
	} {
		out, err := execute(t, test.args...)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%q: error is %v, want one with %q", test.args, err, test.want)
		}
		if strings.Contains(out, "Usage:") {
			t.Errorf("%q: the error is lost in a page of usage", test.args)
		}
	}
}
