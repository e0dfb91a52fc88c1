package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/md5"
	"crypto/rand"
	"crypto/sha1"
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/binary"
	"encoding/json"
	"encoding/pem"
	"errors"
	"flag"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/pion/stun/v3"
)

// The relay of TURN=on beside coturn: one client sends packets to another, both by
// the relay, on channels, as browsers do.

// turnPacket is the payload of a packet, in bytes.
const turnPacket = 1200

// A relayTarget is a TURN server that was started here.
type relayTarget struct {
	*child
	plain, tls string // addresses
	username   string
	password   string
}

// A relayFigure is one line of the report.
type relayFigure struct {
	Server, Transport string
	Rate              float64 // MB/s that was asked for
	Megabytes         float64 // that arrived
	Lost              float64 // of all packets, in percent
	CPU               float64 // ms of the server's for each MB that arrived
}

func turnUsage(w io.Writer) {
	fmt.Fprint(w, "usage: go run ./bench turn [flags]\n\n"+
		"starts parley with TURN=on and coturn, each anew for each load and in turn, relays\n"+
		"packets of 1,200 bytes from one client to another, and prints the server's CPU time\n"+
		"for each MB. Then it holds idle allocations.\n")
}

// runTURN is go run ./bench turn.
func runTURN(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	ctx, stop := untilInterrupted(ctx)
	defer stop()
	f := flag.NewFlagSet("turn", flag.ContinueOnError)
	f.SetOutput(io.Discard)
	duration := f.Duration("duration", 10*time.Second, "how long each load is measured, at most 10m")
	rounds := f.Int("rounds", 3, "how often each is measured")
	idle := f.Int("idle", 1000, "idle allocations, at most 10000")
	only := f.String("transport", "udp,tls", "transports: udp, tcp and tls")
	if err := f.Parse(args); errors.Is(err, flag.ErrHelp) {
		turnUsage(stdout)
		fmt.Fprint(stdout, "\nFlags:\n")
		f.SetOutput(stdout)
		f.PrintDefaults()
		return err
	} else if err != nil {
		return misuse{err}
	}
	if *duration <= 0 || *duration > maxDuration || *rounds < 1 || *rounds > maxRounds || *idle < 1 || *idle > 10_000 {
		return misuse{errors.New("-duration, -rounds or -idle is out of bounds: see -h")}
	}
	w, err := openWorkshop(ctx)
	if err != nil {
		return err
	}
	defer w.close()
	servers := map[string]func(context.Context) (*relayTarget, error){"parley": w.startRelay, "coturn": w.startCoturn}
	names := []string{"parley", "coturn"}

	for _, transport := range strings.Split(*only, ",") {
		for _, rate := range []float64{5, 20} {
			for range *rounds {
				for _, name := range names {
					target, err := servers[name](ctx)
					if err != nil {
						return err
					}
					figure, err := measureRelay(ctx, target, transport, rate, *duration)
					target.stop()
					if err != nil {
						return fmt.Errorf("%s: %w", name, err)
					}
					fmt.Fprintf(stdout, "%-7s %s–%s %3.0f MB/s: %6.2f ms CPU for a MB, %.3f %% lost\n", name, transport, transport, rate, figure.CPU, figure.Lost)
				}
			}
		}
	}
	for _, name := range names {
		target, err := servers[name](ctx)
		if err != nil {
			return err
		}
		bytes, err := measureIdle(target, *idle)
		target.stop()
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintf(stdout, "%-7s %d idle allocations by UDP: %.1f KB each\n", name, *idle, bytes/1000)
	}
	return nil
}

// startRelay starts parley with a session and its credential.
func (w *workshop) startRelay(ctx context.Context) (*relayTarget, error) {
	certificate, key, err := w.certificate()
	if err != nil {
		return nil, err
	}
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	var web string
	c := contender{name: "parley", command: func(ctx context.Context, p string) *exec.Cmd {
		web = p
		cmd := exec.CommandContext(ctx, w.parley)
		cmd.Env = []string{"HOST=127.0.0.1", "PORT=" + p, "TURN=on", "TURN_PORT=" + port, "TURN_MAX_BPS=0", "TURN_MAX_ALLOCATIONS=20000",
			"TURN_SECRET=s", "RATE_EXEMPT=127.0.0.1", "TLS_CERT_FILE=" + certificate, "TLS_KEY_FILE=" + key}
		return cmd
	}}
	server, err := c.start(ctx)
	if err != nil {
		return nil, err
	}
	t := &relayTarget{child: server, plain: "127.0.0.1:" + port, tls: "127.0.0.1:" + web}
	t.username, t.password, err = t.mint()
	if err != nil {
		server.stop()
	}
	return t, err
}

