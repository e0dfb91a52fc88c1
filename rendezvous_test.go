package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"math"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"pgregory.net/rapid"
)

// newTestTable returns a code table that nobody guesses at.
func newTestTable(digits, maxDigits int) *codeTable {
	return newCodeTable(codeOptions{
		digits: digits, maxDigits: maxDigits,
		failures: func() int { return 0 },
		grown:    func(int) {},
	})
}

// fillCodes takes n codes of a length, evenly spread, without minting them.
func fillCodes(t *codeTable, digits, n int, expires time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.spaces[digits]
	for i := range n {
		code := uint32(uint64(i) * uint64(s.size) / uint64(n))
		t.entries[s.key(code)] = codeEntry{expires: expires.Sub(t.start)}
		t.byExpiry.Push(codeExpiry{expires.Sub(t.start), s.key(code)}) // a heap, where all are equal
		s.count(code, 1)
	}
}

// mustMint mints a code for a session.
func mustMint(t testing.TB, table *codeTable, session sessionID, ttl time.Duration) string {
	t.Helper()
	code, expires, err := table.Mint(ctx, session, ttl)
	if err != nil {
		t.Fatal("mint:", err)
	}
	if left := time.Until(expires); left != ttl { // in a bubble, to the nanosecond
		t.Fatalf("code %s expires in %v, want %v", code, left, ttl)
	}
	return code
}

func wantExhausted(t testing.TB, table *codeTable, retryAfter time.Duration) {
	t.Helper()
	code, _, err := table.Mint(ctx, uuid.New(), time.Minute)
	if e, ok := errors.AsType[*exhaustedError](err); !ok || e.retryAfter != retryAfter {
		t.Errorf("mint: %q, %+v; want exhausted for %v", code, err, retryAfter)
	}
}

func wantRedeem(t testing.TB, table *codeTable, code string, session sessionID, want error) {
	t.Helper()
	if id, _, err := table.Redeem(ctx, code); id != session || !errors.Is(err, want) {
		t.Errorf("redeem of %q: %s, %v; want %s, %v", code, id, err, session, want)
	}
}

// testTable runs a test of a table and checks its invariants afterwards.
func testTable(t *testing.T, digits, maxDigits int, test func(t *testing.T, table *codeTable)) {
	synctest.Test(t, func(t *testing.T) {
		table := newTestTable(digits, maxDigits)
		test(t, table)
		if err := table.invariants(); err != nil {
			t.Error("invariants:", err)
		}
	})
}

func TestCodesWholeSpace(t *testing.T) {
	testTable(t, 4, 4, func(t *testing.T, table *codeTable) {
		const ttl = time.Minute
		seen := make(map[string]bool)
		for i := range 10_000 {
			if i == 5_000 {
				time.Sleep(10 * time.Second)
			}
			code := mustMint(t, table, uuid.New(), ttl)
			if !validCode(code) || len(code) != 4 || seen[code] {
				t.Fatalf("code %d is %q", i, code)
			}
			seen[code] = true
		}
		for n := range 10_000 { // leading zeros and all
			if !seen[fmt.Sprintf("%04d", n)] {
				t.Errorf("%04d was not minted", n)
			}
		}
		wantExhausted(t, table, ttl-10*time.Second)
		time.Sleep(ttl - 10*time.Second - time.Nanosecond)
		wantExhausted(t, table, time.Nanosecond)

		// Nobody but Mint reclaims here. Half have expired, and all of those are
		// there again: at once, not some at a time.
		time.Sleep(time.Nanosecond)
		for range 5_000 {
			mustMint(t, table, uuid.New(), time.Hour)
		}
		wantExhausted(t, table, 10*time.Second)
	})
}

func TestCodesRedeem(t *testing.T) {
	testTable(t, 4, 5, func(t *testing.T, table *codeTable) {
		session := uuid.New()
		code := mustMint(t, table, session, time.Minute)
		wantRedeem(t, table, code, session, nil)
		wantRedeem(t, table, code, session, errCodeUsed)
		time.Sleep(time.Minute - time.Nanosecond)
		wantRedeem(t, table, code, session, errCodeUsed)
		late := mustMint(t, table, session, time.Minute)
		time.Sleep(time.Nanosecond)
		wantRedeem(t, table, code, sessionID{}, errCodeGone)

		time.Sleep(time.Minute - 2*time.Nanosecond)
		_, expires, err := table.Redeem(ctx, late) // at the last moment
		if left := time.Until(expires); err != nil || left != time.Nanosecond {
			t.Errorf("redeemed %v before it expires: %v", left, err)
		}
		code = mustMint(t, table, session, time.Minute)
		time.Sleep(time.Minute)
		wantRedeem(t, table, code, sessionID{}, errCodeGone)

		code = mustMint(t, table, session, time.Minute)
		for _, other := range []string{
			"", "0", "0" + code, code + "0", code[:3], "+" + code[1:], " " + code, code + "\n", "-" + code,
			"1234567890", "99999999999999999999", "abcd", "１２３４", "12_34", "0x12",
		} {
			wantRedeem(t, table, other, sessionID{}, errCodeGone)
		}
		wantRedeem(t, table, code, session, nil)
	})
}

// A code of one length is not the same number with another.
func TestCodesLeadingZeros(t *testing.T) {
	testTable(t, 4, 6, func(t *testing.T, table *codeTable) {
		for digits := 4; digits <= 6; digits++ {
			s := table.spaces[digits]
			expires := time.Since(table.start) + time.Minute
			table.entries[s.key(42)] = codeEntry{session: sessionID{byte(digits)}, expires: expires}
			table.byExpiry.Push(codeExpiry{expires, s.key(42)})
			s.count(42, 1)
		}
		for digits := 4; digits <= 6; digits++ {
			code := fmt.Sprintf("%0*d", digits, 42)
			wantRedeem(t, table, code, sessionID{byte(digits)}, nil)
			wantRedeem(t, table, code, sessionID{byte(digits)}, errCodeUsed)
		}
		wantRedeem(t, table, "0000042", sessionID{}, errCodeGone)
		wantRedeem(t, table, "42", sessionID{}, errCodeGone)
	})
}

