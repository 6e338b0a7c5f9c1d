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

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
)

// Check looks whether this node can make checkpoints, and whether a container, if one is named, can be checkpointed to a location, which may
// be empty. It freezes nothing, and uses what a checkpoint uses: what it calls a failure makes one fail.
func (s *Service) Check(ctx context.Context, id, location string) *crishimv1.CheckResponse {
	node, own := &findings{}, &findings{}
	dir := checkpointsDir()
	if location != "" {
		dir = filepath.Dir(location)
	}
	features := s.checkCriu(ctx, node)
	checkKernel(node)
	checkCapabilities(node)
	s.checkRuntime(ctx, node)
	checkCgroup(node)
	room, method := s.checkDirectory(ctx, node, dir)
	checkSecurityModules(node)
	s.checkState(node)
	if id != "" {
		if location != "" {
			own.add("location", validateLocation(location, s.config().Directories), location+" is free", "")
		}
		s.checkContainer(ctx, own, id, features, room, method)
	}
	return &crishimv1.CheckResponse{Node: node.all, Container: own.all}
}

// findings are what has been looked at, in this order.
type findings struct{ all []*crishimv1.Finding }

func (f *findings) put(name string, state crishimv1.State, message, advice string) {
	f.all = append(f.all, &crishimv1.Finding{Name: name, State: state, Message: oneLine(message, maxMessage), Advice: oneLine(advice, maxMessage)})
}

func (f *findings) ok(name, format string, args ...any) {
	f.put(name, crishimv1.State_STATE_OK, fmt.Sprintf(format, args...), "")
}

func (f *findings) warn(name, message, advice string) {
	f.put(name, crishimv1.State_STATE_WARNING, message, advice)
}

func (f *findings) fail(name, message, advice string) {
	f.put(name, crishimv1.State_STATE_FAILURE, message, advice)
}

// add is a failure if there is an error, which says what to do, and otherwise well.
func (f *findings) add(name string, err error, well, advice string) {
	if err != nil {
		f.fail(name, err.Error(), advice)
		return
	}
	f.ok(name, "%s", well)
}

func (s *Service) checkCriu(ctx context.Context, f *findings) criu.Features {
	features, err := s.Probe(ctx)
	if err != nil {
		f.fail("CRIU", err.Error(), "")
		return features
	}
	f.ok("CRIU", "%s at %s", features.VersionString(), features.Path)
	if len(features.Missing) > 0 {
		f.warn("criu check", strings.Join(features.Missing, "; "), "containers that need it cannot be dumped, others can")
	}
	return features
}

func checkKernel(f *findings) {
	var name unix.Utsname
	_ = unix.Uname(&name) // it has no way to fail
	release := unix.ByteSliceToString(name.Release[:])
	fd, err := unix.Openat2(unix.AT_FDCWD, "/", &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS})
	if err == nil {
		unix.Close(fd)
		if fd, err = unix.PidfdOpen(os.Getpid(), 0); err == nil {
			unix.Close(fd)
		}
	}
	if err != nil {
		f.fail("kernel", fmt.Sprintf("Linux %s has no openat2 or no pidfds (%v)", release, err), "5.10 or later is needed, and no filter of system calls on crishim")
		return
	}
	f.ok("kernel", "Linux %s", release)
	status, err := os.ReadFile("/proc/self/status")
	if err == nil && !strings.Contains(string(status), "\nSeccomp:\t0\n") {
		f.warn("seccomp", "crishim runs under a filter of system calls: containers with one of their own cannot be dumped",
			"use the shipped unit, or remove what filters system calls from yours, such as SystemCallFilter=")
	}
}

// checkCapabilities looks at the effective ones of this process, which its helpers and criu inherit.
func checkCapabilities(f *findings) {
	var data [2]unix.CapUserData
	if err := unix.Capget(&unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}, &data[0]); err != nil {
		f.fail("capabilities", err.Error(), "")
		return
	}
	has := func(n int) bool { return data[n/32].Effective&(1<<(n%32)) != 0 }
	var missing []string
	for _, c := range []struct {
		n    int
		name string
	}{
		{unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}, {unix.CAP_DAC_OVERRIDE, "CAP_DAC_OVERRIDE"},
		{unix.CAP_DAC_READ_SEARCH, "CAP_DAC_READ_SEARCH"}, {unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_CHOWN, "CAP_CHOWN"},
	} {
		if !has(c.n) {
			missing = append(missing, c.name)
		}
	}
	switch {
	case len(missing) > 0:
		f.fail("capabilities", "crishim lacks "+strings.Join(missing, ", "), "run it as root, without a bounding set")
	case !has(unix.CAP_SYS_RESOURCE):
		f.warn("capabilities", "crishim lacks CAP_SYS_RESOURCE: only processes of root can be dumped", "run it as root, without a bounding set")
	default:
		f.ok("capabilities", "all that CRIU needs")
	}
}

