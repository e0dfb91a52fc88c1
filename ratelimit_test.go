package main

import (
	"context"
	"encoding/binary"
	"fmt"
	"math"
	"net/netip"
	"runtime"
	"runtime/debug"
	"slices"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// The networks of a flood: every number is another one.

func numberedIPv4(i int) network {
	var b [4]byte
	binary.BigEndian.PutUint32(b[:], 0x0a000000+uint32(i))
	return networkOf(netip.AddrFrom4(b))
}

// numberedIPv6 returns a /64 in a /48 of its own.
func numberedIPv6(i int) network { return subnetIPv6(i, 0) }

// subnetIPv6 returns one /64 of the /48 that site numbers.
func subnetIPv6(site, subnet int) network {
	b := [16]byte{0x20, 0x01, 15: 7}
	binary.BigEndian.PutUint32(b[2:], uint32(site))
	binary.BigEndian.PutUint16(b[6:], uint16(subnet))
	return networkOf(netip.AddrFrom16(b))
}

func TestNetworkOf(t *testing.T) {
	for _, c := range []struct{ addr, network, site string }{
		{"192.0.2.7", "192.0.2.7/32", ""},
		{"2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64", "2001:db8:1::/48"},
		{"::1", "::/64", "::/48"},
	} {
		n := networkOf(netip.MustParseAddr(c.addr))
		if n.String() != c.network {
			t.Errorf("%s counts as %s, want %s", c.addr, n, c.network)
		}
		if site, ok := siteOf(n); ok != (c.site != "") || ok && site.String() != c.site {
			t.Errorf("%s is in the site %s, %v, want %q", c.addr, site, ok, c.site)
		}
	}
}

func TestAddressTable(t *testing.T) {
	made := 0
	table := newAddressTable(3, func() int { made++; return 0 })
	count := func(i int) (n int) {
		table.with(numberedIPv4(i), func(v *int) { *v++; n = *v })
		return n
	}
	has := func(want ...int) {
		t.Helper()
		var keys, wanted []string
		for e := table.recent.Front(); e != nil; e = e.Next() {
			keys = append(keys, e.Value.(*addressEntry[int]).key.String())
		}
		for _, i := range want {
			wanted = append(wanted, numberedIPv4(i).String())
			if table.entries[numberedIPv4(i)] == nil {
				t.Errorf("%d is not in the map", i)
			}
		}
		if !slices.Equal(keys, wanted) || len(table.entries) != len(want) {
			t.Errorf("the table holds %v, and %d in its map; want %v", keys, len(table.entries), wanted)
		}
	}
	count(1)
	count(2)
	count(3)
	has(3, 2, 1)
	if n := count(1); n != 2 {
		t.Errorf("an entry was forgotten: its second call counts as %d", n)
	}
	has(1, 3, 2)
	count(4) // 2 has been idle longest, though 1 is the oldest
	has(4, 1, 3)
	count(3)
	count(5)
	has(5, 3, 4)
	if n := count(1); n != 1 {
		t.Errorf("what made room is back with its old value: %d", n)
	}
	if made != 6 {
		t.Errorf("%d entries made, want 6", made)
	}
}

// However many call at once, the table keeps its bound and loses no call.
func TestAddressTableConcurrent(t *testing.T) {
	table := newAddressTable(8, func() *atomic.Int64 { return new(atomic.Int64) })
	var flood sync.WaitGroup
	for g := range 8 {
		flood.Go(func() {
			for i := range 2000 {
				table.with(numberedIPv4(0), func(v **atomic.Int64) { (*v).Add(1) })
				if i%10 == 0 { // rarely enough that the first stays
					table.with(numberedIPv4(1+g), func(v **atomic.Int64) { (*v).Add(1) })
				}
				if n := tableSize(table); n > 8 {
					t.Errorf("%d entries", n)
					return
				}
			}
		})
	}
	flood.Wait()
	if n := tableSize(table); n != 8 {
		t.Errorf("%d entries, want 8", n)
	}
}

func tableSize[V any](t *addressTable[V]) int {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.entries) != t.recent.Len() {
		return -1
	}
	return len(t.entries)
}

