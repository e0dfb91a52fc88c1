package main

import (
	"bytes"
	"fmt"
	"sync"
	"time"
)

// cycles has workers repeat work until the time is over, each time with a
// function to call when another operation is done.
func (b *bench) cycles(work func(done func()) error) (r result) {
	var h histogram
	var failed int
	var first error
	var mu sync.Mutex
	var workers sync.WaitGroup
	s := b.meter.start()
	for range b.workers {
		workers.Go(func() {
			own, bad, err := b.repeat(work)
			mu.Lock()
			defer mu.Unlock()
			h.merge(own)
			failed += bad
			if first == nil {
				first = err
			}
		})
	}
	workers.Wait()
	r.Failed = failed
	r.spent(s, h.n)
	r.Latency = h.latency()
	r.fail(first)
	if grown := s.grown(); grown != nil && h.n > 0 {
		each := float64(*grown) / float64(h.n)
		r.MemoryKept = &each
	}
	return r
}

// repeat is one worker.
func (b *bench) repeat(work func(done func()) error) (h *histogram, failed int, first error) {
	h = new(histogram)
	last := time.Now()
	done := func() {
		now := time.Now()
		h.add(now.Sub(last))
		last = now
	}
	for end := last.Add(b.duration); last.Before(end) && failed < giveUp; {
		if err := work(done); err != nil {
			if failed++; first == nil {
				first = err
			}
			last = time.Now()
		}
	}
	return h, failed, first
}

// pairing is what two devices do with the server, from the code to the end. Each
// message is compared with what was sent.
func (b *bench) pairing() result {
	return b.cycles(func(done func()) error {
		x, y, err := b.target.pair(b.target, true)
		if err != nil {
			return err
		}
		if err := b.exchange(x, y); err != nil {
			closeAll(x, y)
			return err
		}
		leave(x, y)
		done()
		return nil
	})
}

func (b *bench) exchange(x, y *conn) error {
	steps := []struct {
		from, to *conn
		kind     string
		size     int // bytes
		times    int
	}{
		{x, y, "offer", sdpBytes, 1},
		{y, x, "answer", sdpBytes, 1},
		{x, y, "ice", b.size, 4},
		{y, x, "ice", b.size, 4},
	}
	for _, s := range steps {
		message := b.target.payload(s.from.to, s.kind, s.size)
		for range s.times {
			if err := s.from.send(message); err != nil {
				return err
			}
		}
		for range s.times {
			got, err := s.to.await(numberZero)
			if err != nil {
				return err
			}
			if b.target.exact && !bytes.Equal(got, message) {
				return fmt.Errorf("a message was changed on its way, from %q to %q", message, got)
			}
		}
	}
	return nil
}

// mint is two operations each time.
func (b *bench) mint() result {
	return b.cycles(func(done func()) error {
		_, err := b.target.rendezvous(done)
		return err
	})
}
