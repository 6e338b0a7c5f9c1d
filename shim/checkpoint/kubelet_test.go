package checkpoint

import (
	"maps"
	"os"
	"path/filepath"
	"testing"
)

func TestReadKubelet(t *testing.T) {
	dir := t.TempDir()
	write := func(name, content string) string {
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
		return file
	}
	yaml := write("kubelet.yaml", "kind: KubeletConfiguration\nevictionHard:\n  nodefs.available: 20%\n  memory.available: 100Mi\n")
	write("conf.d/10.conf", "evictionHard:\n  nodefs.available: 10Gi\n")
	defaults := readKubelet(nil).evictionHard
	if defaults["nodefs.available"] != "10%" || defaults["nodefs.inodesFree"] != "5%" {
		t.Errorf("the defaults are %v", defaults)
	}
	for name, test := range map[string]struct {
		args    []string
		rootDir string
		want    map[string]string
	}{
		"file":         {[]string{"--v=2", "--config", yaml, "--node-ip", "10.0.0.1"}, "/var/lib/kubelet", map[string]string{"nodefs.available": "20%", "memory.available": "100Mi"}},
		"drop-in":      {[]string{"--config=" + yaml, "--config-dir=" + dir + "/conf.d"}, "/var/lib/kubelet", map[string]string{"nodefs.available": "10Gi", "memory.available": "100Mi"}},
		"flag":         {[]string{"--config=" + yaml, "--eviction-hard=nodefs.available<5%,imagefs.available<1Gi"}, "/var/lib/kubelet", map[string]string{"nodefs.available": "5%", "imagefs.available": "1Gi"}},
		"no file":      {[]string{"--config=" + dir + "/none"}, "/var/lib/kubelet", defaults},
		"no YAML":      {[]string{"--config=" + write("bad", "a: b: c")}, "/var/lib/kubelet", defaults},
		"another root": {[]string{"--root-dir", "/data/kubelet"}, "/data/kubelet", defaults},
	} {
		if k := readKubelet(test.args); k.rootDir != test.rootDir || !maps.Equal(k.evictionHard, test.want) {
			t.Errorf("%s: %+v, want %s and %v", name, k, test.rootDir, test.want)
		}
	}
}

func TestAmounts(t *testing.T) {
	for text, want := range map[string]int64{"15%": 150, "0%": 0, "100%": 1000, "0.5%": 5, "20": 20, "1k": 1000, "2Ki": 2048, "10Gi": 10 << 30, "10G": 10e9} {
		if a, err := ParseAmount(text); err != nil || a.of(1000) != want {
			t.Errorf("%q of 1000 is %d, %v; want %d", text, a.of(1000), err, want)
		}
	}
	for _, text := range []string{"", "%", "-1%", "101%", "NaN%", "ten", "-5", "100m", "1e30"} {
		if a, err := ParseAmount(text); err == nil {
			t.Errorf("%q is taken for %+v", text, a)
		}
	}
}
