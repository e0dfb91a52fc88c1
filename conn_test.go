package main

import (
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"parley/test/testkit"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// newBareConn starts a connection that has no client behind it, on a socket that
// cannot be polled. far is the other end.
func newBareConn(t *testing.T, ts *testServer) (c *conn, far *memConn) {
	far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
	return startBareConn(t, ts, near), far
}

// newBareTLSConn does so with TLS in between. far is below TLS.
func newBareTLSConn(t *testing.T, ts *testServer) (c *conn, far *memConn) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	cert, err := tls.LoadX509KeyPair(pair.CertFile, pair.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
	server := tls.Server(near, &tls.Config{Certificates: []tls.Certificate{cert}})
	go tls.Client(far, pair.Client()).Handshake()
	if err := server.Handshake(); err != nil {
		t.Fatal(err)
	}
	return startBareConn(t, ts, server), far
}

func startBareConn(t *testing.T, ts *testServer, near net.Conn) *conn {
	over := &endlessSource{}
	over.over.Store(true)
	c := &conn{connOptions: &ts.connOptions, src: over, net: near}
	c.begin(nil)
	t.Cleanup(func() {
		c.abort(closeAbnormal)
		c.timer.Stop()
		synctest.Wait()
	})
	synctest.Wait()
	return c
}

// A ping can be what makes the answers too many. Who pauses then goes on when
// they have been written.
func TestPauseEndsAfterPing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=5s")
		c, far := newBareConn(t, ts)
		c.answer(typePong, make([]byte, memBuffer+1)) // the socket takes all but a few bytes
		synctest.Wait()
		c.answer(typePong, make([]byte, answerBytes-4)) // with its header as much as may wait
		if c.flooded.Load() {
			t.Fatal("flooded before the ping")
		}
		time.Sleep(ts.heartbeat + time.Millisecond)
		on := make(chan struct{})
		go func() {
			c.pause(func() bool { return false })
			close(on)
		}()
		synctest.Wait()
		select {
		case <-on:
			t.Error("did not pause, with more answers than may wait")
		default:
		}
		go io.Copy(io.Discard, far)
		synctest.Wait()
		select {
		case <-on:
		default:
			t.Error("still paused after everything was written")
		}
	})
}

// Answers to a client that can be written to no more are dropped, and what it
// sends keeps its connection no longer than silence would.
func TestAnswersAfterWritingFailed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=5s")
		c, far := newBareConn(t, ts)
		far.Close()
		for range 100 {
			c.answer(typePong, []byte(strings.Repeat("x", 1000)))
			c.writeControl(append(appendHeader(nil, opPong, 4), "pong"...))
			synctest.Wait()
		}
		c.mu.Lock()
		if n := len(c.answers); n > 0 {
			t.Errorf("%d bytes of answers wait, which nobody will write", n)
		}
		c.mu.Unlock()
		c.pause(func() bool { return true }) // returns: nobody would end it
		for end := time.Now().Add(2*ts.heartbeat + time.Second); time.Now().Before(end); time.Sleep(time.Second) {
			c.touch()
		}
		if code := c.closing(); code != closeAbnormal {
			t.Errorf("closing with %d, want %d", code, closeAbnormal)
		}
	})
}

// With TLS too, the end of a connection whose client reads nothing waits for
// nobody: not for the client to be told of it, and with no lock held.
func TestEndUnderTLS(t *testing.T) {
	const record = 5 + 1 + 16 // what TLS 1.3 adds to some bytes
	// fill writes until the socket takes just left bytes more.
	fill := func(c *conn, far *memConn, left int) {
		for done := false; !done; synctest.Wait() {
			far.in.mu.Lock()
			room := memBuffer - far.in.buf.Len() - left
			far.in.mu.Unlock()
			size := 4000
			if done = room < 4000; done {
				size = room - record - 4
			} else if room < 8000 {
				size = 2000
			}
			c.answer(typePong, make([]byte, size))
		}
	}
	gone := func(far *memConn) bool {
		_, err := far.Write([]byte("x"))
		return err != nil
	}
	t.Run("slow", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t)
			c, far := newBareTLSConn(t, ts)
			c.answer(typePong, make([]byte, 2*memBuffer))
			synctest.Wait()
			time.Sleep(stallTimeout)
			synctest.Wait()
			if !gone(far) || c.closing() != closeSlow {
				t.Errorf("not cut after %v; closing with %d", stallTimeout, c.closing())
			}
		})
	})
	t.Run("closing", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t)
			c, far := newBareTLSConn(t, ts)
			const reason = "server draining"
			fill(c, far, record+4+len(reason)) // a close frame, and no TLS alert behind it
			c.close(closeGoingAway, reason)
			synctest.Wait()
			time.Sleep(closeGrace)
			synctest.Wait()
			start := time.Now()
			c.answer(typePong, nil) // takes the lock
			if d := time.Since(start); d > 0 || !gone(far) {
				t.Errorf("the lock was held for %v, or the socket is still open", d)
			}
		})
	})
}

