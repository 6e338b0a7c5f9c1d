package convert

import (
	"bytes"
	"strings"
	"testing"
)

// FuzzPodmanLines: only times change in a log, whatever is in it.
func FuzzPodmanLines(f *testing.F) {
	f.Add([]byte(logText))
	f.Add([]byte("2026-11-24T03:18:26.5+01:00 a\n \n"))
	f.Fuzz(func(t *testing.T, log []byte) {
		var out bytes.Buffer
		if err := podmanLines(&out, bytes.NewReader(log)); err != nil {
			t.Fatal(err)
		}
		if got, want := strings.Count(out.String(), "\n"), bytes.Count(log, []byte("\n")); got != want {
			t.Errorf("%q became %q", log, out.Bytes())
		}
	})
}
