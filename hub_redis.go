package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

// redisHub is a hub in Redis, one of any number of instances. Every method is
// one script, so that it happens whole or not at all, and what it has to say to
// connections of this instance comes with its answer. For those of others it
// is published on their instance's channel.
type redisHub struct {
	// static after construction
	hubOptions
	*redisStore
	scripts  hubScripts
	instance string        // unlike any other's, and any earlier life of this one
	lease    time.Duration // how long after its last sign an instance is dead
	look     time.Duration // between two looks at every seat
	waken    chan struct{} // tells Run that something is due, or should be looked at

	number     atomic.Uint64 // of the last seat
	subscribed atomic.Bool
	leased     atomic.Bool  // the last tick has worked
	losses     atomic.Int64 // leases lost
	counts     hubCounts

	mu sync.Mutex
	// guarded by mu
	seats   map[uint64]*redisSeat
	leaving map[uint64]leaving // seats that could not be left yet, by number
	owned   map[string]network // sessions that count to a quota here
	lookNow bool               // at all seats, for notifications may have been lost
	looks   int                // at all seats, so far
	ticked  time.Time          // when the last tick that was answered began
	data    string             // names what is in Redis: another name, and that was lost
}

// hubCounts are what the last tick found in Redis, in all instances' sessions.
type hubCounts struct{ sessions, rooms, queued atomic.Int64 }

// hubScripts are the scripts of a hub.
type hubScripts struct {
	open, join, leave, post, take, ack, held, report, tell, end, room, look, tick, owned, relayOf *redisScript
}

func newHubScripts(o hubOptions, lease time.Duration, clock string) (s hubScripts) {
	var before strings.Builder
	before.WriteString(clock)
	constant := func(name string, n int64) { fmt.Fprintf(&before, "local %s = %d\n", name, n) }
	constant("RESUME_TTL", micros(o.resumeTTL))
	constant("SESSION_TTL", micros(o.sessionTTL))
	constant("ROOM_EMPTY_TTL", micros(o.roomEmptyTTL))
	constant("LEASE", micros(lease))
	constant("MAX_SESSIONS", int64(o.maxSessions))
	constant("MAX_QUEUED", o.queued.limit)
	constant("HOLD", int64(o.holdBytes))
	constant("SLOW", int64(o.slowBytes))
	constant("LONG_QUEUE", longQueue)
	constant("WAIT_ITEMS", waitItems)
	constant("WAIT_BYTES", waitBytes)
	constant("MAIL_ITEMS", mailItems)
	constant("MAIL_BYTES", mailBytes)
	constant("MAX_PRESENCE", maxPresence)
	constant("PRESENCE_SIZE", presenceSize)
	constant("TAKEOVERS", takeovers)
	constant("TAKEOVER_WINDOW", micros(takeoverWindow))
	constant("MAX_GAPS", maxGaps)
	constant("EPOCH_MS", seqEpoch().UnixMilli())
	for name, script := range map[string]**redisScript{
		"open": &s.open, "join": &s.join, "leave": &s.leave, "post": &s.post, "take": &s.take, "ack": &s.ack, "held": &s.held, "report": &s.report,
		"tell": &s.tell, "end": &s.end, "room": &s.room, "look": &s.look, "tick": &s.tick, "owned": &s.owned, "relay_of": &s.relayOf,
	} {
		files := []string{"session"}
		switch name { // these two are most of the work
		case "post":
			files = []string{"relay", "session"}
		case "take":
			files = []string{"drain", "session"}
		}
		*script = newScript(name, before.String(), files...)
	}
	return s
}

var _ hub = (*redisHub)(nil)

// leaseOf is how long an instance's lease lasts, which it renews four times a
// heartbeat: so peers learn of its end within two.
func leaseOf(heartbeat time.Duration) time.Duration { return max(heartbeat*5/4, 500*time.Millisecond) }

func newRedisHub(o hubOptions, r *redisStore, heartbeat time.Duration, clock string) *redisHub {
	lease := leaseOf(heartbeat)
	return &redisHub{
		hubOptions: o, redisStore: r,
		scripts:  newHubScripts(o, lease, clock),
		instance: strings.ReplaceAll(uuid.NewString(), "-", ""),
		lease:    lease,
		look:     max(heartbeat, 100*time.Millisecond),
		waken:    make(chan struct{}, 1),
		seats:    make(map[uint64]*redisSeat),
		leaving:  make(map[uint64]leaving),
		owned:    make(map[string]network),
	}
}

