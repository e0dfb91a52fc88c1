package main

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
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

// How long the binary may take to say where it listens, and to end after
// SIGTERM: longer than any DRAIN_TIMEOUT a test sets.
const (
	startDeadline = 30 * time.Second
	stopDeadline  = 30 * time.Second
)

// However it ended, the server is back on its port as soon as it is started.
func TestRestarts(t *testing.T) {
	server := startBinary(t)
	base, pid := server.base, server.pid
	ready := func() {
		t.Helper()
		server.mint(t.Context(), t)
		if server.base != base || server.pid == pid {
			t.Errorf("at %s as process %d, was at %s as %d", server.base, server.pid, base, pid)
		}
		pid = server.pid
	}
	server.restart()
	ready()
	server.kill()
	server.restart()
	ready()
	if exit := server.stop(); exit != 0 {
		t.Errorf("exit status %d, want 0", exit)
	}
}

// built is the one binary that the tests of this process share.
var built struct {
	once sync.Once
	dir  string
	path string
	err  error
}

// buildBinary builds the server with the race detector, the first time it is
// called, and returns its path.
func buildBinary(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		if built.dir, built.err = os.MkdirTemp("", "parley-test-"); built.err != nil {
			return
		}
		built.path = filepath.Join(built.dir, "parley")
		if out, err := exec.Command("go", "build", "-race", "-o", built.path, ".").CombinedOutput(); err != nil {
			built.err = fmt.Errorf("go build -race: %w\n%s", err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// removeBinary removes what buildBinary made. TestMain calls it last.
func removeBinary() {
	if built.dir != "" {
		os.RemoveAll(built.dir)
	}
}

// A process is the real binary, running. Its methods are for the goroutine of
// the test that started it.
type process struct {
	pid int // of the current run

	// Static after construction.
	t    testing.TB
	path string
	env  []string
	out  *processOutput // of all runs

	// Of the current run.
	base     string // "http://127.0.0.1:41234"
	cmd      *exec.Cmd
	exited   chan struct{} // closed once it has ended and all it printed is in out
	expected bool          // its end was asked for with stop or kill
}

// startBinary runs the binary on a free port of 127.0.0.1 and waits until it
// listens. It sees nothing of the test's own environment but PATH and HOME. When
// the test ends it is sent SIGTERM and must exit with 0, unless the test ended it
// before with stop or kill.
func startBinary(t testing.TB, env ...string) *process {
	t.Helper()
	p := &process{t: t, path: buildBinary(t), out: &processOutput{}}
	p.env = append([]string{
		"PATH=" + os.Getenv("PATH"), "HOME=" + os.Getenv("HOME"),
		"GORACE=atexit_sleep_ms=0", // or each exit would take a second longer
		"HOST=127.0.0.1", "PORT=0",
	}, env...)
	t.Cleanup(p.cleanup)
	p.start()
	return p
}

// url returns the address of a path on the server, such as "/healthz".
func (p *process) url(path string) string { return p.base + path }

// wsURL is url for WebSockets.
func (p *process) wsURL(path string) string { return "ws" + strings.TrimPrefix(p.base, "http") + path }

// stop ends the server with SIGTERM and returns its exit status. One that takes
// too long is killed and fails the test. Stopping what has ended does nothing.
func (p *process) stop() (exit int) {
	p.t.Helper()
	p.expected = true
	p.signal(syscall.SIGTERM)
	select {
	case <-p.exited:
	case <-time.After(stopDeadline):
		p.t.Errorf("the server was still running %v after SIGTERM", stopDeadline)
		p.signal(syscall.SIGKILL)
		<-p.exited
	}
	return p.cmd.ProcessState.ExitCode()
}

// kill ends the server with SIGKILL, as a crash would.
func (p *process) kill() {
	p.t.Helper()
	p.expected = true
	p.signal(syscall.SIGKILL)
	<-p.exited
}

// restart starts the server anew on the same port, after it has been stopped
// or killed; one that still runs is stopped first.
func (p *process) restart() {
	p.t.Helper()
	if exit := p.stop(); exit > 0 {
		p.t.Errorf("the server exited with status %d", exit)
	}
	p.start("PORT=" + p.base[strings.LastIndexByte(p.base, ':')+1:])
}

// output returns all that the server has printed so far, on stdout and stderr.
func (p *process) output() string { return p.out.String() }

func (p *process) start(more ...string) {
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
	p.pid = p.cmd.Process.Pid
	cmd, exited := p.cmd, make(chan struct{})
	p.exited = exited
	go func() {
		defer close(exited)
		cmd.Wait()
	}()

	select {
	case p.base = <-base:
	case <-p.exited:
		p.t.Fatalf("the server ended before it listened: %v", p.cmd.ProcessState)
	case <-time.After(startDeadline):
		p.t.Fatalf("the server did not say where it listens within %v", startDeadline)
	}
}

func (p *process) signal(s syscall.Signal) {
	p.t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.t.Errorf("%v to the server: %v", s, err)
	}
}

func (p *process) cleanup() {
	defer func() {
		if strings.Contains(p.output(), "WARNING: DATA RACE") {
			p.t.Error("the server has a data race")
		}
		if p.t.Failed() {
			p.t.Logf("the server printed:\n%s", p.output())
		}
	}()
	if p.cmd == nil || p.cmd.Process == nil || p.expected {
		return
	}
	select {
	case <-p.exited:
		p.t.Errorf("the server ended by itself: %v", p.cmd.ProcessState)
	default:
		if exit := p.stop(); exit != 0 {
			p.t.Errorf("after SIGTERM: %v, want exit status 0", p.cmd.ProcessState)
		}
	}
}

// processOutput keeps what a process prints.
type processOutput struct {
	mu   sync.Mutex
	data []byte // guarded by mu
}

func (o *processOutput) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.data = append(o.data, b...)
	return len(b), nil
}

func (o *processOutput) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.data)
}

// listensLine is what the server prints on stdout, in words or as JSON: where it
// listens.
var listensLine = regexp.MustCompile(`(?m)(?:^parley .* listens on |"address":")(https?://[^\s"]+)`)

// A listensWatcher passes stdout on and sends the base URL once that is printed.
type listensWatcher struct {
	out  *processOutput
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

// quietPort returns a port that is free, and that no connection is given as its
// own before a program listens there.
func quietPort(t *testing.T) string {
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

// startProgram runs a program until the test ends, and waits until it listens.
func startProgram(t *testing.T, addr string, env []string, name string, args ...string) (out *processOutput) {
	t.Helper()
	out = new(processOutput)
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
	eventually(t, name+" listens", func() bool {
		c, err := net.Dial("tcp", addr)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return out
}
