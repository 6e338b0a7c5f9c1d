// Package inspect tells what is in a checkpoint archive, and what is different between two: processes, memory, files, sockets, mounts,
// the writable layer, the log. It reads archives of any origin, of which nothing is trusted, and writes nothing.
//
// Memory is counted, and compared with that of another archive, but never told. Of a process there is its name, and neither command line nor environment.
//
// checkpointctl knows most of this, too, of an archive that is unpacked on disk. Its packages are of no use here: they are built on
// another version of go-criu, of which a program can have one only, and hold an image's file names and sizes for true.
package inspect

import (
	"context"
	"fmt"
	"os"
	"time"

	"crishim/shim/archive"
	"crishim/shim/archive/needs"
)

// Description is what is in an archive. Its JSON is the form that crishim inspect --output json prints; fields may be added, and none
// changes its meaning. Sizes are in bytes. Names and paths are as in the archive, whatever is in them.
type Description struct {
	Container Container      `json:"container"`
	Archive   File           `json:"archive"`
	Dump      *Dump          `json:"dump,omitempty"` // what CRIU measured, if the archive has that
	Needs     []needs.Need   `json:"needs"`          // what a machine must have to restore it, as crishim verify says
	Processes []Process      `json:"processes"`      // parents before their children, as CRIU lists them
	Shared    []SharedMemory `json:"sharedMemory"`
	Open      []OpenFile     `json:"files"` // what is no socket, by process and descriptor
	Sockets   []Socket       `json:"sockets"`
	Mounts    []Mount        `json:"mounts"`
	Layer     *Tree          `json:"layer,omitempty"`  // the changes to the root file system
	DevShm    *Tree          `json:"devShm,omitempty"` // the content of /dev/shm
	Log       *Log           `json:"log,omitempty"`
}

// Container is who was checkpointed, and when.
type Container struct {
	ID             string    `json:"id"`
	Name           string    `json:"name"`
	Pod            string    `json:"pod,omitempty"`
	Namespace      string    `json:"namespace,omitempty"`
	Image          string    `json:"image,omitempty"`    // by its name
	ImageRef       string    `json:"imageRef,omitempty"` // by its digest, or as the runtime has it
	Runtime        string    `json:"runtime,omitempty"`  // the OCI runtime
	RuntimeVersion string    `json:"runtimeVersion,omitempty"`
	Created        time.Time `json:"created,omitzero"`
	Checkpointed   time.Time `json:"checkpointed,omitzero"`
	Crishim        string    `json:"crishim,omitempty"` // version that wrote the archive; none for archives by others
	Criu           string    `json:"criu,omitempty"`
	Kernel         string    `json:"kernel,omitempty"`
	Architecture   string    `json:"architecture,omitempty"`
}

// File is the archive itself.
type File struct {
	Size        int64  `json:"size"`
	Compression string `json:"compression"` // none or zstd
	Members     int    `json:"members"`
	Content     int64  `json:"content"` // bytes of all members
	Digests     bool   `json:"digests"` // whether crishim verify can tell damage inside of members
}

// Dump is what CRIU measured. Durations are in microseconds.
type Dump struct {
	Freezing     uint32 `json:"freezingMicroseconds"`
	Frozen       uint32 `json:"frozenMicroseconds"`
	MemoryDump   uint32 `json:"memoryDumpMicroseconds"`
	MemoryWrite  uint32 `json:"memoryWriteMicroseconds"`
	PagesScanned uint64 `json:"pagesScanned"`
	PagesWritten uint64 `json:"pagesWritten"`
	SharedPages  uint64 `json:"sharedPagesWritten"`
}

// Process is a process of the container. Its numbers are those that it sees itself.
type Process struct {
	PID         uint32 `json:"pid"`
	PPID        uint32 `json:"ppid"` // 0 if its parent is none of the container's
	Group       uint32 `json:"pgid"`
	Session     uint32 `json:"sid"`
	Name        string `json:"name"`                 // at most 15 bytes, as /proc/PID/comm has it
	State       string `json:"state"`                // running, stopped, zombie, dead or unknown
	Executable  string `json:"executable,omitempty"` // not of a zombie
	Directory   string `json:"directory,omitempty"`  // in which it works
	UID         uint32 `json:"uid"`
	GID         uint32 `json:"gid"`
	Threads     int    `json:"threads"`
	Descriptors int    `json:"descriptors"`
	Memory      Memory `json:"memory"`
}

