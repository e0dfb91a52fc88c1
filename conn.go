package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/coder/websocket"
)

// What a connection costs, and how it is kept small:
//
//   - Reading: one goroutine waits for a byte with an empty stack and no buffer
//     (wait), borrows one from a pool when there is something to read, and
//     gives it back when that is read. github.com/coder/websocket reads the
//     frames.
//   - Writing: nobody waits. Whoever has something for a connection, most often
//     the goroutine that reads the other side, takes the write turn (wake) and
//     writes without blocking. Only when the socket would block does a
//     goroutine come into being, until everything is written.
//   - One timer pings, notices silence, and ends a close that the peer does not
//     answer.
//
// Frames are written by hand, RFC 6455 section 5.2, because the library locks
// and flushes for each, while one write here often carries many.

// Bounds of a connection.
const (
	messageTimeout = 30 * time.Second // from the first byte of a message to its last
	stallTimeout   = 10 * time.Second // in which the socket must take some byte
	closeGrace     = time.Second      // for the peer to answer a close frame
	answerBytes    = 64 << 10         // answers not yet written; past them nothing more is read
	takeFrames     = 32               // frames taken from the mailbox at once
)

// burstFactor is how much larger buffers are while there is more to read or write
// than fits into them: in a burst most of the time goes into system calls.
const burstFactor = 4

// connOptions are what all connections of a server share.
type connOptions struct {
	heartbeat           time.Duration
	maxMessage          int // bytes
	readSize, writeSize int // bytes of the borrowed buffers, but in a burst
	buffers             *bufferPool
	outboxes            *sync.Pool
	queued              *budget
	partial             *budget // the part of queued that is half-received messages
	metrics             *metrics
	start               time.Time // when the server started; times are counted from it
	tasks               *sync.WaitGroup
}

// A source is what a connection writes besides answers. take and appendPresence
// are called by whoever has the write turn, and must not wait.
type source interface {
	// take appends what waits to buf, up to its capacity and about budget bytes,
	// and reports whether there may be more.
	take(buf []frame, budget int) (taken []frame, more bool)
	// flush is called by the reading goroutine before it waits.
	flush()
	// appendPresence appends the messages that tell the client of e, if any.
	appendPresence(dst []byte, e event) []byte
}

// A conn is a WebSocket connection: frames in, frames out, heartbeats, close.
type conn struct {
	// static after construction
	*connOptions
	src source

	// static once started
	net net.Conn
	sys syscall.RawConn // nil where the socket cannot be polled: TLS, tests
	ws  *websocket.Conn
	br  *bufio.Reader // the library's

	// for the reading goroutine
	in        *buffer // what was read and not consumed: in.b[inFrom:inTo]
	inFrom    int
	inTo      int
	poll      func(fd uintptr) bool
	readErr   error   // of the socket, when the library's reading failed for it
	began     int64   // when the message was begun, since start
	one       [1]byte // where a byte is waited for that cannot be polled for
	once      bool    // poll does not wait
	brimful   bool    // the last read filled its buffer: there is more
	boundary  bool    // the library stands between two messages
	inMessage bool    // a message has begun and not ended
	deadline  bool    // a read deadline is set

	lastByte atomic.Int64 // when something was read, since start
	paused   atomic.Bool  // not reading, because someone is slow to
	asking   atomic.Bool  // not reading, because a hub elsewhere is slow to answer
	flooded  atomic.Bool  // there are more answers than should wait
	broken   atomic.Bool  // writing has failed; set with mu held
	turn     atomic.Int32 // the write turn: turnFree, turnTaken, turnAgain

	mu sync.Mutex
	// guarded by mu
	started  bool
	closed   closeCode
	answers  []byte // encoded frames that go ahead of the source's
	gate     chan struct{}
	timer    *time.Timer
	pingDue  int64 // when the next ping is
	pingedAt int64 // when the ping was sent that has no pong yet, or 0
	closeBy  int64 // when a close must be over
}

