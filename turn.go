package main

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"hash/maphash"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pion/stun/v3"
	"golang.org/x/time/rate"
)

// With TURN=on the process is a STUN and TURN server too (RFC 8489, RFC 8656),
// and its relay is closed: a relayed address exists in this process only. What a
// client sends to one is handed to the client that holds it, if both belong to
// one session. No packet leaves for any other host, so there is no range of ports
// to open, no public address to know, and nobody to attack from here.
//
// A packet goes from the socket that it was read from to the socket of who gets
// it, on the goroutine that read it, in the buffer that it was read into:
// turnServer.relay. turn_net.go has the sockets.

const (
	turnRealm = "parley"

	// maxPeerAllocations is how many relayed addresses a session has at most, for
	// each other seat that a seat may connect to. A pair needs six: two clients, each
	// by UDP, TCP and TLS; and for a moment twice as many when it connects anew. In a
	// room everyone may connect to everyone, by UDP at least.
	maxPeerAllocations = 16
	maxChannels        = 32 // of an allocation: it has no more than 15 peers at a time

	// RFC 8656 sections 3.2, 9 and 12.
	allocationLife = 10 * time.Minute
	permissionLife = 5 * time.Minute
	channelLife    = 10 * time.Minute

	nonceLife = time.Hour // RFC 8656 section 5

	// maxTURNMessage is the largest message that is taken: a packet of an Ethernet
	// and what TURN adds to it.
	maxTURNMessage = 2048
	// headroom is what a Data indication has before its payload: with as much
	// before each message that is read, it is made in place.
	headroom = 20 + 12 + 4
	// tailroom is what an attribute may be padded with.
	tailroom = 3

	// An address may ask so often without a credential.
	anonymousPerMinute = 1200
	// maxLookups is how many allocations may wait for the hub to say whether their
	// session lives.
	maxLookups    = 256
	lookupTimeout = 2 * time.Second

	firstVirtualPort = 1024
)

// virtualAddr is the address of all relayed addresses, of a block that is no
// host's (RFC 5737). They differ by port.
func virtualAddr() netip.Addr { return netip.AddrFrom4([4]byte{192, 0, 2, 1}) }

// A turnServer relays for sessions of this server.
type turnServer struct {
	// static after construction
	log      *slog.Logger
	metrics  *turnMetrics
	secrets  []string
	nonceKey [32]byte
	exempt   []netip.Prefix
	maxBytes int // a second and session; 0 for no limit
	max      int // allocations
	// seats says how many a live session has.
	seats func(context.Context, sessionID) (int, error)
	// relayOf says which instance relays for a session; nil where there is one.
	relayOf func(ctx context.Context, id sessionID, own string) (string, error)
	start   time.Time // what times here count from
	seed    maphash.Seed

	anonymous *rateLimit
	lookups   chan struct{}

	turnSockets

	ports   []atomic.Pointer[relayAllocation] // by relayed port, from firstVirtualPort
	clients [64]turnShard                     // those that speak UDP

	mu sync.Mutex
	// guarded by mu
	sessions map[sessionID]*relaySession
	count    int // allocations
	nextPort int // where to look for a free port
}

// A turnShard is a share of the clients that speak UDP.
type turnShard struct {
	mu sync.RWMutex
	// guarded by mu
	all map[netip.AddrPort]*relayAllocation
}

// A relaySession is a session with allocations.
type relaySession struct {
	id          sessionID
	allocations int           // guarded by the server's mu
	budget      *rate.Limiter // bytes; nil for no limit
}

// A relayAllocation is a relayed address of a client. Times are since the
// server's start.
type relayAllocation struct {
	// static after construction
	session     *relaySession
	username    string
	addr        netip.AddrPort // the client
	stream      *turnStream    // its connection; nil for UDP
	port        int            // of its relayed address
	transaction [stun.TransactionIDSize]byte

	expires   atomic.Int64
	permitted atomic.Int64 // until when peers may send to it: they all have one address

	mu sync.Mutex // taken to change channels
	// The value is not changed: whoever relays reads it with no lock.
	channels atomic.Pointer[[]turnChannel]
}

// A turnChannel is a number that stands for a peer.
type turnChannel struct {
	number uint16
	port   int // the peer's, of its relayed address
	until  time.Duration
}

