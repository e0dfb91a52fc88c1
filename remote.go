package main

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"time"
)

// A backend is where the hub keeps its sessions when that is not this process.
type backend interface {
	// check looks at it once. An *unfitError is final; after any other it may be
	// there later.
	check(ctx context.Context) error
	// close ends whatever waits for it.
	close()
}

// An unfitError says that the backend is none that can be used, however long one
// waits.
type unfitError struct{ text string }

func (e *unfitError) Error() string { return e.text }

// A remoteSeat is the seat of a hub that may take its time to answer, as a
// connection holds it. Whoever has the write turn never waits for the hub: what
// there is to take is fetched by a goroutine, which takes the turn when it is
// back. And while the reading goroutine waits, that is no silence of the client.
type remoteSeat struct {
	seat // static once joined
	c    *conn

	news atomic.Bool // something may have come since the last fetch began

	mu sync.Mutex
	// guarded by mu
	fetched  []frame // and not yet taken
	fetching bool
	more     bool // there was more to fetch
	mail     bool // mail is asked for
	failed   int  // fetches in a row, at most maxRetries
	waiting  bool // until the next try
}

// What is fetched at once. With the connection it is lost, as far as it is not
// mail.
const (
	fetchFrames = takeFrames
	fetchBytes  = 16 << 10
)

// A fetch that failed is tried again after retryFetch, then twice as late each
// time, but never later than after a heartbeat.
const (
	retryFetch = 250 * time.Millisecond
	maxRetries = 10 // that are counted
)

func newRemoteSeat(c *conn) *remoteSeat {
	r := &remoteSeat{c: c}
	r.news.Store(true)
	return r
}

// ask notes that the reading goroutine waits for the hub.
func (r *remoteSeat) ask() (answered func()) {
	r.c.asking.Store(true)
	return func() {
		r.c.touch()
		r.c.asking.Store(false)
	}
}

func (r *remoteSeat) Post(ctx context.Context, to string, f frame, hold bool) (receipt, error) {
	defer r.ask()()
	return r.seat.Post(ctx, to, f, hold)
}

func (r *remoteSeat) Flush(ctx context.Context) {
	defer r.ask()()
	r.seat.Flush(ctx)
}

func (r *remoteSeat) Held(ctx context.Context) (bool, error) {
	defer r.ask()()
	return r.seat.Held(ctx)
}

func (r *remoteSeat) Ack(ctx context.Context, upTo uint64) error {
	defer r.ask()()
	return r.seat.Ack(ctx, upTo)
}

func (r *remoteSeat) Report(ctx context.Context, o outcome) (since time.Duration, first bool, err error) {
	defer r.ask()()
	return r.seat.Report(ctx, o)
}

// Take hands out what has been fetched, and sees to it that more is. It never
// begins a fetch as it hands something out: where the next one begins is known
// when that has been taken.
func (r *remoteSeat) Take(_ context.Context, after uint64, budget int, buf []frame) (taken []frame, more bool, err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	n, bytes := 0, 0
	for n < len(r.fetched) && len(buf) < cap(buf) && (bytes == 0 || bytes+r.fetched[n].size() <= budget) {
		bytes += r.fetched[n].size()
		buf = append(buf, r.fetched[n])
		n++
	}
	clear(r.fetched[:n])
	if r.fetched = r.fetched[n:]; len(r.fetched) > 0 {
		return buf, true, nil
	}
	if mail := after != noMail; mail != r.mail {
		r.mail = mail
		r.news.Store(true)
	}
	switch {
	case r.fetching: // which takes the turn when it is back
	case n > 0:
		return buf, r.more || r.news.Load(), nil
	case r.news.Swap(false) || r.more:
		r.fetching = true
		r.c.tasks.Go(func() { r.fetch(after) })
	}
	return buf, false, nil
}

// fetch takes what waits. One that fails is tried again, later each time, until
// the connection ends.
func (r *remoteSeat) fetch(after uint64) {
	frames, more, err := r.seat.Take(context.Background(), after, fetchBytes, make([]frame, 0, fetchFrames))
	r.mu.Lock()
	r.fetched, r.more, r.fetching = frames, more, false
	if err == nil {
		r.failed = 0
	} else if !errors.Is(err, errReplaced) && !errors.Is(err, errGone) { // of which the connection is told
		r.tryLaterLocked()
	}
	r.mu.Unlock()
	if len(frames) > 0 || err == nil && r.news.Load() {
		r.c.wake()
	}
}

// tryLaterLocked has what could not be fetched looked for again. The caller holds
// mu.
func (r *remoteSeat) tryLaterLocked() {
	r.news.Store(true)
	if r.waiting || r.c.closing() != 0 {
		return
	}
	r.waiting = true
	time.AfterFunc(min(retryFetch<<r.failed, r.c.heartbeat), func() {
		r.mu.Lock()
		r.waiting = false
		r.mu.Unlock()
		r.c.wake()
	})
	r.failed = min(r.failed+1, maxRetries)
}
