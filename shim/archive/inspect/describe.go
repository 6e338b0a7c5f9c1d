package inspect

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"crishim/shim/archive"
)

// describe puts together what was gathered.
func (c *collector) describe(a *archive.Archive) (*Description, error) {
	d := &Description{
		Container: container(&a.Report), Needs: c.needs.List(&a.Report), Dump: c.dump, Mounts: c.mounts,
		Layer: c.layer, DevShm: c.devShm, Log: c.log, Archive: File{Size: a.Size, Compression: "none", Members: len(a.Members)},
		Processes: []Process{}, Shared: []SharedMemory{}, Open: []OpenFile{}, Sockets: []Socket{},
	}
	if a.Compressed {
		d.Archive.Compression = "zstd"
	}
	for _, m := range a.Members {
		d.Archive.Content += m.Size
	}
	d.Archive.Digests = a.Manifest != nil && !slices.ContainsFunc(a.Manifest.Members, func(m archive.Digest) bool { return m.SHA256 == "" })
	if d.Mounts == nil {
		d.Mounts = []Mount{}
	}
	sources := map[string]string{}
	for _, m := range a.Spec.Mounts {
		sources[m.Destination] = text(m.Source)
	}
	for i, m := range d.Mounts {
		if m.External {
			d.Mounts[i].Source = cmp.Or(sources[m.Destination], m.Source) // CRIU has the path inside of the file system that it is on
		}
	}
	slices.SortStableFunc(d.Mounts, func(a, b Mount) int { return strings.Compare(a.Destination, b.Destination) })
	if d.Layer != nil && d.Layer.Deleted == 0 {
		d.Layer.Deleted = c.deleted // podman and CRI-O have no whiteouts
	}
	if err := c.processes(d); err != nil {
		return nil, err
	}
	if err := c.descriptors(d); err != nil {
		return nil, err
	}
	return d, c.sharedMemory(d)
}

func container(r *archive.Report) Container {
	config, labels, annotations := r.Config, r.Status.Labels, r.Spec.Annotations
	c := Container{
		ID: config.ID, Name: config.Name, Runtime: config.Runtime, Created: config.CreatedTime, Checkpointed: config.CheckpointedTime,
		Image: cmp.Or(config.RootfsImageName, config.RootfsImage), ImageRef: cmp.Or(config.RootfsImageRef, config.RootfsImageID),
		Pod:       cmp.Or(labels["io.kubernetes.pod.name"], annotations["io.kubernetes.cri.sandbox-name"], annotations["io.kubernetes.pod.name"]),
		Namespace: cmp.Or(labels["io.kubernetes.pod.namespace"], annotations["io.kubernetes.cri.sandbox-namespace"], annotations["io.kubernetes.pod.namespace"]),
	}
	if m := r.Manifest; m != nil {
		c.Crishim, c.RuntimeVersion, c.Criu, c.Kernel, c.Architecture = m.Origin.Crishim, m.Origin.RuntimeVersion, m.Origin.Criu, m.Origin.Kernel, m.Origin.Architecture
	}
	return c
}

func (c *collector) processes(d *Description) error {
	imagesOfPages := map[uint32]bool{}
	for _, p := range c.tree {
		pid := p.GetPid()
		core, ok := c.cores[pid]
		if !ok {
			return fmt.Errorf("core-%d.img is missing, which has the name of a process", pid)
		}
		process := Process{
			PID: pid, PPID: p.GetPpid(), Group: p.GetPgid(), Session: p.GetSid(), Name: core.name, State: core.state, UID: core.uid, GID: core.gid,
			Threads: len(p.GetThreads()), Descriptors: len(c.descriptorsOf(pid)), Directory: c.files[c.works[pid]].Path,
		}
		if s := c.spaces[pid]; s != nil {
			if s.known && s.pages > 0 && imagesOfPages[s.pagesID] {
				return fmt.Errorf("pages-%d.img is of two processes", s.pagesID)
			}
			imagesOfPages[s.pagesID] = true
			var err error
			if process.Memory, err = c.memory(s); err != nil {
				return err
			}
			process.Executable = c.files[s.executable].Path
		}
		d.Processes = append(d.Processes, process)
	}
	return nil
}

func (c *collector) descriptorsOf(pid uint32) []descriptor {
	if table, ok := c.tables[pid]; ok {
		return c.table[table]
	}
	return nil
}

// descriptors lists files and sockets by the processes that have them. Processes can share a table of descriptors.
func (c *collector) descriptors(d *Description) error {
	inodes := map[uint32]string{} // of unix sockets
	for _, f := range c.files {
		if f.socket != nil && f.inode != 0 {
			inodes[f.inode] = f.socket.Local
		}
	}
	socket := func(f file) Socket {
		s := *f.socket
		if s.Protocol == "unix" {
			s.Local = cmp.Or(s.Local, fmt.Sprintf("socket:[%d]", f.inode))
			if f.peer != 0 {
				s.Remote = cmp.Or(inodes[f.peer], fmt.Sprintf("socket:[%d]", f.peer))
			}
		}
		return s
	}
	held := map[uint32]bool{}
	for _, p := range d.Processes {
		table := slices.SortedFunc(slices.Values(c.descriptorsOf(p.PID)), func(a, b descriptor) int { return cmp.Compare(a.fd, b.fd) })
		for _, entry := range table {
			f := c.files[entry.file]
			held[entry.file] = true
			c.left -= 3 * listed
			if err := c.keep(); err != nil {
				return err
			}
			if f.socket != nil {
				s := socket(f)
				s.PID, s.Descriptor = p.PID, entry.fd
				d.Sockets = append(d.Sockets, s)
				continue
			}
			open := f.OpenFile
			open.PID, open.Descriptor = p.PID, entry.fd
			open.Type = cmp.Or(open.Type, "unknown")
			switch {
			case f.named != 0:
				open.Path, open.Access = c.files[f.named].Path, c.files[f.named].Access
			case f.inode != 0:
				open.Path = c.memfds[f.inode]
			}
			d.Open = append(d.Open, open)
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.files)) {
		if f := c.files[id]; f.socket != nil && !held[id] {
			d.Sockets = append(d.Sockets, socket(f))
		}
	}
	return nil
}

func (c *collector) sharedMemory(d *Description) error {
	mappers := map[uint64][]uint32{}
	address := map[uint64]uint64{}
	for _, p := range c.tree {
		s := c.spaces[p.GetPid()]
		if s == nil {
			continue
		}
		for _, m := range s.shares {
			if len(mappers[m.id]) == 0 {
				address[m.id] = m.address
			}
			if !slices.Contains(mappers[m.id][max(0, len(mappers[m.id])-1):], p.GetPid()) {
				mappers[m.id] = append(mappers[m.id], p.GetPid())
			}
		}
	}
	for _, id := range slices.Sorted(maps.Keys(c.shared)) {
		s := c.shared[id]
		page, err := c.pageSize(*s)
		if err != nil {
			return err
		}
		d.Shared = append(d.Shared, SharedMemory{ID: id, Archived: int64(s.pages) * page, PageSize: page, Mappers: mappers[id], Address: address[id]})
	}
	slices.SortStableFunc(d.Shared, func(a, b SharedMemory) int { return strings.Compare(a.key(), b.key()) })
	return nil
}
