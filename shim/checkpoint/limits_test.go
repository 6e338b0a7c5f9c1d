package checkpoint_test

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"unicode/utf8"
	"unsafe"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
	"crishim/test/restore"
)

// limit brings about a row of docs/limits.md.
type limit struct {
	spec node.Spec
	// before is called before the container is started, and after when it counts. They may be nil.
	before func(*testing.T)
	after  func(*testing.T, *node.Container)
	// criu makes another CRIU than the node's. It may be nil.
	criu func(*testing.T) string
	// runtime is put before the node's. It may be nil.
	runtime func(runtimeapi.RuntimeServiceClient) runtimeapi.RuntimeServiceClient
	// words are in the error, beside those of the row: where to look.
	words []string
	// disturbed says that the container has ended, or is paused or traced, by the test itself.
	disturbed bool
}

// volume is a directory of the node that containers have at the same path.
const volume = "/data/volume"

// limits has each row of docs/limits.md but those that other tests bring about.
var limits = map[string]limit{
	"MPTCP socket":           {spec: command("mptcp"), words: []string{"process 1 (workload), descriptor ", " (socket:["}},
	"socket of another kind": {spec: command("vsock"), words: []string{"process 1 (workload), descriptor ", " (socket:["}},
	"unix socket with a peer outside": {
		spec:   inVolume(command("unix", "unix", volume+"/socket")),
		before: func(t *testing.T) { listen(t, volume+"/socket") },
		words:  []string{"process 1 (workload), descriptor ", " (" + volume + "/socket)"},
	},
	"mount that the specification does not know": {
		spec:   inVolume(count(), runtimeapi.MountPropagation_PROPAGATION_HOST_TO_CONTAINER),
		before: makeVolumeShared,
		after:  mountInVolume,
		words:  []string{"mount " + volume + "/later: "},
	},
	"large deleted file that is open": {
		spec:  command("deleted", strconv.Itoa(1<<30+1<<20)),
		words: []string{"process 1 (workload), descriptor ", " (/tmp/deleted)"},
	},
	"deleted file with another name, in a volume": {
		spec:  inVolume(command("link", volume+"/name")),
		words: []string{"process 1 (workload), descriptor ", " (" + volume + "/deleted)", "in the volume at " + volume},
	},
	"deleted file with another name, where none can be added": {
		spec:  inVolume(command("link", volume+"/name")),
		after: makeVolumeImmutable,
		words: []string{"process 1 (workload), descriptor ", volume[1:] + "/deleted"},
	},
	"link_remap file in the way": {
		spec: command("link", "/tmp/name"),
		after: func(t *testing.T, c *node.Container) {
			if _, err := c.Exec(t.Context(), "/bin/sh", "-c", "for n in $(echo 0 1 2 3); do for m in 0 1 2 3 4 5 6 7 8 9; do touch /tmp/link_remap.${n#0}$m; done; done"); err != nil {
				t.Fatal(err)
			}
		},
		words: []string{"process 1 (workload), descriptor ", "tmp/deleted"},
	},
	"inotify or fanotify watch that cannot be found again": {
		spec:  command("inotify-deleted"),
		words: []string{"process 1 (workload), descriptor ", " (anon_inode:inotify)"},
	},
	"io_uring": {spec: command("io-uring"), words: []string{"process 1 (workload), descriptor ", " (anon_inode:[io_uring])"}},
	"open device": {
		// As a CDI device is given to a container.
		spec: changed(command("open", "/dev/fuse"), func(c *runtimeapi.ContainerConfig) {
			c.Devices = []*runtimeapi.Device{{ContainerPath: "/dev/fuse", HostPath: "/dev/fuse", Permissions: "rw"}}
		}),
		words: []string{"process 1 (workload), descriptor ", " (/dev/fuse)"},
	},
	"open file of another kind": {
		spec:  command("userfaultfd"),
		words: []string{"process 1 (workload), descriptor ", " (anon_inode:[userfaultfd])"},
	},
	"System V shared memory of the node": {
		spec:  running(namespaces(&runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, Ipc: runtimeapi.NamespaceMode_NODE}), command("sysv-shm")),
		words: []string{"process 1 (workload): "},
	},
	"user namespace of its own": {
		spec: namespaces(&runtimeapi.NamespaceOption{
			Pid: runtimeapi.NamespaceMode_CONTAINER,
			UsernsOptions: &runtimeapi.UserNamespace{
				Uids: []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}},
				Gids: []*runtimeapi.IDMapping{{HostId: 100000, Length: 65536}},
			},
		}),
	},
	"namespace made inside":            {spec: privileged(command("user-namespace")), words: []string{" (sleep): ", "nested user namespace"}},
	"process under a debugger":         {spec: count(), after: trace, words: []string{"process 1 (workload): it is traced by process " + strconv.Itoa(os.Getpid())}, disturbed: true},
	"process in uninterruptible sleep": {spec: command("vfork"), words: []string{"process 1 (workload): ", "(state D)"}},
	"process that does not stop":       {spec: privileged(command("page-fault"))},
	"exited container": {
		spec:      node.Spec{Command: []string{"/bin/sh", "-c", "echo count 1; exit 3"}},
		after:     waitUntilExited,
		words:     []string{"test (", "is exited, with code 3"},
		disturbed: true,
	},
	"paused container": {spec: count(), after: pause, words: []string{"test ("}, disturbed: true},
	"container of Kata, gVisor or another runtime": {
		spec:    count(),
		runtime: func(r runtimeapi.RuntimeServiceClient) runtimeapi.RuntimeServiceClient { return fakeKata{r} },
		words:   []string{"io.containerd.kata.v2"},
	},
	"CRIU too old for the sockets of this kernel": {
		spec:  node.Spec{Command: []string{"/bin/sh", "-c", "nc -l -p 8080 & exec workload count"}},
		criu:  func(*testing.T) string { return "/opt/criu-trixie/usr/sbin/criu" },
		words: []string{" (nc), descriptor ", " (socket:["},
	},
	"other user's process, and no CAP_SYS_RESOURCE": {
		spec: changed(node.Spec{Command: []string{"/bin/sh", "-c", "n=0; while true; do n=$((n+1)); echo count $n; sleep 1; done"}}, func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.RunAsUser = &runtimeapi.Int64Value{Value: 1000}
		}),
		criu:  func(t *testing.T) string { return criuBehind(t, "setpriv --bounding-set=-sys_resource") },
		words: []string{"process 1 (sh): "},
	},
	"seccomp filter on crishim itself": {
		spec: changed(count(), func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.Seccomp = &runtimeapi.SecurityProfile{ProfileType: runtimeapi.SecurityProfile_RuntimeDefault}
		}),
		criu: func(t *testing.T) string { return criuBehind(t, os.Args[0]+" "+underFilter) },
	},
	"CRIU that does not start": {
		spec:  count(),
		criu:  func(t *testing.T) string { return criuBehind(t, "false") },
		words: []string{"CRIU is not available: "},
	},
}

