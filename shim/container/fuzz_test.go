package container

import (
	"strings"
	"testing"
)

// FuzzParsers: what the kernel and the runtime say has names in it that a container has chosen. No parser of it panics.
func FuzzParsers(f *testing.F) {
	f.Add(`upperdir=/a\054b,lowerdir=/c\\:d:/e::/f,userxattr`)
	f.Add("8:freezer:/kubepods/pod1/c1\n0::/unified\n")
	f.Add("Name:\ta\\nPPid:\t7\nPPid:\t12\n")
	f.Add(`{"pid":12,"init_process_pid":12,"process-start-time":34,"external_descriptors":"[\"/dev/null\"]"}`)
	f.Fuzz(func(t *testing.T, text string) {
		if plain := unescape(text); len(plain) > len(text) {
			t.Errorf("unescape(%q) = %q", text, plain)
		}
		for _, dir := range splitLower(text) {
			if len(dir) > len(text) {
				t.Errorf("splitLower(%q) has %q", text, dir)
			}
		}
		for _, controller := range []string{"", "freezer"} {
			if path, ok := cgroupPath(text, controller); ok && !strings.Contains(text, path) {
				t.Errorf("cgroupPath(%q) = %q", text, path)
			}
		}
		_, _ = parsePPid([]byte(text))
		if i, err := parseInfo(map[string]string{"info": text}); err == nil && i.Pid <= 0 {
			t.Errorf("parseInfo(%q) has pid %d", text, i.Pid)
		}
		_, _ = runcState([]byte(text))
		_, _ = crunState([]byte(text))
		_, _ = withResources([]byte(text), []byte(`{"memory":{"limit":1}}`))
	})
}
