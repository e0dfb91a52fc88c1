package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"net/http"
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
	tasks               *taskGroup
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
	if t, ok := c.(interface{ NetConn() net.Conn }); ok { // a tls.Conn, or what wraps one
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
