package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// Mail as two clients see it, over WebSockets.

// A serverFrame is a frame of the server's, of whatever type.
type serverFrame struct {
	Type    string
	Seq     uint64
	From    string
	Payload json.RawMessage
	ID      uint64
	Code    string
	Error   string
	Ref     json.RawMessage

	Peer    string // welcome
	PeerV   int    // welcome, peer_joined
	Resumed bool   // peer_joined

	text string
}

func parseServerFrame(text string) (serverFrame, error) {
	f := serverFrame{text: text}
	err := json.Unmarshal([]byte(text), &f)
	return f, err
}

// frames returns what was received since the last take, once all has settled.
func (c *wsClient) serverFrames() []serverFrame {
	c.t.Helper()
	var frames []serverFrame
	for _, text := range c.settled() {
		f, err := parseServerFrame(text)
		if err != nil {
			c.t.Errorf("frame %.200q: %v", text, err)
		}
		frames = append(frames, f)
	}
	return frames
}

// framesOf returns the same, and fails unless they are n frames of one type.
func (c *wsClient) framesOf(typ string, n int) []serverFrame {
	c.t.Helper()
	frames := c.serverFrames()
	wrong := len(frames) != n
	for _, f := range frames {
		wrong = wrong || f.Type != typ
	}
	if wrong {
		c.t.Fatalf("received %d frames, want %d of type %s: %.1000s", len(frames), n, typ, texts(frames))
	}
	return frames
}

func texts(frames []serverFrame) string {
	var b strings.Builder
	for _, f := range frames {
		fmt.Fprintf(&b, "\n\t%.200s", f.text)
	}
	return b.String()
}

// wantMail fails unless exactly this mail has arrived, in order and with rising
// seqs, which it returns.
func (c *wsClient) wantMail(from string, payloads ...string) (seqs []uint64) {
	c.t.Helper()
	last := uint64(0)
	for i, f := range c.framesOf("deliver", len(payloads)) {
		if string(f.Payload) != payloads[i] || f.From != from {
			c.t.Errorf("mail %d: got %.200s from %s, want %.200s from %s", i, f.Payload, f.From, payloads[i], from)
		}
		if f.Seq <= last {
			c.t.Errorf("seq %d follows %d", f.Seq, last)
		}
		last = f.Seq
		seqs = append(seqs, f.Seq)
	}
	return seqs
}

// wantQueued fails unless exactly the receipts for ids have arrived, and
// returns their seqs.
func (c *wsClient) wantQueued(ids ...uint64) (seqs []uint64) {
	c.t.Helper()
	for i, f := range c.framesOf("queued", len(ids)) {
		if f.ID != ids[i] {
			c.t.Errorf("receipt for id %d, want %d", f.ID, ids[i])
		}
		seqs = append(seqs, f.Seq)
	}
	return seqs
}

// wantError fails unless exactly one frame has arrived: an error that refers to
// ref, which is JSON.
func (c *wsClient) wantFrameError(code, ref string) {
	c.t.Helper()
	f := c.framesOf("error", 1)[0]
	if f.Code != code || string(f.Ref) != ref || f.Error == "" {
		c.t.Errorf("got %s, want the error %s with ref %s", f.text, code, ref)
	}
}

// mail sends payloads with the ids from first on.
func (c *wsClient) mail(first int, payloads ...string) {
	c.t.Helper()
	for i, p := range payloads {
		c.sendf(`{"type":"send","id":%d,"payload":%s}`, first+i, p)
	}
}

// hello says hello, with a watermark unless it is 0.
func (c *wsClient) hello(upTo uint64) {
	c.t.Helper()
	if upTo == 0 {
		c.send(`{"type":"hello"}`)
		return
	}
	c.sendf(`{"type":"hello","deliveredUpTo":%d}`, upTo)
}

func (c *wsClient) delivered(upTo uint64) {
	c.t.Helper()
	c.sendf(`{"type":"delivered","upTo":%d}`, upTo)
}

// dropped is the close code of a connection that just ends.
const dropped = websocket.StatusCode(-1)

