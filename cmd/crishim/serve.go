package main

import (
	"os"
	"runtime"

	"github.com/spf13/cobra"

	"crishim/shim"
)

func serveCommand() *cobra.Command {
	config := defaultConfig()
	file := defaultConfigFile
	command := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon between kubelet and runtime",
		Long: `serve listens for the kubelet and passes its calls to the runtime, until SIGTERM. It
starts whether or not the runtime is there, and needs CRIU for checkpoints only.
Where systemd hands a socket over, that one is used instead of --listen.

All that it can be told is in the configuration file, see the one that is shipped. What
is said here wins. A mistake in the file is an error, and serve does not start.`,
		Example: `  # between a kubelet and containerd
  crishim serve --listen unix:///run/crishim/crishim.sock \
                --runtime-endpoint unix:///run/containerd/containerd.sock
  # then start the kubelet with
  #   --container-runtime-endpoint=unix:///run/crishim/crishim.sock`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			if err := config.load(file, command.Flags().Changed("config"), command.Flags()); err != nil {
				return err
			}
			daemon, err := config.daemon()
			if err != nil {
				return err
			}
			if os.Getenv("GOMAXPROCS") == "" {
				// Relaying is small pieces of work, one after the other: to have them done by several processors costs more in waking
				// threads than it saves (make bench: 16 callers). What takes time is done by helper processes of their own.
				runtime.GOMAXPROCS(1)
			}
			return shim.Run(command.Context(), daemon)
		},
	}
	command.Flags().StringVar(&file, "config", file, "configuration file; that the default one is not there is no error")
	config.register(command.Flags())
	return command
}
