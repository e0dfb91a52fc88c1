package main

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/coder/websocket"
	"github.com/pion/logging"
	"github.com/pion/stun/v3"
	"github.com/pion/turn/v5"
)

// parley check URL looks at a running server from outside, as a client would,
// and says in words what is right and what is not.

const checkUsage = `Usage: parley check [-origin ORIGIN] [-token TOKEN] URL

Looks at the server at URL as a client does, and says what is wrong: whether it
answers and is ready, its Redis included; what it takes the caller for, behind
whatever proxies there are; whether pages of an origin may call it; whether
WebSockets get through; and whether the STUN and TURN servers that it names
answer, TURN with a credential that it made, from one of two clients to the
other and from outside. It mints one code. The exit status is 1 when something
is wrong.

`

// checkTimeout is how long each thing that is looked at may take.
const checkTimeout = 5 * time.Second

// A checker is one run of parley check.
type checker struct {
	out    io.Writer
	base   *url.URL
	origin string // of the pages that should be able to call
	token  string // where minting asks for one
	http   *http.Client
	wrong  int // how many things are
}

// runCheck is parley check. It returns the exit status.
func runCheck(args []string, stdout, stderr io.Writer) int {
	c := &checker{out: stdout, http: &http.Client{Timeout: checkTimeout}}
	flags := flag.NewFlagSet("parley check", flag.ContinueOnError)
	flags.SetOutput(stderr)
	flags.StringVar(&c.origin, "origin", "", "origin of the pages that should be able to call; by default the server's own")
	flags.StringVar(&c.token, "token", "", "bearer token for minting a code, where MINT_AUTH asks for one")
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), checkUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		return 0
	} else if err != nil {
		return 2
	}
	var err error
	if c.base, err = url.Parse(flags.Arg(0)); err != nil || flags.NArg() != 1 || c.base.Host == "" || c.base.Scheme != "http" && c.base.Scheme != "https" {
		fmt.Fprintln(stderr, "parley check needs one URL, such as https://parley.example")
		return 2
	}
	c.base.Path = strings.TrimSuffix(c.base.Path, "/")
	if c.origin == "" {
		c.origin = c.base.Scheme + "://" + c.base.Host
	}
	defer c.http.CloseIdleConnections()
	c.run()
	if c.wrong > 0 {
		fmt.Fprintf(c.out, "\n%d wrong.\n", c.wrong)
		return 1
	}
	fmt.Fprint(c.out, "\nAll is well.\n")
	return 0
}

func (c *checker) ok(format string, args ...any) { fmt.Fprintf(c.out, "ok     "+format+"\n", args...) }
func (c *checker) note(format string, args ...any) {
	fmt.Fprintf(c.out, "note   "+format+"\n", args...)
}
func (c *checker) bad(format string, args ...any) {
	c.wrong++
	fmt.Fprintf(c.out, "WRONG  "+format+"\n", args...)
}

func (c *checker) run() {
	if !c.reachable() {
		return
	}
	c.ready()
	c.caller()
	c.session()
}

// call makes an API call as a page of the origin, and decodes the answer.
func (c *checker) call(method, path, body string, into any) (*http.Response, error) {
	r, err := http.NewRequest(method, c.base.String()+path, strings.NewReader(body))
	if err != nil {
		return nil, err
	}
	r.Header.Set("Origin", c.origin)
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	res, err := c.http.Do(r)
	if err != nil {
		return nil, err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, 1<<20))
	if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(text, into); err != nil {
		return res, fmt.Errorf("%s %s answers %s, and not as parley does: %.60q", method, path, res.Status, bytes.TrimSpace(text))
	}
	return res, nil
}

func (c *checker) reachable() bool {
	var v versionInfo
	if _, err := c.call(http.MethodGet, "/version", "", &v); err != nil {
		c.bad("%s cannot be reached, or is not parley: %v", c.base, err)
		return false
	}
	c.ok("%s is parley %s", c.base, v.Version)
	return true
}

