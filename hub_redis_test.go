package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"net/netip"
	"parley/test/testkit"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"
)

// --- Redis for tests.

// newTestStore returns a store over a connection pool of its own.
func newTestStore(t testing.TB, o redis.Options) *redisStore {
	r := newRedisStore(redisAddress{single: &o}, slog.New(slog.NewTextHandler(io.Discard, nil)), newRedisMetrics(newMetrics()))
	t.Cleanup(func() { r.client.Close() })
	return r
}

// startHub runs a hub until the returned function is called, which waits for it.
func startHub(h *redisHub) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { h.Run(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}

// miniEnv runs the suite over miniredis, on the clock of a bubble.
func miniEnv() hubEnv {
	var options redis.Options // of the scenario that runs
	env := memoryEnv()
	run := env.run
	env.run = func(t *testing.T, scenario func(*testing.T)) {
		run(t, func(t *testing.T) {
			m := miniredis.NewMiniRedis()
			m.ClockTTL(true)
			t.Cleanup(m.Close)
			options = redis.Options{
				Dialer:   func(context.Context, string, string) (net.Conn, error) { return m.Dial() },
				PoolSize: 1000, // nobody may wait for a turn: the library's timers are those of the whole process
			}
			scenario(t)
		})
	}
	env.newHub = func(t *testing.T, o hubOptions) hub {
		h := newRedisHub(o, newTestStore(t, options), time.Minute, redisClock)
		t.Cleanup(startHub(h))
		synctest.Wait()
		return h
	}
	env.waiting = redisWaiting
	env.few = 4
	env.sweep = nil
	env.check = func(h hub) error { return redisInvariants(h.(*redisHub).client) }
	return env
}

func TestMiniredisHub(t *testing.T) {
	t.Parallel()
	testHub(t, miniEnv())
}

// redisWaiting returns the bytes that Redis says wait in mailboxes.
func redisWaiting(h hub) int64 {
	var client *redis.Client
	switch h := h.(type) {
	case *redisHub:
		client = h.client
	case *spreadHub:
		client = h.hubs[0].client
	}
	n, _ := client.HGet(ctx, "parley:queued", "all").Int64()
	return n
}

// redisInvariants checks what must hold of all that is in Redis whenever no
// call is under way.
func redisInvariants(client *redis.Client) error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	keys, err := client.Keys(ctx, "parley:*").Result()
	if err != nil {
		return err
	}
	all, sessions, rooms := 0, 0, 0
	known := make(map[string]bool)
	for _, key := range keys {
		const expired = -2
		if ttl, err := client.PTTL(ctx, key).Result(); ttl == expired {
			continue // just now
		} else if err != nil || ttl < 0 {
			fail("%s lives on: %v, %v", key, ttl, err)
		}
		id, ok := strings.CutPrefix(key, "parley:{")
		if !ok {
			continue
		}
		id, rest, _ := strings.Cut(id, "}")
		known[id] = true
		if rest != "" {
			continue
		}
		sessions++
		f, err := client.HGetAll(ctx, key).Result()
		if err != nil {
			return err
		}
		names := []string{"A", "B"}
		if f["k"] == "r" {
			rooms++
			names = strings.FieldsFunc(f["M"], func(r rune) bool { return r == '\n' })
			if got, _ := client.Get(ctx, "parley:room:"+f["n"]).Result(); got != id {
				fail("code %s leads to %q", f["n"], got)
			}
		}
		bytes := 0
		for _, name := range names {
			n, err := redisSeatInvariants(client, key, name, f)
			if err != nil {
				fail("seat %s of %s: %w", name, id, err)
			}
			bytes += n
		}
		if n, _ := client.HGet(ctx, "parley:queued", id).Int(); n != bytes {
			fail("%s: %d bytes counted, %d wait", id, n, bytes)
		}
		if client.ZScore(ctx, "parley:sessions", id).Err() != nil {
			fail("%s is not to be swept", id)
		}
		all += bytes
	}
	for id := range known {
		if n, _ := client.Exists(ctx, "parley:{"+id+"}").Result(); n == 0 {
			fail("something is left of %s", id)
		}
	}
	if n, _ := client.HGet(ctx, "parley:queued", "all").Int(); n != all {
		fail("%d bytes counted, %d wait", n, all)
	}
	if n, _ := client.SCard(ctx, "parley:rooms").Result(); int(n) != rooms {
		fail("%d rooms counted, %d there", n, rooms)
	}
	return errors.Join(errs...)
}

