//go:build long

package test

import (
	"bufio"
	"bytes"
	"context"
	"crypto/rand"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"parley/test/testkit"
)

// Two devices in a small internet (test/natlab), each behind a router of some kind,
// and the server on a machine with a public address: who connects, and how.

// The kinds of networks; natlab.sh says what each is.
const (
	natFull      = "full"
	natAddr      = "addr"
	natPort      = "port"
	natSymmetric = "symmetric"
	natWeb       = "web" // TCP 80 and 443 alone
)

// What becomes of two devices.
const (
	viaDirect = "directly"
	viaRelay  = "through a relay"
	viaNone   = "" // they do not connect
)

// natRoute is what STUN makes of two networks, which are as in natlab.sh.
func natRoute(a, b string) string {
	strict := func(kind string) bool { return kind == natPort || kind == natSymmetric }
	switch {
	case a == natWeb || b == natWeb, (a == natSymmetric || b == natSymmetric) && strict(a) && strict(b):
		return viaRelay
	}
	return viaDirect
}

// With TURN=on and a certificate, one process on one machine connects any two
// devices, by the relay where there is no other way and there alone.
func TestLongNATsWithOwnRelay(t *testing.T) {
	t.Parallel()
	programs := natPrograms(t)
	for _, cloud := range []bool{false, true} { // the server is behind a 1:1 NAT
		for i, a := range natKinds() {
			for _, b := range natKinds()[i:] {
				testNATs(t, programs, natCase{a: a, b: b, cloud: cloud, turn: true, want: natRoute(a, b)})
			}
		}
		testNATs(t, programs, natCase{a: natPort, b: natPort, isolated: true, cloud: cloud, turn: true, want: viaRelay})
	}
}

// The lab is one: without a relay those do not connect who need one.
func TestLongNATsWithoutRelay(t *testing.T) {
	t.Parallel()
	programs := natPrograms(t)
	for _, c := range []natCase{
		{a: natFull, b: natFull, want: viaNone}, // with no STUN either
		{a: natPort, b: natPort, stun: true, want: viaDirect},
		{a: natAddr, b: natSymmetric, stun: true, want: viaDirect},
		{a: natPort, b: natSymmetric, stun: true, want: viaNone},
		{a: natSymmetric, b: natSymmetric, stun: true, want: viaNone},
		{a: natFull, b: natWeb, stun: true, want: viaNone},
	} {
		testNATs(t, programs, c)
	}
}

func natKinds() []string { return []string{natFull, natAddr, natPort, natSymmetric, natWeb} }

// A natCase is two devices, and the server that they meet at.
type natCase struct {
	a, b     string // kinds of their networks
	isolated bool   // both are behind A, and cannot reach each other there
	cloud    bool
	turn     bool // TURN=on
	stun     bool // STUN alone, of a coturn on the same machine
	want     string
}

func (c natCase) name() string {
	name := c.a + " and " + c.b
	for what, is := range map[string]bool{", isolated": c.isolated, " at a cloud": c.cloud, " with STUN alone": c.stun} {
		if is {
			name += what
		}
	}
	return name
}

// testNATs sends a file from one device to the other, by the example's programs.
func testNATs(t *testing.T, programs string, c natCase) {
	t.Run(c.name(), func(t *testing.T) {
		t.Parallel()
		lab := newLab(t, c)
		dir := t.TempDir()
		pair := testkit.WritePair(t, dir, 1)
		trust := []string{"SSL_CERT_FILE=" + pair.CertFile}
		const server = "https://203.0.113.10"
		settings := []string{"PORT=443", "TLS_CERT_FILE=" + pair.CertFile, "TLS_KEY_FILE=" + pair.KeyFile, "GORACE=atexit_sleep_ms=0"}
		if c.turn {
			settings = append(settings, "TURN=on", "TURN_HOST=203.0.113.10")
		}
		if c.stun {
			settings = append(settings, "STUN_URLS=stun:203.0.113.10:3478")
			lab.start(t, "srv", nil, "turnserver", "-n", "--stun-only", "--no-cli", "--no-tls", "--no-dtls", "--log-file=stdout",
				"--userdb="+filepath.Join(dir, "turndb"), "--pidfile="+filepath.Join(dir, "pid"))
		}
		said := lab.start(t, "srv", settings, testkit.BuildBinary(t))
		testkit.Eventually(t, "the server listens", func() bool { return strings.Contains(said.String(), "listens on") })

		content := make([]byte, 1<<20)
		rand.Read(content)
		testkit.WriteFile(t, filepath.Join(dir, "film"), string(content))
		ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
		defer cancel()
		send := lab.command(ctx, "a", trust, filepath.Join(programs, "send"), "-server", server, filepath.Join(dir, "film"))
		out, err := send.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		var complaints bytes.Buffer
		send.Stderr = &complaints
		if err := send.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		if !lines.Scan() {
			send.Wait()
			t.Fatalf("send says nothing but %s", complaints.String())
		}
		words := strings.Fields(lines.Text())
		other := "b"
		if c.isolated {
			other = "a2"
		}
		began := time.Now()
		received, err := lab.command(ctx, other, trust, filepath.Join(programs, "receive"), "-server", server, "-dir", t.TempDir(), words[len(words)-1]).CombinedOutput()
		route := viaNone
		for lines.Scan() {
			for _, via := range []string{viaDirect, viaRelay} {
				if strings.HasPrefix(lines.Text(), "sent film") && strings.HasSuffix(lines.Text(), via) {
					route = via
				}
			}
		}
		send.Wait()
		t.Logf("%q after %v", route, time.Since(began).Round(100*time.Millisecond))
		if route != c.want || (err == nil) != (c.want != viaNone) {
			t.Errorf("they connect %q, want %q: %v\n%s%s", route, c.want, err, received, complaints.String())
		}
	})
}

// natPrograms builds the example, and returns where it is.
func natPrograms(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	build := exec.CommandContext(t.Context(), "go", "build", "-o", dir, "./examples/go/send", "./examples/go/receive")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return dir
}

// A lab is a small internet, with a name of its own.
type lab struct{ env []string }

func newLab(t *testing.T, c natCase) *lab {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("network namespaces need root: run make test-long as root, or in unshare -Urnm with a tmpfs on /run")
	}
	name := "nat" + strings.ToLower(rand.Text()[:5])
	l := &lab{env: append(os.Environ(), "NATLAB="+name)}
	up := []string{"up"}
	if c.cloud {
		up = append(up, "cloud")
	}
	l.run(t, up...)
	t.Cleanup(func() { l.run(t, "down") })
	l.run(t, "nat", "A", c.a)
	l.run(t, "nat", "B", c.b)
	if c.isolated {
		l.run(t, "isolate", "on")
	}
	return l
}

// run runs natlab.sh.
func (l *lab) run(t *testing.T, args ...string) {
	t.Helper()
	cmd := exec.Command("test/natlab/natlab.sh", args...)
	cmd.Env = l.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("natlab.sh %v: %v\n%s", args, err, out)
	}
}

// command returns a command on a device.
func (l *lab) command(ctx context.Context, device string, env []string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "test/natlab/natlab.sh", append([]string{"exec", device}, args...)...)
	cmd.Env = append(l.env[:len(l.env):len(l.env)], env...)
	return cmd
}

// start runs a program on a device until the test ends.
func (l *lab) start(t *testing.T, device string, env []string, args ...string) *testkit.Output {
	t.Helper()
	out := new(testkit.Output)
	cmd := l.command(t.Context(), device, env, args...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s printed:\n%s", args[0], out)
		}
	})
	return out
}
