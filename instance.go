package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"time"

	"github.com/redis/go-redis/v9"
)

// The background work of an instance that keeps its sessions in Redis: it hears
// of what concerns its connections, shows that it lives, and does what is due.

// Bounds of the background work.
const (
	tickBatch  = 64               // seats and sessions that one tick deals with
	leaveBatch = 256              // seats left between two ticks
	lookBatch  = 64               // seats that one look asks for
	tickLater  = 10 * time.Second // longest time between two ticks
	retryRedis = 250 * time.Millisecond
)

func wakeChannel(instance string) string { return "parley:wake:" + instance }

// Run goes on until ctx is done, or Redis turns out to be none that can be used.
func (h *redisHub) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	hearing := make(chan struct{})
	go func() {
		defer close(hearing)
		h.hear(ctx)
	}()
	defer func() {
		cancel()
		h.held.cut()
		<-hearing
	}()
	defer h.retire()
	timer := time.NewTimer(0)
	defer timer.Stop()
	var looked time.Time
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-timer.C:
		case <-h.waken:
		}
		wait, err := h.work(ctx, &looked)
		if _, unfit := errors.AsType[*unfitError](err); unfit {
			return err
		}
		if err != nil {
			wait = retryRedis
			if h.leased.Swap(false) && ctx.Err() == nil {
				h.log.Warn("Redis is away", "error", err)
			}
		}
		timer.Reset(wait)
	}
}

// retire lets the lease end, for what this instance could not leave itself.
func (h *redisHub) retire() {
	ctx, cancel := context.WithTimeout(context.Background(), redisTimeout/8)
	defer cancel()
	h.client.ZAddXX(ctx, leasesKey, redis.Z{Score: 0, Member: h.instance})
}

const leasesKey = "parley:leases"

// work does a tick, and a look where one is due, and returns when to come back.
func (h *redisHub) work(ctx context.Context, looked *time.Time) (time.Duration, error) {
	if err := h.check(ctx); err != nil {
		return 0, err
	}
	next, err := h.tick(ctx)
	if err != nil {
		return 0, err
	}
	if !h.leased.Swap(true) {
		h.log.Info("Redis is there")
		h.lookSoon()
	}
	if more, err := h.leaveAgain(ctx); err != nil {
		return 0, err
	} else if more {
		next = 0
	}
	if now := time.Now(); h.lookIsDue(now, *looked) {
		err := h.lookAtAll(ctx)
		if err == nil && h.straysDue() {
			err = h.leaveStrays(ctx)
		}
		if err != nil {
			h.lookSoon()
			return 0, err
		}
		*looked = now
	}
	return min(next, h.tickEvery()), nil
}

// tickEvery is the longest time between two ticks: a lease outlives three that
// fail.
func (h *redisHub) tickEvery() time.Duration { return min(h.lease/5, tickLater) }

func (h *redisHub) lookSoon() {
	h.mu.Lock()
	h.lookNow = true
	h.mu.Unlock()
	h.wakeRun()
}

func (h *redisHub) lookIsDue(now, looked time.Time) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	due := h.lookNow || now.Sub(looked) >= h.look
	h.lookNow = false
	return due
}

// straysEvery is the number of looks after which strays are looked for.
const straysEvery = 10

func (h *redisHub) straysDue() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.looks++
	return h.looks%straysEvery == 0
}

func (h *redisHub) wakeRun() {
	select {
	case h.waken <- struct{}{}:
	default:
	}
}

