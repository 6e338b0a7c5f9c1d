package docker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path"
	"strconv"
	"strings"
	"time"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// standInSocket is where the stand-in listens, in the node.
const standInSocket = "/run/cri-dockerd.sock"

// The labels in which cri-dockerd keeps what Docker does not know, with the annotations behind a prefix.
const (
	labelType        = "io.kubernetes.docker.type"
	labelSandbox     = "io.kubernetes.sandbox.id"
	labelLogPath     = "io.kubernetes.container.logpath"
	annotationPrefix = "annotation."
)

// Annotations by which a container has the stand-in say something else of it than what is true.
const (
	annotationPid    = "stand-in/pid"     // another pid
	annotationNoInfo = "stand-in/no-info" // nothing verbose at all, as cri-dockerd once did
)

// standIn answers the CRI as cri-dockerd does, which cannot be had here, as far as the tests need it. Its answers, the
// names and labels of containers, how they share the namespaces of a pod, and the links of logs are those of cri-dockerd
// (core/container_status.go, core/convert.go and their neighbours). It has no CNI: pods have a loopback interface.
type standIn struct {
	cri.UnimplementedRuntimeServiceServer
	cri.UnimplementedImageServiceServer
	node   *node.Node
	engine *http.Client
}

// serveStandIn serves it until the returned function is called, which waits for its end.
func serveStandIn(n *node.Node) (stop func(), err error) {
	listener, err := net.Listen("unix", n.Path(standInSocket))
	if err != nil {
		return nil, err
	}
	s := &standIn{node: n, engine: n.DockerClient()}
	server := grpc.NewServer()
	cri.RegisterRuntimeServiceServer(server, s)
	cri.RegisterImageServiceServer(server, s)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener) // until it is stopped
	}()
	return func() { server.Stop(); <-done }, nil
}

// call makes a request of the engine's API (version 1.43, of Docker 24) and decodes the answer, unless that is nil.
func (s *standIn) call(ctx context.Context, method, path string, body, answer any) error {
	content, err := json.Marshal(body)
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, method, "http://docker/v1.43"+path, bytes.NewReader(content))
	if err != nil {
		return err
	}
	request.Header.Set("Content-Type", "application/json")
	response, err := s.engine.Do(request)
	if err != nil {
		return err
	}
	defer response.Body.Close()
	if content, err = io.ReadAll(response.Body); err != nil {
		return err
	}
	if response.StatusCode >= 300 {
		var failure struct{ Message string }
		if err := json.Unmarshal(content, &failure); err != nil {
			return errors.New(response.Status)
		}
		return fmt.Errorf("docker's answer: %s", failure.Message)
	}
	if answer == nil {
		return nil
	}
	return json.Unmarshal(content, answer)
}

func (s *standIn) Version(context.Context, *cri.VersionRequest) (*cri.VersionResponse, error) {
	return &cri.VersionResponse{Version: "0.1.0", RuntimeName: "docker", RuntimeVersion: "26.1.5", RuntimeApiVersion: "v1"}, nil
}

// engineImage is what the engine says of an image, engineContainer of a container.
type engineImage struct {
	ID                    string `json:"Id"`
	RepoTags, RepoDigests []string
	Size                  uint64
}

type engineContainer struct {
	ID                   string `json:"Id"`
	Name, Image, LogPath string
	Created              time.Time
	State                struct {
		Running, OOMKilled    bool
		Pid, ExitCode         int
		Error                 string
		StartedAt, FinishedAt time.Time
	}
	Config struct {
		Image  string
		Labels map[string]string
	}
	Mounts []struct {
		Source, Destination, Propagation string
		RW                               bool
	}
}

func (s *standIn) ImageStatus(ctx context.Context, r *cri.ImageStatusRequest) (*cri.ImageStatusResponse, error) {
	var image engineImage
	err := s.call(ctx, http.MethodGet, "/images/"+r.GetImage().GetImage()+"/json", nil, &image)
	if err != nil && strings.Contains(err.Error(), "No such image") {
		return &cri.ImageStatusResponse{}, nil
	}
	if err != nil {
		return nil, err
	}
	return &cri.ImageStatusResponse{Image: &cri.Image{
		Id: image.ID, RepoTags: image.RepoTags, RepoDigests: image.RepoDigests, Size: image.Size,
	}}, nil
}

func (s *standIn) PullImage(ctx context.Context, r *cri.PullImageRequest) (*cri.PullImageResponse, error) {
	name := r.GetImage().GetImage()
	// The answer is a stream of progress. That it has failed is said in there, or by the image's absence.
	if err := s.call(ctx, http.MethodPost, "/images/create?fromImage="+url.QueryEscape(name), nil, nil); err != nil {
		return nil, err
	}
	var image engineImage
	if err := s.call(ctx, http.MethodGet, "/images/"+name+"/json", nil, &image); err != nil {
		return nil, err
	}
	if len(image.RepoDigests) == 0 {
		return nil, fmt.Errorf("pull %s: it has no digest", name)
	}
	return &cri.PullImageResponse{ImageRef: image.RepoDigests[0]}, nil
}

