// Package conformance runs Kubernetes' own node end-to-end suite with a kubelet in front of crishim: what passes directly on containerd
// passes through crishim, and the spec that checkpoints a container passes, which containerd 1.7 cannot do.
package conformance

import (
	"flag"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"crishim/test/node"
)

var long = flag.Bool("long", false, "run all specs of NodeConformance that are neither serial nor slow, directly on containerd too, and compare")

// TestConformance runs some specs, through crishim only, of which each passes. With -long, it runs all of them, directly on containerd and
// through crishim, and each ends as it does directly.
func TestConformance(t *testing.T) {
	binary := node.Crishim(t)
	if !*long {
		through := runSuite(t, binary, someSpecs()...)
		for _, complaint := range complaints(through, some) {
			t.Error(complaint)
		}
		return
	}
	var direct, through map[string]outcome
	// Specs wait for most of their time: both ways at once take little longer than one.
	ran := t.Run("run", func(t *testing.T) {
		t.Run("directly", func(t *testing.T) {
			t.Parallel()
			direct = runSuite(t, "", allSpecs()...)
		})
		t.Run("through crishim", func(t *testing.T) {
			t.Parallel()
			through = runSuite(t, binary, allSpecs()...)
		})
	})
	if !ran {
		return
	}
	for _, complaint := range compare(direct, through, known) {
		t.Error(complaint)
	}
}

// runSuite runs specs on a node of their own, with the kubelet in front of that crishim, or of containerd if there is none.
func runSuite(t *testing.T, crishim string, args ...string) map[string]outcome {
	t.Helper()
	n := node.StartContainerdFor(t, node.Options{Suite: true})
	endpoint, way := node.ContainerdSocket, "directly"
	if crishim != "" {
		if _, err := n.StartCrishim(t.Context(), crishim); err != nil {
			t.Fatal(err)
		}
		endpoint, way = node.CrishimSocket, "through crishim"
	}
	cmd, err := n.SuiteCommand(t.Context(), endpoint, args...)
	if err != nil {
		t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(t.TempDir(), "log"), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd.Stdout, cmd.Stderr = log, log
	start := time.Now()
	runErr := cmd.Run() // an error where any spec fails
	took := time.Since(start)
	outcomes, err := readReport(n.Path(node.SuiteReports + "/report.json"))
	if err != nil || len(outcomes) == 0 {
		content, logErr := os.ReadFile(log.Name())
		t.Fatalf("the suite has not run %s: %v, %v, %v\n%s", way, runErr, err, logErr, end(string(content)))
	}
	t.Logf("%s: %s, in %s", way, counts(outcomes), took.Round(time.Second))
	for _, name := range slices.Sorted(maps.Keys(outcomes)) {
		if o := outcomes[name]; o.state != "passed" {
			t.Logf("%s, %s: %s: %s", way, name, o.state, o.why)
		}
	}
	return outcomes
}
