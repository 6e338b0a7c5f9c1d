package main

import (
	"bufio"
	"context"
	"os"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// results is what results.json holds.
type results struct {
	Command     string
	Short       bool
	Started     time.Time
	Machine     machine
	LoadBefore  string        `json:"-"`
	Checkpoints []row         `json:",omitempty"`
	Scale       *scale        `json:",omitempty"`
	Relay       *relayResults `json:",omitempty"`
	Bars        []bar
}

// machine is what the figures depend on.
type machine struct {
	CPU        string
	Cores      int
	Memory     int64 // bytes
	Kernel     string
	FileSystem string            `json:",omitempty"` // that checkpoints were written to
	Load       string            // load average before and after
	Versions   map[string]string `json:",omitempty"`
}

func (m *machine) describe(loadBefore string) {
	m.CPU, m.Cores = "unknown", runtime.NumCPU()
	if file, err := os.Open("/proc/cpuinfo"); err == nil {
		defer file.Close()
		for lines := bufio.NewScanner(file); lines.Scan(); {
			if name, value, found := strings.Cut(lines.Text(), ":"); found && strings.TrimSpace(name) == "model name" {
				m.CPU = strings.TrimSpace(value)
				break
			}
		}
	}
	var info unix.Sysinfo_t
	if unix.Sysinfo(&info) == nil {
		m.Memory = int64(info.Totalram) * int64(info.Unit)
	}
	var name unix.Utsname
	if unix.Uname(&name) == nil {
		m.Kernel = unix.ByteSliceToString(name.Release[:])
	}
	m.Load = loadBefore + " before, " + loadAverage() + " after"
}

func loadAverage() string {
	content, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	one, _, _ := strings.Cut(string(content), " ")
	return one
}

// versions are those of what is measured.
func (b *beds) versions(ctx context.Context) (map[string]string, error) {
	found := map[string]string{"go": runtime.Version()}
	for _, v := range []struct {
		name    string
		bed     *bed
		command []string
	}{
		{"criu", b.containerd, []string{"criu", "--version"}},
		{"runc", b.containerd, []string{"runc", "--version"}},
		{"containerd", b.containerd, []string{"containerd", "--version"}},
		{"tar", b.containerd, []string{"tar", "--version"}},
		{"podman", b.podman, []string{"podman", "--version"}},
		{"podman's crun", b.podman, []string{"crun", "--version"}},
		{"crishim", b.containerd, []string{"/run/bin-crishim", "version"}},
	} {
		out, err := v.bed.node.Output(ctx, v.command[0], v.command[1:]...)
		if err != nil {
			return nil, err
		}
		line, _, _ := strings.Cut(out, "\n")
		found[v.name] = strings.TrimSpace(line)
	}
	return found, nil
}

func median(values []float64) float64 {
	if len(values) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(values))
	middle := len(sorted) / 2
	if len(sorted)%2 == 1 {
		return sorted[middle]
	}
	return (sorted[middle-1] + sorted[middle]) / 2
}

// column takes one figure of each sample.
func column(samples []sample, of func(sample) float64) []float64 {
	var values []float64
	for _, s := range samples {
		values = append(values, of(s))
	}
	return values
}

func total(s sample) float64    { return s.Total }
func frozen(s sample) float64   { return s.Frozen }
func stall(s sample) float64    { return s.Stall }
func size(s sample) float64     { return float64(s.Size) }
func written(s sample) float64  { return float64(s.Written) }
func onDisk(s sample) float64   { return float64(s.Disk) }
func extra(s sample) float64    { return float64(s.Extra) }
func anon(s sample) float64     { return float64(s.Anon) }
func resident(s sample) float64 { return float64(s.Resident) }
