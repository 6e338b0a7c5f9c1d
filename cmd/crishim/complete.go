package main

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	crishimv1 "crishim/proto/crishim/v1"
)

// A shell waits for completions: what does not come soon is left out.
const completionTimeout = 2 * time.Second

// completeContainers offers the running containers by their names, and their pods where those will do, too.
func (s *sockets) completeContainers(pods bool) cobra.CompletionFunc {
	return func(command *cobra.Command, args []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		c, err := s.dial(command)
		if err != nil || len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.close()
		ctx, cancel := context.WithTimeout(command.Context(), completionTimeout)
		defer cancel()
		all, err := c.running(ctx)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		var offered []cobra.Completion
		for i, t := range all {
			if pod := t.namespace + "/" + t.pod; pods && (i == 0 || pod != all[i-1].namespace+"/"+all[i-1].pod) {
				offered = append(offered, cobra.CompletionWithDesc(pod, "all of the pod"))
			}
			offered = append(offered, cobra.CompletionWithDesc(t.String(), fmt.Sprintf("%.12s", t.id)))
		}
		return offered, cobra.ShellCompDirectiveNoFileComp
	}
}

// completeCheckpoints offers the ids of checkpoints of a kind, the latest first.
func (s *sockets) completeCheckpoints(kind func(*crishimv1.Checkpoint) bool) cobra.CompletionFunc {
	return func(command *cobra.Command, _ []string, _ string) ([]cobra.Completion, cobra.ShellCompDirective) {
		const directive = cobra.ShellCompDirectiveNoFileComp | cobra.ShellCompDirectiveKeepOrder
		c, err := s.dial(command)
		if err != nil {
			return nil, directive
		}
		defer c.close()
		ctx, cancel := context.WithTimeout(command.Context(), completionTimeout)
		defer cancel()
		answer, err := c.List(ctx, &crishimv1.ListRequest{})
		if err != nil {
			return nil, directive
		}
		var offered []cobra.Completion
		all := answer.GetCheckpoints()
		for i := len(all) - 1; i >= 0; i-- {
			if found := all[i].GetCheckpoint(); kind(found) {
				offered = append(offered, cobra.CompletionWithDesc(found.GetId(), containerName(found)))
			}
		}
		return offered, directive
	}
}
