// Package needs tells what a machine must have so that a checkpoint can be restored on it: from the metadata of an archive, and
// from CRIU's images where only they know. It reads archives of any origin, of which nothing is trusted.
package needs

import (
	"cmp"
	"fmt"
	"io"
	"net/netip"
	"regexp"
	"slices"
	"strings"
	"unicode"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	filelock "github.com/checkpoint-restore/go-criu/v7/crit/images/file-lock"
	"github.com/checkpoint-restore/go-criu/v7/crit/images/pstree"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"crishim/criu/image"
	"crishim/shim/archive"
)

// Need is one thing that a restore asks of a machine.
type Need struct {
	Item string `json:"item"` // such as "runtime" or "mount"
	Text string `json:"text"` // a line for people
}

// Images gathers what CRIU's images say. The zero value is ready; Look is for archive.Verify.
type Images struct {
	criu, kernel string // from CRIU's log
	pids         []uint32
	connections  int
	addresses    []netip.Addr // of this end of connections, loopback left out
	locks        int
	shm          bool // the archive has the content of /dev/shm
}

// Look reads what is of interest among an archive's members.
func (i *Images) Look(name string, size int64, content io.Reader) error {
	switch name {
	case archive.DevShm:
		i.shm = true
	case "dump.log":
		return i.log(content)
	case archive.ImagesDir + "/files.img":
		return image.Read(content, size, "FILES", i.File)
	case archive.ImagesDir + "/pstree.img":
		return image.Read(content, size, "PSTREE", i.Process)
	case archive.ImagesDir + "/filelocks.img":
		return image.Read(content, size, "FILE_LOCKS", func(*filelock.FileLockEntry) { i.locks++ })
	}
	return nil
}

var (
	criuVersion   = regexp.MustCompile(`(?m)^\(\d+\.\d+\) Version: (\d[\w.]*)`)
	kernelVersion = regexp.MustCompile(`(?m)^\(\d+\.\d+\) Running on node Linux (\d[\w.+-]*)`)
)

// log finds the versions in the first lines of CRIU's log, for archives that do not say.
func (i *Images) log(content io.Reader) error {
	head, err := io.ReadAll(io.LimitReader(content, 16<<10))
	if err != nil {
		return nil // whoever reads on meets it again
	}
	if match := criuVersion.FindSubmatch(head); match != nil {
		i.criu = string(match[1])
	}
	if match := kernelVersion.FindSubmatch(head); match != nil {
		i.kernel = string(match[1])
	}
	return nil
}

// Process is shown an entry of pstree.img by who reads that for more, and does not pass it to Look.
func (i *Images) Process(p *pstree.PstreeEntry) { i.pids = append(i.pids, p.GetPid()) }

// File is the same for files.img. It counts the TCP connections: sockets that are neither closed nor listening, in the states of the kernel's tcp_states.h.
func (i *Images) File(f *fdinfo.FileEntry) {
	const tcpClose, tcpListen = 7, 10
	socket := f.GetIsk()
	if f.GetType() != fdinfo.FdTypes_INETSK || socket.GetProto() != unix.IPPROTO_TCP ||
		socket.GetState() == tcpClose || socket.GetState() == tcpListen {
		return
	}
	i.connections++
	if address := image.Address(socket.GetFamily(), socket.GetSrcAddr()); address.IsValid() && !address.IsLoopback() && !slices.Contains(i.addresses, address) {
		i.addresses = append(i.addresses, address)
	}
}

