package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/redis/go-redis/v9"
)

// --- Redis for tests.

// newTestStore returns a store over a connection pool of its own.
func newTestStore(t testing.TB, o redis.Options) *redisStore {
	r := newRedisStore(redisAddress{single: &o}, slog.New(slog.NewTextHandler(io.Discard, nil)), newRedisMetrics(newMetrics()))
	t.Cleanup(func() { r.client.Close() })
	return r
}

// startHub runs a hub until the returned function is called, which waits for it.
func startHub(h *redisHub) (stop func()) {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { h.Run(ctx) })
	return func() {
		cancel()
		running.Wait()
	}
}

// miniEnv runs the suite over miniredis, on the clock of a bubble.
func miniEnv() hubEnv {
	var options redis.Options // of the scenario that runs
	env := memoryEnv()
	run := env.run
	env.run = func(t *testing.T, scenario func(*testing.T)) {
		run(t, func(t *testing.T) {
			m := miniredis.NewMiniRedis()
			m.ClockTTL(true)
			t.Cleanup(m.Close)
			options = redis.Options{
				Dialer:   func(context.Context, string, string) (net.Conn, error) { return m.Dial() },
				PoolSize: 1000, // nobody may wait for a turn: the library's timers are those of the whole process
			}
			scenario(t)
		})
	}
	env.newHub = func(t *testing.T, o hubOptions) hub {
		h := newRedisHub(o, newTestStore(t, options), time.Minute, redisClock)
		t.Cleanup(startHub(h))
		synctest.Wait()
		return h
	}
	env.waiting = redisWaiting
	env.few = 4
	env.sweep = nil
	env.check = func(h hub) error { return redisInvariants(h.(*redisHub).client) }
	return env
}

func TestMiniredisHub(t *testing.T) {
	t.Parallel()
	testHub(t, miniEnv())
}

// redisWaiting returns the bytes that Redis says wait in mailboxes.
func redisWaiting(h hub) int64 {
	var client *redis.Client
	switch h := h.(type) {
	case *redisHub:
		client = h.client
	case *spreadHub:
		client = h.hubs[0].client
	}
	n, _ := client.HGet(ctx, "parley:queued", "all").Int64()
	return n
}

// redisInvariants checks what must hold of all that is in Redis whenever no
// call is under way.
func redisInvariants(client *redis.Client) error {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	keys, err := client.Keys(ctx, "parley:*").Result()
	if err != nil {
		return err
	}
	all, sessions, rooms := 0, 0, 0
	known := make(map[string]bool)
	for _, key := range keys {
		const expired = -2
		if ttl, err := client.PTTL(ctx, key).Result(); ttl == expired {
			continue // just now
		} else if err != nil || ttl < 0 {
			fail("%s lives on: %v, %v", key, ttl, err)
		}
		id, ok := strings.CutPrefix(key, "parley:{")
		if !ok {
			continue
		}
		id, rest, _ := strings.Cut(id, "}")
		known[id] = true
		if rest != "" {
			continue
		}
		sessions++
		f, err := client.HGetAll(ctx, key).Result()
		if err != nil {
			return err
		}
		names := []string{"A", "B"}
		if f["k"] == "r" {
			rooms++
			names = strings.FieldsFunc(f["M"], func(r rune) bool { return r == '\n' })
			if got, _ := client.Get(ctx, "parley:room:"+f["n"]).Result(); got != id {
				fail("code %s leads to %q", f["n"], got)
			}
		}
		bytes := 0
		for _, name := range names {
			n, err := redisSeatInvariants(client, key, name, f)
			if err != nil {
				fail("seat %s of %s: %w", name, id, err)
			}
			bytes += n
		}
		if n, _ := client.HGet(ctx, "parley:queued", id).Int(); n != bytes {
			fail("%s: %d bytes counted, %d wait", id, n, bytes)
		}
		if client.ZScore(ctx, "parley:sessions", id).Err() != nil {
			fail("%s is not to be swept", id)
		}
		all += bytes
	}
	for id := range known {
		if n, _ := client.Exists(ctx, "parley:{"+id+"}").Result(); n == 0 {
			fail("something is left of %s", id)
		}
	}
	if n, _ := client.HGet(ctx, "parley:queued", "all").Int(); n != all {
		fail("%d bytes counted, %d wait", n, all)
	}
	if n, _ := client.SCard(ctx, "parley:rooms").Result(); int(n) != rooms {
		fail("%d rooms counted, %d there", n, rooms)
	}
	return errors.Join(errs...)
}

