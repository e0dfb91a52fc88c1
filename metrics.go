package main

import (
	"context"
	"net/http"
	"net/http/pprof"
	"runtime"
	"runtime/debug"
	runtimemetrics "runtime/metrics"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metrics are a server's collectors, in a registry of its own, so that two
// servers in one process never collide. Label values come from closed sets and
// their series exist from the start, at zero; a labelled collector is kept as a
// map from value to series, whose zero-sized misses cannot create another.
type metrics struct {
	registry *prometheus.Registry

	codesMinted               prometheus.Counter
	redeems                   map[redeemResult]prometheus.Counter
	throttled                 prometheus.Counter // redeems refused for guessing
	rateLimited               map[route]prometheus.Counter
	refused                   map[string]prometheus.Counter // by the error's code
	untrusted                 prometheus.Counter
	turnIssued, turnThrottled prometheus.Counter // TURN credentials
	turn                      *turnMetrics

	connections prometheus.Gauge
	connects    prometheus.Counter
	closes      map[string]prometheus.Counter
	frames      [2][numFrameTypes]prometheus.Counter // by direction
	frameBytes  [2]prometheus.Counter
	dropped     [numDropReasons]prometheus.Counter
	resumes     [numResumeResults]prometheus.Counter
	rtt         prometheus.Histogram

	timeToFirst prometheus.Histogram
	established map[string]prometheus.Counter
	failed      map[string]prometheus.Counter
}

// otherLabel is counted in place of whatever is not in a closed set.
const otherLabel = "other"

// Directions of a frame, as indexes.
const (
	in = iota
	out
)

// A redeemResult is how a redeem ended.
type redeemResult string

const (
	redeemOK   redeemResult = "ok"
	redeemGone redeemResult = "gone"
	redeemBad  redeemResult = "bad"

	redeemThrottled redeemResult = "throttled"
)

// A resumeResult is how a return to a claimed seat ended.
type resumeResult uint8

const (
	resumeBack resumeResult = iota
	resumeTakeover
	resumeRefused
	numResumeResults
)

func (r resumeResult) String() string {
	return [numResumeResults]string{"resumed", "takeover", "refused"}[r]
}

// newMetrics returns the collectors of one server.
func newMetrics() *metrics {
	m := &metrics{registry: prometheus.NewRegistry()}
	m.registry.MustRegister(
		collectors.NewGoCollector(),
		collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}),
	)
	make := promauto.With(m.registry)
	counter := func(name, help string) prometheus.Counter {
		return make.NewCounter(prometheus.CounterOpts{Namespace: "parley", Name: name, Help: help})
	}
	counters := func(name, help string, labels ...string) *prometheus.CounterVec {
		return make.NewCounterVec(prometheus.CounterOpts{Namespace: "parley", Name: name, Help: help}, labels)
	}

	m.codesMinted = counter("codes_minted_total", "Codes minted.")
	redeems := counters("redeems_total", "Attempts to redeem a code.", "result")
	m.redeems = map[redeemResult]prometheus.Counter{}
	for _, r := range []redeemResult{redeemOK, redeemGone, redeemBad, redeemThrottled} {
		m.redeems[r] = redeems.WithLabelValues(string(r))
	}
	m.throttled = counter("redeem_throttled_total", "Redeems, room codes and passwords refused because their address guessed wrong too often.")
	rateLimited := counters("rate_limited_total", "Calls refused because their address calls too often.", "route")
	refused := counters("refused_total", "Calls and connections refused because a bound is reached: MAX_CONNS or MAX_SESSIONS, all codes, or what one address may hold.", "code")
	m.refused = map[string]prometheus.Counter{}
	for _, code := range []string{"at_capacity", "codes_exhausted", "too_many_codes", "too_many_connections"} {
		m.refused[code] = refused.WithLabelValues(code)
	}
	m.rateLimited = map[route]prometheus.Counter{}
	for _, r := range []route{routeCode, routeRedeem, routeICE, routeRooms, routeWS, routeSignal} {
		m.rateLimited[r] = rateLimited.WithLabelValues(string(r))
	}
	m.untrusted = counter("forwarded_untrusted_total", "Requests with forwarded headers from an address that is no trusted proxy.")

	credentials := counters("turn_credentials_total", "TURN credentials made, and refused because their address has enough.", "result")
	m.turnIssued, m.turnThrottled = credentials.WithLabelValues("issued"), credentials.WithLabelValues("throttled")
	m.turn = newTURNMetrics(make, counters)

	m.connections = make.NewGauge(prometheus.GaugeOpts{Namespace: "parley", Name: "ws_connections", Help: "WebSocket connections that are open."})
	m.connects = counter("ws_connections_total", "WebSocket connections opened.")
	var codes []string
	for _, c := range closeCodes() {
		codes = append(codes, c.String())
	}
	m.closes = series(counters("ws_closes_total", "WebSocket connections closed, by close code.", "code"), codes...)

	frames := counters("frames_total", "Frames received from (in) and written to (out) clients.", "type", "direction")
	frameBytes := counters("frame_bytes_total", "Bytes of those frames.", "direction")
	for direction, name := range []string{in: "in", out: "out"} {
		m.frameBytes[direction] = frameBytes.WithLabelValues(name)
		for t := range numFrameTypes {
			m.frames[direction][t] = frames.WithLabelValues(t.String(), name)
		}
	}
	dropped := counters("frames_dropped_total", "Frames refused, or accepted and not delivered.", "reason")
	for r := range numDropReasons {
		m.dropped[r] = dropped.WithLabelValues(r.String())
	}
	resumes := counters("resumes_total", "Returns to a claimed seat.", "result")
	for r := range numResumeResults {
		m.resumes[r] = resumes.WithLabelValues(r.String())
	}
	m.rtt = make.NewHistogram(prometheus.HistogramOpts{
		Namespace: "parley", Name: "ws_rtt_seconds", Help: "Round trips of WebSocket pings.",
		Buckets: prometheus.ExponentialBuckets(.0005, 2, 14),
	})

	build := buildVersion()
	make.NewGauge(prometheus.GaugeOpts{Namespace: "parley", Name: "build_info", Help: "Always 1; what is running is in the labels.",
		ConstLabels: prometheus.Labels{"version": build.Version, "commit": build.Commit, "go": build.Go}}).Set(1)

	m.timeToFirst = make.NewHistogram(prometheus.HistogramOpts{
		Namespace: "parley", Name: "time_to_first_seconds", Help: "From both peers being here to their own connection.",
		Buckets: []float64{.1, .25, .5, 1, 2, 3, 5, 8, 13, 20, 30, 60},
	})
	// The modes are the candidate types of RFC 8445 and what they come down to.
	m.established = series(counters("sessions_established_total", "Sessions whose peers report a connection of their own.", "mode"),
		"direct", "relay", "host", "srflx", "prflx")
	m.failed = series(counters("sessions_failed_total", "Sessions whose peers report that they failed to connect.", "reason"),
		"timeout", "failed", "disconnected", "closed", "no-candidates")
	return m
}

