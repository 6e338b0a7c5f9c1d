package matrix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// section is a part of the table.
type section struct {
	title string
	rows  []row
}

func sections() []section {
	return []section{
		{"Memory and processes", processRows()},
		{"Descriptors", descriptorRows()},
		{"Network", networkRows()},
		{"Security", securityRows()},
		{"Standard streams and execs", streamRows()},
		{"Namespaces and mounts", mountRows()},
		{"Files", fileRows()},
		{"Programs", programRows()},
		{"Pods", podRows()},
	}
}

func processRows() []row {
	return []row{
		{name: "1 GiB of memory", what: "private memory with known content", kinds: []string{"memory=1024"}, alone: true},
		{name: "processes", what: "children, process groups, sessions, an orphan, a stopped process, zombies", kinds: []string{"family"}},
		{name: "threads", what: "50 threads with names and priorities", kinds: []string{"threads=50"}},
		{name: "shared memory", what: "a memory file that three processes have mapped", kinds: []string{"shared-memory"}},
		{name: "System V IPC", what: "shared memory, semaphores, a message queue", kinds: []string{"sysv"}},
		{name: "mapped files", what: "files mapped privately and shared, with changes", kinds: []string{"mapped-private", "mapped-shared"}},
		{name: "memfd", what: "a sealed memory file, open and mapped", kinds: []string{"memfd"}},
		{name: "protections", what: "memory of every protection, locked memory, advice about memory", kinds: []string{"protections"}},
		{name: "huge pages", what: "memory in pages of 2 MiB", kinds: []string{"hugetlb=4"}, machine: true, limits: []limit{{
			step: starting, cgroup: "v1", unless: hugePages(), reason: "No huge pages are reserved (vm.nr_hugepages): there is nothing to checkpoint.",
			text: "map huge pages: cannot allocate memory",
		}}},
		{name: "swapped memory", what: "16 MiB that are swapped out at the dump", kinds: []string{"swapped=16"}, machine: true, limits: []limit{{
			step: starting, cgroup: "v1", unless: swap(), reason: "Nothing can be swapped out: there is nothing to checkpoint.", text: "nothing was swapped out",
		}}},
		{name: "memory limit", what: "16 MiB, and the rest of its 48 MiB are page cache", kinds: []string{"memory=16"}, machine: true, during: fillMemory,
			container: func(c *cri.ContainerConfig) {
				c.Linux.Resources = &cri.LinuxContainerResources{MemoryLimitInBytes: memoryLimit}
			}},
		{name: "timers", what: "setitimer and timer_create: armed for an hour, and ticking", kinds: []string{"timers"}},
		{name: "alarm", what: "setitimer without an interval", kinds: []string{"alarm"}},
		{name: "signals", what: "pending ones, queued with values; blocked, caught and ignored ones", kinds: []string{"pending", "dispositions"}},
	}
}

const memoryLimit = 48 << 20

// fillMemory has a container reach its limit. The end of the dump finds that nothing was killed.
func fillMemory(ctx context.Context, _ *site, c *node.Container) (end func() error, err error) {
	if _, err := c.Exec(ctx, "/bin/dd", "if=/dev/zero", "of=/tmp/cached", "bs=64k", "count=768"); err != nil {
		return nil, err
	}
	const either = "cat /sys/fs/cgroup/%s 2>/dev/null || cat /sys/fs/cgroup/memory/%s"
	text, err := c.Exec(ctx, "/bin/sh", "-c", fmt.Sprintf(either, "memory.current", "memory.usage_in_bytes"))
	if err != nil {
		return nil, err
	}
	usage, err := strconv.Atoi(strings.TrimSpace(text))
	if err != nil {
		return nil, fmt.Errorf("parse the container's use of memory: %w", err)
	}
	if usage < memoryLimit-4<<20 {
		return nil, fmt.Errorf("the container uses %d of %d bytes: it is not at its limit", usage, memoryLimit)
	}
	return func() error {
		text, err := c.Exec(ctx, "/bin/sh", "-c", fmt.Sprintf(either, "memory.events", "memory.oom_control"))
		if err == nil && !strings.Contains(text, "oom_kill 0\n") {
			err = fmt.Errorf("the kernel has killed for want of memory: %s", text)
		}
		return err
	}, nil
}

