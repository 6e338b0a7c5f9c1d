package node

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"
)

// machineRoot is a root with systemd and a kernel, of which the disk of virtual machines is made.
const machineRoot Root = "machine"

//go:embed machine.sh
var machineRecipe string

//go:embed machine/init
var machineInit string

//go:embed machine/run.sh machine/tests.target machine/tests.service
var machineFiles embed.FS

// machine returns a directory with what virtual machines boot from: vmlinux, initrd and root.img, see machine.sh.
func (c cache) machine(ctx context.Context) (string, error) {
	if runtime.GOARCH != "amd64" {
		return "", errors.New("build virtual machine: it is made for amd64 alone; run this on such a machine")
	}
	lower, err := c.lower(ctx, machineRoot)
	if err != nil {
		return "", err
	}
	recipe := fmt.Sprintf("%s\n%s\n%s", c.names(lower), machineRecipe, machineInit)
	return c.entry(ctx, "machine", recipe, func(temporary string) error {
		return output(isolated(ctx, machineRecipe, lower, temporary, machineInit))
	})
}

// Machine is a command that runs as root in a virtual machine of its own: Debian with systemd as its first process, cgroup v2, all
// capabilities, 16 huge pages and 64 MiB of swap, emulated in software. containerd is installed as Debian has it, crishim as make
// install does, and a kubelet 1.34 at KubeletPath; none of them runs. Nodes can be started in it.
type Machine struct {
	// Source is the top of crishim's source tree, Dir the working directory, which exists in the machine, but is empty.
	Source, Dir string
	// Args are the command and its arguments. Where the first is a file of this host, but for what is in /usr, the machine gets a copy.
	Args []string
	// Copies are files of this host that the machine has in CopiesDir.
	Copies []string
	// Output takes what the command writes to its standard streams.
	Output io.Writer
}

// KubeletPath is the path of the kubelet in a virtual machine.
const KubeletPath = "/usr/local/bin/kubelet"

// CopiesDir is where a virtual machine has copies of files of the host.
const CopiesDir = "/usr/local/lib/crishim-test"

// crishimPath is where make install puts crishim.
const crishimPath = "/usr/local/bin/crishim"

// crishimFailpointPath is where a virtual machine has one with the tag "failpoint".
const crishimFailpointPath = "/usr/local/lib/crishim-test/crishim-failpoint"

// Run starts the machine, building what the cache lacks, and waits for its end, which that of the command or of ctx brings about. It returns
// the command's exit code. Any other end, such as a panic of the machine's kernel, is an error that has the last lines of its console.
func (m Machine) Run(ctx context.Context) (code int, err error) {
	c, err := openCache()
	if err != nil {
		return 0, err
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		return 0, fmt.Errorf("start virtual machine: %w; test/setup.sh vm installs it", err)
	}
	boot, err := c.machine(ctx)
	if err != nil {
		return 0, err
	}
	dir, err := os.MkdirTemp("", "crishim-test-machine-*")
	if err != nil {
		return 0, fmt.Errorf("start virtual machine: %w", err)
	}
	defer os.RemoveAll(dir)
	if err := m.makeDisk(ctx, c, dir); err != nil {
		return 0, fmt.Errorf("make disk of virtual machine: %w", err)
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64",
		// With more than one processor, emulated at once, the guest's kernel has panicked.
		"-machine", "pc,accel=tcg", "-cpu", "max", "-smp", "1", "-m", "3072",
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-kernel", filepath.Join(boot, "vmlinux"), "-initrd", filepath.Join(boot, "initrd"),
		"-append", "console=ttyS0 loglevel=4 panic=-1 mitigations=off systemd.unit=tests.target systemd.show_status=0",
		"-drive", "if=virtio,format=raw,readonly=on,file="+filepath.Join(boot, "root.img"),
		"-drive", "if=virtio,format=raw,cache=unsafe,file="+path("disk"),
		"-device", "virtio-rng-pci",
		"-serial", "file:"+path("console"), "-chardev", "stdio,id=output,signal=off", "-serial", "chardev:output", "-serial", "file:"+path("status"))
	var stderr bytes.Buffer
	// Not the file itself: QEMU would make it non-blocking, also for others.
	cmd.Stdout, cmd.Stderr = struct{ io.Writer }{m.Output}, &stderr
	cmd.WaitDelay = 5 * time.Second
	runErr := dieWithUs(cmd, (*exec.Cmd).Run)
	status, err := os.ReadFile(path("status"))
	if err == nil {
		if code, err := strconv.Atoi(strings.TrimSpace(string(status))); err == nil {
			return code, nil
		}
	}
	console, err := os.ReadFile(path("console"))
	what := "the virtual machine ended before its command did"
	switch {
	case ctx.Err() != nil:
		what = "the virtual machine was ended before its command did"
	case bytes.Contains(console, []byte("Kernel panic")):
		what = "the virtual machine's kernel panicked"
	}
	return 0, fmt.Errorf("%s: %w\n%s\nlast lines of its console:\n%s", what, errors.Join(ctx.Err(), runErr, err), stderr.Bytes(), lastLines(console, 60))
}

