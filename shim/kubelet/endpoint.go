package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"sigs.k8s.io/yaml"
)

// The flags and keys of the kubelet that are looked at. See cmd/kubelet/app in k8s.io/kubernetes, 1.34 and 1.37.
const (
	runtimeFlag = "container-runtime-endpoint"
	runtimeKey  = "containerRuntimeEndpoint"
	imageFlag   = "image-service-endpoint"
	imageKey    = "imageServiceEndpoint"
	// defaultEndpoint is what a kubelet uses that is told nothing (SetDefaults_KubeletConfiguration).
	defaultEndpoint = "unix:///run/containerd/containerd.sock"
)

// Setting is a value, and where it comes from.
type Setting struct {
	Value  string `json:"value"`
	Source string `json:"source"`
}

// endpoints are what a kubelet talks to.
type endpoints struct {
	Runtime Setting
	Image   Setting // empty value where it is that of the runtime
}

// planned is what the kubelet will use when its unit is started as it is.
func (n *Node) planned(unit *Unit) (endpoints, error) {
	words, err := n.commandLine(unit)
	if err != nil {
		return endpoints{}, err
	}
	return n.effective(words)
}

// running is what the kubelet that runs was told.
func (n *Node) running(unit *Unit) (endpoints, error) {
	words := make([]word, len(unit.Args))
	for i, arg := range unit.Args {
		words[i] = word{arg, "the running kubelet's command line"}
	}
	found, err := n.effective(words)
	if err != nil {
		return found, err
	}
	// Where a word has come from, the unit knows, unless it has changed since.
	if planned, err := n.planned(unit); err == nil && planned.Runtime.Value == found.Runtime.Value {
		found.Runtime.Source = planned.Runtime.Source
	}
	return found, nil
}

// effective decides as the kubelet does: a flag, the last one, wins over the files *.conf in the directory --config-dir, of which the last wins, and those
// win over the file --config. What that is not there says nothing, as on a node that kubeadm has not joined yet.
func (n *Node) effective(words []word) (endpoints, error) {
	found := endpoints{Runtime: Setting{defaultEndpoint, "the kubelet's default"}}
	if config, ok := lookUp(words, "config"); ok {
		if err := n.readConfig(config.text, &found); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return found, err
		}
	}
	if dir, ok := lookUp(words, "config-dir"); ok && dir.text != "" {
		err := filepath.WalkDir(n.path(dir.text), func(path string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() || filepath.Ext(path) != ".conf" {
				return err
			}
			relative, err := filepath.Rel(n.path(dir.text), path)
			if err != nil {
				return err
			}
			return n.readConfig(filepath.Join(dir.text, relative), &found)
		})
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return found, fmt.Errorf("read the kubelet's configuration: %w", err)
		}
	}
	if flag, ok := lookUp(words, runtimeFlag); ok {
		found.Runtime = Setting{flag.text, "--" + runtimeFlag + " in " + flag.source}
	}
	if flag, ok := lookUp(words, imageFlag); ok && flag.text != "" {
		found.Image = Setting{flag.text, "--" + imageFlag + " in " + flag.source}
	}
	return found, nil
}

// readConfig puts into found what a KubeletConfiguration says of endpoints.
func (n *Node) readConfig(path string, found *endpoints) error {
	content, err := os.ReadFile(n.path(path))
	if err != nil {
		return fmt.Errorf("read the kubelet's configuration: %w", err)
	}
	var config map[string]any
	if err := yaml.Unmarshal(content, &config); err != nil {
		return fmt.Errorf("read the kubelet's configuration %s: %w", path, err)
	}
	// A key that is there and empty stands for the default, in a file of --config-dir as well.
	if value, ok := config[runtimeKey]; ok {
		found.Runtime = Setting{defaultEndpoint, "the kubelet's default, by " + runtimeKey + " in " + path}
		if text, _ := value.(string); text != "" {
			found.Runtime = Setting{text, runtimeKey + " in " + path}
		}
	}
	if value, ok := config[imageKey]; ok {
		found.Image = Setting{}
		if text, _ := value.(string); text != "" {
			found.Image = Setting{text, imageKey + " in " + path}
		}
	}
	return nil
}

// word is one of a command line, or of what stands for several. Its source is a file, or what is like one.
type word struct{ text, source string }

// lookUp returns the value of the last flag of that name. As pflag has it for the kubelet, --a=b, --a b and --a_a are all the same, and a word
// "--" ends the flags.
func lookUp(words []word, name string) (found word, ok bool) {
	for i, w := range words {
		if w.text == "--" {
			break
		}
		flag, isFlag := strings.CutPrefix(w.text, "--")
		key, value, hasValue := strings.Cut(flag, "=")
		if !isFlag || strings.ReplaceAll(key, "_", "-") != name {
			continue
		}
		if !hasValue {
			if i+1 == len(words) {
				break
			}
			value = words[i+1].text
		}
		found, ok = word{value, w.source}, true
	}
	return found, ok
}
