package history

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	crishimv1 "crishim/proto/crishim/v1"
)

// opened is a history in a directory, and what it logs.
func opened(dir string) (*History, *bytes.Buffer) {
	log, output := logrus.New(), &bytes.Buffer{}
	log.SetOutput(output)
	h := New(log)
	h.Open(dir)
	return h, output
}

// ended has one more checkpoint end, and returns its id.
func ended(h *History, location string) string {
	f := h.Begin(&crishimv1.Checkpoint{Location: location}, func(error) {})
	return f.End(func(c *crishimv1.Checkpoint) { c.Size = 7 }).GetId()
}

func ids(h *History) string {
	var all []string
	for _, l := range h.List() {
		all = append(all, l.GetCheckpoint().GetId())
	}
	return strings.Join(all, " ")
}

func TestWhatEndsIsRememberedAfterARestart(t *testing.T) {
	dir := t.TempDir()
	h, _ := opened(dir)
	first := ended(h, "/a")
	flying := h.Begin(&crishimv1.Checkpoint{Location: "/b"}, func(error) {})
	second := ended(h, "/c")
	deleted := h.Ended(first, "")
	deleted.Message = "deleted"
	h.Add(deleted)
	if got, want := ids(h), strings.Join([]string{first, flying.Checkpoint().GetId(), second}, " "); got != want {
		t.Errorf("it has %q, want %q: in the order in which they began", got, want)
	}

	again, log := opened(dir)
	if got, want := ids(again), first+" "+second; got != want {
		t.Errorf("after a restart it has %q, want %q", got, want)
	}
	if !proto.Equal(again.Ended(first, ""), deleted) {
		t.Errorf("of a checkpoint that has changed it has %v", again.Ended(first, ""))
	}
	if c := again.Ended("", "/c"); c.GetId() != second || c.GetSize() != 7 || c.GetEnd() == nil {
		t.Errorf("at /c it has %v", c)
	}
	if log.Len() > 0 {
		t.Errorf("it says %s", log)
	}
	if third := ended(again, "/d"); byID(third, second) <= 0 {
		t.Errorf("%s comes before %s", third, second)
	}
}

// As many as end before the directory is there.
func TestWhatEndsBeforeOpenIsWritten(t *testing.T) {
	dir := t.TempDir()
	log := logrus.New()
	log.SetOutput(t.Output())
	h := New(log)
	id := ended(h, "/a")
	h.Open(dir)
	h.Open(dir)
	if again, _ := opened(dir); ids(again) != id {
		t.Errorf("after a restart it has %q, want %q", ids(again), id)
	}
}

// A power cut leaves half a line, or zeros.
func TestADamagedTailIsPassedOver(t *testing.T) {
	for name, tail := range map[string]string{
		"half a line":     `{"id":"half","loc`,
		"no newline":      `{"location":"/no-id"}`,
		"zeros":           strings.Repeat("\x00", 512),
		"lines of others": "hello\n[]\n\n",
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			h, _ := opened(dir)
			before := ended(h, "/a")
			path := filepath.Join(dir, fileName)
			content, err := os.ReadFile(path)
			if err == nil {
				err = os.WriteFile(path, append(content, tail...), 0o600)
			}
			if err != nil {
				t.Fatal(err)
			}
			h, log := opened(dir)
			if ids(h) != before || strings.Count(log.String(), "\n") != 1 || !strings.Contains(log.String(), "damaged") {
				t.Errorf("it has %q, want %q, and says %q, want one line", ids(h), before, log)
			}
			after := ended(h, "/b")
			if again, _ := opened(dir); ids(again) != before+" "+after {
				t.Errorf("after one more it has %q, want %q", ids(again), before+" "+after)
			}
		})
	}
}

