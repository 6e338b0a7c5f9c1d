package main

import (
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	"crishim/shim/archive/convert"
)

func convertCommand() *cobra.Command {
	var to, name, imageID string
	command := &cobra.Command{
		Use:   "convert --to oci|podman ARCHIVE OUT",
		Short: "Make an OCI image or an archive for podman from a checkpoint archive",
		Long: `convert verifies a checkpoint archive and writes it in another form to OUT, which
must not exist. OUT appears complete or not at all, mode 0600: it holds the container's
memory, as the archive does.

  oci     an OCI image in a tar, for containerd and CRI-O: the archive as one layer,
          with the annotations by which they know a checkpoint. The image's name is
          printed: --name, or the container's name and the time of the checkpoint.
  podman  an archive for podman container restore --import. podman finds the image by
          its ID, which archives by crishim have; for others it is given by --image-id.`,
		Example: `  crishim convert --to oci --name registry.example/checkpoints/web:1 checkpoint.tar image.tar
  ctr -n k8s.io images import image.tar

  crishim convert --to podman checkpoint.tar podman.tar
  podman container restore --import podman.tar`,
		Args: cobra.ExactArgs(2),
		RunE: func(command *cobra.Command, args []string) error {
			out, err := filepath.Abs(args[1])
			if err != nil {
				return err
			}
			if forOCI := command.Flags().Changed("name"); forOCI && to != "oci" {
				return fmt.Errorf("--name names an image: it goes with --to oci")
			}
			if forPodman := command.Flags().Changed("image-id"); forPodman && to != "podman" {
				return fmt.Errorf("--image-id is for podman: it goes with --to podman")
			}
			file, err := openArchive(args[0])
			if err != nil {
				return err
			}
			defer file.Close()
			switch to {
			case "oci":
				name, err = convert.ToOCI(command.Context(), file, out, name)
				if err == nil {
					fmt.Fprintln(command.OutOrStdout(), name)
				}
			case "podman":
				err = convert.ToPodman(command.Context(), file, out, imageID)
			default:
				return fmt.Errorf("--to %q: it is oci or podman", to)
			}
			if err != nil {
				return fmt.Errorf("convert %s: %w", args[0], err)
			}
			return nil
		},
	}
	flags := command.Flags()
	flags.StringVar(&to, "to", "", "form to convert to: oci or podman")
	flags.StringVar(&name, "name", "", "name of the image, for oci")
	flags.StringVar(&imageID, "image-id", "", "ID in podman's storage of the image that the container ran from, for podman")
	_ = command.MarkFlagRequired("to") // fails for flags that there are not
	return command
}
