package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"embed"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"net"
	"net/url"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/google/uuid"
	"github.com/redis/go-redis/v9"
	"github.com/redis/go-redis/v9/logging"
	"github.com/redis/go-redis/v9/maintnotifications"
)

// What is kept in Redis, so that many instances serve as one: the connection,
// and the scripts that hub and codes are made of. docs/hub.md has the keys.

// Bounds of a wait for Redis.
const (
	redisTimeout = 2 * time.Second // of any call
	redisReady   = time.Second     // of the call that readiness makes
	redisConns   = 64              // connections at most, besides the subscription
)

// A redisAddress is where Redis is, from its URL: at one place, or where its
// Sentinels say.
type redisAddress struct {
	single    *redis.Options
	sentinels *redis.FailoverOptions
}

const (
	sentinelScheme    = "redis+sentinel"
	sentinelSchemeTLS = "rediss+sentinel"
	sentinelPort      = "26379"
)

var errRedisCluster = errors.New("a Redis Cluster cannot be used: scripts change what many sessions share in one step, " +
	"and a Cluster has no place for that; give one primary, or its Sentinels")

// parseRedisURL reads redis://[user:password@]host[:port][/db], rediss:// for
// TLS, unix://path, and redis+sentinel://[user:password@]host[:port],…/name[/db].
func parseRedisURL(text string) (a redisAddress, err error) {
	scheme, rest, ok := strings.Cut(text, "://")
	if !ok {
		return a, errors.New("must be a URL such as redis://host:6379")
	}
	switch strings.ToLower(scheme) {
	case "redis", "rediss", "unix":
		authority, _, _ := strings.Cut(rest, "/")
		if strings.Contains(authority[strings.LastIndex(authority, "@")+1:], ",") {
			return a, fmt.Errorf("names several hosts: %w (%s://host:26379,…/name)", errRedisCluster, sentinelScheme)
		}
		if a.single, err = redis.ParseURL(text); err != nil {
			return a, errors.New("must be a URL such as redis://user:password@host:6379/0") // the library's error shows the password
		}
		return a, nil
	case sentinelScheme, sentinelSchemeTLS:
		a.sentinels, err = parseSentinels(rest)
		if err == nil && strings.EqualFold(scheme, sentinelSchemeTLS) {
			a.sentinels.TLSConfig = &tls.Config{MinVersion: tls.VersionTLS12}
		}
		return a, err
	case "redis+cluster", "rediss+cluster", "redis-cluster", "rediss-cluster":
		return a, errRedisCluster
	}
	return a, fmt.Errorf("must begin with redis://, rediss://, unix:// or %s://", sentinelScheme)
}

// redisAt is the address of one Redis whose parts are known.
func redisAt(host string, port int, password string) redisAddress {
	return redisAddress{single: &redis.Options{Addr: net.JoinHostPort(host, strconv.Itoa(port)), Password: password}}
}

// parseSentinels reads what follows redis+sentinel://. It is no URL to package
// net/url, for it may have several ports.
func parseSentinels(text string) (*redis.FailoverOptions, error) {
	refused := fmt.Errorf("must be %s://[user:password@]host[:port],host[:port]/name[/db]", sentinelScheme)
	text, rawQuery, _ := strings.Cut(text, "?")
	query, err := url.ParseQuery(rawQuery)
	if err != nil {
		return nil, refused
	}
	o := &redis.FailoverOptions{SentinelUsername: query.Get("sentinel_username"), SentinelPassword: query.Get("sentinel_password")}
	if at := strings.LastIndex(text, "@"); at >= 0 {
		user, password, hasPassword := strings.Cut(text[:at], ":")
		if !hasPassword {
			user, password = "", user
		}
		if o.Username, err = url.PathUnescape(user); err != nil {
			return nil, refused
		}
		if o.Password, err = url.PathUnescape(password); err != nil {
			return nil, refused
		}
		text = text[at+1:]
	}
	hosts, path, _ := strings.Cut(text, "/")
	name, db, _ := strings.Cut(path, "/")
	if query.Has("db") {
		db = query.Get("db")
	}
	if db != "" {
		if o.DB, err = strconv.Atoi(db); err != nil || o.DB < 0 {
			return nil, refused
		}
	}
	o.MasterName = name
	for host := range strings.SplitSeq(hosts, ",") {
		if host == "" {
			return nil, refused
		}
		if _, _, err := net.SplitHostPort(host); err != nil {
			host = net.JoinHostPort(strings.Trim(host, "[]"), sentinelPort)
		}
		o.SentinelAddrs = append(o.SentinelAddrs, host)
	}
	if name == "" {
		return nil, refused
	}
	return o, nil
}

