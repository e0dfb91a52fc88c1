package main

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// A hub holds sessions: who sits where, and which frames wait for whom. It
// holds mailboxes, never sockets: a connection takes a seat and gives the hub
// one thing, a notify function. Relay, mail and presence are one act: append a
// frame to a seat's mailbox, then notify the seat, whose connection takes what
// is waiting and writes it. No lock of a hub is ever held over I/O.
//
// docs/hub.md states what each method guarantees, and how Redis does it.
type hub interface {
	// Open creates a session: a pair that lives at least until m.Expires, or a
	// room that lives at most until then.
	// Errors: errTaken (the ID, or the room's code), errCapacity, errTooMany.
	Open(ctx context.Context, m meta) error
	// Find returns the live room that has this code. Error: errGone.
	Find(ctx context.Context, code string) (sessionID, error)
	// Get returns what is known of a live session, and how many seats of it are
	// taken, by someone who is connected or away. Error: errGone.
	Get(ctx context.Context, id sessionID) (m meta, taken int, err error)
	// Update changes a live room, all of it at once, and returns it as Get does.
	// Nobody has to leave for it. Error: errGone.
	Update(ctx context.Context, id sessionID, c change) (m meta, taken int, err error)
	// End ends a session at once; whoever is connected is notified with why.
	// Ending a session that is not there is no error.
	End(ctx context.Context, id sessionID, why error) error
	// Join takes a seat. The view is the roster at that moment: presence frames
	// carry every later change and no earlier one. The hub calls notify without
	// any lock held, from any goroutine, also before Join has returned: nil
	// means "look, by Take", an error means "you are out, and why" and is final.
	// Errors: errGone, errTakeovers; of a pair errBusy, errCapacity, errTooMany;
	// of a room errWrongPassword, errLocked, errRoomFull.
	Join(ctx context.Context, id sessionID, r joinRequest, notify func(error)) (seat, view, error)
	// Tell puts a notice of the server itself before all who are connected.
	Tell(ctx context.Context, id sessionID, e event) error
	// Ready reports why the hub cannot serve, if it cannot.
	Ready(ctx context.Context) error
	// Run does the hub's background work until ctx is done.
	Run(ctx context.Context) error
}

// A seat is one connection's hold on a named seat of a session. Once another
// connection has taken the seat over, or the session has ended, every method
// answers errReplaced or errGone, so that nothing is accepted from the old
// connection. Take is called by one goroutine at a time, as are Post and
// Flush; otherwise all methods may be called concurrently.
type seat interface {
	// Post puts f in the mailbox of the seat called to, or, where that is empty,
	// in that of the other seat of a pair, a relay frame in a room in those of
	// all others, and owns f from then on. Frames of one kind from
	// one seat arrive in the order they were posted. What goes to several is
	// stored for each who can take it; an error is that of one who cannot. In a
	// room, a connected seat that then has too much waiting is put out with
	// errSlow and stays reserved.
	// With hold the receiver need not be notified before the next Post without
	// hold, or Flush, which the caller promises to call soon.
	// Errors: errNoPeer, errPeerAbsent, errMailFull, errOverCapacity.
	Post(ctx context.Context, to string, f frame, hold bool) (receipt, error)
	// Flush notifies whoever held posts left unnotified.
	Flush(ctx context.Context)
	// Take appends to buf what waits for this seat, oldest first, up to its
	// capacity and about budget bytes: relay and presence frames leave the
	// mailbox, mail above the seq after is copied and stays until it is
	// acknowledged. With noMail as after there is no mail in the answer. more
	// says that there is more to take now; what comes later is notified.
	Take(ctx context.Context, after uint64, budget int, buf []frame) (taken []frame, more bool, err error)
	// Held reports whether this seat of a pair should not post relay frames for
	// now, because the other has too much waiting. When that changes it is
	// notified. In a room nobody waits for a slow reader.
	Held(ctx context.Context) (bool, error)
	// Ack trims this seat's mail up to the seq upTo. Error: errBeyond, when so
	// high a seq has not been assigned yet.
	Ack(ctx context.Context, upTo uint64) error
	// Report records how the peers' own connection went. first is true for the
	// first report of its kind in the session; since is the time since both
	// seats were first connected, or negative if they never were.
	Report(ctx context.Context, o outcome) (since time.Duration, first bool, err error)
	// Leave gives the seat up, for good or, if it is claimed, as one who may
	// be back: then it stays reserved.
	Leave(ctx context.Context, forGood bool) error
}

