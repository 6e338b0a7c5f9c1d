package checkpoint

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/sirupsen/logrus"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/container"
)

// journal is a directory with one file for each checkpoint in flight: a Record, as JSON for people who have to clean up by hand. It
// is for the death of both daemon and helper, and for a power cut: each of the two alone puts right what the other one leaves. One
// daemon has it at a time. It is safe for concurrent use.
//
// A record is made durable before the helper gets its job, and removed when nothing of the checkpoint is left. That it is gone is not
// made durable: a record that a power cut brings back names what is gone, and is removed once more.
type journal struct {
	dir string
	log logrus.FieldLogger

	mu   sync.Mutex
	lock *os.File // held while the journal is open
}

const (
	lockName     = "lock"
	recordSuffix = ".json"
	tornSuffix   = ".tmp" // of a record that is being written, and whose helper has no job yet
)

// errJournal says that no record can be kept, and so that there is no checkpoint.
var errJournal = errors.New("no checkpoint without a record of it, by which a crash is put right")

// refusal says why there is no checkpoint, and what helps.
func refusal(err error) error {
	help := ""
	switch {
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		help = ": make room there"
	case errors.Is(err, unix.EROFS), errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		help = ": make it writable, or choose another --state-dir"
	}
	return fmt.Errorf("%w: %w%s", errJournal, err, help)
}

// open makes the directory if need be, takes it for this process, and returns the records that are there. It does nothing, and returns
// none, if the journal is open.
func (j *journal) open() ([]*crishimv1.Record, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.lock != nil {
		return nil, nil
	}
	lock, err := j.take()
	if err != nil {
		return nil, refusal(err)
	}
	records, err := j.read()
	if err != nil {
		lock.Close()
		return nil, refusal(err)
	}
	j.lock = lock
	return records, nil
}

// take locks the directory. The kernel lets go of it with this process, however that ends: helpers do not inherit it.
func (j *journal) take() (*os.File, error) {
	if err := os.MkdirAll(j.dir, 0o700); err != nil {
		return nil, err
	}
	var st unix.Stat_t
	if err := unix.Stat(j.dir, &st); err != nil {
		return nil, &os.PathError{Op: "stat", Path: j.dir, Err: err}
	}
	// What a record says is done, as root.
	if st.Uid != uint32(os.Geteuid()) || st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("%s can be changed by others (owner %d, mode %o): chown root and chmod 0700 it", j.dir, st.Uid, st.Mode&0o7777)
	}
	lock, err := os.OpenFile(filepath.Join(j.dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if err == nil {
		return lock, nil
	}
	lock.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fmt.Errorf("another crishim keeps its records in %s: stop it, or give each a --state-dir of its own", j.dir)
	}
	return nil, &os.PathError{Op: "lock", Path: filepath.Join(j.dir, lockName), Err: err}
}

// read returns the records. What is none, or cannot be understood since it was damaged or is a later version's, stays where it is, and is
// told of at each start: nobody but a human can know what it stands for.
func (j *journal) read() ([]*crishimv1.Record, error) {
	entries, err := os.ReadDir(j.dir)
	if err != nil {
		return nil, err
	}
	var records []*crishimv1.Record
	for _, entry := range entries {
		path := filepath.Join(j.dir, entry.Name())
		switch filepath.Ext(entry.Name()) {
		case tornSuffix:
			if err := os.Remove(path); err != nil {
				return nil, err
			}
		case recordSuffix:
			record, err := readRecord(path)
			if err == nil && filepath.Base(path) != recordName(record) {
				err = fmt.Errorf("it is of another checkpoint, whose staging directory is %q", record.GetJob().GetStaging())
			}
			switch {
			case errors.Is(err, fs.ErrNotExist): // it has ended meanwhile
			case err != nil:
				j.log.Errorf("a record of a checkpoint that was in flight cannot be understood: %v: look whether its container runs and "+
					"whether there is a directory .%s beside its location, then remove %s", err, strings.TrimSuffix(entry.Name(), recordSuffix), path)
			default:
				records = append(records, record)
			}
		}
	}
	return records, nil
}

func readRecord(path string) (*crishimv1.Record, error) {
	content, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	record := &crishimv1.Record{}
	if err := protojson.Unmarshal(content, record); err != nil {
		return nil, err
	}
	return record, nil
}

// begin keeps a record of a helper that has been started, and has no job yet. When it returns, the record is durable.
func (j *journal) begin(job *crishimv1.Job, entry *crishimv1.Checkpoint, helper int, begin time.Time) (*crishimv1.Record, error) {
	process, err := container.FindProcess(helper)
	if err != nil {
		// Not %w: it is not the container that does not run.
		return nil, fmt.Errorf("the checkpoint helper died before it had its job (%v): nothing of the checkpoint is left: try again", err)
	}
	boot, err := bootID()
	if err != nil {
		return nil, err
	}
	record := &crishimv1.Record{
		BootId:          boot,
		HelperPid:       int32(helper),
		HelperStartTime: process.StartTime,
		BeginNs:         begin.UnixNano(),
		Job: &crishimv1.Job{
			Location: job.GetLocation(), Criu: job.GetCriu(), Staging: job.GetStaging(), Container: job.GetContainer(),
		},
		Checkpoint: entry,
	}
	content, err := protojson.MarshalOptions{Multiline: true}.Marshal(record)
	if err != nil {
		return nil, fmt.Errorf("write record: %w", err)
	}
	if err := j.write(recordName(record), content); err != nil {
		if errors.Is(err, fs.ErrNotExist) {
			j.close() // the directory was removed: the next request makes it again
		}
		return nil, refusal(err)
	}
	return record, nil
}

func (j *journal) write(name string, content []byte) (err error) {
	path := filepath.Join(j.dir, name)
	file, err := os.OpenFile(path+tornSuffix, os.O_WRONLY|os.O_CREATE|os.O_EXCL|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			_ = os.Remove(path + tornSuffix) // the next start does
		}
	}()
	_, err = file.Write(content)
	if err == nil {
		err = file.Sync()
	}
	if err := errors.Join(err, file.Close()); err != nil {
		return err
	}
	if err := os.Rename(path+tornSuffix, path); err != nil {
		return err
	}
	dir, err := os.Open(j.dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// end removes the record of a checkpoint that has ended, unless something of it is left: then the next start tries again.
func (j *journal) end(record *crishimv1.Record, left bool) {
	if left {
		j.log.Warnf("something of a checkpoint is left: its record %s stays, and the next start of crishim tries to remove it again", j.path(record))
		return
	}
	if err := os.Remove(j.path(record)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		j.log.Warnf("remove record of a checkpoint that has ended: %v: the next start of crishim tries again, and finds nothing left", err)
	}
}

// path is that of a record's file.
func (j *journal) path(record *crishimv1.Record) string {
	return filepath.Join(j.dir, recordName(record))
}

// recordName is the name of the staging directory, which no other checkpoint has, without the dot that hides it.
func recordName(record *crishimv1.Record) string {
	return strings.TrimPrefix(record.GetJob().GetStaging(), ".") + recordSuffix
}

// close lets another process have the directory.
func (j *journal) close() {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.lock != nil {
		j.lock.Close()
		j.lock = nil
	}
}

// bootID tells one boot of the machine from another.
func bootID() (string, error) {
	content, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", fmt.Errorf("read boot id: %w", err)
	}
	return strings.TrimSpace(string(content)), nil
}
