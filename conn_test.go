package main

import (
	"crypto/tls"
	"errors"
	"io"
	"net"
	"strings"
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
	pair := writePair(t, t.TempDir(), 1)
	cert, err := tls.LoadX509KeyPair(pair.certFile, pair.keyFile)
	if err != nil {
		t.Fatal(err)
	}
	far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
	server := tls.Server(near, &tls.Config{Certificates: []tls.Certificate{cert}})
	go tls.Client(far, pair.client()).Handshake()
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
	pair := writePair(t, t.TempDir(), 1)
	for _, settings := range [][]string{nil, {"TLS_CERT_FILE=" + pair.certFile, "TLS_KEY_FILE=" + pair.keyFile}} {
		ts, addr := newLoopServer(t, settings...)
		far, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer far.Close()
		var stream net.Conn = far
		if settings != nil {
			stream = tls.Client(far, pair.client())
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