// The states of the write turn. A connection begins with it taken, until it is
// started.
const (
	turnTaken int32 = iota
	turnAgain       // taken, and there is something new to write
	turnFree
)

// errIdle tells that the library wants to begin a message and there is none.
var errIdle = errors.New("no message has begun")

// A hijacker gives the library a connection with buffers of its own choice: it
// keeps those that it gets, and net/http's are 4 KiB each. The answer that agrees
// to the upgrade it keeps, to go out with the first frames: one write, where
// BenchmarkJoin had two.
type hijacker struct {
	http.ResponseWriter
	c      *conn
	answer []byte
}

func (h *hijacker) WriteHeader(status int) {
	if status != http.StatusSwitchingProtocols {
		h.ResponseWriter.WriteHeader(status)
		return
	}
	var answer bytes.Buffer
	answer.WriteString("HTTP/1.1 101 Switching Protocols\r\n")
	h.Header().Write(&answer) // cannot fail
	answer.WriteString("\r\n")
	h.answer = answer.Bytes()
}

// The library's own buffers: one for a frame's header, one for a control frame.
const (
	headerBuffer  = 16
	controlBuffer = 128
)

func (h *hijacker) Hijack() (net.Conn, *bufio.ReadWriter, error) {
	nc, brw, err := http.NewResponseController(h.ResponseWriter).Hijack()
	if err != nil {
		return nil, nil, err
	}
	c := h.c
	c.net = nc
	if n := brw.Reader.Buffered(); n > 0 {
		early, _ := brw.Reader.Peek(n)
		c.in = c.buffers.get(n)
		c.inTo = copy(c.in.b, early)
	}
	if pollable, ok := nc.(syscall.Conn); ok && canPoll {
		if c.sys, err = pollable.SyscallConn(); err != nil {
			return nil, nil, err
		}
	}
	s := (*stream)(c)
	c.br = bufio.NewReaderSize(s, headerBuffer)
	return s, bufio.NewReadWriter(c.br, bufio.NewWriterSize(s, controlBuffer)), nil
}

// accept upgrades the request. subprotocol is what to agree to, or "". The answer
// to the request is for begin to write; after an error there is none.
func (c *conn) accept(w http.ResponseWriter, r *http.Request, subprotocol string) (answer []byte, err error) {
	options := websocket.AcceptOptions{
		InsecureSkipVerify: true, // the origin has been checked
		CompressionMode:    websocket.CompressionDisabled,
		OnPingReceived:     func(context.Context, []byte) bool { c.controlRead(); return true },
		OnPongReceived:     func(_ context.Context, payload []byte) { c.controlRead(); c.pong(payload) },
	}
	if subprotocol != "" {
		options.Subprotocols = []string{subprotocol}
	}
	h := hijacker{ResponseWriter: w, c: c}
	ws, err := websocket.Accept(&h, r, &options)
	if err != nil {
		if c.net != nil {
			rawConn(c.net).Close()
		}
		return nil, err
	}
	ws.SetReadLimit(int64(c.maxMessage))
	c.ws = ws
	c.poll = c.pollRead
	return h.answer, nil
}

// begin starts the connection after accept: first is written before anything
// else.
func (c *conn) begin(first []byte) {
	c.touch()
	c.mu.Lock()
	c.answers = append(first, c.answers...)
	c.started = true
	c.pingDue = c.now() + int64(c.heartbeat)
	if c.timer = time.AfterFunc(c.heartbeat, c.beat); c.closed != 0 { // while we were accepting
		c.kick()
		c.timer.Reset(closeGrace)
	}
	c.mu.Unlock()
	c.write()
}

// A stream is the connection as the library sees it.
type stream conn

func (s *stream) Read(p []byte) (int, error)  { return (*conn)(s).read(p) }
func (s *stream) Write(p []byte) (int, error) { return (*conn)(s).writeControl(p) }

