package main

import (
	"bufio"
	"bytes"
	"crypto/subtle"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
)

// Sessions of tests that need no code.
const (
	testApp  = "11111111-2222-4333-8444-555555555555"
	otherApp = "99999999-2222-4333-8444-555555555555"
)

var relayedTypes = []string{"offer", "answer", "ice", "sender_ready", "bye"}

// newSettledServer is newTestServer for tests that may end while connections
// still do: its invariants are checked once they have.
func newSettledServer(t testing.TB, settings ...string) *testServer {
	t.Helper()
	ts := newTestServer(t, settings...)
	t.Cleanup(synctest.Wait)
	return ts
}

// --- Clients.

// Parts of a frame's first two bytes, RFC 6455 section 5.2, beside the opcodes
// the server writes.
const (
	bitFin   = 0x80
	bitRSV1  = 0x40
	bitRSV2  = 0x20
	bitRSV3  = 0x10
	bitMask  = 0x80
	opMore   = 0
	opPong   = 10
	finText  = bitFin | opText
	finBin   = bitFin | opBinary
	finMore  = bitFin | opMore
	finClose = bitFin | opClose
	finPing  = bitFin | opPing
	finPong  = bitFin | opPong
)

// A rawClient is a WebSocket client that sends whatever bytes it is told to,
// and reads only when it is told to.
type rawClient struct {
	t    testing.TB
	conn net.Conn
	br   *bufio.Reader
}

// raw upgrades an in-memory connection.
func (ts *testServer) raw(d wsDial) *rawClient {
	ts.t.Helper()
	if d.from == "" {
		d.from = "127.0.0.1"
	}
	conn, err := ts.net.dialFrom(d.from)
	if err != nil {
		ts.t.Fatal(err)
	}
	return newRawClient(ts.t, conn, d)
}

// newRawClient upgrades conn, which it closes when the test ends.
func newRawClient(t testing.TB, conn net.Conn, d wsDial) *rawClient {
	t.Helper()
	t.Cleanup(func() { conn.Close() })
	c, err := openRawClient(t, conn, d)
	if err != nil {
		t.Fatal("upgrade: ", err)
	}
	return c
}

func openRawClient(t testing.TB, conn net.Conn, d wsDial) (*rawClient, error) {
	path := strings.TrimPrefix(d.url(), "ws://parley.test")
	io.WriteString(conn, "GET "+path+" HTTP/1.1\r\nHost: parley.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA==\r\n\r\n")
	c := &rawClient{t: t, conn: conn, br: bufio.NewReader(conn)}
	res, err := http.ReadResponse(c.br, nil)
	if err != nil {
		return nil, err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		body, _ := io.ReadAll(res.Body)
		return nil, fmt.Errorf("%s %s", res.Status, body)
	}
	return c, nil
}

// appendMasked appends a client's frame with a first byte of the caller's
// choice.
func appendMasked[T string | []byte](dst []byte, first byte, payload T) []byte {
	dst = append(dst, first)
	switch n := len(payload); {
	case n < 126:
		dst = append(dst, bitMask|byte(n))
	case n < 1<<16:
		dst = binary.BigEndian.AppendUint16(append(dst, bitMask|126), uint16(n))
	default:
		dst = binary.BigEndian.AppendUint64(append(dst, bitMask|127), uint64(n))
	}
	key := maskKeys()
	dst = append(dst, key[:4]...)
	start := len(dst)
	dst = append(dst, payload...)
	for rest := dst[start:]; len(rest) > 0; {
		rest = rest[subtle.XORBytes(rest, rest, key):]
	}
	return dst
}

// maskKeys is a masking key over and over, so that tests of the race detector
// need not mask byte by byte.
var maskKeys = sync.OnceValue(func() []byte { return bytes.Repeat([]byte{0x9a, 0x3b, 0xc4, 0x5d}, 1024) })

func masked[T string | []byte](first byte, payload T) []byte {
	return appendMasked(nil, first, payload)
}

// write sends bytes as they are. That the server has hung up is no failure: what
// it said before tells why.
func (c *rawClient) write(parts ...[]byte) error {
	_, err := c.conn.Write(slices.Concat(parts...))
	return err
}

func (c *rawClient) text(s string) { c.write(masked(finText, s)) }

// next reads one frame of the server's.
func (c *rawClient) next() (op byte, payload []byte, err error) {
	var header [2]byte
	if _, err := io.ReadFull(c.br, header[:]); err != nil {
		return 0, nil, err
	}
	n := uint64(header[1])
	switch n {
	case 126:
		var b [2]byte
		_, err = io.ReadFull(c.br, b[:])
		n = uint64(binary.BigEndian.Uint16(b[:]))
	case 127:
		var b [8]byte
		_, err = io.ReadFull(c.br, b[:])
		n = binary.BigEndian.Uint64(b[:])
	}
	if err != nil {
		return 0, nil, err
	}
	if header[0]&0xf0 != bitFin || n > 1<<26 {
		return 0, nil, fmt.Errorf("the server sent a frame with the header %x", header)
	}
	payload = make([]byte, n)
	_, err = io.ReadFull(c.br, payload)
	return header[0] & 0x0f, payload, err
}

// want fails unless the server's next frame is this.
func (c *rawClient) want(op byte, payload string) {
	c.t.Helper()
	gotOp, got, err := c.next()
	if err != nil || gotOp != op || string(got) != payload {
		c.t.Fatalf("received opcode %d %.200q, %v; want opcode %d %.200q", gotOp, got, err, op, payload)
	}
}

// wantClosed reads up to a close frame, answers it, and fails unless it has this
// code and reason and is the last thing that comes.
func (c *rawClient) wantClosed(code closeCode, reason string) {
	c.t.Helper()
	for {
		op, payload, err := c.next()
		if err != nil {
			c.t.Errorf("the connection ended without a close frame: %v; want %d %q", err, code, reason)
			return
		}
		if op != opClose {
			continue
		}
		var want []byte
		if code != closeNoStatus {
			want = append(binary.BigEndian.AppendUint16(nil, uint16(code)), reason...)
		}
		if !bytes.Equal(payload, want) {
			got := closeCode(0)
			if len(payload) >= 2 {
				got, payload = closeCode(binary.BigEndian.Uint16(payload)), payload[2:]
			}
			c.t.Errorf("closed with %d %q, want %d %q", got, payload, code, reason)
		}
		c.write(masked(finClose, want))
		break
	}
	// A reset would take the close frame from a slow reader.
	if n, err := c.br.Read(make([]byte, 1)); n > 0 || err != io.EOF {
		c.t.Errorf("after the close frame: %d bytes, %v; want EOF", n, err)
	}
	c.conn.Close()
}

// wantCut fails unless the connection ends without a close frame.
func (c *rawClient) wantCut() {
	c.t.Helper()
	for {
		op, payload, err := c.next()
		if err != nil {
			return
		}
		if op == opClose {
			c.t.Errorf("closed with %q, want no close frame", payload)
		}
	}
}

// A gotFrame is a message as it was received.
type gotFrame struct {
	binary bool
	text   string
}

// frames is settled with the opcodes.
func (c *wsClient) frames() []gotFrame {
	synctest.Wait()
	c.mu.Lock()
	defer c.mu.Unlock()
	var got []gotFrame
	for i := range c.received {
		got = append(got, gotFrame{c.binary[i], c.received[i]})
	}
	c.received, c.binary = nil, nil
	return got
}

// sendFrame sends a message with an opcode of the caller's choice.
func (c *wsClient) sendFrame(f gotFrame) {
	c.t.Helper()
	typ := websocket.MessageText
	if f.binary {
		typ = websocket.MessageBinary
	}
	if err := c.conn.Write(c.t.Context(), typ, []byte(f.text)); err != nil {
		c.t.Errorf("send %.80s: %v", f.text, err)
	}
}

