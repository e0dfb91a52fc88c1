package main

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/uuid"
)

func TestTLS(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	ts, addr := newLoopServer(t, "TLS_CERT_FILE="+pair.CertFile, "TLS_KEY_FILE="+pair.KeyFile)
	dial := func(c *tls.Config) (*tls.Conn, error) { return tls.Dial("tcp", addr, c) }

	t.Run("versions", func(t *testing.T) {
		for version, ok := range map[uint16]bool{tls.VersionTLS10: false, tls.VersionTLS11: false, tls.VersionTLS12: true, tls.VersionTLS13: true} {
			config := pair.Client()
			config.MinVersion, config.MaxVersion = version, version
			c, err := dial(config)
			if ok != (err == nil) {
				t.Errorf("%s: %v", tls.VersionName(version), err)
			}
			if err == nil {
				c.Close()
			}
		}
	})

	// A WebSocket needs HTTP/1.1, and nothing here speaks anything else.
	t.Run("ALPN", func(t *testing.T) {
		for _, tc := range []struct {
			offered []string
			want    string // "refused" for no connection
		}{
			{nil, ""},
			{[]string{"http/1.1"}, "http/1.1"},
			{[]string{"h2", "http/1.1"}, "http/1.1"},
			{[]string{"h2"}, "refused"},
		} {
			c, err := dial(pair.Client(tc.offered...))
			got := "refused"
			if err == nil {
				got = c.ConnectionState().NegotiatedProtocol
				c.Close()
			}
			if got != tc.want {
				t.Errorf("of %q: %q, want %q", tc.offered, got, tc.want)
			}
		}
	})

	t.Run("a pair relays", func(t *testing.T) {
		v := victim{ts, func() (net.Conn, error) { return dial(pair.Client("http/1.1")) }}
		a, b := v.pair(t)
		message := `{"type":"offer","sdp":"` + strings.Repeat("x", 100<<10) + `"}`
		for range 3 {
			go a.Write(textFrame(message))
			b.want(t, message)
			b.write(t, textFrame(`{"type":"answer"}`))
			a.want(t, `{"type":"answer"}`)
		}
		a.write(t, clientFrame(final|opClose, "\x03\xe8"))
		b.want(t, framePeerLeft)
	})

	// One who never begins a handshake holds up nobody.
	t.Run("plain HTTP", func(t *testing.T) {
		silent, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer silent.Close()
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: parley.test\r\n\r\n")
		res, err := http.ReadResponse(bufio.NewReader(c), nil)
		if err != nil || res.StatusCode != http.StatusBadRequest {
			t.Fatalf("plain HTTP: %v, %v", res, err)
		}
		if words, _ := io.ReadAll(res.Body); !strings.Contains(string(words), "HTTP request to an HTTPS server") {
			t.Errorf("plain HTTP is answered %q", words)
		}
	})
}

// Whoever speaks TLS to a port of plain HTTP is told so at once, in the form that
// its library knows how to explain; and so is the operator, once in a while.
func TestTLSOnPlainPort(t *testing.T) {
	const words = "a client speaks TLS where plain HTTP is spoken"
	ts, addr := newLoopServer(t, "METRICS_ADDR=127.0.0.1:0")
	for range 3 {
		c, err := tls.DialWithDialer(&net.Dialer{Timeout: 5 * time.Second}, "tcp", addr, &tls.Config{InsecureSkipVerify: true})
		if header, ok := errors.AsType[tls.RecordHeaderError](err); !ok || string(header.RecordHeader[:]) != "HTTP/" {
			t.Errorf("TLS is answered %v, %v", c, err)
		}
		_, err = http.Get("https://" + addr)
		if err == nil || !strings.Contains(err.Error(), "server gave HTTP response to HTTPS client") {
			t.Errorf("https is answered %v", err)
		}
	}
	if n := strings.Count(ts.log.String(), words); n != 1 {
		t.Errorf("the log says %d times that clients speak TLS:\n%s", n, ts.log)
	}

	// A byte at a time, and with a letter that is no handshake's.
	for first, want := range map[string]string{"\x16": "TLS handshake to an HTTP server", "\x15\r\n\r\n": "400 Bad Request", "GET /healthz HTTP/1.0\r\n\r\n": "200 OK"} {
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		c.SetDeadline(time.Now().Add(5 * time.Second)) // less than what a header may take
		io.WriteString(c, first)
		if answer, err := io.ReadAll(c); err != nil || !strings.Contains(string(answer), want) {
			t.Errorf("%q is answered %q, %v; want %q", first, answer, err, want)
		}
	}
	v := victim{ts, func() (net.Conn, error) { return net.Dial("tcp", addr) }}
	a, b := v.pair(t)
	a.write(t, textFrame(`{"type":"offer"}`))
	b.want(t, `{"type":"offer"}`)
}