func lastLines(text []byte, n int) []byte {
	for i := len(text) - 1; i > 0; i-- {
		if text[i-1] == '\n' {
			if n--; n == 0 {
				return text[i:]
			}
		}
	}
	return text
}

// makeDisk makes the machine's own disk, see machine/init.
func (m Machine) makeDisk(ctx context.Context, c cache, dir string) error {
	disk := filepath.Join(dir, "content")
	tree := filepath.Join(disk, "tree")
	install := exec.CommandContext(ctx, "make", "-C", m.Source, "install", "DESTDIR="+tree)
	install.Env = append(os.Environ(), "MAKEFLAGS=", "MAKELEVEL=") // of a make that this one is not part of
	if err := output(install); err != nil {
		return err
	}
	entries, err := m.entries(ctx, c)
	if err != nil {
		return err
	}
	copies := map[string]string{}
	for _, entry := range entries {
		copies[entry] = entry
	}
	if copies[KubeletPath], err = Tool(ctx, "kubelet-1.34"); err != nil {
		return err
	}
	args := slices.Clone(m.Args)
	// Where /bin is a link to /usr/bin, it is one in the machine, too.
	if program, err := filepath.EvalSymlinks(args[0]); err == nil && !strings.HasPrefix(program, "/usr/") {
		if info, err := os.Stat(program); err == nil && info.Mode().IsRegular() {
			args[0] = filepath.Join(CopiesDir, filepath.Base(program))
			copies[args[0]] = program
		}
	}
	if copies[crishimFailpointPath], err = BuildCrishim(ctx, dir, "failpoint"); err != nil {
		return err
	}
	for _, file := range m.Copies {
		copies[filepath.Join(CopiesDir, filepath.Base(file))] = file
	}
	for target, source := range copies {
		target = filepath.Join(tree, target)
		if err := os.MkdirAll(filepath.Dir(target), 0o755); err != nil {
			return err
		}
		if err := output(exec.CommandContext(ctx, "cp", "-a", source, target)); err != nil {
			return err
		}
	}
	root, err := c.root(ctx)
	if err != nil {
		return err
	}
	binds := "/root.img " + root + "\n"
	for _, target := range append([]string{filepath.Join(string(c), "nodes")}, data...) {
		source := filepath.Join("data", target)
		if err := os.MkdirAll(filepath.Join(disk, source), 0o755); err != nil {
			return err
		}
		binds += "/own/" + source + " " + target + "\n"
	}
	files := map[string]string{
		"binds":                         binds,
		"tree/etc/hostname":             "machine\n",
		"tree/etc/hosts":                "127.0.0.1 localhost machine\n",
		"tree/etc/machine-id":           strings.Repeat("c", 32) + "\n", // with none, systemd thinks that this is the first boot
		"tree/etc/crishim-test/command": script(c, m.Dir, args),
		"tree" + m.Dir + "/.directory":  "",
	}
	for name, target := range map[string]string{
		"run.sh": "etc/crishim-test", "tests.target": "etc/systemd/system", "tests.service": "etc/systemd/system",
	} {
		content, err := machineFiles.ReadFile("machine/" + name)
		if err != nil {
			return err
		}
		files[filepath.Join("tree", target, name)] = string(content)
	}
	for name, content := range files {
		name = filepath.Join(disk, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(name, []byte(content), 0o755); err != nil {
			return err
		}
	}
	// Nothing of it outlives the machine.
	return output(exec.CommandContext(ctx, "mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-d", disk, filepath.Join(dir, "disk"), "6G"))
}

// entries are those of the cache that nodes in the machine need, beside the root.
func (m Machine) entries(ctx context.Context, c cache) ([]string, error) {
	layout, err := c.images(ctx)
	if err != nil {
		return nil, err
	}
	entries := []string{layout}
	for _, name := range []string{"pause", "workload"} {
		sources, err := readSources(name)
		if err != nil {
			return nil, err
		}
		program, err := c.program(ctx, name, sources)
		if err != nil {
			return nil, err
		}
		entries = append(entries, program)
	}
	pid1, err := c.program(ctx, "pid1", map[string][]byte{"main.go": pid1Source})
	return append(entries, pid1), err
}

// script becomes the command.
func script(c cache, dir string, args []string) string {
	quote := func(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }
	var b strings.Builder
	b.WriteString("#!/bin/sh\ncd " + quote(dir) + "\nexec env -i")
	for _, variable := range append([]string{"CRISHIM_TEST_CACHE=" + string(c), InMachine + "=1"}, environment...) {
		b.WriteString(" " + quote(variable))
	}
	for _, arg := range args {
		b.WriteString(" " + quote(arg))
	}
	return b.String() + "\n"
}