// client returns a client, which connects when it is first used.
func (a redisAddress) client(held *heldConns) *redis.Client {
	if o := a.sentinels; o != nil {
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, redisTimeout
		o.ContextTimeoutEnabled, o.MaxRetries, o.PoolSize, o.Protocol = true, -1, redisConns, 2
		o.DialerRetries, o.DisableIdentity = 1, true
		o.Dialer = held.dialer(redis.NewDialer(&redis.Options{DialTimeout: redisTimeout, TLSConfig: o.TLSConfig}))
		return redis.NewFailoverClient(o)
	}
	o := *a.single
	o.DialTimeout, o.ReadTimeout, o.WriteTimeout, o.PoolTimeout = redisTimeout, redisTimeout, redisTimeout, redisTimeout
	// A call is not made twice: nobody knows what the first has done.
	o.ContextTimeoutEnabled, o.MaxRetries, o.Protocol = true, -1, 2
	if o.PoolSize == 0 {
		o.PoolSize = redisConns
	}
	o.DialerRetries, o.DisableIdentity = 1, true
	o.MaintNotificationsConfig = &maintnotifications.Config{Mode: maintnotifications.ModeDisabled}
	if o.Dialer == nil {
		o.Dialer = redis.NewDialer(&o)
	}
	o.Dialer = held.dialer(o.Dialer)
	return redis.NewClient(&o)
}

// given reports whether there is a Redis.
func (a redisAddress) given() bool { return a != redisAddress{} }

func (a redisAddress) String() string {
	if a.sentinels != nil {
		return a.sentinels.MasterName + " of " + strings.Join(a.sentinels.SentinelAddrs, ",")
	}
	return a.single.Addr
}

// A redisStore is the one connection pool to Redis that hub and codes share.
type redisStore struct {
	// static after construction
	client  *redis.Client
	log     *slog.Logger
	metrics *redisMetrics
	held    *heldConns

	fit atomic.Bool // the server has been looked at, and can be used
}

func newRedisStore(a redisAddress, log *slog.Logger, m *redisMetrics) *redisStore {
	logging.Disable() // what the library would print is in the errors it returns
	held := &heldConns{all: make(map[net.Conn]struct{})}
	return &redisStore{client: a.client(held), held: held, log: log, metrics: m}
}

// heldConns are the open connections to Redis, in order to cut what waits in
// them: the library would wait for its deadline.
type heldConns struct {
	mu  sync.Mutex
	all map[net.Conn]struct{} // guarded by mu
}

type dialFunc = func(ctx context.Context, network, addr string) (net.Conn, error)

func (h *heldConns) dialer(dial dialFunc) dialFunc {
	return func(ctx context.Context, network, addr string) (net.Conn, error) {
		c, err := dial(ctx, network, addr)
		if err != nil {
			return nil, err
		}
		h.mu.Lock()
		h.all[c] = struct{}{}
		h.mu.Unlock()
		if socket, ok := c.(syscall.Conn); ok { // the library looks at it before it uses the connection again
			return heldSocket{heldConn{c, h}, socket}, nil
		}
		return heldConn{c, h}, nil
	}
}

// cut ends all connections.
func (h *heldConns) cut() {
	h.mu.Lock()
	defer h.mu.Unlock()
	for c := range h.all {
		c.Close()
	}
}

type heldConn struct {
	net.Conn
	in *heldConns
}

type heldSocket struct {
	heldConn
	syscall.Conn
}

func (c heldConn) Close() error {
	c.in.mu.Lock()
	delete(c.in.all, c.Conn)
	c.in.mu.Unlock()
	return c.Conn.Close()
}