// elsewhere are rows that other tests of this package bring about.
var elsewhere = map[string]string{
	"full disk":                     "TestADiskThatIsTooSmall",
	"process that ends in mid-dump": "TestAProcessEndsInMidDump of test/crash",
	"TCP connection, and no means to lock the network": "TestTheNetworkLock",
	"TCP connection, where none are wanted":            "TestConnectionsThatAreRefused",
	"no CRIU, or one that is too old":                  "TestWithoutCRIU",
}

func TestLimits(t *testing.T) {
	documented := readLimits(t)
	for name := range limits {
		if documented[name].words == "" {
			t.Errorf("docs/limits.md has no %q", name)
		}
	}
	for name, row := range documented {
		l, ok := limits[name]
		if !ok {
			if elsewhere[name] == "" {
				t.Errorf("docs/limits.md has %q, and no test", name)
			}
			continue
		}
		t.Run(name, func(t *testing.T) { l.test(t, name, row) })
	}
}

func (l limit) test(t *testing.T, name string, row documentedLimit) {
	containerd := node.Containerd(t)
	makeVolume(t)
	if l.before != nil {
		l.before(t)
	}
	c := containerd.Run(t, l.spec)
	node.WaitCount(t, 0, c.Log)
	if l.after != nil {
		l.after(t, c)
	}
	config := checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Log: testLog(t)}
	if l.criu != nil {
		config.Criu = l.criu(t)
	}
	if l.runtime != nil {
		config.Runtime = l.runtime(config.Runtime)
	}
	service := checkpoint.New(config)
	defer service.Drain(context.Background())
	path := location(t)
	checkForesees(t, service, name, c.ID)
	_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
	if err == nil {
		t.Fatal("it was checkpointed")
	}
	answer := status.Convert(err)
	t.Log(answer.Message())
	if answer.Code().String() != row.code {
		t.Errorf("code is %s, the document says %s", answer.Code(), row.code)
	}
	if utf8.RuneCountInString(answer.Message()) > 512 || strings.Contains(answer.Message(), "\n") {
		t.Error("the error is not a line of at most 512 characters")
	}
	for _, words := range append(l.words, row.words) {
		if !strings.Contains(answer.Message(), words) {
			t.Errorf("the error lacks %q", words)
		}
	}
	if !l.disturbed {
		unharmed(t, c, path)
	}
}

