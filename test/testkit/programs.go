package testkit

import (
	"bufio"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pion/ice/v4"
	"github.com/pion/webrtc/v4"
	"github.com/redis/go-redis/v9"
)

// A Redis is a real redis-server.
type Redis struct {
	t    testing.TB
	Addr string
	args []string
	cmd  *exec.Cmd
}

// StartRedis starts a redis-server on a free port, which ends with the test.
func StartRedis(t testing.TB, args ...string) *Redis {
	t.Helper()
	if _, err := exec.LookPath("redis-server"); err != nil {
		t.Fatal("redis-server is needed:", err)
	}
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s := &Redis{t: t, Addr: free.Addr().String()}
	free.Close()
	_, port, _ := net.SplitHostPort(s.Addr)
	s.args = append([]string{"--bind", "127.0.0.1", "--port", port, "--save", "", "--appendonly", "no", "--dir", t.TempDir(), "--loglevel", "notice"}, args...)
	s.Start()
	t.Cleanup(s.Stop)
	return s
}

// Start starts it again where it was.
func (s *Redis) Start() {
	s.t.Helper()
	s.cmd = exec.Command("redis-server", s.args...)
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	// What it says, and not that something answers there: that may be another's.
	ready := make(chan bool, 2)
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			if strings.Contains(lines.Text(), "Ready to accept connections") {
				ready <- true
			}
		}
		ready <- false
	}()
	select {
	case ok := <-ready:
		if !ok {
			s.t.Fatal("redis-server ended at once: perhaps its port was taken meanwhile")
		}
	case <-time.After(Patience):
		s.t.Fatal("redis-server is not ready")
	}
}

// Stop kills it.
func (s *Redis) Stop() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// Signal sends it a signal.
func (s *Redis) Signal(sig syscall.Signal) error { return s.cmd.Process.Signal(sig) }

// Client returns a Client for the test's own use.
func (s *Redis) Client() *redis.Client {
	c := redis.NewClient(&redis.Options{Addr: s.Addr, DisableIdentity: true, PoolSize: 4})
	s.t.Cleanup(func() { c.Close() })
	return c
}

// StartCoturn runs coturn on loopback until the test ends, and returns its address:
// without a configuration, or as settings say.
func StartCoturn(t *testing.T, secret string, settings ...string) string {
	t.Helper()
	path, err := exec.LookPath("turnserver")
	if err != nil {
		t.Fatal("coturn is missing: make test installs it")
	}
	if settings == nil {
		settings = []string{"-n", "--relay-ip=127.0.0.1", "--no-tls", "--no-dtls", "--no-cli", "--no-rfc5780", "--log-file=stdout"}
	}
	dir := t.TempDir()
	for range 5 { // another may take the port first
		port := FreePort(t)
		out := new(Output)
		cmd := exec.Command(path, append(slices.Clone(settings), "--listening-ip=127.0.0.1", "--allow-loopback-peers",
			"--listening-port="+port, "--use-auth-secret", "--static-auth-secret="+secret, "--realm=parley.test",
			"--relay-threads=1", "--simple-log",
			"--userdb="+filepath.Join(dir, "turndb"), "--pidfile="+filepath.Join(dir, "pid"))...)
		cmd.Dir, cmd.Stdout, cmd.Stderr = dir, out, out
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		exited := make(chan struct{})
		go func() { cmd.Wait(); close(exited) }()
		stop := func() {
			cmd.Process.Kill()
			<-exited
		}
		addr := net.JoinHostPort("127.0.0.1", port)
		if answers(addr, exited) {
			t.Cleanup(func() {
				stop()
				if t.Failed() {
					t.Logf("coturn printed:\n%s", out)
				}
			})
			return addr
		}
		stop()
		t.Logf("coturn did not start:\n%s", out)
	}
	t.Fatal("coturn does not start")
	return ""
}

// FreePort returns a port that is free for UDP and TCP on loopback.
func FreePort(t *testing.T) string {
	t.Helper()
	for range 20 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		addr := l.Addr().String()
		u, err := net.ListenPacket("udp", addr)
		l.Close()
		if err == nil {
			u.Close()
			_, port, _ := net.SplitHostPort(addr)
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// Listens reports whether something listens on a TCP address.
func Listens(addr string) bool {
	c, err := net.Dial("tcp", addr)
	if err == nil {
		c.Close()
	}
	return err == nil
}

// answers waits until coturn listens on addr, which it does on TCP as well when it
// is ready, and returns false if it has ended before.
func answers(addr string, exited <-chan struct{}) bool {
	for deadline := time.Now().Add(Patience); time.Now().Before(deadline); {
		if Listens(addr) {
			return true
		}
		select {
		case <-exited:
			return false
		case <-time.After(20 * time.Millisecond):
		}
	}
	return false
}

// WebRTCLoopback makes peers that meet on 127.0.0.1 and need no network.
func WebRTCLoopback() *webrtc.API {
	var engine webrtc.SettingEngine
	engine.SetIncludeLoopbackCandidate(true)
	engine.SetIPFilter(net.IP.IsLoopback)
	engine.SetNetworkTypes([]webrtc.NetworkType{webrtc.NetworkTypeUDP4})
	engine.SetICEMulticastDNSMode(ice.MulticastDNSModeDisabled)
	return webrtc.NewAPI(webrtc.WithSettingEngine(engine))
}
