package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"reflect"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
	"github.com/prometheus/client_golang/prometheus"
)

// policyWith returns the policy of a server with these settings.
func policyWith(t testing.TB, settings ...string) *callerPolicy {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn(settings))
	if err != nil {
		t.Fatal(err)
	}
	return newCallerPolicy(cfg, slog.New(slog.DiscardHandler), prometheus.NewCounter(prometheus.CounterOpts{Name: "untrusted"}))
}

// requestFrom returns a request as it arrives from socket, with headers of the
// form "Name: value".
func requestFrom(socket string, headers ...string) *http.Request {
	r := httptest.NewRequest(http.MethodPost, "/rendezvous/code", nil)
	r.Host = "parley.test"
	r.RemoteAddr = socket
	for _, h := range headers {
		if k, v, _ := strings.Cut(h, ": "); k == "Host" {
			r.Host = v
		} else {
			r.Header.Add(k, v)
		}
	}
	return r
}

func TestClientAddress(t *testing.T) {
	const trusted = "TRUSTED_PROXIES=10.0.0.0/8,127.0.0.1,2001:db8:ffff::/48"
	const proxy = "10.0.0.1:5000"
	xff := func(lines ...string) []string {
		for i := range lines {
			lines[i] = "X-Forwarded-For: " + lines[i]
		}
		return lines
	}
	for _, c := range []struct {
		what    string
		socket  string
		headers []string
		want    string
	}{
		{"no proxy", "198.51.100.1:5000", nil, "198.51.100.1"},
		{"no proxy, IPv6", "[2001:db8::1]:5000", nil, "2001:db8::1"},
		{"no proxy, IPv6 with a zone", "[fe80::1%eth0]:5000", nil, "fe80::1"},
		{"no proxy, IPv4 in IPv6 clothes", "[::ffff:198.51.100.1]:5000", nil, "198.51.100.1"},
		{"a socket file", "@", nil, "127.0.0.1"},
		{"a proxy on a socket file", "", xff("198.51.100.1"), "198.51.100.1"},

		{"a header nobody vouches for", "198.51.100.1:5000", xff("192.0.2.1"), "198.51.100.1"},
		{"that claims to be a proxy", "198.51.100.1:5000", xff("10.0.0.1"), "198.51.100.1"},
		{"that claims the local host", "[2001:db8::1]:5000", xff("127.0.0.1"), "2001:db8::1"},
		{"other headers nobody vouches for", "198.51.100.1:5000", []string{"X-Real-Ip: 192.0.2.1", "Forwarded: for=192.0.2.1"}, "198.51.100.1"},

		{"one proxy", proxy, xff("192.0.2.1"), "192.0.2.1"},
		{"a proxy in IPv6 clothes", "[::ffff:10.0.0.1]:5000", xff("192.0.2.1"), "192.0.2.1"},
		{"an IPv6 proxy", "[2001:db8:ffff::5]:5000", xff("192.0.2.1"), "192.0.2.1"},
		{"other headers of a proxy", proxy, []string{"X-Real-Ip: 192.0.2.1", "Forwarded: for=192.0.2.2"}, "10.0.0.1"},
		{"several proxies", proxy, xff("192.0.2.1, 10.1.1.1, 2001:db8:ffff::7, 127.0.0.1"), "192.0.2.1"},
		{"without spaces", proxy, xff("192.0.2.1,10.1.1.1"), "192.0.2.1"},
		{"with tabs", proxy, xff("192.0.2.1\t,\t10.1.1.1 "), "192.0.2.1"},
		{"a spoofed prefix", proxy, xff("203.0.113.9, 192.0.2.1"), "192.0.2.1"},
		{"a spoofed prefix of proxies", proxy, xff("10.0.0.9, 127.0.0.1, 192.0.2.1, 10.1.1.1"), "192.0.2.1"},
		{"a long spoofed prefix", proxy, xff(strings.Repeat("10.0.0.9, ", 500) + "192.0.2.1"), "192.0.2.1"},
		{"an untrusted proxy in between", proxy, xff("203.0.113.9, 192.0.2.1, 10.1.1.1"), "192.0.2.1"},
		{"several header lines", proxy, xff("203.0.113.9", "192.0.2.1", "10.1.1.1"), "192.0.2.1"},
		{"lists in several header lines", proxy, xff("203.0.113.9, 192.0.2.1", "10.1.1.1, 10.1.1.2"), "192.0.2.1"},
		{"nothing but proxies", proxy, xff("10.9.9.9, 10.1.1.1"), "10.9.9.9"},

		{"a port", proxy, xff("192.0.2.1:61000"), "192.0.2.1"},
		{"ports everywhere", proxy, xff("192.0.2.1:61000, 10.1.1.1:443"), "192.0.2.1"},
		{"IPv6", proxy, xff("2001:db8::1"), "2001:db8::1"},
		{"IPv6 in brackets", proxy, xff("[2001:db8::1]"), "2001:db8::1"},
		{"IPv6 with a port", proxy, xff("[2001:db8::1]:61000"), "2001:db8::1"},
		{"IPv6 with a zone", proxy, xff("fe80::1%eth0"), "fe80::1"},
		{"IPv6 written long", proxy, xff("2001:0DB8:0000::0001"), "2001:db8::1"},
		{"IPv4 in IPv6 clothes", proxy, xff("::ffff:192.0.2.1"), "192.0.2.1"},
		{"with a port", proxy, xff("[::ffff:192.0.2.1]:61000"), "192.0.2.1"},
		{"a proxy in IPv6 clothes behind a proxy", proxy, xff("192.0.2.1, ::ffff:10.1.1.1"), "192.0.2.1"},

		// What makes no sense ends the way: what stands before it, anybody may have
		// written.
		{"empty", proxy, xff(""), "10.0.0.1"},
		{"commas", proxy, xff(", ,"), "10.0.0.1"},
		{"garbage", proxy, xff("unknown"), "10.0.0.1"},
		{"garbage on the left", proxy, xff("unknown, 192.0.2.1"), "192.0.2.1"},
		{"garbage on the right", proxy, xff("192.0.2.1, unknown"), "10.0.0.1"},
		{"garbage between proxies", proxy, xff("192.0.2.1, unknown, 10.1.1.1"), "10.1.1.1"},
		{"a gap between proxies", proxy, xff("192.0.2.1,, 10.1.1.1"), "10.1.1.1"},
		{"an empty last line", proxy, xff("192.0.2.1", ""), "10.0.0.1"},
		{"a host name", proxy, xff("client.example"), "10.0.0.1"},
		{"a number", proxy, xff("3221225985"), "10.0.0.1"},
		{"leading zeros", proxy, xff("192.000.002.001"), "10.0.0.1"},
		{"a CIDR", proxy, xff("192.0.2.0/24"), "10.0.0.1"},
		{"a port that is none", proxy, xff("192.0.2.1:99999"), "10.0.0.1"},
		{"a space for a comma", proxy, xff("203.0.113.9 192.0.2.1"), "10.0.0.1"},
		{"quotes", proxy, xff(`"192.0.2.1"`), "10.0.0.1"},
	} {
		p := policyWith(t, "DEV=false", trusted)
		got := p.identify(requestFrom(c.socket, c.headers...))
		want := netip.MustParseAddr(c.want)
		if got.addr != want || got.network != networkOf(want) {
			t.Errorf("%s: %s through %v is %s, counted as %s; want %s", c.what, c.socket, c.headers, got.addr, got.network, c.want)
		}
	}
}