func (c *checker) ready() {
	var answer struct{ Code, Error string }
	res, err := c.call(http.MethodGet, "/readyz", "", &answer)
	switch {
	case err != nil:
		c.bad("readiness: %v", err)
	case res.StatusCode == http.StatusOK:
		c.ok("it is ready")
	case answer.Code == "draining":
		c.bad("it is shutting down: ask again once it is back")
	default:
		c.bad("it is not ready: if it uses Redis, that does not answer: check REDIS_URL, or REDIS_HOST, REDIS_PORT and REDIS_PASSWORD")
	}
}

// caller looks at proxies and origins through GET /whoami.
func (c *checker) caller() {
	var me whoamiAnswer
	if _, err := c.call(http.MethodGet, "/whoami", "", &me); err != nil {
		c.bad("whoami: %v", err)
		return
	}
	c.ok("it takes this machine for %s, through %s", me.IP, me.SocketIP)
	if me.OriginAllowed {
		c.ok("pages of %s may call", c.origin)
	}
	if c.base.Scheme == "https" && !me.TLS {
		c.bad("the proxy does not say that the caller used TLS: let it set X-Forwarded-Proto, and TRUSTED_PROXIES name it")
	}
	if me.Advice != "" {
		c.bad("%s", me.Advice)
	}
}

// session mints a code and looks at what a client would do with it.
func (c *checker) session() {
	var minted struct {
		AppID, Code, Error string
		iceServers
	}
	res, err := c.call(http.MethodPost, "/rendezvous/code", "", &minted)
	switch {
	case err != nil:
		c.bad("minting a code: %v", err)
		return
	case res.StatusCode == http.StatusUnauthorized:
		c.bad("minting a code needs a token (MINT_AUTH=jwt): give one with -token")
		return
	case res.StatusCode != http.StatusOK:
		c.bad("minting a code: %s", minted.Error)
		return
	}
	c.ok("a code can be minted")
	c.webSocket(minted.AppID)
	c.servers(minted.iceServers)
}

func (c *checker) webSocket(appID string) {
	ctx, cancel := context.WithTimeout(context.Background(), checkTimeout)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, c.base.String()+"/ws?side=A&appID="+appID, &websocket.DialOptions{
		HTTPClient:   &http.Client{Transport: c.http.Transport},
		HTTPHeader:   http.Header{"Origin": {c.origin}},
		Subprotocols: []string{subprotocolV1},
	})
	if err != nil {
		c.bad("WebSockets do not get through: a proxy must pass Upgrade and Connection on: %v", err)
		return
	}
	defer ws.CloseNow()
	if _, text, err := ws.Read(ctx); err != nil || !bytes.Contains(text, []byte(`"welcome"`)) {
		c.bad("a WebSocket opens, and gets no welcome: %v", err)
		return
	}
	c.ok("WebSockets get through")
	ws.Close(websocket.StatusNormalClosure, "")
}

// servers tries each URL of the ICE servers.
func (c *checker) servers(s iceServers) {
	if s.Throttled {
		c.bad("this address has TURN credentials for %d sessions that still live: ask from another, or later", maxRelayedSessions)
	} else if len(s.Servers) == 0 {
		c.bad("there are no ICE servers: set STUN_URLS, or devices in different networks will seldom connect")
	}
	relays := make(map[stun.ProtoType]bool) // by transport of TURN URLs: whether one of them relays
	for _, server := range s.Servers {
		for _, text := range server.URLs {
			if _, ok := iceScheme(text); !ok { // on some such, the parser never returns
				c.bad("%s is no URL of a STUN or TURN server", text)
				continue
			}
			uri, err := stun.ParseURI(text)
			if err != nil {
				c.bad("%s is no URL of a STUN or TURN server: %v", text, err)
				continue
			}
			if isLocal(uri.Host) && !isLocal(c.base.Hostname()) {
				c.bad("%s is an address that others cannot reach", text)
			}
			if uri.Scheme == stun.SchemeTypeSTUN || uri.Scheme == stun.SchemeTypeSTUNS {
				c.stun(text, uri)
				continue
			}
			uri.Username, uri.Password = server.Username, server.Credential
			relays[uri.Proto] = c.turn(text, uri) || relays[uri.Proto]
		}
	}
	overUDP, anyUDP := relays[stun.ProtoTypeUDP]
	overTCP, anyTCP := relays[stun.ProtoTypeTCP]
	switch {
	case s.Throttled || len(s.Servers) == 0:
	case !anyUDP && !anyTCP:
		c.note("there is no TURN server: peers behind some NATs cannot connect without")
	case !anyTCP:
		c.note("no TURN URL has ?transport=tcp: peers in networks that let no UDP through cannot connect")
	case anyUDP && !overUDP && overTCP:
		c.note("TURN answers by TCP, and not by UDP: if this machine's network lets UDP out, the TURN server's firewall does not let it in")
	}
}

