// Package container answers one question: who is this container?
//
// From what the runtime says (a verbose ContainerStatus), what it keeps on disk (the bundle and the OCI runtime's state) and
// what the kernel knows (/proc) it makes one description, complete or not at all: an error says what was looked for and
// where. It changes nothing, neither in the container nor on the node, and trusts nothing that the container can write.
package container

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Errors that callers act on; they are found by errors.Is.
var (
	ErrNotFound    = errors.New("no such container")
	ErrNotRunning  = errors.New("container is not running")
	ErrUnsupported = errors.New("container cannot be checkpointed")
)

// Container is a running container. It is a snapshot, never changed after Describe returns; the process that it names may
// end at any time, which Process.Verify tells. Paths are those of this process's mount namespace unless another is named.
type Container struct {
	// Status is what the runtime says of the container.
	Status *runtimeapi.ContainerStatus
	// Process is the container's init.
	Process Process
	// Spec is the bundle's config.json, with the resources that the runtime has given the container since.
	Spec []byte
	// Runtime is the OCI runtime by its conventions: "runc" or "crun".
	Runtime string
	// RuntimeBinary is what the shim runs: the OCI runtime's path or name.
	RuntimeBinary string
	// Rootfs is the root file system, mounted.
	Rootfs string
	// Layer is the writable layer of the overlay at Rootfs, nil where nothing can be written to it.
	Layer *Layer
	// Freezer is the container's directory in the cgroup hierarchy that has the freezer.
	Freezer string
	// SharedNamespaces are the network and process namespaces that the spec names by a path. CRIU makes others anew.
	SharedNamespaces []Namespace
	// Network is a path of its network namespace, which outlives its processes where it is the pod's.
	Network string
	// ExternalMounts are mount points inside the container whose content is not the image's: bind mounts with symlinks
	// resolved, devices, and on cgroup v1 the controllers.
	ExternalMounts []string
	// BindMounts are the spec's bind mounts.
	BindMounts []specs.Mount
	// MaskedFiles are files inside the container that the runtime has covered with /dev/null.
	MaskedFiles []string
	// Descriptors is what descriptors 0, 1 and 2 of init were when it started.
	Descriptors []string
	// Shm says whether /dev/shm is the pod's, and so not in CRIU's images.
	Shm bool
	// Log is the container's log, a regular file unless somebody has replaced it since; empty where it has none.
	Log string
}

// Namespace is a namespace that the container was put into.
type Namespace struct {
	Type  string // as in the OCI spec: "network", "pid", …
	Inode uint64
}

// Describe looks the container up by its full id or a prefix of it that the runtime accepts. Errors of the runtime itself, such
// as that it is away, keep their gRPC status.
func Describe(ctx context.Context, runtime runtimeapi.RuntimeServiceClient, id string) (*Container, error) {
	response, err := runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id, Verbose: true})
	if status.Code(err) == codes.NotFound {
		return nil, fmt.Errorf("%w: the runtime knows none with id %q", ErrNotFound, id)
	}
	if err != nil {
		return nil, fmt.Errorf("ask runtime for container %q: %w", id, err)
	}
	c := &Container{Status: response.GetStatus()}
	// Whatever the runtime says: no other container is stopped, and no other path looked at.
	if is := c.Status.GetId(); !strings.HasPrefix(is, id) || strings.Contains(is, "/") {
		return nil, fmt.Errorf("the runtime was asked for container %q and answers of %q: restart it, and see what stands between it and crishim", id, is)
	}
	if state := c.Status.GetState(); state != runtimeapi.ContainerState_CONTAINER_RUNNING {
		return nil, notRunning(c.Status)
	}
	info, err := parseInfo(response.GetInfo())
	if err != nil {
		return nil, err
	}
	if c.Process, err = FindProcess(info.Pid); err != nil {
		return nil, err
	}
	shim, err := findParent(info.Pid)
	if err != nil {
		return nil, err
	}
	bundle, err := findBundle(c.Status.GetId(), shim)
	if err != nil {
		return nil, err
	}
	if c.Spec, err = readBounded(filepath.Join(bundle, "config.json")); err != nil {
		return nil, fmt.Errorf("read OCI spec: %w", err)
	}
	spec := &specs.Spec{}
	if err := json.Unmarshal(c.Spec, spec); err != nil {
		return nil, fmt.Errorf("parse OCI spec of %s: %w", bundle, err)
	}
	if spec.Root == nil || spec.Linux == nil {
		return nil, fmt.Errorf("%w: its specification in %s has no root or no Linux part: is this a container of the kind that runc runs?",
			ErrUnsupported, bundle)
	}
	if c.Spec, err = withResources(c.Spec, info.RuntimeSpec.Linux.Resources); err != nil {
		return nil, fmt.Errorf("parse OCI spec of %s: %w", bundle, err)
	}
	if c.Rootfs = spec.Root.Path; !filepath.IsAbs(c.Rootfs) {
		c.Rootfs = filepath.Join(bundle, c.Rootfs)
	}
	options, err := readOptions(bundle)
	if err != nil {
		return nil, err
	}
	state, err := findState(options.Root, bundle, c.Process, shim)
	if err != nil {
		return nil, err
	}
	c.Runtime, c.Descriptors = state.runtime, state.descriptors
	c.RuntimeBinary = options.BinaryName
	if err := c.describeMounts(spec, info.Snapshotter); err != nil {
		return nil, err
	}
	if c.SharedNamespaces, err = sharedNamespaces(info.Pid, spec.Linux.Namespaces); err != nil {
		return nil, err
	}
	c.Network = networkPath(info.Pid, spec.Linux.Namespaces)
	if c.Freezer, err = findFreezer(info.Pid, state.cgroup); err != nil {
		return nil, err
	}
	if c.Log, err = findLog(c.Status.GetLogPath(), c.Status.GetId(), c.Rootfs); err != nil {
		return nil, err
	}
	// Everything above was read by pid; only now is it known to have been of one process.
	if err := c.Process.Verify(); err != nil {
		return nil, err
	}
	return c, nil
}

