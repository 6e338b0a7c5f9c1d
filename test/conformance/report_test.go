package conformance

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"time"
)

// outcome is how a spec ended that was run.
type outcome struct {
	// state is ginkgo's: passed, failed, skipped where the spec itself found that it cannot run here, timedout, and others.
	state string
	// why is what a failure or a skip says.
	why string
	// output is the end of what a spec has written that did not pass.
	output string
	took   time.Duration
}

// readReport returns the outcomes of the specs that were run, by their names, and of what prepares the suite where that has failed.
func readReport(path string) (map[string]outcome, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, fmt.Errorf("read report: %w", err)
	}
	var reports []struct {
		SpecReports []struct {
			ContainerHierarchyTexts    []string
			LeafNodeType, LeafNodeText string
			State                      string
			NumAttempts                int // none where it was not selected
			RunTime                    time.Duration
			Failure                    struct{ Message string }
			CapturedGinkgoWriterOutput string
		}
	}
	if err := json.Unmarshal(content, &reports); err != nil {
		return nil, fmt.Errorf("read report: %w", err)
	}
	outcomes := map[string]outcome{}
	for _, report := range reports {
		for _, spec := range report.SpecReports {
			name := strings.Join(append(spec.ContainerHierarchyTexts, spec.LeafNodeText), " ")
			switch {
			case spec.LeafNodeType == "It" && spec.NumAttempts == 0, spec.LeafNodeType != "It" && spec.State == "passed":
				continue
			case spec.LeafNodeType != "It":
				name = spec.LeafNodeType
			}
			if _, twice := outcomes[name]; twice && spec.LeafNodeType == "It" {
				return nil, fmt.Errorf("read report: two specs are called %q", name)
			}
			o := outcome{state: spec.State, why: spec.Failure.Message, took: spec.RunTime}
			if o.state != "passed" {
				o.output = end(spec.CapturedGinkgoWriterOutput)
			}
			outcomes[name] = o
		}
	}
	return outcomes, nil
}

// end is the end of a long text.
func end(text string) string { return text[max(0, len(text)-8192):] }

// counts says how many specs have which state.
func counts(outcomes map[string]outcome) string {
	states := map[string]int{}
	for _, o := range outcomes {
		states[o.state]++
	}
	var parts []string
	for _, state := range slices.Sorted(maps.Keys(states)) {
		parts = append(parts, fmt.Sprintf("%d %s", states[state], state))
	}
	return strings.Join(parts, ", ")
}

// complaints says which of the wanted specs have not passed, and what else has not.
func complaints(outcomes map[string]outcome, wanted []string) []string {
	var all []string
	for _, name := range wanted {
		if _, ran := outcomes[name]; !ran {
			all = append(all, name+": was not run")
		}
	}
	for _, name := range slices.Sorted(maps.Keys(outcomes)) {
		if o := outcomes[name]; o.state != "passed" {
			all = append(all, fmt.Sprintf("%s: %s: %s\n%s", name, o.state, o.why, o.output))
		}
	}
	return all
}

// compare says which specs have not ended alike, apart from the one that containerd cannot pass, and which have failed directly that are not
// known to.
func compare(direct, through map[string]outcome, known map[string]string) []string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(direct)) {
		d, t := direct[name], through[name]
		switch {
		case name == checkpointSpec:
		case t.state == "":
			all = append(all, fmt.Sprintf("%s: %s directly, not run through crishim", name, d.state))
		case d.state != t.state:
			all = append(all, fmt.Sprintf("%s: %s directly, %s through crishim: %s\n%s", name, d.state, t.state, d.why+t.why, d.output+t.output))
		case d.state != "passed" && d.state != "skipped" && known[name] == "":
			all = append(all, fmt.Sprintf("%s: %s, and is not known to: %s\n%s", name, d.state, d.why, d.output))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(through)) {
		if _, ran := direct[name]; !ran && name != checkpointSpec {
			all = append(all, fmt.Sprintf("%s: not run directly, %s through crishim", name, through[name].state))
		}
	}
	if o := through[checkpointSpec]; o.state != "passed" {
		all = append(all, fmt.Sprintf("%s: %q through crishim: %s\n%s", checkpointSpec, o.state, o.why, o.output))
	}
	return all
}
