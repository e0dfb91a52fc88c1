//go:build long

package test

import (
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/coder/websocket"
	"github.com/google/uuid"
)

// nginx and Caddy in front of the binary, configured by the files of deploy/.

// A proxy is a running nginx or Caddy.
type proxy struct {
	t    *testing.T
	base string // "https://127.0.0.1:41234"
	tls  *tls.Config
	logs func() string // all that it has logged
}

// A startProxy starts a proxy in front of the server at upstream, and ends it
// with the test.
type startProxy func(t *testing.T, upstream string) *proxy

func startNginx(t *testing.T, upstream string) *proxy {
	t.Helper()
	dir := t.TempDir()
	pair := testkit.WritePair(t, dir, 1)
	port := testkit.QuietPort(t)
	testkit.WriteFile(t, filepath.Join(dir, "parley.conf"), rendered(t, "deploy/nginx.conf",
		"server 127.0.0.1:1234;", "server "+upstream+";",
		"listen 443 ssl;", "listen 127.0.0.1:"+port+" ssl;",
		"listen 80;", "listen 127.0.0.1:"+testkit.QuietPort(t)+";",
		"listen [::]:443 ssl;", "", "listen [::]:80;", "",
		"/etc/letsencrypt/live/parley.example/fullchain.pem", pair.CertFile,
		"/etc/letsencrypt/live/parley.example/privkey.pem", pair.KeyFile,
		"/var/log/nginx", dir))
	main := filepath.Join(dir, "nginx.conf")
	testkit.WriteFile(t, main, fmt.Sprintf("daemon off; pid %[1]s/pid; error_log %[1]s/main.log info;\nevents {}\nhttp { access_log %[1]s/default.log; include %[1]s/parley.conf; }\n", dir))
	testkit.StartProgram(t, "127.0.0.1:"+port, nil, needTool(t, "nginx"), "-p", dir, "-e", dir+"/main.log", "-c", main)
	return &proxy{t: t, base: "https://127.0.0.1:" + port, tls: pair.Client(), logs: func() string {
		var all strings.Builder
		names, _ := filepath.Glob(dir + "/*.log")
		for _, name := range names {
			all.WriteString(readFile(t, name))
		}
		return all.String()
	}}
}

func startCaddy(t *testing.T, upstream string) *proxy {
	t.Helper()
	dir := t.TempDir()
	addr := "127.0.0.1:" + testkit.QuietPort(t)
	file := filepath.Join(dir, "Caddyfile")
	// Nothing else is to be listened on.
	testkit.WriteFile(t, file, strings.Replace(readFile(t, "deploy/Caddyfile"), "\n{\n", "\n{\nadmin off\ndefault_bind 127.0.0.1\n", 1))
	out := testkit.StartProgram(t, addr, []string{"HOME=" + dir, "DOMAIN=http://" + addr, "UPSTREAM=" + upstream},
		needTool(t, "caddy"), "run", "--adapter", "caddyfile", "--config", file)
	return &proxy{t: t, base: "http://" + addr, logs: out.String}
}

// from returns a client whose connections come from ip.
func (p *proxy) from(ip string) *http.Client {
	dialer := &net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}}
	transport := &http.Transport{TLSClientConfig: p.tls, DialContext: dialer.DialContext}
	p.t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport, Timeout: fleetPatience}
}

// call makes an API call as a page of the server's own origin does, with more
// headers of the form "Name: value".
func (p *proxy) call(client *http.Client, method, path, body string, into any, headers ...string) (status int) {
	p.t.Helper()
	req, err := http.NewRequest(method, p.base+path, strings.NewReader(body))
	if err != nil {
		p.t.Fatal(err)
	}
	for _, h := range append([]string{"Origin: " + p.base, "Content-Type: application/json"}, headers...) {
		k, v, _ := strings.Cut(h, ": ")
		req.Header.Set(k, v)
	}
	res, err := client.Do(req)
	if err != nil {
		p.t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		p.t.Fatal(err)
	}
	if into != nil {
		if err := json.Unmarshal(text, into); err != nil {
			p.t.Errorf("%s %s: %v in %s", method, path, err, text)
		}
	}
	return res.StatusCode
}

