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
	longQueue   = 64 << 10  // past it a sender is held back while MAX_QUEUED_BYTES is used up
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
	maxSessions  int           // 0 for no limit
	sessionTTL   time.Duration // how long mail outlives the last connection
	resumeTTL    time.Duration // how long a claimed seat stays reserved
	roomEmptyTTL time.Duration // how long a room outlives the last one in it
	holdBytes    int           // what may wait for a connected seat of a pair before its sender is held back
	slowBytes    int           // what may wait for a connected member of a room before it is put out
	queued       *budget
	frameCost    int    // what a frame counts for in queued besides its data, in bytes
	owners       *quota // rooms, and pairs that were created by joining them
	dropped      func(dropReason, int)
}

// frameCost is what a frame takes in a memoryHub besides its data, in bytes: itself,
// and as much again that is free in its queue. Of small ones it is the most.
const frameCost = 192

// memoryHub is a hub in this process's memory. Each session has its own lock;
// a shard's lock is only taken to find, create, end and sweep sessions, and
// before a session's own.
type memoryHub struct {
	// static after construction
	hubOptions
	seed   maphash.Seed // clients choose their IDs, and must not choose their shard
	shards [memoryShards]memoryShard
	codes  roomCodes

	sessions, rooms atomic.Int64 // how many there are

	// lastSeq is the highest seq of the sessions that have ended. It is ahead of the
	// clock where mail came faster than one a millisecond.
	lastSeq atomic.Uint64
}

type memoryShard struct {
	mu       sync.Mutex
	sessions map[sessionID]*memorySession // guarded by mu
}

func newMemoryHub(o hubOptions) *memoryHub {
	h := &memoryHub{hubOptions: o, seed: maphash.MakeSeed(), codes: roomCodes{rooms: make(map[string]sessionID)}}
	for i := range h.shards {
		h.shards[i].sessions = make(map[sessionID]*memorySession)
	}
	return h
}

func (h *memoryHub) shard(id sessionID) *memoryShard {
	return &h.shards[maphash.Comparable(h.seed, id)%memoryShards]
}

// A memorySession is one session: a pair, or a room.
type memorySession struct {
	// static after construction
	hub *memoryHub
	id  sessionID
	// firstSeq is what the seqs of the session's mailboxes follow, so that a
	// watermark of an earlier life trims nothing.
	firstSeq uint64
	owner    network // to whom it counts; not valid for a pair that has a code
	expires  time.Time
	pair     [2]*memorySlot // where the seats of a pair are

	mu sync.Mutex
	// guarded by mu
	ended    bool // no longer in the hub: whoever finds it looks again
	lastLeft time.Time
	bothAt   time.Time // when two seats were first connected
	outcomes outcome   // those reported
	room     *roomMeta // nil for a pair
	// Of a pair A and B, each nil while there is nothing to know of it; of a room
	// those that are taken, in the order they were.
	seats []*memorySlot
}

