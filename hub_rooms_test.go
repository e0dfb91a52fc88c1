package main

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// testHubRooms is the part of the contract that is about rooms.
func testHubRooms(t *testing.T, env hubEnv) {
	for _, s := range hubRoomScenarios {
		t.Run(s.name, func(t *testing.T) {
			env.run(t, func(t *testing.T) { s.run(newHubTest(t, env)) })
		})
	}
	t.Run("rooms/property", func(t *testing.T) { testHubRoomProperty(t, env) })
}

var hubRoomScenarios = []struct {
	name string
	run  func(*hubTest)
}{
	{"rooms/open", testHubRoomOpen},
	{"rooms/code free again", testHubRoomCode},
	{"rooms/capacity", testHubRoomCapacity},
	{"rooms/owners", testHubRoomOwners},
	{"rooms/find", testHubRoomFind},
	{"rooms/get", testHubRoomGet},
	{"rooms/get a pair", testHubRoomGetPair},
	{"rooms/update", testHubRoomUpdate},
	{"rooms/update what is no room", testHubRoomUpdateGone},
	{"rooms/nobody came", testHubRoomNobodyCame},
	{"rooms/all left", testHubRoomAllLeft},
	{"rooms/all away", testHubRoomAllAway},
	{"rooms/expired", testHubRoomExpired},
	{"rooms/expired as one joins", testHubRoomExpiredJoin},
	{"rooms/end", testHubRoomEnd},
	{"rooms/join", testHubRoomJoin},
	{"rooms/join sees who is away", testHubRoomJoinAway},
	{"rooms/refusals", testHubRoomRefusals},
	{"rooms/password", testHubRoomPassword},
	{"rooms/last seats", testHubRoomLastSeats},
	{"rooms/away takes a seat", testHubRoomAwayCounts},
	{"rooms/fewer seats", testHubRoomFewerSeats},
	{"rooms/not a pair", testHubRoomNotPair},
	{"rooms/resume", testHubRoomResume},
	{"rooms/resume whatever has changed", testHubRoomResumeAlways},
	{"rooms/takeover", testHubRoomTakeover},
	{"rooms/takeover limit", testHubRoomTakeoverLimit},
	{"rooms/reservation over", testHubRoomReservationOver},
	{"rooms/wrong claim", testHubRoomWrongClaim},
	{"rooms/left for good", testHubRoomLeft},
	{"rooms/host", testHubRoomHost},
	{"rooms/relay to one", testHubRoomDirected},
	{"rooms/relay to all", testHubRoomBroadcast},
	{"rooms/relay to nobody", testHubRoomNobody},
	{"rooms/relay by pieces", testHubRoomPieces},
	{"rooms/relay to one away", testHubRoomAwayFrames},
	{"rooms/relay to one away, items", testHubRoomAwayItems},
	{"rooms/relay to one away, bytes", testHubRoomAwayBytes},
	{"rooms/relay stale", testHubRoomStale},
	{"rooms/relay to one who leaves", testHubRoomPeerLeft},
	{"rooms/queued bytes", testHubRoomQueuedBytes},
	{"rooms/slow", testHubRoomSlow},
	{"rooms/slow and away", testHubRoomSlowAway},
	{"rooms/slow for good", testHubRoomSlowLeft},
	{"rooms/corked", testHubRoomCorked},
	{"rooms/corked by one put out", testHubRoomCorkedSlow},
	{"rooms/tell", testHubRoomTell},
	{"rooms/report", testHubRoomReport},
	{"relay/corked by one replaced", testHubRoomPairCorked}, // of a pair
}

// --- Words.

// hubRoomMeta describes a room of four that lives for an hour.
func (h *hubTest) hubRoomMeta(id sessionID, code string) meta {
	now := h.now()
	return meta{ID: id, Expires: now.Add(time.Hour), Room: &roomMeta{Code: code, Created: now, Max: 4}}
}

// hubRoom opens the room a scenario plays in, changed as it likes.
func (h *hubTest) hubRoom(change ...func(*meta)) {
	h.Helper()
	m := h.hubRoomMeta(h.id, "PARTY2")
	for _, c := range change {
		c(&m)
	}
	h.hubRoomOpens(nil, m)
}

// hubRoomOpens fails unless opening answers want.
func (h *hubTest) hubRoomOpens(want error, m meta) {
	h.Helper()
	h.start()
	h.settle() // what has ended counts to nobody any more
	if err := h.hub.Open(ctx, m); !errors.Is(err, want) {
		h.Errorf("open: %v, want %v", err, want)
	}
	if want == nil && !slices.Contains(h.ids, m.ID) {
		h.ids = append(h.ids, m.ID)
	}
}

// hubRoomUpdates changes the room a scenario plays in.
func (h *hubTest) hubRoomUpdates(c change) {
	h.Helper()
	if _, _, err := h.start().Update(ctx, h.id, c); err != nil {
		h.Error("update:", err)
	}
}

// hubRoomHas fails unless the room is there, with so many seats taken.
func (h *hubTest) hubRoomHas(taken int) {
	h.Helper()
	if _, n, err := h.start().Get(ctx, h.id); err != nil || n != taken {
		h.Errorf("%d seats are taken, %v; want %d", n, err, taken)
	}
}

// hubRoomIs fails unless m is what was opened, or what became of it.
func (h *hubTest) hubRoomIs(m, want meta) {
	h.Helper()
	if m.Room == nil || m.ID != want.ID || !m.Expires.Equal(want.Expires) || !m.Room.Created.Equal(want.Room.Created) {
		h.Fatalf("the room is %+v (%+v), want %+v (%+v)", m, m.Room, want, want.Room)
	}
	room := *m.Room
	if room.Created = want.Room.Created; room != *want.Room { // times are equal in more than one way
		h.Errorf("the room is %+v, want %+v", room, *want.Room)
	}
}

// hubRoomGone fails unless nothing knows of the room.
func (h *hubTest) hubRoomGone(id sessionID, code string) {
	h.Helper()
	_, found := h.start().Find(ctx, code)
	_, _, got := h.hub.Get(ctx, id)
	_, _, updated := h.hub.Update(ctx, id, change{})
	for what, err := range map[string]error{
		"find": found, "get": got, "update": updated,
		"tell": h.hub.Tell(ctx, id, event{kind: eventContested}),
	} {
		if !errors.Is(err, errGone) {
			h.Errorf("%s: %v, want %v", what, err, errGone)
		}
	}
	if _, err := h.tryJoin("late", id, hubRoomRequest("late")); !errors.Is(err, errGone) {
		h.Errorf("join: %v, want %v", err, errGone)
	}
}

// A hubRoomGuest is a connection in a room.
type hubRoomGuest struct{ *guest }

// hubRoomRequest asks for a seat as a newcomer, whose secret is the name.
func hubRoomRequest(name string) joinRequest {
	return joinRequest{room: true, name: name, claim: secret(name), displayName: strings.ToUpper(name)}
}

// hubRoomReturn asks for the seat this one had. Who does so has a new name and
// a new claim at hand, for the case that it is no more.
func hubRoomReturn(name string) joinRequest {
	r := hubRoomRequest("new " + name)
	r.resume = secret(name)
	return r
}

func (h *hubTest) hubRoomJoin(name string) hubRoomGuest {
	h.Helper()
	return hubRoomGuest{h.joinAs(name, h.id, hubRoomRequest(name))}
}

// hubRoomJoins seats some, who have seen each other come.
func (h *hubTest) hubRoomJoins(names ...string) (all []hubRoomGuest) {
	h.Helper()
	for _, name := range names {
		all = append(all, h.hubRoomJoin(name))
	}
	for _, g := range all {
		g.notified()
		g.takeAll()
	}
	return all
}

// hubRoomBack seats one who had this name, and fails unless it was so.
func (h *hubTest) hubRoomBack(name string, want resumption) hubRoomGuest {
	h.Helper()
	g := hubRoomGuest{h.joinAs(name, h.id, hubRoomReturn(name))}
	if g.view.resumed != want || g.view.room.self != (member{name, strings.ToUpper(name)}) {
		h.Errorf("%s came back as %v: resumption %d, want %d", name, g.view.room.self, g.view.resumed, want)
	}
	return g
}

// hubRoomRefuses fails unless a join is refused, and nobody sees it.
func (h *hubTest) hubRoomRefuses(want error, r joinRequest) {
	h.Helper()
	_, before, _ := h.start().Get(ctx, h.id)
	if _, err := h.tryJoin(r.name, h.id, r); !errors.Is(err, want) {
		h.Errorf("join: %v, want %v", err, want)
	}
	if _, after, _ := h.hub.Get(ctx, h.id); after != before {
		h.Errorf("a refused join changed the seats taken from %d to %d", before, after)
	}
}

// sees fails unless the view was this: the others in the order they came, and
// the host.
func (g hubRoomGuest) sees(host string, others ...string) {
	g.Helper()
	v := g.view.room
	if v == nil {
		g.Fatalf("%s has no view of a room", g)
	}
	var got []string
	for _, m := range v.members {
		got = append(got, hubRoomName(m))
	}
	if v.host != host || !slices.Equal(got, others) {
		g.Errorf("%s sees %v, host %s; want %v, host %s", g, got, v.host, others, host)
	}
	if g.view.held {
		g.Errorf("%s is held back", g)
	}
}

