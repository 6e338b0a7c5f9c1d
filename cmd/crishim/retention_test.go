package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// ownArchive makes an archive as crishim does, checkpointed so many hours ago.
func ownArchive(t *testing.T, path string, hours int) {
	t.Helper()
	made := time.Now().Add(-time.Duration(hours) * time.Hour).Format(time.RFC3339)
	from := archiveWith(t,
		`config.dump={"id":"0123","checkpointedTime":"`+made+`"}`, `spec.dump={}`,
		`status.dump={"labels":{"io.kubernetes.pod.namespace":"shop","io.kubernetes.pod.name":"web-0","io.kubernetes.container.name":"nginx"}}`,
		"checkpoint/", `crishim.json={"version":1}`)
	if err := os.Rename(from, path); err != nil {
		t.Fatal(err)
	}
}

func TestRetentionIsPrinted(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: directories of others are refused")
	}
	dir, err := os.MkdirTemp("", "crishim-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	for i := range 4 {
		ownArchive(t, filepath.Join(dir, fmt.Sprintf("checkpoint-%d.tar", i)), 10-i)
	}
	for name, content := range map[string]string{"checkpoint-0.tar.keep": "", "checkpoint-mine.tar": "precious"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	reader, err := os.Open(filepath.Join(dir, "checkpoint-1.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	file := filepath.Join(t.TempDir(), "config.toml")
	if err := os.WriteFile(file, fmt.Appendf(nil, "[retention]\ndirectories = [%q]\nmax_per_container = 1\n", dir), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := execute(t, "retention", "--config", file)
	if err != nil {
		t.Fatal(err)
	}
	text := strings.Join(strings.Fields(out), " ")
	for _, want := range []string{
		dir + " checkpoint-0.tar shop/web-0/nginx 5.5 KiB 10h0m0s old keep: there is a file .keep beside it",
		" 9h0m0s old keep: somebody has it open", " 8h0m0s old remove: of its container at most 1 stay, and 1 are younger",
		" 7h0m0s old keep ", "checkpoint-mine.tar passed over: not an archive of crishim's",
	} {
		if !strings.Contains(text, want) {
			t.Errorf("it does not say %q:\n%s", want, out)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "checkpoint-?.tar")); len(left) != 4 {
		t.Errorf("there are %q left", left)
	}

	if out, err := execute(t, "retention", "--config", os.DevNull+"/none"); err == nil {
		t.Errorf("a file that is missing: %s", out)
	}
}