func (c *checker) stun(text string, uri *stun.URI) {
	client, closeAll, err := dialICE(uri)
	if err != nil {
		c.bad("%s: %v", text, err)
		return
	}
	defer closeAll()
	mapped, err := client.SendBindingRequest()
	if err != nil {
		c.silent(text, uri, err)
		return
	}
	c.ok("%s answers: it sees %s", text, mapped)
}

// silent says which port is shut.
func (c *checker) silent(text string, uri *stun.URI, err error) {
	transport := "UDP"
	if uri.Proto == stun.ProtoTypeTCP || uri.Scheme == stun.SchemeTypeTURNS || uri.Scheme == stun.SchemeTypeSTUNS {
		transport = "TCP"
	}
	c.bad("%s does not answer: is it running, and %s port %d open, at its firewall and, in a container, published? (%v)", text, transport, uri.Port, err)
}

func addrOf(ip net.IP) netip.Addr {
	a, _ := netip.AddrFromSlice(ip)
	return a.Unmap()
}

// turn reports whether the server relays.
func (c *checker) turn(text string, uri *stun.URI) bool {
	client, closeAll, err := dialICE(uri)
	if err != nil {
		c.bad("%s: %v", text, err)
		return false
	}
	defer closeAll()
	relayed, err := client.Allocate()
	if e, ok := errors.AsType[*stun.TurnError](err); ok {
		switch e.ErrorCodeAttr.Code {
		case stun.CodeUnauthorized, stun.CodeForbidden:
			c.bad("%s refuses the credential: its static-auth-secret must be TURN_SECRET (coturn: use-auth-secret), and both clocks right", text)
		case stun.CodeAllocQuotaReached, stun.CodeInsufficientCapacity:
			c.bad("%s accepts the credential and has no room: raise its quota", text)
		default:
			c.bad("%s refuses an allocation: %v", text, e)
		}
		return false
	} else if err != nil {
		c.silent(text, uri, err)
		return false
	}
	defer relayed.Close()
	if ip := relayed.LocalAddr().(*net.UDPAddr).IP; virtualAddr().Compare(addrOf(ip)) == 0 {
		c.ok("%s relays between clients of this server alone", text)
		c.relayToRelay(text, uri, client, relayed)
		return true
	}
	c.ok("%s relays, from %s", text, relayed.LocalAddr())
	if ip := relayed.LocalAddr().(*net.UDPAddr).IP; !isPublic(ip) && !isLocal(uri.Host) {
		c.bad("%s relays from %s, which others cannot reach: behind a NAT, as at most clouds, set its external-ip and allowed-peer-ip", text, ip)
		return true
	}
	c.relayToRelay(text, uri, client, relayed)
	if uri.Proto == stun.ProtoTypeUDP { // which gets through from here
		c.intoRelay(text, uri, client, relayed)
	} else {
		c.relayOfTCP(text, uri)
	}
	return true
}

// relayToRelay lets two clients send to each other's relayed address, as peers do
// of whom neither has UDP. A relay that forbids all private addresses, and is
// behind a NAT, forbids its own.
func (c *checker) relayToRelay(text string, uri *stun.URI, client *turn.Client, relayed net.PacketConn) {
	other, closeOther, err := dialICE(uri)
	if err != nil {
		c.bad("%s: a second time: %v", text, err)
		return
	}
	defer closeOther()
	otherRelayed, err := other.Allocate()
	if err != nil {
		c.bad("%s relays for one peer of a session, and not for a second: raise its quota (%v)", text, err)
		return
	}
	defer otherRelayed.Close()
	err = errors.Join(client.CreatePermission(otherRelayed.LocalAddr()), other.CreatePermission(relayed.LocalAddr()))
	if e, ok := errors.AsType[*stun.TurnError](err); ok && e.ErrorCodeAttr.Code == stun.CodeForbidden {
		c.bad("%s forbids its own address, so that two peers without UDP cannot connect: "+
			"set its allowed-peer-ip to the address that it has on its own machine, the private one behind a NAT", text)
	} else if err != nil {
		c.bad("%s permits no way to its own address: %v", text, err)
	} else if !arrives(relayed, otherRelayed) {
		c.bad("%s relays nothing to its own address, so that two peers without UDP cannot connect", text)
	} else {
		c.ok("%s relays between two of its peers", text)
	}
}

