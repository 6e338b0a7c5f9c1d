package main

import (
	"bufio"
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	megabyte = 1 << 20
	readable = syscall.PROT_READ | syscall.PROT_WRITE
)

// noise fills memory with bytes that cannot be compressed, the same for the same seed.
func noise(memory []byte, seed byte) {
	rand.NewChaCha8([32]byte{seed}).Read(memory)
}

func sum(content []byte) string {
	return fmt.Sprintf("%d bytes, sum %08x", len(content), crc32.Checksum(content, crc32.MakeTable(crc32.Castagnoli)))
}

// memory is private memory of ARGUMENT MiB.
func memory(argument string) (func() (string, error), error) {
	size, err := strconv.Atoi(argument)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(-1, 0, size*megabyte, readable, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	noise(memory, 1)
	return func() (string, error) { return sum(memory), nil }, nil
}

// swapped is private memory of ARGUMENT MiB that is not in memory, but swapped out.
func swapped(argument string) (func() (string, error), error) {
	size, err := strconv.Atoi(argument)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(-1, 0, size*megabyte, readable, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return nil, err
	}
	noise(memory, 16)
	const pageOut = 21
	swap := func() (map[string]string, error) {
		if err := syscall.Madvise(memory, pageOut); err != nil {
			return nil, fmt.Errorf("swap out: %w", err)
		}
		return mappingOf(memory)
	}
	mapping, err := swap()
	if err != nil {
		return nil, err
	}
	if mapping["Swap"] == "0 kB" {
		return nil, errors.New("nothing was swapped out")
	}
	return func() (string, error) {
		state := sum(memory)
		_, err := swap() // to look at it has brought it back
		return state, err
	}, nil
}

// hugetlb is memory in ARGUMENT huge pages of 2 MiB.
func hugetlb(argument string) (func() (string, error), error) {
	pages, err := strconv.Atoi(argument)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(-1, 0, pages*2*megabyte, readable, syscall.MAP_ANON|syscall.MAP_PRIVATE|syscall.MAP_HUGETLB)
	if err != nil {
		return nil, fmt.Errorf("map huge pages: %w", err)
	}
	noise(memory, 2)
	return func() (string, error) {
		mapping, err := mappingOf(memory)
		return fmt.Sprintf("%s, page size %s", sum(memory), mapping["KernelPageSize"]), err
	}, nil
}

// makeFile makes a new file of a MiB.
func makeFile(name string, seed byte) (*os.File, []byte, error) {
	content := make([]byte, megabyte)
	noise(content, seed)
	file, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return nil, nil, err
	}
	_, err = file.Write(content)
	return file, content, err
}

// mappedPrivate is a file that is mapped for private changes; half of its pages have some.
func mappedPrivate(string) (func() (string, error), error) {
	const name = "/var/mapped-private"
	file, _, err := makeFile(name, 3)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(int(file.Fd()), 0, megabyte, readable, syscall.MAP_PRIVATE)
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	for page := 0; page < megabyte; page += 2 * os.Getpagesize() {
		memory[page]++
	}
	return func() (string, error) {
		mapping, err := mappingOf(memory)
		if err != nil {
			return "", err
		}
		content, err := os.ReadFile(name)
		return fmt.Sprintf("%s %s: %s; the file: %s", mapping["permissions"], mapping["file"], sum(memory), sum(content)), err
	}, nil
}

// mappedShared is a file in the directory ARGUMENT, or in /var, that is mapped for changes that go into it.
func mappedShared(argument string) (func() (string, error), error) {
	name := filepath.Join(cmp.Or(argument, "/var"), "mapped-shared")
	file, _, err := makeFile(name, 4)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(int(file.Fd()), 0, megabyte, readable, syscall.MAP_SHARED)
	if err := errors.Join(err, file.Close()); err != nil {
		return nil, err
	}
	noise(memory, 5)
	return func() (string, error) {
		mapping, err := mappingOf(memory)
		if err != nil {
			return "", err
		}
		content, err := os.ReadFile(name)
		if err != nil {
			return "", err
		}
		if !bytes.Equal(content, memory) {
			return "", fmt.Errorf("the file is %s, its mapping %s", sum(content), sum(memory))
		}
		// Whether it still is the file: a change of the one is a change of the other.
		return fmt.Sprintf("%s %s: %s; %s", mapping["permissions"], mapping["file"], sum(memory), coherent(memory, name)), nil
	}, nil
}

// coherent says whether memory is what is in the file, by changing it and changing it back.
func coherent(memory []byte, name string) string {
	memory[7] ^= 0xff
	content, err := os.ReadFile(name)
	memory[7] ^= 0xff
	if err != nil {
		return err.Error()
	}
	if content[7] == memory[7] {
		return "not coherent"
	}
	return "coherent"
}

