package test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"net/url"
	"parley/test/testkit"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// A fleet is several instances over one Redis, as clients behind a load balancer
// see them: each call may be answered by another.
type fleet struct {
	t   testing.TB
	all []*testkit.Process
}

// fleetPatience is how long a client waits for what must come.
const fleetPatience = 30 * time.Second

// startFleet starts n instances over a Redis.
func startFleet(t testing.TB, n int, redisURL string, env ...string) *fleet {
	t.Helper()
	f := &fleet{t: t}
	env = append([]string{"REDIS_URL=" + redisURL, "ROOMS=open", "CODE_DIGITS=8", "LOG_LEVEL=warn", "HEARTBEAT=2s"}, env...)
	for range n {
		f.all = append(f.all, testkit.StartBinary(t, env...))
	}
	for _, p := range f.all {
		p := p
		testkit.Eventually(t, "an instance is ready", func() bool { return f.ready(p) })
	}
	return f
}

func (f *fleet) any() *testkit.Process { return f.all[rand.IntN(len(f.all))] }

// ready reports whether an instance says that it is.
func (f *fleet) ready(p *testkit.Process) bool {
	res, err := http.Get(p.URL("/readyz"))
	if err != nil {
		return false
	}
	res.Body.Close()
	return res.StatusCode == http.StatusOK
}

// post makes a call to any instance and returns its status.
func (f *fleet) post(p *testkit.Process, path string, body string, answer any) (int, error) {
	res, err := http.Post(p.URL(path), "application/json", strings.NewReader(body))
	if err != nil {
		return 0, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		return res.StatusCode, err
	}
	json.Unmarshal(text, answer)
	return res.StatusCode, nil
}

// A fleetFrame is what the tests read of a frame.
type fleetFrame struct {
	Type    string          `json:"type"`
	ID      uint64          `json:"id"`
	Seq     uint64          `json:"seq"`
	From    string          `json:"from"`
	Peer    string          `json:"peer"`
	Code    string          `json:"code"`
	N       int             `json:"n"`
	Resumed bool            `json:"resumed"`
	Resume  string          `json:"resume"`
	Peers   []any           `json:"peers"`
	Payload json.RawMessage `json:"payload"`

	raw string // all of it
}

// A fleetConn is a WebSocket that keeps what it receives until that is asked
// for.
type fleetConn struct {
	t    testing.TB
	name string
	ws   *websocket.Conn

	mu     sync.Mutex
	frames []fleetFrame // guarded by mu
	err    error        // guarded by mu
	came   chan struct{}
	done   chan struct{}
}

