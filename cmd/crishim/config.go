package main

import (
	"fmt"
	"os"

	"github.com/spf13/cobra"

	"crishim/shim/config"
	"crishim/systemd"
)

func configCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "config",
		Short: "Print, check and explain the configuration",
		Long: `The configuration is read from /etc/crishim/config.toml, then from *.toml in the
directory config.d beside it, in the order of their names. Variables of the
environment, such as CRISHIM_LOG_LEVEL or CRISHIM_CHECKPOINT_RESERVE, win over
files, and flags of crishim serve over those.`,
	}
	command.AddCommand(
		&cobra.Command{
			Use:   "default",
			Short: "Print a configuration file that has each key with its default and a comment",
			Args:  cobra.NoArgs,
			RunE: func(command *cobra.Command, _ []string) error {
				_, err := fmt.Fprint(command.OutOrStdout(), systemd.Config)
				return err
			},
		},
		configReader("check", "Check the configuration, and say what was read",
			`check reads the configuration as crishim serve does. What is wrong is said in a line
each, with file, line and key, and the exit code is 1.`,
			func(command *cobra.Command, c *config.Config) error {
				if err := daemon(c, nil).Validate(); err != nil {
					return err
				}
				out := command.OutOrStdout()
				for _, file := range c.Files {
					fmt.Fprintln(out, "read", file)
				}
				if len(c.Files) == 0 {
					fmt.Fprintln(out, "no file was read")
				}
				for _, name := range c.Ignored {
					fmt.Fprintf(out, "%s in the environment is no key, and is ignored\n", name)
				}
				_, err := fmt.Fprintln(out, "ok")
				return err
			}),
		configReader("show", "Print each key with the value that it has, and where that comes from", "",
			func(command *cobra.Command, c *config.Config) error { return c.Show(command.OutOrStdout()) }),
	)
	return command
}

// configReader makes a command that does something with the configuration.
func configReader(name, short, long string, run func(*cobra.Command, *config.Config) error) *cobra.Command {
	file := config.DefaultFile
	command := &cobra.Command{
		Use: name, Short: short, Long: long, Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			c, err := config.Sources{File: file, Environment: os.Environ()}.Load()
			if err != nil {
				return err
			}
			return run(command, c)
		},
	}
	configFlag(command, &file)
	return command
}

// configFlag lets a command be told which file to read.
func configFlag(command *cobra.Command, file *string) {
	command.Flags().StringVar(file, "config", *file, "configuration file, with config.d beside it; that the default one is not there is no error")
}
