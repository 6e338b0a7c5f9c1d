package needs

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"net/netip"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	filelock "github.com/checkpoint-restore/go-criu/v7/crit/images/file-lock"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fown"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	skopts "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-opts"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	"crishim/criu/image"
	"crishim/shim/archive"
)

func imageOf(t testing.TB, kind string, entries ...proto.Message) string {
	t.Helper()
	data, err := image.Write(kind, entries)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func socket(t testing.TB, protocol, state uint32, address string) *fdinfo.FileEntry {
	t.Helper()
	addr, err := netip.ParseAddr(address)
	if err != nil {
		t.Fatal(err)
	}
	family := uint32(unix.AF_INET)
	bytes := addr.AsSlice()
	if addr.Is6() {
		family = unix.AF_INET6
	}
	var words []uint32
	for ; len(bytes) > 0; bytes = bytes[4:] {
		words = append(words, binary.LittleEndian.Uint32(bytes))
	}
	zero := proto.Uint32(0)
	return &fdinfo.FileEntry{Type: fdinfo.FdTypes_INETSK.Enum(), Id: zero, Isk: &skinet.InetSkEntry{
		Id: zero, Ino: zero, Family: &family, Type: proto.Uint32(unix.SOCK_STREAM), Proto: &protocol, State: &state, SrcPort: zero, DstPort: zero,
		Flags: zero, Backlog: zero, SrcAddr: words, DstAddr: words,
		Fown: &fown.FownEntry{Uid: zero, Euid: zero, Signum: zero, PidType: zero, Pid: zero},
		Opts: &skopts.SkOptsEntry{SoSndbuf: zero, SoRcvbuf: zero, SoSndTmoSec: proto.Uint64(0), SoSndTmoUsec: proto.Uint64(0),
			SoRcvTmoSec: proto.Uint64(0), SoRcvTmoUsec: proto.Uint64(0)},
	}}
}

const (
	established = 1
	closed      = 7
	listening   = 10
)

func process(pid uint32) *pstree.PstreeEntry {
	return &pstree.PstreeEntry{Pid: &pid, Ppid: proto.Uint32(0), Pgid: &pid, Sid: &pid}
}

// members are those of a sound archive, in their order.
func members(t testing.TB, change map[string]string) [][2]string {
	all := [][2]string{
		{"config.dump", `{"id":"0123","name":"web","runtime":"runc","rootfsImageName":"web:1","rootfsImageRef":"web@sha256:ab"}`},
		{"spec.dump", `{"linux":{"namespaces":[{"type":"network","path":"/n"},{"type":"pid"},{"type":"ipc","path":"/i"}]},"mounts":[
			{"destination":"/proc","type":"proc"},
			{"destination":"/data","type":"bind","source":"/srv/data","options":["rbind"]},
			{"destination":"/dev/shm","type":"bind","source":"/run/shm","options":["bind"]}]}`},
		{"status.dump", "{}"},
		{"bind.mounts", `[{"destination":"/data","file_type":"directory"},{"destination":"/dev/shm","file_type":"directory"}]`},
		{"checkpoint/", ""},
		{"checkpoint/descriptors.json", "[]"},
		{"checkpoint/filelocks.img", ""},
		{"checkpoint/files.img", imageOf(t, "FILES")},
		{"checkpoint/inventory.img", "i"},
		{"checkpoint/pstree.img", imageOf(t, "PSTREE", process(1), process(7))},
		{"devshm-checkpoint.tar", ""},
		{"dump.log", "(00.000570) Version: 4.1.1 (gitid 0)\n(00.000578) Running on node Linux 6.12.1-amd64 #1 SMP x86_64\n"},
		{"crishim.json", ""},
	}
	var kept [][2]string
	for _, m := range all {
		if content, ok := change[m[0]]; ok {
			m[1] = content
		}
		if m[1] != "" || strings.HasSuffix(m[0], "/") || m[0] == "devshm-checkpoint.tar" {
			kept = append(kept, m)
		}
	}
	return kept
}

func tarOf(t testing.TB, members [][2]string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m[0], Size: int64(len(m[1]))}
		if strings.HasSuffix(m[0], "/") {
			h.Typeflag = tar.TypeDir
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m[1]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestNeeds(t *testing.T) {
	plain := []string{
		"image: web:1, that is web@sha256:ab",
		"runtime: runc; another one may not take its images",
		"criu: 4.1.1 or later",
		"kernel: Linux 6.12.1-amd64, or one that has all of it that the processes use",
		"mount: /data: a directory, which was /srv/data",
		"mount: /dev/shm: a directory, whose content the archive has",
	}
	for name, test := range map[string]struct {
		change map[string]string
		want   []string // in addition to plain
	}{
		"plain": {},
		"what crishim knows": {
			map[string]string{"crishim.json": `{"version":1,"origin":{"crishim":"1.2.3","runtimeVersion":"1.1.15","criu":"4.2.1","kernel":"6.18.0",` +
				`"architecture":"amd64","cpuFeatures":["avx","avx2"],"cgroupVersion":2}}`},
			[]string{"runtime: runc (1.1.15 at the dump); another one may not take its images", "criu: 4.2.1 or later",
				"kernel: Linux 6.18.0, or one that has all of it that the processes use", "cpu: amd64 with avx, avx2", "cgroup: version 2"},
		},
		"connections": {
			map[string]string{"checkpoint/files.img": imageOf(t, "FILES",
				socket(t, unix.IPPROTO_TCP, established, "127.0.0.1"), socket(t, unix.IPPROTO_TCP, established, "10.88.0.5"),
				socket(t, unix.IPPROTO_TCP, established, "10.88.0.5"), socket(t, unix.IPPROTO_TCP, established, "fd00::5"),
				socket(t, unix.IPPROTO_TCP, established, "::ffff:127.0.0.1"),
				socket(t, unix.IPPROTO_TCP, listening, "10.88.0.6"), socket(t, unix.IPPROTO_TCP, closed, "10.88.0.6"),
				socket(t, unix.IPPROTO_UDP, established, "10.88.0.6"),
				&fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: proto.Uint32(1)})},
			[]string{"tcp: 5 open connections: the restorer must be given --tcp-established, or /etc/criu/runc.conf must have the line tcp-established; " +
				"the container must have the address 10.88.0.5, fd00::5"},
		},
		"locks": {
			map[string]string{"checkpoint/filelocks.img": imageOf(t, "FILE_LOCKS", &filelock.FileLockEntry{Flag: proto.Uint32(1), Type: proto.Uint32(1),
				Pid: proto.Int32(1), Fd: proto.Int32(3), Start: proto.Int64(0), Len: proto.Int64(0)})},
			[]string{"locks: 1 file lock: to keep them, the restorer must be given --file-locks, or /etc/criu/runc.conf must have the line file-locks"},
		},
		"the machine's namespaces": {
			map[string]string{"spec.dump": `{"linux":{"namespaces":[{"type":"mount"}]},"mounts":[{"destination":"/data","source":"/srv/data","options":["rbind"]},
				{"destination":"/dev/shm","type":"bind","source":"/run/shm","options":["bind"]}]}`},
			[]string{"network: the machine's own, as with hostNetwork",
				"processes: the machine's own process namespace, as with hostPID, in which 1, 7 must be free",
				"ipc: the machine's own, as with hostIPC"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			var images Images
			report, err := archive.Verify(t.Context(), bytes.NewReader(tarOf(t, members(t, test.change))), images.Look)
			if err != nil {
				t.Fatal(err)
			}
			// Digests are another test's affair, and these have none.
			if name == "what crishim knows" {
				report.Problems = nil
			}
			if report.Problems != nil {
				t.Fatalf("problems: %q", report.Problems)
			}
			got := map[string]bool{}
			for _, need := range images.List(report) {
				got[fmt.Sprintf("%s: %s", need.Item, need.Text)] = true
			}
			items := map[string]bool{}
			for _, want := range test.want {
				items[want[:strings.Index(want, ":")]] = true
			}
			all := test.want
			for _, want := range plain {
				if item := want[:strings.Index(want, ":")]; !items[item] {
					all = append(all, want)
				}
			}
			for _, want := range all {
				if !got[want] {
					t.Errorf("does not say %q", want)
				}
				delete(got, want)
			}
			for rest := range got {
				t.Errorf("says %q", rest)
			}
		})
	}
}

func TestHostileImages(t *testing.T) {
	huge := imageOf(t, "FILES") + "\xff\xff\xff\xff"
	for name, test := range map[string]struct{ change, content, want string }{
		"another image":   {"checkpoint/files.img", imageOf(t, "PSTREE"), "no image of CRIU's for FILES"},
		"no image":        {"checkpoint/files.img", "hello, world", "no image of CRIU's for FILES"},
		"too short":       {"checkpoint/pstree.img", "x", "no image of CRIU's"},
		"a huge entry":    {"checkpoint/files.img", huge, "an entry of 4294967295 bytes"},
		"ends in between": {"checkpoint/files.img", imageOf(t, "FILES") + "\x09\x00\x00\x00x", "unexpected EOF"},
		"no protobuf":     {"checkpoint/files.img", imageOf(t, "FILES") + "\x01\x00\x00\x00\xff", "proto"},
	} {
		t.Run(name, func(t *testing.T) {
			var images Images
			report, err := archive.Verify(t.Context(), bytes.NewReader(tarOf(t, members(t, map[string]string{test.change: test.content}))), images.Look)
			if err != nil {
				t.Fatal(err)
			}
			if len(report.Problems) != 1 || !strings.Contains(report.Problems[0], test.want) || !strings.HasPrefix(report.Problems[0], test.change) {
				t.Errorf("problems are %q, want one with %q", report.Problems, test.want)
			}
		})
	}
}

// Nothing in an archive gets to the terminal that could do something there.
func TestPlain(t *testing.T) {
	for text, want := range map[string]string{"web:1": "web:1", "a\x1b[2J": `"a\x1b[2J"`, "a\nb": `"a\nb"`, "grün": "grün"} {
		if got := Plain(text); got != want {
			t.Errorf("Plain(%q) = %s, want %s", text, got, want)
		}
	}
}

// Whatever is given out as an archive, looking at it ends, and what it says is printable.
func FuzzVerify(f *testing.F) {
	f.Add(tarOf(f, members(f, nil)))
	f.Add(tarOf(f, members(f, map[string]string{
		"checkpoint/files.img": imageOf(f, "FILES", socket(f, unix.IPPROTO_TCP, established, "10.88.0.5")),
		"crishim.json":         `{"version":1,"origin":{"criu":"4.2.1"},"members":[{"name":"spec.dump","size":1,"sha256":"00"}]}`,
	})))
	f.Fuzz(func(t *testing.T, data []byte) {
		var images Images
		report, err := archive.Verify(t.Context(), bytes.NewReader(data), images.Look)
		if err != nil {
			t.Fatal(err)
		}
		texts := report.Problems
		for _, need := range images.List(report) {
			texts = append(texts, need.Text)
		}
		for _, text := range texts {
			if Plain(text) != text {
				t.Errorf("%q could do something to a terminal", text)
			}
		}
	})
}
