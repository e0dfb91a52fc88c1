package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
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

// Whatever the members of a room do, and whatever becomes of their connections:
// each of them, by the frames that it received alone, has the roster and the
// host that the server has; a frame that was accepted arrives at whom it is for,
// once and in order, and at nobody else; and who comes back in time was never
// seen to go.

const (
	roomRunPeople    = 6
	roomRunResumeTTL = 30 * time.Second
	roomRunHeartbeat = 10 * time.Second
	roomRunEmptyTTL  = 100 * time.Second
)

// A roomRunScript is what happens in one run.
type roomRunScript struct {
	max   int // players
	v1    [roomRunPeople]bool
	steps []roomRunStep
}

// In a step everybody acts at once, each in order, and then time passes.
type roomRunStep struct {
	acts  [roomRunPeople][]roomRunAct
	owner roomRunAct // of who opened the room, meanwhile
	then  time.Duration
}

// A roomRunAct is one act, and how often, how much, or to whom.
type roomRunAct struct {
	do string
	n  int
}

// Acts, with the frequent ones more than once.
var roomRunActs = []string{
	"connect", "to", "all", "drop", "connect", "to", "all", "leave 1001",
	"connect", "to", "burst", "take over", "connect", "to", "cut", "burst",
	"connect", "leave 1000", "leave without code", "wrong secret", "no secret", "to nobody",
}

var roomRunOwnerActs = []string{
	"", "", "", "", "", "", "", "", "", "", "", "", "max", "max", "lock", "unlock", "unlock", "delete",
}

var roomRunTimes = []time.Duration{
	0, 0, 0, 0, 0, 0, time.Millisecond, time.Second, roomRunHeartbeat + time.Second,
	roomRunResumeTTL - time.Second, roomRunResumeTTL, 2*roomRunHeartbeat + roomRunResumeTTL,
	roomRunEmptyTTL - time.Second, roomRunEmptyTTL + roomRunResumeTTL,
}

func roomRunDraw(t *rapid.T) roomRunScript {
	act := func(t *rapid.T, of []string) roomRunAct {
		return roomRunAct{rapid.SampledFrom(of).Draw(t, "do"), rapid.IntRange(0, 9).Draw(t, "n")}
	}
	step := rapid.Custom(func(t *rapid.T) roomRunStep {
		var s roomRunStep
		for range rapid.IntRange(1, 10).Draw(t, "acts") {
			who := rapid.IntRange(0, len(s.acts)-1).Draw(t, "who")
			s.acts[who] = append(s.acts[who], act(t, roomRunActs))
		}
		s.owner = act(t, roomRunOwnerActs)
		s.then = rapid.SampledFrom(roomRunTimes).Draw(t, "then")
		return s
	})
	s := roomRunScript{max: rapid.IntRange(3, roomRunPeople).Draw(t, "max")}
	for i := range s.v1 {
		s.v1[i] = rapid.Bool().Draw(t, "v1")
	}
	s.steps = rapid.SliceOfN(step, 8, 24).Draw(t, "steps")
	return s
}

func TestRoomProperty(t *testing.T) {
	t.Parallel()
	rapid.Check(t, func(rt *rapid.T) {
		script := roomRunDraw(rt)
		var err error
		inBubble(t, func(t *testing.T) { err = roomRunScripted(t, script) })
		if err != nil {
			rt.Fatal(err)
		}
	})
}

// A roomRun is a script on its way, on the goroutine of the test.
type roomRun struct {
	ts     *testServer
	room   testRoom
	max    int
	locked bool
	people []*roomRunPerson
	conns  int // given numbers
	no     int // of the settling

	members []*roomRunMember // of this room and those before, all there ever were
	known   []string         // IDs that frames are sent to: the roster's, and one of somebody who is gone
	away    []string         // IDs of those who were away at the last settling
	roster  []roomRunSeat    // as of the last settling
	taken   time.Time        // when somebody was last known to be in the room
	empty   time.Time        // when nobody was first known to be, since

	// In this step.
	deleted, patched bool
}

// A roomRunSeat is a seat as the server has it.
type roomRunSeat struct {
	id, name string
	held     bool
}

