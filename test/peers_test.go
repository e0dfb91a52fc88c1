package test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"parley/test/testkit"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/pion/webrtc/v4"
)

// What the server is for: two peers that share nothing but a code end up with a
// data channel between them.
func TestPeersConnect(t *testing.T) {
	server := testkit.StartBinary(t)

	t.Run("offer waits for the other", func(t *testing.T) {
		ctx := rtcContext(t)
		code, appID := server.Mint(ctx, t)
		a := newRTCPeer(ctx, t, server, appID, "A")
		a.offer()
		a.await("pong", a.ping) // so the server has the offer
		b := newRTCPeer(ctx, t, server, server.Redeem(ctx, t, code), "B")
		exchangeGreetings(t, a, b)
	})

	t.Run("offer at room_full", func(t *testing.T) {
		ctx := rtcContext(t)
		code, appID := server.Mint(ctx, t)
		a := newRTCPeer(ctx, t, server, appID, "A")
		var b *rtcPeer
		a.await("room_full", func() { b = newRTCPeer(ctx, t, server, server.Redeem(ctx, t, code), "B") })
		a.offer()
		exchangeGreetings(t, a, b)
	})
}

func rtcContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// exchangeGreetings sends a message each way over the data channel, once it is open.
func exchangeGreetings(t *testing.T, peers ...*rtcPeer) {
	t.Helper()
	for _, p := range peers {
		channel := rtcReceive(p, p.opened, "the data channel to open")
		if err := channel.SendText("hello from " + p.side); err != nil {
			t.Fatal(err)
		}
	}
	for i, p := range peers {
		other := peers[1-i]
		if got, want := rtcReceive(p, p.messages, "a message"), "hello from "+other.side; got != want {
			t.Errorf("%s got %q, want %q", p.side, got, want)
		}
	}
}

// An rtcPeer is one end of a WebRTC connection and its signaling client.
type rtcPeer struct {
	ctx  context.Context
	t    *testing.T
	side string
	ws   *websocket.Conn
	pc   *webrtc.PeerConnection

	opened   chan *webrtc.DataChannel
	messages chan string   // over the data channel
	frames   chan string   // types of the frames that are not the peers' own
	failed   chan error    // what went wrong in a callback; the first counts
	done     chan struct{} // closed when signal has returned

	early []webrtc.ICECandidateInit // arrived before the remote description; owned by signal
}

// An rtcFrame is what peers and server say to each other. A session
// description has the same JSON form.
type rtcFrame struct {
	Type      string                   `json:"type"`
	SDP       string                   `json:"sdp,omitempty"`
	Candidate *webrtc.ICECandidateInit `json:"candidate,omitempty"`
	Code      string                   `json:"code,omitempty"`  // of an error
	Error     string                   `json:"error,omitempty"` // of an error
}

// newRTCPeer takes a seat and answers whatever offer comes, until the test ends.
func newRTCPeer(ctx context.Context, t *testing.T, server *testkit.Process, appID, side string) *rtcPeer {
	t.Helper()
	p := dialRTCPeer(ctx, t, server, appID, side)
	p.start(webrtc.Configuration{})
	return p
}

// dialRTCPeer takes a seat.
func dialRTCPeer(ctx context.Context, t *testing.T, server *testkit.Process, appID, side string) *rtcPeer {
	t.Helper()
	p := &rtcPeer{
		ctx: ctx, t: t, side: side,
		opened:   make(chan *webrtc.DataChannel, 1),
		messages: make(chan string, 1),
		frames:   make(chan string, 16),
		failed:   make(chan error, 1),
		done:     make(chan struct{}),
	}
	ws, _, err := websocket.Dial(ctx, server.WSURL("/ws?appID="+appID+"&side="+side), nil)
	if err != nil {
		t.Fatal(err)
	}
	p.ws = ws
	return p
}

// start answers whatever offer comes, until the test ends.
func (p *rtcPeer) start(config webrtc.Configuration) {
	p.t.Helper()
	var err error
	if p.pc, err = testkit.WebRTCLoopback().NewPeerConnection(config); err != nil {
		p.ws.CloseNow()
		p.t.Fatal(err)
	}
	p.pc.OnICECandidate(func(c *webrtc.ICECandidate) {
		if c != nil {
			candidate := c.ToJSON()
			p.send(rtcFrame{Type: "ice", Candidate: &candidate})
		}
	})
	p.pc.OnConnectionStateChange(func(state webrtc.PeerConnectionState) {
		if state == webrtc.PeerConnectionStateFailed {
			p.fail(errors.New("the peers cannot reach each other"))
		}
	})
	p.pc.OnDataChannel(p.use)
	go p.signal()
	p.t.Cleanup(func() {
		p.ws.Close(websocket.StatusNormalClosure, "")
		<-p.done
		if err := p.pc.GracefulClose(); err != nil {
			p.t.Error(err)
		}
	})
}

