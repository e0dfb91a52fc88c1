package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"math"
	"net/http"
	"net/url"
	"path"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/rs/cors"
)

// A server answers HTTP and WebSocket requests with a hub and a code table.
type server struct {
	// static after construction
	cfg        *config
	log        *slog.Logger
	hub        hub
	backend    backend // nil while all is in this process
	codes      codes
	metrics    *metrics
	decoders   *sync.Pool // of *frameDecoder
	version    versionInfo
	callers    *callerPolicy
	preflights *cors.Cors
	jsonHeader http.Header // of every answer in JSON
	limits     limits
	ice        *iceDirectory
	turn       *turnServer // nil unless TURN=on
	// verifier is nil where nothing asks for tokens.
	verifier   verifier
	passwords  *passwords
	background []func(context.Context) error // runs until the server stops
	connOptions

	clients  clientSet
	draining atomic.Bool
}

func newServer(cfg *config, log *slog.Logger, m *metrics, h hub, c codes, l limits, queued *budget) *server {
	verifier, keys := newVerifier(cfg, log)
	s := &server{
		cfg: cfg, log: log, hub: h, codes: c, metrics: m,
		decoders:   newFrameDecoderPool(),
		version:    buildVersion(),
		callers:    newCallerPolicy(cfg, log, m.untrusted),
		limits:     l,
		jsonHeader: http.Header{"Content-Type": {"application/json"}, "Cache-Control": {"no-store"}},
		verifier:   verifier,
		passwords:  newPasswords(),
		background: []func(context.Context) error{h.Run, c.Run, l.run},
		connOptions: connOptions{
			heartbeat:  cfg.heartbeat,
			maxMessage: cfg.maxMessage,
			readSize:   cfg.readBuf,
			writeSize:  cfg.writeBuf,
			buffers:    new(bufferPool),
			outboxes:   newOutboxPool(cfg.writeBuf),
			queued:     queued,
			partial:    &budget{limit: queued.limit},
			metrics:    m,
			start:      time.Now(),
			tasks:      newTaskGroup(),
		},
		clients: clientSet{max: l.conns, all: make(map[*client]struct{})},
	}
	if cfg.turn == "on" {
		s.turn = newTURNServer(cfg, log, m, func(ctx context.Context, id sessionID) (int, error) {
			m, _, err := h.Get(ctx, id)
			if m.Room != nil {
				return m.Room.Max, err
			}
			return 2, err
		})
		if shared, ok := h.(*redisHub); ok {
			s.turn.relayOf = shared.relayOf
		}
		s.background = append(s.background, s.turn.run)
	}
	s.ice = newICEDirectory(cfg, m, s.turn)
	if keys != nil {
		s.background = append(s.background, keys)
	}
	s.preflights = cors.New(cors.Options{
		AllowOriginVaryRequestFunc: func(r *http.Request, _ string) (bool, []string) { return s.callers.originAllowed(r), nil },
		AllowedMethods:             []string{http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPatch, http.MethodDelete},
		AllowedHeaders:             []string{"Content-Type", "Authorization"},
		MaxAge:                     600,
	})
	return s
}

// handler returns the routes.
func (s *server) handler() http.Handler {
	mux := http.NewServeMux()
	route := func(pattern string, e endpoint) { mux.Handle(pattern, s.endpoint(e)) }
	route("/rendezvous/code", endpoint{limit: routeCode, methods: methods{http.MethodPost: s.mintCode}})
	route("/rendezvous/redeem", endpoint{limit: routeRedeem, methods: methods{http.MethodPost: s.redeemCode}})
	route("/ice-servers", endpoint{limit: routeICE, methods: methods{http.MethodGet: s.getICEServers}})
	route("/whoami", endpoint{methods: methods{http.MethodGet: s.whoami}})
	route("/healthz", endpoint{methods: methods{http.MethodGet: s.healthz}})
	route("/readyz", endpoint{methods: methods{http.MethodGet: s.readyz}})
	route("/version", endpoint{methods: methods{http.MethodGet: s.serveVersion}})
	if s.cfg.rooms != "off" {
		route("/api/rooms", endpoint{limit: routeRooms, methods: methods{http.MethodPost: s.createRoom}})
		route("/api/rooms/{room}", endpoint{limit: routeRooms, methods: methods{
			http.MethodGet: s.getRoom, http.MethodPatch: s.changeRoom, http.MethodDelete: s.deleteRoom}})
	}
	for pattern, file := range s.webFiles() {
		route(pattern, file)
	}
	if s.cfg.metricsAddr == "" {
		route(s.cfg.metricsRoute, s.metricsEndpoint())
	}
	// Browsers do not ask before they open a WebSocket: connect checks the origin.
	route("/ws", endpoint{methods: methods{http.MethodGet: s.serveWS}})
	if s.cfg.rooms != "off" {
		route("/ws/signal/{room}", endpoint{methods: methods{http.MethodGet: s.serveSignal}})
	}
	return s.readable(s.exactly(mux))
}

