package main

import (
	"cmp"
	"crypto/hmac"
	"crypto/sha1"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"hash/maphash"
	"net"
	"net/http"
	"slices"
	"strconv"
	"strings"
	"time"
)

// Clients behind NATs find each other through STUN and TURN servers, which run
// elsewhere, or, with TURN=on, here (turn.go). What is handed out is where they
// are, and, for TURN, a credential that expires: the convention that coturn calls
// use-auth-secret (draft-uberti-behave-turn-rest-00). The TURN server shares the
// secret, and needs to ask nobody.

// maxRelayedSessions is how many sessions each network may have TURN credentials
// for at a time. A session counts once, however often it is asked for: a pairing
// alone has up to four answers with credentials in them.
const maxRelayedSessions = 30

// An iceServer is an RTCIceServer, as browsers take it.
type iceServer struct {
	URLs       []string `json:"urls"`
	Username   string   `json:"username,omitempty"`
	Credential string   `json:"credential,omitempty"`
}

// iceServers are what a client may use. throttled says that TURN was left out
// because its network has credentials for as many other sessions as it may.
type iceServers struct {
	Servers   []iceServer `json:"iceServers,omitempty"`
	Throttled bool        `json:"throttled,omitempty"`
}

// An iceDirectory knows the servers and makes the credentials.
type iceDirectory struct {
	// static after construction
	stun, turn []string    // URLs
	secrets    []string    // of the TURN servers, the newest first
	own        *turnServer // nil unless TURN=on
	ownHost    string      // TURN_HOST, or "" for the host that a client called
	ttl        time.Duration
	quota      *relayQuota
	metrics    *metrics
}

func newICEDirectory(cfg *config, m *metrics, own *turnServer) *iceDirectory {
	return &iceDirectory{
		stun: cfg.stunURLs, turn: cfg.turnURLs, secrets: cfg.turnSecrets, ttl: cfg.turnTTL,
		own: own, ownHost: cfg.turnHost,
		quota: newRelayQuota(), metrics: m,
	}
}

// servers returns what a client of this session and network may use, which
// called this server as host. While the secret of other TURN servers is being
// changed there is one entry for each secret: a TURN server refuses those it does
// not share, and clients try them all.
func (d *iceDirectory) servers(id sessionID, n network, host string) (s iceServers) {
	if len(d.stun) > 0 {
		s.Servers = append(s.Servers, iceServer{URLs: d.stun})
	}
	var turnURLs []string
	if d.own != nil {
		if place, ok := d.own.placeOf(id, cmp.Or(d.ownHost, host)); ok {
			var stunURL string
			stunURL, turnURLs = place.urls()
			s.Servers = append(s.Servers, iceServer{URLs: []string{stunURL}})
		}
	}
	if len(d.turn)+len(turnURLs) == 0 {
		return s
	}
	expires := time.Now().Add(d.ttl)
	if !d.quota.take(n, id, expires) {
		d.metrics.turnThrottled.Inc()
		s.Throttled = true
		return s
	}
	d.metrics.turnIssued.Inc()
	if d.own != nil {
		username, password := d.own.credential(id, expires)
		s.Servers = append(s.Servers, iceServer{URLs: turnURLs, Username: username, Credential: password})
		return s
	}
	username := turnUsername(id, expires)
	for _, secret := range d.secrets {
		s.Servers = append(s.Servers, iceServer{URLs: d.turn, Username: username, Credential: turnPassword(secret, username)})
	}
	return s
}

// turnUsername returns the user of a session until a time. What TURN servers
// log does not tell the session's ID.
func turnUsername(id sessionID, expires time.Time) string {
	hash := sha256.Sum256(id[:])
	return strconv.FormatInt(expires.Unix(), 10) + ":" + hex.EncodeToString(hash[:8])
}

