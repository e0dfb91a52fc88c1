//go:build long

package test

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// 1,000 pairs and 50 rooms over three instances, each client at any of them.
func TestLongFleet(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 3, "redis://"+server.Addr)
	start := time.Now()
	atOnce(t, 1000, 50, func(int) error { return f.pair(10) })
	atOnce(t, 50, 10, func(int) error { return f.room(6) })
	t.Logf("1,000 pairs and 50 rooms in %v", time.Since(start).Round(time.Second))
}

// A survivor is one side of a pair that sends numbered mail and comes back,
// anywhere, whatever happens to its connection or its instance.
type survivor struct {
	f           *fleet
	appID, side string
	mails       int

	mu sync.Mutex
	// guarded by mu
	queued map[uint64]uint64 // seq by id: what the server has promised to keep
	got    map[uint64]string // by seq
	last   uint64            // the highest seq it has
	gone   atomic.Bool       // its session is over
}

func (s *survivor) done() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.queued) == s.mails && len(s.got) >= s.mails
}

// run goes on until all is said, received and acknowledged, or time is up.
func (s *survivor) run(deadline time.Time) {
	for !s.done() && time.Now().Before(deadline) && !s.gone.Load() {
		p := s.f.any()
		c, err := s.f.join(p, s.appID, s.side, "secret of "+s.side)
		if err != nil { // the instance is gone, or Redis is
			time.Sleep(50 * time.Millisecond)
			continue
		}
		s.live(c, deadline)
		c.drop()
	}
}

// live is one connection of it.
func (s *survivor) live(c *fleetConn, deadline time.Time) {
	s.mu.Lock()
	last := s.last
	s.mu.Unlock()
	if c.sendf(`{"type":"hello","deliveredUpTo":%d}`, last) != nil {
		return
	}
	stop := make(chan struct{})
	var sending sync.WaitGroup
	defer sending.Wait()
	defer close(stop)
	sending.Go(func() { // what has no receipt is sent again, in order
		for id := uint64(1); id <= uint64(s.mails); id++ {
			s.mu.Lock()
			_, have := s.queued[id]
			s.mu.Unlock()
			if have {
				continue
			}
			if c.sendf(`{"type":"send","id":%d,"payload":"%s %d"}`, id, s.side, id) != nil {
				return
			}
			select {
			case <-stop:
				return
			case <-time.After(time.Duration(20+rand.IntN(60)) * time.Millisecond):
			}
		}
	})
	for time.Now().Before(deadline) && !s.done() {
		c.mu.Lock()
		frames, err := c.frames, c.err
		c.frames = nil
		c.mu.Unlock()
		for _, frame := range frames {
			if !s.take(c, frame) {
				return // to try again
			}
		}
		if err != nil {
			if code := websocket.CloseStatus(err); code == websocket.StatusCode(closeUnknown) {
				s.gone.Store(true)
			}
			return
		}
		select {
		case <-c.came:
		case <-time.After(time.Second):
		}
	}
	c.leave()
}

func (s *survivor) take(c *fleetConn, frame fleetFrame) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch frame.Type {
	case "queued":
		s.queued[frame.ID] = frame.Seq
	case "deliver":
		if old, ok := s.got[frame.Seq]; ok && old != string(frame.Payload) {
			s.f.t.Errorf("seq %d is %s, and was %s", frame.Seq, frame.Payload, old)
		}
		s.got[frame.Seq] = string(frame.Payload)
		s.last = max(s.last, frame.Seq)
		return c.sendf(`{"type":"delivered","upTo":%d}`, s.last) == nil
	case "error":
		return frame.Code != "backend_unavailable"
	}
	return true
}

// survive lets pairs of survivors go on while happen does what it does, and
// fails the test unless all mail with a receipt arrives, each as it was sent.
func (f *fleet) survive(pairs, mails int, within time.Duration, happen func()) {
	f.t.Helper()
	deadline := time.Now().Add(within)
	var all []*survivor
	var living sync.WaitGroup
	for range pairs {
		appID := uuid.NewString()
		for _, side := range []string{"A", "B"} {
			s := &survivor{f: f, appID: appID, side: side, mails: mails, queued: map[uint64]uint64{}, got: map[uint64]string{}}
			all = append(all, s)
			living.Go(func() { s.run(deadline) })
		}
	}
	happen()
	living.Wait()
	for i, s := range all {
		arrived := make(map[string]int) // under how many seqs
		for _, text := range all[i^1].got {
			arrived[text]++
		}
		lost, twice := 0, 0
		for id := range s.queued { // the seq in a repeated receipt may be a later one's
			switch arrived[fmt.Sprintf(`"%s %d"`, s.side, id)] {
			case 0:
				lost++
			case 1:
			default:
				twice++
			}
		}
		if lost > 0 || twice > 0 || len(s.queued) < mails {
			f.t.Errorf("%s of %s: %d of %d mails have a receipt; %d of those did not arrive, %d more than once",
				s.side, s.appID, len(s.queued), mails, lost, twice)
		}
	}
}

