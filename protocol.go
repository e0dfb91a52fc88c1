package main

import (
	"bytes"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strconv"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-json-experiment/json/jsontext"
)

// # Pairs
//
// The pair protocol, as it is spoken on GET /ws?appID=<uuid>&side=A|B[&sid=…].
//
// Two clients that know one session's appID take its seats A and B. Each
// WebSocket message is one JSON object with exactly one top-level "type".
//
//	A                         server                         B
//	│ ── GET /ws side=A ──────▶ │                             │
//	│ ── offer ───────────────▶ │ waits in B's mailbox        │
//	│                           │ ◀────── GET /ws side=B ──── │
//	│ ◀───────── room_full ──── │ ──── room_full ───────────▶ │
//	│                           │ ──── offer ───────────────▶ │
//	│ ◀──────────── answer ──── │ ◀─────────────── answer ─── │
//	│ ◀─── ice ───────────────▶ │ ◀──────────────── ice ────▶ │
//	│ ── send ────────────────▶ │ ──── deliver seq 1 ───────▶ │
//	│ ◀──────────── queued ──── │          (B's network dies) │
//	│ ── send ────────────────▶ │ waits in B's mailbox        │
//	│                           │ ◀────── GET /ws side=B ──── │
//	│                           │ ◀── hello deliveredUpTo 1 ─ │
//	│                           │ ──── deliver seq 2 ───────▶ │
//	│                           │ ◀──────── delivered 2 ───── │
//
// From a client:
//
//   - offer, answer, ice, sender_ready, bye: relayed to the other seat byte for
//     byte with the same opcode, in order, at most once. For a seat nobody is
//     connected to they wait, within bounds; past them the sender is told
//     peer_absent.
//   - send {to?, payload, id?}: mail. The payload waits in the mailbox of to, by
//     default the other seat, until that acknowledges it. With an id, which
//     counts up, the sender gets a receipt and may send again what it got none
//     for: it is stored once.
//   - hello {deliveredUpTo?}: "I have all mail up to this; now give me the rest".
//   - delivered {upTo}, or {seq}: acknowledges mail.
//   - ping {t?}: answered pong with the same t, because browsers cannot see
//     protocol pings.
//   - telemetry {event, mode?, reason?}: how the peers' own connection went; it
//     only feeds metrics.
//   - ice_servers: answered {iceServers, ttl}: STUN and TURN servers, with new
//     credentials that live ttl seconds.
//
// From the server:
//
//   - deliver {seq, from, payload}: mail, in order, once a connection and again
//     on the next until it is acknowledged. Where mail waits as a client
//     attaches, it begins at the hello, or after helloTimeout for clients that
//     never say it.
//   - queued {id, seq}: the receipt.
//   - room_full: a connection attached and now both seats are connected.
//   - peer_left: the other seat has become free.
//   - pong, and error {code, error, ref?}: an answer to one frame of this
//     client; ref is that frame's id, or else its type.
//
// And only to clients that offer the subprotocol parley.v1:
//
//   - welcome: the first frame; who you are, how the other seat is, and ICE
//     servers if there are any.
//   - peer_joined {resumed, peerV?}: the other seat has a new connection;
//     resumed when the same client is back. Comes before room_full.
//   - peer_away: the other seat's connection was lost, and its holder may return.
//   - code_contested: someone redeemed this session's code a second time.
//
// # Rooms
//
// The room protocol, as it is spoken on GET /ws/signal/{id or code}: up to 16
// clients, each with an ID that the server gives it.
//
//	host                      server                       guest
//	│ ── GET /ws/signal/… ────▶ │                             │
//	│ ◀── join, peers [] ────── │                             │
//	│                           │ ◀──── GET /ws/signal/… ──── │
//	│                           │ ─── join, peers [host] ───▶ │
//	│ ◀──────── join, guest ─── │                             │
//	│ ◀──── offer from guest ── │ ◀──────── offer to host ─── │
//	│ ── answer to guest ─────▶ │ ──── answer from host ────▶ │
//	│ (closes with 1000)        │ ──── leave, host guest ───▶ │
//
// From a client:
//
//   - offer, answer, candidate {to?, payload}: for the peer called to, by
//     default for everyone else. The server writes the frame anew, with who it
//     is from, and passes the payload on byte for byte.
//   - ping, telemetry and ice_servers as in a pair.
//
// From the server:
//
//   - join {from, roomId, displayName, peers, host, resume}: the first frame;
//     who you are, who else is in the room, the secret to come back with, and
//     ICE servers if there are any.
//     Without peers: somebody else has joined.
//   - leave {from, roomId, host}: somebody has left; host is who is it now, the
//     one who has been in the room the longest.
//   - offer, answer, candidate {from, to?, roomId, payload}.
//   - pong and error as in a pair.
//
// A member whose connection was lost comes back with ?resume= and the secret:
// under the same ID, unseen by the others, and to what was sent to it meanwhile.
//
// In both, a frame that is not understood is answered with an error and otherwise
// ignored: the connection stays up. Only bad UTF-8 in a text message ends it,
// as RFC 6455 section 8.1 asks.

