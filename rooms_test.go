package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"net/netip"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// Rooms, as clients see them.

const (
	roomLetters = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789"
	roomNobody  = "99999999-2222-4333-8444-555555555555" // a UUID that nothing has
	roomForeign = "Origin: https://foreign.example"
)

// A roomMember is a client in a room that has read its first frame.
type roomMember struct {
	*wsClient
	first string // that frame

	Type, From, RoomID, DisplayName, Host, Resume string
	Peers                                         []roomPeer
}

type roomPeer struct{ ID, DisplayName string }

// roomJoin joins a room. What comes after the first frame is left to be read.
func roomJoin(ts *testServer, d wsDial) *roomMember {
	ts.t.Helper()
	m := &roomMember{wsClient: ts.join(d)}
	synctest.Wait()
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.received) == 0 {
		ts.t.Fatalf("%s received nothing on joining; %v", d.name, m.err)
	}
	m.first = m.received[0]
	m.received, m.binary = m.received[1:], m.binary[1:]
	if err := json.Unmarshal([]byte(m.first), m); err != nil || m.Type != "join" || m.Resume == "" {
		ts.t.Fatalf("the first frame is %s; %v", m.first, err)
	}
	return m
}

// roomOfThree is a room with three who have seen each other come.
func roomOfThree(ts *testServer, body string) (r testRoom, ada, bob, eve *roomMember) {
	ts.t.Helper()
	r = ts.openRoom(body)
	ada = roomJoin(ts, wsDial{room: r.RoomID, name: "ada"})
	bob = roomJoin(ts, wsDial{room: r.RoomID, name: "bob"})
	eve = roomJoin(ts, wsDial{room: r.RoomID, name: "eve"})
	ada.want(bob.joined(), eve.joined())
	bob.want(eve.joined())
	eve.want()
	return r, ada, bob, eve
}

// joined is what the others get when m comes.
func (m *roomMember) joined() string {
	return fmt.Sprintf(`{"type":"join","from":"%s","roomId":"%s","displayName":"%s"}`, m.From, m.RoomID, m.DisplayName)
}

// left is what the others get when m goes.
func (m *roomMember) left(host *roomMember) string {
	return fmt.Sprintf(`{"type":"leave","from":"%s","roomId":"%s","host":"%s"}`, m.From, m.RoomID, host.From)
}

// signal is what all others get of a frame that m sends to everyone.
func (m *roomMember) signal(typ, payload string) string {
	return fmt.Sprintf(`{"type":"%s","from":"%s","roomId":"%s","payload":%s}`, typ, m.From, m.RoomID, payload)
}

// signalTo is what to gets of a frame that m sends to it.
func (m *roomMember) signalTo(to *roomMember, typ, payload string) string {
	return fmt.Sprintf(`{"type":"%s","from":"%s","roomId":"%s","to":"%s","payload":%s}`, typ, m.From, m.RoomID, to.From, payload)
}

// again is how m comes back.
func (m *roomMember) again() wsDial {
	return wsDial{room: m.RoomID, name: m.DisplayName, resume: m.Resume}
}

func roomBearer(token string) string { return "Authorization: Bearer " + token }

// A roomAnswer is a room as GET gives it.
type roomAnswer struct {
	ID, Code, CreatorID     string
	CreatedAt, ExpiresAt    time.Time
	MaxPlayers, PlayerCount int
	HasPassword, Locked     bool
}

func roomParse(t testing.TB, a httpAnswer) (r roomAnswer) {
	t.Helper()
	a.want(t, http.StatusOK, "", "")
	d := json.NewDecoder(strings.NewReader(a.text))
	d.DisallowUnknownFields()
	if err := d.Decode(&r); err != nil {
		t.Errorf("%s: %v", a.text, err)
	}
	return r
}

func roomGet(ts *testServer, name string) roomAnswer {
	ts.t.Helper()
	return roomParse(ts.t, ts.call(http.MethodGet, "/api/rooms/"+name, ""))
}

// roomWantEach fails unless the answer to a dial is this one, without parley.v1
// as HTTP and with it as a close.
func roomWantEach(ts *testServer, d wsDial, status int, code string, close closeCode) {
	ts.t.Helper()
	refusal(ts, d).want(ts.t, status, code, "")
	d.v1 = true
	soonClosed(ts.join(d)).wantClosed(close, code)
}

// roomGuesses fails unless the caller has so many wrong guesses left.
func roomGuesses(ts *testServer, want int) {
	ts.t.Helper()
	var who struct{ GuessesLeft int }
	if err := json.Unmarshal([]byte(ts.call(http.MethodGet, "/whoami", "").text), &who); err != nil || who.GuessesLeft != want {
		ts.t.Errorf("%d guesses left, want %d; %v", who.GuessesLeft, want, err)
	}
}

// --- The API.

func TestRoomOpened(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		for body, life := range map[string]time.Duration{
			"": 24 * time.Hour, `{}`: 24 * time.Hour, `{"ttl":null}`: 24 * time.Hour,
			`{"ttl":60}`: time.Minute, `{"ttl":0.5}`: 500 * time.Millisecond,
			`{"ttl":86400}`: 24 * time.Hour, `{"ttl":86401}`: 24 * time.Hour, `{"ttl":1e999}`: 24 * time.Hour,
		} {
			a := ts.call(http.MethodPost, "/api/rooms", body)
			a.want(t, http.StatusCreated, "", "")
			var r testRoom
			if err := json.Unmarshal([]byte(a.text), &r); err != nil {
				t.Fatal(err)
			}
			want := fmt.Sprintf(`{"roomId":"%s","code":"%s","expiresAt":"%s","ownerToken":"%s"}`+"\n",
				r.RoomID, r.Code, time.Now().Add(life).UTC().Format("2006-01-02T15:04:05.000Z"), r.OwnerToken)
			if a.text != want {
				t.Errorf("%s: answered %s, want %s", body, a.text, want)
			}
			if id, err := uuid.Parse(r.RoomID); err != nil || id.Version() != 4 {
				t.Errorf("the room is called %s", r.RoomID)
			}
			if len(r.OwnerToken) < 22 { // of base64: 128 bits
				t.Errorf("the token is %s", r.OwnerToken)
			}
		}
		ts.call(http.MethodPost, "/api/rooms/", "").want(t, http.StatusNotFound, "not_found", "")
	})
}

// Every letter is used, at every place, and no other.
func TestRoomCodes(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		var seen [6]map[rune]bool
		codes, tokens := make(map[string]bool), make(map[string]bool)
		for range 600 {
			r := ts.openRoom("")
			if len(r.Code) != 6 || strings.Trim(r.Code, roomLetters) != "" || codes[r.Code] || tokens[r.OwnerToken] {
				t.Fatalf("the code is %s, the token %s", r.Code, r.OwnerToken)
			}
			codes[r.Code], tokens[r.OwnerToken] = true, true
			for i, letter := range r.Code {
				if seen[i] == nil {
					seen[i] = make(map[rune]bool)
				}
				seen[i][letter] = true
			}
		}
		for i := range seen {
			if len(seen[i]) != 32 {
				t.Errorf("place %d of 600 codes has %d letters", i, len(seen[i]))
			}
		}
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 600, "parley_sessions_active": 600})
	})
}

// A field that is wrong is named, and changes nothing.
func TestRoomBadFields(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		r := ts.openRoom(`{"maxPlayers":5}`)
		before := ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "").text
		for _, tc := range []struct{ field, code, values string }{
			{"maxPlayers", "bad_max_players", `1 17 0 -2 8.5 8.0 "8" true [8] {} 1e99 99999999999999999999`},
			{"locked", "bad_locked", `"yes" "true" 1 0 [] {}`},
			{"password", "bad_password", `5 true ["x"] {} "` + strings.Repeat("x", 129) + `" "` + strings.Repeat("é", 65) + `"`},
			{"ttl", "bad_ttl", `0 -1 "x" "60" true [] {} -1e999`},
		} {
			for value := range strings.FieldsSeq(tc.values) {
				body := fmt.Sprintf(`{"locked":true,"maxPlayers":3,%q:%s}`, tc.field, value)
				ts.call(http.MethodPost, "/api/rooms", body).want(t, http.StatusBadRequest, tc.code, tc.field)
				if tc.field != "ttl" { // which is none of PATCH
					ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, body, roomBearer(r.OwnerToken)).want(t, http.StatusBadRequest, tc.code, tc.field)
				}
			}
		}
		for _, body := range []string{`[]`, `null`, `"x"`, `x`, ` `, `{"locked":true`, `{"locked":true}{}`} {
			ts.call(http.MethodPost, "/api/rooms", body).want(t, http.StatusBadRequest, "bad_json", "JSON object")
			ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, body, roomBearer(r.OwnerToken)).want(t, http.StatusBadRequest, "bad_json", "JSON object")
		}
		large := `{"locked":true,"x":"` + strings.Repeat("x", 4<<10) + `"}`
		ts.call(http.MethodPost, "/api/rooms", large).want(t, http.StatusRequestEntityTooLarge, "too_large", "4 KiB")
		ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, large, roomBearer(r.OwnerToken)).want(t, http.StatusRequestEntityTooLarge, "too_large", "4 KiB")
		if after := ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "").text; after != before {
			t.Errorf("the room was %s and is %s", before, after)
		}
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 1})
	})
}

// What is null, or of no known name, is not there.
func TestRoomAbsentFields(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		for _, body := range []string{"", `{}`, `{"maxPlayers":null,"password":null,"ttl":null,"locked":null}`,
			`{"MaxPlayers":99,"Locked":true,"code":"ABCDEF","id":7,"players":[{}],"":1}`} {
			r := ts.openRoom(body)
			if got := roomGet(ts, r.RoomID); got.MaxPlayers != 8 || got.HasPassword || got.Locked || got.Code != r.Code {
				t.Errorf("%s opens %+v", body, got)
			}
			set := ts.openRoom(`{"maxPlayers":2,"password":"sesame","locked":true}`)
			got := roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+set.RoomID, body, roomBearer(set.OwnerToken)))
			if got.MaxPlayers != 2 || !got.HasPassword || !got.Locked {
				t.Errorf("%s changes to %+v", body, got)
			}
		}
		for _, max := range []int{2, 16} {
			r := ts.openRoom(fmt.Sprintf(`{"maxPlayers":%d,"password":"","locked":false}`, max))
			if got := roomGet(ts, r.RoomID); got.MaxPlayers != max || got.HasPassword || got.Locked {
				t.Errorf("opened %+v", got)
			}
		}
		r := ts.openRoom(`{"password":"` + strings.Repeat("x", 128) + `","locked":true}`)
		if got := roomGet(ts, r.RoomID); !got.HasPassword || !got.Locked {
			t.Errorf("opened %+v", got)
		}
	})
}