// A connection that is cut is reset, whatever it is wrapped in: its client would
// read all that the kernel still has, and then take the end for a regular one.
func TestAbortResets(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	for _, settings := range [][]string{nil, {"TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + pair.KeyFile}} {
		ts, addr := newLoopServer(t, settings...)
		far, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		var stream net.Conn = far
		if settings != nil {
			stream = tls.Client(far, pair.Client())
		}
		if _, err := io.WriteString(stream, upgradeRequest(wsDial{appID: testApp, side: "A"})); err != nil {
			t.Fatal(err)
		}
		if _, err := stream.Read(make([]byte, 1)); err != nil { // of the answer
			t.Fatal(err)
		}
		ts.clients.each(func(c *client) { c.abort(closeSlow) })
		if _, err := io.Copy(io.Discard, far); !errors.Is(err, syscall.ECONNRESET) {
			t.Errorf("%v: the client reads to %v, want a reset", settings, err)
		}
	}
}

// newSocketServer is newTestServer on a real socket, for what bubbles cannot
// have: reading and writing without blocking. It returns the base URL too.
func newSocketServer(t testing.TB, settings ...string) (ts *testServer, base string) {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn(settings))
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ts = &testServer{t: t, log: new(lockedBuffer), served: make(chan error, 1)}
	ts.server = newParley(cfg, slog.New(slog.NewTextHandler(ts.log, nil)))
	ts.memory, ts.table = ts.hub.(*memoryHub), ts.codes.(*codeTable)
	ts.web = ts.newHTTPServer(ts.handler())
	ts.http = &http.Client{Transport: &http.Transport{DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("tcp", l.Addr().String())
	}}}
	go func() { ts.served <- ts.web.Serve(l) }()
	ctx, cancel := context.WithCancel(context.Background())
	var background sync.WaitGroup
	background.Go(func() { ts.run(ctx) })
	t.Cleanup(func() {
		ts.http.CloseIdleConnections()
		ts.drain(context.Background())
		if err := ts.web.Shutdown(context.Background()); err != nil {
			t.Error("shutdown:", err)
		}
		if err := <-ts.served; !errors.Is(err, http.ErrServerClosed) {
			t.Error("serve:", err)
		}
		cancel()
		background.Wait()
		checkInvariants(t, ts)
		if n := ts.queued.used.Load(); n < 0 {
			t.Errorf("%d bytes counted as waiting", n)
		}
	})
	return ts, "http://" + l.Addr().String()
}

// socketPair is two clients in the seats of a session that have read room_full.
// tune, if not nil, is called with each socket before it is used.
func socketPair(t testing.TB, base, appID string, tune func(*net.TCPConn)) (a, b *rawClient) {
	t.Helper()
	a = tcpClient(t, base, wsDial{appID: appID, side: "A"}, tune)
	b = tcpClient(t, base, wsDial{appID: appID, side: "B"}, tune)
	a.want(opText, frameRoomFull)
	b.want(opText, frameRoomFull)
	return a, b
}

// paddedIce is the n-th frame of a sequence, of so many bytes.
func paddedIce(n, size int) string {
	head := fmt.Sprintf(`{"type":"ice","n":%d,"x":"`, n)
	return head + strings.Repeat("x", size-len(head)-2) + `"}`
}

// sampleQueue notes the most bytes that wait in the server until stop is
// called; filled is closed once there are as many as given.
func sampleQueue(ts *testServer, enough int64) (filled chan struct{}, stop func() (most int64)) {
	filled = make(chan struct{})
	done, ended := make(chan struct{}), make(chan struct{})
	most := int64(0)
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Millisecond)
		defer tick.Stop()
		for {
			n := ts.queued.used.Load()
			if most < enough && n >= enough {
				close(filled)
			}
			most = max(most, n)
			select {
			case <-done:
				return
			case <-tick.C:
			}
		}
	}()
	return filled, func() int64 {
		close(done)
		<-ended
		return most
	}
}