func redisSeatInvariants(client *redis.Client, key, name string, f map[string]string) (bytes int, err error) {
	queue, err := client.LRange(ctx, key+":q:"+name, 0, -1).Result()
	if err != nil {
		return 0, err
	}
	events := 0
	for _, text := range queue {
		frame, ok := decodeRedisFrame(text)
		if !ok {
			return 0, fmt.Errorf("a frame nobody can read: %q", text)
		}
		if frame.kind == kindPresence {
			events++
		}
		bytes += frame.size()
	}
	mail, err := client.XRange(ctx, key+":m:"+name, "-", "+").Result()
	if err != nil {
		return 0, err
	}
	mailed := 0
	for _, entry := range mail {
		mailed += len(entry.Values["d"].(string))
	}
	number := func(field string) int {
		n, _ := strconv.Atoi(f[name+":"+field])
		return n
	}
	if number("q") != bytes || number("u") != events || number("b") != mailed {
		return 0, fmt.Errorf("%d bytes, %d events and %d bytes of mail counted; %d, %d and %d wait",
			number("q"), number("u"), number("b"), bytes, events, mailed)
	}
	holder, away := f[name+":h"], f[name+":a"]
	if holder == "" && events > 0 {
		return 0, errors.New("presence waits for nobody")
	}
	if holder != "" && away != "" || away != "" && f[name+":c"] == "" {
		return 0, fmt.Errorf("held by %q, reserved until %q for %q", holder, away, f[name+":c"])
	}
	seat := key[len("parley:{"):len(key)-1] + " " + name
	if (client.ZScore(ctx, "parley:away", seat).Err() == nil) != (away != "") {
		return 0, errors.New("its reservation has no end")
	}
	if instance, _, ok := strings.Cut(holder, ":"); ok {
		if in, _ := client.SIsMember(ctx, "parley:seats:"+instance, seat).Result(); !in {
			return 0, errors.New("its instance does not know")
		}
	}
	return bytes + mailed, nil
}

// A testClock is the time as scripts know it in a test over a real Redis, whose
// own cannot be set: a key in it. It stands still unless it is advanced. Keys expire
// by Redis' own clock all the same, and so far later than any test takes.
const testClock = `
local function clock()
  return tonumber(redis.call('GET', 'test:clock'))
end
local MARGIN = 3600000000
`

// A spreadHub is several instances over one Redis, of which each call takes
// another.
type spreadHub struct {
	hubs []*redisHub
	next atomic.Uint64
}

func (s *spreadHub) any() *redisHub { return s.hubs[s.next.Add(1)%uint64(len(s.hubs))] }

func (s *spreadHub) Open(ctx context.Context, m meta) error { return s.any().Open(ctx, m) }
func (s *spreadHub) Find(ctx context.Context, code string) (sessionID, error) {
	return s.any().Find(ctx, code)
}
func (s *spreadHub) Get(ctx context.Context, id sessionID) (meta, int, error) {
	return s.any().Get(ctx, id)
}
func (s *spreadHub) Update(ctx context.Context, id sessionID, c change) (meta, int, error) {
	return s.any().Update(ctx, id, c)
}
func (s *spreadHub) End(ctx context.Context, id sessionID, why error) error {
	return s.any().End(ctx, id, why)
}
func (s *spreadHub) Join(ctx context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	return s.any().Join(ctx, id, r, notify)
}
func (s *spreadHub) Tell(ctx context.Context, id sessionID, e event) error {
	return s.any().Tell(ctx, id, e)
}
func (s *spreadHub) Ready(ctx context.Context) error { return s.any().Ready(ctx) }
func (s *spreadHub) Run(context.Context) error       { return nil }

