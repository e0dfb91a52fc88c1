package test

import (
	"net/http"
	"parley/test/testkit"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// An instance that is started while Redis is away serves as soon as it is there.
func TestRedisLate(t *testing.T) {
	server := testkit.StartRedis(t)
	server.Stop()
	p := testkit.StartBinary(t, "REDIS_URL=redis://"+server.Addr, "HEARTBEAT=2s")
	f := &fleet{t: t, all: []*testkit.Process{p}}
	if f.ready(p) {
		t.Error("ready without Redis")
	}
	if status, err := f.post(p, "/rendezvous/code", "", nil); err != nil || status != http.StatusServiceUnavailable {
		t.Errorf("mint: %d, %v", status, err)
	}
	server.Start()
	start := time.Now()
	testkit.Eventually(t, "it is ready", func() bool { return f.ready(p) })
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("ready after %v", took)
	}
	if err := f.pair(2); err != nil {
		t.Error(err)
	}
}

// A user who may do no more than docs/scaling.md says can be parley.
func TestRedisACL(t *testing.T) {
	server := testkit.StartRedis(t)
	if err := server.Client().Do(t.Context(), "ACL", "SETUSER", "parley", "on", ">secret", "resetchannels", "~parley:*", "&parley:*", "+@all", "-@dangerous", "+info").Err(); err != nil {
		t.Fatal(err)
	}
	f := startFleet(t, 2, "redis://parley:secret@"+server.Addr)
	if err := f.pair(3); err != nil {
		t.Error(err)
	}
	if err := f.room(3); err != nil {
		t.Error(err)
	}
	for _, p := range f.all {
		if n := testkit.Metric(t, p, "parley_redis_errors_total"); n != 0 {
			t.Errorf("%v calls have failed", n)
		}
	}
}

// A Redis that does not answer slows down who asks it, and nobody's heartbeats,
// nor the end.
func TestRedisSlow(t *testing.T) {
	const drainTimeout = 3 * time.Second
	server := testkit.StartRedis(t)
	f := startFleet(t, 1, "redis://"+server.Addr, "HEARTBEAT=300ms", "DRAIN_TIMEOUT="+drainTimeout.String())
	p := f.all[0]
	var conns []*fleetConn
	for range 5 {
		c, err := f.join(p, uuid.NewString(), "A", "secret")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	server.Signal(syscall.SIGSTOP)
	defer server.Signal(syscall.SIGCONT)
	// Each waits for Redis for far longer than two heartbeats.
	for _, c := range conns {
		if err := c.sendf(`{"type":"send","id":1,"payload":1}`); err != nil {
			t.Error(err)
		}
	}
	for _, c := range conns {
		if frame, err := c.awaitType("error"); err != nil || frame.Code != "backend_unavailable" {
			t.Errorf("%+v, %v", frame, err)
		}
	}
	for _, c := range conns {
		if err := c.sendf(`{"type":"send","id":2,"payload":1}`); err != nil {
			t.Error(err)
		}
	}
	start := time.Now()
	if exit := p.Stop(); exit != 0 {
		t.Errorf("exit status %d", exit)
	}
	if took := time.Since(start); took > drainTimeout {
		t.Errorf("it took %v to stop, want at most %v", took, drainTimeout)
	}
	for _, c := range conns {
		if code := c.closeCode(); code != websocket.StatusGoingAway {
			t.Errorf("closed with %d, want 1001", code)
		}
	}
}
