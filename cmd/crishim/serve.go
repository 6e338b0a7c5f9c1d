package main

import (
	"os"
	"os/signal"
	"runtime"
	"strings"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"crishim/shim"
	"crishim/shim/config"
)

func serveCommand() *cobra.Command {
	file := config.DefaultFile
	command := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon between kubelet and runtime",
		Long: `serve listens for the kubelet and passes its calls to the runtime, until SIGTERM. It
starts whether or not the runtime is there, and needs CRIU for checkpoints only.
Where systemd hands a socket over, that one is used instead of --listen.

All that it can be told is in the configuration file: see crishim config default. What
is said here wins. A mistake in the file is an error, and serve does not start.`,
		Example: `  # between a kubelet and containerd
  crishim serve --listen unix:///run/crishim/crishim.sock \
                --runtime-endpoint unix:///run/containerd/containerd.sock
  # then start the kubelet with
  #   --container-runtime-endpoint=unix:///run/crishim/crishim.sock`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			sources := config.Sources{File: file, Environment: os.Environ(), Flags: command.Flags()}
			c, err := sources.Load()
			if err != nil {
				return err
			}
			if os.Getenv("GOMAXPROCS") == "" {
				// Relaying is small pieces of work, one after the other: to have them done by several processors costs more in waking
				// threads than it saves (make bench: 16 callers). What takes time is done by helper processes of their own.
				runtime.GOMAXPROCS(1)
			}
			log := logrus.New()
			log.SetOutput(command.ErrOrStderr())
			log.SetLevel(c.Level)
			log.SetFormatter(c.Format())
			for _, name := range c.Ignored {
				log.Warnf("%s in the environment is no key of the configuration, and is ignored", name)
			}
			hangup := make(chan os.Signal, 1)
			signal.Notify(hangup, unix.SIGHUP)
			defer signal.Stop(hangup)
			told := daemon(c, log)
			told.Hangup, told.Reload = hangup, reloader(sources, c, log)
			return shim.Run(command.Context(), told)
		},
	}
	configFlag(command, &file)
	config.Register(command.Flags())
	return command
}

// reloader returns a function that reads the configuration again, lets the log go by it, and says what has changed. In the daemon it runs once at a
// time.
func reloader(sources config.Sources, start *config.Config, log *logrus.Logger) func() (shim.Config, error) {
	last := start
	return func() (shim.Config, error) {
		next, err := sources.Load()
		if err != nil {
			return shim.Config{}, err
		}
		told := daemon(next, log)
		if err := told.Validate(); err != nil {
			return shim.Config{}, err
		}
		changed, _ := last.Changed(next)
		_, later := start.Changed(next)
		last = next
		log.SetFormatter(next.Format())
		log.SetLevel(next.Level)
		if len(changed) > 0 {
			log.Infof("the configuration was read again, and taken over; changed: %s", strings.Join(changed, ", "))
		} else {
			log.Info("the configuration was read again; nothing has changed that can while crishim runs")
		}
		if len(later) > 0 {
			log.Warnf("a restart of crishim is needed for what has changed of %s", strings.Join(later, ", "))
		}
		return told, nil
	}
}

// daemon is what a configuration means to the daemon.
func daemon(c *config.Config, log *logrus.Logger) shim.Config {
	return shim.Config{
		Listen: c.Keys.Listen, RuntimeEndpoint: c.Keys.RuntimeEndpoint, Admin: c.Keys.Admin, State: c.Keys.StateDir, Metrics: c.Keys.Metrics, Tracing: c.Keys.Tracing.Endpoint,
		Version: version, Commit: commit, Log: log,
		Mode: shim.Mode(c.Keys.Checkpoint.Mode), Criu: c.Keys.Criu, Directories: c.Keys.Checkpoint.Directories,
		RefuseTCP: c.Keys.Checkpoint.TCP == "refuse", Archive: c.Archive, Bounds: c.Bounds, Shutdown: c.Shutdown,
		Retention: shim.Retention{Directories: c.Keys.Retention.Directories, Policy: c.Retention, DryRun: c.Keys.Retention.DryRun},
	}
}