// subprotocolV1 is the WebSocket subprotocol of clients that know parley.
const subprotocolV1 = "parley.v1"

// helloTimeout is how long mail waits for a client's hello.
const helloTimeout = 2 * time.Second

// A frameType is the value of a frame's top-level "type".
type frameType uint8

// The frame types, those a client may send first. typeUnknown stands for any
// other; it is also the "other" of the metrics' type label.
const (
	typeUnknown frameType = iota
	typeOffer
	typeAnswer
	typeIce
	typeSenderReady
	typeBye
	typeCandidate
	typeSend
	typeHello
	typeDelivered
	typePing
	typeTelemetry
	typeICEServers
	typeDeliver
	typeQueued
	typeRoomFull
	typePeerLeft
	typePong
	typeError
	typeWelcome
	typePeerJoined
	typePeerAway
	typeCodeContested
	typeJoin
	typeLeave
	numFrameTypes
)

func (t frameType) String() string {
	return [numFrameTypes]string{
		otherLabel, "offer", "answer", "ice", "sender_ready", "bye", "candidate",
		"send", "hello", "delivered", "ping", "telemetry", "ice_servers",
		"deliver", "queued", "room_full", "peer_left", "pong", "error",
		"welcome", "peer_joined", "peer_away", "code_contested",
		"join", "leave",
	}[t]
}

// relayed reports whether the frame is for a peer: in a pair it goes to the
// other seat as it is, in a room its payload does.
func (t frameType) relayed() bool { return typeOffer <= t && t <= typeCandidate }

// ofPair reports whether the client of a pair may send the type.
func (t frameType) ofPair() bool {
	return typeOffer <= t && t <= typeICEServers && t != typeCandidate
}

// ofRoom reports whether the client of a room may send the type.
func (t frameType) ofRoom() bool {
	switch t {
	case typeOffer, typeAnswer, typeCandidate, typePing, typeTelemetry, typeICEServers:
		return true
	}
	return false
}

// clientType returns the type a client means by name, or typeUnknown.
func clientType(name []byte) frameType {
	switch string(name) {
	case "offer":
		return typeOffer
	case "answer":
		return typeAnswer
	case "ice":
		return typeIce
	case "sender_ready":
		return typeSenderReady
	case "bye":
		return typeBye
	case "candidate":
		return typeCandidate
	case "send":
		return typeSend
	case "hello":
		return typeHello
	case "delivered":
		return typeDelivered
	case "ping":
		return typePing
	case "telemetry":
		return typeTelemetry
	case "ice_servers":
		return typeICEServers
	}
	return typeUnknown
}

// A closeCode ends a connection. 4000–4499 mean "come back later", 4500–4999
// "do not"; the lower ones are those of RFC 6455 section 7.4.1.
type closeCode uint16

const (
	closeNormal    closeCode = 1000
	closeGoingAway closeCode = 1001
	closeProtocol  closeCode = 1002
	closeNoStatus  closeCode = 1005 // never on the wire: the client gave no code
	closeAbnormal  closeCode = 1006 // never on the wire: the connection just ended
	closeBadUTF8   closeCode = 1007
	closeBusy      closeCode = 1008
	closeTooBig    closeCode = 1009
	closeInternal  closeCode = 1011
	closeSlow      closeCode = 4408
	closeCapacity  closeCode = 4413
	closeTooMany   closeCode = 4429
	closeReplaced  closeCode = 4500
	closeForbidden closeCode = 4503 // wrong password, or the room is locked
	closeUnknown   closeCode = 4504 // the session or room is unknown or has expired
	closeRoomFull  closeCode = 4509
	closeDeleted   closeCode = 4510 // the room was deleted
)