// end ends the connection, with a close code or without a close frame, and
// waits until the server has noticed.
func (c *wsClient) end(code websocket.StatusCode) {
	if code == dropped {
		c.drop()
	} else {
		c.leave(code)
	}
	synctest.Wait()
}

// connectedPair joins A and B to a session and takes their room_full.
func connectedPair(ts *testServer) (a, b *wsClient, id string) {
	ts.t.Helper()
	id = uuid.NewString()
	a = ts.join(wsDial{appID: id, side: "A"})
	b = ts.join(wsDial{appID: id, side: "B"})
	a.want(frameRoomFull)
	b.want(frameRoomFull)
	return a, b, id
}

// numbered returns n payloads: from, from+1 and so on.
func numbered(from, n int) []string {
	payloads := make([]string, n)
	for i := range payloads {
		payloads[i] = strconv.Itoa(from + i)
	}
	return payloads
}

func TestMailPayloadIsUntouched(t *testing.T) {
	payloads := []string{
		`"text"`,
		`{}`, `[]`, `null`, `true`, `0`, `-0`, `""`,
		`{ "a" :	1 ,` + "\r\n" + `"b":[ 1 , 2 ] }`,
		`123456789012345678901234567890.12345678901234567890e+400`,
		`9007199254740993`, `1E400`, `0.10`, `-0.0`,
		`{"a":1,"a":2,"type":"bye","seq":7,"from":"B","to":"A"}`,
		`"\u0000\u00e9\ud83d\ude00\/\b\""`, `"\ud800"`,
		`"é😀` + "\u2028\x7f\ufeff" + `<script>&amp;"`,
		strings.Repeat("[", 63) + strings.Repeat("]", 63), // and the frame is the 64th level
		`"` + strings.Repeat("long ", 4_000) + `"`,
	}
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		a, b, id := connectedPair(ts)
		for _, p := range payloads {
			a.send(`{"type":"send","payload":` + p + `}`)
		}
		b.wantMail("A", payloads...)
		// Where members stand and what space surrounds them makes no difference.
		a.send(` {"id" : 1, "payload" :  {"x" : 1}  , "extra":{"payload":2}, "to":"B","type":"\u0073end" } `)
		a.wantQueued(1)
		b.wantMail("A", `{"x" : 1}`)
		if err := a.conn.Write(t.Context(), websocket.MessageBinary, []byte(`{"type":"send","payload":"binary"}`)); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		if len(b.binary) != 1 || b.binary[0] { // only relayed frames keep their opcode
			t.Errorf("mail arrives with the opcodes %v", b.binary)
		}
		b.wantMail("A", `"binary"`)

		// The same again for one who comes later.
		b.end(websocket.StatusNormalClosure)
		a.want(framePeerLeft)
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.hello(0)
		b.wantMail("A", append(append([]string{}, payloads...), `{"x" : 1}`, `"binary"`)...)
	})
}

func TestMailTo(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		a, b, _ := connectedPair(ts)

		a.send(`{"type":"send","payload":1}`)
		b.wantMail("A", "1")
		b.send(`{"type":"send","payload":2}`)
		a.wantMail("B", "2")
		a.send(`{"type":"send","to":"B","payload":3}`)
		b.wantMail("A", "3")
		a.send(`{"type":"send","to":"A","payload":4}`)
		a.wantMail("A", "4")
		b.want()

		for _, to := range []string{`"C"`, `"a"`, `""`, `"AB"`, `1`, `null`, `["B"]`, `{"B":"B"}`} {
			a.sendf(`{"type":"send","to":%s,"payload":5}`, to)
			a.wantFrameError("bad_frame", `"send"`)
			a.sendf(`{"type":"send","to":%s,"payload":5,"id":7}`, to)
			a.wantFrameError("bad_frame", `7`)
		}
		a.send(`{"type":"send","to":"B"}`)
		a.wantFrameError("bad_frame", `"send"`)
		b.want()
		a.mail(7, "6") // a refused id is not used up
		a.wantQueued(7)
		b.wantMail("A", "6")
	})
}

