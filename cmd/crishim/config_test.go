package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/pflag"

	"crishim/shim/checkpoint"
)

// configured is what serve would tell the daemon with a configuration file of this content.
func configured(t *testing.T, content string, args ...string) (*config, error) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	c := defaultConfig()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	c.register(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	err := c.load(file, true, flags)
	if err == nil {
		_, err = c.daemon()
	}
	return &c, err
}

func TestTheShippedFileHasTheDefaults(t *testing.T) {
	content, err := os.ReadFile("../../systemd/config.toml")
	if err != nil {
		t.Fatal(err)
	}
	var shipped config // what the file leaves out stays empty
	if err := shipped.load("../../systemd/config.toml", true, pflag.NewFlagSet("", pflag.ContinueOnError)); err != nil {
		t.Fatal(err)
	}
	if shipped != defaultConfig() {
		t.Errorf("the file has %+v, the defaults are %+v", shipped, defaultConfig())
	}
	if _, err := configured(t, string(content)); err != nil {
		t.Error(err)
	}
}

func TestConfigurationOfTheDaemon(t *testing.T) {
	c, err := configured(t, `
listen = "/run/a"
runtime_endpoint = "/run/b"
criu = "/opt/criu"
log_level = "warn"
[checkpoint]
compression = "zstd"
digest = "none"
reserve = "20Gi"
reserve_inodes = "7.5%"
max_frozen = "1m30s"
parallel = 3
`)
	if err != nil {
		t.Fatal(err)
	}
	d, err := c.daemon()
	if err != nil {
		t.Fatal(err)
	}
	amount := func(text string) checkpoint.Amount {
		a, err := checkpoint.ParseAmount(text)
		if err != nil {
			t.Fatal(err)
		}
		return a
	}
	want := checkpoint.Bounds{Reserve: amount("20Gi"), ReserveInodes: amount("7.5%"), MaxFrozen: 90 * time.Second, Parallel: 3}
	if d.Listen != "/run/a" || d.RuntimeEndpoint != "/run/b" || d.Criu != "/opt/criu" || d.Archive.Compression != "zstd" || d.Archive.Digest != "none" || d.Bounds != want {
		t.Errorf("the daemon gets %+v", d)
	}
}

// Each flag wins over its key, also by saying what is the default.
func TestFlagsWin(t *testing.T) {
	const file = `
listen = "/file"
runtime_endpoint = "/file"
criu = "/file"
state_dir = "/file"
log_level = "error"
[checkpoint]
compression = "zstd"
digest = "none"
`
	for _, test := range []struct {
		flag, value string
		got         func(*config) string
	}{
		{"listen", "/flag", func(c *config) string { return c.Listen }},
		{"runtime-endpoint", "/flag", func(c *config) string { return c.RuntimeEndpoint }},
		{"criu", "criu", func(c *config) string { return c.Criu }},
		{"state-dir", "/flag", func(c *config) string { return c.StateDir }},
		{"log-level", "info", func(c *config) string { return c.LogLevel }},
		{"compression", "none", func(c *config) string { return c.Checkpoint.Compression }},
		{"digest", "sha256", func(c *config) string { return c.Checkpoint.Digest }},
	} {
		without, err := configured(t, file)
		if err != nil {
			t.Fatal(err)
		}
		with, err := configured(t, file, "--"+test.flag, test.value)
		if err != nil {
			t.Fatal(err)
		}
		if test.got(with) != test.value || test.got(without) == test.value {
			t.Errorf("%s is %q with the flag, and %q without", test.flag, test.got(with), test.got(without))
		}
	}
}

func TestMistakesInTheFileAreNamed(t *testing.T) {
	for content, want := range map[string]string{
		"listn = \"/run/a\"\n\n[checkpoint]\nreserved = \"1%\"\n": "line 1: there is no key listn; line 4: there is no key checkpoint.reserved",
		"[chekpoint]\nreserve = \"1%\"":                           "line 1: there is no key chekpoint",
		"listen = 3":                                              "line 1: listen: it cannot be of the type integer",
		"[checkpoint]\nparallel = \"3\"":                          "line 2: checkpoint.parallel: it cannot be of the type string",
		"checkpoint = 3":                                          "line 1: checkpoint: it cannot be of the type integer",
		"criu = \"a\"\ncriu = \"b\"":                              "line 2: criu: key criu is already defined",
		"[checkpoint\n":                                           "line 1: ",
		"log_level = \"loud\"":                                    `log_level (--log-level) "loud": it is debug, info, warn or error`,
		"[checkpoint]\nreserve = \"101%\"":                        `checkpoint.reserve "101%": a percentage is from 0% to 100%`,
		"[checkpoint]\nreserve_inodes = \"some\"":                 `checkpoint.reserve_inodes "some": it is a percentage, such as 15%, or a number`,
		"[checkpoint]\nmax_frozen = \"10\"":                       `checkpoint.max_frozen "10": it is a duration`,
		"[checkpoint]\nmax_frozen = \"-1s\"":                      `checkpoint.max_frozen "-1s"`,
		"[checkpoint]\nparallel = 0":                              "checkpoint.parallel 0: it is 1 or more",
	} {
		if _, err := configured(t, content); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%q: error is %v, want a line with %q", content, err, want)
		}
	}
}

func TestWhichFileIsRead(t *testing.T) {
	missing := filepath.Join(t.TempDir(), "config.toml")
	if _, err := execute(t, "serve", "--config", missing); err == nil || !strings.Contains(err.Error(), missing) {
		t.Errorf("a file that was named and is missing: %v", err)
	}
	c := defaultConfig()
	if err := c.load(missing, false, pflag.NewFlagSet("", pflag.ContinueOnError)); err != nil || c != defaultConfig() {
		t.Errorf("a default file that is missing: %+v, %v", c, err)
	}
	if err := c.load(t.TempDir(), false, pflag.NewFlagSet("", pflag.ContinueOnError)); err == nil {
		t.Error("a default file that cannot be read is passed over")
	}
}
