package main

import (
	"bytes"
	"slices"
	"time"
)

// inFlight is how many frames of one peer may be on their way while each is
// timed.
const inFlight = 256

// batchBytes is what a flooding peer hands to TCP at once.
const batchBytes = 16 << 10

// A peer is a connection under load.
type peer struct {
	id     int // in the engine
	socket int
	from   *peer   // whose frames it receives
	to     []*peer // who receive its frames

	out  numbered
	size int    // bytes of each frame as it should arrive, 0 where the server adds to them
	in   []byte // the beginning of a frame
	todo []byte // what TCP has not taken yet
	hint int    // where the last frame had its number

	sent    uint64  // frames, and the number of the last one
	sentAt  []int64 // when, by number
	last    uint64  // number of the last frame received
	got     uint64  // frames received
	skipped uint64  // numbers between two frames that were received
	wrong   uint64  // frames received twice, too late, or with another length

	flood  bool // sends as fast as TCP takes it
	mute   bool // does not read
	closed bool
	events uint32 // what the poller waits for
}

// An engine drives all peers from one goroutine.
type engine struct {
	poller  *poller
	peers   []*peer
	begin   time.Time
	onFrame func(to *peer, n uint64) // called for each frame received

	flooded int64 // bytes that flooding peers have sent
	most    int64 // bytes that they may send
	buf     []byte
}

func newEngine() (*engine, error) {
	p, err := newPoller()
	if err != nil {
		return nil, err
	}
	return &engine{poller: p, begin: time.Now(), buf: make([]byte, 2*maxFrame), onFrame: func(*peer, uint64) {}}, nil
}

// close has every peer leave for good.
func (e *engine) close() {
	for _, p := range e.peers {
		if !p.closed {
			writeSocket(p.socket, closeNormal())
			closeSocket(p.socket)
		}
	}
	e.poller.close()
}

// add takes a connection over.
func (e *engine) add(c *conn) (*peer, error) {
	socket, err := detach(c.Conn)
	if err != nil {
		return nil, err
	}
	p := &peer{id: len(e.peers), socket: socket, in: bytes.Clone(c.in), events: canRead | ended}
	if err := e.poller.add(socket, p.id, p.events); err != nil {
		closeSocket(socket)
		return nil, err
	}
	e.peers = append(e.peers, p)
	e.poll(0) // those who came long before have pings to answer
	return p, nil
}

// sends says what p sends, and to whom. exact: it should arrive as it is.
func (p *peer) sends(message []byte, exact bool, to ...*peer) {
	p.out, p.to, p.sentAt = number(message), to, make([]int64, inFlight)
	for _, receiver := range to {
		receiver.from = p
		if exact {
			receiver.size = len(message)
		}
	}
}

// now is in nanoseconds.
func (e *engine) now() int64 { return int64(time.Since(e.begin)) }

// poll handles what happens within d.
func (e *engine) poll(d time.Duration) {
	e.poller.wait(d, func(id int, events uint32) {
		p := e.peers[id]
		if p.closed {
			return
		}
		if p.mute {
			if events&ended != 0 {
				e.drop(p)
			}
			return
		}
		if events&(canRead|ended) != 0 {
			e.read(p)
		}
		if events&canWrite != 0 && !p.closed {
			e.flush(p)
		}
		e.watch(p)
	})
}

// watch has the poller wait for what p can make use of now.
func (e *engine) watch(p *peer) {
	events := uint32(ended)
	if !p.mute {
		events |= canRead
	}
	if len(p.todo) > 0 || p.flood && e.flooded < e.most {
		events |= canWrite
	}
	if events != p.events && !p.closed {
		p.events = events
		if e.poller.change(p.socket, p.id, events) != nil {
			e.drop(p)
		}
	}
}

// drop is for a peer whose connection has ended, or has to.
func (e *engine) drop(p *peer) {
	if !p.closed {
		p.closed = true
		closeSocket(p.socket)
	}
}

// read reads once: if there is more, the poller comes back to it.
func (e *engine) read(p *peer) {
	kept := copy(e.buf, p.in)
	n, err := readSocket(p.socket, e.buf[kept:])
	if n == 0 {
		if !tryAgain(err) {
			e.drop(p)
		}
		return
	}
	b := e.buf[:kept+n]
	for !p.closed {
		op, payload, size, err := nextFrame(b)
		if err != nil {
			e.drop(p)
		}
		if size == 0 {
			break
		}
		b = b[size:]
		e.handle(p, op, payload)
	}
	p.in = append(p.in[:0], b...)
}

func (e *engine) handle(p *peer, op byte, payload []byte) {
	switch op {
	case opPing:
		e.write(p, appendFrame(nil, opPong, payload))
	case opClose:
		e.drop(p)
	case opText, opBinary:
		if n, ok := numberIn(payload, &p.hint); ok {
			e.count(p, n, len(payload))
		}
	}
}