// List returns what the archive needs, once Verify has found nothing wrong.
func (i *Images) List(report *archive.Report) []Need {
	var needs []Need
	add := func(item, format string, args ...any) {
		needs = append(needs, Need{item, fmt.Sprintf(format, args...)})
	}
	var origin archive.Origin
	if report.Manifest != nil {
		origin = report.Manifest.Origin
	}
	config := report.Config

	add("image", "%s", imageName(config))
	add("runtime", "%s%s; another one may not take its images", runtime(config.Runtime), atTheDump(origin.RuntimeVersion))
	if version := cmp.Or(origin.Criu, i.criu); version != "" {
		add("criu", "%s or later", Plain(version))
	}
	if release := cmp.Or(origin.Kernel, i.kernel); release != "" {
		add("kernel", "Linux %s, or one that has all of it that the processes use", Plain(release))
	}
	if origin.Architecture != "" {
		with := ""
		if len(origin.CPUFeatures) > 0 {
			with = " with " + strings.Join(origin.CPUFeatures, ", ")
		}
		add("cpu", "%s", Plain(origin.Architecture+with))
	}
	if origin.CgroupVersion != 0 {
		add("cgroup", "version %d", origin.CgroupVersion)
	}
	i.namespaces(&report.Spec, add)
	i.mounts(report, add)
	// crun has its own file in later versions only, with later CRIU.
	or := func(option string) string {
		if config.Runtime == "crun" {
			return ""
		}
		return ", or /etc/criu/runc.conf must have the line " + option
	}
	if i.connections > 0 {
		also := ""
		if len(i.addresses) > 0 {
			also = "; the container must have the address " + join(i.addresses)
		}
		add("tcp", "%s: the restorer must be given --tcp-established%s%s", count(i.connections, "open connection"), or("tcp-established"), also)
	}
	if i.locks > 0 {
		add("locks", "%s: to keep them, the restorer must be given --file-locks%s", count(i.locks, "file lock"), or("file-locks"))
	}
	return needs
}

// runtime is the OCI runtime. Where containerd has written the archive, it names its own shim instead.
func runtime(name string) string {
	if name == "" || strings.HasPrefix(name, "io.containerd.") {
		return "the one that it ran on, which the archive does not name"
	}
	return Plain(name)
}

func imageName(c archive.Config) string {
	name, ref := Plain(c.RootfsImageName), Plain(c.RootfsImageRef)
	switch {
	case name == "" && ref == "":
		return "the one that it ran from, which the archive does not name"
	case ref == "" || ref == name:
		return name
	case name == "":
		return ref
	}
	return name + ", that is " + ref
}

func atTheDump(version string) string {
	if version == "" {
		return ""
	}
	return " (" + Plain(version) + " at the dump)"
}

// namespaces are those that do not come back with the container, since they were not its own.
func (i *Images) namespaces(spec *specs.Spec, add func(item, format string, args ...any)) {
	if spec.Linux == nil {
		return
	}
	path := map[specs.LinuxNamespaceType]*string{}
	for _, ns := range spec.Linux.Namespaces {
		path[ns.Type] = &ns.Path
	}
	if path[specs.NetworkNamespace] == nil {
		add("network", "the machine's own, as with hostNetwork")
	}
	switch pid := path[specs.PIDNamespace]; {
	case pid == nil:
		add("processes", "the machine's own process namespace, as with hostPID, in which %s must be free", join(i.pids))
	case *pid != "":
		add("processes", "a pod that shares its process namespace, in which %s must be free", join(i.pids))
	}
	if ipc := path[specs.IPCNamespace]; ipc == nil {
		add("ipc", "the machine's own, as with hostIPC")
	}
}

// mounts are the bind mounts, of which the archive has no content.
func (i *Images) mounts(report *archive.Report, add func(item, format string, args ...any)) {
	kinds := map[string]string{}
	for _, b := range report.Binds {
		kinds[b.Destination] = b.FileType
	}
	for _, m := range report.Spec.Mounts {
		if !slices.Contains(m.Options, "bind") && !slices.Contains(m.Options, "rbind") {
			continue
		}
		kind := Plain(cmp.Or(kinds[m.Destination], "directory or file"))
		if m.Destination == "/dev/shm" && i.shm {
			add("mount", "/dev/shm: a %s, whose content the archive has", kind)
			continue
		}
		add("mount", "%s: a %s, which was %s", Plain(m.Destination), kind, Plain(m.Source))
	}
}

func count(n int, what string) string {
	if n == 1 {
		return "1 " + what
	}
	return fmt.Sprintf("%d %ss", n, what)
}

func join[T any](list []T) string {
	const most = 10
	var b strings.Builder
	for n, item := range list[:min(len(list), most)] {
		if n > 0 {
			b.WriteString(", ")
		}
		fmt.Fprint(&b, item)
	}
	if len(list) > most {
		fmt.Fprintf(&b, " and %d more", len(list)-most)
	}
	return b.String()
}

// Plain makes a text from the archive fit for a terminal.
func Plain(text string) string {
	if strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return fmt.Sprintf("%q", text)
	}
	return text
}
