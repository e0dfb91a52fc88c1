package main

import "slices"

// An idLog knows which ids of a sender's mail have been stored: all up to the
// highest, save those that were refused and may be sent again. Ids count up, so
// what was refused between two stored ones is a gap. The zero idLog is that of
// a sender that has sent nothing; the id 0 stands for none.
type idLog struct {
	last    uint64  // the highest stored
	lastSeq uint64  // its seq
	refused uint64  // the lowest refused above last, or 0
	gaps    []idGap // below last, ascending; none of their ids is stored
}

// An idGap is the ids from lo to hi.
type idGap struct{ lo, hi uint64 }

// maxGaps bounds the gaps remembered. A sender that goes on without sending
// again what was refused, so often, has given up the oldest of it.
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
	if id > l.last {
		return false
	}
	return !slices.ContainsFunc(l.gaps, func(g idGap) bool { return g.lo <= id && id <= g.hi })
}

// refuse notes that id was not stored.
func (l *idLog) refuse(id uint64) {
	if id > l.last && (l.refused == 0 || id < l.refused) {
		l.refused = id
	}
}

// store notes that id, which was not stored, is now, with seq.
func (l *idLog) store(id, seq uint64) {
	switch {
	case id == 0:
	case id > l.last:
		if l.refused != 0 && l.refused < id {
			l.gaps = append(l.gaps, idGap{l.refused, id - 1})
		}
		l.last, l.lastSeq, l.refused = id, seq, 0
	default:
		l.fill(id)
	}
	if len(l.gaps) > maxGaps {
		l.gaps = slices.Delete(l.gaps, 0, 1)
	}
}

// fill takes id out of the gap it is in.
func (l *idLog) fill(id uint64) {
	i := slices.IndexFunc(l.gaps, func(g idGap) bool { return g.lo <= id && id <= g.hi })
	if i < 0 {
		return
	}
	g := l.gaps[i]
	var rest []idGap
	if g.lo < id {
		rest = append(rest, idGap{g.lo, id - 1})
	}
	if id < g.hi {
		rest = append(rest, idGap{id + 1, g.hi})
	}
	l.gaps = slices.Replace(l.gaps, i, i+1, rest...)
}