func descriptorRows() []row {
	return []row{
		{name: "open files", what: "positions, flags, duplicates, a directory, O_PATH, /proc", kinds: []string{"files"}},
		{name: "pipes and FIFOs", what: "with data in them, full, broken", kinds: []string{"pipes"}},
		{name: "eventfd, signalfd, timerfd", what: "counts, masks; armed and ticking", kinds: []string{"eventfd", "signalfd", "timerfd"}},
		{name: "periodic timerfd that is due", what: "not read yet", kinds: []string{"due"}, limits: []limit{{
			step: restoring, reason: "CRIU does not arm a periodic timerfd again of which a tick was due at the dump (criu issue 3162).", text: `is "ticked, not: it ticks"`,
		}}},
		{name: "eventfd as a semaphore", what: "EFD_SEMAPHORE", kinds: []string{"semaphore"}, limits: []limit{{
			step: restoring, reason: "CRIU makes it an ordinary eventfd.", text: "eventfd-semaphore 0",
		}}},
		{name: "epoll", what: "ready and not, one watching another", kinds: []string{"epoll"}},
		{name: "locks", what: "flock, fcntl of a process and of an open file", kinds: []string{"locks"}},
		{name: "pseudoterminals", what: "both ends; the terminal of a session", kinds: []string{"ptys"}},
		{name: "TCP sockets", what: "listening; connected, with data each way that nobody has read yet", kinds: []string{"tcp"}},
		{name: "UDP sockets", what: "bound, connected", kinds: []string{"udp"}},
		{name: "unix sockets", what: "pairs of each type with data in them; listening and connected by name", kinds: []string{"unix"}},
		{name: "peer's name of a unix connection", what: "what getpeername says", kinds: []string{"peer-name"}, limits: []limit{{
			step: restoring, reason: "CRIU connects the two ends without their names.", text: `was "peer \"@peer\"", is "peer \"@\""`,
		}}},
		{name: "unix connection not accepted yet", what: "in the backlog of a listening socket", kinds: []string{"waiting"}},
		{name: "unix connection not accepted yet, with data", what: "the same, and data was sent", kinds: []string{"waiting=data"}, limits: []limit{{
			step: dumping, reason: "CRIU cannot dump what was sent before the connection is accepted.", text: "Non-empty write queue on an in-flight socket",
		}}},
		{name: "descriptor in a message", what: "sent over a unix socket and not received yet", kinds: []string{"passing"}},
	}
}

func securityRows() []row {
	security := func(change func(*cri.LinuxContainerSecurityContext)) func(*cri.ContainerConfig) {
		return func(c *cri.ContainerConfig) { change(c.Linux.SecurityContext) }
	}
	return []row{
		{name: "capabilities", what: "a changed set", kinds: []string{"identity"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{AddCapabilities: []string{"NET_ADMIN", "SYS_PTRACE"}, DropCapabilities: []string{"CHOWN", "MKNOD"}}
		})},
		{name: "no capabilities", what: "an empty set", kinds: []string{"identity", "denied=chown"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
		})},
		{name: "seccomp", what: "the runtime's default profile", kinds: []string{"identity", "denied=unshare"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
		})},
		{name: "no_new_privs", what: "allowPrivilegeEscalation: false", kinds: []string{"identity"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.NoNewPrivs = true
		})},
		{name: "user 1000", what: "with groups", kinds: []string{"identity"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser, s.RunAsGroup, s.SupplementalGroups = &cri.Int64Value{Value: 1000}, &cri.Int64Value{Value: 1001}, []int64{2000, 2001}
		}), machine: true, limits: []limit{otherUser()}},
		{name: "sockets of user 1000", what: "TCP, UDP and unix sockets", kinds: []string{"tcp", "udp", "unix"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.RunAsUser = &cri.Int64Value{Value: 1000}
		}), machine: true, limits: []limit{otherUser()}},
		{name: "restricted pod", what: "user 1000, no capabilities, no_new_privs, seccomp, masked paths, read-only root",
			kinds: []string{"identity", "denied=write,unshare"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
				s.RunAsUser, s.RunAsGroup = &cri.Int64Value{Value: 1000}, &cri.Int64Value{Value: 1000}
				s.Capabilities = &cri.Capability{DropCapabilities: []string{"ALL"}}
				s.NoNewPrivs, s.ReadonlyRootfs = true, true
				s.Seccomp = &cri.SecurityProfile{ProfileType: cri.SecurityProfile_RuntimeDefault}
				s.MaskedPaths, s.ReadonlyPaths = maskedPaths, readonlyPaths
			}), machine: true, limits: []limit{otherUser()}},
		{name: "read-only root file system", what: "readOnlyRootFilesystem: true", kinds: []string{"denied=write", "mounts"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.ReadonlyRootfs = true
		})},
		{name: "masked and read-only paths", what: "as Kubernetes has them", kinds: []string{"denied=keys,sysctl,bus", "mounts"}, container: security(func(s *cri.LinuxContainerSecurityContext) {
			s.MaskedPaths, s.ReadonlyPaths = maskedPaths, readonlyPaths
		})},
		{name: "resource limits", what: "lowered ones", kinds: []string{"limits"}},
	}
}