// count compares a frame that p received with what was sent to it.
func (e *engine) count(p *peer, n uint64, size int) {
	if p.from == nil || n <= p.last || n > p.from.sent || p.size > 0 && size != p.size {
		p.wrong++
		return
	}
	p.skipped += n - p.last - 1
	p.last = n
	p.got++
	e.onFrame(p, n)
}

// write sends b, and keeps what TCP does not take.
func (e *engine) write(p *peer, b []byte) {
	if len(p.todo) == 0 {
		n, err := writeSocket(p.socket, b)
		if err != nil && !tryAgain(err) {
			e.drop(p)
			return
		}
		b = b[n:]
	}
	if len(b) > 0 {
		p.todo = append(p.todo, b...)
		e.watch(p)
	}
}

// send sends p's next frame.
func (e *engine) send(p *peer) {
	if p.closed {
		return
	}
	p.sent++
	p.out.set(p.sent)
	p.sentAt[p.sent%inFlight] = e.now()
	e.write(p, p.out.wire)
}

// flush gives TCP what it can take now.
func (e *engine) flush(p *peer) {
	if len(p.todo) == 0 && p.flood {
		e.batch(p)
	}
	n, err := writeSocket(p.socket, p.todo)
	if err != nil && !tryAgain(err) {
		e.drop(p)
		return
	}
	if p.todo = p.todo[n:]; len(p.todo) == 0 && !p.flood {
		p.todo = nil
	}
}

// batch appends a flooding peer's next frames to what it has to send.
func (e *engine) batch(p *peer) {
	p.todo = p.todo[:0]
	for len(p.todo) < batchBytes && e.flooded < e.most {
		p.sent++
		p.out.set(p.sent)
		p.todo = append(p.todo, p.out.wire...)
		e.flooded += int64(len(p.out.wire))
	}
}

// setFlood begins to send as fast as TCP takes it, or ends with the frame begun.
func (e *engine) setFlood(p *peer, flood bool) {
	p.flood = flood
	e.watch(p)
}

// setMute has p not read any more.
func (e *engine) setMute(p *peer) {
	p.mute = true
	shrinkReceiveBuffer(p.socket)
	e.watch(p)
}

// run polls for d.
func (e *engine) run(d time.Duration) {
	for end := time.Now().Add(d); ; {
		left := time.Until(end)
		if left <= 0 {
			return
		}
		e.poll(min(left+time.Millisecond, 50*time.Millisecond))
	}
}

// pace sends rate frames a second for d, from the sources in turn. It returns
// how many were not sent, because too many of their source were still on their
// way.
func (e *engine) pace(d time.Duration, sources []*peer, rate int) (unsent uint64) {
	begin := time.Now()
	for turn := 0; ; {
		past := time.Since(begin)
		if past >= d {
			return unsent
		}
		for due := int(past.Seconds() * float64(rate)); turn < due; turn++ {
			p := sources[turn%len(sources)]
			if p.closed || p.waiting() >= inFlight {
				unsent++
				continue
			}
			e.send(p)
		}
		e.poll(time.Millisecond)
	}
}

// waiting is how many of p's frames someone has not received yet.
func (p *peer) waiting() uint64 {
	most := uint64(0)
	for _, receiver := range p.to {
		most = max(most, p.sent-receiver.last)
	}
	return most
}

// settle waits until all that was sent has been received, or until nothing has
// come for quiet.
func (e *engine) settle(quiet time.Duration) {
	const step = 20 * time.Millisecond
	for before, idle := e.tally(), time.Duration(0); idle < quiet; {
		e.run(step)
		now := e.tally()
		if idle += step; now != before {
			before, idle = now, 0
		}
		if now.lost == 0 && !slices.ContainsFunc(e.peers, func(p *peer) bool { return len(p.todo) > 0 && !p.closed && !p.mute }) {
			return
		}
	}
}

// A tally is what became of all frames.
type tally struct {
	sent     uint64 // frames times receivers
	received uint64
	lost     uint64 // sent, and not received so far
	wrong    uint64 // received twice, too late, or with another length
	closed   int    // connections that the server ended
}

func (e *engine) tally() tally { return tallyOf(e.peers) }

// tallyOf counts the frames to those of the peers that read.
func tallyOf(peers []*peer) (t tally) {
	for _, p := range peers {
		if p.closed {
			t.closed++
		}
		t.wrong += p.wrong
		t.received += p.got
		if p.from != nil && !p.mute {
			t.sent += p.from.sent
			t.lost += p.skipped + p.from.sent - p.last
		}
	}
	return t
}
