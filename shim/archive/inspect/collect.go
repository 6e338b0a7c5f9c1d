package inspect

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"

	criucore "github.com/checkpoint-restore/go-criu/v7/crit/images/criu-core"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/fs"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/memfd"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/mnt"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/checkpoint-restore/go-criu/v7/stats"

	"crishim/criu/image"
	"crishim/shim/archive"
	"crishim/shim/archive/needs"
)

const (
	maxKept = 256 << 20 // bytes that are kept of all images together, about
	maxPath = 4096      // bytes of a path, as Linux has it
	listed  = 64        // bytes that one thing takes beside its texts, about
)

var errTooMuch = errors.New("there are more processes, mappings and files than make sense")

// collector gathers what the images say, whatever the order in which they come. Its look is for archive.Open.
type collector struct {
	needs   needs.Images
	left    int64 // bytes that may still be kept
	hasTree bool
	tree    []*pstree.PstreeEntry
	cores   map[uint32]core         // by number of process or thread
	spaces  map[uint32]*space       // by process
	shared  map[uint64]*stored      // by CRIU's number of it
	works   map[uint32]uint32       // process to file, the directory in which it works
	tables  map[uint32]uint32       // process to table of descriptors
	table   map[uint32][]descriptor // by number of table
	files   map[uint32]file         // by id
	memfds  map[uint32]string       // inode to name
	pages   map[uint32]int64        // image of pages to its size
	mounts  []Mount
	dump    *Dump
	layer   *Tree
	devShm  *Tree
	deleted int // paths in deleted.files
	log     *Log
}

type core struct {
	name, state string
	uid, gid    uint32
}

type descriptor struct{ fd, file uint32 }

func newCollector(kept int64) *collector {
	return &collector{
		left: kept, cores: map[uint32]core{}, spaces: map[uint32]*space{}, shared: map[uint64]*stored{}, works: map[uint32]uint32{},
		tables: map[uint32]uint32{}, table: map[uint32][]descriptor{}, files: map[uint32]file{}, memfds: map[uint32]string{}, pages: map[uint32]int64{},
	}
}

// keep accounts for one thing that is kept.
func (c *collector) keep(texts ...string) error {
	c.left -= listed
	for _, text := range texts {
		c.left -= int64(len(text))
	}
	if c.left < 0 {
		return errTooMuch
	}
	return nil
}

// text cuts what cannot be as long off.
func text(s string) string {
	if len(s) > maxPath {
		return strings.Clone(s[:maxPath]) + "…"
	}
	return s
}

func (c *collector) look(name string, size int64, content io.Reader) error {
	if name, ok := strings.CutPrefix(name, archive.ImagesDir+"/"); ok {
		return c.image(name, size, content)
	}
	var err error
	switch name {
	case archive.StatsDump:
		return image.Read(content, size, "STATS", c.stats)
	case archive.RootfsDiff:
		c.layer, err = readTree(content, true)
		return err
	case archive.DevShm:
		if err := c.needs.Look(name, size, content); err != nil {
			return err
		}
		c.devShm, err = readTree(content, false)
		return err
	case archive.DeletedFiles:
		c.deleted, err = countDeleted(content, size)
		return err
	case archive.ContainerLog, "ctr.log", "io.kubernetes.cri-o.LogPath":
		c.log, err = readLog(content)
		return err
	}
	return c.needs.Look(name, size, content)
}

// image reads one of CRIU's images. Those of a process, a table or shared memory have its number in their names.
func (c *collector) image(name string, size int64, content io.Reader) error {
	switch name {
	case "pstree.img":
		c.hasTree = true
		return each(content, size, "PSTREE", c.process)
	case "files.img":
		return each(content, size, "FILES", c.file)
	case "memfd.img":
		return each(content, size, "MEMFD_INODE", func(m *memfd.MemfdInodeEntry) error {
			c.memfds[uint32(m.GetInodeId())] = text(m.GetName())
			return c.keep(text(m.GetName()))
		})
	}
	kind, n, ok := numbered(name)
	if !ok {
		return c.needs.Look(archive.ImagesDir+"/"+name, size, content)
	}
	id := uint32(n)
	switch kind {
	case "pages":
		c.pages[id] = size
	case "core":
		return each(content, size, "CORE", func(e *criucore.CoreEntry) error { return c.core(id, e) })
	case "ids":
		return each(content, size, "IDS", func(e *criucore.TaskKobjIdsEntry) error {
			c.tables[id] = e.GetFilesId()
			return c.keep()
		})
	case "fs":
		return each(content, size, "FS", func(e *fs.FsEntry) error {
			c.works[id] = e.GetCwdId()
			return c.keep()
		})
	case "fdinfo":
		return each(content, size, "FDINFO", func(e *fdinfo.FdinfoEntry) error {
			c.table[id] = append(c.table[id], descriptor{e.GetFd(), e.GetId()})
			return c.keep()
		})
	case "mountpoints":
		return each(content, size, "MNTS", c.mount)
	case "mm":
		return c.mappings(id, size, content)
	case "pagemap":
		return c.pagemap(id, size, content)
	case "pagemap-shmem":
		return c.sharedPagemap(n, size, content)
	}
	return nil
}