// documentedTable is what the comment at maxAddresses and docs/security.md
// promise of each table.
const documentedTable = 32 << 20

func TestAddressMemory(t *testing.T) {
	const (
		million = 1_000_000
		part    = maxAddresses / 8 // as many entries as a table scaled down for time's sake
	)
	limit, limitV6 := newRateLimit(60), newRateLimit(60)
	limitV6.networks.max = part
	guesses := func(budget, addresses int) *guessBudget {
		g := newGuessBudget(budget, 10*time.Minute)
		g.networks.max, g.sites.max = addresses, addresses
		return g
	}
	once, onceV6, busy, generous := guesses(10, part), guesses(10, part), guesses(10, part), guesses(100, part/8)
	held := newQuota(4)
	relayed, relayedV6 := newRelayQuota(), newRelayQuota()
	relayed.networks.max, relayedV6.networks.max, relayedV6.sites.max = part, part, part/siteShare
	codes := make([]string, 100)
	for i := range codes {
		codes[i] = fmt.Sprintf("%04d", i)
	}
	guess := func(g *guessBudget, n network, codes []string) {
		for _, code := range codes {
			if done, _ := g.begin(ctx, n, code); done != nil {
				done(true)
			}
		}
	}
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // the floods are mostly garbage
	for _, c := range []struct {
		what  string
		flood func()
		sizes func() []int // of the tables
		scale int
		bound int
		keep  any
	}{
		{"rate limit, a million IPv4 addresses", func() {
			for i := range million {
				limit.allow(numberedIPv4(i))
			}
		}, func() []int { return []int{tableSize(limit.networks)} }, 1, documentedTable, limit},
		{"rate limit, IPv6", func() {
			for i := range 2 * part {
				limitV6.allow(numberedIPv6(i))
			}
		}, func() []int { return []int{tableSize(limitV6.networks)} }, 8, documentedTable, limitV6},
		{"guesses, one from each address", func() {
			for i := range 2 * part {
				guess(once, numberedIPv4(i), codes[:1])
			}
		}, func() []int { return []int{tableSize(once.networks)} }, 8, documentedTable, once},
		{"guesses, IPv6 networks and sites", func() {
			for i := range 2 * part {
				guess(onceV6, numberedIPv6(i), codes[:1])
			}
		}, func() []int { return []int{tableSize(onceV6.networks), tableSize(onceV6.sites)} }, 8, 2 * documentedTable, onceV6},
		{"guesses, addresses that use up their budgets", func() {
			for i := range 2 * part {
				guess(busy, numberedIPv4(i), codes[:10])
			}
		}, func() []int { return []int{tableSize(busy.networks)} }, 8, documentedTable, busy},
		{"guesses, budgets of REDEEM_FAILS=100", func() {
			for i := range part/8 + 100 {
				guess(generous, numberedIPv4(i), codes)
			}
		}, func() []int { return []int{tableSize(generous.networks)} }, 64, documentedTable, generous},
		{"TURN credentials, IPv6 sites with as many as they may", func() {
			for i := range 2 * part / siteShare {
				for session := range siteShare * maxRelayedSessions {
					relayedV6.take(subnetIPv6(i, session/maxRelayedSessions), sessionID{byte(session)}, time.Now().Add(time.Hour))
				}
			}
		}, func() []int { return []int{tableSize(relayedV6.networks), siteShare * tableSize(relayedV6.sites)} }, 8, 2 * documentedTable, relayedV6},
		{"TURN credentials, addresses with as many as they may", func() {
			for i := range 2 * part {
				for session := range maxRelayedSessions {
					relayed.take(numberedIPv4(i), sessionID{byte(session)}, time.Now().Add(time.Hour))
				}
			}
		}, func() []int { return []int{tableSize(relayed.networks)} }, 8, documentedTable, relayed},
		{"quota, networks that gave back what they held", func() {
			for i := range 100_000 {
				if ok, _ := held.take(numberedIPv4(i)); !ok {
					t.Error("refused")
				}
				held.give(numberedIPv4(i))
			}
		}, func() []int { return nil }, 1, 1 << 20, held},
	} {
		t.Run(c.what, func(t *testing.T) {
			before := heapInUse()
			c.flood()
			grown := (heapInUse() - before) * c.scale
			for _, n := range c.sizes() {
				if n != maxAddresses/c.scale {
					t.Errorf("%d entries, want %d", n, maxAddresses/c.scale)
				}
			}
			t.Logf("%.1f MiB, %d bytes an address; the bound is %d MiB", float64(grown)/(1<<20), grown/maxAddresses, c.bound>>20)
			if grown > c.bound {
				t.Errorf("%.1f MiB are in use, documented are %d", float64(grown)/(1<<20), c.bound>>20)
			}
			runtime.KeepAlive(c.keep)
		})
	}
}

