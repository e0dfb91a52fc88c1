package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"parley/test/testkit"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/pion/webrtc/v4"
)

// Rooms in which everyone connects to everyone, on real sockets.

// A meshFrame is a frame from the server.
type meshFrame struct {
	Type, From, To, RoomID, DisplayName, Host, Resume, Code string

	Peers   []struct{ ID, DisplayName string }
	Payload json.RawMessage
	Ref     int

	at time.Time // when it was received
}

// A meshPayload is what members say to each other.
type meshPayload struct {
	N    int // counts all that its sender sent
	Re   int `json:",omitempty"` // of an answer: the offer's
	At   int64
	Fill string `json:",omitempty"`
}

func (f meshFrame) payload() (p meshPayload) {
	json.Unmarshal(f.Payload, &p)
	return p
}

// A meshClient is a member of a room; it keeps what it receives.
type meshClient struct {
	t       testing.TB
	ctx     context.Context
	conn    *websocket.Conn
	tcp     *net.TCPConn
	join    meshFrame
	react   func(*meshClient, meshFrame) // to each frame after the first, where it is read; or nil
	changed chan struct{}                // something was received
	done    chan struct{}

	sending sync.Mutex
	sent    int // guarded by sending

	mu     sync.Mutex
	frames []meshFrame // guarded by mu: received, after join, and not taken
	err    error       // guarded by mu: why reading ended
}

func meshContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), testkit.Patience)
	t.Cleanup(cancel)
	return ctx
}

// meshOpen opens a room on the server at addr.
func meshOpen(t testing.TB, addr, body string) (r testRoom) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://"+addr+"/api/rooms", strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Close = true // leave no idle connection behind
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&r); err != nil || res.StatusCode != http.StatusCreated {
		t.Fatalf("open a room: %s, %v", res.Status, err)
	}
	return r
}

// meshDial opens a WebSocket to the server at addr. A refusal is returned as the
// HTTP status or the close code, and the word.
func meshDial(ctx context.Context, addr string, d wsDial) (c *meshClient, refused int, word string, err error) {
	c = &meshClient{ctx: ctx, changed: make(chan struct{}, 1), done: make(chan struct{})}
	o := websocket.DialOptions{HTTPClient: &http.Client{Transport: &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			conn, err := new(net.Dialer).DialContext(ctx, "tcp", addr)
			if err == nil {
				c.tcp = conn.(*net.TCPConn)
			}
			return conn, err
		},
		DisableKeepAlives: true,
	}}}
	if d.v1 {
		o.Subprotocols = []string{subprotocolV1}
	}
	conn, res, err := websocket.Dial(ctx, d.url(), &o)
	if err != nil {
		if res == nil {
			return nil, 0, "", err
		}
		var answer struct{ Code string }
		text, _ := io.ReadAll(res.Body)
		json.Unmarshal(text, &answer)
		return nil, res.StatusCode, answer.Code, nil
	}
	conn.SetReadLimit(-1)
	c.conn = conn
	_, data, err := conn.Read(ctx)
	var closed websocket.CloseError
	if errors.As(err, &closed) {
		conn.CloseNow()
		return nil, int(closed.Code), closed.Reason, nil
	} else if err != nil {
		conn.CloseNow()
		return nil, 0, "", err
	}
	if err := json.Unmarshal(data, &c.join); err != nil || c.join.Type != "join" || c.join.Peers == nil {
		conn.CloseNow()
		return nil, 0, "", fmt.Errorf("first frame %s: %w", data, err)
	}
	return c, 0, "", nil
}

// meshJoin is meshDial for one who must get in. react may be nil.
func meshJoin(ctx context.Context, t testing.TB, addr string, d wsDial, react func(*meshClient, meshFrame)) *meshClient {
	t.Helper()
	c, refused, word, err := meshDial(ctx, addr, d)
	if err != nil || refused != 0 {
		t.Fatalf("%s did not get in: %d %s %v", d.name, refused, word, err)
	}
	c.begin(t, react)
	return c
}

// begin begins to read.
func (c *meshClient) begin(t testing.TB, react func(*meshClient, meshFrame)) {
	c.t, c.react = t, react
	go c.read()
	t.Cleanup(func() {
		c.conn.CloseNow()
		<-c.done
	})
}