// Without TRUSTED_PROXIES nobody is believed, the local host neither.
func TestClientAddressTrustsNobody(t *testing.T) {
	for _, socket := range []string{"127.0.0.1:5000", "[::1]:5000", "10.0.0.1:5000", "@"} {
		c := policyWith(t, "DEV=true").identify(requestFrom(socket, "X-Forwarded-For: 192.0.2.1"))
		if c.proxyTrusted || c.addr != c.socket {
			t.Errorf("%s is believed: %s", socket, c.addr)
		}
	}
}

// Who is exempt is so by its address, whatever brings it here.
func TestClientExempt(t *testing.T) {
	p := policyWith(t, "TRUSTED_PROXIES=10.0.0.1", "RATE_EXEMPT=192.0.2.0/24,10.0.0.1")
	for _, c := range []struct {
		socket, forwarded string
		exempt            bool
	}{
		{"192.0.2.1:1", "", true},
		{"[::ffff:192.0.2.1]:1", "", true},
		{"192.0.3.1:1", "", false},
		{"192.0.3.1:1", "192.0.2.1", false},
		{"10.0.0.1:1", "192.0.2.1", true},
		{"10.0.0.1:1", "192.0.2.1, 192.0.3.1", false},
		{"10.0.0.1:1", "192.0.3.1", false},
		{"10.0.0.1:1", "", true},
	} {
		r := requestFrom(c.socket)
		if c.forwarded != "" {
			r.Header.Set("X-Forwarded-For", c.forwarded)
		}
		if got := p.identify(r); got.network.IsValid() == c.exempt {
			t.Errorf("%+v: limits count it as %s", c, got.network)
		}
	}
}

// Forwarded headers of untrusted callers are counted each time, and warned of
// once a minute.
func TestUntrustedForwardedHeaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "TRUSTED_PROXIES=10.0.0.1")
		proxy, proxyV6, trusted := callsFrom(ts, "203.0.113.9"), callsFrom(ts, "2001:db8::9"), callsFrom(ts, "10.0.0.1")
		warnings := func(want int, cidr string) {
			t.Helper()
			n := 0
			for line := range strings.Lines(ts.log.String()) {
				if strings.Contains(line, "level=WARN") && strings.Contains(line, "TRUSTED_PROXIES") {
					n++
					if strings.Contains(line, "198.51.100") {
						t.Errorf("the claimed address is logged: %s", line)
					}
				}
			}
			if n != want {
				t.Errorf("%d warnings, want %d", n, want)
			}
			if want > 0 && !strings.Contains(ts.log.String(), "TRUSTED_PROXIES="+cidr) {
				t.Errorf("no warning names %s", cidr)
			}
		}
		counted := func(want float64) {
			t.Helper()
			wantSeries(t, ts, map[string]float64{"parley_forwarded_untrusted_total": want})
		}
		trusted.call(http.MethodGet, "/whoami", "", "X-Forwarded-For: 198.51.100.1", "X-Forwarded-Proto: https")
		proxy.call(http.MethodGet, "/whoami", "")
		counted(0)
		warnings(0, "")
		for range 50 {
			proxy.call(http.MethodGet, "/whoami", "", "X-Forwarded-For: 198.51.100.1")
			time.Sleep(time.Second)
		}
		counted(50)
		warnings(1, "203.0.113.9/32")
		for i, header := range []string{"X-Forwarded-Host: a.example", "X-Forwarded-Proto: https", "X-Real-IP: 198.51.100.1", "Forwarded: for=198.51.100.1"} {
			proxy.call(http.MethodGet, "/healthz", "", header)
			counted(float64(51 + i))
		}
		refusal(proxy, wsDial{appID: "none", side: "A", header: http.Header{"X-Forwarded-For": {"198.51.100.1"}}})
		counted(55)
		warnings(1, "203.0.113.9/32")
		time.Sleep(11 * time.Second) // a minute after the first
		proxyV6.call(http.MethodGet, "/whoami", "", "X-Forwarded-For: 198.51.100.1")
		warnings(2, "2001:db8::9/128")
		proxy.call(http.MethodGet, "/whoami", "", "X-Forwarded-For: 198.51.100.1")
		warnings(2, "2001:db8::9/128")
		counted(57)
	})
}

