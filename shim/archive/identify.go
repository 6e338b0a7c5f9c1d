package archive

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"
)

// ErrForeign says that a file is not an archive that crishim has written, as a whole.
var ErrForeign = errors.New("not an archive of crishim's")

// Identity says what an archive is of.
type Identity struct {
	Container string    // NAMESPACE/POD/NAME where a kubelet has made the container, otherwise its id
	Made      time.Time // when it was checkpointed
}

// Identify tells of which container an archive is, by what stands in it and whatever its name, compressed or not. It reads the beginning and the end
// alone, from which it cannot say whether the archive is sound, but that crishim has written it, and to its end: the manifest is there. Of one with
// tens of thousands of members it may not find that. The error is ErrForeign for what is none of ours.
func Identify(file *os.File) (Identity, error) {
	info, err := file.Stat()
	if err != nil {
		return Identity{}, err
	}
	ours, err := endsWithManifest(file, info.Size())
	if err != nil {
		return Identity{}, fmt.Errorf("read end of archive: %w", err)
	}
	if !ours {
		return Identity{}, ErrForeign
	}
	identity, err := identityAtStart(io.NewSectionReader(file, 0, info.Size()))
	if err != nil {
		return Identity{}, fmt.Errorf("%w: %w", ErrForeign, err)
	}
	return identity, nil
}

// endsWithManifest looks for the manifest, behind which there is nothing, in as little as it takes of the file's end.
func endsWithManifest(file io.ReaderAt, size int64) (bool, error) {
	var start [4]byte
	if _, err := file.ReadAt(start[:], 0); err != nil && err != io.EOF {
		return false, err
	}
	for _, length := range []int64{64 << 10, 4 << 20} {
		length = min(length, size)
		end := make([]byte, length)
		if _, err := file.ReadAt(end, size-length); err != nil && err != io.EOF {
			return false, err
		}
		if isZstd(start[:]) {
			if found, err := frameWithManifest(end); found || err != nil {
				return found, err
			}
		} else if hasManifest(end) {
			return true, nil
		}
	}
	return false, nil
}

// frameWithManifest looks for it in the last frames, of which each can be decompressed by itself.
func frameWithManifest(end []byte) (bool, error) {
	// The manifest of as many members as hasManifest finds it behind is in the last few.
	const frames, maxPlain = 6, 8 * frameSize
	decoder, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxPlain), zstd.WithDecoderLowmem(true))
	if err != nil {
		return false, err
	}
	defer decoder.Close()
	magic := []byte{0x28, 0xb5, 0x2f, 0xfd}
	for at, found := len(end), 0; found < frames; {
		if at = bytes.LastIndex(end[:at], magic); at < 0 {
			return false, nil
		}
		plain, err := decoder.DecodeAll(end[at:], nil)
		if err != nil {
			continue // the same four bytes in a frame
		}
		if hasManifest(plain) {
			return true, nil
		}
		found++
	}
	return false, nil
}

// hasManifest tells whether what stands at the end of a tar archive is a manifest of ours.
func hasManifest(end []byte) bool {
	name := append([]byte(ManifestName), 0)
	for at := len(end) - trailerSize - 2*blockSize; at >= 0; at -= blockSize {
		if !bytes.HasPrefix(end[at:], name) {
			continue
		}
		entries := tar.NewReader(bytes.NewReader(end[at:]))
		header, err := entries.Next()
		if err != nil || header.Size != int64(len(end)-at-blockSize-trailerSize)-padding(header.Size) {
			continue
		}
		content, err := io.ReadAll(entries)
		if err != nil {
			return false
		}
		if _, err := parseManifest(content); err != nil {
			return false
		}
		_, err = entries.Next()
		return err == io.EOF
	}
	return false
}

// identityAtStart reads the metadata, which come first.
func identityAtStart(r io.Reader) (Identity, error) {
	plain, _, err := Decompress(r)
	if err != nil {
		return Identity{}, err
	}
	defer plain.Close()
	var config Config
	var status Status
	entries := tar.NewReader(plain)
	for _, member := range []struct {
		name  string
		value any
	}{{ConfigDump, &config}, {SpecDump, &json.RawMessage{}}, {StatusDump, &status}} {
		header, err := entries.Next()
		if err != nil {
			return Identity{}, err
		}
		if header.Name != member.name {
			return Identity{}, fmt.Errorf("%s is where %s should be", quote(header.Name), member.name)
		}
		if err := readJSON(header.Size, entries, member.value); err != nil {
			return Identity{}, fmt.Errorf("%s: %w", member.name, err)
		}
	}
	if config.ID == "" || config.CheckpointedTime.IsZero() {
		return Identity{}, fmt.Errorf("%s names no container or no time", ConfigDump)
	}
	identity := Identity{Container: config.ID, Made: config.CheckpointedTime}
	// The kubelet's labels (k8s.io/kubelet/pkg/types): the id is another one after each restart.
	namespace, pod, name := status.Labels["io.kubernetes.pod.namespace"], status.Labels["io.kubernetes.pod.name"], status.Labels["io.kubernetes.container.name"]
	if namespace != "" && pod != "" && name != "" {
		identity.Container = namespace + "/" + pod + "/" + name
	}
	return identity, nil
}
