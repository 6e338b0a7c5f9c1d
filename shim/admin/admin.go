// Package admin serves crishim's own API: what operators ask for that the CRI has no words for.
//
// It makes nothing itself. Checkpoints are the checkpoint service's, asked by the kubelet or here, and what is told of them is its history's.
package admin

import (
	"context"
	"errors"
	"os"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/timestamppb"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/checkpoint"
)

// Server is the server of AdminService. It is for a socket that is root's alone. It is safe for concurrent use.
type Server struct {
	crishimv1.UnimplementedAdminServiceServer
	checkpoints *checkpoint.Service
	log         logrus.FieldLogger
}

// New returns a grpc.Server that serves the API, and nothing else. Its connections must be Unix sockets.
func New(checkpoints *checkpoint.Service, log logrus.FieldLogger) *grpc.Server {
	server := grpc.NewServer(grpc.Creds(peerCredentials{}))
	crishimv1.RegisterAdminServiceServer(server, &Server{checkpoints: checkpoints, log: log})
	return server
}

// Checkpoint is the kubelet's CheckpointContainer, with progress.
func (s *Server) Checkpoint(request *crishimv1.CheckpointRequest, stream grpc.ServerStreamingServer[crishimv1.CheckpointResponse]) error {
	// Events come one at a time. An error means that the client is gone: then the context of the call ends as well.
	tell := func(event *crishimv1.CheckpointResponse) { _ = stream.Send(event) }
	done, err := s.checkpoints.Checkpoint(stream.Context(), &runtimeapi.CheckpointContainerRequest{
		ContainerId: request.GetContainerId(), Location: request.GetLocation(),
	}, callerOf(stream.Context()), tell)
	if err != nil {
		return err
	}
	return stream.Send(&crishimv1.CheckpointResponse{Event: &crishimv1.CheckpointResponse_Done{Done: done}})
}

// List tells of all checkpoints that are remembered.
func (s *Server) List(context.Context, *crishimv1.ListRequest) (*crishimv1.ListResponse, error) {
	return &crishimv1.ListResponse{Checkpoints: s.checkpoints.History().List()}, nil
}

// Cancel rolls a checkpoint back and waits for its end.
func (s *Server) Cancel(ctx context.Context, request *crishimv1.CancelRequest) (*crishimv1.CancelResponse, error) {
	history := s.checkpoints.History()
	flight := history.Flight(request.GetId())
	switch {
	case flight != nil:
	case history.Ended(request.GetId(), "") != nil:
		return nil, status.Errorf(codes.FailedPrecondition, "checkpoint %.64q has ended already", request.GetId())
	default:
		return nil, status.Errorf(codes.NotFound, "there is no checkpoint %.64q: crishim list says which are in flight", request.GetId())
	}
	c, err := flight.Cancel(ctx, checkpoint.ErrCancelled)
	if err != nil {
		return nil, status.FromContextError(err).Err()
	}
	return &crishimv1.CancelResponse{Checkpoint: c}, nil
}

// Delete removes an archive that the history knows, and remembers it.
func (s *Server) Delete(ctx context.Context, request *crishimv1.DeleteRequest) (*crishimv1.DeleteResponse, error) {
	history := s.checkpoints.History()
	c := history.Ended(request.GetId(), request.GetId())
	switch {
	case history.Flight(request.GetId()) != nil:
		return nil, status.Errorf(codes.FailedPrecondition, "checkpoint %.64q is in flight: crishim cancel ends it", request.GetId())
	case c == nil:
		return nil, status.Errorf(codes.NotFound, "crishim remembers no archive %q: only what it has made can be deleted by it, see crishim list", request.GetId())
	case c.GetCode() != int32(codes.OK):
		return nil, status.Errorf(codes.FailedPrecondition, "checkpoint %s has failed: it has no archive", c.GetId())
	case c.GetDeleted() != nil:
		return nil, status.Errorf(codes.NotFound, "the archive of checkpoint %s was deleted at %s", c.GetId(), c.GetDeleted().AsTime().Format(time.RFC3339))
	case c.GetInode() == 0:
		return nil, status.Errorf(codes.FailedPrecondition, "crishim died over checkpoint %s, and cannot tell whether %s is its archive: remove it by hand", c.GetId(), c.GetLocation())
	}
	err := archive.Delete(c.GetLocation(), c.GetInode(), c.GetSize(), c.GetModified().AsTime())
	code := codes.Internal
	switch {
	case err == nil:
		code = codes.OK
	case errors.Is(err, os.ErrNotExist):
		code = codes.NotFound
	case errors.Is(err, archive.ErrOther), errors.Is(err, archive.ErrInvalidLocation):
		code = codes.FailedPrecondition
	}
	caller := callerOf(ctx)
	log := s.log.WithFields(logrus.Fields{
		"id": c.GetId(), "location": c.GetLocation(), "pid": caller.GetPid(), "uid": caller.GetUid(), "process": caller.GetProcess(),
	})
	if err != nil {
		log.WithField("code", code.String()).Errorf("archive not deleted: %v", err)
		return nil, status.Error(code, err.Error())
	}
	c.Deleted = timestamppb.Now()
	history.Add(c)
	log.Info("archive deleted")
	return &crishimv1.DeleteResponse{Checkpoint: c}, nil
}

// Check looks at the node and at a container.
func (s *Server) Check(ctx context.Context, request *crishimv1.CheckRequest) (*crishimv1.CheckResponse, error) {
	return s.checkpoints.Check(ctx, request.GetContainerId(), request.GetLocation()), nil
}

func callerOf(ctx context.Context) *crishimv1.Caller {
	if p, ok := peer.FromContext(ctx); ok {
		if info, ok := p.AuthInfo.(peerInfo); ok {
			return checkpoint.Caller(crishimv1.Interface_INTERFACE_ADMIN, info.Pid, info.Uid)
		}
	}
	return &crishimv1.Caller{Interface: crishimv1.Interface_INTERFACE_ADMIN}
}
