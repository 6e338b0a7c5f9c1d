package criu

import (
	"os"
	"strings"
	"testing"
)

// The document is for users, the table for CRIU's log: they must say the same. shim/checkpoint's tests bring each row about.
func TestLimitsAreDocumented(t *testing.T) {
	content, err := os.ReadFile("../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	codes := map[Kind]string{Unsupported: "FailedPrecondition", Busy: "Aborted", NoSpace: "ResourceExhausted"}
	for _, l := range limits {
		if row := "\n| " + l.Name + " | " + codes[l.Kind] + " | " + l.Advice + " |"; strings.Count(string(content), row) != 1 {
			t.Errorf("docs/limits.md lacks the row %s", row)
		}
		if l.pattern == nil && limit(l.Name).Name != l.Name {
			t.Errorf("%s cannot be found", l.Name)
		}
	}
}
