package node

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Client talks to a CRI server of a node, containerd or crishim.
type Client struct {
	Runtime cri.RuntimeServiceClient
	Images  cri.ImageServiceClient
	conn    *grpc.ClientConn
	path    func(string) string
}

// DialCRI returns a client of a socket in the node, which is connected when it is used first. The caller closes it.
func (n *Node) DialCRI(socket string) (*Client, error) { return dialCRI(socket, n.Path) }

// DialLocalCRI does what DialCRI does, for a process that runs in the node itself.
func DialLocalCRI(socket string) (*Client, error) {
	return dialCRI(socket, func(path string) string { return path })
}

func dialCRI(socket string, path func(string) string) (*Client, error) {
	conn, err := grpc.NewClient("passthrough:///cri", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", path(socket))
		}),
		// A socket of a daemon that starts is there in a moment; grpc would wait for a second.
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: backoff.Config{
			BaseDelay: 10 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond,
		}, MinConnectTimeout: 5 * time.Second}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
	if err != nil {
		return nil, fmt.Errorf("dial %s: %w", socket, err)
	}
	return &Client{
		Runtime: cri.NewRuntimeServiceClient(conn), Images: cri.NewImageServiceClient(conn), conn: conn, path: path,
	}, nil
}

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Conn is the client's connection, for calls that the two services lack.
func (c *Client) Conn() *grpc.ClientConn { return c.conn }

// Spec describes a pod of one container.
type Spec struct {
	// Name of pod and container, "test" if empty.
	Name string
	// Handler is the runtime handler: "runc", "crun", or empty for the default.
	Handler string
	// Image is WorkloadImage if empty.
	Image string
	// Command replaces the image's own command, which for WorkloadImage is "workload count".
	Command []string
	Mounts  []*cri.Mount
	// Pod and Container change what is sent in ways that the fields above cannot. They may be nil.
	Pod       func(*cri.PodSandboxConfig)
	Container func(*cri.ContainerConfig)
}

// Container is a container that runs alone in a pod.
type Container struct {
	ID, PodID string
	// LogPath is the path of its log in the node, in the CRI's format.
	LogPath string
	client  *Client
}

// RunContainer starts a pod with one container, pulling its image if need be. What it started is removed again if it
// fails; otherwise the caller calls Remove.
func (c *Client) RunContainer(ctx context.Context, spec Spec) (*Container, error) {
	if spec.Name == "" {
		spec.Name = "test"
	}
	if spec.Image == "" {
		spec.Image = WorkloadImage
	}
	if err := c.pull(ctx, spec.Image); err != nil {
		return nil, err
	}
	uid := rand.Text()
	// As the kubelet has it unless the pod asks for more; the CRI's own default is one process namespace for the pod.
	namespaces := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
	pod := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: spec.Name, Namespace: "default", Uid: uid},
		Hostname:     spec.Name,
		LogDirectory: "/var/log/pods/default_" + spec.Name + "_" + uid,
		Linux: &cri.LinuxPodSandboxConfig{CgroupParent: "/pods/" + uid, SecurityContext: &cri.LinuxSandboxSecurityContext{
			NamespaceOptions: namespaces,
		}},
	}
	if spec.Pod != nil {
		spec.Pod(pod)
	}
	config := &cri.ContainerConfig{
		Metadata: &cri.ContainerMetadata{Name: spec.Name},
		Image:    &cri.ImageSpec{Image: spec.Image},
		Command:  spec.Command,
		Mounts:   spec.Mounts,
		LogPath:  spec.Name + "/0.log",
		Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{
			NamespaceOptions: namespaces,
		}},
	}
	if spec.Container != nil {
		spec.Container(config)
	}
	// The kubelet makes it for its pods.
	logPath := filepath.Join(pod.LogDirectory, config.LogPath)
	if err := os.MkdirAll(c.path(filepath.Dir(logPath)), 0o755); err != nil {
		return nil, fmt.Errorf("make log directory: %w", err)
	}
	sandbox, err := c.Runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: pod, RuntimeHandler: spec.Handler})
	if err != nil {
		return nil, fmt.Errorf("run pod: %w", err)
	}
	container := &Container{PodID: sandbox.PodSandboxId, LogPath: logPath, client: c}
	if err := container.start(ctx, pod, config); err != nil {
		clean, cancel := context.WithTimeout(context.WithoutCancel(ctx), 20*time.Second)
		defer cancel()
		return nil, errors.Join(err, container.Remove(clean))
	}
	return container, nil
}

