package main

import (
	"cmp"
	"context"
	"fmt"
	"math"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"pgregory.net/rapid"
)

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
