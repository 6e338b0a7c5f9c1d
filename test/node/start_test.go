package node_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"
	"time"

	"crishim/test/node"
)

// A start that is cancelled at whatever moment leaves nothing of the node.
func TestStartCancelled(t *testing.T) {
	nodes := newNodes(t)
	if err := node.Build(t.Context()); err != nil {
		t.Fatal(err)
	}
	// A cache of its own, with what has been built, shows the directories of this test's nodes alone.
	own := t.TempDir()
	user, err := os.UserCacheDir()
	if err != nil {
		t.Fatal(err)
	}
	shared := os.Getenv("CRISHIM_TEST_CACHE")
	if shared == "" {
		shared = filepath.Join(user, "crishim-test")
	}
	for _, pattern := range []string{"root-*", "pid1-*"} {
		entries, err := filepath.Glob(filepath.Join(shared, pattern))
		if err != nil {
			t.Fatal(err)
		}
		for _, entry := range entries {
			if filepath.Ext(entry) == "" {
				if err := os.Symlink(entry, filepath.Join(own, filepath.Base(entry))); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	t.Setenv("CRISHIM_TEST_CACHE", own)

	started, cancelled := 0, 0
	for delay := time.Duration(0); started < 2; delay += 2 * time.Millisecond {
		ctx, cancel := context.WithTimeout(t.Context(), delay)
		n, err := node.Start(ctx, node.Options{})
		cancel()
		if err != nil {
			if ctx.Err() == nil {
				t.Fatal(err)
			}
			cancelled++
		} else {
			started++
			nodes.add(n)
			if err := n.Stop(); err != nil {
				t.Error(err)
			}
		}
		left, err := filepath.Glob(filepath.Join(own, "nodes", "*"))
		if err != nil || len(left) > 0 {
			t.Fatalf("after %s: left %v, %v", delay, left, err)
		}
		assertNoChildren(t)
	}
	if cancelled == 0 {
		t.Error("no start was cancelled")
	}
	nodes.assertGone(t)
}

// assertNoChildren fails the test if this process has a child, started by whichever thread.
func assertNoChildren(t *testing.T) {
	t.Helper()
	lists, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, list := range lists {
		// A thread may have ended meanwhile; its children are then in another's list.
		if children, err := os.ReadFile(list); err == nil && len(children) > 0 {
			t.Fatalf("processes are left: %s", children)
		}
	}
}
