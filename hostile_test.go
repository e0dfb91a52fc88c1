package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"parley/test/testkit"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
)

// patience is how long a client here waits for the server before the test
// fails: in a bubble by the bubble's clock.
const patience = 2 * time.Minute

// newLoopServer is newTestServer on a real socket of the loopback interface,
// where, other than in memory, connections are polled. It returns the address.
func newLoopServer(t testing.TB, settings ...string) (ts *testServer, addr string) {
	t.Helper()
	cfg, err := loadConfig(nil, lookupIn(append([]string{"HOST=127.0.0.1", "PORT=0"}, settings...)))
	if err != nil {
		t.Fatal(err)
	}
	ts = &testServer{t: t, log: new(lockedBuffer)}
	ts.server = newParley(cfg, slog.New(slog.NewTextHandler(ts.log, &slog.HandlerOptions{Level: slog.LevelDebug})))
	ts.inMemory()
	fronts, err := ts.openFronts()
	if err != nil {
		t.Fatal(err)
	}
	addr = fronts[0].listener.Addr().String()
	ts.http = &http.Client{Transport: &http.Transport{
		DialContext: func(context.Context, string, string) (net.Conn, error) { return net.Dial("tcp", addr) },
	}}
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	running.Go(func() { ts.run(ctx) })
	for _, f := range fronts {
		running.Go(func() {
			if err := f.serve(ctx); !errors.Is(err, http.ErrServerClosed) {
				t.Error("serve:", err)
			}
		})
	}
	ts.stop = sync.OnceFunc(func() {
		ts.http.CloseIdleConnections()
		ts.shutdown(fronts)
		cancel()
		running.Wait()
		checkInvariants(t, ts) // not before, as nothing tells when no call is under way
	})
	t.Cleanup(ts.stop)
	return ts, addr
}

// A rawWS is a WebSocket client that may break every rule: it writes the bytes
// it is told to and answers nothing by itself.
type rawWS struct {
	net.Conn
	br *bufio.Reader
}

// openRaw upgrades c. When that is refused, the answer comes without a rawWS.
func openRaw(c net.Conn, d wsDial) (*rawWS, *http.Response, error) {
	r := &rawWS{c, bufio.NewReaderSize(c, 512)}
	if _, err := io.WriteString(c, upgradeRequest(d)); err != nil {
		return nil, nil, err
	}
	c.SetReadDeadline(time.Now().Add(patience))
	res, err := http.ReadResponse(r.br, nil)
	if err != nil {
		return nil, nil, err
	}
	if res.StatusCode != http.StatusSwitchingProtocols {
		return nil, res, fmt.Errorf("upgrade: %s", res.Status)
	}
	return r, res, nil
}

func upgradeRequest(d wsDial) string {
	v1 := ""
	if d.v1 {
		v1 = "Sec-WebSocket-Protocol: " + subprotocolV1 + "\r\n"
	}
	return "GET " + strings.TrimPrefix(d.url(), "ws://parley.test") + " HTTP/1.1\r\nHost: parley.test\r\n" +
		"Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n" +
		"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n" + v1 + "\r\n"
}

// next reads one frame.
func (r *rawWS) next() (op byte, payload []byte, err error) {
	r.SetReadDeadline(time.Now().Add(patience))
	var head [10]byte
	if _, err := io.ReadFull(r.br, head[:2]); err != nil {
		return 0, nil, err
	}
	size := uint64(head[1])
	switch head[1] {
	case 126:
		_, err = io.ReadFull(r.br, head[2:4])
		size = uint64(binary.BigEndian.Uint16(head[2:]))
	case 127:
		_, err = io.ReadFull(r.br, head[2:10])
		size = binary.BigEndian.Uint64(head[2:])
	}
	if err != nil {
		return 0, nil, err
	}
	payload = make([]byte, size)
	_, err = io.ReadFull(r.br, payload)
	return head[0] & 0x0f, payload, err
}

// text returns the next message, past pings.
func (r *rawWS) text() (string, error) {
	for {
		op, payload, err := r.next()
		switch {
		case err != nil:
			return "", err
		case op == opText || op == opBinary:
			return string(payload), nil
		case op == opClose && len(payload) >= 2:
			return "", fmt.Errorf("closed with %d %s", binary.BigEndian.Uint16(payload), payload[2:])
		}
	}
}

// want fails the test unless these are the next messages.
func (r *rawWS) want(t testing.TB, messages ...string) {
	t.Helper()
	for _, want := range messages {
		if got, err := r.text(); got != want || err != nil {
			t.Fatalf("received %.200q, %v, want %.200q", got, err, want)
		}
	}
}

// wantError fails the test unless an error frame with this code is next.
func (r *rawWS) wantError(t testing.TB, code string) {
	t.Helper()
	if got, err := r.text(); !strings.HasPrefix(got, `{"type":"error","code":"`+code+`"`) || err != nil {
		t.Fatalf("received %.200q, %v, want error %s", got, err, code)
	}
}

