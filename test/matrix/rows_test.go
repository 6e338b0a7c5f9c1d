package matrix

import (
	"context"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// row is a kind of container.
type row struct {
	name string
	// what it holds, for the table.
	what string
	// kinds are the workload's, as in "workload hold KIND…".
	kinds []string
	// pod and container change what is asked of the CRI. They may be nil.
	pod       func(*cri.PodSandboxConfig)
	container func(*cri.ContainerConfig)
	volumes   []volume
	// before is called before the container is started, and what it returns after the dump. It may be nil, and return nil.
	before func(context.Context, *testing.T, *site) (end func() error, err error)
	// during is called before the dump, and what it returns after it. It may be nil.
	during func(context.Context, *site, *node.Container) (end func() error, err error)
	// dumps is how many times it is dumped, once if 0. The last archive is restored.
	dumps int
	// after is called when the restored container has the state of the original. It may be nil.
	after func(ctx context.Context, restored instance) error
	// alone says that no other row is to run at the same time: it needs much memory, or much of the disk.
	alone bool
	// machine says that on cgroup v2 it runs in a virtual machine, see node.Machine: it needs what few others have.
	machine bool
	// limits are why it cannot be started, dumped or restored, if so.
	limits []limit
	// program is what runs in place of the workload. It may be nil.
	program *program
}

// program is another program than the workload.
type program struct {
	image   string
	command []string
	// ready is what the program writes once it can be asked.
	ready string
	// state asks it. What it says must be the same before and after.
	state func(context.Context, instance) (string, error)
}

// volume is a directory of the node that is mounted in the container. What the container writes into it is there, too, where it
// is restored.
type volume struct {
	path        string
	readOnly    bool
	propagation cri.MountPropagation
	// prepare makes more of the directory source on a node. It may be nil.
	prepare func(ctx context.Context, n *node.Node, source string) error
	// sub is the path below it that is mounted, if not all of it.
	sub string
}

// limit is a known reason why a step fails.
type limit struct {
	step step
	// runtime and cgroup are where, empty for everywhere.
	runtime, cgroup string
	// unless is a condition under which there is no such limit; nil if there is none.
	unless *condition
	// reason is for the table, text what the error must contain.
	reason, text string
}

// condition is something that a machine has or has not.
type condition struct {
	name string
	met  bool
}

// inMachine says whether a row runs in the virtual machine on a version of cgroups.
func (r row) inMachine(cgroup string) bool { return r.machine && cgroup == "v2" }

func (r row) image() string {
	if r.program != nil {
		return r.program.image
	}
	return node.WorkloadImage
}

func (r row) ready() string {
	if r.program != nil {
		return r.program.ready
	}
	return "holding"
}

func (r row) state(ctx context.Context, i instance) (string, error) {
	if r.program != nil {
		return r.program.state(ctx, i)
	}
	return ask(ctx, i)
}

func (r row) spec(runtime string, mounts []*cri.Mount) node.Spec {
	command := append([]string{"/bin/workload", "hold"}, r.kinds...)
	if r.program != nil {
		command = r.program.command
	}
	return node.Spec{
		Name: "matrix", Handler: runtime, Image: r.image(), Command: command, Mounts: mounts,
		Pod: r.pod,
		Container: func(c *cri.ContainerConfig) {
			if r.container != nil {
				r.container(c)
			}
		},
	}
}
