package checkpoint_test

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive/inspect"
	"crishim/test/node"
)

// examples is where -update puts the archives that the tests of shim/archive/inspect read.
var examples = flag.Bool("update", false, "make ../archive/inspect/testdata/*.tar.zst anew")

// commander runs what it is told by a FIFO, so that its processes are the container's own. One has a name that is meant for a terminal.
const commander = `
echo kept >/root/kept; echo changed >/root/changed; echo shared >/dev/shm/shared
mkfifo /var/commands; exec 3<>/var/commands 4>>/var/log
nc -l -p 8080 </dev/null & sleep 1001 &
printf '#!/bin/sh\nread x </var/commands2\n' >"/root/$(printf 'e\033[2Jvil')"; chmod 0700 /root/e*; mkfifo /var/commands2; /root/e* &
echo ready
while read -r command <&3; do eval "$command"; echo did it; done`

// twice checkpoints a container twice, change being called in between, and returns the archives.
func twice(t *testing.T, crishim runtimeapi.RuntimeServiceClient, id string, change func()) (before, after *os.File) {
	t.Helper()
	dir := filepath.Dir(location(t))
	var files []*os.File
	for _, name := range []string{"before.tar", "after.tar"} {
		path := filepath.Join(dir, name)
		request := &runtimeapi.CheckpointContainerRequest{ContainerId: id, Location: path, Timeout: 60}
		if _, err := crishim.CheckpointContainer(t.Context(), request); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { file.Close() })
		files = append(files, file)
		if len(files) == 1 {
			change()
		}
	}
	return files[0], files[1]
}

func waitLog(t *testing.T, c *node.Container, what string) {
	t.Helper()
	waitFor(t, fmt.Sprintf("it to say %q", what), func() bool {
		log, err := c.Log()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Contains(log, what)
	})
}

// waitForChildren waits until a container's init has children of these names, sorted, and no others.
func waitForChildren(t *testing.T, c *node.Container, want ...string) {
	t.Helper()
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	waitFor(t, fmt.Sprintf("its processes to be %q", want), func() bool {
		children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
		if err != nil {
			t.Fatal(err)
		}
		var names []string
		for child := range strings.FieldsSeq(string(children)) {
			name, _ := os.ReadFile(filepath.Join("/proc", child, "comm")) // it may have ended
			names = append(names, strings.TrimSpace(string(name)))
		}
		slices.Sort(names)
		return slices.Equal(names, want)
	})
}

// What a container does between two checkpoints is what is different between them.
func TestDiffTellsWhatAContainerDid(t *testing.T) {
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Name: "web", Command: []string{"/bin/sh", "-c", commander}})
	waitLog(t, c, "ready")
	waitForChildren(t, c, "e\x1b[2Jvil", "nc", "sleep")
	before, after := twice(t, crishim, c.ID, func() {
		commands := `kill %2; sleep 1002 & exec 4>&-; exec 5</root/kept; ` +
			`echo more >>/root/changed; rm /root/kept /bin/df /dev/shm/shared; echo new >/root/new; nc -l -p 8081 </dev/null &`
		if _, err := c.Exec(t.Context(), "/bin/sh", "-c", "echo '"+commands+"' >/var/commands"); err != nil {
			t.Fatal(err)
		}
		waitLog(t, c, "did it")
		waitForChildren(t, c, "e\x1b[2Jvil", "nc", "nc", "sleep")
	})
	if *examples {
		for _, file := range []*os.File{before, after} {
			compressTo(t, filepath.Join("../archive/inspect/testdata", filepath.Base(file.Name())+".zst"), file)
		}
	}
	d, err := inspect.Compare(t.Context(), before, after)
	if err != nil {
		t.Fatal(err)
	}
	if len(d.Ended) != 1 || d.Ended[0].Name != "sleep" || len(d.Started) != 2 || d.Started[0].Name != "sleep" || d.Started[1].Name != "nc" {
		t.Errorf("ended %v, started %v", d.Ended, d.Started)
	}
	if len(d.Closed) != 1 || d.Closed[0].Path != "/var/log" || len(d.Opened) != 1 || !strings.HasPrefix(d.Opened[0].Path, "/root/kept") {
		t.Errorf("closed %v, opened %v", d.Closed, d.Opened)
	}
	if got := fmt.Sprint(d.Layer.Added, d.Layer.Changed, d.Layer.Removed); got != "[/bin /root/new /tmp] [/root/changed] [/bin/df /root/kept]" { // /tmp: see below
		t.Errorf("in the layer changed %s", got)
	}
	if got := fmt.Sprint(d.DevShm.Added, d.DevShm.Changed, d.DevShm.Removed); got != "[] [] [/shared]" {
		t.Errorf("in /dev/shm changed %s", got)
	}
	if d.Log.B-d.Log.A != int64(len("2026-11-24T03:18:26.123456789Z stdout F did it\n")) {
		t.Errorf("the log grew from %d to %d bytes", d.Log.A, d.Log.B)
	}
	// Of others a page may change as they wait on.
	if len(d.Memory) == 0 || d.Memory[0].PID != 1 || d.Memory[0].Changed == 0 || d.Memory[0].Same == 0 {
		t.Errorf("memory changed: %v", d.Memory)
	}
}

