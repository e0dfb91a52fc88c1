package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"github.com/prometheus/client_golang/prometheus/testutil"
)

// series returns the values of all metrics, by name and labels.
func (ts *testServer) series() map[string]float64 {
	ts.t.Helper()
	a := ts.call(http.MethodGet, ts.cfg.metricsRoute, "")
	if a.status != http.StatusOK {
		ts.t.Fatalf("metrics: %d %s", a.status, a.text)
	}
	series := make(map[string]float64)
	for line := range strings.Lines(a.text) {
		line = strings.TrimSpace(line)
		if strings.HasPrefix(line, "#") {
			continue
		}
		space := strings.LastIndexByte(line, ' ')
		value, err := strconv.ParseFloat(line[space+1:], 64)
		if err != nil {
			ts.t.Fatalf("metrics: %q: %v", line, err)
		}
		series[line[:space]] = value
	}
	return series
}

// metric returns the value of one metric, which has to be there.
func (ts *testServer) metric(name string) float64 {
	ts.t.Helper()
	v, ok := ts.series()[name]
	if !ok {
		ts.t.Errorf("there is no metric %s", name)
	}
	return v
}

// want fails unless the answer has this status, is JSON that is not to be
// stored, and, past 399, is an error with this code and a sentence that has
// word in it.
func (a httpAnswer) want(t testing.TB, status int, code, word string) {
	t.Helper()
	if a.status != status {
		t.Errorf("status %d %s, want %d", a.status, a.text, status)
	}
	if got := a.header.Get("Content-Type"); got != "application/json" {
		t.Errorf("Content-Type is %q: %s", got, a.text)
	}
	if got := a.header.Get("Cache-Control"); got != "no-store" {
		t.Errorf("Cache-Control is %q", got)
	}
	var fields map[string]any
	if err := json.Unmarshal([]byte(a.text), &fields); err != nil {
		t.Errorf("%s: %v", a.text, err)
	}
	if status < 400 {
		return
	}
	if a.Code != code || len(fields) != 2 {
		t.Errorf("answered %s, want the code %s", a.text, code)
	}
	if !strings.Contains(a.Error, word) || !strings.Contains(a.Error, " ") {
		t.Errorf("the error says %q and not what is wrong: %q", a.Error, word)
	}
	retry := a.header.Get("Retry-After")
	if later := status == http.StatusServiceUnavailable || status == http.StatusTooManyRequests; later != (retry != "") {
		t.Errorf("Retry-After is %q with status %d", retry, status)
	} else if n, err := strconv.Atoi(retry); later && (err != nil || n < 1) {
		t.Errorf("Retry-After is %q", retry)
	}
}

const jsonType = "Content-Type: application/json"

// --- Codes.

func TestMintAnswers(t *testing.T) {
	pad := func(n int) string { return `{"x":"` + strings.Repeat("x", n-len(`{"x":""}`)) + `"}` }
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOM_TTL=10m")
		seen := map[string]bool{}
		mint := func(body string, ttl time.Duration, headers ...string) {
			t.Helper()
			a := ts.call(http.MethodPost, "/rendezvous/code", body, headers...)
			a.want(t, 200, "", "")
			var fields map[string]string
			if err := json.Unmarshal([]byte(a.text), &fields); err != nil || len(fields) != 3 {
				t.Errorf("%s: %s, %v; want three strings", body, a.text, err)
			}
			if !regexp.MustCompile(`^\d{4}$`).MatchString(a.Code) || seen[a.Code] {
				t.Errorf("%s: the code is %q", body, a.Code)
			}
			if !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$`).MatchString(a.AppID) || seen[a.AppID] {
				t.Errorf("%s: the appID is %q", body, a.AppID)
			}
			seen[a.Code], seen[a.AppID] = true, true
			want := time.Now().Add(ttl)
			if off := want.Sub(a.Expiry); off < 0 || off >= time.Millisecond || !strings.HasSuffix(fields["expiresAt"], "Z") {
				t.Errorf("%s: expires at %s, want %s", body, fields["expiresAt"], want.UTC().Format(time.RFC3339Nano))
			}
		}
		mint("", 10*time.Minute)
		mint("", 10*time.Minute, jsonType)
		for _, body := range []string{`{}`, ` { } `, `{"ttl":null}`, `{"TTL":1,"Ttl":"x","other":[{}]}`, `{"ttl":600}`, `{"ttl":600.001}`,
			`{"ttl":1e300}`, `{"ttl":123456789012345678901234567890}`, pad(4096)} {
			mint(body, 10*time.Minute, jsonType)
		}
		mint(`{"ttl":60}`, time.Minute)
		mint(`{"ttl":60}`, time.Minute, "Content-Type: text/plain")
		mint(`{"ttl":6e1,"ttl ":7}`, time.Minute)
		mint(`{"\u0074tl":599.5}`, 599500*time.Millisecond)
		mint(`{"ttl":0.25}`, 250*time.Millisecond)

		for _, body := range []string{`{"ttl":0}`, `{"ttl":-0.0}`, `{"ttl":-1}`, `{"ttl":-1e300}`, `{"ttl":"60"}`, `{"ttl":""}`, `{"ttl":true}`,
			`{"ttl":false}`, `{"ttl":[60]}`, `{"ttl":{}}`} {
			ts.post("/rendezvous/code", body).want(t, 400, "bad_ttl", "positive number of seconds")
		}
		for _, body := range []string{`[]`, `null`, `"ttl"`, `60`, `true`, `{`, `}`, `{"ttl":60`, `{"ttl":60}}`, `{}{}`, `{"ttl":}`, `{"ttl":060}`, `ttl=60`, "\x00"} {
			ts.post("/rendezvous/code", body).want(t, 400, "bad_json", "JSON object")
		}
		for _, body := range []string{pad(4097), pad(100_000), strings.Repeat("x", 4097)} {
			ts.post("/rendezvous/code", body).want(t, 413, "too_large", "4 KiB")
		}
		if got, want := ts.metric("parley_codes_minted_total"), float64(len(seen)/2); got != want {
			t.Errorf("%v codes counted as minted, want %v", got, want)
		}
	})
}

// A number may be longer than any clock; it is a positive one all the same.
func TestMintWithHugeTTL(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for _, ttl := range []string{"1e400", "1" + strings.Repeat("0", 400)} {
			ts.post("/rendezvous/code", `{"ttl":`+ttl+`}`).want(t, 200, "", "")
		}
		ts.post("/rendezvous/code", `{"ttl":-1e400}`).want(t, 400, "bad_ttl", "positive")
	})
}

func TestRedeemAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "REDEEM_FAILS=0")
		redeem := func(form string) {
			t.Helper()
			minted := ts.post("/rendezvous/code", `{"ttl":300}`)
			a := ts.post("/rendezvous/redeem", fmt.Sprintf(form, minted.Code))
			a.want(t, 200, "", "")
			var fields map[string]string
			if err := json.Unmarshal([]byte(a.text), &fields); err != nil || len(fields) != 2 {
				t.Errorf("%s, %v; want two strings", a.text, err)
			}
			if a.AppID != minted.AppID || !a.Expiry.Equal(minted.Expiry) {
				t.Errorf("redeemed %s, minted %s", a.text, minted.text)
			}
		}
		for _, form := range []string{`{"code":"%s"}`, ` { "CODE":7,"code" : "%s", "Code":null,"x":{"code":1} } `, `{"c\u006fde":"%s"}`} {
			redeem(form)
		}
		for _, contentType := range []string{"application/json; charset=utf-8", "Application/JSON", "application/json;charset=\"utf-8\""} {
			code, appID := ts.mint()
			a := ts.call(http.MethodPost, "/rendezvous/redeem", `{"code":"`+code+`"}`, "Content-Type: "+contentType)
			if a.want(t, 200, "", ""); a.AppID != appID {
				t.Errorf("redeemed %s, want %s", a.text, appID)
			}
		}
		code, _ := ts.mint()
		for _, contentType := range []string{"text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/jsonp", "text/json;", "json", ";"} {
			ts.call(http.MethodPost, "/rendezvous/redeem", `{"code":"`+code+`"}`, "Content-Type: "+contentType).
				want(t, 415, "unsupported_media_type", "application/json")
		}
		ts.call(http.MethodPost, "/rendezvous/redeem", `{"code":"`+code+`"}`).want(t, 415, "unsupported_media_type", "application/json")

		for _, value := range []string{`2802`, `null`, `""`, `"123"`, `"1234567890"`, `"12a4"`, `"１２３４"`, `" 1234"`, `"1234 "`, `"1234\n"`, `"+123"`, `"-123"`,
			`"12.4"`, `"0x12"`, `"1_234"`, `["1234"]`, `{}`, `true`, `"` + strings.Repeat("1", 4000) + `"`, `"1234\u0000"`} {
			ts.post("/rendezvous/redeem", `{"code":`+value+`}`).want(t, 400, "bad_code", "4 to 9 digits")
		}
		for _, body := range []string{`{}`, `{"Code":"` + code + `"}`, `{"CODE":"` + code + `"}`, `{"code ":"` + code + `"}`} {
			ts.post("/rendezvous/redeem", body).want(t, 400, "bad_code", "digits")
		}
		for _, body := range []string{``, ` `, `[]`, `null`, `"` + code + `"`, code, `{`, `{"code":"` + code + `"`, `{"code":"` + code + `"} x`, `code=` + code, `{'code':'` + code + `'}`} {
			ts.post("/rendezvous/redeem", body).want(t, 400, "bad_json", "JSON object")
		}
		ts.post("/rendezvous/redeem", `{"x":"`+strings.Repeat("x", 4096)+`","code":"`+code+`"}`).want(t, 413, "too_large", "4 KiB")
		// None of that used the code up.
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`).want(t, 200, "", "")
	})
}

