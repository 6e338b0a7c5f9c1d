package criu

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"unicode/utf8"

	"golang.org/x/sys/unix"
)

func TestDiagnoseLog(t *testing.T) {
	const noiseLine = "(00.001044) Error (criu/util.c:1503): rlimit: Can't setup RLIMIT_NOFILE for self: Operation not permitted\n"
	tests := []struct {
		name  string
		log   string
		cause string
		kind  Kind
		at    place
		is    error
	}{
		{
			name: "a descriptor",
			log: noiseLine + `(00.020000) Dumping task (pid: 4711 comm: web server)
(00.020050) 4711 fdinfo 3: pos:                0 flags:             4002/0x1
(00.020060) Dumping path for 3 fd via self 17 [/var/log/x]
(00.020090) 4711 fdinfo 5: pos:                0 flags:             4002/0x1
(00.020100) Error (criu/sk-inet.c:191): inet: Unsupported proto 262 for socket c18c
(00.020150) ----------------------------------------
(00.020200) Error (criu/cr-dump.c:1669): Dump files (pid: 4711) failed with -1
(00.020300) Error (criu/cr-dump.c:2128): Dumping FAILED.
`,
			cause: "inet: Unsupported proto 262 for socket c18c", kind: Unsupported,
			at: place{pid: 4711, comm: "web server", fd: 5},
		},
		{
			name: "a file with a path",
			log: `(00.107490) Dumping task (pid: 8 comm: a) b)
(00.107492) 8 fdinfo 5: pos:                0 flags:           100002/0x1
(00.107494) Dumping path for 5 fd via self 23 [/tmp/a [b] (deleted)]
(00.107512) Error (criu/files-reg.c:1131): Can't link remap to tmp/a [b]: Read-only file system
`,
			cause: "Can't link remap to tmp/a [b]: Read-only file system", kind: Unsupported,
			at: place{pid: 8, comm: "a) b", fd: 5, path: "tmp/a [b]"},
		},
		{
			name:  "a mount",
			log:   "(00.08) Error (criu/mount.c:753): mnt: 173:./sys/firmware doesn't have a proper root mount\n",
			cause: "mnt: 173:./sys/firmware doesn't have a proper root mount", kind: Unsupported,
			at: place{fd: -1, mount: "/sys/firmware"},
		},
		{
			name:  "a mount of an unknown kind",
			log:   "(00.08) Error (criu/mount.c:724): mnt: FS mnt ./mnt/x y dev 0x30 root / unsupported id 4\n",
			cause: "mnt: FS mnt ./mnt/x y dev 0x30 root / unsupported id 4", kind: Unsupported,
			at: place{fd: -1, mount: "/mnt/x y"},
		},
		{
			name: "a process that the error names",
			log: `(00.03) Dumping task (pid: 7 comm: sh)
(00.04) 7 fdinfo 0: pos: 0
(00.05) Error (criu/cr-dump.c:478): Task 907 with SysVIPC shmem map @7fba79a4f000 doesn't live in IPC ns
`,
			cause: "Task 907 with SysVIPC shmem map @7fba79a4f000 doesn't live in IPC ns", kind: Unsupported,
			at: place{pid: 907, comm: "", fd: -1},
		},
		{
			name: "a socket, found when all tasks are done",
			log: `(00.02) Dumping task (pid: 7 comm: sh)
(00.16) unix: 	Runaway socket: ino 466947 peer_ino 486117 family    1 type    2 state  7 name /data/vol/gram
(00.16) Error (criu/sk-unix.c:874): unix: External socket is used. Consider using --ext-unix-sk option.
`,
			cause: "unix: External socket is used. Consider using --ext-unix-sk option.", kind: Unsupported,
			at: place{pid: 7, comm: "sh", fd: -1, socket: "486117", path: "/data/vol/gram"},
		},
		{
			name:  "a process that does not stop",
			log:   "(10.2) Error (criu/seize.c:635): Unable to freeze cgroup /sys/fs/cgroup/freezer/pods/x (96 x 100ms attempts, timeout: 10s)\n",
			cause: "Unable to freeze cgroup /sys/fs/cgroup/freezer/pods/x (96 x 100ms attempts, timeout: 10s)", kind: Busy,
			at: place{fd: -1},
		},
		{
			name:  "a full disk",
			log:   "(00.1) Error (criu/bfd.c:1): bfd: Error flushing image: No space left on device\n",
			cause: "bfd: Error flushing image: No space left on device", kind: NoSpace,
			at: place{fd: -1},
		},
		{
			name: "a connected socket",
			log: `(00.04) Error (criu/sk-inet.c:218): inet: Connected TCP socket, consider using --tcp-established option.
(00.05) Error (criu/cr-dump.c:2128): Dumping FAILED.
`,
			cause: "inet: Connected TCP socket, consider using --tcp-established option.",
			at:    place{fd: -1},
			is:    errConnectedTCP,
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
			cause: "third; fourth",
			at:    place{fd: -1},
		},
		{
			name:  "only noise",
			log:   noiseLine,
			cause: "its log names no cause (operation failed)",
		},
		{
			name:  "nothing at all",
			cause: "its log names no cause (operation failed)",
		},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			err, at := diagnoseLog(strings.NewReader(test.log), errors.New("operation failed"))
			if err.Cause != test.cause || err.Kind() != test.kind {
				t.Errorf("cause is %q, of kind %d; want %q, of kind %d", err.Cause, err.Kind(), test.cause, test.kind)
			}
			if at != test.at {
				t.Errorf("place is %+v, want %+v", at, test.at)
			}
			if test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("is not %v", test.is)
			}
		})
	}
}