// close ends every call that waits.
func (r *redisStore) close() {
	r.client.Close()
	r.held.cut()
}

// Oldest Redis that has XTRIM MINID and exclusive ranges. Valkey counts on from
// it.
const (
	redisMajor = 6
	redisMinor = 2
)

// check looks at the server once. The error is an *unfitError if it can never
// be used, otherwise it may be tried again.
func (r *redisStore) check(ctx context.Context) error {
	if r.fit.Load() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	err := r.client.Ping(ctx).Err()
	if text := fmt.Sprint(err); strings.HasPrefix(text, "WRONGPASS") || strings.HasPrefix(text, "NOAUTH") {
		return &unfitError{"Redis refuses the user name or password: " + text}
	} else if err != nil {
		return err
	}
	info, err := r.client.Info(ctx).Result()
	if err != nil && !redis.HasErrorPrefix(err, "NOPERM") {
		return err
	}
	facts := make(map[string]string)
	for line := range strings.Lines(info) {
		name, value, _ := strings.Cut(strings.TrimSpace(line), ":")
		facts[name] = value
	}
	if facts["cluster_enabled"] == "1" {
		return &unfitError{errRedisCluster.Error()}
	}
	var major, minor int
	if n, _ := fmt.Sscanf(facts["redis_version"], "%d.%d", &major, &minor); n == 2 &&
		(major < redisMajor || major == redisMajor && minor < redisMinor) {
		return &unfitError{fmt.Sprintf("Redis %s is too old: %d.%d is the first that can be used", facts["redis_version"], redisMajor, redisMinor)}
	}
	if facts["maxmemory_policy"] != "" && facts["maxmemory"] != "0" && facts["maxmemory_policy"] != "noeviction" {
		r.log.Warn("Redis may evict sessions that live: set maxmemory-policy to noeviction", "maxmemory_policy", facts["maxmemory_policy"])
	}
	if now, err := r.client.Time(ctx).Result(); err == nil && time.Since(now).Abs() > time.Second {
		r.log.Warn("the clocks of this machine and of Redis differ: codes and rooms end by either", "difference", time.Since(now).Round(time.Millisecond).String())
	}
	r.fit.Store(true)
	return nil
}

//go:embed lua
var luaFiles embed.FS

// redisClock is how scripts know the time, and by how much keys outlive what they
// hold, in microseconds.
const redisClock = `
local function clock()
  local t = redis.call('TIME')
  return t[1] * 1000000 + t[2]
end
local MARGIN = 1000000
`

// newScript puts a script together from files and what they expect before them.
func newScript(name, before string, files ...string) *redisScript {
	text := before
	for _, file := range append(files, name) {
		b, err := luaFiles.ReadFile("lua/" + file + ".lua")
		if err != nil {
			panic(err) // it is embedded
		}
		text += string(b)
	}
	return &redisScript{name: name, script: redis.NewScript(text)}
}

// scriptNames are the names of all scripts, for the metrics.
func scriptNames() []string {
	return []string{"open", "join", "leave", "post", "take", "ack", "held", "report", "tell", "end", "room", "look", "tick", "owned", "relay_of", "mint", "redeem", "codes"}
}

type redisScript struct {
	name   string
	script *redis.Script
}

// eval runs a script, once. Whatever the error, the script may have run.
func (r *redisStore) eval(ctx context.Context, s *redisScript, keys []string, args ...any) ([]any, error) {
	ctx, cancel := context.WithTimeout(ctx, redisTimeout)
	defer cancel()
	start := time.Now()
	res, err := s.script.Run(ctx, r.client, keys, args...).Slice()
	r.metrics.call(s.name, time.Since(start), err)
	if err == nil && len(res) == 0 {
		err = errors.New("an empty answer")
	}
	if err != nil {
		return nil, fmt.Errorf("redis: %s: %w", s.name, err)
	}
	return res, nil
}

// Readers of what scripts answer.

func luaText(v any) string {
	s, _ := v.(string)
	return s
}

func luaInt(v any) int64 {
	n, _ := v.(int64)
	return n
}

func luaList(v any) []any {
	l, _ := v.([]any)
	return l
}

// micros is a time, or a duration, as scripts have it.
func micros(d time.Duration) int64 { return d.Microseconds() }