func (c *meshClient) read() {
	defer close(c.done)
	for {
		_, data, err := c.conn.Read(c.ctx)
		f := meshFrame{at: time.Now()}
		if err == nil {
			err = json.Unmarshal(data, &f)
		}
		c.mu.Lock()
		if err != nil {
			c.err = err
			c.mu.Unlock()
			return
		}
		c.frames = append(c.frames, f)
		c.mu.Unlock()
		if c.react != nil {
			c.react(c, f)
		}
		select {
		case c.changed <- struct{}{}:
		default:
		}
	}
}

// await waits until ok of all frames that were received and not taken, and takes
// them.
func (c *meshClient) await(what string, ok func([]meshFrame) bool) []meshFrame {
	c.t.Helper()
	for {
		c.mu.Lock()
		frames, done := c.frames, ok(c.frames)
		if done {
			c.frames = nil
		}
		err := c.err
		c.mu.Unlock()
		if done {
			return frames
		}
		select {
		case <-c.changed:
		case <-c.done:
			c.t.Fatalf("%s, waiting for %s, after %d frames: %v", c.join.DisplayName, what, len(frames), err)
		}
	}
}

// send sends one frame to a member, or to all.
func (c *meshClient) send(typ, to string, p meshPayload) (n int, err error) {
	c.sending.Lock()
	defer c.sending.Unlock()
	c.sent++
	p.N = c.sent
	frame := struct {
		Type    string      `json:"type"`
		ID      int         `json:"id"`
		To      string      `json:"to,omitempty"`
		From    string      `json:"from"` // a lie
		Payload meshPayload `json:"payload"`
	}{typ, p.N, to, to, p}
	data, err := json.Marshal(frame)
	if err == nil {
		err = c.conn.Write(c.ctx, websocket.MessageText, data)
	}
	return p.N, err
}

func (c *meshClient) mustSend(typ, to string, p meshPayload) {
	c.t.Helper()
	if _, err := c.send(typ, to, p); err != nil {
		c.t.Errorf("%s: %v", c.join.DisplayName, err)
	}
}

// processed waits until the server has dealt with all that c sent, and returns
// what came besides.
func (c *meshClient) processed() []meshFrame {
	c.t.Helper()
	if err := c.conn.Write(c.ctx, websocket.MessageText, []byte(`{"type":"ping"}`)); err != nil {
		c.t.Fatal(err)
	}
	isPong := func(f meshFrame) bool { return f.Type == "pong" }
	frames := c.await("pong", func(frames []meshFrame) bool { return slices.ContainsFunc(frames, isPong) })
	return slices.DeleteFunc(frames, isPong)
}

// meshSettled returns what each has received and not taken, up to a last frame
// that each is sent now: presence and relayed frames come in one order.
func meshSettled(clients ...*meshClient) (received [][]meshFrame) {
	for i, c := range clients {
		from := clients[(i+1)%len(clients)]
		from.t.Helper()
		from.mustSend("candidate", c.join.From, meshPayload{Fill: "last"})
	}
	for i, c := range clients {
		from := clients[(i+1)%len(clients)]
		isLast := func(f meshFrame) bool { return f.From == from.join.From && f.payload().Fill == "last" }
		frames := c.await("the last frame", func(frames []meshFrame) bool { return slices.ContainsFunc(frames, isLast) })
		received = append(received, slices.DeleteFunc(frames, isLast))
	}
	return received
}

// meshSilent fails the test if somebody has received anything.
func meshSilent(t testing.TB, clients ...*meshClient) {
	t.Helper()
	for i, frames := range meshSettled(clients...) {
		for _, f := range frames {
			t.Errorf("%s received %s from %s", clients[i].join.DisplayName, f.Type, f.From)
		}
	}
}

