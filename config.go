package main

import (
	"crypto"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// config is what the operator decided, checked and complete. Nothing changes it after loadConfig.
type config struct {
	// Who it serves. environment is only another way to say dev.
	dev         bool
	environment string // development or production

	// Where it listens and what it says.
	host         string // an IP address, a host name or unix:/path
	port         int    // 0 is any free port
	tlsCertFile  string // both TLS files or none
	tlsKeyFile   string
	logLevel     slog.Level
	logFormat    string // text or json
	metricsRoute string
	demo         bool
	metricsAddr  string // host:port, or "" to serve metrics with everything else
	drainTimeout time.Duration

	// Codes and sessions.
	roomTTL       time.Duration
	codeDigits    int
	codeDigitsMax int    // never below codeDigits
	appIDs        string // any or minted
	sessionTTL    time.Duration
	resumeTTL     time.Duration

	// Rooms, and who may open them and mint codes. At most one kind of key is set.
	rooms            string // off, jwt or open
	roomMaxTTL       time.Duration
	roomEmptyTTL     time.Duration
	mintAuth         string // none or jwt
	jwtSecret        string
	jwtPublicKeyFile string
	jwtPublicKey     crypto.PublicKey // read from that
	jwksURL          string
	jwtIssuer        string // "" is any, as is an empty list of audiences
	jwtAudience      []string
	jwtUserClaim     string

	// STUN and TURN servers for clients: URLs and secrets of TURN both or neither.
	stunURLs    []string
	turnURLs    []string
	turnSecrets []string
	turnTTL     time.Duration

	// The server's own STUN and TURN; turnURLs are empty then.
	turn               string // on or off
	turnPort           int    // 0 is any free port
	turnHost           string // "" is the host that the client called
	turnMaxAllocations int
	turnMaxBPS         int64 // a session; 0 is no limit

	// Connections.
	heartbeat  time.Duration
	maxMessage int
	readBuf    int
	writeBuf   int

	// Who may call. Origins are lower case and without a default port, as browsers send them;
	// an entry without "://" is a bare host name, which stands for http and https on any port.
	corsOrigins    []string
	trustedProxies []netip.Prefix // masked, and IPv4 never in its IPv6-mapped form
	rateExempt     []netip.Prefix

	// Redis, by URL or in parts of one, or neither: then all is in memory.
	redisURL      string
	redisAddress  redisAddress // read from either; its zero is none
	redisHost     string
	redisPort     int
	redisPassword string

	// Limits; 0 is none, except for maxConns.
	httpRatePerMin int
	wsRatePerMin   int
	wsFramesPerSec int
	redeemFails    int
	maxConns       int // 0 is nine tenths of the open-file limit
	maxConnsPerIP  int
	maxCodesPerIP  int
	maxSessions    int
	maxQueuedBytes int64
}

// An option is one row of the table that everything else here is made from: the environment
// variables, the flags, -h, the table in docs/reference.md and the configuration in the log.
type option struct {
	name        string // the environment variable; ROOM_TTL is -room-ttl as a flag
	alias       string // another name for it
	def         string // the default, in the words an operator would use; "" is none
	prod        string // the default unless DEV=true, where that is another one
	secret      bool   // never shown, and read from the file that NAME_FILE names, if that is given
	optionValue        // the config field it fills, and how
	help        string
}

// configOptions is the table, bound to the fields of c.
func configOptions(c *config) []option {
	const (
		many  = 1_000_000_000 // a limit past which a number can only be a mistake
		soon  = 10 * time.Millisecond
		month = 30 * 24 * time.Hour
	)
	return []option{
		{name: "DEV", def: "true", optionValue: boolOption(&c.dev),
			help: "development: any browser origin is accepted and, with APP_IDS=any, any session ID; DEV=false is for everything that others can reach"},
		{name: "ENVIRONMENT", def: "development", prod: "production", optionValue: wordOption(&c.environment, "development", "production"),
			help: "another way to set DEV: production is DEV=false"},

		{name: "HOST", def: "0.0.0.0", optionValue: checkedOption(&c.host, checkHost),
			help: "address to listen on: an IP address, a host name, or unix:/path for a socket file"},
		{name: "PORT", def: "1234", optionValue: intOption(&c.port, 0, 65535),
			help: "port to listen on; 0 is any free one"},
		{name: "TLS_CERT_FILE", optionValue: stringOption(&c.tlsCertFile),
			help: "certificate chain in PEM; with TLS_KEY_FILE the server speaks TLS itself"},
		{name: "TLS_KEY_FILE", optionValue: stringOption(&c.tlsKeyFile),
			help: "private key of TLS_CERT_FILE, in PEM"},
		{name: "LOG_LEVEL", def: "info", optionValue: levelOption(&c.logLevel),
			help: "least level that is logged: debug, info, warn or error"},
		{name: "LOG_FORMAT", def: "text", prod: "json", optionValue: wordOption(&c.logFormat, "text", "json"),
			help: "form of a log line: text or json"},
		{name: "METRICS_ROUTE", def: "/metrics", optionValue: checkedOption(&c.metricsRoute, checkMetricsRoute),
			help: "path of the Prometheus metrics"},
		{name: "METRICS_ADDR", optionValue: checkedOption(&c.metricsAddr, checkAddr),
			help: "host:port of a listener for the metrics, which then are nowhere else, and for profiles at /debug/pprof/"},
		{name: "DEMO", def: "true", prod: "false", optionValue: boolOption(&c.demo),
			help: "serve the demo page at /"},
		{name: "DRAIN_TIMEOUT", def: "10s", optionValue: durationOption(&c.drainTimeout, time.Millisecond, time.Hour),
			help: "longest time between being told to stop and the exit"},

		{name: "ROOM_TTL", def: "10m", optionValue: durationOption(&c.roomTTL, soon, month),
			help: "how long a code can be redeemed"},
		{name: "CODE_DIGITS", def: "4", optionValue: intOption(&c.codeDigits, 4, 9),
			help: "digits of a code, 4 to 9"},
		{name: "CODE_DIGITS_MAX", def: "4", prod: "6", optionValue: intOption(&c.codeDigitsMax, 4, 9),
			help: "digits that codes may grow to while many are taken or guessed at; unless set, at least CODE_DIGITS"},
		{name: "APP_IDS", def: "any", prod: "minted", optionValue: wordOption(&c.appIDs, "any", "minted"),
			help: "sessions that may be joined: any UUID, or only those minted with a code"},
		{name: "SESSION_TTL", def: "10m", optionValue: durationOption(&c.sessionTTL, soon, month),
			help: "how long waiting mail outlives the last one to leave a session"},
		{name: "RESUME_TTL", def: "60s", optionValue: durationOption(&c.resumeTTL, soon, month),
			help: "how long a seat is kept for a client whose connection was lost"},

		{name: "ROOMS", def: "off", optionValue: wordOption(&c.rooms, "off", "jwt", "open"),
			help: "rooms: off; jwt, opened by whoever has a token, which is the default once a JWT key is set; or open, by anyone"},
		{name: "ROOM_MAX_TTL", def: "24h", optionValue: durationOption(&c.roomMaxTTL, soon, 12*month),
			help: "longest life of a room"},
		{name: "ROOM_EMPTY_TTL", def: "5m", optionValue: durationOption(&c.roomEmptyTTL, soon, month),
			help: "how long a room outlives the last one in it"},
		{name: "MINT_AUTH", def: "none", optionValue: wordOption(&c.mintAuth, "none", "jwt"),
			help: "who may mint codes: none is anyone, jwt whoever has a token"},
		{name: "JWT_SECRET", secret: true, optionValue: stringOption(&c.jwtSecret),
			help: "secret that tokens are signed with: HS256, HS384 or HS512; at least 32 bytes unless DEV=true"},
		{name: "JWT_PUBLIC_KEY_FILE", optionValue: keyFileOption(&c.jwtPublicKeyFile, &c.jwtPublicKey),
			help: "PEM file with the public key, or certificate, that tokens are checked with: RSA, ECDSA or Ed25519"},
		{name: "JWT_JWKS_URL", optionValue: checkedOption(&c.jwksURL, checkJWKSURL),
			help: "https URL of the set of public keys (JWKS) that tokens are checked with; it is read again every 15 minutes, and when a token names an unknown key"},
		{name: "JWT_ISSUER", optionValue: stringOption(&c.jwtIssuer),
			help: "issuer that a token must name; unset, any"},
		{name: "JWT_AUDIENCE", optionValue: listOption(&c.jwtAudience, keepText, sameText),
			help: "audiences, separated by commas, of which a token must name one; unset, any"},
		{name: "JWT_USER_CLAIM", def: "user_id", optionValue: stringOption(&c.jwtUserClaim),
			help: "claim that names the user; without it sub does"},

		{name: "STUN_URLS", optionValue: listOption(&c.stunURLs, parseSTUNURL, sameText),
			help: "STUN servers for clients, separated by commas: stun:host[:port] or stuns:host[:port]"},
		{name: "TURN_URLS", optionValue: listOption(&c.turnURLs, parseTURNURL, sameText),
			help: "TURN servers for clients, separated by commas: turn:host[:port], with ?transport=udp or ?transport=tcp, or turns:host[:port]"},
		{name: "TURN_SECRET", secret: true, optionValue: listOption(&c.turnSecrets, keepText, sameText),
			help: "secret that the TURN servers share (coturn: static-auth-secret); while it is being changed several, separated by commas. With TURN=on it is random unless given; instances that share a Redis must be given the same"},
		{name: "TURN_TTL", def: "1h", optionValue: durationOption(&c.turnTTL, time.Second, month),
			help: "how long a TURN credential lives; in this time one address gets them for at most 30 sessions"},

		{name: "TURN", def: "off", optionValue: wordOption(&c.turn, "on", "off"),
			help: "be a STUN and TURN server too, which relays between the clients of one session and to nobody else; instead of TURN_URLS"},
		{name: "TURN_PORT", def: "3478", optionValue: servicePortOption(&c.turnPort, 0, 65535),
			help: "UDP and TCP port of TURN=on, on HOST, or on all addresses where HOST is for a proxy on this machine alone; 0 is any free one. Where the server speaks TLS itself, TURN by TLS is on PORT"},
		{name: "TURN_HOST", optionValue: checkedOption(&c.turnHost, checkTURNHost),
			help: "host name or IP address that clients reach TURN=on at; unset, the host that they called"},
		{name: "TURN_MAX_ALLOCATIONS", def: "2000", optionValue: intOption(&c.turnMaxAllocations, 1, 60_000),
			help: "relayed addresses of TURN=on, of which a pair has at most 16, and a room of N seats 16 × (N − 1)"},
		{name: "TURN_MAX_BPS", def: "2MiB", optionValue: sizeOption(&c.turnMaxBPS, 0, 1<<40),
			help: "bytes a second that TURN=on relays for a session, in bytes or with KiB, MiB or GiB; 0 is no limit"},

		{name: "HEARTBEAT", def: "20s", optionValue: durationOption(&c.heartbeat, soon, time.Hour),
			help: "interval of WebSocket pings; a connection silent for two of them is dropped"},
		{name: "WS_MAX_MSG", def: "1048576", optionValue: sizeOption(&c.maxMessage, 1<<10, 64<<20),
			help: "largest WebSocket message, in bytes"},
		{name: "WS_READ_BUF", def: "4096", optionValue: sizeOption(&c.readBuf, 256, 1<<20),
			help: "bytes of the pooled buffer that a connection borrows while it reads; four times as many while that is too few"},
		{name: "WS_WRITE_BUF", def: "4096", optionValue: sizeOption(&c.writeBuf, 256, 1<<20),
			help: "bytes of the pooled buffer that a connection borrows while it writes; four times as many while that is too few"},

		{name: "CORS_ORIGINS", alias: "ALLOWED_ORIGINS", optionValue: listOption(&c.corsOrigins, parseOrigin, sameText),
			help: "browser origins that may call while DEV=false, besides the server's own, separated by commas: full origins of any scheme, such as https://host[:port] or capacitor://localhost, or bare host names for http and https on any port"},
		{name: "TRUSTED_PROXIES", optionValue: listOption(&c.trustedProxies, parseNetwork, netip.Prefix.String),
			help: "proxies whose X-Forwarded-For and X-Forwarded-Host are believed: addresses or CIDRs, separated by commas"},
		{name: "RATE_EXEMPT", optionValue: listOption(&c.rateExempt, parseNetwork, netip.Prefix.String),
			help: "callers that no limit by address applies to: addresses or CIDRs, separated by commas"},

		{name: "REDIS_URL", secret: true, optionValue: redisOption(&c.redisURL, &c.redisAddress),
			help: "Redis that any number of instances share: redis://[user:password@]host[:port][/db], rediss:// for TLS, or redis+sentinel://[user:password@]host[:port],host[:port]/name; unset, everything is in memory"},
		{name: "REDIS_HOST", optionValue: checkedOption(&c.redisHost, checkRedisHost),
			help: "host of Redis, instead of REDIS_URL"},
		{name: "REDIS_PORT", def: "6379", optionValue: servicePortOption(&c.redisPort, 1, 65535),
			help: "port of Redis beside REDIS_HOST"},
		{name: "REDIS_PASSWORD", secret: true, optionValue: stringOption(&c.redisPassword),
			help: "password of Redis beside REDIS_HOST"},

		{name: "HTTP_RATE_PER_MIN", def: "0", optionValue: intOption(&c.httpRatePerMin, 0, many),
			help: "API calls a minute from one address; 0 is no limit"},
		{name: "WS_RATE_PER_MIN", def: "0", optionValue: intOption(&c.wsRatePerMin, 0, many),
			help: "new WebSocket connections a minute from one address; 0 is no limit"},
		{name: "WS_FRAMES_PER_SEC", def: "0", optionValue: intOption(&c.wsFramesPerSec, 0, many),
			help: "frames a second from one connection; 0 is no limit"},
		{name: "REDEEM_FAILS", def: "10", optionValue: intOption(&c.redeemFails, 0, many),
			help: "wrong guesses from one address in each ROOM_TTL; 0 is no limit"},
		{name: "MAX_CONNS", def: "0", optionValue: intOption(&c.maxConns, 0, many),
			help: "WebSocket connections; 0 is nine tenths of the open-file limit"},
		{name: "MAX_CONNS_PER_IP", def: "0", prod: "256", optionValue: intOption(&c.maxConnsPerIP, 0, many),
			help: "WebSocket connections from one address, and from an IPv6 /48 eight times as many; 0 is no limit"},
		{name: "MAX_CODES_PER_IP", def: "0", prod: "100", optionValue: intOption(&c.maxCodesPerIP, 0, many),
			help: "unexpired codes of one address, and with APP_IDS=any the sessions it opened; of an IPv6 /48 eight times as many; 0 is no limit"},
		{name: "MAX_SESSIONS", def: "100000", optionValue: intOption(&c.maxSessions, 0, many),
			help: "live sessions, minted codes and rooms included; 0 is no limit"},
		{name: "MAX_QUEUED_BYTES", def: "256MiB", optionValue: sizeOption(&c.maxQueuedBytes, 0, 1<<50),
			help: "memory for all that waits in the process, in bytes or with KiB, MiB or GiB; 0 is no limit"},
	}
}

// A configError is all that is wrong with a configuration.
type configError struct {
	problems  []error
	logFormat string // how they are to be reported, if that was readable
}

func (e *configError) Error() string   { return errors.Join(e.problems...).Error() }
func (e *configError) Unwrap() []error { return e.problems }

// loadConfig reads flags and environment. It returns flag.ErrHelp for -h and -help, and otherwise
// every problem at once in a *configError, each sentence naming its variable.
func loadConfig(args []string, lookup func(string) (string, bool)) (*config, error) {
	c := new(config)
	table := configOptions(c)
	found, problems := gather(table, args, lookup)
	if slices.Contains(problems, flag.ErrHelp) {
		return nil, flag.ErrHelp
	}
	dev := devMode(found)
	problems = append(problems, apply(table, found, dev)...)

	// Three defaults depend on more than a column of the table.
	c.dev = dev
	if _, ok := found["ROOMS"]; !ok && len(jwtKeys(found)) > 0 {
		c.rooms = "jwt"
	}
	if _, ok := found["CODE_DIGITS_MAX"]; !ok {
		c.codeDigitsMax = max(c.codeDigitsMax, c.codeDigits)
	}
	problems = append(problems, c.contradictions(jwtKeys(found))...)
	problems = append(problems, redisContradictions(found)...)
	if len(problems) > 0 {
		return nil, &configError{problems, c.logFormat}
	}
	if c.redisHost != "" {
		c.redisAddress = redisAt(c.redisHost, c.redisPort, c.redisPassword)
	}
	return c, nil
}

// contradictions finds values that are fine alone and not together. A value that was refused has
// left its field zero, and a zero field contradicts nothing: one mistake is one problem. keys are
// the names of the keys to check tokens with that were given, refused or not.
func (c *config) contradictions(keys []string) []error {
	var problems []error
	if c.environment == "production" && c.dev {
		problems = append(problems, errors.New("ENVIRONMENT=production contradicts DEV=true: unset one of them"))
	}
	if c.tlsCertFile != "" && c.tlsKeyFile == "" {
		problems = append(problems, errors.New("TLS_CERT_FILE needs TLS_KEY_FILE beside it"))
	}
	if c.tlsKeyFile != "" && c.tlsCertFile == "" {
		problems = append(problems, errors.New("TLS_KEY_FILE needs TLS_CERT_FILE beside it"))
	}
	if c.codeDigitsMax != 0 && c.codeDigitsMax < c.codeDigits {
		problems = append(problems, fmt.Errorf("CODE_DIGITS_MAX must not be below CODE_DIGITS: %d is less than %d", c.codeDigitsMax, c.codeDigits))
	}
	if len(c.turnURLs) > 0 && len(c.turnSecrets) == 0 {
		problems = append(problems, errors.New("TURN_URLS needs TURN_SECRET beside it: credentials are made with it"))
	}
	if len(c.turnSecrets) > 0 && len(c.turnURLs) == 0 && c.turn != "on" {
		problems = append(problems, errors.New("TURN_SECRET needs TURN_URLS or TURN=on beside it"))
	}
	if len(c.turnURLs) > 0 && c.turn == "on" {
		problems = append(problems, errors.New("TURN=on and TURN_URLS are both given: keep one, this server's own relay or another one"))
	}
	if c.turn == "on" && len(c.turnSecrets) == 0 && (c.redisHost != "" || c.redisAddress.given()) {
		problems = append(problems, errors.New("TURN=on with Redis needs TURN_SECRET beside it, the same for all instances: each relay must know the credentials that another made"))
	}
	if len(keys) > 1 {
		problems = append(problems, fmt.Errorf("%s are given: keep one", strings.Join(keys, " and ")))
	}
	if c.rooms == "jwt" && len(keys) == 0 {
		problems = append(problems, errors.New("ROOMS=jwt needs a key: JWT_SECRET, JWT_PUBLIC_KEY_FILE or JWT_JWKS_URL"))
	}
	if c.mintAuth == "jwt" && len(keys) == 0 {
		problems = append(problems, errors.New("MINT_AUTH=jwt needs a key: JWT_SECRET, JWT_PUBLIC_KEY_FILE or JWT_JWKS_URL"))
	}
	if !c.dev && c.jwtSecret != "" && len(c.jwtSecret) < minJWTSecret {
		problems = append(problems, fmt.Errorf("JWT_SECRET must have at least %d bytes unless DEV=true: this one, of %d, can be found by trying", minJWTSecret, len(c.jwtSecret)))
	}
	return problems
}

// redisContradictions finds settings of Redis that are for different ways to say
// where it is.
func redisContradictions(found map[string]finding) (problems []error) {
	_, byURL := found["REDIS_URL"]
	_, byHost := found["REDIS_HOST"]
	for _, part := range []string{"REDIS_HOST", "REDIS_PASSWORD"} {
		if _, given := found[part]; !given {
			continue
		} else if byURL {
			problems = append(problems, fmt.Errorf("%s and REDIS_URL are both given: keep one", part))
		} else if !byHost {
			problems = append(problems, fmt.Errorf("%s needs REDIS_HOST beside it", part))
		}
	}
	return problems
}

// minJWTSecret is the bytes that RFC 7518 section 3.2 asks of a secret for HS256.
const minJWTSecret = 32

// jwtKeys returns the names of the keys to check tokens with that were given.
func jwtKeys(found map[string]finding) []string {
	var names []string
	for _, name := range []string{"JWT_SECRET", "JWT_PUBLIC_KEY_FILE", "JWT_JWKS_URL"} {
		if _, ok := found[name]; ok {
			names = append(names, name)
		}
	}
	return names
}

// warnings lists what is allowed but seldom meant.
func (c *config) warnings() (warnings []string) {
	if c.dev && !isLoopback(c.host) {
		warnings = append(warnings, fmt.Sprintf("DEV=true lets any website call, and %s can be reached from other machines: "+
			"set HOST=127.0.0.1 to develop, or DEV=false and CORS_ORIGINS to serve others", c.host))
		if len(c.turnSecrets) > 0 {
			warnings = append(warnings, "TURN_SECRET with DEV=true makes an open relay: any website gets credentials for your TURN server")
		}
	}
	if c.turn == "on" && !c.dev {
		if c.tlsCertFile == "" {
			warnings = append(warnings, "TURN=on without TLS_CERT_FILE and TLS_KEY_FILE: devices in networks that let out nothing but port 443 cannot use this relay")
		}
		if c.turnHost == "" && c.redisAddress.given() {
			warnings = append(warnings, "TURN=on with Redis and without TURN_HOST: set it to a name that leads to this instance and not to a load balancer, or two peers may be sent to different relays")
		}
		if ip := net.ParseIP(c.turnHost); ip != nil && !isPublic(ip) {
			warnings = append(warnings, fmt.Sprintf("TURN_HOST=%s is an address that devices in other networks cannot reach", c.turnHost))
		}
	}
	if !c.dev && c.turn != "on" && len(c.stunURLs) == 0 && len(c.turnURLs) == 0 {
		warnings = append(warnings, "without STUN_URLS and TURN_URLS only devices in one network connect to each other: "+
			"set TURN=on, or STUN_URLS, and TURN_URLS with TURN_SECRET for networks that need a relay")
	}
	for _, origin := range c.corsOrigins {
		if local := isLoopback(origin) || !strings.Contains(origin, "://") && strings.HasSuffix(origin, ".localhost"); local && !c.dev {
			warnings = append(warnings, fmt.Sprintf("CORS_ORIGINS lists %s, which lets in every page that any program on a user's own machine serves, "+
				"http and https, on any port. List full origins: capacitor://localhost or https://localhost for an app, http://localhost:3000 to develop", origin))
		}
	}
	return warnings
}

// logAttrs returns the effective values in the order of the table, secrets masked.
func (c *config) logAttrs() []slog.Attr { return logOptions(configOptions(c)) }

// startAttrs returns what the log of the start shows: all of logAttrs, but for a
// developer who reads text only the values that were changed.
func (c *config) startAttrs() []slog.Attr {
	all := c.logAttrs()
	if !c.dev || c.logFormat == "json" || c.logLevel <= slog.LevelDebug {
		return all
	}
	plain, err := loadConfig(nil, func(string) (string, bool) { return "", false })
	if err != nil {
		return all
	}
	defaults := plain.logAttrs()
	var changed []slog.Attr
	for i, a := range all {
		if !a.Equal(defaults[i]) {
			changed = append(changed, a)
		}
	}
	return changed
}

func logOptions(table []option) []slog.Attr {
	attrs := make([]slog.Attr, len(table))
	for i, o := range table {
		attrs[i] = slog.String(o.name, o.mask(o.text(), o.text()))
	}
	return attrs
}

// writeUsage writes the table for -h.
func writeUsage(w io.Writer) {
	fmt.Fprint(w, "Usage: parley [flags]\n       parley check URL\n       parley healthcheck [flags]\n       parley version\n\n"+
		"Every flag is an environment variable too: -room-ttl 5m is ROOM_TTL=5m. A flag wins.\n"+
		"Of two defaults the first holds while DEV=true, the second otherwise.\n\n")
	for _, o := range configOptions(new(config)) {
		for _, name := range o.names() {
			fmt.Fprintf(w, "  -%s, %s", flagName(name), name)
		}
		if o.def != "" {
			fmt.Fprintf(w, " (default %s)", o.defaults(""))
		}
		fmt.Fprintf(w, "\n        %s\n", o.help)
	}
}

// configTable returns the table as docs/reference.md has it. Of two defaults the first holds while DEV=true.
func configTable() string {
	var b strings.Builder
	b.WriteString("| Variable | Default | What it does |\n| --- | --- | --- |\n")
	for _, o := range configOptions(new(config)) {
		fmt.Fprintf(&b, "| `%s` | %s | %s |\n", strings.Join(o.names(), "`, `"), o.defaults("`"), o.help)
	}
	return b.String()
}

// names returns every variable that sets o.
func (o option) names() []string {
	names := []string{o.name}
	if o.alias != "" {
		names = append(names, o.alias)
	}
	if o.secret {
		names = append(names, o.name+"_FILE")
	}
	return names
}

// defaults returns what help shows as the default, each value between two quotes.
func (o option) defaults(quote string) string {
	switch {
	case o.def == "":
		return ""
	case o.prod == "":
		return quote + o.def + quote
	}
	return quote + o.def + quote + " / " + quote + o.prod + quote
}

// mask takes what must not be seen out of a sentence about o or its value: a secret, and in
// whatever looks like a URL the user name and password.
func (o option) mask(sentence, value string) string {
	if o.secret && value != "" {
		sentence = strings.NewReplacer(strconv.Quote(value), "***", value, "***").Replace(sentence)
	}
	parts := strings.Split(sentence, "://")
	for i, part := range parts[1:] {
		// The last "@": a password may hold one, or a "/" or a "," too.
		if at := strings.LastIndexByte(part, '@'); at >= 0 {
			parts[i+1] = "***" + part[at:]
		}
	}
	return strings.Join(parts, "://")
}

func flagName(variable string) string {
	return strings.ToLower(strings.ReplaceAll(variable, "_", "-"))
}

// A finding is the text that an option was given, and what to call the place it came from.
type finding struct{ text, from string }

// gather finds what was given for each option, by option name. An empty value counts as not given;
// an empty flag so brings the default back, whatever the environment says.
func gather(table []option, args []string, lookup func(string) (string, bool)) (map[string]finding, []error) {
	flags, problems := readFlags(table, args)
	find := func(variable string) (finding, bool) {
		if text, ok := flags[variable]; ok {
			return finding{text, fmt.Sprintf("-%s (%s)", flagName(variable), variable)}, text != ""
		}
		text, ok := lookup(variable)
		return finding{text, variable}, ok && text != ""
	}
	found := make(map[string]finding)
	for _, o := range table {
		for _, name := range o.names() {
			f, ok := find(name)
			if !ok {
				continue
			}
			first, taken := found[o.name]
			if name == o.name+"_FILE" && !taken {
				var err error
				if f.text, err = readSecret(f.text); err != nil {
					problems = append(problems, fmt.Errorf("%s %w", f.from, err))
				}
			}
			// A secret given both ways is refused without a look at the file: which one is meant?
			if taken && (o.secret || f.text != first.text) {
				problems = append(problems, fmt.Errorf("%s and %s are both given: keep one", first.from, f.from))
				continue
			}
			found[o.name] = f
		}
	}
	return found, problems
}

// readFlags returns what the command line gives for each variable. The flag package would stop at
// the first problem, and the operator is to see all of them.
func readFlags(table []option, args []string) (map[string]string, []error) {
	type target struct {
		variable string
		boolean  bool
	}
	known := make(map[string]target)
	for _, o := range table {
		for _, name := range o.names() {
			known[flagName(name)] = target{name, o.boolean}
		}
	}
	flags := make(map[string]string)
	var problems []error
	for len(args) > 0 {
		arg := args[0]
		args = args[1:]
		dashed, isFlag := strings.CutPrefix(arg, "-")
		name, text, hasText := strings.Cut(strings.TrimPrefix(dashed, "-"), "=")
		t, ok := known[name]
		switch {
		case !isFlag || name == "":
			problems = append(problems, fmt.Errorf("%q is not a flag: every option is given as -name=value", arg))
		case name == "h" || name == "help":
			return nil, []error{flag.ErrHelp}
		case !ok:
			problems = append(problems, fmt.Errorf("-%s is not a flag of parley: parley -h lists them", name))
			// What follows is its value, perhaps of a secret's mistyped name: not to be quoted.
			if !hasText && len(args) > 0 && !strings.HasPrefix(args[0], "-") {
				args = args[1:]
			}
		case hasText:
			flags[t.variable] = text
		case t.boolean:
			flags[t.variable] = "true"
		case len(args) == 0:
			problems = append(problems, fmt.Errorf("-%s (%s) needs a value", name, t.variable))
		default:
			flags[t.variable] = args[0]
			args = args[1:]
		}
	}
	return flags, problems
}

// readSecret returns what a file holds, without the newline that editors put at its end.
func readSecret(file string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", fmt.Errorf("cannot be read: %w", err)
	}
	secret := strings.TrimSuffix(strings.TrimSuffix(string(data), "\n"), "\r")
	if secret == "" {
		// As an unset secret it might turn off what it was meant to protect.
		return "", fmt.Errorf("names an empty file: %s", file)
	}
	return secret, nil
}

