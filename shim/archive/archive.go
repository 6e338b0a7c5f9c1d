// Package archive makes a checkpoint archive appear: it checks the location at
// which it is wanted, gives out a hidden staging directory beside it, writes the
// tar from what was staged, and publishes it with one rename.
//
// It promises that an archive is whole or not there. It appears at its location
// complete, synced to disk, mode 0600 and root's, and nothing that exists is
// replaced. Until then everything lies in the staging directory, which Remove
// deletes without a trace.
//
// The other way, Verify reads an archive, whoever has written it, and tells whether
// it is sound, and Open lets its members be read.
//
// It never follows a symbolic link that anyone but root could have made, never
// writes by path (what was checked is held by its descriptor), and knows nothing
// of CRI or of CRIU's process: what the members mean is its callers' affair.
package archive

import "time"

// The names of an archive's members, as its readers (containerd, CRI-O, podman,
// checkpointctl, the kubelet's end-to-end test) expect them.
const (
	ConfigDump   = "config.dump"           // JSON of Config
	SpecDump     = "spec.dump"             // the bundle's OCI config.json, verbatim
	StatusDump   = "status.dump"           // JSON of the CRI ContainerStatus
	BindMounts   = "bind.mounts"           // JSON array of BindMount
	DeletedFiles = "deleted.files"         // JSON array of paths
	StatsDump    = "stats-dump"            // CRIU's statistics
	RootfsDiff   = "rootfs-diff.tar"       // changes to the root file system
	DevShm       = "devshm-checkpoint.tar" // content of /dev/shm
	ContainerLog = "container.log"         // the container's log in the CRI's format, as containerd names it
	ImagesDir    = "checkpoint"            // the directory of CRIU's images
)

// Config is the content of config.dump. Its times are written as RFC 3339.
type Config struct {
	ID               string    `json:"id"`
	Name             string    `json:"name"`
	RootfsImage      string    `json:"rootfsImage,omitempty"`     // as the pod names it
	RootfsImageRef   string    `json:"rootfsImageRef,omitempty"`  // repo@sha256:… for containerd, an image ID for CRI-O
	RootfsImageName  string    `json:"rootfsImageName,omitempty"` // for people
	RootfsImageID    string    `json:"rootfsImageID,omitempty"`   // 64 hexadecimal digits: podman needs it
	Runtime          string    `json:"runtime,omitempty"`         // the OCI runtime, such as runc
	CreatedTime      time.Time `json:"createdTime"`
	CheckpointedTime time.Time `json:"checkpointedTime"`
	RestoredTime     time.Time `json:"restoredTime"`
	Restored         bool      `json:"restored"`
}

// Status is of status.dump what is of interest here.
type Status struct {
	Labels map[string]string `json:"labels"` // those of a kubelet name container, pod and namespace
}

// BindMount is an element of bind.mounts: a mount point that a restorer must
// provide before CRIU can put a bind mount on it.
type BindMount struct {
	Source      string `json:"source"`
	Destination string `json:"destination"`
	FileType    string `json:"file_type"` // "directory" or "file"
	Permissions uint32 `json:"permissions"`
}
