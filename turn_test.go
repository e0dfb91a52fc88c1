package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"parley/test/testkit"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/pion/stun/v3"
	"github.com/pion/turn/v5"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// A testRelay is a relay with no sockets: what it sends is kept. It belongs in a
// bubble.
type testRelay struct {
	*turnServer
	t       testing.TB
	metrics *metrics
	stop    func()

	mu    sync.Mutex
	sent  []sentMessage
	gone  map[sessionID]error // what the hub says of sessions
	rooms map[sessionID]int   // seats of rooms
}

type sentMessage struct {
	to   turnSource
	data []byte
}

func (r *testRelay) send(to turnSource, message []byte) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sent = append(r.sent, sentMessage{to, bytes.Clone(message)})
	return true
}

func newTestRelay(t testing.TB, settings ...string) *testRelay {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn(append(settings, "TURN=on", "TURN_SECRET=s")))
	if err != nil {
		t.Fatal(err)
	}
	r := &testRelay{t: t, metrics: newMetrics(), gone: make(map[sessionID]error), rooms: make(map[sessionID]int)}
	r.turnServer = newTURNServer(cfg, slog.New(slog.DiscardHandler), r.metrics, func(_ context.Context, id sessionID) (int, error) {
		r.mu.Lock()
		defer r.mu.Unlock()
		return max(r.rooms[id], 2), r.gone[id]
	})
	r.replies = r
	r.guard = newConnectionGuard(0, func() int { return 0 })
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { r.turnServer.run(ctx); close(done) }()
	r.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		r.close()
	})
	t.Cleanup(r.stop)
	return r
}

// take gives the relay a message and returns what it sent for it.
func (r *testRelay) take(from turnSource, message []byte) []sentMessage {
	buf := make([]byte, headroom+len(message)+tailroom)
	copy(buf[headroom:], message)
	r.turnServer.take(r, from, buf, headroom, headroom+len(message), r.now())
	synctest.Wait() // who asks the hub has done so
	r.mu.Lock()
	defer r.mu.Unlock()
	sent := r.sent
	r.sent = nil
	return sent
}

// A relayClient is a client of a testRelay.
type relayClient struct {
	*testRelay
	src      turnSource
	session  sessionID
	username string
	password string
	nonce    string
	port     int // of the relayed address
}

func (r *testRelay) client(addr string, session sessionID) *relayClient {
	c := &relayClient{testRelay: r, src: turnSource{addr: netip.MustParseAddrPort(addr)}, session: session}
	c.username, c.password = r.credential(session, time.Now().Add(time.Hour))
	return c
}

// ask makes a request with the client's credential and returns the answer: nil for
// none.
func (c *relayClient) ask(method stun.Method, attributes ...stun.Setter) *stun.Message {
	c.t.Helper()
	for range 2 {
		setters := []stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassRequest)}
		setters = append(setters, attributes...)
		if c.nonce != "" {
			setters = append(setters, stun.NewUsername(c.username), stun.NewRealm(turnRealm), stun.NewNonce(c.nonce),
				turnKey(c.username, c.password))
		}
		m := stun.MustBuild(append(setters, stun.Fingerprint)...)
		sent := c.take(c.src, m.Raw)
		if len(sent) == 0 {
			return nil
		}
		if len(sent) != 1 || sent[0].to != c.src {
			c.t.Fatalf("%v is answered %v", m, sent)
		}
		answer := &stun.Message{Raw: sent[0].data}
		if err := answer.Decode(); err != nil || answer.TransactionID != m.TransactionID || answer.Type.Method != method {
			c.t.Fatalf("%v is answered %v: %v", m, answer, err)
		}
		if c.nonce != "" && errorCode(answer) != stun.CodeStaleNonce {
			return answer
		}
		var nonce stun.Nonce
		if err := nonce.GetFrom(answer); err != nil {
			c.t.Fatalf("no nonce in %v", answer)
		}
		c.nonce = nonce.String()
	}
	c.t.Fatal("no nonce is good")
	return nil
}

func errorCode(m *stun.Message) stun.ErrorCode {
	if m == nil {
		return -1
	}
	var code stun.ErrorCodeAttribute
	if code.GetFrom(m) != nil {
		return 0
	}
	return code.Code
}

func attribute(t stun.AttrType, value ...byte) stun.Setter {
	return setterFunc(func(m *stun.Message) error {
		m.Add(t, value)
		return nil
	})
}

func requestedTransport(protocol byte) stun.Setter {
	return attribute(stun.AttrRequestedTransport, protocol, 0, 0, 0)
}

func peerAttribute(addr string) stun.Setter {
	a := netip.MustParseAddrPort(addr)
	return setterFunc(func(m *stun.Message) error {
		return (&stun.XORMappedAddress{IP: a.Addr().AsSlice(), Port: int(a.Port())}).AddToAs(m, stun.AttrXORPeerAddress)
	})
}

func virtual(port int) string { return fmt.Sprintf("192.0.2.1:%d", port) }

