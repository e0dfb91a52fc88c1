package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"parley/test/testkit"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"go.uber.org/goleak"
)

// A testServer is a whole server, with its code table, hub and HTTP server, on
// an in-memory network. It belongs in a synctest bubble.
type testServer struct {
	*server
	t      testing.TB
	memory *memoryHub
	table  *codeTable
	net    *memListener
	web    *http.Server
	http   *http.Client
	log    *lockedBuffer
	served chan error
	stop   func()
}

// newTestServer starts a server configured by settings such as "ROOM_TTL=1m".
// When the test ends it is drained, and its invariants are checked.
func newTestServer(t testing.TB, settings ...string) *testServer {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn(settings))
	if err != nil {
		t.Fatal(err)
	}
	ts := &testServer{t: t, net: newMemListener(), log: new(lockedBuffer), served: make(chan error, 1)}
	ts.server = newParley(cfg, slog.New(slog.NewTextHandler(ts.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	ts.inMemory()
	ts.web = ts.newHTTPServer(ts.handler())
	ts.http = ts.clientFrom("127.0.0.1")
	go func() { ts.served <- ts.web.Serve(ts.net) }()
	ctx, cancel := context.WithCancel(context.Background())
	var background sync.WaitGroup
	background.Go(func() { ts.run(ctx) })
	ts.stop = sync.OnceFunc(func() {
		ts.shutdown([]front{{web: ts.web}})
		checkInvariants(t, ts)
		if err := <-ts.served; !errors.Is(err, http.ErrServerClosed) {
			t.Error("serve:", err)
		}
		cancel()
		background.Wait()
		ts.http.CloseIdleConnections()
	})
	t.Cleanup(func() {
		if !ts.draining.Load() {
			synctest.Wait() // who was dropped just now is still leaving
			checkInvariants(t, ts)
		}
		ts.stop()
	})
	return ts
}

// inMemory finds the hub and the codes, unless they are in Redis.
func (ts *testServer) inMemory() {
	ts.memory, _ = ts.hub.(*memoryHub)
	ts.table, _ = ts.codes.(*codeTable)
}

// checkInvariants checks what must hold at every moment.
func checkInvariants(t testing.TB, ts *testServer) {
	t.Helper()
	if ts.memory == nil {
		return
	}
	if err := errors.Join(ts.memory.invariants(), ts.table.invariants()); err != nil {
		t.Error("invariants:", err)
	}
}

// pass lets time go by in a bubble, and then all that was due at that very instant
// happen: without that, a timer of the server's may still be behind the test.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// lookupIn looks variables up in settings of the form NAME=value.
func lookupIn(settings []string) func(string) (string, bool) {
	return func(name string) (string, bool) {
		for _, s := range settings {
			if k, v, _ := strings.Cut(s, "="); k == name {
				return v, true
			}
		}
		return "", false
	}
}

// clientFrom returns an HTTP client whose connections come from ip.
func (ts *testServer) clientFrom(ip string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return ts.net.dialFrom(ip) },
	}}
}

// A httpAnswer is an answer to an API call.
type httpAnswer struct {
	status int
	header http.Header
	text   string
	Error  string
	Code   string
	AppID  string
	Expiry time.Time `json:"expiresAt"`
}

// post sends body as JSON.
func (ts *testServer) post(path, body string) httpAnswer {
	return ts.call(http.MethodPost, path, body, "Content-Type: application/json")
}

// call makes an API call with headers of the form "Name: value".
func (ts *testServer) call(method, path, body string, headers ...string) httpAnswer {
	ts.t.Helper()
	req, err := http.NewRequest(method, "http://parley.test"+path, strings.NewReader(body))
	if err != nil {
		ts.t.Fatal(err)
	}
	for _, h := range headers {
		k, v, _ := strings.Cut(h, ": ")
		if k == "Host" {
			req.Host = v
		} else {
			req.Header.Add(k, v)
		}
	}
	res, err := ts.http.Do(req)
	if err != nil {
		ts.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		ts.t.Fatal(err)
	}
	a := httpAnswer{status: res.StatusCode, header: res.Header, text: string(text)}
	json.Unmarshal(text, &a) // not every answer is JSON
	return a
}