func redisSeatInvariants(client *redis.Client, key, name string, f map[string]string) (bytes int, err error) {
	queue, err := client.LRange(ctx, key+":q:"+name, 0, -1).Result()
	if err != nil {
		return 0, err
	}
	events := 0
	for _, text := range queue {
		frame, ok := decodeRedisFrame(text)
		if !ok {
			return 0, fmt.Errorf("a frame nobody can read: %q", text)
		}
		if frame.kind == kindPresence {
			events++
		}
		bytes += frame.size()
	}
	mail, err := client.XRange(ctx, key+":m:"+name, "-", "+").Result()
	if err != nil {
		return 0, err
	}
	mailed := 0
	for _, entry := range mail {
		mailed += len(entry.Values["d"].(string))
	}
	number := func(field string) int {
		n, _ := strconv.Atoi(f[name+":"+field])
		return n
	}
	if number("q") != bytes || number("u") != events || number("b") != mailed {
		return 0, fmt.Errorf("%d bytes, %d events and %d bytes of mail counted; %d, %d and %d wait",
			number("q"), number("u"), number("b"), bytes, events, mailed)
	}
	holder, away := f[name+":h"], f[name+":a"]
	if holder == "" && events > 0 {
		return 0, errors.New("presence waits for nobody")
	}
	if holder != "" && away != "" || away != "" && f[name+":c"] == "" {
		return 0, fmt.Errorf("held by %q, reserved until %q for %q", holder, away, f[name+":c"])
	}
	seat := key[len("parley:{"):len(key)-1] + " " + name
	if (client.ZScore(ctx, "parley:away", seat).Err() == nil) != (away != "") {
		return 0, errors.New("its reservation has no end")
	}
	if instance, _, ok := strings.Cut(holder, ":"); ok {
		if in, _ := client.SIsMember(ctx, "parley:seats:"+instance, seat).Result(); !in {
			return 0, errors.New("its instance does not know")
		}
	}
	return bytes + mailed, nil
}

// A redisServer is a real redis-server.
type redisServer struct {
	t    testing.TB
	addr string
	args []string
	cmd  *exec.Cmd
}

// startRedis starts a redis-server on a free port, which ends with the test.
func startRedis(t testing.TB, args ...string) *redisServer {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Fatal("redis-server is needed:", err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &redisServer{t: t, addr: free.Addr().String()}
	free.Close()
	_, port, _ := net.SplitHostPort(s.addr)
	s.args = append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", t.TempDir(), "--loglevel", "warning"}, args...)
	s.start()
	t.Cleanup(s.stop)
	return s
}

func (s *redisServer) start() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.args...)
	out, err := s.cmd.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
		}
	}()
	eventually(s.t, "redis-server listens", func() bool {
		c, err := net.Dial("tcp", s.addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
}

func (s *redisServer) stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// client returns a client for the test's own use.
func (s *redisServer) client() *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: s.addr, DisableIdentity: true, PoolSize: 4})
	s.t.Cleanup(func() { c.Close() })
	return c
}

// A testClock is the time as scripts know it in a test over a real Redis, whose
// own cannot be set: a key in it. It stands still unless it is advanced.
const testClock = `
local function clock()
  return tonumber(redis.call('GET', 'test:clock'))
end
`

// A spreadHub is several instances over one Redis, of which each call takes
// another.
type spreadHub struct {
	hubs []*redisHub
	next atomic.Uint64
}