// A redeemed code stays taken until it expires.
func TestCodesUsedStayTaken(t *testing.T) {
	testTable(t, 4, 4, func(t *testing.T, table *codeTable) {
		fillCodes(table, 4, 9_999, time.Now().Add(time.Hour))
		session := uuid.New()
		code := mustMint(t, table, session, time.Minute)
		wantRedeem(t, table, code, session, nil)
		wantExhausted(t, table, time.Minute)
		time.Sleep(time.Minute - time.Nanosecond)
		wantExhausted(t, table, time.Nanosecond)
		time.Sleep(time.Nanosecond)
		next := uuid.New()
		if again := mustMint(t, table, next, time.Minute); again != code {
			t.Errorf("minted %s, the only free one is %s", again, code)
		}
		wantRedeem(t, table, code, next, nil)
	})
}

// Without anyone minting, the janitor reclaims.
func TestCodesJanitor(t *testing.T) {
	testTable(t, 6, 6, func(t *testing.T, table *codeTable) {
		go table.Run(t.Context())
		const n = 10 * reclaimBatch
		for range n {
			mustMint(t, table, uuid.New(), time.Minute)
		}
		mustMint(t, table, uuid.New(), time.Hour)
		time.Sleep(time.Minute - time.Nanosecond)
		if active, _ := table.stats(); active != n+1 {
			t.Errorf("%d codes a moment before %d expire", active, n)
		}
		time.Sleep(15 * time.Second)
		synctest.Wait()
		if active, _ := table.stats(); active != 1 {
			t.Errorf("%d codes left 15 s after all but one have expired", active)
		}
	})
}

// The number of random words that give a code must be the same for each.
func TestCodesUniformExactly(t *testing.T) {
	for _, size := range []uint32{10_000, 100_000, 1_000_000, 1_000_000_000} {
		want := uint64(1<<32) / uint64(size)
		codes := []uint32{0, 1, size / 2, size - 2, size - 1}
		for range 5 {
			codes = append(codes, rand.Uint32N(size))
		}
		for _, code := range codes {
			// The words whose product with size falls to this code.
			first := (uint64(code)<<32 + uint64(size) - 1) / uint64(size)
			end := (uint64(code+1)<<32 + uint64(size) - 1) / uint64(size)
			n := uint64(0)
			for word := max(first, 1) - 1; word <= min(end, math.MaxUint32); word++ {
				if got, ok := uniform(uint32(word), size); ok && got == code {
					n++
				}
			}
			if n != want {
				t.Errorf("%d of %d: %d words, want %d", code, size, n, want)
			}
		}
	}
}

// chiSquare fails if so uneven counts come about by chance less than once in
// about 10^15 runs.
func chiSquare(t *testing.T, counts []int) {
	t.Helper()
	total := 0
	for _, n := range counts {
		total += n
	}
	expected := float64(total) / float64(len(counts))
	sum := 0.0
	for _, n := range counts {
		sum += (float64(n) - expected) * (float64(n) - expected) / expected
	}
	free := float64(len(counts) - 1)
	// Wilson and Hilferty: the cube root is normal, to a good approximation.
	z := (math.Cbrt(sum/free) - (1 - 2/(9*free))) / math.Sqrt(2/(9*free))
	if math.Abs(z) > 8 {
		t.Errorf("chi-square of %d draws from %d is %.0f, %.1f standard deviations off", total, len(counts), sum, z)
	}
}

// Codes are uniform while most are free, and so by random draws.
func TestCodesUniformDraws(t *testing.T) {
	table := newTestTable(4, 4)
	counts := make([]int, 10_000)
	for range 400_000 {
		counts[table.draw(table.spaces[4])]++
	}
	chiSquare(t, counts)
}

// They are uniform among the free ones when hardly any draw finds one.
func TestCodesUniformPicks(t *testing.T) {
	table := newTestTable(4, 4)
	const free = 20
	fillCodes(table, 4, 10_000, time.Now().Add(time.Hour))
	s := table.spaces[4]
	var codes []uint32
	for _, n := range []uint32{0, 1, 2, 998, 999, 1000, 1001, 4999, 5000, 5001, 5002, 5003, 7777, 8000, 8999, 9000, 9001, 9500, 9998, 9999} {
		delete(table.entries, s.key(n))
		s.count(n, -1)
		codes = append(codes, n)
	}
	for nth, want := range codes {
		if got := table.pick(s, uint32(nth)); got != want {
			t.Errorf("the free code after %d others is %d, want %d", nth, got, want)
		}
	}
	counts := make([]int, free)
	for range 10_000 {
		i, ok := slices.BinarySearch(codes, table.draw(s))
		if !ok {
			t.Fatal("a taken code was drawn")
		}
		counts[i]++
	}
	chiSquare(t, counts)
}

// newGrowing returns a table, how many guesses it is told of, and the lengths it
// has told.
func newGrowing(t *testing.T, maxDigits int) (table *codeTable, failures *int, grown *[]int) {
	failures, grown = new(int), new([]int)
	table = newCodeTable(codeOptions{
		digits: 4, maxDigits: maxDigits,
		failures: func() int { return *failures },
		grown: func(digits int) {
			if _, now := table.stats(); now != digits { // and no lock is held
				t.Errorf("grown to %d digits, the table says %d", digits, now)
			}
			*grown = append(*grown, digits)
		},
	})
	return table, failures, grown
}

func TestCodesGrow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, failures, grown := newGrowing(t, 6)
		mint := func(n, digits int) {
			t.Helper()
			for i := range n {
				if code := mustMint(t, table, uuid.New(), time.Minute); len(code) != digits {
					t.Fatalf("code %d of %d is %s, want %d digits", i, n, code, digits)
				}
			}
		}
		mint(100, 4) // a hundredth
		mint(1000, 5)
		mint(100, 6)
		if want := []int{5, 6}; !slices.Equal(*grown, want) {
			t.Errorf("grown to %v, want %v", *grown, want)
		}
		time.Sleep(time.Minute)
		table.sweep()
		mint(1, 4)
		if want := []int{5, 6, 4}; !slices.Equal(*grown, want) {
			t.Errorf("grown to %v, want %v", *grown, want)
		}

		*failures = 1000 // a tenth is not passed
		mint(1, 4)
		*failures = 1001
		mint(1, 5)
		*failures = 10_001
		mint(1, 6)
		*failures = 1_000_000_000 // there is no further
		mint(1, 6)
		*failures = 0
		mint(98, 4)
		mint(1, 5)
		if err := table.invariants(); err != nil {
			t.Error("invariants:", err)
		}
	})
}

