package main

import (
	"fmt"

	"github.com/sirupsen/logrus"
	"github.com/spf13/cobra"

	"crishim/shim"
	"crishim/shim/archive"
)

func serveCommand() *cobra.Command {
	config := shim.Config{Version: version}
	var level string
	command := &cobra.Command{
		Use:   "serve",
		Short: "Run the daemon between kubelet and runtime",
		Long: `serve listens for the kubelet and passes its calls to the runtime, until SIGTERM. It
starts whether or not the runtime is there, and needs CRIU for checkpoints only.
Where systemd hands a socket over, that one is used instead of --listen.`,
		Example: `  # between a kubelet and containerd
  crishim serve --listen unix:///run/crishim/crishim.sock \
                --runtime-endpoint unix:///run/containerd/containerd.sock
  # then start the kubelet with
  #   --container-runtime-endpoint=unix:///run/crishim/crishim.sock`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			log := logrus.New()
			parsed, err := logrus.ParseLevel(level)
			if err != nil {
				return fmt.Errorf("parse --log-level: %w", err)
			}
			log.SetLevel(parsed)
			config.Log = log
			return shim.Run(command.Context(), config)
		},
	}
	flags := command.Flags()
	flags.StringVar(&config.Listen, "listen", "unix:///run/crishim/crishim.sock", "endpoint for the kubelet: unix:///path or a path")
	flags.StringVar(&config.RuntimeEndpoint, "runtime-endpoint", "unix:///run/containerd/containerd.sock", "endpoint of the runtime, in the same form")
	flags.StringVar(&config.Criu, "criu", "criu", "path of the criu binary, or its name in PATH")
	flags.StringVar(&config.State, "state-dir", "/var/lib/crishim", "directory for records of checkpoints in flight, by which a crash is put right at the next start")
	flags.StringVar(&config.Archive.Compression, "compression", archive.None, "compression of archives: none or zstd")
	flags.StringVar(&config.Archive.Digest, "digest", archive.SHA256, "digest of each member in an archive, for crishim verify: sha256 or none")
	flags.StringVar(&level, "log-level", "info", "what is logged: debug, info, warn or error")
	return command
}