// closed reads to the end and returns the server's close code, or 0 without one.
func (r *rawWS) closed() closeCode {
	code := closeCode(0)
	for {
		op, payload, err := r.next()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			panic("the server does not close")
		} else if err != nil {
			return code
		}
		if op == opClose && len(payload) >= 2 {
			code = closeCode(binary.BigEndian.Uint16(payload))
		}
	}
}

func (r *rawWS) write(t testing.TB, frames ...[]byte) {
	t.Helper()
	if _, err := r.Write(slices.Concat(frames...)); err != nil {
		t.Fatal(err)
	}
}

// The first bytes of frames that are not simply an opcode.
const (
	final = 0x80
	rsv1  = 0x40
)

// clientFrame is one frame of a client, masked with zeros.
func clientFrame(first byte, payload string) []byte {
	b := clientHeader(first, uint64(len(payload)))
	return append(b, payload...)
}

// clientHeader begins a frame that announces size bytes.
func clientHeader(first byte, size uint64) []byte {
	const masked = 0x80
	b := []byte{first}
	switch {
	case size < 126:
		b = append(b, masked|byte(size))
	case size < 1<<16:
		b = binary.BigEndian.AppendUint16(append(b, masked|126), uint16(size))
	default:
		b = binary.BigEndian.AppendUint64(append(b, masked|127), size)
	}
	return append(b, 0, 0, 0, 0)
}

func textFrame(payload string) []byte { return clientFrame(final|opText, payload) }

// A victim is a server to attack, in memory or on loopback.
type victim struct {
	*testServer
	connect func() (net.Conn, error)
}

// inBubble runs f in a bubble in which it is 2026, as it is for the server: the
// seqs of mail begin with 2025.
func inBubble(t *testing.T, f func(*testing.T)) {
	synctest.Test(t, func(t *testing.T) {
		time.Sleep(time.Until(time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)))
		f(t)
	})
}

// onBoth runs f against a server in a bubble, and against one on loopback.
func onBoth(t *testing.T, f func(*testing.T, victim), settings ...string) {
	t.Run("memory", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			f(t, inMemory(t, settings...))
		})
	})
	t.Run("loopback", func(t *testing.T) {
		ts, addr := newLoopServer(t, settings...)
		f(t, victim{ts, func() (net.Conn, error) { return net.Dial("tcp", addr) }})
	})
}

func (v victim) raw(t testing.TB, d wsDial) *rawWS {
	t.Helper()
	c, err := v.connect()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	r, _, err := openRaw(c, d)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// pair opens both seats of a new session, without claims.
func (v victim) pair(t testing.TB) (a, b *rawWS) {
	t.Helper()
	id := uuid.NewString()
	a, b = v.raw(t, wsDial{appID: id, side: "A"}), v.raw(t, wsDial{appID: id, side: "B"})
	a.want(t, frameRoomFull)
	b.want(t, frameRoomFull)
	return a, b
}

// emptied fails the test unless nothing is left of any session.
func (v victim) emptied(t testing.TB) {
	t.Helper()
	if n, queued, conns := v.memory.sessions.Load(), v.queued.used.Load(), v.clients.count(); n != 0 || queued != 0 || conns != 0 {
		t.Errorf("%d sessions, %d queued bytes and %d connections are left", n, queued, conns)
	}
}

// scrape returns the value of a series of /metrics.
func (ts *testServer) scrape(t testing.TB, series string) float64 {
	t.Helper()
	for line := range strings.Lines(ts.call(http.MethodGet, "/metrics", "").text) {
		if value, ok := strings.CutPrefix(line, series+" "); ok {
			n, err := strconv.ParseFloat(strings.TrimSpace(value), 64)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Fatalf("/metrics has no %s", series)
	return 0
}

// inMemory returns a victim in the bubble of t.
func inMemory(t *testing.T, settings ...string) victim {
	ts := newTestServer(t, settings...)
	// Invariants hold when no call is under way: those of connections that end
	// with the test must be over.
	t.Cleanup(synctest.Wait)
	return victim{ts, ts.net.dial}
}

// endsAfter returns how long the server keeps c open from now on, and what it said.
func endsAfter(t testing.TB, c net.Conn) (time.Duration, string) {
	t.Helper()
	start := time.Now()
	c.SetReadDeadline(start.Add(time.Hour))
	said, err := io.ReadAll(c)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		t.Fatal("the server never ended the connection")
	}
	return time.Since(start), string(said)
}

// drip writes text and then more, one byte a second, until that fails.
func drip(c net.Conn, text, more string) {
	io.WriteString(c, text)
	for i := 0; ; i++ {
		time.Sleep(time.Second)
		if _, err := c.Write([]byte{more[i%len(more)]}); err != nil {
			return
		}
	}
}

func TestSlowRequests(t *testing.T) {
	const post = "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\n"
	const healthz = "GET /healthz HTTP/1.1\r\nHost: parley.test\r\n\r\n"
	for _, tc := range []struct {
		name  string
		send  func(net.Conn)
		limit time.Duration
		said  string // part of the answer
	}{
		{"nothing sent", func(net.Conn) {}, 10 * time.Second, ""},
		{"half a line", func(c net.Conn) { io.WriteString(c, "GET /heal") }, 10 * time.Second, ""},
		{"slow header", func(c net.Conn) { drip(c, post+"X-Slow: ", "x") }, 10 * time.Second, ""},
		{"slow upgrade", func(c net.Conn) {
			drip(c, strings.TrimSuffix(upgradeRequest(wsDial{appID: uuid.Nil.String(), side: "A"}), "\r\n"), "X-Slow: x\r\n")
		}, 10 * time.Second, ""},
		{"slow body", func(c net.Conn) { drip(c, post+"Content-Length: 4000\r\n\r\n{", " ") }, 20 * time.Second, "bad_body"},
		{"slow chunks", func(c net.Conn) { drip(c, post+"Transfer-Encoding: chunked\r\n\r\n", "1\r\n \r\n") }, 20 * time.Second, "bad_body"},
		{"no body", func(c net.Conn) { io.WriteString(c, post+"Content-Length: 10\r\n\r\n") }, 20 * time.Second, "bad_body"},
		{"slow second request", func(c net.Conn) { drip(c, healthz+"GET", " ") }, 10 * time.Second, `{"status":"ok"}`},
		{"no second request", func(c net.Conn) { io.WriteString(c, healthz) }, 2 * time.Minute, `{"status":"ok"}`},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				ts := newTestServer(t)
				c, err := ts.net.dial()
				if err != nil {
					t.Fatal(err)
				}
				var sending sync.WaitGroup
				sending.Go(func() { tc.send(c) })
				took, said := endsAfter(t, c)
				if took > tc.limit+time.Second || !strings.Contains(said, tc.said) {
					t.Errorf("ended after %v with %q, want %q and at most %v", took, said, tc.said, tc.limit)
				}
				c.Close()
				sending.Wait()
			})
		})
	}
}

