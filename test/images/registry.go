package images

import (
	"encoding/json"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
)

// Registry serves the images of OCI layouts read-only, as the registry of everything: of a reference only the last
// part of its path counts, whatever its host and tag. A digest finds its blob.
type Registry struct{ Layouts []string }

var blobPath = regexp.MustCompile(`^/v2/(?:[^/]+/)*([^/]+)/(manifests|blobs)/([^/]+)$`)

var digest = regexp.MustCompile(`^sha256:([0-9a-f]{64})$`)

// ServeHTTP answers the pulling part of the OCI distribution protocol.
func (r Registry) ServeHTTP(w http.ResponseWriter, request *http.Request) {
	if request.Method != http.MethodGet && request.Method != http.MethodHead {
		http.Error(w, "this registry is read-only", http.StatusMethodNotAllowed)
		return
	}
	if request.URL.Path == "/v2/" {
		return
	}
	match := blobPath.FindStringSubmatch(request.URL.Path)
	if match == nil {
		http.NotFound(w, request)
		return
	}
	name, reference := match[1], match[3]
	if match[2] == "manifests" && !digest.MatchString(reference) {
		var err error
		if reference, err = r.manifest(name); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
	}
	sum := digest.FindStringSubmatch(reference)
	if sum == nil {
		http.NotFound(w, request)
		return
	}
	w.Header().Set("Content-Type", "application/octet-stream")
	if match[2] == "manifests" {
		w.Header().Set("Content-Type", mediaManifest)
	}
	w.Header().Set("Docker-Content-Digest", reference)
	for _, layout := range r.Layouts {
		blob := filepath.Join(layout, "blobs/sha256", sum[1])
		if _, err := os.Stat(blob); err == nil {
			http.ServeFile(w, request, blob)
			return
		}
	}
	http.NotFound(w, request)
}

// manifest returns the digest of an image's manifest, or nothing where there is no such image.
func (r Registry) manifest(name string) (string, error) {
	for _, layout := range r.Layouts {
		content, err := os.ReadFile(filepath.Join(layout, "index.json"))
		if err != nil {
			return "", err
		}
		var index struct{ Manifests []descriptor }
		if err := json.Unmarshal(content, &index); err != nil {
			return "", err
		}
		for _, m := range index.Manifests {
			if m.Annotations["org.opencontainers.image.ref.name"] == name {
				return m.Digest, nil
			}
		}
	}
	return "", nil
}
