package node_test

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"crishim/test/node"
)

func TestContainerdRestart(t *testing.T) {
	nodes := newNodes(t)
	t.Run("node", func(t *testing.T) {
		n := nodes.start(t, node.Options{})
		client := startContainerd(t, n)
		container, err := client.RunContainer(t.Context(), node.Spec{})
		if err != nil {
			t.Fatal(err)
		}
		pid, err := container.Pid(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		for _, end := range []func(*node.Daemon) error{
			func(d *node.Daemon) error { d.Kill(); return nil },
			func(d *node.Daemon) error { return d.Stop(t.Context()) },
		} {
			if err := end(n.Daemon("containerd")); err != nil {
				t.Fatal(err)
			}
			startContainerd(t, n)
			if again, err := container.Pid(t.Context()); err != nil || again != pid {
				t.Errorf("container has process %d, %v, after a restart; had %d", again, err, pid)
			}
		}
	})
	nodes.assertGone(t)
}

func TestCommand(t *testing.T) {
	nodes := newNodes(t)
	t.Run("node", func(t *testing.T) {
		shared := t.TempDir()
		if err := os.WriteFile(filepath.Join(shared, "file"), []byte("of the host"), 0o600); err != nil {
			t.Fatal(err)
		}
		n := nodes.start(t, node.Options{Hostname: "here", Binds: []node.Bind{{Source: shared, Target: "/shared", ReadOnly: true}}})

		out, err := n.Output(t.Context(), "sh", "-c", "hostname; cat /shared/file; ls /sys/class/net")
		if err != nil || out != "here\nof the hostlo\n" {
			t.Errorf("got %q, %v", out, err)
		}
		if _, err := n.Output(t.Context(), "sh", "-c", "echo no >&2; exit 7"); err == nil || !strings.HasSuffix(err.Error(), "exit status 7: no") {
			t.Errorf("exit code and standard error: %v", err)
		}
		if _, err := n.Output(t.Context(), "touch", "/shared/new"); err == nil {
			t.Error("a read-only bind is writable")
		}

		if _, err := n.Output(t.Context(), "mkdir", "/later"); err != nil {
			t.Fatal(err)
		}
		if err := n.Bind(shared, "/later"); err != nil {
			t.Fatal(err)
		}
		if content, err := os.ReadFile(n.Path("/later/file")); err != nil || string(content) != "of the host" {
			t.Errorf("bound later: %q, %v", content, err)
		}

		ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
		defer cancel()
		if err := n.Command(ctx, "sleep", "4321").Run(); err == nil {
			t.Error("a cancelled command succeeds")
		}
		eventually(t, "the cancelled command is gone in the node", func() bool {
			out, err := n.Output(t.Context(), "sh", "-c", "pgrep -f 'sleep 4321' | wc -l")
			// pgrep's own shell matches.
			return err == nil && strings.TrimSpace(out) == "1"
		})
	})
	nodes.assertGone(t)
}

func TestNetwork(t *testing.T) {
	nodes := newNodes(t)
	t.Run("node", func(t *testing.T) {
		n := nodes.start(t, node.Options{})
		listener, err := n.Listen(t.Context(), "tcp", "127.0.0.1:8080")
		if err != nil {
			t.Fatal(err)
		}
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, "in the node") })}
		done := make(chan struct{})
		go func() {
			defer close(done)
			server.Serve(listener)
		}()
		defer func() {
			server.Close()
			<-done
		}()
		client := http.Client{Transport: &http.Transport{DialContext: n.DialContext, DisableKeepAlives: true}}
		response, err := client.Get("http://127.0.0.1:8080/")
		if err != nil {
			t.Fatal(err)
		}
		defer response.Body.Close()
		if body, err := io.ReadAll(response.Body); err != nil || string(body) != "in the node" {
			t.Errorf("got %q, %v", body, err)
		}
		if _, err := http.Get("http://127.0.0.1:8080/"); err == nil {
			t.Error("the node's network is that of the host")
		}
		if _, err := n.DialContext(t.Context(), "tcp", "localhost:8080"); err == nil {
			t.Error("a name is resolved")
		}
	})
	nodes.assertGone(t)
}
