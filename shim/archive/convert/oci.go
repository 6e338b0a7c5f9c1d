package convert

import (
	"archive/tar"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"runtime"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	oci "github.com/opencontainers/image-spec/specs-go/v1"

	"crishim/shim/archive"
)

// Annotations of a manifest by which engines know an image for a checkpoint; the value is the container's name. There are others
// of the kind, of which one must not be set: newer CRI-O takes an image with org.criu.checkpoint.pod.name for that of a whole pod.
const (
	annotationContainerd = "org.criu.checkpoint.container.name"
	annotationCRIO       = "io.kubernetes.cri-o.annotations.checkpoint.name"
	annotationImageName  = "io.containerd.image.name" // of a descriptor: what ctr calls an image that it imports
)

// ToOCI writes an image to the new file out: an OCI layout in a tar, with one layer, which is the archive itself. The image is
// called name, or after container and time where name is empty; ToOCI returns what it is called in full.
//
// file is read from its beginning. out is an absolute path, of the kind that archive.OpenLocation allows.
func ToOCI(ctx context.Context, file *os.File, out, name string) (string, error) {
	v, err := verify(ctx, file, nil)
	if err != nil {
		return "", err
	}
	if name == "" {
		name = imageName(v.Config)
	}
	named, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return "", fmt.Errorf("parse image name %q: %w", name, err)
	}
	if _, digested := named.(reference.Digested); digested {
		return "", fmt.Errorf("image name %q must not have a digest: it is not known yet", name)
	}
	name = reference.TagNameOnly(named).String()
	err = publish(ctx, out, func(w *tar.Writer) error { return v.writeLayout(ctx, w, name) })
	return name, err
}

// imageName is a name that is valid and, with the time, seldom there twice. Names of containers in Kubernetes are such as images
// may have; others are left out.
func imageName(c archive.Config) string {
	tag := c.CheckpointedTime.UTC().Format("20060102T150405Z")
	if named, err := reference.WithName("localhost/checkpoint/" + strings.ToLower(c.Name)); err == nil {
		return named.Name() + ":" + tag
	}
	return "localhost/checkpoint:" + tag
}

func (v *verified) writeLayout(ctx context.Context, w *tar.Writer, name string) error {
	mediaType := oci.MediaTypeImageLayer
	if v.zstd {
		mediaType = oci.MediaTypeImageLayerZstd
	}
	layer := oci.Descriptor{MediaType: mediaType, Digest: digest.NewDigestFromEncoded(digest.SHA256, v.sha256), Size: v.size}
	created := v.Config.CheckpointedTime
	architecture := runtime.GOARCH
	if v.Manifest != nil && v.Manifest.Origin.Architecture != "" {
		architecture = v.Manifest.Origin.Architecture
	}
	config, configJSON, err := blob(oci.MediaTypeImageConfig, oci.Image{
		Created:  &created,
		Platform: oci.Platform{Architecture: architecture, OS: "linux"},
		RootFS:   oci.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.NewDigestFromEncoded(digest.SHA256, v.plain)}},
	})
	if err != nil {
		return err
	}
	manifest, manifestJSON, err := blob(oci.MediaTypeImageManifest, oci.Manifest{
		Versioned:   specs.Versioned{SchemaVersion: 2},
		MediaType:   oci.MediaTypeImageManifest,
		Config:      config,
		Layers:      []oci.Descriptor{layer},
		Annotations: map[string]string{annotationContainerd: v.Config.Name, annotationCRIO: v.Config.Name},
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{oci.AnnotationRefName: name, annotationImageName: name}
	_, indexJSON, err := blob(oci.MediaTypeImageIndex, oci.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: oci.MediaTypeImageIndex,
		Manifests: []oci.Descriptor{manifest},
	})
	if err != nil {
		return err
	}
	_, layoutJSON, err := blob("", oci.ImageLayout{Version: oci.ImageLayoutVersion})
	if err != nil {
		return err
	}

	for _, m := range []struct {
		name    string
		content []byte
	}{
		{oci.ImageLayoutFile, layoutJSON},
		{oci.ImageIndexFile, indexJSON},
		{blobPath(manifest), manifestJSON},
		{blobPath(config), configJSON},
	} {
		if err := writeMember(w, m.name, m.content, created); err != nil {
			return err
		}
	}
	if err := w.WriteHeader(header(blobPath(layer), layer.Size, created)); err != nil {
		return err
	}
	return v.copyTo(ctx, func(r io.Reader) error { return pipe(w, r) })
}

func blob(mediaType string, value any) (oci.Descriptor, []byte, error) {
	data, err := json.Marshal(value)
	return oci.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}, data, err
}

func blobPath(d oci.Descriptor) string {
	return oci.ImageBlobsDir + "/" + d.Digest.Algorithm().String() + "/" + d.Digest.Encoded()
}
