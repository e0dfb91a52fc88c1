package main

import (
	"bytes"
	"crypto"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"parley/test/testkit"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/alicebob/miniredis/v2"
	"github.com/coder/websocket"
	"github.com/golang-jwt/jwt/v5"
	"github.com/google/uuid"
	"github.com/pion/stun/v3"
)

// Every option does what it says. Here is one small test for each, seen from the
// outside; their values, defaults and bounds are config_test.go's.
func TestOptionsDoWhatTheySay(t *testing.T) {
	tests := optionTests()
	for _, o := range configOptions(new(config)) {
		for _, name := range o.names() {
			if o.secret && name == o.name+"_FILE" {
				continue // TestSecrets has that
			}
			test := tests[name]
			if delete(tests, name); test == nil {
				t.Errorf("nothing tests what %s does", name)
				continue
			}
			t.Run(name, test)
		}
	}
	for name := range tests {
		t.Errorf("%s is tested and is no option", name)
	}
}

// bubbled makes a test of a server in a bubble.
func bubbled(f func(*testing.T)) func(*testing.T) {
	return func(t *testing.T) { inBubble(t, f) }
}

func optionTests() map[string]func(*testing.T) {
	const foreign = "Origin: https://foreign.example"
	status := func(t *testing.T, what string, a httpAnswer, status int, code string) {
		t.Helper()
		if a.status != status || a.Code != code && status >= 400 {
			t.Errorf("%s: %d %s, want %d %s", what, a.status, a.text, status, code)
		}
	}
	mintFrom := func(ts *testServer, headers ...string) httpAnswer {
		return ts.call(http.MethodPost, "/rendezvous/code", "", headers...)
	}
	// originTest expects that foreign pages may mint, or may not.
	originTest := func(want int, settings ...string) func(*testing.T) {
		return bubbled(func(t *testing.T) {
			ts := newTestServer(t, settings...)
			status(t, "a foreign page", mintFrom(ts, foreign), want, "forbidden_origin")
			status(t, "no page", mintFrom(ts), http.StatusOK, "")
		})
	}
	both := func(tests ...func(*testing.T)) func(*testing.T) {
		return func(t *testing.T) {
			for i, test := range tests {
				t.Run(fmt.Sprint(i), test)
			}
		}
	}
	tlsTest := func(t *testing.T) {
		pair := testkit.WritePair(t, t.TempDir(), 77)
		_, addr := newLoopServer(t, "TLS_CERT_FILE="+pair.CertFile, "TLS_KEY_FILE="+pair.KeyFile)
		c, err := tls.Dial("tcp", addr, pair.Client())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got := c.ConnectionState().PeerCertificates[0].SerialNumber; got.Cmp(pair.Serial) != 0 {
			t.Errorf("certificate %v, want %v", got, pair.Serial)
		}
	}
	// refusedAfter opens WebSockets until the n+1st is refused.
	refusedAfter := func(t *testing.T, ts *testServer, n int, want int, code string) (open []*wsClient) {
		t.Helper()
		for range n {
			open = append(open, ts.join(wsDial{appID: uuid.NewString(), side: "A"}))
		}
		_, res, err := ts.dial(wsDial{appID: uuid.NewString(), side: "A"})
		if err == nil {
			t.Fatal("one more was let in")
		}
		var answer httpAnswer
		if json.NewDecoder(res.Body).Decode(&answer); res.StatusCode != want || answer.Code != code {
			t.Errorf("one more: %s %s, want %d %s", res.Status, answer.Code, want, code)
		}
		return open
	}

	turnTest := bubbled(func(t *testing.T) {
		ts := newTestServer(t, "TURN_URLS=turn:a.example", "TURN_SECRET=new,old")
		servers := ts.iceServers(ts.post("/rendezvous/code", "").text)
		if len(servers) != 2 || servers[0].Credential == servers[1].Credential {
			t.Fatalf("%+v, want an entry for each secret", servers)
		}
		for i, secret := range []string{"new", "old"} {
			if s := servers[i]; s.URLs[0] != "turn:a.example" || s.Credential != turnPassword(secret, s.Username) {
				t.Errorf("%+v", s)
			}
		}
	})
	// keyTest opens a room with a token that is signed with key, and not without.
	keyTest := func(setting string, method jwt.SigningMethod, key any) func(*testing.T) {
		return func(t *testing.T) {
			ts, _ := newLoopServer(t, setting)
			status(t, "no token", ts.call(http.MethodPost, "/api/rooms", ""), http.StatusUnauthorized, "unauthorized")
			token := "Authorization: Bearer " + signToken(t, method, key, goodClaims(), nil)
			testkit.Eventually(t, "a good token opens a room", func() bool {
				return ts.call(http.MethodPost, "/api/rooms", "", token).status == http.StatusCreated
			})
		}
	}
	// claimTest expects that a token with one value of a claim is taken, with the other not.
	claimTest := func(setting, claim, good, bad string) func(*testing.T) {
		return bubbled(func(t *testing.T) {
			ts := newTestServer(t, setting, "JWT_SECRET="+testSecret)
			for value, want := range map[string]int{good: http.StatusCreated, bad: http.StatusUnauthorized} {
				claims := goodClaims(with("user_id", nil), with(claim, value))
				if claim != "email" {
					claims["sub"] = "ada"
				}
				token := signToken(t, jwt.SigningMethodHS256, []byte(testSecret), claims, nil)
				status(t, value, ts.call(http.MethodPost, "/api/rooms", "", "Authorization: Bearer "+token), want, "unauthorized")
			}
		})
	}

	// redisTest expects a code minted by one server to be redeemed by another, once
	// miniredis says so.
	redisTest := func(password string, settings func(host, port string) []string) func(*testing.T) {
		return func(t *testing.T) {
			m := miniredis.RunT(t)
			if password != "" {
				m.RequireAuth(password)
			}
			one, _ := newLoopServer(t, settings(m.Host(), m.Port())...)
			other, _ := newLoopServer(t, settings(m.Host(), m.Port())...)
			code, appID := one.mint()
			if a := other.post("/rendezvous/redeem", `{"code":"`+code+`"}`); a.AppID != appID {
				t.Errorf("%d %s, want %s", a.status, a.text, appID)
			}
		}
	}

	return map[string]func(*testing.T){
		"REDIS_URL": redisTest("p@ss", func(host, port string) []string {
			return []string{"REDIS_URL=redis://:p%40ss@" + host + ":" + port + "/3"}
		}),
		"REDIS_HOST": func(t *testing.T) {
			// Whoever asks for the usual port of an address of this machine's own gets an
			// answer or none, and in either case has asked.
			ts, _ := newLoopServer(t, "REDIS_HOST=127.9.9.9")
			if addr := ts.cfg.redisAddress.String(); addr != "127.9.9.9:6379" {
				t.Error(addr)
			}
			status(t, "ready", ts.call(http.MethodGet, "/readyz", ""), http.StatusServiceUnavailable, "backend_unavailable")
		},
		"REDIS_PORT": redisTest("", func(host, port string) []string { return []string{"REDIS_HOST=" + host, "REDIS_PORT=" + port} }),
		"REDIS_PASSWORD": redisTest("secret", func(host, port string) []string {
			return []string{"REDIS_HOST=" + host, "REDIS_PORT=" + port, "REDIS_PASSWORD=secret"}
		}),

		"DEV":             both(originTest(http.StatusOK, "DEV=true"), originTest(http.StatusForbidden, "DEV=false")),
		"ENVIRONMENT":     both(originTest(http.StatusOK, "ENVIRONMENT=development"), originTest(http.StatusForbidden, "ENVIRONMENT=production")),
		"CORS_ORIGINS":    both(originTest(http.StatusOK, "DEV=false", "CORS_ORIGINS=https://foreign.example"), originTest(http.StatusForbidden, "DEV=false", "CORS_ORIGINS=https://other.example")),
		"ALLOWED_ORIGINS": originTest(http.StatusOK, "DEV=false", "ALLOWED_ORIGINS=foreign.example"),
		"TLS_CERT_FILE":   tlsTest,
		"TLS_KEY_FILE":    tlsTest,

		"HOST": func(t *testing.T) { // unix:/path is TestSocketFile's
			_, addr := newLoopServer(t, "HOST=127.0.0.1")
			if host, _, _ := net.SplitHostPort(addr); host != "127.0.0.1" {
				t.Errorf("listens on %s", addr)
			}
		},
		"PORT": func(t *testing.T) {
			// Whoever wants a port that is taken cannot have chosen another.
			taken, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer taken.Close()
			_, port, _ := net.SplitHostPort(taken.Addr().String())
			var stderr bytes.Buffer
			if exit := run([]string{"-host", "127.0.0.1", "-port", port}, environ(), io.Discard, &stderr); exit != 1 || !strings.Contains(stderr.String(), ":"+port+": ") {
				t.Errorf("exit status %d\n%s", exit, stderr.String())
			}
		},
		"ROOMS": bubbled(func(t *testing.T) {
			key := "JWT_SECRET=" + testSecret
			for _, tc := range []struct {
				settings []string
				want     int
			}{
				{nil, http.StatusNotFound},
				{[]string{key, "ROOMS=off"}, http.StatusNotFound},
				{[]string{"ROOMS=open"}, http.StatusCreated},
				{[]string{key, "ROOMS=open"}, http.StatusCreated},
				{[]string{key, "ROOMS=jwt"}, http.StatusUnauthorized},
				{[]string{key}, http.StatusUnauthorized},
			} {
				ts := newTestServer(t, tc.settings...)
				a := ts.call(http.MethodPost, "/api/rooms", "")
				if a.status != tc.want {
					t.Errorf("%q: %d %s, want %d", tc.settings, a.status, a.text, tc.want)
				}
				if _, res, err := ts.dial(wsDial{room: "ABCDEF"}); err == nil || res.StatusCode != http.StatusNotFound {
					t.Errorf("%q: %v", tc.settings, res)
				}
			}
		}),
		"ROOM_MAX_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "ROOMS=open", "ROOM_MAX_TTL=1m")
			r := ts.openRoom(`{"ttl":3600}`)
			if got := time.Until(r.ExpiresAt).Round(time.Second); got != time.Minute {
				t.Errorf("the room lives %v", got)
			}
			c := ts.join(wsDial{room: r.Code})
			time.Sleep(time.Minute - time.Second)
			if got := c.settled(); len(got) != 1 {
				t.Errorf("received %q", got)
			}
			pass(time.Second + janitorEvery)
			c.wantClosed(closeUnknown, "room_not_found")
		}),
		"ROOM_EMPTY_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "ROOMS=open", "ROOM_EMPTY_TTL=30s")
			r := ts.openRoom("")
			pass(29 * time.Second)
			ts.join(wsDial{room: r.Code}).leave(websocket.StatusNormalClosure)
			pass(29 * time.Second)
			status(t, "before", ts.call(http.MethodGet, "/api/rooms/"+r.Code, ""), http.StatusOK, "")
			pass(2 * time.Second)
			status(t, "after", ts.call(http.MethodGet, "/api/rooms/"+r.Code, ""), http.StatusNotFound, "room_not_found")
		}),
		"MINT_AUTH": bubbled(func(t *testing.T) {
			for mode, want := range map[string]int{"none": http.StatusOK, "jwt": http.StatusUnauthorized} {
				ts := newTestServer(t, "JWT_SECRET="+testSecret, "MINT_AUTH="+mode)
				status(t, mode+" without a token", mintFrom(ts), want, "unauthorized")
				status(t, mode+" with a token", mintFrom(ts, "Authorization: Bearer "+tokenFor(t, "ada")), http.StatusOK, "")
			}
		}),
		"JWT_SECRET": keyTest("JWT_SECRET="+testSecret, jwt.SigningMethodHS256, []byte(testSecret)),
		"JWT_PUBLIC_KEY_FILE": func(t *testing.T) {
			key := newRSAKey(t)
			keyTest("JWT_PUBLIC_KEY_FILE="+writePublicKey(t, key.Public()), jwt.SigningMethodRS256, key)(t)
		},
		"JWT_JWKS_URL": func(t *testing.T) {
			key, web := newRSAKey(t), newJWKSServer(t)
			web.answer(http.StatusOK, jwks(t, map[string]crypto.PublicKey{"k": key.Public()}))
			keyTest("JWT_JWKS_URL="+web.URL, jwt.SigningMethodRS256, key)(t)
		},
		"JWT_ISSUER":     claimTest("JWT_ISSUER=us", "iss", "us", "them"),
		"JWT_AUDIENCE":   claimTest("JWT_AUDIENCE=games", "aud", "games", "mail"),
		"JWT_USER_CLAIM": claimTest("JWT_USER_CLAIM=email", "email", "a@b", ""),

		"STUN_URLS": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "STUN_URLS=stun:stun.example,stuns:b.example")
			if a := ts.post("/rendezvous/code", ""); !strings.Contains(a.text, `"iceServers":[{"urls":["stun:stun.example","stuns:b.example"]}]`) {
				t.Error(a.text)
			}
		}),
		"TURN_URLS":   turnTest,
		"TURN_SECRET": turnTest,
		"TURN": func(t *testing.T) {
			for mode, want := range map[string]int{"on": 2, "off": 0} {
				ts, _ := newLoopServer(t, "TURN="+mode, "TURN_PORT=0")
				if servers := ts.iceServers(ts.post("/rendezvous/code", "").text); len(servers) != want {
					t.Errorf("TURN=%s: %v, want %d servers", mode, servers, want)
				}
			}
		},
		"TURN_PORT": func(t *testing.T) {
			port := testkit.FreePort(t)
			ts, _ := newLoopServer(t, "TURN=on", "TURN_PORT="+port)
			servers := ts.iceServers(ts.post("/rendezvous/code", "").text)
			if want := "stun:parley.test:" + port; servers[0].URLs[0] != want {
				t.Errorf("%v, want %s", servers, want)
			}
			for env, everywhere := range map[string]bool{"HOST=127.0.0.1": false, "HOST=127.0.0.1 DEV=false": true} { // behind a proxy
				ts, _ := newLoopServer(t, strings.Fields(env+" TURN=on TURN_PORT="+testkit.FreePort(t))...)
				if got := ts.turn.udp.LocalAddr().(*net.UDPAddr).IP.IsUnspecified(); got != everywhere {
					t.Errorf("%s: on %v", env, ts.turn.udp.LocalAddr())
				}
			}
		},
		"TURN_HOST": func(t *testing.T) {
			ts, _ := newLoopServer(t, "TURN=on", "TURN_PORT=0", "TURN_HOST=turn.example")
			servers := ts.iceServers(ts.post("/rendezvous/code", "").text)
			if len(servers) != 2 || !strings.HasPrefix(servers[0].URLs[0], "stun:turn.example:") {
				t.Error(servers)
			}
		},
		"TURN_MAX_ALLOCATIONS": bubbled(func(t *testing.T) {
			r := newTestRelay(t, "TURN_MAX_ALLOCATIONS=1")
			for i, want := range []stun.ErrorCode{0, stun.CodeInsufficientCapacity} {
				if code := r.client(fmt.Sprintf("198.51.100.1:%d", i+1), uuid.New()).allocate(); code != want {
					t.Errorf("allocation %d: %d, want %d", i+1, code, want)
				}
			}
		}),
		"TURN_MAX_BPS": bubbled(func(t *testing.T) {
			for setting, want := range map[string]int{"TURN_MAX_BPS=2KiB": 2, "TURN_MAX_BPS=0": 10} {
				r := newTestRelay(t, setting)
				a, b := r.relayPair()
				n := 0
				for range 10 {
					n += len(a.sendTo(virtual(b.port), strings.Repeat("x", 1<<10)))
				}
				if n != want {
					t.Errorf("%s: %d packets of 1 KiB got through, want %d", setting, n, want)
				}
			}
		}),
		"TURN_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "TURN_URLS=turn:a.example", "TURN_SECRET=s", "TURN_TTL=90s")
			username := ts.iceServers(ts.post("/rendezvous/code", "").text)[0].Username
			if expires, _, _ := strings.Cut(username, ":"); expires != fmt.Sprint(time.Now().Add(90*time.Second).Unix()) {
				t.Errorf("user %s at %d", username, time.Now().Unix())
			}
		}),

		"LOG_LEVEL": func(t *testing.T) {
			for level, want := range map[string]int{"debug": 4, "info": 3, "warn": 2, "error": 1} {
				var out bytes.Buffer
				log := newLogger("text", mustLoad(t, nil, "LOG_LEVEL="+level).logLevel, &out)
				log.Debug("a")
				log.Info("b")
				log.Warn("c")
				log.Error("d")
				if got := strings.Count(out.String(), "\n"); got != want {
					t.Errorf("%s: %d lines, want %d", level, got, want)
				}
			}
		},
		"LOG_FORMAT": func(t *testing.T) {
			printed := func(what string, isJSON bool, text string) {
				t.Helper()
				if strings.TrimSpace(text) == "" {
					t.Errorf("%s: nothing is printed", what)
				}
				for line := range strings.Lines(text) {
					if line != "\n" && json.Valid([]byte(line)) != isJSON {
						t.Errorf("%s: %s", what, line)
					}
				}
			}
			for format, isJSON := range map[string]bool{"text": false, "json": true} {
				server := testkit.StartBinary(t, "LOG_FORMAT="+format)
				server.Stop()
				printed(format, isJSON, server.Output())
				for _, wrong := range []string{"ROOM_TTL=soon", "REDIS_PORT=0", "HOST=192.0.2.1"} {
					var out bytes.Buffer
					if status := run(nil, environ("LOG_FORMAT="+format, "PORT=0", wrong), &out, &out); status == 0 {
						t.Errorf("%s: exit status 0", wrong)
					}
					printed(format+", "+wrong, isJSON, out.String())
				}
			}
		},
		"METRICS_ROUTE": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "METRICS_ROUTE=/internal/numbers")
			if a := ts.call(http.MethodGet, "/internal/numbers", ""); a.status != http.StatusOK || !strings.Contains(a.text, "parley_build_info{") {
				t.Errorf("%d %.100s", a.status, a.text)
			}
			status(t, "/metrics", ts.call(http.MethodGet, "/metrics", ""), http.StatusNotFound, "not_found")
		}),
		"METRICS_ADDR": TestMetricsAddr,
		"DEMO":         TestDemoOff,
		"DRAIN_TIMEOUT": bubbled(func(t *testing.T) {
			for _, timeout := range []time.Duration{2 * time.Second, 15 * time.Second} {
				ts := newTestServer(t, "DRAIN_TIMEOUT="+timeout.String())
				c, err := ts.net.dial()
				if err != nil {
					t.Fatal(err)
				}
				io.WriteString(c, "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nContent-Length: 10\r\n\r\n") // whose body never comes
				synctest.Wait()
				start := time.Now()
				ts.stop()
				if took := time.Since(start); took > timeout || took < timeout/2 {
					t.Errorf("took %v of %v", took, timeout)
				}
				c.Close()
			}
		}),

		"ROOM_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "ROOM_TTL=3m")
			a := mintFrom(ts)
			if left := time.Until(a.Expiry); left < 3*time.Minute-time.Millisecond || left > 3*time.Minute {
				t.Errorf("a new code expires in %v", left)
			}
			late, _ := ts.mint()
			pass(3*time.Minute - time.Second)
			status(t, "just in time", ts.post("/rendezvous/redeem", `{"code":"`+a.Code+`"}`), http.StatusOK, "")
			pass(time.Second)
			status(t, "too late", ts.post("/rendezvous/redeem", `{"code":"`+late+`"}`), http.StatusGone, "gone")
		}),
		"CODE_DIGITS": bubbled(func(t *testing.T) {
			if code, _ := newTestServer(t, "CODE_DIGITS=7").mint(); len(code) != 7 {
				t.Errorf("minted %s", code)
			}
		}),
		"CODE_DIGITS_MAX": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "CODE_DIGITS_MAX=5")
			for i := range 101 { // a hundredth of the space, and one
				if code, _ := ts.mint(); len(code) != 4+i/100 {
					t.Fatalf("code %d is %s", i, code)
				}
			}
		}),
		"APP_IDS": bubbled(func(t *testing.T) {
			newTestServer(t, "APP_IDS=any").join(wsDial{appID: uuid.NewString(), side: "A"})
			ts := newTestServer(t, "APP_IDS=minted")
			_, id := ts.mint()
			ts.join(wsDial{appID: id, side: "A"})
			refusedAfter(t, ts, 0, http.StatusNotFound, "unknown_session")
		}),
		"SESSION_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "SESSION_TTL=3m", "APP_IDS=any")
			// received is what B finds so long after A has left mail and gone.
			received := func(after time.Duration) int {
				id := uuid.NewString()
				a := ts.join(wsDial{appID: id, side: "A"})
				a.send(`{"type":"send","payload":"hello"}`)
				synctest.Wait()
				a.leave(1000)
				pass(after)
				b := ts.join(wsDial{appID: id, side: "B"})
				b.send(`{"type":"hello"}`)
				return len(b.settled())
			}
			if got := received(3*time.Minute - time.Second); got != 1 {
				t.Errorf("%d messages just before the end of SESSION_TTL", got)
			}
			if got := received(3 * time.Minute); got != 0 {
				t.Errorf("%d messages after SESSION_TTL", got)
			}
		}),
		"RESUME_TTL": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "RESUME_TTL=90s", "APP_IDS=any", "HEARTBEAT=1h")
			id := uuid.NewString()
			a, b := ts.join(wsDial{appID: id, side: "A", sid: "mine"}), ts.join(wsDial{appID: id, side: "B"})
			b.want(frameRoomFull)
			a.drop()
			time.Sleep(90*time.Second - time.Millisecond)
			b.want()
			time.Sleep(time.Millisecond)
			b.want(framePeerLeft)
		}),

		"HEARTBEAT": bubbled(func(t *testing.T) {
			v := inMemory(t, "HEARTBEAT=7s", "APP_IDS=any")
			c := v.raw(t, wsDial{appID: uuid.NewString(), side: "A"})
			start := time.Now()
			if op, _, err := c.next(); op != opPing || err != nil || time.Since(start) != 7*time.Second {
				t.Errorf("opcode %d, %v after %v, want a ping", op, err, time.Since(start))
			}
			if code, took := c.closed(), time.Since(start); code != 0 || took != 14*time.Second {
				t.Errorf("silent, it was closed with %d after %v", code, took)
			}
		}),
		"WS_MAX_MSG": bubbled(func(t *testing.T) {
			v := inMemory(t, "WS_MAX_MSG=2048")
			a, b := v.pair(t)
			message := func(size int) string { return `{"type":"ice"` + strings.Repeat(" ", size-14) + "}" }
			a.write(t, textFrame(message(2048)))
			b.want(t, message(2048))
			a.write(t, textFrame(message(2049)))
			if code := a.closed(); code != closeTooBig {
				t.Errorf("closed with %d", code)
			}
		}),
		"WS_READ_BUF": func(t *testing.T) {
			small, large := reads(t, "WS_READ_BUF=256"), reads(t, "WS_READ_BUF=65536")
			if small < (64<<10)/(burstFactor*256) || large > 10 {
				t.Errorf("64 KiB took %d reads into 256 bytes, and %d into 65536", small, large)
			}
			for _, size := range []int{256, 65536} {
				if got := largestRead(t, fmt.Sprint("WS_READ_BUF=", size)); got != size {
					t.Errorf("without polling, at most %d bytes were read at once, want %d", got, size)
				}
			}
		},
		"WS_WRITE_BUF": func(t *testing.T) {
			small, large := writes(t, "WS_WRITE_BUF=256"), writes(t, "WS_WRITE_BUF=65536")
			if small < 10 || large > 5 {
				t.Errorf("100 messages took %d writes out of 256 bytes, and %d out of 65536", small, large)
			}
		},

		"TRUSTED_PROXIES": bubbled(func(t *testing.T) {
			for proxies, want := range map[string]string{"TRUSTED_PROXIES=127.0.0.0/8": "192.0.2.7", "TRUSTED_PROXIES=10.0.0.0/8": "127.0.0.1"} {
				var answer struct{ IP string }
				a := newTestServer(t, proxies).call(http.MethodGet, "/whoami", "", "X-Forwarded-For: 192.0.2.7")
				if json.Unmarshal([]byte(a.text), &answer); answer.IP != want {
					t.Errorf("%s: %s, want %s", proxies, a.text, want)
				}
			}
		}),
		"RATE_EXEMPT": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "RATE_EXEMPT=127.0.0.1", "HTTP_RATE_PER_MIN=1", "MAX_CODES_PER_IP=1", "REDEEM_FAILS=1")
			for range 3 {
				status(t, "mint", mintFrom(ts), http.StatusOK, "")
				status(t, "guess", ts.post("/rendezvous/redeem", `{"code":"999999999"}`), http.StatusGone, "gone")
			}
		}),
		"HTTP_RATE_PER_MIN": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "HTTP_RATE_PER_MIN=6")
			for range 6 {
				status(t, "within the rate", mintFrom(ts), http.StatusOK, "")
			}
			status(t, "beyond it", mintFrom(ts), http.StatusTooManyRequests, "rate_limited")
			status(t, "health", ts.call(http.MethodGet, "/healthz", ""), http.StatusOK, "")
			pass(10 * time.Second)
			status(t, "one later", mintFrom(ts), http.StatusOK, "")
		}),
		"WS_RATE_PER_MIN": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "WS_RATE_PER_MIN=3", "APP_IDS=any")
			refusedAfter(t, ts, 3, http.StatusTooManyRequests, "rate_limited")
			pass(20 * time.Second)
			refusedAfter(t, ts, 1, http.StatusTooManyRequests, "rate_limited")
		}),
		"WS_FRAMES_PER_SEC": bubbled(func(t *testing.T) {
			v := inMemory(t, "WS_FRAMES_PER_SEC=5")
			a, b := v.pair(t)
			for range 3 {
				a.write(t, bytes.Repeat(textFrame(`{"type":"ice"}`), 5))
				b.want(t, `{"type":"ice"}`, `{"type":"ice"}`, `{"type":"ice"}`, `{"type":"ice"}`, `{"type":"ice"}`)
				pass(time.Second)
			}
			a.write(t, bytes.Repeat(textFrame(`{"type":"ice"}`), 6))
			if code := a.closed(); code != closeTooMany {
				t.Errorf("closed with %d", code)
			}
		}),
		"REDEEM_FAILS": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "REDEEM_FAILS=3")
			code, _ := ts.mint()
			for i := range 3 {
				status(t, "wrong", ts.post("/rendezvous/redeem", fmt.Sprintf(`{"code":"10000000%d"}`, i)), http.StatusGone, "gone")
			}
			status(t, "right, and too late", ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`), http.StatusTooManyRequests, "too_many_attempts")
		}),
		"MAX_CONNS": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "MAX_CONNS=3", "APP_IDS=any")
			open := refusedAfter(t, ts, 3, http.StatusServiceUnavailable, "at_capacity")
			open[0].leave(1000)
			synctest.Wait()
			refusedAfter(t, ts, 1, http.StatusServiceUnavailable, "at_capacity")
		}),
		"MAX_CONNS_PER_IP": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "MAX_CONNS_PER_IP=2", "APP_IDS=any")
			open := refusedAfter(t, ts, 2, http.StatusTooManyRequests, "too_many_connections")
			ts.join(wsDial{appID: uuid.NewString(), side: "A", from: "192.0.2.7"})
			open[0].leave(1000)
			synctest.Wait()
			refusedAfter(t, ts, 1, http.StatusTooManyRequests, "too_many_connections")
		}),
		"MAX_CODES_PER_IP": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "MAX_CODES_PER_IP=2", "ROOM_TTL=1m")
			ts.mint()
			ts.mint()
			status(t, "one more", mintFrom(ts), http.StatusTooManyRequests, "too_many_codes")
			pass(time.Minute)
			ts.mint()
		}),
		"MAX_SESSIONS": bubbled(func(t *testing.T) {
			ts := newTestServer(t, "MAX_SESSIONS=3", "APP_IDS=any", "ROOM_TTL=1m")
			ts.mint()
			ts.mint()
			refusedAfter(t, ts, 1, http.StatusServiceUnavailable, "at_capacity")
			status(t, "a code", mintFrom(ts), http.StatusServiceUnavailable, "at_capacity")
			pass(time.Minute + 15*time.Second)
			ts.mint()
		}),
		"MAX_QUEUED_BYTES": bubbled(func(t *testing.T) {
			v := inMemory(t, "MAX_QUEUED_BYTES=64KiB")
			a := v.raw(t, wsDial{appID: uuid.NewString(), side: "A"})
			offer := `{"type":"offer","sdp":"` + strings.Repeat("x", 40<<10) + `"}`
			a.write(t, textFrame(offer), textFrame(offer))
			a.wantError(t, "over_capacity")
			a.write(t, textFrame(`{"type":"send","payload":"`+strings.Repeat("x", 40<<10)+`"}`))
			a.wantError(t, "over_capacity")
			// A pair whose seats are connected goes on.
			b, c := v.pair(t)
			b.write(t, textFrame(offer))
			c.want(t, offer)
		}),
	}
}

// A callSpy counts what the server does with its polled sockets.
type callSpy struct {
	net.Listener
	reads, writes atomic.Int64
}

func (s *callSpy) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	if err != nil {
		return nil, err
	}
	return spiedConn{c.(*net.TCPConn), s}, nil
}

type spiedConn struct {
	*net.TCPConn
	spy *callSpy
}

func (c spiedConn) SyscallConn() (syscall.RawConn, error) {
	raw, err := c.TCPConn.SyscallConn()
	return spiedRaw{raw, c.spy}, err
}

type spiedRaw struct {
	syscall.RawConn
	spy *callSpy
}

func (r spiedRaw) Read(f func(fd uintptr) bool) error {
	return r.RawConn.Read(func(fd uintptr) bool { r.spy.reads.Add(1); return f(fd) })
}

func (r spiedRaw) Write(f func(fd uintptr) bool) error {
	return r.RawConn.Write(func(fd uintptr) bool { r.spy.writes.Add(1); return f(fd) })
}

// spiedVictim is a server with one setting, whose sockets are spied on.
func spiedVictim(t *testing.T, setting string) (victim, *callSpy) {
	t.Helper()
	ts, _ := newLoopServer(t, setting)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	spy := &callSpy{Listener: l}
	web := ts.newHTTPServer(ts.handler())
	var served sync.WaitGroup
	served.Go(func() { web.Serve(spy) })
	t.Cleanup(func() {
		web.Close()
		served.Wait()
	})
	return victim{ts, func() (net.Conn, error) { return net.Dial("tcp", l.Addr().String()) }}, spy
}

// reads returns how many reads a message of 64 KiB takes.
func reads(t *testing.T, setting string) int64 {
	t.Helper()
	v, spy := spiedVictim(t, setting)
	a, b := v.pair(t)
	before := spy.reads.Load()
	message := `{"type":"offer"` + strings.Repeat(" ", 64<<10) + "}"
	a.write(t, textFrame(message))
	b.want(t, message)
	return spy.reads.Load() - before
}

// writes returns how many writes a hundred messages take that waited together.
func writes(t *testing.T, setting string) int64 {
	t.Helper()
	v, spy := spiedVictim(t, setting)
	id := uuid.NewString()
	a := v.raw(t, wsDial{appID: id, side: "A"})
	a.write(t, bytes.Repeat(textFrame(`{"type":"send","payload":"`+strings.Repeat("x", 60)+`"}`), 100), textFrame(`{"type":"ping"}`))
	a.want(t, `{"type":"pong"}`)
	b := v.raw(t, wsDial{appID: id, side: "B"})
	b.want(t, frameRoomFull)
	a.want(t, frameRoomFull)
	before := spy.writes.Load()
	b.write(t, textFrame(`{"type":"hello"}`))
	for i := range 100 {
		if got, err := b.text(); err != nil {
			t.Fatalf("message %d: %s, %v", i, got, err)
		}
	}
	return spy.writes.Load() - before
}

// largestRead returns how much the server wants to read at once from a socket
// that it cannot poll.
func largestRead(t *testing.T, setting string) (largest int) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		v := inMemory(t, setting)
		l := newMemListener()
		spy := &readSpy{Listener: l}
		go v.web.Serve(spy)
		v.connect = l.dial
		a, b := v.pair(t)
		spy.largest.Store(0)
		message := `{"type":"offer"` + strings.Repeat(" ", 32<<10) + "}"
		a.write(t, textFrame(message))
		b.want(t, message)
		largest = int(spy.largest.Load())
	})
	return largest
}

// A readSpy notes the largest read from its connections.
type readSpy struct {
	net.Listener
	largest atomic.Int64
}

func (s *readSpy) Accept() (net.Conn, error) {
	c, err := s.Listener.Accept()
	return readSpied{c, s}, err
}

type readSpied struct {
	net.Conn
	spy *readSpy
}

func (c readSpied) Read(p []byte) (int, error) {
	c.spy.largest.Store(max(c.spy.largest.Load(), int64(len(p))))
	return c.Conn.Read(p)
}

// A developer who reads text sees what was changed, everyone else all.
func TestStartLogsSettings(t *testing.T) {
	for _, tt := range []struct {
		env []string
		all bool
	}{
		{[]string{"DEV=true"}, false},
		{[]string{"DEV=true", "LOG_LEVEL=debug"}, true},
		{[]string{"DEV=true", "LOG_FORMAT=json"}, true},
		{[]string{"DEV=false", "CORS_ORIGINS=https://parley.example"}, true},
	} {
		c := mustLoad(t, nil, append(tt.env, "ROOM_TTL=90s", "PORT=1234")...)
		var names []string
		for _, a := range c.startAttrs() {
			names = append(names, a.Key)
		}
		if want := []string{"ROOM_TTL"}; !tt.all && !slices.Equal(names, want) {
			t.Errorf("%v: %v, want %v", tt.env, names, want)
		} else if tt.all && len(names) != len(configOptions(c)) {
			t.Errorf("%v: %v", tt.env, names)
		}
	}
}

func TestWarnsOfDev(t *testing.T) {
	// An address that is none of this machine's: the server cannot begin to listen.
	var stderr bytes.Buffer
	if exit := run([]string{"-host", "192.0.2.1", "-port", "0"}, environ(), io.Discard, &stderr); exit != 1 {
		t.Errorf("exit status %d", exit)
	}
	if s := stderr.String(); !strings.Contains(s, "level=WARN") || !strings.Contains(s, "192.0.2.1 can be reached from other machines") {
		t.Errorf("no warning:\n%s", s)
	}
}

// Nothing secret is ever logged, at whatever level, whatever goes wrong.
func TestNothingSecretInLogs(t *testing.T) {
	const sid, sdp, token, mail = "sid-4711-secret", "v=0-sdp-secret", "bearer-secret", "mail-secret"
	secrets := []string{sid, sdp, token, mail}
	var log string
	inBubble(t, func(t *testing.T) {
		v := inMemory(t, "DEV=false", "CODE_DIGITS=9", "CORS_ORIGINS=https://a.example", "REDEEM_FAILS=2", "WS_FRAMES_PER_SEC=50", "MAX_QUEUED_BYTES=1KiB")
		v.http.Jar = nil
		code, id := v.mint()
		secrets = append(secrets, code, id)
		unknown := uuid.NewString()
		secrets = append(secrets, unknown)

		// Requests of every kind, most of them wrong.
		headers := []string{"Authorization: Bearer " + token, "Cookie: " + token, "X-Forwarded-For: 192.0.2.1", "Content-Type: application/json"}
		for _, path := range []string{"/rendezvous/code", "/rendezvous/redeem", "/ws", "/whoami", "/healthz", "/nothing", "/" + token, "//rendezvous/" + token} {
			for _, method := range []string{"GET", "POST", "PUT", "OPTIONS", "DELETE"} {
				for _, query := range []string{"", "?appID=" + unknown + "&side=A&sid=" + sid, "?appID=" + sid + "&side=" + token, "?appID=" + id + ";side=A;sid=" + sid, "?%zz=" + token} {
					v.call(method, path+query, `{"code":"`+code+`","sdp":"`+sdp+`"}`, headers...)
					v.call(method, path+query, sdp, append(headers, "Origin: https://"+token+".example")...)
				}
			}
		}

		// WebSockets: refused, taken over, contested, hostile, away, drained.
		a := v.raw(t, wsDial{appID: id, side: "A", sid: sid, v1: true})
		for _, d := range []wsDial{{appID: id, side: "A", sid: sid}, {appID: id, side: "A", sid: token}, {appID: unknown, side: "A", sid: sid}, {appID: unknown, side: "B", v1: true}} {
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			openRaw(c, d)
		}
		a.closed()
		for range 10 { // more takeovers than may be
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			openRaw(c, wsDial{appID: id, side: "A", sid: sid, v1: true})
		}
		b := v.raw(t, wsDial{appID: id, side: "B"})
		b.write(t, textFrame(`{"type":"offer","sdp":"`+sdp+`"}`), textFrame(`{"type":"`+token+`"}`), textFrame(`{"type":"send","payload":"`+strings.Repeat(mail, 200)+`"}`),
			textFrame(sdp), textFrame(`{"type":"telemetry","event":"ice-failed","reason":"`+token+`"}`), textFrame("{\"type\":\"offer\",\"sdp\":\""+sdp+"\xff\"}"))
		b.closed()
		for _, garbage := range []string{"", sdp, "GET /" + token + " HTTP/9.9\r\n\r\n", "GET /" + token + " HTTP/1.1\r\nHost: " + token + "\r\nX: " + strings.Repeat(token, 5000) + "\r\n\r\n", "GET /" + token + " HTTP/1.1\r\nHost: a b\r\n\r\n", "\x16\x03\x01" + token} {
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			go io.WriteString(c, garbage)
			endsAfter(t, c)
			c.Close()
		}
		flood := v.raw(t, wsDial{appID: id, side: "B", sid: sid})
		flood.write(t, bytes.Repeat(textFrame(`{"type":"offer","sdp":"`+sdp+`"}`), 60))
		flood.closed()
		v.stop()
		log = v.log.String()
	})
	if !strings.Contains(log, "TRUSTED_PROXIES") {
		t.Errorf("the log has nothing of what should be in it:\n%s", log)
	}
	for _, secret := range secrets {
		if strings.Contains(log, secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
	if t.Failed() {
		t.Log(log)
	}
}

func TestStartsWithHelp(t *testing.T) {
	exit, stdout, stderr := testkit.RunBinary(t, []string{"-h"}, "PORT=none") // problems do not keep help away
	var usage bytes.Buffer
	writeUsage(&usage)
	if exit != 0 || stdout != usage.String() || stderr != "" {
		t.Errorf("-h: exit status %d\n%s\n%s", exit, stdout, stderr)
	}
}

func TestStartsWithProblems(t *testing.T) {
	exit, stdout, stderr := testkit.RunBinary(t, []string{"-bogus", "-heartbeat", "soon"},
		"PORT=http", "ROOM_TTL=10", "TLS_KEY_FILE=key.pem", "ENVIRONMENT=production", "DEV=true",
		"CORS_ORIGINS=https://me:hunter2@a.example", "CODE_DIGITS=5", "CODE_DIGITS_MAX=4")
	for _, want := range []string{
		"-bogus is not a flag", "-heartbeat (HEARTBEAT) must be a duration", "PORT must be", "ROOM_TTL must have a unit", "TLS_KEY_FILE needs TLS_CERT_FILE",
		"ENVIRONMENT=production contradicts DEV=true", "CORS_ORIGINS must", "CODE_DIGITS_MAX must not be below CODE_DIGITS",
	} {
		if strings.Count("\n"+stderr, "\n"+want) != 1 {
			t.Errorf("stderr lacks a line with %q", want)
		}
	}
	if lines := strings.Count(stderr, "\n"); exit != 2 || lines != 8 || stdout != "" || strings.Contains(stderr, "hunter2") {
		t.Errorf("exit status %d with %d lines, want 2 with 8\n%s%s", exit, lines, stdout, stderr)
	}
}

// What the server starts with is logged, whoever set it, and no secret is.
func TestEffectiveConfiguration(t *testing.T) {
	const secret = "hunter2-hunter2-hunter2-hunter2-hunter2"
	env := []string{"ROOM_TTL=90s", "LOG_FORMAT=json", "TRUSTED_PROXIES=10.1.2.3/8", "TURN_URLS=turn:a.example", "REDIS_URL=redis://:" + secret + "@127.0.0.1:1"}
	for _, o := range configOptions(new(config)) {
		if o.secret && o.name != "REDIS_URL" && o.name != "REDIS_PASSWORD" { // of which only one may be given
			env = append(env, o.name+"="+secret)
		}
	}
	server := testkit.StartBinary(t, env...)
	var starting map[string]string
	for line := range strings.Lines(server.Output()) {
		if json.Unmarshal([]byte(line), &starting) == nil && starting["msg"] == "starting" {
			break
		}
	}
	for _, o := range configOptions(new(config)) {
		got, ok := starting[o.name]
		if !ok {
			t.Errorf("%s is not logged", o.name)
		}
		if o.secret && got != "***" && o.name != "REDIS_PASSWORD" {
			t.Errorf("%s is logged as %q", o.name, got)
		}
	}
	for name, want := range map[string]string{"ROOM_TTL": "1m30s", "HOST": "127.0.0.1", "TRUSTED_PROXIES": "10.0.0.0/8", "MAX_SESSIONS": "100000"} {
		if got := starting[name]; got != want {
			t.Errorf("%s is logged as %q, want %q", name, got, want)
		}
	}
	if strings.Contains(server.Output(), secret) || strings.Contains(server.Output(), "DEV=false") {
		t.Errorf("a secret was printed, or a needless warning:\n%s", server.Output())
	}
}