// offer opens a data channel and offers it to the other side.
func (p *rtcPeer) offer() {
	p.t.Helper()
	channel, err := p.pc.CreateDataChannel("greetings", nil)
	if err != nil {
		p.t.Fatal(err)
	}
	p.use(channel)
	offer, err := p.pc.CreateOffer(nil)
	if err != nil {
		p.t.Fatal(err)
	}
	// Candidates are gathered, and sent, from here on: some may well overtake
	// the offer.
	if err := p.pc.SetLocalDescription(offer); err != nil {
		p.t.Fatal(err)
	}
	p.send(rtcFrame{Type: "offer", SDP: offer.SDP})
}

// ping asks the server for a pong, which says that it has all that was sent before.
func (p *rtcPeer) ping() { p.send(rtcFrame{Type: "ping"}) }

// await waits for a frame of the server that act brings about.
func (p *rtcPeer) await(frame string, act func()) {
	p.t.Helper()
	act()
	for got := ""; got != frame; {
		got = rtcReceive(p, p.frames, frame)
	}
}

// signal reacts to the frames that arrive, until the connection ends.
func (p *rtcPeer) signal() {
	defer close(p.done)
	for {
		_, data, err := p.ws.Read(p.ctx)
		if err != nil {
			if websocket.CloseStatus(err) != websocket.StatusNormalClosure {
				p.fail(err)
			}
			return
		}
		var f rtcFrame
		if err := json.Unmarshal(data, &f); err != nil {
			p.fail(fmt.Errorf("frame %s: %w", data, err))
			return
		}
		if err := p.react(f); err != nil {
			p.fail(fmt.Errorf("%s frame: %w", f.Type, err))
		}
	}
}

func (p *rtcPeer) react(f rtcFrame) error {
	switch f.Type {
	case "offer":
		if err := p.setRemote(webrtc.SDPTypeOffer, f.SDP); err != nil {
			return err
		}
		answer, err := p.pc.CreateAnswer(nil)
		if err != nil {
			return err
		}
		if err := p.pc.SetLocalDescription(answer); err != nil {
			return err
		}
		p.send(rtcFrame{Type: "answer", SDP: answer.SDP})
		return nil
	case "answer":
		return p.setRemote(webrtc.SDPTypeAnswer, f.SDP)
	case "ice":
		if f.Candidate == nil {
			return errors.New("no candidate in it")
		}
		if p.pc.RemoteDescription() == nil {
			p.early = append(p.early, *f.Candidate)
			return nil
		}
		return p.pc.AddICECandidate(*f.Candidate)
	case "error":
		return fmt.Errorf("%s: %s", f.Code, f.Error)
	}
	select {
	case p.frames <- f.Type:
		return nil
	default:
		return errors.New("more of these than any test waits for")
	}
}

// setRemote accepts the other side's description, and the candidates that came
// before it.
func (p *rtcPeer) setRemote(typ webrtc.SDPType, sdp string) error {
	if err := p.pc.SetRemoteDescription(webrtc.SessionDescription{Type: typ, SDP: sdp}); err != nil {
		return err
	}
	for _, candidate := range p.early {
		if err := p.pc.AddICECandidate(candidate); err != nil {
			return err
		}
	}
	p.early = nil
	return nil
}

// use takes a data channel, this side's own or the other's.
func (p *rtcPeer) use(channel *webrtc.DataChannel) {
	channel.OnOpen(func() { p.opened <- channel })
	channel.OnMessage(func(m webrtc.DataChannelMessage) { p.messages <- string(m.Data) })
}

func (p *rtcPeer) send(f rtcFrame) {
	data, err := json.Marshal(f)
	if err == nil {
		err = p.ws.Write(p.ctx, websocket.MessageText, data)
	}
	if err != nil {
		p.fail(err)
	}
}

func (p *rtcPeer) fail(err error) {
	select {
	case p.failed <- err:
	default:
	}
}

// rtcReceive waits for what p gets on a channel of its own.
func rtcReceive[T any](p *rtcPeer, from <-chan T, what string) T {
	p.t.Helper()
	select {
	case v := <-from:
		return v
	case err := <-p.failed:
		p.t.Fatalf("%s, waiting for %s: %v", p.side, what, err)
	case <-p.ctx.Done():
		p.t.Fatalf("%s, waiting for %s: %v", p.side, what, p.ctx.Err())
	}
	panic("unreachable")
}
