package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// The examples are what people copy from, so all of them are run.

func TestExampleCurl(t *testing.T) {
	t.Parallel()
	script := func(url string) (string, error) {
		out, err := exec.CommandContext(t.Context(), "sh", "examples/curl.sh", url).CombinedOutput()
		return string(out), err
	}

	t.Run("against a server", func(t *testing.T) {
		server := testkit.StartBinary(t, "STUN_URLS=stun:stun.example")
		for _, url := range []string{server.URL(""), server.URL("/")} {
			out, err := script(url)
			if err != nil {
				t.Fatalf("curl.sh %s: %v\n%s", url, err, out)
			}
			for _, want := range []string{"minted:     {", "redeemed:   {", `"code":"gone"`, "they meet at /ws?appID="} {
				if !strings.Contains(out, want) {
					t.Errorf("curl.sh %s did not print %q:\n%s", url, want, out)
				}
			}
		}
	})

	t.Run("errors", func(t *testing.T) {
		busy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
			w.WriteHeader(http.StatusServiceUnavailable)
			io.WriteString(w, `{"error":"the server is stopping","code":"draining"}`)
		}))
		defer busy.Close()
		gone := httptest.NewServer(http.NotFoundHandler())
		gone.Close()
		for url, want := range map[string]string{
			busy.URL: "curl.sh: POST /rendezvous/code was answered 503, not 200: {\"error\":\"the server is stopping\"",
			gone.URL: "curl.sh: no answer from " + gone.URL + ": is parley running there?",
		} {
			if out, err := script(url); err == nil || !strings.Contains(out, want) {
				t.Errorf("curl.sh ended with %v and printed\n%s\nwant an error, and\n%s", err, out, want)
			}
		}
	})
}

func TestExampleGo(t *testing.T) {
	t.Parallel()
	programs := buildExamples(t)
	server := testkit.StartBinary(t)
	content := make([]byte, 5<<20+1)
	rand.Read(content)
	inbox := t.TempDir()

	t.Run("a file arrives", func(t *testing.T) {
		for name, content := range map[string][]byte{"holiday photo.jpg": content, "empty": nil} {
			send, invitation := startSend(t, programs, server, name, content)
			out, err := runReceive(t, programs, server, inbox, invitation)
			if err != nil {
				t.Fatalf("receive: %v\n%s", err, out)
			}
			if err := send.Wait(); err != nil {
				t.Errorf("send: %v\n%s", err, send.Stderr)
			}
			got, err := os.ReadFile(filepath.Join(inbox, name))
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, content) {
				t.Errorf("%s arrived with %d bytes that are not the %d sent", name, len(got), len(content))
			}

			if out, err := runReceive(t, programs, server, inbox, invitation); err == nil || !strings.Contains(out, "410 Gone: ") {
				t.Errorf("the invitation once more: %v, %q; want an error with 410 Gone", err, out)
			}
		}
	})

	t.Run("a file that is there already stays as it is", func(t *testing.T) {
		send, invitation := startSend(t, programs, server, "empty", content)
		if out, err := runReceive(t, programs, server, inbox, invitation); err == nil || !strings.Contains(out, "file exists") {
			t.Errorf("receive: %v, %q; want an error, that the file exists", err, out)
		}
		if err := send.Wait(); err == nil {
			t.Error("send ended well")
		}
		if info, err := os.Stat(filepath.Join(inbox, "empty")); err != nil || info.Size() != 0 {
			t.Errorf("the file is now %v, %v", info, err)
		}
	})

	t.Run("a stranger with the code alone", func(t *testing.T) {
		send, invitation := startSend(t, programs, server, "secret", content)
		code, _, _ := strings.Cut(invitation, "-")
		if out, err := runReceive(t, programs, server, inbox, code+"-AAAAAAAAAAAAAAAAAAAAAAAAAA"); err == nil {
			t.Errorf("receive with another key ended well: %s", out)
		}
		// Both find it out; who does first, closes.
		said := func() string { return send.Stderr.(*bytes.Buffer).String() }
		if err := send.Wait(); err == nil || !strings.Contains(said(), "does not know the key") && !strings.Contains(said(), "the other side closed") {
			t.Errorf("send: %v\n%s", err, said())
		}
		if _, err := os.Stat(filepath.Join(inbox, "secret")); err == nil {
			t.Error("the stranger has the file")
		}
	})

	t.Run("wrong invitations", func(t *testing.T) {
		for invitation, want := range map[string]string{
			"0000-KEY": "receive: 410 Gone: ",
			"hello-me": "receive: 400 Bad Request: ",
			"1234":     "receive: an invitation is a code and a key",
		} {
			if out, err := runReceive(t, programs, server, inbox, invitation); err == nil || !strings.Contains(out, want) {
				t.Errorf("receive %s: %v, %q; want an error with %q", invitation, err, out, want)
			}
		}
	})
}

