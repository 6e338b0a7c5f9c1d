// Package convert puts a checkpoint archive into the form that another engine takes: an OCI image, or an archive for podman.
//
// It reads the archive twice: once to verify it, for what is damaged is not worth converting, and once to copy it. There is no
// copy on disk but the result, which appears as archives do: whole, mode 0600, and never in place of anything.
package convert

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"hash"
	"io"
	"os"
	"time"

	"crishim/shim/archive"
)

// verified is an archive that Verify has found to be sound.
type verified struct {
	*archive.Report
	file   *os.File
	size   int64
	sha256 string // of the whole file, in hexadecimal
	plain  string // of the same, decompressed
	zstd   bool   // whether it is compressed
}

func verify(ctx context.Context, file *os.File, look archive.Look) (*verified, error) {
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	sum := sha256.New()
	decompressed, compressed, err := archive.Decompress(io.TeeReader(file, sum))
	if err != nil {
		return nil, err
	}
	defer decompressed.Close()
	plainSum, plain := sum, io.Reader(decompressed)
	if compressed {
		plainSum = sha256.New()
		plain = io.TeeReader(decompressed, plainSum)
	}
	report, err := archive.Verify(ctx, plain, look)
	if err != nil {
		return nil, err
	}
	if len(report.Problems) > 0 {
		return nil, fmt.Errorf("%s is not sound, crishim verify tells more: %s", file.Name(), report.Problems[0])
	}
	return &verified{
		Report: report, file: file, size: info.Size(), zstd: compressed,
		sha256: hex.EncodeToString(sum.Sum(nil)), plain: hex.EncodeToString(plainSum.Sum(nil)),
	}, nil
}

// copyTo reads the archive again, and passes it through use. It fails if there are other bytes than the first time.
func (v *verified) copyTo(ctx context.Context, use func(io.Reader) error) error {
	again := &rereader{ctx: ctx, r: io.NewSectionReader(v.file, 0, v.size), sum: sha256.New()}
	if err := use(again); err != nil {
		return err
	}
	if _, err := io.Copy(io.Discard, again); err != nil {
		return err
	}
	if hex.EncodeToString(again.sum.Sum(nil)) != v.sha256 {
		return fmt.Errorf("%s has changed while it was read: something still writes to it", v.file.Name())
	}
	return nil
}

type rereader struct {
	ctx context.Context
	r   io.Reader
	sum hash.Hash
}

func (r *rereader) Read(b []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.r.Read(b)
	r.sum.Write(b[:n])
	return n, err
}

// publish makes what write writes appear at the path out.
func publish(ctx context.Context, out string, write func(*tar.Writer) error) (err error) {
	location, err := archive.OpenLocation(out)
	if err != nil {
		return err
	}
	defer location.Close()
	staging, err := location.Stage(archive.StagingName())
	if err != nil {
		return err
	}
	defer func() {
		if removeErr := staging.Remove(); err == nil {
			err = removeErr
		}
	}()
	err = staging.Write(func(w io.Writer) error {
		t := tar.NewWriter(w)
		if err := write(t); err != nil {
			return err
		}
		return t.Close()
	})
	if err != nil {
		return err
	}
	return staging.Publish(ctx)
}

// header is that of a member in the form in which archives have them, see archive.Staging.
func header(name string, size int64, modTime time.Time) *tar.Header {
	return &tar.Header{
		Typeflag: tar.TypeReg, Name: name, Size: size, Mode: 0o600, ModTime: modTime.Truncate(time.Second), Format: tar.FormatPAX,
	}
}

func writeMember(w *tar.Writer, name string, content []byte, modTime time.Time) error {
	if err := w.WriteHeader(header(name, int64(len(content)), modTime)); err != nil {
		return err
	}
	_, err := w.Write(content)
	return err
}

// pipe copies in pieces that are large enough for the reading not to be felt.
func pipe(w io.Writer, r io.Reader) error {
	_, err := io.CopyBuffer(w, r, make([]byte, 1<<20))
	return err
}
