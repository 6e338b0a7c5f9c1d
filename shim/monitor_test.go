package shim

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// fetch gets a page of the monitor, on a connection of its own.
func fetch(t *testing.T, network, address, page string) (code int, body string) {
	t.Helper()
	client := http.Client{Timeout: 30 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, network, address)
		},
	}}
	response, err := client.Get("http://crishim" + page)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return response.StatusCode, string(text)
}

func TestMetricsAndHealthOfADaemon(t *testing.T) {
	requireRoot(t)
	t.Cleanup(func() { goleak.VerifyNone(t) })
	dir := t.TempDir()
	socket, runtime, metrics := filepath.Join(dir, "crishim.sock"), filepath.Join(dir, "runtime.sock"), filepath.Join(dir, "new", "metrics.sock")
	gone := (&fakeRuntime{version: answers}).serve(t, runtime)
	stop := start(t, Config{
		Listen: socket, RuntimeEndpoint: runtime, Criu: filepath.Join(dir, "criu"), Metrics: "unix://" + metrics, Mode: Never, Version: "1.2.3",
	})
	defer stop()
	waitForFile(t, metrics)
	for name, want := range map[string]os.FileMode{metrics: os.ModeSocket | 0o600, filepath.Dir(metrics): os.ModeDir | 0o700} {
		if info, err := os.Stat(name); err != nil || info.Mode() != want {
			t.Errorf("%s is %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	for range 3 {
		if err := version(t, socket); err != nil {
			t.Fatal(err)
		}
	}
	_, text := fetch(t, "unix", metrics, "/metrics")
	for _, want := range []string{
		`crishim_build_info{commit="",goversion="`, `crishim_relay_connections_total 3`, `crishim_relay_streams_total{method="RuntimeService/Version"} 3`,
		`crishim_relay_streams_total{method="ImageService/PullImage"} 0`, `crishim_runtime_up 1`,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("there is no line %s in\n%s", want, text)
		}
	}
	if code, text := fetch(t, "unix", metrics, "/readyz"); code != http.StatusOK {
		t.Errorf("it is not ready: %s", text)
	}

	gone()
	waitForPage(t, metrics, "/readyz", http.StatusServiceUnavailable, "no answer of the runtime through crishim: ")
	waitForPage(t, metrics, "/readyz", http.StatusServiceUnavailable, "runtime away: ")
	waitForPage(t, metrics, "/metrics", http.StatusOK, "\ncrishim_runtime_up 0\n")
	if code, _ := fetch(t, "unix", metrics, "/healthz"); code != http.StatusOK {
		t.Errorf("/healthz gives %d while the runtime is away", code)
	}
	(&fakeRuntime{version: answers}).serve(t, runtime)
	waitForPage(t, metrics, "/readyz", http.StatusOK, "runtime back: ")
	waitForPage(t, metrics, "/metrics", http.StatusOK, "\ncrishim_runtime_up 1\n")
}

// Where crishim is the one that makes checkpoints, it says why it cannot.
func TestReadyWithoutCRIU(t *testing.T) {
	requireRoot(t)
	dir := t.TempDir()
	runtime, metrics := filepath.Join(dir, "runtime.sock"), filepath.Join(dir, "metrics.sock")
	(&fakeRuntime{version: answers}).serve(t, runtime)
	defer start(t, Config{Listen: filepath.Join(dir, "crishim.sock"), RuntimeEndpoint: runtime, Criu: filepath.Join(dir, "criu"), Metrics: metrics})()
	waitForFile(t, metrics)
	if code, text := fetch(t, "unix", metrics, "/readyz"); code != http.StatusServiceUnavailable || !strings.HasPrefix(text, "no checkpoints: CRIU is not available: ") {
		t.Errorf("it answers %d, %q", code, text)
	}
}

// What stands in the way of metrics does not keep the kubelet from its runtime.
func TestMetricsThatCannotBeHad(t *testing.T) {
	requireRoot(t)
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	dir := t.TempDir()
	socket, runtime := filepath.Join(dir, "crishim.sock"), filepath.Join(dir, "runtime.sock")
	(&fakeRuntime{version: answers}).serve(t, runtime)
	defer start(t, Config{Listen: socket, RuntimeEndpoint: runtime, Criu: filepath.Join(dir, "criu"), Metrics: taken.Addr().String()})()
	if err := version(t, socket); err != nil {
		t.Error(err)
	}
	err = Run(t.Context(), Config{Listen: filepath.Join(dir, "other.sock"), RuntimeEndpoint: runtime, Metrics: "0.0.0.0:9471"})
	if want := `parse metrics: address "0.0.0.0:9471"`; err == nil || !strings.HasPrefix(err.Error(), want) {
		t.Errorf("an address that others can reach gives %v, want %s", err, want)
	}
}

func waitForFile(t *testing.T, path string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(path); err == nil {
			return
		} else if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

// waitForPage waits until a page has this code and this text. It may be a second old.
func waitForPage(t *testing.T, socket, page string, code int, text string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		now, body := fetch(t, "unix", socket, page)
		if now == code && strings.Contains(body, text) {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(fmt.Errorf("%s gives %d\n%s\nwant %d and %q", page, now, body, code, text))
		}
	}
}
