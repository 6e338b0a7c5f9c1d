package config

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"

	"crishim/shim/checkpoint"
	"crishim/shim/retention"
	"crishim/systemd"
)

// written makes files of these contents in a directory of their own, and returns the path of config.toml there.
func written(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return filepath.Join(dir, "config.toml")
}

// loaded loads one file of this content, with these variables and flags.
func loaded(t *testing.T, content string, environment []string, args ...string) (*Config, error) {
	t.Helper()
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	Register(flags)
	if err := flags.Parse(args); err != nil {
		t.Fatal(err)
	}
	return Sources{File: written(t, map[string]string{"config.toml": content}), Environment: environment, Flags: flags}.Load()
}

// The shipped file is where defaults and descriptions come from: it has to have each key, with a comment, and no other.
func TestTheShippedFileHasEachKey(t *testing.T) {
	var k Keys
	decoder := toml.NewDecoder(strings.NewReader(systemd.Config)).DisallowUnknownFields()
	if err := decoder.Decode(&k); err != nil {
		t.Fatal(err)
	}
	at, described := lines([]byte(systemd.Config)), comments(systemd.Config)
	seen := map[string]bool{}
	for _, key := range k.all() {
		if at[key.name] == 0 {
			t.Errorf("%s is missing", key.name)
		}
		if described[key.name] == "" {
			t.Errorf("%s has no comment", key.name)
		}
		if key.flag != "" && key.value.Kind() != reflect.String {
			t.Errorf("%s has a flag, and is no text", key.name)
		}
		if key.fixed != strings.Contains(described[key.name], "needs a restart") {
			t.Errorf("the comment of %s and crishim differ in whether a change needs a restart", key.name)
		}
		seen[key.name] = true
	}
	for name := range at {
		if !seen[name] {
			t.Errorf("%s is in the file twice, or not at all in crishim", name)
		}
	}
	if _, err := loaded(t, systemd.Config, nil); err != nil {
		t.Error(err)
	}
}

func TestWhatTheDaemonIsTold(t *testing.T) {
	c, err := loaded(t, `
listen = "/run/a"
log_level = "warn"
log_format = "json"
[checkpoint]
compression = "zstd"
digest = "none"
reserve = "20Gi"
reserve_inodes = "7.5%"
max_frozen = "1m30s"
parallel = 3
directories = ["/a", "/b"]
[retention]
directories = ["/a"]
max_per_container = 3
max_size = "10%"
max_age = "30d"
[shutdown]
checkpoints = "1m"
calls = "0s"
`, []string{"CRISHIM_CHECKPOINT_DIRECTORIES=/c:/d", "CRISHIM_RETENTION_DRY_RUN=true"})
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
	if c.Keys.Listen != "/run/a" || c.Keys.Criu != "criu" || c.Level.String() != "warning" || c.Archive.Compression != "zstd" ||
		c.Archive.Digest != "none" || c.Bounds != want || !slices.Equal(c.Keys.Checkpoint.Directories, []string{"/c", "/d"}) {
		t.Errorf("it is %+v", c)
	}
	if c.Shutdown.Checkpoints != time.Minute || c.Shutdown.Calls != 0 {
		t.Errorf("of the shutdown it is %+v", c.Shutdown)
	}
	if want := (retention.Policy{PerContainer: 3, Share: 0.1, Age: 30 * 24 * time.Hour}); c.Retention != want || !c.Keys.Retention.DryRun {
		t.Errorf("of retention it is %+v, want %+v", c.Retention, want)
	}
}

