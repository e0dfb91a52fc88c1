package main

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"errors"
	"net"
	"net/http"
	"os"
	"runtime/debug"
	"strings"
	"sync/atomic"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
	"golang.org/x/time/rate"
)

// A client is one WebSocket connection and the seat it holds.
type client struct {
	conn

	// static once started
	srv  *server
	seat seat // nil for one that is only told why it is refused
	side string
	room *roomSeat // nil in a pair

	remote *remoteSeat // how seat is held where the hub is not in this process, else nil

	session sessionID
	network network // whose connection it is
	host    string  // that it called; "" unless TURN=on
	v1      bool

	// Whether delivery of mail has begun, and where this connection is in it: the
	// highest seq it was sent or said it has.
	mailOpen  atomic.Bool
	cursor    atomic.Uint64
	mailTimer *time.Timer // opens the mail; nil where none waited

	// of the reading goroutine
	frames *rate.Limiter // nil without WS_FRAMES_PER_SEC
	errors *rate.Limiter // of error frames; nil before the first
}

// A client may earn errorBurst error frames at once and errorRate a second; one
// more, and it is talking to itself at the cost of others.
const (
	errorBurst = 1000
	errorRate  = 20
)

// serveWS is GET /ws.
func (s *server) serveWS(w http.ResponseWriter, r *http.Request, from caller) error {
	id, join, err := s.seatRequest(r)
	if err != nil {
		return err
	}
	join.owner = from.network
	c := &client{side: join.name, session: id}
	return s.connect(w, r, from, routeWS, c, func() (seat, view, error) {
		join.v = c.version()
		return s.hub.Join(r.Context(), id, join, c.notify)
	})
}

// connect checks a request for a WebSocket, takes a seat by join, and only then
// upgrades, so that most refusals are HTTP.
func (s *server) connect(w http.ResponseWriter, r *http.Request, from caller, limit route, c *client, join func() (seat, view, error)) error {
	if !s.callers.originAllowed(r) {
		return errForbiddenOrigin
	}
	v1, err := checkUpgrade(w, r)
	if err != nil {
		return err
	}
	if err := s.limitRate(s.limits.ws, from, limit); err != nil {
		return err
	}
	c.srv, c.v1, c.network, c.host = s, v1, from.network, from.host
	c.connOptions, c.src = &s.connOptions, c
	if s.backend != nil {
		c.remote = newRemoteSeat(&c.conn)
	}
	if n := s.cfg.wsFramesPerSec; n > 0 {
		c.frames = rate.NewLimiter(rate.Limit(n), n)
	}
	if err := s.admitClient(c); errors.Is(err, errDraining) {
		return s.refuse(w, r, c, err)
	} else if err != nil {
		return err
	}
	defer func() {
		if p := recover(); p != nil { // or it would be counted, and waited for, forever
			s.release(c)
			panic(p)
		}
	}()
	seat, view, err := join()
	if errors.Is(err, errTakeovers) {
		s.metrics.resumes[resumeRefused].Inc()
	}
	if err != nil {
		return s.refuse(w, r, c, err)
	}
	if c.seat = seat; c.remote != nil {
		c.remote.seat, c.seat = seat, c.remote
	}
	answer, err := c.accept(w, r, subprotocol(v1))
	if err != nil {
		// A newcomer to a room has not learned how to come back.
		newcomer := c.room != nil && view.resumed == resumedNot
		c.seat.Leave(context.WithoutCancel(r.Context()), newcomer)
		s.release(c)
		return nil // the library has answered
	}
	c.attach(answer, view)
	return nil
}

// version returns the version of the parley protocol that the client speaks.
func (c *client) version() int {
	if c.v1 {
		return 1
	}
	return 0
}

// admitClient counts a connection, before it is one. Unless it fails with another
// error than errDraining, release must follow.
func (s *server) admitClient(c *client) error {
	if ok, _ := s.limits.perIP.take(c.network); !ok {
		return &apiError{status: http.StatusTooManyRequests, code: "too_many_connections",
			text: "this address has as many connections as it may"}
	}
	err := s.clients.add(c)
	if err != nil && !errors.Is(err, errDraining) {
		s.limits.perIP.give(c.network)
	}
	return err
}

// release uncounts a connection that is over.
func (s *server) release(c *client) {
	s.clients.remove(c)
	s.limits.perIP.give(c.network)
}