// allocate returns the code of what goes wrong, or 0.
func (c *relayClient) allocate(attributes ...stun.Setter) stun.ErrorCode {
	c.t.Helper()
	answer := c.ask(stun.MethodAllocate, append([]stun.Setter{requestedTransport(17)}, attributes...)...)
	if code := errorCode(answer); code != 0 {
		return code
	}
	var relayed, mapped stun.XORMappedAddress
	err := errors.Join(relayed.GetFromAs(answer, stun.AttrXORRelayedAddress), mapped.GetFrom(answer), turnKey(c.username, c.password).Check(answer))
	if err != nil || relayed.IP.String() != "192.0.2.1" || mapped.String() != c.src.addr.String() {
		c.t.Fatalf("%v: relayed %v, mapped %v, %v", answer, relayed, mapped, err)
	}
	c.port = relayed.Port
	return 0
}

func (c *relayClient) permit(addr string) stun.ErrorCode {
	return errorCode(c.ask(stun.MethodCreatePermission, peerAttribute(addr)))
}

func (c *relayClient) bind(number uint16, addr string) stun.ErrorCode {
	return errorCode(c.ask(stun.MethodChannelBind, attribute(stun.AttrChannelNumber, byte(number>>8), byte(number), 0, 0), peerAttribute(addr)))
}

func channelData(number uint16, payload string) []byte {
	b := binary.BigEndian.AppendUint16(nil, number)
	b = binary.BigEndian.AppendUint16(b, uint16(len(payload)))
	return append(b, payload...)
}

func (c *relayClient) sendTo(addr, payload string) []sentMessage {
	return c.take(c.src, stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodSend, stun.ClassIndication),
		peerAttribute(addr), attribute(stun.AttrData, []byte(payload)...)).Raw)
}

// counted reads a series of the relay.
func (r *testRelay) dropped(reason turnDrop) float64 {
	return testutil.ToFloat64(r.metrics.turn.dropped[reason])
}
func (r *testRelay) refused(reason turnRefusal) float64 {
	return testutil.ToFloat64(r.metrics.turn.refused[reason])
}

// relayPair returns two clients of one session that may send to each other.
func (r *testRelay) relayPair() (a, b *relayClient) {
	r.t.Helper()
	id := uuid.New()
	a, b = r.client("198.51.100.1:1000", id), r.client("[2001:db8::1]:1000", id)
	for _, c := range []*relayClient{a, b} {
		if code := c.allocate(); code != 0 {
			r.t.Fatal(code)
		}
	}
	for _, code := range []stun.ErrorCode{a.permit(virtual(b.port)), b.permit(virtual(a.port))} {
		if code != 0 {
			r.t.Fatal(code)
		}
	}
	return a, b
}

// What one client sends, the other gets: as a Data indication, and on its own
// channel once it has one.
func TestTURNHandOver(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t)
		a, b := r.relayPair()
		for _, payload := range []string{"", "1", "123", "1234", strings.Repeat("x", 1500)} {
			indication := func(sent []sentMessage) {
				t.Helper()
				if len(sent) != 1 || sent[0].to != b.src {
					t.Fatalf("%d bytes: %v", len(payload), sent)
				}
				m := &stun.Message{Raw: sent[0].data}
				err := m.Decode()
				peer, peerErr := peerOf(m)
				data, dataErr := m.Get(stun.AttrData)
				if errors.Join(err, peerErr, dataErr) != nil || m.Type != stun.NewType(stun.MethodData, stun.ClassIndication) ||
					peer.String() != virtual(a.port) || string(data) != payload || len(m.Raw)%4 != 0 {
					t.Fatalf("%d bytes: %v from %v with %q: %v %v %v", len(payload), m, peer, data, err, peerErr, dataErr)
				}
			}
			indication(a.sendTo(virtual(b.port), payload))
			if code := a.bind(0x4001, virtual(b.port)); code != 0 {
				t.Fatal(code)
			}
			indication(a.take(a.src, channelData(0x4001, payload)))
		}
		if code := b.bind(0x7fff, virtual(a.port)); code != 0 {
			t.Fatal(code)
		}
		for _, sent := range [][]sentMessage{a.take(a.src, channelData(0x4001, "hello")), a.sendTo(virtual(b.port), "hello")} {
			if len(sent) != 1 || sent[0].to != b.src || !bytes.Equal(sent[0].data, channelData(0x7fff, "hello")) {
				t.Errorf("on a channel: %v", sent)
			}
		}
		if n := testutil.ToFloat64(r.metrics.turn.bytes[in]); n != testutil.ToFloat64(r.metrics.turn.bytes[out]) || n == 0 {
			t.Errorf("%v bytes in", n)
		}
	})
}