// An instance is killed: its clients go on elsewhere, their mail is there, and
// those of other instances learn of it in time.
func TestLongInstanceKilled(t *testing.T) {
	const heartbeat, resume = 2 * time.Second, 4 * time.Second
	server := testkit.StartRedis(t)
	f := startFleet(t, 3, "redis://"+server.Addr, "HEARTBEAT=2s", "RESUME_TTL=4s")
	victim, other := f.all[0], f.all[1]
	type pairOf struct{ lost, stays *fleetConn }
	seat := func(sid string) pairOf {
		appID := uuid.NewString()
		stays, err := f.join(other, appID, "B", "")
		if err != nil {
			t.Fatal(err)
		}
		lost, err := f.join(victim, appID, "A", sid)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := stays.awaitType("peer_joined"); err != nil {
			t.Fatal(err)
		}
		return pairOf{lost, stays}
	}
	claimed, unclaimed := seat("secret"), seat("")
	f.survive(30, 40, 90*time.Second, func() {
		time.Sleep(time.Second) // in the middle of it
		victim.Kill()
		killed := time.Now()
		if _, err := claimed.stays.awaitType("peer_away"); err != nil {
			t.Error(err)
		}
		away := time.Since(killed)
		if _, err := unclaimed.stays.awaitType("peer_left"); err != nil {
			t.Error(err)
		}
		left := time.Since(killed)
		if _, err := claimed.stays.awaitType("peer_left"); err != nil {
			t.Error(err)
		}
		forGood := time.Since(killed)
		t.Logf("away after %v, left after %v, and for good after %v", away, left, forGood)
		if away > 2*heartbeat || left > 2*heartbeat || forGood > 2*heartbeat+resume+time.Second {
			t.Error("too late")
		}
		victim.Restart()
	})
}

// watchReady lets Redis go away and come back, and checks what readiness says.
func (f *fleet) watchReady(t *testing.T, away, back func()) {
	t.Helper()
	away()
	gone := time.Now()
	atOnce(t, len(f.all), len(f.all), func(i int) error {
		testkit.Eventually(t, "an instance says that Redis is away", func() bool { return !f.ready(f.all[i-1]) })
		return nil
	})
	t.Logf("503 after %v", time.Since(gone).Round(time.Millisecond))
	if took := time.Since(gone); took > 2*time.Second {
		t.Errorf("readyz says so after %v", took)
	}
	back()
	there := time.Now()
	atOnce(t, len(f.all), len(f.all), func(i int) error {
		testkit.Eventually(t, "an instance is ready", func() bool { return f.ready(f.all[i-1]) })
		return nil
	})
	t.Logf("200 after %v", time.Since(there).Round(time.Millisecond))
	if took := time.Since(there); took > 5*time.Second {
		t.Errorf("readyz is 200 after %v", took)
	}
}

// sits fails unless both are still connected and frames pass between them.
func sits(t *testing.T, a, b *fleetConn, n int) {
	t.Helper()
	if err := a.sendf(`{"type":"offer","n":%d}`, n); err != nil {
		t.Error(err)
	}
	if _, err := b.await("an offer", func(f fleetFrame) bool { return f.Type == "offer" && f.N == n }); err != nil {
		t.Error(err)
	}
}

// Redis stands still for 5 s: nobody is thrown out, nobody's peer is taken for
// dead, and what cannot be done is said to be so.
func TestLongRedisStopped(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 3, "redis://"+server.Addr, "HEARTBEAT=2s")
	appID := uuid.NewString()
	a, err := f.join(f.all[0], appID, "A", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.join(f.all[1], appID, "B", "")
	if err != nil {
		t.Fatal(err)
	}
	sits(t, a, b, 1)
	f.survive(20, 100, 90*time.Second, func() {
		time.Sleep(time.Second)
		var stopped time.Time
		f.watchReady(t, func() {
			server.Signal(syscall.SIGSTOP)
			stopped = time.Now()
		}, func() {
			if err := a.sendf(`{"type":"send","id":1,"payload":1}`); err != nil {
				t.Error(err)
			}
			if frame, err := a.awaitType("error", "queued"); err != nil || frame.Code != "backend_unavailable" {
				t.Errorf("%+v, %v", frame, err)
			}
			if status, err := f.post(f.any(), "/rendezvous/code", "", nil); err != nil || status != http.StatusServiceUnavailable {
				t.Errorf("mint: %d, %v", status, err)
			}
			time.Sleep(time.Until(stopped.Add(5 * time.Second)))
			server.Signal(syscall.SIGCONT)
		})
	})
	sits(t, a, b, 2)
	sits(t, b, a, 3)
	for _, c := range []*fleetConn{a, b} {
		c.mu.Lock()
		for _, frame := range c.frames {
			if frame.Type == "peer_away" || frame.Type == "peer_left" {
				t.Errorf("%s was told %s", c.name, frame.Type)
			}
		}
		c.mu.Unlock()
	}
}