// intoRelay sends to the relayed address from outside, as a peer with UDP does.
func (c *checker) intoRelay(text string, uri *stun.URI, client *turn.Client, relayed net.PacketConn) {
	peer, err := listenFor(net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port)))
	if err != nil {
		c.bad("%s: %v", text, err)
		return
	}
	defer peer.Close()
	mapped, err := client.SendBindingRequest()
	if err != nil || client.CreatePermission(mapped) != nil {
		return // it relays nothing to the network that this machine is in
	}
	if !arrives(peer, relayed) {
		c.bad("%s gets nothing that is sent to its relayed address: open its ports for UDP, 49152 to 65535, and see that its external-ip is right", text)
		return
	}
	c.ok("%s relays from a peer that has UDP", text)
}

// relayOfTCP asks for a relay of TCP (RFC 6062), which no browser uses: who has a
// credential reaches any server with it, as through an open proxy.
func (c *checker) relayOfTCP(text string, uri *stun.URI) {
	client, closeAll, err := dialICE(uri)
	if err != nil {
		return // it has just been reached
	}
	defer closeAll()
	if relayed, err := client.AllocateTCP(); err == nil {
		relayed.Close()
		c.note("%s relays TCP to any server, which peers do not need: set no-tcp-relay", text)
	}
}

// arrives reports whether a datagram from one gets to the address of the other.
func arrives(from, to net.PacketConn) bool {
	sent := []byte("parley check")
	got := make([]byte, 1500)
	for range checkTimeout / time.Second * 4 {
		from.WriteTo(sent, to.LocalAddr()) // one may be lost
		to.SetReadDeadline(time.Now().Add(time.Second / 4))
		if n, _, err := to.ReadFrom(got); err == nil && bytes.Equal(got[:n], sent) {
			return true
		}
	}
	return false
}

// isLocal reports whether a host is in a private network, or this machine.
func isLocal(host string) bool {
	ips, err := net.LookupIP(host)
	return err == nil && len(ips) > 0 && !isPublic(ips[0])
}

// isPublic reports whether an address can be reached from anywhere: none of this
// machine's or link's, nor of a private network or a carrier's (RFC 6598).
func isPublic(ip net.IP) bool {
	carrier := net.IPNet{IP: net.IPv4(100, 64, 0, 0), Mask: net.CIDRMask(10, 32)}
	return ip.IsGlobalUnicast() && !ip.IsPrivate() && !carrier.Contains(ip)
}

// dialICE connects to a STUN or TURN server as its URL says.
func dialICE(uri *stun.URI) (client *turn.Client, closeAll func(), err error) {
	addr := net.JoinHostPort(uri.Host, strconv.Itoa(uri.Port))
	secure := uri.Scheme == stun.SchemeTypeSTUNS || uri.Scheme == stun.SchemeTypeTURNS
	var conn net.PacketConn
	if uri.Proto == stun.ProtoTypeUDP && !secure {
		conn, err = listenFor(addr)
	} else {
		conn, err = dialStream(addr, uri.Host, secure)
	}
	if err != nil {
		return nil, nil, err
	}
	client, err = turn.NewClient(&turn.ClientConfig{
		STUNServerAddr: addr, TURNServerAddr: addr, Conn: conn,
		Username: uri.Username, Password: uri.Password,
		RTO:           firstRetry,
		LoggerFactory: &logging.DefaultLoggerFactory{DefaultLogLevel: logging.LogLevelDisabled, Writer: io.Discard},
	})
	if err == nil {
		err = client.Listen()
	}
	if err != nil {
		conn.Close()
		return nil, nil, err
	}
	return client, func() { client.Close(); conn.Close() }, nil
}

// firstRetry is when a request is sent again for the first time; the seventh
// time, and the end, are within checkTimeout.
const firstRetry = 75 * time.Millisecond

