package node

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net/url"
	"strconv"
	"time"

	"golang.org/x/net/websocket"
)

// ExecResult is what a command that the kubelet has executed as a stream left.
type ExecResult struct {
	Stdout, Stderr string
	// Status is the end of the command as the runtime says it: a metav1.Status in JSON, with the exit code among its details.
	Status string
}

// The channels of a stream of v4.channel.k8s.io: the first byte of each message. With one forwarded port, channel 0 has its
// data and channel 1 its error.
const (
	stdoutChannel = 1
	stderrChannel = 2
	statusChannel = 3

	portDataChannel  = 0
	portErrorChannel = 1
)

// ExecStream runs a command in a pod's container as `kubectl exec` does: the kubelet passes a stream on to the runtime's own
// server, whose address it has asked for.
func (k *Kubelet) ExecStream(ctx context.Context, pod, container string, command ...string) (ExecResult, error) {
	stream, err := k.stream(ctx, "/exec/default/"+pod+"/"+container, url.Values{"command": command, "output": {"1"}, "error": {"1"}})
	if err != nil {
		return ExecResult{}, err
	}
	defer stream.Close()
	var result ExecResult
	for {
		channel, content, err := stream.receive()
		if errors.Is(err, io.EOF) {
			return result, nil
		}
		if err != nil {
			return result, fmt.Errorf("read exec: %w", err)
		}
		switch channel {
		case stdoutChannel:
			result.Stdout += content
		case stderrChannel:
			result.Stderr += content
		case statusChannel:
			result.Status += content
		}
	}
}

// Attach reads a pod's container's standard output as it comes, as `kubectl attach` does, until enough says so.
func (k *Kubelet) Attach(ctx context.Context, pod, container string, enough func(output string) bool) (string, error) {
	stream, err := k.stream(ctx, "/attach/default/"+pod+"/"+container, url.Values{"output": {"1"}})
	if err != nil {
		return "", err
	}
	defer stream.Close()
	output := ""
	for !enough(output) {
		channel, content, err := stream.receive()
		if err != nil {
			return output, fmt.Errorf("read attach: %w", err)
		}
		if channel == stdoutChannel {
			output += content
		}
	}
	return output, nil
}

// PortForward sends a message to a port of a pod, as `kubectl port-forward` does, and returns as many bytes as it has sent.
func (k *Kubelet) PortForward(ctx context.Context, pod string, port uint16, message string) (string, error) {
	stream, err := k.stream(ctx, "/portForward/default/"+pod, url.Values{"port": {strconv.Itoa(int(port))}})
	if err != nil {
		return "", err
	}
	defer stream.Close()
	if err := websocket.Message.Send(stream.Conn, append([]byte{portDataChannel}, message...)); err != nil {
		return "", fmt.Errorf("forward port: %w", err)
	}
	// The first message of each channel is the port's number.
	answer, isData := "", false
	for len(answer) < len(message) {
		channel, content, err := stream.receive()
		switch {
		case err != nil:
			return answer, fmt.Errorf("forward port: %w", err)
		case channel == portErrorChannel && content != string(binary.LittleEndian.AppendUint16(nil, port)):
			return answer, fmt.Errorf("forward port: %s", content)
		case channel == portDataChannel && isData:
			answer += content
		case channel == portDataChannel:
			isData = true
		}
	}
	return answer, nil
}

// stream is a connection of messages on channels. It is closed when its context ends.
type stream struct {
	*websocket.Conn
	forget func() bool
}

func (k *Kubelet) stream(ctx context.Context, path string, query url.Values) (*stream, error) {
	address := url.URL{Scheme: "wss", Host: kubeletAddress, Path: path, RawQuery: query.Encode()}
	config, err := websocket.NewConfig(address.String(), "https://"+kubeletAddress)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	config.Protocol = []string{"v4.channel.k8s.io"}
	conn, err := k.node.DialContext(ctx, "tcp", kubeletAddress)
	if err != nil {
		return nil, fmt.Errorf("open stream: %w", err)
	}
	forget := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
	ws, err := websocket.NewClient(config, tls.Client(conn, &tls.Config{InsecureSkipVerify: true}))
	if err != nil {
		forget()
		return nil, errors.Join(fmt.Errorf("open stream %s: %w", path, err), conn.Close())
	}
	return &stream{Conn: ws, forget: forget}, nil
}

// receive returns the next message. Its error is io.EOF where the other side has ended the stream.
func (s *stream) receive() (channel byte, content string, err error) {
	var message []byte
	if err := websocket.Message.Receive(s.Conn, &message); err != nil {
		return 0, "", err
	}
	if len(message) == 0 {
		return 0, "", errors.New("a message without a channel")
	}
	return message[0], string(message[1:]), nil
}

func (s *stream) Close() error {
	s.forget()
	return s.Conn.Close()
}