// The certificate files are read again within ten seconds of a change; while
// they are broken the old pair stays, and that is said once.
func TestCertificateReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir, log := t.TempDir(), new(lockedBuffer)
		current := testkit.WritePair(t, dir, 1)
		certificate, err := loadCertificate(current.CertFile, current.KeyFile, slog.New(slog.NewTextHandler(log, nil)))
		if err != nil {
			t.Fatal(err)
		}
		l := newMemListener()
		f := front{listener: l, certificate: certificate, web: &http.Server{Handler: http.NotFoundHandler(), TLSConfig: certificate.config()}}
		ctx, cancel := context.WithCancel(t.Context())
		var served sync.WaitGroup
		served.Go(func() { f.serve(ctx) })
		defer func() {
			cancel()
			f.web.Close()
			served.Wait()
		}()
		serves := func(step string, want testkit.Pair) {
			t.Helper()
			c, err := l.dial()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			secure := tls.Client(c, want.Client())
			if err := secure.Handshake(); err != nil {
				t.Errorf("%s: %v", step, err)
			} else if got := secure.ConnectionState().PeerCertificates[0].SerialNumber; got.Cmp(want.Serial) != 0 {
				t.Errorf("%s: certificate %v, want %v", step, got, want.Serial)
			}
		}
		logged := 0
		// settles waits well past the promised ten seconds and checks how many
		// lines were logged meanwhile.
		settles := func(step string, lines int, text string) {
			t.Helper()
			time.Sleep(10 * time.Second)
			synctest.Wait()
			all := log.String()
			first := strings.Count(all[logged:], "\n")
			time.Sleep(time.Minute)
			synctest.Wait()
			all = log.String()
			news := all[logged:]
			if n := strings.Count(news, "\n"); first != lines || n != lines || !strings.Contains(news, text) {
				t.Errorf("%s: after ten seconds %d lines, after another minute %d, want %d with %q:\n%s", step, first, n, lines, text, news)
			}
			logged = len(all)
		}
		read := func(name string) string {
			b, err := os.ReadFile(name)
			if err != nil {
				t.Fatal(err)
			}
			return string(b)
		}

		serves("at first", current)
		settles("nothing has changed", 0, "")

		current = testkit.WritePair(t, dir, 2)
		settles("both files are new", 1, "certificate reloaded")
		serves("both files are new", current)

		cert, key := read(current.CertFile), read(current.KeyFile)
		testkit.WriteFile(t, current.CertFile, "no certificate")
		settles("the certificate is broken", 1, "level=ERROR")
		serves("the certificate is broken", current)

		testkit.WriteFile(t, current.CertFile, "no certificate either")
		settles("it is broken otherwise", 1, "level=ERROR")

		testkit.WriteFile(t, current.CertFile, cert)
		testkit.WriteFile(t, current.KeyFile, read(testkit.WritePair(t, t.TempDir(), 9).KeyFile))
		settles("the key is that of another", 1, "level=ERROR")
		serves("the key is that of another", current)

		os.Remove(current.KeyFile)
		settles("the key is missing", 1, "level=ERROR")
		serves("the key is missing", current)

		os.Remove(current.CertFile)
		settles("both are missing", 1, "level=ERROR")
		serves("both are missing", current)

		testkit.WriteFile(t, current.KeyFile, key)
		testkit.WriteFile(t, current.CertFile, cert)
		time.Sleep(10 * time.Second)
		serves("the old pair is back", current)

		current = testkit.WritePair(t, dir, 3)
		time.Sleep(10 * time.Second)
		serves("a third pair", current)
		if strings.Contains(log.String(), "PRIVATE KEY") {
			t.Error("a key is in the log")
		}
	})
}

