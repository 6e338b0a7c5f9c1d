package vm

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"crishim/test/documents"
	"crishim/test/node"
)

// documentsDir is where the package has the documents.
const documentsDir = "/usr/share/doc/crishim"

// commandsInDocuments types the commands of the documents, page by page, in the order in which they stand there: crishim is installed, and the
// kubelet uses it.
func commandsInDocuments(t *testing.T, k *node.Kubelet) {
	pages, err := documents.Read(documentsDir)
	if err != nil {
		t.Fatal(err)
	}
	runPod(t, k, node.Pod{Name: "web", Container: map[string]any{"name": "app"}})
	const container = "default/web-machine/app" // the kubelet appends the node's name
	dir, evidence := t.TempDir(), "/var/lib/evidence"
	t.Cleanup(func() {
		if err := errors.Join(os.RemoveAll(evidence), os.RemoveAll("/data/web.tar")); err != nil {
			t.Error(err)
		}
	})
	for _, name := range []string{"before.tar", "after.tar"} {
		output(t, "crishim", "checkpoint", container, "-o", filepath.Join(dir, name))
	}
	output(t, "cp", filepath.Join(dir, "after.tar"), filepath.Join(dir, "checkpoint.tar"))
	typed := 0
	for _, page := range pages {
		for _, block := range page.Blocks {
			for _, line := range block.CommandLines() {
				program, _, _ := strings.Cut(line, " ")
				if !slices.Contains(documents.Programs, program) || documents.Elsewhere(line) != "" {
					continue
				}
				typed++
				id := ""
				if strings.Contains(line, "mif3k2x9") {
					id = latest(t)
				}
				as := strings.NewReplacer("default/web/app", container, "ARCHIVE", "/data/web.tar", "mif3k2x9", id).Replace(line)
				cmd := exec.CommandContext(t.Context(), "sh", "-ec", as)
				cmd.Dir = dir
				if _, err := os.Stat(evidence); err == nil && strings.Contains(page.Path, "forensics") {
					cmd.Dir = evidence
				}
				var out bytes.Buffer
				cmd.Stdout, cmd.Stderr = &out, &out
				err := cmd.Run()
				differs := strings.HasPrefix(line, "crishim diff ") || strings.HasPrefix(line, "crishim kubelet status")
				if err != nil && !(differs && cmd.ProcessState.ExitCode() == 1) {
					t.Errorf("%s: %s: %v\n%s", page.Path, as, err, out.String())
				}
			}
		}
		// The last page that speaks of it takes the kubelet away.
		output(t, "crishim", "kubelet", "enable")
	}
	t.Logf("%d commands were typed", typed)
	if typed < 30 {
		t.Errorf("%d commands were found: the documents have more", typed)
	}
	if err := k.RemovePod(t.Context(), "web"); err != nil {
		t.Error(err)
	}
}

// latest is the id of the last checkpoint whose archive is there.
func latest(t *testing.T) string {
	t.Helper()
	var answer struct {
		Checkpoints []struct {
			Checkpoint struct {
				ID, Deleted string
				Code        int
			}
		}
	}
	if err := json.Unmarshal([]byte(output(t, "crishim", "list", "--output", "json")), &answer); err != nil {
		t.Fatal(err)
	}
	for _, c := range slices.Backward(answer.Checkpoints) {
		if c.Checkpoint.Code == 0 && c.Checkpoint.Deleted == "" {
			return c.Checkpoint.ID
		}
	}
	return "none"
}
