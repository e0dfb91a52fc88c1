package main

import (
	"encoding/json"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/coder/websocket"
)

// docFrames returns the example frames of docs/protocol.md in blocks such as
// "json client pair", one a line.
func docFrames(t testing.TB, info string) (frames []string) {
	t.Helper()
	for _, b := range docBlocks(t, protocolDoc, "json "+info) {
		for line := range strings.Lines(b.text) {
			frames = append(frames, strings.TrimSpace(line))
		}
	}
	if len(frames) == 0 {
		t.Fatalf("%s has no frames in blocks %q", protocolDoc, info)
	}
	return frames
}

// typeOf returns the type of a frame, in which types occur once.
func typeOf(t testing.TB, text string) string {
	t.Helper()
	var f struct{ Type string }
	if err := json.Unmarshal([]byte(text), &f); err != nil || f.Type == "" {
		t.Fatalf("%s: type %q, %v", text, f.Type, err)
	}
	return f.Type
}

// shapeOf returns what fields a frame has, and of what kind, down to what is
// the clients' own. Of a list it is the shapes of its members, each once.
func shapeOf(t testing.TB, text string) string {
	t.Helper()
	var v any
	if err := json.Unmarshal([]byte(text), &v); err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return shapeOfValue(v)
}

func shapeOfValue(v any) string {
	switch v := v.(type) {
	case map[string]any:
		var fields []string
		for _, name := range slices.Sorted(maps.Keys(v)) {
			shape := "any"
			if name != "payload" && name != "t" {
				shape = shapeOfValue(v[name])
			}
			fields = append(fields, name+":"+shape)
		}
		return "{" + strings.Join(fields, " ") + "}"
	case []any:
		var members []string
		for _, member := range v {
			members = append(members, shapeOfValue(member))
		}
		return "[" + strings.Join(slices.Compact(slices.Sorted(slices.Values(members))), " ") + "]"
	case nil:
		return "null"
	default:
		return fmt.Sprintf("%T", v)
	}
}

// The server's frames in docs/protocol.md are such as a server sends, and no type
// and no field of those is missing there.
func TestProtocolDocServerFrames(t *testing.T) {
	for _, kind := range []string{"pair", "room"} {
		t.Run(kind, func(t *testing.T) {
			var seen []string
			synctest.Test(t, func(t *testing.T) {
				for _, settings := range [][]string{
					{"ROOMS=open"},
					{"ROOMS=open", "STUN_URLS=stun:stun.example", "TURN_URLS=turn:turn.example", "TURN_SECRET=secret"},
				} {
					ts := newSettledServer(t, settings...)
					if kind == "pair" {
						seen = append(seen, ts.pairFrames()...)
					} else {
						seen = append(seen, ts.roomFrames()...)
					}
				}
			})
			compareFrames(t, docFrames(t, "server "+kind), seen, kind == "room")
		})
	}
	types := []string{}
	for _, text := range slices.Concat(docFrames(t, "server pair"), docFrames(t, "server room"), docFrames(t, "client pair")) {
		if typ := typeOf(t, text); slices.Contains(serverTypes(t), typ) && !slices.Contains(types, typ) {
			types = append(types, typ)
		}
	}
	wantSame(t, "types of the server's frames", types, serverTypes(t))
}

// compareFrames compares the frames of a document with those that were seen.
func compareFrames(t *testing.T, documented, seen []string, room bool) {
	t.Helper()
	shapes, sentences, fields := map[string]bool{}, map[string]bool{}, map[string]bool{}
	eachField := func(text string, f func(field string)) {
		var members map[string]any
		if err := json.Unmarshal([]byte(text), &members); err != nil {
			t.Fatalf("%s: %v", text, err)
		}
		for name, value := range members {
			f(typeOf(t, text) + "." + name)
			if name == "error" {
				sentences[fmt.Sprint(members["code"], value)] = true
			}
		}
	}
	for _, text := range documented {
		eachField(text, func(field string) { fields[field] = true })
	}
	clear(sentences)
	for _, text := range seen {
		if !room && slices.Contains(clientTypes(false), typeOf(t, text)) && typeOf(t, text) != "ice_servers" {
			continue // a client's own, relayed
		}
		shapes[shapeOf(t, text)] = true
		eachField(text, func(field string) {
			if !fields[field] {
				t.Errorf("the document has no example of %s, as in %s", field, text)
				fields[field] = true
			}
		})
	}
	for _, text := range documented {
		if !shapes[shapeOf(t, text)] {
			t.Errorf("the server sends nothing like %s", text)
		}
		var e struct{ Type, Code, Error string }
		if json.Unmarshal([]byte(text), &e); e.Type == "error" && !sentences[e.Code+e.Error] {
			t.Errorf("the server does not say %s: %s", e.Code, e.Error)
		}
	}
}

