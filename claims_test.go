package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// Who sits where, and what the other side is told of it, over WebSockets.

// A wire is a client's end of a connection that can be cut as by a phone that
// leaves its network: nothing passes any more, and nobody is told.
type wire struct {
	net.Conn
	dead   atomic.Bool
	closed chan struct{} // by this end
	once   sync.Once
}

func (w *wire) Read(b []byte) (int, error) {
	n, err := w.Conn.Read(b)
	if w.dead.Load() {
		<-w.closed
		return 0, net.ErrClosed
	}
	return n, err
}

func (w *wire) Write(b []byte) (int, error) {
	if w.dead.Load() {
		return len(b), nil
	}
	return w.Conn.Write(b)
}

func (w *wire) Close() error {
	w.once.Do(func() { close(w.closed) })
	if w.dead.Load() { // only our own reader may notice
		return w.Conn.SetReadDeadline(time.Unix(1, 0))
	}
	return w.Conn.Close()
}

func (w *wire) cut() { w.dead.Store(true) }

// dialOnWire is dial over a wire.
func (ts *testServer) dialOnWire(d wsDial) (*wsClient, *wire, *http.Response, error) {
	ts.t.Helper()
	var w *wire
	via := *ts
	via.http = &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) {
			c, err := ts.net.dial()
			w = &wire{Conn: c, closed: make(chan struct{})}
			return w, err
		},
	}}
	c, res, err := via.dial(d)
	if err != nil {
		via.http.CloseIdleConnections()
	}
	return c, w, res, err
}

// joinOnWire is join over a wire.
func (ts *testServer) joinOnWire(d wsDial) (*wsClient, *wire) {
	ts.t.Helper()
	c, w, _, err := ts.dialOnWire(d)
	if err != nil {
		ts.t.Fatalf("dial %s: %v", d.side, err)
	}
	return c, w
}

// wantEnd is wantClosed once all has settled: it does not wait for a close that
// may never come.
func (c *wsClient) wantEnd(code closeCode, reason string) {
	c.t.Helper()
	if c.ended() {
		c.wantClosed(code, reason)
	} else {
		c.t.Errorf("the connection is open, want it closed with %d %q", code, reason)
	}
}

// ended reports whether the connection has ended, once all has settled.
func (c *wsClient) ended() bool {
	synctest.Wait()
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

// wantJSON is want for frames whose members may come in any order. What an
// error frame says to people is not looked at.
func (c *wsClient) wantJSON(frames ...string) {
	c.t.Helper()
	got := c.settled()
	same := len(got) == len(frames)
	for i := 0; same && i < len(got); i++ {
		g, w := members(c.t, got[i]), members(c.t, frames[i])
		if g["type"] == "error" {
			delete(g, "error")
		}
		same = reflect.DeepEqual(g, w)
	}
	if !same {
		c.t.Errorf("received\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(frames, "\n\t"))
	}
}

func members(t testing.TB, text string) map[string]any {
	t.Helper()
	var m map[string]any
	if err := json.Unmarshal([]byte(text), &m); err != nil {
		t.Fatalf("frame %.200q: %v", text, err)
	}
	return m
}

// Presence frames, as clients of parley.v1 get them.
const (
	joinedV1     = `{"type":"peer_joined","resumed":false,"peerV":1}`
	joinedOld    = `{"type":"peer_joined","resumed":false}`
	resumedV1    = `{"type":"peer_joined","resumed":true,"peerV":1}`
	resumedOld   = `{"type":"peer_joined","resumed":true}`
	roomFullText = `{"type":"room_full"}`
	peerLeftText = `{"type":"peer_left"}`
	peerAwayText = `{"type":"peer_away"}`
)

// welcome returns a welcome frame of a server with default settings, with more
// members or none.
func welcome(side, peer, more string) string {
	return fmt.Sprintf(`{"type":"welcome","v":1,"side":%q,"polite":%t,"peer":%q,"heartbeat":20000,"maxMessage":1048576%s}`,
		side, side == "B", peer, more)
}

const peerV1 = `,"peerV":1`

func TestWelcome(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, peer := range []struct {
			v1   bool
			more string
		}{{false, ""}, {true, peerV1}} {
			for _, side := range []string{"A", "B"} {
				other := map[string]string{"A": "B", "B": "A"}[side]
				id := uuid.NewString()
				me := wsDial{appID: id, side: side, v1: true}
				c := ts.join(me)
				c.wantJSON(welcome(side, "absent", ""))
				c.end(websocket.StatusNormalClosure)

				p := ts.join(wsDial{appID: id, side: other, sid: "secret", v1: peer.v1})
				c = ts.join(me)
				c.wantJSON(welcome(side, "present", peer.more), roomFullText)
				c.end(dropped)
				p.end(dropped)
				c = ts.join(me)
				got := c.settled()
				if len(got) != 1 {
					t.Fatalf("received %q", got)
				}
				m := members(t, got[0])
				delete(m, "peerV") // known or not
				if !reflect.DeepEqual(m, members(t, welcome(side, "away", ""))) {
					t.Errorf("received %s", got[0])
				}
				pass(60 * time.Second)
				c.wantJSON(peerLeftText)
				c.end(dropped)
				c = ts.join(me)
				c.wantJSON(welcome(side, "absent", ""))
			}
		}
	})
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "HEARTBEAT=7s", "WS_MAX_MSG=64KiB")
		c := ts.join(wsDial{appID: uuid.NewString(), side: "B", v1: true})
		c.wantJSON(`{"type":"welcome","v":1,"side":"B","polite":true,"peer":"absent","heartbeat":7000,"maxMessage":65536}`)
	})
}

