package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math"
	"math/rand/v2"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// A hubEnv is what the contract suite asks of an implementation of hub, besides
// the methods.
type hubEnv struct {
	// run runs a scenario in whatever makes advance work.
	run func(t *testing.T, scenario func(*testing.T))
	// newHub returns a hub whose Run goes on until the scenario ends.
	newHub func(t *testing.T, o hubOptions) hub
	// now is the time by the hub's clock.
	now func() time.Time
	// sleep lets time pass.
	sleep func(d time.Duration)
	// settle returns once the notifications under way have arrived.
	settle func()
	// waiting returns the bytes that count as queued in mailboxes.
	waiting func(h hub) int64
	// few limits random scripts, for a hub that is slow to play them; 0 does not.
	few int
	// lend returns a pooled buffer of at least n bytes.
	lend func(n int) *buffer
	// sweep does now what Run does from time to time; nil where that cannot be
	// asked for.
	sweep func(h hub)
	// check reports broken invariants; nil where they cannot be seen.
	check func(h hub) error
	// returned is called when a scenario has ended and nothing borrowed is in
	// use any more; nil where that is not watched.
	returned func(t *testing.T)
}

// memoryEnv runs the suite over the hub in memory, on the clock of a bubble.
func memoryEnv() hubEnv {
	return hubEnv{
		run: func(t *testing.T, scenario func(*testing.T)) {
			synctest.Test(t, func(t *testing.T) {
				time.Sleep(time.Until(mailEpoch.AddDate(1, 0, 0))) // bubbles begin in 2000
				scenario(t)
			})
		},
		newHub: func(t *testing.T, o hubOptions) hub {
			h := newMemoryHub(o)
			go h.Run(t.Context())
			return h
		},
		now:     time.Now,
		sleep:   time.Sleep,
		settle:  synctest.Wait,
		waiting: func(h hub) int64 { return h.(*memoryHub).queued.used.Load() },
		lend:    new(bufferPool).get,
		sweep:   func(h hub) { h.(*memoryHub).sweep(time.Now()) },
		check:   func(h hub) error { return h.(*memoryHub).invariants() },
	}
}

func TestMemoryHub(t *testing.T) {
	t.Parallel()
	testHub(t, memoryEnv())
}

// TestMemoryHubCorks: a held post saves its receiver a turn. The contract only
// allows that, so the suite does not ask for it.
func TestMemoryHubCorks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHubTest(t, memoryEnv())
		a, b := h.join("A"), h.join("B")
		b.notified()
		for range 3 {
			if _, err := a.Post(ctx, "B", a.frame("x"), true); err != nil {
				t.Error(err)
			}
		}
		if b.notified() {
			t.Error("told of held posts")
		}
		a.Flush(ctx)
		b.mu.Lock()
		looks := b.looks
		b.mu.Unlock()
		if looks != 1 {
			t.Errorf("told %d times of what was flushed", looks)
		}
		b.takes("x", "x", "x")
	})
}

// A clock that was never set gives seqs that clients can still use.
func TestMemoryHubOldClock(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHubTest(t, memoryEnv())
		a, b := h.join("A"), h.join("B").openMail(0)
		if seq := a.send(0, "x"); seq != 1 {
			t.Error("the first seq is", seq)
		}
		b.takes("A: x")
		if err := b.Ack(ctx, 1); err != nil {
			t.Error(err)
		}
	})
}

// mailEpoch is the time from which seqs count milliseconds.
var mailEpoch = time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)

// testHub is the contract that every hub keeps.
func testHub(t *testing.T, env hubEnv) {
	for _, s := range hubScenarios {
		t.Run(s.name, func(t *testing.T) {
			env.run(t, func(t *testing.T) { s.run(newHubTest(t, env)) })
		})
	}
	t.Run("mail/property", func(t *testing.T) { testMailProperty(t, env) })
	t.Run("mail/refused property", func(t *testing.T) { testRefusedProperty(t, env) })
	testHubRooms(t, env)
}

