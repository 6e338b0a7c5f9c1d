package main

import (
	"archive/tar"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// archiveWith writes an archive of these members, empty or not as they come, into a file.
func archiveWith(t *testing.T, members ...string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "checkpoint.tar")
	file, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(file)
	for _, member := range members {
		name, content, _ := strings.Cut(member, "=")
		header := &tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content))}
		if strings.HasSuffix(name, "/") {
			header.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	return path
}

var soundMembers = []string{
	`config.dump={"id":"0123","name":"web","runtime":"runc"}`, `spec.dump={}`, `status.dump={}`, "checkpoint/",
	"checkpoint/inventory.img=i", "checkpoint/pstree.img=" + "\x19CVT" + "\x30\x30\x27\x50", "checkpoint/descriptors.json=[]",
}

func TestVerifyExitCodes(t *testing.T) {
	sound := archiveWith(t, soundMembers...)
	without := archiveWith(t, soundMembers[1:]...)
	for name, test := range map[string]struct {
		args []string
		code int
		says string // on standard output, or in the error
	}{
		"sound":             {[]string{sound}, 0, "runtime  runc"},
		"not sound":         {[]string{without}, 1, "problem  config.dump is missing"},
		"no such file":      {[]string{sound + "-not"}, 2, "no such file"},
		"a directory":       {[]string{filepath.Dir(sound)}, 2, "not a regular file"},
		"no archive":        {nil, 2, "accepts 1 arg"},
		"a flag of nowhere": {[]string{"--fast", sound}, 2, "unknown flag"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := execute(t, append([]string{"verify"}, test.args...)...)
			code := 0
			if err != nil {
				code = exitCode(err)
				out += err.Error()
			}
			if code != test.code || !strings.Contains(out, test.says) {
				t.Errorf("exit code %d with\n%s\nwant %d with %q", code, out, test.code, test.says)
			}
		})
	}
}
