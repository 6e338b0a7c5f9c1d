package main

import (
	"fmt"
	"io"
	"os"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"crishim/shim/archive"
	"crishim/shim/archive/needs"
)

func verifyCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "verify ARCHIVE",
		Short: "Check a checkpoint archive, and say what a restore of it needs",
		Long: `verify reads an archive once and checks its structure, and the sizes and digests of
its members where crishim has written it. Then it says what a machine must have so
that the container can be restored there, a line for each thing. Archives by others,
such as containerd's own, have no digests: of those it can only check the structure.

Exit code: 0 if nothing is wrong with the archive
           1 if something is, which is listed
           2 if it could not be checked`,
		Example: `  crishim verify /var/lib/kubelet/checkpoints/checkpoint-web_default-app-2026-11-24T09:00:00Z.tar`,
		Args: func(command *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(1)(command, args); err != nil {
				return exitError{2, err}
			}
			return nil
		},
		RunE: func(command *cobra.Command, args []string) error {
			file, err := openArchive(args[0])
			if err != nil {
				return exitError{2, err}
			}
			defer file.Close()
			var images needs.Images
			report, err := archive.Verify(command.Context(), file, images.Look)
			if err != nil {
				return exitError{2, fmt.Errorf("verify %s: %w", args[0], err)}
			}
			if err := printReport(command.OutOrStdout(), report, &images); err != nil {
				return exitError{2, err}
			}
			if n := len(report.Problems); n > 0 {
				return exitError{1, fmt.Errorf("%s is not sound: do not restore it", args[0])}
			}
			return nil
		},
	}
	command.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{2, err} })
	return command
}

// openArchive opens an archive for reading. A FIFO does not hold it up.
func openArchive(path string) (*os.File, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", path)
	}
	return os.Open(path)
}

func printReport(w io.Writer, report *archive.Report, images *needs.Images) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(item, format string, args ...any) {
		fmt.Fprintf(table, "%s\t%s\n", item, fmt.Sprintf(format, args...))
	}
	if len(report.Problems) > 0 {
		for _, problem := range report.Problems {
			line("problem", "%s", problem)
		}
		return table.Flush()
	}
	var bytes int64
	for _, m := range report.Members {
		bytes += m.Size
	}
	line("structure", "sound: %d members of %d bytes", len(report.Members), bytes)
	switch {
	case report.Manifest != nil && !hasDigests(report.Manifest):
		line("digests", "none: crishim %s has written this archive without, so damage inside of members cannot be seen",
			needs.Plain(report.Manifest.Origin.Crishim))
	case report.Manifest != nil:
		line("digests", "right: nothing has changed since crishim %s wrote it", needs.Plain(report.Manifest.Origin.Crishim))
	default:
		line("digests", "none: crishim has not written this archive, so damage inside of members cannot be seen")
	}
	line("container", "%s (%s), checkpointed at %s", needs.Plain(report.Config.Name), needs.Plain(report.Config.ID),
		report.Config.CheckpointedTime.UTC().Format(time.RFC3339))
	fmt.Fprintln(table, "\nA restore needs")
	for _, need := range images.List(report) {
		line(need.Item, "%s", need.Text)
	}
	return table.Flush()
}

// hasDigests tells whether a manifest has a digest of each member.
func hasDigests(m *archive.Manifest) bool {
	return !slices.ContainsFunc(m.Members, func(d archive.Digest) bool { return d.SHA256 == "" })
}
