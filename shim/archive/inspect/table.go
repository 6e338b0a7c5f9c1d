package inspect

import (
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/dustin/go-humanize"

	"crishim/shim/archive/needs"
)

// Sections are parts of a description.
type Sections struct {
	Processes, Files, Sockets, Mounts, Layer, Needs bool
}

// summaryRows is how many processes a summary lists, so that it fits on a screen.
const summaryRows = 15

// table is text in columns. Whatever comes from the archive passes through needs.Plain: it could do something to a terminal.
type table struct{ *tabwriter.Writer }

func newTable(w io.Writer) table { return table{tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)} }

// row writes cells, of which the strings may be anything.
func (t table) row(cells ...any) {
	for i, cell := range cells {
		if i > 0 {
			fmt.Fprint(t, "\t")
		}
		if s, ok := cell.(string); ok {
			cell = dash(needs.Plain(s))
		}
		fmt.Fprint(t, cell)
	}
	fmt.Fprintln(t)
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// Table writes the sections asked for, whole, or a summary if none is.
func (d *Description) Table(w io.Writer, s Sections) error {
	if s == (Sections{}) {
		if err := d.summary(w); err != nil {
			return err
		}
		if err := d.processTable(w, summaryRows); err != nil {
			return err
		}
		_, err := fmt.Fprintln(w, "\n--processes, --files, --sockets, --mounts, --layer and --needs tell more.")
		return err
	}
	first := true
	for _, section := range []struct {
		wanted bool
		write  func() error
	}{
		{s.Processes, func() error { return d.processTable(w, len(d.Processes)) }},
		{s.Files, func() error { return d.fileTable(w) }},
		{s.Sockets, func() error { return d.socketTable(w) }},
		{s.Mounts, func() error { return d.mountTable(w) }},
		{s.Layer, func() error { return d.layerTable(w) }},
		{s.Needs, func() error { return d.needTable(w) }},
	} {
		if !section.wanted {
			continue
		}
		if !first {
			fmt.Fprintln(w)
		}
		first = false
		if err := section.write(); err != nil {
			return err
		}
	}
	return nil
}

func (d *Description) summary(w io.Writer) error {
	t := newTable(w)
	for _, item := range d.items() {
		fmt.Fprintf(t, "%s\t%s\n", item[0], item[1])
	}
	fmt.Fprintln(t)
	return t.Flush()
}

// items are the lines of a summary, a name and a text each, fit for a terminal.
func (d *Description) items() [][2]string {
	c, plain := d.Container, needs.Plain
	pod := ""
	if c.Pod != "" {
		pod = "of pod " + plain(c.Namespace+"/"+c.Pod)
	}
	var archived, shared int64
	for _, p := range d.Processes {
		archived += p.Memory.Archived
	}
	for _, s := range d.Shared {
		shared += s.Archived
	}
	inShared := ""
	if shared > 0 {
		inShared = size(shared) + " that they share"
	}
	external := 0
	for _, m := range d.Mounts {
		if m.External {
			external++
		}
	}
	var items [][2]string
	add := func(item string, parts ...string) {
		parts = slices.DeleteFunc(parts, func(part string) bool { return part == "" })
		if len(parts) > 0 {
			items = append(items, [2]string{item, strings.Join(parts, ", ")})
		}
	}
	add("container", plain(c.Name), pod, plain(c.ID))
	add("image", plain(c.Image), plain(c.ImageRef))
	add("runtime", plain(strings.TrimSpace(c.Runtime+" "+c.RuntimeVersion)), since("created ", c.Created))
	add("checkpoint", since("", c.Checkpointed), after("crishim ", c.Crishim), after("CRIU ", c.Criu), after("Linux ", c.Kernel), plain(c.Architecture))
	add("archive", size(d.Archive.Size)+d.compression(), count(d.Archive.Members, "member"), d.digests())
	if s := d.Dump; s != nil {
		add("dump", "frozen for "+duration(s.Frozen)+" once it stood still, which took "+duration(s.Freezing),
			duration(s.MemoryDump)+" for memory", count(int(s.PagesWritten+s.SharedPages), "page")+" written")
	}
	add("memory", size(archived)+" of "+count(len(d.Processes), "process"), inShared)
	add("open", count(len(d.Open), "file"), count(len(d.Sockets), "socket"))
	add("mounts", fmt.Sprintf("%d, of which %d external", len(d.Mounts), external))
	add("layer", d.Layer.summary())
	add("/dev/shm", d.DevShm.summary())
	if d.Log != nil {
		add("log", count(int(d.Log.Lines), "line"), size(d.Log.Bytes))
	}
	return items
}

func (t *Tree) summary() string {
	if t == nil {
		return "not in the archive"
	}
	parts := []string{count(t.Files, "file") + " of " + size(t.Bytes), count(t.Directories, "directory")}
	for _, more := range []struct {
		n    int
		what string
	}{{t.Links, "link"}, {t.Others, "other"}} {
		if more.n > 0 {
			parts = append(parts, count(more.n, more.what))
		}
	}
	if t.Deleted > 0 {
		parts = append(parts, fmt.Sprintf("%d deleted of the image", t.Deleted))
	}
	return strings.Join(parts, ", ")
}

func (d *Description) compression() string {
	if d.Archive.Compression == "none" {
		return ""
	}
	return fmt.Sprintf(" by %s, of %s", d.Archive.Compression, size(d.Archive.Content))
}

func (d *Description) digests() string {
	if d.Archive.Digests {
		return "digests for crishim verify"
	}
	return "no digests"
}

func (d *Description) processTable(w io.Writer, most int) error {
	t := newTable(w)
	fmt.Fprintln(t, "PID\tPPID\tSTATE\tUID\tTHREADS\tMEMORY\tANON\tFILE\tMAPPINGS\tFDS\tNAME\tEXECUTABLE")
	for _, p := range d.Processes[:min(most, len(d.Processes))] {
		m := p.Memory
		t.row(p.PID, p.PPID, p.State, p.UID, p.Threads, size(m.Archived), size(m.Anonymous), size(m.File), m.Mappings, p.Descriptors, p.Name, p.Executable)
	}
	if err := t.Flush(); err != nil {
		return err
	}
	if more := len(d.Processes) - most; more > 0 {
		fmt.Fprintf(w, "and %d more (--processes)\n", more)
	}
	return nil
}

func (d *Description) fileTable(w io.Writer) error {
	t := newTable(w)
	fmt.Fprintln(t, "PID\tFD\tTYPE\tACCESS\tPOSITION\tPATH")
	for _, f := range d.Open {
		t.row(f.PID, f.Descriptor, f.Type, f.Access, f.Position, f.Path)
	}
	return t.Flush()
}

func (d *Description) socketTable(w io.Writer) error {
	t := newTable(w)
	fmt.Fprintln(t, "PID\tFD\tPROTOCOL\tTYPE\tSTATE\tLOCAL\tREMOTE")
	for _, s := range d.Sockets {
		pid, fd := fmt.Sprint(s.PID), fmt.Sprint(s.Descriptor)
		if s.PID == 0 {
			pid, fd = "", ""
		}
		t.row(pid, fd, s.Protocol, s.Type, s.State, s.Local, s.Remote)
	}
	return t.Flush()
}

func (d *Description) mountTable(w io.Writer) error {
	t := newTable(w)
	fmt.Fprintln(t, "DESTINATION\tTYPE\tEXTERNAL\tSOURCE")
	for _, m := range d.Mounts {
		external := "no"
		if m.External {
			external = "yes"
		}
		t.row(m.Destination, m.Type, external, m.Source)
	}
	return t.Flush()
}

func (d *Description) layerTable(w io.Writer) error {
	fmt.Fprintln(w, "layer:", d.Layer.summary())
	if d.Layer == nil || len(d.Layer.Largest) == 0 {
		return nil
	}
	t := newTable(w)
	fmt.Fprintln(t, "SIZE\tLARGEST FILES")
	for _, f := range d.Layer.Largest {
		t.row(size(f.Size), f.Path)
	}
	return t.Flush()
}

func (d *Description) needTable(w io.Writer) error {
	t := newTable(w)
	fmt.Fprintln(t, "A RESTORE NEEDS")
	for _, n := range d.Needs {
		fmt.Fprintf(t, "%s\t%s\n", n.Item, n.Text)
	}
	return t.Flush()
}

func size(bytes int64) string { return humanize.IBytes(uint64(max(bytes, 0))) }

func duration(microseconds uint32) string {
	return (time.Duration(microseconds) * time.Microsecond).String()
}

// since tells a time, which may be none.
func since(what string, t time.Time) string {
	if t.IsZero() {
		return ""
	}
	return what + t.UTC().Format(time.RFC3339)
}

// after puts a word in front of a text, if there is one.
func after(word, text string) string {
	if text == "" {
		return ""
	}
	return word + needs.Plain(text)
}

func count(n int, what string) string {
	switch {
	case n == 1:
	case strings.HasSuffix(what, "y"):
		what = strings.TrimSuffix(what, "y") + "ies"
	case strings.HasSuffix(what, "s"):
		what += "es"
	default:
		what += "s"
	}
	return fmt.Sprintf("%d %s", n, what)
}
