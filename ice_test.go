package main

import (
	"bytes"
	"crypto/md5"
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"parley/test/testkit"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/pion/turn/v5"
)

const (
	testSTUN = "STUN_URLS=stun:stun.example"
	testTURN = "TURN_URLS=turn:turn.example:3478?transport=udp,turns:turn.example?transport=tcp"
)

// iceServers returns the servers that a JSON text names.
func (ts *testServer) iceServers(text string) []iceServer {
	ts.t.Helper()
	var s iceServers
	if err := json.Unmarshal([]byte(text), &s); err != nil {
		ts.t.Fatalf("%v: %s", err, text)
	}
	return s.Servers
}

// The password is HMAC-SHA1, RFC 2202 test case 2, in base64.
func TestTURNPasswordVector(t *testing.T) {
	// effcdf6ae5eb2fa2d27416d5f184df9c259a7c79
	if got, want := turnPassword("Jefe", "what do ya want for nothing?"), "7/zfauXrL6LSdBbV8YTfnCWafHk="; got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}

// Another implementation of the convention takes the credential, until it expires.
func TestTURNCredentialConvention(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		d := newICEDirectory(mustLoad(t, nil, testTURN, "TURN_SECRET=s3cret", "TURN_TTL=1m"), newMetrics(), nil)
		id := uuid.New()
		s := d.servers(id, network{}, "").Servers[0]
		if !regexp.MustCompile(`^\d{10}:[0-9a-f]{16}$`).MatchString(s.Username) || strings.Contains(s.Username, id.String()[:8]) {
			t.Errorf("user %q", s.Username)
		}
		handler := turn.LongTermTURNRESTAuthHandler("s3cret", nil)
		key := md5.Sum([]byte(s.Username + ":realm:" + s.Credential)) // RFC 8489 section 9.2.2
		accepted := func(username string) bool {
			_, got, ok := handler(&turn.RequestAttributes{Username: username, Realm: "realm"})
			return ok && slices.Equal(got, key[:])
		}
		if !accepted(s.Username) {
			t.Error("refused")
		}
		if forged := "9" + s.Username[1:]; accepted(forged) {
			t.Error("a later expiry goes with the same password")
		}
		pass(time.Minute + time.Second)
		if accepted(s.Username) {
			t.Error("accepted after it has expired")
		}
	})
}

// Wherever servers are named, they are named in the shape that browsers take.
func TestICEServersEverywhere(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testSTUN, testTURN, "TURN_SECRET=s", "ROOMS=open", "TURN_TTL=10m")
		exactly := regexp.MustCompile(`"iceServers":\[\{"urls":\["stun:stun\.example"\]\},` +
			`\{"urls":\["turn:turn\.example:3478\?transport=udp","turns:turn\.example\?transport=tcp"\],"username":"\d+:[0-9a-f]{16}","credential":"[A-Za-z0-9+/]{27}="\}\]`)
		users := map[string]bool{}
		check := func(what, text string) {
			t.Helper()
			if !exactly.MatchString(text) || strings.Contains(text, "throttled") {
				t.Errorf("%s: %s", what, text)
				return
			}
			_, user, _ := strings.Cut(ts.iceServers(text)[1].Username, ":")
			users[user] = true
		}
		minted := ts.post("/rendezvous/code", "")
		check("mint", minted.text)
		check("redeem", ts.post("/rendezvous/redeem", `{"code":"`+minted.Code+`"}`).text)
		a := ts.call(http.MethodGet, "/ice-servers?appID="+minted.AppID, "")
		check("GET", a.text)
		if !strings.HasSuffix(a.text, `],"ttl":600}`+"\n") {
			t.Errorf("GET: %s", a.text)
		}
		v1 := ts.join(wsDial{appID: minted.AppID, side: "A", v1: true})
		check("welcome", v1.settled()[0])
		v1.send(`{"type":"ice_servers"}`)
		answer := v1.settled()[0]
		check("frame", answer)
		if !strings.HasPrefix(answer, `{"type":"ice_servers","iceServers":[`) || !strings.HasSuffix(answer, `],"ttl":600}`) {
			t.Errorf("frame: %s", answer)
		}
		if len(users) != 1 {
			t.Errorf("one session has the users %v", users)
		}
		old := ts.join(wsDial{appID: minted.AppID, side: "B"})
		old.want(frameRoomFull)
		old.send(`{"type":"ice_servers"}`)
		check("frame, to an old client", old.settled()[0])

		room := ts.openRoom("")
		c := ts.join(wsDial{room: room.Code})
		check("join", c.settled()[0])
		c.send(`{"type":"ice_servers"}`)
		check("frame in a room", c.settled()[0])
		check("GET of a room", ts.call(http.MethodGet, "/ice-servers?appID="+room.RoomID, "").text)
		if len(users) != 2 {
			t.Errorf("two sessions have the users %v", users)
		}
	})
}

