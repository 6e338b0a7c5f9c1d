package convert

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strings"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/opencontainers/runtime-spec/specs-go"

	"crishim/criu/image"
	"crishim/shim/archive"
)

const (
	// podmanLog is the name of podman's own log in the directory that it unpacks an archive into. Its default driver appends to it.
	podmanLog = "ctr.log"
	// filesImage is where CRIU keeps what files are open.
	filesImage = archive.ImagesDir + "/files.img"
)

// ToPodman writes an archive to the new file out that podman restores by `podman container restore --import`. It differs in what
// podman makes a container from, config.dump and spec.dump; in the log, which is podman's then; and in what CRIU knows of the root
// directory, see anyRoot.
//
// imageID is the image's ID in podman's storage, 64 hexadecimal digits; empty, it is the one that the archive has. file and out
// are as for ToOCI.
func ToPodman(ctx context.Context, file *os.File, out, imageID string) error {
	p := &podman{changed: map[string][]byte{}}
	var err error
	if p.verified, err = verify(ctx, file, p.look); err != nil {
		return err
	}
	if err := p.change(imageID); err != nil {
		return err
	}
	return publish(ctx, out, func(w *tar.Writer) error {
		return p.copyTo(ctx, func(r io.Reader) error {
			plain, _, err := archive.Decompress(r)
			if err != nil {
				return err
			}
			defer plain.Close()
			return p.write(w, plain)
		})
	})
}

// podman is an archive on its way to podman.
type podman struct {
	*verified
	files   []*fdinfo.FileEntry
	log     archive.Digest    // the log, as it will be; without a name where there is none
	changed map[string][]byte // other content for members
}

// look gathers, while the archive is verified, what becomes of large members.
func (p *podman) look(name string, size int64, content io.Reader) error {
	switch name {
	case filesImage:
		return image.Read(content, size, "FILES", func(f *fdinfo.FileEntry) { p.files = append(p.files, f) })
	case archive.ContainerLog:
		sum := sha256.New()
		var length counter
		err := podmanLines(io.MultiWriter(sum, &length), content)
		p.log = archive.Digest{Name: podmanLog, Size: int64(length), SHA256: hex.EncodeToString(sum.Sum(nil))}
		return err
	case podmanLog:
		return errors.New("this is a log of podman's: the archive needs no conversion")
	}
	return nil
}

type counter int64

func (c *counter) Write(b []byte) (int, error) {
	*c += counter(len(b))
	return len(b), nil
}

// change makes the members that are different for podman.
func (p *podman) change(imageID string) error {
	config, err := p.config(imageID)
	if err != nil {
		return err
	}
	if p.changed[archive.ConfigDump], err = json.Marshal(config); err != nil {
		return fmt.Errorf("write %s: %w", archive.ConfigDump, err)
	}
	if p.changed[archive.SpecDump], err = json.Marshal(p.Spec); err != nil {
		return fmt.Errorf("write %s: %w", archive.SpecDump, err)
	}
	if p.changed[filesImage], err = anyRoot(p.files); err != nil {
		return fmt.Errorf("write %s: %w", filesImage, err)
	}
	if p.Manifest == nil {
		return nil
	}
	manifest := archive.NewManifest(p.Manifest.Origin)
	for _, m := range p.Members {
		if m.Name != archive.ManifestName {
			manifest.Members = append(manifest.Members, p.digest(m))
		}
	}
	if p.changed[archive.ManifestName], err = json.Marshal(manifest); err != nil {
		return fmt.Errorf("write %s: %w", archive.ManifestName, err)
	}
	return nil
}

// podmanConfig is as much of libpod's ContainerConfig as a restore needs beside what config.dump has already.
type podmanConfig struct {
	archive.Config
	ShmSize     int64               `json:"shmSize"`
	User        string              `json:"user,omitempty"`
	Passwd      bool                `json:"passwd"` // whether podman may mount an /etc/passwd of its own
	CreateNetNS bool                `json:"createNetNS"`
	NetMode     string              `json:"networkMode"`
	Networks    map[string]struct{} `json:"newNetworks,omitempty"`
	StopSignal  uint                `json:"stopSignal"`
	StopTimeout uint                `json:"stopTimeout"` // seconds
	LogDriver   string              `json:"logDriver"`
}

