package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Servers that are started here: always a new one for each load, since memory
// that was used before is used again, and tells nothing.

// A contender is a server that can be started.
type contender struct {
	name     string
	protocol func() protocol
	command  func(ctx context.Context, port string) *exec.Cmd
}

// A child is a server that was started here.
type child struct {
	url   string
	meter meter
	stop  func()
}

// start starts a server with further settings in its environment. The port that
// was free a moment ago may have been taken since, so it tries again.
func (c contender) start(ctx context.Context, env ...string) (server *child, err error) {
	for range 3 {
		if server, err = c.startOn(ctx, env); !errors.Is(err, errEnded) {
			break
		}
	}
	return server, err
}

var errEnded = errors.New("it ended at once")

func (c contender) startOn(ctx context.Context, env []string) (*child, error) {
	port, err := freePort()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var output tail
	cmd := c.command(ctx, port)
	// Of the settings that are in this environment none is meant for the child.
	cmd.Env = append(append(cmd.Env, "PATH="+os.Getenv("PATH"), "HOME="+os.Getenv("HOME")), env...)
	cmd.Stdout, cmd.Stderr = &output, &output
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = patience
	if err := cmd.Start(); err != nil {
		cancel()
		return nil, err
	}
	exited := make(chan struct{})
	go func() {
		cmd.Wait()
		close(exited)
	}()
	stop := func() {
		cancel()
		<-exited
	}
	if err := awaitPort(port, exited); err != nil {
		stop()
		return nil, fmt.Errorf("%s: %w\n%s", c.name, err, output.text)
	}
	return &child{url: "http://127.0.0.1:" + port, meter: processMeter(cmd.Process.Pid), stop: stop}, nil
}

// A tail keeps the end of what is written to it.
type tail struct{ text []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.text = append(t.text, p...)
	t.text = t.text[max(0, len(t.text)-2000):]
	return len(p), nil
}

func freePort() (string, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	defer listener.Close()
	return strconv.Itoa(listener.Addr().(*net.TCPAddr).Port), nil
}

// awaitPort waits until a server takes connections.
func awaitPort(port string, exited <-chan struct{}) error {
	for end := time.Now().Add(patience); time.Now().Before(end); {
		c, err := net.Dial("tcp", "127.0.0.1:"+port)
		if err == nil {
			return c.Close()
		}
		select {
		case <-exited:
			return errEnded
		case <-time.After(20 * time.Millisecond):
		}
	}
	return errors.New("it takes no connections")
}

// untilInterrupted is for a command that has servers to stop and files to remove
// before it ends. A second interrupt ends it at once.
func untilInterrupted(ctx context.Context) (context.Context, func()) {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	return ctx, stop
}

// A workshop has what the servers are made of.
type workshop struct {
	source string // parley's
	temp   string
	parley string // the binary
}

// openWorkshop builds parley. It is called in parley's source, or below.
func openWorkshop(ctx context.Context) (*workshop, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	source := filepath.Dir(strings.TrimSpace(string(out)))
	if err != nil || source == "." {
		return nil, errors.New("this has to be run in parley's source directory")
	}
	temp, err := os.MkdirTemp("", "parley-bench-")
	if err != nil {
		return nil, err
	}
	w := &workshop{source: source, temp: temp, parley: filepath.Join(temp, "parley")}
	build := exec.CommandContext(ctx, "go", "build", "-o", w.parley, ".")
	build.Dir = source
	if out, err := build.CombinedOutput(); err != nil {
		w.close()
		return nil, fmt.Errorf("go build: %w\n%s", err, out)
	}
	return w, nil
}

func (w *workshop) close() { os.RemoveAll(w.temp) }

// parleyServer has everything on, and limits that are out of the way of a load.
func (w *workshop) parleyServer() contender {
	return contender{"parley", parleyProtocol, func(ctx context.Context, port string) *exec.Cmd {
		cmd := exec.CommandContext(ctx, w.parley)
		cmd.Env = []string{"HOST=127.0.0.1", "PORT=" + port, "ROOMS=open", "LOG_LEVEL=warn",
			"CODE_DIGITS=8", "MAX_SESSIONS=10000000"}
		return cmd
	}}
}

// yardstickServer is this program, in a process of its own.
func (w *workshop) yardstickServer() (contender, error) {
	self, err := os.Executable()
	return contender{"yardstick", yardstickProtocol, func(ctx context.Context, port string) *exec.Cmd {
		return exec.CommandContext(ctx, self, "yardstick", "127.0.0.1:"+port)
	}}, err
}

// peerJSServer installs it, if that has not been done before. Its limit on
// connections is out of the way, as parley's are; the rest is as it comes.
func (w *workshop) peerJSServer(ctx context.Context, stderr io.Writer) (contender, error) {
	dir := filepath.Join(w.source, "bench", "peerjs")
	script := filepath.Join(dir, "node_modules", "peer", "dist", "bin", "peerjs.js")
	if _, err := os.Stat(script); err != nil {
		fmt.Fprintln(stderr, "installing the PeerJS server into bench/peerjs/node_modules")
		install := exec.CommandContext(ctx, "npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund")
		install.Dir = dir
		if out, err := install.CombinedOutput(); err != nil {
			return contender{}, fmt.Errorf("npm ci: %w (-servers yardstick,parley does without)\n%s", err, out)
		}
	}
	return contender{"peerjs", peerJSProtocol, func(ctx context.Context, port string) *exec.Cmd {
		return exec.CommandContext(ctx, "node", script, "--port", port, "--host", "127.0.0.1", "--path", "/", "--concurrent_limit", "1000000")
	}}, nil
}