// Redis is killed and comes back with its data: all goes on.
func TestLongRedisRestarted(t *testing.T) {
	server := testkit.StartRedis(t, "--appendonly", "yes", "--appendfsync", "always")
	f := startFleet(t, 3, "redis://"+server.Addr, "HEARTBEAT=2s")
	appID := uuid.NewString()
	a, err := f.join(f.all[0], appID, "A", "")
	if err != nil {
		t.Fatal(err)
	}
	b, err := f.join(f.all[1], appID, "B", "")
	if err != nil {
		t.Fatal(err)
	}
	f.survive(20, 100, 90*time.Second, func() {
		time.Sleep(time.Second)
		f.watchReady(t, server.Stop, func() {
			time.Sleep(2 * time.Second)
			server.Start()
		})
	})
	sits(t, a, b, 2)
	sits(t, b, a, 3)
}

// Redis is killed and comes back empty: its sessions are over, new ones work.
func TestLongRedisLost(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 3, "redis://"+server.Addr, "HEARTBEAT=2s")
	var conns []*fleetConn
	for i := range 12 {
		c, err := f.join(f.all[i%3], uuid.NewString(), "A", []string{"", "secret"}[i%2])
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	f.watchReady(t, server.Stop, func() {
		time.Sleep(time.Second)
		server.Start()
	})
	atOnce(t, 10, 5, func(int) error { return f.pair(3) })
	back := time.Now()
	for _, c := range conns {
		if code := c.closeCode(); code != websocket.StatusCode(closeUnknown) {
			t.Errorf("closed with %d, want %d", code, closeUnknown)
		}
	}
	t.Logf("closed with %d within %v", closeUnknown, time.Since(back).Round(time.Millisecond))
}

// A cut is a proxy that can be cut.
type cut struct {
	listener net.Listener
	to       string
	mu       sync.Mutex
	closed   bool                  // guarded by mu
	conns    map[net.Conn]struct{} // guarded by mu
}

func newCut(t *testing.T, to string) *cut {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	c := &cut{listener: l, to: to, conns: map[net.Conn]struct{}{}}
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() { c.serve(conn) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		c.set(true)
		serving.Wait()
	})
	return c
}

func (c *cut) serve(conn net.Conn) {
	defer conn.Close()
	far, err := net.Dial("tcp", c.to)
	if err != nil {
		return
	}
	defer far.Close()
	c.mu.Lock()
	closed := c.closed
	c.conns[conn], c.conns[far] = struct{}{}, struct{}{}
	c.mu.Unlock()
	if closed {
		return
	}
	go func() {
		io.Copy(far, conn)
		far.Close()
	}()
	io.Copy(conn, far)
}

// set cuts all that passes, or lets it pass again.
func (c *cut) set(closed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = closed
	if closed {
		for conn := range c.conns {
			conn.Close()
		}
		clear(c.conns)
	}
}

// One instance is cut from Redis while its sockets live: its peers take it for
// dead, and when it is back those whose seats nobody took sit there again.
func TestLongInstanceCut(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 2, "redis://"+server.Addr, "HEARTBEAT=2s")
	wire := newCut(t, server.Addr)
	alone := testkit.StartBinary(t, "REDIS_URL=redis://"+wire.listener.Addr().String(), "HEARTBEAT=2s", "LOG_LEVEL=warn")
	testkit.Eventually(t, "it is ready", func() bool { return f.ready(alone) })
	join := func(p *testkit.Process, appID, side, sid string) *fleetConn {
		t.Helper()
		c, err := f.join(p, appID, side, sid)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	stays, taken, free, lonely := uuid.NewString(), uuid.NewString(), uuid.NewString(), uuid.NewString()
	a1, b1 := join(alone, stays, "A", "secret"), join(f.all[0], stays, "B", "")
	a2, b2 := join(alone, taken, "A", "secret"), join(f.all[1], taken, "B", "")
	a3, b3 := join(alone, free, "A", ""), join(f.all[1], free, "B", "")
	a4 := join(alone, lonely, "A", "")
	wire.set(true)
	testkit.Eventually(t, "it is not ready", func() bool { return !f.ready(alone) })
	for _, c := range []*fleetConn{b1, b2} {
		if _, err := c.awaitType("peer_away"); err != nil {
			t.Error(err)
		}
	}
	if _, err := b3.awaitType("peer_left"); err != nil {
		t.Error(err)
	}
	a2b := join(f.all[0], taken, "A", "secret")
	wire.set(false)
	testkit.Eventually(t, "it is ready", func() bool { return f.ready(alone) })
	for _, c := range []*fleetConn{b1, b3} {
		if _, err := c.awaitType("peer_joined"); err != nil {
			t.Error(err)
		}
	}
	sits(t, a1, b1, 1)
	sits(t, b1, a1, 2)
	sits(t, a3, b3, 3)
	if code := a2.closeCode(); code != websocket.StatusCode(closeReplaced) {
		t.Errorf("the one whose seat was taken closed with %d", code)
	}
	sits(t, a2b, b2, 4)
	sits(t, join(f.all[0], lonely, "B", ""), a4, 5)
}

