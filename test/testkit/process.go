// Package testkit runs the server's binary, and the programs that it works with,
// for the tests of this repository.
package testkit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// Patience is how long a test waits for a program: longer than any DRAIN_TIMEOUT
// that a test sets.
const Patience = 30 * time.Second

// built is the one binary that the tests of this process share.
var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

// BuildBinary builds the server with the race detector, the first time it is
// called, and returns its path.
func BuildBinary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "parley-test-"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "parley")
		if out, err := exec.Command("go", "build", "-race", "-o", built.path, "parley").CombinedOutput(); err != nil {
			built.err = fmt.Errorf("go build -race: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// RemoveBinary removes what BuildBinary made. TestMain calls it last.
func RemoveBinary() {
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
}

// A Process is the real binary, running. Its methods are for the goroutine of
// the test that started it.
type Process struct {
	PID int // of the current run

	// Static after construction.
	t    testing.TB
	path string
	env  []string
	out  *Output // of all runs

	// Of the current run.
	Base     string // "http://127.0.0.1:41234"
	cmd      *exec.Cmd
	exited   chan struct{} // closed once it has ended and all it printed is in out
	expected bool          // its end was asked for with stop or kill
}

// StartBinary runs the binary on a free port of 127.0.0.1 and waits until it
// listens. When the test ends it is sent SIGTERM and must exit with 0, unless the
// test ended it before with Stop, Kill or Signal.
func StartBinary(t testing.TB, env ...string) *Process {
	t.Helper()
	return StartFile(t, BuildBinary(t), env...)
}

// StartPlainBinary is StartBinary without the race detector, for tests of speed and
// memory.
func StartPlainBinary(t testing.TB, env ...string) *Process {
	t.Helper()
	path := filepath.Join(t.TempDir(), "parley")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", path, "parley").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return StartFile(t, path, env...)
}

// StartFile is StartBinary for the server at path. It sees nothing of the test's
// own environment but PATH and HOME.
func StartFile(t testing.TB, path string, env ...string) *Process {
	t.Helper()
	p := &Process{t: t, path: path, out: &Output{}}
	p.env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"),
		"GORACE=atexit_sleep_ms=0", // or each exit would take a second longer
		"HOST=127.0.0.1", "PORT=0",
	}, env...)
	t.Cleanup(p.cleanup)
	p.start()
	return p
}

// URL returns the address of a path on the server, such as "/healthz".
func (p *Process) URL(path string) string { return p.Base + path }

// WSURL is URL for WebSockets.
func (p *Process) WSURL(path string) string { return "ws" + strings.TrimPrefix(p.Base, "http") + path }

// Stop ends the server with SIGTERM and returns its exit status. One that takes
// too long is killed and fails the test. Stopping what has ended does nothing.
func (p *Process) Stop() (exit int) {
	p.t.Helper()
	p.expected = true
	p.Signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(Patience):
		p.t.Errorf("the server was still running %v after SIGTERM", Patience)
		p.Signal(syscall.SIGKILL)
		<-p.exited
	}
	return p.cmd.ProcessState.ExitCode()
}

// Kill ends the server with SIGKILL, as a crash would.
func (p *Process) Kill() {
	p.t.Helper()
	p.expected = true
	p.Signal(syscall.SIGKILL)
	<-p.exited
}

// Restart starts the server anew on the same port, after it has been stopped
// or killed; one that still runs is stopped first.
func (p *Process) Restart() {
	p.t.Helper()
	if exit := p.Stop(); exit > 0 {
		p.t.Errorf("the server exited with status %d", exit)
	}
	p.start("PORT=" + p.Base[strings.LastIndexByte(p.Base, ':')+1:])
}

// Output returns all that the server has printed so far, on stdout and stderr.
func (p *Process) Output() string { return p.out.String() }

func (p *Process) start(more ...string) {
	p.t.Helper()
	p.expected = false
	base := make(chan string, 1)
	p.cmd = exec.Command(p.path)
	p.cmd.Env = append(append([]string{}, p.env...), more...)
	p.cmd.Stdout = &listensWatcher{out: p.out, base: base}
	p.cmd.Stderr = p.out
	p.cmd.WaitDelay = 5 * time.Second
	if err := p.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
	p.PID = p.cmd.Process.Pid
	cmd, exited := p.cmd, make(chan struct{})
	p.exited = exited
	go func() {
		defer close(exited)
		cmd.Wait()
	}()

	select {
	case p.Base = <-base:
	case <-p.exited:
		p.t.Fatalf("the server ended before it listened: %v", p.cmd.ProcessState)
	case <-time.After(Patience):
		p.t.Fatalf("the server did not say where it listens within %v", Patience)
	}
}

// Exited is closed once the current run has ended.
func (p *Process) Exited() <-chan struct{} { return p.exited }

// ExitCode returns the exit status of a run that has ended.
func (p *Process) ExitCode() int { return p.cmd.ProcessState.ExitCode() }

// Signal sends it a signal that should end it.
func (p *Process) Signal(s syscall.Signal) {
	p.expected = true
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("%v to the server: %v", s, err)
	}
}

