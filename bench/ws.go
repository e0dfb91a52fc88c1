package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
)

// The client side of WebSocket, as far as a load needs it. It is written by hand
// because the load shares the machine with the server it measures: a frame is
// built once and only its number changes, where a library would mask, allocate
// and lock anew for each, and take more of the processors than the server does.
// How the server speaks the protocol is not tested here, but in its own tests.

const (
	opText   = 1
	opBinary = 2
	opClose  = 8
	opPing   = 9
	opPong   = 10
)

// maxFrame is the longest frame accepted from a server, in bytes.
const maxFrame = 128 << 10

// maskKey masks every frame that is sent. It is always the same, so that a
// frame's number can be changed in place. (A key has to be unpredictable where
// an attacker chooses what is sent through a cache. Neither is here.)
func maskKey(i int) byte { return [4]byte{0x37, 0xfa, 0x21, 0x3d}[i&3] }

// closeNormal is a close frame with code 1000: the client leaves for good.
func closeNormal() []byte { return appendFrame(nil, opClose, []byte{0x03, 0xe8}) }

// appendFrame appends a frame as clients send it.
func appendFrame(dst []byte, op byte, payload []byte) []byte {
	dst = append(dst, 0x80|op)
	switch n := len(payload); {
	case n < 126:
		dst = append(dst, 0x80|byte(n))
	case n <= 0xffff:
		dst = append(dst, 0x80|126, byte(n>>8), byte(n))
	default:
		dst = append(dst, 0x80|127)
		dst = binary.BigEndian.AppendUint64(dst, uint64(n))
	}
	for i := range 4 {
		dst = append(dst, maskKey(i))
	}
	for i, b := range payload {
		dst = append(dst, b^maskKey(i))
	}
	return dst
}

var errFrameTooLong = errors.New("the server sent a frame that is longer than any that was sent to it")

// nextFrame returns the first of the frames that a server sent, and how many
// bytes it took: 0 while b does not hold all of it.
func nextFrame(b []byte) (op byte, payload []byte, size int, err error) {
	if len(b) < 2 {
		return 0, nil, 0, nil
	}
	head, n := 2, uint64(b[1]&0x7f)
	switch n {
	case 126:
		head = 4
	case 127:
		head = 10
	}
	if len(b) < head {
		return 0, nil, 0, nil
	}
	switch head {
	case 4:
		n = uint64(binary.BigEndian.Uint16(b[2:]))
	case 10:
		n = binary.BigEndian.Uint64(b[2:])
	}
	if n > maxFrame {
		return 0, nil, 0, errFrameTooLong
	}
	size = head + int(n)
	if len(b) < size {
		return 0, nil, 0, nil
	}
	return b[0] & 0x0f, b[head:size], size, nil
}

// A numbered frame carries a number that can be changed in place. The number has
// always 12 digits, the first of them 1, so that it is JSON of constant length.
type numbered struct {
	wire  []byte // the masked frame
	start int    // index in wire of the number's second digit
	phase int    // index of the same digit in the payload, which the mask goes by
}

const (
	numberKey  = `"n":1`
	numberZero = `"n":100000000000`
)

// number makes a numbered frame of a payload that holds numberZero.
func number(payload []byte) numbered {
	wire := appendFrame(nil, opText, payload)
	i := bytes.Index(payload, []byte(numberKey)) + len(numberKey)
	return numbered{wire: wire, start: len(wire) - len(payload) + i, phase: i}
}

func (f numbered) set(n uint64) {
	for i := len(numberZero) - len(numberKey) - 1; i >= 0; i-- {
		f.wire[f.start+i] = byte('0'+n%10) ^ maskKey(f.phase+i)
		n /= 10
	}
}

// numberIn returns the number in a payload. hint is where the last one was, and
// is where the next one will be: most often nothing has to be searched.
func numberIn(payload []byte, hint *int) (n uint64, ok bool) {
	i := *hint
	if i+len(numberZero) > len(payload) || string(payload[i:i+len(numberKey)]) != numberKey {
		i = bytes.Index(payload, []byte(numberKey))
		if i < 0 || i+len(numberZero) > len(payload) {
			return 0, false
		}
		*hint = i
	}
	for _, digit := range payload[i+len(numberKey) : i+len(numberZero)] {
		n = n*10 + uint64(digit-'0')
	}
	return n, true
}

// A conn is a connection on which one thing is done after the other, as while
// it is set up.
type conn struct {
	net.Conn
	in []byte // received, and not looked at yet
	to string // the ID of the other peer, where the protocol needs one
}

// A handshake always has the same key, and so the same answer.
const (
	handshakeKey    = "dGhlIHNhbXBsZSBub25jZQ=="
	handshakeAccept = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
)

// upgrade makes a WebSocket of a connection.
func (c *conn) upgrade(host, path string) error {
	_, err := fmt.Fprintf(c, "GET %s HTTP/1.1\r\nHost: %s\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"+
		"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: %s\r\n\r\n", path, host, handshakeKey)
	if err != nil {
		return err
	}
	r := bufio.NewReaderSize(c, 1024)
	res, err := http.ReadResponse(r, nil)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	if res.StatusCode != http.StatusSwitchingProtocols {
		return newRefusal("the WebSocket", res)
	}
	if got := res.Header.Get("Sec-WebSocket-Accept"); got != handshakeAccept {
		return fmt.Errorf("the server answered the handshake with %q, want %q", got, handshakeAccept)
	}
	early, err := r.Peek(r.Buffered()) // the first frames come with the answer
	c.in = bytes.Clone(early)
	return err
}

// text returns the next message, and answers pings on the way.
func (c *conn) text() ([]byte, error) {
	for {
		op, payload, size, err := nextFrame(c.in)
		if err != nil {
			return nil, err
		}
		if size == 0 {
			if err := c.fill(); err != nil {
				return nil, err
			}
			continue
		}
		c.in = c.in[size:]
		switch op {
		case opText, opBinary:
			return payload, nil
		case opClose:
			return nil, fmt.Errorf("the server closed the connection: %w", io.EOF)
		case opPing:
			if _, err := c.Write(appendFrame(nil, opPong, payload)); err != nil {
				return nil, err
			}
		}
	}
}

func (c *conn) fill() error {
	if cap(c.in)-len(c.in) < 512 {
		c.in = append(make([]byte, 0, 2*len(c.in)+2048), c.in...)
	}
	n, err := c.Read(c.in[len(c.in):cap(c.in)])
	c.in = c.in[:len(c.in)+n]
	if n > 0 {
		return nil
	}
	return err
}

// await returns the first message that contains want.
func (c *conn) await(want string) ([]byte, error) {
	for {
		m, err := c.text()
		if err != nil {
			return nil, fmt.Errorf("waiting for %s: %w", want, err)
		}
		if bytes.Contains(m, []byte(want)) {
			return m, nil
		}
	}
}

func (c *conn) send(message []byte) error {
	_, err := c.Write(appendFrame(nil, opText, message))
	return err
}

// leave closes connections with the closing handshake.
func leave(cs ...*conn) {
	for _, c := range cs {
		c.Write(closeNormal())
	}
	for _, c := range cs {
		for {
			if _, err := c.text(); err != nil {
				break
			}
		}
		c.Close()
	}
}

// closeAll closes those of the connections that there are.
func closeAll(cs ...*conn) {
	for _, c := range cs {
		if c != nil {
			c.Close()
		}
	}
}
