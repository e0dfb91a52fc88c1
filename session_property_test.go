package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/coder/websocket"
	"pgregory.net/rapid"
)

// Whatever several clients of one session do, and whatever becomes of their
// connections: mail that was answered with a receipt arrives, in order and on no
// connection twice; relayed frames arrive in order and once at most; and what
// the presence frames say is what is true. All of it is judged by what the
// clients themselves sent and received.

// Lifetimes in these runs, in seconds small enough to be jumped over often.
const (
	runRoomTTL    = 40 * time.Second
	runResumeTTL  = 30 * time.Second
	runHeartbeat  = 10 * time.Second
	runSessionTTL = 150 * time.Second
)

// A sessionScript is what happens in one run.
type sessionScript struct {
	people [3]scriptPerson // one for A, and two for B
	tight  bool            // there is room for very little that waits
	steps  []scriptStep
}

type scriptPerson struct{ v1, claims bool }

// In a step everybody acts at once, each in order, and then time passes.
type scriptStep struct {
	acts [3][]scriptAct
	then time.Duration
}

// A scriptAct is one act, and how often or how much.
type scriptAct struct {
	do string
	n  int
}

// Acts, with the frequent ones more than once.
var scriptActs = []string{
	"mail", "relay", "connect", "drop", "ack", "hello", "leave 1001", "cut",
	"mail", "relay", "connect", "drop", "ack", "hello without watermark",
	"mail", "relay", "connect", "resend", "resend", "resend one", "resend one",
	"mail without id", "leave 1000", "leave without code", "connect again",
}

var scriptTimes = []time.Duration{
	0, 0, 0, 0, 0, time.Millisecond, time.Second, helloTimeout, 5 * time.Second,
	runHeartbeat + time.Second, runResumeTTL - time.Second, runResumeTTL, runRoomTTL,
	2 * runHeartbeat, runResumeTTL + 3*runHeartbeat, runSessionTTL - time.Second, runSessionTTL + runResumeTTL + time.Minute,
}

func drawScript(t *rapid.T) sessionScript {
	act := rapid.Custom(func(t *rapid.T) scriptAct {
		return scriptAct{rapid.SampledFrom(scriptActs).Draw(t, "do"), rapid.IntRange(1, 3).Draw(t, "n")}
	})
	step := rapid.Custom(func(t *rapid.T) scriptStep {
		var s scriptStep
		for range rapid.IntRange(1, 8).Draw(t, "acts") {
			who := rapid.IntRange(0, len(s.acts)-1).Draw(t, "who")
			s.acts[who] = append(s.acts[who], act.Draw(t, "act"))
		}
		s.then = rapid.SampledFrom(scriptTimes).Draw(t, "then")
		return s
	})
	var s sessionScript
	mostly := rapid.SampledFrom([]bool{true, true, false})
	for i := range s.people {
		s.people[i] = scriptPerson{v1: mostly.Draw(t, "v1"), claims: mostly.Draw(t, "claims")}
	}
	s.tight = rapid.Bool().Draw(t, "tight")
	s.steps = rapid.SliceOfN(step, 10, 40).Draw(t, "steps")
	return s
}

func TestSessionProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		script := drawScript(rt)
		var err error
		inBubble(t, func(t *testing.T) { err = runScript(t, script) })
		if err != nil {
			rt.Fatal(err)
		}
	})
}

// A sessionRun is a script on its way, on the goroutine of the test.
type sessionRun struct {
	ts      *testServer
	id      string
	people  []*person
	expires time.Time // of the code

	// occupied is when somebody was last known to be connected. Mail may be lost
	// SESSION_TTL later and not before; then another life of the session begins.
	occupied time.Time
	life     int
	mayEnd   bool // it has been counted that this life may have ended

	read mailLog // what the last reader found waiting
}

// A person has an app that keeps its mail until it has a receipt, and knows
// what it has received. Only the person's own goroutine touches it in a step.
type person struct {
	scriptPerson
	run  *sessionRun
	no   int
	side string
	err  error // the first thing that should not have been

	conns []*personConn // all it ever had
	using *personConn   // the one it sent from last

	unsure    []*letter // sent and without a receipt yet, in order
	letters   []*letter // all that were sent
	sent      int       // letters and relayed frames so far: the number of the next, and a letter's id
	watermark uint64    // the highest seq received
	epoch     int       // goes up whenever the claim may have ended
	left      bool      // for good
	lastSeen  time.Time // when it was last connected, as far as it knows
}