// A roomRunPerson is someone with a client. Only its own goroutine touches it in
// a step.
type roomRunPerson struct {
	run    *roomRun
	no     int
	v1     bool
	conns  []*roomRunConn // all it ever had
	member *roomRunMember // what it was last, and has the secret of
	posts  []*roomRunPost // all it ever sent
	posted []*roomRunPost // in this step
	words  []string       // by which it was refused in this step
	err    error          // the first thing that should not have been
}

// A roomRunMember is one seat, from its first join to its leave.
type roomRunMember struct {
	id, secret string
	joined     int // the settling at which it was first there
	gone       bool
	conns      []*roomRunConn
	resumes    []time.Time

	got     map[*roomRunPost]bool
	last    map[string]int // the highest number received, by sender
	at      *roomRunConn   // connected at the last settling
	away    bool           // at the last settling, and the server knew
	pending []*roomRunPost // accepted while it was away
	waiting int            // so many may wait for it, at most
}

// A roomRunConn is one connection and what it has been told.
type roomRunConn struct {
	*wsClient
	wire   *wire
	no     int
	person *roomRunPerson
	member *roomRunMember // nil for a newcomer, until its first frame
	seated bool           // it has had its first frame
	over   bool           // its end has been judged

	how     string // its person ended it
	endedAt time.Time
	endedIn int // the settling after that
	madeIn  int // the settling after it was made

	roster map[string]string // display names by ID
	host   string
	seen   map[string]bool // all that have been in roster
}

// A roomRunPost is a frame that was sent.
type roomRunPost struct {
	conn    *roomRunConn
	n       int
	typ, to string
	payload string
	late    bool   // the connection had been replaced
	refused string // the code of an error
}

func (c *roomRunConn) open() bool {
	select {
	case <-c.done:
		return false
	default:
		return !c.wire.dead.Load()
	}
}

func roomRunScripted(t *testing.T, script roomRunScript) error {
	ts := newTestServer(t, "ROOMS=open", "RESUME_TTL="+roomRunResumeTTL.String(), "HEARTBEAT="+roomRunHeartbeat.String(),
		"ROOM_EMPTY_TTL="+roomRunEmptyTTL.String(), "REDEEM_FAILS=10000")
	r := &roomRun{ts: ts}
	for i, v1 := range script.v1 {
		r.people = append(r.people, &roomRunPerson{run: r, no: i, v1: v1})
	}
	r.open(script.max)
	for i, s := range script.steps {
		if err := r.step(s); err != nil {
			return fmt.Errorf("step %d, %v: %w", i, s, err)
		}
	}
	// What still waits is for those who come back.
	var last roomRunStep
	for i := range last.acts {
		last.acts[i] = []roomRunAct{{do: "connect"}}
	}
	if err := r.step(last); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	return errors.Join(ts.memory.invariants(), ts.table.invariants())
}

func (r *roomRun) open(max int) {
	r.room = r.ts.openRoom(fmt.Sprintf(`{"maxPlayers":%d}`, max))
	r.max, r.locked, r.known, r.away, r.roster = max, false, nil, nil, nil
	r.taken, r.empty = time.Now(), time.Now()
}

func (r *roomRun) step(s roomRunStep) error {
	r.deleted, r.patched = s.owner.do == "delete", s.owner.do != "" && s.owner.do != "delete"
	var acting sync.WaitGroup
	acting.Go(func() { r.own(s.owner) })
	for who, acts := range s.acts {
		first := r.conns // so that numbers do not depend on who is first
		r.conns += len(acts)
		acting.Go(func() {
			for j, a := range acts {
				if !r.people[who].act(a, first+j+1) {
					return
				}
			}
		})
	}
	acting.Wait()
	if err := r.settle(); err != nil {
		return err
	}
	if r.deleted = false; s.then > 0 {
		r.patched = false
		time.Sleep(s.then)
		if err := r.settle(); err != nil {
			return fmt.Errorf("%v after: %w", s.then, err)
		}
	}
	return nil
}

