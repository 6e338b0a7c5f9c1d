package main

import (
	"os"
	"runtime"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

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
			c, err := config.Sources{File: file, Environment: os.Environ(), Flags: command.Flags()}.Load()
			if err != nil {
				return err
			}
			if os.Getenv("GOMAXPROCS") == "" {
				// Relaying is small pieces of work, one after the other: to have them done by several processors costs more in waking
				// threads than it saves (make bench: 16 callers). What takes time is done by helper processes of their own.
				runtime.GOMAXPROCS(1)
			}
			log := logrus.New()
			log.SetLevel(c.Level)
			log.SetFormatter(c.Format())
			for _, name := range c.Ignored {
				log.Warnf("%s in the environment is no key of the configuration, and is ignored", name)
			}
			return shim.Run(command.Context(), daemon(c, log))
		},
	}
	configFlag(command, &file)
	config.Register(command.Flags())
	return command
}

// daemon is what a configuration means to the daemon.
func daemon(c *config.Config, log *logrus.Logger) shim.Config {
	return shim.Config{
		Listen: c.Keys.Listen, RuntimeEndpoint: c.Keys.RuntimeEndpoint, Criu: c.Keys.Criu, State: c.Keys.StateDir, Version: version, Log: log,
		Archive: c.Archive, Bounds: c.Bounds,
	}
}