// heapInUse is the bytes of the heap that can be reached.
func heapInUse() int {
	var m runtime.MemStats
	runtime.GC() // twice: what a finalizer or a pool kept goes with the second
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int(m.HeapAlloc)
}

func TestRateLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newRateLimit(6)
		a, b := numberedIPv4(1), numberedIPv4(2)
		passes := func(n network, want int) time.Duration {
			t.Helper()
			for i := range want {
				if ok, _ := l.allow(n); !ok {
					t.Fatalf("call %d of %d is refused", i+1, want)
				}
			}
			ok, retryAfter := l.allow(n)
			if ok {
				t.Fatalf("more than %d calls pass", want)
			}
			return retryAfter
		}
		if wait := passes(a, 6); wait != 10*time.Second {
			t.Errorf("6 a minute are used up: wait %v", wait)
		}
		passes(b, 6) // another network has its own
		for range 100 {
			l.allow(a) // a refused call costs nothing
		}
		time.Sleep(4 * time.Second)
		if wait := passes(a, 0).Round(time.Microsecond); wait != 6*time.Second {
			t.Errorf("4 s later: wait %v", wait)
		}
		time.Sleep(26 * time.Second)
		passes(a, 3)
		time.Sleep(time.Hour) // never more than one minute's worth
		passes(a, 6)
		passes(b, 6)
	})
	if newRateLimit(0) != nil {
		t.Error("0 is a limit")
	}
	for range 1000 {
		if ok, _ := newRateLimit(0).allow(numberedIPv4(1)); !ok {
			t.Fatal("no limit refuses")
		}
		if ok, _ := newRateLimit(1).allow(network{}); !ok {
			t.Fatal("an exempt caller is refused")
		}
	}
}

// Whoever waits exactly as long as told gets in, and nobody gets in much earlier.
func TestRetryAfterIsTrue(t *testing.T) {
	awkward := []int{1, 3, 6, 7, 11, 13, 59, 60, 61, 97, 999, 12_345}
	synctest.Test(t, func(t *testing.T) {
		for _, n := range awkward {
			l, who := newRateLimit(n), numberedIPv4(n)
			for range n {
				l.allow(who)
			}
			for range 20 {
				ok, wait := l.allow(who)
				if ok || wait <= 0 {
					t.Fatalf("%d a minute: %v, %v", n, ok, wait)
				}
				time.Sleep(wait - time.Microsecond)
				if ok, _ := l.allow(who); ok {
					t.Errorf("%d a minute: passed before the %v were over", n, wait)
				}
				time.Sleep(time.Microsecond)
				if ok, wait := l.allow(who); !ok {
					t.Errorf("%d a minute: after the wait, %v more", n, wait)
				}
			}
		}
	})
	over, cancel := context.WithCancel(ctx)
	cancel() // whoever would have to wait is refused
	synctest.Test(t, func(t *testing.T) {
		for _, n := range awkward[:9] {
			g, who := newGuessBudget(n, 7*time.Minute), numberedIPv4(n)
			for code := range n {
				guessWrong(t, g, who, fmt.Sprint(code))
			}
			for i := range 20 {
				done, wait := g.begin(ctx, who, "x")
				if done != nil || wait <= 0 {
					t.Fatalf("%d a window: not refused, or to wait %v", n, wait)
				}
				time.Sleep(wait - time.Microsecond)
				if done, _ := g.begin(ctx, who, "x"); done != nil {
					t.Errorf("%d a window: passed before the %v were over", n, wait)
					done(false)
				}
				time.Sleep(time.Microsecond)
				done, wait = g.begin(ctx, who, "x")
				if done == nil {
					t.Errorf("%d a window: after the wait, %v more", n, wait)
					continue
				}
				// At this very moment one guess may be made, not any number of them.
				if again, _ := g.begin(over, who, "y"); again != nil {
					t.Errorf("%d a window: two guesses pass for one token", n)
					break
				}
				done(false)
				guessWrong(t, g, who, fmt.Sprint("wrong ", i))
			}
		}
	})
}

