package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"testing"
	"time"
)

// written is an archive as Assemble writes it, with a manifest.
func written(t *testing.T) []byte {
	t.Helper()
	path := rootDir(t) + "/a.tar"
	s := stage(t, path)
	fill(t, s)
	must(t, s.WriteJSON(ManifestName, NewManifest(Origin{Crishim: "1.2.3", Criu: "4.2.1", Architecture: "amd64"})))
	must(t, s.WriteFile("status.dump", []byte("{}")))
	must(t, s.WriteFile("checkpoint/pstree.img", []byte("pstree")))
	must(t, s.Assemble(t.Context(), Options{}, nil))
	must(t, s.Publish(t.Context()))
	data, err := os.ReadFile(path)
	must(t, err)
	return data
}

// The digest of an archive is that of its manifest, and so of all that is in it.
func TestDigest(t *testing.T) {
	for _, options := range []Options{{}, {Compression: Zstd}, {Digest: None}} {
		path := rootDir(t) + "/a.tar"
		s := stage(t, path)
		fill(t, s)
		must(t, s.WriteJSON(ManifestName, NewManifest(Origin{})))
		must(t, s.Assemble(t.Context(), options, nil))
		must(t, s.Publish(t.Context()))
		want := ""
		if options.Digest != None {
			file, err := os.Open(path)
			must(t, err)
			defer file.Close()
			plain, _, err := Decompress(file)
			must(t, err)
			defer plain.Close()
			want = fmt.Sprintf("%x", sha256.Sum256(read(t, plain)[ManifestName]))
		}
		if got := s.Digest(); got != want {
			t.Errorf("with %+v the digest is %q, want %q", options, got, want)
		}
	}
}

func TestVerify(t *testing.T) {
	data := written(t)
	var looked []string
	report, err := Verify(t.Context(), bytes.NewReader(data), func(name string, size int64, content io.Reader) error {
		looked = append(looked, name)
		if name == "container.log" {
			if log, err := io.ReadAll(content); err != nil || string(log) != "hello\n" || size != 6 {
				t.Errorf("log is %q, %v", log, err)
			}
		}
		return nil
	})
	must(t, err)
	if report.Problems != nil {
		t.Errorf("problems: %q", report.Problems)
	}
	if report.Manifest.Origin.Crishim != "1.2.3" || report.Config.Name != "counter" {
		t.Errorf("report is %+v", report)
	}
	last := report.Members[len(report.Members)-1]
	if last.Name != ManifestName {
		t.Errorf("the last member is %s", last.Name)
	}
	if n := len(report.Members) - 1; !slices.Equal(report.Manifest.Members, report.Members[:n]) {
		t.Errorf("the manifest has\n%v\nthe archive\n%v", report.Manifest.Members, report.Members[:n])
	}
	if slices.Contains(looked, ConfigDump) || !slices.Contains(looked, "checkpoint/pages-1.img") {
		t.Errorf("was shown %q", looked)
	}
}

// One changed byte, wherever it is, is found.
func TestVerifyFindsAChangedByte(t *testing.T) {
	good := written(t)
	offsets := []int{0, 156, len(good) - 1}
	for offset := 17; offset < len(good); offset += 251_003 {
		offsets = append(offsets, offset)
	}
	for _, offset := range offsets {
		bad := slices.Clone(good)
		bad[offset] ^= 0x20
		report, err := Verify(t.Context(), bytes.NewReader(bad), nil)
		must(t, err)
		if report.Problems == nil && !unused(good, offset) {
			t.Errorf("a changed byte at %d goes unnoticed", offset)
		}
	}
}

// unused tells whether a byte only fills a block up.
func unused(data []byte, offset int) bool {
	r := bytes.NewReader(data)
	for entries := tar.NewReader(r); ; {
		h, err := entries.Next()
		if err != nil {
			return false
		}
		start := len(data) - r.Len()
		end := start + int(h.Size)
		if offset >= end && offset < end+int(padding(h.Size)) {
			return true
		}
		if _, err := io.Copy(io.Discard, entries); err != nil {
			return false
		}
	}
}

// broken is an archive in which something is wrong.
type broken struct {
	data []byte
	want string // "" for sound
}

// onlyVerified are those of brokenArchives that Open takes: what a restore needs only Verify looks for.
var onlyVerified = []string{"no config", "no status", "no directory", "no descriptors"}