func newTURNServer(cfg *config, log *slog.Logger, m *metrics, seats func(context.Context, sessionID) (int, error)) *turnServer {
	t := &turnServer{
		log: log, metrics: m.turn, secrets: cfg.turnSecrets, exempt: cfg.rateExempt,
		maxBytes: int(cfg.turnMaxBPS), max: cfg.turnMaxAllocations, seats: seats,
		start: time.Now(), seed: maphash.MakeSeed(),
		anonymous: &rateLimit{newBuckets(anonymousPerMinute), newBuckets(siteShare * anonymousPerMinute)},
		lookups:   make(chan struct{}, maxLookups),
		sessions:  make(map[sessionID]*relaySession),
		// Twice as many as are used, so that a free one is soon found.
		ports: make([]atomic.Pointer[relayAllocation], min(2*cfg.turnMaxAllocations, 1<<16-firstVirtualPort)),
	}
	if len(t.secrets) == 0 {
		t.secrets = []string{rand.Text()}
	}
	rand.Read(t.nonceKey[:])
	for i := range t.clients {
		t.clients[i].all = make(map[netip.AddrPort]*relayAllocation)
	}
	t.replies, t.tasks, t.streams = directWriter{t}, newTaskGroup(), make(map[*turnStream]struct{})
	return t
}

// run ends allocations whose time is over, until ctx is done.
func (t *turnServer) run(ctx context.Context) error {
	every(ctx, time.Second, t.sweep)
	return nil
}

func (t *turnServer) sweep() {
	now := t.now()
	for i := range t.ports {
		if a := t.ports[i].Load(); a != nil && !a.live(now) {
			t.end(a)
		}
	}
}

func (t *turnServer) now() time.Duration { return time.Since(t.start) }

func (a *relayAllocation) live(now time.Duration) bool { return time.Duration(a.expires.Load()) > now }

// Credentials.

// username returns the user of a session until a time. The instances that share
// the secret find the session in it; who does not know the secret does not.
func (t *turnServer) username(id sessionID, expires time.Time) string {
	var tag sessionID
	sessionCipher(t.secrets[0]).Encrypt(tag[:], id[:])
	return strconv.FormatInt(expires.Unix(), 10) + ":" + hex.EncodeToString(tag[:])
}

func sessionCipher(secret string) cipher.Block {
	mac := hmac.New(sha256.New, []byte(secret))
	mac.Write([]byte("parley session"))
	block, err := aes.NewCipher(mac.Sum(nil)[:16])
	if err != nil {
		panic(err)
	}
	return block
}

// parseUsername returns what username made with this secret.
func parseUsername(username, secret string) (id sessionID, expires time.Time, ok bool) {
	number, tag, _ := strings.Cut(username, ":")
	seconds, err := strconv.ParseInt(number, 10, 64)
	raw, tagErr := hex.DecodeString(tag)
	if err != nil || tagErr != nil || len(raw) != len(id) {
		return id, expires, false
	}
	sessionCipher(secret).Decrypt(id[:], raw)
	return id, time.Unix(seconds, 0), true
}

// turnKey is the key of RFC 8489 section 9.2.2.
func turnKey(username, password string) stun.MessageIntegrity {
	sum := md5.Sum([]byte(username + ":" + turnRealm + ":" + password))
	return sum[:]
}

// nonce returns one for a client's address: its time, and what proves that it is
// ours. It is short, so that the answer with it is.
func (t *turnServer) nonce(addr netip.Addr, at time.Time) string {
	var b [12]byte
	binary.BigEndian.PutUint32(b[:], uint32(at.Unix()))
	mac := hmac.New(sha256.New, t.nonceKey[:])
	mac.Write(b[:4])
	mac.Write(addr.AsSlice())
	copy(b[4:], mac.Sum(nil))
	return base64.RawURLEncoding.EncodeToString(b[:])
}

func (t *turnServer) nonceValid(nonce string, addr netip.Addr) bool {
	b, err := base64.RawURLEncoding.DecodeString(nonce)
	if err != nil || len(b) != 12 {
		return false
	}
	at := time.Unix(int64(binary.BigEndian.Uint32(b)), 0)
	return time.Since(at) < nonceLife && hmac.Equal([]byte(nonce), []byte(t.nonce(addr, at)))
}

// Requests.

// A turnSource is where a message comes from: a client by UDP, or by a stream.
type turnSource struct {
	addr   netip.AddrPort
	stream *turnStream // nil for UDP
}

// A turnWriter sends messages to clients, for one goroutine that reads.
type turnWriter interface {
	// send takes a message to a client. It may use the bytes until the goroutine
	// reads again, and tells whether they went off.
	send(to turnSource, message []byte) (ok bool)
}