// devMode tells which column of defaults holds. It looks at the bare text, because defaults come
// before checks.
func devMode(found map[string]finding) bool {
	if f, ok := found["DEV"]; ok {
		dev, err := strconv.ParseBool(f.text)
		return dev && err == nil
	}
	return !strings.EqualFold(found["ENVIRONMENT"].text, "production")
}

// apply fills every option of the table with what was found, or else its default. A value that is
// refused leaves its field alone.
func apply(table []option, found map[string]finding, dev bool) []error {
	var problems []error
	for _, o := range table {
		f, ok := found[o.name]
		if !ok {
			f = finding{o.def, "the default of " + o.name}
			if !dev && o.prod != "" {
				f.text = o.prod
			}
		}
		if f.text == "" { // no default, or a secret that could not be read
			continue
		}
		if err := o.set(f.text); err != nil {
			problems = append(problems, errors.New(f.from+" "+o.mask(err.Error(), f.text)))
		}
	}
	return problems
}

// An optionValue is the tie between an option and its field.
type optionValue struct {
	set     func(text string) error // parse, check, store; the error continues a sentence that begins with the name
	text    func() string           // the field as it stands, in a form that set takes
	boolean bool                    // as a flag it needs no value
}

func parsedOption[T any](field *T, parse func(string) (T, error), format func(T) string) optionValue {
	return optionValue{
		set: func(text string) error {
			v, err := parse(text)
			if err == nil {
				*field = v
			}
			return err
		},
		text: func() string { return format(*field) },
	}
}

