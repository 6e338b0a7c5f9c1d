package main

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"
)

// report is README.md beside results.json.
func (r *results) report() string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	line("# Benchmarks\n")
	line("Made by `make bench` (`%s`), %s. Do not edit: the next run writes it anew.\n", r.Command, r.Started.Format(time.DateTime+" MST"))
	line("Everything in a table was measured in one run, round by round, each round in another order. Figures are medians, with minimum and maximum")
	line("in brackets. They are those of this machine with whatever else it had to do; compare the figures of a table with each other.\n")
	r.machineTable(line)
	r.barTable(line)
	if len(r.Checkpoints) > 0 {
		r.checkpointTables(line)
	}
	if r.Scale != nil {
		r.scaleTables(line)
	}
	if r.Relay != nil {
		r.Relay.tables(line)
	}
	return b.String()
}

func (r *results) machineTable(line func(string, ...any)) {
	m := r.Machine
	line("## The machine\n")
	line("| | |\n|---|---|")
	line("| CPU | %s, %d cores |", m.CPU, m.Cores)
	line("| memory | %.0f GiB |", float64(m.Memory)/(1<<30))
	line("| kernel | %s |", m.Kernel)
	if m.FileSystem != "" {
		line("| file system of containers and archives | %s |", m.FileSystem)
	}
	line("| load average | %s |", m.Load)
	for _, name := range slices.Sorted(maps.Keys(m.Versions)) {
		line("| %s | %s |", name, m.Versions[name])
	}
	line("")
}

func (r *results) barTable(line func(string, ...any)) {
	line("## What is to be reached\n")
	line("| what | seen | bar | |\n|---|---|---|---|")
	for _, b := range r.Bars {
		verdict := "**not reached**"
		if b.Reached {
			verdict = "reached"
		}
		line("| %s | %s | %s | %s |", b.What, b.Got, b.Want, verdict)
	}
	line("")
}

func (r *results) checkpointTables(line func(string, ...any)) {
	line("## Checkpoints\n")
	line(`The container goes on. **Total** is the time until the result is durable: crishim's own answer; for the others until this program has
synced what they have written. **Frozen** is what CRIU says of itself; **stall** the longest time that a thread of the workload saw between two looks
at the clock, which is what its clients see: what an engine pauses beyond CRIU's dump is in it, and so is what the scheduler adds on a busy machine.
**Written** is what the processes gave the kernel to write (write_bytes of /proc/PID/io), **disk** what reached the device, each divided by the
size of CRIU's images as they are alone. **Extra** is the most disk space taken at once, divided by the size of the result. **Memory** is the
most that the engine's own processes held at once, without CRIU: RssAnon, and VmRSS in brackets.

All but podman checkpoint the same container, in a pod of containerd; podman has one like it. All that is written is on the one file system:
CRIU's images and the archive of crishim, of runc and of criu alone in /data; containerd's images in /tmp, its copies in /var/lib/containerd;
podman's images in its graphroot. All free memory was touched first, and is then kept from a host that would take it back.
Bars compare crishim and criu alone most closely: in a round these have their turn three times (with --short, once).

- %s: the options that runc would have given it, and no network lock, as crishim has it where no connection is established. No archive: this is the floor.
- %s: with the upper directory in the tar where there is a layer worth the name.
- %s: its own CheckpointContainer, which takes the container's layer, too.
- %s: `+"`podman container checkpoint --leave-running --compress none --export`"+`, with the layer.
- %s: CheckpointContainer on its socket, in front of the same containerd, with the layer.
`, criuAlone, runcAndTar, containerd, podman, crishim)
	line("In the plots bars are medians, and lines the middle half.\n")
	line("![total](total.svg) ![frozen](frozen.svg) ![written](written.svg)\n")
	for _, row := range r.Checkpoints {
		images := median(column(row.Samples[criuAlone], size))
		line("### %s\n", row.Name)
		line("| | total, s | frozen, ms | stall, ms | written | disk | extra | result, MiB | memory, MiB |\n|---|---|---|---|---|---|---|---|---|")
		for _, name := range []string{criuAlone, runcAndTar, containerd, podman, crishim, crishimZst} {
			s := row.Samples[name]
			if len(s) == 0 {
				continue
			}
			over := func(of func(sample) float64, base float64) string {
				if value := median(column(s, of)); base > 0 && value > 0 {
					return fmt.Sprintf("%.2f×", value/base)
				}
				return "–"
			}
			memory := "–" // criu itself is not counted
			if name != criuAlone {
				memory = fmt.Sprintf("%.0f (%.0f)", median(column(s, anon))/mebi, median(column(s, resident))/mebi)
			}
			line("| %s | %s | %s | %s | %s | %s | %s | %.0f | %s |", name,
				spread(column(s, total), 1, "%.2f"), spread(column(s, frozen), 1e3, "%.0f"), spread(column(s, stall), 1e3, "%.0f"),
				over(written, images), over(onDisk, images), over(extra, median(column(s, size))), median(column(s, size))/mebi, memory)
		}
		line("")
	}
}