func (f *fleet) dial(p *testkit.Process, name, path string, query url.Values) (*fleetConn, error) {
	ctx, cancel := context.WithTimeout(context.Background(), fleetPatience)
	defer cancel()
	o := &websocket.DialOptions{}
	if path == "/ws" {
		o.Subprotocols = []string{subprotocolV1}
	}
	ws, res, err := websocket.Dial(ctx, p.WSURL(path)+"?"+query.Encode(), o)
	if err != nil {
		if res != nil && res.Body != nil {
			text, _ := io.ReadAll(res.Body)
			err = fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	ws.SetReadLimit(-1)
	c := &fleetConn{t: f.t, name: name, ws: ws, came: make(chan struct{}, 1), done: make(chan struct{})}
	go c.read()
	f.t.Cleanup(func() { c.drop() })
	return c, nil
}

// join takes a seat of a pair at an instance.
func (f *fleet) join(p *testkit.Process, appID, side, sid string) (*fleetConn, error) {
	q := url.Values{"appID": {appID}, "side": {side}}
	if sid != "" {
		q.Set("sid", sid)
	}
	return f.dial(p, side, "/ws", q)
}

func (c *fleetConn) read() {
	defer close(c.done)
	for {
		_, data, err := c.ws.Read(context.Background())
		frame := fleetFrame{raw: string(data)}
		if err == nil {
			err = json.Unmarshal(data, &frame)
		}
		c.mu.Lock()
		if err != nil {
			c.err = err
		} else {
			c.frames = append(c.frames, frame)
		}
		c.mu.Unlock()
		select {
		case c.came <- struct{}{}:
		default:
		}
		if err != nil {
			return
		}
	}
}

// drop ends the connection without a word.
func (c *fleetConn) drop() {
	c.ws.CloseNow()
	<-c.done
}

// leave ends it for good.
func (c *fleetConn) leave() { c.ws.Close(websocket.StatusNormalClosure, "") }

func (c *fleetConn) sendf(format string, args ...any) error {
	ctx, cancel := context.WithTimeout(context.Background(), fleetPatience)
	defer cancel()
	return c.ws.Write(ctx, websocket.MessageText, fmt.Appendf(nil, format, args...))
}

// await returns the first frame that matches, and forgets it.
func (c *fleetConn) await(what string, matches func(fleetFrame) bool) (fleetFrame, error) {
	timeout := time.NewTimer(fleetPatience)
	defer timeout.Stop()
	for {
		c.mu.Lock()
		i := slices.IndexFunc(c.frames, matches)
		if i >= 0 {
			frame := c.frames[i]
			c.frames = slices.Delete(c.frames, i, i+1)
			c.mu.Unlock()
			return frame, nil
		}
		err, have := c.err, len(c.frames)
		c.mu.Unlock()
		if err != nil {
			return fleetFrame{}, fmt.Errorf("%s waits for %s: %w", c.name, what, err)
		}
		select {
		case <-c.came:
		case <-timeout.C:
			return fleetFrame{}, fmt.Errorf("%s waits in vain for %s, with %d other frames", c.name, what, have)
		}
	}
}

func (c *fleetConn) awaitType(types ...string) (fleetFrame, error) {
	return c.await(strings.Join(types, " or "), func(f fleetFrame) bool { return slices.Contains(types, f.Type) })
}

// closeCode waits for the end of the connection and returns its code.
func (c *fleetConn) closeCode() websocket.StatusCode {
	select {
	case <-c.done:
	case <-time.After(fleetPatience):
		return 0
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return websocket.CloseStatus(c.err)
}

// meet mints a code at one instance, redeems it at another, and returns what it
// names.
func (f *fleet) meet() (appID string, err error) {
	var minted, redeemed struct{ Code, AppID string }
	if status, err := f.post(f.any(), "/rendezvous/code", "", &minted); status != http.StatusOK {
		return "", fmt.Errorf("mint: %d %w", status, err)
	}
	if status, err := f.post(f.any(), "/rendezvous/redeem", `{"code":"`+minted.Code+`"}`, &redeemed); status != http.StatusOK || redeemed.AppID != minted.AppID {
		return "", fmt.Errorf("redeem: %d %s, want %s: %w", status, redeemed.AppID, minted.AppID, err)
	}
	return minted.AppID, nil
}

// pair runs a whole session: rendezvous, relay both ways, mail both ways with
// receipts and acknowledgements, and the end.
func (f *fleet) pair(mails int) error {
	appID, err := f.meet()
	if err != nil {
		return err
	}
	a, err := f.join(f.any(), appID, "A", "a's secret")
	if err != nil {
		return err
	}
	// An offer may come before there is anybody to take it.
	if err := a.sendf(`{"type":"offer","n":1}`); err != nil {
		return err
	}
	b, err := f.join(f.any(), appID, "B", "b's secret")
	if err != nil {
		return err
	}
	if _, err := b.awaitType("offer"); err != nil {
		return err
	}
	if err := b.sendf(`{"type":"answer","n":1}`); err != nil {
		return err
	}
	if _, err := a.awaitType("answer"); err != nil {
		return err
	}
	const candidates = 5
	for from, to := range map[*fleetConn]*fleetConn{a: b, b: a} {
		for n := range candidates {
			if err := from.sendf(`{"type":"ice","n":%d}`, n); err != nil {
				return err
			}
		}
		for n := range candidates {
			if frame, err := to.awaitType("ice"); err != nil || frame.N != n {
				return fmt.Errorf("candidate %d reads %+v, %w", n, frame, err)
			}
		}
	}
	for from, to := range map[*fleetConn]*fleetConn{a: b, b: a} {
		var queued []uint64
		for n := 1; n <= mails; n++ {
			if err := from.sendf(`{"type":"send","payload":%d,"id":%d}`, n, n); err != nil {
				return err
			}
		}
		for n := 1; n <= mails; n++ {
			frame, err := from.awaitType("queued", "error")
			if err != nil || frame.ID != uint64(n) || frame.Seq == 0 {
				return fmt.Errorf("receipt %d reads %+v, %w", n, frame, err)
			}
			queued = append(queued, frame.Seq)
		}
		for n, seq := range queued {
			frame, err := to.awaitType("deliver")
			if err != nil || frame.Seq != seq || string(frame.Payload) != fmt.Sprint(n+1) {
				return fmt.Errorf("mail %d with seq %d reads %+v, %w", n+1, seq, frame, err)
			}
			if err := to.sendf(`{"type":"delivered","upTo":%d}`, seq); err != nil {
				return err
			}
		}
		// What was acknowledged is gone: the mailbox has room for as much again.
	}
	if err := a.sendf(`{"type":"bye"}`); err != nil {
		return err
	}
	if _, err := b.awaitType("bye"); err != nil {
		return err
	}
	a.leave()
	if _, err := b.awaitType("peer_left"); err != nil {
		return err
	}
	b.leave()
	return nil
}

// room opens a room and lets some meet in it, each at any instance.
func (f *fleet) room(members int) error {
	var opened struct{ Code, RoomID, OwnerToken string }
	if status, err := f.post(f.any(), "/api/rooms", `{"maxPlayers":8}`, &opened); status != http.StatusCreated {
		return fmt.Errorf("open a room: %d %w", status, err)
	}
	conns, ids := make([]*fleetConn, members), make([]string, members)
	for i := range conns {
		c, err := f.dial(f.any(), fmt.Sprint("member ", i), "/ws/signal/"+opened.Code, url.Values{"displayName": {fmt.Sprint(i)}})
		if err != nil {
			return err
		}
		welcome, err := c.awaitType("join")
		if err != nil || len(welcome.Peers) != i {
			return fmt.Errorf("member %d is welcomed with %+v, %w", i, welcome, err)
		}
		conns[i], ids[i] = c, welcome.From
		for _, other := range conns[:i] {
			if frame, err := other.awaitType("join"); err != nil || frame.From != ids[i] {
				return fmt.Errorf("of member %d: %+v, %w", i, frame, err)
			}
		}
	}
	for i, c := range conns {
		for j := range conns {
			if i != j {
				if err := c.sendf(`{"type":"offer","to":%q,"payload":%d}`, ids[j], i); err != nil {
					return err
				}
			}
		}
		if err := c.sendf(`{"type":"candidate","payload":%d}`, i); err != nil {
			return err
		}
	}
	for j, c := range conns {
		for _, kind := range []string{"offer", "candidate"} {
			for i := range conns {
				if i == j {
					continue
				}
				frame, err := c.await(kind+" of "+ids[i], func(f fleetFrame) bool { return f.Type == kind && f.From == ids[i] })
				if err != nil || string(frame.Payload) != fmt.Sprint(i) {
					return fmt.Errorf("%s to %d: %+v, %w", kind, j, frame, err)
				}
			}
		}
	}
	conns[0].leave()
	for _, c := range conns[1:] {
		if frame, err := c.awaitType("leave"); err != nil || frame.From != ids[0] {
			return fmt.Errorf("%+v, %w", frame, err)
		}
	}
	req, _ := http.NewRequest(http.MethodDelete, f.any().URL("/api/rooms/"+opened.RoomID), nil)
	req.Header.Set("Authorization", "Bearer "+opened.OwnerToken)
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	res.Body.Close()
	for _, c := range conns[1:] {
		if code := c.closeCode(); code != websocket.StatusCode(closeDeleted) {
			return fmt.Errorf("closed with %d as the room was deleted", code)
		}
	}
	return nil
}

// atOnce calls f n times, so many at once, and fails the test with the errors.
func atOnce(t testing.TB, n, together int, f func(i int) error) {
	t.Helper()
	var workers sync.WaitGroup
	var next atomic.Int64
	for range together {
		workers.Go(func() {
			for i := next.Add(1); i <= int64(n); i = next.Add(1) {
				if err := f(int(i)); err != nil {
					t.Error(err)
				}
			}
		})
	}
	workers.Wait()
}

// Three instances are one server to whoever uses them.
func TestFleet(t *testing.T) {
	server := testkit.StartRedis(t)
	f := startFleet(t, 3, "redis://"+server.Addr)
	atOnce(t, 40, 8, func(int) error { return f.pair(5) })
	atOnce(t, 6, 3, func(int) error { return f.room(4) })
	t.Run("one winner", func(t *testing.T) { testFleetRedeem(t, f) })
	t.Run("takeover", func(t *testing.T) { testFleetTakeover(t, f) })
}

// Of 200 who redeem a code at once, over all instances, one wins.
func testFleetRedeem(t *testing.T, f *fleet) {
	var minted struct{ Code string }
	if status, err := f.post(f.any(), "/rendezvous/code", "", &minted); status != http.StatusOK {
		t.Fatal("mint:", status, err)
	}
	var answers [600]atomic.Int32
	start := make(chan struct{})
	var redeeming sync.WaitGroup
	client := &http.Client{Transport: &http.Transport{MaxIdleConnsPerHost: 200}}
	defer client.CloseIdleConnections()
	for i := range 200 {
		redeeming.Go(func() {
			<-start
			res, err := client.Post(f.all[i%len(f.all)].URL("/rendezvous/redeem"), "application/json", bytes.NewReader([]byte(`{"code":"`+minted.Code+`"}`)))
			if err != nil {
				t.Error(err)
				return
			}
			res.Body.Close()
			answers[res.StatusCode].Add(1)
		})
	}
	close(start)
	redeeming.Wait()
	won, gone, throttled := answers[http.StatusOK].Load(), answers[http.StatusGone].Load(), answers[http.StatusTooManyRequests].Load()
	if won != 1 || won+gone+throttled != 200 {
		t.Errorf("%d redeemed the code, %d were too late, %d were told to wait", won, gone, throttled)
	}
}

// Whoever comes back at another instance takes the seat over.
func testFleetTakeover(t *testing.T, f *fleet) {
	appID := uuid.NewString()
	b, err := f.join(f.all[2], appID, "B", "")
	if err != nil {
		t.Fatal(err)
	}
	a, err := f.join(f.all[0], appID, "A", "secret")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.awaitType("peer_joined"); err != nil {
		t.Fatal(err)
	}
	again, err := f.join(f.all[1], appID, "A", "secret")
	if err != nil {
		t.Fatal(err)
	}
	if code := a.closeCode(); code != websocket.StatusCode(closeReplaced) {
		t.Errorf("the old connection closed with %d, want %d", code, closeReplaced)
	}
	if frame, err := b.awaitType("peer_joined"); err != nil || !frame.Resumed {
		t.Errorf("%+v, %v", frame, err)
	}
	if err := again.sendf(`{"type":"offer","n":7}`); err != nil {
		t.Error(err)
	}
	if frame, err := b.awaitType("offer"); err != nil || frame.N != 7 {
		t.Errorf("%+v, %v", frame, err)
	}
}
