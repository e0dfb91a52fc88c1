package main

import (
	"context"
	"hash/maphash"
	"sync"
	"sync/atomic"
	"time"
)

// Bounds of a mailbox.
const (
	waitItems   = 64        // relay frames for a seat that is not connected
	waitBytes   = 256 << 10 // their bytes; an empty queue takes one frame of any size
	longQueue   = 64 << 10  // past it a connected reader is slow, and its frames will wait
	mailItems   = 256
	mailBytes   = 1 << 20
	maxPresence = 256 // presence frames for a connection that does not take them

	takeovers      = 6 // of one seat
	takeoverWindow = 10 * time.Second
)

// memoryShards is a power of two: enough that a pass over one shard of 100,000
// sessions holds its lock for tens of microseconds.
const memoryShards = 256

// hubOptions are what a hub is told of the configuration.
type hubOptions struct {
	maxSessions int           // 0 for no limit
	sessionTTL  time.Duration // how long mail outlives the last connection
	resumeTTL   time.Duration // how long a claimed seat stays reserved
	holdBytes   int           // what may wait for a connected seat before its sender is held back
	queued      *budget
	owners      *quota // sessions that were created by joining them
	dropped     func(dropReason, int)
}

// memoryHub is a hub in this process's memory. Each session has its own lock;
// a shard's lock is only taken to find, create, end and sweep sessions, and
// before a session's own.
type memoryHub struct {
	// static after construction
	hubOptions
	seed   maphash.Seed // clients choose their IDs, and must not choose their shard
	shards [memoryShards]memoryShard

	sessions atomic.Int64
}

type memoryShard struct {
	mu       sync.Mutex
	sessions map[sessionID]*memorySession // guarded by mu
}

func newMemoryHub(o hubOptions) *memoryHub {
	h := &memoryHub{hubOptions: o, seed: maphash.MakeSeed()}
	for i := range h.shards {
		h.shards[i].sessions = make(map[sessionID]*memorySession)
	}
	return h
}

func (h *memoryHub) shard(id sessionID) *memoryShard {
	return &h.shards[maphash.Comparable(h.seed, id)%memoryShards]
}

// A memorySession is one session with up to two seats.
type memorySession struct {
	// static after construction
	hub     *memoryHub
	id      sessionID
	created time.Time
	owner   network // to whom it counts; not valid for one that has a code

	mu sync.Mutex
	// guarded by mu
	ended    bool // no longer in the hub: whoever finds it looks again
	expires  time.Time
	lastLeft time.Time
	bothAt   time.Time // when both seats were first connected
	outcomes outcome   // those reported
	seats    [2]*memorySlot
}

// A memorySlot is a named seat with its mailbox, guarded by the session's mu.
// It exists only while it is held, reserved, or has something to remember.
type memorySlot struct {
	name   string
	holder *memorySeat // who is connected, or nil
	v      int
	claim  claim // zero when free or unclaimed
	away   *time.Timer
	taken  []time.Time // recent takeovers

	ids idLog // of the mail this claim has sent

	queue      []frame // relay and presence frames
	queueBytes int
	presence   int  // presence frames in queue
	holding    bool // a sender waits for the queue to drain

	mail      []frame
	mailBytes int
	lastSeq   uint64
}

func (s *memorySlot) state() presence {
	switch {
	case s == nil:
		return absent
	case s.holder != nil:
		return present
	case s.away != nil:
		return away
	}
	return absent
}

// A memorySeat is one connection's hold on a slot; it is the holder, or it has
// been replaced.
type memorySeat struct {
	session *memorySession
	slot    *memorySlot
	other   int // index of the other slot
	notify  func(error)

	corked nudge // what a held post left unsaid; belongs to the posting goroutine
}

// A nudge is a notification to send once no lock is held.
type nudge struct {
	to  *memorySeat // nil for none
	err error
}

func (n nudge) send() {
	if n.to != nil {
		n.to.notify(n.err)
	}
}

var _ hub = (*memoryHub)(nil)

func (h *memoryHub) Ready(context.Context) error { return nil }

