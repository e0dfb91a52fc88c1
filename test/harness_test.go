// Package test has the tests of the whole: of the server's binary as it is run, of
// the documents' commands, of what is in deploy/, of the clients and the page in
// browsers. They know nothing of the server's insides.
package test

import (
	"crypto/hmac"
	"crypto/sha1"
	"encoding/base64"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"testing"

	"github.com/coder/websocket"
	"github.com/pion/stun/v3"
	"github.com/pion/turn/v5"

	"parley/test/testkit"
)

// TestMain runs the tests in the repository's root, from which all paths here are.
func TestMain(m *testing.M) {
	if err := os.Chdir(".."); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	testkit.RemoveBinary()
	os.Exit(status)
}

// As docs/reference.md has them.
const (
	subprotocolV1 = "parley.v1"

	closeReplaced websocket.StatusCode = 4500
	closeUnknown  websocket.StatusCode = 4504
	closeDeleted  websocket.StatusCode = 4510

	maxRelayedSessions = 30 // with TURN credentials, for one address
)

const coturnSecret = "shared with coturn"

// iceServers are what answers tell of STUN and TURN servers.
type iceServers struct {
	Servers   []iceServer `json:"iceServers"`
	Throttled bool        `json:"throttled"`
}

type iceServer struct {
	URLs       []string `json:"urls"`
	Username   string   `json:"username"`
	Credential string   `json:"credential"`
}

// turnPassword is the credential of a user name, as the TURN REST API draft has it.
func turnPassword(secret, username string) string {
	mac := hmac.New(sha1.New, []byte(secret))
	mac.Write([]byte(username))
	return base64.StdEncoding.EncodeToString(mac.Sum(nil))
}

// dialTURN returns a client of a TURN server on this machine.
func dialTURN(t *testing.T, uri *stun.URI) (client *turn.Client) {
	t.Helper()
	addr := net.JoinHostPort(uri.Host, fmt.Sprint(uri.Port))
	var conn net.PacketConn
	if uri.Proto == stun.ProtoTypeUDP {
		socket, err := net.ListenPacket("udp4", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		conn = socket
	} else {
		stream, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		conn = turn.NewSTUNConn(stream)
	}
	client, err := turn.NewClient(&turn.ClientConfig{STUNServerAddr: addr, TURNServerAddr: addr, Conn: conn, Username: uri.Username, Password: uri.Password})
	if err == nil {
		err = client.Listen()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		client.Close()
		conn.Close()
	})
	return client
}

// get returns the body of a page.
func get(t *testing.T, url string) string {
	t.Helper()
	res, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("%s: %s, %v", url, res.Status, err)
	}
	return string(body)
}