// takes is that of a guest, in which relay frames read "from: data" and
// presence says more.
func (g hubRoomGuest) takes(want ...string) {
	g.Helper()
	told := g.notified()
	got := g.takeAll()
	if !slices.Equal(got, want) {
		g.Errorf("%s takes\n\t%.300q\nwant\n\t%.300q", g, got, want)
	}
	if len(got) > 0 && !told {
		g.Errorf("%s was not told of %.80q", g, got)
	}
	if outs := g.news(); len(outs) > 0 {
		g.Errorf("%s was put out: %v", g, outs)
	}
}

func (g hubRoomGuest) takeAll() (got []string) {
	g.Helper()
	for more := true; more; {
		var frames []frame
		var err error
		if frames, more, err = g.Take(ctx, noMail, 64<<10, make([]frame, 0, 16)); err != nil {
			g.Fatalf("take by %s: %v", g, err)
		}
		if more && len(frames) == 0 {
			g.Fatalf("%s takes nothing, and there is more", g)
		}
		for i := range frames {
			got = append(got, hubRoomRead(&frames[i]))
			frames[i].release()
		}
	}
	return got
}

// hubRoomName names a member, and its display name unless that is the usual one.
func hubRoomName(m member) string {
	if m.displayName == strings.ToUpper(m.id) {
		return m.id
	}
	return fmt.Sprintf("%s (%s)", m.id, m.displayName)
}

// hubRoomRead puts a frame in words.
func hubRoomRead(f *frame) string {
	e := f.event.room
	switch {
	case f.kind == kindRelay:
		return f.from + ": " + string(f.data)
	case f.kind == kindPresence && f.event.kind == eventJoined && e != nil:
		return hubRoomName(e.member) + " joined, host " + e.host
	case f.kind == kindPresence && f.event.kind == eventLeft && e != nil:
		return e.id + " left, host " + e.host
	}
	return read(f)
}

// says relays to one, or with "" to all others. In a room that never says that
// the sender should pause.
func (g hubRoomGuest) says(to string, data ...string) {
	g.Helper()
	for _, d := range data {
		g.posts(nil, to, d)
	}
}

// posts fails unless relaying answers want.
func (g hubRoomGuest) posts(want error, to, data string) {
	g.Helper()
	r, err := g.Post(ctx, to, g.frame(data), false)
	if !errors.Is(err, want) {
		g.Errorf("relay of %.20q by %s to %q: %v, want %v", data, g, to, err, want)
	}
	if r.held {
		g.Errorf("%s should pause", g)
	}
}

// --- Opening.

func testHubRoomOpen(h *hubTest) {
	h.hubRoom()
	other := uuid.New()
	h.hubRoomOpens(errTaken, h.hubRoomMeta(h.id, "OTHER2")) // the ID
	h.hubRoomOpens(errTaken, h.hubRoomMeta(other, "PARTY2"))
	h.hubRoomOpens(errTaken, meta{ID: h.id, Expires: h.now().Add(time.Hour)})
	h.hubRoomGone(other, "OTHER2") // neither has left anything

	pair := uuid.New()
	h.hubRoomOpens(nil, meta{ID: pair, Expires: h.now().Add(time.Hour)})
	h.hubRoomOpens(errTaken, h.hubRoomMeta(pair, "OTHER2"))

	h.hubRoomOpens(nil, h.hubRoomMeta(other, "OTHER2"))
	if id, err := h.hub.Find(ctx, "PARTY2"); err != nil || id != h.id {
		h.Errorf("the first room's code leads to %v, %v", id, err)
	}
}

func testHubRoomCode(h *hubTest) {
	again := func(what string) {
		h.Helper()
		id := uuid.New()
		h.hubRoomOpens(nil, h.hubRoomMeta(id, "PARTY2"))
		if found, err := h.hub.Find(ctx, "PARTY2"); err != nil || found != id {
			h.Errorf("%s the code leads to %v, %v; want %v", what, found, err, id)
		}
		h.hub.End(ctx, id, errGone)
	}
	h.hubRoom()
	h.hubRoomJoin("ann")
	h.hub.End(ctx, h.id, errGone)
	h.guests[0].wantOut(errGone, errGone)
	again("after the end")

	h.hubRoom()
	h.advance(h.roomEmptyTTL + 15*time.Second) // when the janitor has been there
	again("with nobody in it")

	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	h.advance(time.Hour + 15*time.Second)
	ann.wantOut(errGone, errGone)
	again("after its time")
}

func testHubRoomCapacity(h *hubTest) {
	h.maxSessions = 2
	h.owners = newQuota(1)
	owner := netip.MustParsePrefix("10.0.0.1/32")
	pair := h.joinAs("A of a pair", uuid.New(), request("A"))
	h.hubRoom()
	third := uuid.New()
	m := h.hubRoomMeta(third, "THIRD2")
	m.Room.Owner = owner
	full := func() {
		h.Helper()
		h.hubRoomOpens(errCapacity, m)
		h.hubRoomGone(third, "THIRD2")
		if _, err := h.tryJoin("A", third, request("A")); !errors.Is(err, errCapacity) {
			h.Error("a pair more:", err)
		}
	}
	full()
	full()
	ann := h.hubRoomJoin("ann") // who comes to one that is there goes on
	full()
	h.hub.End(ctx, h.id, errGone)
	ann.wantOut(errGone, errGone)
	h.hub.End(ctx, h.id, errGone) // ending it twice frees no more
	h.hubRoomOpens(nil, m)        // whose owner the refused ones do not count to, nor is its code taken
	h.id = uuid.New()
	h.hubRoomOpens(errCapacity, h.hubRoomMeta(h.id, "PARTY2"))
	pair.leave(true)
	h.hubRoom()
	h.hubRoomOpens(errCapacity, h.hubRoomMeta(uuid.New(), "FOURTH"))
}

func testHubRoomOwners(h *hubTest) {
	h.owners = newQuota(2)
	mine, other, third := netip.MustParsePrefix("10.0.0.1/32"), netip.MustParsePrefix("10.0.0.2/32"), netip.MustParsePrefix("10.0.0.3/32")
	room := func(owner network, code string) meta {
		m := h.hubRoomMeta(uuid.New(), code)
		m.Room.Owner = owner
		return m
	}
	full := func(owner network) {
		h.Helper()
		h.hubRoomOpens(errTooMany, room(owner, "FIFTH2"))
		r := request("A")
		r.owner = owner
		if _, err := h.tryJoin("A", uuid.New(), r); !errors.Is(err, errTooMany) {
			h.Error("a pair more:", err)
		}
	}
	first, second := room(mine, "FIRST2"), room(mine, "SECOND")
	h.hubRoomOpens(nil, first)
	r := request("A")
	r.owner = mine
	pair := h.joinAs("A of a pair", uuid.New(), r)
	full(mine)
	h.hubRoomOpens(nil, room(other, "OTHER2"))
	h.hubRoomOpens(nil, room(other, "OTHER3"))
	full(other)
	h.hubRoomOpens(errTaken, room(third, "OTHER2")) // and counts to nobody
	h.hubRoomOpens(nil, room(third, "MORE22"))
	h.hubRoomOpens(nil, room(third, "MORE23"))

	pair.leave(true)
	h.hubRoomOpens(nil, second)
	full(mine)
	h.hub.End(ctx, first.ID, errGone)
	h.hub.End(ctx, first.ID, errGone) // gives back once
	h.hubRoomOpens(nil, room(mine, "FIRST2"))
	full(mine)
	h.advance(h.roomEmptyTTL + 15*time.Second) // nobody came to any
	h.hubRoomOpens(nil, room(mine, "FIFTH2"))  // which no refused one has kept
	h.hubRoomOpens(nil, room(mine, "FIRST2"))
	h.hubRoomOpens(errTooMany, room(mine, "SECOND"))
}

func testHubRoomFind(h *hubTest) {
	h.hubRoom()
	other := uuid.New()
	h.hubRoomOpens(nil, h.hubRoomMeta(other, "OTHER2"))
	find := func(code string, want sessionID) {
		h.Helper()
		if id, err := h.hub.Find(ctx, code); err != nil || id != want {
			h.Errorf("%s leads to %v, %v; want %v", code, id, err, want)
		}
	}
	find("PARTY2", h.id)
	find("OTHER2", other)
	for _, code := range []string{"PARTY3", "", h.id.String()} {
		if id, err := h.hub.Find(ctx, code); !errors.Is(err, errGone) {
			h.Errorf("%q leads to %v, %v; want %v", code, id, err, errGone)
		}
	}
	h.hub.End(ctx, h.id, errGone)
	h.hubRoomGone(h.id, "PARTY2")
	find("OTHER2", other)
}

func testHubRoomGet(h *hubTest) {
	want := h.hubRoomMeta(h.id, "PARTY2")
	want.Room.Creator, want.Room.Token = "who opened it", secret("token")
	want.Room.Owner = netip.MustParsePrefix("10.0.0.1/32")
	want.Room.Max, want.Room.Locked = 7, false
	want.Room.Password = passwordHash{key: [32]byte{1}, salt: [16]byte{2}}
	h.hubRoomOpens(nil, want)
	get := func(taken int) {
		h.Helper()
		m, n, err := h.hub.Get(ctx, h.id)
		if err != nil || n != taken {
			h.Errorf("%d seats taken, %v; want %d", n, err, taken)
		}
		h.hubRoomIs(m, want)
	}
	get(0)
	r := hubRoomRequest("ann")
	r.password = want.Room.Password
	ann := h.joinAs("ann", h.id, r)
	get(1)
	r = hubRoomRequest("bob")
	r.password = want.Room.Password
	bob := h.joinAs("bob", h.id, r)
	get(2)
	bob.leave(false)
	get(2) // bob is away
	ann.leave(true)
	get(1)
	h.advance(h.resumeTTL)
	get(0)
	if _, _, err := h.hub.Get(ctx, uuid.New()); !errors.Is(err, errGone) {
		h.Error("get what never was:", err)
	}
}