// A refusal of the site costs its networks nothing.
func TestRateLimitSites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := &rateLimit{newBuckets(60), newBuckets(siteShare * 60)}
		for i := range siteShare * 60 {
			if ok, _ := l.allow(subnetIPv6(0, i%100)); !ok {
				t.Fatalf("refused after %d", i)
			}
		}
		fresh := subnetIPv6(0, 1000)
		for range 100 {
			if ok, wait := l.allow(fresh); ok || wait != time.Second/siteShare {
				t.Fatalf("%v and wait %v, with nothing left to the site", ok, wait)
			}
		}
		if ok, _ := l.allow(subnetIPv6(1, 0)); !ok {
			t.Error("another site is refused")
		}
		time.Sleep(time.Minute) // the site has all again, and fresh has lost nothing
		for i := range 60 {
			if ok, _ := l.allow(fresh); !ok {
				t.Fatalf("refused after %d of 60", i)
			}
		}
	})
}

// guessWrong makes a wrong guess, which must be allowed.
func guessWrong(t *testing.T, g *guessBudget, n network, code string) {
	t.Helper()
	done, wait := g.begin(ctx, n, code)
	if done == nil {
		t.Fatalf("%s may not guess for %v", n, wait)
	}
	done(true)
}

// wantGuesses fails unless exactly so many different wrong guesses are answered
// now. Their codes begin with series.
func wantGuesses(t *testing.T, g *guessBudget, n network, series string, want int) {
	t.Helper()
	if left := g.left(n); left != want {
		t.Errorf("%s: %d guesses left, want %d", n, left, want)
	}
	answered := 0
	for i := range want + 100 {
		if done, _ := g.begin(ctx, n, fmt.Sprint(series, " ", i)); done != nil {
			done(true)
			answered++
		}
	}
	if answered != want {
		t.Errorf("%s: %d guesses answered, want %d", n, answered, want)
	}
}

