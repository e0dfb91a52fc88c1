// Package pairing connects two programs that share an invitation: by a data
// channel between them, which a parley server helps to make and then has no part
// in. Copy it, and make of it what you need.
//
// Left out: what web/parley.js does when networks change. A WebSocket that breaks
// before the programs are connected is an error here, and so is, later, the loss
// of the connection between them.
package pairing

import (
	"bytes"
	"context"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/coder/websocket"
	"github.com/coder/websocket/wsjson"
	"github.com/pion/webrtc/v4"
)

// A Session is where two programs meet.
type Session struct {
	Code       string             `json:"code"`
	AppID      string             `json:"appID"`
	ExpiresAt  time.Time          `json:"expiresAt"`
	ICEServers []webrtc.ICEServer `json:"iceServers"`
	Throttled  bool               `json:"throttled"` // there is a relay, and not for this session

	server string
	side   string // A minted the code, B redeemed it
	key    string // by which the two know each other; the server never sees it
}

// Mint opens a session. The other program joins it with s.Invitation().
func Mint(ctx context.Context, server string) (*Session, error) {
	s := &Session{server: strings.TrimSuffix(server, "/"), side: "A", key: rand.Text()}
	return s, s.call(ctx, "/rendezvous/code", struct{}{})
}

// Invitation returns the code and the key, for people to pass on.
func (s *Session) Invitation() string { return s.Code + "-" + s.key }

// Redeem joins the session of an invitation. That works once.
func Redeem(ctx context.Context, server, invitation string) (*Session, error) {
	code, key, ok := strings.Cut(invitation, "-")
	if !ok || key == "" {
		return nil, errors.New("an invitation is a code and a key, with a hyphen between them")
	}
	s := &Session{server: strings.TrimSuffix(server, "/"), side: "B", key: key}
	return s, s.call(ctx, "/rendezvous/redeem", map[string]string{"code": code})
}

func (s *Session) call(ctx context.Context, path string, body any) error {
	data, err := json.Marshal(body)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, s.server+path, bytes.NewReader(data))
	if err != nil {
		return err
	}
	req.Header.Set("Content-Type", "application/json")
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		var problem struct{ Error string }
		json.NewDecoder(resp.Body).Decode(&problem)
		return fmt.Errorf("%s: %s", resp.Status, problem.Error)
	}
	return json.NewDecoder(resp.Body).Decode(s)
}

// A Peer is a connection to the other program.
type Peer struct {
	ctx      context.Context // ends with the connection; its cause says why
	fail     context.CancelCauseFunc
	ws       *websocket.Conn // to the server
	pc       *webrtc.PeerConnection
	channel  *webrtc.DataChannel // set before opened is closed
	opened   chan struct{}
	low      chan struct{} // has a value when little is left to send
	messages chan []byte
}

// Connect waits for the other program, and connects to it.
func (s *Session) Connect(ctx context.Context) (*Peer, error) {
	p := &Peer{opened: make(chan struct{}), low: make(chan struct{}, 1), messages: make(chan []byte)}
	p.ctx, p.fail = context.WithCancelCause(ctx)
	if err := p.connect(s); err != nil {
		p.Close()
		return nil, err
	}
	return p, nil
}