func stringOption(field *string) optionValue {
	return checkedOption(field, func(string) error { return nil })
}

func checkedOption(field *string, check func(string) error) optionValue {
	return parsedOption(field,
		func(text string) (string, error) { return text, check(text) },
		func(s string) string { return s })
}

// keyFileOption takes a PEM file and reads the public key in it.
func keyFileOption(field *string, key *crypto.PublicKey) optionValue {
	return checkedOption(field, func(file string) (err error) {
		*key, err = readPublicKey(file)
		return err
	})
}

// redisOption takes the URL of a Redis.
func redisOption(field *string, address *redisAddress) optionValue {
	return checkedOption(field, func(text string) (err error) {
		*address, err = parseRedisURL(text)
		return err
	})
}

// servicePortOption takes a port, and what Kubernetes sets unasked beside a service of that name:
// of one called redis, REDIS_PORT=tcp://address:port. Every option NAME_PORT is one of these.
func servicePortOption(field *int, lo, hi int) optionValue {
	port := intOption(field, lo, hi)
	return optionValue{
		set: func(text string) error {
			if scheme, addr, ok := strings.Cut(text, "://"); ok && slices.Contains([]string{"tcp", "udp", "sctp"}, scheme) {
				if _, p, err := net.SplitHostPort(addr); err == nil {
					text = p
				}
			}
			return port.set(text)
		},
		text: port.text,
	}
}

