package main

import (
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// A load is one way to put load on a server.
type load struct {
	name, what string
	run        func(*bench) result
}

func loads() []load {
	return []load{
		{"idle", "-conns connections that do nothing for -hold: memory of each, and server CPU of each in this time", (*bench).idle},
		{"relay", "-pairs pairs that throw one frame to and fro: server CPU of a relayed frame", (*bench).relay},
		{"latency", "the same pairs at -rate frames a second in all: how long one relay takes", (*bench).latency},
		{"burst", "one side of 8 pairs sends as fast as TCP takes it", (*bench).burst},
		{"pairing", "whole pairings by -workers at a time: mint, redeem, join, offer, answer, 4 candidates each way, leave", (*bench).pairing},
		{"mint", "codes minted and redeemed by -workers at a time", (*bench).mint},
		{"slow", "a reader that stops reading, while 20 pairs go on at -rate / 2: what they notice of it", (*bench).slow},
		{"rooms", "rooms of -members in which one speaks to all others", (*bench).rooms},
	}
}

// options say how much load.
type options struct {
	duration time.Duration // of the measurement
	hold     time.Duration // of idle connections
	quiet    time.Duration // without any frame, after which those that are missing are lost
	conns    int           // that are idle
	pairs    int           // that relay
	bursting int           // pairs in which one side floods
	workers  int           // who set up, pair and mint at a time
	members  int           // of a room
	rate     int           // frames a second, of all pairs together
	size     int           // bytes of a frame
	bytes    int64         // most bytes that one load may flood
	rounds   int           // of compare and growth
}

// warmup is how long a load runs before it is measured.
func (o *options) warmup() time.Duration { return min(time.Second, o.duration/2) }

// bounds of what may be asked for.
const (
	maxConns    = 200_000
	maxPairs    = 10_000
	maxWorkers  = 256
	maxRate     = 200_000
	maxSize     = 64 << 10 // parley lets 256 KiB wait
	minSize     = 100      // less than this has no room for a candidate and a number
	maxDuration = 10 * time.Minute
	maxBytes    = 1 << 40
	maxRounds   = 100
)

func defaults() options {
	return options{
		duration: 5 * time.Second, hold: 8 * time.Second, quiet: time.Second,
		conns: 10_000, pairs: 100, bursting: 8, workers: 16, members: 16,
		rate: 5_000, size: 500, bytes: 1 << 30, rounds: 3,
	}
}

// A bench is a server and the load to put on it.
type bench struct {
	options
	target *target
	meter  meter
}

const (
	slowPairs = 20   // who go on beside the one that does not read
	roomCount = 8    // rooms that speak at a time
	sdpBytes  = 2000 // of an offer or answer
	giveUp    = 20   // failures after which a load ends
)

// connect sets up n groups of connections, several at a time, and hands each to
// add on this goroutine.
func (b *bench) connect(n int, open func(*target) ([]*conn, error), add func([]*conn) error) (failed int, first error) {
	type opened struct {
		group []*conn
		err   error
	}
	var begun atomic.Int64
	results := make(chan opened, b.workers)
	var workers sync.WaitGroup
	for range min(b.workers, n) {
		workers.Go(func() {
			for begun.Add(1) <= int64(n) {
				group, err := open(b.target)
				results <- opened{group, err}
			}
		})
	}
	go func() {
		workers.Wait()
		close(results)
	}()
	for r := range results {
		if r.err == nil {
			r.err = add(r.group)
		}
		if r.err == nil {
			continue
		}
		if first == nil {
			first = r.err
		}
		if failed++; failed == giveUp {
			begun.Store(int64(n)) // no more of them
		}
	}
	return failed, first
}

// engineWithPairs sets pairs up. In r it notes how that went. There is no engine
// if there are no pairs.
func (b *bench) engineWithPairs(n int, r *result) *engine {
	e, err := newEngine()
	if err != nil {
		r.fail(err)
		return nil
	}
	e.most = b.bytes
	begin := time.Now()
	r.Failed, err = b.connect(n, openPair, func(group []*conn) error { return b.addPair(e, group) })
	r.Connections = len(e.peers)
	r.ConnectsPerSecond = perSecond(uint64(len(e.peers)), time.Since(begin))
	if r.fail(err); r.Connections == 0 {
		e.close()
		return nil
	}
	return e
}

func openPair(t *target) ([]*conn, error) {
	x, y, err := t.pair(t, false)
	return []*conn{x, y}, err
}

// openAlone opens one side of a session.
func openAlone(t *target) ([]*conn, error) {
	c, err := t.open("/ws?side=A&appID=" + uuid.NewString())
	return []*conn{c}, err
}

// addPair hands a pair to the engine. Each side sends to the other.
func (b *bench) addPair(e *engine, group []*conn) error {
	x, err := e.add(group[0])
	if err != nil {
		closeAll(group[1])
		return err
	}
	y, err := e.add(group[1])
	if err != nil {
		e.drop(x)
		return err
	}
	t := b.target
	x.sends(t.payload(group[0].to, "ice", b.size), t.exact, y)
	y.sends(t.payload(group[1].to, "ice", b.size), t.exact, x)
	return nil
}

// firstSides returns one peer of each pair.
func firstSides(e *engine) (sides []*peer) {
	for i := 0; i < len(e.peers); i += 2 {
		sides = append(sides, e.peers[i])
	}
	return sides
}

// timing has the engine count frames and what they took.
func (e *engine) timing(h *histogram) {
	e.onFrame = func(to *peer, n uint64) { h.add(time.Duration(e.now() - to.from.sentAt[n%inFlight])) }
}

func (b *bench) idle() (r result) {
	if limit := openFileLimit() - 64; b.conns > limit {
		r.fail(fmt.Errorf("-conns %d: this process may not open more than %d files (ulimit -n)", b.conns, limit))
		return r
	}
	before := b.meter.start()
	e := b.engineWithPairs(b.conns/2, &r)
	if e == nil {
		return r
	}
	defer e.close()
	holding := b.meter.start()
	e.run(b.hold)
	_, r.ServerCPU = holding.used(uint64(len(e.peers)))
	r.Seconds = b.hold.Seconds()
	r.count(e.tally())
	if grown := before.grown(); grown != nil {
		each := float64(*grown) / float64(len(e.peers))
		r.MemoryPerConnection = &each
	}
	return r
}

// relay is a closed loop: every frame is answered with the next. What it says of
// latency is only how many pairs there are, divided by the throughput.
func (b *bench) relay() result { return b.relayBeside(0) }

// relayBeside is relay with idle connections beside it, each in a session of its
// own.
func (b *bench) relayBeside(idle int) (r result) {
	e := b.engineWithPairs(b.pairs, &r)
	if e == nil {
		return r
	}
	defer e.close()
	relaying := firstSides(e)
	if idle > 0 {
		failed, err := b.connect(idle, openAlone, func(group []*conn) error {
			_, err := e.add(group[0])
			return err
		})
		r.Failed += failed
		r.fail(err)
	}
	frames, going := uint64(0), true
	e.onFrame = func(to *peer, _ uint64) {
		if frames++; going {
			e.send(to)
		}
	}
	for _, p := range relaying {
		e.send(p)
	}
	e.run(b.warmup())
	frames = 0
	s := b.meter.start()
	e.run(b.duration)
	r.spent(s, frames)
	going = false
	e.settle(b.quiet)
	r.count(e.tally())
	return r
}

// latency sends on a schedule, whether or not the server keeps up.
func (b *bench) latency() (r result) {
	e := b.engineWithPairs(b.pairs, &r)
	if e == nil {
		return r
	}
	defer e.close()
	var h histogram
	e.timing(&h)
	e.pace(b.warmup(), e.peers, b.rate)
	h = histogram{}
	s := b.meter.start()
	r.Unsent = e.pace(b.duration, e.peers, b.rate)
	r.spent(s, h.n)
	r.Latency = h.latency()
	e.settle(b.quiet)
	r.count(e.tally())
	return r
}

func (b *bench) burst() (r result) {
	e := b.engineWithPairs(b.bursting, &r)
	if e == nil {
		return r
	}
	defer e.close()
	frames := uint64(0)
	e.onFrame = func(*peer, uint64) { frames++ }
	peak := b.meter.peak()
	s := b.meter.start()
	for _, p := range firstSides(e) {
		e.setFlood(p, true)
	}
	for end := time.Now().Add(b.duration); time.Now().Before(end) && e.flooded < e.most; {
		e.poll(50 * time.Millisecond)
	}
	for _, p := range firstSides(e) {
		e.setFlood(p, false)
	}
	e.settle(b.quiet) // what is on its way belongs to it: it has been paid for
	r.spent(s, frames)
	r.MemoryPeak = peak()
	r.count(e.tally())
	return r
}

// slow has one receiver stop reading while its partner floods it. The other
// pairs go on, and new ones come.
func (b *bench) slow() (r result) {
	e := b.engineWithPairs(slowPairs+1, &r)
	if e == nil || len(e.peers) < 4 {
		return r
	}
	defer e.close()
	flooding, deaf, others := e.peers[0], e.peers[1], e.peers[2:]
	var h histogram
	e.timing(&h)
	e.pace(b.warmup(), others, b.rate/2)
	h = histogram{}
	e.pace(b.duration/2, others, b.rate/2)
	r.Slow = &slowReader{Before: h.latency()}

	h = histogram{}
	newcomers := b.watchNewcomers()
	peak := b.meter.peak()
	s := b.meter.start()
	e.setMute(deaf)
	e.setFlood(flooding, true)
	for time.Since(s.begin) < b.duration {
		r.Unsent += e.pace(100*time.Millisecond, others, b.rate/2)
		if r.Slow.CutAfter == nil && (deaf.closed || flooding.closed) {
			after := time.Since(s.begin).Seconds()
			r.Slow.CutAfter = &after
		}
	}
	e.drop(flooding)
	e.drop(deaf)
	r.spent(s, h.n)
	r.Latency = h.latency()
	if r.MemoryPeak = peak(); r.MemoryPeak != nil && s.known {
		grown := *r.MemoryPeak - s.first.resident
		r.Slow.MemoryGrown = &grown
	}
	r.Slow.Newcomers, r.Slow.NewcomersFailed, r.Slow.NewcomerSlowest = newcomers()
	r.Slow.Flooded = e.flooded
	e.settle(b.quiet)
	r.count(tallyOf(others))
	return r
}

// watchNewcomers sets up a pair now and then until the function it returns is
// called. That returns how many there were, how many could not be set up, and
// how many microseconds the slowest took.
func (b *bench) watchNewcomers() (stop func() (pairs, failed int, slowest float64)) {
	var pairs, failed int
	var slowest time.Duration
	done := make(chan struct{})
	var watching sync.WaitGroup
	watching.Go(func() {
		ticker := time.NewTicker(300 * time.Millisecond)
		defer ticker.Stop()
		for {
			begin := time.Now()
			x, y, err := b.target.pair(b.target, false)
			slowest = max(slowest, time.Since(begin))
			if pairs++; err != nil {
				failed++
			} else {
				leave(x, y)
			}
			select {
			case <-ticker.C:
			case <-done:
				return
			}
		}
	})
	return func() (int, int, float64) {
		close(done)
		watching.Wait()
		return pairs, failed, micros(slowest)
	}
}

// rooms has the first of each room send the next frame once all others have the
// last one.
func (b *bench) rooms() (r result) {
	e, err := newEngine()
	if err != nil {
		r.fail(err)
		return r
	}
	defer e.close()
	begin := time.Now()
	open := func(t *target) ([]*conn, error) { return t.room(b.members) }
	r.Failed, err = b.connect(roomCount, open, func(room []*conn) error { return b.addRoom(e, room) })
	r.Connections = len(e.peers)
	r.ConnectsPerSecond = perSecond(uint64(len(e.peers)), time.Since(begin))
	if refusedWith(err, "not_found") {
		err = errRoomsOff
	}
	if r.fail(err); r.Connections == 0 {
		return r
	}
	var h histogram
	going := true
	e.onFrame = func(to *peer, n uint64) {
		h.add(time.Duration(e.now() - to.from.sentAt[n%inFlight]))
		if going && to.from.waiting() == 0 {
			e.send(to.from)
		}
	}
	for _, p := range e.peers {
		if len(p.to) > 0 {
			e.send(p)
		}
	}
	e.run(b.warmup())
	h = histogram{}
	s := b.meter.start()
	e.run(b.duration)
	r.spent(s, h.n)
	r.Latency = h.latency()
	going = false
	e.settle(b.quiet)
	r.count(e.tally())
	return r
}

// addRoom hands a room to the engine. Its first member sends to all others.
func (b *bench) addRoom(e *engine, room []*conn) error {
	var members []*peer
	for i, c := range room {
		p, err := e.add(c)
		if err != nil {
			closeAll(room[i+1:]...)
			return err
		}
		members = append(members, p)
	}
	members[0].sends(payload(b.size, roomMessage), false, members[1:]...)
	return nil
}
