package container

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// info is what containerd's verbose ContainerStatus says beyond the CRI.
type info struct {
	Pid            int    `json:"pid"`
	RuntimeType    string `json:"runtimeType"`
	RuntimeOptions struct {
		Root       string `json:"root"`
		BinaryName string `json:"binary_name"`
	} `json:"runtimeOptions"`
	RuntimeSpec struct {
		Linux struct {
			Resources json.RawMessage `json:"resources"`
		} `json:"linux"`
	} `json:"runtimeSpec"`
}

func parseInfo(verbose map[string]string) (info, error) {
	var i info
	text, ok := verbose["info"]
	if !ok {
		return i, fmt.Errorf("%w: the runtime's verbose ContainerStatus has no \"info\", where containerd gives the pid", ErrUnsupported)
	}
	if err := json.Unmarshal([]byte(text), &i); err != nil {
		return i, fmt.Errorf("parse verbose container status: %w", err)
	}
	if i.Pid <= 0 {
		return i, fmt.Errorf("%w: the runtime gives no pid for it", ErrNotRunning)
	}
	if i.RuntimeType != "" && i.RuntimeType != "io.containerd.runc.v2" {
		return i, fmt.Errorf("%w: it runs in %s; CRIU can only dump what runc or crun run on this kernel", ErrUnsupported, i.RuntimeType)
	}
	return i, nil
}

const taskDir = "/run/containerd/io.containerd.runtime.v2.task/k8s.io"

// findBundle finds the directory with the container's config.json. Its place depends on containerd's state directory, which
// the CRI does not tell; but containerd's shim, the parent of every init, works in the bundle of the pod, its neighbour.
func findBundle(id string, i info) (string, error) {
	var candidates []string
	if parent, err := parentPid(i.Pid); err == nil {
		if cwd, err := os.Readlink(fmt.Sprintf("/proc/%d/cwd", parent)); err == nil && cwd != "/" {
			candidates = append(candidates, filepath.Join(filepath.Dir(cwd), id))
		}
	}
	candidates = append(candidates, filepath.Join(taskDir, id))
	for _, bundle := range candidates {
		if _, err := os.Stat(filepath.Join(bundle, "config.json")); err == nil {
			return bundle, nil
		}
	}
	return "", fmt.Errorf("%w: no bundle with a config.json was found, neither beside the one of its pod nor at the usual place: looked in %s",
		ErrUnsupported, strings.Join(candidates, " and "))
}

// state is what the OCI runtime keeps about a container.
type state struct {
	runtime     string
	pid         int
	cgroup      map[string]string // directory by controller, "" for the unified hierarchy; or, with crun, see findFreezer
	descriptors []string
}

// findState finds the runtime's own state, and by its form which runtime it is: runc keeps one file, state.json; crun keeps
// status, and a copy of the spec. The runtime's name says nothing: it may be a link or a wrapper.
func findState(id, bundle string, i info) (state, error) {
	// containerd puts its namespace between the runtime's root and the id, as it does with bundles.
	namespace := filepath.Base(filepath.Dir(bundle))
	var roots []string
	if i.RuntimeOptions.Root != "" {
		roots = append(roots, i.RuntimeOptions.Root)
	}
	roots = append(roots, "/run/containerd/runc")
	var looked []string
	for _, root := range roots {
		dir := filepath.Join(root, namespace, id)
		for file, read := range map[string]func([]byte) (state, error){"state.json": runcState, "status": crunState} {
			path := filepath.Join(dir, file)
			content, err := readBounded(path)
			if errors.Is(err, os.ErrNotExist) {
				continue
			}
			if err != nil {
				return state{}, fmt.Errorf("read runtime state: %w", err)
			}
			s, err := read(content)
			if err != nil {
				return state{}, fmt.Errorf("parse runtime state %s: %w", path, err)
			}
			return s, nil
		}
		looked = append(looked, dir)
	}
	return state{}, fmt.Errorf("%w: neither runc's state.json nor crun's status was found in %s", ErrUnsupported, strings.Join(looked, " and "))
}

func runcState(content []byte) (state, error) {
	var s struct {
		Pid         int               `json:"init_process_pid"`
		CgroupPaths map[string]string `json:"cgroup_paths"`
		Descriptors []string          `json:"external_descriptors"`
	}
	if err := json.Unmarshal(content, &s); err != nil {
		return state{}, err
	}
	return state{runtime: "runc", pid: s.Pid, cgroup: s.CgroupPaths, descriptors: s.Descriptors}, nil
}

func crunState(content []byte) (state, error) {
	var s struct {
		Pid         int    `json:"pid"`
		CgroupPath  string `json:"cgroup-path"`
		Descriptors string `json:"external_descriptors"` // JSON in a string
	}
	if err := json.Unmarshal(content, &s); err != nil {
		return state{}, err
	}
	result := state{runtime: "crun", pid: s.Pid}
	if s.CgroupPath != "" {
		// crun keeps one path for all hierarchies, below wherever each is mounted.
		result.cgroup = map[string]string{
			"freezer": filepath.Join(cgroupRoot, "freezer", s.CgroupPath),
			"":        filepath.Join(cgroupRoot, s.CgroupPath),
		}
	}
	if err := json.Unmarshal([]byte(s.Descriptors), &result.descriptors); err != nil {
		return state{}, fmt.Errorf("external_descriptors: %w", err)
	}
	return result, nil
}

// readBounded reads a file of the runtime's. They have some hundred kilobytes at most; the bound keeps a mistake from
// becoming a memory problem of the node.
func readBounded(path string) ([]byte, error) {
	const bound = 16 << 20
	file, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	content, err := io.ReadAll(io.LimitReader(file, bound+1))
	if err != nil {
		return nil, err
	}
	if len(content) > bound {
		return nil, fmt.Errorf("read %s: larger than %d bytes", path, bound)
	}
	return content, nil
}