func TestDiagnoseKeepsTheEndOfTheLog(t *testing.T) {
	err, _ := diagnoseLog(strings.NewReader(strings.Repeat("line\n", 30)+"last\n"), errors.New("operation failed"))
	if len(err.Log) != 20 || err.Log[19] != "last" {
		t.Errorf("kept %d lines, the last is %q", len(err.Log), err.Log[len(err.Log)-1])
	}
}

// However long and odd what the container has chosen is: one line, and the advice is in it.
func TestErrorIsALine(t *testing.T) {
	long := strings.Repeat("\n\x1b\xff\u202e", 1000)
	for i := range limits {
		at := place{pid: 1 << 22, comm: long, fd: 1 << 20, path: long}
		err := &Error{Limit: &limits[i], Place: Container{Pid: os.Getpid()}.describe(at), Cause: long}
		text := err.Error()
		if utf8.RuneCountInString(text) > 512 || printable(text) != text || !strings.HasSuffix(text, ": "+limits[i].Advice) {
			t.Errorf("%s: %d bytes: %s", limits[i].Name, len(text), text)
		}
		if len(text)-strings.Index(text, "descriptor 1048576") < 200 {
			t.Errorf("%s: too little is left for the cause: %s", limits[i].Name, text)
		}
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
	diagnose := func() *Error {
		err := Dump{Work: work}.diagnose(errors.New("operation failed"))
		var result *Error
		if !errors.As(err, &result) {
			t.Fatal(err)
		}
		return result
	}
	if err := diagnose(); err.Kind() != Unknown {
		t.Errorf("with room left it is %v", err)
	}
	if err := os.WriteFile(filepath.Join(dir, "pages-1.img"), make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("filling the disk: %v", err)
	}
	if err := diagnose(); err.Kind() != NoSpace || !strings.Contains(err.Error(), "No space left on device: make room") {
		t.Errorf("with none left it is %v", err)
	}
}

// A container names its processes and files, so it has a say in what stands in the log.
func FuzzDiagnoseLog(f *testing.F) {
	f.Add("(00.02) Dumping task (pid: 1 comm: a) b)\n(00.02) Error (criu/x.c:1): Unsupported proto 262\n")
	f.Add("Error (: \n\x00\xff")
	f.Add("(1) Dumping task (pid: 99999999999999999999 comm: \n)\n(1) 1 fdinfo 5: pos: \nError (): Can't dump file 99999999999999999999 of that type\n")
	f.Fuzz(func(t *testing.T, log string) {
		err, at := diagnoseLog(strings.NewReader(log), errors.New("operation failed"))
		if err.Cause == "" {
			t.Error("no cause")
		}
		err.Place = Container{Pid: os.Getpid()}.describe(at)
		if text := err.Error(); utf8.RuneCountInString(text) > 512 || printable(text) != text {
			t.Errorf("%d bytes: %q", len(text), text)
		}
	})
}
