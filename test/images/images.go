// Package images holds the sources of the programs that the test's containers run, and writes container images: OCI
// layouts, made with the standard library alone.
package images

import (
	"archive/tar"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
)

// Sources holds a directory of Go files for each program, and this file: together with what is given to Write, that is
// what an image depends on.
//
//go:embed images.go pause/*.go workload/*.go programs/*
var Sources embed.FS

// File is what an image's only layer holds: a regular file, a symbolic link, or a directory, as its mode says.
type File struct {
	Name string
	Mode os.FileMode
	// Source is the path of a regular file's content, or the target of a link.
	Source string
}

// Config is how an image's process starts.
type Config struct {
	Entrypoint []string `json:",omitempty"`
	Cmd        []string `json:",omitempty"`
	Env        []string `json:",omitempty"`
	User       string   `json:",omitempty"`
	StopSignal string   `json:",omitempty"`
}

const (
	mediaIndex    = "application/vnd.oci.image.index.v1+json"
	mediaManifest = "application/vnd.oci.image.manifest.v1+json"
	mediaConfig   = "application/vnd.oci.image.config.v1+json"
	mediaLayer    = "application/vnd.oci.image.layer.v1.tar"
)

type descriptor struct {
	MediaType   string            `json:"mediaType"`
	Digest      string            `json:"digest"`
	Size        int64             `json:"size"`
	Annotations map[string]string `json:"annotations,omitempty"`
}

// Write adds an image to an OCI layout, which it makes where it is missing. The image is called name in its index.
func Write(layout, name string, config Config, files []File) error {
	return WriteTar(layout, map[string]Config{name: config}, func(w io.Writer) error { return writeLayer(w, files) })
}

// WriteTar is Write for images, by their names, that share their only layer: what write writes, a tar.
func WriteTar(layout string, configs map[string]Config, write func(io.Writer) error) error {
	if err := os.MkdirAll(filepath.Join(layout, "blobs/sha256"), 0o755); err != nil {
		return fmt.Errorf("write images: %w", err)
	}
	layer, err := addBlob(layout, mediaLayer, write)
	if err != nil {
		return fmt.Errorf("write layer: %w", err)
	}
	for _, name := range slices.Sorted(maps.Keys(configs)) {
		if err := addImage(layout, name, configs[name], layer); err != nil {
			return fmt.Errorf("write image %s: %w", name, err)
		}
	}
	return nil
}

func addImage(layout, name string, config Config, layer descriptor) error {
	imageConfig, err := addJSON(layout, mediaConfig, map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       config,
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{layer.Digest}},
	})
	if err != nil {
		return err
	}
	manifest, err := addJSON(layout, mediaManifest, map[string]any{
		"schemaVersion": 2,
		"mediaType":     mediaManifest,
		"config":        imageConfig,
		"layers":        []descriptor{layer},
	})
	if err != nil {
		return err
	}
	manifest.Annotations = map[string]string{"org.opencontainers.image.ref.name": name}
	return addToIndex(layout, manifest)
}

func writeLayer(w io.Writer, files []File) error {
	archive := tar.NewWriter(w)
	for _, file := range files {
		header := &tar.Header{Name: file.Name, Mode: int64(file.Mode.Perm())}
		if file.Mode&os.ModeSticky != 0 {
			header.Mode |= 0o1000
		}
		var content []byte
		var err error
		switch {
		case file.Mode.IsDir():
			header.Typeflag = tar.TypeDir
		case file.Mode&os.ModeSymlink != 0:
			header.Typeflag, header.Linkname = tar.TypeSymlink, file.Source
		default:
			header.Typeflag = tar.TypeReg
			if content, err = os.ReadFile(file.Source); err != nil {
				return err
			}
			header.Size = int64(len(content))
		}
		if err := archive.WriteHeader(header); err != nil {
			return err
		}
		if _, err := archive.Write(content); err != nil {
			return err
		}
	}
	return archive.Close()
}

func addJSON(layout, mediaType string, value any) (descriptor, error) {
	return addBlob(layout, mediaType, func(w io.Writer) error { return json.NewEncoder(w).Encode(value) })
}

func addBlob(layout, mediaType string, write func(io.Writer) error) (descriptor, error) {
	dir := filepath.Join(layout, "blobs/sha256")
	file, err := os.CreateTemp(dir, "new-")
	if err != nil {
		return descriptor{}, err
	}
	defer file.Close()
	hash := sha256.New()
	if err := write(io.MultiWriter(file, hash)); err != nil {
		return descriptor{}, err
	}
	size, err := file.Seek(0, io.SeekCurrent)
	if err != nil {
		return descriptor{}, err
	}
	sum := hex.EncodeToString(hash.Sum(nil))
	if err := os.Rename(file.Name(), filepath.Join(dir, sum)); err != nil {
		return descriptor{}, err
	}
	return descriptor{MediaType: mediaType, Digest: "sha256:" + sum, Size: size}, nil
}

func addToIndex(layout string, manifest descriptor) error {
	index := struct {
		SchemaVersion int          `json:"schemaVersion"`
		MediaType     string       `json:"mediaType"`
		Manifests     []descriptor `json:"manifests"`
	}{SchemaVersion: 2, MediaType: mediaIndex}
	path := filepath.Join(layout, "index.json")
	content, err := os.ReadFile(path)
	switch {
	case os.IsNotExist(err):
	case err != nil:
		return err
	default:
		if err := json.Unmarshal(content, &index); err != nil {
			return fmt.Errorf("read index: %w", err)
		}
	}
	index.Manifests = append(index.Manifests, manifest)
	if content, err = json.Marshal(index); err != nil {
		return err
	}
	if err := os.WriteFile(path, content, 0o644); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(layout, "oci-layout"), []byte(`{"imageLayoutVersion":"1.0.0"}`), 0o644)
}