// A handshake of TLS may take as long as a header may.
func TestSlowHandshakes(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	for name, send := range map[string]func(net.Conn){
		"nothing sent":           func(net.Conn) {},
		"half a record":          func(c net.Conn) { io.WriteString(c, "\x16\x03\x01") },
		"a record that drips":    func(c net.Conn) { drip(c, "\x16\x03\x01\x40\x00\x01\x00\x3f\xfc", "x") },
		"empty records, dripped": func(c net.Conn) { drip(c, "", "\x16\x03\x01\x00\x00") },
	} {
		t.Run(name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				ts := newTestServer(t)
				certificate, err := loadCertificate(pair.CertFile, pair.KeyFile, ts.server.log)
				if err != nil {
					t.Fatal(err)
				}
				web, l := ts.newHTTPServer(ts.handler()), newMemListener()
				web.TLSConfig = certificate.config()
				var serving sync.WaitGroup
				serving.Go(func() { web.ServeTLS(l, "", "") })
				c, err := l.dial()
				if err != nil {
					t.Fatal(err)
				}
				serving.Go(func() { send(c) })
				if took, said := endsAfter(t, c); took > 11*time.Second || said != "" && said[0] != 21 { // an alert
					t.Errorf("ended after %v with %q", took, said)
				}
				c.Close()
				web.Close()
				serving.Wait()
			})
		})
	}
}

// Whoever asks without end and never reads an answer is cut.
func TestAnswersNotRead(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		c, err := ts.net.dial()
		if err != nil {
			t.Fatal(err)
		}
		start := time.Now()
		for err == nil {
			_, err = io.WriteString(c, "GET /metrics HTTP/1.1\r\nHost: parley.test\r\n\r\n")
		}
		if took := time.Since(start); took > 40*time.Second {
			t.Errorf("cut after %v", took)
		}
		c.Close()
	})
}

