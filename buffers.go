package main

import (
	"math/bits"
	"sync"
)

// A buffer is memory borrowed from a bufferPool.
type buffer struct {
	b    []byte
	home *sync.Pool // nil for one too large to keep
}

// free gives the buffer back; nothing may use it afterwards.
func (b *buffer) free() {
	if b.home != nil {
		b.home.Put(b)
	}
}

// A bufferPool lends buffers in powers of two, so that a frame borrows little
// more than it needs.
type bufferPool struct {
	classes [maxClass - minClass + 1]sync.Pool
}

// The smallest and the largest buffers of a pool, as powers of two; larger ones
// are made anew.
const (
	minClass = 9
	maxClass = 21
)

// get lends a buffer of at least n bytes; its length is its capacity.
func (p *bufferPool) get(n int) *buffer {
	class := max(bits.Len(uint(max(n, 1)-1)), minClass)
	if class > maxClass {
		return &buffer{b: make([]byte, n)}
	}
	home := &p.classes[class-minClass]
	if b, ok := home.Get().(*buffer); ok {
		return b
	}
	return &buffer{b: make([]byte, 1<<class), home: home}
}