// A redisSeat is one connection's hold on a seat. In Redis the seat names its
// holder, instance and number, which are of no other connection ever.
type redisSeat struct {
	// static after construction
	hub     *redisHub
	key     string // the session's ID, in words
	number  uint64
	holder  string
	request joinRequest
	notify  func(error)

	// of the posting goroutine
	corked []string // who is not told of held posts
	unsure idGap    // from the lowest to the highest id of mail that Redis may never have seen

	held atomic.Bool // it was told to pause

	joining sync.Mutex // held while it is seated again

	mu sync.Mutex
	// guarded by mu
	name   string // of the seat, once it has one
	losses int64  // of leases, when it was seated
	data   string // in which Redis data
	seated bool
	joins  int // times that it was seated again
	left   bool
	out    error // what its methods answer, once it is out
	told   bool  // and the connection knows
}

// errBackend is wrapped by what says that Redis has answered nonsense.
var errBackend = errors.New("redis: an answer nobody understands")

// run runs a script on sessions, passes on what it says to connections, and
// returns what else it answers.
func (h *redisHub) run(ctx context.Context, s *redisScript, sessions []string, args ...any) (answer []any, err error) {
	keys := make([]string, len(sessions))
	for i, id := range sessions {
		keys[i] = sessionKey(id)
	}
	res, err := h.eval(ctx, s, keys, args...)
	if err != nil {
		return nil, err
	}
	if len(res) < 3 {
		return nil, errBackend
	}
	drops := luaList(res[2])
	for i := 0; i+1 < len(drops); i += 2 {
		for r := range numDropReasons {
			if r.String() == luaText(drops[i]) {
				h.dropped(r, int(luaInt(drops[i+1])))
			}
		}
	}
	for _, message := range luaList(res[1]) {
		h.deliver(luaText(message))
	}
	status := luaText(res[0])
	if status == "ok" {
		return res[3:], nil
	}
	for _, m := range errorMeanings {
		if m.script == status {
			return res[3:], m.err
		}
	}
	return nil, errBackend
}

// sessionKey is where a session is in Redis. The braces keep its keys together.
func sessionKey(id string) string { return "parley:{" + id + "}" }

// deliver tells a connection of this instance what a script has to say to it.
func (h *redisHub) deliver(message string) {
	if message == "" {
		return
	}
	kind, rest := message[0], message[1:]
	if kind == 'o' {
		h.disown(rest)
		return
	}
	number, _ := strconv.ParseUint(rest, 10, 64)
	h.mu.Lock()
	m := h.seats[number]
	h.mu.Unlock()
	if m == nil { // it has left
		return
	}
	switch kind {
	case 'n':
		m.notify(nil)
	case 's':
		m.notify(errSlow) // and it sits there until it leaves
	case 'r':
		m.putOut(errReplaced, errReplaced)
	case 'x':
		m.putOut(errSlow, errReplaced)
	case 'd':
		m.putOut(errRoomDeleted, errGone)
	case 'g':
		m.putOut(errGone, errGone)
	}
}

// putOut tells the connection why it is out, once, and makes its methods answer
// err.
func (m *redisSeat) putOut(why, err error) {
	m.mu.Lock()
	first := !m.told && !m.left
	m.told = m.told || first
	if m.out == nil {
		m.out = err
	}
	m.mu.Unlock()
	if first {
		m.notify(why)
	}
}