// closeCodes lists those that closes are counted under; the rest is "other".
func closeCodes() []closeCode {
	return []closeCode{
		closeNormal, closeGoingAway, closeProtocol, closeAbnormal, closeBadUTF8, closeBusy,
		closeTooBig, closeInternal, closeSlow, closeCapacity, closeTooMany, closeReplaced,
		closeForbidden, closeUnknown, closeRoomFull, closeDeleted,
	}
}

// Limits of a client's frame that do not depend on the configuration.
const (
	maxNesting = 64  // levels of objects and arrays, the frame itself counted
	maxPingT   = 256 // bytes of a ping's t
	maxRef     = 64  // bytes of a type that an error frame repeats
)

// errBadUTF8 is what is wrong with bytes that are no text.
var errBadUTF8 = errors.New("the frame is not valid UTF-8")

// A message is a client's frame, decoded as far as the server looks into it.
// Its slices point into the frame's own bytes.
type message struct {
	typ  frameType
	name []byte // the type as the client wrote it, unescaped
	id   uint64 // the frame's id, 0 when it has none that is a positive integer
	raw  rawMembers
}

// rawMembers are the members that some type of frame gives a meaning to, each
// as its JSON text and nil when absent.
type rawMembers struct {
	typ                      []byte
	to, payload, id          []byte // send
	deliveredUpTo, upTo, seq []byte // hello, delivered
	event, mode, reason      []byte // telemetry
	t                        []byte // ping
}

// member returns where the member called name is kept, or nil when no type of
// frame knows it.
func (m *rawMembers) member(name []byte) *[]byte {
	switch string(name) {
	case "type":
		return &m.typ
	case "to":
		return &m.to
	case "payload":
		return &m.payload
	case "id":
		return &m.id
	case "deliveredUpTo":
		return &m.deliveredUpTo
	case "upTo":
		return &m.upTo
	case "seq":
		return &m.seq
	case "event":
		return &m.event
	case "mode":
		return &m.mode
	case "reason":
		return &m.reason
	case "t":
		return &m.t
	}
	return nil
}

// A frameDecoder decodes clients' frames, and the bodies of API calls. It exists
// to be pooled: decoding a frame allocates nothing but unescaped names.
type frameDecoder struct {
	input bytes.Buffer
	json  *jsontext.Decoder
}

// newFrameDecoderPool returns a pool of decoders; a server has one of its own.
func newFrameDecoderPool() *sync.Pool {
	return &sync.Pool{New: func() any {
		d := new(frameDecoder)
		d.json = jsontext.NewDecoder(&d.input, frameOptions...)
		return d
	}}
}

// frameOptions: names are unique only where that matters, to decode itself. The
// bytes of a frame are known to be UTF-8, those of a body are as encoding/json has
// them; and escaped lone surrogates, which JavaScript writes, are legal JSON
// (RFC 8259 section 8.2).
var frameOptions = []jsontext.Options{jsontext.AllowDuplicateNames(true), jsontext.AllowInvalidUTF8(true)}

// decode checks that data is one valid UTF-8 JSON object with exactly one
// top-level type, at most maxNesting deep, and finds the members the server
// knows, in one pass. The error is errBadUTF8 or a *frameError. An unknown type is no error
// here: its meaning depends on who asks.
func (d *frameDecoder) decode(data []byte) (message, error) {
	var m message
	if !utf8.Valid(data) {
		return m, errBadUTF8
	}
	err := d.members(data, func(name, value []byte) error {
		at := m.raw.member(name)
		if at == &m.raw.typ && m.raw.typ != nil {
			return badFrame(`the frame has more than one "type"`)
		}
		if at != nil {
			*at = value
		}
		return nil
	})
	if err != nil {
		return message{}, err
	}
	if nestedDeeper(data, maxNesting) {
		return message{}, badFrame("the frame is nested more than %d deep", maxNesting)
	}
	name, ok := unquote(m.raw.typ)
	if m.raw.typ == nil {
		return message{}, badFrame(`the frame has no "type"`)
	} else if !ok {
		return message{}, badFrame(`the frame's "type" is not a string`)
	}
	m.name, m.typ = name, clientType(name)
	if m.raw.id != nil { // an error of strconv is an allocation
		m.id, _ = parseInteger(m.raw.id)
	}
	return m, nil
}