// wantFrames is want with the opcodes.
func (c *wsClient) wantFrames(want ...gotFrame) {
	c.t.Helper()
	got := c.frames()
	if slices.Equal(got, want) {
		return
	}
	for i := range max(len(got), len(want)) {
		if i >= len(got) || i >= len(want) || got[i] != want[i] {
			c.t.Errorf("received %d frames, want %d; the first that is wrong is %d:\n\t%.300v\nwant\n\t%.300v", len(got), len(want), i,
				got[min(i, len(got)):min(i+1, len(got))], want[min(i, len(want)):min(i+1, len(want))])
			return
		}
	}
}

// pair is two clients in the seats of testApp that have seen room_full.
func (ts *testServer) pair() (a, b *wsClient) {
	ts.t.Helper()
	a = ts.join(wsDial{appID: testApp, side: "A"})
	b = ts.join(wsDial{appID: testApp, side: "B"})
	a.want(frameRoomFull)
	b.want(frameRoomFull)
	return a, b
}

// rawPair is pair with A raw: it has read its room_full.
func (ts *testServer) rawPair() (a *rawClient, b *wsClient) {
	ts.t.Helper()
	a = ts.raw(wsDial{appID: testApp, side: "A"})
	b = ts.join(wsDial{appID: testApp, side: "B"})
	a.want(opText, frameRoomFull)
	b.want(frameRoomFull)
	return a, b
}

// An errorFrame is what the server answers a frame it refuses.
type errorFrame struct {
	Type, Code, Error string
	Ref               any
}

// wantError fails unless exactly one error frame was received, and that with
// this code, a sentence that has word in it, and this ref.
func (c *wsClient) wantError(code, word string, ref any) {
	c.t.Helper()
	got := c.frames()
	if len(got) != 1 || got[0].binary {
		c.t.Errorf("received %d frames, want one error frame as text: %.300v", len(got), got)
		return
	}
	checkErrorFrame(c.t, got[0].text, code, word, ref)
}

func checkErrorFrame(t testing.TB, text, code, word string, ref any) {
	t.Helper()
	var f errorFrame
	d := json.NewDecoder(strings.NewReader(text))
	d.DisallowUnknownFields()
	if err := d.Decode(&f); err != nil {
		t.Errorf("%.300s: %v", text, err)
	}
	if f.Type != "error" || f.Code != code || f.Ref != ref {
		t.Errorf("received %.300s, want an error with code %s and ref %v", text, code, ref)
	}
	if !strings.Contains(f.Error, word) || !strings.Contains(f.Error, " ") {
		t.Errorf("the error says %q and not what is wrong: %q", f.Error, word)
	}
}

// --- Relay.

func TestRelayedAsItIs(t *testing.T) {
	forms := []string{
		`{"type":"%s"}`,
		"  \t\r\n{ \"a\" : [ 1 ,\t2.50e+3 , { } ] ,\n\t\"type\"\n:\r\"%s\" }  \n",
		`{"type":"%s","payload":{"type":"send","type":"bye"},"s":"snow ☃ clef 𝄞 é ` + "\u2028\u007f" + `"}`,
		`{"\u0074ype":"%s"}`,
		`{"\u0074\u0079\u0070\u0065":"%s","Type":"send","TYPE":1,"type ":null}`,
		`{"type":"%s","sdp":"\ud800 lone \udfff\ud800 \u0000 \/"}`,
		`{"type":"%s","\ud800":"\ud800"}`,
		`{"type":"%s","x":1,"x":[2],"":{},"":0}`,
		`{"type":"%s","n":123456789012345678901234567890.5e99999,"z":-0.0}`,
		`{"type":"%s","to":"A","id":-1,"seq":"x","payload":0,"event":[],"upTo":{},"t":"` + strings.Repeat("t", 300) + `"}`,
		`{"type":"%s","sdp":"` + strings.Repeat("m=", 2500) + `"}`,
		`{"type":"%s","sdp":"` + strings.Repeat("x", 70_000) + `"}`,
		`{"type":"%s","brackets in a string are no nesting":"` + strings.Repeat("[{", 100) + `\"[\\"}`,
	}
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.pair()
		for _, binary := range []bool{false, true} {
			var sent []gotFrame
			for _, name := range relayedTypes {
				for _, form := range forms {
					sent = append(sent, gotFrame{binary, strings.Replace(form, "%s", name, 1)})
				}
				// The type's value is compared after unescaping too.
				sent = append(sent, gotFrame{binary, fmt.Sprintf(`{"type":"\u%04x%s"}`, name[0], name[1:])})
			}
			for _, f := range sent {
				a.sendFrame(f)
			}
			a.wantFrames()
			b.wantFrames(sent...)
			for _, f := range sent {
				b.sendFrame(f)
			}
			a.wantFrames(sent...)
			b.wantFrames()
		}
	})
}

// Only the type has to be there once: other names may come as often as JSON
// lets them, also those that mean something in other types of frame.
func TestRelayedWithDuplicateNames(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSettledServer(t).pair()
		for _, name := range []string{"to", "payload", "id", "deliveredUpTo", "upTo", "seq", "event", "mode", "reason", "t"} {
			text := fmt.Sprintf(`{"type":"ice",%q:1,%q:2}`, name, name)
			a.send(text)
			a.want()
			b.want(text)
		}
	})
}

func TestRelayKeepsOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newSettledServer(t).pair()
		var sent []gotFrame
		for i := range 600 {
			size := []int{0, 1, 90, 500, 4000, 4080, 4096, 5000, 9000, 70_000}[i*i%10]
			text := fmt.Sprintf(`{"type":%q,"n":%d,"x":"%s"}`, relayedTypes[i%len(relayedTypes)], i, strings.Repeat("x", size))
			sent = append(sent, gotFrame{i%3 == 0, text})
		}
		for _, f := range sent {
			a.sendFrame(f)
		}
		b.wantFrames(sent...)
		a.wantFrames()
	})
}

// A message may come in pieces of any size, with control frames between them.
func TestRelayReassembles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.rawPair()
		const text = `{"type":"offer","sdp":"𝄞 ☃ is cut anywhere"}`

		// In frames of one byte, an empty one and a ping after each.
		for i := range len(text) {
			first := byte(opMore)
			if i == 0 {
				first = opText
			}
			a.write(masked(first, text[i:i+1]), masked(finPing, fmt.Sprint("ping ", i)), masked(opMore, ""), masked(finPong, "unasked"))
		}
		b.wantFrames()
		for i := range len(text) {
			a.want(opPong, fmt.Sprint("ping ", i))
		}
		a.write(masked(finMore, ""))
		b.wantFrames(gotFrame{false, text})

		// In writes of one byte, so that every header comes in pieces too.
		bytes := slices.Concat(masked(opBinary, text[:9]), masked(finPing, "p"), masked(finMore, text[9:]), masked(finPing, ""))
		for i := range bytes {
			a.write(bytes[i : i+1])
			synctest.Wait()
		}
		b.wantFrames(gotFrame{true, text})
		a.want(opPong, "p")
		a.want(opPong, "")

		// Several messages and pings in one write.
		a.write(masked(finText, text), masked(finPing, "1"), masked(finBin, text), masked(finPing, "2"), masked(finText, text))
		b.wantFrames(gotFrame{false, text}, gotFrame{true, text}, gotFrame{false, text})
		a.want(opPong, "1")
		a.want(opPong, "2")
	})
}

// What has come whole is passed on though the next message has begun.
func TestRelayDoesNotWaitForTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.rawPair()
		next := masked(finText, `{"type":"ice"}`)
		a.write(masked(finText, `{"type":"offer"}`), next[:1])
		b.want(`{"type":"offer"}`)
		a.write(next[1:], next[:10])
		b.want(`{"type":"ice"}`)
		a.write(next[10:])
		b.want(`{"type":"ice"}`)
	})
}

// --- Frames that wait for a side that is not connected.

func TestRelayWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		waiting := []gotFrame{{false, `{"type":"offer"}`}, {true, ` {"type":"ice"}`}, {false, `{"type":"bye"} `}}
		for _, f := range waiting {
			a.sendFrame(f)
		}
		pass(time.Hour)
		b := ts.join(wsDial{appID: testApp, side: "B"})
		a.wantFrames(gotFrame{false, frameRoomFull})
		b.wantFrames(append([]gotFrame{{false, frameRoomFull}}, waiting...)...)

		// Also after that, when B is gone, and only once.
		b.leave(websocket.StatusNormalClosure)
		a.want(framePeerLeft)
		a.send(`{"type":"sender_ready"}`)
		a.want()
		b = ts.join(wsDial{appID: testApp, side: "B"})
		b.want(frameRoomFull, `{"type":"sender_ready"}`)
		a.want(frameRoomFull)

		// And for A.
		a.leave(websocket.StatusGoingAway)
		b.want(framePeerLeft)
		b.send(`{"type":"answer"}`)
		a = ts.join(wsDial{appID: testApp, side: "A"})
		a.want(frameRoomFull, `{"type":"answer"}`)
	})
}

func TestRelayWaitsWithinBounds(t *testing.T) {
	frame := func(size int) string {
		return `{"type":"ice","x":"` + strings.Repeat("x", size-len(`{"type":"ice","x":""}`)) + `"}`
	}
	test := func(name string, accepted, refused, after []string) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a := ts.join(wsDial{appID: testApp, side: "A"})
				for _, text := range accepted {
					a.send(text)
				}
				a.want()
				for _, text := range refused {
					a.send(text)
					a.wantError("peer_absent", "not connected", "ice")
				}
				for _, text := range after {
					a.send(text)
				}
				a.want()
				if got, want := ts.metric(`parley_frames_dropped_total{reason="peer_absent"}`), float64(len(refused)); got != want {
					t.Errorf("%v frames counted as dropped, want %v", got, want)
				}
				b := ts.join(wsDial{appID: testApp, side: "B"})
				b.want(slices.Concat([]string{frameRoomFull}, accepted, after)...)
				a.want(frameRoomFull)
				if n := ts.queued.used.Load(); n != 0 {
					t.Errorf("%d bytes counted as waiting after everything was taken", n)
				}
			})
		})
	}
	var small []string
	for i := range 64 {
		small = append(small, fmt.Sprintf(`{"type":"ice","n":%d}`, i))
	}
	test("64 frames", small, []string{frame(30), frame(30)}, nil)
	test("256 KiB", []string{frame(100 << 10), frame(100 << 10)}, []string{frame(56<<10 + 1), frame(100 << 10)}, []string{frame(56 << 10)})
	test("one frame of any size", []string{frame(1 << 20)}, []string{frame(30)}, nil)
}

// The error for a frame that may not wait refers to its id, if it has one.
func TestPeerAbsentRefersToFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		for range 64 {
			a.send(`{"type":"ice"}`)
		}
		a.send(`{"type":"offer","id":7}`)
		a.wantError("peer_absent", "not connected", 7.0)
		a.send(`{"type":"offer","id":"seven"}`)
		a.wantError("peer_absent", "not connected", "offer")
	})
}

// What a seat leaves behind for an absent other is stale once it is free.
func TestRelayOfTheGoneIsStale(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		a.send(`{"type":"offer","n":1}`)
		a.send(`{"type":"ice","n":1}`)
		a.leave(websocket.StatusNormalClosure)
		a = ts.join(wsDial{appID: testApp, side: "A"})
		a.send(`{"type":"offer","n":2}`)
		b := ts.join(wsDial{appID: testApp, side: "B"})
		b.want(frameRoomFull, `{"type":"offer","n":2}`)
		if got := ts.metric(`parley_frames_dropped_total{reason="stale"}`); got != 2 {
			t.Errorf("%v frames counted as stale, want 2", got)
		}

		// To one who is connected everything goes, and before peer_left.
		a.send(`{"type":"bye"}`)
		a.drop()
		b.want(`{"type":"bye"}`, framePeerLeft)
	})
}

// Past MAX_QUEUED_BYTES frames for the absent are refused while pairs go on; at
// 0 there is no limit.
func TestQueuedBytesAreLimited(t *testing.T) {
	text := `{"type":"offer","x":"` + strings.Repeat("x", 6000) + `"}`
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "MAX_QUEUED_BYTES=10000")
		lone := ts.join(wsDial{appID: otherApp, side: "B"})
		a, b := ts.pair()
		lone.send(text)
		lone.want()
		lone.send(text)
		lone.wantError("over_capacity", "bytes", "offer")
		for range 10 {
			a.send(text)
			b.want(text)
		}
		if got, want := ts.metric("parley_mailbox_bytes"), float64(len(text)+frameCost); got != want {
			t.Errorf("%v bytes wait, want %v", got, want)
		}
		lone.leave(websocket.StatusNormalClosure)
		if got := ts.metric("parley_mailbox_bytes"); got != 0 {
			t.Errorf("%v bytes wait for nobody", got)
		}
	})
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "MAX_QUEUED_BYTES=0")
		a := ts.join(wsDial{appID: testApp, side: "A"})
		a.send(text)
		a.want()
		ts.join(wsDial{appID: testApp, side: "B"}).want(frameRoomFull, text)
	})
}

// --- Presence, for clients that do not speak parley.v1.

func TestPresence(t *testing.T) {
	ends := map[string]func(c *wsClient){
		"normal":      func(c *wsClient) { c.leave(websocket.StatusNormalClosure) },
		"no code":     func(c *wsClient) { c.leave(websocket.StatusNoStatusRcvd) },
		"going away":  func(c *wsClient) { c.leave(websocket.StatusGoingAway) },
		"own code":    func(c *wsClient) { c.leave(4321) },
		"no farewell": func(c *wsClient) { c.drop() },
	}
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		a.want()
		for name, end := range ends {
			b := ts.join(wsDial{appID: testApp, side: "B"})
			b.want(frameRoomFull)
			a.want(frameRoomFull)
			end(b)
			if b.take() != nil {
				t.Errorf("%s: who left was told something", name)
			}
			a.want(framePeerLeft)
			time.Sleep(time.Hour)
			a.want()
		}
		// The other way round, and with the last one gone nothing is left.
		b := ts.join(wsDial{appID: testApp, side: "B"})
		b.want(frameRoomFull)
		a.leave(websocket.StatusNormalClosure)
		b.want(framePeerLeft)
		if got := ts.metric("parley_sessions_active"); got != 1 {
			t.Errorf("%v sessions, want 1", got)
		}
		b.leave(websocket.StatusNormalClosure)
		synctest.Wait()
		if got := ts.metric("parley_sessions_active"); got != 0 {
			t.Errorf("%v sessions after everyone left, want 0", got)
		}
	})
}

// A client with a claim that is lost is only said to have left when it can no
// longer come back; when it does, or takes over, both see room_full.
func TestPresenceOfTheClaimed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		back := wsDial{appID: testApp, side: "B", sid: "secret"}
		b := ts.join(back)
		a.want(frameRoomFull)
		b.drop()
		time.Sleep(59 * time.Second)
		a.want()
		b = ts.join(back)
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		b2 := ts.join(back)
		b.wantClosed(closeReplaced, "taken_over")
		a.want(frameRoomFull)
		b2.want(frameRoomFull)
		b2.drop()
		time.Sleep(60*time.Second - time.Millisecond)
		a.want()
		time.Sleep(time.Millisecond)
		a.want(framePeerLeft)

		b = ts.join(back)
		a.want(frameRoomFull)
		b.leave(websocket.StatusNormalClosure)
		a.want(framePeerLeft)
	})
}

