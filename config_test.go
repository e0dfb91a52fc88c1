package main

import (
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net/netip"
	"os"
	"parley/test/testkit"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"
)

// environ is an environment of NAME=value pairs for loadConfig.
func environ(pairs ...string) func(string) (string, bool) {
	env := make(map[string]string)
	for _, pair := range pairs {
		name, value, _ := strings.Cut(pair, "=")
		env[name] = value
	}
	return func(name string) (string, bool) {
		value, ok := env[name]
		return value, ok
	}
}

func mustLoad(t *testing.T, args []string, env ...string) *config {
	t.Helper()
	c, err := loadConfig(args, environ(env...))
	if err != nil {
		t.Fatalf("loadConfig(%q) with %q: %v", args, env, err)
	}
	return c
}

// problems takes a joined error apart.
func problems(err error) []string {
	joined, ok := err.(interface{ Unwrap() []error })
	if !ok {
		return nil
	}
	var sentences []string
	for _, e := range joined.Unwrap() {
		sentences = append(sentences, e.Error())
	}
	return sentences
}

// An optionCase is what one option must do, written down apart from the table it checks.
type optionCase struct {
	name      string
	get       func(*config) any
	dev, prod any    // the defaults
	text      string // a value that is neither default
	want      any    // what it becomes
	with      string // what must be given beside it
	moves     string // another option whose default it moves
	bad       []string
}