// meshRush lets so many try for a seat at once, every other one with parley.v1.
// It returns who got in; the others must find the room full.
func meshRush(ctx context.Context, t testing.TB, addr string, d wsDial, n int) (in []*meshClient) {
	t.Helper()
	var mu sync.Mutex
	var all sync.WaitGroup
	start := make(chan struct{})
	for i := range n {
		d := d
		d.v1, d.name = i%2 == 0, fmt.Sprintf("rusher %d", i)
		want := map[bool]int{true: int(closeRoomFull), false: http.StatusConflict}[d.v1]
		all.Go(func() {
			<-start
			c, refused, word, err := meshDial(ctx, addr, d)
			mu.Lock()
			defer mu.Unlock()
			switch {
			case err != nil:
				t.Errorf("%s: %v", d.name, err)
			case c != nil:
				in = append(in, c)
				c.begin(t, nil)
			case refused != want || word != "room_is_full":
				t.Errorf("%s was refused with %d %s, want %d", d.name, refused, word, want)
			}
		})
	}
	close(start)
	all.Wait()
	return in
}

// Eight offer to each other, all at once; the room holds eight and no more,
// whoever is away and however many try; and who comes back was never gone.
func TestMeshOfEight(t *testing.T) {
	const players, candidates, rush = 8, 3, 50
	server := testkit.StartBinary(t, "ROOMS=open")
	addr := strings.TrimPrefix(server.Base, "http://")
	ctx := meshContext(t)
	room := meshOpen(t, addr, fmt.Sprintf(`{"maxPlayers":%d}`, players))

	trickle := func(c *meshClient, to string) {
		for range candidates {
			c.mustSend("candidate", to, meshPayload{})
		}
	}
	var all sync.WaitGroup
	clients := make([]*meshClient, players)
	for i := range clients {
		all.Go(func() {
			d := wsDial{room: room.Code, name: fmt.Sprintf("player %d", i), v1: i%2 == 0}
			c, refused, word, err := meshDial(ctx, addr, d)
			if err != nil || refused != 0 {
				t.Errorf("%s did not get in: %d %s %v", d.name, refused, word, err)
				return
			}
			c.begin(t, func(c *meshClient, f meshFrame) {
				if f.Type == "offer" {
					c.mustSend("answer", f.From, meshPayload{Re: f.payload().N})
					trickle(c, f.From)
				}
			})
			clients[i] = c
		})
	}
	if all.Wait(); t.Failed() {
		return
	}
	// They came in the order of how many were there before.
	slices.SortFunc(clients, func(a, b *meshClient) int { return len(a.join.Peers) - len(b.join.Peers) })
	for i, c := range clients {
		c.await("the others", func(frames []meshFrame) bool { return len(c.join.Peers)+len(frames) == players-1 })
		if len(c.join.Peers) != i || c.join.Host != clients[0].join.From {
			t.Errorf("%s came to %d others, host %s; want %d, %s", c.join.DisplayName, len(c.join.Peers), c.join.Host, i, clients[0].join.From)
		}
	}

	for _, c := range clients {
		all.Go(func() {
			for _, other := range clients {
				if other != c {
					c.mustSend("offer", other.join.From, meshPayload{})
					trickle(c, other.join.From)
				}
			}
		})
	}
	all.Wait()
	// Each gets an offer, an answer, and the candidates behind both, from each.
	const each = 2 + 2*candidates
	received := make([][]meshFrame, players)
	for i, c := range clients {
		received[i] = c.await("what the others sent", func(frames []meshFrame) bool { return len(frames) >= each*(players-1) })
	}
	for i, more := range meshSettled(clients...) {
		meshJudge(t, clients[i], clients, append(received[i], more...), map[string]int{"offer": 1, "answer": 1, "candidate": 2 * candidates})
	}

	rushed := func(when string) {
		t.Helper()
		if in := meshRush(ctx, t, addr, wsDial{room: room.RoomID}, rush); len(in) > 0 {
			t.Fatalf("%d got into a full room, %s", len(in), when)
		}
	}
	rushed("as all are there")
	meshSilent(t, clients...)

	// The host's network dies, and the host is back.
	lost, others := clients[0], clients[1:]
	lost.tcp.SetLinger(0)
	lost.tcp.Close()
	<-lost.done
	testkit.Eventually(t, "the server has noticed", func() bool { return testkit.Metric(t, server, "parley_ws_connections") == players-1 })
	rushed("as one is away")
	for _, c := range others {
		all.Go(func() { trickle(c, lost.join.From) })
	}
	all.Wait()
	for _, c := range others {
		for _, f := range c.processed() {
			t.Errorf("%s received %s %s from %s", c.join.DisplayName, f.Type, f.Code, f.From)
		}
	}
	back := meshJoin(ctx, t, addr, wsDial{room: room.RoomID, name: "another", resume: lost.join.Resume}, nil)
	if back.join.From != lost.join.From || back.join.Host != lost.join.From || len(back.join.Peers) != players-1 || back.join.DisplayName != lost.join.DisplayName {
		t.Errorf("came back as %+v, was %+v", back.join, lost.join)
	}
	clients[0] = back
	waited := back.await("what was sent meanwhile", func(frames []meshFrame) bool { return len(frames) >= candidates*len(others) })
	for i, more := range meshSettled(clients...) {
		if i == 0 {
			meshJudge(t, back, clients, append(waited, more...), map[string]int{"candidate": candidates})
		} else if len(more) > 0 {
			t.Errorf("%s received %+v as the host came back", clients[i].join.DisplayName, more)
		}
	}

	// The host leaves, and one of many gets the seat.
	back.conn.Close(websocket.StatusNormalClosure, "")
	next := others[0].join.From
	for i, frames := range meshSettled(others...) {
		if len(frames) != 1 || frames[0].Type != "leave" || frames[0].From != back.join.From || frames[0].Host != next {
			t.Errorf("%s received %+v, want the leave of %s, host %s", others[i].join.DisplayName, frames, back.join.From, next)
		}
	}
	in := meshRush(ctx, t, addr, wsDial{room: room.RoomID}, rush)
	if len(in) != 1 {
		t.Fatalf("%d got the one free seat", len(in))
	}
	if in[0].join.Host != next || len(in[0].join.Peers) != players-1 {
		t.Errorf("the new one came to %+v, want host %s", in[0].join, next)
	}
	for i, frames := range meshSettled(others...) {
		if len(frames) != 1 || frames[0].Type != "join" || frames[0].From != in[0].join.From || frames[0].DisplayName != in[0].join.DisplayName {
			t.Errorf("%s received %+v, want the join of %s", others[i].join.DisplayName, frames, in[0].join.From)
		}
	}
}