// Nobody reaches another session, a third host, or who gave no permission.
func TestTURNIsClosed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t)
		a, b := r.relayPair()
		stranger := r.client("198.51.100.9:9", uuid.New())
		if code := stranger.allocate(); code != 0 {
			t.Fatal(code)
		}
		silent := r.client("198.51.100.3:3", a.session)
		if code := silent.allocate(); code != 0 {
			t.Fatal(code)
		}
		for _, addr := range []string{"127.0.0.1:80", "198.51.100.1:1000", "192.0.2.2:1024", "[::1]:1", "[::ffff:192.0.2.2]:1024", "10.0.0.1:1"} {
			if code := a.permit(addr); code != stun.CodeForbidden {
				t.Errorf("a permission for %s: %d", addr, code)
			}
			if code := a.bind(0x4000, addr); code != stun.CodeForbidden {
				t.Errorf("a channel to %s: %d", addr, code)
			}
			if sent := a.sendTo(addr, "x"); sent != nil {
				t.Errorf("sent to %s: %v", addr, sent)
			}
		}
		if n := r.refused(turnForbidden); n != 12 {
			t.Errorf("%v refused", n)
		}
		if stranger.permit(virtual(b.port)) != 0 || stranger.bind(0x4000, virtual(b.port)) != 0 {
			t.Error("an address of the relay is refused, which tells that it is another session's")
		}
		for _, sent := range [][]sentMessage{stranger.sendTo(virtual(b.port), "x"), stranger.take(stranger.src, channelData(0x4000, "x")), a.sendTo(virtual(stranger.port), "x")} {
			if sent != nil {
				t.Errorf("another session: %v", sent)
			}
		}
		if n := r.dropped(turnOtherSession); n != 3 {
			t.Errorf("%v dropped between sessions", n)
		}
		before := r.dropped(turnNoPermission)
		if sent := a.sendTo(virtual(silent.port), "x"); sent != nil || silent.sendTo(virtual(a.port), "x") != nil || r.dropped(turnNoPermission) != before+2 {
			t.Errorf("without a permission: %v", sent)
		}
		if sent := a.sendTo(virtual(60000), "x"); sent != nil || a.sendTo(virtual(80), "x") != nil || r.dropped(turnNoPeer) != 2 {
			t.Errorf("to nobody: %v", sent)
		}
		if sent := a.take(a.src, channelData(0x4abc, "x")); sent != nil || r.dropped(turnNoAllocation) != 1 {
			t.Errorf("on no channel: %v", sent)
		}
	})
}

// Every answer about a credential is one that browsers know: 401 with realm and
// nonce.
func TestTURNCredentials(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t, "TURN_SECRET=new,old")
		challenged := func(what string, m *stun.Message) {
			t.Helper()
			var realm stun.Realm
			var nonce stun.Nonce
			if errorCode(m) != stun.CodeUnauthorized || realm.GetFrom(m) != nil || nonce.GetFrom(m) != nil || realm.String() != turnRealm {
				t.Errorf("%s: %v", what, m)
			}
		}
		ask := func(change func(*relayClient)) *stun.Message {
			c := r.client("198.51.100.1:7", uuid.New())
			change(c)
			return c.ask(stun.MethodAllocate, requestedTransport(17))
		}
		challenged("a wrong password", ask(func(c *relayClient) { c.password = "x" }))
		challenged("no such user", ask(func(c *relayClient) { c.username = "ada" }))
		challenged("another's user", ask(func(c *relayClient) { c.username, _ = r.credential(uuid.New(), time.Now().Add(time.Hour)) }))
		challenged("a later expiry", ask(func(c *relayClient) { c.username = "9" + c.username[1:] }))
		if n := r.refused(turnUnauthorized); n != 4 {
			t.Errorf("%v refused", n)
		}
		challenged("expired", ask(func(c *relayClient) { c.username, c.password = r.credential(c.session, time.Now()) }))
		if n := r.refused(turnExpired); n != 1 {
			t.Errorf("%v refused", n)
		}
		challenged("a session that has ended", ask(func(c *relayClient) { r.gone[c.session] = errGone }))
		if n := r.refused(turnSessionGone); n != 1 {
			t.Errorf("%v refused", n)
		}
		if m := ask(func(c *relayClient) { r.gone[c.session] = errors.New("Redis is away") }); m != nil || r.refused(turnBusy) != 1 {
			t.Errorf("while the hub does not answer: %v, want none, so that the client asks again", m)
		}
		if m := ask(func(c *relayClient) {
			username := r.username(c.session, time.Now().Add(time.Hour))
			id, expires, _ := parseUsername(username, "new")
			old := &turnServer{secrets: []string{"old"}}
			c.username, c.password = old.credential(id, expires)
		}); errorCode(m) != 0 {
			t.Errorf("the old secret: %v", m)
		}

		// A relay in use does not die with its credential, and its nonce is renewed.
		a, b := r.relayPair()
		for range 30 {
			pass(5 * time.Minute)
			for _, c := range []*relayClient{a, b} {
				if m := c.ask(stun.MethodRefresh); errorCode(m) != 0 {
					t.Fatalf("refreshed: %v", m)
				}
				if code := c.permit(virtual(1024)); code != 0 {
					t.Fatal(code)
				}
			}
		}
		if sent := a.sendTo(virtual(b.port), "x"); len(sent) != 1 {
			t.Error("not relayed after the credential has expired")
		}
		if code := r.client("198.51.100.1:8", a.session).allocate(); code != 0 {
			t.Errorf("a new credential: %d", code)
		}
		late := &relayClient{testRelay: r, src: turnSource{addr: netip.MustParseAddrPort("198.51.100.1:9")}, username: a.username, password: a.password}
		if code := late.allocate(); code != stun.CodeUnauthorized {
			t.Errorf("a new allocation with the old credential: %d", code)
		}

		// A nonce is good for one address.
		other := r.client("198.51.100.2:7", a.session)
		other.nonce = a.nonce
		m := stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest), requestedTransport(17),
			stun.NewUsername(other.username), stun.NewRealm(turnRealm), stun.NewNonce(a.nonce), turnKey(other.username, other.password))
		sent := r.take(other.src, m.Raw)
		answer := &stun.Message{Raw: sent[0].data}
		if err := answer.Decode(); err != nil || errorCode(answer) != stun.CodeStaleNonce {
			t.Errorf("another's nonce: %v", answer)
		}
	})
}

