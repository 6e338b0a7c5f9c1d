package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// realArchive is one of those that a real container was checkpointed into.
func realArchive(name string) string { return "../../shim/archive/inspect/testdata/" + name }

func TestInspect(t *testing.T) {
	archive := realArchive("before.tar.zst")
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"a summary":             {nil, "memory      276 KiB of 4 processes"},
		"sections":              {[]string{"--sockets", "--needs"}, "tcp6      stream  listening  [::]:8080"},
		"a tree":                {[]string{"--output", "tree"}, "│   └── [1] sh ("},
		"JSON":                  {[]string{"-o", "json"}, `"name": "e\u001b[2Jvil"`},
		"an unknown form":       {[]string{"-o", "yaml"}, `--output "yaml": it is table, tree or json`},
		"a section of the tree": {[]string{"-o", "tree", "--files"}, "--output tree has all sections"},
		"no such file":          {[]string{archive + "-not"}, "accepts 1 arg(s)"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, append([]string{"inspect", archive}, test.args...)...)
			if err != nil {
				out += err.Error()
			}
			if !strings.Contains(out, test.want) {
				t.Errorf("it says\n%s, want %q", out, test.want)
			}
			if strings.Contains(out, "\x1b") {
				t.Error("the terminal would be told something by the container")
			}
		})
	}
}

// What a container has in its memory and on its command lines stays in the archive.
func TestInspectTellsNoSecrets(t *testing.T) {
	for _, args := range [][]string{
		{"inspect"}, {"inspect", "--processes", "--files", "--sockets", "--mounts", "--layer", "--needs"}, {"inspect", "-o", "tree"}, {"inspect", "-o", "json"},
		{"diff", realArchive("after.tar.zst")}, {"diff", "-o", "json", realArchive("after.tar.zst")},
	} {
		out, _ := execute(t, append(args, realArchive("before.tar.zst"))...) // of diff, which finds differences, an error
		if out == "" {
			t.Errorf("%q says nothing", args)
		}
		for _, secret := range []string{"PATH=", "1001", "mkfifo"} { // environment, and arguments of a process
			if strings.Contains(out, secret) {
				t.Errorf("%q tells %q", args, secret)
			}
		}
	}
}

func TestDiffExitCodes(t *testing.T) {
	before, after := realArchive("before.tar.zst"), realArchive("after.tar.zst")
	broken := archiveWith(t, soundMembers[:3]...)
	cut := filepath.Join(t.TempDir(), "cut.tar")
	whole, err := os.ReadFile(archiveWith(t, soundMembers...))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(cut, whole[:len(whole)-1200], 0o600); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		args []string
		code int
		says string // on standard output, or in the error
	}{
		"the same":        {[]string{before, before}, 0, "There is no difference."},
		"different":       {[]string{before, after}, 1, "~  /root/changed"},
		"different, JSON": {[]string{"-o", "json", before, after}, 1, `"/root/changed"`},
		"no such file":    {[]string{before, after + "-not"}, 2, "no such file"},
		"one archive":     {[]string{before}, 2, "accepts 2 arg(s)"},
		"no checkpoint":   {[]string{before, broken}, 2, "no checkpoint of a container"},
		"cut off":         {[]string{before, cut}, 2, "it is cut off"},
		"an unknown form": {[]string{"-o", "tree", before, after}, 2, `--output "tree": it is table or json`},
		"an unknown flag": {[]string{"--fast", before, after}, 2, "unknown flag"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, append([]string{"diff"}, test.args...)...)
			code := 0
			if err != nil {
				code = exitCode(err)
				out += err.Error()
			}
			if code != test.code || !strings.Contains(out, test.says) {
				t.Errorf("exit code %d with\n%s\nwant %d with %q", code, out, test.code, test.says)
			}
		})
	}
}