// own is what who opened the room does.
func (r *roomRun) own(a roomRunAct) {
	method, body := http.MethodPatch, ""
	switch a.do {
	case "max":
		r.max = minPlayers + a.n%(roomRunPeople-1)
		body = fmt.Sprintf(`{"maxPlayers":%d}`, r.max)
	case "lock", "unlock":
		r.locked = a.do == "lock"
		body = fmt.Sprintf(`{"locked":%t}`, r.locked)
	case "delete":
		method = http.MethodDelete
	default:
		return
	}
	answer := r.ts.call(method, "/api/rooms/"+r.room.RoomID, body, "Authorization: Bearer "+r.room.OwnerToken)
	if answer.status != http.StatusOK {
		r.ts.t.Errorf("%s %s: %d %s", method, body, answer.status, answer.text)
	}
}

// fail keeps the first error.
func (p *roomRunPerson) fail(format string, args ...any) {
	if p.err == nil {
		p.err = fmt.Errorf("person %d: %w", p.no, fmt.Errorf(format, args...))
	}
}

// act reports whether the person may go on in this step: a newcomer has to read
// who it is first.
func (p *roomRunPerson) act(a roomRunAct, connNo int) bool {
	c := p.current()
	switch a.do {
	case "connect", "wrong secret", "no secret", "take over":
		if c == nil || a.do == "take over" {
			return p.connect(connNo, a.do)
		}
		return true
	}
	if c == nil {
		return true
	}
	switch a.do {
	case "drop", "cut", "leave 1000", "leave without code", "leave 1001":
		p.disconnect(c, a.do)
	case "to":
		if n := len(p.run.known); n > 0 {
			p.post(c, p.run.known[a.n%n], 1+a.n%3)
		}
	case "burst": // more than may wait, and then something for all
		if n := len(p.run.away); n > 0 {
			p.post(c, p.run.away[a.n%n], waitItems-2+a.n)
			p.post(c, "", 2)
		}
	case "all":
		p.post(c, "", 1+a.n%3)
	case "to nobody":
		p.post(c, "00000000-0000-4000-8000-000000000000", 1)
	}
	return true
}

func (p *roomRunPerson) current() *roomRunConn {
	for _, c := range slices.Backward(p.conns) {
		if c.open() {
			return c
		}
	}
	return nil
}

// post sends frames in which the client lies about who it is.
func (p *roomRunPerson) post(c *roomRunConn, to string, times int) {
	for range times {
		n := len(p.posts) + 1
		x := &roomRunPost{conn: c, n: n, to: to, late: c.replaced(), typ: []string{"offer", "answer", "candidate"}[n%3]}
		x.payload = fmt.Sprintf(`{"P":%d ,"N":%d, "to":"%s","x":"\u00e9\/é"}`, p.no, n, to)
		p.posts, p.posted = append(p.posts, x), append(p.posted, x)
		head := fmt.Sprintf(`{"type":"%s","id":%d,"from":"somebody","roomId":"elsewhere"`, x.typ, n)
		if to != "" {
			head += `,"to":"` + to + `"`
		}
		// It may be over by now, or about to be.
		c.conn.Write(context.Background(), websocket.MessageText, []byte(head+`,"payload":`+x.payload+"}"))
	}
}

func (p *roomRunPerson) connect(no int, how string) (known bool) {
	// One name for the first time and others later, which do not count.
	d := wsDial{room: p.run.room.RoomID, name: fmt.Sprintf("%d: \"<%d é", p.no, no), v1: p.v1}
	if p.no%2 == 1 {
		d.room = strings.ToLower(p.run.room.Code)
	}
	m := p.member
	switch {
	case how == "wrong secret":
		m, d.resume = nil, newSecret()
	case how == "no secret":
		m = nil
	case m != nil:
		d.resume = m.secret
		now := time.Now()
		if n := len(m.resumes); n >= takeovers && now.Sub(m.resumes[n-takeovers]) < takeoverWindow {
			return true // that would be too often
		}
		m.resumes = append(m.resumes, now)
	}
	ws, w, res, err := p.run.ts.dialOnWire(d)
	if err != nil {
		var answer struct{ Code string }
		if res != nil {
			text, _ := io.ReadAll(res.Body)
			json.Unmarshal(text, &answer)
		}
		want := map[string]int{"room_not_found": 404, "room_locked": 403, "room_is_full": 409}[answer.Code]
		if res == nil || p.v1 || res.StatusCode != want {
			p.fail("connect: %w %s", err, answer.Code)
		}
		p.refused(answer.Code, m)
		return false
	}
	c := &roomRunConn{wsClient: ws, wire: w, no: no, person: p, madeIn: p.run.no + 1}
	p.conns = append(p.conns, c)
	if m == nil || m.gone {
		return false
	}
	c.member = m
	m.conns = append(m.conns, c)
	return true
}

