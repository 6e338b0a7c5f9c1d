package main

import (
	"fmt"
	"io"
	"os"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"
	"github.com/vbauerster/mpb/v8"
	"github.com/vbauerster/mpb/v8/decor"
	"golang.org/x/term"

	crishimv1 "crishim/proto/crishim/v1"
)

// view shows how far a checkpoint is. After end, or finish, which says that it was a success, nothing more is shown.
type view interface {
	show(*crishimv1.Progress)
	finish()
	end()
}

// newView chooses by what w is: bars on a terminal, lines elsewhere. Where a terminal does not know how large it is, as one without a window may not,
// nothing would be seen of bars.
func newView(w io.Writer) view {
	if file, ok := w.(*os.File); ok {
		if columns, rows, err := term.GetSize(int(file.Fd())); terminalAllows(err == nil && columns > 0 && rows > 0) {
			return &bars{progress: mpb.New(mpb.WithOutput(w), mpb.WithWidth(30), mpb.WithRefreshRate(100*time.Millisecond))}
		}
	}
	return &lines{w: w, every: 2 * time.Second}
}

// phases are what is done, for people.
var phases = map[crishimv1.Phase]string{
	crishimv1.Phase_PHASE_COPY:     "copy files",
	crishimv1.Phase_PHASE_DUMP:     "dump memory",
	crishimv1.Phase_PHASE_CAPTURE:  "copy changes",
	crishimv1.Phase_PHASE_ASSEMBLE: "make archive",
	crishimv1.Phase_PHASE_PUBLISH:  "sync to disk",
}

// standing says how long the container stands still, or stood.
func standing(p *crishimv1.Progress) string {
	if p.GetFrozenUs() == 0 {
		return ""
	}
	return fmt.Sprintf("frozen %s", seconds(p.GetFrozenUs()))
}

func seconds(us int64) string {
	return (time.Duration(us) * time.Microsecond).Round(time.Millisecond).String()
}

func size(bytes int64) string { return humanize.IBytes(uint64(max(bytes, 0))) }

// bars has a bar for each phase, with bytes, rate and the time that is left of it.
type bars struct {
	progress *mpb.Progress
	phase    crishimv1.Phase
	bar      *mpb.Bar
	frozen   *atomic.Value // of the bar
}

func (b *bars) show(p *crishimv1.Progress) {
	if p.GetPhase() != b.phase {
		b.complete()
		b.phase = p.GetPhase()
		frozen := &atomic.Value{}
		frozen.Store("")
		b.frozen = frozen
		b.bar = b.progress.AddBar(p.GetExpected(),
			mpb.PrependDecorators(decor.Name(phases[p.GetPhase()], decor.WC{W: 13, C: decor.DindentRight})),
			mpb.AppendDecorators(
				decor.CountersKibiByte("% .1f / % .1f"),
				decor.AverageSpeed(decor.SizeB1024(0), "  % .1f"),
				decor.OnComplete(decor.AverageETA(decor.ET_STYLE_GO, decor.WC{W: 8}), " done"),
				decor.Any(func(decor.Statistics) string { return "  " + frozen.Load().(string) })))
	}
	b.frozen.Store(standing(p))
	b.bar.SetTotal(max(p.GetExpected(), p.GetBytes()+1), false) // it is complete when the next phase begins, and not before
	b.bar.SetCurrent(p.GetBytes())
}

// complete ends the bar at what was done.
func (b *bars) complete() {
	if b.bar != nil {
		b.bar.SetTotal(-1, true)
		b.bar.Wait()
		b.bar = nil
	}
}

func (b *bars) finish() { b.complete() }

func (b *bars) end() {
	if b.progress == nil {
		return
	}
	if b.bar != nil {
		b.bar.Abort(false)
	}
	b.progress.Wait()
	b.progress = nil
}

// lines has a line for each phase, and further ones at intervals.
type lines struct {
	w     io.Writer
	every time.Duration
	phase crishimv1.Phase
	last  time.Time
}

func (l *lines) show(p *crishimv1.Progress) {
	if p.GetPhase() == l.phase && time.Since(l.last) < l.every {
		return
	}
	l.phase, l.last = p.GetPhase(), time.Now()
	line := fmt.Sprintf("%s: %s", phases[p.GetPhase()], size(p.GetBytes()))
	if p.GetExpected() > 0 {
		line += " of " + size(p.GetExpected())
	}
	if s := standing(p); s != "" {
		line += ", " + s
	}
	fmt.Fprintln(l.w, line)
}

func (*lines) finish() {}
func (*lines) end()    {}
