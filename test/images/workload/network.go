package main

import (
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// network runs a workload on the network:
//
//	net server PORT          counts, and sends back whatever comes over TCP and UDP once it has written "serving"
//	net late PORT            the same, but accepts no TCP connection before SIGUSR1
//	net dial ADDRESS         sends each step over one TCP connection and expects it back
//	net clients ADDRESS RATE opens RATE connections a second, each for two exchanges, and writes their number as "connections N"
//	net pingpong             exchanges a byte with itself over loopback each millisecond, and writes "exchanges N, longest M us"
//
// All of them end with an error as soon as an exchange fails.
func network(args []string) error {
	switch {
	case len(args) == 2 && args[0] == "server":
		return server(args[1], nil)
	case len(args) == 2 && args[0] == "late":
		start := make(chan os.Signal, 1)
		signal.Notify(start, syscall.SIGUSR1)
		return server(args[1], start)
	case len(args) == 2 && args[0] == "dial":
		conn, err := net.Dial("tcp", args[1])
		if err != nil {
			return err
		}
		return count(exchanges(conn))
	case len(args) == 3 && args[0] == "clients":
		rate, err := strconv.Atoi(args[2])
		if err != nil || rate < 1 {
			return fmt.Errorf("rate %q is not a positive number of connections a second", args[2])
		}
		return clients(args[1], rate)
	case len(args) == 1 && args[0] == "pingpong":
		return pingpong()
	}
	return errors.New("usage: workload net server PORT | late PORT | dial ADDRESS | clients ADDRESS RATE | pingpong")
}

// server echoes. It accepts from the moment at which start gives something, or at once without one.
func server(port string, start <-chan os.Signal) error {
	listener, err := net.Listen("tcp", ":"+port)
	if err != nil {
		return err
	}
	packets, err := net.ListenPacket("udp", ":"+port)
	if err != nil {
		return err
	}
	failed := make(chan error, 2)
	go func() {
		if start != nil {
			<-start
		}
		for {
			conn, err := listener.Accept()
			if err != nil {
				failed <- err
				return
			}
			go func() {
				defer conn.Close()
				// The peer may end as it likes.
				_, _ = io.Copy(conn, conn)
			}()
		}
	}()
	go func() {
		for buffer := make([]byte, 1500); ; {
			n, from, err := packets.ReadFrom(buffer)
			if err == nil {
				_, err = packets.WriteTo(buffer[:n], from)
			}
			if err != nil {
				failed <- err
				return
			}
		}
	}()
	fmt.Println("serving")
	return count(func() error { return failure(failed) })
}

// failure is what a channel holds.
func failure(failed <-chan error) error {
	select {
	case err := <-failed:
		return err
	default:
		return nil
	}
}

func clients(address string, rate int) error {
	var exchanged atomic.Int64
	failed := make(chan error, 1)
	go func() {
		for range time.Tick(time.Second / time.Duration(rate)) {
			go func() {
				if err := visit(address); err != nil {
					select {
					case failed <- fmt.Errorf("after %d connections: %w", exchanged.Load(), err):
					default: // the first one says it
					}
					return
				}
				exchanged.Add(1)
			}()
		}
	}()
	return count(func() error {
		fmt.Println("connections", exchanged.Load())
		return failure(failed)
	})
}

// visit opens a connection for two exchanges. Some of them are over at once, and of some there is always one.
func visit(address string) error {
	conn, err := net.Dial("tcp", address)
	if err != nil {
		return err
	}
	defer conn.Close()
	exchange := exchanges(conn)
	if err := exchange(); err != nil {
		return err
	}
	time.Sleep(rand.N(10 * time.Millisecond))
	return exchange()
}

func pingpong() error {
	exchange, err := connect()
	if err != nil {
		return err
	}
	var done, longest atomic.Int64
	failed := make(chan error, 1)
	go func() {
		for range time.Tick(time.Millisecond) {
			start := time.Now()
			if err := exchange(); err != nil {
				failed <- err
				return
			}
			done.Add(1)
			longest.Store(max(longest.Load(), time.Since(start).Microseconds()))
		}
	}()
	return count(func() error {
		fmt.Printf("exchanges %d, longest %d us\n", done.Load(), longest.Load())
		return failure(failed)
	})
}

// exchanges returns a function that sends a byte, a different one each time, and expects it back.
func exchanges(conn net.Conn) func() error {
	var sent byte
	return func() error {
		sent++
		if _, err := conn.Write([]byte{sent}); err != nil {
			return err
		}
		var received [1]byte
		if _, err := io.ReadFull(conn, received[:]); err != nil {
			return err
		}
		if received[0] != sent {
			return fmt.Errorf("sent %d, received %d", sent, received[0])
		}
		return nil
	}
}