func boolOption(field *bool) optionValue {
	v := parsedOption(field, func(text string) (bool, error) {
		b, err := strconv.ParseBool(text)
		if err != nil {
			err = fmt.Errorf("must be true or false, not %q", text)
		}
		return b, err
	}, strconv.FormatBool)
	v.boolean = true
	return v
}

func wordOption(field *string, words ...string) optionValue {
	return parsedOption(field, func(text string) (string, error) {
		for _, w := range words {
			if strings.EqualFold(text, w) {
				return w, nil
			}
		}
		return "", fmt.Errorf("must be %s, not %q", strings.Join(words, " or "), text)
	}, func(s string) string { return s })
}

func levelOption(field *slog.Level) optionValue {
	var word string
	words := wordOption(&word, "debug", "info", "warn", "error")
	return parsedOption(field, func(text string) (level slog.Level, err error) {
		// slog alone would take INFO+3 as well.
		if err = words.set(text); err == nil {
			err = level.UnmarshalText([]byte(word))
		}
		return level, err
	}, func(l slog.Level) string { return strings.ToLower(l.String()) })
}

func intOption(field *int, lo, hi int) optionValue {
	return parsedOption(field, func(text string) (int, error) {
		n, err := strconv.Atoi(text)
		if err != nil || n < lo || n > hi {
			return 0, fmt.Errorf("must be a whole number from %d to %d, not %q", lo, hi, text)
		}
		return n, nil
	}, strconv.Itoa)
}