func TestVerifyTellsWhatIsWrong(t *testing.T) {
	for name, test := range brokenArchives(t) {
		t.Run(name, func(t *testing.T) {
			report, err := Verify(t.Context(), bytes.NewReader(test.data), nil)
			must(t, err)
			found := slices.ContainsFunc(report.Problems, func(p string) bool { return strings.Contains(p, test.want) })
			if test.want == "" && report.Problems != nil || test.want != "" && !found {
				t.Errorf("problems are\n%s\nwant %q", strings.Join(report.Problems, "\n"), test.want)
			}
		})
	}
}

func brokenArchives(t *testing.T) map[string]broken {
	file := func(name, content string) tar.Header {
		return tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(content)), Linkname: content}
	}
	sound := []tar.Header{
		file(ConfigDump, "{}"), file(SpecDump, "{}"), file(StatusDump, "{}"), {Typeflag: tar.TypeDir, Name: "checkpoint/"},
		file("checkpoint/inventory.img", "i"), file("checkpoint/pstree.img", "p"), file("checkpoint/descriptors.json", "[]"),
	}
	with := func(more ...tar.Header) []byte { return tarOf(t, append(slices.Clone(sound), more...)) }
	without := func(name string) []byte {
		return tarOf(t, slices.DeleteFunc(slices.Clone(sound), func(h tar.Header) bool { return h.Name == name }))
	}
	good := written(t)
	compressed := &bytes.Buffer{}
	zip := gzip.NewWriter(compressed)
	zip.Write(good)
	must(t, zip.Close())

	return map[string]broken{
		"sound, of others":         {with(), ""},
		"filled up as tar does":    {append(with(), make([]byte, 10240)...), ""},
		"nothing":                  {nil, "without the two blocks of zeros"},
		"compressed":               {compressed.Bytes(), "no header of a tar archive at byte 0"},
		"cut off in a member":      {good[:len(good)/2], "in the middle of a member"},
		"cut off between members":  {with()[:len(with())-1024], "without the two blocks of zeros"},
		"cut off in the trailer":   {with()[:len(with())-512], "without the two blocks of zeros"},
		"something behind it":      {append(with(), 'x'), "something behind the archive's end"},
		"no config":                {without(ConfigDump), "config.dump is missing"},
		"no status":                {without(StatusDump), "status.dump is missing"},
		"no directory":             {without("checkpoint/"), "checkpoint/ is missing"},
		"no descriptors":           {without("checkpoint/descriptors.json"), "checkpoint/descriptors.json is missing"},
		"config is no JSON":        {append(tarOf(t, []tar.Header{file(ConfigDump, "{")}), 0), "config.dump: unexpected end of JSON input"},
		"a symlink":                {with(tar.Header{Typeflag: tar.TypeSymlink, Name: "container.log", Linkname: "/etc/shadow"}), "container.log is a link"},
		"a hard link":              {with(tar.Header{Typeflag: tar.TypeLink, Name: "container.log", Linkname: "../x"}), "container.log is a link"},
		"a FIFO":                   {with(tar.Header{Typeflag: tar.TypeFifo, Name: "x"}), `x is of type '6'`},
		"a device":                 {with(tar.Header{Typeflag: tar.TypeChar, Name: "x"}), `x is of type '3'`},
		"another directory":        {with(tar.Header{Typeflag: tar.TypeDir, Name: "checkpoint/a/"}), "checkpoint/a/ is a directory"},
		"a way out":                {with(file("../x", "")), "../x: members are at the top"},
		"an absolute name":         {with(file("/etc/passwd", "")), "/etc/passwd: members are at the top"},
		"a way out below":          {with(file("checkpoint/../../x", "")), "members are at the top"},
		"dots":                     {with(file("checkpoint/..", "")), "names no file"},
		"a dot in front":           {with(file("./spec.dump", "{}")), "named without ./ in front"},
		"a forged line":            {with(file("x\nstructure  sound", "")), `"x\nstructure  sound": a name must not contain control characters`},
		"a very long name":         {with(file(strings.Repeat("n", 256), "")), "255 bytes at most"},
		"members are no list":      {with(file(ManifestName, `{"version":1,"members":7}`)), "members are no list"},
		"metadata without end":     {with(file(BindMounts, strings.Repeat(" ", maxMetadata+1))), "4194304 are the most that make sense"},
		"twice":                    {with(file(SpecDump, "{}")), "spec.dump is there twice"},
		"sparse":                   {sparseTar(t), "sparse"},
		"a manifest of the future": {with(file(ManifestName, `{"version":2}`)), "use a newer crishim"},
		"a manifest of nonsense":   {with(file(ManifestName, `[`)), "crishim.json: unexpected end"},
		"added later": {with(file(ManifestName, `{"version":1,"members":[]}`)),
			"config.dump was not there when crishim wrote the archive"},
		"removed later": {with(file(ManifestName, `{"version":1,"members":[{"name":"pages-1.img"}]}`)), "pages-1.img is missing"},
		"of another size": {with(file(ManifestName, `{"version":1,"members":[{"name":"config.dump","size":3}]}`)),
			"config.dump has 2 bytes, and had 3"},
		"other bytes": {with(file(ManifestName, `{"version":1,"members":[{"name":"config.dump","size":2,"sha256":"00"}]}`)),
			"config.dump has other bytes than crishim wrote"},
	}
}