func TestRoomCreator(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "JWT_SECRET="+testSecret)
		a := ts.call(http.MethodPost, "/api/rooms", "", roomBearer(tokenFor(t, "ada")))
		a.want(t, http.StatusCreated, "", "")
		fields := members(t, a.text)
		if len(fields) != 3 || fields["roomId"] == nil || fields["code"] == nil || fields["expiresAt"] == nil {
			t.Errorf("opened %s", a.text)
		}
		if got := roomGet(ts, fields["roomId"].(string)); got.CreatorID != "ada" {
			t.Errorf("the creator is %q", got.CreatorID)
		}
		for _, headers := range [][]string{nil, {"Authorization: Basic YTpi"}, {roomBearer("x")}} {
			// A bad token is said to be so before the body is looked at.
			a := ts.call(http.MethodPost, "/api/rooms", `[]`, headers...)
			a.want(t, http.StatusUnauthorized, "unauthorized", "oken")
			if got := a.header.Get("WWW-Authenticate"); got != "Bearer" {
				t.Errorf("WWW-Authenticate is %q", got)
			}
		}
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 1})
	})
}

func TestRoomGet(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=30s")
		created := time.Now()
		r := ts.openRoom(`{"ttl":3600,"maxPlayers":3,"password":"sesame"}`)
		pass(time.Second)
		text := func(players int) string {
			const format = "2006-01-02T15:04:05.000Z"
			return fmt.Sprintf(`{"id":"%s","code":"%s","creatorId":"","createdAt":"%s","expiresAt":"%s","maxPlayers":3,"playerCount":%d,"hasPassword":true,"locked":false}`+"\n",
				r.RoomID, r.Code, created.UTC().Format(format), created.Add(time.Hour).UTC().Format(format), players)
		}
		mixed := strings.ToLower(r.Code[:3]) + r.Code[3:]
		for _, name := range []string{r.RoomID, strings.ToUpper(r.RoomID), r.Code, strings.ToLower(r.Code), mixed} {
			a := ts.call(http.MethodGet, "/api/rooms/"+name, "")
			a.want(t, http.StatusOK, "", "")
			if a.text != text(0) {
				t.Errorf("%s is %s, want %s", name, a.text, text(0))
			}
		}
		players := func(want int) {
			t.Helper()
			if got := ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "").text; got != text(want) {
				t.Errorf("the room is %s, want %s", got, text(want))
			}
		}
		ada := roomJoin(ts, wsDial{room: mixed, password: "sesame"})
		if ada.RoomID != r.RoomID {
			t.Errorf("the code leads to %s", ada.RoomID)
		}
		bob := roomJoin(ts, wsDial{room: r.RoomID, password: "sesame"})
		players(2)
		ada.end(dropped)
		players(2)
		bob.end(websocket.StatusNormalClosure)
		players(1)
		time.Sleep(30 * time.Second)
		synctest.Wait()
		players(0)
	})
}

func TestRoomNotFound(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "REDEEM_FAILS=0")
		_, pair := ts.mint()
		ts.join(wsDial{appID: testApp, side: "A"})
		short, empty, deleted, left := ts.openRoom(`{"ttl":10}`), ts.openRoom(""), ts.openRoom(""), ts.openRoom("")
		held := roomJoin(ts, wsDial{room: short.Code})
		ts.call(http.MethodDelete, "/api/rooms/"+deleted.RoomID, "", roomBearer(deleted.OwnerToken)).want(t, http.StatusOK, "", "")
		notFound := func(names ...string) {
			t.Helper()
			for _, name := range names {
				ts.call(http.MethodGet, "/api/rooms/"+name, "").want(t, http.StatusNotFound, "room_not_found", "unknown or has ended")
				roomWantEach(ts, wsDial{room: name}, http.StatusNotFound, "room_not_found", closeUnknown)
			}
		}
		notFound(roomNobody, pair, testApp, "ABCDEF", "abcdef", "I0I0I0", "ABC", "ABCDEFG", "x-y", deleted.RoomID, deleted.Code)

		// At its end a room is gone, though the janitor may not have been here.
		pass(10*time.Second - time.Millisecond)
		roomGet(ts, short.Code)
		pass(time.Millisecond)
		notFound(short.RoomID, short.Code)
		pass(janitorEvery)
		held.wantEnd(closeUnknown, "room_not_found")

		// So is one to which nobody came, or from which everyone has gone.
		pass(5*time.Minute - 10*time.Second - janitorEvery - time.Second)
		roomJoin(ts, wsDial{room: left.Code}).end(websocket.StatusNormalClosure)
		roomGet(ts, empty.Code)
		pass(time.Second)
		notFound(empty.RoomID, empty.Code)
		pass(5*time.Minute - time.Second - time.Millisecond)
		roomGet(ts, left.Code)
		pass(time.Millisecond)
		notFound(left.RoomID, left.Code)
		if n := len(ts.call(http.MethodGet, "/api/rooms/"+pair, "").header["Retry-After"]); n != 0 {
			t.Error("a 404 says to try again")
		}
	})
}

// Who is away is in the room: the time of an empty one begins when the last
// seat is free.
func TestRoomWithTheAwayIsNotEmpty(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "ROOM_EMPTY_TTL=10s", "RESUME_TTL=1m")
		r := ts.openRoom("")
		roomJoin(ts, wsDial{room: r.RoomID}).end(dropped)
		pass(70*time.Second - time.Millisecond)
		roomGet(ts, r.RoomID)
		time.Sleep(time.Millisecond)
		ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "").want(t, http.StatusNotFound, "room_not_found", "")
	})
}

func TestRoomMethods(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		for path, allow := range map[string]string{
			"/api/rooms": "POST", "/api/rooms/ABCDEF": "DELETE, GET, HEAD, PATCH", "/ws/signal/ABCDEF": "GET, HEAD",
		} {
			for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE"} {
				if strings.Contains(allow, method) {
					continue
				}
				a := ts.call(method, path, "")
				a.want(t, http.StatusMethodNotAllowed, "method_not_allowed", method)
				if got := a.header.Get("Allow"); got != allow {
					t.Errorf("%s allows %q, want %q", path, got, allow)
				}
			}
		}
	})
}

func TestRoomPatch(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r, ada, bob, eve := roomOfThree(ts, `{"maxPlayers":8}`)
		want := roomGet(ts, r.RoomID)
		patch := func(body string, change func(*roomAnswer)) {
			t.Helper()
			change(&want)
			got := roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, body, roomBearer(r.OwnerToken)))
			if got != want || got != roomGet(ts, r.RoomID) {
				t.Errorf("%s answers %+v, want %+v", body, got, want)
			}
		}
		at := wsDial{room: r.RoomID}
		patch(`{"locked":true}`, func(r *roomAnswer) { r.Locked = true })
		refusal(ts, at).want(t, http.StatusForbidden, "room_locked", "locked")
		patch(`{"locked":false}`, func(r *roomAnswer) { r.Locked = false })
		patch(`{"password":"sesame"}`, func(r *roomAnswer) { r.HasPassword = true })
		refusal(ts, at).want(t, http.StatusForbidden, "wrong_password", "password")
		patch(`{"password":"changed"}`, func(*roomAnswer) {})
		refusal(ts, wsDial{room: r.RoomID, password: "sesame"}).want(t, http.StatusForbidden, "wrong_password", "password")
		roomJoin(ts, wsDial{room: r.RoomID, password: "changed"}).end(websocket.StatusNormalClosure)
		patch(`{"password":""}`, func(r *roomAnswer) { r.HasPassword = false })
		roomJoin(ts, at).end(websocket.StatusNormalClosure)

		// Fewer seats than are taken: nobody has to go, and nobody comes.
		patch(`{"maxPlayers":2}`, func(r *roomAnswer) { r.MaxPlayers = 2 })
		for _, m := range []*roomMember{ada, bob, eve} {
			m.settled()
			m.send(`{"type":"ping"}`)
			m.want(`{"type":"pong"}`)
		}
		refusal(ts, at).want(t, http.StatusConflict, "room_is_full", "full")
		eve.end(websocket.StatusNormalClosure)
		want.PlayerCount--
		refusal(ts, at).want(t, http.StatusConflict, "room_is_full", "full")
		bob.end(websocket.StatusNormalClosure)
		want.PlayerCount--
		roomJoin(ts, at)
		want.PlayerCount++
		patch(`{"maxPlayers":16,"locked":true,"password":"all"}`, func(r *roomAnswer) { r.MaxPlayers, r.Locked, r.HasPassword = 16, true, true })
		patch(`{}`, func(*roomAnswer) {})
		patch(``, func(*roomAnswer) {})
		patch(`{"ttl":1,"code":"ABCDEF","playerCount":0,"creatorId":"eve"}`, func(*roomAnswer) {}) // none of these may be changed

		// One field that is wrong, and none is changed.
		ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, `{"locked":false,"maxPlayers":99}`, roomBearer(r.OwnerToken)).want(t, http.StatusBadRequest, "bad_max_players", "maxPlayers")
		patch(`{}`, func(*roomAnswer) {})
	})
}

// Only who opened a room may change and delete it.
func TestRoomOwners(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		open, byJWT := newSettledServer(t, "ROOMS=open"), newSettledServer(t, "JWT_SECRET="+testSecret)
		r, other := open.openRoom(""), open.openRoom("")
		j := byJWT.openRoom("", roomBearer(tokenFor(t, "ada")))
		member := roomJoin(open, wsDial{room: r.RoomID})
		for _, method := range []string{http.MethodPatch, http.MethodDelete} {
			const body = `{"locked":true}`
			for _, tc := range []struct {
				ts             *testServer
				room           string
				authorizations []string
				status         int
				code           string
			}{
				{open, r.RoomID, nil, 401, "unauthorized"},
				{open, r.RoomID, []string{"Authorization: " + r.OwnerToken}, 401, "unauthorized"},
				{open, r.RoomID, []string{"Authorization: Basic " + r.OwnerToken}, 401, "unauthorized"},
				{open, r.RoomID, []string{"Authorization: Bearer "}, 401, "unauthorized"},
				{open, r.RoomID, []string{roomBearer(r.OwnerToken), roomBearer(r.OwnerToken)}, 401, "unauthorized"},
				{open, roomNobody, nil, 401, "unauthorized"},
				{open, r.RoomID, []string{roomBearer(other.OwnerToken)}, 403, "not_creator"},
				{open, r.RoomID, []string{roomBearer(r.OwnerToken + "x")}, 403, "not_creator"},
				{open, r.RoomID, []string{roomBearer(r.RoomID)}, 403, "not_creator"},
				{open, r.RoomID, []string{roomBearer(member.Resume)}, 403, "not_creator"},
				{open, roomNobody, []string{roomBearer(r.OwnerToken)}, 404, "room_not_found"},
				{byJWT, j.RoomID, nil, 401, "unauthorized"},
				{byJWT, j.RoomID, []string{roomBearer("x")}, 401, "unauthorized"},
				{byJWT, roomNobody, []string{roomBearer("x")}, 401, "unauthorized"},
				{byJWT, j.RoomID, []string{roomBearer(tokenFor(t, "eve"))}, 403, "not_creator"},
				{byJWT, j.RoomID, []string{roomBearer(tokenFor(t, "ADA"))}, 403, "not_creator"},
				{byJWT, roomNobody, []string{roomBearer(tokenFor(t, "ada"))}, 404, "room_not_found"},
			} {
				a := tc.ts.call(method, "/api/rooms/"+tc.room, body, tc.authorizations...)
				a.want(t, tc.status, tc.code, "")
				if got := a.header.Get("WWW-Authenticate"); (got == "Bearer") != (tc.status == 401) {
					t.Errorf("%d with WWW-Authenticate %q", tc.status, got)
				}
			}
			if roomGet(open, r.RoomID).Locked || roomGet(byJWT, j.RoomID).Locked {
				t.Error("a stranger locked the room")
			}
		}
		if got := roomParse(t, byJWT.call(http.MethodPatch, "/api/rooms/"+j.RoomID, `{"locked":true}`, roomBearer(tokenFor(t, "ada")))); !got.Locked || got.CreatorID != "ada" {
			t.Errorf("the creator changed it to %+v", got)
		}
		byJWT.call(http.MethodDelete, "/api/rooms/"+j.RoomID, "", roomBearer(tokenFor(t, "ada"))).want(t, 200, "", "")
		member.want()
	})
}

