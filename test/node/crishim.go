package node

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/systemd"
)

// CrishimSocket is where StartCrishim has crishim listen, in the node.
const CrishimSocket = "/run/crishim/crishim.sock"

// CrishimState is the state directory of a crishim of that name, in the node.
func CrishimState(name string) string { return filepath.Join("/var/lib/crishim", name) }

// BuildCrishim builds the binary of the source tree that the working directory is in, static as a release is, into dir, with the build
// tags if there are any. In a virtual machine, where nothing can be built, it returns the one that is installed, or the one with the tag
// "failpoint" that is there, too.
func BuildCrishim(ctx context.Context, dir string, tags ...string) (path string, err error) {
	if os.Getenv(InMachine) != "" {
		switch strings.Join(tags, ",") {
		case "":
			return crishimPath, nil
		case "failpoint":
			return crishimFailpointPath, nil
		}
		return "", fmt.Errorf("build crishim: the virtual machine has none with the tags %q", tags)
	}
	path = filepath.Join(dir, "crishim")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags", strings.Join(tags, ","), "-o", path, "crishim/cmd/crishim")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build crishim: %w: %s", err, out)
	}
	return path, nil
}

// StartCrishim starts a binary of the host's as crishim in front of containerd, with no more privileges than the shipped unit gives it, and
// waits until it relays. After its end, it can be started again.
func (n *Node) StartCrishim(ctx context.Context, binary string, args ...string) (*Daemon, error) {
	return n.StartCrishimAt(ctx, "crishim", CrishimSocket, binary, args...)
}

// StartCrishimAt does the same for one of several, which has a name and a socket of its own.
func (n *Node) StartCrishimAt(ctx context.Context, name, socket, binary string, args ...string) (*Daemon, error) {
	const target = "/run/bin-crishim"
	if _, err := os.Lstat(n.Path(target)); os.IsNotExist(err) {
		if err := os.WriteFile(n.Path(target), nil, 0o700); err != nil {
			return nil, fmt.Errorf("start crishim: %w", err)
		}
		if err := n.Bind(binary, target); err != nil {
			return nil, fmt.Errorf("start crishim: %w", err)
		}
	}
	if err := n.configureCrishim(); err != nil {
		return nil, fmt.Errorf("start crishim: %w", err)
	}
	confine, err := confinement(systemd.Service)
	if err != nil {
		return nil, fmt.Errorf("start crishim: %w", err)
	}
	admin := "unix:///run/crishim/admin.sock" // the default
	if name != "crishim" {
		admin = "unix:///run/" + name + "/admin.sock"
	}
	daemon, err := n.StartDaemon(name, confine[0], slices.Concat(confine[1:], []string{target, "serve",
		"--listen", "unix://" + socket, "--runtime-endpoint", "unix://" + ContainerdSocket, "--state-dir", CrishimState(name), "--admin-socket", admin}, args)...)
	if err != nil {
		return nil, err
	}
	client, err := n.DialCRI(socket)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	err = n.wait(ctx, daemon, func(ctx context.Context) error {
		_, err := client.Runtime.Version(ctx, &cri.VersionRequest{})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start crishim: %w", err)
	}
	return daemon, nil
}

// confinement is the beginning of a command line that takes from a process what a unit does, as far as that can be done to a process: what
// systemd does by cgroups needs systemd, see test/vm.
func confinement(unit string) ([]string, error) {
	script, confine := "exec \"$@\"", []string{"setpriv"}
	var dropped []string
	for line := range strings.Lines(unit) {
		key, value, _ := strings.Cut(strings.TrimSpace(line), "=")
		switch {
		case key == "UMask":
			script = "umask " + value + " && " + script
		case key == "NoNewPrivileges" && value == "yes":
			confine = append(confine, "--no-new-privs")
		case key == "CapabilityBoundingSet" && strings.HasPrefix(value, "~"):
			for _, capability := range strings.Fields(value[1:]) {
				dropped = append(dropped, "-"+strings.ToLower(strings.TrimPrefix(capability, "CAP_")))
			}
		case key == "CapabilityBoundingSet", key == "NoNewPrivileges":
			return nil, fmt.Errorf("confine process as the unit does: %s is not known here", line)
		}
	}
	if len(dropped) > 0 {
		confine = append(confine, "--bounding-set", strings.Join(dropped, ","))
	}
	return append([]string{"sh", "-c", script, "sh"}, append(confine, "--")...), nil
}

// configureCrishim writes crishim's configuration, unless a test has done it: how full the disk is of the machine that runs the tests says
// nothing about crishim.
func (n *Node) configureCrishim() error {
	file := n.Path("/etc/crishim/config.toml")
	if _, err := os.Lstat(file); !os.IsNotExist(err) {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, []byte("[checkpoint]\nreserve = \"0%\"\nreserve_inodes = \"0%\"\n"), 0o644)
}
