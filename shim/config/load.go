package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/pelletier/go-toml/v2"
	"github.com/pelletier/go-toml/v2/unstable"
	"github.com/spf13/pflag"
	"golang.org/x/sys/unix"
)

const (
	// DefaultFile is read if it is there and no other is named.
	DefaultFile = "/etc/crishim/config.toml"
	// dropIns is the directory beside the file in which there may be further ones.
	dropIns = "config.d"
	// environmentPrefix begins the names of variables.
	environmentPrefix = "CRISHIM_"
	// maxFile is more than a file of ours has, in bytes.
	maxFile = 1 << 20
)

// Sources are where a configuration comes from. What comes later wins: the defaults, File, the files *.toml in the directory config.d beside it in
// the order of their names, Environment, Flags.
type Sources struct {
	File        string         // which may be missing if it is DefaultFile
	Environment []string       // as of os.Environ
	Flags       *pflag.FlagSet // those of Register, parsed; nil for none
}

// Load reads all sources, and may be called again when they have changed. The error has a line for each thing that is wrong, which says where.
func (s Sources) Load() (*Config, error) {
	c := &Config{Keys: Defaults(), origins: map[string]string{}}
	for _, key := range c.Keys.all() {
		c.origins[key.name] = "default"
	}
	files, err := s.files()
	if err != nil {
		return nil, err
	}
	var mistakes []error
	for _, file := range files {
		content, err := readTrusted(file)
		if errors.Is(err, fs.ErrNotExist) && file == DefaultFile {
			continue
		}
		if err != nil {
			mistakes = append(mistakes, fmt.Errorf("read configuration: %w", err))
			continue
		}
		c.Files = append(c.Files, file)
		mistakes = append(mistakes, c.decode(file, content)...)
	}
	mistakes = append(mistakes, c.environment(s.Environment)...)
	c.flags(s.Flags)
	// What a value means only where all could be read: what stands in its place would be taken for it.
	if len(mistakes) == 0 {
		mistakes = c.parse()
	}
	if len(mistakes) > 0 {
		return nil, errors.Join(mistakes...)
	}
	return c, nil
}

// files lists the files to be read.
func (s Sources) files() ([]string, error) {
	dir := filepath.Join(filepath.Dir(s.File), dropIns)
	entries, err := os.ReadDir(dir) // in the order of their names
	if errors.Is(err, fs.ErrNotExist) {
		return []string{s.File}, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read configuration: %w", err)
	}
	files := []string{s.File}
	for _, entry := range entries {
		if filepath.Ext(entry.Name()) == ".toml" && !strings.HasPrefix(entry.Name(), ".") {
			files = append(files, filepath.Join(dir, entry.Name()))
		}
	}
	return files, nil
}

// readTrusted reads a file that, with the directory that it is in, belongs to root, or to whom crishim runs as, and that nobody else can write: who
// can, tells root's daemon which programs to run.
func readTrusted(path string) ([]byte, error) {
	// Not to be held up by a FIFO.
	file, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return nil, err
	}
	if !info.Mode().IsRegular() {
		return nil, fmt.Errorf("%s: it is not a regular file", path)
	}
	if err := trusted(path, info); err != nil {
		return nil, err
	}
	dir, err := os.Stat(filepath.Dir(path))
	if err != nil {
		return nil, err
	}
	if err := trusted(filepath.Dir(path), dir); err != nil {
		return nil, err
	}
	content, err := io.ReadAll(io.LimitReader(file, maxFile+1))
	if len(content) > maxFile {
		return nil, fmt.Errorf("%s: it has more than %d bytes: it is no configuration file", path, maxFile)
	}
	return content, err
}

func trusted(path string, info fs.FileInfo) error {
	const othersWrite = 0o022
	switch owner := info.Sys().(*syscall.Stat_t).Uid; {
	case owner != 0 && int(owner) != os.Geteuid():
		return fmt.Errorf("%s belongs to uid %d, and crishim heeds root alone: chown root it", path, owner)
	case info.Mode()&othersWrite != 0 && info.Mode()&fs.ModeSticky == 0:
		return fmt.Errorf("%s can be written by others than its owner: chmod go-w it", path)
	}
	return nil
}

