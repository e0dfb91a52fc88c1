package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"time"
)

// How clients reach the relay: UDP and TCP on TURN_PORT, and, where the server
// ends TLS itself, TLS on the port of HTTPS (sniffListener hands those on).

const (
	// A stream has turnHelloTimeout for a first valid request, TLS included, and
	// turnIdleTimeout for each next one until it has an allocation. Then it lives as
	// long as that.
	turnHelloTimeout = 10 * time.Second
	turnIdleTimeout  = 30 * time.Second
	// A stream that takes nothing for so long is closed.
	streamWriteTimeout = 10 * time.Second
	// maxStreamQueue is how many bytes may wait for a stream. More would only be
	// late: who sends is told of a slow path by packets that get lost.
	maxStreamQueue = 256 << 10
	streamBuffer   = 4 << 10
	udpBuffer      = 4 << 20 // of the kernel, so that a burst fits
)

// turnSockets are what a turnServer reads from, and writes to.
type turnSockets struct {
	replies turnWriter // for any goroutine

	// Ports that clients are told; 0 before they are open, and without TLS.
	port, tlsPort atomic.Int32

	guard    *connectionGuard // static once open
	udp      *net.UDPConn     // static once open
	listener net.Listener     // static once open
	tasks    *taskGroup
	held     atomic.Int64 // streams with an allocation, which guard does not know

	// guarded by the turnServer's mu
	closed  bool
	streams map[*turnStream]struct{}
}

// open opens UDP and TCP on a port of host, where 0 is any that is free for both,
// and serves them.
func (t *turnServer) openSockets(host string, port int, guard *connectionGuard) (err error) {
	t.guard = guard
	for try := 0; ; try++ {
		if t.listener, err = net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port))); err != nil {
			return fmt.Errorf("TURN_PORT: %w", err)
		}
		addr := t.listener.Addr().(*net.TCPAddr)
		var u net.PacketConn
		if u, err = net.ListenPacket("udp", net.JoinHostPort(host, strconv.Itoa(addr.Port))); err == nil {
			t.udp = u.(*net.UDPConn)
			t.port.Store(int32(addr.Port))
			break
		}
		t.listener.Close()
		if port != 0 || try == 100 {
			return fmt.Errorf("TURN_PORT: %w", err)
		}
	}
	t.udp.SetReadBuffer(udpBuffer)
	t.udp.SetWriteBuffer(udpBuffer)
	t.tasks.Go(func() { t.serveUDP(t.udp) })
	t.tasks.Go(t.acceptStreams)
	return nil
}

// close ends all relaying, and returns when nothing is at work any more.
func (t *turnServer) close() {
	t.mu.Lock()
	t.closed = true
	var streams []*turnStream
	for s := range t.streams {
		streams = append(streams, s)
	}
	t.mu.Unlock()
	if t.udp != nil {
		t.udp.Close()
		t.listener.Close()
	}
	for _, s := range streams {
		s.abort()
	}
	t.tasks.wait()
	for i := range t.ports {
		if a := t.ports[i].Load(); a != nil {
			t.end(a)
		}
	}
}

// A directWriter sends each message at once.
type directWriter struct{ *turnServer }

func (w directWriter) send(to turnSource, message []byte) bool {
	if to.stream != nil {
		return to.stream.queue(message)
	}
	if w.udp == nil {
		return false
	}
	_, err := w.udp.WriteToUDPAddrPort(message, to.addr)
	return err == nil
}

// serveUDP serves a socket until it is closed.
func (t *turnServer) serveUDP(c *net.UDPConn) {
	buf := make([]byte, headroom+maxTURNMessage+1+tailroom)
	for {
		n, addr, err := c.ReadFromUDPAddrPort(buf[headroom : headroom+maxTURNMessage+1])
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // of an answer that could not be delivered
			continue
		}
		if n > maxTURNMessage {
			t.metrics.drop(turnTooLarge)
			continue
		}
		t.take(t.replies, turnSource{addr: unmapped(addr)}, buf, headroom, headroom+n, t.now())
	}
}

func unmapped(a netip.AddrPort) netip.AddrPort { return netip.AddrPortFrom(a.Addr().Unmap(), a.Port()) }

// acceptStreams serves the streams of TURN_PORT.
func (t *turnServer) acceptStreams() {
	for {
		c, err := t.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		} else if err != nil { // no files are left; one will be
			t.log.Warn("a TURN connection could not be accepted", "error", err)
			time.Sleep(acceptAgain)
			continue
		}
		t.guard.track(c, http.StateNew)
		c.SetDeadline(time.Now().Add(turnHelloTimeout))
		t.tasks.Go(func() { t.serveStream(c) })
	}
}

// acceptAgain is how long nothing is accepted after that failed, as in net/http.
const acceptAgain = 50 * time.Millisecond

