package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"crishim/test/node"
	"crishim/test/restore"
)

func runContainer(t *testing.T, client *node.Client, spec node.Spec) *node.Container {
	t.Helper()
	c, err := client.RunContainer(t.Context(), spec)
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, c.Log)
	return c
}

// address is that of a container's pod.
func address(t *testing.T, c *node.Container) string {
	t.Helper()
	address, err := c.Address(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return address
}

// exchange sends something over a connection and expects it back.
func exchange(conn net.Conn, something string) error {
	if _, err := conn.Write([]byte(something)); err != nil {
		return err
	}
	answer := make([]byte, len(something))
	if _, err := io.ReadFull(conn, answer); err != nil {
		return err
	}
	if string(answer) != something {
		return fmt.Errorf("sent %q, received %q", something, answer)
	}
	return nil
}

// exchangeOn exchanges numbers over a connection until stop is called, which returns how many have come back, and what went wrong.
func exchangeOn(conn net.Conn) (stop func() (int, error)) {
	ctx, cancel := context.WithCancel(context.Background())
	type result struct {
		done int
		err  error
	}
	ended := make(chan result, 1)
	go func() {
		var r result
		for ctx.Err() == nil && r.err == nil {
			if r.err = exchange(conn, fmt.Sprintf("number %d\n", r.done)); r.err == nil {
				r.done++
			}
		}
		ended <- r
	}()
	return func() (int, error) { cancel(); r := <-ended; return r.done, r.err }
}

// What is connected with a container stays so, whoever has opened the connection, and its peers see nothing but a delay.
func TestConnectionsSurvive(t *testing.T) {
	n, _ := start(t, node.Options{})
	client := dial(t, n)
	server := runContainer(t, client, node.Spec{Name: "server", Command: []string{"/bin/workload", "net", "server", "8080"}})
	at := address(t, server) + ":8080"
	connect := func(t *testing.T, network, at string) net.Conn {
		t.Helper()
		conn, err := n.DialContext(t.Context(), network, at)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { conn.Close() })
		// What is lost is an error then, and not a test that hangs.
		if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
			t.Fatal(err)
		}
		return conn
	}

	t.Run("UDP, and TCP that is listened to", func(t *testing.T) {
		udp := connect(t, "udp", at)
		stop := exchangeOn(udp)
		if err := take(t, client, server.ID); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(n.Path(archived))
		// No lock is needed, so no datagram is lost.
		if done, err := stop(); err != nil || done == 0 {
			t.Errorf("%d exchanges, then %v", done, err)
		}
		if got := streams(t, n.Path(archived)); got != 0 {
			t.Errorf("the archive has %d connections, want none", got)
		}
	})
	t.Run("TCP from outside", func(t *testing.T) {
		conn := connect(t, "tcp", at)
		stop := exchangeOn(conn)
		if err := take(t, client, server.ID); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(n.Path(archived))
		if err := exchange(connect(t, "udp", at), "hello"); err != nil {
			t.Error(err)
		}
		if done, err := stop(); err != nil || done == 0 {
			t.Errorf("%d exchanges, then %v", done, err)
		}
		if err := exchange(conn, "still there"); err != nil {
			t.Error(err)
		}
		if got := streams(t, n.Path(archived)); got != 1 {
			t.Errorf("the archive has %d connections, want 1", got)
		}
	})
	t.Run("TCP from inside", func(t *testing.T) {
		listener, err := n.Listen(t.Context(), "tcp", bridge+":0")
		if err != nil {
			t.Fatal(err)
		}
		defer listener.Close()
		served := make(chan error, 1)
		go func() {
			conn, err := listener.Accept()
			if err == nil {
				_, err = io.Copy(conn, conn)
				err = errors.Join(err, conn.Close())
			}
			served <- err
		}()
		dialler := runContainer(t, client, node.Spec{Name: "dialler", Command: []string{"/bin/workload", "net", "dial", listener.Addr().String()}})
		if err := take(t, client, dialler.ID); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(n.Path(archived))
		node.WaitMore(t, dialler.Log) // it ends when an exchange fails
		select {
		case err := <-served:
			t.Errorf("the connection has ended: %v", err)
		default:
		}
		if got := streams(t, n.Path(archived)); got != 1 {
			t.Errorf("the archive has %d connections, want 1", got)
		}
	})
	t.Run("TCP that is not accepted yet", func(t *testing.T) {
		late := runContainer(t, client, node.Spec{Name: "late", Command: []string{"/bin/workload", "net", "late", "8080"}})
		conn := connect(t, "tcp", address(t, late)+":8080")
		ended := make(chan error, 1)
		go func() { ended <- exchange(conn, "early") }()
		if err := take(t, client, late.ID); err != nil {
			t.Fatal(err)
		}
		defer os.Remove(n.Path(archived))
		if _, err := late.Exec(t.Context(), "kill", "-USR1", "1"); err != nil {
			t.Fatal(err)
		}
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if got := streams(t, n.Path(archived)); got != 0 {
			t.Errorf("the archive has %d connections, want none", got)
		}
	})
}