// seatRequest reads the query of GET /ws.
func (s *server) seatRequest(r *http.Request) (id sessionID, join joinRequest, err error) {
	if r.URL.RawQuery == "" && !isUpgrade(r) {
		return id, join, errUpgradeRequired
	}
	if id, err = appIDOf(r); err != nil {
		return id, join, err
	}
	join.create = s.cfg.appIDs == "any"
	if join.name, err = queryValue(r.URL.RawQuery, "side"); err != nil {
		return id, join, badRequest("bad_side", err.Error())
	} else if join.name != "A" && join.name != "B" {
		return id, join, badRequest("bad_side", "side must be A or B")
	}
	// The published client of the seed sends an empty sid when it has none.
	if sid, err := queryValue(r.URL.RawQuery, "sid"); err != nil {
		return id, join, badRequest("bad_sid", err.Error())
	} else if len(sid) > maxSID {
		return id, join, badRequest("bad_sid", "sid must have at most 128 bytes")
	} else if sid != "" {
		join.claim = sha256.Sum256([]byte(sid))
	}
	return id, join, nil
}

// maxSID bounds a client's own secret, in bytes.
const maxSID = 128

// appIDOf returns the appID of a request's query.
func appIDOf(r *http.Request) (sessionID, error) {
	text, err := queryValue(r.URL.RawQuery, "appID")
	if err != nil {
		return sessionID{}, badRequest("bad_app_id", err.Error())
	}
	return parseAppID(text)
}

// parseAppID parses the one form of a UUID that is accepted.
func parseAppID(s string) (sessionID, error) {
	id, err := uuid.Parse(s)
	if err != nil || len(s) != 36 {
		return id, badRequest("bad_app_id", "appID must be a UUID, such as 123e4567-e89b-12d3-a456-426614174000")
	}
	return id, nil
}

func isUpgrade(r *http.Request) bool {
	return r.Method == http.MethodGet && r.ProtoAtLeast(1, 1) && hasToken(r.Header["Connection"], "upgrade") && hasToken(r.Header["Upgrade"], "websocket")
}

// checkUpgrade checks what the library would refuse, because it answers in
// plain text. v1 says that the client offers the subprotocol parley.v1.
func checkUpgrade(w http.ResponseWriter, r *http.Request) (v1 bool, err error) {
	if !isUpgrade(r) {
		return false, errUpgradeRequired
	}
	if r.Header.Get("Sec-WebSocket-Version") != "13" {
		w.Header().Set("Sec-WebSocket-Version", "13")
		return false, errUpgradeRequired
	}
	if keys := r.Header["Sec-Websocket-Key"]; len(keys) != 1 || !validKey(keys[0]) {
		return false, badRequest("bad_upgrade", "Sec-WebSocket-Key must be given once, as 16 bytes in base64")
	}
	return hasToken(r.Header["Sec-Websocket-Protocol"], subprotocolV1), nil
}

// validKey checks a Sec-WebSocket-Key, RFC 6455 section 4.1.
func validKey(key string) bool {
	b, err := base64.StdEncoding.DecodeString(strings.TrimSpace(key))
	return err == nil && len(b) == 16
}

func subprotocol(v1 bool) string {
	if v1 {
		return subprotocolV1
	}
	return ""
}

// hasToken looks for a token in a header's comma-separated lists.
func hasToken(values []string, token string) bool {
	for _, v := range values {
		for t := range strings.SplitSeq(v, ",") {
			if strings.EqualFold(strings.TrimSpace(t), token) {
				return true
			}
		}
	}
	return false
}

// refuse answers a join that failed: as HTTP, or, where the client or the
// contract wants to see a close code, by an upgrade and a close frame.
func (s *server) refuse(w http.ResponseWriter, r *http.Request, c *client, why error) error {
	e := c.explain(why)
	if e.closeReason == "" && !c.v1 || e.closeCode == 0 {
		s.release(c)
		return e
	}
	answer, err := c.accept(w, r, subprotocol(c.v1))
	if err != nil {
		s.release(c)
		return nil
	}
	s.metrics.refuse(e.code)
	reason := e.code
	if e.closeReason != "" {
		reason = strings.ReplaceAll(e.closeReason, "SIDE", c.side)
	}
	c.close(e.closeCode, reason)
	c.begin(answer)
	go c.run()
	return nil
}

// explain says what an error means to this client.
func (c *client) explain(err error) *apiError {
	if c.room != nil && errors.Is(err, errGone) {
		return errRoomNotFound
	}
	return toAPIError(err)
}