// Defaults, file, drop-ins by their names, environment, flags: what comes later wins, also by saying what is the default.
func TestWhoWins(t *testing.T) {
	file := written(t, map[string]string{
		"config.toml":                  "listen = \"/file\"\ncriu = \"/file\"\nstate_dir = \"/file\"\nlog_level = \"error\"\n",
		"config.d/20-b.toml":           "criu = \"/second\"\nlog_level = \"warn\"\n",
		"config.d/10-a.toml":           "criu = \"/first\"\nstate_dir = \"/first\"\n[checkpoint]\nparallel = 7\n",
		"config.d/README":              "no TOML",
		"config.d/.#30-c.toml":         "no TOML",
		"config.d/30-d.toml.dpkg-dist": "no TOML",
	})
	flags := pflag.NewFlagSet("serve", pflag.ContinueOnError)
	Register(flags)
	if err := flags.Parse([]string{"--log-level", "info", "--compression=none"}); err != nil {
		t.Fatal(err)
	}
	c, err := Sources{File: file, Flags: flags, Environment: []string{
		"CRISHIM_LOG_LEVEL=debug", "CRISHIM_CHECKPOINT_MAX_FROZEN=5s", "CRISHIM_CHECKPOINT_COMPRESSION=zstd", "CRISHIM_PORT=tcp://10.0.0.1:1", "PATH=/bin",
	}}.Load()
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Dir(file)
	for _, want := range []struct{ key, value, origin string }{
		{"listen", `"/file"`, file + ":1"},
		{"criu", `"/second"`, dir + "/config.d/20-b.toml:1"},
		{"state_dir", `"/first"`, dir + "/config.d/10-a.toml:2"},
		{"log_level", `"info"`, "--log-level"},
		{"runtime_endpoint", `"unix:///run/containerd/containerd.sock"`, "default"},
		{"checkpoint.compression", `"none"`, "--compression"},
		{"checkpoint.max_frozen", `"5s"`, "CRISHIM_CHECKPOINT_MAX_FROZEN in the environment"},
		{"checkpoint.parallel", "7", dir + "/config.d/10-a.toml:4"},
	} {
		keys := c.Keys.all()
		i := slices.IndexFunc(keys, func(k key) bool { return k.name == want.key })
		if got := keys[i].text(); got != want.value || c.origins[want.key] != want.origin {
			t.Errorf("%s is %s from %s, want %s from %s", want.key, got, c.origins[want.key], want.value, want.origin)
		}
	}
	if want := []string{file, dir + "/config.d/10-a.toml", dir + "/config.d/20-b.toml"}; !slices.Equal(c.Files, want) {
		t.Errorf("read were %q, want %q", c.Files, want)
	}
	if !slices.Equal(c.Ignored, []string{"CRISHIM_PORT"}) {
		t.Errorf("ignored is %q", c.Ignored)
	}
}

// Each flag wins over its key and its variable.
func TestEachFlagWins(t *testing.T) {
	k := Defaults()
	for _, key := range k.all() {
		if key.flag == "" {
			continue
		}
		value := map[string]string{"log_level": "warn", "log_format": "json", "checkpoint.compression": "zstd", "checkpoint.digest": "none"}[key.name]
		if value == "" {
			value = "/flag"
		}
		c, err := loaded(t, "", []string{key.environment() + "=" + key.value.String()}, "--"+key.flag, value)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.origins[key.name]; got != "--"+key.flag {
			t.Errorf("%s comes from %s", key.name, got)
		}
	}
}

