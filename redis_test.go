package main

import (
	"bytes"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/coder/websocket"
	"github.com/google/uuid"
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
	cluster, locked := startRedis(t, "--cluster-enabled", "yes"), startRedis(t, "--requirepass", "secret")
	for addr, want := range map[string]string{
		"redis://" + cluster.addr:              "Redis Cluster cannot be used",
		"redis://" + locked.addr:               "refuses the user name or password",
		"redis://me:hunter2@" + locked.addr:    "refuses the user name or password",
		"redis+cluster://" + cluster.addr:      "Redis Cluster cannot be used",
		"redis://" + locked.addr + ",b:6379/0": "Redis Cluster cannot be used",
	} {
		var stderr bytes.Buffer
		exit := run([]string{"-host", "127.0.0.1", "-port", "0", "-redis-url", addr}, environ(), io.Discard, &stderr)
		if exit == 0 || !strings.Contains(stderr.String(), want) || strings.Contains(stderr.String(), "hunter2") {
			t.Errorf("%s: exit status %d, want an error with %q:\n%s", addr, exit, want, stderr.String())
		}
	}
}

func TestRedisTLS(t *testing.T) {
	pair := writePair(t, t.TempDir(), 7)
	certificate, err := tls.LoadX509KeyPair(pair.certFile, pair.keyFile)
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
	eventually(t, "it is ready", func() bool { return trusting.call(http.MethodGet, "/readyz", "").status == http.StatusOK })
	strict, _ := newLoopServer(t, "REDIS_URL=rediss://me:secret@"+m.Addr())
	if a := strict.call(http.MethodGet, "/readyz", ""); a.status != http.StatusServiceUnavailable {
		t.Errorf("with a certificate that nobody vouches for: %d %s", a.status, a.text)
	}
}

// A user who may do no more than docs/scaling.md says can be parley.
func TestRedisACL(t *testing.T) {
	server := startRedis(t)
	if err := server.client().Do(ctx, "ACL", "SETUSER", "parley", "on", ">secret", "resetchannels", "~parley:*", "&parley:*", "+@all", "-@dangerous", "+info").Err(); err != nil {
		t.Fatal(err)
	}
	f := startFleet(t, 2, "redis://parley:secret@"+server.addr)
	if err := f.pair(3); err != nil {
		t.Error(err)
	}
	if err := f.room(3); err != nil {
		t.Error(err)
	}
	for _, p := range f.all {
		if n := binaryMetric(t, p, "parley_redis_errors_total"); n != 0 {
			t.Errorf("%v calls have failed", n)
		}
	}
}

// A Redis that does not answer slows down who asks it, and nobody's heartbeats,
// nor the end.
func TestRedisSlow(t *testing.T) {
	const drainTimeout = 3 * time.Second
	server := startRedis(t)
	f := startFleet(t, 1, "redis://"+server.addr, "HEARTBEAT=300ms", "DRAIN_TIMEOUT="+drainTimeout.String())
	p := f.all[0]
	var conns []*fleetConn
	for range 5 {
		c, err := f.join(p, uuid.NewString(), "A", "secret")
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
	}
	server.cmd.Process.Signal(syscall.SIGSTOP)
	defer server.cmd.Process.Signal(syscall.SIGCONT)
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
	if exit := p.stop(); exit != 0 {
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

// An instance that is started while Redis is away serves as soon as it is there.
func TestRedisLate(t *testing.T) {
	server := startRedis(t)
	server.stop()
	p := startBinary(t, "REDIS_URL=redis://"+server.addr, "HEARTBEAT=2s")
	f := &fleet{t: t, all: []*process{p}}
	if f.ready(p) {
		t.Error("ready without Redis")
	}
	if status, err := f.post(p, "/rendezvous/code", "", nil); err != nil || status != http.StatusServiceUnavailable {
		t.Errorf("mint: %d, %v", status, err)
	}
	server.start()
	start := time.Now()
	eventually(t, "it is ready", func() bool { return f.ready(p) })
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("ready after %v", took)
	}
	if err := f.pair(2); err != nil {
		t.Error(err)
	}
}
