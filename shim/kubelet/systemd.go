package kubelet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
)

// Unit is kubelet.service as systemd has loaded it.
type Unit struct {
	Fragment string   // its own file
	DropIns  []string // in the order in which they count
	// Exec is ExecStart= with its program, variables not replaced yet.
	Exec             []string
	Environment      []string // NAME=value
	EnvironmentFiles []EnvironmentFile
	Outdated         bool // files have changed since they were loaded

	State   string // such as active (running)
	Running bool
	Pid     int      // of the kubelet, if there is one
	Args    []string // of the kubelet's command line, without the program, if there is one
}

// EnvironmentFile is a file of variables. Path may be a pattern.
type EnvironmentFile struct {
	Path     string
	Optional bool
}

// Systemd is what is asked of systemd. Tests have another that reads files of units alone.
type Systemd interface {
	// Unit returns Service. There being none is errNoUnit.
	Unit(ctx context.Context) (*Unit, error)
	// Reload has changed files of units count.
	Reload(ctx context.Context) error
	// Restart restarts Service, or starts it, and returns when that is done.
	Restart(ctx context.Context) error
}

var errNoUnit = fmt.Errorf("there is no %s: point the kubelet at crishim where it is configured", Service)

// Manager is the systemd of this machine.
type Manager struct{ bus *dbus.Conn }

// Connect reaches systemd itself, which needs no message bus, but root. Close the Manager.
func Connect(ctx context.Context) (*Manager, error) {
	if _, err := os.Stat("/run/systemd/system"); err != nil { // see sd_booted(3)
		return nil, errors.New("reach systemd: it does not run here, and does not run the kubelet: point that at crishim where it is configured")
	}
	// The library closes the connection when its context ends, but things are put back after that.
	bus, err := dbus.NewSystemdConnectionContext(context.WithoutCancel(ctx))
	if err != nil {
		return nil, fmt.Errorf("reach systemd: %w: only root can", err)
	}
	return &Manager{bus}, nil
}

// Close ends the connection.
func (m *Manager) Close() { m.bus.Close() }

// Unit implements Systemd.
func (m *Manager) Unit(ctx context.Context) (*Unit, error) {
	properties, err := m.bus.GetAllPropertiesContext(ctx, Service)
	if err != nil {
		return nil, fmt.Errorf("ask systemd for %s: %w", Service, err)
	}
	text := func(name string) string { s, _ := properties[name].(string); return s }
	switch state := text("LoadState"); state {
	case "loaded":
	case "not-found":
		return nil, errNoUnit
	default:
		return nil, fmt.Errorf("systemd says that %s is %s: see systemctl status %s", Service, state, Service)
	}
	u := &Unit{Fragment: text("FragmentPath"), State: fmt.Sprintf("%s (%s)", text("ActiveState"), text("SubState"))}
	u.DropIns, _ = properties["DropInPaths"].([]string)
	u.Environment, _ = properties["Environment"].([]string)
	u.Outdated, _ = properties["NeedDaemonReload"].(bool)
	// See org.freedesktop.systemd1(5): a(sasbttttuii) and a(sb).
	if commands, _ := properties["ExecStart"].([][]any); len(commands) == 1 && len(commands[0]) > 1 {
		u.Exec, _ = commands[0][1].([]string)
	}
	if len(u.Exec) == 0 {
		return nil, fmt.Errorf("ask systemd for %s: it has no single ExecStart=", Service)
	}
	files, _ := properties["EnvironmentFiles"].([][]any)
	for _, f := range files {
		if len(f) == 2 {
			path, _ := f[0].(string)
			optional, _ := f[1].(bool)
			u.EnvironmentFiles = append(u.EnvironmentFiles, EnvironmentFile{path, optional})
		}
	}
	pid, _ := properties["MainPID"].(uint32)
	if u.Running = pid != 0; u.Running {
		u.Pid = int(pid)
		content, err := os.ReadFile("/proc/" + strconv.Itoa(u.Pid) + "/cmdline")
		if err == nil {
			content = bytes.TrimSuffix(content, []byte{0})
			_, rest, _ := strings.Cut(string(content), "\x00")
			u.Args = strings.Split(rest, "\x00")
		}
	}
	return u, nil
}

// Reload implements Systemd.
func (m *Manager) Reload(ctx context.Context) error {
	if err := m.bus.ReloadContext(ctx); err != nil {
		return fmt.Errorf("have systemd read its units: %w", err)
	}
	return nil
}

// Restart implements Systemd.
func (m *Manager) Restart(ctx context.Context) error {
	// One that has failed too often would not be started.
	_ = m.bus.ResetFailedUnitContext(ctx, Service)
	result := make(chan string, 1)
	if _, err := m.bus.RestartUnitContext(ctx, Service, "replace", result); err != nil {
		return fmt.Errorf("restart %s: %w", Service, err)
	}
	select {
	case r := <-result:
		if r != "done" {
			return fmt.Errorf("restart %s: it has %s: see systemctl status %s", Service, r, Service)
		}
		return nil
	case <-ctx.Done():
		return fmt.Errorf("restart %s: %w", Service, context.Cause(ctx))
	}
}
