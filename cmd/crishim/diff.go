package main

import (
	"errors"
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"crishim/shim/archive/inspect"
)

// errDifferent is what diff ends with when there are differences, which are printed already.
var errDifferent = errors.New("the archives differ")

func diffCommand() *cobra.Command {
	var output string
	command := &cobra.Command{
		Use:   "diff A B",
		Short: "Tell what changed between two checkpoints of a container",
		Long: `diff compares two checkpoint archives of a container: processes started and ended, pages of
memory changed, files and sockets opened and closed, mounts, files changed in the writable
layer and in /dev/shm, growth of the log. A process is the same if it has the same number in
the container. Pages and files are compared by their bytes. Times of files, positions in
open files, and numbers that the kernel gives, such as those of pipes, are not compared.

An archive that crishim has compressed is read as it is. One that others have compressed in
one piece must be decompressed first (zstd -d).

Exit code: 0 if there is no difference
           1 if there is one
           2 if the archives could not be compared`,
		Example: `  crishim diff before.tar after.tar
  crishim diff --output json before.tar after.tar | jq '.memory[] | {pid, name, changed}'`,
		Args: func(command *cobra.Command, args []string) error {
			if err := cobra.ExactArgs(2)(command, args); err != nil {
				return exitError{2, err}
			}
			return nil
		},
		RunE: func(command *cobra.Command, args []string) error {
			d, err := compare(command, output, args)
			if err != nil {
				return exitError{2, err}
			}
			if !d.Same() {
				return exitError{1, errDifferent}
			}
			return nil
		},
	}
	command.Flags().StringVarP(&output, "output", "o", "table", "form of the output: table or json")
	command.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{2, err} })
	return command
}

func compare(command *cobra.Command, output string, args []string) (*inspect.Difference, error) {
	if output != "table" && output != "json" {
		return nil, fmt.Errorf("--output %q: it is table or json", output)
	}
	var files [2]*os.File
	for i, path := range args {
		file, err := openArchive(path)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		files[i] = file
	}
	d, err := inspect.Compare(command.Context(), files[0], files[1])
	if err != nil {
		return nil, err
	}
	if output == "json" {
		return d, inspect.WriteJSON(command.OutOrStdout(), d)
	}
	return d, d.Table(command.OutOrStdout())
}