func (p *Process) cleanup() {
	defer func() {
		if strings.Contains(p.Output(), "WARNING: DATA RACE") {
			p.t.Error("the server has a data race")
		}
		if p.t.Failed() {
			p.t.Logf("the server printed:\n%s", p.Output())
		}
	}()
	if p.cmd == nil || p.cmd.Process == nil || p.expected {
		return
	}
	select {
	case <-p.exited:
		p.t.Errorf("the server ended by itself: %v", p.cmd.ProcessState)
	default:
		if exit := p.Stop(); exit != 0 {
			p.t.Errorf("after SIGTERM: %v, want exit status 0", p.cmd.ProcessState)
		}
	}
}

// Output keeps what a process prints.
type Output struct {
	mu   sync.Mutex
	data []byte // guarded by mu
}

func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.data = append(o.data, b...)
	return len(b), nil
}

func (o *Output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.data)
}

// listensLine is what the server prints on stdout, in words or as JSON: where it
// listens.
var listensLine = regexp.MustCompile(`(?m)(?:^parley .* listens on |"address":")(https?://[^\s"]+)`)

// A listensWatcher passes stdout on and sends the base URL once that is printed.
type listensWatcher struct {
	out  *Output
	base chan<- string // nil once sent
	seen []byte        // stdout so far, until base is sent
}

func (w *listensWatcher) Write(b []byte) (int, error) {
	if w.base != nil {
		w.seen = append(w.seen, b...)
		end := strings.LastIndexByte(string(w.seen), '\n') + 1
		if m := listensLine.FindSubmatch(w.seen[:end]); m != nil {
			w.base <- string(m[1])
			w.base, w.seen = nil, nil
		}
	}
	return w.out.Write(b)
}

// QuietPort returns a port that is free, and that no connection is given as its
// own before a program listens there.
func QuietPort(t *testing.T) string {
	t.Helper()
	for range 50 {
		port := strconv.Itoa(10_000 + rand.IntN(20_000)) // Linux begins at 32768
		if l, err := net.Listen("tcp", "127.0.0.1:"+port); err == nil {
			l.Close()
			return port
		}
	}
	t.Fatal("no free port")
	return ""
}

// StartProgram runs a program until the test ends, and waits until it listens.
func StartProgram(t *testing.T, addr string, env []string, name string, args ...string) (out *Output) {
	t.Helper()
	out = new(Output)
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), env...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGTERM}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGTERM)
		cmd.Wait()
		if t.Failed() {
			t.Logf("%s printed:\n%s", name, out)
		}
	})
	Eventually(t, name+" listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return out
}

// Metric returns the value of one metric of the server.
func Metric(t testing.TB, p *Process, name string) float64 {
	t.Helper()
	res, err := http.Get(p.URL("/metrics"))
	if err != nil {
		t.Fatal(err)
	}
	defer res.Body.Close()
	text, err := io.ReadAll(res.Body)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if value, ok := strings.CutPrefix(line, name+" "); ok {
			var v float64
			if err := json.Unmarshal([]byte(value), &v); err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("there is no metric %s", name)
	return 0
}

// Eventually asks over and over until ok, for the real server has a clock of its
// own.
func Eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(Patience)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		<-tick.C
	}
}

// RunBinary runs the binary until it ends by itself.
func RunBinary(t testing.TB, args []string, env ...string) (exit int, stdout, stderr string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), Patience)
	defer cancel()
	cmd := exec.CommandContext(ctx, BuildBinary(t), args...)
	cmd.Env = append([]string{"GORACE=atexit_sleep_ms=0", "HOST=127.0.0.1", "PORT=0"}, env...)
	var out, err bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &err
	cmd.Run()
	if ctx.Err() != nil {
		t.Errorf("%q with %q was still running after %v", args, env, Patience)
	}
	return cmd.ProcessState.ExitCode(), out.String(), err.String()
}

// Mint asks the server for a code.
func (p *Process) Mint(ctx context.Context, t *testing.T) (code, appID string) {
	t.Helper()
	var minted struct{ Code, AppID string }
	p.Post(ctx, t, "/rendezvous/code", nil, &minted)
	return minted.Code, minted.AppID
}

// Redeem trades a code for its session.
func (p *Process) Redeem(ctx context.Context, t *testing.T, code string) (appID string) {
	t.Helper()
	var redeemed struct{ AppID string }
	p.Post(ctx, t, "/rendezvous/redeem", map[string]string{"code": code}, &redeemed)
	return redeemed.AppID
}

// Post sends body as JSON, when there is one, and decodes the 200 it expects.
func (p *Process) Post(ctx context.Context, t *testing.T, path string, body, answer any) {
	t.Helper()
	var payload bytes.Buffer
	if body != nil {
		if err := json.NewEncoder(&payload).Encode(body); err != nil {
			t.Fatal(err)
		}
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, p.URL(path), &payload)
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", "application/json")
	req.Close = true // leave no idle connection behind
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		t.Fatalf("POST %s: %s", path, resp.Status)
	}
	if err := json.NewDecoder(resp.Body).Decode(answer); err != nil {
		t.Fatalf("POST %s: %v", path, err)
	}
}