// dial opens a WebSocket.
func (p *proxy) dial(client *http.Client, path string, query url.Values) (*fleetConn, error) {
	ctx, cancel := context.WithTimeout(p.t.Context(), fleetPatience)
	defer cancel()
	ws, _, err := websocket.Dial(ctx, p.base+path+"?"+query.Encode(), &websocket.DialOptions{
		HTTPClient: &http.Client{Transport: client.Transport}, HTTPHeader: http.Header{"Origin": {p.base}},
	})
	if err != nil {
		return nil, err
	}
	ws.SetReadLimit(-1)
	c := &fleetConn{t: p.t, name: path, ws: ws, came: make(chan struct{}, 1), done: make(chan struct{})}
	go c.read()
	p.t.Cleanup(c.drop)
	return c, nil
}

// seat joins a side of a session.
func (p *proxy) seat(client *http.Client, appID, side, sid string) *fleetConn {
	p.t.Helper()
	c, err := p.dial(client, "/ws", url.Values{"appID": {appID}, "side": {side}, "sid": {sid}})
	if err != nil {
		p.t.Fatal(err)
	}
	return c
}

// send sends a text message.
func (c *fleetConn) send(text string) {
	c.t.Helper()
	if err := c.sendf("%s", text); err != nil {
		c.t.Errorf("send %.80s: %v", text, err)
	}
}

// awaits waits for a message that begins with prefix and returns it.
func (c *fleetConn) awaits(prefix string) string {
	c.t.Helper()
	frame, err := c.await(prefix, func(f fleetFrame) bool { return strings.HasPrefix(f.raw, prefix) })
	if err != nil {
		c.t.Fatal(err)
	}
	return frame.raw
}

func TestLongNginx(t *testing.T) {
	t.Parallel()
	testProxy(t, startNginx)
}

func TestLongCaddy(t *testing.T) {
	t.Parallel()
	testProxy(t, startCaddy)
}

// Calls that come while the server is restarted are answered once it is back.
func TestLongCaddyWaits(t *testing.T) {
	t.Parallel()
	server := testkit.StartBinary(t, "TRUSTED_PROXIES=127.0.0.1")
	p := startCaddy(t, strings.TrimPrefix(server.Base, "http://"))
	server.Kill()
	var status int
	var calling sync.WaitGroup
	calling.Go(func() {
		res, err := p.from("127.0.0.2").Post(p.base+"/rendezvous/code", "", nil)
		if err != nil {
			t.Error(err)
			return
		}
		res.Body.Close()
		status = res.StatusCode
	})
	time.Sleep(time.Second)
	server.Restart()
	calling.Wait()
	if status != http.StatusOK {
		t.Errorf("minting meanwhile: %d", status)
	}
}

// Of two instances that share a Redis one may go: nobody who calls notices.
func TestLongCaddyFleet(t *testing.T) {
	t.Parallel()
	f := startFleet(t, 2, "redis://"+testkit.StartRedis(t).Addr, "TRUSTED_PROXIES=127.0.0.1")
	p := startCaddy(t, strings.TrimPrefix(f.all[0].Base, "http://")+" "+strings.TrimPrefix(f.all[1].Base, "http://"))
	f.all[0].Kill()
	ada := p.from("127.0.0.2")
	for range 10 {
		if status := p.call(ada, http.MethodPost, "/rendezvous/code", "", nil); status != http.StatusOK {
			t.Errorf("minting: %d", status)
		}
	}
}