func TestTURNAllocationsOfRoom(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r, id := newTestRelay(t), uuid.New()
		r.rooms[id] = 4
		for i := range 3 * maxPeerAllocations {
			if code := r.client(fmt.Sprintf("198.51.100.1:%d", 1000+i), id).allocate(); code != 0 {
				t.Fatal(i, code)
			}
		}
		if code := r.client("198.51.100.1:900", id).allocate(); code != stun.CodeAllocQuotaReached {
			t.Errorf("one more of the room: %d", code)
		}
	})
}

func TestTURNAllocations(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t, "TURN_MAX_ALLOCATIONS=20")
		id := uuid.New()
		addr := func(i int) string { return fmt.Sprintf("198.51.100.1:%d", 1000+i) }
		for i := range maxPeerAllocations {
			if code := r.client(addr(i), id).allocate(); code != 0 {
				t.Fatal(i, code)
			}
		}
		if code := r.client(addr(100), id).allocate(); code != stun.CodeAllocQuotaReached || r.refused(turnSessionFull) != 1 {
			t.Errorf("one more of the session: %d", code)
		}
		for i := range 20 - maxPeerAllocations {
			if code := r.client(addr(200+i), uuid.New()).allocate(); code != 0 {
				t.Fatal(i, code)
			}
		}
		last := r.client(addr(300), uuid.New())
		if code := last.allocate(); code != stun.CodeInsufficientCapacity || r.refused(turnFull) != 1 {
			t.Errorf("one more in all: %d", code)
		}
		first := r.client(addr(0), id)
		if m := first.ask(stun.MethodRefresh, attribute(stun.AttrLifetime, 0, 0, 0, 0)); errorCode(m) != 0 {
			t.Errorf("given back: %v", m)
		}
		if code := last.allocate(); code != 0 {
			t.Errorf("in the place that was given back: %d", code)
		}
		if m := first.ask(stun.MethodRefresh); errorCode(m) != stun.CodeAllocMismatch {
			t.Errorf("refreshed after that: %v", m)
		}
		// Whoever is silent loses it.
		pass(allocationLife + time.Second)
		if r.count != 0 || len(r.sessions) != 0 || testutil.ToFloat64(r.metrics.turn.allocations) != 0 {
			t.Errorf("%d allocations of %d sessions are left", r.count, len(r.sessions))
		}
		for i := range r.clients {
			if n := len(r.clients[i].all); n != 0 {
				t.Errorf("%d clients are left", n)
			}
		}
		if code := first.allocate(); code != 0 {
			t.Errorf("anew: %d", code)
		}
	})
}