// redisEnv runs the suite over three instances and a real Redis.
func redisEnv(suite *testing.T) hubEnv {
	t := suite // or of the scenario that runs
	server := testkit.StartRedis(suite)
	client := server.Client()
	var spread *spreadHub
	env := memoryEnv()
	env.run = func(scene *testing.T, scenario func(*testing.T)) {
		spread, t = nil, scene
		client.FlushAll(ctx)
		client.Set(ctx, "test:clock", mailEpoch.AddDate(1, 0, 0).UnixMicro(), 0)
		scenario(t)
	}
	env.newHub = func(t *testing.T, o hubOptions) hub {
		spread = new(spreadHub)
		for range 3 {
			h := newRedisHub(o, newTestStore(t, redis.Options{Addr: server.Addr}), 20*time.Second, testClock)
			t.Cleanup(startHub(h))
			spread.hubs = append(spread.hubs, h)
		}
		for _, h := range spread.hubs {
			testkit.Eventually(t, "the hub hears", func() bool { return h.Ready(ctx) == nil })
		}
		return spread
	}
	env.now = func() time.Time {
		n, err := client.Get(ctx, "test:clock").Int64()
		if err != nil {
			t.Fatal(err)
		}
		return time.UnixMicro(n)
	}
	env.sleep = func(d time.Duration) {
		client.IncrBy(ctx, "test:clock", d.Microseconds())
		if spread == nil {
			return
		}
		for range 2 { // what is due, and what that makes due
			for _, h := range spread.hubs {
				if _, err := h.tick(ctx); err != nil {
					t.Error(err)
				}
			}
		}
	}
	env.settle = func() {
		if spread == nil {
			return
		}
		for _, h := range spread.hubs {
			h.barrier(t)
		}
	}
	env.waiting = redisWaiting
	env.few = 10
	env.sweep = nil
	env.check = func(h hub) error { return redisInvariants(client) }
	return env
}

// barrier returns once all that was published for the hub has been delivered.
func (h *redisHub) barrier(t testing.TB) {
	t.Helper()
	reached := make(chan struct{})
	number := h.number.Add(1)
	h.mu.Lock()
	h.seats[number] = &redisSeat{hub: h, notify: func(error) { close(reached) }}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.seats, number)
		h.mu.Unlock()
	}()
	if err := h.client.Publish(ctx, wakeChannel(h.instance), fmt.Sprint("n", number)).Err(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-reached:
	case <-time.After(10 * time.Second):
		t.Fatal("a notification did not arrive")
	}
}

func TestRedisHub(t *testing.T) {
	t.Parallel()
	testHub(t, redisEnv(t))
}

// What the hub in Redis does when Redis and an instance see a seat differently:
// answers were lost, or data were.

// redisFault is a scenario over miniredis.
func redisFault(t *testing.T, run func(h *hubTest, r *redisHub)) {
	t.Parallel()
	env := miniEnv()
	env.run(t, func(t *testing.T) {
		h := newHubTest(t, env)
		run(h, h.start().(*redisHub))
	})
}

// answersLost is a go-redis hook: while lost is set, calls are made and their
// answers lost.
type answersLost struct{ lost atomic.Bool }

func (a *answersLost) DialHook(next redis.DialHook) redis.DialHook { return next }

func (a *answersLost) ProcessHook(next redis.ProcessHook) redis.ProcessHook {
	return func(ctx context.Context, cmd redis.Cmder) error {
		err := next(ctx, cmd)
		if err == nil && a.lost.Load() {
			cmd.SetErr(io.ErrUnexpectedEOF)
			return io.ErrUnexpectedEOF
		}
		return err
	}
}

func (a *answersLost) ProcessPipelineHook(next redis.ProcessPipelineHook) redis.ProcessPipelineHook {
	return next
}

// joinUnanswered joins, and has the answer lost.
func joinUnanswered(h *hubTest, r *redisHub, faults *answersLost, id sessionID, request joinRequest) {
	h.Helper()
	faults.lost.Store(true)
	_, _, err := r.Join(ctx, id, request, func(error) {})
	faults.lost.Store(false)
	if !errors.Is(err, io.ErrUnexpectedEOF) {
		h.Fatal("joined with", err)
	}
}