// A client that did not ask for parley.v1 never hears of it, whatever its
// partner speaks.
func TestPresenceBesideV1(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		code, appID := ts.mint()
		a := ts.join(wsDial{appID: appID, side: "A"})
		back := wsDial{appID: appID, side: "B", sid: "secret", v1: true}
		for range 2 {
			b := ts.join(back)
			a.want(frameRoomFull)
			b.drop()
			a.want()
		}
		for range 2 {
			ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
			a.want()
		}
		time.Sleep(time.Minute)
		a.want(framePeerLeft)
	})
}

func TestSeatBusy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.pair()
		for _, side := range []string{"A", "B"} {
			for _, sid := range []string{"", "mine"} {
				c := ts.join(wsDial{appID: testApp, side: side, sid: sid})
				c.wantClosed(closeBusy, "side "+side+" busy")
				if got := c.take(); got != nil {
					t.Errorf("one who found side %s busy was told %q", side, got)
				}
			}
		}
		a.want()
		b.want()
		a.send(`{"type":"offer"}`)
		b.want(`{"type":"offer"}`)
		if got := ts.metric(`parley_ws_closes_total{code="1008"}`); got != 4 {
			t.Errorf("%v closes counted as 1008, want 4", got)
		}

		// One that does not answer the close frame is gone after the grace.
		mute := ts.raw(wsDial{appID: testApp, side: "A"})
		start := time.Now()
		mute.want(opClose, "\x03\xf0side A busy")
		if _, _, err := mute.next(); err != io.EOF {
			t.Errorf("after the close frame: %v, want EOF", err)
		}
		for ts.metric("parley_ws_connections") != 2 {
			if time.Since(start) > closeGrace {
				t.Fatal("a connection that does not answer is still there after the grace")
			}
			time.Sleep(50 * time.Millisecond)
		}
	})
}

// --- Frames that the server answers itself.

func TestPing(t *testing.T) {
	long := func(n int) string { return `"` + strings.Repeat("é", (n-2)/2) + strings.Repeat("x", n%2) + `"` }
	synctest.Test(t, func(t *testing.T) {
		a, b := newSettledServer(t).pair()
		for _, text := range []string{
			`0`, `-1.5e-7`, `null`, `true`, `"now"`, `{"a":[1, 2],"a":{}}`, `[ ]`, `"\u0000\ud800"`, `12345678901234567890123`, long(256),
		} {
			for _, form := range []string{`{"type":"ping","t":%s}`, ` { "t" : %s , "x" : 1 , "\u0074ype" : "p\u0069ng" } `} {
				ping := strings.Replace(form, "%s", text, 1)
				a.send(ping)
				a.want(`{"type":"pong","t":` + text + `}`)
				a.sendFrame(gotFrame{true, ping})
				a.wantFrames(gotFrame{false, `{"type":"pong","t":` + text + `}`})
			}
		}
		a.send(`{"type":"ping"}`)
		a.want(`{"type":"pong"}`)
		a.send(`{"type":"ping","t":` + long(257) + `}`)
		a.wantError("bad_frame", "256", "ping")
		a.send(`{"type":"ping","id":12,"t":` + long(257) + `}`)
		a.wantError("bad_frame", "256", 12.0)
		b.want()
	})
}

func TestTelemetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a := ts.join(wsDial{appID: testApp, side: "A"})
		pass(7 * time.Second)
		b := ts.join(wsDial{appID: testApp, side: "B"})
		time.Sleep(2500 * time.Millisecond)
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		a.send(`{"type":"telemetry","event":"ice-connected","mode":"relay"}`)
		pass(time.Minute)
		b.send(`{"type":"telemetry","event":"ice-connected","mode":"host"}`)
		a.send(`{"type":"telemetry","event":"ice-connected"}`)
		b.send(`{"type":"telemetry","event":"ice-failed","reason":"no such reason"}`)
		b.send(`{"type":"telemetry","event":"ice-failed","reason":"timeout"}`)
		a.want()
		b.want()

		wantMetrics := func(want map[string]float64) {
			t.Helper()
			got := ts.series()
			for name, value := range want {
				if got[name] != value {
					t.Errorf("%s is %v, want %v", name, got[name], value)
				}
			}
		}
		wantMetrics(map[string]float64{
			"parley_time_to_first_seconds_count":                           1,
			"parley_time_to_first_seconds_sum":                             2.5,
			`parley_sessions_established_total{mode="relay"}`:              1,
			`parley_sessions_established_total{mode="host"}`:               0,
			`parley_sessions_established_total{mode="other"}`:              0,
			`parley_sessions_failed_total{reason="other"}`:                 1,
			`parley_sessions_failed_total{reason="timeout"}`:               0,
			`parley_frames_total{direction="in",type="telemetry"}`:         5,
			`parley_frames_total{direction="out",type="room_full"}`:        2,
			`parley_frames_total{direction="out",type="error"}`:            0,
			`parley_ws_closes_total{code="1000"}`:                          0,
			`parley_frames_dropped_total{reason="peer_absent"}`:            0,
			`parley_ws_connections`:                                        2,
			`parley_frame_bytes_total{direction="out"}`:                    float64(2 * len(frameRoomFull)),
			`parley_time_to_first_seconds_bucket{le="2"}`:                  0,
			`parley_time_to_first_seconds_bucket{le="3"}`:                  1,
			`parley_time_to_first_seconds_bucket{le="+Inf"}`:               1,
			`parley_sessions_established_total{mode="no such label here"}`: 0,
		})

		// Whatever a client calls it, the labels are a closed set.
		before := len(ts.series())
		modes := []string{`"made up"`, `"RELAY"`, `""`, `7`, `null`, `{}`, `"\ud800"`, `"rel\u0061y"`}
		for i, mode := range modes {
			c := ts.join(wsDial{appID: fmt.Sprintf("00000000-0000-4000-8000-%012d", i), side: "A"})
			c.sendf(`{"type":"telemetry","event":"ice-connected","mode":%s,"reason":%s}`, mode, mode)
			c.sendf(`{"type":"telemetry","event":"ice-f\u0061iled","mode":%s,"reason":%s}`, mode, mode)
			c.want()
			c.leave(websocket.StatusNormalClosure)
		}
		wantMetrics(map[string]float64{
			`parley_sessions_established_total{mode="relay"}`: 2,
			`parley_sessions_established_total{mode="other"}`: float64(len(modes) - 1),
			`parley_sessions_failed_total{reason="other"}`:    float64(len(modes) + 1),
			// Nobody met, so no time was measured.
			"parley_time_to_first_seconds_count": 1,
		})
		if after := len(ts.series()); after != before {
			t.Errorf("%d series, %d before clients made labels up", after, before)
		}

		for _, event := range []string{`,"event":"ice-exploded"`, ``, `,"event":1`, `,"event":["ice-connected"]`} {
			a.send(`{"type":"telemetry"` + event + `}`)
			a.wantError("bad_frame", "event", "telemetry")
		}
	})
}

// --- Frames that are refused.