// A full room, all of it behind one address, comes in at once with the right code
// and the right password: nobody has guessed wrong, so nobody is refused.
func TestMeshComesInAtOnce(t *testing.T) {
	server := testkit.StartBinary(t, "ROOMS=open")
	addr := strings.TrimPrefix(server.Base, "http://")
	ctx := meshContext(t)
	for _, password := range []string{"", "open sesame"} {
		room := meshOpen(t, addr, fmt.Sprintf(`{"maxPlayers":%d,"password":%q}`, maxPlayers, password))
		var all sync.WaitGroup
		start := make(chan struct{})
		for i := range maxPlayers {
			d := wsDial{room: room.Code, v1: i%2 == 0, name: fmt.Sprintf("player %d", i), password: password}
			all.Go(func() {
				<-start
				c, refused, word, err := meshDial(ctx, addr, d)
				if err != nil || refused != 0 {
					t.Errorf("%s was refused, password %q: %d %s %v", d.name, password, refused, word, err)
				} else {
					c.begin(t, nil)
				}
			})
		}
		close(start)
		all.Wait()
	}
}

// meshJudge fails the test unless these are so many frames of each type from each
// other member, each once, in the order in which they were sent.
func meshJudge(t testing.TB, c *meshClient, all []*meshClient, frames []meshFrame, want map[string]int) {
	t.Helper()
	type kind struct{ from, typ string }
	count, last := map[kind]int{}, map[string]int{}
	for _, f := range frames {
		count[kind{f.From, f.Type}]++
		if n := f.payload().N; n <= last[f.From] || f.To != c.join.From || f.RoomID != c.join.RoomID {
			t.Errorf("%s received %s number %d of %s after %d, for %s", c.join.DisplayName, f.Type, n, f.From, last[f.From], f.To)
		} else {
			last[f.From] = n
		}
		if f.Type == "answer" && f.payload().Re == 0 {
			t.Errorf("%s received an answer to nothing", c.join.DisplayName)
		}
	}
	total := 0
	for _, other := range all {
		if other == c {
			continue
		}
		for typ, n := range want {
			total += n
			if got := count[kind{other.join.From, typ}]; got != n {
				t.Errorf("%s received %d of type %s from %s, want %d", c.join.DisplayName, got, typ, other.join.DisplayName, n)
			}
		}
	}
	if len(frames) != total {
		t.Errorf("%s received %d frames, want %d", c.join.DisplayName, len(frames), total)
	}
}

