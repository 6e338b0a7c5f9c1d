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
	"runtime"
	"sync"

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
// members. Where none is staged, no digest is computed, and the archive has no manifest.
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
	SHA256 string `json:"sha256,omitempty"` // of its bytes, in hexadecimal; empty where digests were not wanted
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

// sumWorkers is how many members' digests are computed at once, at most: enough for a
// disk, and few enough for who else is on the node.
const sumWorkers = 4

// sum is the digest of a member while it is computed. It reads for itself, beside
// whoever moves the bytes: CRIU has written them just now, so they are in the page
// cache, and the mover is free to let the kernel do its work.
type sum struct {
	chunks chan struct{} // one for each copyChunk that was read; closed at the end
	head   *head         // what has been read before; nil for nothing
	digest string        // of use when chunks is closed
	err    error
}

func newSum(m member, head *head) *sum {
	return &sum{chunks: make(chan struct{}, m.size/copyChunk), head: head} // elements without size take no room
}

// startSums begins to compute the digests of the big members among entries, the staged file that insert
// takes first: it waits for it. What is in heads is not read again. They end with ctx, and done counts what must end before the caller returns.
func startSums(ctx context.Context, done *sync.WaitGroup, entries []entry, heads []*head) map[string]*sum {
	sums := map[string]*sum{}
	var order []member
	if base := largestStaged(entries); base != nil {
		order = append(order, base.member)
	}
	for _, e := range entries {
		if e.member.dir != nil && e.member.size >= bigSize {
			order = append(order, e.member)
		}
	}
	queue := make(chan member, len(order))
	for _, m := range order {
		if sums[m.name] == nil {
			sums[m.name] = newSum(m, headOf(heads, m))
			queue <- m
		}
	}
	close(queue)
	for range min(len(sums), sumWorkers, runtime.GOMAXPROCS(0)) {
		done.Go(func() {
			for m := range queue {
				sums[m.name].compute(ctx, m)
			}
		})
	}
	return sums
}

// wait returns the digest when it is known. After it, next must not be called.
func (s *sum) wait() (string, error) {
	for range s.chunks {
	}
	return s.digest, s.err
}

// next waits until a further copyChunk of the member was read, or all of it.
func (s *sum) next() { <-s.chunks }

func (s *sum) compute(ctx context.Context, m member) {
	defer close(s.chunks)
	s.digest, s.err = s.read(ctx, m)
	if s.err != nil {
		s.err = fmt.Errorf("compute digest: %w", s.err)
	}
}

func (s *sum) read(ctx context.Context, m member) (string, error) {
	pieces, src, err := m.open()
	if err != nil {
		return "", err
	}
	defer src.Close()
	hash, read := hasher{Hash: sha256.New()}, int64(0)
	if s.head != nil {
		hash, read = s.head.hasher, s.head.read
		pieces[0].Offset, pieces[0].Length = read, m.size-read
	}
	for range read / copyChunk {
		s.chunks <- struct{}{}
	}
	for _, piece := range pieces {
		for done := int64(0); done < piece.Length; {
			if ctx.Err() != nil {
				return "", context.Cause(ctx)
			}
			n, err := hash.add(Segment{File: piece.File, Offset: piece.Offset + done, Length: min(piece.Length-done, hashWindow)})
			done += n
			if err != nil {
				return "", shrank(err, piece.Length-done)
			}
			for next := read/copyChunk + 1; next <= (read+n)/copyChunk; next++ {
				s.chunks <- struct{}{}
			}
			read += n
		}
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}
