package main

import (
	"crypto/sha256"
	"encoding/binary"
	"os"
	"os/signal"
	"syscall"
)

const (
	pairFile = "/var/pair"
	pairPage = 4096
)

// pair counts as fast as it can, in memory and in a file by turns: into the first word of a page, into the file, into the
// second word. At no moment is the file further than the first word, nor behind the second, and they are never more than one
// apart. All numbers are 64 bits, little endian. The page can be found in a dump: it begins with the SHA-256 of this command's
// name, and the words follow at 32 and 40.
func pair(args []string) error {
	page, err := syscall.Mmap(-1, 0, pairPage, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_ANON|syscall.MAP_PRIVATE)
	if err != nil {
		return err
	}
	magic := sha256.Sum256([]byte("pair"))
	copy(page, magic[:])
	before, after := page[32:40], page[40:48]
	file, err := os.OpenFile(pairFile, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o644)
	if err != nil {
		return err
	}
	defer file.Close()
	write := func(number []byte) error {
		_, err := file.WriteAt(number, 0)
		return err
	}
	if len(args) == 1 && args[0] == "mapped" {
		if err := file.Truncate(pairPage); err != nil {
			return err
		}
		mapped, err := syscall.Mmap(int(file.Fd()), 0, pairPage, syscall.PROT_READ|syscall.PROT_WRITE, syscall.MAP_SHARED)
		if err != nil {
			return err
		}
		write = func(number []byte) error {
			copy(mapped, number)
			return nil
		}
	}
	end := make(chan os.Signal, 1)
	signal.Notify(end, syscall.SIGTERM)
	for n := uint64(1); ; n++ {
		select {
		case <-end:
			return nil
		default:
		}
		binary.LittleEndian.PutUint64(before, n)
		// A copy: the file must not get what is in the page by then.
		var number [8]byte
		binary.LittleEndian.PutUint64(number[:], n)
		if err := write(number[:]); err != nil {
			return err
		}
		binary.LittleEndian.PutUint64(after, n)
		if n == 1 {
			os.Stdout.WriteString("count 1\n")
		}
	}
}