// compressTo writes a compressed copy of a file.
func compressTo(t *testing.T, path string, from *os.File) {
	t.Helper()
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		t.Fatal(err)
	}
	to, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	w, err := zstd.NewWriter(to, zstd.WithEncoderLevel(zstd.SpeedBestCompression))
	if err != nil {
		t.Fatal(err)
	}
	info, err := from.Stat()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(w, io.NewSectionReader(from, 0, info.Size())); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}

// Of a process that stands still, those pages are different that were changed, and no other.
func TestDiffCountsThePagesThatChanged(t *testing.T) {
	const changed = 37
	containerd, crishim := serve(t)
	c := containerd.Run(t, node.Spec{Command: []string{"workload", "load", "8", "1"}})
	waitLog(t, c, "ready")
	pid, err := c.Pid(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Kill(pid, unix.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	before, after := twice(t, crishim, c.ID, func() { changePages(t, pid, changed) })
	d, err := inspect.Compare(t.Context(), before, after)
	if err != nil {
		t.Fatal(err)
	}
	page := int64(os.Getpagesize())
	if len(d.Memory) != 1 || d.Memory[0].Changed != changed || d.Memory[0].Added != 0 || d.Memory[0].Removed != 0 || d.Memory[0].PageSize != page ||
		int64(d.Memory[0].Same)*page < 8<<20-changed*page {
		t.Errorf("memory changed: %+v, want %d pages", d.Memory, changed)
	}
	// In the first dump CRIU has made a directory in /tmp, and removed it: the second archive has /tmp with another time.
	if got := fmt.Sprint(d.Layer.Added, d.Layer.Changed, d.Layer.Removed); got != "[/tmp] [] []" {
		t.Errorf("in the layer changed %s", got)
	}
	d.Memory, d.Layer.Added = nil, nil
	if !d.Same() {
		t.Errorf("and this is different: %+v", d)
	}
}

// changePages changes so many pages of the process's large mappings, here and there.
func changePages(t *testing.T, pid, want int) {
	t.Helper()
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		t.Fatal(err)
	}
	memory, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer memory.Close()
	page := make([]byte, os.Getpagesize())
	for line := range strings.Lines(string(maps)) {
		fields := strings.Fields(line)
		from, to, _ := strings.Cut(fields[0], "-")
		start, err := strconv.ParseInt(from, 16, 64)
		if err != nil {
			continue // above what a process has
		}
		end, _ := strconv.ParseInt(to, 16, 64)
		if !strings.HasPrefix(fields[1], "rw") || end-start < 8<<20 {
			continue
		}
		for at := start; at < end && want > 0; at += 7 * int64(len(page)) {
			if _, err := memory.ReadAt(page, at); err != nil {
				t.Fatal(err)
			}
			if !slices.ContainsFunc(page, func(b byte) bool { return b != 0 }) {
				continue // it may never have been touched
			}
			if _, err := memory.WriteAt([]byte{page[1] + 1}, at+1); err != nil {
				t.Fatal(err)
			}
			want--
		}
	}
	if want > 0 {
		t.Fatalf("%d pages are missing", want)
	}
}
