package convert

import (
	"bufio"
	"errors"
	"io"
	"time"
)

// podmanTime is the form in which podman has the time in front of a line. It leaves lines out whose fraction of a second has not all
// nine digits, and the CRI's have none too many: one line in ten ends in a zero, which is not written.
const podmanTime = "2006-01-02T15:04:05.000000000Z07:00"

// podmanLines copies a log of the CRI in the form that podman reads: with all digits of the time. What is no such line stays as it is.
func podmanLines(w io.Writer, r io.Reader) error {
	in := bufio.NewReaderSize(r, 64<<10)
	out := bufio.NewWriterSize(w, 64<<10)
	for start := true; ; {
		piece, err := in.ReadSlice('\n')
		if start {
			piece = lineTime(out, piece)
		}
		// Errors of a bufio.Writer stay until Flush.
		_, _ = out.Write(piece)
		start = err == nil // otherwise the line was longer than the buffer, and goes on
		switch {
		case err == io.EOF:
			return out.Flush()
		case err != nil && !errors.Is(err, bufio.ErrBufferFull):
			return err
		}
	}
}

// lineTime writes the time that a line begins with, and returns the rest.
func lineTime(w io.Writer, line []byte) (rest []byte) {
	for i, c := range line[:min(len(line), 64)] {
		if c != ' ' {
			continue
		}
		t, err := time.Parse(time.RFC3339Nano, string(line[:i]))
		if err != nil {
			return line
		}
		_, _ = io.WriteString(w, t.Format(podmanTime))
		return line[i:]
	}
	return line
}
