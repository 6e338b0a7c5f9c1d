package node

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// KubeletOptions describes a kubelet without an API server. The zero value talks to containerd.
type KubeletOptions struct {
	// Version is "1.34", also if empty, or "1.37": a directory of test/tools.
	Version string
	// RuntimeEndpoint is the path in the node of the socket to talk to, ContainerdSocket if empty.
	RuntimeEndpoint string
	// Config adds to the kubelet's configuration, or changes it.
	Config map[string]any
	// Flags are added to the command line.
	Flags []string
}

// Kubelet is a real kubelet that runs static pods and kills all other pods of its runtime.
type Kubelet struct {
	*Daemon
	node   *Node
	client *http.Client
}

const (
	kubeletAddress = "127.0.0.1:10250"
	nodeAddress    = "10.89.0.1"
	manifests      = "/etc/kubernetes/manifests"

	kubeletConfigFile = "/etc/kubernetes/kubelet.json"
)

// StartKubelet starts a kubelet and waits until it answers and its runtime is ready. It can be started again after its
// end; its pods live on meanwhile.
func (n *Node) StartKubelet(ctx context.Context, options KubeletOptions) (*Kubelet, error) {
	if options.Version == "" {
		options.Version = "1.34"
	}
	if options.RuntimeEndpoint == "" {
		options.RuntimeEndpoint = ContainerdSocket
	}
	program, err := Tool(ctx, "kubelet-"+options.Version)
	if err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	if err := n.prepareKubelet(ctx, program, options); err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	daemon, err := n.StartDaemon("kubelet", "/run/kubelet-"+options.Version, append(n.kubeletFlags(), options.Flags...)...)
	if err != nil {
		return nil, err
	}
	return n.meetKubelet(ctx, daemon)
}

func (n *Node) kubeletFlags() []string {
	return []string{
		"--config=" + kubeletConfigFile,
		"--root-dir=/var/lib/kubelet",
		"--hostname-override=" + n.hostname,
		"--node-ip=" + nodeAddress,
		"--v=2",
	}
}

// meetKubelet waits until a kubelet answers that was started, by the node unless daemon is nil.
func (n *Node) meetKubelet(ctx context.Context, daemon *Daemon) (*Kubelet, error) {
	k := &Kubelet{Daemon: daemon, node: n, client: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, network, _ string) (net.Conn, error) {
			return n.DialContext(ctx, network, kubeletAddress)
		},
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true}, // the kubelet signs for itself
		// A test that looks for leaked goroutines finds none.
		DisableKeepAlives: true,
	}}}
	err := n.wait(ctx, daemon, func(ctx context.Context) error {
		_, err := k.call(ctx, http.MethodGet, "/healthz", nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("start kubelet: %w", err)
	}
	return k, nil
}

func (n *Node) prepareKubelet(ctx context.Context, program string, options KubeletOptions) error {
	target := "/run/kubelet-" + options.Version
	if _, err := os.Stat(n.Path(target)); err != nil {
		if err := os.WriteFile(n.Path(target), nil, 0o755); err != nil {
			return err
		}
		if err := n.Bind(program, target); err != nil {
			return err
		}
	}
	return n.configureKubelet(ctx, options)
}

// configureKubelet makes the network and writes the configuration of a kubelet.
func (n *Node) configureKubelet(ctx context.Context, options KubeletOptions) error {
	if err := n.addAddress(ctx); err != nil {
		return err
	}
	content, err := json.MarshalIndent(n.kubeletConfig(options), "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(n.Path(manifests), 0o755); err != nil {
		return err
	}
	return os.WriteFile(n.Path(kubeletConfigFile), content, 0o644)
}

// addAddress gives the node what a kubelet wants, an address and a default route. A bridge exists in more kernels than a dummy does.
func (n *Node) addAddress(ctx context.Context) error {
	_, err := n.Output(ctx, "sh", "-ec", `ip link show node0 >/dev/null 2>&1 && exit
		ip link add node0 type bridge
		ip addr add `+nodeAddress+`/24 dev node0
		ip link set node0 up
		ip route add default via 10.89.0.2`)
	return err
}

func (n *Node) kubeletConfig(options KubeletOptions) map[string]any {
	config := map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"authentication":           map[string]any{"anonymous": map[string]any{"enabled": true}, "webhook": map[string]any{"enabled": false}},
		"authorization":            map[string]any{"mode": "AlwaysAllow"},
		"cgroupDriver":             "cgroupfs",
		"containerRuntimeEndpoint": "unix://" + options.RuntimeEndpoint,
		"enforceNodeAllocatable":   []string{},
		"evictionHard":             map[string]any{"memory.available": "10Mi", "nodefs.available": "1%", "imagefs.available": "1%", "nodefs.inodesFree": "1%"},
		"failCgroupV1":             false,
		"failSwapOn":               false,
		"fileCheckFrequency":       "1s",
		"makeIPTablesUtilChains":   false,
		"resolvConf":               "",
		"staticPodPath":            manifests,
		"syncFrequency":            "1s",
	}
	if !hasCapability(unix.CAP_SYS_RESOURCE) {
		config["oomScoreAdj"] = 0
		config["maxOpenFiles"] = 20000
	}
	if n.systemd {
		config["cgroupDriver"] = "systemd"
		config["syncFrequency"] = "10s" // an emulated processor has enough to do
	}
	for key, value := range options.Config {
		config[key] = value
	}
	return config
}