// What rooms are for: each of four has a data channel with each other.
func TestMeshConnects(t *testing.T) {
	const players = 4
	server := testkit.StartBinary(t, "ROOMS=open")
	addr := strings.TrimPrefix(server.Base, "http://")
	ctx := meshContext(t)
	room := meshOpen(t, addr, "")
	said, failed := make(chan string), make(chan error, 1)
	peers := make([]*meshPeer, players)
	for i := range peers {
		peers[i] = newMeshPeer(ctx, t, addr, wsDial{room: room.Code, name: fmt.Sprintf("player %d", i)}, said, failed)
	}
	want := map[string]bool{}
	for _, a := range peers {
		for _, b := range peers {
			if a != b {
				want["from "+a.id+" to "+b.id] = true
			}
		}
	}
	for len(want) > 0 {
		select {
		case text := <-said:
			if !want[text] {
				t.Errorf("received %q, unasked or twice", text)
			}
			delete(want, text)
		case err := <-failed:
			t.Fatal(err)
		case <-ctx.Done():
			t.Fatalf("still missing: %v", want)
		}
	}
}

// A meshPeer is a player with a WebRTC connection to each other.
type meshPeer struct {
	ctx    context.Context
	t      *testing.T
	conn   *websocket.Conn
	id     string
	said   chan<- string // what came over data channels, to all players
	failed chan<- error  // what went wrong in a callback of theirs; the first counts
	done   chan struct{} // closed when signal has returned

	links map[string]*meshLink // by the other's ID; owned by signal
}

// A meshLink is the connection to one other.
type meshLink struct {
	pc    *webrtc.PeerConnection
	early []webrtc.ICECandidateInit // arrived before the remote description
}

// newMeshPeer enters the room, offers to all who are there, and answers whoever
// comes later.
func newMeshPeer(ctx context.Context, t *testing.T, addr string, d wsDial, said chan<- string, failed chan<- error) *meshPeer {
	t.Helper()
	c, refused, word, err := meshDial(ctx, addr, d)
	if err != nil || refused != 0 {
		t.Fatalf("%s did not get in: %d %s %v", d.name, refused, word, err)
	}
	p := &meshPeer{ctx: ctx, t: t, conn: c.conn, id: c.join.From, said: said,
		failed: failed, done: make(chan struct{}), links: map[string]*meshLink{}}
	go p.signal(c.join)
	t.Cleanup(func() {
		p.conn.Close(websocket.StatusNormalClosure, "")
		<-p.done
		for _, l := range p.links {
			if err := l.pc.GracefulClose(); err != nil {
				t.Error(err)
			}
		}
	})
	return p
}

// signal reacts to what arrives, until the connection ends.
func (p *meshPeer) signal(join meshFrame) {
	defer close(p.done)
	for _, other := range join.Peers {
		if err := p.offer(other.ID); err != nil {
			p.fail(err)
		}
	}
	for {
		_, data, err := p.conn.Read(p.ctx)
		if err != nil {
			if websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				p.fail(err)
			}
			return
		}
		var f meshFrame
		if err := json.Unmarshal(data, &f); err != nil {
			p.fail(fmt.Errorf("frame %s: %w", data, err))
		} else if err := p.react(f); err != nil {
			p.fail(fmt.Errorf("%s: %w", data, err))
		}
	}
}

func (p *meshPeer) react(f meshFrame) error {
	switch f.Type {
	case "join", "leave":
		return nil
	case "offer", "answer", "candidate":
	default:
		return errors.New("unexpected")
	}
	l, err := p.link(f.From)
	if err != nil {
		return err
	}
	if f.Type == "candidate" {
		var candidate webrtc.ICECandidateInit
		if err := json.Unmarshal(f.Payload, &candidate); err != nil {
			return err
		}
		if l.pc.RemoteDescription() == nil {
			l.early = append(l.early, candidate)
			return nil
		}
		return l.pc.AddICECandidate(candidate)
	}
	var description webrtc.SessionDescription
	if err := json.Unmarshal(f.Payload, &description); err != nil {
		return err
	}
	if err := l.pc.SetRemoteDescription(description); err != nil {
		return err
	}
	for _, candidate := range l.early {
		if err := l.pc.AddICECandidate(candidate); err != nil {
			return err
		}
	}
	if l.early = nil; f.Type == "answer" {
		return nil
	}
	answer, err := l.pc.CreateAnswer(nil)
	if err == nil {
		err = l.pc.SetLocalDescription(answer)
	}
	if err == nil {
		p.send("answer", f.From, answer)
	}
	return err
}

