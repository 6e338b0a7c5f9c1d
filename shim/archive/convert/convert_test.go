package convert

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/regfile"
	"github.com/opencontainers/go-digest"
	oci "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"
	"google.golang.org/protobuf/proto"

	"crishim/criu/image"
	"crishim/shim/archive"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// directory is one in which an archive may appear.
func directory(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("an archive is root's")
	}
	dir := t.TempDir()
	must(t, os.Chmod(dir, 0o755))
	return dir
}

const logText = "2026-11-24T03:18:26.12345678Z stdout F count 1\n" + // a zero is not written
	"2026-11-24T03:18:26.223456789Z stdout F count 2\n" +
	"2026-11-24T03:18:26Z stderr P no line of a log \n"

var podmanText = strings.NewReplacer("26.12345678Z", "26.123456780Z", "26Z", "26.000000000Z").Replace(logText)

// files is files.img with the root directory, another, and an entry of a CRIU that is yet to come.
func files(t *testing.T) []byte {
	t.Helper()
	regular := func(id uint32, name string) *fdinfo.FileEntry {
		return &fdinfo.FileEntry{Type: fdinfo.FdTypes_REG.Enum(), Id: &id, Reg: &regfile.RegFileEntry{
			Id: &id, Name: &name, Mode: proto.Uint32(0o40755),
		}}
	}
	kind := fdinfo.FdTypes(99)
	later := &fdinfo.FileEntry{Id: proto.Uint32(4), Type: &kind}
	later.ProtoReflect().SetUnknown([]byte{0xf0, 0x01, 7}) // field 30
	data, err := image.Write("FILES", []*fdinfo.FileEntry{regular(1, "/"), regular(2, "/root"), regular(3, "/"), later})
	must(t, err)
	return data
}

// archiveOf makes an archive as crishim does.
func archiveOf(t *testing.T, change func(members map[string][]byte)) *os.File {
	t.Helper()
	return archiveIn(t, archive.Options{}, change)
}

func archiveIn(t *testing.T, options archive.Options, change func(members map[string][]byte)) *os.File {
	t.Helper()
	id := strings.Repeat("ab", 32)
	members := map[string][]byte{
		"config.dump": []byte(`{"id":"0123","name":"Web","runtime":"runc","checkpointedTime":"2026-11-24T03:18:26Z",` +
			`"rootfsImageName":"registry.example/web:1","rootfsImageID":"` + id + `"}`),
		"spec.dump": []byte(`{"root":{"path":"rootfs"},"process":{"user":{"uid":1000,"gid":100},"cwd":"/"},"linux":{"namespaces":[{"type":"pid"},` +
			`{"type":"ipc","path":"/proc/1/ns/ipc"},{"type":"network","path":"/var/run/netns/n"},{"type":"mount"}]}}`),
		"status.dump":                 []byte(`{}`),
		"checkpoint/inventory.img":    []byte("i"),
		"checkpoint/pages-1.img":      bytes.Repeat([]byte("page"), 1<<19),
		"checkpoint/descriptors.json": []byte("[]"),
		"checkpoint/files.img":        files(t),
		"container.log":               []byte(logText),
		"crishim.json":                []byte(`{"version":1,"origin":{"crishim":"1.2.3","architecture":"arm64"}}`),
	}
	pstree, err := image.Write("PSTREE", []proto.Message{})
	must(t, err)
	members["checkpoint/pstree.img"] = pstree
	if change != nil {
		change(members)
	}
	path := filepath.Join(directory(t), "checkpoint.tar")
	location, err := archive.OpenLocation(path)
	must(t, err)
	defer location.Close()
	staging, err := location.Stage(archive.StagingName())
	must(t, err)
	defer staging.Remove()
	for name, content := range members {
		if content != nil {
			must(t, staging.WriteFile(name, content))
		}
	}
	must(t, staging.Assemble(t.Context(), options, nil))
	must(t, staging.Publish(t.Context()))
	file, err := os.Open(path)
	must(t, err)
	t.Cleanup(func() { file.Close() })
	return file
}