// What waits comes after the welcome and room_full.
func TestWelcomeAheadOfWhatWaited(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, v1 := range []bool{true, false} {
			id := uuid.NewString()
			a := ts.join(wsDial{appID: id, side: "A", sid: "a"})
			offers := []string{`{"type":"offer","n":1}`, `{"type":"ice","n":2}`, `{"type":"ice","n":3}`}
			for _, o := range offers {
				a.send(o)
			}
			a.mail(1, "1")
			a.wantQueued(1)
			first := []string{roomFullText}
			if v1 {
				first = []string{welcome("B", "present", ""), roomFullText}
			}
			b := ts.join(wsDial{appID: id, side: "B", v1: v1})
			b.wantJSON(append(first, offers...)...)
			b.hello(0)
			b.wantMail("A", "1")
			b.end(dropped)
			a.want(frameRoomFull, framePeerLeft)

			// The sender may be away: then what it left waits all the same.
			a.send(offers[0])
			a.end(dropped)
			if v1 {
				first = []string{welcome("B", "away", "")}
			} else {
				first = nil
			}
			b = ts.join(wsDial{appID: id, side: "B", v1: v1})
			b.wantJSON(append(first, offers[0])...)
		}
	})
}

// What a seat left waiting for one who is not there is stale once it is free:
// no newcomer is offered a connection to somebody who has gone. Mail stays.
func TestStaleRelay(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, there := range []websocket.StatusCode{0, websocket.StatusGoingAway} {
			id := uuid.NewString()
			claimed := wsDial{appID: id, side: "A", sid: "secret"}
			if there != 0 { // B is away, which is not there either
				ts.join(wsDial{appID: id, side: "B", sid: "b"}).end(there)
			}
			a := ts.join(claimed)
			a.send(`{"type":"offer","n":1}`)
			a.mail(1, "1")
			a.wantQueued(1)
			a.end(dropped) // it may be back
			a = ts.join(claimed)
			a.send(`{"type":"offer","n":2}`)
			a.end(websocket.StatusNormalClosure)
			a = ts.join(claimed)
			a.send(`{"type":"offer","n":3}`)
			a.end(dropped)
			b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
			b.want(`{"type":"offer","n":3}`)
			b.hello(0)
			b.wantMail("A", "1")
			b.end(dropped)
			a = ts.join(claimed)
			a.send(`{"type":"offer","n":4}`)
			a.end(dropped)
			pass(50 * time.Second)
			b = ts.join(wsDial{appID: id, side: "B", sid: "b"}) // in time for the offer
			b.want(`{"type":"offer","n":4}`)
			b.end(dropped)
			a = ts.join(claimed)
			a.send(`{"type":"offer","n":5}`)
			a.end(dropped)
			pass(60 * time.Second)
			b = ts.join(wsDial{appID: id, side: "B", sid: "b"}) // too late
			b.want()
			b.hello(0)
			b.wantMail("A", "1")
			b.end(websocket.StatusNormalClosure)
		}
	})
}

func TestPresenceV1(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, v1 := range []bool{true, false} {
			id := uuid.NewString()
			joined, resumed := joinedOld, resumedOld
			if v1 {
				joined, resumed = joinedV1, resumedV1
			}
			a := ts.join(wsDial{appID: id, side: "A", v1: true})
			a.wantJSON(welcome("A", "absent", ""))
			claimed := wsDial{appID: id, side: "B", sid: "secret", v1: v1}

			b := ts.join(claimed)
			a.wantJSON(joined, roomFullText)
			b.end(websocket.StatusNormalClosure)
			a.wantJSON(peerLeftText)
			b = ts.join(claimed) // it left for good, so this is another arrival
			a.wantJSON(joined, roomFullText)
			b.end(websocket.StatusGoingAway)
			a.wantJSON(peerAwayText)
			b = ts.join(claimed)
			a.wantJSON(resumed, roomFullText)
			b.end(dropped)
			a.wantJSON(peerAwayText)
			b = ts.join(claimed)
			a.wantJSON(resumed, roomFullText)
			ts.join(claimed)
			a.wantJSON(resumed, roomFullText)
			b.wantEnd(closeReplaced, "taken_over")
			a.want()
		}
	})
	// One who is not parley.v1 hears of arrivals, and when the seat is free.
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		a.want()
		claimed := wsDial{appID: id, side: "B", sid: "secret", v1: true}
		b := ts.join(claimed)
		a.want(roomFullText)
		b.end(dropped)
		a.want()
		ts.join(claimed)
		a.want(roomFullText)
		ts.join(claimed)
		a.want(roomFullText)
		b = ts.join(claimed)
		a.want(roomFullText)
		b.end(dropped)
		time.Sleep(59999 * time.Millisecond)
		a.want()
		time.Sleep(time.Millisecond)
		a.want(peerLeftText)
		b = ts.join(claimed)
		a.want(roomFullText)
		b.end(websocket.StatusNormalClosure)
		a.want(peerLeftText)
	})
}