// take takes one message: buf[from:to], with headroom before it and tailroom
// behind it.
func (t *turnServer) take(w turnWriter, src turnSource, buf []byte, from, to int, now time.Duration) {
	message := buf[from:to]
	if len(message) >= 4 && message[0]>>6 == 1 {
		t.takeChannelData(w, src, buf, from, to, now)
		return
	}
	if !stun.IsMessage(message) {
		t.metrics.drop(turnMalformed)
		return
	}
	m := &stun.Message{Raw: message}
	if err := m.Decode(); err != nil || m.Contains(stun.AttrFingerprint) && stun.Fingerprint.Check(m) != nil {
		t.metrics.drop(turnMalformed)
		return
	}
	switch {
	case m.Type == stun.NewType(stun.MethodSend, stun.ClassIndication):
		t.takeSend(w, src, m, buf, from, now)
	case m.Type.Class == stun.ClassRequest:
		t.takeRequest(w, src, m, now)
	case m.Type == stun.NewType(stun.MethodBinding, stun.ClassIndication): // keeps a NAT's mapping
	default:
		t.metrics.drop(turnMalformed)
	}
}

// A turnRequest is a request on its way to an answer.
type turnRequest struct {
	*stun.Message
	src      turnSource
	w        turnWriter
	now      time.Duration
	username string
	key      stun.MessageIntegrity // nil until the credential is known to be right
	session  sessionID             // that it is for
	expires  time.Time             // when it expires
}

func (t *turnServer) takeRequest(w turnWriter, src turnSource, m *stun.Message, now time.Duration) {
	r := &turnRequest{Message: m, src: src, w: w, now: now}
	switch m.Type.Method {
	case stun.MethodBinding:
		if !t.mayAsk(src.addr.Addr()) {
			return
		}
		if unknown := unknownAttributes(m); len(unknown) > 0 {
			t.refuse(r, stun.CodeUnknownAttribute, "", unknown)
			return
		}
		src.seen()
		t.answer(r, &stun.XORMappedAddress{IP: src.addr.Addr().AsSlice(), Port: int(src.addr.Port())})
	case stun.MethodAllocate, stun.MethodRefresh, stun.MethodCreatePermission, stun.MethodChannelBind:
		if !t.authenticate(r) {
			return
		}
		if unknown := unknownAttributes(m); len(unknown) > 0 {
			t.refuse(r, stun.CodeUnknownAttribute, "", unknown)
			return
		}
		switch m.Type.Method {
		case stun.MethodAllocate:
			t.allocate(r)
		case stun.MethodRefresh:
			t.refresh(r)
		case stun.MethodCreatePermission:
			t.permit(r)
		case stun.MethodChannelBind:
			t.bind(r)
		}
	default: // such as those of RFC 6062, for which there are no allocations either
		t.metrics.drop(turnMalformed)
	}
}

// mayAsk reports whether an address may have an answer without a credential. One
// that asks too often gets none: it may be another's, who is to be flooded.
func (t *turnServer) mayAsk(addr netip.Addr) bool {
	if contains(t.exempt, addr) {
		return true
	}
	ok, _ := t.anonymous.allow(networkOf(addr))
	if !ok {
		t.metrics.refuse(turnTooOften)
	}
	return ok
}

// unknownAttributes returns those that a server must understand and this one
// does not.
func unknownAttributes(m *stun.Message) (unknown stun.UnknownAttributes) {
	for _, a := range m.Attributes {
		switch a.Type {
		case stun.AttrUsername, stun.AttrRealm, stun.AttrNonce, stun.AttrMessageIntegrity,
			stun.AttrRequestedTransport, stun.AttrLifetime, stun.AttrXORPeerAddress, stun.AttrChannelNumber, stun.AttrData,
			stun.AttrRequestedAddressFamily, stun.AttrEvenPort, stun.AttrReservationToken,
			stun.AttrDontFragment, // here nothing is
			stun.AttrPriority, stun.AttrUseCandidate:
		default:
			if a.Type.Required() {
				unknown = append(unknown, a.Type)
			}
		}
	}
	return unknown
}