// What RFC 8656 says about requests that are sent again, or make no sense.
func TestTURNRequests(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t)
		c := r.client("198.51.100.1:1000", uuid.New())
		for what, tc := range map[string]struct {
			attributes []stun.Setter
			want       stun.ErrorCode
		}{
			"TCP, RFC 6062":        {[]stun.Setter{requestedTransport(6)}, stun.CodeUnsupportedTransProto},
			"no transport":         {nil, stun.CodeBadRequest},
			"IPv6":                 {[]stun.Setter{requestedTransport(17), attribute(stun.AttrRequestedAddressFamily, 2, 0, 0, 0)}, stun.CodeAddrFamilyNotSupported},
			"a pair of ports":      {[]stun.Setter{requestedTransport(17), attribute(stun.AttrEvenPort, 128)}, stun.CodeInsufficientCapacity},
			"an unknown attribute": {[]stun.Setter{requestedTransport(17), attribute(0x7eee)}, stun.CodeUnknownAttribute},
		} {
			if m := c.ask(stun.MethodAllocate, tc.attributes...); errorCode(m) != tc.want {
				t.Errorf("%s: %v, want %d", what, m, tc.want)
			}
		}
		if n := r.refused(turnTransport); n != 3 {
			t.Errorf("%v refused", n)
		}
		for _, m := range []stun.Method{stun.MethodRefresh, stun.MethodCreatePermission, stun.MethodChannelBind} {
			if answer := c.ask(m, peerAttribute(virtual(1024))); errorCode(answer) != stun.CodeAllocMismatch {
				t.Errorf("%v without an allocation: %v", m, answer)
			}
		}
		for _, m := range []stun.Method{stun.MethodConnect, stun.MethodConnectionBind} {
			if answer := c.ask(m, peerAttribute(virtual(1024))); answer != nil {
				t.Errorf("%v: %v", m, answer)
			}
		}
		request := stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest), requestedTransport(17),
			stun.NewUsername(c.username), stun.NewRealm(turnRealm), stun.NewNonce(c.nonce), turnKey(c.username, c.password))
		first, again := r.take(c.src, request.Raw), r.take(c.src, request.Raw)
		if len(first) != 1 || len(again) != 1 || !bytes.Equal(first[0].data, again[0].data) || r.count != 1 {
			t.Errorf("sent again: %v, then %v", first, again)
		}
		if code := c.allocate(); code != stun.CodeAllocMismatch {
			t.Errorf("another allocation: %d", code)
		}
		other := r.client("198.51.100.1:1000", uuid.New())
		if m := other.ask(stun.MethodRefresh); errorCode(m) != stun.CodeWrongCredentials {
			t.Errorf("another's allocation: %v", m)
		}
		for what, tc := range map[string]struct {
			number uint16
			addr   string
			want   stun.ErrorCode
		}{
			"a channel":         {0x4000, virtual(2000), 0},
			"it again":          {0x4000, virtual(2000), 0},
			"below":             {0x3fff, virtual(2001), stun.CodeBadRequest},
			"above":             {0x8000, virtual(2001), stun.CodeBadRequest},
			"another peer":      {0x4000, virtual(2001), stun.CodeBadRequest},
			"another of a peer": {0x4001, virtual(2000), stun.CodeBadRequest},
		} {
			c.bind(0x4000, virtual(2000))
			if code := c.bind(tc.number, tc.addr); code != tc.want {
				t.Errorf("%s: %d, want %d", what, code, tc.want)
			}
		}
		for i := range maxChannels - 1 {
			if code := c.bind(0x4100+uint16(i), virtual(3000+i)); code != 0 {
				t.Fatal(i, code)
			}
		}
		if code := c.bind(0x4fff, virtual(4000)); code != stun.CodeInsufficientCapacity || r.refused(turnChannels) != 1 {
			t.Errorf("one channel more: %d", code)
		}
		c.ask(stun.MethodRefresh)
		pass(9 * time.Minute)
		c.ask(stun.MethodRefresh)
		pass(time.Minute + time.Second)
		if code := c.bind(0x4fff, virtual(4000)); code != 0 {
			t.Errorf("once the others have expired: %d", code)
		}
		if code := c.permit("192.0.2.1:0"); code != 0 {
			t.Errorf("a permission has no port: %d", code)
		}
		if m := c.ask(stun.MethodCreatePermission); errorCode(m) != stun.CodeBadRequest {
			t.Errorf("a permission for nobody: %v", m)
		}
	})
}

// TURN_MAX_BPS bounds what a session relays, both ways together.
func TestTURNRate(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t, "TURN_MAX_BPS=10000")
		a, b := r.relayPair()
		relayed := func() (n int) {
			for i := range 40 {
				from, to := a, b
				if i%2 == 0 {
					from, to = b, a
				}
				n += 500 * len(from.sendTo(virtual(to.port), strings.Repeat("x", 500)))
			}
			return n
		}
		if n := relayed(); n != 10000 {
			t.Errorf("%d bytes at once", n)
		}
		if n := r.dropped(turnTooFast); n != 20 {
			t.Errorf("%v dropped", n)
		}
		pass(500 * time.Millisecond)
		if n := relayed(); n != 5000 {
			t.Errorf("%d bytes half a second later", n)
		}
	})
}

// Who has no credential is answered so often, by one message for each, and not by
// much more than was asked: nobody is flooded in another's name.
func TestTURNIsNoAmplifier(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t, "RATE_EXEMPT=203.0.113.9")
		for what, m := range map[string]*stun.Message{
			"Binding":  stun.MustBuild(stun.TransactionID, stun.BindingRequest),
			"Allocate": stun.MustBuild(stun.TransactionID, stun.NewType(stun.MethodAllocate, stun.ClassRequest), requestedTransport(17)),
		} {
			src := turnSource{addr: netip.MustParseAddrPort("203.0.113.1:53")}
			if what == "Allocate" {
				src.addr = netip.MustParseAddrPort("203.0.113.2:53")
			}
			answers, size := 0, 0
			for range 2 * anonymousPerMinute {
				for _, sent := range r.take(src, m.Raw) {
					answers++
					size += len(sent.data)
				}
			}
			if answers != anonymousPerMinute || size > 3*answers*len(m.Raw) {
				t.Errorf("%s: %d answers of %d bytes", what, answers, size)
			}
			src.addr = netip.MustParseAddrPort("203.0.113.9:53")
			for range 2 * anonymousPerMinute {
				if len(r.take(src, m.Raw)) != 1 {
					t.Fatal("an exempt address is limited")
				}
			}
		}
		if n := r.refused(turnTooOften); n != 2*anonymousPerMinute {
			t.Errorf("%v refused", n)
		}
		a, _ := r.relayPair() // whoever has a credential goes on, from an address that asks too often
		a.src.addr = netip.MustParseAddrPort("203.0.113.3:1")
		if code := a.allocate(); code != 0 {
			t.Fatal(code)
		}
		for range 2 * anonymousPerMinute {
			r.take(a.src, stun.MustBuild(stun.TransactionID, stun.BindingRequest).Raw)
		}
		if m := a.ask(stun.MethodRefresh); errorCode(m) != 0 {
			t.Errorf("with a credential: %v", m)
		}
	})
}