// own notes that a session counts to a quota of this instance, unless it is noted
// already.
func (h *redisHub) own(id string, n network) (noted bool) {
	if h.owners.limit == 0 || !n.IsValid() {
		return false
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if _, is := h.owned[id]; is {
		return false
	}
	h.owned[id] = n
	return true
}

// disown gives back what a session took, once.
func (h *redisHub) disown(id string) {
	h.mu.Lock()
	n, ok := h.owned[id]
	delete(h.owned, id)
	h.mu.Unlock()
	if ok {
		h.owners.give(n)
	}
}

// counted is what scripts are told of a session that counts to a quota.
func (h *redisHub) counted(n network) string {
	if h.owners.limit == 0 || !n.IsValid() {
		return ""
	}
	return "1"
}

// A redisMeta is what of a session no script needs to know.
type redisMeta struct {
	Expires time.Time
	Creator string    `json:",omitempty"`
	Token   claim     `json:",omitzero"`
	Owner   network   `json:",omitzero"`
	Created time.Time `json:",omitzero"`
}

func (h *redisHub) Open(ctx context.Context, m meta) error {
	info := redisMeta{Expires: m.Expires}
	owner := network{}
	if m.Room != nil {
		info.Creator, info.Token, info.Owner, info.Created = m.Room.Creator, m.Room.Token, m.Room.Owner, m.Room.Created
		owner = m.Room.Owner
	}
	text, err := json.Marshal(info)
	if err != nil {
		return err
	}
	args := []any{h.instance, m.Expires.UnixMicro(), h.counted(owner), text}
	if m.Room != nil {
		args = append(args, m.Room.Code, m.Room.Max, flag01(m.Room.Locked), m.Room.Password.bytes())
	}
	if ok, _ := h.owners.take(owner); !ok {
		return errTooMany
	}
	id := m.ID.String()
	h.own(id, owner)
	if _, err = h.run(ctx, h.scripts.open, []string{id}, args...); err != nil && !inDoubt(err) {
		h.disown(id) // otherwise a look does, if it is not there
	}
	return err
}

func flag01(b bool) string {
	if b {
		return "1"
	}
	return "0"
}

// bytes is a password hash as Redis has it; none is empty.
func (p passwordHash) bytes() []byte {
	if p == (passwordHash{}) {
		return nil
	}
	return append(p.salt[:], p.key[:]...)
}

func (h *redisHub) Find(ctx context.Context, code string) (sessionID, error) {
	m, _, err := h.room(ctx, "", "", "", "", "", code)
	return m.ID, err
}

func (h *redisHub) Get(ctx context.Context, id sessionID) (m meta, taken int, err error) {
	return h.room(ctx, id.String(), "", "", "", "")
}

func (h *redisHub) Update(ctx context.Context, id sessionID, c change) (m meta, taken int, err error) {
	var seats, locked, password any = "", "", ""
	if c.Max != nil {
		seats = *c.Max
	}
	if c.Locked != nil {
		locked = flag01(*c.Locked)
	}
	if c.Password != nil {
		password = append([]byte("="), c.Password.bytes()...)
	}
	return h.room(ctx, id.String(), "1", seats, locked, password)
}

// relayOf returns what the relay of a session is reached at: that of the instance
// that was asked first, which says what own is, until its lease is over.
func (h *redisHub) relayOf(ctx context.Context, id sessionID, own string) (string, error) {
	res, err := h.run(ctx, h.scripts.relayOf, []string{id.String()}, h.instance, own)
	if err != nil {
		return "", err
	}
	if len(res) < 1 {
		return "", errBackend
	}
	return luaText(res[0]), nil
}

// room runs the script of the same name, and reads what it answers.
func (h *redisHub) room(ctx context.Context, id string, args ...any) (m meta, taken int, err error) {
	res, err := h.run(ctx, h.scripts.room, []string{id}, append([]any{h.instance}, args...)...)
	if err != nil {
		return m, 0, err
	}
	if len(res) < 8 {
		return m, 0, errBackend
	}
	if m.ID, err = uuid.Parse(luaText(res[0])); err != nil {
		return m, 0, errBackend
	}
	var info redisMeta
	if text := luaText(res[3]); text != "" {
		if err := json.Unmarshal([]byte(text), &info); err != nil {
			return m, 0, errBackend
		}
	}
	m.Expires = info.Expires
	if luaText(res[1]) == "r" {
		m.Room = &roomMeta{Code: luaText(res[4]), Creator: info.Creator, Token: info.Token, Owner: info.Owner, Created: info.Created,
			Max: int(luaInt(res[5])), Locked: luaText(res[6]) == "1"}
		if p := luaText(res[7]); len(p) == len(m.Room.Password.salt)+len(m.Room.Password.key) {
			n := copy(m.Room.Password.salt[:], p)
			copy(m.Room.Password.key[:], p[n:])
		}
	}
	return m, int(luaInt(res[2])), nil
}

func (h *redisHub) End(ctx context.Context, id sessionID, why error) error {
	kind := "g"
	if errors.Is(why, errRoomDeleted) {
		kind = "d"
	}
	_, err := h.run(ctx, h.scripts.end, []string{id.String()}, h.instance, kind)
	return err
}

func (h *redisHub) Tell(ctx context.Context, id sessionID, e event) error {
	text := fmt.Sprintf("p%d0\x000\x00\x00\x00", e.kind)
	_, err := h.run(ctx, h.scripts.tell, []string{id.String()}, h.instance, text)
	return err
}

func (h *redisHub) Join(ctx context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	if !r.room && seatIndex(r.name) < 0 {
		return nil, view{}, errNoPeer
	}
	m := &redisSeat{hub: h, key: id.String(), number: h.number.Add(1), request: r, notify: notify, name: r.name}
	m.holder = h.instance + ":" + strconv.FormatUint(m.number, 10)
	h.mu.Lock()
	h.seats[m.number] = m
	m.losses, m.data = h.losses.Load(), h.data
	h.mu.Unlock()
	v, err := h.join(ctx, m, false)
	if err == nil {
		m.mu.Lock()
		m.seated = true
		m.mu.Unlock()
		return m, v, nil
	}
	h.mu.Lock()
	delete(h.seats, m.number)
	if inDoubt(err) { // then the seat may be taken
		newcomer := r.room && r.resume == claim{}
		h.retryLeaveLocked(m, newcomer)
	}
	h.mu.Unlock()
	return nil, view{}, err
}

// isNamed reports whether err is one that says what has not happened.
func isNamed(err error) bool {
	return slices.ContainsFunc(errorMeanings, func(m errorMeaning) bool { return m.script != "" && errors.Is(err, m.err) })
}

// join seats m; again says that it was seated before and has lost that.
func (h *redisHub) join(ctx context.Context, m *redisSeat, again bool) (v view, err error) {
	r := m.request
	kind, create, resume := "p", "", r.resume
	owner := network{}
	if r.room {
		kind = "r"
	} else if r.create {
		if ok, _ := h.owners.take(r.owner); ok {
			create, owner = "1", r.owner
		} else {
			create = "toomany"
		}
	}
	if again {
		m.mu.Lock()
		if r.room {
			resume = m.claim()
		}
		if m.data != h.dataName() {
			if owner.IsValid() {
				h.owners.give(owner)
				owner = network{}
			}
			create = "" // the session was lost with all the others
		}
		m.mu.Unlock()
	}
	res, err := h.run(ctx, h.scripts.join, []string{m.key}, h.instance, m.holder, kind, m.seatName(), r.claim.bytes(),
		r.v, create, h.counted(owner), resume.bytes(), r.displayName, r.password.bytes(), flag01(again))
	if err == nil && len(res) < 9 {
		err = errBackend
	}
	// In doubt, a look gives it back, if the session is not there or counts elsewhere.
	created := err == nil && luaInt(res[0]) == 1 || inDoubt(err)
	if create == "1" && (!created || !h.own(m.key, owner)) {
		h.owners.give(owner)
	}
	if err != nil {
		return v, err
	}
	v.resumed = resumption(luaInt(res[1]))
	v.peer, v.peerV = presence(luaInt(res[2])), int(luaInt(res[3]))
	v.mail, v.held = luaInt(res[4]) == 1, luaInt(res[5]) == 1
	if last := luaText(res[6]); last != "" {
		if v.lastID, err = strconv.ParseUint(last, 10, 64); err != nil {
			return v, errBackend
		}
	}
	m.held.Store(v.held)
	if roster := luaList(res[8]); r.room {
		if len(roster) < 2 {
			return v, errBackend
		}
		v.room = &roomView{host: luaText(res[7])}
		for i := 0; i+1 < len(roster); i += 2 {
			v.room.members = append(v.room.members, member{luaText(roster[i]), luaText(roster[i+1])})
		}
		v.room.self = v.room.members[0]
		if v.room.members = v.room.members[1:]; len(v.room.members) == 0 {
			v.room.members = nil
		}
		m.mu.Lock()
		m.name = v.room.self.id
		m.mu.Unlock()
		if v.resumed != resumedNot && !again {
			m.mu.Lock()
			m.request.claim = r.resume
			m.mu.Unlock()
		}
	}
	return v, nil
}

// claim returns what the seat is claimed with. The caller holds mu.
func (m *redisSeat) claim() claim { return m.request.claim }

func (m *redisSeat) seatName() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.name
}