// Presence never waits: who attaches is told how things are, and then only what
// changes.
func TestPresenceDoesNotWait(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, claim := range []string{"", "a"} {
			id := uuid.NewString()
			me := wsDial{appID: id, side: "A", sid: claim, v1: true}
			churn := func() {
				for range 3 {
					ts.join(wsDial{appID: id, side: "B", sid: "b"}).end(dropped)
					ts.join(wsDial{appID: id, side: "B", sid: "b"}).end(websocket.StatusNormalClosure)
				}
			}
			churn()
			a := ts.join(me)
			a.wantJSON(welcome("A", "absent", ""))
			a.end(dropped)
			churn()
			a = ts.join(me)
			a.wantJSON(welcome("A", "absent", ""))
			a.end(dropped)
			churn()
			b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
			a = ts.join(me)
			a.wantJSON(welcome("A", "present", ""), roomFullText)
			b.take()
			b.end(websocket.StatusNormalClosure)
			a.wantJSON(peerLeftText)
		}

		// Nor does what a connection did not read before it was lost.
		id := uuid.NewString()
		me := wsDial{appID: id, side: "A", sid: "a", v1: true}
		a, wire := ts.joinOnWire(me)
		a.wantJSON(welcome("A", "absent", ""))
		wire.cut()
		b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
		b.end(dropped)
		a = ts.join(me)
		a.wantJSON(welcome("A", "away", ""))
		ts.join(wsDial{appID: id, side: "B", sid: "b"})
		a.wantJSON(resumedOld, roomFullText)
	})
}

// What was on its way to a connection that no longer reads is old news for the
// next one: it gets the frames that wait, and not the presence.
func TestPresenceThatWasNotReadIsForgotten(t *testing.T) {
	long := `{"type":"ice","x":"` + strings.Repeat("x", 40<<10) + `"}`
	for _, stalled := range []bool{false, true} {
		inBubble(t, func(t *testing.T) {
			ts := newTestServer(t)
			id := uuid.NewString()
			me := wsDial{appID: id, side: "A", sid: "a", v1: true}
			a, wire := ts.joinOnWire(me)
			a.wantJSON(welcome("A", "absent", ""))
			wire.cut()
			b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
			for range 4 { // more than fits on the way
				b.send(long)
			}
			synctest.Wait()
			b.end(websocket.StatusGoingAway)
			b = ts.join(wsDial{appID: id, side: "B", sid: "b"})
			b.send(`{"type":"offer"}`)
			b.end(websocket.StatusGoingAway)
			if stalled { // the server gives up on the old connection
				pass(15 * time.Second)
			}
			checkInvariants(t, ts)
			got := ts.join(me).settled()
			if len(got) < 2 || got[len(got)-1] != `{"type":"offer"}` {
				t.Fatalf("received %.300q", got)
			}
			if !reflect.DeepEqual(members(t, got[0]), members(t, welcome("A", "away", ""))) {
				t.Errorf("received %s first", got[0])
			}
			for _, f := range got[1 : len(got)-1] {
				if f != long {
					t.Errorf("received %.100s", f)
				}
			}
		})
	}
}

func TestBusySeat(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, side := range []string{"A", "B"} {
			for _, holder := range []string{"", "secret"} {
				id := uuid.NewString()
				c := ts.join(wsDial{appID: id, side: side, sid: holder})
				other := ts.join(wsDial{appID: id, side: map[string]string{"A": "B", "B": "A"}[side], v1: true})
				c.want(frameRoomFull)
				other.settled()
				for _, sid := range []string{"", "another", "Secret", holder + " "} {
					for _, v1 := range []bool{false, true} {
						late := ts.join(wsDial{appID: id, side: side, sid: sid, v1: v1})
						late.wantEnd(closeBusy, "side "+side+" busy")
						if got := late.take(); len(got) > 0 {
							t.Errorf("one who was refused got %q", got)
						}
					}
				}
				other.want() // nobody hears of it
				c.want()
				c.send(`{"type":"offer"}`)
				other.want(`{"type":"offer"}`)
				if holder == "" {
					continue
				}

				// A reservation counts as taken, for everybody else.
				c.end(dropped)
				for _, sid := range []string{"", "another"} {
					ts.join(wsDial{appID: id, side: side, sid: sid}).wantEnd(closeBusy, "side "+side+" busy")
				}
				pass(59999 * time.Millisecond)
				ts.join(wsDial{appID: id, side: side, sid: "another"}).wantEnd(closeBusy, "side "+side+" busy")
				other.wantJSON(peerAwayText)
				pass(time.Millisecond)
				other.wantJSON(peerLeftText)
				ts.join(wsDial{appID: id, side: side, sid: "another"})
				other.wantJSON(joinedOld, roomFullText)
			}
		}
	})
}

// An empty sid is none, as clients send it that have none.
func TestEmptySid(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		dial := func() (*websocket.Conn, error) {
			c, _, err := websocket.Dial(t.Context(), wsDial{appID: id, side: "A"}.url()+"&sid=", &websocket.DialOptions{HTTPClient: ts.http})
			return c, err
		}
		first, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		second, err := dial()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := second.Read(t.Context()); websocket.CloseStatus(err) != websocket.StatusPolicyViolation {
			t.Errorf("the second to come without a sid: %v", err)
		}
		first.CloseNow()
		synctest.Wait()
		ts.join(wsDial{appID: id, side: "A"}).want()
		// 128 bytes are the most a sid may have.
		id = uuid.NewString()
		ts.join(wsDial{appID: id, side: "A", sid: strings.Repeat("é", 64)}).want()
		if _, res, err := ts.dial(wsDial{appID: id, side: "B", sid: strings.Repeat("x", 129)}); err == nil || res.StatusCode != http.StatusBadRequest {
			t.Errorf("a sid of 129 bytes: %v, %v", res, err)
		}
	})
}

