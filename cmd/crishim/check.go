package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive/needs"
)

func checkCommand() *cobra.Command {
	var sockets sockets
	var output, file string
	command := &cobra.Command{
		Use:   "check [CONTAINER]",
		Short: "Say whether this node can make checkpoints, and whether a container can be checkpointed",
		Long: `check looks at what a checkpoint needs of this node, and at what in a container stands
in its way, without freezing it. It prints a line for each thing, and what to do about it:

  ✓ it is as it should be
  ! a checkpoint may fail, or does something that one should know of
  ✗ a checkpoint fails

What only CRIU can tell, it finds when it dumps the container: it then rolls back, and
the container goes on. How long a container would stand still is an estimate, by what
earlier checkpoints on this node have taken.

` + exitCodes,
		Example: `  crishim check
  crishim check default/web/app
  crishim check --output json`,
		Args:              usage(cobra.MaximumNArgs(1)),
		ValidArgsFunction: sockets.completeContainers(false),
		RunE: func(command *cobra.Command, args []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			c, err := sockets.dial(command)
			if err != nil {
				return err
			}
			defer c.close()
			request := &crishimv1.CheckRequest{Location: file}
			if len(args) > 0 {
				targets, err := c.find(command.Context(), args[0])
				if err != nil {
					return err
				}
				if len(targets) > 1 {
					return exitError{exitUsage, fmt.Errorf("%s has %d containers: check one of them, such as %s", args[0], len(targets), targets[0])}
				}
				request.ContainerId = targets[0].id
			}
			answer, err := c.Check(command.Context(), request)
			if err != nil {
				return answered(err)
			}
			w := command.OutOrStdout()
			if output == "json" {
				err = printJSON(w, answer)
			} else {
				err = printFindings(w, answer, colourful(w))
			}
			if err != nil {
				return err
			}
			for _, finding := range append(answer.GetNode(), answer.GetContainer()...) {
				if finding.GetState() == crishimv1.State_STATE_FAILURE {
					return errors.New("a checkpoint would fail: see ✗ above")
				}
			}
			return nil
		},
	}
	command.Flags().StringVar(&file, "location", "", "where the archive would be, if not in the kubelet's directory")
	registerOutput(command, &output)
	sockets.register(command)
	command.SetFlagErrorFunc(usageError)
	return command
}

// colourful says whether a terminal shows colours there, and nobody has asked for none (https://no-color.org).
func colourful(w io.Writer) bool {
	file, ok := w.(*os.File)
	return ok && terminalAllows(term.IsTerminal(int(file.Fd()))) && os.Getenv("NO_COLOR") == ""
}

// marks are the states, for people, with the colours of a terminal.
var marks = map[crishimv1.State]struct{ mark, colour string }{
	crishimv1.State_STATE_OK:      {"✓", "\x1b[32m"},
	crishimv1.State_STATE_WARNING: {"!", "\x1b[33m"},
	crishimv1.State_STATE_FAILURE: {"✗", "\x1b[31m"},
}

func printFindings(w io.Writer, answer *crishimv1.CheckResponse, colours bool) error {
	for _, part := range []struct {
		title    string
		findings []*crishimv1.Finding
	}{{"This node", answer.GetNode()}, {"The container", answer.GetContainer()}} {
		if len(part.findings) == 0 {
			continue
		}
		fmt.Fprintln(w, part.title)
		table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, finding := range part.findings {
			mark := marks[finding.GetState()]
			if colours {
				mark.mark = mark.colour + mark.mark + "\x1b[0m"
			}
			text := needs.Plain(finding.GetMessage())
			if finding.GetAdvice() != "" {
				text += ": " + needs.Plain(finding.GetAdvice())
			}
			fmt.Fprintf(table, "%s %s\t%s\n", mark.mark, finding.GetName(), text)
		}
		if err := table.Flush(); err != nil {
			return err
		}
	}
	return nil
}
