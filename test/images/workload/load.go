package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"
)

// load is what the benchmarks checkpoint: workload load MEMORY PROCESSES [FILES LAYER].
//
// It holds MEMORY MiB that cannot be compressed, by itself if PROCESSES is 1 and otherwise in as many further processes that divide them
// up, and has FILES files of 1 KiB and one of LAYER MiB in the writable layer. It says "ready", and then, each time it gets SIGUSR1,
// "stall" and the longest time in microseconds that has passed between two readings of the clock since it was asked before.
func load(args []string) error {
	const usage = "usage: workload load MEMORY PROCESSES [FILES LAYER]"
	if len(args) != 2 && len(args) != 4 {
		return errors.New(usage)
	}
	var numbers [4]int
	for i, arg := range args {
		var err error
		if numbers[i], err = strconv.Atoi(arg); err != nil || numbers[i] < 0 {
			return fmt.Errorf("%q is not a number; %s", arg, usage)
		}
	}
	size, processes, files, layer := numbers[0], numbers[1], numbers[2], numbers[3]
	questions := make(chan os.Signal, 1)
	signal.Notify(questions, syscall.SIGUSR1)
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)

	if err := fillLayer(files, layer); err != nil {
		return fmt.Errorf("fill writable layer: %w", err)
	}
	if processes == 1 {
		if _, err := memory(args[0]); err != nil {
			return err
		}
	} else {
		for range processes {
			if _, err := start("memory", strconv.Itoa(size/processes), nil); err != nil {
				return err
			}
		}
	}
	var stall atomic.Int64
	go watchClock(&stall)
	fmt.Println("ready")
	for {
		select {
		case <-end:
			return nil
		case <-questions:
			fmt.Println("stall", time.Duration(stall.Swap(0)).Microseconds())
		}
	}
}

// watchClock keeps in stall the longest time between two readings of the clock. It sleeps in between, so that it takes no processor from
// what is measured: a stall is too long by up to its sleep and what the scheduler adds to that.
func watchClock(stall *atomic.Int64) {
	const pause = 500 * time.Microsecond
	for last := time.Now(); ; {
		// Straight to the kernel: what Go's own timers add is not the container's.
		_ = syscall.Nanosleep(&syscall.Timespec{Nsec: int64(pause)}, nil) // an interrupted one is a short one
		now := time.Now()
		for gap, longest := int64(now.Sub(last)), stall.Load(); gap > longest && !stall.CompareAndSwap(longest, gap); {
			longest = stall.Load()
		}
		last = now
	}
}

// fillLayer makes a number of files, 1000 to a directory, and one of size MiB.
func fillLayer(files, size int) error {
	content := make([]byte, 1<<10)
	noise(content, 17)
	for i := range files {
		dir := fmt.Sprintf("/var/load/%03d", i/1000)
		if i%1000 == 0 {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return err
			}
		}
		if err := os.WriteFile(filepath.Join(dir, strconv.Itoa(i%1000)), content, 0o644); err != nil {
			return err
		}
	}
	if size == 0 {
		return nil
	}
	file, err := os.OpenFile("/var/large", os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	part := make([]byte, megabyte)
	for i := range size {
		noise(part, byte(i))
		if _, err := file.Write(part); err != nil {
			return err
		}
	}
	return nil
}