// When the codes of the largest length are all taken, shorter ones do.
func TestCodesFallBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, _, grown := newGrowing(t, 5)
		fillCodes(table, 4, 9_998, time.Now().Add(2*time.Hour))
		fillCodes(table, 5, 99_999, time.Now().Add(3*time.Hour))
		last := mustMint(t, table, uuid.New(), time.Hour)
		first, second := mustMint(t, table, uuid.New(), time.Hour), mustMint(t, table, uuid.New(), time.Minute)
		if len(last) != 5 || len(first) != 4 || len(second) != 4 || first == second {
			t.Error(last, first, second)
		}
		wantExhausted(t, table, time.Minute)
		if want := []int{5, 4}; !slices.Equal(*grown, want) {
			t.Errorf("grown to %v, want %v", *grown, want)
		}
		time.Sleep(time.Minute)
		if again := mustMint(t, table, uuid.New(), time.Hour); again != second {
			t.Errorf("minted %s, only %s is free", again, second)
		}
		wantExhausted(t, table, 59*time.Minute)
		if err := table.invariants(); err != nil {
			t.Error("invariants:", err)
		}
	})
}

func TestCodesOneLength(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		table, failures, grown := newGrowing(t, 4)
		*failures = 1_000_000
		for range 200 {
			if code := mustMint(t, table, uuid.New(), time.Minute); len(code) != 4 {
				t.Fatal(code)
			}
		}
		if len(*grown) > 0 {
			t.Error("grown to", *grown)
		}
	})
}

func TestCodesOneWinner(t *testing.T) {
	testTable(t, 4, 4, func(t *testing.T, table *codeTable) {
		for range 20 {
			session := uuid.New()
			code := mustMint(t, table, session, time.Minute)
			var won, used atomic.Int32
			start := make(chan struct{})
			var redeeming sync.WaitGroup
			for range 100 {
				redeeming.Go(func() {
					<-start
					switch id, _, err := table.Redeem(ctx, code); {
					case id != session:
						t.Error("redeemed for", id)
					case err == nil:
						won.Add(1)
					case errors.Is(err, errCodeUsed):
						used.Add(1)
					}
				})
			}
			close(start)
			redeeming.Wait()
			if won.Load() != 1 || used.Load() != 99 {
				t.Fatalf("%d redeemed the code, %d came too late", won.Load(), used.Load())
			}
		}
	})
}

// Minting, redeeming and sweeping at once, with codes that expire meanwhile.
func TestCodesConcurrently(t *testing.T) {
	testTable(t, 4, 5, func(t *testing.T, table *codeTable) {
		var working sync.WaitGroup
		for w := range 8 {
			working.Go(func() {
				random := rand.New(rand.NewPCG(uint64(w), 0))
				for range 2_000 {
					session := uuid.New()
					code, _, err := table.Mint(ctx, session, time.Duration(1+random.IntN(20))*time.Millisecond)
					if err != nil {
						t.Error("mint:", err)
						return
					}
					wantRedeem(t, table, code, session, nil)
					wantRedeem(t, table, code, session, errCodeUsed)
					if random.IntN(100) == 0 {
						table.sweep()
					}
					if random.IntN(10) == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		working.Wait()
	})
}

// A codeStep is one step of a script: mint, redeem or let time pass.
type codeStep struct {
	do string
	n  int
}

// TestCodesProperty: under any interleaving a code is redeemed at most once,
// never minted while it is taken, and always minted when one is free.
func TestCodesProperty(t *testing.T) {
	const free = 6
	full := newTestTable(4, 4)
	fillCodes(full, 4, 10_000, time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC))
	some := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) codeStep {
		return codeStep{
			rapid.SampledFrom([]string{"mint", "mint", "redeem", "redeem", "guess", "sleep", "sweep"}).Draw(t, "do"),
			rapid.IntRange(0, 20).Draw(t, "n"),
		}
	}), 1, 80)
	rapid.Check(t, func(rt *rapid.T) {
		steps := some.Draw(rt, "steps") // outside, because rapid fails by panic
		var err error
		synctest.Test(t, func(t *testing.T) {
			table := newTestTable(4, 4)
			table.entries, table.byExpiry = maps.Clone(full.entries), slices.Clone(full.byExpiry)
			*table.spaces[4] = codeSpace{4, 10_000, full.spaces[4].taken, slices.Clone(full.spaces[4].blocks)}
			for range free { // so few that codes come again
				freeLast(table)
			}
			err = errors.Join(playCodes(table, steps, free), table.invariants())
		})
		if err != nil {
			rt.Fatal(err)
		}
	})
}

// freeLast frees a code by hand.
func freeLast(t *codeTable) {
	key := t.byExpiry.Pop().(codeExpiry).key
	delete(t.entries, key)
	s := t.spaces[4]
	s.count(uint32(key)-s.size, -1)
}

// playCodes plays a script on a table with so many free codes.
func playCodes(table *codeTable, steps []codeStep, free int) error {
	type minted struct {
		session sessionID
		expires time.Time
		used    bool
	}
	alive := make(map[string]*minted)
	var known []string // codes that were minted at some time
	for i, step := range steps {
		now := time.Now()
		next := time.Duration(math.MaxInt64)
		for code, m := range alive {
			if !now.Before(m.expires) {
				delete(alive, code)
			} else {
				next = min(next, m.expires.Sub(now))
			}
		}
		switch step.do {
		case "mint":
			session := uuid.New()
			ttl := time.Duration(1+step.n) * time.Second
			code, expires, err := table.Mint(ctx, session, ttl)
			if e, ok := errors.AsType[*exhaustedError](err); ok && len(alive) == free && e.retryAfter == next {
				continue
			}
			if err != nil || !validCode(code) || alive[code] != nil || !expires.Equal(now.Add(ttl)) {
				return fmt.Errorf("step %d: mint: %q, %v, %w, with %d of %d alive", i, code, expires, err, len(alive), free)
			}
			alive[code] = &minted{session: session, expires: expires}
			if known = append(known, code); len(alive) > free {
				return fmt.Errorf("step %d: %d codes of %d", i, len(alive), free)
			}
		case "redeem", "guess":
			code := fmt.Sprintf("%05d", step.n) // there are none of this length
			if n := len(known); step.do == "redeem" && n > 0 {
				code = known[max(0, n-1-step.n)]
			}
			m, want := alive[code], error(nil)
			if m == nil {
				m, want = new(minted), errCodeGone
			} else if m.used {
				want = errCodeUsed
			}
			id, expires, err := table.Redeem(ctx, code)
			if id != m.session || !expires.Equal(m.expires) || !errors.Is(err, want) {
				return fmt.Errorf("step %d: redeem of %s: %s, %v, %w; want %s, %v, %v", i, code, id, expires, err, m.session, m.expires, want)
			}
			m.used = true
		case "sleep":
			time.Sleep(time.Duration(step.n) * 500 * time.Millisecond)
		case "sweep":
			table.sweep()
		}
	}
	return nil
}