func TestTakeover(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		b := ts.join(wsDial{appID: id, side: "B", v1: true})
		b.take()
		claimed := wsDial{appID: id, side: "A", sid: "secret"}
		old := ts.join(claimed)
		old.want(frameRoomFull)
		b.wantJSON(welcome("B", "absent", ""), joinedOld, roomFullText)
		old.send(`{"type":"offer","n":1}`)
		b.want(`{"type":"offer","n":1}`)

		now := ts.join(claimed)
		now.want(frameRoomFull)
		b.wantJSON(resumedOld, roomFullText)
		old.wantEnd(closeReplaced, "taken_over")
		now.send(`{"type":"offer","n":2}`)
		b.want(`{"type":"offer","n":2}`)
		b.send(`{"type":"answer"}`)
		now.want(`{"type":"answer"}`)
		old.want()

		// The end of the old one, however it comes, is no end of the seat.
		old.conn.CloseNow()
		time.Sleep(5 * time.Minute)
		b.want()
		now.want()
		now.end(websocket.StatusNormalClosure)
		b.want(framePeerLeft)
	})
}

// A gatedHub lets a test stand between connections and their seats.
type gatedHub struct {
	hub
	post, ack, leave func() // called before the seats' methods
}

type gatedSeat struct {
	seat
	gatedHub
}

func (h gatedHub) Join(ctx context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error) {
	s, v, err := h.hub.Join(ctx, id, r, notify)
	if err != nil {
		return s, v, err
	}
	return gatedSeat{s, h}, v, nil
}

func (s gatedSeat) Post(ctx context.Context, to string, f frame, hold bool) (receipt, error) {
	if s.post != nil {
		s.post()
	}
	return s.seat.Post(ctx, to, f, hold)
}

func (s gatedSeat) Ack(ctx context.Context, upTo uint64) error {
	if s.ack != nil {
		s.ack()
	}
	return s.seat.Ack(ctx, upTo)
}

func (s gatedSeat) Leave(ctx context.Context, forGood bool) error {
	if s.gatedHub.leave != nil {
		s.gatedHub.leave()
	}
	return s.seat.Leave(ctx, forGood)
}

// gate puts h before the server's hub. It comes before the first connection.
func (ts *testServer) gate(h gatedHub) {
	synctest.Wait() // the background work has begun with the hub that it will use
	h.hub = ts.memory
	ts.server.hub = h
}

// Nothing is accepted from a connection that was taken over, not even what the
// server has read already.
func TestTakeoverRefusesFramesInFlight(t *testing.T) {
	for _, in := range []string{`{"type":"ice","n":%d}`, `{"type":"send","payload":{"n":%d}}`, `{"type":"send","id":%d,"payload":0}`} {
		inBubble(t, func(t *testing.T) {
			ts := newTestServer(t)
			reached, goOn := make(chan struct{}), make(chan struct{})
			posts := 0
			ts.gate(gatedHub{post: func() {
				if posts++; posts == 3 {
					close(reached)
					<-goOn
				}
			}})
			id := uuid.NewString()
			b := ts.join(wsDial{appID: id, side: "B", v1: true})
			claimed := wsDial{appID: id, side: "A", sid: "secret"}
			old := ts.join(claimed)
			for n := range 6 {
				old.sendf(in, n+1)
			}
			<-reached
			now := ts.join(claimed)
			synctest.Wait()
			close(goOn)
			synctest.Wait()
			var types []string
			for _, f := range b.serverFrames() {
				types = append(types, f.Type)
			}
			arrival := "deliver"
			if strings.Contains(in, "ice") {
				arrival = "ice"
			}
			want := []string{"welcome", "peer_joined", "room_full", arrival, arrival, "peer_joined", "room_full"}
			slices.Sort(want) // between mail and relay there is no order
			slices.Sort(types)
			if !slices.Equal(types, want) {
				t.Errorf("B got %v, want %v", types, want)
			}
			old.wantEnd(closeReplaced, "taken_over")
			for _, f := range old.serverFrames() {
				if f.Type == "queued" && f.ID > 2 {
					t.Errorf("a receipt for what was not accepted: %s", f.text)
				}
			}
			if strings.Contains(in, "id") { // nor are its ids used up
				now.take()
				now.mail(3, `"mine"`)
				now.wantQueued(3)
				b.wantMail("A", `"mine"`)
			}
		})
	}
}

func TestTakeoverRefusesAcknowledgementsInFlight(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		reached, goOn := make(chan struct{}), make(chan struct{})
		once := sync.OnceFunc(func() { close(reached); <-goOn })
		ts.gate(gatedHub{ack: once})
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		claimed := wsDial{appID: id, side: "B", sid: "secret"}
		old := ts.join(claimed)
		old.want(frameRoomFull)
		a.mail(1, "1", "2")
		seqs := old.wantMail("A", "1", "2")
		old.delivered(seqs[1])
		<-reached
		now := ts.join(claimed)
		synctest.Wait()
		close(goOn)
		now.want(frameRoomFull)
		now.hello(0)
		now.wantMail("A", "1", "2")
	})
}