// mint mints a code.
func (ts *testServer) mint() (code, appID string) {
	ts.t.Helper()
	a := ts.post("/rendezvous/code", "")
	if a.status != http.StatusOK {
		ts.t.Fatalf("mint: %d %s", a.status, a.text)
	}
	return a.Code, a.AppID
}

// A testRoom is the answer to opening a room.
type testRoom struct {
	RoomID, Code, OwnerToken string
	ExpiresAt                time.Time
}

// openRoom opens a room.
func (ts *testServer) openRoom(body string, headers ...string) (r testRoom) {
	ts.t.Helper()
	a := ts.call(http.MethodPost, "/api/rooms", body, headers...)
	if a.status != http.StatusCreated {
		ts.t.Fatalf("open a room: %d %s", a.status, a.text)
	}
	if err := json.Unmarshal([]byte(a.text), &r); err != nil {
		ts.t.Fatal(err)
	}
	return r
}

// A wsClient is a WebSocket client that keeps everything it receives.
type wsClient struct {
	t    testing.TB
	conn *websocket.Conn

	mu       sync.Mutex
	received []string // guarded by mu
	binary   []bool   // guarded by mu
	err      error    // guarded by mu: why reading ended
	done     chan struct{}
}

// A wsDial says how to open a WebSocket.
type wsDial struct {
	appID, side, sid string
	room             string // ID or code: of a room, not a pair
	name             string // to be shown in the room
	password, resume string
	v1               bool
	from             string // source address
	header           http.Header
}

func (d wsDial) url() string {
	if d.room != "" {
		q := url.Values{"displayName": {d.name}}
		if d.password != "" {
			q.Set("password", d.password)
		}
		if d.resume != "" {
			q.Set("resume", d.resume)
		}
		return "ws://parley.test/ws/signal/" + url.PathEscape(d.room) + "?" + q.Encode()
	}
	q := url.Values{"appID": {d.appID}, "side": {d.side}}
	if d.sid != "" {
		q.Set("sid", d.sid)
	}
	return "ws://parley.test/ws?" + q.Encode()
}

// dial opens a WebSocket; a refusal is returned with the HTTP answer.
func (ts *testServer) dial(d wsDial) (*wsClient, *http.Response, error) {
	ts.t.Helper()
	o := websocket.DialOptions{HTTPClient: ts.http, HTTPHeader: d.header}
	if d.from != "" {
		o.HTTPClient = ts.clientFrom(d.from)
	}
	if d.v1 {
		o.Subprotocols = []string{subprotocolV1}
	}
	ws, res, err := websocket.Dial(context.Background(), d.url(), &o)
	if err != nil {
		return nil, res, err
	}
	ws.SetReadLimit(-1)
	c := &wsClient{t: ts.t, conn: ws, done: make(chan struct{})}
	go c.read()
	ts.t.Cleanup(func() { c.drop() })
	return c, res, nil
}

// join opens a WebSocket and fails the test if that is refused.
func (ts *testServer) join(d wsDial) *wsClient {
	ts.t.Helper()
	c, res, err := ts.dial(d)
	if err != nil {
		body := ""
		if res != nil && res.Body != nil {
			b, _ := io.ReadAll(res.Body)
			body = string(b)
		}
		ts.t.Fatalf("dial %s%s: %v %s", d.side, d.room, err, body)
	}
	return c
}

func (c *wsClient) read() {
	defer close(c.done)
	for {
		typ, data, err := c.conn.Read(context.Background())
		c.mu.Lock()
		if err != nil {
			c.err = err
			c.mu.Unlock()
			return
		}
		c.received = append(c.received, string(data))
		c.binary = append(c.binary, typ == websocket.MessageBinary)
		c.mu.Unlock()
	}
}

// send sends a text message.
func (c *wsClient) send(text string) {
	c.t.Helper()
	if err := c.conn.Write(context.Background(), websocket.MessageText, []byte(text)); err != nil {
		c.t.Errorf("send %.80s: %v", text, err)
	}
}

func (c *wsClient) sendf(format string, args ...any) { c.send(fmt.Sprintf(format, args...)) }

