package main

import (
	"errors"
	"fmt"
	"maps"
	"math"
	"math/rand/v2"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

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