// Who comes back, and never hears that it did, keeps its claim, and its mail is
// still known.
func TestRedisJoinUnanswered(t *testing.T) {
	redisFault(t, func(h *hubTest, r *redisHub) {
		a, b := h.join("A x"), h.join("B").openMail(0)
		a.send(5, "five")
		a.leave(false)
		faults := new(answersLost)
		r.client.AddHook(faults)
		joinUnanswered(h, r, faults, h.id, request("A x"))
		h.advance(20 * time.Second) // in which the seat is left again
		a = h.join("A x")
		if a.view.resumed != resumedBack || a.view.lastID != 5 {
			h.Errorf("A sees %+v", a.view)
		}
		a.send(5, "five, again")
		if frames, _, err := b.Take(ctx, 0, 1<<20, make([]frame, 0, 100)); err != nil || mailIn(frames) != 1 {
			h.Error(mailIn(frames), "mails,", err)
		}
	})
}

func mailIn(frames []frame) (n int) {
	for _, f := range frames {
		if f.kind == kindMail {
			n++
		}
	}
	return n
}

// Likewise in a room, whose member does not know by another name.
func TestRedisRoomResumeUnanswered(t *testing.T) {
	redisFault(t, func(h *hubTest, r *redisHub) {
		room := meta{ID: h.id, Expires: h.now().Add(time.Hour), Room: &roomMeta{Code: "PARTY2", Max: 4, Created: h.now()}}
		if err := r.Open(ctx, room); err != nil {
			h.Fatal(err)
		}
		h.ids = append(h.ids, h.id)
		join := func(name string, claimed, resume claim) (seat, error) {
			s, _, err := r.Join(ctx, h.id, joinRequest{room: true, name: name, claim: claimed, resume: resume}, func(error) {})
			return s, err
		}
		s, err := join("one", secret("1"), claim{})
		if err != nil {
			h.Fatal(err)
		}
		if err := s.Leave(ctx, false); err != nil {
			h.Fatal(err)
		}
		faults := new(answersLost)
		r.client.AddHook(faults)
		joinUnanswered(h, r, faults, h.id, joinRequest{room: true, name: "two", claim: secret("2"), resume: secret("1")})
		h.advance(r.resumeTTL + 20*time.Second)
		if _, taken, err := r.Get(ctx, h.id); err != nil || taken != 0 {
			h.Error(taken, "seats are taken,", err)
		}
	})
}

// A seat that was lost with a lease is taken again once, whoever notices: a call
// that asked before that does not put its connection out.
func TestRedisReseatedOnce(t *testing.T) {
	redisFault(t, func(h *hubTest, r *redisHub) {
		a, b := h.join("A x"), h.join("B")
		r.losses.Add(1)
		key, number := "parley:{"+h.id.String()+"}", a.seat.(*redisSeat).holder
		r.client.HDel(ctx, key, "A:h")
		r.client.SRem(ctx, "parley:seats:"+r.instance, h.id.String()+" A")
		a.relay("x") // seats it again
		if got, _ := r.client.HGet(ctx, key, "A:h").Result(); got != number {
			h.Fatalf("A is held by %q", got)
		}
		if err := a.seat.(*redisSeat).reseat(ctx, errGone, 0); err != nil {
			h.Error("a look from before:", err)
		}
		a.relay("y")
		h.advance(time.Second)
		if outs := a.news(); len(outs) > 0 {
			h.Error("A is out:", outs)
		}
		b.gone = true
		b.Leave(ctx, true)
	})
}

// A seat that only Redis thinks is held here is left.
func TestRedisStray(t *testing.T) {
	redisFault(t, func(h *hubTest, r *redisHub) {
		a := h.join("A x")
		key := "parley:{" + h.id.String() + "}"
		r.client.HSet(ctx, key, "B:h", r.instance+":4711")
		r.client.SAdd(ctx, "parley:seats:"+r.instance, h.id.String()+" B")
		h.advance((straysEvery + 2) * r.look)
		if got, err := r.client.HGet(ctx, key, "B:h").Result(); !errors.Is(err, redis.Nil) {
			h.Errorf("B is held by %q, %v", got, err)
		}
		a.takes("left")
	})
}

