// Package packages tests what is published: that it is the same however often and wherever it is made, and what is in it. That packages can be installed
// and removed under systemd is tested in test/vm.
package packages

import (
	"bytes"
	"crypto/sha256"
	"debug/elf"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
)

// release makes what is published, of the source tree in a directory.
func release(t *testing.T, source string) (dir string) {
	t.Helper()
	dir = t.TempDir()
	cmd := exec.Command("make", "-C", source, "release", "RELEASE="+dir, "VERSION=v1.2.3-4-g0123abc", "COMMIT=0123abc", "SOURCE_DATE_EPOCH=1700000000")
	cmd.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=") // of a make that this one is not part of
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("make release: %v\n%s", err, out)
	}
	return dir
}

func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func TestRelease(t *testing.T) {
	if testing.Short() {
		t.Skip("builds all that is published, twice: not in short mode")
	}
	top, err := filepath.Abs("../..")
	if err != nil {
		t.Fatal(err)
	}
	first := release(t, top)
	want := []string{
		"SHA256SUMS", "crishim-1.2.3+4.g0123abc-1.aarch64.rpm", "crishim-1.2.3+4.g0123abc-1.x86_64.rpm", "crishim-linux-amd64", "crishim-linux-amd64.cdx.json",
		"crishim-linux-arm64", "crishim-linux-arm64.cdx.json", "crishim_1.2.3+4.g0123abc-1_amd64.deb", "crishim_1.2.3+4.g0123abc-1_arm64.deb",
	}
	if got := names(t, first); !slices.Equal(got, want) {
		t.Fatalf("made are %q, want %q", got, want)
	}

	t.Run("the same from another place", func(t *testing.T) { sameAgain(t, top, first) })
	for arch, machine := range map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64} {
		t.Run("the binary for "+arch, func(t *testing.T) { binary(t, filepath.Join(first, "crishim-linux-"+arch), machine) })
	}
	t.Run("the packages for dpkg", func(t *testing.T) {
		for _, arch := range []string{"amd64", "arm64"} {
			debian(t, filepath.Join(first, "crishim_1.2.3+4.g0123abc-1_"+arch+".deb"), arch)
		}
	})
	t.Run("on a node without systemd", func(t *testing.T) {
		withoutSystemd(t, filepath.Join(first, "crishim_1.2.3+4.g0123abc-1_"+runtime.GOARCH+".deb"))
	})
	t.Run("the packages for rpm", func(t *testing.T) {
		for _, arch := range []string{"x86_64", "aarch64"} {
			redHat(t, filepath.Join(first, "crishim-1.2.3+4.g0123abc-1."+arch+".rpm"), arch)
		}
	})
}

// sameAgain makes all of it once more, elsewhere and with other permissions for new files.
func sameAgain(t *testing.T, top, first string) {
	copied := filepath.Join(t.TempDir(), "elsewhere")
	output(t, "sh", "-ec", `umask 077; mkdir "$1"; cd "$0"; git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$1" 2>/dev/null || true`, top, copied)
	output(t, "chmod", "-R", "go=", copied)
	second := release(t, copied)
	for _, name := range names(t, first) {
		a, errA := os.ReadFile(filepath.Join(first, name))
		b, errB := os.ReadFile(filepath.Join(second, name))
		if errA != nil || errB != nil || !bytes.Equal(a, b) {
			t.Errorf("%s is not the same: %d and %d bytes, %v, %v", name, len(a), len(b), errA, errB)
		}
	}
}

// binary looks at a binary and at the list of what is in it.
func binary(t *testing.T, path string, machine elf.Machine) {
	file, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	if file.Machine != machine {
		t.Errorf("it is for %v", file.Machine)
	}
	for _, program := range file.Progs {
		if program.Type == elf.PT_INTERP || program.Type == elf.PT_DYNAMIC {
			t.Errorf("it is not static: it has a segment %v", program.Type)
		}
	}
	content, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var list struct {
		BOMFormat string
		Metadata  struct {
			Component struct {
				Name, Version string
				Hashes        []struct{ Content string }
			}
		}
		Components []struct{ Name, Version string }
	}
	text, err := os.ReadFile(path + ".cdx.json")
	if err == nil {
		err = json.Unmarshal(text, &list)
	}
	if err != nil {
		t.Fatal(err)
	}
	main := list.Metadata.Component
	if list.BOMFormat != "CycloneDX" || main.Name != "crishim" || main.Version != "v1.2.3-4-g0123abc" ||
		len(main.Hashes) != 1 || main.Hashes[0].Content != fmt.Sprintf("%x", sha256.Sum256(content)) {
		t.Errorf("the list is of %+v", main)
	}
	listed := map[string]string{}
	for _, c := range list.Components {
		listed[c.Name] = c.Version
	}
	for line := range strings.Lines(output(t, "go", "version", "-m", path)) {
		fields := strings.Fields(line)
		if fields[0] == "dep" && listed[fields[1]] != fields[2] {
			t.Errorf("%s is in version %q on the list", line, listed[fields[1]])
		}
	}
	if len(listed) < 20 {
		t.Errorf("the list has %d entries", len(listed))
	}
}

