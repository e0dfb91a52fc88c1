package main

import (
	"container/list"
	"context"
	"hash/maphash"
	"net/http"
	"net/netip"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// limits are all bounds by address, and on the number of connections.
type limits struct {
	http     *rateLimit
	ws       *rateLimit
	hashes   *rateLimit // of passwords
	guesses  *guessBudget
	failures *slidingCount // redeems that failed, from everywhere
	conns    int           // 0 for no limit
	perIP    *quota        // of connections
	codes    *quota        // of codes, rooms, and, where any ID may be joined, sessions
}

func newLimits(cfg *config) limits {
	l := limits{
		http:     newRateLimit(cfg.httpRatePerMin),
		ws:       newRateLimit(cfg.wsRatePerMin),
		hashes:   &rateLimit{newBuckets(hashesPerMinute), newBuckets(siteShare * hashesPerMinute)},
		guesses:  newGuessBudget(cfg.redeemFails, cfg.roomTTL),
		failures: &slidingCount{window: cfg.roomTTL},
		conns:    cfg.maxConns,
		perIP:    newQuota(cfg.maxConnsPerIP),
		codes:    newQuota(cfg.maxCodesPerIP),
	}
	if l.conns == 0 {
		l.conns = openFileLimit() / 10 * 9
	}
	return l
}

// run forgets addresses that hold nothing any more, until ctx is done.
func (l limits) run(ctx context.Context) error {
	every(ctx, janitorEvery, l.codes.sweep)
	return nil
}

// A route is what calls are counted under; the label of a metric.
type route string

const (
	routeCode   route = "code"
	routeRedeem route = "redeem"
	routeICE    route = "ice_servers"
	routeRooms  route = "rooms"
	routeWS     route = "ws"
	routeSignal route = "signal"
)

// limitRate refuses a call that comes too soon.
func (s *server) limitRate(l *rateLimit, c caller, r route) error {
	ok, retryAfter := l.allow(c.network)
	if ok {
		return nil
	}
	s.metrics.rateLimited[r].Inc()
	return &apiError{status: http.StatusTooManyRequests, code: "rate_limited",
		text: "this address calls too often", retryAfter: retryAfter, closeCode: closeTooMany}
}

// maxAddresses bounds each table of addresses. An entry takes less than 700
// bytes, so that a table never grows past 32 MiB however many addresses call.
const maxAddresses = 1 << 15

// A network is what limits are counted by: an IPv4 address, an IPv6 /64, which
// is what one customer gets, or an IPv6 /48, which is what one site may have.
type network = netip.Prefix

// networkOf returns the network of addr.
func networkOf(addr netip.Addr) network {
	if addr.Is4() {
		return netip.PrefixFrom(addr, 32)
	}
	n, _ := addr.Prefix(64)
	return n
}

// siteShare is how many times what a network may do, or hold, the whole IPv6 /48
// around it may: one site can have 65,536 networks.
const siteShare = 8

// siteOf returns the /48 around an IPv6 network; ok is false for IPv4.
func siteOf(n network) (site network, ok bool) {
	if n.Addr().Is4() {
		return n, false
	}
	site, _ = n.Addr().Prefix(48)
	return site, true
}

// An addressTable keeps something for each network, at most max of them: the
// one that has been idle longest makes room for a new one.
type addressTable[V any] struct {
	// static after construction
	max  int
	make func() V

	mu sync.Mutex
	// guarded by mu, and so is every V
	entries map[network]*list.Element // of addressEntry[V]
	recent  *list.List                // the most recent first
}

type addressEntry[V any] struct {
	key   network
	value V
}

func newAddressTable[V any](max int, make_ func() V) *addressTable[V] {
	return &addressTable[V]{max: max, make: make_, entries: make(map[network]*list.Element), recent: list.New()}
}

// with calls f with the entry of key, made if need be, with mu held.
func (t *addressTable[V]) with(key network, f func(*V)) {
	t.mu.Lock()
	defer t.mu.Unlock()
	e := t.entries[key]
	if e == nil {
		if len(t.entries) >= t.max {
			oldest := t.recent.Back()
			delete(t.entries, t.recent.Remove(oldest).(*addressEntry[V]).key)
		}
		e = t.recent.PushFront(&addressEntry[V]{key, t.make()})
		t.entries[key] = e
	}
	t.recent.MoveToFront(e)
	f(&e.Value.(*addressEntry[V]).value)
}

// A rateLimit allows each network so many requests a minute, with a burst of
// one minute's worth. The nil rateLimit, and the zero network, are not limited.
type rateLimit struct {
	networks *addressTable[*rate.Limiter]
	sites    *addressTable[*rate.Limiter] // nil where each network counts by itself
}

func newRateLimit(perMinute int) *rateLimit {
	if perMinute == 0 {
		return nil
	}
	return &rateLimit{networks: newBuckets(perMinute)}
}

func newBuckets(perMinute int) *addressTable[*rate.Limiter] {
	return newAddressTable(maxAddresses, func() *rate.Limiter {
		return rate.NewLimiter(rate.Limit(float64(perMinute)/60), perMinute)
	})
}

// allow reports whether a request may pass now, and otherwise after how long
// the next one may.
func (l *rateLimit) allow(n network) (ok bool, retryAfter time.Duration) {
	if l == nil || !n.IsValid() {
		return true, 0
	}
	now := time.Now()
	retryAfter = takeToken(l.networks, n, now)
	if site, ok := siteOf(n); ok && l.sites != nil && retryAfter == 0 {
		if retryAfter = takeToken(l.sites, site, now); retryAfter > 0 {
			l.networks.with(n, func(b **rate.Limiter) { (*b).AllowN(now, -1) }) // gives it back
		}
	}
	return retryAfter == 0, retryAfter
}

// takeToken takes one of n's tokens, or returns after how long there is one.
func takeToken(buckets *addressTable[*rate.Limiter], n network, now time.Time) (retryAfter time.Duration) {
	buckets.with(n, func(b **rate.Limiter) {
		if (*b).AllowN(now, 1) {
			return
		}
		r := (*b).ReserveN(now, 1)
		retryAfter = r.DelayFrom(now)
		r.CancelAt(now)
	})
	return retryAfter
}

// A guessBudget bounds how many wrong guesses each network may make. The nil
// guessBudget bounds nothing, and the zero network is not bounded.
type guessBudget struct {
	// static after construction
	budget int // in each window
	window time.Duration
	seed   maphash.Seed

	networks *addressTable[guesser]
	sites    *addressTable[guesser]
}

// A guesser is what is known of one network's guesses.
type guesser struct {
	tokens   *rate.Limiter // a token is a wrong guess
	pending  int           // guesses that are being answered
	answered chan struct{} // closed when one of them is; nil while nobody waits
	wrong    []wrongGuess  // recent ones, which do not count again
}

type wrongGuess struct {
	hash guessHash
	at   uint32 // Unix time
}

// A guessHash stands for a guess: 64 bits, in halves that need no padding.
type guessHash [2]uint32

func (g *guessBudget) hash(guess string) guessHash {
	h := maphash.String(g.seed, guess)
	return guessHash{uint32(h >> 32), uint32(h)}
}

// maxWrong bounds the wrong guesses remembered of one network; older ones may
// count again.
const maxWrong = 32

func newGuessBudget(budget int, window time.Duration) *guessBudget {
	if budget == 0 {
		return nil
	}
	table := func(tokens int) *addressTable[guesser] {
		return newAddressTable(maxAddresses, func() guesser {
			return guesser{tokens: rate.NewLimiter(rate.Limit(float64(tokens)/window.Seconds()), tokens)}
		})
	}
	return &guessBudget{budget: budget, window: window, seed: maphash.MakeSeed(), networks: table(budget), sites: table(siteShare * budget)}
}

// begin asks whether n may guess, right or wrong. If so, the caller tells
// whether the guess was wrong by calling done; if not, retryAfter is when n may.
// A guess under way counts as if it were wrong, so that many at once do not get
// more answers than one after the other would; where only such stand in the
// way, begin waits for them, at most until ctx is done.
func (g *guessBudget) begin(ctx context.Context, n network, guess string) (done func(wrong bool) (counted bool), retryAfter time.Duration) {
	if g == nil || !n.IsValid() {
		return func(wrong bool) bool { return wrong }, 0
	}
	for {
		retryAfter, answered := g.tryBegin(n)
		if retryAfter == 0 {
			return func(wrong bool) bool { return g.done(n, guess, wrong) }, 0
		} else if answered == nil {
			return nil, retryAfter
		}
		select {
		case <-answered:
		case <-time.After(retryAfter): // the entry made room for another
		case <-ctx.Done():
			return nil, retryAfter
		}
	}
}

// tryBegin begins a guess of n, or says after how long it may. Where only
// guesses under way stand before it, answered is closed when one is answered.
func (g *guessBudget) tryBegin(n network) (retryAfter time.Duration, answered <-chan struct{}) {
	now := time.Now()
	g.networks.with(n, func(e *guesser) { retryAfter, answered = e.begin(now) })
	if site, ok := siteOf(n); ok && retryAfter == 0 {
		g.sites.with(site, func(e *guesser) { retryAfter, answered = e.begin(now) })
		if retryAfter > 0 {
			g.networks.with(n, func(e *guesser) { e.end(false, now) })
		}
	}
	return retryAfter, answered
}

// done ends a guess of n and reports whether it counts.
func (g *guessBudget) done(n network, guess string, wrong bool) (counts bool) {
	now := time.Now() // the answer may have taken long
	g.networks.with(n, func(e *guesser) {
		counts = wrong && e.firstTime(g.hash(guess), now.Add(-g.window).Unix(), now.Unix())
		e.end(counts, now)
	})
	if site, ok := siteOf(n); ok {
		g.sites.with(site, func(e *guesser) { e.end(counts, now) })
	}
	return counts
}

// pendingRetry is how long guesses under way may take to be answered.
const pendingRetry = time.Second

// begin begins a guess, unless the tokens are used up, or may be by guesses
// under way: then answered is closed when one of those is answered.
func (e *guesser) begin(now time.Time) (retryAfter time.Duration, answered <-chan struct{}) {
	tokens := e.tokens.TokensAt(now)
	if missing := float64(e.pending+1) - tokens; missing > 0 {
		if tokens >= 1 {
			if e.answered == nil {
				e.answered = make(chan struct{})
			}
			return pendingRetry, e.answered
		}
		// Less than a nanosecond's worth is nothing, to the limiter as well.
		if wait := time.Duration(missing / float64(e.tokens.Limit()) * float64(time.Second)); wait > 0 {
			return wait, nil
		}
	}
	e.pending++
	return 0, nil
}

// end ends a guess; a wrong one costs a token.
func (e *guesser) end(counts bool, now time.Time) {
	e.pending = max(e.pending-1, 0) // the entry may have made room and be new
	if e.answered != nil {
		close(e.answered)
		e.answered = nil
	}
	if counts {
		e.tokens.AllowN(now, 1)
	}
}

// firstTime reports whether the wrong guess is not one of those since, and
// remembers it.
func (e *guesser) firstTime(hash guessHash, since, now int64) bool {
	if e.remembers(hash, since) {
		return false
	}
	if len(e.wrong) == maxWrong {
		e.wrong = slices.Delete(e.wrong, 0, 1)
	}
	e.wrong = append(e.wrong, wrongGuess{hash, uint32(now)})
	return true
}

// remembers reports whether the guess was wrong since then, and forgets those
// that were before.
func (e *guesser) remembers(hash guessHash, since int64) bool {
	e.wrong = slices.DeleteFunc(e.wrong, func(w wrongGuess) bool { return int64(w.at) < since })
	return slices.ContainsFunc(e.wrong, func(w wrongGuess) bool { return w.hash == hash })
}

// knownWrong reports whether n has made this wrong guess not long ago.
func (g *guessBudget) knownWrong(n network, guess string) (known bool) {
	if g == nil || !n.IsValid() {
		return false
	}
	since := time.Now().Add(-g.window).Unix()
	g.networks.with(n, func(e *guesser) { known = e.remembers(g.hash(guess), since) })
	return known
}

// left returns how many wrong guesses n has left now; -1 is any number.
func (g *guessBudget) left(n network) int {
	if g == nil || !n.IsValid() {
		return -1
	}
	left := 0
	g.networks.with(n, func(e *guesser) { left = int(e.tokens.Tokens()) - e.pending })
	if site, ok := siteOf(n); ok {
		g.sites.with(site, func(e *guesser) { left = min(left, int(e.tokens.Tokens())-e.pending) })
	}
	return max(left, 0)
}

// A slidingCount counts events within a window that slides: those of the
// current window, and of the one before in proportion to what it overlaps.
type slidingCount struct {
	// static after construction
	window time.Duration

	mu sync.Mutex
	// guarded by mu
	begin            time.Time // of the current window
	current, earlier int
}

func (c *slidingCount) add(n int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.slide(time.Now())
	c.current += n
}

// count returns about how many events there were within the last window.
func (c *slidingCount) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	c.slide(now)
	overlap := 1 - now.Sub(c.begin).Seconds()/c.window.Seconds()
	return c.current + int(float64(c.earlier)*overlap)
}

