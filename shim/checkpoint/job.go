package checkpoint

import (
	"encoding/json"
	"fmt"
	"time"

	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
)

// newJob puts together what the helper needs, among it the members of the archive that are known before the dump.
func newJob(location string, features criu.Features, c *container.Container, imageID string, origin archive.Origin) (*crishimv1.Job, error) {
	members, err := metadata(c, imageID, origin, time.Now())
	if err != nil {
		return nil, err
	}
	job := &crishimv1.Job{
		Location:    location,
		Criu:        features.Path,
		CriuVersion: int32(features.Version),
		Members:     members,
		Staging:     archive.StagingName(),
		Container: &crishimv1.Container{
			Id:             c.Status.GetId(),
			Pid:            int32(c.Process.Pid),
			StartTime:      c.Process.StartTime,
			Cgroup:         c.Process.Cgroup,
			Runtime:        c.Runtime,
			Rootfs:         c.Rootfs,
			Freezer:        c.Freezer,
			ExternalMounts: c.ExternalMounts,
			MaskedFiles:    c.MaskedFiles,
			Descriptors:    c.Descriptors,
			Log:            c.Log,
			Shm:            c.Shm,
			Network:        c.Network,
		},
	}
	if l := c.Layer; l != nil {
		job.Container.Layer = &crishimv1.Layer{Upper: l.Upper, Lower: l.Lower, UserXattr: l.UserXattr}
	}
	for _, ns := range c.SharedNamespaces {
		job.Container.SharedNamespaces = append(job.Container.SharedNamespaces,
			&crishimv1.Namespace{Type: ns.Type, Inode: ns.Inode})
	}
	for _, m := range c.BindMounts {
		job.Container.BindMounts = append(job.Container.BindMounts,
			&crishimv1.BindMount{Source: m.Source, Destination: m.Destination})
	}
	return job, nil
}

// metadata makes the members by which readers and restorers know what they have before them.
func metadata(c *container.Container, imageID string, origin archive.Origin, now time.Time) ([]*crishimv1.Member, error) {
	members := []*crishimv1.Member{{Name: archive.SpecDump, Content: c.Spec}}
	for _, m := range []struct {
		name  string
		value any
	}{
		{archive.ConfigDump, archive.Config{
			ID:               c.Status.GetId(),
			Name:             c.Status.GetMetadata().GetName(),
			RootfsImage:      c.Status.GetImage().GetImage(),
			RootfsImageRef:   c.Status.GetImageRef(),
			RootfsImageName:  imageName(c.Status.GetImage()),
			RootfsImageID:    imageID,
			Runtime:          c.Runtime,
			CreatedTime:      time.Unix(0, c.Status.GetCreatedAt()),
			CheckpointedTime: now,
		}},
		// encoding/json and not protojson: containerd reads it back by the Go names of the CRI's fields.
		{archive.StatusDump, c.Status},
		{archive.ManifestName, archive.NewManifest(origin)},
	} {
		content, err := json.Marshal(m.value)
		if err != nil {
			return nil, fmt.Errorf("write %s: %w", m.name, err)
		}
		members = append(members, &crishimv1.Member{Name: m.name, Content: content})
	}
	return members, nil
}

// imageName is the image as its user called it, where the runtime still knows.
func imageName(image *runtimeapi.ImageSpec) string {
	if name := image.GetUserSpecifiedImage(); name != "" {
		return name
	}
	return image.GetImage()
}