// untar reads the regular files of a tar.
func untar(t *testing.T, path string) (names []string, content map[string][]byte) {
	t.Helper()
	info, err := os.Stat(path)
	must(t, err)
	if info.Mode() != 0o600 {
		t.Errorf("mode is %v", info.Mode())
	}
	file, err := os.Open(path)
	must(t, err)
	defer file.Close()
	content = map[string][]byte{}
	for entries := tar.NewReader(file); ; {
		h, err := entries.Next()
		if err == io.EOF {
			return names, content
		}
		must(t, err)
		names = append(names, h.Name)
		content[h.Name], err = io.ReadAll(entries)
		must(t, err)
	}
}

func TestOCI(t *testing.T) {
	file := archiveOf(t, nil)
	whole, err := os.ReadFile(file.Name())
	must(t, err)
	for name, test := range map[string]struct{ ask, want string }{
		"by container and time": {"", "localhost/checkpoint/web:20261124T031826Z"},
		"by name":               {"registry.example/checkpoints/web", "registry.example/checkpoints/web:latest"},
		"by a short name":       {"web:2", "docker.io/library/web:2"},
	} {
		t.Run(name, func(t *testing.T) {
			out := filepath.Join(directory(t), "image.tar")
			_, err := file.Seek(0, io.SeekStart)
			must(t, err)
			got, err := ToOCI(t.Context(), file, out, test.ask)
			must(t, err)
			if got != test.want {
				t.Errorf("it is called %q, want %q", got, test.want)
			}
			_, content := untar(t, out)
			if string(content["oci-layout"]) != `{"imageLayoutVersion":"1.0.0"}` {
				t.Errorf("oci-layout is %s", content["oci-layout"])
			}
			var index oci.Index
			parse(t, content["index.json"], &index)
			named := index.Manifests[0]
			if named.Annotations["io.containerd.image.name"] != test.want || named.Annotations["org.opencontainers.image.ref.name"] != test.want {
				t.Errorf("index is %s", content["index.json"])
			}
			var manifest oci.Manifest
			parse(t, blobOf(t, content, named), &manifest)
			if a := manifest.Annotations; len(a) != 2 || a["org.criu.checkpoint.container.name"] != "Web" || a["io.kubernetes.cri-o.annotations.checkpoint.name"] != "Web" {
				t.Errorf("annotations are %v", a)
			}
			var config oci.Image
			parse(t, blobOf(t, content, manifest.Config), &config)
			if config.Architecture != "arm64" || config.OS != "linux" || len(config.RootFS.DiffIDs) != 1 || config.RootFS.DiffIDs[0] != manifest.Layers[0].Digest {
				t.Errorf("config is %+v", config)
			}
			if !bytes.Equal(blobOf(t, content, manifest.Layers[0]), whole) {
				t.Error("the layer is not the archive")
			}
		})
	}
}

// A compressed archive is a compressed layer as it is, and decompressed for podman.
func TestCompressed(t *testing.T) {
	file := archiveIn(t, archive.Options{Compression: archive.Zstd}, nil)
	whole, err := os.ReadFile(file.Name())
	must(t, err)
	out := filepath.Join(directory(t), "image.tar")
	_, err = ToOCI(t.Context(), file, out, "")
	must(t, err)
	_, content := untar(t, out)
	var index oci.Index
	parse(t, content["index.json"], &index)
	var manifest oci.Manifest
	parse(t, blobOf(t, content, index.Manifests[0]), &manifest)
	var image oci.Image
	parse(t, blobOf(t, content, manifest.Config), &image)
	layer := manifest.Layers[0]
	if layer.MediaType != oci.MediaTypeImageLayerZstd || !bytes.Equal(blobOf(t, content, layer), whole) {
		t.Errorf("layer %+v is not the archive", layer)
	}
	plain, _, err := archive.Decompress(bytes.NewReader(whole))
	must(t, err)
	defer plain.Close()
	if is, err := digest.FromReader(plain); err != nil || image.RootFS.DiffIDs[0] != is {
		t.Errorf("the layer's content is called %s, is %s, %v", image.RootFS.DiffIDs[0], is, err)
	}

	_, err = file.Seek(0, io.SeekStart)
	must(t, err)
	out = filepath.Join(directory(t), "podman.tar")
	must(t, ToPodman(t.Context(), file, out, ""))
	if _, content := untar(t, out); !bytes.Equal(content["checkpoint/pages-1.img"], bytes.Repeat([]byte("page"), 1<<19)) {
		t.Error("podman's archive has other pages")
	}
}

func parse(t *testing.T, data []byte, value any) {
	t.Helper()
	must(t, json.Unmarshal(data, value))
}

