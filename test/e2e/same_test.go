package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"crishim/test/node"
)

// What the users of a kubelet see of a pod's life is the same with crishim and without it, except that there are checkpoints.
func TestAKubeletWorksAsWithoutCrishim(t *testing.T) {
	for _, version := range []string{"1.34", "1.37"} {
		t.Run(version, func(t *testing.T) {
			node.RequireRoot(t, testing.Short())
			var want observation
			t.Run("without", func(t *testing.T) {
				want = observe(t, node.StartContainerdFor(t, node.Options{}), version, node.ContainerdSocket, nil)
			})
			if want == nil {
				t.Fatal("there is nothing to compare with")
			}
			if want["checkpoint"] != notImplemented {
				t.Errorf("without crishim a checkpoint gives %q: then crishim has nothing to add", want["checkpoint"])
			}
			want["checkpoint"] = "200"
			t.Run("through crishim", func(t *testing.T) {
				n, _ := start(t, node.Options{})
				got := observe(t, n, version, node.CrishimSocket, want)
				for _, what := range slices.Sorted(maps.Keys(want)) {
					if got[what] != want[what] {
						t.Errorf("%s: %s", what, difference(got[what], want[what]))
					}
				}
			})
		})
	}
}

// observation is what a kubelet answers, by what it was asked. What differs from one run to the next is masked.
type observation map[string]string

const notImplemented = "500 not implemented"

// observe takes a pod through its life. Statistics appear one after another: it waits until they are those of want, where
// there is one.
func observe(t *testing.T, n *node.Node, version, socket string, want observation) observation {
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	k, err := n.StartKubelet(ctx, node.KubeletOptions{Version: version, RuntimeEndpoint: socket})
	if err != nil {
		t.Fatal(err)
	}
	const name = "server"
	if err := k.RunPod(ctx, node.Pod{Name: name, Command: []string{"/bin/workload", "net", "server", "8080"}, Container: map[string]any{
		"readinessProbe": map[string]any{"exec": map[string]any{"command": []string{"true"}}, "periodSeconds": 1},
		"resources":      map[string]any{"limits": map[string]any{"memory": "64Mi"}},
	}}); err != nil {
		t.Fatal(err)
	}
	pod := k.PodName(name)
	seen := observation{}
	note := func(what, answer string, err error) {
		t.Helper()
		if err != nil {
			answer += fmt.Sprintf("error: %v", err)
		}
		seen[what] = mask(answer)
	}
	exec := func(command ...string) {
		result, err := k.ExecStream(ctx, pod, name, command...)
		note("exec "+strings.Join(command, " "), fmt.Sprintf("%+v", result), err)
	}

	note("pod", waitFor(ctx, t, func() (string, error) { return ready(ctx, k, pod, 0) }), nil)
	log := func(options ...string) func() (string, error) {
		return func() (string, error) { return k.ContainerLog(ctx, pod, name, options...) }
	}
	node.WaitCount(t, 10, log())
	for _, options := range [][]string{{"limitBytes=20"}, {"tailLines=3"}, {"tailLines=3", "timestamps=true"}} {
		answer, err := log(options...)()
		note("log "+strings.Join(options, "&"), answer, err)
	}

	answer, err := k.Exec(ctx, pod, name, "echo hello") // by ExecSync
	note("run", answer, err)
	exec("sh", "-c", "echo out; echo err >&2; exit 3")
	exec("/no/such/command")
	_, err = k.ExecStream(ctx, pod, "nobody", "true")
	note("exec in no container", "", err)
	answer, err = k.Attach(ctx, pod, name, func(output string) bool { return len(node.Counts(output)) > 2 })
	note("attach", strings.Join(strings.SplitAfter(answer, "\n")[:2], ""), err)
	answer, err = k.PortForward(ctx, pod, 8080, "there and back")
	note("port-forward", answer, err)
	_, err = k.PortForward(ctx, pod, 8081, "nobody listens")
	note("port-forward to a closed port", "", err)

	const statistics = "statistics"
	note(statistics, waitFor(ctx, t, func() (string, error) {
		fields, err := summaryFields(ctx, k, pod)
		// The rates are the last to come: they need two samples.
		if complete := strings.Contains(fields, "containers.cpu.usageNanoCores"); err == nil && !complete || want != nil && fields != want[statistics] {
			return fields, fmt.Errorf("the summary of %s is not complete: %s", pod, fields)
		}
		return fields, err
	}), nil)

	answer = "200"
	_, err = k.Checkpoint(ctx, pod, name, 0)
	var refusal *node.HTTPError
	if errors.As(err, &refusal) && refusal.Code == http.StatusInternalServerError && strings.Contains(refusal.Body, "not implemented") {
		answer, err = notImplemented, nil
	}
	note("checkpoint", answer, err)

	// The runtime tells the kubelet of the end, and the kubelet starts another container.
	if _, err := k.Exec(ctx, pod, name, "kill 1"); err != nil {
		t.Error(err)
	}
	note("pod that was restarted", waitFor(ctx, t, func() (string, error) { return ready(ctx, k, pod, 1) }), nil)
	answer, err = log("previous=true", "limitBytes=20")()
	note("log of the one before", answer, err)

	if err := k.RemovePod(ctx, name); err != nil {
		t.Error(err)
	}
	// Here it asks the runtime.
	note("running after its removal", waitFor(ctx, t, func() (string, error) {
		answer, err := k.Get(ctx, "/runningpods/")
		if err == nil && strings.Contains(string(answer), pod) {
			err = fmt.Errorf("%s still runs: %s", pod, answer)
		}
		return string(answer), err
	}), nil)
	return seen
}