func TestMailReceipts(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		a, b, _ := connectedPair(ts)

		// A receipt names the seq that the mail is delivered with.
		a.mail(1, `"one"`, `"two"`)
		queued := a.wantQueued(1, 2)
		seqs := b.wantMail("A", `"one"`, `"two"`)
		if fmt.Sprint(queued) != fmt.Sprint(seqs) {
			t.Errorf("receipts name the seqs %v, mail has %v", queued, seqs)
		}
		// Ids count up, gaps are allowed; without one there is no receipt.
		a.mail(10, `"ten"`)
		ten := a.wantQueued(10)
		a.send(`{"type":"send","payload":"no id"}`)
		a.want()
		b.wantMail("A", `"ten"`, `"no id"`)

		// At or below the last one stored: a receipt, and nothing is stored.
		a.mail(10, `"ten again"`)
		if again := a.wantQueued(10); again[0] != ten[0] {
			t.Errorf("id 10 has seq %d, and then %d", ten[0], again[0])
		}
		a.mail(1, `"one again"`)
		if again := a.wantQueued(1); again[0] != queued[0] {
			t.Errorf("id 1 has seq %d, and then %d", queued[0], again[0])
		}
		a.mail(5, `"never was"`)
		a.wantQueued(5)
		b.delivered(ten[0])
		b.want()
		a.mail(10, `"ten once more"`) // what was acknowledged is not stored again either
		a.wantQueued(10)
		b.want()

		// B's ids are its own.
		b.mail(1, `"from B"`)
		b.wantQueued(1)
		a.wantMail("B", `"from B"`)

		for _, id := range []string{`0`, `-1`, `1.5`, `"11"`, `null`, `true`, `[11]`, `{}`} {
			a.sendf(`{"type":"send","id":%s,"payload":0}`, id)
			a.wantFrameError("bad_frame", `"send"`)
		}
		b.want()
	})
}

// An id too large to be told from others must not pass for the largest there
// is: all that follow would count as stored.
func TestMailIdTooLarge(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		a, b, _ := connectedPair(ts)
		for _, id := range []string{"9223372036854775808", "18446744073709551616", "1" + strings.Repeat("0", 400)} {
			a.sendf(`{"type":"send","id":%s,"payload":0}`, id)
			a.wantFrameError("bad_frame", `"send"`)
		}
		b.want()
		a.mail(1, "1")
		a.wantQueued(1)
		b.wantMail("A", "1")
	})
}

// A client that lost the connection with its receipts sends again what it has
// none for.
func TestMailResendAfterDrop(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a, wire := ts.joinOnWire(wsDial{appID: id, side: "A", sid: "a's secret"})
		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		a.mail(1, numbered(1, 3)...)
		wire.cut() // with the receipts on their way, or not
		b.wantMail("A", numbered(1, 3)...)

		a = ts.join(wsDial{appID: id, side: "A", sid: "a's secret"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		a.mail(1, numbered(1, 5)...) // three were stored, two never got there
		queued := a.wantQueued(1, 2, 3, 4, 5)
		seqs := b.wantMail("A", "4", "5")
		if fmt.Sprint(queued[3:]) != fmt.Sprint(seqs) {
			t.Errorf("receipts name the seqs %v, mail has %v", queued[3:], seqs)
		}
	})
}

