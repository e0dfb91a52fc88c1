package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/time/rate"
)

// A front is a listener and what is served on it.
type front struct {
	listener    net.Listener
	web         *http.Server
	certificate *certificate // nil without TLS
}

// openFronts opens the listeners: the first for everything, and a second one
// for METRICS_ADDR.
func (s *server) openFronts() (fronts []front, err error) {
	defer func() {
		if err != nil {
			for _, f := range fronts {
				f.listener.Close()
			}
			if s.turn != nil {
				s.turn.close()
			}
		}
	}()
	guard := newConnectionGuard(openFileLimit(), s.unguarded)
	main := front{web: s.newHTTPServer(s.handler())}
	main.web.ConnState = guard.track
	if s.cfg.tlsCertFile != "" {
		if main.certificate, err = loadCertificate(s.cfg.tlsCertFile, s.cfg.tlsKeyFile, s.log); err != nil {
			return nil, err
		}
		main.web.TLSConfig = main.certificate.config()
		main.web.TLSNextProto = map[string]func(*http.Server, *tls.Conn, http.Handler){} // no HTTP/2
	}
	if main.listener, err = listen(s.cfg.host, s.cfg.port); err != nil {
		return nil, err
	}
	if main.certificate == nil {
		main.listener = newPlainListener(main.listener, s.log)
	}
	fronts = append(fronts, main)
	if s.turn != nil {
		host := s.cfg.host
		if strings.HasPrefix(host, "unix:") || !s.cfg.dev && isLoopback(host) {
			host = "" // a proxy on this machine passes on HTTP alone
		}
		if err = s.turn.openSockets(host, s.cfg.turnPort, guard); err != nil {
			return fronts, err
		}
		if main.certificate != nil {
			fronts[0].listener = s.turn.shareTLS(main.listener, main.web, s.log)
		}
	}
	if s.cfg.metricsAddr == "" {
		return fronts, nil
	}
	metrics := front{web: s.newHTTPServer(s.metricsHandler())}
	metrics.web.ConnState = guard.track
	if metrics.listener, err = net.Listen("tcp", s.cfg.metricsAddr); err != nil {
		return fronts, fmt.Errorf("METRICS_ADDR: %w", err)
	}
	metrics.listener = newPlainListener(metrics.listener, s.log)
	s.log.Info("metrics are served apart", "address", metrics.listener.Addr().String())
	return append(fronts, metrics), nil
}

// serve serves until the front's server is shut down, or fails. The certificate
// is followed until ctx is done.
func (f front) serve(ctx context.Context) error {
	if f.certificate == nil {
		return f.web.Serve(f.listener)
	}
	go f.certificate.run(ctx)
	if _, ok := f.listener.(*sniffListener); ok {
		return f.web.Serve(f.listener)
	}
	return f.web.ServeTLS(f.listener, "", "")
}

// unguarded counts the connections that http.Server has forgotten.
func (s *server) unguarded() int {
	n := s.clients.count()
	if s.turn != nil {
		n += int(s.turn.held.Load())
	}
	return n
}

// listen opens the listener of HOST and PORT: TCP, or a socket file.
func listen(host string, port int) (net.Listener, error) {
	path, isFile := strings.CutPrefix(host, "unix:")
	if !isFile {
		return net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
	}
	if err := removeStale(path); err != nil {
		return nil, err
	}
	return net.Listen("unix", path)
}

// A plainListener is one of plain HTTP. Whoever speaks TLS to it is told that in
// a form that TLS libraries know, and so is the log. (The other way round
// net/http answers in words.)
type plainListener struct {
	net.Listener
	log  *slog.Logger
	warn rate.Sometimes
}

func newPlainListener(l net.Listener, log *slog.Logger) *plainListener {
	return &plainListener{Listener: l, log: log, warn: rate.Sometimes{Interval: time.Minute}}
}

func (l *plainListener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if tcp, ok := c.(*net.TCPConn); ok {
		return &plainConn{TCPConn: tcp, unseen: l}, nil
	}
	return c, err
}

