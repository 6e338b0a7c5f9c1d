package checkpoint

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/timestamppb"

	"crishim/criu"
	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
	"crishim/shim/container"
	"crishim/shim/failpoint"
)

// Repair opens the journal, unless it is open, and starts to put right what it tells of: checkpoints that were in flight when a crishim
// died. It returns as soon as their containers are claimed; until theirs is done, requests for them get Aborted, and all others are
// served. An error says why no record can be kept; then there are no checkpoints, and the next request tries again. Drain waits for
// what Repair has started.
func (s *Service) Repair() error {
	if err := s.enter(); err != nil {
		return err
	}
	defer s.running.Done()
	// One after the other: nobody may go past before the containers are claimed.
	s.opening.Lock()
	defer s.opening.Unlock()
	records, err := s.journal.open()
	if err != nil {
		return err
	}
	s.history.Open(s.config().State)
	byContainer := make(map[string][]*crishimv1.Record)
	for _, record := range records {
		id := record.GetJob().GetContainer().GetId()
		byContainer[id] = append(byContainer[id], record)
	}
	for id, records := range byContainer {
		leave, err := s.claim(id, errRepairing)
		if err != nil {
			continue // it is this process's own, and goes on
		}
		s.running.Go(func() {
			defer leave()
			for _, record := range records {
				s.repair(record)
			}
		})
	}
	return nil
}

// repair puts right what one checkpoint has left, and tells of it.
func (s *Service) repair(record *crishimv1.Record) {
	job := record.GetJob()
	log := s.config().Log.WithFields(logrus.Fields{"container": job.GetContainer().GetId(), "location": job.GetLocation()})
	failpoint.Hit("repair begun")
	done, err := repair(s.closing, record, log)
	failpoint.Hit("repair done")
	if tell := s.config().Repaired; tell != nil && s.closing.Err() == nil {
		tell(err)
	}
	if err != nil {
		log.Errorf("a checkpoint was in flight when crishim died: %s; %v: %v (its record is %s; remove it where this is no longer of interest)",
			done, errLeft, err, s.journal.path(record))
		return
	}
	log.Warnf("a checkpoint was in flight when crishim died: %s; nothing partial of it is left", done)
	s.remember(record, done)
	s.journal.end(record, false)
}

// remember puts a checkpoint into the history that was in flight when crishim died. Whether an archive at its location is its own nobody
// knows for certain: it is not for Delete.
func (s *Service) remember(record *crishimv1.Record, done string) {
	c := record.GetCheckpoint()
	if c.GetId() == "" {
		return // of an earlier version
	}
	c.Code, c.Message, c.End = int32(codes.Aborted), "crishim died over it: "+oneLine(done, maxMessage), timestamppb.Now()
	if info, err := os.Lstat(c.GetLocation()); err == nil {
		c.Code, c.Size = int32(codes.OK), info.Size()
	}
	s.history.Add(c)
}

// repair says what it has found and done, in words for people.
func repair(ctx context.Context, record *crishimv1.Record, log logrus.FieldLogger) (string, error) {
	boot, err := bootID()
	if err != nil {
		return "nothing was done yet", err
	}
	var said []string
	orphan := false
	sameBoot := boot == record.GetBootId()
	if !sameBoot {
		said = append(said, "the machine was restarted since")
	} else if orphan, err = awaitHelper(ctx, record, log); err != nil {
		return "nothing was done yet", err
	}
	if orphan {
		said = append(said, "its criu was told to roll back, and has ended")
	}
	// criu's statistics are the last that it writes.
	work := stagingPath(record)
	broken := sameBoot && !orphan && exists(filepath.Join(work, criu.LogFile)) && !exists(filepath.Join(work, archive.StatsDump))
	staged := exists(work)
	done, err := undo(ctx, record)
	if staged && !exists(work) {
		said = append(said, "crishim removed its staging directory")
	}
	if done != "" {
		said = append(said, "crishim "+done)
	}
	if exists(record.GetJob().GetLocation()) {
		said = append(said, "there is an archive at its location, and an archive is whole")
	}
	if sameBoot {
		runs := "the container runs on"
		if gone := processOf(record.GetJob().GetContainer()).Verify(); gone != nil {
			runs = gone.Error()
		}
		if broken {
			runs += mayHaveChanged
		}
		said = append(said, runs)
	}
	return strings.Join(said, "; "), err
}