func TestLargeRequests(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		ts := newTestServer(t)
		ask := func(header int, body string) (status int) {
			t.Helper()
			c, err := ts.net.dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			// A server that stops reading must not stop us from reading its answer.
			go io.WriteString(c, "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nX-Long: "+strings.Repeat("x", header)+"\r\n"+body)
			c.SetReadDeadline(time.Now().Add(patience))
			res, err := http.ReadResponse(bufio.NewReader(c), nil)
			if err != nil {
				t.Fatal(err)
			}
			return res.StatusCode
		}
		for _, tc := range []struct {
			name   string
			header int
			body   string
			want   int
		}{
			{"header of 15 KiB", 15 << 10, "\r\n", http.StatusOK},
			{"header over 16 KiB", 16 << 10, "\r\n", http.StatusRequestHeaderFieldsTooLarge},
			{"header without end", 10 << 20, "", http.StatusRequestHeaderFieldsTooLarge},
			{"body of 4 KiB", 0, fmt.Sprintf("Content-Length: 4096\r\n\r\n{%4095s", "}"), http.StatusOK},
			{"body over 4 KiB", 0, fmt.Sprintf("Content-Length: 4097\r\n\r\n{%4096s", "}"), http.StatusRequestEntityTooLarge},
			{"body without end", 0, "Transfer-Encoding: chunked\r\n\r\n" + strings.Repeat("400\r\n"+strings.Repeat(" ", 1024)+"\r\n", 1000), http.StatusRequestEntityTooLarge},
			{"body that claims to be huge", 0, "Content-Length: 9000000000000000000\r\n\r\n{" + strings.Repeat(" ", 8<<10), http.StatusRequestEntityTooLarge},
		} {
			if got := ask(tc.header, tc.body); got != tc.want {
				t.Errorf("%s: status %d, want %d", tc.name, got, tc.want)
			}
		}
	})
}