func TestRoomDelete(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom("")
		stays := ts.openRoom("")
		old := roomJoin(ts, wsDial{room: r.Code, name: "old"})
		v1 := roomJoin(ts, wsDial{room: r.Code, name: "v1", v1: true})
		away := roomJoin(ts, wsDial{room: r.Code, name: "away"})
		away.end(dropped)
		elsewhere := roomJoin(ts, wsDial{room: stays.Code})
		old.settled()
		v1.settled()
		del := func() httpAnswer {
			return ts.call(http.MethodDelete, "/api/rooms/"+r.RoomID, "", roomBearer(r.OwnerToken))
		}
		a := del()
		a.want(t, http.StatusOK, "", "")
		if a.text != `{"message":"Room deleted"}`+"\n" {
			t.Errorf("answered %s", a.text)
		}
		old.wantEnd(closeDeleted, "room_deleted")
		v1.wantEnd(closeDeleted, "room_deleted")
		old.want()
		v1.want()
		del().want(t, http.StatusNotFound, "room_not_found", "")
		roomWantEach(ts, away.again(), http.StatusNotFound, "room_not_found", closeUnknown)
		if elsewhere.ended() {
			t.Error("another room ended with it")
		}
		pass(2 * time.Minute) // the reservation is over
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 1, `parley_ws_closes_total{code="4510"}`: 2})
	})
}

func TestRoomForeignOrigin(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "DEV=false", "ROOMS=open")
		r := ts.openRoom("", "Origin: http://parley.test") // its own
		ts.call(http.MethodPost, "/api/rooms", "", roomForeign).want(t, http.StatusForbidden, "forbidden_origin", "origin")
		for _, method := range []string{http.MethodPatch, http.MethodDelete} {
			ts.call(method, "/api/rooms/"+r.RoomID, `{"locked":true}`, roomBearer(r.OwnerToken), roomForeign).want(t, http.StatusForbidden, "forbidden_origin", "origin")
		}
		if roomGet(ts, r.RoomID).Locked {
			t.Error("a foreign page locked the room")
		}
		for _, v1 := range []bool{false, true} { // what a page may do is always told as HTTP
			d := wsDial{room: r.Code, v1: v1, header: http.Header{"Origin": {"https://foreign.example"}}}
			refusal(ts, d).want(t, http.StatusForbidden, "forbidden_origin", "origin")
		}
		// It cannot guess either, nor read.
		refusal(ts, wsDial{room: "ABCDEF", header: http.Header{"Origin": {"https://foreign.example"}}}).want(t, http.StatusForbidden, "forbidden_origin", "origin")
		roomGuesses(ts, 10)
		if a := ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "", roomForeign); a.status != http.StatusOK || a.header.Get("Access-Control-Allow-Origin") != "" {
			t.Errorf("a foreign page reads %d %v", a.status, a.header)
		}
		a := ts.call(http.MethodOptions, "/api/rooms/"+r.RoomID, "", "Origin: http://parley.test", "Access-Control-Request-Method: PATCH", "Access-Control-Request-Headers: authorization")
		if got := a.header.Get("Access-Control-Allow-Methods"); got != "PATCH" {
			t.Errorf("the server's own pages may use %q", got)
		}
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 1})
		if got := roomGet(ts, r.RoomID).PlayerCount; got != 0 {
			t.Errorf("%d in the room", got)
		}
	})
}

func TestRoomLimits(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		owned := func(r testRoom) string { return roomBearer(r.OwnerToken) }

		// What is open at a time in the whole server.
		ts := newSettledServer(t, "ROOMS=open", "MAX_SESSIONS=2")
		r := ts.openRoom("")
		ts.mint()
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusServiceUnavailable, "at_capacity", "as many")
		ts.call(http.MethodPost, "/rendezvous/code", "").want(t, http.StatusServiceUnavailable, "at_capacity", "as many")
		roomJoin(ts, wsDial{room: r.Code}) // which opens nothing
		ts.call(http.MethodDelete, "/api/rooms/"+r.RoomID, "", owned(r)).want(t, http.StatusOK, "", "")
		ts.openRoom("")
		if n := len(ts.memory.codes.rooms); n != 1 {
			t.Errorf("%d codes are taken", n)
		}

		// And what of that one address may have.
		ts = newSettledServer(t, "ROOMS=open", "MAX_CODES_PER_IP=3")
		r = ts.openRoom(`{"ttl":60}`)
		second := ts.openRoom("")
		ts.mint()
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusTooManyRequests, "too_many_codes", "as many")
		ts.call(http.MethodPost, "/rendezvous/code", "").want(t, http.StatusTooManyRequests, "too_many_codes", "as many")
		callsFrom(ts, "192.0.2.2").openRoom("")
		ts.call(http.MethodDelete, "/api/rooms/"+second.RoomID, "", owned(second)).want(t, http.StatusOK, "", "")
		second = ts.openRoom("")
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusTooManyRequests, "too_many_codes", "as many")
		pass(time.Minute + janitorEvery) // the first has ended
		ts.openRoom("")
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusTooManyRequests, "too_many_codes", "as many")
	})
}

func TestRoomRates(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "HTTP_RATE_PER_MIN=4", "WS_RATE_PER_MIN=2")
		r := ts.openRoom("")
		roomGet(ts, r.RoomID)
		roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, "", roomBearer(r.OwnerToken)))
		ts.call(http.MethodDelete, "/api/rooms/"+roomNobody, "", roomBearer(r.OwnerToken)).want(t, http.StatusNotFound, "room_not_found", "")
		for _, method := range []string{http.MethodGet, http.MethodPatch, http.MethodDelete} {
			ts.call(method, "/api/rooms/"+r.RoomID, "", roomBearer(r.OwnerToken)).want(t, http.StatusTooManyRequests, "rate_limited", "too often")
		}
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusTooManyRequests, "rate_limited", "too often")
		roomJoin(ts, wsDial{room: r.RoomID})
		refusal(ts, wsDial{room: roomNobody}).want(t, http.StatusNotFound, "room_not_found", "")
		for _, v1 := range []bool{false, true} {
			refusal(ts, wsDial{room: r.RoomID, v1: v1}).want(t, http.StatusTooManyRequests, "rate_limited", "too often")
		}
		wantSeries(t, ts, map[string]float64{
			`parley_rate_limited_total{route="rooms"}`: 4, `parley_rate_limited_total{route="signal"}`: 2,
			`parley_rate_limited_total{route="ws"}`: 0, `parley_rate_limited_total{route="code"}`: 0,
		})
		pass(30 * time.Second)
		roomJoin(ts, wsDial{room: r.RoomID})
		roomGet(ts, r.RoomID)
	})
}

func TestRoomDraining(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom("")
		ts.draining.Store(true)
		ts.clients.close()
		ts.call(http.MethodPost, "/api/rooms", "").want(t, http.StatusServiceUnavailable, "draining", "shutting down")
		roomWantEach(ts, wsDial{room: r.RoomID}, http.StatusServiceUnavailable, "draining", closeGoingAway)
		wantSeries(t, ts, map[string]float64{"parley_rooms_active": 1})
	})
}

// A room is no pair, and a pair no room.
func TestRoomIsNoPair(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "APP_IDS=any")
		r := ts.openRoom("")
		ada := roomJoin(ts, wsDial{room: r.RoomID})
		for _, side := range []string{"A", "B"} {
			roomWantEach(ts, wsDial{appID: r.RoomID, side: side, sid: ada.Resume}, http.StatusNotFound, "unknown_session", closeUnknown)
		}
		ada.want()
		if got := roomGet(ts, r.RoomID).PlayerCount; got != 1 {
			t.Errorf("%d in the room", got)
		}
		wantSeries(t, ts, map[string]float64{"parley_sessions_active": 1})
	})
}

// --- Joining.

func TestRoomFirstFrames(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		for _, v1 := range []bool{false, true} { // the version changes nothing
			r := ts.openRoom("")
			ada := roomJoin(ts, wsDial{room: r.RoomID, name: "ada", v1: v1})
			want := `{"type":"join","from":"%s","roomId":"%s","displayName":"%s","peers":[%s],"host":"%s","resume":"%s"}`
			if got := fmt.Sprintf(want, ada.From, r.RoomID, "ada", "", ada.From, ada.Resume); ada.first != got {
				t.Errorf("the first frame is\n\t%s\nwant\n\t%s", ada.first, got)
			}
			bob := roomJoin(ts, wsDial{room: r.Code, name: "bob", v1: v1})
			eve := roomJoin(ts, wsDial{room: strings.ToLower(r.Code), v1: v1}) // without a name
			peers := fmt.Sprintf(`{"id":"%s","displayName":"ada"},{"id":"%s","displayName":"bob"}`, ada.From, bob.From)
			if got := fmt.Sprintf(want, eve.From, r.RoomID, "", peers, ada.From, eve.Resume); eve.first != got {
				t.Errorf("the first frame is\n\t%s\nwant\n\t%s", eve.first, got)
			}
			if ids := []string{ada.From, bob.From, eve.From}; ids[0] == ids[1] || ids[0] == ids[2] || ids[1] == ids[2] || ada.Resume == bob.Resume {
				t.Errorf("the members are %q", ids)
			}
			ada.want(bob.joined(), eve.joined())
			bob.want(eve.joined())
			ada.end(websocket.StatusNormalClosure)
			bob.want(ada.left(bob))
			eve.want(ada.left(bob))
			eve.end(websocket.StatusNormalClosure)
			bob.want(eve.left(bob))
		}
	})
}

