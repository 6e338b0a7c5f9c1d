package node

import (
	"context"
	_ "embed" // for the recipe of programs and images
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"crishim/test/images"
)

// suiteModule has Kubernetes' own node e2e suite beside the kubelet of the same version.
const suiteModule = "kubelet-1.34"

// suiteRoot is a root only as far as the suite's images are made of it.
const suiteRoot Root = "suite"

// suiteRecipe is what programs and images depend on: this file.
//
//go:embed suite.go
var suiteRecipe string

// Suite returns a directory with Kubernetes' own node e2e suite, e2e_node.test, with ginkgo, which runs it, and with what its
// containers run, building them first where the cache lacks them: minutes.
func Suite(ctx context.Context) (string, error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	return c.suite(ctx)
}

func (c cache) suite(ctx context.Context) (string, error) {
	module, err := findToolModule(ctx, suiteModule)
	if err != nil {
		return "", err
	}
	return c.entry(ctx, "suite", module.recipe+suiteRecipe, func(temporary string) error {
		if err := os.Mkdir(temporary, 0o755); err != nil {
			return err
		}
		// What agnhost serves HTTPS with.
		porter, err := module.source(ctx, "k8s.io/kubernetes/test/images/agnhost/porter")
		if err != nil {
			return err
		}
		for _, name := range []string{"localhost.crt", "localhost.key"} {
			if err := copyFile(filepath.Join(porter, name), filepath.Join(temporary, name), ""); err != nil {
				return err
			}
		}
		err = module.run(ctx, "test", "-c", "-vet=off", "-o", filepath.Join(temporary, "e2e_node.test"), "k8s.io/kubernetes/test/e2e_node")
		if err != nil {
			return err
		}
		return module.run(ctx, "build", "-o", temporary+"/", "github.com/onsi/ginkgo/v2/ginkgo",
			"k8s.io/kubernetes/test/images/agnhost", "k8s.io/kubernetes/test/images/nonewprivs")
	})
}

// suiteConfigs are the images that the suite's specs use, by the last part of their names, and how they start. All have the same
// file system: Debian's, with the suite's own agnhost and nonewprivs, for which the images of their names are there. The others
// stand in for images that hold what Debian has as well, and for servers of which the specs want no more than that they run.
func suiteConfigs() map[string]images.Config {
	env := []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
	server := func(name string) []string {
		return []string{"/bin/sh", "-c", "echo $$ >/var/run/" + name + ".pid; exec -a " + name + " /agnhost test-webserver"}
	}
	return map[string]images.Config{
		"agnhost":    {Env: env, Entrypoint: []string{"/agnhost"}, Cmd: []string{"pause"}},
		"nonewprivs": {Env: env, Cmd: []string{"nnp"}},
		"busybox":    {Env: env, Cmd: []string{"sh"}},
		"nonroot":    {Env: env, Cmd: []string{"sh"}, User: "1234"},
		"ipc-utils":  {Env: env, Cmd: []string{"sh"}},
		"httpd":      {Env: env, Cmd: server("httpd")},
		"nginx":      {Env: env, Cmd: server("nginx")},
	}
}

// suiteImages returns the layout with the images of the suite, all but pause, which is among those of the tests.
func (c cache) suiteImages(ctx context.Context) (string, error) {
	programs, err := c.suite(ctx)
	if err != nil {
		return "", err
	}
	lower, err := c.lower(ctx, suiteRoot)
	if err != nil {
		return "", err
	}
	writer, err := images.Sources.ReadFile("images.go")
	if err != nil {
		return "", fmt.Errorf("read sources: %w", err)
	}
	recipe := strings.Join([]string{lower, programs, suiteRecipe, imageRecipe, string(writer)}, "\n")
	return c.entry(ctx, "image-suite", recipe, func(temporary string) error {
		return c.writeImages(ctx, temporary, suiteConfigs(), lower, func(upper string) error { return suiteFiles(ctx, upper, lower, programs) })
	})
}

// suiteFiles lays over Debian's root file system what the suite's images have beyond: the suite's own programs, and busybox's in the place
// of Debian's, as in the image of that name.
func suiteFiles(ctx context.Context, upper, lower, programs string) error {
	layers := strings.Split(lower, ":")
	root := layers[len(layers)-1]
	for _, dir := range []string{"etc", "uploads", "usr/bin", "usr/local/bin"} {
		if err := os.MkdirAll(filepath.Join(upper, dir), 0o755); err != nil {
			return err
		}
	}
	applets, err := exec.CommandContext(ctx, filepath.Join(root, "usr/bin/busybox"), "--list").Output()
	if err != nil {
		return fmt.Errorf("list busybox's programs: %w", err)
	}
	// Its sh drops variables such as data-1 from the environment, its date has no milliseconds and its nc no UDP: unlike the image's.
	debian := []string{"busybox", "date", "nc", "sh"}
	for applet := range strings.FieldsSeq(string(applets)) {
		if slices.Contains(debian, applet) {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(upper, "usr/bin", applet)); err != nil {
			return err
		}
	}
	nnp := filepath.Join(upper, "usr/local/bin/nnp")
	return errors.Join(
		os.Symlink("bash", filepath.Join(upper, "usr/bin/sh")),
		copyFile(filepath.Join(programs, "agnhost"), filepath.Join(upper, "agnhost"), ""),
		os.Symlink("agnhost", filepath.Join(upper, "agnhost-2")),
		copyFile(filepath.Join(programs, "localhost.crt"), filepath.Join(upper, "localhost.crt"), ""),
		copyFile(filepath.Join(programs, "localhost.key"), filepath.Join(upper, "localhost.key"), ""),
		copyFile(filepath.Join(programs, "nonewprivs"), nnp, ""),
		os.Chmod(nnp, 0o755|os.ModeSetuid|os.ModeSetgid),
		// A program of busybox that Debian's lacks. The specs call it for the time of the day in milliseconds.
		os.WriteFile(filepath.Join(upper, "usr/local/bin/nmeter"), []byte("#!/bin/sh\nexec date -u +%T.%3N\n"), 0o755),
		// A spec wants a user with a group that only the image knows of.
		copyFile(filepath.Join(root, "etc/passwd"), filepath.Join(upper, "etc/passwd"),
			"user-defined-in-image:x:1000:1000::/home/user-defined-in-image:/bin/sh\n"),
		copyFile(filepath.Join(root, "etc/group"), filepath.Join(upper, "etc/group"),
			"user-defined-in-image:x:1000:\ngroup-defined-in-image:x:50000:user-defined-in-image\n"),
	)
}

// copyFile copies a file with its mode, and appends to the copy.
func copyFile(from, to, appended string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	content, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return os.WriteFile(to, append(content, appended...), info.Mode().Perm())
}