// Whatever one side sends, it is answered, or its connection ends with the
// right code; the other side sees only what is whole and valid.
func TestHostileFrames(t *testing.T) {
	const maxMessage = 4096
	const offer, pong = `{"type":"offer","sdp":"é"}`, `{"type":"pong"}`
	padded := func(size int) string { return fmt.Sprintf(`{"type":"offer"%*s`, size-len(`{"type":"offer"`), "}") }
	nested := func(depth int) string {
		return `{"type":"ice","x":` + strings.Repeat("[", depth-1) + strings.Repeat("]", depth-1) + "}"
	}
	frames := func(f ...[]byte) []byte { return slices.Concat(f...) }
	inFrames := func(text string, size int) (all []byte) {
		for first := byte(opText); len(text) > size; first = 0 {
			all, text = append(all, clientFrame(first, text[:size])...), text[size:]
		}
		return append(all, clientFrame(final, text)...)
	}
	closing := func(payload string) []byte { return clientFrame(final|opClose, payload) }
	for _, tc := range []struct {
		name    string
		send    []byte
		closed  closeCode // 0: it stays open
		errors  string    // the code of an error frame
		answers []string
		relayed string // what the other side gets
	}{
		{name: "unmasked", send: append([]byte{final | opText, byte(len(offer))}, offer...), closed: closeProtocol},
		{name: "HTTP", send: []byte("GET / HTTP/1.1\r\n\r\n"), closed: closeProtocol},
		{name: "reserved bit", send: clientFrame(final|rsv1|opText, offer), closed: closeProtocol},
		{name: "reserved opcode", send: clientFrame(final|3, offer), closed: closeProtocol},
		{name: "reserved control opcode", send: clientFrame(final|11, ""), closed: closeProtocol},
		{name: "continues nothing", send: clientFrame(final, offer), closed: closeProtocol},
		{name: "begins anew within a message", send: frames(clientFrame(opText, offer), textFrame(offer)), closed: closeProtocol},
		{name: "fragmented ping", send: clientFrame(opPing, ""), closed: closeProtocol},
		{name: "long ping", send: clientFrame(final|opPing, strings.Repeat("x", 126)), closed: closeProtocol},
		{name: "negative length", send: clientHeader(final|opText, 1<<63), closed: closeProtocol},
		{name: "close with one byte", send: closing("\x03"), closed: closeProtocol},
		{name: "close with a reserved code", send: closing("\x03\xed"), closed: closeProtocol},

		{name: "bad UTF-8", send: textFrame("{\"type\":\"offer\",\"sdp\":\"\xff\"}"), closed: closeBadUTF8},
		{name: "bad UTF-8 that is no JSON", send: textFrame("\xc0\x80"), closed: closeBadUTF8},
		{name: "surrogate in UTF-8", send: textFrame("{\"type\":\"offer\",\"sdp\":\"\xed\xa0\x80\"}"), closed: closeBadUTF8},
		{name: "half a character at the end", send: frames(clientFrame(opText, `{"type":"offer","sdp":"`), clientFrame(final, "\xc3")), closed: closeBadUTF8},
		{name: "bad UTF-8 in binary", send: clientFrame(final|opBinary, "{\"type\":\"offer\",\"sdp\":\"\xff\"}"), errors: "bad_frame"},
		{name: "a character in two frames", send: inFrames(offer, strings.Index(offer, "é")+1), relayed: offer},

		{name: "as large as may be", send: textFrame(padded(maxMessage)), relayed: padded(maxMessage)},
		{name: "too large", send: textFrame(padded(maxMessage + 1)), closed: closeTooBig},
		{name: "too large in fragments", send: inFrames(padded(2*maxMessage), 100), closed: closeTooBig},
		{name: "announced huge", send: append(clientHeader(final|opText, 1<<62), padded(maxMessage+16)...), closed: closeTooBig},
		{name: "as large as may be, in fragments of one byte", send: inFrames(padded(maxMessage), 1), relayed: padded(maxMessage)},

		{name: "empty", send: textFrame(""), errors: "bad_frame"},
		{name: "empty binary", send: clientFrame(final|opBinary, ""), errors: "bad_frame"},
		{name: "empty fragments", send: frames(clientFrame(opText, ""), clientFrame(0, ""), clientFrame(0, offer), clientFrame(0, ""), clientFrame(final, "")), relayed: offer},
		{name: "a thousand empty fragments", send: frames(clientFrame(opText, ""), bytes.Repeat(clientFrame(0, ""), 1000), clientFrame(final, offer)), relayed: offer},
		{name: "pings between fragments", send: frames(clientFrame(opText, offer[:5]), clientFrame(final|opPing, "x"), clientFrame(0, offer[5:9]), clientFrame(final|opPong, ""), clientFrame(final, offer[9:])), relayed: offer},
		{name: "an unasked pong", send: clientFrame(final|opPong, "12345678")},

		{name: "64 deep", send: textFrame(nested(64)), relayed: nested(64)},
		{name: "65 deep", send: textFrame(nested(65)), errors: "bad_frame"},
		{name: "4 KiB deep", send: textFrame(strings.Repeat("[", maxMessage)), errors: "bad_frame"},
		{name: "4 KiB deep in an object", send: textFrame(`{"type":"ice","x":` + strings.Repeat(`{"a":`, 800)), errors: "bad_frame"},

		{name: "two types", send: textFrame(`{"type":"offer","type":"ice"}`), errors: "bad_frame"},
		{name: "two equal types", send: textFrame(`{"type":"offer","type":"offer"}`), errors: "bad_frame"},
		{name: "two types, one escaped", send: textFrame(`{"type":"offer","\u0074ype":"ice"}`), errors: "bad_frame"},
		{name: "two types, the first escaped", send: textFrame(`{"t\u0079pe":"bye","type":"offer"}`), errors: "bad_frame"},
		{name: "a type within", send: textFrame(`{"x":{"type":"bye"},"type":"offer"}`), relayed: `{"x":{"type":"bye"},"type":"offer"}`},
		{name: "an escaped type", send: textFrame(`{"\u0074ype":"\u006fffer"}`), relayed: `{"\u0074ype":"\u006fffer"}`},
		{name: "Type", send: textFrame(`{"Type":"offer"}`), errors: "bad_frame"},
		{name: "a type that is no string", send: textFrame(`{"type":["offer"]}`), errors: "bad_frame"},
		{name: "a type that goes on", send: textFrame(`{"type":"offer\u0000"}`), errors: "unknown_type"},
		{name: "a frame of the server", send: textFrame(`{"type":"room_full"}`), errors: "unknown_type"},
		{name: "an array", send: textFrame(`[{"type":"offer"}]`), errors: "bad_frame"},
		{name: "null", send: textFrame(`null`), errors: "bad_frame"},
		{name: "half an object", send: textFrame(`{"type":"offer"`), errors: "bad_frame"},
		{name: "two objects", send: textFrame(`{"type":"offer"}{"type":"offer"}`), errors: "bad_frame"},
		{name: "a zero byte behind", send: textFrame("{\"type\":\"offer\"}\x00"), errors: "bad_frame"},
		{name: "a byte order mark", send: textFrame("\ufeff" + offer), errors: "bad_frame"},
		{name: "a control character", send: textFrame("{\"type\":\"offer\",\"sdp\":\"\x00\"}"), errors: "bad_frame"},
		{name: "huge numbers", send: textFrame(`{"type":"send","payload":1,"id":` + strings.Repeat("9", 4000) + "}"), errors: "bad_frame"},
		{name: "a negative watermark", send: textFrame(`{"type":"hello","deliveredUpTo":-1}`), errors: "bad_frame"},
		{name: "a watermark from the future", send: textFrame(`{"type":"hello","deliveredUpTo":9223372036854775807}`), errors: "bad_frame"},
		{name: "an acknowledgement from the future", send: textFrame(`{"type":"delivered","upTo":9223372036854775807}`), errors: "bad_frame"},
		{name: "a long t", send: textFrame(`{"type":"ping","t":"` + strings.Repeat("x", 300) + `"}`), errors: "bad_frame"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			onBoth(t, func(t *testing.T, v victim) {
				a, b := v.pair(t)
				a.write(t, tc.send)
				if tc.errors != "" {
					a.wantError(t, tc.errors)
				}
				if tc.closed != 0 {
					if got := a.closed(); got != tc.closed {
						t.Errorf("closed with %d, want %d", got, tc.closed)
					}
					b.want(t, framePeerLeft)
					return
				}
				if tc.relayed != "" {
					b.want(t, tc.relayed)
				}
				a.write(t, textFrame(`{"type":"ping"}`))
				a.want(t, pong)
				a.write(t, textFrame(`{"type":"bye"}`))
				b.want(t, `{"type":"bye"}`)
			}, fmt.Sprint("WS_MAX_MSG=", maxMessage))
		})
	}
}