func TestMistakesAreNamed(t *testing.T) {
	for _, test := range []struct {
		content     string
		environment string
		want        string // a line each; FILE is the file
	}{
		{content: "listn = \"/run/a\"\n\n[checkpoint]\nreserved = \"1%\"\n", want: "FILE:1: there is no key listn\nFILE:4: there is no key checkpoint.reserved"},
		{content: "[chekpoint]\nreserve = \"1%\"", want: "FILE:1: there is no key chekpoint"},
		{content: "listen = 3", want: "FILE:1: listen: it cannot be of the type integer"},
		{content: "[checkpoint]\nparallel = \"3\"", want: "FILE:2: checkpoint.parallel: it cannot be of the type string"},
		{content: "checkpoint = 3", want: "FILE:1: checkpoint: it cannot be of the type integer"},
		{content: "criu = \"a\"\ncriu = \"b\"", want: "FILE:2: criu: key criu is already defined"},
		{content: "log_level = \"loud\"", want: `FILE:1: log_level "loud": it is debug, info, warn or error`},
		{content: "\nlog_format = \"xml\"", want: `FILE:2: log_format "xml": it is text or json`},
		{content: "[checkpoint]\nreserve = \"101%\"\nmax_frozen=\"10\"", want: "FILE:2: checkpoint.reserve \"101%\": a percentage is from 0% to 100%\n" +
			`FILE:3: checkpoint.max_frozen "10": it is a duration, such as 500ms, 1m30s or 30d, or 0s for no bound`},
		{content: "checkpoint = { reserve_inodes = \"some\" }", want: `FILE:1: checkpoint.reserve_inodes "some": it is a percentage, such as 15%, or a number, such as 20Gi`},
		{content: "[shutdown]\ncalls = \"2h\"", want: `FILE:2: shutdown.calls "2h": it is 1h at most`},
		{content: "checkpoint.max_frozen = \"-1s\"", want: `FILE:1: checkpoint.max_frozen "-1s": it is a duration, such as 500ms, 1m30s or 30d, or 0s for no bound`},
		{content: "[checkpoint]\nparallel = 0", want: "FILE:2: checkpoint.parallel 0: it is 1 or more"},
		{content: "[checkpoint]\ncompression = \"gzip\"", want: `FILE:2: checkpoint.compression "gzip": it is none or zstd`},
		{content: "[checkpoint]\ndigest = \"md5\"", want: `FILE:2: checkpoint.digest "md5": it is sha256 or none`},
		{content: "[checkpoint]\nmode = \"sometimes\"\ntcp = \"close\"\ndirectories = [\"/a\", \"b\", \"/c/\"]", want: `FILE:2: checkpoint.mode "sometimes": it is always, auto or never` + "\n" +
			`FILE:4: checkpoint.directories "b": it is the absolute path of a directory, without a slash at the end` + "\n" +
			`FILE:4: checkpoint.directories "/c/": it is the absolute path of a directory, without a slash at the end` + "\n" +
			`FILE:3: checkpoint.tcp "close": it is established or refuse`},
		{content: "[checkpoint]\ndirectories = \"/a\"", want: "FILE:2: checkpoint.directories: it cannot be of the type string"},
		{content: "[retention]\nmax_age = \"-1d\"\nmax_size = \"much\"\nmax_per_container = -1", want: `FILE:2: retention.max_age "-1d": it is a duration, such as 500ms, 1m30s or 30d, or 0s for no bound` + "\n" +
			`FILE:3: retention.max_size "much": it is a percentage, such as 15%, or a number, such as 20Gi` + "\n" +
			`FILE:4: retention.max_per_container -1: it is 1 or more, or 0 for no bound`},
		{content: "[retention]\ndirectories = [\"/a\"]", want: "FILE:2: retention.directories lists directories, and there is no bound by which to remove anything: " +
			"set max_per_container, max_size or max_age"},
		{environment: "CRISHIM_RETENTION_DRY_RUN=maybe", want: `CRISHIM_RETENTION_DRY_RUN in the environment: retention.dry_run: "maybe": it is true or false`},
		{environment: "CRISHIM_RETENTION_DIRECTORIES=/a:b", want: `CRISHIM_RETENTION_DIRECTORIES in the environment: retention.directories "b": it is the absolute path of a directory, without a slash at the end` + "\n" +
			`CRISHIM_RETENTION_DIRECTORIES in the environment: retention.directories lists directories, and there is no bound by which to remove anything: ` +
			"set max_per_container, max_size or max_age"},
		{environment: "CRISHIM_CHECKPOINT_PARALLEL=many", want: `CRISHIM_CHECKPOINT_PARALLEL in the environment: checkpoint.parallel: "many": it is a number`},
		{environment: "CRISHIM_CHECKPOINT_PARALLEL=0", want: `CRISHIM_CHECKPOINT_PARALLEL in the environment: checkpoint.parallel 0: it is 1 or more`},
	} {
		file := written(t, map[string]string{"config.toml": test.content})
		_, err := Sources{File: file, Environment: []string{test.environment}}.Load()
		if want := strings.ReplaceAll(test.want, "FILE", file); err == nil || err.Error() != want {
			t.Errorf("%q, %q: the error is\n%v\nwant\n%s", test.content, test.environment, err, want)
		}
	}
	for _, content := range []string{"[checkpoint\n", "listen", "\x00"} {
		if _, err := loaded(t, content, nil); err == nil || !strings.Contains(err.Error(), "config.toml:1: ") {
			t.Errorf("%q: the error is %v", content, err)
		}
	}
}

