package main

import (
	"bytes"
	"context"
	"crypto/md5"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"github.com/pion/stun/v3"
	"github.com/pion/turn/v5"
	"github.com/pion/webrtc/v4"
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
		d := newICEDirectory(mustLoad(t, nil, testTURN, "TURN_SECRET=s3cret", "TURN_TTL=1m"), newMetrics())
		id := uuid.New()
		s := d.servers(id, network{}).Servers[0]
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

// startCoturn runs coturn on loopback until the test ends, and returns its address:
// without a configuration, or as settings say.
func startCoturn(t *testing.T, secret string, settings ...string) string {
	t.Helper()
	path, err := exec.LookPath("turnserver")
	if err != nil {
		t.Fatal("coturn is missing: make test installs it")
	}
	if settings == nil {
		settings = []string{"-n", "--relay-ip=127.0.0.1", "--no-tls", "--no-dtls", "--no-cli", "--no-rfc5780", "--log-file=stdout"}
	}
	dir := t.TempDir()
	for range 5 { // another may take the port first
		port := freePort(t)
		out := new(lockedBuffer)
		cmd := exec.Command(path, append(slices.Clone(settings), "--listening-ip=127.0.0.1", "--allow-loopback-peers",
			"--listening-port="+port, "--use-auth-secret", "--static-auth-secret="+secret, "--realm=parley.test",
			"--relay-threads=1", "--simple-log",
			"--userdb="+filepath.Join(dir, "turndb"), "--pidfile="+filepath.Join(dir, "pid"))...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		exited := make(chan struct{})
		go func() { cmd.Wait(); close(exited) }()
		stop := func() {
			cmd.Process.Kill()
			<-exited
		}
		addr := net.JoinHostPort("127.0.0.1", port)
		if answers(addr, exited) {
			t.Cleanup(func() {
				stop()
				if t.Failed() {
					t.Logf("coturn printed:\n%s", out)
				}
			})
			return addr
		}
		stop()
		t.Logf("coturn did not start:\n%s", out)
	}
	t.Fatal("coturn does not start")
	return ""
}

// freePort returns a port that is free for UDP and TCP on loopback.
func freePort(t *testing.T) string {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		u, err := net.ListenPacket("udp", addr)
		l.Close()
		if err == nil {
			u.Close()
			_, port, _ := net.SplitHostPort(addr)
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// answers waits until a STUN server answers, or has exited.
func answers(addr string, exited <-chan struct{}) bool {
	host, port, _ := net.SplitHostPort(addr)
	n, _ := strconv.Atoi(port)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); {
		select {
		case <-exited:
			return false
		default:
		}
		client, closeAll, err := dialICE(&stun.URI{Scheme: stun.SchemeTypeSTUN, Host: host, Port: n, Proto: stun.ProtoTypeUDP})
		if err != nil {
			return false
		}
		_, err = client.SendBindingRequest()
		closeAll()
		if err == nil {
			return true
		}
	}
	return false
}

// turnURI is the first URL of a server, with its credential.
func turnURI(t *testing.T, s iceServer) *stun.URI {
	t.Helper()
	uri, err := stun.ParseURI(s.URLs[0])
	if err != nil {
		t.Fatal(err)
	}
	uri.Username, uri.Password = s.Username, s.Credential
	return uri
}

// allocate asks for an allocation with a credential, and returns the error.
func allocate(t *testing.T, s iceServer) error {
	t.Helper()
	client, closeAll, err := dialICE(turnURI(t, s))
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	relayed, err := client.Allocate()
	if err == nil {
		relayed.Close()
	}
	return err
}

// relayOnly is the configuration of a peer that only talks through these servers.
func relayOnly(servers []iceServer) webrtc.Configuration {
	c := webrtc.Configuration{ICETransportPolicy: webrtc.ICETransportPolicyRelay}
	for _, s := range servers {
		c.ICEServers = append(c.ICEServers, webrtc.ICEServer{URLs: s.URLs, Username: s.Username, Credential: s.Credential})
	}
	return c
}

// mintWithServers asks the server for a code.
func mintWithServers(ctx context.Context, t *testing.T, server *process) (code, appID string, servers []iceServer) {
	t.Helper()
	var minted struct {
		Code, AppID string
		iceServers
	}
	server.post(ctx, t, "/rendezvous/code", nil, &minted)
	return minted.Code, minted.AppID, minted.Servers
}

// Two peers that may only be relayed connect with the credentials that came with
// their code, by UDP and by TCP to the TURN server, as it is configured at a cloud.
func TestPeersConnectThroughTURN(t *testing.T) {
	addr := startCoturn(t, coturnSecret, turnserverConf(t, "external-ip=127.0.0.1/127.0.0.1", "allowed-peer-ip=127.0.0.1")...)
	for _, transport := range []string{"udp", "tcp"} {
		t.Run(transport, func(t *testing.T) {
			server := startBinary(t, "TURN_URLS=turn:"+addr+"?transport="+transport, "TURN_SECRET="+coturnSecret)
			ctx := rtcContext(t)
			code, appID, servers := mintWithServers(ctx, t, server)
			a := dialRTCPeer(ctx, t, server, appID, "A")
			a.start(relayOnly(servers))
			a.offer()

			var redeemed struct {
				AppID string
				iceServers
			}
			server.post(ctx, t, "/rendezvous/redeem", map[string]string{"code": code}, &redeemed)
			b := dialRTCPeer(ctx, t, server, redeemed.AppID, "B")
			b.start(relayOnly(redeemed.Servers))
			exchangeGreetings(t, a, b)
			for _, p := range []*rtcPeer{a, b} {
				pair, err := p.pc.SCTP().Transport().ICETransport().GetSelectedCandidatePair()
				if err != nil || pair.Local.Typ != webrtc.ICECandidateTypeRelay {
					t.Errorf("%s uses %v, %v", p.side, pair, err)
				}
			}
		})
	}
}

// coturn takes a credential as it is, and neither a changed one nor one of
// another secret.
func TestTURNForged(t *testing.T) {
	addr := startCoturn(t, coturnSecret)
	server := startBinary(t, "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret+",another secret")
	_, _, servers := mintWithServers(t.Context(), t, server)
	if err := allocate(t, servers[0]); err != nil {
		t.Fatal(err)
	}
	expires, user, _ := strings.Cut(servers[0].Username, ":")
	later := servers[0]
	n, _ := strconv.Atoi(expires)
	later.Username = fmt.Sprint(n+3600) + ":" + user
	guessed := servers[0]
	guessed.Credential = turnPassword("a guess", guessed.Username)
	for what, s := range map[string]iceServer{"a later expiry": later, "a guessed secret": guessed, "another secret": servers[1]} {
		if err := allocate(t, s); err == nil || !strings.Contains(err.Error(), "401") {
			t.Errorf("%s: %v, want it refused", what, err)
		}
	}
}

// A session is one user of coturn, and shares its user-quota, however many
// credentials it had and whenever they expire.
func TestTURNSessionIsOneUser(t *testing.T) {
	addr := startCoturn(t, coturnSecret, turnserverConf(t, "user-quota=1")...)
	session, another := uuid.New(), uuid.New()
	credential := func(id sessionID, life time.Duration) iceServer {
		username := turnUsername(id, time.Now().Add(life))
		return iceServer{URLs: []string{"turn:" + addr}, Username: username, Credential: turnPassword(coturnSecret, username)}
	}
	client, closeAll, err := dialICE(turnURI(t, credential(session, time.Hour)))
	if err != nil {
		t.Fatal(err)
	}
	defer closeAll()
	relayed, err := client.Allocate()
	if err != nil {
		t.Fatal(err)
	}
	defer relayed.Close()
	if err := allocate(t, credential(session, 2*time.Hour)); err == nil || !strings.Contains(err.Error(), "486") {
		t.Errorf("another credential of the session: %v, want its quota reached", err)
	}
	if err := allocate(t, credential(another, time.Hour)); err != nil {
		t.Errorf("another session: %v", err)
	}
}

// A session that waited longer than its credentials live asks for new ones on
// its socket, and connects with them.
func TestTURNRefreshConnects(t *testing.T) {
	addr := startCoturn(t, coturnSecret)
	server := startBinary(t, "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret, "TURN_TTL=2s")
	ctx := rtcContext(t)
	_, appID, servers := mintWithServers(ctx, t, server)
	a, b := dialRTCPeer(ctx, t, server, appID, "A"), dialRTCPeer(ctx, t, server, appID, "B")
	eventually(t, "the credential to expire", func() bool {
		err := allocate(t, servers[0])
		return err != nil && strings.Contains(err.Error(), "401")
	})
	for _, p := range []*rtcPeer{a, b} {
		fresh := p.askServers()
		if fresh[0].Username == servers[0].Username {
			t.Errorf("%s got the same user again", p.side)
		}
		p.start(relayOnly(fresh))
	}
	a.offer()
	exchangeGreetings(t, a, b)
}

// askServers asks for ICE servers on the socket, before start.
func (p *rtcPeer) askServers() []iceServer {
	p.t.Helper()
	if err := p.ws.Write(p.ctx, websocket.MessageText, []byte(`{"type":"ice_servers"}`)); err != nil {
		p.t.Fatal(err)
	}
	for {
		_, text, err := p.ws.Read(p.ctx)
		if err != nil {
			p.t.Fatal(err)
		}
		var answer iceAnswer
		if err := json.Unmarshal(text, &answer); err != nil {
			p.t.Fatal(err)
		}
		if answer.Type == "ice_servers" {
			return answer.Servers
		}
	}
}

// parley check says in words what is right and what is wrong.
func TestCheck(t *testing.T) {
	addr := startCoturn(t, coturnSecret)
	nobody := "127.0.0.1:" + freePort(t)
	good := []string{"DEV=false", "STUN_URLS=stun:" + addr, "TURN_URLS=turn:" + addr + ",turn:" + addr + "?transport=tcp", "TURN_SECRET=" + coturnSecret}
	for _, tc := range []struct {
		name     string
		settings []string
		args     []string
		exit     int
		says     []string
	}{
		{"right", good, nil, 0, []string{"ok     it is ready", "pages of http://127.0.0.1:", "WebSockets get through",
			"ok     stun:" + addr + " answers", "ok     turn:" + addr + " relays", "ok     turn:" + addr + "?transport=tcp relays", "All is well."}},
		{"another secret than the TURN server's", append(good[:3:3], "TURN_SECRET=other"), nil, 1,
			[]string{"ok     stun:" + addr, "WRONG  turn:" + addr + " refuses the credential: its static-auth-secret must be TURN_SECRET", "2 wrong."}},
		{"no STUN or TURN server there", []string{"DEV=false", "STUN_URLS=stun:" + nobody, "TURN_URLS=turn:" + nobody + "?transport=tcp", "TURN_SECRET=s"}, nil, 1,
			[]string{"WRONG  stun:" + nobody + " does not answer", "WRONG  turn:" + nobody, "2 wrong."}},
		{"TURN by UDP alone", append(good[:2:2], "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret), nil, 0,
			[]string{"note   no TURN URL has ?transport=tcp", "All is well."}},
		{"TURN that answers by TCP alone", append(good[:2:2], "TURN_URLS=turn:"+nobody+",turn:"+addr+"?transport=tcp", "TURN_SECRET="+coturnSecret), nil, 1,
			[]string{"WRONG  turn:" + nobody + " does not answer", "note   TURN answers by TCP, and not by UDP", "1 wrong."}},
		{"no ICE servers", []string{"DEV=false"}, nil, 1, []string{"WRONG  there are no ICE servers: set STUN_URLS", "1 wrong."}},
		{"an origin that is not listed", good, []string{"-origin", "https://app.example"}, 1,
			[]string{"Pages of https://app.example may not call", "CORS_ORIGINS"}},
		{"an origin that is listed", append(good[:4:4], "CORS_ORIGINS=https://app.example"), []string{"-origin", "https://app.example"}, 0,
			[]string{"pages of https://app.example may call", "All is well."}},
		{"minting needs a token", append(good[:4:4], "MINT_AUTH=jwt", "JWT_SECRET="+testSecret), nil, 1, []string{"give one with -token"}},
		{"minting with a token", append(good[:4:4], "MINT_AUTH=jwt", "JWT_SECRET="+testSecret), []string{"-token", tokenFor(t, "ada")}, 0, []string{"All is well."}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := startBinary(t, tc.settings...)
			exit, out := check(t, append(tc.args, server.base)...)
			if exit != tc.exit {
				t.Errorf("exit status %d, want %d", exit, tc.exit)
			}
			for _, say := range tc.says {
				if !strings.Contains(out, say) {
					t.Errorf("does not say %q", say)
				}
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// A public server that names an ICE server with a private address names none,
// also where parley check itself can reach it, as on the server's own machine.
func TestCheckPrivateICEServer(t *testing.T) {
	addr := startCoturn(t, coturnSecret)
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

// turnserverConf has coturn take the configuration that users are given, and
// more lines of it.
func turnserverConf(t *testing.T, lines ...string) (settings []string) {
	t.Helper()
	conf, err := os.ReadFile("deploy/turnserver.conf")
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "turnserver.conf")
	if err := os.WriteFile(path, append(conf, strings.Join(lines, "\n")+"\n"...), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"-c", path}
}

// As at a cloud, coturn has another address than the one that the world knows, and
// it is one of those that deploy/turnserver.conf forbids: two peers without UDP
// meet there only where it is allowed.
func TestCheckTURNBehindNAT(t *testing.T) {
	const mapped, own, other = "external-ip=127.0.0.1/127.0.0.1", "allowed-peer-ip=127.0.0.1", "external-ip=127.0.0.9/127.0.0.1"
	for _, tc := range []struct {
		name  string
		lines []string
		says  []string
		never string
	}{
		{"as documented", []string{mapped, own},
			[]string{"?transport=udp relays between two of its peers", "?transport=udp relays from a peer that has UDP",
				"?transport=tcp relays between two of its peers", "All is well."}, "relays TCP to any server"},
		{"its own address forbidden", []string{"external-ip=127.0.0.1"}, // with "/127.0.0.1", newer coturn allows that
			[]string{"?transport=udp forbids its own address", "?transport=tcp forbids its own address", "set its allowed-peer-ip", "2 wrong."}, "relays between"},
		{"another external address than its own", []string{other, own},
			[]string{"?transport=tcp relays between two of its peers", "relays, from 127.0.0.9:", "gets nothing that is sent to its relayed address: open its ports for UDP", "1 wrong."}, "All is well"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			addr := startCoturn(t, coturnSecret, turnserverConf(t, tc.lines...)...)
			server := startBinary(t, "DEV=false", "TURN_URLS=turn:"+addr+"?transport=udp,turn:"+addr+"?transport=tcp", "TURN_SECRET="+coturnSecret)
			_, out := check(t, server.base)
			for _, say := range tc.says {
				if !strings.Contains(out, say) {
					t.Errorf("does not say %q", say)
				}
			}
			if strings.Contains(out, tc.never) {
				t.Errorf("says %q", tc.never)
			}
			if t.Failed() {
				t.Log(out)
			}
		})
	}
}

// With a credential nobody opens TCP connections from the TURN server (RFC 6062).
// One that has no configuration does let them, and parley check tells.
func TestTURNRelaysNoTCP(t *testing.T) {
	for name, settings := range map[string][]string{"as documented": turnserverConf(t), "unconfigured": nil} {
		t.Run(name, func(t *testing.T) {
			addr := startCoturn(t, coturnSecret, settings...)
			server := startBinary(t, "TURN_URLS=turn:"+addr+"?transport=tcp", "TURN_SECRET="+coturnSecret)
			_, _, servers := mintWithServers(t.Context(), t, server)
			client, closeAll, err := dialICE(turnURI(t, servers[0]))
			if err != nil {
				t.Fatal(err)
			}
			defer closeAll()
			relayed, err := client.AllocateTCP()
			if err == nil {
				relayed.Close()
			}
			_, out := check(t, server.base)
			told := strings.Contains(out, "note   turn:"+addr+"?transport=tcp relays TCP to any server, which peers do not need: set no-tcp-relay")
			if refused := err != nil; refused != (settings != nil) || told == refused {
				t.Errorf("a TCP relay: %v\n%s", err, out)
			}
		})
	}
}

// Behind a proxy that the server does not trust everyone would share one
// address: parley check says which setting is missing.
func TestCheckBehindProxy(t *testing.T) {
	for _, tc := range []struct {
		settings []string
		exit     int
		says     string
	}{
		{nil, 1, "set TRUSTED_PROXIES=127.0.0.1/32"},
		{[]string{"TRUSTED_PROXIES=127.0.0.1"}, 0, "All is well."},
	} {
		addr := startCoturn(t, coturnSecret)
		server := startBinary(t, append(tc.settings, "DEV=false", "STUN_URLS=stun:"+addr)...)
		target, err := url.Parse(server.base)
		if err != nil {
			t.Fatal(err)
		}
		forward := httputil.NewSingleHostReverseProxy(target)
		// As the address of someone elsewhere, whom the proxy would name.
		proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			r.RemoteAddr = "192.0.2.7:1234"
			forward.ServeHTTP(w, r)
		}))
		exit, out := check(t, proxy.URL)
		proxy.Close()
		http.DefaultTransport.(*http.Transport).CloseIdleConnections()
		if exit != tc.exit || !strings.Contains(out, tc.says) {
			t.Errorf("%q: exit status %d\n%s\nwant %d and %q", tc.settings, exit, out, tc.exit, tc.says)
		}
	}
}

// What is no URL is said to be none, and nothing is asked.
func TestCheckUsage(t *testing.T) {
	for _, args := range [][]string{nil, {"parley.example"}, {"ftp://parley.example"}, {"http://a", "http://b"}, {"-x", "http://a"}} {
		if exit, out := check(t, args...); exit != 2 || out == "" {
			t.Errorf("%q: exit status %d %q", args, exit, out)
		}
	}
	if exit, out := check(t, "-h"); exit != 0 || !strings.Contains(out, "-origin") {
		t.Errorf("-h: exit status %d %q", exit, out)
	}
	if exit, out := check(t, "http://127.0.0.1:"+freePort(t)); exit != 1 || !strings.Contains(out, "cannot be reached") {
		t.Errorf("nobody there: exit status %d %q", exit, out)
	}
}

// check runs the subcommand of the binary.
func check(t *testing.T, args ...string) (exit int, out string) {
	t.Helper()
	cmd := exec.Command(buildBinary(t), append([]string{"check"}, args...)...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var all bytes.Buffer
	cmd.Stdout, cmd.Stderr = &all, &all
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), all.String()
}
