package container

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
)

// info is what the runtime's verbose ContainerStatus says beyond the CRI: containerd all of it and more, cri-dockerd the pid alone.
type info struct {
	Pid         int    `json:"pid"`
	RuntimeType string `json:"runtimeType"`
	Snapshotter string `json:"snapshotter"`
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
		return i, fmt.Errorf("%w: the runtime's verbose ContainerStatus has no \"info\", where containerd and cri-dockerd give the pid: "+
			"upgrade the runtime, or its CRI server", ErrUnsupported)
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

// findBundle finds the directory with the container's config.json. Its place depends on whose containerd it is and how that was
// configured, which the CRI does not tell. But the parent of every init is a containerd shim, for pods and for Docker's containers
// alike, and it works in a bundle: the container's own, or that of the pod. All bundles of a containerd namespace are neighbours.
func findBundle(id string, shim parent) (string, error) {
	bundle := filepath.Join(filepath.Dir(shim.dir), id)
	_, err := os.Stat(filepath.Join(bundle, "config.json"))
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%w: it is run by %s, which keeps no bundle for it at %s; "+
			"CRIU can only dump what a containerd shim has runc or crun run on this kernel", ErrUnsupported, shim.name, bundle)
	}
	if err != nil {
		return "", fmt.Errorf("look at bundle: %w", err)
	}
	return bundle, nil
}

// options are the shim's, as it writes them into the bundle.
type options struct {
	// Root is where the OCI runtime keeps its states. Docker has one for each of its runtimes.
	Root string `json:"root"`
	// BinaryName is the OCI runtime's path or name.
	BinaryName string `json:"binary_name"`
}

// readOptions reads the options, with the shim's own choice for what they leave open.
func readOptions(bundle string) (options, error) {
	path := filepath.Join(bundle, "options.json")
	content, err := readBounded(path)
	if errors.Is(err, os.ErrNotExist) {
		content = []byte("{}")
	} else if err != nil {
		return options{}, fmt.Errorf("read options of the shim: %w", err)
	}
	var o options
	if err := json.Unmarshal(content, &o); err != nil {
		return options{}, fmt.Errorf("parse options of the shim in %s: %w", path, err)
	}
	o.Root, o.BinaryName = cmp.Or(o.Root, "/run/containerd/runc"), cmp.Or(o.BinaryName, "runc")
	return o, nil
}

// state is what the OCI runtime keeps about a container.
type state struct {
	runtime     string
	pid         int
	startTime   uint64            // as in Process
	cgroup      map[string]string // directory by controller, "" for the unified hierarchy; or, with crun, see findFreezer
	descriptors []string
}

// findState finds the runtime's own state, and by its form which runtime it is: runc keeps one file, state.json; crun keeps
// status, and a copy of the spec. The runtime's name says nothing: it may be a link or a wrapper.
func findState(root, bundle string, process Process, shim parent) (state, error) {
	// The shim puts containerd's namespace between the runtime's root and the id, as containerd does with bundles.
	dir := filepath.Join(root, filepath.Base(filepath.Dir(bundle)), filepath.Base(bundle))
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
		if s.pid != process.Pid || s.startTime != process.StartTime {
			return state{}, fmt.Errorf("%w: process %d, which the runtime names, is not the one of which %s tells: has it just been restarted?",
				ErrNotRunning, process.Pid, path)
		}
		return s, nil
	}
	return state{}, fmt.Errorf("%w: it is run by %s, and in %s there is neither runc's state.json nor crun's status; "+
		"CRIU can only dump what runc or crun run on this kernel", ErrUnsupported, shim.name, dir)
}

func runcState(content []byte) (state, error) {
	var s struct {
		Pid         int               `json:"init_process_pid"`
		StartTime   uint64            `json:"init_process_start"`
		CgroupPaths map[string]string `json:"cgroup_paths"`
		Descriptors []string          `json:"external_descriptors"`
	}
	if err := json.Unmarshal(content, &s); err != nil {
		return state{}, err
	}
	return state{runtime: "runc", pid: s.Pid, startTime: s.StartTime, cgroup: s.CgroupPaths, descriptors: s.Descriptors}, nil
}

func crunState(content []byte) (state, error) {
	var s struct {
		Pid         int    `json:"pid"`
		StartTime   uint64 `json:"process-start-time"`
		CgroupPath  string `json:"cgroup-path"`
		Descriptors string `json:"external_descriptors"` // JSON in a string
	}
	if err := json.Unmarshal(content, &s); err != nil {
		return state{}, err
	}
	result := state{runtime: "crun", pid: s.Pid, startTime: s.StartTime}
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