func (p *Peer) connect(s *Session) (err error) {
	// The secret sid keeps the seat from anyone else who connects.
	seat := url.Values{"appID": {s.AppID}, "side": {s.side}, "sid": {rand.Text()}}
	p.ws, _, err = websocket.Dial(p.ctx, s.server+"/ws?"+seat.Encode(), &websocket.DialOptions{Subprotocols: []string{"parley.v1"}})
	if err != nil {
		return err
	}
	var engine webrtc.SettingEngine
	engine.SetIncludeLoopbackCandidate(true) // so that one machine will do, even without a network
	p.pc, err = webrtc.NewAPI(webrtc.WithSettingEngine(engine)).NewPeerConnection(webrtc.Configuration{ICEServers: s.ICEServers})
	if err != nil {
		return err
	}
	p.pc.OnICECandidate(func(c *webrtc.ICECandidate) {
		if c != nil { // nil means that there are no more
			candidate := c.ToJSON()
			p.tell(frame{Type: "ice", Candidate: &candidate})
		}
	})
	p.pc.OnConnectionStateChange(func(state webrtc.PeerConnectionState) {
		if state == webrtc.PeerConnectionStateFailed {
			p.fail(s.unreachable())
		}
	})
	if s.side == "B" {
		var first sync.Once // who is not verified yet could open any number
		p.pc.OnDataChannel(func(channel *webrtc.DataChannel) { first.Do(func() { p.use(channel) }) })
	}
	go p.signal(s.side)

	expiry := time.AfterFunc(time.Until(s.ExpiresAt), func() {
		if p.pc.RemoteDescription() != nil { // the other side is there
			p.fail(s.unreachable())
			return
		}
		p.fail(errors.New("the other side did not connect before the code expired"))
	})
	defer expiry.Stop()
	select {
	case <-p.opened:
	case <-p.ctx.Done():
		return context.Cause(p.ctx)
	}
	if err := p.verify(s); err != nil {
		return err
	}
	p.ws.Close(websocket.StatusNormalClosure, "") // the server is not needed any more
	return nil
}

// unreachable says why two programs that are both there do not connect.
func (s *Session) unreachable() error {
	if s.Throttled {
		return errors.New("the two machines cannot reach each other; for now the server gives this address no relay, " +
			"which it has used for many sessions (throttled): try again later")
	}
	return errors.New("the two machines cannot reach each other")
}

// use makes a data channel the one that messages go over. A opens it.
func (p *Peer) use(channel *webrtc.DataChannel) {
	channel.OnMessage(func(m webrtc.DataChannelMessage) {
		select {
		case p.messages <- m.Data: // until it is taken, the other side is held back
		case <-p.ctx.Done():
		}
	})
	channel.OnClose(func() { p.fail(errors.New("the other side closed the connection")) })
	channel.SetBufferedAmountLowThreshold(256 << 10)
	channel.OnBufferedAmountLow(func() {
		select {
		case p.low <- struct{}{}:
		default:
		}
	})
	channel.OnOpen(func() {
		p.channel = channel
		close(p.opened)
	})
}

// A frame is a message from or to the server, which passes offer, answer and ice
// on to the other side.
type frame struct {
	Type      string                   `json:"type"`
	SDP       string                   `json:"sdp,omitempty"`
	Candidate *webrtc.ICECandidateInit `json:"candidate,omitempty"`
	Error     string                   `json:"error,omitempty"`
}

// tell and signal go on until the WebSocket is closed. The end of p.ctx would cut
// it off instead, and its seat would be kept for a while.
func (p *Peer) tell(f frame) {
	if err := wsjson.Write(context.Background(), p.ws, f); err != nil {
		p.signalingFailed(err)
	}
}

func (p *Peer) signal(side string) {
	for {
		var f frame
		err := wsjson.Read(context.Background(), p.ws, &f)
		if err == nil {
			err = p.react(f, side)
		}
		if err != nil {
			p.signalingFailed(err)
			return
		}
	}
}

// signalingFailed gives up, unless the data channel is open: that needs no server.
func (p *Peer) signalingFailed(err error) {
	select {
	case <-p.opened:
	default:
		p.fail(fmt.Errorf("signaling: %w", err))
	}
}