// members checks that data is one JSON object and calls found with each of its
// names, and the value's JSON text, which is a part of data. Of a name that is
// there more than once the last value should count, as for JavaScript.
func (d *frameDecoder) members(data []byte, found func(name, value []byte) error) error {
	d.input = *bytes.NewBuffer(data)
	d.json.Reset(&d.input, frameOptions...)
	defer func() { d.input = bytes.Buffer{} }() // do not keep the frame alive

	if d.json.PeekKind() != '{' {
		return badFrame("the frame is not a JSON object")
	}
	if _, err := d.json.ReadToken(); err != nil {
		return badJSON(err)
	}
	for d.json.PeekKind() == '"' {
		quoted, err := d.json.ReadValue()
		if err != nil {
			return badJSON(err)
		}
		name, _ := unquote(quoted)
		value, err := d.json.ReadValue()
		if err != nil {
			return badJSON(err)
		}
		end := int(d.json.InputOffset())
		if err := found(name, data[end-len(value):end]); err != nil {
			return err
		}
	}
	if _, err := d.json.ReadToken(); err != nil {
		return badJSON(err)
	}
	if rest := bytes.TrimLeft(data[d.json.InputOffset():], " \t\r\n"); len(rest) > 0 {
		return badFrame("the frame goes on after its JSON object")
	}
	return nil
}

// An object is the JSON object in an API call's body.
type object []objectMember

type objectMember struct {
	name  string
	value []byte // its JSON text
}

// get returns the JSON text of the value called name, which may be null, or nil
// where there is none.
func (o object) get(name string) []byte {
	for _, m := range slices.Backward(o) {
		if m.name == name {
			return m.value
		}
	}
	return nil
}

// decodeObject returns the members of the JSON object in data, which they are
// parts of.
func (d *frameDecoder) decodeObject(data []byte) (object, error) {
	o := make(object, 0, 1)
	err := d.members(data, func(name, value []byte) error {
		o = append(o, objectMember{string(name), value})
		return nil
	})
	return o, err
}

func badJSON(err error) *frameError {
	if syntactic, ok := errors.AsType[*jsontext.SyntacticError](err); ok {
		return badFrame("the frame is not valid JSON: %v at byte %d", syntactic.Err, syntactic.ByteOffset)
	}
	return badFrame("the frame is not valid JSON: it ends too early")
}

// unquote returns the text of a JSON string; ok is false for any other value.
func unquote(quoted []byte) (text []byte, ok bool) {
	if len(quoted) < 2 || quoted[0] != '"' {
		return nil, false
	}
	if bytes.IndexByte(quoted, '\\') < 0 {
		return quoted[1 : len(quoted)-1], true
	}
	// The value has passed the decoder; lone surrogates become U+FFFD.
	text, _ = jsontext.AppendUnquote(nil, quoted)
	return text, true
}

// nestedDeeper reports whether valid JSON has more than max levels.
func nestedDeeper(data []byte, max int) bool {
	// Most frames have fewer brackets than levels allowed: two fast counts.
	if bytes.Count(data, []byte{'{'})+bytes.Count(data, []byte{'['}) <= max {
		return false
	}
	depth, inString := 0, false
	for i := 0; i < len(data); i++ {
		switch c := data[i]; {
		case inString && c == '\\':
			i++
		case c == '"':
			inString = !inString
		case inString:
		case c == '{' || c == '[':
			if depth++; depth > max {
				return true
			}
		case c == '}' || c == ']':
			depth--
		}
	}
	return false
}

// maxInteger is the largest that JavaScript holds exactly.
const maxInteger = 1<<53 - 1

// parseInteger returns the value of a JSON number without sign, fraction or
// exponent, up to maxInteger.
func parseInteger(raw []byte) (n uint64, ok bool) {
	n, err := strconv.ParseUint(string(raw), 10, 64)
	if err != nil || n > maxInteger {
		return 0, false
	}
	return n, true
}

