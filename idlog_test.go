package main

import (
	"testing"

	"pgregory.net/rapid"
)

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
