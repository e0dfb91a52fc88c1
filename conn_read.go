package main

import (
	"context"
	"errors"
	"io"
	"math/bits"
	"os"
	"sync"
	"time"

	"github.com/coder/websocket"
)

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

// A buffer is memory borrowed from a bufferPool.
type buffer struct {
	b    []byte
	home *sync.Pool // nil for one too large to keep
}

// free gives the buffer back; nothing may use it afterwards.
func (b *buffer) free() {
	if b.home != nil {
		b.home.Put(b)
	}
}

// A bufferPool lends buffers in powers of two, so that a frame borrows little
// more than it needs.
type bufferPool struct {
	classes [maxClass - minClass + 1]sync.Pool
}

// The smallest and the largest buffers of a pool, as powers of two; larger ones
// are made anew.
const (
	minClass = 9
	maxClass = 21
)

// get lends a buffer of at least n bytes; its length is its capacity.
func (p *bufferPool) get(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1)), minClass)
	if class > maxClass {
		return &buffer{b: make([]byte, n)}
	}
	home := &p.classes[class-minClass]
	if b, ok := home.Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<class), home: home}
}
