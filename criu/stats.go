package criu

import (
	"fmt"
	"os"
	"time"

	"github.com/checkpoint-restore/go-criu/v7/stats"
)

// Stats is what CRIU measured of a dump.
type Stats struct {
	Freezing     time.Duration // until all tasks stood still
	Frozen       time.Duration // from then until they went on
	MemoryDump   time.Duration // of that, until all pages were taken from the tasks
	PagesWritten uint64        // of 4 KiB on amd64
}

// readStats reads stats-dump, which CRIU writes at the end of a dump that succeeded.
func readStats(work *os.File) (Stats, error) {
	// go-criu goes by the name of the directory; this one holds whatever the directory is called meanwhile.
	dir, err := os.Open(descriptorPath(work))
	if err != nil {
		return Stats{}, fmt.Errorf("read stats-dump: %w", err)
	}
	defer dir.Close()
	s, err := stats.CriuGetDumpStats(dir)
	if err != nil {
		return Stats{}, fmt.Errorf("read stats-dump: %w", err)
	}
	microseconds := func(n uint32) time.Duration { return time.Duration(n) * time.Microsecond }
	return Stats{
		Freezing:     microseconds(s.GetFreezingTime()),
		Frozen:       microseconds(s.GetFrozenTime()),
		MemoryDump:   microseconds(s.GetMemdumpTime()),
		PagesWritten: s.GetPagesWritten(),
	}, nil
}