// A plainConn looks at the first byte that is read from it.
type plainConn struct {
	*net.TCPConn
	unseen *plainListener // nil once it has looked
}

func (c *plainConn) Read(p []byte) (int, error) {
	n, err := c.TCPConn.Read(p)
	if c.unseen == nil || n == 0 {
		return n, err
	}
	l := c.unseen
	c.unseen = nil
	if p[0] != tlsHandshake {
		return n, err
	}
	l.warn.Do(func() {
		l.log.Warn("a client speaks TLS where plain HTTP is spoken: give it http:// and ws://, or set TLS_CERT_FILE and TLS_KEY_FILE, or let a proxy end TLS",
			"listener", l.Addr().String(), "client", c.RemoteAddr().String())
	})
	io.WriteString(c.TCPConn, "HTTP/1.1 400 Bad Request\r\nContent-Type: text/plain; charset=utf-8\r\nConnection: close\r\n\r\nClient sent a TLS handshake to an HTTP server.\n")
	return 0, io.EOF
}

// tlsHandshake is the first byte of a ClientHello, RFC 8446 section 5.1. No method of HTTP begins
// with it.
const tlsHandshake = 22

// removeStale removes a socket file that a killed process left behind.
func removeStale(path string) error {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	if info.Mode()&os.ModeSocket == 0 {
		return fmt.Errorf("%s is there already and is no socket", path)
	}
	c, err := net.Dial("unix", path)
	if errors.Is(err, syscall.ECONNREFUSED) {
		return os.Remove(path)
	} else if err == nil {
		c.Close()
	}
	return fmt.Errorf("%s: another process listens there", path)
}

// certificateEvery is how often the certificate files are read.
const certificateEvery = 5 * time.Second

// A certificate is a TLS certificate that follows its files.
type certificate struct {
	// static after construction
	certFile, keyFile string
	log               *slog.Logger

	current atomic.Pointer[tls.Certificate]

	// for the goroutine that runs run
	seen [2][]byte // what the files held when they were last read
}

// loadCertificate reads the two files.
func loadCertificate(certFile, keyFile string, log *slog.Logger) (*certificate, error) {
	c := &certificate{certFile: certFile, keyFile: keyFile, log: log}
	if _, err := c.read(); err != nil {
		return nil, fmt.Errorf("TLS_CERT_FILE and TLS_KEY_FILE: %w", err)
	}
	return c, nil
}

// read takes the files' pair into use, if it has changed and is one.
func (c *certificate) read() (changed bool, err error) {
	var files [2][]byte
	for i, name := range []string{c.certFile, c.keyFile} {
		if files[i], err = os.ReadFile(name); err != nil {
			return false, err
		}
	}
	if bytes.Equal(files[0], c.seen[0]) && bytes.Equal(files[1], c.seen[1]) {
		return false, nil
	}
	pair, err := tls.X509KeyPair(files[0], files[1])
	c.seen = files // a broken pair is complained of once
	if err != nil {
		return true, err
	}
	c.current.Store(&pair)
	return true, nil
}

// run follows the files until ctx is done. While they are broken the old
// certificate stays.
func (c *certificate) run(ctx context.Context) {
	tick := time.NewTicker(certificateEvery)
	defer tick.Stop()
	missing := ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		changed, err := c.read()
		switch {
		case err != nil && (changed || err.Error() != missing):
			c.log.Error("the new certificate is not used, the old one stays", "error", err)
		case changed:
			c.log.Info("certificate reloaded")
		}
		if missing = ""; err != nil && !changed {
			missing = err.Error()
		}
	}
}

// config returns the TLS settings: 1.2 and up, and HTTP/1.1 only, because a
// WebSocket needs it (RFC 6455 section 4.1).
func (c *certificate) config() *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		NextProtos: []string{"http/1.1"},
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) {
			return c.current.Load(), nil
		},
	}
}