// noMail, as the after of Take, leaves all mail where it is.
const noMail = ^uint64(0)

// A sessionID is what clients call appID. As an array it keeps no request
// alive, which a substring of its URL would.
type sessionID = uuid.UUID

// The errors of a hub. Those of Join and Post are answers to a client, the
// others also reasons given to notify.
var (
	errTaken         = errors.New("a session of this ID, or a room of this code, is open already")
	errTooMany       = errors.New("this address holds as many sessions as it may")
	errCapacity      = errors.New("the server holds as many sessions as it may")
	errGone          = errors.New("the session is unknown or has expired")
	errBusy          = errors.New("the seat is taken")
	errWrongPassword = errors.New("the room asks for its password, and this is not it")
	errLocked        = errors.New("the room is locked")
	errRoomFull      = errors.New("the room is full")
	errTakeovers     = errors.New("the seat has been taken over too often")
	errReplaced      = errors.New("another connection has taken the seat over")
	errSlow          = errors.New("the connection is too slow a reader")
	errNoPeer        = errors.New("there is no such peer in the session")
	errPeerAbsent    = errors.New("the other seat is not connected, and as much as may wait for it is waiting")
	errMailFull      = errors.New("the mailbox is full until its owner acknowledges what is in it")
	errOverCapacity  = errors.New("the server holds as many bytes for absent peers as it may")
	errBeyond        = errors.New("so high a seq has not been assigned")
)

// meta is what is known of a session besides its seats.
type meta struct {
	ID sessionID
	// Expires is, of a pair, when its code expires; until then it lives without
	// anyone in it. Zero for a pair without a code. Of a room it is when that
	// ends, whoever is in it.
	Expires time.Time
	// Room is what makes it a room; nil for a pair. It is never changed, only
	// replaced.
	Room *roomMeta
}

// roomMeta is what is known of a room besides its seats.
type roomMeta struct {
	Code    string  // live rooms have different ones
	Creator string  // who opened it, as a verifier knows them; or empty
	Token   claim   // what else may change and delete the room; zero for nothing
	Owner   network // to whom it counts
	Created time.Time

	Max      int // seats
	Locked   bool
	Password passwordHash // zero for none
}

// A change is what Update changes of a room; nil leaves it as it is.
type change struct {
	Max      *int
	Locked   *bool
	Password *passwordHash
}

// of returns the room with the change made.
func (c change) of(room roomMeta) roomMeta {
	if c.Max != nil {
		room.Max = *c.Max
	}
	if c.Locked != nil {
		room.Locked = *c.Locked
	}
	if c.Password != nil {
		room.Password = *c.Password
	}
	return room
}

// A claim is the hash of the secret (sid) with which a client claims its seat.
// The zero claim claims nothing.
type claim [32]byte

// A joinRequest asks for a seat. A pair has the seats A and B, and one that is
// taken is only for whoever has its claim. A room has as many as may be, each
// made for a newcomer with a name and a claim of its own.
type joinRequest struct {
	name  string // A or B; in a room what a newcomer is to be called
	claim claim
	v     int // version of the parley protocol the client speaks, 0 for none

	// Of a pair.
	create bool    // create the session if there is none
	owner  network // whose session it is then

	// Of a room.
	room        bool
	resume      claim        // of the seat to come back to; password and lock do not matter then
	displayName string       // of a newcomer
	password    passwordHash // the room's that the client has shown to know, or zero
}

// presence says whether someone is in a seat.
type presence uint8

const (
	absent  presence = iota
	present          // connected
	away             // not connected, but the seat is reserved
)

func (p presence) String() string { return [...]string{"absent", "present", "away"}[p] }

// A view is what a connection sees of the session as it takes its seat.
type view struct {
	peer    presence // of the other seat
	peerV   int
	resumed resumption
	mail    bool   // mail is waiting
	held    bool   // as of seat.Held
	lastID  uint64 // the highest id of the mail that this claim has stored, or 0
	room    *roomView
}

// A roomView is what a connection sees of a room as it takes its seat.
type roomView struct {
	self    member
	members []member // the others, connected or away, in the order they came
	host    string
}

// A member is who holds a seat of a room.
type member struct {
	id          string // the seat's name
	displayName string
}

