package checkpoint_test

import (
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/shim/archive"
	"crishim/shim/archive/needs"
	"crishim/test/node"
)

// An archive says of itself where it comes from, and is what it says.
func TestArchiveTellsItsOrigin(t *testing.T) {
	for _, handler := range []string{"runc", "crun"} {
		t.Run(handler, func(t *testing.T) {
			containerd, crishim := serve(t)
			c := containerd.Run(t, node.Spec{Handler: handler, Command: []string{"/bin/workload", "tcp"}})
			node.WaitCount(t, 0, c.Log)
			path := location(t)
			if _, err := crishim.CheckpointContainer(t.Context(), &runtimeapi.CheckpointContainerRequest{ContainerId: c.ID, Location: path}); err != nil {
				t.Fatal(err)
			}
			file, err := os.Open(path)
			if err != nil {
				t.Fatal(err)
			}
			defer file.Close()
			var images needs.Images
			report, err := archive.Verify(t.Context(), file, images.Look)
			if err != nil {
				t.Fatal(err)
			}
			if report.Problems != nil || report.Manifest == nil {
				t.Fatalf("manifest %v, problems %q", report.Manifest, report.Problems)
			}
			release, err := os.ReadFile("/proc/sys/kernel/osrelease")
			if err != nil {
				t.Fatal(err)
			}
			version, err := exec.CommandContext(t.Context(), handler, "--version").Output()
			if err != nil {
				t.Fatal(err)
			}
			cgroup := 1
			if _, err := os.Stat("/sys/fs/cgroup/cgroup.controllers"); err == nil {
				cgroup = 2
			}
			origin := report.Manifest.Origin
			if origin.Kernel != strings.TrimSpace(string(release)) || origin.Architecture != runtime.GOARCH || len(origin.CPUFeatures) == 0 ||
				origin.RuntimeVersion == "" || !strings.HasPrefix(string(version), handler+" version "+origin.RuntimeVersion+"\n") ||
				!regexp.MustCompile(`^4\.\d`).MatchString(origin.Criu) || origin.Crishim != "test" || origin.CgroupVersion != cgroup {
				t.Errorf("origin is %+v", origin)
			}
			if !regexp.MustCompile(`^[0-9a-f]{64}$`).MatchString(report.Config.RootfsImageID) {
				t.Errorf("image's id is %q", report.Config.RootfsImageID)
			}
			for _, need := range images.List(report) {
				if need.Item == "tcp" && strings.HasPrefix(need.Text, "2 open connections") {
					return
				}
			}
			t.Errorf("the two ends of a connection are not among the needs: %q", images.List(report))
		})
	}
}
