package main

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive/needs"
)

func deleteCommand() *cobra.Command {
	var sockets sockets
	command := &cobra.Command{
		Use:   "delete ID|ARCHIVE...",
		Short: "Delete archives that crishim has made",
		Long: `delete removes archives, durably, by the ids of their checkpoints or by their paths. It
removes nothing else: no file that crishim does not remember to have written, and none
that was replaced or changed since. crishim list tells what there is.

` + exitCodes,
		Example: `  crishim delete mif3k2x9
  crishim delete /var/lib/kubelet/checkpoints/checkpoint-web_default-app-2026-11-24T09:00:00Z.tar`,
		Args: usage(cobra.MinimumNArgs(1)),
		ValidArgsFunction: sockets.completeCheckpoints(func(c *crishimv1.Checkpoint) bool {
			return c.GetEnd() != nil && c.GetCode() == 0 && c.GetDeleted() == nil
		}),
		RunE: func(command *cobra.Command, args []string) error {
			c, err := sockets.dial(command)
			if err != nil {
				return err
			}
			defer c.close()
			var errs []error
			for _, id := range args {
				if strings.Contains(id, "/") {
					if id, err = filepath.Abs(id); err != nil {
						return err
					}
				}
				answer, err := c.Delete(command.Context(), &crishimv1.DeleteRequest{Id: id})
				if err != nil {
					errs = append(errs, answered(err))
					continue
				}
				fmt.Fprintln(command.OutOrStdout(), needs.Plain(answer.GetCheckpoint().GetLocation()))
			}
			return errors.Join(errs...)
		},
	}
	sockets.register(command)
	command.SetFlagErrorFunc(usageError)
	return command
}
