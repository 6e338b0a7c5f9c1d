package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"crishim/shim/config"
	"crishim/shim/kubelet"
)

func kubeletCommand() *cobra.Command {
	command := &cobra.Command{
		Use:   "kubelet",
		Short: "Point this node's kubelet at crishim, or back at its runtime",
		Long: `kubelet switches the kubelet of this node over to crishim, and back. It knows
kubelets that systemd runs as kubelet.service, as on the nodes of kubeadm. Pods go on
running. One file is written, the drop-in
/etc/systemd/system/kubelet.service.d/20-crishim.conf; no other is touched.`,
	}
	command.AddCommand(kubeletEnableCommand(), kubeletDisableCommand(), kubeletStatusCommand())
	return command
}

// kubeletFlags are those of a command that changes something.
func kubeletFlags(command *cobra.Command, file *string, wait *time.Duration) {
	configFlag(command, file)
	command.Flags().DurationVar(wait, "timeout", time.Minute, "how long the kubelet may take to connect, before everything is put back")
}

func kubeletEnableCommand() *cobra.Command {
	file, wait := config.DefaultFile, time.Duration(0)
	command := &cobra.Command{
		Use:   "enable",
		Short: "Have this node's kubelet talk to crishim",
		Long: `enable has the kubelet talk to crishim, which must run, and relay to the runtime that
the kubelet uses now. It finds out what that is as the kubelet does: by its flags,
wherever they come from, the files in --config-dir, and the file --config. Then it writes
a drop-in that puts a flag behind all others, restarts the kubelet, and waits for its
connection. If none comes, or anything else goes wrong, everything is put back, and
the kubelet restarted. An image service endpoint of its own stays as it is.

A kubelet that is not running is not started: it uses crishim when it starts.`,
		Example: `  systemctl enable --now crishim.socket crishim.service
  crishim kubelet enable`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return withNode(command, file, false, func(n *kubelet.Node) error {
				n.Wait = wait
				if err := n.Enable(command.Context()); err != nil {
					return fmt.Errorf("enable crishim for the kubelet: %w", err)
				}
				return nil
			})
		},
	}
	kubeletFlags(command, &file, &wait)
	return command
}

func kubeletDisableCommand() *cobra.Command {
	file, wait := config.DefaultFile, time.Duration(0)
	command := &cobra.Command{
		Use:   "disable",
		Short: "Have this node's kubelet talk to its runtime again",
		Long: `disable removes what crishim kubelet enable has written, restarts the kubelet, and waits
until it is connected to what it uses now. If it does not connect, everything is put
back. A drop-in that somebody has changed is not touched: the error shows the change.
It is an error as well if something else points the kubelet at crishim. A configuration
file that cannot be read does not stand in its way.`,
		Args: cobra.NoArgs,
		RunE: func(command *cobra.Command, _ []string) error {
			return withNode(command, file, true, func(n *kubelet.Node) error {
				n.Wait = wait
				if err := n.Disable(command.Context()); err != nil {
					return fmt.Errorf("disable crishim for the kubelet: %w", err)
				}
				return nil
			})
		},
	}
	kubeletFlags(command, &file, &wait)
	return command
}

func kubeletStatusCommand() *cobra.Command {
	file, output := config.DefaultFile, ""
	command := &cobra.Command{
		Use:   "status",
		Short: "Say whether this node's kubelet talks to crishim",
		Long: `status says what the kubelet talks to, where that is written, and whether it is
connected to crishim. It changes nothing. The first line is

  enabled      the kubelet talks to crishim, or will when it starts
  disabled     it does not, and was not told to
  overwritten  it was told to by crishim kubelet enable, and something else wins

Exit code: 0 if it is enabled
           1 if it is disabled or overwritten
           2 if that could not be found out`,
		Example: `  crishim kubelet status --output json`,
		Args: func(command *cobra.Command, args []string) error {
			if err := cobra.NoArgs(command, args); err != nil {
				return exitError{2, err}
			}
			return nil
		},
		RunE: func(command *cobra.Command, _ []string) error {
			var status *kubelet.Status
			err := withNode(command, file, false, func(n *kubelet.Node) (err error) {
				status, err = n.Status(command.Context())
				return err
			})
			if err == nil {
				err = printStatus(command.OutOrStdout(), status, output)
			}
			if err != nil {
				return exitError{2, err}
			}
			if status.State != kubelet.Enabled {
				return exitError{1, errors.New("the kubelet does not talk to crishim")}
			}
			return nil
		},
	}
	command.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return exitError{2, err} })
	configFlag(command, &file)
	command.Flags().StringVar(&output, "output", "text", "form of what is printed: text or json")
	return command
}

// withNode calls do with this machine, whose crishim has a configuration file. If anyway, the defaults stand in for one that is wrong.
func withNode(command *cobra.Command, file string, anyway bool, do func(*kubelet.Node) error) error {
	keys := config.Defaults()
	if c, err := (config.Sources{File: file, Environment: os.Environ()}).Load(); err == nil {
		keys = c.Keys
	} else if anyway {
		fmt.Fprintf(command.ErrOrStderr(), "crishim: %v: going by the defaults\n", err)
	} else {
		return err
	}
	systemd, err := kubelet.Connect(command.Context())
	if err != nil {
		return err
	}
	defer systemd.Close()
	return do(&kubelet.Node{
		Systemd: systemd, Listen: keys.Listen, Runtime: keys.RuntimeEndpoint,
		Say: func(format string, args ...any) { fmt.Fprintf(command.OutOrStdout(), format+"\n", args...) },
	})
}

func printStatus(w io.Writer, s *kubelet.Status, output string) error {
	switch output {
	case "json":
		encoder := json.NewEncoder(w)
		encoder.SetIndent("", "  ")
		return encoder.Encode(s)
	case "text":
	default:
		return fmt.Errorf("--output %q: it is text or json", output)
	}
	fmt.Fprintln(w, s.State)
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(item, text string) { fmt.Fprintf(table, "%s\t%s\n", item, text) }
	line("endpoint", s.Endpoint.Value+", by "+s.Endpoint.Source)
	if s.Image != nil {
		line("image service", s.Image.Value+", by "+s.Image.Source)
	}
	if s.DropIn != "" {
		line("drop-in", s.DropIn)
	}
	connected := "no"
	if s.Connected {
		connected = "yes"
	}
	line("connected", connected)
	for _, note := range s.Notes {
		line("note", note)
	}
	return table.Flush()
}
