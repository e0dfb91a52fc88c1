package main

import (
	"context"
	"errors"
	"io"
	"net"
	"net/netip"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
)

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
