// Command crishim is a CRI proxy that gives container checkpoints to container runtimes that have none.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"crishim/shim/checkpoint"
)

func main() {
	// Before anything else: a helper process belongs to its dump alone.
	if len(os.Args) == 2 && os.Args[1] == checkpoint.HelperCommand {
		os.Exit(checkpoint.HelperMain())
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	if err := rootCommand().ExecuteContext(ctx); err != nil {
		if !errors.Is(err, errDifferent) { // which needs no words
			fmt.Fprintf(os.Stderr, "crishim: %v\n", err)
		}
		os.Exit(exitCode(err))
	}
}

func rootCommand() *cobra.Command {
	root := &cobra.Command{
		Use:   "crishim",
		Short: "Container checkpoints for container runtimes that have none",
		Long: `crishim is a CRI proxy. A kubelet whose --container-runtime-endpoint points at it
works as before: every call goes through to the runtime untouched. Only
CheckpointContainer is answered by crishim itself, which dumps the container with
CRIU and writes an archive where the kubelet asked for it.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Version:       version,
	}
	root.AddCommand(
		serveCommand(), configCommand(), retentionCommand(), kubeletCommand(),
		checkCommand(), checkpointCommand(), listCommand(), cancelCommand(), deleteCommand(),
		verifyCommand(), inspectCommand(), diffCommand(), convertCommand(), versionCommand(),
	)
	return root
}
