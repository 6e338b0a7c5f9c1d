package inspect

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"crishim/shim/archive"
)

// Difference is what is different between two archives, A and B. Its JSON is the form that crishim diff --output json prints; fields may
// be added, and none changes its meaning.
type Difference struct {
	A         Side            `json:"a"`
	B         Side            `json:"b"`
	Started   []ProcessName   `json:"started"` // processes that only B has
	Ended     []ProcessName   `json:"ended"`
	Renamed   []Renamed       `json:"renamed"` // with another name or executable, as after execve; their memory is compared all the same
	Memory    []MemoryChange  `json:"memory"`  // where any is different
	Opened    []OpenFile      `json:"opened"`  // of processes that both have; positions are not compared
	Closed    []OpenFile      `json:"closed"`
	Connected []Socket        `json:"socketsOpened"` // of the same
	Gone      []Socket        `json:"socketsClosed"`
	Mounted   []Mount         `json:"mounted"`
	Unmounted []Mount         `json:"unmounted"`
	Layer     *TreeDifference `json:"layer"`
	DevShm    *TreeDifference `json:"devShm"`
	Log       LogChange       `json:"log"`
}

// Side is one of the archives.
type Side struct {
	Container    string    `json:"container"` // its ID
	Name         string    `json:"name"`
	Image        string    `json:"image"`
	Checkpointed time.Time `json:"checkpointed,omitzero"`
}

// ProcessName names a process.
type ProcessName struct {
	PID  uint32 `json:"pid"`
	Name string `json:"name"`
}

// Renamed is a process that executes something else, or calls itself otherwise.
type Renamed struct {
	PID           uint32 `json:"pid"`
	Was           string `json:"was"`
	Is            string `json:"is"`
	WasExecutable string `json:"wasExecutable"`
	IsExecutable  string `json:"isExecutable"`
}

// MemoryChange counts the pages of one process, or of memory that processes share.
type MemoryChange struct {
	PID      uint32 `json:"pid"` // of shared memory, the first that has it mapped
	Name     string `json:"name"`
	Shared   bool   `json:"shared"`
	Address  uint64 `json:"address,omitempty"` // of shared memory, in that process
	PageSize int64  `json:"pageSize"`
	Changed  uint64 `json:"changed"` // pages that both have, with other bytes
	Added    uint64 `json:"added"`   // pages that only B has
	Removed  uint64 `json:"removed"`
	Same     uint64 `json:"same"`
}

// LogChange is how much of the log there is.
type LogChange struct {
	A int64 `json:"a"` // bytes
	B int64 `json:"b"`
}

// Same tells whether there is no difference.
func (d *Difference) Same() bool {
	return len(d.Started)+len(d.Ended)+len(d.Renamed)+len(d.Memory)+len(d.Opened)+len(d.Closed)+len(d.Connected)+len(d.Gone)+
		len(d.Mounted)+len(d.Unmounted) == 0 && d.Layer.same() && d.DevShm.same() && d.Log.A == d.Log.B && d.A.Image == d.B.Image
}

func (d *TreeDifference) same() bool { return len(d.Added)+len(d.Changed)+len(d.Removed) == 0 }

// side is an archive that is compared.
type side struct {
	*Description
	archive *archive.Archive
	name    string // of the file
}

// Compare tells what is different between two archives of one container, in whichever place it ran. Processes are the same that
// have the same number in the container. Of memory it reads both archives a piece at a time. ctx ends it.
func Compare(ctx context.Context, fileA, fileB *os.File) (*Difference, error) {
	var sides [2]side
	for i, file := range []*os.File{fileA, fileB} {
		description, opened, err := read(ctx, file, maxKept)
		if err != nil {
			return nil, err
		}
		sides[i] = side{description, opened, file.Name()}
	}
	a, b := sides[0], sides[1]
	d := &Difference{A: a.side(), B: b.side(), Memory: []MemoryChange{}, Renamed: []Renamed{}}
	process := func(p Process) string { return fmt.Sprint(p.PID) }
	started, ended, both := compareLists(a.Processes, b.Processes, process)
	d.Started, d.Ended = processNames(started), processNames(ended)
	common := map[uint32]bool{}
	for _, p := range both {
		common[p[0].PID] = true
		if p[0].Name != p[1].Name || p[0].Executable != p[1].Executable {
			d.Renamed = append(d.Renamed, Renamed{p[0].PID, p[0].Name, p[1].Name, p[0].Executable, p[1].Executable})
		}
	}
	of := func(files []OpenFile) []OpenFile {
		return slices.DeleteFunc(slices.Clone(files), func(f OpenFile) bool { return !common[f.PID] })
	}
	with := func(sockets []Socket) []Socket {
		return slices.DeleteFunc(slices.Clone(sockets), func(s Socket) bool { return s.PID != 0 && !common[s.PID] })
	}
	d.Opened, d.Closed, _ = compareLists(of(a.Open), of(b.Open), OpenFile.key)
	d.Connected, d.Gone, _ = compareLists(with(a.Sockets), with(b.Sockets), Socket.key)
	d.Mounted, d.Unmounted, _ = compareLists(a.Mounts, b.Mounts, func(m Mount) string { return m.Type + " " + m.Destination })
	if a.Log != nil {
		d.Log.A = a.Log.Bytes
	}
	if b.Log != nil {
		d.Log.B = b.Log.Bytes
	}
	if err := d.content(a, b, both); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, fmt.Errorf("compare %s with %s: %w", a.name, b.name, err)
	}
	return d, nil
}