// The server's frames without parameters.
const (
	frameRoomFull      = `{"type":"room_full"}`
	framePeerLeft      = `{"type":"peer_left"}`
	framePeerAway      = `{"type":"peer_away"}`
	frameCodeContested = `{"type":"code_contested"}`
)

// A deliver frame is a head, the payload as it was sent, and a tail.
const (
	maxDeliverHead = 96
	deliverTail    = "}"
)

func appendDeliverHead(dst []byte, f *frame) []byte {
	dst = append(dst, `{"type":"deliver","seq":`...)
	dst = strconv.AppendUint(dst, f.seq, 10)
	dst = append(dst, `,"from":"`...)
	dst = append(dst, f.from...)
	return append(dst, `","payload":`...)
}

// appendQueued appends the receipt for mail.
func appendQueued(dst []byte, id, seq uint64) []byte {
	dst = append(dst, `{"type":"queued","id":`...)
	dst = strconv.AppendUint(dst, id, 10)
	dst = append(dst, `,"seq":`...)
	dst = strconv.AppendUint(dst, seq, 10)
	return append(dst, '}')
}

// appendWelcome appends the first frame of a parley.v1 connection. A is the
// impolite peer of perfect negotiation, B the polite one.
func appendWelcome(dst []byte, side string, v view, heartbeat time.Duration, maxMessage int, ice iceServers) []byte {
	dst = append(dst, `{"type":"welcome","v":1,"side":"`...)
	dst = append(dst, side...)
	dst = append(dst, `","polite":`...)
	dst = strconv.AppendBool(dst, side == "B")
	dst = append(dst, `,"peer":"`...)
	dst = append(dst, v.peer.String()...)
	dst = append(dst, '"')
	dst = appendPeerV(dst, v.peerV)
	if v.lastID != 0 {
		dst = strconv.AppendUint(append(dst, `,"lastId":`...), v.lastID, 10)
	}
	dst = append(dst, `,"heartbeat":`...)
	dst = strconv.AppendInt(dst, heartbeat.Milliseconds(), 10)
	dst = append(dst, `,"maxMessage":`...)
	dst = strconv.AppendInt(dst, int64(maxMessage), 10)
	return append(appendICEServers(dst, ice), '}')
}

func appendPeerJoined(dst []byte, e event) []byte {
	dst = append(dst, `{"type":"peer_joined","resumed":`...)
	dst = strconv.AppendBool(dst, e.resumed)
	dst = appendPeerV(dst, e.peerV)
	return append(dst, '}')
}

// appendPeerV appends the version the other client speaks, if it speaks one.
func appendPeerV(dst []byte, v int) []byte {
	if v == 0 {
		return dst
	}
	return strconv.AppendInt(append(dst, `,"peerV":`...), int64(v), 10)
}

// appendRoomWelcome appends the first frame of a room's connection. secret is
// what the client may resume with.
func appendRoomWelcome(dst []byte, room string, v *roomView, secret string, ice iceServers) []byte {
	dst = appendRoomHead(dst, typeJoin, v.self.id, room)
	dst, _ = jsontext.AppendQuote(append(dst, `,"displayName":`...), v.self.displayName)
	dst = append(dst, `,"peers":[`...)
	for i, m := range v.members {
		if i > 0 {
			dst = append(dst, ',')
		}
		dst = append(append(dst, `{"id":"`...), m.id...)
		dst, _ = jsontext.AppendQuote(append(dst, `","displayName":`...), m.displayName)
		dst = append(dst, '}')
	}
	dst = append(append(dst, `],"host":"`...), v.host...)
	dst = append(append(dst, `","resume":"`...), secret...)
	return append(appendICEServers(append(dst, '"'), ice), '}')
}

// appendJoin appends the frame that tells of a new member.
func appendJoin(dst []byte, room string, m member) []byte {
	dst = appendRoomHead(dst, typeJoin, m.id, room)
	dst, _ = jsontext.AppendQuote(append(dst, `,"displayName":`...), m.displayName)
	return append(dst, '}')
}

