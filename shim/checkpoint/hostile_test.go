package checkpoint_test

import (
	"bytes"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// state describes what is below a directory, contents included.
func state(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := entry.Info()
		if err != nil {
			return err
		}
		fmt.Fprintln(&b, path, info.Mode())
		if info.Mode().IsRegular() {
			content, err := os.ReadFile(path)
			fmt.Fprintf(&b, "%s %.80q %v\n", info.ModTime(), content, err)
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	for _, err := range errs {
		if err != nil {
			t.Fatal(err)
		}
	}
}

// Whoever may ask for checkpoints must not be able to have them put where they do harm. Whatever the location is, nothing that is
// there changes.
func TestHostileLocations(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	directory := func(dir, name string, mode os.FileMode, uid, gid int) string {
		path := filepath.Join(dir, name)
		must(t, os.Mkdir(path, 0o700), os.Chown(path, uid, gid), os.Chmod(path, mode))
		return path
	}
	mount := func(dir string, flags uintptr, options string) string {
		path := directory(dir, "mount", 0o755, 0, 0)
		must(t, unix.Mount("tmpfs", path, "tmpfs", flags, "mode=0755,"+options))
		t.Cleanup(func() { must(t, unix.Unmount(path, 0)) })
		return path
	}
	there := func(make func(path string) error) func(dir string) string {
		return func(dir string) string {
			path := dir + "/there.tar"
			must(t, make(path))
			return path
		}
	}
	for _, test := range []struct {
		name string
		code codes.Code
		make func(dir string) string // returns the location
	}{
		{"empty", codes.InvalidArgument, func(string) string { return "" }},
		{"relative", codes.InvalidArgument, func(string) string { return "a.tar" }},
		{"dot dot", codes.InvalidArgument, func(dir string) string { return dir + "/../" + filepath.Base(dir) + "/a.tar" }},
		{"dot dot at the end", codes.InvalidArgument, func(dir string) string { return dir + "/.." }},
		{"slash at the end", codes.InvalidArgument, func(dir string) string { return dir + "/a.tar/" }},
		{"NUL", codes.InvalidArgument, func(dir string) string { return dir + "/a.tar\x00b" }},
		{"newline", codes.InvalidArgument, func(dir string) string { return dir + "/a.tar\nlevel=info msg=forged" }},
		{"long path", codes.InvalidArgument, func(dir string) string { return dir + strings.Repeat("/a", unix.PathMax/2) }},
		{"long name", codes.InvalidArgument, func(dir string) string { return dir + "/" + strings.Repeat("a", 256) }},
		{"name of a staging directory", codes.InvalidArgument, func(dir string) string { return dir + "/.crishim-A" }},

		{"a file is there", codes.AlreadyExists, there(func(path string) error { return os.WriteFile(path, []byte("precious"), 0o644) })},
		{"a hard link is there", codes.AlreadyExists, there(func(path string) error {
			must(t, os.WriteFile(path+".first", []byte("precious"), 0o644))
			return os.Link(path+".first", path)
		})},
		{"a directory is there", codes.AlreadyExists, there(func(path string) error { return os.Mkdir(path, 0o700) })},
		{"a FIFO is there", codes.AlreadyExists, there(func(path string) error { return unix.Mkfifo(path, 0o600) })},
		{"a socket is there", codes.AlreadyExists, there(func(path string) error {
			return unix.Mknod(path, unix.S_IFSOCK|0o600, 0)
		})},
		{"a device is there", codes.AlreadyExists, there(func(path string) error {
			return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3)))
		})},
		{"a link is there", codes.AlreadyExists, there(func(path string) error { return os.Symlink("/etc/passwd", path) })},
		{"a dangling link is there", codes.AlreadyExists, there(func(path string) error { return os.Symlink("nowhere", path) })},

		{"no directory", codes.InvalidArgument, func(dir string) string { return dir + "/none/a.tar" }},
		{"below a file", codes.InvalidArgument, func(dir string) string {
			must(t, os.WriteFile(dir+"/file", []byte("precious"), 0o600))
			return dir + "/file/a.tar"
		}},
		{"another's directory", codes.InvalidArgument, func(dir string) string { return directory(dir, "d", 0o755, 1000, 0) + "/a.tar" }},
		{"another's directory on the way", codes.InvalidArgument, func(dir string) string {
			return directory(directory(dir, "d", 0o755, 1000, 0), "e", 0o755, 0, 0) + "/a.tar"
		}},
		{"a directory that a group can write to", codes.InvalidArgument, func(dir string) string { return directory(dir, "d", 0o775, 0, 50) + "/a.tar" }},
		{"a directory that all can write to", codes.InvalidArgument, func(dir string) string { return directory(dir, "d", 0o777, 0, 0) + "/a.tar" }},
		{"another's link on the way", codes.InvalidArgument, func(dir string) string {
			directory(dir, "real", 0o755, 0, 0)
			must(t, os.Symlink("real", dir+"/d"), os.Lchown(dir+"/d", 1000, 0))
			return dir + "/d/a.tar"
		}},
		{"a link in a sticky directory", codes.InvalidArgument, func(dir string) string {
			sticky := directory(dir, "d", 0o777|os.ModeSticky, 0, 0)
			must(t, os.Symlink("..", sticky+"/e"))
			return sticky + "/e/a.tar"
		}},

		{"full file system", codes.ResourceExhausted, func(dir string) string {
			path := mount(dir, 0, "size=64k")
			must(t, os.WriteFile(path+"/other", bytes.Repeat([]byte("precious"), 8<<10), 0o600))
			return path + "/a.tar"
		}},
		{"file system without inodes", codes.ResourceExhausted, func(dir string) string { return mount(dir, 0, "nr_inodes=2") + "/a.tar" }},
		{"read-only file system", codes.FailedPrecondition, func(dir string) string { return mount(dir, unix.MS_RDONLY, "size=1m") + "/a.tar" }},
		{"noexec file system", codes.OK, func(dir string) string {
			return mount(dir, unix.MS_NOEXEC|unix.MS_NODEV|unix.MS_NOSUID, "size=64m") + "/a.tar"
		}},
		{"root's link on the way", codes.OK, func(dir string) string {
			directory(dir, "real", 0o755, 0, 0)
			must(t, os.Symlink("real", dir+"/d"))
			return dir + "/d/a.tar"
		}},
	} {
		t.Run(test.name, func(t *testing.T) {
			dir := filepath.Dir(location(t))
			must(t, os.Chmod(dir, 0o755))
			path := test.make(dir)
			before := state(t, dir)
			_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
			if status.Code(err) != test.code {
				t.Fatalf("error is %v, want %s", err, test.code)
			}
			if err == nil {
				must(t, os.Remove(path))
				return
			}
			t.Log(err)
			if strings.ContainsAny(err.Error(), "\n\x00") {
				t.Errorf("the answer is not a line: %q", err)
			}
			if after := state(t, dir); after != before {
				t.Errorf("there was\n%s\nnow there is\n%s", before, after)
			}
		})
	}
	if _, err := os.Stat("a.tar"); err == nil {
		t.Error("there is an archive in the working directory")
	}
	node.WaitMore(t, c.Log)
}