// redisCodes are codes in Redis, for any number of instances. A code is a key
// that says live:<session>, and used:<session> once it is redeemed.
type redisCodes struct {
	// static after construction
	codeOptions
	*redisStore
	minting, redeeming, counting *redisScript

	digits atomic.Int64 // of the code minted last here
	active atomic.Int64 // when they were last counted
}

var _ codes = (*redisCodes)(nil)

func newRedisCodes(o codeOptions, r *redisStore, clock string) *redisCodes {
	c := &redisCodes{
		codeOptions: o, redisStore: r,
		minting: newScript("mint", clock), redeeming: newScript("redeem", clock), counting: newScript("codes", clock),
	}
	c.digits.Store(int64(o.digits))
	return c
}

// mintRounds bounds how often roundDraws random codes are drawn, of which nine
// tenths may be taken: a round then fails once in thirty times.
const (
	mintRounds = 16
	roundDraws = 32
)

func (c *redisCodes) Mint(ctx context.Context, session sessionID, ttl time.Duration) (string, time.Time, error) {
	digits := int(c.digits.Load())
	for range mintRounds {
		args := append([]any{session.String(), micros(ttl), c.failures(), c.codeOptions.digits, c.maxDigits, digits}, drawCodes(digits)...)
		res, err := c.eval(ctx, c.minting, nil, args...)
		if err != nil {
			return "", time.Time{}, err
		}
		switch answer := luaText(res[0]); {
		case len(res) == 3 && answer == "ok":
			if int(c.digits.Swap(int64(digits))) != digits {
				c.grown(digits)
			}
			return luaText(res[1]), time.UnixMicro(luaInt(res[2])), nil
		case len(res) == 2 && answer == "full":
			return "", time.Time{}, &exhaustedError{retryAfter: time.Duration(luaInt(res[1])) * time.Microsecond}
		case len(res) == 2 && (answer == "digits" || answer == "again"):
			digits = int(luaInt(res[1]))
		default:
			return "", time.Time{}, errBackend
		}
	}
	return "", time.Time{}, errNoCode
}

// errNoCode is less likely than any other failure: all random codes were taken.
var errNoCode = errors.New("redis: no free code was found")

// drawCodes returns random codes, each with the same chance.
func drawCodes(digits int) (all []any) {
	var random [4 * roundDraws]byte
	rand.Read(random[:]) // never fails
	size := uint32(math.Pow10(digits))
	for i := range roundDraws {
		if n, ok := uniform(binary.LittleEndian.Uint32(random[4*i:]), size); ok {
			all = append(all, fmt.Sprintf("%0*d", digits, n))
		}
	}
	return all
}

func (c *redisCodes) Redeem(ctx context.Context, code string) (session sessionID, expires time.Time, err error) {
	if !validCode(code) {
		return session, expires, errCodeGone
	}
	res, err := c.eval(ctx, c.redeeming, []string{"parley:code:" + code})
	if err != nil {
		return session, expires, err
	}
	answer := luaText(res[0])
	if answer == "gone" {
		return session, expires, errCodeGone
	}
	if len(res) < 3 {
		return session, expires, errBackend
	}
	if session, err = uuid.Parse(luaText(res[1])); err != nil {
		return session, expires, errBackend
	}
	expires = time.UnixMicro(luaInt(res[2]))
	if answer == "used" {
		return session, expires, errCodeUsed
	}
	return session, expires, nil
}

// Run counts the codes from time to time, and forgets those that have expired.
func (c *redisCodes) Run(ctx context.Context) error {
	every(ctx, janitorEvery, func() { c.sweep(ctx) })
	return nil
}

func (c *redisCodes) sweep(ctx context.Context) {
	if res, err := c.eval(ctx, c.counting, nil, c.codeOptions.digits, c.maxDigits); err == nil && len(res) == 2 {
		c.active.Store(luaInt(res[1]))
	} // else Redis is away, of which the hub tells
}

// stats returns how many codes are taken, in all instances, and the length of
// new ones here.
func (c *redisCodes) stats() (active, digits int) {
	return int(c.active.Load()), int(c.digits.Load())
}