// The end of CRIU's log goes to the caller, and all of it to the daemon's log.
func TestTheLogOfAFailure(t *testing.T) {
	containerd := node.Containerd(t)
	c := containerd.Run(t, command("mptcp"))
	node.WaitCount(t, 0, c.Log)
	var output bytes.Buffer
	log := logrus.New()
	log.SetOutput(&output)
	log.SetLevel(logrus.DebugLevel)
	service := checkpoint.New(checkpoint.Config{Runtime: containerd.Runtime, Images: containerd.Images, Criu: "criu", Version: "test", State: t.TempDir(), Log: log})
	defer service.Drain(context.Background())
	_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: location(t)})
	details := status.Convert(err).Details()
	if len(details) != 1 {
		t.Fatalf("error is %v, with details %v; want one", err, details)
	}
	if end := details[0].(*errdetails.DebugInfo).GetStackEntries(); len(end) != 20 || !strings.Contains(end[19], "Dumping FAILED") {
		t.Errorf("the end of the log is %q", end)
	}
	for _, line := range []string{"Version: ", "Dumping processes (pid: ", "Unsupported proto 262", "Dumping FAILED"} {
		if n := strings.Count(output.String(), line); n < 1 {
			t.Errorf("crishim's log lacks %q", line)
		}
	}
}

// What CRIU dumps only if it is told how, and a runtime restores without being told anything. The workload looks by itself whether all is
// as it was.
func TestWithinTheLimits(t *testing.T) {
	for name, spec := range map[string]node.Spec{
		"deleted file with another name":               command("link", "/tmp/name"),
		"deleted file with another name, in /dev/shm":  command("link", "/dev/shm/name"),
		"deleted file with another name, of the image": command("link", "/bin/name"),
		"deleted file":                        command("deleted", strconv.Itoa(64<<20)),
		"inotify watch on the image":          command("inotify", "/root"),
		"inotify watch on a new directory":    command("inotify", "/tmp/new/directory"),
		"inotify watch on the root directory": command("inotify", "/"),
		"System V shared memory":              command("sysv-shm"),
		// What crun 1.24 and later mounts over the directories among them is not what it did before.
		"masked files and directories": changed(count(), func(c *runtimeapi.ContainerConfig) {
			c.Linux.SecurityContext.MaskedPaths = []string{"/proc/acpi", "/proc/keys", "/proc/timer_list", "/sys/firmware"}
		}),
	} {
		for _, runtime := range []string{"runc", "crun"} {
			t.Run(name+"/"+runtime, func(t *testing.T) {
				containerd, crishim := serve(t)
				spec.Handler = runtime
				c := containerd.Run(t, spec)
				node.WaitCount(t, 1, c.Log)
				path := location(t)
				checkAllows(t, containerd, c.ID, path)
				if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
					t.Fatal(err)
				}
				node.WaitMore(t, c.Log)
				restoreHere(t, path)
				if left, err := c.Exec(t.Context(), "/bin/sh", "-c", "ls -a / /bin /tmp /dev/shm"); err != nil || strings.Contains(left, "link_remap") {
					t.Errorf("the original container is left with %v %s", err, left)
				}
				for name := range members(t, path) {
					if strings.HasPrefix(name, "irmap") { // what CRIU was told of watches
						t.Errorf("%s is in the archive", name)
					}
				}
			})
		}
	}
}