// mint opens a session of parley's and returns a credential for it.
func (t *relayTarget) mint() (username, password string, err error) {
	client := &http.Client{Timeout: patience, Transport: &http.Transport{DisableKeepAlives: true, TLSClientConfig: insecure()}}
	res, err := client.Post("https://"+t.tls+"/rendezvous/code", "application/json", strings.NewReader("{}"))
	if err != nil {
		return "", "", err
	}
	defer res.Body.Close()
	var answer struct {
		Servers []struct{ Username, Credential string } `json:"iceServers"`
	}
	if err := json.NewDecoder(res.Body).Decode(&answer); err != nil {
		return "", "", err
	}
	for _, s := range answer.Servers {
		if s.Username != "" {
			return s.Username, s.Credential, nil
		}
	}
	return "", "", errors.New("there is no credential in the answer")
}

// startCoturn starts coturn, with nothing on but what is compared.
func (w *workshop) startCoturn(ctx context.Context) (*relayTarget, error) {
	if _, err := exec.LookPath("turnserver"); err != nil {
		return nil, errors.New("coturn is missing: make test installs it")
	}
	certificate, key, err := w.certificate()
	if err != nil {
		return nil, err
	}
	tlsPort, err := freePort()
	if err != nil {
		return nil, err
	}
	var plain string
	c := contender{name: "coturn", command: func(ctx context.Context, p string) *exec.Cmd {
		plain = p
		return exec.CommandContext(ctx, "turnserver", "-n", "--log-file=stdout", "--simple-log", "--no-cli", "--use-auth-secret", "--static-auth-secret=s",
			"--realm=bench", "--listening-ip=127.0.0.1", "--relay-ip=127.0.0.1", "--allow-loopback-peers", "--listening-port="+p,
			"--tls-listening-port="+tlsPort, "--cert="+certificate, "--pkey="+key, "--no-dtls",
			"--pidfile="+filepath.Join(w.temp, "coturn.pid"), "--userdb="+filepath.Join(w.temp, "coturn.db"))
	}}
	server, err := c.start(ctx)
	if err != nil {
		return nil, err
	}
	username := strconv.FormatInt(time.Now().Add(time.Hour).Unix(), 10) + ":bench"
	mac := hmac.New(sha1.New, []byte("s"))
	mac.Write([]byte(username))
	return &relayTarget{child: server, plain: "127.0.0.1:" + plain, tls: "127.0.0.1:" + tlsPort,
		username: username, password: base64.StdEncoding.EncodeToString(mac.Sum(nil))}, nil
}

// certificate writes a certificate that nobody should trust.
func (w *workshop) certificate() (certFile, keyFile string, err error) {
	certFile, keyFile = filepath.Join(w.temp, "cert.pem"), filepath.Join(w.temp, "key.pem")
	if _, err := os.Stat(certFile); err == nil {
		return certFile, keyFile, nil
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(24 * time.Hour), DNSNames: []string{"bench.test"}}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return "", "", err
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return "", "", err
	}
	err = errors.Join(
		os.WriteFile(certFile, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), 0o600),
		os.WriteFile(keyFile, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}), 0o600))
	return certFile, keyFile, err
}

// insecure is for servers that were started here.
func insecure() *tls.Config { return &tls.Config{InsecureSkipVerify: true} }

// A relayClient is a client with an allocation.
type relayClient struct {
	net.Conn
	stream   bool
	target   *relayTarget
	realm    stun.Realm
	nonce    stun.Nonce
	relayed  stun.XORMappedAddress
	received []byte // of a stream, and not taken
}

func (t *relayTarget) dial(transport string) (c *relayClient, err error) {
	c = &relayClient{target: t, stream: transport != "udp"}
	switch transport {
	case "udp", "tcp":
		c.Conn, err = net.Dial(transport, t.plain)
	case "tls":
		c.Conn, err = tls.Dial("tcp", t.tls, insecure())
	default:
		return nil, misuse{fmt.Errorf("-transport %s: want udp, tcp or tls", transport)}
	}
	if err != nil {
		return nil, err
	}
	c.SetDeadline(time.Now().Add(patience))
	answer, err := c.ask(stun.MethodAllocate, stun.RawAttribute{Type: stun.AttrRequestedTransport, Value: []byte{17, 0, 0, 0}})
	if err == nil {
		err = c.relayed.GetFromAs(answer, stun.AttrXORRelayedAddress)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("allocate: %w", err)
	}
	return c, nil
}

// bind binds a channel to a peer.
func (c *relayClient) bind(number uint16, peer stun.XORMappedAddress) error {
	_, err := c.ask(stun.MethodChannelBind, stun.RawAttribute{Type: stun.AttrChannelNumber, Value: []byte{byte(number >> 8), byte(number), 0, 0}}, xorPeer(peer))
	return err
}

type xorPeer stun.XORMappedAddress

func (p xorPeer) AddTo(m *stun.Message) error {
	return (*stun.XORMappedAddress)(&p).AddToAs(m, stun.AttrXORPeerAddress)
}

