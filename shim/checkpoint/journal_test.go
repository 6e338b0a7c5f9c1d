package checkpoint

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/sirupsen/logrus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	crishimv1 "crishim/proto/crishim/v1"
	"crishim/shim/archive"
)

// newJournal returns a journal in a directory that is not there yet, and what it logs.
func newJournal(t *testing.T) (*journal, *bytes.Buffer) {
	t.Helper()
	var logged bytes.Buffer
	log := logrus.New()
	log.SetOutput(&logged)
	j := &journal{dir: filepath.Join(t.TempDir(), "state"), log: log}
	t.Cleanup(j.close)
	return j, &logged
}

// reopened returns what the next crishim finds.
func reopened(t *testing.T, j *journal) []*crishimv1.Record {
	t.Helper()
	j.close()
	records, err := j.open()
	if err != nil {
		t.Fatal(err)
	}
	return records
}

func someJob() *crishimv1.Job {
	return &crishimv1.Job{
		Location: "/data/checkpoint.tar", Criu: "/usr/sbin/criu", Staging: archive.StagingName(),
		Members:   []*crishimv1.Member{{Name: "large", Content: []byte("not for the record")}},
		Container: &crishimv1.Container{Id: "0123", Pid: 7, StartTime: 8, Freezer: "/sys/fs/cgroup/x"},
	}
}

func TestARecordOutlivesItsDaemon(t *testing.T) {
	j, logged := newJournal(t)
	if records, err := j.open(); err != nil || len(records) > 0 {
		t.Fatalf("a new journal has %v, %v", records, err)
	}
	job, begin := someJob(), time.Unix(12, 34)
	record, err := j.begin(job, nil, os.Getpid(), begin)
	if err != nil {
		t.Fatal(err)
	}
	boot, err := bootID()
	if err != nil {
		t.Fatal(err)
	}
	if record.GetBootId() != boot || record.GetHelperPid() != int32(os.Getpid()) || record.GetHelperStartTime() == 0 || record.GetBeginNs() != begin.UnixNano() ||
		record.GetJob().GetMembers() != nil || !proto.Equal(record.GetJob().GetContainer(), job.GetContainer()) {
		t.Errorf("the record is %v", record)
	}
	for path, want := range map[string]os.FileMode{j.dir: os.ModeDir | 0o700, j.path(record): 0o600, filepath.Join(j.dir, lockName): 0o600} {
		if info, err := os.Stat(path); err != nil || info.Mode() != want {
			t.Errorf("%s is %v, %v, want %v", path, info.Mode(), err, want)
		}
	}
	if records := reopened(t, j); len(records) != 1 || !proto.Equal(records[0], record) {
		t.Errorf("the next crishim finds %v, want %v", records, record)
	}
	if records, err := j.open(); err != nil || records != nil {
		t.Errorf("one that is open gives %v, %v", records, err)
	}
	j.end(record, true)
	if len(reopened(t, j)) != 1 || !strings.Contains(logged.String(), j.path(record)) {
		t.Errorf("of what is left there is no record, or no word: %s", logged)
	}
	j.end(record, false)
	if records := reopened(t, j); len(records) > 0 {
		t.Errorf("after the end there still is %v", records)
	}
}

func TestOneCrishimHasTheJournal(t *testing.T) {
	j, _ := newJournal(t)
	if _, err := j.open(); err != nil {
		t.Fatal(err)
	}
	second := &journal{dir: j.dir, log: j.log}
	_, err := second.open()
	if status.Code(toStatus(err)) != codes.FailedPrecondition || !strings.Contains(err.Error(), "another crishim keeps its records in "+j.dir) {
		t.Errorf("error of the second is %v, want FailedPrecondition and the directory", err)
	}
	j.close()
	if _, err := second.open(); err != nil {
		t.Errorf("after the first has ended: %v", err)
	}
	second.close()
}

// What nobody understands is left to people; what was never finished stands for nothing.
func TestWhatIsNoRecord(t *testing.T) {
	j, logged := newJournal(t)
	if _, err := j.open(); err != nil {
		t.Fatal(err)
	}
	record, err := j.begin(someJob(), nil, os.Getpid(), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(j.path(record))
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{
		"crishim-EMPTY.json": "", "crishim-TORN.json": string(content[:len(content)/2]), "crishim-OTHER.json": string(content),
		"crishim-LATER.json": `{"bootId":"a","invention":{}}`, "crishim-NEW.json.tmp": "{", "README": "mine",
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(j.dir, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if records := reopened(t, j); len(records) != 1 || !proto.Equal(records[0], record) {
		t.Errorf("found %v, want %v", records, record)
	}
	for name := range files {
		_, err := os.Stat(filepath.Join(j.dir, name))
		if gone := strings.HasSuffix(name, tornSuffix); gone != os.IsNotExist(err) {
			t.Errorf("%s: %v, want it gone %t", name, err, gone)
		}
		told := strings.Contains(logged.String(), "."+strings.TrimSuffix(name, recordSuffix)+" beside its location, then remove "+filepath.Join(j.dir, name))
		if want := strings.HasSuffix(name, recordSuffix); told != want {
			t.Errorf("%s: told of %t, want %t:\n%s", name, told, want, logged)
		}
	}
}

func TestAJournalThatCannotBe(t *testing.T) {
	t.Run("a directory of others", func(t *testing.T) {
		j, _ := newJournal(t)
		if err := os.Mkdir(j.dir, 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(j.dir, 0o770); err != nil {
			t.Fatal(err)
		}
		if _, err := j.open(); status.Code(toStatus(err)) != codes.FailedPrecondition || !strings.Contains(err.Error(), "chmod 0700") {
			t.Errorf("error is %v, want FailedPrecondition and what to do", err)
		}
	})
	t.Run("a file in its place", func(t *testing.T) {
		j, _ := newJournal(t)
		if err := os.WriteFile(j.dir, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := j.open(); status.Code(toStatus(err)) != codes.FailedPrecondition || !strings.Contains(err.Error(), j.dir) {
			t.Errorf("error is %v, want FailedPrecondition and the path", err)
		}
	})
	t.Run("removed while it is open", func(t *testing.T) {
		j, _ := newJournal(t)
		if _, err := j.open(); err != nil {
			t.Fatal(err)
		}
		if err := os.RemoveAll(j.dir); err != nil {
			t.Fatal(err)
		}
		if _, err := j.begin(someJob(), nil, os.Getpid(), time.Now()); status.Code(toStatus(err)) != codes.FailedPrecondition {
			t.Errorf("error is %v, want FailedPrecondition", err)
		}
		if _, err := j.open(); err != nil {
			t.Fatal(err)
		}
		if _, err := j.begin(someJob(), nil, os.Getpid(), time.Now()); err != nil {
			t.Errorf("once it was made again: %v", err)
		}
	})
}