// When all instances have been killed, nothing outlives its time in Redis.
func TestLongNothingOutlives(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 2, "redis://"+server.Addr, "HEARTBEAT=500ms", "RESUME_TTL=1s", "SESSION_TTL=2s", "ROOM_TTL=3s",
		"ROOM_MAX_TTL=4s", "ROOM_EMPTY_TTL=1s", "MAX_CODES_PER_IP=1000")
	atOnce(t, 10, 5, func(int) error { return f.pair(2) })
	for i := range 20 {
		appID := uuid.NewString()
		a, err := f.join(f.any(), appID, "A", []string{"", "secret"}[i%2])
		if err != nil {
			t.Fatal(err)
		}
		a.sendf(`{"type":"offer","n":1}`)
		a.sendf(`{"type":"send","id":1,"payload":1}`)
		if _, err := a.awaitType("queued"); err != nil {
			t.Error(err)
		}
		var opened struct{ Code string }
		if status, err := f.post(f.any(), "/api/rooms", "", &opened); status != http.StatusCreated {
			t.Error(status, err)
		}
		for range 2 {
			if _, err := f.dial(f.any(), "a member", "/ws/signal/"+opened.Code, nil); err != nil {
				t.Error(err)
			}
		}
		f.post(f.any(), "/rendezvous/code", "", nil)
	}
	client := server.Client()
	for _, p := range f.all {
		p.Kill()
	}
	longest := time.Duration(0)
	for _, key := range client.Keys(context.Background(), "*").Val() {
		longest = max(longest, client.PTTL(context.Background(), key).Val())
	}
	t.Logf("%d keys, the longest lives for %v", client.DBSize(t.Context()).Val(), longest)
	if longest > 15*time.Second {
		t.Errorf("a key lives for %v", longest)
	}
	testkit.Eventually(t, "Redis is empty", func() bool { return client.DBSize(t.Context()).Val() == 0 })
}

// Behind Sentinels a replica takes over from a primary that is killed, and all
// goes on with no restart.
func TestLongSentinel(t *testing.T) {
	primary := testkit.StartRedis(t)
	host, port, _ := net.SplitHostPort(primary.Addr)
	replica := testkit.StartRedis(t, "--replicaof", host+" "+port)
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	sentinel := free.Addr().String()
	free.Close()
	_, sentinelPort, _ := net.SplitHostPort(sentinel)
	config := filepath.Join(t.TempDir(), "sentinel.conf")
	text := fmt.Sprintf("port %s\nbind 127.0.0.1\nsentinel monitor main %s %s 1\nsentinel down-after-milliseconds main 1000\nsentinel failover-timeout main 5000\n",
		sentinelPort, host, port)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	watcher := exec.Command("redis-server", config, "--sentinel")
	if err := watcher.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		watcher.Process.Kill()
		watcher.Wait()
	})
	f := startFleet(t, 2, "redis+sentinel://"+sentinel+"/main")
	atOnce(t, 10, 5, func(int) error { return f.pair(3) })
	testkit.Eventually(t, "the replica has joined", func() bool {
		info, _ := primary.Client().Info(t.Context(), "replication").Result()
		return strings.Contains(info, "connected_slaves:1")
	})
	time.Sleep(2 * time.Second) // in which the sentinel hears of it
	primary.Stop()
	killed := time.Now()
	for _, p := range f.all {
		testkit.Eventually(t, "an instance has seen it", func() bool { return !f.ready(p) })
	}
	for _, p := range f.all {
		testkit.Eventually(t, "an instance is ready", func() bool { return f.ready(p) })
	}
	t.Logf("ready %v after the primary was killed", time.Since(killed).Round(time.Millisecond))
	atOnce(t, 10, 5, func(int) error { return f.pair(3) })
	if n := replica.Client().DBSize(t.Context()).Val(); n == 0 {
		t.Error("nothing is in the replica")
	}
}