// What the kubelet asks for.
var (
	maskedPaths = []string{
		"/proc/asound", "/proc/acpi", "/proc/interrupts", "/proc/kcore", "/proc/keys", "/proc/latency_stats", "/proc/timer_list",
		"/proc/timer_stats", "/proc/sched_debug", "/proc/scsi", "/sys/firmware", "/sys/devices/virtual/powercap",
	}
	readonlyPaths = []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"}
)

func streamRows() []row {
	return []row{
		{name: "log", what: "a line each 10 ms to standard output", kinds: []string{"lines"}},
		{name: "stdin", what: "waiting for a line", kinds: []string{"stdin"}, container: func(c *cri.ContainerConfig) { c.Stdin = true },
			after: typed},
		{name: "tty", what: "its terminal and its session", kinds: []string{"terminal", "stdin"},
			container: func(c *cri.ContainerConfig) { c.Stdin, c.Tty = true, true }, after: typed},
		{name: "running exec", what: "survives in the original, and is not in the archive", kinds: []string{"threads=2"}, during: runningExec, after: noExec},
	}
}

// typed types a line, and waits until the workload has read it.
func typed(ctx context.Context, restored instance) error {
	if err := restored.input("typed\n"); err != nil {
		return err
	}
	for {
		state, err := ask(ctx, restored)
		if err != nil {
			return err
		}
		if strings.Contains(state, "typed was read") {
			return nil
		}
		if err := pause(ctx); err != nil {
			return fmt.Errorf("the restored container does not read what is typed: %s", state)
		}
	}
}

// runningExec starts a command in the container, which ends by itself once it is told to after the dump.
func runningExec(ctx context.Context, _ *site, c *node.Container) (end func() error, err error) {
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := c.Exec(ctx, "/bin/sh", "-c", "touch /tmp/started; while [ ! -e /tmp/end ]; do sleep 0.05; done; echo ended by itself")
		done <- result{out, err}
	}()
	for {
		if _, err := c.Exec(ctx, "/bin/cat", "/tmp/started"); err == nil {
			break
		}
		if err := pause(ctx); err != nil {
			return nil, fmt.Errorf("start exec: %w", err)
		}
	}
	return func() error {
		select {
		case r := <-done:
			return fmt.Errorf("the exec ended with the dump: %q, %w", r.out, r.err)
		default:
		}
		if _, err := c.Exec(ctx, "/bin/touch", "/tmp/end"); err != nil {
			return err
		}
		if r := <-done; r.err != nil || r.out != "ended by itself\n" {
			return fmt.Errorf("the exec after the dump: %q, %w", r.out, r.err)
		}
		return nil
	}, nil
}

func noExec(ctx context.Context, restored instance) error {
	out, err := restored.exec(ctx, "/bin/ps", "-o", "args")
	if err == nil && strings.Contains(out, "/tmp/started") {
		err = fmt.Errorf("the exec is in the restored container: %s", out)
	}
	return err
}

