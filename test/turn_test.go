package test

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"parley/test/testkit"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/coder/websocket"
	"github.com/pion/stun/v3"
	"github.com/pion/webrtc/v4"
)

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
	relayed, err := dialTURN(t, turnURI(t, s)).Allocate()
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
func mintWithServers(ctx context.Context, t *testing.T, server *testkit.Process) (code, appID string, servers []iceServer) {
	t.Helper()
	var minted struct {
		Code, AppID string
		iceServers
	}
	server.Post(ctx, t, "/rendezvous/code", nil, &minted)
	return minted.Code, minted.AppID, minted.Servers
}

// Two peers that may only be relayed connect with the credentials that came with
// their code, by UDP and by TCP to the TURN server, as it is configured at a cloud.
func TestPeersConnectThroughTURN(t *testing.T) {
	addr := testkit.StartCoturn(t, coturnSecret, turnserverConf(t, "external-ip=127.0.0.1/127.0.0.1", "allowed-peer-ip=127.0.0.1")...)
	for _, transport := range []string{"udp", "tcp"} {
		t.Run(transport, func(t *testing.T) {
			server := testkit.StartBinary(t, "TURN_URLS=turn:"+addr+"?transport="+transport, "TURN_SECRET="+coturnSecret)
			ctx := rtcContext(t)
			code, appID, servers := mintWithServers(ctx, t, server)
			a := dialRTCPeer(ctx, t, server, appID, "A")
			a.start(relayOnly(servers))
			a.offer()

			var redeemed struct {
				AppID string
				iceServers
			}
			server.Post(ctx, t, "/rendezvous/redeem", map[string]string{"code": code}, &redeemed)
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
	addr := testkit.StartCoturn(t, coturnSecret)
	server := testkit.StartBinary(t, "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret+",another secret")
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

// A session that waited longer than its credentials live asks for new ones on
// its socket, and connects with them.
func TestTURNRefreshConnects(t *testing.T) {
	addr := testkit.StartCoturn(t, coturnSecret)
	server := testkit.StartBinary(t, "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret, "TURN_TTL=2s")
	ctx := rtcContext(t)
	_, appID, servers := mintWithServers(ctx, t, server)
	a, b := dialRTCPeer(ctx, t, server, appID, "A"), dialRTCPeer(ctx, t, server, appID, "B")
	testkit.Eventually(t, "the credential to expire", func() bool {
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
		var answer struct {
			Type string
			iceServers
		}
		if err := json.Unmarshal(text, &answer); err != nil {
			p.t.Fatal(err)
		}
		if answer.Type == "ice_servers" {
			return answer.Servers
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
			addr := testkit.StartCoturn(t, coturnSecret, turnserverConf(t, tc.lines...)...)
			server := testkit.StartBinary(t, "DEV=false", "TURN_URLS=turn:"+addr+"?transport=udp,turn:"+addr+"?transport=tcp", "TURN_SECRET="+coturnSecret)
			_, out := check(t, server.Base)
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
			addr := testkit.StartCoturn(t, coturnSecret, settings...)
			server := testkit.StartBinary(t, "TURN_URLS=turn:"+addr+"?transport=tcp", "TURN_SECRET="+coturnSecret)
			_, _, servers := mintWithServers(t.Context(), t, server)
			relayed, err := dialTURN(t, turnURI(t, servers[0])).AllocateTCP()
			if err == nil {
				relayed.Close()
			}
			_, out := check(t, server.Base)
			told := strings.Contains(out, "note   turn:"+addr+"?transport=tcp relays TCP to any server, which peers do not need: set no-tcp-relay")
			if refused := err != nil; refused != (settings != nil) || told == refused {
				t.Errorf("a TCP relay: %v\n%s", err, out)
			}
		})
	}
}

// A session is one user of coturn, and shares its user-quota, however many
// credentials it had and whenever they expire.
func TestTURNSessionIsOneUser(t *testing.T) {
	addr := testkit.StartCoturn(t, coturnSecret, turnserverConf(t, "user-quota=1")...)
	server := testkit.StartBinary(t, "TURN_URLS=turn:"+addr, "TURN_SECRET="+coturnSecret)
	_, _, session := mintWithServers(t.Context(), t, server)
	_, _, another := mintWithServers(t.Context(), t, server)
	relayed, err := dialTURN(t, turnURI(t, session[0])).Allocate()
	if err != nil {
		t.Fatal(err)
	}
	defer relayed.Close()
	later := session[0]
	expires, user, _ := strings.Cut(later.Username, ":")
	n, _ := strconv.Atoi(expires)
	later.Username = fmt.Sprint(n+3600) + ":" + user
	later.Credential = turnPassword(coturnSecret, later.Username)
	if err := allocate(t, later); err == nil || !strings.Contains(err.Error(), "486") {
		t.Errorf("another credential of the session: %v, want its quota reached", err)
	}
	if err := allocate(t, another[0]); err != nil {
		t.Errorf("another session: %v", err)
	}
}

// Two peers that may only be relayed connect with nothing but this server, by what
// it told them with their code, and each browser's own choice of transport.
func TestPeersConnectThroughOwnTURN(t *testing.T) {
	for _, transport := range []string{"udp", "tcp", "any"} {
		t.Run(transport, func(t *testing.T) {
			server := testkit.StartBinary(t, "TURN=on", "TURN_PORT="+testkit.FreePort(t))
			ctx := rtcContext(t)
			code, appID, servers := mintWithServers(ctx, t, server)
			only := func(servers []iceServer) webrtc.Configuration {
				servers = slices.Clone(servers)
				for i := range servers {
					servers[i].URLs = slices.DeleteFunc(slices.Clone(servers[i].URLs), func(url string) bool {
						return transport != "any" && strings.HasPrefix(url, "turn:") && !strings.HasSuffix(url, transport)
					})
				}
				return relayOnly(servers)
			}
			a := dialRTCPeer(ctx, t, server, appID, "A")
			a.start(only(servers))
			a.offer()
			var redeemed struct {
				AppID string
				iceServers
			}
			server.Post(ctx, t, "/rendezvous/redeem", map[string]string{"code": code}, &redeemed)
			b := dialRTCPeer(ctx, t, server, redeemed.AppID, "B")
			b.start(only(redeemed.Servers))
			exchangeGreetings(t, a, b)
			for _, p := range []*rtcPeer{a, b} {
				pair, err := p.pc.SCTP().Transport().ICETransport().GetSelectedCandidatePair()
				if err != nil || pair.Local.Typ != webrtc.ICECandidateTypeRelay || pair.Local.Address != "192.0.2.1" {
					t.Errorf("%s uses %v, %v", p.side, pair, err)
				}
			}
		})
	}
}

// Both peers of a session are given one instance's relay, whichever they ask, and
// another's once that instance is gone.
func TestTURNFleet(t *testing.T) {
	redis := testkit.StartRedis(t)
	env := []string{"REDIS_URL=redis://" + redis.Addr, "TURN=on", "TURN_SECRET=s", "HEARTBEAT=2s"}
	var all [2]*testkit.Process
	var ports [2]string
	for i := range all {
		ports[i] = testkit.FreePort(t)
		all[i] = testkit.StartBinary(t, append(env, "TURN_PORT="+ports[i])...)
	}
	f := &fleet{t: t}
	for _, p := range all {
		testkit.Eventually(t, "an instance is ready", func() bool { return f.ready(p) })
	}
	ctx := rtcContext(t)
	code, appID, servers := mintWithServers(ctx, t, all[0])
	var redeemed struct {
		AppID string
		iceServers
	}
	all[1].Post(ctx, t, "/rendezvous/redeem", map[string]string{"code": code}, &redeemed)
	if want := "stun:127.0.0.1:" + ports[0]; servers[0].URLs[0] != want || redeemed.Servers[0].URLs[0] != want {
		t.Fatalf("told of %v and %v, want both of %s", servers, redeemed.Servers, want)
	}
	a, b := dialRTCPeer(ctx, t, all[0], appID, "A"), dialRTCPeer(ctx, t, all[1], appID, "B")
	a.start(relayOnly(servers))
	b.start(relayOnly(redeemed.Servers))
	a.offer()
	exchangeGreetings(t, a, b)

	_, other, _ := mintWithServers(ctx, t, all[0])
	if exit := all[0].Stop(); exit != 0 {
		t.Fatal("exit status", exit)
	}
	testkit.Eventually(t, "the other instance to relay for the session", func() bool {
		res, err := http.Get(all[1].URL("/ice-servers?appID=" + other))
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		var answer iceServers
		if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
			t.Fatal(err)
		}
		return len(answer.Servers) == 2 && answer.Servers[0].URLs[0] == "stun:127.0.0.1:"+ports[1] && allocate(t, answer.Servers[1]) == nil
	})
}