func testHubRoomGetPair(h *hubTest) {
	expires := h.now().Add(time.Hour)
	h.hubRoomOpens(nil, meta{ID: h.id, Expires: expires})
	get := func(taken int) {
		h.Helper()
		m, n, err := h.hub.Get(ctx, h.id)
		if err != nil || n != taken || m.ID != h.id || !m.Expires.Equal(expires) || m.Room != nil {
			h.Errorf("the pair is %+v with %d seats taken, %v; want %d taken", m, n, err, taken)
		}
	}
	get(0)
	a := h.join("A")
	get(1)
	h.join("B y").leave(false)
	get(2)
	a.write("mail waits in a seat that nobody has")
	a.leave(true)
	h.advance(h.resumeTTL)
	get(0)
}

func testHubRoomUpdate(h *hubTest) {
	want := h.hubRoomMeta(h.id, "PARTY2")
	want.Room.Creator = "who opened it"
	h.hubRoomOpens(nil, want)
	ann := h.hubRoomJoins("ann", "bob")[0]
	hash := passwordHash{key: [32]byte{1}, salt: [16]byte{2}}
	for _, step := range []struct {
		what string
		c    change
		edit func(*roomMeta)
	}{
		{"max", change{Max: new(9)}, func(r *roomMeta) { r.Max = 9 }},
		{"locked", change{Locked: new(true)}, func(r *roomMeta) { r.Locked = true }},
		{"password", change{Password: &hash}, func(r *roomMeta) { r.Password = hash }},
		{"nothing", change{}, func(*roomMeta) {}},
		{"all", change{Max: new(3), Locked: new(false), Password: new(passwordHash)},
			func(r *roomMeta) { r.Max, r.Locked, r.Password = 3, false, passwordHash{} }},
		{"two of them", change{Locked: new(true), Max: new(5)}, func(r *roomMeta) { r.Locked, r.Max = true, 5 }},
	} {
		before, _, err := h.hub.Get(ctx, h.id)
		if err != nil {
			h.Fatal(err)
		}
		old := *before.Room
		room := *want.Room
		step.edit(&room)
		want.Room = &room
		m, taken, err := h.hub.Update(ctx, h.id, step.c)
		if err != nil || taken != 2 {
			h.Errorf("update of %s: %d seats taken, %v", step.what, taken, err)
		}
		h.hubRoomIs(m, want)
		m, _, err = h.hub.Get(ctx, h.id)
		if err != nil {
			h.Error(err)
		}
		h.hubRoomIs(m, want)
		if *before.Room != old {
			h.Errorf("update of %s has changed what Get had returned", step.what)
		}
	}
	ann.takes() // nobody is told, nobody has to leave
}

func testHubRoomUpdateGone(h *hubTest) {
	gone := func(id sessionID) {
		h.Helper()
		if _, _, err := h.start().Update(ctx, id, change{Max: new(9)}); !errors.Is(err, errGone) {
			h.Errorf("update: %v, want %v", err, errGone)
		}
	}
	gone(uuid.New())
	pair := uuid.New()
	h.hubRoomOpens(nil, meta{ID: pair, Expires: h.now().Add(time.Hour)})
	gone(pair)
	if m, _, err := h.hub.Get(ctx, pair); err != nil || m.Room != nil {
		h.Errorf("the pair is %+v, %v", m, err)
	}
	h.hubRoom()
	h.hub.End(ctx, h.id, errGone)
	gone(h.id)
}

// --- How long a room lives.

func testHubRoomNobodyCame(h *hubTest) {
	h.hubRoom()
	h.advance(h.roomEmptyTTL - time.Millisecond)
	h.hubRoomHas(0)
	h.advance(time.Millisecond)
	h.hubRoomGone(h.id, "PARTY2")

	// To ask whether it is there, or to change it, is not to come.
	h.id = uuid.New()
	h.hubRoom(func(m *meta) { m.Room.Code = "OTHER2" })
	h.advance(h.roomEmptyTTL / 2)
	h.hubRoomHas(0)
	h.hubRoomUpdates(change{Locked: new(true)})
	h.hubRoomRefuses(errLocked, hubRoomRequest("ann"))
	h.advance(h.roomEmptyTTL / 2)
	h.hubRoomGone(h.id, "OTHER2")
}

func testHubRoomAllLeft(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob")
	all[0].leave(true)
	h.advance(3 * h.roomEmptyTTL)
	h.hubRoomHas(1) // bob is there
	all[1].leave(true)
	h.advance(h.roomEmptyTTL - time.Millisecond)
	h.hubRoomHas(0)
	cat := h.hubRoomJoin("cat")
	cat.sees("cat")
	cat.leave(true)
	h.advance(h.roomEmptyTTL - time.Millisecond) // and as long again
	h.hubRoomHas(0)
	h.advance(time.Millisecond)
	h.hubRoomGone(h.id, "PARTY2")
}

func testHubRoomAllAway(h *hubTest) {
	h.roomEmptyTTL = h.resumeTTL / 4 // less than one may be away
	h.hubRoom()
	h.hubRoomJoin("ann").leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	ann := h.hubRoomBack("ann", resumedBack)
	ann.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	h.hubRoomHas(1)
	h.advance(time.Millisecond) // now ann has left
	h.hubRoomHas(0)
	h.advance(h.roomEmptyTTL - time.Millisecond)
	h.hubRoomHas(0)
	h.advance(time.Millisecond)
	h.hubRoomGone(h.id, "PARTY2")
}

func testHubRoomExpired(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	h.advance(time.Hour - 10*time.Second)
	cat.leave(false)
	ann.says("", "to both")
	h.advance(10*time.Second - time.Millisecond)
	h.hubRoomHas(3)
	ann.takes()
	h.advance(time.Millisecond)
	if _, err := h.hub.Find(ctx, "PARTY2"); !errors.Is(err, errGone) {
		h.Error("find:", err)
	}
	if _, _, err := h.hub.Get(ctx, h.id); !errors.Is(err, errGone) {
		h.Error("get:", err)
	}
	h.advance(15 * time.Second)
	ann.wantOut(errGone, errGone)
	bob.wantOut(errGone, errGone)
	cat.wantShut(errGone)
	h.wantDropped(dropExpired, 2)
	h.wantQueued(0)
	h.hubRoomGone(h.id, "PARTY2")
}

// Who asks for a seat in one whose time is up does not get in, as early as that
// may be.
func testHubRoomExpiredJoin(h *hubTest) {
	h.hubRoom()
	h.hubRoomJoin("ann")
	h.hubRoomJoin("bob").leave(false)
	h.advance(time.Hour)
	for _, r := range []joinRequest{hubRoomRequest("cat"), hubRoomReturn("ann"), hubRoomReturn("bob")} {
		if _, err := h.tryJoin(r.name, h.id, r); !errors.Is(err, errGone) {
			h.Errorf("join as %s: %v, want %v", r.name, err, errGone)
		}
	}
	h.advance(15 * time.Second)
	h.guests[0].wantOut(errGone, errGone)
}

func testHubRoomEnd(h *hubTest) {
	why := errRoomDeleted
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat", "dan")
	ann, bob, cat, dan := all[0], all[1], all[2], all[3]
	cat.leave(false)
	dan.leave(true)
	ann.says("", "waits for both")
	bob.says("cat", "waits too")
	ann.acts(func() { h.hubRoomGone(h.id, "PARTY2") }) // no lock is in the way
	end := func() {
		h.Helper()
		if err := h.hub.End(ctx, h.id, why); err != nil {
			h.Error("end:", err)
		}
	}
	end()
	end()
	ann.wantOut(why, errGone)
	bob.wantOut(why, errGone)
	cat.wantShut(errGone)
	dan.wantShut(errGone)
	h.wantDropped(dropExpired, 3)
	h.wantQueued(0)
	h.hubRoomGone(h.id, "PARTY2")

	// Nothing of it reaches into a next room of this ID.
	h.hubRoom()
	eve := h.hubRoomJoin("eve")
	eve.sees("eve")
	cat = h.hubRoomLate("cat")
	cat.sees("eve", "eve")
	h.advance(2 * h.resumeTTL) // the reservation was of the first
	eve.takes("new cat joined, host eve")
	cat.takes()
}

// hubRoomLate seats one who asks for a seat that is no more, and is a newcomer.
func (h *hubTest) hubRoomLate(name string) hubRoomGuest {
	h.Helper()
	g := hubRoomGuest{h.joinAs("new "+name, h.id, hubRoomReturn(name))}
	if g.view.resumed != resumedNot || g.view.room.self.id != "new "+name {
		h.Errorf("%s came back as %v: resumption %d", name, g.view.room.self, g.view.resumed)
	}
	return g
}

// --- Joining.