// What changes at the location while the archive is made keeps it from appearing, and is not touched.
func TestALocationThatChangesMeanwhile(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: []string{"/bin/workload", "memory", "256"}})
	node.WaitCount(t, 0, c.Log)
	for name, test := range map[string]struct {
		code   codes.Code
		change func(path string) error
	}{
		"a file appears":           {codes.AlreadyExists, func(path string) error { return os.WriteFile(path, []byte("precious"), 0o644) }},
		"a link appears":           {codes.AlreadyExists, func(path string) error { return os.Symlink("elsewhere", path) }},
		"the directory is renamed": {codes.InvalidArgument, func(path string) error { return os.Rename(filepath.Dir(path), filepath.Dir(path)+"-old") }},
		"another one takes its name": {codes.InvalidArgument, func(path string) error {
			dir := filepath.Dir(path)
			if err := os.Rename(dir, dir+"-old"); err != nil {
				return err
			}
			return os.Mkdir(dir, 0o700)
		}},
		"a link takes its name": {codes.InvalidArgument, func(path string) error {
			dir := filepath.Dir(path)
			if err := os.Rename(dir, dir+"-old"); err != nil {
				return err
			}
			if err := os.Mkdir(dir+"-other", 0o700); err != nil {
				return err
			}
			return os.Symlink(filepath.Base(dir)+"-other", dir)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			outer := filepath.Dir(location(t))
			path := filepath.Join(outer, "d", "checkpoint-test.tar")
			must(t, os.Mkdir(filepath.Dir(path), 0o700))
			held, ended := node.HoldCheckpoint(t, filepath.Dir(path), path, func() error {
				_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
				return err
			})
			must(t, test.change(path))
			held.Release()
			if err := <-ended; status.Code(err) != test.code {
				t.Errorf("error is %v, want %s", err, test.code)
			} else {
				t.Log(err)
			}
			left := state(t, outer)
			if strings.Contains(left, ".crishim-") || strings.Contains(left, ".tar") != (test.code == codes.AlreadyExists) ||
				name == "a file appears" && !strings.Contains(left, `"precious"`) {
				t.Errorf("there is\n%s", left)
			}
		})
	}
	node.WaitMore(t, c.Log)
}

