package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/spf13/cobra"

	"crishim/shim"
	"crishim/shim/archive/needs"
	"crishim/shim/config"
)

func retentionCommand() *cobra.Command {
	file := config.DefaultFile
	command := &cobra.Command{
		Use:   "retention",
		Short: "Print which archives retention keeps and which it would remove, and why",
		Long: `retention reads the configuration and looks at the directories that it lists under
retention.directories, as crishim serve does after each checkpoint and every hour. It
prints each archive there and what becomes of it. It removes nothing, and needs no
daemon.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c, err := config.Sources{File: file, Environment: os.Environ()}.Load()
			if err != nil {
				return err
			}
			rules := daemon(c, nil).Retention
			if len(rules.Directories) == 0 {
				_, err := fmt.Fprintln(command.OutOrStdout(), "retention.directories is empty: nothing is ever removed")
				return err
			}
			var errs []error
			for _, path := range rules.Directories {
				errs = append(errs, printPlan(command.OutOrStdout(), rules, path))
			}
			return errors.Join(errs...)
		},
	}
	configFlag(command, &file)
	return command
}

// printPlan prints a line for each file of a directory that has an archive's name.
func printPlan(w io.Writer, rules shim.Retention, path string) error {
	plan, err := rules.Plan(path)
	if err != nil {
		return err
	}
	defer plan.Close()
	why := map[string]string{}
	for _, r := range plan.Removals {
		why[r.Name] = r.Why
	}
	fmt.Fprintln(w, path)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, a := range plan.Archives {
		fate := "keep"
		switch {
		case why[a.Name] != "":
			fate = "remove: " + why[a.Name]
		case a.Pinned:
			fate = "keep: there is a file .keep beside it"
		case a.Read:
			fate = "keep: somebody has it open, or that cannot be known here"
		}
		fmt.Fprintf(table, "  %s\t%s\t%s\t%s old\t%s\n", needs.Plain(a.Name), needs.Plain(a.Container), humanize.IBytes(uint64(a.Size)),
			time.Since(a.Made).Round(time.Minute), fate)
	}
	for _, f := range plan.Foreign {
		fmt.Fprintf(table, "  %s\t\t\t\tpassed over: %s\n", needs.Plain(f.Name), needs.Plain(f.Reason.Error()))
	}
	return table.Flush()
}
