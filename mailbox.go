package main

import (
	"context"
	"slices"
	"time"
)

// A frameQueue holds frames in the order they came. Its memory is used again,
// so that frames which come as fast as others are taken cost no allocation.
type frameQueue struct {
	frames []frame
	head   int // of frames, those before it have been taken
}

// waiting returns what is in the queue, until that is next changed.
func (q *frameQueue) waiting() []frame { return q.frames[q.head:] }

func (q *frameQueue) len() int { return len(q.frames) - q.head }

func (q *frameQueue) push(f frame) {
	if len(q.frames) == cap(q.frames) {
		q.makeRoom()
	}
	q.frames = append(q.frames, f)
}

// makeRoom moves what waits to the front, if at least as much is free there, but
// not so much more that a burst must be over; else there is twice the space that
// what waits takes.
func (q *frameQueue) makeRoom() {
	if n := q.len(); q.head >= n && cap(q.frames) <= max(4*n, 2*waitItems) {
		copy(q.frames, q.waiting())
		clear(q.frames[n:])
		q.frames = q.frames[:n]
	} else {
		q.frames = append(make([]frame, 0, max(1, 2*n)), q.waiting()...)
	}
	q.head = 0
}

// shift removes the first n frames.
func (q *frameQueue) shift(n int) {
	clear(q.frames[q.head : q.head+n])
	if q.head += n; q.head < len(q.frames) {
		return
	}
	q.frames, q.head = q.frames[:0], 0
	if cap(q.frames) > 2*waitItems {
		q.frames = nil // a burst is over
	}
}

// filter keeps the frames that keep approves and returns how many it removed.
func (q *frameQueue) filter(keep func(*frame) bool) (removed int) {
	kept := q.frames[:q.head]
	for i := range q.waiting() {
		if f := &q.waiting()[i]; keep(f) {
			kept = append(kept, *f)
		}
	}
	removed = len(q.frames) - len(kept)
	clear(q.frames[len(kept):])
	q.frames = kept
	return removed
}

// An idLog knows which ids of a sender's mail have been stored: all up to the
// highest, save those that were refused and may be sent again. Ids count up, so
// what was refused between two stored ones is a gap. The zero idLog is that of
// a sender that has sent nothing; the id 0 stands for none.
type idLog struct {
	last    uint64  // the highest stored
	lastSeq uint64  // its seq
	refused idGap   // from the lowest to the highest refused above last; zero for none
	gaps    []idGap // below last, ascending; none of their ids is stored
}

// An idGap is the ids from lo to hi.
type idGap struct{ lo, hi uint64 }

func (g idGap) has(id uint64) bool { return g.lo <= id && id <= g.hi }

// with returns g, which may be zero, extended to id.
func (g idGap) with(id uint64) idGap {
	if g.lo == 0 {
		return idGap{id, id}
	}
	return idGap{min(g.lo, id), max(g.hi, id)}
}

// maxGaps bounds the gaps remembered. Of more, two become one, with the stored ids
// between them: those would be stored again if they were sent again, which nobody
// does so late. The other way around, what was refused would be lost.
const maxGaps = 64

// highest returns the highest id that has been stored, or 0. There may be no log
// yet.
func (l *idLog) highest() uint64 {
	if l == nil {
		return 0
	}
	return l.last
}

// stored reports whether id has been stored.
func (l *idLog) stored(id uint64) bool {
	return id <= l.last && !slices.ContainsFunc(l.gaps, func(g idGap) bool { return g.has(id) })
}

// refuse notes that id was not stored.
func (l *idLog) refuse(id uint64) {
	if id > l.last {
		l.refused = l.refused.with(id)
	}
}

// store notes that id, which was not stored, is now, with seq.
func (l *idLog) store(id, seq uint64) {
	switch {
	case id == 0:
		return
	case id > l.last:
		l.last, l.lastSeq = id, seq
		below, above := l.refused.without(id)
		if l.refused = above; below.lo != 0 {
			l.gaps = append(l.gaps, below)
		}
	default:
		l.fill(id)
	}
	if len(l.gaps) > maxGaps {
		l.merge(id)
	}
}

