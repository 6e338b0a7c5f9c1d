package main

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// output is what a daemon writes, while it runs.
type output struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.Write(p)
}

// wait waits for words, and returns all up to them, which it takes away.
func (o *output) wait(t *testing.T, words string) string {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		o.mu.Lock()
		text := o.b.String()
		if before, after, ok := strings.Cut(text, words); ok {
			o.b.Reset()
			o.b.WriteString(after)
			o.mu.Unlock()
			return before
		}
		o.mu.Unlock()
		if time.Now().After(deadline) {
			t.Fatalf("the log does not come to %q:\n%s", words, text)
		}
	}
}

// A daemon is sent SIGHUP, with one configuration after the other, and tells its log and systemd.
func TestReload(t *testing.T) {
	t.Setenv("GOMAXPROCS", "2") // what serve sets otherwise is for a process of its own
	dir := t.TempDir()
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	told := func(want string) {
		t.Helper()
		if err := systemd.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		message := make([]byte, 4096)
		n, err := systemd.Read(message)
		if err != nil || !strings.HasPrefix(string(message[:n]), want) {
			t.Errorf("systemd is told %q, %v; want %q", message[:n], err, want)
		}
	}
	file := filepath.Join(dir, "config.toml")
	configure := func(socket string, lines ...string) {
		t.Helper()
		common := fmt.Sprintf("listen = %q\nruntime_endpoint = %q\nstate_dir = %q\ncriu = \"/nowhere/criu\"\n",
			filepath.Join(dir, socket), filepath.Join(dir, "absent.sock"), filepath.Join(dir, "state"))
		if err := os.WriteFile(file, []byte(common+strings.Join(lines, "\n")), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	hangup := func() {
		t.Helper()
		if err := unix.Kill(os.Getpid(), unix.SIGHUP); err != nil {
			t.Fatal(err)
		}
		told("RELOADING=1\nMONOTONIC_USEC=")
		told("READY=1")
	}

	configure("crishim.sock", `log_level = "info"`)
	log := &output{}
	root := rootCommand()
	root.SetArgs([]string{"serve", "--config", file, "--compression", "none", "--admin-socket", ""})
	root.SetErr(log)
	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	ended := make(chan error, 1)
	go func() { ended <- root.ExecuteContext(ctx) }()
	told("READY=1")
	log.wait(t, "level=info msg=serving")

	configure("crishim.sock", `log_level = "debug"`, `log_format = "json"`, "[checkpoint]", "parallel = 5", `compression = "zstd"`)
	hangup()
	log.wait(t, `"msg":"the configuration was read again, and taken over; changed: log_level, log_format, checkpoint.parallel"`)

	configure("crishim.sock", `log_level = "debug"`, "no_key = 1", "", "[checkpoint]", "nor_this = 1")
	hangup()
	log.wait(t, `"level":"error","msg":"the configuration is wrong, and stays as it was: `+file+`:6: there is no key no_key"`)
	log.wait(t, `the configuration is wrong, and stays as it was: `+file+`:9: there is no key checkpoint.nor_this"`)

	// What cannot change is told of for as long as it differs from what the daemon runs with.
	configure("other.sock")
	hangup()
	log.wait(t, "changed: log_level, log_format, checkpoint.parallel")
	log.wait(t, "a restart of crishim is needed for what has changed of listen")
	hangup()
	log.wait(t, "nothing has changed")
	log.wait(t, "a restart of crishim is needed for what has changed of listen")
	stop()
	told("STOPPING=1")
	if err := <-ended; err != nil {
		t.Errorf("serve: %v", err)
	}
}
