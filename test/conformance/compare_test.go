package conformance

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestCompare(t *testing.T) {
	passed, failed, skipped := outcome{state: "passed"}, outcome{state: "failed"}, outcome{state: "skipped"}
	known := map[string]string{"known": "a reason"}
	for _, test := range []struct {
		name            string
		direct, through map[string]outcome
		want            []string // the beginnings of the complaints
	}{
		{
			name:    "alike",
			direct:  map[string]outcome{checkpointSpec: skipped, "a": passed, "b": skipped, "known": failed},
			through: map[string]outcome{checkpointSpec: passed, "a": passed, "b": skipped, "known": failed},
		},
		{
			name:    "the checkpoint is skipped",
			direct:  map[string]outcome{checkpointSpec: skipped},
			through: map[string]outcome{checkpointSpec: skipped},
			want:    []string{checkpointSpec + `: "skipped" through crishim`},
		},
		{
			name: "the checkpoint is not run",
			want: []string{checkpointSpec + `: "" through crishim`},
		},
		{
			name:    "different",
			direct:  map[string]outcome{"a": passed, "b": passed, "c": failed, "known": failed},
			through: map[string]outcome{"a": failed, "b": skipped, "c": passed, "known": passed, checkpointSpec: passed},
			want: []string{"a: passed directly, failed through crishim", "b: passed directly, skipped", "c: failed directly, passed",
				"known: failed directly, passed"},
		},
		{
			name:    "not both run",
			direct:  map[string]outcome{"a": passed},
			through: map[string]outcome{"b": passed, checkpointSpec: passed},
			want:    []string{"a: passed directly, not run", "b: not run directly, passed"},
		},
		{
			name:    "both fail",
			direct:  map[string]outcome{"a": failed},
			through: map[string]outcome{"a": failed, checkpointSpec: passed},
			want:    []string{"a: failed, and is not known to"},
		},
	} {
		t.Run(test.name, func(t *testing.T) { matches(t, compare(test.direct, test.through, known), test.want) })
	}
}

func TestComplaints(t *testing.T) {
	outcomes := map[string]outcome{"a": {state: "passed"}, "b": {state: "skipped", why: "not here"}, "SynchronizedBeforeSuite": {state: "failed"}}
	matches(t, complaints(outcomes, []string{"a", "b", "c"}), []string{"c: was not run", "SynchronizedBeforeSuite: failed", "b: skipped: not here"})
}

func matches(t *testing.T, got, want []string) {
	t.Helper()
	if len(got) != len(want) {
		t.Fatalf("got %q", got)
	}
	for i := range got {
		if !strings.HasPrefix(got[i], want[i]) {
			t.Errorf("got %q, want %q", got[i], want[i])
		}
	}
}

func TestReadReport(t *testing.T) {
	path := filepath.Join(t.TempDir(), "report.json")
	const report = `[{"SpecReports": [
		{"LeafNodeType": "SynchronizedBeforeSuite", "State": "passed", "NumAttempts": 1},
		{"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig]", "A"], "LeafNodeText": "works", "State": "passed", "NumAttempts": 1, "RunTime": 1000},
		{"LeafNodeType": "It", "ContainerHierarchyTexts": ["[sig]", "A"], "LeafNodeText": "is not selected", "State": "skipped", "NumAttempts": 0},
		{"LeafNodeType": "It", "ContainerHierarchyTexts": null, "LeafNodeText": "cannot", "State": "skipped", "NumAttempts": 1,
			"Failure": {"Message": "not here"}, "CapturedGinkgoWriterOutput": "looked"},
		{"LeafNodeType": "SynchronizedAfterSuite", "State": "failed", "NumAttempts": 1, "Failure": {"Message": "broken"}}
	]}]`
	if err := os.WriteFile(path, []byte(report), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := readReport(path)
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]outcome{
		"[sig] A works":          {state: "passed", took: 1000},
		"cannot":                 {state: "skipped", why: "not here", output: "looked"},
		"SynchronizedAfterSuite": {state: "failed", why: "broken"},
	}
	for name, o := range want {
		if got[name] != o {
			t.Errorf("%s: %+v", name, got[name])
		}
	}
	if len(got) != len(want) {
		t.Errorf("got %v", got)
	}
	if counts(got) != "1 failed, 1 passed, 1 skipped" {
		t.Errorf("counts are %s", counts(got))
	}
}