// Without any configured, nobody is told of any, and who asks gets an empty list.
func TestNoICEServers(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "ROOMS=open")
		minted := ts.post("/rendezvous/code", "")
		a := ts.join(wsDial{appID: minted.AppID, side: "A", v1: true})
		room := ts.join(wsDial{room: ts.openRoom("").Code})
		for what, text := range map[string]string{
			"mint": minted.text, "redeem": ts.post("/rendezvous/redeem", `{"code":"`+minted.Code+`"}`).text,
			"welcome": a.settled()[0], "join": room.settled()[0],
		} {
			if strings.Contains(text, "iceServers") || strings.Contains(text, "throttled") {
				t.Errorf("%s: %s", what, text)
			}
		}
		if got := ts.call(http.MethodGet, "/ice-servers?appID="+minted.AppID, "").text; got != `{"iceServers":[],"ttl":3600}`+"\n" {
			t.Error(got)
		}
		a.send(`{"type":"ice_servers"}`)
		a.want(`{"type":"ice_servers","iceServers":[],"ttl":3600}`)
	})
}

func TestGetICEServersErrors(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testSTUN)
		_, appID := ts.mint()
		for query, want := range map[string]string{
			"":                           "bad_app_id",
			"?appID=1234":                "bad_app_id",
			"?appID=" + uuid.NewString(): "unknown_session",
		} {
			if a := ts.call(http.MethodGet, "/ice-servers"+query, ""); a.Code != want || a.status >= 500 || a.status < 400 {
				t.Errorf("%q: %d %s, want %s", query, a.status, a.text, want)
			}
		}
		if a := ts.call(http.MethodPost, "/ice-servers?appID="+appID, ""); a.status != http.StatusMethodNotAllowed {
			t.Errorf("POST: %d", a.status)
		}
		pass(ts.cfg.roomTTL)
		if a := ts.call(http.MethodGet, "/ice-servers?appID="+appID, ""); a.status != http.StatusNotFound {
			t.Errorf("after the session: %d %s", a.status, a.text)
		}
	})
}

// useUpRelay waits until no session has credentials that live, and lets others
// than those of before have all that 127.0.0.1 may.
func (ts *testServer) useUpRelay() {
	ts.t.Helper()
	pass(ts.cfg.turnTTL)
	for range maxRelayedSessions {
		ts.mint()
	}
}

// Two devices behind one address pair thirty times within TURN_TTL, each with
// everything that a client asks: a session counts once.
func TestTURNSessionCountsOnce(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testTURN, "TURN_SECRET=s", "TURN_TTL=1h", "ROOMS=open")
		relayed := func(what, text string) {
			t.Helper()
			if len(ts.iceServers(text)) != 1 || strings.Contains(text, "throttled") {
				t.Fatalf("%s: %s", what, text)
			}
		}
		var appIDs []string
		for range maxRelayedSessions - 1 {
			minted := ts.post("/rendezvous/code", "")
			relayed("mint", minted.text)
			relayed("redeem", ts.post("/rendezvous/redeem", `{"code":"`+minted.Code+`"}`).text)
			for _, side := range []string{"A", "B"} {
				c := ts.join(wsDial{appID: minted.AppID, side: side, v1: true})
				relayed("welcome", c.settled()[0])
				c.send(`{"type":"ice_servers"}`)
				for _, text := range c.settled() {
					if strings.Contains(text, "ice_servers") {
						relayed("frame", text)
					}
				}
			}
			appIDs = append(appIDs, minted.AppID)
		}
		room := ts.openRoom("")
		for range 8 {
			relayed("join", ts.join(wsDial{room: room.Code}).settled()[0])
		}
		for _, appID := range append(appIDs, room.RoomID) { // who has a place keeps it
			relayed("GET", ts.call(http.MethodGet, "/ice-servers?appID="+appID, "").text)
		}
		if text := ts.post("/rendezvous/code", "").text; len(ts.iceServers(text)) != 0 || !strings.Contains(text, `"throttled":true`) {
			t.Errorf("session %d: %s", maxRelayedSessions+1, text)
		}
	})
}

