package main

// A frameQueue holds frames in the order they came. Its memory is used again,
// so that frames which come as fast as others are taken cost no allocation.
type frameQueue struct {
	frames []frame
	head   int // of frames, those before it have been taken
}

// waiting returns what is in the queue, until that is next changed.
func (q *frameQueue) waiting() []frame { return q.frames[q.head:] }

func (q *frameQueue) len() int { return len(q.frames) - q.head }

func (q *frameQueue) push(f frame) {
	if len(q.frames) == cap(q.frames) {
		q.makeRoom()
	}
	q.frames = append(q.frames, f)
}

// makeRoom moves what waits to the front, if at least as much is free there, but
// not so much more that a burst must be over; else there is twice the space that
// what waits takes.
func (q *frameQueue) makeRoom() {
	if n := q.len(); q.head >= n && cap(q.frames) <= max(4*n, 2*waitItems) {
		copy(q.frames, q.waiting())
		clear(q.frames[n:])
		q.frames = q.frames[:n]
	} else {
		q.frames = append(make([]frame, 0, max(1, 2*n)), q.waiting()...)
	}
	q.head = 0
}

// shift removes the first n frames.
func (q *frameQueue) shift(n int) {
	clear(q.frames[q.head : q.head+n])
	if q.head += n; q.head < len(q.frames) {
		return
	}
	q.frames, q.head = q.frames[:0], 0
	if cap(q.frames) > 2*waitItems {
		q.frames = nil // a burst is over
	}
}

// filter keeps the frames that keep approves and returns how many it removed.
func (q *frameQueue) filter(keep func(*frame) bool) (removed int) {
	kept := q.frames[:q.head]
	for i := range q.waiting() {
		if f := &q.waiting()[i]; keep(f) {
			kept = append(kept, *f)
		}
	}
	removed = len(q.frames) - len(kept)
	clear(q.frames[len(kept):])
	q.frames = kept
	return removed
}
