package main

import (
	"encoding/binary"
	"errors"
	"os"
	"sync"
	"time"
)

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