// Memory is a process's address space. What it shares with others by more than a file is in SharedMemory.
type Memory struct {
	Mappings  int   `json:"mappings"`
	Virtual   int64 `json:"virtual"`   // size of all mappings
	Archived  int64 `json:"archived"`  // of that, what the archive has
	Anonymous int64 `json:"anonymous"` // of that, what belongs to no file
	File      int64 `json:"file"`      // and what was changed of a file, privately
	PageSize  int64 `json:"pageSize"`  // 0 if the archive has none of it
}

// SharedMemory is memory that belongs to no file, or to a memory file, and can be mapped by several processes.
type SharedMemory struct {
	ID       uint64   `json:"id"`
	Archived int64    `json:"archived"`
	PageSize int64    `json:"pageSize"`
	Mappers  []uint32 `json:"pids"`    // processes that have it mapped
	Address  uint64   `json:"address"` // at which the first of them has it
}

// OpenFile is a descriptor.
type OpenFile struct {
	PID        uint32 `json:"pid"`
	Descriptor uint32 `json:"fd"`
	Type       string `json:"type"`           // file, directory, device, pipe, fifo, eventfd, …
	Path       string `json:"path,omitempty"` // in the container; of a pipe, its number
	Access     string `json:"access,omitempty"`
	Position   int64  `json:"position,omitempty"`
	External   bool   `json:"external,omitempty"` // the restorer has to provide it, as it does what the runtime gave
}

// Socket is a socket. One that no descriptor is left of is on its way to a process by SCM_RIGHTS.
type Socket struct {
	PID        uint32 `json:"pid,omitempty"`
	Descriptor uint32 `json:"fd"`
	Protocol   string `json:"protocol"` // tcp, udp, raw, unix, netlink, packet; with a 6 for IPv6
	Type       string `json:"type,omitempty"`
	State      string `json:"state,omitempty"`
	Local      string `json:"local,omitempty"` // address and port, or a path; abstract ones begin with @
	Remote     string `json:"remote,omitempty"`
}

// Mount is a mount of the container's.
type Mount struct {
	Destination string `json:"destination"`
	Type        string `json:"type"`
	Source      string `json:"source,omitempty"`
	External    bool   `json:"external"` // a restorer must provide it: CRIU's images have no content of it
}

// Tree is a tar of files in the archive.
type Tree struct {
	Files       int        `json:"files"`
	Directories int        `json:"directories"`
	Links       int        `json:"links"` // symbolic ones, and further names of files
	Others      int        `json:"others"`
	Deleted     int        `json:"deleted"` // of the image
	Bytes       int64      `json:"bytes"`   // content of the files
	Largest     []TreeFile `json:"largest"` // files, the largest first
}

// TreeFile is a file in a Tree.
type TreeFile struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
}

// Log is the container's log.
type Log struct {
	Lines int64 `json:"lines"`
	Bytes int64 `json:"bytes"`
}

// Read describes the archive in a file, which is compressed or not.
func Read(ctx context.Context, file *os.File) (*Description, error) {
	d, _, err := read(ctx, file, maxKept)
	return d, err
}

// read describes an archive of which kept bytes are kept at most.
func read(ctx context.Context, file *os.File, kept int64) (*Description, *archive.Archive, error) {
	c := newCollector(kept)
	a, err := archive.Open(ctx, file, c.look)
	if err == nil && !c.hasTree {
		err = fmt.Errorf("it has no %s/pstree.img: it is no checkpoint of a container", archive.ImagesDir)
	}
	var d *Description
	if err == nil {
		d, err = c.describe(a)
	}
	if err != nil {
		return nil, nil, fmt.Errorf("inspect %s: %w", file.Name(), err)
	}
	return d, a, nil
}