// VerifyRunning says whether the container still runs: whether its process is the one that was described, and nobody has paused it.
// A checkpoint freezes the container just as a pause does, so this is worth something only while none can be in flight.
func (c *Container) VerifyRunning() error {
	paused, err := frozen(c.Freezer)
	if errors.Is(err, os.ErrNotExist) || err == nil && !paused {
		return c.Process.Verify() // where its cgroup is gone, so is the process
	}
	if err != nil {
		return err
	}
	return fmt.Errorf("%w: %s (%s) is paused: unpause it first (its cgroup %s is frozen); only a running container can be checkpointed",
		ErrNotRunning, c.Status.GetMetadata().GetName(), short(c.Status.GetId()), c.Freezer)
}

func notRunning(s *runtimeapi.ContainerStatus) error {
	state := map[runtimeapi.ContainerState]string{
		runtimeapi.ContainerState_CONTAINER_CREATED: "created, but not started yet",
		runtimeapi.ContainerState_CONTAINER_EXITED:  fmt.Sprintf("exited, with code %d", s.GetExitCode()),
	}[s.GetState()]
	if state == "" {
		state = "in an unknown state"
	}
	return fmt.Errorf("%w: %s (%s) is %s; only a running container can be checkpointed",
		ErrNotRunning, s.GetMetadata().GetName(), short(s.GetId()), state)
}

func short(id string) string { return id[:min(len(id), 12)] }

// findLog returns the log file itself. The runtime gives its path, but a pod that may write to the node's log directory can put a
// link there, to any file of the node. One link is followed: Docker does not write where the CRI wants it, so its CRI server links to
// the file in Docker's own directory, and that file's name follows from the root file system's.
func findLog(path, id, rootfs string) (string, error) {
	if path == "" {
		return "", nil
	}
	target, err := os.Readlink(path)
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if errors.Is(err, unix.EINVAL) {
		return path, nil // no link
	}
	if err != nil {
		return "", fmt.Errorf("look at log: %w", err)
	}
	if target != dockerLog(id, rootfs) {
		return "", fmt.Errorf("%w: its log %s is a link to %.128q, and not to Docker's own log of this container: "+
			"find out who has put it there, and remove it", ErrUnsupported, path, target)
	}
	return target, nil
}

// dockerLog is where Docker's log driver json-file writes, in the directory of the daemon that also has the mounted root file systems,
// as overlay2/NAME/merged or, with containerd's snapshotters, as rootfs/overlayfs/ID.
func dockerLog(id, rootfs string) string {
	root := filepath.Dir(filepath.Dir(filepath.Dir(rootfs)))
	return filepath.Join(root, "containers", id, id+"-json.log")
}

func sharedNamespaces(pid int, namespaces []specs.LinuxNamespace) ([]Namespace, error) {
	files := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.PIDNamespace: "pid"}
	var shared []Namespace
	for _, ns := range namespaces {
		file := files[ns.Type]
		if ns.Path == "" || file == "" {
			continue
		}
		// Where the process is counts, not the spec's path, which goes through a process of the pod that may have ended.
		info, err := os.Stat(fmt.Sprintf("/proc/%d/ns/%s", pid, file))
		if err != nil {
			return nil, fmt.Errorf("look at %s namespace: %w", ns.Type, err)
		}
		shared = append(shared, Namespace{Type: string(ns.Type), Inode: inode(info)})
	}
	return shared, nil
}

// networkPath prefers the spec's path: /proc/PID is gone with the process, and its number may be another's later.
func networkPath(pid int, namespaces []specs.LinuxNamespace) string {
	path := fmt.Sprintf("/proc/%d/ns/net", pid)
	own, err := os.Stat(path)
	if err != nil {
		return path // gone; who opens it finds that out
	}
	for _, candidate := range append(namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: "/proc/self/ns/net"}) {
		if candidate.Type != specs.NetworkNamespace || candidate.Path == "" {
			continue
		}
		if is, err := os.Stat(candidate.Path); err == nil && os.SameFile(is, own) {
			return candidate.Path
		}
	}
	return path
}