// Bytes at random end the connection at some time, and the other side gets
// nothing of them.
func TestGarbageAfterUpgrade(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		v := inMemory(t)
		for seed := range uint64(100) {
			random := rand.New(rand.NewPCG(seed, 0))
			garbage := make([]byte, 1+random.IntN(4096))
			for i := range garbage {
				garbage[i] = byte(random.Uint32())
			}
			a, b := v.pair(t)
			a.write(t, garbage)
			took, _ := endsAfter(t, a)
			if took > 2*20*time.Second+closeGrace {
				t.Errorf("seed %d: ended after %v", seed, took)
			}
			b.want(t, framePeerLeft)
			b.write(t, clientFrame(final|opClose, "\x03\xe8"))
			b.closed()
		}
		time.Sleep(2 * closeGrace)
		synctest.Wait()
		v.emptied(t)
	})
}

// A message must be whole within 30 seconds, however it is dragged out; one
// after the other may take as long as they like.
func TestSlowMessages(t *testing.T) {
	for _, tc := range []struct {
		name string
		drag func(*rawWS) // writes until that fails
	}{
		{"a byte a second", func(r *rawWS) { drip(r, string(clientHeader(final|opText, 1000)), " ") }},
		{"a fragment a second", func(r *rawWS) { drip(r, string(clientFrame(opText, "")), string(clientFrame(0, " "))) }},
		{"header alone", func(r *rawWS) { r.Write([]byte{final | opText}) }},
		{"first fragment alone", func(r *rawWS) { r.Write(clientFrame(opText, `{"type":"offer"}`)) }},
		{"pings within a message", func(r *rawWS) { drip(r, string(clientFrame(opText, "{")), string(clientFrame(final|opPing, ""))) }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				v := inMemory(t, "HEARTBEAT=1h")
				a, b := v.pair(t)
				start := time.Now()
				var dragging sync.WaitGroup
				dragging.Go(func() { tc.drag(a) })
				defer dragging.Wait()
				defer a.Close()
				if got, took := a.closed(), time.Since(start); got != closeSlow || took > messageTimeout+closeGrace {
					t.Errorf("closed with %d after %v, want %d within %v", got, took, closeSlow, messageTimeout)
				}
				b.want(t, framePeerLeft)
			})
		})
	}
	t.Run("one after the other", func(t *testing.T) {
		inBubble(t, func(t *testing.T) {
			v := inMemory(t, "HEARTBEAT=1h")
			a, b := v.pair(t)
			// A part of the next one has always been read with the one before.
			frame := textFrame(`{"type":"ice"}`)
			a.write(t, frame[:5])
			for range 120 {
				time.Sleep(time.Second)
				before := time.Now()
				a.write(t, frame[5:], frame[:5])
				b.want(t, `{"type":"ice"}`)
				if waited := time.Since(before); waited != 0 {
					t.Fatalf("a frame waited %v for the one behind it", waited)
				}
			}
		})
	})
}

// A sender that is held back for its slow peer's sake is not to blame: it stays,
// and everything arrives in order; what waits stays within its bound.
func TestBlastAtSlowReader(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		v := inMemory(t, "WS_MAX_MSG=64KiB", "HEARTBEAT=1h")
		a, b := v.pair(t)
		const messages = 600
		message := func(i int) string {
			return fmt.Sprintf(`{"type":"ice","n":%5d,"x":"%s"}`, i, strings.Repeat("x", 16000))
		}
		go func() {
			for i := range messages {
				if _, err := a.Write(textFrame(message(i))); err != nil {
					t.Errorf("message %d: %v", i, err)
					return
				}
			}
		}()
		start, most := time.Now(), int64(0)
		for i := range messages {
			time.Sleep(150 * time.Millisecond)
			b.want(t, message(i))
			most = max(most, v.queued.used.Load())
		}
		if bound := int64(1<<20 + 64<<10 + longQueue); most > bound {
			t.Errorf("%d bytes waited, want at most %d", most, bound)
		}
		if most < 1<<20 || time.Since(start) < 2*messageTimeout {
			t.Errorf("only %d bytes waited, %v passed: the sender was not held back for long", most, time.Since(start))
		}
		a.write(t, textFrame(`{"type":"ping"}`))
		a.want(t, `{"type":"pong"}`)
	})
}