func optionCases(t testing.TB) []optionCase {
	keyFile := writePublicKey(t, newRSAKey(t).Public())
	notKey := filepath.Join(t.TempDir(), "not-a-key.pem")
	if err := os.WriteFile(notKey, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	networks := func(cidrs ...string) (list []netip.Prefix) {
		for _, cidr := range cidrs {
			list = append(list, netip.MustParsePrefix(cidr))
		}
		return list
	}
	count := []string{"-1", "1.5", "ten", "1e3", "99999999999999999999"}
	long := []string{"600", "0", "0s", "-5s", "9ms", "7d", "soon", "721h"}
	network := []string{"10.0.0.0/33", "proxy", "10.0.0", "10.0.0.1,proxy", "fe80::1%eth0", "::ffff:10.0.0.0/64", "*"}
	return []optionCase{
		{name: "DEV", get: func(c *config) any { return c.dev }, dev: true, prod: false,
			text: "f", want: false, moves: "*", bad: []string{"yes", "2"}},
		{name: "ENVIRONMENT", get: func(c *config) any { return c.environment }, dev: "development", prod: "production",
			text: "Production", want: "production", moves: "*", bad: []string{"staging", "dev"}},
		{name: "HOST", get: func(c *config) any { return c.host }, dev: "0.0.0.0", prod: "0.0.0.0",
			text: "unix:/run/parley.sock", want: "unix:/run/parley.sock",
			bad: []string{"127.0.0.1:1234", "[::1]", "256.1.1.1", "unix:parley.sock", "unix:/", "unix:", "a b", "-a", "*", "http://a"}},
		{name: "PORT", get: func(c *config) any { return c.port }, dev: 1234, prod: 1234,
			text: "0", want: 0, bad: []string{"-1", "65536", "http", "1234/tcp"}},
		{name: "TLS_CERT_FILE", get: func(c *config) any { return c.tlsCertFile }, dev: "", prod: "",
			text: "cert.pem", want: "cert.pem", with: "TLS_KEY_FILE=key.pem"},
		{name: "TLS_KEY_FILE", get: func(c *config) any { return c.tlsKeyFile }, dev: "", prod: "",
			text: "key.pem", want: "key.pem", with: "TLS_CERT_FILE=cert.pem"},
		{name: "LOG_LEVEL", get: func(c *config) any { return c.logLevel }, dev: slog.LevelInfo, prod: slog.LevelInfo,
			text: "WARN", want: slog.LevelWarn, bad: []string{"verbose", "info+2", "4"}},
		{name: "LOG_FORMAT", get: func(c *config) any { return c.logFormat }, dev: "text", prod: "json",
			text: "json", want: "json", bad: []string{"xml"}},
		{name: "METRICS_ROUTE", get: func(c *config) any { return c.metricsRoute }, dev: "/metrics", prod: "/metrics",
			text: "/internal/metrics", want: "/internal/metrics",
			bad: []string{"metrics", "/", "/metrics/", "/a//b", "/a/../ws", "/{x}", "/a b", "/a?b", "/a%20",
				"/ws", "/healthz", "/web/x", "/debug/pprof/heap", "/ws/signal/x", "/api/rooms", "/api/rooms/x", "/rendezvous/code"}},
		{name: "METRICS_ADDR", get: func(c *config) any { return c.metricsAddr }, dev: "", prod: "",
			text: "[::1]:9090", want: "[::1]:9090", bad: []string{"9090", "127.0.0.1", "127.0.0.1:", "a:http", "a:65536", "a b:1"}},
		{name: "DEMO", get: func(c *config) any { return c.demo }, dev: true, prod: false,
			text: "0", want: false, bad: []string{"yes"}},
		{name: "DRAIN_TIMEOUT", get: func(c *config) any { return c.drainTimeout }, dev: 10 * time.Second, prod: 10 * time.Second,
			text: "1500ms", want: 1500 * time.Millisecond, bad: []string{"10", "0s", "-1s", "2h"}},
		{name: "ROOM_TTL", get: func(c *config) any { return c.roomTTL }, dev: 10 * time.Minute, prod: 10 * time.Minute,
			text: "1h30m", want: 90 * time.Minute, bad: long},
		{name: "CODE_DIGITS", get: func(c *config) any { return c.codeDigits }, dev: 4, prod: 4,
			text: "7", want: 7, moves: "CODE_DIGITS_MAX", bad: []string{"3", "10", "four"}},
		{name: "CODE_DIGITS_MAX", get: func(c *config) any { return c.codeDigitsMax }, dev: 4, prod: 6,
			text: "9", want: 9, bad: []string{"3", "10", "four"}},
		{name: "APP_IDS", get: func(c *config) any { return c.appIDs }, dev: "any", prod: "minted",
			text: "minted", want: "minted", bad: []string{"all"}},
		{name: "SESSION_TTL", get: func(c *config) any { return c.sessionTTL }, dev: 10 * time.Minute, prod: 10 * time.Minute,
			text: "10ms", want: 10 * time.Millisecond, bad: long},
		{name: "RESUME_TTL", get: func(c *config) any { return c.resumeTTL }, dev: time.Minute, prod: time.Minute,
			text: "5s", want: 5 * time.Second, bad: long},
		{name: "ROOMS", get: func(c *config) any { return c.rooms }, dev: "off", prod: "off",
			text: "Open", want: "open", bad: []string{"on", "true"}},
		{name: "ROOM_MAX_TTL", get: func(c *config) any { return c.roomMaxTTL }, dev: 24 * time.Hour, prod: 24 * time.Hour,
			text: "8640h", want: 8640 * time.Hour, bad: append([]string{"8641h"}, long[:7]...)},
		{name: "ROOM_EMPTY_TTL", get: func(c *config) any { return c.roomEmptyTTL }, dev: 5 * time.Minute, prod: 5 * time.Minute,
			text: "10ms", want: 10 * time.Millisecond, bad: long},
		{name: "MINT_AUTH", get: func(c *config) any { return c.mintAuth }, dev: "none", prod: "none",
			text: "JWT", want: "jwt", with: "JWT_SECRET=s", moves: "ROOMS", bad: []string{"off", "token"}},
		{name: "JWT_SECRET", get: func(c *config) any { return c.jwtSecret }, dev: "", prod: "",
			text: "not for keeping", want: "not for keeping", moves: "ROOMS"},
		{name: "JWT_PUBLIC_KEY_FILE", get: func(c *config) any { return c.jwtPublicKeyFile }, dev: "", prod: "",
			text: keyFile, want: keyFile, moves: "ROOMS", bad: []string{notKey, notKey + ".missing"}},
		{name: "JWT_JWKS_URL", get: func(c *config) any { return c.jwksURL }, dev: "", prod: "",
			text: "http://127.0.0.1:8080/keys", want: "http://127.0.0.1:8080/keys", moves: "ROOMS",
			bad: []string{"http://keys.example", "keys.example", "ftp://a/b", "https://", "https:///a", "http://10.0.0.1/", "https://a b/"}},
		{name: "JWT_ISSUER", get: func(c *config) any { return c.jwtIssuer }, dev: "", prod: "",
			text: "https://login.example/", want: "https://login.example/"},
		{name: "JWT_AUDIENCE", get: func(c *config) any { return c.jwtAudience }, dev: []string(nil), prod: []string(nil),
			text: "games, files,", want: []string{"games", "files"}},
		{name: "JWT_USER_CLAIM", get: func(c *config) any { return c.jwtUserClaim }, dev: "user_id", prod: "user_id",
			text: "email", want: "email"},
		{name: "STUN_URLS", get: func(c *config) any { return c.stunURLs }, dev: []string(nil), prod: []string(nil),
			text: "stun:stun.example, stuns:[::1]:5349,stun:192.0.2.1:19302", want: []string{"stun:stun.example", "stuns:[::1]:5349", "stun:192.0.2.1:19302"},
			bad: []string{"stun.example", "stun://stun.example", "turn:a.example", "stun:a.example?transport=udp", "stun:", "stun::3478",
				"stun:a:0", "stun:a:65536", "stun:a:x", "stun:a b", "stun:a/b", "stun:::1", "stun:[::1", "stun:[::1]5349", "stun:[::1]]", "stun:[a.example]", "stun:[fe80::1%25eth0]:1", "http:a", "stun:me@a"}},
		{name: "TURN_URLS", get: func(c *config) any { return c.turnURLs }, dev: []string(nil), prod: []string(nil),
			text: "turn:a.example?transport=udp,turns:a.example:443?transport=tcp,turn:a.example:3478",
			want: []string{"turn:a.example?transport=udp", "turns:a.example:443?transport=tcp", "turn:a.example:3478"}, with: "TURN_SECRET=s",
			bad: []string{"turn.example", "turn://a", "stun:a", "turn:a?transport=sctp", "turn:a?transport=", "turn:a?x=1", "turn:a?transport=udp&x=1",
				"turn:a?", "turn:a:99999", "turn:?transport=udp", "turn:u:p@a.example"}},
		{name: "TURN_SECRET", get: func(c *config) any { return c.turnSecrets }, dev: []string(nil), prod: []string(nil),
			text: "new-one, old-one", want: []string{"new-one", "old-one"}, with: "TURN_URLS=turn:a.example"},
		{name: "TURN_TTL", get: func(c *config) any { return c.turnTTL }, dev: time.Hour, prod: time.Hour,
			text: "1s", want: time.Second, bad: append([]string{"999ms"}, long...)},
		{name: "TURN", get: func(c *config) any { return c.turn }, dev: "off", prod: "off",
			text: "ON", want: "on", bad: []string{"true", "yes", "closed"}},
		{name: "TURN_PORT", get: func(c *config) any { return c.turnPort }, dev: 3478, prod: 3478,
			text: "tcp://10.0.0.1:5000", want: 5000, bad: []string{"65536", "-1", "x"}},
		{name: "TURN_HOST", get: func(c *config) any { return c.turnHost }, dev: "", prod: "",
			text: "turn.example", want: "turn.example", bad: []string{"turn.example:3478", "turn:turn.example", "https://a", "a b", "[::1]"}},
		{name: "TURN_MAX_ALLOCATIONS", get: func(c *config) any { return c.turnMaxAllocations }, dev: 2000, prod: 2000,
			text: "1", want: 1, bad: []string{"0", "60001", "-1"}},
		{name: "TURN_MAX_BPS", get: func(c *config) any { return c.turnMaxBPS }, dev: int64(2 << 20), prod: int64(2 << 20),
			text: "512KiB", want: int64(512 << 10), bad: []string{"-1", "2MB"}},
		{name: "HEARTBEAT", get: func(c *config) any { return c.heartbeat }, dev: 20 * time.Second, prod: 20 * time.Second,
			text: "50ms", want: 50 * time.Millisecond, bad: append([]string{"2h"}, long...)},
		{name: "WS_MAX_MSG", get: func(c *config) any { return c.maxMessage }, dev: 1 << 20, prod: 1 << 20,
			text: "64MiB", want: 64 << 20, bad: []string{"1023", "65MiB", "1GiB", "1MB", "1.5MiB", "MiB", "-1KiB", "9007199254740993GiB"}},
		{name: "WS_READ_BUF", get: func(c *config) any { return c.readBuf }, dev: 4096, prod: 4096,
			text: "256", want: 256, bad: []string{"255", "1048577", "2MiB", "-4096", "4k"}},
		{name: "WS_WRITE_BUF", get: func(c *config) any { return c.writeBuf }, dev: 4096, prod: 4096,
			text: "1048576", want: 1 << 20, bad: []string{"255", "1048577", "2MiB", "-4096", "4k"}},
		{name: "CORS_ORIGINS", get: func(c *config) any { return c.corsOrigins }, dev: []string(nil), prod: []string(nil),
			text: "https://App.Example:443, http://a.b:8080,LOCALHOST,,https://[::1]:8443,Capacitor://localhost,app://-:80,",
			want: []string{"https://app.example", "http://a.b:8080", "localhost", "https://[::1]:8443", "capacitor://localhost", "app://-:80"},
			bad: []string{"*", "https://*.a.example", "https://a.example/", "a.example/app", "a.example:8080", "https://a?b",
				"https://a#", "https://u:p@a", "ftp://a", "wss://a", "https://", "null", "https://a:99999", "https://a:0",
				"https://a b", "a,b c", "https://bücher.example", "fe80::1%eth0"}},
		{name: "TRUSTED_PROXIES", get: func(c *config) any { return c.trustedProxies }, dev: []netip.Prefix(nil), prod: []netip.Prefix(nil),
			text: "10.1.2.3/8, 192.0.2.7,::ffff:172.16.5.0/108,2001:db8::1,::ffff:192.0.2.8",
			want: networks("10.0.0.0/8", "192.0.2.7/32", "172.16.0.0/12", "2001:db8::1/128", "192.0.2.8/32"), bad: network},
		{name: "RATE_EXEMPT", get: func(c *config) any { return c.rateExempt }, dev: []netip.Prefix(nil), prod: []netip.Prefix(nil),
			text: "2001:db8:1::/33", want: networks("2001:db8::/33"), bad: network},
		{name: "REDIS_URL", get: func(c *config) any { return c.redisURL }, dev: "", prod: "",
			text: "redis+sentinel://me:secret@a:26379,b/main/2", want: "redis+sentinel://me:secret@a:26379,b/main/2",
			bad: []string{"redis", "localhost:6379", "http://a", "redis://a:x", "redis://a/x", "redis://a,b", "redis://a?x=1", "redis+cluster://a,b",
				"redis+sentinel://a", "redis+sentinel:///main", "redis+sentinel://a/main/x", "redis+sentinel://a,,b/main"}},
		{name: "REDIS_HOST", get: func(c *config) any { return c.redisHost }, dev: "", prod: "",
			text: "redis.internal", want: "redis.internal", bad: []string{"a:6379", "redis://a", "a b", "256.1.1.1"}},
		{name: "REDIS_PORT", get: func(c *config) any { return c.redisPort }, dev: 6379, prod: 6379,
			text: "tcp://10.1.2.3:6380", want: 6380, with: "REDIS_HOST=a", bad: []string{"0", "65536", "redis", "-1", "tcp://a", "tcp://a:0"}},
		{name: "REDIS_PASSWORD", get: func(c *config) any { return c.redisPassword }, dev: "", prod: "",
			text: "not for keeping", want: "not for keeping", with: "REDIS_HOST=a"},
		{name: "HTTP_RATE_PER_MIN", get: func(c *config) any { return c.httpRatePerMin }, dev: 0, prod: 0,
			text: "60", want: 60, bad: count},
		{name: "WS_RATE_PER_MIN", get: func(c *config) any { return c.wsRatePerMin }, dev: 0, prod: 0,
			text: "61", want: 61, bad: count},
		{name: "WS_FRAMES_PER_SEC", get: func(c *config) any { return c.wsFramesPerSec }, dev: 0, prod: 0,
			text: "62", want: 62, bad: count},
		{name: "REDEEM_FAILS", get: func(c *config) any { return c.redeemFails }, dev: 10, prod: 10,
			text: "3", want: 3, bad: count},
		{name: "MAX_CONNS", get: func(c *config) any { return c.maxConns }, dev: 0, prod: 0,
			text: "63", want: 63, bad: count},
		{name: "MAX_CONNS_PER_IP", get: func(c *config) any { return c.maxConnsPerIP }, dev: 0, prod: 256,
			text: "64", want: 64, bad: count},
		{name: "MAX_CODES_PER_IP", get: func(c *config) any { return c.maxCodesPerIP }, dev: 0, prod: 100,
			text: "65", want: 65, bad: count},
		{name: "MAX_SESSIONS", get: func(c *config) any { return c.maxSessions }, dev: 100000, prod: 100000,
			text: "0", want: 0, bad: count},
		{name: "MAX_QUEUED_BYTES", get: func(c *config) any { return c.maxQueuedBytes }, dev: int64(256 << 20), prod: int64(256 << 20),
			text: "3 GiB", want: int64(3 << 30), bad: []string{"-1", "1TiB", "lots", "256mib", "99999999GiB"}},
	}
}

func TestOptions(t *testing.T) {
	cases := optionCases(t)
	var tabled, tested []string
	for _, o := range configOptions(new(config)) {
		tabled = append(tabled, o.name)
	}
	for _, tc := range cases {
		tested = append(tested, tc.name)
		t.Run(tc.name, func(t *testing.T) { testOption(t, tc, cases) })
	}
	if !slices.Equal(tabled, tested) {
		t.Errorf("the table has\n%q\nand the tests have\n%q", tabled, tested)
	}
}

func testOption(t *testing.T, tc optionCase, all []optionCase) {
	same := func(what string, got, want any) {
		t.Helper()
		if !reflect.DeepEqual(got, want) {
			t.Errorf("%s: got %#v, want %#v", what, got, want)
		}
	}
	same("default", tc.get(mustLoad(t, nil)), tc.dev)
	same("default with DEV=false", tc.get(mustLoad(t, nil, "DEV=false")), tc.prod)
	same("set but empty", tc.get(mustLoad(t, nil, tc.name+"=")), tc.dev)

	setting := tc.name + "=" + tc.text
	flagged := "-" + strings.ReplaceAll(strings.ToLower(setting[:len(tc.name)]), "_", "-")
	plain, c := mustLoad(t, nil), mustLoad(t, nil, setting, tc.with)
	same("variable", tc.get(c), tc.want)
	same("flag", tc.get(mustLoad(t, []string{flagged + "=" + tc.text}, tc.with)), tc.want)
	same("two dashes", tc.get(mustLoad(t, []string{"-" + flagged + "=" + tc.text}, tc.with)), tc.want)
	if _, isBool := tc.want.(bool); !isBool { // whose flag alone means true
		same("flag and value apart", tc.get(mustLoad(t, []string{flagged, tc.text}, tc.with)), tc.want)
	}
	// Nothing else may move: two rows of the table on one field would go unseen otherwise.
	for _, other := range all {
		beside, _, _ := strings.Cut(tc.with, "=")
		if other.name != tc.name && other.name != beside && other.name != tc.moves && tc.moves != "*" {
			same(setting+" leaves "+other.name, other.get(c), other.get(plain))
		}
	}

	for _, bad := range tc.bad {
		for _, in := range []struct{ args, env []string }{
			{nil, []string{tc.name + "=" + bad}},
			{[]string{flagged + "=" + bad}, []string{setting}}, // a bad flag is not excused by a good variable
		} {
			c, err := loadConfig(in.args, environ(in.env...))
			if got := problems(err); c != nil || len(got) != 1 || !strings.Contains(got[0], tc.name) {
				t.Errorf("%q %q: got %q, want one problem that names %s", in.args, in.env, got, tc.name)
			}
		}
	}
	if len(tc.bad) > 0 {
		same("a good flag over a bad variable", tc.get(mustLoad(t, []string{flagged + "=" + tc.text}, tc.name+"="+tc.bad[0], tc.with)), tc.want)
	}
	same("an empty flag over a bad variable", tc.get(mustLoad(t, []string{flagged + "="}, tc.name+"=\x00")), tc.dev)
}

func TestHostForms(t *testing.T) {
	for _, host := range []string{"127.0.0.1", "::1", "::", "fe80::1%eth0", "localhost", "parley.example", "web_1", "7.example", "unix:/a b"} {
		if got := mustLoad(t, nil, "HOST="+host).host; got != host {
			t.Errorf("HOST=%s became %q", host, got)
		}
	}
}

func TestBooleanFlags(t *testing.T) {
	for args, want := range map[string]bool{"-dev": true, "--dev": true, "-dev=true": true, "-dev=false": false, "-dev=0": false, "-dev -port=1": true} {
		if got := mustLoad(t, strings.Fields(args), "DEV=F").dev; got != want {
			t.Errorf("%s: dev is %v", args, got)
		}
	}
}

func TestDevAndEnvironment(t *testing.T) {
	for _, tc := range []struct {
		env  string
		dev  bool
		ids  string // one of the defaults that follow
		name string
	}{
		{"", true, "any", "development"},
		{"DEV=false", false, "minted", "production"},
		{"ENVIRONMENT=production", false, "minted", "production"},
		{"ENVIRONMENT=production DEV=false", false, "minted", "production"},
		{"ENVIRONMENT=development", true, "any", "development"},
		{"ENVIRONMENT=development DEV=false", false, "minted", "development"},
		{"ENVIRONMENT=production APP_IDS=any", false, "any", "production"},
	} {
		c := mustLoad(t, nil, strings.Fields(tc.env)...)
		if c.dev != tc.dev || c.appIDs != tc.ids || c.environment != tc.name {
			t.Errorf("%q: dev %v, appIDs %s, environment %s", tc.env, c.dev, c.appIDs, c.environment)
		}
	}
}

func TestCodeDigitsMax(t *testing.T) {
	for env, want := range map[string]int{
		"DEV=true CODE_DIGITS=5":                    5,
		"DEV=false CODE_DIGITS=5":                   6,
		"DEV=false CODE_DIGITS=8":                   8,
		"DEV=true CODE_DIGITS=5 CODE_DIGITS_MAX=5":  5,
		"DEV=false CODE_DIGITS=4 CODE_DIGITS_MAX=4": 4,
	} {
		if got := mustLoad(t, nil, strings.Fields(env)...).codeDigitsMax; got != want {
			t.Errorf("%s: codeDigitsMax is %d, want %d", env, got, want)
		}
	}
}

// Every problem is told at once, one sentence each, and a bad value makes no other seem bad.
func TestProblems(t *testing.T) {
	for _, tc := range []struct {
		name string
		args []string
		env  []string
		want []string // what each sentence must contain, in order
	}{
		{name: "several values and a contradiction",
			args: []string{"-heartbeat=never"},
			env:  []string{"PORT=x", "ROOM_TTL=600", "WS_MAX_MSG=1", "TLS_KEY_FILE=k"},
			want: []string{"PORT ", `ROOM_TTL must have a unit: not "600" but, for seconds, "600s"`, "-heartbeat (HEARTBEAT) ", "WS_MAX_MSG ", "TLS_CERT_FILE"}},
		{name: "production and DEV=true", env: []string{"ENVIRONMENT=production", "DEV=true"}, want: []string{"ENVIRONMENT=production contradicts DEV=true"}},
		{name: "production and -dev", args: []string{"-dev"}, env: []string{"ENVIRONMENT=production"}, want: []string{"DEV=true"}},
		{name: "production and a bad DEV", env: []string{"ENVIRONMENT=production", "DEV=maybe"}, want: []string{"DEV must"}},
		{name: "certificate alone", env: []string{"TLS_CERT_FILE=c"}, want: []string{"TLS_KEY_FILE"}},
		{name: "key alone", args: []string{"-tls-key-file", "k"}, want: []string{"TLS_CERT_FILE"}},
		{name: "max below digits", env: []string{"CODE_DIGITS=7", "CODE_DIGITS_MAX=6"}, want: []string{"CODE_DIGITS_MAX must not be below CODE_DIGITS"}},
		{name: "bad max", env: []string{"CODE_DIGITS=7", "CODE_DIGITS_MAX=x"}, want: []string{"CODE_DIGITS_MAX must be"}},
		{name: "bad digits", env: []string{"CODE_DIGITS=x", "CODE_DIGITS_MAX=5"}, want: []string{"CODE_DIGITS must be"}},
		{name: "two names that differ", env: []string{"CORS_ORIGINS=a", "ALLOWED_ORIGINS=b"}, want: []string{"CORS_ORIGINS and ALLOWED_ORIGINS are both given"}},
		{name: "a bad entry under the other name", env: []string{"ALLOWED_ORIGINS=*"}, want: []string{"ALLOWED_ORIGINS must"}},
		{name: "command line",
			args: []string{"serve", "-prot", "80", "-room-ttls=5m", "-", "--", "-=x", "-dev", "false", "-port"},
			want: []string{`"serve"`, "-prot is not a flag", "-room-ttls is not a flag", `"-"`, `"--"`, `"-=x"`, `"false"`, "-port (PORT) needs a value"}},
		{name: "all entries of a list", env: []string{"TRUSTED_PROXIES=a,10.0.0.1,b"}, want: []string{`not "a"; it must list addresses or CIDRs such as 10.0.0.0/8, not "b"`}},
		{name: "URL with a password", env: []string{"CORS_ORIGINS=https://me:s3cret@a.example"}, want: []string{`not "https://***@a.example": write "https://a.example"`}},
		{name: "rooms without a key", env: []string{"ROOMS=jwt"}, want: []string{"ROOMS=jwt needs a key"}},
		{name: "mint without a key", env: []string{"MINT_AUTH=jwt", "ROOMS=open"}, want: []string{"MINT_AUTH=jwt needs a key"}},
		{name: "a key that is refused is a key", env: []string{"ROOMS=jwt", "MINT_AUTH=jwt", "JWT_JWKS_URL=nowhere"}, want: []string{"JWT_JWKS_URL must"}},
		{name: "a key that cannot be read is a key", env: []string{"ROOMS=jwt", "JWT_SECRET_FILE=/missing/secret"}, want: []string{"JWT_SECRET_FILE cannot be read"}},
		{name: "two keys", env: []string{"JWT_SECRET=s", "JWT_JWKS_URL=https://a.example/keys"}, want: []string{"JWT_SECRET and JWT_JWKS_URL are given: keep one"}},
		{name: "a short secret", env: []string{"DEV=false", "JWT_SECRET=0123456789012345678901234567890"}, want: []string{"JWT_SECRET must have at least 32 bytes"}},
		{name: "TURN without a secret", env: []string{"TURN_URLS=turn:a.example"}, want: []string{"TURN_URLS needs TURN_SECRET"}},
		{name: "Redis twice", env: []string{"REDIS_URL=redis://a", "REDIS_HOST=a"}, want: []string{"REDIS_HOST and REDIS_URL are both given"}},
		{name: "a password of Redis alone", env: []string{"REDIS_PASSWORD=p"}, want: []string{"REDIS_PASSWORD needs REDIS_HOST"}},
		{name: "a TURN secret alone", env: []string{"TURN_SECRET=s"}, want: []string{"TURN_SECRET needs TURN_URLS or TURN=on"}},
		{name: "two relays", env: []string{"TURN=on", "TURN_URLS=turn:a.example", "TURN_SECRET=s"}, want: []string{"TURN=on and TURN_URLS are both given"}},
		{name: "a relay of many instances", env: []string{"TURN=on", "REDIS_HOST=a"}, want: []string{"TURN=on with Redis needs TURN_SECRET"}},
		{name: "a relay of many instances by URL", env: []string{"TURN=on", "REDIS_URL=redis://a"}, want: []string{"TURN=on with Redis needs TURN_SECRET"}},
		{name: "port in TURN_HOST", env: []string{"TURN_HOST=a.example:3478"}, want: []string{"the port goes into TURN_PORT"}},
		{name: "port in HOST", env: []string{"HOST=127.0.0.1:80"}, want: []string{"the port goes into PORT"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, err := loadConfig(tc.args, environ(tc.env...))
			got := problems(err)
			if c != nil || len(got) != len(tc.want) {
				t.Fatalf("got\n%s\nwant %d problems", strings.Join(got, "\n"), len(tc.want))
			}
			// The command line comes first, then the table, then contradictions.
			for i, want := range tc.want {
				if !strings.Contains(got[i], want) {
					t.Errorf("got %s\nwant %s", got[i], want)
				}
			}
		})
	}
}

// Kubernetes gives every pod variables of the services beside it, whatever these are called. None of
// them stops the start, unless it is PORT, which no service makes.
func TestServiceLinks(t *testing.T) {
	odd := regexp.MustCompile(`(_SERVICE_HOST|_SERVICE_PORT(_.*)?|_PORT_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)$`)
	for _, o := range configOptions(new(config)) {
		for _, name := range o.names() {
			if odd.MatchString(name) {
				t.Errorf("%s is a name of Kubernetes", name)
			}
			service, ok := strings.CutSuffix(name, "_PORT")
			if !ok {
				service = name // one that is called like an option
			}
			for _, scheme := range []string{"tcp", "udp", "sctp"} {
				for _, addr := range []string{"10.0.0.1", "[fd00::1]"} {
					port := scheme + "://" + addr + ":1234"
					proto := strings.ToUpper(scheme)
					if _, err := loadConfig(nil, environ(
						"PARLEY_PORT="+port, "PARLEY_SERVICE_HOST=10.0.0.1", "PARLEY_SERVICE_PORT=1234",
						service+"_PORT="+port, service+"_SERVICE_HOST="+addr, service+"_SERVICE_PORT=1234", service+"_SERVICE_PORT_HTTP=1234",
						service+"_PORT_1234_"+proto+"="+port, service+"_PORT_1234_"+proto+"_PROTO="+scheme,
						service+"_PORT_1234_"+proto+"_PORT=1234", service+"_PORT_1234_"+proto+"_ADDR="+addr)); err != nil {
						t.Errorf("beside a service %s: %v", strings.ToLower(service), err)
					}
				}
			}
		}
	}
	if c := mustLoad(t, nil, "REDIS_HOST=redis", "REDIS_PORT=tcp://10.0.0.1:6380"); c.redisPort != 6380 {
		t.Errorf("the port of the service is taken as %d", c.redisPort)
	}
	if c := mustLoad(t, nil, "REDIS_PORT=tcp://10.0.0.1:6379", "REDIS_SERVICE_HOST=10.0.0.1"); c.redisAddress.given() {
		t.Error("a service redis makes a server use it unasked")
	}
	if _, err := loadConfig(nil, environ("PORT=tcp://10.0.0.1:1234")); err == nil || !strings.Contains(err.Error(), `PORT must be a whole number from 0 to 65535, not "tcp://10.0.0.1:1234"`) {
		t.Errorf("PORT of a service: %v", err)
	}
}

func TestOriginHints(t *testing.T) {
	for entry, hint := range map[string]string{
		"*":                      "write each origin out",
		"https://a.example/":     `write "https://a.example"`,
		"https://a.example:80/x": `write "https://a.example:80"`,
		"wss://a.example":        `write "https://a.example"`,
		"ws://[::1]:80":          `write "http://[::1]"`,
		"a.example/app":          `write "a.example"`,
		"a.example:8080":         `write "https://a.example:8080"`,
		"capacitor://localhost/": `write "capacitor://localhost"`,
		"app://me@-/index.html":  `write "app://-"`,
		"app://":                 "must list full origins",
		"app://-:0":              "must list full origins",
		"app:///index.html":      "must list full origins",
		"1app://localhost":       "must list full origins",
		"app://a$b":              "must list full origins",
		"file://":                "any file can send that",
		"file:///index.html":     "must list full origins",
		"https://bücher.example": "xn--",
		"bücher.example":         "xn--",
		"null":                   "any website can send that",
	} {
		if _, err := loadConfig(nil, environ("CORS_ORIGINS="+entry)); err == nil || !strings.Contains(err.Error(), hint) {
			t.Errorf("%s: got %v, want a hint to %s", entry, err, hint)
		}
	}
}

func TestAlias(t *testing.T) {
	want := []string{"a.example"}
	for _, in := range []struct{ args, env []string }{
		{nil, []string{"ALLOWED_ORIGINS=a.example"}},
		{[]string{"-allowed-origins=a.example"}, []string{"ALLOWED_ORIGINS=b.example"}},
		{nil, []string{"ALLOWED_ORIGINS=a.example", "CORS_ORIGINS=a.example"}},
		{nil, []string{"ALLOWED_ORIGINS=a.example", "CORS_ORIGINS="}},
	} {
		if got := mustLoad(t, in.args, in.env...).corsOrigins; !slices.Equal(got, want) {
			t.Errorf("%q %q: got %q", in.args, in.env, got)
		}
	}
}

func TestHelp(t *testing.T) {
	for _, args := range []string{"-h", "--help", "-port x -bogus -h"} {
		if c, err := loadConfig(strings.Fields(args), environ("PORT=x")); c != nil || err != flag.ErrHelp {
			t.Errorf("%s: got %v", args, err)
		}
	}
	var b strings.Builder
	writeUsage(&b)
	usage, table := b.String(), configTable()
	for _, tc := range optionCases(t) {
		flagged := "-" + strings.ReplaceAll(strings.ToLower(tc.name), "_", "-")
		if !strings.Contains(usage, "  "+flagged+", "+tc.name) {
			t.Errorf("-h lacks %s", tc.name)
		}
		if !strings.Contains(table, "\n| `"+tc.name+"`") {
			t.Errorf("the reference's table lacks %s", tc.name)
		}
	}
	for _, want := range []string{"  -cors-origins, CORS_ORIGINS  -allowed-origins, ALLOWED_ORIGINS\n", "  -code-digits-max, CODE_DIGITS_MAX (default 4 / 6)\n"} {
		if !strings.Contains(usage, want) {
			t.Errorf("-h lacks %q:\n%s", want, usage)
		}
	}
	for row := range strings.Lines(table) {
		if strings.Count(row, "|") != 4 {
			t.Errorf("not three cells: %s", row)
		}
	}
	for _, want := range []string{"| `CORS_ORIGINS`, `ALLOWED_ORIGINS` |  | ", "| `APP_IDS` | `any` / `minted` | "} {
		if !strings.Contains(table, want) {
			t.Errorf("the reference's table lacks %q:\n%s", want, table)
		}
	}
}

func TestLogAttrs(t *testing.T) {
	c := mustLoad(t, nil, "DEV=false", "ROOM_TTL=3600s", "MAX_QUEUED_BYTES=1KiB", "ALLOWED_ORIGINS=B.example,https://a:443", "TRUSTED_PROXIES=10.1.1.1/8,::1", "LOG_LEVEL=error")
	got := make(map[string]string)
	var names []string
	for _, a := range c.logAttrs() {
		names = append(names, a.Key)
		got[a.Key] = a.Value.String()
	}
	for name, want := range map[string]string{
		"DEV": "false", "APP_IDS": "minted", "CODE_DIGITS_MAX": "6", "ROOM_TTL": "1h", "SESSION_TTL": "10m", "RESUME_TTL": "1m", "HEARTBEAT": "20s",
		"MAX_QUEUED_BYTES": "1024", "CORS_ORIGINS": "b.example,https://a", "TRUSTED_PROXIES": "10.0.0.0/8,::1/128", "LOG_LEVEL": "error", "METRICS_ADDR": "",
	} {
		if got[name] != want {
			t.Errorf("%s: got %q, want %q", name, got[name], want)
		}
	}
	for i, o := range configOptions(c) {
		if names[i] != o.name {
			t.Errorf("%s stands where the table has %s", names[i], o.name)
		}
	}
}

func TestWarnings(t *testing.T) {
	for env, want := range map[string]bool{
		"":                              true,
		"HOST=192.0.2.1":                true,
		"HOST=::":                       true,
		"HOST=parley.example":           true,
		"HOST=127.0.0.1":                false,
		"HOST=127.9.9.9":                false,
		"HOST=::ffff:127.0.0.1":         false,
		"HOST=::1":                      false,
		"HOST=localhost":                false,
		"HOST=unix:/run/parley.sock":    false,
		"DEV=false":                     false,
		"ENVIRONMENT=production HOST=a": false,
	} {
		got := mustLoad(t, nil, append(strings.Fields(env), testSTUN)...).warnings()
		if want != (len(got) == 1) {
			t.Errorf("%q: got %q", env, got)
		}
		if want && !(strings.Contains(got[0], "DEV=false") && strings.Contains(got[0], "HOST=127.0.0.1")) {
			t.Errorf("%q: %q does not say what to set", env, got)
		}
	}
}

// Whoever runs a server for others is told which devices will not connect.
func TestRelayWarnings(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	tls := " TLS_CERT_FILE=" + pair.CertFile + " TLS_KEY_FILE=" + pair.KeyFile
	for env, want := range map[string]string{
		"DEV=true TURN=on HOST=127.0.0.1":                "",
		"DEV=false":                                      "only devices in one network connect",
		"DEV=false " + testSTUN:                          "",
		"DEV=false TURN=on":                              "TURN=on without TLS_CERT_FILE",
		"DEV=false TURN=on" + tls:                        "",
		"DEV=false TURN=on TURN_HOST=10.0.0.7" + tls:     "TURN_HOST=10.0.0.7 is an address that devices in other networks cannot reach",
		"DEV=false TURN=on TURN_HOST=8.8.8.8" + tls:      "",
		"DEV=false TURN=on TURN_HOST=turn.example" + tls: "",
		"DEV=false TURN=on TURN_SECRET=s REDIS_URL=redis://redis.example" + tls:                       "TURN=on with Redis and without TURN_HOST",
		"DEV=false TURN=on TURN_SECRET=s TURN_HOST=one.example REDIS_URL=redis://redis.example" + tls: "",
	} {
		got := strings.Join(mustLoad(t, nil, strings.Fields(env)...).warnings(), "\n")
		if (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%q: got %q, want %q", env, got, want)
		}
	}
}

// A bare name of a user's own machine opens more than its writer may think.
func TestLocalOriginWarnings(t *testing.T) {
	for origin, want := range map[string]bool{
		"localhost":              true,
		"LocalHost":              true,
		"127.0.0.1":              true,
		"::1":                    true,
		"tauri.localhost":        true,
		"capacitor://localhost":  false,
		"https://localhost":      false,
		"http://127.0.0.1:3000":  false,
		"app.example":            false,
		"localhost.example":      false,
		"http://tauri.localhost": false,
	} {
		got := strings.Join(mustLoad(t, nil, "DEV=false", testSTUN, "CORS_ORIGINS=app.example,"+origin).warnings(), "\n")
		if opens := strings.Contains(got, "lists "+strings.ToLower(origin)+", ") && strings.Contains(got, "http and https, on any port"); opens != want || (got == "") == want {
			t.Errorf("%s: got %q", origin, got)
		}
	}
}

// A secretTable has what the real one will only have once there are keys and passwords.
type secretTable struct {
	key  string
	urls []string
}

func (s *secretTable) options() []option {
	atLeast8 := func(text string) error {
		if len(text) < 8 {
			return fmt.Errorf("must be 8 bytes or more, not %q", text) // quoted in spite of better knowledge
		}
		return nil
	}
	asIs := func(text string) (string, error) { return text, nil }
	return []option{
		{name: "KEY", secret: true, optionValue: checkedOption(&s.key, atLeast8)},
		{name: "URLS", optionValue: listOption(&s.urls, asIs, func(url string) string { return url })},
	}
}

func (s *secretTable) load(args []string, lookup func(string) (string, bool)) error {
	table := s.options()
	found, problems := gather(table, args, lookup)
	return errors.Join(append(problems, apply(table, found, true)...)...)
}

func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	oneLine, twoLines := file("one", "from a file\n"), file("two", "from a file\r\n\r\n")
	for _, tc := range []struct {
		name      string
		args, env []string
		want      string   // the key
		problem   []string // or what the one sentence must contain
	}{
		{name: "variable", env: []string{"KEY=hunter2hunter2"}, want: "hunter2hunter2"},
		{name: "flag", args: []string{"-key", "hunter2hunter2"}, want: "hunter2hunter2"},
		{name: "file", env: []string{"KEY_FILE=" + oneLine}, want: "from a file"},
		{name: "file flag", args: []string{"-key-file", oneLine}, want: "from a file"},
		{name: "only one newline goes", env: []string{"KEY_FILE=" + twoLines}, want: "from a file\r\n"},
		{name: "both", env: []string{"KEY=hunter2hunter2", "KEY_FILE=" + oneLine}, problem: []string{"KEY and KEY_FILE"}},
		{name: "both, with nothing there", env: []string{"KEY=hunter2hunter2", "KEY_FILE=" + dir + "/none"}, problem: []string{"KEY and KEY_FILE"}},
		{name: "both, and alike", env: []string{"KEY=" + oneLine, "KEY_FILE=" + oneLine}, problem: []string{"both given"}},
		{name: "flag and file", args: []string{"-key=hunter2hunter2"}, env: []string{"KEY_FILE=" + oneLine}, problem: []string{"-key (KEY) and KEY_FILE"}},
		{name: "no such file", env: []string{"KEY_FILE=" + dir + "/none"}, problem: []string{"KEY_FILE cannot be read", "/none"}},
		{name: "directory", env: []string{"KEY_FILE=" + dir}, problem: []string{"KEY_FILE cannot be read"}},
		{name: "empty file", env: []string{"KEY_FILE=" + file("empty", "\n")}, problem: []string{"KEY_FILE names an empty file"}},
		{name: "refused", env: []string{"KEY=hunter2"}, problem: []string{"KEY must be 8 bytes or more, not ***"}},
		{name: "refused, and quoted otherwise than written", env: []string{"KEY=hun\n\"2"}, problem: []string{"KEY must be 8 bytes or more, not ***"}},
		{name: "refused from a file", env: []string{"KEY_FILE=" + file("short", "hunter2\n")}, problem: []string{"KEY_FILE must be 8 bytes or more, not ***"}},
		{name: "mistyped flag", args: []string{"-keyy", "hunter2hunter2"}, problem: []string{"-keyy is not a flag"}},
		{name: "mistyped flag with =", args: []string{"-keyy=hunter2hunter2"}, problem: []string{"-keyy is not a flag"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			var s secretTable
			err := s.load(tc.args, environ(tc.env...))
			if err == nil && s.key != tc.want {
				t.Errorf("key is %q, want %q", s.key, tc.want)
			}
			if got := problems(err); len(got) > 1 || (err == nil) != (tc.problem == nil) {
				t.Fatalf("problems: %q", got)
			}
			for _, part := range tc.problem {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("%v\nlacks %s", err, part)
				}
			}
			if err != nil && (strings.Contains(err.Error(), "hun") || strings.Contains(err.Error(), "from a file")) {
				t.Errorf("the secret is in %v", err)
			}
		})
	}
}

