package main

import "slices"

// An idLog knows which ids of a sender's mail have been stored: all up to the
// highest, save those that were refused and may be sent again. Ids count up, so
// what was refused between two stored ones is a gap. The zero idLog is that of
// a sender that has sent nothing; the id 0 stands for none.
type idLog struct {
	last    uint64  // the highest stored
	lastSeq uint64  // its seq
	refused idGap   // from the lowest to the highest refused above last; zero for none
	gaps    []idGap // below last, ascending; none of their ids is stored
}

// An idGap is the ids from lo to hi.
type idGap struct{ lo, hi uint64 }

func (g idGap) has(id uint64) bool { return g.lo <= id && id <= g.hi }

// with returns g, which may be zero, extended to id.
func (g idGap) with(id uint64) idGap {
	if g.lo == 0 {
		return idGap{id, id}
	}
	return idGap{min(g.lo, id), max(g.hi, id)}
}

// maxGaps bounds the gaps remembered. Of more, two become one, with the stored ids
// between them: those would be stored again if they were sent again, which nobody
// does so late. The other way around, what was refused would be lost.
const maxGaps = 64

// highest returns the highest id that has been stored, or 0. There may be no log
// yet.
func (l *idLog) highest() uint64 {
	if l == nil {
		return 0
	}
	return l.last
}

// stored reports whether id has been stored.
func (l *idLog) stored(id uint64) bool {
	return id <= l.last && !slices.ContainsFunc(l.gaps, func(g idGap) bool { return g.has(id) })
}

// refuse notes that id was not stored.
func (l *idLog) refuse(id uint64) {
	if id > l.last {
		l.refused = l.refused.with(id)
	}
}

// store notes that id, which was not stored, is now, with seq.
func (l *idLog) store(id, seq uint64) {
	switch {
	case id == 0:
		return
	case id > l.last:
		l.last, l.lastSeq = id, seq
		below, above := l.refused.without(id)
		if l.refused = above; below.lo != 0 {
			l.gaps = append(l.gaps, below)
		}
	default:
		l.fill(id)
	}
	if len(l.gaps) > maxGaps {
		l.merge(id)
	}
}

// without returns what is left of g below id and above it; zero for nothing.
func (g idGap) without(id uint64) (below, above idGap) {
	if g.lo < id {
		below = idGap{g.lo, min(g.hi, id-1)}
	}
	if id < g.hi {
		above = idGap{max(g.lo, id+1), g.hi}
	}
	return below, above
}

// fill takes id out of the gap it is in.
func (l *idLog) fill(id uint64) {
	i := slices.IndexFunc(l.gaps, func(g idGap) bool { return g.has(id) })
	if i < 0 {
		return
	}
	var rest []idGap
	below, above := l.gaps[i].without(id)
	for _, g := range []idGap{below, above} {
		if g.lo != 0 {
			rest = append(rest, g)
		}
	}
	l.gaps = slices.Replace(l.gaps, i, i+1, rest...)
}

// merge makes one gap of the two oldest between which id, stored just now, is not.
func (l *idLog) merge(id uint64) {
	i := 0
	if l.gaps[0].hi < id && id < l.gaps[1].lo {
		i = 1
	}
	l.gaps = slices.Replace(l.gaps, i, i+2, idGap{l.gaps[i].lo, l.gaps[i+1].hi})
}