// installed are what every package has, and the permissions of it.
var installed = map[string]string{
	"/usr/bin/crishim":                                  "-rwxr-xr-x",
	"/etc/crishim/config.toml":                          "-rw-r--r--",
	"/usr/lib/systemd/system/crishim.service":           "-rw-r--r--",
	"/usr/lib/systemd/system/crishim.socket":            "-rw-r--r--",
	"/usr/share/man/man8/crishim.8.gz":                  "-rw-r--r--",
	"/usr/share/man/man8/crishim-serve.8.gz":            "-rw-r--r--",
	"/usr/share/man/man5/crishim-config.5.gz":           "-rw-r--r--",
	"/usr/share/doc/crishim/copyright":                  "-rw-r--r--",
	"/usr/share/doc/crishim/sbom.cdx.json":              "-rw-r--r--",
	"/usr/share/bash-completion/completions/crishim":    "-rw-r--r--",
	"/usr/share/fish/vendor_completions.d/crishim.fish": "-rw-r--r--",
	"/usr/share/man/man8/crishim-kubelet-enable.8.gz":   "-rw-r--r--",
}

// has fails the test unless a listing, as of ls -l, has all that is installed, and owned by root, and nothing that only root can read.
func has(t *testing.T, listing string) {
	t.Helper()
	found := map[string]string{}
	for line := range strings.Lines(listing) {
		fields := strings.Fields(line)
		path := strings.TrimPrefix(fields[len(fields)-1], ".")
		found[path] = fields[0]
		if !strings.Contains(line, "root") || fields[0][7] != 'r' {
			t.Errorf("%s is not for all to read, and root's", line)
		}
	}
	for path, mode := range installed {
		if found[path] != mode {
			t.Errorf("%s is %q, want %s", path, found[path], mode)
		}
	}
}

func debian(t *testing.T, path, arch string) {
	t.Helper()
	listing := output(t, "dpkg-deb", "--contents", path)
	has(t, listing)
	if !strings.Contains(listing, "./usr/share/zsh/vendor-completions/_crishim") {
		t.Error("zsh has no completions where Debian's looks for them")
	}
	if got := output(t, "dpkg-deb", "--field", path, "Architecture"); strings.TrimSpace(got) != arch {
		t.Errorf("it is for %s", got)
	}
	control := t.TempDir()
	output(t, "dpkg-deb", "--control", path, control)
	if files, err := os.ReadFile(filepath.Join(control, "conffiles")); err != nil || string(files) != "/etc/crishim/config.toml\n" {
		t.Errorf("configuration files are %q, %v", files, err)
	}
	for _, script := range []string{"postinst", "prerm", "postrm"} {
		output(t, "sh", "-n", filepath.Join(control, script))
	}
}

func redHat(t *testing.T, path, arch string) {
	t.Helper()
	listing := output(t, "rpm", "-qlvp", path)
	has(t, listing)
	if !strings.Contains(listing, "/usr/share/zsh/site-functions/_crishim") {
		t.Error("zsh has no completions where Fedora's looks for them")
	}
	if got := output(t, "rpm", "-qp", "--queryformat", "%{ARCH} %{BUILDHOST} %{BUILDTIME}", path); got != arch+" localhost 1700000000" {
		t.Errorf("it is for, and made on and at, %s", got)
	}
	if got := output(t, "rpm", "-qp", "--configfiles", path); got != "/etc/crishim/config.toml\n" {
		t.Errorf("configuration files are %q", got)
	}
	scripts := output(t, "rpm", "-qp", "--scripts", path)
	for _, want := range []string{"postinstall scriptlet", "preuninstall scriptlet", "postuninstall scriptlet", "crishim kubelet disable"} {
		if !strings.Contains(scripts, want) {
			t.Errorf("there is no %q in its scripts:\n%s", want, scripts)
		}
	}
}

func names(t *testing.T, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