// A resumption says how a connection came by a seat.
type resumption uint8

const (
	resumedNot      resumption = iota // the seat was free
	resumedBack                       // it was reserved for the same claim
	resumedTakeover                   // another connection with the same claim held it
)

// A frameKind says what a frame in a mailbox is.
type frameKind uint8

const (
	kindRelay    frameKind = iota // a client's own frame, to pass on byte for byte
	kindMail                      // data is the payload of a send frame
	kindPresence                  // event says what changed
)

// A frame is one thing that waits in a mailbox.
type frame struct {
	kind   frameKind
	typ    frameType // of a relayed frame
	binary bool      // opcode of a relayed frame
	event  event
	seq    uint64 // of mail, assigned by Post
	id     uint64 // of mail, the sender's own number for it; 0 for none
	from   string // the seat that posted it
	data   []byte
	buf    *buffer // what data lies in, if that is pooled
}

// size is what a frame counts for in the bounds of mailboxes, in bytes.
func (f *frame) size() int {
	if f.kind == kindPresence {
		return presenceSize
	}
	return len(f.data)
}

// presenceSize stands for the size of a presence frame, which has no data.
const presenceSize = 64

// release gives the frame's buffer back. Whoever owns the frame calls it, once.
func (f *frame) release() {
	if f.buf != nil {
		f.buf.free()
		f.buf = nil
	}
	f.data = nil
}

// keep moves the data out of its pooled buffer, because the frame may wait for
// long.
func (f *frame) keep() {
	if f.buf != nil {
		data := append(make([]byte, 0, len(f.data)), f.data...)
		f.release()
		f.data = data
	}
}

// trim moves the data out of its pooled buffer if that is more than twice as
// large: the frame waits with many others. Where keep copied each, that was most
// of the garbage of a burst.
func (f *frame) trim() {
	if f.buf != nil && len(f.buf.b) > 2*len(f.data) {
		f.keep()
	}
}

// An eventKind is a change that presence frames tell of.
type eventKind uint8

const (
	eventJoined    eventKind = iota // the other seat has a new connection; a room has a new member
	eventAway                       // the other seat of a pair is reserved for one who dropped
	eventLeft                       // the other seat has become free; a member has left the room
	eventContested                  // someone redeemed this session's code again
)

// An event is one change of presence, or notice of the server.
type event struct {
	kind    eventKind
	resumed bool // joined: by the claim that held the seat before
	peerV   int  // joined: protocol version of the newcomer
	room    *roomEvent
}

// A roomEvent is what rooms tell of a change besides: who came or left, and who
// is the host since.
type roomEvent struct {
	member
	host string
}

// A receipt says what became of a posted frame.
type receipt struct {
	seq  uint64 // of mail
	held bool   // the receiver has so much waiting that the sender should pause
}

// An outcome is how the peers' own connection went.
type outcome uint8

const (
	outcomeConnected outcome = 1 << iota
	outcomeFailed
)

// A dropReason says why frames were not delivered; the label of a metric.
type dropReason uint8

const (
	dropPeerAbsent   dropReason = iota // refused: enough waits for an absent seat
	dropMailFull                       // refused: the mailbox is full
	dropOverCapacity                   // refused: MAX_QUEUED_BYTES
	dropStale                          // its sender left before it was taken
	dropExpired                        // its session ended before it was taken
	dropPeerLeft                       // its receiver left before taking it
	numDropReasons
)

func (r dropReason) String() string {
	return [numDropReasons]string{"peer_absent", "mailbox_full", "over_capacity", "stale", "session_expired", "peer_left"}[r]
}

// A budget counts all bytes that wait in the process, in mailboxes and in
// half-received messages, against one limit; 0 is none.
type budget struct {
	limit int64
	used  atomic.Int64
}

// add counts n bytes, negative when they no longer wait.
func (b *budget) add(n int) { b.used.Add(int64(n)) }

// reserve counts n bytes if that stays within the limit.
func (b *budget) reserve(n int) bool {
	for used := b.used.Load(); b.limit == 0 || used+int64(n) <= b.limit; used = b.used.Load() {
		if b.used.CompareAndSwap(used, used+int64(n)) {
			return true
		}
	}
	return false
}

// spare reports whether n more bytes would stay within the limit.
func (b *budget) spare(n int) bool {
	return b.limit == 0 || b.used.Load()+int64(n) <= b.limit
}