var sha256Hex = regexp.MustCompile(`^[0-9a-f]{64}$`)

// config is podman's configuration of the container. The spec, from which podman makes the OCI runtime's own, is changed in place.
func (p *podman) config(imageID string) (podmanConfig, error) {
	c := podmanConfig{Config: p.Config, ShmSize: 64 << 20, NetMode: "host", StopSignal: 15, StopTimeout: 10, LogDriver: "k8s-file"}
	if imageID != "" {
		c.RootfsImageID = strings.TrimPrefix(imageID, "sha256:")
	}
	switch {
	case c.RootfsImageName == "":
		return c, errors.New("the archive does not name the container's image, which podman needs")
	case c.RootfsImageID == "":
		return c, errors.New("the archive lacks the ID of the container's image, which podman needs: give it by --image-id; " +
			"podman image inspect --format '{{.Id}}' IMAGE tells it")
	case !sha256Hex.MatchString(c.RootfsImageID):
		return c, fmt.Errorf("image ID %q: 64 hexadecimal digits are needed", c.RootfsImageID)
	case p.Spec.Process == nil || p.Spec.Linux == nil || p.Spec.Root == nil:
		return c, fmt.Errorf("%s has no process, no root or no Linux part: podman makes no container from it", archive.SpecDump)
	}
	if user := p.Spec.Process.User; user.UID != 0 || user.GID != 0 {
		c.User = fmt.Sprintf("%d:%d", user.UID, user.GID)
	}
	for i, ns := range p.Spec.Linux.Namespaces {
		switch {
		case ns.Type == specs.NetworkNamespace:
			c.CreateNetNS, c.NetMode, c.Networks = true, "bridge", map[string]struct{}{"podman": {}}
		case ns.Type == specs.PIDNamespace && ns.Path != "":
			return c, errors.New("the container shares the process namespace of its pod, outside of which podman cannot restore it")
		}
		// podman sets that of the network; CRIU makes the others again from what was dumped.
		p.Spec.Linux.Namespaces[i].Path = ""
	}
	return c, nil
}

// anyRoot returns files.img without the mode of the root directory, which CRIU would otherwise compare. Layers of images seldom
// tell it, and then it is 0755 in containerd and 0555 in podman. The changes of the writable layer cannot set it there.
func anyRoot(files []*fdinfo.FileEntry) ([]byte, error) {
	for _, f := range files {
		if f.GetReg().GetName() == "/" {
			f.GetReg().Mode = nil
		}
	}
	return image.Write("FILES", files)
}

// digest is what a member becomes.
func (p *podman) digest(m archive.Digest) archive.Digest {
	if m.Name == archive.ContainerLog {
		return p.log
	}
	if content, ok := p.changed[m.Name]; ok {
		sum := sha256.Sum256(content)
		m.Size, m.SHA256 = int64(len(content)), hex.EncodeToString(sum[:])
	}
	return m
}

// write copies the archive, with what is changed.
func (p *podman) write(w *tar.Writer, r io.Reader) error {
	for entries := tar.NewReader(r); ; {
		h, err := entries.Next()
		if err == io.EOF {
			return nil
		}
		if err == nil {
			err = p.writeEntry(w, h, entries)
		}
		if err != nil {
			return err
		}
	}
}

func (p *podman) writeEntry(w *tar.Writer, h *tar.Header, r io.Reader) error {
	if h.Typeflag == tar.TypeDir {
		return w.WriteHeader(&tar.Header{
			Typeflag: tar.TypeDir, Name: h.Name, Mode: 0o700, ModTime: h.ModTime.Truncate(time.Second), Format: tar.FormatPAX,
		})
	}
	if content, ok := p.changed[h.Name]; ok {
		return writeMember(w, h.Name, content, h.ModTime)
	}
	m := p.digest(archive.Digest{Name: h.Name, Size: h.Size})
	if err := w.WriteHeader(header(m.Name, m.Size, h.ModTime)); err != nil {
		return err
	}
	if h.Name == archive.ContainerLog {
		return podmanLines(w, r)
	}
	return pipe(w, r)
}