func TestRoomDisplayName(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom("")
		first := roomJoin(ts, wsDial{room: r.RoomID})
		for _, name := range []string{"", " ", `"quoted" \ </script>`, "👩‍👩‍👧 Ünï", "\u2028", strings.Repeat("é", 64), strings.Repeat("😀", 64), "a&displayName=b", "null"} {
			m := roomJoin(ts, wsDial{room: r.RoomID, name: name})
			got := first.settled()
			if len(got) != 1 {
				t.Fatalf("received %q", got)
			}
			for _, frame := range []string{m.first, got[0]} {
				if shown := members(t, frame)["displayName"]; shown != name {
					t.Errorf("%q is shown as %q", name, shown)
				}
			}
			late := roomJoin(ts, wsDial{room: r.RoomID})
			if got := late.Peers; len(got) != 2 || got[1] != (roomPeer{m.From, name}) {
				t.Errorf("%q is in the room as %q", name, got)
			}
			late.end(websocket.StatusNormalClosure)
			m.end(websocket.StatusNormalClosure)
			first.settled()
		}
		for _, name := range []string{strings.Repeat("é", 65), strings.Repeat("x", 65), "a\nb", "\x00", "\x7f", "\u0085", "a\xffb", "\xed\xa0\x80"} {
			for _, v1 := range []bool{false, true} { // a parameter
				refusal(ts, wsDial{room: r.RoomID, name: name, v1: v1}).want(t, http.StatusBadRequest, "bad_display_name", "displayName")
			}
			// Nor is a name taken that comes with a right secret.
			refusal(ts, wsDial{room: r.RoomID, name: name, resume: first.Resume}).want(t, http.StatusBadRequest, "bad_display_name", "displayName")
		}
		first.want()
		if got := roomGet(ts, r.RoomID).PlayerCount; got != 1 {
			t.Errorf("%d in the room", got)
		}
	})
}

func TestRoomRefusals(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "REDEEM_FAILS=0")
		secret := ts.openRoom(`{"password":"sesame"}`)
		locked := ts.openRoom(`{"locked":true}`)
		full := ts.openRoom(`{"maxPlayers":2}`)
		all := ts.openRoom(`{"maxPlayers":2,"password":"sesame","locked":true}`)
		roomJoin(ts, wsDial{room: full.RoomID})
		roomJoin(ts, wsDial{room: full.RoomID}).end(dropped) // who is away has a seat
		for _, name := range []func(testRoom) string{func(r testRoom) string { return r.RoomID }, func(r testRoom) string { return r.Code }} {
			roomWantEach(ts, wsDial{room: name(secret)}, http.StatusForbidden, "wrong_password", closeForbidden)
			roomWantEach(ts, wsDial{room: name(secret), password: "Sesame"}, http.StatusForbidden, "wrong_password", closeForbidden)
			roomWantEach(ts, wsDial{room: name(secret), password: "sesame "}, http.StatusForbidden, "wrong_password", closeForbidden)
			roomWantEach(ts, wsDial{room: name(locked)}, http.StatusForbidden, "room_locked", closeForbidden)
			roomWantEach(ts, wsDial{room: name(full)}, http.StatusConflict, "room_is_full", closeRoomFull)
			// Who does not know the password learns nothing else.
			roomWantEach(ts, wsDial{room: name(all)}, http.StatusForbidden, "wrong_password", closeForbidden)
			roomWantEach(ts, wsDial{room: name(all), password: "sesame"}, http.StatusForbidden, "room_locked", closeForbidden)
		}
		for _, d := range []wsDial{{room: secret.Code, password: "sesame"}, {room: ts.openRoom("").Code, password: "not asked for"}} {
			roomJoin(ts, d)
		}
		for _, path := range []string{"/ws/signal/" + full.RoomID, "/ws/signal/" + roomNobody + "?displayName=ada"} {
			a := ts.call(http.MethodGet, path, "")
			a.want(t, http.StatusUpgradeRequired, "upgrade_required", "WebSocket")
			if got := a.header.Get("Upgrade"); got != "websocket" {
				t.Errorf("Upgrade is %q", got)
			}
		}
		ts.call(http.MethodGet, "/ws/signal/", "").want(t, http.StatusNotFound, "not_found", "")
		wantSeries(t, ts, map[string]float64{
			`parley_ws_closes_total{code="4503"}`: 12, `parley_ws_closes_total{code="4509"}`: 2, `parley_ws_closes_total{code="4504"}`: 0,
			"parley_ws_connections": 3,
		})
	})
}

// Of many who come at once, as many get in as there are seats.
func TestRoomSeatsAreCounted(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom(`{"maxPlayers":5}`)
		var all sync.WaitGroup
		results := make(chan int, 40)
		for range cap(results) {
			all.Go(func() {
				if _, res, err := ts.dial(wsDial{room: r.RoomID}); err == nil {
					results <- http.StatusSwitchingProtocols
				} else if res != nil {
					results <- res.StatusCode
				}
			})
		}
		all.Wait()
		close(results)
		got := make(map[int]int)
		for status := range results {
			got[status]++
		}
		if got[http.StatusSwitchingProtocols] != 5 || got[http.StatusConflict] != 35 {
			t.Errorf("answered %v", got)
		}
		if n := roomGet(ts, r.RoomID).PlayerCount; n != 5 {
			t.Errorf("%d in the room", n)
		}
	})
}

// --- Frames.

func TestRoomRelay(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		for _, typ := range []string{"offer", "answer", "candidate"} {
			for _, to := range []string{``, `,"to":null`, `,"to":""`} {
				bob.sendf(`{"type":%q%s,"payload":{"n":1}}`, typ, to)
				ada.want(bob.signal(typ, `{"n":1}`))
				eve.want(bob.signal(typ, `{"n":1}`))
				bob.want()
			}
			bob.sendf(`{"type":%q,"to":%q,"payload":{"n":2}}`, typ, eve.From)
			eve.want(bob.signalTo(eve, typ, `{"n":2}`))
			ada.want()
			bob.want()
		}
		// Who sends, and where, the server knows best.
		bob.sendf(`{"from":%q,"roomId":%q,"payload":1,"type":"offer","displayName":"ada","host":%[1]q,"id":7}`, ada.From, roomNobody)
		ada.want(bob.signal("offer", "1"))
		eve.want(bob.signal("offer", "1"))
		bob.sendf(`{"type":"answer","from":%q,"to":%q,"roomId":7,"payload":1}`, eve.From, ada.From)
		ada.want(bob.signalTo(ada, "answer", "1"))
		// An ID is compared once it is unescaped.
		bob.sendf(`{"type":"\u006fffer","to":"\u00%x%s","payload":2}`, ada.From[0], ada.From[1:])
		ada.want(bob.signalTo(ada, "offer", "2"))
		eve.want()

		// What goes to one and what goes to all arrive in the order they were sent.
		var wantAda, wantEve []string
		for i := range 60 {
			n := fmt.Sprint(i)
			if i%3 == 0 {
				bob.sendf(`{"type":"candidate","payload":%s}`, n)
				wantAda, wantEve = append(wantAda, bob.signal("candidate", n)), append(wantEve, bob.signal("candidate", n))
			} else if i%3 == 1 {
				bob.sendf(`{"type":"candidate","to":%q,"payload":%s}`, ada.From, n)
				wantAda = append(wantAda, bob.signalTo(ada, "candidate", n))
			} else {
				bob.sendf(`{"type":"candidate","to":%q,"payload":%s}`, eve.From, n)
				wantEve = append(wantEve, bob.signalTo(eve, "candidate", n))
			}
		}
		ada.want(wantAda...)
		eve.want(wantEve...)
	})
}

// To everyone else is to nobody, for one who is alone.
func TestRoomAlone(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		ada := roomJoin(ts, wsDial{room: ts.openRoom("").RoomID})
		for range 100 {
			ada.send(`{"type":"offer","payload":1}`)
		}
		ada.want()
		roomJoin(ts, wsDial{room: ada.RoomID}).want() // what was sent before is not for it
		wantSeries(t, ts, map[string]float64{"parley_mailbox_bytes": 0})
	})
}

func TestRoomPayloadIsUntouched(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		for _, payload := range []string{
			`null`, `""`, `0`, `-0.0e-0`, `1E400`, `12345678901234567890123456789012345678901234567890.10`, `false`, `[]`, `{}`,
			"{ \"a\" :\t1 ,\r\n \"a\": [ 2 ,3 ] }", `"\u0041\/\"\\\ud83d\ude00\ud800"`, `"é😀</script>\u2028"`,
			`{"type":"leave","from":"x","to":"y","payload":{"payload":1}}`, `"` + strings.Repeat("x", 300_000) + `"`,
			strings.Repeat("[", 63) + strings.Repeat("]", 63),
		} {
			ada.send("\n { \"payload\" : " + payload + "\t, \"type\":\"offer\" } ")
			ada.sendf(`{"to":%q,"type":"answer","payload":%s}`, eve.From, payload)
			bob.want(ada.signal("offer", payload))
			eve.want(ada.signal("offer", payload), ada.signalTo(eve, "answer", payload))
		}
		ada.send(`{"type":"offer","payload":1,"payload":2}`) // the last counts
		bob.want(ada.signal("offer", "2"))
		ada.want()
	})
}

func TestRoomErrors(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		stranger := roomJoin(ts, wsDial{room: ts.openRoom("").RoomID})
		for _, to := range []string{roomNobody, ada.From, stranger.From, "A", "ada", strings.ToUpper(bob.From) + " ", `x","from":"` + bob.From, "\U0001f600"} {
			quoted, _ := json.Marshal(to)
			ada.sendf(`{"type":"candidate","to":%s,"payload":1}`, quoted)
			ada.wantError("peer_not_found", "no such", "candidate")
			ada.sendf(`{"type":"candidate","to":%s,"payload":1,"id":12}`, quoted)
			ada.wantError("peer_not_found", "no such", 12.0)
		}
		for _, to := range []string{`7`, `true`, `[]`, `{}`, `["` + bob.From + `"]`} {
			ada.sendf(`{"type":"offer","to":%s,"payload":1}`, to)
			ada.wantError("bad_frame", `"to"`, "offer")
		}
		ada.send(`{"type":"answer"}`)
		ada.wantError("bad_frame", `"payload"`, "answer")
		ada.sendf(`{"type":"answer","to":%q,"id":9}`, bob.From)
		ada.wantError("bad_frame", `"payload"`, 9.0)

		// Of a pair's frames most mean nothing here, and none of a server's.
		for _, typ := range []string{"ice", "send", "hello", "delivered", "bye", "sender_ready", "join", "leave", "deliver", "Offer", "offers", ""} {
			ada.sendf(`{"type":%q,"to":%q,"payload":1,"upTo":0}`, typ, bob.From)
			ada.wantError("unknown_type", "type", typ)
		}
		for _, text := range []string{`[]`, `{}`, `{"type":1,"payload":1}`, `{"type":"offer","type":"offer","payload":1}`, `{"type":"offer","payload":}`, `offer`,
			`{"type":"offer","payload":` + strings.Repeat("[", 64) + strings.Repeat("]", 64) + `}`} {
			ada.send(text)
			if got := ada.settled(); len(got) != 1 || !strings.HasPrefix(got[0], `{"type":"error","code":"bad_frame",`) {
				t.Errorf("%.40s is answered %q", text, got)
			}
		}
		ada.send(`{"type":"offer","payload":"all is well"}`)
		for _, other := range []*roomMember{bob, eve} {
			other.want(ada.signal("offer", `"all is well"`))
		}
		stranger.want()

		a, b := ts.pair()
		a.send(`{"type":"candidate","payload":1}`)
		a.wantError("unknown_type", "type", "candidate")
		b.want()
	})
}