func TestWhoami(t *testing.T) {
	const limits = "are off"
	for _, c := range []struct {
		what     string
		settings []string
		from     string
		headers  []string
		want     map[string]any // of the fields, those that matter
		advice   []string       // words in it; none: no advice
	}{
		{"directly", []string{"DEV=false"}, "198.51.100.1", nil,
			map[string]any{"ip": "198.51.100.1", "socketIp": "198.51.100.1", "forwardedFor": "", "proxyTrusted": false,
				"origin": "", "originAllowed": true, "tls": false, "guessesLeft": 10.0}, nil},
		{"from the server's own page", []string{"DEV=false"}, "2001:db8::1", []string{"Origin: http://parley.test"},
			map[string]any{"ip": "2001:db8::1", "origin": "http://parley.test", "originAllowed": true}, nil},
		{"behind a proxy as it should be", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.1"}, "10.0.0.1",
			[]string{"X-Forwarded-For: 192.0.2.7, 198.51.100.1", "X-Forwarded-Proto: https", "Origin: https://parley.test"},
			map[string]any{"ip": "198.51.100.1", "socketIp": "10.0.0.1", "forwardedFor": "192.0.2.7, 198.51.100.1", "proxyTrusted": true,
				"originAllowed": true, "tls": true}, nil},
		{"header lines are shown together", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.0/8"}, "10.0.0.1",
			[]string{"X-Forwarded-For: 198.51.100.1", "X-Forwarded-For: 10.0.0.2"},
			map[string]any{"ip": "198.51.100.1", "forwardedFor": "198.51.100.1, 10.0.0.2", "tls": false}, nil},
		{"without a bound on guesses", []string{"DEV=false", "REDEEM_FAILS=0"}, "198.51.100.1", nil,
			map[string]any{"guessesLeft": -1.0}, nil},

		{"behind a proxy that is not trusted", []string{"DEV=false"}, "10.0.0.1", []string{"X-Forwarded-For: 198.51.100.1"},
			map[string]any{"ip": "10.0.0.1", "proxyTrusted": false, "forwardedFor": "198.51.100.1"},
			[]string{"X-Forwarded-For", "not believed", "TRUSTED_PROXIES=10.0.0.1/32"}},
		{"an IPv6 one, with another header", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.1"}, "2001:db8::1", []string{"X-Real-IP: 198.51.100.1"},
			map[string]any{"ip": "2001:db8::1"}, []string{"X-Real-Ip", "TRUSTED_PROXIES=2001:db8::1/128"}},
		{"nor believed about TLS", []string{"DEV=false"}, "10.0.0.1", []string{"X-Forwarded-Proto: https"},
			map[string]any{"tls": false}, []string{"X-Forwarded-Proto", "TRUSTED_PROXIES"}},
		{"behind a proxy that tells nothing", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.1"}, "10.0.0.1", nil,
			map[string]any{"ip": "10.0.0.1", "proxyTrusted": true}, []string{"10.0.0.1", "no X-Forwarded-For", "one address"}},
		{"behind a proxy that tells nonsense", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.1"}, "10.0.0.1", []string{"X-Forwarded-For: unknown"},
			map[string]any{"ip": "10.0.0.1", "forwardedFor": "unknown"}, []string{"does not end with an address"}},
		{"from the proxy's own machine", []string{"DEV=false", "TRUSTED_PROXIES=127.0.0.1"}, "127.0.0.1", []string{"X-Forwarded-For: 127.0.0.1"},
			map[string]any{"ip": "127.0.0.1", "proxyTrusted": true}, []string{"from a proxy's own machine"}},
		{"when everyone is a proxy", []string{"DEV=false", "TRUSTED_PROXIES=0.0.0.0/0"}, "10.0.0.1", []string{"X-Forwarded-For: 198.51.100.1"},
			map[string]any{"ip": "198.51.100.1", "proxyTrusted": true}, []string{"TRUSTED_PROXIES may be too wide"}},
		{"from a foreign page", []string{"DEV=false"}, "198.51.100.1", []string{"Origin: https://app.example"},
			map[string]any{"origin": "https://app.example", "originAllowed": false}, []string{"https://app.example", "CORS_ORIGINS"}},
		{"from an app", []string{"DEV=false"}, "198.51.100.1", []string{"Origin: capacitor://localhost"},
			map[string]any{"origin": "capacitor://localhost", "originAllowed": false}, []string{"capacitor://localhost", "CORS_ORIGINS"}},
		{"from an app that is listed", []string{"DEV=false", "ALLOWED_ORIGINS=capacitor://localhost"}, "198.51.100.1", []string{"Origin: capacitor://localhost"},
			map[string]any{"origin": "capacitor://localhost", "originAllowed": true}, nil},
		{"from a file", []string{"DEV=false"}, "198.51.100.1", []string{"Origin: null"},
			map[string]any{"origin": "null", "originAllowed": false}, []string{`"null"`, "cannot be allowed", "Serve it"}},
		{"from its own page through a proxy that hides Host", []string{"DEV=false", "TRUSTED_PROXIES=10.0.0.1"}, "10.0.0.1",
			[]string{"Host: backend:1234", "X-Forwarded-For: 198.51.100.1", "Origin: https://parley.test"},
			map[string]any{"originAllowed": false}, []string{"pass Host on"}},
		{"two mistakes at once", []string{"DEV=false"}, "10.0.0.1", []string{"X-Forwarded-For: 198.51.100.1", "Origin: https://app.example"},
			map[string]any{"originAllowed": false}, []string{"TRUSTED_PROXIES=10.0.0.1/32", "CORS_ORIGINS"}},
		{"in development, by name", []string{"DEV=true"}, "198.51.100.1", []string{"Origin: https://app.example"},
			map[string]any{"originAllowed": true}, []string{"DEV=false", limits}},
		{"by address", []string{"DEV=true"}, "198.51.100.1", []string{"Host: 192.0.2.1:1234"}, nil, []string{limits}},
		{"on this machine", []string{"DEV=true"}, "127.0.0.1", []string{"Host: localhost:1234"}, nil, nil},
		{"without a port", []string{"DEV=true"}, "127.0.0.1", []string{"Host: localhost"}, nil, nil},
		{"by address", []string{"DEV=true"}, "127.0.0.1", []string{"Host: 127.0.0.1:1234"}, nil, nil},
		{"by IPv6 address", []string{"DEV=true"}, "::1", []string{"Host: [::1]:1234"}, map[string]any{"ip": "::1"}, nil},
		{"by IPv6 address without a port", []string{"DEV=true"}, "::1", []string{"Host: [::1]"}, nil, nil},
	} {
		t.Run(c.what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ts := newTestServer(t, c.settings...)
				a := callsFrom(ts, c.from).call(http.MethodGet, "/whoami", "", c.headers...)
				var got map[string]any
				if err := json.Unmarshal([]byte(a.text), &got); err != nil || a.status != http.StatusOK {
					t.Fatalf("%d %s: %v", a.status, a.text, err)
				}
				if v := a.header.Get("Cache-Control"); v != "no-store" {
					t.Errorf("Cache-Control is %q", v)
				}
				for k, v := range c.want {
					if !reflect.DeepEqual(got[k], v) {
						t.Errorf("%s is %v, want %v", k, got[k], v)
					}
				}
				advice, advised := got["advice"].(string)
				delete(got, "advice")
				if len(got) != 8 {
					t.Errorf("%d fields: %s", len(got), a.text)
				}
				if advised != (len(c.advice) > 0) {
					t.Errorf("advice is %q, expected are %q", advice, c.advice)
				}
				for _, words := range c.advice {
					if !strings.Contains(advice, words) {
						t.Errorf("advice is %q, without %q", advice, words)
					}
				}
			})
		})
	}
}

func TestWhoamiCountsDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "REDEEM_FAILS=3")
		for _, want := range []string{"3", "2", "1", "0", "0"} {
			if a := ts.call(http.MethodGet, "/whoami", ""); !strings.Contains(a.text, `"guessesLeft":`+want+"}") {
				t.Errorf("whoami says %s, want %s left", a.text, want)
			}
			redeemAt(ts, "00000"+want)
		}
	})
}

func TestOriginPolicy(t *testing.T) {
	const (
		apps = "capacitor://localhost, tauri://localhost, chrome-extension://abcdefghijklmnopabcdefghijklmnop, " +
			"moz-extension://0f1e2d3c-4b5a-4968-8776-655443322110, safari-web-extension://0F1E2D3C-4B5A-4968-8776-655443322110, app://-, app://.:8080"
		listed  = "CORS_ORIGINS=https://App.Example, http://dev.example:8080, bare.example, 192.0.2.5, https://[2001:db8::5]:8443, " + apps
		trusted = "TRUSTED_PROXIES=10.0.0.1"
		direct  = "198.51.100.1:5000"
		proxy   = "10.0.0.1:5000"
	)
	for _, c := range []struct {
		what    string
		socket  string
		headers string // separated by " | "
		allowed bool
	}{
		{"none: curl, native apps", direct, "", true},

		{"listed", direct, "Origin: https://app.example", true},
		{"listed in another case", direct, "Origin: https://APP.example", true},
		{"listed, with its default port", direct, "Origin: https://app.example:443", true},
		{"another scheme", direct, "Origin: http://app.example", false},
		{"another port", direct, "Origin: https://app.example:8443", false},
		{"listed with a port", direct, "Origin: http://dev.example:8080", true},
		{"without the listed port", direct, "Origin: http://dev.example", false},
		{"an IPv6 address", direct, "Origin: https://[2001:db8::5]:8443", true},
		{"written long", direct, "Origin: https://[2001:0db8:0::5]:8443", true},
		{"an IPv6 address with another port", direct, "Origin: https://[2001:db8::5]", false},
		{"a subdomain", direct, "Origin: https://x.app.example", false},
		{"a parent domain", direct, "Origin: https://example", false},
		{"a suffix", direct, "Origin: https://evilapp.example", false},
		{"a prefix", direct, "Origin: https://app.example.evil.test", false},
		{"a trailing dot", direct, "Origin: https://app.example.", false},

		{"a bare host", direct, "Origin: https://bare.example", true},
		{"a bare host, any scheme and port", direct, "Origin: http://bare.example:3000", true},
		{"a bare host's subdomain", direct, "Origin: https://x.bare.example", false},
		{"a bare address", direct, "Origin: http://192.0.2.5:8000", true},
		{"a bare host as user name", direct, "Origin: https://bare.example@evil.test", false},
		{"a bare host as password", direct, "Origin: https://x:bare.example@evil.test", false},
		{"a user name at a bare host", direct, "Origin: https://evil.test@bare.example", false},
		{"a bare host as path", direct, "Origin: https://evil.test/bare.example", false},
		{"a bare host as fragment", direct, "Origin: https://evil.test#bare.example", false},
		{"a bare host alone", direct, "Origin: bare.example", false},
		{"a bare host of an odd scheme", direct, "Origin: chrome-extension://bare.example", false},
		{"with a path", direct, "Origin: https://app.example/", false},

		{"Capacitor and Ionic on iOS", direct, "Origin: capacitor://localhost", true},
		{"Tauri", direct, "Origin: tauri://localhost", true},
		{"an extension of Chrome", direct, "Origin: chrome-extension://abcdefghijklmnopabcdefghijklmnop", true},
		{"another extension of Chrome", direct, "Origin: chrome-extension://ponmlkjihgfedcbaponmlkjihgfedcba", false},
		{"an extension of Firefox", direct, "Origin: moz-extension://0f1e2d3c-4b5a-4968-8776-655443322110", true},
		{"an extension of Safari", direct, "Origin: safari-web-extension://0F1E2D3C-4B5A-4968-8776-655443322110", true},
		{"Electron", direct, "Origin: app://-", true},
		{"an app with a port", direct, "Origin: app://.:8080", true},
		{"an app without its port", direct, "Origin: app://.", false},
		{"an app's other port", direct, "Origin: capacitor://localhost:80", false},
		{"an app's scheme in another case", direct, "Origin: Capacitor://localhost", true},
		{"an app's other scheme", direct, "Origin: ionic://localhost", false},
		{"a page of the app's host", direct, "Origin: http://localhost", false},
		{"a page of the app's host with a port", direct, "Origin: https://localhost:3000", false},
		{"an app of a longer host", direct, "Origin: capacitor://localhost.evil.test", false},
		{"an app with a path", direct, "Origin: capacitor://localhost/", false},
		{"an app as user name", direct, "Origin: https://capacitor://localhost@evil.test", false},
		{"an app that is named like the server", direct, "Host: parley.test | Origin: app://parley.test", false},
		{"an app that is named like a bare host", direct, "Origin: app://192.0.2.5", false},

		{"null", direct, "Origin: null", false},
		{"NULL", direct, "Origin: NULL", false},
		{"empty", direct, "Origin: ", false},
		{"any", direct, "Origin: *", false},
		{"a file", direct, "Origin: file://", false},
		{"garbage", direct, "Origin: https://%61pp.example", false},
		{"a list", direct, "Origin: https://app.example, https://app.example", false},
		{"two headers", direct, "Origin: https://evil.test | Origin: https://app.example", false},
		{"two headers, the listed first", direct, "Origin: https://app.example | Origin: https://evil.test", false},

		{"own", direct, "Origin: http://parley.test", true},
		{"own, in another case", direct, "Host: Parley.TEST | Origin: http://parley.test", true},
		{"own, behind a proxy that ends TLS", direct, "Origin: https://parley.test", true},
		{"own, with the default port in Host", direct, "Host: parley.test:80 | Origin: http://parley.test", true},
		{"own, with that of TLS", direct, "Host: parley.test:443 | Origin: https://parley.test", true},
		{"own, with another port", direct, "Host: parley.test:1234 | Origin: http://parley.test:1234", true},
		{"own host, other port", direct, "Host: parley.test:1234 | Origin: http://parley.test:1235", false},
		{"own host, no port", direct, "Host: parley.test:1234 | Origin: http://parley.test", false},
		{"own host, only the page has a port", direct, "Origin: http://parley.test:1234", false},
		{"own address", direct, "Host: 192.0.2.1:1234 | Origin: http://192.0.2.1:1234", true},
		{"own IPv6 address", direct, "Host: [2001:db8::1]:1234 | Origin: http://[2001:db8::1]:1234", true},
		{"another host", direct, "Host: parley.test | Origin: https://evil.test", false},
		{"null, and a Host of that name", direct, "Host: null | Origin: null", false},

		{"X-Forwarded-Host of anybody", direct, "X-Forwarded-Host: evil.test | Origin: https://evil.test", false},
		{"own, whatever anybody forwards", direct, "X-Forwarded-Host: evil.test | Origin: https://parley.test", true},
		{"X-Forwarded-Host of a proxy", proxy, "Host: backend:1234 | X-Forwarded-Host: parley.test | Origin: https://parley.test", true},
		{"with a port", proxy, "Host: backend:1234 | X-Forwarded-Host: parley.test:8443 | Origin: https://parley.test:8443", true},
		{"the proxy's own name for the server", proxy, "Host: backend:1234 | X-Forwarded-Host: parley.test | Origin: https://backend:1234", false},
		{"a proxy that forwards none", proxy, "Origin: https://parley.test", true},
		{"a list in X-Forwarded-Host", proxy, "Host: backend | X-Forwarded-Host: evil.test, parley.test | Origin: https://evil.test", false},
		{"another host behind a proxy", proxy, "X-Forwarded-Host: parley.test | Origin: https://evil.test", false},
	} {
		var headers []string
		if c.headers != "" {
			headers = strings.Split(c.headers, " | ")
		}
		r := requestFrom(c.socket, headers...)
		if got := policyWith(t, "DEV=false", listed, trusted).originAllowed(r); got != c.allowed {
			t.Errorf("%s: %v with %s is allowed: %v, want %v", c.what, c.socket, c.headers, got, c.allowed)
		}
		if !policyWith(t, "DEV=true", listed, trusted).originAllowed(r) {
			t.Errorf("%s: in development %s is not allowed", c.what, c.headers)
		}
	}
}

