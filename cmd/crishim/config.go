package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
	"github.com/sirupsen/logrus"
	"github.com/spf13/pflag"

	"crishim/shim"
	"crishim/shim/archive"
	"crishim/shim/checkpoint"
)

// defaultConfigFile is read if it is there and no other is named.
const defaultConfigFile = "/etc/crishim/config.toml"

// config is what crishim serve is told. What a flag says wins over what the configuration file says, and that over the defaults.
type config struct {
	Listen          string `toml:"listen"`
	RuntimeEndpoint string `toml:"runtime_endpoint"`
	Criu            string `toml:"criu"`
	StateDir        string `toml:"state_dir"`
	LogLevel        string `toml:"log_level"`
	Checkpoint      struct {
		Compression   string `toml:"compression"`
		Digest        string `toml:"digest"`
		Reserve       string `toml:"reserve"`
		ReserveInodes string `toml:"reserve_inodes"`
		MaxFrozen     string `toml:"max_frozen"`
		Parallel      int    `toml:"parallel"`
	} `toml:"checkpoint"`
}

func defaultConfig() config {
	c := config{
		Listen:          "unix:///run/crishim/crishim.sock",
		RuntimeEndpoint: "unix:///run/containerd/containerd.sock",
		Criu:            "criu",
		StateDir:        "/var/lib/crishim",
		LogLevel:        "info",
	}
	c.Checkpoint.Compression, c.Checkpoint.Digest = archive.None, archive.SHA256
	// A little more than what a kubelet keeps free by default.
	c.Checkpoint.Reserve, c.Checkpoint.ReserveInodes = "15%", "5%"
	c.Checkpoint.MaxFrozen, c.Checkpoint.Parallel = "0s", 2
	return c
}

// register makes flags for what is more than a matter of the node. Their defaults are what c has.
func (c *config) register(flags *pflag.FlagSet) {
	flags.StringVar(&c.Listen, "listen", c.Listen, "endpoint for the kubelet: unix:///path or a path")
	flags.StringVar(&c.RuntimeEndpoint, "runtime-endpoint", c.RuntimeEndpoint, "endpoint of the runtime, in the same form")
	flags.StringVar(&c.Criu, "criu", c.Criu, "path of the criu binary, or its name in PATH")
	flags.StringVar(&c.StateDir, "state-dir", c.StateDir, "directory for records of checkpoints in flight, by which a crash is put right at the next start")
	flags.StringVar(&c.Checkpoint.Compression, "compression", c.Checkpoint.Compression, "compression of archives: none or zstd")
	flags.StringVar(&c.Checkpoint.Digest, "digest", c.Checkpoint.Digest, "digest of each member in an archive, for crishim verify: sha256 or none")
	flags.StringVar(&c.LogLevel, "log-level", c.LogLevel, "what is logged: debug, info, warn or error")
}

// load puts what the file says into c, and what was said by flags, which are registered and parsed, over it. That there is no file is an error
// only if it must be.
func (c *config) load(file string, must bool, flags *pflag.FlagSet) error {
	given := map[string]string{}
	flags.Visit(func(f *pflag.Flag) { given[f.Name] = f.Value.String() })
	content, err := os.ReadFile(file)
	if err != nil && (must || !errors.Is(err, fs.ErrNotExist)) {
		return fmt.Errorf("read configuration: %w", err)
	}
	if err := toml.NewDecoder(bytes.NewReader(content)).DisallowUnknownFields().Decode(c); err != nil {
		return fmt.Errorf("read configuration %s: %w", file, describe(err))
	}
	for name, value := range given {
		if err := flags.Set(name, value); err != nil {
			return err
		}
	}
	return nil
}

// describe makes a line of the library's error, which names line and key.
func describe(err error) error {
	var unknown *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		var all []string
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			all = append(all, fmt.Sprintf("line %d: there is no key %s", line, strings.Join(e.Key(), ".")))
		}
		return errors.New(strings.Join(all, "; "))
	case errors.As(err, &wrong):
		line, _ := wrong.Position()
		message := strings.TrimPrefix(wrong.Error(), "toml: ")
		if kind, rest, ok := strings.Cut(strings.TrimPrefix(message, "cannot decode TOML "), " into "); ok && rest != "" {
			message = "it cannot be of the type " + kind // the rest is Go's
		}
		if key := strings.Join(wrong.Key(), "."); key != "" {
			message = key + ": " + message
		}
		return fmt.Errorf("line %d: %s", line, message)
	}
	return err
}

// daemon returns what the daemon needs to know. The error of a value that makes no sense names its key, and what is allowed.
func (c *config) daemon() (d shim.Config, err error) {
	log := logrus.New()
	d = shim.Config{
		Listen: c.Listen, RuntimeEndpoint: c.RuntimeEndpoint, Criu: c.Criu, State: c.StateDir, Version: version, Log: log,
		Archive: archive.Options{Compression: c.Checkpoint.Compression, Digest: c.Checkpoint.Digest},
		Bounds:  checkpoint.Bounds{Parallel: c.Checkpoint.Parallel},
	}
	level, err := logrus.ParseLevel(c.LogLevel)
	if err != nil {
		return d, fmt.Errorf("log_level (--log-level) %q: it is debug, info, warn or error", c.LogLevel)
	}
	log.SetLevel(level)
	if d.Bounds.Reserve, err = checkpoint.ParseAmount(c.Checkpoint.Reserve); err != nil {
		return d, fmt.Errorf("checkpoint.reserve %w", err)
	}
	if d.Bounds.ReserveInodes, err = checkpoint.ParseAmount(c.Checkpoint.ReserveInodes); err != nil {
		return d, fmt.Errorf("checkpoint.reserve_inodes %w", err)
	}
	if d.Bounds.MaxFrozen, err = time.ParseDuration(c.Checkpoint.MaxFrozen); err != nil || d.Bounds.MaxFrozen < 0 {
		return d, fmt.Errorf("checkpoint.max_frozen %q: it is a duration, such as 500ms or 1m30s, or 0s for no bound", c.Checkpoint.MaxFrozen)
	}
	if d.Bounds.Parallel < 1 {
		return d, fmt.Errorf("checkpoint.parallel %d: it is 1 or more", d.Bounds.Parallel)
	}
	return d, nil
}
