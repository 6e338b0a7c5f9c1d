// Command testnode runs commands in a test node, see package node.
//
//	testnode build                        build all that is kept in the cache
//	testnode run [OPTION…] [--] COMMAND [ARGUMENT…]
//	                                      run a command in a new node with containerd, in the current directory
//	testnode shell [OPTION…]              the same, with a shell
//	testnode vm [--copy=FILE…] [--] COMMAND [ARGUMENT…]
//	                                      run a command in a new virtual machine, see node.Machine, which has copies of files
//	testnode sweep                        remove what killed nodes left
//
// The options are those of node.Options: --cgroup-v2, --root=containerd-2|podman|docker, --programs.
//
// It is made for "go test -exec 'testnode run --'": the source tree and the directory of the command are visible in the
// node at the same paths; in a virtual machine it is the command's file alone. The exit code is the command's.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"

	"crishim/test/node"
)

const usage = "usage: testnode build | run [OPTION…] [--] COMMAND [ARGUMENT…] | shell [OPTION…] | vm [--copy=FILE…] [--] COMMAND [ARGUMENT…] | sweep; " +
	"options are --cgroup-v2, --root=containerd-2|podman|docker and --programs"

func main() {
	code, err := run(os.Args[1:])
	if err != nil {
		fmt.Fprintln(os.Stderr, "testnode:", err)
		code = 1
	}
	os.Exit(code)
}

func run(args []string) (code int, err error) {
	if len(args) == 0 {
		return 0, errors.New(usage)
	}
	command, args := args[0], args[1:]
	ends := []os.Signal{os.Interrupt, syscall.SIGTERM, syscall.SIGHUP}
	if command == "shell" {
		// An interrupt is for what the shell runs. It is not ignored, which the shell would inherit.
		interrupts := make(chan os.Signal, 1)
		signal.Notify(interrupts, os.Interrupt)
		defer signal.Stop(interrupts)
		ends = ends[1:]
	}
	if command == "vm" {
		// go test sends it to see where a test hangs: the end of the machine shows its console.
		ends = append(ends, syscall.SIGQUIT)
	}
	// A signal ends the command and then the node.
	ctx, cancel := signal.NotifyContext(context.Background(), ends...)
	defer cancel()
	var options node.Options
	var copies []string
	for len(args) > 0 && strings.HasPrefix(args[0], "--") {
		option := args[0]
		args = args[1:]
		if option == "--" {
			break
		}
		name, isRoot := strings.CutPrefix(option, "--root=")
		file, isCopy := strings.CutPrefix(option, "--copy=")
		switch {
		case command == "vm" && isCopy:
			copies = append(copies, file)
		case command == "vm":
			return 0, fmt.Errorf("unknown option %s: a virtual machine has none but --copy; %s", option, usage)
		case option == "--cgroup-v2":
			options.CgroupV2 = true
		case option == "--programs":
			options.Programs = true
		case isRoot:
			options.Root = node.Root(name)
		default:
			return 0, fmt.Errorf("unknown option %s; %s", option, usage)
		}
	}
	switch {
	case command == "build" && len(args) == 0:
		return 0, node.BuildAll(ctx)
	case command == "sweep" && len(args) == 0:
		return 0, node.Sweep(ctx)
	case command == "shell" && len(args) == 0:
		return inNode(ctx, options, []string{"/bin/bash"})
	case command == "run" && len(args) > 0:
		return inNode(ctx, options, args)
	case command == "vm" && len(args) > 0:
		return inMachine(ctx, copies, args)
	}
	return 0, errors.New(usage)
}

// inMachine runs a command in a virtual machine of its own.
func inMachine(ctx context.Context, copies, args []string) (code int, err error) {
	dir, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	return node.Machine{Source: top(dir), Dir: dir, Copies: copies, Args: args, Output: os.Stdout}.Run(ctx)
}

// inNode runs a command in a node of its own.
func inNode(ctx context.Context, options node.Options, args []string) (code int, err error) {
	dir, err := os.Getwd()
	if err != nil {
		return 0, err
	}
	if options.Binds, err = binds(dir, args[0]); err != nil {
		return 0, err
	}
	n, err := node.Start(ctx, options)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, n.Stop()) }()
	if _, err := n.StartContainerd(ctx); err != nil {
		return 0, err
	}

	cmd := n.Command(ctx, "sh", append([]string{"-c", `cd "$0" && exec "$@"`, dir}, args...)...)
	cmd.Env = append(os.Environ(), cmd.Env...)
	cmd.Env = append(cmd.Env, node.Inside+"=1", "TMPDIR=/tmp", "TERM="+os.Getenv("TERM"))
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	// go test sends SIGQUIT to see where a test hangs.
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGQUIT)
	defer signal.Stop(quit)
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	done := make(chan error, 1)
	go func() { done <- cmd.Wait() }()
	for {
		select {
		case <-quit:
			// Where it has ended meanwhile, that is next.
			_ = node.Signal(cmd, syscall.SIGQUIT)
		case err := <-done:
			var exit *exec.ExitError
			if ctx.Err() != nil {
				return 0, errors.New("interrupted")
			}
			if errors.As(err, &exit) && exit.Exited() {
				return exit.ExitCode(), nil
			}
			return 0, err
		}
	}
}

// top is the directory of the module around dir, dir itself where there is none.
func top(dir string) string {
	for top := dir; ; top = filepath.Dir(top) {
		if _, err := os.Stat(filepath.Join(top, "go.mod")); err == nil {
			return top
		}
		if top == "/" {
			return dir
		}
	}
}

// binds makes the module around dir and the directory of a command's file visible in the node.
func binds(dir, command string) ([]node.Bind, error) {
	top := top(dir)
	var binds []node.Bind
	// The root of the node stays its own.
	if top != "/" {
		binds = append(binds, node.Bind{Source: top, Target: top})
	}
	if !filepath.IsAbs(command) {
		return binds, nil
	}
	place := filepath.Dir(command)
	// go test keeps what a test writes in sibling directories.
	if parent := filepath.Dir(place); strings.HasPrefix(filepath.Base(parent), "go-build") {
		place = parent
	}
	info, err := os.Stat(command)
	if errors.Is(err, os.ErrNotExist) || err == nil && info.IsDir() || place == "/" || strings.HasPrefix(place+"/", top+"/") {
		return binds, nil
	}
	// The programs of the host stay there.
	for _, own := range []string{"/bin", "/sbin", "/usr", "/lib"} {
		if strings.HasPrefix(place+"/", own+"/") {
			return binds, nil
		}
	}
	return append(binds, node.Bind{Source: place, Target: place}), nil
}
