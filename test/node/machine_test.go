package node_test

import (
	"bytes"
	"path/filepath"
	"strings"
	"testing"

	"crishim/test/node"
)

func TestMachineTellsHowItEnded(t *testing.T) {
	node.RequireRoot(t, testing.Short())
	source, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		name, command string
		code          int
		wrong         string
	}{
		{"exit code", "cat /proc/1/comm; exit 3", 3, ""},
		{"panic", "cat /proc/1/comm; echo 1 >/proc/sys/kernel/sysrq; echo c >/proc/sysrq-trigger; sleep 60", 0, "kernel panicked"},
	} {
		t.Run(test.name, func(t *testing.T) {
			t.Parallel()
			var out bytes.Buffer
			m := node.Machine{Source: source, Dir: "/", Args: []string{"/bin/sh", "-c", test.command}, Output: &out}
			code, err := m.Run(t.Context())
			if out.String() != "systemd\n" {
				t.Errorf("the command wrote %q", out.String())
			}
			switch {
			case test.wrong == "" && (err != nil || code != test.code):
				t.Errorf("got exit code %d, %v, want %d", code, err, test.code)
			case test.wrong != "" && (err == nil || !strings.Contains(err.Error(), test.wrong)):
				t.Errorf("error is %v, want %q", err, test.wrong)
			}
		})
	}
}