// bytes is a claim as Redis has it; none is empty.
func (c claim) bytes() []byte {
	if c == (claim{}) {
		return nil
	}
	return c[:]
}

func (h *redisHub) dataName() string {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.data
}

// --- Seats.

// run runs a script for the seat. Where that finds the seat lost with the
// instance's lease, and nobody in it, it is taken again first.
func (m *redisSeat) run(ctx context.Context, s *redisScript, args ...any) ([]any, error) {
	m.mu.Lock()
	name, out, left, joins := m.name, m.out, m.left, m.joins
	m.mu.Unlock()
	if out != nil {
		return nil, out
	}
	args = append([]any{m.hub.instance, m.holder, name}, args...)
	res, err := m.hub.run(ctx, s, []string{m.key}, args...)
	if !left && (errors.Is(err, errGone) || errors.Is(err, errReplaced)) {
		if err = m.reseat(ctx, err, joins); err == nil {
			res, err = m.hub.run(ctx, s, []string{m.key}, args...)
		}
	}
	return res, err
}

// reseat is called when a script says that the seat is not held any more, which
// was asked when it had been seated again so many times.
func (m *redisSeat) reseat(ctx context.Context, why error, joins int) error {
	h := m.hub
	m.mu.Lock()
	known := m.losses != h.losses.Load() || m.joins != joins
	m.mu.Unlock()
	if !known {
		if _, err := h.tick(ctx); err != nil { // which learns whether the lease was lost
			return err
		}
	}
	m.joining.Lock()
	defer m.joining.Unlock()
	losses := h.losses.Load()
	m.mu.Lock()
	mine := m.out == nil && !m.left
	already, lost := mine && m.joins != joins, mine && m.losses != losses
	m.mu.Unlock()
	if already { // by another call
		return nil
	}
	if lost {
		_, err := h.join(ctx, m, true)
		switch {
		case err == nil:
			m.mu.Lock()
			m.losses, m.data = losses, h.dataName()
			m.joins++
			left := m.left
			m.mu.Unlock()
			if left { // meanwhile
				h.retryLeave(m, false)
				return errReplaced
			}
			h.metrics.reseated.Inc()
			m.notify(nil)
			return nil
		case !isNamed(err):
			return err
		case errors.Is(err, errGone):
			why = errGone
		default:
			why = errReplaced
		}
	}
	// Why that is so is perhaps on its way.
	m.mu.Lock()
	if m.out == nil {
		m.out = why
	}
	m.mu.Unlock()
	time.AfterFunc(reasonGrace, func() { m.putOut(why, why) })
	return why
}

