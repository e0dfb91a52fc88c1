package main

import (
	"container/heap"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"mime"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/google/uuid"
)

// mintCode is POST /rendezvous/code.
func (s *server) mintCode(w http.ResponseWriter, r *http.Request, c caller) error {
	if s.cfg.mintAuth == "jwt" {
		if _, err := s.authenticate(r); err != nil {
			return err
		}
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return err
	}
	ttl, err := readTTL(body, s.cfg.roomTTL)
	if err != nil {
		return err
	}
	if s.draining.Load() {
		return errDraining
	}
	until := time.Now().Add(ttl)
	if ok, retryAfter := s.limits.codes.takeUntil(c.network, until); !ok {
		return &apiError{status: http.StatusTooManyRequests, code: "too_many_codes",
			text: "this address has as many unexpired codes as it may", retryAfter: retryAfter}
	}
	id, code, expires, err := s.mint(r.Context(), ttl)
	if err != nil {
		s.limits.codes.giveEarly(c.network, until)
		return err
	}
	s.metrics.codesMinted.Inc()
	s.writeJSON(w, http.StatusOK, struct {
		Code      string `json:"code"`
		AppID     string `json:"appID"`
		ExpiresAt string `json:"expiresAt"`
		iceServers
	}{code, id.String(), timestamp(expires), s.ice.servers(id, c.network, c.host)})
	return nil
}

// mint opens a session and mints its code, or does neither.
func (s *server) mint(ctx context.Context, ttl time.Duration) (id sessionID, code string, expires time.Time, err error) {
	id = uuid.New()
	if err := s.hub.Open(ctx, meta{ID: id, Expires: time.Now().Add(ttl)}); err != nil {
		return id, "", expires, err
	}
	if code, expires, err = s.codes.Mint(ctx, id, ttl); err != nil {
		s.hub.End(context.WithoutCancel(ctx), id, errGone)
	}
	return id, code, expires, err
}

// readTTL reads how long the caller wants a code or a room to live, at most
// longest, which is also the default.
func readTTL(o object, longest time.Duration) (time.Duration, error) {
	raw := o.get("ttl")
	if raw == nil || string(raw) == "null" {
		return longest, nil
	}
	// Of JSON values only numbers parse; one too large for a float is infinite.
	seconds, err := strconv.ParseFloat(string(raw), 64)
	if err != nil && !errors.Is(err, strconv.ErrRange) || seconds <= 0 {
		return 0, badRequest("bad_ttl", "ttl must be a positive number of seconds")
	}
	if seconds >= longest.Seconds() {
		return longest, nil
	}
	return max(time.Duration(seconds*float64(time.Second)), time.Millisecond), nil
}

// redeemCode is POST /rendezvous/redeem.
func (s *server) redeemCode(w http.ResponseWriter, r *http.Request, c caller) error {
	code, err := s.redeemRequest(w, r)
	if err != nil {
		s.metrics.redeems[redeemBad].Inc()
		return err
	}
	if s.draining.Load() {
		return errDraining
	}
	done, err := s.beginGuess(r.Context(), c, code)
	if err != nil {
		s.metrics.redeems[redeemThrottled].Inc()
		return err
	}
	id, expires, err := s.codes.Redeem(r.Context(), code)
	wrong := errors.Is(err, errCodeGone) || errors.Is(err, errCodeUsed)
	if done(wrong) {
		s.limits.failures.add(1)
	}
	if wrong {
		s.metrics.redeems[redeemGone].Inc()
	}
	if errors.Is(err, errCodeUsed) {
		// Whoever minted it should know that two people hold the code.
		if err := s.hub.Tell(r.Context(), id, event{kind: eventContested}); err != nil && !errors.Is(err, errGone) {
			s.log.Warn("contested code not told", "error", err)
		}
	}
	if err != nil {
		return err
	}
	s.metrics.redeems[redeemOK].Inc()
	s.writeJSON(w, http.StatusOK, struct {
		AppID     string `json:"appID"`
		ExpiresAt string `json:"expiresAt"`
		iceServers
	}{id.String(), timestamp(expires), s.ice.servers(id, c.network, c.host)})
	return nil
}

