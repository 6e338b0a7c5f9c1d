package kubelet

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/unit"
	"golang.org/x/sys/unix"
)

// dropInPath is the one file that is written. It comes after 10-kubeadm.conf.
const dropInPath = units + "/" + Service + ".d/20-crishim.conf"

// nextPath is where it is written before it is renamed. systemd does not read it.
const nextPath = units + "/" + Service + ".d/.20-crishim.conf.new"

// dropIn has the kubelet's command line end in a flag that points at crishim.
//
// The last flag wins over all else, wherever that stands. The other ways are weaker. A variable in Environment=, such as KUBELET_EXTRA_ARGS, loses to
// /etc/default/kubelet, which most nodes have. A file of variables of our own would have to repeat what that one says, and hide what is written there
// later. A file in --config-dir loses to kubeadm's flags. Here, the variables stay variables: all files go on to count. What is repeated is
// the line ExecStart= itself, which a new package of the kubelet could change: Status tells, and Enable repeats it anew.
type dropIn struct {
	command   string  // ExecStart= as it was
	endpoint  string  // crishim's
	before    Setting // what the kubelet used when this was made, for people
	directory bool    // whether the directory was made for it
}

func (d *dropIn) flag() string { return "--" + runtimeFlag + "=" + d.endpoint }

// String is the content of the file. What there is to know of it is in its first lines, from which the rest follows. A later version must still
// know this form: it has to undo what an earlier one has done.
func (d *dropIn) String() string {
	return fmt.Sprintf(`# Made by "crishim kubelet enable". Do not change it: "crishim kubelet disable" removes it.
# command: %s
# endpoint: %s
# before: %s, by %s
# directory made: %t

[Unit]
Wants=crishim.socket
After=crishim.socket

[Service]
ExecStart=
ExecStart=%[1]s %[6]s
`, d.command, d.endpoint, d.before.Value, d.before.Source, d.directory, d.flag())
}

var header = regexp.MustCompile(`\A# Made by "crishim .*\n# command: (.*)\n# endpoint: (.*)\n# before: (.*?), by (.*)\n# directory made: (true|false)\n`)

// parseDropIn reads what String has made. The error of what has been changed since shows how.
func parseDropIn(content string) (*dropIn, error) {
	m := header.FindStringSubmatch(content)
	if m == nil {
		return nil, errors.New("crishim has not made it")
	}
	d := &dropIn{command: m[1], endpoint: m[2], before: Setting{m[3], m[4]}, directory: m[5] == "true"}
	if made := d.String(); content != made {
		return nil, fmt.Errorf("it has been changed since crishim made it (-) and is not touched:%s", difference(made, content))
	}
	return d, nil
}

// difference lists the lines that only one of two texts has, in one line.
func difference(a, b string) string {
	var text strings.Builder
	linesA, linesB := strings.Split(a, "\n"), strings.Split(b, "\n")
	only := func(sign string, lines, others []string) {
		for _, line := range lines {
			if !slices.Contains(others, line) {
				fmt.Fprintf(&text, " %s%q", sign, line)
			}
		}
	}
	only("-", linesA, linesB)
	only("+", linesB, linesA)
	if text.Len() == 0 {
		return " lines have been moved or repeated"
	}
	return text.String()
}

// readDropIn returns what there is, nil for none. That somebody has changed it is an error.
func (n *Node) readDropIn() (*dropIn, error) {
	path := n.path(dropInPath)
	content, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read drop-in: %w", err)
	}
	d, err := parseDropIn(string(content))
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w; look at it, remove it yourself, and run systemctl daemon-reload", errChanged, path, err)
	}
	return d, nil
}

var errChanged = errors.New("the drop-in is somebody else's")

// writeDropIn makes the file be what d says, and not be there if d is nil. It is replaced whole.
func (n *Node) writeDropIn(d *dropIn) error {
	path := n.path(dropInPath)
	dir, next := filepath.Dir(path), n.path(nextPath)
	if d == nil {
		made := false
		if content, err := os.ReadFile(path); err == nil {
			if old, err := parseDropIn(string(content)); err == nil {
				made = old.directory
			}
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove drop-in: %w", err)
		}
		if made {
			_ = os.Remove(dir) // unless something else is in it by now
		}
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("make directory for drop-in: %w", err)
	}
	file, err := os.OpenFile(next, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o644)
	if err != nil {
		return fmt.Errorf("write drop-in: %w", err)
	}
	_, err = file.WriteString(d.String())
	err = errors.Join(err, file.Sync(), file.Close())
	if err == nil {
		err = os.Rename(next, path)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("write drop-in: %w", err), os.Remove(next))
	}
	return nil
}

// without is a unit as it would be without our drop-in.
func (n *Node) without(u *Unit, d *dropIn) *Unit {
	if d == nil || len(u.Exec) == 0 || u.Exec[len(u.Exec)-1] != d.flag() {
		return u
	}
	other := *u
	other.Exec = u.Exec[:len(u.Exec)-1]
	return &other
}

// command returns ExecStart= as the unit's own file and its other drop-ins have it, on one line. It is an error if it does not run a kubelet, to which a
// flag could be appended, or if a drop-in that comes after ours sets it.
func (n *Node) command(u *Unit) (string, error) {
	var command, source string
	for _, file := range append([]string{u.Fragment}, u.DropIns...) {
		if file == dropInPath {
			continue
		}
		options, err := n.readUnit(file)
		if err != nil {
			return "", err
		}
		for _, o := range options {
			if o.Section != "Service" || o.Name != "ExecStart" {
				continue
			}
			// systemd takes lines that end in a backslash for one.
			command, source = strings.Join(strings.Fields(strings.ReplaceAll(o.Value, "\\\n", " ")), " "), file
		}
	}
	if command == "" {
		return "", fmt.Errorf("find out what %s runs: no file of it has ExecStart=", Service)
	}
	program, _, _ := strings.Cut(strings.TrimLeft(command, "@-:+!|"), " ")
	if filepath.Base(program) != "kubelet" {
		return "", fmt.Errorf("%s runs %s, not a kubelet itself: have that pass --%s=%s on, and restart it", source, program, runtimeFlag, address(n.Listen))
	}
	if source != u.Fragment && filepath.Base(source) > filepath.Base(dropInPath) {
		return "", fmt.Errorf("%s sets ExecStart= of %s, and comes after %s: give it a name that comes before", source, Service, filepath.Base(dropInPath))
	}
	return command, nil
}

func (n *Node) readUnit(path string) ([]*unit.UnitOption, error) {
	file, err := os.Open(n.path(path))
	if err != nil {
		return nil, fmt.Errorf("read unit: %w", err)
	}
	defer file.Close()
	options, err := unit.DeserializeOptions(file)
	if err != nil {
		return nil, fmt.Errorf("read unit %s: %w", path, err)
	}
	return options, nil
}
