package checkpoint_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/checkpoint"
	"crishim/test/node"
)

// 50 requests for 10 containers at once, where 2 checkpoints may go on. Of each container's one is served and the others are refused at once;
// those that wait for their turn do so within their deadline; and nothing is left of any.
func TestManyAtOnce(t *testing.T) {
	const inTurn, late, each, parallel = 8, 2, 5, 2
	containerd := node.Containerd(t)
	containers := make([]*node.Container, inTurn+late)
	for i := range containers {
		containers[i] = containerd.Run(t, node.Spec{Name: fmt.Sprintf("many-%d", i)})
	}
	dir := filepath.Dir(location(t))
	// It stops when it is to dump, so that nothing goes on before the test wants it.
	criu := standIn(t, "*swrk*) kill -STOP $$ ;;")
	service := checkpoint.New(checkpoint.Config{
		Runtime: containerd.Runtime, Images: containerd.Images, Criu: criu, Version: "test", State: t.TempDir(), Log: testLog(t),
		Bounds: checkpoint.Bounds{Parallel: parallel},
	})
	defer service.Drain(context.Background())
	// What is opened once, and stays.
	must(t, service.Repair())
	_, err := service.Probe(t.Context())
	must(t, err)
	goroutines, descriptors := runtime.NumGoroutine(), openFiles(t)

	request := func(c, n int, timeout int64, ended chan<- error) {
		path := filepath.Join(dir, fmt.Sprintf("checkpoint-%d-%d.tar", c, n))
		_, err := service.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: containers[c].ID, Location: path, Timeout: timeout})
		ended <- err
	}
	next := func(ended <-chan error) error {
		t.Helper()
		select {
		case err := <-ended:
			return err
		case <-time.After(time.Minute):
			t.Fatalf("no answer for a minute; stopped are %v", stoppedCRIU(t))
			return nil
		}
	}
	ended, endedLate := make(chan error, inTurn*each), make(chan error, late*each)
	for c := range inTurn {
		for n := range each {
			go request(c, n, 0, ended)
		}
	}
	// They are answered although both slots are taken, and will be until they are.
	for range inTurn * (each - 1) {
		if err := next(ended); status.Code(err) != codes.Aborted {
			t.Errorf("error is %v, want Aborted", err)
		}
	}
	waitFor(t, "as many to go on as may", func() bool { return len(stoppedCRIU(t)) == parallel })
	begin := time.Now()
	for c := range late {
		for n := range each {
			go request(inTurn+c, n, 1, endedLate)
		}
	}
	answers := map[codes.Code]int{}
	for range late * each {
		err := next(endedLate)
		answers[status.Code(err)]++
		if status.Code(err) == codes.DeadlineExceeded && !strings.Contains(err.Error(), "wait for one of 2 checkpoints at once on this node to end") {
			t.Errorf("error is %v, want a word on what it waited for", err)
		}
	}
	if want := (map[codes.Code]int{codes.Aborted: late * (each - 1), codes.DeadlineExceeded: late}); fmt.Sprint(answers) != fmt.Sprint(want) {
		t.Errorf("the answers are %v, want %v", answers, want)
	}
	if took := time.Since(begin); took > 3*time.Second {
		t.Errorf("with a deadline of 1 s they have waited for %s", took)
	}
	for n := 0; n < inTurn; {
		stopped := stoppedCRIU(t)
		if len(stopped) > parallel {
			t.Errorf("more than %d go on: criu %v", parallel, stopped)
		}
		for _, pid := range stopped {
			if err := unix.Kill(pid, unix.SIGCONT); err != nil {
				t.Fatal(err)
			}
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("one that had its turn: %v", err)
			}
			n++
		case <-time.After(10 * time.Millisecond):
		case <-t.Context().Done():
			t.Fatal(t.Context().Err())
		}
	}
	archives, err := filepath.Glob(filepath.Join(dir, "*"))
	must(t, err)
	perContainer := map[string]int{}
	for _, path := range archives {
		perContainer[strings.Split(filepath.Base(path), "-")[1]]++
		must(t, os.Remove(path))
	}
	if len(archives) != inTurn || len(perContainer) != inTurn {
		t.Errorf("there are %q, want one of each container", archives)
	}
	for _, c := range containers {
		unharmed(t, c, filepath.Join(dir, "any"))
	}
	if left := helpers(t); len(left) > 0 {
		t.Errorf("helpers are left: %v", left)
	}
	waitFor(t, "goroutines and descriptors to be as few as before", func() bool {
		return runtime.NumGoroutine() <= goroutines && openFiles(t) <= descriptors
	})
}

// openFiles is how many descriptors this process has.
func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// stoppedCRIU are the children of helpers that are stopped by a signal.
func stoppedCRIU(t *testing.T) (pids []int) {
	t.Helper()
	for _, helper := range helpers(t) {
		lists, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", helper))
		must(t, err)
		for _, list := range lists {
			content, _ := os.ReadFile(list) // it may have ended, as may any below
			for field := range strings.FieldsSeq(string(content)) {
				if stat, _ := os.ReadFile("/proc/" + field + "/stat"); bytes.Contains(stat, []byte(") T ")) {
					var pid int
					if _, err := fmt.Sscan(field, &pid); err != nil {
						t.Fatal(err)
					}
					pids = append(pids, pid)
				}
			}
		}
	}
	return pids
}

func waitFor(t *testing.T, what string, condition func() bool) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !condition(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited a minute for %s", what)
		}
	}
}
