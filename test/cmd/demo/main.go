// Command demo shows what crishim is for, on a real node: containerd 1.7, a real kubelet, real pods. It says what it does and shows
// what comes back, and leaves nothing behind, also when it fails or is interrupted.
//
//	demo CRISHIM    the binary to show
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"crishim/test/node"
	"crishim/test/restore"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	if len(os.Args) != 2 {
		fmt.Fprintln(os.Stderr, "usage: demo CRISHIM")
		os.Exit(2)
	}
	if err := run(ctx, os.Args[1]); err != nil {
		switch {
		case errors.Is(err, node.ErrStop):
			err = fmt.Errorf("%w\nnot everything is cleaned up; the next start of a node removes what is left", err)
		case ctx.Err() != nil:
			err = errors.New("interrupted; everything is cleaned up")
		}
		fmt.Fprintf(os.Stderr, "demo: %v\n", err)
		os.Exit(1)
	}
}

const (
	podName  = "counter"
	hostname = "first"
)

func run(ctx context.Context, crishim string) (err error) {
	start := time.Now()
	say("Preparing: node root file system, kubelet, checkpointctl (minutes the first time, cached then)")
	if err := node.Build(ctx, "checkpointctl", "kubelet-1.34"); err != nil {
		return err
	}
	checkpointctl, err := node.Tool(ctx, "checkpointctl")
	if err != nil {
		return err
	}

	say("A node with containerd, and a kubelet straight in front of it, with a pod that counts")
	first, err := startNode(ctx, hostname)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, first.Stop()) }()
	if err := show(ctx, first, "containerd", "--version"); err != nil {
		return err
	}
	kubelet, err := first.StartKubelet(ctx, node.KubeletOptions{RuntimeEndpoint: node.ContainerdSocket})
	if err != nil {
		return err
	}
	if err := kubelet.RunPod(ctx, node.Pod{Name: podName}); err != nil {
		return err
	}
	pod := kubelet.PodName(podName)
	if err := showLog(ctx, kubelet, pod); err != nil {
		return err
	}

	say("Asking for a checkpoint: containerd 1.7 has none")
	if _, err := post(ctx, kubelet, pod); err == nil {
		return errors.New("containerd made a checkpoint by itself: there is nothing to show")
	}

	say("The same kubelet with crishim in between; the pod has not noticed")
	if err := kubelet.Stop(ctx); err != nil {
		return err
	}
	if _, err := first.StartCrishim(ctx, crishim); err != nil {
		return err
	}
	fmt.Printf("  crishim serve --listen unix://%s --runtime-endpoint unix://%s\n", node.CrishimSocket, node.ContainerdSocket)
	fmt.Printf("  kubelet --container-runtime-endpoint unix://%s\n", node.CrishimSocket)
	if kubelet, err = first.StartKubelet(ctx, node.KubeletOptions{RuntimeEndpoint: node.CrishimSocket}); err != nil {
		return err
	}
	if err := waitPod(ctx, kubelet, pod); err != nil {
		return err
	}

	say("Asking again")
	path, err := post(ctx, kubelet, pod)
	if err != nil {
		return err
	}
	if err := show(ctx, first, "stat", "--format", "mode %a, owner %U:%G, %s bytes", path); err != nil {
		return err
	}
	if err := show(ctx, first, "tar", "tvf", path); err != nil {
		return err
	}

	say("What checkpointctl reads in it, among it how long the container was frozen")
	if err := os.WriteFile(first.Path("/run/checkpointctl"), nil, 0o700); err != nil {
		return err
	}
	if err := first.Bind(checkpointctl, "/run/checkpointctl"); err != nil {
		return err
	}
	if err := show(ctx, first, "/run/checkpointctl", "inspect", "--stats", "--ps-tree", path); err != nil {
		return err
	}

	say("A second node, and runc restore from the archive: it goes on where it was stopped")
	second, err := startNode(ctx, "second")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, second.Stop()) }()
	archive, err := os.Open(first.Path(path))
	if err != nil {
		return err
	}
	defer archive.Close()
	restored, err := restore.Archive(ctx, restore.Machine{Command: second.Command, Path: second.Path}, archive, node.WorkloadImage)
	if err != nil {
		return err
	}
	log, err := first.Output(ctx, "tar", "xOf", path, "container.log")
	if err != nil {
		return err
	}
	fmt.Printf("  in the archive's log, last line:           %s\n", lastLine(log))
	output := ""
	for strings.Count(output, "\n") < 3 {
		if output, err = restored.Output(); err != nil {
			return err
		}
		if err := sleep(ctx, 100*time.Millisecond); err != nil {
			return err
		}
	}
	fmt.Printf("  restored on the second node, first lines:  %s\n", strings.Join(strings.Split(output, "\n")[:3], ", "))

	say("The first container has gone on all along")
	if err := showLog(ctx, kubelet, pod); err != nil {
		return err
	}
	if log, err = kubelet.ContainerLog(ctx, pod, podName); err != nil {
		return err
	}
	if gap := firstGap(log); gap != "" {
		return fmt.Errorf("the first container's count has a gap: %s", gap)
	}
	fmt.Println("  without a gap in its count, and with no restart")
	if err := restored.Remove(ctx); err != nil {
		return err
	}
	say(fmt.Sprintf("Done in %s; cleaning up", time.Since(start).Round(100*time.Millisecond)))
	return nil
}