// Unknown, used and expired are one and the same answer.
func TestGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "REDEEM_FAILS=0", "CODE_DIGITS_MAX=6")
		redeem := func(code string) httpAnswer { return ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`) }
		var answers []httpAnswer
		used, _ := ts.mint()
		redeem(used).want(t, 200, "", "")
		answers = append(answers, redeem(used))

		// Not when the janitor comes: it is the clock that counts.
		expired := ts.post("/rendezvous/code", `{"ttl":62}`).Code
		lives := ts.post("/rendezvous/code", `{"ttl":62}`).Code
		time.Sleep(62*time.Second - time.Millisecond)
		redeem(lives).want(t, 200, "", "")
		pass(time.Millisecond)
		answers = append(answers, redeem(expired), redeem(lives))
		pass(time.Minute) // the janitor has been here
		answers = append(answers, redeem(expired))

		code, _ := ts.mint()
		for _, unknown := range []string{"0" + code, code + "0", "00000", "999999999", "000000000"} {
			answers = append(answers, redeem(unknown))
		}
		for _, a := range answers {
			a.want(t, 410, "gone", "unknown, has been used, or has expired")
			a.header.Del("Date")
			if a.text != answers[0].text || fmt.Sprint(a.header) != fmt.Sprint(answers[0].header) {
				t.Errorf("answered %s %v, and another time %s %v", a.text, a.header, answers[0].text, answers[0].header)
			}
		}
		s := ts.series()
		if got, want := s[`parley_redeems_total{result="gone"}`], float64(len(answers)); got != want {
			t.Errorf("%v redeems counted as gone, want %v", got, want)
		}
		if got := s[`parley_redeems_total{result="ok"}`]; got != 2 {
			t.Errorf("%v redeems counted as ok, want 2", got)
		}
	})
}

// Of any number of simultaneous redeems of one code exactly one wins.
func TestOneRedeemWins(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "REDEEM_FAILS=0")
		for range 5 {
			code, appID := ts.mint()
			start := make(chan struct{})
			answers := make([]httpAnswer, 100)
			var all sync.WaitGroup
			for i := range answers {
				all.Go(func() {
					<-start
					answers[i] = ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
				})
			}
			synctest.Wait()
			close(start)
			all.Wait()
			won := 0
			for _, a := range answers {
				if a.status == http.StatusOK && a.AppID == appID {
					won++
				} else {
					a.want(t, 410, "gone", "used")
				}
			}
			if won != 1 {
				t.Errorf("%d redeems of one code won", won)
			}
		}
	})
}

// With all codes taken the answer says to the second when one frees, and then it
// does.
func TestCodesExhausted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOM_TTL=10m", "REDEEM_FAILS=0")
		seen := map[string]bool{}
		first := ts.post("/rendezvous/code", `{"ttl":90}`).Code
		seen[first] = true
		for range 9999 {
			code, _, err := ts.codes.Mint(t.Context(), sessionID{}, 10*time.Minute)
			if err != nil || seen[code] {
				t.Fatalf("code %s after %d: %v", code, len(seen), err)
			}
			seen[code] = true
		}
		if got := ts.metric("parley_codes_active"); got != 10_000 {
			t.Errorf("%v codes active, want 10,000", got)
		}
		sessions := ts.metric("parley_sessions_active")
		exhausted := func(want string) {
			t.Helper()
			a := ts.post("/rendezvous/code", "")
			a.want(t, 503, "codes_exhausted", "every code is taken")
			if got := a.header.Get("Retry-After"); got != want {
				t.Errorf("Retry-After is %s, want %s", got, want)
			}
		}
		exhausted("90")
		pass(500 * time.Millisecond)
		exhausted("90")
		pass(500 * time.Millisecond)
		exhausted("89")
		if got := ts.metric("parley_sessions_active"); got != sessions {
			t.Errorf("%v sessions, %v before codes were refused", got, sessions)
		}
		// A redeemed code is not free before it has expired.
		ts.post("/rendezvous/redeem", `{"code":"`+first+`"}`).want(t, 200, "", "")
		exhausted("89")
		pass(89*time.Second - time.Millisecond)
		exhausted("1")
		pass(time.Millisecond)
		if a := ts.post("/rendezvous/code", ""); a.Code != first {
			t.Errorf("minted %s, and only %s was free", a.text, first)
		}
		exhausted("510")
		time.Sleep(510 * time.Second)
		ts.post("/rendezvous/code", "").want(t, 200, "", "")
	})
}

func TestMaxSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "MAX_SESSIONS=3")
		upgrade := func(appID string) httpAnswer {
			t.Helper()
			return ts.call(http.MethodGet, "/ws?side=A&appID="+appID, "", upgradeHeaders...)
		}
		a := ts.join(wsDial{appID: testApp, side: "A"})
		_, appID := ts.mint()
		ts.post("/rendezvous/code", `{"ttl":60}`).want(t, 200, "", "")

		ts.post("/rendezvous/code", "").want(t, 503, "at_capacity", "sessions")
		upgrade(otherApp).want(t, 503, "at_capacity", "sessions")
		v1 := ts.join(wsDial{appID: otherApp, side: "A", v1: true})
		v1.wantClosed(closeCapacity, "at_capacity")
		// Those that are open are not affected.
		ts.join(wsDial{appID: testApp, side: "B"}).want(frameRoomFull)
		ts.join(wsDial{appID: appID, side: "B"}).want()

		pass(time.Minute)
		ts.post("/rendezvous/redeem", `{"code":"0000"}`) // does not matter
		pass(15 * time.Second)
		b := ts.join(wsDial{appID: otherApp, side: "B"})
		b.want()
		ts.post("/rendezvous/code", "").want(t, 503, "at_capacity", "sessions")
		b.leave(websocket.StatusNormalClosure)
		synctest.Wait()
		ts.post("/rendezvous/code", "").want(t, 200, "", "")
		a.settled()
	})
}

// --- Methods, paths, and what asks for nothing in particular.

func TestMethodsAndPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for path, allow := range map[string]string{
			"/rendezvous/code":   "POST",
			"/rendezvous/redeem": "POST",
			"/ws":                "GET, HEAD",
			"/healthz":           "GET, HEAD",
			"/readyz":            "GET, HEAD",
			"/version":           "GET, HEAD",
			"/metrics":           "GET, HEAD",
		} {
			for _, method := range []string{"GET", "POST", "PUT", "PATCH", "DELETE", "TRACE", "BREW", "get"} {
				if slices.Contains(strings.Split(allow, ", "), method) {
					continue
				}
				a := ts.call(method, path, "", jsonType)
				a.want(t, 405, "method_not_allowed", method)
				// That a path also takes HEAD need not be said.
				if got := a.header.Get("Allow"); got != allow && got+", HEAD" != allow {
					t.Errorf("%s %s: Allow is %q, want %q", method, path, got, allow)
				}
			}
		}
		for _, path := range []string{"/nothing", "/rendezvous", "/rendezvous/", "/rendezvous/code/", "/rendezvous/code/1234", "/Healthz", "/healthz/",
			"/ws/", "/ws/x", "/metrics/x", "/favicon.ico", "/%00", "/healthz%2f", "/.env", "/api"} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				ts.call(method, path, "").want(t, 404, "not_found", "path")
			}
		}
		for _, path := range []string{"/healthz", "/readyz", "/version", "/metrics"} {
			get, head := ts.call("GET", path, ""), ts.call("HEAD", path, "")
			if head.status != get.status || head.text != "" || head.header.Get("Content-Type") != get.header.Get("Content-Type") {
				t.Errorf("HEAD %s: %d %q", path, head.status, head.text)
			}
		}
	})
}

// A path that is only written oddly is a path like any other.
func TestOddPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		ts.http.CheckRedirect = func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
		for _, path := range []string{"//healthz", "/x/../healthz", "/./healthz", "/rendezvous//code"} {
			ts.call("GET", path, "").want(t, 404, "not_found", "path")
		}
	})
}

// What asks for no path at all is answered like any unknown one.
func TestOddTargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for request, status := range map[string]int{
			"GET * HTTP/1.1":                         404,
			"POST * HTTP/1.1":                        404,
			"CONNECT parley.test:443 HTTP/1.1":       404,
			"GET http://other.test/nothing HTTP/1.1": 404,
			"GET http://other.test/healthz HTTP/1.1": 200,
			"GET /healthz?;;%zz HTTP/1.1":            200,
			"GET /healthz HTTP/1.0":                  200,
		} {
			c, err := ts.net.dialFrom("192.0.2.1")
			if err != nil {
				t.Fatal(err)
			}
			io.WriteString(c, request+"\r\nHost: parley.test\r\n\r\n")
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(request, err)
			}
			body, _ := io.ReadAll(res.Body)
			a := httpAnswer{status: res.StatusCode, header: res.Header, text: string(body)}
			json.Unmarshal(body, &a)
			t.Log(request)
			a.want(t, status, map[int]string{404: "not_found"}[status], "")
			c.Close()
		}
	})
}

// A faultyHub has a bug.
type faultyHub struct{ hub }

func (faultyHub) Get(context.Context, sessionID) (meta, int, error) { panic("a bug") }

func (faultyHub) Join(context.Context, sessionID, joinRequest, func(error)) (seat, view, error) {
	panic("a bug")
}

// A bug that ends one request is answered, and the operator sees it; everyone
// else goes on.
func TestPanicIsAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "DEV=false", "CORS_ORIGINS=https://app.example")
		ts.hub = faultyHub{ts.hub}
		for range 2 {
			a := ts.call(http.MethodGet, "/ice-servers?appID="+testApp, "", "Origin: https://app.example")
			a.want(t, 500, "internal_error", "fault")
			if got := a.header.Get("Access-Control-Allow-Origin"); got != "https://app.example" {
				t.Errorf("it can be read by %q", got)
			}
		}
		if log := ts.log.String(); strings.Count(log, `level=ERROR msg="request failed" panic="a bug" stack=`) != 2 || strings.Contains(log, testApp) {
			t.Errorf("the log has\n%s", log)
		}
		// A connection that never was is not counted.
		ts.call(http.MethodGet, "/ws?side=A&appID="+testApp, "", upgradeHeaders...).want(t, 500, "internal_error", "fault")
		if n := ts.clients.count(); n != 0 {
			t.Errorf("%d connections are counted", n)
		}
		ts.call(http.MethodGet, "/healthz", "").want(t, 200, "", "")
	})
}

// Whoever writes a path nearly right is told the right one.
func TestNearPaths(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open", "METRICS_ROUTE=/Numbers", "DEMO=true")
		for path, near := range map[string]string{
			"/ws/":                      "/ws",
			"//ws":                      "/ws",
			"/WS":                       "/ws",
			"/./ws":                     "/ws",
			"/x/../ws":                  "/ws",
			"/ws/.":                     "/ws",
			"/ws%2f":                    "/ws",
			"/rendezvous/code/":         "/rendezvous/code",
			"/rendezvous//code":         "/rendezvous/code",
			"/Rendezvous/Code/":         "/rendezvous/code",
			"/api/rooms/":               "/api/rooms",
			"/api/rooms/ABCDEF/":        "/api/rooms/{room}",
			"/API/rooms/ABCDEF":         "/api/rooms/{room}",
			"//ws/signal/ABCDEF":        "/ws/signal/{room}",
			"/Healthz":                  "/healthz",
			"/Numbers/":                 "/Numbers",
			"/web/Parley.JS":            "/web/parley.js",
			"//":                        "/",
			"/nothing":                  "",
			"/nothing/":                 "",
			"/ws/x":                     "",
			"/ws/signal":                "",
			"/metrics":                  "",
			"/%00":                      "",
			"/rendezvous/code/1234":     "",
			"/api/rooms/ABCDEF/members": "",
		} {
			for _, method := range []string{"GET", "POST", "DELETE"} {
				a := ts.call(method, path, "")
				a.want(t, 404, "not_found", "path")
				want := "there is nothing at this path"
				if near != "" {
					want += "; there is at " + near
				}
				if a.Error != want {
					t.Errorf("%s %s is answered %q, want %q", method, path, a.Error, want)
				}
			}
		}
	})
}

// A parameter is given once, and written as it should be; others do not matter.
func TestQueries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		room := "/ws/signal/" + ts.openRoom(`{"password":"x"}`).Code + "?displayName=Ada"
		pair, ice := "/ws?side=A&appID="+testApp, "/ice-servers?appID="+testApp
		for _, test := range []struct{ path, code, word string }{
			{pair + "&appID=" + testApp, "bad_app_id", "appID must be given once"},
			{"/ws?side=A&appID=a&appID=b", "bad_app_id", "appID must be given once"},
			{pair + "&side=A", "bad_side", "side must be given once"},
			{pair + "&side=B", "bad_side", "side must be given once"},
			{pair + "&s%69de=B", "bad_side", "side must be given once"},
			{pair + "&sid=a&sid=a", "bad_sid", "sid must be given once"},
			{pair + "&sid=&sid=a", "bad_sid", "sid must be given once"},
			{pair + "&sid=100%", "bad_sid", "sid is not percent-encoded"},
			{pair + "&sid=%zz", "bad_sid", "sid is not percent-encoded"},
			{pair + "&sid=a;b", "bad_sid", "sid must have %3B"},
			{"/ws?side=%4&appID=" + testApp, "bad_side", "side is not percent-encoded"},
			{"/ws?side=A;appID=" + testApp, "bad_app_id", "UUID"},
			{"/ws?appID=" + testApp + ";side=A", "bad_app_id", "appID must have %3B"},
			{"/ws?side=A&appID=%", "bad_app_id", "appID is not percent-encoded"},
			{ice + "&appID=" + testApp, "bad_app_id", "appID must be given once"},
			{"/ice-servers?appID=%g0", "bad_app_id", "appID is not percent-encoded"},
			{room + "&displayName=Bob", "bad_display_name", "displayName must be given once"},
			{room + "%", "bad_display_name", "displayName is not percent-encoded"},
			{room + ";Bob", "bad_display_name", "displayName must have %3B"},
			{room + "&password=x&password=y", "bad_password", "password must be given once"},
			{room + "&password=100%", "bad_password", "password is not percent-encoded"},
			{room + "&resume=x&resume=y", "bad_resume", "resume must be given once"},
			{room + "&resume=%x", "bad_resume", "resume is not percent-encoded"},
		} {
			for _, protocol := range []string{"", subprotocolV1} {
				t.Log(test.path)
				ts.call(http.MethodGet, test.path, "", append(upgradeHeaders, "Sec-WebSocket-Protocol: "+protocol)...).want(t, 400, test.code, test.word)
			}
		}
		for _, fine := range []string{"&sid=a%3Bb%25", "&sid", "&sid=a+b", "&x=%zz&x=;&%zz", "&&", "&side2=B&SIDE=B"} {
			if a := ts.call(http.MethodGet, pair+fine, ""); a.status != 426 { // all that is wrong is that it is no upgrade
				t.Errorf("%s is answered %d %s", fine, a.status, a.text)
			}
		}
		// What net/http refuses itself is no reason to stop.
		c, err := ts.net.dialFrom("192.0.2.1")
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET /healthz%zz HTTP/1.1\r\nHost: parley.test\r\n\r\n")
		if res, err := http.ReadResponse(bufio.NewReader(c), nil); err != nil || res.StatusCode != 400 {
			t.Errorf("a path that is not percent-encoded is answered %v %v", res, err)
		}
	})
}

// An offer to compress, as every browser makes it, is not agreed to, and hinders
// nothing: RFC 7692 section 5.
func TestCompressionOffer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for i, offer := range []string{
			"permessage-deflate; client_max_window_bits",
			"permessage-deflate; server_no_context_takeover; client_no_context_takeover, permessage-deflate",
			"x-webkit-deflate-frame",
			"permessage-deflate; server_max_window_bits=99",
			";;",
		} {
			appID := fmt.Sprintf("123e4567-e89b-12d3-a456-%012d", i)
			a, res, err := ts.dial(wsDial{appID: appID, side: "A", header: http.Header{"Sec-WebSocket-Extensions": {offer}}})
			if err != nil {
				t.Fatal(offer, err)
			}
			if agreed := res.Header.Values("Sec-WebSocket-Extensions"); len(agreed) > 0 {
				t.Errorf("of %q the server agrees to %q", offer, agreed)
			}
			b := ts.join(wsDial{appID: appID, side: "B"})
			a.want(frameRoomFull)
			b.want(frameRoomFull)
			offered := `{"type":"offer","sdp":"` + strings.Repeat("x", 4096) + `"}`
			a.send(offered)
			b.want(offered)
			b.send(`{"type":"answer"}`)
			a.want(`{"type":"answer"}`)
		}
	})
}

// RFC 8259 section 8.1: JSON begins with no byte order mark.
func TestByteOrderMark(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "ROOMS=open")
		for _, path := range []string{"/rendezvous/code", "/rendezvous/redeem", "/api/rooms"} {
			ts.post(path, "\ufeff{}").want(t, 400, "bad_json", "JSON")
		}
	})
}

func TestStatusAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		ts.call("GET", "/healthz", "").want(t, 200, "", "")
		ts.call("GET", "/readyz?x=y", "").want(t, 200, "", "")
		a := ts.call("GET", "/version", "")
		a.want(t, 200, "", "")
		var v map[string]string
		if err := json.Unmarshal([]byte(a.text), &v); err != nil || len(v) != 3 || v["version"] == "" || v["commit"] == "" || !strings.HasPrefix(v["go"], "go1.") {
			t.Errorf("version: %s, %v", a.text, err)
		}
		var out strings.Builder
		if exit := run([]string{"version"}, environ(), &out, io.Discard); exit != 0 || out.String() != fmt.Sprintf("parley %s (commit %s, %s)\n", v["version"], v["commit"], v["go"]) {
			t.Errorf("parley version: %d %s", exit, out.String())
		}
	})
}

// The names, types and help of all metrics are as Prometheus' own linter wants.
func TestMetricsLint(t *testing.T) {
	for _, env := range [][]string{{"ROOMS=open"}, {"REDIS_URL=redis://127.0.0.1:1", "ROOMS=open"}} {
		p := newParley(mustLoad(t, nil, env...), slog.New(slog.DiscardHandler))
		problems, err := testutil.GatherAndLint(p.metrics.registry)
		if err != nil || len(problems) > 0 {
			t.Errorf("%v: %v, %v", env, problems, err)
		}
	}
}

// --- The upgrade's refusals.

var upgradeHeaders = []string{"Connection: keep-alive, Upgrade", "Upgrade: WebSocket", "Sec-WebSocket-Version: 13", "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA=="}

func TestUpgradeRefusals(t *testing.T) {
	without := func(name string, more ...string) []string {
		var headers []string
		for _, h := range upgradeHeaders {
			if !strings.HasPrefix(h, name+":") {
				headers = append(headers, h)
			}
		}
		return append(headers, more...)
	}
	good := "/ws?side=A&appID=" + testApp
	tests := []struct {
		name, path string
		headers    []string
		status     int
		code, word string
	}{
		{"no appID", "/ws?side=A", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"no parameters", "/ws", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"empty appID", "/ws?side=A&appID=", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"word as appID", "/ws?side=A&appID=hello", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID without dashes", "/ws?side=A&appID=" + strings.ReplaceAll(testApp, "-", ""), upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID in braces", "/ws?side=A&appID={" + testApp + "}", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID as URN", "/ws?side=A&appID=urn:uuid:" + testApp, upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID with a letter too many", "/ws?side=A&appID=" + testApp + "0", upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID with a wrong letter", "/ws?side=A&appID=g" + testApp[1:], upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"appID of another case of name", "/ws?side=A&appid=" + testApp, upgradeHeaders, 400, "bad_app_id", "UUID"},
		{"no side", "/ws?appID=" + testApp, upgradeHeaders, 400, "bad_side", "A or B"},
		{"side C", "/ws?side=C&appID=" + testApp, upgradeHeaders, 400, "bad_side", "A or B"},
		{"side a", "/ws?side=a&appID=" + testApp, upgradeHeaders, 400, "bad_side", "A or B"},
		{"side AB", "/ws?side=AB&appID=" + testApp, upgradeHeaders, 400, "bad_side", "A or B"},
		{"sid of 129 bytes", good + "&sid=" + strings.Repeat("s", 129), upgradeHeaders, 400, "bad_sid", "128"},
		{"sid of 130 bytes in 65 letters", good + "&sid=" + strings.Repeat("%C3%A9", 65), upgradeHeaders, 400, "bad_sid", "128"},
		{"curl", good, nil, 426, "upgrade_required", "WebSocket"},
		{"curl of nothing", "/ws", nil, 426, "upgrade_required", "WebSocket"},
		{"no Upgrade", good, without("Upgrade"), 426, "upgrade_required", "WebSocket"},
		{"no Connection", good, without("Connection"), 426, "upgrade_required", "WebSocket"},
		{"another protocol", good, without("Upgrade", "Upgrade: h2c"), 426, "upgrade_required", "WebSocket"},
		{"old version", good, without("Sec-WebSocket-Version", "Sec-WebSocket-Version: 8"), 426, "upgrade_required", "13"},
		{"no version", good, without("Sec-WebSocket-Version"), 426, "upgrade_required", "13"},
		{"no key", good, without("Sec-WebSocket-Key"), 400, "bad_upgrade", "Sec-WebSocket-Key"},
		{"short key", good, without("Sec-WebSocket-Key", "Sec-WebSocket-Key: AQID"), 400, "bad_upgrade", "Sec-WebSocket-Key"},
		{"two keys", good, append(upgradeHeaders, "Sec-WebSocket-Key: AQIDBAUGBwgJCgsMDQ4PEA=="), 400, "bad_upgrade", "Sec-WebSocket-Key"},
	}
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for _, test := range tests {
			t.Log(test.name)
			a := ts.call(http.MethodGet, test.path, "", test.headers...)
			a.want(t, test.status, test.code, test.word)
			if test.status == 426 && (!strings.EqualFold(a.header.Get("Upgrade"), "websocket") || !strings.EqualFold(a.header.Get("Connection"), "upgrade")) {
				// RFC 9110 section 15.5.22
				t.Errorf("426 with Upgrade %q and Connection %q", a.header.Get("Upgrade"), a.header.Get("Connection"))
			}
			if strings.Contains(test.name, "version") && a.header.Get("Sec-WebSocket-Version") != "13" {
				t.Errorf("Sec-WebSocket-Version is %q", a.header.Get("Sec-WebSocket-Version"))
			}
			// A client of parley.v1 sees mistakes in the parameters as HTTP too.
			ts.call(http.MethodGet, test.path, "", append(test.headers, "Sec-WebSocket-Protocol: parley.v1")...).want(t, test.status, test.code, test.word)
		}
		if n := ts.metric("parley_sessions_active"); n != 0 {
			t.Errorf("%v sessions after refusals", n)
		}

		// The form of the rest is free.
		longest := ts.join(wsDial{appID: testApp, side: "A", sid: strings.Repeat("s", 128)})
		longest.want()
		ts.join(wsDial{appID: strings.ToUpper(testApp), side: "B"}).want(frameRoomFull)
		longest.want(frameRoomFull)
	})
}

// Only a GET can be upgraded: any other method leaves the seats alone.
func TestUpgradeIsAGet(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		b := ts.join(wsDial{appID: testApp, side: "B"})
		for _, method := range []string{"POST", "PUT", "HEAD"} {
			a := ts.call(method, "/ws?side=A&appID="+testApp, "", upgradeHeaders...)
			if a.status == 101 || a.status < 400 || a.header.Get("Content-Type") != "application/json" {
				t.Errorf("%s: %d %v", method, a.status, a.header)
			}
			b.want()
		}
	})
}

func TestMintedSessionsOnly(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "APP_IDS=minted", "ROOM_TTL=1m")
		upgrade := func(appID string) httpAnswer {
			t.Helper()
			return ts.call(http.MethodGet, "/ws?side=A&appID="+appID, "", upgradeHeaders...)
		}
		_, appID := ts.mint()
		upgrade(testApp).want(t, 404, "unknown_session", "unknown or has expired")
		v1 := ts.join(wsDial{appID: testApp, side: "A", v1: true})
		v1.wantClosed(closeUnknown, "unknown_session")
		if got := v1.take(); got != nil {
			t.Errorf("who was refused received %q", got)
		}

		// A session lives while its code does, and while anyone is connected.
		a := ts.join(wsDial{appID: appID, side: "A"})
		a.leave(websocket.StatusNormalClosure)
		pass(time.Minute - time.Millisecond)
		a = ts.join(wsDial{appID: appID, side: "A"})
		pass(time.Hour)
		b := ts.join(wsDial{appID: appID, side: "B"})
		b.want(frameRoomFull)
		a.leave(websocket.StatusNormalClosure)
		b.leave(websocket.StatusNormalClosure)
		synctest.Wait()
		upgrade(appID).want(t, 404, "unknown_session", "unknown or has expired")
		_, unused := ts.mint()
		time.Sleep(time.Minute)
		upgrade(unused).want(t, 404, "unknown_session", "unknown or has expired")
	})
}

// --- Limits of a request.

func TestSlowAndLargeRequests(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		send := func(text string) (status string, took time.Duration) {
			t.Helper()
			conn, err := ts.net.dial()
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			start := time.Now()
			io.WriteString(conn, text)
			res, err := http.ReadResponse(bufio.NewReader(conn), nil)
			if err == nil {
				status = res.Status
			}
			return status, time.Since(start)
		}
		for name, text := range map[string]string{
			"half a header": "GET /healthz HTTP/1.1\r\nHost: parley.test\r\nX-",
			"half a body":   "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nContent-Length: 100\r\n\r\n{",
			"nothing":       "",
		} {
			if status, took := send(text); took > 30*time.Second || strings.HasPrefix(status, "2") {
				t.Errorf("%s: %q after %v", name, status, took)
			}
		}
		header := func(n int) string {
			return "GET /healthz HTTP/1.1\r\nHost: parley.test\r\nX-Long: " + strings.Repeat("x", n) + "\r\n\r\n"
		}
		if status, _ := send(header(15 << 10)); status != "200 OK" {
			t.Errorf("a header of 15 KiB: %q", status)
		}
		if status, _ := send(header(17 << 10)); status != "431 Request Header Fields Too Large" {
			t.Errorf("a header of 17 KiB: %q", status)
		}
	})
}

// --- Metrics.

// All series are there from the start, at zero.
func TestMetricsFromTheStart(t *testing.T) {
	want := []string{
		"parley_codes_active", "parley_codes_minted_total",
		`parley_redeems_total{result="ok"}`, `parley_redeems_total{result="gone"}`, `parley_redeems_total{result="bad"}`,
		"parley_ws_connections", "parley_ws_connections_total", "parley_sessions_active",
		`parley_frame_bytes_total{direction="in"}`, `parley_frame_bytes_total{direction="out"}`,
		"parley_mailbox_bytes",
		"parley_ws_rtt_seconds_count", "parley_ws_rtt_seconds_sum",
		"parley_time_to_first_seconds_count", "parley_time_to_first_seconds_sum",
		`parley_sessions_established_total{mode="other"}`, `parley_sessions_established_total{mode="relay"}`, `parley_sessions_established_total{mode="direct"}`,
		`parley_sessions_failed_total{reason="other"}`,
	}
	for _, code := range []string{"1000", "1001", "1002", "1006", "1007", "1008", "1009", "1011", "4408", "4413", "4429", "4500", "4504", "other"} {
		want = append(want, `parley_ws_closes_total{code="`+code+`"}`)
	}
	for _, direction := range []string{"in", "out"} {
		for _, name := range []string{"offer", "answer", "ice", "sender_ready", "bye", "other"} {
			want = append(want, `parley_frames_total{direction="`+direction+`",type="`+name+`"}`)
		}
	}
	for _, name := range []string{"send", "hello", "delivered", "ping", "telemetry"} {
		want = append(want, `parley_frames_total{direction="in",type="`+name+`"}`)
	}
	for _, name := range []string{"deliver", "queued", "room_full", "peer_left", "pong", "error", "welcome", "peer_joined", "peer_away", "code_contested"} {
		want = append(want, `parley_frames_total{direction="out",type="`+name+`"}`)
	}
	for _, code := range []string{"at_capacity", "codes_exhausted", "too_many_codes", "too_many_connections"} {
		want = append(want, `parley_refused_total{code="`+code+`"}`)
	}
	for _, reason := range []string{"peer_absent", "mailbox_full", "over_capacity", "stale", "session_expired"} {
		want = append(want, `parley_frames_dropped_total{reason="`+reason+`"}`)
	}
	want = append(want, "parley_turn_allocations", `parley_turn_bytes_total{direction="in"}`, `parley_turn_bytes_total{direction="out"}`)
	for _, reason := range []string{"malformed", "too_large", "no_allocation", "no_peer", "other_session", "no_permission", "rate", "queue_full"} {
		want = append(want, `parley_turn_dropped_total{reason="`+reason+`"}`)
	}
	for _, reason := range []string{"unauthorized", "expired", "session_gone", "full", "session_full", "forbidden_peer", "transport", "channels",
		"rate", "busy", "malformed", "too_large", "silent"} {
		want = append(want, `parley_turn_refused_total{reason="`+reason+`"}`)
	}
	for _, result := range []string{"resumed", "takeover", "refused"} {
		want = append(want, `parley_resumes_total{result="`+result+`"}`)
	}
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "CODE_DIGITS=5")
		got := ts.series()
		for _, name := range want {
			if v, ok := got[name]; !ok || v != 0 {
				t.Errorf("%s is %v at the start (there: %v), want 0", name, v, ok)
			}
		}
		if got["parley_code_digits"] != 5 {
			t.Errorf("parley_code_digits is %v, want 5", got["parley_code_digits"])
		}
		for _, name := range []string{"go_goroutines", "process_open_fds", "process_resident_memory_bytes"} {
			if got[name] <= 0 {
				t.Errorf("%s is %v", name, got[name])
			}
		}
		for name, v := range got {
			if strings.HasPrefix(name, "parley_") && v != 0 && !strings.HasPrefix(name, "parley_build_info") && !strings.HasPrefix(name, "parley_code_digits") {
				t.Errorf("%s is %v at the start", name, v)
			}
		}
		if a := ts.call("GET", "/metrics", ""); !strings.HasPrefix(a.header.Get("Content-Type"), "text/plain") {
			t.Errorf("Content-Type is %q", a.header.Get("Content-Type"))
		}
		if a := ts.call("GET", "/metrics", ""); !strings.Contains(a.text, "# HELP parley_codes_active ") || !strings.Contains(a.text, "# TYPE parley_ws_rtt_seconds histogram") {
			t.Error("the metrics do not say what they are")
		}
	})
}

// What is running is in build_info's labels.
func TestBuildInfo(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t)
		for name, v := range ts.series() {
			if strings.HasPrefix(name, "parley_build_info{") && v == 1 {
				for _, label := range []string{`version="` + ts.version.Version + `"`, `commit="` + ts.version.Commit + `"`} {
					if !strings.Contains(name, label) {
						t.Errorf("%s has no %s", name, label)
					}
				}
				return
			}
		}
		t.Error("there is no parley_build_info with labels")
	})
}

func TestMetricsMove(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "REDEEM_FAILS=0")
		old := ts.series()
		moved := func(what string, want map[string]float64) {
			t.Helper()
			synctest.Wait()
			now := ts.series()
			for name, v := range now {
				if by := v - old[name]; strings.HasPrefix(name, "parley_") && by != want[name] {
					t.Errorf("%s: %s moved by %v, want %v", what, name, by, want[name])
				}
			}
			old = now
		}
		moved("nothing", nil)
		code, appID := ts.mint()
		moved("mint", map[string]float64{"parley_codes_active": 1, "parley_codes_minted_total": 1, "parley_sessions_active": 1})
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
		moved("redeem", map[string]float64{`parley_redeems_total{result="ok"}`: 1})
		ts.post("/rendezvous/redeem", `{"code":"`+code+`"}`)
		moved("redeem again", map[string]float64{`parley_redeems_total{result="gone"}`: 1})
		ts.post("/rendezvous/redeem", `{"code":1}`)
		ts.call("POST", "/rendezvous/redeem", `{}`)
		moved("bad redeems", map[string]float64{`parley_redeems_total{result="bad"}`: 2})

		a := ts.join(wsDial{appID: appID, side: "A"})
		moved("join", map[string]float64{"parley_ws_connections": 1, "parley_ws_connections_total": 1})
		offer := `{"type":"offer"}`
		a.send(offer)
		moved("offer", map[string]float64{`parley_frames_total{direction="in",type="offer"}`: 1, `parley_frame_bytes_total{direction="in"}`: float64(len(offer)),
			"parley_mailbox_bytes": float64(len(offer) + frameCost)})
		b := ts.join(wsDial{appID: appID, side: "B"})
		moved("the other joins", map[string]float64{"parley_ws_connections": 1, "parley_ws_connections_total": 1,
			`parley_frames_total{direction="out",type="offer"}`: 1, `parley_frames_total{direction="out",type="room_full"}`: 2,
			`parley_frame_bytes_total{direction="out"}`: float64(len(offer) + 2*len(frameRoomFull)), "parley_mailbox_bytes": -float64(len(offer) + frameCost)})
		bad := "nonsense"
		b.send(bad)
		answer := b.settled()
		moved("nonsense", map[string]float64{`parley_frames_total{direction="in",type="other"}`: 1, `parley_frame_bytes_total{direction="in"}`: float64(len(bad)),
			`parley_frames_total{direction="out",type="error"}`: 1, `parley_frame_bytes_total{direction="out"}`: float64(len(answer[len(answer)-1]))})
		b.leave(websocket.StatusNormalClosure)
		moved("leave", map[string]float64{"parley_ws_connections": -1, `parley_ws_closes_total{code="1000"}`: 1,
			`parley_frames_total{direction="out",type="peer_left"}`: 1, `parley_frame_bytes_total{direction="out"}`: float64(len(framePeerLeft))})
		a.leave(4321)
		moved("leave with a code of one's own", map[string]float64{"parley_ws_connections": -1, `parley_ws_closes_total{code="other"}`: 1})
		pass(11 * time.Minute)
		moved("expiry", map[string]float64{"parley_codes_active": -1, "parley_sessions_active": -1})
	})
}

func TestMetricsRoute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newSettledServer(t, "METRICS_ROUTE=/internal/numbers")
		if got := ts.metric("parley_ws_connections"); got != 0 {
			t.Errorf("%v connections", got)
		}
		ts.call("GET", "/metrics", "").want(t, 404, "not_found", "path")
	})
}

// What is in web/ is what is served, byte for byte, with a type that browsers
// take; and nothing of it is fetched twice.
func TestWebFiles(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		types := map[string]string{".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".mjs": "text/javascript", ".json": "application/json"}
		seen := 0
		eachWebFile(t, func(name string, content []byte) {
			seen++
			url := "/" + name
			if name == "web/index.html" {
				url = "/"
			}
			a := ts.call(http.MethodGet, url, "")
			if a.status != http.StatusOK || a.text != string(content) {
				t.Errorf("%s: %d, %d bytes of %d", url, a.status, len(a.text), len(content))
			}
			want := types[filepath.Ext(name)]
			if want == "" {
				want = "text/plain"
			}
			if got := a.header.Get("Content-Type"); !strings.HasPrefix(got, want+";") && got != want {
				t.Errorf("%s is %q, want %s", url, got, want)
			}
			if a.header.Get("X-Content-Type-Options") != "nosniff" || a.header.Get("Cache-Control") != "no-cache" {
				t.Errorf("%s: %v", url, a.header)
			}
			etag := a.header.Get("ETag")
			if a := ts.call(http.MethodGet, url, "", "If-None-Match: "+etag); a.status != http.StatusNotModified || a.text != "" {
				t.Errorf("%s with its ETag %s: %d, %d bytes", url, etag, a.status, len(a.text))
			}
			if a := ts.call(http.MethodGet, url, "", `If-None-Match: "another"`); a.status != http.StatusOK {
				t.Errorf("%s with another ETag: %d", url, a.status)
			}
			if a := ts.call(http.MethodHead, url, ""); a.status != http.StatusOK || a.text != "" || a.header.Get("ETag") != etag {
				t.Errorf("HEAD %s: %d %q", url, a.status, a.text)
			}
			if a := ts.call(http.MethodPost, url, ""); a.status != http.StatusMethodNotAllowed {
				t.Errorf("POST %s: %d", url, a.status)
			}
			if shared := a.header.Get("Access-Control-Allow-Origin") == "*"; shared != strings.HasPrefix(name, "web/parley.") {
				t.Errorf("%s for pages of other origins: %v", url, shared)
			}
		})
		if seen < 10 {
			t.Errorf("only %d files", seen)
		}
		for _, url := range []string{"/web", "/web/", "/web/index.html", "/web/none.js", "/index.html", "/web/../web/parley.js", "/web/vendor/"} {
			if a := ts.call(http.MethodGet, url, ""); a.status != http.StatusNotFound || a.Code != "not_found" {
				t.Errorf("%s: %d %.100s", url, a.status, a.text)
			}
		}
	})
}

// The page takes nothing from anywhere else, and browsers are told so.
func TestDemoPolicy(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		policy := ts.call(http.MethodGet, "/", "").header.Get("Content-Security-Policy")
		for _, want := range []string{"default-src 'none'", "script-src 'self'", "connect-src 'self'", "frame-ancestors 'none'", "base-uri 'none'"} {
			if !strings.Contains(policy, want) {
				t.Errorf("%s is missing in %s", want, policy)
			}
		}
		if strings.Contains(policy, "unsafe") || strings.Contains(policy, "http") {
			t.Error(policy)
		}
	})
	elsewhere := regexp.MustCompile(`(?:src|href)\s*=\s*["']?(?:\w+:)?//|(?:from|import)\s*\(?\s*["'](?:\w+:)?//|url\(\s*["']?(?:\w+:)?//|@import`)
	eachWebFile(t, func(name string, content []byte) {
		if filepath.Ext(name) == ".md" {
			return // for people
		}
		if found := elsewhere.FindString(string(content)); found != "" {
			t.Errorf("%s loads something from elsewhere: %s", name, found)
		}
	})
}

