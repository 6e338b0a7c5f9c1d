package crash

import (
	"os"
	"strings"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"crishim/test/node"
)

// disk is a file system of its own below the location.
type disk struct {
	name string
	// make makes it at $dir, by a shell in the node, and mount mounts it there again after it has broken.
	make, mount string
	// fail makes it fail, by the kernel's own doing.
	fail  func(*bed)
	code  codes.Code
	words string // in the answer, whoever has met the failure
}

// loops makes the nodes of loop devices, which a node's /dev lacks.
const loops = "for n in $(seq 0 63); do test -e /dev/loop$n || mknod /dev/loop$n b 7 $n; done; test -e /dev/loop-control || mknod /dev/loop-control c 10 237; " +
	"truncate -s 1G /data/disk; "

const ext4 = loops + "mkfs.ext4 -q -F /data/disk && mount -o loop,errors=remount-ro /data/disk $dir && rmdir $dir/lost+found && sync -f $dir"

var disks = []disk{
	{
		name: "an error, by which ext4 makes itself read-only",
		make: ext4, mount: "mount -o loop,errors=remount-ro /data/disk $dir",
		fail:  func(b *bed) { b.sh("echo 1 >/sys/fs/ext4/$(basename $(findmnt -no SOURCE $dir))/trigger_fs_error") },
		code:  codes.FailedPrecondition,
		words: "read-only file system: remount",
	},
	{
		name: "a device that is gone",
		make: ext4, mount: "mount -o loop,errors=remount-ro /data/disk $dir",
		fail:  (*bed).shutdown,
		code:  codes.Internal,
		words: "input/output error: check the disk",
	},
	{
		name:  "a quota",
		make:  loops + "mkfs.btrfs -q -f /data/disk && mount -o loop /data/disk /mnt && btrfs quota enable /mnt && btrfs -q subvolume create /mnt/s && mount --bind /mnt/s $dir",
		fail:  func(b *bed) { b.sh("btrfs qgroup limit 1M /mnt/s") },
		code:  codes.ResourceExhausted,
		words: "disk quota exceeded",
	},
}

// sh runs a command of a shell in the node, where $dir is the location's directory.
func (b *bed) sh(command string) {
	b.t.Helper()
	if out, err := b.Output(b.t.Context(), "sh", "-c", "set -e; dir="+checkpoints+"; "+command); err != nil {
		b.t.Fatalf("%s: %v: %s", command, err, out)
	}
}

// shutdown has ext4 do what it does when its device is gone: each access to it is an error from now on.
func (b *bed) shutdown() {
	b.t.Helper()
	const shutdown, noLogFlush = 0x8004587d, 2 // EXT4_IOC_SHUTDOWN and EXT4_GOING_FLAGS_NOLOGFLUSH of the kernel's fs/ext4/ext4.h
	dir, err := os.Open(b.Path(checkpoints))
	if err != nil {
		b.t.Fatal(err)
	}
	defer dir.Close()
	flags := uint32(noLogFlush)
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, dir.Fd(), shutdown, uintptr(unsafe.Pointer(&flags))); errno != 0 {
		b.t.Fatal(errno)
	}
}

// The disk fails at some step. The container goes on; what cannot be removed, the answer names, and the next start removes it.
func TestADiskThatFails(t *testing.T) {
	b := newBed(t, "failpoint")
	c := b.run(64)
	for _, disk := range disks {
		for _, step := range []node.Step{{Name: node.MidDump, Criu: true}, {Name: "memory written", Criu: true}, {Name: "dumped"}, {Name: "archive synced"}} {
			if !b.part(t, disk.name+": "+step.Name, func() { b.failAt(c, step, disk) }) {
				return
			}
		}
	}
}

func (b *bed) failAt(c subject, step node.Step, disk disk) {
	b.t.Helper()
	b.sh(disk.make + "; chmod 0700 $dir")
	defer func() { b.sh("umount $dir; if mountpoint -q /mnt; then umount /mnt; fi") }()
	ended, letGo := b.hold(c, step)
	b.sh("sync -f $dir") // of one that was over before it could be held, the archive is gone for good
	disk.fail(b)
	letGo()
	err := <-ended
	b.t.Logf("the answer: %v", err)
	there := false
	if err == nil {
		if there = b.takeArchive(); !there {
			b.t.Error("the answer is a success, and there is no archive")
		}
	} else if !strings.Contains(strings.ToLower(err.Error()), disk.words) || status.Code(err) != disk.code {
		b.t.Errorf("the answer is %v, want %s with %q", err, disk.code, disk.words)
	}
	if err == nil && (disk.mount != "" || step.Criu) {
		b.t.Error("nothing has failed")
	}
	if complaint := b.Harm(b.t, nowhere); complaint != "" {
		b.t.Error(complaint)
	}
	if disk.mount != "" && err != nil {
		if !strings.Contains(err.Error(), "clean up by hand, or restart crishim") {
			b.t.Errorf("the answer does not say that something is left: %v", err)
		}
		b.sh("umount $dir; " + disk.mount)
		b.kill(victims{daemon: true})
		b.start()
	}
	b.settled(c, time.Now(), true)
	if b.takeArchive() {
		b.t.Error("there is an archive, although the answer was a failure")
	}
}