// Pod is a static pod of one container, which has the pod's name.
type Pod struct {
	// Name is that of the manifest; the kubelet appends the node's, see Kubelet.PodName.
	Name string
	// Image is WorkloadImage if empty, Command that of the image.
	Image   string
	Command []string
	// Spec adds to the pod's spec, or changes it, Container the same for the container.
	Spec, Container map[string]any
}

// PodName is what the kubelet calls the pod of a manifest.
func (k *Kubelet) PodName(name string) string { return name + "-" + k.node.hostname }

// RunPod writes a manifest and waits until the pod runs.
func (k *Kubelet) RunPod(ctx context.Context, pod Pod) error {
	if err := k.WritePod(pod); err != nil {
		return err
	}
	return k.WaitPods(ctx, []string{pod.Name}, nil)
}

// WritePod writes a manifest, by which the kubelet starts the pod when it sees it.
func (k *Kubelet) WritePod(pod Pod) error {
	container := map[string]any{"name": pod.Name, "image": pod.Image, "imagePullPolicy": "IfNotPresent"}
	if pod.Image == "" {
		container["image"] = WorkloadImage
	}
	if pod.Command != nil {
		container["command"] = pod.Command
	}
	for key, value := range pod.Container {
		container[key] = value
	}
	spec := map[string]any{
		"automountServiceAccountToken":  false,
		"enableServiceLinks":            false,
		"terminationGracePeriodSeconds": 1,
		"containers":                    []any{container},
	}
	for key, value := range pod.Spec {
		spec[key] = value
	}
	content, err := json.Marshal(map[string]any{
		"apiVersion": "v1", "kind": "Pod", "spec": spec,
		"metadata": map[string]any{"name": pod.Name, "namespace": "default"},
	})
	if err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	path := k.node.Path(k.manifest(pod.Name))
	// The kubelet ignores hidden files, and never reads half a manifest.
	hidden := filepath.Join(filepath.Dir(path), "."+pod.Name)
	if err := os.WriteFile(hidden, content, 0o644); err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	if err := os.Rename(hidden, path); err != nil {
		return fmt.Errorf("run pod: %w", err)
	}
	return nil
}

// RemovePod removes a manifest and waits until the kubelet has ended its pod.
func (k *Kubelet) RemovePod(ctx context.Context, name string) error {
	if err := k.UnwritePod(name); err != nil {
		return err
	}
	return k.WaitPods(ctx, nil, []string{name})
}

// UnwritePod removes a manifest, and the kubelet ends the pod when it sees that.
func (k *Kubelet) UnwritePod(name string) error {
	if err := os.Remove(k.node.Path(k.manifest(name))); err != nil {
		return fmt.Errorf("remove pod: %w", err)
	}
	return nil
}

// WaitPods waits until the pods of some manifests run, and those of others are gone.
func (k *Kubelet) WaitPods(ctx context.Context, run, gone []string) error {
	return k.waitPods(ctx, func(phases map[string]bool) error {
		for _, name := range run {
			if !phases[k.PodName(name)] {
				return fmt.Errorf("pod %s does not run", k.PodName(name))
			}
		}
		for _, name := range gone {
			if _, exists := phases[k.PodName(name)]; exists {
				return fmt.Errorf("pod %s is still there", k.PodName(name))
			}
		}
		return nil
	})
}