func TestMailIdsBelongToAClaim(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "RESUME_TTL=60s")
		id := uuid.NewString()
		var b *wsClient
		n := 0
		// first joins A and sends mail with the id 1, which is new or not.
		first := func(sid string, isNew bool) *wsClient {
			t.Helper()
			n++
			a := ts.join(wsDial{appID: id, side: "A", sid: sid})
			synctest.Wait()
			a.take()
			b.take()
			a.mail(1, strconv.Itoa(n))
			a.wantQueued(1)
			if isNew {
				b.wantMail("A", strconv.Itoa(n))
			} else {
				b.want()
			}
			return a
		}
		b = ts.join(wsDial{appID: id, side: "B"})
		b.send(`{"type":"send","payload":"A has mail, so its seat is not forgotten"}`)
		synctest.Wait()

		// Who comes back by its claim is told how far it was.
		c := ts.join(wsDial{appID: id, side: "A", sid: "w", v1: true})
		c.mail(7, `"x"`)
		synctest.Wait()
		c.end(dropped)
		back := ts.join(wsDial{appID: id, side: "A", sid: "w", v1: true})
		synctest.Wait()
		if got := back.take()[0]; !strings.Contains(got, `"lastId":7,`) {
			t.Error(got)
		}
		back.leave(websocket.StatusNormalClosure)
		b.take()

		// Without a claim, ids start anew with each connection.
		a := first("", true)
		a.end(dropped)
		a = first("", true)
		a.end(websocket.StatusNormalClosure)

		// With one, they live as long as it does: over drops, and takeovers.
		a = first("one", true)
		a.end(dropped)
		a = first("one", false)
		a.end(websocket.StatusGoingAway)
		first("one", false)
		a = first("one", false)
		// Leaving for good ends it.
		a.end(websocket.StatusNormalClosure)
		a = first("one", true)
		a.end(websocket.StatusNoStatusRcvd)
		a = first("one", true)
		// So does not coming back.
		a.end(dropped)
		pass(61 * time.Second)
		a = first("one", true)
		a.end(websocket.StatusNormalClosure)
		first("two", true)
	})
}

func TestMailRefusedIdMayBeRepeated(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "MAX_QUEUED_BYTES=8KiB")
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		big := `"` + strings.Repeat("x", 4<<10) + `"`
		a.mail(1, big)
		a.wantQueued(1)
		a.mail(2, big)
		a.wantFrameError("over_capacity", "2")
		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		b.hello(0)
		b.wantMail("A", big)
		a.mail(2, big)
		a.wantQueued(2)
		b.wantMail("A", big)
	})
}

// What was refused is not stored, whatever was accepted since. A receipt for it
// would be a lie, and the mail be lost.
func TestMailRefusedIdMayBeRepeatedAfterHigherOnes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "MAX_QUEUED_BYTES=8KiB")
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		big := `"` + strings.Repeat("x", 4<<10) + `"`
		a.mail(1, big)
		a.wantQueued(1)
		for id := 2; id <= 5; id++ {
			a.mail(id, big)
			a.wantFrameError("over_capacity", strconv.Itoa(id))
		}
		a.mail(6, `"small"`) // there is room for this one
		a.wantQueued(6)
		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		b.hello(0)
		b.wantMail("A", big, `"small"`)
		for _, id := range []int{3, 5, 2, 4} {
			payload := fmt.Sprintf(`"%d%s"`, id, strings.Repeat("x", 4<<10))
			a.mail(id, payload)
			a.wantQueued(uint64(id))
			b.wantMail("A", payload)
		}
		for id := 1; id <= 6; id++ { // but only once
			a.mail(id, big)
			a.wantQueued(uint64(id))
		}
		b.want()
	})
}

// However a sender skips and repeats, what is remembered of it stays small.
func TestMailRefusedIdsAreBounded(t *testing.T) {
	var ids idLog
	ids.refuse(1)
	ids.store(1<<40, 1)
	for id := uint64(2); id < 10_000; id += 2 {
		if !ids.stored(id) {
			ids.store(id, id)
		}
	}
	if n := len(ids.gaps); n > maxGaps {
		t.Errorf("%d gaps are remembered, want at most %d", n, maxGaps)
	}
}

