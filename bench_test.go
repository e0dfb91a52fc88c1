package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/google/uuid"
)

// withoutRace says that this run is without the race detector.
var withoutRace bool

// TestWithoutRace runs the tests that the race detector would make meaningless
// in a run of their own.
func TestWithoutRace(t *testing.T) {
	if withoutRace {
		return // they are part of this one
	}
	run := exec.CommandContext(t.Context(), "go", "test", "-race=false", "-vet=off", "-count=1", "-run", "^TestAllocs", ".")
	out, err := run.CombinedOutput()
	if err != nil || strings.Contains(string(out), "no tests to run") {
		t.Errorf("%v\n%s", err, out)
	}
}

// iceFrame is a frame of 500 bytes as browsers send them.
var iceFrame = func() []byte {
	candidate := "candidate:842163049 1 udp 1677729535 203.0.113.77 46154 typ srflx raddr 192.168.1.7 rport 46154 generation 0 ufrag "
	const head, tail = `{"type":"ice","candidate":{"candidate":"`, `","sdpMid":"0","sdpMLineIndex":0,"usernameFragment":"kW3d"}}`
	return []byte(head + candidate + strings.Repeat("x", 500-len(head)-len(candidate)-len(tail)) + tail)
}()

// A relay is two seated connections and what frames pass between them, without
// the sockets.
type relay struct {
	t        testing.TB
	a, b     seat
	buffers  bufferPool
	decoders *sync.Pool
	taken    []frame
}

func newRelay(t testing.TB) *relay {
	h := newMemoryHub(hubOptions{
		resumeTTL: time.Minute, holdBytes: 1 << 20,
		queued: new(budget), owners: newQuota(0), dropped: func(dropReason, int) {},
	})
	r := &relay{t: t, decoders: newFrameDecoderPool(), taken: make([]frame, 0, 16)}
	id := uuid.New()
	for name, s := range map[string]*seat{"A": &r.a, "B": &r.b} {
		var err error
		if *s, _, err = h.Join(ctx, id, joinRequest{name: name, create: true}, func(error) {}); err != nil {
			t.Fatal(err)
		}
	}
	r.take()
	return r
}

// one relays a frame as a connection does, and lets the other side take it.
func (r *relay) one(take bool) {
	buf := r.buffers.get(len(iceFrame))
	data := buf.b[:copy(buf.b, iceFrame)]
	d := r.decoders.Get().(*frameDecoder)
	m, err := d.decode(data)
	r.decoders.Put(d)
	if err != nil || m.typ != typeIce {
		r.t.Fatal(m.typ, err)
	}
	if _, err := r.a.Post(ctx, "B", frame{typ: m.typ, data: data, buf: buf}, !take); err != nil {
		r.t.Fatal(err)
	}
	if take && r.take() != 1 {
		r.t.Fatal("the frame is not there")
	}
}

func (r *relay) take() int {
	taken, _, err := r.b.Take(ctx, noMail, 64<<10, r.taken)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range taken {
		taken[i].release()
	}
	return len(taken)
}

func BenchmarkDecodeFrame(b *testing.B) {
	if len(iceFrame) != 500 || !json.Valid(iceFrame) {
		b.Fatalf("%d bytes", len(iceFrame))
	}
	d := newFrameDecoderPool().New().(*frameDecoder)
	b.ReportAllocs()
	b.SetBytes(int64(len(iceFrame)))
	for b.Loop() {
		if _, err := d.decode(iceFrame); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRelay is what a relayed frame costs besides reading and writing it.
func BenchmarkRelay(b *testing.B) {
	r := newRelay(b)
	b.ReportAllocs()
	for b.Loop() {
		r.one(true)
	}
}

// BenchmarkMintRedeem is the whole life of a code, from mint to reclaim, with
// more and more of the others taken. The ratio is to the time in an empty table.
func BenchmarkMintRedeem(b *testing.B) {
	var empty float64
	for _, taken := range []int{0, 9_000, 9_990} {
		b.Run(fmt.Sprintf("taken=%d", taken), func(b *testing.B) {
			table := newTestTable(4, 4)
			fillCodes(table, 4, taken, time.Now().Add(time.Hour))
			session := uuid.New()
			b.ReportAllocs()
			for b.Loop() {
				code, expires, err := table.Mint(ctx, session, time.Minute)
				if err != nil {
					b.Fatal(err)
				}
				if _, _, err := table.Redeem(ctx, code); err != nil {
					b.Fatal(err)
				}
				table.mu.Lock()
				table.reclaim(expires.Sub(table.start)) // of just this one
				table.mu.Unlock()
			}
			perOp := float64(b.Elapsed()) / float64(b.N)
			if taken == 0 {
				empty = perOp
			}
			if empty > 0 {
				b.ReportMetric(perOp/empty, "x-empty")
			}
		})
	}
}

// BenchmarkJanitor is a pass over 100,000 sessions none of which has ended.
func BenchmarkJanitor(b *testing.B) {
	h := newMemoryHub(hubOptions{
		sessionTTL: time.Minute, resumeTTL: time.Minute, holdBytes: 1 << 20,
		queued: new(budget), owners: newQuota(0), dropped: func(dropReason, int) {},
	})
	for i := range 100_000 {
		id := uuid.New()
		if err := h.Open(ctx, meta{ID: id, Expires: time.Now().Add(time.Hour)}); err != nil {
			b.Fatal(err)
		}
		if i%2 == 0 { // half of them with a connection
			if _, _, err := h.Join(ctx, id, joinRequest{name: "A"}, func(error) {}); err != nil {
				b.Fatal(err)
			}
		}
	}
	holds := make(lockHolds, 0, 1<<20)
	b.ReportAllocs()
	for b.Loop() {
		now := time.Now()
		for i := range h.shards {
			begin := time.Now()
			h.shards[i].sweep(now)
			holds.add(time.Since(begin))
		}
	}
	holds.report(b)
}

// BenchmarkSweepCodes is a pass that finds 10,000 expired codes.
func BenchmarkSweepCodes(b *testing.B) {
	table := newTestTable(6, 6)
	holds := make(lockHolds, 0, 1<<20)
	now := time.Now()
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		fillCodes(table, 6, 10_000, now.Add(-time.Second))
		b.StartTimer()
		for more := true; more; {
			begin := time.Now()
			table.mu.Lock()
			more = table.reclaim(now.Sub(table.start))
			table.mu.Unlock()
			holds.add(time.Since(begin))
		}
	}
	holds.report(b)
	if active, _ := table.stats(); active > 0 {
		b.Error(active, "codes left")
	}
}

// lockHolds are durations for which a lock was held.
type lockHolds []time.Duration

func (h *lockHolds) add(d time.Duration) { *h = append(*h, d) }

// report reports the longest, and what is usual: the longest also shows when
// something else was given the processor meanwhile.
func (h lockHolds) report(b *testing.B) {
	slices.Sort(h)
	b.ReportMetric(float64(h[len(h)-1]), "max-lock-ns")
	b.ReportMetric(float64(h[len(h)*99/100]), "p99-lock-ns")
	b.ReportMetric(float64(h[len(h)/2]), "p50-lock-ns")
}