func (k *Kubelet) manifest(name string) string { return filepath.Join(manifests, name+".json") }

// waitPods waits for a condition on which pods exist, and whether all of their containers run.
func (k *Kubelet) waitPods(ctx context.Context, condition func(map[string]bool) error) error {
	return k.node.wait(ctx, k.Daemon, func(ctx context.Context) error {
		content, err := k.call(ctx, http.MethodGet, "/pods", nil)
		if err != nil {
			return err
		}
		var list struct {
			Items []struct {
				Metadata struct{ Name string }
				Status   struct {
					Phase             string
					ContainerStatuses []struct{ State map[string]any }
				}
			}
		}
		if err := json.Unmarshal(content, &list); err != nil {
			return fmt.Errorf("read pods: %w", err)
		}
		running := map[string]bool{}
		for _, item := range list.Items {
			stopped := slices.ContainsFunc(item.Status.ContainerStatuses, func(s struct{ State map[string]any }) bool {
				return s.State["running"] == nil
			})
			running[item.Metadata.Name] = item.Status.Phase == "Running" && !stopped
		}
		return condition(running)
	})
}

// Checkpoint asks the kubelet for a checkpoint of a pod's container and returns the paths, in the node, of the archives.
// A timeout of 0 leaves it to the kubelet.
func (k *Kubelet) Checkpoint(ctx context.Context, pod, container string, timeout time.Duration) ([]string, error) {
	query := url.Values{}
	if timeout > 0 {
		query.Set("timeout", strconv.Itoa(int(timeout.Seconds())))
	}
	content, err := k.call(ctx, http.MethodPost, "/checkpoint/default/"+pod+"/"+container, query)
	if err != nil {
		return nil, err
	}
	var answer struct{ Items []string }
	if err := json.Unmarshal(content, &answer); err != nil {
		return nil, fmt.Errorf("read answer: %w", err)
	}
	return answer.Items, nil
}

// Exec runs a shell-free command line in a pod's container and returns its output. The kubelet does it by ExecSync.
func (k *Kubelet) Exec(ctx context.Context, pod, container, command string) (string, error) {
	content, err := k.call(ctx, http.MethodPost, "/run/default/"+pod+"/"+container, url.Values{"cmd": {command}})
	return string(content), err
}

// ContainerLog returns what a pod's container has written. Options are those of the API's PodLogOptions, such as "tailLines=5";
// none give all of it.
func (k *Kubelet) ContainerLog(ctx context.Context, pod, container string, options ...string) (string, error) {
	query, err := url.ParseQuery(strings.Join(options, "&"))
	if err != nil {
		return "", fmt.Errorf("read log: %w", err)
	}
	content, err := k.call(ctx, http.MethodGet, "/containerLogs/default/"+pod+"/"+container, query)
	return string(content), err
}

// Get returns what the kubelet says at a path of its API that is only read, such as "/pods", as JSON.
func (k *Kubelet) Get(ctx context.Context, path string) ([]byte, error) {
	return k.call(ctx, http.MethodGet, path, nil)
}

// HTTPError is a refusal of the kubelet.
type HTTPError struct {
	Code int
	Body string
}

func (e *HTTPError) Error() string { return fmt.Sprintf("kubelet answers %d: %s", e.Code, e.Body) }

// call calls the kubelet's API. Its error is an HTTPError where the kubelet has answered.
func (k *Kubelet) call(ctx context.Context, method, path string, query url.Values) ([]byte, error) {
	address := url.URL{Scheme: "https", Host: kubeletAddress, Path: path, RawQuery: query.Encode()}
	request, err := http.NewRequestWithContext(ctx, method, address.String(), nil)
	if err != nil {
		return nil, fmt.Errorf("call kubelet: %w", err)
	}
	response, err := k.client.Do(request)
	if err != nil {
		return nil, fmt.Errorf("call kubelet: %w", err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil {
		return nil, fmt.Errorf("call kubelet: %w", err)
	}
	if response.StatusCode != http.StatusOK {
		return nil, &HTTPError{Code: response.StatusCode, Body: string(content)}
	}
	return content, nil
}