// reasonGrace is how long a connection that is out waits to hear why.
const reasonGrace = 300 * time.Millisecond

func (m *redisSeat) Post(ctx context.Context, to string, f frame, hold bool) (receipt, error) {
	defer f.release()
	kind, data := "r", f.data
	id, before, after, unsureLo, unsureHi := "", "", "", "", ""
	if f.kind == kindMail {
		kind = "m"
		if f.id != 0 {
			id, before, after = mailID(f.id), mailID(f.id-1), mailID(f.id+1)
		}
		if m.unsure.lo != 0 {
			unsureLo, unsureHi = mailID(m.unsure.lo), mailID(m.unsure.hi)
		}
	} else {
		data = encodeFrame(m.seatName(), f)
	}
	res, err := m.run(ctx, m.hub.scripts.post, to, kind, data, f.size(), flag01(hold), id, before, after, unsureLo, unsureHi)
	if f.id != 0 {
		m.noteUnsure(f.id, err)
	}
	if len(res) < 3 {
		if err == nil {
			err = errBackend
		}
		return receipt{}, err
	}
	r := receipt{seq: uint64(luaInt(res[0])), held: luaInt(res[1]) == 1}
	m.held.Store(r.held)
	for _, holder := range luaList(res[2]) {
		if !slices.Contains(m.corked, luaText(holder)) {
			m.corked = append(m.corked, luaText(holder))
		}
	}
	if err == nil && !hold {
		m.Flush(ctx)
	}
	return r, err
}

