package checkpoint

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"

	"github.com/dustin/go-humanize"
)

// Bounds are what the operator lets a checkpoint take from the node and from the container. The zero value reserves nothing of its own.
type Bounds struct {
	// Reserve is what is never used up of the file system of a location, in bytes, and ReserveInodes the same in inodes. Where the kubelet's
	// hard thresholds for eviction can be read, and ask for more, it is that much.
	Reserve, ReserveInodes Amount
	// MaxFrozen is how long a container may stand still; 0 for no bound.
	MaxFrozen time.Duration
	// Parallel is how many checkpoints run on a node at once, 0 for 2; others wait within their deadline. Each writes a container's whole memory
	// to one disk, so more of them would only freeze more containers for longer.
	Parallel int
}

// Amount is a part of what a file system has: a share of it, or a number of bytes or inodes.
type Amount struct {
	share  float64 // from 0 to 1
	number int64
}

// ParseAmount reads a percentage, such as 15%, or a number, such as 20Gi or 500k, as the kubelet's thresholds are written.
func ParseAmount(text string) (Amount, error) {
	if percent, ok := strings.CutSuffix(text, "%"); ok {
		n, err := strconv.ParseFloat(percent, 64)
		if err != nil || !(0 <= n && n <= 100) {
			return Amount{}, fmt.Errorf("%q: a percentage is from 0%% to 100%%", text)
		}
		return Amount{share: n / 100}, nil
	}
	// To the kubelet a final m is a thousandth.
	n, err := humanize.ParseBytes(text)
	if err != nil || n > math.MaxInt64 || strings.HasSuffix(text, "m") {
		return Amount{}, fmt.Errorf("%q: it is a percentage, such as 15%%, or a number, such as 20Gi", text)
	}
	return Amount{number: int64(n)}, nil
}

// Parts returns the share, from 0 to 1, and the number, of which one is 0.
func (a Amount) Parts() (share float64, number int64) { return a.share, a.number }

// of returns the amount of something of which there is so much in all.
func (a Amount) of(total int64) int64 {
	return a.number + int64(a.share*float64(total))
}