func TestResume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "RESUME_TTL=90s")
		ends := map[string]func(c *wsClient, w *wire){
			"1001":       func(c *wsClient, _ *wire) { c.end(websocket.StatusGoingAway) },
			"4000":       func(c *wsClient, _ *wire) { c.end(4000) },
			"no frame":   func(c *wsClient, _ *wire) { c.end(dropped) },
			"bad UTF-8":  func(c *wsClient, _ *wire) { c.send("{\"type\":\"\xff\"}"); synctest.Wait() },
			"no network": func(_ *wsClient, w *wire) { w.cut(); time.Sleep(60 * time.Second) }, // two heartbeats, and one for the last sign of life
		}
		for name, end := range ends {
			t.Log(name)
			id := uuid.NewString()
			a := ts.join(wsDial{appID: id, side: "A", v1: true})
			claimed := wsDial{appID: id, side: "B", sid: "secret"}
			b, w := ts.joinOnWire(claimed)
			b.want(frameRoomFull)
			a.wantJSON(welcome("A", "absent", ""), joinedOld, roomFullText)
			end(b, w)
			a.wantJSON(peerAwayText)
			a.send(`{"type":"offer","for":"later"}`)
			time.Sleep(20 * time.Second)
			a.want()
			b = ts.join(claimed)
			a.wantJSON(resumedOld, roomFullText)
			b.want(frameRoomFull, `{"type":"offer","for":"later"}`)
			time.Sleep(5 * time.Minute) // the reservation is over and forgotten
			a.want()
			b.want()

			// Away again, and too late this time.
			b.end(dropped)
			a.wantJSON(peerAwayText)
			time.Sleep(90*time.Second - time.Millisecond)
			a.want()
			time.Sleep(time.Millisecond)
			a.want(framePeerLeft)
			b = ts.join(claimed)
			a.wantJSON(joinedOld, roomFullText)
			b.want(frameRoomFull)
		}
	})
}

// A reservation is a matter between the server and its holder.
func TestReservationOutlivesTheOther(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		claimed := wsDial{appID: id, side: "A", sid: "secret", v1: true}
		a := ts.join(claimed)
		b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
		b.want(frameRoomFull)
		a.wantJSON(welcome("A", "absent", ""), joinedOld, roomFullText)
		a.end(dropped)
		b.end(websocket.StatusNormalClosure)
		ts.join(wsDial{appID: id, side: "A", sid: "another"}).wantEnd(closeBusy, "side A busy")
		b = ts.join(wsDial{appID: id, side: "B", v1: true})
		got := members(t, b.settled()[0])
		if got["peer"] != "away" {
			t.Errorf("the newcomer is told %v", got)
		}
		b.end(dropped)
		ts.join(wsDial{appID: id, side: "A", sid: "another"}).wantEnd(closeBusy, "side A busy")
		a = ts.join(claimed)
		a.wantJSON(welcome("A", "absent", ""))
		a.end(dropped)
		pass(59 * time.Second)
		ts.join(wsDial{appID: id, side: "A", sid: "another"}).wantEnd(closeBusy, "side A busy")
		time.Sleep(time.Second)
		ts.join(wsDial{appID: id, side: "A", sid: "another"}).want()
	})
}

// A dead network is noticed by the second heartbeat without a sign of life, and
// sooner by a client that is back before.
func TestDeadNetwork(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, sid := range []string{"", "secret"} {
			id := uuid.NewString()
			a := ts.join(wsDial{appID: id, side: "A", v1: true})
			b, w := ts.joinOnWire(wsDial{appID: id, side: "B", sid: sid})
			b.want(frameRoomFull)
			a.take()
			pass(30 * time.Second)
			w.cut()
			time.Sleep(9 * time.Second)
			a.want()
			if sid != "" {
				b = ts.join(wsDial{appID: id, side: "B", sid: sid})
				b.want(frameRoomFull)
				a.wantJSON(resumedOld, roomFullText)
				time.Sleep(5 * time.Minute)
				a.want()
				continue
			}
			time.Sleep(31 * time.Second)
			a.want(framePeerLeft)
			ts.join(wsDial{appID: id, side: "B"})
			a.wantJSON(joinedOld, roomFullText)
		}
	})
}

// A seat is free at once when its holder leaves for good, or has no claim.
func TestSeatIsFreeAtOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, sid := range []string{"", "secret"} {
			for _, code := range []websocket.StatusCode{websocket.StatusNormalClosure, websocket.StatusNoStatusRcvd, websocket.StatusGoingAway, 4000, dropped} {
				if sid != "" && code != websocket.StatusNormalClosure && code != websocket.StatusNoStatusRcvd {
					continue // that would be a reservation
				}
				id := uuid.NewString()
				a := ts.join(wsDial{appID: id, side: "A", v1: true})
				b := ts.join(wsDial{appID: id, side: "B", sid: sid})
				a.wantJSON(welcome("A", "absent", ""), joinedOld, roomFullText)
				b.end(code)
				a.wantJSON(peerLeftText)
				b = ts.join(wsDial{appID: id, side: "B", sid: "another"})
				b.want(frameRoomFull)
				a.wantJSON(joinedOld, roomFullText)
			}
		}
	})
}

// At once means: before the client knows that its connection is closed. What
// is waited for here is Leave, which takes its time with another hub.
func TestSeatIsFreeBeforeTheCloseIsAnswered(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		ts.gate(gatedHub{leave: func() { time.Sleep(50 * time.Millisecond) }})
		for _, code := range []websocket.StatusCode{websocket.StatusNormalClosure, websocket.StatusNoStatusRcvd} {
			id := uuid.NewString()
			ts.join(wsDial{appID: id, side: "A", sid: "secret"}).leave(code)
			c := ts.join(wsDial{appID: id, side: "A", sid: "another"})
			if c.ended() {
				got, reason := c.closed()
				t.Errorf("after a close with %d the seat is still taken: %d %s", code, got, reason)
			}
			c.end(dropped)
		}
	})
}