// pairFrames drives a pair through all that can happen to it, and returns what
// both were sent.
func (ts *testServer) pairFrames() (seen []string) {
	code, appID := ts.mint()
	gather := func(clients ...*wsClient) {
		for _, c := range clients {
			seen = append(seen, c.settled()...)
		}
	}
	a := ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	b := ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	gather(a, b)
	for range 2 { // the second contests it
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
	}
	for _, text := range []string{`{"type":"offer","sdp":""}`, `{"type":"answer","sdp":""}`, `{"type":"ice"}`, `{"type":"sender_ready"}`, `{"type":"bye"}`} {
		a.send(text)
	}
	for _, text := range []string{`{"type":"ping"}`, `{"type":"ping","t":1}`, `{"type":"ice_servers"}`, `{"type":"send","payload":1,"id":1}`, `[]`, `{"type":"chat"}`} {
		a.send(text)
	}
	gather(a, b)
	b.drop() // comes back, first as another version, then as it was
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b"})
	gather(a, b)
	b.leave(websocket.StatusNormalClosure)
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	b.drop()
	for id := 2; id <= mailItems+2; id++ {
		a.sendf(`{"type":"send","payload":1,"id":%d}`, id)
	}
	gather(a)
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	b = ts.join(wsDial{appID: appID, side: "B", sid: "b", v1: true})
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a, b)
	ts.useUpRelay()
	a.send(`{"type":"ice_servers"}`)
	gather(a)
	b.drop()
	a.drop()
	a = ts.join(wsDial{appID: appID, side: "A", sid: "a", v1: true})
	gather(a)
	return seen
}

// roomFrames does the same in a room.
func (ts *testServer) roomFrames() (seen []string) {
	room := ts.openRoom(`{}`)
	gather := func(clients ...*wsClient) {
		for _, c := range clients {
			seen = append(seen, c.settled()...)
		}
	}
	host := ts.join(wsDial{room: room.Code, name: "Ada"})
	gather(host)
	guest := ts.join(wsDial{room: room.Code, name: "Bob"})
	gather(host, guest)
	for _, typ := range []string{"offer", "answer"} {
		guest.sendf(`{"type":%q,"to":%q,"payload":1}`, typ, ts.hostOf(room))
	}
	for _, text := range []string{`{"type":"candidate","payload":1}`, `{"type":"ping","t":1}`, `{"type":"offer","to":"nobody","payload":1}`} {
		guest.send(text)
	}
	guest.send(`{"type":"ice_servers"}`)
	gather(guest)
	ts.useUpRelay()
	guest.send(`{"type":"ice_servers"}`)
	gather(host, guest)
	third := ts.join(wsDial{room: room.Code, name: "Cid"})
	gather(host, third)
	host.leave(websocket.StatusNormalClosure)
	gather(guest)
	return seen
}

// hostOf returns the host's ID, by looking through the eyes of a newcomer that
// leaves again.
func (ts *testServer) hostOf(room testRoom) string {
	ts.t.Helper()
	c := ts.join(wsDial{room: room.Code, name: "Eve"})
	defer c.leave(websocket.StatusNormalClosure)
	var join struct{ Host string }
	if err := json.Unmarshal([]byte(c.settled()[0]), &join); err != nil {
		ts.t.Fatal(err)
	}
	return join.Host
}

var (
	seqField = regexp.MustCompile(`"(deliveredUpTo|upTo|seq)":\d+`)
	toPeer   = regexp.MustCompile(`"to":"[0-9a-f-]{36}"`)
)

// The clients' frames in docs/protocol.md are accepted by a server, have no field
// that it ignores, and are of every type.
func TestProtocolDocClientFrames(t *testing.T) {
	decoder := newFrameDecoderPool().Get().(*frameDecoder)
	check := func(t *testing.T, room bool, frames []string) {
		var types []string
		for _, text := range frames {
			m, err := decoder.decode([]byte(text))
			if err != nil {
				t.Errorf("%s: %v", text, err)
			}
			if types = append(types, m.typ.String()); m.typ.relayed() && !room {
				continue
			}
			var fields map[string]any
			json.Unmarshal([]byte(text), &fields)
			for name := range fields {
				if m.raw.member([]byte(name)) == nil {
					t.Errorf("%s: the server ignores %q", text, name)
				}
			}
		}
		wantSame(t, "types of clients' frames", slices.Compact(slices.Sorted(slices.Values(types))), clientTypes(room))
	}
	accepted := func(t *testing.T, c *wsClient, text string) {
		t.Helper()
		c.send(text)
		for _, got := range c.settled() {
			if typeOf(t, got) == "error" {
				t.Errorf("%s: %s", text, got)
			}
		}
	}
	t.Run("pair", func(t *testing.T) {
		frames := docFrames(t, "client pair")
		check(t, false, frames)
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t)
			a, b := ts.pair()
			b.send(`{"type":"send","payload":1}`)
			var mail struct{ Seq uint64 }
			if err := json.Unmarshal([]byte(a.settled()[0]), &mail); err != nil || mail.Seq == 0 {
				t.Fatal(mail, err)
			}
			for _, text := range frames {
				accepted(t, a, seqField.ReplaceAllString(text, fmt.Sprintf(`"$1":%d`, mail.Seq)))
			}
		})
	})
	t.Run("room", func(t *testing.T) {
		frames := docFrames(t, "client room")
		check(t, true, frames)
		synctest.Test(t, func(t *testing.T) {
			ts := newSettledServer(t, "ROOMS=open")
			room := ts.openRoom(`{}`)
			ts.join(wsDial{room: room.Code})
			guest := ts.join(wsDial{room: room.Code})
			host := ts.hostOf(room)
			guest.settled()
			for _, text := range frames {
				accepted(t, guest, toPeer.ReplaceAllString(text, `"to":"`+host+`"`))
			}
		})
	})
}
