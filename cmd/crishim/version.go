package main

import (
	"fmt"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// Set by the linker: see the Makefile.
var (
	version = "unreleased"
	commit  = "unknown"
)

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the versions of crishim and of what it is built with",
		Args:  cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(command.OutOrStdout(), "crishim %s\ncommit  %s\ngo      %s %s/%s\ngo-criu %s\n",
				version, commit, runtime.Version(), runtime.GOOS, runtime.GOARCH, module("github.com/checkpoint-restore/go-criu/v7"))
			return err
		},
	}
}

// module returns the version of a module that this binary was built with.
func module(path string) string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	for _, m := range info.Deps {
		if m.Path == path {
			return m.Version
		}
	}
	return "unknown"
}
