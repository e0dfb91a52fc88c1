//go:build long

package main

import (
	"net"
	"strings"
	"testing"
	"time"
)

// A reader that takes nothing is cut 10 s after its socket is full, and its
// partner is told; one that takes a little now and then is not, and a session
// beside them notices nothing.
func TestLongSlowReader(t *testing.T) {
	ts, base := newSocketServer(t)
	small := func(conn *net.TCPConn) {
		conn.SetReadBuffer(32 << 10)
		conn.SetWriteBuffer(32 << 10)
	}
	text := masked(finText, `{"type":"ice","x":"`+strings.Repeat("x", 8000)+`"}`)
	blast := func(c *rawClient) {
		for c.write(text) == nil {
		}
	}

	// The lazy one takes some, every other second.
	from, lazy := socketPair(t, base, otherApp, small)
	go blast(from)
	stop, stopped := make(chan struct{}), make(chan int)
	go func() {
		frames := 0
		defer func() { stopped <- frames }()
		tick := time.NewTicker(2 * time.Second)
		defer tick.Stop()
		for {
			for range 60 {
				op, payload, err := lazy.next()
				if err != nil {
					t.Errorf("the lazy reader was cut after %d frames: %v", frames, err)
					return
				}
				if op == opPing {
					lazy.write(masked(finPong, payload))
				}
				frames++
			}
			select {
			case <-stop:
				return
			case <-tick.C:
			}
		}
	}()

	a, b := socketPair(t, base, testApp, small)
	start := time.Now()
	go blast(a)
	a.want(opText, framePeerLeft)
	if took := time.Since(start); took < stallTimeout || took > stallTimeout+2*time.Second {
		t.Errorf("the partner was told after %v, want 10 s and a little", took)
	}
	b.conn.SetReadDeadline(time.Now().Add(stopDeadline))
	b.wantCut()
	if n := ts.metric(`parley_ws_closes_total{code="4408"}`); n != 1 {
		t.Errorf("%v closes counted as 4408, want 1", n)
	}
	b = tcpClient(t, base, wsDial{appID: testApp, side: "B"}, small)
	b.want(opText, frameRoomFull)

	close(stop)
	if frames := <-stopped; frames < 240 {
		t.Errorf("the lazy reader had %d frames", frames)
	}
	// What is left would keep all of them waiting for their socket's end.
	for _, c := range []*rawClient{from, lazy, a, b} {
		c.conn.Close()
	}
}