// slide begins a new window when the current one is over. The caller holds mu.
func (c *slidingCount) slide(now time.Time) {
	switch past := now.Sub(c.begin); {
	case past >= 2*c.window:
		c.begin, c.current, c.earlier = now, 0, 0
	case past >= c.window:
		c.begin, c.earlier, c.current = c.begin.Add(c.window), c.current, 0
	}
}

// A quota bounds what each network holds at a time: connections, or codes and
// sessions. The IPv6 /48 around a network may hold siteShare times as much. A
// limit of 0 bounds nothing. Entries go when nothing is held, so that the table
// is no larger than twice what it counts.
type quota struct {
	// static after construction
	limit int

	mu sync.Mutex
	// guarded by mu
	held map[network]*holding
}

// A holding is what one network or site holds: some until they are given back,
// some until a time.
type holding struct {
	open    int
	expires []time.Time // sorted
}

func newQuota(limit int) *quota { return &quota{limit: limit, held: make(map[network]*holding)} }

// take takes one, to be given back, or says when a next one may be free: 0 when
// that is not known.
func (q *quota) take(n network) (ok bool, retryAfter time.Duration) {
	return q.add(n, func(h *holding) { h.open++ })
}

// takeUntil takes one until expires.
func (q *quota) takeUntil(n network, expires time.Time) (ok bool, retryAfter time.Duration) {
	return q.add(n, func(h *holding) {
		i, _ := slices.BinarySearchFunc(h.expires, expires, time.Time.Compare)
		h.expires = slices.Insert(h.expires, i, expires)
	})
}