// bridge is the node's own address in the network of its pods.
const bridge = "10.88.0.1"

// A server to which connections come and go all the time: whatever state they are in, every checkpoint succeeds, every client is
// served, and what is restored listens.
func TestAServerUnderConnections(t *testing.T) {
	for _, test := range []struct {
		handler string
		options node.Options
	}{
		{"runc", node.Options{}},
		{"crun", node.Options{CgroupV2: true}},
	} {
		t.Run(test.handler, func(t *testing.T) { serverUnderConnections(t, test.handler, test.options) })
	}
}

func serverUnderConnections(t *testing.T, handler string, options node.Options) {
	n, _ := start(t, options)
	client := dial(t, n)
	server := runContainer(t, client, node.Spec{Name: "server", Handler: handler, Command: []string{"/bin/workload", "net", "server", "8080"}})
	clients := runContainer(t, client, node.Spec{Name: "clients", Command: []string{
		"/bin/workload", "net", "clients", address(t, server) + ":8080", "200"}})
	const times = 50
	with := 0 // of them, the checkpoints with connections
	for i := range times {
		if err := os.RemoveAll(n.Path(archived)); err != nil {
			t.Fatal(err)
		}
		if err := take(t, client, server.ID); err != nil {
			t.Fatalf("checkpoint %d: %v", i+1, err)
		}
		if streams(t, n.Path(archived)) > 0 {
			with++
		}
	}
	node.WaitMore(t, clients.Log) // it ends when an exchange fails
	node.WaitMore(t, server.Log)
	t.Logf("%d connections; %d of %d checkpoints have some", connections(t, clients), with, times)
	if with == 0 {
		t.Error("no checkpoint has met a connection")
	}

	options.Hostname = "second"
	second := node.StartContainerdFor(t, options)
	// The clients are not there, nor is the server's address. (Only a newer crun reads /etc/criu/crun.conf or runc.conf.)
	if err := os.MkdirAll(second.Path("/etc/criu"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(second.Path("/etc/criu/default.conf"), []byte("tcp-close\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	archive, err := os.Open(n.Path(archived))
	if err != nil {
		t.Fatal(err)
	}
	defer archive.Close()
	restored, err := restore.Archive(t.Context(), restore.Machine{Command: second.Command, Path: second.Path}, archive, node.WorkloadImage)
	if err != nil {
		t.Fatal(err)
	}
	node.WaitCount(t, 0, restored.Output)
	answer, err := second.Output(t.Context(), "sh", "-ec",
		`nsenter --net=/var/lib/`+restored.ID+`/netns sh -c 'echo hello | busybox nc 127.0.0.1 8080'`)
	if err != nil || strings.TrimSpace(answer) != "hello" {
		t.Errorf("the restored server answers %q, %v", answer, err)
	}
	if err := restored.Remove(t.Context()); err != nil {
		t.Error(err)
	}
}

var connected = regexp.MustCompile(`connections (\d+)\n`)

// connections is how many a container with clients has had served.
func connections(t *testing.T, clients *node.Container) int {
	t.Helper()
	text, err := clients.Log()
	if err != nil {
		t.Fatal(err)
	}
	all := connected.FindAllStringSubmatch(text, -1)
	if len(all) == 0 {
		return 0
	}
	last, _ := strconv.Atoi(all[len(all)-1][1]) // digits
	return last
}