// startOnSocket runs the binary on a socket file and waits until it answers
// there. stop sends SIGTERM and returns the exit status.
func startOnSocket(t *testing.T, path string, env ...string) (stop func() int) {
	t.Helper()
	out := &testkit.Output{}
	cmd := exec.Command(testkit.BuildBinary(t))
	cmd.Env = append([]string{"GORACE=atexit_sleep_ms=0", "HOST=unix:" + path}, env...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	stop = sync.OnceValue(func() int {
		cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(testkit.Patience, func() { cmd.Process.Kill() })
		defer kill.Stop()
		cmd.Wait()
		return cmd.ProcessState.ExitCode()
	})
	t.Cleanup(func() {
		stop()
		if t.Failed() {
			t.Logf("the server printed:\n%s", out)
		}
	})
	for deadline := time.Now().Add(testkit.Patience); !strings.Contains(out.String(), "listens on unix:"+path+"\n"); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the server did not say that it listens")
		}
	}
	return stop
}

// socketClient is an HTTP client for whoever listens at path.
func socketClient(path string) *http.Client {
	return &http.Client{Transport: &http.Transport{
		DialContext:       func(context.Context, string, string) (net.Conn, error) { return net.Dial("unix", path) },
		DisableKeepAlives: true,
	}}
}

// socketDir returns a directory whose name is short enough for socket files.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "parley")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func TestSocketFile(t *testing.T) {
	path := filepath.Join(socketDir(t), "parley.sock")
	// What a killed process leaves behind.
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	stale.SetUnlinkOnClose(false)
	stale.Close()
	stop := startOnSocket(t, path)

	var minted struct{ Code, AppID string }
	res, err := socketClient(path).Post("http://localhost/rendezvous/code", "application/json", nil)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	if err := json.NewDecoder(res.Body).Decode(&minted); err != nil || !validCode(minted.Code) {
		t.Fatalf("minted %+v: %v", minted, err)
	}
	v := victim{connect: func() (net.Conn, error) { return net.Dial("unix", path) }}
	a := v.raw(t, wsDial{appID: minted.AppID, side: "A"})
	b := v.raw(t, wsDial{appID: minted.AppID, side: "B"})
	a.want(t, frameRoomFull)
	b.want(t, frameRoomFull)
	a.write(t, textFrame(`{"type":"offer"}`))
	b.want(t, `{"type":"offer"}`)

	// A second server must not take the file away from the first.
	if exit, _, stderr := testkit.RunBinary(t, nil, "HOST=unix:"+path); exit != 1 || !strings.Contains(stderr, "another process listens there") {
		t.Errorf("a second server: exit status %d\n%s", exit, stderr)
	}
	if res, err := socketClient(path).Get("http://localhost/healthz"); err != nil || res.StatusCode != http.StatusOK {
		t.Errorf("the first server after that: %v, %v", res, err)
	} else {
		res.Body.Close()
	}

	if exit := stop(); exit != 0 {
		t.Errorf("exit status %d", exit)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the socket file after the exit: %v", err)
	}
	if code := a.closed(); code != closeGoingAway {
		t.Errorf("closed with %d", code)
	}
}

