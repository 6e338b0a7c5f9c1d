package main

import (
	"cmp"
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive/needs"
)

func listCommand() *cobra.Command {
	var sockets sockets
	var output string
	command := &cobra.Command{
		Use:   "list",
		Short: "List the checkpoints in flight, and those that have ended",
		Long: `list tells of each checkpoint that crishim remembers, the oldest first, whoever has asked
for it: the kubelet, or an operator. It remembers the last 1000, also after a restart.

` + exitCodes,
		Example: `  crishim list
  crishim list --output json`,
		Args:              usage(cobra.NoArgs),
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(command *cobra.Command, _ []string) error {
			if err := checkOutput(output); err != nil {
				return err
			}
			c, err := sockets.dial(command)
			if err != nil {
				return err
			}
			defer c.close()
			answer, err := c.List(command.Context(), &crishimv1.ListRequest{})
			if err != nil {
				return answered(err)
			}
			if output == "json" {
				return printJSON(command.OutOrStdout(), answer)
			}
			return printList(command.OutOrStdout(), answer.GetCheckpoints(), time.Now())
		},
	}
	registerOutput(command, &output)
	sockets.register(command)
	command.SetFlagErrorFunc(usageError)
	return command
}

func registerOutput(command *cobra.Command, output *string) {
	command.Flags().StringVar(output, "output", "table", "form of the answer: table or json")
	_ = command.RegisterFlagCompletionFunc("output", cobra.FixedCompletions([]string{"table", "json"}, cobra.ShellCompDirectiveNoFileComp)) // fails for flags that there are not
}

func checkOutput(output string) error {
	if output != "table" && output != "json" {
		return exitError{exitUsage, fmt.Errorf("--output %q: it is table or json", output)}
	}
	return nil
}

// printJSON writes a message of the API by the names of its fields.
func printJSON(w io.Writer, message proto.Message) error {
	content, err := protojson.MarshalOptions{Multiline: true, UseProtoNames: true}.Marshal(message)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(w, "%s\n", content)
	return err
}

func printList(w io.Writer, all []*crishimv1.Listed, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "ID\tBEGUN\tTOOK\tFROZEN\tSIZE\tASKED BY\tCONTAINER\tOUTCOME")
	for _, l := range all {
		c := l.GetCheckpoint()
		took, frozen, bytes := now, l.GetProgress().GetFrozenUs(), l.GetProgress().GetBytes()
		if c.GetEnd() != nil {
			took, frozen, bytes = c.GetEnd().AsTime(), c.GetFrozenUs(), c.GetSize()
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\t%s\t%s\t%s\t%s\n",
			c.GetId(), c.GetBegin().AsTime().Local().Format("2006-01-02 15:04:05"), took.Sub(c.GetBegin().AsTime()).Round(10*time.Millisecond),
			unless(frozen == 0, seconds(frozen)), unless(bytes == 0, size(bytes)), askedBy(c.GetCaller()), containerName(c), outcome(l))
	}
	return table.Flush()
}

// unless puts a dash where there is nothing to be told.
func unless(nothing bool, text string) string {
	if nothing {
		return "-"
	}
	return text
}

func askedBy(c *crishimv1.Caller) string {
	if c.GetPid() == 0 {
		return "-"
	}
	return fmt.Sprintf("%s[%d]", needs.Plain(cmp.Or(c.GetProcess(), "?")), c.GetPid())
}

// containerName is namespace/pod/container, or the short id as long as that is not known.
func containerName(c *crishimv1.Checkpoint) string {
	if c.GetPod() == "" {
		return needs.Plain(fmt.Sprintf("%.12s", c.GetContainerId()))
	}
	return needs.Plain(target{namespace: c.GetNamespace(), pod: c.GetPod(), container: c.GetContainer()}.String())
}

func outcome(l *crishimv1.Listed) string {
	c := l.GetCheckpoint()
	switch {
	case c.GetEnd() == nil && l.GetProgress() == nil:
		return "begun"
	case c.GetEnd() == nil && l.GetProgress().GetExpected() > 0:
		p := l.GetProgress()
		return fmt.Sprintf("%s: %d %%", phases[p.GetPhase()], 100*p.GetBytes()/p.GetExpected())
	case c.GetEnd() == nil:
		return phases[l.GetProgress().GetPhase()]
	case c.GetCode() != 0:
		return fmt.Sprintf("%s: %s", codes.Code(c.GetCode()), needs.Plain(c.GetMessage()))
	case c.GetDeleted() != nil:
		return "deleted: " + needs.Plain(c.GetLocation())
	}
	return needs.Plain(c.GetLocation())
}
