package main

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/google/uuid"
	"golang.org/x/crypto/argon2"
)

// Rooms, for party games: opened by a host, joined by guests with a code.

const (
	roomCodeAlphabet = "ABCDEFGHJKLMNPQRSTUVWXYZ23456789" // no I, O, 0 or 1: 32 characters
	roomCodeLength   = 6
	roomCodeTries    = 16 // draws of which all are taken only if nearly every code is

	minPlayers, maxPlayers, usualPlayers = 2, 16, 8

	maxPassword    = 128 // bytes
	maxDisplayName = 64  // characters
)

var (
	errRoomNotFound = &apiError{status: http.StatusNotFound, code: "room_not_found",
		text: "the room is unknown or has ended", closeCode: closeUnknown}
	errNotCreator = &apiError{status: http.StatusForbidden, code: "not_creator",
		text: "only who opened the room may do this"}
	// errRoomDeleted is why the members of a deleted room are out.
	errRoomDeleted = errors.New("the room was deleted")
)

// newRoomCode returns a random code; its alphabet has a power of two of letters.
func newRoomCode() string {
	var b [roomCodeLength]byte
	rand.Read(b[:]) // never fails
	for i := range b {
		b[i] = roomCodeAlphabet[b[i]%byte(len(roomCodeAlphabet))]
	}
	return string(b[:])
}

// parseRoomCode returns a code as rooms have it; ok is false if none has such.
func parseRoomCode(text string) (code string, ok bool) {
	if len(text) != roomCodeLength {
		return "", false
	}
	code = strings.ToUpper(text)
	return code, strings.Trim(code, roomCodeAlphabet) == ""
}

// newSecret returns a secret of 128 bits for a URL or a header.
func newSecret() string {
	var b [16]byte
	rand.Read(b[:]) // never fails
	return base64.RawURLEncoding.EncodeToString(b[:])
}

// createRoom is POST /api/rooms.
func (s *server) createRoom(w http.ResponseWriter, r *http.Request, c caller) error {
	room := roomMeta{Owner: c.network, Created: time.Now(), Max: usualPlayers}
	token := ""
	if s.cfg.rooms == "jwt" {
		var err error
		if room.Creator, err = s.authenticate(r); err != nil {
			return err
		}
	} else {
		token = newSecret()
		room.Token = sha256.Sum256([]byte(token))
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return err
	}
	ttl, err := readTTL(body, s.cfg.roomMaxTTL)
	if err != nil {
		return err
	}
	set, password, err := readChange(body)
	if err != nil {
		return err
	}
	if s.draining.Load() {
		return errDraining
	}
	m, err := s.openRoom(r.Context(), c, set.of(room), ttl, password)
	if err != nil {
		return err
	}
	s.writeJSON(w, http.StatusCreated, struct {
		RoomID     string `json:"roomId"`
		Code       string `json:"code"`
		ExpiresAt  string `json:"expiresAt"`
		OwnerToken string `json:"ownerToken,omitempty"`
	}{m.ID.String(), m.Room.Code, timestamp(m.Expires), token})
	return nil
}

// openRoom opens a room under a code that no other has. With a password it is
// closed to all until that is hashed, and the code told: a call that is refused,
// for want of a quota or of space, costs no hash.
func (s *server) openRoom(ctx context.Context, c caller, room roomMeta, ttl time.Duration, password *string) (m meta, err error) {
	secret := password != nil && *password != ""
	if secret {
		room.Password = unknownPassword()
	}
	m = meta{ID: uuid.New(), Expires: room.Created.Add(ttl)}
	err = errTaken
	for try := 0; try < roomCodeTries && errors.Is(err, errTaken); try++ {
		room.Code = newRoomCode()
		open := room
		m.Room = &open
		err = s.hub.Open(ctx, m)
	}
	if err != nil || !secret {
		return m, err
	}
	hash, err := s.hashPassword(ctx, c, *password)
	if err == nil {
		_, _, err = s.hub.Update(ctx, m.ID, change{Password: &hash})
	}
	if err != nil { // otherwise it would end as all do that nobody comes to
		s.hub.End(context.WithoutCancel(ctx), m.ID, errRoomDeleted)
	}
	return m, err
}