// A server too busy to accept is not a stale file.
func TestSocketFileOfBusyServer(t *testing.T) {
	path := filepath.Join(socketDir(t), "busy.sock")
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer syscall.Close(fd)
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 0)); err != nil {
		t.Fatal(err)
	}
	var waiting []net.Conn
	defer func() {
		for _, c := range waiting {
			c.Close()
		}
	}()
	for len(waiting) < 1000 {
		c, err := net.DialTimeout("unix", path, 100*time.Millisecond)
		if err != nil {
			break // the backlog is full
		}
		waiting = append(waiting, c)
	}
	if l, err := listen("unix:"+path, 0); err == nil {
		l.Close()
		t.Error("the file was taken from a server that has not accepted yet")
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}

func TestMetricsAddr(t *testing.T) {
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	apart := free.Addr().String()
	free.Close()
	ts, _ := newLoopServer(t, "METRICS_ADDR="+apart, "METRICS_ROUTE=/internal/numbers")
	get := func(url string) (status int, body string) {
		t.Helper()
		res, err := ts.http.Get(url)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	profiles := []string{"/debug/pprof/", "/debug/pprof/heap", "/debug/pprof/goroutine", "/debug/pprof/mutex?seconds=1"}
	for _, path := range profiles {
		if status, _ := get("http://parley.test" + path); status != 404 {
			t.Errorf("%s: %d in public", path, status)
		}
	}
	for path, want := range map[string]int{"/healthz": 200, "/metrics": 404, "/internal/numbers": 404} {
		if status, _ := get("http://parley.test" + path); status != want {
			t.Errorf("%s: %d, want %d", path, status, want)
		}
	}
	ts.http.CloseIdleConnections()
	ts.http = &http.Client{Transport: &http.Transport{}}
	for path, want := range map[string]int{"/internal/numbers": 200, "/metrics": 404, "/healthz": 404, "/ws": 404, "/rendezvous/code": 404, "/": 404} {
		status, body := get("http://" + apart + path)
		if status != want || (status == 200) != strings.Contains(body, "parley_build_info{") {
			t.Errorf("%s apart: %d, want %d\n%.200s", path, status, want, body)
		}
	}
	for _, path := range profiles {
		if status, body := get("http://" + apart + path); status != 200 || body == "" {
			t.Errorf("%s apart: %d %.200s", path, status, body)
		}
	}
	if status, _ := get("http://" + apart + "/debug/pprof/cmdline"); status != 404 {
		t.Errorf("flags, which may be secrets, are told: %d", status)
	}
	page, _ := http.NewRequest(http.MethodGet, "http://"+apart+"/debug/pprof/heap", nil)
	page.Header.Set("Origin", "http://"+apart)
	res, err := ts.http.Do(page)
	if err != nil {
		t.Fatal(err)
	}
	res.Body.Close()
	if res.StatusCode != 404 {
		t.Errorf("a page may ask for profiles: %d", res.StatusCode)
	}
}

// A guarded is a connection that knows whether it was closed.
type guarded struct {
	net.Conn
	name   string
	closed bool
}

func (c *guarded) Close() error {
	c.closed = true
	return nil
}

func TestConnectionGuard(t *testing.T) {
	webSockets := 0
	newGuard := func(max int) *connectionGuard {
		g := newConnectionGuard(0, func() int { return webSockets })
		g.max = max
		return g
	}
	conns := make(map[string]*guarded)
	// steps are connections and their new states: + new, a active, i idle, h
	// hijacked, - closed; it returns which were evicted, in order.
	play := func(g *connectionGuard, steps string) (evicted string) {
		clear(conns)
		for step := range strings.FieldsSeq(steps) {
			name, state := step[:1], map[byte]http.ConnState{'+': http.StateNew, 'a': http.StateActive, 'i': http.StateIdle, 'h': http.StateHijacked, '-': http.StateClosed}[step[1]]
			if conns[name] == nil {
				conns[name] = &guarded{name: name}
			}
			before := make(map[string]bool)
			for n, c := range conns {
				before[n] = c.closed
			}
			g.track(conns[name], state)
			for n, c := range conns {
				if c.closed && !before[n] {
					evicted += n
					g.track(c, http.StateClosed) // as http.Server does
				}
			}
		}
		return evicted
	}
	for _, tc := range []struct {
		name       string
		max        int
		webSockets int
		steps      string
		evicted    string
		open       int
	}{
		{"within the bound", 3, 0, "1+ 2+ 3+", "", 3},
		{"the longest waiting goes first", 2, 0, "1+ 2+ 3+ 4+", "12", 2},
		{"one with a request that is answered stays", 2, 0, "1+ 1a 2+ 3+", "2", 2},
		{"where nobody waits, the longest asking goes", 2, 0, "1+ 1a 2+ 2a 3+ 3a 4+", "12", 2},
		{"idle again, it waits anew", 2, 0, "1+ 2+ 1a 1i 3+ 4+", "21", 2},
		{"what is closed makes room", 2, 0, "1+ 2+ 1- 3+", "", 2},
		{"closed before it ever waited again", 2, 0, "1+ 1a 2+ 1- 3+", "", 2},
		{"hijacked ones are counted elsewhere", 2, 0, "1+ 1a 1h 2+ 3+", "", 2},
		{"WebSockets take room", 3, 2, "1+ 2+", "1", 1},
		{"nobody waits", 1, 1, "1+", "", 1},
		{"the newcomer itself never goes", 1, 5, "1+ 2+ 3+", "12", 1},
		{"no limit", 0, 9, "1+ 2+ 3+", "", 3},
	} {
		t.Run(tc.name, func(t *testing.T) {
			webSockets = tc.webSockets
			g := newGuard(tc.max)
			if got := play(g, tc.steps); got != tc.evicted {
				t.Errorf("evicted %q, want %q", got, tc.evicted)
			}
			if len(g.where) != tc.open {
				t.Errorf("%d are open, want %d", len(g.where), tc.open)
			}
		})
	}
	for files, max := range map[int]int{0: 0, 128: 114, 1024: 969, 20000: 19000} {
		if got := newConnectionGuard(files, nil).max; got != max {
			t.Errorf("of %d files %d are for connections, want %d", files, got, max)
		}
	}
}

// crowdedFiles is how many files the server may open in TestOpenFileLimit.
const crowdedFiles = 128

// Whatever is opened and left lying about, a server out of files answers, and
// those who talk go on.
func TestOpenFileLimit(t *testing.T) {
	start := func(t *testing.T, env ...string) (*testkit.Process, victim) {
		script := filepath.Join(t.TempDir(), "few-files")
		if err := os.WriteFile(script, fmt.Appendf(nil, "#!/bin/sh\nulimit -n %d && exec %s\n", crowdedFiles, testkit.BuildBinary(t)), 0o700); err != nil {
			t.Fatal(err)
		}
		p := testkit.StartFile(t, script, env...)
		return p, victim{connect: func() (net.Conn, error) { return net.Dial("tcp", strings.TrimPrefix(p.Base, "http://")) }}
	}
	healthy := func(t *testing.T, p *testkit.Process) {
		t.Helper()
		client := http.Client{Timeout: 5 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		res, err := client.Get(p.URL("/healthz"))
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusOK {
			t.Fatalf("/healthz: %s", res.Status)
		}
	}
	// crowd opens connections that say this much and no more, and looks after the
	// server's health all the while.
	crowd := func(t *testing.T, p *testkit.Process, addr string, n int, says string) {
		t.Helper()
		for i := range n {
			c, err := net.Dial("tcp", addr)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			io.WriteString(c, says)
			if i%20 == 0 {
				healthy(t, p)
			}
		}
		healthy(t, p)
	}
	for name, says := range map[string]string{
		"silent":       "",
		"half headers": "GET /healthz HTTP/1.1\r\nHost: par",
		"idle":         "GET /healthz HTTP/1.1\r\nHost: parley.test\r\n\r\n",
		"half bodies":  "POST /rendezvous/code HTTP/1.1\r\nHost: parley.test\r\nContent-Length: 100\r\n\r\n{",
	} {
		t.Run(name, func(t *testing.T) {
			p, v := start(t)
			a, b := v.pair(t)
			crowd(t, p, strings.TrimPrefix(p.Base, "http://"), 3*crowdedFiles, says)
			a.write(t, textFrame(`{"type":"offer"}`))
			b.want(t, `{"type":"offer"}`)
		})
	}
	t.Run("metrics", func(t *testing.T) {
		free, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		free.Close()
		p, _ := start(t, "METRICS_ADDR="+free.Addr().String())
		crowd(t, p, free.Addr().String(), 3*crowdedFiles, "")
	})
	t.Run("WebSockets", func(t *testing.T) {
		p, v := start(t)
		a, b := v.pair(t)
		open := 2
		for range 3 * crowdedFiles {
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { c.Close() })
			_, res, err := openRaw(c, wsDial{appID: uuid.NewString(), side: "A"})
			if err == nil {
				open++
			} else if res == nil {
				t.Fatal(err)
			} else {
				var answer struct{ Error, Code string }
				if json.NewDecoder(res.Body).Decode(&answer); res.StatusCode != http.StatusServiceUnavailable || answer.Code != "at_capacity" || res.Header.Get("Retry-After") == "" {
					t.Fatalf("refused with %s, %+v", res.Status, answer)
				}
			}
			if open%20 == 0 {
				healthy(t, p)
			}
		}
		if want := crowdedFiles / 10 * 9; open != want {
			t.Errorf("%d WebSockets were open, want %d", open, want)
		}
		crowd(t, p, strings.TrimPrefix(p.Base, "http://"), crowdedFiles, "")
		a.write(t, textFrame(`{"type":"offer"}`))
		b.want(t, `{"type":"offer"}`)
		b.write(t, textFrame(`{"type":"answer"}`))
		a.want(t, `{"type":"answer"}`)
		// One that leaves makes room for one.
		a.write(t, clientFrame(final|opClose, "\x03\xe8"))
		a.closed()
		a.Close()
		b.want(t, framePeerLeft)
		for deadline := time.Now().Add(testkit.Patience); ; time.Sleep(10 * time.Millisecond) {
			c, err := v.connect()
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			if _, _, err = openRaw(c, wsDial{appID: uuid.NewString(), side: "A"}); err == nil {
				break
			} else if time.Now().After(deadline) {
				t.Fatalf("no room after one had left: %v", err)
			}
		}
	})
}

// What is printed at the start can be opened, and on another device too while
// that is what the server is for.
func TestAnnounce(t *testing.T) {
	local := ""
	if ip := localNetworkAddress(); ip != "" {
		local = "on other devices: http://" + ip + ":80\n"
	}
	for _, tt := range []struct{ env, host, want string }{
		{"DEV=true", "0.0.0.0", "listens on http://localhost:80\n" + local + "try: curl -fsS -X POST http://localhost:80/rendezvous/code\n\n"},
		{"DEV=true", "::", "listens on http://localhost:80\n" + local + "try: "},
		{"DEV=true", "127.0.0.1", "listens on http://127.0.0.1:80\ntry: "},
		{"DEV=false LOG_FORMAT=text", "0.0.0.0", "listens on http://localhost:80\ntry: "},
		{"LOG_FORMAT=json", "0.0.0.0", `"msg":"listening","version":"dev","address":"http://localhost:80"}`},
	} {
		var out bytes.Buffer
		announce(&out, mustLoad(t, nil, strings.Fields(tt.env)...), &net.TCPAddr{IP: net.ParseIP(tt.host), Port: 80})
		if !strings.Contains(out.String(), tt.want) {
			t.Errorf("%s, %s: %q, want %q", tt.env, tt.host, out.String(), tt.want)
		}
	}
}
