package matrix

import (
	"context"
	"os"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/test/node"
)

// programRows are programs that people run, as Debian packages them. What they say of their state comes over connections that were
// made before the dump.
func programRows() []row {
	programs := &program{
		image: node.ProgramsImage, command: []string{"/usr/bin/python3", "/programs/main.py"}, ready: "holding", state: ask,
	}
	return []row{
		{name: "Python, Node.js, Redis", what: "an interpreter, a JIT compiler and a database with data, and TCP connections between them",
			program: programs, alone: true, before: writeProfile,
			container: func(c *cri.ContainerConfig) {
				c.Linux.SecurityContext.Seccomp = &cri.SecurityProfile{
					ProfileType: cri.SecurityProfile_Localhost, LocalhostRef: withoutIOURing,
				}
			}},
	}
}

// withoutIOURing is a seccomp profile that denies io_uring: CRIU cannot dump it, and libuv 1.49 and later use it whatever their
// users say.
const withoutIOURing = "/data/without-io-uring.json"

func writeProfile(_ context.Context, _ *testing.T, s *site) (func() error, error) {
	const profile = `{
	"defaultAction": "SCMP_ACT_ALLOW",
	"syscalls": [{"names": ["io_uring_setup"], "action": "SCMP_ACT_ERRNO", "errnoRet": 38}]
}`
	return nil, os.WriteFile(s.first.Path(withoutIOURing), []byte(profile), 0o600)
}