// Close does nothing: the connection is closed by run, after the close frame.
func (s *stream) Close() error { return nil }

func (s *stream) LocalAddr() net.Addr                { return s.net.LocalAddr() }
func (s *stream) RemoteAddr() net.Addr               { return s.net.RemoteAddr() }
func (s *stream) SetDeadline(t time.Time) error      { return s.net.SetDeadline(t) }
func (s *stream) SetReadDeadline(t time.Time) error  { return s.net.SetReadDeadline(t) }
func (s *stream) SetWriteDeadline(t time.Time) error { return s.net.SetWriteDeadline(t) }

// now is the time since the server started, in nanoseconds.
func (o *connOptions) now() int64 { return int64(time.Since(o.start)) }

// touch notes a sign of life. None counts once nothing can be written any more:
// what the client sent before that is still read, but not for ever.
func (c *conn) touch() {
	if !c.broken.Load() {
		c.lastByte.Store(c.now())
	}
}

// --- Reading.

// buffered reports whether bytes of a next message have been read already.
func (c *conn) buffered() bool { return c.inFrom < c.inTo || c.br.Buffered() > 0 }

// wait returns when there is something to read. It runs with as little stack
// as it can, for this is where an idle connection is.
func (c *conn) wait() error {
	if c.buffered() {
		return nil
	}
	if c.sys != nil {
		if err := c.sys.Read(c.poll); err != nil {
			return err
		}
		return c.readErr
	}
	if _, err := c.net.Read(c.one[:]); err != nil {
		return err
	}
	c.in = c.buffers.get(c.readSize)
	c.in.b[0], c.inFrom, c.inTo = c.one[0], 0, 1
	c.touch()
	return nil
}

// pollRead reads what is there into a borrowed buffer, or sets readErr. It
// returns false when there is nothing yet, to be called again when there is.
func (c *conn) pollRead(fd uintptr) bool {
	size := c.readSize
	if c.brimful {
		size *= burstFactor
	}
	buf := c.buffers.get(size)
	n, err := sysRead(fd, buf.b[:size])
	c.brimful = n >= c.readSize
	if wouldBlock(err) {
		buf.free()
		c.readErr = nil
		return c.once
	}
	if n <= 0 {
		buf.free()
		if c.readErr = err; err == nil {
			c.readErr = io.EOF
		}
		return true
	}
	c.in, c.inFrom, c.inTo, c.readErr = buf, 0, n, nil
	c.touch()
	return true
}

// read gives the library bytes. Within a message it waits for them, until the
// message has taken too long.
func (c *conn) read(p []byte) (int, error) {
	if c.inFrom == c.inTo {
		if c.boundary {
			c.boundary = false
			return 0, errIdle
		}
		if c.readErr = c.waitInMessage(); c.readErr != nil {
			return 0, c.readErr
		}
	}
	n := copy(p, c.in.b[c.inFrom:c.inTo])
	c.inFrom += n
	c.boundary = false
	if c.inFrom == c.inTo {
		c.in.free()
		c.in = nil
	}
	return n, nil
}

// waitInMessage waits for the rest of a message. The deadline is only set, and
// others are only told, when there is nothing to read yet: in a burst there is.
func (c *conn) waitInMessage() error {
	if c.sys != nil && !c.deadline {
		c.once = true
		err := c.sys.Read(c.poll)
		c.once = false
		if err != nil {
			return err
		} else if c.in != nil || c.readErr != nil {
			return c.readErr
		}
	}
	c.src.flush()
	if !c.deadline {
		c.deadline = true
		c.net.SetReadDeadline(c.start.Add(time.Duration(c.began) + messageTimeout))
		if c.closing() != 0 { // whose kick we have just undone
			return os.ErrDeadlineExceeded
		}
	}
	if c.sys != nil {
		return c.wait()
	}
	buf := c.buffers.get(c.readSize)
	n, err := c.net.Read(buf.b[:c.readSize])
	if n == 0 {
		buf.free()
		return err
	}
	c.in, c.inFrom, c.inTo = buf, 0, n
	c.touch()
	return nil
}