// awaitHelper returns when neither the helper of a record lives, which puts everything right by itself once its daemon is dead, nor
// its criu, and says whether that was an orphan. It is for records of this boot. No time is set: as long as one of the two is at
// work, nobody else may be.
func awaitHelper(ctx context.Context, record *crishimv1.Record, log logrus.FieldLogger) (orphan bool, err error) {
	pid := int(record.GetHelperPid())
	if err := awaitProcess(ctx, pid, record.GetHelperStartTime(), func() {
		log.Warnf("a checkpoint was in flight when crishim died; its helper, process %d, is about to roll it back: waiting for its end", pid)
	}); err != nil {
		return false, err
	}
	// The helper's pid was the number of its session, and the kernel gives it to nobody as long as a process of the session is left. So
	// if a process has it now, none is left. If none has it, whatever is in the session was started by the helper, or by one that has
	// had the number since and is dead, too. The one such that runs this very criu is another orphan.
	if _, err := container.FindProcess(pid); !errors.Is(err, container.ErrNotRunning) {
		return false, err
	}
	return stopOrphan(ctx, record)
}

// awaitProcess waits for the end of the process that has a pid and a start time, and calls waiting before if there is one.
func awaitProcess(ctx context.Context, pid int, startTime uint64, waiting func()) error {
	pidfd, err := unix.PidfdOpen(pid, 0)
	// EINVAL, or ENOENT in later kernels: a thread of another process has the number.
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("look for checkpoint helper: %w", err)
	}
	defer unix.Close(pidfd)
	now, err := container.FindProcess(pid)
	if errors.Is(err, container.ErrNotRunning) || err == nil && now.StartTime != startTime {
		return nil
	}
	if err != nil {
		return err
	}
	waiting()
	for {
		const interval = 100 // ms between two looks at the context
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, interval)
		switch {
		case n > 0:
			return nil
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for checkpoint helper, process %d: %w", pid, err)
		case ctx.Err() != nil:
			return fmt.Errorf("wait for checkpoint helper, process %d: %w", pid, context.Cause(ctx))
		}
	}
}

// stopOrphan has the criu of a helper that has died roll back, and waits for its end. It says whether there was one.
func stopOrphan(ctx context.Context, record *crishimv1.Record) (found bool, err error) {
	job := record.GetJob()
	return criu.StopOrphan(ctx, job.GetCriu(), job.GetContainer().GetFreezer(), int(record.GetHelperPid()))
}

// undo removes what a helper and its criu have left that are both dead: on the container, and on the disk. It does as much as it can,
// and says in words for people what it has done to the container. It may be done more than once, as when crishim dies over it.
func undo(ctx context.Context, record *crishimv1.Record) (done string, err error) {
	job := record.GetJob()
	left := criuContainer(job.GetContainer()).Leftovers(time.Unix(0, record.GetBeginNs()), filepath.Join(stagingPath(record), criu.LogFile))
	boot, err := bootID()
	if err != nil {
		return "", err
	}
	if boot != record.GetBootId() {
		left.Freezer = ""
	}
	if boot != record.GetBootId() || !sameNetwork(job.GetContainer()) {
		left.Network = ""
	}
	done, err = left.Remove(ctx)
	return done, errors.Join(err, archive.Discard(job.GetLocation(), job.GetStaging()))
}

// sameNetwork says whether the path of the container's network still is the one of that: it may go through a process that has ended, and
// whose pid another has by now.
func sameNetwork(c *crishimv1.Container) bool {
	for _, ns := range c.GetSharedNamespaces() {
		if ns.GetType() == "network" {
			var st unix.Stat_t
			return unix.Stat(c.GetNetwork(), &st) == nil && st.Ino == ns.GetInode()
		}
	}
	return !strings.HasPrefix(c.GetNetwork(), fmt.Sprintf("/proc/%d/", c.GetPid())) || processOf(c).Verify() == nil
}

func stagingPath(record *crishimv1.Record) string {
	return filepath.Join(filepath.Dir(record.GetJob().GetLocation()), record.GetJob().GetStaging())
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
