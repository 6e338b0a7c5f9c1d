package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"crishim/shim/archive/inspect"
)

func inspectCommand() *cobra.Command {
	var output string
	var sections inspect.Sections
	command := &cobra.Command{
		Use:   "inspect ARCHIVE",
		Short: "Tell what is in a checkpoint archive",
		Long: `inspect tells what is in a checkpoint archive: container, processes and their memory,
open files, sockets, mounts, changes to the root file system, what CRIU measured, and what
a restore needs. The archive may be anybody's, compressed by zstd or not. Of memory only
the amount is told, and of processes the name, neither command line nor environment.

Nothing is unpacked, and memory is passed over. Whether digests are right, crishim verify tells.

  table  a summary, or the sections that are asked for, whole
  tree   processes under their parents, with what they have open
  json   everything`,
		Example: `  crishim inspect checkpoint.tar
  crishim inspect --files --sockets checkpoint.tar
  crishim inspect --output tree checkpoint.tar
  crishim inspect --output json checkpoint.tar | jq '.processes[] | {pid, name, memory}'`,
		Args: cobra.ExactArgs(1),
		RunE: func(command *cobra.Command, args []string) error {
			switch output {
			case "table", "tree", "json":
			default:
				return fmt.Errorf("--output %q: it is table, tree or json", output)
			}
			if output != "table" && sections != (inspect.Sections{}) {
				return fmt.Errorf("--output %s has all sections: none can be asked for", output)
			}
			file, err := openArchive(args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			d, err := inspect.Read(command.Context(), file)
			if err != nil {
				return err
			}
			switch output {
			case "tree":
				return d.Tree(command.OutOrStdout())
			case "json":
				return inspect.WriteJSON(command.OutOrStdout(), d)
			}
			return d.Table(command.OutOrStdout(), sections)
		},
	}
	flags := command.Flags()
	flags.StringVarP(&output, "output", "o", "table", "form of the output: table, tree or json")
	flags.BoolVar(&sections.Processes, "processes", false, "all processes")
	flags.BoolVar(&sections.Files, "files", false, "open files")
	flags.BoolVar(&sections.Sockets, "sockets", false, "sockets")
	flags.BoolVar(&sections.Mounts, "mounts", false, "mounts")
	flags.BoolVar(&sections.Layer, "layer", false, "the writable layer, and its largest files")
	flags.BoolVar(&sections.Needs, "needs", false, "what a restore needs, as crishim verify says")
	return command
}