// noteUnsure notes whether Redis has seen the mail of this id. It has to know of
// one that it may not have seen, or would take it for stored once it has stored a
// later one.
func (m *redisSeat) noteUnsure(id uint64, err error) {
	if err == nil || isNamed(err) {
		m.unsure = idGap{}
	} else {
		m.unsure = m.unsure.with(id)
	}
}

// mailID is an id in a form that is ordered as text.
func mailID(id uint64) string { return fmt.Sprintf("%020d", id) }

func (m *redisSeat) Flush(ctx context.Context) {
	if len(m.corked) == 0 {
		return
	}
	corked := m.corked
	m.corked = nil
	h := m.hub
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	for _, holder := range corked {
		instance, number, _ := strings.Cut(holder, ":")
		if instance == h.instance {
			h.deliver("n" + number)
		} else if err := h.client.Publish(ctx, wakeChannel(instance), "n"+number).Err(); err != nil {
			h.metrics.errors.Inc() // who is not told looks at the next heartbeat
		}
	}
}

func (m *redisSeat) Take(ctx context.Context, after uint64, budget int, buf []frame) (taken []frame, more bool, err error) {
	from := ""
	if after != noMail {
		from = strconv.FormatUint(after, 10)
	}
	res, err := m.run(ctx, m.hub.scripts.take, from, budget, cap(buf)-len(buf))
	if err == nil && len(res) < 2 {
		err = errBackend
	}
	if err != nil {
		return buf, false, err
	}
	for _, text := range luaList(res[1]) {
		if f, ok := decodeRedisFrame(luaText(text)); ok {
			buf = append(buf, f)
		}
	}
	return buf, luaInt(res[0]) == 1, nil
}

func (m *redisSeat) Held(ctx context.Context) (bool, error) {
	res, err := m.run(ctx, m.hub.scripts.held)
	held := err == nil && len(res) > 0 && luaInt(res[0]) == 1
	m.held.Store(held)
	return held, err
}

func (m *redisSeat) Ack(ctx context.Context, upTo uint64) error {
	// Lua's numbers are exact up to 2^53, which no seq gets near.
	_, err := m.run(ctx, m.hub.scripts.ack, min(upTo, 1<<53))
	return err
}

func (m *redisSeat) Report(ctx context.Context, o outcome) (since time.Duration, first bool, err error) {
	res, err := m.run(ctx, m.hub.scripts.report, int(o))
	if err == nil && len(res) < 2 {
		err = errBackend
	}
	if err != nil {
		return 0, false, err
	}
	if since = -1; luaInt(res[1]) >= 0 {
		since = time.Duration(luaInt(res[1])) * time.Microsecond
	}
	return since, luaInt(res[0]) == 1, nil
}

func (m *redisSeat) Leave(ctx context.Context, forGood bool) error {
	m.joining.Lock() // not while it is being seated again
	m.mu.Lock()
	m.left = true
	name, out := m.name, m.out
	m.mu.Unlock()
	m.joining.Unlock()
	h := m.hub
	if out != nil {
		h.forget(m)
		m.Flush(ctx)
		return out
	}
	err := h.leave(ctx, m, name, forGood)
	m.Flush(ctx)
	return err
}

// leave gives a seat up, now or, if Redis is away, as soon as it is back.
func (h *redisHub) leave(ctx context.Context, m *redisSeat, name string, forGood bool) error {
	_, err := h.run(ctx, h.scripts.leave, []string{m.key}, h.instance, m.holder, name, flag01(forGood))
	if err != nil && !isNamed(err) {
		h.retryLeave(m, forGood)
		return err
	}
	if err != nil && m.mayBeSeatedYet() {
		h.retryLeave(m, forGood)
		return err
	}
	h.forget(m)
	if err == nil && !forGood && h.resumeTTL < h.tickEvery() {
		h.wakeRun() // its reservation is over before the next tick
	}
	return err
}

// mayBeSeatedYet reports, once, whether the script that was to take the seat had
// no answer: it may run even after one that was called later.
func (m *redisSeat) mayBeSeatedYet() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := !m.seated
	m.seated = true
	return first
}

