// Package retention decides which archives of a directory are to go, and removes them.
//
// It promises to remove nothing else: no file that its caller does not know for an archive, none that somebody is reading, none that has a file NAME.keep
// beside it, none that has been replaced since it was looked at. It knows directories and files only, and never follows a link.
package retention

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Policy is what may stay in one directory. What is 0 is no bound.
type Policy struct {
	PerContainer int           // archives of one container, those that are pinned aside
	Bytes        int64         // of all archives
	Share        float64       // the same, as a part of the file system, from 0 to 1
	Age          time.Duration // since the checkpoint
}

// Removal is an archive that is to go, and why.
type Removal struct {
	Archive
	Why string
}

// Plan says which archives are to go, the oldest first, on a file system of so many bytes. Pinned ones stay, and so do those that are being read, for
// which no younger one goes. The youngest of all goes for its age alone: who has asked for it is about to fetch it.
func (p Policy) Plan(archives []Archive, fileSystem int64, now time.Time) []Removal {
	archives = slices.SortedFunc(slices.Values(archives), func(a, b Archive) int {
		return cmp.Or(a.Made.Compare(b.Made), strings.Compare(a.Name, b.Name))
	})
	why := make([]string, len(archives)) // of those that are to go
	// mark goes through archives from the oldest on, for as long as there is too much.
	mark := func(tooMuch func(i int) string) {
		for i, a := range archives {
			if a.Pinned || why[i] != "" {
				continue
			}
			if reason := tooMuch(i); reason != "" && !a.Read {
				why[i] = reason
			}
		}
	}

	if p.Age > 0 {
		mark(func(i int) string {
			if now.Sub(archives[i].Made) <= p.Age {
				return ""
			}
			return fmt.Sprintf("it is older than %s", p.Age)
		})
	}
	if p.PerContainer > 0 {
		count := map[string]int{}
		for i, a := range archives {
			if !a.Pinned && why[i] == "" {
				count[a.Container]++
			}
		}
		mark(func(i int) string {
			container := archives[i].Container
			if count[container]--; count[container] < p.PerContainer {
				return ""
			}
			return fmt.Sprintf("of its container at most %d stay, and %d are younger", p.PerContainer, count[container])
		})
	}
	if limit := p.limit(fileSystem); limit > 0 {
		var sum int64
		for i, a := range archives {
			if why[i] == "" {
				sum += a.Size
			}
		}
		mark(func(i int) string {
			if sum <= limit || i == len(archives)-1 {
				return ""
			}
			reason := fmt.Sprintf("the archives have %s in all, and %s stay", humanize.IBytes(uint64(sum)), humanize.IBytes(uint64(limit)))
			sum -= archives[i].Size // also of one that is being read, which goes the next time
			return reason
		})
	}

	var removals []Removal
	for i, a := range archives {
		if why[i] != "" {
			removals = append(removals, Removal{a, why[i]})
		}
	}
	return removals
}

// limit is how many bytes may stay, 0 for any number.
func (p Policy) limit(fileSystem int64) int64 {
	share := int64(p.Share * float64(fileSystem))
	if p.Bytes == 0 || share > 0 && share < p.Bytes {
		return share
	}
	return p.Bytes
}
