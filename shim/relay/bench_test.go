package relay

import (
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"

	"google.golang.org/grpc"
)

// The benchmarks compare a call made directly with one through a byte copy,
// which is the least that any proxy costs, and one through the relay.

func BenchmarkUnary1KiB(b *testing.B) {
	benchmark(b, func(b *testing.B, c *grpc.ClientConn) {
		msg := make([]byte, 1024)
		for b.Loop() {
			if _, err := call(b.Context(), c, "/x.Y/Z", msg); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkUnary1KiB16Callers(b *testing.B) {
	benchmark(b, func(b *testing.B, c *grpc.ClientConn) {
		b.SetParallelism(8)
		b.RunParallel(func(pb *testing.PB) {
			msg := make([]byte, 1024)
			for pb.Next() {
				if _, err := call(b.Context(), c, "/x.Y/Z", msg); err != nil {
					b.Error(err)
					return
				}
			}
		})
	})
}

func BenchmarkList1MiB(b *testing.B) {
	benchmark(b, func(b *testing.B, c *grpc.ClientConn) {
		for b.Loop() {
			if _, err := call(b.Context(), c, "/x.Y/List", nil); err != nil {
				b.Fatal(err)
			}
		}
	})
}

func BenchmarkEvents20000(b *testing.B) {
	benchmark(b, func(b *testing.B, c *grpc.ClientConn) {
		for b.Loop() {
			s, err := c.NewStream(b.Context(), &grpc.StreamDesc{ServerStreams: true}, "/x.Y/Events")
			if err != nil {
				b.Fatal(err)
			}
			s.SendMsg(&[]byte{})
			s.CloseSend()
			for n := 0; ; n++ {
				if err := s.RecvMsg(&[]byte{}); err == io.EOF && n == 20000 {
					break
				} else if err != nil {
					b.Fatal(err)
				}
			}
		}
	})
}

func benchmark(b *testing.B, run func(*testing.B, *grpc.ClientConn)) {
	list, event := make([]byte, 1<<20), make([]byte, 100)
	fake := newFakeRuntime(b, func(s grpc.ServerStream) error {
		var m []byte
		if err := s.RecvMsg(&m); err != nil {
			return err
		}
		switch method, _ := grpc.MethodFromServerStream(s); method {
		case "/x.Y/List":
			m = list
		case "/x.Y/Events":
			for range 20000 {
				if err := s.SendMsg(&event); err != nil {
					return err
				}
			}
			return nil
		}
		return s.SendMsg(&m)
	})
	relay := newTestRelay(b, Config{Dial: fake.dial})
	for _, way := range []struct{ name, socket string }{
		{"direct", fake.socket}, {"bytecopy", byteCopy(b, fake)}, {"relay", relay.socket},
	} {
		b.Run(way.name, func(b *testing.B) { run(b, connect(b, way.socket)) })
	}
}

// byteCopy is a proxy that knows nothing of HTTP/2.
func byteCopy(b *testing.B, fake *fakeRuntime) string {
	socket := filepath.Join(b.TempDir(), "copy.sock")
	l, err := net.Listen("unix", socket)
	if err != nil {
		b.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			runtime, err := fake.dial(b.Context())
			if err != nil {
				b.Error(err)
				return
			}
			pass := func(to, from net.Conn) {
				// The plain loop, without what io.Copy asks of the kernel.
				io.CopyBuffer(struct{ io.Writer }{to}, struct{ io.Reader }{from}, make([]byte, readBuffer))
				to.Close()
				from.Close()
			}
			wg.Go(func() { pass(runtime, client) })
			wg.Go(func() { pass(client, runtime) })
		}
	})
	b.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
	return socket
}
