// Command workload is what the containers of the tests run: programs whose state can be seen from outside, so that a
// checkpoint can be compared with it.
//
//	workload count         increments a number in memory every 100 ms
//	workload memory SIZE   does the same beside SIZE MiB of incompressible memory, and keeps verifying them
//	workload tcp           does the same and sends each step over a TCP connection with itself
//	workload hold KIND…    sets up what the kinds name, and tells their state whenever it gets SIGUSR1
//	workload limit KIND    sets up what CRIU cannot dump, see limits.go
//	workload pair          counts as fast as it can, in memory and in a file in step
//	workload load …        holds what the benchmarks checkpoint, see load.go
//	workload list DIR      lists what the kind tree makes a digest of
//
// The number is written to standard output, as lines "count N", and then into the file /var/count: memory, log and
// writable layer of one moment agree within one step.
package main

import (
	"errors"
	"fmt"
	"hash/crc64"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"syscall"
	"time"
)

const (
	step      = 100 * time.Millisecond
	countFile = "/var/count"
	block     = 1 << 20
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "workload:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	commands := map[string]func(args []string) error{
		"count":  func([]string) error { return count(func() error { return nil }) },
		"memory": countMemory,
		"tcp":    countTCP,
		"net":    network, // network.go
		"hold":   hold,
		"limit":  limit, // limits.go
		"load":   load,  // load.go
		"list":   list,
		"pair":   pair, // pair.go
		"part":   part, // what hold starts, see there
	}
	if len(args) == 0 || commands[args[0]] == nil {
		return fmt.Errorf("usage: workload COMMAND [ARGUMENT…]; commands are %q", slices.Sorted(maps.Keys(commands)))
	}
	return commands[args[0]](args[1:])
}

func countMemory(args []string) error {
	if len(args) != 1 {
		return errors.New("usage: workload memory SIZE")
	}
	size, err := strconv.Atoi(args[0])
	if err != nil || size < 1 {
		return fmt.Errorf("size %q is not a positive number of MiB", args[0])
	}
	verify, err := fill(size)
	if err != nil {
		return err
	}
	return count(verify)
}

func countTCP([]string) error {
	echo, err := connect()
	if err != nil {
		return err
	}
	return count(echo)
}

// count runs until SIGTERM, and calls check once a step.
func count(check func() error) error {
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	ticks := time.Tick(step)
	for n := 1; ; n++ {
		select {
		case <-end:
			return nil
		case <-ticks:
		}
		fmt.Println("count", n)
		if err := save(n); err != nil {
			return err
		}
		if err := check(); err != nil {
			return err
		}
	}
}

// save writes the number to its file. No moment has another file than the one of n or of n-1: numbers never get shorter,
// and one write replaces one by the next.
func save(n int) error {
	file, err := os.OpenFile(countFile, os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	_, err = file.WriteString(strconv.Itoa(n) + "\n")
	return err
}

// fill takes size MiB and returns a function that verifies a few blocks of them at each call.
func fill(size int) (verify func() error, err error) {
	// Outside of Go's heap: what is here stays where it is and is never copied.
	memory, err := syscall.Mmap(-1, 0, size*block, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, fmt.Errorf("map %d MiB: %w", size, err)
	}
	table := crc64.MakeTable(crc64.ECMA)
	sums := make([]uint64, size)
	random := rand.NewChaCha8([32]byte{})
	for i := range sums {
		part := memory[i*block : (i+1)*block]
		random.Read(part)
		sums[i] = crc64.Checksum(part, table)
	}
	fmt.Printf("filled %d MiB\n", size)
	next := 0
	return func() error {
		for range min(4, size) {
			if crc64.Checksum(memory[next*block:(next+1)*block], table) != sums[next] {
				return fmt.Errorf("block %d of memory has changed", next)
			}
			next = (next + 1) % size
		}
		return nil
	}, nil
}

// connect opens a TCP connection from this process to itself, and returns a function that sends a byte over it and expects it
// at the other end.
func connect() (echo func() error, err error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	client, err := net.Dial("tcp", listener.Addr().String())
	if err != nil {
		return nil, err
	}
	server, err := listener.Accept()
	if err != nil {
		return nil, err
	}
	var sent byte
	return func() error {
		sent++
		if _, err := client.Write([]byte{sent}); err != nil {
			return err
		}
		var received [1]byte
		if _, err := server.Read(received[:]); err != nil {
			return err
		}
		if received[0] != sent {
			return fmt.Errorf("sent %d, received %d", sent, received[0])
		}
		return nil
	}, nil
}