func testHubRoomJoin(h *hubTest) {
	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	ann.sees("ann")
	ann.takes()
	r := hubRoomRequest("bob")
	r.displayName = "Bobby \U0001f600"
	bob := hubRoomGuest{h.joinAs("bob", h.id, r)}
	bob.sees("ann", "ann")
	if bob.view.room.self != (member{"bob", r.displayName}) {
		h.Errorf("bob is %+v", bob.view.room.self)
	}
	r = hubRoomRequest("cat")
	r.displayName = "" // need not have one
	cat := hubRoomGuest{h.joinAs("cat", h.id, r)}
	cat.sees("ann", "ann", "bob (Bobby \U0001f600)")
	ann.takes("bob (Bobby \U0001f600) joined, host ann", "cat () joined, host ann")
	bob.takes("cat () joined, host ann")
	cat.takes() // the view has told it

	for _, g := range []hubRoomGuest{ann, bob, cat} {
		if g.view.resumed != resumedNot || g.view.mail || g.view.held {
			h.Errorf("%s sees %+v", g, g.view)
		}
	}

	// A name is that of a seat of one room.
	elsewhere := uuid.New()
	h.hubRoomOpens(nil, h.hubRoomMeta(elsewhere, "OTHER2"))
	hubRoomGuest{h.joinAs("ann elsewhere", elsewhere, hubRoomRequest("ann"))}.sees("ann")
	ann.takes()
}

func testHubRoomJoinAway(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, cat := all[0], all[2]
	all[1].leave(false)
	dan := h.hubRoomJoin("dan")
	dan.sees("ann", "ann", "bob", "cat") // as if bob were there
	ann.takes("dan joined, host ann")
	cat.takes("dan joined, host ann")
	cat.leave(true)
	bob := h.hubRoomBack("bob", resumedBack)
	bob.sees("ann", "ann", "dan") // the view tells what bob has missed
	bob.takes()
	ann.takes("cat left, host ann")
	dan.takes("cat left, host ann")
}

func testHubRoomRefusals(h *hubTest) {
	hash := passwordHash{key: [32]byte{1}}
	h.hubRoom(func(m *meta) { m.Room.Max = 2 })
	ann := h.hubRoomJoins("ann", "bob")[0]
	h.hubRoomUpdates(change{Locked: new(true), Password: &hash})
	wrong, right := hubRoomRequest("cat"), hubRoomRequest("cat")
	right.password = hash
	h.hubRoomRefuses(errWrongPassword, wrong) // who does not know it learns nothing else
	h.hubRoomRefuses(errLocked, right)
	h.hubRoomUpdates(change{Locked: new(false)})
	h.hubRoomRefuses(errWrongPassword, wrong)
	h.hubRoomRefuses(errRoomFull, right)
	h.hubRoomUpdates(change{Max: new(3), Locked: new(true), Password: new(passwordHash)})
	h.hubRoomRefuses(errLocked, wrong)
	h.hubRoomUpdates(change{Locked: new(false), Password: &hash})
	h.hubRoomRefuses(errWrongPassword, wrong)
	ann.takes()
	h.joinAs("cat", h.id, right)
	ann.takes("cat joined, host ann")
	right.name, right.claim = "dan", secret("dan")
	h.hubRoomRefuses(errRoomFull, right)
	h.hubRoomUpdates(change{Max: new(4), Password: new(passwordHash)})
	h.joinAs("dan", h.id, hubRoomRequest("dan")) // nothing is in the way any more
}

func testHubRoomPassword(h *hubTest) {
	first := passwordHash{key: [32]byte{1}, salt: [16]byte{1}}
	h.hubRoom(func(m *meta) { m.Room.Password = first })
	with := func(name string, hash passwordHash) joinRequest {
		r := hubRoomRequest(name)
		r.password = hash
		return r
	}
	h.hubRoomRefuses(errWrongPassword, hubRoomRequest("ann"))
	h.hubRoomRefuses(errWrongPassword, with("ann", passwordHash{key: first.key}))
	h.hubRoomRefuses(errWrongPassword, with("ann", passwordHash{salt: first.salt}))
	h.joinAs("ann", h.id, with("ann", first))

	second := passwordHash{key: [32]byte{2}, salt: [16]byte{2}}
	h.hubRoomUpdates(change{Password: &second})
	h.hubRoomRefuses(errWrongPassword, with("bob", first)) // right when it was asked for
	h.joinAs("bob", h.id, with("bob", second))
	h.hubRoomUpdates(change{Password: new(passwordHash)})
	h.joinAs("cat", h.id, with("cat", first)) // no matter now
	h.joinAs("dan", h.id, hubRoomRequest("dan"))
}

func testHubRoomLastSeats(h *hubTest) {
	const size, free, crowd = 8, 5, 50
	h.hubRoom(func(m *meta) { m.Room.Max = size })
	all := h.hubRoomJoins("ann", "bob", "cat")
	all[2].leave(false)

	start := make(chan struct{})
	var joining sync.WaitGroup
	comers, errs := make([]*guest, crowd), make([]error, crowd)
	for i := range crowd {
		r := hubRoomRequest(fmt.Sprint("comer", i))
		g := &guest{hubTest: h, label: r.name, name: r.name, looks: 1}
		comers[i] = g
		joining.Go(func() {
			<-start
			g.seat, g.view, errs[i] = h.hub.Join(ctx, h.id, r, g.notify)
		})
	}
	close(start)
	joining.Wait()
	in := all[:2]
	for i, g := range comers {
		switch {
		case errs[i] == nil:
			h.guests = append(h.guests, g)
			in = append(in, hubRoomGuest{g})
		case !errors.Is(errs[i], errRoomFull):
			h.Errorf("join: %v, want %v", errs[i], errRoomFull)
		}
	}
	if len(in) != 2+free {
		h.Errorf("%d came in, and %d seats were free", len(in)-2, free)
	}
	h.hubRoomHas(size)

	// Each of them knows all others, each by its view or by an event.
	for _, g := range in {
		knows := 0
		if g.name == "ann" || g.name == "bob" {
			knows = 2
		} else {
			knows = len(g.view.room.members)
		}
		g.notified()
		for _, text := range g.takeAll() {
			if !strings.HasSuffix(text, " joined, host ann") || strings.HasPrefix(text, g.name+" ") {
				h.Errorf("%s takes %q", g, text)
			}
			knows++
		}
		if knows != size-1 {
			h.Errorf("%s knows %d others, want %d", g, knows, size-1)
		}
	}
}

func testHubRoomAwayCounts(h *hubTest) {
	h.hubRoom(func(m *meta) { m.Room.Max = 2 })
	all := h.hubRoomJoins("ann", "bob")
	all[1].leave(false)
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("cat"))
	h.advance(h.resumeTTL - time.Millisecond)
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("cat"))
	h.advance(time.Millisecond)
	cat := h.hubRoomJoin("cat")
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("dan"))
	cat.leave(true)
	h.hubRoomJoin("dan") // at once
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("cat"))
}

func testHubRoomFewerSeats(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat", "dan")
	h.hubRoomUpdates(change{Max: new(2)})
	h.settle()
	for _, g := range all {
		g.takes() // nobody is put out
	}
	h.hubRoomHas(4)
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("eve"))
	all[3].leave(true)
	all[2].leave(true)
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("eve")) // two are two still
	all[1].leave(true)
	h.hubRoomJoin("eve")
	h.hubRoomRefuses(errRoomFull, hubRoomRequest("fay"))
}

func testHubRoomNotPair(h *hubTest) {
	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	for _, who := range []string{"A", "B x"} {
		h.refused(errGone, who) // with create
		r := request(who)
		r.create = false
		h.hubRoomRefuses(errGone, r)
	}
	ann.takes()
	h.hubRoomHas(1)

	// Nor is a pair a room.
	pair := uuid.New()
	a := h.joinAs("A of a pair", pair, request("A x"))
	back := hubRoomReturn("x")
	for _, r := range []joinRequest{hubRoomRequest("bob"), hubRoomRequest("A"), hubRoomRequest("B"), back} {
		if _, err := h.tryJoin(r.name, pair, r); !errors.Is(err, errGone) {
			h.Errorf("join of a pair as %s: %v, want %v", r.name, err, errGone)
		}
	}
	a.takes()

	// To join a room that is not there does not open it.
	nowhere := uuid.New()
	for _, create := range []bool{false, true} {
		r := hubRoomRequest("ann")
		r.create = create
		if _, err := h.tryJoin("ann", nowhere, r); !errors.Is(err, errGone) {
			h.Errorf("join: %v, want %v", err, errGone)
		}
	}
	h.hubRoomGone(nowhere, "NOCODE")
}

// --- Coming back.

func testHubRoomResume(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.leave(false)
	bob.takes() // nobody sees one go that may be back
	cat.takes()
	h.advance(h.resumeTTL - time.Millisecond)
	ann = h.hubRoomBack("ann", resumedBack)
	ann.sees("ann", "bob", "cat")
	bob.takes()
	cat.takes()
	h.hubRoomHas(3)
	h.hubRoomJoin("dan").sees("ann", "ann", "bob", "cat") // ann is as long here as ever

	// The seat keeps its claim, and the one made for a newcomer is good for nothing.
	bob.takes("dan joined, host ann")
	cat.takes("dan joined, host ann")
	ann.takes("dan joined, host ann")
	h.advance(h.resumeTTL / 2)
	ann.leave(false)
	r := hubRoomRequest("eve")
	r.resume = secret("new ann")
	h.hubRoomRefuses(errRoomFull, r)
	h.advance(h.resumeTTL - time.Millisecond) // each reservation is a whole one
	ann = h.hubRoomBack("ann", resumedBack)
	h.advance(3 * h.resumeTTL) // and ends with the return
	h.hubRoomHas(4)
	ann.takes()
	bob.takes()
	ann.says("bob", "still ann")
	bob.takes("ann: still ann")
}