func TestItIsBounded(t *testing.T) {
	dir := t.TempDir()
	h, log := opened(dir)
	long := "/" + strings.Repeat("x", 3000)
	var last string
	for i := range maxEnded + 200 {
		last = ended(h, fmt.Sprint(long, i))
		if info, err := os.Stat(filepath.Join(dir, fileName)); err != nil || info.Size() > 2*maxBytes+4096 {
			t.Fatalf("the file is %v, %v", info.Size(), err)
		}
	}
	if n := len(h.List()); n != maxEnded {
		t.Errorf("it has %d, want %d", n, maxEnded)
	}
	again, _ := opened(dir)
	if n := len(again.List()); n < 300 || again.Ended(last, "") == nil {
		t.Errorf("after a restart it has %d, with the last one: %v", n, again.Ended(last, "") != nil)
	}
	if log.Len() > 0 {
		t.Errorf("it says %s", log)
	}
	if names, err := filepath.Glob(filepath.Join(dir, "*")); err != nil || len(names) != 1 {
		t.Errorf("the directory has %q, %v", names, err)
	}
}

// What cannot be written is remembered nevertheless, is told of once, and is written when that is possible again.
func TestADiskThatIsFull(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount a small disk")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"); err != nil {
		t.Skipf("needs a mount namespace of its own: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	h, log := opened(dir)
	first := ended(h, "/a")
	full := filepath.Join(dir, "full")
	if err := os.WriteFile(full, make([]byte, 1<<20), 0o600); !errors.Is(err, unix.ENOSPC) {
		t.Fatal(err)
	}
	long := ended(h, "/"+strings.Repeat("x", 4000))
	longer := ended(h, "/"+strings.Repeat("y", 4000))
	if got, want := ids(h), first+" "+long+" "+longer; got != want {
		t.Errorf("it has %q, want %q", got, want)
	}
	if n := strings.Count(log.String(), "\n"); n != 1 || !strings.Contains(log.String(), "no space left") {
		t.Errorf("it says %s", log)
	}
	if err := os.Remove(full); err != nil {
		t.Fatal(err)
	}
	last := ended(h, "/z")
	if again, _ := opened(dir); ids(again) != first+" "+long+" "+longer+" "+last {
		t.Errorf("after a restart it has %q, want all of %q", ids(again), ids(h))
	}
}

// Nobody but root can write to the directory; a link in it is not followed all the same.
func TestALinkIsNotFollowed(t *testing.T) {
	dir := t.TempDir()
	precious := filepath.Join(t.TempDir(), "precious")
	if err := errors.Join(os.WriteFile(precious, []byte("precious"), 0o600), os.Symlink(precious, filepath.Join(dir, fileName))); err != nil {
		t.Fatal(err)
	}
	h, _ := opened(dir)
	ended(h, "/a")
	if content, err := os.ReadFile(precious); string(content) != "precious" {
		t.Errorf("the link's target is %q, %v", content, err)
	}
	id := ended(h, "/b")
	if again, _ := opened(dir); again.Ended(id, "") == nil {
		t.Error("the link has not been replaced")
	}
}

func TestCancelWaitsForTheEnd(t *testing.T) {
	h, _ := opened(t.TempDir())
	reason := errors.New("a reason")
	ctx, cancel := context.WithCancelCause(t.Context())
	f := h.Begin(&crishimv1.Checkpoint{Location: "/a"}, cancel)
	id := f.Checkpoint().GetId()
	f.Progress(&crishimv1.Progress{Bytes: 3})
	if l := h.List(); len(l) != 1 || l[0].GetProgress().GetBytes() != 3 {
		t.Errorf("in flight is %v", l)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		<-ctx.Done()
		f.End(func(c *crishimv1.Checkpoint) { c.Message = context.Cause(ctx).Error() })
	}()
	c, err := h.Flight(id).Cancel(t.Context(), reason)
	if err != nil || c.GetMessage() != "a reason" || c.GetEnd() == nil {
		t.Errorf("Cancel gives %v, %v", c, err)
	}
	<-done
	if h.Flight(id) != nil || h.Ended(id, "") == nil {
		t.Error("it still is in flight")
	}

	hangs := h.Begin(&crishimv1.Checkpoint{}, func(error) {})
	impatient, stop := context.WithCancel(t.Context())
	stop()
	if _, err := hangs.Cancel(impatient, reason); !errors.Is(err, context.Canceled) {
		t.Errorf("Cancel by one who does not wait gives %v", err)
	}
}