// without returns what is left of g below id and above it; zero for nothing.
func (g idGap) without(id uint64) (below, above idGap) {
	if g.lo < id {
		below = idGap{g.lo, min(g.hi, id-1)}
	}
	if id < g.hi {
		above = idGap{max(g.lo, id+1), g.hi}
	}
	return below, above
}

// fill takes id out of the gap it is in.
func (l *idLog) fill(id uint64) {
	i := slices.IndexFunc(l.gaps, func(g idGap) bool { return g.has(id) })
	if i < 0 {
		return
	}
	var rest []idGap
	below, above := l.gaps[i].without(id)
	for _, g := range []idGap{below, above} {
		if g.lo != 0 {
			rest = append(rest, g)
		}
	}
	l.gaps = slices.Replace(l.gaps, i, i+1, rest...)
}

// merge makes one gap of the two oldest between which id, stored just now, is not.
func (l *idLog) merge(id uint64) {
	i := 0
	if l.gaps[0].hi < id && id < l.gaps[1].lo {
		i = 1
	}
	l.gaps = slices.Replace(l.gaps, i, i+2, idGap{l.gaps[i].lo, l.gaps[i+1].hi})
}

// cost is what a frame counts for in the memory that waits.
func (o *hubOptions) cost(f *frame) int { return f.size() + o.frameCost }

// queueCost is what the queue counts for in it.
func (s *memorySlot) queueCost(h *memoryHub) int { return s.queueBytes + s.queue.len()*h.frameCost }

func (s *memorySlot) push(h *memoryHub, f frame) {
	s.queue.push(f)
	s.queueBytes += f.size()
	h.queued.add(h.cost(&f))
}

// dropPresence removes the presence frames: a new connection's view tells it
// all of that.
func (s *memorySlot) dropPresence(h *memoryHub) {
	s.filter(h, func(f *frame) bool { return f.kind != kindPresence })
	s.presence = 0
}

// filter keeps the queued frames that keep approves and returns how many it
// removed.
func (s *memorySlot) filter(h *memoryHub, keep func(*frame) bool) (removed int) {
	return s.queue.filter(func(f *frame) bool {
		if keep(f) {
			return true
		}
		s.queueBytes -= f.size()
		h.queued.add(-h.cost(f))
		f.release()
		return false
	})
}

// post does the work of Post for one receiver, with mu held, and returns the
// nudge to send.
func (m *memorySeat) post(slot *memorySlot, f frame) (r receipt, wake nudge, err error) {
	switch {
	case slot == nil:
		err = errNoPeer
	case f.kind == kindMail:
		r.seq, err = m.mail(slot, f)
	default:
		err = m.relay(slot, f)
	}
	if err != nil {
		f.release()
		return r, wake, err
	}
	wake.to = slot.holder
	if slot.overfull(m) {
		if m.session.room == nil {
			r.held = true
		} else {
			wake.err = errSlow
			m.session.putOut(slot)
		}
	}
	return r, wake, nil
}

// relay queues a client's frame.
func (m *memorySeat) relay(slot *memorySlot, f frame) error {
	h := m.session.hub
	if slot.holder == nil {
		if slot.queue.len() > 0 && (slot.queue.len() >= waitItems || slot.queueBytes+f.size() > waitBytes) {
			h.dropped(dropPeerAbsent, 1)
			return errPeerAbsent
		}
		if !h.queued.spare(h.cost(&f)) {
			h.dropped(dropOverCapacity, 1)
			return errOverCapacity
		}
		f.keep()
	} else if slot.queue.len() >= takeFrames { // more than its next write takes
		f.trim()
	}
	slot.push(h, f)
	return nil
}