// A memorySlot is a named seat with its mailbox, guarded by the session's mu.
// It exists only while it is held, reserved, or has something to remember.
type memorySlot struct {
	name        string
	displayName string // of a room's

	holder *memorySeat // who is connected, or nil
	v      int
	claim  claim // zero when free or unclaimed
	away   *time.Timer
	taken  []time.Time // recent takeovers

	ids *idLog // of the mail this claim has sent; nil before the first

	queue      frameQueue // relay and presence frames
	queueBytes int
	presence   int32 // presence frames in queue
	holding    bool  // a sender waits for the queue to drain

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

type nudges []nudge

func (all nudges) send() {
	for _, n := range all {
		n.send()
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
	var out nudges // of rooms that had their time
	sh.mu.Lock()
	for _, s := range sh.sessions {
		s.mu.Lock()
		if s.over(now) {
			out = append(out, sh.end(s, errGone)...)
		}
		s.mu.Unlock()
	}
	sh.mu.Unlock()
	out.send()
}

func (h *memoryHub) Open(_ context.Context, m meta) error {
	sh := h.shard(m.ID)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	if sh.sessions[m.ID] != nil {
		return errTaken
	}
	if m.Room == nil {
		_, err := sh.open(h, m, network{})
		return err
	}
	if !h.codes.add(m.Room.Code, m.ID) {
		return errTaken
	}
	_, err := sh.open(h, m, m.Room.Owner)
	if err != nil {
		h.codes.remove(m.Room.Code)
	}
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
	s := &memorySession{hub: h, id: m.ID, firstSeq: max(seqAt(now), h.lastSeq.Load()), owner: owner, expires: m.Expires, lastLeft: now, room: m.Room}
	if m.Room == nil {
		s.seats = s.pair[:]
	} else {
		h.rooms.Add(1)
	}
	sh.sessions[m.ID] = s
	return s, nil
}

// lock finds a live session and locks it, or returns nil.
func (h *memoryHub) lock(id sessionID) *memorySession {
	sh := h.shard(id)
	sh.mu.Lock()
	s := sh.sessions[id]
	sh.mu.Unlock()
	if s == nil {
		return nil
	}
	s.mu.Lock()
	if s.ended || s.over(time.Now()) { // the janitor ends it
		s.mu.Unlock()
		return nil
	}
	return s
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
	out := sh.end(s, why)
	s.mu.Unlock()
	sh.mu.Unlock()
	out.send()
	return nil
}

// endIfOver ends s if nothing holds it any more.
func (h *memoryHub) endIfOver(s *memorySession) {
	sh := h.shard(s.id)
	sh.mu.Lock()
	s.mu.Lock()
	var out nudges
	if !s.ended && s.over(time.Now()) {
		out = sh.end(s, errGone)
	}
	s.mu.Unlock()
	sh.mu.Unlock()
	out.send()
}

func (h *memoryHub) Tell(_ context.Context, id sessionID, e event) error {
	s := h.lock(id)
	if s == nil {
		return errGone
	}
	wake := s.announce(nil, e)
	s.mu.Unlock()
	wake.send()
	return nil
}

// over reports whether nothing holds a pair at now: no code, nobody connected
// or away, and nothing that waits for someone who may still come; or whether a
// room's time is up. The caller holds mu.
func (s *memorySession) over(now time.Time) bool {
	if s.room != nil {
		return !now.Before(s.expires) || s.taken() == 0 && !now.Before(s.lastLeft.Add(s.hub.roomEmptyTTL))
	}
	waiting := false
	for _, slot := range s.seats {
		if slot.state() != absent {
			return false
		}
		waiting = waiting || slot != nil && slot.queue.len()+len(slot.mail) > 0
	}
	if waiting && now.Before(s.lastLeft.Add(s.hub.sessionTTL)) {
		return false
	}
	return !now.Before(s.expires)
}

// taken counts the seats that someone is in, or away from. The caller holds mu.
func (s *memorySession) taken() int {
	n := 0
	for _, slot := range s.seats {
		if slot.state() != absent {
			n++
		}
	}
	return n
}

// end empties a session, takes it out of the shard, and returns what to tell
// who was connected. The caller holds mu and the session's.
func (sh *memoryShard) end(s *memorySession, why error) (out nudges) {
	h := s.hub
	s.ended = true
	delete(sh.sessions, s.id)
	h.sessions.Add(-1)
	h.owners.give(s.owner)
	if s.room != nil {
		h.rooms.Add(-1)
		h.codes.remove(s.room.Code)
	}
	for _, slot := range s.seats {
		if slot == nil {
			continue
		}
		if slot.holder != nil {
			out = append(out, nudge{slot.holder, why})
			slot.holder = nil
		}
		slot.stopAway()
		slot.empty(h, dropExpired)
		h.raiseSeq(slot.lastSeq)
	}
	clear(s.seats)
	return out
}

// empty drops all that waits for a slot, which nobody will come back to.
func (s *memorySlot) empty(h *memoryHub, why dropReason) {
	if n := len(s.mail) + s.queue.len() - int(s.presence); n > 0 {
		h.dropped(why, n)
	}
	waiting := s.queue.waiting()
	for i := range waiting {
		waiting[i].release()
	}
	h.queued.add(-s.queueCost(h) - s.mailBytes - len(s.mail)*h.frameCost)
	s.queue, s.queueBytes, s.presence, s.mail, s.mailBytes = frameQueue{}, 0, 0, nil, 0
}

// seatIndex returns which of a pair's seats is called name, or -1.
func seatIndex(name string) int {
	switch name {
	case "A":
		return 0
	case "B":
		return 1
	}
	return -1
}

// raiseSeq has the sessions to come begin behind seq.
func (h *memoryHub) raiseSeq(seq uint64) {
	for last := h.lastSeq.Load(); seq > last; last = h.lastSeq.Load() {
		if h.lastSeq.CompareAndSwap(last, seq) {
			return
		}
	}
}

// seqAt is the least seq that mail gets at a time: the milliseconds since 2025. A
// clock that is before that knows no better.
func seqAt(t time.Time) uint64 { return uint64(max(t.Sub(seqEpoch()).Milliseconds(), 0)) }

func seqEpoch() time.Time { return time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC) }

// slot returns a pair's slot at index i, created if need be. The caller holds mu.
func (s *memorySession) slot(i int) *memorySlot {
	if s.seats[i] == nil {
		s.seats[i] = &memorySlot{name: string(rune('A' + i)), lastSeq: s.firstSeq}
	}
	return s.seats[i]
}

func (h *memoryHub) Join(_ context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	if !r.room && seatIndex(r.name) < 0 {
		return nil, view{}, errNoPeer
	}
	m := &memorySeat{notify: notify}
	v, wake, err := h.join(id, r, m)
	wake.send()
	if err != nil {
		return nil, view{}, err
	}
	return m, v, nil
}

// join seats m. It returns what to tell whom m replaced, and the others.
func (h *memoryHub) join(id sessionID, r joinRequest, m *memorySeat) (v view, wake nudges, err error) {
	sh := h.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	s := sh.sessions[id]
	now := time.Now()
	if s != nil {
		s.mu.Lock()
		if s.over(now) { // the janitor has not been here yet
			wake = sh.end(s, errGone)
			s.mu.Unlock()
			s = nil
		}
	}
	if s == nil {
		if !r.create || r.room {
			return v, wake, errGone
		}
		if s, err = sh.open(h, meta{ID: id}, r.owner); err != nil {
			return v, wake, err
		}
		s.mu.Lock()
	}
	defer s.mu.Unlock()
	switch {
	case r.room != (s.room != nil):
		return v, wake, errGone
	case r.room:
		return s.joinRoom(r, m, now)
	default:
		return s.joinPair(r, m, now)
	}
}

// joinPair is the part of memoryHub.join for a pair, with mu held.
func (s *memorySession) joinPair(r joinRequest, m *memorySeat, now time.Time) (v view, wake nudges, err error) {
	i := seatIndex(r.name)
	slot, other := s.slot(i), s.seats[1-i]
	if slot.state() == absent {
		slot.claim, slot.ids, slot.taken = r.claim, nil, nil
	} else {
		if slot.claim == (claim{}) || slot.claim != r.claim {
			return v, wake, errBusy
		}
		if v.resumed, wake, err = slot.resume(s.hub, now); err != nil {
			return v, wake, err
		}
	}
	m.session, m.slot = s, slot
	slot.holder, slot.v = m, r.v
	s.met(now)
	v.mail, v.held, v.lastID = len(slot.mail) > 0, other.overfull(m), slot.ids.highest()
	if v.peer = other.state(); v.peer != absent {
		v.peerV = other.v
	}
	wake = append(wake, s.announce(slot, event{kind: eventJoined, resumed: v.resumed != resumedNot, peerV: r.v})...)
	return v, wake, nil
}

// resume prepares a slot for another connection of who holds it, or is away.
func (s *memorySlot) resume(h *memoryHub, now time.Time) (r resumption, wake nudges, err error) {
	r = resumedBack
	if s.holder != nil {
		if !s.mayTakeOver(now) {
			return resumedNot, nil, errTakeovers
		}
		r, wake = resumedTakeover, nudges{{s.holder, errReplaced}}
	}
	s.stopAway()
	s.dropPresence(h)
	return r, wake, nil
}

// met notes when two seats are connected for the first time. The caller holds mu.
func (s *memorySession) met(now time.Time) {
	connected := 0
	for _, slot := range s.seats {
		if slot.state() == present {
			connected++
		}
	}
	if connected >= 2 && s.bothAt.IsZero() {
		s.bothAt = now
	}
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

// announce queues a presence frame for all who are connected, except to by's
// seat, and returns the nudges to send. The caller holds mu.
func (s *memorySession) announce(by *memorySlot, e event) (wake nudges) {
	for _, slot := range s.seats {
		if slot != nil && slot != by && slot.holder != nil {
			wake = append(wake, slot.announce(s.hub, e))
		}
	}
	return wake
}

// announce queues a presence frame for who is connected to the slot, and
// returns the nudge to send. One who has not looked for very long is put out.
func (s *memorySlot) announce(h *memoryHub, e event) nudge {
	if s.presence >= maxPresence {
		return nudge{s.holder, errSlow}
	}
	s.presence++
	s.push(h, frame{kind: kindPresence, event: e})
	return nudge{s.holder, nil}
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
	s := m.session
	s.mu.Lock()
	if err := m.check(); err != nil {
		s.mu.Unlock()
		f.release()
		return receipt{}, err
	}
	f.from = m.slot.name
	if to == "" && s.room != nil && f.kind == kindRelay {
		wake, err := m.postAll(f)
		s.mu.Unlock()
		wake.send()
		return receipt{}, err
	}
	r, wake, err := m.post(m.addressee(to), f)
	s.mu.Unlock()
	if err != nil {
		return r, err
	}
	if m.corked != wake {
		m.uncork()
	}
	if hold && wake.err == nil {
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

// addressee returns the slot that to means, or nil. The caller holds mu.
func (m *memorySeat) addressee(to string) *memorySlot {
	s := m.session
	if s.room != nil {
		return s.member(to, m.slot)
	}
	i := seatIndex(to)
	if to == "" {
		i = m.otherIndex()
	}
	if i < 0 {
		return nil
	}
	return s.slot(i)
}

// otherIndex returns the index of the other seat of a pair.
func (m *memorySeat) otherIndex() int { return 1 - seatIndex(m.slot.name) }

// other returns the other seat of a pair; nil for none, and in a room. The
// caller holds mu.
func (m *memorySeat) other() *memorySlot {
	if m.session.room != nil {
		return nil
	}
	return m.session.seats[m.otherIndex()]
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
		m.uncork() // what was accepted before
		return err
	}
	slot := m.slot
	slot.vacate(s.hub)
	s.lastLeft = time.Now()
	var wake nudges
	if forGood || slot.claim == (claim{}) {
		wake = s.free(slot)
	} else {
		wake = s.reserve(slot)
	}
	s.mu.Unlock()
	m.uncork()
	wake.send()
	s.hub.endIfOver(s)
	return nil
}

// vacate takes the holder out of a slot. The caller holds the session's mu.
func (s *memorySlot) vacate(h *memoryHub) {
	s.holder = nil
	s.dropPresence(h)
	waiting := s.queue.waiting()
	for i := range waiting {
		waiting[i].trim()
	}
	s.holding = false
}

// reserve keeps a vacant slot for whoever claimed it, with mu held, and returns
// whom to tell.
func (s *memorySession) reserve(slot *memorySlot) nudges {
	var t *time.Timer
	t = time.AfterFunc(s.hub.resumeTTL, func() { s.reservationOver(slot, &t) })
	slot.away = t
	if s.room != nil {
		return nil // whom nobody sees go, nobody sees return
	}
	return s.announce(slot, event{kind: eventAway})
}

// reservationOver frees a slot whose holder did not come back in time. timer
// is the reservation's, and is read with mu held.
func (s *memorySession) reservationOver(slot *memorySlot, timer **time.Timer) {
	s.mu.Lock()
	if slot.away != *timer { // ended, or back just now
		s.mu.Unlock()
		return
	}
	slot.stopAway()
	s.lastLeft = time.Now()
	wake := s.free(slot)
	s.mu.Unlock()
	wake.send()
	s.hub.endIfOver(s)
}

// free makes a vacant slot free, with mu held: what it left waiting for whoever
// is not connected is stale, those who are connected are told, by the nudges it
// returns.
func (s *memorySession) free(slot *memorySlot) (wake nudges) {
	for _, peer := range s.seats {
		if peer != nil && peer != slot && peer.holder == nil {
			stale := peer.filter(s.hub, func(f *frame) bool { return f.from != slot.name })
			if stale > 0 {
				s.hub.dropped(dropStale, stale)
			}
		}
	}
	if s.room != nil {
		return s.remove(slot)
	}
	slot.claim, slot.v, slot.taken = claim{}, 0, nil
	wake = s.announce(slot, event{kind: eventLeft})
	s.forget(0)
	s.forget(1)
	return wake
}

// forget drops a pair's slot that has nothing to remember, so that a finished
// session whose code still lives is small.
func (s *memorySession) forget(i int) {
	slot := s.seats[i]
	if slot != nil && slot.state() == absent && slot.queue.len() == 0 && slot.lastSeq == s.firstSeq {
		s.seats[i] = nil
	}
}

// What the hub in memory does for rooms alone.

func (h *memoryHub) Find(_ context.Context, code string) (sessionID, error) {
	if id, ok := h.codes.find(code); ok {
		if s := h.lock(id); s != nil {
			s.mu.Unlock()
			return id, nil
		}
	}
	return sessionID{}, errGone
}

func (h *memoryHub) Get(_ context.Context, id sessionID) (m meta, taken int, err error) {
	s := h.lock(id)
	if s == nil {
		return meta{}, 0, errGone
	}
	defer s.mu.Unlock()
	return s.meta(), s.taken(), nil
}

func (s *memorySession) meta() meta { return meta{ID: s.id, Expires: s.expires, Room: s.room} }

func (h *memoryHub) Update(_ context.Context, id sessionID, c change) (m meta, taken int, err error) {
	s := h.lock(id)
	if s == nil {
		return meta{}, 0, errGone
	}
	defer s.mu.Unlock()
	if s.room == nil {
		return meta{}, 0, errGone
	}
	room := c.of(*s.room)
	s.room = &room
	return s.meta(), s.taken(), nil
}
