package rootfs

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"runtime"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// look is a look at all that the first pass has noted: is it still the same? Several goroutines look, ahead of the one
// that asks and in no order; the answers come in the order of the index.
type look struct {
	ctx     context.Context
	cancel  context.CancelFunc
	upper   int
	index   *index
	mapped  *mapped
	done    sync.WaitGroup
	answers chan chan *answer
	unused  chan *answer // to be used again

	now  *answer // what the records at hand are in
	next int     // of its records
}

// answer is a chunk of the index that has been looked at.
type answer struct {
	records []record
	buf     []byte // where their names are
	err     error
}

// startLook begins. The caller ends it with stop.
func startLook(ctx context.Context, upper *os.File, x *index, mapped *mapped) *look {
	workers := min(runtime.GOMAXPROCS(0), 8)
	ahead := 2 * workers
	l := &look{
		upper: int(upper.Fd()), index: x, mapped: mapped,
		answers: make(chan chan *answer, ahead), unused: make(chan *answer, ahead+workers+1),
	}
	l.ctx, l.cancel = context.WithCancel(ctx)
	type question struct {
		chunk chunk
		reply chan *answer
	}
	questions := make(chan question)
	for range workers {
		l.done.Go(func() {
			for q := range questions {
				q.reply <- l.at(q.chunk)
			}
		})
	}
	l.done.Go(func() {
		defer close(l.answers)
		defer close(questions)
		for _, c := range x.chunks {
			q := question{c, make(chan *answer, 1)}
			select {
			case l.answers <- q.reply:
			case <-l.ctx.Done():
				return
			}
			questions <- q // a worker always comes back: its reply has room
		}
	})
	return l
}

func (l *look) stop() {
	l.cancel()
	l.done.Wait()
}

// at looks at the names of a chunk.
func (l *look) at(c chunk) *answer {
	a := &answer{}
	select {
	case a = <-l.unused:
	default:
	}
	if l.ctx.Err() != nil {
		a.err = context.Cause(l.ctx)
		return a
	}
	var first string
	first, a.records, a.buf, a.err = l.index.read(c, a.records, a.buf)
	if a.err != nil {
		return a
	}
	var path []string // of the directory at hand
	if first != "" {
		path = strings.Split(first, "/")
	}
	dir := -1
	defer func() { unix.Close(dir) }()
	for i := range a.records {
		r := &a.records[i]
		var st unix.Stat_t
		switch r.kind {
		case dirRecord, leafRecord:
		default:
			continue
		}
		if r.kind == dirRecord && r.depth > 0 {
			path = append(path[:r.depth-1], string(r.name))
		}
		if r.kind == dirRecord || i == 0 {
			unix.Close(dir)
			// What is no directory any more, or cannot be opened, the walk will see.
			dir, _ = open(l.upper, strings.Join(path, "/"), unix.O_DIRECTORY)
		}
		switch {
		case dir < 0 || r.attrs.Mode == 0:
			continue
		case r.kind == dirRecord:
			r.same = unix.Fstat(dir, &st) == nil && unchanged(&st, &r.attrs)
			continue
		}
		if unix.Fstatat(dir, string(r.name), &st, unix.AT_SYMLINK_NOFOLLOW|unix.AT_NO_AUTOMOUNT) == nil {
			r.same = isWhiteout(&r.attrs) && isWhiteout(&st) || unchanged(&st, &r.attrs) && !l.mapped.has(&st)
		}
	}
	return a
}

// record returns the record at hand, nil at the end.
func (l *look) record() (*record, error) {
	for l.now == nil || l.next == len(l.now.records) {
		if l.now != nil {
			l.unused <- l.now // there is room for all that there are
		}
		l.now, l.next = nil, 0
		reply, ok := <-l.answers
		if !ok {
			return nil, context.Cause(l.ctx)
		}
		l.now = <-reply
		if l.now.err != nil {
			return nil, fmt.Errorf("look at what the first pass has copied: %w", l.now.err)
		}
	}
	return &l.now.records[l.next], nil
}

// directory returns what has been noted about d, whose turn it is, nil if nothing has. The records after it are about the names in it.
func (l *look) directory(d *directory) (*record, error) {
	if d.parent != nil && !d.parent.noted {
		return nil, nil
	}
	for ; ; l.next++ {
		r, err := l.record()
		if r == nil || err != nil {
			return nil, err
		}
		if r.kind != dirRecord || r.depth > d.depth { // another's, which has been there
			continue
		}
		if r.depth < d.depth { // the next of its parent's siblings: all of its own have been
			return nil, nil
		}
		switch order := cmp.Or(cmp.Compare(r.batch, d.batch), cmp.Compare(string(r.name), d.name)); {
		case order > 0:
			return nil, nil
		case order == 0:
			d.noted = true
			found := *r // the chunk that it is in may end here
			l.next++
			return &found, nil
		}
	}
}

// leaf returns what has been noted under a name of the directory at hand, nil if nothing has. Names are asked for in their order.
func (l *look) leaf(name string) (*record, error) {
	for ; ; l.next++ {
		r, err := l.record()
		if r == nil || err != nil {
			return nil, err
		}
		if r.kind == dirRecord || r.kind == batchRecord || string(r.name) > name {
			return nil, nil
		}
		if string(r.name) == name {
			if r.kind == leafRecord {
				return r, nil
			}
			return nil, nil
		}
	}
}

// batch goes on to the next batch of names of the directory at hand.
func (l *look) batch() error {
	for ; ; l.next++ {
		r, err := l.record()
		if r == nil || err != nil {
			return err
		}
		switch r.kind {
		case dirRecord:
			return nil
		case batchRecord:
			l.next++
			return nil
		}
	}
}