func mountRows() []row {
	namespaces := func(name, what string, change func(*cri.NamespaceOption), kinds ...string) row {
		return row{
			name: name, what: what, kinds: kinds,
			pod: func(p *cri.PodSandboxConfig) {
				o := &cri.NamespaceOption{Pid: cri.NamespaceMode_CONTAINER}
				change(o)
				p.Linux.SecurityContext.NamespaceOptions = o
				if o.Network == cri.NamespaceMode_NODE {
					p.Hostname = "" // it is the node's
				}
			},
			container: func(c *cri.ContainerConfig) { change(c.Linux.SecurityContext.NamespaceOptions) },
		}
	}
	hostPID := namespaces("hostPID", "a family of processes with the node's process ids", func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_NODE }, "family")
	hostPID.before = highPids
	privileged := row{
		name: "privileged", what: "all capabilities and devices", kinds: []string{"identity", "mounts"},
		pod:       func(p *cri.PodSandboxConfig) { p.Linux.SecurityContext.Privileged = true },
		container: func(c *cri.ContainerConfig) { c.Linux.SecurityContext.Privileged = true },
	}
	return []row{
		namespaces("shared process namespace", "shareProcessNamespace", func(o *cri.NamespaceOption) { o.Pid = cri.NamespaceMode_POD }, "family"),
		namespaces("hostNetwork", "unix sockets in the node's network, abstract ones too", func(o *cri.NamespaceOption) { o.Network = cri.NamespaceMode_NODE }, "threads=2", "unix"),
		hostPID,
		namespaces("hostIPC", "the node's IPC namespace and /dev/shm", func(o *cri.NamespaceOption) { o.Ipc = cri.NamespaceMode_NODE }, "threads=2"),
		privileged,
		{name: "emptyDir", what: "with files in it, one mapped", kinds: []string{"content=/volume/files", "mapped-shared=/volume", "mounts"},
			volumes: []volume{{path: "/volume"}}},
		{name: "hostPath", what: "a directory and a file", kinds: []string{"content=/host", "tree=/host-file", "mounts"},
			volumes: []volume{{path: "/host", prepare: withFiles}, {path: "/host-file", prepare: withFiles, sub: "file"}}},
		{name: "ConfigMap", what: "read-only, with links as the kubelet makes them", kinds: []string{"content=/config", "mounts"},
			volumes: []volume{{path: "/config", readOnly: true, prepare: configMap}}},
		{name: "subPath", what: "a directory of a volume, mounted by the kubelet", kinds: []string{"content=/sub", "mounts"},
			volumes: []volume{{path: "/sub", prepare: subPath, sub: "mounted"}}},
		{name: "rslave mount", what: "HostToContainer", kinds: []string{"content=/rslave", "mounts"},
			volumes: []volume{{path: "/rslave", prepare: sharedMount, propagation: cri.MountPropagation_PROPAGATION_HOST_TO_CONTAINER}}},
		{name: "rshared mount", what: "Bidirectional", kinds: []string{"content=/rshared", "mounts"},
			pod: privileged.pod, container: privileged.container,
			volumes: []volume{{path: "/rshared", prepare: sharedMount, propagation: cri.MountPropagation_PROPAGATION_BIDIRECTIONAL}}},
		{name: "nested mounts", what: "a volume in a volume, at a link of the image's", kinds: []string{"content=/outer", "content=/outer/inner/more", "mounts"},
			volumes: []volume{{path: "/outer"}, {path: "/outer/inner/more"}}},
		{name: "mount in a volume", what: "a file system mounted below a volume's directory on the node", kinds: []string{"content=/volume", "mounts"},
			volumes: []volume{{path: "/volume", prepare: submount}}},
		{name: "memory volume", what: "emptyDir with medium: Memory", kinds: []string{"content=/memory", "mounts"},
			volumes: []volume{{path: "/memory", prepare: memoryVolume}}},
		{name: "POSIX shared memory", what: "/dev/shm with content, a file of it mapped", kinds: []string{"content=/dev/shm/files", "mapped-shared=/dev/shm", "mounts"}},
		{name: "tmpfs", what: "mounted by the container itself", kinds: []string{"tmpfs=/mnt/tmpfs", "mounts"}, container: func(c *cri.ContainerConfig) {
			c.Linux.SecurityContext.Capabilities = &cri.Capability{AddCapabilities: []string{"SYS_ADMIN"}}
		}},
		{name: "devices", what: "one of the node's, open", kinds: []string{"device=/dev/held", "mounts"}, container: func(c *cri.ContainerConfig) {
			c.Devices = []*cri.Device{{HostPath: "/dev/zero", ContainerPath: "/dev/held", Permissions: "rw"}}
		}},
	}
}

// highPids has the first node give pids that are free on the second: they go on from a number that the second does not reach.
func highPids(ctx context.Context, _ *testing.T, s *site) (func() error, error) {
	_, err := s.first.Output(ctx, "sh", "-c", "echo 50000 >/proc/sys/kernel/ns_last_pid")
	return nil, err
}

func withFiles(_ context.Context, n *node.Node, source string) error {
	return errors.Join(os.WriteFile(n.Path(source+"/file"), []byte("of the node\n"), 0o644), os.MkdirAll(n.Path(source+"/dir"), 0o755))
}