// A client may send binary messages. What it gets is text.
func TestRoomBinary(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		ada.sendFrame(gotFrame{binary: true, text: `{"type":"offer","payload":"é"}`})
		bob.wantFrames(gotFrame{text: ada.signal("offer", `"é"`)})
		eve.wantFrames(gotFrame{text: ada.signal("offer", `"é"`)})
		ada.sendFrame(gotFrame{binary: true, text: `{"type":"ping","t":1}`})
		ada.wantFrames(gotFrame{text: `{"type":"pong","t":1}`})
		ada.sendFrame(gotFrame{binary: true, text: "{\"type\":\"offer\",\"payload\":\"\xff\"}"})
		ada.wantError("bad_frame", "UTF-8", nil)

		// In text that is no text, and costs the sender its connection, not its seat.
		ada.sendFrame(gotFrame{text: "{\"type\":\"offer\",\"payload\":\"\xff\"}"})
		soonClosed(ada.wsClient).wantClosed(closeBadUTF8, errBadUTF8.Error())
		bob.want()
		eve.want()
		if back := roomJoin(ts, ada.again()); back.From != ada.From {
			t.Errorf("%s came back as %s", ada.From, back.From)
		}
	})
}

func TestRoomPing(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, _ := roomOfThree(ts, "")
		ada.send(`{"type":"ping"}`)
		ada.send(`{"type":"ping","t":{"a" : [1e400]},"to":"x"}`)
		ada.want(`{"type":"pong"}`, `{"type":"pong","t":{"a" : [1e400]}}`)
		ada.sendf(`{"type":"ping","t":"%s"}`, strings.Repeat("x", 255))
		ada.wantError("bad_frame", "256", "ping")
		bob.want()
	})
}

// The first report of a room is counted, and the time since two were there.
func TestRoomTelemetry(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom("")
		ada := roomJoin(ts, wsDial{room: r.RoomID})
		pass(time.Minute)
		bob := roomJoin(ts, wsDial{room: r.RoomID})
		pass(1500 * time.Millisecond)
		eve := roomJoin(ts, wsDial{room: r.RoomID})
		pass(time.Second)
		for _, m := range []*roomMember{eve, bob, ada, eve} {
			m.settled()
			m.send(`{"type":"telemetry","event":"ice-connected","mode":"relay"}`)
			m.send(`{"type":"telemetry","event":"ice-failed","reason":"made up"}`)
			m.want()
		}
		ada.send(`{"type":"telemetry","event":"made up"}`)
		ada.wantError("bad_frame", "event", "telemetry")
		wantSeries(t, ts, map[string]float64{
			`parley_sessions_established_total{mode="relay"}`: 1, `parley_sessions_failed_total{reason="other"}`: 1,
			"parley_time_to_first_seconds_count": 1, "parley_time_to_first_seconds_sum": 2.5,
		})
	})
}

func TestRoomFrameMetrics(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		ada.send(`{"type":"offer","payload":1}`)
		ada.sendf(`{"type":"candidate","to":%q,"payload":1}`, bob.From)
		bob.settled()
		eve.end(websocket.StatusNormalClosure)
		wantSeries(t, ts, map[string]float64{
			`parley_frames_total{direction="in",type="offer"}`:      1,
			`parley_frames_total{direction="out",type="offer"}`:     2,
			`parley_frames_total{direction="in",type="candidate"}`:  1,
			`parley_frames_total{direction="out",type="candidate"}`: 1,
			`parley_frames_total{direction="out",type="join"}`:      3 + 3,
			`parley_frames_total{direction="out",type="leave"}`:     2,
			`parley_ws_connections`:                                 2,
		})
	})
}

// --- Going, and coming back.

func TestRoomResume(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=60s")
		r, ada, bob, eve := roomOfThree(ts, "")
		for i, how := range []websocket.StatusCode{dropped, websocket.StatusGoingAway, websocket.StatusInternalError, 4999} {
			bob.end(how)
			ada.sendf(`{"type":"offer","to":%q,"payload":1}`, bob.From)
			synctest.Wait() // two senders are in no order otherwise
			eve.send(`{"type":"candidate","payload":2}`)
			synctest.Wait()
			ada.sendf(`{"type":"candidate","to":%q,"payload":3}`, bob.From)
			ada.sendf(`{"type":"candidate","to":%q,"payload":4}`, eve.From)
			synctest.Wait()
			late := roomJoin(ts, wsDial{room: r.RoomID, name: "late"})
			if want := (roomPeer{bob.From, "bob"}); !slices.Contains(late.Peers, want) {
				t.Errorf("the newcomer sees %q, want %q among them", late.Peers, want)
			}
			late.send(`{"type":"offer","payload":5}`)
			ada.want(eve.signal("candidate", "2"), late.joined(), late.signal("offer", "5"))
			pass(59 * time.Second)

			// With the same secret, by whatever name, and every time.
			d := bob.again()
			d.name = "another name"
			if i == 1 {
				d.room = strings.ToLower(r.Code)
			}
			back := roomJoin(ts, d)
			if back.From != bob.From || back.Resume != bob.Resume || back.DisplayName != "bob" || back.Host != ada.From {
				t.Errorf("%s came back as %s", bob.first, back.first)
			}
			if want := []roomPeer{{ada.From, "ada"}, {eve.From, "eve"}, {late.From, "late"}}; !slices.Equal(back.Peers, want) {
				t.Errorf("who came back sees %q, want %q", back.Peers, want)
			}
			back.want(ada.signalTo(bob, "offer", "1"), eve.signal("candidate", "2"), ada.signalTo(bob, "candidate", "3"), late.signal("offer", "5"))
			ada.want()
			eve.want(ada.signalTo(eve, "candidate", "4"), late.joined(), late.signal("offer", "5"))
			back.send(`{"type":"answer","payload":6}`)
			ada.want(bob.signal("answer", "6"))
			late.end(websocket.StatusNormalClosure)
			time.Sleep(2 * time.Minute) // no timer of the absence is left
			back.want(late.left(ada))
			ada.want(late.left(ada))
			eve.settled()
			bob = back
		}
		wantSeries(t, ts, map[string]float64{
			`parley_resumes_total{result="resumed"}`: 4, `parley_resumes_total{result="takeover"}`: 0, `parley_resumes_total{result="refused"}`: 0,
		})
	})
}

// So much may wait for who is away; the rest get all, and the sender is told.
func TestRoomAwayIsBounded(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		bob.end(dropped)
		var want []string
		for i := range 64 {
			ada.sendf(`{"type":"candidate","payload":%d}`, i)
			want = append(want, ada.signal("candidate", fmt.Sprint(i)))
		}
		ada.want()
		ada.send(`{"type":"candidate","payload":64}`)
		ada.wantError("peer_absent", "waiting", "candidate")
		eve.want(append(slices.Clone(want), ada.signal("candidate", "64"))...)
		roomJoin(ts, bob.again()).want(want...)
		wantSeries(t, ts, map[string]float64{`parley_frames_dropped_total{reason="peer_absent"}`: 1, "parley_mailbox_bytes": 0})
	})
}

// Whoever talks to all is told that somebody who is away does not hear it, but
// is never put out for that.
func TestRoomBroadcastPastTheAway(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		bob.end(dropped)
		const frames = waitItems + errorBurst + 500
		for i := range frames {
			ada.sendf(`{"type":"candidate","payload":%d}`, i)
		}
		if got := len(ada.settled()); got < errorBurst || got > errorBurst+2*errorRate {
			t.Errorf("told %d times", got)
		}
		if got := len(eve.settled()); got != frames {
			t.Errorf("eve got %d of %d frames", got, frames)
		}
		ada.sendf(`{"type":"candidate","to":%q,"payload":1}`, bob.From) // that is its own fault
		ada.wantEnd(closeTooMany, "too many errors")
	})
}

func TestRoomTakeover(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		for _, v1 := range []bool{false, true} {
			d := bob.again()
			d.v1 = v1
			back := roomJoin(ts, d)
			bob.wantEnd(closeReplaced, "taken_over")
			if back.From != bob.From || back.Resume != bob.Resume {
				t.Errorf("%s came back as %s", bob.first, back.first)
			}
			bob = back
		}
		time.Sleep(2 * time.Minute) // the old connections free nothing
		ada.want()
		eve.want()
		ada.sendf(`{"type":"offer","to":%q,"payload":1}`, bob.From)
		bob.want(ada.signalTo(bob, "offer", "1"))
		wantSeries(t, ts, map[string]float64{`parley_resumes_total{result="takeover"}`: 2, `parley_ws_closes_total{code="4500"}`: 2})
	})
}

func TestRoomTooManyTakeovers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		_, ada, bob, eve := roomOfThree(ts, "")
		d := bob.again()
		for range 6 {
			bob = roomJoin(ts, d)
		}
		for _, d.v1 = range []bool{false, true} {
			soonClosed(ts.join(d)).wantClosed(closeTooMany, "too_many_takeovers")
		}
		bob.send(`{"type":"ping"}`)
		bob.want(`{"type":"pong"}`)
		roomJoin(ts, eve.again()) // others are not bounded by that
		pass(10 * time.Second)
		roomJoin(ts, d)
		bob.wantEnd(closeReplaced, "taken_over")
		ada.want()
		wantSeries(t, ts, map[string]float64{`parley_resumes_total{result="takeover"}`: 8, `parley_resumes_total{result="refused"}`: 2})
	})
}

func TestRoomResumedTooLate(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=20s")
		_, ada, bob, eve := roomOfThree(ts, "")
		bob.end(dropped)
		ada.sendf(`{"type":"offer","to":%q,"payload":1}`, bob.From)
		time.Sleep(20*time.Second - time.Millisecond)
		ada.want()
		time.Sleep(time.Millisecond)
		ada.want(bob.left(ada))
		eve.want(bob.left(ada))
		ada.sendf(`{"type":"offer","to":%q,"payload":1}`, bob.From)
		ada.wantError("peer_not_found", "no such", "offer")
		anew := roomJoin(ts, bob.again())
		if anew.From == bob.From || anew.Resume == bob.Resume {
			t.Errorf("%s came back as %s", bob.first, anew.first)
		}
		anew.want()
		ada.want(anew.joined())
		eve.want(anew.joined())
		wantSeries(t, ts, map[string]float64{
			`parley_resumes_total{result="resumed"}`: 0, `parley_frames_dropped_total{reason="peer_left"}`: 1, "parley_mailbox_bytes": 0,
		})
	})
}

