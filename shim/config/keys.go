// Package config reads what the daemon is told: the configuration file and its drop-ins, the environment, and flags.
//
// It promises that nothing is guessed. A key that does not exist, a value that makes no sense, a file that others than root could have written: each is
// an error that names the file, the line and the key. It says of each value where it comes from. It changes nothing, and knows nothing of the
// daemon that the values are for.
package config

import (
	"reflect"
	"slices"
	"strings"

	"github.com/pelletier/go-toml/v2"
	"github.com/spf13/pflag"

	"crishim/systemd"
)

// Keys are the values as they are written. The tags are the names of the keys, of flags where there are any, and say which are of no use before
// the next start. Defaults and descriptions are in systemd/config.toml, and nowhere else.
type Keys struct {
	Listen          string `toml:"listen" flag:"listen" restart:"yes"`
	RuntimeEndpoint string `toml:"runtime_endpoint" flag:"runtime-endpoint" restart:"yes"`
	Admin           string `toml:"admin" flag:"admin-socket" restart:"yes"`
	Metrics         string `toml:"metrics" flag:"metrics" restart:"yes"`
	Criu            string `toml:"criu" flag:"criu"`
	StateDir        string `toml:"state_dir" flag:"state-dir" restart:"yes"`
	LogLevel        string `toml:"log_level" flag:"log-level"`
	LogFormat       string `toml:"log_format" flag:"log-format"`
	Checkpoint      struct {
		Mode          string   `toml:"mode"`
		Directories   []string `toml:"directories"`
		TCP           string   `toml:"tcp"`
		Compression   string   `toml:"compression" flag:"compression"`
		Digest        string   `toml:"digest" flag:"digest"`
		Reserve       string   `toml:"reserve"`
		ReserveInodes string   `toml:"reserve_inodes"`
		MaxFrozen     string   `toml:"max_frozen"`
		Parallel      int      `toml:"parallel"`
	} `toml:"checkpoint"`
	Retention struct {
		Directories     []string `toml:"directories"`
		MaxPerContainer int      `toml:"max_per_container"`
		MaxSize         string   `toml:"max_size"`
		MaxAge          string   `toml:"max_age"`
		DryRun          bool     `toml:"dry_run"`
	} `toml:"retention"`
	Shutdown struct {
		Checkpoints string `toml:"checkpoints"`
		Calls       string `toml:"calls"`
	} `toml:"shutdown"`
	Tracing struct {
		Endpoint string `toml:"endpoint" restart:"yes"`
	} `toml:"tracing"`
}

// Defaults are what the shipped file has.
func Defaults() Keys {
	var k Keys
	if err := toml.Unmarshal([]byte(systemd.Config), &k); err != nil {
		panic(err) // the file is a part of this binary, and the tests have read it
	}
	return k
}

// key is one of Keys.
type key struct {
	name  string // in the file, such as checkpoint.reserve
	flag  string // empty where there is none
	fixed bool   // for as long as the daemon runs
	value reflect.Value
}

// environment is the name of the variable that stands for the key.
func (k key) environment() string {
	return environmentPrefix + strings.ToUpper(strings.ReplaceAll(k.name, ".", "_"))
}

// all returns the keys in the order of the file, by which their values can be set.
func (k *Keys) all() []key { return keysOf("", reflect.ValueOf(k).Elem()) }

func keysOf(prefix string, table reflect.Value) (keys []key) {
	for field, value := range table.Fields() {
		name := prefix + field.Tag.Get("toml")
		if value.Kind() == reflect.Struct {
			keys = append(keys, keysOf(name+".", value)...)
			continue
		}
		keys = append(keys, key{name: name, flag: field.Tag.Get("flag"), fixed: field.Tag.Get("restart") != "", value: value})
	}
	return keys
}

// Register makes flags for the keys that have one, or for those alone that are named, with the first sentence of what the shipped file says of them.
func Register(flags *pflag.FlagSet, names ...string) {
	k := Defaults()
	described := comments(systemd.Config)
	for _, key := range k.all() {
		if key.flag != "" && (len(names) == 0 || slices.Contains(names, key.name)) {
			first, _, _ := strings.Cut(described[key.name], ". ")
			flags.String(key.flag, key.value.String(), strings.TrimSuffix(strings.ToLower(first[:1])+first[1:], "."))
		}
	}
}

// comments returns what stands above each key of a file, as one line. Keys with nothing but other keys between have one in common.
func comments(file string) map[string]string {
	found := map[string]string{}
	var table string
	var comment []string
	for line := range strings.Lines(file) {
		line = strings.TrimSpace(line)
		name, _, isKey := strings.Cut(line, " = ")
		switch text, isComment := strings.CutPrefix(line, "# "); {
		case isComment:
			comment = append(comment, text)
		case line == "":
			comment = nil
		case strings.HasPrefix(line, "["):
			table, comment = strings.Trim(line, "[]")+".", nil
		case isKey:
			found[table+name] = strings.Join(comment, " ")
		}
	}
	return found
}