func (s *Service) checkRuntime(ctx context.Context, f *findings) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	answer, err := s.config().Runtime.Version(ctx, &runtimeapi.VersionRequest{})
	if err != nil {
		f.fail("runtime", "it does not answer: "+status.Convert(err).Message(), "see that it runs, and that crishim has its socket (--runtime-endpoint)")
		return
	}
	f.ok("runtime", "%s %s", answer.GetRuntimeName(), answer.GetRuntimeVersion())
}

func checkCgroup(f *findings) {
	for _, freezer := range []struct{ path, words string }{
		{"/sys/fs/cgroup/cgroup.controllers", "version 2, whose freezer each cgroup has"},
		{"/sys/fs/cgroup/freezer", "version 1, with its freezer"},
	} {
		if exists(freezer.path) {
			f.ok("cgroup", "%s", freezer.words)
			return
		}
	}
	f.fail("cgroup", "there is no freezer at /sys/fs/cgroup", "mount cgroup version 2 there, or the freezer of version 1")
}

// checkDirectory looks at the file system of a directory. room and method are for the container, nil where they are not known.
func (s *Service) checkDirectory(ctx context.Context, f *findings, dir string) (*room, *archive.Method) {
	location, err := archive.Directory(dir)
	if errors.Is(err, os.ErrNotExist) && dir == checkpointsDir() {
		f.warn("directory", dir+" is not there", "the kubelet makes it, or crishim checkpoint does; for another one there is --location")
		return nil, nil
	}
	if err != nil {
		f.fail("directory", err.Error(), "")
		return nil, nil
	}
	defer location.Close()
	method, err := location.Method()
	switch {
	case err != nil:
		f.fail("directory", err.Error(), "")
		return nil, nil
	case method.Fast():
		f.ok("directory", "%s is on %s: %s", dir, location.FileSystem(), method)
	default:
		f.warn("directory", fmt.Sprintf("%s is on %s: %s", dir, location.FileSystem(), method), "")
	}
	start, err := location.Room()
	if err != nil {
		f.fail("room", err.Error(), "")
		return nil, nil
	}
	reserve, err := s.reserveAt(ctx, location, s.config().Bounds)
	if err != nil {
		f.fail("room", err.Error(), "")
		return nil, nil
	}
	r := &room{place: dir, reserve: reserve, start: start}
	if err := r.check(0, need{inodes: 64}); err != nil {
		f.fail("room", err.Error(), "")
	} else {
		f.ok("room", "%s for archives: of %s %s are free, of which %s stay so (%s)",
			size(start.Free-reserve.GetBytes()), size(start.Total), size(start.Free), size(reserve.GetBytes()), reserve.GetBytesOf())
	}
	return r, &method
}

// checkSecurityModules tells what the node has. Whether a policy forbids something of a dump, only the dump can tell.
func checkSecurityModules(f *findings) {
	const advice = "if dumps fail with EACCES or EPERM, look for denials of criu in the audit log"
	if mode, err := os.ReadFile("/sys/fs/selinux/enforce"); err == nil {
		if strings.TrimSpace(string(mode)) == "1" {
			f.warn("SELinux", "it is enforcing: its policy has to let criu trace containers", advice)
		} else {
			f.ok("SELinux", "it is permissive")
		}
	}
	profile, _ := os.ReadFile("/proc/self/attr/apparmor/current") // without AppArmor there is none
	switch label := strings.TrimSpace(string(profile)); label {
	case "":
	case "unconfined":
		f.ok("AppArmor", "crishim is unconfined")
	default:
		f.warn("AppArmor", "crishim is confined by "+label, advice)
	}
}

func (s *Service) checkState(f *findings) {
	if err := s.Repair(); err != nil {
		f.fail("state", err.Error(), "")
		return
	}
	if err := unix.Access(s.config().State, unix.W_OK); err != nil {
		f.fail("state", refusal(&os.PathError{Op: "write", Path: s.config().State, Err: err}).Error(), "")
		return
	}
	f.ok("state", "records are kept in %s", s.config().State)
}