func blobOf(t *testing.T, content map[string][]byte, d oci.Descriptor) []byte {
	t.Helper()
	data, ok := content["blobs/sha256/"+d.Digest.Encoded()]
	sum := sha256.Sum256(data)
	if !ok || int64(len(data)) != d.Size || hex.EncodeToString(sum[:]) != d.Digest.Encoded() {
		t.Errorf("blob %+v has %d bytes, or another digest", d, len(data))
	}
	return data
}

func TestPodman(t *testing.T) {
	file := archiveOf(t, nil)
	before, old := untar(t, file.Name())
	out := filepath.Join(directory(t), "podman.tar")
	must(t, ToPodman(t.Context(), file, out, ""))
	after, content := untar(t, out)

	before[slices.Index(before, "container.log")] = "ctr.log"
	if !slices.Equal(before, after) {
		t.Errorf("members are %q, want %q", after, before)
	}
	if got := string(content["ctr.log"]); got != podmanText {
		t.Errorf("log is\n%s", got)
	}
	for _, same := range []string{"status.dump", "checkpoint/pages-1.img", "checkpoint/pstree.img"} {
		if !bytes.Equal(content[same], old[same]) {
			t.Errorf("%s has changed", same)
		}
	}
	var config map[string]any
	parse(t, content["config.dump"], &config)
	for key, want := range map[string]string{
		"id": "0123", "name": "Web", "runtime": "runc", "rootfsImageName": "registry.example/web:1", "rootfsImageID": strings.Repeat("ab", 32),
		"user": "1000:100", "createNetNS": "true", "networkMode": "bridge", "newNetworks": "map[podman:map[]]", "logDriver": "k8s-file", "passwd": "false",
	} {
		if got := fmt.Sprint(config[key]); got != want {
			t.Errorf("config.dump has %s = %s, want %s", key, got, want)
		}
	}
	var spec specs.Spec
	parse(t, content["spec.dump"], &spec)
	for _, ns := range spec.Linux.Namespaces {
		if ns.Path != "" {
			t.Errorf("namespace %s is still the pod's", ns.Type)
		}
	}
	var modes []string
	must(t, image.Read(bytes.NewReader(content["checkpoint/files.img"]), 0, "FILES", func(f *fdinfo.FileEntry) {
		modes = append(modes, fmt.Sprintf("%d %d %s %o %x", f.GetId(), f.GetType(), f.GetReg().GetName(), f.GetReg().GetMode(), f.ProtoReflect().GetUnknown()))
	}))
	if want := []string{"1 1 / 0 ", "2 1 /root 40755 ", "3 1 / 0 ", "4 99  0 f00107"}; !slices.Equal(modes, want) {
		t.Errorf("files are %q, want %q", modes, want)
	}

	result, err := os.Open(out)
	must(t, err)
	defer result.Close()
	report, err := archive.Verify(t.Context(), result, nil)
	must(t, err)
	if report.Problems != nil || report.Manifest == nil || report.Manifest.Origin.Crishim != "1.2.3" {
		t.Errorf("manifest %v, problems %q", report.Manifest, report.Problems)
	}
	if err := ToPodman(t.Context(), result, out+"2", ""); err == nil {
		t.Error("nothing was converted twice, and it went unnoticed")
	}
}

func TestPodmanRefuses(t *testing.T) {
	set := func(name, content string) func(map[string][]byte) {
		return func(m map[string][]byte) { m[name] = []byte(content) }
	}
	for name, test := range map[string]struct {
		change  func(map[string][]byte)
		imageID string
		want    string // "" for none
	}{
		"no image ID":           {set("config.dump", `{"rootfsImageName":"web:1"}`), "", "give it by --image-id"},
		"an image ID":           {set("config.dump", `{"rootfsImageName":"web:1"}`), "sha256:" + strings.Repeat("0", 64), ""},
		"a name for an ID":      {nil, "web:1", "64 hexadecimal digits"},
		"no image name":         {set("config.dump", `{}`), "", "does not name the container's image"},
		"no process":            {set("spec.dump", `{}`), "", "podman makes no container from it"},
		"the pod's processes":   {set("spec.dump", `{"root":{},"process":{},"linux":{"namespaces":[{"type":"pid","path":"/p"}]}}`), "", "process namespace of its pod"},
		"the machine's network": {set("spec.dump", `{"root":{},"process":{},"linux":{}}`), "", ""},
		"podman's own":          {set("ctr.log", ""), "", "needs no conversion"},
		"no archive":            {set("config.dump", `{`), "", "is not sound"},
	} {
		t.Run(name, func(t *testing.T) {
			file := archiveOf(t, test.change)
			out := filepath.Join(directory(t), "podman.tar")
			err := ToPodman(t.Context(), file, out, test.imageID)
			if test.want == "" && err != nil || test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("error is %v, want %q", err, test.want)
			}
			if _, statErr := os.Stat(out); (err == nil) != (statErr == nil) {
				t.Errorf("with error %v, stat says %v", err, statErr)
			}
			must(t, onlyIn(filepath.Dir(out), "podman.tar"))
		})
	}
}

