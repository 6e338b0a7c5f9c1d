package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

const metricsAddress = "127.0.0.1:9471"

// A node that makes one checkpoint and fails at another, and whose containerd goes away and comes back, says so.
func TestMetricsOfANode(t *testing.T) {
	n := node.StartContainerdFor(t, node.Options{})
	if err := os.MkdirAll(n.Path("/etc/crishim/config.d"), 0o755); err != nil {
		t.Fatal(err)
	}
	retention := "metrics = \"" + metricsAddress + "\"\n[retention]\ndirectories = [\"" + checkpoints + "\"]\nmax_per_container = 1\n"
	if err := os.WriteFile(n.Path("/etc/crishim/config.d/metrics.toml"), []byte(retention), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(n.Path(checkpoints), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := n.StartCrishim(t.Context(), node.Crishim(t)); err != nil {
		t.Fatal(err)
	}
	client := dial(t, n)
	container := client.Run(t, node.Spec{})
	node.WaitCount(t, 3, container.Log)
	expectPage(t, n, "/readyz", http.StatusOK, "ok")

	location := checkpoints + "/checkpoint-test_default-test-1.tar"
	request := &cri.CheckpointContainerRequest{ContainerId: container.ID, Location: location}
	if _, err := client.Runtime.CheckpointContainer(t.Context(), request); err != nil {
		t.Fatal(err)
	}
	if _, err := client.Runtime.CheckpointContainer(t.Context(), request); status.Code(err) != codes.AlreadyExists {
		t.Fatalf("a second archive at the location gives %v", err)
	}
	size := int64(0)
	if info, err := os.Stat(n.Path(location)); err != nil {
		t.Fatal(err)
	} else {
		size = info.Size()
	}
	for _, line := range []string{
		`crishim_checkpoints_total{cause="",code="OK",interface="cri"} 1`,
		`crishim_checkpoints_total{cause="exists",code="AlreadyExists",interface="cri"} 1`,
		`crishim_checkpoint_duration_seconds_count{outcome="written"} 1`,
		`crishim_checkpoint_duration_seconds_count{outcome="failed"} 1`,
		`crishim_checkpoint_frozen_seconds_count 1`,
		fmt.Sprintf(`crishim_checkpoint_archive_bytes_sum %v`, float64(size)),
		`crishim_checkpoints_in_flight 0`,
		`crishim_relay_streams_total{method="RuntimeService/RunPodSandbox"} 1`,
		`crishim_relay_streams_total{method="RuntimeService/CheckpointContainer"} 2`,
		`crishim_relay_served_streams_total 2`,
		`crishim_runtime_up 1`,
		// It is looked for after each checkpoint.
		`crishim_retained_archives{directory="` + checkpoints + `"} 1`,
	} {
		expectPage(t, n, "/metrics", http.StatusOK, "\n"+line+"\n")
	}
	expectPage(t, n, "/readyz", http.StatusOK, "checkpoint failed: ")

	// Whoever has the line of the log can tell whether an archive is the one that was written.
	digest, err := n.Output(t.Context(), "sh", "-c", "tar -xOf "+location+" crishim.json | sha256sum")
	if err != nil {
		t.Fatal(err)
	}
	digest, _, _ = strings.Cut(digest, " ")
	for _, want := range []string{"digest=" + digest, "cause=exists"} {
		if !strings.Contains(n.Logs(), want) {
			t.Errorf("the log has no %s", want)
		}
	}

	containerd := n.Daemon("containerd")
	containerd.Kill()
	<-containerd.Done()
	expectPage(t, n, "/readyz", http.StatusServiceUnavailable, "no answer of the runtime through crishim: ")
	expectPage(t, n, "/metrics", http.StatusOK, "\ncrishim_runtime_up 0\n")
	expectPage(t, n, "/healthz", http.StatusOK, "ok\n")
	if _, err := n.StartContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	expectPage(t, n, "/readyz", http.StatusOK, "runtime back: ")
	expectPage(t, n, "/metrics", http.StatusOK, "\ncrishim_runtime_up 1\n")

	t.Run("dashboard and rules", func(t *testing.T) { usesWhatThereIs(t, page(t, n, "/metrics").text) })
}

type got struct {
	code int
	text string
}

// page gets a page of a node's crishim.
func page(t *testing.T, n *node.Node, path string) got {
	t.Helper()
	client := http.Client{Timeout: time.Minute, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext: func(ctx context.Context, network, address string) (net.Conn, error) {
			return n.DialContext(ctx, network, address)
		},
	}}
	response, err := client.Get("http://" + metricsAddress + path)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return got{response.StatusCode, string(text)}
}

// expectPage waits for a page with that code and that in it.
func expectPage(t *testing.T, n *node.Node, path string, code int, text string) {
	t.Helper()
	var last got
	for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(100 * time.Millisecond) {
		if last = page(t, n, path); last.code == code && strings.Contains(last.text, text) {
			return
		}
	}
	t.Errorf("%s gives %d\n%s\nwant %d, and in it %q", path, last.code, last.text, code, text)
}

var (
	usedMetric     = regexp.MustCompile(`\b(crishim|process|go)_\w+`)
	exportedMetric = regexp.MustCompile(`(?m)^(\w+)[{ ]`)
)

// usesWhatThereIs holds the dashboard and the rules to what a crishim exports.
func usesWhatThereIs(t *testing.T, scraped string) {
	exported := map[string]bool{}
	for _, match := range exportedMetric.FindAllStringSubmatch(scraped, -1) {
		exported[match[1]] = true
	}
	check := func(file, expression string) {
		for _, name := range usedMetric.FindAllString(expression, -1) {
			if !exported[name] {
				t.Errorf("%s uses %s, which crishim does not export: %s", file, name, expression)
			}
		}
	}

	content, err := os.ReadFile("../../docs/grafana/crishim.json")
	if err != nil {
		t.Fatal(err)
	}
	var dashboard struct {
		Panels []struct {
			ID      int
			Title   string
			GridPos struct{ X, Y, W, H int }
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(content, &dashboard); err != nil {
		t.Fatal(err)
	}
	expressions := 0
	var rules strings.Builder
	rules.WriteString("groups:\n- name: dashboard\n  rules:\n")
	for _, panel := range dashboard.Panels {
		for _, target := range panel.Targets {
			check("the dashboard", target.Expr)
			expressions++
			// Grafana puts in what stands for a node and an interval.
			expression := strings.NewReplacer("$__rate_interval", "5m", "$instance", ".*").Replace(target.Expr)
			fmt.Fprintf(&rules, "  - {record: 'panel%d:%d', expr: %q}\n", panel.ID, expressions, expression)
		}
	}
	if expressions < 20 {
		t.Errorf("the dashboard has %d expressions: was it read?", expressions)
	}
	alerts, err := os.ReadFile("../../docs/prometheus/alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	check("alerts.yaml", string(alerts))
	tests, err := os.ReadFile("../../docs/prometheus/alerts_test.yaml")
	if err != nil {
		t.Fatal(err)
	}
	for _, match := range regexp.MustCompile(`(?m)alert: (\w+)$`).FindAllStringSubmatch(string(alerts), -1) {
		for which, form := range map[string]string{"all is well": `alertname: %s, eval_time`, "it fires": `alertname: %s\n +eval_time: \w+\n +exp_alerts:`} {
			if !regexp.MustCompile(fmt.Sprintf(form, match[1])).Match(tests) {
				t.Errorf("alerts_test.yaml has no test of %s for that %s", match[1], which)
			}
		}
	}

	// As Prometheus itself reads them.
	fromDashboard := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(fromDashboard, []byte(rules.String()), 0o600); err != nil {
		t.Fatal(err)
	}
	promtool, err := node.Tool(t.Context(), "promtool")
	if err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"check", "rules", "../../docs/prometheus/alerts.yaml", fromDashboard},
		{"test", "rules", "../../docs/prometheus/alerts_test.yaml"},
		{"check", "metrics"},
	} {
		cmd := exec.CommandContext(t.Context(), promtool, args...)
		cmd.Stdin = strings.NewReader(scraped)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("promtool %s: %v\n%s", strings.Join(args, " "), err, out)
		}
	}
}