// controlRead notes that the library has read a whole control frame. Between two
// messages that ends its deadline, and if nothing is buffered behind it, the
// library is to come back instead of waiting.
func (c *conn) controlRead() {
	if !c.inMessage {
		c.settle()
		c.began = c.lastByte.Load()
		c.boundary = c.br.Buffered() == 0
	}
}

// settle ends the deadline of a message that has been read.
func (c *conn) settle() {
	if c.deadline {
		c.deadline = false
		c.net.SetReadDeadline(time.Time{})
		if c.closing() != 0 {
			c.kick()
		}
	}
}

// readMessage reads one message into a borrowed buffer, which grows with what
// arrives. Control frames are answered on the way; when nothing but those came,
// the buffer is nil.
func (c *conn) readMessage() (buf *buffer, data []byte, binary bool, err error) {
	c.began = c.lastByte.Load()
	typ, r, err := c.ws.Reader(context.Background())
	if errors.Is(err, errIdle) {
		return nil, nil, false, nil
	} else if err != nil {
		return nil, nil, false, err
	}
	c.inMessage = true
	defer func() { c.inMessage = false }()
	buf = c.buffers.get(firstBuffer)
	n, counted := 0, 0
	defer func() { c.partial.add(-counted); c.queued.add(-counted) }()
	for {
		k, err := r.Read(buf.b[n:])
		n += k
		if err == io.EOF {
			return buf, buf.b[:n], typ == websocket.MessageBinary, nil
		} else if err != nil {
			buf.free()
			return nil, nil, false, err
		}
		if n == len(buf.b) {
			if err := c.admit(2*n, counted); err != nil {
				buf.free()
				return nil, nil, false, err
			}
			counted = 2 * n
			more := c.buffers.get(2 * n)
			copy(more.b, buf.b)
			buf.free()
			buf = more
		}
	}
}

// errNoRoom ends a connection whose half-received message found no room.
var errNoRoom = errors.New("at_capacity")

// freeBuffer is how large a half-received message may grow whatever else waits,
// so that pairs with ordinary frames go on.
const freeBuffer = 16 << 10

// roomPoll is how often a message that waits for room looks again.
const roomPoll = 500 * time.Millisecond

// admit counts that a half-received message has grown to size bytes, of which
// counted are counted. Above freeBuffer it waits until there is room beside all
// other messages, as long as a message may take.
func (c *conn) admit(size, counted int) error {
	if size <= freeBuffer {
		c.partial.add(size - counted)
	} else if err := c.awaitRoom(size - counted); err != nil {
		return err
	}
	c.queued.add(size - counted)
	return nil
}

func (c *conn) awaitRoom(n int) error {
	if c.partial.reserve(n) {
		return nil
	}
	c.src.flush()
	c.paused.Store(true)
	defer c.paused.Store(false)
	defer c.touch()
	for deadline := c.began + int64(messageTimeout); !c.partial.reserve(n); time.Sleep(roomPoll) {
		if c.closing() != 0 || c.now() >= deadline {
			return errNoRoom
		}
	}
	return nil
}

// firstBuffer is the size of the buffer into which a message is read first.
const firstBuffer = 1 << minClass

// pause waits as long as held says, or too many answers are unread. held is
// asked again whenever the gate opens. Time spent here is no silence.
func (c *conn) pause(held func() bool) {
	for {
		c.mu.Lock()
		if c.closed != 0 || c.broken.Load() {
			c.mu.Unlock()
			break
		}
		gate, full := make(chan struct{}), len(c.answers) > answerBytes
		c.gate = gate
		c.mu.Unlock()
		c.paused.Store(true) // before held is asked: who changes the answer then opens the gate
		if !full && !held() || c.broken.Load() {
			break
		}
		<-gate
	}
	c.touch()
	c.paused.Store(false)
}

