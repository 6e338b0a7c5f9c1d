package node

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
)

func TestEntryIsBuiltOnce(t *testing.T) {
	c := cache(t.TempDir())
	var builds atomic.Int32
	var group sync.WaitGroup
	for range 4 {
		group.Go(func() {
			path, err := c.entry(t.Context(), "thing", "recipe", func(temporary string) error {
				builds.Add(1)
				return os.WriteFile(temporary, []byte("built"), 0o644)
			})
			if err != nil {
				t.Error(err)
				return
			}
			if content, err := os.ReadFile(path); err != nil || string(content) != "built" {
				t.Errorf("%s: %q, %v", path, content, err)
			}
		})
	}
	group.Wait()
	if n := builds.Load(); n != 1 {
		t.Errorf("built %d times", n)
	}
}

func TestEntryLeavesNothingHalf(t *testing.T) {
	c := cache(t.TempDir())
	broken := errors.New("broken")
	half := func(temporary string) error {
		if err := os.Mkdir(temporary, 0o755); err != nil {
			return err
		}
		return broken
	}
	if _, err := c.entry(t.Context(), "thing", "recipe", half); !errors.Is(err, broken) {
		t.Errorf("got %v", err)
	}
	// What a killed build has left is in the way of nobody.
	whole := func(temporary string) error { return os.Mkdir(temporary, 0o755) }
	other, err := c.entry(t.Context(), "thing", "other", whole)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(other, other+".tmp"); err != nil {
		t.Fatal(err)
	}
	if _, err := c.entry(t.Context(), "thing", "other", whole); err != nil {
		t.Error(err)
	}
	if left, err := filepath.Glob(string(c) + "/*.tmp"); err != nil || len(left) > 0 {
		t.Errorf("left %v, %v", left, err)
	}
}
