package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"reflect"
)

// withResources puts a container's resources as they are now into its spec, which otherwise stays as it is, byte by byte. A pod that
// is resized in place changes what the runtime knows of the container, not the bundle, and who restores it with the limits of its
// first day may have it killed for them.
func withResources(spec []byte, resources json.RawMessage) ([]byte, error) {
	if len(resources) == 0 || string(resources) == "null" {
		return spec, nil // the runtime does not tell
	}
	var whole, linux map[string]json.RawMessage
	if err := json.Unmarshal(spec, &whole); err != nil {
		return nil, err
	}
	if err := json.Unmarshal(whole["linux"], &linux); err != nil {
		return nil, fmt.Errorf("linux: %w", err)
	}
	same, err := sameJSON(linux["resources"], resources)
	if err != nil || same {
		return spec, err
	}
	linux["resources"] = resources
	if whole["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	return json.Marshal(whole)
}

func sameJSON(a, b json.RawMessage) (bool, error) {
	if len(a) == 0 {
		return false, nil
	}
	var x, y any
	if err := errors.Join(json.Unmarshal(a, &x), json.Unmarshal(b, &y)); err != nil {
		return false, err
	}
	return reflect.DeepEqual(x, y), nil
}
