// Command bench measures crishim beside its peers, each with the others in one run, round by round, and writes what it has seen: tables
// and the bars that are to be reached, results.json, and by test/tools/plot the plots of it. `make bench` runs it.
//
//	bench [--short] [--only relay|checkpoint|scale] [--fs ext4|xfs|btrfs|tmpfs | --dir PATH] --out DIR CRISHIM
//
// It needs root, and what the tests need. Nothing of it is left on the machine, however it ends. Absolute figures are those of one machine
// with whatever else it had to do; the ratios are what counts.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"crishim/test/node"
)

const (
	relayPart      = "relay"
	checkpointPart = "checkpoint"
	scalePart      = "scale"
)

// settings are what the command line says.
type settings struct {
	short   bool
	rounds  int
	only    string
	fs      string
	dir     string
	scratch string
	size    int64
	out     string
	engines string
	crishim string
}

func main() {
	if len(os.Args) > 1 && peers[os.Args[1]] != nil {
		if err := peers[os.Args[1]](os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench:", err)
			os.Exit(1)
		}
		return
	}
	s, err := parse(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if err := run(ctx, s); err != nil {
		if ctx.Err() != nil {
			err = errors.New("interrupted; everything is cleaned up")
		}
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func parse(args []string) (settings, error) {
	var s settings
	flags := flag.NewFlagSet("bench", flag.ContinueOnError)
	flags.BoolVar(&s.short, "short", false, "few rounds and small containers, to see that it works")
	flags.IntVar(&s.rounds, "rounds", 0, "rounds of checkpoints; 0 is 5, and 2 with --short")
	flags.StringVar(&s.only, "only", "", "relay, checkpoint or scale: measure only that")
	flags.StringVar(&s.engines, "engines", "", "parts of the names of those that checkpoint, divided by commas; empty is all")
	flags.StringVar(&s.fs, "fs", "ext4", "file system that is made for it: ext4, xfs, btrfs or tmpfs")
	flags.StringVar(&s.dir, "dir", "", "directory of an existing file system to use instead")
	flags.StringVar(&s.scratch, "scratch", "/var/tmp", "where the image of the file system is while it is measured")
	size := flags.Int64("size", 0, "size of the file system in GiB; 0 is 28, and 4 with --short")
	flags.StringVar(&s.out, "out", "", "directory for the results")
	if err := flags.Parse(args); err != nil {
		return s, err
	}
	if flags.NArg() != 1 || s.out == "" {
		return s, errors.New("usage: bench [OPTION…] --out DIR CRISHIM, where CRISHIM is the binary")
	}
	if !slices.Contains([]string{"", relayPart, checkpointPart, scalePart}, s.only) {
		return s, fmt.Errorf("--only %s: there are relay, checkpoint and scale", s.only)
	}
	s.size = *size << 30
	if s.size == 0 {
		s.size = 28 << 30
		if s.short {
			s.size = 4 << 30
		}
	}
	if s.rounds == 0 {
		s.rounds = 5
		if s.short {
			s.rounds = 2
		}
	}
	var err error
	s.crishim, err = filepath.Abs(flags.Arg(0))
	return s, err
}

// wants says whether a part is to be measured.
func (s settings) wants(part string) bool { return s.only == "" || s.only == part }

// closely is how often in a round those have their turn that bars compare most closely: what one makes of it differs more than they do.
const closely = 3

// turns says how often an engine has its turn in a round.
func (s settings) turns(e engine) int {
	wanted := s.engines == ""
	for part := range strings.SplitSeq(s.engines, ",") {
		wanted = wanted || strings.Contains(e.name, part)
	}
	switch {
	case !wanted:
		return 0
	case s.short || e.name != criuAlone && e.name != crishim:
		return 1
	}
	return closely
}

// inOwnMounts is set in the environment where this process has a mount namespace of its own.
const inOwnMounts = "CRISHIM_BENCH_MOUNTS"

func run(ctx context.Context, s settings) (err error) {
	if os.Geteuid() != 0 {
		return errors.New("this needs root")
	}
	// What is mounted is then gone with this process.
	if os.Getenv(inOwnMounts) == "" {
		unshare, err := exec.LookPath("unshare")
		if err != nil {
			return err
		}
		self, err := os.Executable()
		if err != nil {
			return err
		}
		args := append([]string{"unshare", "--mount", "--propagation", "private", "--", self}, os.Args[1:]...)
		return syscall.Exec(unshare, args, append(os.Environ(), inOwnMounts+"=1"))
	}
	r := &results{Command: "bench " + strings.Join(os.Args[1:], " "), Short: s.short, Started: time.Now().UTC().Truncate(time.Second)}
	r.LoadBefore = loadAverage()
	if s.wants(checkpointPart) || s.wants(scalePart) {
		if err := runInNodes(ctx, s, r); err != nil {
			return err
		}
	}
	if s.wants(relayPart) {
		if r.Relay, err = measureRelay(ctx, s); err != nil {
			return fmt.Errorf("measure relay: %w", err)
		}
	}
	r.Machine.describe(r.LoadBefore)
	r.Bars = r.bars()
	return r.write(s.out)
}

func runInNodes(ctx context.Context, s settings, r *results) (err error) {
	say("Preparing nodes (minutes the first time, cached then)")
	if err := node.Build(ctx); err != nil {
		return err
	}
	touch := 64 << 30
	if s.short {
		touch = 1 << 30
	}
	held, err := holdMemory(ctx, touch)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.close()) }()
	var d *disk
	if s.dir != "" {
		d, err = useDir(s.dir)
	} else {
		d, err = makeDisk(ctx, s.fs, s.scratch, s.size)
	}
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.close()) }()
	r.Machine.FileSystem = d.String()
	b, err := makeBeds(ctx, d, s.crishim)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.close()) }()
	if r.Machine.Versions, err = b.versions(ctx); err != nil {
		return err
	}
	if s.wants(checkpointPart) {
		for _, c := range cases(s) {
			row, err := b.checkpointShape(ctx, c.shape, c.rounds, s.turns)
			if err != nil {
				return err
			}
			r.Checkpoints = append(r.Checkpoints, *row)
		}
	}
	if s.wants(scalePart) {
		if r.Scale, err = b.measureScale(ctx, s); err != nil {
			return fmt.Errorf("measure scale: %w", err)
		}
	}
	return nil
}

