package matrix

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
)

const document = "../../docs/compatibility.md"

// column is where a row was run.
type column struct{ runtime, cgroup string }

var columns = []column{{"runc", "v1"}, {"runc", "v2"}, {"crun", "v1"}, {"crun", "v2"}}

// limitAt is the limit that a row has in a column, nil if it has none.
func (r row) limitAt(c column) *limit {
	for i, l := range r.limits {
		if (l.runtime == "" || l.runtime == c.runtime) && (l.cgroup == "" || l.cgroup == c.cgroup) {
			return &r.limits[i]
		}
	}
	return nil
}

// judge fails the test unless a container got as far as it should have: to the end or, where there is a limit, to the step and
// the words that the limit names. It says whether it did.
func (r row) judge(t *testing.T, c column, o outcome) bool {
	t.Helper()
	l := r.limitAt(c)
	if l != nil && l.unless != nil && l.unless.met {
		l = nil
	}
	switch {
	case l == nil && o.failed != finished:
		t.Errorf("%s: %v", o.failed, o.err)
	case l != nil && o.failed == finished:
		t.Errorf("there is no limit any more, take it out of the row: %s", l.reason)
	case l != nil && o.failed != l.step:
		t.Errorf("%s, where %s was to fail: %v", o.failed, l.step, o.err)
	case l != nil && !strings.Contains(o.err.Error(), l.text):
		t.Errorf("%s: %v\nwant the words %q", o.failed, o.err, l.text)
	}
	return !t.Failed()
}

// table is where rows went as they should, by row and column.
type table struct {
	mu   sync.Mutex
	good map[string]bool
}

func (t *table) add(r row, c column, good bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.good == nil {
		t.good = map[string]bool{}
	}
	t.good[fmt.Sprint(r.name, c)] = good
}

// missing is what has not been run here, or did not go as it should. make compatibility has run before what runs in the virtual
// machine.
func (t *table) missing() []string {
	var missing []string
	for _, section := range sections() {
		for _, row := range section.rows {
			for _, c := range columns {
				if !row.inMachine(c.cgroup) && !t.good[fmt.Sprint(row.name, c)] {
					missing = append(missing, fmt.Sprintf("%s on %s and cgroup %s", row.name, c.runtime, c.cgroup))
				}
			}
		}
	}
	return missing
}

// compare compares the document with what was seen, or writes it. Every row that has run went as its limits, or their absence,
// say: so the document is what follows from the rows.
func (t *table) compare(test *testing.T) {
	test.Helper()
	whole := render()
	if *update {
		if missing := t.missing(); missing != nil {
			test.Fatalf("-update: only a run of all rows can write the table; missing are %q", missing)
		}
		if err := os.WriteFile(document, []byte(whole), 0o644); err != nil {
			test.Fatal(err)
		}
		return
	}
	content, err := os.ReadFile(document)
	if err != nil {
		test.Fatal(err)
	}
	if said := string(content); said != whole {
		n := 0
		for n < min(len(said), len(whole)) && said[n] == whole[n] {
			n++
		}
		line := strings.Count(whole[:n], "\n")
		test.Errorf("docs/compatibility.md is not what was seen; make compatibility writes it. It should say in line %d\n%s",
			line+1, strings.Split(whole, "\n")[line])
	}
}

// The document names no test that does not exist.
func TestTestsElsewhere(t *testing.T) {
	for _, e := range testedElsewhere() {
		content, err := os.ReadFile("../" + e.file)
		if err != nil {
			t.Error(err)
		} else if !strings.Contains(string(content), "\nfunc "+e.test+"(") {
			t.Errorf("%s has no %s", e.file, e.test)
		}
	}
}

const introduction = `# Compatibility

Containers that crishim checkpoints and that their own OCI runtime restores: each was checkpointed through the CRI, went on
undisturbed, was restored on another node, and was in the same state there. A cell says how far it got on a runtime and a version of cgroups.
The table is made by the tests (make compatibility), which fail when it is no longer true.

`

// render makes the document of rows that went as they should.
func render() string {
	var b strings.Builder
	b.WriteString(introduction)
	var notes []string
	for _, section := range sections() {
		fmt.Fprintf(&b, "## %s\n\n| container | what it holds |", section.title)
		for _, c := range columns {
			fmt.Fprintf(&b, " %s %s: dump | restore |", c.runtime, c.cgroup)
		}
		b.WriteString("\n|---|---|" + strings.Repeat("---|---|", len(columns)) + "\n")
		for _, row := range section.rows {
			fmt.Fprintf(&b, "| %s | %s |", row.name, row.what)
			for _, c := range columns {
				for _, s := range []step{dumping, restoring} {
					fmt.Fprintf(&b, " %s |", cell(row, c, s, &notes))
				}
			}
			b.WriteString("\n")
		}
		b.WriteString("\n")
	}
	b.WriteString("## With tests of their own\n\n| container | what it is | dumped and restored with | test |\n|---|---|---|---|\n")
	for _, e := range testedElsewhere() {
		fmt.Fprintf(&b, "| %s | %s | %s | [%s](../test/%s) |\n", e.name, e.what, e.seen, e.test, e.file)
	}
	b.WriteString("\n")
	if len(notes) > 0 {
		b.WriteString("## Notes\n\n")
	}
	for i, note := range notes {
		fmt.Fprintf(&b, "%d. %s\n", i+1, note)
	}
	return b.String()
}

// cell says whether a step succeeds, and adds its note to those that there are.
func cell(r row, c column, s step, notes *[]string) string {
	l := r.limitAt(c)
	switch {
	case (l == nil || l.step == restoring && s == dumping) && r.inMachine(c.cgroup):
		return fmt.Sprintf("yes [%d]", number(machineNote, notes))
	case l == nil || l.step == restoring && s == dumping:
		return "yes"
	}
	n := number(fmt.Sprintf("%s The error says: `%s`", l.reason, l.text), notes)
	if l.unless != nil {
		return fmt.Sprintf("with %s [%d]", l.unless.name, n)
	}
	return fmt.Sprintf("no [%d]", n)
}

const machineNote = "Seen in a virtual machine (make test-vm-matrix): Linux 6.12, cgroup v2 with all controllers, all capabilities, " +
	"huge pages, swap."

// number is the number of a note, which is added to those that there are.
func number(note string, notes *[]string) int {
	i := slices.Index(*notes, note)
	if i < 0 {
		i = len(*notes)
		*notes = append(*notes, note)
	}
	return i + 1
}
