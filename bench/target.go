package main

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/uuid"
)

// patience is the longest time for one step: a call, or setting a pair up.
const patience = 10 * time.Second

// sourceAddresses is how many loopback addresses the load comes from, 127.0.0.2
// and up: one has only some 28,000 ports, and to the server each is a caller of
// its own.
const sourceAddresses = 50

// A target is the server under load.
type target struct {
	protocol
	base   *url.URL
	idle   chan *caller  // connections for further calls
	token  string        // for minting and opening rooms
	minted bool          // only sessions of a code may be joined
	dialed atomic.Uint32 // connections so far
}

// newTarget refuses, unless anywhere is set, what is not on this machine.
func newTarget(rawURL string, p protocol, anywhere bool) (*target, error) {
	base, err := url.Parse(rawURL)
	if err != nil {
		return nil, err
	}
	if base.Scheme != "http" || base.Host == "" || strings.Trim(base.Path, "/") != "" || base.RawQuery != "" {
		return nil, fmt.Errorf("-url %s: want http://host:port (the load is not sent over TLS: give the address behind the proxy)", rawURL)
	}
	if base.Port() == "" {
		base.Host = net.JoinHostPort(base.Hostname(), "80")
	}
	if !anywhere && !onLoopback(base.Hostname()) {
		return nil, fmt.Errorf("-url %s is not on this machine. A load can take a server down, and looks like an attack to everyone on the way: add -anywhere if the server is yours", rawURL)
	}
	return &target{protocol: p, base: base, idle: make(chan *caller, maxWorkers)}, nil
}

// onLoopback reports whether a host name leads to this machine for certain. Any
// name but one may be resolved to anywhere.
func onLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

func (t *target) dial() (net.Conn, error) {
	d := net.Dialer{Timeout: patience, Control: sharePorts}
	host := t.base.Hostname()
	if ip := net.ParseIP(host); ip != nil && ip.IsLoopback() && ip.To4() != nil {
		d.LocalAddr = &net.TCPAddr{IP: net.IPv4(127, 0, 0, byte(2+t.dialed.Add(1)%sourceAddresses))}
	}
	return d.Dial("tcp", t.base.Host)
}

// open opens a WebSocket.
func (t *target) open(path string) (*conn, error) {
	c, err := t.dial()
	if err != nil {
		return nil, err
	}
	ws := &conn{Conn: c}
	ws.SetDeadline(time.Now().Add(patience))
	if err := ws.upgrade(t.base.Host, path); err != nil {
		ws.Close()
		return nil, err
	}
	return ws, nil
}

// A caller is a connection that makes one API call after the other. An
// http.Client would hand each over to two other goroutines, and wake one processor
// for the other, which the server would pay for too.
type caller struct {
	net.Conn
	r *bufio.Reader
}

func (t *target) caller() (*caller, error) {
	select {
	case c := <-t.idle:
		return c, nil
	default:
	}
	c, err := t.dial()
	if err != nil {
		return nil, err
	}
	return &caller{c, bufio.NewReader(c)}, nil
}

// hangUp closes the connections for further calls, before the server does.
func (t *target) hangUp() {
	for {
		select {
		case c := <-t.idle:
			c.Close()
		default:
			return
		}
	}
}

// call makes an API call, and decodes the answer into out.
func (t *target) call(method, path, body string, out any) error {
	c, err := t.caller()
	if err != nil {
		return err
	}
	c.SetDeadline(time.Now().Add(patience))
	res, err := c.do(method, path, t.base.Host, t.token, body)
	if err != nil {
		c.Close()
		return fmt.Errorf("%s %s: %w", method, path, err)
	}
	defer res.Body.Close()
	if res.StatusCode/100 != 2 {
		c.Close()
		return newRefusal(method+" "+path, res)
	}
	text, err := io.ReadAll(res.Body)
	if err == nil {
		err = json.Unmarshal(text, out)
	}
	if err != nil || res.Close {
		c.Close()
		return err
	}
	select {
	case t.idle <- c:
	default:
		c.Close()
	}
	return nil
}

func (c *caller) do(method, path, host, token, body string) (*http.Response, error) {
	if token != "" {
		token = "Authorization: Bearer " + token + "\r\n"
	}
	_, err := fmt.Fprintf(c, "%s %s HTTP/1.1\r\nHost: %s\r\n%sContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s",
		method, path, host, token, len(body), body)
	if err != nil {
		return nil, err
	}
	return http.ReadResponse(c.r, nil)
}

// A refusal is an answer that is an error.
type refusal struct {
	what   string
	status int
	code   string // the server's word for it
}

// newRefusal reads the error out of an answer.
func newRefusal(what string, res *http.Response) *refusal {
	var body struct{ Code string }
	json.NewDecoder(io.LimitReader(res.Body, 4<<10)).Decode(&body) // a proxy's is no JSON
	return &refusal{what, res.StatusCode, body.Code}
}

func (r *refusal) Error() string {
	text := fmt.Sprintf("%s was refused: %d %s", r.what, r.status, r.code)
	if hint := r.hint(); hint != "" {
		text += " (" + hint + ")"
	}
	return text
}

// hint says what to do about a limit that is in the way of the load.
func (r *refusal) hint() string {
	switch r.code {
	case "codes_exhausted":
		return "codes stay taken until they expire: start the server with CODE_DIGITS=8"
	case "at_capacity":
		return "start the server with a larger MAX_SESSIONS or MAX_CONNS"
	case "too_many_codes", "too_many_connections", "rate_limited", "too_many_attempts":
		return "start the server with RATE_EXEMPT=127.0.0.0/8, or the address the load comes from"
	}
	return ""
}