// openGate makes a paused reader look again.
func (c *conn) openGate() {
	if c.paused.Load() {
		c.mu.Lock()
		c.openGateLocked()
		c.mu.Unlock()
	}
}

func (c *conn) openGateLocked() {
	if c.gate != nil {
		close(c.gate)
		c.gate = nil
	}
}

// discard reads and drops what still comes, so that the peer can read our close
// frame: a socket closed with bytes unread resets the connection. It returns
// when the peer is done or the grace is over.
func (c *conn) discard() {
	c.net.SetReadDeadline(time.Time{})
	buf := c.in
	if buf == nil {
		buf = c.buffers.get(c.readSize)
	}
	defer buf.free()
	c.in = nil
	for {
		if _, err := c.net.Read(buf.b); err != nil {
			return
		}
	}
}

// --- Writing.

// An outbox is what the holder of the write turn works with.
type outbox struct {
	buf     []byte  // encoded messages, copied together
	frames  []frame // taken from the source; those before next are written, or in buf
	next    int
	more    bool   // the source may have more
	full    bool   // there was more than buf took
	big     []byte // data of frames[next], too large to copy: goes after buf
	tail    string // goes after big
	partial bool   // big has gone, tail has not
	rest    []byte // what of buf or big is being written

	wrote int
	err   error
	try   func(fd uintptr) bool // write once
	await func(fd uintptr) bool // write once the socket takes something
}

func newOutboxPool(size int) *sync.Pool {
	return &sync.Pool{New: func() any {
		o := &outbox{buf: make([]byte, 0, size), frames: make([]frame, 0, takeFrames), more: true}
		o.try = func(fd uintptr) bool { o.attempt(fd); return true }
		o.await = func(fd uintptr) bool { o.attempt(fd); return !wouldBlock(o.err) }
		return o
	}}
}

// attempt writes no more than is copied in some 50 µs: while it does, the thread
// can do nothing else.
func (o *outbox) attempt(fd uintptr) {
	o.wrote, o.err = sysWrite(fd, o.rest[:min(len(o.rest), 64<<10)])
}

// pop is done with the next frame.
func (o *outbox) pop() {
	o.frames[o.next].release()
	o.next++
}

// drop is done with all frames.
func (o *outbox) drop() {
	for o.next < len(o.frames) {
		o.pop()
	}
}

// reset makes the outbox ready for another connection.
func (o *outbox) reset() {
	o.drop()
	clear(o.frames)
	o.buf, o.frames, o.next = o.buf[:0], o.frames[:0], 0
	o.more, o.full, o.big, o.tail, o.partial, o.rest = true, false, nil, "", false, nil
}

// wake writes what is new, or leaves it to whoever is writing now. It never
// blocks.
func (c *conn) wake() {
	for {
		switch c.turn.Load() {
		case turnFree:
			if c.turn.CompareAndSwap(turnFree, turnTaken) {
				c.write()
				return
			}
		case turnTaken:
			if c.turn.CompareAndSwap(turnTaken, turnAgain) {
				return
			}
		case turnAgain:
			return
		}
	}
}

// write writes all there is, with the turn held; when the socket would block, or
// there is more and more, it leaves the rest to a new goroutine.
func (c *conn) write() {
	o := c.outboxes.Get().(*outbox)
	if blocked := c.writeAll(o, c.tryWrite, writeRounds); blocked {
		c.tasks.Go(func() {
			c.writeAll(o, c.awaitWrite, -1)
			c.putOutbox(o)
		})
		return
	}
	c.putOutbox(o)
}

// putOutbox gives o back, unless answers made it grow.
func (c *conn) putOutbox(o *outbox) {
	if o.reset(); cap(o.buf) <= burstFactor*c.writeSize {
		c.outboxes.Put(o)
	}
}