// authenticate checks the credential, RFC 8489 section 9.2.4. If it is not right
// it answers so that clients know it, whatever is wrong: browsers give up on
// anything but 401 and 438.
func (t *turnServer) authenticate(r *turnRequest) bool {
	addr := r.src.addr.Addr()
	if !r.Contains(stun.AttrMessageIntegrity) { // everyone begins so
		if t.mayAsk(addr) {
			t.challenge(r, stun.CodeUnauthorized)
		}
		return false
	}
	var username stun.Username
	var nonce stun.Nonce
	if username.GetFrom(r.Message) != nil || nonce.GetFrom(r.Message) != nil || !r.Contains(stun.AttrRealm) {
		if t.mayAsk(addr) {
			t.refuse(r, stun.CodeBadRequest, "")
		}
		return false
	}
	if !t.nonceValid(nonce.String(), addr) {
		if t.mayAsk(addr) {
			t.challenge(r, stun.CodeStaleNonce)
		}
		return false
	}
	for _, secret := range t.secrets {
		id, expires, ok := parseUsername(username.String(), secret)
		key := turnKey(username.String(), turnPassword(secret, username.String()))
		if ok && key.Check(r.Message) == nil {
			r.username, r.key, r.session, r.expires = username.String(), key, id, expires
			r.src.seen()
			return true
		}
	}
	if t.mayAsk(addr) {
		t.metrics.refuse(turnUnauthorized)
		t.challenge(r, stun.CodeUnauthorized)
	}
	return false
}

// challenge refuses a request for its credential.
func (t *turnServer) challenge(r *turnRequest, code stun.ErrorCode) {
	r.key = nil // as the client may not have the same
	t.refuse(r, code, "", stun.NewRealm(turnRealm), stun.NewNonce(t.nonce(r.src.addr.Addr(), time.Now())))
}

// refuse answers with an error, and counts it under a reason unless that is "".
func (t *turnServer) refuse(r *turnRequest, code stun.ErrorCode, reason turnRefusal, more ...stun.Setter) {
	if reason != "" {
		t.metrics.refuse(reason)
	}
	// No words: answers are to be no larger than they must.
	t.respond(r, stun.ClassErrorResponse, append([]stun.Setter{stun.ErrorCodeAttribute{Code: code}}, more...)...)
}

func (t *turnServer) answer(r *turnRequest, attributes ...stun.Setter) {
	t.respond(r, stun.ClassSuccessResponse, attributes...)
}

func (t *turnServer) respond(r *turnRequest, class stun.MessageClass, attributes ...stun.Setter) {
	setters := []stun.Setter{stun.NewTransactionIDSetter(r.TransactionID), stun.NewType(r.Type.Method, class)}
	setters = append(setters, attributes...)
	if r.key != nil {
		setters = append(setters, r.key)
	}
	m, err := stun.Build(setters...)
	if err != nil {
		t.log.Error("a TURN answer could not be made", "method", r.Type.Method.String(), "error", err)
		return
	}
	r.w.send(r.src, m.Raw)
}

// allocationOf returns the allocation of a client, or nil.
func (t *turnServer) allocationOf(src turnSource, now time.Duration) (a *relayAllocation) {
	if src.stream != nil {
		a = src.stream.allocation.Load()
	} else {
		shard := t.shard(src.addr)
		shard.mu.RLock()
		a = shard.all[src.addr]
		shard.mu.RUnlock()
	}
	if a == nil || !a.live(now) {
		return nil
	}
	return a
}

func (t *turnServer) shard(addr netip.AddrPort) *turnShard {
	return &t.clients[maphash.Comparable(t.seed, addr)%uint64(len(t.clients))]
}

// allocate answers an Allocate, RFC 8656 section 7.2.
func (t *turnServer) allocate(r *turnRequest) {
	if a := t.allocationOf(r.src, r.now); a != nil {
		if a.transaction == r.TransactionID && a.username == r.username { // sent again
			t.allocated(r, a)
		} else {
			t.refuse(r, stun.CodeAllocMismatch, "")
		}
		return
	}
	if !time.Now().Before(r.expires) {
		t.metrics.refuse(turnExpired)
		t.challenge(r, stun.CodeUnauthorized)
		return
	}
	transport, err := r.Get(stun.AttrRequestedTransport)
	const udp = 17
	switch {
	case err != nil || len(transport) != 4:
		t.refuse(r, stun.CodeBadRequest, "")
		return
	case transport[0] != udp: // TCP is RFC 6062
		t.refuse(r, stun.CodeUnsupportedTransProto, turnTransport)
		return
	case r.Contains(stun.AttrEvenPort) || r.Contains(stun.AttrReservationToken): // for RTP without multiplexing
		t.refuse(r, stun.CodeInsufficientCapacity, turnTransport)
		return
	}
	const ipv4 = 1
	if family, err := r.Get(stun.AttrRequestedAddressFamily); err == nil && (len(family) != 4 || family[0] != ipv4) {
		t.refuse(r, stun.CodeAddrFamilyNotSupported, turnTransport)
		return
	}
	// The hub may be asked by network, and whoever reads must not wait for that.
	select {
	case t.lookups <- struct{}{}:
	default: // the client asks again
		t.metrics.refuse(turnBusy)
		return
	}
	own := *r
	own.Message = new(stun.Message)
	if err := r.CloneTo(own.Message); err != nil {
		<-t.lookups
		return
	}
	own.w = t.replies
	t.tasks.Go(func() {
		defer func() { <-t.lookups }()
		t.allocateLive(&own)
	})
}