// checkContainer looks at one container. features, room and method are the node's, as far as they are known.
func (s *Service) checkContainer(ctx context.Context, f *findings, id string, features criu.Features, room *room, method *archive.Method) {
	c, err := container.Describe(ctx, s.config().Runtime, id)
	if err != nil {
		f.fail("container", status.Convert(toStatus(err)).Message(), "")
		return
	}
	name := s.nameOf(ctx, c.Status.GetId(), c.Status.GetLabels(), c.Status.GetMetadata())
	// A checkpoint in flight freezes it, too, and may have begun meanwhile: so it is asked after the look.
	err = c.VerifyRunning()
	s.mu.Lock()
	reason := s.inFlight[c.Status.GetId()]
	s.mu.Unlock()
	switch {
	case reason != nil:
		f.warn("container", reason.Error(), "check it again when that has ended")
		return
	case err != nil:
		f.fail("container", err.Error(), "")
		return
	}
	job, err := newJob("/", features, c, "", archive.Origin{})
	if err != nil {
		f.fail("container", err.Error(), "")
		return
	}
	if layer := job.GetContainer().GetLayer(); layer != nil {
		layer.Size = s.layerSize(ctx, c.Status.GetId())
	}
	f.ok("container", "%s/%s/%s runs, by %s, as process %d", cmp.Or(name.namespace, "?"), cmp.Or(name.pod, "?"), name.container, c.Runtime, c.Process.Pid)

	target := criuContainer(job.GetContainer())
	obstacles, err := target.Obstacles(ctx)
	if err != nil {
		f.fail("processes", err.Error(), "")
	}
	for _, o := range obstacles {
		message := o.Cause
		if o.Place != "" {
			message = o.Place + ": " + message
		}
		f.fail(o.Limit.Name, message, o.Limit.Advice)
	}
	if err == nil && len(obstacles) == 0 {
		f.ok("processes", "nothing that can be seen from outside stands in the way; what only CRIU can see it tells when it dumps")
	}
	if features.Path != "" {
		s.checkNetwork(ctx, f, target, features)
	}
	s.checkNeed(f, job.GetContainer(), room, method)
}

func (s *Service) checkNetwork(ctx context.Context, f *findings, target criu.Container, features criu.Features) {
	connected, lockable, err := target.Connected(ctx, features.Path)
	switch {
	case err != nil:
		f.fail("network", err.Error(), "")
	case connected && s.config().RefuseTCP:
		f.fail("network", "it has an established TCP connection, and checkpoint.tcp refuses those", "close it first, or set that to established")
	case connected && !lockable:
		f.fail("network", "it has an established TCP connection, and there is nothing to lock its network with", "install iptables, or a criu with nftables")
	case connected:
		f.warn("network", "it has an established TCP connection: the network of its whole pod is locked while it is frozen", "")
	default:
		f.ok("network", "no established TCP connection: it need not be locked")
	}
}

// checkNeed says how large an archive would be, whether there is room, and how long it would take.
func (s *Service) checkNeed(f *findings, c *crishimv1.Container, room *room, method *archive.Method) {
	need, err := estimate(c)
	if err != nil {
		f.fail("size", err.Error(), "")
		return
	}
	text := fmt.Sprintf("about %s: memory %s, writable layer %s, /dev/shm and log %s", size(need.bytes()),
		size(need.bytes()-need.layer-need.shm-need.log), size(need.layer), size(need.shm+need.log))
	if room == nil {
		f.ok("size", "%s", text)
	} else {
		f.add("size", room.check(method.Extra(s.config().Archive, need.staged(), need.layer), need), text+"; there is room", "")
	}
	text, known := s.duration(need)
	if bound := s.config().Bounds.MaxFrozen; known.frozen > bound && bound > 0 {
		f.warn("time", text, fmt.Sprintf("checkpoint.max_frozen is %s, and a dump that takes longer is rolled back: raise it", bound))
		return
	}
	f.ok("time", "%s", text)
}

// taken is how long a container stood still, and how long all of a checkpoint took.
type taken struct{ frozen, all time.Duration }

// duration estimates how long a checkpoint takes: as long as the one of this node's history whose size is nearest, in proportion if that was
// smaller. It does not guess from one of another order of magnitude.
func (s *Service) duration(need need) (text string, about taken) {
	const comparable = 8
	want := max(float64(need.bytes()), 1<<20) // a smaller one takes no less
	var nearest *crishimv1.Checkpoint
	best := float64(comparable)
	for _, l := range s.history.List() {
		c := l.GetCheckpoint()
		if c.GetEnd() == nil || c.GetCode() != 0 || c.GetFrozenUs() == 0 {
			continue
		}
		is := max(float64(c.GetSize()), 1<<20)
		if ratio := max(is/want, want/is); ratio <= best { // of equals the latest
			best, nearest = ratio, c
		}
	}
	if nearest == nil {
		return "unknown: this node's history has no checkpoint of a comparable size", taken{}
	}
	factor := max(want/max(float64(nearest.GetSize()), 1<<20), 1)
	scale := func(d time.Duration) time.Duration {
		return time.Duration(float64(d) * factor).Round(10 * time.Millisecond)
	}
	about = taken{
		frozen: scale(time.Duration(nearest.GetFrozenUs()) * time.Microsecond),
		all:    scale(nearest.GetEnd().AsTime().Sub(nearest.GetBegin().AsTime())),
	}
	return fmt.Sprintf("frozen for about %s, done within about %s: an estimate, by checkpoint %s of %s", about.frozen, about.all, nearest.GetId(), size(nearest.GetSize())), about
}