// writeRounds is how often a goroutine that only passes by writes what others have
// added meanwhile: it has a connection of its own to read, whose client would have
// to wait as long as those others go on.
const writeRounds = 16

// writeAll writes until there is nothing more to write, and gives the turn up,
// or until put reports that it would block, or for so many rounds. After an error
// the connection is over, and its turn stays taken.
func (c *conn) writeAll(o *outbox, put func(*outbox) (blocked bool, err error), rounds int) (blocked bool) {
	for ; ; rounds-- {
		for len(o.rest) > 0 {
			blocked, err := put(o)
			if blocked {
				return true
			}
			if errors.Is(err, os.ErrDeadlineExceeded) {
				c.abort(closeSlow)
				return false
			} else if err != nil {
				c.writeFailed()
				return false
			}
		}
		if rounds == 0 {
			return true
		}
		if c.fill(o) {
			continue
		}
		if c.turn.CompareAndSwap(turnTaken, turnFree) {
			return false
		}
		c.turn.Store(turnTaken)
		o.more = true
	}
}

// writeFailed is called when the peer is gone. What it sent before that is
// still to be read, mail and acknowledgements among it: the reading goroutine
// goes on until it finds the end itself.
func (c *conn) writeFailed() {
	c.mu.Lock()
	c.broken.Store(true)
	c.answeredLocked()
	c.openGateLocked()
	c.mu.Unlock()
}

// tryWrite writes some of o.rest, or reports that it would have to wait.
func (c *conn) tryWrite(o *outbox) (blocked bool, err error) {
	if c.sys == nil {
		return true, nil
	}
	if err := c.sys.Write(o.try); err != nil {
		return false, err
	}
	if wouldBlock(o.err) {
		return true, nil
	}
	o.rest = o.rest[o.wrote:]
	return false, o.err
}

// slowChunk is how much a socket that cannot be polled must take within
// stallTimeout.
const slowChunk = 4 << 10

// awaitWrite writes some of o.rest as soon as the socket takes it, and fails if
// it takes nothing for stallTimeout.
func (c *conn) awaitWrite(o *outbox) (blocked bool, err error) {
	c.net.SetWriteDeadline(time.Now().Add(stallTimeout))
	defer c.net.SetWriteDeadline(time.Time{})
	if c.sys == nil {
		n, err := c.net.Write(o.rest[:min(len(o.rest), slowChunk)])
		o.rest = o.rest[n:]
		return false, err
	}
	if err := c.sys.Write(o.await); err != nil {
		return false, err
	}
	o.rest = o.rest[o.wrote:]
	return false, o.err
}

// fill sets o.rest to what goes next and reports whether there is anything:
// answers first, then the source's frames, and after a close frame nothing.
func (c *conn) fill(o *outbox) bool {
	if o.big != nil {
		o.rest, o.big, o.partial = o.big, nil, true
		return true
	}
	if o.full && cap(o.buf) < burstFactor*c.writeSize {
		o.buf = make([]byte, 0, burstFactor*c.writeSize)
	}
	o.buf, o.full = o.buf[:0], false
	if o.partial {
		o.buf = append(o.buf, o.tail...)
		o.partial = false
		o.pop()
	}
	c.mu.Lock()
	o.buf = append(o.buf, c.answers...)
	c.answers = nil
	closing := c.closed != 0
	if c.flooded.Load() {
		c.flooded.Store(false)
		c.openGateLocked()
	}
	c.mu.Unlock()
	if closing {
		o.drop()
	} else {
		c.stage(o)
	}
	o.rest = o.buf
	if closing && len(o.rest) == 0 {
		c.closeWrite()
	}
	return len(o.rest) > 0
}