// callsFrom returns ts as it looks to a client at ip.
func callsFrom(ts *testServer, ip string) *testServer {
	from := *ts
	from.http = ts.clientFrom(ip)
	return &from
}

// redeemAt redeems a code with further headers.
func redeemAt(ts *testServer, code string, headers ...string) httpAnswer {
	ts.t.Helper()
	return ts.call(http.MethodPost, "/rendezvous/redeem", `{"code":"`+code+`"}`, append(headers, "Content-Type: application/json")...)
}

// wantAnswer fails unless a has the status and, if it is an error, the code.
func wantAnswer(t testing.TB, a httpAnswer, status int, code string) {
	t.Helper()
	if a.status != status || a.Code != code && status != http.StatusOK {
		t.Errorf("answered %d %.200s, want %d %s", a.status, a.text, status, code)
	}
	switch after := a.header.Get("Retry-After"); {
	case (status == http.StatusTooManyRequests || status == http.StatusServiceUnavailable) == (after != ""):
	default:
		t.Errorf("%d comes with Retry-After %q", a.status, after)
	}
}

// retryAfter returns the header of a in whole seconds, as RFC 9110 has them.
func retryAfter(t testing.TB, a httpAnswer) time.Duration {
	t.Helper()
	n, err := strconv.Atoi(a.header.Get("Retry-After"))
	if err != nil || n < 1 {
		t.Errorf("Retry-After is %q", a.header.Get("Retry-After"))
	}
	return time.Duration(n) * time.Second
}

// waitTruly fails unless call is refused with status and code, still so a
// second before its Retry-After is over, and answered 200 at its end.
func waitTruly(t testing.TB, call func() httpAnswer, status int, code string, want time.Duration) {
	t.Helper()
	a := call()
	wantAnswer(t, a, status, code)
	wait := retryAfter(t, a)
	if wait != want {
		t.Errorf("Retry-After is %v, want %v", wait, want)
	}
	time.Sleep(wait - time.Second)
	wantAnswer(t, call(), status, code)
	time.Sleep(time.Second)
	wantAnswer(t, call(), http.StatusOK, "")
}

// wantSeries fails unless these series of /metrics have these values.
func wantSeries(t testing.TB, ts *testServer, want map[string]float64) {
	t.Helper()
	got := make(map[string]string)
	for line := range strings.Lines(ts.call(http.MethodGet, ts.cfg.metricsRoute, "").text) {
		if series, value, ok := strings.Cut(strings.TrimSpace(line), " "); ok {
			got[series] = value
		}
	}
	for series, v := range want {
		if n, err := strconv.ParseFloat(got[series], 64); err != nil || n != v {
			t.Errorf("%s is %q, want %v", series, got[series], v)
		}
	}
}

// soonClosed waits for the server to close c, but not for ever.
func soonClosed(c *wsClient) *wsClient {
	c.t.Helper()
	select {
	case <-c.done:
	case <-time.After(time.Minute):
		c.t.Error("the server leaves the connection open")
		c.drop()
	}
	return c
}

// refusal returns the HTTP answer to a WebSocket that was refused.
func refusal(ts *testServer, d wsDial) httpAnswer {
	ts.t.Helper()
	c, res, err := ts.dial(d)
	if err == nil {
		c.drop()
		return httpAnswer{status: http.StatusSwitchingProtocols}
	}
	if res == nil {
		ts.t.Fatal(err)
	}
	body, err := io.ReadAll(res.Body)
	if err != nil {
		ts.t.Fatal(err)
	}
	a := httpAnswer{status: res.StatusCode, header: res.Header, text: string(body)}
	if err := json.Unmarshal(body, &a); err != nil || a.Error == "" {
		ts.t.Errorf("refused with %q, which is no error in JSON", body)
	}
	return a
}

// allCodes returns every code of four digits, the live one in the middle: a
// sweep that hits it by luck at its beginning gets one answer more.
func allCodes(live string) []string {
	n, _ := strconv.Atoi(live)
	codes := make([]string, 10_000)
	for i := range codes {
		codes[i] = fmt.Sprintf("%04d", (n+5000+i)%10_000)
	}
	return codes
}

// sweep tries codes and counts the answers by status. Every second call
// pretends to come from elsewhere.
func sweep(ts *testServer, codes []string) map[int]int {
	ts.t.Helper()
	answers := make(map[int]int)
	for i, code := range codes {
		var headers []string
		if i%2 == 1 {
			headers = append(headers, fmt.Sprintf("X-Forwarded-For: 203.0.%d.%d", i>>8, i&255))
		}
		a := redeemAt(ts, code, headers...)
		answers[a.status]++
		if a.status == http.StatusTooManyRequests && (a.Code != "too_many_attempts" || a.AppID != "") {
			ts.t.Fatalf("answered %s", a.text)
		}
	}
	return answers
}