func (p *meshPeer) offer(to string) error {
	l, err := p.link(to)
	if err != nil {
		return err
	}
	channel, err := l.pc.CreateDataChannel("mesh", nil)
	if err != nil {
		return err
	}
	p.use(to, channel)
	offer, err := l.pc.CreateOffer(nil)
	if err == nil {
		err = l.pc.SetLocalDescription(offer) // candidates may overtake the offer
	}
	if err == nil {
		p.send("offer", to, offer)
	}
	return err
}

// link returns the connection to another, made if need be.
func (p *meshPeer) link(to string) (*meshLink, error) {
	if l := p.links[to]; l != nil {
		return l, nil
	}
	pc, err := testkit.WebRTCLoopback().NewPeerConnection(webrtc.Configuration{})
	if err != nil {
		return nil, err
	}
	pc.OnICECandidate(func(c *webrtc.ICECandidate) {
		if c != nil {
			p.send("candidate", to, c.ToJSON())
		}
	})
	pc.OnConnectionStateChange(func(state webrtc.PeerConnectionState) {
		if state == webrtc.PeerConnectionStateFailed {
			p.fail(errors.New("two players cannot reach each other"))
		}
	})
	pc.OnDataChannel(func(channel *webrtc.DataChannel) { p.use(to, channel) })
	p.links[to] = &meshLink{pc: pc}
	return p.links[to], nil
}

// use greets the other over a data channel.
func (p *meshPeer) use(to string, channel *webrtc.DataChannel) {
	channel.OnOpen(func() {
		if err := channel.SendText("from " + p.id); err != nil {
			p.fail(err)
		}
	})
	channel.OnMessage(func(m webrtc.DataChannelMessage) {
		text := string(m.Data)
		if text != "from "+to {
			p.fail(fmt.Errorf("%q came over the channel with %s", text, to))
		}
		select {
		case p.said <- text + " to " + p.id:
		case <-p.ctx.Done():
		}
	})
}

func (p *meshPeer) send(typ, to string, payload any) {
	data, err := json.Marshal(map[string]any{"type": typ, "to": to, "payload": payload})
	if err == nil {
		err = p.conn.Write(p.ctx, websocket.MessageText, data)
	}
	if err != nil {
		p.fail(err)
	}
}

func (p *meshPeer) fail(err error) {
	select {
	case p.failed <- err:
	default:
	}
}