// readable lets pages of the origins that may call read every answer, whatever
// it says and whether or not there is something at the path. It answers their
// preflights.
func (s *server) readable(next http.Handler) http.Handler {
	vary, exposed := []string{"Origin"}, []string{"Date, Retry-After, WWW-Authenticate"} // nobody changes a header's values
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method == http.MethodOptions && r.Header.Get("Access-Control-Request-Method") != "" {
			s.preflights.HandlerFunc(w, r)
			return
		}
		h := w.Header()
		h["Vary"] = vary
		if origin := r.Header.Get("Origin"); origin != "" && s.callers.originAllowed(r) {
			h.Set("Access-Control-Allow-Origin", origin)
			h["Access-Control-Expose-Headers"] = exposed
		}
		next.ServeHTTP(w, r)
	})
}

// metricsHandler returns the routes of METRICS_ADDR.
func (s *server) metricsHandler() http.Handler {
	mux := http.NewServeMux()
	mux.Handle(s.cfg.metricsRoute, s.endpoint(s.metricsEndpoint()))
	return withProfiles(s.exactly(mux))
}

// exactly answers what mux has no route for, and spares clients its redirects
// from paths that are nearly right: the answer names the right one.
func (s *server) exactly(mux *http.ServeMux) http.Handler {
	notFound := func(w http.ResponseWriter, r *http.Request) {
		text := "there is nothing at this path"
		if near := nearRoute(mux, r.URL.Path); near != "" {
			text += "; there is at " + near
		}
		s.writeError(w, &apiError{status: http.StatusNotFound, code: "not_found", text: text})
	}
	mux.HandleFunc(anyPath, notFound)
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !strings.HasPrefix(r.URL.Path, "/") || r.URL.Path != path.Clean(r.URL.Path) { // "*" is no path at all
			notFound(w, r)
			return
		}
		mux.ServeHTTP(w, r)
	})
}

// anyPath is the pattern of all paths without a route of their own.
const anyPath = "/"

// nearRoute returns the route of mux that a wrong path differs from only by
// slashes, dots or the case of letters, or "".
func nearRoute(mux *http.ServeMux, wrong string) string {
	clean := path.Clean("/" + wrong)
	for _, near := range []string{clean, strings.ToLower(clean)} {
		_, pattern := mux.Handler(&http.Request{Method: http.MethodGet, URL: &url.URL{Path: near}})
		if pattern != anyPath {
			return strings.TrimSuffix(pattern, "{$}")
		}
	}
	return ""
}

func (s *server) metricsEndpoint() endpoint {
	metrics := s.metrics.handler()
	return endpoint{methods: methods{http.MethodGet: func(w http.ResponseWriter, r *http.Request, _ caller) error {
		metrics.ServeHTTP(w, r)
		return nil
	}}}
}

// newHTTPServer returns an HTTP server with limits for slow and large requests.
func (s *server) newHTTPServer(h http.Handler) *http.Server {
	return &http.Server{
		Handler:           h,
		ReadHeaderTimeout: 10 * time.Second,
		ReadTimeout:       20 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
	}
}

// Bounds of a request, in bytes. net/http adds 4 KiB to that of the header.
const (
	maxHeaderBytes = 16<<10 - 4<<10
	maxBody        = 4 << 10
)

// An endpoint is one path of the API.
type endpoint struct {
	methods methods
	limit   route // counted against HTTP_RATE_PER_MIN; "" for those that are not
}

// methods are the handlers of one path. An error they return is the answer.
type methods map[string]func(http.ResponseWriter, *http.Request, caller) error

// allowed lists the methods for the header Allow.
func (m methods) allowed() string {
	allowed := slices.Collect(maps.Keys(m))
	if m[http.MethodGet] != nil {
		allowed = append(allowed, http.MethodHead)
	}
	slices.Sort(allowed)
	return strings.Join(allowed, ", ")
}

