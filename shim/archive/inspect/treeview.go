package inspect

import (
	"bufio"
	"cmp"
	"fmt"
	"io"

	"crishim/shim/archive/needs"
)

// maxDepth is how deep processes hang on each other: in a hostile archive they could do so without end.
const maxDepth = 64

// branch is a line of a tree, with what hangs on it.
type branch struct {
	text  string // fit for a terminal
	depth int
	on    []*branch
}

func (b *branch) add(format string, args ...any) *branch {
	for i, arg := range args {
		if s, ok := arg.(string); ok {
			args[i] = needs.Plain(s)
		}
	}
	next := &branch{text: fmt.Sprintf(format, args...), depth: b.depth + 1}
	b.on = append(b.on, next)
	return next
}

// Tree writes the description as a tree, in which processes hang on their parents, and on them what they have open.
func (d *Description) Tree(w io.Writer) error {
	root := &branch{text: dash(needs.Plain(d.Container.Name))}
	for _, item := range d.items() {
		root.add("%s: %s", item[0], raw(item[1]))
	}
	d.hang(root.add("processes"))
	mounts := root.add("mounts")
	for _, m := range d.Mounts {
		if m.External {
			mounts.add("%s (%s, external: %s)", m.Destination, m.Type, m.Source)
			continue
		}
		mounts.add("%s (%s)", m.Destination, m.Type)
	}
	out := bufio.NewWriter(w)
	fmt.Fprintln(out, root.text)
	root.write(out, "")
	return out.Flush()
}

// hang puts the processes on a branch, each on its parent's. One whose parent is not there, or too deep, is on the branch itself.
func (d *Description) hang(on *branch) {
	branches := map[uint32]*branch{0: on}
	for _, p := range d.Processes {
		parent := branches[p.PPID]
		if parent == nil || parent.depth > maxDepth {
			parent = on
		}
		details := ""
		if p.Threads > 1 {
			details = ", " + count(p.Threads, "thread")
		}
		// Parents come before their children, or are not found.
		branches[p.PID] = parent.add("[%d] %s (%s%s, %s of memory, %s)", p.PID, p.Name, p.State, raw(details), raw(size(p.Memory.Archived)), p.Executable)
	}
	for _, f := range d.Open {
		if f.Path == "" || f.Type == "pipe" {
			branches[f.PID].add("%d: %s", f.Descriptor, cmp.Or(f.Path, f.Type))
			continue
		}
		branches[f.PID].add("%d: %s %s", f.Descriptor, f.Type, f.Path)
	}
	for _, s := range d.Sockets {
		if s.PID != 0 {
			remote := ""
			if s.Remote != "" {
				remote = " to " + needs.Plain(s.Remote)
			}
			branches[s.PID].add("%d: %s %s %s%s", s.Descriptor, s.Protocol, cmp.Or(s.State, s.Type), s.Local, raw(remote))
		}
	}
}

// raw is a text that is fit for a terminal.
type raw string

// write writes what hangs on a branch.
func (b *branch) write(w *bufio.Writer, indent string) {
	for i, next := range b.on {
		mark, further := "├── ", "│   "
		if i == len(b.on)-1 {
			mark, further = "└── ", "    "
		}
		fmt.Fprintf(w, "%s%s%s\n", indent, mark, next.text)
		next.write(w, indent+further)
	}
}