func testProxy(t *testing.T, start startProxy) {
	server := testkit.StartBinary(t, "DEV=false", "DEMO=true", "ROOMS=open", "TRUSTED_PROXIES=127.0.0.1", "REDEEM_FAILS=3")
	p := start(t, strings.TrimPrefix(server.Base, "http://"))
	ada, bob := p.from("127.0.0.2"), p.from("127.0.0.3")

	var me struct {
		IP, Origin, Advice               string
		ProxyTrusted, OriginAllowed, TLS bool
	}
	p.call(ada, http.MethodGet, "/whoami", "", &me, "X-Forwarded-For: 192.0.2.1", "X-Forwarded-Host: evil.example")
	if me.IP != "127.0.0.2" || !me.ProxyTrusted || !me.OriginAllowed || me.TLS != (p.tls != nil) || me.Advice != "" {
		t.Errorf("whoami: %+v", me)
	}
	p.call(ada, http.MethodGet, "/whoami", "", &me, "Origin: https://evil.example", "X-Forwarded-Host: evil.example")
	if me.Origin != "https://evil.example" || me.OriginAllowed {
		t.Errorf("a host that the caller forwards is believed: %+v", me)
	}
	if status := p.call(ada, http.MethodGet, "/", "", nil); status != http.StatusOK {
		t.Errorf("demo page: %d", status)
	}

	// Each has guesses of her own, whatever she says of herself.
	guess := func(client *http.Client, n int) int {
		return p.call(client, http.MethodPost, "/rendezvous/redeem", fmt.Sprintf(`{"code":"%04d"}`, n), nil, "X-Forwarded-For: 127.0.0.3")
	}
	for n := range 3 {
		guess(ada, n)
	}
	if status := guess(ada, 4); status != http.StatusTooManyRequests {
		t.Errorf("a guess too many: %d", status)
	}
	if status := guess(bob, 4); status != http.StatusGone {
		t.Errorf("another's first guess: %d", status)
	}

	var minted struct{ AppID string }
	if status := p.call(ada, http.MethodPost, "/rendezvous/code", "", &minted); status != http.StatusOK {
		t.Fatalf("mint: %d", status)
	}
	secret := "secret-" + uuid.NewString()
	a, b := p.seat(ada, minted.AppID, "A", secret+"-a"), p.seat(bob, minted.AppID, "B", secret+"-b")
	a.awaits(`{"type":"room_full"`)
	const begin, end = `{"type":"offer","sdp":"`, `"}`
	largest := begin + string(bytes.Repeat([]byte("x"), 1<<20-len(begin)-len(end))) + end
	for from, to := range map[*fleetConn]*fleetConn{a: b, b: a} {
		from.send(largest)
		if got := to.awaits(begin); got != largest {
			t.Errorf("%d bytes came of %d", len(got), len(largest))
		}
	}

	var opened struct{ Code string }
	p.call(ada, http.MethodPost, "/api/rooms", `{"password":"`+secret+`"}`, &opened)
	member, err := p.dial(bob, "/ws/signal/"+opened.Code, url.Values{"displayName": {"Bob"}, "password": {secret}})
	if err != nil {
		t.Fatal(err)
	}
	var join struct{ Resume string }
	if err := json.Unmarshal([]byte(member.awaits(`{"type":"join"`)), &join); err != nil || join.Resume == "" {
		t.Fatal("no secret to resume with:", err)
	}
	member.drop()
	if member, err = p.dial(bob, "/ws/signal/"+opened.Code, url.Values{"displayName": {"Bob"}, "resume": {join.Resume}}); err != nil {
		t.Fatal(err)
	}
	member.awaits(`{"type":"join"`)

	// Then nobody is there, which proxies log with the most zeal.
	server.Kill()
	for _, c := range []*fleetConn{a, b, member} {
		<-c.done
	}
	var dialing sync.WaitGroup
	for _, q := range []url.Values{{"sid": {secret}}, {"password": {secret}}, {"resume": {join.Resume}}} {
		dialing.Go(func() {
			if _, err := p.dial(bob, "/ws", q); err == nil || !strings.Contains(err.Error(), "502") {
				t.Errorf("without a server: %v", err)
			}
		})
	}
	dialing.Wait()
	testkit.Eventually(t, "the proxy logs that nobody is there", func() bool { return strings.Contains(p.logs(), "502") })
	for _, s := range []string{secret, join.Resume} {
		if logs := p.logs(); strings.Contains(logs, s) || strings.Contains(logs, url.QueryEscape(s)) {
			t.Errorf("the proxy logs a secret:\n%s", logs)
		}
	}
}