// replaced reports whether its person has taken over from it.
func (c *roomRunConn) replaced() bool { return c.member.conns[len(c.member.conns)-1] != c }

// refused notes that one who may have wanted m's seat back got none.
func (p *roomRunPerson) refused(word string, m *roomRunMember) {
	if m != nil && !m.gone && !p.run.deleted {
		p.fail("did not get its seat back: %s", word)
	}
	p.words = append(p.words, word)
}

func (p *roomRunPerson) disconnect(c *roomRunConn, how string) {
	c.how, c.endedAt, c.endedIn = how, time.Now(), p.run.no+1
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
	if how == "leave 1000" || how == "leave without code" {
		c.member.gone = c.member.gone || !c.replaced()
	}
}

// settle waits until nothing moves any more, and judges what can be judged now.
func (r *roomRun) settle() error {
	synctest.Wait()
	r.no++
	for _, p := range r.people {
		for _, c := range p.conns {
			for _, text := range c.take() {
				if err := c.receive(text); err != nil {
					p.fail("received %s: %w", text, err)
				}
			}
			c.judgeEnd()
		}
		if p.err != nil {
			return p.err
		}
	}
	before := r.roster
	seats, live := r.seats()
	answer := r.ts.call(http.MethodGet, "/api/rooms/"+r.room.RoomID, "")
	if r.deleted {
		if live || answer.status != http.StatusNotFound {
			return fmt.Errorf("the deleted room is there: %d %s", answer.status, answer.text)
		}
		return r.begin()
	}
	if !live {
		if len(before) > 0 && time.Now().Before(r.taken.Add(roomRunEmptyTTL)) || answer.status != http.StatusNotFound {
			return fmt.Errorf("the room has ended too early, or not: %d %s", answer.status, answer.text)
		}
		if len(before) == 0 && time.Now().Before(r.taken.Add(roomRunEmptyTTL)) {
			return errors.New("the empty room has ended too early")
		}
		return r.begin()
	}
	r.roster = seats
	if len(seats) > 0 {
		r.taken, r.empty = time.Now(), time.Time{}
	} else if r.empty.IsZero() {
		r.empty = time.Now()
	} else if !time.Now().Before(r.empty.Add(roomRunEmptyTTL)) {
		return errors.New("the empty room has not ended")
	}
	var got struct{ PlayerCount, MaxPlayers int }
	json.Unmarshal([]byte(answer.text), &got)
	if got.PlayerCount != len(seats) || got.MaxPlayers != r.max {
		return fmt.Errorf("%d players of %d by GET, want %d of %d", got.PlayerCount, got.MaxPlayers, len(seats), r.max)
	}
	if err := r.judgeSeats(before); err != nil {
		return err
	}
	if err := r.judgeJoins(len(before)); err != nil {
		return err
	}
	if err := r.judgePosts(before); err != nil {
		return err
	}
	r.known, r.away = nil, nil
	for _, s := range r.roster {
		if r.known = append(r.known, s.id); !s.held {
			r.away = append(r.away, s.id)
		}
	}
	for _, m := range r.members {
		if m.gone {
			r.known = append(r.known, m.id)
			break
		}
	}
	for _, p := range r.people {
		p.posted, p.words = nil, nil
	}
	return nil
}

// begin opens another room, after the last has ended.
func (r *roomRun) begin() error {
	for _, p := range r.people {
		for _, c := range p.conns {
			if c.open() {
				return fmt.Errorf("person %d is connected to a room that has ended", p.no)
			}
		}
		p.posted, p.words = nil, nil
	}
	for _, m := range r.members {
		m.gone, m.at, m.away, m.pending = true, nil, false, nil
	}
	r.open(roomRunPeople - 1)
	return nil
}