func TestGuessBudget(t *testing.T) {
	const window = 10 * time.Minute
	a, b := numberedIPv4(1), numberedIPv4(2)

	t.Run("window", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := newGuessBudget(10, window)
			wantGuesses(t, g, a, "first", 10)
			wantGuesses(t, g, a, "at once", 0)
			wantGuesses(t, g, b, "another", 10)
			time.Sleep(window / 10)
			wantGuesses(t, g, a, "a tenth later", 1)
			time.Sleep(window / 2)
			wantGuesses(t, g, a, "half later", 5)
			time.Sleep(5 * window)
			wantGuesses(t, g, a, "long after", 10)

			// Who never stops guessing gets one budget a window.
			answered := 0
			for i := range 3 * int(window/time.Second) {
				time.Sleep(time.Second)
				if done, _ := g.begin(ctx, a, fmt.Sprint(i)); done != nil {
					done(true)
					answered++
				}
			}
			if answered != 30 {
				t.Errorf("%d guesses in three windows, want 30", answered)
			}
		})
	})

	t.Run("right guesses", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := newGuessBudget(10, window)
			for i := range 1000 {
				done, _ := g.begin(ctx, a, fmt.Sprint(i))
				if done == nil {
					t.Fatal("refused after right guesses only")
				}
				done(false)
			}
			wantGuesses(t, g, a, "wrong", 10)
			if done, wait := g.begin(ctx, a, "right"); done != nil || wait != window/10 {
				t.Errorf("a right guess is answered, or must wait %v, with the budget used up", wait)
			}
		})
	})

	t.Run("repeated", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := newGuessBudget(10, window)
			for range 1000 {
				guessWrong(t, g, a, "1234")
				guessWrong(t, g, a, "4321")
			}
			if left := g.left(a); left != 8 {
				t.Errorf("two wrong guesses, repeated: %d left, want 8", left)
			}
			guessWrong(t, g, b, "1234")
			if left := g.left(b); left != 9 {
				t.Errorf("the wrong guess of another address does not count: %d left", left)
			}
			wantGuesses(t, g, a, "others", 8)
			if done, _ := g.begin(ctx, a, "1234"); done != nil {
				t.Error("with the budget used up, what was wrong before is answered")
			}
			// Within the window it never counts again, though the bucket refills.
			time.Sleep(window - time.Second)
			guessWrong(t, g, a, "1234")
			if left := g.left(a); left != 9 {
				t.Errorf("a repeated guess counts again within the window: %d left", left)
			}
			time.Sleep(2 * window)
			guessWrong(t, g, a, "1234")
			if left := g.left(a); left != 9 {
				t.Errorf("after the window a guess is another one: %d left, want 9", left)
			}
		})
	})

	t.Run("remembers no more than a window", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g, most := newGuessBudget(10, window), 0
			for i := range 2000 {
				time.Sleep(10 * time.Second)
				if done, _ := g.begin(ctx, a, fmt.Sprint(i)); done != nil {
					done(true)
				}
				g.networks.with(a, func(e *guesser) { most = max(most, len(e.wrong)) })
			}
			if most > 2*10+1 {
				t.Errorf("%d wrong guesses remembered", most)
			}
		})
	})

	t.Run("at once", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			// In each round as many as may begin before anyone is answered, or not;
			// the rest waits for their answers.
			for _, together := range []bool{true, false} {
				g := newGuessBudget(10, window)
				var answered, right atomic.Int64
				var all sync.WaitGroup
				begun, start := make(chan struct{}), make(chan struct{})
				for i := range 1000 {
					all.Go(func() {
						<-start
						done, wait := g.begin(ctx, a, fmt.Sprint(i))
						if together {
							<-begun
						}
						switch {
						case done == nil && wait <= 0:
							t.Error("refused without a time to wait")
						case done != nil && i%4 == 0:
							right.Add(1)
							done(false)
						case done != nil:
							answered.Add(1)
							done(true)
						}
					})
				}
				close(start)
				synctest.Wait()
				close(begun)
				all.Wait()
				if n := answered.Load(); n != 10 {
					t.Errorf("together %v: %d wrong and %d right answers, want 10 wrong", together, n, right.Load())
				}
				if left := g.left(a); left != 10-int(answered.Load()) {
					t.Errorf("together %v: %d left after %d wrong answers", together, left, answered.Load())
				}
				g.networks.with(a, func(e *guesser) {
					if e.pending != 0 {
						t.Errorf("%d guesses are pending for ever", e.pending)
					}
				})
			}
		})
	})

	// Redis may take its time to answer: that must not refill the bucket twice.
	t.Run("slow answer", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			g := newGuessBudget(10, window)
			for i := range 9 {
				guessWrong(t, g, a, fmt.Sprint(i))
			}
			slow, _ := g.begin(ctx, a, "slow")
			time.Sleep(window / 10)
			guessWrong(t, g, a, "quick") // from the refill
			slow(true)
			wantGuesses(t, g, a, "more", 0)
		})
	})

	t.Run("none", func(t *testing.T) {
		g := newGuessBudget(0, window)
		if g != nil {
			t.Error("REDEEM_FAILS=0 is a budget")
		}
		limited := newGuessBudget(1, window)
		for i := range 1000 {
			guessWrong(t, g, a, fmt.Sprint(i))
			guessWrong(t, limited, network{}, fmt.Sprint(i))
		}
		if g.left(a) != -1 || limited.left(network{}) != -1 {
			t.Error("guesses without a bound are counted")
		}
		if n := tableSize(limited.networks) + tableSize(limited.sites); n != 0 {
			t.Errorf("%d entries for exempt callers", n)
		}
	})
}