// A letter is mail with an id.
type letter struct {
	n, life int
	seq     uint64 // by its receipt, or 0
	refused bool   // once, and not forgotten by its sender
}

// A personConn is one connection of a person's and all that came of it.
type personConn struct {
	*wsClient
	wire *wire
	no   int // counts all connections of the run, so that a later one is higher

	settled bool   // it has lived through the end of a step
	seated  bool   // it has been sent something
	full    int    // room_full due: one with each arrival
	peer    string // v1: how the other side is, by the frames alone
	lastSeq uint64
	mail    mailLog
	relayed []parcel // received
	posted  []parcel // relayed frames that were sent in this step
	plain   []int    // letters without id sent in this step
}

// A mailLog is mail received, by seq.
type mailLog map[uint64]parcel

// A parcel is what these clients send: who sent it, from which connection and
// in which epoch, and its number.
type parcel struct{ P, C, E, N int }

func (c *personConn) open() bool {
	select {
	case <-c.done:
		return false
	default:
		return !c.wire.dead.Load()
	}
}

func runScript(t *testing.T, script sessionScript) error {
	settings := []string{"ROOM_TTL=" + runRoomTTL.String(), "RESUME_TTL=" + runResumeTTL.String(),
		"HEARTBEAT=" + runHeartbeat.String(), "SESSION_TTL=" + runSessionTTL.String()}
	if script.tight {
		settings = append(settings, "MAX_QUEUED_BYTES=200")
	}
	ts := newTestServer(t, settings...)
	_, id := ts.mint()
	r := &sessionRun{ts: ts, id: id, expires: time.Now().Add(runRoomTTL), occupied: time.Now()}
	for i, p := range script.people {
		r.people = append(r.people, &person{scriptPerson: p, run: r, no: i, side: "ABB"[i : i+1], lastSeen: time.Now()})
	}
	connections := 0
	for i, s := range script.steps {
		var acting sync.WaitGroup
		for who, acts := range s.acts {
			// Numbers are given out before, so that they do not depend on who is first.
			first := connections
			connections += len(acts)
			acting.Go(func() {
				for j, a := range acts {
					r.people[who].act(a, first+j+1)
				}
			})
		}
		acting.Wait()
		if err := r.settle(); err != nil {
			return fmt.Errorf("step %d, %v: %w", i, s, err)
		}
		if s.then > 0 {
			time.Sleep(s.then)
			if err := r.settle(); err != nil {
				return fmt.Errorf("step %d, %v after: %w", i, s.then, err)
			}
		}
	}
	if err := r.readAll(); err != nil {
		return err
	}
	return errors.Join(r.judgeMail(), r.judgeRelay(), ts.memory.invariants(), ts.table.invariants())
}

// fail keeps the first error.
func (p *person) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("person %d, side %s: %w", p.no, p.side, fmt.Errorf(format, args...))
	}
}

func (p *person) act(a scriptAct, connNo int) {
	p.receive()
	c := p.current()
	switch a.do {
	case "connect", "connect again":
		if c == nil || a.do == "connect again" {
			p.connect(connNo)
		}
		return
	case "leave 1000", "leave without code", "leave 1001", "drop", "cut":
		if c != nil {
			p.disconnect(c, a.do)
		}
		return
	}
	if c == nil {
		return
	}
	if c != p.using { // what may have been lost goes first, because ids count up
		p.using = c
		p.resend(c)
	}
	switch a.do {
	case "mail":
		for range a.n {
			p.sent++
			l := &letter{n: p.sent, life: p.run.life}
			p.letters, p.unsure = append(p.letters, l), append(p.unsure, l)
			p.post(c, l)
		}
	case "mail without id":
		p.sent++
		c.plain = append(c.plain, p.sent)
		p.write(c, fmt.Sprintf(`{"type":"send","payload":%s}`, p.parcel(c, p.sent)))
	case "resend":
		p.resend(c)
	case "resend one": // out of step with the others
		if n := len(p.unsure); n > 0 {
			p.post(c, p.unsure[a.n%n])
		}
	case "ack":
		if up := c.lastSeq; up > 0 && a.n > 1 {
			p.write(c, fmt.Sprintf(`{"type":"delivered","upTo":%d}`, up))
		} else if up > 0 { // not all of it
			p.write(c, fmt.Sprintf(`{"type":"delivered","upTo":%d}`, slices.Min(slices.Collect(maps.Keys(c.mail)))))
		}
	case "hello":
		p.write(c, fmt.Sprintf(`{"type":"hello","deliveredUpTo":%d}`, p.watermark))
	case "hello without watermark":
		p.write(c, `{"type":"hello"}`)
	case "relay":
		for range a.n {
			p.sent++
			x := p.parcel(c, p.sent)
			c.posted = append(c.posted, x)
			p.write(c, fmt.Sprintf(`{"type":"ice","x":%s}`, x))
		}
	}
}

