package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
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
)

func TestRedisURL(t *testing.T) {
	for _, tc := range []struct{ url, addr, user, password, name string }{
		{"redis://a", "a:6379", "", "", ""},
		{"redis://:p%40ss@a:1/2", "a:1", "", "p@ss", ""},
		{"rediss://me:p@[::1]:1", "[::1]:1", "me", "p", ""},
		{"redis+sentinel://a/main", "a:26379", "", "", "main"},
		{"redis+sentinel://me:p%40ss@a:1,[::1],b:3/main/2", "a:1,[::1]:26379,b:3", "me", "p@ss", "main"},
		{"redis+sentinel://p@a,b/main?db=2", "a:26379,b:26379", "", "p", "main"},
		{"rediss+sentinel://a:1/main", "a:1", "", "", "main"},
	} {
		a, err := parseRedisURL(tc.url)
		if err != nil {
			t.Errorf("%s: %v", tc.url, err)
			continue
		}
		if o := a.sentinels; o != nil {
			if got := strings.Join(o.SentinelAddrs, ","); got != tc.addr || o.Username != tc.user || o.Password != tc.password || o.MasterName != tc.name ||
				(o.TLSConfig != nil) != strings.HasPrefix(tc.url, "rediss") || strings.Contains(tc.url, "2") != (o.DB == 2) && strings.Contains(tc.url, "main") && strings.HasSuffix(tc.url, "2") {
				t.Errorf("%s: %+v", tc.url, o)
			}
		} else if o := a.single; o.Addr != tc.addr || o.Username != tc.user || o.Password != tc.password || (o.TLSConfig != nil) != strings.HasPrefix(tc.url, "rediss") || tc.name != "" {
			t.Errorf("%s: %+v", tc.url, o)
		}
	}
	for url, want := range map[string]string{
		"redis://a:1,b:2":          "Cluster",
		"redis+cluster://a:1":      "Cluster",
		"redis://me:secret@a:port": "must be a URL",
		"redis+sentinel://a":       "name",
	} {
		if _, err := parseRedisURL(url); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %v, want an error with %q", url, err, want)
		}
	}
}

// What can never work stops the start, and says why.
func TestRedisUnfit(t *testing.T) {
	cluster, locked := testkit.StartRedis(t, "--cluster-enabled", "yes"), testkit.StartRedis(t, "--requirepass", "secret")
	for addr, want := range map[string]string{
		"redis://" + cluster.Addr:              "Redis Cluster cannot be used",
		"redis://" + locked.Addr:               "refuses the user name or password",
		"redis://me:hunter2@" + locked.Addr:    "refuses the user name or password",
		"redis+cluster://" + cluster.Addr:      "Redis Cluster cannot be used",
		"redis://" + locked.Addr + ",b:6379/0": "Redis Cluster cannot be used",
	} {
		var stderr bytes.Buffer
		exit := run([]string{"-host", "127.0.0.1", "-port", "0", "-redis-url", addr}, environ(), io.Discard, &stderr)
		if exit == 0 || !strings.Contains(stderr.String(), want) || strings.Contains(stderr.String(), "hunter2") {
			t.Errorf("%s: exit status %d, want an error with %q:\n%s", addr, exit, want, stderr.String())
		}
	}
}

func TestRedisTLS(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 7)
	certificate, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	m := miniredis.NewMiniRedis()
	if err := m.StartTLS(&tls.Config{Certificates: []tls.Certificate{certificate}}); err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	m.RequireUserAuth("me", "secret")
	trusting, _ := newLoopServer(t, "REDIS_URL=rediss://me:secret@"+m.Addr()+"?skip_verify=true")
	testkit.Eventually(t, "it is ready", func() bool { return trusting.call(http.MethodGet, "/readyz", "").status == http.StatusOK })
	strict, _ := newLoopServer(t, "REDIS_URL=rediss://me:secret@"+m.Addr())
	if a := strict.call(http.MethodGet, "/readyz", ""); a.status != http.StatusServiceUnavailable {
		t.Errorf("with a certificate that nobody vouches for: %d %s", a.status, a.text)
	}
}

// A codesEnv is what the tests of every implementation of codes ask of it.
type codesEnv struct {
	run      func(t *testing.T, scenario func(*testing.T))
	newCodes func(t *testing.T, o codeOptions) testCodes
	sleep    func(time.Duration)
	unit     time.Duration // the shortest time it knows
	full     float64       // the part of a space that may be taken
}

// testCodes are codes of which some can be taken without minting them.
type testCodes interface {
	codes
	// fill takes n codes of a length.
	fill(digits, n int, ttl time.Duration)
	// sweep does what Run does from time to time.
	sweepNow()
	stats() (active, digits int)
}