// endpoint returns the handler of e: it checks the method, where the page that
// calls comes from, and how often the caller calls, in this order.
func (s *server) endpoint(e endpoint) http.Handler {
	allowed := e.methods.allowed()
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		defer func() {
			if p := recover(); p != nil {
				s.log.Error("request failed", "panic", p, "stack", string(debug.Stack()))
				s.writeError(w, errInternal)
			}
		}()
		method := r.Method
		if method == http.MethodHead {
			method = http.MethodGet
		}
		handle := e.methods[method]
		if handle == nil {
			w.Header().Set("Allow", allowed)
			s.writeError(w, &apiError{status: http.StatusMethodNotAllowed, code: "method_not_allowed",
				text: "this path takes " + allowed + ", not " + r.Method})
			return
		}
		c := s.callers.identify(r)
		err := s.admit(r, c, method, e.limit)
		if err == nil {
			err = handle(w, r, c)
		}
		if err != nil {
			s.writeError(w, err)
		}
	})
}

// admit refuses writes from foreign pages, and callers that call too often.
func (s *server) admit(r *http.Request, c caller, method string, limit route) error {
	if method != http.MethodGet && !s.callers.originAllowed(r) {
		return errForbiddenOrigin
	}
	if limit == "" {
		return nil
	}
	return s.limitRate(s.limits.http, c, limit)
}

func (s *server) writeError(w http.ResponseWriter, err error) {
	e := toAPIError(err)
	s.metrics.refuse(e.code)
	if e.status == http.StatusUpgradeRequired { // RFC 9110 section 15.5.22
		w.Header().Set("Upgrade", "websocket")
		w.Header().Set("Connection", "Upgrade")
	}
	if e.status == http.StatusUnauthorized { // RFC 6750 section 3
		w.Header().Set("WWW-Authenticate", "Bearer")
	}
	if e.status == http.StatusTooManyRequests || e.status == http.StatusServiceUnavailable {
		wait := cmp.Or(e.retryAfter, retrySoon)
		w.Header().Set("Retry-After", strconv.Itoa(max(1, int(math.Ceil(wait.Seconds())))))
	}
	s.writeJSON(w, e.status, struct {
		Error string `json:"error"`
		Code  string `json:"code"`
	}{e.text, e.code})
}

func (s *server) writeJSON(w http.ResponseWriter, status int, v any) {
	maps.Copy(w.Header(), s.jsonHeader)
	w.WriteHeader(status)
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.log.Debug("answer not written", "error", err)
	}
}

// queryValue returns a parameter of a query string, or "" if it is not given.
// Where net/url would take the first of several, and leave out what is not
// escaped as it should be, it fails, and says what is wrong with which.
func queryValue(query, name string) (value string, err error) {
	given := false
	for pair := range strings.SplitSeq(query, "&") {
		key, text, _ := strings.Cut(pair, "=")
		if key, err := url.QueryUnescape(key); err != nil || key != name {
			continue
		}
		if given {
			return "", errors.New(name + " must be given once")
		}
		if strings.Contains(text, ";") { // which some take for an &
			return "", errors.New(name + " must have %3B for a semicolon")
		}
		if value, err = url.QueryUnescape(text); err != nil {
			return "", errors.New(name + " is not percent-encoded as it should be; a % is %25")
		}
		given = true
	}
	return value, nil
}

// readObject reads a request's body as a JSON object. An empty body is nil.
func (s *server) readObject(w http.ResponseWriter, r *http.Request) (object, error) {
	if r.ContentLength == 0 {
		return nil, nil
	}
	body, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxBody))
	if tooLarge := new(http.MaxBytesError); errors.As(err, &tooLarge) {
		return nil, &apiError{status: http.StatusRequestEntityTooLarge, code: "too_large", text: "the body is larger than 4 KiB"}
	} else if err != nil {
		return nil, badRequest("bad_body", "the body could not be read")
	}
	if len(body) == 0 {
		return nil, nil
	}
	d := s.decoders.Get().(*frameDecoder)
	defer s.decoders.Put(d)
	o, err := d.decodeObject(body)
	if err != nil {
		return nil, badRequest("bad_json", "the body must be a JSON object")
	}
	return o, nil
}

// healthz answers as long as the process lives.
func (s *server) healthz(w http.ResponseWriter, _ *http.Request, _ caller) error {
	s.writeJSON(w, http.StatusOK, statusAnswer{"ok"})
	return nil
}

// readyz answers 200 when new work is welcome.
func (s *server) readyz(w http.ResponseWriter, r *http.Request, _ caller) error {
	if s.draining.Load() {
		return errDraining
	}
	if err := s.hub.Ready(r.Context()); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, statusAnswer{"ready"})
	return nil
}

