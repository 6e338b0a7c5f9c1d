package history

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	crishimv1 "crishim/proto/crishim/v1"
)

// file has a line of JSON for each checkpoint that has ended, and a further one for each change after that: the last with an id counts. It
// is appended to, and written anew when half of it is of no interest any more. A line is not made durable: a power cut may take the last
// ones, and leave half of one, which is passed over. Nothing that goes wrong with it is an error to anybody.
type file struct {
	dir string
	log logrus.FieldLogger

	size   int64 // of what is there
	torn   bool  // its last line is not whole
	broken bool  // the last write has failed, and was told of

	failures int // writes that have failed
}

const (
	fileName = "history.log"
	// newSuffix is of the file that is to take its place. What a crash leaves of it is written over.
	newSuffix = ".new"
	// A file that is larger was not written by us, and is left alone.
	maxRead = 16 * maxBytes
)

func (f *file) path() string { return filepath.Join(f.dir, fileName) }

// read returns what can be understood, in the order in which it was written.
func (f *file) read() []*crishimv1.Checkpoint {
	content, err := f.content()
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		f.log.Warnf("read history of checkpoints: %v: it begins anew", err)
	}
	f.size = int64(len(content))
	f.torn = len(content) > 0 && content[len(content)-1] != '\n'
	var all []*crishimv1.Checkpoint
	damaged := 0
	for line := range bytes.Lines(content) {
		c := &crishimv1.Checkpoint{}
		// A later version may have written what this one does not know.
		err := protojson.UnmarshalOptions{DiscardUnknown: true}.Unmarshal(line, c)
		switch {
		case len(bytes.TrimSpace(line)) == 0:
		case err != nil || c.GetId() == "":
			damaged++
		default:
			all = append(all, c)
		}
	}
	if damaged > 0 {
		f.log.Warnf("read history of checkpoints: %d lines of %s are damaged, and passed over", damaged, f.path())
	}
	return all
}

func (f *file) content() ([]byte, error) {
	file, err := os.OpenFile(f.path(), os.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() || info.Size() > maxRead {
		return nil, fmt.Errorf("%s is no file of at most %d bytes: remove it", f.path(), maxRead)
	}
	return io.ReadAll(io.LimitReader(file, maxRead))
}

// append writes one more line; all is what there is to be known, with that one.
func (f *file) append(c *crishimv1.Checkpoint, all []*crishimv1.Checkpoint) {
	err := f.write(c, all)
	if err != nil && !f.broken {
		f.log.Warnf("write history of checkpoints: %v: until it can be written, a restart forgets what has ended meanwhile", err)
	}
	if f.broken = err != nil; f.broken {
		f.failures++
	}
}

func (f *file) write(c *crishimv1.Checkpoint, all []*crishimv1.Checkpoint) error {
	if f.broken || f.size > 2*maxBytes {
		return f.renew(all)
	}
	line, err := lineOf(c)
	if err != nil {
		return err
	}
	if f.torn {
		line = append([]byte{'\n'}, line...)
	}
	file, err := os.OpenFile(f.path(), os.O_WRONLY|os.O_APPEND|os.O_CREATE|unix.O_NOFOLLOW|unix.O_NONBLOCK, 0o600)
	if err != nil {
		return err
	}
	n, err := file.Write(line)
	f.size += int64(n)
	err = errors.Join(err, file.Close())
	f.torn = err != nil
	return err
}

// renew writes the file anew, of what there is to be known: it is whole or not there.
func (f *file) renew(all []*crishimv1.Checkpoint) error {
	var content []byte
	for _, c := range all {
		line, err := lineOf(c)
		if err != nil {
			return err
		}
		content = append(content, line...)
	}
	// The oldest go first.
	for len(content) > maxBytes {
		content = content[bytes.IndexByte(content, '\n')+1:]
	}
	next := f.path() + newSuffix
	if err := os.Remove(next); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync() // or a power cut could leave an empty file under the old name
	}
	if err = errors.Join(err, file.Close()); err == nil {
		err = os.Rename(next, f.path())
	}
	if err != nil {
		_ = os.Remove(next)
		return err
	}
	f.size, f.torn = int64(len(content)), false
	return nil
}

func lineOf(c *crishimv1.Checkpoint) ([]byte, error) {
	line, err := protojson.Marshal(c)
	if err != nil {
		return nil, err
	}
	return append(line, '\n'), nil
}