func (s *standIn) RunPodSandbox(ctx context.Context, r *cri.RunPodSandboxRequest) (*cri.RunPodSandboxResponse, error) {
	if _, err := s.PullImage(ctx, &cri.PullImageRequest{Image: &cri.ImageSpec{Image: node.DockerPauseImage}}); err != nil {
		return nil, err
	}
	pod := r.GetConfig()
	labels := makeLabels(pod.GetLabels(), pod.GetAnnotations())
	labels[labelType] = "podsandbox"
	id, err := s.create(ctx, containerName("POD", pod, pod.GetMetadata().GetAttempt()), map[string]any{
		"Image": node.DockerPauseImage, "Hostname": pod.GetHostname(), "Labels": labels,
		"HostConfig": map[string]any{
			"IpcMode": "shareable", "NetworkMode": "none", "Runtime": r.GetRuntimeHandler(),
			"CgroupParent": pod.GetLinux().GetCgroupParent(),
		},
	})
	if err != nil {
		return nil, err
	}
	if err := s.call(ctx, http.MethodPost, "/containers/"+id+"/start", nil, nil); err != nil {
		return nil, err
	}
	return &cri.RunPodSandboxResponse{PodSandboxId: id}, nil
}

// StopPodSandbox leaves the end of everything to RemovePodSandbox.
func (s *standIn) StopPodSandbox(context.Context, *cri.StopPodSandboxRequest) (*cri.StopPodSandboxResponse, error) {
	return &cri.StopPodSandboxResponse{}, nil
}

func (s *standIn) RemovePodSandbox(ctx context.Context, r *cri.RemovePodSandboxRequest) (*cri.RemovePodSandboxResponse, error) {
	filters, err := json.Marshal(map[string][]string{"label": {labelSandbox + "=" + r.GetPodSandboxId()}})
	if err != nil {
		return nil, err
	}
	var containers []struct {
		ID string `json:"Id"`
	}
	if err := s.call(ctx, http.MethodGet, "/containers/json?all=1&filters="+url.QueryEscape(string(filters)), nil, &containers); err != nil {
		return nil, err
	}
	ids := []string{}
	for _, c := range containers {
		ids = append(ids, c.ID)
	}
	for _, id := range append(ids, r.GetPodSandboxId()) {
		err := s.call(ctx, http.MethodDelete, "/containers/"+id+"?force=1&v=1", nil, nil)
		if err != nil && !strings.Contains(err.Error(), "No such container") {
			return nil, err
		}
	}
	return &cri.RemovePodSandboxResponse{}, nil
}

func (s *standIn) CreateContainer(ctx context.Context, r *cri.CreateContainerRequest) (*cri.CreateContainerResponse, error) {
	pod, config := r.GetSandboxConfig(), r.GetConfig()
	labels := makeLabels(config.GetLabels(), config.GetAnnotations())
	labels[labelType] = "container"
	labels[labelSandbox] = r.GetPodSandboxId()
	labels[labelLogPath] = path.Join(pod.GetLogDirectory(), config.GetLogPath())
	var sandbox struct{ HostConfig struct{ Runtime string } }
	if err := s.call(ctx, http.MethodGet, "/containers/"+r.GetPodSandboxId()+"/json", nil, &sandbox); err != nil {
		return nil, err
	}
	security := config.GetLinux().GetSecurityContext()
	shared := "container:" + r.GetPodSandboxId()
	host := map[string]any{
		"NetworkMode": shared, "IpcMode": shared, "CgroupParent": pod.GetLinux().GetCgroupParent(),
		"Runtime": sandbox.HostConfig.Runtime, "MaskedPaths": security.GetMaskedPaths(), "ReadonlyPaths": security.GetReadonlyPaths(),
		"SecurityOpt": []string{"seccomp=unconfined"}, "RestartPolicy": map[string]string{"Name": "no"},
	}
	var binds []string
	for _, m := range config.GetMounts() {
		binds = append(binds, m.GetHostPath()+":"+m.GetContainerPath())
	}
	host["Binds"] = binds
	id, err := s.create(ctx, containerName(config.GetMetadata().GetName(), pod, config.GetMetadata().GetAttempt()), map[string]any{
		"Image": config.GetImage().GetImage(), "Entrypoint": config.GetCommand(), "Cmd": config.GetArgs(), "Labels": labels, "HostConfig": host,
	})
	if err != nil {
		return nil, err
	}
	return &cri.CreateContainerResponse{ContainerId: id}, nil
}

func (s *standIn) create(ctx context.Context, name string, config map[string]any) (id string, err error) {
	var created struct {
		ID string `json:"Id"`
	}
	err = s.call(ctx, http.MethodPost, "/containers/create?name="+url.QueryEscape(name), config, &created)
	return created.ID, err
}