func TestTooManyTakeovers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		b := ts.join(wsDial{appID: id, side: "B"})
		claimed := wsDial{appID: id, side: "A", sid: "secret"}
		holder := ts.join(claimed)
		works := func() {
			t.Helper()
			holder.settled()
			b.settled()
			holder.send(`{"type":"offer"}`)
			b.want(`{"type":"offer"}`)
			b.send(`{"type":"answer"}`)
			holder.want(`{"type":"answer"}`)
		}
		for range 6 {
			pass(time.Second)
			next := ts.join(claimed)
			holder.wantEnd(closeReplaced, "taken_over")
			holder = next
			works()
		}
		for _, v1 := range []bool{false, true, false} {
			late := claimed
			late.v1 = v1
			c := ts.join(late)
			c.wantEnd(closeTooMany, "too_many_takeovers")
			if got := c.take(); len(got) != 0 {
				t.Errorf("who was refused got %q", got)
			}
			works()
		}
		// 10 s after the first of them there is room for one, and one only.
		pass(5 * time.Second)
		next := ts.join(claimed)
		holder.wantEnd(closeReplaced, "taken_over")
		holder = next
		works()
		ts.join(claimed).wantEnd(closeTooMany, "too_many_takeovers")
		works()
		// Coming back to a reserved seat takes nothing over.
		for range 20 {
			holder.end(dropped)
			holder = ts.join(claimed)
			works()
		}
	})
}

// Two devices with one sid.
func TestTwoHoldersOfOneSid(t *testing.T) {
	// share has two clients share a sid for an hour. Each of them comes back
	// when again says so. It returns how often they connected, and how many are
	// connected at the end.
	share := func(ts *testServer, again func(closeCode) (wait time.Duration, ok bool)) (connected, open int) {
		id := uuid.NewString()
		end := time.Now().Add(time.Hour)
		var mu sync.Mutex
		var clients []*wsClient
		var devices sync.WaitGroup
		for range 2 {
			devices.Go(func() {
				for time.Now().Before(end) {
					c := ts.join(wsDial{appID: id, side: "A", sid: "shared"})
					mu.Lock()
					clients = append(clients, c)
					mu.Unlock()
					code, _ := c.closed()
					wait, ok := again(closeCode(code))
					if !ok {
						return
					}
					time.Sleep(wait)
				}
			})
		}
		time.Sleep(time.Until(end))
		synctest.Wait()
		for _, c := range clients {
			select {
			case <-c.done:
			default:
				open++
				c.drop()
			}
		}
		connected = len(clients)
		devices.Wait()
		return connected, open
	}
	comeBack := func(code closeCode) bool { return 4000 <= code && code < 4500 }

	// Those who know what close codes mean are done after one takeover.
	inBubble(t, func(t *testing.T) {
		connected, open := share(newTestServer(t), func(code closeCode) (time.Duration, bool) {
			return time.Second, comeBack(code)
		})
		if connected != 2 || open != 1 {
			t.Errorf("%d connections in an hour, and %d at its end, want 2 and 1", connected, open)
		}
	})
	// Those who come back at once from every 4500 take the seat over 6 times in
	// 10 s. Then one of them is told to come back later, and does.
	inBubble(t, func(t *testing.T) {
		connected, open := share(newTestServer(t), func(code closeCode) (time.Duration, bool) {
			if code == closeReplaced {
				return 0, true
			}
			return 5 * time.Minute, comeBack(code)
		})
		if connected < 20 || connected > 8*12 || open != 1 {
			t.Errorf("%d connections in an hour, and %d at its end, want up to 8 each 5 minutes and 1", connected, open)
		}
	})
}