// Run sweeps sessions that have ended by the clock.
func (h *memoryHub) Run(ctx context.Context) error {
	every(ctx, janitorEvery, func() { h.sweep(time.Now()) })
	return nil
}

func (h *memoryHub) sweep(now time.Time) {
	for i := range h.shards {
		h.shards[i].sweep(now)
	}
}

func (sh *memoryShard) sweep(now time.Time) {
	sh.mu.Lock()
	defer sh.mu.Unlock()
	for _, s := range sh.sessions {
		s.mu.Lock()
		if s.over(now) {
			sh.end(s)
		}
		s.mu.Unlock()
	}
}

func (h *memoryHub) Open(_ context.Context, m meta) error {
	sh := h.shard(m.ID)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.sessions[m.ID] != nil {
		return errTaken
	}
	_, err := sh.open(h, m, network{})
	return err
}

// open creates the session m.ID, which is not there. The caller holds mu.
func (sh *memoryShard) open(h *memoryHub, m meta, owner network) (*memorySession, error) {
	if ok, _ := h.owners.take(owner); !ok {
		return nil, errTooMany
	}
	if n := h.sessions.Add(1); h.maxSessions > 0 && n > int64(h.maxSessions) {
		h.sessions.Add(-1)
		h.owners.give(owner)
		return nil, errCapacity
	}
	now := time.Now()
	s := &memorySession{hub: h, id: m.ID, created: now, owner: owner, expires: m.Expires, lastLeft: now}
	sh.sessions[m.ID] = s
	return s, nil
}

func (h *memoryHub) find(id sessionID) *memorySession {
	sh := h.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.sessions[id]
}

func (h *memoryHub) End(_ context.Context, id sessionID, why error) error {
	sh := h.shard(id)
	sh.mu.Lock()
	s := sh.sessions[id]
	if s == nil {
		sh.mu.Unlock()
		return nil
	}
	s.mu.Lock()
	connected := sh.end(s)
	s.mu.Unlock()
	sh.mu.Unlock()
	for _, m := range connected {
		m.notify(why)
	}
	return nil
}

// endIfOver ends s if nothing holds it any more.
func (h *memoryHub) endIfOver(s *memorySession) {
	sh := h.shard(s.id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.ended && s.over(time.Now()) {
		sh.end(s)
	}
}

func (h *memoryHub) Tell(_ context.Context, id sessionID, e event) error {
	s := h.find(id)
	if s == nil {
		return errGone
	}
	var wake [2]nudge
	s.mu.Lock()
	for i, slot := range s.seats {
		wake[i] = slot.announce(s.hub, e)
	}
	s.mu.Unlock()
	for _, n := range wake {
		n.send()
	}
	return nil
}

// over reports whether nothing holds the session at now: no code, nobody
// connected or away, and nothing that waits for someone who may still come.
// The caller holds mu.
func (s *memorySession) over(now time.Time) bool {
	waiting := false
	for _, slot := range s.seats {
		if slot.state() != absent {
			return false
		}
		waiting = waiting || slot != nil && len(slot.queue)+len(slot.mail) > 0
	}
	if waiting && now.Before(s.lastLeft.Add(s.hub.sessionTTL)) {
		return false
	}
	return !now.Before(s.expires)
}

// end empties a session, takes it out of the shard and returns who was
// connected. The caller holds mu and the session's.
func (sh *memoryShard) end(s *memorySession) (connected []*memorySeat) {
	s.ended = true
	delete(sh.sessions, s.id)
	s.hub.sessions.Add(-1)
	s.hub.owners.give(s.owner)
	for i, slot := range s.seats {
		if slot == nil {
			continue
		}
		if slot.holder != nil {
			connected = append(connected, slot.holder)
			slot.holder = nil
		}
		slot.stopAway()
		if n := len(slot.mail) + len(slot.queue) - slot.presence; n > 0 {
			s.hub.dropped(dropExpired, n)
		}
		for j := range slot.queue {
			slot.queue[j].release()
		}
		s.hub.queued.add(-slot.queueBytes - slot.mailBytes)
		s.seats[i] = nil
	}
	return connected
}

// seatIndex returns which of the two seats is called name, or -1.
func seatIndex(name string) int {
	switch name {
	case "A":
		return 0
	case "B":
		return 1
	}
	return -1
}

// firstSeq is what the seqs of the session's mailboxes follow: the milliseconds
// from 2025 to its creation, so that a watermark of an earlier life trims
// nothing. A clock that is before 2025 knows no better.
func (s *memorySession) firstSeq() uint64 {
	epoch := time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)
	return uint64(max(s.created.Sub(epoch).Milliseconds(), 0))
}

