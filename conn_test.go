package main

import (
	"io"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// newBareConn starts a connection that has no client behind it, on a socket that
// cannot be polled. far is the other end.
func newBareConn(t *testing.T, ts *testServer) (c *conn, far *memConn) {
	far, near := newMemConns(ts.net.Addr(), ts.net.Addr())
	over := &endlessSource{}
	over.over.Store(true)
	c = &conn{connOptions: &ts.connOptions, src: over, net: near}
	c.begin(nil)
	t.Cleanup(func() {
		c.abort(closeAbnormal)
		c.timer.Stop()
		synctest.Wait()
	})
	synctest.Wait()
	return c, far
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