// seats returns the room's seats as the server has them.
func (r *roomRun) seats() (seats []roomRunSeat, live bool) {
	id, err := parseAppID(r.room.RoomID)
	if err != nil {
		panic(err)
	}
	s := r.ts.memory.lock(id)
	if s == nil {
		return nil, false
	}
	defer s.mu.Unlock()
	for _, slot := range s.seats {
		seats = append(seats, roomRunSeat{slot.name, slot.displayName, slot.holder != nil})
	}
	return seats, true
}

func roomRunFind(seats []roomRunSeat, id string) *roomRunSeat {
	if i := slices.IndexFunc(seats, func(s roomRunSeat) bool { return s.id == id }); i >= 0 {
		return &seats[i]
	}
	return nil
}

// A roomRunFrame is a frame from the server.
type roomRunFrame struct {
	Type, From, To, RoomID, DisplayName, Host, Resume, Code string

	Peers   *[]struct{ ID, DisplayName string }
	Payload json.RawMessage
	Ref     int
}

func (c *roomRunConn) receive(text string) error {
	var f roomRunFrame
	if err := json.Unmarshal([]byte(text), &f); err != nil {
		return err
	}
	r := c.person.run
	switch {
	case f.Type != "error" && f.RoomID != r.room.RoomID:
		return errors.New("it is of another room")
	case c.seated == (f.Peers != nil):
		return fmt.Errorf("%t that it had its first frame", c.seated)
	}
	switch f.Type {
	case "join":
		if c.seated {
			if c.seen[f.From] {
				return errors.New("it is known already")
			}
			c.roster[f.From], c.seen[f.From] = f.DisplayName, true
			return nil
		}
		return c.receiveFirst(f)
	case "leave":
		if _, ok := c.roster[f.From]; !ok || f.From == c.member.id {
			return errors.New("it was not there")
		}
		delete(c.roster, f.From)
		if f.From != c.host && f.Host != c.host {
			return errors.New("another host, while there was one")
		}
		c.host = f.Host
		if _, ok := c.roster[f.Host]; !ok {
			return errors.New("the host is not there")
		}
		return nil
	case "offer", "answer", "candidate":
		return c.receivePost(f)
	case "error":
		if f.Ref < 1 || f.Ref > len(c.person.posts) || c.person.posts[f.Ref-1].conn != c {
			return errors.New("it is about nothing that was sent")
		}
		c.person.posts[f.Ref-1].refused = f.Code
		return nil
	}
	return errors.New("there is no such type")
}

func (c *roomRunConn) receiveFirst(f roomRunFrame) error {
	r, p := c.person.run, c.person
	c.seated, c.host = true, f.Host
	c.roster, c.seen = map[string]string{f.From: f.DisplayName}, map[string]bool{f.From: true}
	for _, peer := range *f.Peers {
		if c.seen[peer.ID] {
			return errors.New("somebody is there twice")
		}
		c.roster[peer.ID], c.seen[peer.ID] = peer.DisplayName, true
	}
	if c.member != nil {
		if f.From != c.member.id || f.Resume != c.member.secret {
			return fmt.Errorf("want the seat of %s back", c.member.id)
		}
		return nil
	}
	for _, m := range r.members {
		if m.id == f.From || m.secret == f.Resume {
			return errors.New("the ID or the secret is not new")
		}
	}
	c.member = &roomRunMember{id: f.From, secret: f.Resume, joined: r.no, conns: []*roomRunConn{c},
		got: map[*roomRunPost]bool{}, last: map[string]int{}}
	p.member = c.member
	r.members = append(r.members, c.member)
	return nil
}

func (c *roomRunConn) receivePost(f roomRunFrame) error {
	var ref struct{ P, N int }
	if err := json.Unmarshal(f.Payload, &ref); err != nil {
		return err
	}
	people := c.person.run.people
	if ref.P < 0 || ref.P >= len(people) || ref.N < 1 || ref.N > len(people[ref.P].posts) {
		return errors.New("nobody sent that")
	}
	x, m := people[ref.P].posts[ref.N-1], c.member
	switch {
	case string(f.Payload) != x.payload || f.Type != x.typ || f.To != x.to:
		return fmt.Errorf("not as it was sent: %v", *x)
	case f.From != x.conn.member.id:
		return fmt.Errorf("it is from %s", x.conn.member.id)
	case x.late:
		return errors.New("it is from a connection that had been replaced")
	case f.To != "" && f.To != m.id || f.From == m.id:
		return errors.New("it is for somebody else")
	case x.n <= m.last[f.From]:
		return fmt.Errorf("after number %d", m.last[f.From])
	}
	m.last[f.From], m.got[x] = x.n, true
	return nil
}

