//go:build !race

package main

import (
	"fmt"
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

// No packet that is relayed on a channel leaves anything behind.
func TestAllocsTURN(t *testing.T) {
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	synctest.Test(t, func(t *testing.T) {
		h := newHandOver(t)
		if n := testing.AllocsPerRun(1000, h.one); n != 0 || h.w.n != 1001 {
			t.Errorf("relaying a packet allocates %v times; %d were relayed", n, h.w.n)
		}
	})
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
			r := testing.Benchmark(hot.bench)
			if r.N == 0 {
				t.Fatal("the benchmark failed")
			}
			if got := float64(r.MemAllocs) / float64(r.N); got > float64(hot.allocs)+0.5 {
				t.Errorf("%.2f allocations each time, were at most %d", got, hot.allocs)
			}
		})
	}
}

// TestAllocsWaiting holds what is counted to wait to what it takes in memory,
// whatever size the frames have, until the sender is held back.
func TestAllocsWaiting(t *testing.T) {
	heap := func() int {
		runtime.GC()
		runtime.GC() // pools keep what they have through one
		var m runtime.MemStats
		runtime.ReadMemStats(&m)
		return int(m.HeapAlloc)
	}
	for _, size := range []int{14, 200, 500, 513, 4096, 100_000} {
		t.Run(fmt.Sprint(size), func(t *testing.T) {
			r := newRelay(t)
			before, base := heap(), r.queued.used.Load() // A is told of B
			for held := false; !held; {
				buf := r.buffers.get(max(size, firstBuffer))
				receipt, err := r.a.Post(ctx, "B", frame{typ: typeIce, data: buf.b[:size], buf: buf}, true)
				if err != nil {
					t.Fatal(err)
				}
				held = receipt.held
			}
			took := heap() - before
			counted := int(r.queued.used.Load() - base)
			t.Logf("%d bytes counted, %d taken", counted, took)
			if took > 2*counted {
				t.Errorf("%d bytes are counted, which take %d", counted, took)
			}
			for r.take() > 0 {
			}
			if left := r.queued.used.Load() - base; left != 0 {
				t.Errorf("%d bytes are counted when nothing waits", left)
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