// Connections that say nothing, or not enough, are closed in time, and so are
// those that break the rules.
func TestTURNStreamDeadlines(t *testing.T) {
	request := stun.MustBuild(stun.TransactionID, stun.BindingRequest).Raw
	for name, tc := range map[string]struct {
		say    string
		after  time.Duration
		reason turnRefusal
	}{
		"silent":                 {"", turnHelloTimeout, turnSilent},
		"half a request":         {string(request[:10]), turnHelloTimeout, turnSilent},
		"a Binding, then silent": {string(request), turnIdleTimeout, turnSilent},
		"HTTP":                   {"GET / HTTP/1.1\r\n\r\n", 0, turnTooBig},
		"TLS":                    {"\x16\x03\x01\x02\x00", 0, turnNoTURN}, // begins as STUN might, with an odd length
		"another protocol":       {"\xff\xff\xff\xff", 0, turnNoTURN},
		"a large message":        {"\x00\x01\xff\xfc", 0, turnTooBig},
		"large channel data":     {"\x40\x00\xff\xff", 0, turnTooBig},
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				r := newTestRelay(t)
				l := newMemListener()
				go func() {
					c, _ := l.Accept()
					c.SetDeadline(time.Now().Add(turnHelloTimeout))
					r.serveStream(c)
				}()
				c, err := l.dial()
				if err != nil {
					t.Fatal(err)
				}
				r.replies = directWriter{r.turnServer}
				begin := time.Now()
				io.WriteString(c, tc.say)
				io.Copy(io.Discard, c)
				if d := time.Since(begin); d != tc.after || r.refused(tc.reason) != 1 {
					t.Errorf("closed after %v, want %v; %v counted as %s", d, tc.after, r.refused(tc.reason), tc.reason)
				}
				synctest.Wait()
				if len(r.streams) != 0 {
					t.Error("it is not forgotten")
				}
			})
		})
	}
}

// Who does not read loses what does not fit, and holds up nobody.
func TestTURNStreamQueue(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t, "TURN_MAX_BPS=0")
		client, server := newMemConns(&net.TCPAddr{IP: net.IPv4(198, 51, 100, 1), Port: 1}, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 3478})
		s := &turnStream{Conn: server, t: r.turnServer}
		message := make([]byte, 1000)
		sent := 0
		for s.queue(message) {
			synctest.Wait()
			sent += len(message)
		}
		if least, most := maxStreamQueue, maxStreamQueue+2*memBuffer; sent < least || sent > most {
			t.Errorf("%d bytes wait, want %d to %d", sent, least, most)
		}
		pass(streamWriteTimeout)
		if _, err := io.Copy(io.Discard, client); err != nil && !errors.Is(err, io.EOF) {
			t.Log(err)
		}
		if s.queue(message) {
			t.Error("it is still open")
		}
	})
}

// A discardWriter counts what it is given.
type discardWriter struct{ n int }

func (w *discardWriter) send(turnSource, []byte) bool { w.n++; return true }

// A handOver relays one packet of a pair on channels.
type handOver struct {
	r    *turnServer
	a, b *relayClient
	w    discardWriter
	buf  []byte
	data []byte
}

func newHandOver(t testing.TB) *handOver {
	r := newTestRelay(t, "TURN_MAX_BPS=1GiB")
	a, b := r.relayPair()
	if a.bind(0x4000, virtual(b.port)) != 0 || b.bind(0x4000, virtual(a.port)) != 0 {
		t.Fatal("no channels")
	}
	data := channelData(0x4000, strings.Repeat("x", 1200))
	return &handOver{r: r.turnServer, a: a, b: b, buf: make([]byte, headroom+len(data)+tailroom), data: data}
}

func (h *handOver) one() {
	copy(h.buf[headroom:], h.data)
	h.r.take(&h.w, h.a.src, h.buf, headroom, headroom+len(h.data), h.r.now())
}