// checkScripts plays random scripts, each on a hub of its own.
func checkScripts[S any](t *testing.T, env hubEnv, scripts *rapid.Generator[S], play func(*hubTest, S) error) {
	played := 0
	rapid.Check(t, func(rt *rapid.T) {
		script := scripts.Draw(rt, "script") // outside, because rapid fails by panic
		if played++; env.few > 0 && played > env.few && !t.Failed() {
			return
		}
		var err error
		env.run(t, func(t *testing.T) {
			h := newHubTest(t, env)
			err = play(h, script)
			if h.finish(); err == nil && t.Failed() {
				err = errors.New("as reported")
			}
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

var hubScenarios = []struct {
	name string
	run  func(*hubTest)
}{
	{"seats/busy", testSeatBusy},
	{"seats/takeover", testTakeover},
	{"seats/takeover limit", testTakeoverLimit},
	{"seats/resume", testResume},
	{"seats/reservation over", testReservationOver},
	{"seats/reservation over as they return", testReservationRace},
	{"seats/left for good", testLeftForGood},
	{"seats/unclaimed drop", testUnclaimedDrop},
	{"presence/transitions", testPresence},
	{"presence/never waits", testPresenceNeverWaits},
	{"presence/bound", testPresenceBound},
	{"presence/tell", testTell},
	{"relay/unchanged and in order", testRelayOrder},
	{"relay/by pieces", testTakePieces},
	{"relay/bound of items", testRelayItems},
	{"relay/bound of bytes", testRelayBytes},
	{"relay/stale", testRelayStale},
	{"relay/at most once", testRelayOnce},
	{"relay/held back", testHeld},
	{"relay/held back across seats", testHeldAcrossSeats},
	{"relay/corked", testCorked},
	{"mail/order and seqs", testMailOrder},
	{"mail/ack", testAck},
	{"mail/bounds", testMailBounds},
	{"mail/ids", testMailIDs},
	{"mail/ids of a claim", testMailIDsOfClaim},
	{"mail/to oneself", testMailToOneself},
	{"sessions/created or not", testSessionCreated},
	{"sessions/live with their code", testSessionCode},
	{"sessions/live with their mail", testSessionMail},
	{"sessions/live while someone is away", testSessionAway},
	{"sessions/capacity", testSessionCapacity},
	{"sessions/owners", testSessionOwners},
	{"sessions/queued bytes", testQueuedBytes},
	{"sessions/report", testReport},
	{"sessions/end", testEnd},
	{"hammered", testHammered},
}

// A hubTest is a hub under test and the session most scenarios play in.
type hubTest struct {
	*testing.T
	hubEnv
	hubOptions
	hub hub
	id  sessionID
	ids []sessionID // all sessions that were used

	finished bool

	mu     sync.Mutex
	drops  [numDropReasons]int // guarded by mu
	guests []*guest
}

// newHubTest returns a test whose hub is made by its first use, so that a
// scenario can change its options first.
func newHubTest(t *testing.T, env hubEnv) *hubTest {
	h := &hubTest{T: t, hubEnv: env, id: uuid.New()}
	h.hubOptions = hubOptions{
		sessionTTL: 10 * time.Minute,
		resumeTTL:  time.Minute,

		roomEmptyTTL: 5 * time.Minute,
		holdBytes:    1 << 20,
		slowBytes:    1 << 20,
		queued:       &budget{limit: 256 << 20},
		owners:       newQuota(0),
		dropped: func(r dropReason, n int) {
			h.mu.Lock()
			defer h.mu.Unlock()
			h.drops[r] += n
		},
	}
	return h
}

// fewer is n, or less for a hub that is slow.
func (h *hubTest) fewer(n int) int {
	if h.few > 0 {
		return n / 8
	}
	return n
}

func (h *hubTest) start() hub {
	if h.hub == nil {
		h.hub = h.newHub(h.T, h.hubOptions)
		h.Cleanup(h.finish) // before what newHub has to clean up
	}
	return h.hub
}

// advance lets time pass, and what that sets off.
func (h *hubTest) advance(d time.Duration) {
	h.sleep(d)
	h.settle()
}

// finish ends what the scenario left behind and checks that it was told, and
// that nothing stays counted.
func (h *hubTest) finish() {
	if h.finished {
		return
	}
	h.finished = true
	h.checkNow()
	why := errRoomDeleted // which is as good as any
	for _, id := range h.ids {
		if err := h.start().End(ctx, id, why); err != nil {
			h.Error("end:", err)
		}
	}
	h.settle()
	for _, g := range h.guests {
		if !g.gone {
			g.wantOut(why, errGone)
		} else if outs := g.news(); len(outs) > 0 {
			h.Errorf("%s was put out after all: %v", g, outs)
		}
	}
	h.checkNow()
	h.wantQueued(0)
	if h.returned != nil {
		h.returned(h.T)
	}
}

func (h *hubTest) checkNow() {
	h.Helper()
	if h.check != nil {
		if err := h.check(h.start()); err != nil {
			h.Error("invariants:", err)
		}
	}
}

func (h *hubTest) wantQueued(n int64) {
	h.Helper()
	if used := h.waiting(h.start()); used != n {
		h.Errorf("%d bytes count as queued, want %d", used, n)
	}
}

// wantDropped fails unless n frames were dropped for this reason, and none for
// any other, since it was last asked.
func (h *hubTest) wantDropped(r dropReason, n int) {
	h.Helper()
	h.mu.Lock()
	defer h.mu.Unlock()
	var want [numDropReasons]int
	want[r] = n
	if h.drops != want {
		h.Errorf("dropped %v, want %d of %s only", h.drops, n, r)
	}
	h.drops = [numDropReasons]int{}
}

// ctx is the context of calls where none of it matters.
var ctx = context.Background()

// A guest is a connection as the hub knows it.
type guest struct {
	*hubTest
	seat  // the methods under test
	view  view
	label string
	name  string
	other string
	gone  bool // left, or known to be out

	mail   bool // its Take asks for mail
	cursor uint64
	seqs   []uint64 // of the mail it took

	mu    sync.Mutex
	looks int     // guarded by mu: notifications since it last looked
	outs  []error // guarded by mu: reasons it was given
	act   func()  // guarded by mu: what it does as it is notified next, if anything
}

func (g *guest) String() string { return g.label }

// secret is the claim made with a client's own secret; none claims nothing.
func secret(s string) (c claim) {
	copy(c[:], s)
	return c
}

// request asks for a seat in the words of a test: "A" or, with a secret, "A x".
func request(who string) joinRequest {
	name, sid, _ := strings.Cut(who, " ")
	return joinRequest{name: name, claim: secret(sid), create: true}
}

// join seats a connection.
func (h *hubTest) join(who string) *guest {
	h.Helper()
	return h.joinAs(who, h.id, request(who))
}

func (h *hubTest) joinAs(label string, id sessionID, r joinRequest) *guest {
	h.Helper()
	g, err := h.tryJoin(label, id, r)
	if err != nil {
		h.Fatalf("join as %s: %v", label, err)
	}
	return g
}

func (h *hubTest) tryJoin(label string, id sessionID, r joinRequest) (*guest, error) {
	g := &guest{hubTest: h, label: label, name: r.name, other: "B", looks: 1} // who joins looks without being told
	if r.name == "B" {
		g.other = "A"
	}
	var err error
	g.seat, g.view, err = h.start().Join(ctx, id, r, g.notify)
	if !slices.Contains(h.ids, id) {
		h.ids = append(h.ids, id)
	}
	if err == nil {
		h.guests = append(h.guests, g)
	}
	return g, err
}

// refused fails unless a join is refused, and has no effect on anyone.
func (h *hubTest) refused(want error, who string) {
	h.Helper()
	g, err := h.tryJoin(who, h.id, request(who))
	if !errors.Is(err, want) {
		h.Errorf("join as %s: %v, want %v", who, err, want)
	}
	if h.settle(); err != nil && len(g.news()) > 0 {
		h.Errorf("refused to join as %s, and put out as well", who)
	}
}

func (g *guest) notify(why error) {
	g.mu.Lock()
	if why == nil {
		g.looks++
	} else {
		g.outs = append(g.outs, why)
	}
	act := g.act
	g.act = nil
	g.mu.Unlock()
	if act != nil {
		act()
	}
}

// acts makes the guest do something as it is notified next: no lock may be in
// its way.
func (g *guest) acts(f func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.act = f
}

// news returns the reasons why the guest was put out since it was last asked.
func (g *guest) news() []error {
	g.mu.Lock()
	defer g.mu.Unlock()
	outs := g.outs
	g.outs = nil
	return outs
}

// notified reports whether the guest was told to look since it last did.
func (g *guest) notified() bool {
	g.settle()
	g.mu.Lock()
	defer g.mu.Unlock()
	told := g.looks > 0
	g.looks = 0
	return told
}

// wantView fails unless the guest was shown this as it joined.
func (g *guest) wantView(v view) {
	g.Helper()
	if g.view != v {
		g.Errorf("%s sees %+v, want %+v", g, g.view, v)
	}
}

// wantOut fails unless the guest was told once why it is out, and nothing it
// does has an effect any more but to say so.
func (g *guest) wantOut(why, err error) {
	g.Helper()
	g.settle()
	if outs := g.news(); len(outs) != 1 || !errors.Is(outs[0], why) {
		g.Errorf("%s was put out with %v, want %v", g, outs, why)
	}
	g.gone = true
	g.wantShut(err)
}

// wantShut fails unless every method refuses with err.
func (g *guest) wantShut(want error) {
	g.Helper()
	before := g.waiting(g.start())
	_, relayed := g.Post(ctx, g.other, g.frame("too late"), false)
	_, mailed := g.Post(ctx, g.other, g.letter(1<<40, "too late"), false)
	taken, more, took := g.Take(ctx, 0, math.MaxInt, make([]frame, 0, 1))
	_, held := g.Held(ctx)
	_, _, reported := g.Report(ctx, outcomeFailed)
	g.Flush(ctx)
	for method, err := range map[string]error{
		"relay": relayed, "mail": mailed, "Take": took, "Held": held, "Report": reported,
		"Ack": g.Ack(ctx, 0), "Leave": g.Leave(ctx, true), "Leave to return": g.Leave(ctx, false),
	} {
		if !errors.Is(err, want) {
			g.Errorf("%s by %s answers %v, want %v", method, g, err, want)
		}
	}
	if len(taken) > 0 || more {
		g.Errorf("%s takes %d frames, and more: %v", g, len(taken), more)
	}
	if after := g.waiting(g.start()); after != before {
		g.Errorf("%s changed what is queued from %d to %d bytes", g, before, after)
	}
}

// leave gives the seat up.
func (g *guest) leave(forGood bool) {
	g.Helper()
	if err := g.Leave(ctx, forGood); err != nil {
		g.Errorf("leave by %s: %v", g, err)
	}
	g.checkNow()
	if !g.gone {
		g.gone = true
		g.wantShut(errorOf(g))
	}
}

// errorOf is what the methods of a guest who has left answer: the session may
// have ended with that.
func errorOf(g *guest) error {
	if err := g.Ack(ctx, 0); errors.Is(err, errGone) {
		return errGone
	}
	return errReplaced
}

// frame returns a relay frame in a borrowed buffer.
func (g *guest) frame(data string) frame {
	buf := g.lend(len(data))
	return frame{kind: kindRelay, typ: typeIce, data: buf.b[:copy(buf.b, data)], buf: buf}
}

// letter returns mail, in a borrowed buffer that holds more than the payload.
func (g *guest) letter(id uint64, data string) frame {
	buf := g.lend(len(data) + 20)
	return frame{kind: kindMail, id: id, data: buf.b[10 : 10+copy(buf.b[10:], data)], buf: buf}
}

// relay posts frames to the other seat.
func (g *guest) relay(data ...string) {
	g.Helper()
	for _, d := range data {
		if err := g.tryRelay(d); err != nil {
			g.Errorf("relay %.20q by %s: %v", d, g, err)
		}
	}
}

func (g *guest) tryRelay(data string) error {
	_, err := g.Post(ctx, g.other, g.frame(data), false)
	return err
}

// relayHolds fails unless relaying this answers whether to pause.
func (g *guest) relayHolds(data string, want bool) {
	g.Helper()
	r, err := g.Post(ctx, g.other, g.frame(data), false)
	if err != nil || r.held != want {
		g.Errorf("relay of %d bytes by %s: held %v, %v; want %v", len(data), g, r.held, err, want)
	}
}

func (g *guest) wantHeld(want bool) {
	g.Helper()
	if held, err := g.Held(ctx); err != nil || held != want {
		g.Errorf("%s is held back: %v, %v; want %v", g, held, err, want)
	}
}

// write posts mail without an id to the other seat.
func (g *guest) write(data ...string) {
	g.Helper()
	for _, d := range data {
		g.send(0, d)
	}
}

// send posts mail to the other seat and returns its seq.
func (g *guest) send(id uint64, data string) uint64 {
	g.Helper()
	seq, err := g.trySend(g.other, id, data)
	if err != nil {
		g.Errorf("mail %.20q by %s: %v", data, g, err)
	}
	return seq
}

func (g *guest) trySend(to string, id uint64, data string) (uint64, error) {
	r, err := g.Post(ctx, to, g.letter(id, data), false)
	return r.seq, err
}

// refusedToPost fails unless frames of this size are refused, and leave nothing
// behind.
func (g *guest) refusedToPost(want error, f frame) {
	g.Helper()
	before := g.waiting(g.start())
	if _, err := g.Post(ctx, g.other, f, false); !errors.Is(err, want) {
		g.Errorf("post by %s: %v, want %v", g, err, want)
	}
	if after := g.waiting(g.start()); after != before {
		g.Errorf("a refused frame changed what is queued from %d to %d bytes", before, after)
	}
}

// openMail makes the guest ask for mail, of which it has what is up to the seq
// after.
func (g *guest) openMail(after uint64) *guest {
	g.mail, g.cursor = true, after
	g.mu.Lock()
	g.looks++
	g.mu.Unlock()
	return g
}

// takes fails unless exactly this waits for the guest, and it was told to look.
// Relay frames read as their data, mail as "from: payload", presence in words.
func (g *guest) takes(want ...string) {
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

func (g *guest) takeAll() (got []string) {
	g.Helper()
	for more := true; more; {
		var some []string
		some, more = g.take(64<<10, 16)
		got = append(got, some...)
		if more && len(some) == 0 {
			g.Fatalf("%s takes nothing, and there is more", g)
		}
	}
	return got
}

// take takes once.
func (g *guest) take(budget, capacity int) (got []string, more bool) {
	g.Helper()
	after := noMail
	if g.mail {
		after = g.cursor
	}
	frames, more, err := g.Take(ctx, after, budget, make([]frame, 0, capacity))
	if err != nil {
		g.Fatalf("take by %s: %v", g, err)
	}
	for i := range frames {
		f := &frames[i]
		got = append(got, read(f))
		if f.kind == kindMail {
			g.cursor = f.seq
			g.seqs = append(g.seqs, f.seq)
		}
		f.release()
	}
	return got, more
}

// read puts a frame in words.
func read(f *frame) string {
	switch f.kind {
	case kindMail:
		return f.from + ": " + string(f.data)
	case kindPresence:
		text := []string{"joined", "away", "left", "contested"}[f.event.kind]
		if f.event.resumed {
			text += " again"
		}
		if f.event.peerV != 0 {
			text += fmt.Sprint(" v", f.event.peerV)
		}
		return text
	}
	return string(f.data)
}

// numberedFrames returns n different strings.
func numberedFrames(n int) (all []string) {
	for i := range n {
		all = append(all, fmt.Sprintf("n%d", i))
	}
	return all
}

// --- Seats.

func testSeatBusy(h *hubTest) {
	a := h.join("A")
	a.wantView(view{})
	h.refused(errBusy, "A")
	h.refused(errBusy, "A x")
	b := h.join("B y")
	b.wantView(view{peer: present})
	h.refused(errBusy, "B")
	h.refused(errBusy, "B x")
	h.refused(errNoPeer, "C")
	h.refused(errNoPeer, "a")
	a.takes("joined")
	b.takes()

	b.leave(false)
	h.refused(errBusy, "B") // it is reserved
	h.refused(errBusy, "B x")
	a.takes("away")

	if _, err := a.Post(ctx, "C", a.frame("to nobody"), false); !errors.Is(err, errNoPeer) {
		h.Error("relay to a seat that cannot be:", err)
	}
	if _, err := a.Post(ctx, "a", a.letter(1, "to nobody"), false); !errors.Is(err, errNoPeer) {
		h.Error("mail to a seat that cannot be:", err)
	}
}

func testTakeover(h *hubTest) {
	a, b := h.join("A x"), h.join("B")
	a.takes("joined")
	a.relay("from the old one")
	b.relay("for whoever is there")
	a2 := h.join("A x")
	a2.wantView(view{peer: present, resumed: resumedTakeover})
	a.wantOut(errReplaced, errReplaced)
	a2.relay("from the new one")
	b.takes("from the old one", "joined again", "from the new one")
	a2.takes("for whoever is there")

	a3 := h.join("A x") // of the new one
	a2.wantOut(errReplaced, errReplaced)
	a.wantShut(errReplaced)
	h.refused(errBusy, "A") // the old ones' Leave has not freed it
	b.takes("joined again")
	a3.leave(true)
	b.takes("left")
	h.join("A").wantView(view{peer: present})
	b.takes("joined")
}

func testTakeoverLimit(h *hubTest) {
	b := h.join("B")
	a := h.join("A x")
	for range takeovers {
		old := a
		a = h.join("A x")
		old.wantOut(errReplaced, errReplaced)
		h.advance(time.Second)
	}
	if takeovers != 6 || takeoverWindow != 10*time.Second {
		h.Error("the contract says 6 takeovers in 10 s")
	}
	b.takes(slices.Concat([]string{"joined"}, slices.Repeat([]string{"joined again"}, takeovers))...)
	h.refused(errTakeovers, "A x")
	h.refused(errBusy, "A y")
	h.advance(takeoverWindow - takeovers*time.Second - time.Millisecond)
	h.refused(errTakeovers, "A x")
	a.takes() // and it was not put out
	b.takes()

	h.advance(time.Millisecond) // the first is 10 s ago
	old := a
	a = h.join("A x")
	old.wantOut(errReplaced, errReplaced)
	h.refused(errTakeovers, "A x") // the second is not
	b.takes("joined again")

	a.leave(false)
	a = h.join("A x") // a return is no takeover
	a.wantView(view{peer: present, resumed: resumedBack})
	b.takes("away", "joined again")
	h.advance(takeoverWindow)
	h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	b.takes("joined again")
}

func testResume(h *hubTest) {
	a, b := h.join("A x"), h.join("B y")
	a.takes("joined")
	a.leave(false)
	b.takes("away")
	h.advance(h.resumeTTL - time.Millisecond)
	b.takes()
	a = h.join("A x")
	a.wantView(view{peer: present, resumed: resumedBack})
	b.takes("joined again")

	// The reservation it came back to ends nothing, and each is a whole one.
	h.advance(h.resumeTTL / 2)
	a.leave(false)
	b.takes("away")
	h.advance(h.resumeTTL - time.Millisecond)
	b.takes()
	b.leave(false)
	b = h.join("B y")
	b.wantView(view{peer: away, resumed: resumedBack})
	a = h.join("A x")
	b.takes("joined again")
	h.advance(3 * h.resumeTTL)
	a.takes()
	b.takes()

	// A takeover leaves nothing of an earlier reservation either.
	a.leave(false)
	a = h.join("A x")
	a2 := h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	h.advance(2 * h.resumeTTL)
	a2.takes()
	b.takes("away", "joined again", "joined again")
}

func testReservationOver(h *hubTest) {
	a, b := h.join("A x"), h.join("B")
	a.takes("joined")
	a.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	h.refused(errBusy, "A y")
	b.takes("away")
	h.advance(time.Millisecond)
	b.takes("left") // at once
	h.join("A y").wantView(view{peer: present})
	h.refused(errBusy, "A x")
	b.takes("joined")

	// The same claim, too late, is as any other.
	other := h.joinAs("A x elsewhere", uuid.New(), request("A x"))
	other.leave(false)
	h.advance(h.resumeTTL)
	again := h.joinAs("A x elsewhere", h.ids[1], request("A x"))
	again.wantView(view{})

	// The other may be away too; who comes back is told how things are.
	id := uuid.New()
	a, b = h.joinAs("A x", id, request("A x")), h.joinAs("B y", id, request("B y"))
	a.leave(false)
	h.advance(h.resumeTTL / 2)
	b.leave(false)
	h.advance(h.resumeTTL / 2)
	b = h.joinAs("B y", id, request("B y"))
	b.wantView(view{resumed: resumedBack})
	b.takes()
}

// Who returns at the very moment the reservation ends is back, or new; either
// way it then sits as firmly as anyone.
func testReservationRace(h *hubTest) {
	for range h.fewer(50) {
		id := uuid.New()
		a, b := h.joinAs("A x", id, request("A x")), h.joinAs("B", id, request("B"))
		a.takes("joined")
		a.leave(false)
		h.sleep(h.resumeTTL)
		a = h.joinAs("A x", id, request("A x"))
		if h.settle(); a.view.resumed == resumedBack {
			b.takes("away", "joined again")
		} else {
			b.takes("away", "left", "joined")
		}
		if _, err := h.tryJoin("A y", id, request("A y")); !errors.Is(err, errBusy) {
			h.Fatal("another takes the seat:", err)
		}
		h.joinAs("A x", id, request("A x")).wantView(view{peer: present, resumed: resumedTakeover})
		a.wantOut(errReplaced, errReplaced)
	}
}

func testLeftForGood(h *hubTest) {
	a, b := h.join("A x"), h.join("B")
	a.takes("joined")
	a.leave(true)
	b.takes("left") // at once
	a = h.join("A y")
	a.wantView(view{peer: present})
	h.refused(errBusy, "A x")
	b.takes("joined")
	h.advance(2 * h.resumeTTL)
	b.takes() // there was no reservation
	a.takes()
	if err := b.Leave(ctx, true); err != nil {
		h.Error(err)
	}
	if err := b.Leave(ctx, true); !errors.Is(err, errReplaced) {
		h.Error("leaving twice:", err)
	}
	b.gone = true
	a.takes("left")
}

func testUnclaimedDrop(h *hubTest) {
	a, b := h.join("A"), h.join("B x")
	a.leave(false)
	b.takes("left") // at once
	a = h.join("A")
	a.wantView(view{peer: present}) // not resumed
	b.takes("joined")
	b.leave(false)
	a.takes("away")
	a.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	h.join("B x").wantView(view{resumed: resumedBack})
	h.advance(2 * h.resumeTTL)
}

// --- Presence.

func testPresence(h *hubTest) {
	b := h.joinAs("B y", h.id, joinRequest{name: "B", claim: secret("y"), v: 1, create: true})
	b.wantView(view{})
	a := h.join("A")
	a.wantView(view{peer: present, peerV: 1})
	b.takes("joined")
	a.leave(true)
	b.takes("left")

	v1 := joinRequest{name: "A", claim: secret("x"), v: 1, create: true}
	a = h.joinAs("A x", h.id, v1)
	b.takes("joined v1")
	old := a
	a = h.joinAs("A x", h.id, v1)
	old.wantOut(errReplaced, errReplaced)
	b.takes("joined again v1")
	a.leave(false)
	b.takes("away")
	b.leave(false)
	b = h.joinAs("B y", h.id, joinRequest{name: "B", claim: secret("y"), v: 1})
	b.wantView(view{peer: away, peerV: 1, resumed: resumedBack})
	v1.v = 2
	a = h.joinAs("A x", h.id, v1)
	a.wantView(view{peer: present, peerV: 1, resumed: resumedBack})
	b.takes("joined again v2")
	a.leave(false)
	h.advance(h.resumeTTL)
	b.takes("away", "left")

	a = h.join("A x")
	b.takes("joined") // neither its version nor its claim is remembered
	a.leave(false)
	a = h.join("A x")
	a.leave(true)
	b.takes("away", "joined again", "left")
	b.leave(true)
	h.join("A").wantView(view{})
}

func testPresenceNeverWaits(h *hubTest) {
	a := h.join("A x")
	b := h.join("B")
	b.leave(false)
	a.leave(false) // with joined and left not taken
	b = h.join("B")
	b.wantView(view{peer: away})
	b.leave(false)
	b = h.join("B") // what happens while A is away does not wait either
	b.relay("only this waits")
	if err := h.start().Tell(ctx, h.id, event{kind: eventContested}); err != nil {
		h.Error(err)
	}
	a = h.join("A x")
	a.wantView(view{peer: present, resumed: resumedBack})
	a.takes("only this waits")
	b.takes("contested", "joined again")

	// A takeover begins anew, too.
	b.leave(false)
	b = h.join("B")
	a2 := h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	a2.wantView(view{peer: present, resumed: resumedTakeover})
	a2.takes()
	b.takes("joined again")

	// A newcomer does not see what the one before it did not take.
	b.leave(true)
	a2.leave(true)
	h.join("B").takes()
	h.join("A").takes()
}

func testPresenceBound(h *hubTest) {
	a := h.join("A")
	for range maxPresence / 2 {
		h.join("B").leave(false)
	}
	if h.settle(); len(a.news()) > 0 {
		h.Error("put out with no more presence frames than may wait")
	}
	b := h.join("B")
	if h.settle(); !slices.Equal(a.news(), []error{errSlow}) {
		h.Error("not put out, though it does not look")
	}
	h.refused(errBusy, "A") // it sits there until it leaves
	b.relay("data still comes")
	a.takes(append(slices.Repeat([]string{"joined", "left"}, maxPresence/2), "data still comes")...)
	a.leave(false)
	b.takes("left")

	a = h.join("A") // one who looks is not put out
	for range maxPresence + 10 {
		if err := h.start().Tell(ctx, h.id, event{kind: eventContested}); err != nil {
			h.Error(err)
		}
		a.takes("contested")
		b.notified()
		if got := b.takeAll(); len(got) == 0 {
			h.Error("B was not told")
		}
	}
}

func testTell(h *hubTest) {
	contested := event{kind: eventContested}
	if err := h.start().Tell(ctx, h.id, contested); !errors.Is(err, errGone) {
		h.Error("tell nobody:", err)
	}
	a, b := h.join("A"), h.join("B y")
	if err := h.start().Tell(ctx, h.id, contested); err != nil {
		h.Error(err)
	}
	a.takes("joined", "contested")
	b.takes("contested")
	b.leave(false)
	if err := h.start().Tell(ctx, h.id, contested); err != nil {
		h.Error(err)
	}
	a.takes("away", "contested")
	h.join("B y").takes()
}

// --- Relay.

func testRelayOrder(h *hubTest) {
	a := h.join("A")
	first := a.frame("\x00\xffany bytes")
	first.typ, first.binary = typeOffer, true
	second := a.frame(`{"type":"bye"}`)
	second.typ = typeBye
	for _, f := range []frame{first, second} {
		if _, err := a.Post(ctx, "B", f, false); err != nil {
			h.Error(err)
		}
	}
	b := h.join("B")
	a.relay("newer")
	got, more, err := b.Take(ctx, noMail, math.MaxInt, make([]frame, 0, 4))
	if err != nil || more || len(got) != 3 {
		h.Fatalf("%d frames, more: %v, %v", len(got), more, err)
	}
	for i, want := range []frame{
		{typ: typeOffer, binary: true, from: "A", data: []byte("\x00\xffany bytes")},
		{typ: typeBye, from: "A", data: []byte(`{"type":"bye"}`)},
		{typ: typeIce, from: "A", data: []byte("newer")},
	} {
		f := got[i]
		if f.kind != kindRelay || f.typ != want.typ || f.binary != want.binary || f.from != want.from || !bytes.Equal(f.data, want.data) {
			h.Errorf("frame %d is %+v", i, f)
		}
		f.release()
	}

	a.takes("joined")
	all := numberedFrames(300) // far more than may wait for an absent seat
	a.relay(all[:150]...)
	b.relay("the other way")
	a.relay(all[150:]...)
	b.takes(all...)
	a.takes("the other way")
	h.wantQueued(0)
}

// Frames are taken by pieces as large as the taker wants, and in order.
func testTakePieces(h *hubTest) {
	a, b := h.join("A"), h.join("B")
	a.takes("joined")
	a.relay("12345", "67", "8", "90123456789", "0")
	a.write("mail1", "mail2")
	b.openMail(0)
	for _, piece := range []struct {
		budget, capacity int
		more             bool
		want             []string
	}{
		{6, 10, true, []string{"12345"}},
		{100, 2, true, []string{"67", "8"}},
		{1, 10, true, []string{"90123456789"}}, // one goes in any case
		{4, 10, true, []string{"0"}},           // the mail is too large
		{100, 1, true, []string{"A: mail1"}},
		{5, 1, false, []string{"A: mail2"}},
		{5, 1, false, nil},
	} {
		got, more := b.take(piece.budget, piece.capacity)
		if !slices.Equal(got, piece.want) || more != piece.more {
			h.Errorf("take %d bytes, %d frames: %q, more: %v; want %q, %v", piece.budget, piece.capacity, got, more, piece.want, piece.more)
		}
	}
	a.relay("last")
	buf, _, err := b.Take(ctx, noMail, 100, append(make([]frame, 0, 3), frame{from: "what the caller has"}))
	if err != nil || len(buf) != 2 || buf[0].from != "what the caller has" || string(buf[1].data) != "last" {
		h.Errorf("appended: %+v, %v", buf, err)
	}
	buf[1].release()
}

func testRelayItems(h *hubTest) {
	a := h.join("A")
	all := numberedFrames(waitItems)
	a.relay(all...)
	a.refusedToPost(errPeerAbsent, a.frame("one too many"))
	a.refusedToPost(errPeerAbsent, a.frame(""))
	h.wantDropped(dropPeerAbsent, 2)
	a.write("mail goes on")
	b := h.join("B y")
	a.relay("of those connected, any number")
	b.takes(append(all, "of those connected, any number")...)

	b.leave(false) // an away seat is bounded in the same way
	a.relay(all...)
	a.refusedToPost(errPeerAbsent, a.frame("one too many"))
	h.wantDropped(dropPeerAbsent, 1)
	b = h.join("B y")
	b.takes(all...)
	a.takes("joined", "away", "joined again")
	if waitItems != 64 || waitBytes != 256<<10 {
		h.Error("the contract says 64 frames and 256 KiB")
	}
}

func testRelayBytes(h *hubTest) {
	a := h.join("A")
	half := strings.Repeat("x", waitBytes/2)
	a.relay(half)
	a.refusedToPost(errPeerAbsent, a.frame(half+"x"))
	a.relay(half)
	a.refusedToPost(errPeerAbsent, a.frame("x"))
	a.relay("") // has no bytes
	h.wantDropped(dropPeerAbsent, 2)
	h.wantQueued(waitBytes)
	b := h.join("B")
	b.takes(half, half, "")
	b.leave(true)

	big := strings.Repeat("y", 4<<20)
	a.relay(big) // an empty queue takes it
	a.refusedToPost(errPeerAbsent, a.frame("x"))
	h.wantDropped(dropPeerAbsent, 1)
	b = h.join("B")
	a.relay(big, big)
	b.takes(big, big, big)

	// What a connection has not taken waits for the next, however much.
	b.leave(true)
	b = h.join("B y")
	a.relay(big, "after it")
	b.leave(false)
	a.refusedToPost(errPeerAbsent, a.frame("x"))
	h.join("B y").takes(big, "after it")
	h.wantDropped(dropPeerAbsent, 1)
	a.takeAll()
}

func testRelayStale(h *hubTest) {
	leave := func(who string, free func(*guest)) {
		h.Helper()
		a := h.join(who)
		a.relay("offer", "ice")
		a.write("mail stays")
		free(a)
		h.wantDropped(dropStale, 2)
		b := h.join("B").openMail(0)
		b.takes("A: mail stays")
		if err := b.Ack(ctx, b.cursor); err != nil {
			h.Error(err)
		}
		b.leave(true)
	}
	leave("A", func(a *guest) { a.leave(false) })
	leave("A", func(a *guest) { a.leave(true) })
	leave("A x", func(a *guest) { a.leave(true) })
	leave("A x", func(a *guest) { a.leave(false); h.advance(h.resumeTTL) })

	// To a seat that is reserved it is as stale.
	a, b := h.join("A"), h.join("B y")
	b.leave(false)
	a.relay("offer")
	a.leave(true)
	h.wantDropped(dropStale, 1)
	b = h.join("B y")
	b.takes()

	// One who is connected gets it, and then is told.
	a = h.join("A")
	a.relay("bye")
	a.leave(true)
	b.takes("joined", "bye", "left")

	// Until the reservation is over nothing is stale, nor after a takeover.
	b.leave(true)
	a = h.join("A x")
	a.relay("offer")
	a.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	a = h.join("A x")
	a2 := h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	a2.relay("ice")
	b = h.join("B")
	b.takes("offer", "ice")

	// What waits for the one who goes stays for the next in its seat.
	b.leave(true)
	b = h.join("B")
	a2.relay("for the seat")
	b.leave(true)
	h.join("B").takes("for the seat")
	h.wantDropped(dropStale, 0)
}

func testRelayOnce(h *hubTest) {
	a, b := h.join("A"), h.join("B y")
	a.relay("taken", "not taken", "nor this")
	if got, more := b.take(5, 1); !slices.Equal(got, []string{"taken"}) || !more {
		h.Errorf("%q, more: %v", got, more)
	}
	b.leave(false)
	a.relay("newer")
	b = h.join("B y")
	b.takes("not taken", "nor this", "newer")
	b.takes()
	a.relay("newest")
	b2 := h.join("B y")
	b.wantOut(errReplaced, errReplaced)
	b2.takes("newest")
	b2.takes()
}

func testHeld(h *hubTest) {
	h.holdBytes = 1000
	a, b := h.join("A"), h.join("B")
	a.takes("joined")
	hundred := strings.Repeat("x", 100)
	for range 10 {
		a.relayHolds(hundred, false)
	}
	a.wantHeld(false)
	a.relayHolds("x", true)
	a.wantHeld(true)
	a.relayHolds(hundred, true) // accepted all the same
	a.notified()

	for range 6 { // with hysteresis: not before half has drained
		b.take(100, 1)
		if a.notified() {
			h.Error("told to go on before half has drained")
		}
	}
	b.take(100, 1) // 401 bytes left
	if !a.notified() {
		h.Error("not told to go on")
	}
	a.wantHeld(false)
	b.takes(hundred, hundred, hundred, "x", hundred)
	if a.notified() {
		h.Error("told without need")
	}

	// Mail holds nobody back, nor does what waits in one's own seat.
	b.relay(strings.Repeat("y", 900))
	if r, err := a.Post(ctx, "B", a.letter(0, strings.Repeat("z", 2000)), false); err != nil || r.held {
		h.Errorf("mail: held %v, %v", r.held, err)
	}
	b.relayHolds(hundred+"y", true)
	if r, err := a.Post(ctx, "A", a.letter(0, "note"), false); err != nil || r.held {
		h.Errorf("mail to oneself: held %v, %v", r.held, err)
	}
	a.wantHeld(false)
	b.wantHeld(true)
	b.notified()
	a.takeAll()
	b.wantHeld(false)
	if !b.notified() {
		h.Error("not told to go on")
	}
}

func testHeldAcrossSeats(h *hubTest) {
	h.holdBytes = 100
	a, b := h.join("A x"), h.join("B y")
	a.takes("joined")
	long := strings.Repeat("x", 101)
	a.relayHolds(long, true)

	// Nobody is held back by a seat that is not connected.
	b.leave(false)
	if !a.notified() {
		h.Error("not told that the other is gone")
	}
	a.wantHeld(false)
	if _, err := a.Post(ctx, "B", a.frame("while away"), false); err != nil {
		h.Error(err)
	}
	a.wantHeld(false)

	// Who comes back has as much waiting.
	b = h.join("B y")
	a.wantHeld(true)
	a.notified()
	b2 := h.join("B y")
	b.wantOut(errReplaced, errReplaced)
	a.wantHeld(true)
	a.notified()

	// Who takes over from the one held back is, too, and is told as well.
	a2 := h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	a2.wantView(view{peer: present, resumed: resumedTakeover, held: true})
	a2.notified()
	b2.takes(long, "while away", "joined again")
	if !a2.notified() {
		h.Error("not told to go on")
	}
	a2.wantHeld(false)

	// The other leaves for good.
	a2.relayHolds(long, true)
	a2.notified()
	b2.leave(true)
	if !a2.notified() {
		h.Error("not told that the other has left")
	}
	a2.wantHeld(false)
	b = h.join("B")
	a2.wantHeld(true)
	a2.notified()
	b.leave(false) // dropped, unclaimed
	if !a2.notified() {
		h.Error("not told that the other has dropped")
	}
	h.join("B").takes(long)
}

func testCorked(h *hubTest) {
	a, b := h.join("A x"), h.join("B")
	a.takes("joined")
	b.takes()
	post := func(to string, f frame, hold bool) {
		h.Helper()
		if _, err := a.Post(ctx, to, f, hold); err != nil {
			h.Error(err)
		}
	}
	// A held post is there for who looks; who does not is told by Flush.
	post("B", a.frame("held"), true)
	if got := b.takeAll(); !slices.Equal(got, []string{"held"}) {
		h.Errorf("B takes %q", got)
	}
	post("B", a.frame("one"), true)
	post("B", a.frame("two"), true)
	a.Flush(ctx)
	b.takes("one", "two")
	a.Flush(ctx) // again, with nothing held
	b.takes()

	post("B", a.frame("one"), true)
	post("B", a.frame("two"), false) // tells of both
	b.takes("one", "two")

	// Posts to two seats: each is told.
	a.openMail(0).takes()
	b.openMail(0).takes()
	post("B", a.frame("to B"), true)
	post("A", a.letter(0, "to A"), true)
	post("B", a.letter(0, "to B"), true)
	a.Flush(ctx)
	a.takes("A: to A")
	b.takes("to B", "A: to B")

	// A refused post, or one that repeats mail, takes nothing back.
	post("B", a.letter(7, "mail"), true)
	if _, err := a.Post(ctx, "C", a.frame("to nobody"), true); !errors.Is(err, errNoPeer) {
		h.Error(err)
	}
	post("B", a.letter(7, "mail"), true)
	a.Flush(ctx)
	b.takes("A: mail")

	// Who leaves, or is replaced, has nothing left to flush.
	post("B", a.frame("before the takeover"), true)
	a2 := h.join("A x")
	a.Flush(ctx)
	a.wantOut(errReplaced, errReplaced)
	b.takes("before the takeover", "joined again")
	a = a2
	post("B", a.frame("last words"), true)
	a.leave(true)
	b.takes("last words", "left")
}

// --- Mail.

func testMailOrder(h *hubTest) {
	before := h.now()
	a := h.join("A")
	after := h.now()
	all := numberedFrames(100)
	a.write(all[:50]...)
	a.relay("relay")
	b := h.join("B")
	b.wantView(view{peer: present, mail: true})
	a.write(all[50:]...)
	b.takes("relay") // it does not ask for mail
	var want []string
	for _, text := range all {
		want = append(want, "A: "+text)
	}
	b.openMail(0).takes(want...)
	b.takes() // once a connection
	if !slices.IsSorted(b.seqs) || len(slices.Compact(slices.Clone(b.seqs))) != len(all) {
		h.Error("the seqs do not rise:", b.seqs)
	}
	// They begin with the session's creation.
	low, high := before.Sub(mailEpoch).Milliseconds(), after.Sub(mailEpoch).Milliseconds()
	if first := int64(b.seqs[0]); first < low || first > high+1 {
		h.Errorf("the first seq is %d, and the session began between %d and %d ms", first, low, high)
	}

	// Again on the next connection, after what that has.
	seqs := b.seqs
	b.leave(false)
	b = h.join("B").openMail(seqs[97])
	b.wantView(view{peer: present, mail: true})
	b.takes(want[98:]...)
	a.write("new")
	b.takes("A: new")
	b.leave(false)
	b = h.join("B").openMail(0)
	b.takes(append(want, "A: new")...)
	if !slices.Equal(b.seqs[:100], seqs) {
		h.Error("the seqs have changed")
	}
	b.write("back")
	a.openMail(0)
	if got := a.takeAll(); !slices.Contains(got, "B: back") {
		h.Errorf("A takes %q", got)
	}

	// In a later life of the session everything counts on, also where mail came
	// faster than one a millisecond.
	last := b.seqs[100]
	h.start().End(ctx, h.id, errGone)
	a.wantOut(errGone, errGone)
	b.wantOut(errGone, errGone)
	if seq := h.join("A").send(0, "x"); seq <= last {
		h.Errorf("seq %d in the second life, %d in the first", seq, last)
	}
}

func testAck(h *hubTest) {
	a, b := h.join("A"), h.join("B y").openMail(0)
	ack := func(upTo uint64, want error) {
		h.Helper()
		if err := b.Ack(ctx, upTo); !errors.Is(err, want) {
			h.Errorf("ack of %d: %v, want %v", upTo, err, want)
		}
	}
	ack(0, nil) // with nothing there
	ack(math.MaxUint64>>1, errBeyond)
	var seqs []uint64
	for i := range 4 {
		seqs = append(seqs, a.send(0, fmt.Sprintf("m%d", i)))
	}
	h.wantQueued(int64(len("m0")*4 + presenceSize)) // A has not taken joined
	a.takes("joined")
	ack(seqs[3]+1, errBeyond)
	ack(math.MaxUint64, errBeyond)
	ack(0, nil)
	b.takes("A: m0", "A: m1", "A: m2", "A: m3") // nothing was trimmed
	ack(seqs[1], nil)
	ack(seqs[1], nil)
	ack(seqs[0], nil)
	h.wantQueued(4)
	b.leave(false)
	b = h.join("B y").openMail(0)
	b.takes("A: m2", "A: m3")
	ack(seqs[3], nil)
	h.wantQueued(presenceSize * 2)
	b.takes()
	b2 := h.join("B y").openMail(0)
	b.wantOut(errReplaced, errReplaced)
	b2.wantView(view{peer: present, resumed: resumedTakeover})
	b2.takes()

	// Acknowledged to the last, a mailbox still counts on.
	if seq := a.send(0, "next"); seq <= seqs[3] {
		h.Errorf("seq %d after %d", seq, seqs[3])
	}
	if err := a.Ack(ctx, seqs[3]); !errors.Is(err, errBeyond) {
		h.Error("ack of another's mail:", err)
	}
	b2.takes("A: next")
	a.takes("away", "joined again", "joined again")
}

func testMailBounds(h *hubTest) {
	a := h.join("A")
	var want []string
	for _, text := range numberedFrames(mailItems) {
		a.write(text)
		want = append(want, "A: "+text)
	}
	full := func(f frame) {
		h.Helper()
		a.refusedToPost(errMailFull, f)
		h.wantDropped(dropMailFull, 1)
	}
	full(a.letter(0, "x"))
	full(a.letter(0, ""))
	b := h.join("B").openMail(0)
	full(a.letter(0, "x")) // connected or not
	b.takes(want...)
	full(a.letter(0, "x")) // taken is not acknowledged
	if err := b.Ack(ctx, b.seqs[0]); err != nil {
		h.Error(err)
	}
	a.write("fits again")
	full(a.letter(0, "x"))
	b.takes("A: fits again")
	b.leave(false)
	b = h.join("B").openMail(0)
	b.takes(append(want[1:], "A: fits again")...) // nothing accepted is lost
	if err := b.Ack(ctx, b.cursor); err != nil {
		h.Error(err)
	}

	// The same by bytes, in which one item may be all there is.
	full(a.letter(0, strings.Repeat("x", mailBytes+1)))
	a.write(strings.Repeat("x", mailBytes-3))
	full(a.letter(0, "four"))
	a.write("xyz")
	full(a.letter(0, "x"))
	a.write("") // has no bytes
	b.takes("A: "+strings.Repeat("x", mailBytes-3), "A: xyz", "A: ")
	if mailItems != 256 || mailBytes != 1<<20 {
		h.Error("the contract says 256 items and 1 MiB")
	}
	a.takeAll()
}

func testMailIDs(h *hubTest) {
	a, b := h.join("A x"), h.join("B").openMail(0)
	first := a.send(1, "one")
	fifth := a.send(5, "five") // ids may leave some out
	last := a.send(6, "six")
	same := func(id, want uint64) {
		h.Helper()
		if seq := a.send(id, "again"); seq != want {
			h.Errorf("id %d got seq %d, now %d", id, want, seq)
		}
	}
	same(1, first)
	same(6, last)
	same(5, fifth)
	a.send(3, "never sent, but below the last")
	b.takes("A: one", "A: five", "A: six") // and nothing twice
	if err := b.Ack(ctx, last); err != nil {
		h.Error(err)
	}
	same(6, last) // known also when it is acknowledged
	if seq := a.send(1, "again"); seq > last {
		h.Error("a repeated id got a seq of its own:", seq)
	}
	b.takes()
	a.write("none", "none") // without an id nothing is the same
	b.takes("A: none", "A: none")

	// The ids of the two seats have nothing to do with each other.
	b.send(1, "from B")
	a.openMail(0).takes("joined", "B: from B")

	// A refused id may be repeated; a stored one is answered also when full.
	for range mailItems - 2 {
		a.write("filler")
	}
	a.refusedToPost(errMailFull, a.letter(7, "refused"))
	same(6, last)
	b.takes(slices.Repeat([]string{"A: filler"}, mailItems-2)...)
	if err := b.Ack(ctx, b.cursor); err != nil {
		h.Error(err)
	}
	if seq := a.send(7, "repeated"); seq <= last {
		h.Error("the repeated id got seq", seq)
	}
	b.takes("A: repeated")
}

func testMailIDsOfClaim(h *hubTest) {
	h.start().Open(ctx, meta{ID: h.id, Expires: h.now().Add(time.Hour)})
	a := h.join("A x")
	if _, err := a.trySend("A", 0, "so that the seat has something to remember"); err != nil {
		h.Error(err)
	}
	seq := a.send(10, "ten")
	again := func(what string) {
		h.Helper()
		if s := a.send(10, "again"); s != seq {
			h.Errorf("after a %s: seq %d, want %d", what, s, seq)
		}
	}
	// join joins A, who is shown the highest id of its claim.
	join := func(as string, lastID uint64) {
		h.Helper()
		if a = h.join(as); a.view.lastID != lastID {
			h.Errorf("%s sees that its mail was stored up to %d, want %d", as, a.view.lastID, lastID)
		}
	}
	old := a
	join("A x", 10)
	old.wantOut(errReplaced, errReplaced)
	again("takeover")
	a.leave(false)
	join("A x", 10)
	again("return")

	a.leave(true) // a new claim counts anew
	join("A y", 0)
	a.send(1, "of y")
	a.leave(false)
	h.advance(h.resumeTTL) // likewise when the reservation was over
	join("A x", 0)
	a.send(1, "of x")
	if first, second := a.send(1, "again"), a.send(2, "second"); second <= first {
		h.Errorf("id 1 has seq %d, the next %d", first, second)
	}
	a.leave(true)

	for range 2 { // without a claim, with each connection
		a = h.join("A")
		a.send(1, "unclaimed")
		a.leave(false)
	}
	h.join("B").openMail(0).takes("A: ten", "A: of y", "A: of x", "A: second", "A: unclaimed", "A: unclaimed")
}

func testMailToOneself(h *hubTest) {
	a := h.join("A x").openMail(0)
	seq, err := a.trySend("A", 1, "note")
	if again, err2 := a.trySend("A", 1, "note"); err != nil || err2 != nil || again != seq {
		h.Error(seq, err, again, err2)
	}
	a.takes("A: note")
	a.leave(false)
	a = h.join("A x").openMail(0)
	a.wantView(view{resumed: resumedBack, mail: true, lastID: 1})
	a.takes("A: note")
	b := h.join("B").openMail(0)
	b.takes()
	b.relay("x")
	a.leave(true)
	h.join("A").openMail(0).takes("x", "A: note") // it is the seat's, not the claim's
	b.takeAll()
}

// testMailProperty: mail that was accepted is never lost, repeated within a
// connection or out of order, whatever else happens.
func testMailProperty(t *testing.T, env hubEnv) {
	steps := rapid.SliceOfN(rapid.SampledFrom([]string{
		"send", "send", "send", "resend", "take", "take", "ack",
		"drop A", "drop B", "leave A", "leave B", "A", "B", "takeover A", "takeover B",
		"relay", "wait", "wait long",
	}), 1, 60)
	checkScripts(t, env, steps, playMail)
}

// playMail plays a script between A, who sends, and B, who receives.
func playMail(h *hubTest, script []string) error {
	type stored struct {
		seq  uint64
		text string
	}
	var (
		a, b   *guest
		sent   []stored // and not acknowledged
		lastID uint64   // of this claim
		last   stored
		seen   int // how many of sent B was given on this connection
	)
	if err := h.start().Open(ctx, meta{ID: h.id, Expires: h.now().Add(24 * time.Hour)}); err != nil {
		return err
	}
	seat := func(g **guest, who string, takeOver bool) {
		if *g != nil && !takeOver {
			return
		}
		old := *g
		next, err := h.tryJoin(who, h.id, request(who))
		if errors.Is(err, errTakeovers) && takeOver {
			return
		} else if err != nil {
			h.Error("join:", err)
			return
		}
		*g = next
		if old != nil {
			old.wantOut(errReplaced, errReplaced)
		}
		switch {
		case who == "B y":
			next.openMail(0)
			seen = 0
		case next.view.resumed == resumedNot:
			lastID = 0
		}
	}
	leave := func(g **guest, forGood bool) {
		if *g != nil {
			(*g).leave(forGood)
			*g = nil
		}
	}
	for i, step := range script {
		switch step {
		case "A":
			seat(&a, "A x", false)
		case "B":
			seat(&b, "B y", false)
		case "takeover A":
			seat(&a, "A x", true)
		case "takeover B":
			seat(&b, "B y", true)
		case "drop A":
			leave(&a, false)
		case "drop B":
			leave(&b, false)
		case "leave A":
			leave(&a, true)
		case "leave B":
			leave(&b, true)
		case "wait":
			h.advance(time.Second)
		case "wait long":
			h.advance(h.resumeTTL)
		}
		if a != nil {
			switch text := fmt.Sprint("mail ", i); step {
			case "send":
				lastID++
				last = stored{a.send(lastID, text), "A: " + text}
				if n := len(sent); n > 0 && last.seq <= sent[n-1].seq {
					return fmt.Errorf("step %d: seq %d after %d", i, last.seq, sent[n-1].seq)
				}
				sent = append(sent, last)
			case "resend":
				if lastID > 0 && a.send(lastID, text) != last.seq {
					return fmt.Errorf("step %d: a repeated id was stored again", i)
				}
			case "relay":
				a.tryRelay("relay") // may find no room
			}
		}
		if b != nil && step == "take" {
			from := len(b.seqs)
			var got []stored
			for _, text := range b.takeAll() {
				if strings.HasPrefix(text, "A: ") {
					got = append(got, stored{b.seqs[from+len(got)], text})
				}
			}
			if !slices.Equal(got, sent[seen:]) {
				return fmt.Errorf("step %d: got %v, want %v", i, got, sent[seen:])
			}
			seen = len(sent)
		}
		if b != nil && step == "ack" && seen > 0 {
			n := (seen + 1) / 2
			if err := b.Ack(ctx, sent[n-1].seq); err != nil {
				return fmt.Errorf("step %d: %w", i, err)
			}
			sent, seen = sent[n:], seen-n
		}
	}
	return nil
}

// A letterStep is one of a script of mail that is refused and repeated.
type letterStep struct {
	do string // send, fill the mailbox, or empty it
	id uint64
}

// testRefusedProperty: whatever is refused, and in whatever order it is repeated,
// mail that was answered with a receipt is in the mailbox, once.
func testRefusedProperty(t *testing.T, env hubEnv) {
	ids := rapid.SliceOfN(rapid.Uint64Range(1, 9), 1, 4)
	rounds := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) (round []letterStep) {
		for _, do := range []string{"fill", "empty"} {
			round = append(round, letterStep{do: do})
			for _, id := range ids.Draw(t, "ids") {
				round = append(round, letterStep{"send", id})
			}
		}
		return round
	}), 1, 6)
	checkScripts(t, env, rounds, func(h *hubTest, rounds [][]letterStep) error { return playRefused(h, slices.Concat(rounds...)) })
}

func playRefused(h *hubTest, script []letterStep) error {
	a, b := h.join("A x"), h.join("B").openMail(0)
	const skipped, refused, stored = 0, 1, 2
	var (
		state [10]int // by id
		last  uint64  // the highest stored
		full  bool
		must  []string        // in the mailbox, in order
		may   map[string]bool // be there: ids that were skipped, and never refused
	)
	may = map[string]bool{}
	for i, s := range append(script, letterStep{do: "empty"}) {
		text := fmt.Sprintf("%d in step %d", s.id, i)
		switch s.do {
		case "fill":
			for size := mailBytes; size > 0; {
				if _, err := a.trySend("B", 0, strings.Repeat("x", size)); errors.Is(err, errMailFull) {
					size /= 2
				} else if err != nil {
					return err
				}
			}
			full = true
		case "empty":
			var got []string
			for _, m := range b.takeAll() {
				if m = strings.TrimPrefix(m, "A: "); !strings.HasPrefix(m, "x") && !may[m] {
					got = append(got, m)
				}
			}
			if !slices.Equal(got, must) {
				return fmt.Errorf("step %d: in the mailbox is %v, want %v", i, got, must)
			}
			if err := b.Ack(ctx, b.cursor); err != nil {
				return err
			}
			must, full = nil, false
		case "send":
			_, err := a.trySend("B", s.id, text)
			known := state[s.id] == stored
			optional := state[s.id] == skipped && s.id < last
			switch {
			case err == nil && optional:
				may[text] = true
				state[s.id] = skipped
			case err == nil && !known && full:
				return fmt.Errorf("step %d: a receipt for %d, for which there is no space", i, s.id)
			case err == nil && !known:
				must = append(must, text)
				state[s.id], last = stored, max(last, s.id)
			case err != nil && (known || !full || !errors.Is(err, errMailFull)):
				return fmt.Errorf("step %d: %d is refused: %w", i, s.id, err)
			case err != nil:
				state[s.id] = refused
			}
		}
	}
	return nil
}

// --- Sessions.

// wantGone fails unless the session of this ID is unknown.
func (h *hubTest) wantGone(id sessionID) {
	h.Helper()
	if _, err := h.tryJoin("A", id, joinRequest{name: "A"}); !errors.Is(err, errGone) {
		h.Errorf("join: %v, want %v", err, errGone)
	}
}

func testSessionCreated(h *hubTest) {
	h.wantGone(h.id)
	a := h.join("A") // create
	b := h.joinAs("B", h.id, joinRequest{name: "B"})
	b.leave(true)
	a.takes("joined", "left")
	a.leave(true)
	h.wantGone(h.id) // with nothing in it and nobody there
	if err := h.start().Ready(ctx); err != nil {
		h.Error("ready:", err)
	}
}

func testSessionCode(h *hubTest) {
	expires := h.now().Add(time.Minute)
	open := func(id sessionID) {
		h.Helper()
		if err := h.start().Open(ctx, meta{ID: id, Expires: expires}); err != nil {
			h.Error(err)
		}
	}
	empty, left, stays := h.id, uuid.New(), uuid.New()
	open(empty)
	open(left)
	open(stays)
	if err := h.start().Open(ctx, meta{ID: left, Expires: expires}); !errors.Is(err, errTaken) {
		h.Error("an ID opened twice:", err)
	}

	// It lives with nobody in it, and remembers: the mailbox counts on.
	a := h.joinAs("A", left, joinRequest{name: "A"})
	b := h.joinAs("B", left, joinRequest{name: "B"})
	seq := a.send(0, "x")
	if err := b.Ack(ctx, seq); err != nil {
		h.Error(err)
	}
	a.leave(true)
	b.leave(true)
	h.advance(10 * time.Second)
	a = h.joinAs("A", left, joinRequest{name: "A"})
	if next := a.send(0, "y"); next <= seq {
		h.Errorf("seq %d after %d", next, seq)
	}
	b = h.joinAs("B", left, joinRequest{name: "B"})
	b.openMail(0).takes("A: y")
	if err := b.Ack(ctx, b.cursor); err != nil {
		h.Error(err)
	}
	a.leave(true)
	b.leave(true)

	a = h.joinAs("A", stays, joinRequest{name: "A"})
	h.advance(expires.Sub(h.now()) - time.Millisecond)
	for _, id := range []sessionID{empty, left} {
		h.joinAs("B", id, joinRequest{name: "B"}).leave(true)
	}
	h.advance(time.Millisecond)
	h.wantGone(empty)
	h.wantGone(left)
	h.advance(time.Hour)
	h.joinAs("B", stays, joinRequest{name: "B"}).leave(true) // someone is connected
	a.takes("joined", "left")
	a.leave(true)
	h.wantGone(stays)

	// The janitor takes expired ones out within 15 s, whoever asks or not.
	expires = h.now().Add(time.Minute)
	open(empty)
	h.advance(time.Minute + 15*time.Second)
	expires = h.now().Add(time.Minute)
	open(empty)
	h.joinAs("B", empty, joinRequest{name: "B"})
}

func testSessionMail(h *hubTest) {
	leaveMail := func() sessionID {
		id := uuid.New()
		a, b := h.joinAs("A", id, request("A")), h.joinAs("B", id, request("B"))
		a.write("for B")
		b.write("for A")
		h.advance(time.Minute)
		a.leave(true)
		b.leave(true)
		return id
	}
	id := leaveMail()
	h.advance(h.sessionTTL - time.Millisecond)
	b := h.joinAs("B", id, joinRequest{name: "B"})
	b.wantView(view{mail: true})
	b.openMail(0).takes("A: for B")
	h.advance(time.Hour) // it lives while someone is there
	b.leave(false)
	h.advance(h.sessionTTL - time.Millisecond) // and then as long again
	a := h.joinAs("A", id, joinRequest{name: "A"})
	a.openMail(0).takes("B: for A")
	b = h.joinAs("B", id, joinRequest{name: "B"})
	b.openMail(0).takes("A: for B")
	h.wantDropped(dropExpired, 0)

	b.leave(true)
	a.leave(true)
	h.advance(h.sessionTTL)
	h.wantGone(id)
	h.wantQueued(0)
	h.wantDropped(dropExpired, 2)
	a = h.joinAs("A", id, request("A"))
	a.wantView(view{})
	a.openMail(0).takes()
	a.leave(true)

	// What is acknowledged does not wait.
	id = uuid.New()
	a, b = h.joinAs("A", id, request("A")), h.joinAs("B", id, request("B"))
	if err := b.Ack(ctx, a.send(0, "x")); err != nil {
		h.Error(err)
	}
	a.leave(true)
	b.leave(true)
	h.wantGone(id)

	// The janitor frees what waited.
	leaveMail()
	h.advance(h.sessionTTL + 15*time.Second)
	h.wantQueued(0)
	h.wantDropped(dropExpired, 2)
}

func testSessionAway(h *hubTest) {
	a := h.join("A x")
	a.leave(false)
	h.advance(h.resumeTTL - time.Millisecond)
	a = h.joinAs("A x", h.id, joinRequest{name: "A", claim: secret("x")})
	a.leave(false)
	h.advance(h.resumeTTL)
	h.wantGone(h.id) // at once

	// Mail waits on, counted from the end of the reservation.
	a = h.join("A x")
	a.write("for B")
	a.leave(false)
	h.advance(h.resumeTTL + h.sessionTTL - time.Millisecond)
	h.joinAs("B", h.id, joinRequest{name: "B"}).openMail(0).takes("A: for B")
	h.guests[len(h.guests)-1].leave(true)
	h.advance(h.sessionTTL)
	h.wantGone(h.id)
}

func testSessionCapacity(h *hubTest) {
	h.maxSessions = 2
	h.owners = newQuota(1)
	owned := request("A")
	owned.owner = netip.MustParsePrefix("10.0.0.1/32")
	code := uuid.New()
	if err := h.start().Open(ctx, meta{ID: code, Expires: h.now().Add(time.Minute)}); err != nil {
		h.Error(err)
	}
	a := h.join("A")
	full := func() {
		h.Helper()
		id := uuid.New()
		if err := h.start().Open(ctx, meta{ID: id, Expires: h.now().Add(time.Minute)}); !errors.Is(err, errCapacity) {
			h.Error("open:", err)
		}
		if _, err := h.tryJoin("A", id, owned); !errors.Is(err, errCapacity) {
			h.Error("join:", err)
		}
		h.wantGone(id)
	}
	full()
	full()
	h.join("B").leave(true) // who is in one already goes on
	h.joinAs("A", code, request("A")).leave(true)
	h.refused(errBusy, "A")
	full()

	a.takeAll()
	a.leave(true)
	third := uuid.New()
	h.joinAs("A", third, request("A"))
	full()
	h.start().End(ctx, third, errGone)
	h.guests[len(h.guests)-1].wantOut(errGone, errGone)
	h.start().End(ctx, third, errGone) // ending it twice frees no more
	a = h.join("A")
	full()
	h.advance(time.Minute + 15*time.Second) // the code has expired
	h.joinAs("A", uuid.New(), owned)        // whose refused ones do not count
	a.takes()
	a.leave(true)
	owned.owner = netip.MustParsePrefix("10.0.0.2/32")
	h.joinAs("A", uuid.New(), request("A"))
	full()
}

func testSessionOwners(h *hubTest) {
	h.owners = newQuota(2)
	joinAs := func(owner, who string, id sessionID) (*guest, error) {
		r := request(who)
		r.owner = netip.MustParsePrefix(owner)
		h.settle() // what has ended counts to nobody any more
		return h.tryJoin(who+" of "+owner, id, r)
	}
	must := func(owner, who string, id sessionID) *guest {
		h.Helper()
		g, err := joinAs(owner, who, id)
		if err != nil {
			h.Fatal(err)
		}
		return g
	}
	full := func(owner string) {
		h.Helper()
		if _, err := joinAs(owner, "A", uuid.New()); !errors.Is(err, errTooMany) {
			h.Errorf("a session more for %s: %v", owner, err)
		}
	}
	const mine, other = "10.0.0.1/32", "10.0.0.2/32"
	first, second, code := uuid.New(), uuid.New(), uuid.New()
	a := must(mine, "A", first)
	must(mine, "A y", second).leave(false)
	full(mine)
	must(other, "B", first) // in a session that is there already
	must(other, "A", uuid.New())
	must(other, "A", uuid.New())
	full(other)
	if err := h.start().Open(ctx, meta{ID: code, Expires: h.now().Add(time.Hour)}); err != nil {
		h.Error(err)
	}
	must(mine, "A", code)

	h.advance(h.resumeTTL) // the reservation in the second is over, and with it the session
	a.takes("joined")
	must(mine, "A", uuid.New())
	full(mine)
	h.start().End(ctx, first, errGone)
	a.wantOut(errGone, errGone)
	h.guests[2].wantOut(errGone, errGone)
	must(mine, "A", uuid.New())
	full(mine)
	h.start().End(ctx, code, errGone) // it counted to nobody
	h.guests[5].wantOut(errGone, errGone)
	full(mine)
}

func testQueuedBytes(h *hubTest) {
	h.queued.limit = 1000
	a, b := h.join("A"), h.join("B y")
	a.takes("joined")
	b.leave(false)
	a.takes("away")
	a.relay(strings.Repeat("r", 400))
	a.write(strings.Repeat("m", 500))
	over := func(by *guest, size int) {
		h.Helper()
		by.refusedToPost(errOverCapacity, by.frame(strings.Repeat("x", size)))
		by.refusedToPost(errOverCapacity, by.letter(9, strings.Repeat("x", size)))
		h.wantDropped(dropOverCapacity, 2)
	}
	over(a, 101)
	elsewhere := h.joinAs("A elsewhere", uuid.New(), request("A"))
	over(elsewhere, 101) // it is one limit for all
	elsewhere.relay(strings.Repeat("r", 100))
	over(a, 1)
	h.wantQueued(1000)

	// Those connected go on, in relay and in mail.
	c := h.joinAs("B elsewhere", h.ids[1], request("B"))
	elsewhere.relay(strings.Repeat("s", 3000))
	elsewhere.send(1, strings.Repeat("n", 3000))
	if seq := elsewhere.send(1, "again"); seq == 0 {
		h.Error("a stored id is not answered")
	}
	c.openMail(0).takes(strings.Repeat("r", 100), strings.Repeat("s", 3000), "A: "+strings.Repeat("n", 3000))
	over(a, 1) // 3000 bytes of mail are not acknowledged
	if err := c.Ack(ctx, c.cursor); err != nil {
		h.Error(err)
	}
	elsewhere.takes("joined")
	over(a, 101)
	a.send(9, strings.Repeat("x", 100)) // a refused id may be repeated
	a.refusedToPost(errOverCapacity, a.frame("x"))
	h.wantDropped(dropOverCapacity, 1)
	b = h.join("B y").openMail(0)
	b.takes(strings.Repeat("r", 400), "A: "+strings.Repeat("m", 500), "A: "+strings.Repeat("x", 100))
	if err := b.Ack(ctx, b.cursor); err != nil {
		h.Error(err)
	}
	a.takes("joined again")
	h.wantQueued(0)
}

func testReport(h *hubTest) {
	a := h.join("A x")
	h.advance(time.Minute)
	report := func(by *guest, o outcome, since time.Duration, first bool) {
		h.Helper()
		s, f, err := by.Report(ctx, o)
		// A hub may measure this by another clock than the test's.
		if near := (s-since).Abs() < 100*time.Millisecond && (s < 0) == (since < 0); err != nil || f != first || !near {
			h.Errorf("report by %s: %v, first: %v, %v; want %v, %v", by, s, f, err, since, first)
		}
	}
	report(a, outcomeFailed, -1, true)
	report(a, outcomeFailed, -1, false)
	b := h.join("B")
	h.advance(10 * time.Second)
	report(b, outcomeFailed, 10*time.Second, false) // once a session, not a seat
	b.leave(true)
	b = h.join("B")
	a2 := h.join("A x")
	a.wantOut(errReplaced, errReplaced)
	h.advance(10 * time.Second)
	report(b, outcomeConnected, 20*time.Second, true) // since they were first connected
	report(a2, outcomeConnected, 20*time.Second, false)
	h.start().End(ctx, h.id, errGone)
	a2.wantOut(errGone, errGone)
	b.wantOut(errGone, errGone)
	report(h.join("A"), outcomeConnected, -1, true)
}

func testEnd(h *hubTest) {
	why := errRoomDeleted
	a, b := h.join("A x"), h.join("B")
	b.leave(false)
	a.leave(false) // away, with a timer running
	b = h.join("B")
	b.relay("waits")
	b.write("waits")
	end := func() {
		h.Helper()
		if err := h.start().End(ctx, h.id, why); err != nil {
			h.Error("end:", err)
		}
		h.settle()
	}
	end()
	b.wantOut(why, errGone)
	a.wantShut(errGone)
	end() // again
	h.wantGone(h.id)
	h.wantQueued(0)
	h.wantDropped(dropExpired, 2)
	if err := h.start().End(ctx, uuid.New(), why); err != nil {
		h.Error("ending what never was:", err)
	}

	// Nothing of it reaches into the next life.
	a, b = h.join("A y"), h.join("B")
	a.wantView(view{})
	a.takes("joined")
	a.leave(false)
	h.advance(h.resumeTTL - time.Second)
	a = h.join("A y")
	h.advance(time.Minute)
	b.takes("away", "joined again")
	a.openMail(0).takes()

	// With both connected, and frames on their way to each.
	a.relay("not taken")
	b.relay("nor this")
	a.write("nor mail")
	end()
	a.wantOut(why, errGone)
	b.wantOut(why, errGone)
	h.wantQueued(0)
	h.wantDropped(dropExpired, 3)

	// While another ends it too, and a third begins anew.
	a, b = h.join("A"), h.join("B")
	b.acts(func() {
		if err := h.start().End(ctx, h.id, why); err != nil {
			h.Error("end:", err)
		}
		h.join("A")
	})
	a.gone = true
	if err := a.Leave(ctx, true); err != nil {
		h.Error(err)
	}
	b.wantOut(why, errGone)
	h.checkNow()
	h.joinAs("B", h.id, joinRequest{name: "B"}).wantView(view{peer: present})
}

// --- All at once.

// testHammered lets many connections do everything in one session and in many.
// What each takes must be in order and whole, and in the end nothing may stay.
func testHammered(h *hubTest) {
	h.holdBytes = 2000
	h.queued.limit = 20_000
	h.maxSessions = 12
	h.resumeTTL, h.sessionTTL = 5*time.Millisecond, 20*time.Millisecond
	crowded := []sessionID{h.id}
	var many []sessionID
	for range 45 {
		many = append(many, uuid.New())
	}
	h.ids = append(crowded, many...)
	h.start()
	var working sync.WaitGroup
	var connection atomic.Uint64
	for w := range 12 {
		ids := crowded
		if w%2 == 1 {
			ids = many
		}
		working.Go(func() {
			random := rand.New(rand.NewPCG(uint64(w), 1))
			for range h.fewer(150) {
				h.sleep(time.Duration(random.IntN(4)) * time.Millisecond)
				who := []string{"A", "B"}[random.IntN(2)] + []string{"", " x", " x", " y"}[random.IntN(4)]
				h.hammer(random, &connection, ids[random.IntN(len(ids))], who)
			}
		})
	}
	stop := make(chan struct{})
	var telling sync.WaitGroup
	telling.Go(func() {
		random := rand.New(rand.NewPCG(99, 1))
		for {
			select {
			case <-stop:
				return
			default:
			}
			id := h.ids[random.IntN(len(h.ids))]
			h.hub.Tell(ctx, id, event{kind: eventContested})
			if random.IntN(3) == 0 {
				h.hub.End(ctx, id, errGone)
			}
			if h.sweep != nil {
				h.sweep(h.hub)
			}
			h.sleep(time.Millisecond)
		}
	})
	working.Wait()
	close(stop)
	telling.Wait()
	h.checkNow()
}

// hammer is one connection's life. Its frames read "connection/number".
func (h *hubTest) hammer(random *rand.Rand, connections *atomic.Uint64, id sessionID, who string) {
	r := request(who)
	var me atomic.Pointer[seat]
	wake, out := make(chan struct{}, 1), make(chan struct{})
	var once sync.Once
	s, v, err := h.hub.Join(ctx, id, r, func(why error) {
		if why != nil {
			once.Do(func() { close(out) })
			return
		}
		if s := me.Load(); s != nil {
			(*s).Held(ctx) // a connection may act in a notification
		}
		select {
		case wake <- struct{}{}:
		default:
		}
	})
	if err != nil {
		if !errors.Is(err, errBusy) && !errors.Is(err, errTakeovers) && !errors.Is(err, errCapacity) {
			h.Error("join:", err)
		}
		return
	}
	me.Store(&s)
	if v.held && v.peer != present {
		h.Errorf("held back by a peer that is %s", v.peer)
	}
	other := "B"
	if r.name == "B" {
		other = "A"
	}

	var reading sync.WaitGroup
	left := make(chan struct{})
	reading.Go(func() {
		buf, cursor := make([]frame, 0, 8), uint64(0)
		last := make(map[string]int) // by kind and connection
		for {
			select {
			case <-wake:
			case <-out:
				return
			case <-left:
				return
			}
			for more := true; more; {
				var taken []frame
				var err error
				if taken, more, err = s.Take(ctx, cursor, 1000, buf); err != nil {
					return
				}
				for i := range taken {
					f := &taken[i]
					if f.kind == kindMail {
						if f.seq <= cursor {
							h.Errorf("seq %d after %d", f.seq, cursor)
						}
						cursor = f.seq
					}
					if f.kind != kindPresence {
						var from string
						var n int
						if _, err := fmt.Sscanf(string(bytes.TrimRight(f.data, ".")), "%s %d", &from, &n); err != nil || n <= last[from] {
							h.Errorf("%.40q after %d", f.data, last[from])
						}
						last[from] = n
					}
					f.release()
				}
			}
			s.Ack(ctx, cursor)
		}
	})

	name := fmt.Sprint(connections.Add(1))
	for n := 1; n < 10+h.fewer(30); n++ {
		text := []byte(fmt.Sprint(name, "r ", n, strings.Repeat(".", random.IntN(100))))
		kind, to := kindRelay, other
		if random.IntN(3) == 0 {
			text[len(name)] = 'm'
			kind = kindMail
			if random.IntN(8) == 0 {
				to = r.name
			}
		}
		buf := h.lend(len(text))
		f := frame{kind: kind, typ: typeIce, data: buf.b[:copy(buf.b, text)], buf: buf}
		if kind == kindMail && n%2 == 0 {
			f.id = uint64(n - random.IntN(3)) // now and then one that was stored
		}
		receipt, err := s.Post(ctx, to, f, random.IntN(2) == 0)
		if errors.Is(err, errReplaced) || errors.Is(err, errGone) {
			break
		}
		if receipt.held {
			s.Flush(ctx)
		}
		switch random.IntN(10) {
		case 0:
			s.Flush(ctx)
		case 1:
			s.Report(ctx, outcomeConnected)
		case 2:
			h.sleep(time.Duration(random.IntN(3)) * time.Millisecond)
		}
	}
	s.Flush(ctx)
	s.Leave(ctx, random.IntN(2) == 0)
	close(left)
	reading.Wait()
}