type statusAnswer struct {
	Status string `json:"status"`
}

func (s *server) serveVersion(w http.ResponseWriter, _ *http.Request, _ caller) error {
	s.writeJSON(w, http.StatusOK, s.version)
	return nil
}

// run does the background work until ctx is done.
func (s *server) run(ctx context.Context) {
	var tasks sync.WaitGroup
	for _, task := range s.background {
		tasks.Go(func() {
			if err := task(ctx); err != nil {
				s.log.Error("background work ended", "error", err)
			}
		})
	}
	tasks.Wait()
	if s.backend != nil {
		s.backend.close()
	}
}

// checkBackend fails if the server could never serve. A backend that is away may
// be there later.
func (s *server) checkBackend() error {
	if s.backend == nil {
		return nil
	}
	err := s.backend.check(context.Background())
	if _, unfit := errors.AsType[*unfitError](err); unfit {
		s.backend.close()
		return err
	} else if err != nil {
		s.log.Warn("Redis is away: /readyz is 503 until it is there", "error", err)
	}
	return nil
}

// janitorEvery is the time between two passes over what ends by the clock.
const janitorEvery = 5 * time.Second

// every calls f at an interval until ctx is done.
func every(ctx context.Context, interval time.Duration, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			f()
		}
	}
}

// The JavaScript client, and the demo page that is made with it. Some names
// begin with an underscore, which embed leaves out unless told "all".
//
//go:embed all:web
var webFS embed.FS

// demoPath is where the demo page is; all else that is embedded is under /web/.
const demoPath = "/{$}"

// webFiles returns an endpoint for each embedded file, by route: the client
// always, for pages of other origins too, and the demo with DEMO.
func (s *server) webFiles() map[string]endpoint {
	files := make(map[string]endpoint)
	version := buildVersion().Version
	err := fs.WalkDir(webFS, "web", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		client := isClient(path.Base(name))
		if !client && !s.cfg.demo {
			return nil
		}
		content, err := webFS.ReadFile(name)
		if err != nil {
			return err
		}
		route := "/" + name
		if name == "web/index.html" {
			route = demoPath
		}
		files[route] = webFile(name, content, client, version)
		return nil
	})
	if err != nil { // what is embedded can be read
		panic(err)
	}
	return files
}

// isClient reports whether a file is part of the client, which apps may load
// from here.
func isClient(name string) bool { return strings.HasPrefix(name, "parley.") }

// demoPolicy lets the demo page load its own files, talk to its own server, and
// nothing else. It is the Content-Security-Policy (CSP3) of the page.
const demoPolicy = "default-src 'none'; script-src 'self'; worker-src 'self'; style-src 'self'; img-src 'self' data: blob:; " +
	"connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

// webFile serves one file. Browsers keep it, and ask each time whether it is
// still the same, so that a page and its modules are of one version; who names
// the version in the URL (?v=) need not ask for a year.
func webFile(name string, content []byte, client bool, version string) endpoint {
	hash := sha256.Sum256(content)
	header := map[string]string{
		"Cache-Control":          "no-cache",
		"Content-Type":           mediaType(name),
		"ETag":                   `"` + hex.EncodeToString(hash[:16]) + `"`,
		"X-Content-Type-Options": "nosniff",
	}
	if client {
		header["Access-Control-Allow-Origin"] = "*"
		header["Cross-Origin-Resource-Policy"] = "cross-origin"
	}
	if path.Ext(name) == ".html" {
		header["Content-Security-Policy"] = demoPolicy
		header["Referrer-Policy"] = "no-referrer"
	}
	return endpoint{methods: methods{http.MethodGet: func(w http.ResponseWriter, r *http.Request, _ caller) error {
		for name, value := range header {
			w.Header().Set(name, value)
		}
		if version != unversioned && r.URL.Query().Get("v") == version {
			w.Header().Set("Cache-Control", "public, max-age=31536000, immutable")
		}
		http.ServeContent(w, r, "", time.Time{}, bytes.NewReader(content))
		return nil
	}}}
}

// mediaType returns the media type of a file that is served.
func mediaType(name string) string {
	return cmp.Or(map[string]string{
		".html": "text/html; charset=utf-8",
		".css":  "text/css; charset=utf-8",
		".js":   "text/javascript; charset=utf-8",
		".mjs":  "text/javascript; charset=utf-8",
		".json": "application/json",
	}[path.Ext(name)], "text/plain; charset=utf-8")
}