type memoryCodes struct{ *codeTable }

func (c memoryCodes) fill(digits, n int, ttl time.Duration) {
	fillCodes(c.codeTable, digits, n, time.Now().Add(ttl))
}
func (c memoryCodes) sweepNow() { c.sweep() }

type storedCodes struct {
	*redisCodes
	now func() time.Time
}

func (c storedCodes) fill(digits, n int, ttl time.Duration) {
	key, expires := fmt.Sprint("parley:codes:", digits), float64(c.now().Add(ttl).UnixMicro())
	var all []redis.Z
	for i := range n {
		all = append(all, redis.Z{Score: expires, Member: fmt.Sprintf("%0*d", digits, i)})
		if len(all) == 1000 || i == n-1 {
			c.client.ZAdd(ctx, key, all...)
			all = nil
		}
	}
	c.client.PExpire(ctx, key, ttl+time.Hour)
}
func (c storedCodes) sweepNow() { c.sweep(ctx) }

func memoryCodesEnv() codesEnv {
	return codesEnv{
		run: func(t *testing.T, scenario func(*testing.T)) { synctest.Test(t, scenario) },
		newCodes: func(t *testing.T, o codeOptions) testCodes {
			return memoryCodes{newCodeTable(o)}
		},
		sleep: time.Sleep,
		unit:  time.Nanosecond,
		full:  1,
	}
}

func miniCodesEnv() codesEnv {
	env := memoryCodesEnv()
	env.newCodes = func(t *testing.T, o codeOptions) testCodes {
		m := miniredis.NewMiniRedis()
		m.ClockTTL(true)
		t.Cleanup(m.Close)
		r := newTestStore(t, redis.Options{
			Dialer:   func(context.Context, string, string) (net.Conn, error) { return m.Dial() },
			PoolSize: 1000,
		})
		return storedCodes{newRedisCodes(o, r, redisClock), time.Now}
	}
	env.unit, env.full = time.Microsecond, .9
	return env
}

func redisCodesEnv(t *testing.T) codesEnv {
	server := testkit.StartRedis(t)
	client := server.Client()
	env := codesEnv{
		run: func(t *testing.T, scenario func(*testing.T)) {
			client.FlushAll(ctx)
			client.Set(ctx, "test:clock", time.Now().UnixMicro(), 0)
			scenario(t)
		},
		newCodes: func(t *testing.T, o codeOptions) testCodes {
			return storedCodes{newRedisCodes(o, newTestStore(t, redis.Options{Addr: server.Addr}), testClock), func() time.Time {
				n, _ := client.Get(ctx, "test:clock").Int64()
				return time.UnixMicro(n)
			}}
		},
		sleep: func(d time.Duration) { client.IncrBy(ctx, "test:clock", d.Microseconds()) },
		unit:  time.Microsecond,
		full:  .9,
	}
	return env
}

func TestCodesOfMemory(t *testing.T) { testAllCodes(t, memoryCodesEnv()) }
func TestCodesOfMiniredis(t *testing.T) {
	t.Parallel()
	testAllCodes(t, miniCodesEnv())
}

func TestCodesOfRedis(t *testing.T) {
	t.Parallel()
	testAllCodes(t, redisCodesEnv(t))
}

// testAllCodes is the contract that all codes keep.
func testAllCodes(t *testing.T, env codesEnv) {
	for _, s := range []struct {
		name string
		run  func(*codesTest)
	}{
		{"redeem", testCodesRedeem},
		{"lengths", testCodesLengths},
		{"used stay taken", testCodesUsed},
		{"exhausted", testCodesExhausted},
		{"grow", testCodesGrowth},
		{"fall back", testCodesFallBack},
		{"one winner", testCodesWinner},
		{"uniform", testCodesUniform},
		{"at random", testCodesAtRandom},
	} {
		t.Run(s.name, func(t *testing.T) {
			env.run(t, func(t *testing.T) { s.run(&codesTest{T: t, codesEnv: env}) })
		})
	}
}

type codesTest struct {
	*testing.T
	codesEnv
	codes    testCodes
	failures int
	grown    []int
}

func (c *codesTest) make(digits, maxDigits int) testCodes {
	c.codes = c.newCodes(c.T, codeOptions{
		digits: digits, maxDigits: maxDigits,
		failures: func() int { return c.failures },
		grown:    func(digits int) { c.grown = append(c.grown, digits) },
	})
	return c.codes
}

func (c *codesTest) mint(session sessionID, ttl time.Duration) string {
	c.Helper()
	code, _, err := c.codes.Mint(ctx, session, ttl)
	if err != nil {
		c.Fatal("mint:", err)
	}
	return code
}

