package shim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/sirupsen/logrus"

	"crishim/shim/archive"
	"crishim/shim/monitor"
	"crishim/shim/retention"
)

// Retention says which archives are removed, and where: nowhere else.
type Retention struct {
	Directories []string // each with the archives in it, and none below it, by itself
	Policy      retention.Policy
	DryRun      bool // they are named in the log, and stay
}

// Planned is what is to be removed of a directory, as of the moment at which it was looked at.
type Planned struct {
	Archives []retention.Archive
	Removals []retention.Removal
	Foreign  []retention.Foreign // what has an archive's name and is none, and so stays

	dir *os.File
}

// Plan looks at a directory. The caller closes what it returns.
func (r Retention) Plan(path string) (*Planned, error) {
	dir, err := archive.OpenDirectory(path)
	if err != nil {
		return nil, err
	}
	p := &Planned{dir: dir}
	p.Archives, p.Foreign, err = retention.Look(dir, func(file *os.File) (string, time.Time, error) {
		identity, err := archive.Identify(file)
		return identity.Container, identity.Made, err
	})
	size, sizeErr := retention.FileSystem(dir)
	if err := errors.Join(err, sizeErr); err != nil {
		dir.Close()
		return nil, fmt.Errorf("plan retention in %s: %w", path, err)
	}
	p.Removals = r.Policy.Plan(p.Archives, size, time.Now())
	return p, nil
}

// Close lets go of the directory.
func (p *Planned) Close() error { return p.dir.Close() }

// retainer removes old archives in a goroutine of its own. changed and written may be called at any time by anybody.
type retainer struct {
	rules   atomic.Pointer[Retention]
	wake    chan struct{}
	monitor *monitor.Monitor // is told of what there is, and what is removed; set before run
	log     logrus.FieldLogger
}

func newRetainer(rules Retention, log logrus.FieldLogger) *retainer {
	r := &retainer{wake: make(chan struct{}, 1), log: log}
	r.changed(rules)
	return r
}

// changed has all directories looked at by other rules.
func (r *retainer) changed(rules Retention) {
	r.rules.Store(&rules)
	r.written()
}

// written has all directories looked at, since an archive has come to one of them.
func (r *retainer) written() {
	select {
	case r.wake <- struct{}{}:
	default: // it will look anyway
	}
}

// run looks at once, when it is told to, and every hour for the sake of ages and of what others have put there, until ctx ends.
func (r *retainer) run(ctx context.Context) {
	const interval = time.Hour
	ticker := time.NewTicker(interval)
	defer ticker.Stop()
	var before []string
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-ticker.C:
		}
		rules := r.rules.Load()
		for _, path := range before {
			if !slices.Contains(rules.Directories, path) {
				r.monitor.Forget(path)
			}
		}
		before = rules.Directories
		for _, path := range rules.Directories {
			if ctx.Err() == nil {
				r.directory(*rules, path)
			}
		}
	}
}

func (r *retainer) directory(rules Retention, path string) {
	log := r.log.WithField("directory", path)
	plan, err := rules.Plan(path)
	if errors.Is(err, fs.ErrNotExist) {
		log.Debug("retention: there is no such directory (yet)")
		r.monitor.Forget(path)
		return
	}
	if err != nil {
		r.monitor.NotRemoved()
		log.Warnf("retention: nothing is removed there: %v", err)
		return
	}
	defer plan.Close()
	for _, f := range plan.Foreign {
		log.WithField("file", f.Name).Debugf("retention: passed over: %v", f.Reason)
	}
	archives, bytes := len(plan.Archives), int64(0)
	for _, a := range plan.Archives {
		bytes += a.Size
	}
	defer func() { r.monitor.Retained(path, archives, bytes) }()
	if rules.DryRun {
		for _, removal := range plan.Removals {
			r.removal(log, removal).Info("retention would remove an archive, and does not: dry_run is set")
		}
		return
	}
	err = retention.Apply(plan.dir, plan.Removals, func(removal retention.Removal, err error) {
		if err != nil {
			r.monitor.NotRemoved()
			r.removal(log, removal).Warnf("retention has left an archive: %v", err)
			return
		}
		r.monitor.Removed(removal.Size)
		archives, bytes = archives-1, bytes-removal.Size
		r.removal(log, removal).Info("retention has removed an archive")
	})
	if err != nil {
		log.Warnf("retention: what was removed may come back at a power cut: %v", err)
	}
}

func (r *retainer) removal(log logrus.FieldLogger, removal retention.Removal) logrus.FieldLogger {
	return log.WithFields(logrus.Fields{
		"file": removal.Name, "container": removal.Container, "bytes": removal.Size,
		"age": time.Since(removal.Made).Round(time.Second).String(), "why": removal.Why,
	})
}
