package criu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func TestDiagnoseLog(t *testing.T) {
	const noiseLine = "(00.001044) Error (criu/util.c:1503): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
	tests := []struct {
		name        string
		log         string
		want        string // of the message
		unsupported bool
		is          error
	}{
		{
			name: "a known limit, with the task at which it was met",
			log: noiseLine + `(00.020000) Dumping task (pid: 4711 comm: web server)
(00.020100) Error (criu/sk-inet.c:191): inet: Unsupported proto 262 for socket c18c
(00.020200) Error (criu/cr-dump.c:1669): Dump files (pid: 4711) failed with -1
(00.020300) Error (criu/cr-dump.c:2128): Dumping FAILED.
`,
			want:        "criu cannot dump the container, at pid 4711 (web server): inet: Unsupported proto 262 for socket c18c: MPTCP sockets cannot be dumped; for a Go server set GODEBUG=multipathtcp=0 in the container",
			unsupported: true,
		},
		{
			name: "a connected socket",
			log: `(00.03) Dumping task (pid: 7 comm: sh)
(00.04) Error (criu/sk-inet.c:218): inet: Connected TCP socket, consider using --tcp-established option.
(00.05) Error (criu/cr-dump.c:2128): Dumping FAILED.
`,
			want:        "criu cannot dump the container, at pid 7 (sh): inet: Connected TCP socket, consider using --tcp-established option.: close the connection first",
			unsupported: true,
			is:          errConnectedTCP,
		},
		{
			name: "a full disk, which is no fault of the container's",
			log:  "(00.1) Error (criu/bfd.c:1): bfd: Error flushing image: No space left on device\n",
			want: "criu cannot dump the container: bfd: Error flushing image: No space left on device: make room at the location, or choose one on another file system",
			is:   unix.ENOSPC,
		},
		{
			name: "an unknown cause: the last lines, without the noise",
			log: noiseLine + `(00.1) Error (criu/a.c:1): first
(00.2) Error (criu/a.c:2): second
(00.2) Error (criu/a.c:2): third
(00.2) Error (criu/a.c:2): third
(00.3) Error (criu/a.c:3): fourth
(00.4) Error (criu/cr-dump.c:2128): Dumping FAILED.
`,
			want: "criu cannot dump the container: third; fourth",
		},
		{
			name: "only noise",
			log:  noiseLine,
			want: "criu cannot dump the container: its log names no cause (operation failed)",
		},
		{
			name: "nothing at all",
			want: "criu cannot dump the container: its log names no cause (operation failed)",
		},
		{
			name: "a cause without end",
			log:  "(00.1) Error (criu/a.c:1): " + strings.Repeat("x", 1000),
			want: "criu cannot dump the container: " + strings.Repeat("x", 400) + "…",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err := diagnoseLog(strings.NewReader(test.log), errors.New("operation failed"))
			if err.Error() != test.want {
				t.Errorf("message is\n%s\nwant\n%s", err, test.want)
			}
			if err.Unsupported() != test.unsupported {
				t.Errorf("unsupported is %t, want %t", err.Unsupported(), test.unsupported)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("is not %v", test.is)
			}
		})
	}
}

func TestDiagnoseKeepsTheEndOfTheLog(t *testing.T) {
	err := diagnoseLog(strings.NewReader(strings.Repeat("line\n", 30)+"last\n"), errors.New("operation failed"))
	if len(err.Log) != 20 || err.Log[19] != "last" {
		t.Errorf("kept %d lines, the last is %q", len(err.Log), err.Log[len(err.Log)-1])
	}
}

// On a full disk the log, too, ends where the room ended.
func TestDiagnoseOfALogCutOffByAFullDisk(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts a tmpfs")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=128k"); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := os.WriteFile(filepath.Join(dir, "dump.log"), []byte("(00.2) Error (criu/page-xfer.c:263): page-xfer: Unable to spice data: No sp"), 0o600); err != nil {
		t.Fatal(err)
	}
	work, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer work.Close()
	if err := diagnose(work, errors.New("operation failed")); errors.Is(err, unix.ENOSPC) {
		t.Errorf("with room left it is %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	if err := diagnose(work, errors.New("operation failed")); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "No space left on device: make room") {
		t.Errorf("with none left it is %v", err)
	}
}

// A container names its processes and files, so it has a say in what stands in the log.
func FuzzDiagnoseLog(f *testing.F) {
	f.Add("(00.02) Dumping task (pid: 1 comm: a) b)\n(00.02) Error (criu/x.c:1): Unsupported proto 262\n")
	f.Add("Error (: \n\x00\xff")
	f.Fuzz(func(t *testing.T, log string) {
		err := diagnoseLog(strings.NewReader(log), errors.New("operation failed"))
		if err.Cause == "" {
			t.Error("no cause")
		}
		if len(err.Cause) > 500 {
			t.Errorf("cause has %d bytes", len(err.Cause))
		}
	})
}