// hashPassword returns what to keep of a room's password; none for "". Each
// address may make the server hash only so many.
func (s *server) hashPassword(ctx context.Context, c caller, password string) (passwordHash, error) {
	if password == "" {
		return passwordHash{}, nil
	}
	if err := s.limitRate(s.limits.hashes, c, routeRooms); err != nil {
		return passwordHash{}, err
	}
	return s.passwords.hash(ctx, password)
}

// readChange reads what a caller wants of a room, to open or to change it, but for
// the hash of the password.
func readChange(o object) (c change, password *string, err error) {
	if err := readField(o, "maxPlayers", &c.Max); err != nil || c.Max != nil && (*c.Max < minPlayers || *c.Max > maxPlayers) {
		return c, nil, badRequest("bad_max_players", fmt.Sprintf("maxPlayers must be a whole number from %d to %d", minPlayers, maxPlayers))
	}
	if err := readField(o, "locked", &c.Locked); err != nil {
		return c, nil, badRequest("bad_locked", "locked must be true or false")
	}
	if err := readField(o, "password", &password); err != nil || password != nil && len(*password) > maxPassword {
		return c, nil, badRequest("bad_password", fmt.Sprintf("password must be a string of at most %d bytes", maxPassword))
	}
	return c, password, nil
}

// readField reads one field of a request; absent and null leave *v nil.
func readField[T any](o object, name string, v **T) error {
	raw := o.get(name)
	if raw == nil {
		return nil
	}
	return json.Unmarshal(raw, v)
}

// findRoom returns the ID of the room that a path names by ID or code. An
// unknown code is a wrong guess; an ID is not to be guessed.
func (s *server) findRoom(ctx context.Context, c caller, name string) (sessionID, error) {
	if id, err := parseAppID(name); err == nil {
		return id, nil
	}
	done, err := s.beginGuess(ctx, c, "room "+strings.ToUpper(name))
	if err != nil {
		return sessionID{}, err
	}
	id, err := sessionID{}, errGone
	if code, ok := parseRoomCode(name); ok {
		id, err = s.hub.Find(ctx, code)
	}
	done(errors.Is(err, errGone))
	return id, err
}

// roomOf returns the room that a request names.
func (s *server) roomOf(r *http.Request, c caller) (m meta, taken int, err error) {
	id, err := s.findRoom(r.Context(), c, r.PathValue("room"))
	if err == nil {
		m, taken, err = s.hub.Get(r.Context(), id)
	}
	if errors.Is(err, errGone) || err == nil && m.Room == nil {
		err = errRoomNotFound
	}
	return m, taken, err
}

// ownRoom returns the room that a request names, if the caller opened it.
func (s *server) ownRoom(r *http.Request, c caller) (meta, error) {
	token, err := bearerToken(r)
	if err != nil {
		return meta{}, err
	}
	user := ""
	if s.cfg.rooms == "jwt" {
		if user, err = s.verifier.verify(r.Context(), token); err != nil {
			return meta{}, err
		}
	}
	m, _, err := s.roomOf(r, c)
	if err != nil {
		return m, err
	}
	hash := sha256.Sum256([]byte(token))
	if user != "" && user == m.Room.Creator || subtle.ConstantTimeCompare(hash[:], m.Room.Token[:]) == 1 {
		return m, nil
	}
	return m, errNotCreator
}

// getRoom is GET /api/rooms/{idOrCode}.
func (s *server) getRoom(w http.ResponseWriter, r *http.Request, c caller) error {
	m, taken, err := s.roomOf(r, c)
	if err != nil {
		return err
	}
	s.writeRoom(w, m, taken)
	return nil
}

// changeRoom is PATCH /api/rooms/{id}.
func (s *server) changeRoom(w http.ResponseWriter, r *http.Request, c caller) error {
	m, err := s.ownRoom(r, c)
	if err != nil {
		return err
	}
	body, err := s.readObject(w, r)
	if err != nil {
		return err
	}
	set, password, err := readChange(body)
	if err != nil {
		return err
	}
	if password != nil {
		hash, err := s.hashPassword(r.Context(), c, *password)
		if err != nil {
			return err
		}
		set.Password = &hash
	}
	m, taken, err := s.hub.Update(r.Context(), m.ID, set)
	if errors.Is(err, errGone) {
		return errRoomNotFound
	} else if err != nil {
		return err
	}
	s.writeRoom(w, m, taken)
	return nil
}

