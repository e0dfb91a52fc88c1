package main

import (
	"net"
	"net/http"
	"net/http/httptest"
	"parley/test/testkit"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// healthcheck runs parley healthcheck and returns its exit status and what it
// said on stderr.
func healthcheck(t *testing.T, args []string, env ...string) (exit int, said string) {
	t.Helper()
	var stdout, stderr strings.Builder
	exit = run(append([]string{"healthcheck"}, args...), environ(env...), &stdout, &stderr)
	if stdout.Len() > 0 {
		t.Errorf("stdout: %s", stdout.String())
	}
	return exit, stderr.String()
}

func wantHealthy(t *testing.T, args []string, env ...string) {
	t.Helper()
	if exit, said := healthcheck(t, args, env...); exit != 0 || said != "" {
		t.Errorf("healthcheck %q with %q: exit status %d, %q, want 0 and nothing", args, env, exit, said)
	}
}

func wantUnhealthy(t *testing.T, says string, args []string, env ...string) {
	t.Helper()
	exit, said := healthcheck(t, args, env...)
	if exit != 1 || !strings.HasPrefix(said, "parley healthcheck: ") || !strings.Contains(said, says) {
		t.Errorf("healthcheck %q with %q: exit status %d, %q, want 1 and %q", args, env, exit, said, says)
	}
}

func TestHealthcheck(t *testing.T) {
	ts, addr := newLoopServer(t)
	_, port, _ := net.SplitHostPort(addr)
	for _, host := range []string{"HOST=127.0.0.1", "HOST=0.0.0.0", "HOST=localhost", ""} {
		wantHealthy(t, nil, host, "PORT="+port)
	}
	wantHealthy(t, []string{"-host=127.0.0.1", "-port", port}, "PORT=1")
	// What the server read when it started is of no interest any more.
	wantHealthy(t, nil, "PORT="+port, "TURN_SECRET_FILE=/gone", "ROOMS=jwt", "WS_MAX_MSG=many")
	// It is alive as long as it answers, even though it takes nothing new.
	ts.draining.Store(true)
	if answer := ts.call(http.MethodGet, "/readyz", ""); answer.status != http.StatusServiceUnavailable {
		t.Errorf("readyz: %d", answer.status)
	}
	wantHealthy(t, nil, "PORT="+port)
	ts.draining.Store(false)

	ts.stop()
	wantUnhealthy(t, "connection refused", nil, "PORT="+port)
	wantUnhealthy(t, "PORT=0", nil, "PORT=0")
	wantUnhealthy(t, "PORT must be", nil, "PORT=http")
	wantUnhealthy(t, "-prot is not a flag", []string{"-prot", port})
}

func TestHealthcheckIPv6(t *testing.T) {
	l, err := net.Listen("tcp", "[::1]:0")
	if err != nil {
		t.Fatal("this machine has no IPv6: ", err)
	}
	server := httptest.NewUnstartedServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) {}))
	server.Listener.Close()
	server.Listener = l
	server.Start()
	defer server.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	wantHealthy(t, nil, "HOST=::", "PORT="+port)
	wantHealthy(t, nil, "HOST=::1", "PORT="+port)
}

// The certificate does not name the address that the server is asked at.
func TestHealthcheckTLS(t *testing.T) {
	pair := testkit.WritePair(t, t.TempDir(), 1)
	files := []string{"TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + pair.KeyFile}
	_, addr := newLoopServer(t, files...)
	_, port, _ := net.SplitHostPort(addr)
	wantHealthy(t, nil, append(files, "PORT="+port)...)
	wantUnhealthy(t, "400", nil, "PORT="+port)
}

func TestHealthcheckSocketFile(t *testing.T) {
	path := filepath.Join(socketDir(t), "parley.sock")
	startOnSocket(t, path)
	wantHealthy(t, nil, "HOST=unix:"+path)
	wantUnhealthy(t, "no such file", nil, "HOST=unix:"+path+".other")
}

// A server that takes connections and answers none is not alive.
func TestHealthcheckHang(t *testing.T) {
	t.Parallel()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, _ := net.SplitHostPort(l.Addr().String())
	start := time.Now()
	wantUnhealthy(t, "deadline exceeded", nil, "PORT="+port)
	if took := time.Since(start); took > healthcheckTimeout+2*time.Second {
		t.Errorf("it took %v", took)
	}
}

func TestHealthcheckOfAnother(t *testing.T) {
	server := httptest.NewServer(http.NotFoundHandler())
	defer server.Close()
	_, port, _ := net.SplitHostPort(server.Listener.Addr().String())
	wantUnhealthy(t, "404 Not Found to /healthz: is it parley?", nil, "PORT="+port)
}

func TestHealthcheckHelp(t *testing.T) {
	var stdout, stderr strings.Builder
	if exit := run([]string{"healthcheck", "-h"}, environ(), &stdout, &stderr); exit != 0 || !strings.Contains(stdout.String(), "parley healthcheck [flags]") {
		t.Errorf("exit status %d with %q", exit, stdout.String()+stderr.String())
	}
}