// sizeOption takes a number of bytes, plain or with a unit.
func sizeOption[T int | int64](field *T, lo, hi T) optionValue {
	return parsedOption(field, func(text string) (T, error) {
		digits, shift := text, 0
		for i, unit := range []string{"KiB", "MiB", "GiB"} {
			if number, ok := strings.CutSuffix(text, unit); ok {
				digits, shift = strings.TrimRight(number, " "), 10*(i+1)
			}
		}
		n, err := strconv.ParseInt(digits, 10, 64)
		if err != nil || n < 0 || n > int64(hi)>>shift || n<<shift < int64(lo) {
			return 0, fmt.Errorf("must be a number of bytes from %d to %d, such as 65536 or 64KiB, not %q", lo, hi, text)
		}
		return T(n << shift), nil
	}, func(n T) string { return strconv.FormatInt(int64(n), 10) })
}

func durationOption(field *time.Duration, lo, hi time.Duration) optionValue {
	return parsedOption(field, func(text string) (time.Duration, error) {
		d, err := time.ParseDuration(text)
		if _, withUnit := time.ParseDuration(text + "s"); err != nil && withUnit == nil {
			return 0, fmt.Errorf("must have a unit: not %q but, for seconds, %q", text, text+"s")
		}
		if err != nil || d < lo || d > hi {
			return 0, fmt.Errorf("must be a duration from %s to %s, such as 90s or 10m, not %q", shortDuration(lo), shortDuration(hi), text)
		}
		return d, nil
	}, shortDuration)
}