func TestMasking(t *testing.T) {
	var s secretTable
	if got := fmt.Sprint(logOptions(s.options())); got != "[KEY= URLS=]" {
		t.Errorf("unset: %s", got)
	}
	urls := "redis://me:p,w/d@a:6379/0,turn:b,rediss://:x@y@c,https://plain.example/d"
	if err := s.load(nil, environ("KEY=hunter2hunter2", "URLS="+urls)); err != nil {
		t.Fatal(err)
	}
	if got := fmt.Sprint(logOptions(s.options())); got != "[KEY=*** URLS=redis://***@a:6379/0,turn:b,rediss://***@c,https://plain.example/d]" {
		t.Errorf("set: %s", got)
	}
}

// inRange repeats the bounds on purpose: what the rest of the server relies on.
func inRange(c *config) error {
	var errs []error
	check := func(name string, ok bool) {
		if !ok {
			errs = append(errs, errors.New(name+" is out of range"))
		}
	}
	for _, ttl := range []time.Duration{c.roomTTL, c.sessionTTL, c.resumeTTL, c.heartbeat} {
		check("a duration", ttl >= 10*time.Millisecond && ttl <= 720*time.Hour)
	}
	for _, n := range []int{c.httpRatePerMin, c.wsRatePerMin, c.wsFramesPerSec, c.redeemFails, c.maxConns, c.maxConnsPerIP, c.maxCodesPerIP, c.maxSessions} {
		check("a limit", n >= 0 && n <= 1e9)
	}
	check("MAX_QUEUED_BYTES", c.maxQueuedBytes >= 0 && c.maxQueuedBytes <= 1<<50)
	check("DRAIN_TIMEOUT", c.drainTimeout > 0 && c.drainTimeout <= time.Hour)
	check("PORT", c.port >= 0 && c.port <= 65535)
	check("CODE_DIGITS", 4 <= c.codeDigits && c.codeDigits <= c.codeDigitsMax && c.codeDigitsMax <= 9)
	check("WS_MAX_MSG", c.maxMessage >= 1024 && c.maxMessage <= 64<<20)
	check("WS_READ_BUF", c.readBuf >= 256 && c.readBuf <= 1<<20)
	check("WS_WRITE_BUF", c.writeBuf >= 256 && c.writeBuf <= 1<<20)
	check("HOST", c.host != "")
	check("METRICS_ROUTE", strings.HasPrefix(c.metricsRoute, "/") && len(c.metricsRoute) > 1)
	check("TLS", (c.tlsCertFile == "") == (c.tlsKeyFile == ""))
	check("LOG_FORMAT", c.logFormat == "text" || c.logFormat == "json")
	check("APP_IDS", c.appIDs == "any" || c.appIDs == "minted")
	check("ENVIRONMENT", c.environment == "development" || c.environment == "production" && !c.dev)
	for _, prefix := range slices.Concat(c.trustedProxies, c.rateExempt) {
		check(prefix.String(), prefix.IsValid() && prefix == prefix.Masked() && !prefix.Addr().Is4In6())
	}
	for _, origin := range c.corsOrigins {
		host := origin
		if _, rest, full := strings.Cut(origin, "://"); full {
			host = rest
		}
		check(origin, origin == strings.ToLower(origin) && host != "" && !strings.ContainsAny(host, "/*@?# "))
	}
	return errors.Join(errs...)
}