// A secret that is wrong is as good as none: the password and the lock hold.
func TestRoomResumedWrongly(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r, ada, bob, _ := roomOfThree(ts, "")
		elsewhere := roomJoin(ts, wsDial{room: ts.openRoom("").RoomID})
		bob.end(dropped)
		ada.settled()
		wrong := []string{"x", bob.From, bob.Resume + "x", bob.Resume[1:], strings.ToLower(bob.Resume) + "?", r.OwnerToken, elsewhere.Resume, strings.Repeat("x", 5000)}
		for _, secret := range wrong {
			m := roomJoin(ts, wsDial{room: r.RoomID, resume: secret})
			if m.From == bob.From || m.From == ada.From || m.Resume == secret {
				t.Errorf("with %q joined as %s", secret, m.first)
			}
			m.end(websocket.StatusNormalClosure)
			ada.want(m.joined(), m.left(ada))
		}
		patch := func(body string) {
			t.Helper()
			roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, body, roomBearer(r.OwnerToken)))
		}
		patch(`{"password":"sesame"}`)
		refusal(ts, wsDial{room: r.RoomID, resume: wrong[0]}).want(t, http.StatusForbidden, "wrong_password", "")
		patch(`{"password":"","locked":true}`)
		refusal(ts, wsDial{room: r.RoomID, resume: wrong[0]}).want(t, http.StatusForbidden, "room_locked", "")
		patch(`{"locked":false,"maxPlayers":2}`)
		refusal(ts, wsDial{room: r.RoomID, resume: wrong[0]}).want(t, http.StatusConflict, "room_is_full", "")

		// A right one needs none of that.
		patch(`{"password":"sesame","locked":true}`)
		for _, password := range []string{"", "wrong"} {
			d := bob.again()
			d.password = password
			back := roomJoin(ts, d)
			if back.From != bob.From {
				t.Errorf("%s came back as %s", bob.first, back.first)
			}
			back.end(dropped)
		}
		roomGuesses(ts, 10)
	})
}

func TestRoomLeave(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=30s")
		r := ts.openRoom(`{"maxPlayers":2}`)
		ada := roomJoin(ts, wsDial{room: r.RoomID, name: "ada"})
		for how, forGood := range map[websocket.StatusCode]bool{
			websocket.StatusNormalClosure: true, websocket.StatusNoStatusRcvd: true,
			websocket.StatusGoingAway: false, websocket.StatusPolicyViolation: false, 3000: false, 4000: false, dropped: false,
		} {
			bob := roomJoin(ts, wsDial{room: r.RoomID, name: "bob"})
			ada.want(bob.joined())
			bob.end(how)
			if forGood {
				ada.want(bob.left(ada))
				anew := roomJoin(ts, bob.again()) // the secret went with the seat
				if anew.From == bob.From {
					t.Errorf("%d: %s came back as %s", how, bob.first, anew.first)
				}
				anew.end(websocket.StatusNormalClosure)
				ada.settled()
				continue
			}
			ada.want()
			refusal(ts, wsDial{room: r.RoomID}).want(t, http.StatusConflict, "room_is_full", "")
			time.Sleep(30 * time.Second)
			ada.want(bob.left(ada))
		}
	})
}

func TestRoomHost(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=30s")
		r, ada, bob, eve := roomOfThree(ts, "")
		ada.end(dropped)
		late := roomJoin(ts, wsDial{room: r.RoomID, name: "late"})
		if late.Host != ada.From {
			t.Errorf("the newcomer's host is %s, want who is away", late.Host)
		}
		if back := roomJoin(ts, ada.again()); back.Host != ada.From {
			t.Errorf("the host came back and is told of %s", back.Host)
		} else {
			back.end(dropped)
		}
		bob.want(late.joined())
		eve.end(websocket.StatusNormalClosure)
		bob.want(eve.left(ada))
		time.Sleep(30 * time.Second)
		bob.want(ada.left(bob))
		late.want(eve.left(ada), ada.left(bob))
		if again := roomJoin(ts, ada.again()); again.Host != bob.From {
			t.Errorf("who was the host once is told of %s", again.Host)
		}
		bob.end(websocket.StatusNormalClosure)
		if got := late.settled(); len(got) != 2 || got[1] != bob.left(late) {
			t.Errorf("received %q", got)
		}
	})
}

// roomSeen is what one client knows of its room from what it was told.
type roomSeen struct {
	*roomMember
	host  string
	peers []string
	away  bool
}

func (s *roomSeen) read(m *roomMember) {
	s.roomMember, s.host, s.peers, s.away = m, m.Host, nil, false
	for _, p := range m.Peers {
		s.peers = append(s.peers, p.ID)
	}
}

// Whoever comes, goes and returns, all who are connected know the same room.
func TestRoomIsTheSameForAll(t *testing.T) {
	for seed := range uint64(12) {
		inBubble(t, func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 1))
			ts := newSettledServer(t, "ROOMS=open", "RESUME_TTL=30s", "ROOM_EMPTY_TTL=12h")
			r := ts.openRoom(`{"maxPlayers":6}`)
			var room []*roomSeen // in the order they came
			for step := range 60 {
				i, there := random.IntN(7), (*roomSeen)(nil)
				if i < len(room) {
					there = room[i]
				}
				switch {
				case there == nil && len(room) < 6:
					m := &roomSeen{}
					m.read(roomJoin(ts, wsDial{room: r.RoomID, name: fmt.Sprint(step)}))
					room = append(room, m)
				case there == nil:
					time.Sleep(30 * time.Second)
					synctest.Wait()
					room = slices.DeleteFunc(room, func(m *roomSeen) bool { return m.away })
				case there.away:
					m := roomJoin(ts, there.again())
					if m.From != there.From {
						t.Fatalf("seed %d: %s came back as %s", seed, there.From, m.From)
					}
					there.read(m)
				case random.IntN(3) == 0:
					there.end(websocket.StatusNormalClosure)
					room = slices.Delete(room, i, i+1)
				case random.IntN(2) == 0:
					there.end(dropped)
					there.away = true
				default:
					there.read(roomJoin(ts, there.again()))
				}
				ids := make([]string, len(room))
				for i, m := range room {
					ids[i] = m.From
				}
				for _, m := range room {
					if m.away {
						continue
					}
					for _, text := range m.settled() {
						f := members(t, text)
						if from := f["from"].(string); f["type"] == "join" {
							m.peers = append(m.peers, from)
						} else {
							m.peers = slices.DeleteFunc(m.peers, func(id string) bool { return id == from })
							m.host = f["host"].(string)
						}
					}
					others := slices.DeleteFunc(slices.Clone(ids), func(id string) bool { return id == m.From })
					if m.host != ids[0] || !slices.Equal(m.peers, others) {
						t.Fatalf("seed %d, step %d: one knows of the host %s and %q, want %s and %q", seed, step, m.host, m.peers, ids[0], others)
					}
				}
				if got := roomGet(ts, r.RoomID).PlayerCount; got != len(room) {
					t.Fatalf("seed %d, step %d: %d players, want %d", seed, step, got, len(room))
				}
			}
		})
	}
}

// --- Guessing.

// Codes of rooms, passwords and codes to redeem are guessed on one budget.
func TestRoomGuesses(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "DEV=false", "ROOMS=open")
		open, secret := ts.openRoom(""), ts.openRoom(`{"password":"sesame"}`)
		code, _ := ts.mint()
		member := roomJoin(ts, wsDial{room: secret.Code, password: "sesame"})
		left := 10
		counts := func() {
			t.Helper()
			left--
			roomGuesses(ts, left)
		}
		for _, wrong := range []string{"AAAAAA", "AAAAAB", "no code"} {
			ts.call(http.MethodGet, "/api/rooms/"+strings.ReplaceAll(wrong, " ", "%20"), "").want(t, http.StatusNotFound, "room_not_found", "")
			counts()
		}
		refusal(ts, wsDial{room: "AAAAAC"}).want(t, http.StatusNotFound, "room_not_found", "")
		counts()
		soonClosed(ts.join(wsDial{room: "AAAAAD", v1: true})).wantClosed(closeUnknown, "room_not_found")
		counts()
		refusal(ts, wsDial{room: secret.RoomID, password: "open"}).want(t, http.StatusForbidden, "wrong_password", "")
		counts()
		soonClosed(ts.join(wsDial{room: secret.Code, password: "Open", v1: true})).wantClosed(closeForbidden, "wrong_password")
		counts()
		for _, wrong := range []string{"000000000", "00000000", "0000000"} { // there are none as long
			wantAnswer(t, redeemAt(ts, wrong), http.StatusGone, "gone")
			counts()
		}

		// None is left, for the right ones neither.
		const tooMany = "too_many_attempts"
		ts.call(http.MethodGet, "/api/rooms/"+open.Code, "").want(t, http.StatusTooManyRequests, tooMany, "too often")
		ts.call(http.MethodPatch, "/api/rooms/"+open.Code, "", roomBearer(open.OwnerToken)).want(t, http.StatusTooManyRequests, tooMany, "too often")
		ts.call(http.MethodDelete, "/api/rooms/"+open.Code, "", roomBearer(open.OwnerToken)).want(t, http.StatusTooManyRequests, tooMany, "too often")
		roomWantEach(ts, wsDial{room: open.Code}, http.StatusTooManyRequests, tooMany, closeTooMany)
		roomWantEach(ts, wsDial{room: secret.RoomID, password: "sesame"}, http.StatusTooManyRequests, tooMany, closeTooMany)
		wantAnswer(t, redeemAt(ts, code), http.StatusTooManyRequests, tooMany)
		wantSeries(t, ts, map[string]float64{"parley_redeem_throttled_total": 8})

		// What is no guess goes on.
		roomGet(ts, open.RoomID)
		roomGet(ts, secret.RoomID)
		ts.call(http.MethodGet, "/api/rooms/"+roomNobody, "").want(t, http.StatusNotFound, "room_not_found", "")
		roomJoin(ts, wsDial{room: open.RoomID})
		refusal(ts, wsDial{room: secret.RoomID}).want(t, http.StatusForbidden, "wrong_password", "")
		roomJoin(ts, member.again())
		roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+open.RoomID, "", roomBearer(open.OwnerToken)))
		roomGuesses(ts, 0)

		// Another address is another guesser.
		roomGet(callsFrom(ts, "192.0.2.2"), open.Code)
		waitTruly(t, func() httpAnswer { return ts.call(http.MethodGet, "/api/rooms/"+open.Code, "") }, http.StatusTooManyRequests, tooMany, time.Minute)
		roomGuesses(ts, 1)
	})
}