// deleteRoom is DELETE /api/rooms/{id}.
func (s *server) deleteRoom(w http.ResponseWriter, r *http.Request, c caller) error {
	m, err := s.ownRoom(r, c)
	if err != nil {
		return err
	}
	if err := s.hub.End(r.Context(), m.ID, errRoomDeleted); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, struct {
		Message string `json:"message"`
	}{"Room deleted"})
	return nil
}

func (s *server) writeRoom(w http.ResponseWriter, m meta, taken int) {
	s.writeJSON(w, http.StatusOK, struct {
		ID          string `json:"id"`
		Code        string `json:"code"`
		CreatorID   string `json:"creatorId"`
		CreatedAt   string `json:"createdAt"`
		ExpiresAt   string `json:"expiresAt"`
		MaxPlayers  int    `json:"maxPlayers"`
		PlayerCount int    `json:"playerCount"`
		HasPassword bool   `json:"hasPassword"`
		Locked      bool   `json:"locked"`
	}{m.ID.String(), m.Room.Code, m.Room.Creator, timestamp(m.Room.Created), timestamp(m.Expires),
		m.Room.Max, taken, m.Room.Password != (passwordHash{}), m.Room.Locked})
}

// A roomSeat is what a client knows of its seat in a room.
type roomSeat struct {
	id     string // of the room
	self   member
	secret string // to resume with
}

// serveSignal is GET /ws/signal/{idOrCode}.
func (s *server) serveSignal(w http.ResponseWriter, r *http.Request, from caller) error {
	query := r.URL.RawQuery
	displayName, err := queryValue(query, "displayName")
	if err != nil {
		return badRequest("bad_display_name", err.Error())
	} else if !validDisplayName(displayName) {
		return badRequest("bad_display_name",
			fmt.Sprintf("displayName must have at most %d characters, and no control characters", maxDisplayName))
	}
	password, err := queryValue(query, "password")
	if err != nil {
		return badRequest("bad_password", err.Error())
	}
	resume, err := queryValue(query, "resume")
	if err != nil {
		return badRequest("bad_resume", err.Error())
	}
	c := &client{room: &roomSeat{secret: newSecret()}}
	join := joinRequest{room: true, name: uuid.NewString(), claim: sha256.Sum256([]byte(c.room.secret)), displayName: displayName}
	if resume != "" {
		join.resume = sha256.Sum256([]byte(resume))
	}
	return s.connect(w, r, from, routeSignal, c, func() (seat, view, error) {
		id, err := s.findRoom(r.Context(), from, r.PathValue("room"))
		if err != nil {
			return nil, view{}, err
		}
		join.v = c.version()
		c.session, c.room.id = id, id.String()
		seat, v, err := s.joinRoom(r.Context(), from, id, join, password, c.notify)
		if err == nil {
			c.room.self = v.room.self
			if v.resumed != resumedNot {
				c.room.secret = resume
			}
		}
		return seat, v, err
	})
}

// joinRoom takes a seat. The password only matters where the room asks for it,
// and then it is a guess.
func (s *server) joinRoom(ctx context.Context, from caller, id sessionID, join joinRequest, password string, notify func(error)) (seat, view, error) {
	seat, v, err := s.hub.Join(ctx, id, join, notify)
	if !errors.Is(err, errWrongPassword) || password == "" {
		return seat, v, err
	}
	if join.password, err = s.guessPassword(ctx, from, id, password); err != nil {
		return nil, view{}, err
	}
	return s.hub.Join(ctx, id, join, notify)
}

// guessPassword returns the hash of the room's password, if password is it. It
// does what is cheap first: a room without a seat for who knows the password, and
// a guess that is known to be wrong, cost no hash.
func (s *server) guessPassword(ctx context.Context, from caller, id sessionID, password string) (passwordHash, error) {
	m, taken, err := s.hub.Get(ctx, id)
	if err != nil || m.Room.Password == (passwordHash{}) { // removed just now
		return passwordHash{}, err
	}
	hash := m.Room.Password
	if err := m.Room.admit(joinRequest{password: hash}, taken); err != nil {
		return passwordHash{}, err
	}
	guess := fmt.Sprintf("password %x %s", hash.salt, password) // another salt, another password
	done, err := s.beginGuess(ctx, from, guess)
	if err != nil {
		return passwordHash{}, err
	}
	if s.limits.guesses.knownWrong(from.network, guess) {
		done(true)
		return passwordHash{}, errWrongPassword
	}
	if err := s.limitRate(s.limits.hashes, from, routeSignal); err != nil {
		done(false)
		return passwordHash{}, err
	}
	matches, err := s.passwords.matches(ctx, hash, password)
	done(err == nil && !matches)
	if err == nil && !matches {
		err = errWrongPassword
	}
	return hash, err
}

