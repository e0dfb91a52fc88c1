package main

import (
	"math/rand/v2"
	"slices"
	"testing"

	"pgregory.net/rapid"
)

// A queue is what a slice is, whatever is pushed, shifted and filtered, and it
// keeps hold of nothing that has left it.
func TestFrameQueue(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	var q frameQueue
	var want []uint64
	next := uint64(0)
	for range 20_000 {
		switch n := len(want); {
		case random.IntN(100) == 0:
			keep := func(seq uint64) bool { return seq%3 != 0 }
			removed := q.filter(func(f *frame) bool { return keep(f.seq) })
			want = slices.DeleteFunc(want, func(seq uint64) bool { return !keep(seq) })
			if removed != n-len(want) {
				t.Fatalf("filter removed %d of %d, want %d", removed, n, n-len(want))
			}
		case random.IntN(3) == 0 && n > 0:
			taken := random.IntN(n) + 1
			q.shift(taken)
			want = want[taken:]
		default:
			for range random.IntN(40) {
				next++
				q.push(frame{seq: next, data: []byte{1}})
				want = append(want, next)
			}
		}
		got := make([]uint64, 0, len(want))
		for _, f := range q.waiting() {
			got = append(got, f.seq)
		}
		if !slices.Equal(got, want) || q.len() != len(want) {
			t.Fatalf("%d wait: %v, want %v", q.len(), got, want)
		}
		for i, f := range q.frames[:cap(q.frames)] {
			if f.data != nil && (i < q.head || i >= len(q.frames)) {
				t.Fatalf("frame %d has left and is still held", i)
			}
		}
	}
}

// Once it has grown, a queue that is filled and drained allocates nothing, and a
// long one that is drained is given up.
func TestFrameQueueMemory(t *testing.T) {
	var q frameQueue
	for range waitItems {
		q.push(frame{})
	}
	if n := testing.AllocsPerRun(1000, func() { q.shift(20); pushes(&q, 20) }); n != 0 {
		t.Errorf("%v allocations for 20 frames that pass a queue of %d", n, waitItems)
	}
	pushes(&q, 10*waitItems)
	if q.shift(q.len()); cap(q.frames) != 0 {
		t.Errorf("an empty queue has room for %d", cap(q.frames))
	}
	// One that is never quite empty shrinks as well.
	pushes(&q, 100*waitItems)
	q.shift(q.len() - 10)
	for range 100 * waitItems {
		pushes(&q, 1)
		q.shift(1)
	}
	if cap(q.frames) > 2*waitItems {
		t.Errorf("a queue of %d has room for %d", q.len(), cap(q.frames))
	}
}

func pushes(q *frameQueue, n int) {
	for range n {
		q.push(frame{})
	}
}

// However ids are refused, skipped and repeated: one that was refused is not taken
// for stored before it is, and one that is stored is known at once.
func TestIDLogProperty(t *testing.T) {
	type step struct {
		id     uint64
		refuse bool
	}
	for _, ids := range []uint64{10, 1000} { // of which the latter make more gaps than are kept
		steps := rapid.SliceOfN(rapid.Custom(func(t *rapid.T) step {
			return step{rapid.Uint64Range(1, ids).Draw(t, "id"), rapid.Bool().Draw(t, "refuse")}
		}), 1, 3*int(ids))
		rapid.Check(t, func(t *rapid.T) {
			var l idLog
			refused := map[uint64]bool{} // and not stored since
			for _, s := range steps.Draw(t, "steps") {
				switch {
				case l.stored(s.id):
				case s.refuse:
					refused[s.id] = true
					l.refuse(s.id)
				default:
					delete(refused, s.id)
					if l.store(s.id, 1); !l.stored(s.id) {
						t.Fatalf("%d is stored, and not known to be", s.id)
					}
				}
				for id := range refused {
					if l.stored(id) {
						t.Fatalf("%d was refused, and is taken for stored", id)
					}
				}
				if len(l.gaps) > maxGaps {
					t.Fatalf("%d gaps are remembered", len(l.gaps))
				}
			}
		})
	}
}

// The highest are stored one after the other, and what is refused between them is
// sent again much later, or never.
func TestIDLogBound(t *testing.T) {
	var l idLog
	for id := uint64(1); id <= 1000; id += 2 {
		l.refuse(id)
		l.store(id+1, id)
	}
	if len(l.gaps) != maxGaps {
		t.Errorf("%d gaps, want %d", len(l.gaps), maxGaps)
	}
	for id := uint64(1); id <= 1000; id += 2 {
		if l.stored(id) {
			t.Errorf("%d was refused, and is taken for stored", id)
		}
		if recent := id > 1000-2*(maxGaps-1); recent && !l.stored(id+1) {
			t.Errorf("%d is stored, and forgotten", id+1)
		}
	}
}