// A connectionGuard keeps connections that do nothing, or one thing slowly,
// from using up the open files: when there are max, one makes room for a new
// one. It is that which has waited longest for a request to begin, or to end its
// header; with none of those, the one whose request has taken longest. Its
// track method is an http.Server's ConnState.
type connectionGuard struct {
	// static after construction
	max        int        // 0 for no limit
	webSockets func() int // connections that http.Server has forgotten

	mu sync.Mutex
	// guarded by mu
	waiting, asking guardedConn // the heads of two rings, in which the longest is next
	where           map[net.Conn]*guardedConn
}

// A guardedConn is a connection in one of the guard's rings.
type guardedConn struct {
	net.Conn
	prev, next *guardedConn
}

// before takes c out of its ring, if it is in one, and puts it before at.
func (c *guardedConn) before(at *guardedConn) {
	c.unlink()
	c.prev, c.next = at.prev, at
	c.prev.next, c.next.prev = c, c
}

func (c *guardedConn) unlink() {
	if c.next != nil {
		c.prev.next, c.next.prev = c.next, c.prev
		c.prev, c.next = nil, nil
	}
}

// newConnectionGuard returns a guard that leaves some of the process's open
// files to other things than connections.
func newConnectionGuard(openFiles int, webSockets func() int) *connectionGuard {
	g := &connectionGuard{
		max: openFiles / 20 * 19, webSockets: webSockets, where: make(map[net.Conn]*guardedConn),
	}
	for _, head := range []*guardedConn{&g.waiting, &g.asking} {
		head.prev, head.next = head, head
	}
	return g
}

func (g *connectionGuard) track(c net.Conn, state http.ConnState) {
	if evicted := g.note(c, state); evicted != nil {
		rawConn(evicted).Close() // http.Server tells us of that in turn
	}
}

// note takes note of a connection's new state and returns which one to close.
func (g *connectionGuard) note(c net.Conn, state http.ConnState) (evict net.Conn) {
	g.mu.Lock()
	defer g.mu.Unlock()
	at := g.where[c]
	switch state {
	case http.StateNew:
		if at != nil { // a sniffListener has told of it
			return nil
		}
		evict = g.makeRoom()
		at = &guardedConn{Conn: c}
		g.where[c] = at
		at.before(&g.waiting)
	case http.StateIdle, http.StateActive:
		if at == nil { // evicted a moment ago
			return nil
		}
		at.before(g.ring(state))
	default:
		g.remove(at)
	}
	return evict
}

// ring returns the head of those in a state.
func (g *connectionGuard) ring(state http.ConnState) *guardedConn {
	if state == http.StateIdle {
		return &g.waiting
	}
	return &g.asking
}

// makeRoom returns the connection to close for a new one, if any.
func (g *connectionGuard) makeRoom() (evict net.Conn) {
	if g.max == 0 || len(g.where)+g.webSockets() < g.max {
		return nil
	}
	for _, head := range []*guardedConn{&g.waiting, &g.asking} {
		if longest := head.next; longest != head {
			g.remove(longest)
			return longest.Conn
		}
	}
	return nil
}

// remove forgets a connection, or nil.
func (g *connectionGuard) remove(c *guardedConn) {
	if c != nil {
		c.unlink()
		delete(g.where, c.Conn)
	}
}

// A sniffListener is one for HTTPS and for TURN by TLS. Inside TLS, STUN begins
// with 0 or 1 and HTTP with a letter. It accepts what is HTTP, and hands on what
// is STUN.
type sniffListener struct {
	net.Listener
	tls  *tls.Config
	turn *turnServer
	log  *slog.Logger

	accepted chan net.Conn
	failed   chan error    // of the listener below
	done     chan struct{} // closed with the listener

	mu sync.Mutex
	// guarded by mu
	closed bool
	unsure map[*sniffedConn]struct{} // connections that have said nothing yet
}