// A reservation ends also when what ends it was lost.
func TestRedisReservationLost(t *testing.T) {
	redisFault(t, func(h *hubTest, r *redisHub) {
		h.join("A x").leave(false)
		r.client.Del(ctx, "parley:away")
		h.advance(2 * time.Hour)
		if n, _ := r.client.Exists(ctx, "parley:{"+h.id.String()+"}").Result(); n != 0 {
			h.Error("the session lives on")
		}
	})
}

// While Redis cannot be reached there is nothing to leave, and so nothing grows.
func TestRedisUnreachableJoins(t *testing.T) {
	r := newRedisHub(newHubTest(t, memoryEnv()).hubOptions, newTestStore(t, redis.Options{
		Dialer: func(context.Context, string, string) (net.Conn, error) {
			return nil, &net.OpError{Op: "dial", Net: "tcp", Err: errors.New("refused")}
		},
	}), time.Minute, redisClock)
	for range 20 {
		if _, _, err := r.Join(ctx, sessionID{1}, request("A x"), func(error) {}); err == nil || !strings.Contains(err.Error(), "refused") {
			t.Fatal("joined with", err)
		}
	}
	if len(r.leaving) > 0 || len(r.seats) > 0 {
		t.Errorf("%d seats wait to be left, %d are kept", len(r.leaving), len(r.seats))
	}
}

// A session whose making was not answered counts to its owner as long as it lives,
// and no longer; one that was never made, until the next look.
func TestRedisOwnedUnanswered(t *testing.T) {
	t.Parallel()
	env := miniEnv()
	env.run(t, func(t *testing.T) {
		h := newHubTest(t, env)
		h.owners = newQuota(1)
		r, faults := h.start().(*redisHub), new(answersLost)
		r.client.AddHook(faults)
		owned := request("A x")
		owned.owner = netip.MustParsePrefix("10.0.0.1/32")
		room := meta{ID: uuid.New(), Expires: h.now().Add(time.Hour), Room: &roomMeta{Code: "PARTY2", Created: h.now(), Max: 2, Owner: owned.owner}}
		mayOpen := func(want bool, what string) {
			h.Helper()
			ok, _ := h.owners.take(owned.owner)
			if ok {
				h.owners.give(owned.owner)
			}
			if ok != want {
				h.Errorf("%s: its owner may open another: %v", what, ok)
			}
		}
		for range 2 {
			joinUnanswered(h, r, faults, h.id, owned)
			mayOpen(false, "a pair, joined")
			h.advance(r.look)
			mayOpen(false, "a pair, away")
			h.advance(h.resumeTTL + 2*r.look)
			mayOpen(true, "a pair, ended")
		}

		faults.lost.Store(true)
		if err := r.Open(ctx, room); !errors.Is(err, io.ErrUnexpectedEOF) {
			h.Error("opened with", err)
		}
		faults.lost.Store(false)
		h.advance(r.look)
		mayOpen(false, "a room")
		if err := r.End(ctx, room.ID, errGone); err != nil {
			h.Error(err)
		}
		h.advance(2 * r.look)
		mayOpen(true, "no room")
	})
}

// An absentSeat is a seat whose hub does not answer until it is back.
type absentSeat struct {
	seat
	err   error
	back  atomic.Bool
	asked atomic.Int32
}

func (s *absentSeat) Take(_ context.Context, _ uint64, _ int, buf []frame) ([]frame, bool, error) {
	s.asked.Add(1)
	if !s.back.Load() {
		return buf, false, s.err
	}
	return append(buf, frame{typ: typeIce, data: []byte(`{"type":"ice"}`)}), false, nil
}

// A remoteSource is the source of a connection that holds nothing but a seat.
type remoteSource struct {
	endlessSource
	seat *remoteSeat
}