// judgeEnd judges how the server ended a connection, if it has.
func (c *roomRunConn) judgeEnd() {
	select {
	case <-c.done:
	default:
		return
	}
	if c.over || c.how != "" {
		return
	}
	c.over = true
	p := c.person
	code, word := c.closed()
	if !c.seated {
		want := map[string]closeCode{"room_not_found": closeUnknown, "room_locked": closeForbidden, "room_is_full": closeRoomFull}[word]
		if closeCode(code) != want || !p.v1 {
			p.fail("refused with %d %q", code, word)
		}
		p.refused(word, c.member)
		return
	}
	switch closeCode(code) {
	case closeReplaced:
		if !c.replaced() {
			p.fail("closed as replaced, by nobody")
		}
	case closeDeleted:
		if !p.run.deleted {
			p.fail("closed as of a deleted room")
		}
	default:
		p.fail("closed with %d %q", code, word)
	}
}

// judgeSeats compares who should be in the room with who is, and with what each
// has been told.
func (r *roomRun) judgeSeats(before []roomRunSeat) error {
	now := time.Now()
	roster := map[string]string{}
	for _, s := range r.roster {
		roster[s.id] = s.name
		if !slices.ContainsFunc(r.members, func(m *roomRunMember) bool { return m.id == s.id }) {
			return fmt.Errorf("there is a stranger %s", s.id)
		}
	}
	for _, m := range r.members {
		seat := roomRunFind(r.roster, m.id)
		last := m.conns[len(m.conns)-1]
		in, out := false, m.gone
		switch {
		case m.gone:
		case last.open():
			in = true
			if seat != nil && !seat.held {
				return fmt.Errorf("%s is connected, and away", m.id)
			}
		case last.how == "cut":
			in = now.Before(last.endedAt.Add(roomRunResumeTTL))
			out = !now.Before(last.endedAt.Add(2*roomRunHeartbeat + roomRunResumeTTL))
		default:
			in = now.Before(last.endedAt.Add(roomRunResumeTTL))
			out = !in
			if seat != nil && seat.held {
				return fmt.Errorf("%s is not connected, and not away", m.id)
			}
		}
		if in && seat == nil || out && seat != nil {
			return fmt.Errorf("%s is a member: %t, after %q", m.id, seat != nil, last.how)
		}
		m.gone = seat == nil
		if c := last; c.open() && (!c.seated || !maps.Equal(c.roster, roster) || c.host != r.roster[0].id) {
			return fmt.Errorf("person %d takes the room for %v, host %s, want %v", c.person.no, c.roster, c.host, r.roster)
		}
	}
	connected := 0
	for _, p := range r.people {
		for _, c := range p.conns {
			if c.open() {
				if connected++; c.member == nil || c.replaced() {
					return fmt.Errorf("person %d has a connection without a seat", p.no)
				}
			}
		}
	}
	if len(r.roster) == 0 {
		return nil
	}
	host := r.roster[0].id
	if len(before) > 0 && roster[before[0].id] != "" && host != before[0].id {
		return fmt.Errorf("the host is %s, and was %s, who is there", host, before[0].id)
	}
	joined := map[string]int{}
	for _, m := range r.members {
		joined[m.id] = m.joined
	}
	for _, s := range r.roster {
		if joined[s.id] < joined[host] {
			return fmt.Errorf("the host is %s, but %s was there before", host, s.id)
		}
	}
	return nil
}