// A write from a foreign page is refused before it has any effect, and not even
// counts against limits; a read is answered, without what lets the page see it.
func TestForeignOrigin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "CORS_ORIGINS=https://app.example", "MAX_CODES_PER_IP=1", "HTTP_RATE_PER_MIN=3", "REDEEM_FAILS=2")
		code, appID := ts.mint()
		for i := range 20 {
			for _, headers := range [][]string{
				{"Origin: https://evil.test", "Content-Type: application/json"},
				{"Origin: null", "Content-Type: application/json"},
				{"Origin: http://app.example", "Content-Type: application/json"},
				{"Origin: https://evil.test", "Content-Type: text/plain"}, // which needs no preflight
				{"Origin: https://app.example", "Origin: https://evil.test", "Content-Type: application/json"},
			} {
				for path, body := range map[string]string{
					"/rendezvous/code":   "",
					"/rendezvous/redeem": fmt.Sprintf(`{"code":"%s"}`, []string{code, fmt.Sprintf("%06d", i)}[i%2]),
				} {
					a := ts.call(http.MethodPost, path, body, headers...)
					wantAnswer(t, a, http.StatusForbidden, "forbidden_origin")
					wantNoCORS(t, a)
				}
			}
		}
		wantSeries(t, ts, map[string]float64{
			"parley_codes_minted_total":                 1,
			"parley_codes_active":                       1,
			"parley_sessions_active":                    1,
			`parley_redeems_total{result="ok"}`:         0,
			`parley_redeems_total{result="gone"}`:       0,
			`parley_redeems_total{result="bad"}`:        0,
			`parley_redeems_total{result="throttled"}`:  0,
			`parley_rate_limited_total{route="redeem"}`: 0,
			`parley_rate_limited_total{route="code"}`:   0,
		})
		for _, path := range []string{"/whoami", "/healthz", "/readyz", "/version", "/metrics"} {
			a := ts.call(http.MethodGet, path, "", "Origin: https://evil.test")
			if a.status != http.StatusOK {
				t.Errorf("%s is answered %d", path, a.status)
			}
			wantNoCORS(t, a)
		}
		a := redeemAt(ts, code, "Origin: https://app.example")
		if a.status != http.StatusOK || a.AppID != appID {
			t.Errorf("the code that foreign pages tried is answered %d %s", a.status, a.text)
		}
	})
}