// stage puts frames of the source into o.buf, as many as there is room for.
func (c *conn) stage(o *outbox) {
	for {
		if o.next == len(o.frames) {
			room := cap(o.buf) - len(o.buf)
			if !o.more {
				return
			} else if room < cap(o.buf)/4 {
				o.full = true
				return
			}
			o.frames, o.more = c.src.take(o.frames[:0], room)
			if o.next = 0; len(o.frames) == 0 {
				return
			}
		}
		f := &o.frames[o.next]
		if f.kind == kindPresence {
			o.buf = c.src.appendPresence(o.buf, f.event)
			o.pop()
		} else if !c.stageMessage(o, f) {
			return
		}
	}
}

// stageMessage puts f into o.buf, or only its beginning where it is too large
// to copy. It reports whether there may be room for another.
func (c *conn) stageMessage(o *outbox, f *frame) bool {
	var scratch [maxDeliverHead]byte
	head, tail, typ := scratch[:0], "", f.typ
	if f.kind == kindMail {
		head, tail, typ = appendDeliverHead(head, f), deliverTail, typeDeliver
	}
	size := len(head) + len(f.data) + len(tail)
	fits := len(o.buf)+maxHeader+size <= cap(o.buf)
	if !fits && len(o.buf) > 0 {
		o.full = true
		return false
	}
	op := byte(opText)
	if f.binary {
		op = opBinary
	}
	o.buf = append(appendHeader(o.buf, op, size), head...)
	c.metrics.frameOut(typ, size)
	if !fits {
		o.big, o.tail = f.data, tail
		return false
	}
	o.buf = append(append(o.buf, f.data...), tail...)
	o.pop()
	return true
}

// The opcodes the server writes, RFC 6455 section 5.2.
const (
	opText   = 1
	opBinary = 2
	opClose  = 8
	opPing   = 9
)

// maxHeader is the longest header of a frame from a server, which is not masked.
const maxHeader = 10

// appendHeader appends the header of a final frame with size bytes of payload.
func appendHeader(dst []byte, op byte, size int) []byte {
	const fin = 0x80
	dst = append(dst, fin|op)
	switch {
	case size < 126:
		return append(dst, byte(size))
	case size < 1<<16:
		return binary.BigEndian.AppendUint16(append(dst, 126), uint16(size))
	default:
		return binary.BigEndian.AppendUint64(append(dst, 127), uint64(size))
	}
}

// appendText appends a whole text message.
func appendText[T string | []byte](dst []byte, text T) []byte {
	return append(appendHeader(dst, opText, len(text)), text...)
}

// answer writes a text message of the server's own, before what the source has.
func (c *conn) answer(typ frameType, text []byte) {
	c.metrics.frameOut(typ, len(text))
	c.mu.Lock()
	if c.closed == 0 {
		c.answers = appendText(c.answers, text)
		c.answeredLocked()
	}
	c.mu.Unlock()
	c.wake()
}

// answeredLocked is called when answers have been added: it notes whether there
// are now more than should wait. Where writing has failed nobody takes them any
// more, and they are dropped. The caller holds mu.
func (c *conn) answeredLocked() {
	if c.broken.Load() {
		c.answers = nil
	}
	c.flooded.Store(len(c.answers) > answerBytes)
}

// writeControl takes a control frame of the library. Pongs are answers, and
// one too many is left out, as RFC 6455 section 5.5.3 allows. Close frames are
// close's to write, which knows more of why.
func (c *conn) writeControl(p []byte) (int, error) {
	if p[0]&0x0f != opClose {
		c.mu.Lock()
		if c.closed == 0 && len(c.answers) <= answerBytes {
			c.answers = append(c.answers, p...)
			c.answeredLocked()
		}
		c.mu.Unlock()
		c.wake()
	}
	return len(p), nil
}

// --- Life and death.