// tarOf writes headers; the content of a regular file is in its Linkname.
func tarOf(t *testing.T, headers []tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		content := ""
		if h.Typeflag == tar.TypeReg {
			content, h.Linkname = h.Linkname, ""
		}
		must(t, w.WriteHeader(&h))
		_, err := io.WriteString(w, content)
		must(t, err)
	}
	must(t, w.Close())
	return b.Bytes()
}

// sparseTar has a member of 1 EiB in one block, in the form of GNU tar's PAX sparse format 1.0, which Go reads but does not write.
func sparseTar(t *testing.T) []byte {
	t.Helper()
	records := ""
	for _, r := range []string{"GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=big", "GNU.sparse.realsize=1152921504606846976"} {
		size := len(r) + 4
		records += fmt.Sprintf("%d %s\n", size, r)
	}
	sparseMap := "1\n1152921504606846975\n1\n"
	content := sparseMap + strings.Repeat("\x00", 512-len(sparseMap)) + "x"
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "records", Size: int64(len(records))}))
	w.Write([]byte(records))
	must(t, w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "big", Size: int64(len(content))}))
	w.Write([]byte(content))
	must(t, w.Close())
	data := b.Bytes()
	// The first entry becomes an extended header of the second.
	data[156] = tar.TypeXHeader
	checksum(data[:blockSize])
	return data
}

func checksum(header []byte) {
	copy(header[148:156], "        ")
	sum := 0
	for _, b := range header {
		sum += int(b)
	}
	copy(header[148:156], fmt.Sprintf("%06o\x00 ", sum))
}

func TestVerifyStops(t *testing.T) {
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(errors.New("enough"))
	if _, err := Verify(ctx, bytes.NewReader(written(t)), nil); err == nil || !strings.Contains(err.Error(), "enough") {
		t.Errorf("Verify = %v, want the context's cause", err)
	}
	broken := io.MultiReader(bytes.NewReader(written(t)[:5000]), failing{})
	if report, err := Verify(t.Context(), broken, nil); err == nil || !strings.Contains(err.Error(), "disk on fire") {
		t.Errorf("Verify = %v, %v, want the disk's error", report, err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("disk on fire") }

// A hostile archive of many small members costs time, not memory.
func TestVerifyBoundsMembers(t *testing.T) {
	var headers []tar.Header
	for n := range 101 {
		headers = append(headers, tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(n), ModTime: time.Unix(0, 0)})
	}
	report, err := verify(t.Context(), bytes.NewReader(tarOf(t, headers)), nil, 100)
	must(t, err)
	if len(report.Members) > 100 || !strings.Contains(strings.Join(report.Problems, ""), "more than 100 members") {
		t.Errorf("%d members, problems %q", len(report.Members), report.Problems)
	}
}

func TestAssembleRefusesAManifestOfItsOwn(t *testing.T) {
	for content, want := range map[string]string{
		`{"version":1,"members":[{"name":"x"}]}`: "before there are any",
		`{"version":7}`:                          "use a newer crishim",
		`{`:                                      "unexpected end of JSON",
	} {
		s := stage(t, rootDir(t)+"/a.tar")
		must(t, s.WriteFile(ManifestName, []byte(content)))
		if err := s.Assemble(t.Context(), Options{}, nil); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: Assemble = %v, want %q", content, err, want)
		}
	}
}
