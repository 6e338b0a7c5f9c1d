package monitor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil/promlint"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/relay"
)

// sources are of a crishim that has seen a little of everything.
func sources() Sources {
	return Sources{
		Relay: func() relay.Stats {
			return relay.Stats{Accepted: 7, Connections: 2, Streams: 1, Methods: []relay.Method{
				{Path: "/runtime.v1.RuntimeService/Version", Streams: 5, Requests: 25, Responses: 300},
				{Path: "/runtime.v1.RuntimeService/CheckpointContainer", Streams: 3, Served: 3},
				{Path: "", Streams: 1},
			}}
		},
		Refused:   func() int64 { return 4 },
		InFlight:  func() (int, int) { return 3, 1 },
		Unwritten: func() int { return 2 },
		Causes:    map[string]codes.Code{"criu": codes.FailedPrecondition, "deadline": codes.DeadlineExceeded},
		Runtime:   func(context.Context) error { return nil },
		Ready:     func(context.Context) []error { return nil },
	}
}

// told returns a Monitor that was told of everything once.
func told() *Monitor {
	m := New(Build{Version: "1.2.3", Commit: "abc"}, sources())
	begin := time.Now()
	c := &crishimv1.Checkpoint{
		Id: "mg3k2z", Caller: &crishimv1.Caller{Interface: crishimv1.Interface_INTERFACE_CRI}, Location: "/secret/place", Pod: "hidden",
		Begin: timestamppb.New(begin), End: timestamppb.New(begin.Add(3 * time.Second)), Size: 5 << 20, Memory: 4 << 20, FrozenUs: 300_000,
	}
	m.Ended(c, "")
	c.Code, c.Message = int32(codes.FailedPrecondition), "process 7 (private)"
	m.Ended(c, "criu")
	m.Repaired(nil)
	m.Repaired(errors.New("left"))
	m.Reloaded(nil)
	m.Reloaded(errors.New("wrong"))
	m.Watched(true)
	m.Retained("/archives", 3, 300)
	m.Removed(100)
	m.NotRemoved()
	m.Away(errors.New("dial unix: refused"))
	m.Away(nil)
	return m
}