func configMap(_ context.Context, n *node.Node, source string) error {
	dir := n.Path(source)
	return errors.Join(
		os.Mkdir(filepath.Join(dir, "..2026_01_01"), 0o755),
		os.WriteFile(filepath.Join(dir, "..2026_01_01", "key"), []byte("value\n"), 0o644),
		os.Chtimes(filepath.Join(dir, "..2026_01_01", "key"), time.Time{}, time.Unix(1_700_000_000, 0)),
		os.Symlink("..2026_01_01", filepath.Join(dir, "..data")), os.Symlink("..data/key", filepath.Join(dir, "key")))
}

func mount(ctx context.Context, n *node.Node, args ...string) error {
	_, err := n.Output(ctx, "mount", args...)
	return err
}

func subPath(ctx context.Context, n *node.Node, source string) error {
	return errors.Join(os.MkdirAll(n.Path(source+"/volume/part"), 0o755), os.Mkdir(n.Path(source+"/mounted"), 0o755),
		mount(ctx, n, "--bind", source+"/volume/part", source+"/mounted"))
}

func sharedMount(ctx context.Context, n *node.Node, source string) error {
	return errors.Join(mount(ctx, n, "--bind", source, source), mount(ctx, n, "--make-rshared", source))
}

func submount(ctx context.Context, n *node.Node, source string) error {
	return errors.Join(os.Mkdir(n.Path(source+"/below"), 0o755), mount(ctx, n, "-t", "tmpfs", "below", source+"/below"),
		os.WriteFile(n.Path(source+"/below/file"), []byte("below\n"), 0o644))
}

func memoryVolume(ctx context.Context, n *node.Node, source string) error {
	return mount(ctx, n, "-t", "tmpfs", "-o", "size=16m", "memory", source)
}

func fileRows() []row {
	plain := func(name, what string, kinds ...string) row { return row{name: name, what: what, kinds: kinds} }
	return []row{
		plain("changes to the image", "changed, deleted, renamed, replaced; opaque directories; a directory for a file and the reverse", "changes"),
		plain("special files", "device nodes, FIFOs, hard links, symbolic links", "special"),
		plain("sparse files", "of 64 MiB, with gaps between data, at the end, and nothing else", "sparse"),
		plain("extended attributes", "file capabilities, access control lists, a user's", "attributes"),
		plain("owners and modes", "setuid, sticky, large numbers, no permissions", "owners"),
		plain("names", "newlines, quotes, 255 bytes, not UTF-8", "names"),
		plain("deep tree", "a path of nearly 4096 bytes", "deep"),
		plain("100,000 files", "in 100 directories", "many=100000"),
		plain("deleted open file", "of some kilobytes", "deleted=5000"),
		plain("large deleted open file", "of 100 MiB", "deleted=104857600"),
		{name: "deleted open file of a volume", what: "of some kilobytes", kinds: []string{"deleted=5000,/volume"}, volumes: []volume{{path: "/volume"}}},
		plain("deleted open file with another name", "a hard link", "deleted-name"),
		plain("renamed open file", "another one has its name", "renamed"),
		plain("replaced open file", "another one has its name", "replaced"),
		plain("changed open file of the image", "changed after it had been opened for reading", "image-file"),
		plain("deleted working directory", "of a child", "working-directory"),
	}
}

func hugePages() *condition { return &condition{"huge pages", meminfo("HugePages_Free")} }

func swap() *condition { return &condition{"swap", meminfo("SwapFree")} }

// meminfo says whether the machine has any of something.
func meminfo(key string) bool {
	content, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return false
	}
	_, value, ok := strings.Cut(string(content), key+":")
	return ok && !strings.HasPrefix(strings.TrimSpace(value), "0")
}

// otherUser is the limit of containers that are not root's.
func otherUser() limit {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var sets [2]unix.CapUserData
	err := unix.Capget(&header, &sets[0])
	return limit{
		step: dumping, cgroup: "v1",
		unless: &condition{"CAP_SYS_RESOURCE", err == nil && sets[0].Effective&(1<<unix.CAP_SYS_RESOURCE) != 0},
		reason: "Where the machine does not have this capability, CRIU cannot read the resource limits of another user's process.",
		text:   "without CAP_SYS_RESOURCE, which this machine lacks, only processes of root can be dumped",
	}
}