func (c *Client) pull(ctx context.Context, image string) error {
	spec := &cri.ImageSpec{Image: image}
	present, err := c.Images.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
	if err != nil {
		return fmt.Errorf("look for image: %w", err)
	}
	if present.Image != nil {
		return nil
	}
	if _, err := c.Images.PullImage(ctx, &cri.PullImageRequest{Image: spec}); err != nil {
		return fmt.Errorf("pull image: %w", err)
	}
	return nil
}

func (c *Container) start(ctx context.Context, pod *cri.PodSandboxConfig, config *cri.ContainerConfig) error {
	created, err := c.client.Runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId: c.PodID, Config: config, SandboxConfig: pod,
	})
	if err != nil {
		return fmt.Errorf("create container: %w", err)
	}
	c.ID = created.ContainerId
	if _, err := c.client.Runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ID}); err != nil {
		return fmt.Errorf("start container: %w", err)
	}
	return nil
}

// Pid is the process id of the container's first process in the node's process namespace.
func (c *Container) Pid(ctx context.Context) (int, error) {
	answer, err := c.client.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID, Verbose: true})
	if err != nil {
		return 0, fmt.Errorf("get container status: %w", err)
	}
	var info struct{ Pid int }
	if err := json.Unmarshal([]byte(answer.Info["info"]), &info); err != nil {
		return 0, fmt.Errorf("read container status: %w", err)
	}
	return info.Pid, nil
}

// Address is that of the container's pod, empty if it is in the node's network.
func (c *Container) Address(ctx context.Context) (string, error) {
	pod, err := c.client.Runtime.PodSandboxStatus(ctx, &cri.PodSandboxStatusRequest{PodSandboxId: c.PodID})
	if err != nil {
		return "", fmt.Errorf("get pod status: %w", err)
	}
	return pod.GetStatus().GetNetwork().GetIp(), nil
}

// State is the container's state.
func (c *Container) State(ctx context.Context) (cri.ContainerState, error) {
	answer, err := c.client.Runtime.ContainerStatus(ctx, &cri.ContainerStatusRequest{ContainerId: c.ID})
	if err != nil {
		return cri.ContainerState_CONTAINER_UNKNOWN, fmt.Errorf("get container status: %w", err)
	}
	return answer.Status.State, nil
}

// Exec runs a command in the container and returns its standard output.
func (c *Container) Exec(ctx context.Context, command ...string) (string, error) {
	answer, err := c.client.Runtime.ExecSync(ctx, &cri.ExecSyncRequest{ContainerId: c.ID, Cmd: command})
	if err != nil {
		return "", fmt.Errorf("exec in container: %w", err)
	}
	if answer.ExitCode != 0 {
		return string(answer.Stdout), fmt.Errorf("exec in container: %s: exit code %d: %s", strings.Join(command, " "),
			answer.ExitCode, answer.Stderr)
	}
	return string(answer.Stdout), nil
}

// Log returns what the container has written, in the CRI's format.
func (c *Container) Log() (string, error) {
	content, err := os.ReadFile(c.client.path(c.LogPath))
	if err != nil {
		return "", fmt.Errorf("read container log: %w", err)
	}
	return string(content), nil
}

// Remove ends the pod with its container and removes both. Removing what is gone is no error.
func (c *Container) Remove(ctx context.Context) error {
	if _, err := c.client.Runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: c.PodID}); err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("stop pod: %w", err)
	}
	if _, err := c.client.Runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: c.PodID}); err != nil && status.Code(err) != codes.NotFound {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}