func get(t *testing.T, m *Monitor, path string) (int, string) {
	t.Helper()
	w := httptest.NewRecorder()
	m.Handler().ServeHTTP(w, httptest.NewRequest(http.MethodGet, path, nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	return w.Code, string(body)
}

func TestMetrics(t *testing.T) {
	_, text := get(t, told(), "/metrics")
	for _, want := range []string{
		`crishim_build_info{commit="abc",goversion="go`,
		`crishim_checkpoints_total{cause="",code="OK",interface="cri"} 1`,
		`crishim_checkpoints_total{cause="criu",code="FailedPrecondition",interface="cri"} 1`,
		`crishim_checkpoints_total{cause="deadline",code="DeadlineExceeded",interface="admin"} 0`,
		`crishim_checkpoint_duration_seconds_sum{outcome="written"} 3`,
		`crishim_checkpoint_duration_seconds_count{outcome="failed"} 1`,
		`crishim_checkpoint_frozen_seconds_sum 0.3`,
		`crishim_checkpoint_archive_bytes_sum 5.24288e+06`,
		`crishim_checkpoint_memory_bytes_total 4.194304e+06`,
		`crishim_checkpoints_in_flight 3`,
		`crishim_checkpoints_waiting 1`,
		`crishim_repairs_total{result="left"} 1`,
		`crishim_reloads_total{result="refused"} 1`,
		`crishim_watchdog_rounds_total{result="hungry"} 0`,
		`crishim_retained_archives{directory="/archives"} 3`,
		`crishim_retention_removed_bytes_total 100`,
		`crishim_relay_connections_total 7`,
		`crishim_relay_open_streams 1`,
		`crishim_relay_refused_connections_total 4`,
		`crishim_relay_streams_total{method="RuntimeService/Version"} 5`,
		`crishim_relay_streams_total{method="other"} 1`,
		`crishim_relay_bytes_total{direction="response",method="RuntimeService/Version"} 300`,
		`crishim_relay_served_streams_total 3`,
		`crishim_history_write_failures_total 2`,
		`crishim_runtime_up 1`,
		`go_goroutines `, `process_open_fds `,
	} {
		if !strings.Contains(text, "\n"+want) {
			t.Errorf("there is no line %s", want)
		}
	}
	problems, err := promlint.New(strings.NewReader(text)).Lint()
	if err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
	if t.Failed() {
		t.Log(text)
	}
}

var (
	family    = regexp.MustCompile(`(?m)^# TYPE (crishim_\w+) `)
	described = regexp.MustCompile("(?m)^\\| `(crishim_\\w+)")
)

// What is exported is described, and the other way around.
func TestEachMetricIsDescribed(t *testing.T) {
	page, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	_, text := get(t, told(), "/metrics")
	names := func(matches [][]string) (names []string) {
		for _, match := range matches {
			names = append(names, match[1])
		}
		slices.Sort(names)
		return names
	}
	exported, onPage := names(family.FindAllStringSubmatch(text, -1)), names(described.FindAllStringSubmatch(string(page), -1))
	if !slices.Equal(exported, onPage) {
		t.Errorf("exported are\n%s\nand in docs/metrics.md are\n%s", strings.Join(exported, "\n"), strings.Join(onPage, "\n"))
	}
}

func TestADirectoryIsForgotten(t *testing.T) {
	m := told()
	m.Forget("/archives")
	if _, text := get(t, m, "/metrics"); strings.Contains(text, "crishim_retained") {
		t.Error("what was in a directory that is none of retention's any more is still there")
	}
}

func TestReadyAndHealthy(t *testing.T) {
	m := told()
	m.sources.Ready = func(context.Context) []error { return []error{errors.New("no CRIU\nhere"), errors.New("no runtime")} }
	code, text := get(t, m, "/readyz")
	if want := "no CRIU; here\nno runtime\n\nlately, the latest first:\n"; code != http.StatusServiceUnavailable || !strings.HasPrefix(text, want) {
		t.Errorf("it answers %d, %q; want 503, %q", code, text, want)
	}
	code, text = get(t, m, "/healthz")
	if code != http.StatusOK || !strings.HasPrefix(text, "ok\n") {
		t.Errorf("a process that serves answers %d, %q", code, text)
	}
	_, text = get(t, m, "/readyz?format=json")
	var answer struct {
		OK      bool
		Reasons []string
		Events  []Event
	}
	if err := json.Unmarshal([]byte(text), &answer); err != nil {
		t.Fatal(err)
	}
	var kinds []string
	for _, e := range answer.Events {
		kinds = append(kinds, e.Kind)
	}
	if want := []string{"runtime back", "runtime away", "reload", "reload", "repair", "repair", "checkpoint failed"}; answer.OK || len(answer.Reasons) != 2 || !slices.Equal(kinds, want) {
		t.Errorf("it answers %+v; want events %q", answer, want)
	}
	// Any process of the node can read it.
	for _, secret := range []string{"/secret/place", "hidden", "private"} {
		if strings.Contains(text, secret) {
			t.Errorf("it tells %q: %s", secret, text)
		}
	}
	if code, _ := get(t, m, "/elsewhere"); code != http.StatusNotFound {
		t.Errorf("/elsewhere gives %d", code)
	}
}

// Whoever asks again and again has the runtime asked once a second.
func TestReadyIsAskedOnceASecond(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		asked := 0
		s := sources()
		s.Ready = func(context.Context) []error { asked++; return nil }
		m := New(Build{}, s)
		for range 100 {
			m.ready(t.Context())
			time.Sleep(100 * time.Millisecond)
		}
		if asked != 10 {
			t.Errorf("it was asked %d times in 10 seconds", asked)
		}
		// Of one who has gone, nothing is learned.
		time.Sleep(2 * time.Second)
		gone, cancel := context.WithCancel(t.Context())
		cancel()
		m.sources.Ready = func(ctx context.Context) []error { return []error{ctx.Err()} }
		m.ready(gone)
		m.sources.Ready = func(ctx context.Context) []error { return nil }
		if reasons := m.ready(t.Context()); reasons != nil {
			t.Errorf("because somebody has hung up, it is not ready: %v", reasons)
		}
	})
}

func TestEventsAreBounded(t *testing.T) {
	var e events
	for i := range kept + 10 {
		e.add("reload", strconv.Itoa(i))
	}
	if all := e.recent(); len(all) != kept || all[0].Text != strconv.Itoa(kept+9) || all[kept-1].Text != "10" {
		t.Errorf("there are %d, from %s to %s", len(all), all[0].Text, all[len(all)-1].Text)
	}
}

func TestAddresses(t *testing.T) {
	for address, want := range map[string]string{
		"127.0.0.1:9471": "tcp", "127.1.2.3:1": "tcp", "[::1]:9471": "tcp", "unix:///run/a.sock": "unix", "/run/a.sock": "unix",
		"0.0.0.0:9471": "", "[::]:9471": "", ":9471": "", "10.0.0.1:9471": "", "localhost:9471": "", "127.0.0.1": "", "tcp://127.0.0.1:1": "", "nonsense": "",
		"[::ffff:10.0.0.1]:1": "",
	} {
		unix, err := ParseAddress(address)
		got := map[bool]string{true: "unix", false: "tcp"}[unix]
		if err != nil {
			got = ""
			if !strings.Contains(err.Error(), "127.0.0.1:PORT") {
				t.Errorf("the error of %q does not say what is possible: %v", address, err)
			}
		}
		if got != want {
			t.Errorf("%q is %q, want %q", address, got, want)
		}
	}
}

func BenchmarkScrape(b *testing.B) {
	h := told().Handler()
	request := httptest.NewRequest(http.MethodGet, "/metrics", nil)
	for b.Loop() {
		h.ServeHTTP(&httptest.ResponseRecorder{Body: &bytes.Buffer{}}, request)
	}
}