// readIce reads n frames of a sequence, passing over pings.
func (c *rawClient) readIce(n, size int) error {
	for i := range n {
		op, payload, err := c.next()
		for op == opPing && err == nil {
			op, payload, err = c.next()
		}
		if err != nil {
			return fmt.Errorf("after %d frames: %w", i, err)
		}
		if op != opText || string(payload) != paddedIce(i, size) {
			return fmt.Errorf("frame %d is opcode %d %.80s", i, op, payload)
		}
	}
	return nil
}

// A burst that is far more than may wait reaches a healthy reader whole and in
// order, while what waits in the server is bounded: the sender is held back.
func TestBurst(t *testing.T) {
	t.Parallel()
	for _, test := range []struct{ frames, size int }{{100_000, 500}, {60, 65_000}} {
		t.Run(fmt.Sprintf("%d frames of %d bytes", test.frames, test.size), func(t *testing.T) {
			ts, base := newSocketServer(t, "WS_MAX_MSG=65536")
			// With small buffers in the kernel most of it has to wait in the server.
			a, b := socketPair(t, base, testApp, func(conn *net.TCPConn) {
				conn.SetReadBuffer(64 << 10)
				conn.SetWriteBuffer(64 << 10)
			})
			ts.clients.each(func(c *client) {
				c.mu.Lock() // as begin did, after the field was set
				defer c.mu.Unlock()
				if c.sys == nil && canPoll {
					t.Error("the socket is not polled")
				}
			})
			filled, stop := sampleQueue(ts, 64<<10)
			var sender sync.WaitGroup
			defer sender.Wait()
			sender.Go(func() {
				var chunk []byte
				for i := range test.frames {
					if chunk = appendMasked(chunk, finText, paddedIce(i, test.size)); len(chunk) > 64<<10 || i == test.frames-1 {
						if a.write(chunk) != nil {
							return
						}
						chunk = chunk[:0]
					}
				}
			})
			if test.frames*test.size > 32<<20 {
				// More than sockets hold: B does not start before some of it waits.
				<-filled
			}
			if err := b.readIce(test.frames, test.size); err != nil {
				t.Error(err)
				a.conn.Close()
			}
			if most, bound := stop(), int64(1<<20+2*65536+64<<10); most > bound {
				t.Errorf("%d bytes waited in the server, want at most %d", most, bound)
			} else {
				t.Logf("%d bytes waited at most", most)
			}
			if n := ts.queued.used.Load(); n != 0 {
				t.Errorf("%d bytes counted as waiting after all", n)
			}
		})
	}
}

// What has come whole is passed on though the next message has begun.
func TestPartOfTheNextHoldsNothingUp(t *testing.T) {
	_, base := newSocketServer(t)
	a, b := socketPair(t, base, testApp, nil)
	const text = `{"type":"offer"}`
	frame := masked(finText, text)
	for n := 1; n < len(frame); n++ {
		a.write(frame, frame[:n])
		b.conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		b.want(opText, text)
		a.write(frame[n:])
		b.want(opText, text)
	}
}

// A message of any size goes through; who sends one that is too large can read
// why it is closed, though it was still sending.
func TestSizesOnSockets(t *testing.T) {
	_, base := newSocketServer(t)
	a, b := socketPair(t, base, testApp, nil)
	for _, size := range []int{100, 1023, 1024, 1025, 4096, 5000, 65_535, 65_536, 300_000, 1<<20 - 1, 1 << 20} {
		sent := make(chan struct{})
		go func() {
			defer close(sent)
			a.write(masked(finBin, paddedIce(0, size)))
		}()
		b.want(opBinary, paddedIce(0, size))
		<-sent
	}
	sent := make(chan error, 1)
	go func() { sent <- a.write(masked(finText, strings.Repeat(" ", 4<<20))) }()
	a.wantClosed(closeTooBig, "message too big")
	if err := <-sent; err != nil {
		// Where a kernel drops what was received before a reset, it would not be read.
		t.Errorf("it was cut off: %v", err)
	}
	b.want(opText, framePeerLeft)
}

// Many sessions at once, in each of which both sides send, leave and come back.
func TestManyPairs(t *testing.T) {
	const pairs, rounds, frames, size = 100, 3, 20, 700
	ts, base := newSocketServer(t)
	var all sync.WaitGroup
	var failed atomic.Bool
	for i := range pairs {
		all.Go(func() {
			appID := fmt.Sprintf("00000000-0000-4000-8000-%012d", i)
			for range rounds {
				if failed.Load() {
					return
				}
				if err := talk(t, base, appID, frames, size); err != nil {
					failed.Store(true)
					t.Errorf("session %d: %v", i, err)
				}
			}
		})
	}
	all.Wait()
	testkit.Eventually(t, "all sessions are over", func() bool { return ts.memory.sessions.Load() == 0 })
	if n := ts.queued.used.Load(); n != 0 {
		t.Errorf("%d bytes counted as waiting for nobody", n)
	}
}

