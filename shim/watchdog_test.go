package shim

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"github.com/sirupsen/logrus/hooks/test"
	"go.uber.org/goleak"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// silent listens at a path, and does nothing more.
func silent(t *testing.T, path string) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
}

// rude closes each connection at once.
func rude(t *testing.T, path string) {
	t.Helper()
	listener, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			conn.Close()
		}
	}()
	t.Cleanup(func() {
		listener.Close()
		<-ended
	})
}

func absent(*testing.T, string) {}

// Of each pair of what crishim does and what the runtime does, the watchdog says whose fault it is. What is behind the listening socket is a
// fake, too: a relay that is wedged cannot be had.
func TestWhoseFaultItIs(t *testing.T) {
	fake := func(version func(context.Context) error) func(*testing.T, string) {
		return func(t *testing.T, path string) { (&fakeRuntime{version: version}).serve(t, path) }
	}
	for _, tt := range []struct {
		name             string
		crishim, runtime func(*testing.T, string)
		fed              bool
		said             string
	}{
		{"all is well", fake(answers), fake(answers), true, ""},
		{"all is well, and the runtime is gone since", fake(answers), absent, true, ""},
		{"crishim accepts nothing", silent, fake(answers), false, "the runtime answers, but not through crishim"},
		{"crishim closes connections", rude, fake(answers), false, "the runtime answers, but not through crishim"},
		{"crishim relays nothing", fake(hangs), fake(answers), false, "the runtime answers, but not through crishim"},
		{"crishim errs", fake(errs), fake(answers), false, "the runtime answers, but not through crishim"},
		{"the name of the socket is gone", absent, fake(answers), true, "restart crishim.socket"},
		{"the runtime is away", fake(errs), absent, true, ""},
		{"the runtime accepts nothing", fake(hangs), silent, true, "the runtime does not answer"},
		{"the runtime does not answer", fake(hangs), fake(hangs), true, "the runtime does not answer"},
		{"the runtime errs", fake(errs), fake(errs), true, "the runtime answers Version with an error"},
		{"both err, each in its own way", fake(errs), rude, false, "neither crishim nor the runtime can be called"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			log, logged := test.NewNullLogger()
			w := &watchdog{listening: filepath.Join(dir, "c"), runtime: filepath.Join(dir, "r"), timeout: 500 * time.Millisecond, log: log}
			tt.crishim(t, w.listening)
			tt.runtime(t, w.runtime)
			for range 2 {
				if fed := w.sound(t.Context()); fed != tt.fed {
					t.Errorf("fed is %t, want %t", fed, tt.fed)
				}
			}
			entries := logged.AllEntries()
			switch {
			case tt.said == "" && len(entries) > 0:
				t.Errorf("it logs %q, want nothing", entries[0].Message)
			case tt.said != "" && (len(entries) != 1 || !strings.Contains(entries[0].Message, tt.said)):
				t.Errorf("it logs %v, want one entry with %q", entries, tt.said)
			}
		})
	}
}

// systemd is a stand-in for the real one's end of the notification socket, which test/vm has: it tells what it was told.
type systemd struct{ conn *net.UnixConn }

func newSystemd(t *testing.T, watchdog time.Duration) *systemd {
	t.Helper()
	path := filepath.Join(t.TempDir(), "notify")
	conn, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", strconv.FormatInt(watchdog.Microseconds(), 10))
	t.Setenv("WATCHDOG_PID", strconv.Itoa(os.Getpid()))
	return &systemd{conn}
}

// next is the next message, empty if there is none for so long.
func (s *systemd) next(t *testing.T, within time.Duration) string {
	t.Helper()
	if err := s.conn.SetReadDeadline(time.Now().Add(within)); err != nil {
		t.Fatal(err)
	}
	message := make([]byte, 4096)
	n, err := s.conn.Read(message)
	if err != nil && !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal(err)
	}
	return string(message[:n])
}

func (s *systemd) expect(t *testing.T, want string) {
	t.Helper()
	if got := s.next(t, time.Minute); got != want {
		t.Fatalf("systemd gets %q, want %q", got, want)
	}
}