func TestCodeContested(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		code, id := ts.mint()
		redeem := func(status int) {
			t.Helper()
			if a := ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`); a.status != status {
				t.Errorf("redeem: %d %s", a.status, a.text)
			}
		}
		a := ts.join(wsDial{appID: id, side: "A", v1: true})
		b := ts.join(wsDial{appID: id, side: "B"})
		a.wantJSON(welcome("A", "absent", ""), joinedOld, roomFullText)
		b.want(frameRoomFull)
		redeem(http.StatusOK)
		a.want()
		redeem(http.StatusGone)
		a.want(frameCodeContested)
		b.want() // an old client is not told
		a.end(dropped)
		redeem(http.StatusGone)
		a = ts.join(wsDial{appID: id, side: "A", v1: true})
		a.wantJSON(welcome("A", "present", ""), roomFullText) // nobody was there to be told
		redeem(http.StatusGone)
		a.want(frameCodeContested)
		b.settled()
		pass(10 * time.Minute)
		redeem(http.StatusGone) // it has expired: nothing to contest
		a.want()
	})
}

func TestSubprotocolNegotiation(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		for _, c := range []struct {
			offer string
			want  bool
		}{
			{"", false},
			{"parley.v1", true},
			{"chat, parley.v1", true},
			{"parley.v1 , chat", true},
			{"chat", false},
			{"parley.v10", false},
			{"xparley.v1", false},
			{"parley.v2, parley", false},
		} {
			header := http.Header{}
			if c.offer != "" {
				header.Set("Sec-WebSocket-Protocol", c.offer)
			}
			ws, res, err := websocket.Dial(t.Context(), wsDial{appID: uuid.NewString(), side: "A"}.url(),
				&websocket.DialOptions{HTTPClient: ts.http, HTTPHeader: header})
			// The library refuses an answer it thinks it did not ask for: the
			// header is what counts here.
			if res == nil {
				t.Fatal(err)
			}
			got := res.Header.Values("Sec-WebSocket-Protocol")
			if want := []string{"parley.v1"}; c.want != slices.Equal(got, want) || !c.want && len(got) > 0 {
				t.Errorf("offer %q: the server agrees to %q", c.offer, got)
			}
			if ws != nil {
				ws.CloseNow()
			} else if res.Body != nil {
				res.Body.Close()
			}
		}
		// And what was agreed to is what is spoken.
		ts.join(wsDial{appID: uuid.NewString(), side: "A"}).want()
		ts.join(wsDial{appID: uuid.NewString(), side: "A", v1: true}).wantJSON(welcome("A", "absent", ""))
	})
}

// refused dials and returns how the server refuses: the status and code of an
// HTTP answer, or the code and reason of a close frame.
func refused(ts *testServer, d wsDial) string {
	ts.t.Helper()
	c, res, err := ts.dial(d)
	if err == nil {
		if !c.ended() {
			return "not refused"
		}
		code, reason := c.closed()
		if got := c.take(); len(got) > 0 {
			ts.t.Errorf("one who is refused got %q", got)
		}
		return fmt.Sprint("close ", int(code), " ", reason)
	}
	if res == nil {
		ts.t.Fatal(err)
	}
	var answer struct{ Code, Error string }
	body, _ := io.ReadAll(res.Body)
	if err := json.Unmarshal(body, &answer); err != nil || answer.Error == "" {
		ts.t.Errorf("refused with %d %s", res.StatusCode, body)
	}
	return fmt.Sprint("HTTP ", res.StatusCode, " ", answer.Code)
}

// Clients that offer parley.v1 see why they are refused, which browsers do not
// let a client see of an HTTP answer.
func TestRefusals(t *testing.T) {
	check := func(ts *testServer, d wsDial, old, v1 string) {
		ts.t.Helper()
		d.v1 = false
		if got := refused(ts, d); got != old {
			ts.t.Errorf("refused with %q, want %q", got, old)
		}
		d.v1 = true
		if got := refused(ts, d); got != v1 {
			ts.t.Errorf("parley.v1: refused with %q, want %q", got, v1)
		}
	}
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "APP_IDS=minted", "MAX_SESSIONS=1")
		_, id := ts.mint()
		unknown := wsDial{appID: uuid.NewString(), side: "A"}
		check(ts, unknown, "HTTP 404 unknown_session", "close 4504 unknown_session")
		ts.join(wsDial{appID: id, side: "A", sid: "secret"})
		check(ts, wsDial{appID: id, side: "A"}, "close 1008 side A busy", "close 1008 side A busy")

		// What is wrong with the request itself is always HTTP.
		for _, v := range []struct {
			d    wsDial
			want string
		}{
			{wsDial{appID: id, side: "C"}, "HTTP 400 bad_side"},
			{wsDial{appID: id, side: ""}, "HTTP 400 bad_side"},
			{wsDial{appID: "1234", side: "A"}, "HTTP 400 bad_app_id"},
			{wsDial{appID: "", side: "A"}, "HTTP 400 bad_app_id"},
			{wsDial{appID: "{" + id + "}", side: "A"}, "HTTP 400 bad_app_id"},
		} {
			check(ts, v.d, v.want, v.want)
		}
	})
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "APP_IDS=any", "MAX_SESSIONS=1")
		c := ts.join(wsDial{appID: uuid.NewString(), side: "A"})
		other := wsDial{appID: uuid.NewString(), side: "A"}
		check(ts, other, "HTTP 503 at_capacity", "close 4413 at_capacity")
		c.end(websocket.StatusNormalClosure)
		ts.join(other).want()
	})
	// While the server drains it still answers, until the sockets are closed.
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		ts.drain(t.Context())
		a.wantEnd(closeGoingAway, "server draining")
		check(ts, wsDial{appID: id, side: "B"}, "HTTP 503 draining", "close 1001 draining")
		check(ts, wsDial{appID: id, side: "C"}, "HTTP 400 bad_side", "HTTP 400 bad_side")
	})
}

// A foreign origin is refused as HTTP whatever subprotocol is offered: no page
// of a stranger gets a WebSocket out of the server.
func TestForbiddenOriginIsHTTP(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "CORS_ORIGINS=https://app.example")
		_, id := ts.mint()
		for _, v1 := range []bool{false, true} {
			d := wsDial{appID: id, side: "A", v1: v1, header: http.Header{"Origin": {"https://evil.example"}}}
			c, res, err := ts.dial(d)
			if err == nil {
				t.Errorf("v1 %t: a foreign origin got a WebSocket", v1)
				c.end(dropped)
			} else if res == nil || res.StatusCode != http.StatusForbidden {
				t.Errorf("v1 %t: refused with %v, %v", v1, res, err)
			}
			d.header.Set("Origin", "https://app.example")
			ts.join(d).end(websocket.StatusNormalClosure)
		}
	})
}

// An old client is told nothing that the contract does not list for it, with
// every feature in use around it.
func TestOldClientSeesOnlyWhatItKnows(t *testing.T) {
	known := map[string][]string{ // the members of each frame, and those it may have
		"offer": nil, "answer": nil, "ice": nil, "sender_ready": nil, "bye": nil,
		"deliver":     {"type", "seq", "from", "payload"},
		"room_full":   {"type"},
		"peer_left":   {"type"},
		"queued":      {"type", "id", "seq"},
		"pong":        {"type", "?t"},
		"ice_servers": {"type", "iceServers", "ttl", "?throttled"},
		"error":       {"type", "code", "error", "?ref"},
	}
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		code, id := ts.mint()
		for range 2 { // the second contests the code, once A is there
			ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
		}
		seen := map[string]int{}
		var all []*wsClient
		// old joins A, without the subprotocol.
		old := func(sid string) *wsClient {
			c := ts.join(wsDial{appID: id, side: "A", sid: sid})
			all = append(all, c)
			synctest.Wait()
			return c
		}
		b := ts.join(wsDial{appID: id, side: "B", sid: "b", v1: true})
		for _, typ := range []string{"offer", "answer", "ice", "sender_ready", "bye"} {
			b.sendf(`{"type":%q,"x":1}`, typ)
		}
		b.mail(1, "1", "2")
		a := old("a")
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
		for i, text := range []string{
			`{"type":"hello"}`, `{"type":"hello","deliveredUpTo":99999999999999}`,
			`{"type":"ping","t":[1,"x"]}`, `{"type":"ping"}`, `{"type":"ice_servers"}`,
			`{"type":"telemetry","event":"ice-connected","mode":"direct"}`, `{"type":"telemetry","event":"ice-failed","reason":"x"}`,
			`{"type":"telemetry"}`, `{"type":"send","payload":{"type":"welcome"}}`, `{"type":"send","id":1,"payload":1}`,
			`{"type":"send","id":1,"payload":1}`, `{"type":"send","to":"A","payload":1}`, `{"type":"send","to":"C","payload":1}`,
			`{"type":"delivered","upTo":1}`, `{"type":"delivered"}`,
			`{"type":"welcome"}`, `{"type":"peer_joined"}`, `{"type":"deliver"}`, `{"type":"nonsense"}`, `{"type":1}`, `{}`, `[]`, `nonsense`, ``,
			`{"type":"offer"}`, `{"type":"bye"}`,
		} {
			a.send(text)
			if synctest.Wait(); i%5 == 0 {
				b.mail(10+i, "3")
				b.send(`{"type":"ice"}`)
			}
		}
		// B comes and goes in every way.
		claimed := wsDial{appID: id, side: "B", sid: "b", v1: true}
		b.end(dropped)
		b = ts.join(claimed)
		b2 := ts.join(claimed)
		b.end(dropped)
		b2.end(websocket.StatusNormalClosure)
		for range 65 {
			a.send(`{"type":"ice"}`) // more than may wait
		}
		b = ts.join(claimed)
		b.end(websocket.StatusGoingAway)
		pass(2 * time.Minute)
		_, wire := ts.joinOnWire(claimed)
		wire.cut()
		pass(5 * time.Minute)
		ts.join(wsDial{appID: id, side: "B", sid: "other", v1: true}).mail(1, "4")
		ts.join(wsDial{appID: id, side: "B", v1: true}) // busy
		// So does A.
		old("")
		a2 := old("a")
		a2.end(dropped)
		a2 = old("a")
		a2.hello(0)
		a2.end(websocket.StatusNormalClosure)
		old("").hello(0)
		synctest.Wait()
		ts.stop()

		for _, c := range all {
			for _, text := range c.take() {
				m := members(t, text)
				typ, _ := m["type"].(string)
				seen[typ]++
				want, ok := known[typ]
				if !ok {
					t.Errorf("an old client got %s", text)
				}
				for _, name := range want {
					name, optional := strings.CutPrefix(name, "?")
					if _, there := m[name]; !there && !optional {
						t.Errorf("%s has no %s", text, name)
					}
					delete(m, name)
				}
				if len(m) > 0 && want != nil {
					t.Errorf("%s has more than an old client knows", text)
				}
			}
		}
		for typ := range known {
			if seen[typ] == 0 {
				t.Errorf("no %s was seen: this test does not test it", typ)
			}
		}
	})
}

// A frame is passed on although another one behind it has only begun. On a real
// socket, because there the server reads as much as there is.
func TestFrameBeforeHalfAFrame(t *testing.T) {
	ts, addr := newLoopServer(t)
	c, err := net.Dial("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	id := uuid.NewString()
	a, _, err := openRaw(c, wsDial{appID: id, side: "A"})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second) // long before a message has to be complete
	defer cancel()
	b, _, err := websocket.Dial(ctx, wsDial{appID: id, side: "B"}.url(), &websocket.DialOptions{HTTPClient: ts.http})
	if err != nil {
		t.Fatal(err)
	}
	defer b.CloseNow()
	wantNext := func(want string) {
		t.Helper()
		if _, got, err := b.Read(ctx); string(got) != want {
			t.Fatalf("got %q, %v, want %s", got, err, want)
		}
	}
	wantNext(frameRoomFull)
	offer, ice := `{"type":"offer"}`, `{"type":"ice"}`
	both := slices.Concat(textFrame(offer), textFrame(ice))
	a.Write(both[:len(both)-1])
	wantNext(offer)
	a.Write(both[len(both)-1:])
	wantNext(ice)
}