// Whoever tries all codes from one address learns of REDEEM_FAILS of them in a
// window, whatever it claims its address to be.
func TestGuessAllCodes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "ROOM_TTL=20m")
		attacker := callsFrom(ts, "198.51.100.66")
		code, appID := ts.mint()
		codes := allCodes(code)
		want := map[int]int{http.StatusGone: 10, http.StatusTooManyRequests: 9990}
		if got := sweep(attacker, codes); !maps.Equal(got, want) {
			t.Errorf("all codes are answered %v, want %v", got, want)
		}
		time.Sleep(10 * time.Minute) // half a window
		want = map[int]int{http.StatusGone: 5, http.StatusTooManyRequests: 495}
		if got := sweep(attacker, codes[1000:1500]); !maps.Equal(got, want) {
			t.Errorf("half a window later 500 codes are answered %v, want %v", got, want)
		}

		// Another address knows nothing of that.
		other := callsFrom(ts, "198.51.100.67")
		wantAnswer(t, redeemAt(other, codes[0]), http.StatusGone, "gone")
		if a := redeemAt(other, code); a.status != http.StatusOK || a.AppID != appID {
			t.Errorf("another address with the right code is answered %d %s", a.status, a.text)
		}
		ts.mint()
		wantSeries(t, ts, map[string]float64{
			`parley_redeems_total{result="ok"}`:        1,
			`parley_redeems_total{result="gone"}`:      16,
			`parley_redeems_total{result="throttled"}`: 9990 + 495,
			`parley_redeems_total{result="bad"}`:       0,
			`parley_redeem_throttled_total`:            9990 + 495,
			`parley_forwarded_untrusted_total`:         5250,
			`parley_code_digits`:                       4, // one address does not make codes longer for all
		})
	})
}

// Behind a trusted proxy every client has its own budget, and what a client
// writes into the header itself changes nothing.
func TestGuessBehindProxy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "TRUSTED_PROXIES=127.0.0.1,10.0.0.0/8")
		code, _ := ts.mint()
		codes := allCodes(code)
		answers := make(map[int]int)
		for i, code := range codes[:100] {
			a := redeemAt(ts, code, fmt.Sprintf("X-Forwarded-For: 192.0.2.%d, 198.51.100.1, 10.0.0.%d", i, i))
			answers[a.status]++
		}
		if want := map[int]int{http.StatusGone: 10, http.StatusTooManyRequests: 90}; !maps.Equal(answers, want) {
			t.Errorf("one client is answered %v, want %v", answers, want)
		}
		wantAnswer(t, redeemAt(ts, code, "X-Forwarded-For: 198.51.100.1"), http.StatusTooManyRequests, "too_many_attempts")
		wantAnswer(t, redeemAt(ts, codes[0], "X-Forwarded-For: 198.51.100.2"), http.StatusGone, "gone")
		wantAnswer(t, redeemAt(ts, code, "X-Forwarded-For: 198.51.100.1, 198.51.100.2"), http.StatusOK, "")
		if n := ts.limits.guesses.left(networkOf(netip.MustParseAddr("198.51.100.2"))); n != 9 {
			t.Errorf("the second client has %d guesses left, want 9", n)
		}

		// IPv6: one customer is a /64.
		for i, code := range codes[200:210] {
			wantAnswer(t, redeemAt(ts, code, fmt.Sprintf("X-Forwarded-For: 2001:db8::%x", i+1)), http.StatusGone, "gone")
		}
		wantAnswer(t, redeemAt(ts, codes[300], "X-Forwarded-For: 2001:db8::ffff"), http.StatusTooManyRequests, "too_many_attempts")
		wantAnswer(t, redeemAt(ts, codes[300], "X-Forwarded-For: 2001:db8:0:1::1"), http.StatusGone, "gone")
		wantSeries(t, ts, map[string]float64{`parley_forwarded_untrusted_total`: 0})
	})
}

// After the budget is used up even the right code is refused, for exactly as
// long as Retry-After says.
func TestGuessRightCodeThrottled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "REDEEM_FAILS=4", "ROOM_TTL=10m")
		code, appID := ts.mint()
		sweep(ts, allCodes(code)[:4])
		time.Sleep(300 * time.Millisecond) // a header in whole seconds must not promise too much
		var last httpAnswer
		waitTruly(t, func() httpAnswer {
			last = redeemAt(ts, code)
			return last
		}, http.StatusTooManyRequests, "too_many_attempts", 150*time.Second)
		if last.AppID != appID {
			t.Errorf("redeemed for %s, want %s", last.AppID, appID)
		}
		// The right answer cost nothing: one more wrong guess is in the bucket.
		wantAnswer(t, redeemAt(ts, code), http.StatusGone, "gone")
		wantAnswer(t, redeemAt(ts, code), http.StatusTooManyRequests, "too_many_attempts")
	})
}

// Only wrong guesses cost anything, and each only once.
func TestGuessWhatCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "REDEEM_FAILS=3", "ROOM_TTL=10m")
		left := func(want int) {
			t.Helper()
			var who struct{ GuessesLeft int }
			if err := json.Unmarshal([]byte(ts.call(http.MethodGet, "/whoami", "").text), &who); err != nil || who.GuessesLeft != want {
				t.Errorf("%d guesses left, want %d; %v", who.GuessesLeft, want, err)
			}
		}
		var last string
		for range 20 {
			code, _ := ts.mint()
			wantAnswer(t, redeemAt(ts, code), http.StatusOK, "")
			last = code
			wantAnswer(t, ts.call(http.MethodPost, "/rendezvous/redeem", `{"code":"0000"}`), http.StatusUnsupportedMediaType, "unsupported_media_type")
			wantAnswer(t, ts.post("/rendezvous/redeem", `{"code":"12x4"}`), http.StatusBadRequest, "bad_code")
			wantAnswer(t, ts.post("/rendezvous/redeem", `{"code":1234}`), http.StatusBadRequest, "bad_code")
			wantAnswer(t, ts.post("/rendezvous/redeem", `{}`), http.StatusBadRequest, "bad_code")
			wantAnswer(t, ts.post("/rendezvous/redeem", `["1234"]`), http.StatusBadRequest, "bad_json")
			wantAnswer(t, ts.post("/rendezvous/redeem", `{"code":"1234"`+strings.Repeat(" ", 4<<10)+`}`), http.StatusRequestEntityTooLarge, "too_large")
			wantAnswer(t, ts.call(http.MethodGet, "/rendezvous/redeem", ""), http.StatusMethodNotAllowed, "method_not_allowed")
		}
		left(3)

		// A used code is a wrong one, and the same wrong one counts once.
		for range 20 {
			wantAnswer(t, redeemAt(ts, last), http.StatusGone, "gone")
		}
		left(2)
		// Another address that guesses the same is another guesser.
		other := callsFrom(ts, "192.0.2.2")
		wantAnswer(t, redeemAt(other, last), http.StatusGone, "gone")
		if n := ts.limits.guesses.left(networkOf(netip.MustParseAddr("192.0.2.2"))); n != 2 {
			t.Errorf("the other address has %d guesses left, want 2", n)
		}
		// Leading zeros are part of a code, so these are two, and neither exists.
		wantAnswer(t, redeemAt(ts, "00000"), http.StatusGone, "gone")
		wantAnswer(t, redeemAt(ts, "000000"), http.StatusGone, "gone")
		left(0)
		// What is no guess is still answered as before.
		wantAnswer(t, redeemAt(ts, last), http.StatusTooManyRequests, "too_many_attempts")
		wantAnswer(t, ts.post("/rendezvous/redeem", `{"code":"12x4"}`), http.StatusBadRequest, "bad_code")
		if a := ts.post("/rendezvous/code", ""); a.status != http.StatusOK {
			t.Errorf("who guessed wrong cannot mint: %d %s", a.status, a.text)
		}
		wantSeries(t, ts, map[string]float64{
			`parley_redeems_total{result="ok"}`:        20,
			`parley_redeems_total{result="gone"}`:      23,
			`parley_redeems_total{result="bad"}`:       20*6 + 1,
			`parley_redeems_total{result="throttled"}`: 1,
			`parley_redeem_throttled_total`:            1,
		})
	})
}

