package main

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/nettest"
)

// An in-memory network for tests in synctest bubbles, where real sockets never
// count as blocked. Unlike net.Pipe it buffers, so that two sides that both
// write before they read do not deadlock.

// memBuffer is how much one direction of a connection holds before writes block.
const memBuffer = 64 << 10

// A memListener accepts what dial and dialFrom connect. Make it inside the
// bubble that uses it.
type memListener struct {
	backlog chan net.Conn
	closed  chan struct{}
	close   sync.Once

	mu       sync.Mutex
	nextPort int // of the next client
}

func newMemListener() *memListener {
	return &memListener{backlog: make(chan net.Conn), closed: make(chan struct{}), nextPort: 40000}
}

func (l *memListener) Addr() net.Addr {
	return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1234}
}

func (l *memListener) Accept() (net.Conn, error) {
	select {
	case c := <-l.backlog:
		return c, nil
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

// Close stops accepting; connections already accepted live on.
func (l *memListener) Close() error {
	l.close.Do(func() { close(l.closed) })
	return nil
}

// dial connects from 127.0.0.1; it returns once the connection is accepted.
func (l *memListener) dial() (net.Conn, error) { return l.dialFrom("127.0.0.1") }

// dialFrom connects from a source address of the caller's choice.
func (l *memListener) dialFrom(ip string) (net.Conn, error) {
	from := net.ParseIP(ip)
	if from == nil {
		return nil, fmt.Errorf("dialFrom: %q is no IP address", ip)
	}
	l.mu.Lock()
	client, server := newMemConns(&net.TCPAddr{IP: from, Port: l.nextPort}, l.Addr())
	l.nextPort++
	l.mu.Unlock()
	select {
	case l.backlog <- server:
		return client, nil
	case <-l.closed:
		return nil, syscall.ECONNREFUSED
	}
}

// A memConn is one end of a connection: the two directions, seen from there.
type memConn struct {
	local, remote net.Addr
	in, out       *memPipe
}

func newMemConns(client, server net.Addr) (*memConn, *memConn) {
	up, down := newMemPipe(), newMemPipe()
	return &memConn{client, server, down, up}, &memConn{server, client, up, down}
}

func (c *memConn) Read(b []byte) (int, error)  { return c.in.read(b) }
func (c *memConn) Write(b []byte) (int, error) { return c.out.write(b) }
func (c *memConn) LocalAddr() net.Addr         { return c.local }
func (c *memConn) RemoteAddr() net.Addr        { return c.remote }

// CloseWrite lets the peer read what is on its way and then EOF.
func (c *memConn) CloseWrite() error {
	c.out.end(&c.out.writerGone)
	return nil
}

// Close is CloseWrite, and the peer's writes fail from now on.
func (c *memConn) Close() error {
	c.in.end(&c.in.readerGone)
	return c.CloseWrite()
}

func (c *memConn) SetReadDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	return nil
}

func (c *memConn) SetWriteDeadline(t time.Time) error {
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

func (c *memConn) SetDeadline(t time.Time) error {
	c.in.setDeadline(&c.in.readBy, t)
	c.out.setDeadline(&c.out.writeBy, t)
	return nil
}

// A memPipe is one direction of a connection. Whoever has to wait does so on
// changed, never on mu: only the former lets a bubble's clock go on.
type memPipe struct {
	mu      sync.Mutex
	changed *sync.Cond // any field below; guarded by mu like them

	buf        bytes.Buffer // at most memBuffer bytes
	writing    bool         // one Write at a time, so that none is torn
	readerGone bool
	writerGone bool
	readBy     memDeadline
	writeBy    memDeadline
}

type memDeadline struct {
	timer  *time.Timer // nil: none set, or set in the past
	passed bool
}

func newMemPipe() *memPipe {
	p := &memPipe{}
	p.changed = sync.NewCond(&p.mu)
	return p
}

func (p *memPipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		switch {
		case p.readerGone:
			return 0, net.ErrClosed
		case p.readBy.passed:
			return 0, os.ErrDeadlineExceeded
		case len(b) == 0:
			return 0, nil
		case p.buf.Len() > 0:
			p.changed.Broadcast()
			return p.buf.Read(b)
		case p.writerGone:
			return 0, io.EOF
		}
		p.changed.Wait()
	}
}

func (p *memPipe) write(b []byte) (n int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for p.writing && p.writeError() == nil {
		p.changed.Wait()
	}
	if err := p.writeError(); err != nil {
		return 0, err
	}
	p.writing = true
	defer func() {
		p.writing = false
		p.changed.Broadcast()
	}()
	for {
		fits := min(len(b)-n, memBuffer-p.buf.Len())
		p.buf.Write(b[n : n+fits])
		n += fits
		if n == len(b) {
			return n, nil
		}
		p.changed.Broadcast()
		p.changed.Wait()
		if err := p.writeError(); err != nil {
			return n, err
		}
	}
}

// writeError says why nothing can be written now; p.mu is held.
func (p *memPipe) writeError() error {
	switch {
	case p.writerGone:
		return net.ErrClosed
	case p.writeBy.passed:
		return os.ErrDeadlineExceeded
	case p.readerGone:
		return syscall.EPIPE
	}
	return nil
}

func (p *memPipe) end(gone *bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	*gone = true
	p.changed.Broadcast()
}

// setDeadline takes one of the pipe's own two deadlines.
func (p *memPipe) setDeadline(d *memDeadline, t time.Time) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if d.timer != nil {
		d.timer.Stop()
	}
	d.timer, d.passed = nil, !t.IsZero() && !time.Now().Before(t)
	p.changed.Broadcast()
	if t.IsZero() || d.passed {
		return
	}
	var timer *time.Timer
	timer = time.AfterFunc(time.Until(t), func() {
		p.mu.Lock()
		defer p.mu.Unlock()
		if d.timer == timer { // else a later call replaced it
			d.passed = true
			p.changed.Broadcast()
		}
	})
	d.timer = timer
}

