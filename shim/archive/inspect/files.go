package inspect

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/checkpoint-restore/go-criu/v7/crit/images/fdinfo"
	skinet "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-inet"
	skunix "github.com/checkpoint-restore/go-criu/v7/crit/images/sk-unix"
	"golang.org/x/sys/unix"

	"crishim/criu/image"
)

// file is an open file, of which there may be any number of descriptors.
type file struct {
	OpenFile
	socket *Socket
	inode  uint32 // of a unix socket, and of its peer, or of a memory file
	peer   uint32
	named  uint32 // id of the file that has its path
}

func (c *collector) file(e *fdinfo.FileEntry) error {
	c.needs.File(e)
	f := file{OpenFile: OpenFile{Type: strings.ToLower(e.GetType().String())}}
	switch e.GetType() {
	case fdinfo.FdTypes_REG:
		r := e.GetReg()
		f.Type, f.Path, f.Access, f.Position = fileType(r.GetMode()), text(r.GetName()), access(r.GetFlags()), int64(r.GetPos())
		f.External = r.GetExt()
	case fdinfo.FdTypes_PIPE:
		p := e.GetPipe()
		f.Path, f.Access = fmt.Sprintf("pipe:[%d]", p.GetPipeId()), access(p.GetFlags())
	case fdinfo.FdTypes_FIFO:
		f.named = e.GetFifo().GetRegfId()
	case fdinfo.FdTypes_TTY:
		f.named = e.GetTty().GetRegfId()
	case fdinfo.FdTypes_MEMFD:
		m := e.GetMemfd()
		f.inode, f.Access, f.Position = m.GetInodeId(), access(m.GetFlags()), int64(m.GetPos())
	case fdinfo.FdTypes_EXT:
		f.Type, f.External = "external", true
	case fdinfo.FdTypes_INETSK:
		f.socket = inetSocket(e.GetIsk())
	case fdinfo.FdTypes_UNIXSK:
		u := e.GetUsk()
		f.socket, f.inode, f.peer = unixSocket(u), u.GetIno(), u.GetPeer()
	case fdinfo.FdTypes_NETLINKSK:
		f.socket = &Socket{Protocol: "netlink", Type: socketType(unix.SOCK_RAW)}
	case fdinfo.FdTypes_PACKETSK:
		f.socket = &Socket{Protocol: "packet", Type: socketType(e.GetPsk().GetType())}
	}
	c.files[e.GetId()] = f
	c.left -= 4 * listed // a descriptor's description is made of it
	return c.keep(f.Path)
}

func fileType(mode uint32) string {
	switch mode & unix.S_IFMT {
	case unix.S_IFDIR:
		return "directory"
	case unix.S_IFCHR, unix.S_IFBLK:
		return "device"
	}
	return "file"
}

// access is what a descriptor was opened for, by the flags of open.
func access(flags uint32) string {
	if flags&unix.O_PATH != 0 {
		return "path"
	}
	mode := map[uint32]string{unix.O_RDONLY: "r", unix.O_WRONLY: "w", unix.O_RDWR: "rw"}[flags&unix.O_ACCMODE]
	if flags&unix.O_APPEND != 0 {
		mode += "a"
	}
	return mode
}

func inetSocket(s *skinet.InetSkEntry) *Socket {
	protocol := map[uint32]string{
		unix.IPPROTO_TCP: "tcp", unix.IPPROTO_UDP: "udp", unix.IPPROTO_UDPLITE: "udplite", unix.IPPROTO_ICMP: "icmp", unix.IPPROTO_RAW: "raw",
	}[s.GetProto()]
	if protocol == "" {
		protocol = fmt.Sprintf("protocol %d", s.GetProto())
	}
	if s.GetFamily() == unix.AF_INET6 {
		protocol += "6"
	}
	socket := &Socket{Protocol: protocol, Type: socketType(s.GetType())}
	if s.GetProto() == unix.IPPROTO_TCP {
		socket.State = tcpState(s.GetState())
	}
	socket.Local = endpoint(s.GetFamily(), s.GetSrcAddr(), s.GetSrcPort())
	if s.GetDstPort() != 0 {
		socket.Remote = endpoint(s.GetFamily(), s.GetDstAddr(), s.GetDstPort())
	}
	return socket
}

func endpoint(family uint32, words []uint32, port uint32) string {
	address := image.Address(family, words)
	if !address.IsValid() {
		return fmt.Sprintf("port %d", port)
	}
	return netip.AddrPortFrom(address, uint16(port)).String()
}

func unixSocket(s *skunix.UnixSkEntry) *Socket {
	socket := &Socket{Protocol: "unix", Type: socketType(s.GetType()), State: tcpState(s.GetState())}
	name := string(s.GetName())
	if abstract, ok := strings.CutPrefix(name, "\x00"); ok {
		name = "@" + abstract
	}
	socket.Local = text(strings.TrimRight(name, "\x00"))
	return socket
}

// tcpState names the states of the kernel's tcp_states.h, which unix sockets have, too.
func tcpState(state uint32) string {
	names := []string{"", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "closed", "close-wait", "last-ack", "listening", "closing"}
	if state < uint32(len(names)) {
		return names[state]
	}
	return fmt.Sprintf("state %d", state)
}

func socketType(kind uint32) string {
	name := map[uint32]string{unix.SOCK_STREAM: "stream", unix.SOCK_DGRAM: "dgram", unix.SOCK_RAW: "raw", unix.SOCK_SEQPACKET: "seqpacket"}[kind]
	if name == "" {
		return fmt.Sprintf("type %d", kind)
	}
	return name
}
