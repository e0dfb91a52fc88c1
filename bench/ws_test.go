package main

import (
	"bytes"
	"encoding/json"
	"math/rand/v2"
	"slices"
	"testing"
	"time"
)

// serverFrame is a frame as servers send it.
func serverFrame(payload []byte) []byte {
	s := new(side)
	return s.unmask(appendFrame(nil, opText, payload))
}

// A frame is itself again at every length of the length, and nothing before it
// is complete.
func TestFrames(t *testing.T) {
	for _, n := range []int{0, 1, 125, 126, 500, 65535, 65536, maxFrame} {
		payload := bytes.Repeat([]byte("x"), n)
		wire := serverFrame(payload)
		op, got, size, err := nextFrame(append(wire, 0x81, 0x00))
		if op != opText || !bytes.Equal(got, payload) || size != len(wire) || err != nil {
			t.Errorf("%d bytes: op %d, %d bytes of %d, %v", n, op, len(got), size, err)
		}
		for _, cut := range []int{0, 1, 2, 3, 9, len(wire) - 1} {
			if _, _, size, err := nextFrame(wire[:min(cut, len(wire)-1)]); size != 0 || err != nil {
				t.Errorf("%d of %d bytes are a frame of %d, %v", cut, len(wire), size, err)
			}
		}
	}
	if _, _, _, err := nextFrame([]byte{0x81, 127, 0xff, 0, 0, 0, 0, 0, 0, 0}); err != errFrameTooLong {
		t.Error("a frame of 2^63 bytes is waited for:", err)
	}
}

// The yardstick forwards the same frames however TCP cuts them.
func TestUnmaskInParts(t *testing.T) {
	var wire, want []byte
	for _, n := range []int{0, 3, 125, 126, 1000, 70000, 7} {
		payload := make([]byte, n)
		for i := range payload {
			payload[i] = byte(i * 31)
		}
		wire = appendFrame(wire, opBinary, payload)
		want = append(want, serverFrame(payload)...)
		want[len(want)-len(serverFrame(payload))] = 0x80 | opBinary
	}
	random := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		s, rest, got := new(side), wire, []byte(nil)
		for len(rest) > 0 {
			n := min(1+random.IntN(1<<random.IntN(16)), len(rest))
			part := append(bytes.Clone(s.begun[:s.nBegun]), rest[:n]...)
			got = append(got, s.unmask(part)...)
			rest = rest[n:]
		}
		if !bytes.Equal(got, want) {
			t.Fatal("the frames are not the same")
		}
	}
}

// A number can be changed in place, and read wherever it is.
func TestNumberedFrames(t *testing.T) {
	for _, p := range []protocol{parleyProtocol(), peerJSProtocol()} {
		message := p.payload("peer", "ice", 500)
		if len(message) != 500 || !json.Valid(message) {
			t.Fatalf("%d bytes: %s", len(message), message)
		}
		f, hint := number(message), 0
		for _, n := range []uint64{1, 42, 99_999_999_999} {
			f.set(n)
			_, payload, _, err := nextFrame(new(side).unmask(bytes.Clone(f.wire)))
			if err != nil || !json.Valid(payload) {
				t.Fatalf("%v: %s", err, payload)
			}
			if got, ok := numberIn(payload, &hint); got != n || !ok {
				t.Errorf("%d, %v, want %d", got, ok, n)
			}
			if got, ok := numberIn(append([]byte("further on "), payload...), &hint); got != n || !ok {
				t.Errorf("elsewhere: %d, %v, want %d", got, ok, n)
			}
			hint = 0
		}
	}
	if _, ok := numberIn([]byte(`{"type":"room_full"}`), new(int)); ok {
		t.Error("a frame without a number has one")
	}
}

// A quantile is at most the width of a bucket off.
func TestHistogram(t *testing.T) {
	random := rand.New(rand.NewPCG(3, 4))
	var h, other histogram
	var all []time.Duration
	for i := range 100_000 {
		d := time.Duration(random.ExpFloat64() * float64(100*time.Microsecond))
		all = append(all, d)
		if i%2 == 0 {
			h.add(d)
		} else {
			other.add(d)
		}
	}
	h.merge(&other)
	slices.Sort(all)
	for _, q := range []float64{0, .5, .9, .99, .999, 1} {
		want := all[min(int(q*float64(len(all))), len(all)-1)]
		if got := h.quantile(q); (got - want).Abs() > want/60+1 {
			t.Errorf("quantile %v is %v, want %v", q, got, want)
		}
	}
	if h.n != 100_000 || h.max != all[len(all)-1] {
		t.Errorf("%d durations up to %v, want %v", h.n, h.max, all[len(all)-1])
	}
	if new(histogram).latency() != nil {
		t.Error("nothing has a latency")
	}
}

func TestMedian(t *testing.T) {
	for want, all := range map[float64][]float64{1: {1}, 2: {3, 1, 2}, 5: {9, 5}} {
		if got := median(all); got != want {
			t.Errorf("median of %v is %v, want %v", all, got, want)
		}
	}
}