func (c *codesTest) mints(n, digits int) {
	c.Helper()
	for i := range n {
		if code := c.mint(uuid.New(), time.Minute); len(code) != digits {
			c.Fatalf("code %d of %d is %s, want %d digits", i, n, code, digits)
		}
	}
}

func (c *codesTest) exhausted(retryAfter time.Duration) {
	c.Helper()
	code, _, err := c.codes.Mint(ctx, uuid.New(), time.Minute)
	if e, ok := errors.AsType[*exhaustedError](err); !ok || e.retryAfter != retryAfter {
		c.Errorf("mint: %q, %+v; want exhausted for %v", code, err, retryAfter)
	}
}

func (c *codesTest) redeems(code string, session sessionID, want error) {
	c.Helper()
	if id, _, err := c.codes.Redeem(ctx, code); id != session || !errors.Is(err, want) {
		c.Errorf("redeem of %q: %s, %v; want %s, %v", code, id, err, session, want)
	}
}

func testCodesRedeem(c *codesTest) {
	c.make(4, 5)
	session := uuid.New()
	code, expires, err := c.codes.Mint(ctx, session, time.Minute)
	if err != nil || !validCode(code) {
		c.Fatal(code, err)
	}
	c.redeems(code, session, nil)
	if _, again, err := c.codes.Redeem(ctx, code); !errors.Is(err, errCodeUsed) || !again.Equal(expires) {
		c.Errorf("expires at %v, and redeemed again at %v, %v", expires, again, err)
	}
	c.sleep(time.Minute - c.unit)
	c.redeems(code, session, errCodeUsed)
	late := c.mint(session, time.Minute)
	c.sleep(c.unit)
	c.redeems(code, sessionID{}, errCodeGone)
	c.sleep(time.Minute - 2*c.unit)
	c.redeems(late, session, nil) // at the last moment
	never := c.mint(session, time.Minute)
	c.sleep(time.Minute)
	c.redeems(never, sessionID{}, errCodeGone)
	code = c.mint(session, time.Minute)
	for _, other := range []string{
		"", "0", "0" + code, code + "0", code[:3], "+" + code[1:], " " + code, code + "\n", "-" + code,
		"1234567890", "99999999999999999999", "abcd", "１２３４", "12_34", "0x12",
	} {
		c.redeems(other, sessionID{}, errCodeGone)
	}
	c.redeems(code, session, nil)
}

// A code of one length is not the same number with another.
func testCodesLengths(c *codesTest) {
	c.make(4, 6)
	minted := make(map[string]sessionID)
	for _, failures := range []int{0, 1001, 10_001} {
		c.failures = failures
		for range 20 {
			id := uuid.New()
			minted[c.mint(id, time.Minute)] = id
		}
	}
	lengths := make(map[int]int)
	for code, id := range minted {
		lengths[len(code)]++
		if other := "0" + code; len(other) <= 6 && minted[other] == (sessionID{}) {
			c.redeems(other, sessionID{}, errCodeGone)
		}
		c.redeems(code, id, nil)
	}
	if lengths[4] != 20 || lengths[5] != 20 || lengths[6] != 20 {
		c.Error(lengths)
	}
}

// A redeemed code stays taken until it expires.
func testCodesUsed(c *codesTest) {
	c.make(4, 4)
	c.codes.fill(4, int(c.full*10_000)-1, time.Hour)
	session := uuid.New()
	code := c.mint(session, time.Minute)
	c.redeems(code, session, nil)
	c.exhausted(time.Minute)
	c.sleep(time.Minute - c.unit)
	c.exhausted(c.unit)
	c.sleep(c.unit)
	next := uuid.New()
	c.redeems(c.mint(next, time.Minute), next, nil)
}

// All that may be taken can be minted, and is minted again once it has expired.
func testCodesExhausted(c *codesTest) {
	c.make(4, 4)
	const few = 50
	n := int(c.full*10_000) - few
	c.codes.fill(4, n, 2*time.Minute)
	seen := make(map[string]bool)
	for range few {
		code := c.mint(uuid.New(), time.Minute)
		if seen[code] {
			c.Errorf("%s was minted twice", code)
		}
		seen[code] = true
	}
	c.exhausted(time.Minute)
	c.sleep(time.Minute - c.unit)
	c.exhausted(c.unit)
	c.sleep(c.unit) // nobody but Mint reclaims here
	c.mints(few, 4)
	c.exhausted(time.Minute)
	c.sleep(time.Minute)
	c.codes.sweepNow()
	c.sleep(time.Minute)
	c.codes.sweepNow()
	if active, _ := c.codes.stats(); active != 0 {
		c.Errorf("%d codes are left", active)
	}
}