// Codes that are guessed at from many addresses grow, and shrink again when
// that is over.
func TestCodesGrowWhenGuessed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "ROOM_TTL=10m", "MAX_CODES_PER_IP=0", "TRUSTED_PROXIES=127.0.0.1")
		digits := func(want int) {
			t.Helper()
			if code, _ := ts.mint(); len(code) != want {
				t.Errorf("the code %s has %d digits, want %d", code, len(code), want)
			}
			wantSeries(t, ts, map[string]float64{`parley_code_digits`: float64(want)})
		}
		logged := func(digits, want int) {
			t.Helper()
			if n := strings.Count(ts.log.String(), fmt.Sprintf("digits=%d\n", digits)); n != want {
				t.Errorf("logged %d times that codes have %d digits, want %d", n, digits, want)
			}
		}
		digits(4)
		start := time.Now()
		for i := range 1000 {
			// Nobody minted any of six digits.
			wantAnswer(t, redeemAt(ts, fmt.Sprintf("%06d", i), fmt.Sprintf("X-Forwarded-For: 198.51.100.%d", i/10)), http.StatusGone, "gone")
		}
		for range 100 { // what is not answered does not count
			wantAnswer(t, redeemAt(ts, "999999", "X-Forwarded-For: 198.51.100.0"), http.StatusTooManyRequests, "too_many_attempts")
		}
		digits(4) // a tenth is not more than a tenth
		logged(5, 0)
		wantAnswer(t, redeemAt(ts, "999999", "X-Forwarded-For: 198.51.100.200"), http.StatusGone, "gone")
		digits(5)
		digits(5)
		logged(5, 1)

		time.Sleep(time.Until(start.Add(10*time.Minute - time.Second)))
		digits(5)
		time.Sleep(2 * time.Second)
		digits(4)
		logged(4, 1)
		time.Sleep(time.Hour)
		digits(4)
	})
}

// Codes grow when a hundredth of their length is taken, up to CODE_DIGITS_MAX,
// and shrink again when those have expired.
func TestCodesGrowWhenTaken(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "ROOM_TTL=10m", "MAX_CODES_PER_IP=0", "CODE_DIGITS_MAX=5")
		lengths := func(n int) map[int]int {
			got := make(map[int]int)
			for range n {
				code, _ := ts.mint()
				got[len(code)]++
			}
			return got
		}
		if got := lengths(100); !maps.Equal(got, map[int]int{4: 100}) {
			t.Errorf("the first hundred codes by length: %v", got)
		}
		if strings.Contains(ts.log.String(), "digits=5") {
			t.Error("growth is logged before it begins")
		}
		time.Sleep(time.Minute)
		if got := lengths(1010); !maps.Equal(got, map[int]int{5: 1010}) {
			t.Errorf("those after a hundred, with five digits at most: %v", got)
		}
		wantSeries(t, ts, map[string]float64{`parley_code_digits`: 5, `parley_codes_active`: 1110})
		if n := strings.Count(ts.log.String(), "digits=5\n"); n != 1 {
			t.Errorf("growth is logged %d times", n)
		}
		time.Sleep(9 * time.Minute) // the first hundred are free again
		if got := lengths(1); !maps.Equal(got, map[int]int{4: 1}) {
			t.Errorf("after the first hundred expired: %v", got)
		}
		wantSeries(t, ts, map[string]float64{`parley_code_digits`: 4})
	})
}