// talk is one meeting of two clients.
func talk(t testing.TB, base, appID string, frames, size int) error {
	var clients [2]*rawClient
	for i, side := range []string{"A", "B"} {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(testkit.Patience))
		if clients[i], err = openRawClient(t, conn, wsDial{appID: appID, side: side}); err != nil {
			return err
		}
		if i == 1 {
			for _, c := range clients {
				if op, payload, err := c.next(); err != nil || op != opText || string(payload) != frameRoomFull {
					return fmt.Errorf("received opcode %d %q, %v, want room_full", op, payload, err)
				}
			}
		}
	}
	errs := make(chan error, 4)
	for i, c := range clients {
		go func() {
			for n := range frames {
				if err := c.write(masked(finText, paddedIce(n, size))); err != nil {
					errs <- fmt.Errorf("side %d: %w", i, err)
					return
				}
			}
			errs <- nil
		}()
		go func() { errs <- c.readIce(frames, size) }()
	}
	if err := errors.Join(<-errs, <-errs, <-errs, <-errs); err != nil {
		return err
	}
	// B leaves first, and A is told. The next meeting may follow at once.
	normal := binary.BigEndian.AppendUint16(nil, uint16(closeNormal))
	for _, c := range []*rawClient{clients[1], clients[0]} {
		c.write(masked(finClose, normal))
		var last []byte
		for op := byte(0); op != opClose; {
			var err error
			if op, last, err = c.next(); err != nil {
				return err
			}
		}
		if !slices.Equal(last, normal) {
			return fmt.Errorf("closed with %q", last)
		}
		if c == clients[1] {
			if op, payload, err := clients[0].next(); err != nil || op != opText || string(payload) != framePeerLeft {
				return fmt.Errorf("received opcode %d %q, %v, want peer_left", op, payload, err)
			}
		}
	}
	return nil
}

// Whoever has seen the answer to its 1000 may take the seat anew: it is free.
func TestSeatIsFreeAtOnceOnSockets(t *testing.T) {
	_, base := newSocketServer(t)
	normal := binary.BigEndian.AppendUint16(nil, uint16(closeNormal))
	dial := func() net.Conn {
		conn, err := net.Dial("tcp", strings.TrimPrefix(base, "http://"))
		if err != nil {
			t.Fatal(err)
		}
		return conn
	}
	a := newRawClient(t, dial(), wsDial{appID: testApp, side: "A"})
	for i := range 1000 {
		next := dial() // so that nothing has to be waited for later
		t.Cleanup(func() { next.Close() })
		a.write(masked(finText, `{"type":"ping"}`))
		if op, payload, err := a.next(); err != nil || op != opText {
			t.Fatalf("after leaving %d times: received opcode %d %q, %v; want a pong", i, op, payload, err)
		}
		a.write(masked(finClose, normal))
		a.want(opClose, string(normal))
		a.conn.Close()
		a = newRawClient(t, next, wsDial{appID: testApp, side: "A"})
	}
}

// Who writes for a connection to which others add more and more gets away: it has
// a connection of its own to read.
func TestWriterGetsAway(t *testing.T) {
	ts, _ := newSocketServer(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	near, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	far, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	read := make(chan int64)
	go func() {
		n, _ := io.Copy(io.Discard, far)
		read <- n
	}()
	raw, err := near.(*net.TCPConn).SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	source := &endlessSource{}
	c := &conn{connOptions: &ts.connOptions, src: source, net: near, sys: raw}
	c.begin(nil) // returns
	c.wake()
	source.over.Store(true)
	testkit.Eventually(t, "all is written", func() bool { return c.turn.Load() == turnFree })
	c.timer.Stop()
	near.Close()
	if n := <-read; n < writeRounds {
		t.Errorf("%d bytes were written", n)
	}
}

// An endlessSource has more frames whenever it is asked, until it is over.
type endlessSource struct{ over atomic.Bool }

func (s *endlessSource) take(buf []frame, _ int) ([]frame, bool) {
	if s.over.Load() {
		return buf, false
	}
	return append(buf, frame{typ: typeIce, data: []byte("{}")}), true
}

func (s *endlessSource) flush() {}

func (s *endlessSource) appendPresence(dst []byte, _ event) []byte { return dst }
