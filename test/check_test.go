package test

import (
	"bytes"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"parley/test/testkit"
	"strings"
	"testing"
	"time"

	"github.com/golang-jwt/jwt/v5"
)

// parley check says in words what is right and what is wrong.
func TestCheck(t *testing.T) {
	addr := testkit.StartCoturn(t, coturnSecret)
	port := testkit.FreePort(t)
	nobody := "127.0.0.1:" + port
	good := []string{"DEV=false", "STUN_URLS=stun:" + addr, "TURN_URLS=turn:" + addr + ",turn:" + addr + "?transport=tcp", "TURN_SECRET=" + coturnSecret}
	const jwtSecret = "a secret of this test of some 40 bytes!!"
	token, err := jwt.NewWithClaims(jwt.SigningMethodHS256, jwt.MapClaims{"user_id": "ada", "exp": time.Now().Add(time.Hour).Unix()}).SignedString([]byte(jwtSecret))
	if err != nil {
		t.Fatal(err)
	}
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
			[]string{"WRONG  turn:" + nobody + " does not answer: is it running, and UDP port " + port + " open", "note   TURN answers by TCP, and not by UDP", "1 wrong."}},
		{"its own relay", []string{"DEV=false", "TURN=on", "TURN_PORT=" + testkit.FreePort(t)}, nil, 0,
			[]string{"ok     stun:127.0.0.1:", "?transport=udp relays between clients of this server alone", "?transport=udp relays between two of its peers",
				"?transport=tcp relays between two of its peers", "All is well."}},
		{"no ICE servers", []string{"DEV=false"}, nil, 1, []string{"WRONG  there are no ICE servers: set STUN_URLS", "1 wrong."}},
		{"an origin that is not listed", good, []string{"-origin", "https://app.example"}, 1,
			[]string{"Pages of https://app.example may not call", "CORS_ORIGINS"}},
		{"an origin that is listed", append(good[:4:4], "CORS_ORIGINS=https://app.example"), []string{"-origin", "https://app.example"}, 0,
			[]string{"pages of https://app.example may call", "All is well."}},
		{"minting needs a token", append(good[:4:4], "MINT_AUTH=jwt", "JWT_SECRET="+jwtSecret), nil, 1, []string{"give one with -token"}},
		{"minting with a token", append(good[:4:4], "MINT_AUTH=jwt", "JWT_SECRET="+jwtSecret), []string{"-token", token}, 0, []string{"All is well."}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			server := testkit.StartBinary(t, tc.settings...)
			exit, out := check(t, append(tc.args, server.Base)...)
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
		addr := testkit.StartCoturn(t, coturnSecret)
		server := testkit.StartBinary(t, append(tc.settings, "DEV=false", "STUN_URLS=stun:"+addr)...)
		target, err := url.Parse(server.Base)
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
	if exit, out := check(t, "http://127.0.0.1:"+testkit.FreePort(t)); exit != 1 || !strings.Contains(out, "cannot be reached") {
		t.Errorf("nobody there: exit status %d %q", exit, out)
	}
}

// check runs the subcommand of the binary.
func check(t *testing.T, args ...string) (exit int, out string) {
	t.Helper()
	cmd := exec.Command(testkit.BuildBinary(t), append([]string{"check"}, args...)...)
	cmd.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	var all bytes.Buffer
	cmd.Stdout, cmd.Stderr = &all, &all
	err := cmd.Run()
	if cmd.ProcessState == nil {
		t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), all.String()
}