// retryLeave has a seat left as soon as Redis is there.
func (h *redisHub) retryLeave(m *redisSeat, forGood bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.seats, m.number)
	h.retryLeaveLocked(m, forGood)
}

// leaveMost bounds the seats that wait to be left. Those beyond are strays.
const leaveMost = 1 << 16

// A leaving is a seat that could not be left yet.
type leaving struct {
	seat    *redisSeat
	forGood bool
}

// retryLeaveLocked keeps of a seat what leaving it needs, and not its
// connection. The caller holds h.mu.
func (h *redisHub) retryLeaveLocked(m *redisSeat, forGood bool) {
	if len(h.leaving) >= leaveMost {
		return
	}
	m.mu.Lock()
	rest := &redisSeat{hub: h, key: m.key, number: m.number, holder: m.holder, name: m.name, seated: m.seated, left: true}
	m.mu.Unlock()
	h.leaving[rest.number] = leaving{rest, forGood}
}

// inDoubt reports whether a script that came to err may have run all the same: it
// may have reached Redis, and its answer is none that says what has not happened.
func inDoubt(err error) bool {
	if err == nil || isNamed(err) {
		return false
	}
	dial, ok := errors.AsType[*net.OpError](err)
	return !(ok && dial.Op == "dial") && !errors.Is(err, redis.ErrPoolTimeout) && !errors.Is(err, redis.ErrPoolExhausted) && !errors.Is(err, redis.ErrClosed)
}

func (h *redisHub) forget(m *redisSeat) {
	h.mu.Lock()
	defer h.mu.Unlock()
	delete(h.seats, m.number)
	delete(h.leaving, m.number)
}

// --- Frames in Redis, as lua/session.lua has them.

// encodeFrame returns a relay frame as a list has it.
func encodeFrame(from string, f frame) []byte {
	binary := byte('0')
	if f.binary {
		binary = '1'
	}
	b := make([]byte, 0, 4+len(from)+len(f.data))
	b = append(b, 'r', byte(f.typ), binary, byte(len(from)))
	b = append(b, from...)
	return append(b, f.data...)
}

// decodeRedisFrame reads what take answers.
func decodeRedisFrame(text string) (f frame, ok bool) {
	if text == "" {
		return f, false
	}
	switch text[0] {
	case 'r':
		if len(text) < 4 || len(text) < 4+int(text[3]) {
			return f, false
		}
		from := 4 + int(text[3])
		return frame{kind: kindRelay, typ: frameType(text[1]), binary: text[2] == '1', from: text[4:from], data: []byte(text[from:])}, true
	case 'm':
		part := strings.SplitN(text[1:], "\x00", 4)
		if len(part) < 4 {
			return f, false
		}
		f = frame{kind: kindMail, from: part[2], data: []byte(part[3])}
		f.seq, _ = strconv.ParseUint(part[0], 10, 64)
		f.id, _ = strconv.ParseUint(part[1], 10, 64)
		return f, f.seq != 0
	case 'p':
		part := strings.SplitN(text, "\x00", 5)
		if len(part) < 5 || len(part[0]) < 3 {
			return f, false
		}
		f = frame{kind: kindPresence, event: event{kind: eventKind(part[0][1] - '0'), resumed: part[0][2] == '1'}}
		f.event.peerV, _ = strconv.Atoi(part[1])
		if part[2] != "" {
			f.event.room = &roomEvent{member: member{part[2], part[3]}, host: part[4]}
		}
		return f, true
	}
	return f, false
}

// A backend is where the hub keeps its sessions when that is not this process.
type backend interface {
	// check looks at it once. An *unfitError is final; after any other it may be
	// there later.
	check(ctx context.Context) error
	// close ends whatever waits for it.
	close()
}

// An unfitError says that the backend is none that can be used, however long one
// waits.
type unfitError struct{ text string }

func (e *unfitError) Error() string { return e.text }