func TestGuessBudgetIPv6(t *testing.T) {
	const window = 10 * time.Minute
	synctest.Test(t, func(t *testing.T) {
		g := newGuessBudget(10, window)
		// Addresses of one /64 are one guesser.
		low, high := netip.MustParseAddr("2001:db8:1:2::1"), netip.MustParseAddr("2001:db8:1:2:ffff::9")
		wantGuesses(t, g, networkOf(low), "low", 10)
		wantGuesses(t, g, networkOf(high), "high", 0)

		// A /48 has eight budgets, whichever of its networks spend them.
		total := 0
		for subnet := range 40 {
			for i := range 10 {
				if done, _ := g.begin(ctx, subnetIPv6(7, subnet), fmt.Sprint(i)); done != nil {
					done(true)
					total++
				}
			}
		}
		if total != 80 {
			t.Errorf("%d guesses from one /48, want 80", total)
		}
		fresh := subnetIPv6(7, 1000)
		if left := g.left(fresh); left != 0 {
			t.Errorf("%d guesses left in a /48 that has used up its own", left)
		}
		done, wait := g.begin(ctx, fresh, "x")
		if done != nil || wait != window/80 {
			t.Errorf("a fresh /64 of it is answered, or must wait %v, not %v", wait, window/80)
		}
		g.networks.with(fresh, func(e *guesser) {
			if e.pending != 0 {
				t.Errorf("a guess refused for the /48 is pending in the /64")
			}
		})
		time.Sleep(wait)
		wantGuesses(t, g, fresh, "after the wait", 1)
		wantGuesses(t, g, subnetIPv6(8, 0), "another /48", 10)

		// Repeated and right guesses cost the /48 nothing either.
		for range 200 {
			guessWrong(t, g, subnetIPv6(9, 0), "1234")
			if done, _ := g.begin(ctx, subnetIPv6(9, 1), "right"); done != nil {
				done(false)
			}
		}
		site, _ := siteOf(subnetIPv6(9, 0))
		g.sites.with(site, func(e *guesser) {
			if left := e.tokens.Tokens(); left != 79 || e.pending != 0 {
				t.Errorf("the /48 has %v tokens and %d pending, want 79 and 0", left, e.pending)
			}
		})
	})
}

// Whoever made room for others in the table while a guess was under way must
// not leave debts behind.
func TestGuessBudgetEviction(t *testing.T) {
	g := newGuessBudget(3, time.Minute)
	g.networks.max = 2
	done, _ := g.begin(ctx, numberedIPv4(1), "x")
	guessWrong(t, g, numberedIPv4(2), "y")
	guessWrong(t, g, numberedIPv4(3), "z")
	done(true)
	g.networks.with(numberedIPv4(1), func(e *guesser) {
		if left := e.tokens.Tokens(); e.pending != 0 || math.Round(left) != 2 {
			t.Errorf("%d pending and %v tokens, want 0 and 2", e.pending, left)
		}
	})
}

func TestSlidingCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const window = 10 * time.Minute
		c := slidingCount{window: window}
		want := func(n int) {
			t.Helper()
			if got := c.count(); got != n {
				t.Errorf("%d events, want %d", got, n)
			}
		}
		want(0)
		c.add(100)
		want(100)
		time.Sleep(window - time.Nanosecond)
		want(100)
		time.Sleep(time.Nanosecond)
		want(100)
		time.Sleep(window / 4)
		want(75)
		c.add(8)
		want(83)
		time.Sleep(window / 2)
		want(25 + 8)
		time.Sleep(window / 4)
		want(8)
		time.Sleep(window / 2)
		want(4)
		time.Sleep(window / 2)
		want(0)
		c.add(5)
		time.Sleep(100 * window)
		want(0)
		c.add(7)
		want(7)

		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				for range 10 {
					c.add(1)
					c.count()
				}
			})
		}
		all.Wait()
		want(1007)
	})
}