// refusedWith reports whether err is a refusal with one of these words.
func refusedWith(err error, codes ...string) bool {
	var r *refusal
	if !errors.As(err, &r) {
		return false
	}
	for _, code := range codes {
		if r.code == code {
			return true
		}
	}
	return false
}

// probe looks whether the server is a parley, and which sessions it lets one
// join. It returns the server's version.
func (t *target) probe() (version string, err error) {
	var about struct{ Version string }
	if err := t.call(http.MethodGet, "/version", "", &about); err != nil {
		return "", fmt.Errorf("%s does not answer as parley does: %w", t.base, err)
	}
	c, err := t.open("/ws?side=A&appID=" + uuid.NewString())
	if refusedWith(err, "unknown_session") {
		t.minted = true
	} else if err != nil {
		return "", err
	} else {
		leave(c)
	}
	return about.Version, nil
}

// A protocol is how a server makes pairs.
type protocol struct {
	// pair sets one up, with a code if the server has codes and one is asked for.
	pair func(t *target, withCode bool) (a, b *conn, err error)
	// message wraps what is for the peer to.
	message func(to, kind, content string) string
	exact   bool // messages arrive byte for byte
}

func parleyProtocol() protocol    { return protocol{pairParley, plainMessage, true} }
func yardstickProtocol() protocol { return protocol{pairYardstick, plainMessage, true} }
func peerJSProtocol() protocol    { return protocol{pairPeerJS, peerJSMessage, false} }

// candidate is what ICE candidates look like, more or less.
const candidate = "candidate:842163049 1 udp 1677729535 192.0.2.17 52371 typ srflx raddr 0.0.0.0 rport 0 generation 0 "

// payload makes a message of the given number of bytes, or of as few as it can
// have, with a number in it.
func payload(size int, wrap func(content string) string) []byte {
	content := func(n int) string {
		text := strings.Repeat(candidate, n/len(candidate)+1)[:n]
		return `"candidate":"` + text + `",` + numberZero
	}
	bare := len(wrap(content(0)))
	return []byte(wrap(content(max(0, size-bare))))
}

// payload makes a message for a peer.
func (p *protocol) payload(to, kind string, size int) []byte {
	return payload(size, func(content string) string { return p.message(to, kind, content) })
}

func plainMessage(_, kind, content string) string { return `{"type":"` + kind + `",` + content + `}` }

// rendezvous mints a code and redeems it. It calls done after each.
func (t *target) rendezvous(done func()) (appID string, err error) {
	var minted, redeemed struct{ Code, AppID string }
	if err := t.call(http.MethodPost, "/rendezvous/code", "", &minted); err != nil {
		return "", err
	}
	done()
	if err := t.call(http.MethodPost, "/rendezvous/redeem", `{"code":"`+minted.Code+`"}`, &redeemed); err != nil {
		return "", err
	}
	done()
	if minted.AppID == "" || minted.AppID != redeemed.AppID {
		return "", errors.New("the code leads to another session than was minted with it")
	}
	return minted.AppID, nil
}

func pairParley(t *target, withCode bool) (a, b *conn, err error) {
	id := uuid.NewString()
	if withCode || t.minted {
		if id, err = t.rendezvous(func() {}); err != nil {
			return nil, nil, err
		}
	}
	return t.sides("/ws?appID=" + id)
}

func pairYardstick(t *target, _ bool) (a, b *conn, err error) {
	return t.sides("/ws?appID=" + uuid.NewString())
}

// sides opens both sides, and waits until each knows of the other.
func (t *target) sides(path string) (a, b *conn, err error) {
	return t.two(path+"&side=A", path+"&side=B", `"room_full"`)
}

// two opens two WebSockets, and waits for a message on both.
func (t *target) two(pathA, pathB, message string) (a, b *conn, err error) {
	defer func() {
		if err != nil {
			closeAll(a, b)
		}
	}()
	if a, err = t.open(pathA); err != nil {
		return nil, nil, err
	}
	if b, err = t.open(pathB); err != nil {
		return a, nil, err
	}
	if _, err = a.await(message); err == nil {
		_, err = b.await(message)
	}
	return a, b, err
}

func pairPeerJS(t *target, _ bool) (a, b *conn, err error) {
	idA, idB := uuid.NewString(), uuid.NewString()
	const path = "/peerjs?key=peerjs&token=bench&id="
	if a, b, err = t.two(path+idA, path+idB, `"OPEN"`); err != nil {
		return nil, nil, err
	}
	a.to, b.to = idB, idA
	return a, b, nil
}

func peerJSMessage(to, kind, content string) string {
	if kind == "ice" {
		kind = "candidate"
	}
	return `{"type":"` + strings.ToUpper(kind) + `","dst":"` + to + `","payload":{` + content + `}}`
}

// room opens a room with this many members. The first hears of all others.
func (t *target) room(members int) (all []*conn, err error) {
	defer func() {
		if err != nil {
			closeAll(all...)
			all = nil
		}
	}()
	const joined = `"type":"join"`
	var room struct{ Code string }
	if err := t.call(http.MethodPost, "/api/rooms", fmt.Sprintf(`{"maxPlayers":%d}`, members), &room); err != nil {
		return nil, err
	}
	for i := range members {
		c, err := t.open(fmt.Sprintf("/ws/signal/%s?displayName=%d", room.Code, i))
		if err != nil {
			return all, err
		}
		all = append(all, c)
		if _, err := c.await(joined); err != nil {
			return all, err
		}
		if i > 0 { // the first is told of everyone, and has to know before it sends
			if _, err := all[0].await(joined); err != nil {
				return all, err
			}
		}
	}
	return all, nil
}

// roomMessage is for everyone else in the room.
func roomMessage(content string) string { return `{"type":"candidate","payload":{` + content + `}}` }