// One address gets credentials for 30 sessions, wherever it asks; for any other
// servers come without TURN, and it is told so, until a session's last credential
// has expired.
func TestTURNThrottled(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testSTUN, testTURN, "TURN_SECRET=s", "TURN_TTL=10m", "ROOM_TTL=1h", "RATE_EXEMPT=10.9.9.9", "ROOMS=open")
		ask := func(appID string) string { return ts.call(http.MethodGet, "/ice-servers?appID="+appID, "").text }
		_, first := ts.mint()
		for i := 2; i <= maxRelayedSessions; i++ {
			if i == 20 {
				pass(time.Minute)
			}
			if text := ts.post("/rendezvous/code", "").text; len(ts.iceServers(text)) != 2 || strings.Contains(text, "throttled") {
				t.Fatalf("session %d: %s", i, text)
			}
		}
		if text := ask(first); len(ts.iceServers(text)) != 2 { // its place is now held a minute longer
			t.Errorf("a session with a place: %s", text)
		}
		const without = `"iceServers":[{"urls":["stun:stun.example"]}],"throttled":true`
		throttled := func(what, text string) {
			t.Helper()
			if !strings.Contains(text, without) || strings.Contains(text, "credential") {
				t.Errorf("%s: %s", what, text)
			}
		}
		minted := ts.post("/rendezvous/code", "")
		throttled("mint", minted.text)
		throttled("redeem", ts.post("/rendezvous/redeem", `{"code":"`+minted.Code+`"}`).text)
		throttled("GET", ask(minted.AppID))
		a := ts.join(wsDial{appID: minted.AppID, side: "A", v1: true})
		throttled("welcome", a.settled()[0])
		a.send(`{"type":"ice_servers"}`)
		throttled("frame", a.settled()[0])
		throttled("join", ts.join(wsDial{room: ts.openRoom("").Code}).settled()[0])
		wantSeries(t, ts, map[string]float64{
			`parley_turn_credentials_total{result="issued"}`:    maxRelayedSessions + 1,
			`parley_turn_credentials_total{result="throttled"}`: 6,
		})

		// sessions mints until one comes without TURN, and returns how many came with.
		sessions := func() (n int) {
			for n < 40 && len(ts.iceServers(ts.post("/rendezvous/code", "").text)) == 2 {
				n++
			}
			return n
		}
		for from, want := range map[string]int{"10.0.0.2": maxRelayedSessions, "10.9.9.9": 40} {
			ts.http = ts.clientFrom(from)
			if n := sessions(); n != want {
				t.Errorf("%s got credentials for %d sessions, want %d", from, n, want)
			}
			ts.http.CloseIdleConnections()
		}
		ts.http = ts.clientFrom("127.0.0.1")
		pass(9 * time.Minute) // of the first 19 all but the one that asked again are over
		if n := sessions(); n != 18 {
			t.Errorf("%d sessions have room after 18 are over", n)
		}
	})
}

// The whole /64 shares one allowance, and a /48 eight times that; the tables of
// them stay small.
func TestTURNQuotaByNetwork(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testTURN, "TURN_SECRET=s")
		got := 0
		for i := range 40 {
			ts.http = ts.clientFrom(fmt.Sprintf("2001:db8::%x", i+1))
			got += len(ts.iceServers(ts.post("/rendezvous/code", "").text))
			ts.http.CloseIdleConnections()
		}
		if got != maxRelayedSessions {
			t.Errorf("a /64 got credentials for %d sessions", got)
		}
		for i := range 400 {
			ts.http = ts.clientFrom(fmt.Sprintf("2001:db8:0:%x::1", i+1))
			got += len(ts.iceServers(ts.post("/rendezvous/code", "").text))
			ts.http.CloseIdleConnections()
		}
		if got != siteShare*maxRelayedSessions {
			t.Errorf("a /48 got credentials for %d sessions", got)
		}
		ts.http = ts.clientFrom("2001:db8:1::1")
		if text := ts.post("/rendezvous/code", "").text; len(ts.iceServers(text)) != 1 {
			t.Errorf("another /48: %s", text)
		}
		if ts.ice.quota.networks.max != maxAddresses || ts.ice.quota.sites.max > maxAddresses {
			t.Error("a table is not bounded as the others are")
		}
	})
}