// current returns the newest connection that this person thinks it has.
func (p *person) current() *personConn {
	for _, c := range slices.Backward(p.conns) {
		if c.open() {
			return c
		}
	}
	return nil
}

func (p *person) parcel(c *personConn, n int) parcel {
	epoch := p.epoch
	if !p.claims {
		epoch = c.no // ids start anew with each connection
	}
	return parcel{p.no, c.no, epoch, n}
}

func (x parcel) String() string {
	text, _ := json.Marshal(struct{ P, C, E, N int }(x))
	return string(text)
}

func (p *person) post(c *personConn, l *letter) {
	p.write(c, fmt.Sprintf(`{"type":"send","id":%d,"payload":%s}`, l.n, p.parcel(c, l.n)))
}

func (p *person) resend(c *personConn) {
	for _, l := range p.unsure {
		l.life = p.run.life
		p.post(c, l)
	}
}

// write writes to a connection that may be gone by now.
func (p *person) write(c *personConn, text string) {
	c.conn.Write(context.Background(), websocket.MessageText, []byte(text))
}

func (p *person) connect(no int) {
	if p.left || !time.Now().Before(p.lastSeen.Add(runResumeTTL)) {
		p.epoch, p.left = p.epoch+1, false // the claim may be over
	}
	d := wsDial{appID: p.run.id, side: p.side, v1: p.v1}
	if p.claims {
		d.sid = fmt.Sprint("person ", p.no)
	}
	ws, w, res, err := p.run.ts.dialOnWire(d)
	if err != nil {
		body := []byte{}
		if res != nil {
			body, _ = io.ReadAll(res.Body)
		}
		p.fail("connect: %w %s", err, body)
		return
	}
	p.conns = append(p.conns, &personConn{wsClient: ws, wire: w, no: no, mail: mailLog{}})
}

func (p *person) disconnect(c *personConn, how string) {
	switch how {
	case "leave 1000":
		c.leave(websocket.StatusNormalClosure)
	case "leave without code":
		c.leave(websocket.StatusNoStatusRcvd)
	case "leave 1001":
		c.leave(websocket.StatusGoingAway)
	case "drop":
		c.drop()
	case "cut":
		c.wire.cut()
	}
	p.left = strings.HasPrefix(how, "leave ") && how != "leave 1001"
}

// receive looks at what has come.
func (p *person) receive() {
	for _, c := range p.conns {
		for _, text := range c.take() {
			if f, err := parseServerFrame(text); err != nil {
				p.fail("received %s: %w", text, err)
			} else {
				p.receiveFrame(c, f)
			}
		}
	}
}

