package shim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
)

func TestMain(m *testing.M) {
	// The daemon starts its own binary again as the helper, and here that is the test's.
	if len(os.Args) == 2 && os.Args[1] == checkpoint.HelperCommand {
		syscall.Exit(checkpoint.HelperMain()) // not by os.Exit, at which the race detector sleeps for a second
	}
	if os.Getenv("CRISHIM_TEST_SERVE") != "" {
		os.Exit(serveHandedOver())
	}
	os.Exit(m.Run())
}

func TestSocketPath(t *testing.T) {
	long := "/" + strings.Repeat("x", 107)
	for _, test := range []struct{ endpoint, want, err string }{
		{"unix:///run/a.sock", "/run/a.sock", ""},
		{"/run/a.sock", "/run/a.sock", ""},
		{"unix://run/a.sock", "", "an absolute path is needed"},
		{"a.sock", "", "an absolute path is needed"},
		{"", "", "an absolute path is needed"},
		{"tcp://127.0.0.1:1", "", "only unix sockets"},
		{"npipe:////./pipe/x", "", "only unix sockets"},
		{long[:107], long[:107], ""},
		{long, "", "longer than the 107 bytes"},
	} {
		got, err := socketPath(test.endpoint)
		if got != test.want || (err == nil) != (test.err == "") || (err != nil && !strings.Contains(err.Error(), test.err)) {
			t.Errorf("socketPath(%q) = %q, %v; want %q, %q", test.endpoint, got, err, test.want, test.err)
		}
	}
}

func TestListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "run", "crishim.sock")
	l, err := listen(t.Context(), "unix://"+path)
	if err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]os.FileMode{path: os.ModeSocket | 0o600, filepath.Dir(path): os.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s is %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	if _, err := listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "another process listens there") {
		t.Errorf("listening twice: %v", err)
	}

	// What a crishim that was killed leaves.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	l, err = listen(t.Context(), path)
	if err != nil {
		t.Fatalf("listen over a stale socket: %v", err)
	}
	l.Close()

	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := listen(t.Context(), path); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("listening over a file: %v", err)
	}
	if content, _ := os.ReadFile(path); string(content) != "precious" {
		t.Errorf("the file is now %q", content)
	}
}

// version asks for the version at a socket.
func version(t *testing.T, path string) error {
	t.Helper()
	conn := dial(t, path)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	_, err := runtimeapi.NewRuntimeServiceClient(conn).Version(ctx, &runtimeapi.VersionRequest{})
	return err
}

func dial(t *testing.T, path string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

func TestRunWithoutRuntimeAndCRIU(t *testing.T) {
	requireRoot(t)
	defer goleak.VerifyNone(t)
	dir := t.TempDir()
	path := filepath.Join(dir, "crishim.sock")
	stop := start(t, Config{Listen: path, RuntimeEndpoint: filepath.Join(dir, "absent.sock"), Criu: filepath.Join(dir, "criu")})
	if err := version(t, path); status.Code(err) != codes.Unavailable {
		t.Errorf("Version without a runtime gives %v, want Unavailable", err)
	}
	stop()
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket is still there: %v", err)
	}
}

// start runs the daemon until stop is called, and fails the test if it ends by itself or with an error.
func start(t *testing.T, config Config) (stop func()) {
	t.Helper()
	log := logrus.New()
	log.SetOutput(t.Output())
	config.Log = log
	config.State = t.TempDir()
	config.Shutdown = Shutdown{Checkpoints: 10 * time.Second, Calls: 5 * time.Second}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Run(ctx, config) }()
	for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(config.Listen); err == nil {
			break
		}
	}
	return func() {
		t.Helper()
		select {
		case err := <-ended:
			t.Errorf("ended by itself: %v", err)
			cancel()
			return
		default:
		}
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run gives %v after its end was asked for", err)
		}
	}
}

// The modes of socket and directory keep others out; their credentials do so where somebody has loosened those.
func TestOnlyRootMayConnect(t *testing.T) {
	requireRoot(t)
	dir, err := os.MkdirTemp("", "crishim-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "crishim.sock")
	defer start(t, Config{Listen: path, RuntimeEndpoint: filepath.Join(dir, "absent.sock"), Criu: filepath.Join(dir, "criu")})()
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	if err := connectAs(65534, path); !errors.Is(err, io.EOF) && !errors.Is(err, unix.ECONNRESET) {
		t.Errorf("somebody else's connection gives %v, want its end", err)
	}
	if err := connectAs(0, path); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("root's connection gives %v, want that crishim waits for its first word", err)
	}
}

// connectAs connects as another user and reads for half a second.
func connectAs(uid int, path string) error {
	result := make(chan error, 1)
	go func() {
		// Of this thread alone, which ends with the goroutine as it is never unlocked.
		runtime.LockOSThread()
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, uintptr(uid), uintptr(uid), uintptr(uid)); errno != 0 {
			result <- errno
			return
		}
		conn, err := net.Dial("unix", path)
		if err != nil {
			result <- err
			return
		}
		defer conn.Close()
		if err = conn.SetReadDeadline(time.Now().Add(500 * time.Millisecond)); err == nil {
			_, err = conn.Read(make([]byte, 1))
		}
		result <- err
	}()
	return <-result
}

func TestRunRefusesNonsense(t *testing.T) {
	for _, config := range []Config{
		{Listen: "/tmp/x.sock", RuntimeEndpoint: "tcp://127.0.0.1:1"},
		{Listen: "relative", RuntimeEndpoint: "/run/x.sock"},
	} {
		if err := Run(t.Context(), config); err == nil {
			t.Errorf("Run(%+v) gives no error", config)
		}
	}
}

// A socket from systemd outlives the daemon, and is taken whatever --listen says.
func TestSocketHandedOver(t *testing.T) {
	requireRoot(t)
	path := filepath.Join(t.TempDir(), "handed.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file, err := l.(*net.UnixListener).File()
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	// As systemd does it: the descriptors from 3 on, and the pid that they are meant for.
	cmd := exec.Command("/bin/sh", "-c", `LISTEN_PID=$$ exec "$0"`, os.Args[0])
	cmd.Env = append(os.Environ(), "CRISHIM_TEST_SERVE=1", "LISTEN_FDS=1")
	cmd.ExtraFiles = []*os.File{file}
	cmd.Stderr = t.Output()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if err := version(t, path); status.Code(err) != codes.Unavailable {
		t.Errorf("Version gives %v, want Unavailable: nothing but crishim answers so", err)
	}
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("serve: %v", err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the socket is gone with the daemon: %v", err)
	}
}

// serveHandedOver is the daemon that TestSocketHandedOver starts.
func serveHandedOver() int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	log := logrus.New()
	if err := Run(ctx, Config{Listen: "/nowhere/at/all", RuntimeEndpoint: "/nowhere/runtime.sock", Criu: "/nowhere/criu", Log: log}); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

func requireRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: peers other than root are refused")
	}
}