func (s *spreadHub) any() *redisHub { return s.hubs[s.next.Add(1)%uint64(len(s.hubs))] }

func (s *spreadHub) Open(ctx context.Context, m meta) error { return s.any().Open(ctx, m) }
func (s *spreadHub) Find(ctx context.Context, code string) (sessionID, error) {
	return s.any().Find(ctx, code)
}
func (s *spreadHub) Get(ctx context.Context, id sessionID) (meta, int, error) {
	return s.any().Get(ctx, id)
}
func (s *spreadHub) Update(ctx context.Context, id sessionID, c change) (meta, int, error) {
	return s.any().Update(ctx, id, c)
}
func (s *spreadHub) End(ctx context.Context, id sessionID, why error) error {
	return s.any().End(ctx, id, why)
}
func (s *spreadHub) Join(ctx context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	return s.any().Join(ctx, id, r, notify)
}
func (s *spreadHub) Tell(ctx context.Context, id sessionID, e event) error {
	return s.any().Tell(ctx, id, e)
}
func (s *spreadHub) Ready(ctx context.Context) error { return s.any().Ready(ctx) }
func (s *spreadHub) Run(context.Context) error       { return nil }

// redisEnv runs the suite over three instances and a real Redis.
func redisEnv(suite *testing.T) hubEnv {
	t := suite // or of the scenario that runs
	server := startRedis(suite)
	client := server.client()
	var spread *spreadHub
	env := memoryEnv()
	env.run = func(scene *testing.T, scenario func(*testing.T)) {
		spread, t = nil, scene
		client.FlushAll(ctx)
		client.Set(ctx, "test:clock", mailEpoch.AddDate(1, 0, 0).UnixMicro(), 0)
		scenario(t)
	}
	env.newHub = func(t *testing.T, o hubOptions) hub {
		spread = new(spreadHub)
		for range 3 {
			h := newRedisHub(o, newTestStore(t, redis.Options{Addr: server.addr}), 20*time.Second, testClock)
			t.Cleanup(startHub(h))
			spread.hubs = append(spread.hubs, h)
		}
		for _, h := range spread.hubs {
			eventually(t, "the hub hears", func() bool { return h.Ready(ctx) == nil })
		}
		return spread
	}
	env.now = func() time.Time {
		n, err := client.Get(ctx, "test:clock").Int64()
		if err != nil {
			t.Fatal(err)
		}
		return time.UnixMicro(n)
	}
	env.sleep = func(d time.Duration) {
		client.IncrBy(ctx, "test:clock", d.Microseconds())
		if spread == nil {
			return
		}
		for range 2 { // what is due, and what that makes due
			for _, h := range spread.hubs {
				if _, err := h.tick(ctx); err != nil {
					t.Error(err)
				}
			}
		}
	}
	env.settle = func() {
		if spread == nil {
			return
		}
		for _, h := range spread.hubs {
			h.barrier(t)
		}
	}
	env.waiting = redisWaiting
	env.few = 10
	env.sweep = nil
	env.check = func(h hub) error { return redisInvariants(client) }
	return env
}

// barrier returns once all that was published for the hub has been delivered.
func (h *redisHub) barrier(t testing.TB) {
	t.Helper()
	reached := make(chan struct{})
	number := h.number.Add(1)
	h.mu.Lock()
	h.seats[number] = &redisSeat{hub: h, notify: func(error) { close(reached) }}
	h.mu.Unlock()
	defer func() {
		h.mu.Lock()
		delete(h.seats, number)
		h.mu.Unlock()
	}()
	if err := h.client.Publish(ctx, wakeChannel(h.instance), fmt.Sprint("n", number)).Err(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-reached:
	case <-time.After(10 * time.Second):
		t.Fatal("a notification did not arrive")
	}
}

func TestRedisHub(t *testing.T) {
	t.Parallel()
	testHub(t, redisEnv(t))
}