// allocateLive goes on with an Allocate once the hub says that the session lives.
func (t *turnServer) allocateLive(r *turnRequest) {
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	seats, err := t.seats(ctx, r.session)
	if errors.Is(err, errGone) {
		t.metrics.refuse(turnSessionGone)
		t.challenge(r, stun.CodeUnauthorized)
		return
	} else if err != nil { // the client asks again
		t.metrics.refuse(turnBusy)
		return
	}
	a, refusal := t.open(r, maxPeerAllocations*(seats-1))
	switch {
	case refusal == turnSessionFull:
		t.refuse(r, stun.CodeAllocQuotaReached, refusal)
	case refusal != "":
		t.refuse(r, stun.CodeInsufficientCapacity, refusal)
	case a.transaction != r.TransactionID:
		t.refuse(r, stun.CodeAllocMismatch, "")
	default:
		t.allocated(r, a)
	}
}

// allocated answers with an allocation.
func (t *turnServer) allocated(r *turnRequest, a *relayAllocation) {
	relayed := &stun.XORMappedAddress{IP: virtualAddr().AsSlice(), Port: a.port}
	t.answer(r,
		setterFunc(func(m *stun.Message) error { return relayed.AddToAs(m, stun.AttrXORRelayedAddress) }),
		lifetimeAttribute(time.Duration(a.expires.Load())-t.now()),
		&stun.XORMappedAddress{IP: r.src.addr.Addr().AsSlice(), Port: int(r.src.addr.Port())})
}

// A setterFunc adds to a message.
type setterFunc func(*stun.Message) error

func (f setterFunc) AddTo(m *stun.Message) error { return f(m) }

func lifetimeAttribute(d time.Duration) stun.Setter {
	return setterFunc(func(m *stun.Message) error {
		m.Add(stun.AttrLifetime, binary.BigEndian.AppendUint32(nil, uint32((d+time.Second/2)/time.Second)))
		return nil
	})
}

// lifetime returns for how long a request asks, within what an allocation lives.
func (r *turnRequest) lifetime() time.Duration {
	if v, err := r.Get(stun.AttrLifetime); err == nil && len(v) == 4 {
		return min(time.Duration(binary.BigEndian.Uint32(v))*time.Second, allocationLife)
	}
	return allocationLife
}

// open makes an allocation, or returns that which the client has got meanwhile. A
// session has at most so many.
func (t *turnServer) open(r *turnRequest, most int) (a *relayAllocation, refusal turnRefusal) {
	t.mu.Lock()
	defer t.mu.Unlock()
	now := t.now()
	if t.closed {
		return nil, turnFull
	}
	if a := t.allocationOf(r.src, now); a != nil {
		return a, ""
	}
	if old := t.stale(r.src); old != nil {
		t.endLocked(old)
	}
	if t.count >= t.max {
		return nil, turnFull
	}
	s := t.sessions[r.session]
	if s == nil {
		s = &relaySession{id: r.session}
		if t.maxBytes > 0 {
			s.budget = rate.NewLimiter(rate.Limit(t.maxBytes), max(t.maxBytes, maxTURNMessage))
		}
	} else if s.allocations >= most {
		return nil, turnSessionFull
	}
	a = &relayAllocation{session: s, username: r.username, addr: r.src.addr, stream: r.src.stream, transaction: r.TransactionID}
	a.expires.Store(int64(now + max(r.lifetime(), time.Minute))) // 0 is for Refresh alone
	if a.stream != nil && !a.stream.hold(a) {
		return nil, turnFull // it is closed
	}
	for t.ports[t.nextPort].Load() != nil { // there are more than allocations
		t.nextPort = (t.nextPort + 1) % len(t.ports)
	}
	a.port = firstVirtualPort + t.nextPort
	t.ports[t.nextPort].Store(a)
	t.nextPort = (t.nextPort + 1) % len(t.ports)
	if a.stream == nil {
		shard := t.shard(a.addr)
		shard.mu.Lock()
		shard.all[a.addr] = a
		shard.mu.Unlock()
	}
	t.sessions[r.session] = s
	s.allocations++
	t.count++
	t.metrics.allocations.Inc()
	return a, ""
}

