package archive

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// ManifestName is the member in which crishim writes down what else is in the
// archive, so that Verify can tell damage, and where it was made. It is the last
// one. Other readers pass over it.
const ManifestName = "crishim.json"

// manifestVersion is the version of the manifest's form. It grows when a reader of
// an earlier one would misunderstand a later one; further keys are no such change.
const manifestVersion = 1

// Manifest is the content of crishim.json.
type Manifest struct {
	Version int     `json:"version"`
	Origin  Origin  `json:"origin"`
	Members Digests `json:"members"` // of all other regular files, in the archive's order
}

// NewManifest returns a manifest to be staged as ManifestName. Assemble fills in the
// members. Where none is staged, no digest is computed, and the archive has none.
func NewManifest(origin Origin) *Manifest {
	return &Manifest{Version: manifestVersion, Origin: origin}
}

// Origin is what a restore may depend on and no other member tells.
type Origin struct {
	Crishim        string   `json:"crishim"`                  // version of crishim
	RuntimeVersion string   `json:"runtimeVersion,omitempty"` // of the OCI runtime that config.dump names
	Criu           string   `json:"criu"`                     // version of CRIU
	Kernel         string   `json:"kernel"`                   // release, as uname -r has it
	Architecture   string   `json:"architecture"`             // as Go and OCI images name it: amd64, arm64
	CPUFeatures    []string `json:"cpuFeatures,omitempty"`    // extensions of the instruction set that processes may use
	CgroupVersion  int      `json:"cgroupVersion,omitempty"`  // 1 or 2: of the hierarchy in which the container can be frozen
}

// Digest says what a member must be like.
type Digest struct {
	Name   string `json:"name"`
	Size   int64  `json:"size"`
	SHA256 string `json:"sha256"` // of its bytes, in hexadecimal
}

// Digests is a list that takes no more memory than one of an archive has to.
type Digests []Digest

// UnmarshalJSON stops where there are more than an archive has members.
func (d *Digests) UnmarshalJSON(data []byte) error {
	if string(data) == "null" {
		return nil
	}
	decoder := json.NewDecoder(bytes.NewReader(data))
	if start, err := decoder.Token(); err != nil || start != json.Delim('[') {
		return errors.Join(err, errors.New("members are no list"))
	}
	for decoder.More() {
		if len(*d) == maxMembers {
			return fmt.Errorf("it names more than %d members", maxMembers)
		}
		var next Digest
		if err := decoder.Decode(&next); err != nil {
			return err
		}
		*d = append(*d, next)
	}
	return nil
}

// noSum stands in for a digest that is not known yet. All have the same length, so
// that the manifest's size is known before its content.
var noSum = hex.EncodeToString(make([]byte, sha256.Size))

func (m *Manifest) encode() ([]byte, error) {
	data, err := json.MarshalIndent(m, "", " ")
	return append(data, '\n'), err
}

// parseManifest reads what encode has written.
func parseManifest(data []byte) (*Manifest, error) {
	m := &Manifest{}
	if err := json.Unmarshal(data, m); err != nil {
		return nil, err
	}
	if m.Version != manifestVersion {
		return nil, fmt.Errorf("its form is version %d, and only %d is known here: use a newer crishim", m.Version, manifestVersion)
	}
	return m, nil
}

// takeManifest takes the manifest out of what was staged. It returns nil if there is
// none.
func takeManifest(members []member) (*Manifest, []member, error) {
	for i, m := range members {
		if m.name != ManifestName {
			continue
		}
		manifest, err := stagedManifest(m)
		if err != nil {
			return nil, nil, fmt.Errorf("read staged %s: %w", m.name, err)
		}
		return manifest, append(members[:i:i], members[i+1:]...), nil
	}
	return nil, members, nil
}

func stagedManifest(m member) (*Manifest, error) {
	f, err := openAt(m.dir, m.base, unix.O_RDONLY)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, err
	}
	manifest, err := parseManifest(data)
	if err != nil {
		return nil, err
	}
	if len(manifest.Members) > 0 {
		return nil, errors.New("it names members before there are any")
	}
	if err := unix.Unlinkat(int(m.dir.Fd()), m.base, 0); err != nil {
		return nil, &os.PathError{Op: "unlink", Path: f.Name(), Err: err}
	}
	return manifest, nil
}

// startSum begins to compute the digest of pieces of files. The caller calls wait,
// exactly once, before it closes them; the end of ctx shortens it.
//
// It reads for itself, beside whoever moves the bytes: CRIU has written them just now,
// so they are in the page cache, and the mover is free to let the kernel do its work.
func startSum(ctx context.Context, pieces []Segment) (wait func() (string, error)) {
	type result struct {
		sum string
		err error
	}
	done := make(chan result, 1)
	go func() {
		sum, err := sum(ctx, pieces)
		done <- result{sum, err}
	}()
	return func() (string, error) {
		r := <-done
		return r.sum, r.err
	}
}

func sum(ctx context.Context, pieces []Segment) (string, error) {
	hash := sha256.New()
	buffer := make([]byte, 256<<10)
	for _, piece := range pieces {
		for done := int64(0); done < piece.Length; {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			n, err := piece.File.ReadAt(buffer[:min(int64(len(buffer)), piece.Length-done)], piece.Offset+done)
			hash.Write(buffer[:n])
			done += int64(n)
			if err != nil && done < piece.Length {
				return "", fmt.Errorf("compute digest: %w", err)
			}
		}
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