// An administrator can have a datagram socket dumped that is connected to one outside, where its peer is there on restore.
func TestADatagramSocketWithAPeerOutside(t *testing.T) {
	containerd, crishim := serve(t)
	makeVolume(t)
	peer, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: volume + "/socket", Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer peer.Close()
	const config = "/etc/criu/runc.conf"
	if err := os.MkdirAll(filepath.Dir(config), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(config, []byte("ext-unix-sk\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	defer os.Remove(config)
	hostNetwork := &runtimeapi.NamespaceOption{Pid: runtimeapi.NamespaceMode_CONTAINER, Network: runtimeapi.NamespaceMode_NODE}
	for _, runtime := range []string{"runc", "crun"} {
		t.Run(runtime, func(t *testing.T) {
			spec := inVolume(running(namespaces(hostNetwork), command("unix", "unixgram", volume+"/socket")))
			spec.Handler = runtime
			c := containerd.Run(t, spec)
			node.WaitCount(t, 0, c.Log)
			path := location(t)
			if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
				t.Fatal(err)
			}
			node.WaitMore(t, c.Log)
			restoreHere(t, path)
		})
	}
}

// restoreHere restores an archive, and waits until its workload goes on.
func restoreHere(t *testing.T, path string) {
	t.Helper()
	archive, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	machine := restore.Local()
	machine.Volumes = map[string]string{volume: volume}
	restored, err := restore.Archive(t.Context(), machine, archive, node.WorkloadImage)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := restored.Remove(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	node.WaitCount(t, 0, restored.Output)
	node.WaitMore(t, restored.Output)
}

func makeVolume(t *testing.T) {
	t.Helper()
	if err := os.MkdirAll(volume, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(volume); err != nil {
			t.Error(err)
		}
	})
}

// documentedLimit is a row of docs/limits.md.
type documentedLimit struct{ code, words string }

func readLimits(t *testing.T) map[string]documentedLimit {
	t.Helper()
	content, err := os.ReadFile("../../docs/limits.md")
	if err != nil {
		t.Fatal(err)
	}
	rows := make(map[string]documentedLimit)
	for line := range strings.Lines(string(content)) {
		cells := strings.Split(line, " | ")
		name, isRow := strings.CutPrefix(cells[0], "| ")
		if !isRow || len(cells) < 3 || cells[1] == "code" {
			continue
		}
		rows[name] = documentedLimit{cells[1], strings.TrimSuffix(strings.TrimSpace(cells[2]), " |")}
	}
	return rows
}

func count() node.Spec { return node.Spec{} }

func command(kind ...string) node.Spec {
	return node.Spec{Command: append([]string{"/bin/workload", "limit"}, kind...)}
}

func changed(spec node.Spec, change func(*runtimeapi.ContainerConfig)) node.Spec {
	spec.Container = change
	return spec
}

func privileged(spec node.Spec) node.Spec {
	spec.Pod = func(p *runtimeapi.PodSandboxConfig) { p.Linux.SecurityContext.Privileged = true }
	return changed(spec, func(c *runtimeapi.ContainerConfig) { c.Linux.SecurityContext.Privileged = true })
}

// running gives a pod another program than the workload's count.
func running(spec node.Spec, program node.Spec) node.Spec {
	spec.Command = program.Command
	return spec
}

func inVolume(spec node.Spec, propagation ...runtimeapi.MountPropagation) node.Spec {
	mount := &runtimeapi.Mount{HostPath: volume, ContainerPath: volume}
	if len(propagation) > 0 {
		mount.Propagation = propagation[0]
	}
	spec.Mounts = []*runtimeapi.Mount{mount}
	return spec
}

// listen accepts connections to a unix socket.
func listen(t *testing.T, path string) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	accepted := make(chan []net.Conn, 1)
	go func() {
		var open []net.Conn
		for {
			conn, err := listener.Accept()
			if err != nil {
				accepted <- open
				return
			}
			open = append(open, conn)
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		for _, conn := range <-accepted {
			conn.Close()
		}
	})
}

// makeVolumeShared makes mounts of the node below the volume appear in containers.
func makeVolumeShared(t *testing.T) {
	t.Helper()
	if err := unix.Mount(volume, volume, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(volume, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("", volume, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
}

func mountInVolume(t *testing.T, _ *node.Container) {
	t.Helper()
	later := volume + "/later"
	if err := os.Mkdir(later, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount(t.TempDir(), later, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(later, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

func makeVolumeImmutable(t *testing.T, _ *node.Container) {
	t.Helper()
	const immutable = 0x10 // FS_IMMUTABLE_FL
	dir, err := os.Open(volume)
	if err != nil {
		t.Fatal(err)
	}
	flags, err := unix.IoctlGetUint32(int(dir.Fd()), unix.FS_IOC_GETFLAGS)
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.IoctlSetPointerInt(int(dir.Fd()), unix.FS_IOC_SETFLAGS, int(flags|immutable)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		defer dir.Close()
		if err := unix.IoctlSetPointerInt(int(dir.Fd()), unix.FS_IOC_SETFLAGS, int(flags)); err != nil {
			t.Error(err)
		}
	})
}

// trace is a debugger that does nothing.
func trace(t *testing.T, c *node.Container) {
	t.Helper()
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	started, end, ended := make(chan error), make(chan struct{}), make(chan error)
	go func() {
		runtime.LockOSThread() // it is a thread that traces
		defer runtime.UnlockOSThread()
		started <- unix.PtraceSeize(pid)
		<-end
		err := unix.PtraceInterrupt(pid)
		if err == nil {
			_, err = unix.Wait4(pid, nil, unix.WALL, nil)
		}
		if err == nil {
			err = unix.PtraceDetach(pid)
		}
		ended <- err
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		close(end)
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
}

func waitUntilExited(t *testing.T, c *node.Container) {
	t.Helper()
	for state := runtimeapi.ContainerState_CONTAINER_RUNNING; state != runtimeapi.ContainerState_CONTAINER_EXITED; {
		var err error
		if state, err = c.State(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}

func pause(t *testing.T, c *node.Container) {
	t.Helper()
	ctr := func(verb string) error {
		out, err := exec.Command("ctr", "-n", "k8s.io", "tasks", verb, c.ID).CombinedOutput()
		if err != nil {
			return fmt.Errorf("%s: %w: %s", verb, err, out)
		}
		return nil
	}
	if err := ctr("pause"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := ctr("resume"); err != nil {
			t.Error(err)
		}
	})
}

// fakeKata is a runtime that says of its containers that Kata runs them, which cannot be had here.
type fakeKata struct {
	runtimeapi.RuntimeServiceClient
}

func (f fakeKata) ContainerStatus(ctx context.Context, request *runtimeapi.ContainerStatusRequest, options ...grpc.CallOption) (*runtimeapi.ContainerStatusResponse, error) {
	response, err := f.RuntimeServiceClient.ContainerStatus(ctx, request, options...)
	if err == nil {
		response.Info["info"] = strings.ReplaceAll(response.Info["info"], "io.containerd.runc.v2", "io.containerd.kata.v2")
	}
	return response, err
}

// criuBehind makes a criu that is started by a command, with its own command line behind.
func criuBehind(t *testing.T, command string) string {
	t.Helper()
	criu, err := exec.LookPath("criu")
	if err != nil {
		t.Fatal(err)
	}
	script := filepath.Join(t.TempDir(), "criu")
	if err := os.WriteFile(script, []byte("#!/bin/sh\nexec "+command+" "+criu+` "$@"`+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return script
}

// underFilter is the argument by which this test's binary runs a command under a seccomp filter that allows everything.
const underFilter = "under-filter"

func underFilterMain(command []string) error {
	runtime.LockOSThread()
	allow := unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW}
	program := unix.SockFprog{Len: 1, Filter: &allow}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return fmt.Errorf("set seccomp filter: %w", err)
	}
	return syscall.Exec(command[0], command, os.Environ())
}