func TestBadFrames(t *testing.T) {
	nested := func(depth int) string { // the frame itself counted
		return `{"type":"offer","x":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + `}`
	}
	mixed := func(depth int) string {
		s := `1`
		for i := range depth - 1 {
			if i%2 == 0 {
				s = `{"a":` + s + `}`
			} else {
				s = `[` + s + `]`
			}
		}
		return `{"x":` + s + `,"type":"offer"}`
	}
	beside := func(depth int) string { // other brackets than the deepest
		return `{"y":[[],[{}],{"a":[]}],"type":"offer","x":` + nested(depth-1) + `,"z":[[[]]]}`
	}
	long := strings.Repeat("long", 50_000)
	tests := []struct {
		name, text string
		code, word string
		ref        any
	}{
		{"not JSON", `offer`, "bad_frame", "JSON", nil},
		{"empty", ``, "bad_frame", "JSON", nil},
		{"only space", " \n", "bad_frame", "JSON", nil},
		{"array", `[{"type":"offer"}]`, "bad_frame", "object", nil},
		{"string", `"offer"`, "bad_frame", "object", nil},
		{"number", `7`, "bad_frame", "object", nil},
		{"null", `null`, "bad_frame", "object", nil},
		{"byte order mark", "\ufeff{\"type\":\"offer\"}", "bad_frame", "object", nil},
		{"cut off", `{"type":"offer"`, "bad_frame", "JSON", nil},
		{"cut off in a string", `{"type":"offer","x":"`, "bad_frame", "JSON", nil},
		{"cut off after a name", `{"type"`, "bad_frame", "JSON", nil},
		{"no value", `{"type":}`, "bad_frame", "JSON", nil},
		{"trailing comma", `{"type":"offer",}`, "bad_frame", "JSON", nil},
		{"single quotes", `{'type':'offer'}`, "bad_frame", "JSON", nil},
		{"bare name", `{type:"offer"}`, "bad_frame", "JSON", nil},
		{"comment", `{"type":"offer"/**/}`, "bad_frame", "JSON", nil},
		{"leading zero", `{"type":"offer","x":01}`, "bad_frame", "JSON", nil},
		{"bare NaN", `{"type":"offer","x":NaN}`, "bad_frame", "JSON", nil},
		{"control character in a string", "{\"type\":\"offer\",\"x\":\"\n\"}", "bad_frame", "JSON", nil},
		{"bad escape", `{"type":"offer","x":"\x41"}`, "bad_frame", "JSON", nil},
		{"cut escape", `{"type":"offer","x":"\u12"}`, "bad_frame", "JSON", nil},
		{"wrong bracket", `{"type":"offer","x":[}}`, "bad_frame", "JSON", nil},
		{"trailing data", `{"type":"offer"} x`, "bad_frame", "after", nil},
		{"two objects", `{"type":"offer"}{"type":"offer"}`, "bad_frame", "after", nil},
		{"trailing NUL", "{\"type\":\"offer\"}\x00", "bad_frame", "after", nil},
		{"no type", `{"payload":{"type":"offer"}}`, "bad_frame", `"type"`, nil},
		{"empty object", `{}`, "bad_frame", `"type"`, nil},
		{"type of another case", `{"Type":"offer"}`, "bad_frame", `"type"`, nil},
		{"two types", `{"type":"offer","type":"offer"}`, "bad_frame", "more than one", nil},
		{"two types, the first not a string", `{"type":null,"type":"offer"}`, "bad_frame", "more than one", nil},
		{"two types, one escaped", `{"type":"offer","\u0074ype":"bye"}`, "bad_frame", "more than one", nil},
		{"two types, far apart", `{"type":"offer","x":"` + long + `","type":"offer"}`, "bad_frame", "more than one", nil},
		{"type is a number", `{"type":7}`, "bad_frame", "string", nil},
		{"type is null", `{"type":null}`, "bad_frame", "string", nil},
		{"type is a list", `{"type":["offer"]}`, "bad_frame", "string", nil},
		{"type is an object", `{"type":{"type":"offer"}}`, "bad_frame", "string", nil},
		{"65 deep", nested(65), "bad_frame", "64", nil},
		{"65 deep, of both kinds", mixed(65), "bad_frame", "64", nil},
		{"65 deep beside others", beside(65), "bad_frame", "64", nil},
		{"65 deep and an escaped quote before", strings.Replace(nested(65), `offer"`, `offer","s":"\\\""`, 1), "bad_frame", "64", nil},
		{"100,000 deep", nested(100_000), "bad_frame", "de", nil},
		{"100,000 deep, never closed", `{"type":"offer","x":` + strings.Repeat("[", 100_000), "bad_frame", "", nil},
		{"100,000 closed at once", `{"type":"offer","x":` + strings.Repeat("]", 100_000), "bad_frame", "JSON", nil},
		{"unknown type", `{"type":"hang up"}`, "unknown_type", "type", "hang up"},
		{"unknown type with an id", `{"type":"x","id":41}`, "unknown_type", "type", 41.0},
		{"unknown type with an id that is none", `{"type":"x","id":-1}`, "unknown_type", "type", "x"},
		{"unknown type with an id past all integers", `{"type":"x","id":18446744073709551615}`, "unknown_type", "type", "x"},
		{"empty type", `{"type":""}`, "unknown_type", "type", ""},
		{"type in capitals", `{"type":"OFFER"}`, "unknown_type", "type", "OFFER"},
		{"type with a space", `{"type":"offer "}`, "unknown_type", "type", "offer "},
		{"type with a quote", `{"type":"\"\u003c\n"}`, "unknown_type", "type", "\"<\n"},
		{"type with half a surrogate pair", `{"type":"\ud800"}`, "unknown_type", "type", "\ufffd"},
		{"longest type repeated", `{"type":"` + long[:64] + `"}`, "unknown_type", "type", long[:64]},
		{"long type", `{"type":"` + long + `"}`, "unknown_type", "type", nil},
		{"a server's type", `{"type":"deliver","seq":1,"from":"A","payload":1}`, "unknown_type", "type", "deliver"},
		{"a server's type too", `{"type":"room_full"}`, "unknown_type", "type", "room_full"},
		{"the metrics' word", `{"type":"other"}`, "unknown_type", "type", "other"},
	}
	synctest.Test(t, func(t *testing.T) {
		a, b := newSettledServer(t).pair()
		for _, test := range tests {
			for _, binary := range []bool{false, true} {
				t.Logf("%s, binary %v", test.name, binary)
				a.sendFrame(gotFrame{binary, test.text})
				a.wantError(test.code, test.word, test.ref)
				b.want()
			}
		}
		// All that, and the connection works as before; 64 deep is fine.
		for _, text := range []string{nested(64), mixed(64), beside(64), nested(2)} {
			a.send(text)
			b.want(text)
		}
		a.want()
	})
}

// Bad UTF-8 in a binary message is a bad frame; in a text message the WebSocket
// protocol wants an end, and only the sender's.
func TestBadUTF8(t *testing.T) {
	for name, text := range map[string]string{
		"stray byte":      "{\"type\":\"offer\",\"x\":\"\xff\"}",
		"cut short":       "{\"type\":\"offer\",\"x\":\"\xe2\x98\"}",
		"surrogate":       "{\"type\":\"offer\",\"x\":\"\xed\xa0\x80\"}",
		"overlong":        "{\"type\":\"offer\",\"x\":\"\xc0\xaf\"}",
		"too high":        "{\"type\":\"offer\",\"x\":\"\xf4\x90\x80\x80\"}",
		"in a name":       "{\"type\":\"offer\",\"\x80\":1}",
		"after the frame": "{\"type\":\"offer\"}\xff",
		"not even JSON":   "\xff",
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a, b := ts.pair()
				a.sendFrame(gotFrame{true, text})
				a.wantError("bad_frame", "UTF-8", nil)
				b.want()
				a.sendFrame(gotFrame{false, text})
				if code, _ := a.closed(); closeCode(code) != closeBadUTF8 {
					t.Errorf("closed with %d, want %d", code, closeBadUTF8)
				}
				b.want(framePeerLeft)
				if got := ts.metric(`parley_ws_closes_total{code="1007"}`); got != 1 {
					t.Errorf("%v closes counted as 1007, want 1", got)
				}
			})
		})
	}
}

// A client that sends nothing but nonsense is told to come back later, but not
// one that is only wrong now and then.
func TestTooManyErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.pair()
		for range 2 {
			for range 1000 {
				a.send(`{"type":"?"}`)
			}
			if got := len(a.settled()); got != 1000 {
				t.Errorf("%d errors, want 1000", got)
			}
			pass(time.Minute)
		}
		for range 1001 {
			a.send(`{"type":"?"}`)
		}
		a.wantClosed(closeTooMany, "too many errors")
		b.want(framePeerLeft)
	})
}

// --- Sizes.

