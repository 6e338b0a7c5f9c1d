package container

import (
	"encoding/json"
	"fmt"
)

// withResources puts a container's resources as they are now into its spec. A pod that is resized in place changes what the runtime
// knows of the container, not the bundle, and who restores it with the limits of its first day may have it killed for them.
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
	linux["resources"] = resources
	var err error
	if whole["linux"], err = json.Marshal(linux); err != nil {
		return nil, err
	}
	return json.Marshal(whole)
}