func (s *remoteSource) take(buf []frame, budget int) ([]frame, bool) {
	buf, more, _ := s.seat.Take(context.Background(), noMail, budget, buf)
	return buf, more
}

// What could not be fetched is fetched as soon as the hub is back, though nobody
// says that there is anything; and nobody asks for it without end, or when it is
// too late.
func TestRemoteFetchAgain(t *testing.T) {
	for _, tc := range []struct {
		name    string
		err     error
		closing bool
		back    time.Duration // when the hub is
		within  time.Duration // after which the frame is there; 0 for never
		most    int32         // times that it is asked until it is back
	}{
		{"soon", errBackend, false, time.Second, time.Second, 3},
		{"later", errBackend, false, 2 * time.Minute, 20 * time.Second, 20}, // each ping asks, too
		{"seat lost", errReplaced, false, time.Minute, 0, 1},
		{"closing", errBackend, true, time.Minute, 0, 2},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t) // with a heartbeat of 20 s
				far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
				hub := &absentSeat{err: tc.err}
				c := &conn{connOptions: &ts.connOptions, net: near}
				remote := newRemoteSeat(c)
				remote.seat = hub
				c.src = &remoteSource{seat: remote}
				c.begin(nil)
				t.Cleanup(func() {
					c.abort(closeAbnormal)
					c.timer.Stop()
					synctest.Wait()
				})
				var received lockedBuffer
				go io.Copy(&received, far)
				synctest.Wait()
				if tc.closing {
					c.close(closeGoingAway, "")
				}
				for begin := time.Now(); time.Since(begin) < tc.back; time.Sleep(time.Second) {
					c.touch() // somebody has to be heard of meanwhile
				}
				if n := hub.asked.Load(); n > tc.most || n == 0 {
					t.Errorf("asked %d times, want at most %d", n, tc.most)
				}
				hub.back.Store(true)
				time.Sleep(cmp.Or(tc.within, time.Minute/2))
				synctest.Wait()
				if got := strings.Contains(received.String(), `{"type":"ice"}`); got != (tc.within > 0) {
					t.Errorf("delivered within %v: %v", tc.within, got)
				}
			})
		})
	}
}

// A lockStep is something that is done to two hubs.
type lockStep struct {
	op       string
	who, to  int // of four who may be in the session
	n        int
	identity int // which secret
}

// TestHubsInLockstep: whatever is done to the hub in memory and to one in Redis,
// they answer the same, and their connections see the same.
func TestHubsInLockstep(t *testing.T) {
	t.Parallel()
	testHubsInLockstep(t, 8)
}

// testHubsInLockstep plays so many scripts in a pair, and as many in a room.
func testHubsInLockstep(t *testing.T, n int) {
	ops := rapid.SampledFrom([]string{
		"join", "join", "join", "join", "leave", "drop", "drop", "relay", "relay", "relay", "all", "mail", "mail", "mail", "big",
		"take", "take", "take", "ack", "held", "tell", "report", "update", "get", "end", "wait", "wait", "wait long",
	})
	scripts := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) lockStep {
		four := rapid.IntRange(0, 3)
		return lockStep{ops.Draw(t, "op"), four.Draw(t, "who"), four.Draw(t, "to"), rapid.IntRange(0, 20).Draw(t, "n"), rapid.IntRange(0, 2).Draw(t, "identity")}
	}), 20, 60)
	for _, room := range []bool{false, true} {
		played := 0
		rapid.Check(t, func(rt *rapid.T) {
			script := scripts.Draw(rt, "script") // outside, because rapid fails by panic
			if played++; played > n && !t.Failed() {
				return
			}
			var err error
			synctest.Test(t, func(t *testing.T) { err = playLockstep(t, room, script) })
			if err != nil {
				rt.Fatal(err)
			}
		})
	}
}

// A lockSide is one of the two hubs, and who is connected to it.
type lockSide struct {
	hub   hub
	seats [4]*lockSeat
	names [4]string // in a room, of whoever was last seated so

	mu    sync.Mutex          // guards what the hub tells
	drops [numDropReasons]int // guarded by mu
}