// stale returns an allocation of the client that has expired and not ended yet.
func (t *turnServer) stale(src turnSource) *relayAllocation {
	if src.stream != nil {
		return src.stream.allocation.Load()
	}
	shard := t.shard(src.addr)
	shard.mu.RLock()
	defer shard.mu.RUnlock()
	return shard.all[src.addr]
}

// end ends an allocation, unless that was done.
func (t *turnServer) end(a *relayAllocation) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.endLocked(a)
}

// endLocked is end for a caller that holds mu.
func (t *turnServer) endLocked(a *relayAllocation) {
	if !t.ports[a.port-firstVirtualPort].CompareAndSwap(a, nil) {
		return
	}
	a.expires.Store(0)
	if a.stream != nil {
		a.stream.release(a)
	} else {
		shard := t.shard(a.addr)
		shard.mu.Lock()
		if shard.all[a.addr] == a {
			delete(shard.all, a.addr)
		}
		shard.mu.Unlock()
	}
	if a.session.allocations--; a.session.allocations == 0 {
		delete(t.sessions, a.session.id)
	}
	t.count--
	t.metrics.allocations.Dec()
}

// owned returns the allocation that a request with a credential is about, or
// answers that there is none.
func (t *turnServer) owned(r *turnRequest) *relayAllocation {
	a := t.allocationOf(r.src, r.now)
	switch {
	case a == nil:
		t.refuse(r, stun.CodeAllocMismatch, "")
		return nil
	case a.username != r.username:
		t.refuse(r, stun.CodeWrongCredentials, turnUnauthorized)
		return nil
	}
	return a
}

// refresh answers a Refresh. It asks neither whether the credential has expired
// nor whether the session lives: a relay that is in use goes on.
func (t *turnServer) refresh(r *turnRequest) {
	a := t.owned(r)
	if a == nil {
		return
	}
	life := r.lifetime()
	if life == 0 {
		t.end(a)
	} else {
		a.expires.Store(int64(r.now + life))
		if a.stream != nil {
			a.stream.extend(life)
		}
	}
	t.answer(r, lifetimeAttribute(life))
}

// permit answers a CreatePermission. Browsers ask it for each address that a peer
// may have, and know 403 to be no reason to give up.
func (t *turnServer) permit(r *turnRequest) {
	a := t.owned(r)
	if a == nil {
		return
	}
	peers := 0
	err := r.ForEach(stun.AttrXORPeerAddress, func(m *stun.Message) error {
		peers++
		peer, err := peerOf(m)
		if err == nil && peer.Addr() != virtualAddr() {
			err = errForbiddenPeer
		}
		return err
	})
	switch {
	case errors.Is(err, errForbiddenPeer):
		t.refuse(r, stun.CodeForbidden, turnForbidden)
	case err != nil || peers == 0:
		t.refuse(r, stun.CodeBadRequest, "")
	default:
		a.permitted.Store(int64(r.now + permissionLife))
		t.answer(r)
	}
}

var errForbiddenPeer = errors.New("this relay reaches its own clients alone")

// peerOf returns the first XOR-PEER-ADDRESS.
func peerOf(m *stun.Message) (netip.AddrPort, error) {
	var peer stun.XORMappedAddress
	if err := peer.GetFromAs(m, stun.AttrXORPeerAddress); err != nil {
		return netip.AddrPort{}, err
	}
	addr, _ := netip.AddrFromSlice(peer.IP)
	return netip.AddrPortFrom(addr, uint16(peer.Port)), nil
}

