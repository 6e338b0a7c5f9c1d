package images_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"crishim/test/images"
)

func TestRegistryServesWhatWasWritten(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("content"), 0o600); err != nil {
		t.Fatal(err)
	}
	layout := filepath.Join(dir, "layout")
	for _, name := range []string{"first", "second"} {
		err := images.Write(layout, name, images.Config{Cmd: []string{name}}, []images.File{
			{Name: "bin", Mode: fs.ModeDir | 0o755},
			{Name: "bin/program", Mode: 0o755, Source: program},
			{Name: "bin/link", Mode: fs.ModeSymlink | 0o777, Source: "program"},
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	server := httptest.NewServer(images.Registry{Layouts: []string{layout}})
	defer server.Close()

	var manifest struct {
		Config struct{ Digest string }
		Layers []struct{ Digest string }
	}
	read(t, server.URL+"/v2/some/place/second/manifests/v1", &manifest)
	var config struct{ Config images.Config }
	read(t, server.URL+"/v2/some/place/second/blobs/"+manifest.Config.Digest, &config)
	if !slices.Equal(config.Config.Cmd, []string{"second"}) {
		t.Errorf("config is %v", config)
	}
	response, err := http.Get(server.URL + "/v2/second/blobs/" + manifest.Layers[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	var names []string
	for layer := tar.NewReader(response.Body); ; {
		header, err := layer.Next()
		if errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			t.Fatal(err)
		}
		names = append(names, string(header.Typeflag)+header.Name+header.Linkname)
	}
	if !slices.Equal(names, []string{"5bin", "0bin/program", "2bin/linkprogram"}) {
		t.Errorf("layer has %q", names)
	}
	for _, path := range []string{"/v2/third/manifests/v1", "/v2/second/blobs/sha256:../../index.json", "/elsewhere"} {
		response, err := http.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		response.Body.Close()
		if response.StatusCode != http.StatusNotFound {
			t.Errorf("%s: %s", path, response.Status)
		}
	}
}

func TestImagesShareALayer(t *testing.T) {
	layout := filepath.Join(t.TempDir(), "layout")
	configs := map[string]images.Config{"first": {Cmd: []string{"first"}}, "second": {Cmd: []string{"second"}, User: "1234"}}
	err := images.WriteTar(layout, configs, func(w io.Writer) error {
		_, err := io.WriteString(w, "a layer")
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(images.Registry{Layouts: []string{layout}})
	defer server.Close()
	layers := map[string]bool{}
	for name, want := range configs {
		var manifest struct {
			Config struct{ Digest string }
			Layers []struct{ Digest string }
		}
		read(t, server.URL+"/v2/"+name+"/manifests/v1", &manifest)
		var config struct{ Config images.Config }
		read(t, server.URL+"/v2/"+name+"/blobs/"+manifest.Config.Digest, &config)
		if !slices.Equal(config.Config.Cmd, want.Cmd) || config.Config.User != want.User {
			t.Errorf("%s: config is %v", name, config)
		}
		layers[manifest.Layers[0].Digest] = true
	}
	if len(layers) != 1 {
		t.Errorf("layers are %v", layers)
	}
}

func read(t *testing.T, url string, into any) {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	content, err := io.ReadAll(response.Body)
	if err != nil || response.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, response.Status, err)
	}
	if err := json.Unmarshal(content, into); err != nil {
		t.Fatal(err)
	}
}