// A mistake in one file is not hidden by another.
func TestMistakesOfAllFiles(t *testing.T) {
	file := written(t, map[string]string{"config.toml": "a = 1", "config.d/b.toml": "\nb = 1"})
	_, err := Sources{File: file}.Load()
	want := file + ":1: there is no key a\n" + filepath.Dir(file) + "/config.d/b.toml:2: there is no key b"
	if err == nil || err.Error() != want {
		t.Errorf("the error is\n%v\nwant\n%s", err, want)
	}
}

func TestFilesThatAreNotTrusted(t *testing.T) {
	for name, test := range map[string]struct {
		change func(file string) error
		want   string
	}{
		"it is missing":        {os.Remove, "no such file"},
		"others can write it":  {func(f string) error { return os.Chmod(f, 0o602) }, "config.toml can be written by others than its owner: chmod go-w it"},
		"the group can":        {func(f string) error { return os.Chmod(f, 0o660) }, "can be written by others"},
		"others can replace":   {func(f string) error { return os.Chmod(filepath.Dir(f), 0o777) }, "can be written by others"},
		"another's drop-in":    {func(f string) error { return os.Chmod(filepath.Join(filepath.Dir(f), "config.d/a.toml"), 0o666) }, "a.toml can be written"},
		"others can make some": {func(f string) error { return os.Chmod(filepath.Join(filepath.Dir(f), "config.d"), 0o777) }, "config.d can be written"},
		"a directory":          {func(f string) error { return replace(f, func() error { return os.Mkdir(f, 0o700) }) }, "it is not a regular file"},
		"a FIFO":               {func(f string) error { return replace(f, func() error { return mkfifo(f) }) }, "it is not a regular file"},
		"it is large":          {func(f string) error { return os.Truncate(f, 2<<20) }, "it is no configuration file"},
		"it is somebody else's": {func(f string) error {
			if os.Geteuid() != 0 {
				return os.Chmod(f, 0o666) // nobody can give it away
			}
			return os.Chown(f, 1234, -1)
		}, "config.toml"},
	} {
		t.Run(name, func(t *testing.T) {
			file := written(t, map[string]string{"config.toml": "", "config.d/a.toml": ""})
			if _, err := (Sources{File: file}).Load(); err != nil {
				t.Fatal(err)
			}
			if err := test.change(file); err != nil {
				t.Fatal(err)
			}
			if _, err := (Sources{File: file}).Load(); err == nil || !strings.Contains(err.Error(), test.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("the error is %v, want a line with %q", err, test.want)
			}
		})
	}
}

func replace(path string, by func() error) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return by()
}

func mkfifo(path string) error { return unix.Mkfifo(path, 0o600) }

func TestChanged(t *testing.T) {
	was, err := loaded(t, "", nil)
	if err != nil {
		t.Fatal(err)
	}
	is, err := loaded(t, "listen = \"/new\"\nlog_level = \"info\"\n[checkpoint]\nparallel = 3\n", nil)
	if err != nil {
		t.Fatal(err)
	}
	now, later := was.Changed(is)
	if !slices.Equal(now, []string{"checkpoint.parallel"}) || !slices.Equal(later, []string{"listen"}) {
		t.Errorf("changed are %q, and after a restart %q", now, later)
	}
}

func FuzzDecode(f *testing.F) {
	f.Add([]byte(systemd.Config))
	f.Add([]byte("checkpoint = { reserve = \"1%\" }\n[[a]]\nb = 1\n"))
	f.Fuzz(func(t *testing.T, content []byte) {
		c := &Config{Keys: Defaults(), origins: map[string]string{}}
		for _, err := range c.decode("file", content) {
			if strings.Contains(err.Error(), "\n") {
				t.Errorf("%q: the error is of several lines: %v", content, err)
			}
		}
	})
}