func (r *results) scaleTables(line func(string, ...any)) {
	s := r.Scale
	line("## Scale\n")
	line("![memory](memory.svg)\n")
	line("One process, checkpointed by crishim:\n\n| memory | total, s |\n|---|---|")
	for _, size := range s.Sizes {
		line("| %s | %s |", megabytes(size.Memory), spread(size.Seconds, 1, "%.2f"))
	}
	line("\nA line through them: %.2f s + %.2f s for each GiB, R² = %.3f.\n", s.Intercept, s.SlopePerGiB, s.RSquared)
	line("%d containers of 64 MiB checkpointed at once, until the last is durable:\n\n| | seconds |\n|---|---|", s.Containers)
	for _, name := range slices.Sorted(maps.Keys(s.AtOnce)) {
		line("| %s | %s |", name, spread(s.AtOnce[name], 1, "%.2f"))
	}
	for _, name := range slices.Sorted(maps.Keys(s.Failed)) {
		line("\nCheckpoints of %s failed in %d rounds, which are not among these.", name, s.Failed[name])
	}
	line("")
}

func (r *relayResults) tables(line func(string, ...any)) {
	line("## Relay\n")
	line(`The runtime is a fake one that gives constant answers; it, the client and each proxy are processes of their own, and the client waits after a
failure to connect as the kubelet's does. %d rounds. **Added** is the median of a call of 1 KiB beyond that of a direct one. **CPU** is the proxy's for
such a call. **Back** is how long after the return of the runtime, which was gone for %.0f s, a call succeeds.
`, r.Rounds, r.Gone)
	line("![relay](relay.svg)\n")
	line("| | 1 KiB, µs | p99, µs | added, µs | CPU, µs | 16 callers, /s | 1 MiB, ms | 4 callers, /s | 20,000 events, ms | RssAnon (VmRSS), MiB | back, s |")
	line("|---|---|---|---|---|---|---|---|---|---|---|")
	base := 0.0
	for _, w := range r.Ways {
		if w.Name == direct {
			base = median(w.Unary)
		}
		memory, cpu, added := "–", "–", "–"
		if w.Name != direct {
			memory = fmt.Sprintf("%.1f (%.1f)", float64(w.Anon)/mebi, float64(w.Resident)/mebi)
			cpu = spread(w.CPU, 1e6, "%.0f")
			added = fmt.Sprintf("%.0f", (median(w.Unary)-base)*1e6)
		}
		line("| %s | %s | %s | %s | %s | %s | %s | %s | %s | %s | %.2f |", w.Name, spread(w.Unary, 1e6, "%.0f"), spread(w.Unary99, 1e6, "%.0f"), added, cpu,
			spread(w.Unary16, 1, "%.0f"), spread(w.List, 1e3, "%.1f"), spread(w.List4, 1, "%.0f"), spread(w.Events, 1e3, "%.0f"), memory, w.Recovery)
	}
	line("")
}

// spread is a median with minimum and maximum.
func spread(values []float64, factor float64, format string) string {
	if len(values) == 0 {
		return "–"
	}
	f := format + " (" + format + "–" + format + ")"
	return fmt.Sprintf(f, median(values)*factor, slices.Min(values)*factor, slices.Max(values)*factor)
}
