package relay

import (
	"bytes"
	"context"
	"io"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"
)

// FuzzRelayClientBytes feeds the relay whatever bytes from the client and then
// from the runtime: it does not panic, hang or leave a goroutine, and what comes
// out of it on either side is whole frames, with header blocks in one piece.
func FuzzRelayClientBytes(f *testing.F) {
	script := func(do func(*http2.Framer)) []byte {
		var b bytes.Buffer
		fr := http2.NewFramer(&b, nil)
		fr.AllowIllegalWrites = true
		do(fr)
		return b.Bytes()
	}
	request := func(f *http2.Framer, id uint32, path string, n int) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: compress(requestTo(path)...), EndHeaders: true})
		f.WriteData(id, true, make([]byte, n))
	}
	call := script(func(f *http2.Framer) {
		f.WriteSettingsAck()
		f.WriteWindowUpdate(0, 1<<20)
		request(f, 1, "/a", 5)
		request(f, 3, here, 5)
		f.WritePing(false, [8]byte{})
		f.WriteWindowUpdate(1, 100)
		request(f, 5, "/b", 70000/5)
		f.WriteRSTStream(5, http2.ErrCodeCancel)
	})
	answer := script(func(f *http2.Framer) {
		f.WriteSettingsAck()
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: compress(":status", "200"), EndHeaders: true})
		f.WriteDataPadded(1, false, make([]byte, 100), make([]byte, 10))
		f.WritePing(false, [8]byte{})
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: compress("grpc-status", "0"), EndStream: true})
		f.WriteContinuation(1, true, compress("grpc-message", "x"))
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1})
		f.WriteGoAway(1, http2.ErrCodeNo, []byte("bye"))
	})
	debt := script(func(f *http2.Framer) {
		f.WriteSettings(http2.Setting{ID: http2.SettingInitialWindowSize, Val: 1 << 20})
		request(f, 1, "/a", 0)
		request(f, 3, here, 16000)
	})
	full := script(func(f *http2.Framer) {
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: compress(":status", "200"), EndHeaders: true})
		for range 3 {
			f.WriteData(1, false, make([]byte, maxFrame))
		}
		f.WriteData(1, true, make([]byte, maxFrame-1))
	})
	continued := script(func(f *http2.Framer) {
		block := compress(requestTo("/a")...)
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: block[:3], PadLength: 4, Priority: http2.PriorityParam{Weight: 1}})
		f.WriteContinuation(1, false, block[3:4])
		f.WriteContinuation(1, true, block[4:])
		f.WriteHeaders(http2.HeadersFrameParam{StreamID: 1, BlockFragment: compress("a", "b"), EndStream: true, EndHeaders: true})
		f.WritePriority(1, http2.PriorityParam{})
		f.WriteRawFrame(0x42, 1, 1, []byte("?"))
	})
	f.Add(call, answer, false)
	f.Add(debt, full, false)
	f.Add(continued, answer, false)
	f.Add(call, []byte(nil), false)
	f.Add(append([]byte(http2.ClientPreface), script(func(f *http2.Framer) { f.WriteSettings() })...), answer, true)
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"), []byte("HTTP/1.1 400 Bad Request\r\n\r\n"), true)
	hello := script(func(f *http2.Framer) { f.WriteSettings() })

	f.Fuzz(func(t *testing.T, client, runtime []byte, raw bool) {
		if len(client)+len(runtime) > 1<<20 {
			return
		}
		defer time.AfterFunc(patience, func() { panic("hangs") }).Stop()
		if !raw {
			client = append(append([]byte(http2.ClientPreface), hello...), client...)
			runtime = append(bytes.Clone(hello), runtime...)
		}
		toRuntime, runtimeSide := socketPair(t)
		clientSide, accepted := socketPair(t)
		dials := make(chan net.Conn, 1)
		dials <- toRuntime
		s := New(Config{
			Hold: 5 * time.Millisecond,
			Dial: func(context.Context) (net.Conn, error) {
				select {
				case c := <-dials:
					return c, nil
				default:
					return nil, io.EOF
				}
			},
			Handlers: map[string]http.Handler{here: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				io.Copy(w, r.Body)
				w.Header().Set(http.TrailerPrefix+"Done", "1")
			})},
		})
		s.start(accepted)
		drained := make(chan error, 2)
		go func() { drained <- wholeFrames(clientSide, 0) }()
		go func() { drained <- wholeFrames(runtimeSide, len(http2.ClientPreface)) }()
		runtimeDone := make(chan struct{})
		clientWritten := make(chan struct{})
		go func() {
			defer close(runtimeDone)
			n := min(len(hello), len(runtime))
			runtimeSide.Write(runtime[:n])
			<-clientWritten
			runtimeSide.Write(runtime[n:])
			runtimeSide.Close()
		}()
		clientSide.Write(client)
		close(clientWritten)
		select {
		case <-runtimeDone:
		case <-time.After(50 * time.Millisecond): // nobody reads it: no preface, or no window
		}
		clientSide.Close()
		ctx, cancel := context.WithTimeout(context.Background(), patience/2)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Fatal(err)
		}
		toRuntime.Close()
		<-runtimeDone
		for range 2 {
			if err := <-drained; err != nil {
				t.Fatal(err)
			}
		}
	})
}

// wholeFrames reads to the end of the connection, whatever it finds.
func wholeFrames(conn net.Conn, preface int) error {
	defer io.Copy(io.Discard, conn)
	in := newFrameReader(conn)
	if _, err := in.br.Discard(preface); err != nil {
		return nil // nobody said hello
	}
	var b block
	for {
		f, err := in.next()
		if _, broken := err.(*connError); broken {
			return err
		}
		if err != nil {
			return nil
		}
		if b.id != 0 || f.is(http2.FrameHeaders) || f.is(http2.FrameContinuation) {
			if _, _, err := b.add(f); err != nil {
				return err
			}
		}
	}
}

// socketPair returns the two ends of a connection.
func socketPair(t *testing.T) (net.Conn, net.Conn) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	var conns [2]net.Conn
	for i, fd := range fds {
		file := os.NewFile(uintptr(fd), "socket")
		if conns[i], err = net.FileConn(file); err != nil {
			t.Fatal(err)
		}
		file.Close()
	}
	return conns[0], conns[1]
}