// A reader that takes no byte is cut after 10 seconds, whoever writes to it;
// nobody else waits for it.
func TestReaderThatNeverReads(t *testing.T) {
	for _, tc := range []struct {
		name  string
		code  closeCode
		write func(stalled, other *rawWS) error // until that fails
	}{
		{"its peer sends", closeSlow, func(_, other *rawWS) error {
			_, err := other.Write(textFrame(`{"type":"ice","x":"` + strings.Repeat("x", 10000) + `"}`))
			return err
		}},
		{"it asks for answers", closeSlow, func(stalled, _ *rawWS) error {
			_, err := stalled.Write(textFrame(`{"type":"ping","t":"` + strings.Repeat("x", 200) + `"}`))
			return err
		}},
		{"it earns errors", closeTooMany, func(stalled, _ *rawWS) error {
			_, err := stalled.Write(textFrame(`{"type":"none"}`))
			return err
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			inBubble(t, func(t *testing.T) {
				v := inMemory(t, "WS_MAX_MSG=64KiB")
				stalled, other := v.pair(t)
				bystander, friend := v.pair(t)
				start := time.Now()
				blasted := make(chan struct{})
				go func() {
					defer close(blasted)
					for tc.write(stalled, other) == nil && time.Since(start) < patience {
						time.Sleep(100 * time.Microsecond) // no network is infinitely fast, nor does the clock go on in one
					}
				}()
				for range 5 {
					time.Sleep(time.Second)
					before := time.Now()
					bystander.write(t, textFrame(`{"type":"ice"}`))
					friend.want(t, `{"type":"ice"}`)
					if waited := time.Since(before); waited != 0 {
						t.Errorf("a bystander's frame took %v", waited)
					}
					if a := v.call(http.MethodGet, "/healthz", ""); a.status != http.StatusOK {
						t.Errorf("/healthz: %d", a.status)
					}
				}
				for {
					got, err := other.text()
					if err != nil {
						t.Fatal(err)
					}
					if got == framePeerLeft {
						break
					}
				}
				if took := time.Since(start); took > stallTimeout+2*time.Second {
					t.Errorf("cut after %v", took)
				}
				other.Close()
				<-blasted
				synctest.Wait() // a seat is free before its connection is counted
				if n := v.scrape(t, `parley_ws_closes_total{code="`+tc.code.String()+`"}`); n != 1 {
					t.Errorf("%v connections were closed with %d", n, tc.code)
				}
			})
		})
	}
}

// Pings cost an answer each and no memory; those that are not read are left out.
func TestPingFlood(t *testing.T) {
	onBoth(t, func(t *testing.T, v victim) {
		a, b := v.pair(t)
		const pings = 5000
		go func() {
			ping := clientFrame(final|opPing, strings.Repeat("p", 100))
			for range pings / 100 {
				a.Write(bytes.Repeat(ping, 100))
			}
			a.Write(textFrame(`{"type":"bye"}`))
		}()
		pongs := make(chan int)
		go func() {
			n := 0
			for {
				op, payload, err := a.next()
				if err != nil {
					break
				}
				if op == opPong && len(payload) == 100 {
					n++
				}
			}
			pongs <- n
		}()
		b.want(t, `{"type":"bye"}`)
		b.write(t, textFrame(`{"type":"bye"}`))
		v.stop() // which ends a's reading
		if n := <-pongs; n == 0 || n > pings {
			t.Errorf("%d pongs for %d pings", n, pings)
		}
	})
}

// Past errorBurst error frames the connection ends: it talks to itself at the
// cost of others.
func TestErrorFlood(t *testing.T) {
	onBoth(t, func(t *testing.T, v victim) {
		a, b := v.pair(t)
		go a.Write(bytes.Repeat(textFrame(`{}`), errorBurst+200))
		if got := a.closed(); got != closeTooMany {
			t.Errorf("closed with %d, want %d", got, closeTooMany)
		}
		b.want(t, framePeerLeft)
	})
}

// Half-sent messages take no more memory than MAX_QUEUED_BYTES and freeBuffer
// for each, for 30 seconds; what is small goes on meanwhile.
func TestHalfSentMessages(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const limit, senders = 1 << 20, 200
		v := inMemory(t, fmt.Sprint("MAX_QUEUED_BYTES=", limit), "HEARTBEAT=1h")
		bystander, friend := v.pair(t)
		ended := make(chan closeCode, senders)
		for range senders {
			a := v.raw(t, wsDial{appID: uuid.NewString(), side: "A"})
			go a.Write(append(clientHeader(final|opText, 512<<10), make([]byte, 256<<10)...))
			go func() { ended <- a.closed() }()
		}
		start, most := time.Now(), int64(0)
		for time.Since(start) < 25*time.Second {
			time.Sleep(100 * time.Millisecond)
			synctest.Wait()
			most = max(most, v.queued.used.Load())
			before := time.Now()
			message := `{"type":"offer","sdp":"` + strings.Repeat("x", 8<<10) + `"}`
			bystander.write(t, textFrame(message))
			friend.want(t, message)
			if waited := time.Since(before); waited != 0 {
				t.Fatalf("a bystander's frame took %v", waited)
			}
		}
		if bound := int64(limit + senders*freeBuffer); most > bound || most < limit/2 {
			t.Errorf("%d bytes waited, want about, and at most, %d", most, bound)
		}
		for range senders {
			if code := <-ended; code != closeSlow && code != closeCapacity {
				t.Fatalf("closed with %d, want %d or %d", code, closeSlow, closeCapacity)
			}
		}
		if took := time.Since(start); took > messageTimeout+2*closeGrace {
			t.Errorf("the last of them ended after %v", took)
		}
		synctest.Wait()
		if queued := v.queued.used.Load(); queued != 0 {
			t.Errorf("%d bytes are still counted", queued)
		}
	})
}