// Without DEMO there is no page, and still the client.
func TestDemoOff(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t, "DEMO=false")
		for url, want := range map[string]int{
			"/": http.StatusNotFound, "/web/demo.js": http.StatusNotFound, "/web/vendor/qrcode.mjs": http.StatusNotFound,
			"/web/parley.js": http.StatusOK, "/web/parley.d.ts": http.StatusOK,
		} {
			if a := ts.call(http.MethodGet, url, ""); a.status != want {
				t.Errorf("%s: %d, want %d", url, a.status, want)
			}
		}
	})
}

// Who names the version of the server may keep the file, and nobody else.
func TestWebFileVersion(t *testing.T) {
	for _, tt := range []struct {
		version, query string
		keep           bool
	}{
		{"v1.2.3", "?v=v1.2.3", true},
		{"v1.2.3", "?v=v1.2.2", false},
		{"v1.2.3", "?v=", false},
		{"v1.2.3", "", false},
		{unversioned, "?v=" + unversioned, false},
	} {
		w := httptest.NewRecorder()
		file := webFile("web/parley.js", []byte("x"), true, tt.version)
		if err := file.methods[http.MethodGet](w, httptest.NewRequest(http.MethodGet, "/web/parley.js"+tt.query, nil), caller{}); err != nil {
			t.Fatal(err)
		}
		if got := w.Header().Get("Cache-Control"); strings.Contains(got, "immutable") != tt.keep || w.Header().Get("ETag") == "" {
			t.Errorf("%s of %s: %s", tt.query, tt.version, got)
		}
	}
}

// eachWebFile calls f for each file in web/ on disk.
func eachWebFile(t *testing.T, f func(name string, content []byte)) {
	t.Helper()
	err := filepath.WalkDir("web", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(name)
		if err == nil {
			f(filepath.ToSlash(name), content)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}