// ask makes a request, and again with the nonce that it is given.
func (c *relayClient) ask(method stun.Method, attributes ...stun.Setter) (*stun.Message, error) {
	for range 2 {
		setters := append([]stun.Setter{stun.TransactionID, stun.NewType(method, stun.ClassRequest)}, attributes...)
		if len(c.nonce) > 0 {
			key := md5.Sum([]byte(c.target.username + ":" + c.realm.String() + ":" + c.target.password))
			setters = append(setters, stun.NewUsername(c.target.username), c.realm, c.nonce, stun.MessageIntegrity(key[:]))
		}
		request, err := stun.Build(setters...)
		if err != nil {
			return nil, err
		}
		if _, err := c.Write(request.Raw); err != nil {
			return nil, err
		}
		raw, err := c.next()
		if err != nil {
			return nil, err
		}
		answer := &stun.Message{Raw: bytes.Clone(raw)}
		if err := answer.Decode(); err != nil {
			return nil, err
		}
		if answer.Type.Class == stun.ClassSuccessResponse {
			return answer, nil
		}
		if c.realm.GetFrom(answer) != nil || c.nonce.GetFrom(answer) != nil {
			return nil, fmt.Errorf("refused: %v", answer)
		}
	}
	return nil, errors.New("the credential is refused")
}

// next returns the next message, until the one after it.
func (c *relayClient) next() ([]byte, error) {
	if !c.stream {
		if c.received == nil {
			c.received = make([]byte, 4096)
		}
		n, err := c.Read(c.received)
		return c.received[:n], err
	}
	for {
		if len(c.received) >= 4 {
			size := int(binary.BigEndian.Uint16(c.received[2:]))
			if c.received[0]>>6 == 0 {
				size += 20
			} else {
				size = 4 + (size+3)&^3
			}
			if len(c.received) >= size {
				message := c.received[:size]
				c.received = c.received[size:]
				return message, nil
			}
		}
		b := make([]byte, 64<<10)
		n, err := c.Read(b)
		if err != nil {
			return nil, err
		}
		c.received = append(c.received[:len(c.received):len(c.received)], b[:n]...)
	}
}

// measureRelay sends packets at a rate from one client to another.
func measureRelay(ctx context.Context, target *relayTarget, transport string, rate float64, duration time.Duration) (f relayFigure, err error) {
	a, err := target.dial(transport)
	if err != nil {
		return f, err
	}
	defer a.Close()
	b, err := target.dial(transport)
	if err != nil {
		return f, err
	}
	defer b.Close()
	const channel = 0x4000
	if err := errors.Join(a.bind(channel, b.relayed), b.bind(channel, a.relayed)); err != nil {
		return f, err
	}
	if u, ok := b.Conn.(*net.UDPConn); ok {
		u.SetReadBuffer(8 << 20) // what this end loses is not the server's fault
	}
	var got int
	var reading sync.WaitGroup
	b.SetReadDeadline(time.Now().Add(duration + 2*patience))
	reading.Go(func() {
		for {
			m, err := b.next()
			if err != nil {
				return
			}
			if len(m) == 4+turnPacket {
				got++
			}
		}
	})
	message := make([]byte, 4+turnPacket)
	binary.BigEndian.PutUint16(message, channel)
	binary.BigEndian.PutUint16(message[2:], turnPacket)
	before, err := target.meter()
	if err != nil {
		return f, err
	}
	a.SetWriteDeadline(time.Now().Add(duration + patience))
	sent, begin := 0, time.Now()
	tick := time.NewTicker(time.Millisecond)
	defer tick.Stop()
	for elapsed := time.Duration(0); elapsed < duration; elapsed = time.Since(begin) {
		for due := int(rate * 1e6 / turnPacket * elapsed.Seconds()); sent < due; sent++ {
			if _, err := a.Write(message); err != nil {
				return f, err
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return f, ctx.Err()
		}
	}
	b.SetReadDeadline(time.Now().Add(500 * time.Millisecond)) // for what is under way
	reading.Wait()
	after, err := target.meter()
	if err != nil {
		return f, err
	}
	f.Megabytes = float64(got) * turnPacket / 1e6
	f.Lost = 100 * float64(sent-got) / float64(sent)
	f.CPU = (after.cpu - before.cpu).Seconds() * 1000 / f.Megabytes
	return f, nil
}

// measureIdle returns the memory of an idle allocation by UDP. A session of
// parley's has at most 16, so there are more of them.
func measureIdle(target *relayTarget, n int) (bytes float64, err error) {
	before, err := target.meter()
	if err != nil {
		return 0, err
	}
	for i := range n {
		if i%16 == 15 && target.tls != "" && strings.Count(target.username, ":bench") == 0 {
			if target.username, target.password, err = target.mint(); err != nil {
				return 0, err
			}
		}
		c, err := target.dial("udp")
		if err != nil {
			return 0, err
		}
		defer c.Close()
	}
	after, err := target.meter()
	return float64(after.resident-before.resident) / float64(n), err
}