type lockSeat struct {
	seat
	outs   []error // guarded by the side's mu
	cursor uint64
}

func playLockstep(t *testing.T, room bool, script []lockStep) error {
	time.Sleep(time.Until(mailEpoch.AddDate(1, 0, 0)))
	id := uuid.New()
	var sides [2]*lockSide
	for i := range sides {
		side := new(lockSide)
		o := hubOptions{
			maxSessions: 1, sessionTTL: 10 * time.Minute, resumeTTL: time.Minute, roomEmptyTTL: 5 * time.Minute, holdBytes: 3000, slowBytes: 3000,
			queued: &budget{limit: 20_000}, owners: newQuota(0),
			dropped: func(r dropReason, n int) {
				side.mu.Lock()
				defer side.mu.Unlock()
				side.drops[r] += n
			},
		}
		if i == 0 {
			h := newMemoryHub(o)
			ctx, cancel := context.WithCancel(context.Background())
			t.Cleanup(cancel)
			go h.Run(ctx)
			side.hub = h
		} else {
			m := miniredis.NewMiniRedis()
			m.ClockTTL(true)
			t.Cleanup(m.Close)
			h := newRedisHub(o, newTestStore(t, redis.Options{
				Dialer:   func(context.Context, string, string) (net.Conn, error) { return m.Dial() },
				PoolSize: 1000,
			}), 20*time.Second, redisClock)
			t.Cleanup(startHub(h))
			side.hub = h
		}
		sides[i] = side
	}
	synctest.Wait()
	expires := time.Now().Add(30 * time.Minute)
	for i, s := range script {
		time.Sleep(time.Millisecond) // so that reservations end one after another
		var seen [2]string
		for j, side := range sides {
			seen[j] = side.play(i, s, id, room, expires)
		}
		if s.op == "wait" || s.op == "wait long" {
			time.Sleep(map[string]time.Duration{"wait": time.Second, "wait long": time.Minute}[s.op] * time.Duration(1+s.n))
		}
		synctest.Wait()
		sides[0].hub.(*memoryHub).sweep(time.Now()) // Redis is asked as soon as something is due
		for j, side := range sides {
			seen[j] += side.news()
		}
		if seen[0] != seen[1] {
			return fmt.Errorf("step %d, %+v: the hub in memory answers\n\t%.500s\nthe one in Redis\n\t%.500s", i, s, seen[0], seen[1])
		}
	}
	for _, side := range sides {
		side.hub.End(ctx, id, errGone)
	}
	synctest.Wait()
	if a, b := sides[0].news(), sides[1].news(); a != b {
		return fmt.Errorf("in the end %s and %s", a, b)
	}
	if err := redisInvariants(sides[1].hub.(*redisHub).client); err != nil {
		return fmt.Errorf("invariants: %w", err)
	}
	return nil
}

// news tells what connections were told, and the counts of what was dropped.
func (s *lockSide) news() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var b strings.Builder
	for i, seat := range s.seats {
		if seat != nil && len(seat.outs) > 0 {
			fmt.Fprintf(&b, " %d is out: %v;", i, seat.outs)
			s.seats[i] = nil
		}
	}
	fmt.Fprint(&b, s.drops)
	return b.String()
}

