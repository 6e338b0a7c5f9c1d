package node

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
)

// Tools are those that the tests need: directories of test/tools, each a module with one tool, or of a kubelet's version.
func Tools() []string { return []string{"checkpointctl", "kubelet-1.34", "kubelet-1.37", "promtool"} }

const kubeletPackage = "k8s.io/kubernetes/cmd/kubelet"

var kubeletVersion = regexp.MustCompile(`(?m)^require k8s\.io/kubernetes (v\S+)$`)

// Tool returns the executable of a tool that is a module in test/tools, such as "kubelet-1.34" or "checkpointctl",
// building it first where the cache lacks it: minutes for a kubelet. The working directory is in crishim's source tree.
func Tool(ctx context.Context, name string) (string, error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	module, err := findToolModule(ctx, name)
	if err != nil {
		return "", err
	}
	what := "tool"
	if strings.HasPrefix(name, "kubelet-") {
		what = kubeletPackage // its module has what tests a kubelet, too
	}
	return c.entry(ctx, name, module.recipe, func(temporary string) error {
		// promtool without Prometheus' ways to find targets in clouds, which are most of what it depends on. Others do not know the tag.
		return module.run(ctx, "build", "-tags", "remove_all_sd", "-o", temporary, what)
	})
}

// toolModule is a directory of test/tools.
type toolModule struct {
	dir string
	// ldflags are what all of its programs are linked with.
	ldflags string
	// recipe is all that they depend on.
	recipe string
}

func findToolModule(ctx context.Context, name string) (toolModule, error) {
	source, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return toolModule{}, fmt.Errorf("find source tree: %w", err)
	}
	m := toolModule{dir: filepath.Join(filepath.Dir(strings.TrimSpace(string(source))), "test/tools", name), ldflags: "-s -w"}
	mod, modErr := os.ReadFile(filepath.Join(m.dir, "go.mod"))
	sum, sumErr := os.ReadFile(filepath.Join(m.dir, "go.sum"))
	if err := errors.Join(modErr, sumErr); err != nil {
		return toolModule{}, fmt.Errorf("build tool: %w", err)
	}
	if version := kubeletVersion.FindSubmatch(mod); version != nil {
		m.ldflags += " -X k8s.io/component-base/version.gitVersion=" + string(version[1])
	}
	m.recipe = strings.Join([]string{runtime.Version(), m.ldflags, string(mod), string(sum)}, "\n")
	return m, nil
}

// run runs a command of go that builds packages of the module's build list.
func (m toolModule) run(ctx context.Context, command string, args ...string) error {
	flags := []string{command, "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", m.ldflags}
	return output(m.goCommand(ctx, slices.Concat(flags, args)...))
}

// source is the directory of a package of the module's build list.
func (m toolModule) source(ctx context.Context, name string) (string, error) {
	dir, err := m.goCommand(ctx, "list", "-mod=readonly", "-f", "{{.Dir}}", name).Output()
	if err != nil {
		return "", fmt.Errorf("find source of %s: %w", name, err)
	}
	return strings.TrimSpace(string(dir)), nil
}

func (m toolModule) goCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Dir = m.dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
	return cmd
}