// appendLeave appends the frame that tells who has left.
func appendLeave(dst []byte, room string, e *roomEvent) []byte {
	dst = appendRoomHead(dst, typeLeave, e.id, room)
	dst = append(append(dst, `,"host":"`...), e.host...)
	return append(dst, `"}`...)
}

// maxSignalHead is what a member's frame is longer than its payload, at most.
const maxSignalHead = 192

// appendSignal appends a member's frame as the others get it; to is "" when it
// is for all of them.
func appendSignal(dst []byte, t frameType, from, to, room string, payload []byte) []byte {
	dst = appendRoomHead(dst, t, from, room)
	if to != "" {
		dst = append(append(append(dst, `,"to":"`...), to...), '"')
	}
	dst = append(append(dst, `,"payload":`...), payload...)
	return append(dst, '}')
}

// appendRoomHead appends the beginning of every frame of a room. IDs need no
// escaping.
func appendRoomHead(dst []byte, t frameType, from, room string) []byte {
	dst = append(append(dst, `{"type":"`...), t.String()...)
	dst = append(append(dst, `","from":"`...), from...)
	dst = append(append(dst, `","roomId":"`...), room...)
	return append(dst, '"')
}

// appendPong appends the answer to a ping; t is JSON text or nil.
func appendPong(dst, t []byte) []byte {
	dst = append(dst, `{"type":"pong"`...)
	if t != nil {
		dst = append(dst, `,"t":`...)
		dst = append(dst, t...)
	}
	return append(dst, '}')
}

// appendError appends the error frame that answers m with e. Of m it uses only
// what does not lie in the frame's own bytes, unless the type is unknown.
func appendError(dst []byte, m message, e *frameError) []byte {
	dst = append(dst, `{"type":"error","code":"`...)
	dst = append(dst, e.code...)
	dst = append(dst, `","error":`...)
	dst, _ = jsontext.AppendQuote(dst, e.text)
	switch {
	case m.id != 0:
		dst = strconv.AppendUint(append(dst, `,"ref":`...), m.id, 10)
	case m.typ != typeUnknown:
		dst, _ = jsontext.AppendQuote(append(dst, `,"ref":`...), m.typ.String())
	case m.name != nil && len(m.name) <= maxRef:
		dst, _ = jsontext.AppendQuote(append(dst, `,"ref":`...), m.name)
	}
	return append(dst, '}')
}

// What errors mean to clients: as answers to calls, as close frames, and as error
// frames. docs/reference.md says what a client should do about each.

// An apiError is an answer that is an error: as HTTP, and, on connections that
// are told by close frames, as a close code.
type apiError struct {
	status     int
	code       string        // for machines
	text       string        // for people
	retryAfter time.Duration // of 429 and 503; 0 for retrySoon

	closeCode   closeCode // 0 when it is always HTTP
	closeReason string    // when every client is told by a close frame; SIDE stands for the seat
}

func (e *apiError) Error() string { return e.text }

func badRequest(code, text string) *apiError {
	return &apiError{status: http.StatusBadRequest, code: code, text: text}
}

var errUpgradeRequired = &apiError{status: http.StatusUpgradeRequired, code: "upgrade_required",
	text: "this is a WebSocket endpoint (RFC 6455, version 13): connect with a WebSocket client"}

var errForbiddenOrigin = &apiError{status: http.StatusForbidden, code: "forbidden_origin",
	text: "pages of this origin may not call this server"}

// errInternal answers a request that met a bug.
var errInternal = &apiError{status: http.StatusInternalServerError, code: "internal_error",
	text: "the server has a fault, and could not do this"}

var errDraining = errors.New("the server is shutting down")

// retrySoon is how long a client should wait where nothing better is known.
const retrySoon = 5 * time.Second

// A frameError answers a client's frame: it becomes an error frame.
type frameError struct {
	code string // for machines: one of the codes of the error frame
	text string // for people
}

func (e *frameError) Error() string { return e.text }

func badFrame(format string, args ...any) *frameError {
	return &frameError{"bad_frame", fmt.Sprintf(format, args...)}
}

// An errorMeaning is what one of the named errors is where it is told. The text for
// people is the error's own.
type errorMeaning struct {
	err    error
	script string // what the scripts in lua/ call it

	status int    // of an answer, and
	code   string // its code
	close  closeCode
	reason string // of the close frame, where clients without parley.v1 get one too; SIDE stands for the seat

	frame string // code of the error frame
}