func (q *quota) add(n network, one func(*holding)) (ok bool, retryAfter time.Duration) {
	if q.limit == 0 || !n.IsValid() {
		return true, 0
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	for _, b := range q.bounds(n) {
		h := q.held[b.key]
		if h == nil {
			continue
		}
		h.expire(now)
		if h.open+len(h.expires) >= b.limit {
			if len(h.expires) > 0 {
				retryAfter = h.expires[0].Sub(now)
			}
			return false, retryAfter
		}
	}
	for _, b := range q.bounds(n) {
		if b.limit == 0 {
			continue
		}
		h := q.held[b.key]
		if h == nil {
			h = new(holding)
			q.held[b.key] = h
		}
		one(h)
	}
	return true, 0
}

// A quotaBound is what a network counts to: itself or its site.
type quotaBound struct {
	key   network
	limit int // 0 for none such
}

func (q *quota) bounds(n network) [2]quotaBound {
	bounds := [2]quotaBound{{n, q.limit}}
	if site, ok := siteOf(n); ok {
		bounds[1] = quotaBound{site, siteShare * q.limit}
	}
	return bounds
}

// give gives back what take took.
func (q *quota) give(n network) {
	q.remove(n, func(h *holding) { h.open-- })
}

// giveEarly gives back what takeUntil took.
func (q *quota) giveEarly(n network, expires time.Time) {
	q.remove(n, func(h *holding) {
		if i, found := slices.BinarySearchFunc(h.expires, expires, time.Time.Compare); found {
			h.expires = slices.Delete(h.expires, i, i+1)
		}
	})
}

func (q *quota) remove(n network, one func(*holding)) {
	if q.limit == 0 || !n.IsValid() {
		return
	}
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.held[n] == nil {
		return
	}
	for _, b := range q.bounds(n) {
		if b.limit == 0 {
			continue
		}
		h := q.held[b.key]
		one(h)
		h.expire(time.Now())
		q.forget(b.key, h)
	}
}

// sweep forgets networks that hold nothing any more.
func (q *quota) sweep() {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	for n, h := range q.held {
		h.expire(now)
		q.forget(n, h)
	}
}

// forget drops h if it is empty. The caller holds mu.
func (q *quota) forget(n network, h *holding) {
	if h.open == 0 && len(h.expires) == 0 {
		delete(q.held, n)
	}
}

func (h *holding) expire(now time.Time) {
	past := 0
	for past < len(h.expires) && !now.Before(h.expires[past]) {
		past++
	}
	h.expires = slices.Delete(h.expires, 0, past)
}
