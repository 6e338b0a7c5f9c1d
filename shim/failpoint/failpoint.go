//go:build failpoint

package failpoint

import (
	"os"
	"runtime"

	"golang.org/x/sys/unix"
)

// Hit stops the process if File names the point, until somebody has it go on.
func Hit(name string) {
	if wanted, err := os.ReadFile(File); err != nil || string(wanted) != name {
		return
	}
	// A signal to this very thread stops it before it does anything else, and all others with it.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Tgkill(unix.Getpid(), unix.Gettid(), unix.SIGSTOP); err != nil {
		panic(err)
	}
}