func TestRoomGuessesThatCount(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "DEV=false", "ROOMS=open", "REDEEM_FAILS=5", "ROOM_TTL=1h")
		open, secret, short := ts.openRoom(""), ts.openRoom(`{"password":"sesame","maxPlayers":2}`), ts.openRoom(`{"ttl":1}`)
		locked, third := ts.openRoom(`{"password":"sesame","locked":true}`), ts.openRoom(`{"password":"sesame"}`)

		// The right ones, and what is not asked for, never do.
		for i := range 8 {
			roomGet(ts, open.Code)
			roomJoin(ts, wsDial{room: open.Code, password: "not asked for"}).end(websocket.StatusNormalClosure)
			for _, id := range []string{uuid.NewString(), roomNobody} {
				ts.call(http.MethodGet, "/api/rooms/"+id, "").want(t, http.StatusNotFound, "room_not_found", "")
				refusal(ts, wsDial{room: id, password: fmt.Sprint(i)}).want(t, http.StatusNotFound, "room_not_found", "")
			}
			refusal(ts, wsDial{room: secret.Code}).want(t, http.StatusForbidden, "wrong_password", "")
			refusal(ts, wsDial{room: open.Code, name: "\n"}).want(t, http.StatusBadRequest, "bad_display_name", "")
			ts.call(http.MethodPatch, "/api/rooms/"+open.RoomID, "", roomBearer(fmt.Sprint(i))).want(t, http.StatusForbidden, "not_creator", "")
			ts.call(http.MethodGet, "/ws/signal/"+fmt.Sprint(i), "").want(t, http.StatusUpgradeRequired, "upgrade_required", "")
		}
		ada := roomJoin(ts, wsDial{room: secret.Code, password: "sesame"})
		roomJoin(ts, wsDial{room: secret.RoomID, password: "sesame"})
		for _, password := range []string{"sesame", "wrong"} { // neither is tried
			refusal(ts, wsDial{room: secret.RoomID, password: password}).want(t, http.StatusConflict, "room_is_full", "")
			refusal(ts, wsDial{room: locked.RoomID, password: password}).want(t, http.StatusForbidden, "room_locked", "")
		}
		roomJoin(ts, wsDial{room: secret.RoomID, password: "wrong", resume: ada.Resume}).end(dropped)
		roomGuesses(ts, 5)

		// One that is wrong counts once, in whatever case and by whatever call.
		for range 4 {
			for _, code := range []string{"AbCdEf", "ABCDEF", "abcdef"} {
				ts.call(http.MethodGet, "/api/rooms/"+code, "").want(t, http.StatusNotFound, "room_not_found", "")
				refusal(ts, wsDial{room: code}).want(t, http.StatusNotFound, "room_not_found", "")
				ts.call(http.MethodDelete, "/api/rooms/"+code, "", roomBearer("x")).want(t, http.StatusNotFound, "room_not_found", "")
			}
		}
		roomGuesses(ts, 4)
		roomJoin(ts, ada.again()).end(websocket.StatusNormalClosure)
		for range 2 {
			refusal(ts, wsDial{room: secret.RoomID, password: "wrong"}).want(t, http.StatusForbidden, "wrong_password", "")
			refusal(ts, wsDial{room: secret.Code, password: "wrong"}).want(t, http.StatusForbidden, "wrong_password", "")
		}
		roomGuesses(ts, 3)
		refusal(ts, wsDial{room: third.RoomID, password: "wrong"}).want(t, http.StatusForbidden, "wrong_password", "") // of another room
		roomGuesses(ts, 2)

		// A client that polls the code of a room that has ended is not a guesser.
		pass(time.Second)
		for range 10 {
			ts.call(http.MethodGet, "/api/rooms/"+short.Code, "").want(t, http.StatusNotFound, "room_not_found", "")
		}
		roomGuesses(ts, 1)
		// Nor does it matter by which call one guesses.
		ts.call(http.MethodPatch, "/api/rooms/ZZZZZZ", "", roomBearer("x")).want(t, http.StatusNotFound, "room_not_found", "")
		roomGuesses(ts, 0)
	})
}

// --- Slow members.

func TestRoomSlowMember(t *testing.T) {
	for _, directed := range []bool{false, true} {
		inBubble(t, func(t *testing.T) {
			v := inMemory(t, "ROOMS=open")
			r := v.openRoom("")
			ada := roomJoin(v.testServer, wsDial{room: r.RoomID, name: "ada"})
			slow := v.raw(t, wsDial{room: r.RoomID, name: "slow"})
			text, err := slow.text()
			if err != nil {
				t.Fatal(err)
			}
			first := members(t, text)
			eve := roomJoin(v.testServer, wsDial{room: r.RoomID, name: "eve"})
			ada.settled()

			// 3 MiB, while 2 MiB may wait.
			const n = 192
			id, to := first["from"].(string), ""
			if directed {
				to = `,"to":"` + id + `"`
			}
			var sent, got []string
			for i := range n {
				payload := fmt.Sprintf(`"%d %s"`, i, strings.Repeat("x", 16<<10))
				ada.sendf(`{"type":"offer"%s,"payload":%s}`, to, payload)
				sent = append(sent, fmt.Sprintf(`{"type":"offer","from":"%s","roomId":"%s"%s,"payload":%s}`, ada.From, r.RoomID, to, payload))
				if i%16 == 0 { // so that only the slow one falls behind
					got = append(got, ada.settled()...)
				}
			}
			ada.send(`{"type":"ping"}`)
			got = append(got, ada.settled()...)
			if directed { // once it is away, only so much waits for it
				if len(got) == 0 || got[len(got)-1] != `{"type":"pong"}` {
					t.Errorf("received %.200q", got)
				}
				eve.want()
			} else {
				if !slices.Contains(got, `{"type":"pong"}`) {
					t.Errorf("received %.200q", got)
				}
				if got := eve.settled(); !slices.Equal(got, sent) {
					t.Errorf("the other received %d frames, want all %d", len(got), n)
				}
			}
			for _, text := range got[:len(got)-1] {
				if !strings.HasPrefix(text, `{"type":"error","code":"peer_absent"`) {
					t.Errorf("received %.200s", text)
				}
			}
			if code := slow.closed(); code != closeSlow {
				t.Errorf("the slow one is closed with %d", code)
			}
			pass(2 * closeGrace)
			wantSeries(t, v.testServer, map[string]float64{
				`parley_ws_closes_total{code="4408"}`: 1, "parley_rooms_active": 1, "parley_ws_connections": 2, `parley_resumes_total{result="resumed"}`: 0,
			})
			if got := roomGet(v.testServer, r.RoomID).PlayerCount; got != 3 {
				t.Errorf("%d in the room, want 3", got)
			}
			ada.want() // it may be back

			back := roomJoin(v.testServer, wsDial{room: r.RoomID, resume: first["resume"].(string)})
			if back.From != id {
				t.Errorf("%s came back as %s", id, back.From)
			}
			waited := back.settled()
			at := -1
			if len(waited) > 0 {
				at = slices.Index(sent, waited[0])
			}
			// Relay is at most once: what was on its way to the socket is gone.
			if at < 0 || len(waited) < 120 || at+len(waited) > n || !slices.Equal(waited, sent[at:at+len(waited)]) {
				t.Errorf("%d frames waited, from %d on", len(waited), at)
			}
			ada.sendf(`{"type":"answer","to":%q,"payload":1}`, id)
			back.want(ada.signalTo(back, "answer", "1"))
			wantSeries(t, v.testServer, map[string]float64{`parley_resumes_total{result="resumed"}`: 1, "parley_mailbox_bytes": 0})
		})
	}
}

// One whose socket takes nothing for 10 s is out, too, alone.
func TestRoomStalledMember(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		v := inMemory(t, "ROOMS=open")
		r := v.openRoom("")
		ada := roomJoin(v.testServer, wsDial{room: r.RoomID})
		slow := v.raw(t, wsDial{room: r.RoomID})
		text, err := slow.text()
		if err != nil {
			t.Fatal(err)
		}
		eve := roomJoin(v.testServer, wsDial{room: r.RoomID})
		ada.settled()
		for range 10 {
			ada.sendf(`{"type":"offer","payload":"%s"}`, strings.Repeat("x", 16<<10))
		}
		time.Sleep(stallTimeout - time.Millisecond)
		if got := eve.settled(); len(got) != 10 {
			t.Errorf("the other received %d frames", len(got))
		}
		wantSeries(t, v.testServer, map[string]float64{"parley_ws_connections": 3})
		time.Sleep(2 * time.Millisecond)
		synctest.Wait()
		wantSeries(t, v.testServer, map[string]float64{`parley_ws_closes_total{code="4408"}`: 1, "parley_ws_connections": 2})
		first := members(t, text)
		if back := roomJoin(v.testServer, wsDial{room: r.RoomID, resume: first["resume"].(string)}); back.From != first["from"] {
			t.Errorf("%s came back as %s", first["from"], back.From)
		}
		ada.want()
		eve.want()
	})
}

// --- Secrets.

func TestRoomSecretsAreNotLogged(t *testing.T) {
	const password, wrong, sdp = "sesame-4711", "wrong-4711", "v=0-sdp-4711"
	inBubble(t, func(t *testing.T) {
		secrets := []string{password, wrong, sdp, testSecret}
		var logs []string
		for _, settings := range [][]string{{"ROOMS=open"}, {"JWT_SECRET=" + testSecret}} {
			ts := newSettledServer(t, append(settings, "DEV=false", "LOG_LEVEL=debug")...)
			forwarded := "X-Forwarded-For: 192.0.2.1"
			jwt := tokenFor(t, "ada")
			r := ts.openRoom(`{"password":"`+password+`"}`, roomBearer(jwt), forwarded)
			token := r.OwnerToken
			if token == "" {
				token = jwt
			}
			ada := roomJoin(ts, wsDial{room: r.Code, name: "ada", password: password})
			bob := roomJoin(ts, wsDial{room: r.RoomID, name: "bob", password: password, v1: true})
			secrets = append(secrets, jwt, token, r.Code, strings.ToLower(r.Code), ada.Resume, bob.Resume)
			bob.end(dropped)
			bob = roomJoin(ts, bob.again())
			bob = roomJoin(ts, bob.again()) // takes over
			for range 8 {
				ts.dial(bob.again())
			}
			ada.sendf(`{"type":"offer","payload":%q}`, sdp)
			ada.sendf(`{"type":%q,"payload":1}`, sdp)
			ada.sendf(`{"type":"offer","to":%q,"payload":1}`, sdp)
			for _, name := range []string{r.Code, strings.ToLower(r.Code), r.RoomID, "/" + r.Code, r.Code + "/" + r.Code} {
				for _, method := range []string{"GET", "PUT", "POST", "PATCH"} {
					ts.call(method, "/api/rooms/"+name+"?password="+password, `{"password":"`+wrong+`"`, roomBearer(token), forwarded, "Origin: https://"+wrong+".example")
					ts.call(method, "/api/rooms/"+name+"?password="+password, `{"password":5,"x":"`+wrong+`"}`, roomBearer(token), forwarded)
					ts.call(method, "/ws/signal/"+name+"?resume="+ada.Resume+"&password="+password+"&%zz", "", roomBearer(jwt), forwarded)
				}
			}
			for range 12 {
				ts.dial(wsDial{room: r.Code, password: wrong, v1: true})
				ts.dial(wsDial{room: wrong, password: wrong})
				ts.call("DELETE", "/api/rooms/"+r.Code, "", roomBearer(wrong))
			}
			ada.sendFrame(gotFrame{text: sdp + "\xff"})
			ts.call("DELETE", "/api/rooms/"+r.RoomID, "", roomBearer(token)).want(t, http.StatusOK, "", "")
			synctest.Wait()
			ts.stop()
			logs = append(logs, ts.log.String())
		}
		for _, log := range logs {
			if !strings.Contains(log, "TRUSTED_PROXIES") {
				t.Errorf("the log has nothing of what should be in it:\n%s", log)
			}
			for _, secret := range secrets {
				if strings.Contains(log, secret) {
					t.Errorf("%q is in the log:\n%s", secret, log)
				}
			}
		}
	})
}