func TestMessageSize(t *testing.T) {
	text := func(size int) string {
		return `{"type":"offer","x":"` + strings.Repeat("x", size-len(`{"type":"offer","x":""}`)) + `"}`
	}
	whole := func(size int) []byte { return masked(finText, text(size)) }
	pieces := func(size int) []byte {
		var frames []byte
		first := byte(opText)
		for rest := text(size); rest != ""; first = opMore {
			n := min(len(rest), 999)
			frames = appendMasked(frames, first, rest[:n])
			rest = rest[n:]
		}
		return append(frames, masked(finMore, "")...)
	}
	for _, max := range []int{1024, 70_000, 1 << 20} {
		for name, form := range map[string]func(int) []byte{"whole": whole, "in pieces": pieces} {
			t.Run(fmt.Sprint(max, " ", name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					ts := newSettledServer(t, fmt.Sprint("WS_MAX_MSG=", max))
					a, b := ts.rawPair()
					a.write(form(max))
					b.want(text(max))
					a.write(form(max+1), masked(finText, text(100)))
					a.wantClosed(closeTooBig, "message too big")
					b.want(framePeerLeft)

					b.leave(websocket.StatusNormalClosure)
					a = ts.raw(wsDial{appID: testApp, side: "A"})
					a.write(form(max))
					synctest.Wait()
					b = ts.join(wsDial{appID: testApp, side: "B"})
					b.want(frameRoomFull, text(max))
					if n := ts.queued.used.Load(); n != 0 {
						t.Errorf("%d bytes counted as waiting, and nothing waits", n)
					}
				})
			})
		}
	}
}

// A length that is only announced costs nothing.
func TestAnnouncedLength(t *testing.T) {
	for _, length := range []uint64{64 << 20, 1 << 40, 1<<63 - 1} {
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t, "WS_MAX_MSG=67108864")
			a, b := ts.rawPair()
			header := binary.BigEndian.AppendUint64([]byte{finBin, bitMask | 127}, length)
			a.write(header, []byte{0, 0, 0, 0}, []byte(`{"type":"offer"`))
			synctest.Wait()
			if n := ts.queued.used.Load(); n > 4<<10 {
				t.Errorf("%d bytes for 15 received", n)
			}
			a.write(bytes.Repeat([]byte{' '}, 5000))
			synctest.Wait()
			if n := ts.queued.used.Load(); n > 16<<10 {
				t.Errorf("%d bytes for 5015 received", n)
			}
			a.conn.Close()
			b.want(framePeerLeft)
			if n := ts.queued.used.Load(); n != 0 {
				t.Errorf("%d bytes after the end", n)
			}
		})
	}
}

// --- The WebSocket protocol.

func TestProtocolErrors(t *testing.T) {
	const offer = `{"type":"offer"}`
	unmasked := append([]byte{finText, byte(len(offer))}, offer...)
	closeWith := func(payload ...byte) []byte { return masked(finClose, payload) }
	for name, sent := range map[string][]byte{
		"unmasked":                      unmasked,
		"unmasked ping":                 {finPing, 0},
		"reserved bit 1":                masked(finText|bitRSV1, offer),
		"reserved bit 2":                masked(finText|bitRSV2, offer),
		"reserved bit 3":                masked(finText|bitRSV3, offer),
		"reserved bit of a ping":        masked(finPing|bitRSV1, ""),
		"data opcode 3":                 masked(bitFin|3, offer),
		"data opcode 7":                 masked(bitFin|7, ""),
		"control opcode 11":             masked(bitFin|11, ""),
		"control opcode 15":             masked(bitFin|15, ""),
		"continues nothing":             masked(finMore, offer),
		"continues what is over":        slices.Concat(masked(finText, `{"type":"ping"}`), masked(opMore, offer)),
		"a text inside a message":       slices.Concat(masked(opText, offer[:5]), masked(finText, offer)),
		"a binary inside a message":     slices.Concat(masked(opText, offer[:5]), masked(opBinary, offer)),
		"fragmented ping":               masked(opPing, ""),
		"fragmented ping in a message":  slices.Concat(masked(opText, offer[:5]), masked(opPing, "")),
		"fragmented close":              masked(opClose, ""),
		"ping of 126 bytes":             masked(finPing, strings.Repeat("x", 126)),
		"pong of 126 bytes":             masked(finPong, strings.Repeat("x", 126)),
		"close of 126 bytes":            closeWith(append([]byte{3, 232}, bytes.Repeat([]byte{'x'}, 124)...)...),
		"ping of 64 KiB":                masked(finPing, strings.Repeat("x", 1<<16)),
		"length above 2^63":             {finBin, bitMask | 127, 0x80, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0},
		"close of one byte":             closeWith(3),
		"close code 0":                  closeWith(0, 0),
		"close code 999":                closeWith(3, 231),
		"close code 1004":               closeWith(3, 236),
		"close code 1005":               closeWith(3, 237),
		"close code 1006":               closeWith(3, 238),
		"close code 1015":               closeWith(3, 247),
		"close code 2999":               closeWith(11, 183),
		"close code 5000":               closeWith(19, 136),
		"bits that are no frame at all": []byte("GET / HTTP/1.1\r\nHost: parley.test\r\n\r\n"),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a, b := ts.rawPair()
				a.write(sent, masked(finText, offer)) // which is past saving
				a.wantClosed(closeProtocol, "protocol error")
				b.want(framePeerLeft)
				ts.join(wsDial{appID: testApp, side: "A"}).want(frameRoomFull)
				if got := ts.metric(`parley_ws_closes_total{code="1002"}`); got != 1 {
					t.Errorf("%v closes counted as 1002, want 1", got)
				}
			})
		})
	}
}

func TestCloseIsEchoed(t *testing.T) {
	for _, code := range []closeCode{closeNoStatus, 1000, 1001, 1003, 1007, 1011, 1014, 3000, 4000, 4321, 4999} {
		t.Run(fmt.Sprint(code), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a, b := ts.rawPair()
				var payload []byte
				if code != closeNoStatus {
					payload = append(binary.BigEndian.AppendUint16(nil, uint16(code)), "because"...)
				}
				start := time.Now()
				a.write(masked(finPing, "last"), masked(finClose, payload))
				a.want(opPong, "last")
				op, got, err := a.next()
				if err != nil || op != opClose || !bytes.Equal(got[:min(len(got), 2)], payload[:min(len(payload), 2)]) {
					t.Errorf("answered with opcode %d %q, %v, want an echo of %d", op, got, err, code)
				}
				if _, _, err := a.next(); err != io.EOF {
					t.Errorf("after the echo: %v, want EOF", err)
				}
				if took := time.Since(start); took > 0 {
					t.Errorf("took %v", took)
				}
				b.want(framePeerLeft)
				label := fmt.Sprint(code)
				if !slices.Contains(closeCodes(), code) { // 1005 among them, which is no code but the lack of one
					label = otherLabel
				}
				a.conn.Close()
				synctest.Wait()
				if got := ts.metric(`parley_ws_closes_total{code="` + label + `"}`); got != 1 {
					t.Errorf("%v closes counted as %s, want 1", got, label)
				}
			})
		})
	}
}

// --- Liveness.

func TestHeartbeat(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=20s")
		a, b := ts.rawPair()
		start := time.Now()
		for i := range 100 {
			op, payload, err := a.next()
			if err != nil || op != opPing {
				t.Fatalf("received opcode %d, %v, want a ping", op, err)
			}
			if at := time.Since(start); at != time.Duration(i+1)*20*time.Second {
				t.Fatalf("ping %d came at %v", i+1, at)
			}
			time.Sleep(50 * time.Millisecond)
			a.write(masked(finPong, "not the ping's"), masked(finPong, payload), masked(finPong, payload))
		}
		b.want()
		s := ts.series()
		if count, sum := s["parley_ws_rtt_seconds_count"], s["parley_ws_rtt_seconds_sum"]; count < 100 || sum < 4.9 || sum > 5.1 {
			t.Errorf("%v round trips took %v s, want at least 100 and, but for B's, 5 s", count, sum)
		}
	})
}