// onlyIn reports what a directory has beside one name.
func onlyIn(dir, name string) error {
	entries, err := os.ReadDir(dir)
	for _, e := range entries {
		if e.Name() != name {
			err = errors.Join(err, fmt.Errorf("%s is left", e.Name()))
		}
	}
	return err
}

func TestNothingIsReplaced(t *testing.T) {
	for name, convert := range map[string]func(ctx context.Context, file *os.File, out string) error{
		"oci": func(ctx context.Context, file *os.File, out string) error {
			_, err := ToOCI(ctx, file, out, "")
			return err
		},
		"podman": func(ctx context.Context, file *os.File, out string) error { return ToPodman(ctx, file, out, "") },
	} {
		t.Run(name, func(t *testing.T) {
			file := archiveOf(t, nil)
			out := filepath.Join(directory(t), "out.tar")
			must(t, os.WriteFile(out, []byte("precious"), 0o644))
			if err := convert(t.Context(), file, out); !errors.Is(err, archive.ErrExists) {
				t.Errorf("error is %v, want ErrExists", err)
			}
			if content, err := os.ReadFile(out); err != nil || string(content) != "precious" {
				t.Errorf("what was there is %q now, %v", content, err)
			}
			must(t, onlyIn(filepath.Dir(out), "out.tar"))

			ctx, cancel := context.WithCancelCause(t.Context())
			cancel(errors.New("enough"))
			if err := convert(ctx, file, out+"2"); err == nil || !strings.Contains(err.Error(), "enough") {
				t.Errorf("error is %v, want the context's cause", err)
			}
			must(t, onlyIn(filepath.Dir(out), "out.tar"))
		})
	}
}

// What is copied is what was verified.
func TestChangeInBetween(t *testing.T) {
	file := archiveOf(t, nil)
	v, err := verify(t.Context(), file, nil)
	must(t, err)
	must(t, os.Chmod(file.Name(), 0o600))
	other, err := os.OpenFile(file.Name(), os.O_WRONLY, 0)
	must(t, err)
	_, err = other.WriteAt([]byte("x"), v.size/2)
	must(t, errors.Join(err, other.Close()))
	if err := v.copyTo(t.Context(), func(r io.Reader) error { return nil }); err == nil || !strings.Contains(err.Error(), "has changed") {
		t.Errorf("error is %v", err)
	}
}

func TestPodmanLines(t *testing.T) {
	long := strings.Repeat("x", 200<<10)
	firstLine := func(text string) int { return strings.Index(text, "\n") + 1 }
	for _, test := range [][2]string{
		{"", ""},
		{logText, podmanText},
		{"no time", "no time"},
		{"no time\n\n \n", "no time\n\n \n"},
		{"2026-11-24T03:18:26Z", "2026-11-24T03:18:26Z"}, // cut off
		{"2026-11-24T03:18:26.1+01:00 stdout", "2026-11-24T03:18:26.100000000+01:00 stdout"},
		{"2026-11-24T03:18:26.5Z a " + long, "2026-11-24T03:18:26.500000000Z a " + long},
		{long + " " + long + "\n" + logText, long + " " + long + "\n" + podmanText},
		// A time in the middle of a line, where the buffer begins anew.
		{long[:64<<10] + logText, long[:64<<10] + logText[:firstLine(logText)] + podmanText[firstLine(podmanText):]},
	} {
		var out bytes.Buffer
		must(t, podmanLines(&out, strings.NewReader(test[0])))
		if got := out.String(); got != test[1] {
			t.Errorf("%.60q became %.80q, want %.80q", test[0], got, test[1])
		}
	}
}