func TestMaxCodesPerIP(t *testing.T) {
	t.Run("codes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newTestServer(t, "DEV=false", "MAX_CODES_PER_IP=3", "ROOM_TTL=10m")
			mint := func() httpAnswer { return ts.post("/rendezvous/code", "") }
			wantAnswer(t, ts.post("/rendezvous/code", `{"ttl":120}`), http.StatusOK, "")
			time.Sleep(time.Minute)
			code, _ := ts.mint()
			wantAnswer(t, redeemAt(ts, code), http.StatusOK, "") // redeemed, and counts until it expires
			ts.mint()
			if a := callsFrom(ts, "192.0.2.2").post("/rendezvous/code", ""); a.status != http.StatusOK {
				t.Errorf("another address is answered %d %s", a.status, a.text)
			}
			// The first expires first.
			waitTruly(t, mint, http.StatusTooManyRequests, "too_many_codes", time.Minute)
			// Then the redeemed one and the other, which were minted together.
			waitTruly(t, mint, http.StatusTooManyRequests, "too_many_codes", 9*time.Minute)
			// One that lives for moments is not waited for any longer.
			wantAnswer(t, ts.post("/rendezvous/code", `{"ttl":2}`), http.StatusOK, "")
			waitTruly(t, mint, http.StatusTooManyRequests, "too_many_codes", 2*time.Second)
			wantSeries(t, ts, map[string]float64{`parley_codes_minted_total`: 8})
		})
	})

	t.Run("refused mints do not count", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newTestServer(t, "DEV=false", "MAX_CODES_PER_IP=2", "MAX_SESSIONS=1")
			wantAnswer(t, ts.post("/rendezvous/code", `{"ttl":30}`), http.StatusOK, "")
			for range 5 {
				wantAnswer(t, ts.post("/rendezvous/code", ""), http.StatusServiceUnavailable, "at_capacity")
				wantAnswer(t, ts.post("/rendezvous/code", `{"ttl":-1}`), http.StatusBadRequest, "bad_ttl")
			}
			time.Sleep(time.Minute)
			wantAnswer(t, ts.post("/rendezvous/code", ""), http.StatusOK, "")
		})
	})

	// Where any UUID is a session, opening one by joining it counts as well.
	t.Run("sessions opened by joining", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newTestServer(t, "DEV=false", "APP_IDS=any", "MAX_CODES_PER_IP=2", "RESUME_TTL=30s")
			join := func(sid string) (*wsClient, string) {
				id := uuid.NewString()
				return ts.join(wsDial{appID: id, side: "A", sid: sid}), id
			}
			another := func() wsDial { return wsDial{appID: uuid.NewString(), side: "A"} }
			claimed, id := join("secret")
			plain, _ := join("")
			ts.join(wsDial{appID: id, side: "B"}).leave(websocket.StatusNormalClosure) // opens none
			synctest.Wait()
			wantAnswer(t, refusal(ts, another()), http.StatusTooManyRequests, "too_many_codes")
			wantAnswer(t, ts.post("/rendezvous/code", ""), http.StatusTooManyRequests, "too_many_codes")
			v1 := another()
			v1.v1 = true
			soonClosed(ts.join(v1)).wantClosed(closeTooMany, "too_many_codes")
			elsewhere := another()
			elsewhere.from = "192.0.2.2"
			ts.join(elsewhere)

			// A session lives as long as its claimed seat is reserved.
			claimed.drop()
			synctest.Wait()
			wantAnswer(t, refusal(ts, another()), http.StatusTooManyRequests, "too_many_codes")
			time.Sleep(31 * time.Second)
			third, _ := join("")
			wantAnswer(t, refusal(ts, another()), http.StatusTooManyRequests, "too_many_codes")
			plain.leave(websocket.StatusNormalClosure)
			third.leave(websocket.StatusNormalClosure)
			synctest.Wait()
			ts.mint()
			ts.mint()
			wantAnswer(t, refusal(ts, another()), http.StatusTooManyRequests, "too_many_codes")
		})
	})
}

func TestHTTPRatePerMin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "HTTP_RATE_PER_MIN=6", "MAX_CODES_PER_IP=0")
		mint := func() httpAnswer { return ts.post("/rendezvous/code", "") }
		code, _ := ts.mint()
		for range 5 { // one bucket for both calls, right or wrong
			redeemAt(ts, code)
		}
		free := func() {
			t.Helper()
			for _, path := range []string{"/healthz", "/readyz", "/metrics", "/version", "/whoami"} {
				for range 2 {
					if a := ts.call(http.MethodGet, path, ""); a.status != http.StatusOK {
						t.Fatalf("%s is answered %d %s", path, a.status, a.text)
					}
				}
			}
		}
		free()
		wantAnswer(t, redeemAt(ts, code), http.StatusTooManyRequests, "rate_limited")
		wantAnswer(t, mint(), http.StatusTooManyRequests, "rate_limited")
		free()
		wantSeries(t, ts, map[string]float64{
			`parley_rate_limited_total{route="code"}`:   1,
			`parley_rate_limited_total{route="redeem"}`: 1,
			`parley_rate_limited_total{route="ws"}`:     0,
			`parley_redeems_total{result="throttled"}`:  0, // that is for guesses
		})
		if a := callsFrom(ts, "192.0.2.2").post("/rendezvous/code", ""); a.status != http.StatusOK {
			t.Errorf("another address is answered %d %s", a.status, a.text)
		}
		waitTruly(t, mint, http.StatusTooManyRequests, "rate_limited", 10*time.Second)
		time.Sleep(1500 * time.Millisecond)
		waitTruly(t, mint, http.StatusTooManyRequests, "rate_limited", 9*time.Second)

		// WebSockets have a limit of their own.
		_, appID := func() (string, string) { time.Sleep(time.Minute); return ts.mint() }()
		for range 10 {
			ts.join(wsDial{appID: appID, side: "A"}).leave(websocket.StatusNormalClosure)
		}
	})
}

func TestWSRatePerMin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "WS_RATE_PER_MIN=4")
		seat := wsDial{appID: uuid.NewString(), side: "A"}
		for range 4 {
			ts.join(seat).leave(websocket.StatusNormalClosure)
		}
		a := refusal(ts, seat)
		wantAnswer(t, a, http.StatusTooManyRequests, "rate_limited")
		if wait := retryAfter(t, a); wait != 15*time.Second {
			t.Errorf("Retry-After is %v, want 15s", wait)
		}
		for range 10 { // the API is not limited by it
			ts.mint()
		}
		elsewhere := seat
		elsewhere.from = "192.0.2.2"
		ts.join(elsewhere).leave(websocket.StatusNormalClosure)
		wantSeries(t, ts, map[string]float64{
			`parley_rate_limited_total{route="ws"}`:   1,
			`parley_rate_limited_total{route="code"}`: 0,
		})
		time.Sleep(14 * time.Second)
		wantAnswer(t, refusal(ts, seat), http.StatusTooManyRequests, "rate_limited")
		time.Sleep(time.Second)
		ts.join(seat).leave(websocket.StatusNormalClosure)
	})
}

