package checkpoint

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
)

// writeLog copies a container's log in the CRI's format: a line is the time, the stream, F for a full line or P for a part of one, and
// what was written. Restorers put it before the log that the restored container goes on to write, and a kubelet reads a whole
// file by the form of its first line.
//
// Docker's driver json-file has the same in JSON objects, a line each; attributes that its options add are left out.
func writeLog(w io.Writer, r io.Reader) error {
	// Docker splits lines at 16 KiB, and JSON writes a byte as six at most.
	lines := bufio.NewReaderSize(r, 1<<20)
	first, err := lines.Peek(1)
	if errors.Is(err, io.EOF) {
		return nil
	}
	if err != nil {
		return err
	}
	if first[0] != '{' { // a line of the CRI's begins with the time
		_, err := io.Copy(w, lines)
		return err
	}
	out := bufio.NewWriter(w)
	for {
		line, err := lines.ReadSlice('\n')
		if len(line) > 0 {
			if _, err := out.Write(fromDocker(line)); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return out.Flush()
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return err
		}
	}
}

// fromDocker translates a line of Docker's. What is none, such as one that a power cut has torn, stays as it is.
func fromDocker(line []byte) []byte {
	var entry struct {
		Log    string `json:"log"`
		Stream string `json:"stream"`
		Time   string `json:"time"`
	}
	if json.Unmarshal(line, &entry) != nil || entry.Time == "" {
		return line
	}
	var cri bytes.Buffer
	for text := range strings.Lines(entry.Log) { // it is one
		tag := "P"
		if strings.HasSuffix(text, "\n") {
			tag = "F"
		}
		fmt.Fprintf(&cri, "%s %s %s %s\n", entry.Time, entry.Stream, tag, strings.TrimSuffix(text, "\n"))
	}
	return cri.Bytes()
}