// turnMetrics are a server's collectors about the relay of TURN=on.
type turnMetrics struct {
	allocations prometheus.Gauge
	bytes       [2]prometheus.Counter // by direction
	dropped     map[turnDrop]prometheus.Counter
	refused     map[turnRefusal]prometheus.Counter
}

// A turnDrop is why something that came was thrown away.
type turnDrop string

const (
	turnMalformed    turnDrop = "malformed"
	turnTooLarge     turnDrop = "too_large"
	turnNoAllocation turnDrop = "no_allocation" // or no such channel
	turnNoPeer       turnDrop = "no_peer"       // there is no such relayed address
	turnOtherSession turnDrop = "other_session"
	turnNoPermission turnDrop = "no_permission"
	turnTooFast      turnDrop = "rate" // TURN_MAX_BPS
	turnQueueFull    turnDrop = "queue_full"
)

// A turnRefusal is why a request, or a connection, was refused.
type turnRefusal string

const (
	turnUnauthorized turnRefusal = "unauthorized"
	turnExpired      turnRefusal = "expired"
	turnSessionGone  turnRefusal = "session_gone"
	turnFull         turnRefusal = "full" // TURN_MAX_ALLOCATIONS
	turnSessionFull  turnRefusal = "session_full"
	turnForbidden    turnRefusal = "forbidden_peer"
	turnTransport    turnRefusal = "transport" // TCP, IPv6 or a pair of ports
	turnChannels     turnRefusal = "channels"
	turnTooOften     turnRefusal = "rate"
	turnBusy         turnRefusal = "busy"
	turnNoTURN       turnRefusal = "malformed"
	turnTooBig       turnRefusal = "too_large"
	turnSilent       turnRefusal = "silent"
)