// tick renews the lease and does what is due; it returns when something is due
// next.
func (h *redisHub) tick(ctx context.Context) (next time.Duration, err error) {
	had := flag01(h.dataName() != "")
	begun := time.Now()
	h.mu.Lock()
	// A tick that had no answer may have found the lease lost, and renewed it.
	late := !h.ticked.IsZero() && begun.Sub(h.ticked) >= h.lease
	h.mu.Unlock()
	res, err := h.run(ctx, h.scripts.tick, nil, h.instance, had, h.instance+time.Now().String(), tickBatch)
	if err == nil && len(res) < 8 {
		err = errBackend
	}
	if err != nil {
		return 0, err
	}
	if late || luaInt(res[0]) == 1 {
		h.losses.Add(1)
		h.metrics.leasesLost.Inc()
		h.lookSoon()
	}
	h.mu.Lock()
	h.data, h.ticked = luaText(res[1]), begun
	h.mu.Unlock()
	h.metrics.pruned.Add(float64(luaInt(res[3])))
	h.counts.sessions.Store(luaInt(res[4]))
	h.counts.rooms.Store(luaInt(res[5]))
	h.counts.queued.Store(luaInt(res[6]))
	if next = time.Duration(luaInt(res[2])) * time.Microsecond; next < 0 {
		next = tickLater
	}
	return next, nil
}

// leaveAgain leaves seats that could not be left when their connections ended,
// and reports whether there are more.
func (h *redisHub) leaveAgain(ctx context.Context) (more bool, err error) {
	h.mu.Lock()
	var some []leaving
	for _, l := range h.leaving {
		if more = len(some) == leaveBatch; more {
			break
		}
		some = append(some, l)
	}
	h.metrics.leaving.Set(float64(len(h.leaving)))
	h.mu.Unlock()
	for _, l := range some {
		if err := h.leave(ctx, l.seat, l.seat.seatName(), l.forGood); err != nil && !isNamed(err) {
			return true, err
		}
	}
	return more, nil
}

// lookAtAll looks at every seat of this instance, and at what counts to its
// quotas: notifications may have been lost.
func (h *redisHub) lookAtAll(ctx context.Context) error {
	h.mu.Lock()
	seats := make([]*redisSeat, 0, len(h.seats))
	for _, m := range h.seats {
		if m.isSeated() {
			seats = append(seats, m)
		}
	}
	owned := make([]string, 0, len(h.owned))
	for id := range h.owned {
		owned = append(owned, id)
	}
	h.mu.Unlock()
	for len(seats) > 0 {
		n := min(len(seats), lookBatch)
		if err := h.lookAt(ctx, seats[:n]); err != nil {
			return err
		}
		if err := h.tickInTime(ctx); err != nil {
			return err
		}
		seats = seats[n:]
	}
	for len(owned) > 0 {
		n := min(len(owned), lookBatch)
		res, err := h.run(ctx, h.scripts.owned, owned[:n], h.instance)
		if err != nil {
			return err
		}
		for i, there := range luaList(res[0]) {
			if luaInt(there) == 0 && i < n {
				h.disown(owned[i])
			}
		}
		owned = owned[n:]
	}
	return nil
}

func (h *redisHub) lookAt(ctx context.Context, seats []*redisSeat) error {
	keys, args, joins := make([]string, len(seats)), []any{h.instance}, make([]int, len(seats))
	for i, m := range seats {
		m.mu.Lock()
		keys[i], joins[i] = m.key, m.joins
		args = append(args, m.holder, m.name, m.claim().bytes())
		m.mu.Unlock()
	}
	res, err := h.run(ctx, h.scripts.look, keys, args...)
	if err == nil && len(res) < 1 {
		err = errBackend
	}
	if err != nil {
		return err
	}
	for i, answer := range luaList(res[0]) {
		if i == len(seats) {
			break
		}
		m := seats[i]
		switch luaText(answer) {
		case "o":
			if m.held.Load() {
				m.notify(nil)
			}
		case "n":
			m.notify(nil)
		case "r":
			err = m.lost(ctx, errReplaced, joins[i])
		default:
			err = m.lost(ctx, errGone, joins[i])
		}
		if err != nil && !isNamed(err) {
			return err
		}
	}
	return nil
}

// lost is called when a look finds that a seat is not held, which it was before.
func (m *redisSeat) lost(ctx context.Context, why error, joins int) error {
	if !m.isSeated() { // it has been left meanwhile
		return nil
	}
	return m.reseat(ctx, why, joins)
}