func (s *lockSide) play(step int, l lockStep, id sessionID, room bool, expires time.Time) string {
	m := s.seats[l.who]
	name, other := []string{"A", "B"}[l.who%2], []string{"A", "B"}[l.to%2]
	if room {
		other = cmp.Or(s.names[l.to], "nobody")
	}
	who := l.who
	if !room {
		who %= 2
	}
	switch l.op {
	case "join":
		r := joinRequest{name: name, create: true, v: l.n % 2}
		if l.identity > 0 {
			r.claim = secret(fmt.Sprint("of ", l.identity))
		}
		if room {
			open := meta{ID: id, Expires: expires, Room: &roomMeta{Code: "PARTY2", Created: expires.Add(-time.Hour), Max: 3}}
			s.hub.Open(ctx, open) // unless it is
			r = joinRequest{room: true, name: fmt.Sprint("member ", step), claim: secret(fmt.Sprint("of ", step)), displayName: fmt.Sprint(l.n)}
			if l.identity > 0 && s.names[l.who] != "" {
				r.resume = secret("of " + strings.TrimPrefix(s.names[l.who], "member "))
			}
		}
		next := new(lockSeat)
		seat, v, err := s.hub.Join(ctx, id, r, func(why error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if why != nil {
				next.outs = append(next.outs, why)
			}
		})
		text := fmt.Sprintf("%v %+v", err, v)
		if err != nil {
			return text
		}
		if v.room != nil {
			text = fmt.Sprintf("%+v %v", *v.room, v.resumed)
			s.names[who] = v.room.self.id
			for i, old := range s.seats {
				if old != nil && i != who && s.names[i] == v.room.self.id {
					s.names[i] = ""
				}
			}
		}
		next.seat = seat
		if old := s.seats[who]; old != nil {
			synctest.Wait()
			s.mu.Lock()
			outs := old.outs
			s.mu.Unlock()
			if len(outs) == 0 {
				old.Leave(ctx, true)
			}
			text += fmt.Sprint(" the old one: ", outs)
		}
		s.seats[who] = next
		return text
	case "tell":
		return fmt.Sprint(s.hub.Tell(ctx, id, event{kind: eventContested}))
	case "end":
		if l.n > 2 {
			return ""
		}
		return fmt.Sprint(s.hub.End(ctx, id, errRoomDeleted))
	case "get":
		m, taken, err := s.hub.Get(ctx, id)
		if m.Room != nil {
			return fmt.Sprint(m.Room.Max, m.Room.Locked, taken, err)
		}
		return fmt.Sprint(taken, err)
	case "update":
		locked := l.n%4 == 0
		_, taken, err := s.hub.Update(ctx, id, change{Max: new(2 + l.n%3), Locked: &locked})
		return fmt.Sprint(taken, err)
	}
	if !room {
		m = s.seats[l.who%2]
	}
	if m == nil {
		return ""
	}
	post := func(to string, f frame) string {
		r, err := m.Post(ctx, to, f, l.n%3 == 0)
		m.Flush(ctx)
		return fmt.Sprint(r, err)
	}
	relay := func(to string, size int) string {
		return post(to, frame{kind: kindRelay, typ: typeIce, binary: l.n%2 == 0, data: []byte(strings.Repeat("x", size))})
	}
	switch l.op {
	case "leave", "drop":
		s.seats[who] = nil
		return fmt.Sprint(m.Leave(ctx, l.op == "leave"))
	case "relay":
		if !room {
			return relay("", l.n*10)
		}
		return relay(other, l.n*10)
	case "all":
		return relay("", l.n)
	case "big":
		return relay(other, l.n*200)
	case "mail":
		return post(other, frame{kind: kindMail, id: uint64(l.n), data: []byte(strings.Repeat("m", l.n*l.identity*50))})
	case "take":
		frames, more, err := m.Take(ctx, []uint64{noMail, m.cursor}[l.n%2], 100*l.n, make([]frame, 0, 1+l.n))
		var text []string
		for _, f := range frames {
			if f.kind == kindMail {
				m.cursor = f.seq
			}
			text = append(text, fmt.Sprintf("%d %d %s %v %d %s", f.kind, f.typ, f.from, f.binary, f.seq, hubRoomRead(&f)))
		}
		return fmt.Sprint(text, more, err)
	case "ack":
		return fmt.Sprint(m.Ack(ctx, []uint64{m.cursor, m.cursor - min(m.cursor, 1), m.cursor + 1, math.MaxUint64}[l.n%4]))
	case "held":
		held, err := m.Held(ctx)
		return fmt.Sprint(held, err)
	case "report":
		since, first, err := m.Report(ctx, []outcome{outcomeConnected, outcomeFailed}[l.n%2])
		return fmt.Sprint(since.Truncate(time.Millisecond), first, err)
	}
	return ""
}