// judgeJoins judges whether who was let in should have been. Where the rules
// changed meanwhile, either set of them may have counted.
func (r *roomRun) judgeJoins(before int) error {
	if r.patched {
		return nil
	}
	joined := 0
	for _, m := range r.members {
		if m.joined == r.no {
			joined++
		}
	}
	if joined > 0 && (r.locked || len(r.roster) > r.max) {
		return fmt.Errorf("%d joined: %d of %d players, locked %t", joined, len(r.roster), r.max, r.locked)
	}
	for _, p := range r.people {
		for _, word := range p.words {
			if want := map[bool]string{true: "room_locked", false: "room_is_full"}[r.locked]; word != want {
				return fmt.Errorf("person %d was refused with %s, want %s", p.no, word, want)
			}
			if !r.locked && before+joined < r.max {
				return fmt.Errorf("person %d found the room full, with %d of %d players", p.no, before+joined, r.max)
			}
		}
	}
	return nil
}

// judgePosts judges the frames sent in this step, and those that waited.
func (r *roomRun) judgePosts(before []roomRunSeat) error {
	var posted []*roomRunPost
	for _, p := range r.people {
		posted = append(posted, p.posted...)
	}
	flooded := map[string]bool{}
	for _, m := range r.members {
		// Also for one who came back and left within this step: until then it was away.
		for _, x := range posted {
			if x.reaches(m) {
				m.waiting++
			}
		}
		if !m.gone {
			if err := r.judgeReceiver(m, posted); err != nil {
				return fmt.Errorf("person %d as %s: %w", m.conns[0].person.no, m.id, err)
			}
		}
		flooded[m.id] = m.waiting > waitItems
		flooded[""] = flooded[""] || flooded[m.id]
		if m.at = nil; m.conns[len(m.conns)-1].open() {
			m.at, m.waiting = m.conns[len(m.conns)-1], 0
		}
		seat := roomRunFind(r.roster, m.id)
		m.away = m.at == nil && seat != nil && !seat.held
	}
	for _, x := range posted {
		if !x.conn.open() {
			continue // perhaps it was not read
		}
		was, is := roomRunFind(before, x.to) != nil, roomRunFind(r.roster, x.to) != nil
		var fine bool
		switch x.refused {
		case "":
			fine = x.to == "" || (was || is) && x.to != x.conn.member.id
		case "peer_not_found":
			fine = x.to != "" && (!was || !is || x.to == x.conn.member.id)
		case "peer_absent":
			fine = flooded[x.to]
		}
		if !fine {
			return fmt.Errorf("person %d had error %q for number %d to %q", x.conn.person.no, x.refused, x.n, x.to)
		}
	}
	return nil
}

// reaches reports whether x was sent to m, by name or to all others.
func (x *roomRunPost) reaches(m *roomRunMember) bool {
	return x.conn.member != m && (x.to == "" || x.to == m.id)
}

// judgeReceiver judges whether m has what it should, and notes what is to come.
func (r *roomRun) judgeReceiver(m *roomRunMember, posted []*roomRunPost) error {
	made, ended := false, false
	for _, c := range m.conns {
		made = made || c.madeIn == r.no
		ended = ended || c.how != "" && c.endedIn == r.no
	}
	// What one who is gone left for who was away is stale.
	m.pending = slices.DeleteFunc(m.pending, func(x *roomRunPost) bool { return x.conn.member.gone })
	stayed := m.at != nil && !ended // perhaps on another connection
	back := m.away && made && !ended
	stillAway := m.away && !made
	for _, x := range posted {
		from := x.conn.member
		if !x.reaches(m) {
			continue
		}
		accepted := x.conn.open() && x.refused == ""
		switch {
		case stillAway && accepted && !from.gone:
			m.pending = append(m.pending, x)
		case back && accepted && !m.got[x],
			stayed && x.conn.open() && (accepted || x.to == "") && !m.got[x]:
			return fmt.Errorf("number %d of person %d has not arrived", x.n, x.conn.person.no)
		}
		if m.got[x] && x.to != "" && x.refused != "" {
			return fmt.Errorf("number %d of person %d has arrived, and was refused as %s", x.n, x.conn.person.no, x.refused)
		}
	}
	if len(m.pending) > waitItems {
		return fmt.Errorf("%d frames were accepted while it was away", len(m.pending))
	}
	if stillAway {
		return nil
	}
	for _, x := range m.pending {
		if back && !m.got[x] {
			return fmt.Errorf("number %d of person %d, sent while it was away, has not arrived", x.n, x.conn.person.no)
		}
	}
	m.pending = nil
	return nil
}
