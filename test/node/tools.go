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
	"strings"
)

// Tools are those that the tests need: directories of test/tools, each a module with one tool.
func Tools() []string { return []string{"checkpointctl", "kubelet-1.34", "kubelet-1.37"} }

var kubeletVersion = regexp.MustCompile(`(?m)^require k8s\.io/kubernetes (v\S+)$`)

// Tool returns the executable of a tool that is a module in test/tools, such as "kubelet-1.34" or "checkpointctl",
// building it first where the cache lacks it: minutes for a kubelet. The working directory is in crishim's source tree.
func Tool(ctx context.Context, name string) (string, error) {
	c, err := openCache()
	if err != nil {
		return "", err
	}
	module, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	if err != nil {
		return "", fmt.Errorf("find source tree: %w", err)
	}
	dir := filepath.Join(filepath.Dir(strings.TrimSpace(string(module))), "test/tools", name)
	mod, modErr := os.ReadFile(filepath.Join(dir, "go.mod"))
	sum, sumErr := os.ReadFile(filepath.Join(dir, "go.sum"))
	if err := errors.Join(modErr, sumErr); err != nil {
		return "", fmt.Errorf("build tool: %w", err)
	}
	flags := "-s -w"
	if version := kubeletVersion.FindSubmatch(mod); version != nil {
		flags += " -X k8s.io/component-base/version.gitVersion=" + string(version[1])
	}
	recipe := strings.Join([]string{runtime.Version(), flags, string(mod), string(sum)}, "\n")
	return c.entry(ctx, name, recipe, func(temporary string) error {
		cmd := exec.CommandContext(ctx, "go", "build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", temporary, "tool")
		cmd.Dir = dir
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOWORK=off", "GOFLAGS=")
		return output(cmd)
	})
}
