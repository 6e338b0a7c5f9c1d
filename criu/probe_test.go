package criu

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

func TestParseVersion(t *testing.T) {
	for out, want := range map[string]int{
		"Version: 4.2.1\n": 40201,
		"Version: 3.16\n":  31600,
		"Version: 3.17.1\nGitID: v3.17-12-gabcdef\n": 31701,
		"noise before\nVersion: 4.0":                 40000,
	} {
		if got, err := parseVersion(out); err != nil || got != want {
			t.Errorf("parseVersion(%q) = %d, %v; want %d", out, got, err, want)
		}
	}
	for _, out := range []string{"", "criu", "Version: four", "Version: 99999999999999999999.1"} {
		if got, err := parseVersion(out); err == nil {
			t.Errorf("parseVersion(%q) = %d; want an error", out, got)
		}
	}
}

func TestVersionString(t *testing.T) {
	for version, want := range map[int]string{40201: "4.2.1", 31600: "3.16", 40000: "4.0"} {
		if got := versionString(version); got != want {
			t.Errorf("versionString(%d) = %s, want %s", version, got, want)
		}
	}
}

func TestParseCheck(t *testing.T) {
	out := `Error (criu/util.c:1503): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted
Warn  (criu/kerndat.c:1): something
Error (criu/cr-check.c:100): no soft-dirty tracking
Looks good but some kernel features are missing
`
	if got, want := parseCheck(out), []string{"no soft-dirty tracking"}; !slices.Equal(got, want) {
		t.Errorf("parseCheck = %q, want %q", got, want)
	}
}

// These are programs in criu's place, since a criu that is too old or broken cannot be had beside a good one.
func TestProbeOfFakeCriu(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: a criu that does not belong to root is refused")
	}
	tests := []struct {
		name, script, want string
		mode               os.FileMode
	}{
		{"too old", "echo 'Version: 3.15'", "criu 3.15 at %s is too old: 3.16 or later is needed", 0o755},
		{"does not start", "echo 'error while loading shared libraries' >&2; exit 127", "%s does not start: exit status 127: error while loading shared libraries", 0o755},
		{"another program", "echo hello", `%s: parse version: "hello" has no line "Version: X.Y"`, 0o755},
		{"open to others", "echo 'Version: 4.2'", "%s must belong to root and be writable by nobody else", 0o777},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "criu")
			if err := os.WriteFile(path, []byte("#!/bin/sh\n"+test.script+"\n"), test.mode); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, test.mode); err != nil {
				t.Fatal(err)
			}
			_, err := Probe(context.Background(), path)
			if !errors.Is(err, ErrUnavailable) {
				t.Fatalf("error is %v, want ErrUnavailable", err)
			}
			if want := "CRIU is not available: " + strings.ReplaceAll(test.want, "%s", path); err.Error() != want {
				t.Errorf("message is\n%s\nwant\n%s", err, want)
			}
		})
	}
}

func TestProbeWithoutCriu(t *testing.T) {
	_, err := Probe(context.Background(), filepath.Join(t.TempDir(), "criu"))
	if !errors.Is(err, ErrUnavailable) || !strings.Contains(err.Error(), "install the package criu") {
		t.Errorf("error is %v", err)
	}
}
