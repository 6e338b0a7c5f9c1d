package restore

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// terminal is the far end of a container's terminal. The runtime hands it over when it has restored the container: the
// descriptor of the pseudoterminal's master, as a message to a unix socket that the runtime was given.
type terminal struct {
	listener *net.UnixListener
	done     chan struct{} // closed when nothing more is read

	mu      sync.Mutex
	master  *os.File // nil until it is there
	written bytes.Buffer
	err     error
}

func listenForTerminal(path string) (*terminal, error) {
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen for terminal: %w", err)
	}
	t := &terminal{listener: listener, done: make(chan struct{})}
	go func() {
		defer close(t.done)
		if err := t.read(); err != nil {
			t.mu.Lock()
			defer t.mu.Unlock()
			t.err = err
		}
	}()
	return t, nil
}

// read takes the master and reads what is written to the terminal, until its last user has closed it or it is closed here.
func (t *terminal) read() error {
	conn, err := t.listener.AcceptUnix()
	if err != nil {
		return err
	}
	defer conn.Close()
	name, control := make([]byte, 4096), make([]byte, unix.CmsgSpace(4))
	_, size, _, _, err := conn.ReadMsgUnix(name, control)
	if err != nil {
		return err
	}
	messages, err := unix.ParseSocketControlMessage(control[:size])
	if err != nil {
		return err
	}
	if len(messages) != 1 {
		return fmt.Errorf("got %d control messages, want one with a descriptor", len(messages))
	}
	fds, err := unix.ParseUnixRights(&messages[0])
	if err != nil {
		return err
	}
	// Only then does closing it end a read.
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return err
	}
	master := os.NewFile(uintptr(fds[0]), "terminal")
	t.mu.Lock()
	t.master = master
	t.mu.Unlock()
	for buffer := make([]byte, 32<<10); ; {
		n, err := master.Read(buffer)
		t.mu.Lock()
		t.written.Write(buffer[:n])
		t.mu.Unlock()
		if err != nil {
			return err
		}
	}
}

func (t *terminal) output() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.written.String()
}

func (t *terminal) input(text string) error {
	t.mu.Lock()
	master, err := t.master, t.err
	t.mu.Unlock()
	if master == nil {
		return errors.Join(errors.New("the runtime has not handed over the terminal"), err)
	}
	_, err = master.WriteString(text)
	return err
}

// close ends the reading and waits for it.
func (t *terminal) close() error {
	err := t.listener.Close()
	t.mu.Lock()
	if t.master != nil {
		err = errors.Join(err, t.master.Close())
	}
	t.mu.Unlock()
	<-t.done
	return err
}