func testCodesGrowth(c *codesTest) {
	c.make(4, 6)
	c.mints(100, 4) // a hundredth
	c.codes.fill(5, 999, time.Minute)
	c.mints(1, 5)
	c.mints(100, 6)
	c.sleep(time.Minute)
	c.codes.sweepNow()
	c.mints(1, 4)
	if want := "[5 6 4]"; fmt.Sprint(c.grown) != want {
		c.Errorf("grown to %v, want %s", c.grown, want)
	}
	c.failures = 1000 // a tenth is not passed
	c.mints(1, 4)
	c.failures = 1001
	c.mints(1, 5)
	c.failures = 10_001
	c.mints(1, 6)
	c.failures = 1_000_000_000 // there is no further
	c.mints(1, 6)
	c.failures = 0
	c.mints(98, 4)
	c.mints(1, 5)
}

// When the codes of the largest length are all taken, shorter ones do.
func testCodesFallBack(c *codesTest) {
	c.make(4, 5)
	c.codes.fill(4, int(c.full*10_000)-2, 2*time.Hour)
	c.codes.fill(5, int(c.full*100_000)-1, 3*time.Hour)
	last := c.mint(uuid.New(), time.Hour)
	first, second := c.mint(uuid.New(), time.Hour), c.mint(uuid.New(), time.Minute)
	if len(last) != 5 || len(first) != 4 || len(second) != 4 || first == second {
		c.Error(last, first, second)
	}
	c.exhausted(time.Minute)
	c.sleep(time.Minute)
	if again := c.mint(uuid.New(), time.Hour); len(again) != 4 {
		c.Error(again)
	}
	c.exhausted(59 * time.Minute)
}

func testCodesWinner(c *codesTest) {
	c.make(4, 4)
	for range 5 {
		session := uuid.New()
		code := c.mint(session, time.Minute)
		var won, used atomic.Int32
		start := make(chan struct{})
		var redeeming sync.WaitGroup
		for range 50 {
			redeeming.Go(func() {
				<-start
				switch id, _, err := c.codes.Redeem(ctx, code); {
				case id != session:
					c.Error("redeemed for", id, err)
				case err == nil:
					won.Add(1)
				case errors.Is(err, errCodeUsed):
					used.Add(1)
				}
			})
		}
		close(start)
		redeeming.Wait()
		if won.Load() != 1 || used.Load() != 49 {
			c.Fatalf("%d redeemed the code, %d came too late", won.Load(), used.Load())
		}
	}
}

// Codes are uniform among the free ones, also where most are taken.
func testCodesUniform(c *codesTest) {
	c.make(4, 4)
	c.codes.fill(4, 0, time.Hour)
	counts := make([]int, 20)
	for range 1500 {
		code := c.mint(uuid.New(), time.Millisecond)
		n, err := strconv.Atoi(code)
		if err != nil {
			c.Fatal(err)
		}
		counts[n/500]++
		c.sleep(time.Millisecond)
	}
	chiSquare(c.T, counts)
}

// Under any interleaving a code is redeemed at most once, and not minted while
// it is taken.
func testCodesAtRandom(c *codesTest) {
	c.make(4, 4)
	const free = 6
	c.codes.fill(4, int(c.full*10_000)-free, 100*time.Hour)
	random := rand.New(rand.NewPCG(1, 2))
	type minted struct {
		session sessionID
		left    time.Duration
		used    bool
	}
	alive := make(map[string]*minted)
	var known []string
	for i := range 150 {
		switch random.IntN(5) {
		case 0, 1:
			id, ttl := uuid.New(), time.Duration(1+random.IntN(20))*time.Second
			code, _, err := c.codes.Mint(ctx, id, ttl)
			if e, ok := errors.AsType[*exhaustedError](err); ok && len(alive) == free {
				next := time.Hour
				for _, m := range alive {
					next = min(next, m.left)
				}
				if e.retryAfter != next {
					c.Errorf("step %d: exhausted for %v, want %v", i, e.retryAfter, next)
				}
				continue
			}
			if err != nil || alive[code] != nil {
				c.Fatalf("step %d: mint: %q, %v, with %d of %d alive", i, code, err, len(alive), free)
			}
			alive[code] = &minted{session: id, left: ttl}
			known = append(known, code)
		case 2, 3:
			if len(known) == 0 {
				continue
			}
			code := known[max(0, len(known)-1-random.IntN(10))]
			m, want := alive[code], error(nil)
			if m == nil {
				m, want = new(minted), errCodeGone
			} else if m.used {
				want = errCodeUsed
			}
			c.redeems(code, m.session, want)
			m.used = true
		default:
			d := time.Duration(random.IntN(10)) * 500 * time.Millisecond
			c.sleep(d)
			for code, m := range alive {
				if m.left -= d; m.left <= 0 {
					delete(alive, code)
				}
			}
		}
	}
}