func testHubRoomResumeAlways(h *hubTest) {
	h.hubRoom(func(m *meta) { m.Room.Max = 3 })
	all := h.hubRoomJoins("ann", "bob", "cat")
	all[1].leave(false)
	h.hubRoomUpdates(change{Locked: new(true), Max: new(2), Password: &passwordHash{key: [32]byte{1}}})
	bob := h.hubRoomBack("bob", resumedBack)
	bob.sees("ann", "ann", "cat")
	h.hubRoomBack("bob", resumedTakeover)
	bob.wantOut(errReplaced, errReplaced)
	all[0].takes()
	h.hubRoomHas(3)
}

func testHubRoomTakeover(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob")
	ann, bob := all[0], all[1]
	bob.says("ann", "for whoever is there")
	ann.says("bob", "from the old one")
	h.hubRoomJoin("cat") // of which the view tells
	ann2 := h.hubRoomBack("ann", resumedTakeover)
	ann.wantOut(errReplaced, errReplaced)
	ann2.sees("ann", "bob", "cat")
	ann2.takes("bob: for whoever is there")
	ann2.says("bob", "from the new one")
	bob.takes("ann: from the old one", "cat joined, host ann", "ann: from the new one")
	h.hubRoomHas(3)

	ann3 := h.hubRoomBack("ann", resumedTakeover) // of the new one
	ann2.wantOut(errReplaced, errReplaced)
	ann.wantShut(errReplaced) // whose Leave has not freed the seat
	bob.takes()
	ann3.leave(true)
	bob.takes("ann left, host bob")
	ann2.wantShut(errReplaced)

	// Nothing of a reservation that a return had ended is left.
	bob.leave(false)
	bob = h.hubRoomBack("bob", resumedBack)
	bob2 := h.hubRoomBack("bob", resumedTakeover)
	bob.wantOut(errReplaced, errReplaced)
	h.advance(2 * h.resumeTTL)
	bob2.takes()
	h.hubRoomHas(2)
}

func testHubRoomTakeoverLimit(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob")
	ann, bob := all[0], all[1]
	for range takeovers {
		old := ann
		ann = h.hubRoomBack("ann", resumedTakeover)
		old.wantOut(errReplaced, errReplaced)
		h.advance(time.Second)
	}
	h.hubRoomRefuses(errTakeovers, hubRoomReturn("ann")) // nor is this a new member
	ann.takes()
	bob.takes()
	h.hubRoomBack("bob", resumedTakeover) // which is another seat
	bob.wantOut(errReplaced, errReplaced)
	h.advance(takeoverWindow - takeovers*time.Second - time.Millisecond)
	h.hubRoomRefuses(errTakeovers, hubRoomReturn("ann"))
	h.advance(time.Millisecond) // the first is 10 s ago
	h.hubRoomBack("ann", resumedTakeover)
	ann.wantOut(errReplaced, errReplaced)
	h.hubRoomRefuses(errTakeovers, hubRoomReturn("ann"))
}

func testHubRoomReservationOver(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	bob.takes()
	h.hubRoomHas(3)
	h.advance(time.Millisecond)
	bob.takes("ann left, host bob")
	cat.takes("ann left, host bob")
	h.hubRoomHas(2)
	again := h.hubRoomLate("ann")
	again.sees("bob", "bob", "cat")
	bob.takes("new ann joined, host bob")
	cat.takes("new ann joined, host bob")

	// Then the password and the lock are in the way.
	cat.leave(false)
	h.advance(h.resumeTTL)
	h.hubRoomUpdates(change{Locked: new(true), Password: &passwordHash{key: [32]byte{1}}})
	late := hubRoomReturn("cat")
	h.hubRoomRefuses(errWrongPassword, late)
	late.password.key[0] = 1
	h.hubRoomRefuses(errLocked, late)
	h.hubRoomUpdates(change{Locked: new(false), Max: new(2)})
	h.hubRoomRefuses(errRoomFull, late)
}

func testHubRoomWrongClaim(h *hubTest) {
	h.hubRoom(func(m *meta) { m.Room.Max = 6 })
	ann := h.hubRoomJoin("ann")
	h.hubRoomJoin("bob").leave(false)
	ann.takes("bob joined, host ann")
	h.hubRoomLate("bob's neighbour").sees("ann", "ann", "bob")
	ann.takes("new bob's neighbour joined, host ann")

	// No claim is none, also when one is away.
	cat := h.hubRoomJoin("cat")
	cat.sees("ann", "ann", "bob", "new bob's neighbour")
	ann.takes("cat joined, host ann")

	// The claim made for a newcomer is only for the seat it gets: to come with
	// another's is not to resume.
	r := hubRoomRequest("dan")
	r.resume = claim{31: 1}
	dan := hubRoomGuest{h.joinAs("dan", h.id, r)}
	dan.sees("ann", "ann", "bob", "new bob's neighbour", "cat")
	if dan.view.resumed != resumedNot {
		h.Error("resumed with a wrong claim")
	}
	dan.leave(false)
	h.hubRoomBack("dan", resumedBack)

	// A right one is for its room only.
	elsewhere := uuid.New()
	h.hubRoomOpens(nil, h.hubRoomMeta(elsewhere, "OTHER2"))
	g := h.joinAs("bob elsewhere", elsewhere, hubRoomReturn("bob"))
	if g.view.resumed != resumedNot {
		h.Error("resumed in another room")
	}
	h.hubRoomBack("bob", resumedBack)
	ann.takes("dan joined, host ann")
}

func testHubRoomLeft(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	bob.says("", "bye")
	bob.leave(true)
	ann.takes("bob: bye", "bob left, host ann") // at once, and behind what it said
	cat.takes("bob: bye", "bob left, host ann")
	h.hubRoomHas(2)
	again := h.hubRoomLate("bob") // it has nothing to come back to
	again.sees("ann", "ann", "cat")
	h.advance(2 * h.resumeTTL)
	ann.takes("new bob joined, host ann")
	cat.takes("new bob joined, host ann")
	if err := bob.Leave(ctx, true); !errors.Is(err, errReplaced) {
		h.Error("leaving twice:", err)
	}
	h.hubRoomHas(3)
}

func testHubRoomHost(h *hubTest) {
	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	ann.sees("ann")
	bob, cat := h.hubRoomJoin("bob"), h.hubRoomJoin("cat")
	bob.sees("ann", "ann")
	cat.sees("ann", "ann", "bob")
	ann.leave(false) // stays it while away
	dan := h.hubRoomJoin("dan")
	dan.sees("ann", "ann", "bob", "cat")
	cat.leave(true) // who is not the host
	bob.takes("cat joined, host ann", "dan joined, host ann", "cat left, host ann")
	dan.takes("cat left, host ann")
	ann = h.hubRoomBack("ann", resumedBack)
	ann.sees("ann", "bob", "dan")

	bob.leave(false)
	ann.leave(true) // the next is away, and next all the same
	dan.takes("ann left, host bob")
	eve := h.hubRoomJoin("eve")
	eve.sees("bob", "bob", "dan")
	bob = h.hubRoomBack("bob", resumedBack)
	bob.sees("bob", "dan", "eve")
	old := bob
	bob = h.hubRoomBack("bob", resumedTakeover)
	old.wantOut(errReplaced, errReplaced)
	bob.sees("bob", "dan", "eve")
	dan.takes("eve joined, host bob")

	bob.leave(false)
	h.advance(h.resumeTTL) // for good
	dan.takes("bob left, host dan")
	eve.takes("bob left, host dan")
	bob = h.hubRoomLate("bob") // and is the last now
	bob.sees("dan", "dan", "eve")
	dan.leave(true)
	eve.takes("new bob joined, host dan", "dan left, host eve")
	bob.takes("dan left, host eve")
	eve.leave(true)
	bob.takes("eve left, host new bob")
	bob.leave(true)
	h.hubRoomJoin("fay").sees("fay")
}

// --- Relay.

func testHubRoomDirected(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.says("bob", "1", "2")
	cat.says("bob", "3")
	ann.says("bob", "4")
	ann.says("cat", "5")
	bob.takes("ann: 1", "ann: 2", "cat: 3", "ann: 4")
	cat.takes("ann: 5")
	ann.takes()

	// It is passed on as it is, with the sender's name whatever the frame has.
	f := ann.frame("\x00\xffany bytes")
	f.typ, f.binary, f.from = typeOffer, true, "cat"
	if _, err := ann.Post(ctx, "bob", f, false); err != nil {
		h.Error(err)
	}
	got, more, err := bob.Take(ctx, noMail, 1000, make([]frame, 0, 4))
	if err != nil || more || len(got) != 1 {
		h.Fatalf("%d frames, more: %v, %v", len(got), more, err)
	}
	if f := got[0]; f.kind != kindRelay || f.typ != typeOffer || !f.binary || f.from != "ann" || string(f.data) != "\x00\xffany bytes" {
		h.Errorf("the frame is %+v", f)
	}
	got[0].release()
	h.wantQueued(0)
}