// validDisplayName reports whether others may be shown the name.
func validDisplayName(name string) bool {
	return utf8.ValidString(name) && utf8.RuneCountInString(name) <= maxDisplayName && strings.IndexFunc(name, unicode.IsControl) < 0
}

// greetingOfRoom returns the message that tells the client of a room how things
// are.
func (c *client) greetingOfRoom(v view) []byte {
	join := appendRoomWelcome(nil, c.room.id, v.room, c.room.secret, c.srv.ice.servers(c.session, c.network, c.host))
	return c.appendFrame(nil, typeJoin, join)
}

// relayInRoom passes a frame's payload on, to one or to all others. It owns buf,
// in which the frame lies.
func (c *client) relayInRoom(m message, buf *buffer) (receipt, error) {
	defer buf.free()
	to := ""
	if m.raw.to != nil && string(m.raw.to) != "null" {
		name, ok := unquote(m.raw.to)
		if !ok {
			return receipt{}, badFrame(`"to" must be a peer's ID`)
		}
		to = string(name)
	}
	if m.raw.payload == nil {
		return receipt{}, badFrame(`the frame needs a "payload"`)
	}
	data := make([]byte, 0, len(m.raw.payload)+maxSignalHead)
	data = appendSignal(data, m.typ, c.room.self.id, to, c.room.id, m.raw.payload)
	r, err := c.seat.Post(context.Background(), to, frame{typ: m.typ, data: data}, c.buffered())
	if to == "" && (errors.Is(err, errPeerAbsent) || errors.Is(err, errOverCapacity)) {
		err = errNotEveryone
	}
	return r, err
}

// errNotEveryone answers a frame for everyone that somebody could not take.
var errNotEveryone = &frameError{"peer_absent", "as much as may wait for a member who is away is waiting; the others have the frame"}

// appendRoomPresence tells the client of e, which is in a room.
func (c *client) appendRoomPresence(dst []byte, e event) []byte {
	switch e.kind {
	case eventJoined:
		return c.appendFrame(dst, typeJoin, appendJoin(nil, c.room.id, e.room.member))
	case eventLeft:
		return c.appendFrame(dst, typeLeave, appendLeave(nil, c.room.id, e.room))
	}
	return dst
}

// A passwordHash is what is kept of a room's password; zero is none.
type passwordHash struct {
	salt [16]byte
	key  [32]byte
}

// Argon2id, RFC 9106. The memory is less than its section 4 recommends, because
// every guess of a stranger costs the server that much.
const (
	argonPasses  = 2
	argonKiB     = 8 << 10
	argonThreads = 1
)

// hashesPerMinute bounds what one address can make the server hash; an IPv6 /48
// siteShare times that. Two a second are a fortieth of a processor.
const hashesPerMinute = 120

// passwords hashes passwords, only so many at once as there are processors:
// the rest waits its turn, and 8 MiB for each of them.
type passwords struct {
	turns chan struct{}
}

func newPasswords() *passwords {
	return &passwords{turns: make(chan struct{}, runtime.GOMAXPROCS(0))}
}

// unknownPassword returns a hash that no password has.
func unknownPassword() (h passwordHash) {
	rand.Read(h.salt[:]) // never fails
	rand.Read(h.key[:])
	return h
}

// hash returns what to keep of a password. It fails when ctx is done first.
func (p *passwords) hash(ctx context.Context, password string) (passwordHash, error) {
	var h passwordHash
	rand.Read(h.salt[:]) // never fails
	err := p.derive(ctx, &h, password)
	return h, err
}

// matches reports whether password is the one h is kept of. It fails when ctx
// is done first.
func (p *passwords) matches(ctx context.Context, h passwordHash, password string) (bool, error) {
	guess := passwordHash{salt: h.salt}
	if err := p.derive(ctx, &guess, password); err != nil {
		return false, err
	}
	return subtle.ConstantTimeCompare(guess.key[:], h.key[:]) == 1, nil
}

// derive sets h.key to that of password and h.salt.
func (p *passwords) derive(ctx context.Context, h *passwordHash, password string) error {
	select {
	case p.turns <- struct{}{}:
		defer func() { <-p.turns }()
	case <-ctx.Done():
		return ctx.Err()
	}
	copy(h.key[:], argon2.IDKey([]byte(password), h.salt[:], argonPasses, argonKiB, argonThreads, uint32(len(h.key))))
	return nil
}