// bind answers a ChannelBind, RFC 8656 section 12.2.
func (t *turnServer) bind(r *turnRequest) {
	a := t.owned(r)
	if a == nil {
		return
	}
	v, err := r.Get(stun.AttrChannelNumber)
	peer, peerErr := peerOf(r.Message)
	if err != nil || peerErr != nil || len(v) != 4 || v[0]>>6 != 1 {
		t.refuse(r, stun.CodeBadRequest, "")
		return
	}
	if peer.Addr() != virtualAddr() {
		t.refuse(r, stun.CodeForbidden, turnForbidden)
		return
	}
	switch a.bind(turnChannel{binary.BigEndian.Uint16(v), int(peer.Port()), r.now + channelLife}, r.now) {
	case errChannelTaken:
		t.refuse(r, stun.CodeBadRequest, "")
	case errChannels:
		t.refuse(r, stun.CodeInsufficientCapacity, turnChannels)
	default:
		a.permitted.Store(max(a.permitted.Load(), int64(r.now+permissionLife)))
		t.answer(r)
	}
}

var (
	errChannelTaken = errors.New("the channel or the peer is bound to another")
	errChannels     = errors.New("there are as many channels as there may be")
)

// bind adds a channel, or refreshes it.
func (a *relayAllocation) bind(c turnChannel, now time.Duration) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	next := make([]turnChannel, 0, 4)
	for _, other := range a.bound() {
		switch {
		case other.until <= now, other.number == c.number && other.port == c.port:
		case other.number == c.number || other.port == c.port:
			return errChannelTaken
		default:
			next = append(next, other)
		}
	}
	if len(next) == maxChannels {
		return errChannels
	}
	next = slices.Clip(append(next, c))
	a.channels.Store(&next)
	return nil
}

// bound returns the channels, some of which may have expired.
func (a *relayAllocation) bound() []turnChannel {
	if c := a.channels.Load(); c != nil {
		return *c
	}
	return nil
}

// Packets.

// takeChannelData relays what comes by a channel.
func (t *turnServer) takeChannelData(w turnWriter, src turnSource, buf []byte, from, to int, now time.Duration) {
	number := binary.BigEndian.Uint16(buf[from:])
	end := from + 4 + int(binary.BigEndian.Uint16(buf[from+2:]))
	if end > to {
		t.metrics.drop(turnMalformed)
		return
	}
	a := t.allocationOf(src, now)
	if a == nil {
		t.metrics.drop(turnNoAllocation)
		return
	}
	for _, c := range a.bound() {
		if c.number == number && c.until > now {
			t.relay(w, a, c.port, buf, from+4, end, now)
			return
		}
	}
	t.metrics.drop(turnNoAllocation)
}

// takeSend relays what comes in a Send indication.
func (t *turnServer) takeSend(w turnWriter, src turnSource, m *stun.Message, buf []byte, from int, now time.Duration) {
	a := t.allocationOf(src, now)
	if a == nil {
		t.metrics.drop(turnNoAllocation)
		return
	}
	peer, err := peerOf(m)
	if err != nil || len(unknownAttributes(m)) > 0 {
		t.metrics.drop(turnMalformed)
		return
	}
	at, size, ok := dataOf(buf[from : from+20+int(m.Length)])
	if !ok {
		t.metrics.drop(turnMalformed)
		return
	}
	if peer.Addr() != virtualAddr() || time.Duration(a.permitted.Load()) <= now {
		t.metrics.drop(turnNoPermission)
		return
	}
	t.relay(w, a, int(peer.Port()), buf, from+at, from+at+size, now)
}

// dataOf returns where the value of a valid message's attribute DATA is.
func dataOf(message []byte) (at, size int, ok bool) {
	for i := 20; i+4 <= len(message); {
		size := int(binary.BigEndian.Uint16(message[i+2:]))
		if stun.AttrType(binary.BigEndian.Uint16(message[i:])) == stun.AttrData {
			return i + 4, size, i+4+size <= len(message)
		}
		i += 4 + (size+3)&^3
	}
	return 0, 0, false
}