// Sessions relay at the same time as others come and go.
func TestTURNConcurrent(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		r := newTestRelay(t)
		var pairs [4][2]*relayClient
		for i := range pairs {
			id := uuid.New()
			for j := range pairs[i] {
				c := r.client(fmt.Sprintf("198.51.100.%d:%d", i+1, j+1), id)
				if code := c.allocate(); code != 0 {
					t.Fatal(code)
				}
				if code := c.permit(virtual(1)); code != 0 {
					t.Fatal(code)
				}
				pairs[i][j] = c
			}
			if pairs[i][0].bind(0x4000, virtual(pairs[i][1].port)) != 0 {
				t.Fatal("no channel")
			}
		}
		var tasks sync.WaitGroup
		for _, p := range pairs[1:] {
			tasks.Go(func() {
				w := new(discardWriter)
				data := channelData(0x4000, "hello")
				buf := make([]byte, headroom+len(data)+tailroom)
				for range 2000 {
					copy(buf[headroom:], data)
					r.turnServer.take(w, p[0].src, buf, headroom, headroom+len(data), r.now())
				}
				if w.n != 2000 {
					t.Errorf("%d of 2000 packets got through", w.n)
				}
			})
		}
		tasks.Go(func() {
			for i := range 500 {
				c := turnSource{addr: netip.AddrPortFrom(netip.MustParseAddr("203.0.113.1"), uint16(i+1))}
				a, refusal := r.open(&turnRequest{Message: new(stun.Message), src: c, session: uuid.New(), username: "u"}, maxPeerAllocations)
				if refusal != "" {
					t.Error(refusal)
					return
				}
				r.end(a)
			}
		})
		tasks.Wait()
		if r.count != 8 {
			t.Errorf("%d allocations", r.count)
		}
	})
}

// Real sockets.