// shortDuration is d.String without its zeros: 10m, not 10m0s.
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

// listOption takes entries separated by commas; a comma too many is forgiven.
func listOption[T any](field *[]T, parse func(string) (T, error), format func(T) string) optionValue {
	return parsedOption(field, func(text string) ([]T, error) {
		var list []T
		var wrong []string
		for entry := range strings.SplitSeq(text, ",") {
			if entry = strings.TrimSpace(entry); entry == "" {
				continue
			}
			v, err := parse(entry)
			if err != nil {
				wrong = append(wrong, err.Error())
			}
			list = append(list, v)
		}
		if len(wrong) > 0 {
			return nil, errors.New(strings.Join(wrong, "; it "))
		}
		return list, nil
	}, func(list []T) string {
		texts := make([]string, len(list))
		for i, v := range list {
			texts[i] = format(v)
		}
		return strings.Join(texts, ",")
	})
}

// keepText and sameText are for lists of text that need no parsing, and no formatting.
func keepText(s string) (string, error) { return s, nil }
func sameText(s string) string          { return s }

// parseNetwork takes a CIDR or one address. Addresses are compared in their plain form, so a
// network of IPv4 addresses in IPv6 clothes becomes the IPv4 network that it means.
func parseNetwork(entry string) (netip.Prefix, error) {
	refused := fmt.Errorf("must list addresses or CIDRs such as 10.0.0.0/8, not %q", entry)
	prefix, err := netip.ParsePrefix(entry)
	if err != nil {
		addr, err := netip.ParseAddr(entry)
		if err != nil || addr.Zone() != "" {
			return netip.Prefix{}, refused
		}
		prefix = netip.PrefixFrom(addr, addr.BitLen())
	}
	if addr := prefix.Addr(); addr.Is4In6() {
		if prefix.Bits() < 96 {
			return netip.Prefix{}, refused
		}
		prefix = netip.PrefixFrom(addr.Unmap(), prefix.Bits()-96)
	}
	return prefix.Masked(), nil
}

