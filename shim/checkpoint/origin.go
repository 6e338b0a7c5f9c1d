package checkpoint

import (
	"context"
	"os/exec"
	"reflect"
	"regexp"
	"runtime"
	"strings"
	"time"

	"golang.org/x/sys/cpu"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/criu"
	"crishim/shim/archive"
	"crishim/shim/container"
)

// origin tells where an archive is made, for whoever restores it. No checkpoint fails for want of it: what cannot be found out
// stays empty.
func (s *Service) origin(ctx context.Context, features criu.Features, c *container.Container) archive.Origin {
	var name unix.Utsname
	_ = unix.Uname(&name) // it has no way to fail
	return archive.Origin{
		Crishim:        s.config().Version,
		RuntimeVersion: runtimeVersion(ctx, c.RuntimeBinary),
		Criu:           features.VersionString(),
		Kernel:         unix.ByteSliceToString(name.Release[:]),
		Architecture:   runtime.GOARCH,
		CPUFeatures:    cpuFeatures(),
		CgroupVersion:  cgroupVersion(c.Freezer),
	}
}

var versionLine = regexp.MustCompile(`^\S+ version (\S+)`)

// runtimeVersion asks an OCI runtime for its version. They all answer as runc does.
func runtimeVersion(ctx context.Context, binary string) string {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, binary, "--version")
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	out, err := cmd.Output()
	if err != nil {
		return ""
	}
	match := versionLine.FindSubmatch(out)
	if match == nil {
		return ""
	}
	return string(match[1])
}

// cpuFeatures are the extensions of the instruction set that processes of this machine may use, and so may have decided to use:
// x/sys has a field for each, such as HasAVX2.
func cpuFeatures() []string {
	var all reflect.Value
	switch runtime.GOARCH {
	case "amd64":
		all = reflect.ValueOf(cpu.X86)
	case "arm64":
		all = reflect.ValueOf(cpu.ARM64)
	default:
		return nil
	}
	var found []string
	for field, value := range all.Fields() {
		if name, ok := strings.CutPrefix(field.Name, "Has"); ok && value.Bool() {
			found = append(found, strings.ToLower(name))
		}
	}
	return found
}

// cgroupVersion is that of the hierarchy that a directory is in, 0 if that cannot be found out.
func cgroupVersion(dir string) int {
	var fs unix.Statfs_t
	switch {
	case unix.Statfs(dir, &fs) != nil:
		return 0
	case fs.Type == unix.CGROUP2_SUPER_MAGIC:
		return 2
	}
	return 1
}

var hexID = regexp.MustCompile(`^(?:sha256:)?([0-9a-f]{64})$`)

// imageID asks the runtime which image a container's is, since a status has its name or its digest only. It is empty where the
// runtime does not tell: only a restore by podman needs it.
func (s *Service) imageID(ctx context.Context, c *container.Container) string {
	image := c.Status.GetImageRef()
	// cri-dockerd puts docker:// or docker-pullable:// before what it is asked by.
	if _, bare, ok := strings.Cut(image, "://"); ok {
		image = bare
	}
	answer, err := s.config().Images.ImageStatus(ctx, &runtimeapi.ImageStatusRequest{Image: &runtimeapi.ImageSpec{Image: image}})
	if err != nil {
		s.config().Log.Debugf("archive goes without the id of image %s: %v", image, err)
		return ""
	}
	match := hexID.FindStringSubmatch(answer.GetImage().GetId())
	if match == nil {
		return ""
	}
	return match[1]
}