// numbered takes a name such as core-7.img apart.
func numbered(name string) (kind string, n uint64, ok bool) {
	base, isImage := strings.CutSuffix(name, ".img")
	dash := strings.LastIndexByte(base, '-')
	if !isImage || dash < 0 {
		return "", 0, false
	}
	kind = base[:dash]
	bits := 32
	if kind == "pagemap-shmem" {
		bits = 64
	}
	n, err := strconv.ParseUint(base[dash+1:], 10, bits)
	return kind, n, err == nil
}

// each is image.Read for a use that can fail.
func each[T any, E image.Entry[T]](content io.Reader, size int64, kind string, use func(E) error) error {
	return image.ReadRaw(content, size, kind, func(data []byte) error {
		entry := E(new(T))
		if err := image.Decode(data, entry); err != nil {
			return fmt.Errorf("read image: %w", err)
		}
		return use(entry)
	})
}

func (c *collector) process(p *pstree.PstreeEntry) error {
	c.needs.Process(p)
	c.tree = append(c.tree, p)
	c.left -= int64(4 * len(p.GetThreads()))
	return c.keep()
}

func (c *collector) core(id uint32, e *criucore.CoreEntry) error {
	// compel's task-state.h.
	states := map[uint32]string{1: "running", 2: "dead", 3: "stopped", 6: "zombie"}
	state := states[e.GetTc().GetTaskState()]
	if state == "" {
		state = "unknown"
	}
	name := text(e.GetTc().GetComm())
	creds := e.GetThreadCore().GetCreds()
	c.cores[id] = core{name: name, state: state, uid: creds.GetEuid(), gid: creds.GetEgid()}
	if ids := e.GetIds(); ids != nil {
		c.tables[id] = ids.GetFilesId()
	}
	return c.keep(name)
}

func (c *collector) mount(m *mnt.MntEntry) error {
	if m.GetMountpoint() == "" {
		return nil
	}
	kind := m.GetFsname()
	switch {
	case kind == "" && m.GetFstype() == uint32(mnt.Fstype_UNSUPPORTED):
		kind = "bind" // of a file system that is none of CRIU's affair
	case kind == "":
		kind = strings.ToLower(mnt.Fstype(m.GetFstype()).String())
	}
	mount := Mount{
		Destination: text("/" + strings.TrimLeft(m.GetMountpoint(), "./")), Type: text(kind), Source: text(m.GetSource()),
		External: m.GetExtMount() || m.GetExtKey() != "",
	}
	if mount.External {
		mount.Source = text(m.GetRoot())
	}
	c.mounts = append(c.mounts, mount)
	return c.keep(mount.Destination, mount.Type, mount.Source)
}

func (c *collector) stats(s *stats.StatsEntry) {
	if d := s.GetDump(); d != nil {
		c.dump = &Dump{
			Freezing: d.GetFreezingTime(), Frozen: d.GetFrozenTime(), MemoryDump: d.GetMemdumpTime(), MemoryWrite: d.GetMemwriteTime(),
			PagesScanned: d.GetPagesScanned(), PagesWritten: d.GetPagesWritten(), SharedPages: d.GetShpagesWritten(),
		}
	}
}

func readLog(content io.Reader) (*Log, error) {
	log := &Log{}
	for buffer := make([]byte, 256<<10); ; {
		n, err := content.Read(buffer)
		log.Bytes += int64(n)
		log.Lines += int64(bytes.Count(buffer[:n], []byte("\n")))
		if err == io.EOF {
			return log, nil
		}
		if err != nil {
			return nil, err
		}
	}
}
