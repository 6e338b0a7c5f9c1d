package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestConvertMistakesAreNamed(t *testing.T) {
	sound := archiveWith(t, soundMembers...)
	out := filepath.Join(t.TempDir(), "out.tar")
	for name, test := range map[string]struct {
		args []string
		want string
	}{
		"no form":              {[]string{sound, out}, `required flag(s) "to" not set`},
		"an unknown form":      {[]string{"--to", "docker", sound, out}, `--to "docker": it is oci or podman`},
		"no target":            {[]string{"--to", "oci", sound}, "accepts 2 arg(s)"},
		"a name for podman":    {[]string{"--to", "podman", "--name", "web", sound, out}, "--name names an image"},
		"an ID for an image":   {[]string{"--to", "oci", "--image-id", "ab", sound, out}, "--image-id is for podman"},
		"a digest in the name": {[]string{"--to", "oci", "--name", "web@sha256:" + strings.Repeat("0", 64), sound, out}, "must not have a digest"},
		"no name":              {[]string{"--to", "oci", "--name", "Web:!", sound, out}, "parse image name"},
		"no such archive":      {[]string{"--to", "oci", sound + "-not", out}, "no such file"},
		"a broken archive":     {[]string{"--to", "oci", archiveWith(t, soundMembers[1:]...), out}, "config.dump is missing"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := execute(t, append([]string{"convert"}, test.args...)...)
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error is %v, want one with %q", err, test.want)
			}
			if _, err := os.Lstat(out); err == nil {
				t.Error("something was written")
			}
		})
	}
}

func TestConvertTellsTheName(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("an image is root's")
	}
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	out, err := execute(t, "convert", "--to", "oci", "--name", "web:2", archiveWith(t, soundMembers...), "image.tar")
	if err != nil || out != "docker.io/library/web:2\n" {
		t.Errorf("it says %q, %v", out, err)
	}
	if _, err := os.Stat(filepath.Join(dir, "image.tar")); err != nil {
		t.Error(err)
	}
}