func TestQuota(t *testing.T) {
	a, b := numberedIPv4(1), numberedIPv4(2)
	try := func(t *testing.T, what string, ok bool, wait time.Duration, wantOK bool, wantWait time.Duration) {
		t.Helper()
		if ok != wantOK || wait != wantWait {
			t.Errorf("%s: %v and wait %v, want %v and %v", what, ok, wait, wantOK, wantWait)
		}
	}

	t.Run("take and give", func(t *testing.T) {
		q := newQuota(2)
		take := func(what string, n network, want bool) {
			t.Helper()
			ok, wait := q.take(n)
			try(t, what, ok, wait, want, 0) // who knows when something is given back
		}
		take("first", a, true)
		take("second", a, true)
		take("third", a, false)
		take("fourth", a, false)
		take("another network", b, true)
		q.give(a)
		take("after one was given back", a, true)
		take("and one too many", a, false)
		q.give(a)
		q.give(a)
		q.give(b)
		q.give(b) // nothing is held: no credit
		if len(q.held) != 0 {
			t.Errorf("%d networks remembered that hold nothing", len(q.held))
		}
		take("b", b, true)
		take("b", b, true)
		take("b", b, false)
	})

	t.Run("until", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			q := newQuota(3)
			until := func(what string, n network, d time.Duration, want bool, wantWait time.Duration) {
				t.Helper()
				ok, wait := q.takeUntil(n, time.Now().Add(d))
				try(t, what, ok, wait, want, wantWait)
			}
			until("first", a, time.Minute, true, 0)
			until("second, which expires earlier", a, 10*time.Second, true, 0)
			until("third, in between", a, 30*time.Second, true, 0)
			until("one too many", a, time.Second, false, 10*time.Second)
			until("another network", b, time.Hour, true, 0)
			time.Sleep(10*time.Second - time.Nanosecond)
			until("a moment too early", a, time.Second, false, 1)
			time.Sleep(time.Nanosecond)
			until("as one expires", a, time.Minute, true, 0)
			until("but only one", a, time.Minute, false, 20*time.Second)

			// What is open counts with what expires.
			time.Sleep(time.Minute)
			if ok, _ := q.take(a); !ok {
				t.Error("all has expired, and yet refused")
			}
			until("beside an open one", a, time.Minute, true, 0)
			until("beside an open one", a, 2*time.Minute, true, 0)
			until("beside an open one", a, time.Minute, false, time.Minute)
			ok, wait := q.take(a)
			try(t, "open beside those that expire", ok, wait, false, time.Minute)
			q.give(a)
			until("after that was given back", a, time.Minute, true, 0)
		})
	})

	t.Run("give early", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			q, now := newQuota(3), time.Now()
			soon, later := now.Add(time.Minute), now.Add(time.Hour)
			for _, until := range []time.Time{later, soon, soon} {
				q.takeUntil(a, until)
			}
			q.giveEarly(a, now.Add(time.Second)) // of nobody's
			q.giveEarly(b, soon)
			if ok, wait := q.take(a); ok || wait != time.Minute {
				t.Errorf("what was never taken was given back: %v, %v", ok, wait)
			}
			q.giveEarly(a, soon) // one of two alike
			if h := q.held[a]; !slices.Equal(h.expires, []time.Time{soon, later}) {
				t.Errorf("left are %v", h.expires)
			}
			q.giveEarly(a, later)
			q.giveEarly(a, soon)
			if len(q.held) != 0 {
				t.Error("a network is remembered that holds nothing")
			}
		})
	})

	t.Run("sweep", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			q := newQuota(10)
			for i := range 1000 {
				q.takeUntil(numberedIPv4(i), time.Now().Add(time.Duration(i+1)*time.Second))
				q.take(numberedIPv4(i % 5))
				q.give(numberedIPv4(i % 5))
			}
			q.take(a)
			time.Sleep(500 * time.Second)
			q.sweep()
			if n := len(q.held); n != 501 { // a, with one open
				t.Errorf("%d networks remembered, want 501", n)
			}
			time.Sleep(500 * time.Second)
			q.sweep()
			if h := q.held[a]; len(q.held) != 1 || h == nil || h.open != 1 || len(h.expires) != 0 {
				t.Errorf("%d networks remembered, want the one that holds something", len(q.held))
			}
		})
	})

	t.Run("no limit", func(t *testing.T) {
		none, one := newQuota(0), newQuota(1)
		for range 100 {
			for _, q := range []*quota{none, one} {
				n := a
				if q == one {
					n = network{} // exempt
				}
				ok, _ := q.take(n)
				okUntil, _ := q.takeUntil(n, time.Now().Add(time.Hour))
				if !ok || !okUntil {
					t.Fatal("refused without a limit")
				}
				q.give(n)
				q.giveEarly(n, time.Now())
			}
		}
		if len(none.held)+len(one.held) != 0 {
			t.Error("something is counted without a limit")
		}
	})

	// One site can have 65,536 networks.
	t.Run("sites", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			q, other := newQuota(2), subnetIPv6(1, 0)
			if siteShare != 8 {
				t.Errorf("a site holds %d times as much, and docs/security.md says 8", siteShare)
			}
			soon := time.Now().Add(time.Minute)
			for i := range siteShare {
				q.take(subnetIPv6(0, i))
				q.takeUntil(subnetIPv6(0, i), soon)
			}
			ok, wait := q.take(subnetIPv6(0, 9))
			try(t, "another network of a full site", ok, wait, false, time.Minute)
			ok, wait = q.takeUntil(subnetIPv6(0, 9), soon)
			try(t, "another network of a full site", ok, wait, false, time.Minute)
			ok, wait = q.take(other)
			try(t, "another site", ok, wait, true, 0)
			q.give(subnetIPv6(0, 9)) // holds nothing: no credit
			q.giveEarly(subnetIPv6(0, 9), soon)
			ok, _ = q.take(subnetIPv6(0, 9))
			try(t, "after nothing was given back", ok, 0, false, 0)
			q.give(subnetIPv6(0, 0))
			ok, _ = q.take(subnetIPv6(0, 9))
			try(t, "after one was given back", ok, 0, true, 0)
			ok, _ = q.take(subnetIPv6(0, 9))
			try(t, "and one too many", ok, 0, false, 0)
			q.giveEarly(subnetIPv6(0, 1), soon)
			ok, _ = q.take(subnetIPv6(0, 9))
			try(t, "after one was given back early", ok, 0, true, 0)

			time.Sleep(time.Minute)
			q.sweep()
			if n := len(q.held); n != siteShare+1+2 { // networks with one open, and two sites
				t.Errorf("%d remembered, want %d", n, siteShare+3)
			}
			for i := range siteShare {
				q.give(subnetIPv6(0, i))
			}
			q.give(subnetIPv6(0, 9))
			q.give(subnetIPv6(0, 9))
			q.give(other)
			if len(q.held) != 0 {
				t.Errorf("%d remembered that hold nothing", len(q.held))
			}
		})
	})

	t.Run("at once", func(t *testing.T) {
		q := newQuota(10)
		var held, most atomic.Int64
		var all sync.WaitGroup
		for range 100 {
			all.Go(func() {
				for range 100 {
					if ok, _ := q.take(a); ok {
						n := held.Add(1)
						for old := most.Load(); n > old && !most.CompareAndSwap(old, n); old = most.Load() {
						}
						held.Add(-1)
						q.give(a)
					}
				}
			})
		}
		all.Wait()
		if most.Load() > 10 || len(q.held) != 0 {
			t.Errorf("%d held at once, %d networks remembered; want at most 10, and none", most.Load(), len(q.held))
		}
	})
}

// The janitor forgets networks whose codes have expired without being asked.
func TestLimitsForget(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false")
		for range 3 {
			ts.mint()
		}
		held := func() int {
			q := ts.limits.codes
			q.mu.Lock()
			defer q.mu.Unlock()
			return len(q.held)
		}
		if n := held(); n != 1 {
			t.Errorf("%d networks hold codes, want 1", n)
		}
		time.Sleep(ts.cfg.roomTTL + 15*time.Second)
		if n := held(); n != 0 {
			t.Errorf("%d networks are remembered after their codes expired", n)
		}
	})
}