// The daemon feeds the watchdog after a call that has reached the runtime, one call each time, and no more once it stops, however long that
// takes.
func TestTheWatchdogIsFed(t *testing.T) {
	requireRoot(t)
	t.Cleanup(func() { goleak.VerifyNone(t) })
	dir := t.TempDir()
	letGo, listing := make(chan struct{}), make(chan struct{})
	runtime := &fakeRuntime{version: answers, list: func(context.Context) error {
		close(listing)
		<-letGo
		return nil
	}}
	path := filepath.Join(dir, "runtime.sock")
	runtime.serve(t, path)
	const limit = 600 * time.Millisecond
	systemd := newSystemd(t, limit)
	socket := filepath.Join(dir, "crishim.sock")
	stop := start(t, Config{Listen: socket, RuntimeEndpoint: path, Criu: filepath.Join(dir, "criu")})
	systemd.expect(t, "READY=1")
	for fed := range 4 {
		systemd.expect(t, "WATCHDOG=1")
		if calls := int(runtime.versions.Load()); calls < fed+1 || calls > fed+2 {
			t.Errorf("the runtime got %d calls for %d feedings", calls, fed+1)
		}
	}

	conn := dial(t, socket)
	defer conn.Close()
	client := runtimeapi.NewRuntimeServiceClient(conn)
	called, stopped := make(chan error, 1), make(chan struct{})
	go func() {
		_, err := client.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{})
		called <- err
	}()
	<-listing
	go func() {
		defer close(stopped)
		stop()
	}()
	message := "WATCHDOG=1"
	for message == "WATCHDOG=1" {
		message = systemd.next(t, time.Minute)
	}
	if want := "STOPPING=1\nEXTEND_TIMEOUT_USEC=45000000"; message != want {
		t.Errorf("systemd gets %q, want %q", message, want)
	}
	if message := systemd.next(t, 2*limit); message != "" {
		t.Errorf("systemd gets %q while crishim stops: its watchdog begins again", message)
	}
	close(letGo)
	if err := <-called; err != nil {
		t.Errorf("the call in flight: %v", err)
	}
	<-stopped
}

// A runtime that is away, and one that accepts and says nothing, are none of crishim's faults, through the real relay.
func TestTheWatchdogIsFedWithoutARuntime(t *testing.T) {
	requireRoot(t)
	for name, runtime := range map[string]func(*testing.T, string){
		"away": absent, "silent": silent, "hanging": func(t *testing.T, path string) { (&fakeRuntime{version: hangs}).serve(t, path) },
	} {
		t.Run(name, func(t *testing.T) {
			t.Cleanup(func() { goleak.VerifyNone(t) })
			dir := t.TempDir()
			path := filepath.Join(dir, "runtime.sock")
			runtime(t, path)
			systemd := newSystemd(t, 600*time.Millisecond)
			stop := start(t, Config{Listen: filepath.Join(dir, "crishim.sock"), RuntimeEndpoint: path, Criu: filepath.Join(dir, "criu")})
			defer stop()
			systemd.expect(t, "READY=1")
			for range 3 {
				systemd.expect(t, "WATCHDOG=1")
			}
		})
	}
}

// Without a watchdog nothing is called and nothing is fed; one that makes no sense is told of, and ends nothing.
func TestWithoutAWatchdog(t *testing.T) {
	for _, tt := range []struct{ usec, pid, logs string }{
		{"", "", ""},
		{"1000", "1", ""},
		{"soon", strconv.Itoa(os.Getpid()), "systemd's watchdog is not fed"},
	} {
		systemd := newSystemd(t, time.Second)
		t.Setenv("WATCHDOG_USEC", tt.usec)
		t.Setenv("WATCHDOG_PID", tt.pid)
		log, logged := test.NewNullLogger()
		startWatchdog("/nowhere", "/nowhere", func(bool) {}, log)()
		if message := systemd.next(t, 50*time.Millisecond); message != "" {
			t.Errorf("%+v: systemd gets %q", tt, message)
		}
		if entry := logged.LastEntry(); (entry == nil) != (tt.logs == "") || entry != nil && (entry.Level != logrus.WarnLevel || !strings.Contains(entry.Message, tt.logs)) {
			t.Errorf("%+v: it logs %v", tt, entry)
		}
	}
}
