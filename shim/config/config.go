package config

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"reflect"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/sirupsen/logrus"

	"crishim/shim/archive"
	"crishim/shim/checkpoint"
	"crishim/shim/retention"
)

// Config is a configuration that makes sense.
type Config struct {
	Keys    Keys     // as they are written
	Files   []string // that were read
	Ignored []string // variables of the environment that look like keys, and are none

	// What some of the keys mean.
	Level     logrus.Level
	Archive   archive.Options
	Bounds    checkpoint.Bounds
	Retention retention.Policy
	Shutdown  struct{ Checkpoints, Calls time.Duration }

	origins map[string]string // of each key: where its value comes from
}

// parse finds out what the values mean.
func (c *Config) parse() (mistakes []error) {
	k := &c.Keys
	wrong := func(key string, format string, args ...any) {
		mistakes = append(mistakes, fmt.Errorf("%s: %s %w", c.origins[key], key, fmt.Errorf(format, args...)))
	}
	amount := func(key, text string) checkpoint.Amount {
		a, err := checkpoint.ParseAmount(text)
		if err != nil {
			wrong(key, "%w", err)
		}
		return a
	}
	duration := func(key, text string) time.Duration {
		d, err := parseDuration(text)
		if err != nil {
			wrong(key, "%q: it is a duration, such as 500ms, 1m30s or 30d, or 0s for no bound", text)
		}
		return d
	}
	oneOf := func(key, value string, allowed ...string) {
		for _, a := range allowed {
			if value == a {
				return
			}
		}
		wrong(key, "%q: it is %s", value, either(allowed))
	}
	absolute := func(key string, directories []string) {
		for _, dir := range directories {
			if !filepath.IsAbs(dir) || dir != filepath.Clean(dir) {
				wrong(key, "%q: it is the absolute path of a directory, without a slash at the end", dir)
			}
		}
	}

	var err error
	if c.Level, err = logrus.ParseLevel(k.LogLevel); err != nil {
		wrong("log_level", "%q: it is debug, info, warn or error", k.LogLevel)
	}
	oneOf("log_format", k.LogFormat, "text", "json")
	oneOf("checkpoint.mode", k.Checkpoint.Mode, "always", "auto", "never")
	absolute("checkpoint.directories", k.Checkpoint.Directories)
	oneOf("checkpoint.tcp", k.Checkpoint.TCP, "established", "refuse")
	oneOf("checkpoint.compression", k.Checkpoint.Compression, archive.None, archive.Zstd)
	oneOf("checkpoint.digest", k.Checkpoint.Digest, archive.SHA256, archive.None)
	c.Archive = archive.Options{Compression: k.Checkpoint.Compression, Digest: k.Checkpoint.Digest}
	c.Bounds = checkpoint.Bounds{
		Reserve:       amount("checkpoint.reserve", k.Checkpoint.Reserve),
		ReserveInodes: amount("checkpoint.reserve_inodes", k.Checkpoint.ReserveInodes),
		MaxFrozen:     duration("checkpoint.max_frozen", k.Checkpoint.MaxFrozen),
		Parallel:      k.Checkpoint.Parallel,
	}
	if k.Checkpoint.Parallel < 1 {
		wrong("checkpoint.parallel", "%d: it is 1 or more", k.Checkpoint.Parallel)
	}

	absolute("retention.directories", k.Retention.Directories)
	c.Retention = retention.Policy{PerContainer: k.Retention.MaxPerContainer, Age: duration("retention.max_age", k.Retention.MaxAge)}
	c.Retention.Share, c.Retention.Bytes = amount("retention.max_size", k.Retention.MaxSize).Parts()
	if k.Retention.MaxPerContainer < 0 {
		wrong("retention.max_per_container", "%d: it is 1 or more, or 0 for no bound", k.Retention.MaxPerContainer)
	}
	if len(k.Retention.Directories) > 0 && c.Retention == (retention.Policy{}) {
		wrong("retention.directories", "lists directories, and there is no bound by which to remove anything: set max_per_container, max_size or max_age")
	}

	atStop := func(key, text string) time.Duration {
		d := duration(key, text)
		if d > time.Hour {
			wrong(key, "%q: it is 1h at most", text)
		}
		return d
	}
	c.Shutdown.Checkpoints = atStop("shutdown.checkpoints", k.Shutdown.Checkpoints)
	c.Shutdown.Calls = atStop("shutdown.calls", k.Shutdown.Calls)
	return mistakes
}

// parseDuration reads a duration that is not negative, as Go writes it, or a number of days.
func parseDuration(text string) (time.Duration, error) {
	const most = 100 * 366 // days, more of which would overflow
	if days, ok := strings.CutSuffix(text, "d"); ok {
		n, err := strconv.ParseUint(days, 10, 32)
		if err != nil || n > most {
			return 0, errors.New("not a number of days")
		}
		return time.Duration(n) * 24 * time.Hour, nil
	}
	d, err := time.ParseDuration(text)
	if err == nil && d < 0 {
		err = errors.New("negative")
	}
	return d, err
}

// either lists words: a, b or c.
func either(words []string) string {
	text := words[0]
	for i, word := range words[1:] {
		if i == len(words)-2 {
			text += " or " + word
		} else {
			text += ", " + word
		}
	}
	return text
}

// Changed returns the keys whose values differ in another configuration: those that a daemon can go by at once, and those that need a restart.
func (c *Config) Changed(to *Config) (now, later []string) {
	theirs := to.Keys.all()
	for i, key := range c.Keys.all() {
		switch {
		case reflect.DeepEqual(key.value.Interface(), theirs[i].value.Interface()):
		case key.fixed:
			later = append(later, key.name)
		default:
			now = append(now, key.name)
		}
	}
	return now, later
}

// Format makes what a log is written with.
func (c *Config) Format() logrus.Formatter {
	if c.Keys.LogFormat == "json" {
		return &logrus.JSONFormatter{TimestampFormat: time.RFC3339Nano}
	}
	return &logrus.TextFormatter{}
}

// Show writes each key with its value, as in the file, and where that comes from.
func (c *Config) Show(w io.Writer) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	var errs []error
	for _, key := range c.Keys.all() {
		_, err := fmt.Fprintf(table, "%s = %s\t# %s\n", key.name, key.text(), c.origins[key.name])
		errs = append(errs, err)
	}
	return errors.Join(append(errs, table.Flush())...)
}

// text is a key's value as TOML has it.
func (k key) text() string {
	if k.value.Kind() != reflect.Slice {
		return fmt.Sprintf("%#v", k.value.Interface())
	}
	text := "["
	for i, element := range k.value.Seq2() {
		if i.Int() > 0 {
			text += ", "
		}
		text += fmt.Sprintf("%q", element.Interface())
	}
	return text + "]"
}
