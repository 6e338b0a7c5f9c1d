package inspect

import (
	"fmt"
	"io"
)

// mostChanges is how many changes of one kind a table lists.
const mostChanges = 20

// Table writes what is different, a section for each kind of thing that is. What only A has is marked by -, what only B has by +, and what both
// have, but not the same, by ~.
func (d *Difference) Table(w io.Writer) error {
	t := newTable(w)
	fmt.Fprintln(t, "\tA\tB")
	t.row("container", d.A.Name+" "+short(d.A.Container), d.B.Name+" "+short(d.B.Container))
	if d.A.Image != d.B.Image {
		t.row("image", d.A.Image, d.B.Image)
	}
	t.row("checkpoint", since("", d.A.Checkpointed), since("", d.B.Checkpointed))
	if d.Log.A != d.Log.B {
		t.row("log", fmt.Sprintf("%d bytes", d.Log.A), fmt.Sprintf("%d bytes", d.Log.B))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if d.Same() {
		_, err := fmt.Fprintln(w, "\nThere is no difference.")
		return err
	}
	processes, files, sockets, mounts := &changes{}, &changes{}, &changes{}, &changes{}
	for _, p := range d.Ended {
		processes.add("-", p.PID, p.Name)
	}
	for _, p := range d.Started {
		processes.add("+", p.PID, p.Name)
	}
	for _, p := range d.Renamed {
		processes.add("~", p.PID, p.Is+" "+p.IsExecutable, "was "+p.Was+" "+p.WasExecutable)
	}
	for _, list := range []struct {
		mark    string
		files   []OpenFile
		sockets []Socket
		mounts  []Mount
	}{{"-", d.Closed, d.Gone, d.Unmounted}, {"+", d.Opened, d.Connected, d.Mounted}} {
		for _, f := range list.files {
			files.add(list.mark, f.PID, f.Descriptor, f.Type, f.Access, f.Path)
		}
		for _, s := range list.sockets {
			sockets.add(list.mark, s.PID, s.Descriptor, s.Protocol, s.State, s.Local, s.Remote)
		}
		for _, m := range list.mounts {
			mounts.add(list.mark, m.Destination, m.Type)
		}
	}
	for _, section := range []struct {
		title   string
		changes *changes
	}{
		{"PROCESSES", processes}, {"MEMORY", d.memoryChanges()}, {"OPEN FILES", files}, {"SOCKETS", sockets}, {"MOUNTS", mounts},
		{"LAYER", d.Layer.changes()}, {"/DEV/SHM", d.DevShm.changes()},
	} {
		if err := section.changes.write(w, section.title); err != nil {
			return err
		}
	}
	return nil
}

// changes are the rows of a section.
type changes struct {
	rows [][]any
	more int
}

func (c *changes) add(cells ...any) {
	if len(c.rows) == mostChanges {
		c.more++
		return
	}
	c.rows = append(c.rows, cells)
}

func (c *changes) write(w io.Writer, title string) error {
	if len(c.rows) == 0 {
		return nil
	}
	fmt.Fprintf(w, "\n%s\n", title)
	t := newTable(w)
	for _, row := range c.rows {
		t.row(row...)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if c.more > 0 {
		fmt.Fprintf(w, "and %d more (--output json)\n", c.more)
	}
	return nil
}

func (d *Difference) memoryChanges() *changes {
	c := &changes{}
	for _, m := range d.Memory {
		of := raw("process")
		if m.Shared {
			of = raw(fmt.Sprintf("shared at %#x", m.Address))
		}
		bytes := int64(m.Changed+m.Added+m.Removed) * m.PageSize
		c.add(m.PID, m.Name, of, raw(fmt.Sprintf("%s changed", count(int(m.Changed), "page"))), raw(fmt.Sprintf("%d added", m.Added)),
			raw(fmt.Sprintf("%d removed", m.Removed)), raw(fmt.Sprintf("%d as before", m.Same)), raw(size(bytes)))
	}
	return c
}

func (d *TreeDifference) changes() *changes {
	c := &changes{}
	for _, list := range []struct {
		mark  string
		paths []string
	}{{"-", d.Removed}, {"~", d.Changed}, {"+", d.Added}} {
		for _, path := range list.paths {
			c.add(list.mark, path)
		}
	}
	c.more += d.Omitted
	return c
}

func short(id string) string { return id[:min(12, len(id))] }