func newTURNMetrics(make promauto.Factory, counters func(name, help string, labels ...string) *prometheus.CounterVec) *turnMetrics {
	m := &turnMetrics{
		allocations: make.NewGauge(prometheus.GaugeOpts{Namespace: "parley", Name: "turn_allocations", Help: "Relayed addresses that clients of TURN=on have."}),
		dropped:     map[turnDrop]prometheus.Counter{},
		refused:     map[turnRefusal]prometheus.Counter{},
	}
	bytes := counters("turn_bytes_total", "Bytes that the relay of TURN=on was given (in), and handed over (out).", "direction")
	m.bytes[in], m.bytes[out] = bytes.WithLabelValues("in"), bytes.WithLabelValues("out")
	dropped := counters("turn_dropped_total", "Packets that the relay of TURN=on threw away.", "reason")
	for _, r := range []turnDrop{turnMalformed, turnTooLarge, turnNoAllocation, turnNoPeer, turnOtherSession, turnNoPermission, turnTooFast, turnQueueFull} {
		m.dropped[r] = dropped.WithLabelValues(string(r))
	}
	refused := counters("turn_refused_total", "Requests that the relay of TURN=on refused or left without an answer, and connections that it closed.", "reason")
	for _, r := range []turnRefusal{turnUnauthorized, turnExpired, turnSessionGone, turnFull, turnSessionFull, turnForbidden, turnTransport,
		turnChannels, turnTooOften, turnBusy, turnNoTURN, turnTooBig, turnSilent} {
		m.refused[r] = refused.WithLabelValues(string(r))
	}
	return m
}

func (m *turnMetrics) drop(r turnDrop)      { m.dropped[r].Inc() }
func (m *turnMetrics) refuse(r turnRefusal) { m.refused[r].Inc() }

// series creates the series of v for each value, and for otherLabel.
func series(v *prometheus.CounterVec, values ...string) map[string]prometheus.Counter {
	s := map[string]prometheus.Counter{otherLabel: v.WithLabelValues(otherLabel)}
	for _, value := range values {
		s[value] = v.WithLabelValues(value)
	}
	return s
}

// pick returns the series for value, or for otherLabel.
func pick(s map[string]prometheus.Counter, value string) prometheus.Counter {
	if c, ok := s[value]; ok {
		return c
	}
	return s[otherLabel]
}

// gauges are the numbers that are asked for when metrics are.
type gauges struct {
	codes    func() (active, digits int)
	sessions func() int
	rooms    func() int
	queued   func() int64 // bytes
}

// watch adds the gauges, whose sources are made with the metrics in hand.
func (m *metrics) watch(g gauges) {
	make := promauto.With(m.registry)
	gauge := func(name, help string, value func() float64) {
		make.NewGaugeFunc(prometheus.GaugeOpts{Namespace: "parley", Name: name, Help: help}, value)
	}
	gauge("codes_active", "Codes that are taken: minted, redeemed or not, and not expired.", func() float64 {
		active, _ := g.codes()
		return float64(active)
	})
	gauge("code_digits", "Digits of new codes.", func() float64 {
		_, digits := g.codes()
		return float64(digits)
	})
	gauge("sessions_active", "Sessions that are open, rooms among them.", func() float64 { return float64(g.sessions()) })
	gauge("rooms_active", "Rooms that are open.", func() float64 { return float64(g.rooms()) })
	gauge("mailbox_bytes", "Bytes that wait in mailboxes and in half-received messages.", func() float64 { return float64(g.queued()) })
}

// frameIn counts a frame of n bytes from a client, frameOut one to a client.
func (m *metrics) frameIn(t frameType, n int)  { m.frame(in, t, n) }
func (m *metrics) frameOut(t frameType, n int) { m.frame(out, t, n) }

func (m *metrics) frame(direction int, t frameType, n int) {
	m.frames[direction][t].Inc()
	m.frameBytes[direction].Add(float64(n))
}

func (m *metrics) closed(code closeCode) { pick(m.closes, code.String()).Inc() }

func (c closeCode) String() string { return strconv.Itoa(int(c)) }

func (m *metrics) drop(r dropReason, n int) { m.dropped[r].Add(float64(n)) }

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{Registry: m.registry})
}

// redisMetrics are a server's collectors about its Redis. Where there is none
// they do not exist.
type redisMetrics struct {
	calls      map[string]prometheus.Observer
	errors     prometheus.Counter
	subscribed prometheus.Gauge
	wakes      prometheus.Counter
	leasesLost prometheus.Counter
	reseated   prometheus.Counter
	pruned     prometheus.Counter
	leaving    prometheus.Gauge
}

