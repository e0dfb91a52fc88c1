package main

import (
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"
)

// A callerPolicy says who is calling, behind whatever proxies there are, and
// which browser pages may.
type callerPolicy struct {
	// static after construction
	dev       bool
	origins   []string // as config.corsOrigins
	trusted   []netip.Prefix
	exempt    []netip.Prefix
	hosts     bool               // callers are told of a relay under the host that they called
	untrusted prometheus.Counter // requests with forwarded headers that are not believed
	log       *slog.Logger

	warn rate.Sometimes
}

func newCallerPolicy(cfg *config, log *slog.Logger, untrusted prometheus.Counter) *callerPolicy {
	return &callerPolicy{
		dev: cfg.dev, origins: cfg.corsOrigins, trusted: cfg.trustedProxies, exempt: cfg.rateExempt,
		hosts: cfg.turn == "on", untrusted: untrusted, log: log,
		warn: rate.Sometimes{Interval: time.Minute},
	}
}

// A caller is who sent a request, as far as the server knows.
type caller struct {
	addr         netip.Addr
	socket       netip.Addr // the other end of the connection: the caller, or a proxy
	proxyTrusted bool       // socket is a trusted proxy, whose headers are believed
	network      network    // what limits by address count; not valid when exempt
	host         string     // that it called, without a port; "" unless TURN=on
}

// identify says who sent r.
func (p *callerPolicy) identify(r *http.Request) caller {
	c := caller{socket: socketAddr(r)}
	c.addr = c.socket
	if c.proxyTrusted = contains(p.trusted, c.socket); c.proxyTrusted {
		c.addr = p.forwardedFor(r, c.socket)
	} else if name := forwardedHeader(r); name != "" {
		p.untrusted.Inc()
		p.warn.Do(func() {
			p.log.Warn("a forwarded header is not believed: if this is your proxy, set TRUSTED_PROXIES",
				"header", name, "TRUSTED_PROXIES", hostPrefix(c.socket))
		})
	}
	if !contains(p.exempt, c.addr) {
		c.network = networkOf(c.addr)
	}
	if p.hosts {
		c.host = hostOf(r, c.proxyTrusted)
	}
	return c
}

// hostOf returns the host that r was sent to, or that a trusted proxy says it was,
// without a port.
func hostOf(r *http.Request, proxyTrusted bool) string {
	host := r.Host
	if forwarded := r.Header.Get("X-Forwarded-Host"); forwarded != "" && proxyTrusted {
		host = forwarded
	}
	if name, _, err := net.SplitHostPort(host); err == nil {
		return name
	}
	return strings.TrimSuffix(strings.TrimPrefix(host, "["), "]")
}

// socketAddr returns the address at the other end of the connection. Whoever
// calls through a socket file is on this machine.
func socketAddr(r *http.Request) netip.Addr {
	if a, err := netip.ParseAddrPort(r.RemoteAddr); err == nil {
		return a.Addr().Unmap().WithZone("")
	}
	return netip.AddrFrom4([4]byte{127, 0, 0, 1})
}

// forwardedFor returns the last address of X-Forwarded-For that is not a
// trusted proxy: what stands before it, anybody may have written. With nothing
// but trusted proxies it is the first of those, and where the header makes no
// sense, the last proxy that did.
func (p *callerPolicy) forwardedFor(r *http.Request, socket netip.Addr) netip.Addr {
	list := strings.Split(strings.Join(r.Header["X-Forwarded-For"], ","), ",")
	addr := socket
	for i := len(list) - 1; i >= 0; i-- {
		hop, ok := parseHop(list[i])
		if !ok {
			return addr
		}
		if addr = hop; !contains(p.trusted, hop) {
			return addr
		}
	}
	return addr
}

// parseHop parses one entry of X-Forwarded-For; some proxies add a port.
func parseHop(s string) (netip.Addr, bool) {
	s = strings.TrimSpace(s)
	if a, err := netip.ParseAddrPort(s); err == nil {
		return a.Addr().Unmap().WithZone(""), true
	}
	a, err := netip.ParseAddr(strings.TrimSuffix(strings.TrimPrefix(s, "["), "]"))
	return a.Unmap().WithZone(""), err == nil
}

// endsWithAddress reports whether the last entry of X-Forwarded-For makes sense.
func endsWithAddress(forwardedFor []string) bool {
	last := forwardedFor[len(forwardedFor)-1]
	_, ok := parseHop(last[strings.LastIndexByte(last, ',')+1:])
	return ok
}

// forwardedHeader returns the name of a header of r that a proxy would set.
func forwardedHeader(r *http.Request) string {
	for _, name := range []string{"X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-Ip", "Forwarded"} {
		if len(r.Header[name]) > 0 {
			return name
		}
	}
	return ""
}