func (p *person) receiveFrame(c *personConn, f serverFrame) {
	first := !c.seated
	c.seated = true
	if p.v1 && first != (f.Type == "welcome") {
		p.fail("received %s, first %t", f.text, first)
	}
	if f.Type != "room_full" && c.full > 0 {
		p.fail("received %s instead of room_full", f.text)
		c.full = 0
	}
	switch f.Type {
	case "welcome", "peer_joined", "peer_away":
		if !p.v1 {
			p.fail("received %s without the subprotocol", f.text)
		}
	}
	switch f.Type {
	case "welcome":
		if c.peer = f.Peer; c.peer == "present" {
			c.full = 1
		}
	case "peer_joined":
		c.peer, c.full = "present", 1
	case "room_full":
		if c.full--; p.v1 && c.full < 0 {
			p.fail("received room_full without peer_joined")
		}
		c.full = 0
	case "peer_away":
		if c.peer != "present" {
			p.fail("received %s, but it was %s", f.text, c.peer)
		}
		c.peer = "away"
	case "peer_left":
		if p.v1 && c.peer == "absent" {
			p.fail("received %s, but it was %s", f.text, c.peer)
		}
		c.peer = "absent"
	case "deliver":
		var x parcel
		if err := json.Unmarshal(f.Payload, &x); err != nil {
			p.fail("received %s: %w", f.text, err)
		}
		if f.Seq <= c.lastSeq {
			p.fail("received seq %d after %d", f.Seq, c.lastSeq)
		}
		c.lastSeq = f.Seq
		p.watermark = max(p.watermark, f.Seq)
		c.mail[f.Seq] = x
	case "queued":
		i := slices.IndexFunc(p.unsure, func(l *letter) bool { return uint64(l.n) == f.ID })
		if i >= 0 {
			p.unsure[i].seq = f.Seq
			p.unsure = slices.Delete(p.unsure, i, i+1)
		}
	case "ice":
		var x struct{ X parcel }
		if err := json.Unmarshal([]byte(f.text), &x); err != nil {
			p.fail("received %s: %w", f.text, err)
		}
		c.relayed = append(c.relayed, x.X)
	case "error":
		if f.Code != "peer_absent" && f.Code != "over_capacity" { // so much may not wait
			p.fail("received %s", f.text)
		}
		var id int
		switch {
		case string(f.Ref) == `"ice"`:
			c.posted = nil
		case string(f.Ref) == `"send"`:
			c.plain = nil
		case json.Unmarshal(f.Ref, &id) != nil:
			p.fail("received %s", f.text)
		}
		for _, l := range p.unsure {
			l.refused = l.refused || l.n == id
		}
	default:
		p.fail("received %s", f.text)
	}
}

// settle waits until nothing moves any more, and judges what can be judged now.
func (r *sessionRun) settle() error {
	synctest.Wait()
	now := time.Now()
	for _, p := range r.people {
		p.receive()
		if p.err != nil {
			return p.err
		}
		for _, c := range p.conns {
			if c.open() {
				p.lastSeen, r.occupied, r.mayEnd = now, now, false
			}
		}
	}
	if !r.mayEnd && !now.Before(r.expires) && !now.Before(r.occupied.Add(runSessionTTL)) {
		r.life, r.mayEnd = r.life+1, true
	}
	if err := r.judgePresence(); err != nil {
		return err
	}
	for _, p := range r.people {
		for _, c := range p.conns {
			if err := p.judgeSettled(c); err != nil {
				return err
			}
		}
	}
	for _, p := range r.people {
		for _, c := range p.conns {
			c.settled, c.posted = c.open(), nil
		}
	}
	return nil
}

// judgePresence compares what clients have been told with what the hub has.
func (r *sessionRun) judgePresence() error {
	actual := map[string]string{"A": absent.String(), "B": absent.String()}
	id, err := parseAppID(r.id)
	if err != nil {
		return err
	}
	if s := r.ts.memory.find(id); s != nil {
		s.mu.Lock()
		for i, side := range []string{"A", "B"} {
			actual[side] = s.seats[i].state().String()
		}
		s.mu.Unlock()
	}
	connected, cut := map[string]int{}, map[string]bool{}
	for _, p := range r.people {
		for _, c := range p.conns {
			cut[p.side] = cut[p.side] || c.wire.dead.Load()
			if !c.open() {
				continue
			}
			if connected[p.side]++; !p.v1 {
				continue
			}
			other := map[string]string{"A": "B", "B": "A"}[p.side]
			if c.peer != actual[other] {
				return fmt.Errorf("person %d on side %s takes the other for %s, which is %s", p.no, p.side, c.peer, actual[other])
			}
		}
	}
	for side, state := range actual {
		switch n := connected[side]; {
		case n > 1:
			return fmt.Errorf("%d connections on side %s", n, side)
		case n == 1 && state != "present", n == 0 && state == "present" && !cut[side]:
			return fmt.Errorf("%d connections on side %s, which is %s", n, side, state)
		}
	}
	return nil
}

// judgeSettled judges what must have been done for a connection that still is.
func (p *person) judgeSettled(c *personConn) error {
	if !c.open() {
		return nil
	}
	for _, l := range p.unsure {
		if c == p.using && !l.refused {
			return fmt.Errorf("person %d has no receipt for letter %d", p.no, l.n)
		}
	}
	if p.v1 && !c.seated {
		return fmt.Errorf("person %d has not been welcomed", p.no)
	}
	for _, n := range c.plain { // the connection has not ended, so it was accepted
		p.letters = append(p.letters, &letter{n: n, life: p.run.life})
	}
	c.plain = nil
	if !c.settled {
		return nil
	}
	for _, q := range p.run.people {
		if q.side == p.side {
			continue
		}
		for _, d := range q.conns {
			if !d.open() || !d.settled {
				continue
			}
			// Both have been connected all the time.
			for _, x := range c.posted {
				if !slices.Contains(d.relayed, x) {
					return fmt.Errorf("person %d has not received the frame %v", q.no, x)
				}
			}
		}
	}
	return nil
}