// parseOrigin takes a full origin and returns it as browsers send it, or a bare host name. It says
// what to write instead of the usual near misses: an origin that can never match is found out late.
func parseOrigin(entry string) (string, error) {
	refuse := func(hint string, args ...any) (string, error) {
		return "", fmt.Errorf("must list full origins or bare host names such as app.example, not %q"+hint, append([]any{entry}, args...)...)
	}
	if strings.Contains(entry, "*") {
		return refuse(": write each origin out (only DEV=true accepts any)")
	}
	if strings.EqualFold(entry, "null") {
		return refuse(": any website can send that")
	}
	if strings.EqualFold(entry, "file://") {
		return refuse(": any file can send that")
	}
	if strings.ContainsFunc(entry, func(r rune) bool { return r > unicode.MaxASCII }) {
		return refuse(": write the name as browsers send it, in ASCII (xn--…)")
	}
	if strings.Contains(entry, "%") {
		return refuse("") // an IPv6 zone or an escaped host, which no browser sends
	}
	if host, ok := canonicalHost(entry); ok {
		return host, nil
	}
	full := entry
	if !strings.Contains(entry, "://") {
		full = "https://" + entry
	}
	u, err := url.Parse(full)
	if err != nil {
		return refuse("")
	}
	scheme := u.Scheme
	if web := map[string]string{"ws": "http", "wss": "https"}[scheme]; web != "" {
		scheme = web
	}
	host, ok := originHost(scheme, u.Hostname())
	if !ok || scheme == "ftp" { // of which no browser shows pages any more
		return refuse("")
	}
	origin := scheme + "://" + host
	if strings.Contains(host, ":") {
		origin = scheme + "://[" + host + "]"
	}
	if u.Port() != "" {
		port, err := strconv.ParseUint(u.Port(), 10, 16)
		if err != nil || port == 0 {
			return refuse("")
		}
		if (scheme != "http" || port != 80) && (scheme != "https" || port != 443) {
			origin += ":" + strconv.FormatUint(port, 10)
		}
	}
	switch {
	case full != entry && u.Port() == "":
		return refuse(": write %q", host)
	case !strings.EqualFold(entry, scheme+"://"+u.Host):
		return refuse(": write %q", origin)
	}
	return origin, nil
}

