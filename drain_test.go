package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"parley/test/testkit"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// drainReason is what every connection is told as the server stops.
const drainReason = "server draining"

// --- In a bubble.

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.pair()
		v1 := ts.join(wsDial{appID: otherApp, side: "A", v1: true, sid: "secret"})
		v1.settled()
		mute := ts.raw(wsDial{appID: otherApp, side: "B"})
		code, _ := ts.mint()
		ts.call("GET", "/readyz", "").want(t, 200, "", "")

		start := time.Now()
		drained := make(chan struct{})
		go func() {
			defer close(drained)
			ts.drain(context.Background())
		}()
		for _, c := range []*wsClient{a, b, v1} {
			c.wantClosed(closeGoingAway, drainReason)
		}
		if took := time.Since(start); took > 0 {
			t.Errorf("the connections were closed after %v", took)
		}

		// One does not answer, and until it is cut everyone can see what goes on.
		synctest.Wait()
		select {
		case <-drained:
			t.Error("the drain is over and a connection open")
		default:
		}
		ts.call("GET", "/healthz", "").want(t, 200, "", "")
		ts.call("GET", "/readyz", "").want(t, 503, "draining", "shutting down")
		ts.post("/rendezvous/code", "").want(t, 503, "draining", "shutting down")
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`).want(t, 503, "draining", "shutting down")
		ts.call("GET", "/ws?side=A&appID="+testApp, "", upgradeHeaders...).want(t, 503, "draining", "shutting down")
		late := ts.join(wsDial{appID: testApp, side: "A", v1: true})
		late.wantClosed(closeGoingAway, "draining")
		if got := late.take(); got != nil {
			t.Errorf("who came too late received %q", got)
		}
		<-drained
		if took := time.Since(start); took != closeGrace {
			t.Errorf("drained after %v, want %v", took, closeGrace)
		}
		mute.want(opText, frameRoomFull)
		mute.want(opClose, "\x03\xe9"+drainReason)
		if _, _, err := mute.next(); err == nil {
			t.Error("something came after the close frame")
		}
		synctest.Wait()
		if n := ts.metric("parley_ws_connections"); n != 0 {
			t.Errorf("%v connections after the drain", n)
		}
		if n := ts.metric(`parley_ws_closes_total{code="1001"}`); n != 5 {
			t.Errorf("%v closes counted as 1001, want 5", n)
		}
	})
}

// What still works for a connection that has gone is waited for, but not past
// the time there is, whatever hangs.
func TestDrainWaitsForTasks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "DRAIN_TIMEOUT=10s")
		release, drained := make(chan struct{}), make(chan struct{})
		ts.tasks.Go(func() { <-release })
		go func() {
			defer close(drained)
			ts.drain(context.Background())
		}()
		synctest.Wait()
		select {
		case <-drained:
			t.Error("the drain is over while a task is running")
		default:
		}
		close(release)
		<-drained
	})
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "DRAIN_TIMEOUT=10s")
		release := make(chan struct{})
		ts.tasks.Go(func() { <-release })
		start := time.Now()
		ts.shutdown([]front{{web: ts.web}})
		if took := time.Since(start); took < 9*time.Second || took > 10*time.Second {
			t.Errorf("with a task that hangs it takes %s to stop", took)
		}
		if !strings.Contains(ts.log.String(), "level=WARN") {
			t.Error("nobody is told")
		}
		close(release)
	})
}

// However its connections behave, the server stops within DRAIN_TIMEOUT, also
// one that is shorter than what a connection is given to answer.
func TestDrainTimeout(t *testing.T) {
	behaviours := map[string]func(t *testing.T, ts *testServer){
		"nobody": func(*testing.T, *testServer) {},
		"mute":   func(_ *testing.T, ts *testServer) { ts.rawPair() },
		"full buffers": func(_ *testing.T, ts *testServer) {
			a, b := ts.raw(wsDial{appID: testApp, side: "A"}), ts.raw(wsDial{appID: testApp, side: "B"})
			b.want(opText, frameRoomFull)
			text := masked(finText, `{"type":"ice","x":"`+strings.Repeat("x", 10_000)+`"}`)
			go func() {
				for range 400 { // not for ever: what is sent meanwhile is read and dropped, and takes no time here
					a.write(text)
				}
			}()
		},
		"half a message": func(_ *testing.T, ts *testServer) {
			a, _ := ts.rawPair()
			a.write(masked(finText, `{"type":"offer"}`)[:9])
		},
		"half a body": func(t *testing.T, ts *testServer) {
			conn, err := ts.net.dial()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { conn.Close() })
			io.WriteString(conn, "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nContent-Length: 100\r\n\r\n{")
		},
		"drips": func(t *testing.T, ts *testServer) {
			a, _ := ts.rawPair()
			stop := make(chan struct{})
			t.Cleanup(func() { close(stop) })
			go func() {
				for a.write(masked(finPing, "")) == nil {
					select {
					case <-stop:
						return
					case <-time.After(10 * time.Millisecond):
					}
				}
			}()
		},
	}
	for name, behave := range behaviours {
		for _, timeout := range []time.Duration{50 * time.Millisecond, 500 * time.Millisecond, 2 * time.Second, 10 * time.Second} {
			t.Run(fmt.Sprint(name, " ", timeout), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ts := newSettledServer(t, fmt.Sprint("DRAIN_TIMEOUT=", timeout), "WS_MAX_MSG=65536")
					behave(t, ts)
					synctest.Wait()
					ts.http.CloseIdleConnections()
					start := time.Now()
					ts.stop()
					took := time.Since(start)
					if took > timeout {
						t.Errorf("stopped after %v, want at most %v", took, timeout)
					}
					// Whoever only has WebSockets need not wait so long.
					if most := closeGrace + 500*time.Millisecond; name != "half a body" && took > most {
						t.Errorf("stopped after %v, want at most %v", took, most)
					}
				})
			})
		}
	}
}

// Tasks may begin while somebody waits for the others: no wait is missed for it, and
// none is forever.
func TestTaskGroup(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for range 500 {
			g, ended := newTaskGroup(), new(atomic.Bool)
			g.Go(func() {
				time.Sleep(time.Second)
				ended.Store(true)
			})
			for range 3 {
				go g.Go(func() {})
			}
			g.wait()
			if !ended.Load() {
				t.Fatal("a task was not waited for")
			}
			go g.Go(func() {})
			g.wait()
		}
	})
}

// No connection escapes that comes while the drain begins.
func TestDrainWhileJoining(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		var all sync.WaitGroup
		var mu sync.Mutex
		refused, closed := 0, 0
		for i := range 100 {
			all.Go(func() {
				c, res, err := ts.dial(wsDial{appID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i/2), side: "AB"[i%2 : i%2+1], v1: i%3 == 0})
				mu.Lock()
				defer mu.Unlock()
				if err != nil {
					if res == nil || res.StatusCode != http.StatusServiceUnavailable {
						t.Errorf("refused with %v, %v", res, err)
					}
					refused++
					return
				}
				code, reason := c.closed()
				if code != websocket.StatusGoingAway || reason != drainReason && reason != "draining" {
					t.Errorf("closed with %d %q", code, reason)
				}
				closed++
			})
		}
		all.Go(func() { ts.drain(context.Background()) })
		all.Wait()
		if refused+closed != 100 {
			t.Errorf("%d refused and %d closed of 100", refused, closed)
		}
	})
}

// --- With the real binary.

// A tcpClient is a rawClient over a real socket.
func tcpClient(t testing.TB, base string, d wsDial, tune func(*net.TCPConn)) *rawClient {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	if tune != nil {
		tune(conn.(*net.TCPConn))
	}
	return newRawClient(t, conn, d)
}

// A thousand sockets, of which some do not read and some do not answer, cannot
// keep the process from ending in time.
func TestDrainsThousandSockets(t *testing.T) {
	const (
		drainTimeout = 2 * time.Second
		pairs        = 350 // that behave
		stalled      = 100 // more pairs, in which one does not read what the other sends
		mute         = 100 // that never answer
	)
	server := testkit.StartPlainBinary(t, "DRAIN_TIMEOUT="+drainTimeout.String(), "WS_MAX_MSG=65536", "LOG_LEVEL=warn", "MAX_CONNS=2000", "HEARTBEAT=1h") // a busy machine may keep clients from answering pings
	app := func(i int) string { return fmt.Sprintf("00000000-0000-4000-8000-%012d", i) }
	var ends sync.WaitGroup
	for i := range pairs {
		for _, side := range []string{"A", "B"} {
			c := tcpClient(t, server.Base, wsDial{appID: app(i), side: side}, nil)
			ends.Go(func() { c.wantClosed(closeGoingAway, drainReason) })
		}
	}
	for i := range mute {
		tcpClient(t, server.Base, wsDial{appID: app(pairs + stalled + i), side: "A"}, nil)
	}
	small := func(conn *net.TCPConn) {
		conn.SetReadBuffer(16 << 10)
		conn.SetWriteBuffer(16 << 10)
	}
	text := masked(finText, `{"type":"ice","x":"`+strings.Repeat("x", 30_000)+`"}`)
	senders := make([]*rawClient, stalled)
	for i := range senders {
		tcpClient(t, server.Base, wsDial{appID: app(pairs + i), side: "B"}, small)
		senders[i] = tcpClient(t, server.Base, wsDial{appID: app(pairs + i), side: "A"}, small)
	}
	for _, a := range senders { // only now, for one who stalls is cut after a while
		ends.Go(func() {
			for a.write(text) == nil {
			}
		})
		ends.Go(func() {
			for op := byte(0); op != opClose; {
				var payload []byte
				var err error
				if op, payload, err = a.next(); err != nil || op == opClose && string(payload) != "\x03\xe9"+drainReason {
					t.Errorf("a sender received %q, %v; want 1001 and %s", payload, err, drainReason)
					break
				}
			}
			a.conn.Close()
		})
	}

	// Their senders are held back once 1 MiB waits for each. Half of that will do:
	// who stalls is cut off after 10 s, and a busy machine may take that long.
	testkit.Eventually(t, "the buffers are full", func() bool {
		return testkit.Metric(t, server, "parley_mailbox_bytes") >= stalled<<19
	})
	if n := testkit.Metric(t, server, "parley_ws_connections"); n != 2*pairs+2*stalled+mute {
		t.Fatalf("%v connections, want %d", n, 2*pairs+2*stalled+mute)
	}
	start := time.Now()
	exit := server.Stop()
	took := time.Since(start)
	if took > drainTimeout {
		t.Errorf("it took %v to stop, want at most %v", took, drainTimeout)
	}
	t.Logf("stopped after %v", took)
	if exit != 0 {
		t.Errorf("exit status %d, want 0", exit)
	}
	ends.Wait()
}

func TestExitStatus(t *testing.T) {
	t.Run("help", func(t *testing.T) {
		for _, arg := range []string{"-h", "-help", "--help"} {
			exit, stdout, stderr := testkit.RunBinary(t, []string{arg}, "ROOM_TTL=nonsense")
			if exit != 0 || stderr != "" {
				t.Errorf("%s: exit status %d, want 0; %s", arg, exit, stderr)
			}
			for _, o := range configOptions(new(config)) {
				if !strings.Contains(stdout, o.name) || !strings.Contains(stdout, "-"+flagName(o.name)) {
					t.Errorf("%s does not name %s", arg, o.name)
				}
			}
		}
	})
	t.Run("bad configuration", func(t *testing.T) {
		exit, stdout, stderr := testkit.RunBinary(t, []string{"-heartbeat", "never", "-code-digits=3"},
			"ROOM_TTL=soon", "PORT=99999", "WS_MAX_MSG=-1", "LOG_LEVEL=loud", "TRUSTED_PROXIES=10.0.0.0/40",
			"ENVIRONMENT=production", "DEV=true", "TLS_CERT_FILE=/nonexistent")
		if exit != 2 || stdout != "" {
			t.Errorf("exit status %d, want 2; printed %q", exit, stdout)
		}
		for _, name := range []string{"HEARTBEAT", "CODE_DIGITS", "ROOM_TTL", "PORT", "WS_MAX_MSG", "LOG_LEVEL", "TRUSTED_PROXIES", "ENVIRONMENT", "DEV", "TLS_KEY_FILE"} {
			if !strings.Contains(stderr, name) {
				t.Errorf("nothing is said of %s:\n%s", name, stderr)
			}
		}
		if strings.Contains(stderr, "goroutine") {
			t.Errorf("it crashed:\n%s", stderr)
		}
	})
	t.Run("unknown flag", func(t *testing.T) {
		if exit, _, stderr := testkit.RunBinary(t, []string{"-no-such-flag"}); exit != 2 || !strings.Contains(stderr, "no-such-flag") {
			t.Errorf("exit status %d, want 2; %s", exit, stderr)
		}
	})
	t.Run("port taken", func(t *testing.T) {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		_, port, _ := net.SplitHostPort(l.Addr().String())
		exit, stdout, stderr := testkit.RunBinary(t, nil, "PORT="+port)
		if exit != 1 || !strings.Contains(stderr, port) || strings.Contains(stdout, "listens") {
			t.Errorf("exit status %d, want 1; %s%s", exit, stdout, stderr)
		}
	})
}

// While it drains, the process says so; a request that is never finished does
// not keep it beyond DRAIN_TIMEOUT.
func TestDrainsDespiteHalfRequest(t *testing.T) {
	server := testkit.StartBinary(t, "DRAIN_TIMEOUT=2s")
	half := halfRequest(t, server)
	c := tcpClient(t, server.Base, wsDial{appID: testApp, side: "A"}, nil)
	mute := tcpClient(t, server.Base, wsDial{appID: testApp, side: "B"}, nil)
	mute.want(opText, frameRoomFull)
	start := time.Now()
	server.Signal(syscall.SIGINT)
	c.wantClosed(closeGoingAway, drainReason)
	res, err := http.Get(server.URL("/readyz"))
	if err != nil {
		t.Fatal("while draining: ", err)
	}
	body, _ := io.ReadAll(res.Body)
	res.Body.Close()
	if res.StatusCode != 503 || !strings.Contains(string(body), `"draining"`) {
		t.Errorf("readyz while draining: %s %s", res.Status, body)
	}
	io.Copy(io.Discard, half) // ends with the server
	<-server.Exited()
	if took := time.Since(start); took > 2*time.Second {
		t.Errorf("it took %v to stop, want at most 2s", took)
	}
	if exit := server.ExitCode(); exit != 0 {
		t.Errorf("exit status %d, want 0", exit)
	}
}

// halfRequest begins a request and never ends it.
func halfRequest(t testing.TB, p *testkit.Process) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", strings.TrimPrefix(p.Base, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	io.WriteString(conn, "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nExpect: 100-continue\r\nContent-Length: 100\r\n\r\n{")
	// The server asks for the body when the handler has begun to read it.
	b := make([]byte, 25)
	if _, err := io.ReadFull(conn, b); err != nil || string(b) != "HTTP/1.1 100 Continue\r\n\r\n" {
		t.Fatalf("half a request was answered %q, %v", b, err)
	}
	return conn
}

// A second signal ends at once what would still take its time.
func TestSecondSignal(t *testing.T) {
	server := testkit.StartBinary(t, "DRAIN_TIMEOUT=1h")
	halfRequest(t, server)
	c := tcpClient(t, server.Base, wsDial{appID: testApp, side: "A"}, nil)
	server.Signal(syscall.SIGTERM)
	c.wantClosed(closeGoingAway, drainReason) // so it has begun to drain
	start := time.Now()
	server.Signal(syscall.SIGTERM)
	select {
	case <-server.Exited():
	case <-time.After(testkit.Patience):
		t.Fatal("still running after a second signal")
	}
	// Without it, it would wait for the request: 20 s.
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("it took %v to exit, want none", took)
	}
	if exit := server.ExitCode(); exit == 0 {
		t.Error("exit status 0, as if it had drained")
	}
}