// greeting returns the messages that tell the client of a pair how things are.
func (c *client) greeting(v view) (first []byte) {
	if c.v1 {
		welcome := appendWelcome(nil, c.side, v, c.heartbeat, c.maxMessage, c.srv.ice.servers(c.session, c.network, c.host))
		first = c.appendFrame(first, typeWelcome, welcome)
	}
	if v.peer == present {
		first = c.appendFrame(first, typeRoomFull, []byte(frameRoomFull))
	}
	return first
}

// attach starts the connection: behind the answer to its request, how things are
// goes ahead of what waits.
func (c *client) attach(answer []byte, v view) {
	greeting := c.greeting
	if c.room != nil {
		greeting = c.greetingOfRoom
	}
	first := append(answer, greeting(v)...)
	switch v.resumed {
	case resumedBack:
		c.metrics.resumes[resumeBack].Inc()
	case resumedTakeover:
		c.metrics.resumes[resumeTakeover].Inc()
	}
	if v.mail {
		c.mailTimer = time.AfterFunc(helloTimeout, c.openMail)
	} else {
		c.mailOpen.Store(true)
	}
	c.begin(first)
	go c.run()
}

// run is a connection's life after the upgrade, on a goroutine of its own: the
// request and net/http's stack are gone by then.
func (c *client) run() {
	c.metrics.connects.Inc()
	c.metrics.connections.Inc()
	defer c.srv.release(c)
	defer func() { c.metrics.closed(c.closing()); c.metrics.connections.Dec() }()
	defer c.finish()
	if c.seat == nil {
		return
	}
	end := c.serve()
	if c.mailTimer != nil {
		c.mailTimer.Stop()
	}
	// Before the close is answered: the client may be back as soon as it is.
	if err := c.seat.Leave(context.Background(), end.forGood); err != nil && !errors.Is(err, errReplaced) && !errors.Is(err, errGone) {
		c.srv.log.Warn("seat not left", "error", err)
	}
	if end.code == closeAbnormal {
		c.abort(end.code)
	} else {
		c.close(end.code, end.reason)
	}
}

// An ending is how a connection ends, unless it is being closed already.
type ending struct {
	code    closeCode
	reason  string
	forGood bool // the client does not mean to come back
}

// serve reads until the connection ends.
func (c *client) serve() (end ending) {
	defer func() {
		if p := recover(); p != nil {
			c.srv.log.Error("connection failed", "panic", p, "stack", string(debug.Stack()))
			end = ending{code: closeInternal, reason: "internal error"}
		}
	}()
	for {
		if c.readErr = c.wait(); c.readErr != nil {
			return c.ending(c.readErr)
		}
		if err := c.readOne(); err != nil {
			return c.ending(err)
		}
		if !c.buffered() {
			c.flush()
		}
	}
}

// errTooManyFrames ends a connection that sends more than WS_FRAMES_PER_SEC.
var errTooManyFrames = errors.New("too many frames")

// readOne reads and handles one message. It is not inlined, to keep wait's
// stack small.
//
//go:noinline
func (c *client) readOne() error {
	buf, data, binary, err := c.readMessage()
	if err != nil {
		return err
	}
	c.settle()
	held := false
	if buf != nil {
		if c.frames != nil && !c.frames.Allow() {
			buf.free()
			return errTooManyFrames
		}
		if held, err = c.handle(buf, data, binary); err != nil {
			return err
		}
	}
	if held || c.flooded.Load() {
		c.flush()
		c.pause(c.isHeld)
	}
	return nil
}

func (c *client) isHeld() bool {
	held, err := c.seat.Held(context.Background())
	return held && err == nil
}

// handle acts on one message, whose buffer it owns. held says that the sender
// should pause.
func (c *client) handle(buf *buffer, data []byte, binary bool) (held bool, err error) {
	d := c.srv.decoders.Get().(*frameDecoder)
	m, err := d.decode(data)
	c.srv.decoders.Put(d)
	c.metrics.frameIn(m.typ, len(data))
	if err == nil && !c.mayUse(m.typ) {
		err = &frameError{"unknown_type", "the type is none that a client may send here"}
	}
	if err == nil && m.typ.relayed() {
		r, err := c.relay(m, buf, data, binary)
		c.complain(m, err)
		return r.held, nil
	}
	if err == nil && m.typ == typeSend {
		c.complain(m, c.send(m, buf))
		return false, nil
	}
	defer buf.free()
	if errors.Is(err, errBadUTF8) && binary {
		err = badFrame("the frame is not valid UTF-8")
	} else if errors.Is(err, errBadUTF8) {
		return false, err
	}
	if err == nil {
		err = c.act(m)
	}
	c.complain(m, err)
	return false, nil
}