// beginGuess asks whether the caller may guess, as guessBudget.begin does: a
// code, a room's code or its password.
func (s *server) beginGuess(ctx context.Context, c caller, guess string) (done func(wrong bool) (counted bool), err error) {
	done, retryAfter := s.limits.guesses.begin(ctx, c.network, guess)
	if done == nil {
		s.metrics.throttled.Inc()
		return nil, &apiError{status: http.StatusTooManyRequests, code: "too_many_attempts",
			text: "this address has guessed wrong too often", retryAfter: retryAfter, closeCode: closeTooMany}
	}
	return done, nil
}

// redeemRequest reads the code that a caller wants to redeem.
func (s *server) redeemRequest(w http.ResponseWriter, r *http.Request) (code string, err error) {
	mediaType, _, err := mime.ParseMediaType(r.Header.Get("Content-Type"))
	if err != nil || mediaType != "application/json" && !strings.HasSuffix(mediaType, "+json") {
		return "", &apiError{status: http.StatusUnsupportedMediaType, code: "unsupported_media_type", text: "the Content-Type must be application/json"}
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return "", err
	}
	if body == nil {
		return "", badRequest("bad_json", "the body must be a JSON object")
	}
	text, ok := unquote(body.get("code"))
	if code = string(text); !ok || !validCode(code) {
		return "", badRequest("bad_code", "code must be a string of 4 to 9 digits")
	}
	return code, nil
}

// timestamp formats a time as answers give it: RFC 3339, UTC.
func timestamp(t time.Time) string { return t.UTC().Format("2006-01-02T15:04:05.000Z") }

// codes are the short numbers people type, each of which names a session until
// it expires and can be redeemed once.
type codes interface {
	// Mint makes a new code for the session, which lives for ttl. It is uniform
	// among the free codes of its length and not minted again before it has
	// expired. Error: *exhaustedError.
	Mint(ctx context.Context, session sessionID, ttl time.Duration) (code string, expires time.Time, err error)
	// Redeem uses up a code: of any number of calls for one code at most one
	// succeeds. Errors: errCodeGone, and errCodeUsed with the session when the
	// code was redeemed before and has not expired.
	Redeem(ctx context.Context, code string) (session sessionID, expires time.Time, err error)
	// Run reclaims expired codes until ctx is done.
	Run(ctx context.Context) error
}

var (
	errCodeGone = errors.New("the code is unknown or has expired")
	errCodeUsed = errors.New("the code has been redeemed")
)

// An exhaustedError says that every code is taken.
type exhaustedError struct {
	retryAfter time.Duration // until the next code frees
}

func (e *exhaustedError) Error() string { return "every code is taken" }

// Codes have between minCodeDigits and maxCodeDigits digits.
const (
	minCodeDigits = 4
	maxCodeDigits = 9
)

// validCode reports whether code is 4 to 9 ASCII digits.
func validCode(code string) bool {
	if len(code) < minCodeDigits || len(code) > maxCodeDigits {
		return false
	}
	for _, c := range []byte(code) {
		if c < '0' || c > '9' {
			return false
		}
	}
	return true
}

const (
	// codeBlock is how many codes share a count of those taken.
	codeBlock = 1000
	// mintTries are random draws before a free code is looked for by counting,
	// which takes as long as hundreds of them: with 97 in a hundred taken, all of
	// them fail once in fifty times.
	mintTries = 128
	// mintDraws are those for which random bytes are read together.
	mintDraws = 4
	// reclaimBatch bounds how many expired codes one hold of the lock removes.
	reclaimBatch = 256
)