func testHubRoomBroadcast(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat", "dan")
	bob, cat := all[1], all[2]
	bob.says("", "1")
	bob.says("cat", "2")
	bob.says("", "3")
	cat.says("", "4")
	cat.takes("bob: 1", "bob: 2", "bob: 3") // and nothing of its own
	bob.takes("cat: 4")
	for _, i := range []int{0, 3} {
		all[i].takes("bob: 1", "bob: 3", "cat: 4") // each once
		all[i].takes()
	}

	// Held or not, with bytes that several have in hand.
	f := cat.frame("\x00\xffany bytes")
	f.typ, f.binary, f.from = typeOffer, true, "ann"
	if _, err := cat.Post(ctx, "", f, true); err != nil {
		h.Error(err)
	}
	cat.Flush(ctx)
	for _, i := range []int{0, 1, 3} {
		if !all[i].notified() {
			h.Errorf("%s is not told", all[i])
		}
		got, _, err := all[i].Take(ctx, noMail, 1000, make([]frame, 0, 4))
		if err != nil || len(got) != 1 {
			h.Fatalf("%d frames, %v", len(got), err)
		}
		if f := got[0]; f.kind != kindRelay || f.typ != typeOffer || !f.binary || f.from != "cat" || string(f.data) != "\x00\xffany bytes" {
			h.Errorf("the frame is %+v", f)
		}
		got[0].release()
		h.lend(20).free() // which may be the same memory
	}
	h.wantQueued(0)

	// No lock is in the way of one who answers at once.
	all[0].acts(func() { all[0].says("", "answer") })
	bob.says("", "question")
	all[0].takes("bob: question")
	bob.takes("ann: answer")
	cat.takes("bob: question", "ann: answer")
}

func testHubRoomNobody(h *hubTest) {
	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	ann.says("", "to nobody") // is no error
	ann.takes()
	h.wantQueued(0)
	bob := h.hubRoomJoin("bob")
	bob.takes() // nor does it wait for who comes later
	ann.takes("bob joined, host ann")
	for _, to := range []string{"ann", "cat", "BOB", "A", "B"} {
		ann.posts(errNoPeer, to, "to nobody")
	}
	bob.leave(true)
	ann.posts(errNoPeer, "bob", "no more")
	ann.takes("bob left, host ann")
	h.wantQueued(0)
	h.wantDropped(dropPeerAbsent, 0)
}

// One taker's pieces are nobody else's.
func testHubRoomPieces(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.says("", "12345", "67")
	ann.says("cat", "8")
	got, more, err := bob.Take(ctx, noMail, 6, make([]frame, 0, 10))
	if err != nil || !more || len(got) != 1 || string(got[0].data) != "12345" {
		h.Errorf("%d frames, more: %v, %v", len(got), more, err)
	}
	for i := range got {
		got[i].release()
	}
	cat.takes("ann: 12345", "ann: 67", "ann: 8")
	bob.takes("ann: 67")
}

func testHubRoomAwayFrames(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.says("cat", "not taken")
	h.hubRoomJoin("dan").leave(true) // presence does not wait, here or below
	cat.leave(false)
	ann.says("", "1")
	bob.says("cat", "2")
	h.hubRoomJoin("eve")
	ann.says("cat", "3")
	bob.says("", "4")
	cat = h.hubRoomBack("cat", resumedBack)
	ann.says("", "5")
	cat.takes("ann: not taken", "ann: 1", "bob: 2", "ann: 3", "bob: 4", "ann: 5")
	cat.takes() // once
	cat.leave(false)
	h.hubRoomBack("cat", resumedBack).takes()
	bob.takes("dan joined, host ann", "dan left, host ann", "ann: 1", "eve joined, host ann", "ann: 5")
	h.wantDropped(dropStale, 0)
}

func testHubRoomAwayItems(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	cat.leave(false)
	var want []string
	for i, text := range numberedFrames(waitItems) {
		if i%2 == 0 {
			ann.says("", text)
		} else {
			ann.says("cat", text)
		}
		want = append(want, "ann: "+text)
	}
	ann.posts(errPeerAbsent, "cat", "one too many")
	h.wantDropped(dropPeerAbsent, 1)
	ann.posts(errPeerAbsent, "", "for bob only")
	h.wantDropped(dropPeerAbsent, 1)
	bob.posts(errPeerAbsent, "cat", "") // it is one bound for all
	h.wantDropped(dropPeerAbsent, 1)
	bob.says("ann", "goes on")
	ann.takes("bob: goes on")
	got := bob.takeAll()
	if len(got) != waitItems/2+1 || got[waitItems/2] != "ann: for bob only" {
		h.Errorf("bob takes %q", got)
	}
	cat = h.hubRoomBack("cat", resumedBack)
	ann.says("cat", "of those connected, any number")
	cat.takes(append(want, "ann: of those connected, any number")...)
}

func testHubRoomAwayBytes(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	cat.leave(false)
	half := strings.Repeat("x", waitBytes/2)
	ann.says("", half)
	ann.posts(errPeerAbsent, "", half+"x")
	ann.says("cat", half)
	ann.posts(errPeerAbsent, "cat", "x")
	bob.posts(errPeerAbsent, "", "x")
	ann.says("cat", "") // has no bytes
	bob.takes("ann: "+half, "ann: "+half+"x")
	ann.takes("bob: x")
	h.wantQueued(waitBytes)
	h.wantDropped(dropPeerAbsent, 3)
	cat = h.hubRoomBack("cat", resumedBack)
	cat.takes("ann: "+half, "ann: "+half, "ann: ")
	h.wantQueued(0)

	cat.leave(false)
	big := strings.Repeat("y", 2*waitBytes)
	ann.says("", big) // an empty queue takes it
	ann.posts(errPeerAbsent, "", "x")
	h.hubRoomBack("cat", resumedBack).takes("ann: " + big)
	bob.takes("ann: "+big, "ann: x")
	h.wantQueued(0)
	h.wantDropped(dropPeerAbsent, 1)
}

// What a leaver said to one who is away is stale, from the moment nobody would
// get the answer.
func testHubRoomStale(h *hubTest) {
	for _, forGood := range []bool{true, false} {
		h.id = uuid.New()
		h.hubRoomOpens(nil, h.hubRoomMeta(h.id, h.id.String()))
		all := h.hubRoomJoins("ann", "bob", "cat", "dan")
		ann, bob, cat, dan := all[0], all[1], all[2], all[3]
		bob.leave(false)
		ann.says("", "offer")
		dan.says("bob", "of dan")
		ann.says("bob", "ice")
		ann.leave(forGood)
		if !forGood {
			h.advance(h.resumeTTL / 2)
			bob = h.hubRoomBack("bob", resumedBack)
			bob.leave(false) // to be away for longer than ann
			h.advance(h.resumeTTL/2 - time.Millisecond)
			h.wantDropped(dropStale, 0)
			h.advance(time.Millisecond)
		}
		h.wantDropped(dropStale, 2)
		bob = h.hubRoomBack("bob", resumedBack)
		bob.takes("dan: of dan")
		cat.takes("ann: offer", "ann left, host bob") // one who is connected gets it
		h.hub.End(ctx, h.id, errGone)
		for _, g := range []hubRoomGuest{bob, cat, dan} {
			g.wantOut(errGone, errGone)
		}
		h.wantDropped(dropExpired, 1) // dan has not taken the offer
	}
}

func testHubRoomPeerLeft(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	ann.says("", "to both")
	cat.says("bob", "to bob")
	bob.leave(true)
	h.wantDropped(dropPeerLeft, 2)
	cat.takes("ann: to both", "bob left, host ann")
	ann.takes("bob left, host ann")
	h.wantQueued(0)

	cat.says("ann", "not taken as ann goes")
	ann.leave(false)
	cat.says("ann", "nor this")
	h.advance(h.resumeTTL - time.Millisecond)
	h.wantDropped(dropPeerLeft, 0)
	h.advance(time.Millisecond)
	h.wantDropped(dropPeerLeft, 2)
	cat.takes("ann left, host cat")
	h.wantQueued(0)
	h.hubRoomLate("ann").takes() // a seat's mailbox goes with it
	h.hubRoomJoin("bob").takes() // also where one has the name again
}

func testHubRoomQueuedBytes(h *hubTest) {
	h.queued.limit = 1000
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat", "dan")
	ann, bob, cat, dan := all[0], all[1], all[2], all[3]
	cat.leave(false)
	dan.leave(false)
	ann.says("cat", strings.Repeat("r", 900))
	ann.posts(errOverCapacity, "cat", strings.Repeat("x", 101))
	h.wantDropped(dropOverCapacity, 1)
	ann.posts(errOverCapacity, "", strings.Repeat("y", 101))
	h.wantDropped(dropOverCapacity, 2) // for each of those away
	bob.takes("ann: " + strings.Repeat("y", 101))
	h.wantQueued(900)

	ann.says("dan", strings.Repeat("s", 100))
	h.wantQueued(1000)
	big := strings.Repeat("z", 3000)
	ann.says("bob", big, "small") // those connected go on
	bob.takes("ann: "+big, "ann: small")
	h.wantQueued(1000)

	// What is freed is there for others.
	cat = h.hubRoomBack("cat", resumedBack)
	cat.takes("ann: " + strings.Repeat("r", 900))
	h.wantQueued(100)
	ann.says("dan", strings.Repeat("t", 900))
	ann.leave(true)
	h.wantDropped(dropStale, 2)
	bob.takes("ann left, host bob")
	cat.takes("ann left, host bob")
	h.wantQueued(0)
}