// tickInTime does a tick if one is due, in work that may outlast a lease.
func (h *redisHub) tickInTime(ctx context.Context) error {
	h.mu.Lock()
	due := time.Since(h.ticked) >= h.tickEvery()
	h.mu.Unlock()
	if !due {
		return nil
	}
	_, err := h.tick(ctx)
	return err
}

// leaveStrays leaves seats that Redis says are held here, and are not: it may
// have lost that they were left, in a crash, or have run a join very late.
func (h *redisHub) leaveStrays(ctx context.Context) error {
	var cursor uint64
	for {
		next, err := h.leaveSomeStrays(ctx, cursor)
		if err != nil || next == 0 {
			return err
		}
		cursor = next
		if err := h.tickInTime(ctx); err != nil {
			return err
		}
	}
}

// leaveSomeStrays does so from cursor on, and returns from where to go on; 0 is
// nowhere.
func (h *redisHub) leaveSomeStrays(ctx context.Context, cursor uint64) (next uint64, err error) {
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	held, next, err := h.client.SScan(ctx, "parley:seats:"+h.instance, cursor, "", lookBatch).Result()
	if err != nil {
		return 0, err
	}
	for _, entry := range held {
		id, name, _ := strings.Cut(entry, " ")
		holder, err := h.client.HGet(ctx, sessionKey(id), name+":h").Result()
		if err != nil && !errors.Is(err, redis.Nil) {
			return 0, err
		}
		if number, ok := strings.CutPrefix(holder, h.instance+":"); ok {
			h.leaveStray(id, name, holder, number)
		}
	}
	return next, nil
}

// leaveStray has a seat left unless it belongs to a connection.
func (h *redisHub) leaveStray(id, name, holder, number string) {
	n, _ := strconv.ParseUint(number, 10, 64)
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.seats[n] == nil {
		h.retryLeaveLocked(&redisSeat{hub: h, key: id, number: n, holder: holder, name: name, seated: true}, false)
	}
}

func (m *redisSeat) isSeated() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.seated && !m.left && m.out == nil
}

// hear receives this instance's notifications until ctx is done.
func (h *redisHub) hear(ctx context.Context) {
	for ctx.Err() == nil {
		channel := h.client.Subscribe(ctx, wakeChannel(h.instance))
		stop := context.AfterFunc(ctx, func() { channel.Close() })
		h.receive(ctx, channel)
		stop()
		channel.Close()
		h.setSubscribed(false)
		select {
		case <-ctx.Done():
		case <-time.After(retryRedis):
		}
	}
}

func (h *redisHub) setSubscribed(yes bool) {
	h.subscribed.Store(yes)
	h.metrics.setSubscribed(yes)
}

// receive passes on what is published until the subscription fails. A
// connection that is silent is asked whether it lives.
func (h *redisHub) receive(ctx context.Context, channel *redis.PubSub) {
	asked := false
	for {
		message, err := channel.ReceiveTimeout(ctx, redisTimeout/2)
		if slow, ok := errors.AsType[net.Error](err); ok && slow.Timeout() && !asked {
			asked = true
			if channel.Ping(ctx) != nil {
				return
			}
			continue
		}
		if err != nil {
			return
		}
		asked = false
		switch m := message.(type) {
		case *redis.Subscription:
			h.setSubscribed(true)
			h.lookSoon()
		case *redis.Message:
			h.metrics.wakes.Inc()
			h.deliver(m.Payload)
		}
	}
}

var (
	errNotSubscribed = errors.New("redis: nothing can be heard from other instances")
	errNoLease       = errors.New("redis: it answers, but does not take what is written")
)

func (h *redisHub) Ready(ctx context.Context) error {
	if err := h.check(ctx); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, redisReady)
	defer cancel()
	if err := h.client.Ping(ctx).Err(); err != nil {
		return fmt.Errorf("redis: %w", err)
	}
	if !h.subscribed.Load() {
		return errNotSubscribed
	}
	if !h.leased.Load() {
		return errNoLease
	}
	return nil
}