// A pod that can write to the node's log directory can put anything in the place of its log.
func TestALogThatIsReplaced(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{})
	node.WaitCount(t, 0, c.Log)
	const secret = "/data/secret"
	must(t, os.WriteFile(secret, []byte("the node's secret"), 0o600))
	defer os.Remove(secret)
	for name, put := range map[string]func(path string) error{
		"link":      func(path string) error { return os.Symlink(secret, path) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
		"FIFO":      func(path string) error { return unix.Mkfifo(path, 0o600) },
		// Its being opened would start a watchdog, if there were one, that reboots the machine.
		"device": func(path string) error { return unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(10, 130))) },
		"socket": func(path string) error {
			listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
			if err == nil {
				listener.SetUnlinkOnClose(false)
				err = listener.Close()
			}
			return err
		},
	} {
		t.Run(name, func(t *testing.T) {
			must(t, os.Rename(c.LogPath, c.LogPath+".kept"), put(c.LogPath))
			path := location(t)
			_, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
			must(t, os.Remove(c.LogPath), os.Rename(c.LogPath+".kept", c.LogPath))
			if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), c.LogPath) || !strings.Contains(err.Error(), "find out who has put it there") {
				t.Errorf("error is %v, want FailedPrecondition with the log's path", err)
			}
			unharmed(t, c, path)
		})
	}
}

// The annotation org.criu.config has runc and crun give CRIU a file of options, of the pod's choice. crishim does not.
func TestTheAnnotationForCRIUIsIgnored(t *testing.T) {
	containerd, crishim := serve(t)
	options := "/data/criu-options"
	must(t, os.WriteFile(options, []byte("leave-stopped\nno-such-option\n"), 0o600))
	defer os.Remove(options)
	c := containerd.Run(t, node.Spec{
		Pod:       func(p *runtimeapi.PodSandboxConfig) { p.Annotations = map[string]string{"org.criu.config": options} },
		Container: func(c *runtimeapi.ContainerConfig) { c.Annotations = map[string]string{"org.criu.config": options} },
	})
	node.WaitCount(t, 0, c.Log)
	path := location(t)
	if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
		t.Errorf("the annotation matters: %v", err)
	}
	node.WaitMore(t, c.Log)
}

// syncBuffer is a buffer that several goroutines write to.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *syncBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *syncBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// An archive has a container's secrets; crishim's log, at any level, and its answers have none: nothing of the environment, of memory or of
// command lines beyond the names of processes.
func TestSecretsStayOutOfTheLog(t *testing.T) {
	const inEnvironment, inArguments = "environment-4d1f8a", "arguments-93b7c2"
	containerd := node.Containerd(t)
	var output syncBuffer
	log := logrus.New()
	log.SetOutput(&output)
	log.SetLevel(logrus.TraceLevel)
	service := serviceWith(t, containerd, "criu", func(c *checkpoint.Config) { c.Log = log })
	// What it keeps in memory nobody else knows; it tells it to its own log.
	const script = `read -r id </proc/sys/kernel/random/uuid; echo keeps memory-$id; n=0; while true; do n=$((n+1)); echo count $n; sleep 1; done`
	for _, test := range []struct {
		name, script, harm string
		code               codes.Code
		logged             string
	}{
		{name: "a success", script: script, logged: "checkpoint written"},
		{name: "a failure of crishim's", script: script, harm: ": >/tmp/.wh.a", code: codes.FailedPrecondition, logged: "criu's log: "},
		{name: "a failure of CRIU's", script: "/bin/workload limit mptcp & " + script, code: codes.FailedPrecondition, logged: "Unsupported proto 262"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := containerd.Run(t, node.Spec{
				Command: []string{"/bin/sh", "-c", test.script, "sh", inArguments},
				Container: func(c *runtimeapi.ContainerConfig) {
					c.Envs = []*runtimeapi.KeyValue{{Key: "PASSWORD", Value: []byte(inEnvironment)}}
				},
			})
			node.WaitCount(t, 3, c.Log)
			if test.harm != "" {
				if _, err := c.Exec(t.Context(), "/bin/sh", "-c", test.harm); err != nil {
					t.Fatal(err)
				}
			}
			text, err := c.Log()
			must(t, err)
			inMemory := regexp.MustCompile(`memory-[0-9a-f-]{36}`).FindString(text)
			if inMemory == "" {
				t.Fatalf("the container does not tell its secret: %q", text)
			}
			path := location(t)
			_, err = service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path})
			if status.Code(err) != test.code {
				t.Fatalf("error is %v, want %s", err, test.code)
			}
			logged := output.String()
			if !strings.Contains(logged, test.logged) {
				t.Errorf("the log lacks %q", test.logged)
			}
			secrets := []string{inEnvironment, inArguments, strings.TrimPrefix(inMemory, "memory-")}
			for _, secret := range secrets {
				if at := strings.Index(logged, secret); at >= 0 {
					t.Errorf("the log has %q: %.300q", secret, logged[max(0, at-100):])
				}
				if answer := fmt.Sprint(status.Convert(err).Proto()); strings.Contains(answer, secret) {
					t.Errorf("the answer has %q: %s", secret, answer)
				}
			}
			if err != nil {
				return
			}
			// They are where they are looked for: the archive has them all.
			archive, err := os.ReadFile(path)
			must(t, err)
			for _, secret := range secrets {
				if !bytes.Contains(archive, []byte(secret)) {
					t.Errorf("the archive lacks %q", secret)
				}
			}
		})
	}
}