// beat is the timer: it pings, drops a silent connection, and ends a close that
// the peer has not answered in time.
func (c *conn) beat() {
	now := c.now()
	c.mu.Lock()
	if c.closed != 0 {
		defer c.mu.Unlock()
		if left := c.closeBy - now; left > 0 {
			c.timer.Reset(time.Duration(left))
			return
		}
		rawConn(c.net).Close() // not aborted: perhaps the close frame is on its way
		return
	}
	silentAt := c.lastByte.Load() + int64(2*c.heartbeat)
	if c.paused.Load() || c.asking.Load() { // then silence does not count
		silentAt = now + int64(2*c.heartbeat)
	}
	if now >= silentAt {
		c.mu.Unlock()
		c.abort(closeAbnormal)
		return
	}
	due := now >= c.pingDue
	if due {
		c.pingDue, c.pingedAt = now+int64(c.heartbeat), now
		c.answers = appendHeader(c.answers, opPing, 8)
		c.answers = binary.BigEndian.AppendUint64(c.answers, uint64(now))
		c.answeredLocked()
	}
	c.timer.Reset(time.Duration(min(c.pingDue, silentAt) - now))
	c.mu.Unlock()
	if due {
		c.wake()
	}
}

// pong takes the answer to a ping.
func (c *conn) pong(payload []byte) {
	if len(payload) != 8 {
		return
	}
	at := int64(binary.BigEndian.Uint64(payload))
	c.mu.Lock()
	ours := at == c.pingedAt && at != 0
	c.pingedAt = 0
	c.mu.Unlock()
	if ours {
		c.metrics.rtt.Observe(time.Duration(c.now() - at).Seconds())
	}
}

// close writes a close frame behind what is being written and ends the
// connection once the peer has read it, or after closeGrace. Only the first
// close, or abort, counts. The reading goroutine is made to look.
func (c *conn) close(code closeCode, reason string) {
	c.mu.Lock()
	if c.closed != 0 {
		c.mu.Unlock()
		return
	}
	c.closed = code
	c.closeBy = c.now() + int64(closeGrace)
	if code == closeNoStatus {
		c.answers = appendHeader(c.answers, opClose, 0)
	} else {
		c.answers = appendHeader(c.answers, opClose, 2+len(reason))
		c.answers = binary.BigEndian.AppendUint16(c.answers, uint16(code))
		c.answers = append(c.answers, reason...)
	}
	c.answeredLocked()
	c.openGateLocked()
	if c.started {
		c.kick()
		c.timer.Reset(closeGrace)
	}
	c.mu.Unlock()
	c.wake()
}

// abort ends the connection at once; code is only counted. The socket is reset,
// for a close would leave what a slow reader has not taken with the kernel, and
// the reader would learn nothing.
func (c *conn) abort(code closeCode) {
	c.mu.Lock()
	if c.closed == 0 {
		c.closed = code
	}
	c.openGateLocked()
	started := c.started
	c.mu.Unlock()
	if started {
		raw := rawConn(c.net)
		if tcp, ok := raw.(interface{ SetLinger(seconds int) error }); ok {
			tcp.SetLinger(0)
		}
		raw.Close()
	}
}

// rawConn returns the connection under TLS, to be closed: a tls.Conn would first
// say that it closes, and wait up to 5 seconds for a peer that does not read.
func rawConn(c net.Conn) net.Conn {
	if t, ok := c.(*tls.Conn); ok {
		return t.NetConn()
	}
	return c
}

// closing returns the code the connection is closing with, or 0.
func (c *conn) closing() closeCode {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.closed
}

// kick makes the reading goroutine return from the socket.
func (c *conn) kick() { c.net.SetReadDeadline(time.Unix(1, 0)) }

// closeWrite tells the peer that nothing comes after the close frame. It may
// still answer.
func (c *conn) closeWrite() {
	if half, ok := c.net.(interface{ CloseWrite() error }); ok {
		half.CloseWrite()
	}
}

// finish ends what is left of the connection, on the reading goroutine.
func (c *conn) finish() {
	if c.closing() != 0 {
		c.discard()
	}
	rawConn(c.net).Close()
	c.timer.Stop()
	c.ws.CloseNow() // only ends its finalizer
	if c.in != nil {
		c.in.free()
		c.in = nil
	}
}