func TestMailHello(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		a.mail(1, numbered(1, 5)...)
		queued := a.wantQueued(1, 2, 3, 4, 5)
		joinB := func() *wsClient {
			b := ts.join(wsDial{appID: id, side: "B"})
			b.want(frameRoomFull)
			return b
		}
		leave := func(b *wsClient) {
			b.end(websocket.StatusNormalClosure)
			a.take()
		}

		// Above the last seq assigned: an error, and nothing is trimmed.
		b := joinB()
		b.hello(queued[4] + 1)
		b.wantFrameError("bad_frame", `"hello"`)
		for _, upTo := range []string{`-1`, `"1"`, `1.5`, `null`, `[]`, `1e30`} {
			b.sendf(`{"type":"hello","deliveredUpTo":%s}`, upTo)
			b.wantFrameError("bad_frame", `"hello"`)
		}
		b.hello(0)
		b.wantMail("A", numbered(1, 5)...)
		leave(b)

		// A hello trims what it names and brings the rest.
		b = joinB()
		b.hello(queued[1])
		b.wantMail("A", numbered(3, 3)...)
		// Nothing that this connection was sent is sent again.
		b.hello(0)
		b.hello(queued[1])
		b.want()
		b.hello(queued[2])
		b.want()
		a.mail(6, "6")
		b.wantMail("A", "6")
		b.hello(queued[2])
		b.want()
		leave(b)

		// Without a watermark nothing is trimmed; one from long ago trims nothing.
		b = joinB()
		b.hello(0)
		b.wantMail("A", "4", "5", "6")
		leave(b)
		b = joinB()
		b.hello(queued[0])
		last := b.wantMail("A", "4", "5", "6")[2]
		b.hello(last)
		b.want()
		leave(b)
		b = joinB()
		b.hello(last)
		b.want()
		a.settled()
		a.mail(7, "7")
		b.wantMail("A", "7")
	})
}

func TestMailDelivered(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		a.mail(1, numbered(1, 6)...)
		seq := a.wantQueued(1, 2, 3, 4, 5, 6)
		// rest returns B on a new connection, which is sent what is left.
		rest := func(want ...string) *wsClient {
			t.Helper()
			b := ts.join(wsDial{appID: id, side: "B"})
			b.want(frameRoomFull)
			b.hello(0)
			b.wantMail("A", want...)
			return b
		}

		// What waits has not been sent.
		b := ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.delivered(seq[0])
		b.wantFrameError("bad_frame", `"delivered"`)
		b.delivered(0)
		b.want()
		b.hello(0)
		b.wantMail("A", numbered(1, 6)...)
		b.delivered(seq[5] + 1)
		b.wantFrameError("bad_frame", `"delivered"`)
		b.end(dropped)

		// Nor was it sent on this connection what was sent on another.
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.delivered(seq[0])
		b.wantFrameError("bad_frame", `"delivered"`)
		b.end(dropped)

		b = rest(numbered(1, 6)...)
		b.delivered(seq[0])
		b.want()
		b.end(dropped)
		b = rest(numbered(2, 5)...)
		b.sendf(`{"type":"delivered","seq":%d}`, seq[2])
		b.delivered(seq[1]) // less than before is no error
		b.want()
		b.end(dropped)
		b = rest(numbered(4, 3)...)
		for _, members := range []string{``, `,"upTo":null`, `,"upTo":"4"`, `,"upTo":-1`, `,"seq":1.5`, `,"upTo":{}`, `,"deliveredUpTo":4`} {
			b.sendf(`{"type":"delivered"%s}`, members)
			b.wantFrameError("bad_frame", `"delivered"`)
		}
		b.end(dropped)
		// A watermark in the hello is as good as having been sent it.
		b = rest(numbered(4, 3)...)
		b.end(dropped)
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.hello(seq[5])
		b.delivered(seq[5])
		b.want()
		b.end(dropped)
		rest()
	})
}

func TestMailDeliveryBegins(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		a.mail(1, "1")
		a.wantQueued(1)

		// Where mail waits, with the hello, but not later than after 2 s.
		b := ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		time.Sleep(time.Second)
		b.want()
		b.hello(0)
		b.wantMail("A", "1")
		b.end(dropped)

		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		a.mail(2, "2") // what comes meanwhile waits with it
		time.Sleep(1999 * time.Millisecond)
		b.want()
		pass(time.Millisecond)
		seqs := b.wantMail("A", "1", "2")
		a.mail(3, "3")
		seqs = append(seqs, b.wantMail("A", "3")...)
		b.hello(0) // a late one changes nothing
		b.want()
		b.delivered(seqs[2])
		b.want()
		b.end(dropped)

		// Into an empty mailbox as it comes.
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		a.mail(4, "4")
		b.wantMail("A", "4")
		b.hello(0)
		b.want()
	})
}