// mail stores a payload and returns its seq. A repeated id is not stored again;
// its receipt names the seq it got, or, once that is acknowledged, that of the
// highest id.
func (m *memorySeat) mail(slot *memorySlot, f frame) (uint64, error) {
	h := m.session.hub
	if m.slot.ids == nil {
		m.slot.ids = new(idLog)
	}
	if f.id != 0 && m.slot.ids.stored(f.id) {
		seq := m.slot.ids.lastSeq
		for i := range slot.mail {
			if e := &slot.mail[i]; e.id == f.id && e.from == f.from {
				seq = e.seq
			}
		}
		f.release()
		return seq, nil
	}
	if len(slot.mail) >= mailItems || slot.mailBytes+f.size() > mailBytes {
		h.dropped(dropMailFull, 1)
		m.slot.ids.refuse(f.id)
		return 0, errMailFull
	}
	if slot.holder == nil && !h.queued.spare(h.cost(&f)) {
		h.dropped(dropOverCapacity, 1)
		m.slot.ids.refuse(f.id)
		return 0, errOverCapacity
	}
	f.keep()
	slot.lastSeq = max(slot.lastSeq+1, seqAt(time.Now()))
	f.seq = slot.lastSeq
	slot.mail = append(slot.mail, f)
	slot.mailBytes += f.size()
	h.queued.add(h.cost(&f))
	m.slot.ids.store(f.id, f.seq)
	return f.seq, nil
}

// overfull reports whether by, which posts to s, should pause, and notes that
// it waits.
func (s *memorySlot) overfull(by *memorySeat) bool {
	if s == nil || s.holder == nil || s.holder == by {
		return false
	}
	h := by.session.hub
	bound := h.holdBytes
	if by.session.room != nil {
		bound = h.slowBytes
	}
	if !h.queued.spare(0) { // the process has enough waiting: be less patient
		bound = min(bound, longQueue)
	}
	if s.queueCost(h) <= bound {
		return false
	}
	s.holding = true
	return true
}

func (m *memorySeat) Take(_ context.Context, after uint64, budget int, buf []frame) (taken []frame, more bool, err error) {
	s := m.session
	s.mu.Lock()
	if err := m.check(); err != nil {
		s.mu.Unlock()
		return buf, false, err
	}
	taken, more, wake := m.take(after, budget, buf)
	s.mu.Unlock()
	wake.send()
	return taken, more, nil
}

// take does the work of Take with mu held. The nudge is for a sender that
// waited for the queue to drain.
func (m *memorySeat) take(after uint64, budget int, buf []frame) (taken []frame, more bool, wake nudge) {
	slot, h := m.slot, m.session.hub
	bytes := 0
	room := func(f *frame) bool {
		more = len(buf) == cap(buf) || bytes > 0 && bytes+f.size() > budget
		bytes += f.size()
		return !more
	}
	n, size := 0, 0
	waiting := slot.queue.waiting()
	for n < len(waiting) && room(&waiting[n]) {
		f := &waiting[n]
		if f.kind == kindPresence {
			slot.presence--
		}
		size += f.size()
		buf = append(buf, *f)
		n++
	}
	slot.queue.shift(n)
	slot.queueBytes -= size
	h.queued.add(-size - n*h.frameCost)
	if after != noMail && !more {
		for i := range slot.mail {
			if f := &slot.mail[i]; f.seq > after {
				if !room(f) {
					break
				}
				buf = append(buf, *f)
			}
		}
	}
	if slot.holding && slot.queueCost(h) <= h.holdBytes/2 {
		slot.holding = false
		if other := m.other(); other != nil {
			wake.to = other.holder
		}
	}
	return buf, more, wake
}

func (m *memorySeat) Held(context.Context) (bool, error) {
	s := m.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := m.check(); err != nil {
		return false, err
	}
	return m.other().overfull(m), nil
}

func (m *memorySeat) Ack(_ context.Context, upTo uint64) error {
	s := m.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := m.check(); err != nil {
		return err
	}
	slot := m.slot
	if upTo > slot.lastSeq {
		return errBeyond
	}
	n := 0
	for n < len(slot.mail) && slot.mail[n].seq <= upTo {
		slot.mailBytes -= slot.mail[n].size()
		s.hub.queued.add(-s.hub.cost(&slot.mail[n]))
		n++
	}
	clear(slot.mail[:n])
	if slot.mail = slot.mail[n:]; len(slot.mail) == 0 {
		slot.mail = nil
	}
	return nil
}