// isWebScheme reports whether pages of a scheme come from servers. Those of all others are of apps
// and extensions, which name themselves as they like.
func isWebScheme(scheme string) bool { return scheme == "http" || scheme == "https" }

// originHost returns the host of an origin as browsers send it. That of an app or an extension need
// not be one of the network: app://- is an origin.
func originHost(scheme, host string) (string, bool) {
	if canonical, ok := canonicalHost(host); ok || isWebScheme(scheme) {
		return canonical, ok
	}
	host = strings.ToLower(host)
	return host, host != "" && strings.Trim(host, "abcdefghijklmnopqrstuvwxyz0123456789-._") == ""
}

func checkHost(host string) error {
	if socket, ok := strings.CutPrefix(host, "unix:"); ok {
		if !strings.HasPrefix(socket, "/") || strings.HasSuffix(socket, "/") {
			return fmt.Errorf("must name a socket file by its full path, unix:/path, not %q", host)
		}
		return nil
	}
	if _, ok := canonicalHost(host); ok {
		return nil
	}
	hint := ""
	if _, _, err := net.SplitHostPort(host); err == nil {
		hint = ": the port goes into PORT"
	}
	return fmt.Errorf("must be an IP address, a host name or unix:/path, not %q%s", host, hint)
}

func checkTURNHost(host string) error {
	if _, ok := canonicalHost(host); !ok {
		hint := ""
		if _, _, err := net.SplitHostPort(host); err == nil {
			hint = ": the port goes into TURN_PORT"
		}
		return fmt.Errorf("must be an IP address or a host name, not %q%s", host, hint)
	}
	return nil
}

func checkRedisHost(host string) error {
	if _, ok := canonicalHost(host); !ok {
		return fmt.Errorf("must be an IP address or a host name, not %q", host)
	}
	return nil
}

func checkAddr(addr string) error {
	host, port, err := net.SplitHostPort(addr)
	if err == nil && host != "" {
		if _, ok := canonicalHost(host); !ok {
			err = errors.New("not a host")
		}
	}
	if _, portErr := strconv.ParseUint(port, 10, 16); err != nil || portErr != nil {
		return fmt.Errorf("must be host:port such as 127.0.0.1:9090, not %q", addr)
	}
	return nil
}

// checkMetricsRoute takes a path that means only itself to an http.ServeMux and that no other
// route answers.
func checkMetricsRoute(route string) error {
	odd := func(r rune) bool {
		return !('a' <= r && r <= 'z' || 'A' <= r && r <= 'Z' || '0' <= r && r <= '9' || strings.ContainsRune("/._-~", r))
	}
	if !strings.HasPrefix(route, "/") || path.Clean(route) != route || strings.ContainsFunc(route, odd) {
		return fmt.Errorf("must be a plain path such as /metrics, not %q", route)
	}
	taken := false
	switch route {
	case "/", "/rendezvous/code", "/rendezvous/redeem", "/ice-servers", "/healthz", "/readyz", "/whoami", "/version", "/ws", "/api/rooms":
		taken = true
	}
	if taken || strings.HasPrefix(route, "/api/rooms/") || strings.HasPrefix(route, "/ws/signal/") || strings.HasPrefix(route, "/web/") || strings.HasPrefix(route, profilesPath) {
		return fmt.Errorf("must be a path of its own, not %q, which has another use", route)
	}
	return nil
}

// canonicalHost returns an IP address in its shortest form and a host name in lower case.
func canonicalHost(host string) (string, bool) {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.String(), true
	}
	if len(host) > 253 {
		return "", false
	}
	host = strings.ToLower(host)
	label := ""
	for label = range strings.SplitSeq(host, ".") {
		if label == "" || len(label) > 63 || label[0] == '-' || label[len(label)-1] == '-' {
			return "", false
		}
		if strings.Trim(label, "abcdefghijklmnopqrstuvwxyz0123456789-_") != "" {
			return "", false
		}
	}
	// 10.0.0 and 256.1.1.1 are addresses gone wrong: no top-level domain is a number.
	return host, strings.Trim(label, "0123456789") != ""
}

func isLoopback(host string) bool {
	if addr, err := netip.ParseAddr(host); err == nil {
		return addr.IsLoopback()
	}
	return strings.HasPrefix(host, "unix:") || strings.EqualFold(host, "localhost")
}