// mayUse reports whether the client may send frames of this type.
func (c *client) mayUse(t frameType) bool {
	if c.room != nil {
		return t.ofRoom()
	}
	return t.ofPair()
}

// relay passes a frame on. It owns buf, in which data lies.
func (c *client) relay(m message, buf *buffer, data []byte, binary bool) (receipt, error) {
	if c.room != nil {
		return c.relayInRoom(m, buf)
	}
	return c.seat.Post(context.Background(), "", frame{typ: m.typ, binary: binary, data: data, buf: buf}, c.buffered())
}

// act does what a frame that is neither relayed nor mail asks for.
func (c *client) act(m message) error {
	switch m.typ {
	case typeHello:
		return c.hello(m)
	case typeDelivered:
		return c.delivered(m)
	case typeTelemetry:
		return c.telemetry(m)
	case typeICEServers:
		c.iceServers()
		return nil
	default:
		return c.ping(m)
	}
}

func (c *client) ping(m message) error {
	if len(m.raw.t) > maxPingT {
		return badFrame("t is longer than %d bytes", maxPingT)
	}
	c.answer(typePong, appendPong(nil, m.raw.t))
	return nil
}

// complain answers a frame with an error frame, if there was an error the
// client can do something about.
func (c *client) complain(m message, err error) {
	if err == nil || errors.Is(err, errReplaced) || errors.Is(err, errGone) {
		return // then the connection is being closed
	}
	if c.errors == nil {
		c.errors = rate.NewLimiter(errorRate, errorBurst)
	}
	e := toFrameError(err)
	if !c.errors.Allow() {
		if err != errNotEveryone && e.code != codeUnavailable { // for which the sender is not to blame
			c.close(closeTooMany, "too many errors")
		}
		return
	}
	c.answer(typeError, appendError(nil, m, e))
}

// send puts mail in a mailbox. It owns buf.
func (c *client) send(m message, buf *buffer) error {
	f := frame{kind: kindMail, id: m.id, data: m.raw.payload, buf: buf}
	to := ""
	fail := func(format string, args ...any) error {
		buf.free()
		return badFrame(format, args...)
	}
	if m.raw.to != nil {
		name, _ := unquote(m.raw.to)
		if to = string(name); to != "A" && to != "B" {
			return fail(`"to" must be "A" or "B"`)
		}
	}
	if m.raw.payload == nil {
		return fail(`a send needs a "payload"`)
	}
	if m.raw.id != nil && m.id == 0 {
		return fail(`"id" must be a positive integer`)
	}
	r, err := c.seat.Post(context.Background(), to, f, false)
	if err == nil && m.id != 0 {
		c.answer(typeQueued, appendQueued(nil, m.id, r.seq))
	}
	return err
}

// hello trims the mail the client says it has, and begins to deliver the rest.
func (c *client) hello(m message) error {
	upTo := uint64(0)
	if m.raw.deliveredUpTo != nil {
		var ok bool
		if upTo, ok = parseInteger(m.raw.deliveredUpTo); !ok {
			return badFrame(`"deliveredUpTo" must be an integer that is not negative`)
		}
	}
	if err := c.ack(upTo, "deliveredUpTo"); err != nil {
		return err
	}
	raise(&c.cursor, upTo)
	c.openMail()
	return nil
}

// delivered acknowledges mail that this connection was sent.
func (c *client) delivered(m message) error {
	name, raw := "upTo", m.raw.upTo
	if raw == nil {
		name, raw = "seq", m.raw.seq
	}
	upTo, ok := parseInteger(raw)
	if !ok {
		return badFrame(`%q must be an integer that is not negative`, name)
	}
	if upTo > c.cursor.Load() {
		return badFrame("%q is beyond what this connection was sent", name)
	}
	return c.ack(upTo, name)
}

func (c *client) ack(upTo uint64, name string) error {
	err := c.seat.Ack(context.Background(), upTo)
	if errors.Is(err, errBeyond) {
		return badFrame("%q is above the last seq of this mailbox", name)
	}
	return err
}

