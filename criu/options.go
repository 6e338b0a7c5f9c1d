package criu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/checkpoint-restore/go-criu/v7/rpc"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"
)

type networkMode int

const (
	// skipNetworkLock never comes with TcpEstablished: criu would dump an accepted connection unlocked, without a word.
	skipNetworkLock networkMode = iota
	lockNetwork                 // by the method that this criu was built for: iptables, unless its builder chose another
	lockNetworkByNftables
)

// skipSince is the version of CRIU that first had a way not to lock the network, as MinVersion. An older one fails when it is asked to.
// See https://github.com/checkpoint-restore/criu/pull/2197.
const skipSince = 31900

// chooseNetwork has the network locked only where it must be: without an established TCP connection there is nothing to lock it for, and
// that would cut off the pod's other containers and its probes too. Where connections are refused, one is an error.
func (d Dump) chooseNetwork(ctx context.Context) (networkMode, error) {
	if d.Version >= skipSince || d.RefuseTCP {
		at, connected, err := d.Container.connectedTCP(ctx)
		if err != nil {
			return 0, err
		}
		if connected && d.RefuseTCP {
			return 0, &Error{Limit: limit(refusedTCPName), Place: d.Container.describe(at), Cause: "it is connected"}
		}
		if !connected && d.Version >= skipSince {
			return skipNetworkLock, nil
		}
	}
	return lockMethod(ctx, d.Criu), nil
}

// LogFile is the name of CRIU's log in the directory Work of a Dump.
const LogFile = "dump.log"

// ghostLimit is how large a deleted file may be, in bytes, that a process still holds open: it goes into the images. CRIU's own
// limit of 1 MiB is smaller than the temporary files of many a database.
const ghostLimit = 1 << 30

// options are those that runc sets in (*Container).Checkpoint and crun in libcrun_container_checkpoint_linux_criu, since it is
// they who restore. Ours are those that need nothing of a restore: LeaveRunning, FileLocks, LinkRemap, the limit for deleted files; and
// the network. ExtUnixSk is not among them: with it CRIU dumps a datagram socket that is connected to one outside, but runc and crun restore that
// only if they, too, are told, and only where a socket of the same path answers. Whoever has that can put ext-unix-sk into runc.conf.
func (d Dump) options(network networkMode) *rpc.CriuOpts {
	c := d.Container
	opts := &rpc.CriuOpts{
		ImagesDirFd:       proto.Int32(int32(d.Images.Fd())),
		WorkDirFd:         proto.Int32(int32(d.Work.Fd())),
		LogLevel:          proto.Int32(4),
		LogFile:           proto.String(LogFile),
		Root:              proto.String(c.Rootfs),
		Pid:               proto.Int32(int32(c.Pid)),
		LeaveRunning:      proto.Bool(true),
		ManageCgroups:     proto.Bool(true), // runc still sets it beside the mode
		ManageCgroupsMode: rpc.CriuCgMode_SOFT.Enum(),
		EmptyNs:           proto.Uint32(unix.CLONE_NEWNET),
		OrphanPtsMaster:   proto.Bool(true),
		FileLocks:         proto.Bool(true), // a restore without it skips the locks
		LinkRemap:         proto.Bool(true), // see remap.go
		GhostLimit:        proto.Uint32(ghostLimit),
		TcpSkipInFlight:   proto.Bool(true), // a connection that nobody has accepted yet would fail the dump
	}
	switch network {
	case skipNetworkLock:
		opts.NetworkLock = rpc.CriuNetworkLockMethod_SKIP.Enum()
	case lockNetwork:
		opts.TcpEstablished = proto.Bool(!d.RefuseTCP)
	case lockNetworkByNftables:
		opts.TcpEstablished = proto.Bool(!d.RefuseTCP)
		opts.NetworkLock = rpc.CriuNetworkLockMethod_NFTABLES.Enum()
	}
	if c.Freezer != "" {
		opts.FreezeCgroup = proto.String(c.Freezer)
	}
	if file := configFile(c.Runtime); file != "" {
		opts.ConfigFile = proto.String(file)
	}
	for _, ns := range c.SharedNamespaces {
		switch ns.Type {
		case "network":
			opts.External = append(opts.External, fmt.Sprintf("net[%d]:extRootNetNS", ns.Inode))
		case "pid":
			opts.External = append(opts.External, fmt.Sprintf("pid[%d]:extRootPidNS", ns.Inode))
		}
	}
	for _, path := range c.ExternalMounts {
		opts.ExtMnt = append(opts.ExtMnt, &rpc.ExtMountMap{Key: proto.String(path), Val: proto.String(path)})
	}
	for _, path := range c.MaskedFiles {
		// This is where the two runtimes part.
		value := "/dev/null"
		if c.Runtime == Crun {
			value = path
		}
		opts.ExtMnt = append(opts.ExtMnt, &rpc.ExtMountMap{Key: proto.String(path), Val: proto.String(value)})
	}
	return opts
}

// configFile is the administrator's file of CRIU options for the runtime, which overrides ours, as it would the runtime's.
// The annotation org.criu.config, by which runc and crun let a container name another, is not followed: it comes from the
// pod, and would let a tenant have CRIU read any file of the node.
func configFile(runtime Runtime) string {
	candidates := []string{"/etc/criu/runc.conf"}
	if runtime == Crun {
		candidates = []string{"/etc/criu/crun.conf", "/etc/criu/runc.conf"}
	}
	for _, file := range candidates {
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() {
			return file
		}
	}
	return ""
}

// writeDescriptors writes the file by which runc and crun know which of a restored container's descriptors were its
// standard streams.
func writeDescriptors(images *os.File, descriptors []string) error {
	if len(descriptors) != 3 {
		return fmt.Errorf("write descriptors.json: got %d descriptors, need those of stdin, stdout and stderr", len(descriptors))
	}
	content, err := json.Marshal(descriptors)
	if err != nil {
		return err
	}
	fd, err := unix.Openat(int(images.Fd()), "descriptors.json",
		unix.O_WRONLY|unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("create descriptors.json: %w", err)
	}
	file := os.NewFile(uintptr(fd), "descriptors.json")
	_, err = file.Write(content)
	return errors.Join(err, file.Close())
}

// removeContent empties a flat directory, which the caller owns.
func removeContent(dir *os.File) error {
	root, err := os.OpenRoot(descriptorPath(dir))
	if err != nil {
		return err
	}
	defer root.Close()
	entries, err := fs.ReadDir(root.FS(), ".")
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if err := root.Remove(entry.Name()); err != nil {
			return err
		}
	}
	return nil
}

// descriptorPath is a path of the directory that holds whatever its name is meanwhile.
func descriptorPath(dir *os.File) string { return fmt.Sprintf("/proc/self/fd/%d", dir.Fd()) }