func TestMailSurvivesDisconnects(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		sent := 0
		for _, sid := range []string{"", "secret"} {
			for _, code := range []websocket.StatusCode{websocket.StatusNormalClosure, websocket.StatusNoStatusRcvd, websocket.StatusGoingAway, dropped} {
				claim := func(side string) wsDial {
					d := wsDial{appID: id, side: side}
					if sid != "" {
						d.sid = side + sid + fmt.Sprint(int(code))
					}
					return d
				}
				// B gets it and goes without a word about it, A goes too.
				a, b := ts.join(claim("A")), ts.join(claim("B"))
				b.hello(0)
				synctest.Wait()
				a.take()
				b.take()
				a.mail(1, numbered(sent, 3)...)
				a.wantQueued(1, 2, 3)
				b.wantMail("A", numbered(sent, 3)...)
				b.end(code)
				a.settled()
				a.mail(4, numbered(sent+3, 3)...)
				a.wantQueued(4, 5, 6)
				a.end(code)
				// Both are gone for a while.
				pass(5 * time.Minute)
				b = ts.join(claim("B"))
				synctest.Wait()
				b.take()
				b.hello(0)
				seqs := b.wantMail("A", numbered(sent, 6)...)
				sent += 6
				b.delivered(seqs[3])
				b.end(code)
				b = ts.join(claim("B"))
				synctest.Wait()
				b.take()
				b.hello(seqs[2])
				b.wantMail("A", numbered(sent-2, 2)...)
				b.delivered(seqs[5])
				b.want()
				b.end(websocket.StatusNormalClosure)
			}
		}
	})
}

func TestMailSessionTTL(t *testing.T) {
	for _, sid := range []string{"", "secret"} {
		inBubble(t, func(t *testing.T) {
			ts := newTestServer(t, "SESSION_TTL=10m", "RESUME_TTL=1m")
			id := uuid.NewString()
			ttl := 10 * time.Minute
			if sid != "" {
				ttl += time.Minute // one who is away has not left
			}
			a := ts.join(wsDial{appID: id, side: "A", sid: sid})
			a.mail(1, "1")
			seqs := a.wantQueued(1)
			a.end(dropped)
			pass(ttl - time.Millisecond)
			b := ts.join(wsDial{appID: id, side: "B"})
			b.hello(0)
			b.wantMail("A", "1")
			b.end(dropped) // counts as the last one to leave, from now on
			pass(10*time.Minute - time.Millisecond)
			b = ts.join(wsDial{appID: id, side: "B"})
			b.hello(0)
			b.wantMail("A", "1")
			b.end(dropped)
			pass(10 * time.Minute)
			b = ts.join(wsDial{appID: id, side: "B"})
			b.hello(0)
			b.want()

			// It is a new session: nothing is known of the old one's seqs and ids.
			b.hello(seqs[0])
			b.want()
			a = ts.join(wsDial{appID: id, side: "A", sid: sid})
			a.want(frameRoomFull)
			b.want(frameRoomFull)
			a.mail(1, "2")
			a.wantQueued(1)
			b.wantMail("A", "2")
		})
	}
}

// The code keeps a session, and its mail, longer than SESSION_TTL; with neither
// it is gone, and so are its bytes, without anybody asking.
func TestMailLivesWithTheCode(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "SESSION_TTL=2m", "ROOM_TTL=30m", "APP_IDS=minted")
		_, id := ts.mint()
		a := ts.join(wsDial{appID: id, side: "A"})
		a.mail(1, "1")
		a.wantQueued(1)
		a.end(dropped)
		pass(29 * time.Minute)
		b := ts.join(wsDial{appID: id, side: "B"})
		b.hello(0)
		b.wantMail("A", "1")
		time.Sleep(5 * time.Minute)
		b.want()
		b.end(dropped)
		pass(time.Minute)
		b = ts.join(wsDial{appID: id, side: "B"})
		b.hello(0)
		b.wantMail("A", "1")
		b.end(dropped)
		pass(2*time.Minute + 15*time.Second)
		if n := ts.memory.sessions.Load(); n != 0 {
			t.Errorf("%d sessions are left", n)
		}
		if n := ts.queued.used.Load(); n != 0 {
			t.Errorf("%d bytes are left", n)
		}
		if _, res, err := ts.dial(wsDial{appID: id, side: "B"}); err == nil || res.StatusCode != http.StatusNotFound {
			t.Errorf("the session is still there: %v, %v", res, err)
		}
	})
}