// A remoteSeat is the seat of a hub that may take its time to answer, as a
// connection holds it. Whoever has the write turn never waits for the hub: what
// there is to take is fetched by a goroutine, which takes the turn when it is
// back. And while the reading goroutine waits, that is no silence of the client.
type remoteSeat struct {
	seat // static once joined
	c    *conn

	news atomic.Bool // something may have come since the last fetch began

	mu sync.Mutex
	// guarded by mu
	fetched  []frame // and not yet taken
	fetching bool
	more     bool // there was more to fetch
	mail     bool // mail is asked for
	failed   int  // fetches in a row, at most maxRetries
	waiting  bool // until the next try
}

// What is fetched at once. With the connection it is lost, as far as it is not
// mail.
const (
	fetchFrames = takeFrames
	fetchBytes  = 16 << 10
)

// A fetch that failed is tried again after retryFetch, then twice as late each
// time, but never later than after a heartbeat.
const (
	retryFetch = 250 * time.Millisecond
	maxRetries = 10 // that are counted
)

func newRemoteSeat(c *conn) *remoteSeat {
	r := &remoteSeat{c: c}
	r.news.Store(true)
	return r
}

// ask notes that the reading goroutine waits for the hub.
func (r *remoteSeat) ask() (answered func()) {
	r.c.asking.Store(true)
	return func() {
		r.c.touch()
		r.c.asking.Store(false)
	}
}

func (r *remoteSeat) Post(ctx context.Context, to string, f frame, hold bool) (receipt, error) {
	defer r.ask()()
	return r.seat.Post(ctx, to, f, hold)
}

func (r *remoteSeat) Flush(ctx context.Context) {
	defer r.ask()()
	r.seat.Flush(ctx)
}

func (r *remoteSeat) Held(ctx context.Context) (bool, error) {
	defer r.ask()()
	return r.seat.Held(ctx)
}

func (r *remoteSeat) Ack(ctx context.Context, upTo uint64) error {
	defer r.ask()()
	return r.seat.Ack(ctx, upTo)
}

func (r *remoteSeat) Report(ctx context.Context, o outcome) (since time.Duration, first bool, err error) {
	defer r.ask()()
	return r.seat.Report(ctx, o)
}

// Take hands out what has been fetched, and sees to it that more is. It never
// begins a fetch as it hands something out: where the next one begins is known
// when that has been taken.
func (r *remoteSeat) Take(_ context.Context, after uint64, budget int, buf []frame) (taken []frame, more bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, bytes := 0, 0
	for n < len(r.fetched) && len(buf) < cap(buf) && (bytes == 0 || bytes+r.fetched[n].size() <= budget) {
		bytes += r.fetched[n].size()
		buf = append(buf, r.fetched[n])
		n++
	}
	clear(r.fetched[:n])
	if r.fetched = r.fetched[n:]; len(r.fetched) > 0 {
		return buf, true, nil
	}
	if mail := after != noMail; mail != r.mail {
		r.mail = mail
		r.news.Store(true)
	}
	switch {
	case r.fetching: // which takes the turn when it is back
	case n > 0:
		return buf, r.more || r.news.Load(), nil
	case r.news.Swap(false) || r.more:
		r.fetching = true
		r.c.tasks.Go(func() { r.fetch(after) })
	}
	return buf, false, nil
}

// fetch takes what waits. One that fails is tried again, later each time, until
// the connection ends.
func (r *remoteSeat) fetch(after uint64) {
	frames, more, err := r.seat.Take(context.Background(), after, fetchBytes, make([]frame, 0, fetchFrames))
	r.mu.Lock()
	r.fetched, r.more, r.fetching = frames, more, false
	if err == nil {
		r.failed = 0
	} else if !errors.Is(err, errReplaced) && !errors.Is(err, errGone) { // of which the connection is told
		r.tryLaterLocked()
	}
	r.mu.Unlock()
	if len(frames) > 0 || err == nil && r.news.Load() {
		r.c.wake()
	}
}

// tryLaterLocked has what could not be fetched looked for again. The caller holds
// mu.
func (r *remoteSeat) tryLaterLocked() {
	r.news.Store(true)
	if r.waiting || r.c.closing() != 0 {
		return
	}
	r.waiting = true
	time.AfterFunc(min(retryFetch<<r.failed, r.c.heartbeat), func() {
		r.mu.Lock()
		r.waiting = false
		r.mu.Unlock()
		r.c.wake()
	})
	r.failed = min(r.failed+1, maxRetries)
}