// take returns what was received since the last take. In a bubble, call it
// after synctest.Wait.
func (c *wsClient) take() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	got := c.received
	c.received, c.binary = nil, nil
	return got
}

// settled waits until nothing in the bubble can go on without the clock, and
// returns what was received since the last take.
func (c *wsClient) settled() []string {
	synctest.Wait()
	return c.take()
}

// want fails unless exactly these messages have been received since the last
// take, once everything has settled.
func (c *wsClient) want(messages ...string) {
	c.t.Helper()
	if got := c.settled(); strings.Join(got, "\n") != strings.Join(messages, "\n") {
		c.t.Errorf("received\n\t%s\nwant\n\t%s", strings.Join(got, "\n\t"), strings.Join(messages, "\n\t"))
	}
}

// leave closes with code and waits for the close handshake.
func (c *wsClient) leave(code websocket.StatusCode) {
	c.conn.Close(code, "")
	<-c.done
}

// drop ends the connection without a close frame.
func (c *wsClient) drop() {
	c.conn.CloseNow()
	<-c.done
}

// closed waits for the end of the connection and returns the server's close
// code and reason, or -1.
func (c *wsClient) closed() (websocket.StatusCode, string) {
	<-c.done
	var e websocket.CloseError
	c.mu.Lock()
	defer c.mu.Unlock()
	if errors.As(c.err, &e) {
		return e.Code, e.Reason
	}
	return -1, ""
}

// wantClosed fails unless the server closes with this code and reason.
func (c *wsClient) wantClosed(code closeCode, reason string) {
	c.t.Helper()
	if got, why := c.closed(); closeCode(got) != code || why != reason {
		c.t.Errorf("closed with %d %q, want %d %q", got, why, code, reason)
	}
}

