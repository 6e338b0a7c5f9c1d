package node_test

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"crishim/systemd"
	"crishim/test/node"
)

// A crishim in a node is as confined as the shipped unit has it, so that all tests with nodes show that it can do with that.
func TestCrishimIsConfinedAsByItsUnit(t *testing.T) {
	binary := node.Crishim(t)
	n := node.StartContainerdFor(t, node.Options{})
	crishim, err := n.StartCrishim(t.Context(), binary)
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", crishim.Pid()))
	if err != nil {
		t.Fatal(err)
	}
	status := string(content)
	for _, want := range []string{"\nNoNewPrivs:\t1\n", "\nUmask:\t0077\n"} {
		if !strings.Contains(status, want) {
			t.Errorf("its status lacks %q", want)
		}
	}
	_, bounding, _ := strings.Cut(status, "\nCapBnd:\t")
	set, err := strconv.ParseUint(bounding[:16], 16, 64)
	if err != nil {
		t.Fatal(err)
	}
	if set == 0 || set&(1<<unix.CAP_SYS_PTRACE) == 0 {
		t.Errorf("its bounding set is %x: it has too little", set)
	}
	for name, number := range map[string]int{"CAP_SYS_TIME": unix.CAP_SYS_TIME, "CAP_MKNOD": unix.CAP_MKNOD, "CAP_SYSLOG": unix.CAP_SYSLOG, "CAP_AUDIT_READ": unix.CAP_AUDIT_READ} {
		inUnit, err := regexp.MatchString(`(?m)^CapabilityBoundingSet=~.*\b`+name+`\b`, systemd.Service)
		if err != nil || !inUnit {
			t.Errorf("%s is not in the unit, %v: this test shows less than it should", name, err)
		}
		if set&(1<<number) != 0 {
			t.Errorf("its bounding set is %x: it has %s", set, name)
		}
	}
}