// measured is a shape, and how often it is checkpointed.
type measured struct {
	shape
	rounds int
}

func cases(s settings) []measured {
	if s.short {
		return []measured{
			{shape{Memory: 64, Processes: 1}, s.rounds},
			{shape{Memory: 256, Processes: 1}, s.rounds},
			{shape{Memory: 256, Processes: 4}, s.rounds},
			{shape{Memory: 64, Processes: 1, Files: 5000, Layer: 64}, s.rounds},
		}
	}
	few := max(1, s.rounds*3/5)
	return []measured{
		{shape{Memory: 64, Processes: 1}, s.rounds},
		{shape{Memory: 1024, Processes: 1}, s.rounds},
		{shape{Memory: 4096, Processes: 1}, few},
		{shape{Memory: 1024, Processes: 4}, s.rounds},
		{shape{Memory: 1024, Processes: 1, Files: 100000, Layer: 1024}, few},
	}
}

func say(format string, args ...any) {
	fmt.Printf("%s %s\n", time.Now().Format(time.TimeOnly), fmt.Sprintf(format, args...))
}

func (r *results) write(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	content, err := json.MarshalIndent(r, "", "\t")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "results.json"), append(content, '\n'), 0o644); err != nil {
		return err
	}
	text := r.report()
	fmt.Print("\n", text)
	return os.WriteFile(filepath.Join(dir, "README.md"), []byte(text), 0o644)
}