func say(text string) { fmt.Printf("\n== %s\n", text) }

func startNode(ctx context.Context, hostname string) (*node.Node, error) {
	n, err := node.Start(ctx, node.Options{Hostname: hostname})
	if err != nil {
		return nil, err
	}
	if _, err := n.StartContainerd(ctx); err != nil {
		return nil, errors.Join(err, n.Stop())
	}
	return n, nil
}

// post asks for a checkpoint, and shows question and answer.
func post(ctx context.Context, kubelet *node.Kubelet, pod string) (string, error) {
	fmt.Printf("  POST /checkpoint/default/%s/%s\n", pod, podName)
	start := time.Now()
	paths, err := kubelet.Checkpoint(ctx, pod, podName, 0)
	var refusal *node.HTTPError
	if errors.As(err, &refusal) {
		fmt.Printf("  %d %s\n", refusal.Code, strings.TrimSpace(refusal.Body))
	}
	if err != nil {
		return "", err
	}
	fmt.Printf("  200 %q, after %s\n", paths, time.Since(start).Round(time.Millisecond))
	if len(paths) != 1 {
		return "", fmt.Errorf("got %d paths, want one", len(paths))
	}
	return paths[0], nil
}

// show runs a command in the node and shows it with its output.
func show(ctx context.Context, n *node.Node, name string, args ...string) error {
	fmt.Printf("  # %s %s\n", filepath.Base(name), strings.Join(args, " "))
	out, err := n.Output(ctx, name, args...)
	fmt.Print(indent(out))
	return err
}

func indent(text string) string {
	return "    " + strings.ReplaceAll(strings.TrimSpace(text), "\n", "\n    ") + "\n"
}

func showLog(ctx context.Context, kubelet *node.Kubelet, pod string) error {
	if err := waitPod(ctx, kubelet, pod); err != nil {
		return err
	}
	log, err := kubelet.ContainerLog(ctx, pod, podName)
	if err != nil {
		return err
	}
	fmt.Printf("  the last line of %s is: %s\n", pod, lastLine(log))
	return nil
}

// waitPod waits until the pod has a log to show.
func waitPod(ctx context.Context, kubelet *node.Kubelet, pod string) error {
	for {
		log, err := kubelet.ContainerLog(ctx, pod, podName)
		if err == nil && strings.Count(log, "\n") > 5 {
			return nil
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return err
		}
	}
}

func lastLine(text string) string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	return lines[len(lines)-1]
}

var counted = regexp.MustCompile(`count (\d+)`)

// firstGap returns where the numbers in a log do not follow one another from 1 on.
func firstGap(log string) string {
	for i, m := range counted.FindAllString(log, -1) {
		if want := fmt.Sprintf("count %d", i+1); m != want {
			return fmt.Sprintf("%q where %q was due", m, want)
		}
	}
	return ""
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}