// memfd is a sealed file that has no name, and a mapping of it.
func memfd(string) (func() (string, error), error) {
	const (
		allowSealing        = 2
		addSeals, getSeals  = 1033, 1034
		sealShrink, sealNew = 2, 4
	)
	fd, err := createMemfd("held", allowSealing)
	if err != nil {
		return nil, err
	}
	if err := syscall.Ftruncate(fd, megabyte); err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(fd, 0, megabyte, readable, syscall.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	noise(memory, 6)
	if _, err := fcntl(fd, addSeals, sealShrink|sealNew); err != nil {
		return nil, fmt.Errorf("seal: %w", err)
	}
	return func() (string, error) {
		link, err := os.Readlink(fdPath(fd))
		if err != nil {
			return "", err
		}
		seals, err := fcntl(fd, getSeals, 0)
		if err != nil {
			return "", fmt.Errorf("get seals: %w", err)
		}
		content := make([]byte, megabyte)
		if _, err := syscall.Pread(fd, content, 0); err != nil {
			return "", err
		}
		return fmt.Sprintf("%s, seals %d, %s, %s", link, seals, sum(content), coherent(memory, fdPath(fd))), nil
	}, nil
}

func createMemfd(name string, flags uintptr) (int, error) {
	cName, err := syscall.BytePtrFromString(name)
	if err != nil {
		return 0, err
	}
	fd, _, errno := syscall.Syscall(sysMemfdCreate, uintptr(unsafe.Pointer(cName)), flags, 0)
	if errno != 0 {
		return 0, fmt.Errorf("memfd_create: %w", errno)
	}
	return int(fd), nil
}

// protections are those that memory can have; one is locked, of another the kernel was told that children do not get it.
func protections(string) (func() (string, error), error) {
	var held [][]byte
	for _, protection := range []int{
		syscall.PROT_NONE, syscall.PROT_READ, readable, syscall.PROT_READ | syscall.PROT_EXEC, readable | syscall.PROT_EXEC,
	} {
		memory, err := syscall.Mmap(-1, 0, 64<<10, readable, syscall.MAP_ANON|syscall.MAP_PRIVATE)
		if err != nil {
			return nil, err
		}
		noise(memory, 7)
		if err := syscall.Mprotect(memory, protection); err != nil {
			return nil, err
		}
		held = append(held, memory)
	}
	if err := syscall.Mlock(held[2]); err != nil {
		return nil, fmt.Errorf("lock memory: %w", err)
	}
	if err := syscall.Madvise(held[1], syscall.MADV_DONTFORK); err != nil {
		return nil, fmt.Errorf("advise: %w", err)
	}
	return func() (string, error) {
		var states []string
		for i, memory := range held {
			mapping, err := mappingOf(memory)
			if err != nil {
				return "", err
			}
			// What the kernel adds or drops by itself: soft-dirty, and what was touched or merged since.
			flags := slices.DeleteFunc(strings.Fields(mapping["VmFlags"]), func(flag string) bool { return flag == "sd" || flag == "??" })
			state := fmt.Sprintf("%s (%s)", mapping["permissions"], strings.Join(flags, " "))
			if i > 0 {
				state += " " + sum(memory)
			}
			states = append(states, state)
		}
		return strings.Join(states, "; "), nil
	}, nil
}

// mappingOf is what /proc/self/smaps says of memory, with the keys permissions and file for its first line.
func mappingOf(memory []byte) (map[string]string, error) {
	file, err := os.Open("/proc/self/smaps")
	if err != nil {
		return nil, err
	}
	defer file.Close()
	address := uint64(uintptr(unsafe.Pointer(unsafe.SliceData(memory))))
	var mapping map[string]string
	for lines := bufio.NewScanner(file); lines.Scan(); {
		fields := strings.Fields(lines.Text())
		key, isValue := strings.CutSuffix(fields[0], ":")
		switch {
		case isValue && mapping != nil:
			mapping[key] = strings.Join(fields[1:], " ")
		case isValue:
		case mapping != nil:
			return mapping, nil
		default:
			from, to, _ := strings.Cut(fields[0], "-")
			low, err := strconv.ParseUint(from, 16, 64)
			if err != nil {
				return nil, err
			}
			high, err := strconv.ParseUint(to, 16, 64)
			if err != nil {
				return nil, err
			}
			if low <= address && address < high {
				mapping = map[string]string{"permissions": fields[1], "file": strings.Join(fields[5:], " ")}
			}
		}
	}
	if mapping == nil {
		return nil, fmt.Errorf("no mapping at %x", address)
	}
	return mapping, nil
}

// sharedMemory is a memory file that three processes have mapped: each sees what the others write.
func sharedMemory(string) (func() (string, error), error) {
	fd, err := createMemfd("shared", 0)
	if err != nil {
		return nil, err
	}
	if err := syscall.Ftruncate(fd, megabyte); err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(fd, 0, megabyte, readable, syscall.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	noise(memory[4096:], 8)
	var others []*process
	for i := range 2 {
		p, err := start("shared", strconv.Itoa(i+1), nil, fd)
		if err != nil {
			return nil, err
		}
		others = append(others, p)
	}
	// From here on the mappings are what keeps it.
	if err := syscall.Close(fd); err != nil {
		return nil, err
	}
	round := uint64(0)
	return func() (string, error) {
		round++
		binary.NativeEndian.PutUint64(memory, round)
		for i, p := range others {
			answer, err := p.state()
			if err != nil {
				return "", err
			}
			if want := fmt.Sprintf("%d %s", round, sum(memory[4096:])); answer != want {
				return "", fmt.Errorf("process %d sees %s, want %s", i+1, answer, want)
			}
			if got := binary.NativeEndian.Uint64(memory[8*(i+1):]); got != round {
				return "", fmt.Errorf("process %d wrote %d, got %d", i+1, round, got)
			}
		}
		return "shared by three: " + sum(memory[4096:]), nil
	}, nil
}

// sharedPart writes what it reads in the first slot into that of its own.
func sharedPart(argument string) (func() (string, error), error) {
	slot, err := strconv.Atoi(argument)
	if err != nil {
		return nil, err
	}
	memory, err := syscall.Mmap(3, 0, megabyte, readable, syscall.MAP_SHARED)
	if err := errors.Join(err, syscall.Close(3)); err != nil {
		return nil, err
	}
	return func() (string, error) {
		seen := binary.NativeEndian.Uint64(memory)
		binary.NativeEndian.PutUint64(memory[8*slot:], seen)
		return fmt.Sprintf("%d %s", seen, sum(memory[4096:])), nil
	}, nil
}

// sysv is shared memory, a semaphore and a queue of System V, in the pod's IPC namespace.
func sysv(string) (func() (string, error), error) {
	const (
		create    = 0o1000 | 0o600
		key       = 0x4711
		setValue  = 16 // of a semaphore
		getValue  = 12
		look      = 0o40000 | 0o4000 // MSG_COPY and IPC_NOWAIT
		attachRDM = 0
	)
	shm, err := newFd(syscall.SYS_SHMGET, key, megabyte, create, 0)
	if err != nil {
		return nil, fmt.Errorf("make shared memory: %w", err)
	}
	address, _, errno := syscall.Syscall(syscall.SYS_SHMAT, uintptr(shm), 0, attachRDM)
	if errno != 0 {
		return nil, fmt.Errorf("attach shared memory: %w", errno)
	}
	// The kernel chose the address: nothing of Go's is there.
	memory := unsafe.Slice((*byte)(*(*unsafe.Pointer)(unsafe.Pointer(&address))), megabyte)
	noise(memory, 13)
	sem, err := newFd(syscall.SYS_SEMGET, key, 2, create, 0)
	if err != nil {
		return nil, fmt.Errorf("make semaphores: %w", err)
	}
	for i := range uintptr(2) {
		if _, err := newFd(syscall.SYS_SEMCTL, uintptr(sem), i, setValue, 5+i); err != nil {
			return nil, fmt.Errorf("set semaphore: %w", err)
		}
	}
	queue, err := newFd(syscall.SYS_MSGGET, key, create, 0, 0)
	if err != nil {
		return nil, fmt.Errorf("make queue: %w", err)
	}
	type message struct {
		kind int64
		text [32]byte
	}
	for i := range 2 {
		m := message{kind: int64(3 + i)}
		copy(m.text[:], fmt.Sprintf("message %d", i))
		if _, err := newFd(syscall.SYS_MSGSND, uintptr(queue), uintptr(unsafe.Pointer(&m)), uintptr(len(m.text)), 0); err != nil {
			return nil, fmt.Errorf("send: %w", err)
		}
	}
	return func() (string, error) {
		states := []string{fmt.Sprintf("shared memory %d: %s", shm, sum(memory))}
		again, err := newFd(syscall.SYS_SHMGET, key, megabyte, 0, 0)
		if err != nil || again != shm {
			return "", fmt.Errorf("shared memory is %d by its key, %w", again, err)
		}
		for i := range uintptr(2) {
			value, err := newFd(syscall.SYS_SEMCTL, uintptr(sem), i, getValue, 0)
			if err != nil {
				return "", fmt.Errorf("get semaphore: %w", err)
			}
			states = append(states, fmt.Sprintf("semaphore %d: %d", i, value))
		}
		for i := range uintptr(2) {
			var m message
			_, _, errno := syscall.Syscall6(syscall.SYS_MSGRCV, uintptr(queue), uintptr(unsafe.Pointer(&m)), uintptr(len(m.text)), i, look, 0)
			if errno != 0 {
				return "", fmt.Errorf("look into queue: %w", errno)
			}
			states = append(states, fmt.Sprintf("message of type %d: %s", m.kind, strings.TrimRight(string(m.text[:]), "\x00")))
		}
		return strings.Join(states, ", "), nil
	}, nil
}