// The limits on connections answer as HTTP, also to those who could be told by
// a close frame: an upgrade is what they are to prevent.
func TestMaxConnsPerIP(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "MAX_CONNS_PER_IP=2")
		id := uuid.NewString()
		a, b := ts.join(wsDial{appID: id, side: "A"}), ts.join(wsDial{appID: id, side: "B", v1: true})
		for _, v1 := range []bool{false, true} {
			wantAnswer(t, refusal(ts, wsDial{appID: uuid.NewString(), side: "A", v1: v1}), http.StatusTooManyRequests, "too_many_connections")
		}
		ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "192.0.2.2"})
		a.leave(websocket.StatusNormalClosure)
		synctest.Wait()

		// Refused joins, whichever way they are told, hold nothing.
		for range 5 {
			soonClosed(ts.join(wsDial{appID: id, side: "B"})).wantClosed(closeBusy, "side B busy")
			synctest.Wait()
		}
		a = ts.join(wsDial{appID: id, side: "A"})
		wantAnswer(t, refusal(ts, wsDial{appID: id, side: "A", v1: true}), http.StatusTooManyRequests, "too_many_connections")
		a.drop()
		b.drop()
		synctest.Wait()
		ts.join(wsDial{appID: id, side: "A"})
		ts.join(wsDial{appID: id, side: "B"})

		// One IPv6 customer is a /64.
		ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "2001:db8::1"})
		ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "2001:db8::2"})
		wantAnswer(t, refusal(ts, wsDial{appID: id, side: "A", from: "2001:db8::3"}), http.StatusTooManyRequests, "too_many_connections")
		ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "2001:db8:0:1::1"})
	})
}

func TestMaxConns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "MAX_CONNS=2", "RATE_EXEMPT=192.0.2.0/24")
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A", from: "192.0.2.1"})
		ts.join(wsDial{appID: id, side: "B", from: "192.0.2.2"})
		for _, v1 := range []bool{false, true} {
			wantAnswer(t, refusal(ts, wsDial{appID: uuid.NewString(), side: "A", v1: v1, from: "192.0.2.3"}), http.StatusServiceUnavailable, "at_capacity")
		}
		if a := ts.call(http.MethodGet, "/healthz", ""); a.status != http.StatusOK {
			t.Errorf("healthz is answered %d", a.status)
		}
		synctest.Wait() // connections are counted on goroutines of their own
		wantSeries(t, ts, map[string]float64{`parley_ws_connections`: 2, `parley_sessions_active`: 1})
		a.leave(websocket.StatusNormalClosure)
		synctest.Wait()
		ts.join(wsDial{appID: id, side: "A"})
	})
}

func TestWSFramesPerSec(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "WS_FRAMES_PER_SEC=10")
		id := uuid.NewString()
		a, b := ts.join(wsDial{appID: id, side: "A"}), ts.join(wsDial{appID: id, side: "B"})
		b.settled()
		for range 30 { // as fast as allowed, for as long as one likes
			a.send(`{"type":"ice"}`)
			time.Sleep(100 * time.Millisecond)
		}
		if got := b.settled(); len(got) != 30 {
			t.Fatalf("%d of 30 frames arrived", len(got))
		}
		time.Sleep(time.Second)
		for range 10 { // a second's worth at once
			a.send(`{"type":"ice"}`)
		}
		if got := b.settled(); len(got) != 10 {
			t.Fatalf("%d of 10 frames arrived", len(got))
		}
		a.send(`{"type":"ice"}`)
		if code, _ := soonClosed(a).closed(); closeCode(code) != closeTooMany {
			t.Errorf("one frame too many closes with %d, want %d", code, closeTooMany)
		}
		b.want(`{"type":"peer_left"}`) // and not the frame
		time.Sleep(2 * time.Second)
		wantSeries(t, ts, map[string]float64{`parley_ws_closes_total{code="4429"}`: 1})

		// The other went on, and any frame counts.
		for range 10 {
			b.send(`{"type":"ping"}`)
		}
		if got := b.settled(); len(got) != 10 {
			t.Fatalf("%d of 10 pings answered", len(got))
		}
		b.send(`nonsense`)
		if code, _ := soonClosed(b).closed(); closeCode(code) != closeTooMany {
			t.Errorf("one ping too many closes with %d, want %d", code, closeTooMany)
		}
	})
}

// RATE_EXEMPT lifts every limit by address, from those it names and only them.
func TestRateExempt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "APP_IDS=any", "RATE_EXEMPT=192.0.2.0/24,127.0.0.1",
			"TRUSTED_PROXIES=127.0.0.1", "HTTP_RATE_PER_MIN=50", "WS_RATE_PER_MIN=3", "REDEEM_FAILS=1", "MAX_CONNS_PER_IP=3", "MAX_CODES_PER_IP=3")
		monitor := callsFrom(ts, "192.0.2.9")
		for i := range 100 {
			if a := monitor.post("/rendezvous/code", ""); a.status != http.StatusOK {
				t.Fatalf("mint %d is answered %d %s", i, a.status, a.text)
			}
			wantAnswer(t, redeemAt(monitor, fmt.Sprintf("%09d", i)), http.StatusGone, "gone")
		}
		for range 10 {
			ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "192.0.2.9"})
		}
		if a := monitor.call(http.MethodGet, "/whoami", ""); !strings.Contains(a.text, `"guessesLeft":-1`) {
			t.Errorf("whoami says %s", a.text)
		}
		if h := ts.limits.perIP.held; len(h) != 0 {
			t.Errorf("%d exempt networks hold connections", len(h))
		}

		// A proxy that is exempt itself exempts nobody behind it, nor who says so.
		client := "X-Forwarded-For: 192.0.2.9, 198.51.100.7"
		wantAnswer(t, redeemAt(ts, "000000000", client), http.StatusGone, "gone")
		wantAnswer(t, redeemAt(ts, "000000001", client), http.StatusTooManyRequests, "too_many_attempts")
		stranger := callsFrom(ts, "198.51.100.8")
		wantAnswer(t, redeemAt(stranger, "000000000", "X-Forwarded-For: 192.0.2.9"), http.StatusGone, "gone")
		wantAnswer(t, redeemAt(stranger, "000000001", "X-Forwarded-For: 192.0.2.9"), http.StatusTooManyRequests, "too_many_attempts")
		// The proxy's own calls are its own, and those of an exempt client too.
		for i := range 5 {
			wantAnswer(t, redeemAt(ts, fmt.Sprintf("%09d", i)), http.StatusGone, "gone")
			wantAnswer(t, redeemAt(ts, fmt.Sprintf("%09d", i), "X-Forwarded-For: 192.0.2.9"), http.StatusGone, "gone")
		}
	})
}