func contains(prefixes []netip.Prefix, addr netip.Addr) bool {
	for _, p := range prefixes {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// hostPrefix returns the prefix that holds addr alone.
func hostPrefix(addr netip.Addr) string { return netip.PrefixFrom(addr, addr.BitLen()).String() }

// originAllowed reports whether the page that sent r, if a page did, may call:
// one of the configured origins, or the server's own.
func (p *callerPolicy) originAllowed(r *http.Request) bool {
	origins := r.Header["Origin"]
	if p.dev || len(origins) == 0 {
		return true
	}
	if len(origins) > 1 {
		return false
	}
	origin, err := parseOrigin(origins[0])
	if err != nil || !strings.Contains(origin, "://") {
		return false
	}
	if slices.Contains(p.origins, origin) {
		return true
	}
	u, err := url.Parse(origin)
	if err != nil || !isWebScheme(u.Scheme) {
		return false
	}
	return slices.Contains(p.origins, u.Hostname()) || p.sameHost(u, r)
}

// sameHost reports whether a web page's origin is the server's own: the host
// that the request was sent to, or that a trusted proxy says it was.
func (p *callerPolicy) sameHost(origin *url.URL, r *http.Request) bool {
	host := r.Host
	if forwarded := r.Header.Get("X-Forwarded-Host"); forwarded != "" && contains(p.trusted, socketAddr(r)) {
		host = forwarded
	}
	own, err := parseOrigin(origin.Scheme + "://" + host)
	return err == nil && own == origin.String()
}

// whoami is GET /whoami: what the server sees of the caller, so that mistakes
// in a proxy's configuration show.
func (s *server) whoami(w http.ResponseWriter, r *http.Request, c caller) error {
	s.writeJSON(w, http.StatusOK, whoamiAnswer{
		IP:            c.addr.String(),
		SocketIP:      c.socket.String(),
		ForwardedFor:  strings.Join(r.Header["X-Forwarded-For"], ", "),
		ProxyTrusted:  c.proxyTrusted,
		Origin:        r.Header.Get("Origin"),
		OriginAllowed: s.callers.originAllowed(r),
		TLS:           r.TLS != nil || c.proxyTrusted && r.Header.Get("X-Forwarded-Proto") == "https",
		GuessesLeft:   s.limits.guesses.left(c.network),
		Advice:        strings.Join(s.callers.advice(r, c), " "),
	})
	return nil
}

type whoamiAnswer struct {
	IP            string `json:"ip"`
	SocketIP      string `json:"socketIp"`
	ForwardedFor  string `json:"forwardedFor"`
	ProxyTrusted  bool   `json:"proxyTrusted"`
	Origin        string `json:"origin"`
	OriginAllowed bool   `json:"originAllowed"`
	TLS           bool   `json:"tls"`
	GuessesLeft   int    `json:"guessesLeft"`
	Advice        string `json:"advice,omitempty"`
}

// advice says in words what looks wrong about how r got here.
func (p *callerPolicy) advice(r *http.Request, c caller) (advice []string) {
	name := forwardedHeader(r)
	switch {
	case !c.proxyTrusted && name != "":
		advice = append(advice, name+" comes from "+c.socket.String()+", which is not a trusted proxy, and is not believed. If it is yours, set TRUSTED_PROXIES="+hostPrefix(c.socket)+".")
	case c.proxyTrusted && len(r.Header["X-Forwarded-For"]) == 0:
		advice = append(advice, "The proxy at "+c.socket.String()+" sets no X-Forwarded-For: everyone behind it shares one address and its limits.")
	case c.proxyTrusted && !endsWithAddress(r.Header["X-Forwarded-For"]):
		advice = append(advice, "X-Forwarded-For from "+c.socket.String()+" does not end with an address: everyone behind it shares one address and its limits.")
	case c.proxyTrusted && contains(p.trusted, c.addr):
		advice = append(advice, "Everything in X-Forwarded-For is a trusted proxy, the caller too: unless you call from a proxy's own machine, TRUSTED_PROXIES may be too wide.")
	}
	if !p.originAllowed(r) {
		advice = append(advice, originAdvice(r.Header["Origin"]))
	}
	if u, err := url.Parse("//" + r.Host); p.dev && (err != nil || !isLoopback(u.Hostname())) {
		advice = append(advice, "DEV=true: pages of any origin may call, and limits are off. Set DEV=false on a server that others reach.")
	}
	return advice
}

// originAdvice says what to do about origins that may not call.
func originAdvice(origins []string) string {
	name := strings.Join(origins, ", ")
	if _, err := parseOrigin(name); err != nil {
		return "Origin is \"" + name + "\", which cannot be allowed: a page from a file, or in a sandbox, has no origin of its own. Serve it by http or https, or from an app with an origin."
	}
	return "Pages of " + name + " may not call. If they should, add that to CORS_ORIGINS; if they come from this server, its proxy must pass Host on."
}