// codeOptions are what a code table is told of the configuration.
type codeOptions struct {
	digits, maxDigits int
	// failures returns how many redeems have failed recently.
	failures func() int
	// grown is called, without any lock, when new codes change their length.
	grown func(digits int)
}

// A codeTable is the codes of one process, in memory. What it keeps of a code
// has no pointers, so that the garbage collector passes it by.
type codeTable struct {
	// static after construction
	codeOptions
	start time.Time // expiries are counted from it; told, they are of the clock of now

	mu sync.Mutex
	// guarded by mu
	spaces   map[int]*codeSpace // by number of digits
	entries  map[codeKey]codeEntry
	byExpiry codeQueue
	current  int // digits of the code minted last
}

// A codeSpace is all codes of one length.
type codeSpace struct {
	digits int
	size   uint32
	taken  uint32
	blocks []uint16 // taken codes in each codeBlock of codes
}

// A codeKey is a code with a 1 before it, so that 0042 and 00042 differ.
type codeKey uint32

type codeEntry struct {
	session sessionID
	expires time.Duration // since start
	used    bool
}

var _ codes = (*codeTable)(nil)

func newCodeTable(o codeOptions) *codeTable {
	t := &codeTable{
		codeOptions: o,
		start:       time.Now(),
		spaces:      make(map[int]*codeSpace),
		entries:     make(map[codeKey]codeEntry),
		current:     o.digits,
	}
	for d, size := minCodeDigits, uint32(10_000); d <= o.maxDigits; d, size = d+1, size*10 {
		if d >= o.digits {
			t.spaces[d] = &codeSpace{digits: d, size: size, blocks: make([]uint16, size/codeBlock)}
		}
	}
	return t
}

func (t *codeTable) Mint(_ context.Context, session sessionID, ttl time.Duration) (string, time.Time, error) {
	now := time.Since(t.start)
	expires := now + ttl
	failures := t.failures()
	t.mu.Lock()
	t.reclaim(now)
	space := t.space(failures)
	if space == nil {
		wait := t.byExpiry[0].expires - now
		t.mu.Unlock()
		return "", time.Time{}, &exhaustedError{retryAfter: wait}
	}
	grown := space.digits != t.current
	t.current = space.digits
	n := t.draw(space)
	key := space.key(n)
	t.entries[key] = codeEntry{session: session, expires: expires}
	space.count(n, 1)
	heap.Push(&t.byExpiry, codeExpiry{expires, key})
	t.mu.Unlock()
	if grown {
		t.grown(space.digits)
	}
	return space.code(n), time.Now().Add(ttl), nil
}

// space returns the space to mint from: the first of which less than a
// hundredth is taken, and of which fewer than a tenth has been guessed at, else
// the largest that is not full, or nil. The caller holds mu.
func (t *codeTable) space(failures int) *codeSpace {
	for d := t.digits; d < t.maxDigits; d++ {
		if s := t.spaces[d]; s.taken < s.size/100 && failures <= int(s.size/10) {
			return s
		}
	}
	for d := t.maxDigits; d >= t.digits; d-- {
		if s := t.spaces[d]; s.taken < s.size {
			return s
		}
	}
	return nil
}

// draw returns a code of s that is not taken, each with the same chance. The
// caller holds mu and knows that there is one.
func (t *codeTable) draw(s *codeSpace) uint32 {
	var random [4 * mintDraws]byte
	for range mintTries / mintDraws {
		rand.Read(random[:]) // never fails
		for i := range mintDraws {
			n, ok := uniform(binary.LittleEndian.Uint32(random[4*i:]), s.size)
			if _, taken := t.entries[s.key(n)]; ok && !taken {
				return n
			}
		}
	}
	return t.pick(s, uniformRandom(s.size-s.taken))
}

