package container

import "testing"

func TestWithResources(t *testing.T) {
	const spec = `{"annotations": {"a": "b"}, "linux": {"cgroupsPath": "/c", "resources": {"memory": {"limit": 1}}}}`
	for _, test := range []struct{ name, spec, resources, want string }{
		{"resized", spec, `{"memory": {"limit": 2}}`, `{"annotations":{"a":"b"},"linux":{"cgroupsPath":"/c","resources":{"memory":{"limit":2}}}}`},
		{"as they were", spec, `{ "memory":{"limit":1} }`, spec},
		{"not told", spec, "", spec},
		{"told to be none", spec, "null", spec},
		{"no Linux part", `{"annotations": {}}`, `{"memory": {"limit": 2}}`, ""},
	} {
		got, err := withResources([]byte(test.spec), []byte(test.resources))
		if string(got) != test.want || (err != nil) != (test.want == "") {
			t.Errorf("%s: got %s, %v; want %s", test.name, got, err, test.want)
		}
	}
}
