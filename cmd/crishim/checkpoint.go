package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os/signal"
	"path/filepath"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive/needs"
)

func checkpointCommand() *cobra.Command {
	var sockets sockets
	var file string
	command := &cobra.Command{
		Use:   "checkpoint CONTAINER|POD [-o FILE]",
		Short: "Checkpoint a running container, or each one of a pod",
		Long: `checkpoint does what the kubelet's checkpoint API does, and shows how far it is: on a
terminal with a bar for each phase, elsewhere in lines. The container goes on running.
The path of the archive is printed when it is there, complete and durable.

A container is named by its id, by the beginning of that, or as namespace/pod/container;
namespace/pod are all running containers of a pod, one archive each. Without -o the
archive is where the kubelet would put it:
/var/lib/kubelet/checkpoints/checkpoint-POD_NAMESPACE-CONTAINER-TIME.tar

Ctrl-C cancels, and waits until the container runs again and nothing of the attempt is
left. The same happens by itself when this command is killed.

` + exitCodes,
		Example: `  crishim checkpoint default/web/app
  crishim checkpoint 3f2a9c -o /var/backups/web.tar
  crishim checkpoint default/web`,
		Args:              usage(cobra.ExactArgs(1)),
		ValidArgsFunction: sockets.completeContainers(true),
		RunE: func(command *cobra.Command, args []string) error {
			c, err := sockets.dial(command)
			if err != nil {
				return err
			}
			defer c.close()
			ctx := command.Context()
			targets, err := c.find(ctx, args[0])
			if err != nil {
				return err
			}
			if file != "" && len(targets) > 1 {
				return exitError{exitUsage, fmt.Errorf("%s has %d containers, one archive each: -o is for one container", args[0], len(targets))}
			}
			if file != "" {
				if file, err = filepath.Abs(file); err != nil {
					return err
				}
			}
			var errs []error
			for _, target := range targets {
				if ctx.Err() != nil {
					break
				}
				done, err := c.checkpoint(ctx, target.id, file, command.ErrOrStderr())
				if err == nil {
					fmt.Fprintln(command.OutOrStdout(), needs.Plain(done.GetLocation()))
				} else if len(targets) > 1 {
					err = fmt.Errorf("%s: %w", target, err)
				}
				errs = append(errs, err)
			}
			return errors.Join(errs...)
		},
	}
	command.Flags().StringVarP(&file, "output", "o", "", "where the archive is to be; nothing that exists is replaced")
	sockets.register(command)
	command.SetFlagErrorFunc(usageError)
	return command
}

// checkpoint makes one, and shows progress. The end of ctx cancels it; it returns when that is done.
func (c *client) checkpoint(ctx context.Context, id, location string, progress io.Writer) (*crishimv1.Checkpoint, error) {
	call, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	stream, err := c.Checkpoint(call, &crishimv1.CheckpointRequest{ContainerId: id, Location: location})
	if err != nil {
		return nil, answered(err)
	}
	begun := make(chan string, 1)
	var cancelling sync.WaitGroup
	defer cancelling.Wait()
	cancelling.Add(1)
	stop := context.AfterFunc(ctx, func() {
		defer cancelling.Done()
		signal.Reset(unix.SIGINT, unix.SIGTERM) // once more, and this process does not wait for the end
		select {
		case id := <-begun:
			_, _ = c.Cancel(call, &crishimv1.CancelRequest{Id: id}) // the stream says how it has ended
		case <-call.Done():
		}
	})
	defer func() {
		cut()
		if stop() {
			cancelling.Done()
		}
	}()
	view := newView(progress)
	defer view.end()
	for {
		event, err := stream.Recv()
		if err != nil {
			view.end()
			if ctx.Err() != nil {
				return nil, exitError{exitInterrupted, answered(err)}
			}
			return nil, answered(err)
		}
		switch {
		case event.GetBegun() != nil:
			begun <- event.GetBegun().GetId()
		case event.GetProgress() != nil:
			view.show(event.GetProgress())
		case event.GetDone() != nil:
			view.finish()
			return event.GetDone(), nil
		}
	}
}