// lockedBuffer is a bytes.Buffer for concurrent use.
type lockedBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (b *lockedBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *lockedBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

// invariants checks what must hold of the hub whenever no call is under way,
// save that half-received messages count as queued too.
func (h *memoryHub) invariants() error {
	var errs []error
	sessions, rooms, queued := 0, 0, 0
	for i := range h.shards {
		sh := &h.shards[i]
		sh.mu.Lock()
		for id, s := range sh.sessions {
			sessions++
			s.mu.Lock()
			if s.room != nil {
				rooms++
			}
			n, err := s.invariants()
			if err != nil {
				errs = append(errs, fmt.Errorf("session %s: %w", id, err))
			}
			if s.ended || s.id != id || h.shard(id) != sh {
				errs = append(errs, fmt.Errorf("session %s is in the wrong place, or ended", id))
			}
			queued += n
			s.mu.Unlock()
		}
		sh.mu.Unlock()
	}
	if n := h.rooms.Load(); n != int64(rooms) || len(h.codes.rooms) != rooms {
		errs = append(errs, fmt.Errorf("%d rooms counted and %d codes, %d there", n, len(h.codes.rooms), rooms))
	}
	if n := h.sessions.Load(); n != int64(sessions) {
		errs = append(errs, fmt.Errorf("%d sessions counted, %d there", n, sessions))
	}
	if n := h.queued.used.Load(); n < int64(queued) {
		errs = append(errs, fmt.Errorf("%d bytes counted, %d wait in mailboxes", n, queued))
	}
	return errors.Join(errs...)
}

// find returns the session, whether it is over by the clock or not.
func (h *memoryHub) find(id sessionID) *memorySession {
	sh := h.shard(id)
	sh.mu.Lock()
	defer sh.mu.Unlock()
	return sh.sessions[id]
}

func (s *memorySession) invariants() (queued int, err error) {
	var errs []error
	fail := func(format string, args ...any) { errs = append(errs, fmt.Errorf(format, args...)) }
	if s.room != nil && len(s.seats) > maxPlayers {
		fail("%d seats of a room", len(s.seats))
	}
	if s.room != nil && s.hub.codes.rooms[s.room.Code] != s.id {
		fail("code %s leads elsewhere", s.room.Code)
	}
	for i, slot := range s.seats {
		if slot == nil && s.room == nil {
			continue
		}
		if want := string(rune('A' + i)); s.room == nil && slot.name != want {
			fail("seat %d is called %s", i, slot.name)
		}
		if s.room != nil && slot.state() == absent {
			fail("a seat of the room is kept for nobody")
		}
		if s.room != nil && (slot.claim == (claim{}) || s.claimed(slot.claim) != slot || s.member(slot.name, nil) != slot) {
			fail("member %s cannot be told from another", slot.name)
		}
		if slot.holder != nil && (slot.holder.slot != slot || slot.holder.session != s) {
			fail("seat %s is held by a stranger", slot.name)
		}
		if slot.holder != nil && slot.away != nil {
			fail("seat %s is held and reserved", slot.name)
		}
		if slot.away != nil && slot.claim == (claim{}) {
			fail("seat %s is reserved for nobody", slot.name)
		}
		bytes, presence := 0, int32(0)
		waiting := slot.queue.waiting()
		for j := range waiting {
			f := &waiting[j]
			bytes += f.size()
			if f.kind == kindPresence {
				presence++
			}
			if f.kind == kindMail {
				fail("mail in the queue of seat %s", slot.name)
			}
			if slot.holder == nil && f.buf != nil && len(f.buf.b) > 2*len(f.data) {
				fail("a frame of %d bytes that waits for seat %s keeps a buffer of %d", len(f.data), slot.name, len(f.buf.b))
			}
		}
		if bytes != slot.queueBytes || presence != slot.presence {
			fail("seat %s: %d bytes and %d presence frames counted, %d and %d queued", slot.name, slot.queueBytes, slot.presence, bytes, presence)
		}
		if presence > maxPresence || slot.holder == nil && presence > 0 {
			fail("seat %s has %d presence frames waiting", slot.name, presence)
		}
		mail, last := 0, uint64(0)
		for j := range slot.mail {
			f := &slot.mail[j]
			mail += f.size()
			if f.kind != kindMail || f.seq <= last || f.seq > slot.lastSeq || f.buf != nil {
				fail("seat %s: mail %d is out of order or malformed", slot.name, f.seq)
			}
			last = f.seq
		}
		if mail != slot.mailBytes || mail > mailBytes || len(slot.mail) > mailItems {
			fail("seat %s: %d bytes counted in %d items of mail, %d there", slot.name, slot.mailBytes, len(slot.mail), mail)
		}
		if len(slot.taken) > takeovers {
			fail("seat %s remembers %d takeovers", slot.name, len(slot.taken))
		}
		queued += bytes + mail + (len(waiting)+len(slot.mail))*s.hub.frameCost
	}
	return queued, errors.Join(errs...)
}

// invariants checks what must hold of the code table at every moment.
func (t *codeTable) invariants() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	if len(t.entries) != len(t.byExpiry) {
		errs = append(errs, fmt.Errorf("%d codes, %d in the queue", len(t.entries), len(t.byExpiry)))
	}
	for i, e := range t.byExpiry {
		if entry, ok := t.entries[e.key]; !ok || entry.expires != e.expires {
			errs = append(errs, fmt.Errorf("code %d is queued with another expiry, or gone", e.key))
		}
		if i > 0 && t.byExpiry.Less(i, (i-1)/2) {
			errs = append(errs, fmt.Errorf("the queue is out of order at %d", i))
		}
	}
	total := uint32(0)
	for digits, s := range t.spaces {
		taken, blocks := uint32(0), make([]uint16, len(s.blocks))
		for key := range t.entries {
			if n := uint32(key) - s.size; n < s.size {
				taken++
				blocks[n/codeBlock]++
			}
		}
		for i := range blocks {
			if blocks[i] != s.blocks[i] {
				errs = append(errs, fmt.Errorf("%d digits: %d codes counted in block %d, %d taken", digits, s.blocks[i], i, blocks[i]))
			}
		}
		if taken != s.taken {
			errs = append(errs, fmt.Errorf("%d digits: %d codes counted, %d taken", digits, s.taken, taken))
		}
		total += taken
	}
	if int(total) != len(t.entries) {
		errs = append(errs, fmt.Errorf("%d codes in no space", len(t.entries)-int(total)))
	}
	return errors.Join(errs...)
}

// TestMain fails the suite when a goroutine is left over at its end.
func TestMain(m *testing.M) {
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		testkit.RemoveBinary()
		os.Exit(code)
	}))
}