// --- Slow readers.

func testHubRoomSlow(h *hubTest) {
	h.slowBytes = 1000
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	hundred := strings.Repeat("x", 100)
	for range 10 {
		ann.says("", hundred)
		bob.takes("ann: " + hundred)
	}
	if cat.settle(); len(cat.news()) > 0 {
		h.Error("put out with no more than may wait")
	}
	for _, g := range all {
		g.wantHeld(false)
	}
	ann.says("", "!") // the receipt says nothing, and cat alone is put out
	bob.takes("ann: !")
	cat.wantOut(errSlow, errReplaced)
	for _, g := range all[:2] {
		g.wantHeld(false)
	}
	ann.takes() // nobody is told
	h.hubRoomHas(3)

	h.advance(h.resumeTTL - time.Millisecond)
	ann.says("cat", "goes on")
	cat = h.hubRoomBack("cat", resumedBack)
	cat.sees("ann", "ann", "bob")
	cat.takes(append(slices.Repeat([]string{"ann: " + hundred}, 10), "ann: !", "ann: goes on")...)
	h.advance(2 * h.resumeTTL) // the reservation is over with that
	h.hubRoomHas(3)
	ann.says("cat", "again")
	cat.takes("ann: again")

	// By one that is for it alone, in an instant.
	long := strings.Repeat("y", 1001)
	ann.says("bob", long)
	bob.wantOut(errSlow, errReplaced)
	cat.takes()
	h.hubRoomBack("bob", resumedBack).takes("ann: " + long)

	// Several at once.
	ann.says("", long)
	h.guests[len(h.guests)-1].wantOut(errSlow, errReplaced)
	cat.wantOut(errSlow, errReplaced)
	h.hubRoomBack("cat", resumedBack).takes("ann: " + long)
	h.hubRoomBack("bob", resumedBack).takes("ann: " + long)
	ann.takes()
}

// One put out is as any other who is away.
func testHubRoomSlowAway(h *hubTest) {
	h.slowBytes = 100
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	half := strings.Repeat("x", waitBytes/2)
	ann.says("cat", half)
	cat.wantOut(errSlow, errReplaced)
	bob.says("cat", half)
	ann.posts(errPeerAbsent, "cat", "x")
	ann.posts(errPeerAbsent, "", "y")
	bob.takes("ann: y")
	h.wantDropped(dropPeerAbsent, 2)
	cat = h.hubRoomBack("cat", resumedBack) // and is not put out for what it finds
	cat.takes("ann: "+half, "bob: "+half)

	ann.says("cat", half)
	cat.wantOut(errSlow, errReplaced)
	for range waitItems - 1 {
		bob.says("cat", "s")
	}
	bob.posts(errPeerAbsent, "cat", "x")
	h.wantDropped(dropPeerAbsent, 1)
	bob.leave(true)
	h.wantDropped(dropStale, waitItems-1)
	ann.takes("bob left, host ann")
	h.hubRoomBack("cat", resumedBack).takes("ann: " + half)
}

func testHubRoomSlowLeft(h *hubTest) {
	h.slowBytes = 100
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	bob.says("ann", strings.Repeat("x", 101))
	ann.wantOut(errSlow, errReplaced)
	h.hubRoomJoin("dan").sees("ann", "ann", "bob", "cat") // who stays the host
	h.advance(h.resumeTTL - time.Millisecond)
	bob.takes("dan joined, host ann")
	h.advance(time.Millisecond)
	bob.takes("ann left, host bob")
	cat.takes("dan joined, host ann", "ann left, host bob")
	h.wantDropped(dropPeerLeft, 1)
	h.hubRoomLate("ann").sees("bob", "bob", "cat", "dan")

	// A room of one who was put out is not empty before that.
	h.id = uuid.New()
	h.hubRoomOpens(nil, h.hubRoomMeta(h.id, "OTHER2"))
	all = h.hubRoomJoins("ann", "bob")
	all[0].says("bob", strings.Repeat("x", 101))
	all[1].wantOut(errSlow, errReplaced)
	all[0].leave(true)
	h.wantDropped(dropStale, 1)
	h.hubRoomHas(1)
	h.hubRoomBack("bob", resumedBack).sees("bob")
}

// --- What else concerns who is connected.

func testHubRoomCorked(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	hold := func(to, data string) {
		h.Helper()
		if r, err := ann.Post(ctx, to, ann.frame(data), true); err != nil || r.held {
			h.Errorf("held %v, %v", r.held, err)
		}
	}
	hold("bob", "1")
	hold("bob", "2")
	ann.Flush(ctx)
	bob.takes("ann: 1", "ann: 2")
	hold("bob", "3")
	hold("cat", "4")
	hold("", "5")
	hold("cat", "6")
	ann.Flush(ctx)
	bob.takes("ann: 3", "ann: 5")
	cat.takes("ann: 4", "ann: 5", "ann: 6")
	hold("cat", "7")
	ann.posts(errNoPeer, "dan", "to nobody") // takes nothing back
	ann.Flush(ctx)
	cat.takes("ann: 7")

	// Nobody sees a takeover, so that only the leaver itself can tell of what it
	// had held.
	hold("bob", "8")
	ann2 := h.hubRoomBack("ann", resumedTakeover)
	bob.notified()
	if err := ann.Leave(ctx, false); !errors.Is(err, errReplaced) {
		h.Error("leave:", err)
	}
	bob.takes("ann: 8")
	ann.wantOut(errReplaced, errReplaced)
	ann = ann2
	hold("bob", "9")
	ann.leave(false)
	bob.takes("ann: 9")
}

func testHubRoomCorkedSlow(h *hubTest) {
	h.slowBytes = 100
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	ann, bob, cat := all[0], all[1], all[2]
	hold := func(data string) {
		h.Helper()
		if _, err := ann.Post(ctx, "bob", ann.frame(data), true); err != nil {
			h.Error(err)
		}
	}
	hold("held")
	cat.says("ann", strings.Repeat("x", 101))
	h.settle()
	ann.Leave(ctx, false)
	bob.takes("ann: held")
	ann.wantOut(errSlow, errReplaced)
	h.hubRoomBack("ann", resumedBack).takes("cat: " + strings.Repeat("x", 101))

	// Who is put out is told of it, however the frame was posted.
	ann = hubRoomGuest{h.guests[len(h.guests)-1]}
	hold("short")
	hold(strings.Repeat("y", 101))
	bob.wantOut(errSlow, errReplaced)
	ann.Flush(ctx)
	h.hubRoomBack("bob", resumedBack).takes("ann: short", "ann: "+strings.Repeat("y", 101))
}

// Who was replaced tells, as it leaves, of what it had held.
func testHubRoomPairCorked(h *hubTest) {
	a, b := h.join("A x"), h.join("B")
	a.takes("joined")
	if _, err := a.Post(ctx, "B", a.frame("held"), true); err != nil {
		h.Error(err)
	}
	h.join("A x")
	b.notified() // of the newcomer
	if err := a.Leave(ctx, false); !errors.Is(err, errReplaced) {
		h.Error("leave:", err)
	}
	b.takes("held", "joined again")
	a.wantOut(errReplaced, errReplaced)
}

func testHubRoomTell(h *hubTest) {
	h.hubRoom()
	all := h.hubRoomJoins("ann", "bob", "cat")
	all[1].leave(false)
	if err := h.hub.Tell(ctx, h.id, event{kind: eventContested}); err != nil {
		h.Error(err)
	}
	all[0].takes("contested")
	all[2].takes("contested")
	h.hubRoomBack("bob", resumedBack).takes() // it was not there
}

func testHubRoomReport(h *hubTest) {
	h.hubRoom()
	ann := h.hubRoomJoin("ann")
	report := func(by hubRoomGuest, o outcome, since time.Duration, first bool) {
		h.Helper()
		s, f, err := by.Report(ctx, o)
		if near := (s-since).Abs() < 100*time.Millisecond && (s < 0) == (since < 0); err != nil || f != first || !near {
			h.Errorf("report by %s: %v, first: %v, %v; want %v, %v", by, s, f, err, since, first)
		}
	}
	h.advance(time.Minute)
	report(ann, outcomeFailed, -1, true)
	bob := h.hubRoomJoin("bob")
	h.advance(10 * time.Second)
	bob.leave(true)
	cat := h.hubRoomJoin("cat")
	h.hubRoomJoin("dan")
	h.advance(10 * time.Second)
	report(cat, outcomeFailed, 20*time.Second, false) // since two were first connected
	report(cat, outcomeConnected, 20*time.Second, true)
	report(ann, outcomeConnected, 20*time.Second, false)

	// Those who are away are not connected.
	h.id = uuid.New()
	h.hubRoomOpens(nil, h.hubRoomMeta(h.id, "OTHER2"))
	h.hubRoomJoin("ann").leave(false)
	bob = h.hubRoomJoin("bob")
	h.advance(10 * time.Second)
	report(bob, outcomeConnected, -1, true)
	h.hubRoomBack("ann", resumedBack)
	h.advance(10 * time.Second)
	report(bob, outcomeFailed, 10*time.Second, true)
}

// --- Everything at random.