// shareTLS returns a listener for web, which HTTPS and TURN share.
func (t *turnServer) shareTLS(l net.Listener, web *http.Server, log *slog.Logger) *sniffListener {
	s := &sniffListener{
		Listener: l, tls: web.TLSConfig, turn: t, log: log,
		accepted: make(chan net.Conn), failed: make(chan error), done: make(chan struct{}),
		unsure: make(map[*sniffedConn]struct{}),
	}
	if tcp, ok := l.Addr().(*net.TCPAddr); ok {
		t.tlsPort.Store(int32(tcp.Port))
	}
	keepTLSState(web)
	go s.run()
	return s
}

func (l *sniffListener) run() {
	for {
		c, err := l.Listener.Accept()
		if err != nil {
			select {
			case l.failed <- err: // Accept says what becomes of it
				continue
			case <-l.done:
				return
			}
		}
		s := &sniffedConn{Conn: tls.Server(c, l.tls)}
		l.turn.guard.track(s, http.StateNew)
		l.mu.Lock()
		if l.closed {
			c.Close()
		} else {
			l.unsure[s] = struct{}{}
			l.turn.tasks.Go(func() { l.sort(s) })
		}
		l.mu.Unlock()
	}
}

// sort finds out what a connection is, and serves it if it is TURN.
func (l *sniffListener) sort(c *sniffedConn) {
	c.SetDeadline(time.Now().Add(turnHelloTimeout))
	n, err := c.Conn.Read(c.first[:]) // which shakes hands
	l.mu.Lock()
	delete(l.unsure, c)
	l.mu.Unlock()
	switch {
	case err != nil || n == 0:
		l.log.Debug("a TLS connection ended before it said anything", "client", c.RemoteAddr().String(), "error", err)
		if e, ok := errors.AsType[tls.RecordHeaderError](err); ok && e.Conn != nil && looksLikeHTTP(e.RecordHeader) {
			io.WriteString(e.Conn, "HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n") // as net/http does
		}
		c.NetConn().Close()
		l.turn.guard.track(c, http.StateClosed)
	case c.first[0] < 2:
		c.unread = true
		l.turn.serveStream(c)
	default:
		c.unread = true
		c.SetDeadline(time.Time{})
		select {
		case l.accepted <- c:
		case <-l.done:
			c.NetConn().Close()
			l.turn.guard.track(c, http.StateClosed)
		}
	}
}

// looksLikeHTTP reports whether what was no TLS record is the beginning of a
// method.
func looksLikeHTTP(header [5]byte) bool {
	switch string(header[:]) {
	case "GET /", "HEAD ", "POST ", "PUT /", "OPTIO", "PATCH", "DELET":
		return true
	}
	return false
}

// Accept returns the next connection that is HTTP.
func (l *sniffListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.accepted:
		return c, nil
	case err := <-l.failed:
		return nil, err
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *sniffListener) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.closed {
		l.closed = true
		close(l.done)
		for c := range l.unsure {
			c.NetConn().Close()
		}
	}
	return l.Listener.Close()
}

// A sniffedConn gives back the first byte that was read from it.
type sniffedConn struct {
	*tls.Conn
	first  [1]byte
	unread bool // first is to be read yet
}

func (c *sniffedConn) Read(p []byte) (int, error) {
	if c.unread && len(p) > 0 {
		c.unread = false
		return copy(p, c.first[:]), nil
	}
	return c.Conn.Read(p)
}

// tlsState is the key of a request's context under which a sniffedConn's state is:
// net/http fills in Request.TLS for a tls.Conn alone.
type tlsState struct{}

func keepTLSState(web *http.Server) {
	web.ConnContext = func(ctx context.Context, c net.Conn) context.Context {
		if s, ok := c.(*sniffedConn); ok {
			state := s.ConnectionState()
			return context.WithValue(ctx, tlsState{}, &state)
		}
		return ctx
	}
	next := web.Handler
	web.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if state, ok := r.Context().Value(tlsState{}).(*tls.ConnectionState); ok {
			r.TLS = state
		}
		next.ServeHTTP(w, r)
	})
}