// Whatever is given, loadConfig answers with problems or with values in range; and those values,
// given as an environment, are the same configuration again.
func FuzzLoadConfig(f *testing.F) {
	f.Add("", "")
	for _, tc := range optionCases(f) {
		f.Add(tc.name+"="+tc.text+"\n"+tc.with, "")
		for _, bad := range tc.bad {
			f.Add(tc.name+"="+bad, "-"+strings.ToLower(strings.ReplaceAll(tc.name, "_", "-"))+"\n"+tc.text)
		}
	}
	f.Fuzz(func(t *testing.T, env, args string) {
		var list []string
		if args != "" {
			list = strings.Split(args, "\n")
		}
		c, err := loadConfig(list, environ(strings.Split(env, "\n")...))
		if err != nil {
			if c != nil || err != flag.ErrHelp && len(problems(err)) == 0 {
				t.Fatalf("got %v and %v", c, err)
			}
			return
		}
		if err := inRange(c); err != nil {
			t.Fatal(err)
		}
		c.warnings()
		c.logAttrs()
		effective := make(map[string]string)
		for _, o := range configOptions(c) {
			effective[o.name] = o.text()
		}
		again, err := loadConfig(nil, func(name string) (string, bool) { text, ok := effective[name]; return text, ok })
		if err != nil || !reflect.DeepEqual(again, c) {
			t.Fatalf("%v\nbecame\n%v\n%v", c, again, err)
		}
	})
}