// testHubRoomProperty: whoever comes, goes, drops and returns, all members know
// the same room, and what is accepted arrives once, in order, where it should.
func testHubRoomProperty(t *testing.T, env hubEnv) {
	ops := rapid.SampledFrom([]string{
		"join", "join", "join", "back", "back", "takeover", "leave", "drop", "drop",
		"take", "take", "take", "one", "one", "all", "all", "flood", "big", "wait",
	})
	who := rapid.IntRange(0, 4)
	steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) hubRoomStep {
		return hubRoomStep{ops.Draw(t, "op"), who.Draw(t, "by"), who.Draw(t, "to")}
	}), 40, 60) // short ones meet little
	checkScripts(t, env, steps, hubRoomPlay)
}

type hubRoomStep struct {
	op     string
	by, to int // of five who may be members
}

// A hubRoomModel is what a room should be.
type hubRoomModel struct {
	*hubTest
	members []*hubRoomMember // as they came
	drops   [numDropReasons]int
	step    int
	frames  int
}

type hubRoomMember struct {
	hubRoomGuest
	name      string
	connected bool
	since     int // step at which it went away
	takeovers int // in the last seconds
	queue     []hubRoomWaiting

	knows []string // the others, as the connection has it from its view and events
	host  string
}

type hubRoomWaiting struct {
	text string
	from string // empty for presence
	size int
}

func hubRoomPlay(h *hubTest, script []hubRoomStep) error {
	h.slowBytes, h.roomEmptyTTL = 2000, 24*time.Hour
	h.hubRoom(func(m *meta) { m.Expires = h.now().Add(48 * time.Hour) })
	m := &hubRoomModel{hubTest: h}
	var people [5]*hubRoomMember // nil, or a member, or once one
	for i, s := range script {
		h.advance(time.Millisecond) // so that reservations end one after another
		m.step = i
		by, to := people[s.by], people[s.to]
		member := slices.Contains(m.members, by)
		here := member && by.connected
		switch {
		case s.op == "join" && !member:
			people[s.by] = m.join(fmt.Sprint("new", i), claim{})
		case s.op == "back" && by != nil && !member:
			people[s.by] = m.join(fmt.Sprint("late", i), secret(by.name))
		case s.op == "back" && member && !here, s.op == "takeover" && here:
			m.back(by)
		case s.op == "leave" && here:
			by.leave(true)
			m.left(by)
		case s.op == "drop" && here:
			by.leave(false)
			m.away(by)
		case s.op == "take" && here:
			m.take(by)
		case s.op == "one" && here && to != nil:
			m.post(by, to, 10)
		case s.op == "all" && here:
			m.post(by, nil, 300)
		case s.op == "big" && here:
			m.post(by, nil, 100<<10)
		case s.op == "flood" && here:
			for range 40 {
				m.post(by, nil, 10)
			}
		case s.op == "wait":
			m.wait()
		}
		h.hubRoomHas(len(m.members))
		if h.Failed() {
			return fmt.Errorf("step %d", i)
		}
	}
	for _, g := range m.members {
		if g.connected {
			m.take(g)
		}
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.drops != m.drops {
		return fmt.Errorf("dropped %v, want %v", h.drops, m.drops)
	}
	return nil
}

// join seats a newcomer, whatever it thinks to come back to, if there is room.
func (m *hubRoomModel) join(name string, resume claim) *hubRoomMember {
	r := hubRoomRequest(name)
	r.resume = resume
	g, err := m.tryJoin(name, m.id, r)
	if len(m.members) == 4 {
		if !errors.Is(err, errRoomFull) {
			m.Errorf("join: %v, want %v", err, errRoomFull)
		}
		return nil
	}
	if err != nil {
		m.Error("join:", err)
		return nil
	}
	by := &hubRoomMember{name: name}
	m.members = append(m.members, by)
	m.announce(by, name+" joined")
	m.seat(by, g, resumedNot)
	return by
}

// back seats a member again.
func (m *hubRoomModel) back(by *hubRoomMember) {
	r := hubRoomRequest(fmt.Sprint("unused", m.step))
	r.resume = secret(by.name)
	g, err := m.tryJoin(by.name, m.id, r)
	how := resumedBack
	if by.connected {
		if how = resumedTakeover; by.takeovers == takeovers {
			if !errors.Is(err, errTakeovers) {
				m.Errorf("takeover: %v, want %v", err, errTakeovers)
			}
			return
		}
		by.takeovers++
		by.wantOut(errReplaced, errReplaced)
	}
	if err != nil {
		m.Error("back:", err)
		return
	}
	m.seat(by, g, how)
}

// seat notes by's new connection, which knows what its view shows.
func (m *hubRoomModel) seat(by *hubRoomMember, g *guest, want resumption) {
	by.guest, by.connected = g, true
	by.forgetPresence()
	v := g.view
	if v.resumed != want || v.room.self.id != by.name {
		m.Errorf("%s is %v, resumption %d, want %d", by.name, v.room.self, v.resumed, want)
	}
	by.host, by.knows = v.room.host, nil
	for _, other := range v.room.members {
		by.knows = append(by.knows, other.id)
	}
	m.checkKnown(by)
}

// checkKnown fails unless by knows the room as it is.
func (m *hubRoomModel) checkKnown(by *hubRoomMember) {
	var others []string
	for _, g := range m.members {
		if g != by {
			others = append(others, g.name)
		}
	}
	if !slices.Equal(by.knows, others) || by.host != m.members[0].name {
		m.Errorf("%s knows %v, host %s; want %v, host %s", by.name, by.knows, by.host, others, m.members[0].name)
	}
}

func (m *hubRoomModel) announce(by *hubRoomMember, what string) {
	for _, g := range m.members {
		if g != by && g.connected {
			g.queue = append(g.queue, hubRoomWaiting{what + ", host " + m.members[0].name, "", presenceSize})
		}
	}
}

// left notes that by is no member any more.
func (m *hubRoomModel) left(by *hubRoomMember) {
	m.members = slices.DeleteFunc(m.members, func(g *hubRoomMember) bool { return g == by })
	by.forgetPresence()
	m.drops[dropPeerLeft] += len(by.queue)
	for _, g := range m.members {
		if !g.connected {
			before := len(g.queue)
			g.queue = slices.DeleteFunc(g.queue, func(w hubRoomWaiting) bool { return w.from == by.name })
			m.drops[dropStale] += before - len(g.queue)
		}
	}
	m.announce(by, by.name+" left")
}

// away notes that by may be back.
func (m *hubRoomModel) away(by *hubRoomMember) {
	by.connected, by.since = false, m.step
	by.forgetPresence()
}

func (g *hubRoomMember) forgetPresence() {
	g.queue = slices.DeleteFunc(g.queue, func(w hubRoomWaiting) bool { return w.from == "" })
}

// wait lets all reservations end.
func (m *hubRoomModel) wait() {
	var gone []*hubRoomMember
	for _, g := range m.members {
		if !g.connected {
			// Who went in one instant would be gone in any order.
			if slices.ContainsFunc(gone, func(other *hubRoomMember) bool { return other.since == g.since }) {
				m.back(g)
				m.advance(time.Millisecond)
				g.leave(false)
				m.step++
				m.away(g)
			}
			gone = append(gone, g)
		}
	}
	slices.SortFunc(gone, func(a, b *hubRoomMember) int { return a.since - b.since })
	m.advance(m.resumeTTL)
	for _, g := range gone {
		m.left(g)
	}
	for _, g := range m.members {
		g.takeovers = 0
	}
}

// post relays so many bytes to one, or to all.
func (m *hubRoomModel) post(by, to *hubRoomMember, size int) {
	m.frames++
	data := fmt.Sprintf("%-*d", size, m.frames)
	var want error
	name, receivers := "", m.members
	if to != nil {
		name, receivers = to.name, []*hubRoomMember{to}
		if to == by || !slices.Contains(m.members, to) {
			want, receivers = errNoPeer, nil
		}
	}
	var slow []*hubRoomMember
	for _, g := range receivers {
		if g == by {
			continue
		}
		bytes := size
		for _, w := range g.queue {
			bytes += w.size
		}
		if n := len(g.queue); !g.connected && n > 0 && (n >= waitItems || bytes > waitBytes) {
			m.drops[dropPeerAbsent]++
			want = errPeerAbsent
			continue
		}
		g.queue = append(g.queue, hubRoomWaiting{by.name + ": " + data, by.name, size})
		if g.connected && bytes > m.slowBytes {
			slow = append(slow, g)
		}
	}
	by.posts(want, name, data)
	for _, g := range slow {
		g.wantOut(errSlow, errReplaced)
		m.away(g)
	}
}

// take takes what waits, from which the connection learns who is there.
func (m *hubRoomModel) take(by *hubRoomMember) {
	told := by.notified()
	var want []string
	for _, w := range by.queue {
		want = append(want, w.text)
	}
	got := by.takeAll()
	if !slices.Equal(got, want) {
		m.Errorf("%s takes\n\t%.300q\nwant\n\t%.300q", by.name, got, want)
	}
	if len(got) > 0 && !told {
		m.Errorf("%s was not told of %.80q", by.name, got)
	}
	by.queue = nil
	for _, text := range got {
		var name, what string
		if n, _ := fmt.Sscanf(text, "%s %s host %s", &name, &what, &by.host); n < 3 {
			continue
		}
		if what == "joined," {
			by.knows = append(by.knows, name)
		} else {
			by.knows = slices.DeleteFunc(by.knows, func(other string) bool { return other == name })
		}
	}
	m.checkKnown(by)
}