// slot returns the slot at index i, created if need be. The caller holds mu.
func (s *memorySession) slot(i int) *memorySlot {
	if s.seats[i] == nil {
		s.seats[i] = &memorySlot{name: string(rune('A' + i)), lastSeq: s.firstSeq()}
	}
	return s.seats[i]
}

func (h *memoryHub) Join(_ context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	i := seatIndex(r.name)
	if i < 0 {
		return nil, view{}, errNoPeer
	}
	m := &memorySeat{other: 1 - i, notify: notify}
	v, replaced, wake, err := h.join(id, r, m)
	if err != nil {
		return nil, view{}, err
	}
	replaced.send()
	wake.send()
	return m, v, nil
}

// join seats m. It returns what to tell whom m replaced, and the other seat.
func (h *memoryHub) join(id sessionID, r joinRequest, m *memorySeat) (v view, replaced, wake nudge, err error) {
	sh := h.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s := sh.sessions[id]
	now := time.Now()
	if s != nil {
		s.mu.Lock()
		if s.over(now) { // the janitor has not been here yet
			sh.end(s)
			s.mu.Unlock()
			s = nil
		}
	}
	if s == nil {
		if !r.create {
			return v, replaced, wake, errGone
		}
		if s, err = sh.open(h, meta{ID: id}, r.owner); err != nil {
			return v, replaced, wake, err
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	return s.join(r, m, now)
}

// join is the part of memoryHub.join with mu held.
func (s *memorySession) join(r joinRequest, m *memorySeat, now time.Time) (v view, replaced, wake nudge, err error) {
	slot, other := s.slot(1-m.other), s.seats[m.other]
	if slot.state() != absent {
		if slot.claim == (claim{}) || slot.claim != r.claim {
			return v, replaced, wake, errBusy
		}
		if slot.holder != nil && !slot.mayTakeOver(now) {
			return v, replaced, wake, errTakeovers
		}
		replaced = nudge{slot.holder, errReplaced}
		if v.resumed = resumedBack; slot.holder != nil {
			v.resumed = resumedTakeover
		}
		slot.stopAway()
		slot.dropPresence(s.hub)
	} else {
		slot.claim, slot.ids, slot.taken = r.claim, idLog{}, nil
	}
	m.session, m.slot = s, slot
	slot.holder, slot.v = m, r.v
	v.mail, v.held = len(slot.mail) > 0, other.overfull(m)
	if v.peer = other.state(); v.peer != absent {
		v.peerV = other.v
	}
	if v.peer == present {
		if s.bothAt.IsZero() {
			s.bothAt = now
		}
		wake = other.announce(s.hub, event{kind: eventJoined, resumed: v.resumed != resumedNot, peerV: r.v})
	}
	return v, replaced, wake, nil
}

// mayTakeOver notes a takeover at now, unless there were too many.
func (s *memorySlot) mayTakeOver(now time.Time) bool {
	recent := s.taken[:0]
	for _, t := range s.taken {
		if now.Sub(t) < takeoverWindow {
			recent = append(recent, t)
		}
	}
	s.taken = recent
	if len(s.taken) >= takeovers {
		return false
	}
	s.taken = append(s.taken, now)
	return true
}

func (s *memorySlot) stopAway() {
	if s.away != nil {
		s.away.Stop()
		s.away = nil
	}
}

// announce queues a presence frame for whoever is connected to the slot, and
// returns the nudge to send. One who has not looked for very long is put out.
func (s *memorySlot) announce(h *memoryHub, e event) nudge {
	if s == nil || s.holder == nil {
		return nudge{}
	}
	if s.presence >= maxPresence {
		return nudge{s.holder, errSlow}
	}
	s.presence++
	s.push(h, frame{kind: kindPresence, event: e})
	return nudge{s.holder, nil}
}

func (s *memorySlot) push(h *memoryHub, f frame) {
	s.queue = append(s.queue, f)
	s.queueBytes += f.size()
	h.queued.add(f.size())
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
	kept := s.queue[:0]
	for i := range s.queue {
		f := &s.queue[i]
		if keep(f) {
			kept = append(kept, *f)
			continue
		}
		removed++
		s.queueBytes -= f.size()
		h.queued.add(-f.size())
		f.release()
	}
	clear(s.queue[len(kept):])
	s.queue = kept
	return removed
}

// check returns the error for a seat that is no longer held. The caller holds
// the session's mu.
func (m *memorySeat) check() error {
	switch {
	case m.session.ended:
		return errGone
	case m.slot.holder != m:
		return errReplaced
	}
	return nil
}

func (m *memorySeat) Post(_ context.Context, to string, f frame, hold bool) (receipt, error) {
	i := seatIndex(to)
	if i < 0 {
		f.release()
		return receipt{}, errNoPeer
	}
	s := m.session
	s.mu.Lock()
	r, wake, err := m.post(i, f)
	s.mu.Unlock()
	if err != nil {
		return r, err
	}
	if m.corked != wake {
		m.uncork()
	}
	if hold {
		m.corked = wake
		return r, nil
	}
	m.corked = nudge{}
	wake.send()
	return r, nil
}

func (m *memorySeat) Flush(context.Context) { m.uncork() }

func (m *memorySeat) uncork() {
	n := m.corked
	m.corked = nudge{}
	n.send()
}

// post does the work of Post with mu held and returns the nudge to send.
func (m *memorySeat) post(i int, f frame) (r receipt, wake nudge, err error) {
	if err := m.check(); err != nil {
		f.release()
		return r, wake, err
	}
	f.from = m.slot.name
	slot := m.session.slot(i)
	if f.kind == kindMail {
		r.seq, err = m.mail(slot, f)
	} else {
		err = m.relay(slot, f)
	}
	if err != nil {
		f.release()
		return r, wake, err
	}
	r.held = slot.overfull(m)
	return r, nudge{slot.holder, nil}, nil
}

// relay queues a client's frame.
func (m *memorySeat) relay(slot *memorySlot, f frame) error {
	h := m.session.hub
	if slot.holder == nil {
		if len(slot.queue) > 0 && (len(slot.queue) >= waitItems || slot.queueBytes+f.size() > waitBytes) {
			h.dropped(dropPeerAbsent, 1)
			return errPeerAbsent
		}
		if !h.queued.spare(f.size()) {
			h.dropped(dropOverCapacity, 1)
			return errOverCapacity
		}
		f.keep()
	} else if slot.queueBytes > longQueue {
		f.keep()
	}
	slot.push(h, f)
	return nil
}

// mail stores a payload and returns its seq. A repeated id is not stored again;
// its receipt names the seq it got, or, once that is acknowledged, that of the
// highest id.
func (m *memorySeat) mail(slot *memorySlot, f frame) (uint64, error) {
	h := m.session.hub
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
	if slot.holder == nil && !h.queued.spare(f.size()) {
		h.dropped(dropOverCapacity, 1)
		m.slot.ids.refuse(f.id)
		return 0, errOverCapacity
	}
	f.keep()
	slot.lastSeq++
	f.seq = slot.lastSeq
	slot.mail = append(slot.mail, f)
	slot.mailBytes += f.size()
	h.queued.add(f.size())
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
	if !h.queued.spare(0) { // the process has enough waiting: be less patient
		bound = min(bound, longQueue)
	}
	if s.queueBytes <= bound {
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
	for n < len(slot.queue) && room(&slot.queue[n]) {
		f := &slot.queue[n]
		if f.kind == kindPresence {
			slot.presence--
		}
		size += f.size()
		buf = append(buf, *f)
		n++
	}
	slot.shift(n)
	slot.queueBytes -= size
	h.queued.add(-size)
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
	if slot.holding && slot.queueBytes <= h.holdBytes/2 {
		slot.holding = false
		if other := m.session.seats[m.other]; other != nil {
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
	return s.seats[m.other].overfull(m), nil
}

// shift removes the first n frames of the queue.
func (s *memorySlot) shift(n int) {
	if n == len(s.queue) {
		clear(s.queue)
		if s.queue = s.queue[:0]; cap(s.queue) > 2*waitItems {
			s.queue = nil // a burst is over
		}
		return
	}
	clear(s.queue[:n])
	s.queue = s.queue[n:]
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
		s.hub.queued.add(-slot.mail[n].size())
		n++
	}
	clear(slot.mail[:n])
	if slot.mail = slot.mail[n:]; len(slot.mail) == 0 {
		slot.mail = nil
	}
	return nil
}

func (m *memorySeat) Report(_ context.Context, o outcome) (since time.Duration, first bool, err error) {
	s := m.session
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := m.check(); err != nil {
		return 0, false, err
	}
	first = s.outcomes&o == 0
	s.outcomes |= o
	if s.bothAt.IsZero() {
		return -1, first, nil
	}
	return time.Since(s.bothAt), first, nil
}

func (m *memorySeat) Leave(_ context.Context, forGood bool) error {
	s := m.session
	s.mu.Lock()
	if err := m.check(); err != nil {
		s.mu.Unlock()
		return err
	}
	slot := m.slot
	slot.holder = nil
	slot.dropPresence(s.hub)
	for i := range slot.queue {
		slot.queue[i].keep()
	}
	slot.holding = false
	s.lastLeft = time.Now()
	var wake nudge
	if forGood || slot.claim == (claim{}) {
		wake = s.free(m.other)
	} else {
		s.reserve(slot, m.other)
		wake = s.seats[m.other].announce(s.hub, event{kind: eventAway})
	}
	s.mu.Unlock()
	m.uncork()
	wake.send()
	s.hub.endIfOver(s)
	return nil
}

// reserve keeps a slot for whoever claimed it, with mu held.
func (s *memorySession) reserve(slot *memorySlot, other int) {
	var t *time.Timer
	t = time.AfterFunc(s.hub.resumeTTL, func() { s.reservationOver(slot, other, &t) })
	slot.away = t
}

// reservationOver frees a slot whose holder did not come back in time. timer
// is the reservation's, and is read with mu held.
func (s *memorySession) reservationOver(slot *memorySlot, other int, timer **time.Timer) {
	s.mu.Lock()
	if slot.away != *timer { // ended, or back just now
		s.mu.Unlock()
		return
	}
	slot.stopAway()
	s.lastLeft = time.Now()
	wake := s.free(other)
	s.mu.Unlock()
	wake.send()
	s.hub.endIfOver(s)
}

// free makes the seat opposite to index other free, with mu held: what it left
// waiting for an absent other is stale, one who is connected is told, by the
// nudge it returns.
func (s *memorySession) free(other int) (wake nudge) {
	slot, peer := s.seats[1-other], s.seats[other]
	slot.claim, slot.v, slot.taken = claim{}, 0, nil
	if peer != nil && peer.holder == nil {
		stale := peer.filter(s.hub, func(f *frame) bool { return f.from != slot.name })
		if stale > 0 {
			s.hub.dropped(dropStale, stale)
		}
	}
	wake = peer.announce(s.hub, event{kind: eventLeft})
	s.forget(1 - other)
	s.forget(other)
	return wake
}

// forget drops a slot that has nothing to remember, so that a finished session
// whose code still lives is small.
func (s *memorySession) forget(i int) {
	slot := s.seats[i]
	if slot != nil && slot.state() == absent && len(slot.queue) == 0 && slot.lastSeq == s.firstSeq() {
		s.seats[i] = nil
	}
}