// relay hands the payload buf[from:to] of a to who has the relayed port. It
// writes what goes before it, and pads it, in buf.
func (t *turnServer) relay(w turnWriter, a *relayAllocation, port int, buf []byte, from, to int, now time.Duration) {
	t.metrics.bytes[in].Add(float64(to - from))
	if port < firstVirtualPort || port-firstVirtualPort >= len(t.ports) {
		t.metrics.drop(turnNoPeer)
		return
	}
	b := t.ports[port-firstVirtualPort].Load()
	switch {
	case b == nil || !b.live(now):
		t.metrics.drop(turnNoPeer)
		return
	case b.session != a.session:
		t.metrics.drop(turnOtherSession)
		return
	case time.Duration(b.permitted.Load()) <= now:
		t.metrics.drop(turnNoPermission)
		return
	case a.session.budget != nil && !a.session.budget.AllowN(t.start.Add(now), to-from):
		t.metrics.drop(turnTooFast)
		return
	}
	padded := from + (to-from+3)&^3
	clear(buf[to:padded])
	head := from - headroom
	if number := b.channelOf(a.port, now); number != 0 {
		head = from - 4
		binary.BigEndian.PutUint16(buf[head:], number)
		binary.BigEndian.PutUint16(buf[head+2:], uint16(to-from))
		if b.stream == nil {
			padded = to // RFC 8656 section 12.5: only in a stream it must be
		}
	} else {
		putDataIndication(buf[head:from], a.port, to-from)
	}
	if !w.send(turnSource{b.addr, b.stream}, buf[head:padded]) {
		t.metrics.drop(turnQueueFull)
		return
	}
	t.metrics.bytes[out].Add(float64(to - from))
}

// channelOf returns the channel that is bound to a peer, or 0.
func (a *relayAllocation) channelOf(port int, now time.Duration) uint16 {
	for _, c := range a.bound() {
		if c.port == port && c.until > now {
			return c.number
		}
	}
	return 0
}

// putDataIndication writes what goes before the payload of a Data indication from
// a relayed port, RFC 8656 section 11.5.
func putDataIndication(head []byte, port, size int) {
	const cookie = 0x2112A442
	be := binary.BigEndian
	be.PutUint16(head[0:], stun.NewType(stun.MethodData, stun.ClassIndication).Value())
	be.PutUint16(head[2:], uint16(headroom-20+(size+3)&^3))
	be.PutUint32(head[4:], cookie)
	be.PutUint64(head[8:], 0) // nobody answers an indication
	be.PutUint32(head[16:], 0)
	be.PutUint16(head[20:], uint16(stun.AttrXORPeerAddress))
	be.PutUint16(head[22:], 8)
	be.PutUint16(head[24:], 1) // IPv4
	be.PutUint16(head[26:], uint16(port)^cookie>>16)
	addr := virtualAddr().As4()
	be.PutUint32(head[28:], be.Uint32(addr[:])^cookie)
	be.PutUint16(head[32:], uint16(stun.AttrData))
	be.PutUint16(head[34:], uint16(size))
}

// What clients are told.

// credential returns one for a session until a time.
func (t *turnServer) credential(id sessionID, expires time.Time) (username, password string) {
	username = t.username(id, expires)
	return username, turnPassword(t.secrets[0], username)
}

// A relayPlace is where clients reach the relay of an instance. Its text is what
// other instances have in Redis.
type relayPlace struct {
	Host    string `json:"host"` // canonical
	Port    int32  `json:"port"` // UDP and TCP
	TLSPort int32  `json:"tlsPort,omitempty"`
}

// place returns where those who reach this server as host find its relay: not ok
// while it is not open, and where that is no host.
func (t *turnServer) place(host string) (p relayPlace, ok bool) {
	p.Host, ok = canonicalHost(host)
	p.Port, p.TLSPort = t.port.Load(), t.tlsPort.Load()
	return p, ok && p.Port != 0
}

// placeOf returns where the relay of a session is: here, unless the hub says that
// it is with another instance.
func (t *turnServer) placeOf(id sessionID, host string) (p relayPlace, ok bool) {
	if p, ok = t.place(host); !ok || t.relayOf == nil {
		return p, ok
	}
	ctx, cancel := context.WithTimeout(context.Background(), lookupTimeout)
	defer cancel()
	text, err := t.relayOf(ctx, id, string(mustMarshal(p)))
	if err != nil { // perhaps the other peer asks here too
		t.log.Debug("the relay of a session is not known", "error", err)
		return p, true
	}
	var chosen relayPlace
	if err := json.Unmarshal([]byte(text), &chosen); err != nil {
		t.log.Error("another instance names no relay", "error", err)
		return p, true
	}
	return chosen, true
}

// urls returns the URLs of a relay.
func (p relayPlace) urls() (stunURL string, turnURLs []string) {
	at := func(port int32) string { return net.JoinHostPort(p.Host, strconv.Itoa(int(port))) }
	turnURLs = []string{"turn:" + at(p.Port) + "?transport=udp", "turn:" + at(p.Port) + "?transport=tcp"}
	if p.TLSPort != 0 {
		turnURLs = append(turnURLs, "turns:"+at(p.TLSPort)+"?transport=tcp")
	}
	return "stun:" + at(p.Port), turnURLs
}