// Silence of two heartbeats ends a connection, and its partner is told.
func TestSilence(t *testing.T) {
	test := func(name string, speak func(a *rawClient), after time.Duration) {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t, "HEARTBEAT=20s")
				a, b := ts.rawPair()
				start := time.Now()
				speak(a)
				last := time.Since(start)
				time.Sleep(after - time.Millisecond)
				b.want()
				time.Sleep(2 * time.Millisecond)
				b.want(framePeerLeft)
				a.wantCut()
				if got := ts.metric(`parley_ws_closes_total{code="1006"}`); got != 1 {
					t.Errorf("%v closes counted as 1006, want 1 (last spoke at %v)", got, last)
				}
			})
		})
	}
	test("from the start", func(*rawClient) {}, 40*time.Second)
	test("after answering pings", func(a *rawClient) {
		for range 3 {
			op, payload, _ := a.next()
			if op == opPing {
				pass(30 * time.Millisecond) // the way there and back
				a.write(masked(finPong, payload))
				synctest.Wait()
			}
		}
	}, 40*time.Second)
	test("after an unasked pong", func(a *rawClient) {
		pass(35 * time.Second)
		a.write(masked(finPong, ""))
	}, 40*time.Second)
	test("after a message", func(a *rawClient) {
		pass(39 * time.Second)
		a.text(`{"type":"nonsense"}`)
	}, 40*time.Second)
}

// Any byte is a sign of life, also one that completes nothing.
func TestAnyByteIsLife(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=5s")
		a, b := ts.rawPair()
		go io.Copy(io.Discard, a.br)
		offer := masked(finText, `{"type":"offer"}`)
		for i := range 3 { // 27 s: a message may take 30
			a.write(offer[i : i+1])
			pass(9 * time.Second)
		}
		a.write(offer[3:])
		b.want(`{"type":"offer"}`)
		time.Sleep(9 * time.Second)
		b.want()
		a.write(masked(finPong, ""))
		time.Sleep(9 * time.Second)
		b.want()
		time.Sleep(2 * time.Second)
		b.want(framePeerLeft)
	})
}

// A sender that the server does not read from, because its partner is slow,
// cannot be heard, and so is not silent.
func TestHeldSenderIsNotSilent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=5s")
		a := ts.raw(wsDial{appID: testApp, side: "A"})
		b := ts.raw(wsDial{appID: testApp, side: "B"})
		a.want(opText, frameRoomFull)
		b.want(opText, frameRoomFull)
		text := `{"type":"ice","x":"` + strings.Repeat("x", 1000) + `"}`
		const frames = 6000
		var sent int
		go func() {
			for range frames {
				if a.write(masked(finText, text)) != nil {
					return
				}
				sent++
			}
		}()
		// B takes a frame every 2 s, so that it is no reader that takes nothing.
		got := 0
		for start := time.Now(); time.Since(start) < 10*time.Minute; {
			op, payload, err := b.next()
			if err != nil {
				t.Fatal(err)
			}
			if op == opPing {
				continue
			}
			if string(payload) != text {
				t.Fatalf("received %.80s", payload)
			}
			for range 8 {
				if op, payload, err := b.next(); err == nil && op == opText && string(payload) == text {
					got++
				}
			}
			got++
			b.write(masked(finPong, ""))
			pass(2 * time.Second)
		}
		synctest.Wait()
		if sent == frames {
			t.Fatal("the sender was never held back")
		}
		for got < frames {
			op, payload, err := b.next()
			if err != nil {
				t.Fatalf("after %d frames: %v", got, err)
			}
			if op == opText {
				if string(payload) != text {
					t.Fatalf("received %.80s after %d frames", payload, got)
				}
				got++
			}
		}
		// From now on A is heard, and says nothing.
		start := time.Now()
		for {
			op, payload, err := b.next()
			if err != nil {
				t.Fatal(err)
			}
			if op == opPing {
				b.write(masked(finPong, payload))
			} else if string(payload) == framePeerLeft {
				break
			}
		}
		if took := time.Since(start); took < 10*time.Second || took > 16*time.Second {
			t.Errorf("the sender was dropped after %v of silence", took)
		}
	})
}

// Time in which a sender was not read from is not held against it afterwards.
func TestResumedSenderIsHeard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "HEARTBEAT=5s", "WS_MAX_MSG=300000")
		a := ts.raw(wsDial{appID: testApp, side: "A"})
		b := ts.raw(wsDial{appID: testApp, side: "B"})
		a.want(opText, frameRoomFull)
		b.want(opText, frameRoomFull)
		held := func() (held bool) {
			ts.clients.each(func(c *client) { held = held || c.paused.Load() })
			return held
		}
		text := masked(finText, `{"type":"ice","x":"`+strings.Repeat("x", 250_000)+`"}`)
		for !held() {
			a.write(text)
			synctest.Wait()
		}
		// B takes what it must, while A has nothing more to say.
		take := func(bytes int64) {
			t.Helper()
			if _, err := io.CopyN(io.Discard, b.br, bytes); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
		}
		for range 15 {
			take(10_000)
			b.write(masked(finPong, ""))
			pass(4 * time.Second)
		}
		if !held() {
			t.Fatal("the sender is not held back any more")
		}
		for held() {
			take(10_000)
		}
		resumed := time.Now()
		var alive sync.WaitGroup
		defer alive.Wait()
		alive.Go(func() {
			for range 5 {
				pass(4 * time.Second)
				b.write(masked(finPong, ""))
			}
		})
		var last []byte
		for !bytes.Contains(last, []byte(framePeerLeft)) {
			buf := make([]byte, 64<<10)
			n, err := b.br.Read(buf)
			if err != nil {
				t.Fatal(err)
			}
			last = append(last, buf[:n]...)
		}
		if took := time.Since(resumed); took < 10*time.Second || took > 15*time.Second {
			t.Errorf("the sender was dropped %v after it was read from again, want 10 s", took)
		}
	})
}

// A message must be complete within 30 s of its first byte.
func TestMessageTimeout(t *testing.T) {
	offer := masked(finText, `{"type":"offer"}`)
	long := masked(finText, `{"type":"offer","x":"`+strings.Repeat("x", 5000)+`"}`)
	for name, begin := range map[string][]byte{
		"a byte of the header":       offer[:1],
		"half a mask":                offer[:4],
		"half a long length":         long[:3],
		"a header":                   offer[:6],
		"half the payload":           offer[:10],
		"all but a byte":             long[:len(long)-1],
		"fragments":                  slices.Concat(masked(opText, `{"type":`), masked(opMore, `"offer"`)),
		"fragments and control":      slices.Concat(masked(opText, `{"type":`), masked(finPing, "")),
		"a whole message before":     slices.Concat(offer, offer[:8]),
		"a ping, and half a message": slices.Concat(masked(finPing, ""), offer[:8]),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a, b := ts.rawPair()
				go func() { // what it waited for before is no part of the message
					for range 3 {
						pass(19 * time.Second)
						a.write(masked(finPong, ""))
					}
				}()
				pass(70 * time.Second)
				start := time.Now()
				a.write(begin)
				b.settled()
				time.Sleep(29 * time.Second)
				b.want()
				a.wantClosed(closeSlow, "message took too long")
				if took := time.Since(start); took != 30*time.Second {
					t.Errorf("closed after %v, want 30s", took)
				}
				b.want(framePeerLeft)
			})
		})
	}
}

// The time of a message is its own, also where the end of one and the beginning
// of the next arrive together, over and over.
func TestMessageTimeoutStartsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, b := ts.rawPair()
		go io.Copy(io.Discard, a.br)
		offer := masked(finText, `{"type":"offer"}`)
		a.write(offer[:10])
		for i := range 60 {
			pass(5 * time.Second)
			a.write(offer[10:], offer[:10])
			if got := b.settled(); len(got) > 1 || i > 0 && len(got) == 0 {
				t.Fatalf("after %d messages of 5 s each: received %q", i+1, got)
			}
		}
		a.write(offer[10:])
		if got := b.settled(); len(got) == 0 || got[len(got)-1] != `{"type":"offer"}` {
			t.Errorf("received %q at last", got)
		}
	})
}

