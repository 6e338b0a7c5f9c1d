package checkpoint

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/pflag"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"sigs.k8s.io/yaml"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
)

// reserve is what must stay free at a location: what the operator wants, or what the kubelet does if that is more. A kubelet evicts pods when its disk
// falls below its hard thresholds, which is worse than no checkpoint.
func (s *Service) reserve(ctx context.Context, path string, bounds Bounds) (*crishimv1.Reserve, error) {
	location, err := archive.OpenLocation(path)
	if err != nil {
		return nil, err
	}
	defer location.Close()
	return s.reserveAt(ctx, location, bounds)
}

func (s *Service) reserveAt(ctx context.Context, location *archive.Location, bounds Bounds) (*crishimv1.Reserve, error) {
	room, err := location.Room()
	if err != nil {
		return nil, err
	}
	r := &crishimv1.Reserve{
		Bytes: bounds.Reserve.of(room.Total), BytesOf: "checkpoint.reserve of the configuration",
		Inodes: bounds.ReserveInodes.of(room.TotalInodes), InodesOf: "checkpoint.reserve_inodes of the configuration",
	}
	for _, kubelet := range kubelets() {
		fileSystems := map[string]bool{"nodefs": location.Shares(kubelet.rootDir)}
		if kubelet.evictionHard["imagefs.available"] != "" || kubelet.evictionHard["imagefs.inodesFree"] != "" {
			fileSystems["imagefs"] = s.holdsImages(ctx, location)
		}
		for name, here := range fileSystems {
			if !here {
				continue
			}
			if n := threshold(kubelet.evictionHard[name+".available"], room.Total); n > r.Bytes {
				r.Bytes, r.BytesOf = n, "evictionHard "+name+".available of the kubelet"
			}
			if n := threshold(kubelet.evictionHard[name+".inodesFree"], room.TotalInodes); n > r.Inodes {
				r.Inodes, r.InodesOf = n, "evictionHard "+name+".inodesFree of the kubelet"
			}
		}
	}
	return r, nil
}

// threshold is the number that a kubelet's threshold stands for, 0 for none.
func threshold(value string, total int64) int64 {
	amount, err := ParseAmount(value)
	if err != nil {
		return 0
	}
	return amount.of(total)
}

// holdsImages tells whether the runtime has its images on the file system of a location.
func (s *Service) holdsImages(ctx context.Context, location *archive.Location) bool {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	info, err := s.config().Images.ImageFsInfo(ctx, &runtimeapi.ImageFsInfoRequest{})
	if err != nil {
		return false
	}
	for _, fs := range info.GetImageFilesystems() {
		if location.Shares(fs.GetFsId().GetMountpoint()) {
			return true
		}
	}
	return false
}

// layerSize asks the runtime how much room a container's writable layer takes, in bytes. It knows as of some seconds ago, which spares us a look at
// each file; 0 where it does not know.
func (s *Service) layerSize(ctx context.Context, id string) int64 {
	ctx, cancel := context.WithTimeout(ctx, 2*time.Second)
	defer cancel()
	answer, err := s.config().Runtime.ContainerStats(ctx, &runtimeapi.ContainerStatsRequest{ContainerId: id})
	if err != nil {
		s.config().Log.Debugf("the size of the writable layer of container %s is not known: %v", id, err)
		return 0
	}
	return int64(answer.GetStats().GetWritableLayer().GetUsedBytes().GetValue())
}

// kubelet is what the command line of a running kubelet, and its configuration, say of room.
type kubelet struct {
	rootDir      string
	evictionHard map[string]string // thresholds by their signals, such as nodefs.available
}

// kubelets finds the node's kubelet, by its command line. It takes a process for it that runs as root and has our own mounts, so that no container
// can pass itself off as one, and paths mean what they mean to us. What cannot be read is left out.
func kubelets() []kubelet {
	mounts, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return nil
	}
	dirs, _ := filepath.Glob("/proc/[0-9]*") // the pattern is well-formed
	var found []kubelet
	for _, dir := range dirs {
		content, err := os.ReadFile(filepath.Join(dir, "cmdline"))
		args := strings.Split(strings.TrimSuffix(string(content), "\x00"), "\x00")
		if err != nil || !strings.HasPrefix(filepath.Base(args[0]), "kubelet") {
			continue
		}
		status, err := os.ReadFile(filepath.Join(dir, "status"))
		if err != nil || !strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
			continue
		}
		if theirs, err := os.Readlink(filepath.Join(dir, "ns/mnt")); err != nil || theirs != mounts {
			continue
		}
		found = append(found, readKubelet(args[1:]))
	}
	return found
}

// readKubelet reads a kubelet's command line, and the files that it names. As in the kubelet, a flag wins over the file, whose thresholds are all
// that there are.
func readKubelet(args []string) kubelet {
	var k kubelet
	var config, configDir, evictionHard string
	flags := pflag.NewFlagSet("kubelet", pflag.ContinueOnError)
	flags.ParseErrorsAllowlist.UnknownFlags = true
	flags.Usage = func() {}
	flags.StringVar(&k.rootDir, "root-dir", "/var/lib/kubelet", "")
	flags.StringVar(&config, "config", "", "")
	flags.StringVar(&configDir, "config-dir", "", "")
	flags.StringVar(&evictionHard, "eviction-hard", "", "")
	_ = flags.Parse(args) // what was parsed counts
	for setting := range strings.SplitSeq(evictionHard, ",") {
		if signal, value, ok := strings.Cut(setting, "<"); ok {
			k.add(map[string]string{signal: value})
		}
	}
	if k.evictionHard == nil {
		dropIns, _ := filepath.Glob(filepath.Join(configDir, "*.conf")) // in order of their names
		for _, file := range append([]string{config}, dropIns...) {
			var c struct {
				EvictionHard map[string]string `json:"evictionHard"`
			}
			if content, err := os.ReadFile(file); err == nil && yaml.Unmarshal(content, &c) == nil {
				k.add(c.EvictionHard)
			}
		}
	}
	if k.evictionHard == nil {
		// See k8s.io/kubernetes/pkg/kubelet/eviction/defaults_linux.go.
		k.evictionHard = map[string]string{
			"nodefs.available": "10%", "nodefs.inodesFree": "5%", "imagefs.available": "15%", "imagefs.inodesFree": "5%",
		}
	}
	return k
}

func (k *kubelet) add(thresholds map[string]string) {
	if k.evictionHard == nil && len(thresholds) > 0 {
		k.evictionHard = map[string]string{}
	}
	maps.Copy(k.evictionHard, thresholds)
}