func (s *standIn) StartContainer(ctx context.Context, r *cri.StartContainerRequest) (*cri.StartContainerResponse, error) {
	if err := s.call(ctx, http.MethodPost, "/containers/"+r.GetContainerId()+"/start", nil, nil); err != nil {
		return nil, err
	}
	c, err := s.inspect(ctx, r.GetContainerId())
	if err != nil {
		return nil, err
	}
	// Docker cannot write its log where the CRI wants it.
	if err := os.Symlink(c.LogPath, s.node.Path(c.Config.Labels[labelLogPath])); err != nil {
		return nil, err
	}
	return &cri.StartContainerResponse{}, nil
}

func (s *standIn) inspect(ctx context.Context, id string) (c engineContainer, err error) {
	err = s.call(ctx, http.MethodGet, "/containers/"+id+"/json", nil, &c)
	return c, err
}

func (s *standIn) ContainerStatus(ctx context.Context, r *cri.ContainerStatusRequest) (*cri.ContainerStatusResponse, error) {
	c, err := s.inspect(ctx, r.GetContainerId())
	if err != nil {
		return nil, err // without a code of gRPC's, also where there is no such container
	}
	var image engineImage
	if err := s.call(ctx, http.MethodGet, "/images/"+c.Image+"/json", nil, &image); err != nil {
		return nil, err
	}
	imageName, imageRef := c.Config.Image, "docker://"+c.Image
	if len(image.RepoTags) > 0 {
		imageName = image.RepoTags[0]
	}
	if len(image.RepoDigests) > 0 {
		imageRef = "docker-pullable://" + image.RepoDigests[0]
	}
	parts := strings.Split(strings.TrimPrefix(c.Name, "/"), "_")
	attempt, err := strconv.ParseUint(parts[len(parts)-1], 10, 32)
	if err != nil || len(parts) != 6 {
		return nil, fmt.Errorf("failed to parse the container name: %q", c.Name)
	}
	labels, annotations := extractLabels(c.Config.Labels)
	status := &cri.ContainerStatus{
		Id:        c.ID,
		Metadata:  &cri.ContainerMetadata{Name: parts[1], Attempt: uint32(attempt)},
		Image:     &cri.ImageSpec{Image: imageName},
		ImageRef:  imageRef,
		ExitCode:  int32(c.State.ExitCode),
		State:     cri.ContainerState_CONTAINER_EXITED,
		CreatedAt: c.Created.UnixNano(), StartedAt: c.State.StartedAt.UnixNano(), FinishedAt: c.State.FinishedAt.UnixNano(),
		Labels: labels, Annotations: annotations,
		LogPath: c.Config.Labels[labelLogPath],
	}
	for _, m := range c.Mounts {
		status.Mounts = append(status.Mounts, &cri.Mount{HostPath: m.Source, ContainerPath: m.Destination, Readonly: !m.RW})
	}
	switch {
	case c.State.Running: // also while it is paused
		status.State = cri.ContainerState_CONTAINER_RUNNING
	case c.State.FinishedAt.IsZero() && c.State.ExitCode == 0:
		status.State = cri.ContainerState_CONTAINER_CREATED
	}
	response := &cri.ContainerStatusResponse{Status: status}
	if r.GetVerbose() && annotations[annotationNoInfo] == "" {
		info := struct {
			SandboxID string `json:"sandboxID"`
			Pid       int    `json:"pid"`
		}{c.Config.Labels[labelSandbox], c.State.Pid}
		if other := annotations[annotationPid]; other != "" {
			if info.Pid, err = strconv.Atoi(other); err != nil {
				return nil, err
			}
		}
		content, err := json.Marshal(info)
		if err != nil {
			return nil, err
		}
		response.Info = map[string]string{"info": string(content)}
	}
	return response, nil
}

func containerName(name string, pod *cri.PodSandboxConfig, attempt uint32) string {
	m := pod.GetMetadata()
	return fmt.Sprintf("k8s_%s_%s_%s_%s_%d", name, m.GetName(), m.GetNamespace(), m.GetUid(), attempt)
}

func makeLabels(labels, annotations map[string]string) map[string]string {
	merged := map[string]string{}
	for key, value := range labels {
		merged[key] = value
	}
	for key, value := range annotations {
		merged[annotationPrefix+key] = value
	}
	return merged
}

func extractLabels(merged map[string]string) (labels, annotations map[string]string) {
	labels, annotations = map[string]string{}, map[string]string{}
	for key, value := range merged {
		annotation, ok := strings.CutPrefix(key, annotationPrefix)
		switch {
		case ok:
			annotations[annotation] = value
		case key != labelType && key != labelSandbox && key != labelLogPath:
			labels[key] = value
		}
	}
	return labels, annotations
}
