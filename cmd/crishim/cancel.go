package main

import (
	"fmt"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive/needs"
)

func cancelCommand() *cobra.Command {
	var sockets sockets
	command := &cobra.Command{
		Use:   "cancel ID",
		Short: "Roll back a checkpoint in flight",
		Long: `cancel stops a checkpoint, whoever has asked for it, and returns when it has ended: the
container runs again, and nothing of the attempt is left. One that had come too far
succeeds all the same, which is an error here. crishim list tells the ids.

` + exitCodes,
		Example:           `  crishim cancel mif3k2x9`,
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: sockets.completeCheckpoints(func(c *crishimv1.Checkpoint) bool { return c.GetEnd() == nil }),
		RunE: func(command *cobra.Command, args []string) error {
			c, err := sockets.dial(command)
			if err != nil {
				return err
			}
			defer c.close()
			answer, err := c.Cancel(command.Context(), &crishimv1.CancelRequest{Id: args[0]})
			if err != nil {
				return answered(err)
			}
			ended := answer.GetCheckpoint()
			if ended.GetCode() == int32(codes.OK) {
				return fmt.Errorf("it was too late: the archive is at %s", needs.Plain(ended.GetLocation()))
			}
			_, err = fmt.Fprintln(command.OutOrStdout(), needs.Plain(ended.GetMessage()))
			return err
		},
	}
	sockets.register(command)
	command.SetFlagErrorFunc(usageError)
	return command
}