// difference is the first line in which two answers differ.
func difference(through, without string) string {
	a, b := strings.Split(through, "\n"), strings.Split(without, "\n")
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return fmt.Sprintf("line %d is %q through crishim, and %q without it", i+1, a[i], b[i])
		}
	}
	return fmt.Sprintf("%d lines through crishim, %d without it", len(a), len(b))
}

// waitFor calls ask until it gives no error, and returns the answer. When ctx ends, the test fails and the last answer is good
// enough to be shown.
func waitFor(ctx context.Context, t *testing.T, ask func() (string, error)) string {
	t.Helper()
	for {
		answer, err := ask()
		if err == nil {
			return answer
		}
		select {
		case <-ctx.Done():
			t.Errorf("%v: %v", context.Cause(ctx), err)
			return answer
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// ready returns the kubelet's view of a pod once its only container is ready and has been restarted so many times.
func ready(ctx context.Context, k *node.Kubelet, pod string, restarts float64) (string, error) {
	content, err := k.Get(ctx, "/pods")
	if err != nil {
		return "", err
	}
	var list struct {
		Items []struct {
			Metadata struct{ Name string }
			Status   struct{ ContainerStatuses []map[string]any }
		}
	}
	var whole struct{ Items []json.RawMessage }
	if err := errors.Join(json.Unmarshal(content, &list), json.Unmarshal(content, &whole)); err != nil {
		return "", err
	}
	for i, item := range list.Items {
		if item.Metadata.Name != pod {
			continue
		}
		containers := item.Status.ContainerStatuses
		if len(containers) != 1 || containers[0]["ready"] != true || containers[0]["restartCount"] != restarts {
			return string(whole.Items[i]), fmt.Errorf("pod %s is not ready: %v", pod, containers)
		}
		indented, err := json.MarshalIndent(whole.Items[i], "", " ")
		return string(indented), err
	}
	return "", fmt.Errorf("no pod %s among %s", pod, content)
}

// summaryFields are the names of all statistics of a pod, one a line.
func summaryFields(ctx context.Context, k *node.Kubelet, pod string) (string, error) {
	content, err := k.Get(ctx, "/stats/summary")
	if err != nil {
		return "", err
	}
	var summary struct{ Pods []map[string]any }
	if err := json.Unmarshal(content, &summary); err != nil {
		return "", err
	}
	fields := map[string]bool{}
	var collect func(prefix string, value any)
	collect = func(prefix string, value any) {
		switch value := value.(type) {
		case map[string]any:
			for name, field := range value {
				collect(prefix+"."+name, field)
			}
		case []any:
			for _, element := range value {
				collect(prefix, element)
			}
		default:
			fields[strings.TrimPrefix(prefix, ".")] = true
		}
	}
	for _, p := range summary.Pods {
		if p["podRef"].(map[string]any)["name"] == pod {
			collect("", p)
		}
	}
	return strings.Join(slices.Sorted(maps.Keys(fields)), "\n"), nil
}

var masks = []struct {
	pattern *regexp.Regexp
	mask    string
}{
	{regexp.MustCompile(`\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)`), "TIME"},
	{regexp.MustCompile(`\b[0-9a-f]{64}\b`), "ID"},
	{regexp.MustCompile(`\bcni-[0-9a-f-]{36}\b`), "NETWORK"},
	{regexp.MustCompile(`\b10\.88\.\d+\.\d+\b`), "ADDRESS"},
	{regexp.MustCompile(`\bcount \d+\b`), "count N"},
}

// mask replaces what differs from one run to the next.
func mask(text string) string {
	for _, m := range masks {
		text = m.pattern.ReplaceAllString(text, m.mask)
	}
	return text
}