// dialTURN connects a TURN client by udp, tcp or tls, until the test ends.
func dialTURN(t *testing.T, ts *testServer, transport string, roots *tls.Config, username, password string) *turn.Client {
	t.Helper()
	addr := fmt.Sprintf("127.0.0.1:%d", ts.turn.port.Load())
	var conn net.PacketConn
	var err error
	switch transport {
	case "udp":
		conn, err = net.ListenPacket("udp", "127.0.0.1:0")
	default:
		var c net.Conn
		if transport == "tcp" {
			c, err = net.Dial("tcp", addr)
		} else {
			addr = fmt.Sprintf("127.0.0.1:%d", ts.turn.tlsPort.Load())
			c, err = tls.Dial("tcp", addr, roots)
		}
		if err == nil {
			conn = turn.NewSTUNConn(c)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	client, err := turn.NewClient(&turn.ClientConfig{STUNServerAddr: addr, TURNServerAddr: addr, Conn: conn, Username: username, Password: password, Realm: turnRealm})
	if err == nil {
		err = client.Listen()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { client.Close(); conn.Close() })
	return client
}

// Clients by UDP, TCP and TLS reach each other, each each other, with another's
// implementation.
func TestTURNTransports(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	ts, _ := newLoopServer(t, "TURN=on", "TURN_PORT=0", "TLS_CERT_FILE="+pair.CertFile, "TLS_KEY_FILE="+pair.KeyFile)
	transports := []string{"udp", "tcp", "tls"}
	id := uuid.New()
	ts.openSession(t, id)
	for _, from := range transports {
		for _, to := range transports {
			t.Run(from+" to "+to, func(t *testing.T) {
				var ends [2]net.PacketConn
				var clients [2]*turn.Client
				for i, transport := range []string{from, to} {
					username, password := ts.turn.credential(id, time.Now().Add(time.Hour))
					clients[i] = dialTURN(t, ts, transport, pair.Client(), username, password)
					relayed, err := clients[i].Allocate()
					if err != nil {
						t.Fatal(err)
					}
					defer relayed.Close()
					ends[i] = relayed
				}
				for i := range ends {
					if err := clients[i].CreatePermission(ends[1-i].LocalAddr()); err != nil {
						t.Fatal(err)
					}
				}
				got := make([]byte, 2000)
				for round := range 10 { // first by indications, until pion has bound a channel
					for i := range ends {
						want := bytes.Repeat([]byte{byte(round)}, []int{5, 7, 1200}[round%3]) // pion holds smaller ones in a stream back
						if _, err := ends[i].WriteTo(want, ends[1-i].LocalAddr()); err != nil {
							t.Fatal(err)
						}
						ends[1-i].SetReadDeadline(time.Now().Add(5 * time.Second))
						n, peer, err := ends[1-i].ReadFrom(got)
						if err != nil || !bytes.Equal(got[:n], want) || peer.String() != ends[i].LocalAddr().String() {
							t.Fatalf("round %d: %d bytes from %v, want %d from %v: %v", round, n, peer, len(want), ends[i].LocalAddr(), err)
						}
					}
				}
			})
		}
	}
	// HTTPS is what it was.
	res, err := (&http.Client{Transport: &http.Transport{TLSClientConfig: pair.Client()}}).Get(fmt.Sprintf("https://127.0.0.1:%d/whoami", ts.turn.tlsPort.Load()))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if text, _ := io.ReadAll(res.Body); !strings.Contains(string(text), `"tls":true`) {
		t.Errorf("%s", text)
	}
}

// openSession opens a session.
func (ts *testServer) openSession(t testing.TB, id sessionID) {
	t.Helper()
	if err := ts.hub.Open(t.Context(), meta{ID: id, Expires: time.Now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
}

// Clients are told of the relay under the host that they called, unless TURN_HOST
// says another, and everywhere that servers are told of.
func TestTURNServersTold(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	for _, tc := range []struct {
		settings []string
		host     string
		want     string // the host in URLs; "" for no servers
		tls      bool
	}{
		{nil, "app.example:1234", "app.example", false},
		{nil, "APP.example", "app.example", false},
		{nil, "[2001:db8::1]:1234", "[2001:db8::1]", false},
		{nil, "a_b c", "", false},
		{[]string{"TURN_HOST=relay.example"}, "app.example", "relay.example", false},
		{[]string{"TURN_HOST=2001:db8::2"}, "app.example", "[2001:db8::2]", false},
		{[]string{"TRUSTED_PROXIES=127.0.0.0/8"}, "inner", "inner", false},
		{[]string{"TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + pair.KeyFile}, "app.example", "app.example", true},
	} {
		ts, _ := newLoopServer(t, append([]string{"TURN=on", "TURN_PORT=0", "STUN_URLS=stun:other.example"}, tc.settings...)...)
		id := uuid.New()
		port := ts.turn.port.Load()
		s := ts.ice.servers(id, network{}, hostOf(&http.Request{Host: tc.host}, false))
		want := []iceServer{{URLs: []string{"stun:other.example"}}}
		if tc.want != "" {
			turn := iceServer{URLs: []string{
				fmt.Sprintf("turn:%s:%d?transport=udp", tc.want, port), fmt.Sprintf("turn:%s:%d?transport=tcp", tc.want, port)}}
			if tc.tls {
				turn.URLs = append(turn.URLs, fmt.Sprintf("turns:%s:%d?transport=tcp", tc.want, ts.turn.tlsPort.Load()))
			}
			turn.Username, turn.Credential = ts.turn.credential(id, time.Now().Add(time.Hour))
			want = append(want, iceServer{URLs: []string{fmt.Sprintf("stun:%s:%d", tc.want, port)}}, turn)
		}
		if fmt.Sprint(s.Servers) != fmt.Sprint(want) {
			// A second may have passed between the two.
			if len(s.Servers) != len(want) || fmt.Sprint(s.Servers[len(want)-1].URLs) != fmt.Sprint(want[len(want)-1].URLs) {
				t.Errorf("%v as %s:\n%v, want\n%v", tc.settings, tc.host, s.Servers, want)
			}
		}
		for _, server := range s.Servers {
			for _, url := range server.URLs {
				if _, ok := iceScheme(url); !ok {
					t.Errorf("%s is no URL of an ICE server", url)
				}
			}
		}
		ts.stop()
	}
}

// A port that is taken stops the start, with the name of the option.
func TestTURNPortTaken(t *testing.T) {
	for _, network := range []string{"udp", "tcp"} {
		port := testkit.FreePort(t)
		if network == "udp" {
			c, err := net.ListenPacket("udp", "127.0.0.1:"+port)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
		} else {
			l, err := net.Listen("tcp", "127.0.0.1:"+port)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
		}
		s := newParley(mustLoad(t, nil, "HOST=127.0.0.1", "PORT=0", "TURN=on", "TURN_PORT="+port), slog.New(slog.DiscardHandler))
		if _, err := s.openFronts(); err == nil || !strings.Contains(err.Error(), "TURN_PORT") {
			t.Errorf("%s: %v", network, err)
		}
	}
}

// Many who open TLS and say nothing make room for others.
func TestTURNSilentTLS(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	ts, addr := newLoopServer(t, "TURN=on", "TURN_PORT=0", "TLS_CERT_FILE="+pair.CertFile, "TLS_KEY_FILE="+pair.KeyFile)
	ts.turn.guard.mu.Lock()
	ts.turn.guard.max = 50
	ts.turn.guard.mu.Unlock()
	for range 200 {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	testkit.Eventually(t, "those that waited longest to be closed", func() bool {
		ts.turn.guard.mu.Lock()
		defer ts.turn.guard.mu.Unlock()
		return len(ts.turn.guard.where) <= 50
	})
	id := uuid.New()
	ts.openSession(t, id)
	username, password := ts.turn.credential(id, time.Now().Add(time.Hour))
	relayed, err := dialTURN(t, ts, "tls", pair.Client(), username, password).Allocate()
	if err != nil {
		t.Fatal(err)
	}
	defer relayed.Close()
	if n := ts.turn.held.Load(); n != 1 {
		t.Errorf("%d streams with an allocation", n)
	}
	for range 100 { // which do not push out who has an allocation
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	username, password = ts.turn.credential(id, time.Now().Add(time.Hour))
	other, err := dialTURN(t, ts, "udp", nil, username, password).Allocate()
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if n := ts.turn.held.Load(); n != 1 {
		t.Errorf("%d streams with an allocation", n)
	}
}