func TestMailboxItems(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		for i, p := range numbered(1, 256) {
			a.mail(i+1, p)
			a.wantQueued(uint64(i + 1))
		}
		a.mail(257, "257")
		a.wantFrameError("mailbox_full", "257")
		a.send(`{"type":"send","payload":"no id"}`)
		a.wantFrameError("mailbox_full", `"send"`)
		a.mail(256, "256") // this one is in it
		a.wantQueued(256)
		a.mail(1, "1")
		a.wantQueued(1)
		a.send(`{"type":"send","to":"A","payload":"another mailbox"}`)
		a.wantMail("A", `"another mailbox"`)

		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		b.hello(0)
		seqs := b.wantMail("A", numbered(1, 256)...)
		a.mail(257, "257") // what was delivered but not acknowledged is still there
		a.wantFrameError("mailbox_full", "257")
		b.delivered(seqs[0])
		synctest.Wait()
		a.mail(257, "257")
		a.wantQueued(257)
		b.wantMail("A", "257")
		a.mail(258, "258")
		a.wantFrameError("mailbox_full", "258")
	})
}

func TestMailboxBytes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		quarters := make([]string, 4)
		for i := range quarters {
			quarters[i] = fmt.Sprintf(`"%d%s"`, i, strings.Repeat("x", 256<<10-3))
		}
		a.mail(1, quarters...)
		a.wantQueued(1, 2, 3, 4) // a mailbox holds exactly 1 MiB of payloads
		a.mail(5, "5")
		a.wantFrameError("mailbox_full", "5")

		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		b.hello(0)
		seqs := b.wantMail("A", quarters...)
		b.delivered(seqs[0])
		synctest.Wait()
		a.mail(5, `"`+strings.Repeat("y", 256<<10-1)+`"`) // one byte more than there is room for
		a.wantFrameError("mailbox_full", "5")
		a.mail(5, "5")
		a.wantQueued(5)
		b.wantMail("A", "5")
	})
}

// Past MAX_QUEUED_BYTES what is for those who are not there is refused, so that
// those who are can go on.
func TestMailOverCapacity(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "MAX_QUEUED_BYTES=20KiB")
		a1, b1, _ := connectedPair(ts)

		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		tenth := `"` + strings.Repeat("x", 2<<10-2) + `"`
		stored := 0
		for stored < 20 {
			a.mail(stored+1, tenth)
			if f := a.serverFrames(); f[0].Type == "error" {
				if f[0].Code != "over_capacity" || string(f[0].Ref) != strconv.Itoa(stored+1) {
					t.Fatalf("got %s", f[0].text)
				}
				break
			}
			stored++
		}
		if stored < 8 || stored > 10 { // half-received messages count too
			t.Fatalf("stored %d tenths of what may wait", stored)
		}
		a.send(`{"type":"offer","sdp":` + tenth + `}`)
		a.wantFrameError("over_capacity", `"offer"`)

		// A connected pair goes on, with more than there would be room for.
		for i := range 30 {
			a1.mail(i+1, tenth)
			a1.wantQueued(uint64(i + 1))
			b1.wantMail("A", tenth)
			frame := fmt.Sprintf(`{"type":"ice","n":%d,"x":%s}`, i, tenth)
			b1.send(frame)
			a1.want(frame)
		}
		a.mail(stored+1, tenth)
		a.wantFrameError("over_capacity", strconv.Itoa(stored+1))

		// When there is room again, the absent get mail again; nothing that was
		// accepted is lost.
		a1.end(websocket.StatusNormalClosure)
		b1.end(websocket.StatusNormalClosure)
		b := ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.hello(0)
		want := make([]string, stored)
		for i := range want {
			want[i] = tenth
		}
		seqs := b.wantMail("A", want...)
		b.delivered(seqs[len(seqs)-1])
		b.end(websocket.StatusNormalClosure)
		time.Sleep(11 * time.Minute) // and the pair's session ends
		a.take()
		a.mail(stored+1, tenth)
		a.wantQueued(uint64(stored + 1))
		a.send(`{"type":"offer","sdp":` + tenth + `}`)
		a.want()
	})
}

