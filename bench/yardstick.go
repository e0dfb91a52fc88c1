package main

import (
	"bytes"
	"context"
	"crypto/sha1"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
)

// The yardstick is no server but what any has to do at the least: it joins the
// two WebSockets that ask for the same session, and forwards frames with nothing
// done to them but unmasking. No message is looked into, no ping sent, no slow
// or hostile client thought of, and an idle connection holds no buffer. A cost
// as a multiple of its own is about the same on any machine.
type yardstick struct {
	mu      sync.Mutex
	waiting map[string]*side // by session
	buffers sync.Pool        // of *[forwardBytes]byte
}

// forwardBytes is the most that is read at once.
const forwardBytes = 32 << 10

// A side is one connection of two.
type side struct {
	conn *net.TCPConn
	raw  syscall.RawConn
	to   *side

	out     []byte   // still to be written
	broken  bool     // writing failed
	closing bool     // it has sent a close frame
	left    uint64   // bytes of the current frame that are still to come
	mask    [4]byte  // of this frame, turned to the next byte
	begun   [14]byte // the beginning of a header
	nBegun  int      // bytes of it
}

func runYardstick(ctx context.Context, args []string, stdout, _ io.Writer) error {
	if len(args) != 1 {
		return misuse{fmt.Errorf("usage: bench yardstick 127.0.0.1:port")}
	}
	listener, err := new(net.ListenConfig).Listen(ctx, "tcp", args[0])
	if err != nil {
		return err
	}
	context.AfterFunc(ctx, func() { listener.Close() })
	fmt.Fprintln(stdout, "the yardstick listens on", listener.Addr())
	return newYardstick().serve(listener)
}

func newYardstick() *yardstick {
	return &yardstick{
		waiting: map[string]*side{},
		buffers: sync.Pool{New: func() any { return new([forwardBytes]byte) }},
	}
}

// serve serves until the listener is closed.
func (y *yardstick) serve(listener net.Listener) error {
	for {
		c, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			s, session, err := y.accept(c.(*net.TCPConn))
			if err != nil {
				c.Close()
				return
			}
			y.join(s, session)
		}()
	}
}

// accept answers the handshake. What asks for the same path, up to its side, is
// the same session. Package net/http would cost more than all the rest, and make
// everything else look cheap beside it.
func (y *yardstick) accept(c *net.TCPConn) (s *side, session string, err error) {
	buf := y.buffers.Get().(*[forwardBytes]byte)
	defer y.buffers.Put(buf)
	n := 0
	for !bytes.HasSuffix(buf[:n], []byte("\r\n\r\n")) {
		more, err := c.Read(buf[n:])
		if err != nil {
			return nil, "", err
		}
		n += more
	}
	request, header, _ := bytes.Cut(buf[:n], []byte("\r\n"))
	path, _, _ := bytes.Cut(request, []byte("&side="))
	_, key, _ := bytes.Cut(header, []byte("Sec-WebSocket-Key: "))
	key, _, _ = bytes.Cut(key, []byte("\r\n"))
	sum := sha1.Sum(append(bytes.Clone(key), "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"...))
	_, err = fmt.Fprintf(c, "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Accept: %s\r\n\r\n", base64.StdEncoding.EncodeToString(sum[:]))
	if err != nil {
		return nil, "", err
	}
	raw, err := c.SyscallConn()
	return &side{conn: c, raw: raw}, string(path), err
}

// join tells both sides that they are complete, and forwards from then on. A
// side without another holds no goroutine.
func (y *yardstick) join(s *side, session string) {
	y.mu.Lock()
	other := y.waiting[session]
	if other == nil {
		y.waiting[session] = s
	} else {
		delete(y.waiting, session)
	}
	y.mu.Unlock()
	if other == nil {
		return
	}
	s.to, other.to = other, s
	const complete = `{"type":"room_full"}`
	for _, side := range []*side{s, other} {
		side.conn.Write(append([]byte{0x80 | opText, byte(len(complete))}, complete...))
		go y.forward(side)
	}
}

// forward forwards until either connection ends.
func (y *yardstick) forward(s *side) {
	s.raw.Read(func(fd uintptr) (done bool) { return y.step(s, int(fd)) })
	s.conn.Close()
	s.to.conn.Close()
}

// step forwards what can be read now. It returns whether that was all for good.
func (y *yardstick) step(s *side, socket int) (done bool) {
	buf := y.buffers.Get().(*[forwardBytes]byte)
	defer y.buffers.Put(buf)
	for {
		kept := copy(buf[:], s.begun[:s.nBegun])
		n, err := readSocket(socket, buf[kept:])
		if n == 0 {
			return !tryAgain(err)
		}
		if !s.to.write(s.unmask(buf[:kept+n])) {
			return true
		}
		if kept+n < len(buf) && !s.closing {
			return false // a short read: there is no more, but perhaps the end of a connection
		}
	}
}

// write writes all of b, and waits if it has to. Only the other side calls it.
func (s *side) write(b []byte) bool {
	s.out = b
	err := s.raw.Write(func(fd uintptr) (done bool) {
		n, err := writeSocket(int(fd), s.out)
		s.broken = err != nil && !tryAgain(err)
		s.out = s.out[n:]
		return s.broken || len(s.out) == 0
	})
	return err == nil && !s.broken
}

// unmask makes frames of a server from those of a client, in place.
func (s *side) unmask(b []byte) []byte {
	written, read := 0, 0
	s.nBegun = 0
	for read < len(b) {
		if s.left == 0 {
			head := headerSize(b[read:])
			if len(b)-read < head {
				s.nBegun = copy(s.begun[:], b[read:])
				break
			}
			s.beginFrame(b[read : read+head])
			written += copy(b[written:], b[read:read+head-4]) // without the mask
			read += head
		}
		n := int(min(s.left, uint64(len(b)-read)))
		s.unmaskPayload(b[written:written+n], b[read:read+n])
		written, read = written+n, read+n
	}
	return b[:written]
}

// headerSize is the length of a masked frame's header.
func headerSize(b []byte) int {
	if len(b) < 2 {
		return 6
	}
	switch b[1] & 0x7f {
	case 126:
		return 8
	case 127:
		return 14
	}
	return 6
}

// beginFrame reads a header, and takes the mask bit from it.
func (s *side) beginFrame(header []byte) {
	header[1] &= 0x7f
	s.closing = header[0]&0x0f == 8 // RFC 6455 section 5.2
	switch header[1] {
	case 126:
		s.left = uint64(binary.BigEndian.Uint16(header[2:]))
	case 127:
		s.left = binary.BigEndian.Uint64(header[2:])
	default:
		s.left = uint64(header[1])
	}
	copy(s.mask[:], header[len(header)-4:])
}

// unmaskPayload may be called for a payload in parts. dst may overlap with src
// from before it.
func (s *side) unmaskPayload(dst, src []byte) {
	s.left -= uint64(len(src))
	mask := uint64(binary.LittleEndian.Uint32(s.mask[:]))
	mask |= mask << 32
	i := 0
	for ; i+8 <= len(src); i += 8 {
		binary.LittleEndian.PutUint64(dst[i:], binary.LittleEndian.Uint64(src[i:])^mask)
	}
	for ; i < len(src); i++ {
		dst[i] = src[i] ^ s.mask[i&3]
	}
	for range len(src) & 3 {
		s.mask = [4]byte{s.mask[1], s.mask[2], s.mask[3], s.mask[0]}
	}
}
