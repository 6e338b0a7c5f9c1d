package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// What is printed is what is installed, and it is valid.
func TestTheDefaultConfiguration(t *testing.T) {
	installed, err := os.ReadFile("../../systemd/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	out, err := execute(t, "config", "default")
	if err != nil || out != string(installed) {
		t.Errorf("config default prints %v\n%s", err, out)
	}
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	// In between it names the variables of the tests' own.
	out, err = execute(t, "config", "check", "--config", file)
	if err != nil || !strings.HasPrefix(out, "read "+file+"\n") || !strings.HasSuffix(out, "\nok\n") {
		t.Errorf("config check prints %v\n%s", err, out)
	}
}

func TestConfigurationThatIsWrong(t *testing.T) {
	for content, want := range map[string]string{
		"a = 1\nb = 2\n":                  ":2: there is no key b",
		"listen = \"tcp://127.0.0.1:1\"":  "only unix sockets are possible",
		"runtime_endpoint = \"relative\"": "an absolute path is needed",
	} {
		file := filepath.Join(t.TempDir(), "config.toml")
		if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		for _, command := range [][]string{{"config", "check"}, {"serve"}} {
			if out, err := execute(t, append(command, "--config", file)...); err == nil || !strings.Contains(err.Error(), want) || exitCode(err) != 1 {
				t.Errorf("%q of %q: the error is %v, want one with %q; it prints %s", command, content, err, want, out)
			}
		}
	}
	missing := filepath.Join(t.TempDir(), "config.toml")
	if _, err := execute(t, "serve", "--config", missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a file that was named and is missing: %v", err)
	}
}

func TestConfigShow(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte("\ncriu = \"/opt/criu\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("CRISHIM_CHECKPOINT_PARALLEL", "9")
	out, err := execute(t, "config", "show", "--config", file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(out), " ")
	for _, want := range []string{`criu = "/opt/criu" # ` + file + ":2", "checkpoint.parallel = 9 # CRISHIM_CHECKPOINT_PARALLEL in the environment", `log_level = "info" # default`} {
		if !strings.Contains(text, want) {
			t.Errorf("config show does not say %q:\n%s", want, out)
		}
	}
}
