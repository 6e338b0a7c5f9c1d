package main

import (
	"path/filepath"
	"strings"
	"testing"
)

func TestNamesOfContainers(t *testing.T) {
	web := target{strings.Repeat("ab", 32), "default", "web", "app"}
	side := target{"ac" + strings.Repeat("0", 62), "default", "web", "sidecar"}
	other := target{"d" + strings.Repeat("1", 63), "kube-system", "web", "app"}
	all := []target{web, side, other}
	for _, test := range []struct {
		name string
		want []target
		err  string
		code int
	}{
		{web.id, []target{web}, "", 0},
		{"ab", []target{web}, "", 0},
		{"d", []target{other}, "", 0},
		{"a", nil, `"a" may be any of abababababab (default/web/app), ac0000000000 (default/web/sidecar): write more`, 1},
		{"default/web/app", []target{web}, "", 0},
		{"default/web", []target{web, side}, "", 0},
		{"kube-system/web", []target{other}, "", 0},
		{"default/web/none", nil, `no container runs that is called "default/web/none"`, 1},
		{"web", nil, `no container runs that is called "web"`, 1},
		// Whatever the runtime says of it.
		{"0123456789ab", []target{{id: "0123456789ab"}}, "", 0},
		{"", nil, `"" names no container`, 2},
		{"/web", nil, `"/web" names no container`, 2},
		{"a/b/c/d", nil, "names no container: it is an id, namespace/pod/container, or namespace/pod", 2},
	} {
		got, err := resolve(all, test.name)
		code := 0
		if err != nil {
			code = exitCode(err)
		}
		if len(got) != len(test.want) || code != test.code || err != nil && !strings.Contains(err.Error(), test.err) {
			t.Errorf("%q is %v, %v (exit code %d); want %v, %q, %d", test.name, got, err, code, test.want, test.err, test.code)
			continue
		}
		for i := range got {
			if got[i] != test.want[i] {
				t.Errorf("%q is %v, want %v", test.name, got, test.want)
			}
		}
	}
}

func TestExitCodesOfCommands(t *testing.T) {
	absent := filepath.Join(t.TempDir(), "absent.sock")
	sockets := []string{"--admin-socket", absent, "--listen", absent}
	for name, test := range map[string]struct {
		args []string
		code int
		says string
	}{
		"nobody there, list":       {append([]string{"list"}, sockets...), 3, "is it running"},
		"nobody there, checkpoint": {append([]string{"checkpoint", "a/b"}, sockets...), 3, "is it running"},
		"nobody there, check":      {append([]string{"check"}, sockets...), 3, "is it running"},
		"nobody there, cancel":     {append([]string{"cancel", "x"}, sockets...), 3, "is it running"},
		"nobody there, delete":     {append([]string{"delete", "x"}, sockets...), 3, "is it running"},
		"no container":             {[]string{"checkpoint"}, 2, "accepts 1 arg(s), received 0: see crishim checkpoint --help"},
		"two containers":           {[]string{"check", "a", "b"}, 2, "see crishim check --help"},
		"no id":                    {[]string{"cancel"}, 2, "see crishim cancel --help"},
		"a flag of nowhere":        {[]string{"list", "--fast"}, 2, "unknown flag: --fast"},
		"a form of nowhere":        {[]string{"list", "--output", "yaml"}, 2, `--output "yaml": it is table or json`},
		"no configuration file":    {[]string{"list", "--config", absent}, 2, "read configuration"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, test.args...)
			if err == nil || exitCode(err) != test.code || !strings.Contains(err.Error(), test.says) || strings.Contains(out+err.Error(), "Usage:") {
				t.Errorf("exit code %d with %q, %v; want %d with %q", exitCode(err), out, err, test.code, test.says)
			}
		})
	}
}

// Whoever looks for the exit codes finds them, and an example, in the help of each command.
func TestHelpHasExamplesAndExitCodes(t *testing.T) {
	for _, name := range []string{"checkpoint", "list", "cancel", "delete", "check"} {
		out, err := execute(t, name, "--help")
		if err != nil || !strings.Contains(out, "\nExamples:\n  crishim "+name) || !strings.Contains(out, exitCodes) {
			t.Errorf("%s --help: %v\n%s", name, err, out)
		}
	}
}

func TestCompletionScripts(t *testing.T) {
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if out, err := execute(t, "completion", shell); err != nil || !strings.Contains(out, "crishim") {
			t.Errorf("completion %s: %v, %d bytes", shell, err, len(out))
		}
	}
}
