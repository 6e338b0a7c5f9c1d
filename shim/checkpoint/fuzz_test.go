package checkpoint

import (
	"bytes"
	"errors"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"google.golang.org/grpc/status"
)

// FuzzWriteLog: a log is what the container writes, and in Docker's form whatever stands in its file.
func FuzzWriteLog(f *testing.F) {
	f.Add([]byte("2026-11-24T03:18:26.1Z stdout F count 1\n"))
	f.Add([]byte(`{"log":"count 1\n","stream":"stdout","time":"2026-11-24T03:18:26.1Z"}` + "\n{\"log\":"))
	f.Fuzz(func(t *testing.T, log []byte) {
		var out bytes.Buffer
		if err := writeLog(&out, bytes.NewReader(log)); err != nil {
			t.Fatal(err)
		}
		if len(log) > 0 && log[0] != '{' && !bytes.Equal(out.Bytes(), log) {
			t.Errorf("%q became %q", log, out.Bytes())
		}
	})
}

// FuzzAnswer: errors quote what a container has chosen. An answer is a line of printable text.
func FuzzAnswer(f *testing.F) {
	f.Add("caf\xe9\nlevel=info msg=forged\x1b[31m")
	f.Add(strings.Repeat("\u2028 ", 600))
	f.Fuzz(func(t *testing.T, message string) {
		text := status.Convert(toStatus(errors.New(message))).Message()
		if utf8.RuneCountInString(text) > maxMessage || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) && r != '…' }) {
			t.Errorf("%q became %q", message, text)
		}
	})
}