// decode takes over what a file says.
func (c *Config) decode(file string, content []byte) (mistakes []error) {
	err := toml.NewDecoder(bytes.NewReader(content)).DisallowUnknownFields().Decode(&c.Keys)
	var unknown *toml.StrictMissingError
	var wrong *toml.DecodeError
	switch {
	case errors.As(err, &unknown):
		for _, e := range unknown.Errors {
			line, _ := e.Position()
			mistakes = append(mistakes, fmt.Errorf("%s:%d: there is no key %s", file, line, strings.Join(e.Key(), ".")))
		}
	case errors.As(err, &wrong):
		line, _ := wrong.Position()
		message := strings.TrimPrefix(wrong.Error(), "toml: ")
		if kind, rest, ok := strings.Cut(strings.TrimPrefix(message, "cannot decode TOML "), " into "); ok && rest != "" {
			message = "it cannot be of the type " + kind // the rest is Go's
		}
		if key := strings.Join(wrong.Key(), "."); key != "" {
			message = key + ": " + message
		}
		mistakes = append(mistakes, fmt.Errorf("%s:%d: %s", file, line, message))
	case err != nil:
		mistakes = append(mistakes, fmt.Errorf("%s: %w", file, err))
	}
	for key, line := range lines(content) {
		c.origins[key] = fmt.Sprintf("%s:%d", file, line)
	}
	return mistakes
}

// lines returns where in a file each key is, as far as it can be parsed.
func lines(content []byte) map[string]int {
	found := map[string]int{}
	var parser unstable.Parser
	parser.Reset(content)
	var add func(prefix string, node *unstable.Node)
	add = func(prefix string, node *unstable.Node) {
		name := prefix
		line := 0
		for parts := node.Key(); parts.Next(); {
			name += "." + string(parts.Node().Data)
			line = 1 + bytes.Count(content[:parts.Node().Raw.Offset], []byte("\n"))
		}
		if value := node.Value(); value.Kind == unstable.InlineTable {
			for children := value.Children(); children.Next(); {
				add(name, children.Node())
			}
			return
		}
		found[strings.TrimPrefix(name, ".")] = line
	}
	var table string
	for parser.NextExpression() {
		switch node := parser.Expression(); node.Kind {
		case unstable.Table, unstable.ArrayTable:
			table = ""
			for parts := node.Key(); parts.Next(); {
				table += "." + string(parts.Node().Data)
			}
		case unstable.KeyValue:
			add(table, node)
		}
	}
	return found
}

// environment takes over what variables say. A list is written with colons between, as PATH is.
func (c *Config) environment(variables []string) (mistakes []error) {
	known := map[string]key{}
	for _, key := range c.Keys.all() {
		known[key.environment()] = key
	}
	for _, variable := range variables {
		name, text, _ := strings.Cut(variable, "=")
		if !strings.HasPrefix(name, environmentPrefix) {
			continue
		}
		key, ok := known[name]
		if !ok {
			// Not an error: others make variables of that name as well, such as Kubernetes for a service that is called crishim.
			c.Ignored = append(c.Ignored, name)
			continue
		}
		if err := key.set(text); err != nil {
			mistakes = append(mistakes, fmt.Errorf("%s in the environment: %s: %w", name, key.name, err))
		}
		c.origins[key.name] = name + " in the environment"
	}
	slices.Sort(c.Ignored)
	return mistakes
}

// set takes a value from a line of text.
func (k key) set(text string) error {
	switch k.value.Kind() {
	case reflect.String:
		k.value.SetString(text)
	case reflect.Int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q: it is a number", text)
		}
		k.value.SetInt(int64(n))
	case reflect.Bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q: it is true or false", text)
		}
		k.value.SetBool(b)
	case reflect.Slice:
		k.value.SetZero()
		if text != "" {
			k.value.Set(reflect.ValueOf(strings.Split(text, ":")))
		}
	default:
		return fmt.Errorf("it cannot be given as text: write it into a file")
	}
	return nil
}

// flags takes over what was given by flags. Those of keys are all strings.
func (c *Config) flags(flags *pflag.FlagSet) {
	if flags == nil {
		return
	}
	for _, key := range c.Keys.all() {
		if flag := flags.Lookup(key.flag); key.flag != "" && flag != nil && flag.Changed {
			key.value.SetString(flag.Value.String())
			c.origins[key.name] = "--" + key.flag
		}
	}
}