// The programs end when the file has arrived, also where STUN and TURN servers
// never answer, over UDP and TCP alike: the connect of a TCP alone would wait for
// more than two minutes.
func TestExampleGoEnds(t *testing.T) {
	t.Parallel()
	addr := blackHole(t)
	server := testkit.StartBinary(t, "STUN_URLS=stun:"+addr, "TURN_URLS=turn:"+addr+"?transport=udp,turn:"+addr+"?transport=tcp", "TURN_SECRET=s")
	programs := buildExamples(t)
	began := time.Now()
	send, invitation := startSend(t, programs, server, "note", []byte("hello"))
	if out, err := runReceive(t, programs, server, t.TempDir(), invitation); err != nil {
		t.Fatalf("receive: %v\n%s", err, out)
	}
	if err := send.Wait(); err != nil {
		t.Errorf("send: %v\n%s", err, send.Stderr)
	}
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("it took %v", took)
	}
}

// blackHole returns an address of this machine where nothing answers: datagrams
// are not read, and TCP connections not completed, as behind a firewall.
func blackHole(t *testing.T) string {
	t.Helper()
	tcp, udp := listenTwice(t)
	socket, err := tcp.SyscallConn()
	if err != nil {
		t.Fatal(err)
	}
	// Go listens with as long a queue as it may.
	if err := socket.Control(func(fd uintptr) { err = syscall.Listen(int(fd), 0) }); err != nil {
		t.Fatal(err)
	}
	if err != nil {
		t.Fatal(err)
	}
	addr := udp.LocalAddr().String()
	for { // until its queue, which nobody takes from, is full
		conn, err := net.DialTimeout("tcp", addr, 200*time.Millisecond)
		if err != nil {
			return addr
		}
		t.Cleanup(func() { conn.Close() })
	}
}

// listenTwice listens on one port for TCP and UDP, until the test ends.
func listenTwice(t *testing.T) (*net.TCPListener, net.PacketConn) {
	t.Helper()
	for range 50 { // one that is free for TCP may be taken for UDP
		tcp, err := net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)})
		if err != nil {
			t.Fatal(err)
		}
		udp, err := net.ListenPacket("udp", tcp.Addr().String())
		if err != nil {
			tcp.Close()
			continue
		}
		t.Cleanup(func() { tcp.Close(); udp.Close() })
		return tcp, udp
	}
	t.Fatal("no port is free for both")
	return nil, nil
}

// Where no way leads to the other side, and the server gave no relay because the
// address had its share, the program says so.
func TestExampleGoThrottled(t *testing.T) {
	t.Parallel()
	server := testkit.StartBinary(t, "ROOM_TTL=5s", "TURN_URLS=turn:127.0.0.1:1?transport=tcp", "TURN_SECRET=s")
	ctx := rtcContext(t)
	for range maxRelayedSessions {
		server.Mint(ctx, t)
	}
	programs := buildExamples(t)
	send, invitation := startSend(t, programs, server, "note", []byte("hello"))
	code, _, _ := strings.Cut(invitation, "-")
	b := dialRTCPeer(ctx, t, server, server.Redeem(ctx, t, code), "B")
	b.start(relayOnly(nil)) // answers, and has no candidates
	err := send.Wait()
	said := send.Stderr.(*bytes.Buffer).String()
	if err == nil || !strings.Contains(said, "cannot reach each other") || !strings.Contains(said, "throttled") {
		t.Errorf("send: %v\n%s", err, said)
	}
}

// buildExamples builds the Go examples with the race detector, and returns the
// folder they are in.
func buildExamples(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-race", "-o", dir, "./examples/go/send", "./examples/go/receive")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v: %v\n%s", build, err, out)
	}
	return dir
}

// startSend starts to send a file with that name and content, and returns the
// invitation that was printed.
func startSend(t *testing.T, programs string, server *testkit.Process, name string, content []byte) (send *exec.Cmd, invitation string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
	send = exampleCommand(t, filepath.Join(programs, "send"), "-server", server.URL(""), file)
	send.Stderr = new(bytes.Buffer)
	stdout, err := send.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := send.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		send.Wait()
		t.Fatalf("send ended before it printed an invitation: %v\n%s", err, send.Stderr)
	}
	words := strings.Fields(line)
	return send, words[len(words)-1]
}

func runReceive(t *testing.T, programs string, server *testkit.Process, dir, invitation string) (output string, err error) {
	t.Helper()
	receive := exampleCommand(t, filepath.Join(programs, "receive"), "-server", server.URL(""), "-dir", dir, invitation)
	out, err := receive.CombinedOutput()
	return string(out), err
}

// exampleCommand is a program that is killed if it takes too long. One with a
// data race ends with an error.
func exampleCommand(t *testing.T, name string, args ...string) *exec.Cmd {
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	t.Cleanup(cancel)
	command := exec.CommandContext(ctx, name, args...)
	command.Env = append(os.Environ(), "GORACE=atexit_sleep_ms=0")
	return command
}