// readAll ends all connections and reads what mail there is.
func (r *sessionRun) readAll() error {
	for _, p := range r.people {
		for _, c := range p.conns {
			if c.open() {
				p.disconnect(c, "drop")
			}
		}
	}
	if err := r.settle(); err != nil {
		return err
	}
	time.Sleep(runResumeTTL + 3*runHeartbeat) // until the seats are free, also those of cut connections
	if err := r.settle(); err != nil {
		return err
	}
	r.read = mailLog{}
	for _, side := range []string{"A", "B"} {
		reader := &person{run: r, no: len(r.people), side: side}
		r.people = append(r.people, reader)
		reader.connect(1 << 30)
		if reader.err != nil {
			return reader.err
		}
		c := reader.conns[0]
		reader.write(c, `{"type":"hello"}`)
		synctest.Wait()
		reader.receive()
		if reader.err != nil {
			return reader.err
		}
		if !c.open() {
			return fmt.Errorf("side %s is not free", side)
		}
	}
	return nil
}

// judgeMail judges all mail that was sent and received.
func (r *sessionRun) judgeMail() error {
	for _, side := range []string{"A", "B"} {
		all := mailLog{} // of the mailbox, whoever received it
		for _, p := range r.people {
			if p.side != side {
				continue
			}
			for _, c := range p.conns {
				for seq, x := range c.mail {
					if before, ok := all[seq]; ok && before != x {
						return fmt.Errorf("seq %d for %s is %v and %v", seq, side, before, x)
					}
					all[seq] = x
				}
			}
		}
		// The order of the seqs is that of sending, save for what was refused at
		// first; what was sent twice on one claim is stored once.
		refused := map[[2]int]bool{}
		for _, p := range r.people {
			for _, l := range p.letters {
				refused[[2]int{p.no, l.n}] = l.refused
			}
		}
		type claimed struct{ person, epoch, n int }
		stored := map[claimed]bool{}
		highest := map[claimed]int{}
		newest := map[int]int{}
		found := map[[2]int]bool{}
		for _, seq := range slices.Sorted(maps.Keys(all)) {
			x := all[seq]
			if k := (claimed{x.P, x.E, x.N}); stored[k] {
				return fmt.Errorf("mail %v was stored twice", x)
			} else {
				stored[k] = true
			}
			if k := (claimed{x.P, x.E, 0}); !refused[[2]int{x.P, x.N}] {
				if x.N < highest[k] {
					return fmt.Errorf("mail %v follows number %d", x, highest[k])
				}
				highest[k] = x.N
			}
			if x.C < newest[x.P] {
				return fmt.Errorf("mail %v was accepted after connection %d took over", x, newest[x.P])
			}
			newest[x.P] = x.C
			found[[2]int{x.P, x.N}] = true
		}
		for _, p := range r.people {
			if p.side == side {
				continue
			}
			for _, l := range p.letters {
				if l.life != r.life || slices.Contains(p.unsure, l) {
					continue
				}
				if !found[[2]int{p.no, l.n}] {
					return fmt.Errorf("person %d had a receipt for letter %d, seq %d, which was not delivered", p.no, l.n, l.seq)
				}
				if _, ok := all[l.seq]; l.seq != 0 && !ok {
					return fmt.Errorf("seq %d, of a receipt, was not delivered", l.seq)
				}
			}
		}
	}
	return nil
}

// judgeRelay judges all relayed frames that were received.
func (r *sessionRun) judgeRelay() error {
	received := map[parcel]int{}
	for _, p := range r.people {
		for _, c := range p.conns {
			highest := map[int]int{} // by sender
			for _, x := range c.relayed {
				if x.N <= highest[x.P] {
					return fmt.Errorf("person %d received %v after number %d", p.no, x, highest[x.P])
				}
				highest[x.P] = x.N
				if received[x]++; received[x] > 1 {
					return fmt.Errorf("frame %v was received %d times", x, received[x])
				}
			}
		}
	}
	return nil
}