// A session that outlives its credentials gets new ones on its socket.
func TestTURNRefresh(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, testTURN, "TURN_SECRET=s", "TURN_TTL=1m")
		_, appID := ts.mint()
		a := ts.join(wsDial{appID: appID, side: "A", v1: true})
		first := ts.iceServers(a.settled()[0])[0]
		pass(2 * time.Minute)
		a.send(`{"type":"ice_servers"}`)
		next := ts.iceServers(a.settled()[0])[0]
		if expires, _, _ := strings.Cut(next.Username, ":"); next.Username == first.Username || expires != fmt.Sprint(time.Now().Add(time.Minute).Unix()) {
			t.Errorf("first %s, then %s", first.Username, next.Username)
		}
		a.leave(websocket.StatusNormalClosure)
	})
}

// A server for others that names no STUN or TURN server connects nobody across
// NATs, and says what to set. Without TURN many do connect: an operator's choice,
// which parley check has a note for.
func TestNoICEWarning(t *testing.T) {
	for env, want := range map[string]bool{
		"DEV=false":                           true,
		"DEV=false HOST=127.0.0.1":            true, // behind a proxy
		"DEV=false " + testSTUN:               false,
		"DEV=false STUN_URLS=":                true,
		"HOST=127.0.0.1":                      false,
		"DEV=false TURN_SECRET=s " + testTURN: false,
	} {
		got := mustLoad(t, nil, strings.Fields(env)...).warnings()
		if want != (len(got) == 1) {
			t.Errorf("%q: got %q", env, got)
		}
		if want && !(strings.Contains(got[0], "STUN_URLS") && strings.Contains(got[0], "TURN_URLS") && strings.Contains(got[0], "TURN_SECRET")) {
			t.Errorf("%q: %q does not say what to set", env, got)
		}
	}
}

// An open relay is warned of, and no secret of it is logged.
func TestTURNWarning(t *testing.T) {
	const secret = "not-for-the-log"
	for _, tc := range []struct {
		settings []string
		want     bool
	}{
		{[]string{"HOST=0.0.0.0"}, true},
		{[]string{"HOST=127.0.0.1"}, false},
		{[]string{"HOST=0.0.0.0", "DEV=false"}, false},
	} {
		c := mustLoad(t, nil, append(tc.settings, testTURN, "TURN_SECRET="+secret+",other")...)
		if got := strings.Contains(strings.Join(c.warnings(), "\n"), "open relay"); got != tc.want {
			t.Errorf("%q: %q", tc.settings, c.warnings())
		}
		for _, a := range c.logAttrs() {
			if strings.Contains(a.Value.String(), secret) || strings.Contains(a.Value.String(), "other") {
				t.Errorf("%v is logged", a)
			}
		}
	}
}

// What the credentials are for, with coturn as the TURN server.

const coturnSecret = "shared with coturn"

// A public server that names an ICE server with a private address names none,
// also where parley check itself can reach it, as on the server's own machine.
func TestCheckPrivateICEServer(t *testing.T) {
	addr := testkit.StartCoturn(t, coturnSecret)
	for base, want := range map[string]bool{"https://203.0.113.5": true, "https://127.0.0.1": false, "https://192.168.0.7": false} {
		var out bytes.Buffer
		c := &checker{out: &out}
		var err error
		if c.base, err = url.Parse(base); err != nil {
			t.Fatal(err)
		}
		c.servers(iceServers{Servers: []iceServer{{URLs: []string{"stun:" + addr}}}})
		if got := strings.Contains(out.String(), "WRONG  stun:"+addr+" is an address that others cannot reach"); got != want {
			t.Errorf("%s: %s", base, &out)
		}
	}
}