// --- Rooms of the hub in memory.

// roomCodes says which room has which code.
type roomCodes struct {
	mu    sync.Mutex           // taken with a shard's and a session's lock held, and no other after it
	rooms map[string]sessionID // guarded by mu
}

// add reports whether the code was free, and is now the room's.
func (c *roomCodes) add(code string, id sessionID) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, taken := c.rooms[code]; taken {
		return false
	}
	c.rooms[code] = id
	return true
}

func (c *roomCodes) remove(code string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.rooms, code)
}

func (c *roomCodes) find(code string) (id sessionID, ok bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	id, ok = c.rooms[code]
	return id, ok
}

// joinRoom is the part of memoryHub.join for a room, with mu held.
func (s *memorySession) joinRoom(r joinRequest, m *memorySeat, now time.Time) (v view, wake nudges, err error) {
	slot := s.claimed(r.resume)
	if slot != nil {
		v.resumed, wake, err = slot.resume(s.hub, now)
	} else {
		err = s.room.admit(r, len(s.seats))
	}
	if err != nil {
		return v, wake, err
	}
	if slot == nil {
		slot = &memorySlot{name: r.name, displayName: r.displayName, claim: r.claim, lastSeq: s.firstSeq}
		s.seats = append(s.seats, slot)
		wake = s.announce(slot, event{kind: eventJoined, room: s.event(slot)})
	}
	m.session, m.slot = s, slot
	slot.holder, slot.v = m, r.v
	s.met(now)
	v.mail = len(slot.mail) > 0
	v.room = s.view(slot)
	return v, wake, nil
}

// claimed returns the slot that is held, or reserved, with this claim, or nil.
func (s *memorySession) claimed(c claim) *memorySlot {
	for _, slot := range s.seats {
		if c != (claim{}) && slot.claim == c {
			return slot
		}
	}
	return nil
}

// admit returns why a newcomer may not take a seat of a room where so many are
// taken.
func (room *roomMeta) admit(r joinRequest, taken int) error {
	switch {
	case room.Password != (passwordHash{}) && room.Password != r.password:
		return errWrongPassword
	case room.Locked:
		return errLocked
	case taken >= room.Max:
		return errRoomFull
	}
	return nil
}

func (s *memorySlot) member() member { return member{id: s.name, displayName: s.displayName} }

// host returns the longest-present member, or "".
func (s *memorySession) host() string {
	if len(s.seats) == 0 {
		return ""
	}
	return s.seats[0].name
}

func (s *memorySession) event(slot *memorySlot) *roomEvent {
	return &roomEvent{member: slot.member(), host: s.host()}
}

// view returns what slot's holder sees of the room.
func (s *memorySession) view(slot *memorySlot) *roomView {
	v := &roomView{self: slot.member(), host: s.host()}
	for _, other := range s.seats {
		if other != slot {
			v.members = append(v.members, other.member())
		}
	}
	return v
}

// member returns the slot called name, unless that is not's.
func (s *memorySession) member(name string, not *memorySlot) *memorySlot {
	for _, slot := range s.seats {
		if slot.name == name && slot != not {
			return slot
		}
	}
	return nil
}

// postAll does the work of Post for everyone else in a room, with mu held.
func (m *memorySeat) postAll(f frame) (wake nudges, err error) {
	f.keep() // several will hold the same bytes
	for _, slot := range m.session.seats {
		if slot == m.slot {
			continue
		}
		_, n, refused := m.post(slot, f)
		if refused != nil {
			err = refused
			continue
		}
		wake = append(wake, n)
	}
	return wake, err
}

// putOut takes the holder, who reads too slowly, out of a slot, and keeps it
// for their return. The caller holds mu, and tells them.
func (s *memorySession) putOut(slot *memorySlot) {
	slot.vacate(s.hub)
	s.lastLeft = time.Now()
	s.reserve(slot)
}

// remove takes a free slot out of the room, with mu held, and returns whom to
// tell.
func (s *memorySession) remove(slot *memorySlot) nudges {
	slot.empty(s.hub, dropPeerLeft)
	s.seats = slices.DeleteFunc(s.seats, func(other *memorySlot) bool { return other == slot })
	return s.announce(slot, event{kind: eventLeft, room: s.event(slot)})
}