// A client keeps the watermark of its mailbox while the server restarts and
// forgets all seqs. What is sent then must not look old.
func TestMailAfterRestart(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		id := uuid.NewString()
		ts := newTestServer(t)
		a := ts.join(wsDial{appID: id, side: "A", sid: "a"})
		b := ts.join(wsDial{appID: id, side: "B", sid: "b"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		a.mail(1, numbered(1, 200)...)
		seqs := b.wantMail("A", numbered(1, 200)...)
		watermark := seqs[len(seqs)-1]
		if at := uint64(time.Since(time.Date(2025, 1, 1, 0, 0, 0, 0, time.UTC)).Milliseconds()); seqs[0] < at || seqs[0] > at+1 {
			t.Errorf("the first seq is %d at millisecond %d since 2025", seqs[0], at)
		}
		ts.stop()
		a.wantEnd(closeGoingAway, "server draining")
		b.wantEnd(closeGoingAway, "server draining")

		pass(time.Second)
		ts = newTestServer(t)
		a = ts.join(wsDial{appID: id, side: "A", sid: "a"})
		a.mail(201, numbered(201, 3)...)
		seqs = a.wantQueued(201, 202, 203)
		if seqs[0] <= watermark {
			t.Errorf("seq %d is not above %d of before the restart", seqs[0], watermark)
		}
		b = ts.join(wsDial{appID: id, side: "B", sid: "b"})
		b.want(frameRoomFull)
		b.hello(watermark)
		b.wantMail("A", numbered(201, 3)...)
		// Who acknowledges what the new server never sent is told.
		b.hello(watermark)
		b.want()
		b.delivered(seqs[2])
		b.want()
	})
}

// The same for a session that expired and was opened anew.
func TestMailAfterRebirth(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		id := uuid.NewString()
		a := ts.join(wsDial{appID: id, side: "A"})
		b := ts.join(wsDial{appID: id, side: "B"})
		a.want(frameRoomFull)
		b.want(frameRoomFull)
		a.mail(1, numbered(1, 100)...)
		a.settled()
		seqs := b.wantMail("A", numbered(1, 100)...)
		watermark := seqs[len(seqs)-1]
		b.delivered(watermark)
		synctest.Wait()
		a.end(websocket.StatusNormalClosure)
		b.end(websocket.StatusNormalClosure)
		synctest.Wait()
		if n := ts.memory.sessions.Load(); n != 0 { // nothing waits, and nobody is there
			t.Fatalf("%d sessions are left", n)
		}

		pass(time.Second)
		a = ts.join(wsDial{appID: id, side: "A"})
		a.mail(1, numbered(101, 2)...)
		a.wantQueued(1, 2)
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.hello(watermark)
		b.wantMail("A", numbered(101, 2)...)
	})
}

// A machine without a clock of its own may start long before it is told the
// time.
func TestMailWithTheClockBefore2025(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t)
		a, b, id := connectedPair(ts)
		a.mail(1, "1", "2")
		a.wantQueued(1, 2)
		seqs := b.wantMail("A", "1", "2")
		if seqs[1] > 1<<53 {
			t.Errorf("no JavaScript client can name the seq %d", seqs[1])
		}
		b.delivered(seqs[0])
		b.want()
		b.end(dropped)
		b = ts.join(wsDial{appID: id, side: "B"})
		b.want(frameRoomFull)
		b.hello(0)
		b.wantMail("A", "2")
	})
}