var errorMeanings = []errorMeaning{
	{err: errGone, script: "gone", status: http.StatusNotFound, code: "unknown_session", close: closeUnknown},
	{err: errCapacity, script: "capacity", status: http.StatusServiceUnavailable, code: "at_capacity", close: closeCapacity},
	{err: errTooMany, script: "toomany", status: http.StatusTooManyRequests, code: "too_many_codes", close: closeTooMany},
	{err: errDraining, status: http.StatusServiceUnavailable, code: "draining", close: closeGoingAway},
	{err: errTaken, script: "taken"}, // no client's doing: the caller tries another

	// Of seats.
	{err: errBusy, script: "busy", status: http.StatusConflict, code: "seat_busy", close: closeBusy, reason: "side SIDE busy"},
	{err: errTakeovers, script: "takeovers", status: http.StatusTooManyRequests, code: "too_many_takeovers", close: closeTooMany, reason: "too_many_takeovers"},
	{err: errReplaced, script: "replaced", status: http.StatusConflict, code: "taken_over", close: closeReplaced},
	{err: errSlow, status: http.StatusTooManyRequests, code: "too_slow", close: closeSlow},

	// Of rooms.
	{err: errWrongPassword, script: "password", status: http.StatusForbidden, code: "wrong_password", close: closeForbidden},
	{err: errLocked, script: "locked", status: http.StatusForbidden, code: "room_locked", close: closeForbidden},
	{err: errRoomFull, script: "full", status: http.StatusConflict, code: "room_is_full", close: closeRoomFull},
	{err: errRoomDeleted, status: http.StatusNotFound, code: "room_deleted", close: closeDeleted},

	// Of codes. One answer for unknown, used and expired: it tells a guesser nothing.
	{err: errCodeGone, status: http.StatusGone, code: "gone"},
	{err: errCodeUsed, status: http.StatusGone, code: "gone"},

	// Of frames.
	{err: errNoPeer, script: "nopeer", frame: "peer_not_found"},
	{err: errPeerAbsent, script: "absent", frame: "peer_absent"},
	{err: errMailFull, script: "mailfull", frame: "mailbox_full"},
	{err: errOverCapacity, script: "overcapacity", frame: "over_capacity"},
	{err: errBeyond, script: "beyond"}, // told as bad_frame, with the numbers
}

// meaningOf returns what err means, or nil where the backend could not be asked.
func meaningOf(err error) *errorMeaning {
	for i := range errorMeanings {
		if m := &errorMeanings[i]; errors.Is(err, m.err) {
			return m
		}
	}
	return nil
}

const (
	codeUnavailable = "backend_unavailable"
	textUnavailable = "the server cannot do this at the moment"
)

// toAPIError returns the answer that err is.
func toAPIError(err error) *apiError {
	if e, ok := errors.AsType[*apiError](err); ok {
		return e
	}
	if e, ok := errors.AsType[*exhaustedError](err); ok {
		return &apiError{status: http.StatusServiceUnavailable, code: "codes_exhausted", text: err.Error(), retryAfter: e.retryAfter}
	}
	if e, ok := errors.AsType[*tokenError](err); ok {
		return &apiError{status: http.StatusUnauthorized, code: "unauthorized", text: e.text}
	}
	m := meaningOf(err)
	switch {
	case m == nil || m.status == 0:
		return &apiError{status: http.StatusServiceUnavailable, code: codeUnavailable, text: textUnavailable, closeCode: closeCapacity}
	case m.status == http.StatusGone:
		return &apiError{status: m.status, code: m.code, text: "the code is unknown, has been used, or has expired"}
	}
	return &apiError{status: m.status, code: m.code, text: err.Error(), closeCode: m.close, closeReason: m.reason}
}

// toFrameError returns the error frame that err is.
func toFrameError(err error) *frameError {
	if e, ok := errors.AsType[*frameError](err); ok {
		return e
	}
	if m := meaningOf(err); m != nil && m.frame != "" {
		return &frameError{m.frame, err.Error()}
	}
	return &frameError{codeUnavailable, textUnavailable}
}