func newRedisMetrics(m *metrics) *redisMetrics {
	make := promauto.With(m.registry)
	counter := func(name, help string) prometheus.Counter {
		return make.NewCounter(prometheus.CounterOpts{Namespace: "parley", Subsystem: "redis", Name: name, Help: help})
	}
	r := &redisMetrics{
		calls:  map[string]prometheus.Observer{},
		errors: counter("errors_total", "Calls that Redis did not answer in time, or with an error."),
		subscribed: make.NewGauge(prometheus.GaugeOpts{Namespace: "parley", Subsystem: "redis", Name: "subscribed",
			Help: "1 while notifications from other instances can be heard."}),
		wakes:      counter("wakes_total", "Notifications from other instances."),
		leasesLost: counter("leases_lost_total", "Times that this instance was taken for dead, or Redis was away for so long."),
		reseated:   counter("reseated_total", "Connections that were seated again after that."),
		leaving: make.NewGauge(prometheus.GaugeOpts{Namespace: "parley", Subsystem: "redis", Name: "leaves_pending",
			Help: "Seats of connections that ended while Redis was away, which does not know of it yet."}),
		pruned: counter("pruned_seats_total", "Seats of dead instances that this one has dealt with."),
	}
	seconds := make.NewHistogramVec(prometheus.HistogramOpts{
		Namespace: "parley", Subsystem: "redis", Name: "call_seconds", Help: "Time that calls to Redis take, by script.",
		Buckets: prometheus.ExponentialBuckets(.0001, 2, 15),
	}, []string{"script"})
	for _, name := range scriptNames() {
		r.calls[name] = seconds.WithLabelValues(name)
	}
	return r
}

func (r *redisMetrics) call(script string, took time.Duration, err error) {
	r.calls[script].Observe(took.Seconds())
	if err != nil {
		r.errors.Inc()
	}
}

func (r *redisMetrics) setSubscribed(yes bool) {
	r.subscribed.Set(0)
	if yes {
		r.subscribed.Set(1)
	}
}

// refuse counts an error that tells of a bound; others it does not.
func (m *metrics) refuse(code string) {
	if c := m.refused[code]; c != nil {
		c.Inc()
	}
}

// memoryLook is the time between two looks at whether memory should be given
// back.
const memoryLook = 2 * time.Second

// returnMemory gives memory that a wave of connections has left behind back to
// the system, until ctx is done. By itself the collector would run again when as
// much again has been allocated, which idle connections do not do for hours.
func returnMemory(ctx context.Context) {
	var last, returned memoryUse
	every(ctx, memoryLook, func() {
		now := readMemoryUse()
		wave, quiet := now.allocatedSince(returned) > now.wave(), now.allocatedSince(last) < now.wave()/8
		if last = now; wave && quiet {
			debug.FreeOSMemory()
			returned = now
		}
	})
}

// memoryUse is what the runtime knows of its heap, in bytes.
type memoryUse struct {
	allocated uint64 // ever
	resident  uint64
}

func readMemoryUse() memoryUse {
	samples := []runtimemetrics.Sample{
		{Name: "/gc/heap/allocs:bytes"},
		{Name: "/memory/classes/heap/objects:bytes"},
		{Name: "/memory/classes/heap/unused:bytes"},
		{Name: "/memory/classes/heap/free:bytes"},
	}
	runtimemetrics.Read(samples)
	u := memoryUse{allocated: samples[0].Value.Uint64()}
	for _, s := range samples[1:] {
		u.resident += s.Value.Uint64()
	}
	return u
}

func (u memoryUse) allocatedSince(before memoryUse) uint64 { return u.allocated - before.allocated }

// wave is how much must have been allocated for a collection to be worth it: it
// costs as one of every eighth of the heap would.
func (u memoryUse) wave() uint64 { return u.resident/8 + 4<<20 }

// profilesPath is where the listener of METRICS_ADDR has the runtime's profiles
// (https://go.dev/blog/pprof), which are nowhere else: they tell too much, and
// cost too much, to be had by anyone.
const profilesPath = "/debug/pprof/"

// How often locks and waits are noted while a profile of them is taken: each
// event, and each that blocks for so long.
const (
	mutexFraction = 1
	blockRate     = 10_000 // ns
)

// withProfiles serves profiles, and everything else by next.
//
// There is no cmdline: flags may be secrets. And a page in a browser may ask for
// none, of whatever origin.
func withProfiles(next http.Handler) http.Handler {
	var locks sync.Mutex // held while what a mutex or block profile sets is set
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		name, ok := strings.CutPrefix(r.URL.Path, profilesPath)
		if !ok {
			next.ServeHTTP(w, r)
			return
		}
		if len(r.Header["Origin"]) > 0 || name == "cmdline" {
			http.NotFound(w, r)
			return
		}
		switch name {
		case "profile":
			pprof.Profile(w, r)
		case "symbol":
			pprof.Symbol(w, r)
		case "trace":
			pprof.Trace(w, r)
		case "mutex", "block":
			// Of these there is something to see only for ?seconds=: noting them
			// always would slow everyone down.
			locks.Lock()
			defer locks.Unlock()
			runtime.SetMutexProfileFraction(mutexFraction)
			runtime.SetBlockProfileRate(blockRate)
			defer runtime.SetMutexProfileFraction(0)
			defer runtime.SetBlockProfileRate(0)
			pprof.Index(w, r)
		default:
			pprof.Index(w, r)
		}
	})
}