// turnPassword returns the password that goes with a user name.
func turnPassword(secret, username string) string {
	mac := hmac.New(sha1.New, []byte(secret))
	mac.Write([]byte(username))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// seconds is the life of what is handed out, as answers give it.
func (d *iceDirectory) seconds() int { return int(d.ttl / time.Second) }

// A relayQuota bounds for how many sessions each network has TURN credentials,
// and the IPv6 /48 around it. A session keeps its place until the last of its
// credentials has expired, so that at no time more of them can be relayed. Where
// a table is full, the one idle longest makes room, and begins anew.
type relayQuota struct {
	// static after construction
	seed            maphash.Seed
	networks, sites *addressTable[[]relayedSession]
}

// A relayedSession is one that its network has credentials for. Of its ID a hash
// is enough: two sessions that share one, which nobody can aim at, are counted
// as one.
type relayedSession struct {
	hash  uint32
	until uint32 // Unix time, at which the last of its credentials expires
}

func newRelayQuota() *relayQuota {
	none := func() []relayedSession { return nil }
	// A site has siteShare times as many sessions, so fewer sites fill the memory.
	return &relayQuota{maphash.MakeSeed(), newAddressTable(maxAddresses, none), newAddressTable(maxAddresses/siteShare, none)}
}

// take reports whether n may have credentials for a session until expires, and
// counts the session. The zero network is not counted.
func (q *relayQuota) take(n network, id sessionID, expires time.Time) bool {
	if !n.IsValid() {
		return true
	}
	s := relayedSession{uint32(maphash.Comparable(q.seed, id)), uint32(expires.Unix())}
	// The network first: one that has enough must not take the places of others.
	if !takePlace(q.networks, n, s, maxRelayedSessions) {
		return false
	}
	site, ok := siteOf(n)
	return !ok || takePlace(q.sites, site, s, siteShare*maxRelayedSessions)
}

// takePlace gives s one of the places of key, or lets it keep the one that it has.
func takePlace(t *addressTable[[]relayedSession], key network, s relayedSession, places int) (ok bool) {
	now := time.Now().Unix()
	t.with(key, func(sessions *[]relayedSession) {
		*sessions = slices.DeleteFunc(*sessions, func(other relayedSession) bool {
			return other.hash == s.hash || int64(other.until) <= now
		})
		if ok = len(*sessions) < places; ok {
			*sessions = append(*sessions, s)
		}
	})
	return ok
}

// getICEServers is GET /ice-servers.
func (s *server) getICEServers(w http.ResponseWriter, r *http.Request, c caller) error {
	id, err := appIDOf(r)
	if err != nil {
		return err
	}
	if _, _, err := s.hub.Get(r.Context(), id); err != nil {
		return err
	}
	s.writeJSON(w, http.StatusOK, s.ice.answer(s.ice.servers(id, c.network, c.host)))
	return nil
}

// An iceAnswer tells the servers to who asked for them.
type iceAnswer struct {
	Type      string      `json:"type,omitempty"`
	Servers   []iceServer `json:"iceServers"`
	Throttled bool        `json:"throttled,omitempty"`
	TTL       int         `json:"ttl"` // seconds
}

func (d *iceDirectory) answer(s iceServers) iceAnswer {
	if s.Servers == nil {
		s.Servers = []iceServer{} // not null
	}
	return iceAnswer{Servers: s.Servers, Throttled: s.Throttled, TTL: d.seconds()}
}

// iceServers answers the frame ice_servers.
func (c *client) iceServers() {
	a := c.srv.ice.answer(c.srv.ice.servers(c.session, c.network, c.host))
	a.Type = typeICEServers.String()
	c.answer(typeICEServers, mustMarshal(a))
}

// appendICEServers appends s as members of an object that has some already.
func appendICEServers(dst []byte, s iceServers) []byte {
	if members := mustMarshal(s); len(members) > len("{}") {
		dst = append(append(dst, ','), members[1:len(members)-1]...)
	}
	return dst
}

// mustMarshal marshals what is the server's own.
func mustMarshal(v any) []byte {
	text, err := json.Marshal(v)
	if err != nil {
		panic(err)
	}
	return text
}

// parseSTUNURL takes a URL of RFC 7064.
func parseSTUNURL(text string) (string, error) {
	if scheme, ok := iceScheme(text); !ok || scheme != "stun" && scheme != "stuns" || strings.Contains(text, "?") {
		return "", fmt.Errorf("must list URLs such as stun:stun.example:3478 or stuns:stun.example, not %q", text)
	}
	return text, nil
}

// parseTURNURL takes a URL of RFC 7065.
func parseTURNURL(text string) (string, error) {
	if scheme, ok := iceScheme(text); !ok || scheme != "turn" && scheme != "turns" {
		return "", fmt.Errorf("must list URLs such as turn:turn.example:3478?transport=udp or turns:turn.example, not %q", text)
	}
	return text, nil
}

// iceScheme returns the scheme of a STUN or TURN URL; ok is false where host,
// port or transport are none.
func iceScheme(text string) (scheme string, ok bool) {
	scheme, rest, _ := strings.Cut(text, ":")
	address, query, hasQuery := strings.Cut(rest, "?")
	host, port, err := net.SplitHostPort(address)
	if err != nil { // there is no port, or nothing makes sense
		host, port = address, "3478"
		if n := len(address); n > 1 && address[0] == '[' && address[n-1] == ']' {
			host = address[1 : n-1]
		}
	}
	if strings.Contains(host, ":") != strings.HasPrefix(address, "[") || strings.Contains(host, "%") {
		return scheme, false
	}
	if hasQuery && query != "transport=udp" && query != "transport=tcp" {
		return scheme, false
	}
	_, isHost := canonicalHost(host)
	n, err := strconv.ParseUint(port, 10, 16)
	return scheme, isHost && err == nil && n > 0
}