// wantNoCORS fails if a lets a page of another origin read it.
func wantNoCORS(t testing.TB, a httpAnswer) {
	t.Helper()
	for k, v := range a.header {
		if strings.HasPrefix(k, "Access-Control-") {
			t.Errorf("%d comes with %s: %s", a.status, k, v)
		}
	}
}

func TestAllowedOrigin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "CORS_ORIGINS=https://app.example", "MAX_CODES_PER_IP=2")
		const origin = "Origin: https://app.example"
		readable := func(what string, a httpAnswer) {
			t.Helper()
			if got := a.header["Access-Control-Allow-Origin"]; !slices.Equal(got, []string{"https://app.example"}) {
				t.Errorf("%s is answered %d for the origins %q", what, a.status, got)
			}
			if !strings.Contains(a.header.Get("Access-Control-Expose-Headers"), "Retry-After") {
				t.Errorf("%s: Retry-After is hidden from pages", what)
			}
			if !slices.Contains(a.header["Vary"], "Origin") {
				t.Errorf("%s: a cache may mix origins up, Vary is %q", what, a.header["Vary"])
			}
			if a.header.Get("Access-Control-Allow-Credentials") != "" {
				t.Errorf("%s: credentials are allowed, and nobody has any", what)
			}
		}
		for range 2 {
			a := ts.call(http.MethodPost, "/rendezvous/code", "", origin)
			wantAnswer(t, a, http.StatusOK, "")
			readable("mint", a)
		}
		for what, a := range map[string]httpAnswer{ // errors can be read too
			"too many codes": ts.call(http.MethodPost, "/rendezvous/code", "", origin),
			"a wrong guess":  redeemAt(ts, "123456", origin),
			"a bad request":  redeemAt(ts, "", origin),
			"wrong method":   ts.call(http.MethodPost, "/whoami", "", origin),
		} {
			if a.status < 400 {
				t.Errorf("%s is answered %d", what, a.status)
			}
			readable(what, a)
		}
		for _, path := range []string{"/whoami", "/healthz", "/readyz", "/version"} {
			readable(path, ts.call(http.MethodGet, path, "", origin))
			readable("HEAD "+path, ts.call(http.MethodHead, path, "", origin))
		}
		for what, a := range map[string]httpAnswer{
			"an unknown path":       ts.call(http.MethodGet, "/nothing", "", origin),
			"a write to one":        ts.call(http.MethodPost, "/nothing", "{}", origin),
			"rooms that are off":    ts.call(http.MethodPost, "/api/rooms", "{}", origin),
			"a room while off":      ts.call(http.MethodGet, "/api/rooms/ABCDEF", "", origin),
			"a path that is nearly": ts.call(http.MethodGet, "//healthz", "", origin),
			"a method of no path":   ts.call(http.MethodPut, "/rendezvous/code", "", origin),
			"too large":             redeemAt(ts, strings.Repeat("1", maxBody), origin),
			"no upgrade":            ts.call(http.MethodGet, "/ws", "", origin),
			"no session":            ts.call(http.MethodGet, "/ws?side=A&appID="+uuid.NewString(), "", append(upgradeHeaders, origin)...),
			"no side":               ts.call(http.MethodGet, "/ws?side=C&appID="+uuid.NewString(), "", append(upgradeHeaders, origin)...),
			"a write to a file":     ts.call(http.MethodPost, "/web/parley.js", "", origin),
		} {
			if a.status < 400 {
				t.Errorf("%s is answered %d", what, a.status)
			}
			readable(what, a)
		}
		ts.draining.Store(true)
		readable("not ready", ts.call(http.MethodGet, "/readyz", "", origin))
		ts.draining.Store(false)
		for _, a := range []httpAnswer{ // of others
			ts.call(http.MethodGet, "/nothing", "", "Origin: https://evil.test"),
			ts.call(http.MethodPost, "/api/rooms", "", "Origin: https://evil.test"),
			ts.call(http.MethodGet, "/ws", "", "Origin: https://evil.test"),
		} {
			wantNoCORS(t, a)
		}
		// Who sends no Origin needs no CORS.
		a := ts.call(http.MethodGet, "/whoami", "")
		wantAnswer(t, a, http.StatusOK, "")
		wantNoCORS(t, a)
	})
}