// listenFor opens a UDP socket of the server's address family, which is the one
// that an allocation is asked for in.
func listenFor(addr string) (net.PacketConn, error) {
	server, err := net.ResolveUDPAddr("udp", addr)
	if err != nil {
		return nil, err
	}
	if server.IP.To4() != nil {
		return net.ListenPacket("udp4", ":0")
	}
	return net.ListenPacket("udp6", ":0")
}

func dialStream(addr, host string, secure bool) (net.PacketConn, error) {
	dialer := &net.Dialer{Timeout: checkTimeout}
	var conn net.Conn
	var err error
	if secure {
		conn, err = tls.DialWithDialer(dialer, "tcp", addr, &tls.Config{ServerName: host})
	} else {
		conn, err = dialer.Dial("tcp", addr)
	}
	if err != nil {
		return nil, err
	}
	return turn.NewSTUNConn(conn), nil
}

// parley healthcheck asks the server that runs beside it, with the same
// environment or flags, whether it is alive. It is the HEALTHCHECK of a
// container, whose image has nothing else that could ask.
//
// It asks /healthz and not /readyz: what watches containers replaces one that
// is not healthy, which helps a server that hangs, and harms one that only
// waits for Redis, or drains: its connections would be lost for nothing.

// healthcheckTimeout is how long the answer may take.
const healthcheckTimeout = 3 * time.Second

// runHealthcheck is parley healthcheck. It returns the exit status: 0 or 1,
// because Docker reserves 2.
func runHealthcheck(args []string, lookup func(string) (string, bool), stdout, stderr io.Writer) int {
	cfg, err := loadAddress(args, lookup)
	if errors.Is(err, flag.ErrHelp) {
		writeUsage(stdout)
		return 0
	}
	if err == nil {
		err = checkHealth(cfg)
	}
	if err != nil {
		fmt.Fprintln(stderr, "parley healthcheck:", err)
		return 1
	}
	return 0
}

// loadAddress reads where the server listens, and nothing else: that a file of a
// secret has gone says nothing about a server that read it when it started.
func loadAddress(args []string, lookup func(string) (string, bool)) (*config, error) {
	c := new(config)
	table := configOptions(c)
	flags, problems := readFlags(table, args)
	if slices.Contains(problems, flag.ErrHelp) {
		return nil, flag.ErrHelp
	}
	table = slices.DeleteFunc(table, func(o option) bool {
		return !slices.Contains([]string{"HOST", "PORT", "TLS_CERT_FILE"}, o.name)
	})
	found, _ := gather(table, nil, func(variable string) (string, bool) {
		if text, ok := flags[variable]; ok {
			return text, true
		}
		return lookup(variable)
	})
	problems = append(problems, apply(table, found, true)...)
	if len(problems) == 0 && c.port == 0 {
		problems = append(problems, errors.New("PORT=0 does not say which port the server was given"))
	}
	return c, errors.Join(problems...)
}

// checkHealth asks the server at the address that c says.
func checkHealth(c *config) error {
	network, addr, base := "tcp", net.JoinHostPort(loopback(c.host), strconv.Itoa(c.port)), "http://"
	if c.tlsCertFile != "" {
		base = "https://"
	}
	if path, isFile := strings.CutPrefix(c.host, "unix:"); isFile {
		network, addr, base = "unix", path, base+"localhost"
	} else {
		base += addr
	}
	client := &http.Client{Timeout: healthcheckTimeout, Transport: &http.Transport{
		DisableKeepAlives: true,
		// The certificate names what others call this server; here it is asked
		// by the address that it listens on itself.
		TLSClientConfig: &tls.Config{InsecureSkipVerify: true},
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, network, addr)
		},
	}}
	res, err := client.Get(base + "/healthz")
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusOK {
		return fmt.Errorf("%s answers %s to /healthz: is it parley?", addr, res.Status)
	}
	return nil
}

// loopback returns the host at which to reach a server on this machine that
// listens on host.
func loopback(host string) string {
	switch addr, err := netip.ParseAddr(host); {
	case err != nil || !addr.IsUnspecified():
		return host
	case addr.Is4():
		return "127.0.0.1"
	}
	return "::1"
}