// content compares memory and files.
func (d *Difference) content(a, b side, both [][2]Process) error {
	for _, p := range both {
		change := MemoryChange{PID: p[1].PID, Name: p[1].Name}
		err := d.memory(a, b, fmt.Sprintf("pagemap-%d.img", p[0].PID), fmt.Sprintf("pagemap-%d.img", p[1].PID), p[0].Memory.PageSize, p[1].Memory.PageSize, change)
		if err != nil {
			return fmt.Errorf("memory of process %d: %w", p[0].PID, err)
		}
	}
	names := map[uint32]string{}
	for _, p := range slices.Concat(a.Processes, b.Processes) {
		names[p.PID] = p.Name // B's, where both have it
	}
	added, removed, shared := compareLists(a.Shared, b.Shared, SharedMemory.key)
	for _, s := range added {
		shared = append(shared, [2]SharedMemory{{}, s})
	}
	for _, s := range removed {
		shared = append(shared, [2]SharedMemory{s, {}})
	}
	for _, s := range shared {
		known := s[1]
		if known.Archived == 0 {
			known = s[0]
		}
		change := MemoryChange{Shared: true, Address: known.Address}
		if len(known.Mappers) > 0 {
			change.PID = known.Mappers[0]
			change.Name = names[change.PID]
		}
		err := d.memory(a, b, fmt.Sprintf("pagemap-shmem-%d.img", s[0].ID), fmt.Sprintf("pagemap-shmem-%d.img", s[1].ID), s[0].PageSize, s[1].PageSize, change)
		if err != nil {
			return fmt.Errorf("shared memory: %w", err)
		}
	}
	var err error
	if d.Layer, err = d.trees(a, b, archive.RootfsDiff, true); err != nil {
		return err
	}
	d.DevShm, err = d.trees(a, b, archive.DevShm, false)
	return err
}

func (d *Difference) trees(a, b side, name string, layer bool) (*TreeDifference, error) {
	before, errA := a.archive.Member(name)
	after, errB := b.archive.Member(name)
	if err := errors.Join(errA, errB); err != nil {
		return nil, err
	}
	difference, err := compareTrees(before, after, layer)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return difference, nil
}

// memory compares what two pagemaps name, either of which may not be there, and notes it if it is not the same.
func (d *Difference) memory(a, b side, nameA, nameB string, pageA, pageB int64, change MemoryChange) error {
	before, err := openPages(a.archive, nameA)
	if err != nil {
		return fmt.Errorf("%s: %w", a.name, err)
	}
	after, err := openPages(b.archive, nameB)
	if err != nil {
		return fmt.Errorf("%s: %w", b.name, err)
	}
	if pageA != 0 && pageB != 0 && pageA != pageB {
		return fmt.Errorf("pages have %d bytes in the one and %d in the other", pageA, pageB)
	}
	change.PageSize = max(pageA, pageB)
	if err := comparePages(before, after, uint64(change.PageSize), &change); err != nil {
		return err
	}
	if change.Changed+change.Added+change.Removed > 0 {
		d.Memory = append(d.Memory, change)
	}
	return nil
}

func (s side) side() Side {
	c := s.Description.Container
	return Side{Container: c.ID, Name: c.Name, Image: c.Image, Checkpointed: c.Checkpointed}
}

func processNames(processes []Process) []ProcessName {
	names := []ProcessName{}
	for _, p := range processes {
		names = append(names, ProcessName{p.PID, p.Name})
	}
	return names
}

// key is what makes a descriptor the same. Numbers of pipes are the kernel's, and others after a restore.
func (f OpenFile) key() string {
	path := f.Path
	if f.Type == "pipe" {
		path = ""
	}
	return fmt.Sprintf("%d %d %s %s %s", f.PID, f.Descriptor, f.Type, f.Access, path)
}

// key is the same for sockets, whose inodes change, too.
func (s Socket) key() string {
	named := func(address string) string {
		if strings.HasPrefix(address, "socket:[") {
			return ""
		}
		return address
	}
	return fmt.Sprintf("%d %d %s %s %s %s %s", s.PID, s.Descriptor, s.Protocol, s.Type, s.State, named(s.Local), named(s.Remote))
}

// key names shared memory by who has it mapped first, and where: its number is the kernel's.
func (s SharedMemory) key() string {
	if len(s.Mappers) == 0 {
		return fmt.Sprintf("%d", s.ID)
	}
	return fmt.Sprintf("%010d %016x", s.Mappers[0], s.Address)
}

// compareLists tells what is in one of two lists only, and what is in both, by key, in the order of the lists.
func compareLists[T any](a, b []T, key func(T) string) (added, removed []T, both [][2]T) {
	added, removed = []T{}, []T{}
	rest := map[string][]T{}
	for _, item := range b {
		rest[key(item)] = append(rest[key(item)], item)
	}
	for _, item := range a {
		same := rest[key(item)]
		if len(same) == 0 {
			removed = append(removed, item)
			continue
		}
		both = append(both, [2]T{item, same[0]})
		rest[key(item)] = same[1:]
	}
	for _, item := range b {
		if left := rest[key(item)]; len(left) > 0 {
			added = append(added, left[0])
			rest[key(item)] = left[1:]
		}
	}
	return added, removed, both
}