func TestPreflight(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "CORS_ORIGINS=https://app.example", "HTTP_RATE_PER_MIN=1")
		preflight := func(path, origin, method string, headers ...string) httpAnswer {
			t.Helper()
			a := ts.call(http.MethodOptions, path, "", append(headers, "Origin: "+origin, "Access-Control-Request-Method: "+method)...)
			if a.status >= 300 || a.text != "" {
				t.Errorf("a preflight is answered %d %q", a.status, a.text)
			}
			return a
		}
		for range 5 { // no limit counts them
			for _, path := range []string{"/rendezvous/code", "/rendezvous/redeem", "/api/rooms", "/api/rooms/ABCDEF", "/nothing", "/rendezvous/code/", "//x"} {
				a := preflight(path, "https://app.example", "POST", "Access-Control-Request-Headers: authorization,content-type")
				for name, want := range map[string]string{
					"Access-Control-Allow-Origin":  "https://app.example",
					"Access-Control-Allow-Methods": "POST",
					"Access-Control-Allow-Headers": "authorization,content-type",
					"Access-Control-Max-Age":       "600",
				} {
					if got := a.header.Get(name); got != want {
						t.Errorf("%s of %s is %q, want %q", name, path, got, want)
					}
				}
				for _, origin := range []string{"https://evil.test", "null", "http://app.example", "https://app.example:8443"} {
					wantNoCORS(t, preflight(path, origin, "POST", "Access-Control-Request-Headers: content-type"))
				}
				wantNoCORS(t, preflight(path, "https://app.example", "PUT"))
				wantNoCORS(t, preflight(path, "https://app.example", "POST", "Access-Control-Request-Headers: x-other"))
			}
		}
		ts.mint()
		wantSeries(t, ts, map[string]float64{"parley_codes_minted_total": 1})

		// The server's own pages, by the name the browser used.
		if a := preflight("/rendezvous/code", "https://parley.test", "POST"); a.header.Get("Access-Control-Allow-Origin") != "https://parley.test" {
			t.Errorf("the server's own page is not allowed: %v", a.header)
		}
		// OPTIONS that is no preflight is a method like any other.
		wantAnswer(t, ts.call(http.MethodOptions, "/rendezvous/code", ""), http.StatusMethodNotAllowed, "method_not_allowed")
	})
}