// So is that of a control frame.
func TestControlTimeoutStartsAnew(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, _ := ts.rawPair()
		ping := masked(finPing, "ping")
		a.write(ping[:3])
		for range 20 {
			pass(3 * time.Second)
			a.write(ping[3:], ping[:3])
			op, payload, err := a.next()
			for op == opPing && err == nil {
				op, payload, err = a.next()
			}
			if op != opPong || err != nil {
				t.Fatalf("received opcode %d %q, %v", op, payload, err)
			}
		}
	})
}

// A control frame that comes in two pieces is no protocol error, after which a
// client would not come back.
func TestSlowControlFrame(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, _ := ts.rawPair()
		ping := masked(finPing, "in two pieces")
		a.write(ping[:10])
		pass(15 * time.Second)
		a.write(ping[10:])
		op, payload, err := a.next()
		slow := string(binary.BigEndian.AppendUint16(nil, uint16(closeSlow)))
		if err != nil || op != opPong && (op != opClose || !strings.HasPrefix(string(payload), slow)) {
			t.Errorf("received opcode %d %q, %v; want a pong, or a close as for any slow message", op, payload, err)
		}
	})
}

// --- Slowness.

// A reader whose socket takes nothing for 10 s is cut, and its partner, which
// was held back meanwhile, is told and goes on.
func TestStalledReader(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		_, b := ts.rawPair() // A does not read
		other := ts.join(wsDial{appID: otherApp, side: "A"})
		text := `{"type":"ice","x":"` + strings.Repeat("x", 10_000) + `"}`
		done := make(chan struct{})
		go func() {
			defer close(done)
			for range 300 {
				b.send(text)
			}
		}()
		synctest.Wait()
		select {
		case <-done:
			t.Fatal("the sender was not held back")
		default:
		}
		other.send(`{"type":"ping"}`)
		other.want(`{"type":"pong"}`)
		time.Sleep(stallTimeout - time.Millisecond)
		b.want()
		time.Sleep(2 * time.Millisecond)
		got := b.settled()
		if len(got) == 0 || got[0] != framePeerLeft {
			t.Errorf("the partner received %.200q, want peer_left first", got)
		}
		<-done
		if got := ts.metric(`parley_ws_closes_total{code="4408"}`); got != 1 {
			t.Errorf("%v closes counted as 4408, want 1", got)
		}
		b.settled() // what it still sent waits, or is answered peer_absent
		a := ts.raw(wsDial{appID: testApp, side: "A"})
		a.want(opText, frameRoomFull)
		b.want(frameRoomFull)
	})
}

// A sender is held back while its partner reads slowly, in bounded memory, and
// resumed; nothing is lost.
func TestBackpressure(t *testing.T) {
	for _, size := range []int{300, 5000, 300_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t, "WS_MAX_MSG=400000")
				b := ts.raw(wsDial{appID: testApp, side: "B"})
				a := ts.raw(wsDial{appID: testApp, side: "A"})
				a.want(opText, frameRoomFull)
				b.want(opText, frameRoomFull)
				frames := 6 << 20 / size
				text := func(i int) string {
					return fmt.Sprintf(`{"type":"ice","n":%d,"x":"%s"}`, i, strings.Repeat("x", size))
				}
				sent := 0
				done := make(chan struct{})
				go func() {
					defer close(done)
					for i := range frames {
						a.write(masked(finText, text(i)))
						sent++
					}
				}()
				// Whoever passes 1 MiB is held back with that message, and the next
				// has half come by the time.
				bound := int64(1<<20 + 3*len(text(frames)) + 8<<10)
				check := func() {
					t.Helper()
					if n := ts.queued.used.Load(); n > bound {
						t.Fatalf("%d bytes wait, want at most %d", n, bound)
					}
				}
				synctest.Wait()
				check()
				if n := ts.queued.used.Load(); n < 1<<20 {
					t.Errorf("held back when %d bytes wait", n)
				}
				if sent == frames {
					t.Fatal("the sender was not held back")
				}
				for i := range frames {
					op, payload, err := b.next()
					if err != nil {
						t.Fatalf("after %d of %d frames: %v", i, frames, err)
					}
					if op != opText || string(payload) != text(i) {
						t.Fatalf("frame %d is opcode %d %.80s", i, op, payload)
					}
					if i%(1+frames/200) == 0 {
						synctest.Wait()
						check()
					}
				}
				<-done
				// And held back it was only as long as needed.
				a.text(`{"type":"bye"}`)
				b.want(opText, `{"type":"bye"}`)
				if n := ts.queued.used.Load(); n != 0 {
					t.Errorf("%d bytes counted as waiting", n)
				}
			})
		})
	}
}

// What a client asks for and does not read stays bounded, and ends it.
func TestUnreadAnswers(t *testing.T) {
	for name, ask := range map[string][]byte{
		"pings":                  masked(finText, `{"type":"ping","t":"`+strings.Repeat("x", 250)+`"}`),
		"protocol pings":         masked(finPing, strings.Repeat("x", 125)),
		"pings inside a message": append(masked(finPing, strings.Repeat("x", 125)), masked(opMore, "")...),
		"bad frames":             masked(finBin, `{"type":"`+strings.Repeat("\u2028", 20)+`"}`),
		"all of them": slices.Concat(masked(finPing, "x"), masked(finText, `{"type":"ping"}`), masked(finText, `{"type":"ping","t":1}`),
			masked(finText, `{"type":"send","id":1,"to":"A","payload":1}`)),
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newSettledServer(t)
				a, b := ts.rawPair()
				done := make(chan struct{})
				go func() {
					defer close(done)
					if name == "pings inside a message" {
						a.write(masked(opText, "{"))
					}
					for range 20_000 {
						if a.write(ask) != nil {
							return
						}
					}
				}()
				synctest.Wait()
				ts.clients.each(func(c *client) {
					c.mu.Lock()
					if n := len(c.answers); n > answerBytes+1<<10 {
						t.Errorf("%d bytes of answers wait", n)
					}
					c.mu.Unlock()
				})
				if name != "bad frames" { // of which there may be too many before that
					b.want()
				}
				time.Sleep(stallTimeout + time.Millisecond)
				b.want(framePeerLeft)
				<-done
				ts.join(wsDial{appID: testApp, side: "A"}).want(frameRoomFull)
			})
		})
	}
}

// One who does read gets them all.
func TestReadAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		a, _ := ts.rawPair()
		const n = 5000
		go func() {
			for i := range n {
				a.text(fmt.Sprintf(`{"type":"ping","t":[%d,"%s"]}`, i, strings.Repeat("x", 200)))
			}
		}()
		for i := range n {
			a.want(opText, fmt.Sprintf(`{"type":"pong","t":[%d,"%s"]}`, i, strings.Repeat("x", 200)))
		}
	})
}

// An end in the middle of anything is an end, and nothing else.
func TestEndsAnywhere(t *testing.T) {
	frames := slices.Concat(masked(finText, `{"type":"offer"}`), masked(finPing, "ping"), masked(opText, `{"type":`), masked(finMore, `"ice"}`))
	for n := range len(frames) {
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t)
			a, b := ts.rawPair()
			a.write(frames[:n])
			synctest.Wait()
			a.conn.Close()
			got := b.settled()
			if len(got) == 0 || got[len(got)-1] != framePeerLeft || slices.Contains(got, "") || len(got) > 2 {
				t.Errorf("after %d bytes: received %q, want peer_left last", n, got)
			}
			if n := ts.queued.used.Load(); n != 0 {
				t.Errorf("%d bytes counted as waiting", n)
			}
		})
	}
}