// A message that finds no room waits for it, which is no silence, and goes
// through once there is some.
func TestMessageWaitsForRoom(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		v := inMemory(t, "MAX_QUEUED_BYTES=1MiB", "HEARTBEAT=5s")
		holder, friend := v.pair(t)
		waiting, other := v.pair(t)
		var pongs sync.WaitGroup
		defer pongs.Wait()
		pongs.Go(func() {
			for range 16 {
				time.Sleep(time.Second)
				for _, r := range []*rawWS{holder, friend, other} {
					r.Write(clientFrame(final|opPong, ""))
				}
			}
		})
		// In powers of two: 512 KiB for the one, and more than the rest for the other.
		holder.write(t, clientFrame(opText, strings.Repeat(" ", 400<<10)))
		synctest.Wait()
		message := `{"type":"offer"` + strings.Repeat(" ", 600<<10) + "}"
		go waiting.Write(textFrame(message))
		time.Sleep(12 * time.Second)
		if v.queued.used.Load() < 1<<20 {
			t.Fatal("there was room all the time")
		}
		holder.write(t, clientFrame(final, `{"type":"bye"}`))
		before := time.Now()
		other.want(t, message)
		if waited := time.Since(before); waited > 2*roomPoll {
			t.Errorf("the message came %v after there was room", waited)
		}
	})
}

// What many stalled readers have waiting is bounded for the process too, not
// only for each of them.
func TestManyStalledReaders(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const limit, pairs = 1 << 20, 16
		v := inMemory(t, fmt.Sprint("MAX_QUEUED_BYTES=", limit), "WS_MAX_MSG=16KiB")
		for range pairs {
			a, _ := v.pair(t)
			go func() {
				for {
					if _, err := a.Write(textFrame(`{"type":"ice","x":"` + strings.Repeat("x", 8<<10) + `"}`)); err != nil {
						return
					}
				}
			}()
		}
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if queued, bound := v.queued.used.Load(), int64(limit+pairs*2*longQueue); queued > bound {
			t.Errorf("%d bytes wait for connected readers, want at most %d", queued, bound)
		}
	})
}

// Seats that are opened and left, in every way there is, are all gone once
// their times are over.
func TestAbandonedSeats(t *testing.T) {
	inBubble(t, func(t *testing.T) {
		const seats = 5000
		v := inMemory(t)
		v.call(http.MethodGet, "/healthz", "") // so that our own connection is there
		synctest.Wait()
		goroutines := runtime.NumGoroutine()
		var open []*rawWS
		for i := range seats {
			d := wsDial{appID: uuid.NewString(), side: "A"}
			if i%2 == 0 {
				d.sid = "secret"
			}
			if i%3 == 0 {
				d.side = "B"
			}
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			a, _, err := openRaw(c, d)
			if err != nil {
				t.Fatal(err)
			}
			switch i % 5 {
			case 1:
				a.write(t, textFrame(`{"type":"offer","sdp":"v=0"}`))
			case 2:
				a.write(t, textFrame(`{"type":"send","payload":"hello","id":1}`))
			case 3:
				half := clientHeader(final|opText, 1<<20)
				a.write(t, half[:i%len(half)])
			}
			switch i % 7 {
			case 0: // leaves for good, or within a message
				a.write(t, clientFrame(final|opClose, "\x03\xe8"))
			case 1: // goes away
				a.write(t, clientFrame(final|opClose, "\x03\xe9"))
			case 2, 3: // just ends
			default: // is silent from now on
				open = append(open, a)
				continue
			}
			a.Close()
		}
		synctest.Wait()
		if n := v.memory.sessions.Load(); n < seats/2 { // the others are over already
			t.Errorf("only %d sessions were there", n)
		}
		checkInvariants(t, v.testServer)
		// Two heartbeats find the silent ones, RESUME_TTL frees their seats, then
		// SESSION_TTL ends what mail keeps; the janitor is never late by more than 15 s.
		time.Sleep(2*20*time.Second + time.Minute + 10*time.Minute + 15*time.Second)
		synctest.Wait()
		v.emptied(t)
		for _, a := range open {
			if code := a.closed(); code != 0 && code != closeSlow { // within a message
				t.Fatalf("a silent connection was closed with %d", code)
			}
			a.Close()
		}
		synctest.Wait()
		if n := runtime.NumGoroutine(); n > goroutines {
			t.Errorf("%d goroutines, %d before", n, goroutines)
		}
	})
}