// A turnStream is a client's connection by TCP or TLS.
type turnStream struct {
	net.Conn
	t          *turnServer
	allocation atomic.Pointer[relayAllocation]

	mu sync.Mutex
	// guarded by mu
	closed  bool
	writing bool   // a goroutine is
	pending []byte // for that to write
}

// serveStream serves a connection that its guard knows, and that has its first
// deadline, until it ends.
func (t *turnServer) serveStream(c net.Conn) {
	s := &turnStream{Conn: c, t: t}
	c.SetWriteDeadline(time.Time{})
	t.mu.Lock()
	refused := t.closed
	if !refused {
		t.streams[s] = struct{}{}
	}
	t.mu.Unlock()
	if !refused {
		s.read()
	}
	s.abort()
	t.mu.Lock()
	delete(t.streams, s)
	if a := s.allocation.Load(); a != nil {
		t.endLocked(a)
	}
	t.mu.Unlock()
	t.guard.track(c, http.StateClosed)
}

// abort closes the connection, with nothing more to say.
func (s *turnStream) abort() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	rawConn(s.Conn).Close()
}

// read reads messages until the stream ends, or breaks the rules.
func (s *turnStream) read() {
	tcp, ok := rawConn(s.Conn).RemoteAddr().(*net.TCPAddr)
	if !ok {
		return
	}
	src := turnSource{unmapped(tcp.AddrPort()), s}
	buf := make([]byte, headroom+streamBuffer)
	begin, end := headroom, headroom // of what is read and not taken
	for {
		n, err := s.Conn.Read(buf[end:])
		end += n
		now := s.t.now()
		for {
			size, ok := streamMessage(buf[begin:end])
			if !ok {
				s.t.metrics.refuse(turnNoTURN)
				return
			}
			if size > maxTURNMessage {
				s.t.metrics.refuse(turnTooBig)
				return
			}
			if size == 0 || begin+size > end {
				break
			}
			s.t.take(s.t.replies, src, buf, begin, begin+size, now)
			begin += size
		}
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				s.t.metrics.refuse(turnSilent)
			}
			return
		}
		if begin > headroom {
			end = headroom + copy(buf[headroom:], buf[begin:end])
			begin = headroom
		}
	}
}

// streamMessage returns how long the message at the beginning of b is, its padding
// included, and 0 while that is not known. It is not ok if none begins so.
func streamMessage(b []byte) (size int, ok bool) {
	if len(b) == 0 {
		return 0, true
	}
	switch b[0] >> 6 {
	case 0: // STUN
		if len(b) < 4 {
			return 0, true
		}
		size = int(binary.BigEndian.Uint16(b[2:]))
		return 20 + size, size%4 == 0
	case 1: // ChannelData
		if len(b) < 4 {
			return 0, true
		}
		return 4 + (int(binary.BigEndian.Uint16(b[2:]))+3)&^3, true
	}
	return 0, false
}

// seen says that a stream's client has sent a valid request.
func (src turnSource) seen() {
	if s := src.stream; s != nil && s.allocation.Load() == nil {
		s.extend(turnIdleTimeout)
	}
}

// extend gives the stream's client so long for what comes next.
func (s *turnStream) extend(d time.Duration) { s.SetReadDeadline(time.Now().Add(d)) }

// hold gives the stream its allocation, unless it is closed. It lives as long as
// that, however many connections there are.
func (s *turnStream) hold(a *relayAllocation) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.t.guard.track(s.Conn, http.StateHijacked)
	s.t.held.Add(1)
	s.allocation.Store(a)
	s.extend(time.Duration(a.expires.Load()) - s.t.now())
	return true
}

// release takes the allocation from the stream.
func (s *turnStream) release(a *relayAllocation) {
	if s.allocation.CompareAndSwap(a, nil) {
		s.t.held.Add(-1)
		s.extend(turnIdleTimeout)
	}
}

// queue lets a goroutine write a message, and those after it: whoever sends does
// not wait for the network.
func (s *turnStream) queue(message []byte) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || len(s.pending)+len(message) > maxStreamQueue {
		return false
	}
	s.pending = append(s.pending, message...)
	if !s.writing {
		s.writing = true
		go s.write()
	}
	return true
}

// write writes what is pending until nothing is.
func (s *turnStream) write() {
	var written []byte
	for {
		s.mu.Lock()
		if len(s.pending) == 0 || s.closed {
			s.writing, s.pending = false, nil // an idle stream has no buffer
			s.mu.Unlock()
			return
		}
		written, s.pending = s.pending, written[:0]
		s.mu.Unlock()
		s.SetWriteDeadline(time.Now().Add(streamWriteTimeout))
		if _, err := s.Conn.Write(written); err != nil {
			s.abort() // whoever reads ends then
		}
	}
}
