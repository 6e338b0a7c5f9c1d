package node

import (
	"bytes"
	"context"
	_ "embed" // for the recipe of an image
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"

	"crishim/test/images"
)

// ProgramsImage runs Python, Node.js and Redis from Debian's packages, see test/images/programs. Only a node with
// Options.Programs has it.
const ProgramsImage = "test.invalid/programs:1"

// programsRoot is a root only as far as the image is made of it.
const programsRoot Root = "programs"

//go:embed image.sh
var imageRecipe string

// programs returns the layout with ProgramsImage.
func (c cache) programs(ctx context.Context) (string, error) {
	lower, err := c.lower(ctx, programsRoot)
	if err != nil {
		return "", err
	}
	sources, err := readSources("programs")
	if err != nil {
		return "", err
	}
	writer, err := images.Sources.ReadFile("images.go")
	if err != nil {
		return "", fmt.Errorf("read sources: %w", err)
	}
	config := images.Config{
		Cmd: []string{"/usr/bin/python3", "/programs/main.py"},
		Env: []string{"PATH=/usr/bin:/bin"},
	}
	return c.entry(ctx, "image-programs", fmt.Sprintf("%s\n%+v\n%s\n%s\n%q", c.names(lower), config, imageRecipe, writer, sources), func(temporary string) error {
		return c.writeImages(ctx, temporary, map[string]images.Config{"programs": config}, lower, func(upper string) error {
			programs := filepath.Join(upper, "programs")
			if err := os.MkdirAll(programs, 0o755); err != nil {
				return err
			}
			for name, content := range sources {
				if err := os.WriteFile(filepath.Join(programs, name), content, 0o644); err != nil {
					return err
				}
			}
			return nil
		})
	})
}

// writeImages writes images whose file system is a root, as lower returns it, with what fill puts into upper laid over it.
func (c cache) writeImages(ctx context.Context, layout string, configs map[string]images.Config, lower string, fill func(upper string) error) error {
	dir, err := os.MkdirTemp(string(c), "image-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	upper := filepath.Join(dir, "upper")
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	if err := fill(upper); err != nil {
		return err
	}
	return images.WriteTar(layout, configs, func(w io.Writer) error {
		var stderr bytes.Buffer
		cmd := isolated(ctx, imageRecipe, lower, dir)
		cmd.Stdout, cmd.Stderr = w, &stderr
		if err := dieWithUs(cmd, (*exec.Cmd).Run); err != nil {
			return errors.Join(fmt.Errorf("write root file system: %w", err), errors.New(stderr.String()))
		}
		return nil
	})
}