// A WebSocket of a foreign page is refused as HTTP, whatever it speaks.
func TestWSOrigin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=false", "APP_IDS=any", "CORS_ORIGINS=https://app.example,capacitor://localhost", "WS_RATE_PER_MIN=100")
		dial := func(v1 bool, origins ...string) wsDial {
			return wsDial{appID: uuid.NewString(), side: "A", v1: v1, header: http.Header{"Origin": origins}}
		}
		for _, v1 := range []bool{false, true} {
			for _, origins := range [][]string{
				{"https://evil.test"}, {"null"}, {""}, {"http://app.example"}, {"http://localhost"}, {"ionic://localhost"}, {"https://app.example", "https://evil.test"},
			} {
				for range 20 { // no limit counts them
					wantAnswer(t, refusal(ts, dial(v1, origins...)), http.StatusForbidden, "forbidden_origin")
				}
			}
		}
		wantSeries(t, ts, map[string]float64{
			"parley_sessions_active":                0,
			"parley_ws_connections_total":           0,
			`parley_rate_limited_total{route="ws"}`: 0,
		})
		for _, v1 := range []bool{false, true} {
			ts.join(dial(v1, "https://app.example"))
			ts.join(dial(v1, "capacitor://localhost"))
			ts.join(dial(v1, "http://parley.test"))
			ts.join(dial(v1))
		}
		synctest.Wait()
		wantSeries(t, ts, map[string]float64{"parley_ws_connections": 8})

		// Nobody who just asks what is there sees more than that it is forbidden.
		a := ts.call(http.MethodGet, "/ws?appID="+uuid.NewString()+"&side=A", "", "Origin: https://evil.test")
		wantAnswer(t, a, http.StatusForbidden, "forbidden_origin")
		wantNoCORS(t, a)
	})
	synctest.Test(t, func(t *testing.T) {
		ts := newTestServer(t, "DEV=true")
		ts.join(wsDial{appID: uuid.NewString(), side: "A", header: http.Header{"Origin": {"https://anything.test"}}})
		ts.join(wsDial{appID: uuid.NewString(), side: "A", header: http.Header{"Origin": {"null"}}})
	})
}

// FuzzClientAddress holds identify to what matters: the answer is the socket, or
// an entry to whose right there are trusted proxies only.
func FuzzClientAddress(f *testing.F) {
	f.Add("10.0.0.1:5000", "192.0.2.1, 10.1.1.1", "10.0.0.0/8")
	f.Add("[::ffff:10.0.0.1]:5000", "203.0.113.9\n192.0.2.1:99, [::ffff:10.1.1.1]:80", "10.0.0.0/8,::1")
	f.Add("198.51.100.1:1", "10.0.0.1", "10.0.0.0/8")
	f.Add("@", "unknown, ,[2001:db8::1%eth0]:5", "127.0.0.1,2001:db8::/32")
	f.Add("[fe80::1%eth0]:1", ",", "fe80::/10")
	f.Add("10.0.0.1:1", "10.0.0.3, 10.0.0.2", "0.0.0.0/0,::/0")
	f.Add("10.0.0.1:1", "192.0.2.1, unknown, 10.1.1.1", "10.0.0.0/8")
	log, untrusted := slog.New(slog.DiscardHandler), prometheus.NewCounter(prometheus.CounterOpts{Name: "untrusted"})
	f.Fuzz(func(t *testing.T, socket, forwarded, trusted string) {
		cfg := new(config)
		for entry := range strings.SplitSeq(trusted, ",") {
			if n, err := parseNetwork(entry); err == nil {
				cfg.trustedProxies = append(cfg.trustedProxies, n)
			}
		}
		p := newCallerPolicy(cfg, log, untrusted)
		r := requestFrom(socket)
		lines := strings.Split(forwarded, "\n")
		r.Header["X-Forwarded-For"] = lines
		c := p.identify(r)

		for _, a := range []netip.Addr{c.addr, c.socket} {
			if !a.IsValid() || a.Zone() != "" || a.Is4In6() {
				t.Fatalf("%q through %q is %v", socket, forwarded, a)
			}
		}
		if !c.network.IsValid() || !c.network.Contains(c.addr) {
			t.Fatalf("%v counts as %v", c.addr, c.network)
		}
		trust := func(a netip.Addr) bool {
			return slices.ContainsFunc(cfg.trustedProxies, func(p netip.Prefix) bool { return p.Contains(a) })
		}
		if c.proxyTrusted != trust(c.socket) {
			t.Fatalf("%v is a trusted proxy: %v", c.socket, c.proxyTrusted)
		}
		reachable := []netip.Addr{c.socket}
		hops := strings.Split(strings.Join(lines, ","), ",")
		for i := len(hops) - 1; i >= 0 && trust(reachable[len(reachable)-1]); i-- {
			a, ok := parseHop(hops[i])
			if !ok {
				break
			}
			if !strings.Contains(hops[i], ":") && a.String() != strings.TrimSpace(strings.Trim(strings.TrimSpace(hops[i]), "[]")) {
				t.Fatalf("%q is read as %v", hops[i], a)
			}
			reachable = append(reachable, a)
		}
		if last := reachable[len(reachable)-1]; c.addr != last {
			t.Fatalf("%q through %q is %v, want the first that is not trusted: %v", socket, forwarded, c.addr, last)
		}
		p.originAllowed(r)
		p.advice(r, c)
	})
}