// pick returns the free code of s that has nth free codes before it.
func (t *codeTable) pick(s *codeSpace, nth uint32) uint32 {
	block := 0
	for free := codeBlock - uint32(s.blocks[0]); nth >= free; free = codeBlock - uint32(s.blocks[block]) {
		nth -= free
		block++
	}
	for n := uint32(block * codeBlock); ; n++ {
		if _, taken := t.entries[s.key(n)]; taken {
			continue
		}
		if nth == 0 {
			return n
		}
		nth--
	}
}

// uniform turns 32 random bits into a number below size without bias, or
// reports that other bits are needed (Lemire, "Fast Random Integer Generation
// in an Interval", 2019).
func uniform(bits, size uint32) (n uint32, ok bool) {
	product := uint64(bits) * uint64(size)
	return uint32(product >> 32), uint32(product) >= -size%size
}

func uniformRandom(size uint32) uint32 {
	for {
		var b [4]byte
		rand.Read(b[:]) // never fails
		if n, ok := uniform(binary.LittleEndian.Uint32(b[:]), size); ok {
			return n
		}
	}
}

func (s *codeSpace) key(n uint32) codeKey { return codeKey(s.size + n) }

// code returns a code as people type it.
func (s *codeSpace) code(n uint32) string { return strconv.Itoa(int(s.key(n)))[1:] }

// count notes that the code n is taken (1) or free (-1).
func (s *codeSpace) count(n uint32, change int) {
	s.taken += uint32(change)
	s.blocks[n/codeBlock] += uint16(change)
}

func (t *codeTable) Redeem(_ context.Context, code string) (sessionID, time.Time, error) {
	n, err := strconv.ParseUint("1"+code, 10, 32)
	if err != nil || !validCode(code) {
		return sessionID{}, time.Time{}, errCodeGone
	}
	key, now := codeKey(n), time.Since(t.start)
	t.mu.Lock()
	defer t.mu.Unlock()
	e, ok := t.entries[key]
	switch {
	case !ok || now >= e.expires:
		return sessionID{}, time.Time{}, errCodeGone
	case e.used:
		return e.session, time.Now().Add(e.expires - now), errCodeUsed
	}
	e.used = true
	t.entries[key] = e
	return e.session, time.Now().Add(e.expires - now), nil
}

func (t *codeTable) Run(ctx context.Context) error {
	every(ctx, janitorEvery, t.sweep)
	return nil
}

// sweep reclaims all expired codes, a batch for each hold of the lock.
func (t *codeTable) sweep() {
	for more := true; more; {
		t.mu.Lock()
		more = t.reclaim(time.Since(t.start))
		t.mu.Unlock()
	}
}

// reclaim frees a batch of the codes that have expired now, which is counted from
// start, and reports whether there may be more. The caller holds mu.
func (t *codeTable) reclaim(now time.Duration) (more bool) {
	for range reclaimBatch {
		if len(t.byExpiry) == 0 || now < t.byExpiry[0].expires {
			return false
		}
		key := heap.Pop(&t.byExpiry).(codeExpiry).key
		delete(t.entries, key)
		for _, s := range t.spaces {
			if n := uint32(key) - s.size; n < s.size {
				s.count(n, -1)
			}
		}
	}
	return true
}

// stats returns the number of codes that have not been reclaimed and the
// length of new ones.
func (t *codeTable) stats() (active, digits int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.entries), t.current
}

// A codeQueue is a heap of codes, the next to expire first.
type codeQueue []codeExpiry

type codeExpiry struct {
	expires time.Duration // since the table's start
	key     codeKey
}

func (q codeQueue) Len() int           { return len(q) }
func (q codeQueue) Less(i, j int) bool { return q[i].expires < q[j].expires }
func (q codeQueue) Swap(i, j int)      { q[i], q[j] = q[j], q[i] }
func (q *codeQueue) Push(x any)        { *q = append(*q, x.(codeExpiry)) }
func (q *codeQueue) Pop() any {
	last := len(*q) - 1
	x := (*q)[last]
	*q = (*q)[:last]
	return x
}