// One of eight stops reading while all go on: it alone is put out, what is for it
// waits within bounds, and it can come back to that; the others notice nothing.
func TestSlowMember(t *testing.T) {
	const (
		players = 8
		pace    = 20 * time.Millisecond
		calm    = 75  // rounds in which all read
		after   = 40  // rounds once the slow one is out
		most    = 600 // rounds
		large   = 8 << 10
	)
	ts, addr := newLoopServer(t, "ROOMS=open", "WS_MAX_MSG=65536")
	ctx := meshContext(t)
	room := meshOpen(t, addr, "")
	slow := tcpClient(t, "http://"+addr, wsDial{room: room.RoomID, name: "slow"}, func(c *net.TCPConn) { c.SetReadBuffer(32 << 10) })
	slow.conn.SetDeadline(time.Now().Add(testkit.Patience))
	self, err := meshNext(slow)
	if err != nil {
		t.Fatal(err)
	}
	others := make([]*meshClient, players-1)
	for i := range others {
		others[i] = meshJoin(ctx, t, addr, wsDial{room: room.RoomID, name: fmt.Sprintf("player %d", i)}, nil)
		if _, err := meshNext(slow); err != nil {
			t.Fatal(err)
		}
	}
	meshSettled(others...) // they have been told of each other
	id, err := parseAppID(room.RoomID)
	if err != nil {
		t.Fatal(err)
	}
	session := ts.memory.find(id)
	isOut := func() bool {
		session.mu.Lock()
		defer session.mu.Unlock()
		return session.member(self.From, nil).holder == nil
	}

	// In a round everyone sends the slow one much, and another a little that is
	// timed from when it was due: a sender who is held back is late too.
	type key struct {
		from string
		n    int
	}
	var mu sync.Mutex
	forSlow := map[string][]int{}     // guarded by mu: numbers by sender
	timed := map[string]map[key]int{} // guarded by mu: rounds, by receiver
	fill := strings.Repeat("x", large)
	play := func(first int, enough func(round int) bool) (next int) {
		var writing sync.WaitGroup
		due := make([]chan time.Time, len(others))
		for i, c := range others {
			due[i] = make(chan time.Time, most)
			writing.Go(func() {
				for round := first; ; round++ {
					at, ok := <-due[i]
					if !ok {
						return
					}
					to := others[(i+1+round%(len(others)-1))%len(others)].join.From
					n, err := c.send("candidate", self.From, meshPayload{Fill: fill})
					m, err2 := c.send("candidate", to, meshPayload{At: at.UnixNano()})
					if err := errors.Join(err, err2); err != nil {
						t.Errorf("%s: %v", c.join.DisplayName, err)
						return
					}
					mu.Lock()
					forSlow[c.join.From] = append(forSlow[c.join.From], n)
					if timed[to] == nil {
						timed[to] = map[key]int{}
					}
					timed[to][key{c.join.From, m}] = round
					mu.Unlock()
				}
			})
		}
		tick := time.NewTicker(pace)
		defer tick.Stop()
		for next = first; next < most && !enough(next); next++ {
			at := <-tick.C
			for i := range due {
				due[i] <- at
			}
		}
		for i := range due {
			close(due[i])
		}
		writing.Wait()
		return next
	}

	early := map[string][]int{} // what the slow one has read before it is out
	read := func() error {
		text, err := meshText(slow)
		if err == nil { // JSON would take it too long
			var n int
			_, from, _ := strings.Cut(text, `"from":"`)
			from, _, _ = strings.Cut(from, `"`)
			_, number, _ := strings.Cut(text, `"payload":{"N":`)
			if _, err := fmt.Sscan(number[:min(len(number), 16)], &n); err != nil {
				return fmt.Errorf("received %.200s: %w", text, err)
			}
			early[from] = append(early[from], n)
		}
		return err
	}
	var reading sync.WaitGroup
	reading.Go(func() {
		for range calm * len(others) {
			if err := read(); err != nil {
				t.Error("while the slow one still read: ", err)
				return
			}
		}
	})
	stall := play(0, func(round int) bool { return round == calm })
	if reading.Wait(); t.Failed() {
		return
	}
	if n := ts.metric("parley_mailbox_bytes"); n > 1<<20 {
		t.Errorf("%v bytes wait while all read", n)
	}
	outSince := most
	rounds := play(stall, func(round int) bool {
		if outSince == most && isOut() {
			outSince = round
		}
		return round >= outSince+after && round >= stall+calm
	})
	if outSince == most {
		t.Fatal("the slow one is not put out")
	}
	testkit.Eventually(t, "its close is counted", func() bool { return ts.metric(`parley_ws_closes_total{code="4408"}`) == 1 })
	if n := ts.metric("parley_ws_connections"); n != players-1 {
		t.Errorf("%v connections, want %d", n, players-1)
	}
	// More than 1 MiB put it out, and all of that still waits.
	waiting := ts.metric("parley_mailbox_bytes")
	if waiting < 1<<20 || waiting > 1<<20+2*65536+players*large {
		t.Errorf("%v bytes wait, want 1 MiB and little more", waiting)
	}

	// The others: nothing lost, nothing twice, and hardly later than before.
	refused := map[key]bool{}
	var before, during []time.Duration
	for _, c := range others {
		ahead := c.processed() // the refusals are all there
		want := timed[c.join.From]
		isTimed := func(f meshFrame) bool { return f.Type == "candidate" }
		count := func(frames []meshFrame) (n int) {
			for _, f := range frames {
				if isTimed(f) {
					n++
				}
			}
			return n
		}
		ahead = append(ahead, c.await("what the others sent", func(frames []meshFrame) bool {
			return count(ahead)+count(frames) >= len(want)
		})...)
		last := map[string]int{}
		for _, f := range ahead {
			switch {
			case f.Type == "error" && f.Code == "peer_absent" && slices.Contains(forSlow[c.join.From], f.Ref):
				refused[key{c.join.From, f.Ref}] = true
			case isTimed(f):
				p := f.payload()
				round, ok := want[key{f.From, p.N}]
				if !ok || p.N <= last[f.From] {
					t.Fatalf("%s received number %d of %s after %d, wanted: %t", c.join.DisplayName, p.N, f.From, last[f.From], ok)
				}
				last[f.From] = p.N
				if late := f.at.Sub(time.Unix(0, p.At)); round < stall {
					before = append(before, late)
				} else {
					during = append(during, late)
				}
			default:
				t.Errorf("%s received %s %s from %s", c.join.DisplayName, f.Type, f.Code, f.From)
			}
		}
	}
	if n := len(before) + len(during); n != rounds*len(others) {
		t.Errorf("%d frames arrived among the others, want %d", n, rounds*len(others))
	}
	if len(refused) == 0 {
		t.Error("however much waited for the slow one, nothing was refused")
	}
	p99 := func(all []time.Duration) time.Duration {
		slices.Sort(all)
		return all[len(all)*99/100]
	}
	calmly, stalled := p99(before), p99(during)
	t.Logf("p99 %v before and %v during: %.2f times; out after %d rounds, %.0f bytes waiting, %d of %d frames refused",
		calmly, stalled, float64(stalled)/float64(calmly), outSince-stall, waiting, len(refused), rounds*len(others))
	if stalled > 5*calmly+500*time.Millisecond { // if one held all up it would be for seconds
		t.Errorf("p99 %v, and %v before", stalled, calmly)
	}

	// The slow one reads what the network had, comes back, and gets what waited.
	for err = nil; err == nil; {
		err = read()
	}
	back := meshJoin(ctx, t, addr, wsDial{room: room.RoomID, resume: self.Resume}, nil)
	if back.join.From != self.From {
		t.Errorf("came back as %s, was %s", back.join.From, self.From)
	}
	late := map[string][]int{}
	for i, frames := range meshSettled(append([]*meshClient{back}, others...)...) {
		for _, f := range frames {
			if i > 0 {
				t.Errorf("%s received %s from %s as the slow one came back", others[i-1].join.DisplayName, f.Type, f.From)
			} else if p := f.payload(); p.Fill == fill {
				late[f.From] = append(late[f.From], p.N)
			} else {
				t.Errorf("came back to %s %s", f.Type, f.From)
			}
		}
	}
	lost, waited := 0, 0
	for from, all := range forSlow {
		accepted := slices.DeleteFunc(slices.Clone(all), func(n int) bool { return refused[key{from, n}] })
		waited += len(late[from])
		gap := len(accepted) - len(early[from]) - len(late[from])
		if lost += gap; gap < 0 || !slices.Equal(accepted[:len(early[from])], early[from]) || !slices.Equal(accepted[len(accepted)-len(late[from]):], late[from]) {
			t.Errorf("of %s it read %v, then %v, want %v", from, early[from], late[from], accepted)
		}
	}
	t.Logf("%d frames waited for it; %d were being written as it was put out", waited, lost)
	if waited < (1<<20)/(2*large) {
		t.Errorf("only %d frames waited", waited)
	}
	// Those that had left the mailbox for a socket that took no more are gone.
	if lost > takeFrames {
		t.Errorf("%d frames were accepted and are gone", lost)
	}
	if n := ts.metric("parley_mailbox_bytes"); n != 0 {
		t.Errorf("%v bytes still wait", n)
	}
}

// meshNext returns the next frame of a client that reads when it is told to.
func meshNext(c *rawClient) (f meshFrame, err error) {
	text, err := meshText(c)
	if err == nil {
		err = json.Unmarshal([]byte(text), &f)
	}
	return f, err
}

func meshText(c *rawClient) (string, error) {
	op, data, err := c.next()
	for err == nil && op == opPing {
		op, data, err = c.next()
	}
	if err == nil && op != opText {
		err = fmt.Errorf("opcode %d, % x", op, data)
	}
	return string(data), err
}
