package checkpoint

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"go.opentelemetry.io/otel/trace"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/container"
	"crishim/shim/history"
)

// Caller describes who has sent a request, by the credentials of its connection.
func Caller(at crishimv1.Interface, pid int32, uid uint32) *crishimv1.Caller {
	comm, _ := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid)) // it may have ended
	return &crishimv1.Caller{Interface: at, Pid: pid, Uid: uid, Process: oneLine(string(comm), 16)}
}

type callerKey struct{}

// WithCaller is for the contexts of calls of CheckpointContainer: the history says who has made them.
func WithCaller(ctx context.Context, caller *crishimv1.Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, caller)
}

func callerFrom(ctx context.Context) *crishimv1.Caller {
	if caller, ok := ctx.Value(callerKey{}).(*crishimv1.Caller); ok {
		return caller
	}
	return &crishimv1.Caller{Interface: crishimv1.Interface_INTERFACE_CRI}
}

// bounded is what is remembered of a text that a caller has sent: anything, of any length.
func bounded(text string) string {
	if len(text) > unix.PathMax {
		text = text[:unix.PathMax]
	}
	return strings.ToValidUTF8(text, "?")
}

// name is how people call a container.
type name struct{ namespace, pod, container string }

// nameOf finds out a container's names, as far as the runtime tells: its kubelet has put them into labels, and other users of the CRI may not.
func (s *Service) nameOf(ctx context.Context, id string, labels map[string]string, metadata *runtimeapi.ContainerMetadata) name {
	n := name{labels["io.kubernetes.pod.namespace"], labels["io.kubernetes.pod.name"], metadata.GetName()}
	if n.namespace != "" && n.pod != "" {
		return n
	}
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	list, err := s.config().Runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{Id: id}})
	if err != nil || len(list.GetContainers()) != 1 {
		return n
	}
	pod, err := s.config().Runtime.PodSandboxStatus(ctx, &runtimeapi.PodSandboxStatusRequest{PodSandboxId: list.GetContainers()[0].GetPodSandboxId()})
	if err != nil {
		return n
	}
	n.namespace, n.pod = pod.GetStatus().GetMetadata().GetNamespace(), pod.GetStatus().GetMetadata().GetName()
	return n
}

// locate returns where the archive is to appear. For a caller of the admin API that has not said, it is where the kubelet would have it.
func (s *Service) locate(ctx context.Context, request *runtimeapi.CheckpointContainerRequest, flight *history.Flight) (string, error) {
	if request.GetLocation() != "" || flight.Checkpoint().GetCaller().GetInterface() != crishimv1.Interface_INTERFACE_ADMIN {
		return request.GetLocation(), nil
	}
	location, err := s.defaultLocation(ctx, request.GetContainerId())
	if err == nil {
		flight.Update(func(c *crishimv1.Checkpoint) { c.Location = location })
	}
	return location, err
}

// defaultLocation is a path as the kubelet chooses it, with milliseconds, so that the two never choose the same. Its directory is made as the kubelet makes it, 0700, where there is none.
func (s *Service) defaultLocation(ctx context.Context, id string) (string, error) {
	answer, err := s.config().Runtime.ContainerStatus(ctx, &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if status.Code(err) == codes.NotFound {
		return "", fmt.Errorf("%w: the runtime knows none with id %q", container.ErrNotFound, id)
	}
	if err != nil {
		return "", fmt.Errorf("ask runtime for container %q: %w", id, err)
	}
	c := answer.GetStatus()
	name := s.nameOf(ctx, c.GetId(), c.GetLabels(), c.GetMetadata())
	dir := checkpointsDir()
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return "", fmt.Errorf("%w: make the kubelet's directory for checkpoints: %w: say where the archive is to be (crishim checkpoint -o FILE)", errInvalid, err)
	}
	file := fmt.Sprintf("checkpoint-%s_%s-%s-%s.tar", name.pod, name.namespace, name.container, time.Now().Format("2006-01-02T15:04:05.000Z07:00"))
	return filepath.Join(dir, filepath.Base(file)), nil
}

// checkpointsDir is the directory in which this node's kubelet has its checkpoints.
func checkpointsDir() string {
	root := "/var/lib/kubelet"
	if all := kubelets(); len(all) > 0 {
		root = cmp.Or(all[0].rootDir, root)
	}
	return filepath.Join(root, "checkpoints")
}

// ErrCancelled is the reason of a checkpoint that an operator has cancelled.
var ErrCancelled = fmt.Errorf("an operator has cancelled it: %w", context.Canceled)

// conclude says in the history how a checkpoint has ended; err is a status.
func conclude(c *crishimv1.Checkpoint, result *crishimv1.Result, err error) {
	c.Code, c.Message = int32(status.Code(err)), status.Convert(err).Message()
	if err != nil {
		return
	}
	c.Size = result.GetSize()
	c.Memory = int64(result.GetPagesWritten()) * int64(os.Getpagesize())
	c.FrozenUs = int64(result.GetFrozenUs())
	var st unix.Stat_t
	if unix.Lstat(c.GetLocation(), &st) == nil { // otherwise somebody has moved it already
		c.Inode, c.Modified = st.Ino, timestamppb.New(time.Unix(st.Mtim.Unix()))
	}
}

// audit writes the one line of the log that each checkpoint gets, whatever came of it.
func (s *Service) audit(c *crishimv1.Checkpoint, result *crishimv1.Result, cause string, span trace.SpanContext) {
	caller := c.GetCaller()
	log := s.config().Log.WithFields(logrus.Fields{
		"id":        c.GetId(),
		"interface": strings.ToLower(strings.TrimPrefix(caller.GetInterface().String(), "INTERFACE_")),
		"pid":       caller.GetPid(),
		"uid":       caller.GetUid(),
		"process":   caller.GetProcess(),
		"container": c.GetContainerId(),
		"namespace": c.GetNamespace(),
		"pod":       c.GetPod(),
		"name":      c.GetContainer(),
		"location":  c.GetLocation(),
		"seconds":   c.GetEnd().AsTime().Sub(c.GetBegin().AsTime()).Seconds(),
	})
	if span.IsValid() {
		log = log.WithField("trace", span.TraceID().String())
	}
	if code := codes.Code(c.GetCode()); code != codes.OK {
		log.WithFields(logrus.Fields{"code": code.String(), "cause": cause}).Errorf("checkpoint failed: %s", c.GetMessage())
		return
	}
	log.WithFields(logrus.Fields{
		"bytes":            c.GetSize(),
		"frozen_seconds":   float64(c.GetFrozenUs()) / 1e6,
		"freezing_seconds": float64(result.GetFreezingUs()) / 1e6,
		"memory_seconds":   float64(result.GetMemoryDumpUs()) / 1e6,
		"pages_written":    result.GetPagesWritten(),
		"digest":           result.GetDigest(),
	}).Info("checkpoint written")
}