func (p *Peer) react(f frame, side string) error {
	switch f.Type {
	case "room_full": // Both are there. Only A offers, so that offers cannot collide.
		if side == "B" || p.pc.LocalDescription() != nil {
			return nil
		}
		channel, err := p.pc.CreateDataChannel("file", nil)
		if err != nil {
			return err
		}
		p.use(channel)
		return p.describe(p.pc.CreateOffer(nil))
	case "offer", "answer":
		err := p.pc.SetRemoteDescription(webrtc.SessionDescription{Type: webrtc.NewSDPType(f.Type), SDP: f.SDP})
		if err != nil || f.Type == "answer" {
			return err
		}
		return p.describe(p.pc.CreateAnswer(nil))
	case "ice":
		if f.Candidate == nil {
			return errors.New("a frame has no candidate")
		}
		return p.pc.AddICECandidate(*f.Candidate)
	case "peer_left":
		return errors.New("the other side left")
	case "error":
		return errors.New(f.Error)
	}
	return nil // the server says more than is of use here
}

// describe tells the other side what this one offers or answers, and only then
// sets it: candidates, which begin to come with that, arrive after it.
func (p *Peer) describe(own webrtc.SessionDescription, err error) error {
	if err != nil {
		return err
	}
	p.tell(frame{Type: own.Type.String(), SDP: own.SDP})
	return p.pc.SetLocalDescription(own)
}

// verify has each side prove that it knows the key and sees the same two
// certificates. Else the peer could be someone who guessed the code, or the server
// could sit in between. Where people have no way to pass a key on, have them compare
// a short string instead, as web/verify.js does.
func (p *Peer) verify(s *Session) error {
	dtls := p.pc.SCTP().Transport()
	local, err := dtls.GetLocalParameters()
	if err != nil {
		return err
	}
	own := strings.ReplaceAll(local.Fingerprints[0].Value, ":", "")
	other := fmt.Sprintf("%x", sha256.Sum256(dtls.GetRemoteCertificate()))
	certificates := own + other
	if s.side == "B" {
		certificates = other + own
	}
	proof := func(side string) []byte { // nobody can return the other's as their own
		mac := hmac.New(sha256.New, []byte(s.key))
		mac.Write([]byte("parley example " + side + certificates))
		return mac.Sum(nil)
	}
	if _, err := p.Write(proof(s.side)); err != nil {
		return err
	}
	theirs, err := p.Receive()
	if err != nil {
		return err
	}
	if !hmac.Equal(theirs, proof(map[string]string{"A": "B", "B": "A"}[s.side])) {
		return errors.New("the other side does not know the key of the invitation")
	}
	return nil
}

// Write sends a message, of at most 64 KiB. While much is left to send it waits, so
// that a file does not pile up in memory.
func (p *Peer) Write(message []byte) (int, error) {
	for p.channel.BufferedAmount() > 1<<20 {
		select {
		case <-p.low:
		case <-p.ctx.Done():
			return 0, context.Cause(p.ctx)
		}
	}
	return len(message), p.channel.Send(message)
}

// Route says which way messages go: "directly", or "through a relay".
func (p *Peer) Route() string {
	pair, err := p.pc.SCTP().Transport().ICETransport().GetSelectedCandidatePair()
	if err == nil && pair != nil && (pair.Local.Typ == webrtc.ICECandidateTypeRelay || pair.Remote.Typ == webrtc.ICECandidateTypeRelay) {
		return "through a relay"
	}
	return "directly"
}

// Receive waits for a message.
func (p *Peer) Receive() ([]byte, error) {
	select {
	case message := <-p.messages:
		return message, nil
	case <-p.ctx.Done():
		return nil, context.Cause(p.ctx)
	}
}

// Close ends the connection, and frees the seat. Messages on their way may be lost.
func (p *Peer) Close() {
	if p.ws != nil {
		p.ws.Close(websocket.StatusNormalClosure, "")
	}
	p.fail(errors.New("closed"))
	if p.pc == nil {
		return
	}
	closed := make(chan struct{})
	go func() {
		p.pc.GracefulClose()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(time.Second):
		// The other side has been told. What is left waits for STUN and TURN servers
		// that do not answer, where TCP is blocked for more than two minutes: pion
		// cannot be told to give them up.
	}
}