// A secret is told to whom it belongs, and nobody else.
func TestRoomSecretsAreNotTold(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom(`{"password":"sesame"}`)
		ada := roomJoin(ts, wsDial{room: r.RoomID, password: "sesame"})
		bob := roomJoin(ts, wsDial{room: r.RoomID, password: "sesame"})
		bob.send(`{"type":"offer","payload":1}`)
		seen := strings.Join(append(ada.settled(), bob.first, ts.call(http.MethodGet, "/api/rooms/"+r.RoomID, "").text), "\n")
		bob.end(websocket.StatusNormalClosure)
		seen += strings.Join(ada.settled(), "\n")
		for _, secret := range []string{"sesame", ada.Resume, r.OwnerToken} {
			if strings.Contains(seen, secret) {
				t.Errorf("%q is in\n%s", secret, seen)
			}
		}
		if strings.Count(seen, bob.Resume) != 1 {
			t.Errorf("the secret of one is told to others:\n%s", seen)
		}
	})
}

// --- Passwords.

func TestRoomPasswordHash(t *testing.T) {
	p := newPasswords()
	ctx := t.Context()
	for _, password := range []string{"sesame", " ", "Größe 😀", strings.Repeat("x", 128)} {
		h, err := p.hash(ctx, password)
		if err != nil || h == (passwordHash{}) {
			t.Fatalf("%q: %v", password, err)
		}
		again, err := p.hash(ctx, password)
		if err != nil || again.salt == h.salt || again.key == h.key {
			t.Errorf("%q is hashed alike twice; %v", password, err)
		}
		for guess, want := range map[string]bool{password: true, password + " ": false, password[1:]: false, strings.ToUpper(password) + "!": false, "": false} {
			if got, err := p.matches(ctx, h, guess); err != nil || got != want {
				t.Errorf("%q for %q: %v, %v", guess, password, got, err)
			}
		}
		crossed := passwordHash{salt: again.salt, key: h.key}
		if got, err := p.matches(ctx, crossed, password); err != nil || got {
			t.Errorf("%q matches with another salt; %v", password, err)
		}
	}
}

// Whoever finds all processors busy waits, until its context is done.
func TestRoomPasswordTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newPasswords()
		if cap(p.turns) != runtime.GOMAXPROCS(0) {
			t.Errorf("%d at once, want %d", cap(p.turns), runtime.GOMAXPROCS(0))
		}
		h, err := p.hash(t.Context(), "sesame")
		if err != nil || len(p.turns) != 0 {
			t.Fatalf("%v; %d turns are taken", err, len(p.turns))
		}
		for range cap(p.turns) {
			p.turns <- struct{}{}
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := p.hash(ctx, "sesame"); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("hash: %v", err)
		}
		if ok, err := p.matches(ctx, h, "sesame"); !errors.Is(err, context.DeadlineExceeded) || ok {
			t.Errorf("matches: %v, %v", ok, err)
		}
		done := make(chan bool, 3)
		for range cap(done) {
			go func() {
				ok, err := p.matches(t.Context(), h, "sesame")
				done <- ok && err == nil
			}()
		}
		pass(time.Hour)
		if n := len(done); n != 0 {
			t.Errorf("%d did not wait", n)
		}
		<-p.turns // one turn is free, for one after the other
		synctest.Wait()
		if n := len(done); n != cap(done) {
			t.Errorf("%d of %d had their turn", n, cap(done))
		}
		for range len(done) {
			if !<-done {
				t.Error("the right password does not match")
			}
		}
		if n := len(p.turns); n != cap(p.turns)-1 {
			t.Errorf("%d turns are taken", n)
		}
	})
}

// Over the wire: a client that gives up while it waits for its turn is no guesser.
func TestRoomPasswordGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		r := ts.openRoom(`{"password":"sesame"}`)
		for range cap(ts.passwords.turns) {
			ts.passwords.turns <- struct{}{}
		}
		conn, err := ts.net.dial()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := conn.Write([]byte(upgradeRequest(wsDial{room: r.RoomID, password: "wrong"}))); err != nil {
			t.Fatal(err)
		}
		synctest.Wait()
		roomGuesses(ts, 9) // it is being answered
		conn.Close()
		synctest.Wait()
		roomGuesses(ts, 10)
		if n := ts.clients.count(); n != 0 {
			t.Errorf("%d connections are counted", n)
		}
		<-ts.passwords.turns
		roomJoin(ts, wsDial{room: r.RoomID, password: "sesame"})
	})
}

// Nobody waits for a hash where the answer is known without one.
func TestRoomPasswordNotHashed(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "DEV=false", "MAX_CODES_PER_IP=4")
		r, locked := ts.openRoom(`{"password":"sesame"}`), ts.openRoom(`{"password":"sesame","locked":true}`)
		full := ts.openRoom(`{"password":"sesame","maxPlayers":2}`)
		roomJoin(ts, wsDial{room: full.RoomID, password: "sesame"})
		roomJoin(ts, wsDial{room: full.RoomID, password: "sesame"})
		refusal(ts, wsDial{room: r.RoomID, password: "changed"}).want(t, http.StatusForbidden, "wrong_password", "")
		ts.openRoom("")
		roomGuesses(ts, 9)

		for range cap(ts.passwords.turns) {
			ts.passwords.turns <- struct{}{}
		}
		for range 20 {
			roomWantEach(ts, wsDial{room: r.RoomID, password: "changed"}, http.StatusForbidden, "wrong_password", closeForbidden)
		}
		roomWantEach(ts, wsDial{room: locked.RoomID, password: "sesame"}, http.StatusForbidden, "room_locked", closeForbidden)
		roomWantEach(ts, wsDial{room: full.RoomID, password: "sesame"}, http.StatusConflict, "room_is_full", closeRoomFull)
		ts.post("/api/rooms", `{"password":"sesame"}`).want(t, http.StatusTooManyRequests, "too_many_codes", "")
		roomGuesses(ts, 9)
		ts.draining.Store(true)
		ts.post("/api/rooms", `{"password":"sesame"}`).want(t, http.StatusServiceUnavailable, "draining", "")
		ts.draining.Store(false)
		for range cap(ts.passwords.turns) {
			<-ts.passwords.turns
		}

		// What was wrong is right once the password is changed to it.
		roomParse(t, ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, `{"password":"changed"}`, roomBearer(r.OwnerToken)))
		roomJoin(ts, wsDial{room: r.RoomID, password: "changed"})
		refusal(ts, wsDial{room: r.RoomID, password: "sesame"}).want(t, http.StatusForbidden, "wrong_password", "")
		roomGuesses(ts, 8)
	})
}

// A caller that gives up while the password is hashed leaves no room behind.
func TestRoomPasswordOpenGivenUp(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		for range cap(ts.passwords.turns) {
			ts.passwords.turns <- struct{}{}
		}
		conn, err := ts.net.dial()
		if err != nil {
			t.Fatal(err)
		}
		const body = `{"password":"sesame"}`
		fmt.Fprintf(conn, "POST /api/rooms HTTP/1.1\r\nHost: parley.test\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
		synctest.Wait()
		if n := ts.memory.rooms.Load(); n != 1 {
			t.Errorf("%d rooms while the password waits to be hashed, want 1", n)
		}
		conn.Close()
		synctest.Wait()
		if n := ts.memory.rooms.Load(); n != 0 {
			t.Errorf("%d rooms, want none", n)
		}
		for range cap(ts.passwords.turns) {
			<-ts.passwords.turns
		}
	})
}

// One address makes the server hash hashesPerMinute passwords, and a /48 siteShare
// times as many, right or wrong.
func TestRoomPasswordsByAddress(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "DEV=false", "RATE_EXEMPT=192.0.2.7")
		spend := func(n network, times int) {
			for range times {
				ts.limits.hashes.allow(n)
			}
		}
		r := ts.openRoom(`{"password":"sesame"}`)
		open := func(from string) func() httpAnswer {
			return func() httpAnswer { return callsFrom(ts, from).post("/api/rooms", `{"password":"sesame"}`) }
		}
		join := wsDial{room: r.RoomID, password: "sesame"}
		change := func() httpAnswer {
			return ts.call(http.MethodPatch, "/api/rooms/"+r.RoomID, `{"password":"sesame"}`, roomBearer(r.OwnerToken))
		}
		here := networkOf(netip.MustParseAddr("127.0.0.1"))
		spend(here, hashesPerMinute-1)
		const tooMany = "rate_limited"
		roomWantEach(ts, join, http.StatusTooManyRequests, tooMany, closeTooMany)
		open("127.0.0.1")().want(t, http.StatusTooManyRequests, tooMany, "")
		waitTruly(t, change, http.StatusTooManyRequests, tooMany, time.Second)
		spend(here, 1) // of two a second
		change().want(t, http.StatusTooManyRequests, tooMany, "")
		roomGuesses(ts, 10)
		wantSeries(t, ts, map[string]float64{`parley_rooms_active`: 1, `parley_rate_limited_total{route="rooms"}`: 4, `parley_rate_limited_total{route="signal"}`: 2})

		// What needs no hash goes on, and so do others.
		ts.openRoom("")
		refusal(ts, wsDial{room: r.RoomID}).want(t, http.StatusForbidden, "wrong_password", "")
		for _, from := range []string{"192.0.2.2", "192.0.2.7"} {
			open(from)().want(t, http.StatusCreated, "", "")
		}
		spend(network{}, 10*hashesPerMinute)

		for i := range siteShare * hashesPerMinute {
			spend(networkOf(netip.AddrFrom16([16]byte{0x20, 0x01, 0x0d, 0xb8, 7: byte(i % 100)})), 1)
		}
		open("2001:db8:0:ff::1")().want(t, http.StatusTooManyRequests, tooMany, "")
		open("2001:db8:1::1")().want(t, http.StatusCreated, "", "")
	})
}
