//go:build !race

package main

import (
	"runtime"
	"runtime/debug"
	"sync"
	"testing"
	"testing/synctest"
)

// What the race detector makes meaningless: it lets pools lose things at random.
// TestWithoutRace runs this file's tests from a run that has it.

func init() { withoutRace = true }

func TestAllocsRelay(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1)) // it empties pools
	relay := newRelay(t)
	if n := testing.AllocsPerRun(1000, func() { relay.one(true) }); n != 0 {
		t.Errorf("relaying one frame allocates %v times", n)
	}
	// Corked frames are taken together.
	if n := testing.AllocsPerRun(1000, func() {
		for range 10 {
			relay.one(false)
		}
		relay.take()
	}); n != 0 {
		t.Errorf("relaying ten frames at once allocates %v times", n)
	}
}

// TestAllocsHotFunctions fails when a hot function allocates more often than it
// does today. Who makes one allocate less, lowers its number here.
func TestAllocsHotFunctions(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(400)) // it empties pools
	for name, hot := range map[string]struct {
		bench  func(*testing.B)
		allocs int64 // per operation
	}{
		"decode a frame":                     {BenchmarkDecodeFrame, 0},
		"relay a frame":                      {BenchmarkRelay, 0},
		"relay two frames, sockets included": {BenchmarkWire, 0},
		"store, deliver and acknowledge":     {BenchmarkMail, 2},
		"pass a frame on in a room of 4":     {func(b *testing.B) { benchRoom(b, 4) }, 2},
		"mint and redeem over HTTP":          {BenchmarkCalls, 20},
		"identify and count a caller":        {BenchmarkCaller, 3},
		// Most of these are net/http's; the client's are among them.
		"connect, take a seat and leave": {BenchmarkJoin, 175},
	} {
		t.Run(name, func(t *testing.T) {
			if got := testing.Benchmark(hot.bench).AllocsPerOp(); got > hot.allocs {
				t.Errorf("%d allocations each time, were at most %d", got, hot.allocs)
			}
		})
	}
}

// TestAllocsBuffers runs the contract suite with buffers that are counted:
// whatever happens to a frame, its buffer is given back once, and not used
// afterwards.
func TestAllocsBuffers(t *testing.T) {
	// With one processor, and no garbage collection, a pool loses nothing.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	var l lender
	env := memoryEnv()
	env.lend = l.lend
	env.settle = func() { synctest.Wait(); l.poison() }
	env.returned = l.check
	testHub(t, env)
}

// A lender lends buffers, each of which goes back to a pool of its own.
type lender struct {
	mu     sync.Mutex
	out    []*lentBuffer // guarded by mu: not yet seen to come back
	back   []*lentBuffer // guarded by mu
	frames int           // guarded by mu
}

type lentBuffer struct {
	buffer
	frees int
}

func (l *lender) lend(n int) *buffer {
	l.poison()
	l.mu.Lock()
	defer l.mu.Unlock()
	b := &lentBuffer{buffer: buffer{b: make([]byte, n), home: new(sync.Pool)}}
	l.out = append(l.out, b)
	l.frames++
	return &b.buffer
}

// poison overwrites what has come back, so that its use shows.
func (l *lender) poison() {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := l.out[:0]
	for _, b := range l.out {
		if b.count(); b.frees == 0 {
			out = append(out, b)
			continue
		}
		for i := range b.b {
			b.b[i] = '#'
		}
		l.back = append(l.back, b)
	}
	clear(l.out[len(out):])
	l.out = out
}

// count notes how often the buffer has come back.
func (b *lentBuffer) count() {
	for b.home.Get() != nil {
		b.frees++
	}
}

func (l *lender) check(t *testing.T) {
	t.Helper()
	l.poison()
	l.mu.Lock()
	defer l.mu.Unlock()
	twice := 0
	for _, b := range l.back {
		if b.count(); b.frees > 1 {
			twice++
		}
	}
	if len(l.out) > 0 || twice > 0 {
		t.Errorf("of %d buffers, %d were not given back and %d more than once", l.frames, len(l.out), twice)
	}
	l.out, l.back, l.frames = nil, nil, 0
}
