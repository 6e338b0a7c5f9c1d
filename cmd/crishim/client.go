package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/config"
)

// sockets are where the commands of an operator find crishim: its own API, and the CRI, which it relays. They are those that crishim serve has
// from the same configuration.
type sockets struct{ file string }

func (s *sockets) register(command *cobra.Command) {
	s.file = config.DefaultFile
	configFlag(command, &s.file)
	config.Register(command.Flags(), "admin", "listen")
}

// client is a connection to crishim. The caller closes it.
type client struct {
	crishimv1.AdminServiceClient
	runtime runtimeapi.RuntimeServiceClient
	conns   []*grpc.ClientConn
}

func (s *sockets) dial(command *cobra.Command) (*client, error) {
	told, err := config.Sources{File: s.file, Environment: os.Environ(), Flags: command.Flags()}.Load()
	if err != nil {
		return nil, exitError{exitUsage, err}
	}
	c := &client{}
	for _, endpoint := range []string{told.Keys.Admin, told.Keys.Listen} {
		path, err := filepath.Abs(strings.TrimPrefix(endpoint, "unix://"))
		if err != nil {
			return nil, err
		}
		// The socket is there or not: to wait for longer than a moment is of no use.
		connect := grpc.ConnectParams{Backoff: backoff.DefaultConfig, MinConnectTimeout: time.Second}
		conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithConnectParams(connect), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20)))
		if err != nil {
			return nil, err
		}
		c.conns = append(c.conns, conn)
	}
	c.AdminServiceClient, c.runtime = crishimv1.NewAdminServiceClient(c.conns[0]), runtimeapi.NewRuntimeServiceClient(c.conns[1])
	return c, nil
}

func (c *client) close() {
	for _, conn := range c.conns {
		conn.Close()
	}
}

// answered makes an error for people of what crishim has answered.
func answered(err error) error {
	s := status.Convert(err)
	switch s.Code() {
	case codes.OK:
		return nil
	case codes.Unavailable:
		return exitError{exitUnreachable, fmt.Errorf("crishim does not answer: %s: is it running, and are you root? systemctl status crishim tells", s.Message())}
	}
	return fmt.Errorf("%s (%s)", s.Message(), s.Code())
}

// target is a running container, as it was named.
type target struct{ id, namespace, pod, container string }

func (t target) String() string { return t.namespace + "/" + t.pod + "/" + t.container }

// running lists the running containers, by their names.
func (c *client) running(ctx context.Context) ([]target, error) {
	pods, err := c.runtime.ListPodSandbox(ctx, &runtimeapi.ListPodSandboxRequest{})
	if err != nil {
		return nil, answered(err)
	}
	byID := make(map[string]*runtimeapi.PodSandboxMetadata)
	for _, pod := range pods.GetItems() {
		byID[pod.GetId()] = pod.GetMetadata()
	}
	running := &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_RUNNING}
	containers, err := c.runtime.ListContainers(ctx, &runtimeapi.ListContainersRequest{Filter: &runtimeapi.ContainerFilter{State: running}})
	if err != nil {
		return nil, answered(err)
	}
	var all []target
	for _, container := range containers.GetContainers() {
		pod := byID[container.GetPodSandboxId()]
		all = append(all, target{container.GetId(), pod.GetNamespace(), pod.GetName(), container.GetMetadata().GetName()})
	}
	slices.SortFunc(all, func(a, b target) int { return strings.Compare(a.String(), b.String()) })
	return all, nil
}

var idPrefix = regexp.MustCompile(`^[0-9a-f]{12,64}$`)

// resolve returns the containers that a name is of: a container's id or a beginning of it, namespace/pod/container, or namespace/pod for all in
// a pod. An error says what is wrong with the name.
func resolve(all []target, name string) ([]target, error) {
	var found []target
	parts := strings.Split(name, "/")
	for _, t := range all {
		switch {
		case len(parts) == 1 && t.id == name:
			return []target{t}, nil
		case len(parts) == 1 && name != "" && strings.HasPrefix(t.id, name),
			len(parts) == 2 && t.namespace == parts[0] && t.pod == parts[1],
			len(parts) == 3 && t.namespace == parts[0] && t.pod == parts[1] && t.container == parts[2]:
			found = append(found, t)
		}
	}
	switch {
	case len(parts) > 3 || slices.Contains(parts, ""):
		return nil, exitError{exitUsage, fmt.Errorf("%q names no container: it is an id, namespace/pod/container, or namespace/pod", name)}
	case len(found) == 0 && idPrefix.MatchString(name):
		return []target{{id: name}}, nil // crishim says why not, as of one that has exited
	case len(found) == 0:
		return nil, fmt.Errorf("no container runs that is called %q: it is an id, namespace/pod/container, or namespace/pod", name)
	case len(found) > 1 && len(parts) != 2:
		var names []string
		for _, t := range found {
			names = append(names, fmt.Sprintf("%.12s (%s)", t.id, t))
		}
		return nil, fmt.Errorf("%q may be any of %s: write more of its id", name, strings.Join(names, ", "))
	}
	return found, nil
}

// find asks crishim for the containers that a name is of.
func (c *client) find(ctx context.Context, name string) ([]target, error) {
	all, err := c.running(ctx)
	if err != nil {
		return nil, err
	}
	return resolve(all, name)
}

// Exit codes, of all commands but those that say otherwise.
const (
	exitFailed      = 1
	exitUsage       = 2
	exitUnreachable = 3
	exitInterrupted = 130
)

// exitCodes is their table, in the help of the commands that talk to crishim.
const exitCodes = `Exit code: 0   done; of check: able
           1   failed, which the error says; of check: not able
           2   the command line, or the configuration file, is wrong
           3   crishim does not answer
           130 interrupted, as by Ctrl-C: what was begun was rolled back`

// usage makes the errors of a command's arguments those of its usage.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(command *cobra.Command, args []string) error {
		if err := check(command, args); err != nil {
			return exitError{exitUsage, fmt.Errorf("%w: see crishim %s --help", err, command.Name())}
		}
		return nil
	}
}

func usageError(_ *cobra.Command, err error) error { return exitError{exitUsage, err} }

// exitError is an error that has an exit code of its own; all others have 1.
type exitError struct {
	code int
	error
}

func (e exitError) Unwrap() error { return e.error }

func exitCode(err error) int {
	var exit exitError
	if errors.As(err, &exit) {
		return exit.code
	}
	return exitFailed
}

// terminalAllows says whether escape sequences do there what they are for.
func terminalAllows(terminal bool) bool { return terminal && os.Getenv("TERM") != "dumb" }