// openMail begins the delivery of mail.
func (c *client) openMail() {
	c.mailOpen.Store(true)
	c.wake()
}

// telemetry feeds the metrics, each kind of report once a session.
func (c *client) telemetry(m message) error {
	event, _ := unquote(m.raw.event)
	var kind outcome
	switch string(event) {
	case "ice-connected":
		kind = outcomeConnected
	case "ice-failed":
		kind = outcomeFailed
	default:
		return badFrame(`"event" must be "ice-connected" or "ice-failed"`)
	}
	since, first, err := c.seat.Report(context.Background(), kind)
	if err != nil || !first {
		return err
	}
	if kind == outcomeFailed {
		reason, _ := unquote(m.raw.reason)
		pick(c.metrics.failed, string(reason)).Inc()
		return nil
	}
	mode, _ := unquote(m.raw.mode)
	pick(c.metrics.established, string(mode)).Inc()
	if since >= 0 {
		c.metrics.timeToFirst.Observe(since.Seconds())
	}
	return nil
}

// ending decides what the end of reading means.
func (c *client) ending(err error) ending {
	var left websocket.CloseError
	switch {
	case errors.As(err, &left):
		forGood := left.Code == websocket.StatusNormalClosure || left.Code == websocket.StatusNoStatusRcvd
		return ending{code: closeCode(left.Code), forGood: forGood}
	case errors.Is(err, errBadUTF8):
		return ending{code: closeBadUTF8, reason: err.Error()}
	case errors.Is(err, errTooManyFrames):
		return ending{code: closeTooMany, reason: err.Error()}
	case errors.Is(err, errNoRoom):
		return ending{code: closeCapacity, reason: err.Error()}
	case errors.Is(err, websocket.ErrMessageTooBig):
		return ending{code: closeTooBig, reason: "message too big"}
	case errors.Is(err, os.ErrDeadlineExceeded),
		errors.Is(err, context.DeadlineExceeded), errors.Is(err, net.ErrClosed) && c.readErr == nil: // the library's own limit for control frames
		return ending{code: closeSlow, reason: "message took too long"}
	case c.readErr != nil:
		return ending{code: closeAbnormal}
	}
	return ending{code: closeProtocol, reason: "protocol error"}
}

// flush is called before reading waits: what was posted meanwhile is told now.
func (c *client) flush() { c.seat.Flush(context.Background()) }

// notify is the hub's: look, or you are out.
func (c *client) notify(why error) {
	if why == nil {
		if c.remote != nil {
			c.remote.news.Store(true)
		}
		c.openGate()
		c.wake()
		return
	}
	e := c.explain(why)
	c.close(e.closeCode, e.code)
}

// take is the connection's source of frames.
func (c *client) take(buf []frame, budget int) (taken []frame, more bool) {
	after := noMail
	if c.mailOpen.Load() {
		after = c.cursor.Load()
	}
	taken, more, err := c.seat.Take(context.Background(), after, budget, buf)
	if err != nil {
		return taken, false // notify has told why, or will
	}
	for i := range taken {
		if taken[i].kind == kindMail {
			raise(&c.cursor, taken[i].seq)
		}
	}
	return taken, more
}

// raise sets v to n if that is higher.
func raise(v *atomic.Uint64, n uint64) {
	for old := v.Load(); n > old && !v.CompareAndSwap(old, n); old = v.Load() {
	}
}

// appendFrame appends a frame of the server's own, and counts it.
func (c *client) appendFrame(dst []byte, t frameType, text []byte) []byte {
	c.metrics.frameOut(t, len(text))
	return appendText(dst, text)
}

// appendPresence tells the client of e, as far as its version knows of that.
func (c *client) appendPresence(dst []byte, e event) []byte {
	tell := func(t frameType, text []byte) { dst = c.appendFrame(dst, t, text) }
	if c.room != nil {
		return c.appendRoomPresence(dst, e)
	}
	switch e.kind {
	case eventJoined:
		if c.v1 {
			tell(typePeerJoined, appendPeerJoined(nil, e))
		}
		tell(typeRoomFull, []byte(frameRoomFull))
	case eventAway:
		if c.v1 {
			tell(typePeerAway, []byte(framePeerAway))
		}
	case eventLeft:
		tell(typePeerLeft, []byte(framePeerLeft))
	case eventContested:
		if c.v1 {
			tell(typeCodeContested, []byte(frameCodeContested))
		}
	}
	return dst
}