// memPair is a connection through a listener of its own.
func memPair() (client, server net.Conn, err error) {
	l := newMemListener()
	defer l.Close()
	accepted := make(chan net.Conn, 1)
	go func() {
		c, _ := l.Accept()
		accepted <- c
	}()
	if client, err = l.dialFrom("192.0.2.7"); err != nil {
		return nil, nil, err
	}
	return client, <-accepted, nil
}

func TestMemConn(t *testing.T) {
	nettest.TestConn(t, func() (c1, c2 net.Conn, stop func(), err error) {
		c1, c2, err = memPair()
		stop = func() {
			c1.Close()
			c2.Close()
		}
		return
	})
}

func TestMemConnDeadlines(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, err := memPair()
		if err != nil {
			t.Fatal(err)
		}
		// Each call blocks in the bubble until exactly its deadline.
		expires := func(what string, after time.Duration, do func() (int, error)) int {
			t.Helper()
			start := time.Now()
			n, err := do()
			if e, ok := err.(net.Error); err != os.ErrDeadlineExceeded || !ok || !e.Timeout() {
				t.Fatalf("%s: got error %v, want a timeout", what, err)
			}
			if took := time.Since(start); took != after {
				t.Errorf("%s: took %v, want %v", what, took, after)
			}
			return n
		}
		one := make([]byte, 1)

		client.SetReadDeadline(time.Now().Add(time.Hour))
		client.SetReadDeadline(time.Now().Add(5 * time.Second))
		expires("read", 5*time.Second, func() (int, error) { return client.Read(one) })
		server.Write([]byte("hi"))
		expires("read past the deadline", 0, func() (int, error) { return client.Read(one) })
		client.SetReadDeadline(time.Time{})
		if n, err := client.Read(one); n != 1 || one[0] != 'h' || err != nil {
			t.Errorf("read without a deadline: %q, %v", one[:n], err)
		}

		// A deadline set by another goroutine reaches a Write that blocks already.
		time.AfterFunc(3*time.Second, func() { client.SetDeadline(time.Now()) })
		n := expires("write", 3*time.Second, func() (int, error) { return client.Write(make([]byte, 2*memBuffer)) })
		if n != memBuffer {
			t.Errorf("a peer that does not read took %d bytes, want %d", n, memBuffer)
		}
	})
}

func TestMemConnClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client, server, err := memPair()
		if err != nil {
			t.Fatal(err)
		}
		if got := server.RemoteAddr().String(); got != "192.0.2.7:40000" {
			t.Errorf("the server sees %s", got)
		}

		client.Write([]byte("last words"))
		client.(interface{ CloseWrite() error }).CloseWrite()
		if got, err := io.ReadAll(server); string(got) != "last words" || err != nil {
			t.Errorf("after CloseWrite the peer read %q, %v", got, err)
		}
		server.Write([]byte("heard"))
		server.Close()
		if got, err := io.ReadAll(client); string(got) != "heard" || err != nil {
			t.Errorf("after Close the peer read %q, %v", got, err)
		}
		if _, err := server.Read(make([]byte, 1)); err != net.ErrClosed {
			t.Errorf("read after Close: %v", err)
		}

		// Writes to a closed peer fail, also one that blocks as the peer closes.
		client, server, _ = memPair()
		time.AfterFunc(time.Second, func() { server.Close() })
		if n, err := client.Write(make([]byte, 2*memBuffer)); n != memBuffer || err != syscall.EPIPE {
			t.Errorf("write to a closing peer: %d, %v", n, err)
		}
		if n, err := client.Write([]byte("x")); n != 0 || err != syscall.EPIPE {
			t.Errorf("write to a closed peer: %d, %v", n, err)
		}
	})
}

func TestMemListener(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newMemListener()
		var sources []string
		done := make(chan struct{})
		go func() {
			defer close(done)
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				sources = append(sources, c.RemoteAddr().String())
			}
		}()
		l.dial()
		l.dialFrom("2001:db8::1")
		l.Close()
		<-done
		if want := []string{"127.0.0.1:40000", "[2001:db8::1]:40001"}; !slices.Equal(sources, want) {
			t.Errorf("accepted from %v, want %v", sources, want)
		}
		if _, err := l.dial(); err != syscall.ECONNREFUSED {
			t.Errorf("dial after Close: %v", err)
		}
	})
}
